"The drawings are what their script draws; no text overflows, overlaps or is crossed by a line."

import re
import xml.etree.ElementTree as ElementTree
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / 'images' / 'diagrams'
FILES = sorted(FOLDER.glob('*.svg'))
SVG = '{http://www.w3.org/2000/svg}'


@pytest.fixture(scope='module')
def modules():
    "Of the script: a function of a module's name."
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield import_module


@pytest.fixture(scope='module')
def drawings(modules):
    return modules('draw').drawings()


def test_files_are_as_drawn(modules, tmp_path):
    modules('draw').write(tmp_path)
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_bytes() for path in FILES}
    differ = [name for name in drawn.keys() | kept.keys() if drawn.get(name) != kept.get(name)]
    assert not differ, f'run `python images/diagrams/draw.py` and commit: {sorted(differ)}'


def test_write_removes_what_is_no_longer_drawn(modules, tmp_path):
    (tmp_path / 'old.svg').write_text('<svg/>')
    modules('draw').write(tmp_path)
    assert not (tmp_path / 'old.svg').exists()


def test_nothing_overflows_or_overlaps(drawings):
    assert not [f'{d.name}: {problem}' for d in drawings for problem in d.problems()]


def test_the_check_speaks(modules):
    d = modules('vocabulary').Drawing('wrong', 100, '')
    d.box(100, 50, 'a name that is too long for its box', w=60)
    d.box(120, 60, 'on it')
    d.note(740, 20, 'leaves the page')
    d.path([(60, 20), (140, 90)])
    found = ' '.join(d.problems())
    for word in ('leaves its box', 'leaves the page', 'boxes overlap', 'is crossed', 'overlaps'):
        assert word in found


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_each_file(path):
    root = ElementTree.fromstring(path.read_bytes())
    assert root.tag == SVG + 'svg' and root.get('width') == '760'
    assert len(root.find(SVG + 'title').text) > 20
    text = path.read_text(encoding='utf-8')
    assert 'prefers-color-scheme:dark' in text
    assert len(text.encode()) < 40_000
    assert text.count('http') == 1, 'nothing is fetched; only the namespace is named'
    assert min(map(int, re.findall(r'(\d+)px', text))) >= 13
    assert not re.search(r'\d\.\d\d+"', text), 'one decimal at most'


def test_maps_fit_the_course(modules, drawings):
    lessons = modules('course_map').LESSONS
    notebooks = [path.stem for path in (ROOT / 'nbs').glob('[0-9][0-9]_*.ipynb')]
    assert set(notebooks) <= set(lessons)
    maps = [d for d in drawings if d.name.split('.')[-1] == 'map']
    assert {d.name for d in maps} == {'map', *(f'{lesson}.map' for lesson in lessons)}
    assert all(d.height <= 170 for d in maps)
    numbers = {lesson[:2] for lesson in lessons}
    for lesson, base in modules('course_map').STANDS_ON.items():
        assert {lesson, *base.split()} <= numbers and all(b < lesson for b in base.split())
    assert {d.name.split('.')[0] for d in drawings} <= {'map', *lessons}
