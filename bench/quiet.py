"""A pretraining step of mae_tiny as make starts it, on a quiet machine and beside one busy process,
against the plain environment."""

import os, re, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = dict(re.findall(r'^export (\w+) \?= (\S+)$', (ROOT / 'Makefile').read_text(), re.M))
BUSY = 'while True: pass'
STEPS = '''
import statistics, sys, time, torch
from restore_lib.mae import mae_tiny
torch.manual_seed(0)
model, x = mae_tiny(32, 4), torch.rand(64, 3, 32, 32)
opt = torch.optim.AdamW(model.parameters(), 1e-3)
times, start = [], time.time()
while time.time() - start < float(sys.argv[1]):
    t0 = time.perf_counter()
    opt.zero_grad()
    model(x)[0].backward()
    opt.step()
    times.append(time.perf_counter() - t0)
print(statistics.mean(times[5:]))
'''


def seconds(settings, busy, budget=6):
    "Mean seconds of a step in a process of its own."
    plain = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    other = subprocess.Popen([sys.executable, '-c', BUSY]) if busy else None
    try:
        out = subprocess.run(
            [sys.executable, '-c', STEPS, str(budget)],
            env={**plain, **settings, 'PYTHONPATH': str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    finally:
        if other:
            other.kill()
            other.wait()
    return float(out)


def rows():
    turns = [
        (seconds({}, False), seconds(SETTINGS, False), seconds({}, True), seconds(SETTINGS, True))
        for _ in range(3)
    ]
    quiet, quiet_made, beside, beside_made = zip(*turns)
    yield row(
        'mae_tiny step as make starts it, quiet',
        'plain environment, quiet',
        quiet_made,
        quiet,
        'at least 0.91 asked',
    )
    yield row(
        'mae_tiny step as make starts it, beside a busy process',
        'plain environment, quiet',
        beside_made,
        quiet,
        'at least 0.45 asked',
    )
    yield row(
        'mae_tiny step as make starts it, beside a busy process',
        'plain environment, beside it, too',
        beside_made,
        beside,
        '',
    )


def row(subject, peer, ours, theirs, note):
    "The row of `harness.compare`, from times that were taken in turns in processes of their own."
    ratios = sorted(p / o for o, p in zip(ours, theirs))
    middle = len(ratios) // 2
    return dict(
        subject=subject,
        peer=peer,
        ours_ms=1e3 * sorted(ours)[middle],
        peer_ms=1e3 * sorted(theirs)[middle],
        ratio=ratios[middle],
        middle_half=f'{ratios[0]:.2f} to {ratios[-1]:.2f} (all)',
        note=note,
    )
