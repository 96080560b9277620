"Fixtures that several test files share. Functions that they share are in shared.py."
import subprocess
import sys

import pytest
from filelock import FileLock

import puzzle_research.core.data as data
import puzzle_research.core.hub as hub
from puzzle_research.cli import main
from puzzle_research.core.seals import listen
from reliability import (  # noqa: F401
    costs, faults, pytest_addoption, pytest_runtest_logreport, pytest_sessionfinish)
from shared import PUZZLE, SMALL, as_options, finish, only_run, start, write_notebook


def pytest_collection_modifyitems(items):
    "The file that takes longest starts first, so that two processes end at about the same time."
    items.sort(key=lambda item: item.path.name != 'test_experiments.py')


@pytest.fixture(scope='session')
def finished_run(tmp_path_factory, worker_id):
    """`finished_run("02_audio_puzzle", seed=3)`: what `puzzle run` makes at budget=test on bundled data.

    Each is trained once a session, for all processes that test. It starts outside the project. Tests read it
    and never write to it."""
    base = tmp_path_factory.getbasetemp()
    folder = base if worker_id == 'master' else base.parent
    def run(system, **values):
        runs = folder/'-'.join([system, *(f'{name}={value}' for name, value in sorted(values.items()))])
        with FileLock(f'{runs}.lock'):
            if not runs.exists():
                runs.mkdir()
                finish(start([PUZZLE, 'run', system, *as_options(SMALL | values)], runs, cwd=runs))
        return only_run(runs)
    return run


@pytest.fixture(autouse=True)
def _no_listener():
    "A run that a test began in this process hears nothing of the tests after it."
    yield
    listen(None)


@pytest.fixture
def lake(tmp_path, monkeypatch):
    "An empty data folder and an empty cache, without the hub."
    (tmp_path/'lake').mkdir()
    monkeypatch.setenv('PUZZLE_DATA', str(tmp_path/'lake'))
    monkeypatch.setenv('PUZZLE_CACHE', str(tmp_path/'cache'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    hub.UNREACHABLE.clear()
    return tmp_path/'lake'


@pytest.fixture
def no_cifar10(monkeypatch):
    "As if no local file of CIFAR-10 were there."
    find = data.find
    monkeypatch.setattr(data, 'find', lambda name, split: None if name == 'cifar10' else find(name, split))


@pytest.fixture
def command(monkeypatch, capsys):
    "`command('encode', 'a.wav')`: exit status and stderr of `puzzle encode a.wav`, in this process."
    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['puzzle', *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr().err
    return call


TINY = ['''
budget:str = 'test' # of the run
rate:float = .1 # what the run measures
steps:int = 1 # of a tenth of a second
seed:int = 0
run:str = '' # to take up
''', '''
import json, time
from puzzle_research.core.config import configure, parameters
from puzzle_research.core.measure import metric
from puzzle_research.core.runs import begin
Config = parameters(globals(), bounds=dict(rate=(0, 1)))
run, cfg = begin('00_tiny', configure(Config, globals()))
''', '''
for step in range(cfg.steps):
    if cfg.rate == .9:
        raise OSError(28, 'No space left on device')
    run.log(step + 1, 'valid', stage='main', error=cfg.rate*(1 + cfg.seed)/(step + 1))
    time.sleep(.1)
''', '''
error = metric(cfg.rate*(1 + cfg.seed), 'of one', 'min', 1)
run.finish(dict(title='Tiny', claim='Small.', metrics=dict(error=error)))
''']


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    "A notebook that is a run and nothing else."
    return write_notebook(tmp_path_factory.mktemp('nbs')/'00_tiny.ipynb', TINY)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path/'runs'))
    return tmp_path/'runs'


@pytest.fixture
def small_disk(tmp_path):
    "A folder on a disk of half a megabyte, where this user may mount one."
    disk = tmp_path/'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=512k', 'tmpfs', disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('no disk may be mounted here')
    yield disk
    subprocess.run(['umount', '-l', disk], check=True)
