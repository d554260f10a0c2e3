"""What lesson 08 does not teach: parity with vector-quantize-pytorch, gradients derived by hand,
two processes, weights that cannot be had, bad input."""

import io, math, os, subprocess, sys

from common import close, held, same
from toy import Stop
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from restore_lib import tokenizers as T
from restore_lib.code_parts import ReconstructionGrid, plot_health
from restore_lib.codebook import (
    Codebook,
    ViTCodebook,
    code_use,
    codebook_learner,
    kmeans,
    nearest_code,
    rotate_to,
    straight_through,
    tokenizer_loss,
    usage,
    vit_codebook_tiny,
)
from restore_lib.mae import MAE
from restore_lib.metrics import peak_memory
from restore_lib.patching import ViTEncoder
from restore_lib.tokenizers import FSQ, TimmTokens, code_bits, vit_codebook_base


@pytest.fixture(scope='module', autouse=True)
def started(request, tmp_path_factory):
    "Two processes, started before the first test and asked when their tests come."
    if not any(
        'two' in item.fixturenames for item in request.session.items if item.path == request.path
    ):
        yield
        return
    folder = tmp_path_factory.mktemp('two')
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            stdout=open(folder / f'{rank}.txt', 'w'),
            stderr=subprocess.STDOUT,
            env=dict(os.environ, OMP_NUM_THREADS='1'),
        )
        for rank in (0, 1)
    ]
    yield folder, runs
    for p in runs:
        p.kill()


@pytest.fixture(scope='module')
def two(started):
    folder, runs = started
    said = lambda: ''.join((folder / f'{rank}.txt').read_text()[-4000:] for rank in (0, 1))
    try:
        codes = [p.wait(timeout=60) for p in runs]
    except subprocess.TimeoutExpired:
        pytest.fail('a deadlock\n' + said())
    assert codes == [0, 0], said()
    return [torch.load(folder / f'{rank}.pt', weights_only=True) for rank in (0, 1)]


pytestmark = pytest.mark.usefixtures('seed')


def apart(a, b):
    return torch.cdist(
        a.detach().double(), b.detach().double(), compute_mode='donot_use_mm_for_euclid_dist'
    )


# parity -------------------------------------------------------------------------------------------


def twins(k, d, decay=0.9, revive=0, cosine=False, rotation=False, init='normal', commitment=0.25):
    "Ours and vector_quantize_pytorch's, with the same options and from the same state."
    VectorQuantize = pytest.importorskip('vector_quantize_pytorch').VectorQuantize
    ours = Codebook(k, d, decay, commitment, revive, cosine, rotation, init).train()
    peer = VectorQuantize(
        d,
        k,
        decay=decay,
        commitment_weight=commitment,
        threshold_ema_dead_code=revive,
        use_cosine_sim=cosine,
        rotation_trick=rotation,
        kmeans_init=init == 'kmeans',
    ).train()
    if init != 'kmeans':
        for theirs, mine in zip(state_of(peer), (ours.codes, ours.counts, ours.sums)):
            theirs.copy_(mine)
    return ours, peer


def state_of(peer):
    return [
        t[0] for t in (peer._codebook.embed, peer._codebook.cluster_size, peer._codebook.embed_avg)
    ]


def step_both(ours, peer, z, tol=1e-5):
    "A step of both from the same random state: all that comes out, gradients, the state after it."
    a, b, g, state = (
        z.clone().requires_grad_(),
        z.clone().requires_grad_(),
        torch.randn_like(z),
        torch.get_rng_state(),
    )
    out = ours(a)
    torch.set_rng_state(state)
    quantized, indices, loss = peer(b)
    ((out.quantized * g).sum() + 3 * out.commitment_loss).backward()
    ((quantized * g).sum() + 3 * loss).backward()
    assert torch.equal(out.indices, indices)
    assert (
        close(out.quantized, quantized, tol)
        and close(out.commitment_loss, loss, tol)
        and close(a.grad, b.grad, tol)
    )
    for mine, theirs in zip((ours.codes, ours.counts, ours.sums), state_of(peer)):
        assert close(mine, theirs, tol)
    return out


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(decay=0.5),
        dict(decay=0.0, commitment=1.0),
        dict(cosine=True),
        dict(rotation=True),
        dict(cosine=True, rotation=True),
        dict(revive=1),
        dict(revive=0.7, decay=0.6, cosine=True),
        dict(revive=2, rotation=True, decay=0.8),
    ],
    ids=str,
)
def test_parity_of_moving_averages(options):
    ours, peer = twins(24, 5, **options)
    before, revived = ours.codes.clone(), 0
    for k in range(6):
        z = torch.randn(2, 40, 5) * (1 + k / 3) + 0.3
        out = step_both(ours, peer, z)
        fresh = (F.normalize(z, dim=-1) if ours.cosine else z).reshape(-1, 5)
        revived += int((apart(ours.codes, fresh).min(1).values < 1e-6).sum())
    assert not close(ours.codes, before) and out.active > 3
    assert (revived > 0) == bool(options.get('revive', 0)) or options.get(
        'decay'
    ) == 0.0  # with decay 0 a code with one token is that token


@pytest.mark.parametrize('cosine', [False, True])
def test_parity_of_the_kmeans_start(cosine):
    "The peer passes the start through its smoothing too: a relative difference of 1e-5."
    ours, peer = twins(12, 3, cosine=cosine, init='kmeans', revive=1)
    for _ in range(4):
        step_both(ours, peer, torch.randn(3, 50, 3), tol=5e-4)
    assert ours.started


def test_parity_in_evaluation():
    ours, peer = twins(16, 4)
    ours.eval()
    peer.eval()
    z = torch.randn(2, 9, 4)
    out, (quantized, indices, _) = ours(z), peer(z)
    assert torch.equal(out.indices, indices) and close(out.quantized, quantized)


@pytest.mark.parametrize('shape', ['tokens', 'image'])
@pytest.mark.parametrize(
    'levels, dim',
    [((3,), None), ((3, 4, 5), None), ((8, 8, 4), None), ((7, 3, 6, 5), 6), ((8, 5), 1)],
)
def test_parity_of_fsq(levels, dim, shape):
    peer, ours = (
        pytest.importorskip('vector_quantize_pytorch').FSQ(list(levels), dim=dim),
        FSQ(levels, dim),
    )
    if dim:
        ours.inward.load_state_dict(peer.project_in.state_dict())
        ours.outward.load_state_dict(peer.project_out.state_dict())
    d = dim or len(levels)
    z = torch.randn(3, 21, d) * 2 if shape == 'tokens' else torch.randn(3, d, 4, 6) * 2
    a, b, g = z.clone().requires_grad_(), z.clone().requires_grad_(), torch.randn_like(z)
    out, (quantized, indices) = ours(a), peer(b)
    (out.quantized * g).sum().backward()
    (quantized * g).sum().backward()
    assert (
        torch.equal(out.indices, indices.long())
        and close(out.quantized, quantized, 1e-6)
        and close(a.grad, b.grad, 1e-5)
        and a.grad.abs().sum() > 0
    )
    every = torch.arange(math.prod(levels))
    assert ours.num_codes == peer.codebook_size and close(
        ours.lookup(every), peer.indices_to_codes(every), 1e-6
    )


# the nearest code ---------------------------------------------------------------------------------


@pytest.mark.parametrize('n, k, d', [(1, 1, 1), (257, 31, 7), (64, 500, 48)])
@pytest.mark.parametrize('mib', [64, 1e-9, 1e-3])
def test_nearest_code(n, k, d, mib):
    tokens, codes = (
        torch.randn(n, d),
        torch.randn(k, d) * torch.rand(k, 1) * 2,
    )  # codes of unequal length, so that the product alone is wrong
    expected = apart(tokens, codes).argmin(1)
    got = nearest_code(tokens, codes, mib)
    assert got.dtype == torch.int64 and torch.equal(got, expected)
    if k > 1:
        assert not torch.equal((tokens @ codes.T).argmax(1), expected)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(nearest_code(tokens, codes, mib), expected)
    for half in (torch.float16, torch.bfloat16):
        a, b = tokens.to(half), codes.to(half)
        assert torch.equal(nearest_code(a, b, mib), apart(a, b).argmin(1))


def test_nearest_code_computes_in_chunks(monkeypatch):
    rows, plain = [], torch.addmm
    monkeypatch.setattr(
        torch, 'addmm', lambda half, t, *a, **kw: rows.append(len(t)) or plain(half, t, *a, **kw)
    )
    nearest_code(torch.randn(100, 3), torch.randn(64, 3), 64 * 4 * 30 / 2**20)
    assert rows == [30, 30, 30, 10]


# gradients ----------------------------------------------------------------------------------------


def test_losses_move_only_what_they_should():
    book, z = (
        Codebook(7, 3, commitment=0.4, init='normal'),
        torch.randn(2, 10, 3, requires_grad=True),
    )
    codes, n = book.codes, z.numel()
    q = codes.detach()[torch.cdist(z.detach().reshape(-1, 3), codes.detach()).argmin(1)].reshape(
        z.shape
    )
    grads = lambda t: torch.autograd.grad(t, (z, codes), retain_graph=True, allow_unused=True)
    out, g = book(z), torch.randn_like(z)
    assert close(out.codebook_loss, ((q - z) ** 2).mean()) and close(
        out.commitment_loss, 0.4 * ((q - z) ** 2).mean()
    )
    dz, dc = grads(out.codebook_loss)
    expected = torch.zeros_like(codes)
    for i, zi, qi in zip(out.indices.flatten(), z.detach().reshape(-1, 3), q.reshape(-1, 3)):
        expected[i] += 2 * (qi - zi) / n
    assert dz is None and close(dc, expected, 1e-6) and dc.abs().sum() > 0
    dz, dc = grads(out.commitment_loss)
    assert dc is None and close(dz, 0.4 * 2 * (z - q) / n, 1e-6)
    dz, dc = grads((out.quantized * g).sum())
    assert dc is None and torch.equal(dz, g)
    dz, dc = grads(out.quantized.square().sum())  # what is above sees the code, not z
    assert dc is None and close(dz, 2 * q)
    assert not out.perplexity.requires_grad and not out.active.requires_grad


def test_moving_averages_get_no_gradient():
    book, z = Codebook(7, 3, decay=0.9, init='normal'), torch.randn(2, 10, 3, requires_grad=True)
    out = book(z)
    assert (
        not list(book.parameters())
        and out.codebook_loss == 0
        and not out.codebook_loss.requires_grad
        and not book.codes.requires_grad
    )
    before = book.codes.clone()
    (out.quantized.sum() + out.commitment_loss).backward()
    assert torch.equal(book.codes, before) and z.grad is not None


def test_gradients_at_length_one():
    "z/|z| is quantised: what reaches z is at right angles to it."
    book, z = (
        Codebook(7, 3, decay=0.9, cosine=True, init='normal'),
        (torch.randn(1, 10, 3) * 5).requires_grad_(),
    )
    out, g = book(z), torch.randn(1, 10, 3)
    (out.quantized * g).sum().backward()
    unit, long = F.normalize(z.detach(), dim=-1), z.detach().norm(dim=-1, keepdim=True)
    assert (
        close(z.grad, (g - (g * unit).sum(-1, keepdim=True) * unit) / long)
        and close(out.quantized.norm(dim=-1), torch.ones(1, 10))
        and close(book.codes.norm(dim=1), torch.ones(7))
    )


def test_straight_through():
    z, q, g = (
        torch.randn(4, 3, requires_grad=True),
        torch.randn(4, 3, requires_grad=True),
        torch.randn(4, 3),
    )
    out = straight_through(z, q)
    out.backward(g)
    assert close(out, q, 1e-6) and torch.equal(z.grad, g) and q.grad is None


@pytest.mark.parametrize('d', [2, 3, 16])
def test_rotation_against_its_matrix(d):
    "Fifty et al.: q = (|q|/|z|) R z, with R = I - 2 w w' + 2 q^ z^', fixed in the backward pass."
    z, q, g = (
        torch.randn(9, d, dtype=torch.double, requires_grad=True),
        torch.randn(9, d, dtype=torch.double, requires_grad=True),
        torch.randn(9, d, dtype=torch.double),
    )
    out = rotate_to(z, q)
    out.backward(g)
    assert torch.allclose(out, q) and q.grad is None
    for zi, qi, gi, got in zip(z.detach(), q.detach(), g, z.grad):
        a, b = zi / zi.norm(), qi / qi.norm()
        w = (a + b) / (a + b).norm()
        R = torch.eye(d, dtype=torch.double) - 2 * torch.outer(w, w) + 2 * torch.outer(b, a)
        assert (
            torch.allclose(R @ R.T, torch.eye(d, dtype=torch.double))
            and torch.linalg.det(R) > 0
            and torch.allclose(R @ a, b)
        )
        assert torch.allclose(got, qi.norm() / zi.norm() * R.T @ gi)


def test_rotation_at_the_edges():
    z = torch.tensor([[1.0, 0], [1.0, 0], [1e-9, 0]], requires_grad=True)
    q = torch.tensor([[2.0, 0], [-2.0, 0], [0.0, 1e-9]])
    out = rotate_to(z, q)
    out.sum().backward()
    assert (
        close(out, q)
        and torch.isfinite(z.grad).all()
        and close(z.grad[0], torch.tensor([2.0, 2.0]))
    )  # in line: only the scaling


def test_rotation_in_the_codebook():
    book, z, g = (
        Codebook(6, 3, decay=0.9, rotation=True, init='normal'),
        torch.randn(2, 5, 3, requires_grad=True),
        torch.randn(2, 5, 3),
    )
    before = book.codes.clone()
    out = book(z)
    assert close(out.quantized, before[out.indices])
    (out.quantized * g).sum().backward()
    w = z.detach().clone().requires_grad_()
    (rotate_to(w, before[out.indices]) * g).sum().backward()
    assert close(z.grad, w.grad) and not close(z.grad, g)


# how codes follow ---------------------------------------------------------------------------------


@pytest.mark.parametrize('decay', [0.0, 0.6, 0.99])
def test_moving_averages_by_hand(decay):
    book = Codebook(5, 2, decay=decay, init='normal')
    codes, counts, sums = book.codes.double().tolist(), [1.0] * 5, book.codes.double().tolist()
    for _ in range(4):
        z = torch.randn(1, 13, 2)
        book(z)
        n, s = [0.0] * 5, [[0.0, 0.0] for _ in range(5)]
        for t in z[0].double().tolist():
            k = min(range(5), key=lambda k: sum((x - y) ** 2 for x, y in zip(t, codes[k])))
            n[k] += 1
            for i in (0, 1):
                s[k][i] += t[i]
        counts = [decay * c + (1 - decay) * m for c, m in zip(counts, n)]
        sums = [[decay * a + (1 - decay) * b for a, b in zip(x, y)] for x, y in zip(sums, s)]
        total = sum(counts)
        codes = [
            [x / ((c + 1e-5) / (total + 5e-5) * total) for x in v] for v, c in zip(sums, counts)
        ]
        for mine, hand in ((book.codes, codes), (book.counts, counts), (book.sums, sums)):
            assert close(mine.double(), torch.tensor(hand, dtype=torch.double), 1e-4)


def test_smoothing_keeps_the_total_and_divides_by_no_zero():
    book = Codebook(4, 2, decay=0.0, init='normal')
    z = torch.tensor([3.0, 4.0]).expand(1, 6, 2)
    book(z)
    used = int(book.counts.argmax())
    smooth = torch.tensor([(c + 1e-5) / (6 + 4e-5) * 6 for c in book.counts.tolist()])
    assert (
        book.counts.sum() == 6
        and smooth.sum() == pytest.approx(6)
        and torch.isfinite(book.codes).all()
    )
    assert (
        close(book.codes[used], torch.tensor([18.0, 24.0]) / smooth[used], 1e-6)
        and (book.codes[torch.arange(4) != used] == 0).all()
    )


def test_nothing_explodes_at_the_start():
    for init in ('normal', 'uniform', 'kmeans'):
        torch.manual_seed(0)
        book, z = Codebook(64, 8, decay=0.99, init=init), torch.randn(8, 32, 8)
        for _ in range(5):
            book(z)
            assert book.codes.norm(dim=1).max() < z.norm(dim=-1).max() + 1


def test_unused_codes_keep_their_place():
    book = Codebook(3, 2, decay=0.5, init='normal')
    book.codes.copy_(torch.tensor([[0.0, 0], [9.0, 9], [-9.0, 5]]))
    book.sums.copy_(book.codes)
    for _ in range(8):
        book(torch.randn(1, 50, 2) * 0.1)
    assert close(book.codes[1:], torch.tensor([[9.0, 9], [-9.0, 5]]), 2e-2) and close(
        book.counts[1:], torch.full((2,), 0.5**8)
    )


@pytest.mark.parametrize('decay', [None, 0.5])
@pytest.mark.parametrize('cosine', [False, True])
def test_revival(decay, cosine):
    book = Codebook(8, 2, decay, revive=0.8, cosine=cosine, init='normal')
    far = torch.tensor([5.0, 5]) if not cosine else F.normalize(torch.tensor([1.0, 1]), dim=0)
    with torch.no_grad():
        book.codes[0], book.codes[1:] = far, -far + torch.arange(7)[:, None] * 1e-3
        book.sums.copy_(book.codes)
        book.counts[3], book.sums[3] = 2000.0, 2000 * book.codes[3]  # alive by its past
    z = far + torch.randn(1, 40, 2) * 0.1
    before, tokens = held(book), (F.normalize(z, dim=-1) if cosine else z)[0]
    if decay is None:
        book.counts[[1, 2, 4, 5, 6, 7]] = 0.5
    out = book(z)
    assert out.active == 1 and out.quantized.shape == z.shape
    at = apart(book.codes, tokens)
    dead = torch.tensor([1, 2, 4, 5, 6, 7])
    assert (at[dead].min(1).values < 1e-6).all() and len(
        at[dead].argmin(1).unique()
    ) == 6  # each another token
    assert (book.counts[dead] == 0.8).all() and close(
        book.sums[dead], 0.8 * book.codes[dead].detach()
    )
    assert (
        close(book.codes[3], before['codes'][3], 1e-2)
        and book.counts[3] > 100
        and at[3].min() > 0.5
    )
    assert close(
        out.quantized.detach(), before['codes'][0].expand_as(z)
    )  # this batch still had the old codes


def test_no_revival_in_evaluation_or_unasked():
    for book in (
        Codebook(8, 2, 0.5, revive=5, init='normal').eval(),
        Codebook(8, 2, None, init='normal').train(),
    ):
        before = book.codes.detach().clone()
        for _ in range(3):
            book(torch.randn(1, 4, 2))
        assert torch.equal(book.codes, before)


def test_fewer_tokens_than_dead_codes():
    book, z = Codebook(50, 2, decay=0.5, revive=3, init='normal'), torch.randn(1, 6, 2) * 30
    book(z)
    at = apart(book.codes, z[0])
    reborn = (book.counts == 3).nonzero()[:, 0]
    assert (
        len(reborn) == 6
        and (at[reborn].min(1).values < 1e-5).all()
        and len(at[reborn].argmin(1).unique()) == 6
    )
    pytest.importorskip('vector_quantize_pytorch')
    ours, peer = twins(
        50, 2, decay=0.5, revive=3
    )  # the same codes are chosen, by the same numbers, for the same tokens
    state = torch.get_rng_state()
    ours(z)
    torch.set_rng_state(state)
    peer(z)
    assert torch.equal(ours.counts == 3, state_of(peer)[1] == 3)
    rows = lambda codes, counts: sorted(map(tuple, codes[counts == 3].tolist()))
    assert rows(ours.codes, ours.counts) == rows(*state_of(peer)[:2])


# the start ----------------------------------------------------------------------------------------


def test_kmeans_finds_what_is_there():
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    tokens = (centres[:, None] + torch.randn(4, 30, 2) * 0.1).reshape(-1, 2)
    best = min(
        (kmeans(tokens, 4) for _ in range(12)),
        key=lambda r: torch.cdist(tokens, r[0]).min(1).values.sum(),
    )
    assert (torch.cdist(best[0], centres).min(1).values < 0.1).all() and best[1].tolist() == [
        30.0
    ] * 4


def test_kmeans_is_lloyds():
    tokens = torch.randn(60, 3)
    torch.manual_seed(5)
    codes, counts = kmeans(tokens, 7, iters=3)
    torch.manual_seed(5)
    hand = tokens[torch.randperm(60)[:7]].double()
    for _ in range(3):
        at = torch.cdist(tokens.double(), hand).argmin(1)
        hand = torch.stack(
            [tokens[at == k].double().mean(0) if (at == k).any() else hand[k] for k in range(7)]
        )
    assert close(codes.double(), hand) and torch.equal(
        counts, torch.bincount(at, minlength=7).float()
    )
    assert (
        kmeans(tokens, 60)[0].sort(0).values.allclose(tokens.sort(0).values)
    )  # as many codes as tokens
    assert close(kmeans(F.normalize(tokens, dim=1), 7, cosine=True)[0].norm(dim=1), torch.ones(7))


def test_kmeans_keeps_a_code_that_nobody_chooses():
    tokens = torch.tensor([[1.0, 2]]).expand(5, 2).contiguous()
    codes, counts = kmeans(tokens, 3)
    assert torch.equal(codes, tokens[:3]) and counts.tolist() == [5, 0, 0]
    book = Codebook(3, 2, decay=0.9)
    book(tokens[None])
    assert torch.isfinite(book.codes).all() and close(book.codes, tokens[:3], 1e-3)


def test_start():
    tokens = torch.randn(90, 4) * 3 + 1
    books = [Codebook(9, 4, decay) for decay in (0.9, None, 0.9)]
    for book, given in zip(books, (tokens, tokens, tokens.reshape(2, 9, 5, 4).permute(0, 3, 1, 2))):
        torch.manual_seed(1)
        assert not book.started
        book.start(given)
        assert (
            book.started
            and close(book.sums, book.codes.detach() * book.counts[:, None])
            and book.counts.sum() == 90
        )
        assert torch.equal(book.codes, books[0].codes)
    torch.manual_seed(1)
    first = Codebook(9, 4, decay=None, commitment=1.0).train()
    torch.manual_seed(1)
    assert first(tokens[None]).commitment_loss < 0.5 * tokens.var() and close(
        first.codes, books[0].codes
    )
    before = first.codes.clone()
    assert first(tokens[None] * 5).indices.shape == (1, 90) and torch.equal(
        first.codes, before
    )  # once only


@pytest.mark.parametrize('decay', [None, 0.9])
def test_codes_started_by_many_batches_move_and_revive_as_those_started_by_one(decay):
    "The counts of a start by ten batches would hold the codes, and the dead ones, for long."
    torch.manual_seed(3)
    tokens, moved = torch.randn(1, 64, 4), torch.randn(1, 64, 4) + 2
    books = [Codebook(8, 4, decay, revive=2.0).train() for _ in range(2)]
    for book, batches in zip(books, (1, 10)):
        torch.manual_seed(1)
        book.start(tokens)
        book.counts.mul_(batches)  # what as many batches give
        book.sums.mul_(batches)
        torch.manual_seed(2)
        for _ in range(5):
            book(moved)
    assert close(books[0].codes, books[1].codes, 1e-4)
    assert close(books[0].counts, books[1].counts, 1e-3)
    assert books[1].counts.sum() < 80


@pytest.mark.parametrize('decay', [None, 0.9])
def test_fewer_tokens_than_codes(decay):
    book = Codebook(20, 4, decay, revive=1)
    before = held(book)
    for call in (lambda: book(torch.randn(1, 19, 4)), lambda: book.start(torch.randn(19, 4))):
        with pytest.raises(ValueError, match='19 vectors for 20 codes'):
            call()
    assert same(before, held(book)) and not book.started
    book(torch.randn(1, 20, 4))
    assert book.started
    book(torch.randn(1, 3, 4))  # later batches may be small


def test_evaluation_changes_nothing_and_needs_a_start():
    z = torch.randn(2, 30, 4)
    for decay in (None, 0.9):
        book = Codebook(20, 4, decay, revive=1).eval()
        before = held(book)
        with pytest.raises(RuntimeError, match='no codes yet'):
            book(z)
        assert same(before, held(book))
        book.train()(z)
        before = held(book)
        for _ in range(3):
            out = book.eval()(z)
        assert (
            same(before, held(book))
            and close(out.quantized, book.codes[out.indices])
            and out.commitment_loss > 0
        )
        assert out.active == len(out.indices.unique())


@pytest.mark.parametrize('started', [False, True])
def test_state_dict_round_trip(started):
    a, b = Codebook(6, 3, decay=0.8, revive=1), Codebook(6, 3, decay=0.8, revive=1)
    if started:
        a(torch.randn(2, 20, 3))
    b.load_state_dict(a.state_dict())
    assert (
        bool(b.started) == started
        and same(held(a), held(b))
        and set(held(a)) >= {'codes', 'counts', 'sums', 'started'}
    )
    for book in (a, b):
        torch.manual_seed(3)
        for _ in range(2):
            book(torch.randn(2, 20, 3))
    assert same(held(a), held(b))


# shapes, types, use -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'make',
    [
        lambda: Codebook(9, 4, decay=0.8, init='normal'),
        lambda: Codebook(9, 4, rotation=True, cosine=True, init='normal'),
        lambda: FSQ((3, 4, 5, 3)),
        lambda: FSQ((3, 4), 4),
    ],
)
def test_images_are_tokens(make):
    torch.manual_seed(2)
    a = make()
    torch.manual_seed(2)
    b, z = make(), torch.randn(2, 4, 3, 5)
    x, y = z.clone().requires_grad_(), z.flatten(2).transpose(1, 2).clone().requires_grad_()
    one, two, g = a(x), b(y), torch.randn_like(z)
    (one.quantized * g).sum().backward()
    (two.quantized * g.flatten(2).transpose(1, 2)).sum().backward()
    assert (
        one.quantized.shape == z.shape
        and one.indices.shape == (2, 3, 5)
        and one.indices.dtype == torch.int64
    )
    assert close(one.quantized.flatten(2).transpose(1, 2), two.quantized, 1e-6) and torch.equal(
        one.indices.flatten(1), two.indices
    )
    assert close(x.grad.flatten(2).transpose(1, 2), y.grad, 1e-6) and same(held(a), held(b))
    assert close(one.commitment_loss, two.commitment_loss) and close(one.perplexity, two.perplexity)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats(dtype):
    for book in (
        Codebook(9, 4, decay=0.8, init='normal'),
        Codebook(9, 4, init='normal'),
        FSQ((3, 4, 5, 3)),
    ):
        z = torch.randn(2, 30, 4).to(dtype).requires_grad_()
        full, codes = (
            FSQ((3, 4, 5, 3))(z.float()) if isinstance(book, FSQ) else None,
            getattr(book, 'codes', None),
        )
        expected = (
            full.indices
            if full
            else torch.cdist(z.detach().double(), codes.detach().double()).argmin(-1)
        )
        out = book(z)
        out.quantized.sum().backward()
        assert (
            out.quantized.dtype == dtype
            and z.grad.dtype == dtype
            and torch.equal(out.indices, expected)
        )
        assert out.commitment_loss.dtype == torch.float32 and all(
            v.dtype in (torch.float32, torch.bool, torch.int64) for v in book.state_dict().values()
        )


def test_under_autocast():
    for make in (lambda: Codebook(9, 4, decay=0.8, init='normal'), lambda: FSQ((3, 4, 5, 3))):
        torch.manual_seed(2)
        a = make()
        torch.manual_seed(2)
        b, z = make(), torch.randn(2, 30, 4)
        plain = a(z)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            cast = b(z)
        assert (
            torch.equal(plain.indices, cast.indices)
            and torch.equal(plain.quantized, cast.quantized)
            and cast.quantized.dtype == torch.float32
            and same(held(a), held(b))
        )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_fsq_with_layers_takes_half_precision(dtype):
    assert FSQ((3, 4), 4)(torch.randn(2, 5, 4, dtype=dtype)).quantized.dtype == dtype


def test_usage():
    perplexity, active = usage(torch.tensor([2, 0, 2, 4]))
    assert perplexity.item() == pytest.approx(2**1.5) and active == 3
    assert (
        usage(torch.ones(8))[0].item() == pytest.approx(8) and usage(torch.tensor([0, 5]))[0] == 1
    )
    assert torch.isfinite(usage(torch.zeros(3))[0]) and usage(torch.zeros(3))[1] == 0
    out = Codebook(9, 4, init='normal')(torch.randn(2, 30, 4))
    p = torch.bincount(out.indices.flatten(), minlength=9) / 60
    assert (
        out.perplexity.item()
        == pytest.approx(math.exp(-sum(v * math.log(v) for v in p.tolist() if v)))
        and out.active == (p > 0).sum()
    )


@pytest.mark.parametrize('make', [lambda: Codebook(12, 4, init='normal'), lambda: FSQ((3, 4))])
def test_lookup(make):
    book = make()
    assert torch.equal(
        book.lookup(torch.tensor([[3, 0], [11, 3]])),
        book.lookup(torch.arange(12))[torch.tensor([[3, 0], [11, 3]])],
    )
    assert book.lookup(torch.tensor(5)).shape == (book.dim,) and book.lookup(
        torch.zeros(0, 2, dtype=torch.long)
    ).shape == (0, 2, book.dim)
    assert torch.equal(
        book.lookup(torch.tensor([3, 11], dtype=torch.int32)), book.lookup(torch.tensor([3, 11]))
    )
    for bad in ([12], [-1], [0, 40]):
        with pytest.raises(
            ValueError, match=f'indices span {min(bad)} to {max(bad)}; expected 0 to 11'
        ):
            book.lookup(torch.tensor(bad))
    for bad in (torch.tensor([1.0]), torch.tensor([True]), [1, 2], 3, None):
        with pytest.raises(TypeError, match='whole numbers'):
            book.lookup(bad)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16])
def test_lookup_of_short_whole_numbers(dtype):
    book = Codebook(12, 4, init='normal')
    assert torch.equal(
        book.lookup(torch.tensor([3, 11], dtype=dtype)), book.lookup(torch.tensor([3, 11]))
    )


BAD = [
    (torch.randn(2, 5, 3), ValueError, r'\(2, 5, 3\).*\(b, n, 4\)'),
    (torch.randn(2, 5, 4, 4), ValueError, r'\(b, 4, h, w\)'),
    (torch.randn(5, 4), ValueError, r'\(5, 4\)'),
    (torch.randn(1, 1, 4, 1, 1), ValueError, 'shape'),
    (torch.randn(0, 5, 4), ValueError, r'\(0, 5, 4\)'),
    (torch.randn(2, 0, 4), ValueError, r'\(2, 0, 4\)'),
    (torch.randn(2, 4, 0, 3), ValueError, 'shape'),
    (torch.ones(2, 5, 4, dtype=torch.int64), TypeError, 'int64'),
    (torch.ones(2, 5, 4, dtype=torch.bool), TypeError, 'bool'),
    ([[[1.0] * 4]], TypeError, 'list'),
    (None, TypeError, 'NoneType'),
    (torch.tensor([[[1.0, 2, math.nan, 0], [0, 0, 0, math.nan]]]), ValueError, 'holds 2 values'),
    (torch.tensor([[[1.0, 2, math.inf, -math.inf]]]), ValueError, 'holds 2 values'),
    (torch.full((1, 1, 4), math.inf, dtype=torch.float16), ValueError, 'holds 4 values'),
]


@pytest.mark.parametrize('z, error, says', BAD, ids=[f'{k}' for k in range(len(BAD))])
def test_bad_tokens_change_nothing(z, error, says):
    for book in (
        Codebook(3, 4, decay=0.9, revive=1, init='normal'),
        Codebook(1, 4, decay=0.9),
        Codebook(3, 4, init='normal').eval(),
        FSQ((3, 4, 5, 3)),
    ):
        before = held(book)
        with pytest.raises(error, match=says):
            book(z)
        assert same(before, held(book))


def test_large_sums_are_finite():
    for book in (Codebook(3, 4, decay=0.9, init='normal'), FSQ((3, 4, 5, 3))):
        assert torch.isfinite(book(torch.full((1, 9, 4), 3e38)).indices).all()


def test_start_refuses_nan():
    book, tokens = Codebook(4, 3, decay=0.9), torch.randn(40, 3)
    tokens[7, 1] = math.nan
    with pytest.raises(ValueError, match='NaN'):
        book.start(tokens)


def test_learned_codes_keep_length_one():
    book, z = Codebook(4, 3, cosine=True, init='normal'), torch.randn(2, 40, 3)
    opt = torch.optim.SGD(book.parameters(), lr=1.0)
    for _ in range(10):
        opt.zero_grad()
        book(z).codebook_loss.backward()
        opt.step()
    out = book.eval()(z)
    assert close(out.quantized.norm(dim=-1), torch.ones(2, 40), 1e-3)


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(num_codes=0), 'num_codes is 0'),
        (dict(dim=0), 'dim (is )?0'),
        (dict(init='zeros'), "init is 'zeros'"),
        (dict(decay=1), 'decay is 1'),
        (dict(decay=-0.1), 'decay is -0.1'),
    ],
)
def test_bad_options(kw, says):
    with pytest.raises(ValueError, match=says):
        Codebook(**(dict(num_codes=4, dim=2) | kw))


@pytest.mark.parametrize('levels', [(), (2, 3), (3, 1), (3.5, 4), (0,)])
def test_bad_levels(levels):
    with pytest.raises(ValueError, match='levels is'):
        FSQ(levels)


# finite scalars -----------------------------------------------------------------------------------


@pytest.mark.parametrize('levels', [(3,), (8, 8, 4), (5, 4, 3, 6)])
def test_fsq_round_trip_over_all_codes(levels):
    """Tokens far within each cell come back as its index;
    codes of all indices are distinct, in [-1, 1]."""
    fsq, every = FSQ(levels), torch.arange(math.prod(levels))
    codes = fsq.lookup(every)
    assert (
        len({tuple(c) for c in codes.tolist()}) == len(every)
        and codes.min() >= -1
        and codes.max() <= 1
    )
    half, even = (torch.tensor(levels) - 1) * 1.001 / 2, (torch.tensor(levels) % 2 == 0) * 0.5
    z = (
        torch.atanh(
            ((codes * (torch.tensor(levels) // 2) + even) / half).double().clamp(-0.9999, 0.9999)
        )
        - torch.atanh(even / half).double()
    )
    out = fsq(z.float()[None])
    assert (
        torch.equal(out.indices[0], every)
        and torch.equal(out.quantized[0], codes)
        and out.active == len(every)
        and out.perplexity.item() == pytest.approx(len(every), rel=1e-4)
    )
    z = torch.randn(1, 500, len(levels)) * 4
    out = fsq(z)
    assert (
        torch.equal(fsq.lookup(out.indices), out.quantized)
        and int(out.indices.min()) >= 0
        and int(out.indices.max()) < fsq.num_codes
    )
    assert fsq(torch.full((1, 1, len(levels)), 1e4)).quantized.max() <= 1


def test_fsq_gradient():
    fsq, z, g = (
        FSQ((8, 5)),
        torch.randn(1, 7, 2, dtype=torch.double, requires_grad=True),
        torch.randn(1, 7, 2),
    )
    out = fsq(z)
    (out.quantized * g).sum().backward()
    levels = torch.tensor([8.0, 5], dtype=torch.double)
    half, offset = (levels - 1) * 1.001 / 2, torch.tensor([0.5, 0], dtype=torch.double)
    expected = (
        g
        * half
        * (1 - torch.tanh(z.detach() + torch.atanh(offset / half)) ** 2)
        / torch.tensor([4, 2])
    )
    assert (
        torch.allclose(z.grad, expected, rtol=1e-4, atol=1e-5)
        and out.codebook_loss == 0 == out.commitment_loss
    )
    assert not [*FSQ((8, 5)).parameters()] and all(p.grad is None for p in fsq.parameters())
    fsq = FSQ((8, 5), 6)
    fsq(torch.randn(1, 7, 6)).quantized.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in fsq.parameters())


# bits ---------------------------------------------------------------------------------------------


def test_code_bits():
    counts, sent = torch.tensor([5, 0, 2, 0]), torch.tensor([[0, 0], [2, 1]])
    assert code_bits(counts, sent) == pytest.approx(
        -(2 * math.log2(6 / 11) + math.log2(3 / 11) + math.log2(1 / 11)) / 4
    )
    assert code_bits(torch.zeros(64), torch.arange(64)) == pytest.approx(6) and code_bits(
        counts.float(), sent.int()
    ) == pytest.approx(code_bits(counts, sent))
    big = torch.tensor([10**9, 10**9])
    assert code_bits(big, torch.tensor([0, 1, 1])) == pytest.approx(1)
    for bad, error in (
        (torch.tensor([4]), ValueError),
        (torch.tensor([-1]), ValueError),
        (torch.tensor([0.0]), TypeError),
    ):
        with pytest.raises(error):
            code_bits(counts, bad)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16])
def test_code_bits_of_short_whole_numbers(dtype):
    counts = torch.tensor([5, 0, 2, 0])
    assert code_bits(counts, torch.tensor([0, 1, 1, 0], dtype=dtype)) == pytest.approx(
        code_bits(counts, torch.tensor([0, 1, 1, 0]))
    )


# several processes --------------------------------------------------------------------------------

BATCHES = lambda: torch.randn(5, 4, 24, 3, generator=torch.Generator().manual_seed(9))


def averages():
    torch.manual_seed(4)
    return Codebook(10, 3, decay=0.8, cosine=False, init='normal')


def worker(rank, folder):
    "One of two processes: what the tests below compare."
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    out, here = {}, slice(2 * rank, 2 * rank + 2)
    book = averages()
    for batch in BATCHES():
        last = book(batch[here])
    out['averages'], out['use'] = held(book), (last.perplexity, last.active)
    out['fsq'] = tuple(FSQ((4, 3, 3))(BATCHES()[0][here])[4:])
    for name, options in dict(
        revive=dict(decay=0.5, revive=1.0, init='uniform'),
        revive_learned=dict(revive=1.0, init='uniform'),
        kmeans=dict(decay=0.9),
        kmeans_learned=dict(),
        kmeans_kept=dict(),
        kmeans_cosine=dict(decay=0.9, cosine=True, revive=2),
    ).items():
        torch.manual_seed(4)
        book = Codebook(32, 3, **options)
        torch.manual_seed(100 + rank)  # other tokens, other random numbers
        start = book.codes.detach().clone()
        for _ in range(1 if name.startswith('kmeans') else 6):
            book.counts.mul_(0.9)
            book(
                torch.randn(1, 2, 3).repeat(2, 20, 1)
                if name == 'kmeans_kept'
                else torch.randn(2, 40, 3)
            )  # two different tokens: most codes stay as they were drawn
        out[name], out[name + '_moved'] = held(book), not torch.equal(start, book.codes)
    book, fsq = Codebook(32, 3, decay=0.9, revive=1, init='normal'), FSQ((3, 3, 3))
    for _ in range(2):  # evaluation of unequal length between steps of training
        for m in (book, fsq):
            m.eval()
            for _ in range(1 + 3 * rank):
                m(torch.randn(1, 7, 3))
            m.train()(torch.randn(1, 7, 3))
    torch.manual_seed(rank)
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(nn.Linear(3, 3), Codebook(8, 3, decay=0.9, revive=0.5, init='normal'))
    )
    for _ in range(3):
        model(torch.randn(2, 9, 3))[0].sum().backward()
    out['ddp'] = held(model.module)
    torch.save(out, f'{folder}/{rank}.pt')
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def test_two_processes_are_one(two):
    book = averages()
    for batch in BATCHES():
        last = book(batch)
    assert same(two[0]['averages'], two[1]['averages'])
    for k, v in held(book).items():
        assert close(v.float(), two[0]['averages'][k].float()), k
    for rank in (0, 1):
        assert close(two[rank]['use'][0], last.perplexity) and two[rank]['use'][1] == last.active
    fsq = FSQ((4, 3, 3))(BATCHES()[0])
    assert all(close(r['fsq'][0], fsq.perplexity) and r['fsq'][1] == fsq.active for r in two)


@pytest.mark.parametrize(
    'name', ['revive', 'revive_learned', 'kmeans', 'kmeans_learned', 'kmeans_kept', 'kmeans_cosine']
)
def test_two_processes_hold_the_same_codes(two, name):
    assert (
        same(two[0][name], two[1][name])
        and all(r[name + '_moved'] for r in two)
        and two[0][name]['started']
    )


def test_two_processes_of_other_seeds_under_ddp(two):
    assert same(two[0]['ddp'], two[1]['ddp'])


# the model ----------------------------------------------------------------------------------------


def own(codebook=None, **kw):
    return ViTCodebook(
        ViTEncoder(16, 4, 16, 1, 2, 1, cls_token=False),
        codebook or Codebook(12, 6, decay=0.9, init='normal'),
        16,
        1,
        2,
        **kw,
    )


def of_mae():
    return ViTCodebook(
        MAE(16, 4, 16, 1, 2, 16, 1, 2).encoder,
        Codebook(12, 6, init='normal'),
        16,
        1,
        2,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.25),
    )


def of_timm():
    return ViTCodebook(
        TimmTokens('vit_tiny_patch16_224', pretrained=False, img_size=32, depth=2),
        FSQ((5, 4, 3), 6),
        64,
        1,
        2,
    )


@pytest.mark.parametrize(
    'make, shape, tokens',
    [
        (own, (1, 16, 16), 16),
        (of_mae, (3, 16, 16), 16),
        (of_timm, (3, 32, 32), 4),
        (
            lambda: vit_codebook_tiny((12, 20), codebook=Codebook(16, 8, init='normal'), dim=16),
            (1, 12, 20),
            15,
        ),
    ],
    ids=['own', 'MAE', 'timm', 'tiny'],
)
def test_halves_make_the_whole(make, shape, tokens):
    model, x = make().eval(), torch.rand(2, *shape)
    x_hat, out = model(x)
    assert (
        x_hat.shape == x.shape
        and out.indices.shape == (2, tokens)
        and out.indices.dtype == torch.int64
    )
    assert torch.equal(model.encode(x), out.indices) and close(model.decode(model.encode(x)), x_hat)
    assert not close(model.decode((out.indices + 1) % model.codebook.num_codes), x_hat, 1e-4)
    z = model.tokens(x)
    z.retain_grad()
    x_hat, out = model.train()(x)
    (F.mse_loss(x_hat, x) + out.commitment_loss + out.codebook_loss).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert all('codes' in n or 'cls_token' in n or 'pos_embed' in n for n in idle), idle
    same_weights = make()
    same_weights.load_state_dict(model.state_dict())
    assert torch.equal(same_weights.eval().decode(out.indices), model.eval().decode(out.indices))


def test_tokens_by_hand():
    model, x = of_mae(), torch.rand(2, 3, 16, 16)
    inside = (x - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor([0.2, 0.3, 0.25])[
        :, None, None
    ]
    latent = model.encoder(inside)[0]
    assert latent.shape[1] == 17 and close(
        model.tokens(x), model.proj(latent[:, 1:])
    )  # without the class token
    q = torch.randn(2, 16, 6)
    assert close(
        model.draw(q),
        model.decoder(q) * torch.tensor([0.2, 0.3, 0.25])[:, None, None]
        + torch.tensor([0.4, 0.5, 0.6])[:, None, None],
    )
    timm = of_timm()
    assert timm.encoder.grid == (2, 2) and timm.encoder.patch == 16 and timm.encoder.width == 192
    vit = timm.encoder.vit
    assert close(timm.encoder.eval()(x := torch.rand(1, 3, 32, 32)), vit.forward_features(x)[:, 1:])


def test_positions():
    "Equal tokens stay equal up to the head without positions, and do not with them."
    for positions in (True, False):
        model, seen = own(positions=positions).eval(), []
        model.decoder.norm.register_forward_hook(lambda m, a, out: seen.append(out))
        image = model.decode(torch.full((1, 16), 3))
        spread = (seen[0] - seen[0][:, :1]).abs().max()
        assert (spread > 1e-2) if positions else (spread < 1e-5)
        inner = F.unfold(
            image[..., 4:12, 4:12], 4, stride=4
        )  # patches that do not touch the border, where convolutions see zeros
        assert ((inner - inner[..., :1]).abs().max() > 1e-3) == positions
        seen.clear()
        model.decode(torch.tensor([[3, 4] * 8]))
        assert (seen[0][:, 0] - seen[0][:, 1]).abs().max() > 1e-3
    a, b = own(positions=False).eval(), torch.randperm(16)
    seen = []
    a.decoder.norm.register_forward_hook(lambda m, args, out: seen.append(out))
    q = torch.randn(1, 16, 6)
    a.draw(q)
    a.draw(q[:, b])
    assert close(seen[0][:, b], seen[1])


def test_wrong_images():
    model = own()
    before = held(model)
    for bad in (torch.rand(1, 1, 20, 16), torch.rand(1, 1, 12, 16), torch.rand(1, 1, 8, 32)):
        with pytest.raises(ValueError, match=f'{bad.shape[2]} x {bad.shape[3]}; expected 16 x 16'):
            model(bad)
    for bad in (
        torch.rand(1, 3, 16, 16),
        torch.rand(16, 16),
        torch.zeros(1, 1, 16, 16, dtype=torch.uint8),
        'image',
    ):
        with pytest.raises((ValueError, TypeError)):
            model(bad)
    with pytest.raises((ValueError, TypeError)):
        of_timm()(torch.rand(1, 1, 32, 32))
    for bad in (torch.full((1, 16), 12), torch.zeros(1, 16)):
        with pytest.raises((ValueError, TypeError), match='indices'):
            model.decode(bad)
    with pytest.raises(ValueError, match='patch is 6; expected a power of 2'):
        ViTCodebook(ViTEncoder(12, 6, 16, 1, 2, 1), Codebook(4, 4), 16, 1, 2)
    assert same(before, held(model))


def test_presets():
    tiny = vit_codebook_tiny()
    assert (
        5e4 < sum(p.numel() for p in tiny.parameters()) < 2e5
        and tiny.codebook.num_codes == 256
        and tiny.decoder.grid == (7, 7)
    )
    assert tiny(torch.rand(8, 1, 28, 28))[0].shape == (8, 1, 28, 28) and tiny.codebook.started
    import timm
    from inspect import signature

    kept = timm.get_pretrained_cfg(signature(TimmTokens).parameters['name'].default)
    assert (
        kept.mean == kept.std == (0.5, 0.5, 0.5)
        and kept.input_size == (3, 224, 224)
        and kept.hf_hub_id == 'timm/vit_base_patch16_224.orig_in21k'
    )


def test_base_preset(monkeypatch):
    "Its sizes, with an encoder of one block in the place of twelve."
    asked = {}

    class Short(TimmTokens):
        def __init__(self, **kw):
            asked.update(kw)
            super().__init__('vit_base_patch16_224', pretrained=False, depth=1)

    monkeypatch.setattr(T, 'TimmTokens', Short)
    with torch.device('meta'):
        model = vit_codebook_base(pretrained=True)  # shapes without numbers
    assert (
        asked == dict(pretrained=True)
        and model.codebook.codes.shape == (16384, 512)
        and not list(model.codebook.parameters())
    )
    assert (
        len(model.decoder.blocks) == 12
        and model.decoder.grid == (14, 14)
        and model.decoder.proj.out_features == 768
        and len(model.decoder.head) == 9
    )
    assert model.draw(torch.empty(1, 196, 512, device='meta')).shape == (1, 3, 224, 224)
    assert (
        1.7e8 < sum(p.numel() for p in model.parameters()) + 11 * 7_087_872 < 1.8e8
    )  # with the eleven blocks that are missing


# weights that cannot be had -----------------------------------------------------------------------


def test_timm_offline(monkeypatch):
    import timm
    from urllib.error import URLError

    for error in (URLError('no route'), ConnectionError('x'), FileNotFoundError('x')):

        def fail(*a, **kw):
            raise error

        monkeypatch.setattr(timm, 'create_model', fail)
        with pytest.raises(
            OSError,
            match=r"'vit_tiny_patch16_224' are not in the cache.*\("
            + type(error).__name__
            + r"\).*HF_HOME.*pretrained=False",
        ) as info:
            TimmTokens('vit_tiny_patch16_224')
        assert info.value.__cause__ is error
        with pytest.raises(type(error)) as info:
            TimmTokens('vit_tiny_patch16_224', pretrained=False)
        assert info.value is error


def test_timm_offline_for_real(monkeypatch, tmp_path):
    "The hub's own offline mode and an empty cache: what the libraries below really raise."
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(hub, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setenv('HF_HOME', str(tmp_path))
    with pytest.raises(OSError, match='pretrained=False for random weights'):
        TimmTokens('vit_tiny_patch16_224')


def test_timm_unknown_name():
    with pytest.raises(Exception, match='(?i)unknown model') as info:
        TimmTokens('vit_of_nobody')
    assert 'downloaded' not in str(info.value)


# training -----------------------------------------------------------------------------------------


def IMAGES(n=32):
    return (
        torch.rand(n, 1, 2, 2, generator=torch.Generator().manual_seed(2))
        .repeat_interleave(8, 2)
        .repeat_interleave(8, 3)
    )


def training(codebook=None, cbs=(), valid=None, lr=1e-2, **kw):
    torch.manual_seed(3)
    model = own(codebook() if codebook else Codebook(12, 6, decay=0.9, revive=1))
    return codebook_learner(
        model,
        DataLoader(TensorDataset(IMAGES()), 8, shuffle=True),
        valid,
        lr,
        cbs=cbs,
        cpu=True,
        **kw,
    )


@pytest.mark.parametrize('precision', ['no', 'bf16'])
@pytest.mark.parametrize(
    'codebook',
    [None, lambda: Codebook(12, 6, init='normal'), lambda: FSQ((4, 3), 6)],
    ids=['averages', 'learned', 'FSQ'],
)
def test_training(codebook, precision):
    learn = training(codebook, valid=[(IMAGES(8),)], precision=precision).fit(30, valid_every=10)
    rows = [r for r in learn.history if 'lr' in r]
    assert (
        len(rows) == 30
        and rows[-1]['mse'] < 0.8 * rows[0]['mse']
        and {'mse', 'codebook', 'commitment', 'perplexity', 'active'} <= rows[0].keys()
    )
    assert all(
        1 <= r['active'] <= 12
        and 1 <= r['perplexity'] <= 12.001
        and ('code_norm' in r) == (not isinstance(learn.bare.codebook, FSQ))
        for r in rows
    )
    assert (rows[-1]['codebook'] > 0) == (getattr(learn.bare.codebook, 'decay', 0) is None) and {
        'valid_mse',
        'valid_commitment',
    } <= learn.metrics.keys()
    if 'code_norm' in rows[-1]:
        assert rows[-1]['code_norm'] == pytest.approx(
            learn.bare.codebook.codes.norm(dim=1).median().item()
        )
    assert not learn.bare.codebook._forward_hooks and learn.cbs[0].last is None
    assert all(v.dtype != torch.bfloat16 for v in learn.bare.state_dict().values())
    indices, counts = code_use(learn.bare, IMAGES(70))
    assert (
        indices.shape == (70, 16)
        and counts.sum() == 70 * 16
        and torch.equal(counts, torch.bincount(indices.flatten(), minlength=12))
        and learn.bare.training
    )
    assert len(plot_health({'a': (learn.history, counts)}, 'title').axes) == 3


def test_terms_and_rates():
    model, x = own(Codebook(12, 6, init='normal')), IMAGES(4)
    seen = []

    class Spy(nn.Module):
        def forward(self, x_hat, x):
            seen.append((x_hat, x))
            return (x_hat - x).abs().mean()

    terms = tokenizer_loss(Spy(), 0.3)(model, (x, None))
    x_hat, out = model(x)
    assert list(terms) == ['mse', 'codebook', 'commitment', 'perceptual'] and list(
        tokenizer_loss()(model, x)
    ) == ['mse', 'codebook', 'commitment']
    for k, v in dict(
        mse=F.mse_loss(x_hat, x),
        codebook=out.codebook_loss,
        commitment=out.commitment_loss,
        perceptual=0.3 * (x_hat - x).abs().mean(),
    ).items():
        assert close(terms[k], v), k
    assert seen[0][0].requires_grad and seen[0][1] is x
    learn = training(
        lambda: Codebook(12, 6, init='normal'), rates={'encoder': 0.1, 'codebook': 0.5}, lr=1e-2
    )
    assert sorted(set(learn.rates)) == pytest.approx([1e-3, 5e-3, 1e-2])
    with pytest.raises(ValueError, match="'codebook'"):
        training(rates={'codebook': 0.5})  # moving averages are no parameters


def test_the_hook_is_gone_after_a_stop():
    learn = training(cbs=[Stop(3)])
    with pytest.raises(KeyboardInterrupt):
        learn.fit(10)
    assert not learn.bare.codebook._forward_hooks and learn.history[-1]['active'] >= 1


@pytest.mark.parametrize(
    'codebook', [None, lambda: Codebook(12, 6, revive=1.0)], ids=['averages', 'learned']
)
def test_resume_is_bit_for_bit(tmp_path, codebook):
    whole, first = training(codebook).fit(12), training(codebook, cbs=[Stop(5)])
    with pytest.raises(KeyboardInterrupt):
        first.fit(12)
    first.cbs.pop()
    first.save(tmp_path)
    again = training(codebook).load(tmp_path)
    assert again.bare.codebook.started and again.step == 5
    again.fit(12)
    assert same(held(whole.bare), held(again.bare)) and not same(held(first.bare), held(again.bare))
    plain = lambda h: [{k: v for k, v in r.items() if k != 'seconds'} for r in h]
    assert plain(whole.history) == plain(again.history)


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance=dict(images=0, scalars=0))
    found.Reload()
    return found


def test_reconstructions_in_tensorboard(tmp_path):
    import numpy as np
    from PIL import Image

    images = IMAGES(3)
    learn = training(cbs=[ReconstructionGrid(tmp_path, images, every=4)]).fit(9)
    found = events(tmp_path)
    assert [e.step for e in found.Scalars('mse')] == list(range(1, 10)) and {
        'mse',
        'codebook',
        'commitment',
        'perplexity',
        'active',
        'code_norm',
        'lr',
    } <= set(found.Tags()['scalars'])
    assert [e.value for e in found.Scalars('perplexity')] == pytest.approx(
        [r['perplexity'] for r in learn.history]
    )
    grids = found.Images('reconstruction')
    assert [e.step for e in grids] == [4, 8] and learn.bare.training
    grid = np.asarray(Image.open(io.BytesIO(grids[0].encoded_image_string)))
    assert grid.shape == (2 * 18 + 2, 3 * 18 + 2, 3)  # two rows of three, two pixels between
    for k in range(3):
        assert np.array_equal(
            grid[2:18, 2 + 18 * k : 18 + 18 * k, 0], (images[k, 0].numpy() * 255).astype(np.uint8)
        )
    below = grid[20:36, 2:18, 0]
    assert below.std() > 0 and not np.array_equal(below, grid[2:18, 2:18, 0])


def test_each_grid_once(tmp_path):
    training(cbs=[ReconstructionGrid(tmp_path, IMAGES(2), every=4)]).fit(8)
    assert [e.step for e in events(tmp_path).Images('reconstruction')] == [4, 8]


# memory, last: the two processes are done by then -------------------------------------------------


def test_memory():
    book = Codebook(16384, 4, decay=0.9, init='normal').train()
    z = torch.randn(1, 100_000, 4)
    assert (
        peak_memory(lambda: book(z)) < (64 + 16) * 2**20
    )  # all at once: 6,250 MiB; beside the chunk, some copies of the tokens and codes
    tokens = torch.randn(5000, 4)
    assert 3.9 * 2**20 < peak_memory(lambda: nearest_code(tokens, book.codes, 4)) < 6 * 2**20


# a saved model comes back as the same function ----------------------------------------------------


@pytest.mark.parametrize('cosine', [False, True])
@pytest.mark.parametrize('decay', [0.9, None])
def test_a_loaded_codebook_is_the_same_function(cosine, decay):
    "Whether lengths count is told by no shape."
    book, other = (
        Codebook(9, 4, decay, cosine=cosine, init='normal'),
        Codebook(9, 4, decay, cosine=not cosine, init='normal'),
    )
    if decay is None:
        with torch.no_grad():
            book.codes.mul_(torch.rand(9, 1) + 0.5)
    z = 3 * torch.randn(2, 50, 4)
    assert str(other.load_state_dict(book.state_dict())) == '<All keys matched successfully>'
    a, b = book.eval()(z), other.eval()(z)
    assert (
        other.cosine is cosine
        and torch.equal(a.indices, b.indices)
        and torch.equal(a.quantized, b.quantized)
        and torch.equal(a.commitment_loss, b.commitment_loss)
    )
    with pytest.raises(RuntimeError, match='Missing.*_extra_state'):
        other.load_state_dict({k: v for k, v in book.state_dict().items() if k != '_extra_state'})


def test_a_loaded_fsq_has_the_same_levels():
    book, other, z = FSQ((3, 8, 5), 6), FSQ((8, 5, 3), 6), torch.randn(2, 40, 6)
    assert str(other.load_state_dict(book.state_dict())) == '<All keys matched successfully>'
    a, b = book(z), other(z)
    assert (
        torch.equal(a.indices, b.indices)
        and torch.equal(a.quantized, b.quantized)
        and torch.equal(other.lookup(a.indices), book.lookup(a.indices))
    )
    bigger = FSQ((8, 8, 5), 6)
    bigger.load_state_dict(book.state_dict())
    assert (
        bigger.num_codes == 120
        and torch.equal(bigger(z).indices, a.indices)
        and len(book.state_dict()['levels']) == 3
    )
    assert torch.equal(book.lookup(torch.arange(120)), bigger.lookup(torch.arange(120)))
    with pytest.raises(ValueError, match='expected 0 to 119'):
        bigger.lookup(torch.tensor([120]))
    with pytest.raises(RuntimeError, match='Missing.*levels'):
        other.load_state_dict({k: v for k, v in book.state_dict().items() if k != 'levels'})


@pytest.mark.parametrize(
    'numbers', [dict(mean=0.2, std=0.7), dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))]
)
def test_a_loaded_tokenizer_is_the_same_function(numbers):
    def make(**kw):
        return ViTCodebook(ViTEncoder(16, 4, 16, 1, 2, 3), FSQ((4, 3), 6), 16, 1, 2, **kw).eval()

    model, other, x = make(**numbers), make(), torch.rand(2, 3, 16, 16)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x)[0], other(x)[0]) and torch.equal(model.encode(x), other.encode(x))
    with pytest.raises(RuntimeError, match='Missing.*mean.*std'):
        make().load_state_dict(
            {k: v for k, v in model.state_dict().items() if k not in ('mean', 'std')}
        )
    for bad in (dict(std=0), dict(mean=float('nan')), dict(mean=(0.1, 0.2))):
        with pytest.raises(ValueError, match=f'^{next(iter(bad))}'):
            make(**bad)


def test_a_tokenizer_made_of_a_mae_has_its_statistics():
    mae = MAE(16, 4, 16, 1, 2, 16, 1, 2, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    model = ViTCodebook(mae, Codebook(12, 6, init='normal'), 16, 1, 2)
    assert (
        model.encoder is mae.encoder
        and torch.equal(model.mean, mae.mean)
        and torch.equal(model.std, mae.std)
        and model.std.data_ptr() != mae.std.data_ptr()
    )


# codes that come back to life, frozen ones, tokens without length ---------------------------------


@pytest.mark.parametrize('rotation', [False, True])
@pytest.mark.parametrize('cosine', [False, True])
@pytest.mark.parametrize('decay', [None, 0.5])
def test_revival_leaves_the_gradient_of_its_step_alone(decay, cosine, rotation):
    "As without revival, from the same codes; and several steps on, codes came back."
    made = []
    for revive in (0, 2.0):
        torch.manual_seed(1)
        made.append(
            Codebook(
                16, 8, decay, cosine=cosine, rotation=rotation, revive=revive, init='normal'
            ).train()
        )
    z, grads = torch.randn(2, 10, 8), []
    for book in made:
        book.counts.fill_(1.5)  # below 2: what is not in the batch comes back to life
        before, tokens = book.codes.detach().clone(), z.clone().requires_grad_()
        out = book(tokens)
        (out.quantized.square().sum() + out.codebook_loss + out.commitment_loss).backward()
        grads.append([tokens.grad, *(p.grad for p in book.parameters())])
    assert (
        not torch.equal(made[1].codes, before)
        and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        and grads[0][0].abs().sum() > 0
    )
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1)), *made[1].parameters()], 0.1)
    for _ in range(5):
        opt.zero_grad()
        out = made[1](torch.randn(2, 10, 8, requires_grad=True))
        (out.codebook_loss + out.commitment_loss).backward()
        opt.step()
    assert torch.isfinite(made[1].codes).all()


@pytest.mark.parametrize('init', ['normal', 'kmeans'])
@pytest.mark.parametrize(
    'kw',
    [
        dict(decay=0.9),
        dict(decay=0.9, revive=3.0),
        dict(),
        dict(revive=3.0),
        dict(decay=0.5, cosine=True, revive=1.0),
    ],
)
def test_a_frozen_codebook_does_not_move(kw, init):
    book = Codebook(16, 4, init=init, **kw).train()
    if init == 'kmeans':
        book.start(torch.randn(40, 4))
    assert book.requires_grad_(False) is book
    before = held(book)
    a, b = (
        book(torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(1))),
        book.eval()(torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(1))),
    )
    assert same(held(book), before) and all(
        torch.equal(x, y) for x, y in zip(a, b)
    )  # as in evaluation mode, use counted too
    book.requires_grad_(True).train()(torch.randn(1, 64, 4))
    assert not same(held(book), before)


def test_a_frozen_codebook_is_not_started_by_a_batch():
    book = Codebook(16, 4, decay=0.9).requires_grad_(False).train()
    before = held(book)
    with pytest.raises(RuntimeError, match='no codes yet'):
        book(torch.randn(1, 64, 4))
    assert same(held(book), before) and not book.started
    book.start(torch.randn(64, 4))  # whoever asks for it gets it
    assert book(torch.randn(1, 64, 4)).quantized.shape == (1, 64, 4)


def test_a_frozen_tokenizer_freezes_its_codebook():
    model = own(Codebook(12, 6, decay=0.9, revive=5.0, init='normal')).train().requires_grad_(False)
    before = held(model)
    model(torch.rand(4, 1, 16, 16))
    assert same(held(model), before)
    model.requires_grad_(True)(torch.rand(4, 1, 16, 16))
    assert not same(held(model), before)


def test_rotation_without_an_angle():
    """A token or a code of length 0: the code comes out, and the gradient goes straight through;
    its neighbours are turned as ever."""
    z, q, g = torch.randn(6, 4), torch.randn(6, 4), torch.randn(6, 4)
    z[1], z[2], q[3], z[4], q[4] = 0, 1e-9, 0, 0, 0
    a, b = z.clone().requires_grad_(), z[[0, 5]].clone().requires_grad_()
    out = rotate_to(a, q)
    (out * g).sum().backward()
    (rotate_to(b, q[[0, 5]]) * g[[0, 5]]).sum().backward()
    assert close(out, q, 1e-6) and torch.equal(out[1], q[1]) and torch.equal(a.grad[1:5], g[1:5])
    assert torch.equal(a.grad[[0, 5]], b.grad) and not close(a.grad[0], g[0], 1e-2)
    length = a.grad[[0, 5]].norm(dim=1) / g[[0, 5]].norm(
        dim=1
    )  # a rotation and a scaling by |q|/|z|
    assert close(length, q[[0, 5]].norm(dim=1) / z[[0, 5]].norm(dim=1), 1e-4)


@pytest.mark.parametrize('decay', [0.9, None])
@pytest.mark.parametrize('cosine', [False, True])
@pytest.mark.parametrize('rotation', [False, True])
def test_zero_tokens_in_a_codebook(decay, cosine, rotation):
    book, z = (
        Codebook(8, 4, decay, cosine=cosine, rotation=rotation, init='normal').eval(),
        torch.randn(1, 6, 4),
    )
    z[0, 2] = 0
    z.requires_grad_()
    out = book(z)
    (out.quantized.sum() + out.commitment_loss).backward()
    assert (
        close(out.quantized, book.lookup(out.indices), 1e-5)
        and torch.isfinite(z.grad).all()
        and z.grad[0, 2].abs().max() < 5
        and z.grad[0, 2].abs().max() > 0.5
    )


# precisions ---------------------------------------------------------------------------------------

DTYPES = [torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    'kw',
    [
        dict(decay=0.9),
        dict(decay=0.9, revive=1.0, cosine=True),
        dict(),
        dict(revive=1.0),
        dict(cosine=True, rotation=True, revive=1.0),
        dict(decay=0.8, rotation=True),
    ],
)
def test_codebooks_in_other_precisions(kw, dtype):
    torch.manual_seed(1)
    book = Codebook(9, 4, init='normal', **kw).to(dtype).train()
    z = torch.randn(2, 30, 4).to(dtype).requires_grad_()
    codes = book.vectors().detach().double().clone()
    tokens = F.normalize(z.detach().double(), dim=-1) if kw.get('cosine') else z.detach().double()
    out = book(z)
    (out.quantized.sum() + out.codebook_loss + out.commitment_loss).backward()
    eps = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6
    distance = torch.cdist(tokens, codes[None].expand(2, -1, -1))
    assert (
        out.quantized.dtype == dtype
        and (
            distance.gather(-1, out.indices[..., None])[..., 0] <= distance.min(-1).values + 8 * eps
        ).all()
    )
    assert (
        (out.quantized.double() - codes[out.indices]).abs().max() < 8 * eps
        and torch.isfinite(z.grad).all()
        and z.grad.abs().sum() > 0
    )
    assert torch.isfinite(book.codes).all() and all(
        p.grad is not None and p.grad.dtype == dtype for p in book.parameters()
    )
    assert book.eval().lookup(out.indices).dtype == dtype


@pytest.mark.parametrize('dtype', DTYPES)
def test_averages_follow_in_half_precision_too(dtype):
    "Steps of 1 % of what is left are smaller than half precision can add."
    book = Codebook(1, 4, decay=0.99, init='normal').to(dtype).train()
    z = torch.tensor([1.0, -2.0, 3.0, 0.5]).expand(1, 8, 4).to(dtype)
    for _ in range(1000):
        book(z)
    assert (
        book.codes[0].double() - z[0, 0].double()
    ).abs().max() < 0.02 and book.counts.item() == pytest.approx(8, abs=0.01)
    assert (
        book.codes.dtype == dtype
        and book.double().codes.dtype == book.counts.dtype == torch.float64
    )


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('args', [((5, 4, 3),), ((5, 4, 3), 6)])
def test_fsq_in_other_precisions(args, dtype):
    book = FSQ(*args).to(dtype)
    z = torch.randn(2, 20, book.dim).to(dtype).requires_grad_()
    out = book(z)
    out.quantized.square().sum().backward()
    assert (
        out.quantized.dtype == dtype
        and torch.isfinite(z.grad).all()
        and z.grad.abs().sum() > 0
        and all(p.grad.dtype == dtype for p in book.parameters())
    )
    assert (book.lookup(out.indices).double() - out.quantized.double()).abs().max() < (
        1e-6 if dtype == torch.float64 else 0.02
    )


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    'make',
    [
        lambda: Codebook(12, 6, decay=0.9, init='normal'),
        lambda: Codebook(12, 6, init='normal'),
        lambda: FSQ((3, 3), 6),
        lambda: FSQ((3, 3)),
    ],
)
def test_tokenizers_in_other_precisions(make, dtype):
    model, x = own(make()).to(dtype).train(), torch.rand(2, 1, 16, 16).to(dtype)
    x_hat, out = model(x)
    (x_hat.square().mean() + out.codebook_loss + out.commitment_loss).backward()
    assert x_hat.dtype == dtype and all(
        torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None
    )
    with torch.no_grad():
        drawn = model.eval().decode(model.encode(x))
    assert drawn.dtype == dtype and (drawn.double() - model(x)[0].double()).abs().max() < 0.05


# numbers ------------------------------------------------------------------------------------------


def test_sizes_from_numpy():
    books = []
    for k, d in ((9, 4), (np.int64(9), np.int64(4))):
        torch.manual_seed(1)
        books.append(Codebook(k, d, np.float64(0.9), np.float32(0.25), np.int64(1), init='normal'))
    z = torch.randn(1, 20, 4)
    assert (
        all(torch.equal(a, b) for a, b in zip(books[0].eval()(z), books[1].eval()(z)))
        and type(books[1].num_codes) is int
        and type(books[1].revive) is float
    )
    book = FSQ((np.int64(5), np.int64(4)), np.int64(3))
    assert (
        book.num_codes == 20
        and type(book.dim) is int
        and book(torch.randn(1, 7, 3)).indices.max() < 20
    )
    model = vit_codebook_tiny(
        np.int64(16),
        np.int64(4),
        np.int64(1),
        Codebook(4, 4, init='normal'),
        np.int64(16),
        np.int64(1),
        np.int64(2),
    )
    assert model(torch.rand(1, 1, 16, 16))[0].shape == (1, 1, 16, 16)
    torch.manual_seed(2)
    one = kmeans(
        torch.randn(20, 3, generator=torch.Generator().manual_seed(1)), np.int64(4), np.int64(3)
    )
    torch.manual_seed(2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            one, kmeans(torch.randn(20, 3, generator=torch.Generator().manual_seed(1)), 4, 3)
        )
    )


NAN = float('nan')


@pytest.mark.parametrize(
    'call, says',
    [
        (lambda: Codebook(4, 2, commitment=-1), 'commitment is -1'),
        (lambda: Codebook(4, 2, commitment=NAN), 'commitment is nan'),
        (lambda: Codebook(4, 2, revive=-1), 'revive is -1'),
        (lambda: Codebook(4, 2, revive=NAN), 'revive is nan'),
        (lambda: Codebook(4.5, 2), 'num_codes is 4.5'),
        (lambda: FSQ((5, 4.5)), 'levels is 4.5'),
        (lambda: FSQ((5, NAN)), 'levels is nan'),
        (lambda: FSQ((5, 4), 0), 'dim is 0'),
        (lambda: FSQ(()), 'levels'),
        (lambda: kmeans(torch.randn(8, 2), 0), 'k is 0'),
        (lambda: kmeans(torch.randn(8, 2), 2, 0), 'iters is 0'),
        (lambda: kmeans(torch.full((8, 2), NAN), 2), 'tokens holds 16 values'),
        (lambda: nearest_code(torch.randn(3, 2), torch.zeros(0, 2)), 'codes holds none'),
        (lambda: nearest_code(torch.randn(3, 2), torch.zeros(4, 2), mib=NAN), 'mib is nan'),
        (lambda: nearest_code(torch.randn(3, 2), torch.zeros(4, 2), mib=-1), 'mib is -1'),
        (lambda: tokenizer_loss(weight=NAN), 'weight is nan'),
        (lambda: tokenizer_loss(weight=-1), 'weight is -1'),
        (lambda: code_bits(torch.ones(4), torch.zeros(0, dtype=torch.int64)), 'indices holds none'),
        (lambda: code_bits(torch.tensor([1.0, -5]), torch.tensor([0])), 'counts holds'),
        (lambda: code_bits(torch.tensor([1.0, NAN]), torch.tensor([0])), 'counts holds'),
        *[
            (
                lambda kw=kw: codebook_learner(
                    own(), DataLoader(TensorDataset(torch.rand(8, 1, 16, 16)), 4), cpu=True, **kw
                ),
                f'{k} is',
            )
            for kw in (dict(lr=-1), dict(lr=NAN), dict(weight_decay=-1), dict(warmup=NAN))
            for k in kw
        ],
    ],
)
def test_numbers_out_of_range(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    'make',
    [
        lambda: Codebook(4, 2, decay=0.9, init='normal'),
        lambda: Codebook(4, 2, decay=0.9),
        lambda: FSQ((4, 3)),
    ],
)
@pytest.mark.parametrize(
    'z, says',
    [
        (torch.zeros(0, 5, 2), 'z has shape'),
        (torch.zeros(2, 0, 2), 'z has shape'),
        (torch.full((1, 8, 2), NAN), 'z holds 16 values'),
    ],
)
def test_no_tokens_and_no_numbers(make, z, says):
    book = make()
    before = held(book)
    for mode in (True, False):
        with pytest.raises(ValueError, match=says):
            book.train(mode)(z)
    assert same(held(book), before)


if __name__ == '__main__':
    worker(int(sys.argv[1]), sys.argv[2])
