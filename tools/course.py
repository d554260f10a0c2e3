"""Runs lessons on a real Jupyter kernel: `course` into _course/, `outputs` in place, `study` in the background."""

import base64, html, io, os, re, shutil, subprocess, sys, time
from pathlib import Path
from queue import Empty

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / '_course'


def lessons(only=''):
    "The numbered notebooks, or the one whose number is `only`."
    found = sorted(p for p in (ROOT / 'nbs').glob('[0-9]*.ipynb') if p.name.startswith(only))
    if not found:
        sys.exit(f'no lesson {only!r} in nbs/')
    return found


class Client(NotebookClient):
    "Looks for messages anew every few seconds: now and then a busy machine's wake-up is lost, and an endless wait would miss a reply that has come."

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
    "The notebook at `path`, run from top to bottom; a failing cell ends the program with its traceback."
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == 'code':
            cell.outputs, cell.execution_count = [], None
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
        ran = [
            i for i, c in enumerate(nb.cells) if c.cell_type == 'code' and c.get('execution_count')
        ]
        failed = next(
            (
                i
                for i, c in enumerate(nb.cells)
                if c.cell_type == 'code' and any(o.output_type == 'error' for o in c.outputs)
            ),
            ran[-1] if ran else 0,
        )
        text = re.sub(r'\x1b\[[0-9;]*m', '', getattr(error, 'traceback', str(error)))
        sys.exit(
            f'\n{path.name}, cell {failed + 1} of {len(nb.cells)}:\n{nb.cells[failed].source}\n\n{text}'
        )
    return nb


def smaller(png):
    "The same picture, base64 in and out, without an unused alpha channel."
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode == 'RGBA' and image.getextrema()[3] == (255, 255):
        image = image.convert('RGB')
    image.save(out := io.BytesIO(), 'PNG', optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def tidy(nb):
    "Drops what only a live terminal can show (progress bars, counts, run metadata); makes pictures smaller, losslessly."
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


def write_index(rows):
    "The linked index of `_course/`: a row a lesson that has been run."
    items = '\n'.join(
        f'<tr><td><a href="{p.stem}.html">{p.stem}</a></td><td>{html.escape(title)}</td><td>{took}</td></tr>'
        for p, title, took in rows
    )
    (OUT / 'index.html').write_text(
        '<!doctype html><meta charset="utf-8"><title>restore_lib: the course</title>'
        '<style>body{font:16px sans-serif;max-width:60em;margin:2em auto}td{padding:.3em 1em .3em 0}</style>'
        f'<h1>restore_lib: the course</h1><table>{items}</table>',
        encoding='utf-8',
    )


def title_of(nb):
    return re.sub(r'^# ', '', nb.cells[0].source.splitlines()[0])


def course(only):
    "Runs the lessons in order; writes executed notebooks, HTML pages and an index to _course/."
    OUT.mkdir(exist_ok=True)
    os.environ['RESTORE_CLAIMS'] = str(
        OUT / 'claims'
    )  # verdicts of this machine; the committed ones stay as they are
    start, exporter = time.time(), HTMLExporter()
    for path in lessons(only):
        print(f'{path.stem:24}', end='', flush=True)
        t0 = time.time()
        nb = execute(path)
        took = f'{(time.time() - t0) / 60:.1f} min'
        nb.metadata['minutes'] = took
        nbformat.write(nb, OUT / path.name)
        (OUT / f'{path.stem}.html').write_text(exporter.from_notebook_node(nb)[0], encoding='utf-8')
        print(took, flush=True)
    done = [nbformat.read(p, as_version=4) for p in sorted(OUT.glob('[0-9]*.ipynb'))]
    write_index(
        [
            (p, title_of(nb), nb.metadata.get('minutes', ''))
            for p, nb in zip(sorted(OUT.glob('[0-9]*.ipynb')), done)
        ]
    )
    print(
        f'{"all" if not only else only:24}{(time.time() - start) / 60:.1f} min -> {OUT.name}/index.html'
    )


def outputs(only):
    "Runs each lesson for real, with fresh runs and embedded data only, and keeps its outputs in the notebook, cleaned."
    for name in ('RESTORE_DATA', 'RESTORE_CLAIMS'):
        os.environ.pop(name, None)
    os.environ['RESTORE_IMAGES'] = str(
        ROOT / 'images'
    )  # here, and only here, lessons renew the README's pictures
    for path in lessons(only):
        print(f'{path.stem:24}', end='', flush=True)
        for old in (ROOT / 'runs').glob(path.name[:2] + '_*'):
            shutil.rmtree(old)
        t0 = time.time()
        nbformat.write(tidy(execute(path)), path)
        subprocess.run(
            [Path(sys.executable).parent / 'nbdev-clean', '--fname', str(path)], check=True
        )
        print(f'{(time.time() - t0) / 60:.1f} min, {path.stat().st_size // 1024} KB', flush=True)


def study(only):
    "Starts the lesson's study in the background; started again after a stop, it goes on from its last checkpoint."
    if not only:
        sys.exit('which lesson? make study ONLY=03')
    path = lessons(only)[0]
    OUT.mkdir(exist_ok=True)
    log = OUT / f'study_{path.stem}.log'
    env = dict(os.environ, RESTORE_BUDGET='study')
    with open(log, 'ab') as out:
        job = subprocess.Popen(
            [sys.executable, __file__, 'study-run', path.name[:2]],
            cwd=ROOT,
            env=env,
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    print(
        f'study of {path.stem} runs as process {job.pid}; log: {log.relative_to(ROOT)}; rows: data/studies/{path.stem}.jsonl'
    )


def study_run(only):
    "The study itself: the executed notebook goes to _course/, its rows to data/studies/."
    path = lessons(only)[0]
    nb = execute(path)
    nbformat.write(nb, OUT / f'study_{path.name}')
    print(f'study of {path.stem}: done', flush=True)


if __name__ == '__main__':
    verbs = {'course': course, 'outputs': outputs, 'study': study, 'study-run': study_run}
    if len(sys.argv) < 2 or sys.argv[1] not in verbs:
        sys.exit(f'usage: course.py {"|".join(verbs)} [NN]')
    verbs[sys.argv[1]](sys.argv[2] if len(sys.argv) > 2 else '')
