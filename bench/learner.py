"One training step of the small CNN in the Learner against the same step written out."

import torch
import torch.nn.functional as F
from harness import compare
from restore_lib.learner import Learner, ResidualCNN


def rows():
    torch.manual_seed(0)
    x = torch.rand(64, 1, 40, 40)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 16, shuffle=True)

    def loss_fn(model, batch):
        return F.mse_loss(model(batch[0] + 0.1 * torch.randn_like(batch[0])), batch[0])

    learn = Learner(ResidualCNN(), loss_fn, data, cpu=True)
    learn.steps, learn.step = 10_000, 0
    batches = iter(learn.train)

    model = ResidualCNN()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def forever():
        while True:
            yield from data

    plain = forever()

    def bare():
        opt.zero_grad()
        loss_fn(model, next(plain)).backward()
        opt.step()

    yield compare(
        'training step, 16 crops of 40x40',
        lambda: learn.one_step(batches),
        'bare PyTorch loop',
        bare,
        repeats=101,
        note='at least 0.97 asked',
    )
