"restore_lib.realworld: shapes, ranges, what a calm chain leaves, what makes no sense."

from common import gen
import numpy as np
import pytest
import torch

from restore_lib.realworld import Round, SECOND_ROUND, second_order

NAN = float('nan')
X = torch.rand(2, 3, 32, 32)


@pytest.mark.parametrize(
    'shape,scale',
    [((3, 3, 64, 80), 4), ((2, 1, 30, 33), 3), ((1, 3, 16, 16), 1), ((2, 3, 8, 8), 4)],
)
def test_second_order(shape, scale):
    x = torch.rand(shape, generator=gen())
    for seed in range(8):
        y = second_order(x, scale, gen(seed))
        assert (
            y.shape == (*shape[:2], shape[2] // scale, shape[3] // scale)
            and torch.isfinite(y).all()
            and 0 <= y.min()
            and y.max() <= 1
        )
        assert torch.allclose(y * 255, (y * 255).round(), atol=1e-3)
    calm = Round(
        sigma=(0.01, 0.01),
        sinc_prob=0,
        resize_prob=(0, 0, 1),
        gaussian_prob=1,
        noise=(0, 0),
        jpeg=(100, 100),
    )
    flat = second_order(torch.full(shape, 0.5), scale, gen(), calm, calm, final_sinc_prob=0)
    assert (flat - 0.5).abs().max() < 0.02  # nothing left to do but to shrink


def test_one_number_is_a_range_of_one():
    assert Round(sigma=np.float32(0.5), jpeg=np.int64(40)).sigma == (0.5, 0.5)
    y = second_order(
        X,
        4,
        gen(),
        Round(sigma=1, noise=0, poisson=0, jpeg=50),
        Round(sigma=(1, 1), noise=(0, 0), poisson=(0, 0), jpeg=(50, 50)),
    )
    assert torch.isfinite(y).all()


# what makes no sense

WRONG = [
    (lambda: second_order(X, 3), ValueError, 'multiples'),
    (lambda: second_order(X * float('nan')), ValueError, 'NaN'),
    (lambda: second_order(X, 4, final_sinc_prob=3), ValueError, 'final_sinc_prob is 3'),
    (lambda: second_order(X, 4, first=dict()), TypeError, 'first is'),
    *[
        (lambda kw=kw: Round(**kw), ValueError, next(iter(kw)))
        for kw in (
            dict(blur_prob=7),
            dict(sinc_prob=-0.1),
            dict(gaussian_prob=NAN),
            dict(grey_prob=1.01),
            dict(sigma=(-3, -1)),
            dict(sigma=(0, 1)),
            dict(sigma=(3, 1)),
            dict(resize=(0, 1)),
            dict(resize=(1.1, 1.5)),
            dict(resize=(0.2, 0.8)),
            dict(noise=(-0.1, 0.1)),
            dict(noise=(0, 25)),
            dict(poisson=(3, 1)),
            dict(jpeg=(0, 95)),
            dict(jpeg=(30, 101)),
            dict(resize_prob=(0, 0, 0)),
            dict(resize_prob=(1, -1, 1)),
            dict(resize_prob=(1, 1)),
            dict(sigma=(1, NAN)),
        )
    ],
    (lambda: Round(blur_prob='often'), TypeError, 'blur_prob'),
]


@pytest.mark.parametrize('case', range(len(WRONG)))
def test_what_makes_no_sense_is_named(case):
    call, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        call()


# what the chain does


def test_watch_sees_every_step_and_changes_nothing():
    x, seen = torch.rand(2, 3, 32, 48, generator=gen()), []
    for seed in range(6):
        seen.clear()
        y = second_order(x, 4, gen(seed), watch=lambda name, y: seen.append((name, y.shape)))
        assert torch.equal(y, second_order(x, 4, gen(seed)))
        names = [name.split(' x ')[0] for name, _ in seen]
        assert names[:7] == ['blur', 'resize', 'noise', 'JPEG', 'blur', 'resize', 'noise']
        assert sorted(names[7:]) == ['JPEG', 'resize, sinc'] and seen[-1][1] == y.shape


def test_both_orders_of_the_last_steps_are_drawn():
    ends = []
    for seed in range(20):
        names = []
        second_order(X[:1], 4, gen(seed), watch=lambda name, y: names.append(name))
        ends.append(names[-1])
    assert 4 < ends.count('JPEG') < 16 and set(ends) == {'JPEG', 'resize, sinc'}


def test_the_second_round_is_milder():
    first = Round()
    for name in ('sigma', 'noise', 'poisson'):
        assert getattr(SECOND_ROUND, name)[1] < getattr(first, name)[1]
    assert SECOND_ROUND.resize[0] > first.resize[0] and SECOND_ROUND.jpeg == first.jpeg
