"The command line: fast help, one clear line for bad usage, the same parameters as papermill."
import os, signal, subprocess, sys, time
from pathlib import Path

import pytest

from puzzle_research.cli import _notebook, join_params
from puzzle_research.core.config import notebook_of, root, system_of
from puzzle_research.core.runs import Run

PUZZLE = Path(sys.executable).with_name('puzzle')


def puzzle(*args, **env):
    return subprocess.run([PUZZLE, *args], capture_output=True, text=True, timeout=300, env=os.environ | env, cwd=root())


@pytest.mark.parametrize('args', [(), ('run',), ('runs',), ('show',), ('publish',), ('data',), ('data', 'check'), ('doctor',), ('encode',), ('decode',)])
def test_help(args):
    r = puzzle(*args, '--help')
    assert r.returncode == 0 and 'Usage: puzzle' in r.stdout


def test_help_needs_no_torch():
    "Half a second is held by what is imported; the clock alone would depend on the machine."
    code = "import sys; sys.argv=['puzzle','run','--help']\nfrom puzzle_research.cli import main\ntry: main()\nexcept SystemExit: pass\n" \
           "print('HEAVY', [m for m in ('torch','numpy','pandas','matplotlib','datasets','papermill') if m in sys.modules])"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'HEAVY []' in r.stdout, r.stdout + r.stderr


@pytest.mark.parametrize('args, word', [
    (('rum',), "'rum'"), (('run', '--bogus', 'x'), '--bogus'), (('run', '01_vison_puzzle'), "did you mean '01_vision_puzzle'"),
    (('run', '01', '-p', 'comitment', '.15'), "did you mean 'commitment'"), (('run', '01', '-p', 'commitment', 'much'), "'commitment' = 'much': expected float"),
    (('run', '01', '-p', 'budget', 'fast'), "unknown budget 'fast'"), (('run', '01', '-p', 'batch_size', '0'), "'batch_size' = 0"),
    (('run', '01', '--resume', 'nothere'), "unknown run 'nothere'"), (('show', 'nothere'), 'nothere'), (('publish', 'nothere'), 'nothere'),
    (('encode', 'a.gif'), "'.gif'"), (('data', 'check', 'cifar'), "did you mean 'cifar10'")])
def test_bad_usage_is_one_line_and_exit_2(args, word):
    r = puzzle(*args)
    assert r.returncode == 2, r.stderr
    assert word in r.stderr and r.stderr.count('\n') == 1 and 'Traceback' not in r.stderr


def test_missing_file_is_one_line_and_exit_1():
    r = puzzle('encode', 'nothere.png')
    assert r.returncode == 1 and 'nothere.png' in r.stderr and r.stderr.count('\n') == 1


def test_join_params():
    assert join_params(['run', 'x', '-p', 'lr', '1e-3', '-p', 'seed=2']) == ['run', 'x', '-p', 'lr=1e-3', '-p', 'seed=2']
    assert join_params(['run', 'x', '-p', 'lr']) == ['run', 'x', '-p', 'lr']
    assert join_params(['run', 'x', '-p', 'shift', '-1']) == ['run', 'x', '-p', 'shift=-1']


def test_ctrl_c_ends_the_run_truthfully(tmp_path):
    "One line and exit 130; the run says that it was interrupted, and can be taken up."
    env = os.environ | dict(PUZZLE_RUNS=str(tmp_path))
    p = subprocess.Popen([PUZZLE, 'run', '01', '-p', 'budget', 'test', '-p', 'data', 'bundled', '-p', 'context_steps', '100000'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=root(), start_new_session=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # ignored in what a shell starts in the background
    run = Run(tmp_path/'01_vision_puzzle'/p.stdout.readline().split()[-1])
    while not ((run.dir/'progress.json').exists() and 'context' in (run.dir/'progress.json').read_text()): time.sleep(.1); assert p.poll() is None, p.stderr.read()
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=120)
    assert p.returncode == 130 and 'interrupted' in err and 'Traceback' not in err
    assert run.status == 'interrupted'


def test_a_notebook_in_a_folder_is_a_system_too():
    for notebook, system in ((root()/'nbs'/'01_vision_puzzle.ipynb', '01_vision_puzzle'), (root()/'nbs'/'core'/'04_fit.ipynb', 'core_fit')):
        assert system_of(notebook) == system and notebook_of(system) == notebook == _notebook(system)
    assert _notebook('lm_mugrokfast') == root()/'nbs'/'lm'/'04_mugrokfast.ipynb' and _notebook('02') == root()/'nbs'/'02_audio_puzzle.ipynb'
    assert system_of(Path('/elsewhere/04_mine.ipynb')) == '04_mine'
