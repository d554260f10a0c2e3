"The command `restore`: every kind of file, what is kept, said and refused, folders, measures."

import hashlib
import importlib
import inspect
import json
import re
import struct
import subprocess
import sys
import zlib
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest
import torch
from common import ROOT
from PIL import Image, ImageCms
from torch import nn

from restore_lib import model_files, restorer_scores
from restore_lib import restore_command as C
from restore_lib import restorers as restorers_module
from restore_lib.denoiser import Denoiser
from restore_lib.image_files import open_image
from restore_lib.model_files import save_model
from restore_lib.restore_command import restore_command, restore_folder
from restore_lib.restorers import Restorer, restorer
from restore_lib.superres import make_sr
from restore_lib.superres_training import SRConfig

pytestmark = pytest.mark.usefixtures('seed')
MODES = {'L': 'L', 'RGB': 'RGB', 'RGBA': 'RGBA', 'I;16': 'I;16', '1': 'L', 'P': 'RGB', 'LA': 'LA'}
RECORD = dict(recipe='r', seed=0, data='d', scores={'dB': 1.0}, minutes=1, licence='Apache-2.0')


def tiny(channels):
    model = Denoiser(channels, (8, 8, 8), 1)
    nn.init.normal_(model.tail.weight, std=0.02)
    return model


def picture(mode='RGB', hw=(37, 50)):
    "Noise around a ramp, in a mode of Pillow."
    h, w = hw
    ramp = np.linspace(60, 190, h*w).reshape(h, w, 1)
    levels = (ramp + np.random.default_rng(0).normal(0, 20, (h, w, 3))).clip(0, 255).astype('u1')
    if mode == 'I;16':
        return Image.fromarray(levels[..., 0].astype(np.uint16)*257)
    image = Image.fromarray(levels)
    if mode in ('RGBA', 'LA'):
        image.putalpha(Image.fromarray(255 - levels[..., 1]))
    return image.convert(mode)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    torch.manual_seed(2)
    for name, channels in (('denoise_grey', 1), ('denoise_colour', 3)):
        save_model(tiny(channels), folder/f'{name}.safetensors', task='denoise', **RECORD)
    save_model(tiny(1), folder/'mixed.safetensors', task='mixed', **RECORD)
    scores = [
        dict(name=path.stem, channels=channels, dB=[dB]*6, seconds=1.0, weights=hashed(path))
        for path in folder.glob('denoise_*')
        for channels, dB in ((1, 30 + ('grey' in path.stem)), (3, 30 + ('colour' in path.stem)))
    ]
    (folder/'denoisers.json').write_text(json.dumps(scores))
    return folder


def hashed(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


@pytest.fixture
def shell(trained, tmp_path, monkeypatch, capsys):
    "The command in a folder with a photograph; gives exit status, stdout and stderr."
    monkeypatch.setattr(model_files, 'PRETRAINED', trained)
    monkeypatch.setattr(restorer_scores, 'DENOISER_SCORES', trained/'denoisers.json')
    monkeypatch.chdir(tmp_path)
    picture().save('in.png')

    def run(*words):
        code = restore_command([str(w) for w in words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def image(shell):
    "`restore image ... --quiet`."
    return lambda *words: shell('image', *words, '--quiet')


@pytest.fixture
def idle(image, monkeypatch):
    "The same, whose work must not begin."

    def never(*args, **kw):
        raise AssertionError('the work began')

    monkeypatch.setattr(Restorer, '__call__', never)
    return image


def files():
    return {p: p.read_bytes() for p in Path('.').rglob('*') if p.is_file()}


# an image -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('mode', list(MODES))
def test_every_mode(image, mode):
    picture(mode).save('in.png')
    before = Path('in.png').read_bytes()
    code, out, err = image('in.png', 'out.png')
    assert code == 0 and out.startswith('out.png: 50 x 37, denoise_'), err
    assert Path('in.png').read_bytes() == before
    assert sorted(p.name for p in Path('.').iterdir()) == ['in.png', 'out.png']
    x, kept = open_image('in.png')
    name = 'denoise_colour' if x.shape[1] == 3 else 'denoise_grey'
    assert name in out and kept.mode == MODES[mode]
    want = restorer(name)(x, say=lambda note: None).clamp(0, 1)
    with Image.open('out.png') as got:
        assert got.mode == MODES[mode] and got.size == (50, 37)
    assert (open_image('out.png')[0] - want).abs().max() < 0.51/255
    if kept.alpha is not None:
        assert np.array_equal(np.asarray(open_image('out.png')[1].alpha), np.asarray(kept.alpha))


def test_sixteen_bits_of_grey_are_more_than_eight(image):
    picture('I;16').save('in.png')
    assert image('in.png', 'out.png', '--plain')[0] == 0
    with Image.open('out.png') as out:
        assert (np.asarray(out) % 257 != 0).mean() > 0.9


def deep_png(path, kind):
    "A PNG of 16 bits a channel by hand: kind 2 RGB, 4 grey with alpha, 6 RGBA."
    channels = {2: 3, 4: 2, 6: 4}[kind]
    levels = np.random.default_rng(0).integers(0, 65536, (37, 50, channels))

    def chunk(name, data):
        body = name + data
        return struct.pack('>I', len(data)) + body + struct.pack('>I', zlib.crc32(body))

    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in levels)
    head = struct.pack('>IIBBBBB', 50, 37, 16, kind, 0, 0, 0)
    chunks = (b'IHDR', head), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')
    Path(path).write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*c) for c in chunks))


@pytest.mark.parametrize('kind, mode', [(2, 'RGB'), (4, 'LA'), (6, 'RGBA')])
def test_sixteen_bits_of_colour_and_alpha_are_said(image, kind, mode):
    deep_png('in.png', kind)
    code, _, err = image('in.png', 'out.png')
    assert code == 0 and err.count('16 bits a channel become 8') == 1
    with Image.open('out.png') as out:
        assert out.mode == mode


@pytest.mark.parametrize('ending', ['webp', 'gif', 'avif', 'jpg'])
def test_deep_grey_to_a_format_of_eight_bits(image, ending):
    Image.fromarray(np.full((37, 50), 32896, np.uint16)).save('in.png')
    code, _, err = image('in.png', f'out.{ending}')
    assert code == 0 and err.count('keeps 8 bits of grey, not 16') == 1
    with Image.open(f'out.{ending}') as out:
        assert 110 < np.asarray(out.convert('L')).mean() < 145


@pytest.mark.parametrize('name', ['out.png', 'out.jpg', 'out.tif'])
def test_profile_resolution_and_turn(image, name):
    icc, exif = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes(), Image.Exif()
    exif[0x112] = 6
    picture().save('in.jpg', exif=exif, icc_profile=icc, dpi=(300, 300), quality=95)
    code, out, err = image('in.jpg', name)
    assert code == 0 and out.startswith(f'{name}: 37 x 50')
    with Image.open(name) as got:
        assert got.size == (37, 50) and got.info['icc_profile'] == icc
        assert [round(v) for v in got.info['dpi']] == [300, 300]
        assert got.getexif().get(0x112, 1) == 1


def test_cmyk_becomes_rgb_and_is_said(image):
    picture().convert('CMYK').save('in.tif')
    code, _, err = image('in.tif', 'out.png')
    assert code == 0 and 'CMYK colours become RGB' in err
    with Image.open('out.png') as out:
        assert out.mode == 'RGB'


@pytest.mark.parametrize('ending', ['gif', 'tif', 'webp', 'png'])
def test_frames_are_not_lost(idle, ending):
    frames = [picture('L').rotate(90*k) for k in range(3)]
    frames[0].save(f'many.{ending}', save_all=True, append_images=frames[1:])
    code, out, err = idle(f'many.{ending}', 'out.png')
    assert code == 2 and 'it holds 3 frames; expected one' in err and not Path('out.png').exists()


# words --------------------------------------------------------------------------------------------


def test_which_restorer(image):
    assert 'denoise_colour, noise of about ' in image('in.png', 'a.png')[1]
    with_level = image('in.png', 'b.png', '--sigma', 25)[1]
    assert re.fullmatch(r'b.png: 50 x 37, denoise_colour, [^,]* answer, [0-9.]+ s\n', with_level)
    assert 'mixed' in image('in.png', 'c.png', '--task', 'mixed')[1]
    assert 'denoise_grey' in image('in.png', 'd.png', '--task', 'denoise_grey')[1]
    assert ', denoise_' in image('in.png', 'e.png', '--task', 'denoise')[1]
    assert 'nl_means' in image('in.png', 'f.png', '--task', 'nl_means')[1]
    with Image.open('a.png') as a, Image.open('f.png') as f:
        assert not np.array_equal(np.asarray(a), np.asarray(f))


def test_weights_of_a_file(image, trained, tmp_path):
    Path('mine.safetensors').write_bytes((trained/'denoise_grey.safetensors').read_bytes())
    code, out, err = image('in.png', 'out.png', '--task', 'mine.safetensors')
    assert code == 0 and ', mine' in out and 'the three colours go through one by one' in err


def test_a_wrong_level_is_said(image):
    code, _, err = image('in.png', 'out.png', '--sigma', 80)
    assert code == 0 and 'restore: sigma is 80 of 255; the noise of the image looks like' in err
    assert 'stronger than any that denoise_colour was trained for' in err


def test_plain_and_careful(image):
    picture(hw=(64, 64)).save('in.png')
    for words in ((), ('--plain',)):
        assert image('in.png', f'out{len(words)}.png', '--sigma', 2, *words)[0] == 0
    with Image.open('out0.png') as a, Image.open('out1.png') as b, Image.open('in.png') as y:
        a, b, y = (np.asarray(v).astype(float) for v in (a, b, y))
    assert abs(a - y).mean() < abs(b - y).mean()


def test_a_bar_or_none(shell):
    picture(hw=(300, 270)).save('in.png')
    assert '%' in shell('image', 'in.png', 'a.png')[2]
    assert '%' not in shell('image', 'in.png', 'b.png', '--quiet')[2]


@pytest.mark.parametrize(
    'words, says',
    [
        (['in.png', 'out.png', '--task', 'fog'], '--task is fog; expected auto, a file, or one'),
        (['nowhere.png', 'out.png'], 'nowhere.png'),
        (['text.png', 'out.png'], 'text.png is not a readable image'),
        (['half.png', 'out.png'], 'half.png is not a readable image'),
        (['in.png', 'out.xyz'], "'.xyz'"),
        (['in.png', 'out'], "ends in ''"),
        (['in.png', '.'], 'is the image itself'),
        (['in.png', 'sub/../'], 'is the image itself'),
        (['in.png', 'in.png'], 'is the image itself'),
        (['in.png', './sub/../in.png'], 'is the image itself'),
        (['in.png', 'same.png'], 'is the image itself'),
        (['in.png', 'text.png/out.png'], 'text.png is no folder'),
        (['in.png', 'locked.png'], 'locked.png is read-only'),
        (['in.png', '/proc/out.png'], '/proc/out.png cannot be written'),
        (['alpha.png', 'out.jpg'], 'JPEG'),
        (['alpha.png', 'out.bmp'], 'BMP keeps no alpha channel'),
        (['in.png', 'out.psd'], 'psd'),
        (['in.png', 'out.png', '--task', 'text.png'], 'no safetensors file'),
        (['in.png', 'out.png', '--sigma', 'nan'], '--sigma is nan'),
        (['in.png', 'out.png', '--sigma', '-25'], '--sigma is -25.0'),
        (['in.png', 'out.png', '--sigma', '0.1'], '--sigma is 0.1; expected a level in 255ths'),
        (['in.png', 'out.png', '--sigma', '0.1'], '0.1 of the whole range is --sigma 25.5'),
        (['full', 'out', '--sigma', '0.1'], '--sigma is 0.1; expected a level in 255ths'),
        (['full', 'out', '--task', 'fog'], '--task is fog'),
        (['in.png', 'out.png', '--device', 'toaster'], '--device is toaster'),
        (['small.png', 'out.png', '--task', 'nl_means', '--plain'], 'a level for nl_means'),
        (['integers.tif', 'out.png'], 'integers.tif is not a readable image'),
        (['sub', 'sub/out'], 'sub/out lies in sub'),
        (['sub', 'sub'], 'sub lies in sub'),
        (['sub', 'in.png'], 'in.png is a file'),
        (['sub', 'out'], 'holds no image'),
    ],
)
def test_refused_before_the_work(idle, words, says):
    picture('RGBA').save('alpha.png')
    picture(hw=(20, 20)).save('small.png')
    Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16)).save('integers.tif')
    Path('text.png').write_text('not a picture')
    Path('same.png').symlink_to('in.png')
    Path('half.png').write_bytes(Path('alpha.png').read_bytes()[:300])
    for name in ('sub', 'full'):
        Path(name).mkdir()
    picture().save('full/a.png')
    picture().save('full/b.png')
    picture().save('locked.png')
    Path('locked.png').chmod(0o444)
    before = files()
    code, out, err = idle(*words)
    assert code == 2 and says in err and 'Traceback' not in err and not out
    assert len(err.splitlines()) == 1 and err.startswith('restore: ')
    assert files() == before and not Path('out').exists()


def test_without_scores_it_says_so(idle, monkeypatch, tmp_path):
    monkeypatch.setattr(restorer_scores, 'DENOISER_SCORES', tmp_path/'none')
    code, _, err = idle('in.png', 'out.png')
    assert code == 2 and 'no denoiser here has scores' in err


def test_new_weights_are_not_chosen_before_they_are_measured(image, monkeypatch, tmp_path):
    rows = json.loads(restorer_scores.DENOISER_SCORES.read_text())
    rows = [r for r in rows if r['name'] == 'denoise_grey']
    (tmp_path/'scores').write_text(json.dumps(rows))
    monkeypatch.setattr(restorer_scores, 'DENOISER_SCORES', tmp_path/'scores')
    assert ', denoise_grey, ' in image('in.png', 'out.png')[1]


def test_a_licence_is_said_of_what_is_chosen(image, monkeypatch, tmp_path):
    rows = [dict(name='nl_means', channels=3, dB=[30]*6, weights='')]
    (tmp_path/'scores').write_text(json.dumps(rows))
    monkeypatch.setattr(restorer_scores, 'DENOISER_SCORES', tmp_path/'scores')
    assert 'licence' not in image('in.png', 'out.png')[2]
    *parts, _ = restorers_module._CLASSICAL['nl_means']
    odd = *parts, 'package x, non-commercial use'
    monkeypatch.setitem(restorers_module._CLASSICAL, 'nl_means', odd)
    assert 'note its licence: package x, non-commercial use' in image('in.png', 'out.png')[2]


def test_a_missing_package_is_a_message(idle, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'bm3d', None)
    code, _, err = idle('in.png', 'out.png', '--task', 'bm3d')
    assert code == 2 and "pip install 'restore_lib[bm3d]'" in err


def test_a_bug_stays_a_traceback(image, monkeypatch):
    def broken(*args, **kw):
        raise ValueError('a bug')

    monkeypatch.setattr(Restorer, '__call__', broken)
    with pytest.raises(ValueError, match='a bug'):
        image('in.png', 'out.png')
    assert sorted(p.name for p in Path('.').iterdir()) == ['in.png']


def test_too_large_an_image_is_a_message(image, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)     # Pillow's own is 90 million
    code, _, err = image('in.png', 'out.png')
    assert code == 2 and 'in.png' in err and not Path('out.png').exists()


def test_a_large_image_is_wanted(image, monkeypatch, recwarn):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)    # less than twice: Pillow only warns
    code, _, err = image('in.png', 'out.png')
    assert code == 0 and 'Bomb' not in err and not recwarn.list


def test_a_result_that_is_no_number(image, monkeypatch):
    monkeypatch.setattr(Restorer, '__call__', lambda self, x, *args: x*np.nan)
    Path('out.png').write_text('old')
    code, _, err = image('in.png', 'out.png')
    assert code == 2 and 'NaN' in err and Path('out.png').read_text() == 'old'


def test_nothing_half_written(image, monkeypatch):
    Path('out.png').write_text('old')
    whole = Image.Image.save

    def full(self, file, *args, **kw):
        whole(self, file, *args, **kw)
        if isinstance(file, (str, Path)):
            raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Image.Image, 'save', full)
    code, _, err = image('in.png', 'out.png')
    assert code == 2 and 'No space left' in err and Path('out.png').read_text() == 'old'
    assert sorted(p.name for p in Path('.').iterdir()) == ['in.png', 'out.png']


# how far, how long --------------------------------------------------------------------------------


def test_long_work_is_said_before(image, monkeypatch, tmp_path):
    rows = json.loads(restorer_scores.DENOISER_SCORES.read_text())
    for seconds, words in ((1, ''), (100_000, 'takes about 3 min of one CPU thread')):
        slow = [dict(r, seconds=seconds) for r in rows]
        (tmp_path/'scores').write_text(json.dumps(slow))
        monkeypatch.setattr(restorer_scores, 'DENOISER_SCORES', tmp_path/'scores')
        err = image('in.png', 'out.png', '--device', 'cpu')[2]
        assert words in err and (words or 'thread' not in err)


def test_the_line_of_a_result_says_how_far_it_went(image):
    picture(hw=(64, 64)).save('in.png')
    line = image('in.png', 'a.png', '--sigma', 25)[1]
    assert re.search(r', (\d+ % of the way to its answer|its whole answer), \d+\.\d s$', line)
    assert ', its whole answer, ' in image('in.png', 'b.png', '--plain')[1]
    assert ', the image stays as it is, ' in image('in.png', 'c.png', '--sigma', 0)[1]
    picture(hw=(20, 64)).save('small.png')
    code, line, err = image('small.png', 'd.png')
    assert ', the image stays as it is, ' in line and 'noise of' not in line
    assert 'in 64 x 20 pixels no noise can be measured' in err
    assert np.array_equal(np.asarray(Image.open('small.png')), np.asarray(Image.open('d.png')))


def test_the_way_in_words():
    denoiser, mixed = restorer('nl_means'), restorer('mixed')

    def words(r, share, **how):
        return C.way_in_words(r, torch.tensor(share).reshape(1, 1, 1, -1), **how)

    assert words(denoiser, [0.4]) == '40 % of the way to its answer'
    assert words(denoiser, [0.4], careful=False) == words(denoiser, [1.0]) == 'its whole answer'
    assert words(denoiser, [0.01]) == 'the image stays as it is'
    mostly = [0.3]*9 + [1.0]
    assert words(mixed, mostly) == '10 % of the pixels mended, 30 % of the way elsewhere'
    assert words(mixed, [0.0]*3 + [1.0]) == '25 % of the pixels mended, the rest stays'


def test_a_scan_in_black_and_white_stays(image):
    "It was taken for noise of 94 of 255."
    dots = torch.rand(1, 1, 128, 400) < 0.15
    page = torch.nn.functional.avg_pool2d(dots.float(), 3, 1, 1)[0, 0] < 0.2
    Image.fromarray(page.numpy()).save('page.png')
    code, line, err = image('page.png', 'out.png')
    assert code == 0 and 'the image stays as it is' in line and 'noise of' not in line
    assert 'almost all is black or white, where no noise can be measured' in err
    assert 'black and white becomes grey of 8 bits' in err


def test_the_colours_of_a_palette_are_said(image):
    picture('P').save('in.gif')
    assert 'the colours of a palette become RGB' in image('in.gif', 'out.png')[2]


# a folder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('out', ['mended', 'mended.png', 'new/', 'a/b/'])
def test_a_file_into_a_folder(image, out):
    if 'mended' in out:
        Path(out).mkdir()
    code, line, err = image('in.png', out)
    assert code == 0, err
    assert line.startswith(f'{Path(out)}/in.png: 50 x 37')
    assert [p.name for p in Path(out).iterdir()] == ['in.png']


def test_a_missing_folder_is_made(image):
    assert image('in.png', 'a/b/out.png')[0] == 0
    assert Path('a/b/out.png').is_file()


def test_notes_in_a_folder_name_their_file(image):
    Path('scans').mkdir()
    for name in 'ab':
        picture(hw=(20, 20)).convert('CMYK').save(f'scans/{name}.tif')
    code, out, err = image('scans', 'mended')
    assert code == 0 and len(err.splitlines()) >= 5
    for line in err.splitlines()[:-1]:
        assert line.startswith(('restore: scans/a.tif: ', 'restore: scans/b.tif: '))
    assert 'scans' not in image('scans/a.tif', 'alone.tif')[2]


def test_a_folder(image):
    Path('scans/deeper').mkdir(parents=True)
    picture().save('scans/a.jpg')
    picture('I;16').save('scans/deeper/b.png')
    Path('scans/notes.txt').write_text('no image')
    Path('scans/broken.png').write_text('no image')
    code, out, err = image('scans', 'new/mended')
    assert code == 2 and 'restore: scans/broken.png is not a readable image' in err
    made = sorted(str(p) for p in Path('new').rglob('*') if p.is_file())
    assert made == ['new/mended/a.jpg', 'new/mended/deeper/b.png'] and out.count('\n') == 2
    assert 'restore: 2 of 3 images restored' in err
    Path('scans/broken.png').unlink()
    assert image('scans', 'new/mended')[0] == 0


def test_an_image_that_is_not_there(image):
    code, _, err = image('nope.png', 'out.png')
    assert code == 2 and err == 'restore: nope.png does not exist\n'


def test_a_bar_of_files(shell):
    Path('scans').mkdir()
    picture().save('scans/a.png')
    assert 'image' in shell('image', 'scans', 'out')[2]
    assert restore_folder('scans', 'again') == 0


# what there is, what it is worth ------------------------------------------------------------------


def test_a_list(shell):
    code, out, err = shell('list')
    assert code == 0 and not err
    for name in ('denoise_grey', 'denoise_colour', 'mixed', 'nl_means', 'wavelet', 'bm3d'):
        assert name in out
    assert 'non-commercial' in out


def test_evaluate(shell):
    Path('clean').mkdir()
    picture('L', (64, 70)).save('clean/a.png')
    code, out, err = shell('evaluate', 'nl_means', '--data', 'clean', '--sigma', 25, 50)
    assert code == 0 and 'sigma 25' in out and 'sigma 50' in out and 'worse, %' in out
    assert '%|' in err
    code, out, err = shell('evaluate', 'mixed', '--data', 'clean', '--quiet')
    assert code == 0 and 'mixed' in out and not err
    for words, says in (
        (('denoise_grey', '--data', 'clean', '--sigma', 0.1), 'expected a level in 255ths'),
        (('fog', '--data', 'clean'), '--task is fog'),
        (('mixed', '--data', 'nowhere'), 'nowhere is not a folder'),
        (('mixed', '--data', 'clean', '--sigma', -1), '--sigma'),
    ):
        if says == '--sigma':
            words = ('denoise_grey', *words[1:])
        code, out, err = shell('evaluate', *words, '--quiet')
        assert code == 2 and says in err and not out


def test_evaluate_goes_on_after_a_bad_file(shell):
    Path('clean').mkdir()
    for name in 'ac':
        picture('L', (64, 70)).save(f'clean/{name}.png')
    Path('clean/b.png').write_text('no image')
    code, out, err = shell('evaluate', 'nl_means', '--data', 'clean', '--sigma', 25, '--quiet')
    assert code == 1 and 'restore: clean/b.png is not a readable image' in err
    assert re.search(r'sigma 25\s+2\s', out)
    for name in 'ac':
        Path(f'clean/{name}.png').write_text('no image')
    code, out, err = shell('evaluate', 'nl_means', '--data', 'clean', '--quiet')
    assert code == 2 and 'no image can be read' in err and not out


def test_enlarging(shell, image):
    net = dict(base=16, embed=16, head_channels=8, swin_depth=2, window=4)
    pairs = [(torch.rand(1, 8, 8), torch.rand(1, 32, 32)) for _ in range(2)]
    model = make_sr(SRConfig(net_options=net, crop=32, batch=2, codec_steps=1), pairs)
    torch.nn.init.normal_(model.net.last[-1].weight, std=0.1)     # else it is bicubic in any steps
    save_model(model, 'large.safetensors', task='x4')
    picture('RGBA', (11, 14)).save('in.png')
    code, out, err = image('in.png', 'out.png', '--task', 'large.safetensors')
    assert code == 0 and out.startswith('out.png: 56 x 44, large')
    with Image.open('out.png') as got:
        assert got.mode == 'RGBA' and got.size == (56, 44)
    code, out, _ = image('in.png', 'four.png', '--task', 'large.safetensors', '--steps', '4')
    assert code == 0 and Path('four.png').read_bytes() != Path('out.png').read_bytes()
    for words, says in ((('large.safetensors', '16'), 'large has 15 at most'),
                        (('large.safetensors', '0'), 'steps is 0'),
                        (('nl_means', '4'), 'nl_means knows no steps'),
                        (('auto', '4'), '--steps is 4, --task auto')):
        code, _, err = image('in.png', 'no.png', '--task', words[0], '--steps', words[1])
        assert code == 2 and says in err and not Path('no.png').exists()
    picture('L', (1, 4100)).save('in.png')
    code, _, err = image('in.png', 'out.webp', '--task', 'large.safetensors')
    assert code == 2 and 'WEBP takes no image of 16400 x 4 pixels' in err
    Path('clean').mkdir()
    picture('L', (34, 37)).save('clean/a.png')
    code, out, err = shell('evaluate', 'large.safetensors', '--data', 'clean', '--quiet')
    assert code == 0 and 'x4' in out


# the shell ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'words', [[], ['image'], ['image', 'in.png'], ['polish'], ['evaluate', 'x']]
)
def test_words_that_the_command_does_not_know(words, capsys):
    with pytest.raises(SystemExit) as stop:
        restore_command(words)
    assert stop.value.code == 2 and 'usage: restore' in capsys.readouterr().err


def test_python_knows_the_command():
    "`python -m restore_lib.restore_command --help` printed nothing."
    words = [sys.executable, '-m', 'restore_lib.restore_command']
    done = subprocess.run([*words, '--help'], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith('usage: restore')
    assert subprocess.run([*words, 'polish'], capture_output=True, cwd=ROOT).returncode == 2


def test_the_shell_knows_the_command():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    scripts = dict(s.split('=', 1) for s in config['DEFAULT']['console_scripts'].split())
    assert not {'restore_image', 'superres_image'} & scripts.keys()
    module, name = scripts['restore'].split(':')
    call = getattr(importlib.import_module(module), name)
    assert call is C.restore_command
    assert all(p.default is not p.empty for p in inspect.signature(call).parameters.values())
