from functools import cache, partial

import torch

from .callbacks import Callback
from .checks import check_number, check_whole
from .codecs import ceiling
from .data_files import check_choice
from .degrade import bicubic_up
from .knobs import Knobbed
from .metrics import evaluate, psnr
from .perceptual import PerceptualSRLoss
from .project import budget_mode
from .records import record_study, studies
from .superres import LatentSR, make_sr
from .superres_study import CoreClock, clock_of, middle_piece, superres_sets
from .superres_training import SRConfig, SRLoss, sr_learner
from .trunks import st_lpips
from .weights import ProgressiveLam, spread, step_weights

WEIGHTS_LESSON = '17_weights'
WEIGHTS_STEPS = 400
# two levels of a grey image, the finer one resized by convolutions that are learned first
WEIGHTS_SIZE = dict(codec='learnable', codec_steps=400, crop=256, batch=3)
WEIGHTS_WINDOW = 128  # side of the window that the distance is taken in while training, pixels
WEIGHTS_JUDGED = 12  # validation images
WEIGHT_WAYS = {  # name -> weight, or the first and the last; by thirds of the time steps?
    'squared error': dict(lam=None),
    '0.5': dict(lam=0.5),
    '0.1': dict(lam=0.1),
    '0.01 to 0.15': dict(lam=(0.01, 0.15)),
    '0.5 by thirds': dict(lam=0.5, thirds=True),
    '0.01 to 0.15 by thirds': dict(lam=(0.01, 0.15), thirds=True),
}


def weights_config(
    seed=0,
    steps=WEIGHTS_STEPS,
    precision='no',  # or 'bf16'
) -> SRConfig:
    "How every row is trained, but for its weights."
    return SRConfig(seed=seed, steps=steps, precision=precision, **WEIGHTS_SIZE)

class Windowed(Knobbed):
    "A distance, taken in one random window of a batch's images: forward(x_hat, x) -> (b,)."

    def __init__(self,
        distance,  # a FeatureDistance
        side=WEIGHTS_WINDOW,  # pixels; smaller images are taken whole
    ):
        super().__init__()
        self.distance, self.side = distance, check_whole(side, 'side', 1)
        self.name = f'{distance.name} in {self.side} x {self.side}'

    def own_knobs(self):
        return dict(side=self.side)

    def forward(self, x_hat, x):  # (b, c, h, w) twice
        h, w = (min(self.side, n) for n in x.shape[-2:])
        top, left = (int(torch.randint(n - k + 1, ())) for n, k in zip(x.shape[-2:], (h, w)))
        cut = (..., slice(top, top + h), slice(left, left + w))
        return self.distance(x_hat[cut], x[cut])

class LossParts(Callback):
    "Squared error and weighted distance of each step; a resumed run goes on with them."

    def __init__(self, loss):
        self.loss, self.seen = loss, []

    def __getstate__(self):  # what it saw is no setting
        return dict(loss=self.loss, seen=[])

    def after_step(self, learn):
        terms = getattr(self.loss, 'terms', None)
        pair = (terms['mse'], terms['perceptual']) if terms else (self.loss.last.mean.item(), 0.0)
        self.seen.append([float(v) for v in pair])

    def state(self):
        return dict(seen=[list(pair) for pair in self.seen])

    def load_state(self, state):
        self.seen = [list(pair) for pair in state['seen']]


def loss_figures(
    seen,  # (mse, weighted distance) of each step
) -> dict:
    "What the second half of a training says of its loss."
    late = torch.tensor(seen[len(seen) // 2 :], dtype=torch.float64)
    total = late.sum(1)
    s = spread(total)
    return {
        'loss, mean': s.mean,
        'loss, absolute spread': s.absolute,
        'loss, relative spread': s.relative,
        'loss, largest over smallest': (total.max() / total.min()).item(),
        'perceptual part over squared error': (late[:, 1].sum() / late[:, 0].sum()).item(),
    }

@cache
def _distance(net):
    return st_lpips(net)


def weighted_loss(
    name,  # a key of WEIGHT_WAYS
    process,  # a ResidualShift
):  # an SRLoss, callbacks that it needs
    "The loss of a row."
    check_choice(name, WEIGHT_WAYS, 'name')
    lam, by_step = WEIGHT_WAYS[name]['lam'], None
    if lam is None:
        return SRLoss(), []
    if WEIGHT_WAYS[name].get('thirds'):
        by_step = step_weights(torch.arange(process.steps), process.steps)
    rises = isinstance(lam, tuple)
    first = lam[0] if rises else lam
    loss = PerceptualSRLoss(Windowed(_distance('alex')), check_number(first, 'lam', 0), by_step)
    return loss, [ProgressiveLam(loss, *lam)] if rises else []


def weights_learner(
    name,  # a key of WEIGHT_WAYS
    config,  # an SRConfig
    sets,  # of `superres_sets`
):  # a Learner; it logs nothing on the way
    "What trains a row, on a GPU where there is one."
    model = make_sr(config, sets['train'])
    loss, cbs = weighted_loss(name, model.process)
    return sr_learner(model, sets['train'], loss=loss, cbs=[*cbs, CoreClock(), LossParts(loss)])

WEIGHTS_WALKS = (1, 15)  # steps


def _seen_by(net, x_hat, x):
    return _distance(net)(x_hat, x)


_SCORES = {'PSNR': psnr, 'ST-LPIPS': partial(_seen_by, 'alex'), 'judge': partial(_seen_by, 'vgg')}


def judged_pieces(
    sets,  # of `superres_sets`
) -> list:  # of pairs (y, x)
    "What rows are scored on."
    side = WEIGHTS_SIZE['crop'] // 4
    return [middle_piece(*pair, side=side) for pair in sets['RoadScene'][:WEIGHTS_JUDGED]]


def _scored(way, pieces, walk):
    means = evaluate(way, pieces, _SCORES).mean
    return {f'{k}, {walk}': round(v, 4) for k, v in means.items()}


def _walk(model, steps, y):
    return model(y, steps=steps, generator=torch.Generator().manual_seed(0)).clamp(0, 1)


@torch.no_grad()
def weights_figures(
    model: LatentSR,
    pieces,  # of `judged_pieces`
) -> dict:
    "What a trained model scores."
    model = model.cpu()
    found = {}
    for n in WEIGHTS_WALKS:
        found |= _scored(partial(_walk, model, n), pieces, f'{n} step{"s" * (n > 1)}')
    best = [psnr(ceiling(model.codec, x[None], bicubic_up(y[None], 4)).clamp(0, 1), x[None]).item()
            for y, x in pieces]
    return found | {'PSNR, ceiling': round(sum(best) / len(best), 2)}

def weights_row(
    name,  # a key of WEIGHT_WAYS
    steps=WEIGHTS_STEPS,
    precision='no',
) -> dict:
    "The configuration of a row, beside its seed."
    check_choice(name, [*WEIGHT_WAYS, 'bicubic'], 'name')
    side = WEIGHTS_SIZE['crop'] // 4
    return dict(name=name, latent=f'{side} x {side}', steps=steps, precision=precision,
                window=WEIGHTS_WINDOW, **WEIGHTS_SIZE)


def _is_kept(config, seed):
    rows = studies(WEIGHTS_LESSON)
    return any(r['config'] == config and r['seed'] == seed for r in rows)


def record_weights(
    name,  # a key of WEIGHT_WAYS
    seed,
    steps,
    precision,
    sets,  # of `superres_sets`
    pieces,  # of `judged_pieces`
):
    "Trains, scores and records one row."
    learn = weights_learner(name, weights_config(seed, steps, precision), sets)
    learn.fit_or_load('17_study', dict(name=name), steps)
    [parts] = [cb for cb in learn.cbs if isinstance(cb, LossParts)]
    found = loss_figures(parts.seen) | weights_figures(learn.trained(), pieces)
    minutes = clock_of(learn) / 60
    record_study(WEIGHTS_LESSON, weights_row(name, steps, precision), found, minutes, seed)
    print(f'{name}, seed {seed}: {found["PSNR, 1 step"]:.2f} dB, {minutes:.1f} min', flush=True)


def weights_study(
    names=None,  # keys of WEIGHT_WAYS; None: all
    seeds=(0, 1, 2),
    steps=WEIGHTS_STEPS,
    precision='no',  # or 'bf16'
):
    "Trains and records what is missing, seed by seed, on one thread; needs RESTORE_BUDGET=study."
    names = list(WEIGHT_WAYS) if names is None else list(names)
    for name in names:
        check_choice(name, WEIGHT_WAYS, 'name')
    steps, seeds = check_whole(steps, 'steps', 4), [check_whole(s, 'seeds', 0) for s in seeds]
    if budget_mode() != 'study':
        raise ValueError(f"RESTORE_BUDGET gives {budget_mode()!r}; expected 'study': "
                         'rows are kept under it alone')
    torch.set_num_threads(1)
    sets = superres_sets()
    pieces = judged_pieces(sets)
    floor = weights_row('bicubic', 0)
    if not _is_kept(floor, 0):
        large = partial(bicubic_up, scale=4)
        record_study(WEIGHTS_LESSON, floor, _scored(large, pieces, '1 step'), 0)
    for seed in seeds:
        for name in names:
            if not _is_kept(weights_row(name, steps, precision), seed):
                record_weights(name, seed, steps, precision, sets, pieces)
