"Drawings of lessons 00 to 04, one function each; names and shapes as the code has them."

from vocabulary import Drawing


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


def foundations():
    return [learner()]
