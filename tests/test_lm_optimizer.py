"MuGrokfast: oracles, exact resumption, QK-clip, two processes. The lessons are in nbs/lm/01 to 03."
import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from puzzle_research.core.fit import Batches, Trainer, warmup_cosine
from puzzle_research.core.runs import load_state, save_state
from puzzle_research.lm import optimizer
from puzzle_research.lm.grokfast import slow_gradient
from puzzle_research.lm.mugrokfast import AdditionNet, LastAttention, addition
from puzzle_research.lm.muon import orthogonalise
from puzzle_research.lm.optimizer import MuGrokfast, clip_qk, note_logits, parameter_groups

PRECISIONS = (torch.bfloat16, torch.float32)


def net(seed=0):
    torch.manual_seed(seed)
    return AdditionNet(11, d=16, n_heads=2, d_ff=24)


def batch(step, p=11, n=32):
    pairs = torch.randint(p, (n, 2), generator=torch.Generator().manual_seed(step))
    return pairs, pairs.sum(1) % p


def run(model, opts, steps, first=0, schedule=lambda s: 1.):
    "Steps `first` to `first + steps` of one training."
    for opt in opts:
        for g in opt.param_groups:
            g.setdefault('initial_lr', g['lr'])
    for s in range(first, first + steps):
        x, y = batch(s)
        F.cross_entropy(model(x), y).backward()
        for opt in opts:
            for g in opt.param_groups:
                g['lr'] = g['initial_lr']*schedule(s)
            opt.step()
            opt.zero_grad()
    return model


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def torch_pair(model, lr, wd, betas, fused=None):
    hidden, *rest = parameter_groups(model)
    rest = [{k: v for k, v in g.items() if k != 'kind'} for g in rest]
    return [torch.optim.Muon(hidden['params'], lr, weight_decay=wd, adjust_lr_fn='match_rms_adamw'),
            torch.optim.AdamW(rest, lr, betas=betas, weight_decay=wd, fused=fused)]


@pytest.mark.parametrize('fused', [None, True])
@pytest.mark.parametrize('lr, wd, betas', [
    (1e-2, .1, (.9, .95)), (3e-3, 1., (.9, .98)), (1e-2, 0., (.8, .99))])
def test_lambda_0_is_muon_and_adamw_bit_for_bit(lr, wd, betas, fused):
    "In bfloat16, which is what torch.optim.Muon computes in on every machine."
    ours, theirs = net(), net()
    opt = MuGrokfast(ours, lr, weight_decay=wd, betas=betas, fused=fused, ns_dtype=torch.bfloat16)
    run(ours, [opt], 12, schedule=lambda s: 1 - s/40)
    run(theirs, torch_pair(theirs, lr, wd, betas, fused), 12, schedule=lambda s: 1 - s/40)
    assert equal(ours, theirs)


def test_clip_that_never_binds_changes_no_bit():
    a, b = net(), net()
    run(a, [MuGrokfast(a, 1e-2)], 10)
    run(b, [MuGrokfast(b, 1e-2, qk_clip=1e6)], 10)
    assert equal(a, b)


def test_gradients_are_not_written():
    m = net()
    opt = MuGrokfast(m, lamb=2.)
    for s in range(3):
        x, y = batch(s)
        opt.zero_grad()
        F.cross_entropy(m(x), y).backward()
        before = [p.grad.clone() for p in m.parameters()]
        opt.step()
        assert all(torch.equal(g, p.grad) for g, p in zip(before, m.parameters()))


@pytest.mark.parametrize('dtype', PRECISIONS)
@pytest.mark.parametrize('shape', [(64, 64), (200, 50), (50, 200), (3, 7), (1, 9)])
def test_orthogonalise(shape, dtype):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    x = orthogonalise(g, dtype=dtype)
    assert x.dtype == dtype and torch.linalg.svdvals(x.float()).max() < 1.3
    assert F.cosine_similarity(x.float().flatten(), (u @ v).flatten(), dim=0) > .97
    assert torch.equal(x, orthogonalise(4*g, dtype=dtype))                     # only directions count
    stack = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    one_by_one = torch.stack([orthogonalise(m, dtype=dtype) for m in stack])
    torch.testing.assert_close(orthogonalise(stack, dtype=dtype), one_by_one, rtol=0, atol=.02)


def test_stacks_of_one_shape_update_as_one_by_one(monkeypatch):
    "What a GPU does to matrices of one shape, done here."
    a, b, together, sizes = net(), net(), optimizer._by_shape, []

    def stacked(params, device):
        found = together(params, torch.device('meta'))
        sizes.extend(map(len, found))
        return found
    run(a, [MuGrokfast(a, 1e-2)], 5)
    monkeypatch.setattr(optimizer, '_by_shape', stacked)
    run(b, [MuGrokfast(b, 1e-2)], 5)
    assert max(sizes) > 1
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=5e-3)


def test_every_parameter_has_one_place():
    m = net()
    groups = parameter_groups(m)
    placed = [id(p) for g in groups for p in g['params']]
    assert sorted(placed) == sorted(id(p) for p in m.parameters())
    kinds = {id(p): g['kind'] for g in groups for p in g['params']}
    hidden = {n.removesuffix('.weight') for n, p in m.named_parameters() if kinds[id(p)] == 'muon'}
    assert hidden == {'attention.wq', 'attention.wk', 'attention.wv', 'attention.wo', 'up', 'down'}
    m.up.weight.requires_grad = False
    assert len([p for g in parameter_groups(m) for p in g['params']]) == len(placed) - 1


def test_tied_head_is_the_embedding():
    m = nn.Module()
    m.embed, m.head, m.mix = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(4, 4)
    m.head.weight = m.embed.weight
    found = [(g['kind'], len(g['params'])) for g in parameter_groups(m)]
    assert found == [('muon', 1), ('adamw', 1), ('adamw', 1)]


def test_parameters_without_gradient_are_left_alone():
    m = net()
    opt, before = MuGrokfast(m, lamb=2.), copy.deepcopy(m)
    opt.step()
    assert equal(m, before) and not opt.state


def test_slow_gradient_of_the_paper():
    gs = [torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    state, ema = {}, gs[0]
    for g in gs:
        ema = .9*ema + .1*g
        torch.testing.assert_close(slow_gradient(g, state, 3., .9), g + 3*ema)


def test_state_dict_round_trip_through_a_checkpoint(tmp_path):
    def make(m):
        return MuGrokfast(m, 1e-2, lamb=2., qk_clip=1.)
    whole, half, again = net(), net(), net(1)
    run(whole, [make(whole)], 20)
    opt = make(half)
    run(half, [opt], 10)
    save_state(tmp_path/'s.safetensors', dict(model=half.state_dict(), opt=opt.state_dict()))
    state = load_state(tmp_path/'s.safetensors')
    again.load_state_dict(state['model'])
    opt = make(again)
    opt.load_state_dict(state['opt'])
    run(again, [opt], 10, first=10)
    assert equal(whole, again)
    assert {'slow', 'momentum_buffer'} <= set(opt.state[again.up.weight])
    assert {'slow', 'exp_avg', 'exp_avg_sq', 'step'} == set(opt.state[again.embed.weight])


def test_schedule_is_obeyed():
    "A rate of 0 moves nothing; the trainer's schedule reaches every group."
    m = net()
    before = copy.deepcopy(m)
    run(m, [MuGrokfast(m, 1e-2, adam_lr=3e-3)], 5, schedule=lambda s: 0.)
    assert equal(m, before)
    pairs, sums, *_ = addition(11, .5, 0)
    opt = MuGrokfast(m, 1e-2, adam_lr=3e-3)

    def loss(model, batch, t):
        return F.cross_entropy(model(batch[0]), batch[1])
    batches = Batches(pairs, sums, batch_size=32)
    Trainer(m, loss, batches, opt, warmup_cosine(.1), device='cpu').fit(20)
    rates = [g['lr'] for g in opt.param_groups]
    assert rates[1]/rates[0] == pytest.approx(.3) and 0 < rates[0] < 1e-3


def test_qk_clip_is_per_head_exact_and_leaves_values_alone():
    torch.manual_seed(0)
    a, x = LastAttention(8, 2), torch.randn(5, 3, 8)
    a.notes_logits = True
    a.wk.weight.data[4:] *= 200

    def logits():
        q, k = (w(y).unflatten(-1, (2, 4)).transpose(1, 2) for w, y in ((a.wq, x[:, -1:]), (a.wk, x)))
        return ((q @ k.mT)*4**-.5).amax((0, 2, 3))
    a(x)
    torch.testing.assert_close(a.max_logit, logits())
    quiet, values = a.wq.weight[:4].clone(), a.wv.weight.clone()
    clip_qk(a, 2.)
    torch.testing.assert_close(logits()[1], torch.tensor(2.))
    assert torch.equal(a.wq.weight[:4], quiet) and torch.equal(a.wv.weight, values)
    a.eval()(x)
    assert not a.max_logit.any()                                # nothing is noted in evaluation


def test_only_visible_logits_are_noted():
    q, k = torch.randn(2, 3, 2, 4, 8)
    k[:, :, 3] *= 100
    q[:, :, 3] *= 0
    a, seen = nn.Module(), torch.ones(4, 4).tril().bool()
    a.register_buffer('max_logit', torch.zeros(2))
    note_logits(a, q, k, seen)
    logits = (q @ k.mT*8**-.5).masked_fill(~seen, -9e9)
    torch.testing.assert_close(a.max_logit, logits.amax((0, 2, 3)).clamp(min=0))


@pytest.mark.parametrize('bad, word', [
    (dict(lamb=-1.), 'lamb'), (dict(alpha=1.5), 'alpha'), (dict(lr=-1.), 'lr'),
    (dict(momentum=2.), 'momentum'), (dict(qk_clip=0.), 'qk_clip')])
def test_bad_settings_are_named(bad, word):
    with pytest.raises(ValueError, match=word):
        MuGrokfast(net(), **bad)


def test_a_matrix_of_three_sides_is_refused():
    with pytest.raises(ValueError, match=r'\(2, 2, 2\).*adamw'):
        MuGrokfast([dict(params=[nn.Parameter(torch.ones(2, 2, 2))], kind='muon')])


SHARED = '''
import sys, torch, torch.nn.functional as F
from accelerate import PartialState
from puzzle_research.core.fit import Batches, Trainer
from puzzle_research.lm.mugrokfast import AdditionNet, addition
from puzzle_research.lm.optimizer import MuGrokfast
state = PartialState(cpu=True)
torch.manual_seed(0)
torch.set_num_threads(1)
pairs, sums, *_ = addition(11, .5, 0)
model = AdditionNet(11, d=16, n_heads=2, d_ff=24)
opt = MuGrokfast(model, 3e-3, lamb=1., qk_clip=.02)
batches = Batches(pairs, sums, batch_size=32, rank=state.process_index, world=state.num_processes)
Trainer(model, lambda m, b, t: F.cross_entropy(m(b[0]), b[1]), batches, opt, device='cpu').fit(12)
if state.is_main_process:
    torch.save(dict(model=model.state_dict(), noted=opt.max_logit), sys.argv[1])
'''


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    "Gradients and the logits noted are those of the whole batch; the clip binds."
    script = tmp_path/'shared.py'
    script.write_text(SHARED)
    env = os.environ | dict(ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1')
    alone = [sys.executable]
    shared = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    found = []
    for command in (alone, shared):
        command = [*command, str(script), str(tmp_path/'found.pt')]
        r = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
        assert r.returncode == 0, r.stderr[-2000:]
        found.append(torch.load(tmp_path/'found.pt'))
    a, b = found
    assert a['noted'] > .02
    torch.testing.assert_close(a['noted'], b['noted'], rtol=.02, atol=1e-3)
    for k in a['model']:                            # bfloat16 orthogonalisation of sums in another order
        torch.testing.assert_close(a['model'][k], b['model'][k], rtol=0, atol=5e-3)
