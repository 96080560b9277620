"`puzzle run --launch N`: several processes over gloo equal one; one that is killed ends the run clearly."
import signal

import psutil, pytest, torch
from torch import nn

from puzzle_research.core.callbacks import Evaluate
from puzzle_research.core.fit import Batches, Trainer
from puzzle_research.core.runs import Run
from puzzle_research.core.vector_quantizer import VectorQuantizer
from shared import (PUZZLE, assert_one_clear_line, only_run, puzzle, start, trained_together, wait_until,
                    write_notebook)


class Coded(nn.Module):
    "Two linear maps with a codebook between them, which begins by k-means and restarts dead codes."
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 4), nn.Linear(4, 8)
        self.quantizer = VectorQuantizer(4, 16, decay=.9, kmeans_init=True, restart_threshold=.1)

    def cost(self, x): # not the forward, as in most of our systems
        coded = self.quantizer(self.encoder(x))
        loss = (self.decoder(coded.z_q) - x).square().mean() + coded.loss
        return loss, dict(codes=coded.indices.unique().numel())


def noisy(batch, generator): return batch[0] + .01*torch.randn(batch[0].shape, generator=generator),


class EveryRow(Batches):
    "The last batch of an epoch is smaller, and one process then has fewer rows than the other."
    def __len__(self): return -(-len(self.index)//self.batch_size)


def train_codebook(folder): # in each process of a launch
    torch.manual_seed(0)
    x, model = torch.randn(43, 8), Coded()
    batches = EveryRow(x, batch_size=8, transform=noisy)
    optimizer = torch.optim.SGD(model.parameters(), .1)
    watch = Evaluate(lambda model, t: dict(cost=model.cost(x)[0]), 10)
    def loss(model, batch, t): return model.cost(batch[0])
    t = Trainer(model, loss, batches, optimizer, clip=1., device='cpu', log_every=1, callbacks=[watch])
    t.fit(30)
    rank, world = t.acc.process_index, t.acc.num_processes
    torch.save(dict(state=model.state_dict(), history=t.history), f'{folder}/{rank}_of_{world}.pt')


def test_two_processes_equal_one_at_the_same_global_batch(tmp_path):
    "With noise in the data, an uneven last batch, k-means, restarts, and a loss that is no forward."
    for n in (1, 2):
        trained_together(train_codebook, str(tmp_path), processes=n)
    one, first, second = (torch.load(tmp_path/f'{name}.pt') for name in ('0_of_1', '0_of_2', '1_of_2'))
    torch.testing.assert_close(first['state'], one['state'], rtol=1e-4, atol=1e-5)
    for name in ('train_loss', 'valid_cost'):
        torch.testing.assert_close(torch.tensor(first['history'][name]), torch.tensor(one['history'][name]),
                                   rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, second['state'][k]) for k, v in first['state'].items())


def codebooks_alone(folder): # no hand-round at the end: what each process has learned by itself
    import puzzle_research.core.fit as fit
    fit.hand_round = lambda t: None
    train_codebook(folder)


def test_codebooks_are_bit_equal_without_being_handed_round(tmp_path):
    trained_together(codebooks_alone, str(tmp_path))
    first, second = (torch.load(tmp_path/f'{rank}_of_2.pt')['state'] for rank in (0, 1))
    assert all(torch.equal(v, second[k]) for k, v in first.items())


SMALL_SYSTEM = ['''
#| export
import os, signal, torch
from torch import nn
from puzzle_research.core.config import configure, parameters, seed_everything
from puzzle_research.core.checkpoint import save_state
from puzzle_research.core.fit import Batches, Trainer
from puzzle_research.core.measure import metric
from puzzle_research.core.report import show_report
from puzzle_research.core.runs import begin
''', '''
#| export
budget:str = 'test'
seed:int = 0
device:str = 'cpu'
fatal:int = 0 # step at which the second process is killed, the first time
run:str = '' # to take up
''', '''
#| export
Config = parameters(globals())
def build(cfg):
    seed_everything(cfg.seed)
    return nn.Linear(8, 1)

def train(cfg, run):
    run.update(determinism=seed_everything(cfg.seed))
    if (run.dir/'final.safetensors').exists():
        return
    model, x = build(cfg), torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    def loss(model, batch, t):
        if os.environ.get('RANK') == '1' and t.step + 1 == cfg.fatal and not run.resumed and not old(run):
            os.kill(os.getpid(), signal.SIGKILL)
        return (model(batch[0]) - batch[0][:, :1].sin()).square().mean()
    Trainer(model, loss, Batches(x, batch_size=32), torch.optim.SGD(model.parameters(), .1), device='cpu',
            run=run, log_every=5, save_seconds=0.).fit(40)
    save_state(run.dir/'final.safetensors', model.state_dict())

def old(run): return any(e['kind'] == 'resume' for e in run.events)
def evaluate(cfg, run):
    from puzzle_research.core.checkpoint import load_state
    error = load_state(run.dir/'final.safetensors')['weight'].square().sum().item()
    return dict(title='Small', claim='Small.', metrics=dict(error=metric(error, 'of one', 'min', 1)))
def draw(run): pass
''', '''
run, cfg = begin('90_small', configure(Config, globals()))
train(cfg, run)
run.finish(evaluate(cfg, run))
show_report(run)
''']


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A project of one system, and where its runs go."
    (tmp_path/'nbs').mkdir()
    write_notebook(tmp_path/'nbs'/'90_small.ipynb', SMALL_SYSTEM, parameters=1)
    (tmp_path/'settings.ini').write_text('lib_name = puzzle_research\n')
    monkeypatch.setenv('PUZZLE_ROOT', str(tmp_path))
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path/'runs'))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    return tmp_path


def test_a_killed_process_ends_the_run_clearly_and_it_can_be_taken_up(small):
    "Which process, by what; the checkpoint that there was; then the notebook goes on alone and reports."
    died = puzzle('run', '90_small', '-p', 'fatal', 20, '--launch', 2, cwd=small)
    run = only_run(small/'runs')
    assert_one_clear_line(died, 'process 1 of 2 ended with exit code -9 (SIGKILL)', codes=(1,))
    assert f'puzzle run 90_small --resume {run.id}' in died.stderr
    assert run.status == 'failed' and 'SIGKILL' in run.manifest['error']
    assert run.load()['step'] == 19
    done = puzzle('run', '90_small', '--resume', run.id, cwd=small)
    assert done.returncode == 0, done.stderr
    assert run.status == 'ok' and run.load()['step'] == 40 and (run.dir/'report.md').exists()
    assert [m['step'] for m in run.metrics] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert not list((run.dir/'checkpoints').glob('*.tmp'))


def test_what_cannot_be_launched_is_said_in_one_line(small, command):
    status, said = command('run', '90_small', '--launch', 0)
    assert status == 2 and said == 'puzzle: --launch 0: expected at least 1 process\n'
    path = small/'nbs'/'90_small.ipynb'
    without = path.read_text().replace('core.fit import', 'core.batches import')
    (small/'nbs'/'91_plain.ipynb').write_text(without)
    status, said = command('run', '91_plain', '--launch', 2)
    assert status == 2 and said.count('\n') == 1 and said.endswith('these can: 90_small\n'), said
    assert not (small/'runs').exists()


@pytest.mark.slow
def test_two_processes_go_on_and_the_notebook_only_analyses(small):
    "The run of two that was killed and taken up by two equals the run of one that was not, within rounding."
    def launch(*args, **env):
        return puzzle('run', '90_small', *args, cwd=small, **env)
    assert launch('-p', 'fatal', 20, '--launch', 2).returncode == 1
    run = only_run(small/'runs')
    done = launch('--resume', run.id, '--launch', 2)
    assert done.returncode == 0 and run.status == 'ok', done.stderr
    said = [e['message'] for e in run.events if e['kind'] == 'launch']
    assert said == ['2 processes train together (gloo)']*2
    assert launch('--launch', 1, PUZZLE_RUNS=str(small/'alone')).returncode == 0
    alone = only_run(small/'alone')
    assert [m['step'] for m in run.metrics] == [m['step'] for m in alone.metrics]
    both = [[m['loss'] for m in r.metrics] for r in (run, alone)]
    assert both[0] == pytest.approx(both[1], rel=1e-5)


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_keeps_what_was_trained(small):
    notebook = small/'nbs'/'90_small.ipynb'
    notebook.write_text(notebook.read_text().replace('fit(40)', 'fit(10**7)'))
    process = start([PUZZLE, 'run', '90_small', '--launch', 2], small/'runs', cwd=small)
    run_id = process.stdout.readline().split()[-1]
    run = Run(small/'runs'/'90_small'/run_id)
    wait_until(lambda: (run.dir/'metrics.jsonl').exists(), process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and run.status == 'interrupted', out
    assert run.load()['step'] >= 5
    commands = [' '.join(p.info['cmdline'] or []) for p in psutil.process_iter(['cmdline'])]
    assert not [c for c in commands if run_id in c or 'cli.launched' in c]
