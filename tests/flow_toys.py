"What the tests of lessons 20 and 21 share: small networks, formulas in their place, pairs."

import torch
from common import gen
from torch import nn

from restore_lib.dit import DiT
from restore_lib.dit_parts import FlowUNet
from restore_lib.flow_parts import Folded
from restore_lib.meanflow import FlowMatching


def close(a, b, atol=1e-5, rtol=1e-4):
    return torch.allclose(a, b, atol=atol, rtol=rtol)


def stirred(net, by=0.1, s=5):
    "The network as if it were trained: nothing of it is zero."
    g = gen(s)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(by * torch.randn(p.shape, generator=g).to(p))
    return net


def unet(**kw):
    return stirred(Folded(FlowUNet(4, **dict(base=8, mults=(1, 2), waves=16, scale=0.3) | kw)))


def dit(**kw):
    return stirred(DiT(8, 4, 16, 2, 2, **kw))


NETS = dict(unet=unet, dit=dit)


class Told(nn.Module):
    "A formula in a network's place: f(z, t, r, label, cond); remembers its calls."

    def __init__(self, f, classes=None):
        super().__init__()
        self.f, self.classes, self.scale, self.calls = f, classes, nn.Parameter(torch.ones(())), []

    def drop_labels(self, label, generator=None):
        return label

    def forward(self, z, t, r=None, label=None, cond=None):
        self.calls.append(dict(z=z, t=t, r=r, label=label, cond=cond))
        return self.scale * self.f(z, t, t if r is None else r, label, cond)


def wide(t):
    return t[:, None, None, None]


def pair(b=4, side=8, s=0, dtype=torch.float32):
    g = gen(s)
    return (2 * torch.rand(b, 1, side, side, generator=g) - 1).to(dtype), torch.randn(
        b, 1, side, side, generator=g
    ).to(dtype)


# bad input ----------------------------------------------------------------------------------------

X, E = pair()
T = torch.full((4,), 0.5)


# fused attention, times, weights, states, numbers of NumPy ----------------------------------------

PICTURES = torch.rand(2, 1, 8, 8, generator=gen(11))


FLOW = lambda **kw: FlowMatching(FlowUNet(1, base=8, mults=(1, 2), waves=8))
