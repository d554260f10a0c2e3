"""What lesson 20 does not teach: derivatives against finite differences and hand-made formulas,
the exact shares of time pairs, guidance, precision, several processes, bad input."""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from common import ROOT, gen, saved
from flow_toys import E, NETS, PICTURES, T, Told, X, FLOW, close, dit, pair, stirred, unet, wide
from torch import nn

from restore_lib.dit import DiT
from restore_lib.dit_parts import FlowUNet
from restore_lib.flow_parts import (
    FlowStep,
    Folded,
    FromClean,
    RawError,
    draw_times,
    flow_learner,
)
from restore_lib.meanflow import (
    AlphaFlow,
    AlphaSchedule,
    FlowMatching,
    MeanFlow,
    PixelMeanFlow,
    Regression,
    adaptive_weight,
    alpha_at,
    straight_path,
)

pytestmark = pytest.mark.usefixtures('seed')


# the path and the times ---------------------------------------------------------------------------


def test_path_goes_from_target_to_source_at_constant_speed():
    x, e = pair()
    assert torch.equal(straight_path(x, e, torch.zeros(4))[0], x) and close(
        straight_path(x, e, torch.ones(4))[0], e
    )
    z, v = straight_path(x, e, torch.full((4,), 0.3))
    assert (
        close(z, 0.7 * x + 0.3 * e)
        and torch.equal(v, e - x)
        and straight_path(x[:, 0, 0, :2], e[:, 0, 0, :2], torch.rand(4))[0].shape == (4, 2)
    )


@pytest.mark.parametrize(
    'b, equal, start',
    [(32, 0.5, 0), (32, 0.25, 0.25), (64, 0.75, 0.5), (8, 0, 0), (8, 1, 1), (16, 1, 0.5)],
)
def test_whole_shares_are_exact_in_every_batch(b, equal, start):
    for s in range(30):
        t, r = draw_times(b, equal, start, generator=gen(s))
        assert (
            (t == r).sum() == equal * b
            and (t == 1).sum() == start * b
            and (r <= t).all()
            and (r >= 0).all()
            and (t <= 1).all()
        )


@pytest.mark.parametrize('b, share', [(10, 0.25), (3, 0.5), (1, 0.3)])
def test_other_shares_are_right_on_average_and_off_by_less_than_one(b, share):
    n = torch.tensor(
        [
            (lambda t, r: (t == r).sum())(*draw_times(b, share, generator=gen(s)))
            for s in range(2000)
        ]
    ).double()
    assert (n - share * b).abs().max() < 1 and n.mean() == pytest.approx(
        share * b, abs=4 * n.std().item() / 2000**0.5 + 1e-9
    )


def test_equal_and_start_are_independent_and_half_of_the_starts_reach_zero():
    t, r = (
        torch.cat(v)
        for v in zip(*(draw_times(64, 0.5, 0.25, generator=gen(s)) for s in range(400)))
    )
    at_start = t == 1
    assert ((t == r) & at_start).float().mean() == pytest.approx(0.125, abs=0.01)
    assert (r[at_start & (r < t)] == 0).float().mean() == pytest.approx(0.5, abs=0.02) and not (
        r[~at_start] == 0
    ).any()
    assert (t == r)[::2].float().mean() == pytest.approx(
        0.5, abs=0.02
    )  # any place of the batch may have it


def test_times_are_ordered_logit_normals():
    t, r = draw_times(200_000, 0.0, 0.0, -0.4, 1.0, gen())
    u = torch.sigmoid(-0.4 + torch.randn(2, 200_000, generator=gen(1)))
    for mine, theirs in ((t, u.amax(0)), (r, u.amin(0))):
        q = torch.linspace(0.05, 0.95, 10)
        assert close(mine[:100_000].quantile(q), theirs[:100_000].quantile(q), atol=0.01)
    single = draw_times(100_000, 1.0, 0.0, 0.0, 0.5, gen(2))[0]
    assert single.logit().mean() == pytest.approx(
        0.5 * 1 / math.pi**0.5, abs=0.02
    )  # the larger of two normals of deviation 0.5


def test_two_permutations_would_miss_the_share():
    "As the public code does: r = t of one permutation, of which a second one hides a part."
    t, r = draw_times(100_000, 0.5, generator=gen())
    assert (t == r).float().mean() == 0.5


# the derivative -----------------------------------------------------------------------------------


@pytest.mark.parametrize('way', ['jvp', 'double'])
@pytest.mark.parametrize('name', NETS)
def test_derivative_against_finite_differences(name, way):
    flow = MeanFlow(NETS[name]().double(), way=way)
    x, e = pair(dtype=torch.float64)
    t, r = (
        torch.tensor([0.3, 0.6, 0.9, 0.5], dtype=torch.float64),
        torch.tensor([0.1, 0.6, 0.0, 0.2], dtype=torch.float64),
    )
    z, v = straight_path(x, e, t)
    u, du = flow.derivative(z, v, t, r)
    h = 1e-7  # DiT's fastest sine turns 1,000 times from t = 0 to 1
    with torch.no_grad():
        numeric = (
            flow.net(z + h * v, t + h, r) - flow.net(z - h * v, t - h, torch.minimum(r, t - h))
        ) / (2 * h)
    keep = r < t  # at r = t the numeric one would need r > t
    assert (
        close(du[keep], numeric[keep], 1e-6, 1e-6)
        and close(u, flow.net(z, t, r))
        and du.abs().max() > 1e-3
    )


def test_both_ways_give_the_same_loss_and_gradient():
    nets = [unet(), None]
    nets[1] = copy.deepcopy(nets[0])
    x, e = pair()
    t, r = draw_times(4, 0.5, generator=gen())
    losses = [MeanFlow(n, way=w)(x, e, t=t, r=r) for n, w in zip(nets, ('jvp', 'double'))]
    for loss in losses:
        loss.mean.backward()
    assert close(losses[0].mean, losses[1].mean) and close(losses[0].raw, losses[1].raw)
    assert all(
        close(p.grad, q.grad, 1e-6) for p, q in zip(nets[0].parameters(), nets[1].parameters())
    )


def test_only_times_with_r_below_t_are_differentiated():
    net, (x, e) = Told(lambda z, t, r, *_: z.square() + wide(t) * 3), pair()
    t, r = torch.tensor([0.3, 0.6, 0.9, 1.0]), torch.tensor([0.3, 0.6, 0.2, 1.0])
    z, v = straight_path(x, e, t)
    got = MeanFlow(net).target(z, v, t, r)
    assert (
        [len(c['t']) for c in net.calls] == [1]
        and torch.equal(got[[0, 1, 3]], v[[0, 1, 3]])
        and close(got, MeanFlow(net, way='double').target(z, v, t, r))
    )
    net.calls.clear()
    assert torch.equal(MeanFlow(net).target(z, v, t, t), v) and not net.calls


def test_target_picks_the_labels_and_conditions_of_its_times():
    net = Told(lambda z, t, r, label, cond: wide(t * label) * z + cond * wide(t), classes=3)
    (x, e), label, cond = pair(), torch.tensor([0, 1, 2, 3]), torch.rand(4, 1, 8, 8)
    t, r = torch.tensor([0.3, 0.6, 0.9, 1.0]), torch.tensor([0.3, 0.1, 0.9, 0.0])
    z, v = straight_path(x, e, t)
    want = v - wide(t - r) * (wide(t * label) * v + wide(label) * z + cond)
    assert close(MeanFlow(net).target(z, v, t, r, label, cond), want)


def test_target_is_the_formula_and_has_no_gradient():
    net = Told(lambda z, t, r, *_: z.square() + wide(t) * 3 + wide(r) ** 2)
    x, e = pair()
    t, r = torch.tensor([0.3, 0.6, 0.9, 1.0]), torch.tensor([0.1, 0.6, 0.2, 0.0])
    z, v = straight_path(x, e, t)
    target = MeanFlow(net).target(z, v, t, r)
    assert close(target, v - wide(t - r) * (2 * z * v + 3)) and not target.requires_grad
    assert close(MeanFlow(net, way='double').target(z, v, t, r), target)
    assert torch.equal(FlowMatching(net).target(z, v, t, t), v)


def test_average_velocity_of_a_known_field_has_no_error():
    """x is one point c: v = (z - c)/t, and the average over any r is (z - c)/t, too:
    the identity must give raw error 0."""
    net = Told(lambda z, t, r, *_: (z - 0.3) / wide(t))
    x, e = torch.full((6, 1, 4, 4), 0.3), pair(6, 4)[1]
    t, r = draw_times(6, 0.5, 0.3, generator=gen())
    loss = MeanFlow(net)(x, e, t=t, r=r)
    assert (
        loss.raw.max() < 1e-8
        and close(MeanFlow(net).sample(e, 1), x)
        and close(MeanFlow(net).sample(e, 3), x)
    )


def test_average_velocity_of_a_curved_field():
    """Two normals: x of deviation s, e of deviation 1, independent. The flow multiplies by
    q(t) = sqrt((1-t)^2 s^2 + t^2); its average velocity solves the identity,
    the velocity itself does not."""
    s = 0.2
    q = lambda t: ((1 - t) ** 2 * s * s + t * t).sqrt()
    speed = lambda t: (t - (1 - t) * s * s) / q(t) ** 2
    average = Told(
        lambda z, t, r, *_: torch.where(
            wide(t - r) > 1e-6,
            z * wide((1 - q(r) / q(t)) / (t - r).clamp(min=1e-6)),
            z * wide(speed(t)),
        )
    ).double()
    e = torch.randn(2000, 1, 1, 1, generator=gen()).double()
    assert MeanFlow(average).sample(e, 1).std() == pytest.approx(s, rel=0.05) and close(
        MeanFlow(average).sample(e, 1), MeanFlow(average).sample(e, 5)
    )
    instant = Told(lambda z, t, r, *_: z * wide(speed(t))).double()
    assert FlowMatching(instant).sample(e, 1).abs().max() < 1e-6 and FlowMatching(instant).sample(
        e, 400
    ).std() == pytest.approx(s, rel=0.05)
    t, r = torch.full((2000,), 0.8).double(), torch.full((2000,), 0.3).double()
    z = q(t)[0] * e
    flow_v = z * wide(speed(t))  # along the flow itself, not towards one x
    for net, right in ((average, True), (instant, False)):
        off = (MeanFlow(net).target(z, flow_v, t, r) - net(z, t, r)).abs().mean()
        assert (off < 1e-6) == right and (right or off > 0.01)


# losses -------------------------------------------------------------------------------------------


def test_weights_and_reductions():
    error = torch.tensor([0.0, 0.5, 40.0])
    assert close(adaptive_weight(error, 1.0, 0.01) * error, error / (error + 0.01)) and torch.equal(
        adaptive_weight(error, 0.0), torch.ones(3)
    )
    assert not adaptive_weight(error.requires_grad_(), 0.5).requires_grad
    net, (x, e), times = unet(), pair(), dict(t=torch.full((4,), 0.7), r=torch.full((4,), 0.2))
    n = x[0].numel()
    by_sum, by_mean = (
        MeanFlow(net, c=0.01, reduce='sum')(x, e, **times),
        MeanFlow(net, c=0.01 / n, reduce='mean')(x, e, **times),
    )
    assert close(by_sum.mean, by_mean.mean) and torch.equal(
        by_sum.raw, by_mean.raw
    )  # with p = 1, c/n for means is c for sums
    assert (
        MeanFlow(net, c=0.01, reduce='mean')(x, e, **times).mean < by_sum.mean - 1e-3 * by_sum.mean
    )
    plain = MeanFlow(net, power=0, reduce='mean')(x, e, **times)
    assert close(plain.mean, plain.raw.mean())
    half = MeanFlow(net, power=0.5, c=0.1, reduce='sum')(x, e, **times)
    assert close(half.mean, (n * half.raw / (n * half.raw + 0.1).sqrt()).mean())


def test_weighted_loss_sits_at_one_and_raw_does_not():
    x, e = pair()
    losses = [
        MeanFlow(stirred(unet(), by))(x, e, t=torch.full((4,), 0.9), r=torch.zeros(4))
        for by in (0.0, 0.3)
    ]
    assert (
        all(l.mean.item() == pytest.approx(1, abs=1e-3) for l in losses)
        and losses[1].raw.mean() > 3 * losses[0].raw.mean()
    )


@pytest.mark.parametrize('make', [FlowMatching, MeanFlow, Regression])
def test_overfits_one_batch(make):
    flow = make(unet(), **({} if make is Regression else dict(start=0.25)))
    x = torch.stack([torch.full((1, 8, 8), v) for v in (-1.0, 1.0)])
    e = torch.stack([torch.full((1, 8, 8), v) for v in (-0.4, 0.4)])
    opt = torch.optim.Adam(flow.parameters(), 5e-3)
    for k in range(120):
        opt.zero_grad()
        flow(x.repeat(8, 1, 1, 1), e.repeat(8, 1, 1, 1), generator=gen(k)).mean.backward()
        opt.step()
    steps = {FlowMatching: 8}.get(make, 1)
    assert (flow.sample(e, steps) - x).abs().mean() < 0.2 < (e - x).abs().mean()


def test_regression_asks_at_the_start_only():
    net = Told(lambda z, t, r, *_: z)
    x, e = pair()
    loss = Regression(net)(x, e)
    assert (
        (net.calls[0]['t'] == 1).all()
        and (net.calls[0]['r'] == 0).all()
        and torch.equal(net.calls[0]['z'], e)
    )
    assert close(loss.raw, x.square().flatten(1).mean(1)) and torch.equal(
        Regression(net).sample(e, 16), e - e
    )


def test_flow_matching_tells_r_equal_to_t_and_meanflow_the_end_of_the_step():
    for make, r in ((FlowMatching, [1.0, 0.75, 0.5, 0.25]), (MeanFlow, [0.75, 0.5, 0.25, 0.0])):
        net = Told(lambda z, t, r, *_: torch.ones_like(z))
        out = make(net).sample(pair()[1], 4)
        assert [c['t'][0].item() for c in net.calls] == [1.0, 0.75, 0.5, 0.25] and [
            c['r'][0].item() for c in net.calls
        ] == r
        assert close(out, pair()[1] - 1) and net.training  # and the mode is put back


def test_walk_gives_every_step():
    points = list(
        FlowMatching(Told(lambda z, t, r, *_: torch.ones_like(z))).walk(torch.zeros(2, 3), 4)
    )
    assert [t for t, _ in points] == [0.75, 0.5, 0.25, 0.0] and close(
        torch.stack([z[0, 0] for _, z in points]), torch.tensor([-0.25, -0.5, -0.75, -1.0])
    )


# labels and guidance ------------------------------------------------------------------------------


def test_guidance_is_the_formula_and_dropped_labels_keep_the_velocity():
    base = torch.tensor([2.0, -1.0, 5.0])  # what it says for class 0, class 1, no label
    net = Told(
        lambda z, t, r, label, cond: (
            torch.ones_like(z) * wide(base[torch.full((len(z),), 2) if label is None else label])
        ),
        classes=2,
    )
    x, e = pair(3)
    label, t = torch.tensor([0, 1, 2]), torch.full((3,), 0.5)
    z, v = straight_path(x, e, t)
    flow = MeanFlow(net, omega=2.0, kappa=0.5)
    want = torch.cat(
        [2 * v[:1] + (1 - 2 - 0.5) * 5 + 0.5 * 2, 2 * v[1:2] - 1.5 * 5 + 0.5 * -1, v[2:]]
    )
    assert (
        close(flow.guided(z, v, t, label), want)
        and torch.equal(flow.guided(z, v, t, None), v)
        and torch.equal(MeanFlow(net).guided(z, v, t, label), v)
    )


def test_guided_velocity_is_the_direction_of_the_derivative():
    net = Told(lambda z, t, r, label, cond: 2 * z + wide(label.float()), classes=2)
    x, e = pair(2)
    label, t, r = torch.tensor([0, 1]), torch.full((2,), 0.8), torch.full((2,), 0.3)
    z, v = straight_path(x, e, t)
    flow = MeanFlow(net, omega=3.0)
    v_g = 3 * v - 2 * (2 * z + 2)
    assert close(flow.guided(z, v, t, label), v_g) and close(
        flow.target(z, v, t, r, label), v_g - 0.5 * 2 * v_g, 1e-4
    )


def test_labels_are_dropped_in_training_only():
    net = unet(classes=10, label_drop=1.0)
    x, e = pair()
    label, times, seen = torch.arange(4), dict(t=torch.full((4,), 0.5), r=torch.full((4,), 0.2)), []
    net.net.register_forward_pre_hook(lambda m, args: seen.append(args[3]))
    flow = MeanFlow(net)
    flow(x, e, label, **times)
    assert all((s == 10).all() for s in seen)
    seen.clear()
    flow.eval()
    flow(x, e, label, **times)
    assert all(torch.equal(s, label) for s in seen)


# precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', NETS)
def test_bf16_keeps_the_derivative_in_float32(name):
    net, (x, e) = NETS[name](), pair()
    flow, times = MeanFlow(net), dict(t=torch.full((4,), 0.9), r=torch.full((4,), 0.1))
    exact = flow(x, e, **times)
    z, v = straight_path(x, e, times['t'])
    want = flow.target(z, v, **times)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        got, loss = flow.target(z, v, **times), flow(x, e, **times)
        assert torch.equal(got, want) and got.dtype == torch.float32
    loss.mean.backward()
    assert (
        loss.raw.dtype == torch.float32
        and close(loss.raw, exact.raw, 0, 0.05)
        and all(
            p.grad is not None and torch.isfinite(p.grad).all()
            for p in net.parameters()
            if p.requires_grad
        )
    )


# several processes --------------------------------------------------------------------------------

TWO = '''
import copy, os, sys, torch
from torch import nn
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[4])
from restore_lib.dit_parts import FlowUNet
from restore_lib.meanflow import MeanFlow, straight_path
rank, folder, world = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store = f'file://{folder}/store'
torch.distributed.init_process_group('gloo', init_method=store, rank=rank, world_size=world)
torch.manual_seed(0)
flow = MeanFlow(FlowUNet(base=4, mults=(1, 2), waves=8, scale=.3), power=0, reduce='mean')
with torch.no_grad():
    for p in flow.parameters(): p.add_(.1*torch.randn(p.shape))
x, e = torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
t, r = torch.tensor([.9, .4, .7, .6]), torch.tensor([.2, .4, .1, .3])
mine = slice(rank*4//world, (rank + 1)*4//world)
x, e, t, r = x[mine], e[mine], t[mine], r[mine]
grads = lambda: [p.grad.clone() for p in flow.net.parameters()]
wrapped = nn.parallel.DistributedDataParallel(flow)
for _ in range(2):
    flow.zero_grad()
    wrapped(x, e, t=t, r=r).mean.backward()
ours = grads()
z, v = straight_path(x, e, t)
def by_hand(broadcast, inside):
    "The same loss with jvp called outside, of a wrapped copy of the network or of what it wraps."
    net = copy.deepcopy(flow.net)
    net.zero_grad()
    parallel = nn.parallel.DistributedDataParallel(net, broadcast_buffers=broadcast)
    f, along = parallel.module if inside else parallel, (v, torch.ones_like(t), torch.zeros_like(r))
    u, du = torch.func.jvp(f, (z, t, r), along)
    (u - (v - (t - r)[:, None, None, None]*du).detach()).square().mean().backward()
    return [p.grad.clone() for p in net.parameters()]
refused = ''
try: by_hand(True, False)
except RuntimeError as error: refused = str(error)
trap, wrapper = by_hand(True, True), by_hand(False, False)
found = dict(ours=ours, trap=trap, wrapper=wrapper, refused=refused)
torch.save(found, f'{folder}/{world}_{rank}.pt')
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)
'''


def test_two_processes_share_their_gradients_and_a_jvp_of_the_bare_network_does_not(tmp_path):
    """The loss in forward gives the gradient of one process with the whole batch. torch.func.jvp of
    the wrapper is refused aloud where buffers are shared (and in sync, in this torch, where they
    are not); the way out that suggests itself, the network inside, silently leaves each process
    its own gradient."""
    (tmp_path / 'two.py').write_text(TWO)
    found = {}
    for world in (1, 2):
        (tmp_path / 'store').unlink(missing_ok=True)
        jobs = [
            subprocess.Popen(
                [
                    sys.executable,
                    '-W',
                    'ignore',
                    str(tmp_path / 'two.py'),
                    str(k),
                    str(tmp_path),
                    str(world),
                    str(ROOT),
                ],
                stderr=subprocess.PIPE,
                text=True,
                env=dict(os.environ, OMP_NUM_THREADS='1'),
            )
            for k in range(world)
        ]
        errors = [job.communicate(timeout=120)[1] for job in jobs]
        assert not any(job.returncode for job in jobs), errors[0][-3000:]
        found[world] = [
            torch.load(tmp_path / f'{world}_{k}.pt', weights_only=True) for k in range(world)
        ]
    whole, (a, b) = found[1][0], found[2]
    gap = lambda p, q: max((u - v).abs().max().item() for u, v in zip(p, q))
    size = max(g.abs().max().item() for g in whole['ours'])
    assert gap(a['ours'], b['ours']) == 0 and gap(a['ours'], whole['ours']) < 1e-4 * size
    assert gap(whole['trap'], whole['ours']) < 1e-4 * size  # alone, there is nothing to notice
    assert gap(a['trap'], b['trap']) > 0.01 * size  # the trap
    assert gap(a['wrapper'], b['wrapper']) < 1e-4 * size and 'in-place' in a['refused']
    mean = [(u + v) / 2 for u, v in zip(a['trap'], b['trap'])]
    assert gap(mean, whole['ours']) < 1e-4 * size


def test_folded_is_the_network_on_folded_pixels():
    net = stirred(FlowUNet(4, base=8, mults=(1, 2), cond_channels=4, classes=3))
    z, t = pair()[0], torch.rand(4)
    want = F.pixel_shuffle(
        net(F.pixel_unshuffle(z, 2), t, t / 2, torch.arange(4) % 3, F.pixel_unshuffle(-z, 2)), 2
    )
    assert (
        torch.equal(Folded(net)(z, t, t / 2, torch.arange(4) % 3, -z), want)
        and Folded(net).classes == 3
    )


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda: MeanFlow(unet())(X, E, t=T + 0.6, r=T), ValueError, 't holds 1.1'),
        (lambda: MeanFlow(unet())(X, E, t=T - 0.6, r=T - 0.6), ValueError, 't holds -0.1'),
        (lambda: MeanFlow(unet())(X, E, t=T, r=T + 0.1), ValueError, 'r exceeds t by 0.1'),
        (lambda: MeanFlow(unet())(X, E, t=T, r=T - 0.6), ValueError, 'r holds -0.1'),
        (lambda: MeanFlow(Told(lambda z, *_: z))(X, E, t=T, r=T + 0.1), ValueError, 'r exceeds t'),
        (lambda: FlowMatching(unet())(X, E, t=T[:2]), ValueError, r't has shape \(2,\)'),
        (lambda: FlowMatching(unet(classes=10))(X, E, torch.full((4,), 11)), ValueError, '0 to 9'),
        (lambda: FlowMatching(unet())(X, E, torch.zeros(4).long()), (ValueError), 'classes'),
        (lambda: FlowMatching(unet())(X, E[:3]), ValueError, 'e has'),
        (lambda: FlowMatching(unet())(X, E / 0 * 0), ValueError, 'e holds 256 values that are NaN'),
        (lambda: FlowMatching(unet())(X.long(), E), TypeError, 'x is torch.int64'),
        (lambda: FlowMatching(unet())(X[..., :7], E[..., :7]), ValueError, 'fold=2'),
        (
            lambda: MeanFlow(dit())(torch.rand(4, 1, 6, 6), torch.rand(4, 1, 6, 6)),
            ValueError,
            'patch',
        ),
        (lambda: FlowMatching(unet()).sample(E, 0), ValueError, 'steps is 0'),
        (lambda: FlowMatching(unet()).sample(E, 1.5), ValueError, 'steps is 1.5'),
        (lambda: draw_times(8, 1.2), ValueError, 'equal is 1.2'),
        (lambda: draw_times(0), ValueError, 'b is 0'),
        (lambda: draw_times(8, start=-1), ValueError, 'start is -1'),
        (lambda: MeanFlow(unet(), equal=2), ValueError, 'equal is 2'),
        (lambda: MeanFlow(unet(), way='vjp'), ValueError, 'way is'),
        (lambda: MeanFlow(unet(), omega=-1), ValueError, 'omega is -1'),
        (lambda: MeanFlow(unet(), kappa=math.nan), ValueError, 'kappa is nan'),
        (lambda: MeanFlow(unet(), power=-1), ValueError, 'power is -1'),
        (lambda: MeanFlow(unet(), reduce='max'), ValueError, 'reduce is'),
        (lambda: FlowMatching(unet(), start=1.5), ValueError, 'start is 1.5'),
        (lambda: straight_path(X, E, T + 1), ValueError, r'times in \[0, 1\]'),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize('way', ['jvp', 'double'])
@pytest.mark.parametrize('label', [False, True])
def test_fused_attention_is_named_before_any_work(way, label):
    net = dit(fused=True, classes=3 if label else None)
    calls = []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    flow = MeanFlow(net, way=way, omega=2.0)
    with pytest.raises(ValueError, match=r'net has fused attention \(blocks.0.attn\).*fused=False'):
        flow(X, E, torch.zeros(4).long() if label else None, t=T, r=T / 2)
    assert not calls and flow.sample(E).shape == E.shape  # to sample it is of use
    with pytest.raises(ValueError, match='fused=False'):
        MeanFlow(dit(fused=True), way=way).derivative(X, E, T, T / 2)
    with pytest.raises(ValueError, match='fused=False'):
        MeanFlow(Folded(DiT(4, 2, 16, 1, 2, channels=4, fused=True)), way=way)(X, E, t=T, r=T / 2)


def test_fused_attention_that_needs_no_derivative_works_as_the_plain_one():
    a, b = (MeanFlow(dit(fused=f), equal=1.0) for f in (True, False))
    assert (
        close(a(X, E, t=T).mean, b(X, E, t=T).mean)
        and FlowMatching(dit(fused=True))(X, E).mean.isfinite()
    )


class Foreign(nn.Module):
    "A network that knows nothing of this library, with torch's own kernel inside."

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, z, t, r=None, label=None, cond=None):
        q = self.lin(z) + wide(t) - wide(r)
        return F.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize('way', ['jvp', 'double'])
def test_a_foreign_kernel_without_a_derivative_is_named_with_its_cause(way):
    with pytest.raises(NotImplementedError, match=rf"way='{way}' needs: .*fused=False") as told:
        MeanFlow(Foreign(), way=way)(X, E, t=T, r=T / 2)
    assert isinstance(
        told.value.__cause__, (NotImplementedError, RuntimeError)
    ) and 'scaled_dot_product' in str(told.value.__cause__)


def test_other_errors_of_a_network_stay_what_they_are():
    def broken(*_):
        raise RuntimeError('out of memory')

    with pytest.raises(RuntimeError, match='^out of memory$'):
        MeanFlow(Told(broken))(X, E, t=T, r=T / 2)


@pytest.mark.parametrize('make', [FlowMatching, MeanFlow, Regression])
def test_r_without_t_is_refused(make):
    with pytest.raises(ValueError, match='r is given, t is not'):
        make(unet())(X, E, r=T)
    loss = make(unet())(X, E, t=T, r=T / 2)
    assert torch.equal(loss.t, T) and torch.equal(loss.r, T / 2)


def test_c_of_zero():
    z = torch.zeros(2)
    assert torch.equal(adaptive_weight(z, 0, 0), torch.ones(2)) and (
        adaptive_weight(z, 0.5, 1e-6) * z
    ).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match='c is 0, power is 1; expected c above 0'):
        adaptive_weight(z, 1, 0)
    for make in (FlowMatching, MeanFlow):
        with pytest.raises(ValueError, match='c is 0, power is 0.5'):
            make(unet(), power=0.5, c=0)
    assert FlowMatching(Told(lambda z, *_: 0 * z), power=0, c=0)(X, X).mean.isfinite()


@pytest.mark.parametrize('bad', [math.nan, -0.5, -math.inf, math.inf])
@pytest.mark.parametrize('knob', ['power', 'c', 'std', 'start', 'equal', 'omega', 'kappa', 'mean'])
def test_knobs_of_a_flow(knob, bad):
    if knob == 'mean' and bad == -0.5:
        return
    with pytest.raises(ValueError, match=f'{knob} is {bad}'):
        MeanFlow(unet(), **{knob: bad})
    if knob in ('power', 'c'):
        with pytest.raises(ValueError, match=f'{knob} is'):
            adaptive_weight(torch.ones(2), **{knob: bad})
    if knob in ('std', 'start', 'equal', 'mean'):
        with pytest.raises(ValueError, match=f'{knob} is'):
            draw_times(8, **{knob: bad})


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda: draw_times(8, std=0), ValueError, 'std is 0'),
        (lambda: draw_times(8, mean='0'), TypeError, "mean is '0'"),
        (lambda: draw_times(-1), ValueError, 'b is -1'),
        (lambda: draw_times(2.0), ValueError, 'b is 2.0'),
        (lambda: FlowMatching(unet(), std=True), ValueError, 'std is True'),
        (lambda: Regression(unet()).sample(E, 0), ValueError, 'steps is 0'),
        (lambda: Regression(unet()).sample(E, math.nan), ValueError, 'steps is nan'),
        (
            lambda: FlowMatching(unet()).sample(E[:0]),
            ValueError,
            r'e has shape \(0, 1, 8, 8\); expected \(b, ...\), none of them 0',
        ),
        (
            lambda: FlowMatching(Told(lambda z, *_: z)).sample(E * math.nan),
            ValueError,
            'e holds 256',
        ),
        (lambda: FlowMatching(unet())(X[:0], E[:0]), ValueError, 'none of them 0'),
        (lambda: FlowMatching(unet()).sample(E.long()), TypeError, 'e is torch.int64'),
        (lambda: Folded(unet().net, 0), ValueError, 'fold is 0'),
        (lambda: RawError(FlowStep(), late=math.nan), ValueError, 'late is nan'),
        (lambda: RawError(FlowStep(), late=1.5), ValueError, 'late is 1.5'),
        (lambda: flow_learner(FlowMatching(unet()), PICTURES, batch=0), ValueError, 'batch is 0'),
        (
            lambda: flow_learner(FlowMatching(unet()), PICTURES, batch=3),
            ValueError,
            'data holds 2 items; expected at least batch=3',
        ),
        (
            lambda: flow_learner(FlowMatching(unet()), PICTURES, batch=2, lr=-1),
            ValueError,
            'lr is -1',
        ),
        (
            lambda: flow_learner(FlowMatching(unet()), PICTURES, batch=2, ema=5),
            ValueError,
            'ema is 5',
        ),
    ],
)
def test_what_does_not_fit_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize(
    'one, other, says',
    [
        (FLOW, lambda: MeanFlow(FLOW().net), "kind='FlowMatching', but it is 'MeanFlow' here"),
        (FLOW, lambda: Regression(FLOW().net), 'Regression'),
        (
            lambda: Folded(FlowUNet(16, base=8, mults=(1, 2)), 2),
            lambda: Folded(FlowUNet(16, base=8, mults=(1, 2)), 4),
            'fold=2, but it is 4 here',
        ),
    ],
)
def test_the_state_of_another_flow_is_refused(one, other, says, tmp_path):
    a, b = one(), other()
    for state in (a.state_dict(), saved(a, tmp_path / 'w.pt')):
        with pytest.raises(RuntimeError, match=says):
            b.load_state_dict(state)
        one().load_state_dict(state)


def test_knobs_of_training_alone_are_no_obstacle(tmp_path):
    a, b = MeanFlow(unet(), power=0.5, omega=2.0, equal=0.25), MeanFlow(unet())
    with torch.no_grad():
        for p in a.parameters():
            p.mul_(1.5)
    b.load_state_dict(saved(a, tmp_path / 'w.pt'))
    assert torch.equal(a.sample(E, 2), b.sample(E, 2))


def test_given_generators_leave_the_callers_random_state_and_tensors_alone():
    flow, x, e = MeanFlow(unet(classes=4)), X.clone(), E.clone()
    before = torch.get_rng_state()
    flow(x, e, torch.arange(4), generator=gen()).mean.backward()
    flow.sample(e, 2, torch.arange(4))
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(x, X) and torch.equal(e, E)


@pytest.mark.parametrize('make', [FlowMatching, MeanFlow, Regression])
def test_making_a_flow_draws_nothing(make):
    net, before = unet(), torch.get_rng_state()
    make(net)
    assert torch.equal(torch.get_rng_state(), before)


# what came after ----------------------------------------------------------------------------------

SPAN = dict(t=torch.full((4,), 0.8), r=torch.full((4,), 0.3))


def test_velocity_loss_has_the_gradient_of_the_plain_one():
    net = dit()
    z, v = straight_path(X, E, SPAN['t'])
    du = MeanFlow(net).derivative(z, v, **SPAN)[1]
    u = net(z, **SPAN)
    span = wide(SPAN['t'] - SPAN['r'])
    by_velocity = (u + span * du - v).square().mean()
    by_target = (u - MeanFlow(net).target(z, v, **SPAN)).square().mean()
    pairs = (torch.autograd.grad(loss, net.parameters(), retain_graph=True, allow_unused=True)
             for loss in (by_velocity, by_target))  # fmt: skip
    for p, q in zip(*pairs):
        assert (p is None and q is None) or close(p, q, 1e-6)


def test_own_tangent_is_the_network_at_r_equal_to_t():
    net = Told(lambda z, t, r, *_: z.square() * wide(t) + wide(r))
    z, v = straight_path(X, E, SPAN['t'])
    t, r = wide(SPAN['t']), wide(SPAN['r'])
    own = z.square() * t + t
    want = v - (t - r) * (2 * z * t * own + z.square())
    assert close(MeanFlow(net, tangent='own').target(z, v, **SPAN), want)
    with pytest.raises(ValueError, match="tangent is 'v'"):
        MeanFlow(net, tangent='v')


def test_a_right_clean_image_gives_the_velocity_and_one_step():
    told = Told(lambda z, t, r, *_: X)
    z, v = straight_path(X, E, SPAN['t'])
    assert close(FromClean(told)(z, SPAN['t']), v)
    flow = PixelMeanFlow(told)
    assert close(flow.sample(E, 1), X) and flow.tangent == 'own'
    for t in (0.8, 0.05, 0.02, 0.0):  # where t is cut at 0.05, target and answer are cut alike
        t = torch.full((4,), t)
        assert flow(X, E, t=t).raw.max() < 1e-6
    with pytest.raises(ValueError, match='least is 0'):
        FromClean(told, 0)


def test_alpha_flow_between_the_paths_velocity_and_meanflow():
    net = dit().double()
    z, v = (q.double() for q in straight_path(X, E, SPAN['t']))
    times = {k: q.double() for k, q in SPAN.items()}
    assert torch.equal(AlphaFlow(net, alpha=1.0).target(z, v, **times), v)
    exact = MeanFlow(net).target(z, v, **times)
    assert torch.equal(AlphaFlow(net, alpha=0.0).target(z, v, **times), exact)
    u, gaps = net(z, **times).detach(), []
    for a in (0.1, 0.01):  # the error over alpha is MeanFlow's, but for what alpha is
        error = (AlphaFlow(net, alpha=a).target(z, v, **times) - u) / a
        gaps.append((error - (exact - u)).norm())
    assert 5 < gaps[0] / gaps[1] < 20
    s = times['t'] - 0.5 * (times['t'] - times['r'])
    later = net(z - wide(times['t'] - s) * v, s, times['r'])
    assert close(AlphaFlow(net, alpha=0.5).target(z, v, **times), 0.5 * v + 0.5 * later)


def test_alpha_flow_trusts_moving_samples_by_alpha():
    flow, r = AlphaFlow(unet(), alpha=0.25, power=0, reduce='mean'), torch.tensor([0.5, 0, 0, 0.5])
    loss = flow(X, E, t=T, r=r)
    weight = torch.tensor([1.0, 4.0, 4.0, 1.0])
    assert close(loss.mean, (weight * loss.raw).mean())
    for power, factor in ((0.5, 1.0), (0.0, 4.0), (1.0, 0.25)):  # 0.25^(2p - 1)
        got = AlphaFlow(unet(), alpha=0.25, power=power).trust(T, r)
        assert close(got, torch.where(r < T, factor, 1.0))
    with pytest.raises(ValueError, match='alpha is 2'):
        AlphaFlow(unet(), alpha=2)


def test_schedule_of_alpha():
    values = [alpha_at(k / 100) for k in range(101)]
    assert values[0] == 1 and values[-1] == 0 and values[50] == 0.5
    assert all(a >= b for a, b in zip(values, values[1:]))
    assert all(v in (0, 1) or 0.005 <= v <= 0.995 for v in values)
    assert alpha_at(0.1, 0.2, 0.6) == 1 and alpha_at(0.7, 0.2, 0.6) == 0
    with pytest.raises(ValueError, match='start is 0.6, end is 0.4'):
        AlphaSchedule(0.6, 0.4)


def test_schedule_moves_alpha_and_a_resumed_training_takes_it_up(tmp_path):
    def learner():
        flow = AlphaFlow(unet())
        return flow_learner(flow, torch.rand(8, 1, 8, 8), batch=4, cbs=[AlphaSchedule()], cpu=True)

    whole, cut = learner(), learner()
    whole.fit(6)
    assert whole.bare.alpha == 0
    cut.steps, cut.step = 6, 3
    cut.cbs[-1].before_fit(cut)
    assert cut.bare.alpha == alpha_at(0.5)


def test_the_size_of_the_derivative_is_in_the_loss_and_the_history():
    net = Told(lambda z, t, r, *_: wide(t) * 3 + 0 * z)
    r = torch.tensor([0.5, 0.5, 0.2, 0.1])
    loss = MeanFlow(net)(X, E, t=T, r=r)
    assert close(loss.slope, torch.full((2,), 3.0))
    assert MeanFlow(net)(X, E, t=T).slope is None and FlowMatching(net)(X, E).slope is None
    learn = flow_learner(MeanFlow(unet()), torch.rand(8, 1, 8, 8), batch=8, cpu=True).fit(2)
    row = learn.history[-1]
    assert 0 < row['derivative'] <= row['derivative, largest']


def test_a_narrow_derivative_is_of_16_bits_and_the_usual_one_is_not():
    net = dit()
    z, v = straight_path(X, E, SPAN['t'])
    exact = MeanFlow(net).target(z, v, **SPAN)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        narrow = MeanFlow(net, narrow=True).target(z, v, **SPAN)
        usual = MeanFlow(net).target(z, v, **SPAN)
    assert torch.equal(usual, exact) and narrow.dtype == exact.dtype
    assert 1e-4 < (narrow - exact).norm() / exact.norm() < 0.3


def test_guidance_of_a_walk():
    def says(z, t, r, label, cond):
        return torch.ones_like(z) * (0 if label is None else 1)

    flow = FlowMatching(Told(says, classes=10))
    label = torch.arange(4)
    assert close(flow.sample(E, 2, label, omega=3.0), E - 3)
    assert close(flow.sample(E, 2, label), E - 1) and close(flow.sample(E, 2, omega=3.0), E)
    with pytest.raises(ValueError, match='omega is -1'):
        flow.sample(E, 1, label, omega=-1)
