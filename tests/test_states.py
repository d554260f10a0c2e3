"Random states and training modes: nested, overlapping in threads, after an error."

import gc
import random
import threading
import weakref
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from restore_lib import states
from restore_lib.states import (
    copies, evaluating, map_tensors, random_kept, random_seeded, seed_all, tensors_in,
)


def three():
    "One number of each generator."
    return torch.rand(1).item(), np.random.rand(), random.random()


def test_evaluating_nests_and_lets_go():
    net = nn.Sequential(
        nn.Dropout(), nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout()).eval(), nn.Dropout()
    )
    modes = [m.training for m in net.modules()]
    outer, part, inner = evaluating(net), evaluating(net[2]), evaluating(net)
    for c in (outer, part, inner):
        c.__enter__()
    outer.__exit__(None, None, None)  # overlapping, not nested, and a part beside the whole
    assert not any(m.training for m in net.modules())
    inner.__exit__(None, None, None)
    assert not net[2].training and net.training
    part.__exit__(None, None, None)
    assert [m.training for m in net.modules()] == modes
    with pytest.raises(KeyError), evaluating(net):
        raise KeyError
    with evaluating(lambda y: y), evaluating(None):
        assert torch.is_grad_enabled()
    assert [m.training for m in net.modules()] == modes and not len(states._evaluated)
    with evaluating(net):
        ref = weakref.ref(net)
    del net, outer, part, inner, c
    gc.collect()
    assert ref() is None


def test_random_kept_nests_and_survives_an_error():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    want = three()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    with pytest.raises(ZeroDivisionError):
        with random_kept():
            with random_kept():
                seed_all(3)
            three()
            raise ZeroDivisionError
    assert three() == want


def test_numpy_seeds_are_seeds():
    def after(*keys):
        seed_all(*keys)
        return three()

    assert after(np.int64(3)) == after(3) == after(torch.tensor(3))
    assert after('a', (np.int32(2), np.float32(0.5))) == after('a', (2, 0.5))
    assert after(3) != after(4) and after(3) != after('3')


def test_overlapping_evaluation_modes():
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout()))
    net.train()
    net[1].eval()
    first, part, second = evaluating(net), evaluating(net[0]), evaluating(net)
    first.__enter__()
    part.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not net.training and not net[0].training
    second.__exit__(None, None, None)
    assert net.training and not net[0].training  # the part is still in use
    part.__exit__(None, None, None)
    assert net[0].training and not net[1].training
    with pytest.raises(ZeroDivisionError):
        with evaluating(net):
            raise ZeroDivisionError
    assert net.training and not net[1].training
    with evaluating(len) as f:
        assert f is len  # a function has no modes


def test_threads_that_overlap_leave_the_random_states():
    "The first in is the first out, and the second has drawn: all is as before both."
    seed_all('before')
    want = three()
    seed_all('before')
    first, second = random_kept(), random_kept()
    inside, leave = threading.Event(), threading.Event()

    def work():
        with second:
            inside.set()
            assert leave.wait(10)
            three()

    thread = threading.Thread(target=work)
    with first:
        three()
        thread.start()
        assert inside.wait(10)
    leave.set()
    thread.join()
    assert three() == want


def test_nested_tensors_keep_their_containers():
    Pair = namedtuple('Pair', 'y x')
    y, x = torch.zeros(2), torch.ones(2, requires_grad=True)
    nested = {'pair': Pair(y, [x]), 'more': (x, 'text', None)}
    out = copies(nested)
    assert type(out['pair']) is Pair and out['more'][1:] == ('text', None)
    found = tensors_in(nested)
    assert all(a is b for a, b in zip(found, (y, x, x), strict=True))
    assert all(map(torch.equal, tensors_in(out), found))
    assert not any(a is b for a, b in zip(tensors_in(out), found, strict=True))
    assert out['more'][0].requires_grad and out['more'][0].is_leaf
    assert tensors_in('text') == [] and map_tensors(torch.neg, 3) == 3


def test_a_key_of_many_numbers_is_refused():
    one, other = torch.arange(2000), torch.arange(2000)
    other[1000] = 0
    assert repr(one) == repr(other)  # so by their texts they would share a stream
    for key in (one, other, np.arange(3), ('a', torch.ones(2)), ['a', torch.ones(2)], one[:0]):
        with pytest.raises(ValueError, match='a key has shape'):
            seed_all(key)
    state = {}
    for key in (3, torch.tensor(3), torch.tensor([3]), np.array([[3]])):
        seed_all('a', key)
        state[str(key)] = torch.rand(1).item()
    assert len(set(state.values())) == 1


def test_random_seeded_takes_keys_as_seed_all_does():
    with random_seeded('a', 1):
        inside = torch.rand(3)
    with random_seeded(('a', 1)):
        pair = torch.rand(3)
    seed_all('a', 1)
    assert torch.equal(inside, torch.rand(3))
    seed_all(('a', 1))
    assert torch.equal(pair, torch.rand(3)) and not torch.equal(pair, inside)
