import json, multiprocessing, os, random, signal, subprocess, sys, time
from functools import partial
from pathlib import Path

from common import launcher
import numpy as np
import pytest
import torch
from torch import nn

import toy
from restore_lib import records
from restore_lib.checkpoints import load_checkpoint
from restore_lib.learner import (
    Callback, EMA, Learner, Metrics, Progress, ResidualCNN, param_groups, warmup_cosine,
)
from restore_lib.loaders import positioned

HERE = Path(__file__).parent


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def weights(learn):
    return {k: v.clone() for k, v in learn.bare.state_dict().items()}


def test_seeds_give_the_same_run_and_other_seeds_another():
    a, b, c = (weights(toy.learner(seed=s).fit(20)) for s in (0, 0, 1))
    assert same(a, b) and not same(a, c)


def test_workers_change_nothing():
    assert same(weights(toy.learner().fit(20)), weights(toy.learner(workers=2).fit(20)))


def test_matches_the_bare_loop():
    "The Learner's weights after ten steps are those of the loop that it replaces."
    learn = toy.learner(toy.plain_loss, cbs=[])
    learn.bare[2].p = 0.0
    model = toy.net()
    model[2].p = 0.0
    opt, batches, factor = (
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        iter(positioned(torch.utils.data.DataLoader(toy.Noisy(), 8, shuffle=True))),
        warmup_cosine(0.1),
    )
    for step in range(10):
        for g in opt.param_groups:
            g['lr'] = 1e-2 * factor(step, 10)
        loss = toy.plain_loss(model, next(batches))
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    learn.fit(10)
    assert all(
        torch.allclose(a, b, atol=1e-7)
        for a, b in zip(model.state_dict().values(), weights(learn).values())
    )


def test_accumulation_equals_the_large_batch():
    def run(batch, accumulate):
        model = toy.net()
        model[2].p = 0.0
        return weights(
            toy.learner(
                toy.plain_loss, batch=batch, accumulate=accumulate, model=model, cbs=[]
            ).fit(12)
        )

    a, b = run(8, 1), run(4, 2)
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


@pytest.mark.parametrize('at', [1, 7, 12, 29])
def test_resume_is_bit_for_bit(tmp_path, at):
    make = partial(toy.learner, accumulate=2)
    whole = make().fit(30)
    first = make()
    first.cbs.append(toy.Stop(at))
    with pytest.raises(KeyboardInterrupt):
        first.fit(30)
    first.cbs.pop()
    first.save(tmp_path)
    again = make().load(tmp_path).fit(30)
    assert again.step == 30 and same(weights(whole), weights(again))
    assert same(whole.cbs[0].shadow, again.cbs[0].shadow) and whole.metrics == again.metrics


def test_resume_in_channels_last(tmp_path):
    "Files do not keep a tensor's layout; the resumed run must, and be equal."

    def make():
        torch.manual_seed(0)
        data = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.rand(16, 1, 12, 12)), 4, shuffle=True
        )
        return Learner(
            ResidualCNN(width=8, depth=3).to(memory_format=torch.channels_last),
            lambda m, b: (m(b[0] + 0.1 * torch.randn_like(b[0])) - b[0]).square().mean(),
            data,
            cbs=[EMA(0.9)],
            cpu=True,
        )

    whole, first = make().fit(10), make()
    first.fit(5)
    first.save(tmp_path)
    again = make().load(tmp_path)
    p = again.bare.body[2].weight
    assert (
        p.is_contiguous(memory_format=torch.channels_last)
        and again.opt.state[p]['exp_avg'].stride() == p.stride()
    )
    assert same(weights(whole), weights(again.fit(10)))


def test_ten_kills(tmp_path):
    """SIGKILL at ten random moments; each time the run is started again;
    the weights at the end are those of an undisturbed run."""
    mp = multiprocessing.get_context('forkserver')
    mp.set_forkserver_preload(['toy'])
    start = lambda folder, delay: mp.Process(
        target=toy.train, args=(str(folder),), kwargs=dict(delay=delay)
    )
    calm = start(tmp_path / 'calm', 0)
    calm.start()
    calm.join()
    kills, rng = 0, random.Random(0)
    while kills < 10:
        p = start(tmp_path / 'killed', 0.06)
        p.start()
        p.join(rng.uniform(0.3, 1.2))
        if p.is_alive():
            os.kill(p.pid, signal.SIGKILL)
            kills += 1
        p.join()
        if p.exitcode == 0:
            break
    p = start(tmp_path / 'killed', 0)
    p.start()
    p.join()
    assert p.exitcode == 0 and kills == 10, f'{kills} kills'
    (a, ia), (b, ib) = load_checkpoint(tmp_path / 'calm'), load_checkpoint(tmp_path / 'killed')
    assert (
        ia['step'] == ib['step'] == 200
        and same(a['model'], b['model'])
        and same(a['cbs'][0]['shadow'], b['cbs'][0]['shadow'])
    )
    assert same(a['opt']['state'][0], b['opt']['state'][0])
    print(f'{kills} kills')


def test_two_processes_give_the_single_process_curve(tmp_path):
    def launch(n):
        out = tmp_path / f'{n}.json'
        words = launcher(n) if n > 1 else []
        done = subprocess.run(
            [sys.executable, *words, str(HERE / 'toy.py'), str(out), str(n)],
            capture_output=True,
            text=True,
            env=dict(os.environ, OMP_NUM_THREADS='1'),
        )
        assert done.returncode == 0, done.stderr[:6000]
        return json.loads(out.read_text())

    one, two = launch(1), launch(2)
    assert (one['processes'], two['processes']) == (1, 2)
    for a, b in zip(one['history'], two['history'], strict=True):
        assert a['step'] == b['step'] and a.keys() == b.keys()
        for k in a.keys() - {'seconds'}:
            assert a[k] == pytest.approx(b[k], rel=1e-4), k
    assert len(one['history']) == 31 and 'error' in one['history'][-1]


def test_nan_stops_before_the_step_and_keeps_the_batch():
    def poisoned(model, batch):
        y, x = batch
        return {
            'fit': (model(y) - x).square().mean(),
            'extra': torch.tensor(float('nan')) if learn.step == 3 else y.mean() * 0,
        }

    learn = toy.learner(poisoned, cbs=[Before()])
    with pytest.raises(FloatingPointError, match='step 3.*extra=nan'):
        learn.fit(10)
    assert (
        learn.step == 3
        and same(learn.cbs[0].weights, weights(learn))
        and learn.bad_batch[0].shape == (8, 8)
    )


class Before(Callback):
    def after_step(self, learn):
        self.weights = weights(learn)


def test_ema_is_used_in_validation_only():
    seen = {}
    learn = toy.learner(
        cbs=[
            EMA(0.5),
            Metrics(norm=lambda m, b: seen.setdefault('w', m[0].weight.clone()).norm()[None]),
        ]
    )
    learn.fit(10)
    assert torch.equal(seen['w'], learn.cbs[0].shadow['0.weight']) and not torch.equal(
        seen['w'], learn.bare[0].weight
    )
    assert (
        torch.equal(learn.trained()[0].weight, seen['w'])
        and not learn.trained().training
        and learn.bare.training
    )


class Fill(Callback):
    def after_step(self, learn):
        learn.bare.weight.data.fill_(learn.step + 1.0)


def test_ema_by_hand():
    "Three steps of an average of 2, 3 and 4 that starts at the first weights."
    learn = linear(cbs=[Fill(), EMA(0.9)])
    average = learn.bare.weight.detach().clone()
    learn.fit(3)
    for n in (1, 2, 3):
        decay = min(0.9, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * (n + 1)
    assert torch.allclose(learn.cbs[1].shadow['weight'], average)


def test_names_that_moved_are_still_found():
    "The callbacks that only show, and param_groups, live in the appendix."
    from restore_lib import callbacks, learner, loop_parts

    for name in 'Callback Progress Metrics LiveCurve TensorBoard plot_history'.split():
        assert getattr(learner, name) is getattr(callbacks, name)
    assert param_groups is loop_parts.param_groups


def test_callbacks_are_called_in_order():
    calls = []

    class Log(Callback):
        def before_fit(self, learn):
            calls.append('before_fit')

        def after_step(self, learn):
            calls.append(f'after_step {learn.step}')

        def before_valid(self, learn):
            calls.append('before_valid')

        def after_valid(self, learn):
            calls.append('after_valid')

        def after_fit(self, learn):
            calls.append('after_fit')

    toy.learner(cbs=[Log()]).fit(2)
    assert calls == [
        'before_fit',
        'after_step 1',
        'after_step 2',
        'before_valid',
        'after_valid',
        'after_fit',
    ]


def test_bf16_and_plain_learners_live_side_by_side():
    a = toy.learner(toy.plain_loss)
    b = toy.learner(toy.plain_loss, precision='bf16')
    a.fit(5)
    b.fit(5)
    assert a.bare(torch.rand(1, 8)).dtype == torch.float32 and not same(weights(a), weights(b))
    model = b.trained()
    assert model(torch.rand(1, 8)).dtype == torch.float32
    assert all(torch.isfinite(v).all() for v in weights(b).values())


def test_tensorboard_gets_every_row(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from restore_lib.learner import TensorBoard

    learn = toy.learner(cbs=[TensorBoard(tmp_path)]).fit(12, valid_every=4)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.step for e in events.Scalars('loss')] == [
        r['step'] for r in learn.history if 'loss' in r
    ]
    assert len(events.Scalars('valid_loss')) == 3


def test_fit_or_load(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path))
    a = toy.learner().fit_or_load('00_toy', dict(data='lines'), 20)
    b = toy.learner().fit_or_load('00_toy', dict(data='lines'), 20)
    assert (
        'trained' in (said := capsys.readouterr().out)
        and 'loaded' in said
        and same(weights(a), weights(b))
        and b.history == a.history
    )
    toy.learner().fit_or_load('00_toy', dict(data='other lines'), 20)
    toy.learner(opt=lambda p: torch.optim.AdamW(p, lr=3e-2)).fit_or_load(
        '00_toy', dict(data='lines'), 20
    )
    assert len(list(tmp_path.iterdir())) == 3 and capsys.readouterr().out.count('trained') == 2


# what stands in one folder, what can be kept


def linear(seed=0, **kw):
    torch.manual_seed(seed)
    return Learner(
        nn.Linear(4, 4),
        lambda m, b: (m(b) - b).square().mean(),
        torch.utils.data.DataLoader(torch.rand(20, 4), 4),
        cpu=True,
        seed=seed,
        **kw,
    )


def test_a_run_does_not_displace_another(tmp_path):
    """A new run in a folder that holds a later step is refused before its first step;
    both runs would else lose checkpoints."""
    linear().fit(50, folder=tmp_path, save_every=25)
    before = sorted(p.name for p in tmp_path.iterdir())
    new = linear(9)
    for act in (
        lambda: new.fit(10, folder=tmp_path, save_every=5),
        lambda: new.fit(10).save(tmp_path),
    ):
        with pytest.raises(ValueError, match='checkpoints of another run, up to step 50'):
            act()
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == before and new.step == 10
    )  # the fit into the folder had not begun
    assert (
        linear().load(tmp_path).fit(60, folder=tmp_path).step == 60
        and linear().load(tmp_path).step == 60
    )


def test_one_learner_goes_on_in_its_folder(tmp_path):
    learn = linear().fit(4, folder=tmp_path)
    learn.fit(8, folder=tmp_path).save(tmp_path)
    assert linear().load(tmp_path).step == 8


def test_checkpoints_of_older_versions_load(tmp_path):
    linear().fit(3, folder=tmp_path)
    for path in tmp_path.iterdir():
        (path / 'sums.json').unlink()
        info = json.loads((path / 'state.json').read_text())
        for k in ('callbacks', 'optimizer'):
            info.pop(k)
        (path / 'state.json').write_text(json.dumps(info))
    assert linear().load(tmp_path).step == 3
    with pytest.raises(ValueError, match='cbs holds 1; the checkpoint was made with 0'):
        linear(cbs=[EMA()]).load(tmp_path)


def test_what_json_cannot_hold_is_no_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path / 'runs'))
    for v, error in ((float('nan'), ValueError), ({1, 2}, TypeError), (torch.ones(2), TypeError)):
        with pytest.raises(error, match=r"config\['a'\]\[0\].*which JSON"):
            linear().fit_or_load('x', dict(a=[v]), 1)
    assert not (tmp_path / 'runs').exists()


def test_a_run_is_found_by_a_configuration_with_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path))
    for _ in range(2):
        toy.learner().fit_or_load('x', dict(data=Path('a') / 'b', n=np.int64(3)), np.int64(2))
    toy.learner().fit_or_load('x', dict(data='a/c', n=3), 2)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [
        'trained;',
        'loaded;',
        'trained;',
    ]


@pytest.mark.parametrize(
    'name, error',
    [
        ('../x', ValueError),
        ('/tmp/x', ValueError),
        ('a/b', ValueError),
        ('a\\b', ValueError),
        ('', ValueError),
        ('.', ValueError),
        ('..', ValueError),
        ('a\0b', ValueError),
        (None, TypeError),
        (Path('x'), TypeError),
    ],
)
def test_names_stay_in_their_folder(tmp_path, monkeypatch, name, error):
    (tmp_path / 'runs').mkdir()
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path / 'runs'))
    monkeypatch.setenv('RESTORE_BUDGET', 'study')
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setattr(records, 'project_home', lambda: tmp_path)
    for act in (
        lambda: linear().fit_or_load(name, {}, 1),
        lambda: records.record_study(name, {}, dict(a=1), 1),
        lambda: records.studies(name),
    ):
        with pytest.raises(error, match='name is|lesson is'):
            act()
    assert [p.name for p in tmp_path.rglob('*')] == ['runs']


def test_studies(tmp_path, monkeypatch):
    monkeypatch.setenv('RESTORE_BUDGET', 'study')
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setattr(records, 'project_home', lambda: tmp_path)
    for k in range(2):
        records.record_study(
            '99',
            dict(size=(32, 16), where=Path('x'), n=np.int64(3)),
            dict(PSNR=np.float32(k), bad=float('nan')),
            np.float64(1),
            seed=np.int64(4),
        )
    path = tmp_path / 'data/studies/99.jsonl'
    path.write_text('\n' + path.read_text() + '  \n\n')  # as an editor may leave it
    (row,) = records.studies('99')  # the second replaced the first
    assert (
        row['config'] == dict(size=[32, 16], where='x', n=3)
        and row['figures']['PSNR'] == 1
        and row['seed'] == 4
        and row['minutes'] == 1.0
    )
    with pytest.raises(TypeError, match='JSON cannot hold'):
        records.record_study('99', dict(a={1}), {}, 1)


# a checkpoint of another Learner


class Counts(Callback):
    def __init__(self, n=0):
        self.n = n

    def state(self):
        return dict(n=self.n)

    def load_state(self, state):
        self.n = state['n']


@pytest.mark.parametrize(
    'cbs, says',
    [
        (
            lambda: [Counts(1), EMA(0.5), EMA(0.9)],
            r'another order: EMA\(decay=0.5\), EMA\(decay=0.9\), Counts\(\) there, Counts\(\), EMA',
        ),
        (lambda: [EMA(0.9), EMA(0.5), Counts(1)], 'another order: EMA.decay=0.5., EMA.decay=0.9.'),
        (lambda: [EMA(0.5), EMA(0.9)], 'other callbacks'),
        (lambda: [], r'Counts\(\) there, none here'),
    ],
)
def test_callbacks_take_their_own_state_only(tmp_path, cbs, says):
    linear(cbs=[EMA(0.5), Progress(), EMA(0.9), Counts(7)]).fit(3, folder=tmp_path)
    learn = linear(1, cbs=cbs())
    before = weights(learn)
    with pytest.raises(ValueError, match=says):
        learn.load(tmp_path)
    assert learn.step == 0 and same(before, weights(learn)) and all(cb.n != 7 for cb in learn.cbs)


def test_callbacks_without_a_state_may_come_and_go(tmp_path):
    linear(cbs=[EMA(0.5), Progress(), Counts(7)]).fit(3, folder=tmp_path)
    learn = linear(1, cbs=[Before(), EMA(0.5), Counts()]).load(tmp_path)
    assert learn.step == 3 and learn.cbs[1].n == 3 and learn.cbs[2].n == 7


@pytest.mark.parametrize(
    'other',
    [
        dict(model=lambda: nn.Linear(4, 5)),
        dict(model=lambda: nn.Sequential(nn.Linear(4, 4))),
        dict(opt=lambda p: torch.optim.SGD(p, lr=0.1)),
        dict(opt=lambda p: torch.optim.AdamW([dict(params=[q]) for q in p])),
    ],
    ids=['shape', 'names', 'optimizer', 'groups'],
)
def test_nothing_of_another_model_is_taken(tmp_path, other):
    linear(cbs=[EMA(0.5)]).fit(3, folder=tmp_path)
    learn = Learner(
        other.get('model', lambda: nn.Linear(4, 4))(),
        lambda m, b: m(b).square().mean(),
        torch.utils.data.DataLoader(torch.rand(20, 4), 4),
        opt=other.get('opt'),
        cbs=[EMA(0.5)],
        cpu=True,
    ).fit(2)
    before, moments, shadow = weights(learn), learn.opt.state_dict(), dict(learn.cbs[0].shadow)
    moments = {
        k: {n: v.clone() if hasattr(v, 'clone') else v for n, v in held.items()}
        for k, held in moments['state'].items()
    }
    with pytest.raises(ValueError, match=r'another model|another optimizer: AdamW there, SGD here'):
        learn.load(tmp_path)
    assert learn.step == 2 and same(before, weights(learn)) and same(shadow, learn.cbs[0].shadow)
    for k, held in learn.opt.state_dict()['state'].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(moments[k][n]))
            for n, v in held.items()
            if v is not None
        )
    assert learn.fit(4).step == 4


# what a run is known by


def runs(capsys):
    return [line.split()[1].strip(';') for line in capsys.readouterr().out.splitlines()]


def test_a_run_of_the_library_is_known_by_what_it_captures(tmp_path, monkeypatch, capsys):
    """Captured by a closure, kept in the model, or bound by a partial:
    another value is another run, the same value is not."""
    from restore_lib.mae import mae_tiny, pretrainer
    from restore_lib.transfer import Classifier, finetune

    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path))
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))

    def mae(mk={}, **kw):
        torch.manual_seed(0)
        return pretrainer(
            mae_tiny(16, 8, channels=1, **mk),
            torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), 2),
            cpu=True,
            **kw,
        )

    def tuned(**kw):
        torch.manual_seed(0)
        return finetune(
            Classifier(mae_tiny(16, 8, channels=1).encoder, 3),
            torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(images, torch.arange(4) % 3), 2
            ),
            cpu=True,
            **kw,
        )

    kinds = [
        (mae, k)
        for k in (
            {},
            dict(mask_ratio=0.25),
            dict(masking='block'),
            dict(mk=dict(norm_pix_loss=True)),
            dict(mk=dict(mean=0.5, std=0.25)),
        )
    ] + [(tuned, k) for k in ({}, dict(smoothing=0.3), dict(mixup=0.1))]
    for make, kw in kinds * 2:
        make(**kw).fit_or_load('m', {}, 1)
    assert runs(capsys) == ['trained'] * len(kinds) + ['loaded'] * len(kinds)


class Degrade:
    "A callable with a setting."

    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return x * self.by


def test_what_decides_a_run_is_in_its_name(tmp_path, monkeypatch, capsys):
    """The data, the weights at the start, the metrics' functions and the validation set;
    a learner of a changed loop, too."""
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path))

    class Other(Learner):
        def one_step(self, batches):
            super().one_step(batches)

    def other(seed):
        torch.manual_seed(seed)
        return toy.learner(model=nn.Sequential(nn.Linear(8, 8)))

    def validated(v):
        learn = other(0)
        learn.valid = v
        return learn

    def looped():
        learn = other(0)
        learn.__class__ = Other
        return learn

    makes = [
        lambda: other(0),
        lambda: other(1),
        lambda: validated([(torch.zeros(1, 8), torch.zeros(1, 8))]),
        lambda: validated([(torch.ones(1, 8), torch.zeros(1, 8))]),
        looped,
    ]
    for make in makes * 2:
        make().fit_or_load('x', {}, 2)
    assert runs(capsys) == ['trained'] * 5 + ['loaded'] * 5


def test_bound_by_a_partial_a_run_is_found_again(tmp_path, monkeypatch, capsys):
    "No address in memory is part of a run's name."
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path))

    def loss(model, batch, degrade):
        return (model(degrade(batch[0])) - batch[1]).square().mean()

    for by in (0.5, 0.5, 0.25):
        toy.learner(partial(loss, degrade=Degrade(by))).fit_or_load('a', {}, 2)
    assert runs(capsys) == ['trained', 'loaded', 'trained']


def test_an_interrupted_run_goes_on_after_a_restart(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path))
    real = Learner.log

    def stops(self, sums):
        real(self, sums)
        if self.step == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(Learner, 'log', stops)
    with pytest.raises(KeyboardInterrupt):
        toy.learner().fit_or_load('x', {}, 12, save_every=5)
    monkeypatch.setattr(Learner, 'log', real)
    again = toy.learner().fit_or_load('x', {}, 12, save_every=5)
    assert 'resumed at step 5' in capsys.readouterr().out and same(
        weights(again), weights(toy.learner().fit(12))
    )


def test_loading_leaves_the_random_state(tmp_path, monkeypatch):
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path))
    toy.learner().fit_or_load('x', {}, 2)
    learn = toy.learner()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    want = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    learn.fit_or_load('x', {}, 2)
    assert (torch.rand(1), np.random.rand(), random.random()) == want


# schedule, groups, bad input


def test_schedule_against_torch():
    p = nn.Parameter(torch.zeros(1))
    opt = torch.optim.SGD([p], lr=1.0)
    ref = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=100, eta_min=0.1)
    factor = warmup_cosine(0.0, 0.1)
    for step in range(100):
        assert factor(step, 100) == pytest.approx(opt.param_groups[0]['lr'], abs=1e-9)
        opt.step()
        ref.step()
    up = [warmup_cosine(0.1)(s, 100) for s in range(11)]
    assert up == sorted(up) and up[0] > 0 and up[10] == 1


def test_param_groups():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    groups = param_groups(model, 1e-3, {'0.': 0.1}, 0.05)
    assert sum(len(g['params']) for g in groups) == 6
    at = {id(p): (g['lr'], g['weight_decay']) for g in groups for p in g['params']}
    assert (
        at[id(model[0].weight)] == (1e-4, 0.05)
        and at[id(model[0].bias)] == (1e-4, 0.0)
        and at[id(model[1].weight)] == (1e-3, 0.0)
    )
    with pytest.raises(ValueError, match="'encoder.'"):
        param_groups(model, 1e-3, {'encoder.': 0.1})


def test_layered_rates_follow_the_schedule():
    learn = toy.learner(opt=None)
    model = toy.net()
    learn = toy.learner(
        model=model, opt=torch.optim.AdamW(param_groups(model, 1e-2, {'0.': 0.1}))
    ).fit(9)
    rates = {g['lr'] for g in learn.opt.param_groups}
    assert max(rates) / min(rates) == pytest.approx(10)


def test_bad_train():
    stream = type(
        'Stream', (torch.utils.data.IterableDataset,), {'__iter__': lambda self: iter(range(9))}
    )()
    with pytest.raises(TypeError, match='map-style'):
        Learner(toy.net(), toy.loss_fn, torch.utils.data.DataLoader(stream), cpu=True)
    with pytest.raises(TypeError, match='list'):
        Learner(toy.net(), toy.loss_fn, [1, 2], cpu=True)
    with pytest.raises(ValueError, match='at least a batch'):
        toy.learner(batch=500)


@pytest.mark.parametrize('down, up', [(1, 1), (2, 1), (1, 4)])
def test_residual_cnn_starts_as_the_plain_baseline(down, up):
    y = torch.rand(2, 3, 17, 22)
    x = ResidualCNN(3, width=8, depth=3, down=down, up=up)(y)
    base = (
        y
        if up == 1
        else torch.nn.functional.interpolate(y, scale_factor=up, mode='bicubic', antialias=True)
    )
    assert x.shape == (2, 3, 17 * up, 22 * up) and torch.equal(x, base)


# the loop: means, precision, random state, rates, modes, copies, named errors

from torch.utils.data import DataLoader, TensorDataset


def square(model, batch):
    return (model(batch[0]) - batch[0]).square().mean()


def small(loss=square, net=None, data=None, batch=4, **kw):
    "A Learner for a Linear(4, 4)."
    data = TensorDataset(torch.linspace(0, 1, 80).view(20, 4)) if data is None else data
    train = data if isinstance(data, DataLoader) else DataLoader(data, batch)
    torch.manual_seed(7)
    return Learner(nn.Linear(4, 4) if net is None else net, loss, train, **{**dict(cpu=True), **kw})


FIVE = TensorDataset(torch.tensor([[0.0], [0.0], [0.0], [0.0], [10.0]]))


def level(model, batch):
    return batch[0].mean() + 0 * model(batch[0].repeat(1, 4)).sum()


@pytest.mark.parametrize(
    'metric',
    [
        lambda m, b: b[0][:, 0],
        lambda m, b: b[0].mean(),
        lambda m, b: float(b[0].mean()),
        lambda m, b: b[0].mean().numpy(),
    ],
    ids=['values', 'scalar', 'float', 'numpy'],
)
def test_validation_weighs_items_not_batches(metric):
    "Four items of 0 and one of 10 in batches of four: 2, not 5."
    got = small(level, valid=DataLoader(FIVE, 4), cbs=[Metrics(v=metric)]).validate()
    assert got == {'valid_loss': pytest.approx(2), 'v': pytest.approx(2)}


@pytest.mark.parametrize(
    'pack',
    [
        lambda x: x,
        lambda x: (x, 1),
        lambda x: dict(a=x),
        lambda x: dict(t=torch.tensor(3), a=(x, x)),
    ],
    ids=['tensor', 'tuple', 'dict', 'nested'],
)
def test_items_are_counted_in_every_kind_of_batch(pack):
    whole, one = pack(torch.zeros(7, 4)), pack(torch.ones(1, 4))

    def first(b):
        if isinstance(b, dict):
            b = b['a']
        return b[0] if isinstance(b, tuple) else b

    def loss(model, batch):
        return first(batch).mean() + 0 * model(first(batch)).sum()

    assert small(loss, valid=[whole, one]).validate()['valid_loss'] == pytest.approx(1 / 8)


def test_more_values_than_items_count_each():
    got = small(
        level, valid=DataLoader(FIVE, 4), cbs=[Metrics(two=lambda m, b: b[0].repeat(1, 2))]
    ).validate()
    assert got['two'] == pytest.approx(2)


def test_batches_without_tensors_weigh_the_same():
    def loss(model, batch):
        return model(torch.full((1, 4), float(batch))).sum() * 0 + batch

    assert small(loss, valid=[1, 2, 6]).validate()['valid_loss'] == pytest.approx(3)


def test_history_means_all_batches_of_a_step():
    "Accumulating two batches, the history has the mean of both, not the last one's."
    data = TensorDataset(torch.tensor([0.0, 10.0]).repeat_interleave(4)[:, None].repeat(2, 1))
    learn = small(level, data=data, accumulate=2).fit(2)
    assert [r['loss'] for r in learn.history] == pytest.approx([5, 5])


def test_validation_leaves_the_batches_alone():
    "A model that writes into its input changes neither the caller's tensors nor the next metric's."
    x = torch.full((3, 4), -1.0)
    learn = small(
        lambda m, b: m(b).square().mean(),
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)),
        valid=[x],
        cbs=[Metrics(seen=lambda m, b: b[:, 0])],
    )
    assert learn.validate()['seen'] == -1 and (x == -1).all()


@pytest.mark.parametrize(
    'valid, error', [([], 'valid holds no batch'), ((), 'valid holds no batch')]
)
def test_no_validation_batch_is_said_at_once(valid, error):
    with pytest.raises(ValueError, match=error):
        small(valid=valid)
    learn = small()
    learn.valid = valid
    before = weights(learn)
    with pytest.raises(ValueError, match=error):
        learn.fit(2)
    assert learn.step == 0 and same(before, weights(learn))


def test_validation_without_figures_is_an_error():
    with pytest.raises(ValueError, match='valid is None'):
        small().validate()
    learn = small(valid=iter([(torch.rand(2, 4),)]))
    learn.validate()
    with pytest.raises(ValueError, match='valid gave no batch'):
        learn.validate()
    with pytest.raises(ValueError, match=r'valid\[1\] is an empty batch'):
        small(valid=[(torch.rand(2, 4),), (torch.rand(0, 4),)]).validate()
    with pytest.raises(ValueError, match='metric v gave no value'):
        small(valid=[(torch.rand(2, 4),)], cbs=[Metrics(v=lambda m, b: b[0][:0])]).validate()
    with pytest.raises(TypeError, match='metric v gave NoneType'):
        small(valid=[(torch.rand(2, 4),)], cbs=[Metrics(v=lambda m, b: None)]).validate()


def test_metrics_of_one_name_are_refused():
    "Two figures of one name were one mean over both, or the last one's."
    batch = [(torch.rand(2, 4),)]
    one = lambda m, b: b[0][:, 0]
    learn = small(valid=batch, cbs=[Metrics(a=one), Metrics(a=one)])
    with pytest.raises(ValueError, match="two metrics are called 'a'"):
        learn.fit(1)
    assert learn.step == 0
    with pytest.raises(ValueError, match="called 'valid_loss'"):
        small(valid=batch, cbs=[Metrics(valid_loss=one)]).validate()
    with pytest.raises(ValueError, match="called 'step'"):
        Metrics(step=one)
    with pytest.raises(ValueError, match="called 'seconds'"):
        small(lambda m, b: dict(seconds=square(m, b))).fit(1)
    with pytest.raises(TypeError, match='v is int'):
        Metrics(v=3)


def test_one_item_batches():
    learn = small(
        batch=1,
        valid=DataLoader(FIVE, 1),
        loss=lambda m, b: m(b[0].expand(-1, 4)).square().mean(),
        cbs=[Metrics(v=lambda m, b: b[0][:, 0])],
    )
    assert learn.fit(3).metrics['v'] == pytest.approx(2)


# precision


def dtypes_inside(net, work):
    "The dtypes that the net's linear layer computes in while `work` runs."
    seen = set()
    inner = next(m for m in net.modules() if isinstance(m, nn.Linear))
    hook = inner.register_forward_hook(lambda m, a, out: seen.add(out.dtype))
    work()
    hook.remove()
    return seen


def test_learners_keep_their_own_precision():
    a, c, d = small(), small(precision='bf16'), small()
    assert [v.acc.mixed_precision for v in (a, c, d)] == ['no', 'bf16', 'no']


@pytest.mark.parametrize('first, second', [('no', 'bf16'), ('bf16', 'no')])
def test_two_learners_on_one_model_compute_in_their_own_precision(first, second):
    want = dict(no={torch.float32}, bf16={torch.bfloat16})
    net = nn.Sequential(nn.Linear(4, 4))
    batch = [(torch.rand(2, 4),)]
    a, c = (small(net=net, precision=p, valid=batch) for p in (first, second))
    for learn, p in ((a, first), (c, second), (a, first)):
        assert dtypes_inside(net, lambda: learn.fit(learn.step + 2)) == want[p]
        assert dtypes_inside(net, learn.validate) == want[p]
        assert dtypes_inside(net, lambda: learn.one_step(iter(learn.train))) == want[p]


def test_a_model_is_itself_after_a_bf16_run():
    """Outside of the run the model computes as before it, also as a part of another model;
    so do copies."""
    net = nn.Sequential(nn.Linear(4, 4))
    learn = small(net=net, precision='bf16').fit(2)
    assert 'forward' not in vars(net)
    both = nn.Sequential(net, nn.Linear(4, 4))
    assert dtypes_inside(net, lambda: small(net=both).fit(2)) == {torch.float32}
    copy = learn.trained()
    assert dtypes_inside(copy, lambda: small(net=copy, precision='bf16').fit(2)) == {torch.bfloat16}
    assert copy(torch.rand(1, 4)).dtype == torch.float32


def test_a_forward_of_ones_own_survives():
    net = nn.Linear(4, 4)
    net.forward = lambda x: nn.functional.linear(x, net.weight) * 0 + net.weight.sum()
    own = net.forward
    learn = small(net=net, precision='bf16').fit(2)
    assert net.forward is own and torch.isfinite(learn.trained()(torch.rand(1, 4))).all()


def test_an_accelerator_of_the_callers_stays_what_it_is():
    code = '''
import torch
from accelerate import Accelerator
mine = Accelerator(mixed_precision='bf16', cpu=True)
from restore_lib.learner import Learner
data = torch.utils.data.DataLoader(torch.rand(8, 4), 4)
learn = Learner(torch.nn.Linear(4, 4), lambda m, b: m(b).square().mean(), data, cpu=True).fit(2)
print(mine.mixed_precision, learn.acc.mixed_precision)'''
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
    )
    assert done.stdout.split() == ['bf16', 'no'], done.stderr[-2000:]


def test_the_device_is_each_learners_own():
    "accelerate keeps the first device of a process: a second Learner must be asked where it goes."
    from accelerate.state import PartialState

    a = small()
    before = dict(PartialState._shared_state)
    PartialState._shared_state.update(
        device=torch.device('meta'), _cpu=False
    )  # as a GPU run would leave it
    try:
        assert small().acc.device.type == 'cpu' and a.acc.device.type == 'cpu'
    finally:
        PartialState._shared_state.clear()
        PartialState._shared_state.update(before)


def test_several_learners_in_two_processes(tmp_path):
    """Under accelerate launch: own precision on one model,
    and a validation that weighs items over uneven shares."""
    out, script = tmp_path / 'out.json', tmp_path / 'script.py'
    script.write_text(f'''
import json, os, sys, torch
from torch.utils.data import DataLoader, TensorDataset
from restore_lib.learner import Learner, Metrics
torch.set_num_threads(1)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(1, 4))
seen = set()
net[0].register_forward_hook(lambda m, a, o: seen.add(str(o.dtype)))
def loss(m, b): return b[0].mean() + 0*m(b[0]).sum()
five = TensorDataset(torch.tensor([[0.], [0.], [0.], [0.], [10.]]))
eight = TensorDataset(torch.arange(8.)[:, None])
def make(p):
    cbs = [Metrics(v=lambda m, b: b[0][:, 0])]
    train, valid = DataLoader(eight, 2), DataLoader(five, 4)
    return Learner(net, loss, train, valid, precision=p, cbs=cbs, cpu=True)
a, c = make('no'), make('bf16')
got = []
for learn in (a, c, a):
    seen.clear()
    learn.fit(learn.step + 2)
    v, valid = learn.metrics['v'], learn.metrics['valid_loss']
    got.append([learn.acc.mixed_precision, sorted(seen), v, valid, learn.history[0]['loss']])
if a.acc.is_main_process: open({str(out)!r}, 'w').write(json.dumps([a.acc.num_processes, got]))
a.acc.wait_for_everyone()
sys.stdout.flush()
os._exit(0)
''')
    done = subprocess.run(
        [sys.executable, *launcher(2), str(script)],
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
    )
    assert done.returncode == 0, done.stderr[-6000:]
    processes, got = json.loads(out.read_text())
    assert processes == 2
    for row, (precision, dtype) in zip(
        got, [('no', 'float32'), ('bf16', 'bfloat16'), ('no', 'float32')], strict=True
    ):
        assert row[:2] == [precision, [f'torch.{dtype}']] and row[2:4] == pytest.approx([2, 2])
        assert row[4] == pytest.approx(1.5)  # items 0 to 3 of the first step, in both processes


@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU would wait for the other process')
def test_a_process_that_would_train_alone_is_refused(monkeypatch):
    "accelerate starts two on a CPU, and without cpu=True each is the only one, and the main one."
    monkeypatch.setenv('WORLD_SIZE', '1')
    small()
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='2 processes would each train alone; expected cpu=True'):
        small(cpu=False)


def test_fp16_on_a_cpu_is_refused():
    "It would train in float32 without a word."
    with pytest.raises(ValueError, match="precision is 'fp16' on a CPU"):
        small(precision='fp16')
    with pytest.raises(ValueError, match="precision is 'half'"):
        small(precision='half')
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        small(precision='fp8')


# the caller's random state


def three():
    return torch.rand(1).item(), np.random.rand(), random.random()


class Random(torch.utils.data.Dataset):
    "Items with randomness of all three kinds."

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.rand(4) + np.random.rand() + random.random()


def random_loss(model, batch):
    return (
        (model(batch) - batch * torch.rand(4) * random.random() * np.random.rand()).square().mean()
    )


def loaders(workers=0):
    return DataLoader(
        Random(), 4, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(3)
    )


def broken(learn):
    learn.loss_fn = lambda m, b: 1 / 0
    with pytest.raises(ZeroDivisionError):
        learn.fit(learn.step + 2)


WORK = dict(
    make=lambda: small(random_loss, data=loaders()),
    fit=lambda: small(random_loss, data=loaders()).fit(7),
    workers=lambda: small(random_loss, data=loaders(1)).fit(2),
    step=lambda: (lambda v: v.one_step(iter(v.train)))(small(random_loss, data=loaders())),
    validate=lambda: small(random_loss, data=loaders(), valid=loaders()).validate(),
    raises=lambda: broken(small(random_loss, data=loaders())),
    trained=lambda: small(random_loss, data=loaders(), cbs=[EMA(0.9)]).fit(1).trained(),
    loader=lambda: next(iter(positioned(loaders()))),
    loader_two=lambda: [b for b, _ in zip(positioned(loaders()), range(12))],
)


@pytest.mark.parametrize('name', WORK)
def test_the_callers_random_state_is_as_it_was(name):
    def seeded():
        np.random.seed(5)
        random.seed(5)
        torch.manual_seed(7)  # as `small` does before it makes its net

    seeded()
    if 'load' not in name:
        nn.Linear(4, 4)
    want = three()
    seeded()
    WORK[name]()
    assert three() == want


def test_keeping_the_random_state_changes_no_training():
    "Losses of the library before the caller's state was kept."
    learn = small(random_loss, data=loaders(), valid=[torch.full((3, 4), 0.5)]).fit(4)
    assert [r['loss'] for r in learn.history if 'loss' in r] == pytest.approx(BEFORE[:4], rel=1e-4)
    assert learn.metrics['valid_loss'] == pytest.approx(BEFORE[4], rel=1e-4)


BEFORE = [
    2.2925658226013184,
    1.5226318836212158,
    1.7036759853363037,
    1.5553827285766602,
    0.4231015145778656,
]


def test_the_callers_generator_is_as_it_was():
    loader = loaders()
    before = loader.generator.get_state()
    stream = positioned(loader)
    first = [b for b, _ in zip(stream, range(7))]
    assert torch.equal(loader.generator.get_state(), before)
    again = [b for b, _ in zip(positioned(loaders()), range(7))]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    valid = loaders()
    small(random_loss, data=loader, valid=valid).validate()
    assert torch.equal(valid.generator.get_state(), before)


def test_numpy_seeds_are_seeds():
    run = weights(toy.learner(seed=3).fit(3))
    assert same(weights(toy.learner(seed=np.int64(3)).fit(3)), run)


# rates


def test_a_passed_optimizer_has_its_rate_back():
    net = nn.Linear(4, 4)
    opt = torch.optim.SGD(net.parameters(), lr=0.5)
    learn = small(net=net, opt=opt, sched=warmup_cosine(0)).fit(4)
    assert learn.history[-1]['lr'] < 0.1 and opt.param_groups[0]['lr'] == 0.5
    learn.fit(8)
    assert learn.step == 8 and opt.param_groups[0]['lr'] == 0.5
    learn.cbs.append(toy.Stop(9))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(10)
    assert opt.param_groups[0]['lr'] == 0.5


def test_resume_of_a_passed_optimizer_is_bit_for_bit(tmp_path):
    def make():
        torch.manual_seed(7)
        net = nn.Linear(4, 4)
        return small(
            net=net,
            opt=torch.optim.AdamW(net.parameters(), lr=0.1),
            sched=warmup_cosine(0),
            cbs=[EMA(0.9)],
        )

    whole, first = make().fit(12), make()
    first.cbs.append(toy.Stop(5))
    with pytest.raises(KeyboardInterrupt):
        first.fit(12)
    first.cbs.pop()
    first.save(tmp_path)
    assert same(weights(whole), weights(make().load(tmp_path).fit(12)))


def test_numpy_numbers_make_the_same_run():
    def run(n, f):
        net = toy.net()
        opt = torch.optim.AdamW(param_groups(net, f(0.25), {'0.': f(0.5)}, f(0.125)))
        learn = toy.learner(
            model=net,
            opt=opt,
            sched=lambda s, steps: warmup_cosine(f(0.25), f(0.125))(s, steps) * f(1),
            accumulate=n(2),
            clip=f(1),
            seed=n(1),
            cbs=[EMA(f(0.5))],
        ).fit(n(6), valid_every=n(3))
        assert (
            all(type(g['lr']) is float for g in learn.opt.param_groups) and type(learn.step) is int
        )
        return weights(learn)

    want = run(int, float)
    assert same(want, run(np.int64, np.float32)) and same(want, run(np.int32, np.float64))
    y = torch.rand(1, 1, 6, 6)
    assert ResidualCNN(np.int64(1), np.int64(4), np.int64(3), np.int64(2), np.int64(2))(
        y
    ).shape == (1, 1, 12, 12)


# modes and threads


def test_overlapping_validations_leave_the_modes_alone():
    """The first one out must not switch the second to training mode;
    the last one out must restore what was before the first."""
    import threading

    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4))
    learn = small(net=net, valid=[(torch.rand(2, 4),)])
    net.train()
    net[1].eval()
    inside, modes = threading.Barrier(2, timeout=2), []

    def wait(model, batch):
        try:
            inside.wait()  # both threads are inside at once, where that is allowed
        except threading.BrokenBarrierError:
            pass
        modes.append(any(m.training for m in model.modules()))
        return batch[0][:, 0]

    learn.cbs.append(Metrics(v=wait))
    threads = [threading.Thread(target=learn.validate) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert modes == [False, False]
    assert [net.training, net[0].training, net[1].training, net[2].training] == [
        True,
        True,
        False,
        True,
    ]


def test_ema_weights_are_swapped_once_when_uses_nest():
    seen = []

    def trained_inside(model, batch):
        seen.append(learn.trained()[0].weight.clone())
        return batch[0][:, 0]

    learn = toy.learner(toy.plain_loss, cbs=[EMA(0.5), Metrics(v=trained_inside)])
    learn.fit(5)
    assert torch.equal(seen[-1], learn.cbs[0].shadow['0.weight']) and not torch.equal(
        seen[-1], learn.bare[0].weight
    )


def test_two_threads_get_the_average_and_leave_the_weights():
    import threading

    learn = toy.learner(toy.plain_loss, cbs=[EMA(0.5)]).fit(5)
    raw, ema, got = learn.bare[0].weight.clone(), learn.cbs[0].shadow['0.weight'].clone(), []
    ready = threading.Event()

    def first():
        with learn.deployed() as model:
            ready.set()
            time.sleep(0.2)
            got.append(model[0].weight.detach().clone())

    def second():
        ready.wait()
        got.append(learn.trained()[0].weight)

    threads = [threading.Thread(target=f) for f in (first, second)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert (
        len(got) == 2
        and all(torch.equal(w, ema) for w in got)
        and torch.equal(learn.bare[0].weight, raw)
    )


def test_validation_and_copies_before_fit_use_the_models_own_weights():
    learn = toy.learner(toy.plain_loss, cbs=[EMA(0.5)])
    own = weights(learn)
    figures = learn.validate()
    assert (
        same(learn.trained().state_dict(), own)
        and same(weights(learn), own)
        and learn.cbs[0].shadow is None
    )
    assert figures == toy.learner(toy.plain_loss, cbs=[]).validate()
    assert same(weights(learn.fit(3)), weights(toy.learner(toy.plain_loss).fit(3)))


# copies


def normed(kind):
    torch.manual_seed(3)
    norms = dict(
        weight_norm=nn.utils.weight_norm,
        spectral_norm=nn.utils.spectral_norm,
        weight=nn.utils.parametrizations.weight_norm,
        spectral=nn.utils.parametrizations.spectral_norm,
        orthogonal=nn.utils.parametrizations.orthogonal,
    )
    return nn.Sequential(norms[kind](nn.Linear(4, 4)), nn.Linear(4, 4))


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('ema', [False, True])
@pytest.mark.parametrize(
    'kind', ['weight_norm', 'spectral_norm', 'weight', 'spectral', 'orthogonal']
)
def test_trained_copies_normed_layers(kind, ema):
    """The copy is the model in evaluation mode, with the average's weights where there is one,
    and independent of it."""
    learn = small(net=normed(kind), cbs=[EMA(0.5)] * ema).fit(3)
    copy, x = learn.trained(), torch.rand(5, 4)
    weight = copy[0].weight.detach().clone()
    with learn.deployed() as model:
        want = model(x)
    assert torch.allclose(copy(x), want, atol=1e-6) and torch.allclose(
        copy[0].weight, weight, atol=1e-6
    )
    assert not copy.training and learn.bare.training
    before = weights(learn)
    for p in copy.parameters():
        p.data.zero_()
    assert same(before, weights(learn))
    copy = learn.trained()
    small(net=copy).fit(2)  # and can be trained on
    assert not same(copy.state_dict(), weights(learn)) and same(before, weights(learn))


def test_trained_copies_models_that_remember_tensors():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.last = nn.Linear(4, 4), {}

        def forward(self, x):
            self.last = dict(z=[self.net(x)])
            return self.last['z'][0]

    learn = small(net=Remembers()).fit(2)
    copy = learn.trained()
    assert torch.equal(copy.last['z'][0], learn.bare.last['z'][0]) and torch.equal(
        copy.net.weight, learn.bare.net.weight
    )
    assert learn.bare.last['z'][0].grad_fn is not None and copy.last['z'][0].grad_fn is None


def test_what_cannot_be_copied_is_named():
    import threading

    net = nn.Sequential(nn.Linear(4, 4))
    net.lock = threading.Lock()
    learn = small(net=net).fit(1)
    with pytest.raises(TypeError, match='model is Sequential, which cannot be copied'):
        learn.trained()
    assert learn.bare.training


# named errors

BAD = dict(
    clip=(dict(clip=-1), ValueError, 'clip is -1'),
    clip_zero=(dict(clip=0), ValueError, 'clip is 0'),
    clip_nan=(dict(clip=float('nan')), ValueError, 'clip is nan'),
    clip_text=(dict(clip='1'), TypeError, "clip is '1'"),
    accumulate=(dict(accumulate=0), ValueError, 'accumulate is 0'),
    accumulate_half=(dict(accumulate=1.5), ValueError, 'accumulate is 1.5'),
    seed=(dict(seed=0.5), ValueError, 'seed is 0.5'),
    seed_text=(dict(seed='a'), TypeError, "seed is 'a'"),
    sched=(dict(sched=0.1), TypeError, 'sched is float'),
    opt=(dict(opt='adam'), TypeError, 'opt is str'),
    opt_gives=(dict(opt=list), TypeError, 'opt gave list'),
    cb=(dict(cbs=[3]), TypeError, 'cbs holds int'),
    cbs=(dict(cbs=EMA(0.9)), TypeError, 'cbs is EMA'),
    cb_class=(dict(cbs=[EMA]), TypeError, r'such as EMA\(\)'),
    loss=(dict(loss='mse'), TypeError, 'loss_fn is str'),
    net=(dict(net=len), TypeError, 'model is builtin'),
    valid=(dict(valid=3), TypeError, 'valid is int'),
)


@pytest.mark.parametrize('kw, error, text', BAD.values(), ids=list(BAD))
def test_bad_arguments_are_named_and_touch_nothing(kw, error, text):
    net = kw.get('net', nn.Linear(4, 4))
    before = dict(vars(net)) if isinstance(net, nn.Module) else {}
    with pytest.raises(error, match=text):
        small(**{**dict(net=net), **kw})
    assert not isinstance(net, nn.Module) or dict(vars(net)) == before


LOSSES = dict(
    vector=(
        lambda m, b: (m(b[0]) - b[0]).square().mean(1),
        ValueError,
        r'loss of loss_fn has shape \(4,\)',
    ),
    number=(lambda m, b: 1.0, TypeError, 'loss of loss_fn is float'),
    none=(lambda m, b: None, TypeError, 'loss of loss_fn is NoneType'),
    empty=(lambda m, b: {}, ValueError, 'empty dict'),
    inside=(
        lambda m, b: dict(a=square(m, b), b=m(b[0])),
        ValueError,
        r'b of loss_fn has shape \(4, 4\)',
    ),
    text=(lambda m, b: dict(a=square(m, b), b='x'), TypeError, 'b of loss_fn is str'),
    whole=(
        lambda m, b: dict(a=square(m, b), b=torch.tensor(3)),
        TypeError,
        'b of loss_fn is torch.int64',
    ),
    pair=(lambda m, b: (square(m, b), m), TypeError, 'loss of loss_fn is tuple'),
)


@pytest.mark.parametrize('loss, error, text', LOSSES.values(), ids=list(LOSSES))
def test_bad_losses_are_named_before_they_do_harm(loss, error, text):
    learn = small(loss, valid=[(torch.rand(4, 4),)])
    before = weights(learn)
    with pytest.raises(error, match=text):
        learn.fit(2)
    assert learn.step == 0 and same(before, weights(learn))
    with pytest.raises(error, match=text):
        learn.validate()


@pytest.mark.parametrize('steps', [0, -1, 1.5, True, float('nan')])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match='steps is'):
        small().fit(steps)


@pytest.mark.parametrize('name', ['valid_every', 'save_every'])
@pytest.mark.parametrize('every', [0, -1, 0.5])
def test_bad_intervals(name, every, tmp_path):
    with pytest.raises(ValueError, match=f'{name} is {every}'):
        small(valid=[(torch.rand(2, 4),)]).fit(2, folder=tmp_path, **{name: every})
    with pytest.raises(ValueError, match='folder is None'):
        small().fit(2, save_every=1)


@pytest.mark.parametrize('factor', [-1.0, float('nan'), float('inf')])
def test_a_schedule_that_would_spoil_the_weights_is_stopped(factor):
    learn = small(sched=lambda step, steps: factor if step == 1 else 1.0)
    with pytest.raises(ValueError, match=r'sched\(1, 3\) is'):
        learn.fit(3)
    assert (
        learn.step == 1
        and all(torch.isfinite(p).all() for p in learn.bare.parameters())
        and learn.opt.param_groups[0]['lr'] == 1e-3
    )


@pytest.mark.parametrize(
    'make, text',
    [
        (lambda: EMA(1.0), 'decay is 1'),
        (lambda: EMA(-0.1), 'decay is -0.1'),
        (lambda: EMA(float('nan')), 'decay is nan'),
        (lambda: EMA(2), 'decay is 2'),
        (lambda: warmup_cosine(-0.1), 'warmup is -0.1'),
        (lambda: warmup_cosine(1.5), 'warmup is 1.5'),
        (lambda: warmup_cosine(0, float('nan')), 'floor is nan'),
        (lambda: warmup_cosine(0, -1), 'floor is -1'),
        (lambda: param_groups(nn.Linear(2, 2), -1), 'lr is -1'),
        (lambda: param_groups(nn.Linear(2, 2), 1, {'w': -1}), r"rates\['w'\] is -1"),
        (lambda: param_groups(nn.Linear(2, 2), 1, None, -1), 'weight_decay is -1'),
        (lambda: ResidualCNN(0), 'channels is 0'),
        (lambda: ResidualCNN(width=0), 'width is 0'),
        (lambda: ResidualCNN(depth=1), 'depth is 1'),
        (lambda: ResidualCNN(down=0), 'down is 0'),
        (lambda: ResidualCNN(up=1.5), 'up is 1.5'),
        (lambda: positioned(DataLoader(Random(), 4), seed=0.5), 'seed is 0.5'),
        (lambda: positioned(DataLoader(Random(), 4), rank=2, world=2), 'rank is 2'),
    ],
)
def test_bad_numbers(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_live_curve_and_an_empty_history(recwarn):
    import matplotlib
    from restore_lib.learner import LiveCurve, plot_history

    matplotlib.use('agg')
    fig = plot_history([])
    assert (
        len(fig.axes) == 1
        and not fig.axes[0].lines
        and not [w for w in recwarn if 'legend' in str(w.message).lower()]
    )
    with pytest.raises(ValueError, match='every is -1'):
        LiveCurve(-1)


def test_making_a_learner_changes_no_setting_of_torch():
    def settings():
        return (
            torch.get_num_threads(),
            torch.get_num_interop_threads(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.backends.cuda.matmul.allow_tf32,
            torch.are_deterministic_algorithms_enabled(),
            torch.is_autocast_enabled('cpu'),
            torch.get_float32_matmul_precision(),
        )

    before = settings()
    small(precision='bf16', valid=[(torch.rand(2, 4),)], cbs=[EMA(0.9)]).fit(2).trained()
    assert settings() == before


@pytest.mark.parametrize('precision', ['no', 'bf16'])
@pytest.mark.parametrize(
    'wrap',
    [lambda m: torch.compile(m, backend='eager'), torch.jit.script, nn.DataParallel],
    ids=['compiled', 'scripted', 'parallel'],
)
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
def test_wrapped_models(wrap, precision):
    learn = small(
        net=wrap(nn.Linear(4, 4)), precision=precision, valid=[(torch.rand(3, 4),)], cbs=[EMA(0.5)]
    ).fit(3)
    copy, x = learn.trained(), torch.rand(2, 4)
    with learn.deployed() as model:
        want = model(x)
    assert torch.allclose(copy(x), want, atol=1e-2)
    for p in copy.parameters():
        p.data.zero_()
    assert copy(x).abs().max() == 0 and learn.bare(x).abs().max() > 0


def test_an_optimizer_that_draws_is_seeded():
    """What an optimizer draws in its step is a function of the seed,
    whether `fit` or `one_step` is called."""

    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for g in self.param_groups:
                for p in g['params']:
                    p.data.add_(torch.randn_like(p), alpha=0.1)

    def make():
        return small(opt=lambda ps: Noisy(ps, lr=0.1))

    a, b = make().fit(3), make()
    batches = iter(b.train)
    for _ in range(3):
        b.one_step(batches)
    assert same(weights(a), weights(b))
