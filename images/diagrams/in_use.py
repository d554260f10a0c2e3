"Drawings of lessons 22 to 24, one function each; names and shapes as the code has them."

from vocabulary import Drawing


def restorers():
    d = Drawing(
        '23_restorers',
        300,
        'A restorer measures the noise, runs its network twice, and goes from the input to the '
        'answer only as far as the noise pays',
    )
    top, mid, low = 40, 122, 204
    y = d.box(50, mid, 'y\n(b, c, h, w)', 'data', w=98)
    noise = d.box(206, top, 'estimate_noise\nquiet directions', w=150)
    once = d.box(206, mid, 'run\nin windows', 'net', w=150)
    moved = d.box(206, low, 'run of y + ε b\non sample windows', 'net', w=150)
    signs = d.box(416, top, 'signs\nlevel, range, JPEG', w=150)
    trust = d.box(416, low, 'trust\nσ² (1 − slope) / change', w=190)
    blend = d.box(576, mid, 'lerp\ny + a (x_hat − y)', w=136)
    words = d.box(676, top, 'what it says', 'data', w=110)
    out = d.box(714, mid, 'restored', 'data', w=78)
    d.chain([y, once])
    d.path([y.at('top'), (50, top), noise.at('left')])
    d.path([y.at('bottom'), (50, low), moved.at('left')])
    d.arrow(noise, signs, 'σ')
    d.arrow(once, blend, 'x_hat (b, c, h, w)')
    d.arrow(moved, trust, 'slope')
    d.arrow(signs, words)
    d.path([trust.at('right'), (576, low), blend.at('bottom')], 'a')
    told = trust.at('top', 0.11)
    d.path([(300, top), (300, 163), (told[0], 163), told])
    change = trust.at('top', 0.626)
    d.path([(change[0], mid), change], 'change')
    d.arrow(blend, out)
    hint = 'b is white noise. a is one number an image: 0 keeps the input, 1 takes the answer.'
    d.note(0, 258, hint, 'start')
    d.legend(286, 'data', 'op', 'net')
    return d


def baselines():
    d = Drawing(
        '22_baselines',
        404,
        'What differs between the peers: a scaled residual in EDSR, channel attention in RCAN, '
        'shifted windows in SwinIR, halves and doubles in DRUNet and NAFNet',
    )
    rows = [
        ('EDSR: a number scales the residual', ['conv, ReLU, conv'], '× 0.1'),
        ('RCAN: the means of all channels scale each', ['conv, ReLU, conv', 'means'], '× a'),
        ('SwinIR: pixels of a window see one another', ['windows, shifted', 'attention'], None),
    ]
    for k, (title, parts, factor) in enumerate(rows):
        y = 52 + 86 * k
        d.note(0, y - 36, title, 'start')
        x = d.box(36, y, 'x', 'data', w=40)
        nodes = [x, d.box(190, y, parts[0], 'net' if k < 2 else 'op', w=150)]
        if len(parts) > 1:
            nodes.append(d.box(360, y, parts[1], 'op' if k == 1 else 'net', w=110))
        if factor:
            nodes.append(d.box(500, y, factor, 'op' if k == 0 else 'net', w=70))
        plus = d.sign(620, y, '+')
        out = d.box(700, y, 'out', 'data', w=50)
        d.chain([*nodes, plus, out])
        d.path([x.at('bottom'), (36, y + 30), (620, y + 30), plus.at('bottom')])
    y = 318
    d.note(0, y - 36, 'DRUNet, NAFNet: the image at a half and a quarter of its side', 'start')
    sizes = [('h', 76), ('h/2', 76), ('h/4', 76), ('h/2', 76), ('h', 76)]
    boxes = [d.box(80 + 150 * k, y, t, 'net', w=w) for k, (t, w) in enumerate(sizes)]
    d.chain(boxes)
    d.path([boxes[1].at('bottom'), (230, y + 28), (530, y + 28), boxes[3].at('bottom')])
    d.path([boxes[0].at('bottom'), (80, y + 44), (680, y + 44), boxes[4].at('bottom')])
    d.legend(390, 'data', 'op', 'net')
    return d


def in_use():
    return [baselines(), restorers()]
