"The network of lessons 13 and 14 on photographs, its scores, its file; the toys beside it."

import json

from common import gen
import pytest
import torch

from restore_lib.diffusion import ResidualShift
from restore_lib.metrics import count_params
from restore_lib.model_files import load_model, save_model
from restore_lib.shift_toys import (
    bayes,
    best_for,
    between_steps,
    deviation_made,
    gap_along,
    two_points,
)
from restore_lib.thermal import thermal
from restore_lib.unet import SwinUNet
from restore_lib.unet_costs import by_part, level_shapes, on_meta, unet_macs
from restore_lib.unet_study import (
    UNET,
    UNET_WAYS,
    BandUNet,
    band_sizes,
    bicubic_x4,
    detail_shares,
    errors_at,
    image_scores,
    open_weights,
    restore_x4,
    to_bands,
    to_image,
)

torch.set_num_threads(1)
IMAGES = thermal(3, 64, seed=5)


def small(**kw):
    torch.manual_seed(0)
    return BandUNet(*band_sizes(IMAGES), **UNET | dict(base=8, embed=16) | kw)


def stirred(**kw):
    model = small(**kw)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def test_bands_and_back():
    assert torch.allclose(to_image(to_bands(IMAGES)), IMAGES, atol=1e-5)
    std, res = band_sizes(IMAGES)
    z, r = to_bands(IMAGES), to_bands(IMAGES) - to_bands(bicubic_x4(IMAGES))
    assert torch.allclose(std, z.square().mean((0, 2, 3)).sqrt())
    assert torch.allclose(res, r.square().mean((0, 2, 3)).sqrt())


def test_untrained_it_is_the_best_guess_for_a_normal_residual():
    model, (_, res) = small(), band_sizes(IMAGES)
    process, x, y = model.process(), to_bands(IMAGES), to_bands(bicubic_x4(IMAGES))
    for t in (0, 7, 14):
        ts = torch.full((3,), t)
        p = process.training_pair(x, y, ts, generator=gen(t))
        with torch.no_grad():
            said = model(p.scaled, ts, y)
        want = best_for(process, -res)(p.scaled, ts, y)
        assert torch.allclose(said, want, atol=1e-4)
    blurred = bicubic_x4(IMAGES)
    assert (restore_x4(model, blurred, 1) - blurred).abs().max() < 0.05


def test_at_the_first_step_almost_nothing_is_left_to_say():
    errors = [errors_at(small(), IMAGES, t).mean().item() for t in (0, 7, 14)]
    copy = (to_bands(IMAGES) - to_bands(bicubic_x4(IMAGES))).square().mean().item()
    assert errors[0] < 0.01 * copy and errors[0] < errors[1] < 1.05 * copy


def test_weights_make_every_step_count_alike_before_training():
    model = small()
    x, y = to_bands(IMAGES).repeat(40, 1, 1, 1), to_bands(bicubic_x4(IMAGES)).repeat(40, 1, 1, 1)
    process, w = model.process(), open_weights(model)
    # a normal residual of the right size: then all steps have the same expected loss
    x = y + model.band_res * torch.randn(y.shape, generator=gen())
    with torch.no_grad():
        means = [
            process.loss(model, x, y, torch.full((120,), t), weight=w, generator=gen(t)).mean
            for t in (0, 4, 9, 14)
        ]
    assert max(means) / min(means) < 1.1


def test_noise_in_bicubics_place_is_not_right_detail():
    y = bicubic_x4(IMAGES)
    lost = to_bands(IMAGES)[:, 1:].square().sum() - to_bands(y)[:, 1:].square().sum()
    level = (lost / to_bands(IMAGES)[:, 1:].numel()).sqrt() / 2  # of images in [0, 1]
    loud = y + level * torch.randn(y.shape, generator=gen())
    plain, noisy = (image_scores(v, IMAGES) for v in (y, loud))
    energy = to_bands(loud)[:, 1:].square().sum() / to_bands(IMAGES)[:, 1:].square().sum()
    assert 0.9 < energy < 1.15  # energy alone would call it perfect
    assert (noisy['right'] - plain['right']).abs().max() < 0.1
    assert (noisy['wrong'] > plain['wrong'] + 0.2).all()
    assert (noisy['ST-LPIPS'] > 0.05).all()


def test_shares_of_detail_by_hand():
    perfect = detail_shares(IMAGES, IMAGES)
    assert torch.allclose(perfect['right'], torch.ones(3)) and perfect['wrong'].max() < 1e-3
    flat = detail_shares(torch.full_like(IMAGES, 0.5), IMAGES)
    assert all(v.abs().max() < 1e-5 for v in flat.values())
    half = detail_shares(0.5 + 0.5 * (IMAGES - 0.5), IMAGES)
    assert torch.allclose(half['right'], torch.full((3,), 0.5), atol=1e-4)


@pytest.mark.parametrize('way', UNET_WAYS)
def test_a_file_gives_each_way_back(way, tmp_path):
    a = stirred(**UNET_WAYS[way])
    b, _ = load_model(save_model(a, tmp_path / 'a.safetensors'))
    assert b.told == a.told and a.process().knobs == b.process().knobs
    assert torch.equal(a.band_res, b.band_res)
    assert torch.allclose(errors_at(a, IMAGES, 7), errors_at(b, IMAGES, 7), rtol=0.05)


def test_the_state_of_one_that_is_not_told_is_refused():
    with pytest.raises(RuntimeError, match='told=False, but it is True here'):
        small().load_state_dict(small(told=False).state_dict())


def test_a_network_that_is_not_told_hears_the_same_at_every_step():
    z = torch.randn(2, 16, 16, 16, generator=gen())
    y, t = to_bands(IMAGES[:2]), torch.tensor([3, 3])
    heard = {}
    for told in (False, True):
        model = stirred(told=told)
        answers = []
        model.net.register_forward_hook(lambda *args: answers.append(args[-1]))
        model(z, t, y)
        model(z, t + 9, y)
        heard[told] = torch.equal(*answers)  # the arithmetic around the network knows the step
    assert heard == {False: True, True: False}


def test_an_oracle_is_restored_exactly_in_any_number_of_steps():
    model, x = small(), to_bands(IMAGES)
    for steps in (1, 4, 15):
        out = model.process().sample(lambda z, t, y: x, to_bands(bicubic_x4(IMAGES)), steps)
        assert torch.equal(out, x)


@pytest.mark.parametrize('make', [SwinUNet.paper, lambda: SwinUNet.tiny(6, 3)])
def test_parts_and_places_hold_everything(make):
    model = on_meta(make)
    parts, places = by_part(model, 3, 64), level_shapes(model, 3, 64)
    assert sum(p for p, _ in parts.values()) == count_params(model)
    assert sum(q for _, q in parts.values()) == unet_macs(model, 3, 64)
    rest = parts['time'][1] + parts['resampling'][1]
    assert sum(r['MACs'] for r in places) + rest == unet_macs(model, 3, 64)


def test_toys_know_their_answers():
    process, zeros = ResidualShift(), torch.zeros(4000, 1, 1, 1)
    one = process.sample(two_points(process), zeros, 1, generator=gen())
    many = process.sample(two_points(process), zeros, generator=gen())
    assert one.abs().max() < 0.5 and (many.abs() - 1).abs().median() < 0.01
    assert deviation_made(torch.tensor([2.0]), n=4000)[0] > 0.85
    assert gap_along(process, 4, 1, 4000)[0] < 5
    mean, var = bayes(torch.tensor(0.3), 1.0, -1.0, 0.2, 0.5, 2.0)
    keep = 0.2 / 0.5
    assert abs(mean - (keep * 0.3 + 1 - keep)) < 1e-6 and abs(var - 4 * 0.2 * (1 - keep)) < 1e-6


def test_between_steps_by_hand():
    process, t = ResidualShift(), torch.arange(15).repeat(4)
    loss = process.loss(lambda z, t, y: z, torch.zeros(60, 1, 2, 2), torch.zeros(60, 1, 2, 2), t)
    steps = loss._replace(per_sample=t.float())
    assert abs(between_steps(process, steps) - (14 * 16 / 12) / t.float().var().item()) < 1e-5


def test_what_is_made_of_is_json():
    model = small(told=False)
    made = json.loads(json.dumps(model.made_of()))
    assert BandUNet.from_made(made).made_of() == model.made_of() == made
