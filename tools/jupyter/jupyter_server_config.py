"""JupyterLab saves the notebooks of this project as nbdev-clean leaves them: git sees only work.

`make` copies this file to .venv/etc/jupyter, where JupyterLab of that environment reads it.
"""

import json
import warnings
from pathlib import Path

c = get_config()  # noqa: F821 (Jupyter defines it)


def project_of(path):
    "The project in whose nbs/ nbdev-clean finds the notebook at `path`, or None."
    for folder in path.parents:
        if (folder / 'settings.ini').exists() and (folder / 'restore_lib').is_dir():
            first, *rest = path.relative_to(folder).parts
            hidden = any(part.startswith(('_', '.')) for part in rest[:-1])
            return folder if first == 'nbs' and not hidden else None
    return None


def keep_numbers(nb, path):
    "A browser writes 2.0 as 2: widgets in which nothing else changed stay as the file has them."
    if path.exists():
        old = json.loads(path.read_text(encoding='utf-8')).get('metadata', {}).get('widgets')
        if old and old == nb['metadata'].get('widgets'):
            nb['metadata']['widgets'] = old


def clean(model, path, contents_manager, **_):
    "Cleans a notebook of this project before it is written."
    nb = model.get('content')
    if model.get('type') != 'notebook' or not nb or nb.get('nbformat') != 4:
        return
    path = Path(contents_manager.root_dir).absolute() / path.strip('/')
    project = project_of(path)
    if project is None:
        return
    from nbdev.clean import clean_nb
    from nbdev.config import get_config as nbdev_config

    config = nbdev_config(project)
    clean_nb(
        nb,
        clear_all=config.clear_all,
        allowed_metadata_keys=config.get('allowed_metadata_keys'),
        # the server takes `trusted` out itself, and remembers elsewhere that the outputs are safe
        allowed_cell_metadata_keys=[*config.get('allowed_cell_metadata_keys', []), 'trusted'],
        clean_ids=config.clean_ids,
        allowed_out_metadata_keys=config.get('allowed_out_metadata_keys'),
    )
    for cell in nb['cells']:
        if cell['cell_type'] != 'code':
            cell['metadata'].pop('trusted', None)
    keep_numbers(nb, path)


warnings.filterwarnings('ignore', 'Overriding existing pre_save_hook')  # there is none but this
c.ContentsManager.pre_save_hook = clean
c.ServerApp.allow_root = True  # in a container one often is root
