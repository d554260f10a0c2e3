"What several test files use: random numbers, comparisons, devices, the words that start processes."

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DEVICES = [
    'cpu',
    pytest.param(
        'cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
    ),
]


def launcher(processes):
    "What stands between the interpreter and a script that accelerate starts so many times."
    # --multi_gpu is accelerate's word for several processes;
    # without it, --num_processes 2 on CPU starts a single one
    words = '-m accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no'
    words += f' --dynamo_backend no --main_process_port 0 --num_processes {processes}'
    return words.split()


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def shake(model, by=0.2):
    "Every parameter random, biases and norms too, so that a wrong one cannot hide."
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * by)
    return model


def loud(model, scale=0.1):
    "No parameter at zero, so that nothing hides behind a zero start."
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
    return model


def held(module):
    "A copy of the state."
    return {k: v.clone() for k, v in module.state_dict().items()}


def saved(model, path):
    "The state as a file gives it back."
    torch.save(model.state_dict(), path)
    return torch.load(path, weights_only=True)


def same(a, b):
    "Two states with the same names and exactly the same numbers."
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def close(a, b, tol=1e-5):
    return torch.allclose(a, b, rtol=tol, atol=tol)
