"""A step of the codebook (forward and moving averages, with and without backward) against
vector_quantize_pytorch's VectorQuantize, from the same state."""

from importlib.util import find_spec

import torch
from harness import compare
from restore_lib.codebook import Codebook
from restore_lib.metrics import peak_memory

TOKENS, DIM, DECAY = 4096, 256, 0.9
SIZES = {1024: (5, 25), 16384: (1, 7)}  # codes: steps a turn, turns


def pair(k):
    """Ours and the peer with the same options and the same state, and tokens that lie around codes,
    so that no choice hangs on rounding."""
    from vector_quantize_pytorch import VectorQuantize

    ours = Codebook(k, DIM, decay=DECAY, init='normal').train()
    peer = VectorQuantize(
        DIM, k, decay=DECAY, commitment_weight=0.25, threshold_ema_dead_code=0, rotation_trick=False
    ).train()
    for theirs, mine in (
        (peer._codebook.embed, ours.codes),
        (peer._codebook.embed_avg, ours.sums),
        (peer._codebook.cluster_size, ours.counts),
    ):
        theirs.copy_(mine[None])
    return (
        ours,
        peer,
        (ours.codes[torch.randint(k, (TOKENS,))] + 0.5 * torch.randn(TOKENS, DIM))[None],
    )


def check(k):
    "Three steps each: the same indices, quantized values, losses, gradients and codes."
    torch.manual_seed(0)
    ours, peer, z = pair(k)
    for _ in range(3):
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        mine, (quantized, indices, loss) = ours(a), peer(b)
        if not torch.equal(mine.indices, indices):
            raise AssertionError(
                f'{(mine.indices != indices).sum()} indices of {indices.numel()} differ'
            )
        ((mine.quantized * z).sum() + mine.commitment_loss).backward()
        ((quantized * z).sum() + loss).backward()
        for name, one, other in (
            ('quantized values', mine.quantized, quantized),
            ('losses', mine.commitment_loss, loss),
            ('gradients', a.grad, b.grad),
            ('codes', ours.codes, peer._codebook.embed[0]),
            ('counts', ours.counts, peer._codebook.cluster_size[0]),
        ):
            if not torch.allclose(one, other, rtol=1e-4, atol=1e-5):
                raise AssertionError(f'the {name} differ by {(one - other).abs().max().item():.2g}')


def rows():
    if find_spec('vector_quantize_pytorch') is None:
        yield dict(
            subject='codebook, forward and EMA',
            peer='vector-quantize-pytorch',
            ours_ms=float('nan'),
            peer_ms=float('nan'),
            ratio=float('nan'),
            middle_half='-',
            note='NOT MEASURED: vector-quantize-pytorch is not installed '
            '(pip install -c constraints.txt vector-quantize-pytorch)',
        )
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for k, (steps, turns) in SIZES.items():
            check(k)
            for backward in (False, True):
                yield row(k, backward, steps, turns)
    finally:
        torch.set_num_threads(threads)


def stepper(module, z, backward, loss_of):
    "A step of either; the gradient that comes from above is z itself."

    def step():
        z.grad = None
        quantized, loss = loss_of(module(z))
        if backward:
            torch.autograd.backward((quantized, loss), (z.detach(), None))

    return step


def row(k, backward, steps, turns):
    """`steps` steps a turn, then the peak of one step
    (tensors that PyTorch's allocator holds at once)."""
    torch.manual_seed(0)
    ours, peer, z = pair(k)
    z.requires_grad_(backward)
    one = stepper(ours, z, backward, lambda out: (out.quantized, out.commitment_loss))
    other = stepper(peer, z, backward, lambda out: (out[0], out[2]))
    r = compare(
        f'codebook, forward{", backward" if backward else ""} and EMA, {TOKENS} x {DIM}, K={k}',
        lambda: [one() for _ in range(steps)],
        'vector_quantize_pytorch VectorQuantize',
        lambda: [other() for _ in range(steps)],
        repeats=turns,
    )
    mine, theirs = (peak_memory(f) / 2**20 for f in (one, other))
    return dict(
        r,
        ours_ms=r['ours_ms'] / steps,
        peer_ms=r['peer_ms'] / steps,
        note=f'at least 1 asked; peak memory {mine:.1f} MiB, peer {theirs:.1f} MiB',
    )
