"A sweep on a real Dask scheduler over TCP: a worker is killed, another refused, every point comes once."
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from puzzle_research.core.params import root
from puzzle_research.core.sweep import sweep_runs
from shared import PUZZLE, assert_one_clear_line, finish, puzzle, start, wait_until

pytest.importorskip('distributed')


@pytest.fixture
def dask(tmp_path):
    "`dask('scheduler', ...)`: a process of Dask; all are killed at the end."
    begun = []
    def begin(*words, cwd=root(), path=root()):
        env = os.environ | dict(PYTHONPATH=str(path), PUZZLE_RUNS=str(tmp_path/'far'), OMP_NUM_THREADS='1')
        command = [sys.executable, '-m', 'dask', *map(str, words)]
        begun.append(subprocess.Popen(command, cwd=cwd, env=env, stderr=subprocess.PIPE, text=True))
        return begun[-1]
    yield begin
    for process in begun:
        process.kill()
        process.communicate()


@pytest.fixture
def scheduler(dask):
    with socket.create_server(('127.0.0.1', 0)) as s:
        port = s.getsockname()[1]
    dask('scheduler', '--host', '127.0.0.1', '--port', port, '--no-dashboard')
    return f'tcp://127.0.0.1:{port}'


def worker(dask, scheduler, name, **where):
    return dask('worker', scheduler, '--nthreads', 1, '--no-nanny', '--name', name, '--no-dashboard', **where)


def busy(process): # a worker
    "Has it a run at work below it?"
    below = psutil.Process(process.pid).children(recursive=True)
    return any('ipykernel_launcher' in ' '.join(p.cmdline()) for p in below)


@pytest.mark.slow
def test_a_worker_is_killed_and_every_point_comes_once(dask, scheduler, tiny, runs):
    workers = [worker(dask, scheduler, name) for name in ('one', 'two')]
    sweep = start([PUZZLE, 'sweep', tiny, '-p', 'steps', '30', '-p', 'seed', '0:4', '--engine', 'dask',
                   '--scheduler', scheduler, '--name', 's'], runs, cwd=root())
    wait_until(lambda: busy(workers[0]), sweep)
    time.sleep(1)
    below = psutil.Process(workers[0].pid).children(recursive=True)
    os.kill(workers[0].pid, signal.SIGKILL)
    assert '4 points: 4 ok' in finish(sweep)
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in below)
    ended = sweep_runs('s')
    assert sorted(run.config['seed'] for run in ended) == [0, 1, 2, 3]
    assert {run.status for run in ended} == {'ok'}
    assert all(len(run.metrics) == 30 and (run.dir/'notebook.ipynb').exists() for run in ended)
    assert len(list(runs.glob('00_tiny/*'))) == 4 and list(runs.glob('00_tiny/.*')) == []


@pytest.mark.slow
def test_a_worker_with_other_code_is_refused_by_name(dask, scheduler, tiny, runs, tmp_path):
    other = tmp_path/'other'
    aside = shutil.ignore_patterns('__pycache__')
    shutil.copytree(root()/'puzzle_research', other/'puzzle_research', ignore=aside)
    shutil.copy(root()/'settings.ini', other)
    with (other/'puzzle_research'/'core'/'runs.py').open('a') as f:
        f.write('# changed\n')
    worker(dask, scheduler, 'old', cwd=other, path=other)
    line = 'no worker can run this sweep'
    words = ['-p', 'seed', '0:2', '--engine', 'dask', '--scheduler', scheduler]
    def ask():
        return puzzle('sweep', tiny, *words, cwd=root())
    result = ask()
    while 'None has joined' in result.stderr:
        result = ask()
    assert_one_clear_line(result, line, codes=(2,))
    assert re.search(r'differs from here in module puzzle_research.core.runs', result.stderr)
    assert list(runs.glob('00_tiny/*')) == []


@pytest.mark.parametrize('words, said', [
    ('--engine dsk', "did you mean 'dask'"),
    ('--scheduler tcp://x:1', '--engine dask'),
    ('--engine dask --scheduler nowhere:1', "scheduler 'nowhere:1' was not reached"),
])
def test_what_cannot_be_reached_is_one_line(tiny, runs, command, words, said):
    code, err = command('sweep', tiny, '-p', 'seed', '0:2', *words.split())
    assert code in (1, 2) and said in err and err.count('\n') == 1
    assert list(runs.glob('00_tiny/*')) == []
