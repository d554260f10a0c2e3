"""What decides a run and what does not: pairs of values that differ in one thing, in this process
and in another."""

import os, random, re, subprocess, sys, warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import toy
from restore_lib import fingerprints
from restore_lib.fingerprints import digest, files_digest, fingerprint
from restore_lib.learner import EMA, LiveCurve, Progress, warmup_cosine

HERE = Path(__file__).parent


class Degrade:
    "A callable with a setting."

    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return x * self.by

    def bound(self, x):
        return x * self.by


def outside(code='g', name='user', **found):
    "A function of a module of the user's that reads `found` from outside."
    space = dict(found, __name__=name)
    exec(f'def f(m, b): return {code}', space)
    return space['f']


def closed(v):
    return lambda m, b: v


def twice(v):
    return closed(closed(v))


def default(v):
    def f(m, b, k=v):
        return k

    return f


def only_named(v):
    def f(m, b, *, k=v):
        return k

    return f


def two_lambdas(k):
    return [lambda m, b: m(b), lambda m, b: m(-b)][k]  # of one line of source


def own_class(k):
    class Net(nn.Module):
        if k:
            forward = lambda self, x: x
        else:
            forward = lambda self, x: -x

    return Net()


def module(v, buffer=1.0, persistent=True, weight=0.0, trains=True):
    m = nn.Linear(2, 2)
    m.weight.data.fill_(weight)
    m.bias.data.zero_()
    m.weight.requires_grad_(trains)
    m.v = v
    m.register_buffer('b', torch.full((2,), buffer), persistent=persistent)
    return m


def tied(yes):
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    for p in (*a.parameters(), *b.parameters()):
        p.data.zero_()
    if yes:
        b.weight = a.weight
    return nn.Sequential(a, b)


def ring(v):
    held = dict(v=v)
    held['me'] = [held]
    return held


def hooked(v):
    m = module(1)
    m.register_forward_pre_hook(closed(v))
    return m


@dataclass
class Setting:
    a: object
    b: int = 2


def generator(seed):
    return torch.Generator().manual_seed(seed)


def loader(v=0.0, batch=2, **kw):
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.full((4, 2), v)), batch, **kw
    )


PAIRS = dict(
    closure=(closed, 1.0, 2.0),
    nested_closure=(twice, 1.0, 2.0),
    default=(default, 1, 2),
    keyword_default=(only_named, 1, 2),
    lambdas=(two_lambdas, 0, 1),
    object=(Degrade, 1.0, 2.0),
    method=(lambda v: Degrade(v).bound, 1.0, 2.0),
    partial=(lambda v: partial(closed, v), 1.0, 2.0),
    partial_object=(lambda v: partial(closed, Degrade(v)), 1.0, 2.0),
    other_function=(lambda v: v, closed, default),
    captured_tensor=(lambda v: closed(torch.full((3,), v)), 1.0, 2.0),
    captured_array=(lambda v: closed(np.full(3, v)), 1.0, 2.0),
    captured_set=(lambda v: closed({'a', 'b', v}), 'c', 'd'),
    a_global=(lambda v: outside(g=v), 1.0, 2.0),
    global_array=(lambda v: outside(g=np.full(3, v)), 1, 2),
    global_function=(lambda v: outside('g(b)', g=v), closed, default),
    global_object=(lambda v: outside('g(b)', g=Degrade(v)), 1.0, 2.0),
    global_chain=(lambda v: outside('g(b)', g=outside('h', h=v)), 1.0, 2.0),
    nested_code=(lambda v: outside('[g for _ in b]', g=v), 1, 2),
    attribute_only=(lambda v: outside('b.g', g=1) if v else outside('b.h', g=1), 0, 1),
    forward=(own_class, 0, 1),
    attribute=(module, 1, 2),
    buffer=(lambda v: module(1, buffer=v), 1.0, 2.0),
    hidden_buffer=(lambda v: module(1, buffer=v, persistent=False), 1.0, 2.0),
    persistent=(lambda v: module(1, persistent=v), True, False),
    weights=(lambda v: module(1, weight=v), 0.0, 1.0),
    frozen=(lambda v: module(1, trains=v), True, False),
    tied=(tied, True, False),
    hook=(hooked, 1, 2),
    dataclass=(Setting, 1, 2),
    captured_module=(lambda v: closed(module(v)), 1, 2),
    ring=(ring, 1, 2),
    generator=(generator, 1, 2),
    python_random=(random.Random, 1, 2),
    numpy_generator=(np.random.default_rng, 1, 2),
    range=(range, 3, 4),
    path=(Path, 'a', 'b'),
    dtype=(lambda v: v, torch.float32, torch.float64),
    device=(torch.device, 'cpu', 'meta'),
    kinds=(lambda v: v, 1, 1.0),
    truth=(lambda v: v, True, 1),
    text=(lambda v: v, 'a', b'a'),
    shape=(torch.zeros, (2, 3), (3, 2)),
    tuple=(lambda v: v, [1], (1,)),
    bfloat=(lambda v: torch.full((2,), v, dtype=torch.bfloat16), 1.0, 2.0),
    optimizer=(lambda v: torch.optim.SGD(module(1).parameters(), lr=0.1, momentum=v), 0.0, 0.9),
    optimizer_kind=(lambda v: v(module(1).parameters(), lr=0.1), torch.optim.SGD, torch.optim.Adam),
    data=(loader, 0.0, 1.0),
    batch=(lambda v: loader(batch=v), 1, 2),
    shuffle=(lambda v: loader(shuffle=v), True, False),
    drop_last=(lambda v: loader(drop_last=v), True, False),
    collate=(lambda v: loader(collate_fn=closed(v)), 1, 2),
    subset=(lambda v: torch.utils.data.Subset([1, 2, 3], v), [0, 1], [0, 2]),
    keys=(lambda v: {v: 1}, 'a', 'b'),
    pattern=(re.compile, 'a', 'b'),
    rows=(lambda v: [('x', v), ('y', 2)], 1, 3),
    deep=(lambda v: [[[[v]]]], 1, 3),
    ufunc=(lambda v: v, np.add, np.subtract),
    library=(lambda v: v, torch.relu, torch.tanh),
    classes=(lambda v: type('K', (), dict(v=v)), 1, 2),
    schedule=(warmup_cosine, 0.1, 0.2),
)


@pytest.mark.parametrize('make, a, b', PAIRS.values(), ids=PAIRS)
def test_a_fingerprint_sees(make, a, b):
    """Made anew with the same value it is the same, with another it is another;
    nothing is left unseen, nothing is drawn."""
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    made = [make(v) for v in (a, a, b)]
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        one, again, other = map(fingerprint, made)
    assert one == again != other and fingerprint(made[0]) == one
    assert torch.equal(before[0], torch.get_rng_state()) and before[1:] == (
        np.random.get_state()[1].tolist(),
        random.getstate(),
    )


def test_a_fingerprint_does_not_see_order_workers_and_showing():
    for a, b in (
        ({'a': 1, 'b': 2}, {'b': 2, 'a': 1}),
        ({'x', 'y', 3}, {3, 'y', 'x'}),
        (np.int64(3), 3),
        ([np.float64(0.5)], [0.5]),
        ([(np.int64(1), 'a')], [(1, 'a')]),
        (loader(num_workers=2), loader(pin_memory=False)),
        (toy.learner(), toy.learner(workers=2)),
        (toy.learner(), toy.learner(cbs=[Progress(), EMA(0.9), LiveCurve()])),
    ):
        assert fingerprint(a) == fingerprint(b)


def test_what_a_fingerprint_cannot_see_is_named():
    pool = (k for k in range(3))  # a generator: nobody can look into it
    with pytest.warns(UserWarning, match=r'global `device_pool` of .*\(a builtins.generator\)'):
        fingerprint(outside('device_pool', device_pool=pool), 'loss_fn')
    with pytest.warns(UserWarning, match='`v` that loss_fn captures'):
        fingerprint(closed(pool), 'loss_fn')
    with pytest.warns(UserWarning, match=r'module `toy` that .* imports'):
        fingerprint(_imports, 'loss_fn')


def _imports(m, b):
    import toy

    return toy.net()


def test_a_fingerprint_follows_imports_and_modules():
    def reads(m, b):
        return toy.net()  # a module of the user's: followed to what is read from it

    def imports(m, b):
        from toy import net

        return net()

    before = [fingerprint(f) for f in (reads, imports)]
    real, toy.net = toy.net, closed(1)
    try:
        after = [fingerprint(f) for f in (reads, imports)]
    finally:
        toy.net = real
    assert all(a != b for a, b in zip(before, after)) and before == [
        fingerprint(f) for f in (reads, imports)
    ]


def test_files_behind_paths_and_their_digest(tmp_path):
    (tmp_path / 'a').write_bytes(b'one')
    (tmp_path / 'b').write_bytes(b'two')
    before = files_digest(tmp_path), fingerprint([tmp_path / 'a'])
    stat = os.stat(tmp_path / 'a')
    (tmp_path / 'a').write_bytes(b'eno')
    os.utime(tmp_path / 'a', ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert files_digest(tmp_path) != before[0] and fingerprint([tmp_path / 'a']) != before[1]
    files = [tmp_path / 'a', tmp_path / 'b']
    assert files_digest(files) == files_digest(map(str, files[::-1])) != files_digest(files[0])
    (tmp_path / 'b').rename(tmp_path / 'c')
    assert files_digest(tmp_path) not in (
        before[0],
        files_digest([tmp_path / 'a', tmp_path / 'c', tmp_path / 'a']),
    )
    with pytest.raises(FileNotFoundError):
        files_digest(tmp_path / 'gone')
    with pytest.raises(FileNotFoundError, match='holds no file'):
        files_digest([])


def test_another_process_has_the_same_fingerprint():
    run = (
        'import toy; from restore_lib.fingerprints import fingerprint; '
        'print(fingerprint(toy.learner(), "learn"), '
        'fingerprint(({"a", "b", "c"}, frozenset("xyz"), toy.learner)))'
    )
    out = subprocess.run(
        [sys.executable, '-c', run],
        capture_output=True,
        text=True,
        cwd=HERE,
        env=dict(
            os.environ, PYTHONHASHSEED='321', PYTHONPATH=str(Path(fingerprints.__file__).parents[1])
        ),
    )
    assert out.stdout.split() == [
        fingerprint(toy.learner(), 'learn'),
        fingerprint(({'a', 'b', 'c'}, frozenset('xyz'), toy.learner)),
    ], out.stderr


@pytest.mark.parametrize('library', ['skimage', 'matplotlib', 'accelerate', 'IPython'])
def test_a_library_counts_by_its_version_whether_it_was_imported_or_not(library):
    tell = (
        'import sys; from restore_lib.fingerprints import _library; '
        'before = {0!r} in sys.modules; print(_library({0!r})); '
        'import {0}; _library.cache_clear(); print(_library({0!r})); assert not before'
    ).format(library)
    place = dict(os.environ, PYTHONPATH=str(Path(fingerprints.__file__).parents[1]))
    out = subprocess.run(
        [sys.executable, '-c', tell], capture_output=True, text=True, cwd=HERE, env=place
    )
    one, other = out.stdout.splitlines()
    assert not out.returncode, out.stderr
    assert one == other and re.fullmatch(rf'{library} [0-9]+\.[0-9.]+', one), out.stdout


def test_what_a_class_says_itself():
    class Task:
        def __init__(self, seed, shown=0, bar=None):
            self.seed, self.shown, self.bar = seed, shown, bar

        def decides(self):
            return dict(seed=self.seed)

    class Bar:
        decides_nothing = True

        def __init__(self, width):
            self.width = width

    assert fingerprint(Task(1)) == fingerprint(Task(1, shown=5)) != fingerprint(Task(2))
    assert fingerprint([Bar(1)]) == fingerprint([Bar(2)])


def test_digests_of_plain_data():
    assert digest(dict(a=(1, 2), b=np.float64(0.5))) == digest(dict(b=0.5, a=[1, 2]))
    assert digest(dict(a=1)) != digest(dict(a=2)) and len(digest({})) == 8
    with pytest.raises(TypeError, match=r"value\['a'\] is set"):
        digest(dict(a={1}))


def test_what_was_imported_before_does_not_matter(monkeypatch):
    "A library has the version that is installed, not that of the module if it is there."

    def saves(m, b):
        from PIL import Image

        return Image

    import PIL

    assert PIL.__version__ in fingerprints._library('PIL')
    before = fingerprint(saves)
    fingerprints._library.cache_clear()
    monkeypatch.delitem(sys.modules, 'PIL')
    assert fingerprint(saves) == before
    fingerprints._library.cache_clear()


def test_the_order_of_an_ordered_dict_counts_and_that_of_a_dict_does_not():
    from collections import OrderedDict

    terms = [('blur', closed(1)), ('noise', closed(2))]
    one, other = terms, terms[::-1]
    assert fingerprint(dict(one)) == fingerprint(dict(other))
    assert fingerprint(OrderedDict(one)) != fingerprint(OrderedDict(other))
    assert fingerprint(OrderedDict(one)) == fingerprint(OrderedDict(one)) != fingerprint(dict(one))
