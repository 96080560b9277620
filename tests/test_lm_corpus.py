"Templates, splits, packing, mixing, overlap, broken text. The lessons are in nbs/lm/11 to 16."
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from puzzle_research.core.data import find
from puzzle_research.lm import corpus as corpus_module
from puzzle_research.lm.bundled_text import BUNDLED_ROWS, bundled_rows
from puzzle_research.lm.corpus import adapt, build_corpus, write_all
from puzzle_research.lm.mixture import Mixture, shares
from puzzle_research.lm.overlap import overlap
from puzzle_research.lm.tasks import BUNDLED, BUNDLED_STAGES, STAGES, TASKS, articles, part_split, records
from puzzle_research.lm.tokens import END, PAD, START, best_fit, pack, train_tokenizer

REAL = Path(os.environ.get('PUZZLE_DATA', '/nowhere'))/'gsm8k'
needs_real_sets = pytest.mark.skipif(not REAL.exists(), reason='needs the real sets in PUZZLE_DATA')


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('PUZZLE_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield build_corpus('bundled', vocab=600, length=64)


@pytest.fixture
def put(lake):
    "Puts a split of a set into a data folder that holds nothing else."
    def write(name, split, rows):
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
        (lake/name).mkdir(exist_ok=True)
        pq.write_table(table, lake/name/f'{split}.parquet')
    return write


def documents(p):
    return [row[d == i] for row, d in zip(p.tokens, p.doc) for i in range(d.max() + 1)]


def questions(n, text='What is {}?', answer='#### {}'):
    return [dict(question=text.format(i), answer=answer.format(i)) for i in range(n)]


def test_every_document_is_packed_whole_or_cut_and_counted(corpus):
    for s, p in corpus.train.items():
        want = sorted(r['prompt'] + r['answer'] for r in records(s, 'train'))
        starts = [x for x in documents(p) if x[0] == START]
        assert len(starts) == p.documents == len(want) and p.cut == sum(x[-1] != END for x in starts)
        whole = sorted(corpus.tokenizer.decode(x[1:-1]) for x in starts if x[-1] == END)
        assert set(whole) <= set(want) and len(whole) == len(want) - p.cut
        assert p.text_bytes == sum(len(w.encode()) for w in want)
        assert ((p.tokens == PAD) == (p.doc < 0)).all() and p.filled > .6*p.tokens.size


def test_answers_are_marked_to_the_token(corpus):
    p, said = corpus.test['problems'], []
    for row, doc, answer in zip(p.tokens, p.doc, p.answer):
        for i in range(doc.max() + 1):
            own = row[doc == i]
            if own[0] == START and own[-1] == END:
                said.append(corpus.tokenizer.decode(row[(doc == i) & answer]))
    assert said and set(said) <= {r['answer'] for r in records('problems', 'test')}


@pytest.mark.parametrize('n', [1, 2, 63, 64, 65, 126, 127, 128, 1000])
def test_a_long_document_loses_no_target(n):
    p = pack([[]], [list(range(3, 3 + n))], 64)
    targets = sorted(t for x in documents(p) for t in x[1:].tolist())
    assert targets == sorted([*range(3, 3 + n), END]) and p.cut == (n + 2 > 64)


def test_best_fit_never_overlaps_and_wastes_little():
    lengths = np.random.default_rng(0).integers(1, 129, 3000)
    at = best_fit(lengths, 128)
    taken = np.concatenate([row*128 + place + np.arange(n) for n, (row, place) in zip(lengths, at)])
    assert len(np.unique(taken)) == lengths.sum() and (at[:, 1] + lengths <= 128).all()
    assert lengths.sum() > .93*128*(at[:, 0].max() + 1)
    assert len(best_fit([], 8)) == 0


@pytest.mark.parametrize('text', ['naïve — 漢字 🙂', '\x00\n\r\t', ' lead and trail ', '<|end|> is text',
                                  ''.join(map(chr, range(1, 400)))])
def test_tokenizer_writes_anything(text):
    tok = train_tokenizer(['a small text']*3, 300)
    assert tok.decode(tok.encode(text)) == text and tok.size <= 300


@pytest.mark.parametrize('kind, n', BUNDLED_ROWS.items())
def test_bundled_files_are_those_of_the_generators(kind, n):
    key = 'text' if kind in ('stories', 'snippets') else 'question'
    splits = {}
    for split in ('train', 'validation', 'test'):
        splits[split] = [r[key] for r in pq.read_table(find(f'bundled_{kind}', split)).to_pylist()]
        assert len(set(splits[split])) == len(splits[split]) == (n if split == 'train' else n//10)
    assert not set(splits['train']) & (set(splits['test']) | set(splits['validation']))
    assert [r[key] for r in bundled_rows(kind, 'test', n)] == splits['test']


def test_published_curriculum():
    assert list(TASKS) == [
        'gsm8k', 'svamp', 'mbpp', 'arc_easy', 'arc_challenge', 'hellaswag', 'asdiv', 'codexglue', 'hotpotqa',
        'drop', 'strategyqa', 'piqa', 'boolq', 'wikitext2']
    assert STAGES[0] == ('gsm8k', 'svamp', 'mbpp', 'arc_easy', 'piqa', 'wikitext2')
    assert set(STAGES[1]) - set(STAGES[0]) == {'asdiv', 'arc_challenge', 'boolq', 'strategyqa'}
    stages, notes = adapt(STAGES, {'gsm8k', 'drop'})
    assert stages == [('gsm8k',), ('gsm8k',), ('gsm8k', 'drop')] and len(notes) == 3 and 'piqa' in notes[0]


def test_a_set_without_test_split_a_missing_set_and_broken_rows(put):
    rows = questions(200, 'How many are {0} and {0} apples?', '{0} + {0} is a sum.\n#### {0}')
    put('gsm8k', 'train', rows + [dict(question='Empty?', answer='')])
    c = build_corpus('real', vocab=300, length=16, sets=('gsm8k', 'piqa', 'asdiv'))
    why = {(m['set'], m['part']): m['why'] for m in c.missing}
    assert 'not on this machine' in why['gsm8k', 'test'] and 'not on this machine' in why['piqa', 'train']
    assert 'no test split' in why['asdiv', 'test']
    assert [(d['row'], d['why']) for d in c.broken['gsm8k/train']] == [(200, 'answer is empty')]
    assert (c.train['gsm8k'].documents, c.valid['gsm8k'].documents) == (180, 20) and c.train['gsm8k'].cut > 0
    assert c.stages == [('gsm8k',)]*3 and any('piqa' in n for n in c.notes)


def test_too_many_broken_rows_leave_the_set_out_with_a_reason(put):
    put('gsm8k', 'train', [dict(question='Why?', answer='' if i % 2 else '#### 1') for i in range(40)])
    with pytest.raises(FileNotFoundError, match='gsm8k.*20 of 40 items are broken'):
        build_corpus('real', vocab=300, length=16, sets=('gsm8k',))


def test_text_that_is_no_utf8_is_dropped_and_named(put):
    rows = questions(100)
    asked = [r['question'].encode() for r in rows]
    asked[41] = b'caf\xe9 ?'
    asked = pa.array(asked, pa.binary()).view(pa.string())
    table = pa.table(dict(question=asked, answer=[r['answer'] for r in rows]))
    put('gsm8k', 'train', table)
    c = build_corpus('real', vocab=300, length=16, sets=('gsm8k',))
    (d,) = c.broken['gsm8k/train']
    assert d['row'] == 41 and 'UTF-8' in d['why']
    assert c.train['gsm8k'].documents + c.valid['gsm8k'].documents == 99


def test_test_text_in_training_text_is_found_and_the_training_record_left_out(put):
    rows = questions(100, 'How many are {0} and {0} apples in a basket?')
    put('gsm8k', 'train', rows)
    fit = records('gsm8k', 'train')
    copied = fit[0]['prompt'].removeprefix('Q: ').removesuffix('\nA:').upper()
    new = dict(question='Something else, quite new, is asked here?', answer='#### 0')
    put('gsm8k', 'test', [dict(question=copied, answer='#### 1'), new])
    c = build_corpus('real', vocab=300, length=32, sets=('gsm8k',))
    assert c.overlap[0]['same_prompt'] == 1 and c.left_out == {'gsm8k': 1}
    assert len(fit) == 90 and c.train['gsm8k'].documents == 89


def test_auto_falls_back_loudly_and_real_refuses(lake, caplog):
    c = build_corpus('auto', vocab=400, length=64)
    assert set(c.train) == set(BUNDLED) and 'BUNDLED' in c.notes[0] and 'BUNDLED' in caplog.text
    with pytest.raises(FileNotFoundError, match='no training text'):
        build_corpus('real', vocab=400, length=64)


def test_auto_with_chosen_sets_that_are_not_there_has_the_bundled_curriculum(lake):
    c = build_corpus('auto', vocab=400, length=64, sets=('gsm8k', 'svamp'))
    assert c.stages == list(BUNDLED_STAGES)


def test_validation_is_never_test_and_never_train():
    for t in TASKS.values():
        assert part_split(t, 'valid') != t.test or not t.test
    fit, valid = ({r['prompt'] + r['answer'] for r in records('stories', p)} for p in ('train', 'valid'))
    assert not fit & valid


def test_mixture_is_a_function_of_the_step_and_reads_all_before_again(corpus):
    def mixture(seed):
        return Mixture(corpus.train, corpus.stages, 4, 90, seed=seed, power=1.)
    mix = mixture(3)
    assert all(torch.equal(a, b) for a, b in zip(mix(50), mixture(3)(50)))
    assert not torch.equal(mix(50)[0], mixture(4)(50)[0])
    for k, s in enumerate(mix.sets):
        rows = mix.rows[mix.order == k]
        counts = np.bincount(rows, minlength=len(corpus.train[s]))
        assert len(rows) == 0 or counts.max() - counts.min() <= 1
    tokens, doc, answer = mix(0)
    assert tokens.shape == doc.shape == answer.shape == (4, 64)
    assert tokens.dtype == torch.int64 and answer.dtype == torch.bool


@pytest.mark.parametrize('power', [0., .5, 1.])
def test_tokens_are_balanced_as_asked(corpus, power):
    mix = Mixture(corpus.train, corpus.stages[-1:], 8, 300, power=power, most_epochs=1e9)
    filled = {s: p.filled for s, p in corpus.train.items()}
    drawn = {s: filled[s]*(mix.order == k).sum()/len(corpus.train[s]) for k, s in enumerate(mix.sets)}
    want = shares(filled, 1., power, 1e9)
    for s in drawn:
        assert drawn[s]/sum(drawn.values()) == pytest.approx(want[s], abs=.01)


def test_shares():
    s = shares(dict(a=10, b=1000, c=100_000), 1000, 0., 8)
    assert sum(s.values()) == pytest.approx(1)
    assert s['a'] == pytest.approx(.08) and s['b'] == s['c'] == pytest.approx(.46)
    assert shares(dict(a=1, b=1), 1000, .5, 8) == dict(a=.5, b=.5)


def test_overlap_of_passages():
    passage = 'the quick brown fox jumps over the lazy dog while the small cat looks on and sleeps'
    prompts = (f'{passage}\nQ: who?\nA:', f'Some {passage}\nQ: what?\nA:',
               'Q: the quick brown fox sees nobody at all today?\nA:')
    a, b, c = (dict(prompt=p, answer=' x') for p in prompts)
    (found,) = overlap(dict(t=[a]), dict(t=[b, c]))
    assert (found['same_prompt'], found['share_passage']) == (0, 1)


@pytest.mark.parametrize('bad, word', [
    (dict(data='reel'), "did you mean 'real'"), (dict(length=4), 'rows of 4 tokens'),
    (dict(sets=('gsm8',)), "did you mean 'gsm8k'"), (dict(vocab=9), 'vocabulary of 9')])
def test_bad_arguments_are_named(bad, word):
    with pytest.raises(ValueError, match=word):
        build_corpus(**dict(data='bundled') | bad)


def test_articles():
    rows = [dict(answer=x) for x in (' = A = \n', ' \n', ' t \n', ' = = B = = \n', ' = C = \n', ' u \n')]
    assert [a['answer'] for a in articles(rows)] == [' = A = \n \n t \n = = B = = \n', ' = C = \n u \n']


def test_two_processes_write_what_one_writes(corpus, tmp_path, monkeypatch):
    rows = {p: {s: records(s, p) for s in ('problems', 'riddles')} for p in ('train', 'test')}
    one = write_all(tmp_path/'one', corpus.tokenizer, rows, 64)
    monkeypatch.setattr(corpus_module, 'MUCH', 0)
    assert write_all(tmp_path/'two', corpus.tokenizer, rows, 64) == one
    assert 'TOKENIZERS_PARALLELISM' not in os.environ
    for f in (tmp_path/'one').rglob('*.npy'):
        assert (tmp_path/'two'/f.relative_to(tmp_path/'one')).read_bytes() == f.read_bytes()


def test_an_error_in_the_second_process_has_its_name_here(corpus, tmp_path, monkeypatch, capfd):
    def full(path, array):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(corpus_module, 'MUCH', 0)
    monkeypatch.setattr(corpus_module.np, 'save', full)
    rows = {'test': {s: records(s, 'test') for s in ('problems', 'riddles')}}
    with pytest.raises(OSError, match='No space left'):
        write_all(tmp_path, corpus.tokenizer, rows, 64)


@pytest.mark.slow
@needs_real_sets
def test_real_sets():
    c = build_corpus('real', vocab=4096, length=512)
    assert set(TASKS) - set(c.train) == {'hellaswag', 'piqa'} and set(TASKS) - set(c.test) == {'asdiv'}
    assert {o['set']: o['same_prompt'] for o in c.overlap}['arc_easy'] >= 0
    assert sum(p.documents for p in c.train.values()) > 40_000 and len(c.stages) == 3


@pytest.mark.slow
@needs_real_sets
def test_vocabulary_of_the_seed():
    assert build_corpus('real', vocab=32_768, length=512).tokenizer.size == 32_768
