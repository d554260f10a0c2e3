"Checks of arguments: what passes, and what the message says of the rest."

import math

import numpy as np
import pytest
import torch

from restore_lib.checks import (
    check_file_name, check_images, check_interval, check_latent, check_number, check_steps,
    check_times, check_whole, known_truth,
)

Z = torch.zeros(2, 4, 8, 8)
T = torch.tensor([0, 9])


@pytest.mark.parametrize(
    'x, error, says',
    [
        (np.zeros((1, 1, 4, 4)), TypeError, 'ndarray'),
        (torch.zeros(1, 1, 4, 4).byte(), TypeError, 'uint8'),
        (torch.zeros(4, 4), ValueError, r'\(4, 4\)'),
        (torch.zeros(1, 2, 4, 4), ValueError, '2 channels'),
        (torch.full((1, 1, 4, 4), 200.0), ValueError, '0 to 255'),
        (torch.full((1, 1, 4, 4), float('inf')), ValueError, 'infinite'),
    ],
)
def test_check_images(x, error, says):
    with pytest.raises(error, match=says):
        check_images(x, 'picture', channels=(1, 3))


@pytest.mark.parametrize('shape', [(0, 1, 4, 4), (1, 0, 4, 4), (2, 1, 0, 4), (2, 1, 4, 0)])
def test_empty_batches_are_one_clear_error(shape):
    with pytest.raises(ValueError, match='y has shape .*; expected at least one image'):
        check_images(torch.zeros(shape), 'y')


def test_check_images_takes_numpys_channels_and_short_floats():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = torch.rand(1, 1, 4, 4).to(dtype)
        assert check_images(x, channels=np.int64(1)) is x
        with pytest.raises(ValueError, match='is it 0 to 255'):
            check_images(x + 200)
    with pytest.raises(ValueError, match='expected 3'):
        check_images(torch.rand(1, 1, 4, 4), channels=np.int64(3))


@pytest.mark.parametrize(
    'check, error, says',
    [
        (lambda: check_whole(0, 'n', 1), ValueError, 'n is 0; expected a whole number from 1'),
        (lambda: check_whole(9, 'n', high=8), ValueError, 'a whole number of at most 8'),
        (lambda: check_whole(np.float32(2), 'n'), ValueError, 'expected a whole number'),
        (lambda: check_whole(np.bool_(True), 'n'), ValueError, 'expected a whole number'),
        (lambda: check_whole(None, 'n'), TypeError, 'n is None; expected a whole number'),
        (lambda: check_number(0, 'p', above=0), ValueError, 'p is 0; expected a number above 0'),
        (lambda: check_number(True, 'p'), ValueError, 'p is True; expected a number'),
        (lambda: check_number(math.inf, 'p'), ValueError, 'p is inf; expected a number'),
        (lambda: check_number('1', 'p'), TypeError, "p is '1'; expected a number"),
        (lambda: check_interval((0, 1, 2), 's'), ValueError, 'a number or a pair'),
        (lambda: check_interval([2, 1], 's'), ValueError, 'the smaller number first'),
        (lambda: check_interval((-1, 1), 's', 0), ValueError, 's is -1; expected a number from 0'),
        (lambda: check_file_name(3, 'f'), TypeError, 'f is 3; expected text'),
        (lambda: check_file_name('..', 'f'), ValueError, 'the name of a file, without a folder'),
        (lambda: check_file_name('a/b', 'f'), ValueError, 'the name of a file, without a folder'),
        (lambda: check_latent(Z.numpy(), 'z'), TypeError, 'z is ndarray; expected a float tensor'),
        (lambda: check_latent(Z.long(), 'z'), TypeError, 'z is torch.int64; expected floats'),
        (lambda: check_latent(Z[0], 'z'), ValueError, r'z has shape \(4, 8, 8\); expected \(b, c'),
        (lambda: check_latent(Z + math.nan, 'z'), ValueError, '512 values .* finite numbers'),
        (lambda: check_steps([0], Z), TypeError, r't is list; expected an int64 tensor \(2,\)'),
        (lambda: check_steps(T[:1], Z), ValueError, r'expected int64 of shape \(2,\)'),
        (lambda: check_steps(T, steps=9), ValueError, 't holds 0 to 9; expected 0 to 8'),
        (lambda: check_steps(T, least=1), ValueError, 't holds 0 to 9; expected steps from 1'),
        (lambda: check_times(0.5, Z, 't'), TypeError, 't is float; expected a float tensor'),
        (lambda: check_times(T, Z, 't'), TypeError, 't is torch.int64; expected floats in'),
        (lambda: check_times(T / 3, Z, 't'), ValueError, 't holds 0 to 3; expected times in'),
        (lambda: check_times(T[:1] / 9, Z, 't'), ValueError, 'one for each of z'),
    ],
)
def test_what_is_refused(check, error, says):
    with pytest.raises(error, match=says):
        check()


def test_what_passes():
    assert check_latent(Z, 'z', like=('x', Z)) is Z and check_steps(T, Z, 10) is T
    assert check_steps(T[:0]) is not None and check_times(T / 9, Z, 't').tolist() == [0, 1]
    assert check_interval(np.float64(2), 's') == (2.0, 2.0) and check_whole(np.uint8(3), 'n') == 3


def test_values_are_not_looked_at_where_they_cannot_be():
    def model(t):
        check_times(t[None], Z[:1], 't')
        return t * 2

    assert torch.func.vmap(model)(torch.tensor([3.0, 4.0])).tolist() == [6, 8]

    def of_images(z, t):
        check_images(z[None], 'x')
        check_latent(z[None], 'z')
        check_steps(t[None], z[None], 10)
        return z * 2

    wrong = torch.full((2, 1, 4, 4), math.inf)
    assert torch.func.vmap(of_images)(wrong, T + 10).equal(wrong)
    fine = torch.rand(2, 1, 4, 4)
    assert torch.func.vmap(of_images)(fine, T).equal(fine * 2)
    assert known_truth(torch.ones((), device='meta') > 0) is None


def test_noisy_images_may_leave_zero_to_one_up_to_16():
    for reach in (15.0, -15.0, 16.0):
        x = torch.full((1, 1, 4, 4), reach)
        assert check_images(x) is x
    with pytest.raises(ValueError, match=r'x reaches 16.5; expected \[0, 1\]'):
        check_images(torch.full((1, 1, 4, 4), -16.5))
