"Drawings of lessons 11 to 20, one function each; names and shapes as the code has them."

from vocabulary import Drawing, Node

QUARTERS = dict(LL=(0, 0), HL=(1, 0), LH=(0, 1), HH=(1, 1))  # band: column and row
ORDER = 'LL', 'LH', 'HL', 'HH'  # of the code


def bands(d, x, y, size, split, kind, name=None):
    """A square around (x, y) cut into four bands, those in `split` into four once more; `kind`
    and `name` are functions of a band's path, such as ('LL',) or ('LH', 'HH')."""

    def draw(path, x, y, size):
        for band, (i, j) in QUARTERS.items():
            at = x + (i - 0.5) * size / 2, y + (j - 0.5) * size / 2
            if not path and band in split:
                draw((band,), *at, size / 2)
                continue
            cell = d.node(*at, size / 2 - 2, size / 2 - 2, kind((*path, band)), 2)
            if name:
                d.write(cell, name((*path, band)))

    draw((), x, y, size)
    return Node(x, y, size, size)


def wavelets():
    d = Drawing(
        '11_wavelets',
        476,
        'dwt2 splits an image into LL, LH, HL and HH; wavedec2 splits LL again, packet2 all four',
    )
    middle, upper, lower, size, right = 240, 124, 360, 200, 536

    def kind(path):
        return 'data' if set(path) == {'LL'} else 'op'

    def name(path):
        if len(path) == 1:
            return path[0] + '1'
        return path[1] + '2' if path[0] == 'LL' else f'{path[0]}1.{ORDER.index(path[1])}'

    x = d.write(d.node(58, middle, 112, 112, 'data', 2), 'x')
    d.note(58, middle + 70, '(b, c, h, w)', ink='label')
    one = bands(d, 280, middle, 150, (), kind, lambda path: path[0])
    d.note(280, middle + 89, 'each (b, c, h/2, w/2)', ink='label')
    d.arrow(x, one, 'dwt2')
    for y, split, text, shapes in (
        (
            upper,
            'LL',
            'wavedec2: LL is split again',
            '(b, c,\nh/4, w/4)\nand, finer,\n(b, c,\nh/2, w/2)',
        ),
        (lower, ORDER, 'packet2: all four are split again', 'one tensor\n(b, 16·c,\nh/4, w/4)'),
    ):
        two = bands(d, right, y, size, split, kind, name)
        d.note(right - size / 2, y - 112, text, 'start', bold=True)
        d.note(right + size / 2 + 12, y, shapes, 'start', ink='label')
        d.path([one.at('right'), (396, middle), (396, y), two.at('left')])
    named = 'LL: averages\nLH: horizontal edges\nHL: vertical edges\nHH: diagonals'
    d.note(0, 90, named, 'start')
    return d


def codecs():
    d = Drawing(
        '12_codecs',
        330,
        'A codec gives a latent z, which a network restores, and a side, which stays that of the '
        'degraded image; the codecs differ in the bands that they put into z',
    )
    y = 32
    chain = [('y', 'data'), ('codec.encode', 'op'), ('network', 'net'), ('codec.decode', 'op')]
    chain = d.row(y, [*chain, ('x_hat', 'data')], 40, 720)
    d.chain(chain, ['', 'z', 'z_hat'])
    encode, decode = chain[1], chain[3]
    turn = [encode.at('bottom'), (encode.x, 78), (decode.x, 78), decode.at('bottom')]
    d.path(turn, '', 'side: the bands that nothing restores')
    finer = {(band,) for band in ORDER[1:]}
    four = {('LL', band) for band in ORDER}
    kinds = (
        ('ll', 'LLCodec', 'c channels', {('LL', 'LL')}, ('LL',)),
        ('llhh', 'LLHHCodec', '2·c channels', {('LL', 'LL'), ('LL', 'HH')}, ('LL',)),
        ('full', 'FullBandCodec', '4·c channels', four, ('LL',)),
        ('all', 'AllBandsCodec', '7·c channels', four | finer, ('LL',)),
        ('packet', 'PacketCodec', '16·c channels', {(a, b) for a in ORDER for b in ORDER}, ORDER),
    )
    for k, (name, cls, shape, inside, split) in enumerate(kinds):
        x = 66 + 157 * k
        small = 'data dashed' if name == 'all' else 'data'

        def kind(path):
            return 'op' if path not in inside else small if len(path) == 1 else 'data'

        d.note(x, 132, name, bold=True)
        bands(d, x, 198, 108, split, kind)
        d.note(x, 272, f'{cls}\n{shape}')
    whole = ('data', 'in z (b, channels, h/4, w/4)'), ('data dashed', 'in z, resized to h/4 × w/4')
    d.legend(314, *whole, ('op', 'in side'))
    return d


def shift():
    d = Drawing(
        '13_diffusion',
        404,
        'Residual shifting: training adds a share eta of y - x and noise to x; the chain starts at '
        'y plus noise and asks the network for the clean x0 at each step',
    )
    y = 58
    d.note(0, 14, 'shift: z_t = x + eta_t · (y − x) + kappa · √eta_t · noise', 'start', bold=True)
    items = ['x', 'z_0', 'z_4', 'z_9', 'z_14', 'prior(y)']
    row = d.row(y, [(item, 'data') for item in items], 70, 730)
    d.chain(row[:-1])
    d.arrow(row[-2], row[-1], '≈', head=False, look='line dashed')
    d.note(0, y + 30, 'eta_t', 'start', ink='label')
    for box, eta in zip(row, ('0', '0.0004', '0.09', '0.37', '0.98', 'y + kappa · noise')):
        d.note(box.x, y + 30, eta, ink='label')
    d.frame(112, 120, 604, 344, 'chain: one step, from t to s')
    y = 222
    start = d.box(46, y, 'prior(y)', 'data')
    z_t = d.box(156, y, 'z_t', 'data', w=56)
    scale = d.box(258, y, 'scale_input')
    net = d.box(428, y, 'model\n(scaled, t, cond)', 'net')
    x0 = d.box(568, y, 'x0', 'data', w=44)
    out = d.box(722, y, 'x_hat', 'data')
    d.chain([start, z_t, scale])
    d.chain([scale, net], ['scaled'])
    d.chain([net, x0])
    d.arrow(x0, out, 'at the end', shift=12)
    d.arrow(d.box(428, 160, 'cond = y', 'cond'), net, look='to-cond')
    back = d.box(400, 304, 'step back\nz_s of x0, z_t and fresh noise')
    d.arrow((x0, 'bottom'), (back, 'right'))
    left = back.edges()[0]
    d.path([(172, z_t.edges()[3]), (172, 294), (left, 294)], 'z_t', on=1)
    d.path([(left, 316), (144, 316), (144, z_t.edges()[3])], 'z_s, the next z_t', on=0)
    hint = 'All tensors are (b, c, h, w). kappa: how strong the noise is. Fifteen steps, or fewer.'
    d.note(0, 366, hint, 'start')
    d.legend(392, 'data', 'op', 'net', 'cond')
    return d


def unet():
    d = Drawing(
        '14_unet',
        668,
        'SwinUNet: four levels down, a middle, four levels up, skips between them; the time step '
        'enters every ResBlock; a Stage is a ResBlock and, in some places, Swin blocks',
    )
    levels = ((160, 64), (320, 32), (320, 16), (640, 8))
    top, pitch, left, middle, right = 154, 74, 118, 372, 636
    z = d.box(left, 20, 'z, cond', 'data')
    stem = d.box(left, 86, 'stem', 'net')
    d.arrow(z, stem, '(b, 6, 64, 64)')
    t = d.box(middle, 20, 't (b,)', 'cond')
    time = d.box(middle, 86, 'time\ntime_embedding, Linear, Linear', 'net')
    d.arrow(t, time, look='to-cond')
    d.note(middle, 124, 'emb (b, 640) into every ResBlock', ink='label')
    out = d.box(right, 20, 'out', 'data')
    last = d.box(right, 86, 'last', 'net')
    d.arrow(last, out, '', '(b, 3, 64, 64)')
    down, up = [], []
    for k, (c, side) in enumerate(levels):
        y, shape = top + pitch * k, f'(b, {c}, {side}, {side})'
        down.append(d.box(left, y, f'{shape}\nStage + Swin, Stage', 'net', w=208))
        up.append(d.box(right, y, f'{shape}\nStage + Swin, Stage, Stage', 'net', w=236))
        d.arrow(down[-1], up[-1], 'three skips', look='line dashed')
    mid = '(b, 640, 8, 8)\nmid: Stage + Swin, Stage'
    mid = d.box(middle, top + pitch * 4 - 10, mid, 'net')
    d.chain([stem, down[0]])
    d.chain([*down], ['shrink'] * 3)
    d.chain([*up[::-1]], [('', 'grow')] * 3)
    d.chain([up[0], last])
    d.arrow((down[-1], 'bottom'), (mid, 'left'))
    d.arrow((mid, 'right'), (up[-1], 'bottom'))
    hint = 'A skip is the input or the output of a Stage on the way down; each Stage on the way\n'
    d.note(0, 490, hint + 'up takes one, concatenated. Sizes: SwinUNet.paper at 64 × 64.', 'start')
    d.frame(1, 516, 759, 632, 'Stage + Swin')
    y = 580
    x = d.box(44, y - 18, 'x', 'data', w=52, h=28)
    emb = d.box(44, y + 18, 'emb', 'cond', w=52, h=28)
    res = 'ResBlock\nnorm, SiLU, conv; norm · (1 + scale)\n+ shift, SiLU, conv; + side(x)'
    res = d.box(258, y, res, 'net')
    swin = 'SwinLayers\n1 × 1 conv to 192, two SwinBlocks\n(the second shifted), 1 × 1 conv'
    swin = d.box(594, y, swin, 'net')
    d.chain([res, swin])
    d.path([x.at('right'), (res.edges()[0], x.y)])
    d.path([emb.at('right'), (res.edges()[0], emb.y)], look='to-cond')
    d.path([swin.at('right'), (750, y)])
    d.legend(654, 'data', 'net', 'cond')
    return d


def superres():
    d = Drawing(
        '15_superres',
        420,
        'Super-resolution in wavelet space: y is enlarged by bicubic, its packet bands z start '
        'and condition a diffusion chain around SwinUNet, and the inverse transform gives x_hat',
    )
    top, rail, y = 36, 106, 216
    y_ = d.box(26, top, 'y', 'data', w=38)
    start = d.box(206, top, 'start\nbicubic_up, × 4')
    encode = d.box(468, top, 'codec.encode\npacket2, two levels')
    out = d.box(690, top, 'x_hat', 'data')
    d.chain([y_, start, encode], ['(b, c, h, w)', '(b, c, 4·h, 4·w)'])
    d.frame(92, 132, 608, 358, 'one step of process')
    prior = d.box(40, y, 'prior', 'op')
    scale = d.box(168, y, 'scale_input')
    net = d.box(334, y, 'net\nSwinUNet', 'net')
    plus = d.sign(468, y, '+')
    x0 = d.box(552, y, 'x0', 'data', w=48)
    decode = d.box(690, y, 'codec.decode\nunpacket2')
    d.path([encode.at('bottom'), plus.at('top')], '', 'z (b, 16·c, h, w)', shift=-44)
    d.path([(468, rail), (40, rail), prior.at('top')])
    d.path([(334, rail), net.at('top')], 'cond', look='to-cond', shift=28)
    d.chain([prior, scale, net])
    d.chain([net, plus], ['· says'])
    d.chain([plus, x0, decode])
    d.arrow(decode, out, '', '(b, c, 4·h, 4·w)')
    back = d.box(334, 312, 'step back\nz_s of x0, z_t and fresh noise')
    d.arrow((x0, 'bottom', 0.3), (back, 'right'))
    d.arrow((back, 'left'), (scale, 'bottom'), 'z_s', on=1)
    loss = d.box(690, 312, 'Loss\nx0 against\ncodec.encode(x)', 'loss')
    d.arrow((x0, 'bottom', 0.7), (loss, 'left'), look='to-loss dashed')
    hint = 'The codec is fixed. The packet holds every band, so nothing is left for side.'
    d.note(0, 384, hint, 'start')
    d.legend(410, 'data', 'op', 'net', 'cond', ('loss', 'loss, in training'))
    return d


def perceptual():
    d = Drawing(
        '16_perceptual',
        330,
        'A perceptual distance: a frozen trunk gives features of both images at several stages; '
        'unit length, squared difference, weights of the channels, mean over places, sum of stages',
    )
    upper, lower, y = 42, 122, 82
    x_hat, x = d.box(36, upper, 'x_hat', 'data', w=62), d.box(36, lower, 'x', 'data', w=62)
    trunk = d.box(196, y, 'trunk\nfrozen\nstages l = 1, 2, ...', 'net', h=112, look='dashed')
    unit = d.box(394, y, 'unit length\nover channels\nat each place', 'op', h=112)
    minus = d.sign(500, y, '−')
    lins = d.box(582, y, '(·)² · lins\nsum over\nchannels', 'net', look='dashed')
    mean = d.box(704, y, 'mean, sum\nover places,\nover stages', 'op')
    for a, h in ((x_hat, upper), (x, lower)):
        d.path([a.at('right'), (trunk.edges()[0], h)])
        d.path([(trunk.edges()[2], h), (unit.edges()[0], h)], 'f_l')
    d.path([(unit.edges()[2], upper), (500, upper), minus.at('top')])
    d.path([(unit.edges()[2], lower), (500, lower), minus.at('bottom')])
    d.chain([minus, lins, mean])
    d.note(0, 164, 'f_l is (b, c_l, h_l, w_l); the distance is (b,).', 'start')
    y = 224
    chain = [('net', 'net'), ('x0', 'data'), ('codec.decode', 'op'), ('x_hat', 'data')]
    chain = d.row(y, [*chain, ('distance to x', 'loss')], 30, 730)
    d.chain(chain)
    a, b = chain[-1], chain[0]
    turn = [a.at('bottom'), (a.x, 276), (b.x, 276), b.at('bottom')]
    d.path(turn, '', 'the gradient has to come all the way back', look='to-loss dashed')
    d.legend(318, 'data', 'op', 'net', ('net dashed', 'frozen'), 'loss')
    return d


def dit():
    d = Drawing(
        '19_dit',
        540,
        'DiT: patches become tokens, each DiTBlock normalises, shifts, scales and gates them by a '
        'condition c made of t, the span t - r and the label; every modulation starts at zero',
    )
    items = [
        ('z, cond', 'data'),
        ('tokens\npatchify, Linear, + pos', 'net'),
        ('DiTBlock\n× depth', 'net'),
        ('last\nFinalLayer', 'net'),
        ('unpatchify', 'op'),
        ('u', 'data'),
    ]
    column = d.column(104, items, 20, 40)
    shapes = ['(b, c, h, w)', '(b, n, dim)', '(b, n, dim)', '(b, n, p·p·c)', '(b, c, h, w)']
    d.chain(column, shapes)
    c = d.box(222, 36, 'c', 'cond', w=36)
    for box in column[2:4]:
        d.path([c.at('bottom'), (222, box.y), box.at('right')], look='to-cond')
    d.frame(256, 4, 758, 500, 'DiTBlock', 'end')
    x, side = 406, 286
    d.path([(x, 14), (x, 60)])
    d.note(x + 10, 22, 'x (b, n, dim)', 'start', ink='label')
    bar = 'modulation\nSiLU, Linear\ndim to 6 · dim,\nzero at the start'
    bar = d.box(676, 248, bar, 'net', h=376)
    cond = d.box(676, 472, 'c (b, dim)', 'cond')
    d.arrow(cond, bar, look='to-cond')
    above = 14
    for k, (part, top) in enumerate((('attn', 60), ('mlp', 284)), 1):
        norm = f'norm{k}, modulate\nx · (1 + scale{k}) + shift{k}'
        norm = d.box(x, top + 25, norm, 'op')
        part = d.box(x, top + 86, part, 'net', w=90)
        gate, plus = d.sign(x, top + 134, '×'), d.sign(x, top + 178, '+')
        d.chain([norm, part, gate, plus])
        d.path([(x, above + 24), (side, above + 24), (side, plus.y), plus.at('left')])
        left = bar.edges()[0]
        for at, name in ((norm, f'shift{k}, scale{k}'), (gate, f'gate{k}')):
            d.path([(left, at.y), at.at('right')], name, look='to-cond')
        above = plus.edges()[3]
        d.path([(x, above), (x, 284 if k == 1 else 494)])
    hint = 'c = time(t) + span(t − r) + label'
    d.legend(526, 'data', 'op', 'net', ('cond', hint))
    return d


def meanflow():
    d = Drawing(
        '20_meanflow',
        430,
        'MeanFlow: a point z on the straight path from x to e, times t and r; the derivative of '
        'the network along the path gives the target; in use one step of the network is enough',
    )
    y1, y2 = 76, 216
    x, e = d.box(24, y1 - 20, 'x', 'data', w=38), d.box(24, y1 + 22, 'e', 'data', w=38)
    path = d.box(178, y1, 'straight_path\nz = (1 − t) · x + t · e\nv = e − x')
    times = d.box(178, y2, 'draw_times\nr ≤ t, half with r = t')
    d.path([x.at('right'), (path.edges()[0], x.y)])
    d.path([e.at('right'), (path.edges()[0], e.y)])
    at = d.box(326, 146, 'z, t, r', 'data')
    d.arrow((path, 'right'), (at, 'top'), 'z')
    d.arrow((times, 'right'), (at, 'bottom'), '', 't, r')
    hint = 'x is clean; e is noise, or\na degraded image.\nx, e, z, v, u: (b, c, h, w)\nt, r: (b,)'
    d.note(0, 150, hint, 'start', ink='label')
    slope = d.box(482, y1, 'derivative\njvp of net at z, t, r\nalong (v, 1, 0)', 'op')
    net = d.box(482, y2, 'net(z, t, r)\nlearns', 'net')
    d.arrow((at, 'right', 0.3), (slope, 'left'), mid=0.3)
    d.arrow((at, 'right', 0.7), (net, 'left'), mid=0.3)
    target = d.box(678, y1, 'target\nv − (t − r) · du/dt\nwithout gradient')
    d.chain([slope, target], ['du/dt'])
    d.path([path.at('top'), (178, 22), (678, 22), target.at('top')])
    d.path([(482, 22), slope.at('top')], 'v', shift=0)
    loss = d.box(678, y2, 'FlowLoss\n(u − target)²\nadaptive_weight', 'loss')
    d.chain([net, loss], ['u'])
    d.arrow(target, loss)
    d.frame(1, 276, 759, 390, 'sample: one step')
    y = 344
    e = d.box(60, y, 'e', 'data', w=38)
    net = d.box(290, y, 'net(e, t = 1, r = 0)', 'net')
    minus = d.sign(500, y, '−')
    out = d.box(660, y, 'x_hat', 'data')
    d.chain([e, net, minus, out], ['(b, c, h, w)', 'u', 'e − u'])
    d.path([e.at('top'), (60, 312), (500, 312), minus.at('top')])
    d.legend(416, 'data', 'op', 'net', 'loss')
    return d


def diffusion():
    first = [wavelets(), codecs(), shift(), unet(), superres(), perceptual()]
    return [*first, dit(), meanflow()]
