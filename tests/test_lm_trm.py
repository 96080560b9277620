"Recursion, halting, generation: causal, gradients everywhere, cached == uncached. See nbs/lm/09 and 10."
import pytest
import torch
import torch.nn.functional as F

from puzzle_research.core.fit import Trainer
from puzzle_research.core.quantize import count_parameters
from puzzle_research.core.runs import load_state, save_state
from puzzle_research.lm.optimizer import MuGrokfast, clip_qk
from puzzle_research.lm.recursion import CrossAttention, halting, halting_cycle
from puzzle_research.lm.titans_mag import SEED, TitansMAG
from puzzle_research.lm.trm import RecursiveLM, generate, next_tokens, token_losses
from shared import text, with_another_token

NANO = dict(vocab=40, d=32, layers=2, n_heads=2, d_ff=48, window=12, d_mem=16, mag_hidden=8, chunk=8)
LEARNED = dict(memory='decay', rope=False, max_len=64, surprise_threshold=.7, capacity=9.)
KINDS = [
    dict(),
    dict(detach_cycles=True),
    dict(cycles=1, micro_steps=1),
    dict(cycles=0),
    dict(backbone=dict(memory='none')),
    dict(backbone=LEARNED),
]
DOC = torch.tensor([[0]*11 + [1]*29, [0]*25 + [3]*15])


def build(backbone=None, **kw):
    torch.manual_seed(0)
    m = RecursiveLM(TitansMAG(**NANO | (backbone or {})), n_heads=4, **kw)
    m.backbone.embed.weight.data *= 30
    if m.cycles:
        m.halt.weight.data.normal_(0, .5)
    return m.eval()


def without_gradient(m):
    return [n for n, p in m.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize('vocab, total', [(32_768, 26_974_561), (50_257, 32_571_041)])
def test_published_totals(vocab, total):
    assert count_parameters(RecursiveLM(TitansMAG(**SEED | dict(vocab=vocab)))) == total


@pytest.mark.parametrize('kind', KINDS)
def test_no_logit_before_a_change_moves(kind):
    m, t = build(**kind), text()
    y = m(t).answers
    for at in (7, 23, 39):
        moved = (m(with_another_token(t, at)).answers - y).abs().amax((0, 1, 3))
        assert moved[:at].max() < 1e-5 < moved[at]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('threshold', [.2, .6])
def test_halting_is_causal_too(kind, threshold):
    m, t = build(**kind), text()
    y, n, _ = m.read(t, threshold=threshold)
    y2, n2, _ = m.read(with_another_token(t, 20), threshold=threshold)
    torch.testing.assert_close(y[:, :20], y2[:, :20], rtol=1e-4, atol=1e-5)
    assert torch.equal(n[:, :20], n2[:, :20])


@pytest.mark.parametrize('kind', KINDS)
def test_every_parameter_gets_a_gradient_and_the_halt_only_watches(kind):
    m, t = build(**kind).train(), text()
    m.loss(t, DOC)[0].backward()
    assert without_gradient(m) == []
    if not m.cycles:
        return
    grads = {n: p.grad.clone() for n, p in m.named_parameters()}
    m.zero_grad()
    m.loss(t, DOC, ponder_cost=5.)[0].backward()
    def as_before(n, p):
        return torch.allclose(p.grad, grads[n], rtol=1e-4, atol=1e-7)
    differ = {n for n, p in m.named_parameters() if not as_before(n, p)}
    assert differ == {'halt.weight', 'halt.bias'}


def test_loss_is_shifted_masked_and_per_token():
    m, t = build(), text()
    scored = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < .5
    with torch.no_grad():
        loss, metrics = m.loss(t, DOC, scored)
        logits = m.logits(m(t, DOC).answers)
    keep = (DOC[:, 1:] == DOC[:, :-1]) & scored[:, 1:]
    ce = torch.stack([F.cross_entropy(a[:, :-1][keep], t[:, 1:][keep]) for a in logits])
    each = torch.stack([metrics[f'loss_answer_{c}'] for c in range(4)])
    torch.testing.assert_close(each, ce, rtol=1e-4, atol=1e-4)
    w = torch.tensor([.33, .5, .75, 1.])
    by_hand = w @ ce/w.sum() + metrics['loss_act'] + metrics['loss_gate']
    torch.testing.assert_close(loss, by_hand, rtol=1e-4, atol=1e-4)
    assert m.loss(t, DOC, torch.zeros_like(scored))[0].isfinite()              # nothing to predict


def test_copying_its_input_is_not_rewarded():
    "Logits that name the current token give the loss of a guess, not 0."
    t = text(T=300)
    h = F.one_hot(t, 40).float()*20
    assert token_losses(h.flatten(0, 1), torch.eye(40), next_tokens(t).flatten()).mean() > 10


@pytest.mark.parametrize('kind', KINDS)
def test_threshold_0_is_full_and_1_is_none(kind):
    m, t = build(**kind), text()
    for doc in (None, DOC):
        full = m(t, doc).answers
        for threshold, answer in ((0., -1), (1., 0)):
            y, n, _ = m.read(t, doc, threshold=threshold)
            torch.testing.assert_close(y, full[answer], rtol=1e-4, atol=1e-4)
            assert (n == (m.cycles if answer else 0)).all()


def test_a_higher_threshold_never_thinks_longer_and_obeys_the_definition():
    m, t = build(cycles=3), text(B=4)
    cycles = [m.read(t, threshold=x)[1].float().mean().item() for x in (0., .1, .3, .5, .7, .9, 1.)]
    assert cycles == sorted(cycles, reverse=True)
    need = 1 - m(t).halt[..., 0]
    assert torch.equal(m.read(t, threshold=.5)[1] == 0, need < .5)     # at once exactly where need is below


def test_halting_saves_the_computation():
    m, t = build(cycles=3), text(B=4)
    rows, work = [], {}
    m.recursion.refiner.register_forward_hook(lambda mod, a, out: rows.append(out.shape[0]*out.shape[1]))
    for threshold in (0., .4, 1.):
        rows.clear()
        m.read(t, threshold=threshold)
        work[threshold] = sum(rows)
    assert work[1.] == 0 < work[.4] < work[0.] == 4*40*3*2


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('threshold', [0., .35, .7])
def test_reading_in_pieces_equals_reading_at_once(kind, threshold):
    m, t = build(**kind), text()
    cuts = (0, 1, 2, 13, 14, 30, 40)
    for doc in (None, DOC):
        whole, n, _ = m.read(t, doc, threshold=threshold)
        cache, ys, ns = None, [], []
        for a, b in zip(cuts, cuts[1:]):
            own = None if doc is None else doc[:, a:b]
            y, k, cache = m.read(t[:, a:b], own, cache=cache, keep=True, threshold=threshold)
            ys.append(y)
            ns.append(k)
        torch.testing.assert_close(torch.cat(ys, 1), whole, rtol=1e-3, atol=1e-4)
        assert torch.equal(torch.cat(ns, 1), n)


@pytest.mark.parametrize('kind', KINDS)
def test_cached_generation_equals_uncached(kind):
    m, ids = build(**kind), text(1, 6)
    new = generate(m, ids, max_new=25)
    for _ in range(25):
        ids = torch.cat([ids, m.logits(m(ids).answers[-1, :, -1:]).argmax(-1)], 1)
    assert new == ids[0, 6:].tolist()


def test_generation_options():
    m, prompt = build(), text(1, 4)[0]
    drawn = [generate(m, prompt, max_new=30, temperature=1., seed=s) for s in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert generate(m, prompt, max_new=9, temperature=1., top_k=1) == generate(m, prompt, max_new=9)
    stop = drawn[0][5]
    cut = generate(m, prompt, max_new=30, temperature=1., seed=3, stop=(stop,))
    assert cut == drawn[0][:drawn[0].index(stop) + 1]
    assert [c for _, c in m.stream(prompt, max_new=3, threshold=1.)] == [0, 0, 0]
    assert [c for _, c in m.stream(prompt, max_new=3)] == [3, 3, 3]
    with pytest.raises(ValueError, match='empty prompt'):
        generate(m, prompt[:0])


def test_halting_distribution():
    lam = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    p, need = halting(lam)
    torch.testing.assert_close(p.sum(-1), torch.ones(50))
    assert (need[:, 1:] <= need[:, :-1]).all()
    draws = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(1)) < lam[0]
    draws[:, -1] = True
    shares = torch.bincount(draws.int().argmax(1), minlength=4)/20_000.
    torch.testing.assert_close(shares, p[0], rtol=0, atol=.015)
    assert torch.equal(halting_cycle(need, 0.), torch.full((50,), 3)) and not halting_cycle(need, 1.1).any()


@pytest.mark.parametrize('price, cycle', [(.05, 1), (.2, 0)])
def test_price_of_a_cycle_is_what_it_must_bring(price, cycle):
    "Two answers, the second better by .1 nats: it is thought for where a cycle costs less."
    lam = torch.zeros(2, requires_grad=True)
    opt = torch.optim.Adam([lam], .1)
    for _ in range(200):
        p, need = halting(lam.sigmoid())
        opt.zero_grad()
        (p @ torch.tensor([1., .9]) + price*p[1]).backward()
        opt.step()
    assert halting_cycle(need, .5) == cycle


def test_slices_of_the_loss_give_the_same_gradients():
    h, w = torch.randn(50, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    y = torch.randint(-1, 30, (50,))
    y[y < 0] = -100
    losses = [token_losses(h, w, y, limit=n).square().sum() for n in (10**9, 90)]
    for a, b in zip(*(torch.autograd.grad(loss, (h, w)) for loss in losses)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rows_do_not_meet_and_nothing_is_kept():
    m, t = build(), text(B=3)
    y = m(t).answers
    torch.testing.assert_close(m(t[1:2]).answers, y[:, 1:2], rtol=1e-4, atol=1e-5)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    m.train().loss(text(B=4, seed=8))
    m.eval().read(t, keep=True, threshold=.5)
    assert torch.equal(m(t).answers, y)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


class SomeText:
    "Batches as a function of the step."
    def __len__(self):
        return 10

    def __call__(self, step):
        return text(seed=step)


def test_training_resumes_bit_for_bit(tmp_path):
    "Model, optimizer and step through a checkpoint file."
    def trainer():
        m = build(backbone=dict(dropout=.1))
        opt = MuGrokfast(m, 1e-2, lamb=1., qk_clip=1.)
        return Trainer(m, lambda m, b, t: m.loss(b), SomeText(), opt, clip=1., device='cpu')
    whole = trainer().fit(8)
    save_state(tmp_path/'s', trainer().fit(4).state_dict())
    again = trainer()
    again.load_state_dict(load_state(tmp_path/'s'))
    again.fit(8)
    pairs = zip(whole.module.state_dict().values(), again.module.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_qk_clip_bounds_attention_with_biases():
    torch.manual_seed(0)
    attention = CrossAttention(16, 4)
    attention.wk.bias.data += 3
    attention.notes_logits = True
    x, source = torch.randn(2, 2, 7, 16)*9
    attention(x, attention.keys(source))
    clip_qk(attention, 1.)
    attention(x, attention.keys(source))
    assert attention.max_logit.max() < 1.001


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match='halt_threshold is -1'):
        build(halt_threshold=-1.)
    with pytest.raises(ValueError, match='supervision has 2 weights; expected 4'):
        build().loss(text(), supervision=(1., 1.))
