"Loaders whose position can be set: order, workers, and the options of the loader that was given."

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import toy
from restore_lib.loaders import positioned


def test_order_with_a_generator_is_the_seeds():
    "The order of round k is that of a generator seeded with seed + k, as it always was."
    data = TensorDataset(torch.arange(8.0))
    got = [
        b[0].tolist()
        for b, _ in zip(
            positioned(
                DataLoader(data, 4, shuffle=True, generator=torch.Generator()), seed=np.int64(3)
            ),
            range(4),
        )
    ]
    orders = [
        torch.randperm(8, generator=torch.Generator().manual_seed(3 + k)).float().tolist()
        for k in (0, 1)
    ]
    assert [got[0] + got[1], got[2] + got[3]] == orders


def say_hello(worker):
    print('hello', worker)


def test_loader_options_are_kept():
    loader = DataLoader(
        toy.Noisy(),
        4,
        num_workers=1,
        worker_init_fn=say_hello,
        timeout=77,
        persistent_workers=True,
        prefetch_factor=5,
        multiprocessing_context='spawn',
        pin_memory=False,
    )
    stream = positioned(loader)
    for name in (
        'num_workers',
        'worker_init_fn',
        'timeout',
        'persistent_workers',
        'prefetch_factor',
        'collate_fn',
        'pin_memory',
        'pin_memory_device',
    ):
        assert getattr(stream, name) == getattr(loader, name), name
    assert stream.multiprocessing_context.get_start_method() == 'spawn'


def mark(worker):
    torch.utils.data.get_worker_info().dataset.dataset.mark = worker + 5


class Marked(torch.utils.data.Dataset):
    mark = 0

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.tensor(float(self.mark))


def test_worker_init_fn_is_called():
    assert (
        next(iter(positioned(DataLoader(Marked(), 4, num_workers=1, worker_init_fn=mark)))).tolist()
        == [5] * 4
    )


def test_persistent_workers_start_anywhere():
    stream = positioned(
        DataLoader(TensorDataset(torch.arange(16.0)), 4, num_workers=1, persistent_workers=True)
    )
    for start in (0, 2, 1):
        stream.batch_sampler.start = start
        batches = iter(stream)
        assert next(batches)[0].tolist() == [4 * start + k for k in range(4)]


def test_foreign_generators_are_refused():
    class Sampler(torch.utils.data.Sampler):
        generator = np.random.default_rng(0)

        def __len__(self):
            return 8

        def __iter__(self):
            return iter(self.generator.permutation(8).tolist())

    with pytest.raises(TypeError, match='draws from a Generator; expected a torch Generator'):
        positioned(DataLoader(TensorDataset(torch.rand(8)), 4, sampler=Sampler()))


def test_any_batch_can_be_entered_and_processes_share_a_round():
    def stream(**kw):
        return positioned(DataLoader(toy.Noisy(24), 4, shuffle=True), seed=3, **kw)

    whole = [y for (y, _), _ in zip(stream(), range(9))]
    for start in (0, 2, 7):
        later = stream()
        later.batch_sampler.start = start
        assert torch.equal(next(iter(later))[0], whole[start])
    halves = [[y for (y, _), _ in zip(stream(rank=r, world=2), range(3))] for r in (0, 1)]
    assert all(torch.equal(halves[k % 2][k // 2], whole[k]) for k in range(6))


def test_a_sampler_that_takes_its_own_share_is_refused():
    data = TensorDataset(torch.arange(16.0))
    for rank in (0, 1):
        share = torch.utils.data.DistributedSampler(data, num_replicas=2, rank=rank)
        with pytest.raises(TypeError, match='DistributedSampler.*the plain sampler'):
            positioned(DataLoader(data, 2, sampler=share), rank=rank, world=2)
    streams = [positioned(DataLoader(data, 2, shuffle=True), rank=r, world=2) for r in (0, 1)]
    drawn = [[b[0].tolist() for b, _ in zip(stream, range(8))] for stream in streams]
    rounds = [sum(drawn[0][k : k + 4] + drawn[1][k : k + 4], []) for k in (0, 4)]
    assert all(sorted(items) == list(range(16)) for items in rounds) and rounds[0] != rounds[1]


@pytest.mark.parametrize(
    'kw, says',
    [(dict(world=0), 'world is 0'), (dict(rank=1), 'rank is 1'), (dict(seed=0.5), 'seed')],
)
def test_numbers_that_make_no_sense(kw, says):
    with pytest.raises(ValueError, match=says):
        positioned(DataLoader(toy.Noisy(), 4), **kw)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(8))


def test_what_is_wrong_with_a_loader_is_said():
    data = TensorDataset(torch.rand(8))
    own = torch.utils.data.BatchSampler(range(8), 4, drop_last=True)
    for loader, says in (
        (DataLoader(data, batch_sampler=own), r'a batch_sampler of its own \(BatchSampler\)'),
        (DataLoader(data, batch_size=None), 'train has batch_size=None'),
        (DataLoader(Stream(), 2), "train's data set is Stream"),
        ([1, 2], 'train is list'),
    ):
        with pytest.raises(TypeError, match=says):
            positioned(loader)
