"`puzzle search` on a notebook: trials are runs, a second search goes on, a metric of no run is one line."
import pandas as pd
import pytest

from puzzle_research.core.params import root
from puzzle_research.core.sweep import sweep_folder, sweep_runs
from shared import assert_one_clear_line, puzzle

pytest.importorskip('optuna')


@pytest.fixture
def space(tmp_path):
    (tmp_path/'space.toml').write_text('rate = {low = 0.01, high = 0.5, log = true}')
    return tmp_path/'space.toml'


def search(notebook, space, *words, metric='error'):
    return puzzle('search', notebook, '--space', space, '--metric', metric, '--name', 's', *words, cwd=root())


@pytest.mark.slow
def test_a_second_search_goes_on_where_the_first_ended(tiny, runs, space):
    first = search(tiny, space, '--trials', 2, '--jobs', 2, '--direction', 'min', '-p', 'steps', 2)
    assert first.returncode == 0, first.stderr
    assert search(tiny, space, '--trials', 3, '-p', 'steps', 2).returncode == 0     # which way: from the runs
    trials = pd.read_csv(sweep_folder('s')/'trials.csv')
    made = {run.id: run for run in sweep_runs('s')}
    assert list(trials.state) == ['complete']*3 and set(trials.run) == set(made)
    assert trials.rate.nunique() == 3
    for _, trial in trials.iterrows():
        run = made[trial.run]
        assert run.config['rate'] == trial.rate and run.config['steps'] == 2
        assert run.summary['metrics']['error']['value'] == trial.value
    assert (sweep_folder('s')/'search.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_a_metric_that_no_run_has_is_one_line(tiny, runs, space):
    result = search(tiny, space, '--direction', 'min', metric='eror')
    assert_one_clear_line(result, "unknown metric 'eror': did you mean 'error'", codes=(2,))


def test_a_direction_that_nobody_knows_is_one_line(tiny, runs, space, command):
    code, err = command('search', tiny, '--space', space, '--metric', 'error')
    assert code == 2 and 'say which way is better' in err and err.count('\n') == 1
