"""What lesson 08 does not teach of priors, other tokenizers and their trainings: numbers that stay,
files that come back, the large training's first steps, the rows of a study."""

import copy
import json
import math

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from common import shake
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from restore_lib import code_studies as S
from restore_lib.code_parts import CodeVectors, check_indices, plot_health
from restore_lib.codebook import (
    Codebook,
    CodePrior,
    ViTCodebook,
    draw_codes,
    hide_some,
    prior_loss,
    tokenizer_loss,
    vit_codebook_tiny,
)
from restore_lib.data import photos
from restore_lib.mae import MAE
from restore_lib.model_files import load_model, pretrained, save_model
from restore_lib.tokenizers import FSQ, large_tokenizer

pytestmark = pytest.mark.usefixtures('seed')


def small(**options):
    base = dict(num_codes=5, grid=(3, 4), classes=2, dim=16, depth=1, heads=2)
    return CodePrior(**base | options)


class Knows(nn.Module):
    "A prior that is sure of one text, and counts what it was shown."

    def __init__(self, text, k=5, classes=2):
        super().__init__()
        self.num_codes, self.classes, self.grid = k, classes, (1, len(text))
        self.text, self.seen = torch.tensor(text), []

    def forward(self, indices, labels):
        self.seen.append((indices == self.num_codes).sum(1).tolist())
        return 50.0 * F.one_hot(self.text, self.num_codes).float().expand(len(indices), -1, -1)


# hiding and guessing ------------------------------------------------------------------------------


def test_hidden_shares_are_cosines_of_random_angles():
    hidden = hide_some(torch.zeros(4000, 49, dtype=torch.long))
    counts = hidden.sum(1)
    assert counts.min() >= 1 and counts.max() == 49
    assert hidden.float().mean() == pytest.approx(2 / math.pi + 0.5 / 49, abs=0.02)
    assert hidden.float().mean(0).std() < 0.02  # no place is preferred


def test_the_loss_asks_for_what_is_hidden_and_shows_only_the_rest():
    prior = shake(small())
    indices, labels = torch.randint(5, (6, 12)), torch.randint(2, (6,))
    torch.manual_seed(3)
    loss = prior_loss(prior, (indices, labels))
    torch.manual_seed(3)
    hidden = hide_some(indices)
    untold = torch.rand(6) < 0.1
    seen = torch.where(hidden, 5, indices)
    logits = prior(seen, torch.where(untold, 2, labels)).log_softmax(-1)
    by_hand = -logits.gather(-1, indices[..., None])[..., 0][hidden].mean()
    assert torch.allclose(loss, by_hand, atol=1e-6)


def test_the_prior_sees_places_numbers_and_class():
    prior = shake(small())
    a = torch.randint(5, (1, 12))
    b = a.clone()
    b[0, 0], b[0, 5] = a[0, 5], a[0, 0]
    b[0, 1] = (a[0, 1] + 1) % 5
    one, other = torch.tensor([0]), torch.tensor([1])
    assert prior(a, one).shape == (1, 12, 5)
    assert not torch.allclose(prior(a, one), prior(b, one), atol=1e-3)
    assert not torch.allclose(prior(a, one), prior(a, other), atol=1e-3)


# writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('steps', [1, 2, 7, 12, 40])
@pytest.mark.parametrize('guidance', [0.0, 2.0])
def test_a_prior_that_is_sure_writes_its_text(steps, guidance):
    prior = Knows([0, 1, 2, 3, 4, 0, 1])
    drawn = draw_codes(prior, torch.tensor([0, 1, 2]), steps, guidance)
    assert torch.equal(drawn, prior.text.expand(3, -1)) and drawn.dtype == torch.int64
    assert len(prior.seen) == steps * (2 if guidance else 1)
    left = [row[0] for row in prior.seen[:: 2 if guidance else 1]]
    assert left == [math.floor(7 * math.cos(math.pi / 2 * s / steps)) for s in range(steps)]


def test_what_is_known_stays():
    prior = shake(small())
    begun = torch.randint(6, (40, 12))
    begun[0], begun[1] = 5, torch.arange(12) % 5  # nothing known; everything known
    drawn = draw_codes(prior, torch.zeros(40, dtype=torch.long), 5, indices=begun.clone())
    known = begun < 5
    assert torch.equal(drawn[known], begun[known]) and 0 <= drawn.min() and drawn.max() < 5


def test_guidance_moves_towards_the_class():
    class Half(Knows):
        def forward(self, indices, labels):
            lean = torch.tensor([0.0, 0.5, 0.0])[labels]  # class 1 leans towards number 1
            out = torch.zeros(*indices.shape, 2)
            out[..., 1] = lean[:, None]
            return out

    prior, labels = Half([0] * 200, k=2), torch.ones(20, dtype=torch.long)
    shares = [draw_codes(prior, labels, 1, w).float().mean().item() for w in (0.0, 3.0)]
    expected = [torch.tensor(0.5 * (1 + w)).sigmoid().item() for w in (0.0, 3.0)]
    assert shares == pytest.approx(expected, abs=0.03)


def test_it_learns_that_numbers_agree():
    "Each class has two texts; what is written is one of them, not a mixture."
    texts = torch.stack([torch.full((12,), k) for k in range(4)])
    labels = torch.tensor([0, 0, 1, 1])
    prior = small(dim=32)
    opt = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    for _ in range(250):
        opt.zero_grad()
        prior_loss(prior, (texts.repeat(8, 1), labels.repeat(8))).backward()
        opt.step()
    drawn = draw_codes(prior.eval(), torch.tensor([0] * 20 + [1] * 20), 12, 0.0)
    whole = (drawn == drawn[:, :1]).all(1)
    right = (drawn[:, 0] // 2 == torch.tensor([0] * 20 + [1] * 20)) & whole
    assert right.float().mean() > 0.9
    assert len(drawn[:20, 0][whole[:20]].unique()) == 2  # both texts of a class are written


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda p: draw_codes(p, torch.tensor([3])), ValueError, 'labels span 3 to 3'),
        (lambda p: draw_codes(p, torch.tensor([0.0])), TypeError, 'labels is torch.float32'),
        (lambda p: draw_codes(p, torch.tensor([0]), 0), ValueError, 'steps is 0'),
        (lambda p: draw_codes(p, torch.tensor([0]), 1.5), ValueError, 'steps is 1.5'),
        (lambda p: draw_codes(p, torch.tensor([0]), guidance=math.nan), ValueError, 'guidance'),
        (lambda p: draw_codes(p, torch.tensor([0]), chance=-1), ValueError, 'chance is -1'),
        (
            lambda p: draw_codes(p, torch.tensor([0]), indices=torch.full((1, 12), 6)),
            ValueError,
            'indices span 6 to 6',
        ),
        (lambda p: small(num_codes=0), ValueError, 'num_codes is 0'),
        (lambda p: small(classes=0), ValueError, 'classes is 0'),
        (lambda p: small(grid=(3, 0)), ValueError, 'grid is 0'),
        (lambda p: small(depth=0), ValueError, 'depth is 0'),
        (lambda p: CodeVectors(4, 2, decay=1), ValueError, 'decay is 1'),
        (lambda p: CodeVectors(4, 2, decay=math.nan), ValueError, 'decay is nan'),
        (lambda p: CodeVectors(4, 2, decay='0.9'), TypeError, "decay is '0.9'"),
        (lambda p: tokenizer_loss(perceptual=0.1), TypeError, 'perceptual is float'),
        (lambda p: check_indices(torch.tensor([True]), 2), TypeError, 'indices is torch.bool'),
    ],
)
def test_arguments_that_make_no_sense(call, error, says):
    with pytest.raises(error, match=says):
        call(small())


# files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('cosine', [False, True])
@pytest.mark.parametrize('decay', [0.9, None])
def test_a_tokenizer_comes_back_from_its_file(tmp_path, decay, cosine):
    book = Codebook(30, 6, decay, cosine=cosine, revive=0.3, init='normal')
    model = vit_codebook_tiny((16, 8), 4, 3, book, 16, 1, 2, mean=(0.4, 0.5, 0.6), std=0.3).eval()
    save_model(model, tmp_path / 'a.safetensors', task='try')
    again, says = load_model(tmp_path / 'a.safetensors', 'codebook.ViTCodebook')
    x = torch.rand(3, 3, 16, 8)
    assert says == dict(task='try') and torch.equal(again.codebook.codes, book.codes)
    assert torch.equal(again.codebook.vectors(), book.vectors())
    with torch.no_grad():
        assert (again.encode(x) == model.encode(x)).float().mean() > 0.9  # weights are halved
        codes = model.encode(x)
        assert torch.allclose(again.decode(codes), model.decode(codes), atol=5e-3)
    assert again.codebook.revive == 0.3 and again.codebook.decay == decay


def test_what_a_file_cannot_tell_is_refused(tmp_path):
    fsq = vit_codebook_tiny(16, 4, 1, FSQ((4, 4)), 16, 1, 2)
    with pytest.raises(TypeError, match='ViTEncoder and FSQ; expected a ViTEncoder and a Codebook'):
        save_model(fsq, tmp_path / 'a.safetensors')
    changed = vit_codebook_tiny(16, 4, 1, Codebook(8, 4, init='normal'), 16, 1, 2)
    changed.decoder.norm = nn.Identity()
    with pytest.raises((ValueError, AttributeError)):
        save_model(changed, tmp_path / 'a.safetensors')


def test_a_tokenizer_of_a_mae_comes_back(tmp_path):
    mae = MAE(16, 4, 16, 1, 2, 16, 1, 2, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    model = ViTCodebook(mae, Codebook(12, 6, init='normal'), 16, 1, 2).eval()
    save_model(model, tmp_path / 'a.safetensors')
    again, _ = load_model(tmp_path / 'a.safetensors')
    for name in ('mean', 'std'):  # not rounded: a file would move every image a little
        assert torch.equal(getattr(again, name), getattr(mae, name))
    assert torch.equal(again.codebook.codes, model.codebook.codes)


def test_a_prior_comes_back_from_its_file(tmp_path):
    prior = shake(small()).eval()
    save_model(prior, tmp_path / 'a.safetensors')
    again, _ = load_model(tmp_path / 'a.safetensors', 'codebook.CodePrior')
    seen, labels = torch.randint(6, (4, 12)), torch.randint(3, (4,))
    assert torch.allclose(again(seen, labels), prior(seen, labels), atol=1e-2)


@pytest.mark.parametrize('name', ['digit_codes', 'digit_prior', 'colour_codes'])
def test_the_shipped_weights_load(name):
    model, says = load_model(name)
    assert pretrained()[name]['class'].startswith('codebook.') and 'code_studies' in says['recipe']
    assert all(torch.isfinite(p).all() for p in model.parameters())


# the large training -------------------------------------------------------------------------------


class Photos(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, k):
        return torch.rand(3, 224, 224, generator=torch.Generator().manual_seed(k)), k


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason='fp16 wants a GPU')


@pytest.mark.parametrize('precision', ['no', 'bf16', pytest.param('fp16', marks=ON_GPU)])
def test_three_steps_of_the_large_training(tmp_path, precision):
    "ViT on 224 pixels, 196 tokens; small in width and depth here."
    learn = large_tokenizer(
        Photos(), tmp_path, False, 'vit_tiny_patch16_224', codes=64, width=16, dim=64, depth=1,
        heads=2, batch=2, first=2, every=3, precision=precision, cpu=precision != 'fp16',
    )
    before = copy.deepcopy(learn.bare.state_dict())
    assert not learn.bare.codebook.counts.eq(1).all() and learn.bare.codebook.started
    rates = sorted({group['lr'] for group in learn.opt.param_groups})
    assert rates == pytest.approx([1e-4, 3e-4])
    learn.fit(3)
    terms = [row for row in learn.history if 'mse' in row]
    assert len(terms) == 3
    for key in ('mse', 'codebook', 'commitment', 'perceptual'):
        assert all(math.isfinite(row[key]) and row[key] > 0 for row in terms), key
    after = learn.bare.state_dict()
    for part in ('encoder.', 'decoder.', 'codebook.codes', 'proj.'):
        moved = [not torch.equal(after[k], before[k]) for k in before if k.startswith(part)]
        assert any(moved), part
    events = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert {'mse', 'codebook', 'commitment', 'perceptual', 'active'} <= set(events['scalars'])
    assert events['images'] == ['reconstruction']


def test_the_large_training_at_another_size():
    "What timm is told decides how many tokens there are, and so when a code is revived."
    learn = large_tokenizer(
        torch.rand(8, 3, 32, 32), None, False, 'vit_tiny_patch16_224', codes=16, width=8, dim=32,
        depth=1, heads=2, batch=2, first=4, encoder=dict(img_size=32, patch_size=8, depth=1),
    )
    model = learn.bare
    assert model.encoder.grid == (4, 4) and len(model.encoder.vit.blocks) == 1
    assert model.codebook.revive == pytest.approx(0.2*2*16/16)
    assert model(torch.rand(1, 3, 32, 32))[0].shape == (1, 3, 32, 32)


# the studies --------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path, monkeypatch):
    "A project of its own for runs and rows; rows() reads them."
    (tmp_path / 'restore_lib').mkdir()
    (tmp_path / 'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setenv('RESTORE_BUDGET', 'study')
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path / 'runs'))
    path = tmp_path / 'data/studies/08_codebook.jsonl'
    return lambda: [json.loads(line) for line in path.read_text().splitlines()]


def test_a_study_of_digits(study):
    scores = S.study_digits('glyphs', 150, 4, 3, save=False, each=1, reader_steps=3)
    (row,) = study()
    assert row['figures'] == scores and row['config']['steps'] == [4, 3]
    assert 0 <= scores['written in 12 steps, read right, %'] <= 100
    assert scores['real, distance'] > 0 and scores['codes'] > 1


def test_a_study_of_cures_and_commitment(study):
    S.study_cures(8, 1, {'averages': dict(decay=0.95)}, 64)
    S.study_commitment(2, {'swapped': (1.0, S.swapped, None, 1)}, 64)
    cures, swapped = study()
    assert cures['figures']['step'] == list(range(1, 9))
    assert len(cures['figures']['dB']) == len(cures['figures']['active']) == 8
    assert len(swapped['figures']['of_each']) == 500
    assert swapped['figures']['dB'] == pytest.approx(
        sum(swapped['figures']['of_each']) / 500, abs=0.01
    )


def test_a_study_of_the_large_recipe(study, monkeypatch):
    "Three steps; called again, it loads them and records the same row."
    images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(S, 'colour_images', lambda: (images, images[:8], images[:8]))
    scores = S.study_article(3, codes=32, width=16)
    assert scores['curve']['step'] == [1, 2, 3] and 1 <= scores['codes'] <= 32
    assert all(math.isfinite(scores[k]) for k in ('dB', 'dB pooled', 'ST-LPIPS'))
    again = S.study_article(3, codes=32, width=16)
    (row,) = study()
    assert row['figures'] == scores == again
    assert row['config']['row'] == 'large recipe, small' and row['minutes'] >= 0


def test_rows_by_name_and_what_is_missing(study, capsys):
    "Of several configurations the newest; seeds in order; what is not there is told, not raised."
    for steps, seed, dB in ((10, 0, 1.0), (20, 1, 3.0), (20, 0, 2.0)):
        config = dict(data='d', row='a', steps=steps)
        S.record_study('08_codebook', config, dict(dB=dB), 0, seed)
    S.record_study('08_codebook', dict(data='other', row='b'), dict(dB=9.0), 0)
    assert S.recorded(['a'], data='d') == {'a': [dict(dB=2.0), dict(dB=3.0)]}
    assert capsys.readouterr().out == ''
    assert list(S.recorded(['b', 'c', 'a'])) == ['b', 'a']
    assert capsys.readouterr().out == 'not recorded yet: c\n'
    assert S.recorded(['b'], data='d') == {}
    assert capsys.readouterr().out == 'not recorded yet: b\n'
    assert S.recorded(['b', 'a'], told=False, data='d').keys() == {'a'}
    assert capsys.readouterr().out == ''


def test_no_rows_at_all_are_told(study, capsys):
    assert S.recorded(S.CURES, data='glyphs') == {}
    told = capsys.readouterr().out
    assert all(name in told for name in S.CURES)


def test_curves_of_three_seeds():
    "The mean as a line, all seeds in the band."
    seeds = [dict(step=[1, 2], dB=[20.0, 21 + k], active=[3, 4 + k]) for k in range(3)]
    axes = S.plot_curves({'a': seeds, 'b': seeds[:1]}, 'title').axes
    assert len(axes) == 2
    lines = [line.get_ydata().tolist() for line in axes[0].lines]
    assert lines == [[20.0, 22.0], [20.0, 21.0]]
    heights = axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (20, 23)
    plt.close('all')


def test_swapped_names_change_the_weights_only():
    model = vit_codebook_tiny(codebook=Codebook(8, 4, init='normal'))
    x = torch.rand(2, 1, 28, 28)
    model.eval()
    plain, other = tokenizer_loss()(model, x), S.swapped(model, x)
    assert torch.allclose(other['codebook'], plain['codebook'] / 4)
    assert torch.equal(other['commitment'], plain['commitment'])


def test_floors_at_equal_bits():
    "Images of two patches only come back whole; a mean cannot draw an edge."
    edge = torch.zeros(3, 4, 4)
    edge[:, :, 2:] = 1
    x = torch.cat([edge.repeat(1, 2, 2)[None], torch.full((1, 3, 8, 8), 0.25)])
    assert torch.equal(S.kmeans_of_patches(x.repeat(4, 1, 1, 1), x, 2), x)
    means = S.palette_of_means(x.repeat(4, 1, 1, 1), x, 2)
    assert torch.allclose(means[1], x[1]) and (means[0] - 0.5).abs().max() < 1e-6
    scores = S.codec_scores(means, x)
    assert scores['dB pooled'] == pytest.approx(-10 * math.log10(0.125), abs=1e-3)


def test_the_health_panel_takes_books_without_codes():
    "Use over training is that of a batch, and says so: fewer codes than a test set uses."
    history = [dict(step=k, active=4, perplexity=3.0) for k in range(3)]
    axes = plot_health({'a': (history, torch.tensor([3, 0, 1]))}).axes
    assert len(axes) == 3 and all('batch' in ax.get_title() for ax in axes[:2])


def test_photographs_as_tiles():
    "Square after square of each photograph, none of the test's; the rest at the edges is lost."
    tiles, first = S.photo_tiles(), next(iter(photos('train').values()))
    sizes = [x.shape[1]//32*(x.shape[2]//32) for x in photos('train').values()]
    assert tiles.shape == (sum(sizes), 3, 32, 32)
    assert torch.equal(tiles[1], first[:, :32, 32:64])
    assert S.photo_tiles(64).shape[1:] == (3, 64, 64)


def test_the_colour_study_ships_what_its_row_scores(monkeypatch, tmp_path):
    "The weights `colour_codes` are those of the row that the lesson reads, not of a later stage."
    monkeypatch.setenv('RESTORE_RUNS', str(tmp_path))
    images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows, shipped = {}, {}
    monkeypatch.setattr(S, 'colour_images', lambda: (images, images[:8], images[:8]))
    monkeypatch.setattr(S, 'palette_of_means', lambda train, x, k: x)
    monkeypatch.setattr(S, 'kmeans_of_patches', lambda train, x, k: x)
    monkeypatch.setattr(
        S, 'record_study', lambda name, config, figures, minutes: rows.update(
            {config['row']: figures}))
    monkeypatch.setattr(
        S, 'save_pretrained', lambda model, name, *how, steps: shipped.update(
            {name: (model, steps)}))
    S.study_colour(2, 1)
    assert {'tokenizer, 2 steps', 'mse', 'mse and perceptual', 'curve'} < set(rows)
    assert 'patches of photographs' in rows
    model, steps = shipped['colour_codes']
    with torch.no_grad():
        scored = S.codec_scores(model(images[:8])[0], images[:8])
    assert steps == 2 and scored.items() <= rows['tokenizer, 2 steps'].items()
    assert shipped['colour_codes_perceptual'][1] == 3
    assert rows['mse and perceptual']['dB'] != rows['mse']['dB']  # the term is heard
    assert all(0 < rows[row]['variance of the codes in 3 directions, %'] <= 100.001
               for row in ('codes at once', 'tokenizer, 2 steps'))


def test_a_reader_that_has_diverged_is_an_error_and_reads_no_zeros():
    model = vit_codebook_tiny(codebook=Codebook(8, 4, init='normal'))
    prior = CodePrior(8, (7, 7), 10, dim=8, depth=1, heads=1)

    def diverged(images):
        return torch.full((len(images), 10), torch.nan)

    with pytest.raises(ValueError, match='NaN'):
        S.digit_scores(model, prior, diverged, 'glyphs', n=50, each=1, steps=(1,))
