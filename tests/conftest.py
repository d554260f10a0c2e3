import pytest
import torch

from restore_lib.project import data_home


@pytest.fixture
def real():
    "real('ir/tno17_dev'): a folder of real data, or a skip that names what is absent."

    def find(folder):
        path = data_home() / folder
        if not path.exists():
            pytest.skip(f'{folder} is not below data_home() (set RESTORE_DATA)')
        return path

    return find


@pytest.fixture
def seed():
    "The same start for each test; one thread, for models this small are slower with more."
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
