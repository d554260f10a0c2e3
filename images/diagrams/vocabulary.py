"""A tiny vocabulary for box-and-arrow drawings in SVG: boxes, cells, arrows, notes, frames.

A drawing is 760 pixels wide and is shown 1:1. Its background is transparent; every box has its
own fill and ink, and what stands between boxes has a tone that reads on white and on black."""

from dataclasses import dataclass, field
from html import escape
from itertools import combinations, pairwise
from math import dist

WIDTH = 760
NAME, TEXT, SIGN = 14, 13, 16  # font sizes: the first line of a box, all else, operators
LINE = 17  # from one line of text to the next

# Advance widths in ems: at least those of DejaVu Sans, the widest of the common sans-serif fonts.
EMS = {
    0.30: 'IJijl',
    0.35: ' ,./:;\\|·',
    0.40: "()-[]ft'",
    0.45: '!r²',
    0.55: '"*_`?cszε',
    0.60: 'FLkvxyκ',
    0.65: '$0123456789EPSTYabdeghnopqu{}√ησ',
    0.70: 'ABCKRVXZ',
    0.80: '&DGHNOQU',
    0.90: '#+<=>^w~×−→≤M',
    1.00: '%@Wm½',
}
EM = {char: em for em, chars in EMS.items() for char in chars}
BOLD = 1.12

# kind: fill, line and ink on light pages, then on dark ones
KINDS = {
    'data': ('#dceafb', '#4f86cf', '#14304f', '#1d3b5e', '#5c93dc', '#e3effc'),
    'net': ('#fde8cf', '#d2822a', '#442806', '#5a3c14', '#dd9440', '#fdeedb'),
    'op': ('#e8ebef', '#838e9b', '#1d252e', '#38424d', '#8d98a5', '#eceff3'),
    'cond': ('#e9e1fa', '#8b6fd0', '#2e1d59', '#3f3166', '#9a80dc', '#efe9fb'),
    'loss': ('#fcdfe2', '#cf5a68', '#551420', '#5f2730', '#dc6b79', '#fde9eb'),
    'event': ('#d8f0e2', '#3f9a70', '#0f3a26', '#1f4d38', '#4fae82', '#e2f5ea'),
    'here': ('#2b66c0', '#2b66c0', '#ffffff', '#3672cf', '#3672cf', '#ffffff'),
}
# between the boxes, on light pages and on dark ones
NOTES = ('#5c6876', '#8d99a8')
LABELS = ('#616c7a', '#8894a2')
LINES = ('#76818e', '#8995a3')
FONTS = '"Helvetica Neue",Helvetica,Arial,"Liberation Sans","DejaVu Sans",sans-serif'


def text_width(line, size=TEXT, bold=False):
    "Pixels that a line of text takes at most."
    return sum(EM.get(char, 1.0) for char in line) * size * (BOLD if bold else 1)


def num(v):
    "A coordinate with one decimal at most."
    return f'{v:.1f}'.removesuffix('.0')


@dataclass
class Text:
    "A line of text; (x, y) is the middle of its height, in its node's coordinates if it has one."

    x: float
    y: float
    line: str
    ink: str
    size: int = TEXT
    bold: bool = False
    anchor: str = 'middle'

    def edges(self):
        "Left, top, right, bottom."
        w = text_width(self.line, self.size, self.bold)
        left = self.x - {'start': 0, 'middle': w / 2, 'end': w}[self.anchor]
        return left, self.y - 0.42 * self.size, left + w, self.y + 0.42 * self.size

    def moved(self, x, y):
        return Text(self.x + x, self.y + y, self.line, self.ink, self.size, self.bold, self.anchor)

    def svg(self):
        size = '' if self.size == TEXT else f' s{self.size}'
        anchor = '' if self.anchor == 'middle' else f' {self.anchor}'
        look = self.ink + size + anchor + ' bold' * self.bold
        place = f'x="{num(self.x)}" y="{num(self.y + 0.35 * self.size)}"'
        return f'<text class="{look}" {place}>{escape(self.line, quote=False)}</text>'


@dataclass
class Node:
    "A rectangle with lines of text, around (x, y); arrows begin and end at its sides."

    x: float
    y: float
    w: float
    h: float
    look: str = ''
    round: float = 6
    lines: list = field(default_factory=list)

    def edges(self):
        "Left, top, right, bottom."
        w, h = self.w / 2, self.h / 2
        return self.x - w, self.y - h, self.x + w, self.y + h

    def at(self, side, share=0.5):
        "A point of a side, `share` of the way along it."
        left, top, right, bottom = self.edges()
        if side in ('left', 'right'):
            return left if side == 'left' else right, top + share * self.h
        return left + share * self.w, top if side == 'top' else bottom

    def texts(self):
        return [line.moved(self.x, self.y) for line in self.lines]

    def svg(self):
        left, top, _, _ = self.edges()
        place = f'x="{num(left)}" y="{num(top)}" width="{num(self.w)}" height="{num(self.h)}"'
        return f'<rect class="{self.look}" {place} rx="{num(self.round)}"/>'


@dataclass
class Arrow:
    "A line through points, with a head at its end."

    points: list
    look: str
    head: bool

    def svg(self):
        path, last = f'M{num(self.points[0][0])} {num(self.points[0][1])}', self.points[-1]
        for before, at, after in zip(self.points, self.points[1:], self.points[2:]):
            (ax, ay), (bx, by) = towards(at, before, 7), towards(at, after, 7)
            path += f'L{num(ax)} {num(ay)}Q{num(at[0])} {num(at[1])} {num(bx)} {num(by)}'
        end = towards(last, self.points[-2], 6) if self.head else last
        out = f'<path class="{self.look}" d="{path}L{num(end[0])} {num(end[1])}"/>'
        if not self.head:
            return out
        (x, y), (bx, by) = last, towards(last, self.points[-2], 8.5)
        dx, dy = (by - y) * 0.47, (x - bx) * 0.47
        corners = f'{num(x)} {num(y)}L{num(bx + dx)} {num(by + dy)}L{num(bx - dx)} {num(by - dy)}'
        return f'{out}<path class="{self.look.split()[0]}-head" d="M{corners}Z"/>'


def towards(a, b, distance):
    "The point so far from a on the way to b, at most halfway."
    share = min(distance / max(dist(a, b), 1e-6), 0.5)
    return a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])


class Drawing:
    "What is drawn, in SVG; `problems` says where text overflows, overlaps or is crossed."

    def __init__(self, name, height, alt):
        self.name, self.height, self.alt = name, height, alt
        self.frames, self.arrows, self.nodes, self.notes = [], [], [], []

    # what is drawn

    def node(self, x, y, w, h, look, round=6):
        "A rectangle around (x, y)."
        self.nodes.append(Node(x, y, w, h, look, round))
        return self.nodes[-1]

    def box(self, x, y, text, kind='op', w=None, h=None, look=''):
        "A box around (x, y); the first line of its text is a name, others say what it does."
        name, *more = text.split('\n')
        widths = [text_width(name, NAME, True), *map(text_width, more)]
        w = max(widths) + 18 if w is None else w
        h = 15 + LINE * (1 + len(more)) if h is None else h
        box = self.node(x, y, w, h, f'{kind} {look}'.strip())
        top = -LINE * len(more) / 2
        box.lines.append(Text(0, top, name, f'{kind}-ink', NAME, True))
        box.lines += [Text(0, top + LINE * k, t, f'{kind}-ink') for k, t in enumerate(more, 1)]
        return box

    def sign(self, x, y, sign):
        "An operator in a small circle."
        node = self.node(x, y, 24, 24, 'op', 12)
        node.lines.append(Text(0, 0, sign, 'op-ink', SIGN))
        return node

    def write(self, node, line):
        "A line of text in the middle of a node."
        node.lines.append(Text(0, 0, line, node.look.split()[0] + '-ink'))
        return node

    def cells(self, x, y, rows, size=22):
        "A grid of small squares around (x, y); rows of (kind, text). One node with its squares."
        h, w = len(rows), len(rows[0])
        whole = Node(x, y, w * size, h * size)
        for i, row in enumerate(rows):
            for j, (kind, text) in enumerate(row):
                at = x + (j - (w - 1) / 2) * size, y + (i - (h - 1) / 2) * size
                cell = self.node(*at, size - 2, size - 2, kind, 2)
                if text:
                    self.write(cell, text)
        return whole

    def row(self, y, items, left=0, right=WIDTH, **how):
        "Boxes from `left` to `right` with equal gaps; items are (text, kind)."
        boxes = [self.box(0, y, text, kind, **how) for text, kind in items]
        gap = (right - left - sum(b.w for b in boxes)) / max(len(boxes) - 1, 1)
        for box in boxes:
            box.x = left + box.w / 2
            left += box.w + gap
        return boxes

    def column(self, x, items, top, gap, **how):
        "Boxes from `top` down with equal gaps; items are (text, kind)."
        boxes = [self.box(x, 0, text, kind, **how) for text, kind in items]
        for box in boxes:
            box.y = top + box.h / 2
            top += box.h + gap
        return boxes

    def note(self, x, y, text, anchor='middle', bold=False, ink='note'):
        "Text between the boxes, its lines around y."
        lines = text.split('\n')
        top = y - LINE * (len(lines) - 1) / 2
        for k, line in enumerate(lines):
            self.notes.append(Text(x, top + LINE * k, line, ink, TEXT, bold, anchor))

    def frame(self, left, top, right, bottom, label, at='start'):
        "A dashed line around a part of the page, with a label in its upper corner."
        w, h = right - left, bottom - top
        self.frames.append(Node(left + w / 2, top + h / 2, w, h, 'frame', 10))
        self.note(left + 11 if at == 'start' else right - 11, top + 14, label, at, bold=True)
        return self.frames[-1]

    def arrow(self, a, b, label='', under='', look='line', head=True, mid=0.5, on=None, shift=0):
        """From a to b, each a node, (node, side) or (node, side, share along it). Corners are
        right angles; `mid` says where between the two a line with two corners turns. `label`
        stands above the `on`-th piece (right of it where it is vertical), `under` below (left)."""
        (p, out), (q, into) = ends_of(a, b)
        if p[0] == q[0] or p[1] == q[1]:
            points = [p, q]
        elif out == into == 'h':
            x = p[0] + mid * (q[0] - p[0])
            points = [p, (x, p[1]), (x, q[1]), q]
        elif out == into == 'v':
            y = p[1] + mid * (q[1] - p[1])
            points = [p, (p[0], y), (q[0], y), q]
        else:
            points = [p, (q[0], p[1]) if out == 'h' else (p[0], q[1]), q]
        return self.path(points, label, under, look, head, on, shift)

    def path(self, points, label='', under='', look='line', head=True, on=None, shift=0):
        "An arrow along points; see `arrow`."
        self.arrows.append(Arrow(points, look, head))
        lengths = [abs(a[0] - b[0]) + abs(a[1] - b[1]) for a, b in pairwise(points)]
        on = lengths.index(max(lengths)) if on is None else on
        (ax, ay), (bx, by) = points[on : on + 2]
        x, y = (ax + bx) / 2, (ay + by) / 2
        if ay == by:
            lines = label.count('\n')
            if label:
                self.note(x + shift, y - 10 - LINE * lines / 2, label, ink='label')
            if under:
                self.note(x + shift, y + 11 + LINE * under.count('\n') / 2, under, ink='label')
        else:
            if label:
                self.note(x + 8, y + shift, label, 'start', ink='label')
            if under:
                self.note(x - 8, y + shift, under, 'end', ink='label')
        return self.arrows[-1]

    def chain(self, nodes, labels=(), **how):
        "Arrows from each node to the next; a label is text, or a pair: above and below."
        for k, (a, b) in enumerate(pairwise(nodes)):
            label = labels[k] if k < len(labels) else ''
            above, under = label if isinstance(label, tuple) else (label, '')
            self.arrow(a, b, above, under, **how)

    def legend(self, y, *items, left=0):
        "What the colours mean: kinds of LEGEND, or (kind, text)."
        for item in items:
            kind, text = item if isinstance(item, tuple) else (item, LEGEND[item])
            self.node(left + 8, y, 14, 14, kind, 3)
            self.note(left + 21, y, text, 'start', ink='label')
            left += 21 + text_width(text) + 16

    # the file

    def texts(self):
        return [*(t for n in self.nodes for t in n.texts()), *self.notes]

    def svg(self):
        alt = escape(self.alt, quote=False)
        size = f'width="{WIDTH}" height="{self.height}" viewBox="0 0 {WIDTH} {self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        parts = [*self.frames, *self.arrows, *self.nodes, *self.texts()]
        shapes = [part.svg() for part in parts]
        return '\n'.join([head, f'<title>{alt}</title>', STYLE, *shapes, '</svg>', ''])

    # what a reader would stumble over

    def problems(self):
        "Sentences about text that leaves its box or the page, overlaps, or is crossed by a line."
        found = []
        page = (0, 0, WIDTH, self.height)
        texts = [(t, n) for n in self.nodes for t in n.texts()] + [(t, None) for t in self.notes]
        for text, node in texts:
            room = page if node is None else grown(node.edges(), -2)
            if not inside(text.edges(), room):
                found.append(f'{text.line!r} leaves {"the page" if node is None else "its box"}')
            for other in self.nodes:
                if other is not node and overlap(text.edges(), other.edges()):
                    found.append(f'{text.line!r} lies on a box at {other.x:.0f}, {other.y:.0f}')
        for (a, _), (b, _) in combinations(texts, 2):
            if overlap(a.edges(), b.edges()):
                found.append(f'{a.line!r} overlaps {b.line!r}')
        for a, b in combinations(self.nodes, 2):
            if overlap(a.edges(), b.edges()):
                found.append(f'boxes overlap at {a.x:.0f}, {a.y:.0f} and {b.x:.0f}, {b.y:.0f}')
        for node in self.nodes:
            if not inside(node.edges(), page):
                found.append(f'a box at {node.x:.0f}, {node.y:.0f} leaves the page')
        lines = [pair for arrow in self.arrows for pair in pairwise(arrow.points)]
        for frame in self.frames:
            left, top, right, bottom = frame.edges()
            corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
            lines += list(pairwise(corners))
            if not inside(frame.edges(), page):
                found.append('a frame leaves the page')
        for a, b in lines:
            for text, _ in texts:
                if crosses(a, b, grown(text.edges(), 1)):
                    found.append(f'{text.line!r} is crossed by a line at {a[0]:.0f}, {a[1]:.0f}')
            for node in self.nodes:
                if crosses(a, b, grown(node.edges(), -1)):
                    found.append(f'a line crosses a box at {node.x:.0f}, {node.y:.0f}')
        return found


def grown(edges, by):
    left, top, right, bottom = edges
    return left - by, top - by, right + by, bottom + by


def inside(a, b):
    return a[0] >= b[0] and a[1] >= b[1] and a[2] <= b[2] and a[3] <= b[3]


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def crosses(a, b, edges):
    "Does the line from a to b pass through the inside of a rectangle?"
    enter, leave = 0.0, 1.0
    for k in (0, 1):
        low, high, way = edges[k], edges[k + 2], b[k] - a[k]
        if not way:
            if not low < a[k] < high:
                return False
            continue
        first, second = sorted(((low - a[k]) / way, (high - a[k]) / way))
        enter, leave = max(enter, first), min(leave, second)
    return enter < leave


def ends_of(a, b):
    "For both ends of an arrow the point, and the direction there: 'h', 'v', or '' for any."
    placed = [(e[0].at(*e[1:]), across(e[1])) if isinstance(e, tuple) else None for e in (a, b)]
    if not isinstance(a, Node) and not isinstance(b, Node):
        return placed
    left, right = (Node(*p[0], 0, 0) if p else e for p, e in zip(placed, (a, b)))
    return [own or faced for own, faced in zip(placed, facing(left, right))]


def across(side):
    return 'h' if side in ('left', 'right') else 'v'


def facing(a, b):
    "The points at which two nodes look at each other, straight across where they can."
    (al, at, ar, ab), (bl, bt, br, bb) = a.edges(), b.edges()
    if bl >= ar or br <= al:
        y = b.y if at <= b.y <= ab else a.y if bt <= a.y <= bb else None
        sides = ('right', 'left') if bl >= ar else ('left', 'right')
        return [((n.at(s)[0], n.y if y is None else y), 'h') for n, s in zip((a, b), sides)]
    x = b.x if al <= b.x <= ar else a.x if bl <= a.x <= br else None
    sides = ('bottom', 'top') if bt >= ab else ('top', 'bottom')
    return [((n.x if x is None else x, n.at(s)[1]), 'v') for n, s in zip((a, b), sides)]


LEGEND = {
    'data': 'tensor',
    'net': 'learned',
    'op': 'fixed operation',
    'cond': 'condition',
    'loss': 'loss',
    'event': 'event',
}


def style():
    "Colours for light pages, then for dark ones."
    pages = []
    for k in (0, 1):
        rules = []
        for kind, colours in KINDS.items():
            fill, line, ink = colours[3 * k : 3 * k + 3]
            rules.append(f'.{kind}{{fill:{fill};stroke:{line}}}.{kind}-ink{{fill:{ink}}}')
            rules.append(f'.to-{kind}{{stroke:{line}}}.to-{kind}-head{{fill:{line}}}')
        rules.append(f'.note{{fill:{NOTES[k]}}}.label,.later-ink{{fill:{LABELS[k]}}}')
        rules.append(f'.line,.frame,.later{{stroke:{LINES[k]}}}.line-head{{fill:{LINES[k]}}}')
        pages.append('\n'.join(rules))
    fixed = (
        f'text{{font:{TEXT}px {FONTS};text-anchor:middle}}'
        f'.s{NAME}{{font-size:{NAME}px}}.s{SIGN}{{font-size:{SIGN}px}}.bold{{font-weight:600}}\n'
        '.start{text-anchor:start}.end{text-anchor:end}\n'
        'rect{stroke-width:1.4}path{fill:none;stroke-width:1.6}\n'
        '.frame{fill:#808a96;fill-opacity:.07;stroke-dasharray:5 4;stroke-width:1.2}\n'
        '.later{fill:none;stroke-dasharray:3 3}.dashed{stroke-dasharray:5 4}\n'
        '.thick{stroke-width:2.6}.faint{opacity:.4}'
    )
    dark = f'@media (prefers-color-scheme:dark){{\n{pages[1]}\n}}'
    return f'<style>\n{fixed}\n{pages[0]}\n{dark}\n</style>'


STYLE = style()
