import base64
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from common import ROOT
from jupyter_server.services.contents.largefilemanager import LargeFileManager
from traitlets.config import PyFileConfigLoader

import restore_lib
from restore_lib.project import data_home, project_home, runs_home

BIN = Path(sys.executable).parent
LESSONS = sorted((ROOT / 'nbs').glob('[0-9]*.ipynb'))
APPENDIX = sorted((ROOT / 'nbs').glob('appendix/*.ipynb'))


def settings():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def test_version_is_the_one_in_settings():
    assert settings()['version'] == restore_lib.__version__


def loaded(statement, names):
    "Which of the modules `names` are there after `statement` in a new interpreter."
    code = f'import sys; {statement}; print(*[m for m in {names.split()} if m in sys.modules])'
    command = [sys.executable, '-c', code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_import_is_light():
    heavy = 'torch torchvision lpips matplotlib accelerate numpy skimage sklearn tensorboard'
    assert not loaded('import restore_lib', heavy)


def test_modules_import_only_what_they_need():
    modules = 'import restore_lib.data, restore_lib.degrade, restore_lib.learner'
    assert not loaded(modules, 'lpips matplotlib accelerate skimage sklearn tensorboard')


@pytest.mark.parametrize('name', ['nbdev_export', 'nbdev-export'])
def test_both_export_commands(name):
    assert (
        'xport notebooks'
        in subprocess.run([BIN / name, '--help'], capture_output=True, text=True, check=True).stdout
    )


def test_folders_are_those_of_the_project_inside_and_of_the_working_directory_outside(
    tmp_path, monkeypatch
):
    monkeypatch.delenv('RESTORE_DATA', raising=False)
    monkeypatch.delenv('RESTORE_RUNS', raising=False)
    for folder in (ROOT, ROOT / 'nbs' / 'appendix', ROOT / 'bench'):
        monkeypatch.chdir(folder)
        assert (data_home(), runs_home()) == (ROOT / 'data', ROOT / 'runs')
    monkeypatch.chdir(tmp_path)
    assert project_home() == tmp_path
    assert (data_home(), runs_home()) == (tmp_path / 'data', tmp_path / 'runs')
    monkeypatch.setenv('RESTORE_DATA', str(ROOT / 'data'))
    assert data_home() == ROOT / 'data'


def test_every_requirement_is_pinned():
    pinned = {
        re.split('[=;]', l)[0].strip().lower().replace('_', '-')
        for l in (ROOT / 'constraints.txt').read_text().splitlines()
        if l and l[0] != '#'
    }
    extras = 'dev', 'bm3d', 'cluster', 'public'
    kinds = 'requirements', *(f'{name}_requirements' for name in extras)
    asked = ' '.join(settings()[kind] for kind in kinds).split()
    assert not [r for r in asked if re.split('[<>=]', r)[0].lower().replace('_', '-') not in pinned]


# What modules of the appendix may use of the lessons; everything else of it stands on the appendix.
ALLOWED = {
    'realworld': {'degrade'},
    'plots': {'metrics'},
    'ladder': {'metrics'},
    'denoiser': {'data', 'degrade', 'metrics', 'learner'},  # trains the library's weights
    'infrared': {'data', 'degrade', 'superres'},  # so does this
    'superres_scores': {'degrade', 'wavelets'},
    # what lesson 15's models are made of, and the command that trains them
    'superres_training': {'codecs', 'data', 'degrade', 'diffusion', 'learner', 'metrics', 'unet'},
    'superres_command': {'data', 'superres'},
    'mae_training': {'audit', 'data', 'learner', 'mae', 'patching'},  # so does this
    'mae_parts': {'patching'},
    'label_study': {'data', 'mae', 'transfer'},  # the long study of lesson 07
    'label_curves': {'audit', 'transfer'},  # and how it is read
    'code_parts': {'patching'},
    'tokenizers': {'codebook'},
    # trains weights, too
    'code_studies': {'codebook', 'data', 'learner', 'metrics', 'patching'},
    'published_mae': {'patching'},
    # a command around lesson 23, and what it makes of clean images
    'restore_command': {'data', 'degrade', 'metrics', 'restorers'},
    'restorer_scores': {'data', 'degrade', 'metrics'},  # the study behind `pick_restorer`
    'two_stage_parts': {'degrade', 'metrics'},
    # the long study of lesson 10
    'two_stage_study': {'audit', 'data', 'dmae', 'learner', 'metrics', 'two_stage'},
    'published_dmae': {'data', 'degrade', 'dmae', 'metrics', 'patching'},
    'certificates': {'degrade', 'learner', 'mae', 'transfer'},
    # files, costs and the study of lesson 12's codecs
    'codec_parts': {'wavelets'},
    'codec_files': {'codecs'},
    'codec_costs': {'codecs', 'metrics', 'unet'},
    'codec_study': {'codecs', 'data', 'degrade', 'metrics'},
    'shift_toys': {'diffusion', 'wavelets'},  # toys of lesson 13
    'unet_costs': {'metrics', 'unet'},
    # the study of lessons 13 and 14, and its weights
    'unet_study': {'data', 'degrade', 'diffusion', 'learner', 'metrics', 'unet', 'wavelets'},
    # the study of lesson 15
    'superres_study': {
        'codecs', 'data', 'degrade', 'diffusion', 'metrics', 'superres', 'unet', 'wavelets',
    },
    # the table of lesson 18, and its study
    'ablation_tables': {'audit'},
    'ablation_study': {
        'ablations', 'codecs', 'metrics', 'perceptual', 'superres', 'weights',
    },
    # the study of lesson 16
    'perceptual_study': {'codecs', 'data', 'degrade', 'learner', 'metrics', 'superres'},
    # the study of lesson 17
    'weights_study': {
        'codecs', 'degrade', 'metrics', 'perceptual', 'superres', 'weights',
    },
    # the study of lesson 22, the weights that it leads to, public checkpoints
    'baselines_study': {
        'baselines', 'codecs', 'data', 'degrade', 'learner', 'metrics', 'superres',
    },
    'photo_x4': {'baselines', 'data', 'learner', 'metrics'},
    'field_scores': {'metrics'},
    # the study of lesson 09, and its weights
    'dmae_study': {'audit', 'degrade', 'dmae', 'learner', 'mae', 'metrics'},
}
# What any appendix notebook may use in cells that are not exported, to show what it does.
SHOWN = {'data', 'degrade', 'metrics'}


def cells(path, kind):
    return [c.source for c in nbformat.read(path, 4).cells if c.cell_type == kind]


def modules_used(sources):
    "The modules of the library that code names."
    return set(re.findall(r'restore_lib\.(\w+)', '\n'.join(sources)))


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_lesson_uses_lessons_above_it_and_the_appendix(path):
    number = {p.stem[3:]: int(p.stem[:2]) for p in LESSONS}
    below = [m for m in modules_used(cells(path, 'code')) if number.get(m, -1) > int(path.stem[:2])]
    assert not below, f'{path.stem} uses {below}, lessons that come later'


def test_appendix_uses_no_lesson_that_the_table_does_not_allow():
    lessons = {p.stem[3:] for p in LESSONS}
    assert not lessons & {p.stem for p in APPENDIX}
    for path in APPENDIX:
        code = cells(path, 'code')
        exported = [source for source in code if re.match(r'#\|\s*export', source)]
        allowed = ALLOWED.get(path.stem, set())
        assert not modules_used(exported) & lessons - allowed, path.stem
        assert not modules_used(code) & lessons - allowed - SHOWN, path.stem


def test_each_module_has_its_notebook():
    edited = re.compile('File to edit: (.+[.]ipynb)')
    for module in (ROOT / 'restore_lib').glob('[!_]*.py'):
        found = edited.search(module.read_text(encoding='utf-8'))
        assert found and (module.parent / found[1]).exists(), module.name


@pytest.mark.parametrize('path', [*LESSONS, *APPENDIX], ids=lambda p: p.stem)
def test_images_of_the_text_exist(path):
    text = '\n'.join(cells(path, 'markdown'))
    sources = re.findall(r'!\[[^]]*\]\(([^ )]+)', text)
    sources += re.findall(r'<img\b[^>]*src="([^"]+)', text)
    files = [source for source in sources if ':' not in source]
    assert not [f for f in files if not (path.parent / unquote(f)).is_file()]


def lesson(folder, *sources, name='07_try', text=''):
    "A notebook of a heading, some text, and a code cell for each of `sources`."
    title = nbformat.v4.new_markdown_cell(f'# A lesson\n\n{text}')
    nb = nbformat.v4.new_notebook(cells=[title, *map(nbformat.v4.new_code_cell, sources)])
    path = folder / f'nbs/{name}.ipynb'
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


def run_copy(name, folder):
    "A function that runs the script tools/`name` of a project of its own in `folder`."
    (folder / 'tools').mkdir()
    script = shutil.copy(ROOT / 'tools' / name, folder / 'tools')

    def run(*args):
        command = [sys.executable, script, *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def course(tmp_path):
    return run_copy('course.py', tmp_path)


def test_course_writes_pages_and_index(course, tmp_path):
    (tmp_path / 'images/diagrams').mkdir(parents=True)
    drawing = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
    (tmp_path / 'images/diagrams/x y.svg').write_bytes(drawing)
    source = 'images/diagrams/x%20y.svg'
    lesson(tmp_path, 'print(6*7)', text=f'![a map](../{source})')
    where = 'from pathlib import Path; print(Path.cwd().name.upper())'
    text = f'![a map](../../{source})\n\n<img width="9" src="../../{source}">\n\n![](../gone.png)'
    lesson(tmp_path, where, text=text, name='appendix/engine')

    done = course('course')
    assert done.returncode == 0, done.stderr
    assert re.search('07_try(.|\n)*engine', done.stdout), 'the appendix comes last'
    index = (tmp_path / '_course/index.html').read_text()
    assert re.search('07_try.html(.|\n)*<h2>Appendix(.|\n)*appendix/engine.html', index)

    data = f'src="data:image/svg+xml;base64,{base64.b64encode(drawing).decode()}"'
    page = (tmp_path / '_course/07_try.html').read_text()
    assert '42' in page and page.count(data) == 1
    page = (tmp_path / '_course/appendix/engine.html').read_text()
    assert 'APPENDIX' in page and page.count(data) == 2 and 'src="../gone.png"' in page


def test_course_runs_one_notebook_by_number_or_name(course, tmp_path):
    lesson(tmp_path, '1/0')
    lesson(tmp_path, '1/0', name='appendix/engines')
    lesson(tmp_path, '1', name='appendix/engine')
    done = course('course', 'engine')
    assert done.returncode == 0 and (tmp_path / '_course/appendix/engine.html').exists()
    assert '07_try' not in done.stdout + (tmp_path / '_course/index.html').read_text()
    done = course('course', 'engin')
    assert done.returncode != 0 and "no notebook 'engin'" in done.stderr


def test_course_keeps_the_modules_of_its_start(course, tmp_path):
    first = '%load_ext autoreload\n%autoreload 2\nfrom pathlib import Path\nimport os'
    write = 'Path("made.py").write_text("x = 1")\nimport made'
    again = 'Path("made.py").write_text("x = 2")\nos.utime("made.py", (2**32, 2**32))'
    lesson(tmp_path, first, write, again, 'made.x')
    done = course('course')
    assert done.returncode == 0, done.stderr
    ran = nbformat.read(tmp_path / '_course/07_try.ipynb', 4).cells
    assert ran[1].source == first and ran[-1].outputs[0].data['text/plain'] == '1'


def test_course_stops_at_a_failing_lesson(course, tmp_path):
    lesson(tmp_path, '1 + 1', 'raise RuntimeError("broken on purpose")')
    done = course('course')
    assert done.returncode != 0 and '07_try.ipynb, cell 3 of 3' in done.stderr
    assert 'broken on purpose' in done.stderr


def test_outputs_of_an_appendix_notebook_stay_in_place(course, tmp_path):
    shutil.copy(ROOT / 'pyproject.toml', tmp_path)
    path = lesson(tmp_path, '6*7', name='appendix/engine')
    for run in ('engine_1', 'engines_1'):
        (tmp_path / 'runs' / run).mkdir(parents=True)
    done = course('outputs', 'engine')
    assert done.returncode == 0, done.stderr
    cell = nbformat.read(path, 4).cells[1]
    assert cell.outputs[0].data['text/plain'] == '42' and cell.execution_count is None
    assert [p.name for p in (tmp_path / 'runs').iterdir()] == ['engines_1']


TUPLE = 'print(1), print(2)'
RUFF = """
[tool.ruff]
line-length = 100
[tool.ruff.lint]
select = ["E501", "E701", "E702", "E703", "B018", "F"]
[tool.ruff.lint.per-file-ignores]
"""


@pytest.fixture
def style(tmp_path):
    "style(*exempted) runs tools/style.py in a project of its own: is it right, what is printed."
    run = run_copy('style.py', tmp_path)

    def checked(*patterns, paths=()):
        lines = [f'"{pattern}" = ["ALL"]\n' for pattern in patterns]
        (tmp_path / 'pyproject.toml').write_text(RUFF + ''.join(lines))
        done = run(*paths)
        return done.returncode == 0, done.stdout + done.stderr

    return checked


def test_style_finds_what_ruff_finds(style, tmp_path):
    path = lesson(tmp_path, 'x = 1\nif x: print(x)')
    right, report = style()
    assert not right and 'E701' in report and path.name in report
    lesson(tmp_path, 'x = 1\nprint(x)')
    assert style() == (True, '')


def test_style_finds_tuples_of_calls(style, tmp_path):
    path = lesson(tmp_path, f'%matplotlib inline\nfor _ in "ab":\n    {TUPLE}\n{TUPLE}')
    right, report = style()
    assert not right and f'{path.relative_to(tmp_path)}:cell 2:3:5: a tuple of calls' in report
    assert report.count('a tuple') == 1, 'the last expression is what the cell shows'
    lesson(tmp_path, TUPLE + ';')
    assert ':cell 2:1:1: a tuple of calls' in style()[1], 'this one shows nothing'
    lesson(tmp_path)
    (tmp_path / 'tests').mkdir()
    (tmp_path / 'tests/test_x.py').write_text(TUPLE + '\n')
    assert 'tests/test_x.py:1:1: a tuple of calls' in style()[1]


def test_style_exempts_only_what_needs_it(style, tmp_path):
    (tmp_path / 'restore_lib').mkdir()
    (tmp_path / 'restore_lib/try.py').write_text('x = 1\n')
    lesson(tmp_path, TUPLE, '1')
    pair = '{nbs/07_try.ipynb,restore_lib/try.py}'
    assert f'{pair}: clean; take this line out' in style(pair)[1], (
        'the tuple is what the cell shows'
    )
    lesson(tmp_path, TUPLE + '\nx = 1')
    assert style(pair) == (True, '')
    assert 'a tuple of calls' in style(pair, paths=['nbs/07_try.ipynb'])[1]
    gone = '{nbs/08_gone.ipynb,restore_lib/gone.py}'
    right, report = style(pair, gone)
    assert not right and 'no nbs/08_gone.ipynb and no restore_lib/gone.py' in report


def jupyter(root):
    "The contents manager of JupyterLab with the settings of this project, serving `root`."
    loader = PyFileConfigLoader('jupyter_server_config.py', str(ROOT / 'tools/jupyter'))
    config = loader.load_config()
    config.NotebookNotary.db_file = ':memory:'
    return LargeFileManager(root_dir=str(root), config=config)


def javascript(x):
    "What a browser makes of a number: 2.0 is written 2."
    if isinstance(x, dict):
        return {k: javascript(v) for k, v in x.items()}
    if isinstance(x, list):
        return [javascript(v) for v in x]
    return int(x) if isinstance(x, float) and x.is_integer() else x


KERNEL = {'display_name': 'python3', 'language': 'python', 'name': 'python3'}


def opened_and_saved(manager, path):
    "Opens and saves a notebook with what JupyterLab adds to it."
    model = manager.get(path)
    nb = model['content'] = javascript(model['content'])
    nb['metadata']['kernelspec'] = KERNEL | {'display_name': 'Python 3 (ipykernel)'}
    nb['metadata']['language_info'] = dict(name='python', version='3.11.7')
    for i, cell in enumerate(nb['cells']):
        cell['metadata'].update(trusted=True, collapsed=True, scrolled=False)
        if cell['cell_type'] == 'code':
            cell['execution_count'] = i
    manager.save(model, path)


def project(folder):
    "An empty project in `folder`."
    for name in ('settings.ini', 'pyproject.toml'):
        shutil.copy(ROOT / name, folder)
    for name in ('restore_lib', 'nbs/appendix'):
        (folder / name).mkdir(parents=True)
    return folder


def test_opened_and_saved_in_jupyterlab_a_notebook_stays_as_it_was(tmp_path):
    manager = jupyter(project(tmp_path))
    for path in (*LESSONS, *APPENDIX):
        name = str(path.relative_to(ROOT))
        shutil.copy(path, tmp_path / name)
        opened_and_saved(manager, name)
        assert (tmp_path / name).read_bytes() == path.read_bytes(), name
        code = [c for c in manager.get(name)['content']['cells'] if c['cell_type'] == 'code']
        assert all(c['metadata']['trusted'] for c in code), f'{name}: outputs are hidden'


def test_jupyterlab_saves_what_nbdev_clean_writes(tmp_path):
    path = lesson(project(tmp_path), '1', '')
    nb = nbformat.read(path, 4)
    image = {'image/png': 'aGVsbG8=\n', 'text/plain': '<Axes at 0x7f01>\n<Figure at 0x7f02>'}
    nb.cells[1].outputs = [
        nbformat.v4.new_output('stream', text='größer at 0x7f01\n<a at 0x7f01>\n'),
        nbformat.v4.new_output('display_data', image, metadata={'needs_background': 'light'}),
        nbformat.v4.new_output('execute_result', {'text/html': '<b>1</b>'}, execution_count=3),
    ]
    nb.cells[1].metadata.update(tags=['x'], hide_input=True)
    nb.metadata.kernelspec = KERNEL
    nb.metadata.widgets = {'state': {'a': {'step': 0.5, 'max': 2.0}}}
    nbformat.write(nb, path)
    inside, outside = 'nbs/appendix/other.ipynb', 'other.ipynb'
    for name in (inside, outside):
        shutil.copy(path, tmp_path / name)
        opened_and_saved(jupyter(tmp_path), name)
    dirty = path.read_bytes()
    subprocess.run([BIN / 'nbdev-clean', '--fname', path], cwd=tmp_path, check=True)
    assert (tmp_path / inside).read_bytes() == path.read_bytes() != dirty
    assert 'language_info' in (tmp_path / outside).read_text(), 'no notebook of the course'


def test_make_installs_what_jupyterlab_reads():
    recipe = printed('--always-make', '.venv/ready')
    assert 'cp tools/jupyter/jupyter_server_config.py .venv/etc/jupyter/' in recipe
    assert 'cp tools/jupyter/overrides.json .venv/share/jupyter/lab/settings/' in recipe
    json.loads((ROOT / 'tools/jupyter/overrides.json').read_text())


def printed(*args):
    "What make would do."
    command = ['make', '--dry-run', *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_lab_opens_the_first_lesson():
    ready = '--old-file=.venv/ready'
    assert LESSONS[0].name in printed(ready, 'lab')
    assert 'RESTORE_BUDGET' not in printed(ready, 'lab')
    assert 'RESTORE_BUDGET=test' in printed(ready, 'lab', 'QUICK=1')


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
