"""What lesson 05 does not teach: parity with timm and with formulas written anew, adjoints,
exact counts, dtypes and devices, bad input."""

import json
import math
from decimal import Decimal
from fractions import Fraction
from functools import partial

from common import DEVICES, shake
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from restore_lib.patch_parts import n_removed
from restore_lib.patching import (
    Attention,
    Block,
    DropPath,
    Mlp,
    ViTEncoder,
    block_masking,
    grid_masking,
    interpolate_pos_embed,
    linear_from_conv,
    patchify,
    random_masking,
    sincos_pos_embed,
    unpatchify,
    unshuffle,
)

MASKINGS = {
    'random': random_masking,
    'block': partial(block_masking, hw=(6, 8)),
    'grid': partial(grid_masking, hw=(6, 8)),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gen(s=0, device='cpu'):
    return torch.Generator(device).manual_seed(s)


# patches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'c, h, w, p',
    [
        (3, 32, 32, 8),
        (1, 28, 28, 4),
        (3, 24, 40, 8),
        (5, 6, 9, 3),
        (2, 7, 5, 1),
        (3, 16, 16, 16),
        (1, 13, 26, 13),
    ],
)
def test_round_trip_and_reference_order(c, h, w, p):
    x = torch.randn(2, c, h, w)
    tokens = patchify(x, p)
    assert tokens.shape == (2, h * w // p**2, p * p * c)
    assert torch.equal(
        tokens,
        torch.einsum('nchpwq->nhwpqc', x.reshape(2, c, h // p, p, w // p, p)).reshape(
            2, -1, p * p * c
        ),
    )
    assert torch.equal(unpatchify(tokens, p, (h, w)), x) and torch.equal(
        unpatchify(tokens, p, (h, w), c), x
    )


def test_one_number_lands_where_the_text_says():
    x = torch.zeros(1, 3, 8, 12)
    x[0, 2, 5, 9] = 1  # patch row 1, column 2 of 2 x 3; inside (1, 1); channel 2
    assert patchify(x, 4)[0].nonzero().tolist() == [[1 * 3 + 2, (1 * 4 + 1) * 3 + 2]]


@pytest.mark.parametrize('h, w, p', [(24, 40, 8), (15, 9, 3)])
def test_adjoint(h, w, p):
    x = torch.randn(2, 3, h, w, dtype=torch.float64)
    y = torch.randn(2, h * w // p**2, p * p * 3, dtype=torch.float64)
    assert math.isclose(
        (patchify(x, p) * y).sum(), (x * unpatchify(y, p, (h, w))).sum(), rel_tol=1e-12
    )


def test_not_contiguous_and_other_dtypes():
    x = torch.arange(2 * 3 * 8 * 8).reshape(2, 8, 8, 3).permute(0, 3, 1, 2)
    assert torch.equal(unpatchify(patchify(x, 4), 4, (8, 8)), x)
    assert patchify(x.to(torch.bfloat16), 4).dtype == torch.bfloat16


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda: patchify(torch.zeros(1, 3, 30, 33), 8), ValueError, 'pad it to 32 x 40'),
        (lambda: patchify(torch.zeros(1, 3, 4, 4), 8), ValueError, 'pad it to 8 x 8'),
        (lambda: patchify(torch.zeros(1, 3, 0, 8), 8), ValueError, 'pad it to 8 x 8'),
        (lambda: patchify(torch.zeros(3, 8, 8), 4), ValueError, r'\(3, 8, 8\)'),
        (lambda: patchify(torch.zeros(1, 3, 8, 8), 0), ValueError, 'p is 0'),
        (lambda: patchify(torch.zeros(1, 3, 8, 8), 4.0), ValueError, 'p is 4.0'),
        (lambda: patchify(np.zeros((1, 3, 8, 8)), 4), TypeError, 'ndarray'),
        (lambda: unpatchify(torch.zeros(1, 6, 48), 4, (8, 8)), ValueError, '2 x 2 = 4'),
        (lambda: unpatchify(torch.zeros(1, 4, 47), 4, (8, 8)), ValueError, '47 numbers'),
        (lambda: unpatchify(torch.zeros(1, 4, 48), 4, (8, 8), 1), ValueError, '48 numbers'),
        (lambda: unpatchify(torch.zeros(1, 4, 48), 4, (8, 9)), ValueError, 'pad it to 8 x 12'),
        (lambda: unpatchify(torch.zeros(4, 48), 4, (8, 8)), ValueError, r'\(b, n, d\)'),
        (lambda: unpatchify(torch.zeros(1, 4, 48), 4, (8, 8, 3)), ValueError, 'height and width'),
        (lambda: linear_from_conv(torch.zeros(8, 48)), ValueError, r'\(dim, c, p, p\)'),
    ],
)
def test_bad_patches(call, error, says):
    with pytest.raises(error, match=says):
        call()


# positions ----------------------------------------------------------------------------------------


def positions_by_formula(dim, h, w, cls):
    "In numpy, number by number."
    rows = [[0.0] * dim] if cls else []
    for v in range(h):
        for u in range(w):
            omega = [1 / 10000 ** (i / (dim / 4)) for i in range(dim // 4)]
            rows.append([f(o * at) for at in (u, v) for f in (math.sin, math.cos) for o in omega])
    return np.array(rows)


@pytest.mark.parametrize(
    'dim, hw, cls',
    [(8, (3, 5), False), (64, (14, 14), True), (4, (1, 1), True), (12, (2, 7), True)],
)
def test_positions_equal_the_formula(dim, hw, cls):
    pos = sincos_pos_embed(dim, hw, cls)
    assert pos.dtype == torch.float32 and pos.shape == (hw[0] * hw[1] + cls, dim)
    assert np.abs(pos.numpy() - positions_by_formula(dim, *hw, cls)).max() < 1e-6


def test_positions_are_all_different_and_equally_long():
    pos = sincos_pos_embed(64, (20, 20))
    assert torch.pdist(pos).min() > 0.5
    assert torch.allclose(pos.norm(dim=1), torch.tensor(math.sqrt(32)))


@pytest.mark.parametrize('dim', [0, 2, 6, 63, -4, 8.0])
def test_bad_dim(dim):
    with pytest.raises(ValueError, match='multiple of 4'):
        sincos_pos_embed(dim, (2, 2))


def test_interpolation():
    from timm.layers import resample_abs_pos_embed

    pos = torch.randn(1, 1 + 7 * 5, 16)
    new = interpolate_pos_embed(pos, (7, 5), (10, 12), extra=1)
    assert new.shape == (1, 121, 16) and torch.equal(new[:, :1], pos[:, :1])
    theirs = resample_abs_pos_embed(
        pos, new_size=[10, 12], old_size=[7, 5], num_prefix_tokens=1, antialias=False
    )
    assert torch.allclose(new, theirs, atol=1e-6)
    assert torch.equal(interpolate_pos_embed(pos[0], (7, 5), (10, 12), extra=1), new[0])
    assert torch.allclose(interpolate_pos_embed(pos, (7, 5), (7, 5), extra=1), pos, atol=1e-6)
    assert torch.allclose(interpolate_pos_embed(torch.ones(4, 8), 2, (3, 9)), torch.ones(27, 8))
    assert interpolate_pos_embed(pos.bfloat16(), (7, 5), 3, extra=1).dtype == torch.bfloat16


@pytest.mark.parametrize(
    'shape, extra', [((1, 36, 8), 0), ((36, 8), 2), ((2, 35, 8), 0), ((35,), 0)]
)
def test_bad_interpolation(shape, extra):
    with pytest.raises(ValueError, match='pos has shape'):
        interpolate_pos_embed(torch.zeros(shape), (7, 5), 4, extra)


# masks --------------------------------------------------------------------------------------------


def test_count_is_exact_for_every_n_and_ratio():
    tokens = torch.zeros(1, 400, 1)
    for n in range(1, 401):
        for r in range(1, 100):
            removed = (2 * n * r + 100) // 200  # n*r/100, half up, in whole numbers
            if removed == n:
                continue
            assert n_removed(n, r / 100) == removed, (n, r)
    for n, r, keep in [
        (10, 0.9, 1),
        (100, 0.9, 10),
        (50, 0.9, 5),
        (196, 0.75, 49),
        (64, 0.75, 16),
        (2, 0.25, 1),
        (3, 0.5, 1),
        (400, 0.07, 372),
    ]:
        assert random_masking(tokens[:, :n], r)[0].shape[1] == keep, (n, r)


@pytest.mark.parametrize(
    'ratio', [0.7, np.float32(0.7), np.float64(0.7), Decimal('.7'), Fraction(7, 10)]
)
def test_ratio_of_any_kind(ratio):
    assert random_masking(torch.zeros(1, 10, 2), ratio)[0].shape == (1, 3, 2)


@pytest.mark.parametrize(
    'ratio', [1, 1.0, -0.1, 1.5, math.nan, math.inf, '0.5', None, torch.tensor(0.5)]
)
@pytest.mark.parametrize('name', MASKINGS)
def test_bad_ratio(name, ratio):
    with pytest.raises(ValueError, match='ratio is'):
        MASKINGS[name](torch.zeros(1, 48, 2), ratio)


def test_no_token_left():
    with pytest.raises(ValueError, match='none of 2'):
        random_masking(torch.zeros(1, 2, 2), 0.75)
    with pytest.raises(ValueError, match='none of 48'):
        block_masking(torch.zeros(1, 48, 2), 0.99, (6, 8))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('ratio', [0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize('name', MASKINGS)
def test_triple(name, ratio, device):
    tokens = torch.randn(5, 48, 3, device=device)
    visible, mask, ids = MASKINGS[name](
        tokens, ratio, generator=gen()
    )  # a CPU generator serves any device
    keep = 48 - int(48 * ratio)
    assert (
        visible.shape == (5, keep, 3)
        and mask.dtype == torch.float32
        and visible.device == mask.device == ids.device == tokens.device
    )
    assert (mask.sum(1) == 48 - keep).all() and set(mask.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(ids.sort(1).values, torch.arange(48, device=device).expand(5, 48))
    full = unshuffle(visible, ids, torch.full((1, 1, 3), 9.0, device=device))
    assert torch.equal(
        full, torch.where(mask[..., None] == 1, torch.tensor(9.0, device=device), tokens)
    )
    again = MASKINGS[name](tokens, ratio, generator=gen())
    assert torch.equal(again[1], mask) and torch.equal(again[2], ids)
    if ratio == 0:
        assert not mask.any()


@pytest.mark.parametrize('name', MASKINGS)
def test_samples_and_seeds_differ(name):
    masks = MASKINGS[name](torch.zeros(32, 48, 1), 0.75, generator=gen())[1]
    assert len(masks.unique(dim=0)) > 3
    assert not torch.equal(masks, MASKINGS[name](torch.zeros(32, 48, 1), 0.75, generator=gen(1))[1])


def test_random_masking_is_uniform():
    kept = 1 - random_masking(torch.zeros(20_000, 10, 1), 0.7, gen())[1]
    assert (kept.mean(0) - 0.3).abs().max() < 0.015  # 4.6 standard errors
    both = kept.T @ kept / len(kept)
    assert (both.fill_diagonal_(1 / 15) - 0.3 * 2 / 9).abs().max() < 0.01


def test_block_mask_is_made_of_rectangles():
    for ratio in (0.1, 0.4, 0.75, 0.9):
        mask = block_masking(torch.zeros(64, 196, 1), ratio, (14, 14), gen())[1].reshape(
            64, 1, 14, 14
        )
        assert (mask.sum((1, 2, 3)) == math.floor(196 * ratio + 0.5)).all()
        same = (mask[..., 1:] == mask[..., :-1]).float().mean()
        random = random_masking(torch.zeros(64, 196, 1), ratio, gen())[1].reshape(64, 1, 14, 14)
        assert 1 - same < 0.5 * (
            1 - (random[..., 1:] == random[..., :-1]).float().mean()
        )  # edges are rarer by more than half
    one = block_masking(
        torch.zeros(64, 196, 1), 25 / 196, (14, 14), gen(), area=(0.2, 0.3), aspect=(1, 1)
    )[1].reshape(64, 14, 14)
    assert (one.any(1).sum(1) == 5).all() and (
        one.any(2).sum(1) == 5
    ).all()  # 25 patches: one square


def test_block_mask_of_long_grids():
    for hw in ((1, 48), (48, 1), (2, 24)):
        for ratio in (0.02, 0.5, 0.97):
            assert (
                block_masking(torch.zeros(8, 48, 1), ratio, hw)[1].sum(1)
                == math.floor(48 * ratio + 0.5)
            ).all()


@pytest.mark.parametrize(
    'hw, ratio, s, gone',
    [
        ((6, 8), 0.75, 2, False),
        ((6, 8), 0.25, 2, True),
        ((6, 9), 8 / 9, 3, False),
        ((6, 9), 0.11, 3, True),
        ((8, 8), 0.9375, 4, False),
    ],
)
def test_grid(hw, ratio, s, gone):
    mask = grid_masking(torch.zeros(16, hw[0] * hw[1], 1), ratio, hw, gen())[1].reshape(16, *hw)
    odd = mask if gone else 1 - mask  # the one in s x s
    cells = odd.reshape(16, hw[0] // s, s, hw[1] // s, s).permute(0, 1, 3, 2, 4)
    assert (cells.sum((3, 4)) == 1).all() and (
        cells == cells[:, :1, :1]
    ).all()  # one a cell, everywhere at the same place


def test_checkerboard():
    mask = grid_masking(torch.zeros(4, 15 * 4, 1), 0.5, (15, 4), gen())[1].reshape(4, 15, 4)
    assert (mask[:, 1:] + mask[:, :-1] == 1).all() and (mask[..., 1:] + mask[..., :-1] == 1).all()


@pytest.mark.parametrize(
    'call, says',
    [
        (lambda: grid_masking(torch.zeros(1, 48, 2), 0.6, (6, 8)), 'allows 0, 0.25, 0.5, 0.75'),
        (lambda: grid_masking(torch.zeros(1, 49, 2), 0.75, (7, 7)), 'allows 0, 0.02041, 0.9796'),
        (lambda: grid_masking(torch.zeros(1, 48, 2), 0.75, (6, 6)), '6 x 6'),
        (lambda: block_masking(torch.zeros(1, 48, 2), 0.75, (6, 6)), 'tokens holds 48'),
        (lambda: random_masking(torch.zeros(48, 2), 0.75), r'\(b, n, d\)'),
    ],
)
def test_bad_masks(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_unshuffle_refuses():
    visible, _, ids = random_masking(torch.randn(2, 8, 4), 0.5)
    token = torch.zeros(4)
    for bad in (ids.clamp(max=6), ids + 1, ids * 0, -ids):
        with pytest.raises(ValueError, match='no permutation'):
            unshuffle(visible, bad, token)
    for bad in (ids[:1], ids[:, :3], ids[0]):
        with pytest.raises(ValueError, match='ids_restore has shape'):
            unshuffle(visible, bad, token)
    with pytest.raises(ValueError, match='mask_token'):
        unshuffle(visible, ids, torch.zeros(5))
    with pytest.raises(TypeError, match='list'):
        unshuffle([visible], ids, token)


@pytest.mark.parametrize('name', MASKINGS)
def test_gradient_is_zero_where_removed(name):
    tokens = torch.randn(3, 48, 4, requires_grad=True)
    visible, mask, _ = MASKINGS[name](tokens, 0.75)
    (visible * torch.randn_like(visible)).sum().backward()
    assert torch.equal(tokens.grad.abs().sum(2) == 0, mask == 1)


def test_gradient_of_pixels_through_the_encoder_and_of_the_mask_token():
    enc, x, token = (
        ViTEncoder(32, 8, 16, 2, 2),
        torch.rand(2, 3, 32, 32, requires_grad=True),
        nn.Parameter(torch.zeros(16)),
    )
    latent, mask, ids = enc(x, partial(random_masking, ratio=0.75))
    (unshuffle(latent[:, 1:], ids, token) * torch.randn(2, 16, 16)).sum().backward()
    assert torch.equal(patchify(x.grad, 8).abs().sum(2) == 0, mask == 1)
    assert token.grad.abs().min() > 0


# attention and blocks -----------------------------------------------------------------------------


def timm_block(dim, heads, mlp=4.0):
    from timm.models.vision_transformer import Block as Theirs

    return Theirs(dim, heads, mlp, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))


@pytest.mark.parametrize('dim, heads, mlp', [(64, 4, 4.0), (48, 1, 2.0), (32, 8, 4.0)])
def test_block_equals_timm(dim, heads, mlp):
    theirs, ours = shake(timm_block(dim, heads, mlp)).eval(), Block(dim, heads, mlp).eval()
    ours.load_state_dict(theirs.state_dict())
    x, y = torch.randn(2, 17, dim, requires_grad=True), torch.randn(2, 17, dim)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    grads = [torch.autograd.grad((f(x) * y).sum(), [x, f.attn.qkv.weight]) for f in (ours, theirs)]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*grads))


def test_encoder_equals_timm():
    from timm.models import VisionTransformer

    theirs = shake(
        VisionTransformer(
            img_size=(32, 48),
            patch_size=8,
            embed_dim=64,
            depth=3,
            num_heads=4,
            num_classes=0,
            global_pool='',
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
    ).eval()
    ours, state = ViTEncoder((32, 48), 8, 64, 3, 4).eval(), theirs.state_dict()
    state['patch_embed.weight'] = linear_from_conv(state.pop('patch_embed.proj.weight'))
    state['patch_embed.bias'] = state.pop('patch_embed.proj.bias')
    ours.load_state_dict(state)  # strict; timm's learned class position too
    x = torch.rand(2, 3, 32, 48)
    patches = F.linear(patchify(x, 8), ours.patch_embed.weight, ours.patch_embed.bias)
    assert torch.allclose(patches, theirs.patch_embed(x), atol=1e-5)
    assert torch.allclose(ours(x)[0], theirs.forward_features(x), atol=1e-5)


def test_attention_weights():
    attn, x = shake(Attention(32, 4)), torch.randn(2, 9, 32)
    a = attn.weights(x)
    assert a.shape == (2, 4, 9, 9) and torch.allclose(a.sum(-1), torch.ones(2, 4, 9))
    v = attn.qkv(x)[..., 64:].reshape(2, 9, 4, 8).transpose(1, 2)
    assert torch.allclose(attn.proj((a @ v).transpose(1, 2).reshape(2, 9, 32)), attn(x), atol=1e-5)
    assert Attention(32, 4, bias=False).qkv.bias is None


def test_mlp_does_not_mix_tokens():
    mlp, x = Mlp(16, 32), torch.randn(1, 5, 16)
    moved = (mlp(x.index_fill(1, torch.tensor([2]), 0)) - mlp(x)).abs().sum(2)[0]
    assert moved[2] > 0 and not moved[[0, 1, 3, 4]].any()


def test_drop_path():
    x = torch.randn(20_000, 3, 2)
    out = DropPath(0.3)(x)
    gone = (out == 0).all(2).all(1)
    assert abs(gone.float().mean() - 0.3) < 0.015 and torch.allclose(out[~gone], x[~gone] / 0.7)
    assert abs(DropPath(0.3)(torch.ones(20_000, 1)).mean() - 1) < 0.02
    assert torch.equal(DropPath(0.3).eval()(x), x) and DropPath(0)(x) is x
    assert DropPath(0.3)(x.bfloat16()).dtype == torch.bfloat16
    for p in (-0.1, 1, 1.5):
        with pytest.raises(ValueError, match='drop_path'):
            DropPath(p)


def test_drop_path_grows_with_depth_and_rests_at_deployment():
    enc = ViTEncoder(16, 8, 16, 5, 2, drop_path=0.4)
    assert np.allclose([b.drop_path.p for b in enc.blocks], [0, 0.1, 0.2, 0.3, 0.4])
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(enc.eval()(x)[0], enc(x)[0])
    assert not torch.equal(enc.train()(x.repeat(8, 1, 1, 1))[0], enc(x.repeat(8, 1, 1, 1))[0])


@pytest.mark.parametrize('dim, heads', [(30, 4), (32, 0), (32, 5)])
def test_bad_heads(dim, heads):
    with pytest.raises(ValueError, match=f'heads is {heads}'):
        Attention(dim, heads)


# the encoder --------------------------------------------------------------------------------------


def test_order_counts_only_with_positions():
    x, perm = torch.rand(2, 3, 32, 40), torch.randperm(20)
    shuffled = unpatchify(patchify(x, 8)[:, perm], 8, (32, 40))
    with_pos, without = (
        ViTEncoder((32, 40), 8, 32, 2, 4).eval(),
        ViTEncoder((32, 40), 8, 32, 2, 4).eval(),
    )
    without.pos_embed.zero_()
    assert torch.allclose(without(x)[0][:, 1:][:, perm], without(shuffled)[0][:, 1:], atol=1e-5)
    assert (with_pos(x)[0][:, 1:][:, perm] - with_pos(shuffled)[0][:, 1:]).abs().max() > 0.1


def test_hidden_patches_do_not_matter_and_positions_come_first():
    enc, x = ViTEncoder(32, 8, 32, 2, 4).eval(), torch.rand(2, 3, 32, 32)
    hide = lambda t: random_masking(t, 0.75, gen())
    latent, mask, ids = enc(x, hide)
    assert latent.shape == (2, 5, 32) and mask.shape == ids.shape == (2, 16)
    other = unpatchify(
        torch.where(mask[..., None] == 1, torch.rand(2, 16, 192), patchify(x, 8)), 8, (32, 32)
    )
    assert torch.equal(enc(other, hide)[0], latent)
    tokens = enc.embed(x)  # by hand: positions, then hiding, then the class token
    assert torch.allclose(
        tokens, enc.patch_embed(patchify(x, 8)) + sincos_pos_embed(32, 4), atol=1e-6
    )
    by_hand = torch.cat([enc.cls_token.expand(2, -1, -1), hide(tokens)[0]], 1)
    for block in enc.blocks:
        by_hand = block(by_hand)
    assert torch.allclose(enc.norm(by_hand), latent, atol=1e-5)


def test_without_masking_and_ratio_0_agree():
    enc, x = ViTEncoder(32, 8, 32, 2, 4, cls_token=False).eval(), torch.rand(2, 3, 32, 32)
    latent, mask, ids = enc(x)
    assert (
        latent.shape == (2, 16, 32)
        and not mask.any()
        and torch.equal(ids, torch.arange(16).expand(2, 16))
    )
    visible, mask, ids = enc(x, partial(random_masking, ratio=0))
    assert not mask.any() and torch.allclose(
        unshuffle(visible, ids, torch.zeros(32)), latent, atol=1e-5
    )


@pytest.mark.parametrize('hw', [(16, 16), (40, 24), (64, 64)])
def test_another_size(hw):
    enc, x = ViTEncoder(32, 8, 32, 1, 4), torch.rand(1, 3, *hw)
    assert torch.allclose(
        enc.embed(x) - enc.patch_embed(patchify(x, 8)),
        sincos_pos_embed(32, (hw[0] // 8, hw[1] // 8)),
        atol=1e-6,
    )
    fresh = ViTEncoder(hw, 8, 32, 1, 4)
    fresh.load_state_dict(
        {k: v for k, v in enc.state_dict().items() if k != 'pos_embed'}, strict=False
    )
    assert torch.allclose(fresh(x)[0], enc(x)[0], atol=1e-5)


def test_names_and_initialisation():
    enc = ViTEncoder(32, 8, 64, 2, 4)
    assert {k.split('.')[0] for k in enc.state_dict()} == {
        'cls_token',
        'pos_embed',
        'patch_embed',
        'blocks',
        'norm',
    }
    assert {k for k in enc.state_dict() if '.1.' in k} == {
        f'blocks.1.{m}.{t}'
        for m in ('norm1', 'attn.qkv', 'attn.proj', 'norm2', 'mlp.fc1', 'mlp.fc2')
        for t in ('weight', 'bias')
    }
    assert 'pos_embed' not in dict(enc.named_parameters()) and enc.pos_embed.shape == (1, 17, 64)
    bound = math.sqrt(6 / (64 + 3 * 64))  # xavier of the fused layer
    assert 0.98 * bound < enc.blocks[0].attn.qkv.weight.abs().max() <= bound
    assert not any(p.any() for n, p in enc.named_parameters() if n.endswith('bias'))
    assert 0.01 < enc.cls_token.std() < 0.03 and enc.norm.eps == enc.blocks[0].norm1.eps == 1e-6
    assert 'cls_token' not in ViTEncoder(32, 8, 64, 1, 4, cls_token=False).state_dict()


@pytest.mark.parametrize('device', DEVICES)
def test_bf16_autocast(device):
    enc, x = ViTEncoder(32, 8, 32, 2, 4).to(device), torch.rand(2, 3, 32, 32, device=device)
    token = nn.Parameter(torch.zeros(1, 1, 32, device=device))
    full = enc(x)[0]
    with torch.autocast(device, torch.bfloat16):
        half, (latent, mask, ids) = enc(x)[0], enc(x, partial(random_masking, ratio=0.75))
        out = unshuffle(enc.patch_embed(latent.new_zeros(2, 4, 192)), ids, token)
    assert out.dtype == torch.bfloat16 and mask.dtype == torch.float32
    assert torch.isfinite(latent).all() and (half.float() - full).abs().mean() < 0.03
    latent.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in enc.parameters() if p.grad is not None)


def test_the_whole_model_in_half_precision():
    enc = ViTEncoder(32, 8, 32, 2, 4).to(torch.bfloat16)
    for size in (32, 48):
        assert (
            enc(torch.rand(1, 3, size, size).bfloat16(), partial(random_masking, ratio=0.5))[
                0
            ].dtype
            == torch.bfloat16
        )


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda: ViTEncoder(30, 8, 32, 1, 4), ValueError, 'img_size is 30 x 30.*pad it to 32 x 32'),
        (lambda: ViTEncoder(32, 8, 30, 1, 2), ValueError, 'multiple of 4'),
        (lambda: ViTEncoder(32, 8, 32, 1, 5), ValueError, 'heads is 5'),
        (lambda: ViTEncoder(32, 8, 32, 1, 4)(torch.rand(1, 1, 32, 32)), ValueError, '1 channels'),
        (
            lambda: ViTEncoder(32, 8, 32, 1, 4)(torch.rand(1, 3, 32, 30)),
            ValueError,
            'pad it to 32 x 32',
        ),
        (
            lambda: ViTEncoder(32, 8, 32, 1, 4)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
            TypeError,
            'uint8',
        ),
        (lambda: ViTEncoder(32, 8, 32, 1, 4)(torch.rand(3, 32, 32)), ValueError, r'\(b, c, h, w\)'),
    ],
)
def test_bad_encoder_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


# what comes from NumPy, numbers out of range, states ----------------------------------------------


def test_sizes_from_numpy_are_python_integers():
    torch.manual_seed(3)
    one = ViTEncoder(
        np.int64(24),
        np.int64(4),
        np.int64(32),
        np.int32(2),
        np.int64(4),
        np.int64(3),
        mlp=np.float32(2),
        drop_path=np.float32(0.25),
    )
    torch.manual_seed(3)
    two = ViTEncoder(24, 4, 32, 2, 4, 3, mlp=2.0, drop_path=0.25)
    x = torch.rand(2, 3, 24, 24)
    assert torch.equal(one.eval()(x)[0], two.eval()(x)[0])
    sizes = [
        one.patch,
        one.channels,
        *one.grid,
        one.blocks[0].attn.heads,
        one.blocks[1].drop_path.p,
    ]
    assert json.loads(json.dumps(sizes)) == [4, 3, 6, 6, 4, 0.25] and all(
        type(v) in (int, float) for v in sizes
    )


@pytest.mark.parametrize(
    'kw, name',
    [
        (dict(area=(-1, 5)), 'area'),
        (dict(area=(0.3, 0.1)), 'area'),
        (dict(area=(0.1, math.nan)), 'area'),
        (dict(area=(0.1, 1.5)), 'area'),
        (dict(aspect=(0, 3)), 'aspect'),
        (dict(aspect=(-1, 3)), 'aspect'),
        (dict(aspect=(3, 0.3)), 'aspect'),
        (dict(aspect=(0.3, math.inf)), 'aspect'),
    ],
)
def test_rectangles_out_of_range(kw, name):
    with pytest.raises(ValueError, match=f'^{name} is'):
        block_masking(torch.zeros(1, 48, 1), 0.5, (6, 8), **kw)


def test_rectangles_from_numpy():
    plain = block_masking(torch.zeros(2, 48, 1), 0.5, (6, 8), gen(), (0.25, 0.5), (0.5, 2))
    again = block_masking(
        torch.zeros(2, 48, 1),
        np.float32(0.5),
        (np.int64(6), np.int64(8)),
        gen(),
        (np.float32(0.25), np.float64(0.5)),
        (np.float32(0.5), np.int64(2)),
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


@pytest.mark.parametrize('p', [1, 1.5, -0.1, math.nan, math.inf])
def test_the_chance_of_one_block_is_checked_too(p):
    "With one block it is multiplied by 0."
    with pytest.raises(ValueError, match='drop_path is'):
        ViTEncoder(24, 4, 32, 1, 4, drop_path=p)


def test_positions_in_double_stay_double():
    pos = torch.randn(1, 1 + 12, 8, dtype=torch.float64)
    by_hand = (
        F.interpolate(
            pos[0, 1:].T.reshape(1, 8, 3, 4), size=(5, 6), mode='bicubic', align_corners=False
        )[0]
        .flatten(1)
        .T
    )
    got = interpolate_pos_embed(pos, (3, 4), (np.int64(5), np.int64(6)), extra=np.int64(1))
    assert (
        got.dtype == torch.float64
        and torch.equal(got[0, 0], pos[0, 0])
        and (got[0, 1:] - by_hand).abs().max() < 1e-12
    )


@pytest.mark.parametrize('extra', [-1, 1.0, True, math.nan])
def test_leading_tokens_are_counted(extra):
    pos = torch.zeros(12 + int(extra if extra == extra else 0), 8)
    with pytest.raises(ValueError, match='extra is'):
        interpolate_pos_embed(pos, (3, 4), (5, 6), extra=extra)


def pixel_model(*stats):
    from restore_lib.patching import PixelStats

    model = PixelStats()
    model.set_stats(*stats)
    return model


@pytest.mark.parametrize(
    'mean, std',
    [
        (0.5, 0.5),
        ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3)),
        (np.float32(0.25), np.array([0.5, 0.25, 2])),
        (torch.tensor(0.1), torch.tensor([[[0.5]], [[0.6]], [[0.7]]])),
        (0, 1),
    ],
)
def test_statistics_are_state(mean, std):
    model, other = pixel_model(mean, std, 3), pixel_model(0.3, (0.7, 0.8, 0.9), 3)
    other.load_state_dict(model.state_dict())
    assert (
        torch.equal(other.mean, model.mean)
        and torch.equal(other.std, model.std)
        and model.mean.shape[1:] == (1, 1)
    )
    assert torch.allclose(
        model.std.flatten(), torch.as_tensor(np.asarray(std), dtype=torch.float32).flatten()
    )
    other.mean.add_(1)
    assert not torch.equal(other.mean, model.mean)  # a copy
    for key in ('mean', 'std'):
        with pytest.raises(RuntimeError, match=key):
            other.load_state_dict({k: v for k, v in model.state_dict().items() if k != key})


@pytest.mark.parametrize(
    'mean, std, says',
    [
        (math.nan, 1, 'mean is nan'),
        (0, 0, 'std is 0.0; expected a number above 0'),
        (0, -1, 'std is -1'),
        (0, (1, 1, math.inf), 'std is inf'),
        ((1, 2), 1, 'mean holds 2 numbers; expected 1 or 3'),
        (0, [1] * 4, 'std holds 4'),
        (0, [], 'std holds 0'),
    ],
)
def test_statistics_out_of_range(mean, std, says):
    PixelStats = getattr(__import__('restore_lib.patching', fromlist=['PixelStats']), 'PixelStats')
    with pytest.raises(ValueError, match=says):
        PixelStats().set_stats(mean, std, 3)


# arguments that make no sense ---------------------------------------------------------------------


@pytest.mark.parametrize('ratio', [False, np.bool_(False), Decimal('NaN'), Decimal('sNaN')])
@pytest.mark.parametrize('name', MASKINGS)
def test_ratio_that_is_no_share(name, ratio):
    with pytest.raises(ValueError, match='ratio is'):
        MASKINGS[name](torch.zeros(1, 48, 2), ratio)


@pytest.mark.parametrize('name', MASKINGS)
def test_a_seed_is_no_generator(name):
    with pytest.raises(TypeError, match='generator is 3; expected a torch.Generator'):
        MASKINGS[name](torch.zeros(1, 48, 2), 0.75, generator=3)


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda: patchify(torch.zeros(1, 3, 8, 8), True), ValueError, 'p is True'),
        (lambda: patchify(torch.zeros(1, 3, 8, 8), '4'), TypeError, "p is '4'"),
        (lambda: unpatchify(torch.zeros(1, 4, 48), 4, 'ab'), TypeError, "hw is 'ab'"),
        (lambda: unpatchify(torch.zeros(1, 4, 48), 4, None), TypeError, 'hw is None'),
        (lambda: unpatchify(torch.zeros(1, 4, 48), 4, 8.0), ValueError, 'hw is 8.0'),
        (lambda: unpatchify(torch.zeros(1, 4, 48), 4, (8, True)), ValueError, 'hw is .8, True'),
        (lambda: unpatchify(torch.zeros(1, 4, 48), 4, 8, 3.0), ValueError, 'channels is 3.0'),
        (lambda: unpatchify(torch.zeros(1, 4, 48), 4, 8, 0), ValueError, 'channels is 0'),
        (lambda: linear_from_conv([1.0]), TypeError, 'weight is list'),
        (lambda: interpolate_pos_embed([1.0], 2, 4), TypeError, 'pos is list'),
        (
            lambda: interpolate_pos_embed(torch.zeros(4, 8, dtype=torch.int64), 2, 4),
            TypeError,
            'pos is torch.int64',
        ),
        (lambda: interpolate_pos_embed(torch.zeros(4, 8), 2, None), TypeError, 'new_hw is None'),
        (lambda: Attention(32, 4)(torch.zeros(2, 5, 16)), ValueError, r'x has shape .* 32\)'),
        (lambda: Attention(32, 4)(torch.zeros(5, 32)), ValueError, 'x has shape'),
        (lambda: Attention(32, 4).weights(np.zeros((2, 5, 32))), TypeError, 'x is ndarray'),
        (lambda: Block(32, 4).attn(torch.zeros(2, 5, 16)), ValueError, 'x has shape'),
    ],
)
def test_arguments_are_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize(
    'change, error, says',
    [
        (dict(ids_restore=[[0, 1]]), TypeError, 'ids_restore is list'),
        (dict(ids_restore=torch.zeros(2, 8)), TypeError, 'ids_restore is torch.float32'),
        (dict(mask_token=[0.0] * 4), TypeError, 'mask_token is list'),
    ],
)
def test_unshuffle_names_what_is_no_tensor_of_its_kind(change, error, says):
    visible, _, ids = random_masking(torch.randn(2, 8, 4), 0.5)
    good = dict(tokens_visible=visible, ids_restore=ids, mask_token=torch.zeros(4))
    with pytest.raises(error, match=says):
        unshuffle(**(good | change))


@pytest.mark.parametrize('masking', [0, 0.0, False, 0.75, 'random', ()])
def test_a_ratio_is_no_masking(masking):
    "0 and False used to hide nothing, without a word."
    enc = ViTEncoder(32, 8, 32, 1, 4)
    with pytest.raises(TypeError, match='masking is .*expected a function of tokens'):
        enc(torch.rand(1, 3, 32, 32), masking)


# what the lesson says of positions ----------------------------------------------------------------


def test_the_product_of_two_positions_depends_on_their_offset_only():
    grid = sincos_pos_embed(32, (9, 11)).double().reshape(9, 11, 32)
    here, there = grid[:6, :7], grid[3:, 4:]  # three rows and four columns apart
    assert (here * there).sum(2).std() < 1e-6


@pytest.mark.parametrize(
    'name, exact, largest', [('flip', True, 1.01), ('turn', True, 1.01), ('any', False, math.inf)]
)
def test_what_a_matrix_between_positions_can_do(name, exact, largest):
    "Mirrored and turned places are linear in a position, places in random order are not."
    e, at = sincos_pos_embed(64, 8).double(), torch.arange(64).reshape(8, 8)
    target = {'flip': at.flip(1), 'turn': at.rot90(), 'any': torch.randperm(64)}[name].flatten()
    m = torch.linalg.lstsq(e, e[target], rcond=1e-6, driver='gelsd').solution
    assert m.abs().max() < largest
    assert ((e @ m - e[target]).square().mean().sqrt() < 1e-6) == exact


def test_hidden_patches_can_be_left_out_before_the_embedding():
    "As many multiplications as the row above of the lesson's last table."
    enc, x = ViTEncoder(32, 8, 32, 2, 4).eval(), torch.rand(2, 3, 32, 32)
    latent, mask, ids = enc(x, lambda t: random_masking(t, 0.75, gen()))
    visible, _, _ = random_masking(patchify(x, 8), 0.75, gen())
    pos, _, _ = random_masking(enc.pos_embed[:, 1:].expand(2, -1, -1), 0.75, gen())
    assert torch.allclose(enc.transform(enc.patch_embed(visible) + pos), latent, atol=1e-6)


# names that other lessons take from here ----------------------------------------------------------


@pytest.mark.parametrize('name', ['Flagged', 'PixelStats', 'as_hw', 'patch_grid'])
def test_names_that_moved_are_still_here(name):
    import restore_lib.knobs
    import restore_lib.patch_parts
    import restore_lib.patching

    home = restore_lib.knobs if name in ('Flagged', 'PixelStats') else restore_lib.patch_parts
    assert getattr(restore_lib.patching, name) is getattr(home, name)
