"""The tiny Swin UNet, forward and backward: memory formats, compilation, checkpointing;
its window attention against torchvision's and against SDPA. One thread."""

import copy
import shutil

import torch
import torch.nn.functional as F
from harness import compare
from torchvision.models.swin_transformer import ShiftedWindowAttention
from restore_lib.unet import SwinUNet, WindowAttention, from_windows, to_windows


class Fused(WindowAttention):
    "The same with scaled_dot_product_attention."

    def forward(self, x):
        hw, shift = tuple(x.shape[1:3]), self.shifts(x.shape[1:3])
        if any(shift):
            x = x.roll([-s for s in shift], (1, 2))
        x = to_windows(x, self.window)
        b, m, n, d = x.shape
        q, k, v = (
            self.qkv(x)
            .reshape(b * m, n, 3, self.heads, d // self.heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        bias = self.scores_bias(hw).expand(m, -1, -1, -1).repeat(b, 1, 1, 1)
        x = (
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            .transpose(1, 2)
            .reshape(b, m, n, d)
        )
        x = from_windows(self.proj(x), self.window, hw)
        return x.roll(shift, (1, 2)) if any(shift) else x


def steps(model, *inputs):
    def step():
        model.zero_grad(set_to_none=True)
        model(*inputs).square().mean().backward()

    return step


def forward(model, *inputs):
    @torch.no_grad()
    def run():
        return model(*inputs)

    return run


def apart(a, b):
    return f'differs by {(a - b).abs().max():.0e}'


def stirred(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def networks():
    z, t, y = torch.randn(16, 16, 16, 16), torch.randint(0, 15, (16,)), torch.randn(16, 16, 16, 16)
    plain = stirred(SwinUNet.tiny(32, 16, skip=True))
    want, subject = (
        plain(z, t, y).detach(),
        'SwinUNet.tiny(32, 16), batch 16 of 16 x 16, forward + backward',
    )
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    z_last, y_last = (v.contiguous(memory_format=torch.channels_last) for v in (z, y))
    yield compare(
        subject + ', channels_last',
        steps(last, z_last, t, y_last),
        'plain',
        steps(plain, z, t, y),
        11,
        apart(last(z_last, t, y_last).detach(), want),
    )
    saving = stirred(SwinUNet.tiny(32, 16, skip=True, checkpoint=True))
    saving.load_state_dict(plain.state_dict())
    yield compare(
        subject + ', checkpoint=True',
        steps(saving, z, t, y),
        'plain',
        steps(plain, z, t, y),
        9,
        apart(saving(z, t, y).detach(), want),
    )
    without = stirred(SwinUNet.tiny(32, 16, skip=True, swin_depth=0))
    yield compare(
        subject + ', without attention',
        steps(without, z, t, y),
        'with attention',
        steps(plain, z, t, y),
        9,
    )
    if not (shutil.which('g++') or shutil.which('clang++')):
        yield dict(
            subject=subject + ', torch.compile',
            peer='plain',
            ours_ms=float('nan'),
            peer_ms=float('nan'),
            ratio=float('nan'),
            middle_half='',
            note='skipped: no C++ compiler',
        )
        return
    try:
        quick = torch.compile(copy.deepcopy(plain))
        note = apart(quick(z, t, y).detach(), want)
        yield compare(
            subject + ', torch.compile',
            steps(quick, z, t, y),
            'plain',
            steps(plain, z, t, y),
            11,
            note,
        )
    except Exception as error:  # a compiler without headers, an operator without a lowering
        yield dict(
            subject=subject + ', torch.compile',
            peer='plain',
            ours_ms=float('nan'),
            peer_ms=float('nan'),
            ratio=float('nan'),
            middle_half='',
            note=f'skipped: {type(error).__name__}',
        )


def attentions():
    for b, side, dim, heads, window in ((16, 16, 64, 4, 8), (1, 64, 192, 6, 8)):
        ours, peer, fused = (
            stirred(WindowAttention(dim, heads, window, window // 2)),
            ShiftedWindowAttention(dim, [window] * 2, [window // 2] * 2, heads),
            Fused(dim, heads, window, window // 2),
        )
        state = ours.state_dict()
        fused.load_state_dict(state)
        peer.load_state_dict(
            {'relative_position_bias_table' if k == 'bias' else k: v for k, v in state.items()},
            strict=False,
        )
        x = torch.randn(b, side, side, dim)
        subject = f'WindowAttention, shifted, {b} x {side} x {side} x {dim}, window {window}'
        for name, how in (('forward', forward), ('forward + backward', steps)):
            want = ours(x).detach()
            yield compare(
                f'{subject}, {name}',
                how(ours, x),
                'torchvision',
                how(peer, x),
                15,
                apart(peer(x).detach(), want),
            )
            yield compare(
                f'{subject}, {name}',
                how(ours, x),
                'with SDPA',
                how(fused, x),
                15,
                apart(fused(x).detach(), want),
            )


def rows():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        yield from networks()
        yield from attentions()
    finally:
        torch.set_num_threads(threads)
