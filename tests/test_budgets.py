"The module `project`: which budget a run has, and how many steps it gives."

import numpy as np
import pytest

from restore_lib import project
from restore_lib.project import budget


@pytest.mark.parametrize(
    'env, expect',
    [
        ({'IN_TEST': '1'}, 20),
        ({'RESTORE_BUDGET': 'study'}, 20_000),
        ({'RESTORE_BUDGET': 'cpu'}, 1500),
    ],
)
def test_budget(monkeypatch, env, expect):
    for k in ('IN_TEST', 'RESTORE_BUDGET'):
        monkeypatch.delenv(k, raising=False)
    for k, v in env.items():
        monkeypatch.setenv(k, v)
    assert budget() == expect


def test_budget_unknown(monkeypatch):
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setenv('RESTORE_BUDGET', 'huge')
    with pytest.raises(ValueError, match="'huge'"):
        budget()


@pytest.mark.parametrize(
    'value, mode',
    [
        ('0', 'study'),
        ('false', 'study'),
        ('No', 'study'),
        (' off ', 'study'),
        ('', 'study'),
        ('1', 'test'),
        ('true', 'test'),
        ('yes', 'test'),
    ],
)
def test_in_test_zero_is_no_test(monkeypatch, value, mode):
    monkeypatch.setenv('IN_TEST', value)
    monkeypatch.setenv('RESTORE_BUDGET', 'study')
    assert project.budget_mode() == mode


@pytest.mark.parametrize(
    'name, value',
    [('test', -1), ('cpu', -3), ('study', -1.0), ('gpu', np.int64(-2)), ('test', float('nan'))],
)
def test_budgets_are_not_negative(monkeypatch, name, value):
    monkeypatch.setenv('IN_TEST', '1')
    with pytest.raises(ValueError, match=f'{name} is .*; expected a number from 0'):
        budget(**{name: value})
    assert budget(test=(0, 1)) == (0, 1) and budget(test=0) == 0 and budget(np.int64(3)) == 3
