"""What lesson 15 does not teach: the loss written out anew, what may move in training, resumed
runs, seeds, every size and kind of picture, windows, files, the commands, bad input."""

import copy, importlib, json, math, os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from dataclasses import FrozenInstanceError, asdict
from functools import lru_cache
from pathlib import Path

from common import ROOT, gen, held, launcher, same
from toy import Stop
import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter
from torch import nn

from restore_lib import superres_command as S
from restore_lib import superres_tiles as T
from restore_lib.codecs import CODECS, HybridCodec, PacketCodec, make_codec
from restore_lib.data import PairedFolder
from restore_lib.degrade import bicubic_up
from restore_lib.diffusion import Loss, ResidualShift
from restore_lib.learner import Callback
from restore_lib.metrics import psnr
from restore_lib.model_files import load_model, save_model
from restore_lib.superres import LatentSR, make_sr
from restore_lib.superres_command import train_superres
from restore_lib.superres_scores import detail_scores, sr_pairs, unsharp
from restore_lib.superres_tiles import superresolve
from restore_lib.superres_training import AS_PRINTED, Buckets, SRConfig, SRLoss, sr_learner
from restore_lib.unet import SwinUNet

NET = dict(base=16, embed=16, head_channels=8, swin_depth=2, window=4)
LOSSLESS = [n for n in CODECS if make_codec(n).lossless]
LEARNS = [n for n in CODECS if hasattr(make_codec(n), 'loss')]
LEVELS = (1, 2, 3)


pytestmark = pytest.mark.usefixtures('seed')


def config(**kw):
    return SRConfig(**(dict(net_options=NET, crop=32, batch=4, codec_steps=2) | kw))


def scenes(n=4, c=1, hw=(48, 64), s=0):
    "Smooth pictures with fine grain, so that every band has something in it."
    coarse = F.interpolate(
        torch.rand(n, c, 6, 8, generator=gen(s)), size=hw, mode='bicubic', align_corners=False
    )
    return list((coarse + 0.1 * torch.randn(n, c, *hw, generator=gen(s + 1))).clamp(0, 1))


@lru_cache
def pairs(c=1, scale=4):
    return sr_pairs(scenes(c=c), scale)


def batch(c=1, n=2):
    y, x = zip(*pairs(c)[:n])
    return torch.stack(y), torch.stack(x)


def shake(model, by=0.08):
    "The network is no longer zero, as if it were trained."
    g = gen(5)
    with torch.no_grad():
        for p in model.net.parameters():
            p.add_(by * torch.randn(p.shape, generator=g))
    return model


def fresh(before=None, **kw):
    return make_sr(config(**kw), pairs(kw.get('channels', 1), kw.get('scale', 4)), before)


def awake(before=None, **kw):
    return shake(fresh(before, **kw))


def close(a, b, tol=1e-6):
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=tol)


def learner(model=None, train=None, **kw):
    return sr_learner(model or fresh(), train or pairs(), **(dict(cpu=True) | kw))


class Zero(nn.Module):
    def forward(self, z, t, cond):
        return torch.zeros_like(z)


class Local(nn.Module):
    "Sees no farther than one neighbour; louder at later times."

    def __init__(self, c, side=3):
        super().__init__()
        self.conv = nn.Conv2d(2 * c, c, side, padding=side // 2, padding_mode='replicate')
        nn.init.normal_(self.conv.weight, std=0.2, generator=gen(3))
        nn.init.zeros_(self.conv.bias)

    def forward(self, z, t, cond):
        return self.conv(torch.cat([z, cond], 1)) * (0.5 + t[:, None, None, None] / 14)


# where it starts ----------------------------------------------------------------------------------


@pytest.mark.parametrize('c', [1, 3])
@pytest.mark.parametrize('name', LOSSLESS)
def test_untrained_is_bicubic(name, c):
    y, model = torch.rand(2, c, 8, 12), fresh(codec=name, channels=c)
    for steps in (1, 4):
        assert close(model(y, steps=steps), bicubic_up(y, 4))


@pytest.mark.parametrize('process', [{}, None])
@pytest.mark.parametrize(
    'name, options',
    [(n, dict(level=k)) for n in ('ll', 'full', 'llhh', 'packet') for k in LEVELS]
    + [('all', dict(level=1)), ('dct', dict(block=8)), ('full', dict(wavelet='db3'))],
)
def test_untrained_is_bicubic_at_every_level(name, options, process):
    y = torch.rand(1, 1, 8, 10)
    assert close(
        superresolve(fresh(codec=name, codec_options=options, process=process, gains='unit'), y, 1),
        bicubic_up(y, 4),
    )


@pytest.mark.parametrize('name', [n for n in CODECS if n not in LOSSLESS])
def test_untrained_is_the_lossy_codecs_bicubic(name):
    y, model = torch.rand(1, 1, 8, 8), fresh(codec=name)
    assert close(model(y, steps=3), model.codec(bicubic_up(y, 4)))


def test_untrained_hybrid_is_bicubic_too():
    y, model = torch.rand(1, 1, 8, 8), LatentSR(HybridCodec(), Zero(), ResidualShift())
    assert close(model(y, steps=3, generator=gen()), bicubic_up(y, 4))


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_other_scales(scale):
    y, model = torch.rand(1, 1, 8, 12), fresh(scale=scale, crop=48)
    assert close(superresolve(model, y), bicubic_up(y, scale)) and superresolve(
        shake(model), y, 2
    ).shape == (1, 1, 8 * scale, 12 * scale)


@pytest.mark.parametrize('gains', ['none', 'unit', 'residual'])
@pytest.mark.parametrize('name', ['ll', 'packet', 'dct', 'vq'])
def test_measured_sizes_are_one(name, gains):
    model, (y, x) = LatentSR(make_codec(name), Zero()), batch(n=4)
    model.codec.fit(x, bicubic_up(y, 4), scale=gains)
    assert model.measure(y, x) is model
    with torch.no_grad():
        zy, zx = model.codec.encode(bicubic_up(y, 4))[0], model.codec.encode(x)[0]
    rms = lambda v: v.double().square().mean((0, 2, 3)).sqrt()
    ones = torch.ones(model.codec.latent_channels, dtype=torch.float64)
    assert close(rms(zx / model.sees[:, None, None]), ones, 1e-4) and close(
        rms((zy - zx) / model.says[:, None, None]), ones, 1e-4
    )
    assert (
        (model.says < model.sees).sum() >= len(ones) / 2
        if name in ('ll', 'vq')
        else not close(model.says, model.sees, 1e-2)
    )


def test_make_sr_measures_and_hands_it_to_the_process():
    model = fresh(gains='unit')
    assert (
        model.process.latent_std.tolist() == pytest.approx(model.sees.tolist())
        and model.latent_std == pytest.approx(model.sees.tolist())
        and len(model.latent_std) == 16
    )
    assert not close(model.codec.gains, torch.ones(16), 0.1) and close(
        fresh().codec.gains, torch.ones(16), 0
    )
    own = fresh(process=dict(steps=4, kappa=1.5, latent_std=0.7)).process
    assert own.steps == 4 and own.kappa.tolist() == [1.5] and own.latent_std.tolist() == [0.7]


def test_flat_pictures_are_measured_without_division_by_zero():
    flat = torch.full((2, 1, 16, 16), 0.5)
    model = shake(
        LatentSR(PacketCodec(), Local(16), ResidualShift()).measure(flat[..., :4, :4], flat)
    )
    assert torch.isfinite(model(flat[..., :4, :4], generator=gen())).all()


def test_make_sr_is_seeded():
    a, b, c = fresh(codec='learnable'), fresh(codec='learnable'), fresh(codec='learnable', seed=1)
    assert (
        same(held(a), held(b))
        and not same(held(a), held(c))
        and not same(held(a.codec), held(c.codec))
        and not same(held(a.net), held(c.net))
    )


# the loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('t', [0, 6, 14])
@pytest.mark.parametrize(
    'name, gains', [('packet', 'none'), ('ll', 'unit'), ('full', 'residual'), ('vq', 'none')]
)
def test_loss_written_out(name, gains, t):
    model, (y, x) = awake(codec=name, gains=gains, process=dict(kappa=1.3)), batch()
    with torch.no_grad():
        (zy, _), (zx, _) = model.codec.encode(bicubic_up(y, 4)), model.codec.encode(x)
    noise, p = torch.randn(zx.shape, generator=gen(1)), model.process
    eta, wide = p.sqrt_etas[t].item() ** 2, lambda v: torch.tensor(v).double()[:, None, None]
    z = zx.double() + eta * (zy - zx).double() + 1.3 * math.sqrt(eta) * noise.double()
    seen = z / (1.3**2 * eta + wide(model.latent_std) ** 2).sqrt()
    rms_x, rms_r = model.sees[:, None, None], model.says[:, None, None]
    with torch.no_grad():
        said = zy + rms_r * model.net(seen.float(), torch.tensor([t] * len(y)), zy / rms_x)
    per = (said - zx).double().square().mean((1, 2, 3))
    got = model(y, x, t=torch.tensor([t] * len(y)), noise=noise)
    assert (
        got.per_sample.tolist() == pytest.approx(per.tolist(), rel=1e-4)
        and got.mean.item() == pytest.approx(per.mean().item(), rel=1e-4)
        and got.t.tolist() == [t] * len(y)
    )


def test_the_packets_loss_is_the_pictures():
    """An orthonormal latent of pixels in [-1, 1]:
    four times the squared error of the picture that the network's answer is."""
    model, (y, x), t = awake(), batch(), torch.tensor([3, 11])
    noise = torch.randn(2, 16, 12, 16, generator=gen(1))
    with torch.no_grad():
        zx, zy = model.codec.encode(x)[0], model.codec.encode(bicubic_up(y, 4))[0]
        said = model.correct(
            model.process.scale_input(model.process.shift(zx, zy, t, noise), t), t, zy
        )
        assert model(y, x, t=t, noise=noise).mean.item() == pytest.approx(
            4 * (model.codec.decode(said) - x).square().mean().item(), rel=1e-4
        )


def test_perfect_network_loses_nothing():
    "A network that says the true correction: loss 0, and any number of steps ends at the ceiling."
    (y, x), c = batch(), PacketCodec()

    class Oracle(nn.Module):
        def forward(self, z, t, cond):
            return (zx - cond * sees) / says

    model = LatentSR(c, Oracle(), ResidualShift()).measure(y, x)
    zx, sees, says = c.encode(x)[0], model.sees[:, None, None], model.says[:, None, None]
    assert model(y, x).mean < 1e-10
    for steps in (1, 2, 15):
        assert close(model(y, steps=steps, generator=gen()), x, 1e-5)


def test_steps_are_spread_evenly():
    y, x = (v.repeat(8, 1, 1, 1)[:15] for v in batch())
    assert sorted(fresh()(y, x).t.tolist()) == list(range(15))


@pytest.mark.parametrize('weight', ['sigma', 'noise'])
def test_weights_of_time_steps(weight):
    model, pair = awake(), batch(n=4)
    out = []
    for w in ('uniform', weight):
        torch.manual_seed(3)
        loss = SRLoss(weight=w)
        total = loss(model, pair)
        assert total is loss.last.mean and torch.equal(total, loss.last.per_sample.mean())
        out.append(loss.last)
    assert torch.equal(out[0].t, out[1].t)
    w = model.process.loss_weights(weight)[out[0].t, 0]
    assert (out[1].per_sample / out[0].per_sample).tolist() == pytest.approx(w.tolist(), rel=1e-4)


def test_regression_written_out():
    model, (y, x) = awake(process=None), batch()
    zy, zx = model.codec.encode(bicubic_up(y, 4))[0], model.codec.encode(x)[0]
    rms_x, rms_r = model.sees[:, None, None], model.says[:, None, None]
    said = zy + rms_r * model.net(zy / rms_x, torch.zeros(2, dtype=torch.int64), zy / rms_x)
    got = model(y, x)
    assert got.per_sample.tolist() == pytest.approx(
        (said - zx).square().mean((1, 2, 3)).tolist(), rel=1e-4
    ) and got.t.tolist() == [0, 0]
    assert close(model(y), model.codec.decode(said)) and torch.equal(model(y), model(y, steps=7))
    assert torch.equal(superresolve(model, y, 1, seed=0), superresolve(model, y, 3, seed=8))


# training -----------------------------------------------------------------------------------------


class Only(nn.Module):
    "A wrapper that has nothing of the model but its call, as DistributedDataParallel."

    def __init__(self, model):
        super().__init__()
        self.hidden, self.calls = [model], 0

    def forward(self, *args, **kw):
        self.calls += 1
        return self.hidden[0](*args, **kw)


@pytest.mark.parametrize('weight', ['uniform', 'sigma'])
def test_trained_through_forward(weight):
    model, pair = awake(), batch()
    torch.manual_seed(1)
    plain = SRLoss(weight=weight)(model, pair)
    torch.manual_seed(1)
    assert (
        torch.equal(SRLoss(weight=weight)(wrapped := Only(model), pair), plain)
        and wrapped.calls == 1
    )


def test_distributed_data_parallel(tmp_path):
    "A group of one process: the gradients are those of the bare model."
    model, pair = awake(codec='learnable'), batch()
    torch.manual_seed(1)
    SRLoss()(model, pair).backward()
    grads = {k: p.grad.clone() for k, p in model.net.named_parameters()}
    model.zero_grad()
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second turn fails where a parameter was left out of the first
            model.zero_grad()
            torch.manual_seed(1)
            SRLoss()(parallel, pair).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(
        torch.allclose(p.grad, grads[k], rtol=1e-4, atol=1e-7)
        for k, p in model.net.named_parameters()
    )


@pytest.mark.parametrize('process', [{}, None])
@pytest.mark.parametrize('name', LEARNS)
def test_gradients_reach_the_network_only(name, process):
    before = awake()
    model = awake(before, codec=name, process=process)
    model.train()(*batch()).mean.backward()
    assert all(
        p.grad is None and not p.requires_grad
        for part in (model.codec, model.before)
        for p in part.parameters()
    )
    assert (
        all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.net.parameters())
        and model.net.last[-1].weight.grad.abs().sum() > 0
    )


@pytest.mark.parametrize('name', ['packet', *LEARNS])
def test_only_the_network_moves(name):
    learn = learner(awake(awake(), codec=name, gains='unit'), valid=pairs())
    was = held(learn.bare)
    learn.fit(3)
    moved = {k for k, v in held(learn.bare).items() if not torch.equal(v, was[k])}
    assert (
        moved
        and all(k.startswith('net.') for k in moved)
        and len(moved) > 0.9 * len(learn.bare.net.state_dict())
    )
    kept = held(learn.trained())
    assert all(torch.equal(v, kept[k]) for k, v in was.items() if not k.startswith('net.'))


class Normed(PacketCodec):
    "A codec with statistics that move when it is in training mode."

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(16, affine=False)

    def _apart(self, x):
        return self.norm(super()._apart(x)[0]), ()

    def _together(self, z, side):
        return super()._together(
            z * (self.norm.running_var + self.norm.eps).sqrt()[:, None, None]
            + self.norm.running_mean[:, None, None],
            side,
        )


def test_running_statistics_of_the_codec_stay():
    model = LatentSR(Normed(), SwinUNet.tiny(32, 16, **NET), ResidualShift())
    model.config = config()
    with torch.no_grad():
        model.codec.norm.running_mean.add_(0.1)
    was = held(model.codec)
    learner(model, valid=pairs()).fit(2)
    assert same(held(model.codec), was)


def test_running_statistics_of_before_stay():
    before = awake()
    before.codec = Normed()
    before.net = SwinUNet.tiny(32, 16, **NET)
    model = fresh(before)
    was = held(before)
    learner(model).fit(2)
    assert same(held(model.before), was)


class Twice(SRLoss):
    def __call__(self, model, batch):
        return 2 * super().__call__(model, batch)


def test_learner_takes_another_loss():
    """It trains with the loss it was given, whose buckets the history holds;
    without one, with the configuration's."""
    loss = Twice(weight='sigma')
    learn, own = learner(awake(), loss=loss), learner(awake(weight='sigma'))
    assert learn.loss_fn is loss and (own.loss_fn.weight, own.loss_fn.degrade) == ('sigma', None)
    a, b = learn.fit(1).history[-1], own.fit(1).history[-1]
    assert a['loss'] == pytest.approx(2 * b['loss'], rel=1e-6) and {
        k: v for k, v in a.items() if k.startswith('loss t')
    } == {k: v for k, v in b.items() if k.startswith('loss t')}


def test_another_loss_must_degrade_where_the_configuration_does():
    real = fresh(degradation='real')
    with pytest.raises(ValueError, match='expected a loss that degrades'):
        learner(real, scenes(), loss=SRLoss())
    kept = SRLoss(lambda x: x)
    assert learner(real, scenes(), loss=kept).loss_fn is kept


def test_training_learns():
    "A level that bicubic gets wrong on purpose: a few steps take most of the loss away."
    train = [(y, (x + 0.2).clamp(0, 1.2)) for y, x in pairs()]
    learn = learner(make_sr(config(codec='ll', process=None, lr=3e-3), train), train).fit(30)
    losses = [r['loss'] for r in learn.history]
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])


def test_ema_by_hand():
    seen = []

    class Keep(Callback):
        def after_step(self, learn):
            seen.append(held(learn.bare.net))

    learn = learner(fresh(), cbs=[Keep()])
    start = held(learn.bare.net)
    learn.fit(3)
    for n, now in enumerate(seen, 1):
        d = min(0.999, (1 + n) / (10 + n))
        start = {k: d * v + (1 - d) * now[k] for k, v in start.items()}
    trained = learn.trained()
    assert all(
        torch.allclose(v, start[k], rtol=0, atol=1e-6) for k, v in trained.net.state_dict().items()
    )
    assert (
        not same(held(trained.net), seen[-1])
        and same(held(learn.bare.net), seen[-1])
        and not trained.training
        and trained.config == learn.bare.config
    )


@pytest.mark.parametrize('name', LEARNS)
def test_clipping_counts_the_network_only(name):
    "What the codec's and the first model's own trainings left behind must not count."
    before = awake()
    learner(before).fit(1)
    model = fresh(before, codec=name)
    learn = learner(model)
    learn.one_step(iter(learn.train))
    norm = lambda ps: torch.stack([p.grad.norm() for p in ps if p.grad is not None]).norm().item()
    assert norm(model.parameters()) == norm(model.net.parameters()) > 0


@pytest.mark.parametrize('name, process', [('packet', {}), ('vq', {}), ('packet', None)])
def test_resume_is_bit_for_bit(tmp_path, name, process):
    make = lambda: learner(fresh(codec=name, process=process), valid=pairs(), n_valid=2)
    whole, first = make().fit(6, valid_every=2), make()
    first.cbs.append(Stop(3))
    with pytest.raises(KeyboardInterrupt):
        first.fit(6, valid_every=2)
    first.cbs.pop()
    first.save(tmp_path)
    again = make().load(tmp_path)
    assert again.step == 3
    again.fit(6, valid_every=2)
    rows = lambda learn: [{k: v for k, v in r.items() if k != 'seconds'} for r in learn.history]
    assert (
        same(held(whole.bare), held(again.bare))
        and same(whole.cbs[0].shadow, again.cbs[0].shadow)
        and rows(whole) == rows(again)
    )
    assert (
        any('loss t 0-4' in r for r in rows(whole)) == (process is not None)
        and 'PSNR, 1 step' in whole.metrics
    )


def test_buckets_are_those_of_the_process():
    kept = []

    class Keep(Callback):
        def after_step(self, learn):
            kept.append(
                (learn.loss_fn.last.per_sample.detach().clone(), learn.loss_fn.last.t.clone())
            )

    learn = learner(fresh(batch=8), cbs=[Keep()]).fit(3)
    assert len(learn.history) == len(kept) == 3
    for row, (per, t) in zip(learn.history, kept):
        want = {f'loss {k}': v for k, v in learn.bare.process.buckets(per, t, 3).items()}
        assert len(want) == 3 and {
            k: v for k, v in row.items() if k.startswith('loss t')
        } == pytest.approx(want, rel=1e-5)
        assert row['loss'] == pytest.approx(per.mean().item(), rel=1e-5)


class Fake:
    def __init__(self):
        self.step, self.history = 0, []


def test_buckets_of_several_steps_a_row():
    "A row every third step, a validation after step 3: its row holds no buckets, no step is lost."
    process, loss, learn = ResidualShift(), SRLoss(), Fake()
    cb = Buckets(loss, process)
    cb.before_fit(learn)
    for step in range(1, 7):
        learn.step, loss.last = (
            step,
            Loss(None, torch.full((3,), float(step)), torch.tensor([0, 7, 14])),
        )
        if step % 3 == 0:
            learn.history.append(dict(step=step, loss=0.0))
        cb.after_step(learn)
        if step == 3:
            learn.history.append(dict(step=step, valid_loss=0.0))
    first, valid, last = learn.history
    assert [first[f'loss t {r}'] for r in ('0-4', '5-9', '10-14')] == [2.0] * 3 and [
        last[f'loss t {r}'] for r in ('0-4', '5-9', '10-14')
    ] == [5.0] * 3
    assert valid == dict(step=3, valid_loss=0.0)


def test_buckets_forget_an_interrupted_fit():
    process, loss, learn = ResidualShift(), SRLoss(), Fake()
    cb = Buckets(loss, process, n=1)
    for values in ([100.0], [1.0, 2.0]):
        cb.before_fit(learn)
        for v in values:
            learn.step, loss.last = learn.step + 1, Loss(None, torch.tensor([v]), torch.tensor([3]))
            if v == 2:
                learn.history.append(dict(step=learn.step, loss=0.0))
            cb.after_step(learn)
    assert learn.history == [dict(step=3, loss=0.0, **{'loss t 0-14': 1.5})]


def test_validation_figures():
    """PSNR of the averaged model in one step and in four, of pictures cut to [0, 1];
    a regression has one step."""
    learn = learner(awake(), valid=pairs(), n_valid=3).fit(1)
    model = learn.trained()
    for n, name in ((1, 'PSNR, 1 step'), (4, 'PSNR, 4 steps')):
        with torch.no_grad():
            want = [
                psnr(model(y[None], steps=n, generator=gen()).clamp(0, 1), x[None]).item()
                for y, x in pairs()[:3]
            ]
        assert learn.metrics[name] == pytest.approx(np.mean(want), rel=1e-6)
    assert [
        k for k in learner(fresh(process=None), valid=pairs()).fit(1).metrics if 'PSNR' in k
    ] == ['PSNR, 1 step']


def test_real_degradation():
    model = fresh(degradation='real')
    learn = learner(model, [x for _, x in pairs()], valid=pairs())
    x = torch.stack(scenes(2, hw=(32, 32)))
    (y, same_x), (z, _) = learn.loss_fn.pair(x), learn.loss_fn.pair(x)
    assert (
        y.shape == (2, 1, 8, 8)
        and same_x is x
        and not torch.equal(y, z)
        and 0 <= y.min()
        and y.max() <= 1
    )
    was = held(model.net)
    learn.fit(2)
    assert (
        not same(held(model.net), was)
        and 'second_order' in repr(learn.loss_fn)
        and math.isfinite(learn.metrics['PSNR, 1 step'])
    )
    assert learn.loss_fn.pair((y, x)) == (y, x)  # pairs to validate on are what they are


def test_bf16():
    learn = learner(fresh(), valid=pairs(), n_valid=1, precision='bf16').fit(2)
    model = learn.trained()
    assert (
        all(p.dtype == torch.float32 for p in model.parameters())
        and superresolve(model, batch()[0]).dtype == torch.float32
        and math.isfinite(learn.history[0]['loss'])
    )


def test_the_papers_plan():
    c = SRConfig.paper()
    assert (c.net, c.steps, c.batch, c.lr, c.ema, c.weight_decay, c.crop) == (
        'paper',
        200_000,
        16,
        5e-5,
        0.999,
        0,
        256,
    )
    assert c.lr * c.lr_floor == pytest.approx(2e-5) and c.warmup * c.steps == pytest.approx(5000)
    printed = SRConfig.paper(**AS_PRINTED)
    assert printed.lr * printed.lr_floor == pytest.approx(1e-6)
    assert (printed.weight_decay, printed.warmup, printed.channels) == (0.01, 0, 3)
    assert (
        SRConfig.paper(steps=3).steps == 3
        and SRConfig.two_cores() == SRConfig()
        and SRConfig.two_cores(lr=1).lr == 1
    )
    assert SRConfig(**json.loads(json.dumps(asdict(c)))) == c
    with pytest.raises(FrozenInstanceError):
        c.lr = 1
    with torch.device('meta'):
        model = make_sr(SRConfig.paper(codec='ll', channels=3, process=None))
    assert sum(p.numel() for p in model.net.parameters()) == pytest.approx(118.59e6, rel=0.005)


LAUNCHED = '''
import os, sys, torch
torch.set_num_threads(1)
from restore_lib.superres_command import train_superres
code = train_superres(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)      # gloo's threads now and then abort a process that is being taken down
'''


def test_two_processes(tmp_path, folder):
    (tmp_path / 'go.py').write_text(LAUNCHED)
    done = subprocess.run(
        [
            sys.executable,
            *launcher(2),
            str(tmp_path / 'go.py'),
            '--data',
            str(folder),
            '--out',
            str(tmp_path / 'two.safetensors'),
            '--steps',
            '2',
            '--crop',
            '32',
            '--batch',
            '2',
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dict(
            os.environ,
            OMP_NUM_THREADS='1',
            RESTORE_RUNS=str(tmp_path / 'runs'),
            PYTHONPATH=str(ROOT),
            ACCELERATE_USE_CPU='true',
        ),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count('trained') == done.stdout.count('two.safetensors: 2 steps') == 1
    model, says = load_model(tmp_path / 'two.safetensors')
    assert (
        says['data'] == folder.name
        and superresolve(model, torch.rand(8, 8)).shape == (32, 32)
        and model.net.last[-1].weight.abs().sum() > 0
    )


# the way back -------------------------------------------------------------------------------------


@pytest.mark.parametrize('steps', [1, 2, 7, 15, [14, 3]])
def test_seeds(steps):
    model, y = awake(), batch()[0]
    a, b, c = (superresolve(model, y, steps, seed=s) for s in (0, 0, 1))
    assert torch.equal(a, b) and not close(a, c, 1e-4) and torch.isfinite(a).all()


def test_the_callers_random_state_stays():
    model, y = awake(awake()), batch()[0]
    torch.manual_seed(4)
    want = torch.rand(3)
    torch.manual_seed(4)
    superresolve(model, y, 3)
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize('name', ['ll', 'packet', 'vq'])
def test_one_step_is_the_process_own(name):
    model, y = awake(codec=name).eval(), batch()[0]
    with torch.no_grad():
        z, side = model.codec.encode(bicubic_up(y, 4))
        want = model.codec.decode(model.process.sample(model.correct, z, 1, generator=gen(3)), side)
        assert torch.equal(model(y, steps=1, generator=gen(3)), want) and close(
            superresolve(model, y, 1, seed=3), want
        )
        first = z + model.process.kappa.item() * 0.99 * torch.randn(z.shape, generator=gen(3))
        t = torch.full((2,), 14)
        assert close(
            model.codec.decode(model.correct(model.process.scale_input(first, t), t, z), side),
            want,
            1e-5,
        )


@pytest.mark.parametrize('steps', [2, 15])
def test_more_steps_are_the_process_own(steps):
    model, y = awake().eval(), batch()[0]
    with torch.no_grad():
        z, _ = model.codec.encode(bicubic_up(y, 4))
        for rho in (0.0, 1.0) if steps > 2 else (0.5, 1.0):
            want = model.codec.decode(
                model.process.sample(model.correct, z, steps, generator=gen(3), randomness=rho)
            )
            assert close(superresolve(model, y, steps, 3, randomness=rho), want) and close(
                model(y, steps=steps, generator=gen(3), randomness=rho), want
            )
    assert not close(
        superresolve(model, y, steps, 3), superresolve(model, y, steps, 3, randomness=0.0), 1e-4
    )


def test_two_threads():
    "No hidden state: two pictures at once are the two one after the other."
    model, ys = awake(codec='full').eval(), [torch.rand(1, 1, 12, 12), torch.rand(1, 1, 16, 20)] * 3
    one = [superresolve(model, y, 2) for y in ys]
    with ThreadPoolExecutor(2) as pool:
        two = list(pool.map(lambda y: superresolve(model, y, 2), ys))
    assert all(torch.equal(a, b) for a, b in zip(one, two))


# cascades -----------------------------------------------------------------------------------------


def test_cascade_starts_where_the_first_ends():
    before = awake(codec='ll')
    model, y = fresh(before, codec='full', codec_options=dict(level=1)), batch()[0]
    first = superresolve(before, y, 1, seed=0).clamp(0, 1)
    assert model.start(y).shape == first.shape and not close(first, bicubic_up(y, 4), 1e-3)
    assert (
        not model.start(y).requires_grad and 0 <= model.start(y).min() and model.start(y).max() <= 1
    )
    with torch.no_grad():
        before.net.last[-1].weight.zero_()
        before.net.last[-1].bias.zero_()
    assert close(model.start(y), bicubic_up(y, 4)) and close(
        superresolve(model, y, 3), bicubic_up(y, 4)
    )


def test_a_regression_before():
    before = awake(codec='ll', process=None)
    model, y = awake(before), batch()[0]
    with torch.no_grad():
        assert close(model.start(y), before(y).clamp(0, 1)) and close(
            fresh(before)(y, steps=2), before(y).clamp(0, 1)
        )
    assert torch.equal(superresolve(model, y, 3, 1), superresolve(model, y, 3, 1))


def test_cascade_is_measured_on_what_it_gets():
    before = awake(codec='ll', process=None)
    model, (y, x) = fresh(before), batch(n=4)
    model.measure(y, x)
    with torch.no_grad():
        residual = model.codec.encode(before(y).clamp(0, 1))[0] - model.codec.encode(x)[0]
    assert close(model.says, residual.square().mean((0, 2, 3)).sqrt(), 1e-5) and not close(
        model.says, fresh().measure(y, x).says, 1e-3
    )


@pytest.mark.parametrize('steps', [1, 4])
def test_cascade_is_seeded(steps):
    model, y = awake(awake(), codec='full', codec_options=dict(level=1)), batch()[0]
    a = superresolve(model, y, steps, seed=0)
    torch.rand(7)
    assert torch.equal(superresolve(model, y, steps, seed=0), a) and not close(
        superresolve(model, y, steps, seed=1), a, 1e-4
    )


def test_cascade_of_any_size():
    before = fresh(codec_options=dict(level=3))
    model = fresh(before, codec='ll')
    for hw in ((5, 7), (1, 1), (8, 8)):
        assert superresolve(model, torch.rand(*hw)).shape == (4 * hw[0], 4 * hw[1])


def test_cascades_that_cannot_be():
    for before in (fresh(scale=2), fresh(channels=3)):
        with pytest.raises(ValueError):
            LatentSR(PacketCodec(), Zero(), ResidualShift(), 4, before)


# every kind of picture ----------------------------------------------------------------------------

MODES = {
    'L': 'L',
    'RGB': 'RGB',
    'LA': 'LA',
    'RGBA': 'RGBA',
    'I;16': 'I;16',
    'P': 'RGB',
    '1': 'L',
    'CMYK': 'RGB',
}


def picture(mode, hw=(11, 14)):
    "A picture of random levels."
    rng = np.random.default_rng(2)
    if mode == 'I;16':
        return Image.fromarray(rng.integers(0, 65536, hw, dtype=np.uint16))
    if mode in ('P', '1', 'CMYK'):
        return Image.fromarray(rng.integers(0, 256, (*hw, 3), dtype=np.uint8)).convert(mode)
    c = len(mode)
    return Image.fromarray(rng.integers(0, 256, hw if c == 1 else (*hw, c), dtype=np.uint8))


@lru_cache
def model_of(c=1, kind='shaken'):
    return (awake if kind == 'shaken' else fresh)(channels=c).eval()


@pytest.mark.parametrize('c', [1, 3])
@pytest.mark.parametrize('mode', MODES)
def test_pil_images(mode, c):
    image = picture(mode)
    before = image.tobytes()
    out = superresolve(model_of(c), image, 2)
    assert (
        isinstance(out, Image.Image)
        and out.size == (56, 44)
        and out.mode == MODES[mode]
        and image.tobytes() == before
        and image.mode == mode
    )


@pytest.mark.parametrize('c', [1, 3])
@pytest.mark.parametrize('mode', ['L', 'RGB', 'LA', 'RGBA', 'I;16'])
def test_pil_images_untrained_are_pillows_own(mode, c):
    "Bicubic as Pillow has it, in 8 bits within one level, in 16 bits within rounding."
    image = picture(mode)
    out = np.asarray(superresolve(model_of(c, 'fresh'), image)).astype(float)
    if mode == 'I;16':
        want = (
            bicubic_up(
                torch.from_numpy(np.asarray(image).astype(np.float64) / 65535)[None, None], 4
            )[0, 0].numpy()
            * 65535
        )
        assert np.abs(out - want).max() < 1
    else:
        assert (
            np.abs(
                out
                - np.asarray(
                    Image.merge(
                        mode, [b.resize((56, 44), Image.Resampling.BICUBIC) for b in image.split()]
                    )
                ).astype(float)
            ).max()
            <= 1
        )


def test_paths(tmp_path):
    picture('RGB').save(tmp_path / 'in.png')
    before = (tmp_path / 'in.png').read_bytes()
    want = np.asarray(superresolve(model_of(), picture('RGB')))
    for path in (tmp_path / 'in.png', str(tmp_path / 'in.png')):
        assert np.array_equal(np.asarray(superresolve(model_of(), path)), want)
    assert (tmp_path / 'in.png').read_bytes() == before and [
        p.name for p in tmp_path.iterdir()
    ] == ['in.png']


@pytest.mark.parametrize('c', [1, 3])
@pytest.mark.parametrize(
    'shape',
    [
        (9, 6),
        (1, 9, 6),
        (3, 9, 6),
        (2, 1, 9, 6),
        (2, 3, 9, 6),
        (1, 1),
        (1, 1, 1, 1),
        (1, 7),
        (6, 1),
    ],
)
def test_tensors(shape, c):
    x = torch.rand(shape)
    before = x.clone()
    out = superresolve(model_of(c), x, 2)
    assert (
        out.shape == (*shape[:-2], 4 * shape[-2], 4 * shape[-1])
        and out.dtype == x.dtype
        and torch.isfinite(out).all()
        and torch.equal(x, before)
        and not out.requires_grad
    )
    assert close(
        superresolve(model_of(c, 'fresh'), x),
        bicubic_up(x[(None,) * (4 - x.ndim)], 4).reshape(out.shape),
    )


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats(dtype):
    x = torch.rand(8, 8)
    out = superresolve(model_of(), x.to(dtype))
    assert out.dtype == dtype and close(
        out.float(),
        superresolve(model_of(), x.to(dtype).float()),
        1e-6 if dtype == torch.float64 else 1e-2,
    )


def test_not_clipped():
    x = torch.rand(1, 1, 8, 8).round()
    assert superresolve(model_of(), x).max() > 1.001


def test_one_channel_model_takes_colours_one_by_one():
    x, model = torch.rand(1, 3, 9, 8), model_of()
    out = superresolve(model, x, 2)
    assert close(out, superresolve(model, x.transpose(0, 1), 2).transpose(0, 1), 1e-5)
    with torch.no_grad():
        parts = model(x.transpose(0, 1), steps=2, generator=gen())
    assert close(out[0], parts[:, 0], 1e-5)


def test_three_channel_model_sees_grey_three_times():
    x, model = torch.rand(1, 1, 9, 8), model_of(3)
    assert close(
        superresolve(model, x, 2),
        superresolve(model, x.expand(-1, 3, -1, -1), 2).mean(1, keepdim=True),
    )


@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('name', ['ll', 'full', 'packet'])
def test_every_factor_and_odd_sizes(name, level):
    model = awake(codec=name, codec_options=dict(level=level))
    assert model.codec.factor == 2**level
    for hw in ((5, 7), (1, 1), (13, 2)):
        out = superresolve(model, torch.rand(1, 1, *hw), 2)
        assert out.shape == (1, 1, 4 * hw[0], 4 * hw[1]) and torch.isfinite(out).all()


@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('hw', [(13, 21), (1, 1), (3, 41), (41, 2)])
def test_padding_leaves_no_trace(level, hw):
    "Untrained, any size is bicubic up to the edges: padding comes after the enlargement."
    y, model = torch.rand(1, 1, *hw), fresh(codec_options=dict(level=level))
    for kw in ({}, dict(window=8, overlap=4)):
        assert close(superresolve(model, y, **kw), bicubic_up(y, 4))


def test_what_is_padded_repeats_the_edge():
    y, model = torch.rand(1, 1, 5, 7), awake(codec_options=dict(level=3)).eval()
    with torch.no_grad():
        z, side = model.codec.encode(F.pad(bicubic_up(y, 4), (0, 4, 0, 4), mode='replicate'))
        want = model.codec.decode(model.process.sample(model.correct, z, 2, generator=gen()), side)[
            ..., :20, :28
        ]
    assert close(superresolve(model, y, 2), want) and not close(want, bicubic_up(y, 4), 1e-2)


@pytest.mark.parametrize('level, window', [(1, 5), (2, 7), (3, 5)])
@pytest.mark.parametrize('hw', [(1, 30), (30, 1), (11, 17)])
def test_odd_windows(level, window, hw):
    assert superresolve(
        fresh(codec_options=dict(level=level)), torch.rand(*hw), window=window, overlap=1
    ).shape == (4 * hw[0], 4 * hw[1])


def test_mode_and_weights_stay():
    model, x = awake(awake(), codec='vq').train(), torch.rand(1, 1, 8, 8)
    model.net.last.eval()
    was, modes = held(model), [m.training for m in model.modules()]
    superresolve(model, x, 2)
    assert (
        same(held(model), was)
        and [m.training for m in model.modules()] == modes
        and all(p.grad is None for p in model.parameters())
    )


# windows ------------------------------------------------------------------------------------------


def local(side=3, **kw):
    model = LatentSR(
        make_codec('packet', **kw), Local(16 * kw.get('channels', 1), side), ResidualShift()
    )
    return model.measure(*batch(kw.get('channels', 1)))


@pytest.mark.parametrize('steps', [1, 3])
@pytest.mark.parametrize('side', [1, 3])
@pytest.mark.parametrize('hw', [(24, 28), (16, 33), (40, 16)])
def test_windows_of_a_local_network_are_the_whole_picture(hw, side, steps):
    model, y = local(side), torch.rand(2, 1, *hw)
    whole = superresolve(model, y, steps)
    assert not close(whole, bicubic_up(y, 4), 1e-2)
    for window, overlap in ((12, 8), (16, 4), (13, 5)):
        assert close(superresolve(model, y, steps, window=window, overlap=overlap), whole, 2e-5)


def test_windows_untrained_and_in_colour():
    y = torch.rand(1, 3, 30, 22)
    assert close(
        superresolve(model_of(3, 'fresh'), y, 3, window=8, overlap=4), bicubic_up(y, 4)
    ) and close(superresolve(model_of(1, 'fresh'), y, window=8, overlap=4), bicubic_up(y, 4))
    model = local(channels=3)
    assert close(superresolve(model, y, 2, window=12, overlap=8), superresolve(model, y, 2), 2e-5)


def test_number_of_windows_at_a_time():
    y = torch.rand(2, 1, 24, 28)
    a, b = (superresolve(model_of(), y, 2, window=16, overlap=8, batch=n) for n in (1, 8))
    assert close(a, b, 1e-5)


def test_a_small_picture_is_one_window():
    y = torch.rand(1, 1, 16, 12)
    assert torch.equal(
        superresolve(model_of(), y, 2, window=16, overlap=8), superresolve(model_of(), y, 2)
    )
    assert not torch.equal(
        superresolve(model_of(), y, 2, window=15, overlap=8), superresolve(model_of(), y, 2)
    )


def test_windows_that_disagree_are_blended():
    """Every window says its own mean:
    from one latent pixel to the next the result moves by no more than the ramp does."""
    fn, z, t = (
        T._by_windows(
            lambda s, t, cond: s.mean((2, 3), keepdim=True).expand_as(s) + 0 * cond, 16, 8, 4
        ),
        torch.randn(1, 2, 40, 40),
        torch.zeros(1, dtype=torch.int64),
    )
    z[..., 20:] += 8
    out = fn(z, t, z)
    spread = (out.amax() - out.amin()).item()
    jump = max(out.diff(dim=2).abs().max().item(), out.diff(dim=3).abs().max().item())
    assert spread > 4 and jump < spread / 3 and out.shape == z.shape


@pytest.fixture(scope='module')
def trained():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    learn = learner(fresh(batch=8, lr=3e-3), pairs()).fit(40)
    torch.set_num_threads(threads)
    return learn.trained()


def test_windows_of_a_trained_network(trained):
    """It normalises over what it sees, so windows are not the whole picture exactly:
    the difference is small, and no larger where windows meet."""
    y = sr_pairs(scenes(1, hw=(192, 192), s=9))[0][0][None]
    whole, parts, base = (
        superresolve(trained, y),
        superresolve(trained, y, window=16, overlap=8),
        bicubic_up(y, 4),
    )
    off = parts - whole
    assert off.square().mean().sqrt() < 0.5 * (
        whole - base
    ).square().mean().sqrt() and not torch.equal(parts, whole)
    seams = torch.zeros(48, dtype=torch.bool)
    for start in range(8, 48, 8):
        seams[start - 1 : start + 1] = (
            True  # windows begin, and others end, at multiples of 8 latent pixels
        )
    jumps = off.diff(dim=3).abs().mean((0, 1, 2))[3::4]  # between neighbouring latent pixels
    at = torch.tensor([seams[k] and seams[k + 1] for k in range(47)])
    assert at.sum() == 5 and jumps[at].mean() < 1.5 * jumps[~at].mean()


# pairs and measures -------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Three small thermal-like pictures as PNG files, sides no multiples of 4."
    root = tmp_path_factory.mktemp('pictures')
    for k, x in enumerate(scenes(3, hw=(50, 67))):
        Image.fromarray((x[0] * 255).round().byte().numpy()).save(root / f'{k}.png')
    return root


@pytest.mark.parametrize('c', [1, 3])
@pytest.mark.parametrize('scale', [2, 3, 4])
def test_pairs_are_those_of_a_folder(tmp_path, c, scale):
    images = [(x * 255).round() / 255 for x in scenes(3, c, (50, 67))]
    for k, x in enumerate(images):
        Image.fromarray((x * 255).round().byte().permute(1, 2, 0).squeeze(2).numpy()).save(
            tmp_path / f'{k}.png'
        )
    for (y, x), (y2, x2) in zip(
        sr_pairs(images, scale), PairedFolder(tmp_path, scale=scale, channels=c), strict=True
    ):
        assert (
            torch.equal(x, x2) and close(y, y2, 1.01 / 255) and (y - y2).abs().mean() < 0.25 / 255
        )
        assert close((y * 255).round() / 255, y, 1e-7) and x.shape[-1] == scale * y.shape[-1]


def test_pairs_cut_to_a_multiple_and_leave_the_images():
    x = torch.rand(1, 50, 67)
    was = x.clone()
    ((y, cut),) = sr_pairs([x], 4, multiple=16)
    assert (
        cut.shape == (1, 48, 64)
        and y.shape == (1, 12, 16)
        and torch.equal(cut, x[:, :48, :64])
        and torch.equal(x, was)
    )
    with pytest.raises(ValueError, match=r'images\[1\] is smaller than 16'):
        sr_pairs([x, x[:, :15]], 4, 16)


@pytest.mark.parametrize('wavelet', ['haar', 'db2', 'bior1.3'])
@pytest.mark.parametrize('c', [1, 3])
def test_detail_scores_against_pywavelets(c, wavelet):
    a, x = torch.rand(2, c, 24, 30), torch.rand(2, c, 24, 30)
    got = detail_scores(a, x, wavelet)
    assert list(got) == [f'{w} {b}' for b in ('LH', 'HL', 'HH', 'all') for w in ('energy', 'right')]
    for k in range(2):
        mine, true = (
            dict(
                zip(
                    ('LH', 'HL', 'HH'),
                    pywt.dwt2(v[k].double().numpy(), wavelet, 'periodization')[1],
                )
            )
            for v in (a, x)
        )
        for d in (mine, true):
            d['all'] = np.concatenate([v.ravel() for v in list(d.values())])
        for b in mine:
            p, q = mine[b].ravel(), true[b].ravel()
            assert got[f'energy {b}'][k].item() == pytest.approx(p @ p / (q @ q), rel=1e-4) and got[
                f'right {b}'
            ][k].item() == pytest.approx(p @ q / np.sqrt(p @ p * (q @ q)), abs=1e-5)


def test_detail_scores_of_known_pictures():
    x = torch.rand(2, 1, 128, 128)
    of = lambda a: detail_scores(a, x)
    for share in (1.0, 0.5, -2.0):
        assert all(
            v.tolist()
            == pytest.approx(
                [share**2 if k.startswith('energy') else math.copysign(1, share)] * 2, rel=1e-4
            )
            for k, v in of(share * x).items()
        )
    noise = of(torch.rand(2, 1, 128, 128))
    assert all(
        (v - 1).abs().max() < 0.1 if k.startswith('energy') else v.abs().max() < 0.1
        for k, v in noise.items()
    )
    assert all(v.abs().max() < 1e-6 for k, v in of(torch.full_like(x, 0.5)).items())
    flat = detail_scores(torch.full_like(x, 0.4), torch.full_like(x, 0.5))
    assert all(torch.isfinite(v).all() for v in flat.values())
    shifted = of(x + 0.3)
    assert all(v.tolist() == pytest.approx([1, 1], abs=1e-4) for v in shifted.values())
    rows = torch.arange(128)[:, None].expand(128, 128) % 2 * 1.0
    only = detail_scores(rows[None, None], rows[None, None] + 0.01 * torch.rand(1, 1, 128, 128))
    assert only['energy LH'] > 0.9 and only['energy HL'] < 1e-3
    with pytest.raises(ValueError, match=r'\(2, 1, 128, 128\)'):
        detail_scores(x[:1], x)


def test_unsharp():
    x = torch.rand(2, 3, 40, 44)
    was = x.clone()
    assert (
        close(unsharp(x, 0), x, 0)
        and close(unsharp(torch.full_like(x, 0.3)), torch.full_like(x, 0.3))
        and torch.equal(x, was)
    )
    assert close(unsharp(x, 2) - x, 2 * (unsharp(x) - x), 1e-5)
    soft = gaussian_filter(x.double().numpy(), (0, 0, 1.5, 1.5), truncate=6)
    inside = (..., slice(12, -12), slice(12, -12))
    assert np.abs((x - (unsharp(x) - x)).numpy() - soft)[inside].max() < 2e-3
    assert detail_scores(unsharp(x, 1.0), x)['energy all'].min() > 3 and not close(
        unsharp(x, 1, 0.5), unsharp(x, 1, 3.0), 1e-2
    )


def measured(folder):
    "Mean PSNR of an untrained model, all the way through codec and process."
    model, scores = LatentSR(PacketCodec(), Zero(), ResidualShift(steps=1)), []
    for y, x in PairedFolder(folder, scale=4, channels=1):
        scores.append(psnr(superresolve(model, y[None]).clamp(0, 1), x[None]).item())
    return np.mean(scores)


@pytest.mark.parametrize('name, want', [('roadscene_val', 28.92), ('tno17_dev', 34.67)])
def test_bicubic_on_real_infrared(real, name, want):
    assert measured(real(f'ir/{name}')) == pytest.approx(want, abs=0.05)


# files --------------------------------------------------------------------------------------------


def halved(model):
    "What a file in half precision can give back."
    model = copy.deepcopy(model).eval()
    model.net.load_state_dict(
        {
            k: v.half().float() if v.is_floating_point() else v
            for k, v in model.net.state_dict().items()
        }
    )
    return model


@pytest.mark.parametrize('c', [1, 3])
@pytest.mark.parametrize('name', CODECS)
def test_round_trip(tmp_path, name, c):
    model = awake(codec=name, channels=c, gains='residual', codec_steps=3)
    save_model(
        model, tmp_path / 'new' / 'a.safetensors', data='toy', scores=[1, 2.5], nested={'a': None}
    )
    back, says = load_model(tmp_path / 'new' / 'a.safetensors')
    y = torch.rand(1, c, 8, 8)
    assert (
        says == dict(data='toy', scores=[1, 2.5], nested={'a': None})
        and not back.training
        and same(held(back.codec), held(model.codec))
    )
    assert torch.equal(superresolve(back, y, 3, 1), superresolve(halved(model), y, 3, 1)) and close(
        superresolve(back, y), superresolve(model, y), 2e-2
    )
    assert (
        torch.equal(back.sees, model.sees)
        and torch.equal(back.says, model.says)
        and back.latent_std == pytest.approx(model.latent_std)
    )
    assert (
        repr(back.process) == repr(model.process)
        and torch.equal(back.process.latent_std, model.process.latent_std)
        and back.scale == model.scale
    )


@pytest.mark.parametrize(
    'kw',
    [
        dict(),
        dict(process=None),
        dict(process=dict(steps=4, kappa=1.5)),
        dict(process=dict(latent_std=0.7)),
        dict(scale=2),
        dict(codec='full', codec_options=dict(level=1, wavelet='db2')),
    ],
)
def test_the_config_is_kept(tmp_path, kw):
    model = awake(**kw)
    for name in 'ab':  # a loaded model can be saved again
        save_model(model, tmp_path / f'{name}.safetensors')
        back, _ = load_model(tmp_path / f'{name}.safetensors')
        assert back.config == model.config and (back.process is None) == (model.process is None)
        if model.process:
            assert (
                torch.equal(back.process.latent_std, model.process.latent_std)
                and back.process.steps == model.process.steps
            )
        model = back
    assert (tmp_path / 'a.safetensors').stat().st_size < sum(
        v.nbytes for v in model.state_dict().values()
    ) * 0.7 + 20_000


def test_saving_leaves_the_model(tmp_path):
    model = awake().train()
    was = held(model)
    save_model(model, tmp_path / 'a.safetensors')
    assert (
        same(held(model), was)
        and model.training
        and next(model.net.parameters()).dtype == torch.float32
    )


def test_a_cascade_is_not_saved_whole(tmp_path):
    with pytest.raises(ValueError, match='before'):
        save_model(fresh(fresh()), tmp_path / 'a.safetensors')
    assert not list(tmp_path.iterdir())


def spoil(path, how):
    "A file by save_model with other metadata."
    from safetensors import safe_open

    with safe_open(path, 'pt') as f:
        info = f.metadata()
    made = json.loads(info['made_of'])
    other = dict(
        says=lambda: {k: v for k, v in info.items() if k != 'says'},
        text=lambda: info | dict(made_of='{'),
        list=lambda: info | dict(made_of='[]'),
        empty=lambda: info | dict(made_of='{}'),
        std=lambda: info | dict(made_of=json.dumps(dict(config=made['config']))),
        foreign=lambda: dict(made_of='{}', says='{}'),
        name=lambda: (
            info | dict(made_of=json.dumps(made | dict(config=made['config'] | dict(depth=3))))
        ),
        option=lambda: (
            info
            | dict(
                made_of=json.dumps(
                    made | dict(config=made['config'] | dict(net_options=dict(deep=3)))
                )
            )
        ),
        codec=lambda: (
            info | dict(made_of=json.dumps(made | dict(config=made['config'] | dict(codec='ll'))))
        ),
        process=lambda: (
            info
            | dict(
                made_of=json.dumps(
                    made | dict(config=made['config'] | dict(process=dict(predicts='noise')))
                )
            )
        ),
    )
    save_file(load_file(path), path, metadata=other[how]())


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('saved') / 'model.safetensors'
    save_model(model_of(), path, data='toy')
    return path


@pytest.mark.parametrize(
    'how', ['foreign', 'says', 'text', 'list', 'empty', 'std', 'name', 'option', 'codec', 'process']
)
def test_foreign_files(saved, tmp_path, how):
    path = tmp_path / 'other.safetensors'
    path.write_bytes(saved.read_bytes())
    spoil(path, how)
    with pytest.raises(ValueError) as caught:
        load_model(path)
    assert how in ('codec', 'process') or str(path) in str(caught.value)


@pytest.mark.parametrize('cut', [0, 5, 200, -50])
def test_damaged_files(saved, tmp_path, cut):
    (tmp_path / 'half.safetensors').write_bytes(saved.read_bytes()[:cut])
    with pytest.raises(ValueError, match='half.safetensors is no safetensors file'):
        load_model(tmp_path / 'half.safetensors')


def test_no_file_and_no_pickle(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'):
        load_model(tmp_path / 'nowhere.safetensors')
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path)
    torch.save(dict(a=torch.ones(1)), tmp_path / 'b.safetensors')
    with pytest.raises(ValueError, match='no safetensors file'):
        load_model(tmp_path / 'b.safetensors')
    model = awake()
    save_model(model, tmp_path / 'c.safetensors')
    state = load_file(tmp_path / 'c.safetensors')
    from safetensors import safe_open

    with safe_open(tmp_path / 'c.safetensors', 'pt') as f:
        info = f.metadata()
    state.pop('net.last.2.weight')
    save_file(state, tmp_path / 'c.safetensors', metadata=info)
    with pytest.raises(ValueError, match='net.last.2.weight'):
        load_model(tmp_path / 'c.safetensors')


# the commands -------------------------------------------------------------------------------------


@pytest.fixture
def shell(folder, tmp_path, monkeypatch, capsys):
    "Runs a command in a folder of its own; gives exit status and what was said."
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path / 'runs'))
    monkeypatch.chdir(tmp_path)

    def run(command, *words):
        code = command([str(w) for w in words])
        said = capsys.readouterr()
        assert 'Traceback' not in said.err
        return code, said.out, said.err

    return run


SMALL = ('--crop', 32, '--batch', 2, '--steps', 2)


def test_train_from_large_pictures(shell, folder):
    code, out, err = shell(
        train_superres, '--data', folder, '--valid', folder, '--out', 'new/a.safetensors', *SMALL
    )
    assert (
        code == 0
        and '15_cli: trained' in out
        and 'new/a.safetensors: 2 steps' in out
        and 'PSNR, 1 step' in out
    )
    model, says = load_model('new/a.safetensors')
    assert (
        says['data'] == folder.name
        and says['PSNR, 1 step'] > 10
        and (model.config.steps, model.config.crop, model.config.batch, model.config.codec)
        == (2, 32, 2, 'packet')
    )
    first = load_file('new/a.safetensors')
    code, out, err = shell(
        train_superres, '--data', folder, '--valid', folder, '--out', 'b.safetensors', *SMALL
    )
    assert code == 0 and '15_cli: loaded' in out and same(load_file('b.safetensors'), first)
    code, out, err = shell(
        train_superres, '--data', folder, '--out', 'c.safetensors', *SMALL, '--seed', 1
    )
    assert code == 0 and '15_cli: trained' in out and not same(load_file('c.safetensors'), first)


def test_train_with_and_without_validation(shell, folder):
    assert shell(train_superres, '--data', folder, '--out', 'a.safetensors', *SMALL)[0] == 0
    code, out, err = shell(
        train_superres, '--data', folder, '--valid', folder, '--out', 'a.safetensors', *SMALL
    )
    assert code == 0 and 'PSNR' in out, err


def interrupted(monkeypatch, *words):
    "`train_superres`, stopped by a key behind the checkpoint of step 2."
    make = S.sr_learner

    def stopped(*args, **kw):
        learn = make(*args, **kw)
        save = learn.save

        def kept(*a, **k):
            save(*a, **k)
            if learn.step == 2:
                raise KeyboardInterrupt

        learn.save = kept
        return learn

    with monkeypatch.context() as m:
        m.setattr(S, 'sr_learner', stopped)
        with pytest.raises(KeyboardInterrupt):
            train_superres([str(w) for w in words])


def test_a_stopped_training_is_resumed(shell, folder, monkeypatch):
    words = ('--data', folder, *SMALL[:-1], 4)
    assert shell(train_superres, *words, '--out', 'whole.safetensors')[0] == 0
    monkeypatch.setenv('RESTORE_RUNS', str(Path('other').absolute()))
    interrupted(monkeypatch, *words, '--out', 'part.safetensors')
    code, out, err = shell(train_superres, *words, '--out', 'part.safetensors')
    assert (
        code == 0
        and 'resumed at step 2' in out
        and same(load_file('part.safetensors'), load_file('whole.safetensors'))
    )


@pytest.mark.parametrize(
    'words',
    [
        ('--codec', 'll', '--gains', 'unit'),
        ('--degradation', 'real'),
        ('--degradation', 'real', '--valid', 'VALID'),
        ('--channels', 3),
    ],
)
def test_train_with_other_words(shell, folder, words):
    words = [folder if w == 'VALID' else w for w in words]
    code, out, err = shell(
        train_superres,
        '--data',
        folder,
        '--out',
        'a.safetensors',
        '--crop',
        32,
        '--batch',
        2,
        '--steps',
        1,
        *words,
    )
    assert code == 0, err
    made = asdict(load_model('a.safetensors')[0].config)
    assert all(str(made.get(k[2:], v)) == str(v) for k, v in zip(words[::2], words[1::2]))


def two_folders(root, names=None, factor=4):
    "HR/ and LR/ of three pictures."
    for k, (y, x) in enumerate(sr_pairs(scenes(3), factor)):
        for sub, v in (('HR', x), ('LR', y)):
            (root / sub).mkdir(parents=True, exist_ok=True)
            Image.fromarray((v[0] * 255).round().byte().numpy()).save(
                root / sub / f'{k if names is None or sub == "HR" else names[k]}.png'
            )
    return root


def test_train_from_pairs(shell, tmp_path):
    assert (
        shell(
            train_superres,
            '--data',
            two_folders(tmp_path / 'pairs'),
            '--out',
            'a.safetensors',
            *SMALL,
        )[0]
        == 0
        and load_model('a.safetensors')[1]['data'] == 'pairs'
    )


def test_train_refuses(shell, folder, tmp_path):
    two_folders(tmp_path / 'half', factor=2)
    two_folders(tmp_path / 'names', 'abc')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken').mkdir()
    two_folders(tmp_path / 'large')
    (tmp_path / 'broken' / 'a.png').write_text('no picture')
    two_folders(tmp_path / 'swapped')
    for sub, other in (('LR', 'x'), ('HR', 'LR'), ('x', 'HR')):
        (tmp_path / 'swapped' / sub).rename(tmp_path / 'swapped' / other)
    for data, words, says in (
        ('half', (), 'expected 4 times as large'),
        ('swapped', (), 'expected 4 times as large'),
        ('names', (), 'no image named like'),
        ('empty', (), 'holds no image'),
        ('nowhere', (), 'not a folder'),
        ('broken', (), 'a.png is not a readable image'),
        (folder, ('--codec', 'jpeg'), "'jpeg'"),
        (folder, ('--crop', 34), 'multiple of scale=4'),
        (folder, ('--crop', 128), 'too small for a crop'),
        (folder, ('--valid', 'nowhere'), 'nowhere'),
        (folder, ('--batch', 0), 'batch'),
        (folder, ('--out', 'a.pt'), '.safetensors'),
    ):
        code, out, err = shell(
            train_superres, '--data', data, '--out', 'a.safetensors', *SMALL, *words
        )
        assert (
            code == 2
            and err.startswith('train_superres: ')
            and says in err
            and not Path('a.safetensors').exists()
        ), (data, words, err)


@pytest.mark.parametrize('words', [('--steps', 0), ('--steps', -1), ('--crop', 0)])
def test_train_refuses_numbers(shell, folder, words):
    code, out, err = shell(
        train_superres, '--data', folder, '--out', 'a.safetensors', *SMALL, *words
    )
    assert code == 2 and words[0][2:] in err and not Path('a.safetensors').exists()


def test_spoilt_files_are_refused(saved, tmp_path):
    half = tmp_path / 'half.safetensors'
    half.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(ValueError, match='no safetensors file'):
        load_model(half)
    for name in ('text', 'foreign', 'empty', 'option', 'says'):
        path = tmp_path / f'{name}.safetensors'
        path.write_bytes(saved.read_bytes())
        spoil(path, name)
        with pytest.raises(ValueError, match=path.name):
            load_model(path)


def test_words_that_the_commands_do_not_know(capsys):
    for command, words in (
        (train_superres, []),
        (train_superres, ['--data', 'x', '--out', 'y', '--steps', 'many']),
    ):
        with pytest.raises(SystemExit) as stop:
            command(words)
        assert stop.value.code == 2 and f'usage: {command.__name__}' in capsys.readouterr().err


def test_the_shell_knows_the_commands():
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    scripts = dict(s.split('=', 1) for s in ini['DEFAULT']['console_scripts'].split())
    module, call = scripts['train_superres'].split(':')
    assert getattr(importlib.import_module(module), call) is train_superres


# what the commands must keep, say or refuse -------------------------------------------------------

import re, shutil
from types import SimpleNamespace

import restore_lib.data as D


def never(*args, **kw):
    raise AssertionError('the work began')


def score_of(out):
    return re.search(r'PSNR, 1 step ([\d.]+)', out).group(1)


def bright(source, target):
    "A copy of a folder of pictures with other levels, and other sizes in bytes only by chance."
    for p in sorted(source.rglob('*.png')):
        to = target / p.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(p) as image:
            Image.fromarray(255 - np.asarray(image) // 2).save(to)
    return target


def test_validation_sets_are_told_apart(shell, folder, tmp_path):
    other = bright(folder, tmp_path / 'vb')
    words = ('--data', folder, *SMALL)
    first = shell(train_superres, *words, '--valid', folder, '--out', 'a.safetensors')
    second = shell(train_superres, *words, '--valid', other, '--out', 'b.safetensors')
    again = shell(train_superres, *words, '--valid', folder, '--out', 'c.safetensors')
    assert (
        first[0] == second[0] == again[0] == 0 and 'loaded' in again[1] and 'trained' in second[1]
    )
    assert score_of(first[1]) == score_of(again[1]) != score_of(second[1])
    model, says = load_model('b.safetensors')
    assert same(
        load_file('a.safetensors'), load_file('b.safetensors')
    ) and f"{says['PSNR, 1 step']:.2f}" == score_of(second[1])


@pytest.fixture
def key(monkeypatch, shell):
    "What a training with these words is kept under: the command, without the training."
    seen = []

    def found(name, config, *args, **kw):
        seen.append(config)
        never()

    monkeypatch.setattr(S, 'make_sr', lambda *args, **kw: None)
    monkeypatch.setattr(S, 'sr_learner', lambda *args, **kw: SimpleNamespace(fit_or_load=found))

    def run(*words):
        with pytest.raises(AssertionError, match='the work began'):
            train_superres([str(w) for w in ('--out', 'a.safetensors', *SMALL, *words)])
        return seen[-1]

    return run


def test_every_file_counts(key, tmp_path):
    "Files of the same name and the same number of bytes with other pixels."
    root, held = two_folders(tmp_path / 'pairs'), two_folders(tmp_path / 'held')
    for p in [*root.rglob('*.png'), *held.rglob('*.png')]:
        with Image.open(p) as image:
            image.save(p.with_suffix('.bmp'))  # its size says nothing of its pixels
        p.unlink()
    keys = [key('--data', root, '--valid', held)]
    assert key('--data', root, '--valid', held) == keys[0]
    for target in (root / 'LR/1.bmp', root / 'HR/0.bmp', held / 'HR/2.bmp', held / 'LR/2.bmp'):
        size = target.stat().st_size
        with Image.open(target) as image:
            changed = np.asarray(image).copy()
        changed[0, 0] = 255 - changed[0, 0]
        Image.fromarray(changed).save(target)
        assert target.stat().st_size == size
        keys.append(key('--data', root, '--valid', held))
    keys.append(key('--data', root))
    (root / 'LR').rename(tmp_path / 'gone')
    keys.append(key('--data', root))
    (root / 'HR/2.bmp').rename(root / 'HR/3.bmp')
    keys.append(key('--data', root))
    shutil.copytree(root, tmp_path / 'moved')
    assert key('--data', tmp_path / 'moved') == keys[-1]  # where they lie does not count
    assert len({json.dumps(k) for k in keys}) == len(keys) == 8


def test_what_changes_while_it_is_read(shell, folder, tmp_path, monkeypatch):
    mine = bright(folder, tmp_path / 'mine')
    read = D.ImageFolder.__getitem__

    def swap(self, k):
        out = read(self, k)
        with open(self.paths[0], 'ab') as file:
            file.write(b'\0')
        return out

    monkeypatch.setattr(D.ImageFolder, '__getitem__', swap)
    code, out, err = shell(train_superres, '--data', mine, '--out', 'a.safetensors', *SMALL)
    assert code == 2 and 'changed while it was read' in err and not Path('a.safetensors').exists()


@pytest.mark.parametrize(
    'out, says',
    [
        ('folder.safetensors', 'is a folder'),
        ('file.txt/a.safetensors', 'is no folder'),
        ('/proc/a.safetensors', 'cannot be written'),
        ('x' * 300 + '.safetensors', 'cannot be written'),
        ('a.pt', 'does not end in .safetensors'),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_training(
    shell, folder, monkeypatch, out, says
):
    monkeypatch.setattr(S, 'make_sr', never)
    monkeypatch.setattr(S, 'sr_learner', never)
    Path('folder.safetensors').mkdir()
    Path('file.txt').write_text('')
    code, _, err = shell(train_superres, '--data', folder, '--out', out, *SMALL)
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1
    assert sorted(p.name for p in Path('.').iterdir()) == ['file.txt', 'folder.safetensors']


def test_a_loss_that_is_no_number_is_a_message(shell, folder, monkeypatch):
    Path('a.safetensors').write_text('old')
    make = S.make_sr

    def broken(*args, **kw):
        model = make(*args, **kw)
        with torch.no_grad():
            for p in model.net.parameters():
                p.fill_(float('nan'))
        return model

    monkeypatch.setattr(S, 'make_sr', broken)
    code, out, err = shell(
        train_superres, '--data', folder, '--out', 'a.safetensors', '--quiet', *SMALL
    )
    assert (
        code == 2
        and err.startswith('train_superres: the loss of step 0 is nan')
        and len(err.strip().splitlines()) == 1
    )
    assert Path('a.safetensors').read_text() == 'old' and [
        p.name for p in Path('.').glob('*.safetensors')
    ] == ['a.safetensors']


def test_a_model_that_cannot_be_saved_leaves_the_old_one(shell, folder, monkeypatch):
    Path('a.safetensors').write_text('old')
    save = S.save_model

    def full(model, path, **says):
        save(model, path, **says)
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(S, 'save_model', full)
    code, out, err = shell(
        train_superres, '--data', folder, '--out', 'a.safetensors', '--quiet', *SMALL
    )
    assert code == 2 and 'No space left' in err and Path('a.safetensors').read_text() == 'old'
    left = sorted(p.name for p in Path('.').iterdir() if p.name != 'runs')
    assert left == ['a.curve.jsonl', 'a.safetensors']  # no part of a model


def test_training_shows_how_far_it_is(shell, folder):
    code, out, err = shell(
        train_superres, '--data', folder, '--out', 'a.safetensors', *SMALL[:-1], 4
    )
    assert code == 0 and '4/4' in err and 'loss=' in err and '4/4' not in out


def test_only_what_is_shown_is_read(key, folder, tmp_path, monkeypatch):
    "Validation looks at eight pairs: a ninth is not loaded, though it counts in the key."
    (tmp_path / 'many').mkdir()
    for k in range(9):
        shutil.copy(folder / '0.png', tmp_path / f'many/{k}.png')
    seen, read = [], D.ImageFolder.__getitem__

    def count(self, k):
        seen.append(self.paths[k].parent.name)
        return read(self, k)

    monkeypatch.setattr(D.ImageFolder, '__getitem__', count)
    before = key('--data', folder, '--valid', 'many')
    assert seen.count('many') == 8
    shutil.copy(folder / '1.png', tmp_path / 'many/8.png')
    assert key('--data', folder, '--valid', 'many') != before


def test_a_curve_stands_beside_the_model(shell, folder):
    words = ('--data', folder, '--valid', folder, '--quiet', *SMALL[:-1], 4)
    assert shell(train_superres, *words, '--out', 'new/a.safetensors')[0] == 0
    text = Path('new/a.curve.jsonl').read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [r['step'] for r in rows if 'lr' in r] == [1, 2, 3, 4]
    assert [r['step'] for r in rows if 'PSNR, 1 step' in r] == [1, 2, 3, 4]
    assert shell(train_superres, *words, '--out', 'b.safetensors')[0] == 0  # loaded
    assert Path('b.curve.jsonl').read_text() == text


def spoiling(monkeypatch, at):
    "From a step on, a training makes its model worse and worse; gives back the weights it kept."
    make, kept = S.sr_learner, {}

    class Spoil(Callback):
        decides_nothing = True  # to a fingerprint, which would see `kept`

        def before_valid(self, learn):
            kept[learn.step] = held(learn.bare)

        def after_step(self, learn):
            if learn.step >= at:
                with torch.no_grad():
                    for part in (learn.bare.net, learn.cbs[0].shadow):
                        state = part if isinstance(part, dict) else part.state_dict()
                        state['net.last.2.bias' if part is state else 'last.2.bias'].add_(1.0)

    def spoilt(*args, **kw):
        return make(*args, **kw | dict(cbs=[*kw['cbs'], Spoil()]))

    monkeypatch.setattr(S, 'sr_learner', spoilt)
    return kept


def test_the_model_that_validates_best_is_written(shell, folder, monkeypatch):
    kept = spoiling(monkeypatch, 3)
    words = ('--data', folder, '--valid', folder, '--quiet', *SMALL[:-1], 5)
    code, out, err = shell(train_superres, *words, '--out', 'a.safetensors')
    assert code == 0, err
    rows = [json.loads(line) for line in Path('a.curve.jsonl').read_text().splitlines()]
    scores = {r['step']: r['PSNR, 1 step'] for r in rows if 'PSNR, 1 step' in r}
    best = max(scores, key=scores.get)
    model, says = load_model('a.safetensors')
    assert best < 3 and scores[5] < scores[best] - 1
    assert says['best_step'] == best and says['PSNR, 1 step'] == pytest.approx(scores[best])
    assert f'at step {best}' in out and score_of(out) == f'{scores[best]:.2f}'
    assert all(torch.allclose(v, kept[best][k], atol=1e-3) for k, v in model.state_dict().items())
    again = shell(train_superres, *words, '--out', 'b.safetensors')  # what is loaded knows it, too
    assert 'loaded' in again[1] and same(load_file('a.safetensors'), load_file('b.safetensors'))


def test_without_validation_the_last_model_is_written(shell, folder, monkeypatch):
    spoiling(monkeypatch, 1)
    words = ('--data', folder, '--quiet', *SMALL)
    code, out, err = shell(train_superres, *words, '--out', 'a.safetensors')
    assert code == 0 and 'at step' not in out
    bias = load_model('a.safetensors')[0].net.last[-1].bias
    assert bias.mean().item() == pytest.approx(2, abs=0.3)


def test_a_resumed_training_knows_what_was_best(shell, folder, monkeypatch):
    words = ('--data', folder, '--valid', folder, '--quiet', *SMALL[:-1], 5)
    spoiling(monkeypatch, 3)
    assert shell(train_superres, *words, '--out', 'whole.safetensors')[0] == 0
    monkeypatch.setenv('RESTORE_RUNS', str(Path('other').absolute()))
    interrupted(monkeypatch, *words, '--out', 'part.safetensors')
    code, out, err = shell(train_superres, *words, '--out', 'part.safetensors')
    assert code == 0 and 'resumed at step 2' in out
    assert same(load_file('part.safetensors'), load_file('whole.safetensors'))
    assert load_model('part.safetensors')[1] == load_model('whole.safetensors')[1]


def test_a_loss_that_becomes_nan_leaves_the_last_good_checkpoint(shell, folder, monkeypatch):
    make = S.sr_learner

    def breaking(*args, **kw):
        learn = make(*args, **kw)
        loss = learn.loss_fn

        class Breaks(SRLoss):
            def __call__(self, model, batch):
                out = loss(model, batch)
                self.last = loss.last
                return out * float('nan') if learn.step == 3 else out

        learn.loss_fn = Breaks()
        return learn

    Path('a.safetensors').write_text('old')
    monkeypatch.setattr(S, 'sr_learner', breaking)
    words = ('--data', folder, '--quiet', *SMALL[:-1], 6)
    code, out, err = shell(train_superres, *words, '--out', 'a.safetensors')
    assert code == 2 and err.startswith('train_superres: the loss of step 3 is nan')
    found = re.search(r'the last good checkpoint is (.*)', err).group(1)
    assert found.endswith('step_000000003') and Path(found, 'state.safetensors').is_file()
    assert all(v.isfinite().all() for v in load_file(Path(found, 'state.safetensors')).values())
    assert Path('a.safetensors').read_text() == 'old'
    assert len(Path('a.curve.jsonl').read_text().splitlines()) == 3


def test_a_folder_larger_than_memory(shell, folder, monkeypatch):
    "Nothing is held beyond what is allowed: images are read again, and the training is the same."
    reads, read = [], D.ImageFolder.__getitem__

    def count(self, k):
        reads.append(k)
        return read(self, k)

    monkeypatch.setattr(D.ImageFolder, '__getitem__', count)
    words = ('--data', folder, '--quiet', *SMALL)
    assert shell(train_superres, *words, '--out', 'a.safetensors')[0] == 0
    held_in_memory = len(reads)
    monkeypatch.setenv('RESTORE_RUNS', str(Path('other').absolute()))
    assert shell(train_superres, *words, '--memory', 0, '--out', 'b.safetensors')[0] == 0
    assert held_in_memory == 3 and len(reads) - held_in_memory == 3 + 96 + 4
    assert same(load_file('a.safetensors'), load_file('b.safetensors'))


def test_what_is_held_has_its_room():
    reads = []

    class Items:
        def __len__(self):
            return 4

        def __getitem__(self, k):
            reads.append(k)
            return torch.full((10,), float(k)), torch.zeros(15)

    kept = S.HeldInMemory(Items(), 250, 'a')  # each item has 100 bytes
    for k in (0, 1, 2, 3, 0, 1, 2, 3):
        assert kept[k][0][0] == k
    assert reads == [0, 1, 2, 3, 2, 3] and len(kept) == 4 and len(kept.held) == 2
    assert kept.decides() == dict(content='a')
    with pytest.raises(ValueError, match='most_bytes is -1'):
        S.HeldInMemory(Items(), -1)


# bad input ----------------------------------------------------------------------------------------

NAN = torch.tensor(float('nan')).expand(1, 1, 8, 8)


@pytest.mark.parametrize(
    'call, error, says',
    [
        (
            lambda: model_of()(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 32, 36)),
            ValueError,
            'expected x 4 times as large',
        ),
        (
            lambda: model_of()(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 16, 16)),
            ValueError,
            'expected x 4 times as large',
        ),
        (
            lambda: model_of()(torch.rand(2, 1, 8, 8), torch.rand(3, 1, 32, 32)),
            ValueError,
            'as many',
        ),
        (lambda: model_of(3)(torch.rand(1, 1, 8, 8)), ValueError, 'y has 1 channels.*expected 3'),
        (
            lambda: model_of(3)(torch.rand(1, 3, 8, 8), torch.rand(1, 1, 32, 32)),
            ValueError,
            'x has 1 channels.*expected 3',
        ),
        (lambda: model_of()(torch.rand(1, 3, 8, 8)), ValueError, 'y has 3 channels.*expected 1'),
        (lambda: model_of()(NAN), ValueError, 'y holds 64 values that are NaN'),
        (
            lambda: model_of()(torch.rand(1, 1, 8, 8), torch.full((1, 1, 32, 32), float('nan'))),
            ValueError,
            'x holds 1024 values that are NaN',
        ),
        (lambda: model_of()(torch.rand(1, 1, 8, 8) * 255), ValueError, 'is it 0 to 255'),
        (lambda: model_of()(torch.rand(1, 8, 8)), ValueError, r'expected \(b, c, h, w\)'),
        (lambda: model_of()((torch.rand(1, 1, 8, 8) * 255).byte()), TypeError, '8-bit'),
        (
            lambda: model_of()(torch.rand(1, 1, 8, 8), steps=16),
            ValueError,
            'steps is 16; expected 1 to 15',
        ),
        (lambda: model_of()(torch.rand(1, 1, 8, 8), steps=0), ValueError, 'steps is 0'),
        (
            lambda: fresh(codec_options=dict(level=3))(torch.rand(1, 1, 5, 8)),
            ValueError,
            '20 x 32.*factor=8.*24 x 32',
        ),
        (lambda: superresolve(model_of(), NAN), ValueError, 'image holds 64 values that are NaN'),
        (lambda: superresolve(model_of(), np.zeros((4, 4))), TypeError, 'image is ndarray'),
        (lambda: superresolve(model_of(), [1, 2]), TypeError, 'image is list'),
        (lambda: superresolve(model_of(), torch.rand(4)), ValueError, r'\(4,\)'),
        (
            lambda: superresolve(model_of(), torch.rand(1, 1, 1, 4, 4)),
            ValueError,
            r'\(1, 1, 1, 4, 4\)',
        ),
        (lambda: superresolve(model_of(), torch.rand(2, 4, 4)), ValueError, 'image has 2 channels'),
        (lambda: superresolve(model_of(), torch.zeros(0, 4)), ValueError, 'at least one pixel'),
        (
            lambda: superresolve(model_of(), torch.zeros(4, 4, dtype=torch.uint8)),
            TypeError,
            '8-bit',
        ),
        (lambda: superresolve(model_of(), 'nowhere.png'), FileNotFoundError, 'nowhere.png'),
        (
            lambda: superresolve(model_of(), Image.new('F', (4, 4))),
            ValueError,
            'floats of unknown range',
        ),
        (lambda: superresolve(model_of(), torch.rand(8, 8), 16), ValueError, 'steps is 16'),
        (
            lambda: superresolve(model_of(), torch.rand(8, 8), randomness=2),
            ValueError,
            'randomness is 2',
        ),
        (
            lambda: superresolve(model_of(), torch.rand(20, 20), window=8, overlap=8),
            ValueError,
            'overlap is 8',
        ),
        (lambda: sr_pairs([torch.rand(1, 3, 64)]), ValueError, r'images\[0\] is smaller than 4'),
        (lambda: sr_pairs([torch.rand(1, 64, 64), NAN[0]]), ValueError, r'images\[1\] holds 64'),
        (lambda: sr_pairs(torch.rand(64, 64)), ValueError, r'images\[0\] has shape'),
        (lambda: fresh(crop=34), ValueError, 'size is 34; expected a multiple of scale=4'),
        (
            lambda: fresh(crop=36, codec_options=dict(level=3)),
            ValueError,
            '36 x 36, which factor=8',
        ),
        (lambda: fresh(crop=128), ValueError, 'too small for a crop'),
        (lambda: make_sr(config(), []), ValueError, 'images is empty'),
        (
            lambda: make_sr(config(), [(y, F.pad(x, (0, 4))) for y, x in pairs()]),
            ValueError,
            'expected x 4 times as large',
        ),
        (lambda: make_sr(config(), pairs(3)), ValueError, '3 channels'),
        (lambda: make_sr(config(channels=3), pairs()), ValueError, '1 channels'),
        (lambda: fresh(channels=2), ValueError, 'channels is 2'),
        (lambda: fresh(codec='jpeg'), ValueError, "is 'jpeg'; expected one of ll"),
        (lambda: fresh(net='huge'), ValueError, "net is 'huge'"),
        (lambda: fresh(gains='two'), ValueError, "gains is 'two'"),
        (lambda: fresh(process=dict(steps=0)), ValueError, 'steps is 0'),
        (lambda: fresh(process=dict(kappa=-1)), ValueError, 'kappa is -1'),
        (lambda: fresh(process=dict(predicts='noise')), ValueError, "predicts.*'x0'"),
        (lambda: fresh(process=None, weight='sigma'), ValueError, 'weight'),
        (lambda: config(steps=0), ValueError, 'steps is 0'),
        (lambda: config(batch=-1), ValueError, 'batch is -1'),
        (lambda: config(crop=0), ValueError, 'crop is 0'),
        (lambda: config(scale=1.5), ValueError, 'scale is 1.5'),
        (
            lambda: LatentSR(PacketCodec(), Zero(), ResidualShift(predicts='residual')),
            ValueError,
            "'residual'; expected 'x0'",
        ),
        (lambda: fresh(process=dict(kappa=[1.0, 2.0])), ValueError, '2 channels'),
        (lambda: learner(fresh(degradation='snow')), ValueError, "degradation is 'snow'"),
        (lambda: learner(fresh(weight='heavy')).fit(1), ValueError, "weight is 'heavy'"),
        (
            lambda: learner(fresh(), [(y, x[..., :-4]) for y, x in pairs()]).fit(1),
            ValueError,
            'expected x 4 times as large',
        ),
        (
            lambda: learner(
                fresh(), [(y, torch.full_like(x, float('nan'))) for y, x in pairs()]
            ).fit(1),
            ValueError,
            'NaN',
        ),
        (lambda: SRConfig(depth=3), TypeError, 'depth'),
        (lambda: SRConfig.paper(depth=3), TypeError, 'depth'),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize('process', [{}, None])
def test_training_pass_gives_back_the_picture_behind_the_loss(process):
    model = make_sr(
        SRConfig(process=process, steps=1), sr_pairs([torch.rand(1, 64, 64) for _ in range(3)])
    )
    torch.nn.init.normal_(model.net.last[-1].weight, std=0.05)
    y, x = (torch.stack(v) for v in zip(*sr_pairs([torch.rand(1, 64, 64) for _ in range(3)])))
    torch.manual_seed(0)
    alone = model(y, x)
    torch.manual_seed(0)
    loss, x_hat = model(y, x, decoded=True)
    assert torch.equal(loss.mean, alone.mean) and x_hat.shape == x.shape
    with torch.no_grad():
        error = (
            (model.codec.encode(x_hat)[0] - model.codec.encode(x)[0]).square().flatten(1).mean(1)
        )
    torch.testing.assert_close(
        error, loss.per_sample, atol=1e-6, rtol=1e-4
    )  # the packets are orthonormal: this is the picture of that very loss
    x_hat.square().mean().backward()
    assert model.net.last[-1].weight.grad.abs().sum() > 0


# saved models come back as the same function ------------------------------------------------------


def exact(model):
    return halved(
        model
    )  # what half precision holds, so that a file must give back the same numbers


KNOBS = [
    dict(codec='full', codec_options=dict(level=1, wavelet='db2')),
    dict(codec='dct', codec_options=dict(block=8)),
    dict(codec='vq', codec_options=dict(factor=2, latent=3, codes=32, width=8, depth=1)),
    dict(codec='hybrid', codec_options=dict(level=1, width=8, depth=1)),
    dict(gains='unit'),
    dict(net_options=NET | dict(around=False)),
    dict(net_options=NET | dict(skip=True)),
    dict(net_options=NET | dict(head_channels=4)),
    dict(net_options=NET | dict(mults=[1, 2], blocks=2)),
    dict(process=None),
    dict(process=dict(steps=4, kappa=1.5, min_noise=0.1, power=0.5, etas_end=0.9, latent_std=0.7)),
    dict(channels=3),
    dict(scale=2),
]


@pytest.mark.parametrize('kw', KNOBS)
def test_every_knob_comes_back(tmp_path, kw):
    model = exact(awake(**kw))
    save_model(model, tmp_path / 'a.safetensors')
    back, _ = load_model(tmp_path / 'a.safetensors')
    y = torch.rand(1, model.codec.channels, 8, 8)
    for steps in (1, 3):
        assert torch.equal(superresolve(back, y, steps), superresolve(model, y, steps))
    assert back.config == model.config


@pytest.mark.parametrize('wavelet', ['db2', 'bior4.4', 'haar'])
def test_a_swapped_wavelet_comes_back(tmp_path, wavelet):
    from restore_lib.ablations import swap_wavelet

    for model in (exact(awake()), exact(awake(codec='full', codec_options=dict(level=1)))):
        swapped = swap_wavelet(model, wavelet)
        save_model(swapped, tmp_path / 'a.safetensors')
        back, y = load_model(tmp_path / 'a.safetensors')[0], torch.rand(1, 1, 8, 8)
        assert torch.equal(superresolve(back, y, 2), superresolve(swapped, y, 2)) and close(
            superresolve(back, y, 2), superresolve(model, y, 2), 1e-5
        ) == (wavelet == 'haar')


def test_files_that_name_no_class_are_refused(saved, tmp_path):
    path = tmp_path / 'a.safetensors'
    save_file(load_file(saved), path, metadata=dict(superres='{}', says='{}'))
    with pytest.raises(ValueError, match='a.safetensors names no class.*save .* again'):
        load_model(path)


def test_what_was_changed_by_hand_is_not_saved(tmp_path):
    process, net, scaled, other = (awake() for _ in range(4))
    process.process = ResidualShift(kappa=1.0)
    net.net = SwinUNet.tiny(32, 16, **(NET | dict(window=2)))
    scaled.scale = 2

    class Mine(PacketCodec):
        pass

    other.codec = Mine()
    for model, says in (
        (process, 'changed by hand'),
        (net, 'changed by hand'),
        (scaled, 'changed by hand'),
        (other, 'the codec is Mine; expected one of'),
    ):
        with pytest.raises(ValueError, match=says):
            save_model(model, tmp_path / 'a.safetensors')
    with pytest.raises(ValueError, match='no configuration'):
        save_model(LatentSR(make_codec('packet'), nn.Identity()), tmp_path / 'a.safetensors')
    large = awake()
    large.net.last[-1].bias.data[0] = 1e5
    with pytest.raises(ValueError, match='net.last.2.bias holds numbers beyond 65504'):
        save_model(large, tmp_path / 'a.safetensors')
    assert not list(tmp_path.iterdir())


def test_making_saving_and_loading_leave_the_callers_random_state(tmp_path):
    import random

    states = lambda: (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
    )
    was = states()
    model = make_sr(config(codec='hybrid'), pairs())
    save_model(model, tmp_path / 'a.safetensors')
    load_model(tmp_path / 'a.safetensors')
    assert states() == was
    assert same(
        held(model), held(make_sr(config(codec='hybrid'), pairs()))
    )  # and its own is its seed's


WRONG = dict(
    list=[],
    none=None,
    number=3,
    text='x',
    config=dict(config=[]),
    crop=dict(config=dict(crop='a')),
    options=dict(config=dict(net_options=[])),
    codec_kind=dict(codec=dict(kind='Module', arguments={})),
    codec_list=dict(codec=[]),
    arguments=dict(codec=dict(kind='PacketCodec', arguments=[])),
    level=dict(codec=dict(kind='PacketCodec', arguments=dict(channels=1, level='two'))),
    std=dict(latent_std={}),
    std_text=dict(latent_std='a'),
    std_nan=dict(latent_std=float('nan')),
    base=dict(config=dict(net_options=NET | dict(base=None))),
    mults=dict(config=dict(net_options=NET | dict(mults=[-1]))),
    heads=dict(config=dict(net_options=NET | dict(head_channels=0))),
)


def changed(saved, path, change):
    from safetensors import safe_open

    with safe_open(saved, 'pt') as f:
        info = f.metadata()
    made = json.loads(info['made_of'])
    if isinstance(change, dict):
        config = change.get('config', {})
        made |= {k: v for k, v in change.items() if k != 'config'} | dict(
            config=made['config'] | config if isinstance(config, dict) else config
        )
    else:
        made = change
    save_file(load_file(saved), path, metadata=info | dict(made_of=json.dumps(made)))
    return path


@pytest.mark.parametrize('name', WRONG)
def test_metadata_of_the_wrong_kind(saved, tmp_path, name):
    with pytest.raises(
        ValueError,
        match='a.safetensors does not say how its model is built .*expected a file by save_model',
    ):
        load_model(changed(saved, tmp_path / 'a.safetensors', WRONG[name]))


def test_what_a_file_says_is_a_dict(saved, tmp_path):
    from safetensors import safe_open

    with safe_open(saved, 'pt') as f:
        info = f.metadata()
    for says in ('[]', 'null', '3', '"x"'):
        save_file(load_file(saved), tmp_path / 'a.safetensors', metadata=info | dict(says=says))
        with pytest.raises(ValueError, match='does not say'):
            load_model(tmp_path / 'a.safetensors')


def test_shapes_are_compared_before_memory_is_asked_for(saved, tmp_path):
    "base=640 is a network of 400 MB; what was tried was 20,000, 25 GB."
    from restore_lib.metrics import peak_memory

    path = changed(
        saved, tmp_path / 'a.safetensors', dict(config=dict(net_options=NET | dict(base=640)))
    )

    def load():
        with pytest.raises(ValueError, match='copied'):
            load_model(path)

    assert peak_memory(load) < 5e6


def test_a_file_with_more_than_its_model(saved, tmp_path):
    state, path = load_file(saved), tmp_path / 'a.safetensors'
    changed(saved, path, {})
    from safetensors import safe_open

    with safe_open(path, 'pt') as f:
        info = f.metadata()
    save_file(state | dict(extra=torch.ones(1)), path, metadata=info)
    with pytest.raises(
        ValueError, match="holds 'extra', which the model that it describes does not have"
    ):
        load_model(path)


# memory -------------------------------------------------------------------------------------------


class Pointwise(nn.Module):
    "A network of next to no memory."

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(2 * c, c, 1)

    def forward(self, z, t, cond):
        return self.conv(torch.cat([z, cond], 1))


@pytest.mark.parametrize(
    'codec, channels, steps, most',
    [
        ('packet', 1, 1, 400),
        ('packet', 3, 1, 550),
        ('packet', 3, 4, 700),
        ('ll', 3, 1, 550),
        ('vq', 1, 1, 400),
    ],
)
def test_memory_grows_little_with_the_picture(codec, channels, steps, most):
    "Bytes a pixel at which memory grows: 64 for each colour are the result itself."
    from restore_lib.metrics import peak_memory

    made = make_codec(codec)
    model = LatentSR(made, Pointwise(made.latent_channels), ResidualShift())
    small, large = (
        peak_memory(lambda y: superresolve(model, y, steps), torch.rand(channels, s, s))
        for s in (192, 320)
    )
    assert 64 * channels < (large - small) / (320**2 - 192**2) < most


def test_a_file_takes_little_more_memory_than_its_tensor():
    "Rounding a result to levels was the peak: doubles, twice, of all of it."
    import tracemalloc

    from restore_lib.metrics import peak_memory

    made = make_codec('packet')
    model = LatentSR(made, Pointwise(made.latent_channels), ResidualShift())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 240, 3), np.uint8))
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    torchs = [peak_memory(lambda: superresolve(model, x)) for x in (image, tensor)]
    assert torchs[0] < 1.1 * torchs[1]
    tracemalloc.start()
    out = superresolve(model, image)
    numpys = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a byte a value of the result, its copy for Pillow, and a strip in doubles
    assert numpys < 2.5 * np.asarray(out).size + 6e6


@pytest.mark.parametrize('name', CODECS)
def test_strips_and_planes_are_the_whole(name, monkeypatch):
    "A colour photograph, plane by plane, in strips: as one walk of all planes with the same noise."
    made = make_codec(name)
    torch.nn.init.normal_(made.gains, 1, 0.1)
    model, y = (
        LatentSR(made, Pointwise(made.latent_channels), ResidualShift()).eval(),
        torch.rand(1, 3, 40, 24),
    )
    with torch.no_grad():
        z, side = made.encode(bicubic_up(y[0][:, None], 4))
        want = made.decode(
            model.process.sample(model.correct, z, 3, generator=gen(2)), side
        ).reshape(1, 3, 160, 96)
    heights, decode = [], made.decode
    monkeypatch.setattr(
        made, 'decode', lambda z, side=(): heights.append(tuple(z.shape[::2])) or decode(z, side)
    )
    out = superresolve(model, y, 3, 2, window=12, overlap=8, batch=1)
    assert (
        close(out, want, 2e-5)
        and len(heights) > 6
        and {b for b, _ in heights} == {1}
        and max(h for _, h in heights) < z.shape[2]
    )


def test_a_cascade_in_planes():
    "The first model of a cascade draws its noise for all planes at once, as for a small picture."
    before, y = local(1), torch.rand(1, 3, 30, 24)
    model = LatentSR(make_codec('packet'), Local(16, 1), ResidualShift(), before=before).measure(
        *batch()
    )
    assert close(
        superresolve(model, y, 2, window=12, overlap=8, batch=1), superresolve(model, y, 2), 2e-5
    )


# numbers of every kind, and what makes no sense ---------------------------------------------------


def test_numpy_numbers_are_numbers(tmp_path):
    i, r = np.int64, np.float32
    kw = dict(crop=32, batch=4, steps=10, scale=4, codec_steps=2, seed=3, channels=1)
    plain = config(**kw, lr=0.5, ema=0.25, clip=0.5, warmup=0.5, net_options=NET)
    c = config(
        **{k: i(v) for k, v in kw.items()},
        lr=r(0.5),
        ema=r(0.25),
        clip=r(0.5),
        warmup=r(0.5),
        net_options={k: i(v) for k, v in NET.items()},
    )
    assert (
        c == plain and repr(c) == repr(plain) and json.dumps(asdict(c)) == json.dumps(asdict(plain))
    )
    model = make_sr(c, pairs())
    assert same(held(model), held(make_sr(plain, pairs())))
    save_model(model, tmp_path / 'a.safetensors', psnr=r(1.5))
    assert load_model(tmp_path / 'a.safetensors')[0].config == plain
    y = torch.rand(1, 1, 24, 24)
    assert torch.equal(
        superresolve(model, y, i(2), i(1), i(16), i(8), i(2), r(1)),
        superresolve(model, y, 2, 1, 16, 8, 2, 1.0),
    )
    assert sr_pairs(scenes(1), i(4), i(8))[0][0].shape == sr_pairs(scenes(1), 4, 8)[0][
        0
    ].shape and torch.equal(unsharp(y, r(0.5)), unsharp(y, 0.5))
    assert config(
        process=dict(kappa=np.array([1.0, 2.0]), latent_std=torch.ones(2))
    ).process == dict(kappa=[1.0, 2.0], latent_std=[1.0, 1.0])


NAN_ = float('nan')


@pytest.mark.parametrize(
    'name, value',
    [
        *((k, v) for k in ('crop', 'batch', 'steps', 'scale') for v in (0, -1, 1.5, True)),
        ('seed', 1.5),
        *(('lr', v) for v in (-1, 0, NAN_)),
        *(('ema', v) for v in (5, 1, -0.1, NAN_)),
        ('lr_floor', -1),
        ('lr_floor', 2),
        ('warmup', NAN_),
        ('warmup', 1.5),
        ('weight_decay', -0.1),
        ('weight_decay', NAN_),
        ('clip', 0),
        ('clip', -1),
        ('clip', NAN_),
        ('channels', 2),
        ('precision', 'half'),
        ('codec_options', dict(block=3)),
        ('net_options', dict(deep=3)),
        ('process', dict(kapa=1)),
    ],
)
def test_a_configuration_names_what_makes_no_sense(name, value):
    with pytest.raises(ValueError, match=f'^{name} '):
        config(**{name: value})


@pytest.mark.parametrize(
    'name, value',
    [
        ('crop', 'a'),
        ('lr', None),
        ('net_options', [1]),
        ('codec_options', None),
        ('net_options', NET | dict(mults={1})),
    ],
)
def test_a_configuration_names_what_is_no_number(name, value):
    with pytest.raises(TypeError, match=rf'^{name}\b'):
        config(**{name: value})


@pytest.mark.parametrize(
    'call, says',
    [
        (lambda: sr_pairs(scenes(1), 4, 0), 'multiple is 0'),
        (lambda: sr_pairs(scenes(1), 2.5), 'scale is 2.5'),
        (lambda: unsharp(torch.rand(1, 1, 9, 9), NAN_), 'amount is nan'),
        (lambda: unsharp(torch.rand(1, 1, 9, 9), 1, -1), 'sigma is -1'),
        (lambda: fresh().measure(torch.rand(1, 1, 8, 8), torch.rand(3, 1, 32, 32)), 'x has shape'),
        (
            lambda: fresh().measure(torch.rand(0, 1, 8, 8), torch.rand(0, 1, 32, 32)),
            'at least one image',
        ),
        (lambda: fresh()(torch.rand(0, 1, 8, 8)), 'at least one image'),
        (lambda: LatentSR(make_codec('packet'), nn.Identity(), scale=0), 'scale is 0'),
        (lambda: Buckets(SRLoss(), ResidualShift(), n=0), 'n is 0'),
        (lambda: Buckets(SRLoss(), ResidualShift(), n=16), 'n is 16'),
        (lambda: sr_learner(fresh(), pairs(), pairs(), n_valid=0), 'n_valid is 0'),
        (lambda: sr_learner(fresh(), pairs(), workers=-1), 'workers is -1'),
        *[
            (lambda kw=kw: superresolve(model_of(), torch.rand(8, 8), **kw), f'{next(iter(kw))} is')
            for kw in (
                dict(window=0),
                dict(window=-3),
                dict(overlap=-1),
                dict(batch=0),
                dict(batch=-1),
                dict(batch=1.5),
                dict(seed=1.5),
                dict(window=NAN_),
            )
        ],
    ],
)
def test_what_makes_no_sense_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_what_was_seen_last_is_no_setting():
    "A fingerprint of a run sees what pickle would store: not the last batch."
    loss = SRLoss()
    buckets = Buckets(loss, ResidualShift())
    loss.last, buckets.seen = 'a batch', ['a batch']
    assert (
        loss.__getstate__()['last'] is None
        and buckets.__getstate__()['seen'] == []
        and loss.last == 'a batch'
        and buckets.seen == ['a batch']
    )
    assert loss.__getstate__()['weight'] == 'uniform' and copy.deepcopy(loss).weight == 'uniform'
