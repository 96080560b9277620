"Recursion, halting, generation: causal, gradients everywhere, halted == full at threshold 0, cached == uncached. The lessons are in nbs/lm/03_trm.ipynb."
import pytest, torch, torch.nn.functional as F

from puzzle_research.core.fit import Trainer
from puzzle_research.core.quantize import count_parameters
from puzzle_research.lm.mugrokfast import MuGrokfast
from puzzle_research.lm.titans_mag import SEED, TitansMAG
from puzzle_research.lm.trm import CrossAttention, RecursiveLM, generate, halting, halting_cycle, next_tokens, token_losses

KINDS = [dict(), dict(detach_cycles=True), dict(cycles=1, micro_steps=1), dict(cycles=0), dict(backbone=dict(memory='none')), dict(backbone=dict(memory='decay', rope=False, max_len=64, surprise_threshold=.7, capacity=9.))]


def build(seed=0, backbone={}, **kw):
    torch.manual_seed(seed)
    m = RecursiveLM(TitansMAG(**dict(vocab=40, d=32, layers=2, n_heads=2, d_ff=48, window=12, d_mem=16, mag_hidden=8, chunk=8) | backbone), n_heads=4, **kw)
    m.backbone.embed.weight.data *= 30
    if m.cycles: m.halt.weight.data.normal_(0, .5)
    return m.eval()

def text(B=2, T=40, seed=1): return torch.randint(40, (B, T), generator=torch.Generator().manual_seed(seed))
DOC = torch.tensor([[0]*11 + [1]*29, [0]*25 + [3]*15])


def test_published_totals():
    assert count_parameters(RecursiveLM(TitansMAG(**SEED))) == 26_974_561
    assert count_parameters(RecursiveLM(TitansMAG(**SEED | dict(vocab=50_257)))) == 32_571_041


@pytest.mark.parametrize('kind', KINDS)
def test_no_logit_before_a_change_moves(kind):
    m, t = build(**kind), text(); y = m(t).answers
    for at in (7, 23, 39):
        changed = t.clone(); changed[:, at] = (changed[:, at] + 1) % 40
        moved = (m(changed).answers - y).abs().amax((0, 1, 3))
        assert moved[:at].max() < 1e-5 < moved[at]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('threshold', [.2, .6])
def test_halting_is_causal_too(kind, threshold):
    m, t = build(**kind), text(); y, n, _ = m.read(t, threshold=threshold)
    changed = t.clone(); changed[:, 20] = (changed[:, 20] + 1) % 40
    y2, n2, _ = m.read(changed, threshold=threshold)
    torch.testing.assert_close(y[:, :20], y2[:, :20], rtol=1e-4, atol=1e-5); assert torch.equal(n[:, :20], n2[:, :20])


@pytest.mark.parametrize('kind', KINDS)
def test_every_parameter_gets_a_gradient_and_the_halt_only_watches(kind):
    m, t = build(**kind).train(), text()
    loss, metrics = m.loss(t, DOC); loss.backward()
    assert [n for n, p in m.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    if not m.cycles: return
    grads = {n: p.grad.clone() for n, p in m.named_parameters()}
    m.zero_grad(); m.loss(t, DOC, ponder_cost=5.)[0].backward()
    differ = {n for n, p in m.named_parameters() if not torch.allclose(p.grad, grads[n], rtol=1e-4, atol=1e-7)}
    assert differ == {'halt.weight', 'halt.bias'}


def test_loss_is_shifted_masked_and_per_token():
    m, t = build(), text(); scored = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < .5
    with torch.no_grad(): loss, metrics = m.loss(t, DOC, scored)
    logits = m.logits(m(t, DOC).answers)
    keep = (DOC[:, 1:] == DOC[:, :-1]) & scored[:, 1:]
    ce = torch.stack([F.cross_entropy(a[:, :-1][keep], t[:, 1:][keep]) for a in logits])
    torch.testing.assert_close(torch.stack([metrics[f'loss_answer_{c}'] for c in range(4)]), ce.detach(), rtol=1e-4, atol=1e-4)
    w = torch.tensor([.33, .5, .75, 1.])
    torch.testing.assert_close(loss, w @ ce/w.sum() + metrics['loss_act'] + metrics['loss_gate'], rtol=1e-4, atol=1e-4)
    nothing, _ = m.loss(t, DOC, torch.zeros_like(scored)); assert nothing.isfinite()


def test_copying_its_input_is_not_rewarded():
    "Logits that name the current token give the loss of a guess, not 0."
    t = text(T=300); h = F.one_hot(t, 40).float()*20
    assert token_losses(h.flatten(0, 1), torch.eye(40), next_tokens(t).flatten()).mean() > 10


@pytest.mark.parametrize('kind', KINDS)
def test_threshold_0_is_full_and_1_is_none(kind):
    m, t = build(**kind), text()
    for doc in (None, DOC):
        full = m(t, doc).answers
        for threshold, at in ((0., -1), (1., 0)):
            y, n, _ = m.read(t, doc, threshold=threshold)
            torch.testing.assert_close(y, full[at], rtol=1e-4, atol=1e-4); assert (n == (m.cycles if at else 0)).all()


def test_a_higher_threshold_never_thinks_longer_and_obeys_the_definition():
    m, t = build(cycles=3), text(B=4); last = None
    for threshold in (0., .1, .3, .5, .7, .9, 1.):
        n = m.read(t, threshold=threshold)[1]
        assert last is None or (n.float().mean() <= last + 1e-6); last = n.float().mean()
    need0 = 1 - m(t).halt[..., 0]
    assert torch.equal(m.read(t, threshold=.5)[1] == 0, need0 < .5)       # halts at once exactly where its need is below


def test_halting_saves_the_computation():
    m, t = build(cycles=3), text(B=4); rows = []
    m.recursion.refiner.register_forward_hook(lambda mod, a, out: rows.append(out.shape[0]*out.shape[1]))
    work = {}
    for threshold in (0., .4, 1.): rows.clear(); m.read(t, threshold=threshold)[1]; work[threshold] = sum(rows)
    assert work[1.] == 0 < work[.4] < work[0.] == 4*40*3*2


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('threshold', [0., .35, .7])
def test_reading_in_pieces_equals_reading_at_once(kind, threshold):
    m, t = build(**kind), text()
    for doc in (None, DOC):
        whole, n, _ = m.read(t, doc, threshold=threshold); cache, ys, ns = None, [], []
        for a, b in zip((0, 1, 2, 13, 14, 30), (1, 2, 13, 14, 30, 40)):
            y, k, cache = m.read(t[:, a:b], doc[:, a:b] if doc is not None else None, cache=cache, keep=True, threshold=threshold); ys.append(y); ns.append(k)
        torch.testing.assert_close(torch.cat(ys, 1), whole, rtol=1e-3, atol=1e-4); assert torch.equal(torch.cat(ns, 1), n)


@pytest.mark.parametrize('kind', KINDS)
def test_cached_generation_equals_uncached(kind):
    m, ids = build(**kind), text(1, 6)
    new = generate(m, ids, max_new=25)
    for _ in range(25): ids = torch.cat([ids, m.logits(m(ids).answers[-1, :, -1:]).argmax(-1)], 1)
    assert new == ids[0, 6:].tolist()


def test_generation_options():
    m, prompt = build(), text(1, 4)[0]
    a = generate(m, prompt, max_new=30, temperature=1., seed=3)
    assert a == generate(m, prompt, max_new=30, temperature=1., seed=3) != generate(m, prompt, max_new=30, temperature=1., seed=4)
    assert generate(m, prompt, max_new=9, temperature=1., top_k=1) == generate(m, prompt, max_new=9)
    stop = a[5]; assert generate(m, prompt, max_new=30, temperature=1., seed=3, stop=(stop,)) == a[:a.index(stop) + 1]
    assert all(c == 0 for _, c in m.stream(prompt, max_new=3, threshold=1.)) and all(c == 3 for _, c in m.stream(prompt, max_new=3))
    with pytest.raises(ValueError, match='empty prompt'): generate(m, prompt[:0])


def test_halting_distribution():
    lam = torch.rand(50, 4, generator=torch.Generator().manual_seed(0)); p, need = halting(lam)
    torch.testing.assert_close(p.sum(-1), torch.ones(50)); assert (need[:, 1:] <= need[:, :-1]).all()
    draws = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(1)) < lam[0]; draws[:, -1] = True
    torch.testing.assert_close(torch.bincount(draws.int().argmax(1), minlength=4)/20_000., p[0], rtol=0, atol=.015)
    assert torch.equal(halting_cycle(need, 0.), torch.full((50,), 3)) and not halting_cycle(need, 1.1).any()


def test_price_of_a_cycle_is_what_it_must_bring():
    "Two answers, the second better by .1 nats: it is thought for where a cycle costs less."
    for price, want in ((.05, 1), (.2, 0)):
        lam = torch.zeros(2, requires_grad=True); opt = torch.optim.Adam([lam], .1)
        for _ in range(200):
            p, need = halting(lam.sigmoid()); opt.zero_grad(); (p @ torch.tensor([1., .9]) + price*p[1]).backward(); opt.step()
        assert halting_cycle(need, .5) == want


def test_slices_of_the_loss_give_the_same_gradients():
    h, w = torch.randn(50, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True); y = torch.randint(-1, 30, (50,)); y[y < 0] = -100
    for a, b in zip(*(torch.autograd.grad(token_losses(h, w, y, limit=n).square().sum(), (h, w)) for n in (10**9, 90))): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rows_do_not_meet_and_nothing_is_kept():
    m, t = build(), text(B=3); y = m(t).answers
    torch.testing.assert_close(m(t[1:2]).answers, y[:, 1:2], rtol=1e-4, atol=1e-5)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    m.train(); m.loss(text(B=4, seed=8)); m.eval(); m.read(t, keep=True, threshold=.5)
    assert torch.equal(m(t).answers, y) and all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_training_resumes_bit_for_bit(tmp_path):
    "Model, optimizer and step through a checkpoint file."
    from puzzle_research.core.runs import load_state, save_state
    class Some:
        def __len__(self): return 10
        def __call__(self, step): return text(seed=step)
    def trainer(): m = build(backbone=dict(dropout=.1)); return Trainer(m, lambda m, b, t: m.loss(b), Some(), MuGrokfast(m, 1e-2, lamb=1., qk_clip=1.), clip=1., device='cpu')
    whole = trainer(); torch.manual_seed(5); whole.fit(8)
    half = trainer(); torch.manual_seed(5); half.fit(4); save_state(tmp_path/'s', half.state_dict())
    again = trainer(); again.load_state_dict(load_state(tmp_path/'s')); again.fit(8)
    assert all(torch.equal(a, b) for a, b in zip(whole.module.state_dict().values(), again.module.state_dict().values()))


def test_qk_clip_bounds_attention_with_biases():
    torch.manual_seed(0); a = CrossAttention(16, 4); a.wk.bias.data += 3; a.notes_logits = True
    from puzzle_research.lm.mugrokfast import clip_qk
    x, s = torch.randn(2, 2, 7, 16)*9
    a(x, a.keys(s)); clip_qk(a, 1.); a(x, a.keys(s))
    assert a.max_logit.max() < 1.001


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match='halt_threshold is -1'): build(halt_threshold=-1.)
    with pytest.raises(ValueError, match='supervision has 2 weights; expected 4'): build().loss(text(), supervision=(1., 1.))
