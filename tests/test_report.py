"Reports across processes, seeds, failures and every lint: one way to fire it, one way to stay silent."
import copy, json, math, os, statistics, subprocess, sys
from pathlib import Path

import pytest

from puzzle_research.core import report
from puzzle_research.core.report import collect, combine, command, lint, LINTS, publish, Refused, render, render_document, renew_board, result_table, show_number, write_report

M = dict(unit='dB', direction='max', split='test', n=100, seeds=1, sd=None)
SUMMARY = dict(system='00_toy', title='A toy', claim='It works.', recipe='best', budget='full', status='ok', notes=[],
               metrics=dict(psnr=M | dict(value=30.), mse=M | dict(value=1e-3, unit='[0, 1] squared', direction='min')),
               baselines=dict(psnr={'mean of train': 12., 'PCA': 27.}), limits=dict(psnr={'bound': 36.}), published=dict(psnr={'theirs': 20.5}),
               criteria=[dict(bar='must', metric='psnr', op='>=', value=28., met=True), dict(bar='aim', metric='psnr', op='>=', value=32., met=False)])
MANIFEST = dict(system='00_toy', status='ok', recipe='best', budget='full', start='2026-01-01T00:00:00+00:00', end='2026-01-01T00:10:00+00:00', seconds=600., peak_memory_mb=900,
                parent=None, error=None, device='cpu', threads=2, git=dict(commit='abc123', dirty=False), code=dict(notebook='f00d', modules={}), determinism={}, versions=dict(python='3.11'),
                data=[dict(name='d', origin='local', split='train', rows=10, sha256='ab'*32, licence='CC0', dropped=[dict(item=f'i{k}', why='torn') for k in range(5)])])
PNG = b'\x89PNG not really'


@pytest.fixture
def make(tmp_path):
    def make(seed=0, edit=None, name=None, events=(), config=None, rows=({'step': 0, 'split': 'test', 'psnr': 20.},), figures=('a', 'b'), **over):
        dir = tmp_path/(name or f'run{seed}'); (dir/'figures').mkdir(parents=True); s = copy.deepcopy(SUMMARY)
        if edit: edit(s)
        cfg = dict(recipe='best', budget='full', seed=seed, lr=.1, run='') | (config or {})
        dump = lambda f, x: (dir/f).write_text(json.dumps(x))
        dump('summary.json', s); dump('config.json', cfg); dump('manifest.json', MANIFEST | dict(run_id=f'r{seed}', seed=seed, config=cfg, changed=dict(lr=.1)) | over)
        (dir/'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows)); (dir/'events.jsonl').write_text(''.join(json.dumps(e) + '\n' for e in events))
        for f in figures: (dir/'figures'/f'{f}.png').write_bytes(PNG + f.encode())
        dump('figures/captions.json', {f: f'Figure {f}.' for f in figures})
        return dir
    return make


def metric(**m): return lambda s: s['metrics'].update({k: M | dict(value=1.) | v for k, v in m.items()})
def psnr(**m): return lambda s: s['metrics']['psnr'].update(m)
def part(name, **d): return lambda s: s[name].update(d)

FIRE = {
    'ends-before-it-starts': [dict(end='2025-12-31T23:59:59+00:00'), dict(start=100., end=99.)],
    'untrained-baseline-only': [dict(edit=part('baselines', psnr={'untrained network': 4.})), dict(edit=lambda s: s.update(baselines={})), dict(edit=part('baselines', mse={'untrained: same net': .2}))],
    'ambiguous-name': [dict(edit=metric(perplexity={})), dict(edit=metric(accuracy={}, top5_accuracy={})), dict(edit=metric(PSNR={})), dict(edit=part('limits', ssim={'x': 1.}))],
    'ranks-one-seed': [dict(edit=part('baselines', psnr={'mean': 1., 'ours: no VQ': 29.})), dict(edit=lambda s: s.update(ranking=[dict(label='a', value=1., seeds=1)]))],
    'worse-than-first-epoch': [dict(rows=[dict(step=0, split='test', psnr=30.5), dict(step=1, split='test', psnr=29.)]), dict(rows=[dict(step=0, split='test', mse=1e-4)])],
    'chosen-on-test': [dict(edit=psnr(selected_on='test')), dict(edit=metric(peak_psnr={}))],
    'no-unit-or-direction': [dict(edit=psnr(unit=None)), dict(edit=metric(x=dict(direction='up')))],
    'criterion-disagrees': [dict(edit=lambda s: s['criteria'][1].update(met=True)), dict(edit=lambda s: s['criteria'][0].update(met=False)), dict(edit=lambda s: s['criteria'][0].update(metric='ssim'))],
    'not-a-number': [dict(edit=metric(x=dict(value=math.nan))), dict(edit=metric(x=dict(value=None))), dict(edit=metric(x=dict(sd=math.inf))), dict(edit=part('limits', psnr={'bound': math.nan}))],
    'figure-missing': [dict(lose='a')]}
SILENT = {
    'ends-before-it-starts': [dict(end='2026-01-01T00:00:00+00:00'), dict(start='2026-01-01T00:00:00', end='2026-01-01T01:00:00+00:00'), dict(start='2026-01-01T02:00:00+02:00', end='2026-01-01T00:10:00+00:00')],
    'untrained-baseline-only': [dict(edit=part('baselines', psnr={'untrained network': 4., 'PCA': 27.})), dict(edit=lambda s: (metric(legacy_gain={})(s), s['baselines'].update(legacy_gain={'untrained network': 4.})))],
    'ambiguous-name': [dict(edit=metric(codebook_perplexity={}, lm_perplexity={})), dict(edit=metric(accuracy={})), dict(edit=metric(top1_accuracy={}, top5_accuracy={}))],
    'ranks-one-seed': [dict(edit=lambda s: (psnr(seeds=3, sd=.1)(s), part('baselines', psnr={'mean': 1., 'ours: no VQ': 29.})(s))), dict(edit=lambda s: s.update(ranking=[dict(label='a', value=1., seeds=2)]))],
    'worse-than-first-epoch': [dict(rows=[dict(step=0, split='test', psnr=30.)]), dict(rows=[dict(step=0, split='train', psnr=40.)]), dict(rows=[dict(step=0, split='test', mse='nan'), dict(step=0, split='test', mse=2e-3)])],
    'chosen-on-test': [dict(edit=psnr(selected_on='validation')), dict(edit=metric(peak_psnr=dict(selected_on='validation'))), dict(edit=metric(peak_memory=dict(split=None)))],
    'no-unit-or-direction': [dict(edit=metric(x=dict(unit='1', direction='none')))],
    'criterion-disagrees': [dict(edit=lambda s: s['criteria'].append(dict(bar='aim', metric='mse', op='<=', value=1e-3, met=True)))],
    'not-a-number': [dict(edit=metric(x=dict(value=0, sd=0.)))],
    'figure-missing': [dict(figures=()), dict(figures=('b',))]}


def cases(table): return [pytest.param(rule, case, id=f'{rule}-{i}') for rule, cs in table.items() for i, case in enumerate(cs)]

@pytest.mark.parametrize('rule,case', cases(FIRE))
def test_lint_fires_alone(make, rule, case):
    case = dict(case); lose = case.pop('lose', None); dir = make(**case)
    if lose: (dir/'figures'/f'{lose}.png').unlink()
    assert {f.rule for f in lint(dir)} == {rule}

@pytest.mark.parametrize('rule,case', cases(SILENT))
def test_lint_is_silent(make, rule, case): assert lint(make(**case)) == []

def test_every_lint_is_tested(): assert set(FIRE) == set(SILENT) == set(LINTS)


def test_a_name_written_twice_in_the_json_is_found(make):
    dir = make(); text = (dir/'summary.json').read_text()
    (dir/'summary.json').write_text(text.replace('"mse": {', '"psnr": {', 1))
    assert any("'psnr' is written twice" in f.message for f in lint(dir))


def test_two_seeds_settle_what_one_may_not_rank(make):
    edit = part('baselines', psnr={'mean': 1., 'seed recipe': 20.})
    runs = [make(i, edit) for i in range(2)]
    assert [f.rule for f in lint(runs[0])] == ['ranks-one-seed'] and lint(runs) == []


def test_combine_against_statistics(make):
    values = [30.1, 29.4, 30.9]
    s = combine([make(i, psnr(value=v)) for i, v in enumerate(values)])
    m = s['metrics']['psnr']
    assert (m['value'], m['sd'], m['seeds']) == (pytest.approx(statistics.mean(values)), pytest.approx(statistics.stdev(values)), 3)
    assert s['metrics']['mse']['sd'] == 0 and s['limits'] == SUMMARY['limits']

def test_criteria_are_judged_on_the_mean(make):
    judged = lambda c: lambda s: (psnr(value=c)(s), s['criteria'][0].update(met=c >= 28))
    s = combine([make(0, judged(27.9)), make(1, judged(28.5))])
    assert s['criteria'][0]['met'] is True
    assert combine([make(2, judged(27.)), make(3, judged(28.5))])['criteria'][0]['met'] is False

@pytest.mark.parametrize('over,says', [
    (dict(config=dict(lr=.2)), "config differs in 'lr': 0.1, 0.2"), (dict(status='failed'), "run r1 is 'failed'"), (dict(config=dict(seed=0)), 'a seed occurs twice'),
    (dict(data=[MANIFEST['data'][0] | dict(sha256='cd'*32)]), "data differs in 'd/train'"), (dict(edit=metric(extra={})), "set of metrics differs in 'extra'"), (dict(edit=psnr(unit='nat')), 'set of metrics differs')])
def test_combine_refuses_by_name(make, over, says):
    with pytest.raises(ValueError) as e: combine([make(0), make(1, **over)])
    assert says in str(e.value)

def test_combine_notes_that_the_code_differed(make):
    assert combine([make(0), make(1, code=dict(notebook='beef', modules={}))])['notes'] == ["The notebook's code was not the same in all runs."]


def test_same_json_same_bytes_in_another_process(make):
    dir = make(events=[dict(time='2026-01-01T00:00:01+00:00', kind='alert', message='a|b\nc')]); code = 'import sys; from puzzle_research.core.report import render; sys.stdout.buffer.write(render(sys.argv[1]).encode())'
    out = {subprocess.run([sys.executable, '-c', code, dir], capture_output=True, check=True, env=os.environ | dict(PYTHONHASHSEED=h, TZ=tz, LC_ALL='C')).stdout for h, tz in (('1', 'UTC'), ('2', 'Asia/Tokyo'))}
    assert out == {write_report(dir).read_bytes()} and b'a\\|b c' in out.pop()

def test_markdown_is_never_read_back(make):
    dir = make(); first = write_report(dir).read_text(); (dir/'report.md').write_text('# Forged 99 dB'); assert render(dir) == first

def test_import_is_light():
    code = 'import sys, puzzle_research.core.report; print([m for m in ("torch", "numpy", "matplotlib", "pandas") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_report_says_what_was_measured(make):
    text = render(make(git=dict(commit='abc123', dirty=True), data=[MANIFEST['data'][0] | dict(origin='bundled')]))
    for part in ('**must: met** (1 of 1)', '**aim: not met** (0 of 1): `psnr` is 30.00 dB, asked for ≥ 32 dB', 'better than the best strong baseline, PCA at 27 dB', 'One seed', 'bundled set stood in for d/train',
                 'not committed', '5: i0 (torn), i1 (torn), i2 (torn) and 2 more', '`abababababab`', 'puzzle run nbs/00_toy.ipynb -p recipe best -p budget full -p seed 0 -p lr 0.1', '![a](figures/a.png)', '*Figure 1. Figure a.*'):
        assert part in text, part

@pytest.mark.parametrize('value,says', [(26., '**worse** than'), (27., 'no clear difference from'), (29., 'better than')])
def test_report_says_where_the_strong_baseline_wins(make, value, says):
    assert f'- `psnr`: {says} the best strong baseline' in render(make(edit=lambda s: (psnr(value=value, sd=.1, seeds=3)(s), s['criteria'][0].update(met=value >= 28))))

def test_a_run_without_git_data_figures_events_criteria_or_baselines_still_renders(make):
    text = render(make(edit=lambda s: [s.pop(k) for k in ('baselines', 'limits', 'published', 'criteria', 'notes')], data=[], figures=(), git=dict(commit=None, dirty=None), versions={}, peak_memory_mb=None))
    assert 'No criterion was set' in text and 'From a tree without a commit' in text and '## Figures' not in text and '## Data' not in text
    assert 'psnr ↑' in result_table(SUMMARY)


def test_publish_is_whole_and_renews_the_board(make, tmp_path):
    site = tmp_path/'site'; runs = [make(i, psnr(value=30 + .1*i)) for i in range(3)]; path = publish(runs, site)
    doc = json.loads((site/'reports'/'summaries'/'00_toy.json').read_text())
    assert path.read_text() == render_document(doc, '../figures/00_toy/') == render(runs, '../figures/00_toy/')
    assert doc == json.loads(json.dumps(collect(runs))) and (site/'figures'/'00_toy'/'a.png').read_bytes() == PNG + b'a'
    publish(make(5, lambda s: s.update(system='01_other', title='Other'), figures=('b',)), site)
    board = (site/'reports'/'index.md').read_text()
    assert board.index('00_toy') < board.index('01_other') and board.count('\n| ') == 4
    assert not list(site.rglob('*.tmp')) and str(tmp_path) not in ''.join(p.read_text() for p in site.rglob('*') if p.suffix in ('.md', '.json'))

def test_publishing_again_drops_old_figures(make, tmp_path):
    site = tmp_path/'site'; publish(make(0), site); publish(make(1, figures=('b', 'c')), site)
    assert sorted(p.name for p in (site/'figures'/'00_toy').iterdir()) == ['b.png', 'c.png']

@pytest.mark.parametrize('case,says', [(dict(status='interrupted'), "is 'interrupted', not 'ok'"), (dict(edit=psnr(selected_on='test')), 'chosen-on-test')])
def test_publish_refuses_and_leaves_the_tree_alone(make, tmp_path, case, says):
    site = tmp_path/'site'; publish(make(0), site); before = {p: p.read_bytes() for p in site.rglob('*') if p.is_file()}
    with pytest.raises(Refused) as e: publish(make(1, **case), site)
    assert says in str(e.value) and before == {p: p.read_bytes() for p in site.rglob('*') if p.is_file()}

def test_a_full_disk_leaves_the_last_report(make, tmp_path, monkeypatch):
    site = tmp_path/'site'; path = publish(make(0), site); before = path.read_text(); real = report.write_atomic
    def full(p, data):
        if Path(p).suffix == '.md': raise OSError(28, 'No space left on device', str(p))
        real(p, data)
    monkeypatch.setattr(report, 'write_atomic', full)
    with pytest.raises(OSError): publish(make(1, psnr(value=31.)), site)
    assert path.read_text() == before
    monkeypatch.undo(); renew_board(site); assert '31.00' in (site/'reports'/'index.md').read_text()


@pytest.mark.parametrize('v,sd,shown', [(1/3, None, '0.3333'), (-2.5, .04, '-2.500 ± 0.040'), (3, None, '3'), (1e-9, None, '1.000e-9'), (123456.7, None, '123,456.7'), (9.5, 12., '10 ± 12')])
def test_numbers(v, sd, shown): assert show_number(v, sd) == shown

def test_command_quotes_for_the_shell():
    assert command('03_x', dict(recipe='best', budget='quick', seed=3), dict(seed=3, name="it's", run='r1')) == """puzzle run nbs/03_x.ipynb -p recipe best -p budget quick -p seed 3 -p name 'it'"'"'s'"""


def test_a_system_draws_over_all_seeds(tmp_path, monkeypatch):
    import puzzle_research.core.fit as system
    seen = []; monkeypatch.setattr(system, 'draw_seeds', lambda runs: seen.append([r.dir.name for r in runs]), raising=False)
    dirs = [tmp_path/'core_fit'/n for n in ('a', 'b')]
    for d in dirs: d.mkdir(parents=True)
    report.draw_over_seeds(dirs[:1]); assert seen == []                     # one seed is drawn by the run itself
    report.draw_over_seeds(dirs); assert seen == [['a', 'b']]
    report.draw_over_seeds([tmp_path/'09_none'/'a', tmp_path/'09_none'/'b'])    # no notebook, nothing to draw
