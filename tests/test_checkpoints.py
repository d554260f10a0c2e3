"""Checkpoints that are damaged, displaced or none of ours; loads that fit in part, under other
names, or not at all; published files."""

import argparse, math, re, subprocess, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from common import DEVICES
from torch import nn

from restore_lib.checkpoints import (
    as_json,
    check_dense,
    check_shapes,
    count_blocks,
    load_checkpoint,
    load_report,
    open_published,
    published_arguments,
    save_checkpoint,
)


# checkpoints --------------------------------------------------------------------------------------


def state(v):
    return dict(
        w=torch.full((3,), float(v)),
        nested=[(1, 2.5, None, 'x'), {'k': torch.arange(2)}],
        by_number={0: torch.ones(1)},
    )


def test_checkpoint_round_trip_and_keep(tmp_path):
    for step in range(4):
        save_checkpoint(tmp_path, step, state(step), dict(config=dict(a=1)))
    got, info = load_checkpoint(tmp_path, dict(a=1))
    assert (
        torch.equal(got['w'], torch.full((3,), 3.0))
        and got['nested'][0] == (1, 2.5, None, 'x')
        and info['step'] == 3
    )
    assert 0 in got['by_number'] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize('file', ['state.safetensors', 'state.json'])
def test_truncated_checkpoint_falls_back_and_says_so(tmp_path, file):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step))
    damaged = tmp_path / 'step_000000002' / file
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.warns(UserWarning, match='step_000000002.*damaged'):
        got, info = load_checkpoint(tmp_path)
    assert info['step'] == 1 and got['w'][0] == 1


def test_no_whole_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match='no whole checkpoint'):
        load_checkpoint(tmp_path)


def test_other_configuration_is_named(tmp_path):
    save_checkpoint(tmp_path, 1, state(1), dict(config=dict(width=48, depth=8)))
    with pytest.raises(ValueError, match='width: 48 there, 64 here'):
        load_checkpoint(tmp_path, dict(width=64, depth=8))


def test_full_disk_keeps_the_old_checkpoint(tmp_path):
    "A file system of 1 MB: the checkpoint that does not fit leaves the one before it whole."
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(disk)], capture_output=True
    ).returncode:
        pytest.skip('may not mount a small file system here')
    try:
        save_checkpoint(disk, 1, state(1))
        with pytest.raises(OSError, match='intact'):
            save_checkpoint(disk, 2, dict(w=torch.zeros(1_000_000)))
        assert load_checkpoint(disk)[1]['step'] == 1 and [p.name for p in disk.iterdir()] == [
            'step_000000001'
        ]
    finally:
        subprocess.run(['umount', str(disk)], check=True)


def test_failing_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    import safetensors.torch

    save_checkpoint(tmp_path, 1, state(1))

    def full(tensors, path):
        Path(path).write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(safetensors.torch, 'save_file', full)
    with pytest.raises(OSError, match='No space left.*intact'):
        save_checkpoint(tmp_path, 2, state(2))
    assert load_checkpoint(tmp_path)[1]['step'] == 1 and [p.name for p in tmp_path.iterdir()] == [
        'step_000000001'
    ]


def test_tied_weights_survive(tmp_path):
    w = torch.rand(4)
    save_checkpoint(tmp_path, 1, dict(a=w, b=w))
    assert torch.equal(load_checkpoint(tmp_path)[0]['b'], w)


def test_keep_counts_the_steps_up_to_this_one(tmp_path):
    for step in (25, 50, 5, 10, 15):
        save_checkpoint(tmp_path, step, state(step))
    assert [p.name[-2:] for p in sorted(tmp_path.iterdir())] == ['10', '15', '25', '50']
    save_checkpoint(tmp_path, 60, state(60), keep=1)
    assert [p.name[-2:] for p in tmp_path.iterdir()] == ['60']


@pytest.mark.parametrize(
    'bad, error, says',
    [
        (dict(keep=0), ValueError, 'keep is 0'),
        (dict(keep=-1), ValueError, 'keep is -1'),
        (dict(keep=1.5), ValueError, 'keep is 1.5'),
        (dict(keep='2'), TypeError, "keep is '2'"),
        (dict(step=-1), ValueError, 'step is -1'),
        (dict(step=1.5), ValueError, 'step is 1.5'),
        (dict(step=10**9), ValueError, 'step is 1000000000'),
        (dict(step=True), ValueError, 'step is True'),
        (dict(state={(1, 2): 3}), TypeError, 'a key of state is tuple'),
        (dict(state={'a': {1}}), TypeError, 'state.a is set'),
        (dict(info=dict(step=3)), ValueError, "info has the key 'step'"),
    ],
)
def test_what_no_checkpoint_can_hold_is_named(tmp_path, bad, error, says):
    save_checkpoint(tmp_path, 1, state(1))
    with pytest.raises(error, match=re.escape(says)):
        save_checkpoint(tmp_path, **{**dict(step=2, state=state(2)), **bad})
    assert [p.name for p in tmp_path.iterdir()] == ['step_000000001'] and load_checkpoint(tmp_path)[
        1
    ]['step'] == 1


def test_numpy_numbers_in_checkpoints(tmp_path):
    for step in np.arange(4):
        save_checkpoint(
            tmp_path,
            step,
            dict(n=np.int64(3), x=np.float32(0.5), by={np.int64(7): np.bool_(True)}),
            keep=np.int64(2),
        )
    got, info = load_checkpoint(tmp_path)
    assert (
        got == dict(n=3, x=0.5, by={7: True})
        and info['step'] == 3
        and len(list(tmp_path.iterdir())) == 2
    )


def test_keys_that_look_alike_stay_apart(tmp_path):
    one, two, three, four = (torch.full((2,), float(k)) for k in range(4))
    held = {
        'a.b': one,
        'a': {'b': two, "b'": three},
        1: three,
        '1': four,
        "a.b'": four,
        None: one,
        'None': two,
    }
    save_checkpoint(tmp_path, 1, held)
    got = load_checkpoint(tmp_path)[0]
    flat = lambda d: [(k, flat(v) if isinstance(v, dict) else v.tolist()) for k, v in d.items()]
    assert flat(got) == flat(held) and [type(k) for k in got] == [type(k) for k in held]
    save_checkpoint(tmp_path, 2, {True: one, 'True': two})
    assert flat(load_checkpoint(tmp_path)[0]) == [(True, [0.0, 0.0]), ('True', [1.0, 1.0])]


@pytest.mark.parametrize('file', ['state.safetensors', 'state.json', 'sums.json'])
def test_a_flipped_bit_is_seen(tmp_path, file):
    "Wherever it is: the checkpoint is named as damaged and the one before it is taken."
    for step in (1, 2):
        save_checkpoint(
            tmp_path, step, state(step), dict(config=dict(a=1), metrics=dict(error=0.25))
        )
    path = tmp_path / 'step_000000002' / file
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with pytest.warns(UserWarning, match='step_000000002.*damaged'):
            got, info = load_checkpoint(tmp_path)
        assert info['step'] == 1 and got['w'][0] == 1 and info['metrics'] == dict(error=0.25)
    path.write_bytes(whole)
    assert load_checkpoint(tmp_path)[1]['step'] == 2


def test_a_flipped_exponent_does_not_load_as_infinity(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, dict(w=torch.full((256,), 1.5)))
    path = tmp_path / 'step_000000002/state.safetensors'
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 0x40]))
    with pytest.warns(UserWarning, match='damaged'):
        got, info = load_checkpoint(tmp_path)
    assert info['step'] == 1 and got['w'].unique().tolist() == [1.5]


@pytest.mark.parametrize(
    'text',
    [
        'null',
        '[]',
        '[1, 2]',
        '3',
        '"text"',
        '',
        '{',
        '{}',
        '{"step": 2}',
        '{"step": 2, "form": null}',
        '{"step": 2, "form": [1]}',
        '{"step": 2, "form": {"value": 1, "dict": []}}',
        '{"step": 2, "form": {"tensor": "gone"}}',
        '{"step": 2, "form": {"dict": 3}}',
        '{"step": 2, "form": {"what": 3}}',
        '{"step": 7, "form": {"value": 1}}',
        '{"form": {"value": 1}}',
    ],
)
@pytest.mark.parametrize('sums', [True, False])
def test_a_json_that_is_none_of_ours_is_damage(tmp_path, text, sums):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step))
    (tmp_path / 'step_000000002/state.json').write_text(text)
    if not sums:
        (tmp_path / 'step_000000002/sums.json').unlink(missing_ok=True)
    with pytest.warns(UserWarning, match='step_000000002.*damaged'):
        got, info = load_checkpoint(tmp_path)
    assert info['step'] == 1 and got['w'][0] == 1


def test_plain_data_of_every_kind_is_a_configuration(tmp_path):
    config = dict(
        folder=tmp_path / 'x',
        size=(32, 16),
        n=np.int64(3),
        x=np.float32(0.5),
        on=np.bool_(True),
        by={2: 'two', None: [Path('a')]},
    )
    save_checkpoint(
        tmp_path / 'c', 1, state(1), dict(config=config, where=Path('b'), error=float('nan'))
    )
    _, info = load_checkpoint(tmp_path / 'c', config)
    assert (
        info['config']
        == dict(
            folder=str(tmp_path / 'x'),
            size=[32, 16],
            n=3,
            x=0.5,
            on=True,
            by={'2': 'two', 'null': ['a']},
        )
        and info['where'] == 'b'
    )
    with pytest.raises(ValueError, match=r'size: \[32, 16\] there, \[32, 8\] here'):
        load_checkpoint(tmp_path / 'c', dict(config, size=(32, 8)))


@pytest.mark.parametrize(
    'v, error, says',
    [
        (float('nan'), ValueError, 'nan, which JSON'),
        (np.float64('inf'), ValueError, 'inf, which JSON'),
        ({1, 2}, TypeError, 'set, which JSON'),
        (torch.ones(2), TypeError, 'Tensor, which JSON'),
        (np.ones(2), TypeError, 'ndarray, which JSON'),
        (b'x', TypeError, 'bytes, which JSON'),
        ({1: 2, '1': 3}, ValueError, "two keys that are '1'"),
        (object(), TypeError, 'object, which JSON'),
    ],
)
def test_what_json_cannot_hold_is_named(tmp_path, v, error, says):
    name = r"config\['a'\]\[0\]" if not isinstance(v, dict) else r"config\['a'\]\[0\] has"
    for act in (
        lambda c: save_checkpoint(tmp_path / 'c', 1, state(1), dict(config=c)),
        lambda c: load_checkpoint(tmp_path, c),
    ):
        with pytest.raises(error, match=f'{name}.*{says}'):
            act(dict(a=[v]))
    assert not (tmp_path / 'c').exists()


# loads --------------------------------------------------------------------------------------------


def small(seed=0, names=('body', 'head'), width=4):
    torch.manual_seed(seed)
    return nn.ModuleDict(
        {
            names[0]: nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width)),
            names[1]: nn.Linear(width, 2),
        }
    )


def prefixed(state, p):
    return {p + k: v for k, v in state.items()}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


BAD_LOADS = {
    'data parallel': (
        lambda: prefixed(small(1).state_dict(), 'module.'),
        {},
        r"copied 0 of 9.*missing.*'body.0.weight'.*extra.*'module.body.0.weight'.*"
        r"rename=\{'module.': ''\} would copy 9 of 9",
    ),
    'other name': (
        lambda: {k.replace('body', 'net'): v for k, v in small(1).state_dict().items()},
        {},
        r"rename=\{'net.': 'body.'\} would copy 9 of 9",
    ),
    'other width': (
        lambda: small(1, width=8).state_dict(),
        {},
        r'mismatched, the first .body.0.weight: \(\(4, 1, 3, 3\), \(8, 1, 3, 3\)\)',
    ),
    'without the head': (
        lambda: {k: v for k, v in small(1).state_dict().items() if 'head' not in k},
        {},
        "copied 7 of 9.*2 missing, the first 'head.weight'",
    ),
    'without statistics': (
        lambda: dict(small(1).named_parameters()),
        {},
        '3 missing.*running_mean',
    ),
    'nested': (
        lambda: dict(model=small(1).state_dict(), step=3),
        {},
        r"holds dicts of tensors: 'model'; pass one of them, such as checkpoint\['model'\]",
    ),
    'with a step': (lambda: dict(small(1).state_dict(), step=3), {}, "holds 'step', a int"),
    'collision': (
        lambda: small(1).state_dict() | prefixed(small(2).state_dict(), 'ema.'),
        dict(rename={'ema.': ''}),
        "makes 'body.0.weight' of both 'body.0.weight' and 'ema.body.0.weight'",
    ),
    'idle rename': (
        lambda: small(1).state_dict(),
        dict(rename={'nett.': 'body.'}),
        "rename names 'nett.'; no tensor",
    ),
    'empty': (dict, {}, 'copied 0 of 9'),
    'dropped': (lambda: small(1).state_dict(), dict(rename=lambda k: None), 'copied 0 of 9'),
}


@pytest.mark.parametrize('state, kw, text', BAD_LOADS.values(), ids=list(BAD_LOADS))
def test_load_report_refuses_and_touches_nothing(state, kw, text):
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=text):
        load_report(model, state(), **kw)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


GOOD_LOADS = {
    'plain': (lambda s: s, None),
    'data parallel': (lambda s: prefixed(s, 'module.'), {'module.': ''}),
    'function': (lambda s: prefixed(s, 'x'), lambda k: k[1:]),
    'longest prefix': (
        lambda s: {
            k.replace('body.0', 'net.conv').replace('body.1', 'net.bn'): v for k, v in s.items()
        },
        {'net.conv': 'body.0', 'net.bn': 'body.1'},
    ),
    'drops the rest': (lambda s: s | {'loss.w': torch.ones(3)}, {'loss.': None}),
}


@pytest.mark.parametrize('change, rename', GOOD_LOADS.values(), ids=list(GOOD_LOADS))
@pytest.mark.parametrize('device', DEVICES)
def test_load_report_copies(change, rename, device):
    model, source = small().to(device), small(1)
    report = load_report(model, change(source.state_dict()), rename)
    assert (
        report
        and report.share == 1
        and not report.missing
        and not report.extra
        and report.before != report.after
    )
    assert all(torch.equal(v.cpu(), source.state_dict()[k]) for k, v in model.state_dict().items())
    assert (
        report.bytes == sum(v.nbytes for v in source.state_dict().values())
        and len(report.copied) == 9
    )
    assert (
        report.after == load_report(source, source.state_dict()).before
    )  # a checksum of the values, on any device
    assert '9 of 9' in report.says and 'checksum' in repr(report)


def test_load_report_says_what_was_left():
    model, state = (
        small(),
        {
            k: v.half() if v.is_floating_point() else v
            for k, v in small(1).state_dict().items()
            if 'head' not in k
        }
        | {'old': torch.ones(1)},
    )
    report = load_report(model, state, at_least=0.5)
    assert (
        not report
        and report.missing == ['head.weight', 'head.bias']
        and report.extra == ['old']
        and report.cast['body.0.weight'] == 'float16 to float32'
    )
    assert len(report.cast) == 6 and model['body'][0].weight.dtype == torch.float32
    report = load_report(model, small(1, width=8).state_dict(), at_least=0)
    assert report.mismatched['head.weight'] == ((2, 4), (2, 8)) and report.copied == [
        'body.1.num_batches_tracked',
        'head.bias',
    ]
    assert 'there already' in load_report(model, model.state_dict()).says


def test_load_report_knows_tied_weights_and_optimizers():
    tied, w = Tied(), torch.ones(5, 3)
    assert load_report(tied, {'embed.weight': w}).share == 1 and torch.equal(
        tied.head.weight, w
    )  # safetensors keeps one of the two
    model = small()
    held = [id(p) for p in model.parameters()]
    load_report(model, small(1).state_dict())
    assert held == [id(p) for p in model.parameters()] and all(
        p.requires_grad for p in model.parameters()
    )


def test_load_report_bad_input():
    for bad, text in ((small(), 'is a module'), ('weights.pth', 'is str.*safetensors')):
        with pytest.raises(TypeError, match=text):
            load_report(small(), bad)
    with pytest.raises(TypeError, match='model is dict'):
        load_report({}, {})
    with pytest.raises(ValueError, match='at_least is 16'):
        load_report(small(), {}, at_least=16)
    with pytest.raises(ValueError, match='no parameter'):
        load_report(nn.Identity(), {})


@pytest.mark.parametrize(
    'name, spoil',
    [
        ('NaN', lambda t: t * math.nan),
        ('meta', lambda t: t.to('meta')),
        ('complex', lambda t: t.to(torch.complex64)),
        ('sparse', lambda t: t.to_sparse()),
    ],
)
def test_load_report_refuses_values_that_are_none_before_it_copies(name, spoil):
    model, other = (
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
    )
    state, before = dict(other.state_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    state['1.weight'] = spoil(state['1.weight'])
    with pytest.raises(ValueError, match='1.weight'):
        load_report(model, state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_load_report_refuses_an_overflow():
    model = nn.Linear(4, 4).half()
    with pytest.raises(ValueError, match='as torch.float16'):
        load_report(model, {'weight': torch.full((4, 4), 1e6), 'bias': torch.zeros(4)})


def test_load_report_swaps_two_weights_of_one_model():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    a, b = (model[k].weight.detach().clone() for k in (0, 1))
    own = model.state_dict()
    assert (
        load_report(
            model, {'0.weight': own['1.weight'], '1.weight': own['0.weight']}, at_least=0
        ).share
        == 0.75
    )
    assert torch.equal(model[0].weight, b) and torch.equal(model[1].weight, a)
    load_report(model, model.state_dict(), rename=lambda k: {'0': '1', '1': '0'}[k[0]] + k[1:])
    assert torch.equal(model[0].weight, a) and torch.equal(model[1].weight, b)


def test_load_report_counts_shared_memory_once_and_refuses_two_values_for_it():
    tied, w = Tied(), torch.ones(5, 3)
    report = load_report(tied, {'embed.weight': w, 'head.weight': w.clone()})
    assert report and report.bytes == w.nbytes and report.share == 1
    twin = nn.ModuleList(
        [nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False)]
    )
    twin[1].weight = nn.Parameter(twin[0].weight.data)  # another parameter, the same memory
    before = [m.weight.detach().clone() for m in twin]
    with pytest.raises(
        ValueError, match=r"'0.weight' shares its memory in the model with '1.weight'.*other values"
    ):
        load_report(twin, {'0.weight': w, '1.weight': 2 * w, '2.weight': w})
    assert all(torch.equal(m.weight, v) for m, v in zip(twin, before))
    report = load_report(twin, {'0.weight': w, '2.weight': 3 * w})
    assert (
        report
        and report.missing == []
        and report.share == 1
        and report.bytes == 2 * w.nbytes
        and torch.equal(twin[1].weight, w)
    )
    assert load_report(
        twin, {'0.weight': w}, at_least=np.float32(0.5)
    ).share == 0.5 and not load_report(twin, {}, at_least=0)


def test_load_report_wants_a_share_that_is_a_number():
    with pytest.raises(ValueError, match='at_least is nan'):
        load_report(small(), {}, at_least=math.nan)


# published files ----------------------------------------------------------------------------------


def published(path, **more):
    torch.save(dict(model={'blocks.0.w': torch.ones(2, 3)}, **more), path)
    return path


def looked(seen):
    "A look that notes where the tensors were."

    def look(content, path):
        seen.append(content['model']['blocks.0.w'].device.type)
        check_dense(content['model'], path)
        return content['model'], published_arguments(content, path)

    return look


@pytest.mark.parametrize('args', [None, dict(lr=1), argparse.Namespace(lr=1)])
def test_names_and_shapes_are_looked_at_before_values(tmp_path, args):
    seen = []
    state, said = open_published(published(tmp_path / 'a.pth', args=args), looked(seen))
    assert seen == ['meta', 'cpu'] and torch.equal(state['blocks.0.w'], torch.ones(2, 3))
    assert said == ({} if args is None else dict(lr=1))


def test_a_look_that_refuses_sees_no_values(tmp_path):
    seen = []

    def refuses(content, path):
        looked(seen)(content, path)
        raise ValueError('not this one')

    with pytest.raises(ValueError, match='not this one'):
        open_published(published(tmp_path / 'a.pth'), refuses)
    assert seen == ['meta']


def test_an_archive_that_unpacks_to_far_more(tmp_path):
    path = published(tmp_path / 'a.pth')
    with zipfile.ZipFile(tmp_path / 'b.pth', 'w', zipfile.ZIP_DEFLATED) as new:
        new.writestr('zeros', bytes(20 * 2**20))
    for name in ('b.pth', 'nowhere.pth', 'c.pth'):
        (tmp_path / 'c.pth').write_bytes(path.read_bytes()[:-50])
        with pytest.raises((ValueError, FileNotFoundError), match=name):
            open_published(tmp_path / name, looked([]))
    with pytest.raises(ValueError, match='unpacks to 20,971,520'):
        open_published(tmp_path / 'b.pth', looked([]))


@pytest.mark.parametrize(
    'call, says',
    [
        (lambda: check_dense({1: torch.ones(1)}, 'f'), 'f holds 1: Tensor'),
        (lambda: check_dense({'a': 3}, 'f'), "f holds 'a': int; expected names with dense"),
        (lambda: check_dense({'a': torch.ones(2).to_sparse()}, 'f'), "f holds 'a'"),
        (
            lambda: check_dense({'a': torch.ones(1).expand(9)}, 'f'),
            r'a has shape \(9,\), but fewer',
        ),
        (lambda: check_shapes({}, {'a': (2, None)}), r'lacks a; expected a tensor \(2, any\)'),
        (lambda: check_shapes({'a': torch.ones(3)}, {'a': (2,)}), r'a has shape \(3,\); expected'),
        (lambda: check_shapes({'a': torch.ones(3)}, {'a': (3, None)}), 'a has shape'),
        (lambda: count_blocks({}, 'blocks'), r'blocks has the numbers \[\]'),
        (lambda: count_blocks({'b.1.w': 0}, 'b'), r"\['1'\]; expected 0, 1, 2"),
        (lambda: published_arguments(dict(args=[1]), 'f'), 'f: args is list'),
    ],
)
def test_what_published_files_should_not_hold(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_arrays_are_lists_where_that_is_asked_for():
    value = dict(a=np.arange(2), t=torch.ones(1), s=[torch.tensor(2.0)], n=float('nan'))
    out = as_json(value, 'says', finite=False, arrays=True)
    assert out['a'] == [0, 1] and out['t'] == [1.0] and out['s'] == [2.0] and math.isnan(out['n'])
    with pytest.raises(TypeError, match=r"says\['a'\] is set"):
        as_json(dict(a={1}), 'says', arrays=True)


class Masked(nn.Module):
    "A layer with a mask of attention, 0 and minus infinity, which its state holds."

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer('mask', torch.full((3, 3), -math.inf).triu(1))


def test_an_infinity_that_the_model_holds_too_is_loaded():
    state = Masked().state_dict()
    state['weight'] = torch.full((3,), 2.0)
    for dtype in (torch.float32, torch.float16):
        model = Masked()
        assert load_report(model, {k: v.to(dtype) for k, v in state.items()})
        assert model.weight.tolist() == [2, 2, 2] and torch.equal(model.mask, Masked().mask)
    for mask in (-state['mask'], torch.full((3, 3), -math.inf), state['mask'] * math.nan):
        with pytest.raises(ValueError, match="'mask' holds values that are NaN or infinite"):
            load_report(Masked(), dict(state, mask=mask))
    large = state['mask'].double().clamp(min=-1e300)  # finite in the file
    with pytest.raises(ValueError, match='infinite as torch.float32'):
        load_report(Masked(), dict(state, mask=large))
    model = Masked()
    with torch.no_grad():
        model.weight[0] = math.inf
    with pytest.raises(ValueError, match="'weight' holds values that are NaN or infinite"):
        load_report(model, model.state_dict())
