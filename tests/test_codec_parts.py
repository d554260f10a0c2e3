"""What lesson 12 stands on: bands in an order, gains of LL wherever it stands, files that keep
every knob, costs counted from the networks, rows of the study."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from restore_lib.codec_costs import (
    codec_macs,
    layer_macs,
    published_unet,
    published_vq_macs,
    transform_macs,
    published_unet_macs,
)
from restore_lib.codec_files import codec_kinds, load_codec, rebuilt, save_codec
from restore_lib.codec_parts import by_band, check_inside, measured_gains
from restore_lib.codec_study import (
    CODEC_STEPS,
    codec_config,
    codec_study_rows,
    collapse_rows,
    study_scores,
)
from restore_lib.codecs import (
    CODECS,
    BandsCodec,
    DCTCodec,
    HybridCodec,
    LearnableBandsCodec,
    LLCodec,
    PacketCodec,
    WaveletPacketCodec,
    make_codec,
)
from restore_lib.degrade import bicubic_down, bicubic_up
from restore_lib.metrics import count_macs, count_params
from restore_lib.records import studies
from restore_lib.thermal import thermal
from restore_lib.wavelets import wavedec2

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('inside', [{'LL', 'HH'}, dict(LL=1, HH=2), 'LL', (), ('LL', 'LL'), None])
def test_bands_have_an_order(inside):
    "A set of names has another order in another process, so the latent's channels would, too."
    with pytest.raises(ValueError, match='inside is'):
        BandsCodec(inside=inside)
    assert check_inside(['HH', 'LL'], ('LL', 'HH')) == ('HH', 'LL')


@pytest.mark.parametrize('channels', [True, 1.0, 2, '1'])
def test_channels_are_one_or_three(channels):
    with pytest.raises((ValueError, TypeError), match='channels is'):
        LLCodec(channels)
    assert LLCodec(np.int64(3)).channels == 3


def test_a_name_of_any_type_is_refused_by_name():
    for name in (['ll'], None, 'vae'):
        with pytest.raises(ValueError, match='name is'):
            make_codec(name)


@pytest.mark.parametrize(
    'inside', [('LL', 'HH'), ('HH', 'LL'), ('LH', 'LL', 'HL'), ('HH', 'HL', 'LH', 'LL')]
)
@pytest.mark.parametrize('c', (1, 3))
def test_residual_gains_go_by_LL_wherever_it_stands(inside, c):
    x = thermal(6, 64, seed=5).expand(-1, c, -1, -1)
    y = bicubic_up(bicubic_down(x, 4), 4)
    codec = BandsCodec(c, inside=inside).fit(x, y, 'residual')
    z, z_y = codec.encode(x)[0], codec.encode(y)[0]
    r = (z_y - z).square().mean((0, 2, 3)).sqrt()
    assert torch.allclose(r, r.mean().expand_as(r), rtol=1e-3)
    spread = z.std((0, 2, 3))[[b.startswith('LL') for b in codec.bands]]
    assert torch.allclose(spread, torch.ones(c), atol=1e-3)


def test_measured_gains_are_what_fit_sets():
    x = thermal(3, 64, seed=5)
    codec = PacketCodec()
    wanted = measured_gains(codec, x)
    assert torch.equal(codec.gains, torch.ones(16)) and torch.equal(codec.fit(x).gains, wanted)
    with pytest.raises(ValueError, match='scale is'):
        measured_gains(codec, x, None, 'std')


@pytest.mark.parametrize('name', list(CODECS))
def test_empty_latents_are_named(name):
    codec = make_codec(name)
    z, side = codec.encode(torch.rand(2, 1, 16, 16))
    with pytest.raises(ValueError, match='z has shape .*at least one place'):
        codec.decode(z[:0], tuple(s[:0] for s in side))


def test_a_side_of_other_things_is_named():
    codec = LLCodec()
    z, side = codec.encode(torch.rand(2, 1, 16, 16))
    with pytest.raises(TypeError, match=r'side\[0\] is .*expected a float tensor'):
        codec.decode(z, [s.numpy() for s in side])
    with pytest.raises(TypeError, match=r'side\[0\] is torch.int64'):
        codec.decode(z, [s.long() for s in side])


def test_by_band_and_back():
    z = torch.rand(2, 3 * 16, 2, 2)
    assert torch.equal(by_band(by_band(z, 16), 3), z)


# files --------------------------------------------------------------------------------------------

KNOBS = [
    *((name, {}) for name in CODECS),
    ('ll', dict(wavelet='db2')),
    ('full', dict(level=3, wavelet='bior4.4')),
    ('all', dict(wavelet='sym4')),
    ('learnable', dict(wavelet='db2')),
    ('hybrid', dict(width=8, depth=1, wavelet='db2')),
    ('packet', dict(level=3)),
    ('dct', dict(block=3)),
    ('vq', dict(factor=2, latent=3, codes=16, width=8, depth=1)),
]


@pytest.mark.parametrize('name, options', KNOBS)
def test_a_file_keeps_every_knob(name, options, tmp_path):
    codec = make_codec(name, 3, **options)
    with torch.no_grad():
        for p in codec.parameters():
            p.add_(0.05 * torch.randn_like(p))
        codec.gains.copy_(torch.rand_like(codec.gains) + 0.5)
    back, says = load_codec(save_codec(codec, tmp_path / 'a.safetensors', of=['x', 1]))
    x = torch.rand(1, 3, 24, 24)
    assert type(back) is type(codec) and back.bands == codec.bands and says == dict(of=['x', 1])
    assert torch.equal(back(x), codec.eval()(x)) and repr(back) == repr(codec)


@pytest.mark.parametrize('kind', [LLCodec, HybridCodec, LearnableBandsCodec, WaveletPacketCodec])
def test_a_swapped_wavelet_comes_back(kind, tmp_path):
    "A state of Haar's fits: all keys match. The file tells."
    codec, x = kind(), torch.rand(1, 1, 32, 32)
    before = codec.encode(x)[0]
    codec.wavelet = 'db2'
    back, _ = load_codec(save_codec(codec, tmp_path / 'a.safetensors'))
    assert back.wavelet == 'db2' and torch.equal(back.encode(x)[0], codec.encode(x)[0])
    assert not torch.allclose(back.encode(x)[0], before, atol=0.01)
    assert "wavelet='db2'" in repr(back)
    swapped = rebuilt(back, wavelet='haar')
    assert torch.allclose(swapped.encode(x)[0], before, atol=1e-6) and back.wavelet == 'db2'


@pytest.mark.parametrize('change', [dict(level=3), dict(channels=3), dict(factor=8)])
def test_what_no_argument_tells_is_not_saved(change, tmp_path):
    codec = LLCodec()
    for k, v in change.items():
        setattr(codec, k, v)
    with pytest.raises(ValueError, match='changed by hand'):
        save_codec(codec, tmp_path / 'a.safetensors')
    assert not list(tmp_path.iterdir())


def test_bad_rebuilds():
    with pytest.raises(ValueError, match="LLCodec has no 'inside'; it has channels, level"):
        rebuilt(LLCodec(), inside=('HH',))
    with pytest.raises(ValueError, match='another latent'):
        rebuilt(BandsCodec(), inside=('HH',))
    with pytest.raises(ValueError, match="wavelet is 'nonsense'"):
        rebuilt(LLCodec(), wavelet='nonsense')

    class Mine(LLCodec):
        pass

    with pytest.raises(TypeError, match='codec is Mine'):
        rebuilt(Mine())
    assert {'BandsCodec', 'WaveletPacketCodec'} < set(codec_kinds())


def test_files_keep_random_states_and_refuse_others(tmp_path):
    path = tmp_path / 'a.safetensors'
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    codec = make_codec('ll')
    load_codec(save_codec(codec, path))
    save_codec(copy.deepcopy(codec).double(), path)
    assert torch.equal(torch.rand(1), wanted) and load_codec(path)[0].dtype == torch.float64
    save_file(dict(gains=torch.ones(1)), path)
    with pytest.raises(ValueError, match='a.safetensors names no codec'):
        load_codec(path)
    with pytest.raises(ValueError):
        save_codec(codec, path, score=float('nan'))


# costs --------------------------------------------------------------------------------------------


def test_transforms_by_hand():
    n = 3 * 64 * 64
    assert transform_macs(make_codec('ll', 3), 64, 64) == 4 * n + 4 * n // 4
    assert transform_macs(make_codec('full', 3, level=1), 64, 64) == 4 * n
    assert transform_macs(make_codec('packet', 3), 64, 64) == 2 * 4 * n
    assert transform_macs(DCTCodec(3, 8), 64, 64) == 2 * 8 * n
    assert transform_macs(make_codec('vq', 3), 64, 64) == 0
    longer = WaveletPacketCodec(3, wavelet='bior4.4')
    assert transform_macs(longer, 64, 64) == 2 * (9 + 7) * n  # 9/7 taps, without tabulated zeros


def test_a_transform_has_as_many_products_as_its_filters():
    "A convolution with the filters themselves, as PyTorch counts it."
    import pywt

    for wavelet in ('haar', 'db2', 'sym4'):
        low, high, *_ = pywt.Wavelet(wavelet).filter_bank
        taps = torch.tensor([low, high])[:, None, :]
        lines = torch.rand(64, 1, 62 + len(low))
        rows = count_macs(lambda t, taps=taps: F.conv1d(t, taps, stride=2), lines)
        codec = make_codec('full', 1, level=1, wavelet=wavelet)
        assert transform_macs(codec, 64, 64) == 2 * rows


@pytest.mark.parametrize('wavelet', ['haar', 'bior4.4'])
def test_layers_without_the_transform(wavelet):
    down, up = 9 * 9 * 3 * 3 * 16 * 16, 9 * 9 * 4 * 4 * 16 * 16
    assert layer_macs(LearnableBandsCodec(3, wavelet), 64, 64) == down + up
    hybrid = HybridCodec(1, wavelet=wavelet)
    weights = sum(p.numel() for p in hybrid.cnn.parameters() if p.ndim == 4)
    assert layer_macs(hybrid, 64, 64) == weights * 16 * 16
    assert layer_macs(LLCodec(1, 2, wavelet), 64, 64) == 0
    assert codec_macs(hybrid, 64, 64) == 2 * transform_macs(hybrid, 64, 64) + weights * 256


def test_the_search_of_codes_is_counted():
    vq = make_codec('vq')
    convs = sum(p.numel() for n, p in vq.named_parameters() if p.ndim == 4) * 16 * 16
    assert layer_macs(vq, 64, 64) == convs + 16 * 16 * vq.codes * vq.latent


def test_the_published_networks():
    "Known from their papers' code: 118.59 M and 55.3 M parameters; attention is in the count."
    assert count_params(published_unet()) == 118_593_583
    layers = published_unet_macs() - sum(
        2 * 192 * 64 * 2 * s * s
        for level, s in enumerate((64, 32, 16, 8))
        for _ in range(2 + (s == 8))
    )
    assert 50.0e9 < layers < 50.2e9 < published_unet_macs() < 50.8e9
    assert published_unet_macs(12) - published_unet_macs(3) == 3 * 9 * 160 * 9 * 64 * 64
    assert [round(m / 1e9) for m in published_vq_macs()] == [173, 335]


# the study ----------------------------------------------------------------------------------------


def test_the_study_is_whole_and_short():
    rows = studies('12_codecs')
    known = {(r['config']['codec'], r['config']['steps'], r['seed']) for r in rows}
    assert known == set(codec_study_rows())
    assert sum(r['minutes'] for r in rows) < 15
    for config in (r['config'] for r in rows):
        assert config == codec_config(config['codec'], config['steps'])


def test_scores_of_the_study():
    for name in ('learned VQ', 'all, learned', 'hybrid'):
        assert study_scores(name, 'CBSD68').shape == (3, 68)
        assert study_scores(name, 'photos', CODEC_STEPS[0]).shape == (3, 16)
    assert study_scores('LL').shape == study_scores('bicubic').shape == (1, 16)
    assert [len(r['dB']) for r in collapse_rows()] == [21] * 3
    with pytest.raises(ValueError, match='no photos of nothing'):
        study_scores('nothing')


def test_the_lessons_images_are_those_of_the_study():
    "The fixed codecs' rows, measured again on the squares that come with the library."
    from restore_lib.codec_study import FIXED_CODECS, ceiling_scores

    for name in ('LL', 'full band, bior4.4'):
        again = torch.tensor(ceiling_scores(FIXED_CODECS[name](), 'photos'))
        assert torch.allclose(again, study_scores(name)[0], atol=0.02)


def test_haar_is_the_bands_of_lesson_11():
    x = torch.rand(1, 1, 16, 16)
    assert torch.allclose(LLCodec().encode(x)[0], wavedec2(2 * x - 1, 'haar', 2)[0], atol=1e-6)
