"The command line: fast help, one clear line for bad usage, the same parameters as papermill."
import json, signal, subprocess, sys
from pathlib import Path

import pytest

from puzzle_research.cli import main
from puzzle_research.cli.app import complete_notebooks, complete_runs, join_params
from puzzle_research.cli.running import notebook_path
from puzzle_research.core.collect import example_run
from puzzle_research.core.config import make_config, parse_parameters
from puzzle_research.core.params import notebook_of, root, system_of
from puzzle_research.core.runs import Run
from shared import (PUZZLE, SMALL, as_options, assert_one_clear_line, heavy_imports, only_run, puzzle, start,
                    wait_until)


@pytest.fixture
def typed(monkeypatch, capsys):
    "`typed('show', 'x')`: what the command line answers, without a process of its own."
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['puzzle', *args])
        with pytest.raises(SystemExit) as e:
            main()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(args, e.value.code, out, err)
    return run


HEAVY = ('torch', 'numpy', 'pandas', 'matplotlib', 'datasets', 'papermill')
CALL = '''
import sys
from puzzle_research.cli import main
sys.argv = {}
try:
    main()
except SystemExit:
    pass
'''
COMMANDS = ['', 'run', 'sweep', 'search', 'runs', 'best', 'compare', 'show', 'watch', 'publish', 'reports',
            'new', 'data', 'data check', 'doctor', 'encode', 'decode']


@pytest.mark.parametrize('command', COMMANDS)
def test_help(typed, command):
    r = typed(*command.split(), '--help')
    assert r.returncode == 0 and f'Usage: puzzle {command}'.strip() in r.stdout


@pytest.mark.parametrize('words', ['run', 'bench', 'sweep', 'search', 'compare', 'best', 'reports',
                                   'data list'])
def test_help_needs_nothing_heavy(words):
    "Half a second is held by what is imported; a clock would depend on the machine."
    call = CALL.format(['puzzle', *words.split(), '--help'])
    assert heavy_imports(call, [*HEAVY, 'pydantic'])[0] == []


@pytest.mark.parametrize('command, word', [
    ('rum', "'rum'"),
    ('run --bogus x', '--bogus'),
    ('run 01_vison_puzzle', "did you mean '01_vision_puzzle'"),
    ('run 01 -p comitment .15', "did you mean 'commitment'"),
    ('run 01 -p commitment much', "'commitment' = 'much': expected float"),
    ('run 01 --resume nothere', "unknown run 'nothere'"),
    ('show nothere', 'nothere'),
    ('search 05 --space nothere.toml --metric gap', 'nothere.toml'),
    ('compare nothere', 'nothere'),
    ('reports 99', "unknown notebook '99'"),
    ('runs --since yesterday', 'expected a date'),
    ('best 01 --metric nothing', "unknown metric 'nothing'"),
    ('watch nothere', 'nothere'),
    ('publish nothere', 'nothere'),
    ('encode a.mov', "'.mov'"),
    ('bench gird', "did you mean 'grid'"),
    ('bench pca --modality smell', "unknown modality 'smell'"),
    ('data check cifar', "did you mean 'cifar10'"),
])
def test_bad_usage_is_one_line_and_exit_2(typed, command, word):
    assert_one_clear_line(typed(*command.split()), word, codes=(2,))


def test_what_the_notebook_refuses_is_one_line_and_exit_2():
    result = puzzle('run', 'guides_system', '-p', 'budget', 'fast', cwd=root())
    assert_one_clear_line(result, "unknown budget 'fast'", codes=(2,))


def test_missing_file_is_one_line_and_exit_1(typed):
    assert_one_clear_line(typed('encode', 'nothere.png'), 'nothere.png', codes=(1,))


def test_join_params():
    joined = ['run', 'x', '-p', 'lr=1e-3', '-p', 'seed=2']
    assert join_params(['run', 'x', '-p', 'lr', '1e-3', '-p', 'seed=2']) == joined
    assert join_params(['run', 'x', '-p', 'lr']) == ['run', 'x', '-p', 'lr']
    assert join_params(['run', 'x', '-p', 'shift', '-1']) == ['run', 'x', '-p', 'shift=-1']


def test_ctrl_c_ends_the_run_truthfully(tmp_path):
    "One line and exit 130; the run says that it was interrupted, and can be taken up."
    values = SMALL | dict(steps=1_000_000)
    p = start([PUZZLE, 'run', 'guides_system', *as_options(values)], tmp_path, cwd=root())
    run_id = p.stdout.readline().split()[-1]
    wait_until((tmp_path/'guides_system'/run_id/'progress.json').exists, p)
    p.send_signal(signal.SIGINT)
    out, _ = p.communicate(timeout=120)
    assert p.returncode == 130 and 'interrupted' in out and 'Traceback' not in out
    assert only_run(tmp_path).status == 'interrupted'


@pytest.mark.parametrize('notebook, system', [
    ('01_vision_puzzle.ipynb', '01_vision_puzzle'),
    ('core/04_fit.ipynb', 'core_fit'),
])
def test_a_notebook_in_a_folder_is_a_system_too(notebook, system):
    path = root()/'nbs'/notebook
    assert system_of(path) == system and notebook_of(system) == path == notebook_path(system)


def test_a_notebook_by_its_number_or_elsewhere():
    assert notebook_path('lm_mugrokfast') == root()/'nbs'/'lm'/'04_mugrokfast.ipynb'
    assert notebook_path('02') == root()/'nbs'/'02_audio_puzzle.ipynb'
    assert system_of(Path('/elsewhere/04_mine.ipynb')) == '04_mine'


def test_watch_needs_no_torch_and_takes_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path))
    run = Run.start('00_watched', make_config(parse_parameters("recipe:str = 'best'\nbudget:str = 'test'"))())
    run.log(1, stage='main', loss=.5)
    heavy, shown = heavy_imports(CALL.format(['puzzle', 'watch', str(run.dir), '--once']), HEAVY)
    assert heavy == [] and run.id in shown and 'main train, 1 measured' in shown and 'alerts' in shown


@pytest.fixture
def three_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path))
    for seed, psnr in enumerate([32.1, 33.4, 32.9]):
        example_run(tmp_path/'01_vision_puzzle', seed, psnr, status='ok' if seed else 'failed')


def test_runs_are_filtered_and_sorted_and_are_json(three_runs, typed):
    rows = json.loads(typed('runs', '01', '--status', 'ok', '--sort', 'psnr', '--json').stdout)
    found = [(row['run'], row['metrics.psnr'], row['params.seed']) for row in rows]
    assert found == [('run2', 32.9, 2), ('run1', 33.4, 1)]
    shown = typed('runs', '--metric', 'psnr', '--last', '1').stdout.splitlines()
    assert len(shown) == 3 and shown[0].split()[:3] == ['system', 'run', 'status'] and '32.9' in shown[2]
    assert_one_clear_line(typed('runs', '--sort', 'sead'), "'seed'", codes=(2,))


def test_best_and_last(three_runs, typed):
    best = json.loads(typed('best', '01', '--metric', 'psnr', '--json').stdout)
    assert [row['run'] for row in best] == ['run1', 'run2']
    assert typed('show', 'last').stdout.startswith('01_vision_puzzle/run2  ok')


def test_version_and_completion(typed, three_runs):
    from importlib.metadata import version
    assert typed('--version').stdout == f"puzzle_research {version('puzzle_research')}\n"
    assert complete_runs('run') == ['run2', 'run1', 'run0'] and '05_ternary_vae' in complete_notebooks('05')


def test_compare_is_a_table_a_text_and_a_figure(three_runs, typed, tmp_path):
    shown = typed('compare', 'run1', 'run2', '--metric', 'psnr', '--out', str(tmp_path/'out')).stdout
    assert shown == typed('compare', 'run1', 'last', '--metric', 'psnr', '--out', str(tmp_path/'out')).stdout
    assert '33.15 ± 0.35' in shown and '| psnr | all | 2 |' in (tmp_path/'out'/'compare.md').read_text()
    assert (tmp_path/'out'/'curves.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('words, said', [
    ('run1', 'name at least two'),
    ('run1 run2 --metric psnrr', "did you mean 'psnr'"),
    ('run0', 'name at least two'),
])
def test_what_cannot_be_compared_is_one_line(three_runs, typed, words, said):
    assert_one_clear_line(typed('compare', *words.split()), said, codes=(2,))
