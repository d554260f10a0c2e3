"""`make bench`: every file of this folder that has `rows()`, one table out.

Arguments choose files: `run.py learner`."""

import importlib, sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


def main(only):
    names = [p.stem for p in sorted(HERE.glob('*.py')) if p.stem not in ('run', 'harness')]
    print(
        '| subject | peer | ours, ms | peer, ms | peer / ours | middle half | note |\n'
        '|---|---|---|---|---|---|---|',
        flush=True,
    )
    for name in names:
        if only and name not in only:
            continue
        for r in importlib.import_module(name).rows():
            print(
                f"| {r['subject']} | {r['peer']} | {r['ours_ms']:.2f} | {r['peer_ms']:.2f} "
                f"| {r['ratio']:.2f} | {r['middle_half']} | {r['note']} |",
                flush=True,
            )


if __name__ == '__main__':
    main(sys.argv[1:])
