"""The gate behind `make test`; it leaves the tree as it was.

Export in sync, notebooks clean, style, lessons and appendix under IN_TEST, pytest. The last two
run on all cores, a process with one thread on each: small networks gain nothing by a second thread.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from joblib import cpu_count

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MOST = 8  # processes; each takes about a gigabyte


def snapshot(glob):
    "The bytes of each file that `glob` finds, but for the copies that Jupyter keeps."
    found = [p for p in sorted(ROOT.glob(glob)) if '.ipynb_checkpoints' not in p.parts]
    return {p: p.read_bytes() for p in found}


def unchanged(what, command, glob):
    "Runs `command`; files that `glob` finds and that it changes are put back and reported."
    before = snapshot(glob)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = snapshot(glob)
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    for p in changed:
        if p in before:
            p.write_bytes(before[p])
        else:
            p.unlink()
    if changed:
        names = ', '.join(str(p.relative_to(ROOT)) for p in changed)
        run = ' '.join(str(word) for word in command)
        sys.exit(f'{what}: {names}\nrun `{run}` and commit what it writes')


def step(name, fn):
    t0 = time.time()
    fn()
    print(f'{name:44}{time.time() - t0:6.0f} s', flush=True)


def main():
    runs = tempfile.mkdtemp(prefix='restore_runs_')
    env = dict(os.environ, RESTORE_RUNS=runs, MPLBACKEND='agg', OMP_NUM_THREADS='1')
    workers = str(min(MOST, cpu_count()))

    def run(*command):
        subprocess.run(command, cwd=ROOT, check=True, env=env)

    def in_sync():
        what = 'restore_lib/ is not what nbs/ exports'
        unchanged(what, [BIN / 'nbdev-export'], 'restore_lib/*.py')

    def clean():
        unchanged('notebooks are not clean', [BIN / 'nbdev-clean'], 'nbs/**/*.ipynb')

    def style():
        run(sys.executable, ROOT / 'tools/style.py')

    def notebooks():
        run(BIN / 'nbdev-test', '--n-workers', workers, '--timing', '--cell-timeout', '0')

    def tests():
        run(sys.executable, '-m', 'pytest', '-n', workers, '--dist', 'loadfile')

    t0 = time.time()
    try:
        step('export is in sync', in_sync)
        step('notebooks are clean', clean)
        step('style', style)
        step('lessons and appendix under IN_TEST', notebooks)
        step('tests', tests)
    except subprocess.CalledProcessError as failed:
        sys.exit(f'the gate failed at: {" ".join(str(c) for c in failed.cmd)}')
    finally:
        shutil.rmtree(runs, ignore_errors=True)
    print(f'the gate is green: {(time.time() - t0) / 60:.1f} min')


if __name__ == '__main__':
    main()
