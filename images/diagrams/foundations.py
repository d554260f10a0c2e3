"Drawings of lessons 00 to 04, one function each; names and shapes as the code has them."

from vocabulary import Drawing


def data():
    d = Drawing(
        '00_data',
        424,
        'From a file to a batch, and five traps on the way',
    )
    file = d.box(70, 90, 'file\n(h, w, 3)\nuint8, 0 to 255', 'data', w=132)
    image = d.box(292, 90, 'image\n(3, h, w)\nfloat32, 0 to 1', 'data', w=132)
    names = ('train (8)', 34), ('valid (2)', 90), ('test (3)', 146)
    splits = [d.box(452, y, name, 'data', w=92) for name, y in names]
    crops = d.box(572, 34, 'Crops')
    batch = d.box(698, 34, 'batch\n(b, 3, 64, 64)', 'data', w=116)
    choose = d.box(648, 90, 'to choose settings', w=216)
    score = d.box(648, 146, 'to score, once', w=216)
    d.arrow(file, image, 'read_image')
    for split in splits:
        d.arrow((image, 'right'), (split, 'left'))
    d.chain([splits[0], crops, batch])
    d.arrow(splits[1], choose)
    d.arrow(splits[2], score)
    traps = [
        (70, 126, '1. eight bits:\n3 - 4 = 255'),
        (204, 122, '2. axes: reshape\nis no permute'),
        (335, 122, '3. range: 255\ntaken for 1'),
        (468, 126, '4. figure: stretch\nhides errors'),
        (647, 208, '5. split: crops of one photo\nin two parts leak'),
    ]
    starts = [file.at('bottom'), *(image.at('bottom', share) for share in (0.2, 0.45, 0.92))]
    starts.append(splits[2].at('bottom', 0.7))
    ends = [x for x, _, _ in traps[:3]] + [425, 647]           # of the last two, lines with a bend
    for k, ((x, w, text), start, end) in enumerate(zip(traps, starts, ends)):
        box = d.node(x, 216, w, 46, 'loss')
        bend = [(start[0], 178), (end, 178)] if k > 2 else []
        line = [(end, box.edges()[1]), *reversed(bend), start]
        d.path(line, look='line dashed', head=False)
        first, second = text.split('\n')
        d.write(box, first).lines[-1].y = -9
        d.write(box, second).lines[-1].y = 9
    large = d.box(70, 296, 'HR folder\nx (c, 4h, 4w)', 'data', w=132)
    small = d.box(70, 362, 'LR folder\ny (c, h, w)', 'data', w=132)
    pairs = d.box(292, 329, 'PairedFolder\nsame name, 4 times as\nlarge, same scene', w=190)
    cut = d.box(500, 329, 'Crops\nsame place, same pose', w=180)
    both = d.box(690, 329, 'batch of pairs\n(b, c, 16, 16)\n(b, c, 64, 64)', 'data', w=132)
    d.arrow((large, 'right'), (pairs, 'left'))
    d.arrow((small, 'right'), (pairs, 'left'))
    d.chain([pairs, cut, both])
    d.legend(412, 'data', 'op', ('loss', 'trap'))
    return d


def degrade():
    d = Drawing(
        '01_degrade',
        302,
        'A clean image is blurred and shrunk (linear), mixed with constants and noise (affine) and '
        'saved as JPEG; one generator draws every level',
    )
    mid, low = 124, 236
    x, y = d.box(24, mid, 'x', 'data', w=36), d.box(736, mid, 'y', 'data', w=36)
    d.frame(66, 30, 322, 166, 'linear: has an adjoint')
    d.frame(338, 30, 598, 166, 'affine: A x + b')
    soft = d.box(124, mid, 'blur\nk ∗ x', w=92)
    down = d.box(252, mid, 'bicubic_down\nM x M′, no clip', w=124)
    mix = d.box(408, mid, 'masks, rain\n(1 − m) x + m v', w=126)
    noise = d.box(542, mid, 'gaussian\nx + σ ε', w=96)
    file = d.box(656, mid, 'jpeg\nrounds', w=76)
    d.chain([x, soft, down, mix, noise, file, y])
    d.note(252, 82, '(b, c, h/s, w/s)')
    d.note(124, 82, '(b, c, h, w)')
    d.note(408, 82, 'm (b, 1, h, w)')
    levels = 'a level for each image: a number, (b,) or (low, high)'
    draws = d.box(396, low, f'generator\n{levels}', 'cond', w=640)
    for box, word in ((soft, 'k (b, k, k)'), (mix, 'm'), (noise, 'σ, ε'), (file, 'quality')):
        d.path([(box.x, draws.edges()[1]), box.at('bottom')], word, look='to-cond', shift=21)
    d.legend(286, 'data', 'op', ('cond', 'random numbers of a seed'))
    return d


def metrics():
    d = Drawing(
        '02_metrics',
        344,
        'Three scores of a restored image, and what fools each of them',
    )
    rows = 48, 152, 256
    x_hat, x = d.box(34, 120, 'x_hat', 'data', w=62), d.box(34, 184, 'x', 'data', w=62)
    firsts = ('x_hat − x', 'op'), ('window_mean\n11 × 11', 'op'), ('Trunk\nconvolutions', 'net')
    seconds = 'square', 'formula', 'F.normalize\nw · square'
    between = '(b, c, h, w)', 'μ, σ², cov\n(b, c, h′, w′)', 'five stages\n(b, c′, h′, w′)'
    names = 'PSNR\n(b,) dB', 'SSIM\n(b,), 1: equal', 'ST-LPIPS\n(b,), 0: equal'
    means = 'mean', 'mean', 'mean,\nsum'
    traps = (
        'a shift,\na wrong range',
        'a shift,\na small hole,\na wrong range',
        'a small hole,\nlearned noise,\na wrong range',
    )
    for y, first, shape, second, mean, name, trap in zip(
        rows, firsts, between, seconds, means, names, traps
    ):
        start = d.box(168, y, first[0], first[1], w=126)
        middle = d.box(410, y, second, w=104)
        score = d.box(560, y, name, 'data', w=104)
        lines = trap.split('\n')
        fooled = d.node(693, y, 132, 14 + 17 * len(lines), 'loss')
        for k, line in enumerate(lines):
            d.write(fooled, line).lines[-1].y = 17 * (k - (len(lines) - 1) / 2)
        words = shape.split('\n')
        d.arrow(start, middle, words[0], words[1] if len(words) > 1 else '')
        words = mean.split('\n')
        d.arrow(middle, score, words[0], words[1] if len(words) > 1 else '')
        d.path([fooled.at('left'), score.at('right')], look='line dashed', head=False)
        d.path([(88, 152), (88, y), start.at('left')] if y != 152 else [(88, y), start.at('left')])
    for image in (x_hat, x):
        d.path([image.at('right'), (88, image.y), (88, 152)], head=False)
    d.legend(326, 'data', 'op', ('net', 'frozen network'), ('loss', 'what fools it'))
    return d


def learner():
    d = Drawing(
        '03_learner',
        572,
        'Where a Learner calls its callbacks: around the fit, after each step, around validation',
    )
    x, w, says = 112, 124, 200

    def at(y, name, text, kind='op'):
        d.note(says, y, text, 'start')
        return d.box(x, y, name, kind, w=w)

    begin = at(20, 'before_fit', 'EMA copies the weights, Progress opens its bar', 'event')
    d.frame(14, 54, 746, 522, 'while step < steps', 'end')
    d.frame(30, 82, 730, 168, 'one_step', 'end')
    step = [
        ('set_rates', 'op'),
        ('zero_grad', 'op'),
        ('one_batch\n× accumulate', 'loss'),
        ('clip_grad_norm_', 'op'),
        ('opt.step', 'net'),
    ]
    step = d.row(134, step, 48, 716)
    d.chain(step)
    log = at(196, 'log', 'a row of history: the mean of each loss term, every half percent')
    after = at(244, 'after_step', 'EMA averages, Progress moves, LiveCurve draws', 'event')
    d.frame(30, 276, 730, 446, 'validate: every valid_every steps, and at the end', 'end')
    before = at(322, 'before_valid', 'EMA puts its average in the place of the weights', 'event')
    valid = at(370, 'loss, Metrics', 'over the batches of valid, in evaluation mode')
    back = at(418, 'after_valid', 'EMA puts the weights back', 'event')
    save = at(486, 'save', 'every save_every steps: model, optimizer, state of each callback')
    end = at(550, 'after_fit', 'also after an error; Progress closes its bar', 'event')
    d.legend(550, ('event', 'event: called on every callback'), left=510)
    d.path([begin.at('bottom'), (x, 116)])
    d.arrow((step[-1], 'bottom'), (log, 'top'), mid=0.4)
    d.chain([log, after, before, valid, back, save, end])
    d.path([save.at('left'), (22, 486), (22, 134), step[0].at('left')])
    return d


def audit():
    d = Drawing(
        '04_audit',
        408,
        'Where each check looks: at the way from the truth to a score, and at a training step',
    )
    top, row, low = 42, 142, 318

    def check(x, y, text):
        return d.box(x, y, text, 'event')

    x = d.box(24, row, 'x', 'data', w=38)
    degrade = d.box(108, row, 'degrade')
    y = d.box(198, row, 'y', 'data', w=38)
    model = d.box(338, row, 'model', 'net', w=112, h=48)
    x_hat = d.box(476, row, 'x_hat', 'data')
    metric = d.box(586, row, 'metric')
    score = d.box(704, row, '35 dB', 'data')
    d.chain([x, degrade, y, model, x_hat, metric, score])
    gap = check(112, top, 'oracle_gap\nan input that only\ntraining has?')
    d.path([(164, gap.edges()[3]), (164, 104), (198, 104), y.at('top')])
    d.arrow(check(278, top, 'stateless\ndoes something\nstay behind?'), (model, 'top'))
    ranges = check(432, top, 'identity_check\nthe right range?')
    d.arrow((ranges, 'bottom', 0.8), (metric, 'top'))
    room = check(572, top, 'headroom\nis it possible?')
    d.path([(602, room.edges()[3]), (602, 96), (690, 96), (690, score.edges()[1])])
    chance = check(696, top, 'compare\nis it chance?')
    d.path([(712, chance.edges()[3]), (712, score.edges()[1])])
    reads = check(172, 228, 'reads_truth\nis there such a way?')
    d.path([x.at('bottom'), (24, 228), reads.at('left')], look='line dashed', head=False)
    d.path([reads.at('right'), (318, 228), (318, 166)], look='line dashed')
    weights = d.box(50, low, 'weights\nof a file', 'data')
    load = check(190, low, 'load_report\nwere they copied?')
    d.chain([weights, load])
    d.path([load.at('right'), (338, low), (338, 166)])
    loss = d.box(704, low, 'loss', 'loss', w=60)
    d.path([x_hat.at('bottom'), (476, row + 60), (714, row + 60), (714, low - 16)])
    truth = d.box(620, 252, 'x', 'data', w=38)
    d.path([truth.at('right'), (694, 252), (694, low - 16)])
    learns = check(520, low, 'audit_gradient\nwhere does it end?')
    d.path([loss.at('left'), learns.at('right')], look='to-loss dashed')
    d.path([learns.at('left'), (358, low), (358, 166)], look='to-loss dashed', label='gradient')
    d.legend(390, 'data', 'net', 'op', 'loss', ('event', 'a check of this lesson'))
    return d


def foundations():
    return [data(), degrade(), metrics(), learner(), audit()]
