"""What lesson 21 does not teach: the ways to restore on networks with known answers,
scores of a hole, bad input."""

import math

import numpy as np
import pytest
import torch
from common import gen, saved
from flow_toys import E, PICTURES, T, Told, X, FLOW, close, stirred, unet, wide

from restore_lib.bridge import BRIDGES, WAYS, Bridge, FlowRestorer, ShiftFlow, SmallRestorer
from restore_lib.bridge_study import TermStep, chosen, noise_or_hole, term_learner
from restore_lib.codecs import HybridCodec, PacketCodec
from restore_lib.diffusion import ResidualShift
from restore_lib.dit import FlowUNet
from restore_lib.hole_scores import diversity, grey_share, hole_psnr
from restore_lib.learner import EMA, Learner
from restore_lib.meanflow import (
    FlowMatching,
    FlowStep,
    Folded,
    MeanFlow,
    RawError,
    Regression,
    draw_times,
    flow_learner,
)
from restore_lib.probes import leak_probe

pytestmark = pytest.mark.usefixtures('seed')


def test_printing_tells_the_knobs_that_decide_a_run():
    text = str(FlowRestorer(MeanFlow(unet(), equal=0.25, omega=1.5, c=0.3), Bridge('jitter', 0.7)))
    assert all(
        part in text
        for part in ('equal=0.25', 'omega=1.5', 'c=0.3', "way='jvp'", "reduce='sum'", 'sigma=0.7')
    )


def test_flow_step_makes_from_noise_or_degrades():
    net = Told(lambda z, t, r, *_: torch.zeros_like(z), classes=10)
    step, x = FlowStep(), torch.rand(4, 1, 8, 8)
    torch.manual_seed(3)
    loss = step(Regression(net), (x, torch.arange(4)))
    torch.manual_seed(3)
    e = torch.randn(4, 1, 8, 8)
    assert (
        close(loss, (e - 2 * x + 1).square().mean())
        and torch.equal(net.calls[0]['label'], torch.arange(4))
        and close(step.last.raw.mean(), loss)
    )
    with_mask, without = (
        FlowStep(f)(FlowRestorer(Regression(net), Bridge('straight')), [x])
        for f in (lambda x: (x / 2, None), lambda x: x / 2)
    )
    assert close(with_mask, without) and close(without, x.square().mean())  # 2 (x - x/2) squared


def test_learner_in_bf16_with_ema():
    x = torch.rand(32, 1, 8, 8, generator=gen())
    mask = torch.zeros(32, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1
    step = FlowStep(lambda x: (x * (1 - mask[: len(x)]) + 0.5 * mask[: len(x)], mask[: len(x)]))
    model = FlowRestorer(MeanFlow(unet(), start=0.5), Bridge('jitter'))
    learn = Learner(
        model,
        step,
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 8, shuffle=True),
        cbs=[EMA(0.9), RawError(step, 0.9)],
        precision='bf16',
        cpu=True,
        clip=1.0,
    ).fit(4)
    assert (
        all(
            math.isfinite(r['loss']) and math.isfinite(r['raw error']) and 'raw error, late' in r
            for r in learn.history
        )
        and len(learn.history) == 4
    )
    trained = learn.trained()
    assert trained(x[:2], mask=mask[:2], generator=gen()).shape == (2, 1, 8, 8)
    assert not all(torch.equal(p, q) for p, q in zip(trained.parameters(), learn.bare.parameters()))


def test_flow_learner():
    x, hide = (
        torch.rand(32, 1, 8, 8, generator=gen()),
        lambda x: (
            x * (torch.arange(8) < 4),
            (torch.arange(8) >= 4).float().expand(len(x), 1, 8, 8),
        ),
    )
    learn = flow_learner(
        FlowRestorer(FlowMatching(unet()), Bridge('jitter')),
        x,
        hide,
        batch=8,
        lr=1e-2,
        ema=0.9,
        cpu=True,
        seed=3,
    ).fit(6)
    again = flow_learner(
        FlowRestorer(FlowMatching(unet()), Bridge('jitter')),
        x,
        hide,
        batch=8,
        lr=1e-2,
        ema=0,
        cpu=True,
        seed=3,
        clip=None,
        sched=None,
    )
    assert (
        all({'loss', 'raw error'} <= set(row) for row in learn.history)
        and learn.clip == 1.0
        and learn.sched is not None
    )
    assert (
        [type(cb) for cb in again.cbs] == [RawError] and again.clip is None and again.sched is None
    )
    labelled = flow_learner(
        MeanFlow(unet(classes=3)),
        torch.utils.data.TensorDataset(x, torch.arange(32) % 3),
        batch=8,
        cpu=True,
    ).fit(2)
    assert math.isfinite(labelled.history[-1]['raw error'])


# restoring ----------------------------------------------------------------------------------------


def holed(b=6, side=8):
    x, mask = torch.rand(b, 1, side, side, generator=gen(3)), torch.zeros(b, 1, side, side)
    mask[..., 2:6, 3:7] = 1
    return x, x * (1 - mask) + 0.5 * mask, mask


def test_bridges():
    x, y, mask = holed()
    e, cond = Bridge('straight')(y, mask)
    assert (
        close(e, 2 * y - 1)
        and cond is None
        and torch.equal(Bridge('straight', told=True)(y)[1], 2 * y - 1)
    )
    e, cond = Bridge('jitter', 0.7)(y, mask, gen())
    assert (
        close(e * (1 - mask), (2 * y - 1) * (1 - mask))
        and e[mask > 0].std() == pytest.approx(0.7, rel=0.2)
        and abs(e[mask > 0].mean()) < 0.25
        and cond is None
    )
    assert (Bridge('jitter')(y, None, gen())[0] - (2 * y - 1)).std() == pytest.approx(1, rel=0.1)
    e, cond = Bridge('noise', 2.0)(y, mask, gen())
    assert (
        e.std() == pytest.approx(2, rel=0.1)
        and torch.equal(cond, 2 * y - 1)
        and abs(torch.corrcoef(torch.stack([e.flatten(), y.flatten()]))[0, 1]) < 0.15
    )
    assert torch.equal(Bridge('noise')(y, mask, gen())[0], Bridge('noise')(y, mask, gen())[0])


@pytest.mark.parametrize('kind', BRIDGES)
def test_training_and_sampling_use_the_same_source(kind):
    x, y, mask = holed()
    net = Told(lambda z, t, r, *_: torch.zeros_like(z))
    model = FlowRestorer(Regression(net), Bridge(kind))
    model(y, x, mask, generator=gen(1))
    model(y, mask=mask, generator=gen(1))
    trained, sampled = net.calls
    assert torch.equal(trained['z'], sampled['z']) and (trained['cond'] is None) == (
        sampled['cond'] is None
    ) == (kind != 'noise')


def test_ranges_are_zero_to_one_outside_and_minus_one_to_one_inside():
    x, y, mask = holed()
    net = Told(lambda z, t, r, label, cond: z - (2 * x - 1))
    out = FlowRestorer(Regression(net), Bridge('straight'))(y, mask=mask)
    assert close(out, x) and close(
        FlowRestorer(Regression(net), Bridge('straight'))(y, x, mask).raw, torch.zeros(6)
    )


def test_shift_flow_is_lesson_13s_process():
    x, y, mask = holed()
    net, process = unet(cond_channels=4), ResidualShift(4, kappa=0.5)
    model = FlowRestorer(ShiftFlow(net, process), Bridge('straight', told=True))
    ask = lambda z, t, cond: cond + net(z, (t + 1) / 4, None, None, cond)
    torch.manual_seed(2)
    want = process.loss(ask, 2 * x - 1, 2 * y - 1, generator=gen(1), stratified=True)
    got = model(y, x, mask, generator=gen(1))
    assert (
        close(got.mean, want.mean)
        and close(got.raw, want.per_sample)
        and got.t.min() >= 0.25
        and got.t.max() <= 1
    )
    for steps in (1, 4):
        assert close(
            model(y, mask=mask, steps=steps, generator=gen(2)),
            (process.sample(ask, 2 * y - 1, steps, generator=gen(2)) + 1) / 2,
        )


@pytest.mark.parametrize(
    'make',
    [
        lambda: FlowRestorer(FlowMatching(unet()), Bridge('jitter')),
        lambda: FlowRestorer(MeanFlow(unet(cond_channels=4)), Bridge('noise')),
        lambda: FlowRestorer(Regression(unet()), Bridge('straight')),
        lambda: FlowRestorer(ShiftFlow(unet(cond_channels=4)), Bridge('straight', told=True)),
    ],
)
def test_restoring_reads_no_truth_learns_everything_and_can_be_repeated(make):
    x, y, mask = holed()
    model = make()
    assert (
        torch.equal(model(y, mask=mask, generator=gen(1)), model(y, mask=mask, generator=gen(1)))
        and not model(y, mask=mask).requires_grad
    )
    model(y, x, mask, generator=gen(1)).mean.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    both = model(y, mask=mask, generator=gen(1))
    if model.bridge.kind == 'straight' and not isinstance(model.flow, ShiftFlow):
        assert close(model(y[:3], mask=mask[:3]), both[:3])


def test_reader_separates_what_divides_from_what_does_not():
    x, y, mask = holed(32)
    reads = Told(
        lambda z, t, r, *_: torch.where(mask > 0, -z / (1 - wide(t)).clamp(min=1e-3), 0.0)
    )  # in the hole, v = -x and z = (1 - t) x
    blind = Told(lambda z, t, r, *_: torch.where(mask > 0, 0.2, 0.0))
    for net, sound in ((reads, False), (blind, True)):
        model, source, path = FlowRestorer(FlowMatching(net), Bridge('straight')).reader(y, mask)
        assert bool(leak_probe(model, 2 * x - 1, source, mask, path)) == sound
    shift = FlowRestorer(
        ShiftFlow(Told(lambda z, t, r, label, cond: 0 * z)), Bridge('straight', told=True)
    )
    model, source, path = shift.reader(y, mask, gen())
    t = torch.full((32,), 1.0)
    assert close(
        path(2 * x - 1, source, t),
        shift.flow.process.shift(
            2 * x - 1, 2 * y - 1, torch.full((32,), 14), (source - (2 * y - 1)) / 0.99
        ),
        1e-4,
    )
    assert close(model(source, t), 2 * y - 1) and leak_probe(model, 2 * x - 1, source, mask, path)


def test_measures():
    x, mask = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    x[0, 0, 0, :] = 0.5
    assert grey_share(x, mask).tolist() == [0.25, 0.0] and grey_share(
        torch.full_like(x, 0.25), mask
    ).tolist() == [0.0, 0.0]
    assert (
        hole_psnr(x + 0.1, x, mask) == pytest.approx(torch.tensor([20.0, 20.0]), abs=1e-4)
        and hole_psnr(x + (1 - mask), x, mask)[1] == math.inf
    )
    samples = (
        torch.randn(500, 2, 1, 4, 4, generator=gen())
        * torch.tensor([0.3, 0.0])[:, None, None, None]
    )
    assert diversity(samples, mask) == pytest.approx(torch.tensor([0.3, 0.0]), rel=0.05, abs=1e-6)


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda: Bridge('bent'), ValueError, 'kind is'),
        (lambda: Bridge('noise', told=False), ValueError, 'must be told'),
        (lambda: Bridge(sigma=0), ValueError, 'sigma is 0'),
        (
            lambda: Bridge('jitter')(torch.rand(2, 1, 8, 8), torch.zeros(2, 8, 8)),
            ValueError,
            'mask has shape',
        ),
        (lambda: FlowRestorer(ShiftFlow(unet()), Bridge('jitter')), ValueError, 'its own noise'),
        (
            lambda: FlowRestorer(FlowMatching(unet()), Bridge('straight'))(
                255 * torch.rand(2, 1, 8, 8)
            ),
            ValueError,
            '0 to 255',
        ),
        (
            lambda: FlowRestorer(FlowMatching(unet()), Bridge('noise'))(torch.rand(2, 1, 8, 8)),
            ValueError,
            'cond is given',
        ),
        (
            lambda: grey_share(torch.rand(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)),
            ValueError,
            'mask is empty',
        ),
        (
            lambda: hole_psnr(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8), torch.zeros(2, 8, 8)),
            ValueError,
            'mask has shape',
        ),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_residual_shifting_has_no_r():
    with pytest.raises(ValueError, match='r is given; residual shifting has one time'):
        ShiftFlow(unet(cond_channels=4))(X, E, cond=E, r=T)


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda: Bridge(sigma=math.nan), ValueError, 'sigma is nan'),
        (lambda: Bridge(sigma=-1), ValueError, 'sigma is -1'),
        (lambda: Bridge(sigma='1'), TypeError, "sigma is '1'"),
        (
            lambda: Bridge('jitter')(PICTURES, torch.full((2, 1, 8, 8), math.nan)),
            ValueError,
            'mask holds NaN',
        ),
        (
            lambda: Bridge('jitter')(PICTURES, torch.full((2, 1, 8, 8), 2.0)),
            ValueError,
            r'outside \[0, 1\]',
        ),
        (lambda: grey_share(PICTURES, -torch.ones(2, 1, 8, 8)), ValueError, 'mask holds'),
        (lambda: grey_share(PICTURES, None), ValueError, 'mask has shape'),
        (
            lambda: hole_psnr(PICTURES, PICTURES[:1], torch.ones(2, 1, 8, 8)),
            ValueError,
            'a has shape',
        ),
        (
            lambda: diversity(PICTURES[None], torch.ones(2, 1, 8, 8)),
            ValueError,
            'two or more samples',
        ),
        (
            lambda: diversity(PICTURES, torch.ones(2, 1, 8, 8)),
            ValueError,
            r'expected \(n, b, c, h, w\)',
        ),
        (
            lambda: diversity(PICTURES.expand(3, 2, 1, 8, 8) * math.nan, torch.ones(2, 1, 8, 8)),
            ValueError,
            'samples holds',
        ),
        (lambda: FlowRestorer(unet(), Bridge()), TypeError, 'flow is Folded'),
        (lambda: FlowRestorer(FlowMatching(unet()), 'straight'), TypeError, 'bridge is str'),
        (
            lambda: FlowRestorer(FlowMatching(unet()), Bridge())(PICTURES[:0]),
            ValueError,
            'at least one image',
        ),
    ],
)
def test_what_does_not_fit_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


TOLD = lambda **kw: ShiftFlow(FlowUNet(1, base=8, mults=(1, 2), waves=8, cond_channels=1), **kw)


@pytest.mark.parametrize(
    'one, other, says',
    [
        (
            lambda: FlowRestorer(FLOW(), Bridge('jitter', 0.5)),
            lambda: FlowRestorer(FLOW(), Bridge('jitter', 0.25)),
            r"bridge=\['jitter', 0.5, False\]",
        ),
        (
            TOLD,
            lambda: TOLD(process=ResidualShift(15, kappa=2.0)),
            r'kappa=\[1.0\], but it is \[2.0\] here',
        ),
        (TOLD, lambda: TOLD(process=ResidualShift(4, kappa=1.0)), 'sqrt_etas='),
    ],
)
def test_the_state_of_another_flow_is_refused(one, other, says, tmp_path):
    a, b = one(), other()
    for state in (a.state_dict(), saved(a, tmp_path / 'w.pt')):
        with pytest.raises(RuntimeError, match=says):
            b.load_state_dict(state)
        one().load_state_dict(state)


def test_numbers_of_numpy():
    f, i, net = np.float32, np.int64, unet()
    a, b = (
        MeanFlow(net, f(0.25), f(1.5), f(0.5), 'jvp', f(0.25), f(-0.5), f(0.75), f(0.5), f(0.125)),
        MeanFlow(net, 0.25, 1.5, 0.5, 'jvp', 0.25, -0.5, 0.75, 0.5, 0.125),
    )
    assert torch.equal(a(X, E, generator=gen()).mean, b(X, E, generator=gen()).mean) and repr(
        a
    ) == repr(b)
    assert torch.equal(a.sample(E, i(3)), b.sample(E, 3)) and torch.equal(
        draw_times(i(8), f(0.5), generator=gen())[0], draw_times(8, 0.5, generator=gen())[0]
    )
    assert (
        repr(Bridge('jitter', f(0.5))) == repr(Bridge('jitter', 0.5))
        and Folded(unet().net, i(2)).fold == 2
    )
    flow_learner(
        FlowMatching(unet()), torch.rand(8, 1, 8, 8), batch=i(4), lr=f(1e-3), ema=f(0.5)
    ).fit(1)


# what a file can hold, a latent, terms ----------------------------------------------------------


@pytest.mark.parametrize('way', WAYS)
def test_each_way_comes_back_from_its_file(way, tmp_path):
    from restore_lib.model_files import load_model, save_model

    x, y, mask = holed(2, 16)
    model = stirred(SmallRestorer(way, 8)).half().float()
    again, _ = load_model(save_model(model, tmp_path / 'a.safetensors'), 'bridge.SmallRestorer')
    one, other = (m.float()(y, mask=mask, generator=gen(1)) for m in (model, again))
    assert close(one, other, 1e-4)


def test_a_flow_runs_in_a_latent_that_loses_nothing():
    x = torch.rand(4, 3, 32, 32, generator=gen())
    mask = torch.zeros(4, 1, 32, 32)
    mask[..., 8:20, 12:24] = 1
    y = x * (1 - mask) + 0.5 * mask
    codec = PacketCodec(3, 2)
    codec.gains.fill_(0.5)
    net = Told(lambda z, t, r, label, cond: z - codec.encode(x)[0])
    model = FlowRestorer(Regression(net), Bridge('jitter'), codec)
    assert close(model(y, mask=mask), x, 1e-4)
    e, _ = model.begin(y, mask, gen())
    noise = e - codec.encode(y)[0]
    under = torch.nn.functional.max_pool2d(mask, 4).expand_as(noise) > 0
    assert (noise[~under] == 0).all() and noise[under].std() == pytest.approx(1, rel=0.1)
    with pytest.raises(ValueError, match='loses nothing'):
        FlowRestorer(Regression(net), Bridge(), HybridCodec(3))
    with pytest.raises(ValueError, match='codec is given'):
        SmallRestorer(fold=1, channels=48, base=8, codec=codec).made_of()


def test_an_answer_with_a_graph_is_the_answer():
    x, y, mask = holed(2, 16)
    model = stirred(SmallRestorer('regression, noise in the hole', 8))
    told = model(y, mask=mask, generator=gen(1), graph=True)
    assert told.requires_grad and close(told, model(y, mask=mask, generator=gen(1)))


def test_terms_look_at_filled_holes_only():
    x = torch.rand(6, 1, 32, 32, generator=gen())
    seen = []

    def distance(a, b):
        seen.append((a, b))
        return (a - b).square().mean((1, 2, 3))

    model = stirred(SmallRestorer(base=8))
    torch.manual_seed(0)
    terms = TermStep(noise_or_hole, 'absolute', distance, 2.0)(model, x)
    assert list(terms) == ['absolute', 'perceptual']
    a, b = seen[0]
    assert torch.equal(b, x[1::2]) and (a == b).flatten(1).any(1).all() and a.requires_grad
    twice = 2 * (a - b).square().mean()
    assert terms['perceptual'].item() == pytest.approx(twice.item(), rel=1e-4)
    with torch.no_grad():
        assert list(TermStep(noise_or_hole, 'squared', distance, 2.0)(model, x)) == ['squared']
    with pytest.raises(ValueError, match='pixel is'):
        TermStep(noise_or_hole, 'cubed')


def test_term_learner_leaves_the_critic_out_of_the_model():
    x = torch.rand(16, 1, 32, 32, generator=gen())
    learn = term_learner(SmallRestorer(base=8), x, critic=1.0, late=0, batch=8).fit(2)
    assert learn.history[-1]['critic'] != 0
    assert len(learn.trained().state_dict()) == len(SmallRestorer(base=8).state_dict())


def test_weights_are_chosen_by_the_rule(monkeypatch):
    def rows(**wanted):
        grey, read = {0.3: (0.3, 0.9), 1.0: (0.21, 0.7), 3.0: (0.19, 0.8)}[wanted['weight']]
        return [dict(figures={'grey': grey, 'read': read, 'grey, truth': truth})]

    monkeypatch.setattr('restore_lib.bridge_study.bridge_rows', rows)
    truth = 0.2
    assert chosen('critic') == 3.0  # of two that are near in grey the one that is read
    truth = 0.5
    assert chosen('critic') == 0.3  # none is near: the nearest
    monkeypatch.setattr('restore_lib.bridge_study.bridge_rows', lambda **_: [])
    assert chosen('critic') is None


def test_a_restorer_of_digits_is_in_the_registry(tmp_path):
    from restore_lib.model_files import save_model
    from restore_lib.restorers import restorer

    model = stirred(SmallRestorer(base=8)).half().float()
    path = save_model(model, tmp_path / 'd.safetensors', task='digits')
    found, y = restorer(path), torch.rand(2, 1, 32, 32, generator=gen())
    assert found.task == 'digits' and found.channels == 1
    assert close(found(y, say=lambda note: None), model.eval()(y), 1e-3)
