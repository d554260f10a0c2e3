"Lesson 15's study: its images, its models and losses, its plans of equal time, rows that are kept."

import json

import pytest
import torch
import torch.nn.functional as F
from common import gen
from PIL import Image

from restore_lib import superres_study as S
from restore_lib.codecs import PacketCodec
from restore_lib.degrade import bicubic_up
from restore_lib.diffusion import ResidualShift
from restore_lib.metrics import count_params, psnr
from restore_lib.superres_scores import sr_pairs
from restore_lib.superres_training import SRLoss
from restore_lib.unet import SwinUNet

pytestmark = pytest.mark.usefixtures('seed')
NET = dict(base=16, embed=16, head_channels=8, window=4)


def scenes(n, h, w, s=0):
    "Smooth pictures with fine grain, so that every band has something in it."
    size = dict(size=(h, w), mode='bicubic', align_corners=False)
    coarse = F.interpolate(torch.rand(n, 1, 6, 8, generator=gen(s)), **size)
    grain = 0.1 * torch.randn(n, 1, h, w, generator=gen(s + 1))
    return list((coarse + grain).clamp(0, 1))


@pytest.fixture
def tiny(monkeypatch):
    "Rows that cost little."
    monkeypatch.setattr(S, 'SR_SIZE', dict(crop=32, batch=4, codec_steps=2, net_options=NET))


@pytest.fixture(scope='module')
def sets():
    counts = dict(train=3, held=1, RoadScene=2, TNO=1)
    made = {k: scenes(n, 48, 64, s) for s, (k, n) in enumerate(counts.items())}
    return {k: sr_pairs(images) for k, images in made.items()}


@pytest.fixture
def folders(monkeypatch, tmp_path):
    "The study's folders with few small images."
    for s, (folder, n) in enumerate(dict(roadscene_train=4, roadscene_val=1, tno17_dev=1).items()):
        (tmp_path / 'ir' / folder).mkdir(parents=True)
        for k, x in enumerate(scenes(n, 50, 64, s)):
            levels = (255 * x[0]).round().byte().numpy()
            Image.fromarray(levels).save(tmp_path / f'ir/{folder}/FLIR_{k:05}.png')
    monkeypatch.setenv('RESTORE_DATA', str(tmp_path))
    return tmp_path / 'ir'


@pytest.fixture
def project(monkeypatch, tmp_path, folders, tiny):
    "A project of its own, under a study's budget."
    (tmp_path / 'restore_lib').mkdir()
    (tmp_path / 'settings.ini').write_text('')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setenv('RESTORE_BUDGET', 'study')
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path / 'runs'))
    monkeypatch.setattr(S, 'SR_MANY', (1, 2))
    return tmp_path


def rows(name=None):
    found = [r for r in S.studies(S.SR_LESSON) if 'name' in r['config']]
    return [r for r in found if name in (None, r['config']['name'])]


# the images


def test_the_images_watched_are_of_the_training_folder(folders):
    sets = S.superres_sets()
    assert {k: len(v) for k, v in sets.items()} == dict(train=3, held=1, RoadScene=1, TNO=1)
    y, x = sets['held'][0]
    assert y.shape == (1, 12, 16) and x.shape == (1, 48, 64)
    first = scenes(4, 50, 64, 0)[0][:, :48]
    assert (x - first).abs().max() <= 0.5 / 255 + 1e-6
    seen = [x for k in ('train', 'RoadScene', 'TNO') for _, x in sets[k]]
    assert not any(torch.equal(x, other) for other in seen)


@pytest.mark.parametrize('folder', S.SR_FOLDERS.values())
def test_a_folder_that_is_missing_is_named(folders, folder):
    (folders / folder).rename(folders / 'elsewhere')
    with pytest.raises(FileNotFoundError, match=f'{folder} is missing.*data/README.md'):
        S.superres_sets()


def test_a_piece_is_the_middle_of_both():
    x = torch.arange(40 * 56.0).reshape(1, 40, 56)
    small, large = S.middle_piece(x[:, ::4, ::4], x, side=4)
    assert torch.equal(small, x[:, 12:28:4, 20:36:4]) and torch.equal(large, x[:, 12:28, 20:36])
    whole = S.middle_piece(x[:, ::4, ::4], x)
    assert torch.equal(whole[0], x[:, ::4, ::4]) and torch.equal(whole[1], x)


def test_real_inputs_are_drawn_once_and_are_no_bicubic_ones(sets):
    pairs = sets['train']
    (a, x), (again, _) = S.real_pairs(pairs)[0], S.real_pairs(pairs)[0]
    assert torch.equal(a, again) and torch.equal(x, pairs[0][1]) and a.shape == pairs[0][0].shape
    assert not torch.equal(a, S.real_pairs(pairs, seed=1)[0][0])
    assert torch.equal(a, S.real_pairs(pairs[:1])[0][0])  # whatever else is drawn
    assert (a - pairs[0][0]).square().mean().sqrt() > 0.01


def test_grey_in_three_channels(sets):
    y, x = S.in_channels(sets['train'], 3)[1]
    assert y.shape[0] == x.shape[0] == 3 and torch.equal(x[2:], sets['train'][1][1])


# networks


def test_bands_apart_are_level_2_and_level_1():
    x = torch.stack(scenes(2, 32, 48))
    fine_codec = PacketCodec(1, 1)
    coarse, fine = S.apart_bands(PacketCodec().encode(x)[0])
    level_1, _ = fine_codec.encode(x)
    assert torch.allclose(fine, level_1[:, 1:], atol=1e-5)
    level_2 = fine_codec.encode(level_1[:, :1] / 2 + 0.5)[0]
    assert torch.allclose(coarse, level_2, atol=1e-5)
    with pytest.raises(ValueError, match='z has 4 channels; expected 16'):
        S.apart_bands(coarse)


def test_two_branches_have_packets_latents_and_size(tiny, sets):
    config = S.sr_way('two branches')
    model = S.way_model('two branches', config, sets['train'])
    packet = S.way_model('packet', S.sr_way('packet'), sets['train'])
    assert isinstance(model.net, S.BandBranches)
    for name in ('sees', 'says'):
        assert torch.equal(getattr(model, name), getattr(packet, name))
    assert model.process.knobs == packet.process.knobs and model.codec.bands == packet.codec.bands
    y = torch.stack([y for y, _ in sets['train']])
    assert torch.allclose(model(y), bicubic_up(y, 4), atol=1e-5)  # zero at the start, as packet
    z = torch.randn(2, 16, 10, 12, generator=gen())
    torch.nn.init.normal_(model.net.branches.fine.last[-1].weight, std=0.1, generator=gen())
    said = model.net(z, torch.tensor([3, 9]), z)
    assert said.shape == z.shape
    coarse, fine = S.apart_bands(said)
    assert coarse.abs().max() == 0 and fine.abs().max() > 0


def test_two_branches_are_as_large_as_the_one():
    one, two = SwinUNet.tiny(32, 16), S.two_branches(S.sr_way('two branches'))
    assert abs(count_params(two) / count_params(one) - 1) < 0.1


def test_raw_sees_the_latent_as_it_is(tiny, sets):
    model = S.way_model('raw', S.sr_way('raw'), sets['train'])
    assert model.sees.unique().tolist() == model.says.unique().tolist() == [1.0]
    assert model.process.knobs == ResidualShift().knobs


# losses


def banded(sets):
    model = S.way_model('bands, LL x 0.1', S.sr_way('bands, LL x 0.1'), sets['train'])
    torch.nn.init.normal_(model.net.last[-1].weight, std=0.1, generator=gen())
    return model


def test_weights_of_one_are_the_plain_loss(tiny, sets):
    model, packet = banded(sets), S.way_model('packet', S.sr_way('packet'), sets['train'])
    packet.load_state_dict(model.state_dict())
    y, x = (torch.stack(v) for v in zip(*sets['train']))
    losses = []
    for m, loss in ((model, S.band_loss_of(model, 'equal')), (packet, SRLoss())):
        torch.manual_seed(1)
        losses.append(loss(m, (y, x)))
        losses[-1].backward()
    assert torch.equal(*losses) and losses[0] > 0
    grads = ([p.grad for p in m.net.parameters() if p.grad is not None] for m in (model, packet))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize('table', S.SR_TABLES[1:])
def test_tables_of_weights_by_hand(tiny, sets, table):
    model = banded(sets)
    w, missing = S.band_weights(model, table), model.says.double().square()
    assert (w * missing).sum().item() == pytest.approx(missing.sum().item())
    ratio = w / w[1]
    if table == 'inverse variance':
        assert torch.allclose(ratio, (model.sees[1] / model.sees).double().square())
    else:
        level_1, rest = ratio[4:].unique().tolist(), ratio[1:4].unique().tolist()
        assert rest == [1] and ratio[0].item() == pytest.approx(0.1 if table[0] == 'L' else 1)
        assert level_1 == pytest.approx([2 if table[0] == 'f' else 1])


def test_a_weighted_loss_by_hand(tiny, sets):
    model = banded(sets)
    weights = S.band_weights(model, 'finest x 2')
    y, x = (torch.stack(v) for v in zip(*sets['train']))
    loss, t = S.band_loss_of(model, 'finest x 2'), torch.tensor([0, 7, 14])
    how = dict(t=t, noise=torch.randn(3, 16, 12, 16, generator=gen()))
    with torch.no_grad():
        got = model(y, x, weight=loss.weight, **how).mean.item()
        (zy, _), (zx, _) = (model.codec.encode(v) for v in (model.start(y), x))
        p = model.process.training_pair(zx, zy, t, noise=how['noise'])
        errors = (model.correct(p.scaled, t, zy) - zx).square()
    wanted = (weights[:, None, None] * errors).mean().item()
    assert got == pytest.approx(wanted, rel=1e-5)


def test_an_unknown_table_is_refused(tiny, sets):
    with pytest.raises(ValueError, match="table is 'loud'; expected one of 'equal'"):
        S.band_weights(banded(sets), 'loud')


# plans


COSTS = {'packet': (0.2, 1), 'll': (0.1, 0), 'vq': (0.2, 40), 'dct': (0.19, 1), 'full': (0.2, 1)}
COSTS['cascade'] = (0.5, 4)


def times(name):
    a_step, before = COSTS[name]
    return {'seconds a step': a_step, 'packet, seconds a step': 0.2, 'seconds before': before}


def test_plans_of_equal_time():
    plan = {name: S.planned_steps(name, 1000, 'time', times) for name in COSTS}
    assert plan['packet'] == plan['dct'] == [1000]  # 5 % is no other number
    assert plan['ll'] == [2000] and plan['vq'] == [800]
    assert S.planned_steps('ll', 1000, 'steps', None) == [1000]  # nothing need be timed
    with pytest.raises(ValueError, match="equal is 'seconds'; expected one of 'steps', 'time'"):
        S.planned_steps('ll', 1000, 'seconds', times)


@pytest.mark.parametrize('equal', ['steps', 'time'])
def test_the_parts_of_a_cascade_add_up_to_packets_time(equal):
    plan, parts = S.planned_steps('cascade', 1000, equal, times), S.SR_PARTS['cascade']
    spent = [COSTS[part][1] + n * COSTS[part][0] for part, n in zip(parts, plan)]
    assert spent[0] == pytest.approx(spent[1], abs=0.5)
    assert sum(spent) == pytest.approx(1000 * 0.2, abs=0.5)


def test_a_codec_dearer_than_all_of_packets_time_leaves_one_step():
    assert S.planned_steps('vq', 100, 'time', times) == [1]


def test_the_source_alone_and_together():
    own = S.sr_way('packet')
    alone = [S.sr_way(f'source {k}') for k in ('decay', 'floor', 'start', 'channels')]
    fields = 'weight_decay', 'lr_floor', 'warmup', 'channels'
    for config, changed in zip(alone, fields):
        differs = [f for f in fields if getattr(config, f) != getattr(own, f)]
        assert differs == [changed]
        assert getattr(S.sr_way('source all'), changed) == getattr(config, changed)
    assert alone[1].lr * alone[1].lr_floor == pytest.approx(1e-6)


# figures


def test_figures_of_an_untrained_model_are_bicubics(tiny, sets, monkeypatch):
    monkeypatch.setattr(S, 'SR_MANY', (1, 2))
    tests = {'RoadScene': sets['RoadScene']}
    with torch.no_grad():
        figures = S.sr_figures(S.way_model('direct', S.sr_way('direct'), sets['train']), tests)
    floors = S.sr_floors(tests)
    for key in ('PSNR', 'SSIM', 'ST-LPIPS', 'energy', 'right'):
        got, want = figures[f'1 step, RoadScene {key}'], floors[f'bicubic, RoadScene {key}']
        assert got == pytest.approx(want, abs=2e-3)
    assert not any('2 steps' in k for k in figures)  # a regression has one
    y, x = (torch.stack(v) for v in zip(*tests['RoadScene']))
    by_hand = psnr(bicubic_up(y, 4).clamp(0, 1), x).mean().item()
    assert floors['bicubic, RoadScene PSNR'] == pytest.approx(by_hand, abs=1e-3)
    assert floors['unsharp, RoadScene energy'] > floors['bicubic, RoadScene energy']


def test_a_ceiling_is_the_true_latents(tiny, sets):
    y, x = (v[None] for v in sets['RoadScene'][0])
    models = {n: S.way_model(n, S.sr_way(n), sets['train']) for n in ('ll', 'packet')}
    best = {n: S.at_best(model, y, x) for n, model in models.items()}
    floor = psnr(bicubic_up(y, 4).clamp(0, 1), x).item()
    assert floor < best['ll'] < 60 and best['packet'] > 100


def test_three_channels_answer_in_grey(tiny, sets):
    config = S.sr_way('source all')
    model = S.way_model('source all', config, S.in_channels(sets['train'], 3))
    y = sets['RoadScene'][0][0][None]
    out = S.grey_restored(model, 2, y)
    assert out.shape == (1, 1, 48, 64) and torch.equal(out, S.grey_restored(model, 2, y))


# rows


@pytest.mark.parametrize('name', S.SR_WAYS)
def test_every_row_can_be_trained(name, project, sets):
    before = None
    for part in S.SR_PARTS.get(name, (name,)):
        learn, ahead = S.way_learner(part, S.sr_way(part, steps=2), sets, before)
        learn.valid = None
        learn.fit(2)
        before = learn.trained()
        assert ahead > 0 and S.clock_of(learn) > 0
    y = sets['RoadScene'][0][0][None]
    assert torch.isfinite(S.grey_restored(before, 1, y)).all()
    assert (before.before is None) == (name != 'cascade')


def test_a_study_goes_on_where_it_stopped(project, capsys):
    S.superres_study(['packet', 'direct'], [0], 2)
    first = S.studies(S.SR_LESSON)
    assert [(r['config']['name'], r['seed']) for r in rows()] == [('packet', 0), ('direct', 0)]
    S.superres_study(['direct', 'packet'], [0], 2)
    assert S.studies(S.SR_LESSON) == first
    capsys.readouterr()
    S.superres_study(['packet'], [0, 1], 2)
    assert 'packet, seed 1: [2] steps' in capsys.readouterr().out
    assert [r['seed'] for r in rows('packet')] == [0, 1]
    S.superres_study(['packet'], [0], 3)  # another number of steps is another row
    assert [r['config']['plan'] for r in rows('packet')] == [[2], [2], [3]]


def test_a_row_says_what_it_cost_and_reached(project):
    S.superres_study(['packet', 'll'], [1], 2)
    packet, ll = (rows(name)[0] for name in ('packet', 'll'))
    assert packet['seed'] == 1 and packet['figures']['steps'] == 2 and packet['minutes'] >= 0
    figures = packet['figures']
    assert figures['seconds a step'] > 0 and figures['rule'] == S.SR_RULE
    assert figures['parameters'] > 10_000 and 'held, PSNR, 1 step' in figures
    for title in ('1 step', 'pieces, 1 step', 'pieces, 2 steps'):
        for test in ('RoadScene', 'TNO', 'RoadScene real', 'TNO real'):
            keys = [f'{title}, {test} {k}' for k in ('PSNR', 'ST-LPIPS', 'energy', 'right')]
            assert set(keys) <= figures.keys()
    assert not any('real' in k for k in ll['figures'])  # for packet and the one trained so
    assert ll['figures']['ceiling, TNO PSNR'] < 60 < figures['ceiling, TNO PSNR']
    floors = [r['figures'] for r in S.studies(S.SR_LESSON) if 'floors' in r['config']]
    assert len(floors) == 1 and 'pieces, unsharp, TNO real ST-LPIPS' in floors[0]
    assert json.dumps(figures)


def test_equal_time_is_planned_from_kept_timings(project, monkeypatch):
    for name in ('_WARM', '_TIMED', '_TURNS'):
        monkeypatch.setattr(S, name, 1)
    S.superres_study(['cascade'], [0], 4)
    timed = [r['config']['timing'] for r in S.studies(S.SR_LESSON) if 'timing' in r['config']]
    assert sorted(timed) == ['cascade', 'full']
    row = rows('cascade')[0]
    assert len(row['config']['plan']) == len(row['config']['parts']) == 2
    assert row['figures']['steps'] == sum(row['config']['plan'])
    monkeypatch.setattr(S, 'way_learner', None)  # nothing is timed or trained again
    S.superres_study(['cascade'], [0], 4)
    assert [r['what'] for r in S.superres_rows(['cascade'], 4)][2:] == ['cascade']


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(names=['dwt']), "name is 'dwt'; expected one of 'packet'"),
        (dict(equal='epochs'), "equal is 'epochs'; expected one of"),
        (dict(steps=0), 'steps is 0'),
        (dict(seeds=[-1]), 'seeds is -1'),
    ],
)
def test_what_a_study_refuses(project, bad, message):
    with pytest.raises(ValueError, match=message):
        S.superres_study(**bad)
    assert not S.studies(S.SR_LESSON)


def test_nothing_is_trained_where_no_row_would_be_kept(project, monkeypatch):
    monkeypatch.setenv('RESTORE_BUDGET', 'cpu')
    with pytest.raises(ValueError, match="RESTORE_BUDGET gives 'cpu'; expected 'study'"):
        S.superres_study(['packet'], [0], 2)


def test_a_missing_folder_ends_a_study(project, folders):
    (folders / 'tno17_dev').rename(folders / 'elsewhere')
    with pytest.raises(FileNotFoundError, match='tno17_dev is missing'):
        S.superres_study(['packet'], [0], 2)


def test_rows_of_a_table_are_means_with_their_spread(project):
    keys = '1 step, TNO PSNR', 'pieces, 15 steps, TNO PSNR'
    for seed, v in enumerate((30.0, 31.0, 32.0)):
        found = {keys[0]: v, keys[1]: v - 1, 'steps': 7, 'seconds a step': 0.1, 'minutes': seed}
        S.record_study(S.SR_LESSON, S.row_config('packet', 7, [7]), found, 1, seed)
    S.record_study(S.SR_LESSON, S.row_config('direct', 7, [7]), {keys[0]: 33.0}, 1, 0)
    S.record_study(S.SR_LESSON, S.row_config('direct', 8, [8]), {keys[0]: 99.0}, 1, 0)
    S.record_study(S.SR_LESSON, dict(name='packet', steps=7), {keys[0]: 99.0}, 1, 0)  # an older one
    packet, direct = S.superres_rows(steps=7, figures=keys)
    assert packet['what'] == 'packet' and packet['seeds'] == 3 and packet['minutes'] == 1
    assert packet[keys[0]] == 31 and packet[f'{keys[0]}, spread'] == 1 and packet[keys[1]] == 30
    assert direct[keys[0]] == 33 and direct[f'{keys[0]}, spread'] is None
    assert direct[keys[1]] is None  # a regression has one step
    assert [r['what'] for r in S.superres_rows(steps=8)] == ['direct']
    assert S.superres_rows(steps=7, equal='time')[0]['what'] == 'packet'  # whose plan is known
    floors = {f'{k}, TNO PSNR': v for k, v in (('bicubic', 29.0), ('pieces, unsharp', 29.5))}
    S.record_study(S.SR_LESSON, dict(floors='bicubic, unsharp', piece=S.SR_PIECE), floors, 0)
    bicubic, unsharp = S.superres_rows([], 7, figures=(keys[0], 'pieces, 1 step, TNO PSNR'))
    assert bicubic == {'what': 'bicubic', keys[0]: 29.0, 'pieces, 1 step, TNO PSNR': None}
    assert unsharp['pieces, 1 step, TNO PSNR'] == 29.5
    with pytest.raises(ValueError, match="name is 'dwt'"):
        S.superres_rows(['dwt'])
    assert S.over_packet('direct', keys[0], 7) == [33.0 - 30.0]  # of the seed that both have
    assert S.over_packet('cascade', keys[0], 7) == []
    with pytest.raises(ValueError, match="name is 'dwt'"):
        S.over_packet('dwt', keys[0])


# the clock


def test_the_clock_counts_steps_alone_and_goes_on(project, sets):
    def learner():
        return S.way_learner('direct', S.sr_way('direct', steps=4), sets)[0]

    whole = learner().fit_or_load('clock', {}, 2, 1, 1)
    spent = S.clock_of(whole)
    assert 0 < spent < 60
    again = learner().fit_or_load('clock', {}, 2, 1, 1)  # loaded
    assert S.clock_of(again) == spent
    assert S.clock_of(again.fit(3)) > spent
