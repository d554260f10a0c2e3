"""What the appendix trunks does not show: parity with both packages, files, ranges, sizes, types,
what stays frozen, threads, states, bad input."""

import copy, math, pickle, random, subprocess, sys, threading, time, types, urllib.error
from functools import lru_cache
from hashlib import sha256

from common import gen, saved
from distances import Sum, both, ours, pair, plain
import lpips as lpips_package
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from restore_lib import trunks as T
from restore_lib.codebook import tokenizer_loss, vit_codebook_tiny
from restore_lib.metrics import count_params
from restore_lib.trunks import (
    NETS,
    BlurPool,
    FeatureDistance,
    Trunk,
    lpips,
    package_file,
    st_lpips,
    st_weights,
    trunk_file,
    vgg,
)

pytestmark = pytest.mark.usefixtures('seed')

ST = ('alex', 'vgg')


@lru_cache
def st(net='alex'):
    return st_lpips(net)


@lru_cache
def lpips_of_the_package(net):
    return lpips_package.LPIPS(net=net, pnet_rand=True, verbose=False).eval()


@lru_cache
def st_of_the_package(net):
    "It imports torchsummary, which it does not declare and needs for a printout only."
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'torchsummary', types.SimpleNamespace(summary=None))
        from stlpips_pytorch import stlpips
    return stlpips.LPIPS(net=net, variant='shift_tolerant', verbose=False).eval()


def on_signed(package):
    "A package's network as a function of images in [0, 1]."
    return lambda a, x: package(*(2 * t.expand(-1, 3, -1, -1) - 1 for t in (a, x))).flatten()


# ST-LPIPS -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('hw', [(64, 64), (21, 21), (22, 47), (37, 53), (128, 97)])
@pytest.mark.parametrize('c', [1, 3])
@pytest.mark.parametrize('net', ST)
def test_parity_with_stlpips(net, c, hw):
    "Single values near zero, or equal ones in a pool, may fall to either side in the gradient."
    a, x = pair(b=3, c=c, hw=hw)
    (v, g), (w, h) = both(st(net), a, x), both(on_signed(st_of_the_package(net)), a, x)
    assert w.max() > 1e-2 and (v - w).abs().max() < 1e-6
    assert h.norm() > 1e-3 and (g - h).norm() < 1e-3 * h.norm()
    assert (g - h).abs().median() < 1e-5 * h.abs().median()


@pytest.mark.parametrize('hw', [(64, 64), (22, 47), (97, 130)])
@pytest.mark.parametrize('net', ST)
def test_gradients_of_stlpips_in_double(net, hw):
    "Nothing falls to another side where both scale images by the same numbers."
    mine, ref = copy.deepcopy(st(net)).double(), copy.deepcopy(st_of_the_package(net)).double()
    ref.scaling_layer.shift = 2 * mine.mean[None] - 1
    ref.scaling_layer.scale = 2 * mine.std[None]
    a, x = (t.double() for t in pair(hw=hw))
    (v, g), (w, h) = both(mine, a, x), both(on_signed(ref), a, x)
    assert v.dtype == torch.float64
    assert (v - w).abs().max() < 1e-9 and (g - h).norm() < 1e-9 * h.norm()


@pytest.mark.parametrize('low, high', [(-1, 1), (0, 255), (0.25, 0.75)])
@pytest.mark.parametrize('net', ST)
def test_both_ranges(net, low, high):
    a, x = pair()
    to = lambda t: low + (high - low) * t
    fn, ref = st_lpips(net, range=(low, high)), st_of_the_package(net)
    (v, g), (w, h) = both(fn, to(a), to(x)), both(on_signed(ref), a, x)
    assert (v - w).abs().max() < 1e-5 and (g * (high - low) - h).norm() < 1e-3 * h.norm()
    assert torch.allclose(v, ref(a, x, normalize=True).flatten(), atol=1e-5)


def test_names():
    names = [st(net).name for net in ST] + [vgg(weights='st').name, ours().name]
    assert names == ['ST-LPIPS-alex', 'ST-LPIPS-vgg', 'ST-VGG features', 'random-alex features']
    everything = [lpips('squeeze', 'random'), vgg((4,), 'random')]
    assert not any('LPIPS' in fn.name or 'random' not in fn.name for fn in everything)


def test_channel_weights_are_those_of_the_file():
    state = st_weights('alex')
    for k, w in enumerate(st('alex').lins):
        assert torch.equal(w.flatten(), state[f'lin{k}.model.1.weight'].flatten())


def test_the_blur_is_that_of_the_file():
    x = torch.rand(2, 64, 7, 9)
    filt = st_weights('alex')['net.slice1.1.filt']
    want = F.conv2d(F.pad(x, (2, 2, 2, 2), 'reflect'), filt, stride=2, groups=64)
    assert torch.equal(BlurPool()(x), want) and want.shape[2:] == (5, 6) != (7 // 2, 9 // 2)
    assert all(torch.equal(v[:1], filt[:1]) for k, v in st_weights('vgg').items() if 'filt' in k)


@pytest.mark.parametrize('net', ST)
def test_smallest_image_of_st(net):
    fn, least = st(net), NETS[net]['st_least']
    assert fn.smallest == least
    a, x = pair(hw=(least, least + 1))
    assert torch.allclose(fn(a, x), on_signed(st_of_the_package(net))(a, x), atol=1e-5)
    strict = st_lpips(net, small='error')
    assert torch.equal(strict(a, x), fn(a, x))
    for hw in ((least - 1, 64), (64, least - 1), (1, 1)):
        a, x = pair(hw=hw)
        assert fn(a, x).isfinite().all()
        with pytest.raises(ValueError, match=f'ST-LPIPS-{net} needs at least {least} pixels'):
            strict(a, x)
        with pytest.raises(RuntimeError):
            on_signed(st_of_the_package(net))(a, x)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "A folder that stands for the package's."
    path = tmp_path / 'weights/vST0.0/alex_shift_tolerant.pth'
    path.parent.mkdir(parents=True)
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(T, 'find_spec', lambda name: spec)
    return path


def test_another_file_is_refused(elsewhere):
    real = elsewhere.parent / 'copy'
    mark = elsewhere.parent / 'mark'

    class Runs:
        def __reduce__(self):
            return eval, (f"open({str(mark)!r}, 'w').write('ran')",)

    torch.save(dict(x=Runs()), real)
    for data in (b'half a file', real.read_bytes()):
        elsewhere.write_bytes(data)
        with pytest.raises(ValueError) as error:
            st_lpips()
        said = str(error.value)
        assert str(elsewhere) in said and sha256(data).hexdigest() in said
        assert T.ST_SHA256['alex'] in said and not mark.exists()


def test_an_absent_package_is_named(elsewhere, monkeypatch):
    with pytest.raises(FileNotFoundError, match='alex_shift_tolerant.pth is not there.*whole'):
        st_lpips()
    monkeypatch.setattr(T, 'find_spec', lambda name: None)
    with pytest.raises(FileNotFoundError, match='package stlpips-pytorch to be installed'):
        st_lpips()
    with pytest.raises(FileNotFoundError, match='package lpips to be installed'):
        lpips('squeeze', 'random')


def test_no_package_is_run():
    code = (
        'import sys, restore_lib.trunks as t; '
        'heavy = "torchvision lpips stlpips_pytorch skimage matplotlib".split(); '
        'print([m for m in heavy if m in sys.modules]); '
        't.st_lpips(); t.lpips("alex", "random"); '
        'print([m for m in heavy if m in sys.modules])'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split('\n')[:2] == ['[]', "['torchvision']"]


def test_threads_say_the_same():
    fn, images = st(), [pair(hw=(40 + 3 * k, 40)) for k in range(4)]
    want, got = [fn(*p) for p in images], [None] * 4

    def work(k):
        torch.set_num_threads(1)
        for _ in range(3):
            got[k] = fn(*images[k])

    jobs = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@pytest.mark.parametrize('net', ST)
def test_copies_and_states(net, tmp_path):
    fn, (a, x) = st(net), pair()
    for twin in (copy.deepcopy(fn), pickle.loads(pickle.dumps(fn))):
        assert torch.equal(twin(a, x), fn(a, x)) and twin.name == fn.name
        assert not twin.training and not any(p.requires_grad for p in twin.parameters())
        twin.load_state_dict(saved(fn, tmp_path / 'w.pt'))
    keys = fn.state_dict().keys()
    assert not any('kernel' in k for k in keys) and {'mean', 'std', 'lins.4'} < keys
    for p in twin.trunk.parameters():
        p.data.zero_()
    assert not torch.equal(twin(a, x), fn(a, x))
    twin.load_state_dict(fn.state_dict())
    assert torch.equal(twin(a, x), fn(a, x))


def test_plain_and_shift_tolerant_states_are_told_apart():
    "Those of VGG have equal names and shapes."
    plain_vgg, tolerant = Trunk('vgg', 'random', cuts=(4, 9)), Trunk('vgg', 'st', cuts=(4, 9))
    assert plain_vgg.state_dict().keys() == tolerant.state_dict().keys()
    with pytest.raises(RuntimeError, match='blurred=False, but it is True here'):
        copy.deepcopy(tolerant).load_state_dict(plain_vgg.state_dict())


def test_nothing_thaws_it():
    fn = st_lpips()
    holder = nn.Sequential(fn, nn.Linear(2, 2)).train()
    fn.requires_grad_(True)
    assert count_params(fn, trainable=True) == 0 and count_params(holder, trainable=True) == 6
    assert holder.training and not any(m.training for m in fn.modules())
    holder.requires_grad_(True)
    fn(*pair(hw=(32, 32)))
    assert count_params(fn, trainable=True) == 0 and count_params(holder, trainable=True) == 6


def test_st_takes_a_call_of_256_in_under_a_second():
    "Processor time of one thread."
    a, x = pair(b=1, hw=(256, 256))
    times = []
    with torch.no_grad():
        for _ in range(3):
            start = time.process_time()
            st()(a, x)
            times.append(time.process_time() - start)
    assert min(times) < 1, times


def test_trunks_as_features_of_the_codebook():
    model, x = vit_codebook_tiny(), torch.rand(8, 1, 28, 28)
    model(x)  # the codes start from the first batch
    trunk = Trunk('alex', 'st')
    features = FeatureDistance(trunk, 'ST-AlexNet', T.IMAGENET, smallest=21, unit=False)
    for fn in (st(), st('vgg'), vgg((9,), 'st'), features):
        model.zero_grad()
        terms = tokenizer_loss(fn, 2.0)(model, x)
        want = 2 * fn(model(x)[0], x).mean()
        assert torch.allclose(terms['perceptual'], want, rtol=1e-3)
        terms['perceptual'].backward()
        grads = [p.grad for p in model.decoder.parameters()]
        assert all(g.isfinite().all() for g in grads) and any(g.abs().sum() > 0 for g in grads)


# files of torchvision -----------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    return tmp_path


def written(hub, monkeypatch, name, state):
    "A file whose content has the hash in its name, as far as trunks can tell."
    path = hub / 'checkpoints' / name
    torch.save(state, path)

    class Hash:
        def __init__(self, data):
            assert data == path.read_bytes()

        def hexdigest(self):
            return name.rsplit('-', 1)[1].split('.')[0]

    monkeypatch.setattr(T, 'sha256', Hash)


def test_missing_trunk_says_what_to_do(hub):
    for make in (lpips, vgg, lambda: Trunk('vgg')):
        with pytest.raises(FileNotFoundError, match='pretrained weights') as error:
            make()
        said = str(error.value)
        assert all(t in said for t in ('vgg16-397923af.pth', 'download=True', str(hub), 'https://'))


def test_unreachable_download(hub, monkeypatch):
    for fault in (urllib.error.URLError('no route'), TimeoutError('no route')):

        def fail(*args, **kw):
            raise fault

        monkeypatch.setattr(torch.hub, 'download_url_to_file', fail)
        said = 'alexnet.*could not be fetched.*no route.*put https://'
        with pytest.raises(FileNotFoundError, match=said) as error:
            lpips('alex', download=True)
        assert error.value.__cause__ is fault


def test_damaged_trunk(hub):
    (hub / 'checkpoints/squeezenet1_1-b8a52dc0.pth').write_bytes(b'half a file')
    with pytest.raises(ValueError, match='damaged'):
        lpips('squeeze')


def test_a_trunk_runs_no_code(hub, monkeypatch):
    mark = hub / 'mark'

    class Runs:
        def __reduce__(self):
            return eval, (f"open({str(mark)!r}, 'w').write('ran')",)

    written(hub, monkeypatch, 'vgg16-397923af.pth', dict(x=Runs()))
    with pytest.raises(pickle.UnpicklingError):
        vgg()
    assert not mark.exists()


@pytest.mark.parametrize(
    'net, name', [('squeeze', 'squeezenet1_1-b8a52dc0.pth'), ('alex', 'alexnet-owt-7be5be79.pth')]
)
def test_pretrained_trunk_is_the_file(net, name, hub, monkeypatch):
    "Its weights, and no others, are in every layer; the package with them says the same."
    torch.manual_seed(99)
    whole = getattr(models, NETS[net]['model'])(weights=None).eval()
    written(hub, monkeypatch, name, whole.state_dict())
    fn, ref, (a, x) = lpips(net), copy.deepcopy(lpips_of_the_package(net)), pair()
    assert fn.name == f'LPIPS-{net}' and all(p.dtype == torch.float32 for p in fn.parameters())
    z = torch.rand(1, 3, 64, 64)
    assert torch.equal(fn.trunk(z)[-1], whole.features[: fn.trunk.cuts[-1]](z))
    state = {k: whole.state_dict()['features.' + k.split('.', 1)[1]] for k in ref.net.state_dict()}
    ref.net.load_state_dict(state)
    assert (fn(a, x) - on_signed(ref)(a, x)).abs().max() < 1e-6
    assert not torch.allclose(fn(a, x), ours(net)(a, x), rtol=1e-2)
    del whole.features[3 if net == 'alex' else 4]
    written(hub, monkeypatch, name, whole.state_dict())
    with pytest.raises(RuntimeError):
        lpips(net)


def test_pretrained_vgg_is_the_file(hub, monkeypatch):
    with torch.device('meta'):
        layers = models.vgg16().features
    state = {f'features.{k}': 0.02 * torch.randn(v.shape) for k, v in layers.state_dict().items()}
    written(hub, monkeypatch, 'vgg16-397923af.pth', state)
    fn, (a, x) = vgg((4,)), pair(hw=(20, 24))

    def by_hand(t):
        mean, std = (torch.tensor(v)[:, None, None] for v in T.IMAGENET)
        t = (t - mean) / std
        for k in (0, 2):
            w, b = (state[f'features.{k}.{key}'] for key in ('weight', 'bias'))
            t = F.relu(F.conv2d(t, w, b, padding=1))
        return t

    want = (by_hand(a) - by_hand(x)).square().mean((1, 2, 3))
    assert fn.name == 'VGG features' and torch.allclose(fn(a, x), want, rtol=1e-4)


@pytest.mark.parametrize('net', NETS)
def test_real_weights(net):
    try:
        trunk_file(net, False)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    a, x = pair()
    fn, ref = lpips(net), copy.deepcopy(lpips_of_the_package(net))
    ref.net.load_state_dict(dict(zip(ref.net.state_dict(), fn.trunk.state_dict().values())))
    (v, g), (w, h) = both(fn, a, x), both(on_signed(ref), a, x)
    assert (v - w).abs().max() < 1e-6 and (g - h).abs().max() < 1e-6


@pytest.mark.parametrize('net', NETS)
def test_random_weights_are_a_seeded_draw(net):
    "The one that the package's own random network makes, too."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ref = lpips_package.LPIPS(net=net, pnet_rand=True, verbose=False)
    mine = ours(net).trunk.state_dict().values()
    assert all(torch.equal(p, q) for p, q in zip(ref.net.state_dict().values(), mine, strict=True))
    path = package_file('lpips', f'weights/v0.1/{net}.pth')
    lins = torch.load(path, map_location='cpu', weights_only=True)
    for w, v in zip(ours(net).lins, lins.values(), strict=True):
        assert torch.equal(w.flatten(), v.flatten())
    if net != 'vgg':
        assert not torch.equal(next(iter(mine)), next(ours(net, seed=1).trunk.parameters()))


# parity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('c', [1, 3])
@pytest.mark.parametrize('net', NETS)
def test_parity_with_lpips(net, c):
    "The package's own class, filled with the weights that our trunk drew from another seed."
    mine, ref = ours(net, seed=5), lpips_of_the_package(net)
    state = dict(zip(ref.net.state_dict(), mine.trunk.state_dict().values()))
    assert [v.shape for v in state.values()] == [v.shape for v in ref.net.state_dict().values()]
    ref.net.load_state_dict(state)
    a, x = pair(c=c, hw=(48, 35))
    theirs = lambda a, x: ref(*(2 * t.expand(-1, 3, -1, -1) - 1 for t in (a, x))).flatten()
    (v, g), (w, h) = both(mine, a, x), both(theirs, a, x)
    assert (
        w.min() > 1e-3 and (v - w).abs().max() < 1e-6 and (g - h).norm() < 1e-2 * h.norm()
    )  # a ReLU near zero may fall to either side
    mine, ref = copy.deepcopy(mine).double(), copy.deepcopy(ref).double()
    (v, g), (w, h) = both(mine, a.double(), x.double()), both(theirs, a.double(), x.double())
    assert (v - w).abs().max() < 1e-7 and h.abs().max() > 1e-4 and (g - h).abs().max() < 1e-7


def test_plain_vgg_by_hand():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = models.vgg16(weights=None).features.eval()
    a, x = pair(hw=(32, 32))
    norm = lambda t: (
        (t - torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    )
    with torch.no_grad():
        p, q, want = norm(a), norm(x), 0
        for k, layer in enumerate(layers[:9], 1):
            p, q = layer(p), layer(q)
            if k in (4, 9):
                want = want + (p - q).square().mean((1, 2, 3))
    assert torch.allclose(johnson()(a, x), want, rtol=1e-4, atol=1e-9) and want.min() > 1e-5


def test_formula_by_hand():
    "Unit length, channel weights, mean over places, sum over stages."
    w = [torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.5, 1.0, 3.0])]
    fn = FeatureDistance(Sum(), 'sum', ([0.5] * 3, [0.25] * 3), lins=w)
    a, x = pair()
    u = lambda f: f / f.square().sum(1, keepdim=True).sqrt()
    F1, F2 = [[u((t - 0.5) / 0.25), u((t[..., ::2, ::2] - 0.5) ** 2 / 0.0625)] for t in (a, x)]
    want = sum(((p - q) ** 2 * v[:, None, None]).sum(1).mean((1, 2)) for p, q, v in zip(F1, F2, w))
    assert torch.allclose(fn(a, x), want, rtol=1e-4)
    bare = FeatureDistance(Sum(), 'sum', ([0.5] * 3, [0.25] * 3))
    assert torch.allclose(
        bare(a, x), sum(((p - q) ** 2).sum(1).mean((1, 2)) for p, q in zip(F1, F2)), rtol=1e-4
    )


# what every distance must do ----------------------------------------------------------------------


@lru_cache
def johnson():
    return vgg((4, 9), 'random')


KINDS = {
    'ST-LPIPS-alex': lambda: st('alex'),
    'ST-LPIPS-vgg': lambda: st('vgg'),
    'ST-VGG features': lambda: vgg(weights='st'),
    **{n: (lambda n=n: ours(n, **(dict(seed=5) if n == 'vgg' else {}))) for n in NETS},
    'VGG features': johnson,
}


@pytest.fixture(scope='module', params=KINDS)
def fn(request):
    return KINDS[request.param]()


def test_each_picture_by_itself(fn):
    a, x = pair(b=4, c=1, hw=(40, 64))
    x[3], a[3] = 0, 1
    d = fn(a, x)
    assert d.shape == (4,) and (d > 0).all() and d.dtype == torch.float32
    assert torch.allclose(
        d, torch.cat([fn(a[k : k + 1], x[k : k + 1]) for k in range(4)]), rtol=1e-4, atol=1e-7
    )
    assert torch.allclose(fn(a.flip(0), x.flip(0)).flip(0), d, rtol=1e-4, atol=1e-7)
    assert torch.equal(fn(x, x), torch.zeros(4))
    assert torch.allclose(fn(x, a), d, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match='at least one image'):
        fn(a[:0], x[:0])


def test_grows_with_the_damage(fn):
    _, x = pair(c=1)
    noise = torch.randn(x.shape, generator=gen(7))
    d = torch.stack([fn(x + s * noise, x) for s in (0.01, 0.05, 0.2)])
    assert (d[1:] > d[:-1]).all()


def test_maps_make_up_the_distance(fn):
    a, x = pair(c=1)
    maps = fn.maps(a, x)
    assert all(m.shape[:2] == (2, 1) and (m >= 0).all() for m in maps)
    assert torch.allclose(sum(m.mean((1, 2, 3)) for m in maps), fn(a, x), rtol=1e-5)


def test_frozen_and_eval(fn):
    before, keep = {k: v.clone() for k, v in fn.state_dict().items()}, nn.Sequential(fn)
    keep.train()
    fn.train()
    fn.train(True)
    assert not any(m.training for m in fn.modules()) and not any(
        p.requires_grad for p in fn.parameters()
    )
    a, x = pair(c=1)
    d, g = both(fn, a, x)
    assert (
        g.abs().max() > 0
        and torch.isfinite(g).all()
        and not any(p.grad is not None for p in fn.parameters())
    )
    assert torch.equal(both(fn, a, x)[0], d) and all(
        torch.equal(v, before[k]) for k, v in fn.state_dict().items()
    )


def test_gradient_is_the_slope(fn):
    "Along its own gradient, the distance changes by what the gradient says."
    a, x = pair(b=1, c=1)
    _, g = both(fn, a, x)
    step = 1e-2 * g / g.norm()
    with torch.no_grad():
        slope = (fn(a + step, x) - fn(a - step, x)).item() / 2
    assert slope == pytest.approx((g * step).sum().item(), rel=0.05)


def test_gradients_of_flat_and_equal_pictures_are_finite(fn):
    x = torch.zeros(2, 1, 40, 40)
    x[1] = 1
    for a in (x.clone(), 1 - x):
        assert torch.isfinite(both(fn, a, x)[1]).all()
    assert (
        torch.isfinite(both(fn, x.clone(), x)[1]).all()
        and both(fn, x.clone(), x)[1].abs().max() < 1e-5
    )


def test_features_that_are_all_zero():
    """A vector of zeros has no unit length, and no slope of it:
    the square root of a sum would give NaN."""
    x = torch.zeros(2, 3, 8, 8)
    x[1] = 0.5
    fn, a = FeatureDistance(Sum(), 'sum', ([0.0] * 3, [1.0] * 3)), torch.zeros(2, 3, 8, 8)
    d, g = both(fn, a, x)
    assert torch.isfinite(g).all() and d[0] == 0 and d[1] > 0
    naive = a.clone().requires_grad_()
    naive.square().sum(1).sqrt().sum().backward()
    assert naive.grad.isnan().any()


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_float32_inside(fn, dtype):
    a, x = (t.to(dtype) for t in pair(c=1))
    d = fn(a, x)
    assert d.dtype == torch.float32 and torch.equal(d, fn(a.float(), x.float()))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(fn(a, x), d)


def test_nothing_of_the_input_changes(fn):
    a, x = pair(c=1)
    kept, state = (a.clone(), x.clone()), torch.random.get_rng_state()
    fn(a, x)
    assert (
        torch.equal(a, kept[0])
        and torch.equal(x, kept[1])
        and torch.equal(state, torch.random.get_rng_state())
    )


def test_making_one_leaves_the_random_state():
    state = torch.random.get_rng_state()
    lpips('squeeze', 'random')
    assert torch.equal(state, torch.random.get_rng_state())


# ranges, channels, sizes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    'make',
    [
        lambda r: lpips('squeeze', 'random', range=r),
        lambda r: st_lpips(range=r),
    ],
)
@pytest.mark.parametrize('low, high', [(-1, 1), (0, 255), (-0.5, 0.5), (16, 235)])
def test_ranges_are_the_same_picture(make, low, high):
    a, x = pair(c=1)
    to = lambda t: low + (high - low) * t
    assert torch.allclose(make((low, high))(to(a), to(x)), make((0, 1))(a, x), rtol=1e-3)


def test_range_that_was_not_declared():
    a, x = pair(c=1)
    wrong = lpips('alex', 'random', range=(-1, 1))
    assert (
        wrong(a, x).mean() < 0.9 * ours()(a, x).mean()
    )  # the bug that the class cannot see: [0, 1] lies within [-1, 1]
    for t in (2 * x - 1, x * 255, x + 0.02):
        with pytest.raises(ValueError, match='x (reaches|holds)'):
            ours()(a, t)
    assert ours()(a, x * 1.009).shape == (2,)
    for bad in ((1, 0), (0, 0), ('a', 1), (0, float('nan'))):
        with pytest.raises((TypeError, ValueError), match='range is'):
            plain(range=bad)


def test_a_prediction_may_overshoot_and_keeps_its_gradient():
    a, x = pair(c=1)
    a = a + 1.2
    _, g = both(ours(), a, x)
    assert (g != 0).float().mean() > 0.9 and both(lambda a, x: ours()(a.clamp(0, 1), x), a, x)[
        1
    ].abs().max() == 0
    with pytest.raises(ValueError, match='x_hat holds'):
        ours()(a * torch.nan, x)
    with pytest.raises(ValueError, match='x_hat reaches'):
        ours()(a * 255, x)


@pytest.mark.parametrize('net', ['alex', 'squeeze'])
def test_grey_is_three_equal_channels(net):
    a, x = pair(c=1)
    assert torch.allclose(
        ours(net)(a, x), ours(net)(a.expand(-1, 3, -1, -1), x.expand(-1, 3, -1, -1)), rtol=1e-5
    )


def test_channels_and_shapes():
    a, x = pair()
    for c in (2, 4):
        t = torch.rand(1, c, 40, 40)
        with pytest.raises(ValueError, match='channels'):
            ours()(t, t)
    with pytest.raises(ValueError, match='channels'):
        FeatureDistance(nn.Identity(), 'grey', ([0.5], [0.5]), channels=1)(a, x)
    with pytest.raises(ValueError, match='equal shapes'):
        ours()(a, x[:1])
    with pytest.raises(ValueError, match='equal shapes'):
        ours()(a[:, :1], x)
    with pytest.raises(ValueError, match='expected'):
        ours()(a[0], x[0])
    with pytest.raises(TypeError):
        ours()((a * 255).to(torch.uint8), (x * 255).to(torch.uint8))
    for bad in (dict(net='resnet'), dict(net='alex', weights='nonsense')):
        with pytest.raises(ValueError, match=list(bad)[-1]):
            lpips(**bad)
    with pytest.raises(ValueError, match='small is'):
        lpips('alex', 'random', small='crop')


@pytest.mark.parametrize('net', NETS)
def test_small_pictures(net):
    least, fn = NETS[net]['least'], ours(net, **(dict(seed=5) if net == 'vgg' else {}))
    strict = copy.copy(fn)
    strict.small = 'error'
    assert fn.smallest == strict.smallest == least
    for hw in ((least, least), (least, 2 * least)):
        a, x = pair(hw=hw)
        assert torch.isfinite(strict(a, x)).all() and torch.equal(strict(a, x), fn(a, x))
    for hw in ((least - 1, 40), (40, least - 1), (5, 7), (1, 1)):
        a, x = pair(hw=hw)
        assert torch.isfinite(d := fn(a, x)).all() and (d > 0).all()
        with pytest.raises(ValueError, match=f'at least {least} pixels'):
            strict(a, x)


def test_trunk_cuts():
    trunk, x = johnson().trunk, torch.rand(1, 3, 32, 32)
    assert [tuple(f.shape) for f in trunk(x)] == [(1, 64, 32, 32), (1, 128, 16, 16)] and all(
        (f >= 0).all() for f in trunk(x)
    )
    with pytest.raises(ValueError, match='net is'):
        Trunk('resnet')
    before, after = Trunk('squeeze', 'random', cuts=(1, 2))(x)
    assert (before < 0).any() and torch.equal(
        after, before.relu()
    )  # no layer writes into what a stage gave


# dead stages, kinds of numbers, states ------------------------------------------------------------


def dead(net='alex', stage=4, scale=0.0, **kw):
    "LPIPS with a stage whose features are all zero, or nearly."
    fn = copy.deepcopy(ours(net, **kw))
    for p in fn.trunk.stages[stage].parameters():
        p.data.mul_(scale)
    return fn


def test_parity_in_double_to_eight_digits():
    "Also the pictures stay in double precision."
    mine, ref = (
        copy.deepcopy(ours('alex', seed=5)).double(),
        copy.deepcopy(lpips_of_the_package('alex')).double(),
    )
    ref.net.load_state_dict(dict(zip(ref.net.state_dict(), mine.trunk.state_dict().values())))
    g = gen(7)
    a, x = (torch.rand(2, 3, 40, 40, generator=g, dtype=torch.float64) for _ in range(2))
    (v, d), (w, e) = both(mine, a, x), both(lambda a, x: ref(2 * a - 1, 2 * x - 1).flatten(), a, x)
    assert (
        v.dtype == torch.float64
        and (v - w).abs().max() < 1e-8
        and (d - e).abs().max() < 1e-8
        and e.abs().max() > 1e-4
    )


@pytest.mark.parametrize('scale', [0.0, 1e-4, 1e-12, 1e-30])
def test_a_dead_stage_counts_nothing_and_has_finite_derivatives(scale):
    fn, (a, x) = dead(scale=scale), pair()
    v, g = both(fn, a, x)
    assert v.isfinite().all() and g.isfinite().all() and g.abs().max() > 0
    if not scale:
        assert torch.allclose(v, sum(d.mean((1, 2, 3)) for d in fn.maps(a, x)[:4]), atol=1e-7)
    b = a[:1, :, :32, :32].clone().requires_grad_()
    (g,) = torch.autograd.grad(fn(b, x[:1, :, :32, :32]).sum(), b, create_graph=True)
    (second,) = torch.autograd.grad(g.square().sum(), b)  # of a penalty on the gradient
    assert second.isfinite().all() and second.abs().max() > 0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', [1.0, 1e-4, 0.0])
def test_autocast_changes_nothing(dtype, scale):
    fn, (a, x) = dead(scale=scale), pair()
    want, slope = both(fn, a, x)
    with torch.autocast('cpu', dtype):
        v, g = both(fn, a, x)
    assert torch.equal(v, want) and v.dtype == torch.float32 and torch.allclose(g, slope, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_pictures_and_of_the_network(dtype):
    fn, (a, x) = ours(), pair()
    a, x = a.to(dtype), x.to(dtype)
    want = fn(a.float(), x.float())
    assert torch.equal(fn(a, x), want) and torch.equal(fn(a, x.float()), want)
    own = copy.deepcopy(fn).to(dtype)(a, x)
    assert own.dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    ) and torch.allclose(own.float(), want, rtol=0.2)


def test_under_default_float64_it_is_the_same_network():
    torch.set_default_dtype(torch.float64)
    try:
        fn = lpips('squeeze', 'random')
    finally:
        torch.set_default_dtype(torch.float32)
    assert {v.dtype for v in fn.state_dict().values()} == {torch.float32} and fn(
        *pair()
    ).dtype == torch.float32


def test_making_one_leaves_the_callers_random_state_alone(monkeypatch):
    def forbidden(*_):
        raise AssertionError('it would seed every GPU of the caller')

    monkeypatch.setattr(torch.cuda, 'manual_seed_all', forbidden)
    state = lambda: (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))
    before = state()
    fn = lpips('squeeze', 'random', seed=np.int64(3))
    fn(*pair())
    assert state() == before and all(
        torch.equal(p, q) for p, q in zip(fn.parameters(), ours('squeeze', seed=3).parameters())
    )


def test_what_a_picture_is_standardised_with_is_in_the_state(tmp_path):
    a, b = FeatureDistance(Sum(), 'sum', ([0.3], [0.2]), channels=1), plain()
    b.load_state_dict(saved(a, tmp_path / 'w.pt'))
    y, x = pair(c=1)
    assert torch.equal(a(y, x), b(y, x)) and not torch.allclose(plain()(y, x), b(y, x))


def test_an_empty_batch_has_no_distances():
    with pytest.raises(ValueError, match='at least one image'):
        ours()(torch.rand(0, 3, 40, 40), torch.rand(0, 3, 40, 40))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu():
    a, x = pair(c=1)
    for fn in (lpips('alex', 'random'), st_lpips()):
        d = fn(a, x)
        assert torch.allclose(fn.cuda()(a.cuda(), x.cuda()).cpu(), d, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('net', ST)
@pytest.mark.parametrize('scale', [0.0, 1e-30])
def test_a_dead_stage_of_st(net, scale):
    fn, (a, x) = copy.deepcopy(st(net)), pair(hw=(32, 32), b=1)
    for p in fn.trunk.stages[4].parameters():
        p.data.mul_(scale)
    for b in (a, x):
        b = b.clone().requires_grad_()
        (g,) = torch.autograd.grad(fn(b, x).sum(), b, create_graph=True)
        (second,) = torch.autograd.grad(g.square().sum(), b)
        assert g.isfinite().all() and second.isfinite().all()


@pytest.mark.parametrize('net', ST)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_st_under_autocast(net, dtype):
    a, x = pair(hw=(32, 32))
    want, slope = both(st(net), a, x)
    for p, q in ((a, x), (a.double(), x.double())):
        with torch.autocast('cpu', dtype):
            v, g = both(st(net), p, q)
        assert torch.equal(v, want) and v.dtype == torch.float32
        assert torch.allclose(g.float(), slope, atol=1e-9)


# bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'make, one, other, says',
    [
        (plain, dict(range=(-1, 1)), dict(), r'range=\[-1.0, 1.0\], but it is \[0.0, 1.0\] here'),
        (plain, dict(unit=False), dict(), 'unit=False'),
        (
            lambda layers: vgg(layers, 'st'),
            dict(layers=(4, 9)),
            dict(layers=(4, 8)),
            r'trunk.cuts=\[4, 9\]',
        ),
    ],
)
def test_the_state_of_another_distance_is_refused(make, one, other, says, tmp_path):
    a, b = make(**one), make(**other)
    for state in (a.state_dict(), saved(a, tmp_path / 'w.pt')):
        with pytest.raises(RuntimeError, match=says):
            b.load_state_dict(state)
        make(**one).load_state_dict(state)


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda: plain(range=(0, math.inf)), ValueError, 'range is inf'),
        (
            lambda: FeatureDistance(Sum(), 'sum', ([0.0], [0.0]), channels=1),
            ValueError,
            'std in stats is 0',
        ),
        (
            lambda: FeatureDistance(Sum(), 'sum', ([math.nan], [1.0]), channels=1),
            ValueError,
            'mean in stats is nan',
        ),
        (
            lambda: FeatureDistance(Sum(), 'sum', ([0.0] * 2, [1.0] * 2)),
            ValueError,
            'stats holds 2 numbers as mean; expected 1 or 3',
        ),
        (
            lambda: FeatureDistance(
                Sum(), 'sum', ([0.0] * 3, [1.0] * 3), lins=[torch.tensor([1.0, -1.0, 1.0])]
            ),
            ValueError,
            'lins holds',
        ),
        (lambda: vgg((), 'random'), ValueError, r'cuts is \(\)'),
        (lambda: vgg((9, 4), 'random'), ValueError, 'rising'),
        (lambda: vgg((4, 40), 'random'), ValueError, 'cuts is 40'),
        (lambda: Trunk('alex', 'random', cuts=(5, 20)), ValueError, 'at most 13'),
        (lambda: vgg((4, 9.5), 'random'), ValueError, 'cuts is 9.5'),
        (lambda: Trunk('alex', 'random', seed=1.5), ValueError, 'seed is 1.5'),
        (
            lambda: ours()(torch.rand(1, 3, 0, 8), torch.rand(1, 3, 0, 8)),
            ValueError,
            'at least one pixel',
        ),
        (lambda: Trunk('resnet', 'random'), ValueError, "net is 'resnet'"),
        (lambda: lpips(['alex'], 'random'), ValueError, 'net is'),
        (lambda: st_lpips('squeeze'), ValueError, "expected 'alex' or 'vgg'"),
        (lambda: lpips('alex', 'st'), ValueError, 'shift-tolerant: st_lpips'),
        (lambda: vgg(weights='imagenet'), ValueError, "weights is 'imagenet'"),
        (lambda: lpips('alex', 'random', seed='1'), TypeError, 'seed is'),
    ],
)
def test_what_does_not_fit_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()
