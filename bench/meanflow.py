"""One MeanFlow training step (loss, backward) with a forward-mode derivative against the
double-backward form that the first public PyTorch code used. Training draws half of the times with
r = t, which need no derivative; ours leaves them out, the peer, as that code did, does not.
The second row of each network has no such times. One thread."""

import copy

import torch
from harness import compare
from restore_lib.dit import DiT
from restore_lib.dit_parts import FlowUNet
from restore_lib.flow_parts import Folded, draw_times
from restore_lib.meanflow import MeanFlow
from restore_lib.metrics import count_params, human, peak_memory


def step(flow, x, e, t, r):
    def run():
        flow.zero_grad(set_to_none=True)
        flow(x, e, t=t, r=r).mean.backward()

    return run


def stirred(net):
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


NETS = {
    'DiT.tiny, patch 4': lambda: DiT.tiny(patch=4),
    'DiT.tiny, patch 2': lambda: DiT.tiny(patch=2),
    'FlowUNet on folded pixels': lambda: Folded(FlowUNet(4, base=32, mults=(1, 2), scale=0.3)),
}


def rows():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        for name, make in NETS.items():
            n = 8 if 'patch 2' in name else 32
            net, x, e = stirred(make()), torch.rand(n, 1, 32, 32), torch.randn(n, 1, 32, 32)
            for equal in (0.5, 0.0):
                times = draw_times(n, equal)
                ours, peer = (
                    step(MeanFlow(copy.deepcopy(net), way=way), x, e, *times)
                    for way in ('jvp', 'double')
                )
                memory = [human(peak_memory(f)) + 'B' for f in (ours, peer)]
                yield compare(
                    f'MeanFlow step, {name}, batch {n} of 32 x 32, r = t in {equal:.0%}',
                    ours,
                    'double backward',
                    peer,
                    9,
                    f'{human(count_params(net))} parameters; peak {memory[0]} and {memory[1]}',
                )
    finally:
        torch.set_num_threads(threads)
