"restore_lib.draws: seeds on every device and in every precision, ends, levels, noise in parts."

from common import DEVICES, gen
import numpy as np
import pytest
import torch

from restore_lib.draws import (
    StepNoise,
    draw_choice,
    draw_level,
    draw_normal,
    draw_normal_like,
    draw_uniform,
    draw_whole,
    largest_level,
    per_image,
)

X = torch.zeros(4, 3, 8, 8)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_cpu_generator_draws_alike_for_every_tensor(device, dtype):
    like = X.to(device, dtype)
    for draw in (draw_uniform, draw_normal):
        found = draw((5, 2), like, gen())
        assert found.device.type == device and found.dtype == torch.float32
        assert torch.equal(found.cpu(), draw((5, 2), X, gen()))
    found = draw_normal_like(like, gen())
    assert found.dtype == torch.promote_types(dtype, torch.float32) and found.shape == like.shape
    assert found.device.type == device
    if dtype != torch.float64:
        assert torch.equal(found.cpu(), draw_normal_like(X, gen()))
    assert draw_normal_like(like, gen(), (2, 2)).shape == (2, 2)


def test_without_a_generator_torchs_own_is_used():
    torch.manual_seed(3)
    a = draw_uniform((4,), X)
    torch.manual_seed(3)
    assert torch.equal(a, torch.rand(4))
    state = torch.get_rng_state()
    draw_uniform((4,), X, gen())
    assert torch.equal(torch.get_rng_state(), state)


def test_whole_numbers_reach_both_ends_and_no_farther(monkeypatch):
    found = draw_whole(2, 4, (9000,), X, gen()).bincount()
    assert found[:2].tolist() == [0, 0] and len(found) == 5 and found[2:].min() > 2800
    monkeypatch.setattr('restore_lib.draws.draw_uniform', lambda *given: torch.ones(3))
    assert draw_whole(2, 4, (3,), X, None).tolist() == [4, 4, 4]  # rounding may reach one


def test_choices_have_their_weights():
    found = draw_choice((1, 0, 2, 5), 8000, X, gen()).bincount(minlength=4) / 8000
    assert found[1] == 0 and np.allclose(found, [1 / 8, 0, 2 / 8, 5 / 8], atol=0.02)


def test_levels_of_every_kind():
    assert draw_level(0.5, X, 's', 0, 1).tolist() == [0.5] * 4
    assert draw_level(np.float64(0.5), X, 's', 0, 1).dtype == torch.float32
    each = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    assert torch.equal(draw_level(each, X, 's', 0, 1).double(), each)
    drawn = draw_level((0.2, 0.3), X, 's', 0, 1, gen())
    assert len(drawn.unique()) == 4 and 0.2 <= drawn.min() and drawn.max() <= 0.3
    assert largest_level((0.2, 0.3), drawn) == 0.3 and largest_level(each, each) == 1
    assert largest_level(each, torch.ones(0)) == 0 and per_image(each).shape == (4, 1, 1, 1)


@pytest.mark.parametrize(
    'value, error, says',
    [
        (2, ValueError, 's is 2.0; expected 0 to 1 pixels'),
        ((0.5, 2), ValueError, r's is \(0.5, 2\)'),
        ((0.5, 0.1), ValueError, 'smaller number first'),
        (float('nan'), ValueError, 's is nan'),
        (torch.ones(3), ValueError, r'shape \(3,\).*here 4'),
        (torch.ones(4, 1), ValueError, r'shape \(4, 1\)'),
        (torch.tensor([0, 1, 2, 0.5]), ValueError, 'expected 0 to 1 pixels'),
        ('much', TypeError, 's is str'),
    ],
)
def test_what_is_no_level(value, error, says):
    with pytest.raises(error, match=says):
        draw_level(value, X, 's', 0, 1, unit=' pixels')


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_noise_of_a_part_is_that_of_the_whole(dtype):
    x = X.to(dtype)
    g = gen(7)
    whole = [draw_normal_like(x, g) for _ in range(3)]
    for part in (slice(0, 4), slice(0, 1), slice(1, 3), slice(3, 9)):
        found = list(StepNoise(7, 3, 4, part, x[part]))
        assert len(found) == 3 and all(torch.equal(a, b[part]) for a, b in zip(found, whole))
    noise = StepNoise(7, 3, 4, slice(0, 2), x[:2])
    assert noise.shape == (3, 2, 3, 8, 8)
    for k in (-1, 3):
        with pytest.raises(IndexError):
            noise[k]


def test_a_step_of_noise_is_drawn_once_and_in_order():
    noise = StepNoise(7, 3, 4, slice(0, 2), X[:2])
    first = noise[0]
    for k in (0, 2):
        with pytest.raises(ValueError, match=f'k is {k}; expected 1'):
            noise[k]
    again = list(StepNoise(7, 3, 4, slice(0, 2), X[:2]))
    assert torch.equal(first, again[0]) and torch.equal(noise[1], again[1])


def test_uniform_numbers_are_nothing_else():
    with pytest.raises(TypeError):
        draw_uniform((4,), X, gen(), torch.randn)
    with pytest.raises(TypeError):
        draw_uniform((4,), X, draw=torch.randn)


def test_a_range_that_uniform_numbers_cannot_fill_is_refused():
    found = draw_whole(-(2**23), 2**23 - 1, (20000,), X, gen())
    assert (found % 2).float().mean().sub(0.5).abs() < 0.02 and found.min() < 0 < found.max()
    for low, high in ((0, 2**24), (0, 2**25 - 1), (4, 3), (0, 1.5)):
        with pytest.raises(ValueError, match='high is'):
            draw_whole(low, high, (4,), X, gen())


@pytest.mark.parametrize('probs', [[-1, 1], [0, 0], [1, float('nan')], []])
def test_weights_that_are_none_are_refused(probs):
    with pytest.raises(ValueError, match='probs is'):
        draw_choice(probs, 4, X, gen())


@pytest.mark.parametrize('part, n', [(slice(0, 2), 4), (slice(3, 9), 2), (slice(4, 6), 2)])
def test_the_noise_of_a_part_is_as_long_as_the_part(part, n):
    with pytest.raises(ValueError, match='part is slice.*expected as many'):
        StepNoise(7, 3, 4, part, X[:n])
