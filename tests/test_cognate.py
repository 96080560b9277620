"The language model assembled: counts, specialisations, 37 metrics, trackers, resumption, hand-off. The lessons are in nbs/06_cognate.ipynb."
import functools, json, os, sys, types

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest, torch

from puzzle_research import cognate as cg
from puzzle_research.cognate import METRICS, SPECIALIZATIONS, Cognate, Config
from puzzle_research.core.data import SOURCES
from puzzle_research.core.fit import Trainer
from puzzle_research.core.quantize import count_parameters
from puzzle_research.core.runs import begin, load_state, read_jsonl
from puzzle_research.lm.corpus import bundled_rows

TINY = dict(budget='test', compare=False, tune_steps=0, diversity_steps=0)
CLOCK = ('tokens_per_second', 'gpu_allocated_gb', 'gpu_reserved_gb', 'epoch_minutes', 'training_hours')


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch): monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path/'runs')); torch.set_num_threads(1)

def start(**kw): return begin('06_cognate', Config(**TINY | kw))[::-1]

def trained(**kw):
    cfg, run = start(**kw); cg.train(cfg, run); run.close('ok')
    return cfg, run


@pytest.mark.parametrize('budget', ['test', 'quick', 'small', 'full'])
def test_published_totals_at_every_budget(budget):
    assert count_parameters(cg.build(Config(recipe='seed', budget=budget))) == 26_974_561

def test_larger_vocabulary(): assert count_parameters(cg.build(Config(recipe='seed', vocab=50_257))) == 32_571_041

@pytest.mark.parametrize('budget', ['test', 'quick', 'small', 'full'])
def test_the_plain_transformer_is_as_large(budget):
    cfg = Config(budget=budget); ours = count_parameters(cg.build(cfg)); plain = cg.plain_model(cfg, ours)
    assert ours <= 26_974_561 and abs(count_parameters(plain)/ours - 1) < .01
    assert plain.cycles == 0 and plain.backbone.memory is None and plain.head.shape == cg.build(cfg).head.shape

def test_a_plain_transformer_that_cannot_be():
    with pytest.raises(ValueError, match='no plain transformer of 9,000 parameters'): cg.plain_model(Config(budget='test'), 9000)


@pytest.fixture
def text():
    g = torch.Generator().manual_seed(0)
    return torch.randint(3, 384, (4, 64), generator=g), torch.tensor([[0]*30 + [1]*34]*4)

def seeing(cfg, name, text): # behaviour of one set of weights under a specialisation's settings
    model = cg.build(cfg); s = cg.settings(cfg, name); torch.nn.init.normal_(model.halt.weight, std=1.); torch.manual_seed(0); torch.nn.init.normal_(model.halt.weight, std=1.)
    model.halt_threshold, m = s['halt_threshold'], model.backbone.memory; m.capacity, m.surprise_threshold = s['capacity'], s['surprise_threshold']
    return {k: v.item() for k, v in cg.behaviour(model, *text).items()}

@pytest.mark.parametrize('recipe', ['best', 'seed'])
def test_settings_of_specialisations_act(recipe, text):
    cfg = Config(recipe=recipe, budget='test', width=32, vocab=384, layers=1, heads=2)
    seen = {k: seeing(cfg, k, text) for k in SPECIALIZATIONS}
    thresholds = {k: cg.settings(cfg, k)['halt_threshold'] for k in SPECIALIZATIONS}; order = sorted(SPECIALIZATIONS, key=thresholds.get)
    assert [seen[k]['halting_mean'] for k in order] == sorted((v['halting_mean'] for v in seen.values()), reverse=True)
    assert seen[order[0]]['halting_mean'] > seen[order[-1]]['halting_mean'] and order[-1] == 'speed'
    assert len({round(v['memory_usage']*1e6) for v in seen.values()}) == 3
    for name in SPECIALIZATIONS: assert cg.build(cfg, name).halt_threshold == thresholds[name]
    for c in (8., 80.): assert cg.build(cg.vary(cfg, capacity=c)).backbone.memory.capacity == c

def test_a_surprise_threshold_stores_less(text):
    rates = [cg.behaviour(cg.build(Config(budget='test', surprise_threshold=s)), text[0].clamp(max=6), torch.zeros_like(text[1]))['surprise_rate'].item() for s in (0., .9, 2.)]
    assert rates[0] == 1 > rates[1] > rates[2]

def test_specialisations_have_their_own_seeds():
    first = [cg.build(Config(budget='test', specialization=s)).head[0, 0].item() for s in SPECIALIZATIONS]
    assert len(set(first)) == 3 and cg.settings(Config(seed=5))['seed'] == SPECIALIZATIONS['reasoning']['seed'] + 5


@pytest.mark.parametrize('kw, word', [(dict(specialization='resoning'), "'reasoning'"), (dict(capasity=3.), "did you mean 'capacity'"), (dict(steps=0), "'steps' = 0"), (dict(halt_threshold=1.5), "'halt_threshold' = 1.5"),
                                      (dict(optimizer='sgd'), "'optimizer' = 'sgd'"), (dict(tracker='mlflow'), "'tracker' = 'mlflow'"), (dict(budget='tiny'), "unknown budget 'tiny'"), (dict(vocab=100), "'vocab' = 100"), (dict(steps='ten'), "'steps' = 'ten'")])
def test_bad_parameters_are_refused(kw, word):
    with pytest.raises(ValueError, match=word): Config(**kw)

def test_values_that_only_fit_together():
    with pytest.raises(ValueError, match="'capacity' = 0.5: expected at least 1"): cg.settings(Config(capacity=.5))
    with pytest.raises(ValueError, match="unknown set 'storys': did you mean 'stories'"): cg.open_text(Config(budget='test', sets='storys'))
    with pytest.raises(ValueError, match='does not divide into 3 heads'): cg.build(Config(budget='test', heads=3))
    cfg, run = start(recipe='seed', ablation_steps=2)
    with pytest.raises(ValueError, match="ablation_steps is for recipe 'best'"): cg.ablate(cfg, run, {}, None, {})


@pytest.fixture
def lake(tmp_path, monkeypatch):
    "Small sets of all seven kinds in the hub's columns, and no other data."
    monkeypatch.setenv('PUZZLE_DATA', str(tmp_path/'data')); monkeypatch.setenv('PUZZLE_CACHE', str(tmp_path/'cache')); monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    def put(name, split, rows):
        (tmp_path/'data'/name).mkdir(parents=True, exist_ok=True); rows = [{c: '' for c in SOURCES[name].columns} | r for r in rows]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path/'data'/name/f'{split}.parquet')
    problems, riddles, stories, snippets = (bundled_rows(k, 'train', 60) for k in ('problems', 'riddles', 'stories', 'snippets'))
    for split, a, b in (('train', 0, 40), ('validation', 40, 50), ('test', 50, 60)):
        if split != 'validation': put('gsm8k', split, problems[a:b])
        put('arc-easy', split, riddles[a:b]); put('mbpp', split, snippets[a:b]); put('wikitext-2-v1', split, [dict(text=r['text'] + '\n') for r in stories[a:b]])
        if split != 'test':
            put('strategyqa', split, [dict(question=r['question'][:60], answer=bool(i % 3)) for i, r in enumerate(problems[a:b])])
            put('boolq', split, [dict(question=r['text'][:40], passage=r['text'][:80], answer=bool(i % 2)) for i, r in enumerate(stories[a:b])])
    put('hellaswag', 'validation', [dict(ctx=r['text'][:50], endings=[r['text'][50:90], 'no', 'why', 'a b'], label='0') for r in stories[:10]])
    return 'gsm8k,arc_easy,mbpp,wikitext2,strategyqa,boolq,hellaswag'


def history(folder): # rows that the offline file of wandb holds: a LevelDB log of protocol buffers behind a head of 7 bytes
    from wandb.proto import wandb_internal_pb2
    file, = folder.glob('wandb/offline-run-*/*.wandb'); data, at, whole, rows = file.read_bytes(), 7, b'', []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7: at += 32768 - at % 32768; continue
        size, kind = int.from_bytes(data[at + 4:at + 6], 'little'), data[at + 6]
        whole, at = whole + data[at + 7:at + 7 + size], at + 7 + size
        if kind not in (1, 4): continue         # whole, or last part
        record, whole = wandb_internal_pb2.Record.FromString(whole), b''
        if record.HasField('history'): rows.append({i.key or '.'.join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return rows


def test_all_37_metrics_are_live_and_go_to_wandb_too(lake):
    pytest.importorskip('wandb')
    cfg, run = trained(data='real', sets=lake, tracker='wandb', specialization='memory', steps=60, epochs=4, log_every=3, eval_rows=16)
    rows = read_jsonl(run.dir/'telemetry.jsonl'); seen = {n: [r[n] for r in rows if n in r] for n, _, _ in METRICS}
    assert len(METRICS) == 37 == len(seen) and set().union(*rows) == set(seen)
    final = {n for n, _, when in METRICS if when == cg.FINAL}
    assert [n for n, v in seen.items() if not v] == [] and [n for n in final if len(seen[n]) != 1 or not seen[n][0] > 0] == []
    still = final | ({'gpu_reserved_gb'} if not torch.cuda.is_available() else set())     # the peak of a process in which larger tests ran
    assert [n for n, v in seen.items() if n not in still and len(set(v)) < 2] == [] and min(seen['gpu_reserved_gb']) > 0
    assert all(np.isfinite(v).all() for v in seen.values())
    assert seen['loss'][-1] < seen['loss'][0] and seen['epoch'][-1] == 4 and {1, 2, 3} == set(seen['curriculum_stage'])
    sent = history(run.dir)
    assert len(sent) == len(rows) and set().union(*sent) >= set(seen) and sent[0]['loss'] == rows[0]['loss']

def test_wandb_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None); cfg, run = start(tracker='wandb')
    with pytest.raises(ImportError, match='pip install wandb'): cg.open_tracker(cfg, run)


class Killed(Exception): pass

@pytest.mark.parametrize('stage, at', [('main', 4), ('tune_adamw_0.004_0.02', 2), ('diversity_memory', 1)])
def test_killed_and_resumed_equals_never_killed(monkeypatch, stage, at):
    monkeypatch.setattr(cg, 'Trainer', functools.partial(Trainer, save_seconds=0)); step, more = Trainer.one_step, dict(tune_steps=2, compare=True, diversity_steps=2, epochs=2, dropout=.1)
    if stage.startswith('tune'): monkeypatch.setattr(cg, 'RATES', dict(adamw=dict(rate=(2e-3,)), muon=dict(rate=(1e-2,))))
    cfg, whole = trained(**more)
    def dies(self):
        if self.name == stage and self.step == at - 1: raise Killed
        step(self)
    monkeypatch.setattr(Trainer, 'one_step', dies); cfg, run = start(**more)
    with pytest.raises(Killed): cg.train(cfg, run)
    run.close('interrupted'); monkeypatch.setattr(Trainer, 'one_step', step)
    run, cfg = begin('06_cognate', Config(**TINY | more | dict(run=run.id))); cg.train(cfg, run)
    for k in ('main', 'plain_adamw', 'our_muon', 'epoch_1', 'epoch_2'):
        a, b = (load_state(r.dir/'weights'/f'{k}.safetensors') for r in (whole, run)); assert all(torch.equal(a[n], b[n]) for n in a)
    assert (whole.dir/'metrics.jsonl').read_bytes() == (run.dir/'metrics.jsonl').read_bytes()
    rows = [[{k: v for k, v in r.items() if k not in CLOCK} for r in read_jsonl(x.dir/'telemetry.jsonl')] for x in (whole, run)]
    assert rows[0] == rows[1]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    before = os.environ.get('PUZZLE_RUNS'); os.environ['PUZZLE_RUNS'] = str(tmp_path_factory.mktemp('runs')); found = trained()
    if before is None: os.environ.pop('PUZZLE_RUNS')
    else: os.environ['PUZZLE_RUNS'] = before
    return found

def test_hand_off_round_trip(finished):
    cfg, run = finished; folder = run.dir/'handoff'
    assert {p.name for p in folder.iterdir()} == {'model.safetensors', 'tokenizer.json', 'config.json', 'README.md'}
    c, state = Cognate.from_pretrained(folder), load_state(run.dir/'weights'/'main.safetensors')
    assert all(torch.equal(v, state[k]) for k, v in c.model.state_dict().items()) and c.config == cfg.model_dump()
    assert f'{count_parameters(c.model):,} parameters' in (folder/'README.md').read_text()
    t = torch.tensor([[1, 5, 9, 12]]); again = Cognate.from_pretrained(folder)
    assert torch.equal(c.model.read(t)[0], again.model.read(t)[0])

def test_weights_of_every_epoch(finished): assert {p.stem for p in (finished[1].dir/'weights').glob('epoch_*')} == {'epoch_1', 'epoch_2'}

def test_generate_streams_what_reading_would_say(finished):
    cfg, run = finished; stream = cg.generate('Q: Ada has 3', run.dir/'handoff', max_new=12)
    assert isinstance(stream, types.GeneratorType); pieces = list(stream)
    c = Cognate.from_pretrained(run.dir/'handoff'); ids = [1, *c.tokenizer.encode('Q: Ada has 3')]; new = []
    for _ in range(12):
        new.append(c.model.logits(c.model.read(torch.tensor([ids + new]))[0][0, -1]).argmax().item())
        if new[-1] == 2: break
    assert ''.join(pieces) == c.tokenizer.decode(new).rstrip('\ufffd') or ''.join(pieces) == c.tokenizer.decode(new)
    warm = [''.join(c.generate('Q:', max_new=8, temperature=1., top_k=20, seed=s)) for s in (0, 0, 1)]; assert warm[0] == warm[1]

def test_generate_finds_the_newest_run(finished, monkeypatch):
    with pytest.raises(FileNotFoundError, match='no trained model yet'): next(cg.generate('Q:'))
    monkeypatch.setenv('PUZZLE_RUNS', str(finished[1].dir.parent.parent)); assert cg.newest_hand_off() == finished[1].dir/'handoff'

def test_a_hand_off_that_lacks_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='has no model.safetensors, tokenizer.json, config.json'): Cognate.from_pretrained(tmp_path)


def test_summary_holds_what_the_report_needs(monkeypatch):
    cfg, run = trained(compare=True, diversity_steps=2); s = cg.evaluate(cfg, run); run.finish(s); cg.draw(run)
    names = {c['metric'] for c in s['criteria']}
    assert {'ratio_to_plain_adamw', 'ratio_to_our_muon', 'speed_ratio', 'learned_parameters'} <= names
    assert abs(s['metrics']['ratio_to_plain_adamw']['value'] - s['metrics']['bits_per_byte']['value']/s['baselines']['bits_per_byte']['strong: plain transformer, AdamW, trained in this run']) < 1e-9
    assert {'trivial: uniform bytes', 'strong: xz after the training text'} <= set(s['baselines']['bits_per_byte'])
    assert all('trivial: chance' in s['baselines'][k] for k in s['metrics'] if k.startswith('choice_'))
    assert {p.stem for p in (run.dir/'figures').glob('*.png')} == {'stages', 'race', 'tokens', 'lens', 'halting', 'diversity'}

def test_published_loss_is_copying():
    cfg = Config(budget='test', layers=2); corpus = cg.open_text(cfg); model, losses = cg.copier(cfg, corpus, 150)
    packed = next(iter(corpus.test.values())); assert losses[-1] < .4 < losses[0]
    assert cg.bits_per_byte(model, packed, corpus.tokenizer, rows=4)['nats_per_token'] > .8*np.log(cfg.vocab)

def test_intervals_cover_and_differences_of_equals_are_zero():
    rng = np.random.default_rng(0); rows = dict(bits=rng.normal(20, 2, 200), bytes=np.full(200, 10.), cycles=rng.random(200))
    v, low, high = cg.interval(rows, 'bits_per_byte'); assert low < 2 < high and high - low < .1 and abs(v - rows['bits'].mean()/10) < 1e-12
    assert cg.interval(rows, 'cycles', rows) == (0., 0., 0.)
