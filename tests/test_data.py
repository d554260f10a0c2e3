import gzip, json, re

import numpy as np
import pytest
import torch
from PIL import Image

from common import ROOT

from restore_lib.checks import check_images
from restore_lib.data import (
    Crops, FACES, ImageFolder, PHOTOS, PairedFolder, cifar10, digits, dihedral, photos,
    undo_dihedral,
)
from restore_lib.image_files import as_image, open_image, read_image, save_image
from restore_lib.plots import show_images
from restore_lib.project import budget
from restore_lib.thermal import thermal


def save(path, array):
    Image.fromarray(array).save(path)


def scene(seed=0, h=64, w=80):
    return (thermal(1, size=(h, w), seed=seed)[0, 0] * 255).round().byte().numpy()


# embedded sources


def test_no_photo_in_two_splits():
    names = [n for split in PHOTOS.values() for n in split]
    assert len(names) == len(set(names)) == 13
    for split in PHOTOS:
        for x in photos(split, 1).values():
            check_images(x, channels=1, ndim=3)


def test_no_typeface_in_two_splits():
    faces = [f for split in FACES.values() for f in split]
    assert len(faces) == len(set(faces))


def test_digits_are_seeded_and_balanced():
    (a, la), (b, lb), (c, _) = digits(200), digits(200), digits(200, seed=1)
    assert torch.equal(a, b) and torch.equal(la, lb) and not torch.equal(a, c)
    assert a.shape == (200, 1, 28, 28) and la.bincount(minlength=10).tolist() == [20] * 10
    assert (
        0 <= a.min() and a.max() <= 1 and a.flatten(1).max(1).values.min() > 0.5
    )  # no empty digit


# sources that the user brings


def idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b''.join(int(d).to_bytes(4, 'big') for d in array.shape)
    with (gzip.open if path.suffix == '.gz' else open)(path, 'wb') as f:
        f.write(header + array.tobytes())


@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_mnist_files(tmp_path, monkeypatch, suffix):
    monkeypatch.setenv('RESTORE_DATA', str(tmp_path))
    raw = tmp_path / 'mnist/MNIST/raw'
    with pytest.raises(FileNotFoundError, match='download=True'):
        digits(5, source='mnist')
    raw.mkdir(parents=True)
    images, labels = (
        np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8),
        np.arange(12, dtype=np.uint8) % 10,
    )
    idx(raw / f't10k-images-idx3-ubyte{suffix}', images)
    idx(raw / f't10k-labels-idx1-ubyte{suffix}', labels)
    x, y = digits(7, 'test', source='mnist')
    assert (
        torch.equal((x * 255).round().byte()[:, 0], torch.from_numpy(images[:7]))
        and y.tolist() == labels[:7].tolist()
    )
    with pytest.raises(ValueError, match='holds 12'):
        digits(13, 'test', source='mnist')


def test_cifar_tiles(tmp_path, monkeypatch):
    monkeypatch.setenv('RESTORE_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError):
        cifar10(source='tiles')
    folder = tmp_path / 'cifar10_4k'
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (4, 25, 40, 32, 32, 3), dtype=np.uint8)
    for k in range(4):
        save(folder / f'tiles_{k}.png', images[k].transpose(0, 2, 1, 3, 4).reshape(800, 1280, 3))
    (folder / 'labels.json').write_text(json.dumps(dict(labels=list(range(4000)))))
    x, y = cifar10(source='tiles', split='test')
    assert len(x) == 800 and y[0] == 3200
    assert torch.equal(
        (x[5] * 255).round().byte().permute(1, 2, 0),
        torch.from_numpy(images.reshape(4000, 32, 32, 3)[3205]),
    )


def test_real_sets(real, monkeypatch):
    x, y = digits(10, 'test', source='mnist') if real('mnist') else None
    assert y.tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    x, y = cifar10(source='tiles')
    assert x.shape == (3200, 3, 32, 32) and y[:3].tolist() == [6, 9, 9]
    assert len(ImageFolder(real('natural/set12'), channels=1)) == 12
    small, large = PairedFolder(real('ir/tno17_dev'))[0]
    assert large.shape[-1] == 4 * small.shape[-1]


# reading files


@pytest.mark.parametrize('content', [b'', b'no image at all', b'\x89PNG\r\n\x1a\n' + b'\0' * 40])
def test_corrupt_file_is_named(tmp_path, content):
    (tmp_path / 'bad.png').write_bytes(content)
    with pytest.raises(ValueError, match='bad.png is not a readable image'):
        ImageFolder(tmp_path)[0]


def test_truncated_file_is_named(tmp_path):
    save(tmp_path / 'cut.png', scene())
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'cut.png').read_bytes()[:-500])
    with pytest.raises(ValueError, match='cut.png'):
        ImageFolder(tmp_path)[0]


def test_image_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='not a folder'):
        ImageFolder(tmp_path / 'absent')
    with pytest.raises(FileNotFoundError, match='holds no image'):
        ImageFolder(tmp_path)
    for k, name in enumerate(('cat/1.png', 'cat/2.png', 'dog/1.png')):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name, scene(k))
    ds = ImageFolder(tmp_path, channels=1)
    assert ds.classes == ['cat', 'dog'] and ds.labels == [0, 0, 1] and ds[0].shape == (1, 64, 80)
    assert len(ImageFolder(tmp_path, glob='dog/*')) == 1


# pairs


@pytest.fixture
def paired(tmp_path):
    for d in ('HR', 'LR'):
        (tmp_path / d).mkdir()
    for k in range(3):
        hr = scene(k)
        save(tmp_path / f'HR/{k}.png', hr)
        Image.fromarray(hr).resize((20, 16), Image.BICUBIC).save(tmp_path / f'LR/{k}.png')
    return tmp_path


def test_pairs_from_folder_and_made_agree(paired):
    given, made = PairedFolder(paired), PairedFolder(paired / 'HR')
    for (a, x), (b, z) in zip([given[i] for i in range(3)], [made[i] for i in range(3)]):
        assert torch.equal(a, b) and torch.equal(x, z) and a.shape == (1, 16, 20)


# the public sets as they are published, and what in them is no infrared image to train on
THERMAL = {
    'M3FD': ('M3FD/Ir/00000.png M3FD/Ir/00001.png', 'M3FD/Vis/00000.png'),
    'FMB': (
        'FMB/train/Infrared/00001.png FMB/test/Infrared/00002.png',
        'FMB/train/Visible/00001.png FMB/train/Label/00001.png FMB/test/Visible/00002.png',
    ),
    'FLIR ADAS, version 1': (
        'FLIR_ADAS_1_3/train/thermal_8_bit/FLIR_00001.jpeg '
        'FLIR_ADAS_1_3/val/thermal_8_bit/FLIR_08863.jpeg',
        'FLIR_ADAS_1_3/train/thermal_16_bit/FLIR_00001.tiff FLIR_ADAS_1_3/train/RGB/FLIR_00001.jpg '
        'FLIR_ADAS_1_3/train/Annotated_thermal_8_bit/FLIR_00001.jpeg',
    ),
    'FLIR ADAS, version 2': (
        'FLIR_ADAS_v2/images_thermal_train/data/video-2Af3dwvs6YPf-frame-000000-imW24bapJsHp.jpg '
        'FLIR_ADAS_v2/video_thermal_test/data/video-4FRnNpmSmwkt-frame-000000-Hzt4KmQJjiPe.jpg',
        'FLIR_ADAS_v2/images_rgb_train/data/video-2BARff2EP7ZW-frame-000432-pEpYGJT3PDod.jpg',
    ),
    'KAIST': (
        'KAIST/set00/V000/lwir/I00000.jpg KAIST/set11/V001/lwir/I00019.jpg',
        'KAIST/set00/V000/visible/I00000.jpg',
    ),
    'CVC-14': (
        'CVC-14/Day/FIR/Train/FramesPos/2014_05_01_23_14_03_450000.tif '
        'CVC-14/Day/FIR/Train/FramesNeg/2014_05_01_23_14_05_450000.tif '
        'CVC-14/Night/FIR/NewTest/FramesPos/2014_05_04_23_14_03_450000.tif',
        'CVC-14/Day/Visible/Train/FramesPos/2014_05_01_23_14_03_450000.tif '
        'CVC-14/Day/FIR/Train/Annotations/2014_05_01_23_14_03_450000.txt',
    ),
    'TNO': (
        'TNO/Athena_images/2_men_in_front_of_house/IR_meting003_g.bmp '
        'TNO/DHV_images/bench/IR_37rad.bmp TNO/FEL_images/Nato_camp_sequence/thermal/1800i.bmp',
        'TNO/Athena_images/2_men_in_front_of_house/VIS_meting003_r.bmp '
        'TNO/FEL_images/Nato_camp_sequence/visual/1800v.bmp',
    ),
    'RoadScene': (
        'RoadScene/cropinfrared/FLIR_00006.jpg RoadScene/cropinfrared/FLIR_00018.jpg',
        'RoadScene/crop_LR_visible/FLIR_00006.jpg RoadScene/crop_HR_visible/FLIR_00006.jpg',
    ),
}


def calls_of(name):
    "The calls with which data/README.md opens a set."
    text = (ROOT / 'data/README.md').read_text(encoding='utf-8')
    row = next(line for line in text.splitlines() if line.startswith(f'| {name} |'))
    return re.findall(r'`(PairedFolder[^`]+)`', row)


@pytest.mark.parametrize('name', THERMAL)
def test_calls_of_the_readme_take_the_infrared_images_and_no_others(name, tmp_path, monkeypatch):
    monkeypatch.setenv('RESTORE_DATA', str(tmp_path))
    thermal, others = (files.split() for files in THERMAL[name])
    for k, file in enumerate([*thermal, *others]):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == '.txt':
            path.write_text('0 0 1 1')
        elif path.suffix == '.tiff':
            Image.fromarray(scene(k).astype(np.uint16) * 64).save(path)
        else:
            Image.fromarray(scene(k)).save(path)
    seen = []
    for call in calls_of(name)[1 if name == 'M3FD' else 0:]:
        pairs = eval(call, dict(PairedFolder=PairedFolder, data_home=lambda: tmp_path))
        seen += [path.relative_to(tmp_path).as_posix() for path in pairs.hr.paths]
        y, x = pairs[0]
        assert y.shape == (1, 16, 20) and x.shape == (1, 64, 80)
    assert sorted(seen) == sorted(thermal)


def test_m3fd_pairs_are_taken_as_they_come(paired, monkeypatch):
    (paired / 'M3FD').mkdir()
    for folder in ('HR', 'LR'):
        (paired / folder).rename(paired / 'M3FD' / folder)
    pairs = eval(calls_of('M3FD')[0], dict(PairedFolder=PairedFolder, data_home=lambda: paired))
    assert pairs.lr is not None and len(pairs) == 3 and pairs[2][0].shape == (1, 16, 20)


def test_pair_sizes_names_scenes(paired):
    save(paired / 'LR/1.png', scene(1))
    with pytest.raises(ValueError, match='1.png.*expected 4 times as large'):
        PairedFolder(paired)[1]
    Image.fromarray(scene(2)).resize((20, 16)).save(paired / 'LR/0.png')
    with pytest.raises(ValueError, match='0.png.*same scene'):
        PairedFolder(paired)[0]
    (paired / 'LR/2.png').unlink()
    with pytest.raises(ValueError, match='2.png'):
        PairedFolder(paired)


def test_odd_sizes_are_cut_to_the_scale(tmp_path):
    save(tmp_path / 'a.png', scene(0, 67, 81))
    y, x = PairedFolder(tmp_path)[0]
    assert y.shape == (1, 16, 20) and x.shape == (1, 64, 80)


# crops


def test_dihedral_is_the_group_of_the_square():
    x = torch.arange(9.0).reshape(1, 3, 3)
    poses = [dihedral(x, k) for k in range(8)]
    assert len({tuple(p.flatten().tolist()) for p in poses}) == 8
    assert all(torch.equal(undo_dihedral(p, k), x) for k, p in enumerate(poses))


def test_pair_crops_stay_aligned():
    x = torch.rand(1, 64, 80)
    y = x.reshape(1, 16, 4, 20, 4).mean(
        (2, 4)
    )  # the mean of each block: commutes with poses exactly
    ds = Crops([(y, x)], size=16, scale=4, n=50)
    torch.manual_seed(0)
    seen = [ds[i] for i in range(50)]
    for small, large in seen:
        assert torch.allclose(large.reshape(1, 4, 4, 4, 4).mean((2, 4)), small, atol=1e-6)
    assert len({s.sum().item() for s, _ in seen}) > 20


def test_crops_bad_input():
    with pytest.raises(ValueError, match='empty'):
        Crops([])
    with pytest.raises(ValueError, match='multiple of scale'):
        Crops([torch.rand(1, 9, 9)], size=9, scale=4)
    with pytest.raises(ValueError, match=r'images\[0\].*too small'):
        Crops([torch.rand(1, 9, 99)], size=16)[0]
    with pytest.raises(ValueError, match='4 times as large'):
        Crops([(torch.rand(1, 16, 16), torch.rand(1, 60, 64))], size=16, scale=4)[0]
    with pytest.raises(TypeError, match='uint8'):
        Crops([torch.zeros(1, 20, 20, dtype=torch.uint8)], size=16)[0]
    with pytest.raises(TypeError, match='ndarray'):
        Crops([np.zeros((1, 20, 20))], size=16)[0]
    with pytest.raises(ValueError, match='NaN'):
        Crops([torch.full((1, 20, 20), float('nan'))], size=16)[0]


# the checker and the plots


def test_show_images_never_stretches_and_names_clipping(monkeypatch):
    plt = pytest.importorskip('matplotlib.pyplot')
    plt.switch_backend('agg')
    monkeypatch.setattr(plt, 'show', lambda: None)
    show_images([torch.full((1, 8, 8), 0.4), torch.full((3, 8, 8), 1.5)], ['a', 'b'])
    first, second = plt.gcf().axes[:2]
    assert (
        first.images[0].get_clim() == (0, 1)
        and 'clipped' in second.get_title()
        and 'clipped' not in first.get_title()
    )
    with pytest.raises(ValueError, match='titles holds 1'):
        show_images([torch.rand(1, 4, 4)] * 2, ['only one'])
    plt.close('all')


# what was found broken ---------------------------------------------------------------------------

import pickle, random

import restore_lib.data as D


# sources under other settings


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_drawings_do_not_depend_on_the_default_dtype():
    before = digits(20, 'valid', seed=3), thermal(2, size=(40, 56), seed=3)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            after = digits(20, 'valid', seed=3), thermal(2, size=(40, 56), seed=3)
        finally:
            torch.set_default_dtype(torch.float32)
        assert (
            after[0][0].dtype == after[1].dtype == torch.float32
            and after[0][1].dtype == torch.int64
        )
        assert (
            torch.equal(before[0][0], after[0][0])
            and torch.equal(before[0][1], after[0][1])
            and torch.equal(before[1], after[1])
        )


def test_reading_does_not_depend_on_the_default_dtype(tmp_path, float64):
    save(tmp_path / 'a.png', scene(0, 32, 32))
    x, _ = open_image(tmp_path / 'a.png')
    assert (
        read_image(tmp_path / 'a.png').dtype
        == x.dtype
        == PairedFolder(tmp_path)[0][0].dtype
        == torch.float32
    )
    assert all(p.dtype == torch.float32 for p in photos('valid').values())


def test_digits_are_seeded_by_the_name_of_their_split(monkeypatch):
    before = {split: digits(10, split)[0] for split in FACES}
    monkeypatch.setitem(D.FACES, 'all', FACES['train'] + FACES['test'])
    assert all(torch.equal(digits(10, split)[0], x) for split, x in before.items())
    mine = digits(10, 'all')[0]
    monkeypatch.setitem(D.FACES, 'zebra', FACES['test'])
    assert torch.equal(digits(10, 'all')[0], mine) and not torch.equal(
        digits(10, 'zebra')[0], before['test']
    )
    monkeypatch.setitem(D.FACES, 'all', list(FACES['valid']))  # another list is drawn anew
    assert not torch.equal(digits(10, 'all')[0], mine)


def test_the_splits_draw_as_they_always_did():
    sums = {split: round(digits(50, split)[0].double().sum().item(), 2) for split in FACES}
    assert sums == pytest.approx(SUMS, abs=0.05)


SUMS = dict(train=5900.85, valid=3718.3, test=3388.53)  # of the library before its seeds had names


def test_numpys_integers_are_numbers_too(tmp_path):
    three = np.int64(3)
    assert torch.equal(digits(three, seed=np.int32(1))[0], digits(3, seed=1)[0])
    assert torch.equal(
        thermal(three, size=np.int64(16), seed=np.uint8(2)), thermal(3, size=16, seed=2)
    )
    assert thermal(np.int64(1), size=(np.int64(16), np.int16(20))).shape == (1, 1, 16, 20)
    crops = Crops([torch.rand(1, 9, 9)], size=np.int64(8), n=three, scale=np.int64(1))
    assert len(crops) == 3 and crops[np.int64(2)].shape == (1, 8, 8)
    save(tmp_path / 'a.png', scene())
    assert (
        ImageFolder(tmp_path, channels=np.int64(1))[0].shape
        == read_image(tmp_path / 'a.png', np.int64(1)).shape
        == (1, 64, 80)
    )
    assert PairedFolder(tmp_path, scale=np.int64(4))[0][0].shape == (1, 16, 20)
    assert torch.equal(dihedral(torch.eye(3), np.int64(5)), dihedral(torch.eye(3), 5))


@pytest.mark.parametrize('bad', [0, -1, 1.5, True, float('nan')])
def test_counts_below_one_are_refused(bad, tmp_path, monkeypatch):
    monkeypatch.setenv('RESTORE_DATA', str(tmp_path))
    save(tmp_path / 'a.png', scene())
    for name, call in (
        ('n', lambda: digits(bad)),
        ('n', lambda: digits(bad, source='mnist')),
        ('n', lambda: cifar10(bad)),
        ('n', lambda: cifar10(bad, source='tiles')),
        ('n', lambda: thermal(bad)),
        ('n', lambda: Crops([torch.rand(1, 9, 9)], 8, n=bad)),
        ('size', lambda: Crops([torch.rand(1, 9, 9)], bad)),
        ('scale', lambda: Crops([torch.rand(1, 9, 9)], 8, scale=bad)),
        ('scale', lambda: PairedFolder(tmp_path, scale=bad)),
        ('cols', lambda: show_images([torch.rand(1, 4, 4)], cols=bad)),
        ('channels', lambda: ImageFolder(tmp_path, channels=bad)),
    ):
        if name == 'channels' and bad is True:
            continue
        with pytest.raises(ValueError, match=f'{name} is {bad!r}; expected'):
            call()


def test_more_than_there_are_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('RESTORE_DATA', str(tmp_path))
    folder = tmp_path / 'cifar10_4k'
    folder.mkdir()
    for k in range(4):
        save(folder / f'tiles_{k}.png', np.zeros((800, 1280, 3), np.uint8))
    (folder / 'labels.json').write_text(json.dumps(dict(labels=list(range(4000)))))
    with pytest.raises(ValueError, match='n is 801; cifar10_4k test holds 800'):
        cifar10(801, 'test', 'tiles')
    assert len(cifar10(np.int64(800), 'test', 'tiles')[0]) == 800

    class Stub:
        def __init__(self, *args, **kw):
            self.data, self.targets = np.zeros((5, 32, 32, 3), np.uint8), list(range(5))

    monkeypatch.setattr('torchvision.datasets.CIFAR10', Stub)
    with pytest.raises(ValueError, match='n is 6; CIFAR-10 train holds 5'):
        cifar10(6)
    x, y = cifar10(4)
    assert x.shape == (4, 3, 32, 32) and y.tolist() == [0, 1, 2, 3] and len(cifar10()[0]) == 5


def test_the_callers_random_state_stays(paired):
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    wanted = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    digits(5)
    thermal(1, 16)
    photos('valid')
    PairedFolder(paired)[0]
    budget()
    x, kept = open_image(paired / 'HR/0.png')
    save_image(as_image(x, kept), paired / 'out.png')
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == wanted


# folders, pairs and crops


def test_hidden_files_and_folders_are_no_images(tmp_path):
    for name in ('.hidden/a.png', 'cat/.thumbs/b.png', 'cat/c.png', '._d.png', 'deep.png/e.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / name, scene())
    ds = ImageFolder(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in ds.paths] == ['cat/c.png', 'deep.png/e.png']
    assert ds.classes == ['cat', 'deep.png'] and ds.labels == [0, 1] and ds[1].shape == (3, 64, 80)
    (tmp_path / '.root').mkdir()
    save(tmp_path / '.root/f.png', scene())
    assert len(ImageFolder(tmp_path / '.root')) == 1  # a hidden folder that was asked for by name


@pytest.mark.parametrize('glob', ['../*', 'a/../../*', '/etc/*', ''])
def test_a_glob_does_not_leave_the_folder(tmp_path, glob):
    (tmp_path / 'in').mkdir()
    for name in ('in/a.png', 'b.png'):
        save(tmp_path / name, scene())
    with pytest.raises(
        ValueError, match='glob is .*; expected a pattern of files below the folder'
    ):
        ImageFolder(tmp_path / 'in', glob=glob)


@pytest.mark.parametrize('channels', [2, 0, 4, '3', None])
def test_channels_are_refused_before_the_first_image(tmp_path, channels):
    save(tmp_path / 'a.png', scene())
    for call in (
        lambda: ImageFolder(tmp_path, channels),
        lambda: PairedFolder(tmp_path, channels=channels),
        lambda: photos('valid', channels),
    ):
        with pytest.raises((TypeError, ValueError), match='channels is'):
            call()
    with pytest.raises(ValueError, match='split is'):
        photos(['train'])


def test_endings_in_capitals_are_read(tmp_path):
    save(tmp_path / 'A.PNG', scene())
    save(tmp_path / 'B.TIFF', scene())
    assert len(ImageFolder(tmp_path)) == 2 and ImageFolder(tmp_path)[1].shape == (3, 64, 80)


def test_div2ks_names_are_partners(paired):
    for k in range(3):
        (paired / f'LR/{k}.png').rename(paired / f'LR/{k}x4.png')
    given, made = PairedFolder(paired), PairedFolder(paired / 'HR')
    for k in range(3):
        assert torch.equal(given[k][0], made[k][0]) and torch.equal(given[k][1], made[k][1])
    (paired / 'LR/1x4.png').rename(paired / 'LR/1x2.png')
    with pytest.raises(ValueError, match='no image named like 1.png'):
        PairedFolder(paired)


def test_a_name_that_ends_so_itself(paired):
    "fox4 belongs to fox4, not to fo."
    for sub in ('HR', 'LR'):
        (paired / sub / '0.png').rename(paired / sub / 'fo.png')
        (paired / sub / '1.png').rename(paired / sub / 'fox4.png')
    ds = PairedFolder(paired)
    assert [ds.lr.paths[i].name for i in ds.partner] == ['2.png', 'fo.png', 'fox4.png']
    (paired / 'LR/fo.png').unlink()
    with pytest.raises(ValueError, match='no image named like fo.png'):
        PairedFolder(paired)


def test_two_files_of_one_name(paired):
    save(paired / 'LR/1.bmp', scene(1, 16, 20))
    with pytest.raises(ValueError, match='LR holds 1.bmp and 1.png; expected one image named 1'):
        PairedFolder(paired)
    (paired / 'LR/1.bmp').unlink()
    save(paired / 'HR/2.bmp', scene(2))
    with pytest.raises(ValueError, match='HR holds 2.bmp and 2.png'):
        PairedFolder(paired)
    assert len(PairedFolder(paired / 'HR')) == 4  # made pairs have no partner to be wrong about


def test_small_images_without_large_ones(paired):
    for p in (paired / 'HR').iterdir():
        p.rename(paired / p.name)
    (paired / 'HR').rmdir()
    with pytest.raises(ValueError, match='holds LR/ and no HR/'):
        PairedFolder(paired)
    assert len(PairedFolder(paired / 'LR')) == 3  # one folder, asked for by name


def test_pairs_without_pixels_are_refused(tmp_path):
    save(tmp_path / 'a.png', scene(0, 64, 80))
    with pytest.raises(ValueError, match=r'a.png is \(64, 80\); too small for scale=100'):
        PairedFolder(tmp_path, scale=100)[0]
    assert PairedFolder(tmp_path, scale=64)[0][0].shape == (1, 1, 1)
    for sub, size in (('HR', 4), ('LR', 1)):
        (tmp_path / sub).mkdir()
        save(tmp_path / sub / 'a.png', scene(0, 16, 16)[:size, :size])
    assert PairedFolder(tmp_path)[0][0].shape == (1, 1, 1)  # a single pixel correlates with nothing


def test_crops_end():
    torch.manual_seed(0)
    crops = Crops([torch.rand(1, 12, 12)], 8, n=3)
    seen = []
    for x in crops:
        seen.append(x.shape)
        assert len(seen) <= 3
    assert seen == [(1, 8, 8)] * 3 and crops[-1].shape == crops[-3].shape == (1, 8, 8)
    for k in (3, -4, 1000):
        with pytest.raises(IndexError, match=f'k is {k}; there are 3 crops'):
            crops[k]
    with pytest.raises(TypeError):
        crops[0:2]


@pytest.mark.parametrize('item', [(torch.rand(1, 9, 9),) * 3, ()])
def test_crops_take_images_or_pairs(item):
    with pytest.raises(ValueError, match='expected an image or a pair'):
        Crops([item], 8)[0]
    with pytest.raises(TypeError, match='ndarray'):
        Crops([(torch.rand(1, 9, 9), np.zeros((1, 9, 9)))], 8)[0]


@pytest.mark.parametrize('k', [8, -1, 1.0])
def test_a_square_has_eight_poses(k):
    for call in (dihedral, undo_dihedral):
        with pytest.raises(ValueError, match='k is .*; expected a whole number from 0 to 7'):
            call(torch.eye(3), k)


def test_data_sets_travel_to_workers(paired):
    for ds in (
        ImageFolder(paired),
        PairedFolder(paired),
        Crops(PairedFolder(paired), 16, n=4, scale=4),
    ):
        again = pickle.loads(pickle.dumps(ds))
        assert len(again) == len(ds)
        loader = torch.utils.data.DataLoader(again, 1, num_workers=1)
        assert sum(1 for _ in loader) == len(ds)


def test_show_images_of_other_arguments(monkeypatch):
    plt = pytest.importorskip('matplotlib.pyplot')
    plt.switch_backend('agg')
    monkeypatch.setattr(plt, 'show', lambda: None)
    show_images(
        [torch.rand(1, 4, 4).half()] * 3, [1, 2.5, None], cols=np.int64(2), size=np.float32(1)
    )
    assert len(plt.gcf().axes) == 4 and plt.gcf().axes[1].get_title() == '2.5'
    for bad in (0, -1, float('nan')):
        with pytest.raises(ValueError, match='size is'):
            show_images([torch.rand(1, 4, 4)], size=bad)
    with pytest.raises(ValueError, match='cols is -2'):
        show_images([torch.rand(1, 4, 4)], cols=-2)
    plt.close('all')
