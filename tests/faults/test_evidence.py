"A run whose files were changed afterwards: seen by `show`, on taking it up, and by `publish`, which refuses."
import json

import pytest

from damage import damages
from puzzle_research.core.collect import example_manifest, example_run
from puzzle_research.core.config import make_config, parse_parameters
from puzzle_research.core.evidence import BOUND, checked, evidence
from puzzle_research.core.files import write_json
from puzzle_research.core.publish import Refused, publish
from puzzle_research.core.runs import Run, begin

Config = make_config(parse_parameters("recipe:str = 'best'\nbudget:str = 'test'\nseed:int = 0\nrun:str = ''"))


def bound_run(folder):
    "The example, with the digests that a run keeps."
    run = example_run(folder/'00_toy')
    write_json(run/'manifest.json', checked(example_manifest() | dict(evidence=evidence(run))))
    return run


def refused(run, site): # -> what publish said; '' where it published
    try:
        publish(run, site)
        return ''
    except (Refused, ValueError) as e:
        return str(e)


@pytest.mark.parametrize('each', [1, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', [*BOUND, 'manifest.json'])
def test_any_damage_is_seen_and_not_published(faults, tmp_path, name, each):
    run, site = bound_run(tmp_path), tmp_path/'site'
    whole = (run/name).read_bytes()
    for kind, bad in damages(whole, each, seed=len(name)):
        (run/name).write_bytes(bad)
        said = refused(run, site)
        outcome = 'refused' if name in said or 'manifest' in said else 'lost'
        faults.count('evidence', f'{name}: {kind}', outcome if not site.exists() else 'lost', said)
    (run/name).write_bytes(whole)
    assert refused(run, site) == ''


def raised(summary):
    return json.loads(json.dumps(summary).replace('32.6', '39.6'))


EDITS = {
    'another seed in config.json': ('config.json', lambda c: c | dict(seed=7), 'seed is 7, was 0'),
    'a raised value': ('summary.json', raised, 'summary.json'),
    'another status': ('manifest.json', lambda m: m | dict(seconds=1.), 'manifest.json'),
}


@pytest.mark.parametrize('edit', EDITS)
def test_an_edit_is_told_by_name(faults, tmp_path, edit):
    name, change, said = EDITS[edit]
    run = bound_run(tmp_path)
    write_json(run/name, change(json.loads((run/name).read_text())))
    told = said in refused(run, tmp_path/'site') and any(said in text for text in Run(run).altered())
    faults.count('evidence', edit, 'refused' if told else 'lost')


def test_what_was_altered_stays_known(faults, tmp_path, monkeypatch):
    "Taken up, it goes on with what it began with; an event tells, and the run cannot be published any more."
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path))
    run, _ = begin('00_run', Config(seed=3))
    run.log(1, loss=2.)
    run.save(dict(step=1))
    run.close('interrupted')
    write_json(run.dir/'config.json', run.config | dict(seed=7))
    (run.dir/'metrics.jsonl').write_text('')
    _, cfg = begin('00_run', Config(run=run.id))
    told = [e['message'] for e in run.events if e['kind'] == 'evidence']
    run.finish(dict(title='A', claim='B', metrics={}))
    both = len(told) == 1 and 'seed is 7, was 3' in told[0] and 'metrics.jsonl was cut' in told[0]
    known = cfg.seed == 3 and 'was cut' in refused(run.dir, tmp_path/'site')
    faults.count('evidence', 'altered, then taken up', 'refused' if both and known else 'lost', f'{told}')


def test_another_ground_is_an_event(faults, tmp_path, monkeypatch):
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path))
    run, _ = begin('00_run', Config())
    run.close('interrupted')
    there = run.manifest['ground']
    run.update(ground=there | dict(threads=64, torch='1.0', device='cuda'))
    begin('00_run', Config(run=run.id))
    [told] = [e['message'] for e in run.events if e['kind'] == 'ground']
    named = all(k in told for k in ('threads', 'torch', 'device', 'instead of 64'))
    faults.count('run', 'taken up on another ground', 'right' if named else 'lost', told)
    run.close('interrupted')
