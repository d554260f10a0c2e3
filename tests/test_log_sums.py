"""What the appendix on logs does not show: numbers of all kinds, rounding, bad lines, and what the
claims rest on."""

import math

import numpy as np
import pytest

from restore_lib.claims import read_claims
from restore_lib.log_sums import log_figures, read_log, schedule_rows

LOG = """
typical:
Iter 2600: loss=0.2890, mse=0.0136, lpips=0.5507
Iter 2900: loss=0.0356, mse=0.0091, lpips=0.0530
Iter 4900: loss=0.0270, mse=0.0045, lpips=0.0451
Validation PSNR: 9.65 dB, SSIM: 0.2881
"""
SAMPLE = """
Iter 1000:  loss=0.0320, mse=0.0050, lpips=0.2800, lpips_w=0.0114, lr=5.00e-05
Iter 50000: loss=0.0280, mse=0.0050, lpips=0.2800, lpips_w=0.0800, lr=2.50e-05
"""


# --- the log

def test_the_logs_lines_are_sums():
    rows = read_log(LOG, lam=0.5)
    assert [r['iteration'] for r in rows] == [2600, 2900, 4900] and all(r['holds'] for r in rows)
    assert (
        rows[0]['sum'] == pytest.approx(0.0136 + 0.5 * 0.5507)
        and rows[0]['implied lam'] == pytest.approx(0.5, abs=1e-3)
        and rows[0]['lam'] == 0.5
    )
    assert not any(r['holds'] for r in read_log(LOG, lam=0.1)) and not any(
        r['holds'] for r in read_log(LOG, lam=1.0)
    )
    (row,) = read_log('Iter 400: loss=0.0432, mse=0.0065, lpips=0.3667', 0.1)
    assert row['holds']


def test_the_sample_lines_are_not():
    rows = read_log(SAMPLE)
    assert [r['lam'] for r in rows] == [0.0114, 0.08] and not any(r['holds'] for r in rows)
    assert (
        rows[0]['off'] == pytest.approx(0.0320 - 0.008192)
        and rows[1]['off'] == pytest.approx(0.0006)
        and rows[1]['rounding'] < 0.0002
    )
    assert read_log(SAMPLE, lam=0.5) == rows  # what a line says counts


def test_rounding_is_allowed_and_no_more():
    line = 'Iter 1: loss={:.4f}, mse=0.0050, lpips=0.2800, lpips_w=0.1000'
    assert (
        read_log(line.format(0.0331))[0]['holds'] and not read_log(line.format(0.0332))[0]['holds']
    )
    assert (
        read_log('Iter 1: loss=3, mse=1, lpips=1', 1.0)[0]['holds']
        and not read_log('Iter 1: loss=4, mse=1, lpips=1', 1.0)[0]['holds']
    )
    assert (
        not read_log('Iter 2: loss=0.0100, mse=0.0100, lpips=0.1', 0.01)[0]['holds']
        and read_log('Iter 2: loss=0.0106, mse=0.0100, lpips=0.1', 0.01)[0]['holds']
    )
    assert read_log('Iter 3: loss=1.5e-3, mse=5e-4, lpips=1e-2', 0.1)[0]['sum'] == pytest.approx(
        1.5e-3
    )


@pytest.mark.parametrize(
    'text, lam, says',
    [
        ('', 0.5, 'no line'),
        ('loss=1', 0.5, 'no line'),
        ('Iter 5: loss=1, mse=1', 0.5, 'has no lpips'),
        ('Iter 5: loss=1, mse=1, lpips=1', None, 'no lpips_w'),
    ],
)
def test_bad_log(text, lam, says):
    with pytest.raises(ValueError, match=says):
        read_log(text, lam)


# --- numbers of all kinds, in logs and as arguments


def row(parts, lam=None):
    return read_log(f'Iter 1: {parts}', lam)[0]


def test_exponents_of_a_log_round_at_their_own_last_digit():
    r = row('loss=9.99e-02, mse=6.5e-03, lpips=3.667e-01, lpips_w=0.1')
    assert (
        not r['holds']
        and r['off'] == pytest.approx(0.05673)
        and r['rounding'] == pytest.approx(0.5e-4 + 0.5e-4 + 0.1 * 0.5e-4 + 0.3667 * 0.05)
    )
    plain, as_exponents = (
        row('loss=0.0432, mse=0.0065, lpips=0.3667', 0.1),
        row('loss=4.32E-2, mse=6.5e-3, lpips=3667e-4', 0.1),
    )
    assert (
        plain['rounding'] == pytest.approx(as_exponents['rounding'])
        and plain['holds']
        and as_exponents['holds']
    )
    assert row('loss=12e2, mse=1e3, lpips=4e2', 0.5)['rounding'] == pytest.approx(
        50 + 500 + 0.5 * 50
    )


@pytest.mark.parametrize('loss, holds', [(-0.5, True), (-0.3, False), (1.5, False)])
def test_signs_of_a_log(loss, holds):
    r = row(f'loss={loss}, mse=+0.5, lpips=2.000, lpips_w=-0.500')
    assert (
        r['holds'] == holds
        and r['loss'] == loss
        and r['lam'] == -0.5
        and r['rounding'] == pytest.approx(0.05 + 0.05 + 0.5 * 0.0005 + 2 * 0.0005)
    )


@pytest.mark.parametrize(
    'parts',
    [
        'loss=nan, mse=0.1, lpips=0.1',
        'loss=NaN, mse=nan, lpips=nan',
        'loss=inf, mse=inf, lpips=1',
        'loss=1, mse=1, lpips=inf',
        'loss=-Infinity, mse=1, lpips=1',
        'loss=inf, mse=1, lpips=1',
    ],
)
def test_what_is_not_finite_in_a_log_is_read_and_never_holds(parts):
    r = row(parts, 0.5)
    assert (
        not r['holds']
        and not all(math.isfinite(r[k]) for k in ('loss', 'mse', 'lpips'))
        and not math.isfinite(r['off'])
    )


def test_thousands_of_a_log():
    r = read_log('Iter 1,200: loss=1,234.5, mse=1,230.0, lpips=9.000', 0.5)[0]
    assert (r['iteration'], r['loss'], r['mse'], r['lpips']) == (1200, 1234.5, 1230.0, 9.0) and r[
        'holds'
    ]
    assert (
        row('loss=3,mse=1,lpips=2', 1.0)['loss'] == 3
        and row('loss=12,345,678 mse=12,345,677 lpips=1', 1.0)['sum'] == 12345678
    )


@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
def test_line_ends_and_other_lines_of_a_log(end):
    text = end.join(
        [
            '\ufeffstart',
            '',
            'Iter 1: loss=0.10, mse=0.05, lpips=0.50, lpips_w=0.1',
            'val: loss=9',
            'Iter 2: loss=0.30, mse=0.05, lpips=0.50, lpips_w=0.1',
            '',
        ]
    )
    assert [(r['iteration'], r['loss'], r['lam'], r['holds']) for r in read_log(text)] == [
        (1, 0.1, 0.1, True),
        (2, 0.3, 0.1, False),
    ]


def test_names_that_end_alike_are_other_numbers():
    assert row(
        'loss=0.5, mse=0.3, lpips=0.2, val_loss=9, val/loss=8, val.mse=7, best-lpips=6', 1.0
    )['holds']


@pytest.mark.parametrize(
    'text, error, says',
    [
        ('Iter 1: loss=0,0432, mse=0.1, lpips=1', ValueError, 'has a loss that is no number'),
        ('Iter 1: loss=-, mse=0.1, lpips=1', ValueError, 'has a loss that is no number'),
        ('Iter 1: loss=1.2.3, mse=0.1, lpips=1', ValueError, 'no number'),
        ('Iter 1: loss=1, mse=0x1, lpips=1', ValueError, 'has a mse that is no number'),
        ('Iter 1: loss=1, loss=2, mse=1, lpips=1', ValueError, 'has loss twice'),
        ('\r\n', ValueError, 'no line'),
        (b'Iter 1: loss=1', TypeError, 'text is bytes'),
        (None, TypeError, 'text is NoneType'),
    ],
)
def test_what_is_no_log_is_named(text, error, says):
    with pytest.raises(error, match=says):
        read_log(text, 0.5)


@pytest.mark.parametrize('lam', [math.nan, -1.0, math.inf])
def test_bad_weight_for_a_log(lam):
    with pytest.raises(ValueError, match='lam is'):
        read_log(LOG, lam)


def test_an_exponent_that_no_float_holds_is_infinite_and_never_holds():
    r = row('loss=1e400, mse=1e-400, lpips=1', 0.5)
    assert r['loss'] == math.inf and r['mse'] == 0 and not r['holds']


@pytest.mark.parametrize('step, n', [('1e3', 1000), ('1.5E+3', 1500), ('2.0', 2), ('1,200', 1200)])
def test_an_iteration_may_have_an_exponent(step, n):
    (r,) = read_log(f'Iter {step}: loss=2, mse=1, lpips=1', 1.0)
    assert r['iteration'] == n and r['holds']


@pytest.mark.parametrize('step', ['1.5', '1e-3', 'nan', '-2', '1e400'])
def test_an_iteration_is_a_whole_number(step):
    with pytest.raises(ValueError, match='expected a whole number'):
        read_log(f'Iter {step}: loss=2, mse=1, lpips=1', 1.0)


def test_a_typographic_minus_is_one():
    r = row('loss=\u22120.5, mse=5e\u22121, lpips=2.000', 0.0)
    assert r['loss'] == -0.5 and r['mse'] == 0.5 and not r['holds']


def test_numbers_of_numpy_as_weights():
    assert read_log(LOG, np.float32(0.5)) == read_log(LOG, 0.5)


def test_one_row_of_the_schedule_disagrees():
    assert [r['iteration'] for r in schedule_rows() if not r['agrees']] == ['80K']


def test_each_claim_on_the_logs_arithmetic_has_its_figures():
    rows = {row['id']: row for row in read_claims()['claims']}
    for name, found in log_figures().items():
        assert set(rows[f'17_weights.{name}']['keys']) <= set(found)
