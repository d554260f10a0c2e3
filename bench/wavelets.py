"A round trip of two wavelet levels against PyWavelets, ptwt and a copy of the tensor; one thread, as PyWavelets has no more."
import numpy as np
import ptwt
import pywt
import torch
from harness import compare
from restore_lib.wavelets import wavedec2, waverec2


def pywt_loop(x, wavelet, mode):
    "Picture by picture, channel by channel, as it is often written."
    return np.stack([np.stack([pywt.waverec2(pywt.wavedec2(c, wavelet, mode, 2), wavelet, mode) for c in b]) for b in x])

def pywt_batched(x, wavelet, mode): return pywt.waverec2(pywt.wavedec2(x, wavelet, mode, 2), wavelet, mode)
def with_ptwt(x, wavelet, mode): return ptwt.waverec2(ptwt.wavedec2(x, wavelet, level=2, mode=mode), wavelet)
def ours(x, wavelet, mode): return waverec2(wavedec2(x, wavelet, 2, mode), wavelet, mode)

def backward(fn, x, *args):
    x = x.detach().requires_grad_()
    fn(x, *args).square().sum().backward()
    return x.grad

def measured():
    shape = (16, 3, 256, 256)
    torch.manual_seed(0)
    x = torch.rand(shape)
    a = x.numpy()
    for wavelet, mode in (('haar', 'symmetric'), ('db2', 'symmetric'), ('bior1.3', 'symmetric'), ('db10', 'symmetric'), ('db2', 'periodization')):
        subject, here = f'{wavelet}, {mode}, 2 levels and back, {"x".join(map(str, shape))}', lambda: ours(x, wavelet, mode)
        apart = lambda y: f'differs by {abs(np.asarray(y) - here().numpy()).max():.0e}'
        yield compare(subject, here, 'PyWavelets, loop', lambda: pywt_loop(a, wavelet, mode), 7, apart(pywt_loop(a, wavelet, mode)))
        yield compare(subject, here, 'PyWavelets, batched', lambda: pywt_batched(a, wavelet, mode), 9, apart(pywt_batched(a, wavelet, mode)))
        if mode != 'periodization':                                # ptwt has none
            yield compare(subject, here, 'ptwt', lambda: with_ptwt(x, wavelet, mode), 9, apart(with_ptwt(x, wavelet, mode)))
            yield compare(subject + ', forward + backward', lambda: backward(ours, x, wavelet, mode), 'ptwt', lambda: backward(with_ptwt, x, wavelet, mode), 7)
        yield compare(subject, here, 'a copy of the tensor', x.clone, 9)


def rows():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: yield from measured()
    finally: torch.set_num_threads(threads)
