"Reports across processes, seeds, failures and every lint: one way to fire it, one way to stay silent."
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from puzzle_research.core import swap
from puzzle_research.core.beside import main_metrics
from puzzle_research.core.collect import collect, combine, example_run, example_summary
from puzzle_research.core.evidence import checked
from puzzle_research.core.lint import LINTS, lint
from puzzle_research.core.measure import metric, show_number
from puzzle_research.core.publish import Refused, documents, draw_over_seeds, publish, render_published
from puzzle_research.core.publish import renew_board
from puzzle_research.core.report import command, render, render_document
from puzzle_research.core.report import result_table, write_report


@pytest.fixture
def make(tmp_path):
    "Runs of the example, by number of their seed."
    def make(seed=0, edit=None, rows=None, lose=None, figures=('training',), system='00_toy', **over):
        run = example_run(tmp_path/system, seed, edit=edit, **over)
        if rows is not None:
            (run/'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
        for name in figures:
            (run/'figures'/f'{name}.png').write_bytes(name.encode())
        if lose:
            (run/'figures'/f'{lose}.png').unlink()
        return run
    return make


def add(**metrics):
    "An edit that adds metrics: dicts of fields that differ from a sound one."
    sound = metric(1., 'dB', 'max', 10)
    return lambda s: s['metrics'].update({k: sound | fields for k, fields in metrics.items()})


def psnr(**fields):
    return lambda s: s['metrics']['psnr'].update(fields)


def part(name, **fields):
    return lambda s: s[name].update(fields)


def judge(i, **fields):
    return lambda s: s['criteria'][i].update(fields)


def replace(**fields):
    return lambda s: s.update(fields)


def both(*edits):
    return lambda s: [edit(s) for edit in edits]


UNTRAINED = {'untrained network': 4.}
ONE = [dict(label='a', value=1., seeds=1)]
TWO = [dict(label='a', value=1., seeds=2)]
FIRE = {
    'ends-before-it-starts': [
        dict(end='2025-12-31T23:59:59+00:00'),
        dict(start=100., end=99.)],
    'untrained-baseline-only': [
        dict(edit=part('baselines', psnr=UNTRAINED)),
        dict(edit=replace(baselines={})),
        dict(edit=part('baselines', mse={'untrained: same net': .2}))],
    'ambiguous-name': [
        dict(edit=add(perplexity={})),
        dict(edit=add(accuracy={}, top5_accuracy={})),
        dict(edit=add(PSNR={})),
        dict(edit=part('limits', ssim={'x': 1.}))],
    'ranks-one-seed': [
        dict(edit=part('baselines', psnr={'mean': 1., 'ours: no VQ': 29.})),
        dict(edit=replace(ranking=ONE))],
    'worse-than-first-epoch': [
        dict(rows=[dict(step=0, split='test', psnr=33.5), dict(step=1, split='test', psnr=29.)]),
        dict(rows=[dict(step=0, split='test', mse=1e-4)])],
    'chosen-on-test': [
        dict(edit=psnr(selected_on='test')),
        dict(edit=add(peak_psnr={}))],
    'no-unit-or-direction': [
        dict(edit=psnr(unit=None)),
        dict(edit=add(x=dict(direction='up')))],
    'criterion-disagrees': [
        dict(edit=judge(3, met=True)),
        dict(edit=judge(0, met=False)),
        dict(edit=judge(0, metric='ssim'))],
    'not-a-number': [
        dict(edit=add(x=dict(value=math.nan))),
        dict(edit=add(x=dict(value=None))),
        dict(edit=add(x=dict(sd=math.inf))),
        dict(edit=part('limits', psnr={'bound': math.nan}))],
    'figure-missing': [dict(lose='training')],
}
SILENT = {
    'ends-before-it-starts': [
        dict(end='2026-03-01T09:00:00+00:00'),
        dict(start='2026-01-01T00:00:00', end='2026-01-01T01:00:00+00:00'),
        dict(start='2026-01-01T02:00:00+02:00', end='2026-01-01T00:10:00+00:00')],
    'untrained-baseline-only': [
        dict(edit=part('baselines', psnr=UNTRAINED | {'PCA': 27.})),
        dict(edit=both(add(legacy_gain={}), part('baselines', legacy_gain=UNTRAINED)))],
    'ambiguous-name': [
        dict(edit=add(lm_perplexity={})),
        dict(edit=add(accuracy={})),
        dict(edit=add(top1_accuracy={}, top5_accuracy={}))],
    'ranks-one-seed': [
        dict(edit=both(psnr(seeds=3, sd=.1), part('baselines', psnr={'mean': 1., 'ours: no VQ': 29.}))),
        dict(edit=replace(ranking=TWO))],
    'worse-than-first-epoch': [
        dict(rows=[dict(step=0, split='test', psnr=32.6)]),
        dict(rows=[dict(step=0, split='train', psnr=40.)]),
        dict(rows=[dict(step=0, split='test', mse='nan'), dict(step=0, split='test', mse=2e-3)])],
    'chosen-on-test': [
        dict(edit=psnr(selected_on='validation')),
        dict(edit=add(peak_psnr=dict(selected_on='validation'))),
        dict(edit=add(peak_memory=dict(split=None)))],
    'no-unit-or-direction': [dict(edit=add(x=dict(unit='1', direction='none')))],
    'criterion-disagrees': [dict(edit=judge(3, metric='mse', op='<=', value=1e-3, met=True))],
    'not-a-number': [dict(edit=add(x=dict(value=0, sd=0.)))],
    'figure-missing': [dict(figures=('training', 'without_caption'))],
}


def cases(table):
    numbered = [(name, i, case) for name, some in table.items() for i, case in enumerate(some)]
    return [pytest.param(name, case, id=f'{name}-{i}') for name, i, case in numbered]


@pytest.mark.parametrize('rule,case', cases(FIRE))
def test_lint_fires_alone(make, rule, case):
    assert {f.rule for f in lint(make(**case))} == {rule}


@pytest.mark.parametrize('rule,case', cases(SILENT))
def test_lint_is_silent(make, rule, case):
    assert lint(make(**case)) == []


def test_every_lint_is_tested():
    assert set(FIRE) == set(SILENT) == set(LINTS)


def test_a_name_written_twice_in_the_json_is_found(make):
    run = make()
    text = (run/'summary.json').read_text()
    (run/'summary.json').write_text(text.replace('"mse": {', '"psnr": {', 1))
    assert any("'psnr' is written twice" in f.message for f in lint(run))


def test_two_seeds_settle_what_one_may_not_rank(make):
    runs = [make(i, part('baselines', psnr={'mean': 1., 'seed recipe': 20.})) for i in range(2)]
    assert [f.rule for f in lint(runs[0])] == ['ranks-one-seed']
    assert lint(runs) == []


def test_combine_against_statistics(make):
    values = [30.1, 29.4, 30.9]
    summary = combine([make(i, both(psnr(value=v), replace(criteria=[]))) for i, v in enumerate(values)])
    m = summary['metrics']['psnr']
    assert m['value'] == pytest.approx(statistics.mean(values))
    assert m['sd'] == pytest.approx(statistics.stdev(values))
    assert m['seeds'] == 3
    assert summary['metrics']['mse']['sd'] == 0
    assert summary['limits'] == example_summary()['limits']


def test_criteria_are_judged_on_the_mean(make):
    def met(*values):
        runs = [make(i, psnr(value=v)) for i, v in enumerate(values)]
        return combine(runs)['criteria'][0]['met']
    assert met(29.9, 30.5) is True
    assert met(29., 30.5) is False


CONFIG = dict(recipe='best', budget='full', seed=1, lr=.002, run='')
PHOTOS = [dict(name='photos', split='train', sha256='ab'*32, origin='local', rows=1, licence='', dropped=[])]
OTHERS = {
    "run 20260301-0900-1 is 'failed'": dict(status='failed'),
    "data differs in 'photos/test'": dict(data=PHOTOS),
    "set of metrics differs in 'extra'": dict(edit=add(extra={})),
    'set of metrics differs': dict(edit=psnr(unit='nat')),
    "config differs in 'lr': 0.002, 0.2": dict(config=CONFIG | dict(lr=.2)),
    'a seed occurs twice': dict(config=CONFIG | dict(seed=0)),
}


@pytest.mark.parametrize('says', OTHERS)
def test_combine_refuses_by_name(make, says):
    with pytest.raises(ValueError) as e:
        combine([make(0), make(1, **OTHERS[says])])
    assert says in str(e.value)


def test_combine_notes_that_the_code_differed(make):
    notes = combine([make(0), make(1, code=dict(notebook='beef', modules={}))])['notes']
    assert notes[-1] == "The notebook's code was not the same in all runs."


def test_notes_of_seeds_are_one_note(make):
    def edit(temperature):
        return replace(notes=[f'Calibrated at {temperature}.', 'Stage 1 of 3.', 'Stage 2 of 3.'])
    notes = combine([make(0, edit('0.05')), make(1, edit('0.045'))])['notes']
    assert notes == ['Calibrated at 0.045 to 0.05.', 'Stage 1 of 3.', 'Stage 2 of 3.']


def test_a_summary_without_a_title_says_so(make):
    for function in (collect, render, publish):
        with pytest.raises(ValueError, match="the summary has no 'title'"):
            function(make(edit=lambda s: s.pop('title')))


RENDER = """
import sys
from puzzle_research.core.report import render
sys.stdout.buffer.write(render(sys.argv[1]).encode())
"""


def test_same_json_same_bytes_in_another_process(make):
    run = make()
    event = dict(time='2026-01-01T00:00:01+00:00', kind='alert', message='a|b\nc')
    (run/'events.jsonl').write_text(json.dumps(event) + '\n')
    out = set()
    for seed, zone in (('1', 'UTC'), ('2', 'Asia/Tokyo')):
        env = os.environ | dict(PYTHONHASHSEED=seed, TZ=zone, LC_ALL='C')
        done = subprocess.run([sys.executable, '-c', RENDER, run], capture_output=True, check=True, env=env)
        out.add(done.stdout)
    assert out == {write_report(run).read_bytes()}
    assert b'a\\|b c' in out.pop()


def test_markdown_is_never_read_back(make):
    run = make()
    first = write_report(run).read_text()
    (run/'report.md').write_text('# Forged 99 dB')
    assert render(run) == first


def test_import_is_light():
    heavy = '("torch", "numpy", "matplotlib", "pandas")'
    code = f'import sys, puzzle_research.core.publish; print([m for m in {heavy} if m in sys.modules])'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == '[]'


def test_report_says_what_was_measured(make):
    said = [
        '**must met** (2 of 2), **aim met** (1 of 1), **moonshot missed** (0 of 1)',
        'Missed: `psnr` 32.60 (moonshot ≥ 36)',
        'better than the best rival, PCA + greedy digits, at 32.19',
        'One seed',
        'stood in for photos/train',
        'not committed',
        '5: i0 (torn), i1 (torn), i2 (torn) and 2 more',
        '`abababababab`',
        'puzzle run nbs/00_toy.ipynb -p recipe best -p budget full -p seed 0',
        '![training](figures/training.png)',
        '*Figure 1. PSNR on the test split over training.*',
    ]
    torn = [dict(item=f'i{k}', why='torn') for k in range(5)]
    data = [PHOTOS[0] | dict(origin='bundled', dropped=torn)]
    text = render(make(git=dict(commit='abc123', dirty=True), data=data))
    assert [s for s in said if s not in text] == []


@pytest.mark.parametrize('value,says', [
    (31., '**worse** than'),
    (32.2, 'no clear difference from'),
    (33., 'better than')])
def test_report_says_where_the_rival_wins(make, value, says):
    text = render(make(edit=both(psnr(value=value, sd=.1, seeds=3), replace(criteria=[]))))
    assert f'dB: {says} the best rival' in text


def test_the_one_table_has_twelve_rows_and_the_rest_is_folded(make):
    names = [f'probe_{i}' for i in range(40)]
    bars = [dict(bar='aim', metric=k, op='>=', value=0., met=True) for k in names[:20]]
    run = make(edit=both(add(**{k: {} for k in names}), lambda s: s['criteria'].extend(bars)))
    summary = json.loads((run/'summary.json').read_text())
    assert len(main_metrics(summary)) == 12
    read, looked_up = render(run).split('## Details')
    assert all(f'`{k}`' in read or f'`{k}`' in looked_up for k in summary['metrics'])
    assert '<code>probe</code>' in looked_up and looked_up.count('<details') == looked_up.count('</details>')


def test_a_run_without_git_data_figures_events_criteria_or_baselines_still_renders(make):
    bare = ('baselines', 'limits', 'published', 'criteria', 'notes')
    nothing = dict(data=[], git=dict(commit=None, dirty=None), versions={}, peak_memory_mb=None)
    run = make(edit=lambda s: [s.pop(k) for k in bare], **nothing)
    for figure in (run/'figures').iterdir():
        figure.unlink()
    text = render(run)
    assert 'No bar was set' in text and 'From a tree without a commit' in text
    assert '## Figures' not in text and '<summary>Data' not in text
    assert 'psnr ↑' in str(result_table(example_summary()))


@pytest.fixture
def site(tmp_path):
    return tmp_path/'site'


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_publish_is_whole_and_renews_the_board(make, site):
    runs = [make(i, psnr(value=33 + .1*i)) for i in range(3)]
    path = publish(runs, site)
    doc = json.loads((site/'reports'/'summaries'/'00_toy.json').read_text())
    figures = '../figures/00_toy/'
    assert path.read_text() == render_document(doc, figures) == render(runs, figures)
    assert doc == checked(collect(runs))
    assert (site/'figures'/'00_toy'/'training.png').read_bytes() == b'training'
    publish(make(5, replace(system='01_other', title='Other'), system='01_other'), site)
    board = (site/'reports'/'index.md').read_text()
    assert board.index('00_toy') < board.index('01_other')
    assert board.count('\n| ') == 4
    texts = [p.read_text() for p in site.rglob('*') if p.suffix in ('.md', '.json')]
    assert not list(site.rglob('*.tmp')) and str(site.parent) not in ''.join(texts)


def test_published_reports_render_again_to_the_same_bytes(make, site):
    publish(make(0), site)
    before = contents(site)
    (site/'reports'/'00_toy.md').write_text('# Forged')
    render_published(site)
    assert contents(site) == before


def test_publishing_again_drops_old_figures(make, site):
    publish(make(0, figures=('training', 'old')), site)
    publish(make(1, figures=('training', 'new')), site)
    assert sorted(p.name for p in (site/'figures'/'00_toy').iterdir()) == ['new.png', 'training.png']


WRONG = {
    "is 'interrupted', not 'ok'": dict(status='interrupted'),
    'chosen-on-test': dict(edit=psnr(selected_on='test')),
}


@pytest.mark.parametrize('says', WRONG)
def test_publish_refuses_and_leaves_the_tree_alone(make, site, says):
    publish(make(0), site)
    before = contents(site)
    with pytest.raises(Refused) as e:
        publish(make(1, **WRONG[says]), site)
    assert says in str(e.value)
    assert contents(site) == before


def test_a_full_disk_leaves_the_last_report(make, site, monkeypatch):
    path = publish(make(0), site)
    before, real = path.read_text(), swap.write_atomic

    def full(p, data):
        if Path(p).suffix == '.md':
            raise OSError(28, 'No space left on device', str(p))
        real(p, data)
    monkeypatch.setattr(swap, 'write_atomic', full)
    with pytest.raises(OSError):
        publish(make(1, psnr(value=33.)), site)
    assert path.read_text() == before
    monkeypatch.undo()
    renew_board(site)
    assert '33.00' not in (site/'reports'/'index.md').read_text()


NUMBERS = {
    '0.3333': (1/3, None),
    '-2.500 ± 0.040': (-2.5, .04),
    '3': (3, None),
    '1.000e-9': (1e-9, None),
    '123,456.7': (123456.7, None),
    '10 ± 12': (9.5, 12.),
}


@pytest.mark.parametrize('shown', NUMBERS)
def test_numbers(shown):
    assert show_number(*NUMBERS[shown]) == shown


def test_command_quotes_for_the_shell():
    config = dict(recipe='best', budget='quick', seed=3)
    want = """puzzle run nbs/03_x.ipynb -p recipe best -p budget quick -p seed 3 -p name 'it'"'"'s'"""
    assert command('03_x', config, dict(seed=3, name="it's", run='r1')) == want


def test_a_system_draws_over_all_seeds(tmp_path, monkeypatch):
    import puzzle_research.core.fit as system
    seen = []

    def draw_seeds(runs):
        seen.append([r.dir.name for r in runs])
    monkeypatch.setattr(system, 'draw_seeds', draw_seeds, raising=False)
    dirs = [tmp_path/'core_fit'/name for name in ('a', 'b')]
    draw_over_seeds(dirs[:1])
    assert seen == []           # one seed is drawn by the run itself
    draw_over_seeds(dirs)
    assert seen == [['a', 'b']]
    draw_over_seeds([tmp_path/'09_none'/name for name in ('a', 'b')])    # no notebook, nothing to draw


def test_published_documents_pass_what_they_were_published_under():
    for doc in documents():
        assert render_document(doc) == render_document(json.loads(json.dumps(doc)))
        assert doc['title'] in render_document(doc)
