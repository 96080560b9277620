"Scores with known answers. The lessons are in nbs/lm/18 and 19."
import math

import numpy as np
import pytest
import torch

from puzzle_research.lm import evaluate, likelihood
from puzzle_research.lm.evaluate import exact_match, final_number, last_word, pass_at_1, split_last_word
from puzzle_research.lm.likelihood import bits_per_byte, byte_baselines, choose, halting_curve, loglikelihoods
from puzzle_research.lm.likelihood import token_bytes
from puzzle_research.lm.sandbox import SandboxUnavailable
from puzzle_research.lm.tasks import records
from puzzle_research.lm.titans_mag import TitansMAG
from puzzle_research.lm.tokens import END, START, pack, train_tokenizer
from puzzle_research.lm.trm import RecursiveLM

TEXTS = ['The cat sat on the mat. It was a grey cat.', 'Naïve — 漢字 and more words here.',
         'Three and four make seven, said the owl.']
BYTES = sum(len(t.encode()) for t in TEXTS)


@pytest.fixture(scope='module')
def tok():
    return train_tokenizer(TEXTS*5, 320)


def build(tok, **kw):
    torch.manual_seed(0)
    backbone = TitansMAG(vocab=tok.size, d=32, layers=1, n_heads=2, d_ff=32, window=64, d_mem=8, mag_hidden=8)
    m = RecursiveLM(backbone, n_heads=4, **kw)
    m.backbone.embed.weight.data *= 20
    return m.eval()


def packed(tok, T=32, prompt=0):
    ids = [tok.encode(t) for t in TEXTS]
    return pack([i[:prompt] for i in ids], [i[prompt:] for i in ids], T, BYTES)


def test_token_bytes_are_the_bytes_of_the_text(tok):
    sizes = token_bytes(tok)
    for t in TEXTS:
        assert sum(sizes[tok.encode(t)]) == len(t.encode())
    assert not sizes[[START, END]].any()


def test_bits_per_byte_by_hand(tok):
    m, nats = build(tok), 0.
    for t in TEXTS:
        ids = [START, *tok.encode(t), END]
        logp = m.logits(m.read(torch.tensor([ids]))[0])[0].log_softmax(-1)
        nats -= sum(logp[i - 1, ids[i]].item() for i in range(1, len(ids)))
    got = bits_per_byte(m, packed(tok, 256), tok)
    assert got['bytes'] == BYTES and got['bits_per_byte'] == pytest.approx(nats/math.log(2)/BYTES, rel=1e-4)
    assert bits_per_byte(m, packed(tok, 16), tok)['bytes'] == BYTES            # cut: every byte still once
    assert 0 < bits_per_byte(m, packed(tok, 256, prompt=3), tok, answers=True)['bytes'] < BYTES


def test_bits_of_a_model_that_knows_nothing(tok):
    m = build(tok)
    torch.nn.init.zeros_(m.head)
    assert bits_per_byte(m, packed(tok), tok)['nats_per_token'] == pytest.approx(math.log(tok.size), rel=1e-5)


def test_nothing_to_predict_is_an_error(tok):
    with pytest.raises(ValueError, match='no text to predict'):
        bits_per_byte(build(tok), pack([], [], 16), tok)


def test_baselines_have_known_values():
    b = byte_baselines(bytes(range(256))*40, bytes(range(256))*4)
    assert b['trivial: uniform bytes'] == 8. and b['strong: xz after the training text'] < 1.
    assert b['trivial: byte frequencies of train'] == pytest.approx(8., abs=1e-6)


def test_choices_chance_and_majority(tok):
    four, two = [' cat', ' mat', ' owl', ' grey'], [' no', ' yes']
    rows = [dict(prompt='Q: a?\nA:', answer=' x', choices=four, label=i % 2) for i in range(10)]
    rows += [dict(prompt='Q: b?\nA:', answer=' x', choices=two, label=1)]*10
    c = choose(build(tok), tok, rows)
    assert c['chance'] == pytest.approx((10*.25 + 10*.5)/20) and c['majority'] == .75 and c['n'] == 20


def test_choice_by_likelihood_and_per_byte(monkeypatch):
    rows = [dict(prompt='Q', answer='', choices=[' a', ' abcdefgh'], label=1)]
    monkeypatch.setattr(likelihood, 'loglikelihoods', lambda *args: (np.array([-3., -4.]), 0))
    c = choose(None, None, rows)
    assert (c['accuracy'], c['accuracy_per_byte']) == (0., 1.)


def test_likelihood_alone_equals_in_company_and_long_prompts_are_cut_and_counted(tok):
    m = build(tok)
    pairs = [('The cat', ' sat'), ('The cat sat on the mat. It was a', ' grey cat.'), ('', 'Three'),
             ('The ' * 40, ' owl')]
    together, cut = loglikelihoods(m, tok, pairs, limit=64)
    alone = np.array([loglikelihoods(m, tok, [p], limit=64)[0][0] for p in pairs])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-3)
    assert cut == 1
    with pytest.raises(ValueError, match='empty answer'):
        loglikelihoods(m, tok, [('x', '')])


@pytest.mark.parametrize('text, number', [
    ('3 + 4 = 7.\n#### 7', 7.), ('it costs $1,250.', 1250.), ('####', None), ('-3', -3.), ('', None),
    ('#### 12 apples and 5', 12.), ('1 and 2 and 3.50', 3.5), ('no number', None), ('a, b, 5,', 5.)])
def test_final_number(text, number):
    assert final_number(text) == number


def test_exact_match_and_its_constant_baseline(monkeypatch):
    said = iter(['#### 4', 'five', '5'])
    monkeypatch.setattr(evaluate, 'write', lambda *args: next(said))
    rows = [dict(prompt='', answer=a) for a in ('#### 4', 'no number', '#### 5', '5.0')]
    train = [dict(answer='#### 5')]*3 + [dict(answer='#### 1')]
    e = exact_match(None, None, rows, train)
    assert e == pytest.approx(dict(exact_match=2/3, no_number=1/3, constant=2/3, n=3))


def test_last_word(tok):
    assert split_last_word('It was a grey cat.') == ('It was a grey', ' cat')
    assert split_last_word('a b') is None and split_last_word('') is None
    assert split_last_word('no end '*100_000)[1] == ' end'                      # and in no time
    rows = [dict(prompt='', answer=t) for t in TEXTS]
    r = last_word(build(tok), tok, rows, train=[dict(prompt='', answer='we saw the owl.')])
    assert r['n'] == 3 and r['constant'] == pytest.approx(1/3)


def test_halting_curve_costs_and_saves(tok):
    m = build(tok, cycles=3)
    m.halt.weight.data.normal_(0, .5)
    cycles = [c['cycles'] for c in halting_curve(m, packed(tok), tok, (0., .5, 1.))]
    assert cycles[0] == 3 > cycles[1] > cycles[2] == 0


def test_evaluation_leaves_the_model_as_it_was(tok):
    m = build(tok).train()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    bits_per_byte(m, packed(tok), tok)
    assert m.training and all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_pass_at_1_counts(monkeypatch):
    rows = records('snippets', 'test')[:3]
    said = iter([rows[0]['answer'], 'def broken(:', 'x = 1'])
    monkeypatch.setattr(evaluate, 'write', lambda *args: next(said))
    p = pass_at_1(None, None, rows, execute=True)
    assert p == pytest.approx(dict(pass_at_1=1/3, compiles=2/3, n=3))


def test_programs_are_not_run_unless_asked_for():
    with pytest.raises(SandboxUnavailable, match='unless asked for'):
        pass_at_1(None, None, [])
