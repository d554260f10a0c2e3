"""What lesson 14 does not teach: parity with torchvision's windows, who sees whom position by
position, counts, sizes, checkpointing, devices and types, bad input."""

import copy
import json
import math

from common import DEVICES, loud, saved
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

from restore_lib import unet
from restore_lib.diffusion import ResidualShift
from restore_lib.metrics import count_macs, count_params
from restore_lib.model_files import load_model, save_model
from restore_lib.unet import (
    ResBlock,
    SwinLayers,
    SwinUNet,
    TwoBranchUNet,
    WindowAttention,
    from_windows,
    shift_mask,
    time_embedding,
    to_windows,
)

torch.set_num_threads(1)
SMALL = dict(base=8, mults=(1, 2), blocks=1, embed=16, head_channels=8, window=4)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(cin=4, cout=2, **kw):
    return loud(SwinUNet(cin, cout, **{**SMALL, **kw})).double()


def call(b=2, c=2, h=16, w=16, k=None, dtype=torch.float64):
    return (
        torch.randn(b, c, h, w, dtype=dtype),
        torch.arange(b),
        torch.randn(b, k or c, h, w, dtype=dtype),
    )


# windows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('h, w, window', [(8, 12, 4), (3, 3, 3), (6, 2, 2), (1, 5, 1)])
def test_windows_are_where_they_should_be(h, w, window):
    x = torch.randn(2, h, w, 3)
    cut = to_windows(x, window)
    for i in range(h):
        for j in range(w):
            k, at = (i // window) * (w // window) + j // window, (i % window) * window + j % window
            assert torch.equal(cut[:, k, at], x[:, i, j])
    assert torch.equal(from_windows(cut, window, (h, w)), x)


def allowed(hw, window, shift):
    """By a loop over positions: the pairs of a map's positions that share a shifted window
    and lie on the same side of the border."""
    h, w = hw
    seen = torch.zeros(h * w, h * w, dtype=torch.bool)
    where = lambda i, s: (
        (i + (window - s)) // window if s else i // window
    )  # windows begin s positions into the map; the first is a part
    for a in range(h * w):
        for b in range(h * w):
            (i, j), (p, q) = divmod(a, w), divmod(b, w)
            seen[a, b] = where(i, shift[0]) == where(p, shift[0]) and where(j, shift[1]) == where(
                q, shift[1]
            )
    return seen


@pytest.mark.parametrize(
    'hw, window, shift',
    [
        ((8, 8), 4, (2, 2)),
        ((8, 12), 4, (1, 3)),
        ((6, 4), 2, (1, 1)),
        ((4, 8), 4, (0, 2)),
        ((9, 6), 3, (2, 1)),
        ((8, 8), 4, (0, 0)),
    ],
)
def test_mask_says_who_may_see_whom(hw, window, shift):
    at = torch.arange(hw[0] * hw[1]).reshape(1, *hw, 1).roll([-s for s in shift], (1, 2))
    ids = to_windows(at, window)[0, :, :, 0]  # whose position each token of each window is
    seen = torch.zeros(at.numel(), at.numel(), dtype=torch.bool)
    mask = shift_mask(hw, window, shift)
    for k in range(len(ids)):
        seen[ids[k][:, None], ids[k][None]] |= mask[k]
    assert torch.equal(seen, allowed(hw, window, shift))
    assert mask.diagonal(dim1=1, dim2=2).all()


@pytest.mark.parametrize(
    'hw, shift', [((8, 8), 2), ((8, 4), 2), ((4, 4), 2), ((8, 12), 1), ((12, 8), 0)]
)
def test_gradient_reaches_exactly_the_allowed_positions(hw, shift):
    a = loud(WindowAttention(8, 2, 4, shift)).double()
    x = torch.randn(1, *hw, 8, dtype=torch.float64, requires_grad=True)
    out = a(x).flatten(1, 2).sum(-1)[0]
    reached = torch.stack(
        [torch.autograd.grad(o, x, retain_graph=True)[0].abs().sum(-1).flatten() > 0 for o in out]
    )
    assert torch.equal(reached, allowed(hw, 4, a.shifts(hw)))


@pytest.mark.parametrize(
    'hw, window, shift',
    [
        ((16, 16), 8, 4),
        ((16, 16), 8, 0),
        ((8, 8), 8, 4),
        ((12, 8), 4, 2),
        ((8, 16), 8, 4),
        ((9, 6), 3, 1),
        ((4, 4), 2, 1),
    ],
)
@pytest.mark.parametrize('dtype, tol', [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_attention_is_torchvisions(hw, window, shift, dtype, tol):
    a = loud(WindowAttention(24, 3, window, shift)).to(dtype)
    peer = ShiftedWindowAttention(24, [window, window], [shift, shift], 3).to(dtype)
    names = {
        'qkv.weight': 'qkv.weight',
        'qkv.bias': 'qkv.bias',
        'proj.weight': 'proj.weight',
        'proj.bias': 'proj.bias',
        'bias': 'relative_position_bias_table',
    }
    peer.load_state_dict({names[k]: v for k, v in a.state_dict().items()}, strict=False)
    x = torch.randn(2, *hw, 24, dtype=dtype)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [m(v) for m, v in zip((a, peer), xs)]
    # torchvision masks with -100, we with -inf: no difference at these scores
    assert torch.allclose(*outs, atol=tol)
    for o in outs:
        o.square().sum().backward()
    assert torch.allclose(xs[0].grad, xs[1].grad, atol=50 * tol)
    assert torch.allclose(a.bias.grad, peer.relative_position_bias_table.grad, atol=500 * tol)


def test_attention_is_sdpa():
    a = loud(WindowAttention(16, 2, 4, 2)).double()
    x = torch.randn(1, 8, 8, 16, dtype=torch.float64)
    y = to_windows(x.roll((-2, -2), (1, 2)), 4)[0]
    q, k, v = a.qkv(y).reshape(4, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
    z = (
        F.scaled_dot_product_attention(q, k, v, attn_mask=a.scores_bias((8, 8)))
        .transpose(1, 2)
        .flatten(2)
    )
    assert torch.allclose(
        from_windows(a.proj(z)[None], 4, (8, 8)).roll((2, 2), (1, 2)), a(x), atol=1e-12
    )


def test_bias_by_hand():
    a = WindowAttention(4, 1, 3)
    bias = a.scores_bias((3, 3))[0, 0]
    for i in range(9):
        for j in range(9):
            dy, dx = i // 3 - j // 3, i % 3 - j % 3
            assert bias[i, j] == a.bias[(dy + 2) * 5 + dx + 2, 0]


def test_mask_made_in_inference_mode_serves_training():
    a = WindowAttention(8, 2, 4, 2)
    with torch.inference_mode():
        a(torch.randn(1, 8, 8, 8))
    assert not shift_mask((8, 8), 4, (2, 2)).is_inference()
    a(torch.randn(1, 8, 8, 8)).sum().backward()
    assert a.bias.grad.abs().sum() > 0


# counts -------------------------------------------------------------------------------------------


def macs(model, c, s, k=None):
    e = lambda c: torch.empty(1, c, s, s, device='meta')
    return count_macs(model, e(c), torch.empty(1, dtype=torch.int64, device='meta'), e(k or c))


def test_paper_is_the_published_size():
    with torch.device('meta'):
        p = SwinUNet.paper()
    assert count_params(p) == 118_593_583 and abs(count_params(p) / 118.59e6 - 1) < 0.005
    m = macs(p, 3, 64)
    attention = (
        2 * 192 * 64 * 2 * (3 * 64**2 + 2 * (32**2 + 16**2 + 8**2) - 64**2 + 8**2)
    )  # 2 blocks a group; q k' and weights v; 2 groups a level and the middle
    assert 49e9 < m - attention < 51e9 and m < 51.5e9


@pytest.mark.parametrize('c', [1, 12, 16, 21])
def test_channels_cost_the_first_and_the_last_layer(c):
    with torch.device('meta'):
        p, q = SwinUNet.paper(), SwinUNet.paper(2 * c, c)
    assert count_params(q) - count_params(p) == 160 * 9 * (2 * c - 6) + (160 * 9 + 1) * (c - 3)
    assert macs(q, c, 64) - macs(p, 3, 64) == 160 * 9 * 64**2 * (3 * c - 9)


def test_macs_grow_with_the_area():
    with torch.device('meta'):
        p = SwinUNet.paper()
    a, b = macs(p, 3, 64), macs(p, 3, 128)
    assert abs(b / a - 4) < 0.02


def test_tiny_is_tiny():
    m = SwinUNet.tiny(32, 16)
    assert 400_000 <= count_params(m) <= 600_000 and m.multiple == 16


# the network --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'make', [lambda **k: SwinUNet.tiny(8, 4, **k), lambda **k: SwinUNet(8, 4, **SMALL, **k)]
)
@pytest.mark.parametrize('h, w', [(16, 16), (17, 9), (1, 1), (1, 40)])
def test_untrained(make, h, w):
    z, t, cond = call(2, 4, h, w, dtype=torch.float32)
    assert torch.equal(make(skip=True)(z, t, cond), cond)
    assert make()(z, t, cond).abs().max() == 0


def test_skip_takes_conds_first_channels():
    m = SwinUNet(5, 2, cond_channels=3, skip=True, **SMALL)
    z, t, cond = call(2, 2, 8, 8, 3, dtype=torch.float32)
    assert torch.equal(m(z, t, cond), cond[:, :2])


@pytest.mark.parametrize('h, w', [(17, 33), (1, 1), (3, 8), (1, 50), (7, 16)])
def test_other_sizes_are_mirrored_and_cut(h, w):
    m = small(skip=True)
    z, t, cond = call(2, 2, h, w)
    big = lambda x: mirrored(x, m.multiple)
    assert m(z, t, cond).shape == z.shape
    assert torch.allclose(m(z, t, cond), m(big(z), t, big(cond))[..., :h, :w], atol=1e-12)


def mirrored(x, multiple):
    "By steps of at most the whole picture, with NumPy."
    import numpy as np

    pads = [(0, 0), (0, 0)] + [(0, -n % multiple) for n in x.shape[2:]]
    return torch.from_numpy(np.pad(x.numpy(), pads, mode='symmetric'))


def test_multiples_are_not_padded(monkeypatch):
    m = small()
    args = call(1, 2, 16, 24)
    want = m(*args)
    monkeypatch.setattr(unet, 'mirror_to_multiple', lambda x, multiple: x)
    assert torch.equal(m(*args), want)
    with pytest.raises((ValueError, RuntimeError)):
        m(*call(1, 2, 15, 24))


@pytest.mark.parametrize(
    'kw',
    [
        {},
        dict(swin_depth=0),
        dict(swin_at=('mid',), around=True),
        dict(swin_at=('down', 'up')),
        dict(blocks=(2, 1)),
        dict(blocks=2, up_blocks=(1, 3)),
        dict(mults=(1,)),
        dict(mults=(1, 1, 2)),
        dict(swin_depth=3),
        dict(window=2),
        dict(head_channels=16),
        dict(mlp=1),
    ],
)
def test_every_parameter_learns(kw):
    m = small(**kw)
    z, t, cond = call(2, 2, 16, 16)
    m(z, t, cond).square().sum().backward()
    assert not [n for n, p in m.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]


def test_samples_and_steps_do_not_mix():
    m = small()
    z, _, cond = call(3)
    t = torch.tensor([0, 7, 14])
    whole = m(z, t, cond)
    assert torch.allclose(
        whole,
        torch.cat([m(z[k : k + 1], t[k : k + 1], cond[k : k + 1]) for k in range(3)]),
        atol=1e-12,
    )
    assert (m(z, t.flip(0), cond) - whole).abs().max() > 1e-3 and (
        m(z, t, cond.flip(0)) - whole
    ).abs().max() > 1e-3


def test_without_time_the_step_says_nothing():
    m = small()
    for b in (b for b in m.modules() if isinstance(b, ResBlock)):
        nn.init.zeros_(b.time.weight)
    z, t, cond = call(2)
    assert torch.equal(m(z, t, cond), m(z, t + 5, cond))


def test_res_block_by_hand():
    b, x, e = (
        ResBlock(8, 16, 12).double(),
        torch.randn(2, 8, 5, 5, dtype=torch.float64),
        torch.randn(2, 12, dtype=torch.float64),
    )
    assert torch.equal(b(x, e), b.side(x))  # untrained: nothing but the side way
    loud(b)
    scale, shift = (e @ b.time.weight.T + b.time.bias).split(16, 1)
    h = F.conv2d(
        F.silu(F.group_norm(x, 8, b.norm1.weight, b.norm1.bias)),
        b.conv1.weight,
        b.conv1.bias,
        padding=1,
    )
    h = F.group_norm(h, 16, b.norm2.weight, b.norm2.bias)
    h = torch.stack(
        [h[k] + h[k] * scale[k, :, None, None] + shift[k, :, None, None] for k in range(2)]
    )
    want = F.conv2d(F.silu(h), b.conv2.weight, b.conv2.bias, padding=1) + F.conv2d(
        x, b.side.weight, b.side.bias
    )
    assert torch.allclose(b(x, e), want, atol=1e-12)


def test_time_embedding():
    e = time_embedding(torch.arange(15), 8)
    want = torch.tensor(
        [
            [f(t * 10_000 ** (-k / 4)) for f in (math.cos, math.sin) for k in range(4)]
            for t in range(15)
        ]
    )
    assert (
        e.shape == (15, 8)
        and torch.allclose(e, want, atol=1e-6)
        and torch.allclose(e.square().sum(1), torch.full((15,), 4.0))
    )
    with pytest.raises(ValueError, match='dim is 7'):
        time_embedding(torch.arange(3), 7)


def test_checkpointing_changes_memory_only():
    m, args = small(), call()
    m(*args).square().sum().backward()
    again = copy.deepcopy(m)
    again.zero_grad()
    for s in again.modules():
        if isinstance(s, unet.Stage):
            s.checkpoint = True
    runs = []
    again.trunk.mid[0].res.register_forward_hook(lambda *_: runs.append(1))
    again(*args).square().sum().backward()
    assert len(runs) == 2
    for p, q in zip(m.parameters(), again.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-12)
    assert SwinUNet.tiny(2, 1, checkpoint=True).trunk.mid[0].checkpoint


def test_channels_last_is_the_same_network():
    m, args = small(), call()
    want = m(*args)
    assert torch.allclose(
        m.to(memory_format=torch.channels_last)(
            *(a.contiguous(memory_format=torch.channels_last) if a.ndim == 4 else a for a in args)
        ),
        want,
        atol=1e-12,
    )


def test_state_goes_round():
    m, n, args = small(), small(), call()
    n.load_state_dict(m.state_dict())
    assert torch.equal(m(*args), n(*args)) and not [k for k in m.state_dict() if 'relative' in k]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_types_and_devices(device, dtype):
    m = small(skip=True)
    want = m(*(args := call()))
    got = m.to(device, dtype)(
        *(a.to(device, dtype) if a.is_floating_point() else a.to(device) for a in args)
    )
    assert got.dtype == dtype and torch.allclose(
        got.double().cpu(), want, atol={torch.float64: 1e-10, torch.float32: 1e-3}.get(dtype, 0.5)
    )


def test_autocast():
    m, args = small().float(), call(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        out = m(*args)
    assert torch.allclose(out.float(), m(*args), atol=0.5)
    out.float().sum().backward()


def test_with_the_diffusion():
    process, m = ResidualShift(), SwinUNet.tiny(4, 2, skip=True)
    x, _, y = call(2, 2, 20, 12, dtype=torch.float32)
    assert torch.isfinite(process.loss(m, x, y).mean)
    assert torch.equal(
        process.sample(m, y, 4, generator=torch.Generator().manual_seed(0)), y
    )  # untrained: every step's answer is y


def test_it_learns_a_batch():
    process, m = ResidualShift(), SwinUNet(4, 2, skip=True, around=True, **SMALL)
    x, _, y = call(4, 2, 8, 8, dtype=torch.float32)
    optimizer, losses, g = (
        torch.optim.AdamW(m.parameters(), 4e-3),
        [],
        torch.Generator().manual_seed(0),
    )
    for _ in range(120):
        loss = process.loss(m, x, y, generator=g).mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.6 * sum(losses[:10]) / 10


# two branches -------------------------------------------------------------------------------------


def two(**kw):
    return TwoBranchUNet(
        SwinUNet(4, 2, **{**SMALL, **kw}), SwinUNet(6, 3, **{**SMALL, **kw, 'base': 4})
    )


def two_call(h=8, w=8):
    return (
        (torch.randn(1, 2, h, w), torch.randn(1, 3, 2 * h, 2 * w)),
        torch.tensor([3]),
        (torch.randn(1, 2, h, w), torch.randn(1, 3, 2 * h, 2 * w)),
    )


@pytest.mark.parametrize('h, w', [(8, 8), (5, 9), (1, 1)])
def test_two_branches_start_at_cond(h, w):
    z, t, cond = two_call(h, w)
    for out, c in zip(two(skip=True)(z, t, cond), cond):
        assert torch.equal(out, c)


def test_two_branches_exchange():
    m, (z, t, cond) = loud(two()), two_call()
    for v in z:
        v.requires_grad_()
    for out in m(z, t, cond):
        assert all(
            g.abs().sum() > 0 for g in torch.autograd.grad(out.square().sum(), z, retain_graph=True)
        )
    m(z, t, cond)[0].sum().backward()
    with pytest.raises(ValueError, match='twice the sides'):
        m((z[0], z[1][..., :8]), t, (cond[0], cond[1][..., :8]))
    with pytest.raises(TypeError, match='z is Tensor; expected a pair'):
        m(z[0], t, cond)


# bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'change, error, says',
    [
        (lambda z, t, c: (z, t), ValueError, 'cond is None'),
        (
            lambda z, t, c: (z, t, c[..., :8]),
            ValueError,
            'cond has shape .* expected the same b, h and w',
        ),
        (lambda z, t, c: (z, t, c[:1]), ValueError, 'cond has shape'),
        (
            lambda z, t, c: (z[:, :1], t, c),
            ValueError,
            'z has 1 channels; expected 2: in_channels=4',
        ),
        (
            lambda z, t, c: (z, t, torch.cat([c, c], 1)),
            ValueError,
            'cond has 4 channels; expected 2',
        ),
        (
            lambda z, t, c: (z, t.float(), c),
            ValueError,
            r't is torch.float32 .* expected int64 of shape \(2,\)',
        ),
        (lambda z, t, c: (z, t[:1], c), ValueError, r't is torch.int64 of shape \(1,\)'),
        (lambda z, t, c: (z, 3, c), TypeError, 't is int'),
        (lambda z, t, c: (z, t - 1, c), ValueError, 't holds -1'),
        (lambda z, t, c: (z * math.nan, t, c), ValueError, 'z holds 1024 values that are NaN'),
        (lambda z, t, c: (z, t, c / 0), ValueError, 'cond holds'),
        (lambda z, t, c: (z[0], t, c), ValueError, r'z has shape .* expected \(b, c, h, w\)'),
        (lambda z, t, c: (z.long(), t, c), TypeError, 'z is torch.int64'),
        (lambda z, t, c: (z[..., :0], t, c[..., :0]), ValueError, 'none of them 0'),
        (lambda z, t, c: (z.numpy(), t, c), TypeError, 'z is ndarray'),
        (
            lambda z, t, c: (z.double(), t, c),
            TypeError,
            'z is torch.float64, cond is torch.float32, the network is torch.float32',
        ),
        (
            lambda z, t, c: (z, t, c.double()),
            TypeError,
            'cond is torch.float64, the network is torch.float32',
        ),
        (lambda z, t, c: (z.half(), t, c.half()), TypeError, 'z is torch.float16'),
    ],
)
def test_bad_calls(change, error, says):
    m = SwinUNet(4, 2, **SMALL)
    with pytest.raises(error, match=says):
        m(*change(*call(dtype=torch.float32)))


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(in_channels=1), 'in_channels is 1'),
        (dict(out_channels=0), 'out_channels is 0'),
        (dict(cond_channels=4), 'cond_channels is 4, in_channels is 4'),
        (dict(out_channels=3, skip=True), 'out_channels is 3, cond has 2'),
        (dict(embed=20, head_channels=8), 'embed is 20, head_channels is 8'),
        (dict(mults=()), 'mults is'),
        (dict(mults=(1, 0.3)), 'mults is'),
        (dict(blocks=0), 'blocks is 0'),
        (dict(blocks=(1, 1, 1)), 'one for each level'),
        (dict(up_blocks=3), 'up_blocks is 3'),
        (dict(swin_depth=-1), 'swin_depth is -1'),
        (dict(swin_at=('top',)), 'swin_at is'),
        (dict(window=0), 'window is 0'),
        (dict(base=True), 'base is True|mults'),
        (dict(base=1), 'base is 1'),
        (dict(mults=2), r'mults is 2; expected one number for each level'),
        (dict(mlp=0), 'mlp is 0, dim is 16'),
        (dict(mlp=-1), 'mlp is -1'),
        (dict(mlp=0.01), 'mlp is 0.01'),
        (dict(embed=0), 'embed is 0; expected a whole number from 1'),
        (dict(embed=-8), 'embed is -8'),
    ],
)
def test_bad_knobs(kw, says):
    with pytest.raises(ValueError, match=says):
        SwinUNet(**{**dict(in_channels=4, out_channels=2, **SMALL), **kw})


def test_a_mixture_of_types_that_makes_the_networks_type_is_taken():
    m, (z, t, c) = SwinUNet(4, 2, **SMALL), call(dtype=torch.float32)
    assert m(z.bfloat16(), t, c).dtype == torch.float32


def test_without_attention_its_knobs_do_not_matter():
    args = call(dtype=torch.float32)
    assert (
        SwinUNet(4, 2, **{**SMALL, 'swin_depth': 0, 'embed': 0, 'mlp': 0, 'window': 0})(*args).shape
        == args[0].shape
    )


@pytest.mark.parametrize(
    'f',
    [
        lambda w: to_windows(torch.zeros(1, 8, 8, 1), w),
        lambda w: from_windows(torch.zeros(1, 4, 16, 1), w, (8, 8)),
    ],
)
@pytest.mark.parametrize('window', [0, -4])
def test_no_window(f, window):
    with pytest.raises(ValueError, match=f'window is {window}; expected a whole number from 1'):
        f(window)


def test_bad_steps_to_embed():
    with pytest.raises(TypeError, match='t is int; expected a tensor'):
        time_embedding(3, 16)
    with pytest.raises(ValueError, match=r't has shape \(2, 1\)'):
        time_embedding(torch.zeros(2, 1), 16)


def test_bad_windows():
    with pytest.raises(ValueError, match='pad it to 8 x 8'):
        to_windows(torch.zeros(1, 7, 8, 1), 4)
    with pytest.raises(ValueError, match='needs 4'):
        from_windows(torch.zeros(1, 3, 16, 1), 4, (8, 8))
    with pytest.raises(ValueError, match='shift is 4, window is 4'):
        WindowAttention(8, 2, 4, 4)
    with pytest.raises(ValueError, match='dim is 9, heads is 2'):
        WindowAttention(9, 2, 4)
    with pytest.raises(ValueError, match='shift is -1'):
        WindowAttention(8, 2, 4, -1)
    with pytest.raises(ValueError, match='mlp is 0, dim is 8'):
        unet.SwinBlock(8, 2, 4, mlp=0)
    assert SwinLayers(8, 16, 2, 2, 4).blocks[1].attn.shift == 2


# states, numbers of NumPy, what callers may write into --------------------------------------------


@pytest.mark.parametrize(
    'make, one, other, says',
    [
        (
            lambda **kw: SwinUNet(4, 2, **{**SMALL, **kw}),
            dict(skip=True),
            dict(skip=False),
            'skip=True, but it is False here',
        ),
        (
            lambda **kw: SwinUNet(4, 2, **{**SMALL, **kw}),
            dict(around=True),
            dict(around=False),
            'around=True, but it is False here',
        ),
        (
            lambda **kw: SwinUNet(6, 3, **{**SMALL, **kw}),
            dict(cond_channels=2),
            dict(cond_channels=3),
            'cond_channels=2, but it is 3 here',
        ),
        (
            lambda **kw: WindowAttention(8, 2, 4, **kw),
            dict(shift=2),
            dict(shift=0),
            'shift=2, but it is 0 here',
        ),
        (
            lambda **kw: SwinLayers(4, 8, 1, 2, 4, **kw),
            dict(around=True),
            dict(around=False),
            'around=True, but it is False here',
        ),
    ],
)
def test_the_state_of_another_function_is_refused(make, one, other, says, tmp_path):
    a, b, same = make(**one), make(**other), make(**one)
    for state in (a.state_dict(), saved(a, tmp_path / 'w.pt')):
        with pytest.raises(RuntimeError, match=says):
            b.load_state_dict(state)
        same.load_state_dict(state)
    b.load_state_dict(a.state_dict(), strict=False)  # on purpose
    b.load_state_dict({**a.state_dict()})  # a plain dict does not say


def test_a_state_inside_another_module_is_compared_and_keys_stay_as_they_were():
    a, b = (
        nn.Sequential(nn.Conv2d(2, 2, 1), SwinLayers(2, 8, 2, 2, 4, around=v))
        for v in (True, False)
    )
    with pytest.raises(RuntimeError, match='1.around=True, but it is False here'):
        b.load_state_dict(a.state_dict())
    assert not [k for k in a.state_dict() if 'knob' in k or 'extra' in k]
    assert (
        'relative' not in WindowAttention(8, 2, 4).state_dict()
    )  # follows from the window, whose size the table shows
    with pytest.raises(RuntimeError, match='size mismatch'):
        WindowAttention(8, 2, 4).load_state_dict(WindowAttention(8, 2, 3).state_dict())


def test_numbers_of_numpy():
    n = {
        k: np.int64(v)
        for k, v in dict(
            in_channels=4,
            out_channels=2,
            base=8,
            blocks=1,
            embed=16,
            head_channels=8,
            window=4,
            swin_depth=2,
            up_blocks=1,
        ).items()
    }
    torch.manual_seed(1)
    a = SwinUNet(**n, mults=np.array([1, 2]), mlp=np.float32(2))
    torch.manual_seed(1)
    b = SwinUNet(
        4,
        2,
        base=8,
        mults=(1, 2),
        blocks=1,
        up_blocks=1,
        embed=16,
        head_channels=8,
        window=4,
        mlp=2,
    )
    args = call(dtype=torch.float32)
    assert (
        all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
        and type(a.multiple) is int
    )
    b.load_state_dict(loud(a).state_dict())
    assert torch.equal(a(*args), b(*args))
    x = torch.randn(1, 8, 8, 3)
    assert torch.equal(from_windows(to_windows(x, np.int64(4)), np.int64(4), np.array([8, 8])), x)
    assert torch.equal(
        shift_mask(np.array([8, 8]), np.int64(4), np.int64(2)), shift_mask((8, 8), 4, 2)
    )
    assert torch.equal(
        time_embedding(torch.arange(3), np.int64(8), np.float64(100)),
        time_embedding(torch.arange(3), 8, 100),
    )


def test_a_mask_that_is_written_into_changes_no_other():
    a, x = loud(WindowAttention(8, 2, 4, 2)), torch.randn(1, 8, 8, 8)
    want = a(x)
    shift_mask((8, 8), 4, (2, 2)).fill_(True)
    assert torch.equal(a(x), want) and not shift_mask((8, 8), 4, (2, 2)).all()


def test_a_first_hessian_leaves_nothing_behind():
    a, x = loud(WindowAttention(4, 2, 3, 1)).double(), torch.randn(1, 6, 6, 4, dtype=torch.float64)
    f = lambda s: a(s * x).square().sum()
    s = torch.tensor(1.0, dtype=torch.float64)
    torch.func.hessian(f)(s)
    slope = torch.func.grad(f)(s)
    assert (
        torch.allclose(slope, (f(s + 1e-5) - f(s - 1e-5)) / 2e-5, rtol=1e-5) and slope.abs() > 0.01
    )


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda: SwinUNet(4, 2, **{**SMALL, 'mlp': math.nan}), ValueError, 'mlp is nan'),
        (lambda: SwinUNet(4, 2, **{**SMALL, 'mults': (1, math.inf)}), ValueError, 'mults is inf'),
        (lambda: SwinUNet(4, 2, **{**SMALL, 'mults': ('1', 2)}), TypeError, "mults is '1'"),
        (lambda: SwinUNet(4, 2, **{**SMALL, 'blocks': 1.5}), ValueError, 'blocks is 1.5'),
        (lambda: SwinUNet(4.0, 2, **SMALL), ValueError, 'in_channels is 4.0'),
        (lambda: SwinUNet(4, 2, **{**SMALL, 'swin_at': 'mid'}), ValueError, "swin_at is 'mid'"),
        (
            lambda: to_windows(torch.zeros(8, 8, 1), 4),
            ValueError,
            r'x has shape \(8, 8, 1\); expected \(b, h, w, c\)',
        ),
        (lambda: to_windows(torch.zeros(1, 8, 8, 1), 4.0), ValueError, 'window is 4.0'),
        (
            lambda: from_windows(torch.zeros(1, 4, 9, 1), 4, (8, 8)),
            ValueError,
            r'expected \(b, windows, 16, c\)',
        ),
        (lambda: WindowAttention(8.0, 2, 4), ValueError, 'dim is 8.0'),
        (lambda: WindowAttention(8, 2, 4)(torch.zeros(1, 6, 8, 8)), ValueError, 'pad it to 8 x 8'),
        (lambda: SwinLayers(8, 16, -1, 2, 4), ValueError, 'depth is -1'),
        (lambda: time_embedding(torch.zeros(2), 8, period=0), ValueError, 'period is 0'),
        (lambda: time_embedding(torch.zeros(2), 8, period=math.nan), ValueError, 'period is nan'),
        (lambda: shift_mask((8, 8), 4, -1), ValueError, 'shift is -1'),
        (lambda: ResBlock(0, 4, 4), ValueError, 'channels is 0'),
        (
            lambda: TwoBranchUNet(SwinUNet(4, 2, **SMALL), nn.Identity()),
            TypeError,
            'fine is Identity; expected a SwinUNet',
        ),
    ],
)
def test_what_does_not_fit_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


# what any knob changes is saved -------------------------------------------------------------------

KNOBS = [
    dict(base=16),
    dict(mults=(1, 1)),
    dict(blocks=2),
    dict(up_blocks=1),
    dict(swin_depth=1),
    dict(swin_depth=0),
    dict(swin_at=('mid',)),
    dict(embed=32),
    dict(window=2),
    dict(head_channels=16),
    dict(mlp=1.5),
    dict(around=True),
    dict(cond_channels=2, in_channels=5, out_channels=3),
    dict(skip=True),
    dict(checkpoint=True),
]


@pytest.mark.parametrize('kw', KNOBS, ids=lambda kw: ' '.join(kw))
def test_a_network_is_built_again_from_what_it_is_made_of(kw):
    kw = {**dict(in_channels=4, out_channels=2, **SMALL), **kw}
    a, plain = loud(SwinUNet(**kw)).eval(), SwinUNet(4, 2, **SMALL)
    made = json.loads(json.dumps(a.made_of()))
    assert made != json.loads(json.dumps(plain.made_of()))
    b = SwinUNet.from_made(made).eval()
    b.load_state_dict(a.state_dict())
    k = a.cond_channels
    z, t = torch.randn(2, a.in_channels - k, 9, 16), torch.tensor([0, 7])
    cond = torch.randn(2, k, 9, 16)
    assert torch.equal(a(z, t, cond), b(z, t, cond))


@pytest.mark.parametrize('kw', [{}, dict(skip=True, around=True, window=2)])
def test_a_file_gives_the_network_back(kw, tmp_path):
    a = loud(SwinUNet(4, 2, **{**SMALL, **kw})).eval()
    b, says = load_model(save_model(a, tmp_path / 'a.safetensors', task='x'))
    args = call(dtype=torch.float32)
    assert says == {'task': 'x'} and torch.allclose(a(*args), b(*args), atol=0.02)


def test_a_network_that_was_changed_by_hand_is_not_saved(tmp_path):
    a = loud(SwinUNet(4, 2, **{**SMALL, 'swin_at': ('mid',)})).eval()
    for m in a.modules():
        if isinstance(m, WindowAttention):
            m.shift = 0
    with pytest.raises((RuntimeError, ValueError), match='shift=0, but it is 2'):
        save_model(a, tmp_path / 'a.safetensors')
