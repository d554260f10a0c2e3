"Drawings of the lessons on foundations, one function each; names as the code has them."

from vocabulary import Drawing


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
    d.arrow(check(278, top, 'stateless\nstays something\nbehind?'), (model, 'top'))
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
    return [audit()]
