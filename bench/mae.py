"""A pretraining step of MAE (forward, backward, AdamW) against transformers' ViTMAEForPreTraining,
from the same weights, with one thread and with two; asked: a ratio of at least 1.1, and a peak of
memory that is at most the peer's.

On a busy machine read the one-thread rows and the ratio of work (processor time): a single turn of
two threads says little. Beside some ten other processes, at nice 5 and with make's settings, the
tiny step had 1.12 by the clock and 1.09 in work with one thread, 1.10 and 1.11 with two, but single
turns of two threads from 0.87 to 1.11. Threads are the reason, not allocation: in a step two
threads wait for each other about 1,000 times (voluntary switches: ours 1,025, the peer 1,125), and
where another process has the core, a wait lasts a slice of the scheduler, whosever turn it is.
Without GOMP_SPINCOUNT they also spin while they wait; bench/quiet.py measures what that costs. Page
faults are fewer on our side: with glibc's defaults 1,113 a step, the peer 1,543; with make's none
on either side in one thread."""

from importlib.util import find_spec

import torch
from harness import compare
from restore_lib.mae import MAE
from restore_lib.metrics import peak_memory

THREADS = 1, 2
SIZES = {
    'tiny, 64 images of 32x32': (
        64,
        2,
        dict(img_size=32, patch=4, dim=128, depth=4, heads=4, dec_dim=64, dec_depth=2, dec_heads=4),
    ),
    'medium, 16 images of 112x112': (
        16,
        1,
        dict(
            img_size=112, patch=16, dim=384, depth=6, heads=6, dec_dim=256, dec_depth=4, dec_heads=8
        ),
    ),
}


def peer_of(img_size, patch, dim, depth, heads, dec_dim, dec_depth, dec_heads):
    "transformers' model of these sizes; its attention is scaled_dot_product_attention too."
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    return ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=img_size,
            patch_size=patch,
            hidden_size=dim,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * dim,
            decoder_hidden_size=dec_dim,
            decoder_num_hidden_layers=dec_depth,
            decoder_num_attention_heads=dec_heads,
            decoder_intermediate_size=4 * dec_dim,
            mask_ratio=0.75,
            layer_norm_eps=1e-6,
            attn_implementation='sdpa',
        )
    )


def copy_from(ours, peer):
    """The peer's weights into ours: three linear layers for queries, keys and values become one,
    the convolution a linear layer."""
    state = {}
    for k, v in peer.state_dict().items():
        for old, new in (
            ('vit.embeddings.position_embeddings', 'encoder.pos_embed'),
            ('vit.embeddings.patch_embeddings.projection', 'encoder.patch_embed'),
            ('vit.embeddings.', 'encoder.'),
            ('vit.layers', 'encoder.blocks'),
            ('vit.layernorm', 'encoder.norm'),
            ('decoder.decoder_layers', 'decoder_blocks'),
            ('decoder.', ''),
            ('layernorm_before', 'norm1'),
            ('layernorm_after', 'norm2'),
            ('attention.o_proj', 'attn.proj'),
            ('attention.', 'attn.'),
        ):
            if old in k:
                k = k.replace(old, new, 1)
        state[k] = v.permute(0, 2, 3, 1).flatten(1) if v.ndim == 4 else v
    for k in [k for k in state if '.q_proj.' in k]:
        state[k.replace('q_proj', 'qkv')] = torch.cat(
            [state.pop(k.replace('q_proj', f'{i}_proj')) for i in 'qkv']
        )
    kept = {
        k: v for k, v in ours.state_dict().items() if k in ('mean', 'std', '_extra_state')
    }  # which the peer does not have
    ours.load_state_dict(state | kept)


def stepper(model, loss_of):
    "A whole step, written once for both."
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05)

    def step():
        opt.zero_grad()
        loss_of().backward()
        opt.step()

    return step


def rows():
    if find_spec('transformers') is None:
        yield dict(
            subject='MAE, pretraining step',
            peer='transformers',
            ours_ms=float('nan'),
            peer_ms=float('nan'),
            ratio=float('nan'),
            middle_half='-',
            note='NOT MEASURED: transformers is not installed '
            '(pip install -c constraints.txt transformers)',
        )
        return
    before = torch.get_num_threads()
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            for name, (b, steps, sizes) in SIZES.items():
                yield row(f'{name}, {threads} thread{"s"[: threads - 1]}', b, steps, sizes)
    finally:
        torch.set_num_threads(before)


def row(name, b, steps, sizes):
    """One size and number of threads: same losses first, then `steps` steps a turn, then the peak
    of one step (tensors that PyTorch's allocator holds at once)."""
    torch.manual_seed(0)
    peer, ours = peer_of(**sizes).train(), MAE(**sizes).train()
    copy_from(ours, peer)
    x = torch.rand(b, 3, sizes['img_size'], sizes['img_size'])
    inside, n = (
        (x - 0.5) / 0.5,
        (sizes['img_size'] // sizes['patch']) ** 2,
    )  # the peer is given normalised images; ours normalises in its step
    seeded = lambda: torch.Generator().manual_seed(1)
    a, p = (
        ours(x, generator=seeded())[0].item(),
        peer(inside, noise=torch.rand(b, n, generator=seeded())).loss.item(),
    )
    if not abs(a - p) < 1e-4 * p:
        raise AssertionError(f'the losses differ: {a} and {p}')
    one, other = (
        stepper(ours, lambda: ours(x, whole=False)[0]),
        stepper(peer, lambda: peer(inside).loss),
    )
    r = compare(
        f'MAE step, {name}',
        lambda: [one() for _ in range(steps)],
        'transformers ViTMAEForPreTraining',
        lambda: [other() for _ in range(steps)],
        repeats=25,
    )
    mine, theirs = (peak_memory(f) / 2**20 for f in (one, other))
    memory = f'peak memory {mine:.1f} MiB, peer {theirs:.1f} MiB'
    return dict(
        r,
        ours_ms=r['ours_ms'] / steps,
        peer_ms=r['peer_ms'] / steps,
        note=f'at least 1.1 asked; work {r["work"]:.2f}; {memory}, at most equal asked',
    )
