"The map of the course: six parts with their lessons, one lesson marked, and what it stands on."

from pathlib import Path

from vocabulary import WIDTH, Drawing, Text

NOTEBOOKS = Path(__file__).resolve().parents[2] / 'nbs'
PARTS = {
    'Foundations': '00_data 01_degrade 02_metrics 03_learner 04_audit',
    'Representations': '05_patching 06_mae 07_transfer 08_codebook 09_dmae 10_two_stage',
    'Wavelets and\ndiffusion': '11_wavelets 12_codecs 13_diffusion 14_unet 15_superres',
    'Losses and\nablations': '16_perceptual 17_weights 18_ablations',
    'Flows': '19_dit 20_meanflow 21_bridge',
    'In use': '22_baselines 23_restorers 24_playground',
}
LESSONS = [lesson for part in PARTS.values() for lesson in part.split()]
# lesson: the lessons that it stands on
STANDS_ON = {
    '01': '00', '02': '00 01', '03': '02', '04': '03',
    '06': '05 03', '07': '06', '08': '05 03 04', '09': '06 01', '10': '09 04',
    '12': '11 04', '15': '12 13 14 03',
    '16': '02 04 15', '17': '16', '18': '04 15',
    '19': '05', '20': '19', '21': '01 20 04',
    '22': '15 18', '23': '10 15', '24': '23',
}  # fmt: skip


def written():
    "Numbers of the lessons that have a notebook."
    return {path.name[:2] for path in NOTEBOOKS.glob('[0-9][0-9]_*.ipynb')}


def course_map(here=None):
    "The map with the lesson `here` marked, such as '06_mae'."
    base = STANDS_ON.get(here[:2], '').split() if here else []
    names = {lesson[:2]: lesson[3:] for lesson in LESSONS}
    alt = 'The six parts of the course and their lessons'
    if here:
        alt = f'Map of the course: you are at lesson {here[:2]}, {here[3:]}'
        alt += ', which stands on ' + ', '.join(f'{b} {names[b]}' for b in base) if base else ''
    d = Drawing(f'{here}.map' if here else 'map', 168, alt)
    gap, done = 8, written()
    w = (WIDTH - 5 * gap) / 6
    for k, (part, lessons) in enumerate(PARTS.items()):
        x = w / 2 + k * (w + gap)
        lines = part.split('\n')
        for j, line in enumerate(reversed(lines)):
            d.note(x, 25 - 15 * j, line, bold=True)
        for j, lesson in enumerate(lessons.split()):
            number, name = lesson.split('_', 1)
            kind = 'op' if number in done else 'later'
            kind = 'data thick' if number in base else 'here' if lesson == here else kind
            box = d.node(x, 46 + 22 * j, w - 2, 19, kind, 4)
            bold = lesson == here
            ink = f'{kind.split()[0]}-ink'
            box.lines.append(Text(-w / 2 + 8, 0, number, ink, anchor='start', bold=bold))
            box.lines.append(Text(-w / 2 + 30, 0, name, ink, anchor='start', bold=bold))
    key = [('here', 'you are here')] * bool(here) + [('data thick', 'it stands on')] * bool(base)
    key += [('later', 'to be written')] * any(n[:2] not in done for n in LESSONS)
    x = 3 * (w + gap) + 4
    for k, (kind, text) in enumerate(key):
        d.legend(156 - 22 * (len(key) - 1 - k), (kind, text), left=x)
    return d


def maps():
    return [course_map(), *map(course_map, LESSONS)]
