"""What lesson 19 does not teach: parity with timm's block and diffusers' DiT, forward derivatives,
vmap, compilation, types, who receives a gradient, labels, sizes, bad input."""

import io
import math

from common import DEVICES, loud, saved
import numpy as np
import pytest
import timm.models.vision_transformer as vit
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import nn
from torch.func import functional_call, jvp, vmap

from restore_lib.dit import (
    MODULATIONS,
    DiT,
    DiTBlock,
    FinalLayer,
    FlowUNet,
    FourierTime,
    NormedAttention,
    SineTime,
    modulate,
)
from restore_lib.metrics import count_macs, count_params
from restore_lib.patching import sincos_pos_embed
from restore_lib.unet import time_embedding

torch.set_num_threads(1)
NETS = {
    'dit': lambda **kw: DiT(16, 4, 16, 2, 2, **kw),
    'unet': lambda **kw: FlowUNet(base=8, mults=(1, 2), waves=8, **kw),
}
both = pytest.mark.parametrize('kind', NETS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(kind='dit', **kw):
    return loud(NETS[kind](**kw)).double()


def call(b=3, c=1, h=16, w=16, dtype=torch.float64):
    return (
        torch.randn(b, c, h, w, dtype=dtype),
        torch.linspace(0.3, 0.9, b, dtype=dtype),
        torch.linspace(0.1, 0.8, b, dtype=dtype),
    )


# parts --------------------------------------------------------------------------------------------


def by_hand(block, x, c, heads):
    "adaLN-Zero written out, with nn.MultiheadAttention where queries and keys are not normalised."
    d = x.shape[-1]
    b1, s1, g1, b2, s2, g2 = (
        F.silu(c) @ block.modulation[1].weight.T + block.modulation[1].bias
    ).split(d, -1)
    mha = nn.MultiheadAttention(d, heads, batch_first=True, dtype=x.dtype)
    mha.load_state_dict(
        {
            'in_proj_weight': block.attn.qkv.weight,
            'in_proj_bias': block.attn.qkv.bias,
            'out_proj.weight': block.attn.proj.weight,
            'out_proj.bias': block.attn.proj.bias,
        }
    )
    out = []
    for k in range(len(x)):
        h = F.rms_norm(x[k], (d,), eps=1e-6) * (1 + s1[k]) + b1[k]
        y = x[k] + g1[k] * mha(h[None], h[None], h[None])[0][0]
        h = F.rms_norm(y, (d,), eps=1e-6) * (1 + s2[k]) + b2[k]
        out.append(
            y
            + g2[k]
            * (
                F.gelu(h @ block.mlp.fc1.weight.T + block.mlp.fc1.bias) @ block.mlp.fc2.weight.T
                + block.mlp.fc2.bias
            )
        )
    return torch.stack(out)


def test_block_is_adaln_zero_written_out():
    block, x, c = (
        loud(DiTBlock(24, 3, 2.0, qk_norm=False), 0.3).double(),
        torch.randn(3, 7, 24).double(),
        torch.randn(3, 24).double(),
    )
    assert torch.allclose(block(x, c), by_hand(block, x, c, 3), atol=1e-12)


def test_query_key_norm_is_rms_in_each_head():
    attn, x = loud(NormedAttention(24, 3), 0.3).double(), torch.randn(2, 7, 24).double()
    q, k, v = (part.reshape(2, 7, 3, 8).transpose(1, 2) for part in attn.qkv(x).chunk(3, -1))
    q, k = (
        part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        for part, norm in ((q, attn.q_norm), (k, attn.k_norm))
    )
    weights = (q @ k.mT / math.sqrt(8)).softmax(-1)
    assert torch.allclose(attn(x), attn.proj((weights @ v).transpose(1, 2).flatten(2)), atol=1e-12)
    assert torch.allclose(attn.weights(x), weights, atol=1e-12)


@pytest.mark.parametrize('qk', [True, False])
@pytest.mark.parametrize('fused', [True, False])
def test_block_with_open_gates_is_timms(qk, fused):
    peer = loud(
        vit.Block(
            32, 4, qkv_bias=True, qk_norm=qk, norm_layer=lambda d, **kw: nn.LayerNorm(d, eps=1e-6)
        ),
        0.3,
    )
    for norm in (peer.norm1, peer.norm2):
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
    ours, x = DiTBlock(32, 4, qk_norm=qk, norm='layer', fused=fused), torch.randn(2, 9, 32)
    missing, unexpected = ours.load_state_dict(peer.state_dict(), strict=False)
    assert set(missing) == {'modulation.1.weight', 'modulation.1.bias'} and set(unexpected) == {
        f'norm{k}.{n}' for k in (1, 2) for n in ('weight', 'bias')
    }
    with torch.no_grad():
        ours.modulation[1].bias.view(6, 32)[[2, 5]] = 1.0
    assert torch.allclose(ours(x, torch.randn(2, 32)), peer(x), atol=1e-5)


def diffusers_twin(depth=2, heads=2, dim=16):
    """Diffusers' DiT with our weights, and ours: LayerNorm, no query-key norm;
    positions are its own, the condition is ours."""
    ours = loud(DiT(8, 2, dim, depth, heads, channels=3, norm='layer', qk_norm=False), 0.2)
    peer = DiTTransformer2DModel(
        heads,
        dim // heads,
        in_channels=3,
        num_layers=depth,
        sample_size=8,
        patch_size=2,
        activation_fn='gelu',
        norm_eps=1e-6,
    )
    names = {
        'pos_embed.proj.bias': ours.tokens.bias,
        'pos_embed.proj.weight': ours.tokens.weight.reshape(dim, 2, 2, 3).permute(0, 3, 1, 2),
        'proj_out_1.weight': ours.last.modulation[1].weight,
        'proj_out_1.bias': ours.last.modulation[1].bias,
        'proj_out_2.weight': ours.last.linear.weight,
        'proj_out_2.bias': ours.last.linear.bias,
    }
    for k, b in enumerate(ours.blocks):
        for part in ('weight', 'bias'):
            its = {
                'norm1.linear': getattr(b.modulation[1], part),
                'attn1.to_out.0': getattr(b.attn.proj, part),
                'ff.net.0.proj': getattr(b.mlp.fc1, part),
                'ff.net.2': getattr(b.mlp.fc2, part),
            }
            its |= dict(
                zip(('attn1.to_q', 'attn1.to_k', 'attn1.to_v'), getattr(b.attn.qkv, part).chunk(3))
            )
            names |= {f'transformer_blocks.{k}.{n}.{part}': v for n, v in its.items()}
    missing, unexpected = peer.load_state_dict(
        {k: v.detach() for k, v in names.items()}, strict=False
    )
    assert not unexpected and all('.emb.' in m for m in missing), missing
    for b in peer.transformer_blocks:
        b.norm1.emb = type(
            'Ours',
            (nn.Module,),
            {'forward': lambda self, t, label, hidden_dtype=None: ours.embed(t)},
        )()
    return ours, peer


def test_whole_model_is_diffusers_dit():
    ours, peer = diffusers_twin()
    z, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        a, b = ours(z, t), peer(z, t, torch.zeros(2).long()).sample
    assert a.abs().max() > 0.1 and torch.allclose(a, b, atol=1e-5)


def test_final_layer_written_out():
    last, x, c = (
        loud(FinalLayer(16, 5), 0.3).double(),
        torch.randn(2, 4, 16).double(),
        torch.randn(2, 16).double(),
    )
    shift, scale = last.modulation(c).chunk(2, -1)
    want = last.linear(F.rms_norm(x, (16,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None])
    assert torch.allclose(last(x, c), want, atol=1e-12)


def test_modulations_are_in_the_order_they_are_named():
    block, x, c = (
        DiTBlock(16, 2).double(),
        torch.randn(2, 5, 16).double(),
        torch.randn(2, 16).double(),
    )

    def with_bias(**set_):
        with torch.no_grad():
            block.modulation[1].bias.zero_()
            for name, value in set_.items():
                block.modulation[1].bias.view(6, 16)[MODULATIONS.index(name.replace('_', ' '))] = (
                    value
                )
        return block(x, c)

    assert torch.equal(
        with_bias(
            shift_of_attention=1.0, scale_of_attention=1.0, shift_of_MLP=1.0, scale_of_MLP=1.0
        ),
        x,
    )  # gates shut
    attn = x + 0.5 * block.attn(modulate(block.norm1(x), 0.2, 0.7))
    assert torch.allclose(
        with_bias(gate_of_attention=0.5, shift_of_attention=0.2, scale_of_attention=0.7),
        attn,
        atol=1e-12,
    )
    assert torch.allclose(
        with_bias(gate_of_MLP=0.5, shift_of_MLP=0.2, scale_of_MLP=0.7),
        x + 0.5 * block.mlp(modulate(block.norm2(x), 0.2, 0.7)),
        atol=1e-12,
    )


def test_scores_stay_below_the_bound():
    attn, x = NormedAttention(32, 2), 1e3 * torch.randn(4, 50, 32)
    with torch.no_grad():
        attn.qkv.weight.mul_(50)
        attn.q_norm.weight.fill_(2.0)
    q, k, _ = attn._qkv(x)
    assert (q @ k.mT / 4).abs().max() <= 4 * 2 * (1 + 1e-5)


# start --------------------------------------------------------------------------------------------


def test_unet_gives_its_trunk_the_activated_condition():
    model, (z, t, r) = small('unet', classes=3), call()
    c = model.time(t) + model.span(t - r) + model.label(torch.arange(3))
    assert torch.allclose(
        model(z, t, r, torch.arange(3)), model.last(model.trunk(z, F.silu(c))), atol=1e-12
    )


@both
def test_untrained_is_zero(kind):
    z, t, r = call(dtype=torch.float32)
    assert not NETS[kind]()(z, t, r).any()


def test_blocks_start_as_the_identity():
    model, x = DiT.tiny(classes=10), torch.randn(2, 64, 72)
    c = model.embed(torch.tensor([0.1, 0.9]), torch.tensor([0.0, 0.2]), torch.tensor([3, 4]))
    assert c.std() > 1e-3 and all(torch.equal(b(x, c), x) for b in model.blocks)


def alive(model):
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_who_wakes_when():
    model, (z, t, r), seen = NETS['dit'](classes=3), call(dtype=torch.float32), []
    opt = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(4):
        opt.zero_grad()
        (model(z, t, r, torch.arange(3)) - z).square().mean().backward()
        seen.append(alive(model))
        if len(seen) == 2:
            gates = model.blocks[0].modulation[1].weight.grad.view(6, 16, 16).abs().amax((1, 2)) > 0
        opt.step()
    assert seen[0] == {'last.linear.weight', 'last.linear.bias'}
    assert {'tokens.weight', 'last.modulation.1.weight', 'blocks.0.modulation.1.weight'} <= seen[
        1
    ] and not any('attn' in n or 'mlp.fc' in n for n in seen[1])
    assert gates.tolist() == [False, False, True, False, False, True]
    assert (
        {n for n in seen[2] if '.attn.' in n or '.mlp.fc' in n}
        and 'time.mlp.0.weight' in seen[2]
        and 'label.weight' in seen[2]
    )
    assert seen[3] == {n for n, _ in model.named_parameters()}


# positions ----------------------------------------------------------------------------------------


def test_positions_are_the_formulas_and_no_parameter():
    model = DiT((16, 24), 4, 16, 1, 2)
    assert (
        torch.equal(model.pos, sincos_pos_embed(16, (4, 6)))
        and 'pos' not in model.state_dict()
        and 'pos' not in dict(model.named_parameters())
    )


def test_another_size_gets_its_own_positions():
    a, b = DiT(16, 4, 16, 2, 2), DiT((8, 24), 4, 16, 2, 2)
    loud(a)
    b.load_state_dict(a.state_dict())
    z, t = torch.randn(2, 1, 8, 24), torch.tensor([0.3, 0.7])
    assert torch.allclose(a(z, t), b(z, t), atol=1e-6)


def test_without_positions_patches_can_be_shuffled():
    model, z, t = small(), torch.randn(1, 1, 16, 16).double(), torch.tensor([0.5]).double()
    swap = lambda v: torch.cat([v[..., 8:, :], v[..., :8, :]], -2)
    assert not torch.allclose(model(swap(z), t), swap(model(z, t)), atol=1e-3)
    model.pos.zero_()
    assert torch.allclose(model(swap(z), t), swap(model(z, t)), atol=1e-12)


# times, labels, condition -------------------------------------------------------------------------


def test_sines_are_those_of_lesson_14_in_the_precision_of_t():
    t = torch.rand(9)
    assert torch.allclose(SineTime(8, 64).features(t), time_embedding(1000 * t, 64), atol=1e-4)
    assert (
        SineTime(8).features(t.double()).dtype == torch.float64
        and SineTime(8).features(t.bfloat16()).dtype == torch.float32
    )
    want = torch.cos(1000 * t.double() * 10_000 ** (-5 / 32))
    assert torch.allclose(SineTime(8, 64).features(t.double())[:, 5], want, atol=1e-12)


def test_fourier_frequencies_are_kept_and_have_their_scale():
    m = FourierTime(4, 4096, 3.0)
    assert (
        abs(m.w.std().item() - 3) < 0.15
        and 'w' in m.state_dict()
        and not any(p is m.w for p in m.parameters())
    )
    t = torch.tensor([0.25])
    assert torch.allclose(m.features(t)[0, :2048], torch.cos(2 * math.pi * 0.25 * m.w), atol=1e-5)
    assert torch.allclose(m.features(t)[0, 2048:], torch.sin(2 * math.pi * 0.25 * m.w), atol=1e-5)


@both
def test_both_times_are_used(kind):
    model, (z, t, r) = small(kind), call()
    out = model(z, t, r)
    assert (model(z, t * 0.99, r) - out).abs().max() > 1e-5 and (
        model(z, t, r * 0.99) - out
    ).abs().max() > 1e-5
    assert torch.equal(model(z, t), model(z, t, t)) and not torch.allclose(model(z, t), out)


@both
def test_the_span_is_what_is_embedded(kind):
    model, (z, t, r) = small(kind), call()
    model.time.forward = lambda t: torch.zeros(
        len(t), model.time.mlp[2].out_features, dtype=t.dtype
    )
    assert torch.allclose(
        model(z, t, r), model(z, t - 0.05, r - 0.05), atol=1e-9
    )  # t alone is gone: only t - r is left


@both
def test_labels_are_used_and_none_is_their_own(kind):
    model, (z, t, r) = small(kind, classes=4), call()
    out = model(z, t, r)
    assert torch.equal(out, model(z, t, r, torch.full((3,), 4))) and not torch.allclose(
        out, model(z, t, r, torch.zeros(3).long())
    )
    assert (
        model(z, t, r, torch.zeros(3).long()) - model(z, t, r, torch.ones(3).long())
    ).abs().max() > 1e-4


def test_share_of_dropped_labels():
    model, label = DiT(8, 4, 8, 1, 1, classes=5, label_drop=0.3), torch.arange(20_000) % 5
    lost = model.drop_labels(label, torch.Generator().manual_seed(0))
    assert abs((lost == 5).double().mean().item() - 0.3) < 4 * math.sqrt(
        0.3 * 0.7 / 20_000
    ) and torch.equal(lost[lost != 5], label[lost != 5])
    assert torch.equal(
        lost, model.drop_labels(label, torch.Generator().manual_seed(0))
    ) and not torch.equal(lost, model.drop_labels(label, torch.Generator().manual_seed(1)))
    assert abs((lost[label == 2] == 5).double().mean().item() - 0.3) < 0.03
    assert torch.equal(model.eval().drop_labels(label), label)
    for drop, share in ((0.0, 0.0), (1.0, 1.0)):
        model = DiT(8, 4, 8, 1, 1, classes=5, label_drop=drop)
        assert (model.drop_labels(label) == 5).double().mean() == share
    with pytest.raises(ValueError, match='classes is None'):
        DiT(8, 4, 8, 1, 1).drop_labels(label)


@both
def test_forward_draws_nothing(kind):
    model, (z, t, r) = small(kind, classes=3).train(), call()
    state = torch.get_rng_state()
    assert torch.equal(
        model(z, t, r, torch.arange(3)), model(z, t, r, torch.arange(3))
    ) and torch.equal(state, torch.get_rng_state())


@both
def test_condition_is_seen(kind):
    model, (z, t, r) = small(kind, cond_channels=2), call()
    cond = torch.randn(3, 2, 16, 16).double()
    out = model(z, t, r, cond=cond)
    assert out.shape == z.shape and not torch.allclose(out, model(z, t, r, cond=cond.flip(1)))


@both
def test_samples_do_not_meet(kind):
    model, (z, t, r) = small(kind, classes=3, cond_channels=1), call()
    label, cond = torch.tensor([2, 0, 1]), torch.randn_like(z)
    out = model(z, t, r, label, cond)
    for k in range(3):
        assert torch.allclose(
            out[k : k + 1], model(*(v[k : k + 1] for v in (z, t, r, label, cond))), atol=1e-10
        )


@both
def test_state_dict_round_trip(kind):
    torch.manual_seed(1)
    a, b, (z, t, r) = loud(NETS[kind](classes=3)), NETS[kind](classes=3), call(dtype=torch.float32)
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(a(z, t, r, torch.arange(3)), b(z, t, r, torch.arange(3)))


# derivatives and transforms -----------------------------------------------------------------------


@both
@pytest.mark.parametrize('which', ['z', 't', 'r', 'all'])
def test_jvp_is_the_difference_quotient(kind, which):
    model, (z, t, r), h = small(kind, classes=3, cond_channels=1), call(), 1e-6
    cond, label = torch.randn_like(z), torch.arange(3)
    f = lambda z, t, r: model(z, t, r, label, cond)
    along = (
        torch.randn_like(z) * (which in ('z', 'all')),
        torch.ones_like(t) * (which in ('t', 'all')),
        torch.ones_like(r) * (which == 'r'),
    )
    d = jvp(f, (z, t, r), along)[1]
    up, down = (f(*(a + s * h * v for a, v in zip((z, t, r), along))) for s in (1, -1))
    assert d.abs().max() > 1e-3 and (d - (up - down) / (2 * h)).abs().max() < 1e-5 * d.abs().max()


@both
def test_loss_of_a_jvp_reaches_the_weights(kind):
    model, (z, t, r) = small(kind), call()
    out, d = jvp(
        lambda *a: model(*a),
        (z, t, r),
        (torch.randn_like(z), torch.ones_like(t), torch.zeros_like(r)),
    )
    (out - (z + d).detach()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@both
def test_vmap_and_functional_call(kind):
    model, (z, t, r) = small(kind), call()
    out = vmap(lambda z, t, r: model(z[None], t[None], r[None])[0])(z, t, r)
    assert torch.allclose(out, model(z, t, r), atol=1e-10)
    weights = {k: torch.stack([p, 1.1 * p]) for k, p in model.named_parameters()}
    two = vmap(lambda w: functional_call(model, w, (z, t, r)))(weights)
    assert torch.allclose(two[0], model(z, t, r), atol=1e-10) and not torch.allclose(two[0], two[1])


@both
def test_checks_work_inside_jvp(kind):
    model, (z, t, r) = small(kind), call()
    with pytest.raises(ValueError, match='r exceeds t'):
        jvp(lambda z: model(z, r, t), (z,), (z,))


@both
def test_compiles_in_one_graph(kind):
    model, (z, t, r) = small(kind, classes=3), call()
    quick = torch.compile(model, backend='eager', fullgraph=True)
    assert torch.allclose(
        quick(z, t, r, torch.arange(3)), model(z, t, r, torch.arange(3)), atol=1e-12
    )


def test_fused_attention_agrees_and_has_no_forward_derivative():
    a, (z, t, r) = small(), call()
    with pytest.warns(UserWarning, match='need a network made with fused=False'):
        b = NETS['dit'](fused=True).double()
    b.load_state_dict(a.state_dict())
    assert torch.allclose(a(z, t, r), b(z, t, r), atol=1e-10)
    with pytest.raises(NotImplementedError):
        jvp(lambda z: b(z, t, r), (z,), (z,))


@both
@pytest.mark.parametrize('device', DEVICES)
def test_bfloat16_autocast(kind, device):
    model, (z, t, r) = small(kind).float().to(device), (v.float().to(device) for v in call())
    want = model(z, t, r)
    with torch.autocast(device, torch.bfloat16):
        out = model(z, t, r)
        val, d = jvp(lambda *a: model(*a), (z, t, r), (z, torch.ones_like(t), torch.zeros_like(r)))
        out.float().square().mean().backward()
    assert (
        out.dtype == torch.bfloat16
        and 0 < (out.float() - want).abs().max() < 0.1 * want.abs().max()
    )
    assert (
        d.isfinite().all()
        and torch.allclose(val.float(), out.float(), atol=0.05)
        and all(p.grad.isfinite().all() for p in model.parameters())
    )


@both
def test_bfloat16_autocast_has_the_derivative(kind):
    model, (z, t, r) = small(kind), call()
    v = torch.randn_like(z)
    want = jvp(lambda z: model(z, t, r), (z,), (v,))[1].float()
    model = model.float()
    with torch.autocast('cpu', torch.bfloat16):
        d = jvp(lambda z: model(z, t.float(), r.float()), (z.float(),), (v.float(),))[1].float()
    assert (d - want).norm() < 0.1 * want.norm()


@both
def test_a_network_of_16_bits(kind):
    model, (z, t, r) = small(kind).bfloat16(), call()
    out, d = jvp(lambda z: model(z, t.float(), r.float()), (z.bfloat16(),), (z.bfloat16(),))
    assert out.dtype == torch.bfloat16 == d.dtype and out.isfinite().all()


@both
@pytest.mark.parametrize('device', DEVICES)
def test_devices(kind, device):
    model, (z, t, r) = small(kind, classes=3).to(device), (v.to(device) for v in call())
    label = model.drop_labels(torch.arange(3, device=device), torch.Generator().manual_seed(0))
    assert model(z, t, r, label).device.type == label.device.type == device


# sizes --------------------------------------------------------------------------------------------


def test_tiny_stays_tiny():
    biggest = DiT.tiny(patch=2, cond_channels=1, classes=10)
    assert (
        0.6e6
        < count_params(DiT.tiny())
        < count_params(DiT.tiny(cond_channels=1, classes=10))
        <= 0.65e6
        and count_params(biggest) <= 0.65e6
    )
    assert (
        0.4e6
        < count_params(FlowUNet())
        < count_params(FlowUNet(cond_channels=1, classes=10))
        < 0.6e6
    )


@pytest.mark.parametrize(
    'name, dim, depth, params, macs',
    [('S', 384, 12, 33e6, 6.06e9), ('B', 768, 12, 130e6, 23.01e9), ('L', 1024, 24, 458e6, 80.71e9)],
)
def test_sizes_of_the_paper(name, dim, depth, params, macs):
    with torch.device('meta'):
        model = getattr(DiT, name)()
        count = count_macs(model, torch.empty(1, 4, 32, 32), torch.empty(1))
    assert abs(count / macs - 1) < 0.005 and abs(count_params(model) / params - 1) < 0.02
    block = (
        4 * dim * dim
        + 4 * dim
        + 8 * dim * dim
        + 5 * dim
        + 6 * dim * dim
        + 6 * dim
        + 2 * dim // model.blocks[0].attn.heads
    )
    rest = (
        2 * (256 * dim + dim + dim * dim + dim)
        + 1001 * dim
        + (16 * dim + dim)
        + 2 * dim * dim
        + 2 * dim
        + 16 * dim
        + 16
    )
    assert count_params(model) == depth * block + rest


def test_macs_of_tiny_by_hand():
    n, d = 64, 72
    block = n * d * d * 12 + 2 * n * n * d + 6 * d * d
    want = 6 * block + 2 * (256 * d + d * d) + 2 * 16 * d * n + 2 * d * d
    assert count_macs(DiT.tiny(), torch.randn(1, 1, 32, 32), torch.rand(1)) == want


def test_any_size():
    z, t = torch.randn(1, 1, 13, 7), torch.tensor([0.5])
    assert loud(FlowUNet(base=8, waves=8))(z, t).shape == z.shape and loud(NETS['dit']())(
        torch.randn(1, 1, 4, 20), t
    ).shape == (1, 1, 4, 20)


# bad input ----------------------------------------------------------------------------------------


def good(**more):
    return {**dict(zip(('z', 't', 'r'), call(dtype=torch.float32))), **more}


@both
@pytest.mark.parametrize(
    'error, match, change',
    [
        (ValueError, r't holds 0.8 to 1.4', dict(t=torch.tensor([0.8, 0.9, 1.4]))),
        (ValueError, r't holds -0.1', dict(t=torch.tensor([-0.1, 0.9, 1.0]))),
        (ValueError, 't holds nan', dict(t=torch.tensor([math.nan, 0.9, 1.0]))),
        (ValueError, 'r holds -0.2', dict(r=torch.tensor([-0.2, 0.1, 0.1]))),
        (ValueError, 'r exceeds t by 0.2', dict(r=torch.tensor([0.5, 0.1, 0.1]))),
        (TypeError, 't is torch.int64', dict(t=torch.ones(3).long())),
        (TypeError, 't is float', dict(t=0.5)),
        (TypeError, 'r is float', dict(r=0.1)),
        (ValueError, r't has shape \(2,\)', dict(t=torch.rand(2))),
        (ValueError, r'r has shape \(3, 1\)', dict(r=torch.zeros(3, 1))),
        (
            ValueError,
            'label holds -1 to 2; expected 0 to 3, or 4',
            dict(label=torch.tensor([-1, 0, 2])),
        ),
        (ValueError, 'label holds 0 to 5', dict(label=torch.tensor([5, 0, 2]))),
        (TypeError, 'label is torch.float32', dict(label=torch.ones(3))),
        (TypeError, 'label is int', dict(label=3)),
        (ValueError, r'label has shape \(1,\)', dict(label=torch.tensor([3]))),
        (ValueError, 'z has 2 channels; expected channels=1', dict(z=torch.randn(3, 2, 16, 16))),
        (ValueError, r'z has shape \(1, 16, 16\)', dict(z=torch.randn(1, 16, 16))),
        (ValueError, 'none of them 0', dict(z=torch.randn(3, 1, 0, 16))),
        (ValueError, 'NaN', dict(z=torch.full((3, 1, 16, 16), math.nan))),
        (TypeError, 'z is torch.uint8', dict(z=torch.zeros(3, 1, 16, 16, dtype=torch.uint8))),
        (TypeError, 'z is list', dict(z=[1.0])),
        (TypeError, 'the network is torch.float32', dict(z=torch.randn(3, 1, 16, 16).double())),
        (ValueError, 'cond is given; expected None', dict(cond=torch.randn(3, 1, 16, 16))),
    ],
)
def test_bad_calls(kind, error, match, change):
    with pytest.raises(error, match=match):
        NETS[kind](classes=4)(**good(**change))


@both
def test_bad_condition_and_label_without_classes(kind):
    model = NETS[kind](cond_channels=2)
    with pytest.raises(ValueError, match='cond is None'):
        model(**good())
    with pytest.raises(ValueError, match='cond has 1 channels; expected cond_channels=2'):
        model(**good(cond=torch.randn(3, 1, 16, 16)))
    with pytest.raises(ValueError, match='the same b, h and w'):
        model(**good(cond=torch.randn(3, 2, 8, 16)))
    with pytest.raises(ValueError, match='the same b, h and w'):
        model(**good(cond=torch.randn(2, 2, 16, 16)))
    with pytest.raises(ValueError, match='made without classes'):
        NETS[kind]()(**good(label=torch.zeros(3).long()))


@pytest.mark.parametrize(
    'match, make',
    [
        ('pad it to 20 x 16', lambda: NETS['dit']()(**good(z=torch.randn(3, 1, 17, 16)))),
        ('img_size is 18 x 18', lambda: DiT(18, 4, 16, 1, 2)),
        ('expected a multiple of 4', lambda: DiT(16, 4, 18, 1, 2)),
        ('heads', lambda: DiT(16, 4, 16, 1, 3)),
        ('depth is 0', lambda: DiT(16, 4, 16, 0, 2)),
        ('norm is', lambda: DiT(16, 4, 16, 1, 2, norm='batch')),
        ('norm is', lambda: NormedAttention(16, 2, norm='batch')),
        ('label_drop is 1.5', lambda: DiT.tiny(classes=3, label_drop=1.5)),
        ('channels is 0', lambda: DiT.tiny(channels=0)),
        ('classes is 0', lambda: DiT.tiny(classes=0)),
        ('classes is -2', lambda: FlowUNet(classes=-2)),
        ('cond_channels is -1', lambda: FlowUNet(cond_channels=-1)),
        ('waves is 7', lambda: FourierTime(8, 7)),
        ('expected an even number', lambda: FlowUNet(base=7)),
    ],
)
def test_bad_networks(match, make):
    with pytest.raises(ValueError, match=match):
        make()


# states and numbers of NumPy ----------------------------------------------------------------------


@pytest.mark.parametrize(
    'one, other, says',
    [
        (dict(time_scale=30.0), dict(), 'time.scale=30.0, but it is 10.0 here'),
        (dict(heads=4, qk_norm=False), dict(qk_norm=False), 'heads=4, but it is 2 here'),
        (
            dict(norm='layer', qk_norm=False),
            dict(qk_norm=False),
            "norm='layer', but it is 'rms' here",
        ),
        (dict(patch=4, channels=1), dict(patch=2, channels=4), 'patch=4, but it is 2 here'),
    ],
)
def test_the_state_of_another_function_is_refused(one, other, says, tmp_path):
    make = lambda **kw: DiT(**{**dict(img_size=16, patch=4, dim=16, depth=1, heads=2), **kw})
    a, b, same = loud(make(**one)), make(**other), make(**one)
    for state in (a.state_dict(), saved(a, tmp_path / 'w.pt')):
        with pytest.raises(RuntimeError, match=says):
            b.load_state_dict(state)
        same.load_state_dict(state)
    z, t = torch.randn(2, a.channels, 16, 16), torch.tensor([0.3, 0.7])
    assert torch.equal(same(z, t), a(z, t)) and a(z, t).abs().max() > 1e-3


def test_what_does_not_change_the_function_is_no_obstacle(tmp_path):
    a, b = (
        loud(DiT(16, 4, 16, 1, 2)),
        DiT(32, 4, 16, 1, 2, fused=True, label_drop=0.5),
    )  # positions follow from a formula
    b.load_state_dict(saved(a, tmp_path / 'w.pt'))
    z, t = torch.randn(2, 1, 16, 16), torch.tensor([0.3, 0.7])
    assert torch.allclose(b(z, t), a(z, t), atol=1e-5)
    u, v = (
        loud(FlowUNet(base=8, mults=(1, 2), waves=8, scale=0.3)),
        FlowUNet(base=8, mults=(1, 2), waves=8),
    )
    v.load_state_dict(saved(u, tmp_path / 'w.pt'))  # its frequencies are in the state
    assert torch.equal(u(z, t), v(z, t)) and torch.equal(u.time.w, v.time.w)


def test_numbers_of_numpy():
    i, made = np.int64, []
    for model in (
        lambda: DiT(
            i(16),
            i(4),
            i(16),
            i(2),
            i(2),
            i(2),
            np.float32(2.0),
            i(3),
            np.float64(0.25),
            i(1),
            time_scale=np.float32(30),
        ),
        lambda: DiT(16, 4, 16, 2, 2, 2, 2.0, 3, 0.25, 1, time_scale=30.0),
    ):
        torch.manual_seed(1)
        made.append(loud(model()))
    z, t, c = torch.randn(2, 2, 16, 16), torch.tensor([0.3, 0.7]), torch.randn(2, 1, 16, 16)
    assert (
        torch.equal(*(m(z, t, cond=c) for m in made))
        and type(made[0].patch) is type(made[0].blocks[0].attn.heads) is int
    )
    made = []
    for model in (
        lambda: FlowUNet(
            i(1), i(8), np.array([1, 2]), i(1), i(3), np.float32(0.5), i(1), i(8), np.float32(0.5)
        ),
        lambda: FlowUNet(1, 8, (1, 2), 1, 3, 0.5, 1, 8, 0.5),
    ):
        torch.manual_seed(1)
        made.append(loud(model()))
    assert torch.equal(*(m(z[:, :1], t, cond=c) for m in made))


@pytest.mark.parametrize(
    'make, error, says',
    [
        (lambda: DiT(16, 4, 16.0, 1, 2), ValueError, 'dim is 16.0'),
        (lambda: DiT(16, 4, 16, 1.5, 2), ValueError, 'depth is 1.5'),
        (lambda: DiT(16, 4, 16, 1, 2.0), ValueError, 'heads is 2.0'),
        (lambda: DiT(16, 4, 16, 1, 0), ValueError, 'heads is 0'),
        (lambda: DiT(16, 4, 16, 1, -2), ValueError, 'heads is -2'),
        (lambda: DiT(16, 4, 16, 1, 2, mlp=math.nan), ValueError, 'mlp is nan'),
        (lambda: DiT(16, 4, 16, 1, 2, mlp=0.01), ValueError, 'at least 1 wide'),
        (lambda: DiT(16, 4, 16, 1, 2, time_scale=math.nan), ValueError, 'time_scale is nan'),
        (lambda: DiT(16, 4, 16, 1, 2, time_scale=0), ValueError, 'time_scale is 0'),
        (
            lambda: DiT(16, 4, 16, 1, 2, classes=3, label_drop=math.nan),
            ValueError,
            'label_drop is nan',
        ),
        (
            lambda: DiT(16, 4, 16, 1, 2, classes=3, label_drop=True),
            ValueError,
            'label_drop is True',
        ),
        (lambda: DiT(16, 4, 16, 1, 2, classes=2.5), ValueError, 'classes is 2.5'),
        (lambda: SineTime(8, 8, -1.0), ValueError, 'scale is -1'),
        (lambda: FourierTime(8, 8, math.nan), ValueError, 'scale is nan'),
        (lambda: FinalLayer(8, 4, 'batch'), ValueError, 'norm is'),
        (lambda: DiT('16', 4, 16, 1, 2), TypeError, 'img_size'),
        (lambda: DiT(16, 4, '16', 1, 2), TypeError, "dim is '16'"),
        (lambda: FlowUNet(base=8.0), ValueError, 'base is 8.0'),
    ],
)
def test_what_does_not_fit_is_named(make, error, says):
    with pytest.raises(error, match=says):
        make()


# what lesson 20 needs -----------------------------------------------------------------------------


def test_default_times_have_a_tame_derivative():
    "With the sines of 1000 t, once the default, a derivative in t is a hundred times as large."

    def size(**kw):
        torch.manual_seed(0)
        net, (z, t, r) = loud(NETS['dit'](**kw)).double(), call()
        return jvp(lambda t: net(z, t, r), (t,), (torch.ones_like(t),))[1].square().mean().sqrt()

    assert DiT(16, 4, 16, 1, 2).time.scale == 10
    assert 0 < size() < 0.1 * size(time_scale=1000.0)


def test_only_fused_attention_warns(recwarn):
    DiT(16, 4, 16, 1, 2)
    assert not [w for w in recwarn if 'fused' in str(w.message)]
    with pytest.warns(UserWarning, match='fused=True.*no forward derivative.*fused=False'):
        DiT(16, 4, 16, 1, 2, fused=True)
