"The ternary operations: known answers, schedules and resumption, at more length than a notebook's cell."
import math
import shutil
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from puzzle_research import ternary_vae as tv
from puzzle_research.core.fit import Batches, Callback, Trainer
from puzzle_research.core.quantize import count_parameters
from puzzle_research.core.runs import Run, load_state
from puzzle_research.ternary import (algebra, controller, coverage, frontier, losses, operations, schedules,
                                     shared_code, train_pair)
from puzzle_research.ternary.operations import FAMILIES, LN_N, N
from puzzle_research.ternary.pathway import Pathway, measure, normal_kl
from puzzle_research.ternary_vae import Config, vary
from shared import CHOSEN, SMALL, assert_same_run, killed_and_resumed

SEED = Config(recipe='seed', budget='test')


@pytest.fixture(scope='module')
def space():
    return operations.open_operations(SEED)


@pytest.fixture(scope='module')
def few(space): # operations on which the pair trains in a moment
    return SimpleNamespace(x=space.x, train=space.train[:256], valid=space.valid[:100])


@pytest.fixture(scope='module')
def solved():
    "Ours, trained on 197 operations: model, its operations."
    cfg = Config(budget='test', steps=300)
    space = operations.open_operations(cfg)
    model, clock = shared_code.train_attempts(cfg, None, space)
    assert clock['attempts'] <= 2
    return model, space


# Operations

def test_parameter_counts():
    pair = tv.build(SEED)
    pathways = [sum(p.numel() for p in pair.parameters_of(name)) for name in 'ab']
    assert pathways == [50_203, 117_499]
    assert (count_parameters(pair.statenet), count_parameters(pair)) == (1068, 168_770)
    assert count_parameters(tv.build(Config())) == 187


def test_enumeration_against_itertools():
    by_hand = torch.tensor([v[::-1] for v in product((-1, 0, 1), repeat=9)])
    assert torch.equal(operations.all_operations(), by_hand)
    assert torch.equal(operations.index_of(by_hand + 1), torch.arange(N))


def test_official_split(space):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(42))
    assert [len(space.train), len(space.valid), len(space.test)] == [15_746, 1968, 1969]
    assert torch.equal(torch.cat([space.train, space.valid, space.test]), order)


@pytest.mark.parametrize('family', FAMILIES)
def test_a_held_out_family_is_never_seen(family):
    s = operations.open_operations(Config(holdout=family))
    held = operations.properties(s.ops)[family]
    assert held[s.test].all() and len(s.test) == held.sum()
    assert not held[s.train].any() and not held[s.valid].any() and len(s.few) == 197


def by_definition(o): # truth table of nine -> {property: bool}
    values = (-1, 0, 1)
    def f(a, b):
        return o[3*(a + 1) + b + 1]
    pairs, triples = list(product(values, repeat=2)), product(values, repeat=3)
    return dict(
        commutative=all(f(a, b) == f(b, a) for a, b in pairs),
        associative=all(f(f(a, b), c) == f(a, f(b, c)) for a, b, c in triples),
        idempotent=all(f(a, a) == a for a in values),
        has_identity=any(all(f(e, a) == a == f(a, e) for a in values) for e in values),
        monotone=all(f(a, b) <= f(c, d) for (a, b), (c, d) in product(pairs, repeat=2) if a <= c and b <= d))


def test_properties_by_definition(space):
    some = space.ops[torch.randperm(N)[:300]].tolist()
    some += [v.tolist() for v in operations.named_operations().values()]
    found = operations.properties(torch.tensor(some))
    for i, o in enumerate(some):
        assert {k: bool(v[i]) for k, v in found.items()} == by_definition(o)


def test_real_data_means_the_known_operations(monkeypatch):
    operations.open_operations(Config(data='real'))
    monkeypatch.setattr(operations, 'all_operations', lambda: torch.zeros(N, 9, dtype=torch.long))
    with pytest.raises(ValueError, match='expected ' + operations.SHA256):
        operations.open_operations(Config(data='real'))


# Measurements

@pytest.mark.parametrize('mu, logvar', [(0., 0.), (2., -3.), (-1., .7)])
def test_kl_against_monte_carlo(mu, logvar):
    torch.manual_seed(0)
    mu, logvar = torch.tensor([mu]), torch.tensor([logvar])
    q, p = torch.distributions.Normal(mu, (.5*logvar).exp()), torch.distributions.Normal(0., 1.)
    z = q.sample((400_000,))
    sampled = (q.log_prob(z) - p.log_prob(z)).mean().item()
    assert normal_kl(mu, logvar).item() == pytest.approx(sampled, abs=.015)


def test_a_decoder_that_ignores_its_latent_has_gap_0_and_no_exactness(space):
    def nothing(x):
        return torch.zeros(len(x), 2)
    blind = Pathway(centre=nothing, sample=lambda x: (nothing(x), nothing(x), torch.zeros(len(x))),
                    decode=lambda z: torch.zeros(len(z), 9, 3), prior=None)
    m = measure(blind, space.x)
    assert m['gap'] == pytest.approx(0, abs=1e-6) and m['distortion'] == pytest.approx(LN_N)
    assert m['exact_mean'] == pytest.approx(1/N) and m['active_units'] == 0


def test_a_perfect_sampler_reaches_the_ceiling():
    "Mean over independent trials within its standard error; and the exact spread of one."
    g = torch.Generator().manual_seed(0)
    for n in (N, 50_000):
        trials = [coverage.covered(torch.randint(N, (n,), generator=g), (n,))[n] for _ in range(60)]
        shares = torch.tensor(trials)
        assert shares.mean().item() == pytest.approx(coverage.ceiling(n), abs=4*coverage.ceiling_sd(n)/60**.5)
        assert shares.std().item() == pytest.approx(coverage.ceiling_sd(n), rel=.35)
    assert coverage.ceiling(50_000) == pytest.approx(.9212, abs=1e-4)


def test_exact_marginal_against_sampling():
    torch.manual_seed(3)
    model = shared_code.SharedCode(learn_prior=True)
    with torch.no_grad():
        model.prior_logits.normal_()
        model.sharpness.fill_(1.)
    p, n = shared_code.exact_marginal(model), 65_000
    _, drawn, mixed = coverage.draw_operations(model.pathways()['B'], n)
    top = p.topk(100).indices
    error = (p[top]*(1 - p[top])/n).sqrt()
    assert p.sum().item() == pytest.approx(1, abs=1e-9)
    assert ((drawn.bincount(minlength=N)[top]/n - p[top]).abs() < 5*error).all()
    assert ((mixed[top] - p[top]).abs() < 5*error).all()


def test_frontier_respects_its_limits():
    f = frontier.frontier()
    for r in [*f['normal'], *f['learned'], *f['discrete'], *f['betas'].values()]:
        assert r['rate'] >= frontier.fano_rate(min(1., r['exact'])).item() - 1e-6 and r['gap'] > -1e-7
    assert all(r['gap'] > .05 and r['exact'] < 1 for r in f['normal'])
    assert max(abs(r['gap']) for r in f['learned']) < 1e-6
    near = min(f['normal'], key=lambda r: abs(r['exact'] - .986))      # known: 98.6 % at 4.3 nats
    assert near['gap'] == pytest.approx(4.3, abs=.6)
    assert f['discrete'][0] == dict(rate=pytest.approx(LN_N), gap=0., exact=1.)


def test_auc_counts_pairs_and_probes_find_products(space):
    torch.manual_seed(0)
    score, label = torch.randn(300), torch.rand(300) < .2
    above = (score[label][:, None] > score[~label]).double().mean().item()
    assert algebra.auc(score, label) == pytest.approx(above)
    assert all(abs(v - .5) < .2 for v in algebra.probe(torch.randn(N, 9), space).values())
    assert algebra.probe(algebra.with_products(space.x), space)['idempotent'] > .99


# The published pair

def test_schedules():
    assert [schedules.permeability(e, True) for e in (0, 39, 40, 250, 400)] == [.1, .1, .1, .7, .7]
    assert schedules.permeability(200, True) == pytest.approx(.7) and schedules.permeability(200, False) == .3
    assert [schedules.beta_a(e) for e in (0, 50, 400)] == pytest.approx([0, .3, .8])
    for fixes, jump in ((False, .212), (True, .0042)):
        before, after = (schedules.beta_b(e, fixes=fixes) for e in (49, 50))
        assert after - before == pytest.approx(jump, abs=1e-3)
    base = 1 - .7*15/400
    assert schedules.temperature_a(15) == pytest.approx(base - .1*base)
    assert schedules.temperature_a(400) == pytest.approx(max(.1, .3 + .5*math.cos(2*math.pi*10/30)))
    assert [schedules.temperature_b(e) for e in (249, 250)] == pytest.approx([.9 - .7*219/400, .3])
    stages = [1e-3, 1e-3, 5e-4, 5e-4, 3e-4, 1e-4, 5e-5, 2e-5, 1e-5, 5e-6]
    assert [schedules.rate_stage(e) for e in (0, 49, 50, 119, 120, 180, 220, 250, 300, 350)] == stages


def test_tempo_runs_through_the_schedules_sooner():
    full = Config(recipe='seed', budget='full')
    c = controller.Controller(vary(full, tempo=5.), 31)
    assert [c.epoch(31*e) for e in (0, 1, 10, 20)] == [0, 5, 50, 100] and c.schedule(31*10, 0) == .5
    assert controller.Controller(full, 31).epoch(31*102) == 102


def test_free_bits_hide_a_collapse_only_as_published():
    mu = torch.zeros(64, 16)
    mu[::2, 0], mu[1::2, 0] = 2., -2.         # one dimension at work, the others at the prior
    published = losses.kl_free_bits(mu, torch.zeros_like(mu), .5, fixes=False)
    assert published.item() == pytest.approx(2 + 15*.5)


def losses_of(few, epochs=2, **changes): # -> history of the training loss
    cfg = vary(SEED, batch_size=128, coverage_every=10**6, **changes)
    return train_pair.train_pair(cfg, None, few, epochs=epochs).history['train_loss']


def test_every_part_acts(few):
    whole = losses_of(few)
    assert whole == losses_of(few)
    slow = ('repulsion', 'rate_stages', 'lambda_balance')      # nothing in 16 dimensions; later epochs
    for part in set(controller.PARTS) - set(slow):
        assert losses_of(few, without=part) != whole, part
    assert losses_of(few, fixes=False) != whole
    for part, rate in (('nothing', .5), ('rate_stages', 1.)):
        assert controller.Controller(vary(SEED, without=part), 2).schedule(2*60, 0) == rate
    for part, weight in (('nothing', .72), ('lambda_balance', .7)):
        c = controller.Controller(vary(SEED, without=part), 2)
        c.norm_b = .5
        c.start_epoch(1)
        assert c.lambda_a == pytest.approx(weight)


def test_patience_stops(few):
    cfg = vary(SEED, batch_size=128, coverage_every=10**6, patience=1, learning_rate=1e-6)
    t = train_pair.train_pair(cfg, None, few, epochs=40)
    assert t.stopped and t.step < 80


@pytest.mark.parametrize('fixes', [False, True])
def test_the_controller_learns_only_when_repaired(few, fixes):
    torch.manual_seed(0)
    model, c = tv.DualPathway(), controller.Controller(vary(SEED, fixes=fixes), epoch_steps=2)
    batches = Batches(few.x, batch_size=128, index=few.train.numpy())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    first = {k: v.clone() for k, v in model.statenet.state_dict().items()}
    Trainer(model, train_pair.pair_loss(c), batches, optimizer, clip=1., device='cpu', callbacks=[c]).fit(8)
    moved = [not torch.equal(v, first[k]) for k, v in model.statenet.state_dict().items()]
    assert any(moved) == fixes


class Stop(Callback):
    "Save and interrupt after a step."
    def __init__(self, at):
        self.at = at

    def after_step(self, t):
        if t.step == self.at:
            t.save()
            raise KeyboardInterrupt


@pytest.mark.parametrize('fixes', [True, False])
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, few, fixes):
    "Interrupted in the middle of an epoch: schedules, gradient averages, bandit and random states go on."
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path))
    cfg = vary(SEED, batch_size=100, fixes=fixes, coverage_every=2)
    whole = train_pair.train_pair(cfg, None, few, epochs=4)
    run = Run.start('05_ternary_vae', cfg)
    monkeypatch.setattr(train_pair, 'Progress', lambda: Stop(8))
    with pytest.raises(KeyboardInterrupt):
        train_pair.train_pair(cfg, run, few, epochs=4)
    monkeypatch.setattr(train_pair, 'Progress', lambda: Stop(None))
    torch.manual_seed(99)
    again = train_pair.train_pair(cfg, run, few, epochs=4)
    assert again.history == whole.history
    weights = [t.module.state_dict().values() for t in (whole, again)]
    assert all(torch.equal(a, b) for a, b in zip(*weights))


# Ours

def test_one_percent_is_enough(solved):
    model, space = solved
    b = measure(model.pathways()['B'], space.x)
    assert b['exact_mean'] == b['exact_sampled'] == 1 and 0 <= b['gap'] < .01
    assert b['rate'] == pytest.approx(LN_N, abs=1e-3)
    assert coverage.to_uniform(shared_code.exact_marginal(model))['total_variation'] < 1e-3
    assert measure(model.pathways()['A'], space.x)['exact_sampled'] > .999


def test_the_code_is_a_bijection_and_each_slot_one_entry(solved):
    model, space = solved
    with torch.no_grad():
        codes = model.log_code(space.x).argmax(-1)
    assert operations.index_of(codes).unique().numel() == N
    w = model.encoder.weight.detach().abs()
    assert sorted(w.argmax(1).tolist()) == list(range(9))
    assert (w.topk(2, 1).values[:, 1] < .1*w.max(1).values).all()


def test_symmetries_are_affine_in_our_latent(solved):
    model, space = solved
    path = model.pathways()['A']
    assert set(algebra.equivariance(path, space).values()) == {1.}
    assert algebra.interpolation(path, space, pairs=100) > .999


# The experiment

@pytest.mark.parametrize('name, value', [
    ('holdout', 'comutative'), ('without', 'repulsions'), ('width_end', 0.), ('train_operations', 20_000),
    ('tempo', 0.), ('batch_size', 1)])
def test_bad_values_are_named(name, value):
    with pytest.raises(ValueError, match=f"parameter '{name}' = .*expected"):
        Config(**{name: value})


@pytest.mark.slow
def test_killed_and_resumed_run_equals_never_killed(tmp_path, finished_run):
    values = CHOSEN['05_ternary_vae']
    whole = finished_run('05_ternary_vae', **values)
    run = killed_and_resumed('05_ternary_vae', SMALL | values, tmp_path, '"pair"')
    assert_same_run(run, whole)
    for name in ('code', 'pair'):
        weights = [load_state(tv.stage_path(r, name))['weights'].values() for r in (run, whole)]
        assert all(torch.equal(a, b) for a, b in zip(*weights))
    data = run.manifest['data'][0]
    assert (data['sha256'], data['origin']) == (operations.SHA256, 'enumerated')


@pytest.mark.slow
def test_draws_over_seeds(tmp_path, finished_run):
    runs = []
    for seed in (2, 3):
        folder = tmp_path/'05_ternary_vae'/str(seed)
        shutil.copytree(finished_run('05_ternary_vae', seed=seed).dir, folder)
        runs.append(Run(folder))
    tv.draw_seeds(runs)
    captions = (runs[0].dir/'figures'/'captions.json').read_text()
    assert captions.count('Means of 2 seeds') == 4
