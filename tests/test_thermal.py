"restore_lib.thermal: sizes, ranges, seeds, bad input."

import pytest
import torch

from restore_lib.thermal import _radiance, thermal

MEANS = [0.38462, 0.56935, 0.40614, 0.48685]  # of thermal(4, 64, seed=0)


def test_thermal_contract():
    a = thermal(19, size=(40, 56), seed=3)
    assert a.shape == (19, 1, 40, 56) and a.dtype == torch.float32 and 0 <= a.min() and a.max() <= 1
    assert torch.equal(a[:5], thermal(5, size=(40, 56), seed=3)) and torch.equal(
        a, thermal(19, size=(40, 56), seed=3)
    )
    assert (a.flatten(1).std(1) > 0.01).float().mean() > 0.9  # scenes, not flat fields


@pytest.mark.parametrize(
    'bad',
    [dict(n=0), dict(n=1.5), dict(n=2, size=8), dict(n=2, size=(64, '64')), dict(n=1, seed=-1)],
)
def test_thermal_bad_input(bad):
    with pytest.raises((TypeError, ValueError), match='expected'):
        thermal(**bad)


def test_a_scene_depends_on_its_number_and_seed_alone():
    a = thermal(18, size=32, seed=5)
    for n in (1, 2, 15, 16, 17):  # rendered sixteen at a time
        off = (a[:n] - thermal(n, size=32, seed=5)).abs()
        # a batch of one is summed in another order: a pixel may be rounded otherwise
        assert off.max() < 1.01 / 255 and (off > 0).sum() <= (n % 16 == 1)
    assert not torch.equal(a, thermal(18, size=32, seed=6))
    assert len({tuple(s.flatten().tolist()) for s in a}) == 18
    assert thermal(1, (16, 48)).shape == (1, 1, 16, 48)


def test_scenes_are_those_of_the_studies():
    "Their means, as they were when trained weights and rows were made with them."
    means = [float(f'{m:.5f}') for m in thermal(4, 64, seed=0).mean((1, 2, 3))]
    assert means == pytest.approx(MEANS, abs=2e-4)


def test_every_level_of_eight_bits_and_the_random_state_stays():
    state = torch.get_rng_state()
    x = thermal(3, 48) * 255
    assert (x - x.round()).abs().max() < 1e-4 and torch.equal(torch.get_rng_state(), state)


def test_radiance_grows_like_the_power_that_the_notebook_names():
    near = torch.tensor([299.0, 300.0, 301.0], dtype=torch.float64)
    low, at, high = _radiance(near)
    assert at == pytest.approx(1)
    assert (high - low) / 2 * 300 == pytest.approx(4.8, abs=0.05)
