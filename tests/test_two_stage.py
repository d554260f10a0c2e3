"""What lesson 10 does not teach: formulas derived anew, gradients, resumed runs, which truth is
read, files of the model, bad input."""

import copy, inspect, json, os, pickle

from common import close, gen, held, same, shake
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from restore_lib.audit import reads_truth
from restore_lib.tracer import audit_gradient
from restore_lib.dmae import DMAE, denoise, load_dmae
from restore_lib.learner import Callback
from restore_lib.metrics import psnr
from restore_lib.model_files import load_model, save_model
from restore_lib.patching import Block, sincos_pos_embed
from restore_lib.two_stage import (
    ConditionalBlock, ConditionalDecoder, FiLM, ResidualEncoder, TwoStageDMAE,
    first_stage_learner, first_stage_loss, pixel_head, two_stage_learner, two_stage_loss,
)
from restore_lib.two_stage_parts import (
    Adversary, Degradation, PatchCritic, ShareSchedule, fourier_residual, gradient_balance,
)

SIZES = dict(img_size=16, patch=4, dim=32, depth=1, heads=4, dec_dim=16, dec_depth=2, dec_heads=2)
TASKS = ('denoise', 'salt_pepper', 'block', 'blur', 'rain', 'x4', 'mixed')
KINDS = ('deployed', 'truth', 'learned', 'input', 'both', 'none', 'other')
PLACES = ('end', 'branches')


pytestmark = pytest.mark.usefixtures('seed')


def dmae(**kw):
    return shake(DMAE(**(SIZES | kw)))


def fresh(d=None, **kw):
    return TwoStageDMAE.from_pretrained(d or dmae(), **(dict(cond=8) | kw))[0]


def awake(d=None, **kw):
    "A model whose condition counts: nothing of it is zero any more."
    model = fresh(d, **kw)
    shake(model.decoder2)
    model.residual_encoder and shake(model.residual_encoder)
    return model


def pair(b=3, c=3, hw=(16, 16), s=0.1):
    return (x := torch.rand(b, c, *hw)), x + s * torch.randn_like(x)


# modulation ---------------------------------------------------------------------------------------


def test_film_by_hand():
    film, x, e = shake(FiLM(5, 3)), torch.randn(2, 4, 5), torch.randn(2, 4, 3)
    w, b, out = (
        film.linear.weight.detach().double().numpy(),
        film.linear.bias.detach().double().numpy(),
        film(x, e),
    )
    for k in range(2):
        for t in range(4):
            for j in range(5):
                gamma, beta = (
                    w[j] @ e[k, t].double().numpy() + b[j],
                    w[5 + j] @ e[k, t].double().numpy() + b[5 + j],
                )
                assert out[k, t, j].item() == pytest.approx(
                    (1 + gamma) * x[k, t, j].item() + beta, abs=1e-5
                )
    one = film(x, e[:, :1])  # one vector for all tokens
    assert close(one, film(x, e[:, :1].expand(-1, 4, -1)), 1e-6) and not close(one, out)


def test_film_starts_as_the_identity_or_not():
    x, e = torch.randn(2, 4, 6), torch.randn(2, 1, 3)
    assert torch.equal(FiLM(6, 3)(x, e), x)
    film = FiLM(6, 3, identity=False)
    gamma, beta = film.linear(e).chunk(2, -1)
    assert (
        close(film(x, e), gamma * x + beta, 1e-6)
        and (film(x, e) - x).norm() > 0.5 * x.norm()
        and film.linear.weight.abs().sum() > 0
    )


def plain(block):
    "A Block with the weights of a ConditionalBlock."
    out = Block(block.norm1.normalized_shape[0], block.attn.heads)
    out.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith('film')})
    return out


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('tokens', [1, 5])
def test_block_starts_as_the_plain_one(place, tokens):
    x, e = torch.randn(3, 5, 16), torch.randn(3, tokens, 8)
    block = ConditionalBlock(16, 4, 8, place)
    assert torch.equal(block(x, e), plain(block)(x)) and not close(block(x, e), x, 1e-3)
    other = ConditionalBlock(16, 4, 8, place, identity=False)
    assert (other(x, e) - plain(other)(x)).abs().mean() > 1e-2 and not close(
        other(x, e), other(x, 2 * e), 1e-3
    )


@pytest.mark.parametrize('place', PLACES)
def test_identity_start_learns(place):
    block, x, e = (
        ConditionalBlock(16, 4, 8, place),
        torch.randn(3, 5, 16),
        torch.randn(3, 1, 8, requires_grad=True),
    )
    block(x, e).square().sum().backward()
    film = block.film.linear if place == 'end' else block.film
    parts = film.weight.grad.abs().sum(1).chunk(2 if place == 'end' else 6)
    assert (
        all((p > 0).all() for p in parts) and not e.grad.any()
    )  # the weights first, through them later the condition


def test_block_without_condition_is_plain():
    for cond in (None, 0):
        block, x = shake(ConditionalBlock(16, 4, cond)), torch.randn(2, 5, 16)
        assert torch.equal(block(x), plain(block)(x)) and not any(
            'film' in k for k in block.state_dict()
        )


@pytest.mark.parametrize('tokens', [1, 5])
def test_branches_by_hand(tokens):
    """adaLN's scale, shift and gate around torch's own attention with the same weights;
    the gate is 1 + g. (bench/two_stage.py has the parity with timm's parts.)"""
    block, x, e = (
        shake(ConditionalBlock(16, 4, 8)),
        torch.randn(3, 5, 16),
        torch.randn(3, tokens, 8),
    )
    attn, own = nn.MultiheadAttention(16, 4, batch_first=True), block.state_dict()
    attn.load_state_dict(
        {
            'in_proj_weight': own['attn.qkv.weight'],
            'in_proj_bias': own['attn.qkv.bias'],
            'out_proj.weight': own['attn.proj.weight'],
            'out_proj.bias': own['attn.proj.bias'],
        }
    )
    mlp = lambda t: F.linear(
        F.gelu(F.linear(t, own['mlp.fc1.weight'], own['mlp.fc1.bias'])),
        own['mlp.fc2.weight'],
        own['mlp.fc2.bias'],
    )
    norm = lambda t, n: (
        (t - t.mean(-1, keepdim=True))
        / (t.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        * n.weight
        + n.bias
    )
    scale1, shift1, gate1, scale2, shift2, gate2 = (
        F.linear(e, own['film.weight'], own['film.bias']).unflatten(-1, (6, 16)).unbind(-2)
    )
    seen = norm(x, block.norm1) * (1 + scale1) + shift1
    hand = x + attn(seen, seen, seen, need_weights=False)[0] * (1 + gate1)
    hand = hand + mlp(norm(hand, block.norm2) * (1 + scale2) + shift2) * (1 + gate2)
    assert close(block(x, e), hand, 1e-4) and not close(hand, plain(block)(x), 1e-2)


def test_end_is_film_behind_the_plain_block():
    block, x, e = (
        shake(ConditionalBlock(16, 4, 8, 'end')),
        torch.randn(3, 5, 16),
        torch.randn(3, 5, 8),
    )
    gamma, beta = F.linear(e, block.film.linear.weight, block.film.linear.bias).split(16, -1)
    assert close(block(x, e), (1 + gamma) * plain(block)(x) + beta)


# the residual as a condition ----------------------------------------------------------------------


@pytest.mark.parametrize('norm', ['group', 'batch'])
@pytest.mark.parametrize('pool, vectors', [(1, 1), (4, 24), (None, 24)])
@pytest.mark.parametrize('c', [1, 6])
def test_residual_encoder_shapes(pool, vectors, norm, c):
    e = ResidualEncoder(c, 10, pool, norm, width=8)(torch.randn(2, c, 16, 24), (4, 6))
    assert e.shape == (2, vectors, 10) and torch.isfinite(e).all() and e.std() > 0


def test_a_map_is_enlarged_to_the_tokens():
    "By hand: means over 4 x 4 fields of the features; each token takes the field that it lies in."
    enc, r = shake(ResidualEncoder(3, 10, 4, width=8)), torch.randn(2, 3, 64, 128)
    e, f = enc(r, (4, 8)).unflatten(1, (4, 8)), enc.convs(r)  # 8 x 16 features
    assert f.shape[2:] == (8, 16)
    for row in range(4):
        for col in range(8):
            field = f[:, :, 2 * row : 2 * row + 2, col // 2 * 4 : col // 2 * 4 + 4].mean((2, 3))
            assert close(
                e[:, row, col], F.gelu(F.linear(field, enc.linear.weight, enc.linear.bias)), 1e-4
            )


@pytest.mark.parametrize('patch', [4, 8])
def test_a_vector_for_each_token_sits_where_its_patch_is(patch):
    """On a rectangle, so that rows and columns cannot be exchanged. With running statistics only
    what is near counts; the convolutions' reach is wider to the right and below."""
    enc = shake(ResidualEncoder(3, 10, None, 'batch', width=8)).eval()
    r, grid = torch.randn(1, 3, 5 * patch, 9 * patch), (5, 9)
    for row, col in ((0, 0), (3, 7), (4, 2)):
        other = r.clone()
        other[..., row * patch : (row + 1) * patch, col * patch : (col + 1) * patch] += 3
        moved = (enc(other, grid) - enc(r, grid)).norm(dim=2).unflatten(1, grid)[0]
        rows, cols = (moved > 0).nonzero().unbind(1)
        assert (
            moved[row, col] > 0.2 * moved.max()
            and set((rows - row).tolist()) <= {-1, 0, 1, 2}
            and set((cols - col).tolist()) <= {-1, 0, 1, 2}
        )


def test_batchnorm_remembers_and_groupnorm_sees_one_image():
    r, grid = torch.randn(4, 3, 16, 16) * torch.arange(1, 5)[:, None, None, None], (4, 4)
    batch, group = (ResidualEncoder(3, 10, 1, norm, width=8) for norm in ('batch', 'group'))
    assert close(group(r[:1], grid), group(r, grid)[:1], 1e-5)  # in training, too
    assert not close(batch(r[:1], grid), batch(r, grid)[:1], 1e-2)
    before = batch.eval()(r, grid)
    assert close(batch(r[:1], grid), before[:1], 1e-5) and not close(
        batch.train()(r, grid), before, 1e-2
    )
    for _ in range(5):
        batch.train()(5 * r + 2, grid)
    assert not close(
        batch.eval()(r, grid), before, 1e-2
    )  # nothing but the running statistics has changed
    before = group.eval()(r, grid)
    for _ in range(5):
        group.train()(5 * r + 2, grid)
    assert torch.equal(group.eval()(r, grid), before)


@pytest.mark.parametrize(
    'call, says',
    [
        (lambda: ResidualEncoder(3, 8, norm='layer'), "norm is 'layer'"),
        (lambda: ResidualEncoder(3, 8, pool=0), 'pool is 0'),
        (lambda: ResidualEncoder(3, 8, pool=1.5), 'pool is 1.5'),
        (lambda: ConditionalBlock(16, 4, 8, 'start'), "place is 'start'"),
        (lambda: fresh(residual='oracle'), "residual is 'oracle'.*'deployed'"),
        (lambda: fresh(place='start'), "place is 'start'"),
        (lambda: fresh(dmae(norm_pix_loss=True)), 'norm_pix_loss'),
        (lambda: Degradation('fog'), "task is 'fog'.*'denoise'.*'mixed'"),
        (lambda: fourier_residual(torch.rand(1, 1, 4, 4), 3), 'power is 3'),
        (lambda: two_stage_learner(fresh(), loader(), stage='C', cpu=True), "stage is 'C'"),
        (lambda: two_stage_learner(fresh(), loader(), pixel='l3', cpu=True), "pixel is 'l3'"),
    ],
)
def test_wrong_words(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# the decoder --------------------------------------------------------------------------------------


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('cls', [0, 1])
@pytest.mark.parametrize('tokens', [1, 8])
def test_decoder_by_hand(place, cls, tokens):
    """Positions, then the blocks; with a vector for each patch the class token gets zeros,
    with a single one it gets that."""
    dec, z, e = (
        shake(ConditionalDecoder(32, 16, 2, 2, 12, 8, place)),
        torch.randn(3, 8 + cls, 32),
        torch.randn(3, tokens, 8),
    )
    t = F.linear(z, dec.decoder_embed.weight, dec.decoder_embed.bias) + sincos_pos_embed(
        16, (2, 4), bool(cls)
    )
    each = torch.cat([torch.zeros(3, cls, 8), e], 1) if tokens > 1 else e.expand(-1, 8 + cls, -1)
    for block in dec.decoder_blocks:
        t = block(t, each)
    t = F.linear(
        F.layer_norm(t, (16,), dec.decoder_norm.weight, dec.decoder_norm.bias, 1e-6),
        dec.decoder_pred.weight,
        dec.decoder_pred.bias,
    )
    out = dec(z, (2, 4), e)
    assert out.shape == (3, 8, 12) and close(out, t[:, cls:], 1e-4)
    assert not close(out, dec(z, (4, 2), e), 1e-3)


@pytest.mark.parametrize('cls', [0, 1])
def test_vector_k_modulates_token_k(cls):
    "One block with FiLM at its end: nothing mixes the tokens behind it."
    dec, z, e = (
        shake(ConditionalDecoder(32, 16, 1, 2, 12, 8, 'end')),
        torch.randn(1, 6 + cls, 32),
        torch.randn(1, 6, 8),
    )
    for k in range(6):
        other = e.clone()
        other[:, k] += 1
        assert ((dec(z, (2, 3), other) - dec(z, (2, 3), e)).abs().sum(2)[0] > 0).tolist() == [
            i == k for i in range(6)
        ]


@pytest.mark.parametrize('n', [6, 7, 10, 1])
def test_wrong_number_of_tokens(n):
    with pytest.raises(ValueError, match=f'latent has {n} tokens; expected 8 for 2 x 4 patches'):
        ConditionalDecoder(32, 16, 1, 2, 12)(torch.randn(2, n, 32), (2, 4))


@pytest.mark.parametrize('cond', [None, 8])
def test_decoder_draws_as_the_dmaes_own(cond):
    d = dmae()
    model, z = fresh(d, cond=8, conditional=cond is not None), torch.randn(2, 17, 32)
    for dec in (model.decoder1, model.decoder2):
        assert torch.equal(dec(z, (4, 4), cond and torch.randn(2, 1, 8)), d.decode(z))


# the model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('residual', KINDS)
@pytest.mark.parametrize(
    'place, pool, norm',
    [('branches', 1, 'group'), ('end', None, 'batch'), ('branches', 4, 'group')],
)
def test_from_pretrained_changes_nothing(residual, place, pool, norm):
    "Stage one is the DMAE's own drawing, stage two is stage one, exactly."
    d, (x, y) = dmae(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)), pair()
    model, report = TwoStageDMAE.from_pretrained(d, 8, pool, norm, place, residual=residual)
    x_hat, refined = model.eval()(y)
    assert (
        torch.equal(x_hat, denoise(d, y))
        and torch.equal(refined, x_hat)
        and torch.equal(model(y, x)[1], x_hat)
    )
    film = [k for k in model.decoder2.state_dict() if 'film' in k]
    assert (
        set(report.missing) == set(film)
        and len(film) == 4
        and not report
        and not report.mismatched
        and 0.3 < report.share < 1
        and 'film' in repr(report)
    )


def test_default_start_is_another_image():
    (_, y), d = pair(), dmae()
    for place in PLACES:
        x_hat, refined = fresh(d, place=place, identity=False)(y)
        assert (refined - x_hat).abs().mean() > 1e-2


def test_without_condition():
    d = dmae()
    model, report = TwoStageDMAE.from_pretrained(d, conditional=False)
    assert (
        report
        and report.share == 1
        and model.residual_encoder is None
        and torch.equal(*model(pair()[1]))
    )
    with torch.no_grad():
        model.decoder2.decoder_pred.bias.add_(1)
    x_hat, refined = model(pair()[1])
    assert close(refined - x_hat, torch.full_like(x_hat, 0.5), 1e-4)  # std is .5


@pytest.mark.parametrize(
    'kw, shapes',
    [
        (dict(img_size=(8, 24)), [(8, 24), (24, 8), (16, 16)]),
        (dict(), [(8, 24), (4, 4), (20, 12)]),
        (dict(channels=1), [(16, 16), (4, 32)]),
    ],
)
@pytest.mark.parametrize('pool', [1, 4, None])
def test_rectangles_and_other_sizes(kw, shapes, pool):
    d, c = dmae(**kw), kw.get('channels', 3)
    model = awake(d, pool=pool)
    for hw in shapes:
        y = torch.rand(2, c, *hw)
        x_hat, refined = model(y)
        assert (
            x_hat.shape == refined.shape == y.shape
            and torch.isfinite(refined).all()
            and not close(x_hat, refined, 1e-3)
        )
        if hw == tuple(4 * g for g in d.encoder.grid):
            assert torch.equal(x_hat, denoise(d, y))
    with pytest.raises(ValueError, match='pad'):
        model(torch.rand(1, c, 17, 16))
    with pytest.raises(ValueError, match='channels'):
        model(torch.rand(1, 5, 16, 16))


@pytest.mark.parametrize('cond', [8, 256])
def test_any_width_of_the_condition(cond):
    assert torch.equal(*fresh(cond=cond)(pair()[1]))


def test_everything_is_a_copy():
    d = dmae()
    model, before, (_, y) = fresh(d), held(d), pair()
    drawn = denoise(d, y)
    assert not {p.data_ptr() for p in model.state_dict().values()} & {
        p.data_ptr() for p in d.state_dict().values()
    }
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(out.square().mean() for out in model(y)).backward()
    opt.step()
    assert (
        same(held(d), before)
        and torch.equal(denoise(d, y), drawn)
        and not close(model(y)[0], drawn, 1e-4)
    )
    with torch.no_grad():
        model.mean.add_(1)
    assert (d.mean == 0.5).all()


def test_half_precision():
    """Under autocast decoder one is as exact as the DMAE's:
    positions and what runs beside the branches stay in float32."""
    d, (_, y) = dmae(), pair()
    model, exact = fresh(d).eval(), denoise(d, y)
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        x_hat, refined = model(y)
    with torch.autocast('cpu', torch.bfloat16):
        own = denoise(d, y)
    assert (
        x_hat.dtype == torch.float32
        and torch.isfinite(refined).all()
        and close(x_hat, exact, 0.1)
        and not torch.equal(x_hat, exact)
    )
    assert (x_hat - exact).square().mean().item() == pytest.approx(
        (own - exact).square().mean().item(), rel=0.1
    )


# which residual -----------------------------------------------------------------------------------


def fed(model, *args, **kw):
    "What the residual encoder was given, and what came out."
    got = []
    handle = model.residual_encoder.register_forward_pre_hook(lambda m, a: got.append(a[0]))
    try:
        return *model(*args, **kw), got[0]
    finally:
        handle.remove()


@pytest.mark.parametrize('residual', KINDS)
def test_what_the_condition_is_made_of(residual):
    model, (x, y) = awake(residual=residual).eval(), pair()
    model.share = 0.3
    x_hat, refined, r, given = fed(model, y, x, estimate=True)
    wanted = dict(
        deployed=y - x_hat,
        truth=0.3 * (x - x_hat) + 0.7 * (y - x_hat),
        learned=r,
        input=y - 0.5,
        both=torch.cat([y - x_hat, y - 0.5], 1),
        none=torch.zeros_like(y),
        other=torch.stack([(y - x_hat)[k] for k in (2, 0, 1)]),
    )[residual]
    assert (
        close(given, wanted, 1e-6)
        and not given.requires_grad
        and (r is not None) == (residual == 'learned')
    )
    if r is not None:
        assert (
            r.shape == y.shape
            and r.requires_grad
            and close(r, model.estimator(torch.cat([y, x_hat], 1) - 0.5), 1e-5)
        )
    assert len(model(y)) == 2 and torch.equal(model(y, x)[1], refined)


@pytest.mark.parametrize('residual', KINDS)
def test_who_reads_the_truth(residual):
    model, (x, y) = awake(residual=residual).eval(), pair()
    assert bool(reads_truth(model, y, x)) == (residual == 'truth')
    assert not reads_truth(lambda y: model(y), y, x) and not reads_truth(
        lambda y, x: model(y)[1], y, x
    )
    if residual != 'truth':
        assert all(torch.equal(a, b) for a, b in zip(model(y), model(y, x)))


def test_kinds_differ_and_truth_without_a_share_is_deployed():
    d, (x, y) = dmae(), pair()
    base, out = awake(d).eval(), {}
    for kind in ('deployed', 'truth', 'input', 'none', 'other'):
        model = fresh(d, residual=kind).eval()
        model.load_state_dict(base.state_dict())
        out[kind] = model(y, x)[1]
        if kind == 'truth':
            assert torch.equal(model(y)[1], out['deployed'])
            model.share = 0.0
            assert torch.equal(model(y, x)[1], out['deployed'])
    kinds = list(out)
    assert not any(close(out[a], out[b], 1e-4) for k, a in enumerate(kinds) for b in kinds[:k])


# losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('pixel', ['mse', 'l1'])
@pytest.mark.parametrize('lam', [0.0, 0.5, 2.0])
def test_loss_by_hand(pixel, lam):
    model, (x, y) = awake(residual='learned').eval(), pair()
    x_hat, refined, r = (v.detach() for v in model(y, x, estimate=True))
    size = (
        (lambda d: d.double().square().mean())
        if pixel == 'mse'
        else (lambda d: d.double().abs().mean())
    )
    terms = two_stage_loss(
        model,
        (y, x),
        lam=lam,
        pixel=pixel,
        perceptual=(3.0, lambda a, b: (a - b).abs().amax((1, 2, 3))),
        fourier=0.7,
    )
    wanted = dict(
        refined=size(refined - x),
        first=lam * size(x_hat - x),
        estimate=(r - x + x_hat).double().square().mean(),
        perceptual=3 * (refined - x).abs().amax((1, 2, 3)).mean(),
        fourier=0.7 * np.abs(np.fft.fft2((y - refined).double().numpy(), norm='ortho')).mean(),
    )
    assert terms.keys() == wanted.keys() and all(
        terms[k].item() == pytest.approx(float(wanted[k]), rel=1e-4, abs=1e-7) for k in wanted
    )


def test_loss_has_only_what_is_asked_for():
    model, (x, y) = awake().eval(), pair()
    assert set(two_stage_loss(model, (y, x))) == {'refined', 'first'}
    for part in (model.encoder, model.decoder1):
        part.requires_grad_(False)
    assert set(two_stage_loss(model, (y, x), lam=0.0)) == {'refined'}


def test_pairs_and_degradations_are_the_same():
    model, (x, y) = awake().eval(), pair()
    assert (
        two_stage_loss(model, x, lambda v: y)
        == two_stage_loss(model, (x, x), lambda v: y)
        == two_stage_loss(model, [y, x])
    )
    d = dmae()
    for batch, degrade in ((x, lambda v: y), ((y, x), None)):
        assert first_stage_loss(d, batch, degrade).item() == pytest.approx(
            (denoise(d, y) - x).square().mean().item() * 4, rel=1e-4
        )


def test_fourier_residual():
    r = torch.randn(2, 3, 12, 10)
    assert fourier_residual(r, 2).item() == pytest.approx(r.square().mean().item(), rel=1e-5)
    n = r.double().numpy()
    k, l = (
        np.exp(-2j * np.pi * np.outer(range(12), range(12)) / 12),
        np.exp(-2j * np.pi * np.outer(range(10), range(10)) / 10),
    )
    assert fourier_residual(r).item() == pytest.approx(
        np.abs(k @ n @ l / np.sqrt(120)).mean(), rel=1e-5
    )
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(16) / 16).expand(1, 1, 16, 16)
    assert fourier_residual(wave) < 0.3 * fourier_residual(
        torch.randn(1, 1, 16, 16) * wave.std()
    )  # of equal energy: few frequencies are cheap
    for power in (1, 2):
        z = torch.zeros(1, 1, 4, 4, requires_grad=True)
        fourier_residual(z, power).backward()
        assert torch.isfinite(z.grad).all()
    assert torch.isfinite(fourier_residual(r.bfloat16()))


def test_adaptive_weight():
    w = torch.randn(4, 3, requires_grad=True)
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    out = gradient_balance((a * w).sum(), (b * w).sum(), w)
    assert (
        out.item() == pytest.approx((a.norm() / (b.norm() + 1e-4)).item(), rel=1e-5)
        and not out.requires_grad
        and w.grad is None
    )
    assert (
        gradient_balance((a * w).sum(), (b * w).sum() * 0, w) == 1e4
        and gradient_balance((a * w).sum(), (b * w).sum() * 1e-9, w, most=7.0) == 7
    )
    g = (b * w).sum()
    assert gradient_balance((a * w).sum(), g, w) > 0 and torch.autograd.grad(g, w)[0].equal(
        b
    )  # the graph is still there


def test_critic_sees_22_pixels():
    critic, x = shake(PatchCritic(3, 8)), torch.rand(1, 3, 64, 64, requires_grad=True)
    critic.layers[3] = nn.Identity()  # a norm looks at the whole picture
    out = critic(x)
    out[0, 0, 7, 7].backward()
    seen = x.grad.abs().sum((0, 1)) > 0
    assert out.shape == (1, 1, 15, 15) and seen.any(0).sum() == seen.any(1).sum() == 22


# the adversary ------------------------------------------------------------------------------------


def adversary(**kw):
    torch.manual_seed(5)
    return Adversary(PatchCritic(3, 8), **kw)


def test_the_restorers_step_is_not_the_critics():
    adv, (x, y) = adversary(weight=0.3), pair(hw=(16, 16))
    model = awake()
    x_hat, refined = model(y)
    last, nll = model.decoder2.decoder_pred.weight, F.mse_loss(refined, x)
    g = -adv.critic(refined).mean()
    wanted = 0.3 * gradient_balance(nll, g, last) * g
    terms = two_stage_loss(model, (y, x), lam=0.0, adversary=adv)
    assert terms['adversary'].item() == pytest.approx(wanted.item(), rel=1e-3)
    pull = lambda v: torch.autograd.grad(v, last, retain_graph=True)[0].norm().item()
    assert pull(terms['adversary']) == pytest.approx(
        0.3 * pull(terms['refined']), rel=2e-2
    )  # as hard at the last layer, but for the weight
    sum(terms.values()).backward()
    assert (
        all(p.grad is None and p.requires_grad for p in adv.critic.parameters())
        and model.encoder.patch_embed.weight.grad.abs().sum() > 0
    )


def test_the_critic_learns_from_what_it_was_shown():
    adv, (x, _) = adversary(lr=2e-3), pair(8)
    fake = (x * 0.3 + 0.5).requires_grad_()
    hinge = lambda: (F.relu(1 + adv.critic(fake)).mean() + F.relu(1 - adv.critic(x)).mean()).item()
    before = hinge()
    adv.pair = fake.detach(), x
    for _ in range(40):
        adv.after_step(None)
    assert (
        hinge() < 0.3 * before
        and adv.n == 40
        and fake.grad is None
        and adv.critic(x).mean() > adv.critic(fake).mean()
    )


def test_the_adversary_begins_late():
    adv, (x, y), model = adversary(start=2), pair(), awake()
    for k in range(4):
        term = two_stage_loss(model, (y, x), adversary=adv)['adversary']
        assert bool(term != 0) == (k >= 2)
        adv.after_step(None)
    with torch.no_grad():
        assert two_stage_loss(model, (y, x), adversary=adv)['adversary'] == 0  # validation


# training -----------------------------------------------------------------------------------------


class Data(torch.utils.data.Dataset):
    def __init__(self, n=16):
        ramp = torch.linspace(0, 0.5, 16)
        self.x = torch.stack(
            [
                (ramp[:, None] * (k % 3) / 2 + ramp * (k % 5) / 4)[None].expand(3, -1, -1)
                for k in range(n)
            ]
        )

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]


class Pairs(Data):
    def __getitem__(self, i):
        return self.x[i] * 0.8 + 0.05, self.x[i]


def loader(kind=Data, batch=4, **kw):
    return DataLoader(kind(), batch, **kw)


def learner(model=None, d=None, **kw):
    torch.manual_seed(1)
    model = model or fresh(
        d, **{k: kw.pop(k) for k in ('residual', 'pool', 'place', 'identity') if k in kw}
    )
    return two_stage_learner(
        model, loader(shuffle=True), **(dict(degrade=Degradation('denoise'), cpu=True) | kw)
    )


class Stop(Callback):
    def __init__(self, at=None):
        self.at = at

    def after_step(self, learn):
        if learn.step == self.at:
            raise KeyboardInterrupt


def test_stage_a_by_the_audit():
    """Nothing of stage one learns;
    at the identity start the residual encoder has no gradient yet, after one step it has."""
    learn = learner(model=fresh(), stage='A')
    model, (x, y) = learn.bare, pair()
    watch = dict(
        encoder=model.encoder,
        decoder1=model.decoder1,
        decoder2=model.decoder2,
        sees=model.residual_encoder,
    )
    audit = lambda: audit_gradient(lambda: two_stage_loss(model, (y, x), lam=0.0), watch, learn.opt)
    states = lambda r: {k: r.cells['refined', k].state for k in watch}
    at = states(audit())
    assert (
        at['encoder'] == at['decoder1'] == 'frozen'
        and at['decoder2'] == 'alive'
        and at['sees'] != 'alive'
    )
    before = held(model)
    learn.fit(3)
    at, after = states(audit()), held(model)
    assert at['encoder'] == at['decoder1'] == 'frozen' and at['decoder2'] == at['sees'] == 'alive'
    still = {k for k in before if torch.equal(before[k], after[k])}
    assert still - {'mean', 'std'} == {k for k in before if k.startswith(('encoder.', 'decoder1.'))}
    assert all(
        p.grad is None for part in (model.encoder, model.decoder1) for p in part.parameters()
    )


def test_each_loss_moves_what_it_should():
    model, (x, y) = awake(residual='learned'), pair()
    watch = dict(
        encoder=model.encoder,
        decoder1=model.decoder1,
        decoder2=model.decoder2,
        sees=model.residual_encoder,
        estimator=model.estimator,
    )
    report = audit_gradient(
        lambda: two_stage_loss(model, (y, x)),
        watch,
        torch.optim.SGD(model.parameters(), lr=0.1),
        expect=dict(
            refined=['encoder', 'decoder2', 'sees'],
            first=['encoder', 'decoder1'],
            estimate=['estimator'],
        ),
    )
    alive = {
        t: {s for s in watch if report.cells[t, s].state == 'alive'}
        for t in ('refined', 'first', 'estimate')
    }
    assert report and alive == dict(
        refined={'encoder', 'decoder2', 'sees'},
        first={'encoder', 'decoder1'},
        estimate={'estimator'},
    )


@pytest.mark.parametrize('residual', ['deployed', 'learned'])
def test_rates_of_the_stages(residual):
    d = dmae()

    def rates(**kw):
        learn = learner(d=d, residual=residual, weight_decay=0.07, **kw)
        at = {
            id(p): (g['lr'], g['weight_decay'], g['betas'])
            for g in learn.opt.param_groups
            for p in g['params']
        }
        for n, p in learn.bare.named_parameters():
            if id(p) in at:
                assert at[id(p)][1:] == (0.07 if p.ndim > 1 else 0, (0.9, 0.95)), n
        return {n: at.get(id(p), (None,))[0] for n, p in learn.bare.named_parameters()}

    old = lambda n: n.startswith(('encoder.', 'decoder1.'))
    for kw, mine, theirs in (
        (dict(stage='A'), 1e-3, None),
        (dict(stage='B'), 5e-5, 1e-5),
        (dict(stage='end'), 5e-4, 5e-4),
        (dict(stage='B', lr=1e-2), 1e-2, 2e-3),
    ):
        for n, rate in rates(**kw).items():
            assert rate == (
                pytest.approx(theirs if old(n) else mine) if theirs or not old(n) else None
            ), (kw, n)


def test_a_then_b():
    model = fresh()
    learner(model, stage='A').fit(2)
    assert not any(p.requires_grad for p in model.encoder.parameters()) and all(
        p.requires_grad for p in model.decoder2.parameters()
    )
    before = held(model)
    learn = learner(model, stage='B').fit(2)
    after = held(model)
    assert all(p.requires_grad for p in model.parameters())
    assert [k for k in before if torch.equal(before[k], after[k])] == [
        k for k in before if k in ('mean', 'std') or k.endswith('pos_embed')
    ]
    assert {'refined', 'first'} <= learn.history[-1].keys()
    learner(model, stage='A')
    assert not any(p.requires_grad for p in model.decoder1.parameters())


def test_the_gain_is_logged_at_each_validation():
    model, data = awake(), Pairs(8)
    with torch.no_grad():
        first, refined = (
            psnr(out.clamp(0, 1), data.x) for out in model.eval()(data.x * 0.8 + 0.05)
        )
    learn = two_stage_learner(model, loader(Pairs), DataLoader(data, 4), stage='A', cpu=True)
    learn.validate()
    assert learn.metrics['gain'] == pytest.approx(
        (refined - first).mean().item(), abs=1e-4
    ) and learn.metrics['first'] == pytest.approx(first.mean().item(), abs=1e-4)
    learn.fit(30, valid_every=10)
    rows = [r for r in learn.history if 'gain' in r]
    assert [r['step'] for r in rows] == [0, 10, 20, 30] and all(
        r['gain'] == pytest.approx(r['refined'] - r['first'], abs=1e-3) for r in rows
    )
    assert rows[-1]['gain'] > rows[0]['gain'] + 0.5 and rows[-1]['first'] == pytest.approx(
        rows[0]['first'], abs=1e-3
    )


def test_validation_deploys():
    "Under 'truth' the metrics do not move with the share; no row of the validation is an oracle's."
    model = awake(residual='truth')
    learn = two_stage_learner(model, loader(Pairs), DataLoader(Pairs(8), 4), cpu=True)
    with_truth = dict(learn.validate())
    model.share = 0.0
    without = learn.validate()
    assert all(with_truth[k] == without[k] for k in ('first', 'refined', 'gain'))
    assert with_truth['valid_refined'] == without['valid_refined']


def test_schedule_goes_from_one_to_nothing_and_resumes(tmp_path):
    d = dmae()

    def make():
        learn, shares = learner(d=d, residual='truth', cbs=[ShareSchedule(0.5), Stop()]), []
        loss = learn.loss_fn
        learn.loss_fn = lambda m, b: (shares.append(m.share), loss(m, b))[1]
        return learn, shares

    whole, shares = make()
    whole.fit(12)
    assert (
        shares
        == pytest.approx([0.5 + 0.5 * np.cos(np.pi * min(1, k / 6)) for k in range(12)], abs=1e-6)
        and shares[0] == 1
        and whole.bare.share == 0
    )
    first, _ = make()
    first.cbs[-1].at = 4
    with pytest.raises(KeyboardInterrupt):
        first.fit(12)
    first.cbs[-1].at = None
    first.save(tmp_path)
    again, rest = make()
    again.load(tmp_path).fit(12)
    assert rest == shares[4:] and same(held(whole.bare), held(again.bare))


def test_killed_with_an_adversary(tmp_path, monkeypatch, capsys):
    """Stopped between two checkpoints, found again by fit_or_load:
    restorer, critic and both optimizers end as they would have."""
    d = dmae()

    class StopFromOutside(
        Callback
    ):  # a callback that was made otherwise would be part of what the run is known by
        def after_step(self, learn):
            if learn.step == int(os.environ.get('STOP_AT', 0)):
                raise KeyboardInterrupt

    def make():
        return learner(
            d=d, stage='end', adversary=adversary(start=2), fourier=0.01, cbs=[StopFromOutside()]
        )

    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path / 'whole'))
    whole = make().fit_or_load('10_adv', dict(data='ramps'), 9, save_every=3)
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path / 'killed'))
    monkeypatch.setenv('STOP_AT', '5')
    with pytest.raises(KeyboardInterrupt):
        make().fit_or_load('10_adv', dict(data='ramps'), 9, save_every=3)
    monkeypatch.delenv('STOP_AT')
    again = make()
    again.fit_or_load('10_adv', dict(data='ramps'), 9, save_every=3)
    assert (
        'resumed at step 3' in capsys.readouterr().out
        and again.step == 9
        and same(held(whole.bare), held(again.bare))
    )
    a, b = whole.cbs[1], again.cbs[1]
    assert (
        same(held(a.critic), held(b.critic))
        and a.n == b.n == 9
        and not same(held(a.critic), held(adversary().critic))
    )
    for one, other in zip(
        a.opt.state_dict()['state'].values(), b.opt.state_dict()['state'].values(), strict=True
    ):
        assert same(one, other)


def test_a_run_is_found_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path))
    d, made = dmae(), []
    for _ in range(2):
        made.append(
            learner(d=d, degrade=Degradation('denoise', sigma=(5 / 255, 50 / 255))).fit_or_load(
                '10_try', {}, 3
            )
        )
    first = [
        first_stage_learner(copy.deepcopy(d), loader(), degrade=Degradation('rain'), cpu=True)
        for _ in range(2)
    ]
    said = capsys.readouterr().out
    assert (
        'trained' in said
        and 'loaded' in said
        and len(list(tmp_path.iterdir())) == 1
        and same(held(made[0].bare), held(made[1].bare))
    )
    from restore_lib.fingerprints import fingerprint

    assert fingerprint(first[0]) == fingerprint(first[1])
    for learn in (made[0], first[0]):
        assert ' at 0x' not in str(learn.loss_fn.keywords)
    adv = learner(d=d, adversary=adversary())
    assert fingerprint(adv) == fingerprint(
        learner(d=d, adversary=adversary())
    ) and ' at 0x' not in str(adv.loss_fn.keywords)


@pytest.mark.parametrize(
    'kw',
    [
        dict(degrade=Degradation('denoise', sigma=0.2)),
        dict(degrade=Degradation('rain')),
        dict(lam=0.1, stage='end'),
        dict(pixel='l1'),
        dict(fourier=0.1),
        dict(stage='B'),
        dict(lr=1e-4),
        dict(place='end'),
        dict(residual='both'),
        dict(residual='none'),
        dict(residual='truth'),
        dict(pool=4),
        dict(pool=None),
        dict(place='end', identity=False),
        dict(adversary=dict(weight=0.2)),
        dict(adversary=dict(start=3)),
        dict(adversary=dict(lr=1e-4)),
        dict(cbs=0.3),
    ],
    ids=str,
)
def test_another_run_is_another(kw):
    """What changes a run and can be seen in its parts changes its name,
    so that fit_or_load never takes up the wrong one."""
    d, base = (
        dmae(),
        dict(stage='end')
        if kw.get('stage') == 'end'
        else dict(place='end')
        if 'identity' in kw
        else {},
    )
    kw = dict(kw)
    if 'adversary' in kw:
        base['adversary'], kw['adversary'] = adversary(), adversary(**kw['adversary'])
    if 'cbs' in kw:
        base['cbs'], kw['cbs'] = [ShareSchedule()], [ShareSchedule(kw['cbs'])]
    from restore_lib.fingerprints import fingerprint

    assert fingerprint(learner(d=d, **base)) != fingerprint(learner(d=d, **kw))


@pytest.mark.parametrize('stage', ['A', 'B', 'end'])
def test_bf16(stage):
    learn = learner(
        residual='learned',
        stage=stage,
        precision='bf16',
        adversary=adversary(),
        fourier=0.1,
        perceptual=(0.1, lambda a, b: (a - b).abs().mean((1, 2, 3))),
        clip=1.0,
    )
    learn.fit(3)
    numbers = [v for row in learn.history for v in row.values()]
    assert (
        np.isfinite(numbers).all()
        and all(
            torch.isfinite(p).all() and p.dtype == torch.float32 for p in learn.bare.parameters()
        )
        and learn.bare(pair()[1])[1].dtype == torch.float32
    )


def test_first_stage_learner():
    learn = first_stage_learner(
        DMAE(**SIZES),
        loader(shuffle=True),
        DataLoader(Data(4), 4),
        degrade=Degradation('denoise'),
        blr=0.2,
        clip=1.0,
        cpu=True,
    )
    before = learn.validate()['valid_loss']
    learn.fit(40)
    assert learn.validate()['valid_loss'] < 0.7 * before and learn.rates[0] == pytest.approx(
        0.2 * 4 / 256
    )
    pairs = first_stage_learner(DMAE(**SIZES), loader(Pairs), cpu=True).fit(2)
    assert pairs.step == 2
    model = fresh(learn.trained())
    assert torch.equal(*model(pair()[1]))


# degradations -------------------------------------------------------------------------------------


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('c', [1, 3])
def test_degradations(task, c):
    op, x = Degradation(task), torch.rand(6, c, 32, 24)
    before = x.clone()
    y, again, other = (op(x, gen(s)) for s in (0, 0, 1))
    assert (
        y.shape == x.shape
        and torch.equal(y, again)
        and torch.isfinite(y).all()
        and torch.equal(x, before)
        and ((y - x).abs().amax((1, 2, 3)) > 0).all()
    )
    assert torch.equal(y, other) == (task == 'x4')  # which draws nothing
    torch.manual_seed(3)
    a = op(x)
    torch.manual_seed(3)
    assert torch.equal(a, op(x))


def test_degradations_are_what_they_say():
    x = torch.full((64, 1, 32, 32), 0.5)
    std = lambda op: (op(x, gen()) - x).flatten(1).std(1)
    assert ((std(Degradation('denoise')) - 25 / 255).abs() < 0.012).all() and (
        (std(Degradation('denoise', 0.3)) - 0.3).abs() < 0.03
    ).all()
    blind = std(Degradation('denoise', (5 / 255, 50 / 255)))
    assert blind.min() < 15 / 255 and blind.max() > 40 / 255
    assert Degradation('salt_pepper')(x, gen()).unique().tolist() == [0, 0.5, 1] and Degradation(
        'block'
    )(x, gen()).unique().tolist() == [0, 0.5]
    assert (Degradation('rain')(x, gen()) >= 0.5 - 1e-6).all()
    noise = torch.rand(4, 3, 32, 32)
    for task in ('blur', 'x4'):
        assert Degradation(task)(noise, gen()).var() < 0.6 * noise.var()
    mixed = Degradation('mixed')(x, gen())
    kinds = [len(v.unique()) for v in mixed]
    assert min(kinds) <= 3 and max(kinds) > 500  # another one for each image


def test_degradations_are_values():
    a, b = Degradation('denoise', 25 / 255), Degradation('denoise')
    assert (
        a == b
        and hash(a) == hash(b)
        and repr(a) == repr(b)
        and a != Degradation('rain')
        and Degradation('denoise', 0.1) != b
    )
    assert pickle.loads(pickle.dumps(a)) == copy.deepcopy(a) == a and eval(repr(a)) == a
    with pytest.raises(AttributeError):
        a.task = 'rain'
    with pytest.raises(ValueError, match='sigma'):
        Degradation('denoise', -1)(torch.rand(1, 1, 8, 8))


# files of weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'kw, own',
    [
        (dict(), dict()),
        (dict(pool=None, norm='batch', place='end'), dict(channels=1, mean=0.1, std=0.7)),
        (dict(pool=4, residual='both', cond=12), dict(img_size=(8, 24))),
        (dict(residual='learned'), dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), dec_depth=1)),
        (dict(residual='truth', identity=False), dict(depth=2, heads=2)),
        (dict(residual='none'), dict(patch=8)),
        (dict(cond=256), dict()),
    ],
)
def test_save_and_load(tmp_path, kw, own):
    """What comes back is the model with its weights rounded to half precision, exactly,
    and knows what it is for."""
    model = awake(dmae(**own), **kw)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2.0)
            m.num_batches_tracked.fill_(7)
    before = held(model)
    save_model(
        model, tmp_path / 'new' / 'a.safetensors', task='denoise', sigma=25 / 255, psnr=[1, None]
    )
    back, says = load_model(tmp_path / 'new' / 'a.safetensors')
    assert (
        says == dict(task='denoise', sigma=25 / 255, psnr=[1, None])
        and same(held(model), before)
        and not back.training
        and all(not m.training for m in back.modules())
    )
    assert same(
        {k: v.half() if v.is_floating_point() else v for k, v in before.items()},
        {k: v.half() if v.is_floating_point() else v for k, v in held(back).items()},
    )
    assert (
        all(p.dtype == torch.float32 for p in back.parameters())
        and back.residual == model.residual
        and back.encoder.grid == model.encoder.grid
    )
    assert torch.equal(back.mean, model.mean) and torch.equal(back.std, model.std)
    y, rounded = torch.rand(2, own.get('channels', 3), 16, 24), copy.deepcopy(model).eval()
    with torch.no_grad():
        for p in (*rounded.parameters(), *rounded.buffers()):
            p.copy_(p.half().float() if p.is_floating_point() and p.numel() > 3 else p)
        rounded.load_state_dict(
            {
                k: v.half().float() if v.is_floating_point() and k not in ('mean', 'std') else v
                for k, v in before.items()
            }
        )
        assert all(torch.equal(a, b) for a, b in zip(back(y), rounded(y))) and close(
            back(y)[1], model.eval()(y)[1], 0.03
        )
    assert (
        os.path.getsize(tmp_path / 'new' / 'a.safetensors')
        < 2 * sum(p.numel() for p in before.values()) + 20_000
    )


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match='no residual encoder'):
        save_model(fresh(conditional=False), tmp_path / 'a.safetensors')
    assert not list(tmp_path.iterdir())


def file_of(model, path, meta=None, state=None):
    "A file by save_model with something else in it."
    save_model(model, path, task='denoise', sigma=25 / 255)
    with safe_open(path, 'pt') as f:
        info, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    save_file(state(tensors) if state else tensors, path, metadata=meta(info) if meta else info)
    return path


# saved models come back as the same function ------------------------------------------------------


def rounded(model):
    "With weights that half precision holds, so that a file must give back the same numbers."
    with torch.no_grad():
        for name, v in model.state_dict().items():
            if v.is_floating_point() and name not in ('mean', 'std'):
                v.copy_(v.half().float())
    return model.eval()


KNOBS = dict(
    cond=[12, 256],
    pool=[4, None],
    norm=['batch'],
    place=['end'],
    identity=[False],
    residual=[k for k in KINDS if k != 'deployed'],
    shared=[True],
)
OWN = dict(
    img_size=[(8, 24)],
    patch=[8],
    channels=[1],
    dim=[48],
    depth=[2],
    heads=[2],
    dec_dim=[32],
    dec_depth=[1],
    dec_heads=[4],
    mean=[0.1, (0.4, 0.5, 0.6)],
    std=[0.7, (0.2, 0.3, 0.25)],
)


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize(
    'knob, value, own',
    [
        *((k, v, False) for k, vs in KNOBS.items() for v in vs),
        *((k, v, True) for k, vs in OWN.items() for v in vs),
    ],
)
def test_every_knob_comes_back(tmp_path, knob, value, own, place):
    "The same output, to the bit, whatever was chosen: in use, and where the truth is shown."
    model = rounded(
        awake(
            dmae(**({knob: value} if own else {})),
            **(dict(place=place) | ({} if own else {knob: value})),
        )
    )
    if model.residual == 'truth':
        model.share = 0.25
    save_model(model, tmp_path / 'a.safetensors')
    back, _ = load_model(tmp_path / 'a.safetensors')
    y, x = torch.rand(2, 2, model.encoder.channels, 16, 24)
    with torch.no_grad():
        for given in ((y,), (y, x)):
            assert all(torch.equal(a, b) for a, b in zip(back(*given), model(*given)))
    assert torch.equal(back.mean, model.mean) and torch.equal(back.std, model.std)


def test_no_knob_is_forgotten():
    """What a file says has each argument of each constructor:
    a new argument that no file keeps fails here."""
    from restore_lib.patching import ViTEncoder

    names = lambda kind: {
        k for k, p in inspect.signature(kind).parameters.items() if p.kind is not p.VAR_KEYWORD
    }
    made = fresh(conditional=True).made_of()
    assert (
        made.keys() == names(TwoStageDMAE) | {'share', 'shared'}
        and made['encoder'].keys() == names(ViTEncoder)
        and made['residual_encoder'].keys() == names(ResidualEncoder)
    )
    assert made['decoder1'].keys() == made['decoder2'].keys() == names(ConditionalDecoder)
    assert (
        names(TwoStageDMAE.from_pretrained) - {'dmae', 'conditional'} == KNOBS.keys()
    )  # each of them is tried above
    assert names(ConditionalBlock) <= names(ConditionalDecoder) | {'dec_dim'} and names(
        FiLM
    ) <= names(ConditionalBlock)


def test_parts_that_are_no_dmaes_own(tmp_path):
    from restore_lib.patching import ViTEncoder

    enc = ViTEncoder((16, 24), 4, 32, 1, 4, 1, cls_token=False, mlp=2.3, drop_path=0.1)
    parts = (
        ConditionalDecoder(32, 16, 1, 2, 16),
        ConditionalDecoder(32, 24, 2, 3, 16, cond=8, place='end', identity=False),
        ResidualEncoder(1, 8, None, 'batch', 16),
    )
    model = rounded(shake(TwoStageDMAE(enc, *parts, mean=0.2, std=0.3)))
    save_model(model, tmp_path / 'a.safetensors')
    y = torch.rand(2, 1, 16, 24)
    assert all(
        torch.equal(a, b) for a, b in zip(load_model(tmp_path / 'a.safetensors')[0](y), model(y))
    )


def test_what_was_changed_by_hand_is_not_saved(tmp_path):
    one, other, heads = awake(place='end'), awake(), awake()
    one.decoder2.decoder_blocks[0].film.one = 0.0
    other.decoder2.decoder_blocks[0].attn.heads = 1
    heads.residual_encoder.linear = nn.Linear(128, 8, bias=False)
    for model in (one, other, heads):
        with pytest.raises(ValueError, match='changed by hand'):
            save_model(model, tmp_path / 'a.safetensors')
    large, nan = awake(), awake()
    large.decoder1.decoder_pred.bias.data[0], nan.decoder1.decoder_pred.bias.data[0] = (
        1e5,
        float('nan'),
    )
    with pytest.raises(ValueError, match='decoder1.decoder_pred.bias holds numbers beyond 65504'):
        save_model(large, tmp_path / 'a.safetensors')
    with pytest.raises(
        ValueError, match='decoder1.decoder_pred.bias of the model holds values that are NaN'
    ):
        save_model(nan, tmp_path / 'a.safetensors')
    with pytest.raises(TypeError, match=r"says\['tasks'\] is set"):
        save_model(awake(), tmp_path / 'a.safetensors', tasks={1})
    assert not list(tmp_path.iterdir())


def test_a_model_in_double_precision(tmp_path):
    model = awake().double()
    save_model(model, tmp_path / 'a.safetensors')
    assert close(
        load_model(tmp_path / 'a.safetensors')[0](y := torch.rand(1, 3, 16, 16))[1],
        model.float()(y)[1],
        0.03,
    )


def test_mean_and_std_are_of_the_state():
    "Another model's state brings its units with it."
    a, b = awake(dmae(mean=0.1, std=0.9)).eval(), awake(dmae()).eval()
    b.load_state_dict(a.state_dict())
    y = torch.rand(2, 3, 16, 16)
    assert torch.equal(b(y)[1], a(y)[1]) and {'mean', 'std'} <= a.state_dict().keys()


def test_the_callers_random_state_stays(tmp_path):
    import random

    model = awake()
    states = lambda: (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
    )
    was = states()
    save_model(model, tmp_path / 'a.safetensors')
    load_model(tmp_path / 'a.safetensors')
    load_model('mixed')
    assert states() == was


def edited(path, **changes):
    "A file by save_model whose 'made_of' is changed at 'part.name' or as a whole."

    def meta(info):
        made = json.loads(info['made_of'])
        for k, v in changes.items():
            if k in ('made_of', 'says'):
                return dict(info, **{k: json.dumps(v)})
            part, name = k.split('__') if '__' in k else (None, k)
            (made[part] if part else made)[name] = v
        return dict(info, made_of=json.dumps(made))

    return file_of(fresh(), path, meta)


@pytest.mark.parametrize(
    'changes',
    [
        dict(made_of=[]),
        dict(made_of=None),
        dict(made_of=3),
        dict(made_of='a'),
        dict(says=[1]),
        dict(says=None),
        dict(says='x'),
        dict(encoder=None),
        dict(encoder=[]),
        dict(encoder__dim='wide'),
        dict(encoder__img_size=None),
        dict(decoder1__heads=0),
        dict(decoder1__new=3),
        dict(residual_encoder=4),
        dict(mean='a'),
        dict(mean=[]),
        dict(std={}),
        dict(residual=[]),
        dict(share='much'),
        dict(share=2),
        dict(std=[0.0]),
        dict(std=[float('nan')]),
        dict(decoder2__place=3),
    ],
)
def test_metadata_of_the_wrong_kind(tmp_path, changes):
    with pytest.raises(
        ValueError,
        match='a.safetensors does not say how its model is built .*'
        'expected a file by save_model',
    ):
        load_model(edited(tmp_path / 'a.safetensors', **changes))


def test_shapes_are_compared_before_memory_is_asked_for(tmp_path):
    from restore_lib.metrics import peak_memory

    path = edited(tmp_path / 'a.safetensors', decoder2__dec_dim=1024)  # 50 MB

    def load():
        with pytest.raises(ValueError, match='copied'):
            load_model(path)

    assert peak_memory(load) < 2e6


def test_a_file_with_more_than_its_model(tmp_path):
    "A model of less blocks than the file holds is another function: not loaded in silence."
    with pytest.raises(
        ValueError,
        match='decoder2.decoder_blocks.1.* which the model that it describes does not have',
    ):
        load_model(edited(tmp_path / 'a.safetensors', decoder2__depth=1))


# numbers of every kind, and what makes no sense ---------------------------------------------------


def test_numpy_numbers_are_numbers():
    i = np.int64
    sees, plain = ResidualEncoder(i(3), i(8), i(2), width=i(16)), ResidualEncoder(3, 8, 2, width=16)
    sees.load_state_dict(plain.state_dict())
    r = torch.rand(2, 3, 16, 16)
    assert torch.equal(sees(r, (4, 4)), plain(r, (4, 4))) and PatchCritic(i(3), i(8))(r).shape == (
        2,
        1,
        3,
        3,
    )
    assert (
        ConditionalDecoder(i(32), i(16), i(1), i(2), i(48), cond=i(8)).decoder_pred.out_features
        == 48
    )
    assert Degradation('denoise', np.float64(0.1)) == Degradation('denoise', 0.1) and repr(
        Degradation('denoise', np.float64(0.1))
    ) == repr(Degradation('denoise', 0.1))


@pytest.mark.parametrize(
    'call, says',
    [
        (lambda: Degradation('denoise', -1), 'sigma is -1'),
        (lambda: Degradation('denoise', (0.2, 0.1)), 'smaller number first'),
        (lambda: Degradation('denoise', float('nan')), 'sigma is nan'),
        (lambda: Degradation('denoise', 25), 'sigma is 25'),
        (lambda: Degradation('denoise', (0.1, 0.2, 0.3)), 'sigma is'),
        (lambda: ResidualEncoder(3, 8, width=12), 'width is 12; expected a multiple of 8'),
        (lambda: ResidualEncoder(0, 8), 'channels is 0'),
        (lambda: PatchCritic(3, 6), 'width is 6; expected a multiple of 4'),
        (lambda: ConditionalDecoder(32, 16, 0, 2, 48), 'depth is 0'),
        (lambda: FiLM(8, 0), 'cond is 0'),
        (lambda: fresh(dmae(std=0.5), cond=-3), 'cond is -3'),
        (lambda: TwoStageDMAE(dmae().encoder, None, None, None, std=0.0), 'std is'),
        (lambda: TwoStageDMAE(dmae().encoder, None, None, None, std=float('nan')), 'std is'),
        (lambda: TwoStageDMAE(dmae().encoder, None, None, None, mean=float('inf')), 'mean is'),
        (
            lambda: TwoStageDMAE(dmae().encoder, None, None, None, mean=(0.1, 0.2)),
            'expected finite numbers: one, or one for each of 3 channels',
        ),
        (lambda: Adversary(PatchCritic(3), weight=-1), 'weight is -1'),
        (lambda: Adversary(PatchCritic(3), start=-1), 'start is -1'),
        (lambda: Adversary(PatchCritic(3), lr=0), 'lr is 0'),
        (lambda: Adversary(PatchCritic(3)).after_step(None), 'the loss does not use it'),
        *[(lambda u=u: ShareSchedule(u), 'until is') for u in (0, -1, 1.5, float('nan'))],
        (lambda: two_stage_loss(fresh(), pair()[::-1], lam=-1), 'lam is -1'),
        (lambda: two_stage_loss(fresh(), pair()[::-1], fourier=float('nan')), 'fourier is nan'),
        (lambda: two_stage_loss(fresh(), pair()[::-1], pixel='l3'), "pixel is 'l3'"),
        *[
            (lambda k=k, v=v: learner(fresh(), **{k: v}), f'{k} is')
            for k, v in (
                ('lr', 0),
                ('lr', -1.0),
                ('lr', float('nan')),
                ('weight_decay', -0.1),
                ('warmup', 2),
                ('lam', -1),
                ('fourier', -1),
            )
        ],
    ],
)
def test_what_makes_no_sense_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_adaptive_weight_without_gradients():
    w = torch.ones(2, requires_grad=True)
    nll, other = (w**2).sum(), torch.ones(1, requires_grad=True).sum()
    assert (
        gradient_balance(nll, 0 * w.sum(), w) == 1e4
        and gradient_balance(0 * w.sum(), nll, w) == 0
        and gradient_balance(nll, 0 * w.sum(), w, most=np.float32(3)) == 3
    )
    with pytest.raises(ValueError, match='nll does not depend on last'):
        gradient_balance(other, nll, w)
    with pytest.raises(ValueError, match='g does not depend on last'):
        gradient_balance(nll, other, w)
    with pytest.raises(ValueError, match='g has a gradient of nan'):
        gradient_balance(nll, (w * float('nan')).sum(), w)
    with pytest.raises(ValueError, match='most is -1'):
        gradient_balance(nll, nll, w, most=-1)


def test_an_adversary_leaves_frozen_parts_frozen():
    critic = PatchCritic(3)
    critic.layers[0].requires_grad_(False)
    adversary, w = Adversary(critic), torch.ones(1, requires_grad=True)
    fake = torch.rand(2, 3, 16, 16) * w
    adversary.loss(fake, torch.rand(2, 3, 16, 16), fake.mean(), w)
    assert [p.requires_grad for p in critic.parameters()] == [False] * 2 + [True] * (
        len(list(critic.parameters())) - 2
    )
    assert (
        adversary.__getstate__()['pair'] is None and adversary.pair is not None
    )  # a fingerprint of the run does not see the last batch


# one decoder for both stages, published weights, sizes --------------------------------------------


@pytest.mark.parametrize('place', PLACES)
def test_a_shared_decoder(place):
    "One decoder draws both images; in stage 'A' its FiLM and the residual encoder learn, no more."
    d, (_, y) = dmae(), pair()
    model = awake(d, shared=True, place=place)
    apart = awake(d, place=place)
    assert model.decoder1 is model.decoder2
    size = lambda m: sum(p.numel() for p in m.parameters())
    assert size(apart) - size(model) == size(fresh(d, conditional=False).decoder1)
    x_hat, refined = model(y)
    with torch.no_grad():
        latent = model.encoder.transform(model.encoder.embed((y - 0.5) / 0.5))
        assert torch.equal(x_hat, model.draw(model.decoder2, latent, (16, 16)))
    assert not close(x_hat, refined, 1e-3)
    before = held(model)
    two_stage_learner(model, loader(Pairs), stage='A', cpu=True).fit(2)
    moved = {k for k, v in held(model).items() if not torch.equal(v, before[k])}
    film = {k for k in before if '.film.' in k}
    sees = {k for k in before if k.startswith('residual_encoder.')}
    assert moved == film | sees and len(film) == 8  # of two blocks, under either name


def test_a_shared_decoder_learns_from_both_images():
    model = awake(shared=True)
    two_stage_learner(model, loader(Pairs), stage='end', lam=0.5, cpu=True).fit(1)
    assert all(p.requires_grad for p in model.decoder1.parameters())
    with torch.no_grad():
        model.decoder1.decoder_pred.bias.add_(1)
    a, b = model(pair()[1])
    assert (a.mean() - b.mean()).abs() < 0.5  # the shift is in both


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_published_weights_become_a_first_stage(tmp_path, dtype):
    """A published file draws normalised patches and is refused. With a new pixel head it draws an
    image, a short training makes that better, and two stages can be built on it."""
    from test_dmae import published

    torch.save(published(True, side=4), tmp_path / 'dmae.pth')
    theirs, _ = load_dmae(tmp_path / 'dmae.pth')
    with pytest.raises(ValueError, match='norm_pix_loss is True.*pixel_head'):
        TwoStageDMAE.from_pretrained(theirs)
    with pytest.raises(ValueError, match='pixel_head'):
        first_stage_learner(theirs, loader(), cpu=True)
    data = torch.stack([Data(48)[k] for k in range(48)])
    y = data + 0.1 * torch.randn_like(data)
    before, theirs = held(theirs), theirs.to(dtype)
    ours = pixel_head(theirs, y.to(dtype), data.to(dtype))
    assert theirs.norm_pix_loss and not ours.norm_pix_loss and same(held(theirs.float()), before)
    assert ours.training == theirs.training and ours.decoder_pred.weight.dtype == dtype
    ours = ours.float()
    fresh_y = data[:8] + 0.1 * torch.randn_like(data[:8])
    score = lambda m: psnr(denoise(m, fresh_y).clamp(0, 1), data[:8]).mean().item()
    plain = psnr(data.mean().expand_as(data[:8]), data[:8]).mean().item()
    fitted = score(ours)
    assert fitted > plain + 1
    noise = lambda v: v + 0.1 * torch.randn_like(v)
    how = dict(degrade=noise, blr=0.05, cpu=True)
    learn = first_stage_learner(ours, loader(batch=8, shuffle=True), **how)
    assert score(learn.fit(60).trained()) > fitted + 0.3
    model, _ = TwoStageDMAE.from_pretrained(learn.trained())
    assert torch.equal(*model(fresh_y))


def test_pixel_head_is_least_squares():
    "With next to no ridge, no other weights of the last layer have a smaller error."
    d = dmae(norm_pix_loss=True)
    x = torch.rand(40, 3, 16, 16)
    out = pixel_head(d, x, x, ridge=1e-9)
    error = lambda m: (m.pixels(m.draw(x)[0]) - x).square().mean().item()
    best = error(out)
    for name in ('weight', 'bias'):
        other = copy.deepcopy(out)
        with torch.no_grad():
            p = getattr(other.decoder_pred, name)
            p.add_(0.01 * torch.randn_like(p))
        assert error(other) > best
    with pytest.raises(ValueError, match='x has shape .* y has shape'):
        pixel_head(d, x, x[:2])


def test_the_truth_must_have_the_inputs_shape():
    model, (x, y) = awake(residual='truth'), pair()
    for bad in (x[:2], x[..., :8]):
        with pytest.raises(ValueError, match='x has shape .* y has shape .* expected the same'):
            model(y, bad)


def test_strides_of_the_residual_encoder():
    "Patches of 8 pixels get the pooled encoder's own features, one for each token; 4 finer ones."
    assert fresh(pool=None).residual_encoder.strides == [2, 2, 1]
    large = fresh(dmae(patch=8), pool=None).residual_encoder
    pooled = fresh(dmae(patch=8), pool=1).residual_encoder
    assert large.strides == pooled.strides == [2, 2, 2]
    pooled.load_state_dict(large.state_dict())
    r = torch.randn(2, 3, 16, 16)
    f = large.convs(r)
    assert f.shape[-2:] == (2, 2)
    one = F.gelu(large.linear(f.mean((2, 3))))
    assert close(pooled(r, (2, 2))[:, 0], one, 1e-5)
