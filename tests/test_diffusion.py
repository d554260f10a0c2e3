import json
import math

from common import gen
import numpy as np
import pytest
import torch
from torch import nn

from restore_lib.diffusion import PREDICTS, WEIGHTS, ResidualShift, shift_schedule

torch.set_num_threads(1)
DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
GOLDEN = [
    0.0200,
    0.1172,
    0.1763,
    0.2336,
    0.2916,
    0.3510,
    0.4124,
    0.4759,
    0.5417,
    0.6099,
    0.6807,
    0.7540,
    0.8300,
    0.9086,
    0.9900,
]


def latents(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return tuple(
        scale * torch.randn(*shape, generator=gen(seed + k), dtype=dtype) for k in range(2)
    )


def constant(t, b):
    return torch.full((b,), t)


def network(z, t, cond):
    return 0.3 * z + 0.6 * cond.sin() + 0.01 * t.to(z.dtype)[:, None, None, None]


# schedule -----------------------------------------------------------------------------------------


def test_golden():
    got = ResidualShift().sqrt_etas
    assert (
        got.dtype == torch.float64
        and got.shape == (15,)
        and [round(v, 4) for v in got.tolist()] == GOLDEN
    )
    assert [round(v, 4) for v in ResidualShift(4, min_noise=0.2).sqrt_etas.tolist()] == [
        0.1,
        0.5201,
        0.7614,
        0.99,
    ]


@pytest.mark.parametrize('steps', [2, 4, 15, 100])
@pytest.mark.parametrize('kappa', [0.1, 0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize('power, end', [(0.3, 0.99), (1.0, 0.999), (2.5, 0.6)])
def test_schedule_is_the_published_formula(steps, kappa, power, end):
    start = min(0.04 / kappa, 0.04)  # ResShift's 'exponential', as its paper and code have it
    base = math.exp(1 / (steps - 1) * math.log(end / start))
    beta = np.linspace(0, 1, steps) ** power * (steps - 1)
    want = np.power(base, beta) * start
    assert np.allclose(shift_schedule(steps, kappa, 0.04, power, end).numpy(), want, rtol=1e-12)
    assert np.allclose(
        ResidualShift(steps, kappa, 0.04, power, end).sqrt_etas.numpy(), want, rtol=1e-12
    )


def test_schedule_rises_and_ends():
    s = shift_schedule(30, 3.0, power=0.7)
    assert (s.diff() > 0).all() and math.isclose(s[-1], 0.99) and math.isclose(3 * s[0], 0.04)
    assert shift_schedule(1).tolist() == [0.99]


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(steps=0), 'steps is 0'),
        (dict(steps=-3), 'steps is -3'),
        (dict(steps=2.5), 'steps is 2.5'),
        (dict(steps=True), 'steps is True'),
        (dict(steps=None), 'steps is None'),
        (dict(kappa=0), 'kappa is 0'),
        (dict(kappa=-1.0), 'kappa is -1'),
        (dict(kappa=math.nan), 'kappa is nan'),
        (dict(kappa=math.inf), 'kappa is inf'),
        (dict(kappa='2'), "kappa is '2'"),
        (dict(kappa=torch.tensor([1.0, 0.0])), 'kappa is tensor'),
        (dict(kappa=torch.tensor([1.0, math.nan])), 'kappa is'),
        (dict(kappa=torch.ones(2, 2)), 'one for each channel'),
        (dict(kappa=[]), 'kappa is'),
        (dict(min_noise=0), 'min_noise is 0'),
        (dict(min_noise=math.nan), 'min_noise is nan'),
        (dict(min_noise=3.0), 'min_noise is 3'),
        (dict(power=0), 'power is 0'),
        (dict(power=math.inf), 'power is inf'),
        (dict(etas_end=1.0), 'etas_end is 1.0.*below 1'),
        (dict(etas_end=0.0), 'etas_end is 0'),
        (dict(etas_end=0.01), 'start below etas_end'),
        (dict(kappa=np.array([1.0, -2.0])), 'kappa is -2'),
        (dict(kappa=np.ones((2, 2))), 'kappa is'),
        (dict(kappa=np.array(['a'])), "kappa is 'a'"),
        (dict(kappa=None), 'kappa is None'),
        (dict(latent_std=0), 'latent_std is 0'),
        (dict(latent_std=[1.0, -1.0]), 'latent_std is -1'),
        (dict(predicts='x'), "predicts is 'x'; expected one of x0"),
        (
            dict(kappa=[1.0, 2.0], latent_std=[1.0, 1.0, 1.0]),
            'kappa has 2 channels, latent_std has 3',
        ),
    ],
)
def test_bad_knobs(kw, says):
    with pytest.raises((TypeError, ValueError), match=says):
        ResidualShift(**kw)


# forward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kappa', [0.5, 2.0])
def test_closed_form_is_the_sum_of_single_steps(kappa):
    p, n, x, y, g = ResidualShift(kappa=kappa), 100_000, 3.0, -1.0, gen()
    z, eta = torch.full((n,), x, dtype=torch.float64), 0.0
    flat = lambda v: torch.full((n, 1, 1, 1), v, dtype=torch.float64)
    for t, e in enumerate((p.sqrt_etas**2).tolist()):
        z, eta = (
            z
            + (e - eta) * (y - x)
            + kappa * math.sqrt(e - eta) * torch.randn(n, generator=g, dtype=torch.float64),
            e,
        )
        if t not in (0, 7, 14):
            continue
        once, sigma = (
            p.shift(flat(x), flat(y), constant(t, n), generator=gen(t + 1)).flatten(),
            kappa * math.sqrt(e),
        )
        for way in (z, once):  # 5 standard errors of mean, deviation and 4th moment
            assert abs(way.mean() - (x + e * (y - x))) < 5 * sigma / n**0.5
            assert abs(way.std() - sigma) < 5 * sigma / (2 * n) ** 0.5
            assert (
                abs(((way - way.mean()) / way.std()).pow(4).mean() - 3) < 5 * (96 / n) ** 0.5 + 0.03
            )


def test_shift_by_hand_and_t_by_sample():
    p, (x, y) = ResidualShift(), latents(4, 3, 5, 6, scale=50)
    t, noise = (
        torch.tensor([0, 14, 3, 3]),
        torch.randn(4, 3, 5, 6, generator=gen(9), dtype=torch.float64),
    )
    r = p.sqrt_etas[t][:, None, None, None]
    assert torch.allclose(p.shift(x, y, t, noise), x + r**2 * (y - x) + 2 * r * noise, rtol=1e-12)
    assert not torch.equal(p.shift(x, y, t, generator=gen()), p.shift(x, y, t, generator=gen(1)))
    assert torch.equal(p.shift(x, y, t, generator=gen()), p.shift(x, y, t, generator=gen()))


def test_levels_and_prior():
    p, (_, y) = ResidualShift(kappa=[2.0, 0.1]), latents(3, 2, 4, 4)
    eta, sigma = p.levels(torch.tensor([0, 7, 14]), y)
    assert (
        eta.shape == (3, 1, 1, 1)
        and sigma.shape == (3, 2, 1, 1)
        and torch.allclose(sigma[:, 0], 20 * sigma[:, 1])
    )
    assert torch.allclose(sigma[:, 0] ** 2, 4 * eta[:, 0])
    noise = torch.ones_like(y)
    assert torch.allclose(
        p.prior(y, noise) - y,
        torch.tensor([1.98, 0.099], dtype=torch.float64)[None, :, None, None].expand_as(y),
    )
    assert torch.equal(p.prior(y, generator=gen(3)), p.prior(y, generator=gen(3)))


@pytest.mark.parametrize('std', [4.0, 0.024, [1.4, 0.05]])
def test_input_has_variance_1_whatever_the_latent(std):
    s = torch.as_tensor(std).reshape(1, -1, 1, 1)
    x = s * torch.randn(8, 2, 64, 64, generator=gen())
    for t in (0, 1, 7, 14):
        seen = lambda **kw: (
            ResidualShift(**kw)
            .scale_input(
                ResidualShift().shift(x, x, constant(t, 8), generator=gen(1)), constant(t, 8)
            )
            .var(dim=(0, 2, 3))
        )
        assert (seen(latent_std=std) - 1).abs().max() < 0.04
        sigma2 = 4 * ResidualShift().sqrt_etas[t].item() ** 2
        assert torch.allclose(
            seen().float(), ((s.flatten() ** 2 + sigma2) / (1 + sigma2)).expand(2), rtol=0.04
        )  # ResShift's scaling, by formula


def test_scaling_of_the_public_code():
    p, (z, _) = ResidualShift(), latents(2, 3, 4, 4)
    want = z / torch.sqrt(p.sqrt_etas[[3, 14]] ** 2 * 4 + 1)[:, None, None, None]
    assert torch.allclose(p.scale_input(z, torch.tensor([3, 14])), want, rtol=1e-12)


# posterior ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('kappa', [2.0, [0.05, 3.0]])
def test_posterior_is_bayes_rule(kappa):
    "The product of q(z_s | x, y) and q(z_t | z_s) as densities: precisions add; y must drop out."
    p, (x, y) = ResidualShift(kappa=kappa), latents(6, 2, 3, 3, scale=5)
    k = torch.tensor(kappa, dtype=torch.float64).reshape(1, -1, 1, 1)
    z, t, s = (
        3 * torch.randn(6, 2, 3, 3, generator=gen(7), dtype=torch.float64),
        torch.tensor([14, 14, 9, 1, 5, 2]),
        torch.tensor([13, 2, 8, 0, 1, 0]),
    )
    es, et = (p.sqrt_etas[i][:, None, None, None] ** 2 for i in (s, t))
    a, b = 1 / (k**2 * es), 1 / (k**2 * (et - es))
    mean, var = p.posterior(z, x, t, s)
    assert torch.allclose(
        mean, (a * (x + es * (y - x)) + b * (z - (et - es) * (y - x))) / (a + b), rtol=0, atol=1e-10
    )
    assert torch.allclose(var, 1 / (a + b), rtol=1e-10, atol=0)


def test_posterior_on_a_grid():
    "The same without any formula for Gaussians: densities on a fine grid, normalised."
    p, x, y, z = ResidualShift(), 0.7, -0.4, 0.9
    es, et = (p.sqrt_etas[[4, 6]] ** 2).tolist()
    grid = torch.linspace(-15, 15, 200_001, dtype=torch.float64)
    log = -((grid - x - es * (y - x)) ** 2) / (8 * es) - (z - grid - (et - es) * (y - x)) ** 2 / (
        8 * (et - es)
    )
    w = log.softmax(0)
    mean, var = p.posterior(
        torch.full((1, 1, 1, 1), z, dtype=torch.float64),
        torch.full((1, 1, 1, 1), x, dtype=torch.float64),
        torch.tensor([6]),
        torch.tensor([4]),
    )
    m = (w * grid).sum()
    assert abs(mean - m) < 1e-9 and abs(var - (w * (grid - m) ** 2).sum()) < 1e-9


def test_posterior_defaults_and_end():
    p, (z, x) = ResidualShift(), latents(3, 1, 2, 2)
    t = torch.tensor([1, 7, 14])
    assert all(torch.equal(a, b) for a, b in zip(p.posterior(z, x, t), p.posterior(z, x, t, t - 1)))
    for now in (constant(0, 3), t):
        mean, var = p.posterior(z, x, now, constant(-1, 3))
        assert torch.equal(mean, x) and not var.any()


# parametrisations ---------------------------------------------------------------------------------


@pytest.mark.parametrize('kappa', [2.0, [0.3, 1.0, 4.0]])
@pytest.mark.parametrize('source', PREDICTS)
@pytest.mark.parametrize('to', PREDICTS)
def test_conversions_are_exact(source, to, kappa):
    p, (x, y) = ResidualShift(kappa=kappa), latents(15, 3, 4, 4)
    t, noise = torch.arange(15), torch.randn(15, 3, 4, 4, generator=gen(5), dtype=torch.float64)
    z = p.shift(x, y, t, noise)
    truth = dict(x0=x, residual=y - x, noise=noise)
    assert torch.allclose(p.convert(truth[source], z, y, t, source, to), truth[to], atol=1e-10)
    wrong = truth[source] + 0.1
    assert torch.allclose(
        p.convert(p.convert(wrong, z, y, t, source, to), z, y, t, to, source), wrong, atol=1e-10
    )


@pytest.mark.parametrize('predicts', PREDICTS)
@pytest.mark.parametrize('weight', WEIGHTS)
def test_loss_is_one_function_of_the_implied_x(predicts, weight):
    """Whatever the network says, the loss is that of its clean picture;
    and 'noise' is the squared error of the noise."""
    p, (x, y) = ResidualShift(predicts=predicts, kappa=[2.0, 0.5]), latents(15, 2, 4, 4)
    t, noise = torch.arange(15), torch.randn(15, 2, 4, 4, generator=gen(5), dtype=torch.float64)
    z, guess = (
        p.shift(x, y, t, noise),
        x + 0.01 * torch.randn(15, 2, 4, 4, generator=gen(6), dtype=torch.float64),
    )
    got = p.loss(
        lambda *a: p.convert(guess, z, y, t, 'x0', predicts), x, y, t, weight=weight, noise=noise
    )
    eta, sigma = p.levels(t, x)
    w = {
        'uniform': torch.ones_like(sigma),
        'sigma': (1 / sigma) / (1 / sigma).mean(),
        'noise': (1 - eta) ** 2 / sigma**2,
    }[weight]
    want = (w * (guess - x) ** 2).mean((1, 2, 3))
    assert (
        torch.allclose(got.per_sample, want, rtol=1e-6)
        and torch.allclose(got.mean, want.mean(), rtol=1e-6)
        and torch.equal(got.t, t)
    )
    if weight == 'noise':
        assert torch.allclose(
            want,
            (p.convert(guess, z, y, t, 'x0', 'noise') - noise).square().mean((1, 2, 3)),
            rtol=1e-6,
        )


def test_noise_loss_of_a_noise_network_is_plain_mse():
    p, (x, y) = ResidualShift(predicts='noise'), latents(15, 2, 4, 4)
    noise = torch.randn(15, 2, 4, 4, generator=gen(5), dtype=torch.float64)
    assert torch.allclose(
        p.loss(
            lambda z, t, c: 0 * z, x, y, torch.arange(15), weight='noise', noise=noise
        ).per_sample,
        noise.square().mean((1, 2, 3)),
        rtol=1e-9,
    )


def test_own_weights():
    p, (x, y) = ResidualShift(3), latents(3, 2, 4, 4)
    w = torch.tensor([0.0, 1.0, 5.0])
    one, own = (
        p.loss(network, x, y, torch.arange(3), weight=v, generator=gen()).per_sample
        for v in ('uniform', w)
    )
    assert torch.allclose(own, w.double() * one)
    for bad in (w[:2], -w, w / 0, torch.ones(3, 2, 2)):
        with pytest.raises(ValueError, match='weight has shape'):
            p.loss(network, x, y, weight=bad)
    with pytest.raises(ValueError, match="weight is 'max'"):
        p.loss_weights('max')
    for bad in (
        torch.ones(3, 3),
        torch.ones(3, 2),
        torch.ones(1, 3),
        np.ones((3, 4)),
        torch.tensor(1.0),
    ):  # would go to channels
        with pytest.raises(
            ValueError, match=r'weight has shape .*; expected \(3,\), a weight for each step$'
        ):
            p.loss(network, x, y, weight=bad)
    assert p.loss_weights('uniform').shape == (3, 1) and ResidualShift(
        kappa=[1.0, 2.0]
    ).loss_weights('noise').shape == (15, 2)


# training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('predicts', PREDICTS)
def test_training_pair(predicts):
    p, (x, y) = ResidualShift(predicts=predicts, latent_std=3.0), latents(6, 2, 4, 4)
    pair, again = (p.training_pair(x, y, generator=gen(1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(pair, again)) and pair.t.dtype == torch.int64
    assert torch.equal(pair.z, p.shift(x, y, pair.t, pair.noise)) and torch.equal(
        pair.scaled, p.scale_input(pair.z, pair.t)
    )
    assert torch.allclose(p.convert(pair.target, pair.z, y, pair.t, predicts, 'x0'), x, atol=1e-9)
    assert torch.equal(p.training_pair(x, y, torch.arange(6)).t, torch.arange(6))


def test_draws_of_t():
    p = ResidualShift()
    plain, even = p.draw_t(60_000, gen()), p.draw_t(60_000, gen(), stratified=True)
    for t in (plain, even):
        assert t.min() == 0 and t.max() == 14
    assert (plain.bincount(minlength=15) / 4000 - 1).abs().max() < 0.08 and (
        even.bincount(minlength=15) - 4000
    ).abs().max() <= 1
    many = torch.stack([p.draw_t(4, gen(k), stratified=True) for k in range(3000)])
    assert (
        many[:, 0].bincount(minlength=15) / 200 - 1
    ).abs().max() < 0.4  # each place uniform by itself
    assert (many.sort(1).values[:, 0] <= 3).all() and (
        many.sort(1).values[:, 3] >= 11
    ).all()  # and spread in each batch
    assert torch.equal(p.draw_t(9, gen(2), stratified=True), p.draw_t(9, gen(2), stratified=True))


def test_loss_has_gradients_and_per_sample_values():
    p, (x, y), net = (
        ResidualShift(),
        latents(8, 3, 8, 8, dtype=torch.float32),
        nn.Conv2d(6, 3, 3, padding=1),
    )
    out = p.loss(lambda z, t, c: net(torch.cat([z, c], 1)), x, y, generator=gen())
    out.mean.backward()
    assert (
        out.per_sample.shape == (8,)
        and torch.isclose(out.per_sample.mean(), out.mean)
        and net.weight.grad.abs().sum() > 0
    )
    cond = torch.zeros_like(y)
    seen = []
    p.loss(lambda z, t, c: seen.append(c) or z, x, y, cond=cond)
    assert seen[0] is cond


def test_buckets():
    p, t = ResidualShift(), torch.tensor([0, 4, 5, 14, 14])
    assert p.buckets(torch.tensor([1.0, 3.0, 10.0, 2.0, 4.0]), t) == {
        't 0-4': 2.0,
        't 5-9': 10.0,
        't 10-14': 3.0,
    }
    assert p.buckets(torch.tensor([1.0, 3.0]), t[:2], 5) == {'t 0-2': 1.0, 't 3-5': 3.0}
    assert list(ResidualShift(4).buckets(torch.ones(4), torch.arange(4), 3)) == [
        't 0-0',
        't 1-2',
        't 3-3',
    ]
    for n in (0, 16, 1.5):
        with pytest.raises(ValueError, match='n is'):
            p.buckets(torch.ones(5), t, n)
    with pytest.raises(ValueError, match='values has shape'):
        p.buckets(torch.ones(4), t)


# sampling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('predicts', PREDICTS)
@pytest.mark.parametrize('randomness', [0, 0.5, 1])
def test_an_oracle_is_recovered_in_every_number_of_steps(predicts, randomness):
    p, (x, y) = (
        ResidualShift(predicts=predicts, kappa=[2.0, 0.3], latent_std=[1.0, 0.1]),
        latents(2, 2, 5, 5, scale=3),
    )

    def oracle(scaled, t, cond):
        eta, sigma = p.levels(t, scaled)
        z = (
            scaled
            * (sigma**2 + torch.tensor([1.0, 0.01], dtype=torch.float64)[:, None, None]).sqrt()
        )
        return p.convert(x, z, y, t, 'x0', predicts)

    for k in range(1, 16):
        assert (
            p.sample(oracle, y, k, randomness=randomness, generator=gen(k)) - x
        ).abs().max() < 1e-10


KAPPAS = torch.tensor([2.0, 0.3], dtype=torch.float64).reshape(1, 2, 1, 1)


def along(process, steps, randomness, b=40_000):
    """With a network that knows x: on the way back, the largest gap of z's mean and deviation from
    the forward ones, in standard errors; and the gap of the result from x."""
    x, y = (torch.full((b, 2, 1, 1), v, dtype=torch.float64) for v in (2.0, -1.0))
    noise = torch.randn(
        len(process.subsequence(steps)), b, 2, 1, 1, generator=gen(11), dtype=torch.float64
    )
    noise[0] += (
        3 * (1 - process.sqrt_etas[-1] ** 2) / (KAPPAS * process.sqrt_etas[-1])
    )  # the start is y, not x + eta_T (y - x): made up for here
    gaps = []
    for state in process.chain(lambda *a: x, y, steps, randomness=randomness, noise=noise):
        eta, sigma = (
            process.sqrt_etas[state.t] ** 2,
            (KAPPAS * process.sqrt_etas[state.t]).flatten(),
        )
        gaps += [
            (state.z.mean((0, 2, 3)) - (2 - 3 * eta)).abs() / sigma * b**0.5,
            (state.z.std((0, 2, 3)) / sigma - 1).abs() * (2 * b) ** 0.5,
        ]
    return torch.stack(gaps).max().item(), (state.x0 - x).abs().max().item()


@pytest.mark.parametrize('randomness', [0, 0.5, 1])
@pytest.mark.parametrize('steps', [15, 8, 4, 2, [14, 3], [14, 9, 0]])
def test_with_the_truth_every_z_has_the_forward_marginal(steps, randomness):
    gap, error = along(ResidualShift(kappa=[2.0, 0.3]), steps, randomness)
    assert gap < 5 and error == 0


@pytest.mark.parametrize('randomness', [0, 0.5, 1])
@pytest.mark.parametrize('steps', [15, 4, 2])
@pytest.mark.parametrize('fault', ['nonsense', '2 % too large', 'drawn to y', 'eta of t, not s'])
def test_that_check_sees_a_wrong_way_back(fault, steps, randomness):
    "The result alone does not: it is what the network said last."

    class Wrong(ResidualShift):
        def _back(self, z, x0, y, t, s, *rest):
            if fault == 'nonsense':
                return 3 + 7 * torch.randn(z.shape, generator=gen(7), dtype=z.dtype)
            if fault == '2 % too large':
                return 1.02 * super()._back(z, x0, y, t, s, *rest)
            if fault == 'drawn to y':
                return super()._back(z, x0, y, t, s, *rest) + 0.05 * (y - x0)
            return super()._back(z, x0, y, t, (s + 1).clamp(max=t), *rest)

    gap, error = along(Wrong(kappa=[2.0, 0.3]), steps, randomness)
    assert gap > 10 and error == 0


def test_randomness_1_is_the_posterior_and_0_is_ddim():
    p, (_, y) = ResidualShift(), latents(3, 2, 4, 4)
    noise = torch.randn(15, 3, 2, 4, 4, generator=gen(4), dtype=torch.float64)
    for rho in (0, 1):
        states = list(p.chain(network, y, noise=noise, randomness=rho))
        for k, (a, b) in enumerate(zip(states, states[1:])):
            t, s = constant(a.t, 3), constant(b.t, 3)
            if rho:
                mean, var = p.posterior(a.z, a.x0, t, s)
                want = mean + var.sqrt() * noise[k + 1]
            else:
                want = p.shift(a.x0, y, s, p.convert(a.x0, a.z, y, t, 'x0', 'noise'))
            assert torch.allclose(b.z, want, atol=1e-12)


@pytest.mark.parametrize('rho', [0, 0.3, 0.8, 1])
def test_randomness_by_formula(rho):
    p, (_, y) = ResidualShift(kappa=[2.0, 0.5]), latents(3, 2, 4, 4)
    noise = torch.randn(4, 3, 2, 4, 4, generator=gen(4), dtype=torch.float64)
    states = list(p.chain(network, y, 4, noise=noise, randomness=rho))
    for k, (a, b) in enumerate(zip(states, states[1:])):
        (et, st), (es, ss) = p.levels(constant(a.t, 3), y), p.levels(constant(b.t, 3), y)
        v, eps = ss**2 * (1 - es / et), (a.z - a.x0 - et * (y - a.x0)) / st
        assert torch.allclose(
            b.z,
            a.x0
            + es * (y - a.x0)
            + (ss**2 - rho**2 * v).sqrt() * eps
            + rho * v.sqrt() * noise[k + 1],
            atol=1e-12,
        )


def test_one_step_is_the_direct_estimate():
    p, (_, y) = ResidualShift(), latents(3, 2, 4, 4)
    noise = torch.randn(1, 3, 2, 4, 4, generator=gen(4), dtype=torch.float64)
    t = constant(14, 3)
    direct = network(p.scale_input(p.prior(y, noise[0]), t), t, y)
    for rho in (0, 1):
        assert torch.equal(p.sample(network, y, 1, noise=noise, randomness=rho), direct)
    r = ResidualShift(predicts='residual')
    assert torch.allclose(r.sample(network, y, 1, noise=noise), y - direct)
    assert ResidualShift(1).sample(network, y).shape == y.shape


def test_subsequences_are_of_the_full_schedule():
    p = ResidualShift()
    for k in range(1, 16):
        ts = p.subsequence(k)
        assert len(ts) == k and ts[0] == 14 and all(a > b >= 0 for a, b in zip(ts, ts[1:]))
        assert [s.t for s in p.chain(network, torch.zeros(1, 1, 2, 2), k)] == ts
        assert max(np.diff([-1, *ts[::-1]])) - min(np.diff([-1, *ts[::-1]])) <= 1  # even
    assert (
        p.subsequence() == p.subsequence(15) == list(range(14, -1, -1))
        and p.subsequence([14, 3]) == [14, 3]
        and p.subsequence((14,)) == [14]
    )
    for bad, says in (
        (0, 'steps is 0'),
        (16, 'expected 1 to 15'),
        (20, 'knows no other'),
        (-1, 'steps is -1'),
        (2.5, 'steps is 2.5'),
        ('4', "steps is '4'"),
        (True, 'steps is True'),
        ([], r'steps is \[\]'),
        ([13, 2], 'falling t from 14'),
        ([14, 5, 5], 'falling'),
        ([14, 2, 3], 'falling'),
        ([14, -1], 'steps is -1'),
        ([14, 2.5], 'steps is 2.5'),
        (torch.tensor([14.0, 3.0]), 'steps is 14.0'),
        (torch.tensor([13, 2]), 'falling t from 14'),
        (np.array([3, 14]), 'falling'),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            p.subsequence(bad)
        with pytest.raises((TypeError, ValueError), match=says):
            p.sample(network, torch.zeros(1, 1, 2, 2), bad)


def test_an_exact_network_samples_the_distribution():
    """Two points with 60 and 40 of 100: fifteen steps end at them, in these shares,
    with twice the squared error of one step."""
    p, y = ResidualShift(), torch.zeros(8000, 1, 1, 1)

    def model(scaled, t, y):
        eta, sigma = p.levels(t, scaled)
        return (
            2
            * (2 * (1 - eta) * scaled * (sigma**2 + 1).sqrt() / sigma**2 + math.log(1.5)).sigmoid()
            - 1
        )

    truth = torch.where(torch.rand(y.shape, generator=gen(3)) < 0.6, 1.0, -1.0)
    one, many, det = (
        p.sample(model, y, k, generator=gen(4), randomness=r) for k, r in ((1, 1), (15, 1), (15, 0))
    )
    assert abs(one.mean() - 0.2) < 0.005 and one.std() < 0.02
    for x in (many, det):
        assert ((x.abs() - 1).abs() < 0.1).float().mean() > 0.99 and abs(
            (x > 0).float().mean() - 0.6
        ) < 0.025
    assert 1.9 < (many - truth).square().mean() / (one - truth).square().mean() < 2.1


def orthogonal(n, seed=0):
    return torch.linalg.qr(torch.randn(n, n, generator=gen(seed), dtype=torch.float64))[0]


def haar(x):
    "One orthonormal level by slices, (b, c, h, w) to (b, 4c, h/2, w/2)."
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return torch.cat([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], 1) / 2


def unhaar(u):
    ll, lh, hl, hh = u.chunk(4, 1)
    x = u.new_zeros(*ll.shape[:2], 2 * ll.shape[2], 2 * ll.shape[3])
    x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2] = (
        (ll + lh + hl + hh) / 2,
        (ll + lh - hl - hh) / 2,
        (ll - lh + hl - hh) / 2,
        (ll - lh - hl + hh) / 2,
    )
    return x


Q = orthogonal(3 * 6 * 8)
BASES = {
    'random': (
        lambda x: (x.flatten(1) @ Q.T).reshape(x.shape),
        lambda u: (u.flatten(1) @ Q).reshape(u.shape),
    ),
    'haar': (haar, unhaar),
}


@pytest.mark.parametrize('basis', BASES)
@pytest.mark.parametrize('predicts', PREDICTS)
@pytest.mark.parametrize('randomness', [0, 1])
def test_an_orthonormal_change_of_basis_leaves_the_process_unchanged(basis, predicts, randomness):
    there, back = BASES[basis]
    p, (x, y) = ResidualShift(predicts=predicts), latents(2, 3, 6, 8)
    assert torch.allclose(back(there(x)), x, atol=1e-12) and torch.allclose(
        there(x).norm(), x.norm()
    )
    noise = torch.randn(5, 2, 3, 6, 8, generator=gen(4), dtype=torch.float64)
    turned = torch.stack([there(n) for n in noise])
    rotated_network = lambda z, t, c: there(network(back(z), t, back(c)))
    t = torch.tensor([2, 14])
    assert torch.allclose(
        back(p.shift(there(x), there(y), t, turned[0])), p.shift(x, y, t, noise[0]), atol=1e-11
    )
    got = p.sample(rotated_network, there(y), 5, noise=turned, randomness=randomness)
    want = p.sample(network, y, 5, noise=noise, randomness=randomness)
    assert torch.allclose(back(got), want, atol=1e-9 * max(1.0, want.abs().max().item()))
    losses = [
        p.loss(m, *pair, t, noise=n).mean
        for m, pair, n in (
            (network, (x, y), noise[0]),
            (rotated_network, (there(x), there(y)), turned[0]),
        )
    ]
    assert torch.allclose(*losses)


def test_kappa_by_channel_is_each_channel_by_itself():
    kappa, (_, y) = [2.0, 1.0], latents(2, 2, 4, 4)
    both, one = ResidualShift(kappa=kappa), ResidualShift(kappa=2.0)
    noise = torch.randn(15, 2, 2, 4, 4, generator=gen(1), dtype=torch.float64)
    plain = lambda z, t, c: 0.5 * c
    scaled = (
        y / torch.tensor(kappa, dtype=torch.float64)[:, None, None] * 2
    )  # channel 1 in units twice as small has kappa 2
    got, want = (list(p.chain(plain, v, noise=noise)) for p, v in ((both, y), (one, scaled)))
    for a, b in zip(got, want):
        assert torch.allclose(
            a.z * torch.tensor([1.0, 2.0], dtype=torch.float64)[:, None, None], b.z, atol=1e-12
        )
    same = ResidualShift(kappa=[2.0, 2.0])
    assert torch.equal(same.sample(network, y, noise=noise), one.sample(network, y, noise=noise))


def test_arrays_serve_as_lists():
    want = ResidualShift(kappa=[2.0, 1.0, 0.5], latent_std=[1.0, 3.0, 4.0])
    for kappa, std in (
        (np.array([2.0, 1.0, 0.5]), np.array([1, 3, 4])),
        ((2, 1, 0.5), torch.tensor([1, 3, 4])),
        (np.array([2, 1, 0.5], np.float32), [1, 3, 4]),
    ):
        got = ResidualShift(kappa=kappa, latent_std=std)
        assert torch.equal(got.kappa, want.kappa) and torch.equal(got.latent_std, want.latent_std)
    assert (
        ResidualShift(kappa=np.float32(2)).kappa.tolist()
        == ResidualShift(kappa=np.array(2)).kappa.tolist()
        == [2.0]
    )
    for ts in (torch.tensor([14, 7, 3]), np.array([14, 7, 3]), (14, 7, 3)):
        assert want.subsequence(ts) in ([14, 7, 3], (14, 7, 3))
    assert want.subsequence(torch.tensor(4)) == want.subsequence(np.int64(4)) == want.subsequence(
        4
    ) and list(want.subsequence(range(14, -1, -7))) == [14, 7, 0]


def test_seeded_and_repeatable():
    p, (_, y) = ResidualShift(), latents(2, 3, 4, 4)
    runs = [p.sample(network, y, 4, generator=gen(s)) for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    state = torch.get_rng_state()
    p.sample(network, y, generator=gen())
    p.loss(network, y, y, generator=gen())
    p.training_pair(y, y, generator=gen(), stratified=True)
    assert torch.equal(
        state, torch.get_rng_state()
    )  # a given generator leaves the global state alone
    torch.manual_seed(3)
    a = p.sample(network, y, 4)
    torch.manual_seed(3)
    assert torch.equal(a, p.sample(network, y, 4))


def test_sampling_is_without_gradients_and_in_eval_mode():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.drop = nn.Conv2d(3, 3, 1), nn.Dropout(0.5)

        def forward(self, z, t, c):
            return self.drop(self.c(z))

    net, (_, y), p = Net().train(), latents(1, 3, 4, 4, dtype=torch.float32), ResidualShift()
    out = p.sample(net, y, generator=gen())
    assert (
        not out.requires_grad
        and net.training
        and torch.equal(out, p.sample(net, y, generator=gen()))
    )
    for state in p.chain(net, y, 3):
        assert torch.is_grad_enabled() and not state.z.requires_grad
    assert p.sample(network, y[:0], 3).shape == (0, 3, 4, 4)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_devices_and_types(device, dtype):
    p, (x, y) = ResidualShift(predicts='residual'), latents(4, 3, 8, 8)
    model = lambda z, t, c: 0.3 * z + 0.1 * c
    full = p.sample(model, y, 4, generator=gen())
    x, y = x.to(device, dtype), y.to(device, dtype)
    noise = p.sample(model, y, 4, generator=gen())
    assert noise.dtype == dtype and noise.device.type == device and torch.isfinite(noise).all()
    if dtype == torch.float64:
        assert torch.allclose(noise.cpu(), full, atol=1e-12)
    pair = p.training_pair(x, y, generator=gen())
    assert (
        pair.z.dtype == pair.scaled.dtype == dtype
        and pair.z.device.type == pair.t.device.type == device
    )
    out = p.loss(model, x, y, generator=gen())
    assert torch.isfinite(out.mean) and out.mean.dtype in (torch.float32, torch.float64)


def test_any_range_is_allowed():
    p, x = ResidualShift(), 1000 * torch.randn(2, 1, 4, 4, generator=gen())
    assert (
        torch.isfinite(p.loss(lambda z, t, c: z, x, x).mean)
        and p.sample(lambda z, t, c: c, x, 3).abs().max() > 100
    )


# bad input ----------------------------------------------------------------------------------------

P, X, T = ResidualShift(), torch.zeros(2, 3, 4, 4), torch.zeros(2).long()
NAN = X.clone()
NAN[0, 0, 0, 0] = math.nan


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda: P.shift(X, X, T + 15), ValueError, 't holds 15 to 15; expected 0 to 14'),
        (lambda: P.shift(X, X, T - 1), ValueError, 't holds -1 to -1; expected 0 to 14'),
        (lambda: P.shift(X, X, T[:1]), ValueError, r'shape \(1,\); expected int64 of shape \(2,\)'),
        (lambda: P.shift(X, X, T.float()), ValueError, 'float32.*expected int64'),
        (lambda: P.shift(X, X, 3), TypeError, 't is int; expected an int64 tensor'),
        (lambda: P.loss(network, X, X, T + 99), ValueError, 'expected 0 to 14'),
        (lambda: P.training_pair(X, X, T - 2), ValueError, 't holds -2'),
        (lambda: P.scale_input(X, T + 15), ValueError, 'expected 0 to 14'),
        (lambda: P.levels(T - 1, X), ValueError, 'expected 0 to 14'),
        (lambda: P.posterior(X, X, T + 3, T + 3), ValueError, 'every s below its t'),
        (
            lambda: P.posterior(X, X, T + 3, T - 2),
            ValueError,
            's holds -2 to -2; expected -1 to 14',
        ),
        (
            lambda: P.shift(X, X[..., :2], T),
            ValueError,
            r'y has shape \(2, 3, 4, 2\), x has \(2, 3, 4, 4\); expected equal',
        ),
        (lambda: P.loss(network, X, X[:1]), ValueError, 'expected equal shapes'),
        (lambda: P.posterior(X, X[:, :1], T), ValueError, 'expected equal shapes'),
        (
            lambda: P.shift(X[0], X[0], T),
            ValueError,
            r'x has shape \(3, 4, 4\); expected \(b, c, h, w\)',
        ),
        (lambda: P.shift(X.int(), X, T), TypeError, 'x is torch.int32; expected floats'),
        (lambda: P.prior([1.0]), TypeError, 'y is list; expected a float tensor'),
        (lambda: P.shift(NAN, X, T), ValueError, 'x holds 1 values that are NaN'),
        (lambda: P.loss(network, X, NAN), ValueError, 'y holds 1 values'),
        (lambda: P.sample(network, NAN), ValueError, 'y holds 1 values'),
        (lambda: P.sample(network, NAN * 0 + math.inf), ValueError, 'NaN or infinite'),
        (lambda: P.shift(X, X, T, noise=X[:1]), ValueError, 'noise has shape'),
        (
            lambda: P.sample(network, X, 3, noise=X),
            ValueError,
            r'noise has shape \(2, 3, 4, 4\); expected \(3, 2, 3, 4, 4\)',
        ),
        (lambda: P.sample(network, X, 3, noise=[X]), ValueError, r'noise has shape \(\)'),
        (
            lambda: P.sample(network, X, randomness=1.1),
            ValueError,
            'randomness is 1.1; expected a number from 0 to 1',
        ),
        (lambda: P.sample(network, X, randomness=math.nan), ValueError, 'randomness is nan'),
        (
            lambda: P.sample(lambda z, t, c: z[:, :1], X),
            ValueError,
            r'model gave \(2, 1, 4, 4\); expected a tensor \(2, 3, 4, 4\)',
        ),
        (lambda: P.loss(lambda z, t, c: None, X, X), ValueError, 'model gave NoneType'),
        (
            lambda: P.convert(X, X, X, T, 'x', 'noise'),
            ValueError,
            "source is 'x'; expected one of x0, residual, noise",
        ),
        (lambda: P.convert(X, X, X, T, 'x0', 'v'), ValueError, "to is 'v'"),
        (
            lambda: ResidualShift(kappa=[1.0, 2.0]).prior(X),
            ValueError,
            'y has 3 channels; expected 2, one for each number of kappa',
        ),
        (
            lambda: ResidualShift(latent_std=[1.0, 2.0]).loss(network, X, X),
            ValueError,
            'number of latent_std',
        ),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


# numbers of NumPy, weights, empty batches ---------------------------------------------------------


def test_one_channel_is_not_spread_over_three_columns_of_weights():
    "What was broadcast without a word: a picture of one channel, three numbers a step."
    x, y = latents(3, 1, 4, 4)
    with pytest.raises(ValueError, match='a weight for each step'):
        ResidualShift(3).loss(network, x, y, torch.arange(3), weight=torch.ones(3, 3))


def test_weights_of_channels_where_kappa_has_channels():
    p, (x, y) = ResidualShift(3, kappa=[1.0, 2.0]), latents(3, 2, 4, 4)
    own = p.loss_weights('sigma')
    assert torch.equal(p.loss_weights(own), own) and own.shape == (3, 2)
    assert torch.equal(
        *(
            p.loss(network, x, y, torch.arange(3), weight=w, generator=gen()).per_sample
            for w in ('sigma', own)
        )
    )
    assert torch.equal(p.loss_weights(torch.ones(3)), torch.ones(3, 1, dtype=torch.float64))
    with pytest.raises(
        ValueError,
        match=r'weight has shape \(3, 3\); expected \(3,\), a weight for each step, or \(3, 2\)',
    ):
        p.loss_weights(torch.ones(3, 3))


def test_weights_of_numpy_and_lists():
    p, (x, y) = ResidualShift(3), latents(3, 2, 4, 4)
    loss = lambda w: p.loss(network, x, y, torch.arange(3), weight=w, generator=gen()).per_sample
    want = loss(torch.tensor([0.0, 1.0, 5.0]))
    assert (
        torch.equal(loss(np.array([0.0, 1.0, 5.0])), want)
        and torch.equal(loss([0, 1, 5]), want)
        and torch.equal(loss(torch.tensor([0, 1, 5])), want)
    )


def test_numbers_of_numpy():
    a, b = (
        ResidualShift(
            np.int64(6),
            np.float32(2.0),
            np.float32(0.25),
            np.float64(0.5),
            np.float64(0.9),
            latent_std=np.float32(2),
        ),
        ResidualShift(6, 2.0, 0.25, 0.5, 0.9, latent_std=2.0),
    )
    assert (
        torch.equal(a.sqrt_etas, b.sqrt_etas)
        and a.subsequence(np.int32(3)) == b.subsequence(3)
        and all(type(t) is int for t in a.subsequence(np.array([5, 2])))
    )
    y = torch.rand(2, 1, 4, 4)
    for steps in (np.int64(4), np.array([5, 3, 2, 0])):
        want = b.sample(
            network, y, 4 if steps.ndim == 0 else steps.tolist(), generator=gen(), randomness=0.5
        )
        assert torch.equal(
            a.sample(network, y, steps, generator=gen(), randomness=np.float64(0.5)), want
        )
    assert a.draw_t(np.int64(4), gen()).tolist() == b.draw_t(4, gen()).tolist()
    v, t = torch.arange(6.0), torch.arange(6)
    assert a.buckets(v, t, np.int64(2)) == {'t 0-2': 1.0, 't 3-5': 4.0}


def test_buckets_weigh_items_and_lose_none():
    p = ResidualShift(4)
    t = torch.tensor([0, 0, 0, 0, 1, 3])
    assert p.buckets(torch.tensor([0.0, 0.0, 0.0, 0.0, 10.0, 7.0]), t, 2) == {
        't 0-1': 2.0,
        't 2-3': 7.0,
    }
    with pytest.raises(ValueError, match='t holds 0 to 4; expected 0 to 3'):
        p.buckets(torch.ones(2), torch.tensor([0, 4]), 2)
    for n in (0, -1, 5, 1.5, math.nan):
        with pytest.raises(ValueError, match='n is'):
            p.buckets(torch.ones(2), torch.tensor([0, 3]), n)


@pytest.mark.parametrize(
    'call, says',
    [
        (
            lambda p, x: p.loss(network, x[:0], x[:0]),
            r'x has shape \(0, 1, 4, 4\); expected at least one sample',
        ),
        (lambda p, x: p.training_pair(x[:0], x[:0]), 'at least one sample'),
        (lambda p, x: p.loss(network, x[..., :0], x[..., :0]), 'one pixel'),
        (lambda p, x: p.draw_t(0), 'b is 0'),
        (lambda p, x: p.draw_t(-1), 'b is -1'),
        (lambda p, x: p.draw_t(1.5), 'b is 1.5'),
        (
            lambda p, x: p.sample(network, x, 3, noise=torch.stack([x, x, x * math.nan])),
            'noise holds 32 values that are NaN',
        ),
        (lambda p, x: p.sample(network, x, np.int64(16)), 'expected 1 to 15'),
        (lambda p, x: p.subsequence([14, True]), 'steps is True'),
        (lambda p, x: p.loss_weights(torch.full((15,), math.nan)), 'weight has shape .*NaN'),
        (lambda p, x: p.loss_weights(-torch.ones(15)), 'negative'),
        (lambda p, x: ResidualShift(power=math.nan), 'power is nan'),
        (lambda p, x: ResidualShift(etas_end=math.nan), 'etas_end is nan'),
        (lambda p, x: ResidualShift(latent_std=math.nan), 'latent_std is nan'),
        (lambda p, x: ResidualShift(etas_end=1.5), 'etas_end is 1.5'),
    ],
)
def test_named_instead_of_nan(call, says):
    with pytest.raises(ValueError, match=says):
        call(ResidualShift(), torch.rand(2, 1, 4, 4))


def test_an_empty_batch_is_restored_to_an_empty_one():
    assert ResidualShift().sample(network, torch.rand(0, 1, 4, 4), 3).shape == (0, 1, 4, 4)


def test_given_generators_leave_the_callers_random_state_and_tensors_alone():
    p, x, y, noise = (
        ResidualShift(),
        torch.rand(2, 1, 4, 4),
        torch.rand(2, 1, 4, 4),
        torch.randn(3, 2, 1, 4, 4),
    )
    before, kept = torch.get_rng_state(), [v.clone() for v in (x, y, noise)]
    p.loss(network, x, y, generator=gen(), stratified=True)
    p.sample(network, y, 3, generator=gen())
    p.sample(network, y, 3, noise=noise)
    assert torch.equal(torch.get_rng_state(), before) and all(
        torch.equal(a, b) for a, b in zip((x, y, noise), kept)
    )


@pytest.mark.parametrize(
    'kw',
    [
        dict(steps=4),
        dict(kappa=0.5),
        dict(kappa=[1.0, 2.0]),
        dict(min_noise=0.1),
        dict(power=1.0),
        dict(etas_end=0.9),
        dict(predicts='noise'),
        dict(latent_std=[0.1, 3.0]),
    ],
    ids=lambda kw: ' '.join(kw),
)
def test_a_process_is_built_again_from_its_knobs(kw):
    p = ResidualShift(**kw)
    assert p.knobs != ResidualShift().knobs
    q = ResidualShift(**json.loads(json.dumps(p.knobs)))
    y, _ = latents(3, 2, 4, 4)
    a, b = (r.sample(network, y, generator=gen()) for r in (p, q))
    assert torch.equal(a, b) and q.knobs == p.knobs
