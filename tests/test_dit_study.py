"What lesson 19's study measures: the best linear guess, errors, variety, guided generation."

import pytest
import torch

from restore_lib.dit import DiT, generate_images, generating, guided_guess, noised
from restore_lib.dit_study import (
    DIT_NETS,
    DIT_PLAN,
    ERROR_TIMES,
    LinearGuess,
    as_guess,
    dit_config,
    errors_by_t,
    guess_loss,
    rise,
    ten_each,
    variety,
    velocity_loss,
)
from restore_lib.metrics import count_params
from restore_lib.model_files import load_model, save_model

torch.set_num_threads(1)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def stirred(**knobs):
    torch.manual_seed(0)
    net = DiT(8, 4, 16, 2, 2, **knobs)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.eval()


def test_noised_ends_at_image_and_noise():
    x, e = torch.rand(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    z = noised(x, e, torch.tensor([0.0, 1.0]))
    assert torch.equal(z[0], x[0]) and torch.equal(z[1], e[1])


def test_linear_guess_is_the_posterior_mean_of_normal_data():
    mix = torch.randn(4, 4, generator=gen(1))
    x = (torch.randn(20_000, 4, generator=gen(2)) @ mix.T + 0.5).reshape(-1, 1, 2, 2)
    guess, t = LinearGuess(x), torch.full((3,), 0.3)
    z = torch.randn(3, 1, 2, 2, generator=gen(3))
    mean, cov = x.flatten(1).mean(0), x.flatten(1).T.cov(correction=0)
    gain = 0.7 * cov @ torch.linalg.inv(0.49 * cov + 0.09 * torch.eye(4))
    want = mean + (z.flatten(1) - 0.7 * mean) @ gain.T
    assert torch.allclose(guess(z, t).flatten(1), want, atol=1e-3)


def test_linear_guess_at_the_ends():
    x, label = torch.randn(60, 1, 4, 4, generator=gen()), torch.arange(60) % 3
    guess, z = LinearGuess(x, label), torch.randn(3, 1, 4, 4, generator=gen(1))
    at = torch.arange(3)
    means = torch.stack([x[label == k].mean(0) for k in range(3)])
    assert torch.allclose(guess(z, torch.ones(3), at), means, atol=1e-5)
    assert torch.allclose(guess(z, torch.full((3,), 1e-4), at), z, atol=1e-2)


def test_errors_by_t_of_a_guess_that_knows():
    x = torch.rand(5, 1, 8, 8, generator=gen())
    right = errors_by_t(lambda z, t, label=None: 2 * x - 1, x)
    assert right.shape == (len(ERROR_TIMES), 5) and not right.any()
    off = errors_by_t(lambda z, t, label=None: 2 * x - 0.8, x)
    assert torch.allclose(off, torch.full_like(off, 0.01), atol=1e-6)


def test_variety():
    x, label = torch.rand(400, 1, 4, 4, generator=gen()), ten_each(400)
    assert abs(variety(x, label, x, label) - 1) < 1e-6
    assert abs(variety(x / 2, label, x, label) - 0.25) < 1e-6
    same = torch.rand(10, 1, 4, 4)[label]
    assert variety(same, label, x, label) < 1e-6


def test_guidance_goes_further_in_the_same_direction():
    net, z = stirred(classes=3), torch.randn(2, 1, 8, 8, generator=gen())
    t, label = torch.tensor([0.4, 0.8]), torch.tensor([0, 2])
    told, untold = net(z, t, label=label), net(z, t)
    assert torch.equal(guided_guess(net, z, t, label), told)
    assert torch.allclose(guided_guess(net, z, t, label, 0.0), untold)
    assert torch.allclose(guided_guess(net, z, t, label, 3.0), 3 * told - 2 * untold, atol=1e-5)


def test_a_step_is_one_along_the_velocity():
    net, e = stirred(classes=3), torch.randn(2, 1, 8, 8, generator=gen())
    label = torch.tensor([0, 2])
    with torch.no_grad():
        rows = list(generating(net, e, label, 2.0, 4))
    assert [round(t, 2) for t, _, _ in rows] == [1.0, 0.75, 0.5, 0.25]
    for (t, z, x_hat), (s, after, _) in zip(rows, rows[1:]):
        velocity = (z - x_hat) / t
        assert torch.allclose(after, z - (t - s) * velocity, atol=1e-5)


def test_generate_images():
    net, label = stirred(classes=3), torch.tensor([0, 1, 2, 0])
    a, b = (generate_images(net, label, 2.0, 3, seed=s, shape=(1, 8, 8)) for s in (0, 0))
    assert torch.equal(a, b) and a.shape == (4, 1, 8, 8) and 0 <= a.min() and a.max() <= 1
    assert not torch.equal(a, generate_images(net, label, 2.0, 3, seed=1, shape=(1, 8, 8)))
    with pytest.raises(ValueError, match='steps is 0'):
        generate_images(net, label, 2.0, 0, shape=(1, 8, 8))
    with pytest.raises(ValueError, match='guidance is nan'):
        generate_images(net, label, float('nan'), shape=(1, 8, 8))


def test_losses_are_zero_for_the_one_who_knows():
    x, label = torch.rand(4, 1, 8, 8, generator=gen()), torch.arange(4) % 3

    class Knows(torch.nn.Module):
        def drop_labels(self, label):
            return label

        def forward(self, z, t, label=None):
            return 2 * x - 1

    assert guess_loss(Knows(), (x, label)) == 0
    assert velocity_loss(stirred(classes=3), (x, label)).isfinite()


def test_a_velocity_as_a_guess():
    net, z, t = stirred(), torch.randn(2, 1, 8, 8), torch.tensor([0.5, 1.0])
    assert torch.allclose(as_guess(net)(z, t), z - t[:, None, None, None] * net(z, t))


def test_equal_parameters_and_the_plan():
    sizes = {k: count_params(make(classes=10)) for k, make in DIT_NETS.items()}
    assert max(sizes.values()) < 1.06 * min(sizes.values()) and max(sizes.values()) <= 0.65e6
    assert {name for name, *_ in DIT_PLAN} == set(DIT_NETS)
    assert dit_config('DiT', 'glyphs', 3)['net'] == 'DiT'
    assert [rise(k, 10) for k in (299, 300, 10**6)] == [1.0, 1.0, 1.0] and rise(0, 10) < 0.01


@pytest.mark.parametrize(
    'knobs',
    [
        dict(classes=3, cond_channels=1),
        dict(norm='layer', qk_norm=False, mlp=2.0, time_scale=1000.0),
    ],
)
def test_a_dit_comes_back_from_its_file(knobs, tmp_path):
    net = stirred(**knobs)
    path = save_model(net, tmp_path / 'dit.safetensors')
    again, _ = load_model(path, 'dit.DiT')
    z, t = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.9])
    cond = torch.randn(2, 1, 8, 8) if 'cond_channels' in knobs else None
    assert again.made_of() == net.made_of()
    assert (again(z, t, cond=cond) - net(z, t, cond=cond)).abs().max() < 0.05
