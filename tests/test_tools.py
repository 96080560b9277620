"The tools that look after the tree: what is counted, what is pinned, what a cleaned notebook keeps."
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import docs  # noqa: E402
import house  # noqa: E402
import lock  # noqa: E402
import prepare  # noqa: E402
from sources import Cell  # noqa: E402


def cell(text, number=1):
    return Cell(ROOT/'nbs'/'x.ipynb', number, text.splitlines())


SIX = '\n'.join(f'step_{i}(x)' for i in range(6))


@pytest.mark.parametrize('other,runs', [
    (SIX, 1),
    ('setup()\n' + SIX.replace('\n', '  # why\n\n'), 1),     # comments and blank lines do not hide it
    (SIX.replace('step_3', 'step'), 0),
    ('\n'.join(f'import m{i}' for i in range(9)), 0)])
def test_lines_written_twice_are_found(monkeypatch, other, runs):
    cells = {Path('a'): [cell(SIX)], Path('b'): [cell(other, 2)]}
    monkeypatch.setattr(house, 'notebooks', lambda: list(cells))
    monkeypatch.setattr(house, 'plain_files', lambda: [])
    monkeypatch.setattr(house, 'code_cells', lambda path: cells[path])
    found = list(house.written_twice())
    assert len(found) == runs
    assert all('6 lines' in text for _, text in found)


def test_imports_are_read_with_their_dots():
    lines = [
        'from puzzle_research import vision_puzzle', 'from ..lm.trm import x',
        'from . import data', 'import os']
    found = house.imported('\n'.join(lines), 'puzzle_research.core')
    assert found == {'puzzle_research.vision_puzzle', 'puzzle_research.lm', 'puzzle_research.core'}


def test_the_arrow_points_one_way():
    names = ('core', 'lm', 'vision_puzzle', 'cli')
    assert [house.layer(f'puzzle_research.{n}') for n in names] == [0, 1, 2, 3]


def test_an_exception_excuses_one_finding_and_an_idle_one_is_told(monkeypatch):
    table = {('cell', 'a.ipynb'): 'a table of numbers', ('cell', 'gone.ipynb'): 'was one'}
    monkeypatch.setattr(house, 'EXCEPTIONS', table)
    bad, excused, idle = house.judge([('cell', 'a.ipynb: 30 lines'), ('line', 'a.ipynb: 120')])
    assert bad == [('line', 'a.ipynb: 120')]
    assert excused == [('cell', 'a.ipynb: 30 lines')]
    assert idle == [('cell', 'gone.ipynb')]


def test_requirements_pin_what_is_installed_and_nothing_else():
    pins, here = lock.pinned(), lock.closure(lock.wanted(extras=('dev',)))
    assert {name: version for name, (_, version) in here.items() if pins.get(name) != version} == {}
    reached = lock.closure(lock.wanted())
    strangers = [name for name in pins if name not in reached and lock.closure([lock.Requirement(name)])]
    assert strangers == []


@pytest.fixture
def notebook(tmp_path):
    "A notebook as JupyterLab leaves it: counts out of order, an empty cell, metadata of the machine."
    def code(source, count, outputs=()):
        kept = dict(execution_count=count, outputs=list(outputs))
        return dict(cell_type='code', id=f'c{count}', metadata={}, source=source) | kept
    result = dict(output_type='execute_result', execution_count=9, metadata={}, data={'text/plain': '2'})
    metadata = dict(executed='f00d', language_info=dict(name='python', version='3.11.7'))
    cells = [code('x = 1', 7), code('', 8), code('x + 1', 9, [result])]
    path = tmp_path/'n.ipynb'
    path.write_text(json.dumps(dict(cells=cells, metadata=metadata, nbformat=4, nbformat_minor=5)))
    return path


def test_cleaning_keeps_a_notebook_as_run(notebook):
    text = prepare.cleaned(notebook)
    nb = json.loads(text)
    assert [c['execution_count'] for c in nb['cells']] == [1, None, 2]
    assert nb['cells'][2]['outputs'][0]['execution_count'] == 2
    assert nb['metadata']['language_info']['name'] == 'python'
    assert 'version' not in nb['metadata']['language_info']
    notebook.write_text(text)
    assert prepare.cleaned(notebook) == text


def test_a_notebook_that_was_not_run_has_no_counts(notebook):
    nb = json.loads(notebook.read_text())
    del nb['metadata']['executed']
    notebook.write_text(json.dumps(nb))
    assert [c['execution_count'] for c in json.loads(prepare.cleaned(notebook))['cells']] == [None]*3


def test_links_of_notebooks_become_pages():
    html = '<a href="../contract.md#how"></a><a href="https://a.b/c.md"></a><a href="x.ipynb">'
    page = '<a href="../contract.html#how"></a><a href="https://a.b/c.md"></a><a href="x.html">'
    assert docs.to_pages(html) == page


def test_headings_of_one_name_are_told_apart():
    assert docs.with_own_ids('<h1 id="a"><h2 id="a"><p id="a">') == '<h1 id="a"><h2 id="a_1"><p id="a">'


def test_a_dead_link_and_a_foreign_script_are_found(tmp_path):
    (tmp_path/'there.html').write_text('<h1 id="top"></h1>')
    links = ['there.html', 'there.html#top', 'there.html#gone', 'gone.html', 'https://a.b/', '#here']
    page = '<p id="here"></p><script src="https://a.b/c.js"></script>'
    (tmp_path/'page.html').write_text(page + ''.join(f'<a href="{x}"></a>' for x in links))
    assert docs.dead_links(tmp_path) == [
        'page.html links to gone.html',
        'page.html links to there.html#gone',
        'page.html loads https://a.b/c.js',
    ]


def test_the_table_of_contents_names_every_notebook_once():
    named = json.dumps(docs.contents())
    paths = [p.relative_to(ROOT) for p in prepare.notebooks()]
    assert [p.name for p in paths if named.count(f'"{p}"') != 1] == ['index.ipynb']
