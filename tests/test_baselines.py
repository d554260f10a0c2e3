"Lesson 22's published networks: the same numbers as the public code, any size, any colour."

import pytest
import torch
from torch import nn

from restore_lib import baselines
from restore_lib.baselines import DRUNet, DnCNN, EDSR, NAFNet, PEERS, Peer, RCAN, SwinIR
from restore_lib.model_files import load_model, save_model

SMALL = dict(
    edsr=dict(channels=3, scale=4, width=8, blocks=2),
    rcan=dict(channels=3, scale=4, width=8, groups=2, blocks=2, reduction=4),
    swinir=dict(channels=3, scale=4, dim=12, depths=(2, 2), heads=3),
    dncnn=dict(channels=3, width=8, depth=5),
    drunet=dict(channels=3, widths=(8, 12, 16, 20), blocks=1),
    nafnet=dict(channels=3, width=8, down=(1, 2), up=(1, 1)),
)


def disturbed(net):
    "Its weights moved, so that no part stays what it starts as (zeros, ones)."
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1*torch.randn(p.shape, generator=g))
        for name, b in net.named_buffers():
            if name.endswith('running_var'):
                b.copy_(0.5 + torch.rand(b.shape, generator=g))
            elif name.endswith('running_mean'):
                b.copy_(0.1*torch.randn(b.shape, generator=g))
    return net.eval()


def public(name):
    spandrel = pytest.importorskip('spandrel.architectures')
    module = __import__(f'{spandrel.__name__}.{name}', fromlist=[name])
    return getattr(module, name)


class PublicEDSR(nn.Module):
    "EDSR of its authors' own parts, which spandrel keeps in RCAN's file; it has no EDSR itself."

    def __init__(self, width=8, blocks=2, scaling=0.3, scale=4):
        super().__init__()
        pytest.importorskip('spandrel')
        from spandrel.architectures.RCAN.__arch import rcan_arch as parts
        plain = parts.default_conv
        self.head = nn.Sequential(plain(3, width, 3))
        blocks = [parts.ResBlock(plain, width, 3, res_scale=scaling) for _ in range(blocks)]
        self.body = nn.Sequential(*blocks, plain(width, width, 3))
        self.tail = nn.Sequential(parts.Upsampler(plain, scale, width), plain(width, 3, 3))

    def forward(self, y):
        x = self.head(y)
        return self.tail(self.body(x) + x)


def rcan(scale=4):
    own = dict(scale=scale, n_resgroups=2, n_resblocks=2, n_feats=8, reduction=4, norm=False)
    return public('RCAN')(**own), RCAN(3, scale, 8, 2, 2, 4)


def swinir(channels=3, scale=4):
    sizes = dict(img_size=16, window_size=8, depths=[2, 2], embed_dim=12, num_heads=[3, 3])
    how = dict(upsampler='pixelshuffledirect' if scale > 1 else '', upscale=scale, mlp_ratio=2)
    theirs = public('SwinIR')(in_chans=channels, **sizes, **how)
    return theirs, SwinIR(channels, scale, 12, (2, 2), 3)


def dncnn(norm=True):
    theirs = public('DnCNN')(in_nc=1, out_nc=1, nc=8, nb=6, act_mode='BR' if norm else 'R')
    return theirs, DnCNN(1, 8, 6, norm)


class Told(nn.Module):
    "The public DRUNet, told a level in a plane."

    def __init__(self, net, level):
        super().__init__()
        self.net, self.level = net, level

    def forward(self, y):
        return self.net(torch.cat([y, torch.full_like(y[:, :1], self.level)], 1))


def drunet(channels=3):
    widths = [8, 12, 16, 20]
    theirs = public('DRUNet')(in_nc=channels + 1, out_nc=channels, nc=widths, nb=2)
    return Told(theirs, 0.2), DRUNet(channels, widths, 2, sigma=0.2)


def nafnet():
    sizes = dict(middle_blk_num=2, enc_blk_nums=[1, 2], dec_blk_nums=[2, 1])
    return public('NAFNet')(width=8, **sizes), NAFNet(3, 8, (1, 2), 2, (2, 1))


PAIRS = dict(
    edsr=(lambda: (PublicEDSR(), EDSR(3, 4, 8, 2, 0.3)), (20, 24)),
    edsr_x3=(lambda: (PublicEDSR(scale=3), EDSR(3, 3, 8, 2, 0.3)), (9, 11)),
    rcan=(rcan, (20, 24)),
    rcan_x2=(lambda: rcan(2), (9, 11)),
    swinir=(swinir, (24, 32)),
    swinir_of_no_multiple=(swinir, (21, 27)),
    swinir_grey=(lambda: swinir(1, 2), (24, 24)),
    swinir_at_its_size=(lambda: swinir(3, 1), (17, 24)),
    dncnn=(dncnn, (13, 9)),
    dncnn_without_norms=(lambda: dncnn(False), (13, 9)),
    drunet=(drunet, (24, 16)),
    drunet_grey=(lambda: drunet(1), (24, 16)),
    nafnet=(nafnet, (24, 20)),
    nafnet_of_no_multiple=(nafnet, (23, 17)),
)


@pytest.mark.parametrize('name', PAIRS)
@torch.no_grad()
def test_weights_of_the_public_code_give_the_same_image(name):
    make, hw = PAIRS[name]
    theirs, ours = make()
    disturbed(theirs)
    state = getattr(theirs, 'net', theirs).state_dict()
    masks = {k for k in state if k.endswith('attn_mask')}  # of one size; ours makes them as needed
    ours.load_state_dict({k: v for k, v in state.items() if k not in masks})
    channels = ours.channels
    y = torch.rand(2, channels, *hw, generator=torch.Generator().manual_seed(0))
    want, got = theirs(y.clone()), ours.eval()(y)
    assert want.std() > 0.01
    assert got.shape == want.shape and (got - want).abs().max() <= 1e-5*max(1, want.abs().max())


@pytest.mark.parametrize('kind', PEERS)
@pytest.mark.parametrize('hw', [(1, 1), (7, 5), (9, 16), (17, 30)])
@torch.no_grad()
def test_any_size(kind, hw):
    peer = Peer(kind, SMALL[kind]).eval()
    out = peer(torch.rand(2, 3, *hw))
    assert out.shape == (2, 3, hw[0]*peer.scale, hw[1]*peer.scale) and out.isfinite().all()


@pytest.mark.parametrize('kind', PEERS)
@torch.no_grad()
def test_grey_into_a_colour_network_and_colour_into_a_grey_one(kind):
    colour = Peer(kind, SMALL[kind]).eval()
    grey = torch.rand(1, 1, 16, 16)
    want = colour(grey.expand(-1, 3, -1, -1)).mean(1, keepdim=True)
    assert torch.allclose(colour(grey), want, atol=1e-6)
    one = Peer(kind, SMALL[kind] | dict(channels=1)).eval()
    y = torch.rand(1, 3, 16, 16)
    each = torch.cat([one(y[:, k:k + 1]) for k in range(3)], 1)
    assert torch.allclose(one(y), each, atol=1e-5)


def test_a_residual_network_starts_at_the_bicubic_image_where_its_last_layer_is_zero():
    peer = Peer('edsr', SMALL['edsr'], added=True)
    for p in peer.net.tail[1].parameters():
        nn.init.zeros_(p)
    y = torch.rand(1, 3, 6, 5)
    assert torch.equal(peer(y), baselines.bicubic_up(y, 4))


@pytest.mark.parametrize('kind', PEERS)
@torch.no_grad()
def test_a_file_gives_the_same_network_back(kind, tmp_path):
    peer = Peer(kind, SMALL[kind])
    disturbed(peer)
    if kind in ('edsr', 'rcan'):
        peer.added = True
    save_model(peer, tmp_path/'p.safetensors', task='x4')
    again, says = load_model(tmp_path/'p.safetensors')
    for p in peer.state_dict().values():
        p.copy_(p.half() if p.is_floating_point() else p)
    y = torch.rand(1, 3, 16, 16)
    assert says['task'] == 'x4' and again.added == peer.added
    assert torch.allclose(again(y), peer(y), atol=1e-5)


@pytest.mark.parametrize('make, words', [
    (lambda: EDSR(scale=5), 'scale is 5; expected one of 1, 2, 3, 4, 8'),
    (lambda: EDSR(width=0), 'width is 0'),
    (lambda: RCAN(width=20), 'reduction is 16, width is 20; expected a reduction that divides'),
    (lambda: SwinIR(dim=10, heads=3), 'heads is 3, dim is 10; expected a heads that divides'),
    (lambda: SwinIR(window=1), 'window is 1'),
    (lambda: DnCNN(depth=2), 'depth is 2'),
    (lambda: NAFNet(down=(1,), up=(1, 1)), 'expected as many sizes'),
    (lambda: DRUNet(blocks=0), 'blocks is 0'),
    (lambda: Peer('esrgan'), "kind is 'esrgan'; expected one of"),
    (lambda: Peer('edsr', dict(depth=3)), 'depth'),
    (lambda: Peer('dncnn', SMALL['dncnn'], added=True), 'added is True, but dncnn keeps the size'),
    (lambda: Peer('edsr', SMALL['edsr'])(torch.rand(1, 2, 8, 8)), 'y has 2 channels'),
    (lambda: Peer('edsr', SMALL['edsr'])(255*torch.rand(1, 3, 8, 8)), 'is it 0 to 255'),
    (lambda: Peer('edsr', SMALL['edsr'])(torch.rand(3, 8, 8)),
     'y has shape (3, 8, 8); expected (b, c, h, w)'),
])
def test_errors_name_what_is_wrong(make, words):
    with pytest.raises((ValueError, TypeError)) as told:
        make()
    assert words in str(told.value)
