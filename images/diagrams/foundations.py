"Drawings of lessons 00 to 04, one function each; names and shapes as the code has them."

from vocabulary import Drawing


def metrics():
    d = Drawing(
        '02_metrics',
        344,
        'Three scores of a restored image, and what fools each of them',
    )
    rows = 48, 152, 256
    x_hat, x = d.box(34, 120, 'x_hat', 'data', w=62), d.box(34, 184, 'x', 'data', w=62)
    firsts = ('x_hat − x', 'op'), ('window_mean\n11 × 11', 'op'), ('Trunk\nconvolutions', 'net')
    seconds = 'square', 'formula', 'unit_length\nw · square'
    between = '(b, c, h, w)', 'μ, σ²\n(b, c, h′, w′)', 'five stages\n(b, c′, h′, w′)'
    names = 'PSNR\n(b,) dB', 'SSIM\n(b,), 1: equal', 'ST-LPIPS\n(b,), 0: equal'
    means = 'mean', 'mean', 'mean,\nsum'
    traps = (
        'a shift,\na wrong range',
        'a shift,\na wrong range',
        'a small hole,\nnoise that learned',
    )
    for y, first, shape, second, mean, name, trap in zip(
        rows, firsts, between, seconds, means, names, traps
    ):
        start = d.box(168, y, first[0], first[1], w=126)
        middle = d.box(410, y, second, w=104)
        score = d.box(560, y, name, 'data', w=104)
        fooled = d.node(693, y, 132, 46, 'loss')
        above, below = trap.split('\n')
        d.write(fooled, above).lines[-1].y = -9
        d.write(fooled, below).lines[-1].y = 9
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


def foundations():
    return [metrics()]
