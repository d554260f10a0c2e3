import json, multiprocessing, os, random, signal, subprocess, sys, time, warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import toy
from restore_lib.learner import (EMA, Callback, Learner, Metrics, Progress, ResidualCNN, load_checkpoint, param_groups, positioned,
                                 save_checkpoint, seed_all, warmup_cosine)

HERE = Path(__file__).parent


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def weights(learn): return {k: v.clone() for k, v in learn.bare.state_dict().items()}


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
    opt, batches, factor = torch.optim.AdamW(model.parameters(), lr=1e-2), iter(positioned(torch.utils.data.DataLoader(toy.Noisy(), 8, shuffle=True))), warmup_cosine(0.1)
    for step in range(10):
        for g in opt.param_groups: g['lr'] = 1e-2*factor(step, 10)
        loss = toy.plain_loss(model, next(batches))
        opt.zero_grad(), loss.backward(), nn.utils.clip_grad_norm_(model.parameters(), 1.0), opt.step()
    learn.fit(10)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(model.state_dict().values(), weights(learn).values()))


def test_accumulation_equals_the_large_batch():
    def run(batch, accumulate):
        model = toy.net()
        model[2].p = 0.0
        return weights(toy.learner(toy.plain_loss, batch=batch, accumulate=accumulate, model=model, cbs=[]).fit(12))
    a, b = run(8, 1), run(4, 2)
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


@pytest.mark.parametrize('at', [1, 7, 12, 29])
def test_resume_is_bit_for_bit(tmp_path, at):
    make = partial(toy.learner, accumulate=2)
    whole = make().fit(30)
    first = make()
    first.cbs.append(Stop(at))
    with pytest.raises(KeyboardInterrupt): first.fit(30)
    first.cbs.pop()
    first.save(tmp_path)
    again = make().load(tmp_path).fit(30)
    assert again.step == 30 and same(weights(whole), weights(again))
    assert same(whole.cbs[0].shadow, again.cbs[0].shadow) and whole.metrics == again.metrics


def test_resume_in_channels_last(tmp_path):
    "Files do not keep a tensor's layout; the resumed run must, and be equal."
    def make():
        torch.manual_seed(0)
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(16, 1, 12, 12)), 4, shuffle=True)
        return Learner(ResidualCNN(width=8, depth=3).to(memory_format=torch.channels_last),
                       lambda m, b: (m(b[0] + 0.1*torch.randn_like(b[0])) - b[0]).square().mean(), data, cbs=[EMA(0.9)], cpu=True)
    whole, first = make().fit(10), make()
    first.fit(5), first.save(tmp_path)
    again = make().load(tmp_path)
    p = again.bare.body[2].weight
    assert p.is_contiguous(memory_format=torch.channels_last) and again.opt.state[p]['exp_avg'].stride() == p.stride()
    assert same(weights(whole), weights(again.fit(10)))


class Stop(Callback):
    def __init__(self, at): self.at = at
    def after_step(self, learn):
        if learn.step == self.at: raise KeyboardInterrupt


def test_ten_kills(tmp_path):
    "SIGKILL at ten random moments; each time the run is started again; the weights at the end are those of an undisturbed run."
    mp = multiprocessing.get_context('forkserver')
    mp.set_forkserver_preload(['toy'])
    start = lambda folder, delay: mp.Process(target=toy.train, args=(str(folder),), kwargs=dict(delay=delay))
    calm = start(tmp_path/'calm', 0)
    calm.start(), calm.join()
    kills, rng = 0, random.Random(0)
    while kills < 10:
        p = start(tmp_path/'killed', 0.06)
        p.start()
        p.join(rng.uniform(0.3, 1.2))
        if p.is_alive():
            os.kill(p.pid, signal.SIGKILL)
            kills += 1
        p.join()
        if p.exitcode == 0: break
    p = start(tmp_path/'killed', 0)
    p.start(), p.join()
    assert p.exitcode == 0 and kills == 10, f'{kills} kills'
    (a, ia), (b, ib) = load_checkpoint(tmp_path/'calm'), load_checkpoint(tmp_path/'killed')
    assert ia['step'] == ib['step'] == 200 and same(a['model'], b['model']) and same(a['cbs'][0]['shadow'], b['cbs'][0]['shadow'])
    assert same(a['opt']['state'][0], b['opt']['state'][0])
    print(f'{kills} kills')


def test_two_processes_give_the_single_process_curve(tmp_path):
    def launch(n):
        out = tmp_path/f'{n}.json'
        # --multi_gpu is accelerate's word for several processes; without it, --num_processes 2 on CPU starts a single one
        launcher = ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', str(n), '--num_machines', '1', '--mixed_precision', 'no',
                    '--dynamo_backend', 'no', '--main_process_port', '0'] if n > 1 else []
        done = subprocess.run([sys.executable, *launcher, str(HERE/'toy.py'), str(out), str(n)], capture_output=True, text=True,
                              env=dict(os.environ, OMP_NUM_THREADS='1'))
        assert done.returncode == 0, done.stderr[:6000]
        return json.loads(out.read_text())
    one, two = launch(1), launch(2)
    assert (one['processes'], two['processes']) == (1, 2)
    for a, b in zip(one['history'], two['history'], strict=True):
        assert a['step'] == b['step'] and a.keys() == b.keys()
        for k in a.keys() - {'seconds'}: assert a[k] == pytest.approx(b[k], rel=1e-4), k
    assert len(one['history']) == 31 and 'error' in one['history'][-1]


def test_nan_stops_before_the_step_and_keeps_the_batch():
    def poisoned(model, batch):
        y, x = batch
        return {'fit': (model(y) - x).square().mean(), 'extra': torch.tensor(float('nan')) if learn.step == 3 else y.mean()*0}
    learn = toy.learner(poisoned, cbs=[Before()])
    with pytest.raises(FloatingPointError, match='step 3.*extra=nan'): learn.fit(10)
    assert learn.step == 3 and same(learn.cbs[0].weights, weights(learn)) and learn.bad_batch[0].shape == (8, 8)


class Before(Callback):
    def after_step(self, learn): self.weights = weights(learn)


def test_ema_is_used_in_validation_only():
    seen = {}
    learn = toy.learner(cbs=[EMA(0.5), Metrics(norm=lambda m, b: seen.setdefault('w', m[0].weight.clone()).norm()[None])])
    learn.fit(10)
    assert torch.equal(seen['w'], learn.cbs[0].shadow['0.weight']) and not torch.equal(seen['w'], learn.bare[0].weight)
    assert torch.equal(learn.trained()[0].weight, seen['w']) and not learn.trained().training and learn.bare.training


def test_callbacks_are_called_in_order():
    calls = []
    class Log(Callback):
        def before_fit(self, learn): calls.append('before_fit')
        def after_step(self, learn): calls.append(f'after_step {learn.step}')
        def before_valid(self, learn): calls.append('before_valid')
        def after_valid(self, learn): calls.append('after_valid')
        def after_fit(self, learn): calls.append('after_fit')
    toy.learner(cbs=[Log()]).fit(2)
    assert calls == ['before_fit', 'after_step 1', 'after_step 2', 'before_valid', 'after_valid', 'after_fit']


def test_bf16_and_plain_learners_live_side_by_side():
    a = toy.learner(toy.plain_loss)
    b = toy.learner(toy.plain_loss, precision='bf16')
    a.fit(5), b.fit(5)
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
    assert [e.step for e in events.Scalars('loss')] == [r['step'] for r in learn.history if 'loss' in r]
    assert len(events.Scalars('valid_loss')) == 3


def test_fit_or_load(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path))
    a = toy.learner().fit_or_load('00_toy', dict(data='lines'), 20)
    b = toy.learner().fit_or_load('00_toy', dict(data='lines'), 20)
    assert 'trained' in (said := capsys.readouterr().out) and 'loaded' in said and same(weights(a), weights(b)) and b.history == a.history
    toy.learner().fit_or_load('00_toy', dict(data='other lines'), 20)
    toy.learner(opt=lambda p: torch.optim.AdamW(p, lr=3e-2)).fit_or_load('00_toy', dict(data='lines'), 20)
    assert len(list(tmp_path.iterdir())) == 3 and capsys.readouterr().out.count('trained') == 2


# checkpoints

def state(v): return dict(w=torch.full((3,), float(v)), nested=[(1, 2.5, None, 'x'), {'k': torch.arange(2)}], by_number={0: torch.ones(1)})


def test_checkpoint_round_trip_and_keep(tmp_path):
    for step in range(4): save_checkpoint(tmp_path, step, state(step), dict(config=dict(a=1)))
    got, info = load_checkpoint(tmp_path, dict(a=1))
    assert torch.equal(got['w'], torch.full((3,), 3.)) and got['nested'][0] == (1, 2.5, None, 'x') and info['step'] == 3
    assert 0 in got['by_number'] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize('file', ['state.safetensors', 'state.json'])
def test_truncated_checkpoint_falls_back_and_says_so(tmp_path, file):
    for step in (1, 2): save_checkpoint(tmp_path, step, state(step))
    damaged = tmp_path/'step_000000002'/file
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.warns(UserWarning, match='step_000000002.*damaged'): got, info = load_checkpoint(tmp_path)
    assert info['step'] == 1 and got['w'][0] == 1


def test_no_whole_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match='no whole checkpoint'): load_checkpoint(tmp_path)


def test_other_configuration_is_named(tmp_path):
    save_checkpoint(tmp_path, 1, state(1), dict(config=dict(width=48, depth=8)))
    with pytest.raises(ValueError, match='width: 48 there, 64 here'): load_checkpoint(tmp_path, dict(width=64, depth=8))


def test_full_disk_keeps_the_old_checkpoint(tmp_path):
    "A file system of 1 MB: the checkpoint that does not fit leaves the one before it whole."
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(disk)], capture_output=True).returncode:
        pytest.skip('may not mount a small file system here')
    try:
        save_checkpoint(disk, 1, state(1))
        with pytest.raises(OSError, match='intact'): save_checkpoint(disk, 2, dict(w=torch.zeros(1_000_000)))
        assert load_checkpoint(disk)[1]['step'] == 1 and [p.name for p in disk.iterdir()] == ['step_000000001']
    finally: subprocess.run(['umount', str(disk)], check=True)


def test_failing_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    import safetensors.torch
    save_checkpoint(tmp_path, 1, state(1))
    def full(tensors, path):
        Path(path).write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(safetensors.torch, 'save_file', full)
    with pytest.raises(OSError, match='No space left.*intact'): save_checkpoint(tmp_path, 2, state(2))
    assert load_checkpoint(tmp_path)[1]['step'] == 1 and [p.name for p in tmp_path.iterdir()] == ['step_000000001']


def test_tied_weights_survive(tmp_path):
    w = torch.rand(4)
    save_checkpoint(tmp_path, 1, dict(a=w, b=w))
    assert torch.equal(load_checkpoint(tmp_path)[0]['b'], w)


# schedule, groups, bad input

def test_schedule_against_torch():
    p = nn.Parameter(torch.zeros(1))
    opt = torch.optim.SGD([p], lr=1.0)
    ref = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=100, eta_min=0.1)
    factor = warmup_cosine(0.0, 0.1)
    for step in range(100):
        assert factor(step, 100) == pytest.approx(opt.param_groups[0]['lr'], abs=1e-9)
        opt.step(), ref.step()
    up = [warmup_cosine(0.1)(s, 100) for s in range(11)]
    assert up == sorted(up) and up[0] > 0 and up[10] == 1


def test_param_groups():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    groups = param_groups(model, 1e-3, {'0.': 0.1}, 0.05)
    assert sum(len(g['params']) for g in groups) == 6
    at = {id(p): (g['lr'], g['weight_decay']) for g in groups for p in g['params']}
    assert at[id(model[0].weight)] == (1e-4, 0.05) and at[id(model[0].bias)] == (1e-4, 0.0) and at[id(model[1].weight)] == (1e-3, 0.0)
    with pytest.raises(ValueError, match="'encoder.'"): param_groups(model, 1e-3, {'encoder.': 0.1})


def test_layered_rates_follow_the_schedule():
    learn = toy.learner(opt=None)
    model = toy.net()
    learn = toy.learner(model=model, opt=torch.optim.AdamW(param_groups(model, 1e-2, {'0.': 0.1}))).fit(9)
    rates = {g['lr'] for g in learn.opt.param_groups}
    assert max(rates)/min(rates) == pytest.approx(10)


def test_bad_train():
    stream = type('Stream', (torch.utils.data.IterableDataset,), {'__iter__': lambda self: iter(range(9))})()
    with pytest.raises(TypeError, match='map-style'): Learner(toy.net(), toy.loss_fn, torch.utils.data.DataLoader(stream), cpu=True)
    with pytest.raises(TypeError, match='list'): Learner(toy.net(), toy.loss_fn, [1, 2], cpu=True)
    with pytest.raises(ValueError, match='at least a batch'): toy.learner(batch=500)


@pytest.mark.parametrize('down, up', [(1, 1), (2, 1), (1, 4)])
def test_residual_cnn_starts_as_the_plain_baseline(down, up):
    y = torch.rand(2, 3, 17, 22)
    x = ResidualCNN(3, width=8, depth=3, down=down, up=up)(y)
    base = y if up == 1 else torch.nn.functional.interpolate(y, scale_factor=up, mode='bicubic', antialias=True)
    assert x.shape == (2, 3, 17*up, 22*up) and torch.equal(x, base)
