"The study of lesson 17 at its smallest: rows, resuming, windows, what a loss says on its way."

import pytest
import torch
from common import gen
from PIL import Image

import restore_lib.weights_study as S
from restore_lib.diffusion import ResidualShift
from restore_lib.perceptual import PerceptualSRLoss
from restore_lib.superres_study import superres_sets

pytestmark = pytest.mark.usefixtures('seed')
NET = dict(base=16, embed=16, head_channels=8, window=4)


@pytest.fixture
def project(monkeypatch, tmp_path):
    "A project of its own with few small images, under a study's budget."
    for s, (folder, n) in enumerate(dict(roadscene_train=2, roadscene_val=1, tno17_dev=1).items()):
        (tmp_path / 'ir' / folder).mkdir(parents=True)
        for k in range(n):
            levels = (255 * torch.rand(40, 48, generator=gen(10 * s + k))).byte().numpy()
            Image.fromarray(levels).save(tmp_path / f'ir/{folder}/FLIR_{k:05}.png')
    (tmp_path / 'restore_lib').mkdir()
    (tmp_path / 'settings.ini').write_text('')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setenv('RESTORE_BUDGET', 'study')
    monkeypatch.setenv('RESTORE_DATA', str(tmp_path))
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path / 'runs'))
    small = dict(codec='learnable', codec_steps=1, crop=32, batch=2, net_options=NET)
    monkeypatch.setattr(S, 'WEIGHTS_SIZE', small)
    monkeypatch.setattr(S, 'WEIGHTS_WALKS', (1, 2))
    return tmp_path


def rows(name=None):
    found = [(r['config']['name'], r['seed']) for r in S.studies(S.WEIGHTS_LESSON)]
    return [row for row in found if name in (None, row[0])]


def test_rows_are_trained_once_seed_by_seed(project, capsys):
    names = ['squared error', '0.01 to 0.15 by thirds']
    S.weights_study(names, (0, 1), 4)
    assert rows() == [('bicubic', 0), *[(n, s) for s in (0, 1) for n in names]]
    kept = S.studies(S.WEIGHTS_LESSON)
    capsys.readouterr()
    S.weights_study(names, (0, 1), 4)
    assert capsys.readouterr().out == '' and S.studies(S.WEIGHTS_LESSON) == kept
    plain, product = (r['figures'] for r in kept[1:3])
    assert plain['perceptual part over squared error'] == 0
    assert product['perceptual part over squared error'] > 0
    assert {'PSNR, 1 step', 'judge, 2 steps', 'PSNR, ceiling'} <= set(product)
    assert product['loss, relative spread'] >= 0


def test_a_row_in_bf16_is_another_row(project):
    S.weights_study(['0.5'], (0,), 4)
    S.weights_study(['0.5'], (0,), 4, 'bf16')
    assert rows('0.5') == [('0.5', 0)] * 2
    assert [r['config']['precision'] for r in S.studies(S.WEIGHTS_LESSON)[1:]] == ['no', 'bf16']


def test_a_row_goes_on_with_what_its_loss_said(project):
    sets = superres_sets()
    config = S.weights_config(0, 4)

    def learner():
        return S.weights_learner('0.01 to 0.15', config, sets)

    def seen(learn):
        return [cb.seen for cb in learn.cbs if isinstance(cb, S.LossParts)][0]

    whole = learner().fit(4)
    first = learner()
    first.steps = 4
    first.cbs.append(Stop(2))
    with pytest.raises(KeyboardInterrupt):
        first.fit(4, folder=project / 'half', save_every=1)
    rest = learner().load(project / 'half').fit(4)
    assert torch.tensor(seen(rest)).allclose(torch.tensor(seen(whole)))
    for a, b in zip(rest.bare.parameters(), whole.bare.parameters()):
        assert torch.equal(a, b)


class Stop(S.Callback):
    "Ends a training after so many steps, once the checkpoint is there."

    def __init__(self, n):
        self.n = n

    def after_step(self, learn):
        if learn.step > self.n:
            raise KeyboardInterrupt


@pytest.mark.parametrize('name', S.WEIGHT_WAYS)
def test_each_way_has_its_loss(name):
    loss, cbs = S.weighted_loss(name, ResidualShift())
    assert isinstance(loss, PerceptualSRLoss) == (name != 'squared error')
    assert len(cbs) == name.startswith('0.01')
    if name != 'squared error':
        assert loss.lam == float(name.split()[0])
        assert (loss.by_step is not None) == name.endswith('thirds')


def test_a_window_is_one_of_both_images():
    seen = []

    def spy(a, b):
        seen.append((a, b))
        return torch.zeros(len(a))

    spy.name = 'spy'
    x = torch.arange(2 * 24 * 40.0).reshape(2, 1, 24, 40)
    for _ in range(20):
        S.Windowed(spy, 32)(x, x.clone())
    assert all(a.shape == (2, 1, 24, 32) and torch.equal(a, b) for a, b in seen)
    lefts = {int(a[0, 0, 0, 0]) for a, _ in seen}
    assert len(lefts) > 3 and lefts <= set(range(9))


def test_what_a_loss_said_in_its_second_half():
    found = S.loss_figures([[9, 9], [9, 9], [1, 1], [1, 3]])
    assert found['loss, mean'] == 3 and found['loss, absolute spread'] == 1
    assert found['loss, relative spread'] == pytest.approx(1 / 3)
    assert found['loss, largest over smallest'] == 2
    assert found['perceptual part over squared error'] == 2


def test_nothing_is_trained_where_no_row_would_be_kept(project, monkeypatch):
    monkeypatch.setenv('RESTORE_BUDGET', 'cpu')
    with pytest.raises(ValueError, match="expected 'study'"):
        S.weights_study(['0.5'], (0,), 4)


@pytest.mark.parametrize(
    'how, says',
    [
        (dict(names=['0.2']), "name is '0.2'"),
        (dict(steps=1), 'steps is 1'),
        (dict(seeds=[-1]), 'seeds is -1'),
    ],
)
def test_what_makes_no_sense_is_named(project, how, says):
    with pytest.raises(ValueError, match=says):
        S.weights_study(**how)
