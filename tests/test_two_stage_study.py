"Lesson 10's long study: its crops, what all ways see, rows that are kept and found again."

import json

import pytest
import torch

from common import held
from restore_lib import two_stage_study as S
from restore_lib.two_stage import TwoStageDMAE, two_stage_loss

pytestmark = pytest.mark.usefixtures('seed')


@pytest.fixture(autouse=True)
def no_data(monkeypatch, tmp_path):
    "Only what is embedded, and few crops."
    monkeypatch.setenv('RESTORE_DATA', str(tmp_path))
    few = S.judged_crops('valid')[:6]
    monkeypatch.setattr(S, 'training_crops', lambda: (255 * few).round().byte())


def small():
    torch.manual_seed(3)
    return S.study_network().eval()


# crops


def test_textured_squares_are_of_the_upper_quarter():
    image = torch.zeros(3, 128, 128)
    image[:, :64, 64:] = torch.rand(3, 64, 64)  # the only busy one of four squares
    assert torch.equal(S.textured(image), image[None, :, :64, 64:])
    ramp = torch.rand(3, 256, 256)
    ramp *= torch.arange(16).reshape(4, 4).repeat_interleave(64, 0).repeat_interleave(64, 1)
    best = S.textured(ramp)
    assert [round(s.max().item()) for s in best] == [15, 14, 13, 12]
    assert [round(s.max().item()) for s in S.textured(ramp, 2)] == [14, 12]
    assert len(S.textured(ramp, stride=32)) == 7 * 7 // 4


def test_a_tiny_image_gives_one_square():
    assert S.textured(torch.rand(1, 64, 64)).shape == (1, 1, 64, 64)


# what all ways see


def test_the_stream_is_the_same_for_all_and_another_for_another_seed():
    (x, y), (again, y_again) = (S.training_stream('denoise', 0, 2) for _ in range(2))
    other, _ = S.training_stream('denoise', 1, 2)
    assert x.shape == y.shape == (2 * S.STUDY_BATCH, 3, 64, 64) and x.dtype == torch.uint8
    assert torch.equal(x, again) and torch.equal(y, y_again) and not torch.equal(x, other)
    noise = y.float() - x.float() / 255
    assert abs(noise.std().item() - 25 / 255) < 2e-3


def test_each_crop_comes_in_some_pose():
    x, _ = S.training_stream('x4', 0, 1)
    pool = S.training_crops()
    poses = [p.rot90(k, (-2, -1)) for p in (pool, pool.flip(-1)) for k in range(4)]
    found = [any((pose == im).flatten(1).all(1).any() for pose in poses) for im in x]
    assert all(found)


KINDS = 'token: both', 'token: learned', 'printed: truth', 'unconditional'


@pytest.mark.parametrize('way', KINDS)
def test_behind_a_prepared_first_stage_all_is_as_without(way):
    "The loss and the gradients, but for the half precision in which batches are kept."
    first = small()
    model, _ = TwoStageDMAE.from_pretrained(first, 96, **S.SECOND_WAYS[way])
    S.stage_groups(model, 'A')
    x = S.judged_crops('valid')[:4]
    batch = S.Prepared(first, x, x + 0.1 * torch.randn_like(x))[0]
    ready = S.Behind(model, *batch[2:])
    a = two_stage_loss(model, (batch[1], batch[0]), lam=0.0)
    b = two_stage_loss(ready, (batch[1], batch[0]), lam=0.0)
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].item() == pytest.approx(b[k].item(), rel=2e-3)
    for terms in (a, b):
        sum(terms.values()).backward()
    grads = [p.grad for p in model.decoder2.parameters()]
    assert all(g is not None for g in grads)


def test_a_way_starts_where_the_first_stage_is():
    "After a step of rate 0 the second image is the first, for a network with an identity start."
    first, (x, y) = small(), (S.judged_crops('valid')[:4],) * 2
    sets = S.Prepared(first, *S.training_stream('denoise', 0, 1)), S.Prepared(first, x, y)
    _, figures = S.trained_way('token: both', first, *sets, lr=1e-12, points=(1,))
    wanted = S.dB(sets[1][0][2], x)
    assert figures['dB'] == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize('way', ['longer', 'printed: truth', 'shared decoder, end to end', 'L1'])
def test_training_changes_the_copy_only(way):
    first = small()
    before = held(first)
    train = S.Prepared(first, *S.training_stream('rain', 0, 2))
    sets = train, S.Prepared(first, *reversed(S.judged_pair('denoise', 'valid')))
    model, figures = S.trained_way(way, first, *sets, points=(1, 2))
    assert all(torch.equal(v, before[k]) for k, v in held(first).items())
    assert list(figures['curve']) == ['1', '2'] and len(figures['dB']) == 24
    assert ('oracle dB' in figures) == (way == 'printed: truth') and not model.training


# rows


@pytest.fixture
def project(monkeypatch, tmp_path):
    "A project of its own, with a study's budget and rows that cost nothing."
    (tmp_path / 'restore_lib').mkdir()
    (tmp_path / 'settings.ini').write_text('')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setenv('RESTORE_BUDGET', 'study')
    made = []

    def trained(way, first, train, judges, lr=0.0, seed=0, points=None):
        made.append((way, lr, seed))
        base = 20 + lr if lr < 2e-3 else 19
        figures = {'dB': [base, base + 1.0], 'ST-LPIPS': 0.1, 'lr': lr}
        figures['curve'] = {str(k): base + 0.5 for k in points or S.SECOND_STEPS}
        return None, figures

    monkeypatch.setattr(S, 'trained_way', trained)
    for name in ('_first_of', '_train_set', '_judges'):
        monkeypatch.setattr(S, name, lambda *a: None)
    return made


def test_a_study_goes_on_where_it_stopped(project, capsys):
    threads = torch.get_num_threads()
    try:
        S.residual_study(3)
        rows = S.studies('10_two_stage')
        ways = [r['config']['way'] for r in rows if r['config']['what'] == 'way']
        assert ways == ['unconditional', 'longer', 'token: deployed']
        rates = {r['config']['way']: r['figures'] for r in rows if r['config']['what'] == 'rates'}
        assert rates.keys() == {'second', 'longer'} and '0.0015' in rates['second']
        done = len(project)
        S.residual_study(0)
        assert len(project) == done
        S.residual_study(2)
        assert project[done:] == [('token: input', 0.0015, 0), ('token: both', 0.0015, 0)]
    finally:
        torch.set_num_threads(threads)


def test_rows_are_read_back(project):
    threads = torch.get_num_threads()
    try:
        S.residual_study(2)
    finally:
        torch.set_num_threads(threads)
    config = S.study_config('first', 'denoise', 'first')
    S.record_study('10_two_stage', config, {'dB': [19.0, 20]}, 1)
    assert S.scores_of('unconditional')[0].tolist() == pytest.approx([20.0015, 21.0015])
    assert S.scores_of('printed: none') is None and S.difference('longer', 'printed: none') is None
    report = S.difference('unconditional', 'first')
    assert report.difference == pytest.approx(1.0015, abs=1e-4)
    assert S.curves_of('unconditional')[0] == pytest.approx([1.0015] * len(S.SECOND_STEPS))
    assert S.mean_of('unconditional', 'ST-LPIPS') == pytest.approx(0.1)
    assert S.gain_text(None) == '' and S.gain_text(report).startswith('+1.00 (')
    assert json.dumps(S.rows_of()['longer'][0])


def test_every_row_is_named_once_and_can_be_built():
    rows = S.study_rows()
    assert len(set(rows)) == len(rows)
    assert set(S.AGAIN) | set(S.IN_TASKS) <= set(S.SECOND_WAYS)
    first = small()
    for way in [*S.SECOND_WAYS, *S.SECOND_KNOBS]:
        assert S.rate_kind(way) in S.STUDY_RATES
        _, _, groups, _ = S.built(way, first, 1e-3, 0)
        assert sum(p.numel() for group in groups for p in group['params']) > 10_000


def test_nothing_is_trained_where_no_row_would_be_kept(monkeypatch):
    "An hour of training, and no row: the study ran under any budget."
    monkeypatch.setenv('RESTORE_BUDGET', 'cpu')
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setattr(S, 'trained_way', None)
    with pytest.raises(ValueError, match="RESTORE_BUDGET gives 'cpu'; expected 'study'"):
        S.residual_study()
