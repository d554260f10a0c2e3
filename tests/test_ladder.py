"The rows and bars of a results table, and what stands around lesson 04's checks."

import math

import matplotlib
import pytest
import torch

from restore_lib.audit import Ladder, compare
from restore_lib.audit_parts import (
    largest_difference,
    resample_weights,
    smooth_images,
    student_multiple,
    variance_parts,
)
from restore_lib.ladder import checked_ends, impossible, metric_sign, score_grid

matplotlib.use('Agg')


def test_no_line_strikes_a_value_through():
    ladder = Ladder().floor('bicubic', 24.2).add('ours', 24.6).ceiling('perfect', 24.7)
    ax = ladder.figure().axes[0]
    values = [t for t in ax.texts if t.get_text() in ('24.20', '24.60')]
    assert len(values) == 2
    assert all(t.get_position()[0] > 1 for t in values)  # in axes: right of every line
    matplotlib.pyplot.close('all')


@pytest.mark.parametrize('name, sign', [('PSNR-Y', 1), ('1 - LPIPS', 1), ('valid_loss', -1)])
def test_metric_sign(name, sign):
    assert metric_sign(name) == sign


def test_metric_sign_of_an_unknown_name():
    assert metric_sign('blur', 3, 1) == -1 and metric_sign('sharpness', 1, 3) == 1


def test_impossible():
    assert impossible('PSNR', 0.5, 0.5 + 1e-9) == ''
    assert impossible('PSNR', 2, 1) == 'above its ceiling by 1 dB'
    with pytest.raises(ValueError, match='are they swapped'):
        checked_ends('LPIPS', 0.1, 0.4, 0.2)


def test_score_grid_is_seeds_by_images():
    for values, shape in ((3.0, (1, 1)), ([1.0, 2], (1, 2)), ([[1.0, 2], [3, 4]], (2, 2))):
        assert tuple(score_grid(values, 'PSNR', 'ours').shape) == shape


def test_resamples_vary_as_new_values_would():
    "Of n values, a mean varies by their variance over n, however few they are."
    g = torch.Generator().manual_seed(0)
    for n in (2, 3, 10):
        values = torch.randn(n, generator=g, dtype=torch.float64)
        means = resample_weights(n, 40_000, g) @ values
        assert means.var().item() == pytest.approx((values.var() / n).item(), rel=0.03)
        assert means.mean().item() == pytest.approx(values.mean().item(), abs=0.02)


def test_student_multiple():
    assert student_multiple(0.975, [(1.0, 2)]) == pytest.approx(4.303, abs=1e-3)
    assert student_multiple(0.975, [(1.0, 10_000)]) == pytest.approx(1.96, abs=1e-3)
    assert student_multiple(0.975, []) == 0.0
    a, b = torch.rand(1, 5).double(), torch.rand(3, 5).double()
    assert [df for _, df in variance_parts(a, b, False)] == [4, 2]


def test_the_last_point_of_the_lessons_figure_is_its_table():
    a, b = (torch.rand(4, 6, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    everything = [torch.randperm(n).sort().values for n in (4, 6)]
    picked = [grid[everything[0]][:, everything[1]] for grid in (a, b)]
    assert compare(*picked).resolvable == compare(a, b).resolvable


def test_small_things():
    x = smooth_images(3, 16)
    assert x.shape == (3, 1, 16, 16) and x.min() >= 0.0999 and x.max() <= 0.9001
    assert largest_difference([x, (x,)], [x, (x + 1,)]) == pytest.approx(1, abs=1e-6)
    assert largest_difference(x, x[:1]) == math.inf
