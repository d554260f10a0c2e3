"Public checkpoints: files built from spandrel's own classes, and files that are wrong."

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from restore_lib.data import photos
from restore_lib.metrics import evaluate
from restore_lib.model_files import save_model
from restore_lib.public_models import is_public, load_public, public_state
from restore_lib.baselines import Peer
from restore_lib.restore_command import restore_command
from restore_lib.restorers import restorer

pytest.importorskip('spandrel')
from spandrel.architectures.DRUNet import DRUNet  # noqa: E402
from spandrel.architectures.DnCNN import DnCNN  # noqa: E402
from spandrel.architectures.ESRGAN import ESRGAN  # noqa: E402
from spandrel.architectures.NAFNet import NAFNet  # noqa: E402
from spandrel.architectures.RCAN import RCAN  # noqa: E402
from spandrel.architectures.SwinIR import SwinIR  # noqa: E402

SWIN = dict(img_size=16, window_size=8, depths=[2], embed_dim=12, num_heads=[3], mlp_ratio=2)
NETS = dict(
    rcan=lambda: RCAN(scale=2, n_resgroups=1, n_resblocks=1, n_feats=8, reduction=4, norm=False),
    swinir=lambda: SwinIR(upscale=4, upsampler='pixelshuffledirect', **SWIN),
    swinir_grey=lambda: SwinIR(in_chans=1, upscale=1, upsampler='', **SWIN),
    esrgan=lambda: ESRGAN(num_filters=8, num_blocks=1, scale=4),
    dncnn=lambda: DnCNN(in_nc=1, out_nc=1, nc=8, nb=9, act_mode='R'),
    drunet=lambda: DRUNet(in_nc=4, out_nc=3, nc=[8, 12, 16, 20], nb=2),
    nafnet=lambda: NAFNet(width=8, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]),
)


def save_image(x, path):
    Image.fromarray((x*255).byte().permute(1, 2, 0).numpy()).save(path)


def written(name, folder, ending='.pth', wrap='params'):
    torch.manual_seed(0)
    net = NETS[name]().eval()
    path = folder/f'{name}{ending}'
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    if ending == '.safetensors':
        save_file(state, path)
    else:
        torch.save({wrap: state} if wrap else state, path)
    return net, path


@pytest.mark.parametrize('ending', ['.pth', '.safetensors'])
@pytest.mark.parametrize('name', NETS)
@torch.no_grad()
def test_any_size_and_colour_as_the_network_itself(name, ending, tmp_path):
    net, path = written(name, tmp_path, ending)
    model = load_public(path)
    y = torch.rand(2, model.channels, 32, 24, generator=torch.Generator().manual_seed(1))
    given = torch.cat([y, torch.full_like(y[:, :1], 15/255)], 1) if name == 'drunet' else y.clone()
    assert torch.allclose(model(y), net(given), atol=1e-5)
    for shape in ((1, 1, 17, 9), (1, 3, 5, 31), (1, 3, 1, 1)):
        out = model(torch.rand(shape))
        assert out.shape == (*shape[:2], *(n*model.scale for n in shape[2:]))
    assert is_public(path) and (model.notes or name not in ('rcan', 'esrgan'))  # untrained


@torch.no_grad()
def test_a_network_that_is_told_the_noise_hears_it(tmp_path):
    net, path = written('drunet', tmp_path)
    model, y = load_public(path), torch.rand(2, 3, 16, 16)
    level = torch.tensor([0.1, float('nan')])
    planes = torch.tensor([0.1, 15/255]).view(2, 1, 1, 1).expand(2, 1, 16, 16)
    assert torch.allclose(model(y, level), net(torch.cat([y, planes], 1)), atol=1e-5)


def test_evaluate_scores_it_and_the_input_stays(tmp_path):
    _, path = written('rcan', tmp_path)       # spandrel's own writes into what it is given
    x = photos('test')['coffee'][:, :64, :64]
    y = x[:, ::2, ::2].contiguous()
    before = y.clone()
    assert evaluate(load_public(path), [(y, x)]).mean['PSNR'] > 0 and torch.equal(y, before)


@pytest.mark.parametrize('name', ['rcan', 'nafnet'])
def test_the_command_takes_a_public_file(name, tmp_path, capsys):
    _, path = written(name, tmp_path)
    image, out = tmp_path/'in.png', tmp_path/'out.png'
    save_image(photos('test')['coffee'][:, :41, :50], image)
    args = ['image', str(image), str(out), '--weights', str(path), '--device', 'cpu', '--quiet']
    assert restore_command(args) == 0
    scale = 2 if name == 'rcan' else 1
    assert Image.open(out).size == (50*scale, 41*scale)
    if name == 'rcan':
        assert 'is this network trained' in capsys.readouterr().err
    (tmp_path/'set').mkdir()
    image.rename(tmp_path/'set/in.png')
    assert restore_command(['evaluate', str(path), '--data', str(tmp_path/'set'), '--quiet',
                            '--device', 'cpu', '--sigma', '25']) == 0
    assert 'restored, dB' in capsys.readouterr().out


@torch.no_grad()
def test_a_large_image_goes_through_in_windows(tmp_path):
    net, path = written('rcan', tmp_path)
    # without its means over the image, what a window gives is what the whole gives
    for group in net.body[:-1]:
        for block in group.body[:-1]:
            block.body[3].conv_du[2].weight.zero_()
    torch.save(net.state_dict(), path)
    y = torch.rand(1, 3, 150, 170)
    whole, run = load_public(path)(y), restorer(str(path), 'cpu').run
    assert (run(y) - whole).abs().max() < 1e-4


def test_a_file_of_the_library_is_none(tmp_path):
    path = save_model(Peer('edsr', dict(width=8, blocks=1)), tmp_path/'own.safetensors', task='x4')
    assert not is_public(path) and restorer(str(path), 'cpu').scale == 4
    y = torch.rand(1, 3, 12, 13)
    assert restorer(str(path), 'cpu')(y, say=lambda note: None).shape == (1, 3, 48, 52)


class Evil:
    def __reduce__(self):
        return print, ('pickled code ran',)


def spoiled(kind, folder):
    path = folder/'w.pth'
    if kind == 'code':
        torch.save(dict(params=Evil()), path)
    elif kind == 'ending':
        path = folder/'w.onnx'
        path.write_bytes(b'x')
    elif kind == 'no safetensors':
        path = folder/'w.safetensors'
        path.write_bytes(b'nonsense')
    elif kind == 'no archive':
        path.write_bytes(b'nonsense')
    elif kind == 'unknown':
        torch.save({'a.weight': torch.rand(3), 'b.weight': torch.rand(3)}, path)
    elif kind == 'list':
        torch.save([torch.rand(3)], path)
    elif kind == 'missing tensor':
        state = NETS['rcan']().state_dict()
        state.pop('body.0.body.0.body.2.weight')
        torch.save(state, path)
    elif kind == 'NaN':
        state = NETS['nafnet']().state_dict()
        state['intro.weight'][0] = torch.nan
        torch.save(state, path)
    elif kind == 'channels':
        net = NAFNet(img_channel=4, width=8, middle_blk_num=1, enc_blk_nums=[1], dec_blk_nums=[1])
        torch.save(net.state_dict(), path)
    return path


@pytest.mark.parametrize('kind, words', [
    ('nothing', 'is no file'),
    ('code', 'without running code from it'),
    ('ending', "ends in '.onnx'; expected one of .safetensors"),
    ('no safetensors', 'is no safetensors file'),
    ('no archive', 'is no checkpoint that can be read'),
    ('unknown', 'of no architecture that spandrel knows; it holds a.weight, b.weight'),
    ('list', 'holds list; expected tensors by name'),
    ('missing tensor', 'looks like a known network, but does not fit it'),
    ('NaN', 'holds NaN in intro.weight'),
    ('channels', 'of 4 channels in and 4 out; expected 1 or 3'),
])
def test_errors_name_the_file_and_what_is_wrong(kind, words, tmp_path, capsys):
    path = spoiled(kind, tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as told:
        load_public(path)
    assert words in str(told.value) and str(path) in str(told.value)
    assert 'pickled code ran' not in capsys.readouterr().out


def test_without_spandrel_it_says_what_to_install(tmp_path, monkeypatch):
    _, path = written('nafnet', tmp_path)
    monkeypatch.setitem(__import__('sys').modules, 'spandrel', None)
    with pytest.raises(ImportError, match=r"pip install 'restore_lib\[public\]'"):
        load_public(path)
    image = tmp_path/'in.png'
    save_image(torch.rand(3, 8, 8), image)
    args = ['image', str(image), str(tmp_path/'o.png'), '--weights', str(path)]
    assert restore_command(args) == 2


def test_wrapped_weights_are_unwrapped(tmp_path):
    for wrap in ('params_ema', 'state_dict', None):
        _, path = written('nafnet', tmp_path, wrap=wrap)
        assert load_public(path).architecture == 'NAFNet'
    assert isinstance(public_state(path), dict)
