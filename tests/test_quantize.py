"Quantisers: oracles, exact resume, several processes, compiled graphs. The lessons are in nbs/core/03_quantize.ipynb."
import copy, subprocess, sys, textwrap

import pytest, torch, torch.nn.functional as F
from torch import nn
from vector_quantize_pytorch import VectorQuantize

from puzzle_research.core.quantize import (KINDS, VectorQuantizer, ResidualQuantizer, count_parameters, freeze, kmeans,
    distance, make_quantizer, nearest_code, update_quantizers)

LEARNING = ['ema', 'gradient', 'residual', 'rotation']


def batches(n, shape=(4, 50), dim=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, dim, generator=g)*3
    return [centres[torch.randint(40, shape, generator=g)] + .2*torch.randn(*shape, dim, generator=g) for _ in range(n)]


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('cosine', [False, True])
@pytest.mark.parametrize('rotation', [False, True])
def test_peer_gives_the_same_indices_gradients_and_ema_steps(cosine, rotation):
    torch.manual_seed(0)
    peer = VectorQuantize(8, 50, decay=.95, eps=0., use_cosine_sim=cosine, rotation_trick=rotation, commitment_weight=.25)
    ours = VectorQuantizer(8, 50, decay=.95, cosine=cosine, rotation_trick=rotation)
    ours.codes.copy_(peer.codebook); ours.embed_sum.copy_(peer.codebook)
    for z in batches(10):
        z1, z2 = z.clone().requires_grad_(), z.clone().requires_grad_()
        q, i, loss = peer(z1)
        out = ours(z2)
        target = torch.randn_like(z)
        (F.mse_loss(q, target) + loss).backward(); (F.mse_loss(out.z_q, target) + out.loss).backward()
        ours.update()
        assert torch.equal(out.indices, i)
        torch.testing.assert_close(out.z_q, q); torch.testing.assert_close(out.loss, loss); torch.testing.assert_close(z2.grad, z1.grad)
        torch.testing.assert_close(ours.codes, peer.codebook); torch.testing.assert_close(ours.cluster_size, peer._codebook.cluster_size[0])


def test_published_gradient_codebook_step():
    torch.manual_seed(0)
    q = make_quantizer('gradient', 64, 10)
    assert q.codes.abs().max() <= 1/10 and dict(q.named_parameters()).keys() == {'codes'}
    z, codes = torch.randn(3, 30, 30, 64, requires_grad=True), q.codes.detach().clone()
    out = q(z)
    d = (z.detach()[...,None,:] - codes).square().sum(-1)
    assert torch.equal(out.indices, d.argmin(-1)) and torch.equal(out.z_q.detach(), codes[out.indices])
    torch.testing.assert_close(out.loss, 1.25*F.mse_loss(z.detach(), codes[out.indices]))
    out.loss.backward()
    numel, won = z.numel(), out.indices == 3
    torch.testing.assert_close(q.codes.grad[3], 2*(codes[3] - z.detach()[won]).sum(0)/numel)
    torch.testing.assert_close(z.grad, .25*2*(z.detach() - codes[out.indices])/numel)


def test_an_unused_code_stays_where_it_is():
    q = VectorQuantizer(2, 3, decay=.5)
    q.codes.copy_(torch.tensor([[0., 0.], [9., 9.], [-7., 3.]])); q.embed_sum.copy_(q.codes)
    for _ in range(300): q(torch.randn(20, 2)*.1); q.update()
    torch.testing.assert_close(q.codes[1:], torch.tensor([[9., 9.], [-7., 3.]]))
    q(torch.full((4, 2), 8.)); q.update()
    torch.testing.assert_close(q.codes[1], torch.tensor([8., 8.]))


@pytest.mark.parametrize('learning', ['ema', 'gradient'])
def test_kmeans_init_survives_the_first_update(learning):
    z = batches(1, (4000,))[0]
    q = VectorQuantizer(8, 40, learning=learning, kmeans_init=True, restart_threshold=.01)
    q(z); began = q.codes.detach().clone()
    found = distance(z, began).mean()
    assert found < .05*distance(z, z.mean(0, keepdim=True)).mean()
    q.update(); q(z); q.update()
    assert (q.codes - began).abs().max() < .02 and torch.isclose(distance(z, q.codes).mean(), found, rtol=.01)


def test_kmeans_finds_clusters_and_never_a_centre_twice():
    z = batches(1, (3000,))[0]
    centres, counts = kmeans(z, 40, 10, torch.Generator().manual_seed(0))
    assert len(centres.unique(dim=0)) == 40 and counts.sum() == 3000 and counts.min() > 0
    few, counts = kmeans(z[:5].repeat(100, 1), 40, 10, torch.Generator().manual_seed(0))
    assert len(few) == 5 and counts.tolist() == [100]*5


def test_kmeans_init_with_fewer_vectors_than_codes_then_restarts():
    q = make_quantizer('ema', 8, 64, decay=.9)
    z = batches(100, (16,))
    for x in z: q(x); q.update()
    assert q.codes.isfinite().all() and len(q.codes.unique(dim=0)) == 64
    assert nearest_code(torch.cat(z), q.codes).unique().numel() > 30


@pytest.mark.parametrize('learning', ['ema', 'gradient'])
@pytest.mark.parametrize('cosine', [False, True])
def test_a_revived_code_survives_the_next_update(learning, cosine):
    z = batches(1, (2000,))[0]
    q = VectorQuantizer(8, 64, learning=learning, restart_threshold=.1, restart_limit=5, decay=.9, cosine=cosine)
    for _ in range(30): q(z); q.update()
    before = q.codes.detach().clone()
    dead = (q.cluster_size < .1*q.cluster_size.mean()*1.2).nonzero().squeeze(1)
    seen = 0
    for _ in range(40):
        q(z); q.update()
        moved = ((q.codes - before).norm(dim=1) > .05).nonzero().squeeze(1)
        if len(moved):
            revived = q.codes[moved].detach().clone()
            assert len(moved) <= 5 and len(revived.unique(dim=0)) == len(moved)
            assert (q.cluster_size[moved] > .5*q.cluster_size.mean()).all()
            unit = F.normalize(z, dim=1) if cosine else z
            if learning == 'gradient': assert distance(revived, unit).max() == 0, 'not one of the vectors'
            q(z); q.update()
            assert (q.cluster_size[moved] > .1*q.cluster_size.mean()).all(), 'dead again'
            assert (q.codes[moved] - revived).norm(dim=1).max() < 1., 'gone back'
            seen += len(moved)
        before = q.codes.detach().clone()
    assert seen or len(dead) == 0
    assert (q.cluster_size > .02*q.cluster_size.mean()).float().mean() > .6


@pytest.mark.parametrize('kind', [k for k in KINDS if k != 'none'])
def test_eval_leaves_every_buffer_and_the_random_state_alone(kind):
    q = make_quantizer(kind, 8, 16)
    for z in batches(3): q(z); q.update()
    before, rng = copy.deepcopy(q.state_dict()), torch.get_rng_state()
    q.eval()
    for z in batches(3, seed=1): q(z); update_quantizers(q)
    assert states_equal(q.state_dict(), before) and torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize('kind', LEARNING)
def test_learn_false_and_freeze_collect_nothing(kind):
    q = make_quantizer(kind, 8, 16)
    for z in batches(3): q(z); q.update()
    before = copy.deepcopy(q.state_dict())
    frozen = freeze(copy.deepcopy(q)).train()
    for z in batches(3, seed=1): q(z, learn=False); frozen(z); update_quantizers(nn.ModuleList([q, frozen]))
    assert states_equal(q.state_dict(), before) and states_equal(frozen.state_dict(), before)
    assert count_parameters(frozen) == 0


@pytest.mark.parametrize('kind', list(KINDS))
def test_padding_never_matters(kind):
    torch.manual_seed(0)
    a = make_quantizer(kind, 8, 16); b, c = copy.deepcopy(a), copy.deepcopy(a)
    for n, z in enumerate(batches(4)):
        mask = torch.rand(z.shape[:2], generator=torch.Generator().manual_seed(n)) > .5
        dirty = torch.where(mask[...,None], z, torch.nan)
        x, y, w = a(z[mask]), b(z, mask), c(dirty, mask)
        assert torch.equal(y.indices[mask], x.indices) and (y.indices[~mask] == -1).all() and torch.equal(y.indices, w.indices)
        assert torch.equal(y.z_q[mask], x.z_q) and (y.z_q[~mask] == 0).all() and torch.equal(y.loss, x.loss) and torch.equal(y.loss, w.loss)
        for q in (a, b, c): q.update()
    assert states_equal(a.state_dict(), b.state_dict()) and states_equal(a.state_dict(), c.state_dict())


@pytest.mark.parametrize('kind', list(KINDS))
def test_all_padded_gives_zero_loss_with_a_gradient_and_no_update(kind):
    q = make_quantizer(kind, 8, 16)
    fresh = copy.deepcopy(q.state_dict())
    q(torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)); q.update()
    assert states_equal(q.state_dict(), fresh)
    q(torch.randn(64, 8)); q.update(); before = copy.deepcopy(q.state_dict())
    z = torch.randn(2, 5, 8, requires_grad=True)
    out = q(z, torch.zeros(2, 5, dtype=torch.bool))
    (out.z_q.sum() + out.loss).backward(); q.update()
    assert out.loss == 0 and (z.grad == 0).all() and states_equal(q.state_dict(), before)


@pytest.mark.parametrize('kind', LEARNING)
def test_accumulated_forwards_are_one_large_batch(kind):
    torch.manual_seed(0)
    a = make_quantizer(kind, 8, 16); b = copy.deepcopy(a)
    first, *rest = batches(8, (64,))
    for q in (a, b): q(first); q.update()
    for m in (*a.modules(), *b.modules()):
        if isinstance(m, VectorQuantizer): m.restart_threshold = 0.
    a(torch.cat(rest)); a.update()
    for z in rest: b(z)
    b.update(); b.update()
    for x, y in zip(a.state_dict().values(), b.state_dict().values()): torch.testing.assert_close(x, y)


@pytest.mark.parametrize('kind', LEARNING)
def test_resume_equals_uninterrupted_and_not_cold(kind, tmp_path):
    torch.manual_seed(0)
    def train(q, opt, data):
        for z in data: q(z).loss.backward() if opt else q(z); opt and (opt.step(), opt.zero_grad()); q.update()
        return q.state_dict()
    data = batches(60, (64,))
    knobs = dict(decay=.9, restart_threshold=.1)
    q = make_quantizer(kind, 8, 32, **knobs)
    opt = torch.optim.SGD(q.parameters(), .1) if kind == 'gradient' else None
    train(q, opt, data[:30])
    torch.save(q.state_dict(), tmp_path/'q.pt')
    torch.manual_seed(99)
    other = make_quantizer(kind, 8, 32, **knobs)
    cold = copy.deepcopy(other)
    other.load_state_dict(torch.load(tmp_path/'q.pt'))
    whole = train(q, opt, data[30:])
    torch.manual_seed(7)
    sgd = lambda m: torch.optim.SGD(m.parameters(), .1) if kind == 'gradient' else None
    assert states_equal(whole, train(other, sgd(other), data[30:]))
    assert not states_equal(whole, train(cold, sgd(cold), data[30:]))


def test_codes_outlive_autocast_and_low_precision():
    torch.manual_seed(0)
    a = make_quantizer('ema', 8, 32); b = copy.deepcopy(a)
    for z in batches(5):
        x = a(z)
        with torch.autocast('cpu', torch.bfloat16): y = b(z)
        assert torch.equal(x.indices, y.indices) and y.z_q.dtype == torch.float32
        a.update(); b.update()
    assert states_equal(a.state_dict(), b.state_dict())
    assert b(z.bfloat16()).z_q.dtype == torch.bfloat16


def test_decode_is_the_forward_bit_for_bit():
    for kind in KINDS:
        if kind == 'none': continue
        q = make_quantizer(kind, 8, 16)
        z = batches(1, (3, 6, 5))[0]
        q(z); q.update(); out = q(z)
        assert torch.equal(q.decode(out.indices), out.z_q) or kind in ('fsq', 'lfq') and torch.allclose(q.decode(out.indices), out.z_q, atol=1e-6)
        if not isinstance(q, ResidualQuantizer): torch.testing.assert_close(q.codebook[out.indices], out.z_q)


def test_a_nan_stops_before_it_reaches_the_codebook():
    q = make_quantizer('ema', 8, 16)
    q(torch.randn(64, 8)); q.update(); before = copy.deepcopy(q.state_dict())
    q(torch.full((4, 8), torch.nan))
    with pytest.raises(FloatingPointError, match='codebook is unchanged'): q.update()
    assert states_equal(q.state_dict(), before)


def test_a_nan_in_the_first_batch_stops_kmeans():
    with pytest.raises(FloatingPointError, match='first batch'): make_quantizer('ema', 8, 16)(torch.full((4, 8), torch.nan))


def test_no_code_dies_on_768_codes():
    g, centres = torch.Generator().manual_seed(0), torch.randn(768, 16, generator=torch.Generator().manual_seed(1))
    draw = lambda n: centres[torch.randint(768, (n,), generator=g)] + .15*torch.randn(n, 16, generator=g)
    q = VectorQuantizer(16, 768, decay=.95, restart_threshold=.1)
    for _ in range(150): q(draw(2048)); q.update()
    p = q.eval()(draw(20_000)).indices.bincount(minlength=768)/20_000
    assert (p > 0).float().mean() > .97 and torch.special.entr(p).sum().exp() > .85*768


def test_compiles_as_one_graph():
    torch.manual_seed(0)
    a = VectorQuantizer(8, 16, restart_threshold=.1); b = copy.deepcopy(a)
    compiled = torch.compile(b, fullgraph=True, backend='aot_eager')
    for z in batches(6):
        z1, z2 = z.clone().requires_grad_(), z.clone().requires_grad_()
        x, y = a(z1), compiled(z2)
        (x.z_q.square().sum() + x.loss).backward(); (y.z_q.square().sum() + y.loss).backward()
        a.update(); b.update()
        assert torch.equal(x.indices, y.indices); torch.testing.assert_close(z1.grad, z2.grad)
    for x, y in zip(a.state_dict().values(), b.state_dict().values()): torch.testing.assert_close(x, y)


WORKER = textwrap.dedent('''
    import sys, torch, torch.distributed as dist
    from puzzle_research.core.quantize import make_quantizer
    rank, world, folder, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    if world > 1: dist.init_process_group('gloo', init_method=f'file://{folder}/store_{kind}', rank=rank, world_size=world)
    torch.manual_seed(0)
    q = make_quantizer(kind, 8, 32, decay=.9)
    g = torch.Generator().manual_seed(1)
    centres = torch.randn(200, 8, generator=g)*3
    history = []
    for step in range(25):
        z = centres[torch.randint(200, (96,), generator=g)] + .2*torch.randn(96, 8, generator=g)
        mask = torch.rand(96, generator=g) > .2
        cut = [0, 30, 96] # processes need not have equal shares
        mine = slice(cut[rank], cut[rank+1]) if world > 1 else slice(None)
        if step % 7 == 6: # and may sit a step out
            if world == 1: q(z[30:], mask[30:])
            elif rank == 1: q(z[mine], mask[mine])
        else: q(z[mine], mask[mine])
        q.update()
        history.append({k: v.clone() for k, v in q.state_dict().items()})
    torch.save(history, f'{folder}/{kind}_{world}_{rank}.pt')
''')


@pytest.mark.parametrize('kind', ['ema', 'residual'])
def test_two_processes_equal_one_with_both_batches(kind, tmp_path):
    (tmp_path/'worker.py').write_text(WORKER)
    start = lambda rank, world: subprocess.Popen([sys.executable, tmp_path/'worker.py', str(rank), str(world), str(tmp_path), kind])
    workers = [start(0, 1), start(0, 2), start(1, 2)]
    try: assert [w.wait(timeout=600) for w in workers] == [0, 0, 0]
    finally:
        for w in workers: w.kill()
    one, first, second = [torch.load(tmp_path/f'{kind}_{n}.pt') for n in ('1_0', '2_0', '2_1')]
    restarts = 0
    for step, (a, b, c) in enumerate(zip(one, first, second)):
        assert states_equal(b, c), f'ranks differ at step {step}'
        for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-5, msg=lambda m: f'step {step}, {k}: {m}')
        if step: restarts += sum((a[k] - one[step-1][k]).norm(dim=1).gt(1).sum().item() for k in a if k.endswith('codes'))
    assert restarts > 3, 'the run has no restarts: it does not test them'
