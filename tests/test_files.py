"Files and folders that are written whole or not at all."

import os
import threading
from pathlib import Path

import pytest

from restore_lib import files
from restore_lib.files import whole_file


@pytest.mark.parametrize('error', [OSError('disk full'), KeyboardInterrupt()])
def test_an_error_leaves_the_old_one_and_nothing_else(tmp_path, error):
    for path in (tmp_path / 'a.png', tmp_path / 'folder'):
        with whole_file(path) as part:
            part.write_text('old')
        with pytest.raises(type(error)), whole_file(path) as part:
            part.write_text('half')
            raise error
        with pytest.raises(type(error)), whole_file(path) as part:
            part.mkdir()
            (part / 'half').write_text('half')
            raise error
        assert path.read_text() == 'old'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.png', 'folder']


def write_folder(path, text):
    with whole_file(path) as part:
        part.mkdir()
        (part / 'w').write_text(text)


def test_an_old_folder_stays_until_the_new_one_has_its_name(tmp_path, monkeypatch):
    path, replace = tmp_path / 'state', Path.replace
    write_folder(path, 'old')

    def broken(self, target):
        "The new one cannot get the name, the old one may move."
        if Path(target) == path and (self / 'w').read_text() == 'new':
            raise OSError('disk full')
        return replace(self, target)

    with monkeypatch.context() as patched, pytest.raises(OSError, match='disk full'):
        patched.setattr(Path, 'replace', broken)
        write_folder(path, 'new')
    assert (path / 'w').read_text() == 'old' and list(tmp_path.iterdir()) == [path]
    write_folder(path, 'new')
    assert (path / 'w').read_text() == 'new' and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path):
    (tmp_path / 'far').mkdir()
    for name, write in (('file', write_text), ('folder', write_folder)):
        target, link = tmp_path / 'far' / name, tmp_path / name
        write(target, 'old')
        link.symlink_to(Path('far') / name)
        write(link, 'new')
        found = target / 'w' if target.is_dir() else target
        assert link.is_symlink() and found.read_text() == 'new'
    assert sorted(p.name for p in (tmp_path / 'far').iterdir()) == ['file', 'folder']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['far', 'file', 'folder']


def write_text(path, text):
    with whole_file(path) as part:
        part.write_text(text)


@pytest.mark.skipif(os.name == 'nt', reason='permissions of POSIX')
def test_permissions_are_those_of_the_old_one(tmp_path):
    for name, write in (('file', write_text), ('folder', write_folder)):
        path = tmp_path / name
        write(path, 'old')
        path.chmod(0o700 if path.is_dir() else 0o600)
        mode = path.stat().st_mode
        write(path, 'new')
        assert path.stat().st_mode == mode


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / 'a'):
        pass
    assert not list(tmp_path.iterdir())


def test_all_of_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, part, pushed = tmp_path / 'state', tmp_path / 'state.part', []

    def push(what):
        pushed.append((what.relative_to(tmp_path).as_posix(), path.exists()))

    monkeypatch.setattr(files, '_push', push)
    with whole_file(path, part) as given:
        assert given == part
        part.mkdir()
        (part / 'w').write_text('weights')
    names = [('state.part/w', False), ('state.part', False), ('.', True)]
    assert pushed == names and (path / 'w').read_text() == 'weights'
    assert [p.name for p in tmp_path.iterdir()] == ['state']


def test_threads_write_beside_one_another(tmp_path):
    path, together = tmp_path / 'a.txt', threading.Barrier(8)

    def write(k):
        with whole_file(path) as part:
            part.write_text(f'{k}' * 1000)
            together.wait(10)

    threads = [threading.Thread(target=write, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(path.read_text())) == 1 and list(tmp_path.iterdir()) == [path]
