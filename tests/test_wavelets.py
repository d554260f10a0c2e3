"""What lesson 11 does not teach: parity with PyWavelets over all wavelets, modes and sizes,
with SciPy, adjoints, energy, dtypes and devices, bad input."""

import gc, math, os, warnings
from pathlib import Path

from common import DEVICES
import numpy as np
import pytest
import pywt
import torch
from scipy.fft import dctn

from restore_lib.wavelets import (
    MODES,
    dct2,
    dwt2,
    extend,
    idct2,
    idwt2,
    packet2,
    unpacket2,
    wavedec2,
    waverec2,
)

ALL = pywt.wavelist(kind='discrete')
FEW = ('haar', 'db2', 'db3', 'sym5', 'bior1.3', 'rbio3.1', 'bior2.2', 'coif4')
TOL = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def quiet():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            'ignore', 'Level value'
        )  # PyWavelets, where a filter is longer than the picture
        yield


def rand(*shape, dtype=torch.float64, **kw):
    return torch.rand(*shape, dtype=dtype, **kw) * 2 - 1


def flat(coeffs):
    return [b for p in coeffs for b in (p if isinstance(p, (tuple, list)) else (p,))]


def numpy_of(coeffs):
    return [coeffs[0].numpy(), *(tuple(b.numpy() for b in d) for d in coeffs[1:])]


def off(ours, theirs):
    "The largest difference, relative to the largest value if that is over 1; inf if shapes differ."
    if tuple(ours.shape) != theirs.shape:
        return float('inf')
    return np.abs(ours.detach().numpy() - theirs).max() / max(1, np.abs(theirs).max())


# parity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('h, w', [(16, 17), (40, 9), (3, 2), (2, 5)])
@pytest.mark.parametrize('mode', MODES)
def test_every_wavelet_is_pywavelets(mode, h, w):
    x = rand(1, 2, h, w)
    wrong = []
    for wavelet in ALL:
        (LL, d), (A, D) = dwt2(x, wavelet, mode), pywt.dwt2(x.numpy(), wavelet, mode)
        gaps = [off(p, q) for p, q in zip((LL, *d), (A, *D))]
        random = [rand(*A.shape) for _ in range(4)]  # the inverse also of what no picture has
        gaps.append(
            off(
                idwt2((random[0], random[1:]), wavelet, mode),
                pywt.idwt2(
                    (random[0].numpy(), tuple(b.numpy() for b in random[1:])), wavelet, mode
                ),
            )
        )
        back = (idwt2((LL, d), wavelet, mode)[..., :h, :w] - x).abs().max().item()
        gaps.append(
            back
            if wavelet != 'dmey'
            else off(idwt2((LL, d), wavelet, mode), pywt.idwt2((A, D), wavelet, mode))
        )  # its filters are approximate
        if max(gaps) > TOL[x.dtype]:
            wrong.append((wavelet, max(gaps)))
    assert not wrong


@pytest.mark.parametrize('mode', MODES)
def test_every_wavelet_in_float32_two_levels(mode):
    x, wrong = rand(1, 1, 33, 18, dtype=torch.float32), []
    for wavelet in ALL:
        ours, theirs = wavedec2(x, wavelet, 2, mode), pywt.wavedec2(x.numpy(), wavelet, mode, 2)
        gaps = [off(p, q) for p, q in zip(flat(ours), flat(theirs))]
        gaps.append(
            off(waverec2(ours, wavelet, mode), pywt.waverec2(numpy_of(ours), wavelet, mode))
        )
        if max(gaps) > TOL[x.dtype] or any(b.dtype != torch.float32 for b in flat(ours)):
            wrong.append((wavelet, max(gaps)))
    assert not wrong


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize(
    'h, w, level', [(101, 66, 3), (7, 64, 4), (64, 64, 0), (37, 37, 1), (5, 9, 2)]
)
def test_levels(mode, h, w, level):
    x = rand(2, 3, h, w)
    for wavelet in FEW:
        if mode == 'reflect' and min(h, w) * 2 >> level < 2:
            continue  # PyWavelets refuses a row of one sample
        ours, theirs = (
            wavedec2(x, wavelet, level, mode),
            pywt.wavedec2(x.numpy(), wavelet, mode, level),
        )
        assert len(ours) == level + 1 and all(
            isinstance(d, tuple) and len(d) == 3 for d in ours[1:]
        )
        assert max(off(p, q) for p, q in zip(flat(ours), flat(theirs))) < 1e-10, wavelet
        back = waverec2(ours, wavelet, mode)
        assert (
            off(back, pywt.waverec2(theirs, wavelet, mode)) < 1e-10
            and (back[..., :h, :w] - x).abs().max() < 1e-10
        ), wavelet


@pytest.mark.parametrize('mode', MODES)
def test_extension(mode):
    for n in (1, 2, 3, 6, 7):
        x = rand(n)
        theirs = (
            pywt.pad(x.numpy(), (19, 23), mode)
            if mode != 'periodization'
            else np.pad(x.numpy(), (0, n % 2), 'edge')[np.arange(-19, n + 23) % (n + n % 2)]
        )
        assert np.array_equal(extend(x, 19, 23, mode).numpy(), theirs), n
        assert torch.equal(
            extend(x[:, None].expand(n, 2), 19, 23, mode, -2)[:, 1], extend(x, 19, 23, mode)
        )
    assert torch.equal(extend(x, 0, 0, mode), x)


@pytest.mark.parametrize('mode', MODES)
def test_one_row_and_one_pixel(mode):
    like = 'constant' if mode == 'reflect' else mode  # one sample, reflected, is that sample
    for h, w in ((1, 1), (1, 2), (2, 1)):
        x = rand(1, 1, h, w)
        for wavelet in ('haar', 'db2', 'bior2.2'):
            ours, theirs = flat(dwt2(x, wavelet, mode)), flat(pywt.dwt2(x.numpy(), wavelet, like))
            if mode != 'reflect' or h == w:
                assert max(off(p, q) for p, q in zip(ours, theirs)) < 1e-12
            assert (idwt2((ours[0], ours[1:]), wavelet, mode)[..., :h, :w] - x).abs().max() < 1e-12


def test_missing_bands_are_zeros():
    x = rand(1, 2, 12, 14)
    for wavelet in ('haar', 'db2'):
        LL, (LH, HL, HH) = dwt2(x, wavelet)
        ours = idwt2((LL, (None, HL, None)), wavelet)
        assert off(ours, pywt.idwt2((LL.numpy(), (None, HL.numpy(), None)), wavelet)) < 1e-12
        assert (
            off(
                idwt2((None, (LH, HL, HH)), wavelet),
                pywt.idwt2((None, (LH.numpy(), HL.numpy(), HH.numpy())), wavelet),
            )
            < 1e-12
        )
        z = wavedec2(x, wavelet, 2)
        assert (
            off(
                waverec2([z[0], z[1], (None,) * 3], wavelet),
                pywt.waverec2([*numpy_of(z[:2]), (None,) * 3], wavelet),
            )
            < 1e-12
        )


def test_a_wavelet_object():
    x, own = rand(1, 1, 9, 12), pywt.Wavelet('own', filter_bank=pywt.Wavelet('sym4').filter_bank)
    assert all(torch.equal(a, b) for a, b in zip(flat(dwt2(x, own)), flat(dwt2(x, 'sym4'))))
    assert torch.equal(idwt2(dwt2(x, own), own), idwt2(dwt2(x, 'sym4'), 'sym4'))
    odd = pywt.Wavelet('odd', filter_bank=([1.0, 2, 3], [1.0, -1, 2], [0.0, 1, 1], [3.0, 2, -1]))
    for mode in MODES:
        ours, theirs = dwt2(x, odd, mode), pywt.dwt2(x.numpy(), odd, mode)
        assert max(off(p, q) for p, q in zip(flat(ours), flat(theirs))) < 1e-12
        assert off(idwt2(ours, odd, mode), pywt.idwt2(theirs, odd, mode)) < 1e-12


def test_haars_fast_path_is_the_general_one(monkeypatch):
    import restore_lib.wavelets as module

    x = rand(2, 3, 13, 22)
    for mode in MODES:
        fast = dwt2(x, 'haar', mode)
        with monkeypatch.context() as m:
            m.setattr(module, '_is_haar', lambda bank: False)
            slow, back = dwt2(x, 'haar', mode), idwt2(fast, 'haar', mode)
        assert max((a - b).abs().max() for a, b in zip(flat(fast), flat(slow))) < 1e-12
        assert (back - idwt2(fast, 'haar', mode)).abs().max() < 1e-12


FEW_TAPS = ('db2', 'bior1.3', 'db3', 'rbio3.1', 'sym4', 'bior4.4')


@pytest.mark.parametrize('dtype', TOL)
@pytest.mark.parametrize('mode', MODES)
def test_the_convolution_of_few_taps_is_the_matrix(monkeypatch, mode, dtype):
    "Both ways, forced in either precision; also Haar, which never takes it."
    import restore_lib.wavelets as module

    assert module._few_taps(torch.zeros(1), module._bank('bior4.4')) and not module._few_taps(
        torch.zeros(1), module._bank('db6')
    )
    assert not module._few_taps(
        torch.zeros(1).double(), module._bank('db2')
    ) and not module._few_taps(torch.zeros(1, device='meta'), module._bank('db2'))
    monkeypatch.setattr(module, '_is_haar', lambda bank: False)

    def results(few, x, r, wavelet):
        monkeypatch.setattr(module, '_few_taps', lambda x, bank: few)
        return [*flat(dwt2(x, wavelet, mode)), idwt2((r[0], r[1:]), wavelet, mode)]

    for wavelet in ['haar', *FEW_TAPS, 'db7']:
        for h, w in ((16, 17), (33, 64), (3, 2), (1, 5)):
            x = rand(2, 3, h, w, dtype=dtype)
            r = [torch.rand_like(b) for b in flat(dwt2(x, wavelet, mode))]
            assert all(
                a.shape == b.shape and (a - b).abs().max() < TOL[dtype]
                for a, b in zip(results(True, x, r, wavelet), results(False, x, r, wavelet))
            ), (wavelet, h, w)


@pytest.mark.parametrize(
    'wavelet, mode',
    [
        ('db2', 'symmetric'),
        ('db3', 'periodization'),
        ('bior1.3', 'reflect'),
        ('bior4.4', 'zero'),
        ('db2', 'periodization'),
    ],
)
def test_gradients_of_the_convolution(monkeypatch, wavelet, mode):
    import restore_lib.wavelets as module

    monkeypatch.setattr(module, '_few_taps', lambda x, bank: True)
    test_gradients(wavelet, mode)
    x, t = rand(1, 1, 6, 8), rand(1, 1, 6, 8)
    out, tangent = torch.func.jvp(
        lambda x: idwt2(dwt2(x, wavelet, mode), wavelet, mode), (x,), (t,)
    )
    assert torch.allclose(out, x) and torch.allclose(tangent, t)


@pytest.mark.parametrize('wavelet', ['db2', 'bior1.3', 'bior4.4'])
def test_float32_gradient_is_that_of_float64(wavelet):
    for mode in MODES:
        x = rand(2, 3, 20, 23, dtype=torch.float32)
        grads = []
        for dtype in TOL:
            y, fixed = x.to(dtype).requires_grad_(), torch.Generator().manual_seed(0)
            z = flat(wavedec2(y, wavelet, 2, mode))
            (
                sum((b * torch.rand(b.shape, generator=fixed).to(dtype)).sum() for b in z)
                + waverec2([z[0], tuple(z[1:4]), tuple(z[4:])], wavelet, mode).square().sum()
            ).backward()
            grads.append(y.grad)
        assert (grads[0] - grads[1]).abs().max() < 1e-4, mode


# what a basis must hold ---------------------------------------------------------------------------


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('h, w', [(16, 16), (11, 6), (5, 3)])
def test_adjoint_by_autograd(mode, h, w):
    "<Wx, c> = <x, W'c> with W' written as a matrix, column by column from PyWavelets."
    for wavelet in ('haar', 'db2', 'bior2.2', 'coif4'):
        x = rand(1, 1, h, w).requires_grad_()
        z = flat(wavedec2(x, wavelet, 2, mode))
        c = [rand(*b.shape) for b in z]
        inner = sum((a * b).sum() for a, b in zip(z, c))
        inner.backward()
        assert torch.isclose(inner.detach(), (x.detach() * x.grad).sum(), rtol=1e-10, atol=1e-10), (
            wavelet
        )
        k = (h // 2) * w + w // 2
        unit = np.zeros(h * w)
        unit[k] = 1
        column = flat(pywt.wavedec2(unit.reshape(1, 1, h, w), wavelet, mode, 2))
        assert (
            abs(
                sum((torch.from_numpy(a) * b).sum() for a, b in zip(column, c))
                - x.grad.flatten()[k]
            )
            < 1e-10
        ), wavelet


@pytest.mark.parametrize(
    'wavelet',
    [
        w
        for w in ALL
        if pywt.Wavelet(w).orthogonal and pywt.Wavelet(w).dec_len <= 16 and w != 'dmey'
    ],
)
def test_orthogonal_wavelets_keep_energy_with_periodization(wavelet):
    x = rand(2, 1, 32, 48)
    z = wavedec2(x, wavelet, 2, 'periodization')
    assert sum(b.numel() for b in flat(z)) == x.numel()
    assert abs(sum(b.square().sum() for b in flat(z)) / x.square().sum() - 1) < 1e-9
    x.requires_grad_()
    c = [rand(*b.shape) for b in flat(z)]
    sum((a * b).sum() for a, b in zip(flat(wavedec2(x, wavelet, 2, 'periodization')), c)).backward()
    nested = [c[0], *(tuple(c[1 + 3 * k : 4 + 3 * k]) for k in range(2))]
    assert (
        waverec2(nested, wavelet, 'periodization') - x.grad
    ).abs().max() < 1e-9  # inverse = transpose


def test_biorthogonal_ones_do_not():
    x = rand(1, 1, 32, 32)
    assert all(
        abs(sum(b.square().sum() for b in flat(dwt2(x, w, 'periodization'))) / x.square().sum() - 1)
        > 0.01
        for w in ('bior2.2', 'bior3.1', 'rbio2.2')
    )


@pytest.mark.parametrize(
    'wavelet, mode',
    [
        ('haar', 'symmetric'),
        ('haar', 'zero'),
        ('db2', 'reflect'),
        ('bior2.2', 'periodization'),
        ('db5', 'constant'),
    ],
)
def test_gradients(wavelet, mode):
    x = rand(1, 1, 5, 4).requires_grad_()
    f = lambda x: torch.cat([b.flatten() for b in flat(wavedec2(x, wavelet, 2, mode))])
    assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(lambda x: f(x) ** 2, x)
    bands = [rand(*b.shape).requires_grad_() for b in flat(dwt2(x, wavelet, mode))]
    assert torch.autograd.gradcheck(lambda *b: idwt2((b[0], b[1:]), wavelet, mode), bands)


@pytest.mark.parametrize('wavelet', ['haar', 'db2'])
def test_forward_mode(wavelet):
    x, t = rand(1, 1, 6, 8), rand(1, 1, 6, 8)
    out, tangent = torch.func.jvp(lambda x: idwt2(dwt2(x, wavelet), wavelet), (x,), (t,))
    assert torch.allclose(out, x) and torch.allclose(tangent, t)


@pytest.mark.parametrize('dtype', TOL)
@pytest.mark.parametrize('wavelet', ['haar', 'db2', 'bior4.4', 'db10'])
def test_vmap(wavelet, dtype):
    x = rand(3, 1, 2, 14, 12, dtype=dtype)
    f = lambda x: flat(wavedec2(x, wavelet, 2))
    assert all(
        torch.allclose(a, torch.stack(b), atol=TOL[dtype])
        for a, b in zip(torch.func.vmap(f)(x), zip(*map(f, x)))
    )
    assert torch.allclose(
        torch.func.vmap(
            lambda x: waverec2(wavedec2(x, wavelet, 2), wavelet), in_dims=1, out_dims=1
        )(x.transpose(0, 1)).transpose(0, 1)[..., :14, :12],
        x,
        atol=1e-5,
    )
    LL, d = dwt2(x[0], wavelet)
    mixed = torch.func.vmap(lambda l: idwt2((l, d), wavelet))(
        torch.stack([LL, 2 * LL])
    )  # some bands with a batch, some without
    assert torch.allclose(mixed[1], idwt2((2 * LL, d), wavelet), atol=1e-5)
    assert torch.allclose(torch.func.vmap(lambda x: unpacket2(packet2(x, 1), 1))(x), x, atol=1e-5)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: dwt2(x, wavelet)[0].square().sum()))(x)
    assert torch.allclose(
        per_sample[1],
        torch.func.grad(lambda x: dwt2(x, wavelet)[0].square().sum())(x[1]),
        atol=1e-5,
    )


def test_matrices_first_made_in_inference_mode_can_be_trained_through():
    own = pywt.Wavelet(
        'own', filter_bank=tuple(list(np.roll(f, 2)) for f in pywt.Wavelet('db3').filter_bank)
    )  # not cached yet
    with torch.inference_mode():
        dwt2(torch.rand(1, 1, 8, 8), own)
        dct2(torch.rand(1, 1, 19, 19))
    for f in (lambda x: dwt2(x, own)[0], dct2):
        x = torch.rand(1, 1, 19, 19, requires_grad=True)
        f(x).sum().backward()
        assert x.grad.isfinite().all()


# dtypes, devices, shapes --------------------------------------------------------------------------


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(
    'dtype, tol',
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.01)],
)
@pytest.mark.parametrize('wavelet', ['haar', 'db2'])
def test_dtypes_and_devices(wavelet, dtype, tol, device):
    x = rand(2, 3, 21, 16).to(device, dtype)
    z = wavedec2(x, wavelet, 2)
    assert all(b.dtype == dtype and b.device == x.device for b in flat(z))
    back = waverec2(z, wavelet)[..., :21, :16]
    assert back.dtype == dtype and (back - x).abs().max() < tol
    assert (idct2(dct2(x)) - x).abs().max() < tol and dct2(x).dtype == dtype


def test_autocast_costs_no_precision():
    x = rand(1, 3, 32, 32, dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        for wavelet in ('haar', 'db2'):
            back = waverec2(wavedec2(x, wavelet, 2), wavelet)
            assert back.dtype == torch.float32 and (back - x).abs().max() < 1e-5
        assert (idct2(dct2(x, 8), 8) - x).abs().max() < 1e-5


@pytest.mark.parametrize('wavelet', ['haar', 'db2', 'sym5'])
def test_layout_batch_and_input_are_untouched(wavelet):
    x = rand(2, 3, 17, 24)
    kept, z = x.clone(), flat(dwt2(x, wavelet))
    last = x.contiguous(memory_format=torch.channels_last)
    turned = rand(2, 3, 24, 17)
    assert torch.equal(x, kept)
    assert all(torch.allclose(a, b) for a, b in zip(z, flat(dwt2(last, wavelet))))
    assert all(
        torch.allclose(a, b)
        for a, b in zip(flat(dwt2(turned.mT, wavelet)), flat(dwt2(turned.mT.contiguous(), wavelet)))
    )
    assert all(torch.allclose(a[1:, 2:], b) for a, b in zip(z, flat(dwt2(x[1:, 2:], wavelet))))
    before = [b.clone() for b in z]
    idwt2((z[0], z[1:]), wavelet)
    assert all(torch.equal(a, b) for a, b in zip(z, before))


def test_empty_batch():
    for wavelet in ('haar', 'db2'):
        z = wavedec2(torch.zeros(0, 3, 16, 16), wavelet, 2, 'periodization')
        assert z[0].shape == (0, 3, 4, 4) and waverec2(z, wavelet, 'periodization').shape == (
            0,
            3,
            16,
            16,
        )


# packets and cosines ------------------------------------------------------------------------------


@pytest.mark.parametrize('level', [0, 1, 2, 3])
def test_packet_is_pywavelets(level):
    x = rand(2, 3, 16, 24)
    z = packet2(x, level)
    assert (
        z.shape == (2, 3 * 4**level, 16 >> level, 24 >> level)
        and (unpacket2(z, level) - x).abs().max() < 1e-12
    )
    assert abs(z.square().sum() - x.square().sum()) < 1e-9
    for b in range(2):
        for c in range(3):
            tree = pywt.WaveletPacket2D(
                x[b, c].numpy(), 'haar', 'symmetric', maxlevel=max(level, 1)
            )
            for k in range(4**level):
                path = ''.join('ahvd'[k // 4 ** (level - 1 - i) % 4] for i in range(level))
                assert (
                    np.abs(
                        (tree[path].data if level else x[b, c].numpy())
                        - z[b, c * 4**level + k].numpy()
                    ).max()
                    < 1e-12
                )


def test_packet_gradients():
    x = rand(1, 2, 8, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: packet2(x, 2), x) and torch.autograd.gradcheck(
        lambda z: unpacket2(z, 1), rand(1, 4, 2, 3).requires_grad_()
    )


@pytest.mark.parametrize('dtype', TOL)
@pytest.mark.parametrize(
    'h, w, block', [(16, 24, 8), (16, 24, None), (5, 7, None), (6, 9, 3), (4, 4, 1), (1, 1, None)]
)
def test_cosines_are_scipys(h, w, block, dtype):
    x = rand(2, 3, h, w, dtype=dtype)
    p, q = (block, block) if block else (h, w)
    theirs = dctn(
        x.double().numpy().reshape(2, 3, h // p, p, w // q, q), axes=(3, 5), norm='ortho'
    ).reshape(x.shape)
    z = dct2(x, block)
    assert (
        np.abs(z.numpy() - theirs).max() < TOL[dtype]
        and (idct2(z, block) - x).abs().max() < TOL[dtype]
    )
    assert torch.isclose(z.square().sum(), x.square().sum(), rtol=1e-5) and z.dtype == dtype


# bad input ----------------------------------------------------------------------------------------

OK, BAND = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda: dwt2(OK.numpy()), TypeError, 'ndarray'),
        (lambda: dwt2(OK.byte()), TypeError, 'uint8'),
        (lambda: dwt2(OK.cfloat()), TypeError, 'complex64'),
        (lambda: dwt2(OK[0]), ValueError, r'\(1, 8, 8\)'),
        (lambda: dwt2(OK[..., :0]), ValueError, 'at least one pixel'),
        (lambda: dwt2(OK, 'morl'), ValueError, "wavelet is 'morl'"),
        (lambda: dwt2(OK, 'nonsense'), ValueError, "wavelet is 'nonsense'"),
        (lambda: dwt2(OK, None), TypeError, 'NoneType'),
        (lambda: dwt2(OK, 'db2', 'smooth'), ValueError, "mode is 'smooth'"),
        (lambda: dwt2(OK, 'haar', None), ValueError, 'mode is None'),
        (lambda: extend(OK, 1, 1, 'edge'), ValueError, "mode is 'edge'"),
        (lambda: idwt2((BAND, (BAND, BAND))), ValueError, 'nested'),
        (lambda: idwt2(BAND), ValueError, 'nested'),
        (lambda: idwt2((BAND, (BAND, BAND, BAND[..., 1:]))), ValueError, 'different shapes'),
        (lambda: idwt2((BAND, (BAND, BAND, BAND.numpy()))), TypeError, 'HH is ndarray'),
        (lambda: idwt2((None, (None, None, None))), ValueError, 'None only'),
        (lambda: idwt2((BAND, (BAND,) * 3), 'db10'), ValueError, 'at least 10'),
        (lambda: idwt2((BAND, (BAND,) * 3), 'haar', 'edge'), ValueError, "mode is 'edge'"),
        (lambda: wavedec2(OK, 'haar', -1), ValueError, 'level is -1'),
        (lambda: wavedec2(OK, 'haar', 1.0), ValueError, 'level is 1.0'),
        (lambda: wavedec2(OK, 'haar', None), TypeError, 'level is None'),
        (
            lambda: idwt2((BAND, (BAND, BAND.double(), BAND)), 'db2'),
            TypeError,
            'LH torch.float32 on cpu, HL torch.float64',
        ),
        (lambda: idwt2((BAND, (BAND, BAND.half(), None))), TypeError, 'HL torch.float16'),
        (lambda: idwt2((BAND, (BAND,) * 3), 'bior4.4'), ValueError, 'at least 5'),
        (lambda: waverec2([(BAND,) * 3, BAND], 'haar'), ValueError, 'begins with a tuple'),
        (
            lambda: waverec2([BAND, (BAND[..., ::2, ::2],) * 3, (BAND,) * 3][::-1], 'haar'),
            ValueError,
            'begins with a tuple',
        ),
        (
            lambda: waverec2(
                [BAND[..., ::2, ::2], (BAND,) * 3, (BAND[..., ::2, ::2],) * 3], 'haar'
            ),
            ValueError,
            'different shapes',
        ),
        (lambda: waverec2([BAND], 'nonsense'), ValueError, "wavelet is 'nonsense'"),
        (lambda: waverec2([BAND], 'haar', 'edge'), ValueError, "mode is 'edge'"),
        (lambda: waverec2([None], 'haar'), TypeError, 'LL is NoneType'),
        (lambda: dct2(OK, True), ValueError, 'block is True'),
        (lambda: waverec2([], 'haar'), ValueError, 'coeffs'),
        (lambda: waverec2(BAND, 'haar'), ValueError, 'coeffs'),
        (lambda: waverec2([BAND, BAND], 'haar'), ValueError, 'nested'),
        (lambda: waverec2([BAND[..., 2:], (BAND,) * 3], 'haar'), ValueError, 'different shapes'),
        (lambda: packet2(torch.zeros(1, 1, 10, 12), 2), ValueError, 'pad it to 12 x 12'),
        (lambda: packet2(OK, True), ValueError, 'level is True'),
        (lambda: unpacket2(torch.zeros(1, 6, 4, 4), 1), ValueError, 'multiple of 4'),
        (lambda: dct2(torch.zeros(1, 1, 10, 12), 8), ValueError, 'pad it to 16 x 16'),
        (lambda: dct2(OK, 0), ValueError, 'block is 0'),
        (lambda: idct2(OK.long()), TypeError, 'int64'),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


# what is kept between calls, and numbers of NumPy -------------------------------------------------


def energy(wavelet):
    return lambda x: sum(b.square().sum() for b in flat(dwt2(x, wavelet)))


@pytest.mark.parametrize('wavelet', ['db10', 'db2', 'sym9'])
def test_a_first_hessian_leaves_nothing_behind(wavelet):
    """The filters are first asked for inside torch.func,
    by a bank of their own, which no other test has made."""
    bank = [[f * 2.0 for f in part] for part in pywt.Wavelet(wavelet).filter_bank]
    own = pywt.Wavelet('own', filter_bank=bank)
    x = torch.rand(1, 1, 5, 6, dtype=torch.float64 if len(bank[0]) > 10 else torch.float32)
    curved = torch.func.hessian(energy(own))(x).reshape(30, 30)
    want = (curved @ x.flatten()).reshape(x.shape)  # of a sum of squares
    for g in (torch.func.grad(energy(own))(x), torch.func.jacrev(energy(own))(x)):
        assert torch.allclose(g, want, rtol=1e-4) and g.abs().max() > 1
    assert torch.allclose(torch.func.hessian(energy(own))(x).reshape(30, 30), curved, rtol=1e-4)
    assert torch.allclose(idwt2(dwt2(x, own), own)[..., :5, :], 16 * x, rtol=1e-3)


def test_a_first_hessian_through_the_way_back_and_the_cosines():
    own = pywt.Wavelet(
        'own', filter_bank=[[3 * f for f in part] for part in pywt.Wavelet('db10').filter_bank]
    )
    z = torch.rand(1, 1, 12, 12)
    for f in (
        lambda z: idwt2((z, (z, z, z)), own).square().sum(),
        lambda z: dct2(z[..., :11, :7]).square().sum(),
    ):
        curved = torch.func.hessian(f)(z).reshape(144, 144)
        g = torch.func.grad(f)(z)
        assert (
            torch.allclose(g.flatten(), curved @ z.flatten(), rtol=1e-3, atol=1e-4)
            and g.abs().max() > 0.1
        )


def test_filters_first_made_under_another_default_device_or_dtype():
    own = pywt.Wavelet(
        'own', filter_bank=[[5 * f for f in part] for part in pywt.Wavelet('db12').filter_bank]
    )
    x = torch.rand(1, 1, 9, 9)
    with torch.device('meta'):
        dwt2(x, own)
        dct2(x)
    assert torch.allclose(dwt2(x, own)[0], 25 * dwt2(x, 'db12')[0], rtol=1e-5)
    assert torch.allclose(idct2(dct2(x)), x, atol=1e-6)


def test_sizes_of_cosines_are_not_kept_for_ever():
    "Forty sizes of 800 pixels: 2.5 MB each, of which most must be gone."

    def resident():
        gc.collect()
        return (
            int(Path('/proc/self/statm').read_text().split()[1])
            * os.sysconf('SC_PAGE_SIZE')
            / 2**20
        )

    if not Path('/proc/self/statm').exists():
        pytest.skip('no /proc')
    dct2(torch.rand(1, 1, 790, 791))
    before = resident()
    for n in range(800, 840):
        dct2(torch.rand(1, 1, n, n))
    assert resident() - before < 40


@pytest.mark.parametrize('n', [np.int64(2), np.int32(2), np.uint8(2)])
def test_numbers_of_numpy(n):
    x = torch.rand(1, 1, 16, 16)
    assert all(
        torch.equal(a, b) for a, b in zip(wavedec2(x, 'db2', n)[1], wavedec2(x, 'db2', 2)[1])
    )
    assert torch.equal(packet2(x, n), packet2(x, 2)) and torch.equal(
        unpacket2(packet2(x, n), n), unpacket2(packet2(x, 2), 2)
    )
    assert torch.equal(dct2(x, n), dct2(x, 2)) and torch.equal(
        extend(x, n, n, 'reflect'), extend(x, 2, 2, 'reflect')
    )
    with pytest.raises(ValueError, match='level=64'):
        packet2(x, np.int64(64))  # 2**64 is 0 in 64 bits


@pytest.mark.parametrize(
    'bad, error, says',
    [
        (lambda x: extend(x, -1, 2, 'zero'), ValueError, 'left is -1'),
        (lambda x: extend(x, 0, 1.5, 'zero'), ValueError, 'right is 1.5'),
        (lambda x: extend(x, -2, 2, 'periodic'), ValueError, 'left is -2'),
        (lambda x: extend(x[..., :0], 1, 1, 'periodic'), ValueError, 'at least one sample'),
        (lambda x: wavedec2(x, 'haar', math.nan), ValueError, 'level is nan'),
        (lambda x: packet2(x, '1'), TypeError, "level is '1'"),
        (lambda x: dct2(x, math.nan), ValueError, 'block is nan'),
        (lambda x: dct2(x, 0), ValueError, 'block is 0'),
    ],
)
def test_bad_numbers(bad, error, says):
    with pytest.raises(error, match=says):
        bad(torch.rand(1, 1, 8, 8))


@pytest.mark.parametrize('wavelet', ['haar', 'db2', 'db10'])
def test_an_empty_batch_gives_empty_bands(wavelet):
    x = torch.rand(0, 2, 9, 8)
    assert all(
        b.shape == (0, 2, *dwt2(torch.rand(1, 2, 9, 8), wavelet)[0].shape[2:])
        for b in flat(dwt2(x, wavelet))
    )
    assert dct2(x).shape == x.shape
