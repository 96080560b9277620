"Scores with known answers, and a sandbox that holds. The lessons are in nbs/lm/05_evaluate.ipynb."
import math, os, time

import numpy as np, pytest, torch

from puzzle_research.lm import evaluate as E
from puzzle_research.lm.corpus import END, START, pack, records, train_tokenizer
from puzzle_research.lm.evaluate import (SandboxUnavailable, bits_per_byte, byte_baselines, choose, exact_match, final_number, halting_curve, last_word, loglikelihoods, pass_at_1, run_program,
    split_last_word, token_bytes)
from puzzle_research.lm.titans_mag import TitansMAG
from puzzle_research.lm.trm import RecursiveLM

TEXTS = ['The cat sat on the mat. It was a grey cat.', 'Naïve — 漢字 and more words here.', 'Three and four make seven, said the owl.']


@pytest.fixture(scope='module')
def tok(): return train_tokenizer(TEXTS*5, 320)

def build(tok, **kw):
    torch.manual_seed(0); m = RecursiveLM(TitansMAG(vocab=tok.size, d=32, layers=1, n_heads=2, d_ff=32, window=64, d_mem=8, mag_hidden=8), n_heads=4, **kw)
    m.backbone.embed.weight.data *= 20
    return m.eval()

def packed(tok, T=32, prompt=0):
    ids = [tok.encode(t) for t in TEXTS]
    return pack([i[:prompt] for i in ids], [i[prompt:] for i in ids], T, sum(len(t.encode()) for t in TEXTS))


def test_token_bytes_are_the_bytes_of_the_text(tok):
    sizes = token_bytes(tok)
    for t in TEXTS: assert sum(sizes[tok.encode(t)]) == len(t.encode())
    assert not sizes[[START, END]].any()


def test_bits_per_byte_by_hand(tok):
    m = build(tok); nats = 0.
    for t in TEXTS:
        ids = [START, *tok.encode(t), END]; logp = m.logits(m.read(torch.tensor([ids]))[0])[0].log_softmax(-1)
        nats -= sum(logp[i - 1, ids[i]].item() for i in range(1, len(ids)))
    size = sum(len(t.encode()) for t in TEXTS)
    got = bits_per_byte(m, packed(tok, 256), tok)
    assert got['bytes'] == size and got['bits_per_byte'] == pytest.approx(nats/math.log(2)/size, rel=1e-4)
    assert bits_per_byte(m, packed(tok, 16), tok)['bytes'] == size                # cut documents: every byte still once
    few = bits_per_byte(m, packed(tok, 256, prompt=3), tok, answers=True); assert 0 < few['bytes'] < size


def test_bits_of_a_model_that_knows_nothing(tok):
    m = build(tok); torch.nn.init.zeros_(m.head)
    assert bits_per_byte(m, packed(tok), tok)['nats_per_token'] == pytest.approx(math.log(tok.size), rel=1e-5)


def test_nothing_to_predict_is_an_error(tok):
    with pytest.raises(ValueError, match='no text to predict'): bits_per_byte(build(tok), pack([], [], 16), tok)


def test_baselines_have_known_values():
    b = byte_baselines(bytes(range(256))*40, bytes(range(256))*4)
    assert b['trivial: uniform bytes'] == 8. and b['trivial: byte frequencies of train'] == pytest.approx(8., abs=1e-6) and b['strong: xz after the training text'] < 1.


def test_choices_chance_and_majority(tok):
    rows = [dict(prompt='Q: a?\nA:', answer=' x', choices=[' cat', ' mat', ' owl', ' grey'], label=i % 2) for i in range(10)] + [dict(prompt='Q: b?\nA:', answer=' x', choices=[' no', ' yes'], label=1)]*10
    c = choose(build(tok), tok, rows)
    assert c['chance'] == pytest.approx((10*.25 + 10*.5)/20) and c['majority'] == .75 and c['n'] == 20


def test_choice_by_likelihood_and_per_byte(tok, monkeypatch):
    rows = [dict(prompt='Q', answer='', choices=[' a', ' abcdefgh'], label=1)]
    monkeypatch.setattr(E, 'loglikelihoods', lambda m, t, pairs, **kw: (np.array([-3., -4.]), 0))
    c = choose(None, tok, rows); assert (c['accuracy'], c['accuracy_per_byte']) == (0., 1.)


def test_likelihood_alone_equals_in_company_and_long_prompts_are_cut_and_counted(tok):
    m = build(tok); pairs = [('The cat', ' sat'), ('The cat sat on the mat. It was a', ' grey cat.'), ('', 'Three'), ('The ' * 40, ' owl')]
    together, cut = loglikelihoods(m, tok, pairs, limit=64)
    alone = np.array([loglikelihoods(m, tok, [p], limit=64)[0][0] for p in pairs])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-3); assert cut == 1
    with pytest.raises(ValueError, match='empty answer'): loglikelihoods(m, tok, [('x', '')])


@pytest.mark.parametrize('text, number', [('3 + 4 = 7.\n#### 7', 7.), ('it costs $1,250.', 1250.), ('####', None), ('-3', -3.), ('', None), ('#### 12 apples and 5', 12.), ('1 and 2 and 3.50', 3.5), ('no number', None), ('a, b, 5,', 5.)])
def test_final_number(text, number): assert final_number(text) == number


def test_exact_match_and_its_constant_baseline(tok, monkeypatch):
    said = iter(['#### 4', 'five', '5'])
    monkeypatch.setattr(E, 'write', lambda *a, **kw: next(said))
    rows = [dict(prompt='', answer=a) for a in ('#### 4', '#### 5', '5.0')]
    e = exact_match(None, tok, rows, train=[dict(answer='#### 5')]*3 + [dict(answer='#### 1')])
    assert e == dict(exact_match=pytest.approx(2/3), no_number=pytest.approx(1/3), constant=pytest.approx(2/3), n=3)


def test_last_word(tok):
    assert split_last_word('It was a grey cat.') == ('It was a grey', ' cat') and split_last_word('a b') is None and split_last_word('') is None
    r = last_word(build(tok), tok, [dict(prompt='', answer=t) for t in TEXTS], train=[dict(prompt='', answer='we saw the owl.')])
    assert r['n'] == 3 and r['constant'] == pytest.approx(1/3)


def test_halting_curve_costs_and_saves(tok):
    m = build(tok, cycles=3); m.halt.weight.data.normal_(0, .5)
    c = halting_curve(m, packed(tok), tok, (0., .5, 1.))
    assert c[0]['cycles'] == 3 > c[1]['cycles'] > c[2]['cycles'] == 0


def test_evaluation_leaves_the_model_as_it_was(tok):
    m = build(tok).train(); before = {k: v.clone() for k, v in m.state_dict().items()}
    bits_per_byte(m, packed(tok), tok)
    assert m.training and all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_true_programs_pass_and_false_ones_do_not():
    for r in records('snippets', 'test') + records('snippets', 'valid'):
        assert run_program([r['answer'].strip('\n'), r['setup'], *r['tests']]) == (True, '')
    assert run_program(['import math, re, collections, heapq, itertools', 'assert math.sqrt(4) == 2 and re.sub("a", "b", "a") == "b" and sorted(collections.Counter("aab").values()) == [1, 2]'])[0]
    assert run_program(['assert 1 == 2'])[1].startswith('AssertionError') and run_program(['def f(:'])[1].startswith('SyntaxError')


ESCAPES = {
    'read a file': ("open('/etc/passwd').read()", 'PermissionError'), 'read its own source': ("open('/proc/self/environ').read()", 'PermissionError'),
    'write a file': ("open('{tmp}/x', 'w')", 'PermissionError'), 'low level': ("import os; os.open('/etc/passwd', 0)", 'PermissionError'), 'list': ("import os; os.listdir('/')", 'PermissionError'),
    'delete': ("import os; os.remove('{tmp}/victim')", 'PermissionError'), 'rename': ("import os; os.rename('{tmp}/victim', '{tmp}/y')", 'PermissionError'), 'mkdir': ("import os; os.mkdir('{tmp}/d')", 'PermissionError'),
    'chmod': ("import os; os.chmod('{tmp}/victim', 0)", 'PermissionError'), 'link': ("import os; os.symlink('/etc/passwd', '{tmp}/l')", 'PermissionError'), 'chdir': ("import os; os.chdir('/tmp')", 'PermissionError'),
    'network': ("import _socket; _socket.socket()", ''), 'ctypes socket': ("import ctypes; l = ctypes.CDLL(None); assert l.socket(2, 1, 0) >= 0", 'Error'),
    'fork': ("import os; os.fork()", 'PermissionError'), 'fork bomb': ("import os\nwhile True:\n    try: os.fork()\n    except OSError: raise", 'PermissionError'), 'spawn': ("import os; os.posix_spawn('/bin/true', ['true'], {{}})", 'PermissionError'),
    'exec': ("import os; os.execv('/bin/true', ['true'])", 'PermissionError'), 'shell': ("import os; assert os.system('touch {tmp}/x') == 0", 'AssertionError'), 'thread': ("import _thread, time; _thread.start_new_thread(print, ())", 'RuntimeError'),
    'kill': ("import os; os.kill({pid}, 9)", 'PermissionError'), 'stdout is no way out': ("import os; os.write(3, b'x')", 'Error'), 'raise the limits': ("import ctypes; l = ctypes.CDLL(None)\nassert l.prlimit(0, 9, None, None) == 0", 'Error'),
    'memory': ("x = bytearray(10**10)", 'MemoryError'), 'grow': ("x = []\nwhile True: x.append(bytearray(10**7))", 'MemoryError'), 'recursion': ("def f(): f()\nf()", 'RecursionError'),
    'leave': ("raise SystemExit(0)", 'SystemExit'), 'leave at once': ("import os; os._exit(0)", 'ended with 0 before the last test'), 'catch all': ("try: open('/etc/passwd')\nexcept BaseException: pass\nassert False", 'AssertionError'),
    'flood': ("import sys\nwhile True: sys.stderr.write('x'*10**6)", ''), 'endless loop': ("while True: pass", 'out of time'), 'sleep': ("import time; time.sleep(60)", '')}


@pytest.mark.parametrize('name', ESCAPES)
def test_no_way_out_of_the_sandbox(name, tmp_path):
    (tmp_path/'victim').write_text('safe'); source, why = ESCAPES[name]
    start = time.monotonic()
    passed, said = run_program([source.format(tmp=tmp_path, pid=os.getpid())], seconds=1, wall=8)
    assert not passed and why in said, said
    assert time.monotonic() - start < 30 and sorted(p.name for p in tmp_path.iterdir()) == ['victim'] and (tmp_path/'victim').read_text() == 'safe'


def test_nothing_stays_behind():
    import psutil
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    for source in ('while True: pass', 'import time; time.sleep(60)'): run_program([source], seconds=1, wall=4)
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before


def test_refused_where_there_is_no_sandbox(monkeypatch, tok):
    with pytest.raises(SandboxUnavailable, match='unless asked for'): pass_at_1(None, tok, [])
    monkeypatch.setattr(E.platform, 'machine', lambda: 'arm64')
    with pytest.raises(SandboxUnavailable, match='x86-64 only.*arm64'): run_program(['1'])
    with pytest.raises(SandboxUnavailable): pass_at_1(None, tok, records('snippets', 'test'), execute=True)
    monkeypatch.undo(); monkeypatch.setattr(E, 'seccomp_filter', lambda: b'\xff'*8)
    with pytest.raises(SandboxUnavailable, match='kernel refused'): run_program(['1'])


def test_pass_at_1_counts(tok, monkeypatch):
    rows = records('snippets', 'test')[:3]; said = iter([rows[0]['answer'], 'def broken(:', 'x = 1'])
    monkeypatch.setattr(E, 'write', lambda *a, **kw: next(said))
    p = pass_at_1(None, tok, rows, execute=True)
    assert p == dict(pass_at_1=pytest.approx(1/3), compiles=pytest.approx(2/3), n=3)
