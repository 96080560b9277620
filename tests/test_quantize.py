"Quantisers: oracles, exact resume, several processes, compiled graphs. The lessons are in nbs/core/03*."
import copy

import pytest, torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from vector_quantize_pytorch import VectorQuantize

from puzzle_research.core.kmeans import distance, kmeans, mixture
from puzzle_research.core.quantize import (KINDS, ResidualQuantizer, VectorQuantizer, count_parameters,
                                           freeze, make_quantizer, nearest_code, update_quantizers)
from shared import finish_child, start_child

LEARNING = ['ema', 'gradient', 'residual', 'rotation']


def batches(n, shape=(4, 50), dim=8, seed=0):
    "Vectors of forty clusters that lie well apart."
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, dim, generator=generator)*3
    def draw():
        which = torch.randint(40, shape, generator=generator)
        return centres[which] + .2*torch.randn(*shape, dim, generator=generator)
    return [draw() for _ in range(n)]


def taught(q, data):
    "The quantiser, after an update for each batch."
    for z in data:
        q(z)
        q.update()
    return q


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def place(q, codes):
    q.codes.copy_(codes)
    q.embed_sum.copy_(q.codes)


# oracles

@pytest.mark.parametrize('cosine', [False, True])
@pytest.mark.parametrize('rotation', [False, True])
def test_peer_gives_the_same_indices_gradients_and_ema_steps(cosine, rotation):
    torch.manual_seed(0)
    peer = VectorQuantize(8, 50, decay=.95, eps=0., use_cosine_sim=cosine, rotation_trick=rotation,
                          commitment_weight=.25)
    ours = VectorQuantizer(8, 50, decay=.95, cosine=cosine, rotation_trick=rotation)
    place(ours, peer.codebook)
    for z in batches(10):
        z1, z2, target = z.clone().requires_grad_(), z.clone().requires_grad_(), torch.randn_like(z)
        (q, indices, loss), out = peer(z1), ours(z2)
        (F.mse_loss(q, target) + loss).backward()
        (F.mse_loss(out.z_q, target) + out.loss).backward()
        ours.update()
        assert torch.equal(out.indices, indices)
        assert_close((out.z_q, out.loss, z2.grad), (q, loss, z1.grad))
        assert_close((ours.codes, ours.cluster_size), (peer.codebook, peer._codebook.cluster_size[0]))


def test_published_gradient_codebook_step():
    torch.manual_seed(0)
    q = make_quantizer('gradient', 64, 10)
    assert q.codes.abs().max() <= 1/10 and dict(q.named_parameters()).keys() == {'codes'}
    z, codes = torch.randn(3, 30, 30, 64, requires_grad=True), q.codes.detach().clone()
    out, still = q(z), z.detach()
    squared = (still[...,None,:] - codes).square().sum(-1)
    assert torch.equal(out.indices, squared.argmin(-1)) and torch.equal(out.z_q.detach(), codes[out.indices])
    assert_close(out.loss, 1.25*F.mse_loss(still, codes[out.indices]))
    out.loss.backward()
    won = still[out.indices == 3]
    assert_close(q.codes.grad[3], 2*(codes[3] - won).sum(0)/z.numel())
    assert_close(z.grad, .25*2*(still - codes[out.indices])/z.numel())


def test_an_unused_code_stays_where_it_is():
    q = VectorQuantizer(2, 3, decay=.5)
    place(q, torch.tensor([[0., 0.], [9., 9.], [-7., 3.]]))
    taught(q, [torch.randn(20, 2)*.1 for _ in range(300)])
    assert_close(q.codes[1:], torch.tensor([[9., 9.], [-7., 3.]]))
    taught(q, [torch.full((4, 2), 8.)])
    assert_close(q.codes[1], torch.tensor([8., 8.]))


# k-means and restarts

@pytest.mark.parametrize('learning', ['ema', 'gradient'])
def test_kmeans_init_survives_the_first_update(learning):
    z = batches(1, (4000,))[0]
    q = VectorQuantizer(8, 40, learning=learning, kmeans_init=True, restart_threshold=.01)
    q(z)
    began = q.codes.detach().clone()
    found = distance(z, began).mean()
    assert found < .05*distance(z, z.mean(0, keepdim=True)).mean()
    q.update()
    taught(q, [z])
    assert (q.codes - began).abs().max() < .02
    assert_close(distance(z, q.codes).mean(), found, rtol=.01, atol=0)


def test_kmeans_finds_clusters_and_never_a_centre_twice():
    z = batches(1, (3000,))[0]
    centres, counts = kmeans(z, 40, 10, torch.Generator().manual_seed(0))
    assert len(centres.unique(dim=0)) == 40 and counts.sum() == 3000 and counts.min() > 0
    few, counts = kmeans(z[:5].repeat(100, 1), 40, 10, torch.Generator().manual_seed(0))
    assert len(few) == 5 and counts.tolist() == [100]*5


def test_kmeans_init_with_fewer_vectors_than_codes_then_restarts():
    z = batches(100, (16,))
    q = taught(make_quantizer('ema', 8, 64, decay=.9), z)
    assert q.codes.isfinite().all() and len(q.codes.unique(dim=0)) == 64
    assert nearest_code(torch.cat(z), q.codes).unique().numel() > 30


@pytest.mark.parametrize('learning', ['ema', 'gradient'])
@pytest.mark.parametrize('cosine', [False, True])
def test_a_revived_code_survives_the_next_update(learning, cosine):
    z, seen = batches(1, (2000,))[0], 0
    knobs = dict(restart_threshold=.1, restart_limit=5, decay=.9)
    q = VectorQuantizer(8, 64, learning=learning, cosine=cosine, **knobs)
    taught(q, [z]*30)
    for _ in range(40):
        before = q.codes.detach().clone()
        taught(q, [z])
        moved = ((q.codes - before).norm(dim=1) > .05).nonzero().squeeze(1)
        if len(moved):
            check_revived(q, moved, F.normalize(z, dim=1) if cosine else z)
            seen += len(moved)
    assert seen and (q.cluster_size > .02*q.cluster_size.mean()).float().mean() > .6


def check_revived(q, moved, z):
    revived, mean = q.codes[moved].detach().clone(), q.cluster_size.mean()
    assert len(moved) <= 5 and len(revived.unique(dim=0)) == len(moved)
    assert (q.cluster_size[moved] > .5*mean).all()
    if q.learning == 'gradient':
        assert distance(revived, z).max() == 0, 'not one of the vectors'
    taught(q, [z])
    assert (q.cluster_size[moved] > .1*q.cluster_size.mean()).all(), 'dead again'
    assert (q.codes[moved] - revived).norm(dim=1).max() < 1., 'gone back'


def test_no_code_dies_on_256_codes():
    generator = torch.Generator().manual_seed(0)
    def draw(n): return mixture(n, 256, 16, generator)
    q = VectorQuantizer(16, 256, decay=.95, restart_threshold=.1)
    taught(q, [draw(1024) for _ in range(120)])
    p = q.eval()(draw(10_000)).indices.bincount(minlength=256)/10_000
    assert (p > 0).float().mean() > .97 and torch.special.entr(p).sum().exp() > .85*256


# what teaches the codebook, and what does not

@pytest.mark.parametrize('kind', [k for k in KINDS if k != 'none'])
def test_eval_leaves_every_buffer_and_the_random_state_alone(kind):
    q = taught(make_quantizer(kind, 8, 16), batches(3))
    before, random = copy.deepcopy(q.state_dict()), torch.get_rng_state()
    taught(q.eval(), batches(3, seed=1))
    assert states_equal(q.state_dict(), before) and torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize('kind', LEARNING)
def test_learn_false_and_freeze_collect_nothing(kind):
    q = taught(make_quantizer(kind, 8, 16), batches(3))
    before, frozen = copy.deepcopy(q.state_dict()), freeze(copy.deepcopy(q)).train()
    for z in batches(3, seed=1):
        q(z, learn=False)
        frozen(z)
        update_quantizers(nn.ModuleList([q, frozen]))
    assert states_equal(q.state_dict(), before) and states_equal(frozen.state_dict(), before)
    assert count_parameters(frozen) == 0


@pytest.mark.parametrize('kind', list(KINDS))
def test_padding_never_matters(kind):
    torch.manual_seed(0)
    alone = make_quantizer(kind, 8, 16)
    padded, dirty = copy.deepcopy(alone), copy.deepcopy(alone)
    for n, z in enumerate(batches(4)):
        mask = torch.rand(z.shape[:2], generator=torch.Generator().manual_seed(n)) > .5
        x, y, w = alone(z[mask]), padded(z, mask), dirty(torch.where(mask[...,None], z, torch.nan), mask)
        assert torch.equal(y.indices[mask], x.indices) and (y.indices[~mask] == -1).all()
        assert torch.equal(y.z_q[mask], x.z_q) and (y.z_q[~mask] == 0).all()
        assert torch.equal(y.loss, x.loss) and torch.equal(y.loss, w.loss)
        assert torch.equal(y.indices, w.indices)
        update_quantizers(nn.ModuleList([alone, padded, dirty]))
    assert states_equal(alone.state_dict(), padded.state_dict())
    assert states_equal(alone.state_dict(), dirty.state_dict())


@pytest.mark.parametrize('kind', list(KINDS))
def test_all_padded_gives_zero_loss_with_a_gradient_and_no_update(kind):
    q, nothing = make_quantizer(kind, 8, 16), torch.zeros(2, 5, dtype=torch.bool)
    fresh = copy.deepcopy(q.state_dict())
    q(torch.randn(2, 5, 8), nothing)
    q.update()
    assert states_equal(q.state_dict(), fresh)
    taught(q, [torch.randn(64, 8)])
    before, z = copy.deepcopy(q.state_dict()), torch.randn(2, 5, 8, requires_grad=True)
    out = q(z, nothing)
    (out.z_q.sum() + out.loss).backward()
    q.update()
    assert out.loss == 0 and (z.grad == 0).all() and states_equal(q.state_dict(), before)


@pytest.mark.parametrize('kind', LEARNING)
def test_accumulated_forwards_are_one_large_batch(kind):
    torch.manual_seed(0)
    first, *rest = batches(8, (64,))
    whole = taught(make_quantizer(kind, 8, 16), [first])
    for m in whole.modules():
        if isinstance(m, VectorQuantizer):
            m.restart_threshold = 0.
    parts = copy.deepcopy(whole)
    taught(whole, [torch.cat(rest)])
    for z in rest:
        parts(z)
    for _ in range(2):
        parts.update()
    assert_close(whole.state_dict(), parts.state_dict())


@pytest.mark.parametrize('kind', LEARNING)
def test_resume_equals_uninterrupted_and_not_cold(kind, tmp_path):
    torch.manual_seed(0)
    data, knobs = batches(60, (64,)), dict(decay=.9, restart_threshold=.1)
    def train(q, data):
        optimizer = torch.optim.SGD([*q.parameters(), nn.Parameter(torch.zeros(()))], .1)
        for z in data:
            (q(z.requires_grad_()).loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            q.update()
        return q.state_dict()
    q = make_quantizer(kind, 8, 32, **knobs)
    train(q, data[:30])
    torch.save(q.state_dict(), tmp_path/'q.pt')
    torch.manual_seed(99)
    resumed = make_quantizer(kind, 8, 32, **knobs)
    cold = copy.deepcopy(resumed)
    resumed.load_state_dict(torch.load(tmp_path/'q.pt'))
    whole = train(q, data[30:])
    torch.manual_seed(7)
    assert states_equal(whole, train(resumed, data[30:]))
    assert not states_equal(whole, train(cold, data[30:]))


def test_decode_is_the_forward_bit_for_bit():
    for kind in KINDS.keys() - {'none'}:
        z = batches(1, (3, 6, 5))[0]
        q = taught(make_quantizer(kind, 8, 16), [z])
        out = q(z)
        rounding = 1e-6 if kind in ('fsq', 'lfq') else 0
        assert_close(q.decode(out.indices), out.z_q, rtol=0, atol=rounding)
        if not isinstance(q, ResidualQuantizer):
            assert_close(q.codebook[out.indices], out.z_q)


# numbers

def test_codes_outlive_autocast_and_low_precision():
    torch.manual_seed(0)
    a = make_quantizer('ema', 8, 32)
    b = copy.deepcopy(a)
    for z in batches(5):
        x = a(z)
        with torch.autocast('cpu', torch.bfloat16):
            y = b(z)
        assert torch.equal(x.indices, y.indices) and y.z_q.dtype == torch.float32
        update_quantizers(nn.ModuleList([a, b]))
    assert states_equal(a.state_dict(), b.state_dict())
    assert b(z.bfloat16()).z_q.dtype == torch.bfloat16


def test_a_nan_stops_before_it_reaches_the_codebook():
    q = taught(make_quantizer('ema', 8, 16), [torch.randn(64, 8)])
    before = copy.deepcopy(q.state_dict())
    q(torch.full((4, 8), torch.nan))
    with pytest.raises(FloatingPointError, match='codebook is unchanged'):
        q.update()
    assert states_equal(q.state_dict(), before)


def test_a_nan_in_the_first_batch_stops_kmeans():
    with pytest.raises(FloatingPointError, match='first batch'):
        make_quantizer('ema', 8, 16)(torch.full((4, 8), torch.nan))


def test_compiles_as_one_graph():
    torch.manual_seed(0)
    eager = VectorQuantizer(8, 16, restart_threshold=.1)
    q = copy.deepcopy(eager)
    compiled = torch.compile(q, fullgraph=True, backend='aot_eager')
    for z in batches(6):
        z1, z2 = z.clone().requires_grad_(), z.clone().requires_grad_()
        x, y = eager(z1), compiled(z2)
        for out in (x, y):
            (out.z_q.square().sum() + out.loss).backward()
        update_quantizers(nn.ModuleList([eager, q]))
        assert torch.equal(x.indices, y.indices)
        assert_close(z1.grad, z2.grad)
    assert_close(eager.state_dict(), q.state_dict())


def test_compiled_with_kmeans_init_equals_eager():
    torch.manual_seed(0)
    eager = make_quantizer('ema', 8, 16)
    q = copy.deepcopy(eager)
    compiled = torch.compile(q, backend='aot_eager')
    for z in batches(3):
        assert torch.equal(eager(z).indices, compiled(z).indices)
        update_quantizers(nn.ModuleList([eager, q]))
    assert_close(eager.state_dict(), q.state_dict())


# several processes

def learn(rank, world, folder, kind):
    "25 updates of a codebook, each process with its share of the vectors."
    if world > 1:
        init = f'file://{folder}/store_{kind}'
        dist.init_process_group('gloo', init_method=init, rank=rank, world_size=world)
    torch.manual_seed(0)
    q = make_quantizer(kind, 8, 32, decay=.9)
    generator = torch.Generator().manual_seed(1)
    centres, history = torch.randn(200, 8, generator=generator)*3, []
    for step in range(25):
        which = torch.randint(200, (96,), generator=generator)
        z = centres[which] + .2*torch.randn(96, 8, generator=generator)
        mask = torch.rand(96, generator=generator) > .2
        cut = [0, 30, 96]                            # processes need not have equal shares
        mine = slice(cut[rank], cut[rank+1]) if world > 1 else slice(None)
        if step % 7 < 6:
            q(z[mine], mask[mine])
        elif world == 1 or rank == 1:                # and may sit a step out
            q(z[30:], mask[30:])
        q.update()
        history.append({k: v.clone() for k, v in q.state_dict().items()})
    torch.save(history, f'{folder}/{kind}_{world}_{rank}.pt')


@pytest.mark.parametrize('kind', ['ema', 'residual'])
def test_two_processes_equal_one_with_both_batches(kind, tmp_path):
    ranks = ((0, 1), (0, 2), (1, 2))
    children = [start_child(learn, rank, world, str(tmp_path), kind) for rank, world in ranks]
    for child in children:
        finish_child(child)
    one, first, second = [torch.load(tmp_path/f'{kind}_{n}.pt') for n in ('1_0', '2_0', '2_1')]
    for step, (a, b, c) in enumerate(zip(one, first, second)):
        assert states_equal(b, c), f'ranks differ at step {step}'
        assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m: f'step {step}: {m}')
    codes = [k for k in one[0] if k.endswith('codes')]
    jumps = [(b[k] - a[k]).norm(dim=1).gt(1).sum().item() for a, b in zip(one, one[1:]) for k in codes]
    assert sum(jumps) > 3, 'the run has no restarts: it does not test them'


# numbers that are none, and sizes that are none

KINDS_OF_CODES = [kind for kind in KINDS if kind != 'none']


@pytest.mark.parametrize('kind', KINDS_OF_CODES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.half, torch.double])
def test_a_model_of_another_precision_keeps_its_quantiser_in_float32(kind, dtype):
    torch.manual_seed(0)
    q = make_quantizer(kind, 8, 64).eval()
    z = torch.randn(20, 8).to(dtype)
    want, got = q(z.float()), q.to(dtype)(z)
    assert torch.equal(got.indices, want.indices) and got.z_q.dtype == dtype
    assert torch.equal(got.z_q, want.z_q.to(dtype)) and torch.equal(q.decode(got.indices), want.z_q)
    assert all(p.dtype == torch.float32 for p in q.parameters())


@pytest.mark.parametrize('kind', KINDS_OF_CODES)
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_what_is_no_number_is_marked(kind, bad):
    z = torch.randn(6, 8)
    z[2, 0] = bad
    out = make_quantizer(kind, 8, 64).eval()(z)
    assert (out.indices[2] == -1).all() and out.z_q[2].isnan().all()
    rest = [0, 1, 3, 4, 5]
    assert (out.indices[rest] >= 0).all() and out.z_q[rest].isfinite().all()


@pytest.mark.parametrize('kind', KINDS_OF_CODES)
@pytest.mark.parametrize('sizes', [(0, 64), (-1, 64), (8, 0), (8, 1), (8, 2.5), (8.5, 64), (8, '64'),
                                   (8, 2**40), (2**62, 2)])
def test_bad_sizes_are_value_errors(kind, sizes):
    with pytest.raises(ValueError, match='expected a whole number'):
        make_quantizer(kind, *sizes)


@pytest.mark.parametrize('knobs', [dict(decay='.9'), dict(commitment_cost=None), dict(restart_threshold='x'),
                                   dict(commitment_cost=float('nan'))])
def test_bad_knobs_are_value_errors(knobs):
    with pytest.raises(ValueError, match=next(iter(knobs))):
        make_quantizer('ema', 8, 64, **knobs)


@pytest.mark.parametrize('kind', ['ema', 'rotation'])
def test_the_gradient_of_a_direction_is_bounded_at_zero(kind):
    q = make_quantizer(kind, 8, 64, kmeans_init=False, cosine=True).eval()
    for size in (0., 1e-40, 1e-12, 1e-6):
        z = (size*torch.randn(10, 8)).requires_grad_()
        q(z).z_q.sum().backward()
        assert z.grad.norm(dim=1).max() <= 1e5


def test_the_rotated_gradient_is_bounded_at_zero():
    q = make_quantizer('rotation', 8, 64, kmeans_init=False).eval()
    for size in (0., 1e-30, 1e-6, 1.):
        z = (size*torch.randn(10, 8)).requires_grad_()
        q(z).z_q.sum().backward()
        assert z.grad.norm(dim=1).max() <= 10.1*8**.5
