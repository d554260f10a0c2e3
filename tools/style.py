"""The style that the gate holds: ruff, no tuple of calls as a statement, no needless exemption.

`python tools/style.py` checks everything; with paths it checks those, exempted or not.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
RUFF = Path(sys.executable).parent / 'ruff'
FOLDERS = ['restore_lib', 'nbs', 'tests', 'bench', 'tools', 'images']
LIST = '[tool.ruff.lint.per-file-ignores] in pyproject.toml'
ACTS = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)


def ruff(*args):
    "Runs `ruff check` in the project and returns what it prints; ends if ruff cannot work."
    command = [RUFF, 'check', '--quiet', *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f'ruff failed:\n{done.stderr}')
    return done.stdout


def files(paths):
    "The Python files and notebooks below `paths` that ruff looks at."
    shown = [Path(line) for line in ruff('--show-files', *paths).splitlines()]
    return sorted(p for p in shown if p.suffix in ('.py', '.ipynb'))


def ignores():
    "What pyproject.toml tells ruff to ignore: pattern -> rules."
    config = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
    return config['tool']['ruff']['lint'].get('per-file-ignores', {})


def exempted():
    "The patterns that exempt files from every rule, with those files: '{a,b}' names two."
    patterns = [pattern for pattern, rules in ignores().items() if rules == ['ALL']]
    return {p: [ROOT / name for name in p.strip('{}').split(',')] for p in patterns}


def nobody_exempted():
    "The options of ruff that turn the exemptions off and keep its other settings."
    kept = [f'"{p}" = {json.dumps(rules)}' for p, rules in ignores().items() if rules != ['ALL']]
    return ['--config', f'lint.per-file-ignores = {{{", ".join(kept)}}}']


def blocks(path):
    "The pieces of code of a file: (where, source, whether its last expression is shown)."
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.py':
        yield '', text, False
        return
    for number, cell in enumerate(json.loads(text)['cells'], 1):
        if cell['cell_type'] == 'code':
            source = ''.join(cell['source'])
            plain = re.sub(r'^(\s*)[%!].*', r'\1pass', source, flags=re.M)  # magics are no Python
            yield f':cell {number}', plain, not source.rstrip().endswith(';')


def tuples(path):
    "A sentence for each statement of the file at `path` that is a tuple of calls."
    for where, source, shown in blocks(path):
        try:
            tree = ast.parse(source)
        except SyntaxError:  # ruff reports it
            continue
        lines = [node for node in ast.walk(tree) if isinstance(node, ast.Expr)]
        for node in sorted(lines, key=lambda node: (node.lineno, node.col_offset)):
            if not isinstance(node.value, ast.Tuple):
                continue
            if shown and node is tree.body[-1]:
                continue
            if any(isinstance(part, ACTS) for part in ast.walk(node.value)):
                place = f'{path.relative_to(ROOT)}{where}:{node.lineno}:{node.col_offset + 1}'
                yield f'{place}: a tuple of calls as a statement; give each call a line of its own'


def needless(exemptions):
    "A sentence for each exemption of a file that does not exist, or of files that are all clean."
    named = [path for paths in exemptions.values() for path in paths if path.exists()]
    options = [*nobody_exempted(), '--output-format=json']
    found = json.loads(ruff(*options, *named)) if named else []
    bad = {Path(finding['filename']) for finding in found}
    for pattern, paths in exemptions.items():
        absent = [str(p.relative_to(ROOT)) for p in paths if not p.exists()]
        if absent:
            yield f'{pattern}: there is no {" and no ".join(absent)}; mend this line of {LIST}'
        elif not any(path in bad or any(tuples(path)) for path in paths):
            yield f'{pattern}: clean; take this line out of {LIST}'


def main(paths):
    options = ['--output-format=concise']
    if paths:
        spared, sentences = set(), []
        options += nobody_exempted()
    else:
        paths = [folder for folder in FOLDERS if (ROOT / folder).exists()]
        exemptions = exempted()
        spared = {path for named in exemptions.values() for path in named}
        sentences = list(needless(exemptions))
    report = ruff(*options, *paths).splitlines()
    for path in files(paths):
        if path not in spared:
            report += tuples(path)
    report += sentences
    if report:
        print(*report, sep='\n')
        sys.exit(f'not in the style of the project: {len(report)} places')


if __name__ == '__main__':
    main(sys.argv[1:])
