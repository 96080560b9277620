"The memory that learns while it reads: scan == loop, pieces == whole, stable. See nbs/lm/07_memory."
import pytest
import torch
import torch.nn.functional as F

from puzzle_research.lm.memory import empty_memory, memory_loop, memory_scan


def problem(B, heads, T, d, seed=0):
    "Queries, keys, values (d + 3 wide), step, momentum, forgetting; where documents begin."
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)
    q, k = (F.normalize(normal(B, heads, T, d), dim=-1) for _ in range(2))
    v = normal(B, heads, T, d + 3)
    theta, eta = normal(B, heads, T).sigmoid(), normal(B, heads, T).sigmoid()
    alpha = (normal(B, heads, T) - 3).sigmoid()
    first = torch.rand(B, T, generator=g) < .05
    return [x.requires_grad_() for x in (q, k, v, theta, eta, alpha)], first


def assert_equal_states(a, b):
    for name in ('M', 'S', 'held'):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-3, atol=1e-4)
    assert a.into == b.into
    torch.testing.assert_close(a.start, b.start if b.into else b.M, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('chunk', [1, 5, 16, 100])
@pytest.mark.parametrize('threshold, capacity', [(0., 1e9), (0., 4.), (.8, 30.), (1.2, 2.)])
def test_scan_equals_loop(chunk, threshold, capacity):
    args, first = problem(2, 2, 40, 7)
    state = empty_memory(2, 2, 7, 10, args[0])
    for _ in range(2):                                          # from nothing, and from a state that is not
        scan, loop = (f(*args, first, state, threshold, capacity, chunk) for f in (memory_scan, memory_loop))
        assert_equal_states(scan[1], loop[1])
        torch.testing.assert_close(scan[0], loop[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(scan[2], loop[2], rtol=1e-3, atol=1e-4)
        assert torch.equal(scan[3], loop[3])
        losses = [x[0].square().mean() + x[1].M.square().mean() for x in (scan, loop)]
        for a, b in zip(*(torch.autograd.grad(loss, args, retain_graph=True) for loss in losses)):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4)
        now = scan[1]
        state = now._replace(M=now.M.detach(), S=now.S.detach(), start=now.start.detach())


@pytest.mark.parametrize('cuts', [(1, 2, 3), (8, 16), (13,), (31, 33, 59)])
@pytest.mark.parametrize('threshold', [0., .9])
def test_scan_in_pieces_equals_scan(cuts, threshold):
    args, first = problem(2, 1, 60, 7, seed=3)
    state = empty_memory(2, 1, 7, 10, args[0])
    whole, last, *_ = memory_scan(*args, first, state, threshold, 9., 16)
    pieces = []
    for a, b in zip((0, *cuts), (*cuts, 60)):
        cut = [x[:, :, a:b] for x in args]
        y, state, *_ = memory_scan(*cut, first[:, a:b], state, threshold, 9., 16)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 2), whole, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state.M, last.M, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('value', [0., 1.])
@pytest.mark.parametrize('at', [3, 4, 5])
def test_extreme_gates_stay_finite(value, at):
    args, first = problem(1, 1, 64, 8)
    given = [x.detach().clone() for x in args]
    given[at].fill_(value)
    given = [x.requires_grad_() for x in given]
    y, *_ = memory_scan(*given, first, empty_memory(1, 1, 8, 11, args[0]))
    assert y.isfinite().all() and all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), given))


def test_the_delta_rule_recalls_exactly():
    "Orthogonal keys, full step, no forgetting, no momentum: what was written is read back."
    k, v, one = torch.eye(8)[None, None], torch.randn(1, 1, 8, 5), torch.ones(1, 1, 8)
    none = torch.zeros(1, 8, dtype=torch.bool)
    empty = empty_memory(1, 1, 8, 5, k)
    _, state, surprise, _ = memory_scan(k, k, v, one, 0*one, 0*one, none, empty, chunk=3)
    torch.testing.assert_close(k @ state.M, v, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(surprise, one)
    again = memory_scan(k, k, v, one, 0*one, 0*one, none, state._replace(into=0))[2]
    assert again.abs().max() < 1e-3                             # read twice, nothing surprises
