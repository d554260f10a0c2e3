"""A small training that the tests share.

It also runs by itself, under `accelerate launch` too: `python toy.py FILE PROCESSES`."""

import json, os, sys

import torch
from torch import nn

from restore_lib.learner import EMA, Callback, Learner, Metrics, warmup_cosine

torch.set_num_threads(1)


class Stop(Callback):
    "Ends the fit by an error behind a step, as Ctrl-C does."

    def __init__(self, at):
        self.at = at

    def after_step(self, learn):
        if learn.step == self.at:
            raise KeyboardInterrupt


class Noisy(torch.utils.data.Dataset):
    "Lines of points with random noise: items draw from the global random state."

    def __init__(self, n=96):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        x = torch.linspace(-1, 1, 8) + i / self.n
        return x + 0.1 * torch.randn(8), x.sin()


def loss_fn(model, batch):
    y, x = batch
    return (model(y + 0.01 * torch.randn_like(y)) - x).square().mean()


def plain_loss(model, batch):
    "Without a random part of its own, so that it does not depend on the number of processes."
    return (model(batch[0]) - batch[1]).square().mean()


def net():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 8))


def learner(loss=loss_fn, batch=8, workers=0, model=None, **kw):
    train = torch.utils.data.DataLoader(Noisy(), batch, shuffle=True, num_workers=workers)
    valid = [(torch.linspace(-1, 1, 8)[None], torch.linspace(-1, 1, 8)[None].sin())]
    kw = (
        dict(
            opt=lambda p: torch.optim.AdamW(p, lr=1e-2),
            sched=warmup_cosine(0.1),
            clip=1.0,
            cpu=True,
            cbs=[EMA(0.9)],
        )
        | kw
    )
    return Learner(model or net(), loss, train, valid, **kw)


def train(folder, steps=200, save_every=10, delay=0.0):
    "Trains to `steps`, going on from the newest checkpoint below `folder` if there is one."
    import time
    from pathlib import Path

    class Slow(Callback):  # leaves time to be killed in
        def after_step(self, learn):
            time.sleep(delay)

    learn = learner(cbs=[EMA(0.9), Slow()], accumulate=2)
    if any(Path(folder).glob('step_?????????')):
        learn.load(folder)
    return learn.fit(steps, valid_every=20, folder=folder, save_every=save_every)


if __name__ == '__main__':  # accelerate launch: the loss curve of plain_loss, effective batch 8
    out, processes = sys.argv[1], int(sys.argv[2])
    model = net()
    model[2].p = 0.0
    learn = learner(
        plain_loss,
        batch=8 // processes,
        model=model,
        cbs=[Metrics(error=lambda m, b: (m(b[0]) - b[1]).abs().mean(1))],
    ).fit(30)
    if learn.acc.is_main_process:
        open(out, 'w').write(
            json.dumps(dict(history=learn.history, processes=learn.acc.num_processes))
        )
    learn.acc.wait_for_everyone()
    sys.stdout.flush()
    # everything is written; gloo's threads now and then abort a process that is being taken down
    os._exit(0)
