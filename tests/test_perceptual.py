"""What lesson 16 does not teach: parity with the lpips package, its real weights where they are,
ranges, sizes, types, what stays frozen, windows of an encoder, the terms of a loss,
resumed runs."""

import copy
import math
from functools import lru_cache

from common import gen, saved
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lpips
from restore_lib import perceptual as P
from restore_lib.tracer import audit_gradient
from restore_lib.learner import Callback
from restore_lib.mae import MAE
from restore_lib.metrics import _TRUNKS, _fill_trunk, _trunk_file, lpips_distance
from restore_lib.patching import ViTEncoder
from restore_lib.perceptual import (
    PerceptualLoss,
    PerceptualSRLoss,
    TokenMaps,
    Trunk,
    dmae_features,
    lpips_or,
)
from restore_lib.superres import SRConfig, SRLoss, make_sr, sr_learner, sr_pairs

NETS = tuple(_TRUNKS)
NET = dict(base=16, embed=16, head_channels=8, swin_depth=2, window=4)

pytestmark = pytest.mark.usefixtures('seed')


def pair(b=2, c=3, hw=(64, 48), s=0.1):
    "Two batches of pictures in [0, 1], smooth with some grain."
    x = (
        F.interpolate(torch.rand(b, c, 6, 6, generator=gen(1)), size=hw, mode='bilinear')
        + 0.1 * torch.rand(b, c, *hw, generator=gen(2))
    ).clamp(0, 1)
    return (x + s * torch.randn(x.shape, generator=gen(3))).clamp(0, 1), x


def both(fn, a, x):
    "Values, and the gradient of a weighted sum of them in a."
    a = a.clone().requires_grad_()
    v = fn(a, x)
    (v * torch.arange(1.0, len(v) + 1)).sum().backward()
    return v.detach(), a.grad


@lru_cache
def ours(net='alex', **kw):
    return PerceptualLoss.lpips(net, 'random', **kw)


@lru_cache
def packages(net):
    return lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()


def vit(c=1, cls_token=True, size=16, depth=3):
    return ViTEncoder(size, 4, 16, depth, 2, channels=c, cls_token=cls_token)


class Sum(nn.Module):
    "A trunk whose features are known: the picture and its square."

    def forward(self, x):
        return [x, x[..., ::2, ::2] ** 2]


def plain(**kw):
    return PerceptualLoss(Sum(), 'sum', ([0.0], [1.0]), **(dict(channels=1) | kw))


# parity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('c', [1, 3])
@pytest.mark.parametrize('net', NETS)
def test_parity_with_lpips(net, c):
    "The package's own class, filled with the weights that our trunk drew from another seed."
    mine, ref = ours(net, seed=5), packages(net)
    state = dict(zip(ref.net.state_dict(), mine.trunk.state_dict().values()))
    assert [v.shape for v in state.values()] == [v.shape for v in ref.net.state_dict().values()]
    ref.net.load_state_dict(state)
    a, x = pair(c=c, hw=(48, 35))
    theirs = lambda a, x: ref(*(2 * t.expand(-1, 3, -1, -1) - 1 for t in (a, x))).flatten()
    (v, g), (w, h) = both(mine, a, x), both(theirs, a, x)
    assert (
        w.min() > 1e-3 and (v - w).abs().max() < 1e-6 and (g - h).norm() < 1e-2 * h.norm()
    )  # a ReLU near zero may fall to either side
    mine, ref = copy.deepcopy(mine).double(), copy.deepcopy(ref).double()
    (v, g), (w, h) = both(mine, a.double(), x.double()), both(theirs, a.double(), x.double())
    assert (v - w).abs().max() < 1e-7 and h.abs().max() > 1e-4 and (g - h).abs().max() < 1e-7


@pytest.mark.parametrize('net', ['alex', 'squeeze'])
def test_parity_with_the_metric_of_lesson_02(net):
    a, x = pair(b=3)
    assert torch.allclose(ours(net)(a, x), lpips_distance(net, 'random')(a, x), rtol=0, atol=1e-6)
    assert not torch.allclose(ours(net, seed=1)(a, x), ours(net)(a, x), rtol=1e-2)


@pytest.mark.parametrize('net', ['alex', 'squeeze'])
def test_weights_from_a_file(net, tmp_path, monkeypatch):
    "A file of torchvision's whole classifier, other weights than any seed of ours."
    from torchvision import models

    torch.manual_seed(99)
    whole = getattr(models, _TRUNKS[net][0])(weights=None)
    path = tmp_path / 'w.pth'
    torch.save({k: v for k, v in whole.state_dict().items() if k.startswith('features')}, path)
    monkeypatch.setattr(P, '_trunk_file', lambda n, download: path)
    mine, ref = PerceptualLoss.lpips(net), lpips_distance(net, 'random')
    _fill_trunk(ref.model.net, whole.state_dict())
    a, x = pair()
    assert mine.name == f'LPIPS-{net}' and torch.allclose(mine(a, x), ref(a, x), rtol=0, atol=1e-6)
    assert not torch.allclose(mine(a, x), ours(net)(a, x), rtol=1e-2)


@pytest.mark.parametrize('net', NETS)
def test_real_weights(net):
    try:
        _trunk_file(net, False)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    a, x = pair()
    (v, g), (w, h) = both(PerceptualLoss.lpips(net), a, x), both(lpips_distance(net), a, x)
    assert (v - w).abs().max() < 1e-6 and (g - h).abs().max() < 1e-6


@pytest.mark.parametrize('net', NETS)
def test_absent_weights_are_no_silence(net, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match='pretrained weights'):
        PerceptualLoss.lpips(net)
    if net == 'vgg':
        with pytest.raises(FileNotFoundError, match='pretrained weights'):
            PerceptualLoss.vgg()
    stand_in = lpips_or(net, lambda: plain())
    said = capsys.readouterr().out
    assert (
        stand_in.name == 'sum'
        and said.startswith('sum: a stand-in')
        and f'LPIPS-{net}' in said
        and list(tmp_path.iterdir()) == []
    )
    assert (
        str(tmp_path) not in said and 'http' not in said
    )  # it stands in notebooks that are published


def test_lpips_or_takes_the_real_ones(monkeypatch, capsys):
    monkeypatch.setattr(PerceptualLoss, 'lpips', classmethod(lambda cls, net: plain()))
    assert lpips_or('alex', None).name == 'sum' and 'on this machine' in capsys.readouterr().out


def test_plain_vgg_by_hand():
    from torchvision import models

    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = models.vgg16(weights=None).features.eval()
    a, x = pair(hw=(32, 32))
    norm = lambda t: (
        (t - torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    )
    with torch.no_grad():
        p, q, want = norm(a), norm(x), 0
        for k, layer in enumerate(layers[:9], 1):
            p, q = layer(p), layer(q)
            if k in (4, 9):
                want = want + (p - q).square().mean((1, 2, 3))
    assert torch.allclose(johnson()(a, x), want, rtol=1e-4, atol=1e-9) and want.min() > 1e-5


def test_formula_by_hand():
    "Unit length, channel weights, mean over places, sum over stages."
    w = [torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.5, 1.0, 3.0])]
    fn = PerceptualLoss(Sum(), 'sum', ([0.5] * 3, [0.25] * 3), lins=w)
    a, x = pair()
    u = lambda f: f / f.square().sum(1, keepdim=True).sqrt()
    F1, F2 = [[u((t - 0.5) / 0.25), u((t[..., ::2, ::2] - 0.5) ** 2 / 0.0625)] for t in (a, x)]
    want = sum(((p - q) ** 2 * v[:, None, None]).sum(1).mean((1, 2)) for p, q, v in zip(F1, F2, w))
    assert torch.allclose(fn(a, x), want, rtol=1e-4)
    bare = PerceptualLoss(Sum(), 'sum', ([0.5] * 3, [0.25] * 3))
    assert torch.allclose(
        bare(a, x), sum(((p - q) ** 2).sum(1).mean((1, 2)) for p, q in zip(F1, F2)), rtol=1e-4
    )


# what every distance must do ----------------------------------------------------------------------


@lru_cache
def johnson():
    return PerceptualLoss.vgg((4, 9), 'random')


KINDS = {
    **{n: (lambda n=n: ours(n, **(dict(seed=5) if n == 'vgg' else {}))) for n in NETS},
    'VGG features': johnson,
    'DMAE features': dmae_features,
}


@pytest.fixture(scope='module', params=KINDS)
def fn(request):
    return KINDS[request.param]()


def test_each_picture_by_itself(fn):
    a, x = pair(b=4, c=1, hw=(40, 64))
    x[3], a[3] = 0, 1
    d = fn(a, x)
    assert d.shape == (4,) and (d > 0).all() and d.dtype == torch.float32
    assert torch.allclose(
        d, torch.cat([fn(a[k : k + 1], x[k : k + 1]) for k in range(4)]), rtol=1e-4, atol=1e-7
    )
    assert torch.allclose(fn(a.flip(0), x.flip(0)).flip(0), d, rtol=1e-4, atol=1e-7)
    assert torch.equal(fn(x, x), torch.zeros(4))
    assert torch.allclose(fn(x, a), d, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match='at least one image'):
        fn(a[:0], x[:0])


def test_grows_with_the_damage(fn):
    _, x = pair(c=1)
    noise = torch.randn(x.shape, generator=gen(7))
    d = torch.stack([fn(x + s * noise, x) for s in (0.01, 0.05, 0.2)])
    assert (d[1:] > d[:-1]).all()


def test_maps_make_up_the_distance(fn):
    a, x = pair(c=1)
    maps = fn.maps(a, x)
    assert all(m.shape[:2] == (2, 1) and (m >= 0).all() for m in maps)
    assert torch.allclose(sum(m.mean((1, 2, 3)) for m in maps), fn(a, x), rtol=1e-5)


def test_frozen_and_eval(fn):
    before, keep = {k: v.clone() for k, v in fn.state_dict().items()}, nn.Sequential(fn)
    keep.train()
    fn.train()
    fn.train(True)
    assert not any(m.training for m in fn.modules()) and not any(
        p.requires_grad for p in fn.parameters()
    )
    a, x = pair(c=1)
    d, g = both(fn, a, x)
    assert (
        g.abs().max() > 0
        and torch.isfinite(g).all()
        and not any(p.grad is not None for p in fn.parameters())
    )
    assert torch.equal(both(fn, a, x)[0], d) and all(
        torch.equal(v, before[k]) for k, v in fn.state_dict().items()
    )


def test_gradient_is_the_slope(fn):
    "Along its own gradient, the distance changes by what the gradient says."
    a, x = pair(b=1, c=1)
    _, g = both(fn, a, x)
    step = 1e-2 * g / g.norm()
    with torch.no_grad():
        slope = (fn(a + step, x) - fn(a - step, x)).item() / 2
    assert slope == pytest.approx((g * step).sum().item(), rel=0.05)


def test_gradients_of_flat_and_equal_pictures_are_finite(fn):
    x = torch.zeros(2, 1, 40, 40)
    x[1] = 1
    for a in (x.clone(), 1 - x):
        assert torch.isfinite(both(fn, a, x)[1]).all()
    assert (
        torch.isfinite(both(fn, x.clone(), x)[1]).all()
        and both(fn, x.clone(), x)[1].abs().max() < 1e-5
    )


def test_features_that_are_all_zero():
    """A vector of zeros has no unit length, and no slope of it:
    the square root of a sum would give NaN."""
    x = torch.zeros(2, 3, 8, 8)
    x[1] = 0.5
    fn, a = PerceptualLoss(Sum(), 'sum', ([0.0] * 3, [1.0] * 3)), torch.zeros(2, 3, 8, 8)
    d, g = both(fn, a, x)
    assert torch.isfinite(g).all() and d[0] == 0 and d[1] > 0
    naive = a.clone().requires_grad_()
    naive.square().sum(1).sqrt().sum().backward()
    assert naive.grad.isnan().any()


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_float32_inside(fn, dtype):
    a, x = (t.to(dtype) for t in pair(c=1))
    d = fn(a, x)
    assert d.dtype == torch.float32 and torch.equal(d, fn(a.float(), x.float()))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(fn(a, x), d)


def test_nothing_of_the_input_changes(fn):
    a, x = pair(c=1)
    kept, state = (a.clone(), x.clone()), torch.random.get_rng_state()
    fn(a, x)
    assert (
        torch.equal(a, kept[0])
        and torch.equal(x, kept[1])
        and torch.equal(state, torch.random.get_rng_state())
    )


def test_making_one_leaves_the_random_state():
    state = torch.random.get_rng_state()
    PerceptualLoss.lpips('squeeze', 'random')
    assert torch.equal(state, torch.random.get_rng_state())


# ranges, channels, sizes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    'make',
    [
        lambda r: PerceptualLoss.lpips('squeeze', 'random', range=r),
        lambda r: dmae_features(range=r),
    ],
)
@pytest.mark.parametrize('low, high', [(-1, 1), (0, 255), (-0.5, 0.5), (16, 235)])
def test_ranges_are_the_same_picture(make, low, high):
    a, x = pair(c=1)
    to = lambda t: low + (high - low) * t
    assert torch.allclose(make((low, high))(to(a), to(x)), make((0, 1))(a, x), rtol=1e-3)


def test_range_that_was_not_declared():
    a, x = pair(c=1)
    wrong = PerceptualLoss.lpips('alex', 'random', range=(-1, 1))
    assert (
        wrong(a, x).mean() < 0.9 * ours()(a, x).mean()
    )  # the bug that the class cannot see: [0, 1] lies within [-1, 1]
    for t in (2 * x - 1, x * 255, x + 0.02):
        with pytest.raises(ValueError, match='x (reaches|holds)'):
            ours()(a, t)
    assert ours()(a, x * 1.009).shape == (2,)
    for bad in ((1, 0), (0, 0), ('a', 1), (0, float('nan'))):
        with pytest.raises((TypeError, ValueError), match='range is'):
            plain(range=bad)


def test_a_prediction_may_overshoot_and_keeps_its_gradient():
    a, x = pair(c=1)
    a = a + 1.2
    _, g = both(ours(), a, x)
    assert (g != 0).float().mean() > 0.9 and both(lambda a, x: ours()(a.clamp(0, 1), x), a, x)[
        1
    ].abs().max() == 0
    with pytest.raises(ValueError, match='x_hat holds'):
        ours()(a * torch.nan, x)
    with pytest.raises(ValueError, match='x_hat reaches'):
        ours()(a * 255, x)


@pytest.mark.parametrize('net', ['alex', 'squeeze'])
def test_grey_is_three_equal_channels(net):
    a, x = pair(c=1)
    assert torch.allclose(
        ours(net)(a, x), ours(net)(a.expand(-1, 3, -1, -1), x.expand(-1, 3, -1, -1)), rtol=1e-5
    )


def test_channels_and_shapes():
    a, x = pair()
    for c in (2, 4):
        t = torch.rand(1, c, 40, 40)
        with pytest.raises(ValueError, match='channels'):
            ours()(t, t)
    with pytest.raises(ValueError, match='channels'):
        dmae_features()(a, x)
    with pytest.raises(ValueError, match='equal shapes'):
        ours()(a, x[:1])
    with pytest.raises(ValueError, match='equal shapes'):
        ours()(a[:, :1], x)
    with pytest.raises(ValueError, match='expected'):
        ours()(a[0], x[0])
    with pytest.raises(TypeError):
        ours()((a * 255).to(torch.uint8), (x * 255).to(torch.uint8))
    for bad in (dict(net='resnet'), dict(net='alex', weights='nonsense')):
        with pytest.raises(ValueError, match=list(bad)[-1]):
            PerceptualLoss.lpips(**bad)
    with pytest.raises(ValueError, match='small is'):
        PerceptualLoss.lpips('alex', 'random', small='crop')


@pytest.mark.parametrize('net', NETS)
def test_small_pictures(net):
    least, fn = _TRUNKS[net][2], ours(net, **(dict(seed=5) if net == 'vgg' else {}))
    strict = copy.copy(fn)
    strict.small = 'error'
    assert fn.smallest == strict.smallest == least
    for hw in ((least, least), (least, 2 * least)):
        a, x = pair(hw=hw)
        assert torch.isfinite(strict(a, x)).all() and torch.equal(strict(a, x), fn(a, x))
    for hw in ((least - 1, 40), (40, least - 1), (5, 7), (1, 1)):
        a, x = pair(hw=hw)
        assert torch.isfinite(d := fn(a, x)).all() and (d > 0).all()
        with pytest.raises(ValueError, match=f'at least {least} pixels'):
            strict(a, x)


def test_continued_by_mirroring():
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert P._continued(x, 5, 4)[0, 0].tolist() == [
        [0, 1, 2, 2],
        [3, 4, 5, 5],
        [3, 4, 5, 5],
        [0, 1, 2, 2],
        [0, 1, 2, 2],
    ]
    assert torch.equal(P._continued(x, 1, 1), x) and torch.equal(
        P._continued(x[..., :1, :1], 3, 3), torch.zeros(1, 1, 3, 3)
    )


def test_trunk_cuts():
    trunk, x = johnson().trunk, torch.rand(1, 3, 32, 32)
    assert [tuple(f.shape) for f in trunk(x)] == [(1, 64, 32, 32), (1, 128, 16, 16)] and all(
        (f >= 0).all() for f in trunk(x)
    )
    with pytest.raises(ValueError, match='net is'):
        Trunk('resnet')
    before, after = Trunk('squeeze', 'random', cuts=(1, 2))(x)
    assert (before < 0).any() and torch.equal(
        after, before.relu()
    )  # no layer writes into what a stage gave


# encoders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('cls_token', [True, False])
def test_tokens_are_those_of_the_blocks(cls_token):
    enc = vit(cls_token=cls_token).eval()
    seen, x = [], torch.rand(3, 1, 16, 16)
    hooks = [b.register_forward_hook(lambda m, i, o: seen.append(o)) for b in enc.blocks]
    enc(x)
    for h in hooks:
        h.remove()
    maps = TokenMaps(enc, (1, 3))(x)
    assert len(maps) == 2 and all(
        torch.allclose(m[..., 0].transpose(1, 2), t[:, cls_token:], atol=1e-6)
        for m, t in zip(maps, (seen[0], seen[2]))
    )


def test_distance_of_an_encoder_by_hand():
    enc, x = vit(), torch.rand(2, 1, 16, 16)
    a, fn = 1 - x, PerceptualLoss.encoder(enc, blocks=(3,), stats=([0.2], [0.3]))

    def tokens(t):
        seen = []
        h = enc.blocks[2].register_forward_hook(lambda m, i, o: seen.append(o[:, 1:]))
        enc((t - 0.2) / 0.3)
        h.remove()
        return F.normalize(seen[0], dim=-1)

    assert (
        torch.allclose(fn(a, x), (tokens(a) - tokens(x)).square().sum(-1).mean(1), atol=1e-6)
        and fn(a, x).min() > 1e-3
    )


def test_windows_are_pictures_of_their_own():
    fn = PerceptualLoss.encoder(vit())
    x = torch.rand(2, 1, 32, 48, generator=gen(4))
    a = (x + 0.2 * torch.rand(x.shape, generator=gen(5))).clamp(0, 1)
    cut = lambda t: [t[..., i : i + 16, j : j + 16] for i in (0, 16) for j in (0, 16, 32)]
    want = torch.stack([fn(p, q) for p, q in zip(cut(a), cut(x))]).mean(0)
    assert torch.allclose(fn(a, x), want, rtol=1e-4)
    odd, mirrored = (
        (t[..., :27, :33] for t in (a, x)),
        (P._continued(t[..., :27, :33], 32, 48) for t in (a, x)),
    )
    assert torch.allclose(fn(*odd), fn(*mirrored), rtol=1e-4)
    by_window = fn.maps(a, x)[-1][..., 0].unflatten(2, (6, -1)).mean((1, 3))  # row by row
    assert torch.allclose(
        by_window,
        torch.stack([fn.maps(p, q)[-1].mean((1, 2, 3)) for p, q in zip(cut(a), cut(x))], 1),
        rtol=1e-4,
    )
    b = a.clone()
    b[..., :16, :16] = x[..., :16, :16]
    assert torch.allclose(
        fn(b, x) * 6,
        torch.stack([fn(p, q) for p, q in zip(cut(a)[1:], cut(x)[1:])]).sum(0),
        rtol=1e-4,
    )


def test_an_mae_brings_its_own_statistics():
    mae = MAE(16, 4, 16, 2, 2, 16, 1, 2, channels=3)
    mae.mean.fill_(0.3)
    mae.std.fill_(0.2)
    a, x = pair(hw=(16, 16))
    want = PerceptualLoss.encoder(mae.encoder, stats=([0.3] * 3, [0.2] * 3))
    assert torch.allclose(PerceptualLoss.encoder(mae)(a, x), want(a, x)) and not torch.allclose(
        PerceptualLoss.encoder(mae.encoder)(a, x), want(a, x), rtol=1e-2
    )
    assert torch.allclose(
        PerceptualLoss.encoder(mae)(a[:, :1], x[:, :1]),
        want(a[:, :1].expand(-1, 3, -1, -1), x[:, :1].expand(-1, 3, -1, -1)),
        rtol=1e-4,
    )


def test_bad_encoders():
    with pytest.raises(TypeError, match='encoder is Linear'):
        PerceptualLoss.encoder(nn.Linear(2, 2))
    for blocks in ((), (0,), (4,), (-1, 2)):
        with pytest.raises(ValueError, match='blocks is'):
            PerceptualLoss.encoder(vit(), blocks=blocks)


def test_dmae_features_are_those_of_lesson_10():
    from restore_lib.model_files import load_model

    fn, model = dmae_features(), load_model('mixed')[0]
    assert fn.name == 'DMAE features' and all(
        torch.equal(v, fn.trunk.vit.state_dict()[k]) for k, v in model.encoder.state_dict().items()
    )
    assert torch.equal(fn.mean.flatten(), model.mean.flatten()) and torch.equal(
        fn.std.flatten(), model.std.flatten()
    )


def test_dmae_features_take_the_models_statistics(monkeypatch):
    from restore_lib.model_files import load_model

    model = load_model('mixed')[0]
    model.mean.fill_(0.3)
    model.std.fill_(0.2)
    monkeypatch.setattr(P, 'load_model', lambda name: (model, {}))
    fn = dmae_features()
    assert (fn.mean.item(), fn.std.item()) == pytest.approx((0.3, 0.2))


# the loss of a Learner ----------------------------------------------------------------------------


def scenes(n=4, hw=(48, 64)):
    coarse = F.interpolate(
        torch.rand(n, 1, 6, 8, generator=gen()), size=hw, mode='bicubic', align_corners=False
    )
    return list((coarse + 0.1 * torch.randn(n, 1, *hw, generator=gen(1))).clamp(0, 1))


@lru_cache
def pairs():
    return sr_pairs(scenes(), 4)


def model(**kw):
    "A network that is not at its zero start, so that every part gets a gradient."
    m, g = (
        make_sr(SRConfig(**(dict(net_options=NET, crop=32, batch=4, steps=6) | kw)), pairs()),
        gen(9),
    )
    with torch.no_grad():
        for p in m.net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return m


def batch():
    return tuple(torch.stack(v) for v in zip(*pairs()))


def step(loss, m, given=None):
    "The loss, and the gradients of all parameters, at a fixed random state."
    torch.manual_seed(0)
    m.zero_grad()
    value = loss(m, batch() if given is None else given)
    value.backward()
    return value.item(), {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}


def test_total_is_the_sum_of_its_parts():
    m = model()
    for lam in (0, 0.1, 3):
        for by in (None, torch.linspace(0, 2, 15)):
            loss = PerceptualSRLoss(plain(), lam, by)
            total, grads = step(loss, m)
            mse, of_mse = step(SRLoss(), m)
            torch.manual_seed(0)
            m.zero_grad()
            last, x_hat = m(*batch(), decoded=True)
            per = plain()(x_hat, batch()[1])
            term = (per * (1 if by is None else by[last.t])).mean()
            of_per = torch.autograd.grad(term, [p for n, p in m.named_parameters() if n in of_mse])
            assert total == pytest.approx(
                mse + lam * term.item(), rel=1e-5
            ) and total == pytest.approx(loss.terms['mse'] + loss.terms['perceptual'], rel=1e-6)
            assert (
                loss.terms['mse'] == pytest.approx(mse) and loss.terms['lam'] == lam and term > 1e-5
            )
            assert (
                torch.allclose(loss.perceptual, per.detach())
                and not loss.perceptual.requires_grad
                and torch.equal(loss.t, last.t)
                and loss.last.per_sample.shape == (4,)
            )
            for (n, g), h in zip(of_mse.items(), of_per):
                assert torch.allclose(grads[n], g + lam * h, rtol=1e-3, atol=1e-6), n


def test_without_weight_it_is_the_plain_loss():
    a, b = step(PerceptualSRLoss(plain(), 0), model()), step(SRLoss(), model())
    assert (
        a[0] == b[0]
        and a[1].keys() == b[1].keys()
        and all(torch.equal(v, b[1][k]) for k, v in a[1].items())
    )
    assert step(PerceptualSRLoss(plain(), 1), model())[0] > 1.1 * b[0]


def test_weight_may_be_set_between_steps():
    loss, m = PerceptualSRLoss(plain(), 0.1), model()
    step(loss, m)
    small, loss.lam = loss.terms['perceptual'], 0.5
    step(loss, m)
    assert loss.terms['perceptual'] == pytest.approx(5 * small) and loss.terms['lam'] == 0.5


@pytest.mark.parametrize('by', [None, torch.linspace(0, 2, 15)])
@pytest.mark.parametrize('last', [None, 'function', 'weight'])
def test_adaptive_pulls_equally_hard(last, by):
    m = model()
    first = [p for p in m.net.parameters() if p.ndim > 1][0]
    where = {None: None, 'function': lambda m: first, 'weight': first}[last]
    loss = PerceptualSRLoss(plain(), 'adaptive', by, last=where)
    step(loss, m)
    shared = loss.shared(m)
    assert (
        (shared is first)
        if last
        else shared.shape[0] == 16 and shared is dict(m.net.named_parameters())['last.2.weight']
    )
    torch.manual_seed(0)
    latent, x_hat = m(*batch(), decoded=True)
    term = (plain()(x_hat, batch()[1]) * (1 if by is None else by[latent.t])).mean()
    a, b = (
        torch.autograd.grad(v, shared, retain_graph=True)[0].norm().item()
        for v in (latent.mean, term)
    )
    assert (
        a > 1e-5
        and loss.terms['lam'] == pytest.approx(a / (b + 1e-4), rel=1e-3)
        and loss.terms['perceptual'] == pytest.approx(loss.terms['lam'] * term.item(), rel=1e-4)
    )


def test_the_shared_weight_of_a_wrapped_model():
    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *a, **kw):
            return self.module(*a, **kw)

    m = model()
    loss = PerceptualSRLoss(plain(), 'adaptive')
    a, b = step(loss, m)[0], step(loss, Wrapped(m))[0]
    assert a == b


def test_weight_and_degrade_reach_the_latent_loss():
    m = model()
    assert (
        step(PerceptualSRLoss(plain(), 0, weight='sigma'), m)[0]
        == pytest.approx(step(SRLoss(weight='sigma'), m)[0])
        != step(SRLoss(), m)[0]
    )
    from restore_lib.degrade import bicubic_down

    down = lambda x: bicubic_down(x, 4)
    assert step(PerceptualSRLoss(plain(), 0.1, degrade=down), m, batch()[1])[0] == pytest.approx(
        step(PerceptualSRLoss(plain(), 0.1), m, (down(batch()[1]), batch()[1]))[0]
    )


def test_bad_losses():
    for lam in (-1, float('nan'), float('inf'), 'auto', None, True):
        with pytest.raises((TypeError, ValueError), match='lam is'):
            PerceptualSRLoss(plain(), lam)
    for by in (torch.ones(5), torch.ones(16)):
        with pytest.raises(ValueError, match='by_step'):
            PerceptualSRLoss(plain(), 0.1, by)(model(), batch())
    with pytest.raises(ValueError, match='by_step'):
        PerceptualSRLoss(plain(), 0.1, torch.ones(15, 1))
    with pytest.raises(TypeError, match='perceptual is'):
        PerceptualSRLoss('alex')


def test_a_loss_says_what_it_is():
    a, b = PerceptualSRLoss(ours(), 0.1), PerceptualSRLoss(ours(), 0.5)
    assert (
        'LPIPS-alex (random trunk)' in repr(a)
        and '0.1' in repr(a)
        and repr(a) != repr(b) != repr(PerceptualSRLoss(plain(), 0.5))
    )


class Stop(Callback):
    "Saves at a step, and ends the fit by an error."

    def __init__(self, at, folder):
        self.at, self.folder = at, folder

    def after_step(self, learn):
        if learn.step == self.at:
            learn.save(self.folder)
            raise KeyboardInterrupt


def test_trains_and_resumes_bit_for_bit(tmp_path):
    def made(*cbs):
        return sr_learner(
            model(),
            pairs(),
            loss=PerceptualSRLoss(plain(), 0.5, torch.linspace(0, 2, 15)),
            cpu=True,
            cbs=cbs,
        )

    whole, half, rest = made(Stop(0, '')), made(Stop(3, tmp_path / 'c')), made(Stop(0, ''))
    start = {k: v.clone() for k, v in whole.model.state_dict().items()}
    whole.fit(6)
    with pytest.raises(KeyboardInterrupt):
        half.fit(6)
    rest.load(tmp_path / 'c')
    assert rest.step == 3
    rest.fit(6)
    a, b = (m.model.state_dict() for m in (whole, rest))
    assert any(not torch.equal(start[k], v) for k, v in a.items()) and all(
        torch.equal(v, b[k]) for k, v in a.items()
    )


def test_the_distance_is_no_part_of_what_is_saved():
    m = model()
    sr_learner(m, pairs(), loss=PerceptualSRLoss(ours(), 0.1), cpu=True).fit(1)
    assert m.state_dict().keys() == model().state_dict().keys()


# the chain ----------------------------------------------------------------------------------------


def audited(cut):
    "The report on one step whose decoder is cut off in this way."
    m, fn = model(), plain()
    decode = m.codec.decode
    m.codec.decode = {
        '': decode,
        'numpy': lambda z, s: torch.from_numpy(decode(z.detach(), s).numpy()),
        'detach': lambda z, s: decode(z.detach(), s),
        'no_grad': torch.no_grad()(decode),
    }[cut]
    y, x = batch()

    def one():
        loss, x_hat = m(y, x, decoded=True)
        return dict(mse=loss.mean, perceptual=fn(x_hat, x).mean())

    return audit_gradient(one, dict(net=m.net), expect=dict(perceptual=['net']))


@pytest.mark.parametrize(
    'cut, how', [('numpy', 'numpy'), ('detach', 'detach'), ('no_grad', 'no_grad')]
)
def test_the_audit_names_each_cut(cut, how):
    r = audited(cut)
    assert (
        not r
        and r.breaks[0].name == 'perceptual'
        and any(how in b.how for b in r.breaks)
        and any(b.where for b in r.breaks)
    )


def test_the_audit_passes_the_mended_chain():
    assert audited('')


@pytest.mark.parametrize('cut', ['numpy', 'detach', 'no_grad'])
def test_a_cut_term_changes_nothing(cut):
    m = model()
    decode = m.codec.decode
    m.codec.decode = {
        'numpy': lambda z, s: torch.from_numpy(decode(z.detach(), s).numpy()),
        'detach': lambda z, s: decode(z.detach(), s),
        'no_grad': torch.no_grad()(decode),
    }[cut]
    (total, grads), (mse, of_mse) = step(PerceptualSRLoss(plain(), 5), m), step(SRLoss(), m)
    assert total > mse and all(torch.equal(v, of_mse[k]) for k, v in grads.items())
    with pytest.raises(RuntimeError, match='does not require grad'):
        plain()(m(*batch(), decoded=True)[1], batch()[1]).mean().backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu():
    a, x = pair(c=1)
    for fn in (PerceptualLoss.lpips('alex', 'random'), dmae_features()):
        d = fn(a, x)
        assert torch.allclose(fn.cuda()(a.cuda(), x.cuda()).cpu(), d, rtol=1e-3, atol=1e-5)


# dead stages, kinds of numbers, states ------------------------------------------------------------


def dead(net='alex', stage=4, scale=0.0, **kw):
    "LPIPS with a stage whose features are all zero, or nearly."
    fn = copy.deepcopy(ours(net, **kw))
    for p in fn.trunk.stages[stage].parameters():
        p.data.mul_(scale)
    return fn


def test_parity_in_double_to_eight_digits():
    "Also the pictures stay in double precision."
    mine, ref = (
        copy.deepcopy(ours('alex', seed=5)).double(),
        copy.deepcopy(packages('alex')).double(),
    )
    ref.net.load_state_dict(dict(zip(ref.net.state_dict(), mine.trunk.state_dict().values())))
    g = gen(7)
    a, x = (torch.rand(2, 3, 40, 40, generator=g, dtype=torch.float64) for _ in range(2))
    (v, d), (w, e) = both(mine, a, x), both(lambda a, x: ref(2 * a - 1, 2 * x - 1).flatten(), a, x)
    assert (
        v.dtype == torch.float64
        and (v - w).abs().max() < 1e-8
        and (d - e).abs().max() < 1e-8
        and e.abs().max() > 1e-4
    )


@pytest.mark.parametrize('scale', [0.0, 1e-4, 1e-12, 1e-30])
def test_a_dead_stage_counts_nothing_and_has_finite_derivatives(scale):
    fn, (a, x) = dead(scale=scale), pair()
    v, g = both(fn, a, x)
    assert v.isfinite().all() and g.isfinite().all() and g.abs().max() > 0
    if not scale:
        assert torch.allclose(v, sum(d.mean((1, 2, 3)) for d in fn.maps(a, x)[:4]), atol=1e-7)
    b = a[:1, :, :32, :32].clone().requires_grad_()
    (g,) = torch.autograd.grad(fn(b, x[:1, :, :32, :32]).sum(), b, create_graph=True)
    (second,) = torch.autograd.grad(g.square().sum(), b)  # of a penalty on the gradient
    assert second.isfinite().all() and second.abs().max() > 0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', [1.0, 1e-4, 0.0])
def test_autocast_changes_nothing(dtype, scale):
    fn, (a, x) = dead(scale=scale), pair()
    want, slope = both(fn, a, x)
    with torch.autocast('cpu', dtype):
        v, g = both(fn, a, x)
    assert torch.equal(v, want) and v.dtype == torch.float32 and torch.allclose(g, slope, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_pictures_and_of_the_network(dtype):
    fn, (a, x) = ours(), pair()
    a, x = a.to(dtype), x.to(dtype)
    want = fn(a.float(), x.float())
    assert torch.equal(fn(a, x), want) and torch.equal(fn(a, x.float()), want)
    own = copy.deepcopy(fn).to(dtype)(a, x)
    assert own.dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    ) and torch.allclose(own.float(), want, rtol=0.2)


def test_under_default_float64_it_is_the_same_network():
    torch.set_default_dtype(torch.float64)
    try:
        fn = PerceptualLoss.lpips('squeeze', 'random')
    finally:
        torch.set_default_dtype(torch.float32)
    assert {v.dtype for v in fn.state_dict().values()} == {torch.float32} and fn(
        *pair()
    ).dtype == torch.float32


def test_making_one_leaves_the_callers_random_state_alone(monkeypatch):
    import random

    def forbidden(*_):
        raise AssertionError('it would seed every GPU of the caller')

    monkeypatch.setattr(torch.cuda, 'manual_seed_all', forbidden)
    state = lambda: (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))
    before = state()
    fn = PerceptualLoss.lpips('squeeze', 'random', seed=np.int64(3))
    fn(*pair())
    assert state() == before and all(
        torch.equal(p, q) for p, q in zip(fn.parameters(), ours('squeeze', seed=3).parameters())
    )


@pytest.mark.parametrize(
    'make, one, other, says',
    [
        (plain, dict(range=(-1, 1)), dict(), r'range=\[-1.0, 1.0\], but it is \[0.0, 1.0\] here'),
        (plain, dict(unit=False), dict(), 'unit=False'),
        (
            lambda blocks: PerceptualLoss.encoder(vit(), blocks=blocks),
            dict(blocks=(1, 2)),
            dict(blocks=(1, 3)),
            r'trunk.blocks=\[1, 2\]',
        ),
        (
            lambda layers: PerceptualLoss.vgg(layers, 'random'),
            dict(layers=(4, 9)),
            dict(layers=(4, 8)),
            r'trunk.cuts=\[4, 9\]',
        ),
    ],
)
def test_the_state_of_another_distance_is_refused(make, one, other, says, tmp_path):
    a, b = make(**one), make(**other)
    for state in (a.state_dict(), saved(a, tmp_path / 'w.pt')):
        with pytest.raises(RuntimeError, match=says):
            b.load_state_dict(state)
        make(**one).load_state_dict(state)


def test_what_a_picture_is_standardised_with_is_in_the_state(tmp_path):
    a, b = PerceptualLoss(Sum(), 'sum', ([0.3], [0.2]), channels=1), plain()
    b.load_state_dict(saved(a, tmp_path / 'w.pt'))
    y, x = pair(c=1)
    assert torch.equal(a(y, x), b(y, x)) and not torch.allclose(plain()(y, x), b(y, x))


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda: plain(range=(0, math.inf)), ValueError, 'range is inf'),
        (
            lambda: PerceptualLoss(Sum(), 'sum', ([0.0], [0.0]), channels=1),
            ValueError,
            'std in stats is 0',
        ),
        (
            lambda: PerceptualLoss(Sum(), 'sum', ([math.nan], [1.0]), channels=1),
            ValueError,
            'mean in stats is nan',
        ),
        (
            lambda: PerceptualLoss(Sum(), 'sum', ([0.0] * 2, [1.0] * 2)),
            ValueError,
            'stats holds 2 numbers as mean; expected 1 or 3',
        ),
        (
            lambda: PerceptualLoss(
                Sum(), 'sum', ([0.0] * 3, [1.0] * 3), lins=[torch.tensor([1.0, -1.0, 1.0])]
            ),
            ValueError,
            'lins holds',
        ),
        (lambda: PerceptualLoss.vgg((), 'random'), ValueError, r'cuts is \(\)'),
        (lambda: PerceptualLoss.vgg((9, 4), 'random'), ValueError, 'rising'),
        (lambda: PerceptualLoss.vgg((4, 40), 'random'), ValueError, 'cuts is 40'),
        (lambda: Trunk('alex', 'random', cuts=(5, 20)), ValueError, 'at most 13'),
        (lambda: PerceptualLoss.vgg((4, 9.5), 'random'), ValueError, 'cuts is 9.5'),
        (lambda: Trunk('alex', 'random', seed=1.5), ValueError, 'seed is 1.5'),
        (lambda: TokenMaps(vit(), (1, 9)), ValueError, 'numbers from 1 to 3'),
        (lambda: TokenMaps(vit(), (1.5,)), ValueError, 'blocks is 1.5'),
        (
            lambda: ours()(torch.rand(1, 3, 0, 8), torch.rand(1, 3, 0, 8)),
            ValueError,
            'at least one pixel',
        ),
        (lambda: PerceptualSRLoss(plain(), 0.1, -torch.ones(15)), ValueError, 'by_step holds'),
        (lambda: PerceptualSRLoss(plain(), 0.1, [math.nan] * 15), ValueError, 'by_step holds'),
    ],
)
def test_what_does_not_fit_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_an_empty_batch_has_no_distances():
    with pytest.raises(ValueError, match='at least one image'):
        ours()(torch.rand(0, 3, 40, 40), torch.rand(0, 3, 40, 40))


@pytest.mark.parametrize('shape', [(4, 1, 1, 1), (), (1,), (4, 1)])
def test_distances_of_another_shape_are_not_spread_over_weights(shape):
    "The lpips package gives (b, 1, 1, 1): times (b,) weights that made (b, 1, 1, b)."
    y, x = batch()
    for by in (None, torch.linspace(0, 2, 15)):
        with pytest.raises(ValueError, match=r'perceptual gave shape .*expected \(4,\)'):
            PerceptualSRLoss(lambda a, b: a.mean() * torch.ones(shape), 0.1, by)(
                model(), (y[:1].expand(4, -1, -1, -1), x[:1].expand(4, -1, -1, -1))
            )


def test_weights_by_step_of_numpy_and_a_bad_lam_in_the_middle():
    w = np.linspace(0, 2, 15)
    losses = [
        step(PerceptualSRLoss(plain(), np.float32(0.5), by), model())[0]
        for by in (w, w.tolist(), torch.tensor(w))
    ]
    assert losses[0] == losses[1] == losses[2]
    loss = PerceptualSRLoss(plain(), 0.1)
    for bad in (math.nan, -1.0):
        loss.lam = bad
        with pytest.raises(ValueError, match='lam is'):
            loss(model(), batch())
