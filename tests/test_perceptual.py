"""What lesson 16 does not teach: windows of an encoder, the terms of a loss, resumed runs."""

import math
from functools import lru_cache

from common import gen, saved
from distances import ours, pair, plain
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from restore_lib import perceptual as P
from restore_lib.learner import Callback
from restore_lib.mae import MAE
from restore_lib.padding import mirror_to
from restore_lib.patching import ViTEncoder
from restore_lib.perceptual import (
    PerceptualSRLoss,
    TokenMaps,
    dmae_features,
    encoder_distance,
    lpips_or,
)
from restore_lib.superres import make_sr
from restore_lib.superres_scores import sr_pairs
from restore_lib.superres_training import SRConfig, SRLoss, sr_learner
from restore_lib.tracer import audit_gradient
from restore_lib.trunks import st_lpips

NET = dict(base=16, embed=16, head_channels=8, swin_depth=2, window=4)

pytestmark = pytest.mark.usefixtures('seed')


def vit(c=1, cls_token=True, size=16, depth=3):
    return ViTEncoder(size, 4, 16, depth, 2, channels=c, cls_token=cls_token)


@pytest.mark.parametrize('net', ['vgg', 'alex', 'squeeze'])
def test_absent_weights_are_no_silence(net, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
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
    monkeypatch.setattr(P, 'lpips', lambda net: plain())
    assert lpips_or('alex', None).name == 'sum' and 'on this machine' in capsys.readouterr().out


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
    a, fn = 1 - x, encoder_distance(enc, blocks=(3,), stats=([0.2], [0.3]))

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
    fn = encoder_distance(vit())
    x = torch.rand(2, 1, 32, 48, generator=gen(4))
    a = (x + 0.2 * torch.rand(x.shape, generator=gen(5))).clamp(0, 1)
    cut = lambda t: [t[..., i : i + 16, j : j + 16] for i in (0, 16) for j in (0, 16, 32)]
    want = torch.stack([fn(p, q) for p, q in zip(cut(a), cut(x))]).mean(0)
    assert torch.allclose(fn(a, x), want, rtol=1e-4)
    odd, mirrored = (
        (t[..., :27, :33] for t in (a, x)),
        (mirror_to(t[..., :27, :33], 32, 48) for t in (a, x)),
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
    want = encoder_distance(mae.encoder, stats=([0.3] * 3, [0.2] * 3))
    assert torch.allclose(encoder_distance(mae)(a, x), want(a, x)) and not torch.allclose(
        encoder_distance(mae.encoder)(a, x), want(a, x), rtol=1e-2
    )
    assert torch.allclose(
        encoder_distance(mae)(a[:, :1], x[:, :1]),
        want(a[:, :1].expand(-1, 3, -1, -1), x[:, :1].expand(-1, 3, -1, -1)),
        rtol=1e-4,
    )


def test_bad_encoders():
    with pytest.raises(TypeError, match='encoder is Linear'):
        encoder_distance(nn.Linear(2, 2))
    for blocks in ((), (0,), (4,), (-1, 2)):
        with pytest.raises(ValueError, match='blocks is'):
            encoder_distance(vit(), blocks=blocks)


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
        'random-alex features' in repr(a)
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


@pytest.mark.parametrize('make', [ours, st_lpips])
def test_the_distance_is_no_part_of_what_is_saved(make):
    m = model()
    sr_learner(m, pairs(), loss=PerceptualSRLoss(make(), 0.1), cpu=True).fit(1)
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


@pytest.mark.parametrize(
    'make, one, other, says',
    [
        (
            lambda blocks: encoder_distance(vit(), blocks=blocks),
            dict(blocks=(1, 2)),
            dict(blocks=(1, 3)),
            r'trunk.blocks=\[1, 2\]',
        ),
    ],
)
def test_the_state_of_another_distance_is_refused(make, one, other, says, tmp_path):
    a, b = make(**one), make(**other)
    for state in (a.state_dict(), saved(a, tmp_path / 'w.pt')):
        with pytest.raises(RuntimeError, match=says):
            b.load_state_dict(state)
        make(**one).load_state_dict(state)


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda: TokenMaps(vit(), (1, 9)), ValueError, 'numbers from 1 to 3'),
        (lambda: TokenMaps(vit(), (1.5,)), ValueError, 'blocks is 1.5'),
        (lambda: PerceptualSRLoss(plain(), 0.1, -torch.ones(15)), ValueError, 'by_step holds'),
        (lambda: PerceptualSRLoss(plain(), 0.1, [math.nan] * 15), ValueError, 'by_step holds'),
    ],
)
def test_what_does_not_fit_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


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
