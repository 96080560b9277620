"What a notebook cell cannot show: killed processes, two processes, full disks."
import os, signal

import pytest, torch
from torch import nn

from puzzle_research.core.callbacks import Best, Evaluate, WeightAverage
from puzzle_research.core.checkpoint import save_state
from puzzle_research.core.config import make_config, parse_parameters
from puzzle_research.core.device import seed_everything
from puzzle_research.core.files import write_json
from puzzle_research.core.fit import Batches, Trainer, warmup_cosine
from puzzle_research.core.runs import Run, begin
from shared import finish_child, start_child, trained_together, wait_until

Config = make_config(parse_parameters("recipe:str = 'best'\nbudget:str = 'test'\nseed:int = 0\nrun:str = ''"))




def noisy(batch, generator):
    return batch[0] + .01*torch.randn(batch[0].shape, generator=generator), batch[1]


def train_two_stages(resume='', stop=None): # stop: (stage, step) where the process waits to be killed
    "A run with all that a checkpoint must hold: dropout, batch norm, averages, the best weights, noisy data."
    run, cfg = begin('00_kill', Config(run=resume))
    seed_everything(0)
    x = torch.randn(512, 8)
    y = x[:, :1].sin()
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(.2), nn.Linear(32, 1))
    def loss(model, batch, t):
        while stop == (t.name, t.step):
            (run.dir/'waiting').touch()
        return (model(batch[0]) - batch[1]).square().mean()
    def mse(model, t): return dict(mse=(model(x) - y).square().mean())
    for stage, steps in (('first', 60), ('second', 120)):
        batches = Batches(x, y, batch_size=32, seed=3, transform=noisy)
        Trainer(model, loss, batches, torch.optim.AdamW(model.parameters(), 1e-2), warmup_cosine(), clip=1.,
                device='cpu', run=run, name=stage, log_every=5, save_seconds=.02,
                callbacks=[WeightAverage(.9), Evaluate(mse, 10), Best('mse')]).fit(steps)
    save_state(run.dir/'final.safetensors', model.state_dict())
    run.finish(dict(title='A', claim='B', metrics={}))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The run that is never killed."
    runs = tmp_path_factory.mktemp('whole')
    finish_child(start_child(train_two_stages, PUZZLE_RUNS=str(runs), PUZZLE_RUN_ID='whole'))
    return Run(runs/'00_kill'/'whole')


@pytest.mark.parametrize('stop', [('first', 0), ('first', 37), ('second', 71)])
def test_killed_and_resumed_equals_never_killed(whole, tmp_path, stop):
    "Killed before there is a checkpoint, in the middle of a stage, in the second stage."
    child = start_child(train_two_stages, '', stop, PUZZLE_RUNS=str(tmp_path), PUZZLE_RUN_ID='killed')
    run = Run(tmp_path/'00_kill'/'killed')
    wait_until(lambda: (run.dir/'waiting').exists(), child)
    os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    assert run.status == 'died'
    finish_child(start_child(train_two_stages, 'killed', PUZZLE_RUNS=str(tmp_path)))
    assert run.status == 'ok' and [e['kind'] for e in run.events] == ['resume']
    for name in ('metrics.jsonl', 'final.safetensors'):
        assert (run.dir/name).read_bytes() == (whole.dir/name).read_bytes(), name


def test_full_disk_while_saving_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    "A checkpoint that does not fit raises one clear OSError; the one before it is still whole."
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path))
    run = Run.start('00_disk', Config())
    run.save(dict(step=1))
    def full(fd):
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        with pytest.raises(OSError, match='No space left on device.*previous version.*free some space'):
            run.save(dict(step=2))
    assert run.load() == dict(step=1)
    assert not [p for p in (run.dir/'checkpoints').iterdir() if p.suffix in ('.tmp', '.new')]


def train_linear(folder, steps, run=''): # shared among all processes of a launch
    torch.manual_seed(0)
    x, model = torch.randn(256, 8), nn.Linear(8, 1)
    y = x[:, :1].sin()
    def mse(model, batch, t): return (model(batch[0]) - batch[1]).square().mean()
    optimizer = torch.optim.SGD(model.parameters(), .1)
    t = Trainer(model, mse, Batches(x, y, batch_size=32), optimizer, device='cpu', save_seconds=0.,
                run=Run(run) if run else None).fit(steps)
    if t.acc.is_main_process:
        torch.save(model.state_dict(), f'{folder}/{t.acc.num_processes}.pt')


def test_two_processes_equal_one(tmp_path):
    for n in (1, 2):
        trained_together(train_linear, str(tmp_path), 20, processes=n)
    one, two = (torch.load(tmp_path/f'{n}.pt') for n in (1, 2))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_two_processes_go_on_where_two_stopped(tmp_path):
    "Both load the checkpoint that one wrote; the batches are shared without a word in the script."
    def train(name, *stops):
        run = tmp_path/name
        (run/'checkpoints').mkdir(parents=True)
        write_json(run/'manifest.json', dict(seconds=0, peak_memory_mb=None))
        for steps in stops:
            trained_together(train_linear, str(run), steps, str(run))
        return torch.load(run/'2.pt')
    whole, parts, cold = train('whole', 20), train('parts', 8, 20), train('cold', 12)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert not torch.equal(whole['weight'], cold['weight'])
