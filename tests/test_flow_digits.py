"""Digits of 32 x 32 pixels, and whether the shipped readers read what they should."""

import pytest
import torch
from common import gen

from restore_lib.flow_digits import (
    DIGIT_SIDE, DigitReader, digit_images, digit_judge, moved, read_right,
)


def test_digits_are_those_of_the_source_enlarged():
    x, labels = digit_images(n=20, split='test')
    assert x.shape == (20, 1, DIGIT_SIDE, DIGIT_SIDE) and labels.shape == (20,)
    assert 0 <= x.min() and x.max() <= 1 and x.amax((1, 2, 3)).min() > 0.5
    with pytest.raises(ValueError, match='source'):
        digit_images('letters')


def test_glyphs_of_other_typefaces_are_read():
    x, labels = digit_images(n=400, split='test')
    right = read_right('glyphs', x, labels)
    assert right.dtype == torch.bool and right.float().mean() > 0.94
    assert read_right('glyphs', x, (labels + 1) % 10).float().mean() < 0.03


def test_what_shows_no_digit_is_not_read_as_one_of_choice():
    noise = torch.rand(200, 1, DIGIT_SIDE, DIGIT_SIDE, generator=gen())
    labels = torch.arange(200) % 10
    assert read_right('glyphs', noise, labels).float().mean() < 0.25


def test_mnist_is_read(real):
    real('mnist')
    x, labels = digit_images('mnist', 'test', 1000)
    assert read_right('mnist', x, labels).float().mean() > 0.98


def test_a_moved_digit_is_still_read_and_nothing_is_lost():
    x, labels = digit_images(n=100, split='test')
    torch.manual_seed(0)
    away = moved(x, 2)
    assert away.shape == x.shape and not torch.equal(away, x)
    assert torch.equal(moved(x, 0), x)
    assert read_right('glyphs', away, labels).float().mean() > 0.9


def test_the_judge_is_frozen_and_the_callers_random_state_stays():
    was = torch.get_rng_state()
    judge = digit_judge('glyphs')
    assert not judge.training and not any(p.requires_grad for p in judge.parameters())
    assert torch.equal(torch.get_rng_state(), was)
    assert judge.features(torch.rand(2, 1, 32, 32, generator=gen())).shape == (2, 96)


def test_bad_input_is_named():
    for bad in (torch.rand(1, 32, 32), torch.rand(1, 1, 32, 32) / 0):
        with pytest.raises(ValueError, match='x'):
            DigitReader()(bad)
    with pytest.raises((TypeError, ValueError), match='width'):
        DigitReader(0)
