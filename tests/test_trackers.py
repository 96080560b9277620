"Every system tells the trackers that are asked for, with the real packages and no network."
import sys
import time

import pytest

from puzzle_research.core.config import make_config, parse_parameters
from puzzle_research.core.params import root
from puzzle_research.core.runs import begin
from shared import only_run, puzzle, wandb_rows

Config = make_config(parse_parameters("recipe:str = 'best'\nbudget:str = 'test'\nseed:int = 0"))


@pytest.fixture
def tracked(runs, monkeypatch):
    "`tracked('wandb')`: a run that tells it three lines and ends."
    def run(names):
        monkeypatch.setenv('PUZZLE_TRACK', names)
        run, _ = begin('00_tracked', Config())
        for step in (1, 2):
            run.log(step, stage='main', loss=1/step)
        run.log(2, 'valid', stage='main', psnr=30.)
        run.finish(dict(title='A', claim='B', metrics={}))
        assert run.status == 'ok' and len(run.metrics) == 3
        return run
    return run


def test_wandb_offline(tracked):
    pytest.importorskip('wandb')
    run, end = tracked('wandb'), time.monotonic() + 30
    while len(wandb_rows(run.dir)) < 3 and time.monotonic() < end:      # its service writes in its own time
        time.sleep(.2)
    rows = wandb_rows(run.dir)
    told = [(row['step'], row.get('train/loss'), row.get('valid/psnr')) for row in rows]
    assert told == [(1, 1., None), (2, .5, None), (2, None, 30.)]


def test_trackio(tracked, monkeypatch, tmp_path):
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path/'trackio'))     # read when the package is imported
    pytest.importorskip('trackio')
    tracked('trackio')
    assert any((tmp_path/'trackio').rglob('*.db'))


def test_a_tracker_that_is_not_installed_does_not_end_a_run(tracked, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    event, = tracked('wandb').events
    assert event['kind'] == 'tracker' and 'pip install wandb' in event['message']


@pytest.mark.slow
def test_a_notebook_tells_tensorboard(tiny, runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert puzzle('run', tiny, '--track', 'tensorboard', '-p', 'steps', 3, cwd=root()).returncode == 0
    read = EventAccumulator(str(only_run(runs).dir/'tensorboard')).Reload()
    assert [e.step for e in read.Scalars('valid/error')] == [1, 2, 3]


def test_an_unknown_tracker_is_one_line(tiny, runs, command):
    code, err = command('run', tiny, '--track', 'tensorbord')
    assert code == 2 and "did you mean 'tensorboard'" in err and err.count('\n') == 1
