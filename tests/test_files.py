"Files and folders that are written whole or not at all."

import threading

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
