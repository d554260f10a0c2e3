"""A round trip of two wavelet levels against PyWavelets, ptwt and a copy of the tensor.

One thread in processor time, which other programs do not count in; and torch's default threads,
where PyWavelets has one, by the clock.
Goals: PyWavelets in a loop 8, batched 4, ptwt 5 (Haar) and 1 (db2, bior1.3).
The note has the ratio of the best times of each side, too.

Haar with two threads beside two busy processes comes last (goal: 2), as `make` starts it and in the
plain environment. There, every operator ends with threads that wait for each other, the one that
is waited for may not be running, and what is compared is the number of operators."""

import os, statistics, subprocess, sys, time

import numpy as np
import ptwt
import pywt
import torch
from quiet import BUSY, ROOT, SETTINGS
from restore_lib.wavelets import wavedec2, waverec2


def pywt_loop(x, wavelet, mode):
    "Picture by picture, channel by channel, as it is often written."
    return np.stack(
        [
            np.stack([pywt.waverec2(pywt.wavedec2(c, wavelet, mode, 2), wavelet, mode) for c in b])
            for b in x
        ]
    )


def pywt_batched(x, wavelet, mode):
    return pywt.waverec2(pywt.wavedec2(x, wavelet, mode, 2), wavelet, mode)


def with_ptwt(x, wavelet, mode):
    return ptwt.waverec2(ptwt.wavedec2(x, wavelet, level=2, mode=mode), wavelet)


def ours(x, wavelet, mode):
    return waverec2(wavedec2(x, wavelet, 2, mode), wavelet, mode)


def backward(fn, x, *args):
    x = x.detach().requires_grad_()
    fn(x, *args).square().sum().backward()
    return x.grad


def turns(subject, fn, peers, clock, repeats):
    """Rows as `harness.compare` gives them, ours and all peers in turns;
    `peers` maps a name to (function, note)."""
    fns = {'ours': fn, **{k: f for k, (f, _) in peers.items()}}
    for f in fns.values():
        f()
    times = {k: [] for k in fns}
    for n in range(repeats):
        for k in sorted(fns, reverse=n % 2):
            start = clock()
            fns[k]()
            times[k].append(1e3 * (clock() - start))
    for k, (_, note) in peers.items():
        ratios = sorted(p / o for p, o in zip(times[k], times['ours']))
        quarter, best = len(ratios) // 4, min(times[k]) / min(times['ours'])
        yield dict(
            subject=subject,
            peer=k,
            ours_ms=statistics.median(times['ours']),
            peer_ms=statistics.median(times[k]),
            ratio=statistics.median(ratios),
            middle_half=f'{ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f}',
            note=f'best of each {best:.2f}{"; " + note if note else ""}',
        )


def measured(threads, clock):
    shape = (16, 3, 256, 256)
    torch.manual_seed(0)
    x = torch.rand(shape)
    a = x.numpy()
    for wavelet, mode in (
        ('haar', 'symmetric'),
        ('db2', 'symmetric'),
        ('bior1.3', 'symmetric'),
        ('db10', 'symmetric'),
        ('db2', 'periodization'),
    ):
        subject = (
            f'{wavelet}, {mode}, 2 levels and back, {"x".join(map(str, shape))}, '
            f'{threads} thread{"s" * (threads > 1)}'
        )
        here = lambda: ours(x, wavelet, mode)
        apart = lambda f: (f, f'differs by {abs(np.asarray(f()) - here().numpy()).max():.0e}')
        peers = {
            'PyWavelets, loop': apart(lambda: pywt_loop(a, wavelet, mode)),
            'PyWavelets, batched': apart(lambda: pywt_batched(a, wavelet, mode)),
            'a copy of the tensor': (x.clone, ''),
        }
        if mode != 'periodization':
            peers['ptwt'] = apart(lambda: with_ptwt(x, wavelet, mode))  # it has no such mode
        yield from turns(subject, here, peers, clock, 9)
        if mode != 'periodization':
            yield from turns(
                f'{subject}, forward + backward',
                lambda: backward(ours, x, wavelet, mode),
                {'ptwt': (lambda: backward(with_ptwt, x, wavelet, mode), '')},
                clock,
                5,
            )


def haar_times(seconds):
    "Median ms of a Haar round trip by the clock, ours and ptwt in turns, two threads."
    torch.set_num_threads(2)
    x, end = torch.rand(16, 3, 256, 256), time.time() + seconds
    times = [], []
    while time.time() < end or len(times[0]) < 4:
        for fn, took in zip((ours, with_ptwt), times):
            start = time.perf_counter()
            fn(x, 'haar', 'symmetric')
            took.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(t[1:]) for t in times]


def beside(busy, settings):
    "`haar_times` in a process with these settings, beside so many busy ones."
    plain = {k: v for k, v in os.environ.items() if k not in {*SETTINGS, 'OMP_NUM_THREADS'}}
    path = os.pathsep.join([str(ROOT), str(ROOT / 'bench')])
    code = 'import wavelets; print(*wavelets.haar_times(8))'
    others = [subprocess.Popen([sys.executable, '-c', BUSY]) for _ in range(busy)]
    try:
        done = subprocess.run(
            [sys.executable, '-c', code],
            env={**plain, **settings, 'PYTHONPATH': path},
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        for other in others:
            other.kill()
            other.wait()
    return map(float, done.stdout.split())


def busy_rows():
    for busy in (0, 2):
        for settings, name in ((SETTINGS, 'as make starts it'), ({}, 'plain environment')):
            mine, theirs = beside(busy, settings)
            yield dict(
                subject=f'haar, 2 levels and back, 2 threads, {name}, beside {busy} busy processes',
                peer='ptwt',
                ours_ms=mine,
                peer_ms=theirs,
                ratio=theirs / mine,
                middle_half='',
                note='at least 2 asked' if busy and settings else '',
            )


def rows():
    default = torch.get_num_threads()
    try:
        for threads, clock in ((1, time.process_time), (default, time.perf_counter)):
            if (threads, clock) == (1, time.perf_counter):
                continue  # one core: nothing to add
            torch.set_num_threads(threads)
            yield from measured(threads, clock)
    finally:
        torch.set_num_threads(default)
    yield from busy_rows()
