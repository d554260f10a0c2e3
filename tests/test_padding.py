"Mirroring to a size and to a multiple."

import numpy as np
import pytest
import torch

from restore_lib.padding import mirror_to, mirror_to_multiple


@pytest.mark.parametrize('h, w', [(1, 1), (7, 5), (12, 40)])
def test_mirroring_is_numpys_symmetric(h, w):
    x = torch.rand(2, 3, 7, 5)
    low, right = max(h - 7, 0), max(w - 5, 0)
    wanted = np.pad(x.numpy(), [(0, 0), (0, 0), (0, low), (0, right)], mode='symmetric')
    assert torch.equal(mirror_to(x, h, w), torch.from_numpy(wanted))


def test_to_a_multiple():
    x = torch.rand(2, 3, 7, 5)
    assert torch.equal(mirror_to_multiple(x, np.int64(4)), mirror_to(x, 8, 8))
    assert mirror_to_multiple(x, 1) is x


def test_what_cannot_be_padded_is_named():
    x = torch.rand(2, 3, 7, 5)
    for multiple in (0, -2, 1.5):
        with pytest.raises(ValueError, match='multiple is'):
            mirror_to_multiple(x, multiple)
    for bad in (x[0], x[..., :0], x[None]):
        with pytest.raises(ValueError, match=r'x has shape .*expected \(b, c, h, w\)'):
            mirror_to_multiple(bad, 4)
        with pytest.raises(ValueError, match=r'x has shape .*expected \(b, c, h, w\)'):
            mirror_to(bad, 8, 8)
