"Drawings of lessons 00 to 04, one function each; names and shapes as the code has them."

from vocabulary import Drawing


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


def foundations():
    return [degrade()]
