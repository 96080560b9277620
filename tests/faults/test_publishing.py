"Publishing: killed at every write, on a full disk, with worse runs, with names that are paths or markup."
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from damage import FullDisk, damages, ended, fork, kills
from puzzle_research.core import swap
from puzzle_research.core.checkpoint import load_state, save_state
from puzzle_research.core.collect import collect, example_run
from puzzle_research.core.files import write_json
from puzzle_research.core.locks import held
from puzzle_research.core.publish import Refused, publish, published_report, renew_board
from puzzle_research.core.publish import try_weights, worse_than
from puzzle_research.core.report import render

EVERY = [12, pytest.param(1, marks=pytest.mark.slow)]


def made(folder, psnr=32.6, figures=('training',), edit=None, budget='full', seeds=1, **over):
    "Runs of the example, with figures of their own."
    out = []
    for seed in range(seeds):
        run = example_run(folder/'00_toy', seed, psnr, edit=edit, budget=budget, **over)
        summary = json.loads((run/'summary.json').read_text())
        write_json(run/'summary.json', summary | dict(budget=budget))
        write_json(run/'figures'/'captions.json', {name: f'Figure {name}.' for name in figures})
        (run/'figures'/'training.png').unlink()
        for name in figures:
            (run/'figures'/f'{name}.png').write_bytes(f'{name} {psnr}'.encode())
        out.append(run)
    return out


def tree(site):
    return {p.relative_to(site).as_posix(): p.read_bytes() for p in sorted(site.rglob('*'))
            if p.is_file() and p.name != '.lock'}


@pytest.fixture
def both(tmp_path):
    "The trees of an old and of a new report, and a folder to publish in that holds the old one."
    old, new = made(tmp_path/'old', 32.6), made(tmp_path/'new', 33.3, ('training', 'gallery'))
    for name, steps in dict(before=[old], after=[old, new]).items():
        for runs in steps:
            publish(runs, tmp_path/name)
    site = tmp_path/'site'
    def fresh():
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(tmp_path/'before', site)
    return new, site, tree(tmp_path/'before'), tree(tmp_path/'after'), fresh


@pytest.mark.parametrize('every', EVERY)
def test_killed_at_every_write(faults, both, every):
    "Old or new, whole: never figures of one beside the report of another."
    new, site, before, after, fresh = both
    for n in kills(lambda: publish(new, site), fresh, every):
        with held(site/'reports'/'.lock', 'it', wait=9.):        # until the helper is done
            found = {k: v for k, v in tree(site).items() if not k.endswith('.tmp') and '.tmp/' not in k}
        renew_board(site)
        found = found if tree(site) == found else dict(swept=False)
        outcome = 'right' if found in (before, after) else 'lost'
        faults.count('publish', 'killed at a write', outcome, f'write {n}')


@pytest.mark.parametrize('every', EVERY)
def test_killed_with_its_helper(faults, both, every):
    "As when the machine stops: the next command completes what was decided."
    new, site, before, after, fresh = both
    def publish_alone():
        swap._helper = lambda base: (os.fork() or os._exit(1), os.open(os.devnull, os.O_RDONLY))
        publish(new, site)
    for n in kills(publish_alone, fresh, every):
        renew_board(site)
        outcome = 'right' if tree(site) in (before, after) else 'lost'
        faults.count('publish', 'machine stopped at a write', outcome, f'write {n}')


def test_a_full_disk_at_every_write(faults, both):
    new, site, before, after, fresh = both
    for n in range(40):
        fresh()
        with pytest.MonkeyPatch.context() as m:
            FullDisk(m, site, after=n)
            try:
                publish(new, site)
                break
            except OSError as e:
                said = str(e)
        whole = tree(site) == before and 'No space left' in said
        faults.count('publish', 'full disk', 'refused' if whole else 'lost', f'write {n}: {said}')
    assert n > 3 and tree(site) == after


BUNDLED = dict(name='bundled_photos', split='test', origin='bundled', rows=9, sha256='0'*64, licence='',
               dropped=[])
WORSE = {
    'a lower budget': dict(budget='test', seeds=3),
    'fewer seeds': dict(seeds=1),
    'bundled data': dict(seeds=3, data=[BUNDLED]),
}


@pytest.mark.parametrize('what', WORSE)
def test_worse_is_published_on_purpose_only(faults, tmp_path, caplog, what):
    site, worse = tmp_path/'site', made(tmp_path/'worse', **WORSE[what])
    publish(made(tmp_path/'good', seeds=3), site)
    before = tree(site)
    with pytest.raises(Refused, match=r'would replace the report of 00_toy by .* instead of .*--force'):
        publish(worse, site)
    kept = tree(site) == before
    publish(worse, site, force=True)
    told = 'is replaced by one of' in caplog.text and tree(site) != before
    faults.count('publish', what, 'refused' if kept and told else 'lost')


def test_another_recipe_stands_beside_and_replaces_nothing(faults, tmp_path):
    site = tmp_path/'site'
    publish(made(tmp_path/'good', seeds=3), site)
    kept = site/'reports'/'summaries'/'00_toy.json'
    before = kept.read_bytes()
    publish(made(tmp_path/'other', seeds=1, edit=lambda s: s.update(recipe='seed')), site)
    both = {path.name for path in (site/'reports').glob('00_toy*.md')}
    whole = kept.read_bytes() == before and both == {'00_toy.md', '00_toy.seed.md'}
    faults.count('publish', 'another recipe', 'right' if whole else 'lost')


def test_no_worse_is_no_question(tmp_path):
    good, again = (collect(made(tmp_path/name, seeds=3)) for name in ('good', 'again'))
    assert worse_than(again, good) == []


NAMES = ['../../evil', '/tmp/evil', 'a b', 'a<b>', '', 'x.y']


@pytest.mark.parametrize('name', NAMES)
def test_a_name_that_is_a_path_or_markup_is_refused(faults, tmp_path, name):
    site, outside = tmp_path/'a'/'b'/'site', tree(tmp_path)
    system = made(tmp_path/'runs', edit=lambda s: s.update(system=name))
    figure = made(tmp_path/'runs2')
    write_json(figure[0]/'figures'/'captions.json', {name: 'x', 'training': 'y'})
    for what, runs in dict(system=system, figure=figure).items():
        with pytest.raises((Refused, ValueError), match='letters, digits|calls the system'):
            publish(runs, site)
        left = {k: v for k, v in tree(tmp_path).items() if not k.startswith('runs')}
        outcome = 'refused' if left == outside else 'lost'
        faults.count('publish', f'a {what} named as a path or as markup', outcome)


MARKUP = '<img src=x onerror=alert(1)>[a](http://b) ![p](q)\n# h | *b*'


def test_markup_in_data_stays_text(faults, tmp_path):
    data = [dict(name=MARKUP, split=MARKUP, origin=MARKUP, rows=9, sha256=MARKUP, licence=MARKUP,
                 dropped=[dict(item=MARKUP, why=MARKUP)])]
    [run] = made(tmp_path, data=data)
    write_json(run/'figures'/'captions.json', dict(training=MARKUP))
    event = dict(time='2026-03-01T09:00:00+00:00', kind='alert', message=MARKUP)
    (run/'events.jsonl').write_text(json.dumps(event) + '\n')
    live = re.compile(r'<img|(?<!\\)\]\(http|(?<!\\)\]\(q|\n# h')
    for text in (render(run), published_report(collect(run))):
        found = live.findall(text)
        faults.count('report', 'HTML and markdown in names and captions', 'lost' if found else 'right', found)


def test_two_publish_at_once(faults, both, tmp_path):
    new, site, _, _, fresh = both
    fresh()
    def second():
        try:
            publish(new, site)
        except RuntimeError as e:
            assert 'the folder of published reports is in use by process' in str(e)
            return
        raise AssertionError('both published')
    with held(site/'reports'/'.lock', 'it'):
        refused = ended(fork(second)) == 0
    faults.count('publish', 'two at once', 'refused' if refused else 'lost')


@pytest.mark.parametrize('every', [5, pytest.param(1, marks=pytest.mark.slow)])
def test_weights_that_do_not_work_are_not_packed(faults, tmp_path, every):
    import puzzle_research.text.codec as module
    file = tmp_path/'codec.safetensors'
    save_state(file, load_state(module.WEIGHTS))
    whole = file.read_bytes()
    try_weights(file, module.LanguagePuzzle)
    for kind, bad in [('5,000 bytes of it', whole[:5000]), ('of another codec', other_weights()),
                      *list(damages(whole))[::every]]:
        file.write_bytes(bad)
        try:
            try_weights(file, module.LanguagePuzzle)
            faults.count('weights to be packed', kind, 'lost', 'taken')
        except Refused as e:
            faults.count('weights to be packed', kind, 'refused' if file.name in str(e) else 'lost', str(e))


def other_weights():
    import puzzle_research.audio.codec as module
    return Path(module.WEIGHTS).read_bytes()
