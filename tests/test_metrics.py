"""What lesson 02 does not teach: parity with the reference libraries, hand counts, devices, dtypes,
bad input."""

import math, random, threading, warnings

from common import DEVICES
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from restore_lib.data import digits, photos
from restore_lib.project import data_home
from restore_lib.metrics import (
    Scores, count_macs, count_params, evaluate, human, latency, peak_memory,
    psnr, ssim, ssim_map, to_y,
)
from restore_lib.trunks import lpips, st_lpips


@pytest.fixture(scope='module')
def photo():
    return photos('test')['coffee'][None, :, 100:260, 200:377]  # (1, 3, 160, 177)


def noisy(x, sigma=0.1, seed=0):
    return x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def sk_ssim(a, b, data_range=1):
    return structural_similarity(
        a.double().numpy(),
        b.double().numpy(),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=0,
        data_range=data_range,
    )


# PSNR and SSIM ------------------------------------------------------------------------------------


@pytest.mark.parametrize('channels', [1, 2, 3, 5])
@pytest.mark.parametrize('size', [(11, 11), (11, 40), (33, 64)])
def test_ssim_equals_skimage(channels, size):
    g = torch.Generator().manual_seed(channels)
    a = torch.rand(3, channels, *size, generator=g)
    b = noisy(a, 0.2)
    assert np.allclose(ssim(b, a), [sk_ssim(p, q) for p, q in zip(a, b)], atol=1e-6)


def test_ssim_on_photographs(photo):
    worst = 0
    for b in (
        noisy(photo, 0.02),
        photo * 0.5,
        photo.roll(3, -1),
        1 - photo,
        torch.full_like(photo, 0.7),
        photo + 1e-3,
    ):
        worst = max(worst, abs(ssim(b, photo).item() - sk_ssim(photo[0], b[0])))
    assert worst < 5e-6
    flat = torch.full_like(photo, 0.8)  # the hard case for E[x^2] - E[x]^2
    assert abs(ssim(flat, noisy(flat, 1e-3)).item() - sk_ssim(flat[0], noisy(flat, 1e-3)[0])) < 2e-5


def test_ssim_equals_torchmetrics(photo):
    from torchmetrics.functional.image import structural_similarity_index_measure as theirs

    b = noisy(photo)
    mean, full = theirs(
        b, photo, data_range=1.0, gaussian_kernel=True, sigma=1.5, return_full_image=True
    )
    assert (
        abs(ssim(b, photo).item() - full[..., 5:-5, 5:-5].mean().item()) < 1e-5
    )  # where the whole window fits
    assert abs(ssim(b, photo).item() - mean.item()) < 5e-3  # its own mean includes a reflected rim


@pytest.mark.parametrize('data_range', [1, 2, 255.0])
def test_data_range_is_a_unit(photo, data_range):
    b = noisy(photo)
    assert torch.allclose(
        psnr(b * data_range, photo * data_range, data_range), psnr(b, photo), atol=1e-3
    )
    assert torch.allclose(
        ssim(b * data_range, photo * data_range, data_range), ssim(b, photo), atol=1e-5
    )
    assert (
        abs(
            ssim(b * data_range, photo * data_range, data_range).item()
            - sk_ssim(photo[0] * data_range, b[0] * data_range, data_range)
        )
        < 1e-5
    )


def test_psnr_equals_skimage_and_is_inf_for_identical(photo):
    batch = torch.cat([photo, photo.flip(-1), photo])
    other = torch.cat([noisy(photo, 0.001), noisy(photo, 0.5).flip(-1), photo])
    got = psnr(other, batch)
    for k in range(2):
        assert (
            abs(
                got[k].item()
                - peak_signal_noise_ratio(
                    batch[k].double().numpy(), other[k].double().numpy(), data_range=1
                )
            )
            < 1e-4
        )
    assert got[2] == math.inf and ssim(photo, photo).item() == pytest.approx(1, abs=1e-6)


def test_psnr_sum_is_accurate():
    x = torch.full((1, 1, 3000, 3000), 0.3)
    assert abs(psnr(x, x + 2**-10).item() - 20 * math.log10(1024)) < 1e-3


@pytest.mark.parametrize('fn', [psnr, ssim])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(fn, dtype, photo):
    a, b = photo.to(dtype), noisy(photo).to(dtype)
    out = fn(b, a)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(out.double(), fn(b.double(), a.double()), atol=1e-4)


@pytest.mark.parametrize('device', DEVICES)
def test_devices(device, photo):
    b = noisy(photo)
    for fn in (psnr, ssim):
        assert torch.allclose(fn(b.to(device), photo.to(device)).cpu(), fn(b, photo), atol=1e-5)


def test_autocast_does_not_lower_the_precision(photo):
    b = noisy(photo)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = ssim(b, photo), psnr(b, photo)
    assert torch.equal(inside[0], ssim(b, photo)) and torch.equal(inside[1], psnr(b, photo))


def test_gradients():
    a, b = (
        torch.rand(2, 2, 13, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
        for s in (0, 1)
    )
    for fn in (ssim, psnr):
        assert torch.autograd.gradcheck(
            fn, (a.clone().requires_grad_(), b.clone().requires_grad_())
        )


def test_ascending_ssim_restores(photo):
    x, y = photo[:, :1, :64, :64], noisy(photo)[:, :1, :64, :64].clone().requires_grad_()
    start = ssim(y, x).item()
    opt = torch.optim.Adam([y], 0.01)
    for _ in range(30):
        opt.zero_grad()
        (1 - ssim(y, x).mean()).backward()
        opt.step()
    assert ssim(y, x).item() > start + 0.2


@pytest.mark.parametrize('fn', [psnr, ssim])
def test_bad_images(fn, photo):
    x = photo
    with pytest.raises(ValueError, match=r'\(1, 3, 160, 177\).*\(1, 3, 160, 176\)'):
        fn(x, x[..., 1:])
    with pytest.raises(ValueError, match='shape'):
        fn(x, x[:, :1])  # no broadcasting
    with pytest.raises(ValueError, match='b holds 1 values that are NaN'):
        fn(x, x.clone().index_put_((torch.tensor(0),) * 4, torch.tensor(float('nan'))))
    with pytest.raises(ValueError, match='expected'):
        fn(x[0], x[0])
    with pytest.raises(TypeError, match='uint8'):
        fn((x * 255).byte(), x)
    with pytest.raises(TypeError, match='ndarray'):
        fn(x, x.numpy())
    with pytest.raises(ValueError, match='0 to 255'):
        fn(x, x * 255)
    with pytest.raises(ValueError, match='at least one pixel'):
        fn(x[..., :0], x[..., :0])
    for bad, error in (
        (0, ValueError),
        (-1, ValueError),
        (float('nan'), ValueError),
        ('1', TypeError),
        (None, TypeError),
    ):
        with pytest.raises(error, match='data_range'):
            fn(x, x, data_range=bad)


def test_too_small_for_ssim():
    with pytest.raises(ValueError, match=r'\(1, 1, 20, 10\).*11 pixels'):
        ssim(torch.rand(1, 1, 20, 10), torch.rand(1, 1, 20, 10))


def test_half_normalised_perfect_restoration():
    x, _ = digits(500)
    assert psnr(2 * x - 1, x).mean() < 1.5


@pytest.mark.skipif(not (data_home() / 'mnist').is_dir(), reason='MNIST is not in data_home()')
def test_half_normalised_perfect_restoration_on_mnist():
    x, _ = digits(5000, source='mnist')
    for padding, db in (
        (0, 0.70),
        (2, 0.53),
    ):  # at 28 x 28, and padded to 32 x 32 as in the system that did it
        z = F.pad(x, (padding,) * 4)
        assert abs(-10 * (2 * z - 1 - z).square().mean().log10().item() - db) < 0.03


# Y channel ----------------------------------------------------------------------------------------


def test_to_y_equals_skimage(photo):
    from skimage.color import rgb2ycbcr

    assert np.allclose(
        to_y(photo)[0, 0].numpy() * 255,
        rgb2ycbcr(photo[0].permute(1, 2, 0).numpy())[..., 0],
        atol=1e-3,
    )
    with pytest.raises(ValueError, match='1 channels'):
        to_y(photo[:, :1])


# perceptual distances -----------------------------------------------------------------------------


@pytest.fixture(scope='module')
def squeeze():
    return lpips('squeeze', weights='random')


# counting -----------------------------------------------------------------------------------------


def test_count_params():
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 8))
    m[2].bias.requires_grad_(False)
    assert (
        count_params(m) == 3 * 8 * 9 + 8 + 16 + 64 + 8
        and count_params(m, trainable=True) == count_params(m) - 8
    )
    m.append(m[2])
    assert count_params(m) == 3 * 8 * 9 + 8 + 16 + 64 + 8


class Qkv(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


X = torch.rand(2, 4, 16, 16)
CASES = {
    'conv': (nn.Conv2d(4, 8, 3, padding=1), (X,), 2 * 8 * 256 * 4 * 9),
    'strided conv': (nn.Conv2d(4, 8, 3, stride=2, padding=1), (X,), 2 * 8 * 64 * 4 * 9),
    'dilated conv': (nn.Conv2d(4, 8, 3, dilation=2), (X,), 2 * 8 * 144 * 4 * 9),
    'grouped conv': (nn.Conv2d(4, 8, 3, padding=1, groups=2), (X,), 2 * 8 * 256 * 2 * 9),
    'depthwise conv': (nn.Conv2d(4, 4, 3, padding=1, groups=4), (X,), 2 * 4 * 256 * 9),
    'transposed conv': (
        nn.ConvTranspose2d(4, 8, 4, stride=2, padding=1),
        (X,),
        2 * 256 * 4 * 8 * 16,
    ),
    'grouped transposed conv': (
        nn.ConvTranspose2d(4, 8, 4, stride=2, padding=1, groups=2),
        (X,),
        2 * 256 * 4 * 4 * 16,
    ),
    'conv1d': (nn.Conv1d(4, 6, 5), (X[..., 0],), 2 * 6 * 12 * 4 * 5),
    'linear': (nn.Linear(16, 5), (X,), 2 * 4 * 16 * 16 * 5),
    'linear, no bias': (nn.Linear(16, 5, bias=False), (X,), 2 * 4 * 16 * 16 * 5),
    'bmm': (torch.bmm, (torch.rand(3, 4, 5), torch.rand(3, 5, 6)), 3 * 4 * 5 * 6),
    'mv': (torch.mv, (torch.rand(7, 5), torch.rand(5)), 35),
    'dot': (torch.dot, (torch.rand(7), torch.rand(7)), 7),
    'einsum': (lambda x: torch.einsum('bchw,oc->bohw', x, torch.rand(7, 4)), (X,), 2 * 7 * 4 * 256),
    'functional conv': (lambda x: F.conv2d(x, torch.rand(2, 4, 3, 3)), (X,), 2 * 2 * 196 * 4 * 9),
    'sdpa': (
        Qkv(),
        (torch.rand(2, 4, 10, 8), torch.rand(2, 4, 7, 8), torch.rand(2, 4, 7, 8)),
        2 * 4 * 10 * 7 * 16,
    ),
    'sdpa, other v': (
        Qkv(),
        (torch.rand(2, 4, 10, 8), torch.rand(2, 4, 7, 8), torch.rand(2, 4, 7, 6)),
        2 * 4 * 10 * 7 * 14,
    ),
    'mha': (
        lambda z, m=nn.MultiheadAttention(32, 4, batch_first=True).eval(): m(
            z, z, z, need_weights=False
        ),
        (torch.rand(2, 10, 32),),
        2 * (4 * 10 * 32 * 32 + 2 * 10 * 10 * 32),
    ),
    'mha with weights': (
        lambda z, m=nn.MultiheadAttention(32, 4, batch_first=True).eval(): m(z, z, z),
        (torch.rand(2, 10, 32),),
        2 * (4 * 10 * 32 * 32 + 2 * 10 * 10 * 32),
    ),
    'encoder layer': (
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
        (torch.rand(2, 10, 32),),
        2 * (4 * 10 * 32 * 32 + 2 * 10 * 10 * 32 + 2 * 10 * 32 * 64),
    ),
    'lstm': (nn.LSTM(16, 8, batch_first=True), (torch.rand(2, 5, 16),), 2 * 5 * 4 * 8 * (16 + 8)),
    'gru': (nn.GRU(16, 8, batch_first=True), (torch.rand(2, 5, 16),), 2 * 5 * 3 * 8 * (16 + 8)),
    'cdist': (torch.cdist, (torch.rand(40, 8), torch.rand(50, 8)), 40 * 50 * 8),
    'small cdist': (torch.cdist, (torch.rand(4, 8), torch.rand(5, 8)), 4 * 5 * 8),
    'batched cdist': (torch.cdist, (torch.rand(3, 40, 8), torch.rand(3, 50, 8)), 3 * 40 * 50 * 8),
    'nothing': (nn.ReLU(), (X,), 0),
}


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('device', DEVICES)
def test_macs_by_hand(case, device):
    model, inputs, expected = CASES[case]
    if device == 'cuda':
        if not isinstance(model, nn.Module):
            pytest.skip('makes its weights on the CPU')
        model, inputs = model.to(device), [t.to(device) for t in inputs]
    try:
        assert count_macs(model, *inputs) == expected
    finally:
        model.to('cpu') if isinstance(model, nn.Module) else None


def test_counting_leaves_no_trace():
    m = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    m[1].eval()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    noise = lambda x: m(x) + torch.randn_like(x)
    state, fused = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    count_macs(noise, X)
    count_macs(m, X)
    latency(m, X, repeats=1, warmup=0)
    assert torch.equal(state, torch.get_rng_state())
    assert [k.training for k in m] == [True, False, True] and m.training
    assert all(torch.equal(before[k], v) for k, v in m.state_dict().items())
    with pytest.raises(RuntimeError):
        count_macs(m, X[:, :2])
    assert [k.training for k in m] == [
        True,
        False,
        True,
    ] and torch.backends.mha.get_fastpath_enabled() == fused
    assert torch.is_grad_enabled()


def test_human_never_confuses_units():
    assert [human(n) for n in (0, 7, 999, 1000, 1.234e6, 4.5e9, 999_600, 999_499, 1e15)] == [
        '0',
        '7',
        '999',
        '1 k',
        '1.23 M',
        '4.5 G',
        '1 M',
        '999 k',
        '1000 T',
    ]


def test_latency():
    import time

    calls = []

    def slow(x):
        calls.append(torch.is_grad_enabled())
        time.sleep(0.05 if len(calls) <= 2 else 0.005)

    assert 0.004 < latency(slow, X, repeats=5, warmup=2) < 0.03
    assert len(calls) == 7 and not any(calls)
    with pytest.raises(ValueError, match='repeats is 0'):
        latency(slow, X, repeats=0)


def test_peak_memory_by_hand(capfd):
    x, small = torch.rand(1000, 500), 4096  # bytes of wrapped scalars
    assert 0 <= peak_memory(lambda x: x + 1, x) - 4 * x.numel() < small
    assert (
        0 <= peak_memory(lambda x: ((x + 1) * 2).sum(), x) - 8 * x.numel() < small
    )  # both live at once, then freed
    assert peak_memory(lambda x: x.view(-1), x) < small
    im = torch.rand(1, 3, 64, 64)
    assert (
        27 * 62 * 62 * 4
        <= peak_memory(lambda: F.unfold(im, 3)[..., :1])
        < 27 * 62 * 62 * 4 + im.numel() * 4 + small
    )  # im2col, thrown away
    assert 'profiler' not in capfd.readouterr().err.lower()
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0)
    assert 0 <= peak_memory(lambda x: x + 1, x) - 4 * x.numel() < small  # usable after a failure


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_peak_memory_on_cuda():
    x = torch.rand(1000, 1000, device='cuda')
    assert 4 * x.numel() <= peak_memory(lambda x: x + 1, x) < 4 * x.numel() + 2**20


@pytest.fixture(scope='module')
def pairs():
    g = torch.Generator().manual_seed(0)
    return {
        n: (torch.rand(3, *s, generator=g), torch.rand(3, *s, generator=g))
        for n, s in dict(a=(20, 30), b=(40, 16)).items()
    }


def test_evaluate(pairs):
    s = evaluate(lambda y: y * 3 - 1, pairs)
    assert isinstance(s, Scores) and s.names == ['a', 'b'] and set(s.values) == {'PSNR', 'SSIM'}
    for k, (y, x) in enumerate(pairs.values()):
        assert s['PSNR'][k] == psnr((y * 3 - 1).clamp(0, 1)[None], x[None])[0]
        assert s['SSIM'][k].item() == pytest.approx(sk_ssim((y * 3 - 1).clamp(0, 1), x), abs=1e-5)
    assert s.mean['PSNR'] == pytest.approx(s['PSNR'].mean().item())
    lines = s._repr_markdown_().splitlines()
    assert (
        lines[-1].startswith('| mean |') and len(lines) == 5 and f'{s.mean["SSIM"]:.4f}' in repr(s)
    )


def test_evaluate_takes_lists_generators_and_data_sets(pairs):
    whole = evaluate(lambda y: y, pairs)['PSNR']

    class Endless(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return list(pairs.values())[i % 2]

    for p in (list(pairs.values()), iter(pairs.values()), Endless()):
        s = evaluate(lambda y: y, p, names=['p', 'q'])
        assert torch.equal(s['PSNR'], whole) and s.names == ['p', 'q']
    assert evaluate(lambda y: y, list(pairs.values())).names == ['0', '1']


def test_evaluate_border_and_size(pairs):
    up = lambda y: F.interpolate(y, scale_factor=2)
    x = torch.rand(3, 40, 60)
    y = F.avg_pool2d(x, 2)
    s = evaluate(up, [(y, x)], {'PSNR': psnr}, border=2)
    assert s['PSNR'][0] == psnr(up(y[None])[..., 2:-2, 2:-2], x[None, :, 2:-2, 2:-2])[0]
    with pytest.raises(ValueError, match='a: the model gave shape'):
        evaluate(up, pairs)
    with pytest.raises(ValueError, match='b.*border=8'):
        evaluate(lambda y: y, {'b': pairs['b']}, border=8)
    with pytest.raises(ValueError, match='b, SSIM.*11 pixels'):
        evaluate(lambda y: y, {'b': pairs['b']}, border=3)
    with pytest.raises(ValueError, match='border is -1'):
        evaluate(lambda y: y, pairs, border=-1)


def test_evaluate_restores_the_mode(pairs):
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.drop = nn.Conv2d(3, 3, 1), nn.Dropout(0.5).eval()

        def forward(self, y):
            seen.append((self.training, torch.is_grad_enabled()))
            return self.conv(y)

    net = Net()
    evaluate(net, pairs)
    assert seen == [(False, False)] * 2 and net.training and not net.drop.training
    with pytest.raises(ValueError):
        evaluate(net, {'a': (pairs['a'][0], pairs['b'][1])})
    assert net.training and torch.is_grad_enabled()
    evaluate(nn.Identity(), pairs)  # a module without parameters


def test_evaluate_names_random_weights(squeeze, pairs):
    s = evaluate(
        lambda y: y, {'a': (torch.rand(1, 32, 32), torch.rand(1, 32, 32))}, {'LPIPS': squeeze}
    )
    assert (
        list(s.values) == ['random-squeeze features']
        and 'random-squeeze' in s._repr_markdown_()
    )


def test_evaluate_knows_metrics_by_name(pairs):
    model = lambda y: y.clamp(0, 1)
    names = ['PSNR', 'SSIM', 'ST-LPIPS']
    scores = evaluate(model, pairs, names)
    asked = evaluate(model, pairs, {'PSNR': psnr, 'SSIM': ssim, 'ST-LPIPS': st_lpips()})
    assert list(scores.values) == names
    assert '| image | PSNR | SSIM | ST-LPIPS |' in scores.table().markdown()
    assert all(torch.equal(scores[n], asked[n]) for n in names)
    assert list(evaluate(model, pairs, ('SSIM',)).values) == ['SSIM']
    by_own_name = evaluate(model, pairs, {f.name: f for f in [st_lpips()]})
    assert torch.equal(by_own_name['ST-LPIPS-alex'], scores['ST-LPIPS'])
    perfect = evaluate(lambda y: y, [(y, y) for y, _ in pairs.values()], ['ST-LPIPS'])
    assert scores['ST-LPIPS'].min() > 0 and perfect['ST-LPIPS'].max() == 0
    with pytest.raises(ValueError, match="metrics holds 'LPIPS'; expected names out of PSNR, SSIM"):
        evaluate(model, pairs, ['PSNR', 'LPIPS'])
    for bad in ('ST-LPIPS', [], [st_lpips]):
        with pytest.raises(TypeError, match='expected names or a dict name -> function'):
            evaluate(model, pairs, bad)


def test_evaluate_bad_input(pairs):
    y, x = pairs['a']
    same = lambda y: y
    with pytest.raises(ValueError, match='empty'):
        evaluate(same, [])
    with pytest.raises(ValueError, match=r'x of bad spans.*\[-1, 1\]'):
        evaluate(same, {'ok': (y, x), 'bad': (y, 2 * x - 1)})
    with pytest.raises(ValueError, match='bad: the model gave values that are NaN'):
        evaluate(lambda y: y * float('nan'), {'bad': (y, x)})
    with pytest.raises(ValueError, match='x of bad holds'):
        evaluate(same, {'bad': (y, x / 0)})
    with pytest.raises(TypeError, match='x of bad is torch.uint8'):
        evaluate(same, {'bad': (y, x.byte())})
    with pytest.raises(TypeError, match='a: the model gave tuple'):
        evaluate(lambda y: (y,), pairs)
    with pytest.raises(ValueError, match='names holds 1'):
        evaluate(same, list(pairs.values()), names=['a'])
    with pytest.raises(ValueError, match='names holds 1'):
        evaluate(same, iter(pairs.values()), names=['a'])
    with pytest.raises(ValueError, match='expected a pair'):
        evaluate(same, [(y, x, x)])


def test_import_is_light():
    import subprocess, sys

    code = (
        'import sys, restore_lib.metrics; '
        'heavy = "lpips torchvision matplotlib skimage accelerate".split(); '
        'print([m for m in heavy if m in sys.modules])'
    )
    assert (
        subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == '[]'
    )


# what once was wrong without a word ---------------------------------------------------------------


@pytest.mark.parametrize('value', [0.01, 0.5, 0.91, 1.0])
@pytest.mark.parametrize('move', [1e-7, 3e-5, 1e-3, 0.0])
def test_ssim_of_flat_images_is_at_most_1_and_right(value, move):
    a = torch.full((1, 1, 16, 16), value)
    got, b = ssim(a, a + move), (a + move).double()
    light = (2 * value * b[0, 0, 0, 0] + 1e-4) / (
        value**2 + b[0, 0, 0, 0] ** 2 + 1e-4
    )  # by hand: there is no variance
    assert got.item() <= 1 and got.item() == pytest.approx(light.item(), abs=2e-7)
    assert ssim_map(a + move, a).max() <= 1


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ssim_keeps_to_its_range_with_finite_gradients(dtype):
    g = torch.Generator().manual_seed(0)
    waves = 0.5 + 0.5 * torch.sin(torch.arange(24.0) * 2)[None, None, :, None].expand(1, 1, 24, 24)
    flats = torch.full((1, 1, 24, 24), 0.91)
    for a, b in (
        (flats, flats),
        (waves, waves),
        (waves, 1 - waves),
        (flats, waves),
        (-waves, waves),
        (flats * 0, flats),
        (flats + 1e-4 * torch.rand(flats.shape, generator=g), flats),
    ):
        a, b = a.to(dtype), b.to(dtype).clone().requires_grad_()
        out = ssim(a, b)
        out.sum().backward()
        assert -1 <= out.item() <= 1 and b.grad.isfinite().all()
        ours, theirs = out.item(), sk_ssim(a[0], b[0].detach())
        assert ours == pytest.approx(theirs, abs=2e-6)


def test_a_truth_out_of_its_range_is_refused(squeeze, photo):
    x, y = photo[..., :64, :64], noisy(photo[..., :64, :64])
    for fn in (psnr, ssim, squeeze, st_lpips()):
        says = r'b spans -1 to 0\.9\d+; expected \[0, 1\] \(is it in \[-1, 1\]'
        if fn not in (psnr, ssim):
            says = r'x reaches from -1 to 0\.9\d+; expected range=\(0\.0, 1\.0\)'
        with pytest.raises(ValueError, match=says):
            fn(2 * y - 1, 2 * x - 1)
        for wrong in (x + 0.2, x - 0.3, 2 * x):
            with pytest.raises(ValueError, match='b spans|x reaches'):
                fn(x, wrong)
        assert (
            fn(y + 0.5, x).isfinite().all() and fn(y, 1.005 * x / x.max()).isfinite().all()
        )  # predictions overshoot; what was resampled, a little
    for fn in (psnr, ssim):
        signed, shifted = (
            fn(2 * y - 1, 2 * x - 1, 2),
            fn(2 * y, 2 * x, 2),
        )  # a range of 2 lies either way
        assert signed.isfinite().all() and (
            fn is ssim or torch.allclose(signed, shifted, atol=1e-4)
        )
        with pytest.raises(ValueError, match=r'b spans -1 to 2; expected \[0, 2\] or \[-1, 1\]'):
            fn(x, torch.linspace(-1, 2, 64).expand_as(x), 2)
        with pytest.raises(ValueError, match=r'expected \[0, 255\]'):
            fn(x, -255 * x, 255)


def test_evaluate_hands_out_copies(pairs):
    y, x = (t.clone() for t in pairs['a'])
    before, seen = (y.clone(), x.clone()), y - 0.5
    y.sub_(0.5)
    evaluate(nn.Sequential(nn.ReLU(inplace=True)), [(y, x)])
    assert torch.equal(y, seen) and torch.equal(x, before[1])
    scores = evaluate(lambda im: im.mul_(0), [(x, x)])
    assert torch.equal(x, before[1]) and scores['PSNR'][0] == psnr(0 * x[None], x[None])[0]

    def writes(a, b):
        return psnr(a.mul_(0), b.fill_(1))

    scores = evaluate(lambda im: im, [(y, x)], {'first': writes, 'PSNR': psnr})
    assert torch.equal(x, before[1]) and scores['PSNR'][0] == psnr(y[None].clamp(0, 1), x[None])[0]


class Slow(nn.Module):
    "Waits at a gate, so that two evaluations overlap for certain."

    def __init__(self):
        super().__init__()
        self.drop, self.conv, self.modes, self.gates = (
            nn.Dropout(0.5),
            nn.Conv2d(1, 1, 1).eval(),
            [],
            {},
        )

    def forward(self, y):
        inside, leave = self.gates[threading.current_thread().name]
        inside.set()
        assert leave.wait(10)
        self.modes.append((self.training, self.drop.training))
        return y


def test_overlapping_evaluations_leave_the_modes(pairs):
    net, y = Slow().train(), torch.rand(1, 16, 16)
    net.conv.eval()
    threads = []
    for name in ('first', 'second'):
        net.gates[name] = threading.Event(), threading.Event()
        threads.append(
            threading.Thread(
                target=evaluate, args=(net, [(y, y)], {'PSNR': lambda a, b: 1.0}), name=name
            )
        )
        threads[-1].start()
        assert net.gates[name][0].wait(10)
    for t in threads:  # the first one in is the first one out
        net.gates[t.name][1].set()
        t.join()
    assert (
        net.training
        and net.drop.training
        and not net.conv.training
        and net.modes == [(False, False)] * 2
    )


def test_a_perfect_image_is_named_where_it_makes_a_mean_infinite(pairs):
    x = pairs['a'][1]
    scores = evaluate(lambda y: y, {'perfect': (x, x), 'other': (x * 0.9, x)})
    assert (
        'PSNR is infinite for perfect, and so is its mean' in repr(scores)
        and 'SSIM is' not in repr(scores)
        and 'infinite for perfect' in scores._repr_markdown_()
    )
    with pytest.warns(UserWarning, match='infinite for perfect'):
        mean = scores.mean
    assert mean['PSNR'] == math.inf and mean['SSIM'] < 1 and scores.endless == {'PSNR': ['perfect']}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plain = evaluate(lambda y: y, {'other': (x * 0.9, x)})
        assert (
            'infinite' not in repr(plain)
            and plain.mean['PSNR'] == plain['PSNR'][0].item()
            and plain.endless == {}
        )


def test_evaluate_takes_one_number_an_image(pairs):
    same, one = lambda y: y, {'a': pairs['a']}
    for metric, error, text in (
        (lambda a, b: torch.full((1,), math.nan), ValueError, 'a, m gave NaN'),
        (lambda a, b: torch.tensor([1.0, 2.0]), ValueError, r'a, m gave shape \(2,\)'),
        (lambda a, b: a - b, ValueError, r'gave shape \(1, 3, 20, 30\)'),
        (lambda a, b: torch.zeros(0), ValueError, 'gave shape'),
        (lambda a, b: None, TypeError, 'a, m gave NoneType'),
        (lambda a, b: 'good', TypeError, 'a, m gave str'),
    ):
        with pytest.raises(error, match=text):
            evaluate(same, one, {'m': metric})
    for value in (1, np.float64(1), np.float32([1]), [1.0], torch.ones(1, 1)):
        assert evaluate(same, one, {'m': lambda a, b: value})['m'].tolist() == [1]
    for bad in ({}, [psnr]):
        with pytest.raises(TypeError, match='metrics is'):
            evaluate(same, one, bad)


def test_evaluate_refuses_what_has_no_mean(pairs):
    same, (y, x) = lambda y: y, pairs['a']
    with pytest.raises(
        ValueError, match='grey: y and x have 1 and 1 channels, those of rgb have 3 and 3'
    ):
        evaluate(same, {'rgb': (y, x), 'grey': (y[:1], x[:1])})
    with pytest.raises(ValueError, match='e has shape'):
        evaluate(same, {'e': (y[:, :0], x[:, :0])})
    with pytest.raises(TypeError, match="names is 'ab'"):
        evaluate(same, [(y, x)] * 2, names='ab')
    with pytest.raises(ValueError, match='names holds 3; pairs holds 2'):
        evaluate(same, iter([(y, x)] * 2), names=['a', 'b', 'c'])
    with pytest.raises(ValueError, match='names holds 0'):
        evaluate(same, pairs, names=[])
    for bad in (-1, 1.5, True, math.nan):
        with pytest.raises(ValueError, match='border is'):
            evaluate(same, pairs, border=bad)
    assert torch.equal(
        evaluate(same, pairs, {'PSNR': psnr}, border=np.int64(2))['PSNR'],
        evaluate(same, pairs, {'PSNR': psnr}, border=2)['PSNR'],
    )


def test_two_random_trunks_keep_columns_of_their_own(squeeze):
    im, other = torch.rand(1, 32, 32), lpips('squeeze', 'random', seed=np.int64(1))
    scores = evaluate(lambda y: y * 0.5, [(im, im)], {'A': squeeze, 'B': other})
    assert (
        list(scores.values) == [f'{k}: random-squeeze features' for k in 'AB']
        and scores['A: random-squeeze features']
        != scores['B: random-squeeze features']
    )


def random_states():
    return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


def equal(a, b):
    return torch.equal(a[0], b[0]) and (a[1] == b[1]).all() and a[2] == b[2]


def test_measuring_leaves_no_trace():
    net = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.Dropout(0.5))
    x, before, start = X - 0.5, {k: v.clone() for k, v in net.state_dict().items()}, random_states()
    kept = x.clone()

    def noise(x):
        return net(x) * random.random() * np.random.rand() + torch.randn_like(x)

    for call in (
        lambda f: count_macs(f, x),
        lambda f: latency(f, x, repeats=np.int64(2), warmup=np.int64(1)),
        lambda f: peak_memory(f, x),
    ):
        call(net)
        assert torch.equal(x, kept) and equal(start, random_states())
        assert net.training and net[2].training
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
        call(noise)
        assert torch.equal(x, kept) and equal(start, random_states())
        net.load_state_dict(before)  # a function's own module is out of sight
    nested = dict(x=[x, (x,)])
    count_macs(lambda d: d['x'][1][0].mul_(0), nested)
    assert torch.equal(x, kept)
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda x: 1 / 0, x)
    w = torch.ones(3, requires_grad=True)
    peak_memory(lambda w: w.sum().backward(), w)
    assert w.grad is None


def test_measuring_refuses_what_is_no_count():
    for kw in (
        dict(repeats=0),
        dict(repeats=1.5),
        dict(repeats=True),
        dict(warmup=-1),
        dict(warmup=math.nan),
    ):
        with pytest.raises(ValueError, match=next(iter(kw)) + ' is'):
            latency(nn.Identity(), X, **kw)
    for bad in (math.nan, math.inf, -1, True):
        with pytest.raises(ValueError, match='n is'):
            human(bad)
    assert (
        human(np.int64(1500)) == '1.5 k'
        and human(torch.tensor(7)) == '7'
        and human(np.float32(2e6)) == '2 M'
    )
