"A sweep in processes: what is finished is kept, what was interrupted goes on, what cannot be is one line."
import signal

import pytest

from puzzle_research.core.collect import example_manifest
from puzzle_research.core.files import write_json
from puzzle_research.core.params import root
from puzzle_research.core.runs import Run
from puzzle_research.core.same import Here, Known
from puzzle_research.core.sweep import plan, sweep_runs
from shared import PUZZLE, assert_one_clear_line, finish, puzzle, start, wait_until

def sweep(notebook, *words, name='s'):
    return puzzle('sweep', notebook, *words, '--name', name, cwd=root())


def test_what_is_finished_is_kept_and_a_new_point_is_run(tiny, runs):
    first = sweep(tiny, '-p', 'rate', '0.1')
    assert first.returncode == 0 and '1 points: 1 ok' in first.stdout, first.stdout + first.stderr
    made = {run.id: (run.dir/'manifest.json').read_bytes() for run in sweep_runs('s')}
    again = sweep(tiny, '-p', 'rate', '0.1,0.2')
    assert '2 points: 1 kept, 1 waiting' in again.stdout and '2 points: 1 ok, 1 kept' in again.stdout
    assert {id: (runs/'00_tiny'/id/'manifest.json').read_bytes() for id in made} == made
    assert [run.config['rate'] for run in sweep_runs('s')] == [.1, .2]


@pytest.mark.slow
def test_ctrl_c_leaves_all_to_be_taken_up(tiny, runs):
    command = [PUZZLE, 'sweep', tiny, '-p', 'steps', '8', '-p', 'seed', '0:3', '--name', 's', '--jobs', 2]
    p = start(command, runs, cwd=root())
    wait_until(lambda: len(list(runs.glob('00_tiny/*/metrics.jsonl'))) == 2, p)
    p.send_signal(signal.SIGINT)
    out, _ = p.communicate(timeout=120)
    assert p.returncode == 130 and 'same command' in out and 'Traceback' not in out
    begun = {run.id for run in sweep_runs('s')}
    assert len(begun) == 2 and all(Run.open(id).status == 'interrupted' for id in begun)
    finish(start(command, runs, cwd=root()))
    ended = sweep_runs('s')
    assert {run.status for run in ended} == {'ok'} and len(ended) == 3 and begun < {run.id for run in ended}
    assert len(list(runs.glob('00_tiny/*'))) == 3


def test_a_full_disk_ends_it_and_nothing_is_lost(tiny, runs):
    full = sweep(tiny, '-p', 'rate', '0.9,0.1')
    assert full.returncode == 1 and '1 failed, 1 waiting' in full.stdout and 'No space left' in full.stdout
    assert full.stderr.count('\n') == 1 and full.stderr.count('free some space') == 1


def test_a_value_that_the_notebook_refuses_ends_it(tiny, runs):
    result = sweep(tiny, '-p', 'rate', '2,0.1')
    assert_one_clear_line(result, "parameter 'rate' = 2.0: expected less than or equal to 1", codes=(2,))
    assert list(runs.glob('00_tiny/*')) == []


@pytest.mark.parametrize('words, said', [
    ('', 'nothing to sweep'),
    ('-p seed 3:3', 'this range is empty'),
    ('-p seed 0:x', 'expected a range'),
    ('-p rate 0:1', "'rate' = '0:1': expected float"),
    ('-p seed one', "'seed' = 'one': expected int"),
    ('-p seed 1,1', '1 stands there twice'),
    ('-p seed 1 -p seed 2', "'seed' is given twice"),
    ('-p sed 1', "did you mean 'seed'"),
    ('-p seed 1 --jobs 0', 'expected at least 1'),
])
def test_bad_grids_are_one_clear_line(tiny, runs, command, words, said):
    code, err = command('sweep', tiny, *words.split())
    assert code == 2 and said in err and err.count('\n') == 1


def test_a_run_takes_a_parameter_once(tiny, runs, command):
    code, err = command('run', tiny, '-p', 'seed', '1', '-p', 'seed', '2')
    assert code == 2 and "'seed' is given twice" in err


def test_a_thousand_finished_points_are_found(runs):
    template = example_manifest(system='00_many', code=dict(notebook=None, modules={}), versions={}, data=[])
    for seed in range(1000):
        changed = dict(seed=seed)
        config = template['config'] | changed
        (runs/'00_many'/str(seed)).mkdir(parents=True)
        made = template | dict(seed=seed, config=config, changed=changed)
        write_json(runs/'00_many'/str(seed)/'manifest.json', made)
    points = plan('00_many', [dict(seed=seed) for seed in range(1001)])
    assert [p.status for p in points] == ['kept']*1000 + ['waiting']
    assert [p.run for p in points[:1000]] == [str(seed) for seed in range(1000)]


def test_other_versions_make_another_run(runs):
    here = Here()
    versions = here.versions | dict(torch='1.0')
    made = example_manifest(system='00_old', code=dict(notebook=None, modules={}), data=[], versions=versions,
                            changed=dict(lr=2e-3))
    (runs/'00_old'/'r').mkdir(parents=True)
    write_json(runs/'00_old'/'r'/'manifest.json', made)
    assert Known('00_old', here).of(dict(lr=2e-3)) == []
    here.versions['torch'] = '1.0'
    assert [run.id for run in Known('00_old', here).of(dict(lr=2e-3))] == ['r']



GUIDES = {
    '04_many': ('4 points: 4 ok', '4 points: 4 kept', '6 points: 2 ok, 4 kept'),
    '05_own_data': ('puzzles, stream', 'status ok', 'holds no pictures, sounds or texts'),
    '06_models': ('model.safetensors', 'VisionPuzzle.from_pretrained'),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', GUIDES)
def test_the_guide_works(runs, name):
    "Cells that `make test` leaves out, because they train, run here."
    import nbformat
    from nbclient import NotebookClient
    guide = root()/'nbs'/'guides'/f'{name}.ipynb'
    nb = nbformat.read(guide, 4)
    here = dict(metadata=dict(path=str(guide.parent)))
    NotebookClient(nb, timeout=900, kernel_name='python3', resources=here).execute()
    printed = ''.join(str(o.get('text', o.get('data'))) for c in nb.cells for o in c.get('outputs', []))
    for said in GUIDES[name]:
        assert said in printed
