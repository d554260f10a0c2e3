"""Lesson 10's restorer: stage two against stage one, blended windows against the same windows
unblended, and a conditional block against a DiT block of timm's parts."""

import torch
from torch import nn
from harness import compare
from restore_lib.dmae import dmae_tiny
from restore_lib.metrics import peak_memory
from restore_lib.image_files import tiled
from restore_lib.two_stage import (
    ConditionalBlock, TwoStageDMAE, first_stage_loss, two_stage_loss,
)
from restore_lib.two_stage_parts import Degradation

DIM, HEADS, COND = 128, 4, 64  # of the block


class DiTBlock(nn.Module):
    """adaLN-Zero (Peebles and Xie 2023) from timm's attention and MLP;
    as ours without a SiLU on the condition and with the exact GELU."""

    def __init__(self, dim, heads, cond):
        super().__init__()
        from timm.layers import Mlp
        from timm.models.vision_transformer import Attention

        self.norm1, self.attn = (
            nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False),
            Attention(dim, heads, qkv_bias=True),
        )
        self.norm2, self.mlp = (
            nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False),
            Mlp(dim, 4 * dim),
        )
        self.film = nn.Linear(cond, 6 * dim)

    def forward(self, x, e):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.film(e).chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def copy_from(ours, peer):
    """The peer's weights into ours: the same names;
    scale stands before shift, and a gate is counted from 1."""
    with torch.no_grad():
        for part in ('attn', 'mlp'):
            getattr(ours, part).load_state_dict(getattr(peer, part).state_dict())
        for mine, theirs in zip(ours.film.parameters(), peer.film.parameters()):
            mine.copy_(theirs.unflatten(0, (6, -1))[[1, 0, 2, 4, 3, 5]].flatten(0, 1))
        ours.film.bias.copy_(
            ours.film.bias.unflatten(0, (6, -1))
            .sub(torch.tensor([0, 0, 1, 0, 0, 1.0])[:, None])
            .flatten()
        )


def stepper(model, loss_of, params=None):
    "A whole training step, written once for both."
    opt = torch.optim.AdamW(
        params or [p for p in model.parameters() if p.requires_grad],
        lr=1e-5,
        betas=(0.9, 0.95),
        weight_decay=0.05,
    )

    def step():
        opt.zero_grad()
        loss_of().backward()
        opt.step()

    return step


def row(subject, ours, peer_name, peer, steps, turns, asked):
    """`steps` calls a turn, then the peak of one call
    (tensors that PyTorch's allocator holds at once)."""
    r = compare(
        subject,
        lambda: [ours() for _ in range(steps)],
        peer_name,
        lambda: [peer() for _ in range(steps)],
        repeats=turns,
    )
    mine, theirs = (peak_memory(f) / 2**20 for f in (ours, peer))
    return dict(
        r,
        ours_ms=r['ours_ms'] / steps,
        peer_ms=r['peer_ms'] / steps,
        note=f'{asked}; peak memory {mine:.1f} MiB, peer {theirs:.1f} MiB',
    )


def stages(b=16):
    "Both stages of one model against the first alone; stage A against a step of the first stage."
    torch.manual_seed(0)
    dmae, x = dmae_tiny().train(), torch.rand(b, 3, 32, 32)
    y, degrade = Degradation('denoise')(x), Degradation('denoise')
    for name, kw in (('one vector', dict(pool=1)), ('a vector for each token', dict(pool=None))):
        model, _ = TwoStageDMAE.from_pretrained(dmae, **kw)
        with torch.no_grad():
            if not torch.allclose(model(y)[0], dmae.pixels(dmae.draw(y)[0]), atol=1e-5):
                raise AssertionError('stage one is not the DMAE')
            yield row(
                f'two stages, forward, {name}, {b} images of 32x32',
                lambda: model(y),
                'the DMAE alone',
                lambda: dmae.pixels(dmae.draw(y)[0]),
                1,
                15,
                'what stage two costs',
            )
        for part in (model.encoder, model.decoder1):
            part.requires_grad_(False)
        yield row(
            f'stage A, training step, {name}',
            stepper(model, lambda: sum(two_stage_loss(model, x, degrade, lam=0.0).values())),
            'a training step of the first stage',
            stepper(dmae, lambda: first_stage_loss(dmae, x, degrade)),
            1,
            9,
            'what stage A costs',
        )


def blended(size=32, overlap=16, side=128):
    """The same windows in the same batches through the same network;
    what is left is cutting, weighing and adding."""
    torch.manual_seed(0)
    net, y = nn.Conv2d(1, 1, 5, padding=2).eval(), torch.rand(1, 1, side, side)
    at = range(0, side - size + 1, size - overlap)
    cut = torch.cat([y[:, :, t : t + size, l : l + size] for t in at for l in at])
    model, _ = TwoStageDMAE.from_pretrained(dmae_tiny(channels=1))
    for name, fn in (('a 5x5 convolution', net), ('two stages', lambda v: model.eval()(v)[1])):
        with torch.no_grad():
            if name != 'two stages' and not torch.allclose(
                tiled(fn, y, size, overlap), fn(y), atol=1e-5
            ):
                raise AssertionError('there are seams')
            yield row(
                f'windows, {name}, {side}x{side} in {len(cut)} of {size}x{size}',
                lambda: tiled(fn, y, size, overlap, batch=64),
                'the same windows as plain batches',
                lambda: [fn(part) for part in cut.split(64)],
                1,
                11,
                'what blending costs',
            )


def block(b=16, n=65):
    """Equal sizes, equal weights: the same output and the same gradient of the condition first,
    then forward and backward."""
    torch.manual_seed(0)
    peer, ours = DiTBlock(DIM, HEADS, COND), ConditionalBlock(DIM, HEADS, COND, 'branches')
    copy_from(ours, peer)
    x, e = torch.randn(b, n, DIM), torch.randn(b, 1, COND, requires_grad=True)
    found = []
    for net in (ours, peer):
        e.grad = None
        out = net(x, e)
        (out * x).sum().backward()
        found.append((out.detach(), e.grad))
    for name, a, p in zip(('outputs', 'gradients'), *found):
        if not torch.allclose(a, p, rtol=1e-3, atol=1e-3):
            raise AssertionError(f'the {name} differ by {(a - p).abs().max().item():.2g}')

    def step(net):
        for p in net.parameters():
            p.grad = None
        (net(x, e) * x).sum().backward()

    yield row(
        f"ConditionalBlock('branches'), forward and backward, {b} x {n} x {DIM}",
        lambda: step(ours),
        'DiT block of timm parts',
        lambda: step(peer),
        1,
        25,
        'equal work',
    )


def rows():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield from stages()
        yield from blended()
        try:
            yield from block()
        except ImportError:
            yield dict(
                subject="ConditionalBlock('branches')",
                peer='DiT block of timm parts',
                ours_ms=float('nan'),
                peer_ms=float('nan'),
                ratio=float('nan'),
                middle_half='-',
                note='NOT MEASURED: timm is not installed (pip install -c constraints.txt timm)',
            )
    finally:
        torch.set_num_threads(threads)
