"""restore_lib.degrade: parity with Pillow and SciPy, adjoints, statistics, devices and types,
bad input."""

import os, random
from functools import partial
from pathlib import Path

from common import gen
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import convolve

from restore_lib.data import photos
from restore_lib.image_files import read_image
from restore_lib.degrade import (
    Mixture, bicubic_down, bicubic_up, block_mask, blur, blur_kernel, gaussian, gaussian_blur,
    jpeg, motion_blur, rain, salt_and_pepper,
)
from restore_lib.realworld import second_order


def bytes_of(x):
    return (x * 255).round().byte().numpy()


RANDOM = dict(
    gaussian=partial(gaussian, sigma=(0.05, 0.2)),
    salt=partial(salt_and_pepper, amount=(0.1, 0.4)),
    block=partial(block_mask, blocks=3, size=(4, 9)),
    soft=partial(gaussian_blur, sigma=(0.5, 3)),
    motion=partial(motion_blur, length=(3, 11)),
    rain=partial(rain, density=0.02),
    jpeg=partial(jpeg, quality=(10, 90)),
    second=partial(second_order, scale=4),
    mix=Mixture(
        partial(gaussian, sigma=0.1), partial(salt_and_pepper, amount=0.2), rain, weights=[1, 2, 1]
    ),
)


def first(out):
    return out[0] if isinstance(out, tuple) else out


# parity


def against_pillow(x, scale=4):
    "Largest difference in grey levels, down and up, of one channel (h, w)."
    x = x[: x.shape[0] // scale * scale, : x.shape[1] // scale * scale]
    h, w = x.shape
    pil = Image.fromarray(bytes_of(x)).resize((w // scale, h // scale), Image.BICUBIC)
    down = bytes_of(bicubic_down(x[None, None], scale)[0, 0]).astype(int) - np.asarray(pil)
    small = torch.from_numpy(np.array(pil))[None, None].float() / 255
    up = bytes_of(bicubic_up(small, scale)[0, 0]).astype(int) - np.asarray(
        pil.resize((w, h), Image.BICUBIC)
    )
    return abs(down).max(), abs(up).max()


@pytest.mark.parametrize('split', ['train', 'valid', 'test'])
def test_bicubic_is_pillows_on_photos(split):
    for name, p in photos(split).items():
        for channel in p[::2] if p.shape[0] == 3 else p:
            assert max(against_pillow(channel)) <= 1, name


@pytest.mark.parametrize('scale', [2, 3, 8])
def test_bicubic_is_pillows_at_other_scales(scale):
    assert max(against_pillow(photos('test', 1)['camera'][0], scale)) <= 1


def test_bicubic_is_pillows_on_infrared():
    folder = Path(os.environ.get('RESTORE_DATA', '')) / 'ir'
    if not os.environ.get('RESTORE_DATA') or not folder.is_dir():
        pytest.skip('RESTORE_DATA/ir is absent: no real infrared images')
    files = [p for p in sorted(folder.rglob('*')) if p.suffix.lower() in ('.png', '.jpg', '.bmp')]
    assert len(files) > 20
    for p in files[:: len(files) // 20]:
        assert max(against_pillow(read_image(p, 1)[0])) <= 1, p


def test_without_the_clip_it_is_a_matrix_and_misses_pillow():
    x = photos('test', 1)['camera'][None]
    assert (
        bicubic_down(x, 4, clip=False)
        - F.interpolate(x, scale_factor=1 / 4, mode='bicubic', antialias=True)
    ).abs().max() < 1e-6
    pil = np.asarray(Image.fromarray(bytes_of(x[0, 0])).resize((128, 128), Image.BICUBIC)).astype(
        int
    )
    assert abs(bytes_of(bicubic_down(x, 4, clip=False).clamp(0, 1)[0, 0]) - pil).max() > 1


def test_blur_is_scipys_convolution_per_image():
    x, k = torch.rand(3, 2, 20, 31, generator=gen()), torch.rand(3, 5, 5, generator=gen(1))
    y = blur(x, k)
    for i in range(3):
        for c in range(2):
            assert np.allclose(
                y[i, c], convolve(x[i, c].numpy(), k[i].numpy(), mode='mirror'), atol=1e-5
            )
    assert torch.equal(blur(x, k[0]), blur(x, k[:1])) and torch.allclose(
        blur(x, k[0])[0], y[0], atol=1e-6
    )


def test_a_bright_point_draws_the_kernel():
    k = torch.cat([
        blur_kernel('gaussian', 21, torch.tensor([[5.0, 1.5]]), angle=30),
        blur_kernel('motion', 21, length=15, angle=30),
    ])
    dot = torch.zeros(2, 1, 43, 43)
    dot[:, :, 21, 21] = 1  # so far inside that no mirror image of it is seen
    assert torch.allclose(blur(dot, k)[:, 0, 11:-11, 11:-11], k, atol=1e-6)


def keys_matrix(n, m):
    "(m, n) weights of Keys' kernel with a = -0.5, stretched where n > m."
    s = max(n / m, 1.0)
    t = ((torch.arange(n) + 0.5 - (torch.arange(m)[:, None] + 0.5) * n / m) / s).abs()
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    k = torch.where(t <= 1, near, far) * (t < 2)
    return k / k.sum(1, keepdim=True)


def test_a_resize_is_two_small_matrices():
    x = torch.rand(2, 1, 48, 64, generator=gen())
    down = keys_matrix(48, 12) @ x @ keys_matrix(64, 16).T
    assert torch.allclose(bicubic_down(x, 4, clip=False), down, atol=1e-5)
    up = keys_matrix(48, 96) @ x @ keys_matrix(64, 128).T
    assert torch.allclose(bicubic_up(x, 2, clip=False), up, atol=1e-5)


def test_noise_through_a_resize():
    "What lesson 01 says: enlarged noise keeps 0.82 of its level, neighbours correlate by 0.97."
    white = gaussian(torch.zeros(32, 1, 32, 32), 1.0, gen())
    y = bicubic_up(white, 7, clip=False)
    assert abs(y.std() - 0.82) < 0.01
    lag = (y[..., 1:] * y[..., :-1]).mean() / y.square().mean()
    assert abs(lag - 0.97) < 0.01


def test_kernels():
    k = blur_kernel('gaussian', 25, sigma=torch.tensor([[3.0, 1.0]]), angle=0.0)[0]
    r = torch.arange(25) - 12.0
    assert ((k * r**2).sum() - 9).abs() < 0.1 and (
        (k * r[:, None] ** 2).sum() - 1
    ).abs() < 0.02  # along the columns: 3
    up = blur_kernel('motion', 15, length=11, angle=45)[0]
    assert up[3, 11] > 0 and up[11, 3] > 0 and up[3, 3] == 0  # 45 degrees: up and to the right
    assert torch.equal(
        blur_kernel('gaussian', 5, sigma=0.0)[0], blur_kernel('motion', 5, length=1)[0]
    )  # both a point
    many = blur_kernel(
        'motion', length=torch.tensor([3.0, 9.0, 15.0]), angle=torch.tensor([0.0, 30.0, 90.0])
    )
    assert many.shape == (3, 17, 17) and torch.allclose(many.sum((1, 2)), torch.ones(3))
    assert blur_kernel('gaussian', 9, sigma=1.0, angle=torch.tensor([0.0, 10.0])).shape == (2, 9, 9)


def test_jpeg_is_pillows():
    import io

    for channels in (1, 3):
        x = photos('test', channels)['coffee'][None, :, :96, :90]
        file = io.BytesIO()
        Image.fromarray(bytes_of(x[0].permute(1, 2, 0) if channels == 3 else x[0, 0])).save(
            file, 'JPEG', quality=40
        )
        assert torch.equal(
            bytes_and(jpeg(x, 40)),
            torch.from_numpy(np.array(Image.open(file))).reshape(96, 90, channels),
        )
    y = jpeg(x.repeat(3, 1, 1, 1), torch.tensor([5, 50, 95]))
    error = (y - x).square().mean((1, 2, 3))
    assert error[0] > error[1] > error[2]


def bytes_and(y):
    return (y[0].permute(1, 2, 0) * 255).round().byte()


# linear operators

LINEAR = dict(
    blur=partial(blur, kernel=torch.rand(2, 5, 5, generator=gen(3))),
    down=partial(bicubic_down, scale=4, clip=False),
    up=partial(bicubic_up, scale=4, clip=False),
    block=lambda u: block_mask(u, 2, (3, 6), generator=gen(4))[0],
    soft=lambda u: gaussian_blur(u, (1, 2), gen(5))[0],
    motion=lambda u: motion_blur(u, 7, 30)[0],
    rain=lambda u: rain(u, generator=gen(6))[0] - rain(0 * u, generator=gen(6))[0],
    salt=lambda u: salt_and_pepper(u, 0.2, gen(7))[0] - salt_and_pepper(0 * u, 0.2, gen(7))[0],
)


@pytest.mark.parametrize('name', LINEAR)
def test_linear_and_adjoint(name):
    A = LINEAR[name]
    u, v = torch.randn(2, 2, 3, 24, 32, generator=gen(), dtype=torch.float64)
    y, vjp = torch.func.vjp(A, u)
    z = torch.randn(y.shape, generator=gen(1), dtype=torch.float64)
    assert torch.allclose((y * z).sum(), (u * vjp(z)[0]).sum(), rtol=1e-9)
    assert torch.allclose(A(0.3 * u - 2 * v), 0.3 * A(u) - 2 * A(v), atol=1e-9)
    assert y.abs().max() > 0.1


@pytest.mark.parametrize(
    'op',
    [
        lambda u: salt_and_pepper(u, 0.2, gen())[0],
        partial(jpeg, quality=30),
        partial(gaussian, sigma=0.1),
    ],
)
def test_these_are_not_linear(op):
    u = torch.rand(1, 1, 32, 32, generator=gen())
    assert not torch.allclose(op(u / 2), op(u) / 2, atol=1e-3)


# statistics and masks


def test_gaussian_has_the_level_asked_for():
    x = torch.full((4, 3, 128, 128), 0.02)
    n = gaussian(x, torch.tensor([0.01, 0.1, 0.2, 0.5]), gen()) - x
    assert (
        torch.allclose(n.std((1, 2, 3)), torch.tensor([0.01, 0.1, 0.2, 0.5]), rtol=0.02)
        and n.mean((1, 2, 3)).abs().max() < 0.01
    )
    levels = (gaussian(torch.zeros(500, 1, 32, 32), (0.1, 0.3), gen())).std((1, 2, 3))
    assert (
        0.09 < levels.min() < 0.12
        and 0.28 < levels.max() < 0.32
        and abs(levels.mean() - 0.2) < 0.01
    )
    assert torch.equal(gaussian(x, 0.0), x)


def test_salt_and_pepper():
    x = torch.rand(4, 3, 200, 200, generator=gen()) * 0.8 + 0.1
    y, mask = salt_and_pepper(x, torch.tensor([0.0, 0.1, 0.5, 1.0]), gen())
    assert mask.shape == (4, 1, 200, 200) and torch.allclose(
        mask.mean((1, 2, 3)), torch.tensor([0.0, 0.1, 0.5, 1.0]), atol=0.01
    )
    gone = mask.bool().expand_as(x)
    assert (
        torch.equal(y[~gone], x[~gone])
        and set(y[gone].tolist()) == {0.0, 1.0}
        and abs(y[3].mean() - 0.5) < 0.01
    )
    assert torch.equal(
        y[gone].reshape(-1), y[:, :1].expand_as(y)[gone].reshape(-1)
    )  # the same in all channels


def test_block_mask():
    x = torch.rand(300, 2, 20, 24, generator=gen()) + 0.01
    y, mask = block_mask(x, 1, (3, 5), fill=0.7, generator=gen(1))
    assert mask.shape == (300, 1, 20, 24) and torch.equal(
        y, torch.where(mask.bool(), torch.tensor(0.7), x)
    )
    sides = {*mask.amax((1, 3)).sum(1).tolist(), *mask.amax((1, 2)).sum(1).tolist()}
    assert sides == {3.0, 4.0, 5.0} and mask.mean(0).min() > 0  # every pixel, corners too, can go
    assert torch.equal(
        mask.sum((1, 2, 3)), mask.amax((1, 3)).sum(1) * mask.amax((1, 2)).sum(1)
    )  # whole rectangles
    assert (
        block_mask(x, 1, 20)[1].sum((1, 2, 3)).eq(400).all()
        and block_mask(x, 3, (3, 5), generator=gen())[1].sum() > mask.sum() * 2
    )


def test_rain_stays_in_range_and_explains_itself():
    x = torch.rand(4, 3, 64, 64, generator=gen())
    y, s = rain(x, density=torch.tensor([0.0, 0.005, 0.02, 0.05]), strength=0.6, generator=gen())
    assert (
        s.shape == (4, 1, 64, 64)
        and torch.allclose(y, (1 - s) * x + s)
        and 0 <= y.min()
        and y.max() <= 1
    )
    cover = s.mean((1, 2, 3))
    assert cover[0] == 0 and (cover.diff() > 0).all() and abs(s.max() - 0.6) < 1e-5


# second order and mixture


def test_mixture():
    x = torch.rand(600, 1, 8, 8, generator=gen())
    keep, dark, tup = (
        (lambda x, generator: x),
        (lambda x, generator: 0 * x),
        (lambda x, generator: (0 * x + 1, 'extra')),
    )
    y, which = Mixture(keep, dark, tup, weights=[1, 2, 3])(x, gen(1))
    assert torch.allclose(torch.bincount(which) / 600, torch.tensor([1.0, 2.0, 3.0]) / 6, atol=0.06)
    assert (
        torch.equal(y[which == 0], x[which == 0])
        and (y[which == 1] == 0).all()
        and (y[which == 2] == 1).all()
    )
    assert set(Mixture(keep, dark, weights=[0, 1])(x)[1].tolist()) == {1}


# generators, types, devices


@pytest.mark.parametrize('name', RANDOM)
def test_a_seed_is_a_seed(name):
    x = torch.rand(4, 3, 32, 32, generator=gen())
    op, before = RANDOM[name], x.clone()
    a, b, c = [first(op(x, generator=gen(s))) for s in (1, 1, 2)]
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(x, before)
    same = first(op(x[:1].repeat(4, 1, 1, 1), generator=gen(1)))
    assert not torch.equal(same[0], same[1]) or name == 'mix'  # each image gets its own draw
    assert torch.isfinite(first(op(x))).all()  # without a generator


@pytest.mark.parametrize('name', RANDOM)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_types(name, dtype):
    x = torch.rand(4, 3, 32, 32, generator=gen())
    y, full = (
        first(RANDOM[name](x.to(dtype), generator=gen(1))),
        first(RANDOM[name](x, generator=gen(1))),
    )
    assert y.dtype == dtype
    if name != 'second':
        assert (
            y.float() - full
        ).abs().mean() < 0.02  # rounding can change what a chain of 8-bit steps sees
    assert bicubic_up(bicubic_down(x.to(dtype), 4), 4).dtype == dtype


@pytest.mark.parametrize('name', ['gaussian', 'salt', 'block', 'soft', 'motion', 'rain'])
def test_random_numbers_move_to_the_device_of_x(name):
    y = first(
        RANDOM[name](torch.zeros(2, 3, 32, 32, device='meta'), generator=gen())
    )  # no data, but devices must agree
    assert y.device.type == 'meta' and y.shape == (2, 3, 32, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('name', RANDOM)
def test_gpu_gives_the_same_as_cpu_for_a_cpu_generator(name):
    x = torch.rand(4, 3, 32, 32, generator=gen())
    y = first(RANDOM[name](x.cuda(), generator=gen(1)))
    assert y.is_cuda and (y.cpu() - first(RANDOM[name](x, generator=gen(1)))).abs().mean() < 0.01
    assert first(RANDOM[name](x, generator=torch.Generator('cuda'))).device.type == 'cpu'


# bad input

X = torch.rand(2, 3, 32, 32)
BAD = [
    (lambda: gaussian(X, 25), ValueError, '25/255'),
    (lambda: gaussian(X, (0.3, 0.1)), ValueError, 'sigma'),
    (lambda: gaussian(X, torch.rand(3)), ValueError, 'sigma'),
    (lambda: gaussian(X, float('nan')), ValueError, 'sigma'),
    (lambda: gaussian(X[0], 0.1), ValueError, 'expected'),
    (lambda: gaussian((X * 255).byte(), 0.1), TypeError, 'uint8'),
    (lambda: salt_and_pepper(X, 1.5), ValueError, 'amount'),
    (lambda: block_mask(X, size=(8, 33)), ValueError, '32 x 32'),
    (lambda: block_mask(X, 0), ValueError, 'blocks'),
    (lambda: blur_kernel('box'), ValueError, 'kind'),
    (lambda: blur_kernel('gaussian', 4), ValueError, 'odd'),
    (lambda: blur_kernel('motion', length=-1.0), ValueError, 'length'),
    (lambda: blur(X, torch.ones(3, 5, 5)), ValueError, 'kernel'),
    (lambda: blur(X, torch.ones(65, 65)), ValueError, 'too large'),
    (lambda: gaussian_blur(X, -1), ValueError, 'sigma'),
    (lambda: jpeg(X, 0), ValueError, 'quality'),
    (lambda: jpeg(X[:, :2], 50), ValueError, 'channels'),
    (lambda: rain(X, strength=2), ValueError, 'strength'),
    (lambda: bicubic_down(X, 5), ValueError, 'multiples'),
    (lambda: bicubic_down(X, 0), ValueError, 'scale'),
    (lambda: bicubic_up(X, 2.5), ValueError, 'scale'),
    (lambda: Mixture(), ValueError, 'ops'),
    (lambda: Mixture(rain, weights=[1, 2]), ValueError, 'weights'),
    (lambda: Mixture(second_order)(X), ValueError, 'same size'),
]


@pytest.mark.parametrize('case', range(len(BAD)))
def test_bad_input_says_what_is_wrong(case):
    call, error, text = BAD[case]
    with pytest.raises(error, match=text):
        call()


# numbers of every kind, empty batches, what is the caller's

NAN = float('nan')
SAME = {
    'gaussian': (lambda v: gaussian(X, v(0.5), gen()), float),
    'gaussian range': (lambda v: gaussian(X, (v(0.25), v(0.5)), gen()), float),
    'jpeg': (lambda v: jpeg(X, v(30)), int),
    'gaussian_blur': (lambda v: gaussian_blur(X, v(0.5))[0], float),
    'motion_blur': (lambda v: motion_blur(X, v(5), v(45))[0], int),
    'rain': (lambda v: rain(X, length=v(5), generator=gen())[0], int),
    'salt_and_pepper': (lambda v: salt_and_pepper(X, v(0.5), gen())[0], float),
    'block_mask': (lambda v: block_mask(X, v(2), v(5), generator=gen())[0], int),
    'block_mask range': (
        lambda v: block_mask(X, size=(v(2), v(5)), fill=v(1), generator=gen())[0],
        int,
    ),
    'blur_kernel': (lambda v: blur_kernel('motion', v(7), length=v(3), angle=v(20)), int),
    'bicubic_down': (lambda v: bicubic_down(X, v(2)), int),
    'bicubic_up': (lambda v: bicubic_up(X, v(2)), int),
    'second_order': (lambda v: second_order(X, v(2), gen()), int),
}


@pytest.mark.parametrize('name', SAME)
def test_numpy_numbers_are_numbers(name):
    call, kind = SAME[name]
    for numpy_kind in (np.float32, np.float64) if kind is float else (np.int64, np.uint8):
        assert torch.equal(call(numpy_kind), call(kind))


EMPTY = {
    'gaussian_blur': lambda x: gaussian_blur(x, 1.0),
    'gaussian_blur range': lambda x: gaussian_blur(x, (0.5, 1.0)),
    'gaussian_blur each': lambda x: gaussian_blur(x, torch.ones(0)),
    'rain': rain,
    'motion_blur': lambda x: motion_blur(x, 5),
    'blur': lambda x: blur(x, torch.ones(3, 3) / 9),
    'gaussian': lambda x: gaussian(x, 0.1),
    'salt_and_pepper': lambda x: salt_and_pepper(x, 0.1),
    'block_mask': block_mask,
    'jpeg': lambda x: jpeg(x, 50),
    'Mixture': Mixture(rain),
}


@pytest.mark.parametrize('name', EMPTY)
def test_an_empty_batch_is_one_clear_error(name):
    with pytest.raises(
        ValueError, match=r'has shape \(0, 3, 32, 32\); expected at least one image'
    ):
        EMPTY[name](torch.zeros(0, 3, 32, 32))


def test_an_empty_batch_is_not_resized():
    for fn in (bicubic_down, bicubic_up, second_order):
        with pytest.raises(ValueError, match='at least one image'):
            fn(torch.zeros(0, 3, 32, 32), 4)
    for fn in (bicubic_down, bicubic_up):
        with pytest.raises(ValueError, match='at least one pixel'):
            fn(torch.zeros(2, 3, 0, 32), 4)


WORSE = [
    (lambda: block_mask(X, fill=NAN), ValueError, 'fill is nan'),
    (lambda: block_mask(X, fill=float('inf')), ValueError, 'fill is inf'),
    (lambda: block_mask(X, size=(2.5, 4)), ValueError, 'size is 2.5'),
    (lambda: block_mask(X, size=(1, 2, 3)), ValueError, 'size is'),
    (lambda: block_mask(X, size=(9, 8)), ValueError, 'smaller number first'),
    (lambda: block_mask(X, True), ValueError, 'blocks is True'),
    (lambda: gaussian(X, True), ValueError, 'sigma is True'),
    (lambda: gaussian(X, ('a', 'b')), TypeError, "sigma is 'a'"),
    (lambda: gaussian(X, (0.1, 0.2, 0.3)), ValueError, 'sigma is'),
    (lambda: gaussian(X, (0.1, NAN)), ValueError, 'sigma is nan'),
    (lambda: gaussian_blur(X, NAN), ValueError, 'sigma is nan'),
    (lambda: gaussian_blur(X, float('inf')), ValueError, 'sigma is inf'),
    (lambda: gaussian_blur(X, 'wide'), TypeError, 'sigma is str'),
    (lambda: motion_blur(X, NAN), ValueError, 'length is nan'),
    (lambda: motion_blur(X, 5, NAN), ValueError, 'angle is nan'),
    (lambda: blur_kernel('gaussian', 3.5), ValueError, 'size is 3.5'),
    (lambda: blur_kernel('gaussian', 0), ValueError, 'size is 0'),
    (lambda: blur_kernel('motion', length=float('inf')), ValueError, 'length is inf'),
    (lambda: blur_kernel('motion', angle=NAN), ValueError, 'angle is nan'),
    (lambda: blur(X, torch.full((3, 3), NAN)), ValueError, 'kernel holds'),
    (lambda: blur(X, [[1.0]]), TypeError, 'kernel is'),
    (lambda: blur(X, torch.tensor(1.0)), TypeError, 'kernel is'),
    (lambda: bicubic_up(X, True), ValueError, 'scale is True'),
    (lambda: Mixture(rain, weights=['a']), TypeError, "weights is 'a'"),
    (lambda: Mixture(rain, weights=[-1]), ValueError, 'weights is -1'),
]


@pytest.mark.parametrize('case', range(len(WORSE)))
def test_what_makes_no_sense_is_named(case):
    call, error, text = WORSE[case]
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize('name', RANDOM)
def test_the_caller_keeps_his_pictures_and_his_random_state(name):
    x = torch.rand(4, 3, 32, 32, generator=gen())
    was, states = (
        x.clone(),
        (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),
    )
    RANDOM[name](x, generator=gen(1))
    assert (
        torch.equal(x, was)
        and torch.equal(torch.get_rng_state(), states[0])
        and (np.random.get_state()[1] == states[1]).all()
        and random.getstate() == states[2]
    )
