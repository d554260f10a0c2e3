"""What lesson 17 does not teach: thirds at every T, levels, devices and kinds of number, bad input,
schedules across a kill, formulas of the relatives, gradient noise against a direct computation."""

import math

from common import gen
from toy import Stop
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from restore_lib.diffusion import ResidualShift
from restore_lib.gradient_grams import gradient_gram, gradient_noise
from restore_lib.learner import Learner
from restore_lib.perceptual import PerceptualSRLoss
from restore_lib.superres import make_sr
from restore_lib.superres_scores import sr_pairs
from restore_lib.superres_training import SRConfig, sr_learner
from restore_lib.weights import (
    LearnedUncertainty,
    ProgressiveLam,
    inverse_variance,
    normalised,
    progressive,
    snr_weights,
    spread,
    step_range,
    step_weights,
)

pytestmark = pytest.mark.usefixtures('seed')

def by_hand(t, T, levels=(1, 0.1, 0.001)):
    "The log's own code, written for any number of levels."
    w = torch.full((len(t),), float(levels[0]))
    for k in range(1, len(levels)):
        w[t >= k * T // len(levels)] = levels[k]
    return w


# --- by time step


def test_thirds_of_fifteen():
    w = step_weights(torch.arange(15), 15)
    assert w.tolist() == torch.tensor([1.0] * 5 + [0.1] * 5 + [0.001] * 5).tolist()
    assert w.dtype == torch.float32 and w.mean().item() == pytest.approx(0.367, abs=1e-6)


@pytest.mark.parametrize('T', range(3, 41))
def test_thirds_of_any_T_are_those_of_the_logs_code(T):
    t = torch.arange(T)
    w = torch.ones(T)
    w[(t >= T // 3) & (t < 2 * T // 3)] = 0.1
    w[t >= 2 * T // 3] = 0.001
    assert torch.equal(step_weights(t, T), w)


def test_not_divisible_by_three():
    assert step_weights(torch.arange(4), 4).tolist() == pytest.approx([1, 0.1, 0.001, 0.001])
    assert step_weights(torch.arange(5), 5).tolist() == pytest.approx([1, 0.1, 0.1, 0.001, 0.001])
    assert step_range(torch.arange(16), 16).bincount().tolist() == [5, 5, 6]


@pytest.mark.parametrize('levels', [(2.0,), (1, 0), (3, 2, 1), (1, 0, 5, 0), tuple(range(7))])
@pytest.mark.parametrize('T', [7, 10, 15])
def test_any_number_of_levels(levels, T):
    t = torch.randint(0, T, (50,), generator=gen())
    assert torch.equal(step_weights(t, T, levels), by_hand(t, T, levels))
    assert torch.equal(
        step_weights(t, T, torch.tensor(levels, dtype=torch.float64)), by_hand(t, T, levels)
    )
    assert set(step_range(torch.arange(T), T, len(levels)).tolist()) == set(range(len(levels)))


def test_every_t_by_itself_whatever_the_batch():
    t = torch.tensor([14, 0, 7, 7, 5, 4, 10, 9])
    whole = step_weights(t, 15)
    assert whole.tolist() == pytest.approx([0.001, 1, 0.1, 0.1, 0.1, 1, 0.001, 0.1])
    assert torch.equal(torch.cat([step_weights(t[k : k + 1], 15) for k in range(8)]), whole)
    assert step_weights(t[:0], 15).shape == (0,)


def test_on_another_device():
    "Weights go where t is; its values are not looked at there."
    w = step_weights(torch.zeros(3, dtype=torch.int64, device='meta'), 15)
    assert w.device.type == 'meta' and w.dtype == torch.float32 and w.shape == (3,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu():
    t = torch.arange(15)
    assert torch.equal(step_weights(t.cuda(), 15).cpu(), step_weights(t, 15))


@pytest.mark.parametrize(
    't, T, error, says',
    [
        ([0, 1], 15, TypeError, 't is list'),
        (3, 15, TypeError, 't is int'),
        (torch.tensor([0.0]), 15, ValueError, 'float32'),
        (torch.tensor([0], dtype=torch.int32), 15, ValueError, 'int32'),
        (torch.tensor(3), 15, ValueError, 'expected int64 of shape'),
        (torch.zeros(2, 2, dtype=torch.int64), 15, ValueError, 'expected int64 of shape'),
        (torch.tensor([0, 15]), 15, ValueError, '0 to 15; expected 0 to 14'),
        (torch.tensor([-1]), 15, ValueError, 'expected 0 to 14'),
        (torch.tensor([0]), 0, ValueError, 'T is 0'),
        (torch.tensor([0]), 15.0, ValueError, 'T is 15.0'),
        (torch.tensor([0]), True, ValueError, 'T is True'),
        (torch.tensor([0]), 2, ValueError, 'expected 1 to 2'),
    ],
)
def test_bad_t(t, T, error, says):
    with pytest.raises(error, match=says):
        step_weights(t, T)


@pytest.mark.parametrize(
    'levels', [(), (1, -0.1), (1, math.nan), (1, math.inf), torch.ones(2, 2), 3.0]
)
def test_bad_levels(levels):
    with pytest.raises(ValueError, match='levels'):
        step_weights(torch.arange(15), 15, levels)


def test_normalised():
    w = step_weights(torch.arange(15), 15)
    n = normalised(w)
    assert (
        n.mean().item() == pytest.approx(1, abs=1e-6)
        and torch.allclose(n / n[0], w / w[0])
        and n[0].item() == pytest.approx(1 / 0.367, abs=1e-5)
    )
    assert (
        torch.equal(normalised(torch.ones(4)), torch.ones(4))
        and normalised(torch.ones(3).double()).dtype == torch.float64
    )
    assert torch.equal(w, step_weights(torch.arange(15), 15))  # what is given stays as it is


@pytest.mark.parametrize(
    'w, error',
    [
        (torch.zeros(3), ValueError),
        (torch.tensor([1.0, -1.0]), ValueError),
        (torch.tensor([1.0, math.nan]), ValueError),
        (torch.ones(2, 2), ValueError),
        (torch.ones(0), ValueError),
        ([1.0, 2.0], TypeError),
        (torch.ones(3, dtype=torch.int64), TypeError),
    ],
)
def test_bad_weights(w, error):
    with pytest.raises(error, match='w (is|has)'):
        normalised(w)


# --- over training


def test_progressive_is_the_logs_formula():
    for k in range(0, 11):
        assert progressive(10_000 * k, 100_000) == pytest.approx(0.01 + 0.014 * k, abs=1e-12)
    assert (
        progressive(0, 10) == 0.01
        and progressive(10, 10) == 0.15
        and isinstance(progressive(5, 10, 1, 2), float)
    )


def test_progressive_is_clamped_and_monotone():
    v = [progressive(k, 7) for k in range(30)]
    assert (
        all(a <= b for a, b in zip(v, v[1:]))
        and all(a < b for a, b in zip(v[:7], v[1:8]))
        and v[7:] == [0.15] * 23
    )
    down = [progressive(k, 7, 2.0, 1.0) for k in range(30)]
    assert down[0] == 2 and down[-1] == 1 and all(a >= b for a, b in zip(down, down[1:]))


@pytest.mark.parametrize(
    'bad',
    [
        dict(iteration=-1, total=10),
        dict(iteration=1, total=0),
        dict(iteration=1, total=-5),
        dict(iteration=math.nan, total=5),
        dict(iteration=1, total=math.nan),
    ],
)
def test_bad_progress(bad):
    with pytest.raises(ValueError, match='expected a number'):
        progressive(**bad)


def test_composition():
    "Chapter 24.7: the final weight is the product of both."
    w = progressive(50_000, 100_000) * step_weights(torch.tensor([3, 7, 12]), 15)
    assert w.tolist() == pytest.approx([0.08, 0.008, 0.00008], rel=1e-5)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.line = nn.Linear(2, 1)

    def forward(self, x):
        return self.line(x)


class ToyLoss:
    "A loss whose second part has the weight lam; remembers what lam was."

    def __init__(self):
        self.lam, self.seen = 99.0, []

    def __call__(self, model, x):
        self.seen.append(self.lam)
        said = model(x)
        return {
            'mse': (said - x.sum(1, keepdim=True)).square().mean(),
            'other': self.lam * (said - 3).square().mean(),
        }


def learner(**how):
    loss = ToyLoss()
    data = torch.randn(32, 2, generator=gen(1))
    return Learner(
        Toy(),
        loss,
        DataLoader(data, 4),
        opt=lambda p: torch.optim.SGD(p, lr=0.05),
        cbs=[ProgressiveLam(loss, **how)],
        cpu=True,
    ), loss


@pytest.mark.parametrize('how', [{}, dict(start=0.5, end=0.0, total=6)])
def test_every_step_has_its_weight(how):
    learn, loss = learner(**how)
    learn.fit(10)
    total, a, b = how.get('total', 10), how.get('start', 0.01), how.get('end', 0.15)
    assert loss.seen == pytest.approx([a + (b - a) * min(k / total, 1) for k in range(10)])
    assert loss.lam == pytest.approx(b)  # after the last step, when the model is validated


@pytest.mark.parametrize('stop', [4, 5, 7, 8])
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, stop):
    whole, loss = learner()
    whole.fit(12)
    part, first = learner()
    part.cbs.append(Stop(stop))
    with pytest.raises(KeyboardInterrupt):
        part.fit(12, folder=tmp_path, save_every=2)
    again, second = learner()
    again.cbs.append(Stop(None))
    again.load(tmp_path).fit(12)
    begun = 12 - len(second.seen)
    assert begun == (stop - 1) // 2 * 2  # the last save before it was killed
    assert second.seen == loss.seen[begun:] and first.seen == loss.seen[:stop]
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.bare.state_dict().values(), again.bare.state_dict().values())
    )


def test_the_schedule_is_part_of_a_runs_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('restore_lib.learner.runs_home', lambda: tmp_path)
    for how in ({}, dict(end=0.3), dict(start=0.02), dict(total=5)):
        learner(**how)[0].fit_or_load('99_toy', {}, 4)
    assert len(list(tmp_path.iterdir())) == 4
    learner(end=0.3)[0].fit_or_load('99_toy', {}, 4)
    assert 'loaded' in capsys.readouterr().out.splitlines()[-1]


def test_what_has_no_weight_is_refused():
    with pytest.raises(TypeError, match='attribute lam'):
        ProgressiveLam(lambda m, b: 0.0)


# --- in the loss of lesson 16

NET = dict(base=16, embed=16, head_channels=8, swin_depth=0)


def distance(x_hat, x):
    return (x_hat - x).abs().mean((1, 2, 3))


def scenes(n=6):
    coarse = F.interpolate(
        torch.rand(n, 1, 6, 6, generator=gen()), size=(48, 48), mode='bicubic', align_corners=False
    )
    return sr_pairs(list((coarse + 0.1 * torch.randn(n, 1, 48, 48, generator=gen(1))).clamp(0, 1)))


def sr(**how):
    return make_sr(SRConfig(crop=32, batch=4, net_options=NET, **how), scenes())


@pytest.mark.parametrize('norm', [False, True])
def test_a_loss_is_the_sum_of_its_parts(norm):
    w = step_weights(torch.arange(15), 15)
    w = normalised(w) if norm else w
    model, loss = sr(), PerceptualSRLoss(distance, progressive(3, 10), w)
    y, x = (torch.stack(v) for v in zip(*scenes()))
    total = loss(model, (y, x))
    parts = loss.last.per_sample.mean() + 0.052 * (w[loss.last.t] * loss.perceptual).mean()
    assert (
        total.item()
        == pytest.approx(parts.item(), rel=1e-5)
        == pytest.approx(loss.terms['mse'] + loss.terms['perceptual'], rel=1e-5)
    )
    assert len(loss.last.t.unique()) > 2 and (
        norm or loss.terms['perceptual'] < 0.6 * 0.052 * loss.perceptual.mean().item()
    )


def test_the_loss_takes_the_weight_of_each_samples_own_step():
    model = sr()
    y, x = (torch.stack(v) for v in zip(*scenes()))

    def term(w):
        torch.manual_seed(7)
        loss = PerceptualSRLoss(distance, 1.0, w)
        loss(model, (y, x))
        return loss.terms['perceptual'], loss

    (whole, loss), (a, _), (b, _), (c, _) = (
        term(w)
        for w in (
            torch.ones(15),
            *(step_weights(torch.arange(15), 15, v) for v in ((1, 0, 0), (0, 1, 0), (0, 0, 1))),
        )
    )
    assert whole == pytest.approx(a + b + c, rel=1e-5) and a == pytest.approx(
        loss.perceptual[loss.last.t < 5].sum().item() / 6, rel=1e-5
    )


def test_a_killed_superresolution_keeps_its_schedule(tmp_path):
    def learn():
        loss = PerceptualSRLoss(distance, 9.0, step_weights(torch.arange(15), 15))
        return sr_learner(
            sr(steps=6), scenes(), loss=loss, cbs=[ProgressiveLam(loss, 0.1, 2.0)], cpu=True
        ), loss

    whole, loss = learn()
    whole.fit(6)
    part, _ = learn()
    part.cbs.append(Stop(4))
    with pytest.raises(KeyboardInterrupt):
        part.fit(6, folder=tmp_path, save_every=3)
    again, second = learn()
    again.cbs.append(Stop(None))
    again.load(tmp_path).fit(6)
    assert second.lam == loss.lam == 2.0 and second.terms == loss.terms
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.bare.state_dict().values(), again.bare.state_dict().values())
    )


# --- how much a number moves


def relative(values, batch=1):
    return spread(values, batch).relative


def test_spread_of_the_logs_own_values():
    assert relative([0.07, 0.22, 0.47], 8) == pytest.approx(0.2303, abs=1e-4)
    assert relative([0.07, 0.022, 0.00047], 8) == pytest.approx(0.3334, abs=1e-4)
    v = torch.rand(50, generator=gen())
    assert relative(v) == pytest.approx(
        v.double().numpy().std() / v.double().numpy().mean()
    ) and relative(-v) == relative(v) == pytest.approx(relative(10 * v))
    assert relative(v, 16) == pytest.approx(relative(v) / 4) and relative(np.ones(3)) == 0


def test_a_spread_is_both():
    assert spread([1.0, 3.0]) == (2, 1, 0.5) and spread([-1.0, -3.0], 4) == (-2, 0.5, 0.25)


def test_spread_is_that_of_simulated_batches():
    v = torch.tensor([0.07, 0.22, 0.47])
    drawn = v[torch.randint(0, 3, (100_000, 8), generator=gen())].mean(1)
    assert (drawn.std() / drawn.mean()).item() == pytest.approx(relative(v, 8), rel=0.01)


@pytest.mark.parametrize(
    'values, batch',
    [
        ([1.0], 1),
        ([], 1),
        ([1.0, -1.0], 1),
        ([1.0, math.nan], 1),
        (torch.ones(2, 2), 1),
        ([1.0, 2.0], 0),
        ([1.0, 2.0], 1.5),
    ],
)
def test_bad_spread(values, batch):
    with pytest.raises(ValueError, match='expected'):
        spread(values, batch)


def some_gradients(n=6):
    net, x = (
        nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)),
        torch.randn(n, 3, generator=gen(2)),
    )
    params = list(net.parameters())
    direct = torch.stack(
        [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(net(x[k : k + 1]).square().sum(), params)]
            )
            for k in range(n)
        ]
    ).double()
    return net, x, params, direct


@pytest.mark.parametrize('chunk', [1, 7, 2**16])
def test_gram_is_that_of_the_gradients(chunk):
    net, x, params, direct = some_gradients()
    gram = gradient_gram((net(x[k : k + 1]).square().sum() for k in range(6)), params, chunk)
    assert gram.dtype == torch.float64 and torch.allclose(
        gram, direct @ direct.T, rtol=1e-5, atol=1e-10
    )
    one = gradient_gram((net(x[k : k + 1]).square().sum() for k in range(6)), params[0])
    assert torch.allclose(one, direct[:, :15] @ direct[:, :15].T, rtol=1e-5, atol=1e-10)


def test_a_parameter_that_a_loss_does_not_reach_counts_zero():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    assert torch.equal(
        gradient_gram([a.sum(), 3 * b.sum()], [a, b]),
        torch.tensor([[2.0, 0.0], [0.0, 18.0]]).double(),
    )
    with pytest.raises(ValueError, match='losses holds 1'):
        gradient_gram([a.sum()], a)


def test_noise_of_batches_is_the_direct_one():
    *_, G = some_gradients(40)
    draws = torch.rand(9, 40, generator=gen(3)).double()
    B = draws @ G
    trace = B.var(0).sum()
    want = (trace / (B.mean(0).square().sum() - trace / 9)).sqrt().item()
    assert (
        gradient_noise(G @ G.T, draws) == pytest.approx(want, rel=1e-6) == gradient_noise(B @ B.T)
    )
    assert gradient_noise(G @ G.T, 5 * draws) == pytest.approx(want, rel=1e-6)


def test_noise_is_known_where_it_is_planted():
    """Signal of length 3, noise of length 1.5:
    the same estimate from few batches as from many, on average."""
    signal, p = torch.zeros(200).double(), 200
    signal[0] = 3
    found = {
        n: np.mean(
            [
                gradient_noise(g @ g.T) ** 2
                for k in range(60)
                for g in [
                    signal + 1.5 / math.sqrt(p) * torch.randn(n, p, generator=gen(k)).double()
                ]
            ]
        )
        for n in (4, 40)
    }
    assert found[4] == pytest.approx(0.25, rel=0.05) and found[40] == pytest.approx(0.25, rel=0.05)
    assert gradient_noise(torch.ones(3, 3)) == 0


def test_no_common_direction_is_infinite_noise():
    assert gradient_noise(torch.eye(4)) == math.inf


@pytest.mark.parametrize(
    'gram, draws',
    [
        (torch.ones(3), None),
        (torch.ones(3, 2), None),
        (torch.ones(1, 1), None),
        (torch.eye(3), torch.ones(2, 2)),
        (torch.eye(3), torch.ones(1, 3)),
        (torch.eye(3), torch.ones(3)),
    ],
)
def test_bad_gram(gram, draws):
    with pytest.raises(ValueError, match='(gram|draws) has shape'):
        gradient_noise(gram, draws)


# --- relatives


@pytest.mark.parametrize('gamma', [0.5, 5.0, 100.0])
def test_min_snr_is_its_formula(gamma):
    p = ResidualShift(steps=15, kappa=2.0, latent_std=0.7)
    eta = (p.sqrt_etas**2).numpy()
    want = np.minimum((1 - eta) ** 2 * 0.49 / (4 * eta), gamma)
    assert np.allclose(snr_weights(p, gamma).numpy(), want) and snr_weights(p, gamma).shape == (15,)
    assert np.allclose(
        snr_weights(p, gamma, 1.0).numpy(), np.minimum((1 - eta) ** 2 / (4 * eta), gamma)
    )


def test_min_snr_is_a_ratio_of_measured_powers():
    p = ResidualShift(kappa=[1.0, 2.0], latent_std=[0.5, 0.1], min_noise=0.04)
    x, y, t = (
        torch.randn(4000, 2, 2, 2, generator=gen()) * torch.tensor([0.5, 0.1])[:, None, None],
        torch.zeros(4000, 2, 2, 2),
        torch.full((4000,), 6),
    )
    noise = torch.randn(x.shape, generator=gen(1))
    moved = p.shift(x, y, t, torch.zeros_like(x))
    ratio = moved.square().mean() / (p.shift(x, y, t, noise) - moved).square().mean()
    assert snr_weights(p, 1e9)[6].item() == pytest.approx(ratio.item(), rel=0.05)
    louder = ResidualShift(kappa=[10.0, 20.0], latent_std=[5.0, 1.0], min_noise=0.4)
    assert torch.allclose(
        snr_weights(louder, 1e9)[-10:], snr_weights(p, 1e9)[-10:], rtol=0.2
    )  # latent and noise louder alike (the schedule's start is another)


def test_min_snr_falls_and_is_clamped():
    w = snr_weights(ResidualShift())
    assert (
        (w.diff() <= 0).all()
        and w.max() == 5
        and (snr_weights(ResidualShift(), 2) == 2).sum() > (w == 5).sum()
    )


@pytest.mark.parametrize(
    'how',
    [
        dict(gamma=0),
        dict(gamma=-1.0),
        dict(gamma=math.inf),
        dict(gamma='5'),
        dict(signal=0.0),
        dict(signal=[1.0, -1.0]),
        dict(signal=math.nan),
        dict(signal=[]),
    ],
)
def test_bad_snr(how):
    with pytest.raises((TypeError, ValueError), match='expected a'):
        snr_weights(ResidualShift(), **how)


def test_inverse_variance():
    g, sd = gen(), torch.tensor([1.0, 2.0, 4.0])
    t = torch.arange(15).repeat(4000)
    v = 5 + sd[step_range(t, 15)] * torch.randn(len(t), generator=g)
    w = inverse_variance(v, t, 15, 3)
    assert w.shape == (15,) and w.mean().item() == pytest.approx(1)
    assert (
        (w[0] / w[5]).item() == pytest.approx(4, rel=0.05)
        and (w[0] / w[14]).item() == pytest.approx(16, rel=0.05)
        and w[:5].unique().numel() == 1
    )
    each = inverse_variance(v, t, 15)
    want = torch.stack([1 / v[t == k].double().var() for k in range(15)])
    assert torch.allclose(each, want / want.mean())


def test_bad_inverse_variance():
    t = torch.arange(15)
    with pytest.raises(ValueError, match='range 0 holds 1 values'):
        inverse_variance(torch.rand(15), t, 15)
    with pytest.raises(ValueError, match='range 2 holds 5 values that do not vary'):
        inverse_variance(torch.cat([torch.rand(10), torch.ones(5)]), t, 15, 3)
    with pytest.raises(ValueError, match='values has shape'):
        inverse_variance(torch.rand(14), t, 15, 3)


def test_learned_uncertainty_ends_at_the_closed_form():
    v, k = (
        torch.rand(300, generator=gen()) * torch.tensor([0.1, 1.0, 7.0]).repeat(100),
        torch.arange(3).repeat(100),
    )
    u = LearnedUncertainty(3)
    assert torch.equal(u(v, k), v) and torch.equal(
        u.weights, torch.ones(3)
    )  # starts as the plain loss
    opt = torch.optim.LBFGS(
        u.parameters(),
        lr=1.0,
        max_iter=200,
        line_search_fn='strong_wolfe',
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
    )

    def closure():
        opt.zero_grad()
        loss = u(v, k).mean()
        loss.backward()
        return loss

    opt.step(closure)
    means = torch.stack([v[k == i].mean() for i in range(3)])
    assert torch.allclose(u.weights, 1 / means, rtol=1e-3)
    assert torch.allclose(
        torch.stack([(u.weights[k] * v)[k == i].mean() for i in range(3)]), torch.ones(3), rtol=1e-3
    )
    assert (
        u(v, k).mean().item() == pytest.approx((1 + means.log()).mean().item(), rel=1e-4)
        and not u.weights.requires_grad
    )


def test_learned_uncertainty_lets_the_losses_gradient_through():
    v, u = torch.tensor([1.0, 2.0], requires_grad=True), LearnedUncertainty(2)
    with torch.no_grad():
        u.s.copy_(torch.tensor([0.0, math.log(4.0)]))
    u(v, torch.tensor([0, 1])).sum().backward()
    assert v.grad.tolist() == pytest.approx([1, 0.25]) and u.s.grad.tolist() == pytest.approx(
        [1 - 1, 1 - 0.5]
    )
    with pytest.raises(ValueError, match='expected equal shapes'):
        u(v, torch.tensor([0]))


def test_numbers_of_numpy():
    t, i, f = torch.arange(15), np.int64, np.float32
    assert torch.equal(
        step_weights(t, i(15), np.array([1, 0.1, 0.001])), step_weights(t, 15)
    ) and torch.equal(step_range(t, i(15), i(4)), step_range(t, 15, 4))
    assert (
        spread(np.array([1.0, 2.0]), i(4)) == spread([1.0, 2.0], 4)
        and progressive(i(5), i(10), f(0.5), f(1)) == 0.75
    )
    assert (
        torch.equal(snr_weights(ResidualShift(), f(5)), snr_weights(ResidualShift()))
        and len(LearnedUncertainty(i(3)).s) == 3
    )
    v, s = torch.rand(30, generator=gen()), torch.arange(15).repeat(2)
    assert torch.equal(inverse_variance(v, s, i(15), i(3)), inverse_variance(v, s, 15, 3))


@pytest.mark.parametrize(
    'call, says',
    [
        (lambda: progressive(1, 2, math.nan), 'start is nan'),
        (lambda: progressive(1, 2, 0.1, -1.0), 'end is -1'),
        (lambda: progressive(1, math.inf), 'total is inf'),
        (lambda: progressive(True, 2), 'iteration is True'),
        (lambda: ProgressiveLam(PerceptualSRLoss(distance), math.nan), 'start is nan'),
        (lambda: ProgressiveLam(PerceptualSRLoss(distance), end=-0.1), 'end is -0.1'),
        (lambda: ProgressiveLam(PerceptualSRLoss(distance), total=0), 'total is 0'),
        (lambda: ProgressiveLam(PerceptualSRLoss(distance), total=-3), 'total is -3'),
        (lambda: LearnedUncertainty(-1), 'n is -1'),
        (lambda: LearnedUncertainty(0), 'n is 0'),
        (
            lambda: LearnedUncertainty(2)(torch.ones(2), torch.tensor([-1, 0])),
            'k holds -1 to 0; expected 0 to 1',
        ),
        (lambda: step_range(torch.tensor([0]), 15, -1), 'n is -1'),
        (lambda: step_range(torch.tensor([0]), 15, math.nan), 'n is nan'),
        (lambda: step_range(torch.tensor([0]), math.nan), 'T is nan'),
        (
            lambda: inverse_variance(torch.rand(15) * math.nan, torch.arange(15), 15, 3),
            'values holds 15 values that are NaN',
        ),
        (lambda: inverse_variance(torch.rand(15), torch.arange(15), 15, -3), 'n is -3'),
        (lambda: gradient_noise(torch.eye(3) * math.nan), 'gram holds'),
        (lambda: gradient_noise(torch.eye(2), torch.full((3, 2), math.inf)), 'draws holds'),
        (
            lambda: gradient_gram([torch.ones(2, requires_grad=True)] * 2, torch.ones(1)),
            r'losses holds \(2,\)',
        ),
        (lambda: gradient_gram([1.0, 2.0], torch.ones(1)), 'losses holds float'),
        (lambda: gradient_gram([], []), 'params is empty'),
        (lambda: gradient_gram([], torch.ones(1), chunk=0), 'chunk is 0'),
        (lambda: spread([1.0, 2.0], math.nan), 'batch is nan'),
        (lambda: snr_weights(ResidualShift(), math.nan), 'gamma is nan'),
        (
            lambda: snr_weights(ResidualShift(kappa=[1.0, 2.0]), signal=[1.0, 2.0, 3.0]),
            'signal has 3 channels, kappa has 2',
        ),
    ],
)
def test_what_does_not_fit_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_a_total_of_its_own_is_part_of_the_state():
    loss = PerceptualSRLoss(distance)
    assert ProgressiveLam(loss).state() == {'start': 0.01, 'end': 0.15} and ProgressiveLam(
        loss, total=np.int64(5)
    ).state() == {'start': 0.01, 'end': 0.15, 'total': 5.0}
