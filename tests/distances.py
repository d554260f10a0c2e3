"What the tests of perceptual distances share: images, gradients, a trunk whose features are known."

from functools import lru_cache

import torch
import torch.nn.functional as F
from common import gen
from torch import nn

from restore_lib.trunks import FeatureDistance, lpips


def pair(b=2, c=3, hw=(64, 48), s=0.1):
    "Two batches of images in [0, 1], smooth with some grain."
    x = (
        F.interpolate(torch.rand(b, c, 6, 6, generator=gen(1)), size=hw, mode='bilinear')
        + 0.1 * torch.rand(b, c, *hw, generator=gen(2))
    ).clamp(0, 1)
    return (x + s * torch.randn(x.shape, generator=gen(3))).clamp(0, 1), x


def both(fn, a, x):
    "Values, and the gradient of a weighted sum of them in a."
    a = a.clone().requires_grad_()
    v = fn(a, x)
    (v * torch.arange(1.0, len(v) + 1)).sum().backward()
    return v.detach(), a.grad


@lru_cache
def ours(net='alex', **kw):
    "The distance of LPIPS on random weights."
    return lpips(net, 'random', **kw)


class Sum(nn.Module):
    "A trunk whose features are known: the image and its square."

    def forward(self, x):
        return [x, x[..., ::2, ::2] ** 2]


def plain(**kw):
    return FeatureDistance(Sum(), 'sum', ([0.0], [1.0]), **(dict(channels=1) | kw))
