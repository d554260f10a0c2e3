"""What lesson 07 does not teach: parity with timm, scikit-learn and formulas written anew,
what is frozen, devices, bad input."""

import subprocess, sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import DEVICES
from torch import nn

from restore_lib.data import ImageFolder
from restore_lib.finetune_parts import (
    lars,
    mixer,
    predict,
    soft_cross_entropy,
    topk_accuracy,
    topk_correct,
)
from restore_lib.label_loaders import Labelled, labelled, plain_view, strong_augment, weak_augment
from restore_lib.mae import MAE, mae_tiny, pretrainer
from restore_lib.patching import ViTEncoder, interpolate_pos_embed, sincos_pos_embed
from restore_lib.transfer import (
    Classifier,
    answers_between,
    depth_groups,
    encoder_like,
    exchange_rate,
    few_labels,
    finetune,
    knn_probe,
    labels_equal,
    linear_probe,
    load_encoder,
)


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tiny(size=14, dim=32, depth=2, channels=1, patch=7, **kw):
    return MAE(size, patch, dim, depth, 4, 16, 1, 4, channels=channels, **kw)


def encoder(size=14, dim=32, depth=2, channels=1, patch=7, **kw):
    return ViTEncoder(size, patch, dim, depth, 4, channels, **kw)


def toy(n=40, classes=4, size=14):
    labels = torch.arange(n) % classes
    return (0.2 * torch.rand(n, 1, size, size) + labels[:, None, None, None] / classes * 0.8).clamp(
        0, 1
    ), labels


def test_import_is_light():
    code = (
        'import sys, restore_lib.transfer; '
        'sys.exit(any(m in sys.modules for m in ("timm", "torchvision", "accelerate")))'
    )
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


# labels and augmentation --------------------------------------------------------------------------


def test_few_labels_counts_nesting_and_seed():
    labels = torch.randint(0, 5, (400,))
    five, nine = few_labels(labels, 5, seed=3), few_labels(labels, 9, seed=3)
    assert (
        labels[five].bincount().tolist() == [5] * 5 and labels[nine].bincount().tolist() == [9] * 5
    )
    assert set(five.tolist()) < set(nine.tolist()) and len(set(nine.tolist())) == 45
    assert torch.equal(five, few_labels(labels, 5, seed=3)) and not torch.equal(
        five, few_labels(labels, 5, seed=4)
    )
    assert torch.equal(few_labels(labels, None), torch.arange(400))


@pytest.mark.parametrize(
    'labels, n, classes, says',
    [
        (torch.tensor([0, 0, 2, 2]), 1, None, 'class 1 has 0'),
        (torch.tensor([0, 1, 1]), 2, None, 'class 0 has 1'),
        (torch.tensor([0, 1]), None, 3, 'class 2 has 0'),
        (torch.tensor([0, 1]), 0, None, 'per_class is 0'),
        (torch.tensor([0, 5]), 1, 3, 'reaches from 0 to 5'),
        (torch.tensor([-1, 1]), 1, None, 'reaches from -1'),
    ],
)
def test_few_labels_bad(labels, n, classes, says):
    with pytest.raises(ValueError, match=says):
        few_labels(labels, n, classes)


@pytest.mark.parametrize('channels', [1, 3])
def test_augmentations_keep_shape_and_range(channels):
    x = torch.rand(channels, 28, 28)
    for make in (weak_augment, strong_augment):
        for flip in (False, True):
            out = torch.stack([make(20, flip=flip)(x) for _ in range(20)])
            assert (
                out.shape == (20, channels, 20, 20)
                and out.dtype == torch.float32
                and 0 <= out.min()
                and out.max() <= 1
                and len(out.unique(dim=0)) > 10
            )


def test_digits_are_never_mirrored_unless_asked():
    x = torch.zeros(1, 16, 16)
    x[..., :8] = 1  # bright on the left
    left = lambda make: [
        bool(im[..., :8].mean() > im[..., 8:].mean()) for im in (make(x) for _ in range(40))
    ]
    assert all(left(weak_augment(16, scale=(0.9, 1.0)))) and not all(
        left(weak_augment(16, True, scale=(0.9, 1.0)))
    )


@pytest.mark.parametrize(
    'call, says',
    [
        (lambda: strong_augment(8, erase=-0.1), 'erase'),
        (lambda: weak_augment(8, scale=(0.9, 0.5)), 'scale'),
        (lambda: weak_augment(8, scale=(0.5, 1.5)), 'scale'),
        (
            lambda: labelled(torch.rand(4, 1, 8, 8), torch.zeros(3, dtype=torch.int64), 2),
            'images holds 4, labels 3',
        ),
        (lambda: labelled(torch.rand(2, 1, 8, 8), torch.tensor([0, 2]), 2), 'expected 0 to 1'),
        (lambda: mixer(10, -1), 'mixup is -1'),
    ],
)
def test_bad_data(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_labels_must_be_int64():
    with pytest.raises(TypeError, match='float32'):
        labelled(torch.rand(2, 1, 8, 8), torch.zeros(2), 2)
    with pytest.raises(TypeError, match='uint8'):
        labelled(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), 2)


def test_a_handful_of_labels_fills_batches():
    batches = list(labelled(torch.rand(5, 1, 8, 8), torch.arange(5), 5, batch=16))
    assert len(batches) == 8 and all(len(b[0]) == 16 for b in batches)


# the loss -----------------------------------------------------------------------------------------


def test_losses_equal_timm():
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    z, t = torch.randn(6, 5, dtype=torch.double), torch.randint(0, 5, (6,))
    p = torch.rand(6, 5, dtype=torch.double).softmax(1)
    assert torch.allclose(soft_cross_entropy(z, t, 0.1), LabelSmoothingCrossEntropy(0.1)(z, t))
    assert torch.allclose(soft_cross_entropy(z, p), SoftTargetCrossEntropy()(z, p))


@pytest.mark.parametrize(
    'targets, s, says',
    [
        (torch.tensor([0, 5]), 0, 'targets reaches'),
        (torch.rand(2, 4), 0, 'targets has shape'),
        (torch.tensor([0, 1]), 1.0, 'smoothing'),
    ],
)
def test_loss_bad(targets, s, says):
    with pytest.raises(ValueError, match=says):
        soft_cross_entropy(torch.randn(2, 5), targets, s)


@pytest.mark.parametrize('mixup, cutmix', [(0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_mixer_gives_probabilities_that_match_the_pixels(mixup, cutmix):
    x, labels = torch.arange(4.0)[:, None, None, None].expand(4, 1, 16, 16) / 4, torch.arange(4)
    for _ in range(5):
        imgs, p = mixer(4, mixup, cutmix)(x, labels)
        assert torch.allclose(p.sum(1), torch.ones(4)) and torch.allclose(
            imgs.mean((1, 2, 3)), p @ (torch.arange(4.0) / 4), atol=1e-5
        )
    same = mixer(4, 0, 0)(x, labels)
    assert same[0] is x and same[1] is labels


# the classifier -----------------------------------------------------------------------------------


@pytest.mark.parametrize('pool', ['mean', 'cls'])
def test_parity_with_timm(pool):
    from timm.models.vision_transformer import VisionTransformer

    model = Classifier(encoder(28, 32, 3), 10, pool=pool).eval()
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.encoder.cls_token)
    timm = VisionTransformer(
        28, 7, 1, 10, 'avg' if pool == 'mean' else 'token', 32, 3, 4, fc_norm=pool == 'mean'
    ).eval()
    state = {
        k.replace('encoder.', '').replace('patch_embed', 'patch_embed.proj'): v
        for k, v in model.state_dict().items()
        if k not in ('mean', 'std')
    }
    state['patch_embed.proj.weight'] = (
        state['patch_embed.proj.weight'].reshape(32, 7, 7, 1).permute(0, 3, 1, 2)
    )
    timm.load_state_dict(state)
    x = torch.rand(3, 1, 28, 28)
    assert (model(x) - timm((x - 0.5) / 0.5)).abs().max() < 1e-5


def test_head_shapes_and_starts():
    heads = {h: Classifier(encoder(), 5, h) for h in ('linear', 'bn', 'bn_mlp')}
    assert (
        not list(heads['bn'].head[0].parameters())
        and sum(isinstance(m, nn.Linear) for m in heads['bn_mlp'].head) == 2
    )
    assert isinstance(heads['linear'].fc_norm, nn.LayerNorm) and isinstance(
        heads['linear'].encoder.norm, nn.Identity
    )
    assert isinstance(heads['bn'].encoder.norm, nn.LayerNorm) and isinstance(
        heads['bn'].fc_norm, nn.Identity
    )
    assert heads['linear'](torch.rand(4, 1, 14, 14)).abs().max() < 1e-2
    assert 0.005 < heads['bn'].head[1].weight.std() < 0.02


@pytest.mark.parametrize(
    'kw, says', [(dict(head='mlp'), "head is 'mlp'"), (dict(pool='max'), "pool is 'max'")]
)
def test_classifier_bad(kw, says):
    with pytest.raises(ValueError, match=says):
        Classifier(encoder(), 5, **kw)
    with pytest.raises(ValueError, match='no class token'):
        Classifier(encoder(cls_token=False), 5, pool='cls')


@pytest.mark.parametrize('head', ['bn', 'bn_mlp'])
def test_one_image_and_batchnorm(head):
    model, x = Classifier(encoder(), 5, head), torch.rand(1, 1, 14, 14)
    with pytest.raises(ValueError, match='at least two'):
        model(x)
    assert model.eval()(x).shape == (1, 5)


def test_load_encoder_copies_all_but_the_head():
    mae, model = tiny(), Classifier(encoder(), 5)
    report = load_encoder(model, mae)
    assert set(report.missing) == {
        'fc_norm.weight',
        'fc_norm.bias',
        'head.weight',
        'head.bias',
    } and set(report.extra) == {'encoder.norm.weight', 'encoder.norm.bias'}
    x = torch.rand(2, 1, 14, 14)
    model.fc_norm, model.head = mae.encoder.norm, nn.Identity()
    blocks = mae.encoder
    blocks_norm, blocks.norm = blocks.norm, nn.Identity()
    assert torch.allclose(
        model(x), blocks_norm(blocks((x - 0.5) / 0.5)[0][:, 1:].mean(1)), atol=1e-6
    )


def test_load_encoder_interpolates_and_leaves_the_source_alone():
    mae = tiny()
    before, model = mae.encoder.pos_embed.clone(), Classifier(encoder_like(mae, (21, 28)), 5, 'bn')
    assert set(load_encoder(model, mae).missing) == {
        k for k in model.state_dict() if k.startswith('head')
    }
    assert torch.equal(
        model.encoder.pos_embed, interpolate_pos_embed(before, (2, 2), (3, 4), extra=1)
    ) and torch.equal(mae.encoder.pos_embed, before)
    assert not torch.allclose(
        model.encoder.pos_embed, sincos_pos_embed(32, (3, 4), True)[None]
    ) and model(torch.rand(2, 1, 21, 28)).shape == (2, 5)


@pytest.mark.parametrize(
    'kw',
    [
        dict(dim=64),
        dict(depth=3),
        dict(depth=1),
        dict(channels=3),
        dict(patch=2),
        dict(cls_token=False),
    ],
)
def test_load_encoder_of_another_size(kw):
    model = Classifier(encoder(**kw), 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match='another size|patches of'):
        load_encoder(model, tiny())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_encoder_like():
    source = encoder(28, 64, 3, 3)
    like = encoder_like(source, drop_path=0.2)
    assert {k: v.shape for k, v in like.state_dict().items()} == {
        k: v.shape for k, v in source.state_dict().items()
    }
    assert [b.drop_path.p for b in like.blocks] == [0, 0.1, 0.2] and not torch.equal(
        like.patch_embed.weight, source.patch_embed.weight
    )
    with pytest.raises(ValueError, match='pad it to'):
        encoder_like(source, 30)


# training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('depth, decay', [(2, 0.5), (3, 0.75), (3, 1.0)])
def test_rates_by_depth_are_the_references(depth, decay):
    model = Classifier(encoder(depth=depth), 4)
    learn = finetune(
        model, labelled(*toy(), 4, batch=8), blr=0.32, layer_decay=decay, weight_decay=0.1
    )
    name, seen = {id(p): k for k, p in model.named_parameters()}, set()
    for g, rate in zip(learn.opt.param_groups, learn.rates):
        for p in g['params']:
            k = name[id(p)]
            layer = (
                0
                if 'cls_token' in k or 'patch_embed' in k
                else int(k.split('.')[2]) + 1
                if 'blocks' in k
                else depth + 1
            )
            assert rate == pytest.approx(0.01 * decay ** (depth + 1 - layer)) and g[
                'weight_decay'
            ] == (0.1 if p.ndim > 1 else 0)
            seen.add(k)
    assert seen == set(dict(model.named_parameters()))


def test_finetune_learns_and_validation_is_plain():
    x, labels = toy()
    model = Classifier(encoder(), 4)
    start = soft_cross_entropy(predict(model, x), labels).item()
    learn = finetune(
        model, labelled(x, labels, 4, batch=16), [(x, labels)], blr=0.03, layer_decay=1.0
    ).fit(60)
    out = predict(learn.bare, x)
    assert (
        learn.metrics['valid_loss']
        == pytest.approx(soft_cross_entropy(out, labels).item(), abs=1e-5)
        and learn.metrics['valid_loss'] < 0.6 * start
    )
    assert topk_accuracy(out, labels) > 0.7


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(layer_decay=0), 'layer_decay'),
        (dict(layer_decay=1.1), 'layer_decay'),
        (dict(smoothing=1), 'smoothing'),
        (dict(cutmix=-1), 'cutmix'),
    ],
)
def test_finetune_bad(kw, says):
    with pytest.raises(ValueError, match=says):
        finetune(Classifier(encoder(), 4), labelled(*toy(), 4), **kw)


def test_probe_trains_the_head_and_nothing_else():
    x, labels = toy()
    model = Classifier(encoder(drop_path=0.5), 4, 'bn')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    learn = linear_probe(model, labelled(x, labels, 4, batch=16), blr=1000).fit(60)
    model.train()
    assert (
        not any(m.training for m in model.encoder.modules())
        and model.head.training
        and all(p.grad is None for p in model.encoder.parameters())
    )
    moved = {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}
    assert moved == {
        'head.0.running_mean',
        'head.0.running_var',
        'head.0.num_batches_tracked',
        'head.1.weight',
        'head.1.bias',
    }
    assert (
        topk_accuracy(predict(learn.bare, x), labels) > 0.7
        and type(learn.opt.optimizer).__name__ == 'Lars'
    )


@pytest.mark.parametrize('decay', [0.0, 0.01])
def test_lars_against_the_formula(decay):
    w, b = torch.randn(4, 3, dtype=torch.double), torch.randn(4, dtype=torch.double)
    p = [
        nn.Parameter(w.clone()),
        nn.Parameter(b.clone()),
        nn.Parameter(torch.zeros(2, 2, dtype=torch.double)),
    ]
    opt, m, n = lars(p, lr=2.0, momentum=0.8, weight_decay=decay, trust=0.02), 0, 0
    for k in range(5):
        grads = [torch.randn_like(q) for q in p]
        for q, g in zip(p, grads):
            q.grad = g.clone()
        opt.step()
        g = (
            0.02 * w.norm() / (grads[0].norm() + decay * w.norm()) * (grads[0] + decay * w)
        )  # the paper's denominator; MAE's code: (g + decay*w).norm()
        m, n = 0.8 * m + g, 0.8 * n + grads[1]
        w, b = w - 2 * m, b - 2 * n
        if k == 0:
            assert torch.allclose(p[2], -2 * grads[2])  # a matrix of zeros is not scaled
        assert torch.allclose(p[0], w, atol=1e-6) and torch.allclose(p[1], b)


@pytest.mark.parametrize('head', ['linear', 'bn', 'bn_mlp'])
def test_probe_of_each_head_groups_matrices_apart(head):
    learn = linear_probe(Classifier(encoder(), 4, head), labelled(*toy(), 4, batch=8))
    assert all(
        (p.ndim > 1) == g['always_adapt'] and g['weight_decay'] == 0
        for g in learn.opt.param_groups
        for p in g['params']
    )


# answers ------------------------------------------------------------------------------------------


def test_predict_restores_modes_and_does_not_depend_on_the_batch():
    model, x = Classifier(encoder(drop_path=0.5), 4, 'bn_mlp'), torch.rand(7, 1, 14, 14)
    model.encoder.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    out = predict(model, x, batch=3)
    assert modes == [m.training for m in model.modules()] and not out.requires_grad
    assert torch.allclose(out, model.eval()(x), atol=1e-6)


def test_topk_equals_sklearn():
    from sklearn.metrics import top_k_accuracy_score

    z, t = torch.randn(200, 6), torch.randint(0, 6, (200,))
    for k in (1, 2, 5):
        assert topk_accuracy(z, t, k) == pytest.approx(
            top_k_accuracy_score(t, z, k=k, labels=range(6))
        )
    assert topk_accuracy(z, t, 6) == 1 and topk_correct(z, t).shape == (200,)


@pytest.mark.parametrize(
    'z, t, k, says',
    [
        (torch.randn(3, 4), torch.tensor([0, 1, 4]), 1, 'reaches from 0 to 4'),
        (torch.randn(3, 4), torch.tensor([0, 1, 2]), 5, 'k is 5'),
        (torch.randn(3, 4), torch.tensor([0, 1, 2]), 0, 'k is 0'),
        (torch.full((3, 4), float('nan')), torch.tensor([0, 1, 2]), 1, 'NaN'),
        (torch.randn(3, 4), torch.tensor([0]), 1, 'as many'),
    ],
)
def test_topk_bad(z, t, k, says):
    with pytest.raises(ValueError, match=says):
        topk_correct(z, t, k)


@pytest.mark.parametrize('device', DEVICES)
def test_knn_equals_loops_and_sklearn(device):
    from sklearn.neighbors import KNeighborsClassifier

    a, t, b = (
        torch.randn(50, 8, device=device),
        torch.randint(0, 5, (50,), device=device),
        torch.randn(9, 8, device=device),
    )
    votes, cos = torch.zeros(9, 5), (F.normalize(b, dim=1) @ F.normalize(a, dim=1).T).cpu()
    for i in range(9):
        for j in cos[i].argsort(descending=True)[:7].tolist():
            votes[i, t[j]] += (cos[i, j] / 0.1).exp()
    out = knn_probe(a, t, b, k=7, temperature=0.1, classes=5).cpu()
    assert torch.allclose(out, votes / votes.sum(1, keepdim=True), atol=1e-5)
    theirs = KNeighborsClassifier(7, metric='cosine').fit(a.cpu(), t.cpu()).predict_proba(b.cpu())
    assert torch.allclose(
        knn_probe(a, t, b, k=7, temperature=None, classes=5).cpu(),
        torch.tensor(theirs).float(),
        atol=1e-6,
    )


def test_knn_survives_a_tiny_temperature():
    a = F.normalize(torch.randn(30, 8), dim=1)
    assert torch.equal(
        knn_probe(a, torch.arange(30) % 3, a, k=5, temperature=1e-4).argmax(1), torch.arange(30) % 3
    )


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(k=0), 'k is 0'),
        (dict(k=9), 'k is 9'),
        (dict(temperature=0), 'temperature'),
        (dict(classes=2), 'train_labels'),
    ],
)
def test_knn_bad(kw, says):
    with pytest.raises(ValueError, match=says):
        knn_probe(
            torch.randn(8, 4), torch.arange(8) % 3, torch.randn(2, 4), **dict(dict(k=3), **kw)
        )


@pytest.mark.parametrize('device', DEVICES)
def test_training_step_on_device(device):
    x, labels = toy()
    for head, f in (('linear', finetune), ('bn', linear_probe)):
        learn = f(
            Classifier(encoder(), 4, head),
            labelled(x, labels, 4, strong_augment(14), batch=8),
            cpu=device == 'cpu',
        ).fit(2)
        assert predict(learn.bare, x).shape == (40, 4) and str(
            next(learn.bare.parameters()).device
        ).startswith(device)


@pytest.mark.parametrize('source', ['mnist', 'cifar10_4k'])
def test_real_pictures_go_through(real, source):
    from restore_lib.data import cifar10, digits

    real(source)
    x, labels = digits(64, source='mnist') if source == 'mnist' else cifar10(64, source='tiles')
    size = x.shape[-1]
    model = Classifier(ViTEncoder(size, 4, 16, 1, 2, x.shape[1]), 10)
    assert topk_correct(
        predict(
            finetune(model, labelled(x, labels, 10, strong_augment(size), batch=8)).fit(2).bare, x
        ),
        labels,
        5,
    ).shape == (64,)


def test_a_classifier_takes_the_pixels_and_heads_of_its_source_and_leaves_it_whole():
    from restore_lib.mae import features

    mae, x = (
        mae_tiny(28, 7, channels=1, dim=64, depth=2, mean=0.13, std=0.3),
        torch.rand(4, 1, 28, 28),
    )
    before = features(mae, x)
    model = Classifier(encoder_like(mae), 10, 'bn')
    load_encoder(model, mae)
    assert torch.equal(model.mean, mae.mean) and torch.equal(model.std, mae.std)
    Classifier(mae.encoder, 10)
    assert torch.equal(features(mae, x), before)
    with pytest.raises(ValueError, match='heads'):
        load_encoder(Classifier(ViTEncoder(28, 7, 64, 2, 8, channels=1), 10), mae)


def test_finetune_refuses_a_model_that_a_probe_froze():
    mae = mae_tiny(28, 7, channels=1, dim=64, depth=2)
    model = Classifier(encoder_like(mae), 10, 'bn').freeze()
    with pytest.raises(ValueError, match='frozen'):
        finetune(model, labelled(torch.rand(20, 1, 28, 28), torch.arange(20) % 10, 10, batch=4))


# a saved model comes back as the same function ----------------------------------------------------

STATS = dict(mean=(0.4, 0.5, 0.6), std=(0.1, 0.3, 0.25))


@pytest.mark.parametrize('head', ['linear', 'bn', 'bn_mlp'])
def test_a_loaded_classifier_is_the_same_function(head):
    model, other, x = (
        Classifier(encoder(channels=3), 5, head, **STATS).eval(),
        Classifier(encoder(channels=3), 5, head).eval(),
        torch.rand(6, 3, 14, 14),
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    assert str(other.load_state_dict(model.state_dict())) == '<All keys matched successfully>'
    assert torch.equal(model(x), other(x)) and model(x).std() > 0.01
    without = {k: v for k, v in model.state_dict().items() if k not in ('mean', 'std')}
    with pytest.raises(RuntimeError, match='Missing.*mean.*std'):
        Classifier(encoder(channels=3), 5, head).load_state_dict(without)


def test_a_classifier_made_of_a_mae_has_its_statistics():
    mae, x = tiny(channels=3, **STATS), torch.rand(4, 3, 14, 14)
    model, by_hand = Classifier(mae, 5), Classifier(mae.encoder, 5, **STATS)
    by_hand.load_state_dict(model.state_dict())
    assert torch.equal(model.mean, mae.mean) and torch.equal(model.std, mae.std)
    assert torch.equal(model.eval()(x), by_hand.eval()(x)) and model.encoder is not mae.encoder
    model.mean.zero_()
    assert mae.mean.all() and Classifier(mae, 5, mean=0.1).mean.flatten().tolist() == pytest.approx(
        [0.1]
    )
    assert Classifier(mae.encoder, 5).mean.flatten().tolist() == [
        0.5
    ]  # a bare encoder does not know


def test_load_encoder_carries_and_reports_the_statistics():
    mae, model = tiny(channels=3, **STATS), Classifier(encoder(channels=3), 5)
    report = load_encoder(model, mae)
    assert (
        {'mean', 'std'} <= set(report.copied)
        and torch.equal(model.std, mae.std)
        and model.mean.data_ptr() != mae.mean.data_ptr()
    )
    report = load_encoder(model, mae.encoder)  # it has none: what was there stays, and is named
    assert {'mean', 'std'} <= set(report.missing) and torch.equal(model.std, mae.std)


def test_a_grey_image_is_not_spread_over_the_channels_of_mean():
    model = Classifier(encoder(channels=3), 5, **STATS)
    for channels in (1, 2, 5):
        with pytest.raises(ValueError, match=f'x has {channels} channels'):
            model(torch.rand(2, channels, 14, 14))


# numbers ------------------------------------------------------------------------------------------


def test_numbers_from_numpy():
    labels = torch.randint(0, 5, (400,))
    assert torch.equal(
        few_labels(labels, np.int64(5), np.int64(5), np.int64(3)), few_labels(labels, 5, 5, 3)
    )
    assert torch.equal(few_labels(labels, 5, seed=np.int32(4)), few_labels(labels, 5, seed=4))
    logits = torch.randn(20, 5)
    assert topk_accuracy(logits, labels[:20], np.int64(2)) == topk_accuracy(logits, labels[:20], 2)
    train, test = torch.randn(20, 8), torch.randn(5, 8)
    assert torch.equal(
        knn_probe(train, labels[:20], test, np.int64(3), np.float32(0.5), np.int64(5)),
        knn_probe(train, labels[:20], test, 3, 0.5, 5),
    )
    assert torch.equal(
        soft_cross_entropy(logits, labels[:20], np.float64(0.25)),
        soft_cross_entropy(logits, labels[:20], 0.25),
    )
    x, labels = toy()
    model = Classifier(encoder(), np.int64(4))
    assert type(model.classes) is int and torch.equal(
        predict(model, x, np.int64(7)), predict(model, x, 7)
    )
    assert len(next(iter(labelled(x, labels, np.int64(4), batch=np.int64(8))))[0]) == 8
    assert weak_augment(np.int64(20), scale=(np.float32(0.7), np.int64(1)))(x[0]).shape == (
        1,
        20,
        20,
    ) and strong_augment(np.int64(20), ops=np.int64(1), magnitude=np.int64(3))(x[0]).shape == (
        1,
        20,
        20,
    )


def probe(**kw):
    return linear_probe(Classifier(encoder(), 4, 'bn'), labelled(*toy(), 4, batch=8), **kw)


def tune(**kw):
    return finetune(Classifier(encoder(), 4), labelled(*toy(), 4, batch=8), **kw)


NAN = float('nan')


@pytest.mark.parametrize(
    'call, says',
    [
        (lambda: few_labels(torch.arange(4) % 2, 1.5), 'per_class is 1.5'),
        (lambda: few_labels(torch.arange(4) % 2, NAN), 'per_class is nan'),
        (lambda: few_labels(torch.arange(4) % 2, 1, seed=0.5), 'seed is 0.5'),
        (lambda: few_labels(torch.zeros(0, dtype=torch.int64), 1), 'labels holds none'),
        (lambda: few_labels(torch.arange(4) % 2, 1, classes=0), 'classes is 0'),
        (
            lambda: knn_probe(
                torch.randn(4, 2), torch.tensor([0, 1, 0, 1, 1, 0]), torch.randn(2, 2), 3
            ),
            'train_features holds 4, train_labels 6',
        ),
        (
            lambda: knn_probe(
                torch.full((4, 2), NAN), torch.tensor([0, 1, 0, 1]), torch.randn(2, 2), 3
            ),
            'NaN',
        ),
        (
            lambda: knn_probe(
                torch.randn(4, 2), torch.tensor([0, 1, 0, 1]), torch.full((2, 2), NAN), 3
            ),
            'NaN',
        ),
        (
            lambda: knn_probe(
                torch.randn(4, 2), torch.tensor([0, 1, 0, 1]), torch.randn(2, 2), 3, NAN
            ),
            'temperature is nan',
        ),
        (
            lambda: knn_probe(
                torch.randn(4, 2), torch.tensor([0, 1, 0, 1]), torch.randn(2, 2), 2.5
            ),
            'k is 2.5',
        ),
        (
            lambda: soft_cross_entropy(torch.zeros(2, 2), torch.tensor([[1.5, -0.5], [0.5, 0.5]])),
            'targets holds no probabilities',
        ),
        (
            lambda: soft_cross_entropy(torch.zeros(2, 2), torch.tensor([[0.5, 0.2], [0.5, 0.5]])),
            'targets holds no probabilities',
        ),
        (
            lambda: soft_cross_entropy(torch.zeros(2, 2), torch.tensor([[NAN, NAN], [0.5, 0.5]])),
            'targets holds no probabilities',
        ),
        (
            lambda: soft_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1, 2])),
            r'targets has shape \(3,\)',
        ),
        (
            lambda: soft_cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
            'logits holds no image',
        ),
        (
            lambda: topk_accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
            'logits holds no image',
        ),
        (lambda: mixer(4, NAN), 'mixup is nan'),
        (lambda: mixer(4, 0.8, NAN), 'cutmix is nan'),
        (lambda: mixer(0), 'classes is 0'),
        (lambda: tune(mixup=-1), 'mixup is -1'),
        (lambda: tune(cutmix=NAN), 'cutmix is nan'),
        (lambda: tune(smoothing=1), 'smoothing is 1'),
        (lambda: tune(smoothing=NAN), 'smoothing is nan'),
        (lambda: tune(blr=-1), 'blr is -1'),
        (lambda: tune(blr=NAN), 'blr is nan'),
        (lambda: tune(layer_decay=NAN), 'layer_decay is nan'),
        (lambda: tune(weight_decay=-1), 'weight_decay is -1'),
        (lambda: tune(warmup=NAN), 'warmup is nan'),
        (lambda: probe(blr=NAN), 'blr is nan'),
        (lambda: probe(warmup=-0.1), 'warmup is -0.1'),
        (lambda: lars([torch.zeros(2, requires_grad=True)], NAN), 'lr is nan'),
        (lambda: lars([torch.zeros(2, requires_grad=True)], 1, momentum=1.5), 'momentum is 1.5'),
        (lambda: weak_augment(20, scale=(0.7, 1.5)), 'scale is'),
        (lambda: weak_augment(20, scale=(NAN, 1)), 'scale is'),
        (lambda: strong_augment(20, erase=NAN), 'erase is nan'),
        (lambda: strong_augment(20, magnitude=50), 'magnitude is 50'),
        (lambda: labelled(*toy(), 4, batch=0), 'batch is 0'),
        (
            lambda: labelled(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64), 4),
            'at least one image',
        ),
        (lambda: predict(Classifier(encoder(), 4), toy()[0], 0), 'batch is 0'),
        (lambda: Classifier(encoder(), 0), 'classes is 0'),
        (lambda: Classifier(encoder(), 4, std=0), 'std is 0'),
    ],
)
def test_numbers_out_of_range(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_a_wrong_rate_freezes_nothing():
    model = Classifier(encoder(), 4, 'bn')
    with pytest.raises(ValueError, match='blr'):
        linear_probe(model, labelled(*toy(), 4, batch=8), blr=-1)
    assert not model.frozen and all(p.requires_grad for p in model.parameters())


def test_soft_targets_in_half_precision():
    logits, p = torch.randn(64, 10), torch.rand(64, 10).softmax(1)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.isfinite(soft_cross_entropy(logits.to(dtype), p.to(dtype)))


def test_predict_gives_the_model_a_copy():
    x = torch.rand(5, 1, 14, 14) - 0.5
    before = x.clone()
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(196, 3))
    assert torch.equal(predict(model, x), model(before.clone())) and torch.equal(x, before)


def test_the_loss_of_finetuning_holds_plain_numbers():
    "A run is known by what its loss function captures."
    held = {
        k: c.cell_contents
        for k, c in zip(tune().loss_fn.__code__.co_freevars, tune().loss_fn.__closure__)
    }
    assert held == dict(classes=4, mixup=0.8, cutmix=1.0, smoothing=0.1)


# a folder of images, as ImageNet is one -----------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    "Two classes of photographs of several sizes; blue ones and red ones."
    from torchvision.utils import save_image

    for k in range(12):
        x = 0.3 * torch.rand(3, 20 + k, 40 - k)
        x[2 * (k % 2)] += 0.6
        path = tmp_path / ('red', 'blue')[k % 2] / f'{k}.png'
        path.parent.mkdir(exist_ok=True)
        save_image(x, path)
    return ImageFolder(tmp_path)


def test_a_folder_streams_through_pretraining_finetuning_probe_and_test(folder):
    train = labelled(folder, transform=weak_augment(14, True, (0.2, 1.0)), batch=4)
    mae = mae_tiny(14, 7, dim=16, depth=1)
    pretrainer(mae, train).fit(2)
    hard = labelled(folder, transform=strong_augment(14, True, (0.08, 1.0)), batch=4)
    for f, loader, head in ((finetune, hard, 'linear'), (linear_probe, train, 'bn')):
        model = Classifier(encoder_like(mae), 2, head)
        load_encoder(model, mae)
        learn = f(model, loader).fit(2)
        test = labelled(folder, transform=plain_view(14), batch=5, shuffle=False)
        logits = predict(learn.bare, test)
        assert logits.shape == (12, 2)
        x = torch.stack([plain_view(14)(folder[i]) for i in range(12)])
        assert torch.allclose(logits, predict(learn.bare, x), atol=1e-6)
        topk_accuracy(logits, test.dataset.labels)


def test_a_folder_is_learned(folder):
    torch.manual_seed(0)
    model = Classifier(ViTEncoder(14, 7, 16, 1, 2), 2)
    train = labelled(folder, transform=weak_augment(14, True), batch=8)
    learn = finetune(model, train, blr=0.3, layer_decay=1.0, mixup=0.8).fit(25)
    test = labelled(folder, transform=plain_view(14), shuffle=False)
    assert topk_accuracy(predict(learn.bare, test), test.dataset.labels) == 1


def test_a_folder_is_read_when_asked_for_and_in_workers(folder, monkeypatch):
    read = []
    monkeypatch.setattr(
        ImageFolder, '__getitem__', lambda self, i: read.append(i) or torch.rand(3, 9, 9)
    )
    loader = labelled(folder, transform=weak_augment(8), batch=4)
    assert not read and loader.dataset.classes == 2
    next(iter(loader))
    assert len(read) == 4
    batches = list(labelled(folder, transform=plain_view(8), batch=4, shuffle=False, workers=2))
    assert torch.cat([labels for _, labels in batches]).tolist() == folder.labels


def test_a_folder_that_cannot_serve(folder, tmp_path):
    with pytest.raises(ValueError, match='transform is None; images of a folder differ in size'):
        labelled(folder)
    with pytest.raises(ValueError, match='images holds 12, labels 11'):
        Labelled(folder, torch.zeros(11, dtype=torch.int64), 2, plain_view(8))
    with pytest.raises(ValueError, match='expected 0 to 0'):
        labelled(folder, classes=1, transform=plain_view(8))
    (tmp_path / 'red' / '0.png').rename(tmp_path / 'loose.png')
    with pytest.raises(ValueError, match='reaches from -1'):  # it lies in no class
        labelled(ImageFolder(tmp_path), transform=plain_view(8))


def test_predict_refuses_a_loader_that_shuffles():
    x, labels = toy()
    with pytest.raises(ValueError, match='shuffle=False'):
        predict(Classifier(encoder(), 4), labelled(x, labels, 4))


@pytest.mark.parametrize('make', [weak_augment, strong_augment, plain_view])
def test_bicubic_resizing_stays_between_0_and_1(make):
    x = (torch.rand(3, 40, 30) > 0.5).float()
    out = torch.stack([make(50)(x) for _ in range(10)])
    assert out.shape == (10, 3, 50, 50) and 0 <= out.min() and out.max() <= 1


def test_augmentations_are_those_of_torchvision_with_the_numbers_asked_for():
    crop, _, flip = weak_augment(224, True, (0.2, 1.0)).transforms
    assert type(crop).__name__ == 'RandomResizedCrop' and crop.size == (224, 224)
    assert crop.interpolation.value == 'bicubic' and crop.scale == (0.2, 1.0)
    assert type(flip).__name__ == 'RandomHorizontalFlip' and flip.p == 0.5
    weak, ops, erase = strong_augment(224, True, (0.08, 1.0), 2, 9, 0.25).transforms
    assert [type(t).__name__ for t in weak.transforms] == [
        type(t).__name__ for t in weak_augment(224, True).transforms
    ] and weak.transforms[0].scale == (0.08, 1.0)
    assert type(ops).__name__ == 'RandAugment' and (ops.num_ops, ops.magnitude) == (2, 9)
    assert type(erase).__name__ == 'RandomErasing' and erase.p == 0.25


def test_a_folder_is_mixed_when_it_is_finetuned(folder, monkeypatch):
    from restore_lib import transfer

    seen = []
    monkeypatch.setattr(
        transfer,
        'soft_cross_entropy',
        lambda z, t, s=0.0: seen.append((t, s)) or soft_cross_entropy(z, t, s),
    )
    train = labelled(folder, transform=strong_augment(14, True, (0.08, 1.0)), batch=4)
    finetune(Classifier(ViTEncoder(14, 7, 16, 1, 2), 2), train).fit(2)
    for targets, smoothing in seen:  # probabilities, blended; smoothed by the loss
        assert targets.shape == (4, 2) and smoothing == 0.1
        assert torch.allclose(targets.sum(1), torch.ones(4))


# what no shape tells ------------------------------------------------------------------------------


def test_a_state_of_another_pooling_or_other_heads_is_refused():
    def made(pool='mean', heads=4):
        return Classifier(ViTEncoder(14, 7, 32, 2, heads, 1), 5, 'bn', pool)

    state = made().state_dict()
    made().load_state_dict(state)
    for other, says in ((made('cls'), "pool='mean'"), (made(heads=8), r'heads=\[4\]')):
        with pytest.raises(RuntimeError, match=says):
            other.load_state_dict(state)


def test_an_encoder_without_blocks_has_no_likeness():
    with pytest.raises(ValueError, match='source has no block'):
        encoder_like(encoder(depth=0))


def test_depth_groups_names_what_is_wrong():
    model = Classifier(encoder(), 4)
    assert {g['lr'] for g in depth_groups(model, 2.0, 1.0)} == {2.0}
    with pytest.raises(ValueError, match='layer_decay is 0;'):
        depth_groups(model, 1.0, 0)
    with pytest.raises(ValueError, match='weight_decay is -1'):
        depth_groups(model, 1.0, weight_decay=-1)


# the exchange rate of labels ----------------------------------------------------------------------


def coin(share, seeds=3, images=1500):
    g = torch.Generator().manual_seed(int(1e4 * share))
    return (torch.rand(seeds, images, generator=g) < share).float()


def test_labels_equal_follows_the_log():
    measured = {100: 0.7, 10: 0.5}
    assert labels_equal(0.6, measured) == pytest.approx(10**1.5)
    assert labels_equal(0.5, measured) == labels_equal(0.2, measured) == 10
    assert labels_equal(0.7, measured) == 100 and labels_equal(0.71, measured) == float('inf')
    dips = {1: 0.1, 2: 0.5, 4: 0.4, 8: 0.6}  # the first number that does it
    assert labels_equal(0.45, dips) < 2


def test_exchange_rate_finds_the_number_and_its_interval():
    without = {20: coin(0.5), 100: coin(0.6), 800: coin(0.8)}
    r = exchange_rate(coin(0.7), without)
    low, high = r.interval
    assert low < r.labels < high and 100 < low and high < 800
    assert r.labels == pytest.approx(100 * 8**0.5, rel=0.2)


def test_the_interval_covers_seeds_as_well_as_images():
    "Seeds that lie apart widen it; the means, and the mean answer to each image, are the same."
    apart = torch.cat([coin(0.6, 1), coin(0.7, 1), coin(0.8, 1)])
    without = {5: coin(0.3), 20: coin(0.5), 100: coin(0.6), 800: coin(0.8), 6400: coin(0.95)}

    def width(few):
        low, high = exchange_rate(few, without).interval
        return high - low

    assert width(apart) > 2 * width(coin(0.7))


def test_answers_between_follow_the_log():
    measured = {10: torch.tensor([[0.0, 1, 0, 1]]), 1000: torch.tensor([[1.0, 1, 0, 0]])}
    found = answers_between(measured, 2)
    assert [round(n) for n in found] == [10, 100, 1000]
    assert list(found.values())[1].tolist() == [[0.5, 1, 0, 0.5]]
    assert torch.equal(found[1000].float(), measured[1000])


def test_exchange_rate_beyond_what_was_measured():
    without = {20: coin(0.5), 100: coin(0.6)}
    r = exchange_rate(coin(0.9), without)
    assert r.labels == float('inf') and r.interval == (100, float('inf'))
    assert 'more than 100' in r.says
    r = exchange_rate(coin(0.6), without)  # reached, but not told apart at the end
    assert 20 < r.interval[0] < 100 and r.interval[1] == float('inf')
    r = exchange_rate(coin(0.51), without)  # above the fewest labels, but not told apart from them
    assert 20 < r.labels < 100 and r.interval[0] == 0 and r.rows[0]['from'] == '20 or fewer'
    assert not r and r.interval[1] < 100
    r = exchange_rate(coin(0.2), without)  # worse than the fewest labels
    assert r.labels == 20 and r.interval == (0, 20) and r.rows[0]['labels'] == '20 or fewer'
    with pytest.raises(ValueError, match='without holds 1 numbers'):
        exchange_rate(coin(0.6), {20: coin(0.5)})
