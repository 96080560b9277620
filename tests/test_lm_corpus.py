"Templates, splits, packing, mixing, overlap, broken text. The lessons are in nbs/lm/01_corpus.ipynb."
import os, time
from pathlib import Path

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest, torch

from puzzle_research.lm.corpus import (BUNDLED, BUNDLED_ROWS, END, PAD, STAGES, START, TASKS, Mixture, _encode, _write_all, adapt, articles, best_fit, build_corpus, bundled_rows, overlap, pack, part_split, records, shares, train_tokenizer)

REAL = Path(os.environ.get('PUZZLE_DATA', '/nowhere'))/'gsm8k'


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    before = os.environ.get('PUZZLE_CACHE'); os.environ['PUZZLE_CACHE'] = str(tmp_path_factory.mktemp('cache'))
    yield build_corpus('bundled', vocab=600, length=64)
    os.environ.pop('PUZZLE_CACHE'); os.environ.update({'PUZZLE_CACHE': before} if before else {})


@pytest.fixture
def lake(tmp_path, monkeypatch):
    "An empty data folder and cache, no hub."
    monkeypatch.setenv('PUZZLE_DATA', str(tmp_path/'data')); monkeypatch.setenv('PUZZLE_CACHE', str(tmp_path/'cache')); monkeypatch.setenv('HF_HUB_OFFLINE', '1'); (tmp_path/'data').mkdir()
    def put(name, split, rows):
        (tmp_path/'data'/name).mkdir(exist_ok=True); pq.write_table(pa.Table.from_pylist(rows), tmp_path/'data'/name/f'{split}.parquet')
    return put


def docs_of(p): return [row[d == i] for row, d in zip(p.tokens, p.doc) for i in range(d.max() + 1)]


def test_every_document_is_packed_whole_or_cut_and_counted(corpus):
    tok = corpus.tokenizer
    for s, p in corpus.train.items():
        want = sorted(r['prompt'] + r['answer'] for r in records(s, 'train'))
        ids = docs_of(p); starts = [x for x in ids if x[0] == START]
        assert len(starts) == p.documents == len(want) and p.cut == sum(x[-1] != END for x in starts)
        whole = sorted(tok.decode(x[1:-1]) for x in starts if x[-1] == END)
        assert set(whole) <= set(want) and len(whole) == len(want) - p.cut
        assert p.text_bytes == sum(len(w.encode()) for w in want)
        assert ((p.tokens == PAD) == (p.doc < 0)).all() and p.filled > .6*p.tokens.size


def test_answers_are_marked_to_the_token(corpus):
    p = corpus.test['problems']; tok = corpus.tokenizer
    said = sorted(tok.decode(row[(d == i) & a]) for row, d, a in zip(p.tokens, p.doc, p.answer) for i in range(d.max() + 1) if row[d == i][0] == START and row[d == i][-1] == END)
    assert set(said) <= {r['answer'] for r in records('problems', 'test')}


@pytest.mark.parametrize('n', [1, 2, 63, 64, 65, 126, 127, 128, 1000])
def test_a_long_document_loses_no_target(n):
    p = pack([[]], [list(range(3, 3 + n))], 64)
    targets = sorted(t for x in docs_of(p) for t in x[1:].tolist())
    assert targets == sorted([*range(3, 3 + n), END]) and p.cut == (n + 2 > 64)


def test_best_fit_never_overlaps_and_wastes_little():
    rng = np.random.default_rng(0); lengths = rng.integers(1, 129, 3000); at = best_fit(lengths, 128)
    taken = np.concatenate([r*128 + c + np.arange(n) for n, (r, c) in zip(lengths, at)])
    assert len(np.unique(taken)) == lengths.sum() and (at[:, 1] + lengths <= 128).all() and lengths.sum() > .93*128*(at[:, 0].max() + 1)
    assert len(best_fit([], 8)) == 0


def test_tokenizer_writes_anything():
    tok = train_tokenizer(['a small text']*3, 300)
    for text in ('naïve — 漢字 🙂', '\x00\n\r\t', ' lead and trail ', '<|end|>', ''.join(map(chr, range(1, 400)))):
        assert tok.decode(tok.encode(text)) == text.replace('<|end|>', '') or '<|' in text
    assert tok.size <= 300


def test_bundled_files_are_those_of_the_generators():
    from puzzle_research.core.data import find
    for kind, n in BUNDLED_ROWS.items():
        key, splits = {'stories': 'text'}.get(kind, 'question' if kind != 'snippets' else 'text'), {}
        for split in ('train', 'validation', 'test'):
            rows = pq.read_table(find(f'bundled_{kind}', split)).to_pylist(); splits[split] = {r[key] for r in rows}
            assert len(rows) == len(splits[split]) == (n if split == 'train' else n//10)
        assert not splits['train'] & splits['test'] and not splits['train'] & splits['validation']
        assert [r[key] for r in bundled_rows(kind, 'test', n)] == [r[key] for r in pq.read_table(find(f'bundled_{kind}', 'test')).to_pylist()]


def test_published_curriculum():
    assert list(TASKS) == ['gsm8k', 'svamp', 'mbpp', 'arc_easy', 'arc_challenge', 'hellaswag', 'asdiv', 'codexglue', 'hotpotqa', 'drop', 'strategyqa', 'piqa', 'boolq', 'wikitext2']
    assert STAGES[0] == ('gsm8k', 'svamp', 'mbpp', 'arc_easy', 'piqa', 'wikitext2') and set(STAGES[1]) - set(STAGES[0]) == {'asdiv', 'arc_challenge', 'boolq', 'strategyqa'} and len(STAGES[2]) == 14
    stages, notes = adapt(STAGES, {'gsm8k', 'drop'})
    assert stages == [('gsm8k',), ('gsm8k',), ('gsm8k', 'drop')] and len(notes) == 3 and 'piqa' in notes[0]


def test_a_set_without_test_split_a_missing_set_and_broken_rows(lake, caplog):
    rows = [dict(question=f'How many are {i} and {i} apples?', answer=f'{i} + {i} = {2*i}.\n#### {2*i}') for i in range(200)]
    lake('gsm8k', 'train', rows + [dict(question='Empty?', answer='')])
    c = build_corpus('real', vocab=300, length=16, sets=('gsm8k', 'piqa', 'asdiv'))
    why = {(m['set'], m['part']): m['why'] for m in c.missing}
    assert 'not on this machine' in why['gsm8k', 'test'] and 'not on this machine' in why['piqa', 'train'] and 'no test split' in why['asdiv', 'test']
    assert [(d['row'], d['why']) for d in c.broken['gsm8k/train']] == [(200, 'answer is empty')]
    assert c.train['gsm8k'].documents == 180 and c.valid['gsm8k'].documents == 20 and c.train['gsm8k'].cut > 0
    assert c.stages == [('gsm8k',)]*3 and any('piqa' in n for n in c.notes)


def test_too_many_broken_rows_leave_the_set_out_with_a_reason(lake):
    lake('gsm8k', 'train', [dict(question='Why?', answer='' if i % 2 else '#### 1') for i in range(40)])
    with pytest.raises(FileNotFoundError, match='gsm8k.*20 of 40 items are broken'): build_corpus('real', vocab=300, length=16, sets=('gsm8k',))


def test_text_that_is_no_utf8_is_dropped_and_named(lake, tmp_path):
    rows = [dict(question=f'What is {i}?', answer=f'#### {i}') for i in range(100)]
    lake('gsm8k', 'train', rows)
    bad = pa.array([b'caf\xe9 ?' if i == 41 else r['question'].encode() for i, r in enumerate(rows)], pa.binary()).view(pa.string())
    pq.write_table(pa.table({'question': bad, 'answer': [r['answer'] for r in rows]}), tmp_path/'data'/'gsm8k'/'train.parquet')
    c = build_corpus('real', vocab=300, length=16, sets=('gsm8k',))
    (d,) = c.broken['gsm8k/train']
    assert d['row'] == 41 and 'UTF-8' in d['why'] and c.train['gsm8k'].documents + c.valid['gsm8k'].documents == 99


def test_test_text_in_training_text_is_found_and_the_training_record_left_out(lake):
    rows = [dict(question=f'How many are {i} and {i} apples in a basket?', answer=f'#### {2*i}') for i in range(100)]
    lake('gsm8k', 'train', rows); lake('gsm8k', 'test', [dict(rows[5], question=rows[5]['question'].upper()), dict(question='Something else, quite new, is asked here?', answer='#### 0')])
    c = build_corpus('real', vocab=300, length=32, sets=('gsm8k',))
    (o,) = c.overlap
    fit = {r['prompt'] for r in records('gsm8k', 'train')}
    hit = any('and 5 apples' in p for p in fit) and 'How many are 5 and 5 apples in a basket?' in ' '.join(fit)
    assert o['same_prompt'] == int(hit) and c.left_out == ({'gsm8k': 1} if hit else {}) and c.train['gsm8k'].documents == 90 - hit


def test_auto_falls_back_loudly_and_real_refuses(lake, caplog):
    c = build_corpus('auto', vocab=400, length=64)
    assert set(c.train) == set(BUNDLED) and 'BUNDLED' in c.notes[0] and 'BUNDLED' in caplog.text
    with pytest.raises(FileNotFoundError, match='no training text'): build_corpus('real', vocab=400, length=64)


def test_validation_is_never_test_and_never_train():
    for t in TASKS.values(): assert part_split(t, 'valid') != t.test or not t.test
    fit, valid = ({r['prompt'] + r['answer'] for r in records('stories', p)} for p in ('train', 'valid'))
    assert not fit & valid


def test_mixture_is_a_function_of_the_step_and_reads_all_before_again(corpus):
    mix = Mixture(corpus.train, corpus.stages, 4, 90, seed=3, power=1.); again = Mixture(corpus.train, corpus.stages, 4, 90, seed=3, power=1.)
    assert all(torch.equal(a, b) for a, b in zip(mix(50), again(50))) and not torch.equal(mix(50)[0], Mixture(corpus.train, corpus.stages, 4, 90, seed=4, power=1.)(50)[0])
    for k, s in enumerate(mix.sets):
        rows = mix.rows[mix.order == k]; n = len(corpus.train[s])
        counts = np.bincount(rows, minlength=n)
        assert len(rows) == 0 or counts.max() - counts.min() <= 1
    tokens, doc, answer = mix(0)
    assert tokens.dtype == torch.int64 and tokens.shape == doc.shape == answer.shape == (4, 64) and answer.dtype == torch.bool


def test_tokens_are_balanced_as_asked(corpus):
    for power in (0., .5, 1.):
        mix = Mixture(corpus.train, corpus.stages[-1:], 8, 300, power=power, most_epochs=1e9)
        drawn = {s: corpus.train[s].filled*(mix.order == k).sum()/len(corpus.train[s]) for k, s in enumerate(mix.sets)}; total = sum(drawn.values())
        want = shares({s: p.filled for s, p in corpus.train.items()}, 1., power, 1e9)
        for s in drawn: assert drawn[s]/total == pytest.approx(want[s], abs=.01)


def test_shares():
    s = shares(dict(a=10, b=1000, c=100_000), 1000, 0., 8)
    assert sum(s.values()) == pytest.approx(1) and s['a'] == pytest.approx(.08) and s['b'] == s['c'] == pytest.approx(.46)
    assert shares(dict(a=1, b=1), 1000, .5, 8) == dict(a=.5, b=.5)


def test_overlap_of_passages():
    passage = 'the quick brown fox jumps over the lazy dog while the small cat looks on and sleeps'
    a, b, c = (dict(prompt=p, answer=' x') for p in (f'{passage}\nQ: who?\nA:', f'Some {passage}\nQ: what?\nA:', 'Q: the quick brown fox sees nobody at all today?\nA:'))
    (o,) = overlap(dict(t=[a]), dict(t=[b, c]))
    assert o['same_prompt'] == 0 and o['share_passage'] == 1


def test_bad_arguments_are_named():
    for kw, word in ((dict(data='reel'), "did you mean 'real'"), (dict(length=4), 'rows of 4 tokens'), (dict(sets=('gsm8',)), "did you mean 'gsm8k'"), (dict(vocab=9, data='bundled'), 'vocabulary of 9')):
        with pytest.raises(ValueError, match=word): build_corpus(**dict(data='bundled') | kw)


def test_articles():
    rows = [dict(answer=x) for x in (' = A = \n', ' \n', ' t \n', ' = = B = = \n', ' = C = \n', ' u \n')]
    assert [a['answer'] for a in articles(rows)] == [' = A = \n \n t \n = = B = = \n', ' = C = \n u \n']


def test_speed(corpus):
    rows = records('stories', 'train'); _encode(corpus.tokenizer, rows[:10], 64)
    start = time.process_time(); p = _encode(corpus.tokenizer, rows, 64); spent = time.process_time() - start
    assert p.text_bytes/1e6/spent > 2.5, p.text_bytes/1e6/spent                   # a core: 5 MB/s on two


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason='needs the real sets in PUZZLE_DATA')
def test_real_sets():
    c = build_corpus('real', vocab=4096, length=512)
    assert set(TASKS) - set(c.train) == {'hellaswag', 'piqa'} and set(TASKS) - set(c.test) == {'asdiv'}
    assert {o['set']: o['same_prompt'] for o in c.overlap}['arc_easy'] >= 0
    assert sum(p.documents for p in c.train.values()) > 40_000 and len(c.stages) == 3


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason='needs the real sets in PUZZLE_DATA')
def test_vocabulary_of_the_seed():
    assert build_corpus('real', vocab=32_768, length=512).tokenizer.size == 32_768


def test_two_processes_write_what_one_writes(corpus, tmp_path, monkeypatch):
    rows = {p: {s: records(s, p) for s in ('problems', 'riddles', 'stories')} for p in ('train', 'test')}
    one = _write_all(tmp_path/'one', corpus.tokenizer, rows, 64); monkeypatch.setattr('puzzle_research.lm.corpus.MUCH', 0)
    assert _write_all(tmp_path/'two', corpus.tokenizer, rows, 64) == one and 'TOKENIZERS_PARALLELISM' not in os.environ
    for f in (tmp_path/'one').rglob('*.npy'): assert (tmp_path/'two'/f.relative_to(tmp_path/'one')).read_bytes() == f.read_bytes()


def test_an_error_in_the_second_process_has_its_name_here(corpus, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr('puzzle_research.lm.corpus.MUCH', 0); monkeypatch.setattr('puzzle_research.lm.corpus.np.save', lambda f, x: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(OSError, match='No space left'): _write_all(tmp_path, corpus.tokenizer, {'test': {s: records(s, 'test') for s in ('problems', 'riddles')}}, 64)
