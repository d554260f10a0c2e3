"""What lesson 16 does not teach: terms of a loss, resumed runs, its study at the smallest size."""

import math
from functools import lru_cache

from common import gen
from distances import ours, plain
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from restore_lib import perceptual_study as S
from restore_lib.learner import Callback
from restore_lib.model_files import load_model
from restore_lib.perceptual import PerceptualSRLoss
from restore_lib.superres import make_sr
from restore_lib.superres_scores import sr_pairs
from restore_lib.superres_training import SRConfig, SRLoss, sr_learner
from restore_lib.tracer import audit_gradient
from restore_lib.trunks import st_lpips

NET = dict(base=16, embed=16, head_channels=8, swin_depth=2, window=4)

pytestmark = pytest.mark.usefixtures('seed')


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
    'call, error, says',
    [
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


def test_an_adaptive_weight_validates_with_the_last_one():
    "Without gradients there is nothing to balance; this once raised."
    loss, m = PerceptualSRLoss(plain(), 'adaptive'), model()
    with torch.no_grad():
        loss(m, batch())
    assert loss.terms['lam'] == 0
    step(loss, m)
    last = loss.terms['lam']
    with torch.no_grad():
        loss(m, batch())
    assert loss.terms['lam'] == last > 0
    sr_learner(m, pairs(), pairs()[:1], loss=loss, cpu=True).fit(1)


# the study ----------------------------------------------------------------------------------------


@pytest.fixture
def small_study(monkeypatch, tmp_path):
    "The study at its smallest size, its rows in a folder of their own."
    monkeypatch.setattr(S, 'PLANE_STEPS', 2)
    monkeypatch.setattr(S, 'TAKEN_STEPS', 1)
    monkeypatch.setattr(S, 'PLANE_SIZE', dict(crop=32, batch=1))
    net = dict(net_options=dict(base=16, embed=16, head_channels=8), codec_steps=0)
    monkeypatch.setattr(S, 'TAKEN_SIZE', dict(crop=32, batch=1))
    monkeypatch.setattr(S, 'make_sr', lambda c, p: make_sr(SRConfig(**vars(c) | net), p))
    monkeypatch.setattr(S, 'shown_images', lambda: dict(scene=scenes(1)[0]))
    monkeypatch.setenv('RESTORE_BUDGET', 'study')
    monkeypatch.setenv('IN_TEST', '')
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path / 'runs'))
    (tmp_path / 'restore_lib').mkdir()
    (tmp_path / 'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    return dict.fromkeys(('train', 'held', *S.PLACES), scenes(1))


def test_the_study_records_what_is_missing_and_nothing_twice(small_study, monkeypatch):
    how = dict(tasks=('denoise',), taken=False, precision='no', sets=small_study)
    S.perceptual_study(range(1), ways=('0', '0.03', 'critic'), **how)
    rows = S.plane_rows('denoise')
    assert set(rows) == {'floor', 'start', '0', '0.03', 'critic'}
    figures = rows['0.03'][0]
    assert {f'{p} {k}' for p in S.PLACES for k in S.MEASURES} <= figures.keys()
    assert list(figures['curve']) == ['1', '2'] and 'held PSNR' in figures
    assert S.from_text(figures['shown']['scene']).shape == (1, 48, 64)
    assert figures['RoadScene PSNR'] != rows['0'][0]['RoadScene PSNR']
    monkeypatch.setattr(S, 'plane_row', None)  # called for no row that is there
    monkeypatch.setattr(S, 'floor_rows', lambda *a: None)
    S.perceptual_study(range(1), ways=('0', '0.03', 'critic'), **how)


def test_the_places_of_the_term(small_study):
    for codec, where in (('packet', 'latent'), ('ll', 'decoded'), ('learnable', 'image')):
        S.taken_row(codec, where, 0, small_study, 'no')
    assert set(S.taken_rows()) == {('packet', 'latent'), ('ll', 'decoded'), ('learnable', 'image')}
    with pytest.raises(ValueError, match="where is 'decoded'"):
        S.taken_learner('packet', 'decoded', scenes(1))


def test_each_task_is_judged_on_the_same_pairs():
    for task in S.STARTS:
        one, two = S.task_pairs(task, scenes(2)), S.task_pairs(task, scenes(2))
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, two))
    with pytest.raises(ValueError, match='task'):
        S.task_pairs('blur', scenes(1))


def test_error_of_both_tasks_is_in_one_unit():
    "That of a lossless latent is that of images in [-1, 1]."
    x = torch.stack(scenes(2))
    m = load_model('denoise_grey')[0]
    with torch.no_grad():
        off = 0.1 * torch.randn(x.shape, generator=gen())
        error = S.TermLoss('denoise')(m, (x + off, x))['mse'].item()
        assert error == pytest.approx(4 * (m(x + off) - x).square().mean().item(), rel=1e-4)


def test_terms_of_the_study():
    m, x = load_model('denoise_grey')[0], torch.stack(scenes(2))
    terms = S.TermLoss('denoise', st_lpips(), 'adaptive')(m, x)
    norms = [
        torch.autograd.grad(v, S.last_weight(m), retain_graph=True)[0].norm()
        for v in terms.values()
    ]
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=0.05)
    for lam in (-1, float('nan'), 'auto'):
        with pytest.raises((TypeError, ValueError)):
            S.TermLoss('denoise', plain(), lam)


def verdict(**changes):
    good = dict(PSNR=29.7, alex=0.09, vgg=0.3, right=0.69) | changes

    def row(v, held):
        return {f'{p} {k}': u for p in S.PLACES for k, u in v.items()} | {'held PSNR': held}

    rows = {'0': row(dict(PSNR=30.0, alex=0.2, vgg=0.4, right=0.7), 30.0)}
    rows |= {f'{w:g}': row(good, 29.7 if w <= 0.1 else 28.0) for w in S.LAMBDAS}
    return S.judged_by_rule({k: dict.fromkeys(range(3), v) for k, v in rows.items()}, 'RoadScene')


def test_the_rules_of_the_verdict():
    found = verdict()
    assert (found['weight'], found['holds'], found['right kept']) == ('0.1', 'yes', 'yes')
    for changes in (dict(PSNR=29.4), dict(alex=0.11), dict(vgg=0.33)):
        assert verdict(**changes)['holds'] == 'no'
    assert verdict(right=0.6)['right kept'] == 'no'


def test_the_study_trains_nothing_where_no_row_would_be_kept(monkeypatch):
    monkeypatch.setenv('RESTORE_BUDGET', 'cpu')
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setattr(S, 'floor_rows', None)
    with pytest.raises(ValueError, match="RESTORE_BUDGET gives 'cpu'; expected 'study'"):
        S.perceptual_study(sets={})
