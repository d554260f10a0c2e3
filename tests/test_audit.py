"""What lesson 04 does not teach of the audit tools: broken and sound examples of each, bad input,
coverage of the intervals."""

import math, random, threading, time

from common import DEVICES
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from restore_lib.audit import (
    Ladder,
    compare,
    headroom,
    identity_check,
    oracle_gap,
    reads_truth,
    stateless,
)
from restore_lib.audit_parts import smooth_images
from restore_lib.checkpoints import load_report
from restore_lib.metrics import evaluate, psnr, ssim
from restore_lib.probes import leak_probe, parseval


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fails(cases):
    return pytest.mark.parametrize('make', cases.values(), ids=list(cases))


# headroom -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'metric, floor, ceiling, value, text',
    [
        ('PSNR', 28.92, 34.67, 35.33, 'above its ceiling by 0.66 dB'),
        ('PSNR', 28.92, 34.67, 28.5, 'below its floor by 0.42 dB'),
        ('LPIPS', 0.4, 0.1, 0.05, 'better than its ceiling by 0.05'),
        ('mse', 0.4, 0.1, 0.5, 'worse than its floor by 0.1'),
        (ssim, 0.5, 0.9, 0.95, 'above its ceiling by 0.05'),
        ('sharpness', 1, 3, 4, 'above its ceiling by 1'),
        ('blur', 3, 1, 0, 'above its ceiling by 1'),
    ],
)
def test_headroom_names_what_cannot_be(metric, floor, ceiling, value, text):
    assert headroom(metric, floor, ceiling, value).problem == text


@pytest.mark.parametrize(
    'metric, floor, ceiling, value, share',
    [
        ('PSNR', 28, 34, 31, 0.5),
        (psnr, 28, 34, torch.tensor(34.0), 1),
        ('PSNR-Y', 28, 34, 28, 0),
        ('LPIPS-vgg', 0.4, 0.1, 0.1, 1),
        ('valid_loss', 1, 0, 0.25, 0.75),
        ('blur', 3, 1, 2, 0.5),
        ('top-1 accuracy', 0.1, 0.9, 0.5, 0.5),
    ],
)
def test_headroom_share(metric, floor, ceiling, value, share):
    h = headroom(metric, floor, ceiling, value)
    assert (
        h.share == pytest.approx(share, abs=1e-6)
        and h.problem == ''
        and h.room > 0
        and h.of == 'gap'
    )


def test_headroom_with_an_endless_ceiling_counts_squared_error():
    h = headroom('PSNR', 20, math.inf, 30)
    assert (
        h.share == pytest.approx(0.9) and h.gain == 10 and h.of == 'squared error' and not h.problem
    )
    assert headroom('PSNR', 20, math.inf, math.inf).share == 1
    assert headroom('PSNR', 20, math.inf, 19).problem.startswith('below its floor by 1')


@pytest.mark.parametrize(
    'args',
    [
        ('PSNR', 34, 28, 30),
        ('PSNR', 30, 30, 30),
        ('LPIPS', 0.1, 0.4, 0.2),
        ('blur', 1, 1, 1),
        ('SSIM', 0.1, math.inf, 0.2),
        ('PSNR', math.nan, 1, 1),
        ('PSNR', math.inf, math.inf, 1),
        ('PSNR', 1, 2, math.nan),
    ],
)
def test_headroom_bad_numbers(args):
    with pytest.raises(ValueError, match='floor|ceiling|value'):
        headroom(*args)


def test_headroom_bad_metric():
    with pytest.raises(TypeError, match='metric is 3'):
        headroom(3, 1, 2, 1)


# Ladder -------------------------------------------------------------------------------------------


def ladder():
    return (
        Ladder(caption='denoising, 3 images')
        .floor('noisy', [20.0, 21, 22])
        .floor('median', [24.0, 25, 26])
        .add('ours', [[28.0, 29, 30], [29, 30, 31]], params='1.2 M')
        .add('too good', 36.0)
        .ceiling('codec', [33.0, 34, 35])
        .ceiling('loose', 50)
    )


def row(l, name):
    return next(r for r in l.table().rows if r['name'] == name)


def test_ladder_figures():
    l = ladder()
    ours = row(l, 'ours')
    assert (
        ours['gain'] == pytest.approx(4.5)
        and ours['closed %'] == pytest.approx(50)
        and ours['spread'] == pytest.approx(0.5**0.5)
        and ours['params'] == '1.2 M'
    )
    assert row(l, 'noisy')['gain'] == -4 and row(l, 'median')['spread'] is None
    assert l.problems == ['too good: above its ceiling by 2 dB']
    assert [r['kind'] for r in l.table().rows] == [
        'floor',
        'floor',
        'ours',
        'ours',
        'ceiling',
        'ceiling',
    ]
    assert (
        'denoising, 3 images, PSNR, dB' in l._repr_markdown_()
        and '| 29.50 | 0.71 |' in l._repr_markdown_()
        and 'closed %' in repr(l)
    )


BROKEN_RUNGS = {
    'below the floor': (lambda l: l.add('m', 24.0), 'm: below its floor by 1 dB'),
    'above the ceiling': (lambda l: l.add('m', [34.5]), 'm: above its ceiling by 0.5 dB'),
    'ceiling under a floor': (lambda l: l.ceiling('c', 24.0), 'c: not above the best floor: -1 dB'),
    'above every seed': (lambda l: l.add('m', [[35.0], [36.0]]), 'm: above its ceiling by 1.5 dB'),
}


@pytest.mark.parametrize('change, text', BROKEN_RUNGS.values(), ids=list(BROKEN_RUNGS))
def test_ladder_names_what_cannot_be(change, text):
    assert change(Ladder().floor('f', 25.0).ceiling('top', 34.0)).problems == [text]


SOUND_RUNGS = {
    'between': lambda l: l.add('m', 30.0),
    'at the ceiling': lambda l: l.add('m', torch.tensor([34.0])),
    'at the floor': lambda l: l.add('m', [25.0]),
    'one seed above': lambda l: l.add('m', [[35.0], [30.0]]),
    'a second floor': lambda l: l.floor('g', 10.0),
}


@fails(SOUND_RUNGS)
def test_ladder_without_a_problem(make):
    assert make(Ladder().floor('f', 25.0).ceiling('top', 34.0)).problems == []


def test_ladder_takes_scores_and_falling_metrics():
    pairs = {n: (rand(1, 16, 16, seed=k), rand(1, 16, 16, seed=k + 9)) for k, n in enumerate('ab')}
    same, half = evaluate(lambda y: y, pairs), evaluate(lambda y: y / 2 + 0.25, pairs)
    l = Ladder('SSIM').floor('y', same).add('half', [half, half])
    assert (
        row(l, 'half')['mean'] == pytest.approx(half.mean['SSIM']) and row(l, 'half')['spread'] == 0
    )
    with pytest.raises(ValueError, match="no 'LPIPS' but 'PSNR', 'SSIM'"):
        Ladder('LPIPS').floor('y', same)
    falling = (
        Ladder('LPIPS')
        .floor('y', 0.5)
        .floor('plain', 0.4)
        .ceiling('codec', 0.1)
        .add('m', 0.25)
        .add('n', 0.05)
    )
    assert row(falling, 'm')['closed %'] == pytest.approx(50) and falling.problems == [
        'n: better than its ceiling by 0.05'
    ]
    assert falling.unit == '' and 'dB' not in repr(falling)
    assert row(Ladder().floor('f', 20.0).ceiling('perfect', math.inf).add('m', 30.0), 'm')[
        'error removed %'
    ] == pytest.approx(90)
    assert (
        row(Ladder().floor('f', 20.0).add('m', 30.0), 'm')['closed %'] is None
    )  # no ceiling is known


def test_ladder_refuses():
    with pytest.raises(ValueError, match='no floor'):
        Ladder().add('m', 30.0).table()
    with pytest.raises(ValueError, match='no floor'):
        repr(Ladder())
    with pytest.raises(ValueError, match="name is 'f'"):
        Ladder().floor('f', 1.0).add('f', 2.0)
    with pytest.raises(ValueError, match='m holds 3 images, another row 2'):
        Ladder().floor('f', [1.0, 2]).add('m', [1.0, 2, 3])
    with pytest.raises(ValueError, match="column 'gain'"):
        Ladder().floor('f', 1.0, gain=2)
    for bad in ('x', None, [[1.0, 2], [3.0]], [], torch.zeros(1, 1, 1), math.nan):
        with pytest.raises(ValueError, match='m '):
            Ladder().floor('m', bad)


def test_ladder_figure():
    import matplotlib

    matplotlib.use('Agg')
    fig = ladder().figure()
    ax = fig.axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ['noisy', 'median', 'ours', 'too good']
    start = ax.get_xlim()[0]
    assert 0 < start < 21 and f'begins at {start:.3g}' in ax.get_xlabel()
    assert [bool(p.get_hatch()) for p in ax.patches] == [False, False, False, True]
    assert Ladder('LPIPS').floor('f', 0.4).add('m', 0.1).figure().axes[0].get_xlim()[0] >= 0
    assert (
        'begins' not in Ladder('LPIPS').floor('f', 0.4).add('m', 0.01).figure().axes[0].get_xlabel()
    )
    assert (
        Ladder().floor('f', 20.0).ceiling('perfect', math.inf).figure()
        and Ladder('delta').floor('f', 0.0).add('m', 0.0).figure()
    )
    matplotlib.pyplot.close('all')


# reads_truth --------------------------------------------------------------------------------------


class Net(nn.Module):
    "A restorer with dropout and a batch norm, sound by itself."

    def __init__(self, c=1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Dropout(0.5),
            nn.Conv2d(4, 1, 3, padding=1),
        )

    def forward(self, y):
        return self.body(y)


class SecondStage(Net):
    "Stage two is given the residual of the truth, as in training."

    def __init__(self):
        super().__init__(2)

    def forward(self, y, x):
        return y + self.body(torch.cat([y, x - y], 1))


class Cached(Net):
    "encode(x) fills a cache that decode reads."

    def encode(self, x):
        self.high = x - F.avg_pool2d(x, 3, 1, 1)

    def forward(self, y, x):
        self.encode(x)
        return self.body(y) + self.high


class Stale(Net):
    "Reads what the call before has left."

    high = 0

    def forward(self, y, x):
        out = self.body(y) + self.high
        self.high = x
        return out


class FirstOnly(Net):
    "Keeps the truth of the first call for ever."

    high = None

    def forward(self, y, x):
        if self.high is None:
            self.high = x.clone()
        return self.body(y) + self.high


class OptionalTruth(Net):
    def forward(self, y, x=None):
        return self.body(y) if x is None else self.body(y) * x.std()


def by_id():
    kept = {}
    return lambda y, x: y + kept.setdefault(id(x), x.mean())


def by_reference(y, x):
    return lambda y: y + 0.01 * (x - y)


LEAKS = {
    'stage two': lambda y, x: SecondStage(),
    'cache': lambda y, x: Cached(),
    'stale cache': lambda y, x: Stale(),
    'first call': lambda y, x: FirstOnly(),
    'optional truth': lambda y, x: OptionalTruth(),
    'cache by id': lambda y, x: by_id(),
    'by reference': by_reference,
    'mean only': lambda y, x: lambda y, x: y + x.mean(),
    'sorted values': lambda y, x: lambda y, x: y + x.flatten().sort().values.view_as(x),
    'sampler started at the truth': lambda y, x: lambda y, x: (x + torch.randn_like(x)).clamp(0, 1),
    'NaN': lambda y, x: lambda y, x: y / (x.sum() != 0),
    'in a dict': lambda y, x: lambda y, x: {'out': y, 'more': [y, (x,)]},
    'small': lambda y, x: lambda y, x: y + 1e-4 * x,
}
SOUND = {
    'net': lambda: Net(),
    'takes both': lambda: lambda y, x: y.sqrt(),
    'only the shape': lambda: lambda y, x: torch.ones(x.shape).to(y) * y.mean(),
    'sampler': lambda: lambda y, x: y + torch.randn_like(x),
    'numpy sampler': lambda: lambda y: y + float(np.random.rand()),
    'no signature': lambda: torch.sigmoid,
    'wrapped': lambda: nn.DataParallel(Net()) if not torch.cuda.is_available() else Net(),
    'lazy': lambda: nn.Sequential(nn.LazyConv2d(1, 1)),
    'truth times zero': lambda: lambda y, x: y + 0 * x,
    'labels': lambda: lambda y, x: y.argmax(1),
}


@pytest.mark.parametrize('device', DEVICES)
@fails(LEAKS)
def test_reads_truth_finds(make, device):
    y, x = rand(2, 1, 12, 12).to(device), rand(2, 1, 12, 12, seed=1).to(device)
    model, before = make(y, x), x.clone()
    if isinstance(model, nn.Module):
        model.to(device)
    report = reads_truth(model, y, x)
    assert (
        report
        and max(report.moved.values()) > 0
        and 'yes' in repr(report)
        and 'The truth is read' in report._repr_markdown_()
    )
    assert torch.equal(x, before)


@pytest.mark.parametrize('device', DEVICES)
@fails(SOUND)
def test_reads_truth_raises_no_false_alarm(make, device):
    y, x, model = rand(2, 1, 12, 12).to(device), rand(2, 1, 12, 12, seed=1).to(device), make()
    if isinstance(model, nn.Module):
        model.to(device)
    report = reads_truth(model, y, x)
    assert not report and not any(report.moved.values()) and 'The truth is not read' in report.says


def test_reads_truth_leaves_no_trace():
    net, y, x = Net(), rand(1, 1, 8, 8), rand(1, 1, 8, 8, seed=1)
    net.body[2].eval()
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    reads_truth(net, y, x)
    assert torch.rand(1) == expected[0] and np.random.rand() == expected[1]
    assert net.training and not net.body[2].training and net.body[1].num_batches_tracked == 0

    def breaks(y, x):
        raise RuntimeError('inside') if x.sum() == 0 else None

    before = x.clone()
    with pytest.raises((RuntimeError, TypeError)):
        reads_truth(breaks, y, x)
    assert torch.equal(x, before)
    assert reads_truth(
        lambda y, x: x, y, torch.zeros(1, 1, 1, 1).expand(1, 1, 8, 8)
    ) and reads_truth(lambda y, x: x, y, y)  # x that is y, x expanded
    assert not reads_truth(lambda y, x: y, y, y)


def test_reads_truth_bad_input():
    y, x = rand(1, 1, 8, 8), rand(1, 1, 8, 8, seed=1)
    own = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match='nothing changed'):
        reads_truth(lambda y, x: y + torch.rand(y.shape, generator=own), y, x)
    with pytest.raises(ValueError, match='nothing changed'):
        reads_truth(lambda y, x: y * math.nan, y, x)
    with pytest.raises(TypeError, match='x is torch.int64'):
        reads_truth(lambda y, x: y, y, x.long())
    with pytest.raises(TypeError, match='y is list'):
        reads_truth(lambda y, x: y, [y], x)
    with pytest.raises(TypeError, match='model is int'):
        reads_truth(3, y, x)
    with pytest.raises(TypeError, match='gave str'):
        reads_truth(lambda y, x: 'image', y, x)


# oracle_gap ---------------------------------------------------------------------------------------

X, Y = smooth_images(8, 24), (smooth_images(8, 24) + 0.1 * randn(8, 1, 24, 24)).clamp(0, 1)
blurred = F.avg_pool2d(X, 3, 1, 1)
GAPS = {
    'truth as condition': (lambda y, c: (y + c) / 2, X, Y),
    'noise residual': (lambda y, r: y + r, X - Y, torch.zeros_like(X)),
    'tokens of the truth': (
        lambda y, c: F.interpolate(c, 24),
        F.avg_pool2d(X, 2),
        F.avg_pool2d(Y, 2),
    ),
    'copies the truth': (lambda y, c: c, X, Y),
}
NO_GAPS = {
    'same inputs': (lambda y, c: (y + c) / 2, Y, Y),
    'ignores it': (lambda y, c: y, X, Y),
    'deployed is better': (lambda y, c: (y + c) / 2, Y, X),
    'sampler under one seed': (lambda y, c: y + 0.1 * torch.randn_like(y), X, Y),
    'noise of another draw': (
        lambda y, c: c,
        X + 0.1 * randn(8, 1, 24, 24, seed=5),
        X + 0.1 * randn(8, 1, 24, 24, seed=6),
    ),
}


@pytest.mark.parametrize(
    'metric',
    [
        psnr,
        ssim,
        pytest.param(
            type(
                'D', (), dict(name='MAE', __call__=lambda s, a, b: (a - b).abs().mean((1, 2, 3)))
            )(),
            id='mae',
        ),
    ],
)
@pytest.mark.parametrize('model, oracle, deployed', GAPS.values(), ids=list(GAPS))
def test_oracle_gap_finds(model, oracle, deployed, metric):
    report = oracle_gap(model, X, (Y, oracle), (Y, deployed), metric)
    assert (
        report
        and report.gap > 0
        and report.interval[0] > 0
        and 'deployment does not have' in report.problem
        and 'gap' in repr(report)
    )


@pytest.mark.parametrize('model, oracle, deployed', NO_GAPS.values(), ids=list(NO_GAPS))
def test_oracle_gap_raises_no_false_alarm(model, oracle, deployed):
    report = oracle_gap(model, X, (Y, oracle), (Y, deployed))
    assert not report and report.problem == '' and report.interval[0] <= 0


def test_oracle_gap_bad_input():
    one = oracle_gap(lambda y: y, X[:1], (X[:1],), (Y[:1],))
    assert not one and 'no interval' in one.says and one.gap > 0
    with pytest.raises(TypeError, match='oracle is Tensor'):
        oracle_gap(lambda y: y, X, X, (Y,))
    with pytest.raises(ValueError, match='deployed: the model gave'):
        oracle_gap(lambda y: y, X, (X,), (Y[..., :5],))
    with pytest.raises(ValueError, match='metric gave 1'):
        oracle_gap(lambda y: y, X, (X,), (Y,), lambda a, b: (a - b).mean())
    net = Net()
    oracle_gap(net, X, (X,), (Y,))
    assert net.training


# stateless ----------------------------------------------------------------------------------------


def haar(x):
    "An orthonormal codec: 2x2 Haar, (b, c, h, w) -> (b, 4c, h/2, w/2)."
    return torch.cat(
        [
            sum(
                s * x[..., i::2, j::2] for s, (i, j) in zip(signs, ((0, 0), (0, 1), (1, 0), (1, 1)))
            )
            / 2
            for signs in ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))
        ],
        1,
    )


def unhaar(z):
    a, h, v, d = z.chunk(4, 1)
    x = torch.empty(*a.shape[:2], 2 * a.shape[2], 2 * a.shape[3], dtype=z.dtype, device=z.device)
    for (i, j), s in zip(
        ((0, 0), (0, 1), (1, 0), (1, 1)), ((1, 1, 1), (-1, 1, -1), (1, -1, -1), (-1, -1, 1))
    ):
        x[..., i::2, j::2] = (a + s[0] * h + s[1] * v + s[2] * d) / 2
    return x


class Codec:
    def encode(self, x):
        return haar(x)

    def decode(self, z):
        return unhaar(z)


class HighBandsKept(Codec):
    "The wavelet codec whose latent is LL alone; the other bands wait on the object."

    def encode(self, x):
        z = haar(x)
        self.rest = z[:, 1:]
        return z[:, :1]

    def decode(self, z):
        return unhaar(torch.cat([z, self.rest], 1))


class RangeKept(Codec):
    "Normalises by the minimum and maximum of the last image, kept on the object."

    def encode(self, x):
        low, high = self.low, self.high = (
            x.min(),
            x.max(),
        )  # its own range into the latent, whoever else encodes meanwhile
        return (x - low) / (high - low)

    def decode(self, z):
        return z * (self.high - self.low) + self.low


class OncePopped(HighBandsKept):
    "Keeps a queue, so that encode, encode, decode answers in order; and fails in any other."

    def __init__(self):
        self.queue = []

    def encode(self, x):
        z = haar(x)
        self.queue.append(z[:, 1:])
        return z[:, :1]

    def decode(self, z):
        return unhaar(torch.cat([z, self.queue.pop()], 1))


class ReusedBuffer(Codec):
    "Returns a buffer that the next call overwrites."

    def encode(self, x):
        self.z = z = (
            getattr(self, 'z', None) if getattr(self, 'z', x).shape == haar(x).shape else haar(x)
        )
        z.copy_(haar(x))
        return z


class OutputBuffer(Codec):
    def decode(self, z):
        x = unhaar(z)
        self.out = getattr(self, 'out', None) if getattr(self, 'out', z).shape == x.shape else x
        return self.out.copy_(x)


class BatchRange(Codec):
    "The mean of the whole batch is taken off: an image depends on its companion."

    def encode(self, x):
        return haar(x - x.mean())


class Sampled(Codec):
    def encode(self, x):
        return haar(x) + 0.1 * torch.randn_like(haar(x))


class ByPlace(Codec):
    def decode(self, z):
        return unhaar(z) + 0.01 * torch.arange(len(z)).view(-1, 1, 1, 1)


class Clamps(Codec):
    def encode(self, x):
        return haar(x.mul_(2).sub_(1).clone())

    def decode(self, z):
        return unhaar(z) / 2 + 0.5


class ScalesLatent(Codec):
    def decode(self, z):
        return unhaar(z.mul_(2)) / 2


class Remembers(Codec):
    "A perfect round trip: decode returns what encode has seen."

    def encode(self, x):
        self.x = x
        return haar(x)

    def decode(self, z):
        return self.x


class Locked(Codec):
    "encode takes a lock that decode gives back."

    def __init__(self):
        self.lock = threading.Lock()

    def encode(self, x):
        self.lock.acquire()
        return haar(x)

    def decode(self, z):
        self.lock.release()
        return unhaar(z)


class FirstCall(Codec):
    "Takes its scale from the first images, after it has used another one for them."

    scale = 1.0

    def decode(self, z):
        out, self.scale = unhaar(z) * self.scale, 1.01
        return out


HIDDEN = {
    'bands kept': (HighBandsKept, 'order interleaved threads'.split()),
    'range kept': (RangeKept, ['order', 'interleaved', 'threads']),
    'queue': (OncePopped, ['order']),
    'buffer': (ReusedBuffer, ['order', 'interleaved']),
    'output buffer': (OutputBuffer, ['interleaved']),
    'batch mean': (BatchRange, ['batch companion']),
    'sampled': (Sampled, ['repeat']),
    'by place': (ByPlace, ['batch order']),
    'writes into its images': (Clamps, ['changes its input']),
    'writes into its latent': (ScalesLatent, ['changes its input']),
    'remembers': (Remembers, ['order', 'ignores the latent']),
    'calibrated': (FirstCall, ['repeat']),
}
PARTS = dict(
    tensor=Codec(),
    pair=(lambda x: (haar(x)[:, :1], haar(x)[:, 1:]), lambda z: unhaar(torch.cat(z, 1))),
    dict=(lambda x: dict(z=haar(x), shape=x.shape), lambda z: unhaar(z['z'])),
    range_in_latent=(
        lambda x: (x / x.amax((1, 2, 3), keepdim=True), [x.amax((1, 2, 3), keepdim=True)]),
        lambda z: z[0] * z[1][0],
    ),
    eight_bits=(lambda x: (haar(x) * 127).round().to(torch.int16), lambda z: unhaar(z / 127)),
    network=(nn.Conv2d(1, 4, 2, 2).requires_grad_(), nn.ConvTranspose2d(4, 1, 2, 2)),
)
A, B = rand(2, 1, 16, 16), rand(2, 1, 16, 16, seed=1)


@pytest.mark.parametrize('kind, names', HIDDEN.values(), ids=list(HIDDEN))
def test_stateless_names_hidden_state(kind, names):
    codec = kind()
    report = stateless(codec.encode, codec.decode, A, B, timeout=5)
    assert not report and set(names) <= set(report.failures), report.failures
    assert (
        all(d > 1e-5 and text for d, text in report.failures.values())
        and report.says.startswith('Hidden state')
        and names[0] in repr(report)
    )
    for r in report.rows:
        name, verdict = r['check'], r['verdict']
        failed = name in report.failures
        wanted = [f'FAILS: {report.failures[name][1]}'] if failed else ['ok', 'not run']
        assert verdict in wanted


@pytest.mark.parametrize('device', DEVICES)
@fails(PARTS)
def test_stateless_raises_no_false_alarm(make, device):
    encode, decode = make if isinstance(make, tuple) else (make.encode, make.decode)
    if isinstance(encode, nn.Module):
        encode.to(device)
        decode.to(device)
    report = stateless(
        encode, decode, A.to(device), B.to(device), tol=1e-4 if device == 'cuda' else 1e-5
    )
    assert report and report.failures == {} and report.says == 'No hidden state', report.failures


def test_stateless_only_in_place_failures():
    "A codec that is wrong in one way is named for that way alone."
    for kind in (Clamps, ScalesLatent):
        assert set(stateless(kind().encode, kind().decode, A, B).failures) == {'changes its input'}
    assert set(stateless(BatchRange().encode, BatchRange().decode, A, B).failures) == {
        'batch companion'
    }


def test_stateless_ends_when_the_codec_hangs():
    start, codec = time.monotonic(), Locked()
    report = stateless(codec.encode, codec.decode, A, B, timeout=0.2)
    assert (
        not report
        and 'no answer' in report.failures['order'][1]
        and time.monotonic() - start < 5
        and 'not run' in repr(report)
    )
    with pytest.raises(TimeoutError, match='no answer within 0.1 s'):
        stateless(lambda x: time.sleep(0.5), unhaar, A, B, timeout=0.1)


def test_stateless_bad_input():
    with pytest.raises(ValueError, match='a has shape'):
        stateless(haar, unhaar, A, B[:1])
    with pytest.raises(ValueError, match='same images'):
        stateless(haar, unhaar, A, A)
    with pytest.raises(TypeError, match='b is list'):
        stateless(haar, unhaar, A, [B])
    with pytest.raises(ZeroDivisionError):
        stateless(lambda x: 1 / 0, unhaar, A, B)


# parseval -----------------------------------------------------------------------------------------

half = (
    lambda x: haar(x)[:, :1],
    lambda z: unhaar(torch.cat([z, torch.zeros_like(z).repeat(1, 3, 1, 1)], 1)),
)
FOUR = {
    'haar': (Codec(), 1),
    'LL alone': (half, 0.25),
    'scaled': ((lambda x: haar(x) / 5, lambda z: unhaar(z * 5)), 25),
    'nested': (
        (
            lambda x: dict(a=haar(x)[:, :1], b=[haar(x)[:, 1:]]),
            lambda z: unhaar(torch.cat([z['a'], *z['b']], 1)),
        ),
        1,
    ),
}


@pytest.mark.parametrize('codec, gain', FOUR.values(), ids=list(FOUR))
@pytest.mark.parametrize('error', [1e-4, 1e-3])
def test_parseval_agrees_with_a_real_latent_error(codec, gain, error):
    encode, decode = codec if isinstance(codec, tuple) else (codec.encode, codec.decode)
    x = smooth_images()
    z = encode(x)
    measured = (
        -10
        * (
            decode(
                torch.utils._pytree.tree_map(lambda t: t + error**0.5 * randn(*t.shape, seed=7), z)
            )
            - x
        )
        .square()
        .mean()
        .log10()
    )
    report = parseval(error, codec, measured)
    assert (
        report
        and report.problem == ''
        and report.gain == pytest.approx(gain, rel=1e-3)
        and abs(report.gap) < 0.3
    )
    assert 'implied PSNR' in repr(report)


MISREAD = {
    'sampler diverges': (1e-4, 34, 'lower'),
    'scale forgotten': (1e-3, 30 - 14, 'lower'),
    'loss of the training input': (1e-2, 30, 'higher'),
    'truth leaks': (1e-3, 40, 'higher'),
    'just over 1 dB': (1e-3, 28.9, 'lower'),
}


@pytest.mark.parametrize('error, measured, word', MISREAD.values(), ids=list(MISREAD))
def test_parseval_names_a_gap(error, measured, word):
    report = parseval(error, Codec(), measured)
    assert (
        not report
        and f' dB {word} than' in report.problem
        and report.gap == pytest.approx(measured + 10 * math.log10(error), abs=1e-3)
    )


def test_parseval_knows_the_round_trip():
    report = parseval(0, half, 100)
    assert (
        not report
        and report.implied == pytest.approx(-10 * math.log10(report.round_trip))
        and 'higher' in report.problem
    )
    assert parseval(0, half, report.implied)
    per_image = parseval(torch.tensor([1e-3, 1e-4]), Codec(), torch.tensor([30.0, 40]))
    assert per_image and abs(per_image.gap) < 1e-2


def test_parseval_bad_input():
    for bad in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match='latent_mse'):
            parseval(bad, Codec(), 30)
    with pytest.raises(ValueError, match='measured_psnr'):
        parseval(1e-3, Codec(), math.inf)
    with pytest.raises(TypeError, match='codec is Identity'):
        parseval(1e-3, nn.Identity(), 30)
    with pytest.raises(ValueError, match='expected the same shape'):
        parseval(1e-3, (haar, haar), 30)
    with pytest.raises(TypeError, match='images is list'):
        parseval(1e-3, Codec(), 30, [1])


# identity_check -----------------------------------------------------------------------------------

to_signed, from_signed, to_bits = (
    lambda x: 2 * x - 1,
    lambda z: (z + 1) / 2,
    lambda x: (x * 255).round(),
)


def signed(metric, data_range):
    return lambda a, b: metric(2 * a - 1, 2 * b - 1, data_range)


def named(metric, name):
    metric.__name__ = name
    return metric


def naive_psnr(a, b, data_range):
    return 10 * (data_range**2 / (a - b).square().mean((1, 2, 3))).log10()  # looks at no range


BAD_CHAINS = {
    'not taken back': ((psnr, to_signed), {'identity'}),
    'taken back twice': ((psnr, to_signed, lambda z: from_signed(from_signed(z))), {'identity'}),
    'clamped on the model side': (
        (psnr, lambda x: to_signed(x).clamp(0, 1), from_signed),
        {'identity'},
    ),
    'truncated to bytes': ((psnr, lambda x: (x * 255).floor(), lambda z: z / 255), {'identity'}),
    'range of 1 for [-1, 1]': ((named(signed(naive_psnr, 1), 'psnr'),), {'known error'}),
    'range of 255 for [0, 1]': ((lambda a, b: psnr(a, b, 255),), {'known error', 'blind'}),
    'SSIM with 255': ((lambda a, b: ssim(a, b, 255),), {'blind'}),
    'SSIM not taken back': ((ssim, to_signed), {'identity'}),
    'a constant': ((lambda a, b: torch.ones(len(a)),), {'blind'}),
    'PSNR with a wrong factor': (
        (named(lambda a, b: psnr(a, b).clamp(max=200) / 2, 'psnr_half'),),
        {'known error'},
    ),
    'NaN': ((lambda a, b: torch.full((len(a),), math.nan),), {'identity', 'blind'}),
}
GOOD_CHAINS = {
    'nothing': (psnr,),
    'signed': (psnr, to_signed, from_signed),
    'range of 2 for [-1, 1]': (signed(psnr, 2), to_signed, from_signed),
    'ssim': (ssim, to_signed, from_signed),
    'standardised': (psnr, lambda x: (x - 0.45) / 0.22, lambda z: z * 0.22 + 0.45),
    'mse': (lambda a, b: (a - b).square().mean((1, 2, 3)),),
    'mae as a scalar': (lambda a, b: (a - b).abs().mean(),),
    'haar': (psnr, haar, unhaar),
    'ssim through 8 bits': (ssim, to_bits, lambda z: z / 255),
}


@pytest.mark.parametrize('args, names', BAD_CHAINS.values(), ids=list(BAD_CHAINS))
def test_identity_check_names_it(args, names):
    report = identity_check(*args)
    assert (
        not report
        and names <= set(report.failures)
        and all(report.failures.values())
        and all(f'{name}: {why}' in report.says for name, why in report.failures.items())
    ), report


@fails(GOOD_CHAINS)
def test_identity_check_raises_no_false_alarm(make):
    report = identity_check(*make)
    assert (
        report
        and report.failures == {}
        and report.ranges['input'] == pytest.approx((0.1, 0.9), abs=1e-4)
    ), report


def test_identity_check_through_bytes_and_its_figures():
    assert not identity_check(psnr, to_bits, lambda z: z / 255) and identity_check(
        psnr, to_bits, lambda z: z / 255, at_least=55
    )
    report = identity_check(psnr, to_signed, from_signed)
    assert (
        report.ranges['model side'] == pytest.approx((-0.8, 0.8), abs=1e-4)
        and 'model side' in repr(report)
        and report.scores['known error'] == pytest.approx(20, abs=0.01)
    )
    assert 'factor of 0.5' in identity_check(signed(naive_psnr, 1)).failures['known error']


def test_identity_check_says_the_score():
    "The sentence that is printed alone carries the number, in dB for a PSNR."
    report = identity_check(psnr, to_signed)
    score = report.scores['identity']
    assert f'identity: a perfect restoration scores {score:.2f} dB; expected at' in report.says


def test_identity_check_bad_input():
    with pytest.raises(ValueError, match=r'images span.*\[0, 1\]'):
        identity_check(psnr, images=to_signed(X))
    with pytest.raises(TypeError, match='images is list'):
        identity_check(psnr, images=[X])
    with pytest.raises(TypeError, match='model side is ndarray'):
        identity_check(psnr, lambda x: x.numpy())
    with pytest.raises(ValueError, match='the output has shape'):
        identity_check(psnr, haar)
    with pytest.raises(ValueError, match='the metric refused.*0 to 255.*model side'):
        identity_check(psnr, to_bits)


# compare ------------------------------------------------------------------------------------------


def runs(s, n, image, seed, rest, g, shift=0.0, common=None):
    common = torch.randn(n, generator=g) if common is None else common
    return (
        30
        + shift
        + 3 * common
        + image * torch.randn(n, generator=g)
        + seed * torch.randn(s, 1, generator=g)
        + rest * torch.randn(s, n, generator=g)
    )


def pair(s, n, image, seed, rest, g, shift=0.0):
    common = torch.randn(n, generator=g)
    return (runs(s, n, image, seed, rest, g, d, common) for d in (shift, 0.0))


FOUND = {
    'five seeds': dict(s=5, n=20, shift=2.0),
    'two seeds': dict(s=2, n=20, shift=4.0),
    'three images': dict(s=5, n=3, shift=5.0),
    'one seed': dict(s=1, n=20, shift=2.0),
}
NOT_FOUND = {
    'five seeds': dict(s=5, n=20),
    'two seeds': dict(s=2, n=20),
    'three images': dict(s=5, n=3),
    'one seed': dict(s=1, n=20),
    'one image': dict(s=5, n=1),
    'small': dict(s=3, n=10, shift=0.1),
}


@fails(FOUND)
def test_compare_finds(make):
    report = compare(
        *pair(g=torch.Generator().manual_seed(1), image=0.2, seed=0.2, rest=0.2, **make)
    )
    assert (
        bool(report) == ('ONE SEED' not in report.says)
        and report.difference == pytest.approx(make['shift'], abs=0.8)
        and report.interval[0] > 0
        and 'A is higher' in report.says
    )


@fails(NOT_FOUND)
def test_compare_does_not_find(make):
    report = compare(
        *pair(g=torch.Generator().manual_seed(1), image=0.3, seed=0.3, rest=0.3, **make)
    )
    assert (
        not report
        and report.interval[0] < 0 < report.interval[1]
        and 'not told apart' in report.says
        and report.resolvable > abs(report.interval[1] - report.interval[0]) / 2
    )
    assert ('ONE SEED' in report.says) == (make['s'] == 1) and ('ONE IMAGE' in report.says) == (
        make['n'] == 1
    )


@pytest.mark.parametrize('s, n', [(2, 3), (2, 40), (3, 10), (5, 3), (5, 40)])
@pytest.mark.parametrize('image, seed, rest', [(0.3, 0.3, 0.3), (0.6, 0.05, 0.1), (0.05, 0.5, 0.1)])
def test_compare_covers(s, n, image, seed, rest):
    """A nominal 95 % interval holds the true difference, 0, in 300 experiments;
    three standard errors of that count are 4 %."""
    g = torch.Generator().manual_seed(100 * s + n)
    reports = [compare(*pair(s, n, image, seed, rest, g), n_boot=300, seed=k) for k in range(300)]
    assert sum(not r for r in reports) / 300 >= 0.91


def test_compare_has_the_power_that_it_says():
    g = torch.Generator().manual_seed(0)
    least = np.mean(
        [compare(*pair(5, 20, 0.3, 0.3, 0.1, g), n_boot=300).resolvable for _ in range(50)]
    )
    found = np.mean(
        [bool(compare(*pair(5, 20, 0.3, 0.3, 0.1, g, shift=least), n_boot=300)) for _ in range(200)]
    )
    assert 0.7 < found < 0.93


def test_compare_knows_pairs_and_scores():
    g = torch.Generator().manual_seed(0)
    a = runs(4, 6, 0.1, 1.0, 0.01, g)
    b = a - 0.5 + 0.01 * torch.randn(4, 6, generator=g)
    assert not compare(a, b) and compare(a, b, paired_seeds=True)
    assert (
        compare(a, b).difference
        == compare(a.tolist(), b.numpy().tolist()).difference
        == pytest.approx(-compare(b, a).difference)
    )
    same = compare(a[:1], a[:1])
    assert not same and same.interval == (0, 0)
    pairs = {n: (rand(1, 16, 16, seed=k), rand(1, 16, 16, seed=k + 9)) for k, n in enumerate('abc')}
    s, t = evaluate(lambda y: y, pairs), evaluate(lambda y: y / 2 + 0.25, pairs)
    assert compare([t], [s]).difference == pytest.approx(t.mean['PSNR'] - s.mean['PSNR'], abs=1e-5)
    assert compare([t, t], s, metric='SSIM').difference == pytest.approx(
        t.mean['SSIM'] - s.mean['SSIM'], abs=1e-5
    )
    assert 'ONE SEED of A and B' in compare(t, s).says and repr(compare(t, s)) == repr(
        compare(t, s)
    )


def test_compare_bad_input():
    a = torch.rand(3, 4)
    with pytest.raises(ValueError, match='one image and one seed'):
        compare([[1.0]], [[2.0]])
    with pytest.raises(ValueError, match='runs_a holds 4 images, runs_b 3'):
        compare(a, a[:, :3])
    with pytest.raises(ValueError, match='3 seeds, runs_b 2'):
        compare(a, a[:2], paired_seeds=True)
    with pytest.raises(ValueError, match='runs_b holds values that are inf'):
        compare(a, a / 0)
    with pytest.raises(ValueError, match='runs_a holds 12 values that are NaN'):
        compare(a * math.nan, a)
    with pytest.raises(ValueError, match='level is 95'):
        compare(a, a, level=95)
    with pytest.raises(ValueError, match='runs_b is no number'):
        compare(a, [[1.0, 2], [3.0]])
    with pytest.raises(ValueError, match='different images'):
        compare(
            [evaluate(lambda y: y, {n: (rand(1, 16, 16), rand(1, 16, 16, seed=1))}) for n in 'ab'],
            a,
        )


def test_import_is_light():
    import subprocess, sys

    code = (
        'import sys, restore_lib.audit; '
        'heavy = "scipy lpips matplotlib accelerate skimage sklearn".split(); '
        'print([m for m in heavy if m in sys.modules])'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    if "No module named 'restore_lib.audit'" in done.stderr:
        pytest.skip('restore_lib.audit is not exported yet')
    assert done.stdout.strip() == '[]', done.stderr


# ------------------------------------------------- wrapped by accelerate, mixed precision
@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_checks_take_a_model_that_accelerate_wrapped(precision):
    from restore_lib.learner import Learner, ResidualCNN

    data = torch.utils.data.DataLoader([torch.rand(1, 16, 16) for _ in range(4)], 2)
    learn = Learner(
        ResidualCNN(width=8, depth=3),
        lambda m, x: (m(x) - x).square().mean(),
        data,
        precision=precision,
        cpu=True,
    )
    learn.fit(2)
    x = torch.rand(4, 1, 16, 16)
    y = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    assert not reads_truth(learn.model, y, x)
    assert oracle_gap(learn.model, x, oracle=(x,), deployed=(y,)).gap > 1
    assert not oracle_gap(learn.model, x, oracle=(y,), deployed=(y,)).problem
    kept = {f'module.{k}': v for k, v in learn.bare.state_dict().items()}
    assert load_report(learn.model, kept, rename={'module.': ''}).share == 1


# ------------------------------------------------- cases that once went wrong
def test_reads_truth_sees_a_cache_filled_at_the_first_call_of_a_function():
    kept, y, x = {}, torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8)

    def remembers(y, x):
        if 'mean' not in kept:
            kept['mean'] = x.mean()
        return y - y.mean() + kept['mean']

    assert (
        reads_truth(remembers, y, x)
        and 'at the first call'
        in reads_truth(lambda y, x, d={}: d.setdefault(0, x.clone()), y, x).moved
    )

    class Keeps:
        def __init__(self):
            self.first = None

        def __call__(self, y, x):
            self.first = x.clone() if self.first is None else self.first
            return self.first

    assert reads_truth(Keeps(), y, x)


def test_reads_truth_leaves_an_optional_second_argument_alone():
    class Timed(nn.Module):
        def forward(self, y, t=None):
            return y if t is None else y + t.mean()

    y, x = torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8)
    assert not reads_truth(Timed(), y, x) and not reads_truth(lambda y, scale=4: y * scale, y, x)


@pytest.mark.parametrize('kind', ['memo', 'ticket'])
def test_stateless_finds_a_latent_that_is_only_a_key(kind):
    store = {}

    def encode(x):
        z = nn.functional.avg_pool2d(x, 4) if kind == 'memo' else x.sum((1, 2, 3))
        for k in range(len(x)):
            store[z[k].numpy().tobytes()] = x[k].clone()
        return z

    def decode(z):
        blank = torch.zeros(1, 16, 16)
        return torch.stack([store.get(v.numpy().tobytes(), blank) for v in z])

    report = stateless(encode, decode, torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16))
    assert not report and list(report.failures) == ['a hair off']


@pytest.mark.parametrize('band', range(4))
def test_parseval_takes_an_error_in_one_band(band):
    h = torch.tensor([[1.0, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2
    bands = lambda x: torch.einsum('ij,bjhw->bihw', h, nn.functional.pixel_unshuffle(x, 2))
    pixels = lambda z: nn.functional.pixel_shuffle(torch.einsum('ji,bjhw->bihw', h, z), 2)
    x = nn.functional.interpolate(torch.rand(4, 1, 8, 8), size=64, mode='bicubic').clamp(
        0, 1
    ) + 0.01 * torch.randn(4, 1, 64, 64)
    scale = bands(x).std((0, 2, 3), keepdim=True)
    z = bands(x) / scale
    error = torch.zeros_like(z)
    error[:, band] = 0.1 * torch.randn_like(z[:, band])
    report = parseval(
        error.square().mean(),
        (lambda x: bands(x) / scale, lambda z: pixels(z * scale)),
        -10 * (pixels((z + error) * scale) - x).square().mean().log10(),
        images=x,
    )
    assert report and not report.problem and report.range[0] <= report.implied <= report.range[1]


def test_headroom_turns_one_minus_a_metric_round():
    assert headroom('1-SSIM', 0.3, 0.1, 0.2).share == pytest.approx(0.5) and headroom(
        '1 - LPIPS', 0.7, 0.9, 0.8
    ).share == pytest.approx(0.5)


# leak_probe ---------------------------------------------------------------------------------------


def probed(side=8, b=24):
    "Truths in [-1, 1], a hole, and a start that is grey in it."
    x, hole = 2 * rand(b, 1, side, side) - 1, torch.zeros(b, 1, side, side)
    hole[..., 2:6, 2:6] = 1
    return x, x * (1 - hole), hole


def at(t):
    return t[:, None, None, None]


def test_leak_probe_finds_what_divides_and_passes_what_guesses():
    x, start, hole = probed()
    reads = leak_probe(lambda z, t: z / (1 - at(t)).clamp(min=1e-3), x, start, hole)
    assert (
        not reads
        and reads.followed[0.98] == pytest.approx(1, abs=1e-3)
        and reads.correlation[0.5] == pytest.approx(1, abs=1e-4)
        and reads.correlation[1.0] == 0
    )
    assert (
        '100%' in repr(reads)
        and 'the start' in repr(reads)
        and torch.equal(reads.said[hole > 0], torch.zeros(int(hole.sum())))
    )
    known = 0.6 * x + 0.4 * randn(
        24, 1, 8, 8
    )  # an honest guess that correlates with the truth, the same at every t
    guess = leak_probe(lambda z, t: known, x, start, hole)
    assert (
        guess
        and guess.followed == {0.5: 0, 0.9: 0, 0.98: 0, 1.0: 0}
        and guess.correlation[0.98] == guess.correlation[1.0] > 0.5
    )


def test_leak_probe_compares_answers_not_inputs():
    """An untrained flow says v = 0, so that source - v is the source:
    sound, though z itself holds the truth."""
    x, start, hole = probed()
    assert leak_probe(lambda z, t: start, x, start, hole) and not leak_probe(
        lambda z, t: 40 * z, x, start, hole
    )


def test_leak_probe_passes_the_best_guess_under_noise():
    """Noise in the hole: E[x | z] of normal pixels follows the truth far from the start
    and not near it."""
    x, hole = randn(64, 1, 8, 8), torch.ones(64, 1, 8, 8)
    e = randn(64, 1, 8, 8, seed=1)
    best = lambda z, t: at((1 - t) / ((1 - t) ** 2 + t**2)) * z
    report = leak_probe(best, x, e, hole)
    assert (
        report
        and report.followed[0.5] == pytest.approx(0.5, abs=0.05)
        and report.followed[0.98] == pytest.approx(0.02**2 / (0.02**2 + 0.98**2), abs=0.01)
    )
    assert not leak_probe(best, x, e, hole, times=(0.1, 0.5), limit=0.4) and leak_probe(
        best, x, e, hole, times=(0.1, 0.5), limit=0.6
    )


def test_leak_probe_takes_a_path_and_a_linear_part():
    x, low = 2 * rand(16, 1, 8, 8) - 1, lambda v: F.interpolate(F.avg_pool2d(v, 2), scale_factor=2)
    fine = lambda v: v - low(v)  # what a blurred picture does not show
    reads, blind = (
        (lambda z, t: low(z) + fine(z) / (1 - at(t)).clamp(min=1e-3)),
        (lambda z, t: low(z)),
    )
    assert not leak_probe(reads, x, low(x), fine) and leak_probe(blind, x, low(x), fine)
    noisy = lambda x, e, t: x + at(t) * (e - x) + 3 * at(t) * randn(16, 1, 8, 8, seed=2)
    report = leak_probe(blind, x, low(x), fine, noisy)
    assert report.followed[0.98] == pytest.approx(0, abs=1e-6)


def test_leak_probe_runs_a_module_in_eval_mode_and_puts_it_back():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.modes = nn.Dropout(0.9), []

        def forward(self, z, t):
            self.modes.append(self.training)
            return self.drop(z) * 0

    x, start, hole = probed()
    net = Net()
    assert leak_probe(net, x, start, hole) and net.training and not any(net.modes)


@fails(
    dict(
        shape=(lambda p, x, s, h: p(None, x, s[..., :4], h), 'equal'),
        one=(lambda p, x, s, h: p(None, x[:1], s[:1], h[:1]), 'two pictures'),
        mask=(lambda p, x, s, h: p(None, x, s, h[:, 0]), 'hidden has shape'),
        empty=(lambda p, x, s, h: p(None, x, s, 0 * h), '0 everywhere'),
        times=(lambda p, x, s, h: p(None, x, s, h, times=(0.9, 0.5)), 'times is'),
        last=(lambda p, x, s, h: p(None, x, s, h, times=(0.5, 1.0)), 'times is'),
        none=(lambda p, x, s, h: p(None, x, s, h, times=()), 'times is'),
        alike=(lambda p, x, s, h: p(None, 0 * x, s, h), 'alike'),
    )
)
def test_leak_probe_refuses(make):
    call, says = make
    with pytest.raises(ValueError, match=says):
        call(leak_probe, *probed())


# what once was wrong without a word ---------------------------------------------------------------


def test_leak_probe_judges_a_share_by_its_size():
    x, start, hole = probed()
    turned = leak_probe(lambda z, t: -50 * z, x, start, hole)
    assert (
        not turned
        and turned.followed[0.98] == pytest.approx(-1, abs=1e-3)
        and '-100% of what changes' in turned.says
        and 'sign turned round' in turned.says
    )
    for share, sound in ((-0.03, True), (-0.2, True), (-0.3, False), (0.2, True), (0.3, False)):
        report = leak_probe(lambda z, t: share * z / (1 - at(t)), x, start, hole)
        assert (
            bool(report) == sound
            and report.followed[0.98] == pytest.approx(share, abs=1e-4)
            and ('turned' in report.says) == (share < -0.25)
        )
    assert leak_probe(
        lambda z, t: 0 * z, x, start, hole, times=np.array([0.5, 0.9]), limit=np.float32(0.5)
    )
    for kw in (dict(limit=-1), dict(limit=math.nan), dict(times=(math.nan, 0.5))):
        with pytest.raises(ValueError, match=next(iter(kw))):
            leak_probe(lambda z, t: z, x, start, hole, **kw)


class Scribbler(nn.Module):
    "Writes into whatever it is handed, and draws from every random state."

    def forward(self, *inputs):
        out = inputs[0].clone()
        for t in inputs:
            t.zero_()
        random.random()
        np.random.rand()
        torch.rand(1)
        return out


def scribbled(f):
    return lambda *a: (
        f(*a),
        [t.zero_() for t in a],
        random.random(),
        np.random.rand(),
        torch.rand(1),
    )[0]


SCRIBBLERS = dict(
    oracle_gap=lambda x, y: oracle_gap(
        Scribbler(), x, (x,), (y,), named(scribbled(lambda a, b: psnr(a, b)), 'psnr')
    ),
    leak_probe=lambda x, y: leak_probe(
        scribbled(lambda z, t: z.clone()),
        2 * x - 1,
        y,
        scribbled(lambda v: v.clone()),
        lambda x, e, t: e,
        times=(0.5, 0.9),
    ),
    identity_check=lambda x, y: identity_check(
        named(scribbled(lambda a, b: psnr(a, b)), 'psnr'),
        scribbled(lambda v: v.clone()),
        scribbled(lambda v: v.clone()),
        images=x,
    ),
    parseval=lambda x, y: parseval(
        1e-3, (scribbled(lambda v: v.clone()), scribbled(lambda z: z.clone())), 30.0, images=x
    ),
    stateless=lambda x, y: stateless(
        scribbled(lambda v: v.clone()), scribbled(lambda z: z.clone()), x, y
    ),
    reads_truth=lambda x, y: reads_truth(scribbled(lambda y, x: y.clone()), y, x),
)


@pytest.mark.parametrize('name', SCRIBBLERS)
def test_checks_hand_out_copies_and_keep_the_random_states(name):
    x, y = X.clone(), Y.clone()
    states = lambda: (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
    )
    before = states()
    SCRIBBLERS[name](x, y)
    assert torch.equal(x, X) and torch.equal(y, Y) and before == states()


def test_checks_that_write_find_the_same():
    assert oracle_gap(Scribbler(), X, (X * 0.99,), (Y,), psnr).gap == pytest.approx(
        oracle_gap(lambda v: v, X, (X * 0.99,), (Y,), psnr).gap
    )
    shares = [
        leak_probe(f, 2 * X - 1, 0 * X, torch.ones(8, 1, 24, 24)).followed[0.98]
        for f in (Scribbler(), lambda z, t: z)
    ]
    assert shares[0] == pytest.approx(shares[1]) == pytest.approx(0.02, abs=1e-4)
    codecs = [parseval(1e-3, (haar, f), 30.0).gain for f in (unhaar, scribbled(unhaar))]
    assert codecs[0] == codecs[1] == pytest.approx(1, abs=0.05)


def test_numbers_of_numpy_and_numbers_that_are_none():
    a, b = randn(3, 5), randn(4, 5, seed=1)
    plain = compare(a, b, seed=3, n_boot=500)
    assert (
        compare(
            a.numpy(), b.numpy(), seed=np.int64(3), n_boot=np.int32(500), level=np.float64(0.95)
        ).interval
        == plain.interval
    )
    for kw in (
        dict(n_boot=1),
        dict(n_boot=0),
        dict(n_boot=-5),
        dict(n_boot=2.5),
        dict(seed=0.5),
        dict(seed=math.nan),
        dict(level=math.nan),
        dict(power=math.nan),
    ):
        with pytest.raises(ValueError, match=next(iter(kw)) + ' is'):
            compare(a, b, **kw)
    for call, name in (
        (lambda: reads_truth(lambda y: y, Y, X, seed=0.5), 'seed'),
        (lambda: parseval(1e-3, (haar, unhaar), 30.0, seed=math.nan), 'seed'),
        (lambda: oracle_gap(lambda y: y, X, (X,), (Y,), seed=0.5), 'seed'),
        (lambda: stateless(haar, unhaar, A, B, tol=-1), 'tol'),
        (lambda: stateless(haar, unhaar, A, B, tol=math.nan), 'tol'),
        (lambda: stateless(haar, unhaar, A, B, timeout=0), 'timeout'),
        (lambda: identity_check(psnr, at_least=math.nan), 'at_least'),
    ):
        with pytest.raises(ValueError, match=name + ' is'):
            call()
    assert reads_truth(lambda y, x: y + x, Y, X, seed=np.int64(0)) and stateless(
        haar, unhaar, A, B, tol=np.float32(1e-5), timeout=np.int64(60)
    )


def test_oracle_gap_refuses_a_truth_out_of_range_and_scores_that_are_none():
    with pytest.raises(ValueError, match=r'x spans.*\[-1, 1\]'):
        oracle_gap(lambda y: y, 2 * X - 1, (X,), (Y,))
    for value in (math.nan, -math.inf):
        with pytest.raises(ValueError, match='oracle: metric gave'):
            oracle_gap(
                lambda y: y, X, (X,), (Y,), named(lambda a, b: torch.full((len(a),), value), 'm')
            )
        with pytest.raises(ValueError, match='oracle: metric gave'):
            oracle_gap(
                lambda y: y,
                X[:1],
                (X[:1],),
                (Y[:1],),
                named(lambda a, b: torch.full((len(a),), value), 'm'),
            )


def test_a_ladder_of_single_runs_has_no_empty_column():
    ladder = Ladder().floor('y', [20.0, 25.0]).add('ours', [31.0, 33.0])
    assert 'spread' not in ladder.table().columns
    assert 'spread' in ladder.add('twice', [[31.0, 33.0]] * 2).table().columns


def test_a_ladder_names_a_mean_that_one_perfect_image_makes_infinite():
    ladder = (
        Ladder()
        .floor('y', [20.0, 25.0, 30.0])
        .add('ours', [[31.0, math.inf, 33.0], [31.0, 32.0, 33.0]])
        .ceiling('top', [math.inf, 40.0, 41.0])
    )
    assert (
        ladder.problems == ['ours: infinite for 1 of 3 images, and so is the mean']
        and ladder.table().rows[1]['spread'] is None
    )
    assert (
        Ladder().floor('y', [20.0, math.inf]).add('ours', 30.0).problems[0]
        == 'y: infinite for 1 of 2 images, and so is the mean'
    )
    assert (
        Ladder()
        .floor('y', [20.0, 25.0])
        .add('ours', [math.inf, math.inf])
        .ceiling('top', math.inf)
        .problems
        == []
    )
