import json, math, os, re, signal, subprocess, sys, warnings
from functools import partial
from pathlib import Path
from unittest import mock

from common import ROOT
import numpy as np
import pytest
import pywt
import torch

from restore_lib import ablations, jobs
from restore_lib.ablation_study import SR_KNOBS, SRRow, knob_config
from restore_lib.ablation_tables import pareto
from restore_lib.ablations import ablate, swap_wavelet
from restore_lib.codecs import WaveletPacketCodec
from restore_lib.codecs import DCTCodec, LLCodec, PacketCodec
from restore_lib.thermal import thermal
from restore_lib.superres import LatentSR, make_sr
from restore_lib.superres_scores import sr_pairs
from restore_lib.superres_training import SRConfig

REF, GRID = dict(a=1, b=2), {'a 3': dict(a=3), 'b 5': dict(b=5), 'b 6': dict(b=6)}


def toy(config, seed):
    return dict(
        PSNR=[10 * config['a'] + config['b'] + torch.rand(()).item() for _ in range(4)],
        size=config['a'],
    )


class Counted:
    "toy, which notes each call in a file."

    def __init__(self, path, wrong=()):
        self.path, self.wrong = Path(path), wrong

    def __call__(self, config, seed):
        with open(self.path, 'a') as f:
            f.write(json.dumps([config, seed]) + '\n')
        if config['b'] in self.wrong:
            raise OSError('the disk <b>|')
        return toy(config, seed)

    @property
    def calls(self):
        return self.path.read_text().splitlines() if self.path.exists() else []


def told(ablation):
    return [
        {k: r.get(k) for k in ('row', 'knobs', 'config', 'seed', 'status', 'figures')}
        for r in ablation.rows
    ]


@pytest.fixture
def counted(tmp_path):
    return Counted(tmp_path / 'calls')


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'deep/rows.jsonl'


# ---- the plan


def test_reference_first_then_the_grid_and_seed_by_seed(counted):
    a = ablate(counted, REF, GRID, seeds=(3, 1), version=0)
    assert [(r['row'], r['seed']) for r in a.rows] == [
        (n, s) for n in ('reference', *GRID) for s in (3, 1)
    ]
    assert [json.loads(c)[1] for c in counted.calls] == [3] * 4 + [1] * 4
    assert all(r['config'] == {**REF, **GRID.get(r['row'], {})} for r in a.rows)


def test_rows_of_one_configuration_run_once(counted):
    a = ablate(counted, REF, {'a 1': dict(a=1), 'a 3': dict(a=3)}, version=0)
    assert len(counted.calls) == 2 and a.mean('a 1', 'PSNR') == a.mean('reference', 'PSNR')


def test_seeds_by_row(counted):
    a = ablate(counted, REF, GRID, seeds={'reference': (0, 1, 2), 'b 6': (0,)}, version=0)
    assert [len(a.runs(n)) for n in a.names] == [3, 3, 3, 1]


@pytest.mark.parametrize(
    'change, error, says',
    [
        (dict(grid={'x': dict(c=1)}), ValueError, "row 'x' turns 'c'"),
        (dict(grid={'x': dict(a=2, b=3)}), ValueError, 'turns 2 knobs'),
        (dict(grid={'x': {}}), ValueError, 'turns 0 knobs'),
        (dict(grid={'x': 3}), TypeError, 'expected a dict knob'),
        (dict(grid=[1]), TypeError, 'grid is list'),
        (dict(grid={'reference': dict(a=2)}), ValueError, "a row 'reference'"),
        (dict(reference=3), TypeError, 'reference is int'),
        (dict(reference={1: 2}), TypeError, 'expected text as keys'),
        (dict(reference=dict(a=float('nan'))), ValueError, 'JSON cannot hold'),
        (dict(reference=dict(a=torch.ones(1))), TypeError, 'JSON cannot hold'),
        (dict(seeds=()), ValueError, 'seeds is empty'),
        (dict(seeds=(0, 0)), ValueError, 'different whole numbers'),
        (dict(seeds=3), TypeError, 'expected a list'),
        (dict(seeds=('0',)), TypeError, 'a whole number'),
        (dict(seeds={'a 3': (0,)}), ValueError, 'empty'),
        (dict(seeds={'reference': (0,), 'z': (1,)}), ValueError, "'z', which is no row"),
        (dict(budget=-1), ValueError, 'budget is -1'),
        (dict(jobs=0), ValueError, 'jobs is 0'),
        (dict(jobs=1.5), ValueError, 'jobs is 1.5'),
        (dict(train=3), TypeError, 'train is int'),
    ],
)
def test_bad_input(change, error, says):
    with pytest.raises(error, match=re.escape(says)):
        ablate(**{**dict(train=toy, reference=REF, grid=GRID), **change})


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match='is a folder'):
        ablate(toy, REF, GRID, path=tmp_path)


def test_several_knobs_when_asked():
    assert ablate(toy, REF, {'both': dict(a=3, b=5)}, several=True).rows[1]['config'] == dict(
        a=3, b=5
    )


def test_train_gets_what_the_file_would_hold_and_may_change_it():
    seen = []

    def train(config, seed):
        seen.append(config['sizes'])
        config['sizes'].append(9)
        return dict(n=len(config['sizes']))

    a = ablate(train, dict(sizes=(1, 2)), {'three': dict(sizes=(1, 2, 3))})
    assert seen == [[1, 2, 9], [1, 2, 3, 9]] and [r['config']['sizes'] for r in a.rows] == [
        [1, 2],
        [1, 2, 3],
    ]


# ---- what is kept


def test_nothing_is_run_twice(counted, path):
    a = ablate(counted, REF, GRID, seeds=(0, 1), path=path, version=0)
    b = ablate(counted, REF, dict(reversed(GRID.items())), seeds=(1, 0, 2), path=path, version=0)
    assert len(counted.calls) == len(set(counted.calls)) == 12
    assert {json.dumps(r, sort_keys=True) for r in told(a)} <= {
        json.dumps(r, sort_keys=True) for r in told(b)
    }


def test_the_callers_random_state_is_left_alone(counted):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    ablate(toy, REF, GRID)
    assert torch.equal(torch.rand(3), want)


def test_another_reference_or_version_is_run_anew(counted, path):
    ablate(counted, REF, GRID, path=path, version=0)
    ablate(
        counted, dict(a=1, b=7), GRID, path=path, version=0
    )  # 'b 5' and 'b 6' set b: their configurations are the old ones
    assert len(counted.calls) == 6 and all(json.loads(c)[0]['b'] == 7 for c in counted.calls[4:])
    assert {
        r['status'] for r in ablate(counted, REF, GRID, path=path, version='1', budget=0).rows
    } == {'open'}
    ablate(counted, REF, GRID, path=path, version='1')
    assert len(counted.calls) == 10


def test_the_source_is_the_default_version(path):
    def one(config, seed):
        return dict(n=1)

    def two(config, seed):
        return dict(n=2)

    assert ablate(one, REF, {}, path=path).mean('reference', 'n') == 1
    assert (
        ablate(two, REF, {}, path=path).mean('reference', 'n') == 2
        and len(path.read_text().splitlines()) == 2
    )


def test_a_row_that_raises_is_told_and_tried_again(counted, path):
    counted.wrong = (5,)
    a = ablate(counted, REF, GRID, path=path, version=0)
    assert (
        [r['status'] for r in a.rows] == ['done', 'done', 'failed', 'done']
        and a.rows[2]['error'] == 'OSError: the disk <b>|'
        and 'test_ablations.py' in a.rows[2]['where']
    )
    assert '1 failed; OSError' in str(a)
    counted.wrong = ()
    b = ablate(counted, REF, GRID, path=path, version=0)
    assert [r['status'] for r in b.rows] == ['done'] * 4 and len(counted.calls) == 5
    counted.wrong = (5,)
    assert (
        told(ablate(counted, REF, GRID, path=path, version=0)) == told(b)
        and len(counted.calls) == 5
    )


@pytest.mark.parametrize('found', [None, {}, dict(n='x'), dict(n=[]), {1: 2}, dict(n=[[1.0]])])
def test_figures_that_are_none_fail_the_row(found):
    a = ablate(lambda c, s: found, REF, {})
    assert a.rows[0]['status'] == 'failed' and 'TypeError' in a.rows[0]['error']


def test_odd_numbers_survive_the_file(path):
    odd = lambda c, s: dict(
        one=math.nan,
        many=[1, math.inf, -math.inf, math.nan],
        t=torch.tensor([1.0, 2.0]),
        k=torch.tensor(3),
    )
    fresh, kept = (ablate(odd, REF, {'a 2': dict(a=2)}, path=path, version=0) for _ in range(2))
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN, which is no JSON
    for a in (fresh, kept):
        f = a.rows[0]['figures']
        assert (
            math.isnan(f['one'])
            and f['many'][:3] == [1, math.inf, -math.inf]
            and math.isnan(f['many'][3])
            and f['t'] == [1, 2]
            and f['k'] == 3
        )
        assert 'NaN' in str(a.table('one')) and 'cannot be compared' in a.sentence('a 2', 'one')


def test_budget_leaves_rows_open_and_names_them(path, monkeypatch, counted):
    clock = iter(range(0, 100000, 40))
    monkeypatch.setattr(
        jobs.time, 'monotonic', lambda: next(clock)
    )  # each look at the clock costs 40 seconds
    a = ablate(counted, REF, GRID, path=path, version=0, budget=2.5)
    assert 1 <= len(counted.calls) < 4 and [r['status'] for r in a.rows] == ['done'] * len(
        counted.calls
    ) + ['open'] * (4 - len(counted.calls))
    assert '1 open' in str(a) and 'b 6' in str(a)
    monkeypatch.undo()
    assert {r['status'] for r in ablate(counted, REF, GRID, path=path, version=0).rows} == {
        'done'
    } and len(counted.calls) == 4


def test_budget_of_nothing_reads_only(path):
    a = ablate(toy, REF, GRID, path=path, budget=0)
    assert (
        not path.exists()
        and {r['status'] for r in a.rows} == {'open'}
        and 'open or failed' in str(a)
        and a.html()
        and a.markdown()
    )


# ---- kill and resume


def run_here(tmp_path, kill_at=None, how='train', share=50):
    """A grid of three rows: (table, calls). The process ends by SIGKILL in row `kill_at`:
    while it trains, or with so many percent of the row written."""
    calls, append, n = tmp_path / 'calls', jobs.append_row, [0]
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)

    def train(config, seed):
        with open(calls, 'a') as f:
            f.write(json.dumps([config, seed]) + '\n')
        if how == 'train' and n[0] == kill_at:
            die()
        return dict(PSNR=[config['a'] + 0.1 * seed, config['b'] + 0.5])

    def half(path, record):
        append(path, record)
        if how == 'half' and n[0] == kill_at:
            whole = path.read_bytes()
            start = whole[:-1].rfind(b'\n') + 1
            path.write_bytes(whole[: start + (len(whole) - start) * share // 100])
            die()
        n[0] += 1

    with mock.patch.object(ablations, 'append_row', half):
        a = ablate(
            train,
            dict(a=1, b=2),
            {'a 3': dict(a=3), 'b 5': dict(b=5)},
            path=tmp_path / 'rows',
            version=0,
        )
    return [[r['row'], r['seed'], r['figures']] for r in a.rows], calls.read_text().splitlines()


def killed(*args):
    "`run_here` in a child; its exit status. The child is forked: starting Python takes seconds."
    pid = os.fork()
    if pid == 0:
        try:
            run_here(*args)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(
    'at, how, share',
    [(at, how, share) for at in (0, 1, 2) for how, share in (('train', 0), ('half', 60))]
    + [(1, 'half', 5), (1, 'half', 99)],
)
def test_killed_at_any_row_the_table_is_the_same(tmp_path, at, how, share):
    (tmp_path / 'never').mkdir()
    want, _ = run_here(tmp_path / 'never')
    assert killed(tmp_path, at, how, share) == -signal.SIGKILL
    rows = tmp_path / 'rows'
    assert (
        [json.loads(l)['row'] for l in rows.read_bytes().split(b'\n')[:-1]]
        == ['reference', 'a 3', 'b 5'][:at]
        if rows.exists()
        else at == 0
    )
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        got, calls = run_here(tmp_path)
    assert got == want and [
        str(w.message).count('half a line') for w in heard if 'half a line' in str(w.message)
    ] == [1] * (how == 'half')
    assert len(calls) == 4 and len(set(calls)) == 3  # the row that was killed, once more; no other
    assert len(rows.read_text().splitlines()) == 3


def test_killed_again_and_again(tmp_path):
    for at in (0, 0, 0):
        assert killed(tmp_path, at + 1, 'half', 50) in (-signal.SIGKILL, 1)
    got, calls = run_here(tmp_path)
    assert (
        len(got) == 3 and len(set(calls)) == 3 and calls.count(calls[0]) == 1
    )  # the first row, which was finished, was run once


def test_a_whole_last_line_without_its_end_counts(counted, path):
    a = ablate(counted, REF, GRID, path=path, version=0)
    path.write_bytes(path.read_bytes()[:-1])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        b = ablate(counted, REF, GRID, path=path, seeds=(0, 1), version=0)
    assert (
        len(counted.calls) == 8
        and len(path.read_text().splitlines()) == 8
        and told(a) == [r for r in told(b) if r['seed'] == 0]
    )


@pytest.mark.parametrize(
    'line',
    [
        '{"a": 1}',
        'not json',
        '[1, 2]',
        '{"config": {}, "seed": 0, "version": 0, "status": "done", "figures": {"n": "x"}}',
    ],
)
def test_a_foreign_file_is_refused(path, line):
    path.parent.mkdir()
    path.write_text(line + '\n')
    with pytest.raises(ValueError, match='line 1 is no record'):
        ablate(toy, REF, GRID, path=path)
    assert path.read_text() == line + '\n'


def test_two_runs_of_one_file(path):
    held = jobs.hold(path)
    try:
        with pytest.raises(RuntimeError, match='being written by another run'):
            ablate(toy, REF, GRID, path=path)
        assert {r['status'] for r in ablate(toy, REF, GRID, path=path, budget=0).rows} == {
            'open'
        }  # reading is allowed
    finally:
        held.release()
    assert {r['status'] for r in ablate(toy, REF, GRID, path=path).rows} == {'done'}


def test_a_run_inside_a_row_is_told(path):
    def train(config, seed):
        ablate(toy, REF, GRID, path=path)
        return dict(n=1)

    assert 'being written by another run' in ablate(train, REF, {}, path=path).rows[0]['error']


# ---- several processes

MAIN = '''
import os, sys, time, torch
from restore_lib.ablations import ablate
import restore_lib.jobs as jobs
torch.set_num_threads(1)
scale = 2                                                  # a global of __main__, as in a notebook
def helper(x): return scale*x
def train(config, seed):
    if config['b'] == 5 and config.get('die'): os._exit(7)
    if config['b'] == 6: raise ValueError('six')
    time.sleep(0.1)
    values = [helper(config['a']) + torch.rand(()).item() for _ in range(3)]
    gpu = float(os.environ.get('CUDA_VISIBLE_DEVICES') or -1)
    return dict(PSNR=values, pid=os.getpid(), gpu=gpu)
if __name__ == '__main__':
    ref, grid = dict(a=1, b=2, die=0), {'a 3': dict(a=3), 'b 5': dict(b=5), 'b 6': dict(b=6)}
    psnr = lambda r: r.get('figures', {}).get('PSNR')
    told = lambda a: [(r['row'], r['seed'], r['status'], psnr(r), r.get('error')) for r in a.rows]
    one = ablate(train, ref, grid, seeds=(0, 1))
    jobs.gpu_ids = lambda: ['3', '8']                         # two GPUs: two workers, unasked
    two = ablate(train, ref, grid, seeds=(0, 1))
    assert told(one) == told(two), (told(one), told(two))
    of = {(r['figures']['pid'], r['figures']['gpu']) for r in two.rows if r['status'] == 'done'}
    assert {g for _, g in of} == {3, 8} and len({p for p, _ in of}) == 2 == len(of), of
    assert os.getpid() not in dict(of), of
    del grid['a 3'], grid['b 6']
    dead = ablate(train, {**ref, 'die': 1}, grid, jobs=2, path=sys.argv[1], version=0).rows[1]
    assert dead['status'] == 'failed' and 'worker process died' in dead['error'], dead
    steady = lambda config, seed: dict(PSNR=1.0)
    again = ablate(steady, {**ref, 'die': 1}, grid, path=sys.argv[1], version=0)
    assert {r['status'] for r in again.rows} == {'done'}
    print('fine')
'''


def test_worker_processes(tmp_path):
    (tmp_path / 'main.py').write_text(MAIN)
    env = {k: v for k, v in os.environ.items() if k != 'CUDA_VISIBLE_DEVICES'}
    out = subprocess.run(
        [sys.executable, tmp_path / 'main.py', str(tmp_path / 'rows')],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**env, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
    )
    assert out.stdout.strip() == 'fine', out.stderr


# ---- tables


def test_table_says_what_compare_says():
    a = ablate(toy, REF, GRID, seeds=(0, 1, 2))
    r, line = a.compare('a 3', 'PSNR'), {q['row']: q for q in a.table('PSNR').rows}['a 3']
    assert (
        line['difference']
        == r.difference
        == pytest.approx(a.mean('a 3', 'PSNR') - a.mean('reference', 'PSNR'))
        and line['told apart'] == 'yes'
        and line['seeds'] == 3
    )
    assert a.compare('a 3', 'PSNR', paired_seeds=True).interval[0] == pytest.approx(
        20
    )  # one random state a seed: the noise is the reference's own
    assert a.sentence('a 3').startswith(f'a 3 changes PSNR by {r.difference:+.2f}')
    assert a.compare('a 3', to='b 5').difference == pytest.approx(20 - 3)
    assert 'minutes' in line and len(a.figure(title='toy').axes[0].get_yticklabels()) == 4


def test_one_seed_is_said_to_be_one():
    a = ablate(toy, REF, GRID)
    assert {q['told apart'] for q in a.table().rows} == {
        None,
        'one seed',
    } and 'from one seed' in a.sentence('b 5')
    assert (
        'one image and one seed' in a.sentence('b 5', 'size')
        and a.table('size').rows[2]['difference'] is None
    )


def test_images_that_do_not_match_are_not_compared():
    a = ablate(lambda c, s: dict(PSNR=[1.0] * (2 + c['a'])), REF, {'a 3': dict(a=3)}, seeds=(0, 1))
    assert 'same images' in a.table().rows[1]['note'] and 'cannot be compared' in a.sentence('a 3')


def test_names_are_escaped():
    grid = {'<script>|`x`*': dict(a=3), 'b\n5': dict(b=5)}
    a = ablate(toy, REF, grid)
    html, md = a.html(caption='<i>'), a.markdown(caption='<i>')
    for text in (html, md, a._repr_html_(), a._repr_markdown_()):
        assert '<script>' not in text and '<i>' not in text and '&lt;script&gt;' in text
    assert (
        r'\|' in md
        and r'\`x\`\*' in md
        and len(md.splitlines()) == 2 + 5
        and html.count('<tr>') == 4
    )
    assert a.figure(title='a $b')


def test_unknown_names_are_told():
    a = ablate(toy, REF, GRID)
    with pytest.raises(KeyError, match='no row'):
        a.compare('z')
    with pytest.raises(KeyError, match='no figure'):
        a.table('z')


# ---- wavelets


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('level', [1, 2, 3])
def test_haar_is_packet_codec(level, channels):
    x = torch.rand(2, channels, 32, 48)
    a, b = PacketCodec(channels, level), WaveletPacketCodec(channels, level)
    torch.testing.assert_close(b.encode(x)[0], a.encode(x)[0], atol=1e-5, rtol=0)
    assert b.bands == a.bands and b.factor == a.factor


@pytest.mark.parametrize('wavelet', ['haar', 'db2', 'db8', 'bior1.3', 'bior4.4', 'sym4'])
@pytest.mark.parametrize('channels', [1, 3])
def test_other_wavelets_lose_nothing(wavelet, channels):
    x = torch.rand(2, channels, 48, 32, dtype=torch.float64)
    codec = WaveletPacketCodec(channels, 2, wavelet).double()
    z, side = codec.encode(x)
    assert z.shape == (2, 16 * channels, 12, 8) and side == ()
    torch.testing.assert_close(codec.decode(z), x, atol=1e-10, rtol=0)


@pytest.mark.parametrize('wavelet', ['db2', 'bior1.3', 'sym4'])
def test_packets_are_pywavelets(wavelet):
    x = torch.rand(1, 1, 32, 32, dtype=torch.float64)
    z = WaveletPacketCodec(1, 2, wavelet).double().encode(x)[0][0]
    tree = pywt.WaveletPacket2D((2 * x - 1)[0, 0].numpy(), wavelet, 'periodization', 2)
    for k, path in enumerate(p + q for p in 'ahvd' for q in 'ahvd'):
        torch.testing.assert_close(z[k], torch.as_tensor(tree[path].data), atol=1e-10, rtol=0)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    m = make_sr(
        SRConfig(net_options=dict(base=16, embed=16, head_channels=8)), sr_pairs(thermal(4, 64))
    )
    with torch.no_grad():
        m.net.last[-1].weight.normal_(std=0.05)
    return m.eval()


def test_swapping_changes_the_basis_only(model):
    y, how = torch.rand(1, 1, 16, 16), lambda: dict(generator=torch.Generator().manual_seed(0))
    new = swap_wavelet(model, 'db2')
    assert type(model.codec) is PacketCodec and new.codec.wavelet == 'db2' and not new.training
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), new.state_dict().values())
    )
    assert not torch.allclose(model(y, **how()), new(y, **how()), atol=1e-3)
    torch.testing.assert_close(
        swap_wavelet(new, 'haar')(y, **how()), model(y, **how()), atol=1e-4, rtol=0
    )
    new.net.last[-1].weight.data.zero_()
    assert model.net.last[-1].weight.abs().max() > 0


def test_swapping_keeps_gains_and_takes_an_ll_codec(model):
    m = swap_wavelet(model, 'haar')
    m.codec.gains.mul_(3)
    assert swap_wavelet(m, 'sym4').codec.gains.unique().tolist() == [3]
    ll = make_sr(SRConfig(codec='ll', net_options=dict(base=16, embed=16, head_channels=8)))
    assert swap_wavelet(ll, 'bior1.3').codec.wavelet == 'bior1.3' and ll.codec.wavelet == 'haar'
    with pytest.raises(ValueError):
        swap_wavelet(ll, 'no such')
    with pytest.raises(ValueError):
        swap_wavelet(model, 'no such')
    with pytest.raises(TypeError, match='DCTCodec, which has no wavelet'):
        swap_wavelet(LatentSR(DCTCodec(), torch.nn.Identity()), 'db2')


# what stands for a training function --------------------------------------------------------------


def _bound(config, seed, lr=0.1):
    return {'PSNR': lr}


def _closed(rate):
    def train(config, seed):
        return {'PSNR': rate}

    return train


@pytest.mark.parametrize(
    'a, b',
    [
        (partial(_bound, lr=0.1), partial(_bound, lr=0.2)),
        (_closed(1.0), _closed(2.0)),
        (_bound, partial(_bound, lr=0.1)),
        (_closed(_bound), _closed(_closed(1.0))),
    ],
)
def test_a_version_sees_what_is_bound(a, b, tmp_path):
    from restore_lib.fingerprints import fingerprint

    assert fingerprint(a) != fingerprint(b) and fingerprint(a) == fingerprint(a)


def test_rows_of_another_bound_value_are_not_used(tmp_path):
    figures = [
        ablate(
            partial(_bound, lr=lr),
            {'k': 0},
            {'one': {'k': 1}},
            path=tmp_path / 'rows.jsonl',
            several=False,
        ).mean('one', 'PSNR')
        for lr in (0.1, 0.2, 0.1)
    ]
    assert figures == [0.1, 0.2, 0.1]


# what stands for a training function, by content --------------------------------------------------


class Callable:
    "A training with a setting."

    def __init__(self, gain, seen=()):
        self.gain, self.seen = gain, seen

    def __call__(self, config, seed):
        return dict(PSNR=self.gain)

    def method(self, config, seed):
        return dict(PSNR=self.gain)


def _global(value):
    space = dict(gain=value, __name__='user')
    exec('def train(config, seed): return dict(PSNR=float(gain.sum()))', space)
    return space['train']


def _over_data(value):
    data = torch.utils.data.TensorDataset(torch.full((3,), value))

    def train(config, seed):
        return dict(PSNR=data[0][0].item())

    return train


@pytest.mark.parametrize(
    'make',
    [
        Callable,
        lambda v: Callable(v).method,
        lambda v: partial(Callable(v).method),
        lambda v: _global(torch.full((2,), v / 2)),
        _over_data,
        lambda v: lambda config, seed: dict(PSNR=v),
    ],
    ids=['object', 'method', 'partial', 'global', 'data set', 'closure'],
)
def test_rows_of_another_content_are_not_used_and_of_the_same_are(make, path):
    "Another value is another training; the same value, made anew as in another process, is not."
    figures = [
        ablate(make(v), REF, {}, path=path).mean('reference', 'PSNR') for v in (1.0, 2.0, 1.0, 2.0)
    ]
    assert figures == [1.0, 2.0, 1.0, 2.0] and len(path.read_text().splitlines()) == 2


def test_what_is_not_seen_is_said(path):
    with pytest.warns(UserWarning, match=r'`pool` that .*train captures \(a builtins.generator\)'):
        pool = (k for k in range(3))

        def train(config, seed):
            return dict(n=len(str(pool)))

        ablate(train, REF, {}, path=path)


# numbers, paths, empty tables, blank lines --------------------------------------------------------


def test_numpy_numbers_and_paths(counted, path):
    a = ablate(
        counted,
        dict(a=np.int64(1), b=np.float32(2), where=Path('x')),
        {'a 3': dict(a=np.int64(3))},
        seeds=np.arange(2),
        path=path,
        jobs=np.int64(1),
        budget=np.float32(60),
        version=0,
    )
    b = ablate(
        counted,
        dict(a=1, b=2.0, where='x'),
        {'a 3': dict(a=3)},
        seeds=[np.int64(0), 1],
        path=path,
        budget=math.inf,
        version=0,
    )
    assert (
        len(counted.calls) == 4
        and told(a) == told(b)
        and a.rows[1]['seed'] == 1
        and a.rows[0]['config']['where'] == 'x'
    )


@pytest.mark.parametrize(
    'change, error, says',
    [
        (dict(seeds=(1.5,)), ValueError, 'seeds[0] is 1.5'),
        (dict(seeds=(True,)), ValueError, 'seeds[0] is True'),
        (dict(jobs=True), ValueError, 'jobs is True'),
        (dict(budget=math.nan), ValueError, 'budget is nan'),
        (dict(budget='1'), TypeError, "budget is '1'"),
        (dict(reference=dict(a={1})), TypeError, "reference['a'] is set"),
        (dict(version=math.nan), ValueError, 'version is nan'),
        (dict(grid={'x': dict(a=math.inf)}), ValueError, "grid['x']['a'] is inf"),
    ],
)
def test_bad_numbers_are_named(change, error, says):
    with pytest.raises(error, match=re.escape(says)):
        ablate(**{**dict(train=toy, reference=REF, grid=GRID), **change})


@pytest.mark.parametrize(
    'make',
    [
        lambda: ablate(toy, REF, GRID, budget=0),
        lambda: ablate(Counted(os.devnull, wrong=(2, 5, 6)), REF, GRID, version=0),
    ],
    ids=['open', 'failed'],
)
def test_a_table_without_figures(make):
    "No row has finished: tables say so, comparisons and figures are named errors."
    a = make()
    assert (
        a.metrics == []
        and math.isnan(a.mean('reference', 'PSNR'))
        and a.runs('reference') == []
        and 'no row has finished' in a.sentence('a 3')
        and 'no row has finished' in a.sentence('a 3', 'PSNR')
    )
    for text in (str(a), a.html(), a.markdown(), str(a.table('PSNR')), a.markdown('PSNR')):
        assert 'a 3' in text and 'open or failed' in text
    for act in (
        lambda: a.compare('a 3'),
        lambda: a.compare('a 3', 'PSNR'),
        a.figure,
        lambda: a.figure('PSNR'),
    ):
        with pytest.raises(ValueError, match='no row has finished'):
            act()


def test_a_figure_needs_the_reference():
    a = ablate(Counted(os.devnull, wrong=(2,)), REF, {'b 5': dict(b=5)}, version=0)
    assert [r['status'] for r in a.rows] == [
        'failed',
        'done',
    ] and 'cannot be compared' in a.sentence('b 5')
    with pytest.raises(ValueError, match='reference has no PSNR'):
        a.figure()
    assert 'reference has no finished run' in str(a) and a.markdown() and a.html()


def test_failed_rows_beside_finished_ones_are_drawn():
    a = ablate(Counted(os.devnull, wrong=(5,)), REF, GRID, version=0)
    assert [t.get_text() for t in a.figure().axes[0].get_yticklabels()] == [
        'reference',
        'a 3',
        'b 6',
    ] and '1 failed' in a.markdown()


def test_a_figure_explains_the_colours_that_are_in_it():
    seeds = {'reference': (0, 1), 'b 5': (0,)}
    a = ablate(by_seed, REF, {'b 5': dict(b=5)}, seeds=seeds, version=0)
    label = a.figure().axes[0].get_xlabel()
    assert label.endswith('; orange: one seed') and 'blue' not in label
    alone = ablate(by_seed, REF, {}, version=0).figure().axes[0].get_xlabel()
    assert alone.endswith(')')


@pytest.mark.parametrize('blank', [b'\n', b'\n\n', b'  \n', b'   '])
def test_blank_lines_are_no_records(counted, path, blank):
    a = ablate(counted, REF, GRID, path=path, version=0)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        blank.strip(b' ')
        + b''.join(lines[:2])
        + (blank if blank.endswith(b'\n') else b'')
        + b''.join(lines[2:])
        + blank
    )
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        b = ablate(counted, REF, GRID, path=path, version=0)
        c = ablate(counted, REF, GRID, seeds=(0, 1), path=path, version=0)
    assert (
        told(a) == told(b)
        and len(counted.calls) == 8
        and len(c.rows) == 8
        and len([json.loads(line) for line in path.read_text().splitlines()]) == 8
    )


# codecs -------------------------------------------------------------------------------------------


def test_a_swapped_codec_says_its_wavelet(model):
    new = swap_wavelet(model, 'db2')
    assert (
        new.codec.wavelet == 'db2'
        and "wavelet='db2'" in repr(new)
        and "wavelet='haar'" in repr(WaveletPacketCodec())
    )
    x = torch.rand(1, 1, 16, 16)
    assert not torch.allclose(new.codec.encode(x)[0], model.codec.encode(x)[0], atol=1e-3)


def test_a_codec_made_from_a_packet_is_not_replaced(model):
    class Moved(PacketCodec):
        def _apart(self, x):
            return super()._apart(x.roll((4, 4), (-2, -1)))

    moved = LatentSR(Moved(), torch.nn.Identity())
    with pytest.raises(TypeError, match='Moved, which has no wavelet'):
        swap_wavelet(moved, 'db2')


@pytest.mark.parametrize(
    'level, error', [(0, ValueError), (1.5, ValueError), (True, ValueError), ('2', TypeError)]
)
def test_levels(level, error):
    assert WaveletPacketCodec(1, np.int64(2), 'db2').level == 2
    with pytest.raises(error, match='level is'):
        WaveletPacketCodec(1, level)


def test_a_row_of_the_dct():
    "The packet's rival has blocks instead of levels; such a row once failed in the lesson."
    small = dict(crop=32, batch=4, net_options=dict(base=16, embed=16, head_channels=8))
    config = knob_config(SR_KNOBS | dict(codec='dct', steps=1), 0, **small)
    codec = make_sr(config, sr_pairs(thermal(3, 64))).codec
    assert type(codec) is DCTCodec and codec.latent_channels == 16
    other = knob_config(SR_KNOBS | dict(codec='ll', steps=1), 0, **small)
    assert type(make_sr(other, sr_pairs(thermal(3, 64))).codec) is LLCodec


# minutes, the front, clusters ---------------------------------------------------------------------


def test_minutes_are_those_that_train_gives(path):
    "Weights out of a cache are looked up in no time; the row says what they cost."
    a = ablate(lambda config, seed: dict(PSNR=1.0, minutes=7.5), REF, GRID, path=path)
    assert {r['minutes'] for r in a.rows} == {7.5} and a.metrics == ['PSNR']
    assert a.minutes('a 3') == 7.5 and a.table().rows[0]['minutes'] == 7.5
    plain = ablate(lambda config, seed: dict(PSNR=1.0), REF, {})
    assert 0 <= plain.minutes('reference') < 1
    assert math.isnan(ablate(toy, REF, {}, budget=0).minutes('reference'))


def test_pareto():
    assert pareto(dict(a=(1, 2), b=(2, 1), c=(3, 3), d=(3, 2.5), e=(4, 3))) == ['a', 'c']
    assert pareto({}) == []


def test_threads_are_refused():
    "They share one random state: rows would no longer be those of their seeds."
    from joblib import parallel_config

    with parallel_config(backend='threading'):
        with pytest.raises(ValueError, match='runs threads'):
            ablate(toy, REF, GRID, jobs=2)


def test_a_function_that_cannot_travel_is_told():
    lock = __import__('threading').Lock()
    with pytest.raises(TypeError, match='cannot be sent to a worker process'):
        ablate(lambda config, seed: dict(n=bool(lock)), REF, GRID, jobs=2, version=0)


def by_seed(config, seed):
    return dict(PSNR=[config['a'] + torch.rand(()).item() for _ in range(3)], minutes=1)


def test_two_workers_of_loky_give_the_same_table(path):
    one = ablate(by_seed, REF, GRID, seeds=(0, 1), version=0)
    two = ablate(by_seed, REF, GRID, seeds=(0, 1), version=0, jobs=2, path=path)
    assert told(one) == told(two) and str(one) == str(two)
    kept = ablate(by_seed, REF, GRID, seeds=(0, 1), version=0, path=path, budget=0)
    assert told(kept) == told(one)


def test_a_dask_cluster_gives_the_same_table(path):
    distributed = pytest.importorskip(
        'distributed', reason="no dask.distributed: pip install 'restore_lib[cluster]'"
    )
    from joblib import parallel_config

    one = ablate(by_seed, REF, GRID, seeds=(0, 1), version=0)
    cluster = dict(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with distributed.LocalCluster(**cluster) as local, distributed.Client(local):
        with parallel_config(backend='dask'):
            two = ablate(by_seed, REF, GRID, seeds=(0, 1), version=0, jobs=2, path=path)
    assert told(one) == told(two) and str(one) == str(two)


def test_a_row_is_the_same_training_when_it_is_made_anew():
    "No row of the lesson is trained again by a process that makes its images anew."
    from restore_lib.fingerprints import fingerprint

    def made(seed):
        pairs = sr_pairs(thermal(3, 64, seed=seed))
        return SRRow(pairs[:2], {'': pairs[2:]}, crop=32)

    assert fingerprint(made(0)) == fingerprint(made(0)) != fingerprint(made(1))
