"What is kept beside runs: published reports, the list of a sweep, the journal of a search."
import json

import pytest

from damage import damages
from puzzle_research.core.collect import example_run
from puzzle_research.core.files import write_json
from puzzle_research.core.local import Point
from puzzle_research.core.publish import documents, publish, renew_board
from puzzle_research.core.search import open_study
from puzzle_research.core.sweep import record, sweep_folder, sweep_runs

EACH = [1, pytest.param(30, marks=pytest.mark.slow)]


@pytest.mark.parametrize('each', EACH)
def test_a_published_report(faults, tmp_path, each):
    "A changed number is not rendered: the board and the next report refuse it, by name."
    publish([example_run(tmp_path/'runs'/'00_toy')], tmp_path)
    file, board = tmp_path/'reports'/'summaries'/'00_toy.json', tmp_path/'reports'/'index.md'
    want, before = documents(tmp_path), board.read_bytes()
    for damage, bad in damages(file.read_bytes(), each):
        file.write_bytes(bad)
        try:
            renew_board(tmp_path)
            same = documents(tmp_path) == want
            faults.count('published report', damage, 'right' if same else 'lost', 'rendered')
        except ValueError as e:
            named = file.name in str(e) and board.read_bytes() == before
            faults.count('published report', damage, 'refused' if named else 'lost', str(e))


def test_a_raised_value_of_a_published_report(faults, tmp_path):
    publish([example_run(tmp_path/'runs'/'00_toy')], tmp_path)
    file = tmp_path/'reports'/'summaries'/'00_toy.json'
    write_json(file, json.loads(file.read_text().replace('32.6', '39.6')))
    with pytest.raises(ValueError, match='00_toy.json is not what was written'):
        documents(tmp_path)
    faults.count('published report', 'a raised value', 'refused')


@pytest.mark.parametrize('each', EACH)
def test_the_list_of_a_sweep(faults, tmp_path, monkeypatch, each):
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path))
    run = example_run(tmp_path/'00_toy')
    sweep_folder('sweep').mkdir(parents=True)
    record('sweep', '00_toy', [Point(dict(seed=0), run.name)])
    file = sweep_folder('sweep')/'sweep.json'
    for damage, bad in damages(file.read_bytes(), each):
        file.write_bytes(bad)
        try:
            same = [r.id for r in sweep_runs('sweep')] == [run.name]
            faults.count('list of a sweep', damage, 'right' if same else 'lost', 'read')
        except ValueError as e:
            faults.count('list of a sweep', damage, 'refused' if 'sweep.json' in str(e) else 'lost', str(e))


def _trials(name):
    trials = open_study(name, 'maximize').get_trials(deepcopy=False)
    return [(t.number, t.state.name, t.values) for t in trials]


TOLD = {'parts swapped', 'other bytes', 'cut short', 'emptied'} # else a journal's numbers are numbers


@pytest.mark.parametrize('each', EACH)
def test_the_journal_of_a_search(faults, tmp_path, monkeypatch, each):
    "optuna's own format, without digests. What was there before a cut is kept, other content is refused."
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path))
    study = open_study('search', 'maximize')
    for k in range(6):
        trial = study.ask()
        trial.suggest_float('rate', 0, 1)
        study.tell(trial, k/7)
    file, want = sweep_folder('search')/'journal.log', _trials('search')
    for damage, bad in damages(file.read_bytes(), each):
        file.write_bytes(bad)
        try:
            found = _trials('search')
            done = [t for t in found if t[1] == 'COMPLETE']
            outcome = 'right' if done == want[:len(done)] else 'other'
            said = str(found)
        except ValueError as e:
            outcome, said = 'refused' if 'journal.log' in str(e) else 'lost', str(e)
        if damage in TOLD or outcome != 'other':
            faults.count('journal of a search', damage, 'lost' if outcome == 'other' else outcome, said)
