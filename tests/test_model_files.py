"""What the appendix model_files does not show: files of every wrong kind, what is imported and what
is not, what stays exact, half-written files, and the record of the weights that come along."""

import json, pickle, sys, tomllib

import numpy as np
import pytest
import torch
from common import ROOT, held, same
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from restore_lib import model_files as M
from restore_lib.model_files import load_model, pretrained, save_model, save_pretrained
from restore_lib.patching import PixelStats


@pytest.fixture(scope='module')
def model():
    return load_model('mixed')[0]


@pytest.fixture(scope='module')
def whole(model, tmp_path_factory):
    return save_model(model, tmp_path_factory.mktemp('whole') / 'a.safetensors', task='mixed')


def changed(whole, path, meta=None, state=None):
    "The file with other metadata or tensors."
    with safe_open(whole, 'pt') as f:
        info = f.metadata()
    tensors = load_file(whole)
    save_file(state(tensors) if state else tensors, path, metadata=meta(info) if meta else info)
    return path


def with_class(name):
    return lambda info: dict(info, **{'class': name})


# files ------------------------------------------------------------------------------------------


def test_there_and_back(model, whole, tmp_path):
    was = held(model)
    path = save_model(model, tmp_path / 'new' / 'b.safetensors', psnr=[1, None], about={'a': 'b'})
    back, says = load_model(path)
    assert says == dict(psnr=[1, None], about={'a': 'b'}) and same(held(back), was)
    assert same(held(model), was) and not any(m.training for m in back.modules())
    assert load_model(str(whole))[1] == dict(task='mixed')


def test_numbers_of_numpy_and_tensors_may_be_said(model, tmp_path):
    said = dict(psnr=np.float32(1.5), n=np.int64(3), all=np.arange(2), t=torch.ones(1))
    save_model(model, tmp_path / 'a.safetensors', **said)
    assert load_model(tmp_path / 'a.safetensors')[1] == dict(psnr=1.5, n=3, all=[0, 1], t=[1.0])


@pytest.mark.parametrize(
    'meta, state, says',
    [
        (lambda m: None, None, 'does not say how'),
        (lambda m: dict(other='x'), None, 'does not say how'),
        (lambda m: dict(m, made_of='{'), None, 'does not say how'),
        (lambda m: dict(m, made_of='{}'), None, 'does not say how'),
        (lambda m: dict(m, made_of='[]'), None, 'made_of is list'),
        (lambda m: dict(m, says='3'), None, 'says is int'),
        (lambda m: {k: v for k, v in m.items() if k != 'says'}, None, 'does not say how'),
        (lambda m: {k: v for k, v in m.items() if k != 'class'}, None, 'names no class'),
        (lambda m: dict(superres='{}', says='{}'), None, 'names no class'),
        (None, lambda t: {k: v for k, v in t.items() if 'film' not in k}, 'copied .* of .*film'),
        (None, lambda t: {k: v[:1].clone() for k, v in t.items() if v.ndim}, 'copied'),
        (None, lambda t: t | dict(more=torch.ones(1)), "holds 'more', which the model"),
        (None, lambda t: t | dict(std=torch.full((1, 1, 1), torch.nan)), 'NaN'),
    ],
)
def test_files_of_the_wrong_kind(whole, tmp_path, meta, state, says):
    path = changed(whole, tmp_path / 'a.safetensors', meta, state)
    with pytest.raises(ValueError, match=says):
        load_model(path)


@pytest.mark.parametrize(
    'name',
    [
        'antigravity.fly',
        'os.system',
        'two_stage.Path',
        'two_stage.TwoStageDMAE.from_pretrained',
        'two_stage',
        'TwoStageDMAE',
        'restore_lib.two_stage.TwoStageDMAE',
        '..two_stage.TwoStageDMAE',
        'two_stage.ResidualEncoder',
        '',
    ],
)
def test_nothing_is_imported_because_a_file_says_so(whole, tmp_path, monkeypatch, name):
    path = changed(whole, tmp_path / 'a.safetensors', with_class(name))

    def never(*a, **kw):
        raise AssertionError('imported')

    monkeypatch.setattr(M.importlib, 'import_module', never)
    with pytest.raises(ValueError, match='a.safetensors .*is no class that a file may be of'):
        load_model(path)
    assert 'antigravity' not in sys.modules


def test_a_class_of_the_library_whose_file_is_another(whole, tmp_path):
    path = changed(whole, tmp_path / 'a.safetensors', with_class('superres.LatentSR'))
    with pytest.raises(ValueError, match="does not say how .*KeyError: 'config'"):
        load_model(path)
    with pytest.raises(ValueError, match='holds a two_stage.TwoStageDMAE; expected a superres.Lat'):
        load_model(whole, 'superres.LatentSR')


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, 'w'))


def test_nothing_is_unpickled(whole, tmp_path, monkeypatch):
    torch.save(dict(a=Payload(tmp_path / 'ran')), tmp_path / 'a.safetensors')
    (tmp_path / 'b.safetensors').write_bytes(pickle.dumps(Payload(tmp_path / 'ran')))
    (tmp_path / 'c.safetensors').write_bytes(b'')
    for name in 'abc':
        with pytest.raises(ValueError, match=f'{name}.safetensors is no safetensors file'):
            load_model(tmp_path / f'{name}.safetensors')
    assert not (tmp_path / 'ran').exists()

    def never(*a, **kw):
        raise AssertionError('unpickled')

    wheres = (torch, 'load'), (pickle, 'load'), (pickle, 'loads'), (pickle, 'Unpickler')
    for where, what in wheres:
        monkeypatch.setattr(where, what, never)
    load_model(whole)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.* neither a file nor one of .*denoise'):
        load_model(tmp_path / 'nowhere.safetensors')
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path)


def test_what_has_no_class_that_a_file_may_be_of(tmp_path):
    for bad in (torch.nn.Linear(2, 2), {}, None):
        with pytest.raises(TypeError, match=f'model is .*{type(bad).__name__}; expected one of'):
            save_model(bad, tmp_path / 'a.safetensors')
    assert not list(tmp_path.iterdir())


def test_a_class_of_a_lesson_that_is_being_run_counts_as_the_librarys(model):
    kind = type('TwoStageDMAE', (), {'__module__': '__main__'})
    assert M.name_of_class(kind()) == M.name_of_class(model) == 'two_stage.TwoStageDMAE'
    other = type('TwoStageDMAE', (), {'__module__': 'elsewhere'})
    with pytest.raises(TypeError, match='elsewhere.TwoStageDMAE'):
        M.name_of_class(other())


def test_a_full_disk_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / 'a.safetensors'
    path.write_text('old')

    def full(state, part, metadata):
        part.write_text('half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(M, 'save_file', full)
    with pytest.raises(OSError, match='No space left'):
        save_model(model, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_text() == 'old'


def test_what_is_exact_stays_so():
    state = dict(mean=torch.tensor([0.1]), meaning=torch.tensor([0.1]), n=torch.tensor(7))
    state |= {'net.mean': torch.tensor([0.1])}
    half = M.as_half(state, ('mean', 'other'))
    assert half['mean'].dtype == half['meaning'].dtype == torch.float32
    assert half['net.mean'].dtype == torch.float16 and half['n'].dtype == torch.int64


def test_statistics_of_pixels_are_exact_in_every_class():
    "Halved, they would move each image a little, before any weight has its say."
    kinds = [M.class_named(name) for name in M.model_classes()]
    kinds = [kind for kind in kinds if issubclass(kind, PixelStats)]
    assert len(kinds) >= 2
    for kind in kinds:
        assert {'mean', 'std'} <= set(kind.exact), kind


# the weights that come with the library ----------------------------------------------------------


def test_each_file_is_small_and_its_record_complete():
    files = M.pretrained_files()
    sizes = [p.stat().st_size for p in files.values()]
    assert {'denoise_grey', 'mixed'} <= files.keys()
    assert max(sizes) <= 4_000_000 and sum(sizes) <= 24_000_000
    for name, says in pretrained().items():
        assert all(says.get(k) not in (None, '', {}) for k in M.RECORD), name
        assert isinstance(says['seed'], int) and says['minutes'] > 0
        assert all(isinstance(v, (int, float)) for v in says['scores'].values())
        assert says['recipe'].startswith(('make study ONLY=', 'train_', 'study_'))
        bound = says['licence'].startswith('for research')      # by its training images' terms
        assert bound == name.endswith('_roadscene') and (bound or 'Apache-2.0' in says['licence'])
        model, again = load_model(name)
        assert all(torch.isfinite(v).all() for v in model.state_dict().values())
        assert dict(again, **{'class': M.name_of_class(model)}) == says


def test_the_readme_of_the_data_names_each():
    text = (ROOT / 'data/README.md').read_text(encoding='utf-8')
    assert [name for name in M.pretrained_files() if f'`{name}`' not in text] == []


def test_they_are_installed_too():
    "Not only where the library is worked on."
    tools = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']
    patterns = tools['setuptools'].get('package-data', {}).get('restore_lib', [])
    home = M.PRETRAINED.parent
    for path in M.pretrained_files().values():
        assert any(path.relative_to(home).match(pattern) for pattern in patterns), patterns


RECORD = dict(
    recipe='make study',
    seed=0,
    data='photos',
    scores={'PSNR': 30.0},
    minutes=2,
    licence='Apache-2.0',
)


def test_what_is_kept_asks_for_all_of_its_record(model, tmp_path, monkeypatch):
    monkeypatch.setattr(M, 'PRETRAINED', tmp_path)
    save_pretrained(model, 'new', **RECORD, task='mixed')
    assert pretrained() == {
        'new': dict(RECORD, task='mixed', **{'class': 'two_stage.TwoStageDMAE'})
    }
    assert load_model('new')[1] == dict(RECORD, task='mixed')
    for k in RECORD:
        with pytest.raises(TypeError, match=k):
            save_pretrained(model, 'other', **{n: v for n, v in RECORD.items() if n != k})
    with pytest.raises(ValueError, match='name is'):
        save_pretrained(model, '../other', **RECORD)
    for limit in ('MOST_BYTES', 'MOST_BYTES_TOGETHER'):
        with monkeypatch.context() as patch:
            patch.setattr(M, limit, 2_000_000 if 'TOGETHER' in limit else 1_000)
            with pytest.raises(ValueError, match='other has .* bytes.*expected at most'):
                save_pretrained(model, 'other', **RECORD)
            if 'TOGETHER' in limit:  # the file itself may be replaced
                save_pretrained(model, 'new', **RECORD)
    assert [p.name for p in tmp_path.iterdir()] == ['new.safetensors']


def test_reading_what_is_said_reads_no_weights(monkeypatch):
    monkeypatch.setattr(M.importlib, 'import_module', None)
    monkeypatch.setattr(M, 'load_report', None)
    assert json.dumps(pretrained()) and pretrained()['denoise_grey']['task'] == 'denoise'


def test_what_half_precision_costs():
    w = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 1e-3, 1e-5, 1e-7):
        numbers = scale * w
        error = (M.as_half({'w': numbers})['w'].double() - numbers.double()).abs()
        allowed = torch.maximum(numbers.double().abs() / 2048, torch.tensor(2.0**-25))
        assert (error <= allowed).all()
    assert (error > numbers.double().abs() / 2048).any()  # below 6.1e-5 a part in 2,048 is not held


class Masked(torch.nn.Module):
    "A model with a mask of attention in its state."

    def __init__(self, reach=1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, 3))
        self.register_buffer('mask', torch.full((3, 3), -torch.inf).triu(reach))

    def rehearsal(self):
        return [torch.softmax(self.weight + self.mask, -1)]


def test_the_infinity_of_a_mask_is_saved():
    model = Masked()
    M.check_rebuilt(model, Masked())
    half = M.as_half(model.state_dict())
    assert half['mask'].dtype == torch.float16 and torch.equal(half['mask'].float(), model.mask)
    with pytest.raises(ValueError, match='mask of the model holds values that are NaN or inf'):
        M.check_rebuilt(Masked(0), Masked())
    with torch.no_grad():
        model.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match='weight of the model holds values that are NaN or inf'):
        M.check_rebuilt(model, Masked())
    for bad in (torch.nan, 1e5):
        with pytest.raises(ValueError, match='w holds numbers beyond 65504, or NaN'):
            M.as_half(dict(w=torch.tensor([bad, -torch.inf])))


# a byte a weight ----------------------------------------------------------------------------------


def test_a_byte_a_weight_comes_back_within_half_a_step(model, tmp_path):
    state, exact = model.float().state_dict(), model.exact
    again = M.from_bytes(M.as_bytes(state, exact))
    assert again.keys() == state.keys()
    for name, v in state.items():
        if v.ndim > 1 and not name.startswith(tuple(exact)) and v.is_floating_point():
            step = v.abs().amax(tuple(range(1, v.ndim)), keepdim=True) / 127
            assert ((again[name] - v).abs() <= 0.51 * step + 1e-12).all(), name
        elif v.is_floating_point():
            assert torch.allclose(again[name].float(), v, rtol=1e-3, atol=1e-6), name
    small = save_model(model, tmp_path / 'small.safetensors', bits=8, task='mixed')
    large = save_model(model, tmp_path / 'large.safetensors', task='mixed')
    assert small.stat().st_size < 0.65 * large.stat().st_size
    assert load_model(small)[1] == dict(task='mixed')
    with pytest.raises(ValueError, match='bits is 4; expected one of 8, 16'):
        save_model(model, tmp_path / 'odd.safetensors', bits=4)


@pytest.mark.parametrize('odd', ['absent|scale', 'weight|scale', 'bias|scale'])
def test_scales_that_do_not_fit_are_told(odd):
    state = M.as_bytes(torch.nn.Linear(4, 3).state_dict())
    with pytest.raises(ValueError, match=r'expected .*a scale for each row'):
        M.from_bytes(state | {odd: torch.ones(3, 2)})


def test_a_row_of_zeros_stays_one():
    state = dict(weight=torch.tensor([[0.0, 0.0], [1e-7, -2.0]]))
    assert torch.allclose(M.from_bytes(M.as_bytes(state))['weight'], state['weight'], atol=2 / 254)
