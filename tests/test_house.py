"What holds for every module and notebook of the house: names, imports, sizes."

import ast
import re
import subprocess
import sys

import nbformat
import pytest

from common import ROOT

# not the copies that Jupyter keeps beside a notebook that was opened
FOLDERS = ROOT / 'nbs', ROOT / 'nbs/appendix'
NOTEBOOKS = sorted(p for folder in FOLDERS for p in folder.glob('[!.]*.ipynb'))
MODULES = sorted(p.stem for p in (ROOT / 'restore_lib').glob('[!_]*.py'))
HEAVY = 'lpips stlpips_pytorch torchvision matplotlib accelerate skimage sklearn tensorboard timm'


def cells(path):
    return [c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code']


def imports_of(source):
    source = re.sub(r'^(\s*)[%!].*$', r'\1pass', source, flags=re.M)
    return [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_no_private_name_crosses_a_module(path):
    for source in cells(path):
        for found in imports_of(source):
            if (found.module or '').startswith('restore_lib'):
                private = [a.name for a in found.names if a.name.startswith('_')]
                assert not private, f'{found.module} gives {private}'


def test_imports_stay_light():
    "One process a module would take minutes: one for all, which names who loads what."
    code = f"""
import importlib, sys
heavy = set('{HEAVY}'.split())
for name in {MODULES}:
    before = heavy & set(sys.modules)
    importlib.import_module('restore_lib.' + name)
    new = heavy & set(sys.modules) - before
    if new:
        print(name, *sorted(new))
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout == ''


def test_no_name_is_exported_twice():
    homes = {}
    for name in MODULES:
        tree = ast.parse((ROOT / f'restore_lib/{name}.py').read_text())
        listed = next(n for n in tree.body if isinstance(n, ast.Assign))
        for public in ast.literal_eval(listed.value):
            homes.setdefault(public, []).append(name)
    assert not {k: v for k, v in homes.items() if len(v) > 1}


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_every_lesson_shows_the_map_and_follows_the_export(path):
    if path.parent.name == 'appendix':
        pytest.skip('the appendix is no part of the path')
    text = path.read_text(encoding='utf-8')
    assert f'diagrams/{path.stem}.map.svg' in text
    assert any('%autoreload 2' in s for s in cells(path))


def test_the_readme_links_every_appendix_notebook():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    missing = [p for p in (ROOT / 'nbs/appendix').glob('[!.]*.ipynb') if f'/{p.name})' not in text]
    assert not missing
