"The trainings of lesson 09: fair starts, the reader, the rule, rows that are kept and found again."

import json

import numpy as np
import pytest
import torch

from restore_lib import dmae_study as S
from restore_lib.dmae import denoise
from restore_lib.label_study import packed
from restore_lib.tables import Report

pytestmark = pytest.mark.usefixtures('seed')


def found(difference, low, high):
    return Report('', '', [], difference=difference, interval=(low, high))


def test_networks_of_one_seed_start_alike_and_leave_the_caller_alone():
    state = torch.get_rng_state()
    a, b, c = S.started(1), S.started(1), S.started(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.decoder_pred.weight, c.decoder_pred.weight)


@pytest.mark.parametrize('n, d', [(40, 12), (12, 40)])
def test_the_reader_is_ridge_regression(n, d):
    f, g, labels = torch.randn(n, d), torch.randn(7, d), torch.arange(n) % 10
    mean, std = f.mean(0), f.std(0)
    z = ((f - mean) / std).double().numpy()
    target = np.eye(10)[labels] - 0.1
    for weight, reader in zip((0.5, 20.0), S.ridge_reader(f, labels, (0.5, 20.0))):
        w = np.linalg.solve(z.T @ z + weight * np.eye(d), z.T @ target)
        assert np.allclose(reader(g), ((g - mean) / std).double().numpy() @ w, atol=1e-5)


def test_features_that_are_nan_are_not_read_as_class_0():
    with pytest.raises(ValueError, match='NaN'):
        S.read_digits(lambda x: x.flatten(1) * torch.nan, 0.25, n=40)


def test_what_a_reader_is_asked_does_not_depend_on_the_caller():
    def flat(x):
        return x.flatten(1)

    a = S.read_digits(flat, 0.25, n=40)
    torch.rand(3)
    assert torch.equal(a, S.read_digits(flat, 0.25, n=40)) and a.shape == (40,)


def test_removed_patches_alone_are_judged(monkeypatch):
    x = S.asked_digits(4)
    monkeypatch.setattr(S, 'asked_digits', lambda n=None: x)
    model = S.started()
    pred, mask = model.draw(S.gaussian(x, 0.25, S.seeded(1)), 0.75, S.seeded(2))
    gone = S.mask_pixels(mask, 7, (28, 28)) > 0
    error = (model.pixels(pred).clamp(0, 1) - x).square()
    by_hand = torch.stack([-10 * e[m].mean().log10() for e, m in zip(error, gone)])
    assert torch.allclose(S.removed_psnr(model), by_hand, atol=1e-4)


@pytest.mark.parametrize(
    'numbers, metric, verdict',
    [
        ((0.6, 0.1, 1.1), 'dB 0.25', 'helps'),
        ((0.5, 0.1, 0.9), 'dB removed', 'helps'),
        ((0.4, 0.1, 0.7), 'dB 0.25', 'too little'),
        ((0.9, -0.1, 1.9), 'dB 0.25', 'not told apart'),
        ((-0.6, -1.0, -0.2), 'dB 0.25', 'hurts'),
        ((-0.6, -1.3, 0.1), 'dB 0.25', 'not told apart'),
        ((0.03, 0.01, 0.05), 'right 0.25', 'helps'),
        ((0.01, 0.005, 0.015), 'right', 'too little'),
    ],
)
def test_the_rule(numbers, metric, verdict):
    assert S.ruled(found(*numbers), metric) == verdict


def test_rows_are_made_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('RESTORE_BUDGET', 'study')
    monkeypatch.delenv('IN_TEST', raising=False)
    made = []
    monkeypatch.setattr(S, 'trained', lambda run, seed: (made.append((run['sigma'], seed)), 0.1))
    row = {'dB 0.25': [20.0, 21.0], 'right 0.25': packed(torch.arange(1000) % 2)}
    monkeypatch.setattr(S, 'judged', lambda model: row)
    runs = [S.run_of(0.25, 0.75), S.run_of(0.5, 0.75, then=0.0)]
    with pytest.raises(LookupError, match='no row of'):
        S.each_of(runs[0], 'dB 0.25')
    for _ in range(2):
        S.dmae_study((0, 1), runs)
    assert made == [(0.25, 0), (0.5, 0), (0.25, 1), (0.5, 1)]
    lines = (tmp_path / 'data/studies/09_dmae.jsonl').read_text().splitlines()
    assert [json.loads(line)['seed'] for line in lines] == [0, 0, 1, 1]
    assert S.each_of(runs, 'dB 0.25', (0, 1)).tolist() == [[20, 21], [20, 21]]
    assert S.each_of(runs[0], 'right 0.25', (1,)).tolist() == [[k % 2 for k in range(1000)]]


def test_every_run_of_the_lesson_is_known_by_another_name():
    runs = [*S.FOUR.values(), *S.THEN.values(), *S.GRID.values()]
    names = {json.dumps(run, sort_keys=True) for run in runs}
    assert len(names) == len(runs) - 2          # the noisy one with all counted is in all three


@pytest.mark.parametrize('removed', [0.0, 0.5])
def test_what_is_seen_is_grey_where_it_is_hidden(removed):
    model, x = S.started(), S.asked_digits(3)
    seen, drawing = S.seen_and_drawn(model, x, 0.25, removed, 4)
    y = S.gaussian(x, 0.25, S.seeded(4))
    _, mask = model.draw(y, removed, S.seeded(4))
    gone = S.mask_pixels(mask, 7, (28, 28)) > 0
    assert (seen[gone] == 0.5).all() and torch.equal(seen[~gone], y.clamp(0, 1)[~gone])
    assert torch.equal(drawing, denoise(model, y, removed, S.seeded(4)).clamp(0, 1))


def test_any_share_of_holes_has_a_loss():
    model, x = S.started(), S.asked_digits(4)
    losses = [S.any_ratio_loss(model, x) for _ in range(6)]
    assert all(torch.isfinite(loss) for loss in losses)
