"Tables as Markdown and as text."

import numpy as np
import pytest
import torch

from restore_lib.tables import Report, Table


def test_table():
    t = Table(
        [
            dict(name='a|b', n=3, v=1.23456),
            dict(name='c', v=torch.tensor(2.0), extra=np.float32(0.5)),
        ],
        'caption',
    )
    assert t.markdown().splitlines() == [
        '**caption**',
        '',
        '| name | n | v | extra |',
        '| :--- | ---: | ---: | ---: |',
        '| a\\|b | 3 | 1.23 |  |',
        '| c |  | 2.00 | 0.50 |',
    ]
    assert t._repr_markdown_() == t.markdown() and len(t.rows) == 2
    assert repr(t).splitlines()[1:] == [
        'name  n     v  extra',
        'a|b   3  1.23',
        'c        2.00   0.50',
    ]
    assert '1.2346' in Table([dict(v=1.23456)], digits=4).markdown()
    assert (
        Table([dict(u=1.23456, v=1.23456)], digits={'u': 0}).rows
        and '| 1 | 1.23 |' in Table([dict(u=1.23456, v=1.23456)], digits={'u': 0}).markdown()
    )
    assert repr(Table([])) == ''


def test_a_figure_never_hides_a_method_of_its_report():
    report = Report(True, 'ok', [dict(a=1)], gap=3)
    assert report.gap == 3 and repr(report) == 'ok\na\n1'
    for name in ('table', '_repr_markdown_'):
        with pytest.raises(ValueError, match=f'a figure is called .{name}.'):
            Report(True, 'ok', [dict(a=1)], **{name: 3})
