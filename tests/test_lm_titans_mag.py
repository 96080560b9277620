"The memory and the backbone: scan == loop, packed == alone, cached == whole, no state kept, exact counts. The lessons are in nbs/lm/02_titans_mag.ipynb."
import time

import pytest, torch, torch.nn.functional as F

from puzzle_research.core.quantize import count_parameters
from puzzle_research.lm.mugrokfast import MuGrokfast, parameter_groups
from puzzle_research.lm.titans_mag import (SEED, TitansMAG, empty_memory, first_of_document, memory_loop, memory_scan, positions, visible)

NANO = dict(vocab=40, d=32, layers=2, n_heads=2, d_ff=48, window=8, d_mem=16, mag_hidden=8, chunk=8)
KINDS = [dict(memory='titans', memory_heads=2), dict(memory='titans', surprise_threshold=.4, capacity=6.), dict(memory='decay'), dict(memory='decay', capacity=5., surprise_threshold=.8),
         dict(memory='none'), dict(memory='titans', gated=False), dict(memory='decay', rope=False, max_len=64)]


def build(seed=0, **kw):
    torch.manual_seed(seed); m = TitansMAG(**NANO | kw)
    m.embed.weight.data *= 30
    return m.eval()

def text(B=2, T=40, seed=1): return torch.randint(40, (B, T), generator=torch.Generator().manual_seed(seed))


def problem(B, heads, T, d, seed=0):
    g = torch.Generator().manual_seed(seed); r = lambda *s: torch.randn(*s, generator=g)
    q, k = (F.normalize(r(B, heads, T, d), dim=-1) for _ in range(2)); v = r(B, heads, T, d + 3)
    theta, eta, alpha = r(B, heads, T).sigmoid(), r(B, heads, T).sigmoid(), (r(B, heads, T) - 3).sigmoid()
    return [x.requires_grad_() for x in (q, k, v, theta, eta, alpha)], torch.rand(B, T, generator=g) < .05


@pytest.mark.parametrize('chunk', [1, 5, 16, 100])
@pytest.mark.parametrize('threshold, capacity', [(0., 1e9), (0., 4.), (.8, 30.), (1.2, 2.)])
def test_scan_equals_loop(chunk, threshold, capacity):
    args, first = problem(2, 2, 60, 7)
    state = empty_memory(2, 2, 7, 10, args[0])
    for _ in range(2):                                          # from nothing, and from a state that is not
        a, b = (f(*args, first, state, threshold, capacity, chunk) for f in (memory_scan, memory_loop))
        for x, y in zip((a[0], a[1].M, a[1].S, a[1].held, a[1].start, a[2]), (b[0], b[1].M, b[1].S, b[1].held, b[1].start if b[1].into else b[1].M, b[2])): torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
        assert torch.equal(a[3], b[3]) and a[1].into == b[1].into
        ga, gb = (torch.autograd.grad(x[0].square().mean() + x[1].M.square().mean(), args, retain_graph=True) for x in (a, b))
        for x, y in zip(ga, gb): torch.testing.assert_close(x, y, rtol=2e-3, atol=1e-4)
        state = a[1]._replace(M=a[1].M.detach(), S=a[1].S.detach(), start=a[1].start.detach())


@pytest.mark.parametrize('cuts', [(1, 2, 3), (8, 16), (13,), (31, 33, 59)])
@pytest.mark.parametrize('threshold', [0., .9])
def test_scan_in_pieces_equals_scan(cuts, threshold):
    args, first = problem(2, 1, 60, 7, seed=3); s = empty_memory(2, 1, 7, 10, args[0])
    whole, last, *_ = memory_scan(*args, first, s, threshold, 9., 16); pieces = []
    for a, b in zip((0, *cuts), (*cuts, 60)):
        y, s, *_ = memory_scan(*(x[:, :, a:b] for x in args), first[:, a:b], s, threshold, 9., 16); pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 2), whole, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(s.M, last.M, rtol=1e-3, atol=1e-4)


def test_extreme_gates_stay_finite():
    args, first = problem(1, 1, 64, 8)
    for value in (0., 1.):
        for at in (3, 4, 5):
            given = [x.detach().clone() for x in args]; given[at] = torch.full_like(given[at], value); given = [x.requires_grad_() for x in given]
            y, s, *_ = memory_scan(*given, first, empty_memory(1, 1, 8, 11, args[0]))
            grads = torch.autograd.grad(y.sum(), given)
            assert y.isfinite().all() and all(g.isfinite().all() for g in grads), (at, value)


def test_the_delta_rule_recalls_exactly():
    "Orthogonal keys, full step, no forgetting, no momentum: what was written is read back."
    k = torch.eye(8)[None, None]; v = torch.randn(1, 1, 8, 5); one = torch.ones(1, 1, 8)
    _, s, surprise, _ = memory_scan(k, k, v, one, 0*one, 0*one, torch.zeros(1, 8, dtype=torch.bool), empty_memory(1, 1, 8, 5, k), chunk=3)
    torch.testing.assert_close(k @ s.M, v, rtol=1e-4, atol=1e-4); torch.testing.assert_close(surprise, one)
    _, s, surprise, _ = memory_scan(k, k, v, one, 0*one, 0*one, torch.zeros(1, 8, dtype=torch.bool), s._replace(into=0))
    assert surprise.abs().max() < 1e-3                          # read twice, nothing surprises


def test_scan_is_20_times_the_loop_at_512_tokens():
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0); r = lambda *s: torch.randn(*s, generator=g)
    args = [x.requires_grad_() for x in (F.normalize(r(1, 1, 512, 64), dim=-1), F.normalize(r(1, 1, 512, 64), dim=-1), r(1, 1, 512, 64), r(1, 1, 512).sigmoid(), r(1, 1, 512).sigmoid(), (r(1, 1, 512) - 4).sigmoid())]
    none = torch.zeros(1, 512, dtype=torch.bool)
    def step(f): y, *_ = f(*args, none, empty_memory(1, 1, 64, 64, args[0]), 0., 1e9, 64); torch.autograd.grad(y.square().sum(), args)
    def cost(f): start = time.process_time(); step(f); return time.process_time() - start
    cost(memory_scan)
    loop, scan = min(cost(memory_loop) for _ in range(2)), min(cost(memory_scan) for _ in range(10))
    torch.set_num_threads(threads)
    assert loop > 20*scan, loop/scan


def test_seed_is_the_published_backbone_to_the_parameter():
    m = TitansMAG(**SEED)
    part = lambda *names: sum(count_parameters(getattr(m, n)) for n in names)
    assert count_parameters(m) == 24_510_240 and part('embed') == 10_485_760 and part('position') == 655_360 and part('memory') == 102_400 and part('gate') == 154_080
    assert part('blocks') == 3_276_800 + 9_830_400 + 5_120 and part('norm') == 320
    assert count_parameters(TitansMAG(**SEED | dict(vocab=50_257))) == 24_510_240 + (50_257 - 32_768)*320


@pytest.mark.parametrize('kind', KINDS)
def test_no_token_reaches_back(kind):
    m, t = build(**kind), text()
    y = m(t)[0]
    for at in (5, 17, 39):
        changed = t.clone(); changed[:, at] = (changed[:, at] + 1) % 40
        moved = (m(changed)[0] - y).abs().amax((0, 2))
        assert moved[:at].max() < 1e-6 < moved[at]


@pytest.mark.parametrize('kind', KINDS)
def test_pieces_equal_the_whole(kind):
    m, t = build(**kind), text()
    doc = torch.tensor([[0]*11 + [1]*29, [0]*25 + [3]*15])
    for d in (None, doc):
        whole, cache, pieces = m(t, d)[0], None, []
        for a, b in zip((0, 1, 2, 12, 13, 30), (1, 2, 12, 13, 30, 40)):
            y, _, cache = m(t[:, a:b], d[:, a:b] if d is not None else None, cache=cache, keep=True); pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-3, atol=1e-4)
        assert all(k.shape[2] == NANO['window'] - 1 for k, _ in cache.past)


@pytest.mark.parametrize('kind', [k for k in KINDS if not k.get('surprise_threshold')])
def test_packed_documents_equal_documents_alone(kind):
    m, t = build(**kind), text()
    packed = m(t, torch.tensor([[4]*17 + [7]*9 + [4]*14]).expand(2, -1))[0]          # a number may come again
    alone = torch.cat([m(t[:, a:b])[0] for a, b in ((0, 17), (17, 26), (26, 40))], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_a_document_knows_nothing_of_the_one_before(kind):
    m, t = build(**kind), text()
    doc = torch.tensor([[0]*19 + [1]*21]).expand(2, -1)
    other = torch.cat([(t[:, :19]*7 + 3) % 40, t[:, 19:]], 1)
    torch.testing.assert_close(m(t, doc)[0][:, 19:], m(other, doc)[0][:, 19:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_rows_do_not_meet_and_nothing_is_kept(kind):
    m, t = build(**kind), text(B=3)
    y = m(t)[0]
    torch.testing.assert_close(m(t[1:2])[0], y[1:2], rtol=1e-4, atol=1e-5)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    m.train(); m(text(B=4, seed=9)); m.eval()
    assert torch.equal(m(t)[0], y) and all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


@pytest.mark.parametrize('kind', KINDS)
def test_every_parameter_learns(kind):
    m = build(**kind).train()
    y, numbers, _ = m(text())
    (y.square().sum() + sum(numbers.get(k, 0) for k in ('gate_entropy',))).backward()
    assert [n for n, p in m.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize('memory', ['titans', 'decay'])
def test_capacity_and_threshold_act(memory):
    t = text(T=120)
    run = lambda **kw: build(memory=memory, **kw)(t)
    few, many = run(capacity=5.), run(capacity=5000.)
    assert (few[0] - many[0]).abs().max() > 1e-4 and few[1]['memory_usage'] > .9 > .1 > many[1]['memory_usage']
    rates = [run(capacity=50., surprise_threshold=x)[1]['surprise_rate'].item() for x in (0., .7, .95)]
    assert rates[0] == 1. and rates[0] > rates[1] > rates[2] > 0 or memory == 'decay' and rates[0] >= rates[1] >= rates[2] > 0


def test_window_is_a_window():
    m = build(memory='none', layers=1, window=5); t = text()
    y = m(t)[0]; changed = t.clone(); changed[:, 10] = (changed[:, 10] + 1) % 40
    moved = torch.nonzero((m(changed)[0] - y).abs().amax((0, 2)) > 1e-6).flatten().tolist()
    assert moved == [10, 11, 12, 13, 14]
    wide = build(memory='none', layers=1, window=64); assert torch.allclose(wide(t)[0], wide(t, torch.zeros_like(t))[0], atol=1e-5)


def test_attention_takes_part_in_qk_clip():
    m = build().train(); opt = MuGrokfast(m, qk_clip=1e-3)
    m(text(), torch.zeros(2, 40, dtype=torch.long))[0].square().mean().backward(); opt.step()
    assert opt.max_logit > 1e-3 and len(opt.attentions) == 2
    kinds = {id(p): g['kind'] for g in parameter_groups(m) for p in g['params']}
    assert kinds[id(m.embed.weight)] == 'adamw' and kinds[id(m.blocks[0].mlp.up.weight)] == 'muon' and kinds[id(m.norm.weight)] == 'adamw'


def test_bad_settings_are_named():
    for bad, word in ((dict(memory='lstm'), 'titans, decay or none'), (dict(capacity=.5), 'capacity'), (dict(surprise_threshold=-1.), 'surprise_threshold'), (dict(n_heads=3), '3 heads'), (dict(memory_heads=3), '3 heads')):
        with pytest.raises(ValueError, match=word): build(**bad)
    with pytest.raises(ValueError, match='a document of 40 tokens; learned positions end at 20'): build(rope=False, max_len=20)(text())


def test_positions_and_first():
    doc = torch.tensor([[5, 5, 5, 2, 2, 5]])
    first = first_of_document(doc)
    assert first.int().tolist() == [[1, 0, 0, 1, 0, 1]] and positions(first).tolist() == [[0, 1, 2, 0, 1, 0]]
    assert visible(doc, doc, 2)[0, 0].int().tolist()[4] == [0, 0, 0, 1, 1, 0]


def test_bf16_autocast_keeps_the_memory_in_float32():
    m, t = build(), text()
    with torch.autocast('cpu', torch.bfloat16): y, numbers, cache = m(t, keep=True)
    assert cache.memory.M.dtype == torch.float32 and y.isfinite().all()
    torch.testing.assert_close(y.float(), m(t)[0], rtol=.2, atol=.1)
