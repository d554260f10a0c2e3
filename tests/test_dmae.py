"""What lesson 09 does not teach: the loss derived anew, parity with MAE, published files, swapped
arguments, bad input."""

import argparse, copy, math

from common import gen, shake
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from restore_lib.audit import reads_truth
from restore_lib.dmae import (
    DMAE,
    denoise,
    dmae_loss,
    dmae_pretrainer,
    dmae_tiny,
    dmae_vit_base,
    dmae_vit_large,
    load_dmae,
)
from restore_lib.mae import MAE, features, mae_tiny, mask_pixels
from restore_lib.model_files import load_model, save_model
from restore_lib.patching import patchify
from restore_lib.published_dmae import fitted_to_input, perfect_drawings

NAN = math.nan
SIZES = dict(img_size=24, patch=4, dim=32, depth=2, heads=4, dec_dim=16, dec_depth=2, dec_heads=2)


pytestmark = pytest.mark.usefixtures('seed')


def small(**kw):
    return shake(DMAE(**(SIZES | kw)))


def pair(b=3, c=3, s=0.25):
    return (x := torch.rand(b, c, 24, 24)), x + s * torch.randn_like(x)


# the model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('norm_pix', [False, True])
@pytest.mark.parametrize(
    'masking, ratio',
    [('random', 0.75), ('random', 0), ('random', 0.0), ('block', 0.6), ('grid', 0.75)],
)
def test_loss_by_hand(norm_pix, masking, ratio):
    model, (x, y) = (
        small(norm_pix_loss=norm_pix, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)),
        pair(),
    )
    loss, pred, mask = model(y, x, ratio, gen(), masking)
    assert pred.shape == (3, 36, 48) and (mask.sum(1) == math.floor(36 * ratio + 0.5)).all()
    t = (x.double().numpy() - np.reshape([0.4, 0.5, 0.6], (3, 1, 1))) / np.reshape(
        [0.2, 0.3, 0.25], (3, 1, 1)
    )
    t = np.array(
        [
            [
                t[k, :, i : i + 4, j : j + 4].transpose(1, 2, 0).ravel()
                for i in range(0, 24, 4)
                for j in range(0, 24, 4)
            ]
            for k in range(3)
        ]
    )
    if norm_pix:
        t = (t - t.mean(-1, keepdims=True)) / np.sqrt(t.var(-1, ddof=1, keepdims=True) + 1e-6)
    assert loss.item() == pytest.approx(
        np.mean((pred.detach().double().numpy() - t) ** 2), rel=1e-5
    )


@pytest.mark.parametrize('masking, ratio', [('random', 0.75), ('block', 0.5), ('grid', 0.75)])
def test_draws_as_the_mae_that_it_is_made_of(masking, ratio):
    mae, x = shake(MAE(**SIZES)), torch.rand(2, 3, 24, 24)
    model, (loss, pred, mask) = DMAE.of(mae), mae(x, ratio, masking, gen())
    ours = model(x, x, ratio, gen(), masking)
    assert torch.equal(ours[1], pred) and torch.equal(ours[2], mask)
    each = (pred - mae.targets(x)[0]).square().mean(-1)
    assert (
        torch.allclose(ours[0], each.mean())
        and torch.allclose(loss, (each * mask).sum() / mask.sum())
        and not torch.allclose(ours[0], loss)
    )


def test_of_shares_and_a_copy_does_not():
    mae = shake(MAE(**SIZES))
    model, apart = DMAE.of(mae), copy.deepcopy(DMAE.of(mae))
    assert isinstance(model, DMAE) and type(mae) is MAE
    assert all(a is b for a, b in zip(model.parameters(), mae.parameters())) and list(
        model.state_dict()
    ) == list(mae.state_dict())
    nn.init.zeros_(apart.decoder_pred.weight)
    assert mae.decoder_pred.weight.abs().sum() > 0
    assert torch.equal(model.mean, mae.mean) and not model.norm_pix_loss


@pytest.mark.parametrize('ratio', [0.75, 0.25, 0])
def test_what_reaches_the_drawing(ratio):
    "Seen patches of y do; removed ones, and the clean image, do not."
    model, (x, y) = small(), pair()
    run = lambda x, y: model(y, x, ratio, gen())
    _, pred, mask = run(x, y)
    assert torch.equal(run(torch.rand_like(x), y)[1], pred)
    hidden = mask_pixels(mask, 4, 24) > 0
    assert torch.equal(run(x, torch.where(hidden, torch.rand_like(y), y))[1], pred)
    y.requires_grad_()
    run(x, y)[1].square().sum().backward()
    assert torch.equal(patchify(y.grad, 4).abs().sum(2) > 0, mask == 0)


def test_every_target_counts_equally():
    model, (x, y) = small(), pair()
    x.requires_grad_()
    loss, pred, _ = model(y, x, 0.75, gen())
    loss.backward()
    assert torch.allclose(
        patchify(x.grad, 4),
        2 * (model.targets(x)[0] - pred).detach() / pred.numel() / 0.5,
        atol=1e-8,
    )


def test_nothing_masked_means_no_mask_token_and_order_does_not_matter():
    model, (x, y) = small(), pair()
    loss, pred, mask = model(y, x, 0)
    assert not mask.any()
    loss.backward()
    assert model.mask_token.grad is None or not model.mask_token.grad.any()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in model.named_parameters()
        if n != 'mask_token'
    )
    order = torch.rand(3, 36, generator=gen()).argsort(1)  # the same patches in another order
    assert torch.allclose(model.decode(model.latent(y, order), order.argsort(1)), pred, atol=1e-4)
    state = torch.get_rng_state()
    model(y, x, 0)
    assert torch.equal(torch.get_rng_state(), state)  # no random number is used up


def test_latent_is_the_encoders_with_the_class_token_first_and_learns():
    model, (_, y) = small(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)), pair()
    z = model.latent(y)
    assert z.shape == (3, 37, 32) and torch.allclose(
        z, model.encoder((y - model.mean) / model.std)[0], atol=1e-5
    )
    assert torch.allclose(z[:, 1:].mean(1), features(model, y), atol=1e-5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.encoder.cls_token.add_(5)
    assert (other.latent(y)[:, 0] - z[:, 0]).abs().mean() > (
        other.latent(y)[:, 1:] - z[:, 1:]
    ).abs().mean()
    model.pixels(model.decode(z)).sum().backward()
    assert model.encoder.patch_embed.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    'kw, shape',
    [
        (dict(img_size=(16, 40)), (2, 3, 16, 40)),
        (dict(channels=1), (2, 1, 24, 24)),
        (dict(patch=8, dec_depth=1), (1, 3, 24, 24)),
    ],
)
def test_shapes(kw, shape):
    model, x = small(**kw), torch.rand(shape)
    assert denoise(model, x).shape == shape and denoise(model, x, 0.5, gen()).shape == shape
    assert torch.isfinite(model(x + 0.1, x)[0])


def test_half_precision_and_seeds():
    model, (x, y) = small(), pair()
    with torch.autocast('cpu', torch.bfloat16):
        loss, pred, _ = model(y, x)
    assert (
        loss.dtype == torch.float32
        and torch.isfinite(loss)
        and model.pixels(pred).dtype == torch.float32
    )
    one, two, three = (model(y, x, 0.75, gen(s)) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, two)) and not torch.equal(one[2], three[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu():
    model, (_, y) = small(), pair()
    there = denoise(copy.deepcopy(model).cuda(), y.cuda())
    assert there.is_cuda and torch.allclose(there.cpu(), denoise(model, y), atol=1e-2)


@pytest.mark.parametrize('preset, published', [(dmae_vit_base, 111.9), (dmae_vit_large, 329.5)])
def test_presets(preset, published):
    with torch.device('meta'):
        model = preset()
    assert isinstance(model, DMAE) and model.norm_pix_loss and not preset.__call__ is None
    assert sum(t.numel() for t in model.state_dict().values()) / 1e6 == pytest.approx(
        published, abs=0.06
    )
    with torch.device('meta'):
        assert not preset(norm_pix_loss=False).norm_pix_loss


def test_tiny():
    a, b = dmae_tiny(28, 7, channels=1), mae_tiny(28, 7, channels=1)
    assert isinstance(a, DMAE) and {k: v.shape for k, v in a.state_dict().items()} == {
        k: v.shape for k, v in b.state_dict().items()
    }


# pictures -----------------------------------------------------------------------------------------


class Perfect(DMAE):
    "Predicts what it is told to."

    def decode(self, latent, ids_restore=None):
        return self.answer


def test_pixels_undo_mean_and_std_exactly():
    model, (x, y) = Perfect(**SIZES, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)), pair()
    model.answer = model.targets(x)[0]
    for r in (0, 0.5):
        assert torch.allclose(denoise(model, y, r), x, atol=1e-6)
    model.answer = model.answer * 3  # not clipped
    assert denoise(model, y).max() > 1


@pytest.mark.parametrize('ratio', [0, 0.5])
def test_the_truth_is_not_read(ratio):
    model, (x, y) = small(), pair(4)
    assert not reads_truth(lambda y, x: denoise(model, y, ratio, gen()), y, x)


def test_modes_come_back_and_nothing_is_tracked():
    model, (_, y) = small(), pair()
    model.train()
    model.encoder.blocks[0].eval()
    before = [m.training for m in model.modules()]
    assert not denoise(model, y).requires_grad and [m.training for m in model.modules()] == before
    with pytest.raises(ValueError):
        denoise(model, y[:, :1])
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda m, x, y: m(y[:2], x), ValueError, r'y has shape \(2'),
        (lambda m, x, y: m(y, x, 1), ValueError, 'ratio is 1'),
        (lambda m, x, y: m(y, x, -0.1), ValueError, 'ratio is -0.1'),
        (lambda m, x, y: m(y, x, 0.75, None, 'stripes'), ValueError, "masking is 'stripes'"),
        (lambda m, x, y: m(y[..., :20], x[..., :20]), ValueError, '24 x 20.*24 x 24'),
        (lambda m, x, y: m(y[:, :1], x[:, :1]), ValueError, '1 channels'),
        (lambda m, x, y: denoise(m, 255 * y), ValueError, '0 to 255'),
        (lambda m, x, y: denoise(m, y * math.nan), ValueError, 'NaN'),
        (lambda m, x, y: denoise(m, (255 * x).byte()), TypeError, 'uint8'),
        (lambda m, x, y: denoise(m, y[0]), ValueError, r'\(b, c, h, w\)'),
        (lambda m, x, y: m.decode(m.latent(y)[:, 1:]), ValueError, '36 tokens.*37.*class token'),
        (
            lambda m, x, y: denoise(small(norm_pix_loss=True), y),
            ValueError,
            'norm_pix_loss.*mean and deviation',
        ),
        (lambda m, x, y: dmae_loss(m, x, -1), ValueError, 'sigma'),
        (lambda m, x, y: m(y[:0], x[:0]), ValueError, 'x holds no image'),
        (lambda m, x, y: m(x, y), ValueError, 'swapped.*comes first'),
        (lambda m, x, y: m(y, 2 * x - 1), ValueError, 'expected 0 to 1'),
        (lambda m, x, y: m(y, x, counted='seen'), ValueError, "counted is 'seen'"),
        (lambda m, x, y: m(y, x, 0, counted='removed'), ValueError, 'mask_ratio is 0'),
        (lambda m, x, y: dmae_loss(m, x, 0.1, 0, counted='removed'), ValueError, 'mask_ratio is 0'),
        (lambda m, x, y: m(y, x, 0.001), ValueError, 'removes no patch'),
        (lambda m, x, y: m.draw(y, 0, None, 'stripes'), ValueError, "masking is 'stripes'"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call(small(), *pair())


# degraded first -----------------------------------------------------------------------------------


@pytest.mark.parametrize('sigma', [0.05, 0.25, 0.5])
def test_a_swapped_call_is_told_wherever_noise_leaves_the_range(sigma):
    "The shapes are the same; the values of the clean image are not."
    model, x = small(), torch.rand(2, 3, 24, 24)
    y = x + sigma * torch.randn_like(x)
    assert torch.isfinite(model(y, x)[0])
    with pytest.raises(ValueError, match='Are x and y swapped'):
        model(x, y)


def test_a_swap_with_a_clipped_image_cannot_be_told():
    "As the documentation says; an image in [0, 1] may be clean."
    model, (x, y) = small(), pair()
    assert torch.isfinite(model(x, y.clamp(0, 1))[0])
    assert 'swap' in DMAE.forward.__doc__


def test_rounding_is_no_swap():
    model, (x, y) = small(), pair()
    assert torch.isfinite(model(y, x * (1 + 2e-4))[0])


def test_without_a_clean_image_there_is_no_loss():
    model, (x, y) = small(), pair()
    loss, pred, mask = model(y, generator=gen())
    assert loss is None
    assert all(torch.equal(a, b) for a, b in zip(model(y, x, generator=gen())[1:], (pred, mask)))


# which patches count ------------------------------------------------------------------------------


@pytest.mark.parametrize('masking, ratio', [('random', 0.75), ('block', 0.5), ('grid', 0.75)])
def test_counting_removed_patches_alone_is_the_loss_of_mae(masking, ratio):
    mae, x = shake(MAE(**SIZES)), torch.rand(2, 3, 24, 24)
    loss = mae(x, ratio, masking, gen())[0]
    ours = DMAE.of(mae)(x, x, ratio, gen(), masking, counted='removed')[0]
    assert torch.allclose(ours, loss)


def test_visible_targets_count_only_where_all_do():
    model, (x, y) = small(), pair()
    for counted in ('all', 'removed'):
        target = x.clone().requires_grad_()
        loss, _, mask = model(y, target, 0.75, gen(), counted=counted)
        loss.backward()
        moved = patchify(target.grad, 4).abs().sum(2) > 0
        assert torch.equal(moved, mask > 0) if counted == 'removed' else moved.all()


def test_the_learner_is_told_which_patches_count():
    learn = dmae_pretrainer(DMAE(**SIZES), DataLoader(Data(), 8), counted='removed', cpu=True)
    assert learn.loss_fn.keywords['counted'] == 'removed' and math.isfinite(
        learn.fit(1).history[-1]['loss']
    )


# files of models ----------------------------------------------------------------------------------


def test_a_dmae_comes_back_from_its_file(tmp_path):
    model, (_, y) = small(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)).half().float(), pair()
    path = save_model(model, tmp_path / 'a.safetensors', task='test')
    again, says = load_model(path, 'dmae.DMAE')
    assert says['task'] == 'test'
    assert torch.allclose(denoise(again, y), denoise(model, y), atol=0.01)


# training -----------------------------------------------------------------------------------------


class Data(torch.utils.data.Dataset):
    def __init__(self, n=16):
        self.x = torch.stack([torch.full((3, 24, 24), 0.2 + 0.6 * k / n) for k in range(n)])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], i


def test_loss_draws_its_own_noise():
    model, (x, _) = small(), pair()
    seen = []
    model.draw = lambda y, *a, **kw: (seen.append(y), DMAE.draw(model, y, *a, **kw))[1]
    for sigma in (0, 0.25, (0.0, 0.5)):
        for batch in (x, (x, 1)):
            dmae_loss(model, batch, sigma, 0)
    stds = [(y - x).flatten(1).std(1) for y in seen]
    assert (
        not stds[0].any()
        and ((stds[2] - 0.25).abs() < 0.02).all()
        and stds[4].max() - stds[4].min() > 0.02
    )
    assert not torch.equal(seen[2], seen[3])  # new noise in each call


def test_pretrainer_has_maes_recipe_and_learns():
    torch.manual_seed(3)
    learn = dmae_pretrainer(
        DMAE(**SIZES),
        DataLoader(Data(), 8),
        DataLoader(Data(), 8),
        sigma=0.1,
        mask_ratio=0.5,
        blr=0.1,
        warmup=0.2,
        clip=1.0,
        cpu=True,
    )
    assert learn.rates[0] == pytest.approx(0.1 * 8 / 256) and learn.opt.param_groups[0][
        'betas'
    ] == (0.9, 0.95)
    losses = [r['loss'] for r in learn.fit(40).history if 'loss' in r]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])
    assert learn.validate() == learn.validate()


def test_options_are_passed_on():
    with pytest.raises(ValueError, match='stripes'):
        dmae_pretrainer(DMAE(**SIZES), DataLoader(Data(), 8), masking='stripes', cpu=True).fit(1)
    with pytest.raises(ValueError, match='sigma'):
        dmae_pretrainer(DMAE(**SIZES), DataLoader(Data(), 8), sigma=3, cpu=True).fit(1)
    assert (
        dmae_pretrainer(DMAE(**SIZES), DataLoader(Data(), 8), mask_ratio=0, cpu=True).fit(2).step
        == 2
    )


# normalised patches as an image -------------------------------------------------------------------


@pytest.mark.parametrize('sigma', [None, 0.0])
def test_without_noise_a_perfect_drawing_fitted_to_its_input_is_the_image(sigma):
    model, (x, _) = small(norm_pix_loss=True, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)), pair()
    assert torch.allclose(fitted_to_input(model, model.targets(x)[0], x, sigma), x, atol=1e-3)


def test_contrast_of_patches_by_hand():
    "One patch of the perfect drawing, in NumPy; a drawing turned upside down gets no contrast."
    model, (x, y) = small(norm_pix_loss=True), pair()
    pred = model.targets(x)[0]
    seen = (y[0, :, :4, :4].permute(1, 2, 0).double().numpy() - 0.5) / 0.5
    p = pred[0, 0].double().numpy()
    off = seen.ravel() - seen.mean()
    for sigma, contrast in (
        (None, off @ p / (p @ p)),
        (0.25, np.sqrt(max(seen.ravel().var(ddof=1) - 0.25, 1e-4))),
    ):
        image = fitted_to_input(model, pred, y, sigma)[0, :, :4, :4].permute(1, 2, 0).numpy()
        by_hand = (seen.mean() + contrast * p).reshape(4, 4, 3) * 0.5 + 0.5
        assert np.allclose(image, by_hand, atol=1e-5)
    patches = patchify(fitted_to_input(model, -pred, y), 4)
    assert patches.std(2).median() < 1e-3


def test_perfect_drawings_need_a_model_of_normalised_patches():
    x, y = pair()
    images = perfect_drawings(small(norm_pix_loss=True), x, y)
    assert torch.allclose(images["the truth's"], x, atol=1e-4)
    with pytest.raises(ValueError, match='expected normalised patches'):
        perfect_drawings(small(), x, y)
    with pytest.raises(ValueError, match='pred has shape'):
        fitted_to_input(small(), torch.zeros(3, 4, 48), y)


# published files ----------------------------------------------------------------------------------


def published(norm_pix=True, decoder=True, dim=64, dec=32, side=6, patch=4):
    "A file's content with the published names and shapes, made here."
    shapes = {
        'cls_token': (1, 1, dim),
        'pos_embed': (1, side**2 + 1, dim),
        'patch_embed.proj.weight': (dim, 3, patch, patch),
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

    blocks('blocks', dim, 0)
    blocks('blocks', dim, 1)
    shapes |= {'norm.weight': (dim,), 'norm.bias': (dim,)}
    if decoder:
        shapes |= {
            'decoder_embed.weight': (dec, dim),
            'decoder_embed.bias': (dec,),
            'mask_token': (1, 1, dec),
            'decoder_pos_embed': (1, side**2 + 1, dec),
        }
        blocks('decoder_blocks', dec, 0)
        shapes |= {
            'decoder_norm.weight': (dec,),
            'decoder_norm.bias': (dec,),
            'decoder_pred.weight': (3 * patch**2, dec),
            'decoder_pred.bias': (3 * patch**2,),
        }
    g = gen(9)
    return dict(
        model={k: 0.2 * torch.randn(s, generator=g) for k, s in shapes.items()},
        args=argparse.Namespace(norm_pix_loss=norm_pix, sigma=0.25),
        epoch=1099,
    )


@pytest.mark.parametrize('norm_pix', [False, True])
def test_a_published_file(tmp_path, norm_pix):
    kept = published(norm_pix)
    torch.save(kept, tmp_path / 'dmae.pth')
    model, report = load_dmae(tmp_path / 'dmae.pth')
    assert (
        isinstance(model, DMAE) and report and report.share == 1 and model.norm_pix_loss == norm_pix
    )
    assert torch.equal(model.decoder_pred.weight, kept['model']['decoder_pred.weight'])
    y = torch.rand(2, 3, 24, 24)
    conv = (
        F.conv2d(
            (y - model.mean) / model.std,
            kept['model']['patch_embed.proj.weight'],
            kept['model']['patch_embed.proj.bias'],
            stride=4,
        )
        .flatten(2)
        .transpose(1, 2)
    )
    assert torch.allclose(
        model.encoder.embed((y - model.mean) / model.std),
        conv + kept['model']['pos_embed'][:, 1:],
        atol=1e-4,
    )
    if norm_pix:
        with pytest.raises(ValueError, match='norm_pix'):
            denoise(model, y)
        assert torch.isfinite(
            denoise(load_dmae(tmp_path / 'dmae.pth', norm_pix_loss=False)[0], y)
        ).all()
    else:
        assert denoise(model, y).shape == y.shape


def test_into_a_given_model_and_without_a_decoder(tmp_path):
    torch.save(published(decoder=False), tmp_path / 'encoder.pth')
    own = DMAE(24, 4, 64, 2, 1, 32, 1, 1, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    start = own.decoder_pred.weight.clone()
    model, report = load_dmae(tmp_path / 'encoder.pth', own)
    assert (
        model is own
        and not report
        and any(k.startswith('decoder') for k in report.missing)
        and torch.equal(own.decoder_pred.weight, start)
    )
    with pytest.raises(ValueError):
        load_dmae(tmp_path / 'encoder.pth', DMAE(**SIZES))


class Trap:
    def __reduce__(self):
        return (open, ('trapped', 'w'))


def test_no_code_is_run_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(published(), args=Trap()), tmp_path / 'bad.pth')
    with pytest.raises(ValueError, match='without running code'):
        load_dmae(tmp_path / 'bad.pth')
    assert not (tmp_path / 'trapped').exists()
    with pytest.raises(FileNotFoundError):
        load_dmae(tmp_path / 'none.pth')


# a saved model comes back as the same function ----------------------------------------------------

STATS = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


def test_a_loaded_dmae_is_the_same_function():
    model, other, (x, y) = small(**STATS), small(norm_pix_loss=True), pair()
    assert str(other.load_state_dict(model.state_dict())) == '<All keys matched successfully>'
    assert (
        other.norm_pix_loss is False
        and torch.equal(denoise(model, y), denoise(other, y))
        and torch.equal(model(y, x, generator=gen())[0], other(y, x, generator=gen())[0])
    )


def test_made_of_a_mae_it_has_its_statistics_and_state():
    mae = MAE(**SIZES, norm_pix_loss=True, **STATS)
    model = DMAE.of(mae)
    del mae
    assert model.norm_pix_loss is True and model.std.flatten().tolist() == pytest.approx(
        STATS['std']
    )
    copy.deepcopy(model).load_state_dict(model.state_dict())
    model.load_state_dict(small(**STATS).state_dict())  # the MAE that it was made of is gone
    assert model.norm_pix_loss is False


# learners -----------------------------------------------------------------------------------------


def clean(n=8, c=3):
    return DataLoader(torch.rand(n, c, 24, 24), 4)


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(mask_ratio=1), 'mask_ratio is 1'),
        (dict(mask_ratio=-0.1), 'mask_ratio is -0.1'),
        (dict(mask_ratio=NAN), 'mask_ratio is nan'),
        (dict(masking='stripes'), "masking is 'stripes'"),
        (dict(sigma=-1), 'sigma is -1'),
        (dict(sigma=NAN), 'sigma is nan'),
        (dict(sigma=(0.3, 0.1)), 'sigma is'),
        (dict(sigma=3), 'sigma is 3'),
        (dict(blr=NAN), 'blr is nan'),
    ],
)
def test_pretraining_refuses_before_training(kw, says):
    with pytest.raises(ValueError, match=says):
        dmae_pretrainer(DMAE(**SIZES), clean(), cpu=True, **kw)


def test_losses_hold_plain_numbers():
    "A run is known by them, and NumPy's would be known by another name."
    learn = dmae_pretrainer(
        DMAE(**SIZES), clean(), sigma=(np.float32(0.25), np.float64(0.5)), mask_ratio=0.5, cpu=True
    )
    assert learn.loss_fn.keywords == dict(
        sigma=(0.25, 0.5), mask_ratio=0.5, masking='random', counted='all'
    ) and all(type(s) is float for s in learn.loss_fn.keywords['sigma'])


def test_a_denoiser_of_one_patch_may_be_trained():
    "Nothing is removed, so nothing need be left."
    learn = dmae_pretrainer(
        DMAE(**(SIZES | dict(img_size=4))),
        DataLoader(torch.rand(8, 3, 4, 4), 4),
        mask_ratio=0,
        cpu=True,
    ).fit(1)
    assert math.isfinite(learn.history[-1]['loss'])


def test_denoising_leaves_images_and_random_state_alone():
    model, (_, y) = small(), pair()
    before, state = y.clone(), torch.get_rng_state()
    for ratio in (0, np.float32(0.5)):
        denoise(model, y, ratio, gen())
    assert torch.equal(y, before) and torch.equal(torch.get_rng_state(), state)


def test_arguments_as_a_dict_and_two_addresses(tmp_path, monkeypatch):
    "As in `mae.load_pretrained`, through which DMAEs are loaded."
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    site = {}
    for k, url in enumerate(('http://h/a/dmae.pth', 'http://h/b/dmae.pth')):
        state = {
            key.removeprefix('encoder.').replace('patch_embed.', 'patch_embed.proj.'): v
            for key, v in shake(DMAE(24, 4, 64, 2, 1, 32, 1, 1)).state_dict().items()
            if key not in ('mean', 'std', '_extra_state')
        }
        state['patch_embed.proj.weight'] = (
            state['patch_embed.proj.weight']
            .unflatten(1, (4, 4, -1))
            .permute(0, 3, 1, 2)
            .contiguous()
        )
        site[url] = dict(model=state, args=dict(norm_pix_loss=bool(k)))
    monkeypatch.setattr(
        torch.hub, 'download_url_to_file', lambda url, to, **kw: torch.save(site[url], to)
    )
    for k, url in enumerate(site):
        model, _ = load_dmae(url)
        assert (
            isinstance(model, DMAE)
            and model.norm_pix_loss is bool(k)
            and torch.equal(
                model.encoder.blocks[0].mlp.fc1.weight,
                site[url]['model']['blocks.0.mlp.fc1.weight'],
            )
        )
