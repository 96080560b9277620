"Fixtures that several test files share. Functions that they share are in shared.py."
import sys

import pytest

import puzzle_research.core.data as data
import puzzle_research.core.hub as hub
from puzzle_research.cli import main
from reliability import faults, pytest_addoption, pytest_runtest_logreport, pytest_sessionfinish  # noqa: F401
from shared import PUZZLE, SMALL, as_options, finish, only_run, start


def pytest_collection_modifyitems(items):
    "The file that takes longest starts first, so that two processes end at about the same time."
    items.sort(key=lambda item: item.path.name != 'test_vision.py')


@pytest.fixture(scope='session')
def finished_run(tmp_path_factory):
    """`finished_run("02_audio_puzzle", seed=3)`: what `puzzle run` makes at budget=test on bundled data.

    Each is trained once a session. It starts outside the project. Tests read it and never write to it."""
    made = {}
    def run(system, **values):
        key = system, *sorted(values.items())
        if key not in made:
            runs = tmp_path_factory.mktemp('runs')
            finish(start([PUZZLE, 'run', system, *as_options(SMALL | values)], runs, cwd=runs))
            made[key] = only_run(runs)
        return made[key]
    return run


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
