import os, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

from common import ROOT
import nbformat
import pytest

import restore_lib

BIN = Path(sys.executable).parent


def settings():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def test_version_is_the_one_in_settings():
    assert settings()['version'] == restore_lib.__version__


def test_import_is_light():
    heavy = (
        'torch torchvision lpips matplotlib accelerate numpy skimage sklearn tensorboard'.split()
    )
    code = f'import sys, restore_lib; print([m for m in {heavy} if m in sys.modules])'
    assert (
        subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == '[]'
    )


def test_modules_import_only_what_they_need():
    code = (
        'import sys, restore_lib.data, restore_lib.degrade, restore_lib.learner; '
        'heavy = "lpips matplotlib accelerate skimage sklearn tensorboard".split(); '
        'print([m for m in heavy if m in sys.modules])'
    )
    assert (
        subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == '[]'
    )


@pytest.mark.parametrize('name', ['nbdev_export', 'nbdev-export'])
def test_both_export_commands(name):
    assert (
        'xport notebooks'
        in subprocess.run([BIN / name, '--help'], capture_output=True, text=True, check=True).stdout
    )


def test_every_requirement_is_pinned():
    pinned = {
        re.split('[=;]', l)[0].strip().lower().replace('_', '-')
        for l in (ROOT / 'constraints.txt').read_text().splitlines()
        if l and l[0] != '#'
    }
    asked = (settings()['requirements'] + ' ' + settings()['dev_requirements']).split()
    assert not [r for r in asked if re.split('[<>=]', r)[0].lower().replace('_', '-') not in pinned]


@pytest.mark.parametrize('path', sorted((ROOT / 'nbs').glob('[0-9]*.ipynb')), ids=lambda p: p.stem)
def test_lesson_imports_only_downward(path):
    number = {p.stem[3:]: int(p.stem[:2]) for p in (ROOT / 'nbs').glob('[0-9]*.ipynb')}
    source = '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code')
    used = {m for m in re.findall(r'restore_lib\.(\w+)', source) if m in number}
    assert all(number[m] <= int(path.stem[:2]) for m in used), used


def lesson(folder, *sources):
    nb = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell('# A lesson'),
            *map(nbformat.v4.new_code_cell, sources),
        ]
    )
    (folder / 'nbs').mkdir(exist_ok=True)
    nbformat.write(nb, folder / 'nbs/07_try.ipynb')


@pytest.fixture
def course(tmp_path):
    "tools/course.py in a project of its own."
    (tmp_path / 'tools').mkdir()
    (tmp_path / 'tools/course.py').write_text((ROOT / 'tools/course.py').read_text())
    return lambda *args: subprocess.run(
        [sys.executable, tmp_path / 'tools/course.py', *args],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_course_writes_pages_and_index(course, tmp_path):
    lesson(tmp_path, 'print(6*7)')
    done = course('course')
    assert done.returncode == 0 and '07_try' in done.stdout, done.stderr
    assert (
        '42' in (tmp_path / '_course/07_try.html').read_text()
        and '07_try.html' in (tmp_path / '_course/index.html').read_text()
    )


def test_course_stops_at_a_failing_lesson(course, tmp_path):
    lesson(tmp_path, '1 + 1', 'raise RuntimeError("broken on purpose")')
    done = course('course')
    assert (
        done.returncode != 0
        and '07_try.ipynb, cell 3 of 3' in done.stderr
        and 'broken on purpose' in done.stderr
    )
    assert course('course', '42').returncode != 0


def made(**env):
    "The environment of what make starts."
    out = subprocess.run(
        ['make', '--silent', '--eval=show: ; @env', 'show'],
        cwd=ROOT,
        env=dict(os.environ, **env),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return dict(line.split('=', 1) for line in out.splitlines() if '=' in line)


def test_what_make_starts_spins_briefly(monkeypatch):
    monkeypatch.delenv('GOMP_SPINCOUNT', raising=False)
    assert 0 < int(made()['GOMP_SPINCOUNT']) <= 2000
    assert made(GOMP_SPINCOUNT='7')['GOMP_SPINCOUNT'] == '7'
