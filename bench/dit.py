"""One training step of DiT.tiny against timm's blocks of equal width, depth and heads between the
same first and last layers, and against itself with fused attention and without modulation's cost.
One thread."""

import torch
from harness import compare
from timm.models.vision_transformer import Block
from torch import nn
from restore_lib.dit import DiT
from restore_lib.metrics import count_params, human, peak_memory


class Told(nn.Module):
    "A timm block that takes a condition and leaves it alone."

    def __init__(self, dim, heads, fused):
        super().__init__()
        self.block = Block(
            dim,
            heads,
            qkv_bias=True,
            qk_norm=True,
            norm_layer=lambda d, **kw: nn.RMSNorm(d, eps=1e-6),
        )
        self.block.attn.fused_attn = fused

    def forward(self, x, c):
        return self.block(x)


class TimmDiT(DiT):
    "DiT.tiny's patches, positions, time and last layer around timm's blocks."

    def __init__(self, *args, fused=True, **kw):
        super().__init__(*args, **kw)
        self.blocks = nn.ModuleList(
            Told(self.pos.shape[1], b.attn.heads, fused) for b in self.blocks
        )


def step(model, z, t, r):
    def run():
        model.zero_grad(set_to_none=True)
        model(z, t, r).square().mean().backward()

    return run


def stirred(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def networks(patch, n):
    z, t = torch.randn(n, 1, 32, 32), torch.rand(n)
    inputs = z, t, t / 2
    ours, fused = stirred(DiT.tiny(patch=patch)), stirred(DiT.tiny(patch=patch, fused=True))
    peers = {
        'timm blocks': stirred(TimmDiT.tiny(patch=patch)),
        'timm blocks, attention not fused': stirred(TimmDiT.tiny(patch=patch, fused=False)),
        'DiT.tiny, fused=True': fused,
    }
    fused.load_state_dict(ours.state_dict())
    memory = {m: human(peak_memory(step(m, *inputs))) + 'B' for m in (ours, *peers.values())}
    for name, peer in peers.items():
        note = (
            f'{human(count_params(ours))} and {human(count_params(peer))} parameters; '
            f'peak {memory[ours]} and {memory[peer]}'
        )
        yield compare(
            f'DiT.tiny, patch {patch}, forward + backward, batch {n} of 32 x 32',
            step(ours, *inputs),
            name,
            step(peer, *inputs),
            11,
            note,
        )


def rows():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        yield from networks(4, 32)
        yield from networks(2, 8)
    finally:
        torch.set_num_threads(threads)
