"The JEPA experiment as its users run it: every knob, resume, two processes, the monitor, what a run leaves."
import json
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState

from puzzle_research.arc import tasks as arc
from puzzle_research.arc.objects import of_batch
from puzzle_research.core.config import seed_everything
from puzzle_research.core.diagnose import effective_rank
from puzzle_research.core.fit import Evaluate
from puzzle_research.core.quantize import VectorQuantizer, count_parameters
from puzzle_research.core.runs import begin, save_state
from puzzle_research.jepa.comparison import VARIANTS
from puzzle_research.jepa.items import as_batch, batches, join, random_views
from puzzle_research.jepa.losses import info_nce
from puzzle_research.jepa.race import first_step
from puzzle_research.jepa.retrieval import retrieval, seen_target, with_views
from puzzle_research.jepa.training import said_by_monitor, stages, trainer
from puzzle_research.jepa.whitening import unwhitened
from puzzle_research.jepa_vq import Config, build, compare, open_items
from shared import (CHOSEN, assert_one_clear_line, heavy_imports, only_run, puzzle, start_child,
                    trained_together, wait_until)

RECIPES = pytest.mark.parametrize('recipe', ['seed', 'best'])


def tiny(**knobs):
    return Config(**dict(budget='test', data='bundled', precision='no', device='cpu') | knobs)


def small_model(**knobs):
    torch.manual_seed(0)
    return build(tiny(**knobs))


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope='module')
def items():
    return open_items(tiny())


@pytest.fixture
def batch(items):
    rows = items.train.index[::len(items.train)//16][:16]
    return as_batch(items.train.objects, rows, *random_views(16, torch.Generator().manual_seed(0)))


def update_codes(model):
    for q in model.modules():
        if isinstance(q, VectorQuantizer):
            q.update()


# the model

def test_parameter_counts():
    published = build(Config(recipe='seed', budget='full'))
    assert count_parameters(published) == 4_167_937
    assert sum(p.numel() for p in published.slow.parameters()) > 0 # the slow copy is not counted
    for budget in ('quick', 'small', 'full'):
        assert count_parameters(build(Config(budget=budget))) <= 4_167_937


def test_chance_is_the_logarithm_of_the_candidates():
    same = F.normalize(torch.ones(50, 16), dim=1)
    assert abs(info_nce(same, same, .1, same)[0].item() - np.log(100)) < 1e-5
    equal = retrieval(same, same, torch.arange(50), .1)
    assert abs(equal['i_nce']) < 1e-5 and equal['top1'] == 0 and equal['mrr'] < .05
    g = torch.Generator().manual_seed(0)
    p, candidates = (F.normalize(torch.randn(n, 64, generator=g), dim=1) for n in (3000, 500))
    guess = retrieval(p, candidates, torch.randint(0, 500, (3000,), generator=g), .07)
    assert guess['i_nce'] < 0 and abs(guess['top1'] - 1/500) < .005 and abs(guess['top5'] - 5/500) < .01


def test_the_slow_target_gets_no_gradient_and_follows(batch):
    model = small_model(recipe='seed')
    model(batch)[0].backward()
    assert all(p.grad is None for p in model.slow.parameters())
    assert model.encoder.tokens[0].weight.grad.abs().sum() > 0
    before = [p.clone() for p in model.slow.parameters()]
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(1.)
    model.after_step()
    live = [*model.encoder.parameters(), *model.head.parameters()]
    for old, new, goal in zip(before, model.slow.parameters(), live):
        assert torch.allclose(new, old + .01*(goal - old), atol=1e-6)
    assert torch.equal(model.slow['encoder'].vq.codes, model.encoder.vq.codes)


def test_the_queue_keeps_the_last_targets(batch):
    model = small_model(recipe='seed', queue=20)
    for _ in range(3):
        model(batch)
        last = model.fresh[-1]
        model.after_step()
    kept = {tuple(row) for row in model.queue.tolist()}
    assert int(model.queued) == 48 and model.fresh == [] and kept >= {tuple(row) for row in last.tolist()}


@RECIPES
def test_empty_slots_and_absent_grids_change_nothing(batch, recipe):
    model = small_model(recipe=recipe, target='shared', queue=0).eval()
    noisy, empty = {k: v.clone() for k, v in batch.items()}, ~of_batch(batch).mask
    for name, value in dict(colour=3, perimeter=3, shape=True, box=2).items():
        noisy[name][empty] = value
    p, t, codes = model.unit_sides(batch)
    p2, t2, _ = model.unit_sides(noisy)
    assert torch.allclose(p, p2, atol=1e-4) and torch.allclose(t, t2, atol=1e-4)
    assert len(codes) == of_batch(batch).mask.sum()


@RECIPES
def test_eval_freezes_every_buffer(batch, recipe):
    model = small_model(recipe=recipe)
    model(batch)
    update_codes(model)
    model.after_step()
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(2):
        model(batch)
        model.unit_sides(batch)
    update_codes(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_codebook_learns_once_a_step_and_only_from_the_batch(batch):
    "The passes that measure invariance teach nothing."
    model = small_model(recipe='seed', invariance_share=1.)
    model(batch)
    q = model.encoder.vq
    assert q.unapplied == 1 and q.pending[:, -1].sum() == of_batch(batch).mask.sum()


# every knob

def knobs_of(**values): # name -> values to try
    return [{name: value} for name, some in values.items() for value in some]


FOR_BOTH = knobs_of(
    quantizer=('none', 'ema', 'fsq', 'simvq', 'lfq', 'rotation'),
    pooling=('mean', 'last', 'attention', 'gru', 'transformer'),
    target=('ema', 'shared'),
    regularizer=('none', 'vicreg', 'sigreg', 'visreg'),
    relational_weight=(.5,), invariance=(1.,), queue=(30,), context=(5,), kmeans_init=(False,),
    precision=('bf16',), refresh_interval=(9000,),
)


@pytest.mark.parametrize('knobs', FOR_BOTH, ids=str)
@RECIPES
def test_every_knob_trains(items, recipe, knobs):
    cfg = tiny(recipe=recipe, width=32, batch_size=8, **knobs)
    data = open_items(cfg) if 'context' in knobs else items
    torch.manual_seed(0)
    t = trainer(cfg, data, watch=False)
    t.callbacks = [c for c in t.callbacks if not isinstance(c, Evaluate)]
    learned = {name: p for name, p in t.module.named_parameters() if p.requires_grad}
    before = {name: p.clone() for name, p in learned.items()}
    t.fit(1)
    moved = {name.split('.')[0] for name, p in learned.items() if not torch.equal(p, before[name])}
    assert {'encoder', 'head', 'log_temperature'} <= moved and np.isfinite(t.last_loss.item())
    if knobs.get('pooling') in ('attention', 'gru', 'transformer'):
        assert 'pool' in moved


def loss_of(batch, **knobs):
    model = small_model(**knobs).eval()
    torch.manual_seed(1)
    return model(batch)[0].item()


@pytest.mark.parametrize('recipe, knobs', [
    ('seed', dict(commitment=5., kmeans_init=False)),
    ('seed', dict(relational_weight=3.)),
    ('seed', dict(invariance=20.)),
    ('seed', dict(regularizer_weight=3.)),
    ('seed', dict(invariance_share=1.)),
    ('best', dict(regularizer_weight=4.)),
    ('best', dict(temperature_min=.15)),
    ('best', dict(temperature_max=.03)),
], ids=str)
def test_weights_reach_the_loss(batch, recipe, knobs):
    plain = dict(quantizer='ema', kmeans_init=False) if 'commitment' in knobs else dict(quantizer='none')
    change = loss_of(batch, recipe=recipe, **plain | knobs) - loss_of(batch, recipe=recipe, **plain)
    assert abs(change) > 1e-5


@RECIPES
def test_whitening_raises_the_rank_while_it_trains(batch, recipe):
    assert small_model(recipe=recipe, whitening=0.).whitener is None
    model = small_model(recipe=recipe, whitening=1.).train()
    for _ in range(4):
        model(batch)
    model.eval()
    maps = {k: v.clone() for k, v in model.whitener.state_dict().items()}
    after, before = model.unit_sides(batch)[1], unwhitened(model).unit_sides(batch)[1]
    assert effective_rank(after) > effective_rank(before)
    assert torch.allclose(after.norm(dim=1), torch.ones(len(after)), atol=1e-5)
    for name, value in model.whitener.state_dict().items(): # nothing follows in eval mode
        assert torch.equal(value, maps[name])


@pytest.mark.parametrize('bad, word', [
    (dict(quantizer='fsk'), 'quantizer'),
    (dict(pooling='max'), 'pooling'),
    (dict(comitment=.1), "did you mean 'commitment'"),
    (dict(context=1), 'context'),
], ids=str)
def test_unknown_values_are_refused(bad, word):
    with pytest.raises(ValueError, match=word):
        tiny(**bad)


def test_equal_grids_are_one_candidate():
    s = arc.demonstrations(arc.test_tasks()[:20])
    seen, answer, candidates = with_views(s, join([s], 16), 300)
    assert candidates == 300 == len(set(answer.tolist())) and len(answer) == len(seen)
    grids = {}
    for i, own in enumerate(answer.tolist()):
        grid = seen_target(s, seen, i)
        key = grid.shape, grid.tobytes()
        assert grids.setdefault(own, key) == key
    assert len(set(grids.values())) == candidates and (seen.view[:len(s)] == 0).all()


# the monitor

GOOD = dict(loss=1., usage=.9, effective_rank_context=50., effective_rank_target=50.)


def said(cfg, rows):
    return said_by_monitor(cfg, [GOOD | row for row in rows])


@pytest.mark.parametrize('rows, first', [
    ([{}]*3, None),
    ([dict(usage=.05)], 'usage = 0.05 below 0.08'),
    ([dict(effective_rank_context=2.5)], 'effective_rank_context = 2.5 below 3'),
    ([dict(effective_rank_target=4.5)], 'effective_rank_target = 4.5 below 5'),
    ([dict(loss=v) for v in (1., 1.1, 1.2, 1.3)], 'loss = 1.3 rises 0 for 3 evaluations'),
    ([dict(loss=v) for v in (1., 1.1, 1.2, 1.15)], None),
], ids=str)
def test_alerts(rows, first):
    heard = said(tiny(abort_plateau=0), rows)
    assert first in heard[0] if first else heard == []


@pytest.mark.parametrize('rows, word', [
    ([dict(effective_rank_context=1.9)], 'context = 1.9 below 2'),
    ([dict(effective_rank_target=3.9)], 'target = 3.9 below 4'),
    ([{}, dict(loss=3.2)], 'jumps 2'),
    ([{}]*25, 'stalls'),
    ([dict(usage=.01)]*17, 'usage = 0.01 below'),
], ids=['context', 'target', 'jump', 'plateau', 'usage'])
def test_abort_criteria(rows, word):
    last = said(tiny(), rows)[-1]
    assert last.startswith('abort') and word in last


def test_usage_may_be_low_until_epoch_fifteen():
    assert len(said(tiny(abort_plateau=0), [dict(usage=.01)]*15)) == 15


# what a run trains

def test_the_comparison_is_kept(tmp_path, items):
    run, cfg = SimpleNamespace(dir=tmp_path), tiny(compare_seeds=1, compare_steps=1)
    done = compare(cfg, run, items)
    stamp = (tmp_path/'comparison.json').stat().st_mtime_ns
    assert list(done) == list(VARIANTS) and all('i_nce' in row for [row] in done.values())
    assert 'codes_used' not in done['no codebook'][0] and 'codes_used' in done['gentle'][0]
    assert compare(cfg, run, items) == done and (tmp_path/'comparison.json').stat().st_mtime_ns == stamp


def test_stages_share_the_data():
    cfg = tiny(context=5, objects=8, seed=3)
    assert list(stages(cfg)) == ['model', 'twin', 'published']
    published = stages(cfg)['published']
    assert (published.recipe, published.context, published.objects, published.seed) == ('seed', 5, 8, 3)


def test_the_start_of_a_training_is_timed_to_a_few_steps(items):
    "Reached at the first check, not within the limit, not within the training."
    asked = (-9., 4), (99., 3), (99., 100)
    assert [first_step(tiny(), items, goal, most, every=1) for goal, most in asked] == [1, 3, 4]


def two_trainings(state):
    "Six steps of both recipes in each of two processes."
    process, items = PartialState(cpu=True), open_items(tiny())
    for recipe in ('seed', 'best'):
        cfg = tiny(recipe=recipe, batch_size=16, refresh_interval=0, regularizer='none')
        seed_everything(0)
        t = trainer(cfg, items, watch=False)
        t.callbacks = [c for c in t.callbacks if not isinstance(c, Evaluate)]
        t.batches = batches(items.train, cfg, rank=process.process_index, world=process.num_processes)
        q = t.module.encoder.vq
        start = q.codes.clone()
        t.fit(6)
        assert not torch.equal(q.codes, start)
        kept = dict(codes=q.codes, size=q.cluster_size, rows=torch.tensor(t.batches.rows(3)))
        torch.save(kept, f'{state}.{recipe}.{process.process_index}')
    process.wait_for_everyone()
    process.destroy_process_group() # threads of gloo that outlive the interpreter abort it now and then


def test_two_processes_have_bit_equal_codebooks(tmp_path):
    trained_together(two_trainings, str(tmp_path/'state'))
    for recipe in ('seed', 'best'):
        a, b = (torch.load(tmp_path/f'state.{recipe}.{i}') for i in (0, 1))
        assert torch.equal(a['codes'], b['codes']) and torch.equal(a['size'], b['size'])
        assert not set(a['rows'].tolist()) & set(b['rows'].tolist())


def stage(recipe, run='', seconds=0.): # waits so long before each step
    "The first stage of a run: six steps, checkpoints four times a second."
    never = dict(abort_rank_context=0., abort_rank_target=0.) # a warm-up has no rank to speak of
    run, cfg = begin('04_jepa_vq', tiny(recipe=recipe, epochs=2, epoch_steps=3, run=run, **never))
    items = open_items(cfg, run)
    seed_everything(cfg.seed)
    t = trainer(cfg, items, run)
    t.save_seconds, loss = .25, t.loss
    def waiting(*args):
        time.sleep(seconds)
        return loss(*args)
    t.loss = waiting
    save_state(run.dir/'final.safetensors', t.fit(6).module.state_dict())
    run.finish(dict(title='A', claim='B', metrics={}))
    return run


@pytest.mark.parametrize('recipe', [pytest.param('seed', marks=pytest.mark.slow), 'best'])
def test_killed_and_resumed_equals_never_killed(tmp_path, monkeypatch, recipe):
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path/'whole'))
    whole = stage(recipe)
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path/'killed'))
    child = start_child(stage, recipe, '', .3, PUZZLE_RUNS=str(tmp_path/'killed'))
    wait_until(lambda: list(tmp_path.glob('killed/*/*/checkpoints/main.*')), child)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    run = only_run(tmp_path/'killed')
    assert run.status == 'died' and len(run.metrics) < len(whole.metrics)
    run = stage(recipe, run=run.id)
    for name in ('metrics.jsonl', 'final.safetensors'):
        assert (run.dir/name).read_bytes() == (whole.dir/name).read_bytes(), name


# what a run leaves

@pytest.fixture(scope='module')
def whole(finished_run):
    return finished_run('04_jepa_vq', **CHOSEN['04_jepa_vq'])


def test_a_run_holds_what_it_should(whole):
    names = {p.name for p in whole.dir.iterdir()}
    assert names >= {'report.md', 'summary.json', 'codes.json', 'comparison.json', 'collapse.json'}
    drawn = {p.stem for p in (whole.dir/'figures').glob('*.png')}
    assert drawn == {'training', 'spectrum', 'gradients', 'vocabulary', 'code_use', 'histogram', 'neighbours',
                     'answers', 'comparison', 'collapse'}
    s = whole.summary
    assert {c['bar'] for c in s['criteria']} == {'must', 'aim', 'moonshot'}
    assert s['limits']['i_nce']['ln K'] == pytest.approx(np.log(s['metrics']['candidates']['value']))


@pytest.mark.slow
def test_a_run_with_another_quantizer(finished_run):
    run = finished_run('04_jepa_vq', quantizer='fsq', commitment=.15)
    assert run.status == 'ok' and run.config['quantizer'] == 'fsq'


def test_words_are_json_that_a_program_search_can_read(whole):
    told = json.loads((whole.dir/'codes.json').read_text())['tasks']
    for task in arc.test_tasks()[:5]:
        for said_, pair in zip(told[task.id], task.pairs, strict=True):
            for side, grid in zip((said_['input'], said_['output']), pair):
                assert tuple(side['size']) == grid.shape and bool(side['words']) == bool((grid > 0).any())
                for code, colour, row, column in side['words']:
                    assert 0 <= code < 768 and grid[row:, column:].size and colour in grid


def test_watch_needs_no_torch_and_takes_a_folder(whole):
    code = f"import sys; sys.argv = ['puzzle', 'watch', {str(whole.dir)!r}, '--once']\n"
    code += "from puzzle_research.cli import main\ntry: main()\nexcept SystemExit as e: print('exit', e.code)"
    heavy, shown = heavy_imports(code, ('torch', 'numpy', 'pandas'))
    assert heavy == [] and 'exit 0' in shown
    for word in (whole.id, 'main valid', 'i_nce', 'usage', 'effective_rank_context', 'alerts'):
        assert word in shown


def test_watch_of_nothing_is_one_clear_line():
    assert_one_clear_line(puzzle('watch', 'nothere'), 'nothere', codes=(2,))
