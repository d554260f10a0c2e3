"How lesson 07 reads its study: which seeds are pooled, what lies beyond the numbers measured."

import numpy as np
import pytest
import torch

from restore_lib import label_curves
from restore_lib.label_checks import labels_told
from restore_lib.label_curves import LabelCurves, gain_of, ladder_of, rate_of, exchange_rates
from restore_lib.label_study import POINTS, packed

IMAGES = 400
SHARES = {('scratch', 20): 0.5, ('scratch', 100): 0.7, ('scratch', None): 0.8}
SHARES |= {('fine-tuned', 20): 0.6}


def row(share, seed):
    g = torch.Generator().manual_seed(seed)
    right = packed((torch.rand(IMAGES, generator=g) < share).float())
    kept = {f'right {k}': right for k in (200, 1000, 3000)}
    return {str(k): share for k in POINTS} | kept | {'images': IMAGES}


@pytest.fixture
def study(monkeypatch):
    "Rows of two data sets, to be filled and emptied: (set, way, labels, seed) -> figures."
    rows = {('glyphs', *cell, s): row(share, s) for cell, share in SHARES.items() for s in range(3)}
    rows |= {('MNIST', *cell, 1): row(share, 1) for cell, share in SHARES.items()}
    monkeypatch.setattr(label_curves, 'row_of', lambda *cell: rows.get(cell))
    return rows


def test_a_seed_counts_when_its_four_rows_are_there(study):
    assert LabelCurves('glyphs').seeds == [0, 1, 2] and LabelCurves('MNIST').seeds == [1]
    del study['glyphs', 'scratch', 100, 1]
    assert LabelCurves('glyphs').seeds == [0, 2] and LabelCurves('CIFAR-10').seeds == []


def test_a_mean_is_over_the_same_seeds_as_its_neighbour(study):
    curves = LabelCurves('glyphs')
    for s in (0, 1):
        study['glyphs', 'k-NN', 5, s] = {'0': 0.3, 'right 0': '', 'images': IMAGES}
    assert curves.rows('k-NN', 5) == [] and len(curves.rows('scratch', 20)) == 3
    study['glyphs', 'k-NN', 5, 2] = {'0': 0.6, 'right 0': '', 'images': IMAGES}
    assert curves.curve('k-NN', 5).tolist() == [[0.3], [0.3], [0.6]]
    told = {r['way']: r for r in ladder_of(curves)}
    assert told['k-NN']['5'] == pytest.approx(40) and told['probe, SGD']['5'] is None
    assert [told['scratch'][k] for k in ('20', '100', 'all')] == pytest.approx([50, 70, 80])


def test_curves_have_a_row_for_each_seed(study):
    curves = LabelCurves('glyphs')
    assert curves.curve('scratch', 20).shape == (3, len(POINTS))
    assert curves.answers('scratch', 20, 1000).shape == (3, IMAGES)
    found = curves.by_labels('scratch', 3000)
    assert list(found) == [20, 100, 800] and np.allclose(found[800], 0.8)


def test_both_readings_of_every_set_with_rows(study, monkeypatch):
    monkeypatch.setattr(label_curves, 'rate_of', lambda curves, *steps: (curves.source, steps))
    assert exchange_rates() == {
        ('glyphs', 'labelled steps'): ('glyphs', (3000, 3000)),
        ('glyphs', 'all steps'): ('glyphs', (1000, 3000)),
        ('MNIST', 'labelled steps'): ('MNIST', (3000, 3000)),
        ('MNIST', 'all steps'): ('MNIST', (1000, 3000)),
    }


def test_the_steps_of_a_reading_are_those_of_its_answers(study):
    for s in range(3):  # other answers after 1,000 steps: only the second reading sees them
        study['glyphs', 'fine-tuned', 20, s]['right 1000'] = row(0.95, 10 + s)['right 1000']
    curves = LabelCurves('glyphs')
    assert rate_of(curves, 3000, 3000).labels < 100
    assert rate_of(curves, 1000, 3000).labels == float('inf')


def test_a_gain_is_over_seeds_too(study):
    alone = gain_of(LabelCurves('MNIST'), 3000, 3000)
    three = gain_of(LabelCurves('glyphs'), 200, 3000)
    assert not alone and 'seed' in alone.says  # one seed tells nothing apart
    assert three.difference == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize(
    'args, says',
    [(('glyphs', 10), 'few is 10; expected 5, 20 or 100'), (('glyphs', None), 'few is None')],
)
def test_numbers_of_labels_without_rows(args, says):
    with pytest.raises(ValueError, match=says):
        LabelCurves(*args)
    with pytest.raises(ValueError, match="source is 'mnist'; expected one of glyphs, MNIST"):
        LabelCurves('mnist')


def test_numbers_beyond_what_was_measured_are_told_as_bounds():
    told = [labels_told(n, {20: 0, 5500: 0}) for n in (0.0, 20, 56.7, 1234.5, float('inf'))]
    assert told == ['20 or fewer', '20 or fewer', '57', '1,234', 'more than 5,500']
