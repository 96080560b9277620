"The race to the rule of addition: its table, its judgement, its resumption. See nbs/lm/04_mugrokfast."
import pytest
import torch

from puzzle_research.core.fit import Trainer
from puzzle_research.core.runs import begin
from puzzle_research.lm import mugrokfast
from puzzle_research.lm.mugrokfast import RACERS, Config, addition, better, evaluate, train


@pytest.fixture(autouse=True)
def small_race(tmp_path, monkeypatch):
    "Two rates for each racer, runs in a folder of their own."
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path/'runs'))
    monkeypatch.setattr(mugrokfast, 'RATES', (1e-2, 3e-3))
    torch.set_num_threads(1)


def start(**kw):
    return begin('lm_mugrokfast', Config(budget='test', max_steps=10, **kw))


def test_addition_table():
    pairs, sums, fit, valid = addition(13, .4, 3)
    assert len(pairs) == 169 and torch.equal((pairs[:, 0] + pairs[:, 1]) % 13, sums)
    assert sorted([*fit.tolist(), *valid.tolist()]) == list(range(169)) and len(fit) == round(.4*169)


@pytest.mark.parametrize('a, b, says', [
    (dict(reached=10), dict(reached=20), True), (dict(reached=20), dict(reached=20), False),
    (dict(reached=900), dict(reached=None, best=.98), True),
    (dict(reached=None, best=.6), dict(reached=None, best=.5), True),
    (dict(reached=None, best=.6), dict(reached=20), False)])
def test_which_leg_is_better(a, b, says):
    assert better(a, b) == says


class Killed(Exception):
    pass


def test_killed_race_goes_on_bit_for_bit(monkeypatch):
    monkeypatch.setattr(mugrokfast, 'RACERS', ('adamw', 'mugrokfast'))
    whole, cfg = start()
    train(cfg, whole)
    whole.close('ok')
    step = Trainer.one_step

    def dies(self):
        if self.name == 'tune-mugrokfast-0.01' and self.step == 7:
            self.save()
            raise Killed
        step(self)
    monkeypatch.setattr(Trainer, 'one_step', dies)
    run, cfg = start()
    with pytest.raises(Killed):
        train(cfg, run)
    run.close('interrupted')
    monkeypatch.setattr(Trainer, 'one_step', step)
    run, cfg = start(run=run.id)
    train(cfg, run)
    assert (run.dir/'metrics.jsonl').read_bytes() == (whole.dir/'metrics.jsonl').read_bytes()
    assert run.load('legs') == whole.load('legs')


def test_summary_judges_every_bar(monkeypatch):
    monkeypatch.setattr(mugrokfast, 'step_cost', lambda cfg, racer: 1.)
    run, cfg = start()
    train(cfg, run)
    s = evaluate(cfg, run)
    assert {f'steps_{r}' for r in RACERS} <= set(s['metrics'])
    judged = {c['metric'] for c in s['criteria']}
    assert judged == {'best_valid_accuracy', 'ratio_to_muon', 'speedup_over_adamw'}
    assert s['headline'] in s['metrics'] and s['baselines']['best_valid_accuracy'] == {'trivial: chance': 1/7}
