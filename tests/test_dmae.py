"""What lesson 09 does not teach: the loss derived anew, parity with MAE, published files,
the certificate's statistics, bad input."""

import argparse, copy, inspect, math

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
    Certified,
    certified_accuracy,
    certify,
    consistency,
    denoise,
    dmae_loss,
    dmae_pretrainer,
    dmae_tiny,
    dmae_vit_base,
    dmae_vit_large,
    load_dmae,
    noisy_votes,
    smoothing_finetune,
    smoothing_loss,
)
from restore_lib.mae import MAE, features, mae_tiny, mask_pixels
from restore_lib.patching import patchify
from restore_lib.transfer import Classifier, labelled, load_encoder

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
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call(small(), *pair())


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


# consistency --------------------------------------------------------------------------------------


@pytest.mark.parametrize('m', [2, 3])
def test_consistency_by_hand(m):
    logits = 3 * torch.randn(m, 5, 4)
    p = np.exp(logits.double().numpy())
    p /= p.sum(-1, keepdims=True)
    mean = p.mean(0)
    kl = np.mean([(mean * np.log(mean / p[i])).sum(1).mean() for i in range(m)])
    assert consistency(logits, 2.0, 0.5).item() == pytest.approx(
        2 * kl - 0.5 * (mean * np.log(mean)).sum(1).mean(), rel=1e-5
    )
    torch_kl = torch.stack(
        [
            F.kl_div(q.log_softmax(1), logits.softmax(2).mean(0), reduction='batchmean')
            for q in logits
        ]
    ).mean()
    assert torch.allclose(consistency(logits, 1.0, 0.0), torch_kl, atol=1e-6)


def test_consistency_at_its_ends():
    same = torch.randn(1, 6, 5).expand(2, -1, -1)
    assert consistency(same, 2.0, 0.0).abs() < 1e-6
    assert consistency(torch.zeros(2, 3, 4), 2.0, 0.5).item() == pytest.approx(0.5 * math.log(4))
    far = torch.tensor([[[1e4, 0.0]], [[0.0, 1e4]]], requires_grad=True)
    value = consistency(far)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(far.grad).all()
    for bad in (torch.zeros(1, 3, 4), torch.zeros(3, 4)):
        with pytest.raises(ValueError, match='m, b, classes'):
            consistency(bad)


class Linear(nn.Module):
    def __init__(self, k=3):
        super().__init__()
        self.f = nn.Linear(16, k)

    def forward(self, x):
        return self.f(x.flatten(1))


def test_smoothing_loss():
    model, x, t = Linear(), torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 1])
    got = smoothing_loss(model, (x, t), 0.0, copies=2)
    assert set(got) == {'ce', 'consistency'} and torch.allclose(
        got['ce'], F.cross_entropy(model(x), t)
    )
    assert torch.allclose(got['consistency'], consistency(model(x).expand(2, -1, -1)), atol=1e-6)
    assert (
        set(smoothing_loss(model, (x, t), 0.2, copies=1))
        == {'ce'}
        == set(smoothing_loss(model, (x, t), 0.2, lam=0, eta=0))
    )
    torch.manual_seed(1)
    logits = []
    model.register_forward_hook(lambda m, i, o: logits.append(o))
    full = smoothing_loss(model, (x, t), 0.2, copies=3)
    assert logits[0].shape == (12, 3) and torch.allclose(
        full['ce'], F.cross_entropy(logits[0], t.repeat(3))
    )
    assert torch.allclose(
        full['consistency'], consistency(logits[0].reshape(3, 4, 3))
    )  # copies of one image stand together


def test_smoothing_finetune():
    x = (
        torch.rand(30, 3, 24, 24) * 0.2
        + (labels := torch.arange(30) % 2)[:, None, None, None] * 0.6
    )
    start, model = DMAE(**SIZES), Classifier(DMAE(**SIZES).encoder, 2)
    load_encoder(model, start)
    learn = smoothing_finetune(
        model, labelled(x, labels, 2, batch=10), sigma=0.1, blr=0.05, layer_decay=1.0, cpu=True
    ).fit(25)
    assert {'ce', 'consistency'} <= set(learn.history[-1]) and learn.history[-1][
        'ce'
    ] < 0.3 < learn.history[0]['ce']
    assert certified_accuracy(certify(learn.trained(), x[:6], 0.1, 20, 100), labels[:6]).item() == 1


# the certificate ----------------------------------------------------------------------------------


class Plane(nn.Module):
    "Class 1 where the mean is above .5; the distance to the plane is |mean - .5|*sqrt(numbers)."

    def forward(self, x):
        return torch.stack([torch.zeros(len(x)), x.flatten(1).mean(1) - 0.5], 1)


class Always(nn.Module):
    def forward(self, x):
        return F.one_hot(torch.full((len(x),), 2), 4).float()


def flat(*means, size=8):
    return torch.tensor(means)[:, None, None, None].expand(-1, 1, size, size).contiguous()


def test_votes():
    x = flat(0.4, 0.5, 0.6)
    votes = noisy_votes(Plane(), x, 0.25, 1000, gen())
    assert votes.shape == (3, 2) and (votes.sum(1) == 1000).all() and votes.dtype == torch.int64
    p = [0.5 * (1 + math.erf((m - 0.5) * 8 / 0.25 / math.sqrt(2))) for m in (0.4, 0.5, 0.6)]
    for v, q in zip(votes[:, 1].tolist(), p):
        assert abs(v / 1000 - q) < 4 * math.sqrt(q * (1 - q) / 1000) + 0.002
    assert torch.equal(votes, noisy_votes(Plane(), x, 0.25, 1000, gen())) and not torch.equal(
        votes, noisy_votes(Plane(), x, 0.25, 1000, gen(1))
    )
    for batch in (1, 7, 64, 10_000):
        assert (
            noisy_votes(Always(), x, 0.25, 10, batch=batch) == torch.tensor([0, 0, 10, 0])
        ).all()


def test_the_bound_is_the_exact_one_of_scipy(monkeypatch):
    from scipy.stats import binomtest, norm
    from restore_lib import dmae

    wins = torch.tensor([0, 1, 30, 50, 51, 70, 99, 100])
    monkeypatch.setattr(
        dmae,
        'noisy_votes',
        lambda model, x, sigma, n, *a: (
            torch.stack([wins, 100 - wins], 1) if n == 100 else torch.tensor([[1, 0]]).expand(8, 2)
        ),
    )
    found = certify(None, torch.zeros(8, 1, 2, 2), 0.5, 10, 100, 0.01)
    low = [
        binomtest(int(k), 100).proportion_ci(0.98, 'exact').low for k in wins
    ]  # two-sided at 2 alpha: one-sided at alpha
    assert np.allclose(found.p_lower, low, atol=1e-6)
    assert np.allclose(
        found.radius, [max(0, 0.5 * norm.ppf(p)) if p > 0.5 else 0 for p in low], atol=1e-6
    )
    assert (found.label == torch.where(torch.tensor(low) > 0.5, 0, -1)).all() and found.p_lower[
        0
    ] == 0


def test_certificates_hold_and_come_close():
    x = flat(*torch.linspace(0.5, 0.58, 60).tolist())
    true = (x.mean((1, 2, 3)) - 0.5) * 8
    found = certify(Plane(), x, 0.25, 100, 4000, 0.001)
    assert (
        (found.radius <= true + 1e-5).all()
        and (found.label[true > 0.05] == 1).all()
        and found.label[0] == -1
    )
    assert (true - found.radius)[(true > 0.1) & (true < 0.5)].max() < 0.06


def test_certificates_fail_as_seldom_as_they_say():
    x = flat(*[0.51] * 400)
    p = 0.5 * (1 + math.erf(0.08 / 0.25 / math.sqrt(2)))
    found = certify(Plane(), x, 0.25, 50, 100, alpha=0.1)
    assert (found.p_lower[found.label == 1] > p).float().mean() < 0.1 + 3 * math.sqrt(0.09 / 400)
    assert (
        certify(Plane(), x, 0.25, 50, 100, alpha=0.4).p_lower > p
    ).float().mean() > 0.2  # and the test can fail


def test_no_attack_within_the_radius_moves_the_vote():
    x = flat(0.55)
    r = certify(Plane(), x, 0.25, 100, 4000).radius.item()
    for k in (0.5, 0.99):
        attacked = x - k * r / 8  # straight to the plane: L2 length k*r
        assert (attacked - x).norm().item() == pytest.approx(k * r, rel=1e-4) and noisy_votes(
            Plane(), attacked, 0.25, 20_000, gen()
        ).argmax() == 1


def test_no_label_is_asked_for():
    assert not {'label', 'labels', 'target', 'targets'} & set(inspect.signature(certify).parameters)
    found = certify(Always(), flat(0.1, 0.9), 0.25, 10, 100)
    assert (found.label == 2).all() and (found.radius > 0).all()


def test_more_votes_prove_more_and_the_limit():
    radii = [certify(Always(), flat(0.5), 0.25, 10, n).radius.item() for n in (5, 50, 500, 5000)]
    from scipy.stats import norm

    assert (
        radii[0] == 0
        and radii == sorted(radii)
        and radii[2] == pytest.approx(0.25 * norm.ppf(0.001 ** (1 / 500)), rel=1e-5)
    )


def test_mode_comes_back_and_dropout_is_off():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(64, 2)).train()
    a, b = (certify(model, flat(0.3, 0.7), 0.25, 10, 50, seed=3) for _ in range(2))
    assert model.training and model[1].training and all(torch.equal(s, t) for s, t in zip(a, b))


def test_certified_accuracy_by_hand():
    found = Certified(
        torch.tensor([1, 1, -1, 0]), torch.tensor([0.5, 0.2, 0.0, 0.9]), torch.ones(4)
    )
    assert certified_accuracy(found, torch.tensor([1, 1, 1, 1]), (0, 0.2, 0.3, 0.6)).tolist() == [
        0.5,
        0.5,
        0.25,
        0,
    ]
    with pytest.raises(ValueError, match='labels 2'):
        certified_accuracy(found, torch.tensor([1, 1]))


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(alpha=0), 'alpha is 0'),
        (dict(alpha=1), 'alpha is 1'),
        (dict(n=0), 'n is 0'),
        (dict(n0=0), 'n0 is 0'),
        (dict(sigma=0), 'sigma is 0'),
        (dict(sigma=-1), 'sigma is -1'),
        (dict(x=torch.zeros(1, 8, 8)), r'\(b, c, h, w\)'),
    ],
)
def test_bad_certify(kw, says):
    with pytest.raises(ValueError, match=says):
        certify(Plane(), **(dict(x=flat(0.5), sigma=0.25, n0=5, n=5) | kw))


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


# certificates -------------------------------------------------------------------------------------


class Says(nn.Module):
    "Class 1, and NaN for a share of the copies, counted from the first."

    def __init__(self, share):
        super().__init__()
        self.share, self.n = share, 0

    def forward(self, z):
        out = torch.tensor([0.0, 1.0, 0.0]).repeat(len(z), 1)
        out[(self.n + torch.arange(len(z))) % 100 < 100 * self.share, 2] = math.nan
        self.n += len(z)
        return out


def test_no_certificate_for_a_network_that_says_nan():
    found = certify(lambda z: torch.full((len(z), 10), math.nan), torch.rand(3, 1, 8, 8), 0.25)
    assert (
        found.label.tolist() == [-1] * 3
        and found.radius.tolist() == [0] * 3
        and found.p_lower.tolist() == [0] * 3
    )
    assert noisy_votes(Says(1), torch.rand(2, 1, 8, 8), 0.25, 50).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize('share', [0, 0.2, 0.4, 0.6])
def test_copies_of_which_it_says_nan_count_against_the_class(share):
    from scipy.stats import beta, norm

    assert noisy_votes(Says(share), torch.rand(1, 1, 8, 8), 0.25, 200).tolist() == [
        [0, round(200 * (1 - share)), 0]
    ]
    found = certify(Says(share), torch.rand(1, 1, 8, 8), 0.25, n0=100, n=1000)
    p = beta.ppf(0.001, 1000 * (1 - share), 1000 * share + 1)
    assert found.p_lower.item() == pytest.approx(p, rel=1e-5)
    assert found.label.item() == (1 if p > 0.5 else -1) and found.radius.item() == pytest.approx(
        0.25 * norm.ppf(max(p, 0.5)), abs=1e-6
    )


def test_votes_need_no_memory_for_images_times_votes():
    class Stop(Exception):
        pass

    def model(z):
        raise Stop

    with pytest.raises(Stop):
        noisy_votes(model, torch.rand(4, 1, 8, 8), 0.25, 10**13, batch=4)


@pytest.mark.parametrize('n, batch', [(7, 4), (10, 512), (1, 1)])
def test_the_noise_of_votes_is_that_of_one_stream(n, batch):
    from restore_lib.degrade import gaussian

    x, seen = torch.rand(3, 1, 8, 8), []

    def model(z):
        seen.append(z.clone())
        return torch.stack([z.mean((1, 2, 3)) - 0.5, 0.5 - z.mean((1, 2, 3))], 1)

    votes, g = noisy_votes(model, x, 0.25, n, gen(), batch), gen()
    by_hand = [gaussian(x[i // n], 0.25, g) for i in torch.arange(3 * n).split(batch)]
    assert len(seen) == len(by_hand) and all(torch.equal(a, b) for a, b in zip(seen, by_hand))
    wins = (torch.cat(seen).mean((1, 2, 3)) < 0.5).reshape(3, n).sum(1)
    assert votes.tolist() == [[n - w, w] for w in wins.tolist()] and votes.dtype == torch.int64


def test_certificates_from_numpy_and_the_caller_s_random_state():
    model, x = Classifier(DMAE(**(SIZES | dict(channels=1))).encoder, 3), torch.rand(2, 1, 24, 24)
    before, state = x.clone(), torch.get_rng_state()
    plain = certify(model, x, 0.25, 5, 20, 0.01, 3, 16)
    again = certify(
        model,
        x,
        np.float32(0.25),
        np.int64(5),
        np.int32(20),
        np.float64(0.01),
        np.int64(3),
        np.int64(16),
    )
    assert (
        all(torch.equal(a, b) for a, b in zip(plain, again))
        and torch.equal(torch.get_rng_state(), state)
        and torch.equal(x, before)
    )
    assert certified_accuracy(
        plain, torch.zeros(2, dtype=torch.int64), (np.float32(0), np.int64(1))
    ).shape == (2,)
    assert certified_accuracy(plain, torch.zeros(2, dtype=torch.int64), 0.5).shape == (1,)


NAN, X = float('nan'), torch.rand(2, 1, 8, 8)


def thirds(z):
    return z.flatten(1)[:, :3]


def found(n=2):
    return Certified(torch.zeros(n, dtype=torch.int64), torch.ones(n), torch.ones(n))


@pytest.mark.parametrize(
    'call, says',
    [
        *[(lambda s=s: certify(thirds, X, s), 'sigma is') for s in (0, -1, NAN, math.inf)],
        *[(lambda s=s: noisy_votes(thirds, X, s, 5), 'sigma is') for s in (-1, NAN, math.inf)],
        *[(lambda a=a: certify(thirds, X, 0.25, alpha=a), 'alpha is') for a in (0, 1, -0.1, NAN)],
        *[(lambda n=n: certify(thirds, X, 0.25, n0=n), 'n0 is') for n in (0, -3, 2.5, True)],
        *[(lambda n=n: certify(thirds, X, 0.25, n=n), 'n is') for n in (0, 2.5, NAN)],
        *[(lambda n=n: noisy_votes(thirds, X, 0.25, n), 'n is') for n in (0, -1, 1.5)],
        *[(lambda n=n: noisy_votes(thirds, X, 0.25, 5, batch=n), 'batch is') for n in (0, -1, 1.5)],
        (lambda: certify(thirds, X, 0.25, seed=0.5), 'seed is 0.5'),
        (lambda: certify(thirds, X[:0], 0.25), 'at least one image'),
        (lambda: noisy_votes(thirds, X[:0], 0.25, 5), 'at least one image'),
        *[
            (
                lambda r=r: certified_accuracy(found(), torch.zeros(2, dtype=torch.int64), r),
                'radii is',
            )
            for r in ((-1.0,), (0.0, NAN), (math.inf,))
        ],
        (
            lambda: certified_accuracy(found(0), torch.zeros(0, dtype=torch.int64)),
            'found holds no image',
        ),
        (lambda: certified_accuracy(found(), torch.zeros(2)), 'labels is torch.float32'),
        (lambda: certified_accuracy(found(), torch.zeros(2, 1, dtype=torch.int64)), 'labels is'),
        *[
            (lambda k=k: consistency(torch.zeros(2, 3, 4), **{k: NAN}), f'{k} is nan')
            for k in ('lam', 'eta')
        ],
        (lambda: consistency(torch.zeros(2, 0, 4)), 'one image at least'),
        *[
            (
                lambda c=c: smoothing_loss(
                    nn.Flatten(), (X, torch.zeros(2, dtype=torch.int64)), 0.25, c
                ),
                'copies is',
            )
            for c in (0, 1.5)
        ],
        (lambda: small()(torch.zeros(0, 3, 24, 24), torch.zeros(0, 3, 24, 24)), 'x holds no image'),
    ],
)
def test_numbers_out_of_range(call, says):
    with pytest.raises(ValueError, match=says):
        call()


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


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(sigma=-1), 'sigma is -1'),
        (dict(sigma=NAN), 'sigma is nan'),
        (dict(copies=0), 'copies is 0'),
        (dict(copies=1.5), 'copies is 1.5'),
        (dict(lam=NAN), 'lam is nan'),
        (dict(eta=-1), 'eta is -1'),
        (dict(blr=-1), 'blr is -1'),
    ],
)
def test_fine_tuning_refuses_before_training(kw, says):
    train = labelled(torch.rand(8, 3, 24, 24), torch.arange(8) % 2, 2, batch=4)
    with pytest.raises(ValueError, match=says):
        smoothing_finetune(Classifier(DMAE(**SIZES).encoder, 2), train, cpu=True, **kw)


def test_losses_hold_plain_numbers():
    "A run is known by them, and NumPy's would be known by another name."
    learn = dmae_pretrainer(
        DMAE(**SIZES), clean(), sigma=(np.float32(0.25), np.float64(0.5)), mask_ratio=0.5, cpu=True
    )
    assert learn.loss_fn.keywords == dict(
        sigma=(0.25, 0.5), mask_ratio=0.5, masking='random'
    ) and all(type(s) is float for s in learn.loss_fn.keywords['sigma'])
    train = labelled(torch.rand(8, 3, 24, 24), torch.arange(8) % 2, 2, batch=4)
    tuned = smoothing_finetune(
        Classifier(DMAE(**SIZES).encoder, 2),
        train,
        sigma=np.float32(0.25),
        copies=np.int64(3),
        cpu=True,
    )
    assert (
        tuned.loss_fn.keywords == dict(sigma=0.25, copies=3, lam=2.0, eta=0.5)
        and type(tuned.loss_fn.keywords['sigma']) is float
        and type(tuned.loss_fn.keywords['copies']) is int
    )


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
