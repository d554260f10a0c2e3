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


def in_use():
    return [restorers()]
