"Kills at every write of a run, signals at every stage, two processes on one run, a full disk."
import os
import shutil
import signal
import time

import matplotlib
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.figure import Figure
from torch import nn

from damage import ended, fork, kills, torn_at
from puzzle_research.core import runs
from puzzle_research.core.config import make_config, parse_parameters
from puzzle_research.core.fit import Batches, Trainer
from puzzle_research.core.locks import InUse
from puzzle_research.core.measure import metric
from puzzle_research.core.report import write_report
from puzzle_research.core.runs import Run, begin
from shared import PUZZLE, SMALL, as_options, finish, puzzle, start, wait_until

matplotlib.use('agg')
Config = make_config(parse_parameters("recipe:str = 'best'\nbudget:str = 'test'\nseed:int = 0\nrun:str = ''"))
STEPS, NAME = 8, 'the_run'


def train(run, at_step=None):
    torch.manual_seed(0)
    x, model = torch.randn(64, 4), nn.Linear(4, 1)
    def loss(model, batch, t):
        if at_step:
            at_step(t.step)
        return (model(batch[0]) - batch[0][:, :1]).square().mean()
    Trainer(model, loss, Batches(x, batch_size=16), torch.optim.AdamW(model.parameters()), device='cpu',
            run=run, log_every=2, save_seconds=0.).fit(STEPS)


def finish_run(run):
    last = [row['loss'] for row in run.metrics if 'loss' in row][-1]
    run.finish(dict(title='A', claim='B', metrics=dict(final_loss=metric(last, '1', 'min', 64))))


def draw(run):
    fig = Figure(figsize=(1, 1))
    fig.subplots().plot([row['loss'] for row in run.metrics])
    run.figure('loss', fig, 'Loss.')


def whole_run(resume=''):
    os.environ['PUZZLE_RUN_ID'] = NAME
    run, _ = begin('00_run', Config(run=resume))
    train(run)
    if not run.finished:
        finish_run(run)
    draw(run)
    write_report(run.dir)


@pytest.fixture(scope='module', autouse=True)
def warm():
    "What a training imports, and compiles, is there before the first fork."
    train(None)
    Figure(figsize=(1, 1)).subplots().figure.savefig(os.devnull, format='png')


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "Where the one run of a test lies; git is not asked."
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path))
    monkeypatch.setattr(runs, 'git_state', lambda: dict(commit=None, dirty=None))
    return tmp_path/'00_run'/NAME


def content(folder): # what a run that was killed must have in common with one that was not
    names = ('config.json', 'metrics.jsonl', 'summary.json', 'figures/loss.png')
    return {name: (folder/name).read_bytes() for name in names}


@pytest.mark.parametrize('every', [15, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_a_write_and_taken_up(faults, folder, every):
    assert ended(fork(whole_run)) == 0
    whole = content(folder)
    def fresh(): shutil.rmtree(folder, ignore_errors=True)
    torn = [size for size in (50, 500, 1500, 3000) if not fresh() and torn_at(whole_run, size)]
    for n in [*kills(whole_run, fresh, every), *torn]:
        if not (folder/'manifest.json').exists():
            faults.count('run', 'killed before it began', 'right')
            continue
        died = Run(folder).status in ('died', 'ok')
        same = died and ended(fork(lambda: whole_run(NAME))) == 0 and content(folder) == whole
        run = Run(folder)
        sound = same and run.status == 'ok' and run.altered() == [] and not list(folder.rglob('.*.tmp'))
        faults.count('run', 'killed at a write', 'right' if sound else 'lost', f'write {n}: {run}')


# Signals. IPython runs the cells, as in a kernel; `hit` stands at the stage where the signal comes.

STAGES = {
    'before training': ['hit()', 'train(run)', 'finish_run(run)', 'draw(run)', 'write_report(run.dir)'],
    'in training': ['train(run, lambda step: hit() if step == 3 else None)', 'finish_run(run)'],
    'in evaluation': ['train(run)', 'hit(); finish_run(run)'],
    'in drawing': ['train(run)', 'finish_run(run)', 'hit(); draw(run)'],
    'before the report': ['train(run)', 'finish_run(run)', 'draw(run)', 'hit(); write_report(run.dir)'],
}


def run_cells(cells, number):
    os.environ['PUZZLE_RUN_ID'] = NAME
    shell = InteractiveShell.instance()
    shell.user_ns.update(globals(), hit=lambda: os.kill(os.getpid(), number))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for cell in ['run, _ = begin("00_run", Config())', *cells]:
        if not shell.run_cell(cell).success:
            break


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_every_stage(faults, folder, stage, number):
    how = ended(fork(lambda: run_cells(STAGES[stage], number)))
    run = Run(folder)
    kept = run.load()['step'] if run.checkpoints() else None
    steps = {'before training': None, 'in training': 4}.get(stage, STEPS)
    by_itself = how == (0 if number == signal.SIGINT else -number)
    right = by_itself and run.status == 'interrupted' and kept == steps
    finished = right and ended(fork(lambda: whole_run(NAME))) == 0 and run.status == 'ok'
    what = f'{number.name} {stage}'
    faults.count('run', what, 'right' if finished else 'lost', f'{how} {run} {kept} {run.manifest["error"]}')


def test_a_finished_run_stays_finished(folder):
    "A signal that comes after the report changes nothing, in a cell or between two."
    cells = ['train(run)', 'finish_run(run)', 'draw(run)', 'write_report(run.dir)', 'hit()']
    for number in (signal.SIGINT, signal.SIGTERM):
        shutil.rmtree(folder, ignore_errors=True)
        ended(fork(lambda: run_cells(cells, number)))
        assert Run(folder).status == 'ok'


# Two processes

def take_up(gate):
    while not gate.exists():
        pass
    try:
        run, _ = begin('00_run', Config(run=NAME))
        time.sleep(5)
    except InUse as e:
        os._exit(7 if f'run {NAME} is in use by process' in str(e) else 8)


@pytest.mark.parametrize('times', [1, pytest.param(4, marks=pytest.mark.slow)])
def test_two_processes_on_one_run(faults, folder, tmp_path, times):
    def died(): run_cells(['train(run)', 'hit()'], signal.SIGKILL)
    for i in range(times):
        shutil.rmtree(folder, ignore_errors=True)
        ended(fork(died))
        gate = tmp_path/f'gate{i}'
        both = [fork(lambda: take_up(gate)) for _ in 'ab']
        gate.touch()
        codes = sorted(ended(child) for child in both)
        resumed = sum(e['kind'] == 'resume' for e in Run(folder).events)
        one = (codes, resumed) == ([0, 7], 1)
        faults.count('run', 'two resumes at once', 'refused' if one else 'lost', f'{codes}')


def test_a_run_in_use_is_one_line_and_exit_1(faults, folder, command):
    run, _ = begin('00_run', Config())
    def second():
        code, said = command('run', 'guides_system', '--resume', run.id)
        in_use = f'puzzle: run {run.id} is in use by process {os.getppid()}; wait for its end, or stop it\n'
        assert (code, said) == (1, in_use), said
    refused = ended(fork(second)) == 0
    faults.count('run', '`puzzle run --resume` of one in use', 'refused' if refused else 'lost')
    run.close('interrupted')


# Full disks

def test_a_disk_that_fills_while_training(faults, small_disk, monkeypatch):
    "At several steps: the error is that of the disk, and the run can be taken up once there is room."
    monkeypatch.setenv('PUZZLE_RUNS', str(small_disk))
    monkeypatch.setattr(runs, 'git_state', lambda: dict(commit=None, dirty=None))
    folder, filler = small_disk/'00_run'/NAME, small_disk/'filler'
    for step in (0, 3, 5, 7):
        def fill(now, step=step):
            if now == step:
                left = shutil.disk_usage(small_disk).free
                filler.write_bytes(bytes(max(0, left - 4096)))
        shutil.rmtree(folder, ignore_errors=True)
        filler.unlink(missing_ok=True)
        os.environ['PUZZLE_RUN_ID'] = NAME
        run, _ = begin('00_run', Config())
        try:
            train(run, fill)
            said = ''
        except OSError as e:
            said = str(e)
        filler.unlink()
        run.close('failed', said)
        named = 'No space left' in said and str(folder) in said
        resumed = ended(fork(lambda: whole_run(NAME))) == 0 and run.status == 'ok' and run.altered() == []
        faults.count('run', 'the disk fills while training', 'right' if named and resumed else 'lost', said)


@pytest.mark.slow
def test_puzzle_run_on_a_full_disk_reports_the_disk(faults, small_disk):
    for free in (4096, 40_960, 122_880):
        shutil.rmtree(small_disk/'guides_system', ignore_errors=True)
        (small_disk/'filler').unlink(missing_ok=True)
        (small_disk/'filler').write_bytes(bytes(shutil.disk_usage(small_disk).free - free))
        r = puzzle('run', 'guides_system', *as_options(SMALL), PUZZLE_RUNS=str(small_disk))
        last = r.stderr.splitlines()[-1] if r.stderr else ''
        named = 'No space left' in last and r.returncode == 1
        faults.count('`puzzle run`', 'full disk', 'refused' if named else 'lost', f'{free} free: {r.stderr}')


# `puzzle run` itself

def reached(folder): # stage -> is it reached?
    return {
        'the kernel starts': lambda: True,
        'it has begun': (folder/'manifest.json').exists,
        'it trains': (folder/'progress.json').exists,
        'it draws': (folder/'summary.json').exists,
    }


@pytest.mark.slow
@pytest.mark.parametrize('delay', [0, .7])
@pytest.mark.parametrize('stage', reached(PUZZLE))
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_of_puzzle_run(faults, tmp_path, stage, number, delay):
    process = start([PUZZLE, 'run', 'guides_system', *as_options(SMALL | dict(steps=300))], tmp_path)
    name = process.stdout.readline().split()[-1]
    folder = tmp_path/'guides_system'/name
    wait_until(reached(folder)[stage], process)
    time.sleep(delay)
    process.send_signal(number)
    began = time.monotonic()
    out, _ = process.communicate(timeout=60)
    took, run = time.monotonic() - began, Run(folder)
    if process.returncode == 0:                          # it had come to its end
        right = run.status == 'ok' and not run.incomplete()
    else:
        said = process.returncode == 128 + number and 'interrupted' in out and 'Traceback' not in out
        right = said and (not (folder/'manifest.json').exists() or run.status == 'interrupted')
    faults.count('`puzzle run`', f'{number.name} when {stage}', 'right' if right and took < 12 else 'lost',
                 f'{took:.0f} s {process.returncode} {out[-500:]}')
    if delay and (folder/'manifest.json').exists() and run.status == 'interrupted':
        finish(start([PUZZLE, 'run', 'guides_system', '--resume', name], tmp_path))
        assert run.status == 'ok'
