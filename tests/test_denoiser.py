"""The training of the weights that mend noise, JPEG files and a mixture, at its smallest."""

import pytest
import torch

from restore_lib import denoiser
from restore_lib.degrade import jpeg


def smooth(n, channels=1, side=40):
    x = torch.rand(n, channels, 5, 5, generator=torch.Generator().manual_seed(0))
    size = (side, side)
    return torch.nn.functional.interpolate(x, size=size, mode='bicubic').clamp(0, 1)


@pytest.fixture
def told(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path))
    monkeypatch.setattr(denoiser, 'save_pretrained', lambda *a, **kw: kept.append((a, kw)))
    monkeypatch.setattr(denoiser, 'training_images', lambda c: [*smooth(3, c)])
    monkeypatch.setattr(denoiser, 'validation_batches', lambda c: [smooth(2, c)])
    return kept


@pytest.mark.parametrize('damage, task, channels', [
    ('noise', 'denoise', 1), ('jpeg', 'jpeg', 3), ('mixed', 'mixed', 1)])
def test_one_step_of_each_damage(told, damage, task, channels):
    name = f'{damage}_weights'
    learn = denoiser.train_denoiser(name, channels, steps=1, size=16, batch=2, damage=damage)
    (model, kept, recipe, *_, scores, _, _), says = told[0]
    bits = 16 if damage == 'noise' else 8
    assert kept == name and says == dict(task=task, stage=0, steps=1, bits=bits)
    assert recipe.endswith(f"{damage!r}, (48, 80, 128)) of `denoiser`")
    assert set(scores) == {f"PSNR, photos('valid'), {k}" for k in learn.metrics}
    assert model(smooth(1, channels)).shape == (1, channels, 40, 40)


def test_a_smaller_network(told):
    learn = denoiser.train_denoiser('s', steps=1, size=16, batch=2, widths=(8, 16, 24))
    assert learn.bare.widths == told[0][0][0].widths == [8, 16, 24]


def test_unknown_damage_is_named(told):
    with pytest.raises(ValueError, match="damage is 'dust'; expected one of 'noise', 'jpeg'"):
        denoiser.train_denoiser('dusty', steps=1, damage='dust')
    assert not told


def test_jpeg_blocks_begin_anywhere():
    torch.manual_seed(0)
    x = smooth(64, side=48) + 0.2 * torch.rand(64, 1, 48, 48)
    starts = set()
    for k in range(12):
        y = denoiser.jpeg_as_trained(x.clamp(0, 1), (10, 10))
        step = (y[..., 1:] - y[..., :-1]).abs().mean((0, 1, 2))[:40].reshape(5, 8).mean(0)
        starts.add(step.argmax().item())
    assert len(starts) > 3


def test_a_crop_in_twenty_stays_whole_and_the_rest_are_files():
    torch.manual_seed(0)
    x = smooth(300, 3, 24)
    y = denoiser.jpeg_as_trained(x)
    same = (y == x).flatten(1).all(1)
    assert 0.01 < same.float().mean() < 0.12
    levels = 255 * y[~same]
    assert (levels - levels.round()).abs().max() < 1e-3
    assert jpeg(x[:1], 95).shape == y[:1].shape
