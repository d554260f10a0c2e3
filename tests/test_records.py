import ast
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from restore_lib.records import figures, reading, record_figures, says, studies, write_whole

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A project of its own, a budget of two cores, and nothing set by whoever runs the tests."
    for name in ('IN_TEST', 'RESTORE_FIGURES'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('RESTORE_BUDGET', 'cpu')
    (tmp_path / 'restore_lib').mkdir()
    (tmp_path / 'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'data/figures'


# rows of long runs


def test_two_processes_write_rows_at_the_same_time_and_none_is_lost(folder):
    script = (
        'import sys\n'
        'from restore_lib.records import record_study\n'
        'for k in range(20):\n'
        '    record_study("99_example", {"run": sys.argv[1], "k": k}, {"x": k}, 1)\n'
    )
    env = os.environ | {'RESTORE_BUDGET': 'study', 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-c', script]
    runs = [subprocess.Popen([*command, name], env=env, cwd=folder.parents[1]) for name in 'ab']
    assert [run.wait() for run in runs] == [0, 0]
    rows = [(r['config']['run'], r['config']['k']) for r in studies('99_example')]
    assert sorted(rows) == [(name, k) for name in 'ab' for k in range(20)]


# figures


def test_figures_come_back_as_plain_numbers(folder):
    written = record_figures(
        '12_codecs',
        b=torch.tensor(0.5),
        a=np.int64(3),
        text='übel | ok',
        rows=(1, np.float32(2.5)),
        **{'ll-ceiling': {'dB, floor': torch.tensor([30.25]), 'n': 3, 'seeds': [1, 2]}},
    )
    assert (
        written
        == figures('12_codecs')
        == {
            'b': 0.5,
            'a': 3,
            'text': 'übel | ok',
            'rows': [1, 2.5],
            'll-ceiling': {'dB, floor': 30.25, 'n': 3, 'seeds': [1, 2]},
        }
    )
    text = (folder / '12_codecs.json').read_text(encoding='utf-8')
    assert list(json.loads(text)) == sorted(written) and 'übel' in text and text.endswith('}\n')
    assert [p.name for p in folder.iterdir()] == ['12_codecs.json']


def test_a_second_call_replaces_the_first(folder):
    record_figures('12_codecs', old=1)
    record_figures('12_codecs', new=2)
    record_figures('13_diffusion', other=3)
    assert figures('12_codecs') == {'new': 2} and figures('13_diffusion') == {'other': 3}


def test_a_test_run_checks_and_writes_nothing(folder, monkeypatch, tmp_path):
    monkeypatch.setenv('IN_TEST', '1')
    monkeypatch.setenv('RESTORE_FIGURES', str(tmp_path / 'mine'))
    assert record_figures('12_codecs', a=1) == {'a': 1}
    assert not folder.exists() and not (tmp_path / 'mine').exists()
    with pytest.raises(ValueError, match='a is nan'):
        record_figures('12_codecs', a=math.nan)


def test_figures_of_one_s_own_win(folder, monkeypatch, tmp_path):
    record_figures('12_codecs', a=1)
    record_figures('13_diffusion', a=2)
    monkeypatch.setenv('RESTORE_FIGURES', str(tmp_path / 'mine'))
    record_figures('12_codecs', a=10)
    assert figures('12_codecs') == {'a': 10} and figures('13_diffusion') == {'a': 2}
    assert json.loads((folder / '12_codecs.json').read_text()) == {'a': 1}


@pytest.mark.parametrize(
    'values, error, says',
    [
        ({}, ValueError, 'no figures of 12_codecs'),
        ({'a': math.nan}, ValueError, 'a is nan'),
        ({'a': -math.inf}, ValueError, 'a is -inf'),
        ({'a': [1, math.nan]}, ValueError, r'a\[1\] is nan'),
        ({'a': {'dB': torch.tensor(math.inf)}}, ValueError, r"a\['dB'\] is inf"),
        ({'a': {'dB': np.float32('nan')}}, ValueError, r"a\['dB'\] is nan"),
        ({'a': {}}, ValueError, 'a is an empty dict'),
        ({'a': {'b': {'c': 1}}}, TypeError, r"a\['b'\] is dict"),
        ({'a': [[1]]}, TypeError, r'a\[0\] is list'),
        ({'a': np.ones(2)}, ValueError, r'a has shape \(2,\)'),
        ({'a': torch.ones(0)}, ValueError, r'a has shape \(0,\)'),
        ({'a': True}, TypeError, 'a is True'),
        ({'a': np.bool_(True)}, TypeError, 'a is True'),
        ({'a': None}, TypeError, 'a is NoneType'),
        ({'a': 1j}, TypeError, 'a is complex'),
    ],
)
def test_what_is_no_figure_is_named(folder, values, error, says):
    with pytest.raises(error, match=says):
        record_figures('12_codecs', **values)
    assert not folder.exists()


@pytest.mark.parametrize(
    'lesson', ['codecs', '../12_codecs', '12_codecs/../x', '12_codecs\n', '٠٤_audit', 12, '']
)
def test_figures_keep_to_their_folder(folder, lesson):
    with pytest.raises(ValueError, match='lesson is'):
        record_figures(lesson, a=1)
    with pytest.raises(ValueError, match='lesson is'):
        figures(lesson)
    assert not folder.exists()


def test_missing_and_damaged_files_are_named(folder):
    with pytest.raises(FileNotFoundError, match='12_codecs.json is missing'):
        figures('12_codecs')
    folder.mkdir(parents=True)
    for text in ('{"a": ', '[1]', '3'):
        (folder / '12_codecs.json').write_text(text)
        with pytest.raises(ValueError, match='12_codecs.json'):
            figures('12_codecs')


def test_a_file_is_written_whole_or_not_at_all(folder, monkeypatch):
    path = folder / 'a.json'
    write_whole(path, 'first')

    def broken(*_):
        raise OSError('disk full')

    monkeypatch.setattr(Path, 'replace', broken)
    with pytest.raises(OSError, match='disk full'):
        write_whole(path, 'second')
    assert path.read_text() == 'first'


def test_studies_of_a_lesson_without_any(folder):
    assert studies('12_codecs') == []


# sentences

INF = math.inf


@pytest.mark.parametrize(
    'text, low, high',
    [
        ('1 dB', 0.5, 1.5),
        ('2.6 dB', 2.55, 2.65),
        ('2.60 dB', 2.595, 2.605),
        ('20 dB', 19.5, 20.5),
        ('1,200 steps', 1199.5, 1200.5),
        ('12,345.6', 12345.55, 12345.65),
        ('1200', 1199.5, 1200.5),
        ('-0.3 dB', -0.35, -0.25),
        ('\u22120.3 dB', -0.35, -0.25),
        ('+0.3 dB', 0.25, 0.35),
        ('0', -0.5, 0.5),
        ('75 %', 74.5, 75.5),
        ('75%', 74.5, 75.5),
        ('three times', 2.5, 3.5),
        ('Twelve images', 11.5, 12.5),
        ('twice', 1.5, 2.5),
        ('about 1 dB', 0.5, 1.5),
        ('About  1  dB', 0.5, 1.5),
        ('about 20 dB', 19, 21),
        ('about 30 dB', 29, 31),
        ('about 5 dB', 4.5, 5.5),
        ('about 7 dB', 6.3, 7.7),
        ('about 1,200 steps', 1199, 1201),
        ('about 0.3 dB', 0.25, 0.35),
        ('about -8 dB', -8.8, -7.2),
        ('about ten', 9, 11),
        ('half', 0.45, 0.55),
        ('half of the error', 0.45, 0.55),
        ('about a third', 0.3, 1.1 / 3),
        ('two thirds', 0.6, 2.2 / 3),
        ('a quarter', 0.225, 0.275),
        ('three quarters', 0.675, 0.825),
        ('at least 1 dB', 1, INF),
        ('at most 1 dB', -INF, 1),
        ('exactly 16 bands', 16, 16),
        ('0.2 to 0.4 dB', 0.15, 0.45),
        ('between 0.2 and 0.4 dB', 0.15, 0.45),
        ('between 2 and 3.0', 1.5, 3.05),
        ('-3 to -1 dB', -3.5, -0.5),
        ('two to three', 1.5, 3.5),
        ('3 dB.', 2.5, 3.5),
        ('3, roughly', 2.5, 3.5),
        ('3 dB at x4', 2.5, 3.5),
        ('two thirds of the error', 0.6, 2.2 / 3),
        ('half a decibel', 0.45, 0.55),
        ('three quarters to twice', 0.675, 2.5),
        ('five seconds each', 4.5, 5.5),
        ('three in a hundred', 2.5, 3.5),
    ],
)
def test_reading(text, low, high):
    assert reading(text) == pytest.approx((low, high), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize('word', ['over', 'more than', 'above'])
def test_strict_bounds_leave_the_number_out(word):
    if word == 'above':
        with pytest.raises(ValueError):
            reading(f'{word} 3')
        return
    low, high = reading(f'{word} 3 dB')
    assert 3 < low < 3 + 1e-9 and high == INF


@pytest.mark.parametrize('word', ['under', 'less than', 'below'])
def test_strict_bounds_from_above(word):
    low, high = reading(f'{word} a quarter')
    assert low == -INF and 0.25 - 1e-9 < high < 0.25


@pytest.mark.parametrize(
    'text',
    [
        '',
        'dB',
        'a few dB',
        'a decibel and a half',
        'two decibels and a half',
        'gains 3 dB',
        'nearly 3 dB',
        'not 3 dB',
        'about about 3',
        'about 2 to 3 dB',
        'over between 2 and 3',
        '3 of 4 images',
        'three of four images',
        'three of twenty images',
        'one in ten images',
        'one in a hundred and ten',
        'one to three of ten',
        'one third of the error',
        'one quarter',
        'four fifths',
        'three hundred steps',
        'two to three thousand',
        'two million weights',
        '2 million weights',
        'three dozen',
        'half a million',
        '3 dB, twice as much',
        '3 dB in 15 steps',
        '3 and 4 dB',
        'between 3 to 4 dB',
        'between 3',
        '4 to 3 dB',
        '1,20 steps',
        '12,5 dB',
        '1e-5',
        'x4',
        '3x',
        '3dB',
        'thirteen',
        'nan',
    ],
)
def test_what_cannot_be_read_is_refused(text, monkeypatch):
    with pytest.raises(ValueError, match='text is'):
        reading(text)
    monkeypatch.setenv('IN_TEST', '1')
    with pytest.raises(ValueError, match='text is'):
        says('gain', 3.0, text)


def test_text_that_is_none():
    with pytest.raises(TypeError, match='text is float'):
        reading(3.0)


def test_says_holds_and_fails(folder):
    says('gain', 1.2, 'about 1 dB')
    says('gain', torch.tensor(1.2), 'about 1 dB')
    says('gain', np.float32(2.6), '2.6 dB')
    says('sum', 0.1 + 0.2, 'exactly 0.3')
    says('edge', 0.25, 'about 0.3 dB')
    says('seeds', [0.21, 0.33, 0.38], '0.2 to 0.4 dB')
    for value, text in (
        (2.6, 'about 1 dB'),
        (0.1, 'over 0.1 dB'),
        (math.nan, 'about 1 dB'),
        (math.nan, 'over 1 dB'),
        ([1.0, 2.0], '1 dB'),
        (1.0, 'below 1 dB'),
    ):
        with pytest.raises(AssertionError, match=f'gain is .*{re.escape(text)}'):
            says('gain', value, text)
    with pytest.raises(AssertionError, match="share is 0.75; .*'75 %'.*100\\*share"):
        says('share', 0.75, '75 %')


def test_about_is_never_narrower_than_the_number_nor_twice_as_wide():
    for number in ('0', '0.03', '0.5', '1', '1.0', '4', '6', '9', '12', '30', '999', '1,000'):
        (low, high), (about_low, about_high) = reading(number), reading(f'about {number}')
        assert about_low <= low and high <= about_high, number
        assert about_high - about_low <= 2.001 * (high - low), number


def test_a_sentence_needs_a_value(folder, monkeypatch):
    for empty in ([], ()):
        with pytest.raises(ValueError, match='gains is an empty'):
            says('gains', empty, '1 dB')
    monkeypatch.setenv('IN_TEST', '1')
    with pytest.raises(ValueError, match='expected at least one value'):
        says('gains', [], '1 dB')


def test_says_in_other_budgets(folder, monkeypatch):
    monkeypatch.setenv('RESTORE_BUDGET', 'study')
    with pytest.warns(UserWarning, match='gain is 2.6'):
        says('gain', 2.6, 'about 1 dB')
    monkeypatch.setenv('IN_TEST', '1')
    says('gain', 2.6, 'about 1 dB')
    says('gain', None, 'about 1 dB')


BOUNDS = 'over', 'under', 'below', 'more than', 'less than', 'at least', 'at most', 'exactly'
COUNTS = 'zero one two three four five six seven eight nine ten eleven twelve'.split()


def stands_in(text, prose):
    "Is the number of a text in the prose, as digits or as a word? A bound may be in other words."
    if text in prose or text.startswith(BOUNDS):
        return True
    tokens = re.findall(rf'\d[\d.,]*\d|\d|{"|".join(COUNTS)}', text)
    for token in tokens:
        same = {token}
        if token in COUNTS:
            same.add(str(COUNTS.index(token)))
        elif token.isdigit() and int(token) < len(COUNTS):
            same.add(COUNTS[int(token)])
        if not any(re.search(rf'(?<![\w.]){re.escape(t)}(?!\w)', prose) for t in same):
            return False
    return bool(tokens)


def test_what_says_holds_stands_in_the_text():
    "The number of a `says` call must stand in the text of the notebook that it guards."
    for path in sorted((ROOT / 'nbs').glob('[0-9]*.ipynb')):
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        text = [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']
        prose = ' '.join(' '.join(text).split()).lower()
        code = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
        if not any(re.search(r'restore_lib\.records import .*\bsays\b', s) for s in code):
            continue
        for source in code:
            if 'says(' not in source:
                continue
            tree = ast.parse(re.sub(r'^\s*[%!].*$', '', source, flags=re.M))
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'says':
                    said = node.args[2]
                    if isinstance(said, ast.Constant):
                        missing = f'{path.name}: no text says {said.value!r}'
                        assert stands_in(said.value.lower(), prose), missing


@pytest.mark.parametrize('text, prose, stands', [
    ('about 1 dB', 'gains about 1 db', True),
    ('20.9 dB', 'hence 20.9.', True),
    ('about ten dB', 'almost 10 decibels', True),
    ('3 %', 'three patches in a hundred', True),
    ('over 0 dB', 'wins', True),
    ('68 dB', 'gains 6 or 168', False),
    ('0.9 dB', 'gains 20.9', False),
])
def test_a_number_stands_in_the_text(text, prose, stands):
    assert stands_in(text.lower(), prose) is stands
