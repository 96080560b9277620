"The JEPA notebook as its users run it: every knob, resume, two processes, the monitor, watch."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pytest, torch

from puzzle_research.core.config import root
from puzzle_research.core.diagnose import effective_rank
from puzzle_research.core.fit import Evaluate
from puzzle_research.core.quantize import VectorQuantizer, count_parameters
from puzzle_research.core.runs import Run
from puzzle_research import jepa_vq
from puzzle_research.jepa_vq import Config, as_batch, build, compare, info_nce, of_batch, open_items, random_views, retrieval, said_by_monitor, trainer, whiten, with_views

PUZZLE, PAPERMILL = (Path(sys.executable).with_name(n) for n in ('puzzle', 'papermill'))
NOTEBOOK = root()/'nbs'/'04_jepa_vq.ipynb'


def tiny(**knobs): return Config(**dict(budget='test', data='bundled', precision='no', device='cpu') | knobs)

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def items(): return open_items(tiny())

@pytest.fixture
def batch(items): return as_batch(items.train.objects, items.train.index[::len(items.train)//16][:16], *random_views(16, torch.Generator().manual_seed(0)))


def test_parameter_counts():
    assert count_parameters(build(Config(recipe='seed', budget='full'))) == 4_167_937
    for budget in ('quick', 'small', 'full'): assert count_parameters(build(Config(budget=budget))) <= 4_167_937
    assert sum(p.numel() for p in build(Config(recipe='seed', budget='full')).slow.parameters()) > 0  # the slow copy is not counted


def test_chance_is_the_logarithm_of_the_candidates():
    same = torch.nn.functional.normalize(torch.ones(50, 16), dim=1)
    assert abs(info_nce(same, same, .1, same)[0].item() - np.log(100)) < 1e-5
    r = retrieval(same, same, torch.arange(50), .1); assert abs(r['i_nce']) < 1e-5 and r['top1'] == 0 and r['mrr'] < .05
    g = torch.Generator().manual_seed(0); p, c = (torch.nn.functional.normalize(torch.randn(n, 64, generator=g), dim=1) for n in (3000, 500)); a = torch.randint(0, 500, (3000,), generator=g)
    r = retrieval(p, c, a, .07); assert r['i_nce'] < 0 and abs(r['top1'] - 1/500) < .005 and abs(r['top5'] - 5/500) < .01


def test_effective_rank_of_known_spectra():
    g = torch.Generator().manual_seed(0)
    assert abs(effective_rank(torch.randn(4000, 1, generator=g) @ torch.randn(1, 32, generator=g)) - 1) < 1e-6
    assert effective_rank(torch.randn(50_000, 32, generator=g)) > 31.9


def test_the_slow_target_gets_no_gradient_and_follows(batch):
    m = build(tiny(recipe='seed')); loss, _ = m(batch); loss.backward()
    assert all(p.grad is None for p in m.slow.parameters()) and m.encoder.tokens[0].weight.grad.abs().sum() > 0
    before = [p.clone() for p in m.slow.parameters()]
    with torch.no_grad():
        for p in m.parameters():
            if p.requires_grad: p.add_(1.)
    m.after_step()
    live = [*m.encoder.parameters(), *m.head.parameters()]
    for b, a, l in zip(before, m.slow.parameters(), live): assert torch.allclose(a, b + .01*(l - b), atol=1e-6)
    assert torch.equal(m.slow['encoder'].vq.codes, m.encoder.vq.codes)


def test_the_queue_keeps_the_last_targets(batch):
    m = build(tiny(recipe='seed', queue=20))
    for _ in range(3): m(batch); kept = m.fresh[-1]; m.after_step()
    assert int(m.queued) == 48 and {tuple(r) for r in m.queue.tolist()} >= {tuple(r) for r in kept.tolist()} and m.fresh == []


@pytest.mark.parametrize('recipe', ['seed', 'best'])
def test_empty_slots_and_absent_grids_change_nothing(items, batch, recipe):
    torch.manual_seed(0); m = build(tiny(recipe=recipe, target='shared', queue=0)).eval()
    noisy = {k: v.clone() for k, v in batch.items()}; empty = ~of_batch(batch).mask
    for k in ('colour', 'perimeter'): noisy[k][empty] = 3
    noisy['shape'][empty] = True; noisy['box'][empty] = 2
    for a, b in zip(m.embed(batch)[:2], m.embed(noisy)[:2]): assert torch.allclose(a, b, atol=1e-4)
    assert len(m.embed(batch)[2]) == of_batch(batch).mask.sum()


@pytest.mark.parametrize('recipe', ['seed', 'best'])
def test_eval_freezes_every_buffer(batch, recipe):
    m = build(tiny(recipe=recipe)); m(batch)
    for q in m.modules():
        if isinstance(q, VectorQuantizer): q.update()
    m.after_step(); m.eval(); before = {k: v.clone() for k, v in m.state_dict().items()}
    for _ in range(2): m(batch); m.embed(batch)
    for q in m.modules():
        if isinstance(q, VectorQuantizer): q.update()
    for k, v in m.state_dict().items(): assert torch.equal(v, before[k]), k


def test_the_codebook_learns_once_a_step_and_only_from_the_batch(batch):
    "The passes that measure invariance teach nothing."
    m = build(tiny(recipe='seed', invariance_share=1.)); m(batch); q = m.encoder.vq
    assert q.unapplied == 1 and q.pending[:, -1].sum() == of_batch(batch).mask.sum()


@pytest.mark.parametrize('knobs', [*(dict(quantizer=q) for q in ('none', 'ema', 'fsq', 'simvq', 'lfq', 'rotation')), *(dict(pooling=p) for p in ('mean', 'last', 'attention', 'gru', 'transformer')),
                                   *(dict(target=t) for t in ('ema', 'shared')), *(dict(regularizer=r) for r in ('none', 'vicreg', 'sigreg', 'visreg')), dict(relational_weight=.5), dict(invariance=1.), dict(queue=30),
                                   dict(context=5), dict(kmeans_init=False), dict(precision='bf16'), dict(refresh_interval=9000)], ids=str)
@pytest.mark.parametrize('recipe', ['seed', 'best'])
def test_every_knob_trains(items, recipe, knobs):
    cfg = tiny(recipe=recipe, **knobs); data = open_items(cfg) if 'context' in knobs else items
    torch.manual_seed(0); t = trainer(cfg, data, watch=False); t.callbacks = [c for c in t.callbacks if not isinstance(c, Evaluate)]
    before = {k: v.clone() for k, v in t.module.named_parameters() if v.requires_grad}; t.fit(2)
    moved = {k.split('.')[0] for k, v in t.module.named_parameters() if v.requires_grad and not torch.equal(v, before[k])}
    assert {'encoder', 'head', 'log_temperature'} <= moved and np.isfinite(t.last_loss.item())
    if knobs.get('pooling') in ('attention', 'gru', 'transformer'): assert 'pool' in moved


def loss_of(batch, **knobs):
    torch.manual_seed(0); m = build(tiny(**knobs)).eval(); torch.manual_seed(1)
    return m(batch)[0].item()

@pytest.mark.parametrize('recipe, knobs', [('seed', dict(commitment=5., kmeans_init=False)), ('seed', dict(relational_weight=3.)), ('seed', dict(invariance=20.)), ('seed', dict(regularizer_weight=3.)), ('best', dict(regularizer_weight=4.)),
                                           ('best', dict(temperature_min=.15)), ('best', dict(temperature_max=.03)), ('seed', dict(invariance_share=1.))], ids=str)
def test_weights_reach_the_loss(batch, recipe, knobs):
    plain = dict(quantizer='ema', kmeans_init=False) if 'commitment' in knobs else dict(quantizer='none')
    assert abs(loss_of(batch, recipe=recipe, **plain | knobs) - loss_of(batch, recipe=recipe, **plain)) > 1e-5


@pytest.mark.parametrize('recipe', ['seed', 'best'])
def test_whitening_raises_the_rank_and_training_sees_nothing_of_it(items, batch, recipe):
    assert build(tiny(recipe=recipe, whitening=0.)).whitener is None
    torch.manual_seed(0); m = build(tiny(recipe=recipe, whitening=1.)).eval(); torch.manual_seed(1); loss, before = m(batch)[0], m.embed(batch)[1]
    whiten(m, items.train); after = m.embed(batch)[1]
    torch.manual_seed(1); assert torch.equal(m(batch)[0], loss) and effective_rank(after) > effective_rank(before) and torch.allclose(after.norm(dim=1), torch.ones(len(after)), atol=1e-5)
    maps = {k: v.clone() for k, v in m.whitener.state_dict().items()}; whiten(m, items.train)      # again: from the same embeddings
    for k, v in m.whitener.state_dict().items(): assert torch.allclose(v, maps[k], rtol=1e-3, atol=1e-4)


def test_unknown_values_are_refused():
    for bad, word in ((dict(quantizer='fsk'), 'quantizer'), (dict(pooling='max'), 'pooling'), (dict(comitment=.1), "did you mean 'commitment'"), (dict(context=1), 'context')):
        with pytest.raises(ValueError, match=word): tiny(**bad)


def test_equal_grids_are_one_candidate(items):
    from puzzle_research.arc import tasks as arc
    s = arc.demonstrations(arc.test_tasks()[:20])
    seen, answer, K = with_views(s, items.test, 300)
    assert K == 300 == len(set(answer.tolist())) and len(answer) == len(seen)
    keys = {}
    for i in range(len(seen)):
        g = arc.recolour(arc.symmetry(arc.cut(s.grids[seen.index[i, -1]]), int(seen.view[i])), seen.colours[i].numpy())
        assert keys.setdefault(answer[i], (g.shape, g.tobytes())) == (g.shape, g.tobytes())
    assert len(set(keys.values())) == K and (seen.view[:len(s)] == 0).all()


GOOD = dict(loss=1., usage=.9, effective_rank_context=50., effective_rank_target=50.)
def feed(cfg, rows): return said_by_monitor(cfg, [GOOD | r for r in rows])

def test_alerts():
    cfg = tiny(abort_plateau=0)
    assert feed(cfg, [{}]*3) == []
    assert 'usage = 0.05 below 0.08' in feed(cfg, [dict(usage=.05)])[0]
    assert 'effective_rank_context = 2.5 below 3' in feed(cfg, [dict(effective_rank_context=2.5)])[0]
    assert 'effective_rank_target = 4.5 below 5' in feed(cfg, [dict(effective_rank_target=4.5)])[0]
    assert 'loss = 1.3 rises 0 for 3 evaluations' in feed(cfg, [dict(loss=v) for v in (1., 1.1, 1.2, 1.3)])[0]
    assert feed(cfg, [dict(loss=v) for v in (1., 1.1, 1.2, 1.15)]) == []

@pytest.mark.parametrize('rows, word', [([dict(effective_rank_context=1.9)], 'context = 1.9 below 2'), ([dict(effective_rank_target=3.9)], 'target = 3.9 below 4'), ([{}, dict(loss=3.2)], 'jumps 2'),
                                        ([{}]*25, 'stalls'), ([dict(usage=.01)]*17, 'usage = 0.01 below')], ids=lambda v: v if isinstance(v, str) else '')
def test_abort_criteria(rows, word):
    said = feed(tiny(), rows)[-1]
    assert said.startswith('abort') and word in said

def test_usage_may_be_low_until_epoch_fifteen(): assert len(feed(tiny(abort_plateau=0), [dict(usage=.01)]*15)) == 15


def test_the_comparison_is_kept(tmp_path, items):
    from types import SimpleNamespace
    run, cfg = SimpleNamespace(dir=tmp_path), tiny(compare_seeds=1, compare_steps=1)
    done = compare(cfg, run, items); stamp = (tmp_path/'comparison.json').stat().st_mtime_ns
    assert list(done) == list(jepa_vq.VARIANTS) and all(len(v) == 1 and 'i_nce' in v[0] for v in done.values())
    assert 'codes_used' not in done['no codebook'][0] and 'codes_used' in done['gentle'][0]
    assert compare(cfg, run, items) == done and (tmp_path/'comparison.json').stat().st_mtime_ns == stamp


TWO = '''
import sys, torch
from accelerate import PartialState
from puzzle_research.core.config import seed_everything
from puzzle_research.jepa_vq import Config, Evaluate, batches, build, open_items, trainer
state = PartialState(cpu=True); torch.set_num_threads(1)
cfg = Config(recipe=sys.argv[2], budget='test', data='bundled', precision='no', device='cpu', batch_size=16, refresh_interval=0, regularizer='none')
items = open_items(cfg); seed_everything(0)
t = trainer(cfg, items, watch=False); t.callbacks = [c for c in t.callbacks if not isinstance(c, Evaluate)]
t.batches = batches(items.train, cfg, rank=state.process_index, world=state.num_processes)
start = t.module.encoder.vq.codes.clone(); t.fit(6)
q = t.module.encoder.vq
assert not torch.equal(q.codes, start)
torch.save(dict(codes=q.codes, size=q.cluster_size, rows=t.batches.rows(3)), f'{sys.argv[1]}.{state.process_index}')
state.wait_for_everyone(); state.destroy_process_group()      # threads of gloo that outlive the interpreter abort it now and then
'''

@pytest.mark.parametrize('recipe', ['seed', 'best'])
def test_two_processes_have_bit_equal_codebooks(tmp_path, recipe):
    (tmp_path/'two.py').write_text(TWO)
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(tmp_path/'two.py'), str(tmp_path/'state'), recipe]
    r = subprocess.run(cmd, env=os.environ | dict(ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr[-3000:]
    a, b = (torch.load(tmp_path/f'state.{i}', weights_only=False) for i in (0, 1))
    assert torch.equal(a['codes'], b['codes']) and torch.equal(a['size'], b['size']) and not set(a['rows']) & set(b['rows'])


STAGE = '''
import sys, time, torch
from puzzle_research.core.config import seed_everything
from puzzle_research.core.runs import begin, save_state
from puzzle_research.jepa_vq import Config, open_items, trainer
torch.set_num_threads(1)
recipe, slow, resume = sys.argv[1], float(sys.argv[2]), sys.argv[3]
run, cfg = begin('04_jepa_vq', Config(recipe=recipe, budget='test', data='bundled', device='cpu', epochs=4, epoch_steps=4, abort_rank_context=0., abort_rank_target=0., run=resume))  # sixteen steps of warm-up have no rank to speak of
print(run.id, flush=True)
items = open_items(cfg, run); seed_everything(cfg.seed)
t = trainer(cfg, items, run); t.save_seconds, loss = .5, t.loss
def waiting(*a): time.sleep(slow); return loss(*a)
t.loss = waiting
save_state(run.dir/'final.safetensors', t.fit(16).module.state_dict())
run.finish(dict(title='A', claim='B', metrics={}))
'''

def stage(tmp, recipe, slow=0., resume='', wait=True):
    (tmp/'stage.py').write_text(STAGE)
    p = subprocess.Popen([sys.executable, str(tmp/'stage.py'), recipe, str(slow), resume], env=os.environ | dict(PUZZLE_RUNS=str(tmp/'runs'), OMP_NUM_THREADS='1'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if not wait: return p
    out, err = p.communicate(timeout=600)
    assert p.returncode == 0, err[-3000:]
    return out.split()[0]

@pytest.mark.parametrize('recipe', [pytest.param('seed', marks=pytest.mark.slow), 'best'])
def test_killed_and_resumed_equals_never_killed(tmp_path, monkeypatch, recipe):
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path/'runs'))
    whole = Run.open(stage(tmp_path, recipe)); p = stage(tmp_path, recipe, slow=.3, wait=False)
    run = Run.open(p.stdout.readline().strip())
    while not run.checkpoints('main'): time.sleep(.05); assert p.poll() is None, p.stderr.read()[-3000:]
    os.kill(p.pid, signal.SIGKILL); p.communicate()
    assert run.status == 'died' and len(run.metrics) < len(whole.metrics)
    stage(tmp_path, recipe, resume=run.id)
    for f in ('metrics.jsonl', 'final.safetensors'): assert (run.dir/f).read_bytes() == (whole.dir/f).read_bytes(), f


def start(cmd, runs): return subprocess.Popen([str(c) for c in cmd], cwd=root(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | dict(PUZZLE_RUNS=str(runs), OMP_NUM_THREADS='1'))

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The signature command, from the root, at budget test; watched while it runs."
    runs = tmp_path_factory.mktemp('whole')
    p = start([PAPERMILL, 'nbs/04_jepa_vq.ipynb', runs/'out.ipynb', '-p', 'commitment', '0.15', '-p', 'quantizer', 'fsq', '-p', 'budget', 'test', '-p', 'data', 'bundled'], runs)
    out, _ = p.communicate(timeout=900)
    assert p.returncode == 0, out[-3000:]
    return Run(next((runs/'04_jepa_vq').iterdir()))

def test_a_run_holds_what_it_should(whole):
    assert whole.status == 'ok' and whole.config['quantizer'] == 'fsq' and whole.config['commitment'] == .15
    assert {'report.md', 'summary.json', 'metrics.jsonl', 'codes.json', 'comparison.json', 'collapse.json', 'model.safetensors'} <= {p.name for p in whole.dir.iterdir()}
    s = whole.summary
    assert {c['bar'] for c in s['criteria']} == {'must', 'aim', 'moonshot'} and s['limits']['i_nce']['ln K'] == pytest.approx(np.log(s['metrics']['candidates']['value']))
    assert {'training', 'spectrum', 'gradients', 'vocabulary', 'code_use', 'neighbours', 'answers', 'comparison', 'collapse'} <= {p.stem for p in (whole.dir/'figures').glob('*.png')}

def test_codes_are_json_that_a_program_search_can_read(whole):
    from puzzle_research.arc import tasks as arc
    d = json.loads((whole.dir/'codes.json').read_text())
    for t in arc.test_tasks()[:5]:
        assert len(d['tasks'][t.id]) == len(t.pairs)
        for told, pair in zip(d['tasks'][t.id], t.pairs):
            for side, grid in zip((told['input'], told['output']), pair):
                assert tuple(side['size']) == grid.shape and all(0 <= c < 768 and grid[r:, x:].size and colour in grid for c, colour, r, x in side['words'])
                if len(grid[grid > 0]): assert len(side['words']) > 0

def test_watch_needs_no_torch_and_takes_a_folder(whole):
    code = f"import sys; sys.argv = ['puzzle', 'watch', {str(whole.dir)!r}, '--once']\nfrom puzzle_research.cli import main\ntry: main()\nexcept SystemExit as e: print('exit', e.code)\nprint('HEAVY', [m for m in ('torch', 'numpy', 'pandas') if m in sys.modules])"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'HEAVY []' in r.stdout and 'exit 0' in r.stdout, r.stdout + r.stderr
    for word in (whole.id, 'main valid', 'i_nce', 'usage', 'effective_rank_context', 'alerts'): assert word in r.stdout

def test_watch_of_nothing_is_one_clear_line():
    r = subprocess.run([PUZZLE, 'watch', 'nothere'], capture_output=True, text=True, cwd=root())
    assert r.returncode == 2 and 'nothere' in r.stderr and r.stderr.count('\n') == 1


def test_the_start_of_a_training_is_timed_to_a_few_steps(items):
    "Reached at the first check, not within the limit, not within the training."
    assert [jepa_vq.first_step(tiny(), items, goal, most, 1) for goal, most in ((-9., 4), (99., 3), (99., 100))] == [1, 3, 4]
