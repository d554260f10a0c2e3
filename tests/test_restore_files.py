"""Photographs through lesson 10's model, and the command: every kind of picture, what it keeps,
says and refuses."""

import importlib, inspect, re, shutil
from configparser import ConfigParser
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from common import ROOT, close, gen
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from restore_lib import model_files
from restore_lib import two_stage as T
from restore_lib.audit import reads_truth
from restore_lib.metrics import psnr
from restore_lib.model_files import load_model, pretrained, save_model
from restore_lib.image_files import tiled
from restore_lib.restore_files import restore, restore_image
from restore_lib.two_stage import TwoStageDMAE
from test_two_stage import awake, dmae


pytestmark = pytest.mark.usefixtures('seed')
TASKS = ('denoise', 'salt_pepper', 'block', 'blur', 'rain', 'x4', 'mixed')


# pictures -----------------------------------------------------------------------------------------


class Negative(nn.Module):
    """Exact, whatever the size; in training mode it would be wrong.
    Channels beside the first are darker by half."""

    def __init__(self, channels=1, two=False):
        super().__init__()
        self.encoder, self.one, self.two = (
            SimpleNamespace(channels=channels),
            nn.Parameter(torch.ones(())),
            two,
        )

    def forward(self, y):
        if y.shape[1] != self.encoder.channels:
            raise AssertionError(f'{y.shape[1]} channels')
        out = self.one - y + self.training
        return (out + 3, out) if self.two else out


quiet = partial(restore, progress=False)


def picture(mode, hw=(35, 50)):
    "A picture with all levels in it."
    at = np.arange(hw[0] * hw[1]).reshape(hw)
    rgba = Image.merge(
        'RGBA', [Image.fromarray((at * k % 256).astype(np.uint8)) for k in (1, 3, 5, 7)]
    )
    if mode == 'I;16':
        return Image.fromarray((at * 37 % 65536).astype(np.uint16))
    if mode == 'I':
        return Image.fromarray((at * 37 % 65536).astype(np.int32))
    if mode == 'P transparent':
        out = rgba.convert('RGB').quantize(16)
        out.info['transparency'] = 3
        return out
    if mode == 'LA':
        out = rgba.convert('L')
        out.putalpha(rgba.getchannel('A'))
        return out
    return rgba if mode == 'RGBA' else rgba.convert('RGB').convert(mode)


MODES = {
    'L': 'L',
    'RGB': 'RGB',
    'RGBA': 'RGBA',
    'LA': 'LA',
    'P': 'RGB',
    'P transparent': 'RGBA',
    '1': 'L',
    'I;16': 'I;16',
    'I': 'I;16',
    'CMYK': 'RGB',
    'YCbCr': 'RGB',
    'LAB': 'RGB',
}


def negated(image, mode):
    "What a Negative makes of it."
    values = np.asarray(image if mode == 'I;16' else image.convert(mode)).astype(np.int64)
    out = (65535 if mode == 'I;16' else 255) - values
    if mode in ('LA', 'RGBA'):
        out[..., -1] = values[..., -1]
    return out


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('mode', MODES)
def test_pil_modes(mode, channels):
    "8 bits out, or 16 where it came so; alpha passes by; nothing of the picture is changed."
    image, wanted = picture(mode), MODES[mode]
    before, info = image.tobytes(), dict(image.info)
    out = quiet(Negative(channels), image)
    assert (
        out.mode == wanted
        and out.size == (50, 35)
        and image.tobytes() == before
        and image.info == info
    )
    assert np.array_equal(np.asarray(out).astype(np.int64), negated(image, wanted))


@pytest.mark.parametrize(
    'mode, ending',
    [
        ('L', 'png'),
        ('RGB', 'bmp'),
        ('RGBA', 'png'),
        ('LA', 'png'),
        ('P', 'gif'),
        ('P transparent', 'png'),
        ('1', 'png'),
        ('I;16', 'png'),
        ('I;16', 'tiff'),
        ('CMYK', 'tiff'),
    ],
)
def test_files(tmp_path, mode, ending):
    path = tmp_path / f'in.{ending}'
    picture(mode).save(path)
    before = path.read_bytes()
    outs = [quiet(Negative(3), p) for p in (path, str(path))]
    with Image.open(path) as image:
        wanted = negated(image, MODES[mode])
    assert (
        all(
            o.mode == MODES[mode] and np.array_equal(np.asarray(o).astype(np.int64), wanted)
            for o in outs
        )
        and path.read_bytes() == before
    )


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    image, exif = picture('RGB'), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / 'in.png', exif=exif)
    assert np.array_equal(
        np.asarray(quiet(Negative(3), tmp_path / 'in.png')),
        255 - np.asarray(image.transpose(Image.Transpose.ROTATE_270)),
    )


@pytest.mark.parametrize(
    'shape',
    [
        (1, 1),
        (1, 40),
        (40, 1),
        (2, 33),
        (31, 32),
        (32, 32),
        (33, 47),
        (5, 100),
        (3, 17, 50),
        (1, 20, 20),
        (2, 3, 40, 33),
        (2, 1, 33, 5),
    ],
)
@pytest.mark.parametrize('channels', [1, 3])
def test_tensors_of_every_size(shape, channels):
    x = torch.rand(shape)
    before = x.clone()
    out = quiet(Negative(channels), x)
    assert (
        out.shape == x.shape
        and torch.allclose(out, 1 - x, atol=1e-6)
        and torch.equal(x, before)
        and not out.requires_grad
    )
    if len(shape) == 2:
        grey = picture('L', shape)
        assert np.array_equal(np.asarray(quiet(Negative(channels), grey)), 255 - np.asarray(grey))


def test_not_clipped_and_other_float_types():
    x = torch.randn(20, 40, dtype=torch.float64) * 2
    out = quiet(Negative(), x)
    assert out.dtype == torch.float64 and close(out, 1 - x, 1e-5) and out.max() > 1
    assert quiet(Negative(), x.half()).dtype == torch.float16


def test_the_refined_image_is_taken():
    x = torch.rand(1, 40, 40)
    assert torch.allclose(quiet(Negative(two=True), x), 1 - x, atol=1e-6)


def test_colours_and_grey():
    """A grey model takes colours one by one; a colour model sees grey three times,
    and the mean is taken."""

    class Own(Negative):
        def forward(self, y):
            return y * torch.tensor([0.2, 0.5, 1.1])[: y.shape[1], None, None]

    x = torch.rand(3, 40, 40)
    assert torch.allclose(
        quiet(Own(3), x), x * torch.tensor([0.2, 0.5, 1.1])[:, None, None], atol=1e-6
    ) and torch.allclose(quiet(Own(1), x), x * 0.2, atol=1e-6)
    assert torch.allclose(quiet(Own(3), x[:1]), x[:1] * 0.6, atol=1e-6)


@pytest.mark.parametrize('channels', [1, 3])
def test_a_two_stage_model(channels):
    "One window is the model itself; more of them, sizes that the patch does not divide."
    model = awake(dmae(channels=channels)).eval()
    run = partial(quiet, model, size=16, overlap=8)
    y = torch.rand(channels, 16, 16)
    assert close(run(y), model(y[None])[1][0].detach(), 1e-5)
    y = torch.rand(channels, 37, 50)
    with torch.no_grad():
        hand = tiled(lambda v: model(v)[1], y[None], 16, 8)[0]
    assert close(run(y), hand, 1e-5)
    for hw in ((1, 1), (3, 50), (18, 21)):
        assert run(torch.rand(hw)).shape == hw and run(picture('RGB', hw)).size == hw[::-1]


def test_the_mode_comes_back_and_a_bar_is_shown(capsys):
    model = nn.Module()
    model.part, model.encoder, model.other = Negative(), SimpleNamespace(channels=1), nn.Dropout()
    model.forward = model.part.forward
    model.train()
    model.other.eval()
    before = [m.training for m in model.modules()]
    x = torch.rand(40, 40)
    assert torch.allclose(restore(model, x), 1 - x, atol=1e-6) and [
        m.training for m in model.modules()
    ] == before == [True, True, False]
    assert '100%' in capsys.readouterr().err
    quiet(model, x)
    with pytest.raises(ValueError):
        quiet(model, x, overlap=32)
    assert [m.training for m in model.modules()] == before and not capsys.readouterr().err


@pytest.mark.parametrize(
    'image, error, says',
    [
        (torch.zeros(20, 20, dtype=torch.uint8), TypeError, 'uint8'),
        (torch.zeros(20, 20, dtype=torch.int64), TypeError, 'int64'),
        (torch.full((20, 20), torch.nan), ValueError, 'NaN'),
        (torch.full((20, 20), 255.0), ValueError, '0 to 255'),
        (np.zeros((20, 20)), TypeError, 'ndarray'),
        (None, TypeError, 'NoneType'),
        (torch.rand(1, 1, 1, 20, 20), ValueError, 'shape'),
        (torch.rand(20), ValueError, 'shape'),
        (torch.rand(2, 20, 20), ValueError, '2 channels'),
        (torch.rand(20, 20, 3), ValueError, '20 channels'),
        (Image.new('F', (20, 20)), ValueError, 'mode F'),
        (torch.rand(0, 20), ValueError, None),
        (Image.new('L', (0, 20)), ValueError, None),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, (type, str)) else '',
)
def test_what_is_no_image(image, error, says):
    for channels in (1, 3):
        with pytest.raises(error, match=says):
            quiet(Negative(channels), image)


def test_files_that_are_no_image(tmp_path, monkeypatch):
    whole = tmp_path / 'whole.png'
    picture('RGB', (64, 64)).save(whole)
    for name, content in (
        ('text.png', b'not a picture'),
        ('empty.png', b''),
        ('half.png', whole.read_bytes()[: whole.stat().st_size // 2]),
        ('head.png', whole.read_bytes()[:30]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f'{name} is not a readable image'):
            quiet(Negative(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match='nowhere.png'):
        quiet(Negative(), tmp_path / 'nowhere.png')
    with pytest.raises(ValueError, match='not a readable image'):
        quiet(Negative(), tmp_path)
    monkeypatch.setattr(
        Image, 'MAX_IMAGE_PIXELS', 1000
    )  # more than twice of it is refused by Pillow, with an error of its own
    with pytest.raises(ValueError, match='whole.png'):
        quiet(Negative(), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu():
    model, x = awake(), torch.rand(3, 37, 50)
    run = lambda m, v: quiet(m, v, size=16, overlap=8)
    here, there = run(model, x), run(model.cuda(), x)
    assert (
        not there.is_cuda
        and run(model, x.cuda()).is_cuda
        and close(here, there, 2e-2)
        and run(model, picture('LA')).mode == 'LA'
    )


# the command --------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    torch.manual_seed(2)
    for name, says in (
        ('noise', dict(task='denoise', sigma=25 / 255)),
        ('rain', dict(task='rain')),
    ):
        save_model(awake(dmae(channels=1)), folder / f'{name}.safetensors', **says)
    return folder


@pytest.fixture
def shell(trained, tmp_path, monkeypatch, capsys):
    """The command in a folder with a photograph and weights for two tasks;
    gives exit status and what was said."""
    shutil.copytree(trained, tmp_path / 'weights')
    monkeypatch.setattr(
        model_files,
        'pretrained_files',
        lambda: {p.stem: p for p in sorted((tmp_path / 'weights').glob('*'))},
    )
    monkeypatch.chdir(tmp_path)
    picture('RGB', (37, 50)).save('in.png')

    def run(*words):
        code = restore_image([str(w) for w in words])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'I;16', '1', 'P'])
def test_a_photograph_from_the_shell(shell, mode):
    picture(mode, (37, 50)).save('in.png')
    before = Path('in.png').read_bytes()
    code, said = shell('in.png', 'out.png', '--task', 'denoise', '--sigma', '25', '--quiet')
    with Image.open('out.png') as out:
        assert out.size == (50, 37) and out.mode == MODES[mode]
    with Image.open('out.png') as out:
        assert np.array_equal(
            np.asarray(out),
            np.asarray(
                restore(
                    load_model('weights/noise.safetensors')[0],
                    'in.png',
                    size=16,
                    overlap=8,
                    progress=False,
                )
            ),
        )
    assert (
        code == 0
        and 'out.png' in said
        and '50 x 37' in said
        and 'sigma 25' in said
        and Path('in.png').read_bytes() == before
    )
    assert sorted(p.name for p in Path('.').iterdir()) == ['in.png', 'out.png', 'weights']


def test_other_words(shell):
    assert (
        shell('in.png', 'a.jpg')[0] == 0 and shell('in.png', 'a.jpg', '--quiet')[0] == 0
    )  # written again
    code, said = shell('in.png', 'b.tiff', '--task', 'rain', '--quiet')
    assert code == 0 and 'task rain' in said
    code, said = shell('in.png', 'c.png', '--weights', 'weights/rain.safetensors', '--quiet')
    assert code == 0 and 'task rain' in said
    assert '%' in shell('in.png', 'd.png')[1] and '%' not in shell('in.png', 'd.png', '--quiet')[1]


@pytest.mark.parametrize(
    'words, says',
    [
        (
            ['in.png', 'out.png', '--task', 'fog'],
            'no weights for --task fog; there are weights for: '
            '--task denoise --sigma 25, --task rain',
        ),
        (['in.png', 'out.png', '--sigma', '50'], 'no weights for --task denoise --sigma 50'),
        (['nowhere.png', 'out.png'], 'nowhere.png'),
        (['text.png', 'out.png'], 'text.png is not a readable image'),
        (['in.png', 'out.xyz'], "'.xyz'"),
        (['in.png', 'out'], "ends in ''"),
        (['in.png', 'in.png'], 'is the image itself'),
        (['in.png', './weights/../in.png'], 'is the image itself'),
        (['in.png', 'same.png'], 'is the image itself'),
        (['in.png', 'no/folder/out.png'], 'folder'),
        (['in.png', 'out.png', '--weights', 'text.png'], 'no safetensors file'),
        (['in.png', 'out.png', '--weights', 'nowhere'], 'nowhere'),
        (['alpha.png', 'out.jpg'], 'JPEG'),
        (['in.png', 'out.psd'], 'psd'),
        (['in.png', 'out.png', '--weights', 'weights'], 'weights'),
        (['weights', 'out.png'], 'weights is not a readable image'),
        (['half.png', 'out.png'], 'half.png is not a readable image'),
    ],
)
def test_a_message_and_no_file(shell, words, says):
    picture('RGBA').save('alpha.png')
    Path('text.png').write_text('not a picture')
    Path('same.png').symlink_to('in.png')
    Path('half.png').write_bytes(Path('alpha.png').read_bytes()[:300])
    before = {p: p.read_bytes() for p in Path('.').rglob('*') if p.is_file()}
    code, said = shell(*words, '--quiet')
    assert code == 2 and re.search(re.escape(says), said) and 'Traceback' not in said
    assert {p: p.read_bytes() for p in Path('.').rglob('*') if p.is_file()} == before


def test_too_large_a_photograph_is_a_message_too(shell, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)  # Pillow's own is 90 million
    code, said = shell('in.png', 'out.png')
    assert code == 2 and 'in.png' in said and not Path('out.png').exists()


def test_messages_go_where_messages_go(shell, capsys):
    restore_image(['nowhere.png', 'out.png'])
    said = capsys.readouterr()
    assert 'nowhere.png' in said.err and not said.out


@pytest.mark.parametrize('words', [[], ['in.png'], ['in.png', 'out.png', '--sigma', 'much']])
def test_words_that_the_command_does_not_know(shell, words, capsys):
    with pytest.raises(SystemExit) as stop:
        restore_image(words)
    assert stop.value.code == 2 and 'usage: restore_image' in capsys.readouterr().err


def test_the_shell_knows_the_command():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    scripts = dict(s.split('=', 1) for s in config['DEFAULT']['console_scripts'].split())
    assert 'restore_image' in scripts, 'settings.ini declares no restore_image'
    module, name = scripts['restore_image'].split(':')
    call = getattr(importlib.import_module(module), name)
    assert call is restore_image and all(
        p.default is not inspect.Parameter.empty
        for p in inspect.signature(call).parameters.values()
    )


# what the command must keep, say or refuse --------------------------------------------------------

import warnings


def deep_png(path, kind=2, chunks=()):
    "A PNG of 16 bits a channel by hand: kind 0 grey, 2 RGB. Its levels."
    import struct, zlib

    levels = np.random.default_rng(0).integers(0, 65536, (37, 50, 3 if kind == 2 else 1))
    if kind == 0:
        levels[:9] = 1000
    chunk = lambda name, data: (
        struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    )
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in levels)
    head = struct.pack('>IIBBBBB', 50, 37, 16, kind, 0, 0, 0)
    Path(path).write_bytes(
        b'\x89PNG\r\n\x1a\n'
        + b''.join(
            chunk(*c)
            for c in ((b'IHDR', head), *chunks, (b'IDAT', zlib.compress(rows)), (b'IEND', b''))
        )
    )
    return levels


@pytest.fixture
def idle(shell, monkeypatch):
    "The command, whose work must not begin."

    def never(*args, **kw):
        raise AssertionError('the work began')

    monkeypatch.setattr(T, 'restore', never)
    return shell


@pytest.mark.parametrize('ending', ['webp', 'gif', 'avif', 'jpg'])
def test_deep_grey_to_a_format_of_eight_bits(shell, ending):
    Image.fromarray(np.full((37, 50), 32896, np.uint16)).save('in.png')
    code, said = shell('in.png', f'out.{ending}', '--quiet')
    assert code == 0 and said.count('keeps 8 bits of grey, not 16') == 1
    want = (
        np.asarray(restore(load_model('noise')[0], 'in.png', size=16, overlap=8, progress=False))
        / 257
    )
    with Image.open(f'out.{ending}') as out:
        assert abs(np.asarray(out.convert('L')) - want).mean() < 4 and 20 < want.mean() < 235


def test_deep_colour_is_said(shell):
    levels = deep_png('in.png')
    code, said = shell('in.png', 'out.png', '--quiet')
    assert code == 0 and said.count('16 bits a channel become 8') == 1
    with pytest.warns(UserWarning, match='16 bits a channel become 8'):
        out = quiet(Negative(3), 'in.png')
    assert np.array_equal(np.asarray(out), 255 - (levels >> 8))


@pytest.mark.parametrize('kind', [8, 16])
def test_grey_with_a_transparent_level(shell, kind):
    import struct

    key = [(b'tRNS', struct.pack('>H', 1000))]
    if kind == 16:
        levels = (deep_png('in.png', 0, key)[..., 0] / 257).round()
    else:
        levels = np.arange(37 * 50).reshape(37, 50) % 256
        Image.fromarray(levels.astype(np.uint8)).save('in.png', transparency=7)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        out = np.asarray(quiet(Negative(1), 'in.png'))
    assert out.shape == (37, 50, 2) and np.array_equal(out[..., 0], 255 - levels)
    clear = levels == 7 if kind == 8 else np.arange(37)[:, None].repeat(50, 1) < 9
    assert np.array_equal(out[..., 1] == 0, clear) and np.array_equal(out[..., 1] == 255, ~clear)
    code, said = shell('in.png', 'out.png', '--quiet')
    with Image.open('out.png') as image:
        assert code == 0 and image.mode == 'LA'
    assert ('becomes 8-bit' in said) == (kind == 16)


@pytest.mark.parametrize(
    'name, says',
    [
        ('out.jpg', 'JPEG'),
        ('out.bmp', 'BMP keeps no alpha channel'),
        ('out.ppm', 'PPM keeps no alpha channel'),
        ('folder.png', 'folder.png is a folder'),
        ('out.hdf', 'HDF5'),
        ('out.ico', 'ICO takes no image'),
    ],
)
def test_refused_before_the_work(idle, name, says):
    picture('RGBA', (37, 300)).save('in.png')
    Path('folder.png').mkdir()
    code, said = idle('in.png', name)
    assert code == 2 and says in said and len(said.strip().splitlines()) == 1
    assert sorted(p.name for p in Path('.').iterdir()) == ['folder.png', 'in.png', 'weights']


def test_sides_and_locked_folders_are_refused_before_the_work(idle):
    picture('L', (1, 16_400)).save('in.png')
    code, said = idle('in.png', 'out.webp')
    assert code == 2 and 'WEBP takes no image of 16400 x 1 pixels' in said
    if Path('/proc').is_dir():
        code, said = idle('in.png', '/proc/out.png')
        assert code == 2 and '/proc/out.png cannot be written' in said


@pytest.mark.parametrize('ending', ['gif', 'tif', 'webp', 'png'])
def test_frames_are_not_lost(idle, ending):
    frames = [picture('L', (37, 50)).rotate(90 * k) for k in range(3)]
    frames[0].save(f'many.{ending}', save_all=True, append_images=frames[1:])
    code, said = idle(f'many.{ending}', 'out.png')
    assert code == 2 and 'it holds 3 frames; expected one' in said and not Path('out.png').exists()


@pytest.mark.parametrize('name', ['out.png', 'out.jpg', 'out.tif'])
def test_profile_resolution_and_turn(shell, name):
    from PIL import ImageCms

    icc, exif = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes(), Image.Exif()
    exif[0x112] = 6
    picture('RGB', (37, 50)).save('in.jpg', exif=exif, icc_profile=icc, dpi=(300, 300))
    assert shell('in.jpg', name, '--quiet') == (0, f'{name}: 37 x 50, task denoise, sigma 25\n')
    with Image.open(name) as out:
        assert (
            out.size == (37, 50)
            and out.info['icc_profile'] == icc
            and [round(v) for v in out.info['dpi']] == [300, 300]
        )
        assert out.getexif().get(0x112, 1) == 1
    with Image.open('in.jpg') as image:
        held = quiet(Negative(3), image)
    assert (
        np.array_equal(np.asarray(held), np.asarray(quiet(Negative(3), 'in.jpg')))
        and held.info['icc_profile'] == icc
    )


def test_integers_of_unknown_range(shell):
    Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16)).save('in.tif')
    for image in ('in.tif', Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16))):
        with pytest.raises(ValueError, match='32-bit integers up to 255'):
            quiet(Negative(), image)
    code, said = shell('in.tif', 'out.png')
    assert code == 2 and 'in.tif is not a readable image' in said and not Path('out.png').exists()


@pytest.mark.parametrize(
    'words, says',
    [
        (['--sigma', '50'], '--sigma is 50; the weights are for 25'),
        (['--task', 'rain'], '--task is rain; the weights are for denoise'),
        (['--sigma', 'nan'], '--sigma is nan'),
        (['--sigma', '-25'], '--sigma is -25.0'),
        (['--sigma', 'inf'], '--sigma is inf'),
    ],
)
def test_weights_for_something_else(idle, words, says):
    for weights in ('noise', 'weights/noise.safetensors'):
        code, said = idle('in.png', 'out.png', '--weights', weights, *words)
        assert code == 2 and says in said and not Path('out.png').exists()


def test_weights_for_what_was_asked(shell):
    for words in (
        [],
        ['--sigma', '25'],
        ['--sigma', '25.2'],
        ['--task', 'denoise', '--sigma', '25'],
    ):
        assert shell('in.png', 'out.png', '--quiet', '--weights', 'noise', *words) == (
            0,
            'out.png: 50 x 37, task denoise, sigma 25\n',
        )


def test_a_result_that_is_no_number(shell, monkeypatch):
    save_model(awake(dmae(channels=1)), 'nan.safetensors', task='denoise')
    forward = TwoStageDMAE.forward
    monkeypatch.setattr(
        TwoStageDMAE,
        'forward',
        lambda *given, **how: tuple(v * np.nan for v in forward(*given, **how)),
    )
    Path('out.png').write_text('old')
    code, said = shell('in.png', 'out.png', '--quiet', '--weights', 'nan.safetensors')
    assert code == 2 and 'NaN' in said and Path('out.png').read_text() == 'old'


def test_nothing_half_written(shell, monkeypatch):
    Path('out.png').write_text('old')
    whole = Image.Image.save

    def full(self, file, *args, **kw):
        whole(self, file, *args, **kw)
        if isinstance(file, (str, Path)):
            raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Image.Image, 'save', full)
    code, said = shell('in.png', 'out.png', '--quiet')
    assert code == 2 and 'No space left' in said and Path('out.png').read_text() == 'old'
    assert sorted(p.name for p in Path('.').iterdir()) == ['in.png', 'out.png', 'weights']


def test_numbers_of_restore():
    x = torch.rand(40, 40)
    assert torch.equal(
        quiet(Negative(), x, size=np.int64(32), overlap=np.int64(16), batch=np.int64(2)),
        quiet(Negative(), x),
    )
    for name, bad in (('size', 0), ('batch', -1), ('batch', 0), ('batch', 1.5), ('size', True)):
        with pytest.raises(ValueError, match=f'{name} is {bad}'):
            quiet(Negative(), x, **{name: bad})


# the weights that come with the library -----------------------------------------------------------



def test_no_shipped_weights_read_the_truth():
    for name, says in pretrained().items():
        if says['class'] != 'two_stage.TwoStageDMAE':
            continue
        model = load_model(name)[0]
        size = 2, model.encoder.channels, 32, 32
        assert says['task'] in TASKS and not reads_truth(model, torch.rand(size), torch.rand(size))
        assert model.mean.flatten().tolist() == model.std.flatten().tolist() == [0.5]


def test_without_weights_the_command_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(model_files, 'pretrained_files', dict)
    picture('L').save(tmp_path / 'in.png')
    assert restore_image([str(tmp_path / 'in.png'), str(tmp_path / 'out.png')]) == 2
    said = capsys.readouterr()
    assert (
        'no weights for --task denoise; there are weights for: nothing' in said.out + said.err
        and not (tmp_path / 'out.png').exists()
    )


def test_shipped_weights_restore_a_photograph(tmp_path):
    "scikit-image's cameraman, which no lesson trains on: at least 6 dB, the same from the shell."
    from restore_lib.data import photos

    x = photos('test', 1)['camera'][:, 100:228, 180:308]
    y = x + 25 / 255 * torch.randn(x.shape, generator=gen())
    score = lambda v: psnr(v.clamp(0, 1)[None], x[None]).item()
    model, says = load_model('denoise')
    assert says['task'] == 'denoise' and score(quiet(model, y)) > score(y) + 6
    grey = lambda v: Image.fromarray((v[0].clamp(0, 1) * 255).round().byte().numpy())
    grey(y).save(tmp_path / 'in.png')
    assert (
        restore_image(
            [
                str(tmp_path / 'in.png'),
                str(tmp_path / 'out.png'),
                '--task',
                'denoise',
                '--sigma',
                '25',
                '--quiet',
            ]
        )
        == 0
    )
    with Image.open(tmp_path / 'out.png') as out:
        assert score(torch.from_numpy(np.array(out, dtype=np.float32))[None] / 255) > score(y) + 5.5


