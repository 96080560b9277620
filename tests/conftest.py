"Fixtures that several test files share. Functions that they share are in shared.py."
import pytest

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
