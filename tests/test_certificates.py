"""Certificates by randomised smoothing: their statistics, what has no vote, training for votes, bad
input."""

import inspect, math

from common import gen
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from restore_lib.certificates import (
    Certified,
    certified_accuracy,
    certify,
    consistency,
    noisy_votes,
    smoothing_finetune,
    smoothing_loss,
    votes_of,
)
from restore_lib.label_loaders import labelled
from restore_lib.mae import MAE
from restore_lib.transfer import Classifier, load_encoder

SIZES = dict(img_size=24, patch=4, dim=32, depth=2, heads=4, dec_dim=16, dec_depth=2, dec_heads=2)


pytestmark = pytest.mark.usefixtures('seed')


# consistency --------------------------------------------------------------------------------------


@pytest.mark.parametrize('m', [2, 3])
def test_consistency_by_hand(m):
    logits = 3 * torch.randn(m, 5, 4)
    p = np.exp(logits.double().numpy())
    p /= p.sum(-1, keepdims=True)
    mean = p.mean(0)
    kl = np.mean([(mean * np.log(mean / p[i])).sum(1).mean() for i in range(m)])
    assert consistency(logits, 2.0, 0.5).item() == pytest.approx(
        2 * kl - 0.5 * (mean * np.log(mean)).sum(1).mean(), rel=1e-5
    )
    torch_kl = torch.stack(
        [
            F.kl_div(q.log_softmax(1), logits.softmax(2).mean(0), reduction='batchmean')
            for q in logits
        ]
    ).mean()
    assert torch.allclose(consistency(logits, 1.0, 0.0), torch_kl, atol=1e-6)


def test_consistency_at_its_ends():
    same = torch.randn(1, 6, 5).expand(2, -1, -1)
    assert consistency(same, 2.0, 0.0).abs() < 1e-6
    assert consistency(torch.zeros(2, 3, 4), 2.0, 0.5).item() == pytest.approx(0.5 * math.log(4))
    far = torch.tensor([[[1e4, 0.0]], [[0.0, 1e4]]], requires_grad=True)
    value = consistency(far)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(far.grad).all()
    for bad in (torch.zeros(1, 3, 4), torch.zeros(3, 4)):
        with pytest.raises(ValueError, match='m, b, classes'):
            consistency(bad)


class Linear(nn.Module):
    def __init__(self, k=3):
        super().__init__()
        self.f = nn.Linear(16, k)

    def forward(self, x):
        return self.f(x.flatten(1))


def test_smoothing_loss():
    model, x, t = Linear(), torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 1])
    got = smoothing_loss(model, (x, t), 0.0, copies=2)
    assert set(got) == {'ce', 'consistency'} and torch.allclose(
        got['ce'], F.cross_entropy(model(x), t)
    )
    assert torch.allclose(got['consistency'], consistency(model(x).expand(2, -1, -1)), atol=1e-6)
    assert (
        set(smoothing_loss(model, (x, t), 0.2, copies=1))
        == {'ce'}
        == set(smoothing_loss(model, (x, t), 0.2, lam=0, eta=0))
    )
    torch.manual_seed(1)
    logits = []
    model.register_forward_hook(lambda m, i, o: logits.append(o))
    full = smoothing_loss(model, (x, t), 0.2, copies=3)
    assert logits[0].shape == (12, 3) and torch.allclose(
        full['ce'], F.cross_entropy(logits[0], t.repeat(3))
    )
    assert torch.allclose(
        full['consistency'], consistency(logits[0].reshape(3, 4, 3))
    )  # copies of one image stand together


def test_smoothing_finetune():
    x = (
        torch.rand(30, 3, 24, 24) * 0.2
        + (labels := torch.arange(30) % 2)[:, None, None, None] * 0.6
    )
    start, model = MAE(**SIZES), Classifier(MAE(**SIZES).encoder, 2)
    load_encoder(model, start)
    learn = smoothing_finetune(
        model, labelled(x, labels, 2, batch=10), sigma=0.1, blr=0.05, layer_decay=1.0, cpu=True
    ).fit(25)
    assert {'ce', 'consistency'} <= set(learn.history[-1]) and learn.history[-1][
        'ce'
    ] < 0.3 < learn.history[0]['ce']
    assert certified_accuracy(certify(learn.trained(), x[:6], 0.1, 20, 100), labels[:6]).item() == 1


# the certificate ----------------------------------------------------------------------------------


class Plane(nn.Module):
    "Class 1 where the mean is above .5; the distance to the plane is |mean - .5|*sqrt(numbers)."

    def forward(self, x):
        return torch.stack([torch.zeros(len(x)), x.flatten(1).mean(1) - 0.5], 1)


class Always(nn.Module):
    def forward(self, x):
        return F.one_hot(torch.full((len(x),), 2), 4).float()


def flat(*means, size=8):
    return torch.tensor(means)[:, None, None, None].expand(-1, 1, size, size).contiguous()


def test_votes():
    x = flat(0.4, 0.5, 0.6)
    votes = noisy_votes(Plane(), x, 0.25, 1000, gen())
    assert votes.shape == (3, 2) and (votes.sum(1) == 1000).all() and votes.dtype == torch.int64
    p = [0.5 * (1 + math.erf((m - 0.5) * 8 / 0.25 / math.sqrt(2))) for m in (0.4, 0.5, 0.6)]
    for v, q in zip(votes[:, 1].tolist(), p):
        assert abs(v / 1000 - q) < 4 * math.sqrt(q * (1 - q) / 1000) + 0.002
    assert torch.equal(votes, noisy_votes(Plane(), x, 0.25, 1000, gen())) and not torch.equal(
        votes, noisy_votes(Plane(), x, 0.25, 1000, gen(1))
    )
    for batch in (1, 7, 64, 10_000):
        assert (
            noisy_votes(Always(), x, 0.25, 10, batch=batch) == torch.tensor([0, 0, 10, 0])
        ).all()


def test_the_bound_is_the_exact_one_of_scipy(monkeypatch):
    from scipy.stats import binomtest, norm
    from restore_lib import certificates

    wins = torch.tensor([0, 1, 30, 50, 51, 70, 99, 100])
    monkeypatch.setattr(
        certificates,
        'noisy_votes',
        lambda model, x, sigma, n, *a: (
            torch.stack([wins, 100 - wins], 1) if n == 100 else torch.tensor([[1, 0]]).expand(8, 2)
        ),
    )
    found = certify(None, torch.zeros(8, 1, 2, 2), 0.5, 10, 100, 0.01)
    low = [
        binomtest(int(k), 100).proportion_ci(0.98, 'exact').low for k in wins
    ]  # two-sided at 2 alpha: one-sided at alpha
    assert np.allclose(found.p_lower, low, atol=1e-6)
    assert np.allclose(
        found.radius, [max(0, 0.5 * norm.ppf(p)) if p > 0.5 else 0 for p in low], atol=1e-6
    )
    assert (found.label == torch.where(torch.tensor(low) > 0.5, 0, -1)).all() and found.p_lower[
        0
    ] == 0


def test_certificates_hold_and_come_close():
    x = flat(*torch.linspace(0.5, 0.58, 60).tolist())
    true = (x.mean((1, 2, 3)) - 0.5) * 8
    found = certify(Plane(), x, 0.25, 100, 4000, 0.001)
    assert (
        (found.radius <= true + 1e-5).all()
        and (found.label[true > 0.05] == 1).all()
        and found.label[0] == -1
    )
    assert (true - found.radius)[(true > 0.1) & (true < 0.5)].max() < 0.06


def test_certificates_fail_as_seldom_as_they_say():
    x = flat(*[0.51] * 400)
    p = 0.5 * (1 + math.erf(0.08 / 0.25 / math.sqrt(2)))
    found = certify(Plane(), x, 0.25, 50, 100, alpha=0.1)
    assert (found.p_lower[found.label == 1] > p).float().mean() < 0.1 + 3 * math.sqrt(0.09 / 400)
    assert (
        certify(Plane(), x, 0.25, 50, 100, alpha=0.4).p_lower > p
    ).float().mean() > 0.2  # and the test can fail


def test_no_attack_within_the_radius_moves_the_vote():
    x = flat(0.55)
    r = certify(Plane(), x, 0.25, 100, 4000).radius.item()
    for k in (0.5, 0.99):
        attacked = x - k * r / 8  # straight to the plane: L2 length k*r
        assert (attacked - x).norm().item() == pytest.approx(k * r, rel=1e-4) and noisy_votes(
            Plane(), attacked, 0.25, 20_000, gen()
        ).argmax() == 1


def test_no_label_is_asked_for():
    assert not {'label', 'labels', 'target', 'targets'} & set(inspect.signature(certify).parameters)
    found = certify(Always(), flat(0.1, 0.9), 0.25, 10, 100)
    assert (found.label == 2).all() and (found.radius > 0).all()


def test_more_votes_prove_more_and_the_limit():
    radii = [certify(Always(), flat(0.5), 0.25, 10, n).radius.item() for n in (5, 50, 500, 5000)]
    from scipy.stats import norm

    assert (
        radii[0] == 0
        and radii == sorted(radii)
        and radii[2] == pytest.approx(0.25 * norm.ppf(0.001 ** (1 / 500)), rel=1e-5)
    )


def test_mode_comes_back_and_dropout_is_off():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(64, 2)).train()
    a, b = (certify(model, flat(0.3, 0.7), 0.25, 10, 50, seed=3) for _ in range(2))
    assert model.training and model[1].training and all(torch.equal(s, t) for s, t in zip(a, b))


def test_certified_accuracy_by_hand():
    found = Certified(
        torch.tensor([1, 1, -1, 0]), torch.tensor([0.5, 0.2, 0.0, 0.9]), torch.ones(4)
    )
    assert certified_accuracy(found, torch.tensor([1, 1, 1, 1]), (0, 0.2, 0.3, 0.6)).tolist() == [
        0.5,
        0.5,
        0.25,
        0,
    ]
    with pytest.raises(ValueError, match='labels 2'):
        certified_accuracy(found, torch.tensor([1, 1]))


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(alpha=0), 'alpha is 0'),
        (dict(alpha=1), 'alpha is 1'),
        (dict(n=0), 'n is 0'),
        (dict(n0=0), 'n0 is 0'),
        (dict(sigma=0), 'sigma is 0'),
        (dict(sigma=-1), 'sigma is -1'),
        (dict(x=torch.zeros(1, 8, 8)), r'\(b, c, h, w\)'),
    ],
)
def test_bad_certify(kw, says):
    with pytest.raises(ValueError, match=says):
        certify(Plane(), **(dict(x=flat(0.5), sigma=0.25, n0=5, n=5) | kw))



# certificates -------------------------------------------------------------------------------------


class Says(nn.Module):
    "Class 1, and NaN for a share of the copies, counted from the first."

    def __init__(self, share):
        super().__init__()
        self.share, self.n = share, 0

    def forward(self, z):
        out = torch.tensor([0.0, 1.0, 0.0]).repeat(len(z), 1)
        out[(self.n + torch.arange(len(z))) % 100 < 100 * self.share, 2] = math.nan
        self.n += len(z)
        return out


def test_no_certificate_for_a_network_that_says_nan():
    found = certify(lambda z: torch.full((len(z), 10), math.nan), torch.rand(3, 1, 8, 8), 0.25)
    assert (
        found.label.tolist() == [-1] * 3
        and found.radius.tolist() == [0] * 3
        and found.p_lower.tolist() == [0] * 3
    )
    assert noisy_votes(Says(1), torch.rand(2, 1, 8, 8), 0.25, 50).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize('share', [0, 0.2, 0.4, 0.6])
def test_copies_of_which_it_says_nan_count_against_the_class(share):
    from scipy.stats import beta, norm

    assert noisy_votes(Says(share), torch.rand(1, 1, 8, 8), 0.25, 200).tolist() == [
        [0, round(200 * (1 - share)), 0]
    ]
    found = certify(Says(share), torch.rand(1, 1, 8, 8), 0.25, n0=100, n=1000)
    p = beta.ppf(0.001, 1000 * (1 - share), 1000 * share + 1)
    assert found.p_lower.item() == pytest.approx(p, rel=1e-5)
    assert found.label.item() == (1 if p > 0.5 else -1) and found.radius.item() == pytest.approx(
        0.25 * norm.ppf(max(p, 0.5)), abs=1e-6
    )


def test_votes_need_no_memory_for_images_times_votes():
    class Stop(Exception):
        pass

    def model(z):
        raise Stop

    with pytest.raises(Stop):
        noisy_votes(model, torch.rand(4, 1, 8, 8), 0.25, 10**13, batch=4)


@pytest.mark.parametrize('n, batch', [(7, 4), (10, 512), (1, 1)])
def test_the_noise_of_votes_is_that_of_one_stream(n, batch):
    from restore_lib.degrade import gaussian

    x, seen = torch.rand(3, 1, 8, 8), []

    def model(z):
        seen.append(z.clone())
        return torch.stack([z.mean((1, 2, 3)) - 0.5, 0.5 - z.mean((1, 2, 3))], 1)

    votes, g = noisy_votes(model, x, 0.25, n, gen(), batch), gen()
    by_hand = [gaussian(x[i // n], 0.25, g) for i in torch.arange(3 * n).split(batch)]
    assert len(seen) == len(by_hand) and all(torch.equal(a, b) for a, b in zip(seen, by_hand))
    wins = (torch.cat(seen).mean((1, 2, 3)) < 0.5).reshape(3, n).sum(1)
    assert votes.tolist() == [[n - w, w] for w in wins.tolist()] and votes.dtype == torch.int64


def test_certificates_from_numpy_and_the_caller_s_random_state():
    model, x = Classifier(MAE(**(SIZES | dict(channels=1))).encoder, 3), torch.rand(2, 1, 24, 24)
    before, state = x.clone(), torch.get_rng_state()
    plain = certify(model, x, 0.25, 5, 20, 0.01, 3, 16)
    again = certify(
        model,
        x,
        np.float32(0.25),
        np.int64(5),
        np.int32(20),
        np.float64(0.01),
        np.int64(3),
        np.int64(16),
    )
    assert (
        all(torch.equal(a, b) for a, b in zip(plain, again))
        and torch.equal(torch.get_rng_state(), state)
        and torch.equal(x, before)
    )
    assert certified_accuracy(
        plain, torch.zeros(2, dtype=torch.int64), (np.float32(0), np.int64(1))
    ).shape == (2,)
    assert certified_accuracy(plain, torch.zeros(2, dtype=torch.int64), 0.5).shape == (1,)


NAN, X = float('nan'), torch.rand(2, 1, 8, 8)


def thirds(z):
    return z.flatten(1)[:, :3]


def found(n=2):
    return Certified(torch.zeros(n, dtype=torch.int64), torch.ones(n), torch.ones(n))


@pytest.mark.parametrize(
    'call, says',
    [
        *[(lambda s=s: certify(thirds, X, s), 'sigma is') for s in (0, -1, NAN, math.inf)],
        *[(lambda s=s: noisy_votes(thirds, X, s, 5), 'sigma is') for s in (-1, NAN, math.inf)],
        *[(lambda a=a: certify(thirds, X, 0.25, alpha=a), 'alpha is') for a in (0, 1, -0.1, NAN)],
        *[(lambda n=n: certify(thirds, X, 0.25, n0=n), 'n0 is') for n in (0, -3, 2.5, True)],
        *[(lambda n=n: certify(thirds, X, 0.25, n=n), 'n is') for n in (0, 2.5, NAN)],
        *[(lambda n=n: noisy_votes(thirds, X, 0.25, n), 'n is') for n in (0, -1, 1.5)],
        *[(lambda n=n: noisy_votes(thirds, X, 0.25, 5, batch=n), 'batch is') for n in (0, -1, 1.5)],
        (lambda: certify(thirds, X, 0.25, seed=0.5), 'seed is 0.5'),
        (lambda: certify(thirds, X[:0], 0.25), 'at least one image'),
        (lambda: noisy_votes(thirds, X[:0], 0.25, 5), 'at least one image'),
        *[
            (
                lambda r=r: certified_accuracy(found(), torch.zeros(2, dtype=torch.int64), r),
                'radii is',
            )
            for r in ((-1.0,), (0.0, NAN), (math.inf,))
        ],
        (
            lambda: certified_accuracy(found(0), torch.zeros(0, dtype=torch.int64)),
            'found holds no image',
        ),
        (lambda: certified_accuracy(found(), torch.zeros(2)), 'labels is torch.float32'),
        (lambda: certified_accuracy(found(), torch.zeros(2, 1, dtype=torch.int64)), 'labels is'),
        *[
            (lambda k=k: consistency(torch.zeros(2, 3, 4), **{k: NAN}), f'{k} is nan')
            for k in ('lam', 'eta')
        ],
        (lambda: consistency(torch.zeros(2, 0, 4)), 'one image at least'),
        *[
            (
                lambda c=c: smoothing_loss(
                    nn.Flatten(), (X, torch.zeros(2, dtype=torch.int64)), 0.25, c
                ),
                'copies is',
            )
            for c in (0, 1.5)
        ],
    ],
)
def test_numbers_out_of_range(call, says):
    with pytest.raises(ValueError, match=says):
        call()



@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(sigma=-1), 'sigma is -1'),
        (dict(sigma=NAN), 'sigma is nan'),
        (dict(copies=0), 'copies is 0'),
        (dict(copies=1.5), 'copies is 1.5'),
        (dict(lam=NAN), 'lam is nan'),
        (dict(eta=-1), 'eta is -1'),
        (dict(blr=-1), 'blr is -1'),
    ],
)
def test_fine_tuning_refuses_before_training(kw, says):
    train = labelled(torch.rand(8, 3, 24, 24), torch.arange(8) % 2, 2, batch=4)
    with pytest.raises(ValueError, match=says):
        smoothing_finetune(Classifier(MAE(**SIZES).encoder, 2), train, cpu=True, **kw)




def test_a_classifier_s_loss_holds_plain_numbers():
    "A run is known by them, and NumPy's would be known by another name."
    train = labelled(torch.rand(8, 3, 24, 24), torch.arange(8) % 2, 2, batch=4)
    tuned = smoothing_finetune(
        Classifier(MAE(**SIZES).encoder, 2),
        train,
        sigma=np.float32(0.25),
        copies=np.int64(3),
        cpu=True,
    )
    assert tuned.loss_fn.keywords == dict(sigma=0.25, copies=3, lam=2.0, eta=0.5)
    assert type(tuned.loss_fn.keywords['sigma']) is float
    assert type(tuned.loss_fn.keywords['copies']) is int


# what has no vote ---------------------------------------------------------------------------------

INF = math.inf


@pytest.mark.parametrize(
    'row, vote',
    [
        ([0.0, 2, 1], 1),
        ([-INF, 2, 1], 1),  # a class that is ruled out
        ([NAN, 2, 1], -1),
        ([0, 2, NAN], -1),
        ([0, INF, 1], -1),
        ([0, INF, INF], -1),
        ([-INF, -INF, -INF], -1),
        ([1, 1, 0], -1),
        ([0, 0, 0], -1),
    ],
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_who_has_no_opinion_has_no_vote(row, vote, dtype):
    assert votes_of(torch.tensor([row, [0.0, 0, 9]], dtype=dtype)).tolist() == [vote, 2]


@pytest.mark.parametrize('value', [NAN, INF, -INF, 0.0])
def test_no_certificate_for_a_network_that_says_one_thing_of_every_class(value):
    "`argmax` answers 0 for all of these."
    found = certify(lambda z: torch.full((len(z), 10), value), torch.rand(3, 1, 8, 8), 0.25, 10, 50)
    assert found.label.tolist() == [-1] * 3 and not found.radius.any() and not found.p_lower.any()


def test_a_network_that_overflows_in_part_is_certified_by_the_rest():
    class Overflows(nn.Module):
        def forward(self, z):
            out = torch.tensor([0.0, 1.0, 0.0]).repeat(len(z), 1)
            out[::2, 0] = INF
            return out

    x = torch.rand(1, 1, 8, 8)
    assert noisy_votes(Overflows(), x, 0.25, 100).tolist() == [[0, 50, 0]]
    assert certify(Overflows(), x, 0.25, 10, 100).label.item() == -1
