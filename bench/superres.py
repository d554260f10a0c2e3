"""Lesson 15's superresolution with each codec, and the plain regression, against the packet of all
bands with the same network: sampling of one picture, and a training step. One thread."""

import torch
from harness import compare
from restore_lib.codecs import CODECS
from restore_lib.superres import make_sr
from restore_lib.superres_training import SRConfig, SRLoss

SIDE, CROP, BATCH = 64, 64, 16  # of the small picture; of a clean crop in training


def models():
    "Name -> model, the packet first; nothing is trained, which costs no time and saves none."
    named = {
        'packet': {},
        **{name: {} for name in CODECS},
        'packet, regression': dict(process=None),
    }
    return {
        name: make_sr(SRConfig(codec=name.split(',')[0], crop=CROP, batch=BATCH, **kw))
        for name, kw in named.items()
    }


def sampler(model, steps):
    y = torch.rand(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))

    def sample():
        with torch.no_grad():
            return model.eval()(y, steps=steps)

    if sample().shape != (1, 1, 4 * SIDE, 4 * SIDE):
        raise AssertionError('the picture has another size')
    return sample


def stepper(model):
    "A whole training step, as sr_learner's."
    g = torch.Generator().manual_seed(0)
    batch, loss = (
        (
            torch.rand(BATCH, 1, CROP // 4, CROP // 4, generator=g),
            torch.rand(BATCH, 1, CROP, CROP, generator=g),
        ),
        SRLoss(),
    )
    opt = torch.optim.AdamW(model.net.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0)

    def step():
        model.train()
        opt.zero_grad()
        loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.net.parameters(), 1.0)
        opt.step()

    return step


def measured():
    made = models()
    thousands = lambda part: f'{sum(p.numel() for p in part.parameters()) / 1e3:.0f} k'
    note = lambda model: (
        f'latent {model.codec.latent_channels} channels, '
        f'network {thousands(model.net)} parameters, codec {thousands(model.codec)}'
    )
    for steps in (1, 15):
        packet = sampler(made['packet'], steps)
        for name, model in made.items():
            if name == 'packet' or steps > 1 and model.process is None:
                continue
            yield compare(
                f'{name}, {steps} step{"s" * (steps > 1)}, {SIDE}x{SIDE} to {4 * SIDE}x{4 * SIDE}',
                sampler(model, steps),
                'packet',
                packet,
                15 if steps == 1 else 5,
                note(model),
            )
    packet = stepper(made['packet'])
    for name, model in made.items():
        if name != 'packet':
            yield compare(
                f'{name}, training step, {BATCH} crops of {CROP}x{CROP}',
                stepper(model),
                'packet',
                packet,
                9,
                note(model),
            )


def rows():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from measured()
    finally:
        torch.set_num_threads(threads)
