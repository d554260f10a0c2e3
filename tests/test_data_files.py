"What the appendix data_files and glyphs do not show: choices, blocks, scenes, crops, drawn digits."

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from restore_lib.data import Crops, photos
from restore_lib.data_files import (
    check_choice, check_crop, check_pair, first_of, images_below, pair_folders, pair_of, partners,
    read_idx, same_scene, shrink, whole_blocks,
)
from restore_lib.glyphs import FACES, draw_digits


@pytest.mark.parametrize('value', ['tests', None, ['test'], 0])
def test_choices_are_named(value):
    with pytest.raises(ValueError, match="split is .*; expected one of 'train', 'test'"):
        check_choice(value, ('train', 'test'), 'split')
    assert check_choice('test', ('train', 'test'), 'split') is None


def test_first_of_a_set():
    images, labels = torch.rand(5, 1, 4, 4), torch.arange(5)
    assert first_of(None, images, labels, 'set')[1].tolist() == [0, 1, 2, 3, 4]
    assert len(first_of(2, images, labels, 'set')[0]) == 2
    with pytest.raises(ValueError, match='n is 6; set holds 5'):
        first_of(6, images, labels, 'set')


def test_folders_of_pairs(tmp_path):
    assert pair_folders(tmp_path) == (tmp_path, None)
    assert pair_folders(tmp_path, 'small') == (tmp_path, 'small')
    (tmp_path / 'HR').mkdir()
    assert pair_folders(tmp_path) == (tmp_path / 'HR', None)
    (tmp_path / 'LR').mkdir()
    assert pair_folders(tmp_path) == (tmp_path / 'HR', tmp_path / 'LR')
    assert pair_folders(tmp_path, 'other')[1] == 'other'


def test_blocks_are_whole():
    x = torch.rand(3, 13, 9)
    assert torch.equal(whole_blocks(x, 4), x[:, :12, :8])
    assert shrink(whole_blocks(x, 4), 4).shape == (3, 3, 2)
    with pytest.raises(ValueError, match=r'x is \(13, 9\); too small for scale=10'):
        whole_blocks(x, 10)


def test_shrink_is_pillows_filter():
    x = photos('valid', 1)['chelsea'][:, :96, :120]
    image = Image.fromarray((x[0] * 255).round().byte().numpy())
    small = np.asarray(image.resize((30, 24), Image.Resampling.BICUBIC))
    assert torch.equal((shrink(x, 4)[0] * 255).round().byte(), torch.from_numpy(small.copy()))


def test_scenes_are_told_apart():
    x = whole_blocks(photos('valid')['chelsea'], 4)
    y = shrink(x, 4)
    assert same_scene(y, x) and same_scene(0.5 * y + 0.2, x) and not same_scene(y.flip(-1), x)
    flat = torch.full_like(y, 0.5)
    assert same_scene(flat, x)  # nothing to compare
    with pytest.raises(ValueError, match='a.png and b.png do not show the same scene'):
        check_pair(y.flip(-1), x, 4, 'a.png', 'b.png')
    with pytest.raises(ValueError, match='expected 2 times as large'):
        check_pair(y, x, 2, 'a.png', 'b.png')


def test_pairs_cut_and_turned_are_still_pairs():
    x = photos('test')['china'][:, :400, :400]
    crops = Crops([(shrink(x, 4), x)], size=160, scale=4)
    torch.manual_seed(0)
    for y_crop, x_crop in (crops[k] for k in range(8)):
        off = (shrink(x_crop, 4) - y_crop)[:, 4:-4, 4:-4].abs()  # but for the filter's border
        assert off.max() < 0.02


@pytest.mark.parametrize('item', [Image.new('L', (9, 9)), None, 3])
def test_items_that_are_no_images(item):
    with pytest.raises(TypeError, match=r'images\[0\]'):
        Crops([item], 8)[0]


def test_tuples_and_lists_are_pairs():
    x = torch.rand(1, 8, 8)
    assert pair_of(x, 'x') == (x,) and pair_of([x, x], 'x') == pair_of((x, x), 'x') == (x, x)
    assert check_crop((x, x), 8, 1, 'x') is None


def test_a_folder_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match='is not a folder'):
        images_below(tmp_path / 'absent')
    (tmp_path / 'a.txt').touch()
    with pytest.raises(FileNotFoundError, match=r'holds no image for glob=.*\.png'):
        images_below(tmp_path)


def test_idx_of_three_dimensions(tmp_path):
    header = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4])
    (tmp_path / 'a').write_bytes(header + bytes(range(24)))
    assert torch.equal(read_idx(tmp_path / 'a'), torch.arange(24).byte().reshape(2, 3, 4))


def test_partners_are_numbers_of_the_other_folder():
    class Folder:
        def __init__(self, root, *names):
            self.root, self.paths = root, [root / name for name in names]

        def __len__(self):
            return len(self.paths)

    large = Folder(Path('HR'), 'a.png', 'b/c.png', 'd.png')
    small = Folder(Path('LR'), 'b/c.jpg', 'a.png', 'dx4.png')
    assert partners(large, small, 4) == [1, 0, 2]


def test_drawn_digits_are_balanced_and_seeded():
    x, labels = draw_digits(30, 'test', seed=2)
    assert x.shape == (30, 1, 28, 28) and labels.bincount().tolist() == [3] * 10
    assert torch.equal(x, draw_digits(30, 'test', seed=2)[0])
    assert not torch.equal(x, draw_digits(30, 'valid', seed=2)[0])
    assert set(FACES) == {'train', 'valid', 'test'}
