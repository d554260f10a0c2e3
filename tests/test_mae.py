"""What lesson 06 does not teach: the loss derived anew, parity with the reference's formulas and
with transformers, published files, bad input."""

import argparse, math, pickle
from functools import partial

from common import gen, shake
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from restore_lib import mae as M
from restore_lib.audit import reads_truth
from restore_lib.mae import (
    MAE,
    FillingMAE,
    features,
    inpaint_bilinear,
    inpaint_mean,
    load_pretrained,
    mae_tiny,
    mae_vit_base,
    mae_vit_huge,
    mae_vit_large,
    masked_psnr,
    pretrainer,
    reconstruct,
)
from restore_lib.mae_parts import MASKINGS, mask_pixels, windows
from restore_lib.patching import (
    ViTEncoder,
    block_masking,
    grid_masking,
    patchify,
    random_masking,
    sincos_pos_embed,
)

SIZES = dict(img_size=24, patch=4, dim=32, depth=2, heads=4, dec_dim=16, dec_depth=2, dec_heads=2)


pytestmark = pytest.mark.usefixtures('seed')


def small(**kw):
    return shake(MAE(**(SIZES | kw)))


def numpy_patches(x, p):
    b, c, h, w = x.shape
    return np.array(
        [
            [
                x[k, :, i : i + p, j : j + p].transpose(1, 2, 0).ravel()
                for i in range(0, h, p)
                for j in range(0, w, p)
            ]
            for k in range(b)
        ]
    )


# the loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('norm_pix', [False, True])
@pytest.mark.parametrize(
    'masking, ratio', [('random', 0.75), ('random', 0.3), ('block', 0.6), ('grid', 0.75)]
)
def test_loss_by_hand(norm_pix, masking, ratio):
    model, x = (
        small(norm_pix_loss=norm_pix, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)),
        torch.rand(3, 3, 24, 24),
    )
    loss, pred, mask = model(x, ratio, masking, gen())
    assert (
        pred.shape == (3, 36, 48)
        and mask.shape == (3, 36)
        and (mask.sum(1) == math.floor(36 * ratio + 0.5)).all()
    )
    t = numpy_patches(
        (x.double().numpy() - np.reshape([0.4, 0.5, 0.6], (3, 1, 1)))
        / np.reshape([0.2, 0.3, 0.25], (3, 1, 1)),
        4,
    )
    if norm_pix:
        t = (t - t.mean(-1, keepdims=True)) / np.sqrt(t.var(-1, ddof=1, keepdims=True) + 1e-6)
    wrong = [
        np.mean((pred[b, i].detach().double().numpy() - t[b, i]) ** 2)
        for b in range(3)
        for i in range(36)
        if mask[b, i] == 1
    ]
    assert loss.item() == pytest.approx(np.mean(wrong), rel=1e-5)
    assert np.allclose(model.targets(x)[0], t, atol=2e-4 if norm_pix else 1e-5)


def test_targets_of_a_flat_patch_are_finite_and_undone():
    model, x = small(norm_pix_loss=True), torch.full((1, 3, 24, 24), 0.3)
    target, mean, dev = model.targets(x)
    assert (
        torch.isfinite(target).all()
        and torch.allclose(dev, torch.tensor(1e-3))
        and torch.allclose(mean, torch.tensor(-0.4))
    )
    assert torch.allclose(target * dev + mean, patchify((x - 0.5) / 0.5, 4), atol=1e-6)


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('norm_pix', [False, True])
def test_visible_targets_do_not_count(norm_pix, whole, monkeypatch):
    "With a latent that does not depend on the image, the image is the target and nothing else."
    model, x, plain = (
        small(norm_pix_loss=norm_pix),
        torch.rand(2, 3, 24, 24, requires_grad=True),
        MAE.encode,
    )
    monkeypatch.setattr(
        MAE, 'encode', lambda self, patches, shown: plain(self, torch.ones_like(patches), shown)
    )
    loss, pred, mask = model(x, 0.75, generator=gen(), whole=whole)
    loss.backward()
    grad = patchify(x.grad, 4)
    assert torch.equal(grad.abs().sum(2) > 0, mask == 1)
    if whole and not norm_pix:  # 2(target - pred)/(removed numbers), and the target is (x - .5)/.5
        assert torch.allclose(
            grad,
            mask[..., None] * 2 * (patchify((x - 0.5) / 0.5, 4) - pred) / (mask.sum() * 48) / 0.5,
            atol=1e-7,
        )
    gone = mask_pixels(mask, 4, 24) > 0
    call = lambda x: model(x.detach(), 0.75, generator=gen(), whole=whole)[0]
    assert torch.equal(call(torch.where(gone, x, torch.rand_like(x))), loss)
    assert not torch.allclose(call(torch.where(gone, torch.rand_like(x), x)), loss)


@pytest.mark.parametrize(
    'kw, masking, ratio',
    [
        (dict(), 'random', 0.75),
        (dict(norm_pix_loss=True, dec_depth=1), 'block', 0.5),
        (dict(dec_depth=3), 'grid', 0.25),
    ],
)
def test_removed_patches_alone(kw, masking, ratio):
    "The short way of training: the same loss, drawings and gradients."
    model, x = small(**kw), torch.rand(3, 3, 24, 24)
    results = []
    for whole in (True, False):
        model.zero_grad()
        loss, pred, mask = model(x, ratio, masking, gen(), whole)
        loss.backward()
        results.append((loss, pred, mask, [p.grad.clone() for p in model.parameters()]))
    (loss, pred, mask, grads), (loss2, pred2, mask2, grads2) = results
    assert torch.equal(mask, mask2) and torch.allclose(loss, loss2, rtol=1e-5)
    assert pred2.shape == (3, int(mask[0].sum()), 48)
    for k in range(3):  # the same patches, in the order in which they were shuffled
        a, b = pred[k][mask[k] == 1], pred2[k]
        assert (a[:, None] - b).abs().amax(2).min(1).values.max() < 1e-4 and torch.allclose(
            a.sum(0), b.sum(0), atol=1e-3
        )
    for a, b in zip(grads, grads2):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * max(1, a.abs().max()))


def test_encode_equals_the_encoder():
    model, x = small(), torch.rand(2, 3, 24, 24)
    theirs, mask, ids = model.encoder((x - 0.5) / 0.5, lambda t: random_masking(t, 0.75, gen()))
    assert torch.allclose(
        model.encode(patchify((x - 0.5) / 0.5, 4), ids.argsort(1)[:, :9]), theirs, atol=1e-5
    )


def test_removed_patches_reach_the_loss_as_targets_only():
    model, x = small(), torch.rand(2, 3, 24, 24)
    _, pred, mask = model(x, 0.75, generator=gen())
    other = torch.where(mask_pixels(mask, 4, 24) > 0, torch.rand_like(x), x)
    _, pred2, mask2 = model(other, 0.75, generator=gen())
    assert torch.equal(mask2, mask) and torch.equal(pred2, pred)


def test_visible_patches_and_every_parameter_reach_the_loss():
    model, x = small(), torch.rand(2, 3, 24, 24, requires_grad=True)
    loss, _, mask = model(x, 0.75, generator=gen())
    loss.backward()
    assert (patchify(x.grad, 4).abs().sum(2) > 0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_seeds():
    model, x = small(), torch.rand(2, 3, 24, 24)
    for masking, ratio in (('random', 0.75), ('block', 0.5), ('grid', 0.75)):
        one, two, three = (model(x, ratio, masking, gen(s)) for s in (0, 0, 1))
        assert all(torch.equal(a, b) for a, b in zip(one, two)) and not torch.equal(
            one[2], three[2]
        )
    torch.manual_seed(5)
    a = model(x)[2]
    torch.manual_seed(5)
    assert torch.equal(model(x)[2], a) and not torch.equal(model(x)[2], a)


def test_masks_are_those_of_patching():
    model, x = MAE(**(SIZES | dict(img_size=(24, 32)))), torch.rand(2, 3, 24, 32)
    for name, f, ratio in (
        ('random', random_masking, 0.75),
        ('block', partial(block_masking, hw=(6, 8)), 0.5),
        ('grid', partial(grid_masking, hw=(6, 8)), 0.75),
    ):
        assert torch.equal(
            model(x, ratio, name, gen())[2], f(torch.zeros(2, 48, 1), ratio, generator=gen())[1]
        )


@pytest.mark.parametrize(
    'kw, shape',
    [
        (dict(img_size=(16, 40)), (2, 3, 16, 40)),
        (dict(channels=1), (2, 1, 24, 24)),
        (dict(channels=4, mean=(0, 0, 0, 0.5)), (1, 4, 24, 24)),
        (dict(dec_depth=1), (1, 3, 24, 24)),
        (dict(patch=8, norm_pix_loss=True), (1, 3, 24, 24)),
    ],
)
def test_shapes(kw, shape):
    model, x = small(**kw), torch.rand(shape)
    loss, pred, mask = model(x)
    assert (
        torch.isfinite(loss)
        and pred.shape == patchify(x, model.encoder.patch).shape
        and mask.shape == pred.shape[:2]
    )
    assert reconstruct(model, x)[0].shape == x.shape


@pytest.mark.parametrize(
    'call, error, says',
    [
        (
            lambda: MAE(**(SIZES | dict(img_size=25))),
            ValueError,
            'img_size is 25 x 25.*pad it to 28 x 28',
        ),
        (lambda: MAE(**(SIZES | dict(dec_heads=3))), ValueError, 'heads is 3'),
        (lambda: MAE(**(SIZES | dict(dec_dim=18))), ValueError, 'multiple of 4'),
        (lambda: small()(torch.rand(1, 3, 24, 24), 0), ValueError, 'ratio is 0'),
        (lambda: small()(torch.rand(1, 3, 24, 24), 0.001), ValueError, 'removes no patch'),
        (lambda: small()(torch.rand(1, 3, 24, 24), 1), ValueError, 'ratio is 1'),
        (lambda: small()(torch.rand(1, 3, 24, 24), 0.999), ValueError, 'none of 36'),
        (lambda: small()(torch.rand(1, 3, 24, 24), -0.1), ValueError, 'ratio is -0.1'),
        (lambda: small()(torch.rand(1, 3, 24, 24), 0.6, 'grid'), ValueError, 'allows'),
        (
            lambda: small()(torch.rand(1, 3, 24, 24), masking='blocks'),
            ValueError,
            "masking is 'blocks'.*'random', 'block', 'grid'",
        ),
        (lambda: small()(torch.rand(1, 1, 24, 24)), ValueError, '1 channels'),
        (
            lambda: small(mean=(0.4, 0.5, 0.6))(torch.rand(1, 1, 24, 24)),
            ValueError,
            '1 channels',
        ),  # would broadcast to three
        (lambda: small()(torch.rand(1, 3, 32, 32)), ValueError, '32 x 32.*24 x 24'),
        (lambda: small()(torch.rand(1, 3, 24, 25)), ValueError, '24 x 25'),
        (lambda: small()(torch.rand(3, 24, 24)), ValueError, r'\(b, c, h, w\)'),
        (lambda: small()(torch.ones(1, 3, 24, 24, dtype=torch.uint8)), TypeError, 'uint8'),
        (lambda: small()(torch.full((1, 3, 24, 24), 200.0)), ValueError, '0 to 255'),
        (
            lambda: reconstruct(small(), torch.ones(1, 3, 24, 24, dtype=torch.uint8)),
            TypeError,
            'uint8',
        ),
        (lambda: reconstruct(small(), torch.rand(1, 1, 24, 24)), ValueError, '1 channels'),
        (
            lambda: reconstruct(small(), torch.rand(1, 3, 24, 24), stats='mean'),
            ValueError,
            "stats is 'mean'",
        ),
        (lambda: reconstruct(small(), torch.rand(1, 3, 24, 24), 0), ValueError, 'ratio is 0'),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_ids_restore_must_be_a_permutation():
    model = small()
    with pytest.raises(ValueError, match='no permutation'):
        model.decode(torch.zeros(1, 10, 32), torch.zeros(1, 36, dtype=torch.long))


# parity -------------------------------------------------------------------------------------------


def reference(state, x, noise, ratio, heads, dec_heads, norm_pix, p):
    "The published forward, from its formulas, with no module of ours: (loss, pred, mask)."
    linear = lambda t, k: t @ state[k + '.weight'].T + state[k + '.bias']

    def norm(t, k):
        mean, var = t.mean(-1, keepdim=True), t.var(-1, keepdim=True, unbiased=False)
        return (t - mean) / torch.sqrt(var + 1e-6) * state[k + '.weight'] + state[k + '.bias']

    def block(t, k, heads):
        d = t.shape[2]
        q, kk, v = (
            linear(norm(t, k + '.norm1'), k + '.attn.qkv')[..., i * d : (i + 1) * d]
            for i in range(3)
        )
        outs = []
        for s in (slice(j * d // heads, (j + 1) * d // heads) for j in range(heads)):
            a = torch.exp(q[..., s] @ kk[..., s].transpose(1, 2) / math.sqrt(d / heads))
            outs.append(a / a.sum(-1, keepdim=True) @ v[..., s])
        t = t + linear(torch.cat(outs, -1), k + '.attn.proj')
        u = linear(norm(t, k + '.norm2'), k + '.mlp.fc1')
        return t + linear(u * (1 + torch.erf(u / math.sqrt(2))) / 2, k + '.mlp.fc2')

    b, c, h, w = x.shape
    patches = torch.einsum('nchpwq->nhwpqc', x.reshape(b, c, h // p, p, w // p, p)).reshape(
        b, -1, p * p * c
    )
    n = patches.shape[1]
    shuffle = noise.argsort(1)
    restore, keep = shuffle.argsort(1), n - round(n * ratio)
    mask = torch.cat([torch.zeros(b, keep), torch.ones(b, n - keep)], 1).gather(1, restore).double()
    tokens = linear(patches, 'encoder.patch_embed') + state['encoder.pos_embed'][:, 1:]
    tokens = torch.stack([tokens[k, shuffle[k, :keep]] for k in range(b)])
    tokens = torch.cat(
        [
            (state['encoder.cls_token'] + state['encoder.pos_embed'][:, :1]).expand(b, -1, -1),
            tokens,
        ],
        1,
    )
    depth = lambda part: (
        1 + max(int(k.split(part + '.')[1].split('.')[0]) for k in state if part + '.' in k)
    )
    for k in range(depth('encoder.blocks')):
        tokens = block(tokens, f'encoder.blocks.{k}', heads)
    tokens = linear(norm(tokens, 'encoder.norm'), 'decoder_embed')
    rest = torch.cat([tokens[:, 1:], state['mask_token'].expand(b, n - keep, -1)], 1)
    rest = torch.stack([rest[k, restore[k]] for k in range(b)])
    tokens = torch.cat([tokens[:, :1], rest], 1) + state['decoder_pos_embed']
    for k in range(depth('decoder_blocks')):
        tokens = block(tokens, f'decoder_blocks.{k}', dec_heads)
    pred = linear(norm(tokens, 'decoder_norm'), 'decoder_pred')[:, 1:]
    if norm_pix:
        patches = (patches - patches.mean(-1, keepdim=True)) / (
            patches.var(-1, keepdim=True) + 1e-6
        ) ** 0.5
    return (((pred - patches) ** 2).mean(-1) * mask).sum() / mask.sum(), pred, mask


@pytest.mark.parametrize(
    'norm_pix, hw, ratio', [(False, (24, 24), 0.75), (True, (24, 32), 0.75), (True, (24, 24), 0.5)]
)
def test_parity_with_the_published_formulas(norm_pix, hw, ratio):
    model, x = small(img_size=hw, norm_pix_loss=norm_pix), torch.rand(3, 3, *hw)
    noise = torch.rand(3, hw[0] * hw[1] // 16, generator=gen())
    state = {k: v.double() for k, v in model.state_dict().items()}
    theirs = reference(state, (x.double() - 0.5) / 0.5, noise, ratio, 4, 2, norm_pix, 4)
    ours = model(x, ratio, generator=gen())
    assert torch.equal(ours[2].double(), theirs[2])
    assert abs(ours[0].item() - theirs[0].item()) < 1e-5 * theirs[0].item()
    assert (ours[1] - theirs[1]).abs().max() < 1e-5 * theirs[1].abs().max()
    leaf = {k: v.clone().requires_grad_(not k.endswith('pos_embed')) for k, v in state.items()}
    reference(leaf, (x.double() - 0.5) / 0.5, noise, ratio, 4, 2, norm_pix, 4)[0].backward()
    ours[0].backward()
    for k, v in model.named_parameters():
        assert (v.grad - leaf[k].grad).abs().max() < 1e-4 * max(leaf[k].grad.abs().max(), 1e-3), k


def test_positions_are_fixed_and_those_of_the_formula():
    model = MAE(**SIZES)
    assert torch.equal(model.encoder.pos_embed[0], sincos_pos_embed(32, 6, True)) and torch.equal(
        model.decoder_pos_embed[0], sincos_pos_embed(16, 6, True)
    )
    assert not any(k.endswith('pos_embed') for k, _ in model.named_parameters())
    assert {'encoder.pos_embed', 'decoder_pos_embed'} < set(model.state_dict()) and not {
        'mean',
        'std',
    } & {k for k, _ in model.named_parameters()}


def test_initialisation():
    model = MAE(24, 4, 64, 1, 4, 64, 1, 4)
    for layer in (model.decoder_embed, model.decoder_pred, model.decoder_blocks[0].attn.qkv):
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.97 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    assert 0.01 < model.mask_token.std() < 0.03 and model.decoder_norm.eps == 1e-6


def hugging(sizes, norm_pix=False, ratio=0.75):
    transformers = pytest.importorskip('transformers')
    return transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            image_size=sizes['img_size'],
            patch_size=sizes['patch'],
            hidden_size=sizes['dim'],
            num_hidden_layers=sizes['depth'],
            num_attention_heads=sizes['heads'],
            intermediate_size=4 * sizes['dim'],
            decoder_hidden_size=sizes['dec_dim'],
            decoder_num_hidden_layers=sizes['dec_depth'],
            decoder_num_attention_heads=sizes['dec_heads'],
            decoder_intermediate_size=4 * sizes['dec_dim'],
            mask_ratio=ratio,
            norm_pix_loss=norm_pix,
            layer_norm_eps=1e-6,
        )
    ).eval()


def to_hugging(model, peer):
    "Our weights into transformers' model, parameter by parameter; nothing of it may be left out."
    left = set(peer.state_dict())
    own, state = peer.state_dict(), model.state_dict()

    def put(theirs, value):
        assert own[theirs].shape == value.shape, theirs
        own[theirs].copy_(value)
        left.remove(theirs)

    conv = own['vit.embeddings.patch_embeddings.projection.weight']
    put(
        'vit.embeddings.patch_embeddings.projection.weight',
        state['encoder.patch_embed.weight']
        .reshape(-1, conv.shape[2], conv.shape[3], conv.shape[1])
        .permute(0, 3, 1, 2),
    )
    put('vit.embeddings.patch_embeddings.projection.bias', state['encoder.patch_embed.bias'])
    put('vit.embeddings.cls_token', state['encoder.cls_token'])
    put('vit.embeddings.position_embeddings', state['encoder.pos_embed'])
    for name in ('mask_token', 'decoder_pos_embed'):
        put('decoder.' + name, state[name])
    for t in ('weight', 'bias'):
        put(f'vit.layernorm.{t}', state[f'encoder.norm.{t}'])
        for name in ('decoder_embed', 'decoder_norm', 'decoder_pred'):
            put(f'decoder.{name}.{t}', state[f'{name}.{t}'])
        for ours, theirs, blocks in (
            ('encoder.blocks', 'vit.layers', model.encoder.blocks),
            ('decoder_blocks', 'decoder.decoder_layers', model.decoder_blocks),
        ):
            for k in range(len(blocks)):
                for i, part in zip('qkv', state[f'{ours}.{k}.attn.qkv.{t}'].chunk(3)):
                    put(f'{theirs}.{k}.attention.{i}_proj.{t}', part)
                for a, b in (
                    ('attn.proj', 'attention.o_proj'),
                    ('norm1', 'layernorm_before'),
                    ('norm2', 'layernorm_after'),
                    ('mlp.fc1', 'mlp.fc1'),
                    ('mlp.fc2', 'mlp.fc2'),
                ):
                    put(f'{theirs}.{k}.{b}.{t}', state[f'{ours}.{k}.{a}.{t}'])
    assert not left, left
    return peer


@pytest.mark.parametrize('norm_pix', [False, True])
def test_parity_with_transformers(norm_pix):
    model, x = small(norm_pix_loss=norm_pix), torch.rand(3, 3, 24, 24)
    peer = to_hugging(model, hugging(SIZES, norm_pix))
    theirs, (loss, pred, mask) = (
        peer((x - 0.5) / 0.5, noise=torch.rand(3, 36, generator=gen())),
        model(x, generator=gen()),
    )
    assert torch.equal(mask, theirs.mask)
    assert abs(loss - theirs.loss) < 1e-4 * theirs.loss and torch.allclose(
        pred, theirs.logits, atol=1e-4
    )
    loss.backward()
    theirs.loss.backward()
    for ours, other in (
        (model.mask_token, peer.decoder.mask_token),
        (model.encoder.cls_token, peer.vit.embeddings.cls_token),
        (model.decoder_pred.weight, peer.decoder.decoder_pred.weight),
    ):
        assert torch.allclose(ours.grad, other.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    'preset, published, dim, depth, heads, patch',
    [
        (mae_vit_base, 111.9, 768, 12, 12, 16),
        (mae_vit_large, 329.5, 1024, 24, 16, 16),
        (mae_vit_huge, 657.1, 1280, 32, 16, 14),
    ],
)
def test_presets_have_the_published_size(preset, published, dim, depth, heads, patch):
    with torch.device('meta'):
        model = preset()
    count = sum(
        t.numel() for k, t in model.state_dict().items() if k not in ('mean', 'std', '_extra_state')
    )  # fixed positions are counted as published
    assert count / 1e6 == pytest.approx(published, abs=0.06)
    n, dec, out = (224 // patch) ** 2 + 1, 512, 3 * patch * patch
    block = lambda d: 12 * d * d + 13 * d
    assert (
        count
        == n * dim
        + dim
        + out * dim
        + dim
        + depth * block(dim)
        + 2 * dim
        + (dim + 1) * dec
        + dec
        + n * dec
        + 8 * block(dec)
        + 2 * dec
        + (dec + 1) * out
    )
    assert model.norm_pix_loss and [
        b.attn.heads for b in (model.encoder.blocks[0], model.decoder_blocks[0])
    ] == [heads, 16]
    transformers = pytest.importorskip('transformers')
    config = transformers.ViTMAEConfig(
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        patch_size=patch,
    )
    with torch.device('meta'):
        peer = transformers.ViTMAEForPreTraining._from_config(config)
    assert count == sum(p.numel() for p in peer.parameters())


def test_tiny():
    model = mae_tiny()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(0.9, abs=0.05)
    assert (
        model.encoder.grid == (8, 8)
        and mae_tiny(28, 7, channels=1, dec_depth=1).encoder.channels == 1
        and mae_tiny(norm_pix_loss=True).norm_pix_loss
    )


# pictures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('p, hw', [(4, (8, 12)), (1, (3, 2)), (3, (9, 9))])
def test_mask_pixels(p, hw):
    mask = (torch.rand(2, hw[0] * hw[1] // p**2) < 0.5).float()
    pixels = mask_pixels(mask, p, hw)
    assert pixels.shape == (2, 1, *hw)
    assert np.array_equal(
        pixels[:, 0], np.kron(mask.reshape(2, hw[0] // p, -1).numpy(), np.ones((p, p)))
    )


class Perfect(MAE):
    "Predicts its target."

    def decode(self, latent, ids_restore):
        return self.answer


@pytest.mark.parametrize('norm_pix', [False, True])
def test_perfect_prediction_is_undone_exactly(norm_pix):
    x = torch.rand(2, 3, 24, 24)
    model = Perfect(**SIZES, norm_pix_loss=norm_pix, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    model.answer = model.targets(x)[0]
    for paste in (True, False):
        assert torch.allclose(reconstruct(model, x, stats='truth', paste=paste)[0], x, atol=1e-5)
    assert model(x)[0] < 1e-10


def test_stats_of_visible_pixels_by_hand():
    x = torch.rand(2, 3, 24, 24)
    model = Perfect(**SIZES, norm_pix_loss=True)
    model.answer = torch.randn(2, 36, 48)
    x_hat, mask = reconstruct(model, x, stats='visible', paste=False, generator=gen())
    for k in range(2):
        seen = (numpy_patches(x.numpy(), 4)[k] - 0.5)[mask[k].numpy() == 0] / 0.5
        by_hand = (model.answer[k].numpy() * seen.std() + seen.mean()) * 0.5 + 0.5
        assert np.allclose(numpy_patches(x_hat.numpy(), 4)[k], by_hand, atol=1e-5)


@pytest.mark.parametrize(
    'norm_pix, stats, reads',
    [
        (True, 'truth', True),
        (True, 'visible', False),
        (False, 'truth', False),
        (False, 'visible', False),
    ],
)
@pytest.mark.parametrize('paste', [True, False])
def test_who_reads_the_truth(norm_pix, stats, reads, paste):
    """y is what deployment has, the visible patches;
    the removed ones of x are put behind the mask, where nobody is to look."""
    model, x = small(norm_pix_loss=norm_pix), torch.rand(4, 3, 24, 24)
    hidden = mask_pixels(reconstruct(model, x, generator=gen())[1], 4, 24)
    run = lambda y, x: reconstruct(
        model, torch.where(hidden > 0, x, y), stats=stats, paste=paste, generator=gen()
    )[0]
    assert bool(reads_truth(run, x * (1 - hidden), x)) == reads


def test_visible_patches_are_pasted_exactly():
    model, x = small(norm_pix_loss=True), torch.rand(2, 3, 24, 24)
    for masking, ratio in (('random', 0.75), ('block', 0.5), ('grid', 0.75)):
        x_hat, mask = reconstruct(model, x, ratio, masking, gen())
        hidden = mask_pixels(mask, 4, 24).expand_as(x) > 0
        assert (
            torch.equal(x_hat[~hidden], x[~hidden])
            and (x_hat[hidden] != x[hidden]).float().mean() > 0.99
        )
        bare, _ = reconstruct(model, x, ratio, masking, gen(), paste=False)
        assert (
            torch.equal(bare[hidden], x_hat[hidden])
            and (bare[~hidden] != x[~hidden]).float().mean() > 0.99
        )


@pytest.mark.parametrize(
    'call',
    [
        lambda m, x: reconstruct(m, x),
        lambda m, x: features(m, x),
        lambda m, x: features(m.encoder, x),
    ],
)
def test_modes_come_back(call):
    model, x = small(), torch.rand(2, 3, 24, 24)
    model.train()
    model.encoder.blocks[0].eval()  # a part that is frozen
    before = [m.training for m in model.modules()]
    assert not call(model, x)[0].requires_grad
    assert [m.training for m in model.modules()] == before
    with pytest.raises(ValueError):
        call(model, x[:, :1])
    assert [m.training for m in model.modules()] == before


# baselines ----------------------------------------------------------------------------------------

BASELINES = [inpaint_mean, inpaint_bilinear]


def some_known(shape, share=0.25, seed=0):
    return (
        (torch.rand(shape[0], 1, *shape[2:], generator=gen(seed)) < share)
        .float()
        .index_fill(3, torch.tensor([0]), 1)
    )


@pytest.mark.parametrize('f', BASELINES)
@pytest.mark.parametrize(
    'shape',
    [
        (2, 3, 24, 24),
        (1, 1, 17, 31),
        (2, 3, 7, 5),
        (1, 3, 1, 9),
        (1, 1, 9, 1),
        (3, 2, 2, 3),
        (1, 1, 1, 1),
    ],
)
def test_baselines_keep_what_is_known_and_flat(f, shape):
    x, known = torch.rand(shape), some_known(shape)
    out = f(x, known)
    assert out.shape == x.shape and out.dtype == x.dtype and torch.isfinite(out).all()
    assert torch.equal(out * known, x * known)
    assert torch.allclose(f(torch.full(shape, 0.37), known), torch.tensor(0.37), atol=1e-6)
    assert torch.equal(f(x, torch.ones_like(known)), x)
    other = torch.where(known > 0, x, torch.tensor(math.nan))  # the unknown is not read
    assert torch.equal(f(other, known), out)
    assert (
        out.min() >= x.where(known > 0, torch.tensor(2.0)).min() - 1e-6
        and out.max() <= (x * known).max() + 1e-6
    )


@pytest.mark.parametrize('f', BASELINES)
def test_baselines_do_not_mix_images(f):
    x, known = torch.rand(3, 3, 16, 16), some_known((3, 3, 16, 16))
    known[1] = 0
    known[1, :, 3, 4] = 1  # one pixel is all there is
    together = f(x, known)
    for k in range(3):
        assert torch.allclose(together[k : k + 1], f(x[k : k + 1], known[k : k + 1]), atol=1e-6)
    assert torch.allclose(together[1], x[1, :, 3, 4][:, None, None].expand(3, 16, 16), atol=1e-6)


def test_mean_by_hand():
    x, known = torch.rand(2, 3, 8, 8), some_known((2, 3, 8, 8))
    for k in range(2):
        for c in range(3):
            assert np.allclose(
                inpaint_mean(x, known)[k, c][known[k, 0] == 0],
                x[k, c][known[k, 0] == 1].mean(),
                atol=1e-6,
            )


@pytest.mark.parametrize(
    'hw, p, ratio', [((16, 18), 1, 0.8), ((33, 47), 1, 0.9), ((32, 32), 4, 0.75)]
)
def test_bilinear_is_close_to_scipy(hw, p, ratio):
    from scipy.interpolate import griddata

    v, u = torch.meshgrid(*(torch.linspace(0, 1, s) for s in hw), indexing='ij')
    x = (0.5 + 0.3 * torch.sin(3 * u + v) - 0.2 * v * u)[None, None]
    known = 1 - mask_pixels(
        random_masking(torch.zeros(1, hw[0] * hw[1] // p**2, 1), ratio, gen())[1], p, hw
    )
    at, grid = np.argwhere(known[0, 0].numpy() > 0), np.indices(hw).reshape(2, -1).T
    theirs = griddata(at, x[0, 0].numpy()[tuple(at.T)], grid, method='linear').reshape(hw)
    ok = ~np.isnan(theirs) & (known[0, 0].numpy() == 0)  # unknown, inside the hull of what is known
    ours, truth = inpaint_bilinear(x, known)[0, 0].numpy(), x[0, 0].numpy()
    rms = lambda a: np.sqrt(np.mean(a[ok] ** 2))
    assert ok.mean() > 0.3 and rms(ours - theirs) < 0.015 * (
        1 + p
    )  # it reads means of blocks, not the nearest pixels: worse the larger the holes
    assert rms(ours - truth) < 0.4 * rms(inpaint_mean(x, known)[0, 0].numpy() - truth)


@pytest.mark.parametrize('f', BASELINES)
@pytest.mark.parametrize(
    'known, says',
    [
        (torch.zeros(1, 1, 8, 8), 'nothing'),
        (torch.ones(1, 1, 8, 9), r'\(1, 1, 8, 9\)'),
        (torch.ones(1, 3, 8, 8), r'\(1, 3, 8, 8\)'),
        (torch.ones(8, 8), r'\(8, 8\)'),
    ],
)
def test_bad_known(f, known, says):
    with pytest.raises(ValueError, match=f'known.*{says}'):
        f(torch.rand(1, 3, 8, 8), known)


def test_masked_psnr_by_hand():
    x, x_hat, mask = (
        torch.rand(3, 3, 12, 8),
        torch.randn(3, 3, 12, 8),
        (torch.rand(3, 6) < 0.5).float().index_fill(1, torch.tensor([0]), 1),
    )
    got = masked_psnr(x_hat, x, mask, 4)
    for k in range(3):
        wrong = (numpy_patches(x_hat.clamp(0, 1).numpy(), 4) - numpy_patches(x.numpy(), 4))[k][
            mask[k].numpy() == 1
        ]
        assert got[k].item() == pytest.approx(-10 * math.log10(np.mean(wrong**2)), abs=1e-4)
    hidden = mask_pixels(mask, 4, (12, 8))
    assert torch.equal(
        masked_psnr(torch.where(hidden > 0, x_hat, torch.rand_like(x)), x, mask, 4), got
    )
    assert (masked_psnr(x, x, mask, 4) == math.inf).all()


# pretraining --------------------------------------------------------------------------------------


def images(n=16, hw=24):
    v, u = torch.meshgrid(torch.linspace(0, 1, hw), torch.linspace(0, 1, hw), indexing='ij')
    return (
        torch.stack(
            [
                0.5 + 0.4 * torch.sin(a * u + b * v + c)
                for a, b, c in 8 * torch.rand(n, 3, 1, 1, generator=gen())
            ]
        )[:, None]
        .expand(-1, 3, -1, -1)
        .contiguous()
    )


class Data(torch.utils.data.Dataset):
    def __init__(self, x, pair=False):
        self.x, self.pair = x, pair

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return (self.x[i], i) if self.pair else self.x[i]


def loader(x, batch, pair=False):
    return torch.utils.data.DataLoader(Data(x, pair), batch, shuffle=False)


def fresh():
    torch.manual_seed(3)
    return MAE(**SIZES)


def test_recipe():
    model = fresh()
    learn = pretrainer(
        model, loader(images(), 8), blr=1e-3, weight_decay=0.07, accumulate=2, cpu=True
    )
    assert isinstance(
        learn.opt.optimizer if hasattr(learn.opt, 'optimizer') else learn.opt, torch.optim.AdamW
    )
    decay = {id(p): g for g in learn.opt.param_groups for p in g['params']}
    assert set(decay) == {id(p) for p in model.parameters()}
    for name, p in model.named_parameters():
        g = decay[id(p)]
        assert g['betas'] == (0.9, 0.95) and g['lr'] == pytest.approx(1e-3 * 16 / 256)
        assert g['weight_decay'] == (0 if name.endswith('bias') or 'norm' in name else 0.07), name
    assert (
        learn.sched(0, 1000) < 0.05
        and learn.sched(50, 1000) == pytest.approx(1)
        and learn.sched(1000, 1000) == pytest.approx(0)
    )
    assert pretrainer(fresh(), loader(images(), 4), blr=1e-3, cpu=True).rates[0] == pytest.approx(
        1e-3 * 4 / 256
    )


@pytest.mark.parametrize(
    'options, pair',
    [(dict(), False), (dict(precision='bf16', clip=1.0), True), (dict(accumulate=2), True)],
)
def test_a_tiny_batch_is_overfitted(options, pair):
    model = fresh()
    learn = pretrainer(
        model,
        loader(images(8), 8 // options.get('accumulate', 1), pair),
        blr=0.1,
        mask_ratio=0.5,
        warmup=0.2,
        cpu=True,
        **options,
    )
    losses = [row['loss'] for row in learn.fit(40).history if 'loss' in row]
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_two_batches_a_step_equal_one_of_twice_the_size(monkeypatch):
    "With masks that depend on nothing."

    def same(tokens, ratio, hw, generator=None):
        _, _, ids = random_masking(torch.zeros(1, tokens.shape[1], 1), ratio, gen())
        ids, keep = ids.expand(len(tokens), -1), tokens.shape[1] - round(tokens.shape[1] * ratio)
        visible = tokens.gather(1, ids.argsort(1)[:, :keep, None].expand(-1, -1, tokens.shape[2]))
        return visible, (ids >= keep).float(), ids

    monkeypatch.setitem(MASKINGS, 'block', same)
    models = []
    for batch, accumulate in ((8, 1), (4, 2)):
        models.append(fresh())
        pretrainer(
            models[-1],
            loader(images(8), batch),
            blr=0.05,
            masking='block',
            accumulate=accumulate,
            cpu=True,
        ).fit(4)
    start = fresh()
    for (name, a), b, c in zip(
        models[0].named_parameters(), models[1].parameters(), start.parameters()
    ):
        assert torch.allclose(a, b, atol=2e-4 if 'bias' in name else 1e-5), name
    assert not torch.equal(models[0].decoder_pred.weight, start.decoder_pred.weight)


def test_masking_and_ratio_are_passed_on():
    with pytest.raises(ValueError, match='masking'):
        pretrainer(fresh(), loader(images(8), 8), masking='stripes', cpu=True).fit(1)
    with pytest.raises(ValueError, match='ratio is 1'):
        pretrainer(fresh(), loader(images(8), 8), mask_ratio=1, cpu=True).fit(1)
    with pytest.raises(TypeError, match='train is list'):
        pretrainer(fresh(), [images(8)], cpu=True)


def test_validation_runs_in_evaluation_mode_and_is_repeatable():
    learn = pretrainer(fresh(), loader(images(8), 8), loader(images(8), 4, True), cpu=True)
    learn.fit(1)
    assert learn.validate() == learn.validate() and learn.metrics['valid_loss'] > 0


# features -----------------------------------------------------------------------------------------


def test_features():
    model, x = small(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)), torch.rand(7, 3, 24, 24)
    got = features(model, x)
    by_hand = model.encoder((x - model.mean) / model.std)[0][:, 1:].mean(1)
    assert (
        got.shape == (7, 32)
        and got.device.type == 'cpu'
        and torch.allclose(got, by_hand, atol=1e-5)
    )
    for batch in (1, 3, 7, 100):
        assert torch.allclose(features(model, x, batch), got, atol=1e-5)
    for mode in (True, False):
        assert torch.equal(features(model.train(mode), x), got)
    assert torch.allclose(features(model.encoder, (x - model.mean) / model.std), got, atol=1e-5)
    assert features(model, torch.rand(2, 3, 40, 32)).shape == (
        2,
        32,
    )  # another size has positions of its own


def test_features_without_class_token_and_with_drop_path():
    encoder, x = (
        shake(ViTEncoder(24, 4, 32, 3, 4, cls_token=False, drop_path=0.5)).train(),
        torch.rand(5, 3, 24, 24),
    )
    got = features(encoder, x)
    assert torch.equal(got, features(encoder, x)) and torch.allclose(
        got, encoder.eval()(x)[0].mean(1), atol=1e-6
    )


@pytest.mark.parametrize(
    'x, error, says',
    [
        (torch.ones(1, 3, 24, 24, dtype=torch.uint8), TypeError, 'uint8'),
        (torch.rand(1, 1, 24, 24), ValueError, '1 channels'),
        (torch.rand(3, 24, 24), ValueError, r'\(b, c, h, w\)'),
        (torch.rand(1, 3, 25, 24), ValueError, 'pad it to'),
    ],
)
def test_bad_features(x, error, says):
    with pytest.raises(error, match=says):
        features(small(mean=(0.4, 0.5, 0.6)), x)


# published files ----------------------------------------------------------------------------------


def published(
    norm_pix=True,
    decoder=True,
    dim=64,
    depth=2,
    dec=32,
    dec_depth=1,
    patch=4,
    side=6,
    channels=3,
    nested=True,
):
    "A file's content with the published names and shapes; every value says where it came from."
    shapes = {
        'cls_token': (1, 1, dim),
        'pos_embed': (1, side**2 + 1, dim),
        'patch_embed.proj.weight': (dim, channels, patch, patch),
        'patch_embed.proj.bias': (dim,),
    }

    def blocks(part, d, k):
        for t, s in (
            ('norm1.weight', (d,)),
            ('norm1.bias', (d,)),
            ('attn.qkv.weight', (3 * d, d)),
            ('attn.qkv.bias', (3 * d,)),
            ('attn.proj.weight', (d, d)),
            ('attn.proj.bias', (d,)),
            ('norm2.weight', (d,)),
            ('norm2.bias', (d,)),
            ('mlp.fc1.weight', (4 * d, d)),
            ('mlp.fc1.bias', (4 * d,)),
            ('mlp.fc2.weight', (d, 4 * d)),
            ('mlp.fc2.bias', (d,)),
        ):
            shapes[f'{part}.{k}.{t}'] = s

    for k in range(depth):
        blocks('blocks', dim, k)
    shapes |= {'norm.weight': (dim,), 'norm.bias': (dim,)}
    if decoder:
        shapes |= {
            'mask_token': (1, 1, dec),
            'decoder_pos_embed': (1, side**2 + 1, dec),
            'decoder_embed.weight': (dec, dim),
            'decoder_embed.bias': (dec,),
        }
        for k in range(dec_depth):
            blocks('decoder_blocks', dec, k)
        shapes |= {
            'decoder_norm.weight': (dec,),
            'decoder_norm.bias': (dec,),
            'decoder_pred.weight': (patch**2 * channels, dec),
            'decoder_pred.bias': (patch**2 * channels,),
        }
    state = {k: 0.2 * torch.randn(s) for k, s in shapes.items()}
    state['pos_embed'] = sincos_pos_embed(dim, side, True)[None]
    if decoder:
        state['decoder_pos_embed'] = sincos_pos_embed(dec, side, True)[None]
    return (
        dict(
            model=state,
            args=argparse.Namespace(
                norm_pix_loss=norm_pix, mask_ratio=0.75, blr=1.5e-4, model='mae', resume='', lr=None
            ),
        )
        if nested
        else state
    )


def kept(tmp_path, content, name='mae.pth'):
    torch.save(content, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize('norm_pix', [True, False])
def test_published_file(tmp_path, norm_pix):
    content = published(norm_pix)
    model, report = load_pretrained(kept(tmp_path, content))
    assert (
        report
        and report.share == 1
        and not report.missing
        and not report.extra
        and not report.mismatched
    )
    assert (
        model.norm_pix_loss is norm_pix
        and model.encoder.grid == (6, 6)
        and len(model.encoder.blocks) == 2
        and len(model.decoder_blocks) == 1
    )
    assert torch.allclose(
        model.mean.flatten(), torch.tensor([0.485, 0.456, 0.406])
    ) and torch.allclose(model.std.flatten(), torch.tensor([0.229, 0.224, 0.225]))
    x, state = torch.rand(2, 3, 24, 24), content['model']
    by_conv = (
        F.conv2d(
            (x - model.mean) / model.std,
            state['patch_embed.proj.weight'],
            state['patch_embed.proj.bias'],
            stride=4,
        )
        .flatten(2)
        .transpose(1, 2)
    )
    assert torch.allclose(
        model.encoder.embed((x - model.mean) / model.std),
        by_conv + state['pos_embed'][:, 1:],
        atol=1e-4,
    )
    names = {
        k if k.startswith(('decoder', 'mask_token')) else 'encoder.' + k: v.double()
        for k, v in state.items()
        if 'patch_embed' not in k
    }
    names |= {
        'encoder.patch_embed.weight': state['patch_embed.proj.weight']
        .permute(0, 2, 3, 1)
        .flatten(1)
        .double(),
        'encoder.patch_embed.bias': state['patch_embed.proj.bias'].double(),
    }
    theirs = reference(
        names,
        ((x - model.mean) / model.std).double(),
        torch.rand(2, 36, generator=gen()),
        0.75,
        1,
        1,
        norm_pix,
        4,
    )
    assert torch.allclose(model(x, generator=gen())[1].double(), theirs[1], rtol=1e-4, atol=1e-4)


def test_bare_state_and_an_answer_that_overrides(tmp_path):
    path = kept(tmp_path, published(nested=False))
    assert (
        load_pretrained(str(path))[0].norm_pix_loss is True
        and load_pretrained(path, norm_pix_loss=False)[0].norm_pix_loss is False
    )
    assert (
        load_pretrained(kept(tmp_path, published(norm_pix=True)), norm_pix_loss=False)[
            0
        ].norm_pix_loss
        is False
    )


def test_encoder_only(tmp_path):
    content = published(decoder=False)
    model, report = load_pretrained(kept(tmp_path, content))
    assert (
        not report
        and report.share < 1
        and all(k.startswith(('decoder', 'mask_token')) for k in report.missing)
        and report.missing
    )
    assert torch.equal(
        model.encoder.blocks[1].mlp.fc2.weight, content['model']['blocks.1.mlp.fc2.weight']
    )
    assert len(model.decoder_blocks) == 8 and model.decoder_embed.out_features == 512
    own = MAE(24, 4, 64, 2, 1, 32, 1, 1)
    before = own.decoder_pred.weight.clone()
    assert load_pretrained(kept(tmp_path, content), own)[0] is own and torch.equal(
        own.decoder_pred.weight, before
    )
    del content['model']['blocks.1.norm2.bias']  # less than an encoder
    with pytest.raises(ValueError, match='missing'):
        load_pretrained(kept(tmp_path, content), own)


def test_into_a_model(tmp_path):
    path, model = (
        kept(tmp_path, published(norm_pix=True)),
        MAE(24, 4, 64, 2, 1, 32, 1, 1, norm_pix_loss=False),
    )
    assert (
        load_pretrained(path, model)[0] is model and model.norm_pix_loss is True
    )  # what the weights were trained for
    assert load_pretrained(path, model, norm_pix_loss=False)[0].norm_pix_loss is False
    model = MAE(24, 4, 64, 2, 1, 32, 1, 1, norm_pix_loss=False)
    assert (
        load_pretrained(kept(tmp_path, published(nested=False)), model)[0].norm_pix_loss is False
    )  # the file does not say


@pytest.mark.parametrize(
    'sizes, says',
    [
        ((32, 4, 64, 2, 1, 32, 1, 1), 'encoder.pos_embed.*65.*37'),
        ((24, 4, 48, 2, 1, 32, 1, 1), '48.*64'),
        ((24, 4, 64, 3, 1, 32, 1, 1), 'encoder.blocks.2'),
        ((24, 4, 64, 2, 1, 16, 1, 1), 'mask_token'),
        ((24, 8, 64, 2, 1, 32, 1, 1), 'mismatched'),
    ],
)
def test_another_size(tmp_path, sizes, says):
    model = MAE(*sizes)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        load_pretrained(kept(tmp_path, published()), model)
    assert (
        all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        and model.norm_pix_loss is False
    )


def test_files_that_are_none(tmp_path):
    path = kept(tmp_path, published())
    short = tmp_path / 'short.pth'
    for share in (0.5, 0.99, 0):
        short.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(ValueError, match='short.pth'):
            load_pretrained(short)
    with pytest.raises(FileNotFoundError, match='nowhere.pth'):
        load_pretrained(tmp_path / 'nowhere.pth')
    for content in (
        dict(model=dict(a=torch.zeros(2))),
        torch.zeros(3),
        [1, 2],
        dict(model=[1]),
        {},
    ):
        with pytest.raises(ValueError, match='holds no MAE'):
            load_pretrained(kept(tmp_path, content, 'other.pth'))
    for name in (
        'pos_embed',
        'cls_token',
        'norm.weight',
        'decoder_pred.bias',
        'blocks.0.attn.qkv.weight',
    ):
        content = published()
        del content['model'][name]
        with pytest.raises(ValueError, match=name):
            load_pretrained(kept(tmp_path, content, 'part.pth'))


class Runs:
    "A pickle that writes a file when it is read."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (eval, (f"open({str(self.path)!r}, 'w').write('ran')",))


def test_no_code_runs(tmp_path):
    mark = tmp_path / 'mark'
    torch.save(dict(published(), extra=Runs(mark)), tmp_path / 'zip.pth')
    (tmp_path / 'plain.pth').write_bytes(pickle.dumps(Runs(mark), 2))
    torch.save(
        dict(published(), args=Runs(mark)),
        tmp_path / 'old.pth',
        _use_new_zipfile_serialization=False,
    )
    for name in ('zip.pth', 'plain.pth', 'old.pth'):
        with pytest.raises(ValueError, match=f'{name} is no checkpoint'):
            load_pretrained(tmp_path / name)
    assert not mark.exists()
    assert not any(
        'Namespace' in str(g) for g in torch.serialization.get_safe_globals()
    )  # what was allowed is not left open


def test_addresses(tmp_path, monkeypatch):
    asked, path = [], kept(tmp_path, published())
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))

    def fetch(url, to, **kw):
        asked.append(url)
        open(to, 'wb').write(path.read_bytes())

    monkeypatch.setattr(torch.hub, 'download_url_to_file', fetch)
    for _ in range(2):
        assert load_pretrained('https://example.org/a/mae.pth')[1]
    assert (
        asked == ['https://example.org/a/mae.pth']
        and len(list((tmp_path / 'hub/checkpoints').glob('*/mae.pth'))) == 1
    )  # fetched once
    from urllib.error import HTTPError, URLError

    for error in (
        URLError('no route'),
        HTTPError('u', 404, 'gone', {}, None),
        OSError('disk'),
        RuntimeError('invalid hash'),
    ):

        def fail(*a, **kw):
            raise error

        monkeypatch.setattr(torch.hub, 'download_url_to_file', fail)
        with pytest.raises(
            FileNotFoundError,
            match='https://example.org/other.pth could not be fetched.*checkpoints/.*/other.pth',
        ):
            load_pretrained('https://example.org/other.pth')


# a saved model comes back as the same function ----------------------------------------------------

STATS = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


@pytest.mark.parametrize('norm_pix', [False, True])
def test_a_loaded_state_is_the_same_function(norm_pix, tmp_path):
    "Pixel statistics and the kind of target, which no shape tells, come along."
    from safetensors.torch import load_file, save_file

    model, other = small(norm_pix_loss=norm_pix, **STATS), small(norm_pix_loss=not norm_pix)
    save_file(model.state_dict(), tmp_path / 'mae.safetensors')
    assert (
        str(other.load_state_dict(load_file(tmp_path / 'mae.safetensors')))
        == '<All keys matched successfully>'
    )
    x = torch.rand(2, 3, 24, 24)
    assert other.norm_pix_loss is norm_pix and torch.equal(
        model(x, generator=gen())[0], other(x, generator=gen())[0]
    )
    assert torch.equal(
        reconstruct(model, x, generator=gen())[0], reconstruct(other, x, generator=gen())[0]
    )
    model.norm_pix_loss = not norm_pix  # set after construction
    other.load_state_dict(model.state_dict())
    assert other.norm_pix_loss is not norm_pix and model.norm_pix_loss is not norm_pix


@pytest.mark.parametrize('key', ['mean', 'std', '_extra_state'])
def test_a_state_without_it_is_refused(key):
    "Nobody's own statistics are kept in silence."
    state = small(**STATS).state_dict()
    state.pop(key, None)
    with pytest.raises(RuntimeError, match=f'Missing.*{key}'):
        small().load_state_dict(state)


def test_load_report_carries_them_too():
    from restore_lib.checkpoints import load_report

    model, other = small(norm_pix_loss=True, **STATS), small(mean=(0, 0, 0), std=(1, 1, 1))
    assert (
        load_report(other, model.state_dict())
        and other.norm_pix_loss is True
        and torch.equal(other.std, model.std)
    )


def test_copies_are_apart():
    import copy

    model = small(norm_pix_loss=True, **STATS)
    twin = copy.deepcopy(model)
    twin.norm_pix_loss = False
    twin.mean.zero_()
    assert (
        model.norm_pix_loss
        and not twin.norm_pix_loss
        and model.mean.all()
        and '_extra_state' in twin.state_dict()
    )
    with torch.device('meta'):
        assert MAE(**SIZES, norm_pix_loss=True).norm_pix_loss


def test_learner_keeps_the_statistics(tmp_path):
    learn = pretrainer(
        MAE(**SIZES, norm_pix_loss=True, **STATS), loader(images(8), 8), cpu=True
    ).fit(1, folder=tmp_path, save_every=1)
    again = pretrainer(fresh(), loader(images(8), 8), cpu=True).load(tmp_path)
    assert again.bare.norm_pix_loss and torch.equal(again.bare.std, learn.bare.std)


# drawing ------------------------------------------------------------------------------------------


def test_reconstruct_takes_visible_statistics_by_default():
    model, x = small(norm_pix_loss=True), torch.rand(3, 3, 24, 24)
    drawn, mask = reconstruct(model, x, generator=gen())
    assert torch.equal(drawn, reconstruct(model, x, generator=gen(), stats='visible')[0])
    assert not torch.allclose(
        drawn, reconstruct(model, x, generator=gen(), stats='truth')[0], atol=1e-3
    )
    hidden = mask_pixels(mask, 4, 24) > 0
    other = torch.where(hidden, torch.rand_like(x), x)  # another truth behind the mask
    assert torch.equal(
        reconstruct(model, other, generator=gen(), paste=False)[0],
        reconstruct(model, x, generator=gen(), paste=False)[0],
    )


def test_drawing_leaves_images_and_random_state_alone():
    model, x = small(norm_pix_loss=True), torch.rand(3, 3, 24, 24)
    before, state = x.clone(), torch.get_rng_state()
    for stats in ('truth', 'visible'):
        reconstruct(model, x, generator=gen(), stats=stats)
        features(model, x)
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)


# numbers ------------------------------------------------------------------------------------------


def test_sizes_from_numpy():
    torch.manual_seed(3)
    one = mae_tiny(
        np.int64(32),
        np.int64(4),
        dim=np.int64(32),
        depth=np.int64(1),
        heads=np.int64(4),
        dec_dim=np.int32(16),
        dec_depth=np.int64(1),
        dec_heads=np.int64(2),
        channels=np.int64(3),
    )
    torch.manual_seed(3)
    two, x = (
        mae_tiny(32, 4, dim=32, depth=1, heads=4, dec_dim=16, dec_depth=1, dec_heads=2, channels=3),
        torch.rand(2, 3, 32, 32),
    )
    for ratio, masking in ((0.75, 'random'), (0.5, 'block'), (0.75, 'grid')):
        assert torch.equal(
            one(x, np.float32(ratio), masking, gen())[0], two(x, ratio, masking, gen())[0]
        )
    assert torch.equal(features(one, x, np.int64(1)), features(one, x, 1))
    known = (torch.rand(1, 1, 8, 8) < 0.5).float().index_fill(3, torch.tensor([0]), 1)
    assert torch.equal(
        inpaint_bilinear(torch.rand(1, 3, 8, 8, generator=gen()), known, np.int64(2)),
        inpaint_bilinear(torch.rand(1, 3, 8, 8, generator=gen()), known, 2),
    )


@pytest.mark.parametrize(
    'call, says',
    [
        (lambda: small()(torch.zeros(0, 3, 24, 24)), 'at least one image'),
        (lambda: reconstruct(small(), torch.zeros(0, 3, 24, 24)), 'at least one image'),
        (lambda: features(small(), torch.rand(2, 3, 24, 24), 0), 'batch is 0'),
        (lambda: features(small(), torch.rand(2, 3, 24, 24), 1.5), 'batch is 1.5'),
        (
            lambda: inpaint_bilinear(torch.rand(1, 1, 8, 8), torch.ones(1, 1, 8, 8), -1),
            'sweeps is -1',
        ),
        (lambda: MAE(**SIZES, std=0), 'std is 0'),
        (lambda: MAE(**SIZES, mean=math.nan), 'mean is nan'),
        (lambda: MAE(**SIZES, mean=(0.1, 0.2)), 'mean holds 2'),
        (lambda: MAE(**(SIZES | dict(depth=1.5))), 'depth is 1.5'),
        (lambda: MAE(**(SIZES | dict(patch=True))), 'patch is True'),
    ],
)
def test_numbers_out_of_range(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(mask_ratio=1), 'mask_ratio is 1'),
        (dict(mask_ratio=-0.1), 'mask_ratio is -0.1'),
        (dict(mask_ratio=math.nan), 'mask_ratio is nan'),
        (dict(masking='stripes'), "masking is 'stripes'"),
        (dict(blr=-1), 'blr is -1'),
        (dict(blr=math.nan), 'blr is nan'),
        (dict(blr=math.inf), 'blr is inf'),
        (dict(weight_decay=-0.1), 'weight_decay is -0.1'),
        (dict(warmup=math.nan), 'warmup is nan'),
        (dict(warmup=1.5), 'warmup is 1.5'),
    ],
)
def test_the_recipe_refuses_before_training(kw, says):
    with pytest.raises(ValueError, match=says):
        pretrainer(fresh(), loader(images(8), 8), cpu=True, **kw)


def test_the_recipe_from_numpy():
    rates = [
        pretrainer(fresh(), loader(images(8), 8), blr=blr, mask_ratio=ratio, cpu=True).rates
        for blr, ratio in ((1e-3, 0.75), (np.float64(1e-3), np.float32(0.75)))
    ]
    assert rates[0] == rates[1] and all(type(r) is float for r in rates[1])


# published files: addresses, arguments, sizes -----------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "Torch hub's folder for this test, and what was asked for: {address: content} is to be filled."
    site, asked = {}, []
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))

    def fetch(url, to, hash_prefix=None, progress=True):
        asked.append((url, hash_prefix))
        torch.save(site[url], to)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', fetch)
    return site, asked


def test_two_addresses_are_two_files(hub):
    site, asked = hub
    addresses = [
        'http://h/a/checkpoint.pth',
        'http://h/b/checkpoint.pth',
        'http://h/b/checkpoint.pth?v=2',
    ]
    for url in addresses:
        site[url] = published()
    for _ in range(2):
        for url in addresses:
            model, report = load_pretrained(url)
            assert report and torch.equal(
                model.encoder.blocks[0].mlp.fc1.weight,
                site[url]['model']['blocks.0.mlp.fc1.weight'],
            )
    assert asked == [(url, None) for url in addresses]  # each once


def test_a_hash_in_the_name_is_checked(hub):
    site, asked = hub
    for name in ('mae-0123abcd.pth', 'mae-base.pth', 'mae-ab.pth'):
        site[f'http://h/{name}'] = published()
        load_pretrained(f'http://h/{name}')
    assert [h for _, h in asked] == ['0123abcd', None, None]  # torch hub: eight hex digits or more


@pytest.mark.parametrize('url', ['http://h', 'http://h/', 'http://h/?a=b/c.pth', 'http://h/a/..'])
def test_an_address_without_a_name(hub, url):
    with pytest.raises(ValueError, match='no file name'):
        load_pretrained(url)
    assert not hub[1]


@pytest.mark.parametrize(
    'args, wanted',
    [
        (dict(norm_pix_loss=False), False),
        (dict(norm_pix_loss=True), True),
        (dict(lr=1), True),
        (None, True),
        (dict(norm_pix_loss=0), False),
    ],
)
def test_arguments_as_a_dict(tmp_path, args, wanted):
    path = kept(tmp_path, dict(published(), args=args))
    assert load_pretrained(path)[0].norm_pix_loss is wanted
    model = MAE(24, 4, 64, 2, 1, 32, 1, 1, norm_pix_loss=not wanted)
    assert load_pretrained(path, model)[0].norm_pix_loss is (
        wanted if args and 'norm_pix_loss' in args else not wanted
    )


def test_a_file_that_knows_its_statistics(tmp_path):
    content = published()
    content['model'] |= dict(
        mean=torch.tensor([0.1, 0.2, 0.3])[:, None, None],
        std=torch.tensor([0.4, 0.5, 0.6])[:, None, None],
        _extra_state=torch.tensor(False),
    )
    model, report = load_pretrained(kept(tmp_path, content))
    assert (
        report
        and model.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
        and model.norm_pix_loss is False
    )


def changed(**state):
    return dict(published(), model={**published()['model'], **state})


@pytest.mark.parametrize(
    'content, says',
    [
        (dict(published(), args=[1]), 'args is list'),
        (dict(published(), args=dict(norm_pix_loss='yes')), "norm_pix_loss of the file is 'yes'"),
        (
            dict(published(), args=argparse.Namespace(norm_pix_loss=2.5)),
            'norm_pix_loss of the file is 2.5',
        ),
        (dict(model={**published()['model'], 7: torch.zeros(1)}), '7'),
        (changed(epoch=3), "'epoch': int"),
        (changed(**{'patch_embed.proj.weight': [1, 2]}), 'patch_embed.proj.weight.*list'),
        (
            changed(**{'patch_embed.proj.weight': torch.zeros(64, 48)}),
            r'patch_embed.proj.weight has shape \(64, 48\)',
        ),
        (changed(pos_embed=torch.zeros(37, 64)), r'pos_embed has shape \(37, 64\)'),
        (changed(pos_embed=torch.zeros(1, 36, 64)), 'pos_embed has shape'),
        (changed(mask_token=torch.zeros(32)), r'mask_token has shape \(32,\)'),
        (changed(**{'blocks.x.norm1.weight': torch.zeros(64)}), "blocks has the numbers"),
        (changed(**{'blocks.9.norm1.weight': torch.zeros(64)}), 'blocks has the numbers'),
        (
            changed(**{'decoder_blocks.5.norm1.weight': torch.zeros(32)}),
            'decoder_blocks has the numbers',
        ),
        (changed(cls_token=torch.zeros(1, 1, 64).to_sparse()), 'cls_token'),
        (
            changed(mask_token=torch.zeros(1).expand(1, 1, 512)),
            'mask_token has shape.*fewer numbers',
        ),
        (changed(mask_token=torch.zeros(1, 1, 512)), r'decoder_embed.weight has shape'),
        (changed(**{'patch_embed.proj.weight': torch.zeros(512, 3, 4, 4)}), 'has shape'),
    ],
)
def test_files_of_the_wrong_kind(tmp_path, content, says):
    path = kept(tmp_path, content)
    with pytest.raises(ValueError, match=says):
        load_pretrained(path)


def deflated(path, extra=0):
    "The same archive packed, with so many zeros more in its first tensor's record."
    import zipfile

    out = path.with_name('packed.pth')
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as new:
        for m in old.infolist():
            new.writestr(
                m.filename, old.read(m) + bytes(extra if m.filename.endswith('data/0') else 0)
            )
    return out


def test_a_packed_file_is_looked_at_before_it_is_unpacked(tmp_path, monkeypatch):
    asked, load = [], torch.load

    def spy(path, map_location=None, **kw):
        asked.append(str(map_location))
        return load(path, map_location=map_location, **kw)

    monkeypatch.setattr(torch, 'load', spy)
    with pytest.raises(ValueError, match='unpacks to 2[0-9],[0-9]{3},[0-9]{3}'):
        load_pretrained(deflated(kept(tmp_path, published()), 20 * 2**20))
    assert asked == []  # declared sizes come first
    path = kept(tmp_path, dict(model={f'theirs.{k}': v for k, v in published()['model'].items()}))
    for p in (path, deflated(path)):
        with pytest.raises(ValueError, match='holds no MAE'):
            load_pretrained(p)
    assert asked == ['meta', 'meta']  # then names, of tensors that were not read
    content = published()
    model, report = load_pretrained(deflated(kept(tmp_path, content)))
    assert report and torch.equal(
        model.decoder_pred.weight, content['model']['decoder_pred.weight']
    )  # an honest one is read


def test_loading_leaves_the_random_state_alone(tmp_path):
    path, state = kept(tmp_path, published()), torch.get_rng_state()
    load_pretrained(path)
    assert torch.equal(torch.get_rng_state(), state)


# a model that begins with the filling -------------------------------------------------------------

FILLING = dict(img_size=24, patch=4, dim=32, depth=2, heads=4, dec_dim=16, dec_depth=2, dec_heads=2)


def filling_mae(shaken=True, **kw):
    model = FillingMAE(**(FILLING | kw))
    return shake(model, 0.1) if shaken else model


def removed_mse(drawn, x, mask, p=4):
    gone = mask_pixels(mask, p, x.shape[-2:]).expand_as(x) > 0
    return torch.stack([(a - b)[m].square().mean() for a, b, m in zip(drawn, x, gone)])


def test_an_untrained_one_draws_the_filling():
    x = torch.rand(3, 3, 24, 24)
    drawn, mask = reconstruct(filling_mae(False, sweeps=5), x, generator=gen())
    assert torch.allclose(
        drawn, inpaint_bilinear(x, 1 - mask_pixels(mask, 4, 24), 5), atol=1e-6
    )


@pytest.mark.parametrize('kw', [{}, dict(ring=0), dict(dec_depth=0), dict(channels=1, ring=3)])
@pytest.mark.parametrize('masking, ratio', [('random', 0.75), ('block', 0.5), ('grid', 0.75)])
def test_its_loss_is_minus_the_db_of_what_it_draws(kw, masking, ratio):
    model = filling_mae(**kw)
    x = torch.rand(3, model.encoder.channels, 24, 24)
    loss, pred, mask = model(x, ratio, masking, gen())
    drawn = M.unpatchify(pred, 4, 24)
    by_hand = 10 * (removed_mse(drawn, x, mask) + 1e-5).log10().mean()
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-4)
    assert torch.equal(drawn, reconstruct(model, x, ratio, masking, gen())[0])
    short, some, same = model(x, ratio, masking, gen(), whole=False)
    assert torch.equal(same, mask) and torch.allclose(short, loss)
    for k in range(3):  # the same patches, in the order in which they were shuffled
        a, b = pred[k][mask[k] == 1], some[k]
        assert torch.allclose(a.sum(0), b.sum(0), atol=1e-4)


def test_it_reads_visible_pixels_alone_and_all_of_its_parts_learn():
    model, x = filling_mae(), torch.rand(3, 3, 24, 24)
    drawn, mask = reconstruct(model, x, generator=gen())
    gone = mask_pixels(mask, 4, 24) > 0
    other = torch.where(gone, torch.rand_like(x), x)
    assert torch.equal(
        reconstruct(model, other, generator=gen())[0][gone.expand_as(x)],
        drawn[gone.expand_as(x)],
    )
    model(x, generator=gen(), whole=False)[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_fainter_image_is_drawn_alike():
    "Mean and contrast of the visible pixels are taken out and put back."
    model, x = filling_mae(), torch.rand(2, 3, 24, 24)
    one = reconstruct(model, x, generator=gen())[0]
    faint = reconstruct(model, 0.3 + 0.4 * x, generator=gen())[0]
    assert torch.allclose(0.3 + 0.4 * one, faint, atol=2e-3)


def test_windows_hold_a_patch_and_its_surroundings():
    x = torch.rand(2, 3, 12, 8)
    got = windows(x, 4, 2)
    padded = F.pad(x, (2,) * 4, mode='replicate')
    assert torch.equal(got[:, 3].reshape(2, 3, 8, 8), padded[:, :, 4:12, 4:12])
    assert torch.equal(
        windows(x, 4, 0).reshape(2, 6, 3, 16).transpose(2, 3).reshape(2, 6, 48), patchify(x, 4)
    )


@pytest.mark.parametrize('kw, says', [(dict(sweeps=-1), 'sweeps'), (dict(ring=-1), 'ring')])
def test_bad_arguments_of_it(kw, says):
    with pytest.raises(ValueError, match=says):
        filling_mae(**kw)


@pytest.mark.parametrize('make', [small, filling_mae])
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_other_precisions(make, dtype):
    model, x = make().to(dtype), torch.rand(2, 3, 24, 24).to(dtype)
    for whole in (False, True):
        loss, pred, _ = model(x, generator=gen(), whole=whole)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(pred).all()


@pytest.mark.parametrize(
    'model',
    [
        lambda: small(norm_pix_loss=True, **STATS),
        lambda: small(img_size=(16, 24), channels=1, dec_depth=1),
        lambda: filling_mae(sweeps=3, ring=2),
    ],
)
def test_files_of_both(tmp_path, model):
    from restore_lib.model_files import load_model, save_model

    model = model().eval()
    again, says = load_model(save_model(model, tmp_path / 'it.safetensors', task='draw'))
    assert type(again) is type(model) and says == {'task': 'draw'}
    assert again.made_of() == model.made_of()
    hw = [g * model.encoder.patch for g in model.encoder.grid]
    x = torch.rand(2, model.encoder.channels, *hw)
    one, two = (reconstruct(m, x, generator=gen())[0] for m in (model, again))
    assert torch.allclose(one, two, atol=0.05 * one.abs().max())  # half precision


def test_a_decoder_without_blocks_draws_removed_patches():
    model, x = small(dec_depth=0), torch.rand(2, 3, 24, 24)
    losses = [model(x, generator=gen(), whole=whole)[0] for whole in (True, False)]
    assert torch.allclose(*losses, rtol=1e-5)


def test_the_decoder_knows_places():
    "Without positions every removed patch of an image is drawn alike."
    model, x = small(), torch.rand(2, 3, 24, 24)
    _, pred, mask = model(x, generator=gen(), whole=False)
    assert (pred - pred[:, :1]).abs().max() > 0.1
    model.decoder_pos_embed.zero_()
    _, pred, _ = model(x, generator=gen(), whole=False)
    assert torch.allclose(pred, pred[:, :1].expand_as(pred), atol=1e-4)


# its four changes, one away at a time -------------------------------------------------------------


def ablated(*lacks):
    from restore_lib.mae_training import Ablated

    return shake(Ablated(**FILLING, sweeps=3, ring=2, lacks=lacks), 0.1)


@pytest.mark.parametrize('lacks', [[], ['filling'], ['told'], ['statistics'], ['dB']])
def test_without_a_change_it_still_reads_visible_pixels_alone(lacks):
    model, x = ablated(*lacks), torch.rand(2, 3, 24, 24)
    drawn, mask = reconstruct(model, x, generator=gen())
    other = torch.where(mask_pixels(mask, 4, 24) > 0, torch.rand_like(x), x)
    again = reconstruct(model, other, paste=False, generator=gen())[0]
    gone = mask_pixels(mask, 4, 24).expand_as(x) > 0
    assert torch.equal(again[gone], drawn[gone])


def test_each_name_takes_its_own_change_away():
    from restore_lib.mae_training import Ablated

    x = 0.3 + 0.4 * torch.rand(2, 3, 24, 24)
    start = Ablated(**FILLING, sweeps=3, lacks=['filling'])
    drawn, mask = reconstruct(start, x, generator=gen())
    assert torch.allclose(drawn, M.inpaint_mean(x, 1 - mask_pixels(mask, 4, 24)), atol=1e-6)
    untold = ablated('told')
    untold(x, generator=gen())[0].backward()
    assert untold.filling_embed.weight.grad is None
    loss, pred, mask = ablated('dB')(x, generator=gen())
    by_hand = removed_mse(M.unpatchify(pred, 4, 24), x, mask).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    fixed = ablated('statistics')
    one, faint = (reconstruct(fixed, y, generator=gen())[0] for y in (x, 0.3 + 0.4 * x))
    assert not torch.allclose(0.3 + 0.4 * one, faint, atol=0.01)


def study_row(name, seed, values, figure='dB'):
    return dict(config=dict(knob=name), seed=seed, figures={figure: values})


def test_rows_are_compared_over_the_seeds_that_both_have():
    from restore_lib.audit import compare
    from restore_lib.mae_training import against

    g = gen()
    runs = {(n, s): (20 + torch.rand(30, generator=g)).tolist() for n in 'ab' for s in range(4)}
    kept = [('b', 3), ('a', 2), ('b', 0), ('a', 0), ('b', 2), ('a', 3), ('a', 1)]
    rows = [study_row(n, s, runs[n, s]) for n, s in kept]
    reference, other = against(rows, 'knob', 'a')
    assert reference['seeds'] == 4 and other['seeds'] == 3 and 'told apart' not in reference
    own, base = ([runs[n, s] for s in (0, 2, 3)] for n in 'ba')
    report = compare(own, base, paired_seeds=True)
    assert other['difference'] == report.difference
    assert other['told apart'] == ('yes' if report else 'no')


def test_two_seeds_tell_nothing_apart_and_answers_count_in_percent():
    from restore_lib.mae_training import against

    read = {'a': '0011', 'b': '1111'}
    rows = [study_row(n, s, read[n], 'right') for s in range(2) for n in read]
    rows.append(dict(config=dict(filling='smooth'), seed=0, figures={}))
    base, other = against(rows, 'knob', 'a', 'right')
    assert (base['%'], other['%'], other['told apart']) == (50, 100, 'too few seeds')
    with pytest.raises(ValueError, match='there are a, b'):
        against(rows, 'knob', 'c', 'right')


def test_pictures_of_a_drawing_have_one_mask_and_the_best_filling():
    "Two figures of one image with other masks show other dB, and a weak filling flatters."
    from restore_lib.mae_training import board, drawing_steps

    model, x = FillingMAE(16, 4, 16, 1, 2, 16, 1, 2, sweeps=2), torch.rand(3, 16, 16)
    rows, titles = board(model, x[None])
    left, smooth, _, pasted, truth = drawing_steps(model, x, 0.75)[0]
    assert list(rows)[1:] == ['bilinear', 'smoothed, 128 sweeps', 'MAE', 'truth']
    for name, image in zip(rows, (left, None, smooth, pasted, truth)):
        assert image is None or torch.equal(rows[name][0], image)
    assert 'smoothed, 8 sweeps' in board(model, x[None], sweeps=8)[0]


# the weights of the library -----------------------------------------------------------------------


def test_committed_weights_beat_both_fillings_on_photographs_and_digits():
    from restore_lib.data import digits, photos
    from restore_lib.mae_training import fixed_crops, scores
    from restore_lib.model_files import load_model

    sets = {
        'mae_photos': fixed_crops(photos('test').values(), each=24),
        'mae_digits': digits(100, 'test')[0],
    }
    for name, x in sets.items():
        found = scores(load_model(name)[0], x, sweeps=(0, 32, 128))
        ours = found.pop('MAE')
        for filling in found.values():
            assert ours['crops'] > filling['crops'] and ours['pooled'] > filling['pooled'], name
