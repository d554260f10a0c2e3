import gzip, json

import numpy as np
import pytest
import torch
from PIL import Image

from restore_lib.data import (FACES, PHOTOS, Crops, ImageFolder, PairedFolder, budget, check_images, cifar10, digits, dihedral, photos,
                              read_image, show_images, thermal, undo_dihedral)


def save(path, array): Image.fromarray(array).save(path)


def scene(seed=0, h=64, w=80): return (thermal(1, size=(h, w), seed=seed)[0, 0]*255).round().byte().numpy()


# budgets

@pytest.mark.parametrize('env, expect', [({'IN_TEST': '1'}, 20), ({'RESTORE_BUDGET': 'study'}, 20_000), ({'RESTORE_BUDGET': 'cpu'}, 1500)])
def test_budget(monkeypatch, env, expect):
    for k in ('IN_TEST', 'RESTORE_BUDGET'): monkeypatch.delenv(k, raising=False)
    for k, v in env.items(): monkeypatch.setenv(k, v)
    assert budget() == expect


def test_budget_unknown(monkeypatch):
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setenv('RESTORE_BUDGET', 'huge')
    with pytest.raises(ValueError, match="'huge'"): budget()


# embedded sources

def test_no_photo_in_two_splits():
    names = [n for split in PHOTOS.values() for n in split]
    assert len(names) == len(set(names)) == 13
    for split in PHOTOS:
        for x in photos(split, 1).values(): check_images(x, channels=1, ndim=3)


def test_no_typeface_in_two_splits():
    faces = [f for split in FACES.values() for f in split]
    assert len(faces) == len(set(faces))


def test_digits_are_seeded_and_balanced():
    (a, la), (b, lb), (c, _) = digits(200), digits(200), digits(200, seed=1)
    assert torch.equal(a, b) and torch.equal(la, lb) and not torch.equal(a, c)
    assert a.shape == (200, 1, 28, 28) and la.bincount(minlength=10).tolist() == [20]*10
    assert 0 <= a.min() and a.max() <= 1 and a.flatten(1).max(1).values.min() > 0.5        # no empty digit


def test_thermal_contract():
    a = thermal(19, size=(40, 56), seed=3)
    assert a.shape == (19, 1, 40, 56) and a.dtype == torch.float32 and 0 <= a.min() and a.max() <= 1
    assert torch.equal(a[:5], thermal(5, size=(40, 56), seed=3)) and torch.equal(a, thermal(19, size=(40, 56), seed=3))
    assert (a.flatten(1).std(1) > 0.01).float().mean() > 0.9                               # scenes, not flat fields


@pytest.mark.parametrize('bad', [dict(n=0), dict(n=1.5), dict(n=2, size=8), dict(n=2, size=(64, '64')), dict(n=1, seed=-1)])
def test_thermal_bad_input(bad):
    with pytest.raises((TypeError, ValueError), match='expected'): thermal(**bad)


# sources that the user brings

def idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b''.join(int(d).to_bytes(4, 'big') for d in array.shape)
    with (gzip.open if path.suffix == '.gz' else open)(path, 'wb') as f: f.write(header + array.tobytes())


@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_mnist_files(tmp_path, monkeypatch, suffix):
    monkeypatch.setenv('RESTORE_DATA', str(tmp_path))
    raw = tmp_path/'mnist/MNIST/raw'
    with pytest.raises(FileNotFoundError, match='download=True'): digits(5, source='mnist')
    raw.mkdir(parents=True)
    images, labels = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8), np.arange(12, dtype=np.uint8) % 10
    idx(raw/f't10k-images-idx3-ubyte{suffix}', images), idx(raw/f't10k-labels-idx1-ubyte{suffix}', labels)
    x, y = digits(7, 'test', source='mnist')
    assert torch.equal((x*255).round().byte()[:, 0], torch.from_numpy(images[:7])) and y.tolist() == labels[:7].tolist()
    with pytest.raises(ValueError, match='holds 12'): digits(13, 'test', source='mnist')


def test_cifar_tiles(tmp_path, monkeypatch):
    monkeypatch.setenv('RESTORE_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError): cifar10(source='tiles')
    folder = tmp_path/'cifar10_4k'
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (4, 25, 40, 32, 32, 3), dtype=np.uint8)
    for k in range(4): save(folder/f'tiles_{k}.png', images[k].transpose(0, 2, 1, 3, 4).reshape(800, 1280, 3))
    (folder/'labels.json').write_text(json.dumps(dict(labels=list(range(4000)))))
    x, y = cifar10(source='tiles', split='test')
    assert len(x) == 800 and y[0] == 3200
    assert torch.equal((x[5]*255).round().byte().permute(1, 2, 0), torch.from_numpy(images.reshape(4000, 32, 32, 3)[3205]))


def test_real_sets(real, monkeypatch):
    x, y = digits(10, 'test', source='mnist') if real('mnist') else None
    assert y.tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    x, y = cifar10(source='tiles')
    assert x.shape == (3200, 3, 32, 32) and y[:3].tolist() == [6, 9, 9]
    assert len(ImageFolder(real('natural/set12'), channels=1)) == 12
    small, large = PairedFolder(real('ir/tno17_dev'))[0]
    assert large.shape[-1] == 4*small.shape[-1]


# reading files

def test_read_image_modes(tmp_path):
    deep = np.linspace(0, 65535, 64*64).astype(np.uint16).reshape(64, 64)
    save(tmp_path/'deep.png', deep)
    assert np.allclose(read_image(tmp_path/'deep.png', 1)[0]*65535, deep, atol=1)
    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    save(tmp_path/'rgba.png', rgba)
    assert read_image(tmp_path/'rgba.png').shape == (3, 8, 8)
    turned = Image.fromarray(rgba[..., :3].repeat(2, 1))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path/'turned.jpg', exif=exif)
    assert read_image(tmp_path/'turned.jpg').shape == (3, 16, 8)
    save(tmp_path/'dot.png', np.uint8([[255]]))
    assert read_image(tmp_path/'dot.png', 1).tolist() == [[[1.0]]]
    with pytest.raises(ValueError, match='channels is 2'): read_image(tmp_path/'dot.png', 2)
    with pytest.raises(FileNotFoundError): read_image(tmp_path/'absent.png')


@pytest.mark.parametrize('content', [b'', b'no image at all', b'\x89PNG\r\n\x1a\n' + b'\0'*40])
def test_corrupt_file_is_named(tmp_path, content):
    (tmp_path/'bad.png').write_bytes(content)
    with pytest.raises(ValueError, match='bad.png is not a readable image'): ImageFolder(tmp_path)[0]


def test_truncated_file_is_named(tmp_path):
    save(tmp_path/'cut.png', scene())
    (tmp_path/'cut.png').write_bytes((tmp_path/'cut.png').read_bytes()[:-500])
    with pytest.raises(ValueError, match='cut.png'): ImageFolder(tmp_path)[0]


def test_image_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='not a folder'): ImageFolder(tmp_path/'absent')
    with pytest.raises(FileNotFoundError, match='holds no image'): ImageFolder(tmp_path)
    for k, name in enumerate(('cat/1.png', 'cat/2.png', 'dog/1.png')):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        save(tmp_path/name, scene(k))
    ds = ImageFolder(tmp_path, channels=1)
    assert ds.classes == ['cat', 'dog'] and ds.labels == [0, 0, 1] and ds[0].shape == (1, 64, 80)
    assert len(ImageFolder(tmp_path, glob='dog/*')) == 1


# pairs

@pytest.fixture
def paired(tmp_path):
    for d in ('HR', 'LR'): (tmp_path/d).mkdir()
    for k in range(3):
        hr = scene(k)
        save(tmp_path/f'HR/{k}.png', hr)
        Image.fromarray(hr).resize((20, 16), Image.BICUBIC).save(tmp_path/f'LR/{k}.png')
    return tmp_path


def test_pairs_from_folder_and_made_agree(paired):
    given, made = PairedFolder(paired), PairedFolder(paired/'HR')
    for (a, x), (b, z) in zip([given[i] for i in range(3)], [made[i] for i in range(3)]):
        assert torch.equal(a, b) and torch.equal(x, z) and a.shape == (1, 16, 20)


def test_pair_sizes_names_scenes(paired):
    save(paired/'LR/1.png', scene(1))
    with pytest.raises(ValueError, match='1.png.*expected 4 times as large'): PairedFolder(paired)[1]
    Image.fromarray(scene(2)).resize((20, 16)).save(paired/'LR/0.png')
    with pytest.raises(ValueError, match='0.png.*same scene'): PairedFolder(paired)[0]
    (paired/'LR/2.png').unlink()
    with pytest.raises(ValueError, match='2.png'): PairedFolder(paired)


def test_odd_sizes_are_cut_to_the_scale(tmp_path):
    save(tmp_path/'a.png', scene(0, 67, 81))
    y, x = PairedFolder(tmp_path)[0]
    assert y.shape == (1, 16, 20) and x.shape == (1, 64, 80)


# crops

def test_dihedral_is_the_group_of_the_square():
    x = torch.arange(9.).reshape(1, 3, 3)
    poses = [dihedral(x, k) for k in range(8)]
    assert len({tuple(p.flatten().tolist()) for p in poses}) == 8
    assert all(torch.equal(undo_dihedral(p, k), x) for k, p in enumerate(poses))


def test_pair_crops_stay_aligned():
    x = torch.rand(1, 64, 80)
    y = x.reshape(1, 16, 4, 20, 4).mean((2, 4))                   # the mean of each block: commutes with poses exactly
    ds = Crops([(y, x)], size=16, scale=4, n=50)
    torch.manual_seed(0)
    seen = [ds[i] for i in range(50)]
    for small, large in seen: assert torch.allclose(large.reshape(1, 4, 4, 4, 4).mean((2, 4)), small, atol=1e-6)
    assert len({s.sum().item() for s, _ in seen}) > 20


def test_crops_bad_input():
    with pytest.raises(ValueError, match='empty'): Crops([])
    with pytest.raises(ValueError, match='multiple of scale'): Crops([torch.rand(1, 9, 9)], size=9, scale=4)
    with pytest.raises(ValueError, match=r'images\[0\].*too small'): Crops([torch.rand(1, 9, 99)], size=16)[0]
    with pytest.raises(ValueError, match='4 times as large'): Crops([(torch.rand(1, 16, 16), torch.rand(1, 60, 64))], size=16, scale=4)[0]
    with pytest.raises(TypeError, match='uint8'): Crops([torch.zeros(1, 20, 20, dtype=torch.uint8)], size=16)[0]
    with pytest.raises(TypeError, match='ndarray'): Crops([np.zeros((1, 20, 20))], size=16)[0]
    with pytest.raises(ValueError, match='NaN'): Crops([torch.full((1, 20, 20), float('nan'))], size=16)[0]


# the checker and the plots

@pytest.mark.parametrize('x, error, says', [
    (np.zeros((1, 1, 4, 4)), TypeError, 'ndarray'), (torch.zeros(1, 1, 4, 4).byte(), TypeError, 'uint8'), (torch.zeros(4, 4), ValueError, r'\(4, 4\)'),
    (torch.zeros(1, 2, 4, 4), ValueError, '2 channels'), (torch.full((1, 1, 4, 4), 200.), ValueError, '0 to 255'),
    (torch.full((1, 1, 4, 4), float('inf')), ValueError, 'infinite')])
def test_check_images(x, error, says):
    with pytest.raises(error, match=says): check_images(x, 'picture', channels=(1, 3))


def test_show_images_never_stretches_and_names_clipping(monkeypatch):
    plt = pytest.importorskip('matplotlib.pyplot')
    plt.switch_backend('agg')
    monkeypatch.setattr(plt, 'show', lambda: None)
    show_images([torch.full((1, 8, 8), 0.4), torch.full((3, 8, 8), 1.5)], ['a', 'b'])
    first, second = plt.gcf().axes[:2]
    assert first.images[0].get_clim() == (0, 1) and 'clipped' in second.get_title() and 'clipped' not in first.get_title()
    with pytest.raises(ValueError, match='titles holds 1'): show_images([torch.rand(1, 4, 4)]*2, ['only one'])
    plt.close('all')
