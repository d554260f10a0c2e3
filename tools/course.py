"""Runs notebooks on a real Jupyter kernel.

`course` writes pages to _course/, `outputs` keeps outputs in place, `study` runs in the background.
"""

import base64
import html
import io
import mimetypes
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from queue import Empty
from urllib.parse import unquote

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
OUT = ROOT / '_course'


def lessons():
    "The numbered notebooks, in order."
    return sorted(NBS.glob('[0-9]*.ipynb'))


def appendix():
    "The notebooks outside the numbered path, by name."
    return sorted(NBS.glob('appendix/*.ipynb'))


def notebooks(only=''):
    "All of them, or the lesson whose number is `only`, or the appendix notebook of that name."
    if only:
        found = [p for p in lessons() if p.name.startswith(only)]
        found += [p for p in appendix() if p.stem == only]
    else:
        found = lessons() + appendix()
    if not found:
        sys.exit(f'no lesson {only!r} in nbs/ and no notebook {only!r} in nbs/appendix/')
    return found


def result(path, suffix='.ipynb'):
    "Where _course/ has what came of the notebook at `path`: a folder deeper for the appendix."
    return (OUT / path.relative_to(NBS)).with_suffix(suffix)


class Client(NotebookClient):
    """Looks for messages anew every few seconds.

    Now and then a busy machine's wake-up is lost; an endless wait would miss a reply that has come.
    """

    async def async_start_new_kernel_client(self):
        kc = await super().async_start_new_kernel_client()
        for channel in (kc.shell_channel, kc.iopub_channel):
            channel.get_msg = patient(channel.get_msg)
        return kc


def patient(get_msg, seconds=3):
    "`get_msg` that waits in pieces where it would wait for ever."

    async def get(timeout=None):
        while timeout is None:
            try:
                return await get_msg(timeout=seconds)
            except Empty:
                pass
        return await get_msg(timeout=timeout)

    return get


def execute(path):
    "The notebook at `path`, executed; a failing cell ends the program with its traceback."
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == 'code':
            cell.outputs, cell.execution_count = [], None
    written = [cell.source for cell in nb.cells]
    for cell in nb.cells:  # a run of hours keeps the modules of its start, whatever is exported
        cell.source = re.sub(r'^%autoreload 2$', '%autoreload 0', cell.source, flags=re.M)
    client = Client(
        nb,
        timeout=None,
        extra_arguments=['--log-level=ERROR'],
        kernel_name='python3',
        resources={'metadata': {'path': str(path.parent)}},
    )
    try:
        client.execute()
    except (CellExecutionError, DeadKernelError) as error:
        print('FAILED', flush=True)
        code = [(i, cell) for i, cell in enumerate(nb.cells) if cell.cell_type == 'code']
        raised = [i for i, c in code if any(o.output_type == 'error' for o in c.outputs)]
        ran = [i for i, c in code if c.get('execution_count')]
        failed = raised[0] if raised else (ran or [0])[-1]
        text = re.sub(r'\x1b\[[0-9;]*m', '', getattr(error, 'traceback', str(error)))
        place = f'{path.name}, cell {failed + 1} of {len(nb.cells)}'
        sys.exit(f'\n{place}:\n{nb.cells[failed].source}\n\n{text}')
    for cell, source in zip(nb.cells, written):
        cell.source = source
    return nb


def is_grey(image):
    "Are the three channels of an RGB image the same?"
    red, green, blue = (channel.tobytes() for channel in image.split())
    return red == green == blue


def smaller(png):
    "The same picture, base64 in and out, without channels that say nothing: alpha, colour."
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode == 'RGBA' and image.getextrema()[3] == (255, 255):
        image = image.convert('RGB')
    if image.mode == 'RGB' and is_grey(image):
        image = image.getchannel(0)
    image.save(out := io.BytesIO(), 'PNG', optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def tidy(nb):
    """Drops what only a live terminal can show: progress bars, counts, the metadata of a run.

    Makes images smaller, losslessly.
    """
    for cell in nb.cells:
        cell.metadata.pop('execution', None)
        if cell.cell_type != 'code':
            continue
        cell.execution_count = None
        cell.outputs = [
            o
            for o in cell.outputs
            if not (o.output_type == 'stream' and o.name == 'stderr' and '\r' in o.text)
        ]
        for o in cell.outputs:
            if o.output_type == 'execute_result':
                o.execution_count = None
            if 'image/png' in o.get('data', {}):
                o.data['image/png'] = smaller(o.data['image/png'])
    return nb


def title_of(nb):
    "The text of the first heading."
    return re.sub(r'^# ', '', nb.cells[0].source.splitlines()[0])


def embedded(page, folder):
    "The HTML `page` with each image file of this machine, found from `folder`, in the page itself."

    def data(match):
        before, source, after = match.groups()
        path = folder / unquote(source)
        if not path.is_file():
            return match[0]
        kind, _ = mimetypes.guess_type(path.name)
        text = base64.b64encode(path.read_bytes()).decode()
        return f'{before}data:{kind};base64,{text}{after}'

    return re.sub(r'(<img\b[^>]*?\bsrc=")([^":]+)(")', data, page)


def write_page(nb, path):
    "The HTML page of `nb`, which is the notebook at `path`, executed."
    resources = {'metadata': {'name': title_of(nb)}}
    page, _ = HTMLExporter().from_notebook_node(nb, resources)
    result(path, '.html').write_text(embedded(page, path.parent), encoding='utf-8')


def table(paths):
    "An HTML table with a row for each notebook that has been run."
    rows = []
    for path in paths:
        if result(path).exists():
            nb = nbformat.read(result(path), as_version=4)
            page = result(path, '.html').relative_to(OUT).as_posix()
            link = f'<a href="{page}">{path.stem}</a>'
            cells = (link, html.escape(title_of(nb)), nb.metadata.get('minutes', ''))
            rows.append('<tr>' + ''.join(f'<td>{cell}</td>' for cell in cells) + '</tr>')
    return '<table>' + '\n'.join(rows) + '</table>' if rows else ''


def write_index():
    "The linked index of _course/: the lessons, then the appendix."
    machinery = table(appendix())
    parts = [
        '<!doctype html><meta charset="utf-8"><title>restore_lib: the course</title>',
        '<style>body{font:16px sans-serif;max-width:60em;margin:2em auto}'
        'td{padding:.3em 1em .3em 0}</style>',
        '<h1>restore_lib: the course</h1>',
        table(lessons()),
        '<h2>Appendix: what the lessons stand on</h2>' + machinery if machinery else '',
    ]
    (OUT / 'index.html').write_text('\n'.join(parts), encoding='utf-8')


def course(only):
    "Runs the lessons in order, then the appendix; writes what they gave and an index to _course/."
    OUT.mkdir(exist_ok=True)
    # verdicts of this machine; the committed ones stay as they are
    os.environ['RESTORE_FIGURES'] = str(OUT / 'figures')
    start = time.time()
    for path in notebooks(only):
        print(f'{path.stem:24}', end='', flush=True)
        t0 = time.time()
        nb = execute(path)
        took = f'{(time.time() - t0) / 60:.1f} min'
        nb.metadata['minutes'] = took
        result(path).parent.mkdir(exist_ok=True)
        nbformat.write(nb, result(path))
        write_page(nb, path)
        print(took, flush=True)
    write_index()
    print(f'{only or "all":24}{(time.time() - start) / 60:.1f} min -> {OUT.name}/index.html')


def outputs(only):
    "Runs each notebook for real, with fresh runs and embedded data only, and keeps its outputs."
    for name in ('RESTORE_DATA', 'RESTORE_FIGURES'):
        os.environ.pop(name, None)
    # here, and only here, notebooks renew the README's images
    os.environ['RESTORE_IMAGES'] = str(ROOT / 'images')
    os.environ['RESTORE_CLAIMS'] = 'write'  # and the page of claims
    paths, claims = notebooks(only), NBS / 'appendix/claims.ipynb'
    if claims.exists() and claims not in paths:
        paths.append(claims)  # its page follows the figures that lessons give
    for path in paths:
        print(f'{path.stem:24}', end='', flush=True)
        own = path.stem if path in appendix() else path.name[:2]
        for old in (ROOT / 'runs').glob(own + '_*'):
            shutil.rmtree(old)
        t0 = time.time()
        nbformat.write(tidy(execute(path)), path)
        clean = Path(sys.executable).parent / 'nbdev-clean'
        subprocess.run([clean, '--fname', str(path)], check=True)
        size = path.stat().st_size // 1024
        print(f'{(time.time() - t0) / 60:.1f} min, {size} KB', flush=True)


def study(only):
    "Starts a study in the background; started again, it goes on from its last checkpoint."
    if not only:
        sys.exit('which lesson? make study ONLY=03')
    path = notebooks(only)[0]
    OUT.mkdir(exist_ok=True)
    log = OUT / f'study_{path.stem}.log'
    env = dict(os.environ, RESTORE_BUDGET='study')
    with open(log, 'ab') as out:
        job = subprocess.Popen(
            [sys.executable, __file__, 'study-run', path.stem],
            cwd=ROOT,
            env=env,
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    print(f'study of {path.stem} runs as process {job.pid}')
    print(f'log: {log.relative_to(ROOT)}; rows: data/studies/{path.stem}.jsonl')


def study_run(only):
    "The study itself: the executed notebook goes to _course/, its rows to data/studies/."
    path = notebooks(only)[0]
    nb = execute(path)
    nbformat.write(nb, OUT / f'study_{path.name}')
    print(f'study of {path.stem}: done', flush=True)


if __name__ == '__main__':
    verbs = {'course': course, 'outputs': outputs, 'study': study, 'study-run': study_run}
    if len(sys.argv) < 2 or sys.argv[1] not in verbs:
        sys.exit(f'usage: course.py {"|".join(verbs)} [NN or the name of an appendix notebook]')
    verbs[sys.argv[1]](sys.argv[2] if len(sys.argv) > 2 else '')
