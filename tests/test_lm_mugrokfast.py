"MuGrokfast: oracles, exact resume of a killed run, two processes, cost. The lessons are in nbs/lm/04_mugrokfast.ipynb."
import copy, os, subprocess, sys, time

import pytest, torch, torch.nn.functional as F
from torch import nn

from puzzle_research.core.fit import Batches, Trainer, warmup_cosine
from puzzle_research.lm.mugrokfast import (AdditionNet, Attention, MuGrokfast, addition, better, clip_qk, note_logits, orthogonalise, parameter_groups, slow_gradient)


def net(seed=0): torch.manual_seed(seed); return AdditionNet(11, d=16, n_heads=2, d_ff=24)

def batch(step, p=11, n=32):
    pairs = torch.randint(p, (n, 2), generator=torch.Generator().manual_seed(step))
    return pairs, pairs.sum(1) % p

def run(model, opts, steps, first=0, schedule=lambda s: 1.):
    for o in opts:
        for g in o.param_groups: g.setdefault('initial_lr', g['lr'])
    for s in range(first, first + steps):
        x, y = batch(s)
        F.cross_entropy(model(x), y).backward()
        for o in opts:
            for g in o.param_groups: g['lr'] = g['initial_lr']*schedule(s)
            o.step(); o.zero_grad()
    return model

def equal(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))

def torch_pair(model, lr, wd, betas, fused=None):
    hidden, *rest = parameter_groups(model)
    return [torch.optim.Muon(hidden['params'], lr, weight_decay=wd, adjust_lr_fn='match_rms_adamw'),
            torch.optim.AdamW([{k: v for k, v in g.items() if k != 'kind'} for g in rest], lr, betas=betas, weight_decay=wd, fused=fused)]


@pytest.mark.parametrize('fused', [None, True])
@pytest.mark.parametrize('lr, wd, betas', [(1e-2, .1, (.9, .95)), (3e-3, 1., (.9, .98)), (1e-2, 0., (.8, .99))])
def test_lambda_0_is_muon_and_adamw_bit_for_bit(lr, wd, betas, fused):
    decay = lambda s: 1 - s/40
    ours, theirs = net(), net()
    run(ours, [MuGrokfast(ours, lr, weight_decay=wd, betas=betas, fused=fused)], 30, schedule=decay)
    run(theirs, torch_pair(theirs, lr, wd, betas, fused), 30, schedule=decay)
    assert equal(ours, theirs)


def test_clip_that_never_binds_changes_no_bit():
    a, b = net(), net()
    run(a, [MuGrokfast(a, 1e-2)], 10); run(b, [MuGrokfast(b, 1e-2, qk_clip=1e6)], 10)
    assert equal(a, b)


def test_gradients_are_not_written():
    m = net(); opt = MuGrokfast(m, lamb=2.)
    for s in range(3):
        x, y = batch(s); opt.zero_grad(); F.cross_entropy(m(x), y).backward()
        before = [p.grad.clone() for p in m.parameters()]
        opt.step()
        assert all(torch.equal(g, p.grad) for g, p in zip(before, m.parameters()))


@pytest.mark.parametrize('shape', [(64, 64), (200, 50), (50, 200), (3, 7), (1, 9)])
def test_orthogonalise(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    assert F.cosine_similarity(orthogonalise(g).float().flatten(), (u @ v).flatten(), dim=0) > .97
    assert torch.linalg.svdvals(orthogonalise(g).float()).max() < 1.3
    assert torch.equal(orthogonalise(g), orthogonalise(4*g))       # only directions count
    stack = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalise(stack), torch.stack([orthogonalise(m) for m in stack]), rtol=0, atol=.02)


def test_stacks_of_one_shape_update_as_one_by_one(monkeypatch):
    "What a GPU does to matrices of one shape, done here."
    from puzzle_research.lm import mugrokfast
    a, b = net(), net()
    run(a, [MuGrokfast(a, 1e-2)], 5)
    one = mugrokfast._by_shape
    monkeypatch.setattr(mugrokfast, '_by_shape', lambda ps, device: one(ps, torch.device('meta')))
    assert max(len(g) for g in mugrokfast._by_shape([p.requires_grad_() for p in b.parameters() if setattr(p, 'grad', torch.zeros_like(p)) is None], None)) > 1
    b.zero_grad(); run(b, [MuGrokfast(b, 1e-2)], 5)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=0, atol=5e-3)


def test_every_parameter_has_one_place():
    m = net(); groups = parameter_groups(m)
    placed = [id(p) for g in groups for p in g['params']]
    assert sorted(placed) == sorted(id(p) for p in m.parameters())
    kinds = {id(p): g['kind'] for g in groups for p in g['params']}
    assert {n for n, p in m.named_parameters() if kinds[id(p)] == 'muon'} == {'attention.wq.weight', 'attention.wk.weight', 'attention.wv.weight', 'attention.wo.weight', 'up.weight', 'down.weight'}
    m.up.weight.requires_grad = False
    assert len([p for g in parameter_groups(m) for p in g['params']]) == len(placed) - 1


def test_tied_head_is_the_embedding():
    m = nn.Module(); m.embed = nn.Embedding(5, 4); m.head = nn.Linear(4, 5, bias=False); m.head.weight = m.embed.weight; m.mix = nn.Linear(4, 4)
    assert [(g['kind'], len(g['params'])) for g in parameter_groups(m)] == [('muon', 1), ('adamw', 1), ('adamw', 1)]


def test_parameters_without_gradient_are_left_alone():
    m = net(); opt = MuGrokfast(m, lamb=2.); before = copy.deepcopy(m)
    opt.step()
    assert equal(m, before) and not opt.state


def test_slow_gradient_of_the_paper():
    gs = [torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    state, ema = {}, gs[0]
    for g in gs:
        ema = .9*ema + .1*g
        torch.testing.assert_close(slow_gradient(g, state, 3., .9), g + 3*ema)


def test_state_dict_round_trip_through_a_checkpoint(tmp_path):
    from puzzle_research.core.runs import load_state, save_state
    make = lambda m: MuGrokfast(m, 1e-2, lamb=2., qk_clip=1.)
    whole = net(); run(whole, [make(whole)], 20)
    half = net(); opt = make(half); run(half, [opt], 10)
    save_state(tmp_path/'s.safetensors', dict(model=half.state_dict(), opt=opt.state_dict()))
    s = load_state(tmp_path/'s.safetensors')
    again = net(1); again.load_state_dict(s['model']); opt = make(again); opt.load_state_dict(s['opt'])
    run(again, [opt], 10, first=10)
    assert equal(whole, again)
    assert {'slow', 'momentum_buffer'} <= set(opt.state[again.up.weight]) and {'slow', 'exp_avg', 'exp_avg_sq', 'step'} == set(opt.state[again.embed.weight])


def test_schedule_is_obeyed():
    "A rate of 0 moves nothing; the trainer's schedule reaches every group."
    m = net(); before = copy.deepcopy(m)
    run(m, [MuGrokfast(m, 1e-2, adam_lr=3e-3)], 5, schedule=lambda s: 0.)
    assert equal(m, before)
    pairs, sums, *_ = addition(11, .5, 0)
    opt = MuGrokfast(m, 1e-2, adam_lr=3e-3)
    Trainer(m, lambda m, b, t: F.cross_entropy(m(b[0]), b[1]), Batches(pairs, sums, batch_size=32), opt, schedule=warmup_cosine(.1), device='cpu').fit(20)
    rates = [g['lr'] for g in opt.param_groups]
    assert rates[1]/rates[0] == pytest.approx(.3) and 0 < rates[0] < 1e-3


def test_qk_clip_is_per_head_exact_and_leaves_values_alone():
    torch.manual_seed(0)
    a = Attention(8, 2); a.notes_logits = True; x = torch.randn(5, 3, 8)
    a.wk.weight.data[4:] *= 200
    logits = lambda: (a.wq(x[:, -1:]).unflatten(-1, (2, 4)).transpose(1, 2) @ a.wk(x).unflatten(-1, (2, 4)).transpose(1, 2).mT)*4**-.5
    a(x); torch.testing.assert_close(a.max_logit, logits().amax((0, 2, 3)))
    quiet, v = a.wq.weight[:4].clone(), a.wv.weight.clone()
    clip_qk(a, 2.)
    torch.testing.assert_close(logits().amax((0, 2, 3))[1], torch.tensor(2.))
    assert torch.equal(a.wq.weight[:4], quiet) and torch.equal(a.wv.weight, v)
    a.eval(); a(x); assert not a.max_logit.any()               # nothing is noted in evaluation


def test_only_visible_logits_are_noted():
    q = torch.randn(3, 2, 4, 8); k = torch.randn(3, 2, 4, 8); k[:, :, 3] *= 100; q[:, :, 3] *= 0
    a = nn.Module(); a.register_buffer('max_logit', torch.zeros(2))
    note_logits(a, q, k, torch.ones(4, 4).tril().bool())
    s = (q @ k.mT*8**-.5).masked_fill(~torch.ones(4, 4).tril().bool(), -9e9)
    torch.testing.assert_close(a.max_logit, s.amax((0, 2, 3)).clamp(min=0))


@pytest.mark.parametrize('bad, word', [(dict(lamb=-1.), 'lamb'), (dict(alpha=1.5), 'alpha'), (dict(lr=-1.), 'lr'), (dict(momentum=2.), 'momentum'), (dict(qk_clip=0.), 'qk_clip')])
def test_bad_settings_are_named(bad, word):
    with pytest.raises(ValueError, match=word): MuGrokfast(net(), **bad)


def test_a_matrix_of_three_sides_is_refused():
    with pytest.raises(ValueError, match=r'\(2, 2, 2\).*adamw'): MuGrokfast([dict(params=[nn.Parameter(torch.ones(2, 2, 2))], kind='muon')])


def test_addition_table():
    pairs, sums, train, valid = addition(13, .4, 3)
    assert len(pairs) == 169 and torch.equal((pairs[:, 0] + pairs[:, 1]) % 13, sums)
    assert sorted([*train.tolist(), *valid.tolist()]) == list(range(169)) and len(train) == round(.4*169)


def test_which_leg_is_better():
    leg = lambda reached, best=.5: dict(reached=reached, best=best)
    assert better(leg(10), leg(20)) and not better(leg(20), leg(20)) and better(leg(900), leg(None, .98)) and better(leg(None, .6), leg(None, .5)) and not better(leg(None), leg(20))


TWO = '''
import sys, torch, torch.nn.functional as F
from accelerate import PartialState
from puzzle_research.core.fit import Batches, Trainer
from puzzle_research.lm.mugrokfast import AdditionNet, MuGrokfast, addition
state = PartialState(cpu=True)
torch.manual_seed(0); torch.set_num_threads(1)
pairs, sums, *_ = addition(11, .5, 0)
model = AdditionNet(11, d=16, n_heads=2, d_ff=24)
opt = MuGrokfast(model, 3e-3, lamb=1., qk_clip=.02)
t = Trainer(model, lambda m, b, t: F.cross_entropy(m(b[0]), b[1]), Batches(pairs, sums, batch_size=32, rank=state.process_index, world=state.num_processes), opt, device='cpu').fit(12)
if state.is_main_process: torch.save(dict(model=model.state_dict(), noted=opt.max_logit), sys.argv[1])
'''


def test_two_processes_equal_one(tmp_path):
    "Gradients and the logits noted are those of the whole batch; the clip binds."
    (tmp_path/'two.py').write_text(TWO)
    env = os.environ | dict(ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1')
    for n in (1, 2):
        torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
        cmd = [*(torchrun if n == 2 else [sys.executable]), str(tmp_path/'two.py'), str(tmp_path/f'{n}.pt')]
        r = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=180)
        assert r.returncode == 0, r.stderr[-2000:]
    a, b = (torch.load(tmp_path/f'{n}.pt') for n in (1, 2))
    assert a['noted'] > .02
    torch.testing.assert_close(a['noted'], b['noted'], rtol=.02, atol=1e-3)
    for k in a['model']: torch.testing.assert_close(a['model'][k], b['model'][k], rtol=0, atol=5e-3)   # bfloat16 orthogonalisation of sums in another order


def test_step_within_1_3_of_torchs_two():
    torch.set_num_threads(1); torch.manual_seed(0)
    shapes = [(320, 320)]*8 + [(1280, 320), (320, 1280)]*2
    def optimizers(kind):
        ps = [nn.Parameter(torch.randn(s)) for s in (*shapes, (4096, 320), (320,))]
        for p in ps: p.grad = torch.randn_like(p)
        if kind == 'torch': return [torch.optim.Muon(ps[:-2]), torch.optim.AdamW(ps[-2:])]
        return [MuGrokfast([dict(params=ps[:-2], kind='muon'), dict(params=ps[-2:], kind='adamw')], lamb=2.)]
    def once(opts): start = time.process_time(); [o.step() for o in opts]; return time.process_time() - start
    theirs, ours = optimizers('torch'), optimizers('ours')
    for o in (theirs, ours): once(o)
    pairs = [(once(ours), once(theirs)) for _ in range(15)]
    ratio = min(a for a, _ in pairs)/min(b for _, b in pairs)
    assert ratio < 1.3, ratio


WORKER = '''
import sys, time
from puzzle_research.core import fit
from puzzle_research.core.runs import begin
from puzzle_research.lm.mugrokfast import Config, evaluate, train
slow, resume = float(sys.argv[1]), sys.argv[2]
step = fit.Trainer.one_step
def slowly(self): time.sleep(slow); step(self)
fit.Trainer.one_step = slowly
run, cfg = begin('lm_mugrokfast', Config(budget='test', run=resume))
print(run.id, flush=True)
train(cfg, run)
run.save(dict(legs=run.load('legs')), 'final')
run.finish(dict(title='A', claim='B', metrics={}))
'''


def test_killed_race_goes_on_bit_for_bit(tmp_path):
    import signal
    from puzzle_research.core.runs import Run
    (tmp_path/'worker.py').write_text(WORKER)
    env = os.environ | dict(PUZZLE_RUNS=str(tmp_path/'runs'), OMP_NUM_THREADS='1')
    def worker(slow, resume=''): return subprocess.Popen([sys.executable, str(tmp_path/'worker.py'), str(slow), resume], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    def ended(p): out, err = p.communicate(timeout=120); assert p.returncode == 0, err; return out
    whole = ended(worker(0.)).split()[0]
    p = worker(.02); part = p.stdout.readline().strip(); run = Run(tmp_path/'runs'/'lm_mugrokfast'/part)
    while len(run.metrics) < 30: time.sleep(.02); assert p.poll() is None, p.stderr.read()
    os.kill(p.pid, signal.SIGKILL); p.wait(); p.stdout.close(); p.stderr.close()
    ended(worker(0., part))
    whole = Run(tmp_path/'runs'/'lm_mugrokfast'/whole)
    assert (run.dir/'metrics.jsonl').read_bytes() == (whole.dir/'metrics.jsonl').read_bytes()
    assert run.load('legs') == whole.load('legs')
