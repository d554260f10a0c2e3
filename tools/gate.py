"""The gate behind `make test`: export in sync, notebooks clean, lessons under IN_TEST, pytest. Leaves the tree as it was."""

import os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def snapshot(*globs):
    return {p: p.read_bytes() for g in globs for p in sorted(ROOT.glob(g))}


def unchanged(what, command, *globs):
    "Runs `command`; files below `globs` that it changes are put back and reported."
    before = snapshot(*globs)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = snapshot(*globs)
    differ = sorted(
        str(p.relative_to(ROOT))
        for p in before.keys() | after.keys()
        if before.get(p) != after.get(p)
    )
    for p in after.keys() - before.keys():
        p.unlink()
    for p, data in before.items():
        p.write_bytes(data) if after.get(p) != data else None
    if differ:
        sys.exit(
            f'{what}: {", ".join(differ)}\nrun `{" ".join(str(c) for c in command)}` and commit what it writes'
        )


def step(name, fn):
    t0 = time.time()
    fn()
    print(f'{name:44}{time.time() - t0:6.0f} s', flush=True)


def main():
    runs = tempfile.mkdtemp(prefix='restore_runs_')
    env = dict(os.environ, RESTORE_RUNS=runs, MPLBACKEND='agg')

    def run(*command):
        subprocess.run(command, cwd=ROOT, check=True, env=env)

    t0 = time.time()
    try:
        step(
            'export is in sync',
            lambda: unchanged(
                'restore_lib/ is not what nbs/ exports', [BIN / 'nbdev-export'], 'restore_lib/*.py'
            ),
        )
        step(
            'notebooks are clean',
            lambda: unchanged('notebooks are not clean', [BIN / 'nbdev-clean'], 'nbs/*.ipynb'),
        )
        step(
            'lessons under IN_TEST',
            lambda: run(BIN / 'nbdev-test', '--n-workers', '1', '--timing', '--cell-timeout', '0'),
        )
        step('tests', lambda: run(sys.executable, '-m', 'pytest'))
    except subprocess.CalledProcessError as failed:
        sys.exit(f'the gate failed at: {" ".join(str(c) for c in failed.cmd)}')
    finally:
        shutil.rmtree(runs, ignore_errors=True)
    print(f'the gate is green: {(time.time() - t0) / 60:.1f} min')


if __name__ == '__main__':
    main()
