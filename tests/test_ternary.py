"The ternary operations: what a notebook cell cannot show at length: known answers, schedules, resumption, killed processes."
import math, os, signal, subprocess, sys, time
from itertools import product
from pathlib import Path

import pytest, torch

from puzzle_research.core.fit import Callback
from puzzle_research.core.quantize import count_parameters
from puzzle_research.core.runs import Run, load_state
from puzzle_research import ternary_vae as tv
from puzzle_research.ternary_vae import Config, FAMILIES, LN_N, N

PUZZLE = Path(sys.executable).with_name('puzzle')


@pytest.fixture(scope='module')
def space(): return tv.open_operations(Config(recipe='seed'))

@pytest.fixture(scope='module')
def solved():
    "Our code, trained on 197 operations."
    cfg = Config(budget='test', seed=1)
    space = tv.open_operations(cfg)
    model, clock = tv.train_attempts(cfg, None, space)
    return model, clock, space


def test_parameter_counts():
    pair = tv.build(Config(recipe='seed'))
    assert (sum(p.numel() for p in tv.parts(pair, 'a')), sum(p.numel() for p in tv.parts(pair, 'b')), count_parameters(pair.statenet), count_parameters(pair)) == (50_203, 117_499, 1068, 168_770)
    assert count_parameters(tv.build(Config())) == 187


def test_enumeration_against_itertools():
    by_hand = torch.tensor([v[::-1] for v in product((-1, 0, 1), repeat=9)])
    assert torch.equal(tv.all_operations(), by_hand)
    assert torch.equal(tv.index_of(by_hand + 1), torch.arange(N))


def test_official_split(space):
    assert [len(space.train), len(space.valid), len(space.test)] == [15_746, 1968, 1969]
    order = torch.randperm(N, generator=torch.Generator().manual_seed(42))
    assert torch.equal(torch.cat([space.train, space.valid, space.test]), order)


@pytest.mark.parametrize('family', FAMILIES)
def test_a_held_out_family_is_never_seen(family):
    s = tv.open_operations(Config(holdout=family))
    held = tv.properties(s.ops)[family]
    assert held[s.test].all() and len(s.test) == held.sum() and not held[s.train].any() and not held[s.valid].any() and len(s.few) == 197


def test_properties_by_definition():
    ops = tv.all_operations()[torch.randperm(N)[:400]].tolist() + [v.tolist() for v in tv.named_operations().values()]
    found, V = tv.properties(torch.tensor(ops)), (-1, 0, 1)
    for i, o in enumerate(ops):
        f = lambda a, b: o[3*(a + 1) + b + 1]
        assert found['commutative'][i] == all(f(a, b) == f(b, a) for a in V for b in V)
        assert found['associative'][i] == all(f(f(a, b), c) == f(a, f(b, c)) for a in V for b in V for c in V)
        assert found['idempotent'][i] == all(f(a, a) == a for a in V)
        assert found['has_identity'][i] == any(all(f(e, a) == a == f(a, e) for a in V) for e in V)
        assert found['monotone'][i] == all(f(a, b) <= f(c, d) for a in V for b in V for c in V for d in V if a <= c and b <= d)


def test_real_data_means_the_known_operations(monkeypatch):
    tv.open_operations(Config(data='real'))
    monkeypatch.setattr(tv, 'all_operations', lambda: torch.zeros(N, 9, dtype=torch.long))
    with pytest.raises(ValueError, match='expected ' + tv.SHA256): tv.open_operations(Config(data='real'))


@pytest.mark.parametrize('mu, logvar', [(0., 0.), (2., -3.), (-1., .7)])
def test_kl_against_monte_carlo(mu, logvar):
    torch.manual_seed(0)
    mu, logvar = torch.tensor([mu]), torch.tensor([logvar])
    q = torch.distributions.Normal(mu, (.5*logvar).exp()); z = q.sample((400_000,))
    assert abs((q.log_prob(z) - torch.distributions.Normal(0., 1.).log_prob(z)).mean().item() - tv.normal_kl(mu, logvar).item()) < .015


def test_schedules():
    assert [tv.permeability(e, True) for e in (0, 39, 40, 250, 400)] == [.1, .1, .1, .7, .7] and tv.permeability(200, True) == pytest.approx(.7) and tv.permeability(200, False) == .3
    assert tv.permeability(103, False) == pytest.approx(.2575)
    assert (tv.beta_a(0), tv.beta_a(50), tv.beta_a(400)) == pytest.approx((0, .3, .8))
    assert (tv.beta_b(0), tv.beta_b(400), tv.beta_b(10**4)) == pytest.approx((0, .5, .5))
    jump = [abs(tv.beta_b(50, fixes=f) - tv.beta_b(49, fixes=f)) for f in (False, True)]
    assert jump[0] == pytest.approx(.212, abs=1e-3) and jump[1] < .005
    ramp = [tv.beta_b(e) for e in range(400)]
    assert ramp == sorted(ramp) and max(b - a for a, b in zip(ramp, ramp[1:])) < .005
    assert (tv.temperature_a(0), tv.temperature_a(15), tv.temperature_a(400)) == pytest.approx((1.1, 1 - .7*15/400 - .1*(1 - .7*15/400), max(.1, .3 + .5*math.cos(2*math.pi*10/30))))
    assert (tv.temperature_b(30), tv.temperature_b(249), tv.temperature_b(250)) == pytest.approx((.9, .9 - .7*219/400, .3))
    assert [tv.rate_stage(e) for e in (0, 49, 50, 119, 120, 180, 220, 250, 300, 350)] == [1e-3, 1e-3, 5e-4, 5e-4, 3e-4, 1e-4, 5e-5, 2e-5, 1e-5, 5e-6]
    assert [tv.alignment_weight(e) for e in (0, 30)] == pytest.approx([.3, .3]) and min(map(tv.alignment_weight, range(30))) >= .15 - 1e-9


def test_tempo_runs_through_the_schedules_sooner():
    c = tv.Controller(tv.vary(Config(recipe='seed', budget='full'), tempo=5.), 31)
    assert [c.epoch(31*e) for e in (0, 1, 10, 20)] == [0, 5, 50, 100] and c.schedule(31*10, 0) == .5
    assert tv.Controller(Config(recipe='seed', budget='full'), 31).epoch(31*102) == 102


def test_free_bits_hide_a_collapse_only_as_published():
    mu = torch.zeros(64, 16); mu[::2, 0], mu[1::2, 0] = 2., -2.               # one dimension at work, the others at the prior
    assert tv.kl_free_bits(mu, torch.zeros_like(mu), .5, False).item() == pytest.approx(2 + 15*.5)
    uneven = torch.zeros(64, 16); uneven[0] = 8.                               # free on the mean is not free for each item
    assert tv.kl_free_bits(uneven, torch.zeros_like(uneven), .5, True) < tv.kl_free_bits(uneven, torch.zeros_like(uneven), .5, False)


def test_a_perfect_sampler_reaches_the_ceiling():
    "Mean over independent trials within its standard error; and the exact spread of one."
    g = torch.Generator().manual_seed(0)
    for n in (N, 50_000):
        shares = torch.tensor([tv.covered(torch.randint(N, (n,), generator=g), (n,))[n] for _ in range(60)])
        assert abs(shares.mean().item() - tv.ceiling(n)) < 4*tv.ceiling_sd(n)/60**.5
        assert shares.std().item() == pytest.approx(tv.ceiling_sd(n), rel=.35)
    assert tv.ceiling(50_000) == pytest.approx(.9212, abs=1e-4)


def test_to_uniform_by_hand():
    p = torch.zeros(N, dtype=torch.float64); p[:N//3] = 3/N
    assert tv.to_uniform(p)['total_variation'] == pytest.approx(2/3) and tv.to_uniform(p)['marginal_kl'] == pytest.approx(math.log(3))
    assert tv.to_uniform(torch.ones(N))['marginal_kl'] == pytest.approx(0, abs=1e-9)


def test_exact_marginal_against_sampling():
    torch.manual_seed(3)
    model = tv.SharedCode(learn_prior=True)
    with torch.no_grad(): model.prior_logits.normal_(); model.sharpness.fill_(1.)
    p = tv.exact_marginal(model); n = 260_000
    _, drawn, mixed = tv.draw_operations(tv.pathways(model)['B'], n)
    top = p.topk(200).indices
    se = (p[top]*(1 - p[top])/n).sqrt()
    assert p.sum().item() == pytest.approx(1, abs=1e-9)
    assert ((drawn.bincount(minlength=N)[top]/n - p[top]).abs() < 5*se).all() and ((mixed[top] - p[top]).abs() < 5*se).all()


def test_a_decoder_that_ignores_its_latent_has_gap_0_and_no_exactness(space):
    nothing = tv.Pathway(lambda x: torch.zeros(len(x), 2), lambda x: (torch.zeros(len(x), 2), torch.zeros(len(x), 2), torch.zeros(len(x))), lambda z: torch.zeros(len(z), 9, 3), None)
    m = tv.measure(nothing, space.x)
    assert m['gap'] == pytest.approx(0, abs=1e-6) and m['distortion'] == pytest.approx(LN_N) and m['exact_mean'] == pytest.approx(1/N) and m['active_units'] == 0


def test_frontier_respects_its_limits():
    f = tv.frontier()
    for rows in (f['normal'], f['learned'], f['discrete'], f['betas'].values()):
        for r in rows: assert r['rate'] >= tv.fano_rate(min(1., r['exact'])).item() - 1e-6 and r['gap'] > -1e-7
    assert all(r['gap'] > .05 and r['exact'] < 1 for r in f['normal']) and max(abs(r['gap']) for r in f['learned']) < 1e-6
    near = min(f['normal'], key=lambda r: abs(r['exact'] - .986))                      # measured for this project: 98.6 % at 4.3 nats
    assert near['gap'] == pytest.approx(4.3, abs=.6)
    assert f['discrete'][0] == dict(rate=pytest.approx(LN_N), gap=0., exact=1.)


def test_one_percent_is_enough(solved):
    model, clock, space = solved
    b = tv.measure(tv.pathways(model)['B'], space.x)
    assert b['exact_mean'] == b['exact_sampled'] == 1 and 0 <= b['gap'] < .01 and b['rate'] == pytest.approx(LN_N, abs=1e-3)
    assert tv.to_uniform(tv.exact_marginal(model))['total_variation'] < 1e-3
    assert tv.measure(tv.pathways(model)['A'], space.x)['exact_sampled'] > .999


def test_the_code_is_a_bijection_and_each_slot_one_entry(solved):
    model, _, space = solved
    with torch.no_grad(): codes = model.log_code(space.x).argmax(-1)
    assert tv.index_of(codes).unique().numel() == N
    w = model.encoder.weight.detach().abs()
    assert sorted(w.argmax(1).tolist()) == list(range(9)) and (w.topk(2, 1).values[:, 1] < .1*w.max(1).values).all()


def test_symmetries_are_affine_in_our_latent(solved):
    model, _, space = solved
    assert set(tv.equivariance(tv.pathways(model)['A'], space).values()) == {1.}
    assert tv.interpolation(tv.pathways(model)['A'], space, pairs=100) > .999


def test_auc_and_probe(space):
    from sklearn.metrics import roc_auc_score
    torch.manual_seed(0)
    s, y = torch.randn(500), torch.rand(500) < .2
    assert tv.auc(s, y) == pytest.approx(roc_auc_score(y.numpy(), s.numpy()))
    noise = tv.probe(torch.randn(N, 9), space)
    assert all(abs(v - .5) < .2 for v in noise.values()) and tv.probe(tv.with_products(space.x), space)['idempotent'] > .99


def test_parts_and_patience_act(space):
    few = tv.SimpleNamespace(x=space.x, train=space.train[:256], valid=space.valid[:256])
    loss = lambda **kw: tv.train_pair(tv.vary(Config(recipe='seed', budget='test', batch_size=128), coverage_every=10**6, **kw), None, few, epochs=3).history['train_loss']
    base = loss()
    assert base == loss()
    for part in tv.PARTS:
        if part not in ('repulsion', 'rate_stages', 'lambda_balance'): assert loss(without=part) != base, part
    assert tv.repulsion(torch.randn(500, 16)) < 1e-3 < tv.repulsion(torch.randn(500, 2))  # nothing at all in 16 dimensions
    late = [tv.Controller(tv.vary(Config(recipe='seed'), tempo=1., without=w), 2).schedule(2*60, 0) for w in ('nothing', 'rate_stages')]
    assert late == [.5, 1.]
    for w, l1 in (('nothing', .72), ('lambda_balance', .7)):
        c = tv.Controller(tv.vary(Config(recipe='seed'), without=w), 2); c.s['norm_b'] = .5; tv.start_epoch(c, 1)
        assert c.l1 == pytest.approx(l1)
    assert loss(fixes=False) != base
    t = tv.train_pair(tv.vary(Config(recipe='seed', budget='test', batch_size=128, patience=1, learning_rate=1e-6), coverage_every=10**6), None, few, epochs=40)
    assert t.stopped and t.step < 80


def test_the_controller_learns_only_when_repaired(space):
    few = tv.SimpleNamespace(x=space.x, train=space.train[:256], valid=space.valid[:256])
    for fixes in (False, True):
        c = tv.Controller(tv.vary(Config(recipe='seed', budget='test'), fixes=fixes), 2)
        torch.manual_seed(0); model = tv.DualPathway()
        t = tv.Trainer(model, tv.pair_loss(c), tv.EveryRow(few.x, batch_size=128, index=few.train.numpy()), torch.optim.AdamW(model.parameters(), 1e-3), clip=1., device='cpu', callbacks=[c])
        first = {k: v.clone() for k, v in model.statenet.state_dict().items()}
        t.fit(12)
        assert any(not torch.equal(v, first[k]) for k, v in model.statenet.state_dict().items()) == fixes


class Stop(Callback):
    def __init__(self, at): self.at = at
    def after_step(self, t):
        if t.step == self.at: t.save(); raise KeyboardInterrupt


@pytest.mark.parametrize('fixes', [True, False])
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, space, fixes):
    "Interrupted in the middle of an epoch: schedules, gradient averages, bandit and random states go on."
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path))
    cfg = tv.vary(Config(recipe='seed', budget='test', batch_size=64, fixes=fixes), coverage_every=2)
    few = tv.SimpleNamespace(x=space.x, train=space.train[:300], valid=space.valid[:100])
    whole = tv.train_pair(cfg, None, few, epochs=6)
    run = Run.start('05_ternary_vae', cfg)
    monkeypatch.setattr(tv, 'Progress', lambda: Stop(13))
    with pytest.raises(KeyboardInterrupt): tv.train_pair(cfg, run, few, epochs=6)
    monkeypatch.setattr(tv, 'Progress', lambda: Stop(None))
    torch.manual_seed(99)
    again = tv.train_pair(cfg, run, few, epochs=6)
    assert again.history == whole.history
    assert all(torch.equal(a, b) for a, b in zip(whole.module.state_dict().values(), again.module.state_dict().values()))
    monkeypatch.setattr(tv, 'Progress', lambda: Stop(None))
    cold = tv.train_pair(tv.vary(cfg, seed=5), None, few, epochs=6)
    assert cold.history != whole.history


def start(args, runs): return subprocess.Popen([str(a) for a in args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | dict(PUZZLE_RUNS=str(runs)))
def only_run(runs): return Run(next((runs/'05_ternary_vae').iterdir()))
VALUES = ['-p', 'budget', 'test', '-p', 'seed', '2']


@pytest.mark.slow
def test_killed_and_resumed_run_equals_never_killed(tmp_path):
    p = start([PUZZLE, 'run', '05_ternary_vae', *VALUES], tmp_path/'whole'); out, _ = p.communicate(timeout=600); assert p.returncode == 0, out[-3000:]
    whole = only_run(tmp_path/'whole')
    p = start([PUZZLE, 'run', '05_ternary_vae', *VALUES], tmp_path/'killed')
    run_id = p.stdout.readline().split()[-1]
    log = tmp_path/'killed'/'05_ternary_vae'/run_id/'metrics.jsonl'
    while not (log.exists() and '"pair"' in log.read_text()): time.sleep(.02); assert p.poll() is None, p.stdout.read()
    run = only_run(tmp_path/'killed')
    os.kill(run.manifest['process']['pid'], signal.SIGKILL); p.communicate(timeout=60)
    assert run.status == 'died'
    p = start([PUZZLE, 'run', '05_ternary_vae', '--resume', run_id], tmp_path/'killed'); out, _ = p.communicate(timeout=600); assert p.returncode == 0, out[-3000:]
    numbers = lambda r: {k: v['value'] for k, v in r.summary['metrics'].items() if 'seconds' not in k and 'speedup' not in k}
    assert run.status == 'ok' and numbers(run) == numbers(whole) and (run.dir/'metrics.jsonl').read_bytes() == (whole.dir/'metrics.jsonl').read_bytes()
    weights = lambda r, name: load_state(r.dir/'stages'/f'{name}.safetensors')['weights']
    for name in ('code', 'pair'): assert all(torch.equal(a, b) for a, b in zip(weights(run, name).values(), weights(whole, name).values()))
    assert run.manifest['data'][0]['sha256'] == tv.SHA256 and run.manifest['data'][0]['origin'] == 'enumerated'


@pytest.mark.parametrize('name, value', [('holdout', 'comutative'), ('without', 'repulsions'), ('width_end', 0.), ('train_operations', 20_000), ('tempo', 0.), ('batch_size', 1)])
def test_bad_values_are_named(name, value):
    with pytest.raises(ValueError, match=f"parameter '{name}' = .*expected"): Config(**{name: value})
