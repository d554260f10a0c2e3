"""The training of the weights for infrared x4, at its smallest."""

import pytest
import torch

from restore_lib import infrared
from restore_lib.data import photos


def test_photographs_come_at_three_sizes():
    x = torch.rand(1, 200, 301)
    assert [tuple(y.shape) for y in infrared.shrunken([x])] == [(1, 200, 301), (1, 100, 150)]
    assert infrared.shrunken([x[:, :90]]) == []


def test_no_image_is_both_learned_from_and_watched():
    learned = [x.flatten()[:64].tolist() for x in infrared.infrared_images()]
    assert len(learned) > 64 + len(photos('train'))
    assert not any(x.flatten()[:64].tolist() in learned for x in infrared.held_images())


def test_one_step_is_trained_and_told(tmp_path, monkeypatch):
    told = []
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path))
    monkeypatch.setattr(infrared, 'save_pretrained', lambda *a, **kw: told.append((a, kw)))
    monkeypatch.setattr(infrared, 'thermal', lambda n, side, seed: torch.rand(2, 1, 96, 96))
    learn = infrared.train_infrared(steps=1)
    (model, name, recipe, *_, scores, _, licence), says = told[0]
    assert name == 'infrared_x4' and recipe.startswith("train_infrared(False, 1, 'no')")
    assert 'Apache-2.0' in licence and says == dict(task='x4', steps=1, bits=8)
    assert set(scores) == {f'held scenes, {k}' for k in learn.metrics}
    with torch.no_grad():
        assert model(torch.rand(1, 1, 16, 24)).shape == (1, 1, 64, 96)


def test_roadscene_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv('RESTORE_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError):
        infrared.infrared_images(roadscene=True)
