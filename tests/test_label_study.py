"The study of lesson 07: rates inside their grid, rows that are kept, a run that goes on."

import json

import pytest
import torch

from restore_lib import label_study as study


def test_the_best_rate_lies_inside_its_grid():
    tried = []

    def accuracy(rate):
        tried.append(rate)
        return -abs(rate - 30)

    found = study.best_rate(accuracy, (0.1, 0.3, 1))
    best = max(found, key=found.get)
    assert list(found) == sorted(found) and min(found) < best < max(found) and best == 32
    assert len(tried) == len(set(tried)) == 7
    assert len(study.best_rate(lambda r: r, (1, 3), most=2)) == 4  # it may never turn


def test_answers_survive_packing():
    for n in (1, 8, 1000):
        right = (torch.rand(n) > 0.5).float()
        assert torch.equal(study.unpacked(study.packed(right), n), right)


def test_random_crops_are_parts_of_the_image():
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 28).expand(1, 28, 28)[None].repeat(200, 1, 1, 1)
    cut = study.random_crops(ramp, (0.7, 1.0))
    wide = cut[:, 0, 0, -1] - cut[:, 0, 0, 0]
    assert cut.shape == ramp.shape and 0 <= cut.min() and cut.max() <= 1
    assert 0.6 < wide.min() < 0.8 and wide.max() <= 1
    whole = study.random_crops(ramp, (1.0, 1.0))
    assert (whole[:, 0, 0].diff(dim=1) >= -1e-6).all()  # never mirrored unless asked
    mirrored = study.random_crops(ramp, flip=True)[:, 0, 0]
    assert 60 < (mirrored[:, -1] < mirrored[:, 0]).sum() < 140


def test_the_average_answers_and_the_rates_come_from_the_optimizer():
    model, seen = torch.nn.Linear(2, 2), []
    opt = torch.optim.SGD(model.parameters(), 2.0)

    def batch():
        seen.append(opt.param_groups[0]['lr'])
        return torch.eye(2), torch.tensor([0, 1])

    found = study.train_and_ask(model, batch, opt, (2, 6), lambda m: m.weight.clone(), warmup=4)
    assert list(found) == [2, 6] and seen == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert not torch.equal(found[2], found[6]) and not torch.equal(found[6], model.weight)


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A study of seconds, in a folder of its own."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setenv('RESTORE_BUDGET', 'study')
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path / 'runs'))
    labels = torch.arange(1200) % 10
    x = torch.rand(1200, 1, 14, 14) * 0.5 + labels[:, None, None, None] / 20
    pics = study.Pictures(x, labels, x[:50], labels[:50], x[:60], labels[:60], 7, 0.6, False, False)
    monkeypatch.setattr(study, 'SOURCES', {'toy': lambda: pics})
    monkeypatch.setattr(study, 'POINTS', (2, 3))
    monkeypatch.setattr(study, 'KEPT', (3,))
    monkeypatch.setattr(study, 'SIZES', dict(dim=16, depth=1))
    monkeypatch.setattr(study, 'best_rate', lambda accuracy, rates: {rates[0]: 0.2, rates[1]: 0.3})
    made = study.pretrained_on
    monkeypatch.setattr(study, 'pretrained_on', lambda *a: made(*a, steps=1))
    for name in ('labelled_curve', 'probe_curve'):
        f = getattr(study, name)
        short = {name: f}  # the points of the defaults were bound when the module was read
        monkeypatch.setattr(
            study, name, lambda *a, f=short[name], **kw: f(*a, **{'points': (2, 3), **kw})
        )
    return tmp_path / 'data/studies/07_transfer.jsonl'


def test_a_study_that_was_stopped_runs_what_is_missing(small):
    study.label_study(('toy',), (0,))
    rows = [json.loads(line) for line in small.read_text().splitlines()]
    cells = study.cells(('toy',), (0,))
    assert len([r for r in rows if 'what' not in r['config']]) == len(cells)
    assert not study.missing_cells(('toy',), (0,))
    row = study.row_of('toy', 'fine-tuned', 20, 0)
    assert row['blr'] == study.FIRST['fine-tuned'][1] and row['images'] == 60
    assert row['3'] == pytest.approx(study.unpacked(row['right 3'], 60).mean().item())
    lines = small.read_text().splitlines()
    small.write_text('\n'.join(lines[:-1]) + '\n')
    assert len(study.missing_cells(('toy',), (0,))) == 1
    study.label_study(('toy',), (0,))
    again = [json.loads(line) for line in small.read_text().splitlines()]
    assert again[-1]['figures'] == rows[-1]['figures'] and again[:-1] == rows[:-1]


def test_the_committed_rows_are_cells_of_the_grid():
    known = {(c[0], c[2], c[3], c[1]) for c in study.cells()}
    for row in study.studies('07_transfer'):
        if 'what' not in row['config']:
            c = row['config']
            assert (c['source'], c['way'], c['per_class'], row['seed']) in known
