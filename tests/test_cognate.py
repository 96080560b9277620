"The language model assembled: counts, specialisations, 37 metrics, resumption, hand-off. See nbs/06_cognate."
import functools
import shutil
import sys
import types

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from puzzle_research import cognate as cg
from puzzle_research.cognate import SPECIALIZATIONS, Cognate, Config
from puzzle_research.core.data import SOURCES
from puzzle_research.core.fit import Trainer
from puzzle_research.core.quantize import count_parameters
from puzzle_research.core.runs import begin, load_state, read_jsonl
from puzzle_research.lm import training, tuning
from puzzle_research.lm.bundled_text import bundled_rows
from puzzle_research.lm.copying import copier
from puzzle_research.lm.likelihood import bits_per_byte
from puzzle_research.lm.telemetry import AT_THE_END, METRICS, behaviour, open_tracker
from puzzle_research.lm.use import HANDED
from shared import wandb_rows

TINY = dict(budget='test', compare=False, tune_steps=0, diversity_steps=0)
CLOCK = ('tokens_per_second', 'gpu_allocated_gb', 'gpu_reserved_gb', 'epoch_minutes', 'training_hours')


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path/'runs'))
    torch.set_num_threads(1)


def start(**kw):
    return begin('06_cognate', Config(**TINY | kw))


# Sizes

BUDGETS = ('test', 'quick', 'small', 'full')


@pytest.mark.parametrize('budget', BUDGETS)
def test_published_totals_at_every_budget(budget):
    assert count_parameters(cg.build(Config(recipe='seed', budget=budget))) == 26_974_561


def test_larger_vocabulary():
    assert count_parameters(cg.build(Config(recipe='seed', vocab=50_257))) == 32_571_041


@pytest.mark.parametrize('budget', BUDGETS)
def test_the_plain_transformer_is_as_large(budget):
    cfg = Config(budget=budget)
    ours, plain = cg.build(cfg), cg.plain_model(cfg)
    assert count_parameters(ours) <= 26_974_561
    assert count_parameters(plain)/count_parameters(ours) == pytest.approx(1, abs=.01)
    assert plain.cycles == 0 and plain.backbone.memory is None and plain.head.shape == ours.head.shape


def test_a_plain_transformer_that_cannot_be():
    with pytest.raises(ValueError, match='no plain transformer of 9,000 parameters'):
        cg.plain_model(Config(budget='test'), 9000)


# Specialisations and parameters

@pytest.fixture
def text():
    g = torch.Generator().manual_seed(0)
    return torch.randint(3, 384, (4, 64), generator=g), torch.tensor([[0]*30 + [1]*34]*4)


def seen_under(cfg, name, text):
    "Behaviour of one set of weights under the settings of a specialisation."
    model, s = cg.build(cfg), cg.settings(cfg, name)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.halt.weight, std=1.)
    model.halt_threshold, memory = s['halt_threshold'], model.backbone.memory
    memory.capacity, memory.surprise_threshold = s['capacity'], s['surprise_threshold']
    return {k: v.item() for k, v in behaviour(model, *text).items()}


@pytest.mark.parametrize('recipe', ['best', 'seed'])
def test_settings_of_specialisations_act(recipe, text):
    cfg = Config(recipe=recipe, budget='test', width=32, vocab=384, layers=1, heads=2)
    seen = {k: seen_under(cfg, k, text) for k in SPECIALIZATIONS}
    thresholds = {k: cg.settings(cfg, k)['halt_threshold'] for k in SPECIALIZATIONS}
    cycles = [seen[k]['halting_mean'] for k in sorted(SPECIALIZATIONS, key=thresholds.get)]
    assert cycles == sorted(cycles, reverse=True) and cycles[0] > cycles[-1]
    assert max(thresholds, key=thresholds.get) == 'speed'
    assert len({round(v['memory_usage']*1e6) for v in seen.values()}) == 3
    assert {k: cg.build(cfg, k).halt_threshold for k in SPECIALIZATIONS} == thresholds
    assert [cg.build(cg.vary(cfg, capacity=c)).backbone.memory.capacity for c in (8., 80.)] == [8., 80.]


def test_a_surprise_threshold_stores_less(text):
    tokens, one = text[0].clamp(max=6), torch.zeros_like(text[1])
    models = [cg.build(Config(budget='test', surprise_threshold=s)) for s in (0., .9, 2.)]
    rates = [behaviour(m, tokens, one)['surprise_rate'].item() for m in models]
    assert rates[0] == 1 > rates[1] > rates[2]


def test_specialisations_have_their_own_seeds():
    first = [cg.build(Config(budget='test', specialization=s)).head[0, 0].item() for s in SPECIALIZATIONS]
    assert len(set(first)) == 3
    assert cg.settings(Config(seed=5))['seed'] == SPECIALIZATIONS['reasoning']['seed'] + 5


@pytest.mark.parametrize('kw, word', [
    (dict(specialization='resoning'), "'reasoning'"), (dict(capasity=3.), "did you mean 'capacity'"),
    (dict(steps=0), "'steps' = 0"), (dict(halt_threshold=1.5), "'halt_threshold' = 1.5"),
    (dict(optimizer='sgd'), "'optimizer' = 'sgd'"), (dict(tracker='mlflow'), "'tracker' = 'mlflow'"),
    (dict(budget='tiny'), "unknown budget 'tiny'"), (dict(vocab=100), "'vocab' = 100"),
    (dict(steps='ten'), "'steps' = 'ten'")])
def test_bad_parameters_are_refused(kw, word):
    with pytest.raises(ValueError, match=word):
        Config(**kw)


def test_values_that_only_fit_together():
    with pytest.raises(ValueError, match="'capacity' = 0.5: expected at least 1"):
        cg.settings(Config(capacity=.5))
    with pytest.raises(ValueError, match="unknown set 'storys': did you mean 'stories'"):
        cg.open_text(Config(budget='test', sets='storys'))
    with pytest.raises(ValueError, match='does not divide into 3 heads'):
        cg.build(Config(budget='test', heads=3))
    with pytest.raises(ValueError, match="ablation_steps is for recipe 'best'"):
        cg.ablate(Config(budget='test', recipe='seed'), None, None, {})


# One run of everything, which many tests read

SMALL = dict(sets='riddles,snippets', tune_steps=2, compare=True, diversity_steps=2, dropout=.1)


def small_run(monkeypatch, folder, **kw):
    "A run that tunes nothing but lambda, and writes a checkpoint at every step."
    monkeypatch.setenv('PUZZLE_RUNS', str(folder))
    monkeypatch.setattr(tuning, 'GRID', {})
    monkeypatch.setattr(training, 'Trainer', functools.partial(Trainer, save_seconds=0))
    return start(**SMALL | kw)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        run, cfg = small_run(m, tmp_path_factory.mktemp('runs'))
        cg.train(cfg, run)
        run.close('ok')
    return cfg, run


def test_summary_holds_what_the_report_needs(finished):
    cfg, run = finished
    s = cg.evaluate(cfg, run)
    run.finish(s)
    cg.draw(run)
    judged = {c['metric'] for c in s['criteria']}
    assert {'ratio_to_plain_muon', 'ratio_to_plain_muon_at_equal_time', 'ratio_to_our_muon', 'speed_ratio',
            'learned_parameters'} <= judged
    beside = s['baselines']['bits_per_byte']
    plain = beside['strong: plain transformer, Muon, trained in this run']
    ours, ratio = (s['metrics'][k]['value'] for k in ('bits_per_byte', 'ratio_to_plain_muon'))
    assert ratio == pytest.approx(ours/plain, abs=1e-9)
    assert {'trivial: uniform bytes', 'strong: xz after the training text'} <= set(beside)
    assert all('trivial: chance' in s['baselines'][k] for k in s['metrics'] if k.startswith('choice_'))
    drawn = {p.stem for p in (run.dir/'figures').glob('*.png')}
    assert drawn == {'stages', 'race', 'tokens', 'lens', 'halting', 'diversity'}


def test_ablations(monkeypatch):
    monkeypatch.setattr(cg, 'ABLATIONS', dict(whole={}, without_gate=dict(gated=False)))
    monkeypatch.setattr(cg, 'OPTIMIZERS', ('adamw',))
    run, cfg = start(sets='riddles', ablation_steps=2)
    rates = dict(adamw=dict(rate=.004, embed_rate=.02), muon=dict(rate=.01, embed_rate=.04), lamb=.1)
    cg.ablate(cfg, run, cg.open_text(cfg), rates)
    legs = run.load('legs')
    assert set(legs) == {'ablation_whole', 'ablation_without_gate', 'ablation_adamw'}
    halting = [legs['ablation_whole'][k]['cycles'] for k in ('without_halting', 'with_halting')]
    assert halting[0] == cfg.cycles >= halting[1]
    assert legs['ablation_without_gate']['params'] < legs['ablation_whole']['params']


def test_hand_off_round_trip(finished):
    cfg, run = finished
    folder = run.dir/'handoff'
    assert {p.name for p in folder.iterdir()} == {*HANDED, 'README.md'}
    cognate, state = Cognate.from_pretrained(folder), load_state(run.dir/'weights'/'main.safetensors')
    assert all(torch.equal(v, state[k]) for k, v in cognate.model.state_dict().items())
    assert cognate.config == cfg.model_dump()
    assert f'{count_parameters(cognate.model):,} parameters' in (folder/'README.md').read_text()


def logits(cognate):
    prompt = torch.tensor([[1, *cognate.tokenizer.encode('Q: Ada has 3')]])
    return cognate.model.logits(cognate.model.read(prompt)[0])


@pytest.mark.parametrize('where', ['folder', 'run', 'hub'])
def test_it_goes_to_the_hub_and_comes_back_to_the_bit(finished, tmp_path, monkeypatch, where):
    "Equal logits and text, with its tokenizer and a card of the published numbers; the hub is a stand-in."
    cognate = Cognate.from_pretrained(finished[1].dir/'handoff')
    pushed = tmp_path/'pushed'
    def push(self, repo_id, folder_path, **options):
        shutil.copytree(folder_path, pushed)
        return f'https://hub/{repo_id}'
    def made(self, name, **options): return types.SimpleNamespace(repo_id=name)
    monkeypatch.setattr(huggingface_hub.HfApi, 'create_repo', made)
    monkeypatch.setattr(huggingface_hub.HfApi, 'upload_folder', push)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda name, file, **kw: str(pushed/file))
    cognate.save_pretrained(tmp_path/'saved', push_to_hub=True, repo_id='ada/cognate')
    name = dict(folder=tmp_path/'saved', run=str(finished[1].dir), hub='ada/cognate')[where]
    again = Cognate.from_pretrained(name)
    assert torch.equal(logits(again), logits(cognate)) and again.config == cognate.config
    assert again.specimen() == cognate.specimen() and again.tokenizer.id == cognate.tokenizer.id
    card = (pushed/'README.md').read_text()
    assert "Cognate.from_pretrained('ada/cognate')" in card and '## Results' in card
    assert 'ratio_to_plain' in card


def test_another_model_is_refused(tmp_path):
    for file in HANDED:
        (tmp_path/file).write_text('{"model": "JEPA"}')
    with pytest.raises(ValueError, match='is of a JEPA, not of a Cognate'):
        Cognate.from_pretrained(tmp_path)


def test_weights_of_every_epoch(finished):
    assert {p.stem for p in (finished[1].dir/'weights').glob('epoch_*')} == {'epoch_1', 'epoch_2'}


def test_generate_streams_what_reading_would_say(finished):
    folder, prompt = finished[1].dir/'handoff', 'Q: Ada has 3'
    stream = cg.generate(prompt, folder, max_new=12)
    assert isinstance(stream, types.GeneratorType)
    cognate = Cognate.from_pretrained(folder)
    ids, new = [1, *cognate.tokenizer.encode(prompt)], []
    while len(new) < 12 and new[-1:] != [2]:
        y = cognate.model.read(torch.tensor([ids + new]))[0]
        new.append(cognate.model.logits(y[0, -1]).argmax().item())
    whole = cognate.tokenizer.decode(new)
    assert ''.join(stream) in (whole, whole.rstrip('\ufffd'))


def test_generate_draws_by_seed(finished):
    cognate = Cognate.from_pretrained(finished[1].dir/'handoff')
    drawn = [''.join(cognate.generate('Q:', max_new=8, temperature=1., top_k=20, seed=s)) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_finds_the_newest_run(finished, monkeypatch):
    with pytest.raises(FileNotFoundError, match='no trained model yet'):
        next(cg.generate('Q:'))
    monkeypatch.setenv('PUZZLE_RUNS', str(finished[1].dir.parent.parent))
    assert cg.newest_hand_off() == finished[1].dir/'handoff'


def test_a_hand_off_that_lacks_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='has no model.safetensors, tokenizer.json, config.json'):
        Cognate.from_pretrained(tmp_path)


# Resumption

class Killed(Exception):
    pass


LAST_TUNED = 'tune_mugrokfast_0.01_0.04_0.9_0.1'


@pytest.mark.parametrize('stage, at', [('main', 4), (LAST_TUNED, 2), ('diversity_memory', 1)])
def test_killed_and_resumed_equals_never_killed(finished, monkeypatch, tmp_path, stage, at):
    step, whole = Trainer.one_step, finished[1]

    def dies(self):
        if self.name == stage and self.step == at - 1:
            raise Killed
        step(self)
    run, cfg = small_run(monkeypatch, tmp_path)
    monkeypatch.setattr(Trainer, 'one_step', dies)
    with pytest.raises(Killed):
        cg.train(cfg, run)
    run.close('interrupted')
    monkeypatch.setattr(Trainer, 'one_step', step)
    run, cfg = small_run(monkeypatch, tmp_path, run=run.id)
    cg.train(cfg, run)
    for k in ('main', *cg.RIVALS, 'epoch_1', 'epoch_2'):
        a, b = (load_state(r.dir/'weights'/f'{k}.safetensors') for r in (whole, run))
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert (whole.dir/'metrics.jsonl').read_bytes() == (run.dir/'metrics.jsonl').read_bytes()
    rows = [[{k: v for k, v in row.items() if k not in CLOCK} for row in read_jsonl(r.dir/'telemetry.jsonl')]
            for r in (whole, run)]
    assert rows[0] == rows[1]


# Telemetry

@pytest.fixture
def seven_kinds(lake):
    "Small sets of all seven kinds in the hub's columns, and no other data; their names."
    def put(name, split, rows):
        (lake/name).mkdir(exist_ok=True)
        rows = [{c: '' for c in SOURCES[name].columns} | r for r in rows]
        pq.write_table(pa.Table.from_pylist(rows), lake/name/f'{split}.parquet')
    kinds = ('problems', 'riddles', 'stories', 'snippets')
    problems, riddles, stories, snippets = (bundled_rows(k, 'train', 60) for k in kinds)
    yes_no = [dict(question=r['question'][:60], answer=bool(i % 3)) for i, r in enumerate(problems)]
    passages = [dict(question=r['text'][:40], passage=r['text'][:80], answer=bool(i % 2))
                for i, r in enumerate(stories)]
    endings = [dict(ctx=r['text'][:50], endings=[r['text'][50:90], 'no', 'why', 'a b'], label='0')
               for r in stories[:10]]
    for split, own in (('train', slice(0, 40)), ('validation', slice(40, 50)), ('test', slice(50, 60))):
        put('arc-easy', split, riddles[own])
        put('mbpp', split, snippets[own])
        put('wikitext-2-v1', split, [dict(text=r['text'] + '\n') for r in stories[own]])
        if split != 'validation':
            put('gsm8k', split, problems[own])
        if split != 'test':
            put('strategyqa', split, yes_no[own])
            put('boolq', split, passages[own])
    put('hellaswag', 'validation', endings)
    return 'gsm8k,arc_easy,mbpp,wikitext2,strategyqa,boolq,hellaswag'


def test_all_37_metrics_are_live_and_go_to_wandb_too(seven_kinds):
    pytest.importorskip('wandb')
    run, cfg = start(data='real', sets=seven_kinds, tracker='wandb', specialization='memory', steps=45,
                     epochs=5, log_every=5, eval_rows=8)
    cg.train(cfg, run)
    rows = read_jsonl(run.dir/'telemetry.jsonl')
    seen = {name: [r[name] for r in rows if name in r] for name in METRICS}
    assert len(METRICS) == 37 and set().union(*rows) == set(METRICS)
    assert all(v and np.isfinite(v).all() for v in seen.values())
    assert all(len(seen[name]) == 1 and seen[name][0] > 0 for name in AT_THE_END)
    still = {*AT_THE_END, 'gpu_reserved_gb'}        # the peak of a process in which larger tests ran
    assert [name for name, v in seen.items() if name not in still and len(set(v)) < 2] == []
    assert seen['loss'][-1] < seen['loss'][0] and seen['epoch'][-1] == 5
    assert set(seen['curriculum_stage']) == {1, 2, 3}
    sent = wandb_rows(run.dir)
    assert len(sent) == len(rows) and set().union(*sent) >= set(seen) and sent[0]['loss'] == rows[0]['loss']


def test_wandb_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    run, cfg = start(tracker='wandb')
    with pytest.raises(ImportError, match='pip install wandb'):
        open_tracker(cfg, run)


def test_published_loss_is_copying():
    cfg = Config(budget='test')
    corpus = cg.open_text(cfg)
    model, losses = copier(corpus, cfg.vocab, 1, 100)
    assert losses[-1] < .5 < losses[0]
    packed = next(iter(corpus.test.values()))
    asked = bits_per_byte(model, packed, corpus.tokenizer, rows=4)['nats_per_token']
    assert asked > .8*np.log(cfg.vocab)
