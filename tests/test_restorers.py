"What lesson 23 does not teach: levels, trust, sizes, seams, memory, the registry, bad input."

import json
import math
import sys
import types
import warnings
from dataclasses import replace
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch
from common import DEVICES, gen
from torch import nn

from restore_lib import model_files, restorer_scores
from restore_lib.classical import bm3d_filter, nl_means, wavelet_shrinkage
from restore_lib.data import photos
from restore_lib.degrade import gaussian, jpeg, salt_and_pepper
from restore_lib.denoiser import MOST, Denoiser
from restore_lib.dmae import dmae_tiny
from restore_lib.input_signs import BLOCKY, jpeg_blocks, signs
from restore_lib.metrics import psnr
from restore_lib.model_files import load_model, save_model
from restore_lib.records import studies
from restore_lib.restorer_parts import damage_weight, in_windows, runner_of, sample_windows
from restore_lib.restorer_scores import score_denoisers
from restore_lib.restorers import (
    RELIABLE, SURE, Restorer, as_levels, estimate_noise, is_installed, pick_restorer, restorer,
    restorer_of, restorers, trust,
)
from restore_lib.superres import make_sr
from restore_lib.superres_training import SRConfig
from restore_lib.two_stage import TwoStageDMAE
from restore_lib.two_stage_parts import Degradation

pytestmark = pytest.mark.usefixtures('seed')
RECORD = dict(recipe='r', seed=0, data='d', scores={'dB': 1.0}, minutes=1, licence='Apache-2.0')


def silent(note):
    "Nobody listens."


def tiny(channels=1, std=0.01):
    model = Denoiser(channels, (8, 8, 8), 1)
    nn.init.normal_(model.tail.weight, std=std)
    return model.eval()


def expert(level=25):
    "The library's denoiser, told always the same level."
    broad, sigma = restorer('denoise_grey'), level / 255

    def run(y, given=None, progress=False):
        return broad.run(y, torch.full((len(y),), sigma), progress)

    return replace(broad, name='expert', run=run, levels=(sigma, sigma))


@pytest.fixture
def library(tmp_path, monkeypatch):
    "An empty folder of weights; library(name, model, **says) puts some there."
    folder = tmp_path / 'pretrained'
    folder.mkdir()
    monkeypatch.setattr(model_files, 'PRETRAINED', folder)

    def put(name, model, **says):
        return save_model(model, folder / f'{name}.safetensors', **RECORD, **says)

    return put


def as_file(y):
    return (y.clamp(0, 1) * 255).round() / 255


def crop(split='valid', side=128, channels=1):
    images = photos(split, channels).values()
    return torch.stack([x[:, 60:60 + side, 100:100 + side] for x in images])


# how noisy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('sigma', [1, 5, 25, 50])
def test_the_level_of_noise_alone(sigma):
    y = gaussian(torch.full((2, 1, 400, 300), 0.5), sigma / 255, gen())
    assert (255 * estimate_noise(y) / sigma - 1).abs().max() < 0.1


def test_the_level_on_photographs():
    for x in (*photos('train', 1).values(), *photos('valid', 1).values()):
        found = [255 * estimate_noise(as_file(gaussian(x[None], s / 255, gen()))) for s in (25, 50)]
        assert (found[0] / 25 - 1).abs() < 0.1 and (found[1] / 50 - 1).abs() < 0.15
        assert 255 * estimate_noise(x[None]) < 6


def test_dark_and_bright_images_have_noise_too():
    "A file cuts what is below 0: where all of it is dark, the least dark part decides."
    x = crop()[:1]
    for dark in (0.25 * x, 1 - 0.25 * x):
        y = as_file(gaussian(dark, 50 / 255, gen()))
        assert 20 < 255 * estimate_noise(y).item() < 55


def test_levels_of_a_batch_are_those_of_its_images():
    y = gaussian(crop(channels=3), torch.tensor([10, 40]) / 255, gen())
    alone = torch.cat([estimate_noise(v[None]) for v in y])
    assert torch.allclose(estimate_noise(y), alone, atol=1e-5)
    assert torch.allclose(estimate_noise(y.transpose(2, 3)), alone, rtol=0.05)


def test_grey_in_three_channels_has_the_level_of_one():
    y = gaussian(crop(), 25 / 255, gen())
    assert torch.allclose(estimate_noise(y), estimate_noise(y.expand(-1, 3, -1, -1)), atol=1e-6)


@pytest.mark.parametrize('channels', [1, 3])
def test_black_and_white_tells_no_level(channels):
    "Letters in black and white were taken for noise of 50 to 90 of 255."
    dots = (torch.rand(1, channels, 128, 400, generator=gen()) < 0.15).float()
    page = (torch.nn.functional.avg_pool2d(dots, 3, 1, 1) < 0.2).float()
    assert estimate_noise(page).isnan().all()
    grey = 0.1 + 0.8 * page
    assert not estimate_noise(gaussian(grey, 0.02, gen()).clamp(0, 1)).isnan().any()
    red = torch.cat([gaussian(crop()[:1], 0.1, gen()), page[:, :1, :, :128]], 1)
    assert estimate_noise(red).item() == pytest.approx(0.1, rel=0.1)


def test_white_paper_with_noise_has_a_level():
    "Half of the pixels are cut at white."
    y = as_file(gaussian(torch.ones(1, 1, 200, 200), 25 / 255, gen()))
    assert estimate_noise(y).item() > 5 / 255


def test_levels_that_cannot_be_measured():
    assert estimate_noise(torch.rand(2, 1, 31, 400)).isnan().all()
    assert estimate_noise(torch.full((1, 3, 64, 64), 0.3)).abs().max() < 1e-6
    assert estimate_noise(torch.zeros(1, 1, 64, 64)).item() < 1e-6
    with pytest.raises(ValueError, match='y'):
        estimate_noise(torch.full((1, 1, 64, 64), math.nan))


def test_an_estimate_draws_nothing_and_changes_nothing():
    y = torch.rand(1, 1, 64, 64)
    kept, state = y.clone(), torch.get_rng_state()
    estimate_noise(y)
    trust(lambda v: v, y, torch.tensor([0.1]))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(y, kept)


# how far to trust ---------------------------------------------------------------------------------


@pytest.mark.parametrize('share', [0.2, 0.5, 0.8])
def test_trust_finds_the_best_share_of_a_shrinkage(share):
    "f(y) = y/2 of white signals: the best way there is known by hand."
    sigma = 0.1
    signal = math.sqrt(sigma**2 / (share / 2) - sigma**2)
    y = signal * torch.randn(1, 1, 200, 200) + sigma * torch.randn(1, 1, 200, 200)
    found = trust(lambda v: v / 2, y, torch.tensor([sigma])).item()
    counts_as = share if share <= 0.5 else 0.5 + (share - 0.5) / (SURE - 0.5) / 2
    assert found == pytest.approx(counts_as, abs=0.04)


def test_trust_of_what_changes_nothing_and_of_no_level():
    y = torch.rand(2, 1, 40, 40)
    assert trust(lambda v: v, y, torch.tensor([0.1, 0.0])).isfinite().all()
    shares = trust(lambda v: v * 0, y, torch.tensor([0.0, math.nan]))
    assert shares.tolist() == [0, 0]


def test_windows_of_an_image_count_together():
    y = torch.rand(6, 1, 32, 32)
    three = trust(lambda v: v / 2, y, torch.tensor([0.2, 0.3]))
    assert three.shape == (2,)
    y = torch.rand(2, 3, 500, 300)
    windows = sample_windows(y)
    assert len(windows) == 2 * 4 * 3 and torch.equal(windows[0], y[0, :, :96, :96])


def test_only_damage_is_mended_at_all_costs():
    y = torch.full((1, 1, 50, 50), 0.5)
    spoilt, mask = salt_and_pepper(y, 0.05, gen())
    weight = damage_weight(spoilt, y, torch.zeros(1))
    assert torch.equal(weight, mask)


# any size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('shape', [(1, 1, 1, 1), (2, 3, 5, 70), (1, 3, 33, 47), (2, 1, 64, 40)])
def test_any_size(channels, shape):
    r = restorer_of(tiny(channels), 'tiny', RECORD)
    y = torch.rand(shape)
    kept = y.clone()
    assert r(y, say=silent).shape == shape and r(y, 0.1, say=silent).shape == shape
    assert torch.equal(y, kept)


@pytest.mark.parametrize('name', ['denoise_grey', 'mixed'])
@pytest.mark.parametrize('hw', [(1, 1), (9, 7), (33, 47)])
def test_any_size_by_the_weights_of_the_library(name, hw):
    y = torch.rand(1, 3, *hw)
    assert restorer(name)(y, say=silent).shape == y.shape


def test_no_seams():
    model = tiny(std=0.05)
    run = in_windows(lambda w, s: model(w), 1, 128, 64, 8)
    y = torch.rand(1, 1, 300, 411)
    with torch.no_grad():
        off = (run(y) - model(y)).abs()
    assert off.max() < 2e-3
    flat = torch.full((1, 1, 300, 411), 0.5)
    with torch.no_grad():
        steps = run(flat).diff(dim=-1)[..., 16:-16].abs().max()
        assert steps < 2 * model(flat).diff(dim=-1)[..., 16:-16].abs().max() + 1e-4


class Largest(nn.Module):
    "Counts the values of the largest tensor that it is handed."

    def __init__(self):
        super().__init__()
        self.most = 0

    def forward(self, y, sigma=None):
        self.most = max(self.most, y.numel())
        return y


def test_the_largest_tile_does_not_grow_with_the_image():
    most = {}
    for side in (600, 1800):
        net = Largest()
        r = Restorer('r', 'denoise', '', in_windows(net, 1, 256, 64, 8, batch=4), 1, (0, 1))
        r(torch.rand(1, 3, side, 500), say=silent)
        most[side] = net.most
    assert most[600] == most[1800] <= 3 * 256 * 256


@pytest.mark.parametrize('device', DEVICES)
def test_the_image_stays_where_it_is(device):
    run = runner_of(tiny(), device)
    y = torch.rand(1, 3, 40, 50)
    assert run(y).device == y.device and run(y, torch.tensor([0.1])).dtype == y.dtype


def test_two_stages_run_in_windows_of_their_size():
    dmae = dmae_tiny(16, 4, channels=1, dim=32, depth=1, heads=2, dec_dim=32, dec_depth=1,
                     dec_heads=2)
    model = TwoStageDMAE.from_pretrained(dmae, cond=16)[0].eval()
    y = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.allclose(runner_of(model)(y, torch.tensor([0.1])), model(y)[1], atol=1e-5)
    assert runner_of(model)(torch.rand(1, 3, 21, 40)).shape == (1, 3, 21, 40)


# a restorer ---------------------------------------------------------------------------------------


def test_clean_images_pass():
    "At least 45 dB for all that the library has for noise."
    x = crop('test')
    ways = expert(), *map(restorer, ('denoise_grey', 'nl_means', 'wavelet_shrinkage'))
    for r in ways:
        assert psnr(r(x, say=silent).clamp(0, 1), x).min() > 45, r.name


@pytest.mark.parametrize('level', [5, 10, 15])
def test_weak_noise_is_not_made_worse(level):
    x = crop('test', 96)
    y = as_file(gaussian(x, level / 255, gen(level)))
    r = expert()
    before, after = psnr(y, x), psnr(r(y, say=silent).clamp(0, 1), x)
    lost = 0.3 if level == 5 else 0         # the roofs of `china` look like noise
    assert (after > before - lost).all() and after.mean() > before.mean() + 0.5
    assert (psnr(r(y, careful=False, say=silent).clamp(0, 1), x) <= after).all()


def strong_answer(y, sigma=None, progress=False):
    "Half of what comes in: a run that is never right."
    return y / 2


@pytest.mark.parametrize('task', ['denoise', 'mixed'])
@pytest.mark.parametrize('blind', [True, False])
@pytest.mark.parametrize('hw', [(31, 400), (1, 1), (9, 300)])
def test_an_image_too_small_to_measure_stays_as_it_is(task, blind, hw):
    "A clean crop 31 pixels high came back at 30.6 dB, and nothing was said."
    r, said = Restorer('r', task, '', strong_answer, 1, (0, 1), blind), []
    y = torch.rand(2, 1, *hw)
    assert torch.equal(r(y, say=said.append), y)
    assert f'in {hw[1]} x {hw[0]} pixels no noise can be measured' in ' '.join(said)
    assert 'unless you tell one (sigma)' in ' '.join(said)
    said.clear()
    assert not torch.equal(r(y, 0.5, say=said.append), y)
    assert 'measured' not in ' '.join(said)


def test_the_expert_leaves_a_flat_crop_alone():
    x = photos('test')['coffee'][None, :, 100:131, 200:440]
    assert torch.equal(expert()(x, say=silent), x)


def test_black_and_white_stays_as_it_is_and_the_other_image_of_a_batch_does_not():
    page = (torch.rand(1, 1, 96, 96, generator=gen()) < 0.3).float()
    noisy = as_file(gaussian(torch.full((1, 1, 96, 96), 0.5), 0.1, gen()))
    r, said = Restorer('r', 'denoise', '', lambda v, *how: v * 0 + 0.5, 1, (0, 1)), []
    out = r(torch.cat([page, noisy]), say=said.append)
    assert torch.equal(out[:1], page) and (out[1] - 0.5).abs().max() < 0.1
    assert 'almost all is black or white, where no noise can be measured' in said[0]
    plain = r(page, careful=False, say=silent)
    assert torch.equal(plain, torch.full_like(page, 0.5))


def test_a_jpeg_file_is_restored_whatever_its_noise():
    "SURE knows noise only: held to it, files without noise came back as they were."
    said, y = [], jpeg(crop()[:1], 20)
    r = Restorer('r', 'jpeg', '', strong_answer, 1)
    assert torch.equal(r(y, say=said.append), y / 2)
    page = (torch.rand(1, 1, 96, 96, generator=gen()) < 0.3).float()
    assert torch.equal(r(page, say=said.append), page / 2)
    assert not said


def test_how_far_it_went_is_told():
    y, went = as_file(gaussian(crop()[:1], 10 / 255, gen())), []
    r = expert()
    out = r(y, say=silent, went=went.append)
    assert 0.2 < went[0].item() < 1
    assert torch.allclose(out, torch.lerp(y, r.run(y), went[0]))
    r(y, careful=False, say=silent, went=went.append)
    assert went[1].item() == 1
    r(y[..., :20], say=silent, went=went.append)
    assert went[2].item() == 0
    mixed = restorer('mixed')
    mixed(salt_and_pepper(crop()[:1], 0.05, gen())[0], say=silent, went=went.append)
    assert went[3].shape == (1, 1, 128, 128)


@pytest.mark.parametrize('name', ['mixed', 'jpeg'])
def test_a_network_that_never_heard_a_level_is_told_none(name):
    "Told 25, `mixed` made noise of 25 worse: 18.7 dB instead of 29.7."
    r, y = restorer(name), as_file(gaussian(crop('test', 96), 25 / 255, gen()))
    answers = [r(y, sigma, careful=False, say=silent) for sigma in (None, 25 / 255)]
    assert torch.equal(*answers)


def test_what_mixed_was_made_for_is_mended():
    x = crop('test', 96, 3)
    for task, least in (('denoise', 6), ('salt_pepper', 10), ('block', 5), ('rain', 5)):
        y = as_file(Degradation(task)(x, gen()))
        gain = psnr(restorer('mixed')(y, say=silent).clamp(0, 1), x) - psnr(y, x)
        assert gain.mean() > least and gain.min() > 0, (task, gain)


@pytest.mark.parametrize('quality, least', [(10, 0.7), (40, 0.7), (95, -0.1)])
def test_jpeg_files_gain_or_stay(quality, least):
    x = torch.cat([im[None, :, 64:192, 64:192] for im in photos('test', 3).values()])
    y = jpeg(x, quality)
    gain = psnr(restorer('jpeg')(y, say=silent).clamp(0, 1), x) - psnr(y, x)
    assert gain.mean() > least and gain.min() > -0.2, gain


def test_the_plain_answer_is_the_runs():
    r = restorer_of(tiny(), 'tiny', RECORD)
    y = torch.rand(1, 1, 40, 40)
    told = estimate_noise(y).clamp(max=MOST)
    assert told > RELIABLE and torch.equal(r(y, careful=False, say=silent), r.run(y, told))
    weak = y/20 + 0.5                           # what may be texture is not told
    assert estimate_noise(weak) < RELIABLE
    assert torch.equal(r(weak, careful=False, say=silent), r.run(weak))
    page = (y > 0.5).float()                    # nothing can be measured: not told
    assert torch.equal(r(page, careful=False, say=silent), r.run(page))
    assert torch.equal(r(y, 0.1, careful=False, say=silent), r.run(y, torch.tensor([0.1])))


@pytest.mark.parametrize(
    'level, sigma, heard', [(20, None, 20), (80, None, MOST * 255), (5, 20 / 255, 20)]
)
def test_a_blind_restorer_hears_the_level_as_far_as_it_knows_levels(level, sigma, heard):
    "From level 10 on, told the estimate, `denoise_grey` gains up to 0.2 dB."
    heard_of = []

    def run(y, sigma=None, progress=False):
        heard_of.append(255 * sigma[0].item())
        return y

    y = as_file(gaussian(torch.full((1, 1, 96, 96), 0.5), level / 255, gen()))
    Restorer('r', 'denoise', '', run, 1, (0, MOST))(y, sigma, careful=False, say=silent)
    assert abs(heard_of[0] / heard - 1) < 0.1


def test_images_of_a_batch_have_levels_of_their_own():
    r = restorer_of(tiny(std=0.05), 'tiny', RECORD)
    y, levels = torch.rand(2, 1, 40, 40), torch.tensor([0.02, 0.2])
    alone = [r(y[k:k + 1], levels[k].item(), careful=False, say=silent) for k in range(2)]
    assert torch.allclose(r(y, levels, careful=False, say=silent), torch.cat(alone), atol=1e-6)


def notes(y, sigma=None, **how):
    said = []
    restorer_of(tiny(how.pop('channels', 1)), 'tiny', RECORD | how)(y, sigma, say=said.append)
    return ' | '.join(note for note in said if 'hardly changed' not in note)


def test_what_is_said():
    x = crop(channels=3)[:1]
    grey = x.mean(1, keepdim=True)
    noisy = as_file(gaussian(grey, 25 / 255, gen()))
    assert notes(noisy) == '' and notes(noisy, 25 / 255) == ''
    assert 'sigma is 50 of 255; the noise of the image looks like 2' in notes(noisy, 50 / 255)
    strong = gaussian(grey, 90 / 255, gen())
    assert 'stronger than any that tiny was trained for (55)' in notes(strong)
    assert 'noise of about 90' in notes(strong, 90 / 255)
    assert 'JPEG' in notes(jpeg(grey, 20))
    assert 'trained on grey images' in notes(gaussian(x, 0.1, gen()))
    assert 'trained on colour images' in notes(noisy, channels=3)
    assert 'values go from -0.' in notes(2 * noisy - 1)


def test_an_expert_is_told_apart_from_its_level():
    grey = crop()[:1]
    said = []
    expert()(as_file(gaussian(grey, 5 / 255, gen())), say=said.append)
    assert 'weaker than any that expert was trained for (25)' in ' '.join(said)
    assert 'a restorer for this level (--task auto) does better' in ' '.join(said)
    said.clear()
    expert()(grey, say=said.append)
    assert 'there is hardly any to be removed' in ' '.join(said)
    assert 'hardly changed' in ' '.join(said)


def test_without_a_listener_it_warns():
    r = restorer_of(tiny(), 'tiny', RECORD)
    with pytest.warns(UserWarning, match='JPEG') as caught:
        r(jpeg(crop(), 20), 0.1)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        r(as_file(gaussian(crop(), 25 / 255, gen())), careful=False)


@pytest.mark.parametrize('sigma', [-0.1, 25, math.nan, [0.1, 0.2, 0.3]])
def test_levels_that_are_none(sigma):
    with pytest.raises(ValueError, match='sigma is'):
        as_levels(sigma, 2)


@pytest.mark.parametrize(
    'bad', [torch.rand(1, 2, 40, 40), torch.rand(40, 40), torch.zeros(0, 1, 9, 9)]
)
def test_what_is_no_image(bad):
    with pytest.raises(ValueError, match='y'):
        restorer_of(tiny(), 'tiny', RECORD)(bad)


# the registry -------------------------------------------------------------------------------------


def test_the_library_as_it_is():
    for name, r in restorers().items():
        assert r.name == name and r.purpose and r.provenance['licence']
        if r.provenance.get('recipe'):
            papers = {'recipe', 'seed', 'data', 'minutes', 'licence'}
            assert r.scores and papers <= r.provenance.keys()
    assert {'denoise_grey', 'mixed', 'nl_means', 'wavelet_shrinkage', 'bm3d'} <= restorers().keys()


def test_new_files_are_there_at_once(library):
    assert [r for r in restorers().values() if r.provenance.get('recipe')] == []
    library('denoise_grey', tiny(), task='denoise')
    first = restorers()['denoise_grey']
    assert first.channels == 1 and first.levels == (0, MOST) and first.scores == {'dB': 1.0}
    assert restorers()['denoise_grey'] is first
    y = torch.rand(1, 1, 40, 40)
    library('denoise_grey', tiny(std=0.2), task='denoise')
    assert not torch.equal(first.run(y), restorers()['denoise_grey'].run(y))
    library('no_task', tiny())
    assert 'no_task' not in restorers()


@pytest.fixture
def scored(tmp_path, monkeypatch):
    "No scores; scored(name, channels, *dB) writes some."
    rows = []
    monkeypatch.setattr(restorer_scores, 'DENOISER_SCORES', tmp_path / 'scores.json')

    def put(name, channels, *dB):
        row = dict(name=name, channels=channels, dB=dB, weights=restorer_scores.weights_hash(name))
        rows.append(row)
        restorer_scores.DENOISER_SCORES.write_text(json.dumps(rows))

    return put


def test_what_is_picked(library, scored):
    y = gaussian(crop(channels=3), 10 / 255, gen())
    with pytest.raises(ValueError, match='no denoiser here has scores'):
        pick_restorer(y)
    scored('nl_means', 3, 38, 34, 31, 28, 24, 22)
    library('expert', tiny(), task='denoise', sigma=25 / 255)
    assert pick_restorer(y).name == 'nl_means'              # weights without scores are not taken
    scored('expert', 3, 30, 30, 30, 30, 24, 20)
    by_level = {s: pick_restorer(y, s / 255).name for s in (0, 5, 15, 25, 30, 50, 200)}
    assert [s for s, name in by_level.items() if name == 'expert'] == [25, 30]
    with pytest.raises(ValueError, match='no denoiser here has scores'):
        pick_restorer(y[:, :1])                             # of grey images there are none
    scored('expert', 1, 1, 1, 1, 1, 1, 1)
    assert pick_restorer(y[:, :1]).name == 'expert'
    assert pick_restorer(torch.rand(1, 1, 5, 5)).name == 'expert'


def test_scores_are_of_one_file(library, scored):
    "New weights under an old name must be measured before they are chosen."
    library('denoise_grey', tiny(), task='denoise')
    scored('denoise_grey', 1, 40, 40, 40, 40, 40, 40)
    scored('wavelet_shrinkage', 1, 9, 9, 9, 9, 9, 9)
    y = torch.rand(1, 1, 40, 40)
    assert pick_restorer(y).name == 'denoise_grey'
    library('denoise_grey', tiny(std=0.2), task='denoise')
    assert pick_restorer(y).name == 'wavelet_shrinkage'


def test_a_method_is_picked_only_where_its_package_is(scored, monkeypatch):
    scored('bm3d', 1, 40, 40, 40, 40, 40, 40)
    scored('nl_means', 1, 30, 30, 30, 30, 30, 30)
    y = torch.rand(1, 1, 40, 40)
    monkeypatch.setitem(sys.modules, 'bm3d', None)
    assert pick_restorer(y).name == 'nl_means'
    there = types.ModuleType('bm3d')
    there.__spec__ = ModuleSpec('bm3d', None)
    monkeypatch.setitem(sys.modules, 'bm3d', there)
    assert pick_restorer(y).name == 'bm3d'


@pytest.mark.parametrize('channels', [1, 3])
def test_all_that_is_shipped_has_scores(channels):
    """After new weights:
    RESTORE_BUDGET=study python -c "from restore_lib.restorers import restorers;
    from restore_lib.restorer_scores import score_denoisers; score_denoisers(restorers())" """
    denoisers = {name for name, r in restorers().items() if r.task == 'denoise'}
    scores = restorer_scores.recorded_scores(channels)
    assert scores.keys() == denoisers
    assert all(len(r['dB']) == len(restorer_scores.SCORED) for r in scores.values())


def test_the_table_is_made_of_the_study():
    rows = studies('23_restorers')
    assert restorer_scores.DENOISER_SCORES.read_text() == restorer_scores.table_of_rows(rows)


def test_auto_takes_what_the_scores_say():
    "Weights that know one level lost to non-local means at every other level, and were taken."
    scores = restorer_scores.recorded_scores(3)
    able = [name for name in scores if name != 'bm3d' or is_installed('bm3d')]
    y = gaussian(crop(channels=3), 0.1, gen())
    for k, s in enumerate(restorer_scores.SCORED):
        best = max(able, key=lambda name: scores[name]['dB'][k])
        assert pick_restorer(y, s / 255).name == best


def test_the_study_is_one_call(library, monkeypatch, tmp_path):
    library('denoise_grey', tiny(), task='denoise')
    monkeypatch.setattr(restorer_scores, 'DENOISER_SCORES', tmp_path / 'scores.json')
    monkeypatch.chdir(tmp_path)
    two = {name: restorers()[name] for name in ('denoise_grey', 'wavelet_shrinkage')}
    with pytest.raises(ValueError, match='expected RESTORE_BUDGET=study'):
        score_denoisers(two)
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setenv('RESTORE_BUDGET', 'study')
    one = restorer_scores.judged_squares
    monkeypatch.setattr(restorer_scores, 'judged_squares', lambda c, side: one(c, 64)[:1])
    score_denoisers(two)
    assert restorer_scores.recorded_scores(1).keys() == two.keys()
    before = restorer_scores.DENOISER_SCORES.read_text()
    monkeypatch.setattr(restorer_scores, 'denoiser_scores', pytest.fail)
    score_denoisers(two)                                    # nothing is new
    assert restorer_scores.DENOISER_SCORES.read_text() == before
    monkeypatch.undo()


def test_a_file_or_a_name(library, tmp_path):
    path = library('denoise_grey', tiny(), task='denoise')
    other = tmp_path / 'mine.safetensors'
    other.write_bytes(path.read_bytes())
    assert restorer(other).name == 'mine' and restorer('denoise_grey').name == 'denoise_grey'
    with pytest.raises(ValueError, match='fog is neither a file nor one of: denoise_grey, nl_'):
        restorer('fog')
    other.write_text('no weights')
    with pytest.raises(ValueError, match='no safetensors file'):
        restorer(other)


def test_weights_that_restore_nothing():
    with pytest.raises(ValueError, match='expected one of denoiser.Denoiser'):
        restorer_of(load_model('digit_prior')[0], 'digit_prior', RECORD)


def test_enlarging_is_the_same_interface(tmp_path):
    net = dict(base=16, embed=16, head_channels=8, swin_depth=2, window=4)
    pairs = [(torch.rand(1, 8, 8), torch.rand(1, 32, 32)) for _ in range(2)]
    model = make_sr(SRConfig(net_options=net, crop=32, batch=2, codec_steps=1), pairs)
    save_model(model, tmp_path / 'large.safetensors', task='x4')
    r = restorer(tmp_path / 'large.safetensors')
    assert (r.task, r.scale, r.channels) == ('x4', 4, 1) and '4 times' in r.purpose
    assert r(torch.rand(1, 3, 9, 7), say=silent).shape == (1, 3, 36, 28)


# classical methods --------------------------------------------------------------------------------


@pytest.mark.parametrize('fn', [nl_means, wavelet_shrinkage])
def test_classical_methods_denoise(fn):
    x = crop(channels=3)
    y = gaussian(x, 25 / 255, gen())
    assert (psnr(fn(y, torch.full((2,), 25 / 255)).clamp(0, 1), x) > psnr(y, x) + 3).all()


def test_classical_methods_need_a_level():
    y = torch.rand(1, 1, 20, 20)
    with pytest.raises(ValueError, match='no noise can be measured; expected a level for nl_means'):
        restorer('nl_means')(y, careful=False, say=silent)
    assert torch.equal(restorer('nl_means')(y, say=silent), y)
    assert restorer('nl_means')(torch.rand(1, 1, 20, 20), 0.1, say=silent).shape == (1, 1, 20, 20)


def test_bm3d_is_an_extra():
    y = gaussian(crop(side=40), 25 / 255, gen())
    try:
        import bm3d
    except ImportError:
        with pytest.raises(ImportError, match=r"pip install 'restore_lib\[bm3d\]'"):
            restorer('bm3d')(y, 25 / 255, say=silent)
    else:
        assert bm3d and bm3d_filter(y, torch.full((2,), 25 / 255)).shape == y.shape


# signs --------------------------------------------------------------------------------------------


def test_blocks_are_seen_wherever_the_image_was_cut():
    x = crop(side=160, channels=3)
    for top, left in ((0, 0), (3, 5), (7, 1)):
        assert (jpeg_blocks(jpeg(x, 40)[..., top:, left:]) > BLOCKY).all()
    assert (jpeg_blocks(x) < BLOCKY).all()
    assert jpeg_blocks(torch.zeros(1, 1, 64, 64)).item() < BLOCKY
    assert jpeg_blocks(torch.rand(2, 1, 20, 20)).tolist() == [1, 1]


def test_small_differences_of_levels_are_not_worth_a_word():
    y = torch.rand(1, 1, 20, 20)
    assert not signs(y, torch.tensor([20 / 255]), torch.tensor([25 / 255]), (0, 1))
    assert not signs(y, torch.tensor([1 / 255]), torch.tensor([3 / 255]), (0, 1))
    assert not signs(y, torch.tensor([math.nan]), None, (0.1, 0.1))
    assert signs(y, torch.tensor([10 / 255]), torch.tensor([25 / 255]), (0, 1))


def test_numpy_numbers():
    y = torch.rand(1, 1, 40, 40)
    r = restorer_of(tiny(), 'tiny', RECORD)
    assert torch.equal(r(y, np.float64(0.1), say=silent), r(y, 0.1, say=silent))
