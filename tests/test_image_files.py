"""restore_lib.image_files: every kind of file there and back, what is said and what is refused,
memory; windows without seams, strips, what stands around a command."""

import os, struct, tracemalloc, warnings, zlib
from functools import lru_cache
from pathlib import Path

from common import shake
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from restore_lib import image_files
from restore_lib.image_files import (
    Kept,
    as_image,
    check_output,
    in_strips,
    open_image,
    opened_image,
    planes_of,
    read_image,
    run_command,
    save_image,
    tiled,
)
from restore_lib.metrics import peak_memory
from restore_lib.thermal import thermal

pytestmark = pytest.mark.usefixtures('seed')


def save(path, array):
    Image.fromarray(array).save(path)


def scene(seed=0, h=64, w=80):
    return (thermal(1, size=(h, w), seed=seed)[0, 0] * 255).round().byte().numpy()


# reading files


def test_read_image_modes(tmp_path):
    deep = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    save(tmp_path / 'deep.png', deep)
    assert np.allclose(read_image(tmp_path / 'deep.png', 1)[0] * 65535, deep, atol=1)
    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    save(tmp_path / 'rgba.png', rgba)
    assert read_image(tmp_path / 'rgba.png').shape == (3, 8, 8)
    turned = Image.fromarray(rgba[..., :3].repeat(2, 1))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / 'turned.jpg', exif=exif)
    assert read_image(tmp_path / 'turned.jpg').shape == (3, 16, 8)
    save(tmp_path / 'dot.png', np.uint8([[255]]))
    assert read_image(tmp_path / 'dot.png', 1).tolist() == [[[1.0]]]
    with pytest.raises(ValueError, match='channels is 2'):
        read_image(tmp_path / 'dot.png', 2)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / 'absent.png')


def png(path, bits, kind, array, chunks=()):
    "A PNG by hand: kind 0 grey, 2 RGB, 4 grey with alpha, 6 RGBA."
    chunk = lambda name, data: (
        struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    )
    rows = array.astype('>u2' if bits == 16 else 'u1').reshape(len(array), -1)
    if bits < 8:
        rows = np.packbits(
            np.unpackbits(rows.astype('u1')[..., None], axis=2)[..., -bits:].reshape(len(rows), -1),
            axis=1,
        )
    head = struct.pack('>IIBBBBB', array.shape[1], array.shape[0], bits, kind, 0, 0, 0)
    body = zlib.compress(b''.join(b'\0' + row.tobytes() for row in rows))
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n'
        + b''.join(chunk(*c) for c in ((b'IHDR', head), *chunks, (b'IDAT', body), (b'IEND', b'')))
    )
    return path


def tiff(path, bits, channels, array, data):
    "A TIFF by hand, without compression."
    tags = [
        (256, 3, array.shape[1]),
        (257, 3, array.shape[0]),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, 2 if channels == 3 else 1),
        (273, 4, None),
        (277, 3, channels),
        (278, 3, array.shape[0]),
        (279, 4, len(data)),
    ]
    at = 14 + 12 * len(tags)
    depths = struct.pack(f'<{channels}H', *[bits] * channels) if channels > 1 else b''
    out = b'II*\0' + struct.pack('<IH', 8, len(tags))
    for tag, kind, value in tags:
        count = channels if tag == 258 else 1
        value = at if count > 1 else at + len(depths) if tag == 273 else value
        out += struct.pack('<HHI', tag, kind, count) + struct.pack('<I', value)
    path.write_bytes(out + b'\0' * 4 + depths + data)
    return path


def deep_colour(folder, kind):
    "A file of 16 bits a channel, and its upper bytes as RGB."
    a = np.random.default_rng(0).integers(0, 65536, (8, 9, 4))
    rgb = (a[..., :3] >> 8).astype(np.uint8)
    if kind == 'rgb.png':
        return png(folder / kind, 16, 2, a[..., :3]), rgb
    if kind == 'rgba.png':
        return png(folder / kind, 16, 6, a), rgb
    if kind == 'la.png':
        return png(folder / kind, 16, 4, a[..., :2]), rgb[..., :1].repeat(3, 2)
    if kind == 'rgb.tif':
        return tiff(folder / kind, 16, 3, a, a[..., :3].astype('<u2').tobytes()), rgb
    if kind == 'rgb.ppm':
        (folder / kind).write_bytes(b'P6 9 8 65535\n' + a[..., :3].astype('>u2').tobytes())
    return folder / kind, (a[..., :3] / 257).round().astype(np.uint8)  # Pillow rounds here


@pytest.mark.parametrize('kind', ['rgb.png', 'rgba.png', 'la.png', 'rgb.tif', 'rgb.ppm'])
def test_deep_colour_is_said(tmp_path, kind):
    path, rgb = deep_colour(tmp_path, kind)
    with pytest.warns(UserWarning, match='16 bits a channel become 8'):
        x = read_image(path)
    assert torch.equal((x * 255).round().byte().permute(1, 2, 0), torch.from_numpy(rgb))
    said = []
    x, kept = open_image(path, said.append)
    assert said == ['16 bits a channel become 8: Pillow reads colour and alpha no deeper']
    assert kept.mode == {'rgba.png': 'RGBA', 'la.png': 'LA'}.get(kind, 'RGB') and x.shape == (
        1,
        1 if kind == 'la.png' else 3,
        8,
        9,
    )


def test_eight_bits_are_nothing_to_say(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (8, 9, 4), dtype=np.uint8)
    for name in ('a.png', 'a.tif', 'a.jp2', 'a.avif', 'a.webp', 'a.ppm', 'a.bmp', 'a.sgi', 'a.jpg'):
        save(tmp_path / name, a[..., :3])
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert read_image(tmp_path / name).shape == (3, 8, 9)


def test_words_that_are_lost_are_said(tmp_path):
    a = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8))

    def said(name, **options):
        notes = []
        a.save(tmp_path / name, **options)
        open_image(tmp_path / name, notes.append)
        return notes

    for name in ('a.png', 'a.tif', 'a.avif', 'a.webp', 'a.ppm', 'a.bmp', 'a.sgi', 'a.jpg', 'a.tga'):
        assert said(name) == [], name
    words = PngInfo()
    words.add_text('Author', 'a student')
    words.add_itxt('Title', 'a name')
    assert said('a.png', pnginfo=words) == ['text is left out: Author, Title']
    assert said('a.jpg', comment='by hand') == ['the comment is left out']
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"></x:xmpmeta>'
    for name in ('a.jpg', 'a.webp'):
        assert said(name, xmp=packet) == ['the XMP data are left out'], name
    words = PngInfo()
    words.add_itxt('XML:com.adobe.xmp', packet.decode())
    assert said('a.png', pnginfo=words) == ['the XMP data are left out']
    assert said('a.tif', tiffinfo={700: packet}) == ['the XMP data are left out']
    with warnings.catch_warnings():                       # pixels alone are asked for
        warnings.simplefilter('error')
        read_image(tmp_path / 'a.tif')


def test_depths_in_headers_that_pillow_hides(tmp_path):
    save(tmp_path / 'a.jp2', np.zeros((32, 32, 3), np.uint8))
    save(tmp_path / 'a.avif', np.zeros((32, 32, 3), np.uint8))
    for name, mark, step, bit in (
        ('a.jp2', b'\xff\x4f\xff\x51', 42, 8),
        ('a.avif', b'av1C', 6, 64),
    ):
        with Image.open(tmp_path / name) as image:
            assert image_files._bits(image) == 8
        data = bytearray((tmp_path / name).read_bytes())
        data[data.find(mark) + step] |= bit  # 16 bits; ten bits: the header alone
        (tmp_path / name).write_bytes(data)
        with Image.open(tmp_path / 'a.jp2') as image:
            image.format, image.filename = (
                {'a.jp2': 'JPEG2000', 'a.avif': 'AVIF'}[name],
                str(tmp_path / name),
            )
            assert image_files._bits(image) == 16


@pytest.mark.parametrize(
    'top, works',
    [(0, True), (1, False), (255, False), (256, True), (65535, True), (65536, False), (-1, False)],
)
def test_integers_of_unknown_range(tmp_path, top, works):
    "32-bit integers up to 255 may be 8 bits or 16: refused; they were black."
    image = Image.fromarray(np.array([[0, top]], dtype=np.int32))
    image.save(tmp_path / 'a.tif')
    for one in (image, tmp_path / 'a.tif'):
        if works:
            assert open_image(one)[0].flatten().tolist() == pytest.approx([0, top / 65535])
        else:
            with pytest.raises(ValueError, match='integers'):
                open_image(one)
    if not works:
        with pytest.raises(ValueError, match='a.tif is not a readable image: it holds'):
            read_image(tmp_path / 'a.tif', 1)
    else:
        assert read_image(tmp_path / 'a.tif', 1).flatten().tolist() == pytest.approx(
            [0, top / 65535]
        )


def test_known_ranges(tmp_path):
    (tmp_path / 'dark.pgm').write_bytes(b'P5 2 1 65535\n\0\0\0\x09')
    assert read_image(tmp_path / 'dark.pgm', 1).flatten().tolist() == pytest.approx([0, 9 / 65535])
    twelve = tiff(
        tmp_path / 'twelve.tif', 12, 1, np.zeros((1, 2)), bytes([0xFF, 0xF8, 0x00])
    )  # 4095, 2048
    assert read_image(twelve, 1).flatten().tolist() == pytest.approx([1, 2048 / 4095], abs=1e-5)
    Image.fromarray(np.array([[1, 300, 65535]], dtype='>u2')).save(tmp_path / 'big.tif')
    with Image.open(tmp_path / 'big.tif') as image:
        assert image.mode == 'I;16B'
    x, kept = open_image(tmp_path / 'big.tif')
    assert (x * 65535).round().flatten().tolist() == [1, 300, 65535] and kept.mode == 'I;16'


@pytest.mark.parametrize('ending', ['gif', 'tif', 'webp', 'png', 'avif'])
def test_several_frames_are_refused(tmp_path, ending):
    frames = [Image.fromarray(scene(k)) for k in range(3)]
    frames[0].save(tmp_path / f'a.{ending}', save_all=True, append_images=frames[1:])
    for call in (read_image, open_image):
        with pytest.raises(
            ValueError, match=f'a.{ending} is not a readable image: it holds 3 frames; expected one'
        ):
            call(tmp_path / f'a.{ending}')
    with Image.open(tmp_path / f'a.{ending}') as image:
        with pytest.raises(ValueError, match='it holds 3 frames'):
            open_image(image)
        image.seek(1)
        assert open_image(image.copy())[0].shape[-2:] == (64, 80)


def test_views_beside_the_image_are_said(tmp_path):
    frames = [Image.fromarray(scene(k)).convert('RGB') for k in range(2)]
    frames[0].save(tmp_path / 'a.mpo', save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match='the first of 2 images in a MPO file'):
        assert read_image(tmp_path / 'a.mpo').shape == (3, 64, 80)


def test_too_many_pixels_are_named(tmp_path, monkeypatch):
    save(tmp_path / 'large.png', scene())
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(ValueError, match='large.png is not a readable image.*bomb'):
        read_image(tmp_path / 'large.png')
    with pytest.raises(ValueError, match='large.png is not a readable image.*bomb'):
        open_image(tmp_path / 'large.png')


def test_whatever_a_broken_reader_raises_is_named(tmp_path, monkeypatch):
    save(tmp_path / 'a.png', scene())
    for error in (
        struct.error('short'),
        EOFError('end'),
        IndexError('index'),
        KeyError('key'),
        SyntaxError('no'),
    ):

        def broken(image, *args):
            raise error

        monkeypatch.setattr(Image.Image, 'load', broken)
        monkeypatch.setattr('PIL.ImageFile.ImageFile.load', broken)
        with pytest.raises(ValueError, match='a.png is not a readable image'):
            read_image(tmp_path / 'a.png')


# an image and what goes with it


@pytest.mark.parametrize(
    'bits, key, levels',
    [(8, 10, [10, 200, 11]), (2, 1, [1, 3, 0]), (4, 7, [7, 15, 6]), (1, 1, [1, 0, 0])],
)
def test_grey_with_a_transparent_level(tmp_path, bits, key, levels):
    path = png(tmp_path / 'a.png', bits, 0, np.array([levels]), [(b'tRNS', struct.pack('>H', key))])
    x, kept = open_image(path)
    assert kept.mode == 'LA' and np.asarray(kept.alpha).tolist() == [[0, 255, 255]]
    assert x.flatten().tolist() == pytest.approx([v / (2**bits - 1) for v in levels])
    back = as_image(x, kept)
    assert back.mode == 'LA' and np.asarray(back)[0, 1].tolist() == [
        round(255 * levels[1] / (2**bits - 1)),
        255,
    ]


def test_deep_grey_with_a_transparent_level(tmp_path):
    path, said = (
        png(
            tmp_path / 'a.png',
            16,
            0,
            np.array([[1000, 40000]]),
            [(b'tRNS', struct.pack('>H', 1000))],
        ),
        [],
    )
    x, kept = open_image(path, said.append)
    assert kept.mode == 'LA' and np.asarray(as_image(x, kept)).tolist() == [[[4, 0], [156, 255]]]
    assert len(said) == 1 and '16-bit grey with transparency becomes 8-bit' in said[0]
    assert read_image(path, 1).flatten().tolist() == pytest.approx([1000 / 65535, 40000 / 65535])


def test_other_ways_of_transparency():
    a = np.random.default_rng(0).integers(0, 256, (6, 7, 4), dtype=np.uint8)
    rgba = Image.fromarray(a)
    la = rgba.convert('LA')
    for image, mode in (
        (rgba, 'RGBA'),
        (la, 'LA'),
        (rgba.convert('RGBa'), 'RGBA'),
        (la.convert('La'), 'LA'),
        (rgba.quantize(9), 'RGBA'),
    ):
        x, kept = open_image(image)
        assert kept.mode == mode and np.array_equal(
            np.asarray(as_image(x, kept)), np.asarray(image.convert(mode))
        )
    keyed = rgba.convert('RGB')
    keyed.info['transparency'] = tuple(int(v) for v in a[0, 0, :3])
    alpha = np.asarray(open_image(keyed)[1].alpha)
    assert alpha[0, 0] == 0 and alpha.sum() == 255 * 41


def test_read_image_says_that_hidden_colours_show(tmp_path):
    pixels = np.full((2, 3, 4), 255, np.uint8)
    pixels[0, 0] = 0, 160, 60, 0
    Image.fromarray(pixels).save(tmp_path / 'hole.png')
    keyed = Image.fromarray(pixels[..., :3])
    keyed.save(tmp_path / 'keyed.png', transparency=(0, 160, 60))
    Image.fromarray(pixels).quantize().save(tmp_path / 'palette.png')
    for name in ('hole', 'keyed', 'palette'):
        with pytest.warns(UserWarning, match=f'{name}.png is transparent in places') as said:
            x = read_image(tmp_path / f'{name}.png')
        (ours,) = (w for w in said if 'in places' in str(w.message))    # Pillow warns, too
        assert ours.filename == __file__
        assert (x[:, 0, 0] * 255).round().tolist() == [0, 160, 60]
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / 'whole.png')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        read_image(tmp_path / 'whole.png')


@pytest.mark.parametrize('mode', ['CMYK', 'YCbCr', 'HSV', 'LAB'])
def test_colours_that_become_rgb_are_said(mode):
    said, image = [], Image.fromarray(scene()).convert('RGB').convert(mode)
    x, kept = open_image(image, said.append)
    assert (
        kept.mode == 'RGB' and x.shape == (1, 3, 64, 80) and said[0] == f'{mode} colours become RGB'
    )


@lru_cache  # a profile holds the second at which it was made
def profile(space=b'RGB '):
    from PIL import ImageCms

    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    return icc[:16] + space + icc[20:]


@pytest.fixture
def photo(tmp_path):
    "A colour photograph on its side, with all that a camera writes."
    exif = Image.Exif()
    exif[0x112], exif[0x10F] = 6, 'camera'
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))
    image.save(tmp_path / 'photo.png', exif=exif, icc_profile=profile(), dpi=(300, 300))
    image.save(tmp_path / 'photo.tif', exif=exif, icc_profile=profile(), dpi=(300, 300))
    return image, tmp_path / 'photo.png'


@pytest.mark.parametrize('ending', ['png', 'jpg', 'tif'])
def test_profile_resolution_and_exif_stay(photo, tmp_path, ending):
    image, path = photo
    turned = image.transpose(Image.Transpose.ROTATE_270)
    for source in (path, Image.open(path)):
        x, kept = open_image(source)
        save_image(as_image(x, kept), tmp_path / f'out.{ending}', say=pytest.fail)
        with Image.open(tmp_path / f'out.{ending}') as out:
            assert out.size == (8, 12) and out.info['icc_profile'] == profile()
            assert [round(v) for v in out.info['dpi']] == [300, 300]
            assert (
                out.getexif().get(0x10F) == 'camera' and out.getexif().get(0x112, 1) == 1
            )  # not to be turned again
            if ending != 'jpg':
                assert np.array_equal(np.asarray(out), np.asarray(turned))
        assert torch.equal(open_image(tmp_path / f'out.{ending}')[0], x) or ending == 'jpg'
    x, kept = open_image(tmp_path / 'photo.tif')
    assert (
        x.shape == (1, 3, 12, 8)
        and kept.info['icc_profile'] == profile()
        and kept.info['dpi'] == (300, 300)
    )


def test_gamma_stays_or_is_said(tmp_path):
    a, said = np.random.default_rng(0).integers(0, 256, (8, 9, 3)), []
    whites = struct.pack('>8I', *range(30000, 38000, 1000))
    x, kept = open_image(
        png(tmp_path / 'a.png', 8, 2, a, [(b'gAMA', struct.pack('>I', 100_000)), (b'cHRM', whites)])
    )
    save_image(as_image(x, kept), tmp_path / 'b.png', say=pytest.fail)
    with Image.open(tmp_path / 'b.png') as out:
        assert out.info['gamma'] == 1 and out.info['chromaticity'][7] == pytest.approx(0.37)
    save_image(as_image(x, kept), tmp_path / 'b.bmp', said.append)
    assert said == ['BMP keeps no gamma']
    x, kept = open_image(
        png(tmp_path / 'c.png', 8, 2, a, [(b'gAMA', struct.pack('>I', 45_455)), (b'sRGB', b'\1')])
    )
    save_image(as_image(x, kept), tmp_path / 'c.bmp', say=pytest.fail)  # everybody's gamma
    save_image(as_image(x, kept), tmp_path / 'd.png', say=pytest.fail)
    with Image.open(tmp_path / 'd.png') as out:
        assert out.info['srgb'] == 1 and out.info['gamma'] == pytest.approx(0.45455)


def test_a_profile_of_other_colours_is_left_out(tmp_path):
    Image.fromarray(scene()).convert('CMYK').save(tmp_path / 'a.jpg', icc_profile=profile(b'CMYK'))
    said = []
    x, kept = open_image(tmp_path / 'a.jpg', said.append)
    assert 'icc_profile' not in kept.info and said == [
        'CMYK colours become RGB',
        'the ICC profile is left out: it is made for CMYK',
    ]


# writing files


def kept_of(mode, w=20, h=10):
    "A Kept of that mode and a ramp that goes with it."
    alpha = (
        Image.fromarray(np.tile(np.linspace(0, 255, w).astype(np.uint8), (h, 1)))
        if 'A' in mode
        else None
    )
    return torch.linspace(0, 1, w).expand(1, 3 if 'RGB' in mode else 1, h, w), Kept(mode, alpha)


@pytest.mark.parametrize('ending', ['webp', 'gif', 'avif', 'jpg', 'bmp', 'tga'])
def test_deep_grey_becomes_eight_bits_and_is_said(tmp_path, ending):
    "It was white, or an error after the work."
    (x, kept), said, path = kept_of('I;16'), [], tmp_path / f'a.{ending}'
    check_output(path, kept, (20, 10), say=said.append)
    assert len(said) == 1 and 'keeps 8 bits of grey, not 16' in said[0] and not path.exists()
    save_image(as_image(x * 0 + 0.5, kept), path, say=said.append)
    with Image.open(path) as out:
        assert abs(np.asarray(out.convert('L')).astype(int) - 128).max() <= 1
    assert said[1:] == said[:1]


@pytest.mark.parametrize('ending', ['png', 'tif', 'pgm', 'jp2'])
def test_deep_grey_stays(tmp_path, ending):
    x, kept = kept_of('I;16')
    save_image(as_image(x, kept), tmp_path / f'a.{ending}', say=pytest.fail)
    assert torch.equal(
        (read_image(tmp_path / f'a.{ending}', 1) * 65535).round(),
        (x[0].double() * 65535).round().float(),
    )


@pytest.mark.parametrize(
    'mode, name, says',
    [
        ('RGBA', 'a.jpg', 'JPEG keeps no alpha channel; expected one that does'),
        ('LA', 'a.JPG', 'JPEG'),
        ('RGBA', 'a.bmp', 'BMP keeps no alpha'),
        ('RGBA', 'a.ppm', 'PPM keeps no alpha'),
        ('LA', 'a.gif', 'GIF keeps no alpha'),
        ('L', 'a.xbm', 'XBM takes no image'),
        ('RGB', 'a.hdf', 'HDF5'),
        ('L', 'a.xyz', "'.xyz'"),
        ('L', 'a', "ends in ''"),
        ('L', '.png', "ends in ''"),
        ('L', 'folder.png', 'folder.png is a folder'),
        ('L', 'no/a.png', 'no is no folder'),
        ('L', 'x' * 300 + '.png', 'cannot be written'),
    ],
)
def test_what_cannot_be_written_is_refused_before(tmp_path, mode, name, says):
    (tmp_path / 'folder.png').mkdir()
    x, kept = kept_of(mode)
    for call in (
        lambda: check_output(tmp_path / name, kept, (20, 10)),
        lambda: save_image(as_image(x, kept), tmp_path / name),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    assert [p.name for p in tmp_path.rglob('*')] == ['folder.png']


def test_the_input_a_locked_folder_and_sides(tmp_path):
    save(tmp_path / 'a.png', scene())
    (tmp_path / 'b.png').symlink_to('a.png')
    os.link(tmp_path / 'a.png', tmp_path / 'c.png')
    kept = open_image(tmp_path / 'a.png')[1]
    for name in ('a.png', 'b.png', 'c.png'):
        with pytest.raises(ValueError, match='is the image itself'):
            check_output(tmp_path / name, kept, (80, 64), tmp_path / 'a.png')
    if Path('/proc').is_dir():
        with pytest.raises(ValueError, match='/proc/a.png cannot be written'):
            check_output('/proc/a.png', kept, (80, 64))
    for name, size in (
        ('a.webp', (16_384, 9)),
        ('a.webp', (9, 16_384)),
        ('a.jpg', (65_536, 9)),
        ('a.ico', (300, 9)),
    ):
        with pytest.raises(ValueError, match=f'takes no image of {size[0]} x {size[1]} pixels'):
            check_output(tmp_path / name, kept, size)
    check_output(tmp_path / 'd.webp', kept, (16_383, 9), say=pytest.fail)
    check_output(tmp_path / 'D.PNG', kept, (80, 64), say=pytest.fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.png', 'b.png', 'c.png']


def test_what_a_format_drops_is_said(tmp_path):
    said, (x, kept) = [], kept_of('RGBA')
    kept.info.update(dpi=(300.0, 300.0), icc_profile=profile())
    save_image(as_image(x, kept), tmp_path / 'a.gif', said.append)
    assert said == [
        'GIF keeps alpha as on or off',
        'GIF keeps 256 colours',
        'GIF keeps no ICC profile',
        'GIF keeps no resolution (dpi)',
    ]
    with pytest.warns(UserWarning, match='WEBP keeps no resolution'):
        save_image(as_image(x, kept), tmp_path / 'a.webp')
    with pytest.warns(UserWarning, match='what it keeps is not checked'):
        save_image(as_image(x, kept), tmp_path / 'a.pdf')
    with pytest.raises(ValueError, match='mode CMYK; expected one of L, LA, RGB'):
        save_image(Image.new('CMYK', (4, 4)), tmp_path / 'b.tif')


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    x, kept = kept_of('L')
    image, path = as_image(x, kept), tmp_path / 'a.png'
    path.write_text('old')
    whole = Image.Image.save

    def full(self, file, *args, **kw):
        whole(self, file, *args, **kw)
        if isinstance(file, Path):
            raise OSError(28, 'No space left on device')

    with monkeypatch.context() as m:
        m.setattr(Image.Image, 'save', full)
        with pytest.raises(OSError, match='No space'):
            save_image(image, path)
    assert path.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['a.png']
    save_image(image, path)
    assert [p.name for p in tmp_path.iterdir()] == ['a.png'] and torch.equal(
        read_image(path, 1), (x[0] * 255).round() / 255
    )


def test_threads_write_beside_each_other(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    pairs = [kept_of('RGB', 20 + k) for k in range(12)]
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda k: save_image(as_image(*pairs[k]), tmp_path / f'{k}.png', say=pytest.fail),
                range(12),
            )
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f'{k}.png' for k in range(12))
    for k in range(12):
        assert abs(read_image(tmp_path / f'{k}.png') - pairs[k][0][0]).max() < 0.51 / 255


@pytest.mark.parametrize(
    'x, mode, says',
    [
        (torch.full((1, 1, 4, 4), float('nan')), 'L', 'NaN'),
        (torch.rand(1, 3, 4, 4), 'L', r'expected \(1, h, w\) for mode L'),
        (torch.rand(1, 1, 4, 4), 'RGBA', r'expected \(3, h, w\)'),
        (torch.rand(2, 1, 4, 4), 'L', r'\(2, 1, 4, 4\)'),
    ],
)
def test_what_is_no_result(x, mode, says):
    with pytest.raises(ValueError, match=says):
        as_image(x, Kept(mode))


def test_levels_are_those_of_doubles_in_any_strips(monkeypatch):
    "Values at half a level, where a product in float32 lands on the half."
    halves = torch.cat([(torch.arange(255) + 0.5) / 255, torch.linspace(-0.2, 1.2, 255)])
    x = torch.stack([halves.roll(k) for k in range(90)]).reshape(3, 30, 510)
    want = (x.clamp(0, 1).double() * 255).round().byte().permute(1, 2, 0).numpy()
    assert ((x * 255).round().clamp(0, 255).byte() != (x.double() * 255).round()).any()
    for strip in (1, 510 * 3 * 7, 2**18):
        monkeypatch.setattr(image_files, '_STRIP', strip)
        assert np.array_equal(np.asarray(as_image(x, Kept('RGB'))), want)
        deep = np.asarray(as_image(x[:1], Kept('I;16')))
        assert np.array_equal(deep, (x[0].clamp(0, 1).double() * 65535).round().numpy())
        for dtype in (torch.float16, torch.float64):
            want_of = (x[:1].to(dtype).clamp(0, 1).double() * 255).round()[0].numpy()
            assert np.array_equal(np.asarray(as_image(x[:1].to(dtype), Kept('L'))), want_of)
    x[2, 29, 509] = float('nan')
    with pytest.raises(ValueError, match='NaN'):
        as_image(x, Kept('RGB'))


def test_rounding_takes_no_copy_in_doubles():
    "It was the peak of memory of all that is written: 28 bytes a value."
    x = torch.rand(3, 700, 700)

    def peak(x):
        tracemalloc.start()
        as_image(x, Kept('RGB'))
        found = tracemalloc.get_traced_memory()[1]  # NumPy's arrays
        tracemalloc.stop()
        return found

    large, small = (peak(v) for v in (x, x[:, :500, :500]))
    values = 3 * (700**2 - 500**2)
    assert (large - small) / values < 2.5 and large < 12e6
    assert peak_memory(lambda x: as_image(x, Kept('RGB')), x) < 5e6  # torch's; all in doubles: 12e6


def test_reading_takes_no_second_copy_in_floats(tmp_path):
    save(tmp_path / 'a.png', np.zeros((1000, 1000), np.uint8))
    tracemalloc.start()
    open_image(tmp_path / 'a.png')
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found < 7e6  # four bytes of the result, one of the levels, one in Pillow's hands


# windows


@pytest.mark.parametrize('size, overlap', [(32, 16), (24, 12), (32, 9)])
def test_no_seams(size, overlap):
    """A network without long context: windows say what the whole picture says.
    1e-3 away from the border would do; here it is exact, and at the border too."""
    conv, y = shake(nn.Conv2d(3, 3, 5, padding=2)), torch.rand(2, 3, 75, 101)
    with torch.no_grad():
        whole, out = conv(y), tiled(conv, y, size, overlap, batch=3)
    assert (
        out.shape == y.shape
        and (out - whole)[..., 4:-4, 4:-4].abs().max() < 1e-5
        and (out - whole).abs().max() < 1e-5
    )
    with torch.no_grad():
        cut = tiled(conv, y, size, 0)
    assert (cut - whole).abs().max() > 0.05  # the measure does see seams


@pytest.mark.parametrize('hw', [(8, 8), (8, 9), (23, 8), (17, 30), (16, 24)])
@pytest.mark.parametrize('overlap', [0, 1, 2, 3, 4, 5, 6, 7])
def test_windows_of_the_identity(hw, overlap):
    "Weights sum to one everywhere, whatever overlaps; every pixel is covered."
    y = torch.randn(2, 3, *hw)
    out = tiled(lambda v: v, y, 8, overlap, batch=5)
    assert torch.allclose(out, y, atol=1e-6) if overlap else torch.equal(out, y)
    assert torch.allclose(tiled(torch.ones_like, y, 8, overlap), torch.ones(()), atol=1e-6)


@pytest.mark.parametrize('size', [7, 8, 15])
def test_every_overlap(size):
    for overlap in range(size):
        for n in range(size, 3 * size):
            assert torch.allclose(
                tiled(lambda v: v, torch.ones(1, 1, n, size), size, overlap),
                torch.ones(()),
                atol=1e-6,
            ), (overlap, n)


def test_a_windows_outer_pixels_do_not_count_inside():
    """Where the picture ends they must;
    elsewhere a network that errs in the outer quarter of the overlap does no harm."""

    def errs(v):
        v = v.clone()
        v[..., :2, :], v[..., -2:, :], v[..., :2], v[..., -2:] = 9, 9, 9, 9
        return v

    y = torch.rand(1, 1, 50, 50)
    out = tiled(errs, y, 16, 8)
    assert (
        torch.allclose(out[..., 2:-2, 2:-2], y[..., 2:-2, 2:-2], atol=1e-6)
        and (out[..., :2, :] > 8).all()
        and (out[..., -2:] > 8).all()
    )


def test_windows_batches_order_and_progress():
    y, seen, bars = torch.rand(3, 2, 20, 33), [], []

    def fn(v):
        seen.append(v.shape)
        return v * 2

    out = tiled(fn, y, 8, 4, batch=4, progress=lambda it: bars.append(len(it)) or it)
    assert (
        torch.allclose(out, 2 * y, atol=1e-6)
        and all(s[0] <= 12 and s[1:] == (2, 8, 8) for s in seen)
        and bars == [len(seen)]
        and sum(s[0] for s in seen) == 3 * 4 * 8
    )


@pytest.mark.parametrize(
    'hw, size, overlap, says',
    [
        ((40, 40), 8, 8, 'overlap is 8; expected 0 to 7'),
        ((40, 40), 8, -1, 'overlap is -1'),
    ],
)
def test_wrong_windows(hw, size, overlap, says):
    with pytest.raises(ValueError, match=says):
        tiled(lambda v: v, torch.rand(1, 1, *hw), size, overlap)


def test_windows_of_several_tensors():
    a, b = torch.rand(2, 2, 3, 30, 21)
    assert torch.allclose(tiled(lambda u, v: u - v, a, 8, 4, batch=5, beside=[b]), a - b, atol=1e-6)


def test_windows_take_no_second_copy():
    small, large = (
        peak_memory(lambda y: tiled(lambda v: v, y, 32, 16), torch.rand(1, 3, s, s))
        for s in (128, 512)
    )
    assert (large - small) / (512**2 - 128**2) < 14  # bytes a pixel: the result alone, 12


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(batch=0), 'batch is 0'),
        (dict(batch=-1), 'batch is -1'),
        (dict(size=8.5), 'size is 8.5'),
        (dict(size=0), 'size is 0'),
        (dict(overlap=float('nan')), 'overlap is nan'),
        (dict(y=torch.rand(0, 1, 20, 20)), 'expected at least one image'),
        (dict(fn=lambda v: v[:1]), 'fn gave shape'),
        (dict(fn=lambda v: v.mean()), 'fn gave shape'),
        (dict(beside=[torch.rand(1, 1, 20, 19)]), 'beside has shapes'),
        (dict(small='cut'), "small is 'cut'"),
    ],
)
def test_windows_that_make_no_sense(kw, says):
    given = dict(fn=lambda *v: v[0], y=torch.rand(1, 1, 20, 20), size=8, overlap=4)
    with pytest.raises(ValueError, match=says):
        tiled(**(given | kw))


def test_numpy_numbers_are_numbers():
    i, y = np.int64, torch.rand(1, 1, 20, 20)
    assert torch.equal(
        tiled(lambda v: v * 2, y, i(8), i(4), batch=i(3)), tiled(lambda v: v * 2, y, 8, 4, batch=3)
    )


@pytest.mark.parametrize('hw', [(1, 1), (3, 8), (7, 40), (40, 5), (6, 7)])
def test_small_images_are_continued_to_a_window(hw):
    "Mirrored where both sides allow it, else the edge is repeated; more tensors beside, too."
    y, seen = torch.rand(2, 3, *hw), []

    def fn(v, other):
        seen.append(v)
        assert torch.equal(other[:, 0], v)
        return v

    out = tiled(fn, y, 8, 4, beside=[y[:, None]])
    assert out.shape == y.shape and torch.allclose(out, y, atol=1e-6)
    assert all(v.shape[-2:] == (8, 8) for v in seen)
    if hw == (6, 7):
        mirrored = torch.nn.functional.pad(y, (0, 1, 0, 2), mode='reflect')
        assert torch.equal(seen[0], mirrored)


def test_what_fits_into_a_window_may_go_through_as_it_is():
    shapes = []

    def fn(v):
        shapes.append(tuple(v.shape))
        return v

    for hw in ((3, 8), (8, 8), (3, 9)):
        y = torch.rand(1, 1, *hw)
        assert torch.allclose(tiled(fn, y, 8, 4, small='whole'), y, atol=1e-6)
    assert shapes == [(1, 1, 3, 8), (1, 1, 8, 8), (2, 1, 8, 8)]
    with pytest.raises(ValueError, match='fn gave shape'):
        tiled(lambda v: v[:, :, 1:], torch.rand(1, 1, 5, 5), 8, 4, small='whole')


# strips


def test_strips_of_a_filter_are_the_whole():
    conv, y = shake(nn.Conv2d(2, 2, 5, padding=2)).requires_grad_(False), torch.rand(2, 2, 23, 9)
    for rows in (1, 4, 23, 50):
        (out,) = in_strips(lambda v: [conv(v)], 23, rows, 2, y)
        assert torch.allclose(out, conv(y), atol=1e-5)
        (short,) = in_strips(lambda v: [conv(v)], 23, rows, 1, y)
        assert (rows >= 23) == torch.allclose(short, conv(y), atol=1e-5)


def test_strips_of_tensors_of_several_heights():
    low, high, seen = torch.rand(1, 1, 10, 6), torch.rand(1, 1, 40, 6), []

    def fn(a, b):
        seen.append((a.shape[2], b.shape[2]))
        return [a, a.repeat_interleave(2, 2), b]

    outs = in_strips(fn, 10, 4, 1, low, high)
    for out, want in zip(outs, (low, low.repeat_interleave(2, 2), high)):
        assert torch.equal(out, want)
    assert seen == [(5, 20), (6, 24), (3, 12)]


def test_strips_whose_rows_do_not_count_are_named():
    y = torch.rand(1, 1, 24, 6)

    def halve(v):
        return [nn.functional.avg_pool2d(v, 2)]

    (out,) = in_strips(halve, 12, 5, 0, y)
    assert torch.equal(out, halve(y)[0])
    # 24 rows of which each result has half: the result would have none
    with pytest.raises(ValueError, match='has 3 rows where height counts 6'):
        in_strips(halve, 24, 6, 0, y)
    with pytest.raises(ValueError, match='has 24 rows where height counts 7'):
        in_strips(halve, 7, 5, 0, y)


# grey or colour, files or tensors


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('c', [1, 3])
def test_planes_and_back(c, channels):
    x = torch.rand(2, c, 4, 5)
    planes, together = planes_of(x, channels)
    assert planes.shape == (2 * c if channels == 1 else 2, channels, 4, 5)
    out = together(planes.repeat_interleave(2, 2))  # of another size
    assert torch.allclose(out, x.repeat_interleave(2, 2), atol=1e-6)


def test_opened_image_gives_back_what_it_was_given(tmp_path):
    save(tmp_path / 'a.png', scene())
    x, back = opened_image(tmp_path / 'a.png')
    assert np.array_equal(np.asarray(back(x)), scene())
    for shape in ((4, 5), (3, 4, 5), (2, 1, 4, 5)):
        image = torch.rand(shape, dtype=torch.float64)
        x, back = opened_image(image)
        assert x.ndim == 4 and torch.equal(back(x.float().double()), image.float().double())
        assert back(x.repeat_interleave(3, 3)).shape == (*shape[:-1], 15)
    for bad, error in (
        (torch.rand(4), ValueError),
        ([1], TypeError),
        (torch.ones(4, 4, 2), ValueError),
    ):
        with pytest.raises(error, match='image'):
            opened_image(bad)


# what stands around a command


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    "In a folder with one image, a command that enlarges; gives its exit status and both streams."
    monkeypatch.chdir(tmp_path)
    save('in.png', scene())

    def run(image='in.png', out='out.png', scale=1, work=None, error=None):
        def enlarge(x):
            return x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)

        def prepare(x, say):
            if error:
                raise error
            say('ready')
            return work or enlarge, scale, ', enlarged'

        code = run_command('enlarge', image, out, prepare)
        return code, *capsys.readouterr()

    return run


def test_a_command(command):
    assert command(scale=3) == (0, 'out.png: 240 x 192, enlarged\n', 'enlarge: ready\n')
    assert np.array_equal(np.asarray(Image.open('out.png'))[::3, ::3], scene())


def test_a_command_that_cannot(command):
    for words, says in (
        (dict(image='no.png'), 'no.png'),
        (dict(out='in.png'), 'is the image itself'),
        (dict(out='out.xyz'), "'.xyz'"),
        (dict(error=ValueError('no weights')), 'no weights'),
        (dict(error=OSError('no disk')), 'no disk'),
        (dict(work=lambda x: x * float('nan')), 'NaN'),
    ):
        code, out, err = command(**words)
        assert code == 2 and not out and says in err.splitlines()[-1], words
        assert all(line.startswith('enlarge: ') for line in err.splitlines())
        assert sorted(p.name for p in Path('.').iterdir()) == ['in.png']


def test_a_command_asks_about_the_size_of_its_result_before_the_work(command):
    def never(x):
        raise AssertionError('the work began')

    code, out, err = command(out='out.webp', scale=300, work=never)
    assert code == 2 and 'WEBP takes no image of 24000 x 19200 pixels' in err


def test_a_mistake_in_a_command_is_no_message(command):
    with pytest.raises(KeyError):
        command(error=KeyError('bug'))
    bugs = TypeError('bug'), RuntimeError('sizes differ'), RecursionError('bug')
    for error in (*bugs, ValueError('bug'), OSError('bug'), FileNotFoundError('bug')):

        def fails(x, error=error):
            raise error

        with pytest.raises(type(error)) as raised:
            command(work=fails)
        assert raised.value is error
        assert sorted(p.name for p in Path('.').iterdir()) == ['in.png']


def test_too_little_memory_is_a_message(command):
    errors = [
        MemoryError(),
        torch.cuda.OutOfMemoryError('CUDA out of memory'),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ]
    for error in errors:

        def fails(x, error=error):
            raise error

        code, out, err = command(work=fails)
        assert code == 2 and not out
        assert err.splitlines()[-1] == (
            'enlarge: in.png needs more memory than there is; expected a smaller image'
        )
        assert not Path('out.png').exists()


def test_memory_that_torch_cannot_get_on_the_cpu_is_a_message(command):
    code, _, err = command(work=lambda x: torch.empty(2**57))
    assert code == 2 and 'needs more memory' in err
