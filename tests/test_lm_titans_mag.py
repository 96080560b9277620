"The backbone: causal, packed == alone, cached == whole, exact counts. See nbs/lm/08_titans_mag."
import pytest
import torch

from puzzle_research.core.quantize import count_parameters
from puzzle_research.lm.attention import first_of_document, positions, visible
from puzzle_research.lm.optimizer import MuGrokfast, parameter_groups
from puzzle_research.lm.titans_mag import SEED, TitansMAG
from shared import text, with_another_token

NANO = dict(vocab=40, d=32, layers=2, n_heads=2, d_ff=48, window=8, d_mem=16, mag_hidden=8, chunk=8)
KINDS = [
    dict(memory='titans', memory_heads=2),
    dict(memory='titans', surprise_threshold=.4, capacity=6.),
    dict(memory='decay'),
    dict(memory='decay', capacity=5., surprise_threshold=.8),
    dict(memory='none'),
    dict(memory='titans', gated=False),
    dict(memory='decay', rope=False, max_len=64),
]


def build(**kw):
    torch.manual_seed(0)
    m = TitansMAG(**NANO | kw)
    m.embed.weight.data *= 30
    return m.eval()


def test_seed_is_the_published_backbone_to_the_parameter():
    m = TitansMAG(**SEED)
    parts = dict(embed=10_485_760, position=655_360, blocks=3_276_800 + 9_830_400 + 5_120, norm=320,
                 memory=102_400, gate=154_080)
    assert {k: count_parameters(getattr(m, k)) for k in parts} == parts
    assert count_parameters(m) == sum(parts.values()) == 24_510_240


@pytest.mark.parametrize('kind', KINDS)
def test_no_token_reaches_back(kind):
    m, t = build(**kind), text()
    y = m(t)[0]
    for at in (5, 17, 39):
        moved = (m(with_another_token(t, at))[0] - y).abs().amax((0, 2))
        assert moved[:at].max() < 1e-6 < moved[at]


@pytest.mark.parametrize('kind', KINDS)
def test_pieces_equal_the_whole(kind):
    m, t = build(**kind), text()
    doc = torch.tensor([[0]*11 + [1]*29, [0]*25 + [3]*15])
    cuts = (0, 1, 2, 12, 13, 30, 40)
    for d in (None, doc):
        whole, cache, pieces = m(t, d)[0], None, []
        for a, b in zip(cuts, cuts[1:]):
            y, _, cache = m(t[:, a:b], None if d is None else d[:, a:b], cache=cache, keep=True)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-3, atol=1e-4)
        assert all(k.shape[2] == NANO['window'] - 1 for k, _ in cache.past)


@pytest.mark.parametrize('kind', [k for k in KINDS if not k.get('surprise_threshold')])
def test_packed_documents_equal_documents_alone(kind):
    m, t = build(**kind), text()
    doc = torch.tensor([[4]*17 + [7]*9 + [4]*14]).expand(2, -1)                    # a number may come again
    alone = torch.cat([m(t[:, a:b])[0] for a, b in ((0, 17), (17, 26), (26, 40))], 1)
    torch.testing.assert_close(m(t, doc)[0], alone, rtol=1e-3, atol=1e-4)


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
    m.train()(text(B=4, seed=9))
    assert torch.equal(m.eval()(t)[0], y)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


@pytest.mark.parametrize('kind', KINDS)
def test_every_parameter_learns(kind):
    m = build(**kind).train()
    y, numbers, _ = m(text())
    (y.square().sum() + numbers.get('gate_entropy', 0)).backward()
    assert [n for n, p in m.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize('memory', ['titans', 'decay'])
def test_capacity_and_threshold_act(memory):
    t = text(T=120)
    few, many = (build(memory=memory, capacity=c)(t) for c in (5., 5000.))
    assert (few[0] - many[0]).abs().max() > 1e-4
    assert few[1]['memory_usage'] > .9 > .1 > many[1]['memory_usage']
    rates = [build(memory=memory, capacity=50., surprise_threshold=x)(t)[1]['surprise_rate'].item()
             for x in (0., .7, .95)]
    assert rates[0] == 1. and rates[0] >= rates[1] >= rates[2] > 0
    if memory == 'titans':
        assert rates[0] > rates[1] > rates[2]


def test_window_is_a_window():
    m, t = build(memory='none', layers=1, window=5), text()
    moved = (m(with_another_token(t, 10))[0] - m(t)[0]).abs().amax((0, 2)) > 1e-6
    assert moved.nonzero().flatten().tolist() == [10, 11, 12, 13, 14]
    wide = build(memory='none', layers=1, window=64)
    torch.testing.assert_close(wide(t)[0], wide(t, torch.zeros_like(t))[0], rtol=1e-4, atol=1e-5)


def test_attention_takes_part_in_qk_clip():
    m = build().train()
    opt = MuGrokfast(m, qk_clip=1e-3)
    m(text(), torch.zeros(2, 40, dtype=torch.long))[0].square().mean().backward()
    opt.step()
    assert opt.max_logit > 1e-3 and len(opt.attentions) == 2
    kinds = {id(p): g['kind'] for g in parameter_groups(m) for p in g['params']}
    some = m.embed.weight, m.blocks[0].mlp.up.weight, m.norm.weight
    assert [kinds[id(p)] for p in some] == ['adamw', 'muon', 'adamw']


@pytest.mark.parametrize('bad, word', [
    (dict(memory='lstm'), 'titans, decay or none'), (dict(capacity=.5), 'capacity'),
    (dict(surprise_threshold=-1.), 'surprise_threshold'), (dict(n_heads=3), '3 heads'),
    (dict(memory_heads=3), '3 heads')])
def test_bad_settings_are_named(bad, word):
    with pytest.raises(ValueError, match=word):
        build(**bad)


def test_a_document_longer_than_the_learned_positions():
    with pytest.raises(ValueError, match='a document of 40 tokens; learned positions end at 20'):
        build(rope=False, max_len=20)(text())


def test_positions_and_first():
    doc = torch.tensor([[5, 5, 5, 2, 2, 5]])
    first = first_of_document(doc)
    assert first.int().tolist() == [[1, 0, 0, 1, 0, 1]] and positions(first).tolist() == [[0, 1, 2, 0, 1, 0]]
    assert visible(doc, doc, 2)[0, 0].int().tolist()[4] == [0, 0, 0, 1, 1, 0]


def test_bf16_autocast_keeps_the_memory_in_float32():
    m, t = build(), text()
    with torch.autocast('cpu', torch.bfloat16):
        y, _, cache = m(t, keep=True)
    assert cache.memory.M.dtype == torch.float32 and y.isfinite().all()
    torch.testing.assert_close(y.float(), m(t)[0], rtol=.2, atol=.1)
