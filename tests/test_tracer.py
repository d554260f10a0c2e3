"Broken and sound training steps: audit_gradient names each break and raises no false alarm."

import copy
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from restore_lib.degrade import jpeg
from restore_lib.learner import EMA, Learner, ResidualCNN
from restore_lib.tracer import audit_gradient
from restore_lib.tracer_rehearsal import rehearsed
from restore_lib.tracer_snapshots import Snapshot, codes_of


class Parts:
    "An encoder, a decoder, a codebook and a batch, small enough to run in a millisecond."

    def __init__(self):
        torch.manual_seed(0)
        self.x = torch.rand(2, 1, 8, 8)
        self.enc, self.dec, self.book = (
            nn.Conv2d(1, 2, 3, padding=1),
            nn.Conv2d(2, 1, 3, padding=1),
            nn.Embedding(8, 2),
        )
        self.trunk = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()).requires_grad_(False)
        self.watch = dict(enc=self.enc, dec=self.dec)

    def through(self, f):
        return lambda: F.mse_loss(self.dec(f(self.enc(self.x))), self.x)

    def codes(self, z):
        flat = z.permute(0, 2, 3, 1).reshape(-1, 2)
        q = self.book(torch.cdist(flat, self.book.weight).argmin(1))
        return flat, q

    def image(self, q):
        return self.dec(q.view(2, 8, 8, 2).permute(0, 3, 1, 2))


class Hole(Function):
    "A function whose author forgot the gradient."

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(g)


class Index(Function):
    @staticmethod
    def forward(ctx, x):
        out = x.round()
        ctx.mark_non_differentiable(out)
        return out

    @staticmethod
    def backward(ctx, g):
        return None


class RoundSTE(Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


# ------------------------- broken: function of Parts -> (step, watch, options, {name: how})
def no_grad(p):
    def step():
        with torch.no_grad():
            z = p.enc(p.x)
        return F.mse_loss(p.dec(z), p.x)

    return step, p.watch, {}, {'enc': 'no_grad'}


def inference(p):
    def step():
        with torch.inference_mode():
            z = p.enc(p.x)
        return F.mse_loss(p.dec(z.clone()), p.x)

    return step, p.watch, {}, {'enc': 'inference mode'}


def by_numpy(p):
    def f(z):
        a = z.detach().cpu().numpy()
        return torch.from_numpy(a * 0.5)

    return p.through(f), p.watch, {}, {'enc': 'numpy'}


def by_list(p):
    return p.through(lambda z: torch.tensor(z.tolist())), p.watch, {}, {'enc': 'numpy'}


def no_straight_through(p):
    def step():
        z, q = p.codes(p.enc(p.x))
        return dict(
            recon=F.mse_loss(p.image(q), p.x),
            commit=F.mse_loss(z, q.detach()),
            code=F.mse_loss(q, z.detach()),
        )

    return (
        step,
        dict(p.watch, book=p.book),
        dict(expect=dict(recon=['enc', 'dec'], commit=['enc'], code=['book'])),
        {'enc': 'not differentiable'},
    )


def losses_after_straight_through(p):
    def step():
        z, q = p.codes(p.enc(p.x))
        q = z + (q - z).detach()
        return dict(
            recon=F.mse_loss(p.image(q), p.x),
            commit=F.mse_loss(z, q.detach()),
            code=F.mse_loss(q, z.detach()),
        )

    return step, dict(p.watch, book=p.book), {}, {'book': 'detach'}


def written_into_buffer(p):
    cache = torch.zeros(2, 2, 8, 8)

    def step():
        cache.data.copy_(p.enc(p.x))
        return F.mse_loss(p.dec(cache), p.x)

    return step, p.watch, {}, {'enc': 'in-place on a leaf'}


def written_into_parameter(p):
    scale = nn.Parameter(torch.ones(1))

    def step():
        s = p.enc(p.x).mean()
        with torch.no_grad():
            scale.fill_(s)
        return F.mse_loss(p.dec(scale * torch.ones(2, 2, 8, 8)), p.x)

    return step, p.watch, {}, {'enc': 'in-place on a leaf'}


def leaf_error(p):
    w = nn.Parameter(torch.ones(3))

    def step():
        w[0] = p.enc(p.x).mean()
        return w.sum()

    return step, p.watch, {}, {'loss': 'in-place on a leaf'}


def overwritten(p):
    def step():
        h = p.enc(p.x).exp()
        out = F.mse_loss(p.dec(h), p.x)
        h.zero_()
        return out

    return step, p.watch, {}, {'loss': 'in-place', 'enc': 'in-place', 'dec': 'in-place'}


def frozen(p):
    p.enc.requires_grad_(False)
    return p.through(lambda z: z), p.watch, {}, {'enc': 'frozen'}


def not_held(p):
    return (
        p.through(lambda z: z),
        p.watch,
        dict(optimizer=torch.optim.Adam(p.dec.parameters())),
        {'enc': 'not in the optimizer'},
    )


def not_held_by_the_stepped(p):
    opt = torch.optim.SGD(p.dec.parameters(), lr=0.1)

    def step():
        opt.zero_grad()
        loss = F.mse_loss(p.dec(p.enc(p.x)), p.x)
        loss.backward()
        opt.step()
        return loss.item()

    return step, p.watch, {}, {'enc': 'not in the optimizer'}


def reassigned(p):
    opt = torch.optim.SGD([*p.enc.parameters(), *p.dec.parameters()], lr=0.1)
    p.enc.weight = nn.Parameter(
        p.enc.weight.data * 0.99
    )  # a new tensor: the optimizer has the old one
    return p.through(lambda z: z), p.watch, dict(optimizer=opt), {'enc': 'not in the optimizer'}


def perceptual_without_gradient(p):
    def step():
        x_hat = p.dec(p.enc(p.x))
        with torch.no_grad():
            real, fake = p.trunk(p.x), p.trunk(x_hat)
        return dict(mse=F.mse_loss(x_hat, p.x), percep=F.mse_loss(fake, real))

    return step, p.watch, {}, {'percep': 'no_grad'}


def number(p):
    return (
        lambda: torch.tensor(F.mse_loss(p.dec(p.enc(p.x)), p.x).item()),
        p.watch,
        {},
        dict.fromkeys(('loss', 'enc', 'dec'), 'number'),
    )


def weight_data(p):
    return (
        lambda: F.mse_loss(F.conv2d(p.enc(p.x), p.dec.weight.data, p.dec.bias, padding=1), p.x),
        p.watch,
        {},
        {'dec.weight': 'detach'},
    )


def weighted_zero(p):
    step = lambda: dict(
        mse=F.mse_loss(p.dec(p.enc(p.x)), p.x), l1=0.0 * F.l1_loss(p.dec(p.enc(p.x)), p.x)
    )
    return step, p.watch, {}, {'l1': 'zero factor'}


def itself(p):
    def step():
        x_hat = p.dec(p.enc(p.x))
        return F.mse_loss(x_hat, x_hat)

    return step, p.watch, {}, dict.fromkeys(('loss', 'enc', 'dec'), 'constant')


def unused(p):
    return lambda: F.mse_loss(p.dec(torch.ones(2, 2, 8, 8)), p.x), p.watch, {}, {'enc': 'unused'}


def infinite(p):
    return p.through(lambda z: (z - z.detach()).sqrt()), p.watch, {}, {'enc': 'not finite'}


def through_jpeg(p):
    step = lambda: F.l1_loss(jpeg(torch.sigmoid(p.dec(p.enc(p.x))), 50), p.x)
    return step, p.watch, {}, dict.fromkeys(('loss', 'enc', 'dec'), 'numpy')


def should_be_frozen(p):
    p.trunk.requires_grad_(True)
    return (
        lambda: F.mse_loss(p.trunk(p.dec(p.enc(p.x))), p.trunk(p.x).detach()),
        dict(p.watch, trunk=p.trunk),
        dict(frozen=['trunk']),
        {'trunk': 'not frozen'},
    )


def watched_inside(p):
    def step():
        z = p.enc(p.x)
        q = z.detach()
        return F.mse_loss(p.dec(q), p.x)

    return step, ['z', 'p.dec'], {}, {'z': 'detach'}


def fresh_gate(p):
    return (
        p.through(lambda z: z * torch.zeros(1, requires_grad=True)),
        p.watch,
        {},
        {'enc': 'zero factor'},
    )  # made anew each step


def gate_not_held(p):
    gate = nn.Parameter(torch.zeros(1))
    opt = torch.optim.Adam([*p.enc.parameters(), *p.dec.parameters()])
    return p.through(lambda z: z * gate), p.watch, dict(optimizer=opt), {'enc': 'zero factor'}


def dead_branch(f):
    def build(p):
        model = nn.Module()
        model.enc, model.side, model.dec = p.enc, nn.Conv2d(1, 2, 3, padding=1), p.dec
        step = lambda: F.mse_loss(model.dec(model.enc(p.x) + f(model.side(p.x))), p.x)
        how = 'zero factor' if f(torch.ones(1)).item() == 0 else 'zero slope'
        return step, dict(model=model), {}, {'model.side.weight': how, 'model.side.bias': how}

    return build


def another_loss_goes_back(p):
    opt = torch.optim.SGD([*p.enc.parameters(), *p.dec.parameters()], lr=0.1)

    def step():
        opt.zero_grad()
        z = p.enc(p.x)
        part = z.square().mean()
        total = part + F.mse_loss(p.dec(z), p.x)
        part.backward()
        opt.step()
        return total

    return step, p.watch, {}, {'dec': 'unused'}


def cleared_before_the_step(p):
    opt = torch.optim.SGD([*p.enc.parameters(), *p.dec.parameters()], lr=0.1)

    def step():
        loss = F.mse_loss(p.dec(p.enc(p.x)), p.x)
        loss.backward()
        opt.zero_grad()
        opt.step()

    return step, p.watch, {}, {'loss': 'cleared'}


def number_in_a_product(p):
    return (
        lambda: F.mse_loss(p.dec(torch.ones(2, 2, 8, 8) * p.enc(p.x).mean().item()), p.x),
        p.watch,
        {},
        {'enc': 'number'},
    )


BROKEN = dict(
    side_times_zero=dead_branch(lambda z: z * 0),
    side_rounded=dead_branch(lambda z: z.round()),
    detach=lambda p: (p.through(lambda z: z.detach()), p.watch, {}, {'enc': 'detach'}),
    data=lambda p: (p.through(lambda z: z.data), p.watch, {}, {'enc': 'detach'}),
    uint8=lambda p: (
        p.through(lambda z: (z * 255).to(torch.uint8).float() / 255),
        p.watch,
        {},
        {'enc': 'integer cast'},
    ),
    long=lambda p: (
        p.through(lambda z: (z * 255).long() / 255),
        p.watch,
        {},
        {'enc': 'integer cast'},
    ),
    round=lambda p: (
        p.through(lambda z: (z * 255).round() / 255),
        p.watch,
        {},
        {'enc': 'zero slope'},
    ),
    clamp=lambda p: (p.through(lambda z: (z - 9).clamp(0, 1)), p.watch, {}, {'enc': 'zero slope'}),
    relu=lambda p: (p.through(lambda z: F.relu(z - 9)), p.watch, {}, {'enc': 'zero slope'}),
    threshold=lambda p: (
        p.through(lambda z: (z > 0).float()),
        p.watch,
        {},
        {'enc': 'not differentiable'},
    ),
    zero_backward=lambda p: (p.through(Hole.apply), p.watch, {}, {'enc': 'zero slope'}),
    no_backward=lambda p: (p.through(Index.apply), p.watch, {}, {'enc': 'no gradient'}),
    **{
        f.__name__: f
        for f in (
            no_grad,
            inference,
            by_numpy,
            by_list,
            no_straight_through,
            losses_after_straight_through,
            written_into_buffer,
            written_into_parameter,
            leaf_error,
            overwritten,
            frozen,
            not_held,
            not_held_by_the_stepped,
            reassigned,
            perceptual_without_gradient,
            number,
            weight_data,
            weighted_zero,
            itself,
            unused,
            infinite,
            through_jpeg,
            should_be_frozen,
            watched_inside,
            fresh_gate,
            gate_not_held,
            another_loss_goes_back,
            cleared_before_the_step,
            number_in_a_product,
        )
    },
)


@pytest.mark.parametrize('name', BROKEN)
def test_broken(name):
    step, watch, options, expected = BROKEN[name](Parts())
    report = audit_gradient(step, watch, **options)
    assert {b.name: b.how for b in report.breaks} == expected
    assert all(
        b.says
        and (
            b.where
            or b.how
            in ('frozen', 'not frozen', 'not in the optimizer', 'unused', 'in-place', 'not finite')
        )
        for b in report.breaks
    )
    assert all(b.name in repr(report) and b.how in report._repr_markdown_() for b in report.breaks)


# ------------------------- sound: function of Parts -> (step, watch, options)
def straight_through(p):
    def step():
        z, q = p.codes(p.enc(p.x))
        st = z + (q - z).detach()
        return dict(
            recon=F.mse_loss(p.image(st), p.x),
            commit=F.mse_loss(z, q.detach()),
            code=F.mse_loss(q, z.detach()),
        )

    return (
        step,
        dict(p.watch, book=p.book),
        dict(expect=dict(recon=['enc', 'dec'], commit=['enc'], code=['book'])),
    )


def zero_start(p):
    model = ResidualCNN(width=8, depth=4)
    return lambda: F.mse_loss(model(p.x), p.x * 0.9), dict(model=model, first=model.body[0]), {}


def film_zero_init(p):
    film = nn.Linear(3, 4)
    nn.init.zeros_(film.weight)
    nn.init.zeros_(film.bias)
    embed = nn.Linear(3, 3)

    def step():
        gamma, beta = film(embed(torch.ones(2, 3))).view(2, 4, 1, 1).chunk(2, 1)
        return F.mse_loss(p.dec(p.enc(p.x) * (1 + gamma) + beta), p.x)

    return step, dict(p.watch, film=film, embed=embed), {}


def adaln_zero(p):
    gate = nn.Linear(3, 2)
    nn.init.zeros_(gate.weight)
    nn.init.zeros_(gate.bias)
    block = nn.Conv2d(2, 2, 3, padding=1)

    def step():
        z = p.enc(p.x)
        return F.mse_loss(p.dec(z + gate(torch.ones(2, 3)).view(2, 2, 1, 1) * block(z)), p.x)

    return step, dict(p.watch, gate=gate, block=block), {}


def perceptual(p):
    def step():
        x_hat = p.dec(p.enc(p.x))
        with torch.no_grad():
            real = p.trunk(p.x)
        return dict(mse=F.mse_loss(x_hat, p.x), percep=F.mse_loss(p.trunk(x_hat), real))

    return (
        step,
        dict(p.watch, trunk=p.trunk),
        dict(frozen=['trunk'], expect=dict(percep=['enc', 'dec'])),
    )


def teacher(p):
    slow = copy.deepcopy(p.enc).requires_grad_(False)

    def step():
        with torch.no_grad():
            target = slow(p.x.flip(-1))
        return F.mse_loss(p.enc(p.x), target)

    return step, dict(enc=p.enc), {}


def two_optimizers(p):
    opts = [torch.optim.Adam(p.enc.parameters()), torch.optim.SGD(p.dec.parameters(), lr=1)]
    return p.through(lambda z: z), p.watch, dict(optimizer=opts)


def whole_step(p):
    model = nn.Sequential(p.enc, nn.BatchNorm2d(2), nn.Dropout(0.5), p.dec)
    opt = torch.optim.AdamW(model.parameters())
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1.0)

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(p.x), p.x)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        return dict(loss=loss.item(), lr=sched.get_last_lr()[0])

    return step, dict(model=model), {}


def grad_scaler(p):
    opt, scaler = (
        torch.optim.SGD([*p.enc.parameters(), *p.dec.parameters()], lr=0.1),
        torch.amp.GradScaler('cpu'),
    )

    def step():
        opt.zero_grad()
        with torch.autocast('cpu', torch.bfloat16):
            loss = F.mse_loss(p.dec(p.enc(p.x)).float(), p.x)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(p.enc.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()

    return step, p.watch, {}


def learner(precision):
    def build(p):
        model = ResidualCNN(width=8, depth=4)
        data = torch.utils.data.DataLoader([torch.rand(1, 16, 16) for _ in range(4)], 2)
        loss_fn = lambda model, x: F.mse_loss(model(x + 0.1 * torch.randn_like(x)), x)
        learn = Learner(
            model, loss_fn, data, precision=precision, clip=1.0, accumulate=2, cbs=[EMA()], cpu=True
        )
        return (
            (lambda: learn.one_step(iter(learn.train))),
            dict(model=learn.model, first=model.body[0]),
            {},
        )

    return build


def cleared_after_the_step(p):
    opt = torch.optim.SGD([*p.enc.parameters(), *p.dec.parameters()], lr=0.1)

    def step():
        F.mse_loss(p.dec(p.enc(p.x)), p.x).backward()
        opt.step()
        opt.zero_grad()

    return step, p.watch, {}


def another_optimizer_cleared(p):
    first, second = (
        torch.optim.SGD(p.enc.parameters(), lr=0.1),
        torch.optim.SGD(p.dec.parameters(), lr=0.1),
    )

    def step():
        p.enc(p.x).square().mean().backward()
        second.zero_grad()
        first.step()
        F.mse_loss(p.dec(p.enc(p.x).detach()), p.x).backward()
        first.zero_grad()
        second.step()

    return step, p.watch, {}


def manual_update(p):
    def step():
        F.mse_loss(p.dec(p.enc(p.x)), p.x).backward()
        with torch.no_grad():
            for q in [*p.enc.parameters(), *p.dec.parameters()]:
                q.mul_(0.9)
                q -= 0.1 * q.grad

    return step, p.watch, {}


def held_gate(p):
    gate = nn.Parameter(torch.zeros(1))
    return (
        p.through(lambda z: z * gate),
        p.watch,
        dict(optimizer=torch.optim.Adam([gate, *p.enc.parameters(), *p.dec.parameters()])),
    )


def checkpointed(p):
    return lambda: F.mse_loss(p.dec(checkpoint(p.enc, p.x, use_reentrant=False)), p.x), p.watch, {}


def gradient_penalty(p):
    def step():
        x = p.x.clone().requires_grad_()
        score = p.dec(p.enc(x)).sigmoid().sum()
        (g,) = torch.autograd.grad(score, x, create_graph=True)
        return dict(score=score, penalty=(g.norm() - 1) ** 2)

    return step, p.watch, dict(expect=dict(penalty=['enc', 'dec']))


def adaptive_weight(p):
    def step():
        x_hat = p.dec(p.enc(p.x))
        mse, l1 = F.mse_loss(x_hat, p.x), F.l1_loss(x_hat, p.x)
        weight = mse.detach() / l1.detach()
        log = dict(mse=mse.item(), seen=x_hat.detach().cpu().numpy().mean())
        return dict(mse=mse, l1=weight * l1 * torch.tensor(1.0 + 0 * log['mse']))

    return step, p.watch, dict(expect=dict(l1=['enc', 'dec']))


def masked_tokens(p):
    proj, block, mask_token = (
        nn.Linear(16, 8),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.Parameter(torch.zeros(1, 1, 8)),
    )
    pos, head = nn.Parameter(torch.randn(1, 4, 8), requires_grad=False), nn.Linear(8, 16)

    def step():
        t = p.x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(2, 4, 16)
        order = torch.rand(2, 4).argsort(1)
        z = torch.gather(proj(t) + pos, 1, order[:, :2, None].expand(-1, -1, 8))
        full = torch.cat([block(z), mask_token.expand(2, 2, 8)], 1).gather(
            1, order.argsort(1)[..., None].expand(-1, -1, 8)
        )
        return (head(full + pos) - t).square().mean()

    return step, dict(proj=proj, block=block, mask_token=mask_token, head=head), {}


def forward_mode(p):
    def step():
        u, du = torch.func.jvp(lambda t: p.enc(p.x * t), (torch.ones(()),), (torch.ones(()),))
        return F.mse_loss(p.dec(u), (p.x - 0.1 * p.dec(du).detach()))

    return step, p.watch, {}


def written_in_place(p):
    def f(z):
        z = z * 1.5
        z[:, :, :4] = z[:, :, 4:].clone()
        out = torch.zeros_like(z)
        out[:, :1] = z[:, 1:]
        return out.mul_(2).add_(z)

    return p.through(f), p.watch, {}


SOUND = dict(
    plain=lambda p: (p.through(lambda z: z), p.watch, {}),
    round_ste=lambda p: (p.through(RoundSTE.apply), p.watch, {}),
    clamp_inside=lambda p: (p.through(lambda z: z.clamp(-0.2, 0.2)), p.watch, {}),
    tensors=lambda p: (F.mse_loss(p.dec(p.enc(p.x)), p.x), p.watch, {}),
    named=lambda p: (
        (lambda: (lambda z: F.mse_loss(p.dec(z), p.x))(p.enc(p.x))),
        ['z', 'p.dec'],
        {},
    ),
    no_parameters=lambda p: (lambda act: (p.through(act), dict(p.watch, act=act), {}))(nn.GELU()),
    functional_call=lambda p: (
        (
            lambda: F.mse_loss(
                torch.func.functional_call(p.dec, dict(p.dec.named_parameters()), (p.enc(p.x),)),
                p.x,
            )
        ),
        p.watch,
        {},
    ),
    learner_float=learner('no'),
    learner_bf16=learner('bf16'),
    **{
        f.__name__: f
        for f in (
            straight_through,
            zero_start,
            film_zero_init,
            adaln_zero,
            perceptual,
            teacher,
            two_optimizers,
            whole_step,
            grad_scaler,
            checkpointed,
            cleared_after_the_step,
            another_optimizer_cleared,
            manual_update,
            held_gate,
            gradient_penalty,
            adaptive_weight,
            masked_tokens,
            forward_mode,
            written_in_place,
        )
    },
)


@pytest.mark.parametrize('name', SOUND)
def test_sound(name):
    step, watch, options = SOUND[name](Parts())
    report = audit_gradient(step, watch, **options)
    assert report.breaks == [] and report.unused == []
    assert report and 'No break' in repr(report)


# ------------------------- what has two names, or none
def test_none_and_zero_have_names_of_their_own():
    "Both stop the encoder: an operator without a derivative gives None, a flat one gives 0."
    p = Parts()
    for line, how, state, word in (
        (lambda z: (z > 0).float(), 'not differentiable', 'none', 'None'),
        (lambda z: z.argmax(1, True).expand_as(z) / 2, 'not differentiable', 'none', 'None'),
        (lambda z: (z * 255).round() / 255, 'zero slope', 'zero', '0'),
        (lambda z: F.relu(z - 9), 'zero slope', 'zero', '0'),
    ):
        report = audit_gradient(p.through(line), p.watch)
        assert (report.breaks[0].how, report.cells['loss', 'enc'].state) == (how, state)
        assert report.breaks[0].says.endswith(f'(gradient {word})')


def test_each_loss_of_a_tuple_is_a_term():
    p = Parts()

    def step(second, *more):
        return lambda: (F.mse_loss(p.dec(p.enc(p.x)), p.x), second(), *more)

    l1 = lambda: F.l1_loss(p.dec(p.enc(p.x)), p.x)
    assert list(audit_gradient(step(l1), p.watch).cells) == [
        (term, part) for term in ('loss', 'loss 2') for part in p.watch
    ]
    report = audit_gradient(step(lambda: 0.0 * l1()), p.watch)
    assert {b.name: b.how for b in report.breaks} == {'loss 2': 'zero factor'}
    # a part that only the second loss moves is sound; as a list, too
    book = lambda: p.book.weight.square().mean()
    assert audit_gradient(step(book), dict(p.watch, book=p.book)).breaks == []
    assert audit_gradient(lambda: list(step(book)()), dict(p.watch, book=p.book)).breaks == []
    # images, numbers and what was detached for a log are no losses; nor is the same loss again
    for extra in (lambda: p.x, lambda: 0.5, lambda: l1().detach()):
        assert {term for term, _ in audit_gradient(step(extra), p.watch).cells} == {'loss'}
    assert audit_gradient(lambda: (l1(),) * 2, p.watch).rows[1:] == []
    # a dict and one more; and what goes backward is told from its parts
    terms = lambda: (dict(l1=l1()), book())
    report = audit_gradient(terms, dict(p.watch, book=p.book), expect={'loss 2': ['book']})
    assert report and {term for term, _ in report.cells} == {'l1', 'loss 2'}

    def backward_of_the_sum():
        a, b = step(l1)()
        (a + b).backward()
        return a, b

    assert {t for t, _ in audit_gradient(backward_of_the_sum, p.watch).cells} == {'loss', 'loss 2'}

    def backward_of_one():
        a, b = step(l1)()
        a.backward()
        return a, b

    assert {t for t, _ in audit_gradient(backward_of_one, p.watch).cells} == {'loss'}


def test_a_layer_that_is_never_called_is_listed():
    p = Parts()
    side = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model = nn.ModuleDict(dict(enc=p.enc, dec=p.dec, side=side))
    model.scale = nn.Parameter(torch.ones(1))
    model.frozen = nn.Linear(3, 3).requires_grad_(False)
    step = lambda: F.mse_loss(model.dec(model.enc(p.x)), p.x)
    report = audit_gradient(step, dict(model=model))
    assert report and report.unused == ['model.scale', 'model.side']
    assert 'no term depends on model.scale, model.side' in report.says
    report = audit_gradient(step, dict(model=model, side=model.side))
    assert {b.name: b.how for b in report.breaks} == {'side': 'unused'}
    assert report.unused == ['model.scale']
    report = audit_gradient(step, dict(model=model, scale=model.scale))
    assert [b.name for b in report.breaks] == ['scale'] and report.unused == ['model.side']
    # used: one weight of two; a number that left torch; of a step that has run nothing is known
    by_weight = lambda: step() + F.linear(torch.ones(3), model.side[0].weight).sum()
    found = audit_gradient(by_weight, dict(model=model)).unused
    assert found == ['model.scale', 'model.side.0.bias']
    by_number = lambda: step() * model.scale.item()
    assert audit_gradient(by_number, dict(model=model)).unused == ['model.side']
    assert audit_gradient(step(), dict(model=model)).unused == []


# ------------------------- what it says, and what it leaves as it was
def test_norms_are_those_of_backward():
    p = Parts()
    report = audit_gradient(p.through(torch.tanh), p.watch)
    p.through(torch.tanh)().backward()
    for name, module in p.watch.items():
        norm = torch.stack([q.grad.norm() for q in module.parameters()]).norm().item()
        assert report.cells['loss', name].norm == pytest.approx(norm, rel=1e-5)


def test_place_is_the_line_of_the_cut():
    (b,) = audit_gradient(BROKEN['by_numpy'](Parts())[0], Parts().watch | {}).breaks[:1]
    p = Parts()
    step, watch, _, _ = no_grad(p)
    (b,) = audit_gradient(step, watch).breaks
    assert b.where.startswith('test_tracer.py:') and b.where.endswith(': z = p.enc(p.x)')


@pytest.mark.parametrize('name', ['whole_step', 'grad_scaler'])
def test_a_step_is_not_made(name):
    step, watch, _ = SOUND[name](Parts())
    params = [p for m in watch.values() for p in m.parameters()]
    for p in params:
        p.grad = torch.ones_like(p)
    before, rng = [p.detach().clone() for p in params], torch.get_rng_state()
    audit_gradient(step, watch)
    assert all(torch.equal(a, b) for a, b in zip(before, params)) and all(
        (p.grad == 1).all() for p in params
    )
    assert torch.equal(rng, torch.get_rng_state())


def test_the_place_of_a_clearing_is_the_line_of_the_step():
    step, watch, _, _ = cleared_before_the_step(Parts())
    (b,) = audit_gradient(step, watch).breaks
    assert b.where.startswith('test_tracer.py:') and b.where.endswith('opt.zero_grad()')


def test_schedules_averages_and_buffers_stay():
    p = Parts()
    model = nn.Sequential(p.enc, nn.BatchNorm2d(2), p.dec)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau, average = (
        torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, threshold=1.0),
        torch.optim.swa_utils.AveragedModel(model),
    )

    def step():
        opt.zero_grad()
        loss = F.mse_loss(model(p.x), p.x)
        loss.backward()
        opt.step()
        plateau.step(loss.item())
        average.update_parameters(model)

    before = {k: v.clone() for k, v in model.state_dict().items()}
    model[0].weight.grad = torch.ones_like(model[0].weight)
    for watch in (dict(model=model), ['model']):
        assert audit_gradient(step, watch).breaks == [] and (model[0].weight.grad == 1).all()
    assert opt.param_groups[0]['lr'] == 0.1 and average.n_averaged == 0
    audit_gradient(step, dict(model=model))
    after = model.state_dict()
    assert all(
        torch.equal(v, after[k])
        for k, v in before.items()
        if 'running' not in k and 'num_batches' not in k
    )
    before = {k: v.clone() for k, v in after.items()}
    audit_gradient(step, dict(model=model))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_reentrant_checkpoints_are_named():
    p = Parts()
    with pytest.raises(ValueError, match='[Cc]heckpoint'):
        audit_gradient(
            lambda: F.mse_loss(
                p.dec(checkpoint(p.enc, p.x.clone().requires_grad_(), use_reentrant=True)), p.x
            ),
            p.watch,
        )


def test_nothing_stays_behind():
    import sys

    before = (
        torch.from_numpy,
        torch.autograd.backward,
        torch.amp.GradScaler.step,
        sys.getprofile(),
    )

    def fails():
        raise KeyError('mine')

    with pytest.raises(KeyError):
        audit_gradient(fails, ['z'])
    p = Parts()
    audit_gradient(p.through(lambda z: z), p.watch)
    assert before == (
        torch.from_numpy,
        torch.autograd.backward,
        torch.amp.GradScaler.step,
        sys.getprofile(),
    )
    p.through(lambda z: z)().backward()
    assert p.enc.weight.grad is not None


def test_zero_start_is_told_from_zero_slope():
    p = Parts()
    step, watch, _ = zero_start(p)
    cells = audit_gradient(step, watch).cells
    assert cells['loss', 'first'].state == 'zero start' and cells['loss', 'model'].state == 'alive'
    step, watch, _, _ = BROKEN['round'](p)
    assert audit_gradient(step, watch).cells['loss', 'enc'].state == 'zero'


def test_reasons_that_are_not_breaks_of_the_chain():
    p = Parts()
    report = audit_gradient(
        lambda: F.mse_loss(p.dec(torch.ones_like(p.enc(p.x))), p.x), p.watch
    )  # a shape is taken, no value
    assert [(b.name, b.how) for b in report.breaks] == [('enc', 'unused')]

    def step():
        k = int(torch.randint(8, ()))
        y = p.x.roll(k, -1)
        return F.mse_loss(p.dec(p.enc(y)), p.x * torch.tensor([1.0, 2.0])[0])

    report = audit_gradient(step, ['y', 'p.enc'])
    assert [(b.name, b.how) for b in report.breaks] == [
        ('y', 'constant')
    ]  # data, whatever numbers were drawn
    (b,) = audit_gradient(
        lambda: p.x.mean() * 0 + jpeg(torch.sigmoid(p.dec(p.x.expand(-1, 2, -1, -1))), 50).mean(),
        dict(dec=p.dec),
    ).breaks[:1]
    assert b.how == 'numpy' and 'tolist' not in b.says


def test_of_a_step_that_has_run():
    p = Parts()
    z = p.enc(p.x)
    report = audit_gradient(F.mse_loss(p.dec(z.detach()), p.x), dict(p.watch, z=z))
    assert {b.name: b.how for b in report.breaks} == {'enc': 'cut', 'z': 'detach'}
    report = audit_gradient(
        dict(a=p.enc(p.x).mean().detach(), b=p.enc(p.x).round().mean()), dict(enc=p.enc)
    )
    assert {b.name: b.how for b in report.breaks} == {
        'a': 'constant',
        'b': 'zero slope',
        'enc': 'zero slope',
    }
    loss = F.mse_loss(p.dec(p.enc(p.x)), p.x)
    loss.backward()
    with pytest.raises(ValueError, match='lost its graph'):
        audit_gradient(loss, p.watch)


def test_wrapped_by_accelerate_in_processes(tmp_path):
    import torch.distributed as dist

    p = Parts()
    dist.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(p.enc, p.dec))
        opt = torch.optim.SGD(model.parameters(), lr=0.1)

        def step():
            loss = F.mse_loss(model(p.x), p.x)
            loss.backward()
            opt.step()

        assert audit_gradient(step, dict(model=model, enc=p.enc)).breaks == []
    finally:
        dist.destroy_process_group()


def test_bad_input():
    p = Parts()
    step = p.through(lambda z: z)
    with pytest.raises(ValueError, match='watch is'):
        audit_gradient(step, {})
    with pytest.raises(ValueError, match="no variable 'q'"):
        audit_gradient(step, ['q'])
    with pytest.raises(ValueError, match='need the step as a function'):
        audit_gradient(step(), ['z'])
    with pytest.raises(TypeError, match='watch holds .* str|int'):
        audit_gradient(step, dict(z=3))
    with pytest.raises(TypeError, match='no backward'):
        audit_gradient(lambda: None, p.watch)
    with pytest.raises(ValueError, match='shape'):
        audit_gradient(lambda: p.enc(p.x), p.watch)
    with pytest.raises(ValueError, match="'book' is not in watch"):
        audit_gradient(step, p.watch, expect=dict(loss=['book']))
    with pytest.raises(ValueError, match="the term 'recon'"):
        audit_gradient(step, p.watch, expect=dict(recon=['enc']))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('name', ['detach', 'round', 'no_grad', 'by_numpy'])
def test_broken_on_a_gpu(name):
    p = Parts()
    for part in ('x', 'enc', 'dec', 'book', 'trunk'):
        setattr(p, part, getattr(p, part).cuda())
    p.watch = dict(enc=p.enc, dec=p.dec)
    step, watch, options, expected = BROKEN[name](p)
    if name == 'by_numpy':
        step = p.through(lambda z: torch.from_numpy(z.detach().cpu().numpy()).cuda())
    with torch.autocast('cuda', torch.float16):
        report = audit_gradient(step, watch, **options)
    assert {b.name: b.how for b in report.breaks} == expected


# ------------------------- updates that no operator's name gives away
class Plain:
    "An optimizer that is none of torch's."

    def __init__(self, params):
        self.params = list(params)

    def step(self):
        torch._foreach_sub_([p.data for p in self.params], 0.1)


def each(write):
    def update(params, grads):
        with torch.no_grad():
            for q, g in zip(params, grads):
                write(q, g)

    return update


def by_vector(params, grads):
    flat = nn.utils.parameters_to_vector(params)
    nn.utils.vector_to_parameters(flat - 0.1 * nn.utils.parameters_to_vector(grads) - 0.01, params)


def fill(q, g):
    q[:] = q - 0.1 * g - 0.01


def fill_data(q, g):
    q.data[...] = 0.5


def assign(q, g):
    q.data = q.data - 0.1 * g - 0.01


def by_numpy_memory(q, g):
    q.detach().numpy()[...] -= 0.1


UPDATES = dict(
    data=each(lambda q, g: q.data.sub_(0.1 * g + 0.01)),
    plain=each(lambda q, g: q.sub_(0.1 * g + 0.01)),
    copy=each(lambda q, g: q.copy_(q - 0.1 * g - 0.01)),
    slices=each(fill),
    slices_of_data=each(fill_data),
    data_assigned=each(assign),
    other_memory=each(lambda q, g: q.set_(torch.zeros_like(q))),
    out=each(lambda q, g: torch.sub(q, 0.1, out=q)),
    init=each(lambda q, g: nn.init.normal_(q)),
    numpy_memory=each(by_numpy_memory),
    foreach=torch.no_grad()(
        lambda params, grads: torch._foreach_add_(params, [g + 0.1 for g in grads], alpha=-0.1)
    ),
    foreach_of_data=lambda params, grads: torch._foreach_mul_([q.data for q in params], 0.9),
    vector=by_vector,
    own_optimizer=lambda params, grads: Plain(params).step(),
    sgd_foreach=lambda params, grads: torch.optim.SGD(
        params, lr=0.1, weight_decay=0.1, foreach=True
    ).step(),
    adam_fused=lambda params, grads: torch.optim.AdamW(params, lr=0.1, fused=True).step(),
)


def image_of(tensors):
    return [
        (
            id(t),
            t.data_ptr(),
            t._version,
            t.requires_grad,
            t.detach().clone(),
            t.grad,
            None if t.grad is None else t.grad.clone(),
        )
        for t in tensors
    ]


def same(a, b):
    return all(
        p[:4] == q[:4]
        and torch.equal(p[4], q[4])
        and p[5] is q[5]
        and (p[6] is None or torch.equal(p[6], q[6]))
        for p, q in zip(a, b, strict=True)
    )


@pytest.mark.parametrize('broken', [False, True])
@pytest.mark.parametrize('way', ['backward', 'autograd.grad'])
@pytest.mark.parametrize('name', UPDATES)
def test_no_update_is_made_and_the_report_is_that_of_the_bare_step(name, way, broken):
    p = Parts()
    params = [*p.enc.parameters(), *p.dec.parameters()]
    for k, q in enumerate(params):
        q.grad = torch.full_like(q, float(k))
    cut = (lambda z: z.round()) if broken else (lambda z: z)

    def step():
        loss = p.through(cut)()
        if way == 'backward':
            loss.backward()
            grads = [q.grad for q in params]
        else:
            grads = [
                torch.zeros_like(q) if g is None else g
                for q, g in zip(params, torch.autograd.grad(loss, params, allow_unused=True))
            ]
        UPDATES[name](params, grads)
        return loss.item()

    before, bare = image_of(params), audit_gradient(p.through(cut), p.watch)
    report = audit_gradient(step, p.watch)
    assert same(before, image_of(params))
    assert [(b.name, b.how) for b in report.breaks] == [
        (b.name, b.how) for b in bare.breaks
    ] and bool(report) != broken
    assert {k: (c.state, c.norm) for k, c in report.cells.items()} == {
        k: (c.state, c.norm) for k, c in bare.cells.items()
    }


@pytest.mark.parametrize('fails', [False, True])
def test_all_that_a_step_leads_to_comes_back(fails):
    p = Parts()
    bn, teacher, table = (
        nn.BatchNorm2d(2),
        copy.deepcopy(p.enc).requires_grad_(False),
        dict(mean=torch.ones(2)),
    )
    net = nn.Sequential(p.enc, bn, p.dec)
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    F.mse_loss(net(p.x), p.x).backward()
    opt.step()
    old = torch.zeros(3)

    def step():
        loss = F.mse_loss(net(p.x), p.x) + teacher(p.x).mean()
        loss.backward()
        torch._foreach_lerp_(list(teacher.parameters()), list(p.enc.parameters()), 0.5)
        table['mean'].mul_(2)
        old.add_(1)
        for entry in opt.state.values():
            entry['momentum_buffer'].zero_()
        opt.param_groups[0]['lr'] *= 0.5
        opt.state.clear()
        bn.weight.requires_grad_(False)
        net.eval()
        p.enc.weight.grad.zero_()
        p.enc.weight.register_hook(lambda g: g)
        net.register_forward_hook(lambda *a: None)
        p.dec.bias = nn.Parameter(torch.zeros(1))
        np.random.rand()
        random.random()
        torch.rand(1)
        if fails:
            raise KeyError('mine')

    everything = [*net.parameters(), *net.buffers(), *teacher.parameters(), table['mean'], old]
    before, state = (
        image_of(everything),
        {q: s['momentum_buffer'].clone() for q, s in opt.state.items()},
    )
    seeds = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    if fails:
        with pytest.raises(KeyError):
            audit_gradient(step, ['net'])
    else:
        assert isinstance(audit_gradient(step, ['net']).breaks, list)
    assert same(
        before,
        image_of([*net.parameters(), *net.buffers(), *teacher.parameters(), table['mean'], old]),
    )
    assert (
        opt.param_groups[0]['lr'] == 0.1
        and len(opt.state) == len(state)
        and all(torch.equal(opt.state[q]['momentum_buffer'], v) for q, v in state.items())
    )
    assert (
        all(m.training for m in net.modules())
        and not net._forward_hooks
        and not p.enc.weight._backward_hooks
    )
    assert (
        torch.equal(seeds[0], torch.get_rng_state())
        and (seeds[1] == np.random.get_state()[1]).all()
        and seeds[2] == random.getstate()
    )


def test_a_list_of_names_restores_the_statistics():
    bn, x = nn.BatchNorm2d(1), torch.rand(4, 1, 8, 8)
    before = {k: v.clone() for k, v in bn.state_dict().items()}
    assert audit_gradient(lambda: bn(x).square().mean() + bn(x).sum(), ['bn'])
    assert all(torch.equal(v, before[k]) for k, v in bn.state_dict().items())


def test_two_phases_see_the_weights_that_there_were():
    "A second loss after an update of the first: its gradient is that at the weights as they were."
    p = Parts()
    first, second = p.through(torch.tanh), lambda: p.dec(p.enc(p.x)).square().mean()

    def step():
        first().backward()
        with torch.no_grad():
            for q in p.enc.parameters():
                q.mul_(3.0)
        second().backward()

    report = audit_gradient(step, p.watch)
    assert report and report.cells['loss 2', 'enc'].norm == pytest.approx(
        audit_gradient(second, p.watch).cells['loss', 'enc'].norm
    )


def test_a_step_by_autograd_grad_is_named_like_one_by_backward():
    p = Parts()

    def step():
        loss = F.mse_loss(p.dec(p.enc(p.x).detach()), p.x)
        grads = torch.autograd.grad(loss, list(p.dec.parameters()))
        for q, g in zip(p.dec.parameters(), grads):
            q.data.sub_(0.1 * g)

    (b,) = audit_gradient(step, p.watch).breaks
    assert (b.name, b.how) == ('enc', 'detach') and 'detach()' in b.where

    def weighted():  # an adaptive weight asks for gradients, too, and is no loss
        out = p.dec(p.enc(p.x))
        mse, l1 = F.mse_loss(out, p.x), F.l1_loss(out, p.x)
        weight = (
            torch.autograd.grad(mse, p.dec.weight, retain_graph=True)[0].norm()
            / torch.autograd.grad(l1, p.dec.weight, retain_graph=True)[0].norm()
        )
        return dict(mse=mse, l1=weight * l1)

    report = audit_gradient(weighted, p.watch)
    assert report and set(report.cells) == {(t, s) for t in ('mse', 'l1') for s in p.watch}


def test_a_network_that_is_frozen_for_the_next_phase_had_its_gradient():
    p = Parts()

    def step():
        F.mse_loss(p.dec(p.enc(p.x)), p.x).backward()
        p.enc.requires_grad_(False)

    assert audit_gradient(step, p.watch).breaks == [] and all(
        q.requires_grad for q in p.enc.parameters()
    )


def test_the_tracers_own_variables_are_not_the_steps():
    "Of all names that the tracer gives to its variables, those are found that the step uses, too."
    modules = 'tracer tracer_operators tracer_rehearsal tracer_snapshots tracer_values'.split()
    modules = {'restore_lib.' + name for name in ['states', *modules]}
    defined = [v for name in modules for v in vars(sys.modules[name]).values()]
    functions = [f for v in defined for f in (vars(v).values() if isinstance(v, type) else [v])]
    own = [f for f in functions if getattr(f, '__module__', '') in modules]
    names = {name for code in codes_of(*own) for name in code.co_varnames}
    whole, _, _ = SOUND['whole_step'](Parts())
    through_numpy, _, _, _ = by_numpy(Parts())

    def step():
        through_numpy()
        torch.autograd.grad(whole_too(), own_net.weight)
        whole()

    own_net = nn.Linear(2, 2)
    whole_too = lambda: own_net(torch.ones(2)).sum()
    used = codes_of(step, whole, by_numpy, Parts.through)
    used = {name for code in used for name in code.co_varnames}
    with rehearsed(names, Snapshot()) as (rehearsal, found):
        step()
    assert len(names) > 100 and rehearsal.losses and rehearsal.updates.optimizers
    assert found.keys() <= used


def test_where_all_ways_end_is_named_and_not_what_ends_beside_a_way():
    "A quantiser has detached ways of its own; the detach behind it cuts them all."
    p = Parts()

    def step(cut):
        def run():
            z, q = p.codes(p.enc(p.x))
            scale = (q.norm() / z.norm()).detach()
            passed_on = z * scale + (q - z * scale).detach()
            return F.mse_loss(p.image(cut(passed_on)), p.x)

        return run

    (found,) = audit_gradient(step(lambda q: q.detach()), p.watch).breaks
    assert (found.name, found.how, found.says) == ('enc', 'detach', 'detached by detach')
    assert 'lambda q: q.detach()' in found.where
    assert audit_gradient(step(lambda q: q), p.watch)


def dropped(z):
    z = z * 1
    z.register_hook(lambda g: g * 0)
    return z


@pytest.mark.parametrize(
    'between, how, says',
    [
        (lambda z: z - z, 'cancelled', '(sub) and add up to zero'),
        (lambda z: 2 * z - z * 2, 'cancelled', '(mul) and add up to zero'),
        (lambda z: z + 1 - z.clone(), 'cancelled', '(add, clone) and add up to zero'),
        (dropped, 'no gradient', 'a hook makes zeros of it'),
        (lambda z: torch.cat([z[:0], torch.zeros_like(z)]), 'no gradient', 'comes to cat'),
        (lambda z: torch.where(z > 99, z, 1.0), 'no gradient', 'comes to where'),
        (lambda z: z * torch.zeros(3, 2), 'zero factor', 'zero in mul'),
        (lambda z: torch.tensor(0.0) / z, 'zero factor', 'zero in div'),
        (lambda z: z / float('inf'), 'zero factor', 'zero in div'),
        (lambda z: torch.lerp(z, torch.ones(3, 2), 1.0), 'zero factor', 'zero in lerp'),
        (lambda z: z @ torch.zeros(2, 2), 'zero factor', 'zero in mm'),
        (lambda z: (z - z.detach()).pow(2), 'constant', 'pow gets zeros only'),
        (lambda z: F.relu(z - 9), 'zero slope', 'relu is flat'),
    ],
)
def test_what_is_said_of_a_gradient_that_is_zero(between, how, says):
    "No factor of zero, no flat function and no error is claimed that is not there."
    torch.manual_seed(0)
    enc, dec, x = nn.Linear(4, 2), nn.Linear(2, 4), torch.rand(3, 4)

    def step():
        z = enc(x)
        return F.mse_loss(dec(between(z)), x)

    (found,) = [b for b in audit_gradient(step, dict(enc=enc, dec=dec)).breaks if b.name == 'enc']
    assert (found.how, says in found.says) == (how, True), found
    assert 'enc(x)' not in found.where


def test_a_parameter_whose_uses_cancel_and_one_of_two_results():
    w, x = nn.Parameter(torch.ones(2)), torch.rand(2)
    (found,) = audit_gradient(lambda: dict(own=(w * x - x * w).sum()), dict(w=w)).breaks[:1]
    assert found.how == 'cancelled' and '(mul)' in found.says
    h = nn.Parameter(torch.rand(2, 3))

    def step():
        first, second = h.unbind()
        return (first - first + second).sum()

    report = audit_gradient(step, ['first', 'second'])
    assert [(b.name, b.how) for b in report.breaks] == [('first', 'cancelled')]
    hooked = nn.Parameter(torch.ones(2))
    hooked.register_hook(lambda g: g * 0)
    (found,) = audit_gradient(lambda: (hooked * x).sum(), dict(hooked=hooked)).breaks[1:]
    assert (found.how, found.says) == (
        'no gradient',
        'mul passes one on, and a hook makes zeros of it',
    )


def test_a_sum_that_cancels_is_no_factor_of_zero():
    "A gate whose gradient is a sum over the image, plus and minus: no factor is zero."
    gate, z = nn.Parameter(torch.ones(1)), torch.tensor([1.0, -1.0])
    found = audit_gradient(lambda: (z * gate).sum(), dict(gate=gate)).breaks[-1]
    assert (
        found.how == 'no gradient'
        and found.says == 'a gradient comes to mul, and zeros go on from there'
    )


# ------------------------- what values tell: zeros that nobody trains, tokens that are all the same
class Reader(nn.Module):
    "Tokens, positions, one attention (in the way of `kind`), a head."

    def __init__(self, kind='sdpa', positions=None, d=8, tokens=6):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.embed, self.head = kind, nn.Linear(4, d), nn.Linear(d, 4)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.qkv = nn.Linear(d, 3 * d) if kind == 'fused' else None
        self.mha = nn.MultiheadAttention(d, 2, batch_first=True) if kind == 'mha' else None
        self.dropout = nn.Dropout(0.1)
        self.positions = positions
        self.x = torch.rand(2, tokens, 4)

    def attend(self, x, context=None, values=None):
        context = x if context is None else context
        values = context if values is None else values
        if self.mha is not None:
            return self.mha(x, context, values)[0]
        if self.qkv is not None:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        else:
            parts = self.q_proj(x), self.k_proj(context), self.v_proj(values)
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in parts)
        if self.kind == 'eager':
            out = self.dropout((q @ k.transpose(-1, -2) / 2).softmax(-1)) @ v
        elif self.kind == 'einsum':
            weights = torch.einsum('bhid,bhjd->bhij', q, k).softmax(-1)
            out = torch.einsum('bhij,bhjd->bhid', weights, v)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)

    def forward(self, x):
        x = self.embed(x)
        x = x if self.positions is None else x + self.positions
        return self.head(x + self.attend(x))


def fit(model, x=None):
    "A step of a model that copies its input."
    x = model.x if x is None else x
    return lambda: F.mse_loss(model(x), model.x)


def still(*shape, value=0.0):
    return nn.Parameter(torch.full(shape, value), requires_grad=False)


def zero_positions():
    model = Reader(positions=still(1, 6, 8))
    return fit(model), dict(model=model), {'model.positions': 'adds nothing'}


def zero_positions_of_a_slice():
    model = Reader()
    model.table = still(1, 7, 8)
    step = lambda: F.mse_loss(
        model.head(model.attend(model.embed(model.x) + model.table[:, 1:])), model.x
    )
    return step, dict(model=model), {'model.table': 'adds nothing'}


def zero_positions_looked_up():
    model = Reader()
    model.table = nn.Embedding(6, 8)
    nn.init.zeros_(model.table.weight)
    model.table.requires_grad_(False)
    step = lambda: F.mse_loss(
        model.head(model.attend(model.embed(model.x) + model.table(torch.arange(6)))), model.x
    )
    return step, dict(model=model), {'model.table.weight': 'adds nothing'}


def zero_positions_in_a_buffer():
    model = Reader()
    del model.positions
    model.register_buffer('positions', torch.zeros(1, 6, 8))
    return fit(model), dict(model=model), {'model.positions': 'adds nothing'}


def zero_positions_of_a_part():
    model = Reader(positions=still(1, 6, 8))
    encoder = nn.ModuleDict(dict(inner=model))
    watch = dict(encoder=encoder, head=model.head)
    return fit(model), watch, {'encoder.inner.positions': 'adds nothing'}


def zero_scale_of_channels():
    model = Reader()
    model.scale = still(8)
    step = lambda: F.mse_loss(
        model.head(model.embed(model.x) + model.scale * model.attend(model.embed(model.x))),
        model.x,
    )
    return step, dict(embed=model.embed, scaled=nn.ParameterList([model.scale])), {
        'scaled.0': 'what it multiplies is lost',
        'scaled': '',
    }


def zero_weight_of_a_layer():
    model = Reader()
    model.side = nn.Linear(8, 8)
    nn.init.zeros_(model.side.weight)
    model.side.weight.requires_grad_(False)
    step = lambda: F.mse_loss(
        model.head(model.embed(model.x) + model.side(model.attend(model.embed(model.x)))), model.x
    )
    watch = dict(embed=model.embed, side=model.side, head=model.head)
    return step, watch, {'side.weight': 'what it multiplies is lost'}


ZERO_AND_FROZEN = [
    zero_positions,
    zero_positions_of_a_slice,
    zero_positions_looked_up,
    zero_positions_in_a_buffer,
    zero_positions_of_a_part,
    zero_scale_of_channels,
    zero_weight_of_a_layer,
]


@pytest.mark.parametrize('case', ZERO_AND_FROZEN, ids=lambda f: f.__name__)
def test_a_zero_that_is_frozen_is_named(case):
    step, watch, expected = case()
    report = audit_gradient(step, watch)
    assert {b.name for b in report.breaks} == set(expected)
    for b in report.breaks:
        if expected[b.name]:
            assert b.how == 'zero and frozen' and expected[b.name] in b.says
            assert b.where.startswith('test_tracer.py:') and b.how in repr(report)


@pytest.mark.parametrize('kind', ['sdpa', 'eager', 'einsum', 'fused', 'mha'])
@pytest.mark.parametrize('tokens', [4, 6, 17])
def test_an_attention_over_equal_tokens_is_named(kind, tokens):
    "In most of these, rounding leaves queries and keys a gradient that is not zero."
    model = Reader(kind, tokens=tokens)
    report = audit_gradient(fit(model, model.x[:, :1].expand(-1, tokens, -1)), dict(model=model))
    names = {'fused': ['qkv'], 'mha': ['mha.in_proj_weight']}.get(kind, ['q_proj', 'k_proj'])
    if kind in ('fused', 'mha'):
        unused = {f'model.{n}' for n in ('q_proj', 'k_proj', 'v_proj')}
    else:
        unused = set()
    found = [b for b in report.breaks if b.name.rpartition('.')[0] not in unused]
    assert [b.name for b in found] == [f'model.{name}' for name in names]
    assert {b.how for b in found} == {'constant input'}
    assert all(f'at all {tokens} tokens' in b.says and b.where for b in found)


def test_equal_keys_and_equal_values_are_told_apart():
    model = Reader()

    def step(context, values):
        x = model.embed(model.x)
        return lambda: F.mse_loss(model.head(model.attend(x, context, values)), model.x)

    same, differ = torch.rand(2, 1, 8).expand(2, 6, 8), torch.rand(2, 6, 8)
    for context, values, word in ((same, differ, 'keys'), (differ, same, 'values')):
        found = audit_gradient(step(context, values), dict(model=model)).breaks
        found = [b for b in found if b.how == 'constant input']
        assert [b.name for b in found] == ['model.q_proj', 'model.k_proj']
        assert all(b.says.startswith(f'its {word}') for b in found)
    assert audit_gradient(
        step(differ, differ), dict(q=model.q_proj, k=model.k_proj, head=model.head)
    )
    found = audit_gradient(step(same, same), dict(q=model.q_proj, k=model.k_proj)).breaks
    assert [(b.name, b.how) for b in found] == [('q', 'constant input'), ('k', 'constant input')]


def test_the_first_attention_of_queries_that_start_empty():
    "Queries of zeros with learned positions, as detection transformers have them: no values."
    model = Reader()
    queries = nn.Parameter(torch.randn(1, 6, 8))

    def step():
        empty = torch.zeros(1, 6, 8)
        return F.mse_loss(
            model.head(model.attend(empty + queries, empty + queries, empty)), model.x[:1]
        )

    watch = dict(q=model.q_proj, v=model.v_proj, head=model.head)
    assert [(b.name, b.how) for b in audit_gradient(step, watch).breaks] == [
        ('q', 'constant input')
    ]


@pytest.mark.parametrize('kind', ['sdpa', 'eager'])
def test_an_attention_to_a_single_token_is_named(kind):
    model = Reader(kind)
    one = torch.rand(2, 1, 8)
    step = lambda: F.mse_loss(model.head(model.attend(model.embed(model.x), one)), model.x)
    found = audit_gradient(step, dict(model=model)).breaks[:2]
    assert [(b.name, b.how) for b in found] == [
        ('model.q_proj', 'constant input'),
        ('model.k_proj', 'constant input'),
    ]
    assert 'single token' in found[0].says


def test_a_norm_of_single_values_is_named():
    "The mean of one value is the value, and nothing is left."
    p = Parts()
    norm = nn.LayerNorm(1)
    step = lambda: F.mse_loss(p.dec(norm(p.enc(p.x)[..., None])[..., 0]), p.x)
    (found,) = [b for b in audit_gradient(step, p.watch).breaks if b.name == 'enc']
    assert found.how == 'constant input' and 'norm averages over is one value' in found.says


# ------------------------- and the sound ones beside them
def frozen_positions():
    model = Reader(positions=nn.Parameter(torch.randn(1, 6, 8), requires_grad=False))
    return fit(model), dict(model=model), {}


def learned_positions_from_zero():
    model = Reader(positions=nn.Parameter(torch.zeros(1, 6, 8)))
    return fit(model), dict(model=model), {}


def learned_positions_for_equal_tokens():
    model = Reader(positions=nn.Parameter(torch.zeros(1, 6, 8)))
    return fit(model, model.x[:, :1].expand(-1, 6, -1)), dict(model=model), {}


def frozen_zero_bias():
    model = Reader()
    for layer in (model.k_proj, model.head):
        nn.init.zeros_(layer.bias)
        layer.bias.requires_grad_(False)
    return fit(model), dict(model=model), {}


def frozen_zero_shift_beside_a_norm():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 3))
    nn.init.zeros_(model[1].bias)
    model[1].bias.requires_grad_(False)
    return lambda: model(torch.rand(2, 1, 8, 8)).square().mean(), dict(model=model), {}


def frozen_scale_around_one():
    model = Reader()
    model.gamma = still(6, 8)
    step = lambda: F.mse_loss(
        model.head(model.attend(model.embed(model.x) * (1 + model.gamma))), model.x
    )
    return step, dict(model=model), {}


def frozen_log_scale():
    model = Reader()
    model.scale = still(6, 8)
    step = lambda: F.mse_loss(
        model.head(model.attend(model.embed(model.x) * model.scale.exp())), model.x
    )
    return step, dict(model=model), {}


def frozen_network_with_zero_biases():
    p = Parts()
    trunk = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).requires_grad_(False)
    for layer in (trunk[0], trunk[2]):
        nn.init.zeros_(layer.bias)
    model = nn.ModuleDict(dict(enc=p.enc, dec=p.dec, trunk=trunk))
    step = lambda: F.mse_loss(trunk(p.dec(p.enc(p.x))), trunk(p.x))
    return step, dict(model=model), {}


def teacher_with_a_zero_layer():
    "A teacher begins as a copy of a network that starts at zero, and follows it by averaging."
    model = nn.ModuleDict(dict(student=ResidualCNN(width=8, depth=4)))
    model['teacher'] = copy.deepcopy(model['student']).requires_grad_(False)
    x = torch.rand(2, 1, 8, 8)

    def step():
        with torch.no_grad():
            target = model['teacher'](x)
        return F.mse_loss(model['student'](x * 0.9), target)

    return step, dict(model=model), {}


def zero_mask_of_scores():
    model = Reader('eager')
    model.register_buffer('mask', torch.zeros(6, 6))

    def step():
        x = model.embed(model.x)
        scores = model.q_proj(x) @ model.k_proj(x).transpose(1, 2) + model.mask
        return F.mse_loss(model.head(scores.softmax(-1) @ model.v_proj(x)), model.x)

    return step, dict(q=model.q_proj, model=model.k_proj, buffers=model), {}


def zero_mean_that_is_taken_off():
    model = Reader()
    model.register_buffer('mean', torch.zeros(6, 8))
    step = lambda: F.mse_loss(model.head(model.attend(model.embed(model.x) - model.mean)), model.x)
    return step, dict(model=model), {}


def zero_token_that_is_filled_in():
    model = Reader(positions=nn.Parameter(torch.randn(1, 6, 8), requires_grad=False))
    model.token = still(1, 1, 8)

    def step():
        seen = model.embed(model.x[:, :3])
        x = torch.cat([seen, model.token.expand(2, 3, 8)], 1) + model.positions
        return F.mse_loss(model.head(model.attend(x)), model.x)

    return step, dict(model=model), {}


def declared_part():
    model = Reader()
    model.side = nn.Linear(8, 8)
    nn.init.zeros_(model.side.weight)
    model.side.requires_grad_(False)
    step = lambda: F.mse_loss(
        model.head(model.embed(model.x) + model.side(model.attend(model.embed(model.x)))), model.x
    )
    return step, dict(embed=model.embed, side=model.side, head=model.head), dict(frozen=['side'])


def declared_tensor():
    model = Reader(positions=still(1, 6, 8))
    return fit(model), dict(model=model, table=model.positions), dict(frozen=['table'])


def keys_from_zero():
    model = Reader()
    nn.init.zeros_(model.k_proj.weight)
    nn.init.zeros_(model.k_proj.bias)
    return fit(model), dict(model=model), {}


def values_from_zero():
    model = Reader()
    nn.init.zeros_(model.v_proj.weight)
    nn.init.zeros_(model.v_proj.bias)
    return fit(model), dict(model=model), {}


def equal_queries():
    "Tokens that ask the same, of tokens that differ: all learns."
    model, query = Reader(), nn.Parameter(torch.randn(1, 1, 8))
    step = lambda: F.mse_loss(
        model.head(model.attend(query.expand(2, 6, 8), model.embed(model.x))), model.x
    )
    return step, dict(model=model), {}


def layer_on_a_repeated_condition():
    model, condition = Reader(), nn.Linear(3, 8)
    step = lambda: F.mse_loss(
        model.head(model.attend(model.embed(model.x) + condition(torch.ones(2, 6, 3)))), model.x
    )
    return step, dict(model=model, condition=condition), {}


def one_attention_for_two_inputs():
    model = Reader()

    def step():
        x = model.embed(model.x)
        same = torch.ones(2, 6, 8)
        return F.mse_loss(model.head(model.attend(x) + model.attend(x, same)), model.x)

    return step, dict(model=model), {}


def classes_of_equal_features():
    net = nn.Linear(4, 8)
    head = nn.Linear(8, 6)
    step = lambda: (head(net(torch.ones(6, 4))).softmax(-1) @ torch.rand(6, 3)).square().mean()
    return step, dict(net=net, head=head), {}


def gate_before_tokens_that_differ():
    model, gate = Reader(), nn.Parameter(torch.zeros(1))
    step = lambda: F.mse_loss(model.head(model.attend(gate * model.embed(model.x))), model.x)
    return step, dict(model=model, gate=gate), {}


def tokens_first_and_one_sample():
    torch.manual_seed(0)
    mha, x = nn.MultiheadAttention(8, 2), torch.rand(6, 1, 8)
    return lambda: mha(x, x, x)[0].square().mean(), dict(mha=mha), {}


def one_image_many_times():
    model = Reader()
    x = model.x[:1].expand(6, 6, 4)
    return lambda: F.mse_loss(model(x), x), dict(model=model), {}


def windows_of_one_token_and_more():
    "The same attention at two resolutions, one of them a single token."
    model = Reader()

    def step():
        x = model.embed(model.x)
        return F.mse_loss(model.head(model.attend(x) + model.attend(x[:, :1])), model.x)

    return step, dict(model=model), {}


def similarity_without_projections():
    "No projection looks for anything: the layers before learn by the other ways."
    model, layer = Reader(), nn.Linear(8, 8)

    def step():
        x = model.embed(model.x[:, :1].expand(-1, 6, -1))
        x = x + layer(x).tanh()
        return F.mse_loss(model.head(x + (x @ x.transpose(1, 2)).softmax(-1) @ x), model.x)

    return step, dict(embed=model.embed, layer=layer, head=model.head), {}


def norm_whose_scale_starts_at_zero():
    "The last norm of a residual branch: open after the first update."
    p = Parts()
    norm = nn.BatchNorm2d(2)
    nn.init.zeros_(norm.weight)
    model = nn.ModuleDict(dict(enc=p.enc, norm=norm, dec=p.dec, side=nn.Conv2d(1, 2, 3, padding=1)))
    step = lambda: F.mse_loss(p.dec(p.enc(p.x) + norm(model['side'](p.x))), p.x)
    return step, dict(model=model), {}


SOUND_VALUES = [
    frozen_positions,
    learned_positions_from_zero,
    learned_positions_for_equal_tokens,
    frozen_zero_bias,
    frozen_zero_shift_beside_a_norm,
    frozen_scale_around_one,
    frozen_log_scale,
    frozen_network_with_zero_biases,
    teacher_with_a_zero_layer,
    zero_mask_of_scores,
    zero_mean_that_is_taken_off,
    zero_token_that_is_filled_in,
    declared_part,
    declared_tensor,
    keys_from_zero,
    values_from_zero,
    equal_queries,
    layer_on_a_repeated_condition,
    one_attention_for_two_inputs,
    classes_of_equal_features,
    gate_before_tokens_that_differ,
    tokens_first_and_one_sample,
    one_image_many_times,
    windows_of_one_token_and_more,
    similarity_without_projections,
    norm_whose_scale_starts_at_zero,
]


@pytest.mark.parametrize('case', SOUND_VALUES, ids=lambda f: f.__name__)
def test_values_that_are_meant_are_passed(case):
    torch.manual_seed(0)
    step, watch, options = case()
    report = audit_gradient(step, watch, **options)
    assert [str(b) for b in report.breaks] == []
