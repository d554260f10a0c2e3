"Drawings of lessons 05 to 10, one function each; names and shapes as the code has them."

from vocabulary import Drawing


def patching():
    d = Drawing(
        '05_patching',
        432,
        'An image becomes sixteen tokens; the tokens are shuffled, the first four are kept and '
        'encoded, and unshuffle puts them back in their old places with a mask token wherever '
        'one was removed',
    )
    order = [9, 2, 12, 7, 5, 14, 0, 11, 3, 8, 15, 1, 10, 6, 13, 4]
    n, keep, size, middle = 16, 4, 24, 560
    kept, first = order[:keep], middle - 7.5 * size

    def strip(y, cells, x=middle):
        return d.cells(x, y, [cells], size)

    def square(y, cells):
        return d.cells(52, y, [cells[i : i + 4] for i in range(0, n, 4)], size)

    whole = [('data' if k in kept else 'op', str(k)) for k in range(n)]
    filled = [('data', str(k)) if k in kept else ('cond', 'm') for k in range(n)]
    shown = [('data', str(k)) for k in kept]
    d.arrow(square(58, whole), strip(58, whole), 'patchify', '(b, c, h, w) → (b, n, p·p·c)')
    strip(132, shown + [('op faint', str(k)) for k in order[keep:]])
    strip(194, shown, first + 1.5 * size)
    net = d.box(first + 1.5 * size, 246, 'encode', 'net', w=96)
    strip(298, shown + [('cond', 'm')] * (n - keep))
    last, image = strip(374, filled), square(374, filled)
    d.arrow(last, image, 'Linear, unpatchify', '(b, n, d) → (b, c, h, w)')
    for new, old in enumerate(order):
        look, head = ('to-data', True) if old in kept else ('line faint', False)
        new, old = first + new * size, first + old * size
        d.path([(old, 72), (new, 119)], look=look, head=head)
        d.path([(new, 312), (old, 361)], look=look, head=head)
        if head:
            d.path([(new, 146), (new, 181)], look=look)
    d.path([(net.x, 208), net.at('top')], look='to-data')
    d.path([net.at('bottom'), (net.x, 285)], look='to-data')
    for y, name, what in (
        (132, 'random_masking', 'ids_shuffle = score.argsort()'),
        (186, 'visible (b, keep, d)', 'the first keep of n'),
        (240, 'ViTEncoder.transform', 'class token, blocks, norm'),
        (290, 'unshuffle', 'mask_token m for those that are\nmissing, then gather(ids_restore)'),
    ):
        d.note(120, y - 9, name, 'start', bold=True)
        d.note(120, y + 9 + 8.5 * what.count('\n'), what, 'start')
    d.note(middle, 28, 'embed, and add positions, before the shuffle')
    return d


def masked_autoencoder(d, first, seen, loss, sizes):
    "MAE and DMAE: what is patchified, what is called seen, and which patches count."
    top, low, image = 66, 262, [[('data', '')] * 4] * 4
    x, pred = d.cells(34, top, image, 15), d.cells(34, low, image, 15)
    d.note(34, top - 42, 'imgs' if d.name == '06_mae' else 'x')
    cut = d.box(198, top, first)
    mask = d.box(434, top, 'choose_patches')
    encode = d.box(686, top, 'encode\npick, patch_embed\n+ pos_embed\nblocks, norm', 'net', w=136)
    d.chain([x, cut], ['(b, c, h, w)'])
    d.chain([cut, mask], [('patches', '(b, n, p·p·c)')])
    d.chain([mask, encode], [('shown', '(b, keep)')])
    whole = d.box(618, low, 'unshuffle\ndecoder_embed, mask_token', 'net', w=252)
    decode = 'decode\n+ decoder_pos_embed\ndecoder_blocks\ndecoder_norm, _pred'
    decode = d.box(240, low, decode, 'net')
    d.path([(700, encode.edges()[3]), (700, whole.edges()[1])], '', 'latent\n(b, 1 + keep, dim)')
    d.arrow(whole, decode, '(b, 1 + n, dec_dim)')
    d.arrow(decode, pred, 'pred', '(b, n, p·p·c)')
    d.path([(506, mask.edges()[3]), (506, whole.edges()[1])], '', 'ids_restore\n(b, n)')
    error = d.box(78, 164, loss, 'loss')
    d.path([x.at('bottom'), (34, error.edges()[1])])
    d.path([pred.at('top'), (34, error.edges()[3])])
    if seen:
        d.path([(390, top + 16), (390, 164), error.at('right')], seen, on=1)
    d.note(0, 338, sizes, 'start')
    d.legend(372, 'data', 'op', 'net', 'loss')
    return d


def mae():
    d = Drawing(
        '06_mae',
        386,
        'MAE: patchify, choose_patches, an encoder that sees the visible patches, unshuffle with '
        'mask tokens, a decoder that draws all patches; the loss counts the removed ones',
    )
    sizes = (
        'mae_tiny: 32 × 32 pixels, p = 4: n = 64 patches, keep = 16 at mask_ratio 0.75;\n'
        'dim = 128 in four blocks, dec_dim = 64 in two'
    )
    loss = 'loss\nmse over the\nremoved patches'
    return masked_autoencoder(d, 'patchify', 'mask (b, n)', loss, sizes)


def dmae():
    d = Drawing(
        '09_dmae',
        386,
        'DMAE: the same network as MAE, but the patches come from a noisy image, and the loss '
        'compares all of them with the clean image',
    )
    sizes = (
        'What differs from MAE: noise comes first, and no patch is known, so all count.\n'
        'denoise: mask_ratio 0, every patch is seen and no mask token is needed'
    )
    loss = 'loss\nmse over all\npatches of x'
    return masked_autoencoder(d, 'gaussian\npatchify', '', loss, sizes)


def transfer():
    d = Drawing(
        '07_transfer',
        318,
        'Four ways to use an encoder: finetune moves all of it, from scratch does the same but '
        'starts with random weights, linear_probe and knn_probe leave the pretrained one frozen',
    )
    y = 116
    x = d.box(118, y, 'x', 'data', w=38)
    encoder = d.box(300, y, 'encoder\nViTEncoder', 'net')
    pool = d.box(544, y, 'pool\nmean of patch tokens')
    trained = d.box(186, 28, 'weights of MAE\nfinetune, both probes', 'data')
    drawn = d.box(414, 28, 'random weights\nfrom scratch', 'data')
    for start, share in ((trained, 0.3), (drawn, 0.7)):
        d.arrow((start, 'bottom'), (encoder, 'top', share), look='line dashed')
    d.note(300, 28, 'or', ink='label')
    d.chain([x, encoder, pool], ['(b, c, h, w)', '(b, n, dim)'])
    ways = [
        ('finetune, from scratch\nLinear\nencoder learns, too', 'net'),
        ('linear_probe\nBatchNorm, Linear\nencoder frozen', 'net'),
        ('knn_probe\nthe nearest features vote\nencoder frozen', 'op'),
    ]
    for box in d.row(236, ways, 1, 759):
        rail = 178
        d.path([pool.at('bottom'), (pool.x, rail), (box.x, rail), box.at('top')])
    d.note(pool.x + 10, 158, 'features (b, dim)', 'start', ink='label')
    d.note(380, 282, 'each gives logits (b, classes)', ink='label')
    d.legend(306, 'data', ('net', 'learned, unless frozen'), 'op')
    return d


def codebook():
    d = Drawing(
        '08_codebook',
        388,
        'A codebook: an encoder makes tokens, each becomes the nearest of k codes, a decoder draws '
        'the image; the gradient passes the choice straight through, three losses move the '
        'parts; a prior writes indices of its own',
    )
    y = 112
    x = d.box(20, y, 'x', 'data', w=36)
    encoder = d.box(180, y, 'encoder, proj\nViTEncoder\nLinear', 'net')
    book = d.box(384, y, 'Codebook\nnearest_code\nof codes (k, d)', 'net')
    decoder = d.box(594, y, 'decoder\nViTDecoder', 'net')
    out = d.box(722, y, 'x_hat', 'data')
    d.chain([x, encoder], ['(b, c, h, w)'])
    d.chain([encoder, book], [('tokens', '(b, n, d)')])
    d.chain([book, decoder], [('quantized', '(b, n, d)')])
    d.chain([decoder, out])
    left, right = encoder.edges()[2] + 12, decoder.edges()[0] - 7
    past = 'straight_through: the gradient, as if there had been no choice'
    d.path([(right, y - 1), (right, 38), (left, 38), (left, y - 2)], past, look='to-loss dashed')
    indices = d.box(384, 196, 'indices (b, n)', 'data')
    d.arrow(book, indices)
    d.arrow(d.box(258, 196, 'CodePrior\nwrites indices', 'net', w=106), indices)
    y = 286
    pull = d.box(134, y, 'commitment_loss\ncommitment · mse(tokens, e)\nmoves the tokens', 'loss')
    code = d.box(384, y, 'codebook_loss\nmse(e, tokens)\nmoves the codes', 'loss', w=180)
    image = d.box(634, y, 'mse, perceptual\nx_hat against x\nmove decoder and encoder', 'loss')
    for loss, part, at in ((pull, encoder, 180), (image, decoder, 594)):
        d.path([(at, loss.edges()[1]), (at, part.edges()[3])], look='to-loss dashed')
    turn = [(464, code.edges()[1]), (464, 166), (432, 166), (432, book.edges()[3])]
    d.path(turn, look='to-loss dashed')
    hint = 'd = codebook.dim, e: the code nearest to a token. With decay the codes follow\n'
    d.note(0, 346, hint + 'the mean of their tokens instead, and codebook_loss is 0.', 'start')
    d.legend(378, 'data', 'net', ('loss', 'loss; dashed: where its gradient goes'))
    return d


def two_stage():
    d = Drawing(
        '10_two_stage',
        388,
        'Two stages: decoder1 draws x_hat from the latent; the residual y - x_hat becomes a '
        'condition e of decoder2, which draws x_refined from the same latent',
    )
    top, low = 96, 276
    y = d.box(22, top, 'y', 'data', w=38)
    encoder = d.box(178, top, 'encoder\nViTEncoder', 'net', w=116)
    one = d.box(452, top, 'decoder1\nConditionalDecoder\nwithout condition', 'net')
    x_hat = d.box(590, top, 'x_hat', 'data')
    minus = d.sign(706, top, '−')
    d.chain([y, encoder], ['(b, c, h, w)'])
    d.chain([encoder, one], [('latent', '(b, 1 + n, dim)')])
    d.chain([one, x_hat])
    d.chain([x_hat, minus], ['detach'])
    d.path([y.at('top'), (22, 26), (706, 26), minus.at('top')], 'y')
    see = d.box(672, 190, 'ResidualEncoder\nthree convolutions,\npool, Linear', 'net')
    d.path([minus.at('bottom'), (706, see.edges()[1])], '', 'r (b, c, h, w)')
    e = d.box(470, 190, 'e\n(b, 1 or n, cond)', 'cond')
    two = d.box(358, low, 'decoder2\nConditionalDecoder\ne in every block', 'net')
    d.arrow(see, e)
    d.arrow((e, 'left'), (two, 'top'), look='to-cond')
    d.path([(254, top), (254, low), two.at('left')])
    refined = d.box(516, low, 'x_refined', 'data')
    loss = d.box(676, low, 'two_stage_loss\nmse(x_refined, x)\n+ lam · mse(x_hat, x)', 'loss')
    d.chain([two, refined, loss])
    d.path([x_hat.at('bottom'), (590, 238), (640, 238), (640, loss.edges()[1])])
    d.arrow(d.box(676, 342, 'x', 'data', w=38), loss)
    hint = "place='branches': e scales,\nshifts and gates the attention\nand the MLP of each block"
    d.note(0, low, hint, 'start')
    hint = "residual='deployed': r = y − x_hat, which is known in training and in use;\n"
    d.note(0, 340, hint + "'truth': r = x − x_hat, which only training knows.", 'start')
    d.legend(376, 'data', 'net', 'cond', 'loss')
    return d


def representations():
    return [patching(), mae(), transfer(), codebook(), dmae(), two_stage()]
