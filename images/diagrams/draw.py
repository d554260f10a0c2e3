"""Draws the diagrams: `python images/diagrams/draw.py` writes every SVG of this folder anew,
`--list` prints a Markdown line for each, `--check` says which files are not as drawn."""

import sys
from pathlib import Path

from course_map import maps
from diffusion import diffusion
from foundations import foundations
from in_use import in_use
from representations import representations

HERE = Path(__file__).resolve().parent


def drawings():
    "All drawings, in the order of their names."
    parts = [*maps(), *foundations(), *representations(), *diffusion(), *in_use()]
    return sorted(parts, key=lambda d: d.name)


def write(folder=HERE):
    "One SVG for each drawing into `folder`; the same bytes each time. Others there are removed."
    kept = {}
    for d in drawings():
        kept[folder / f'{d.name}.svg'] = d.svg()
    for path in folder.glob('*.svg'):
        if path not in kept:
            path.unlink()
    for path, text in kept.items():
        path.write_bytes(text.encode())


def main():
    if '--list' in sys.argv:
        for d in drawings():
            print(f'![{d.alt}](../images/diagrams/{d.name}.svg)')
    elif '--check' in sys.argv:
        stale = [d.name for d in drawings() if not current(d)]
        found = [f'{d.name}: {problem}' for d in drawings() for problem in d.problems()]
        sys.exit('\n'.join([*found, *(f'{name}.svg is not as drawn' for name in stale)]) or 0)
    else:
        write()


def current(drawing, folder=HERE):
    "Is the file as it would be drawn?"
    path = folder / f'{drawing.name}.svg'
    return path.exists() and path.read_bytes() == drawing.svg().encode()


if __name__ == '__main__':
    main()
