"What safety costs: the check of the cache when a set is opened, locks and digests of a run."
import cProfile
import json
import pstats
import subprocess
import sys

import pytest
import torch
from torch import nn

from puzzle_research.core import evidence, locks
from puzzle_research.core.config import make_config, parse_parameters
from puzzle_research.core.fit import Batches, Trainer
from puzzle_research.core.measure import metric
from puzzle_research.core.runs import Run, begin

Config = make_config(parse_parameters("recipe:str = 'best'\nbudget:str = 'test'\nseed:int = 0\nrun:str = ''"))
OPENED = '''
import json, time
began, checked, calls = time.perf_counter(), 0., 0
import numpy as np
import torch
from puzzle_research.core import data, fingerprint, seals

def timed(module, name):
    work = getattr(module, name)
    def counted(*args, **kwargs):
        global checked, calls
        start, calls = time.perf_counter(), calls + 1
        try:
            return work(*args, **kwargs)
        finally:
            checked += time.perf_counter() - start
    setattr(module, name, counted)
timed(seals, 'unseal')
start = time.perf_counter()
found = data.load('cifar10', 'train')
opened = time.perf_counter()
for array in found.arrays.values():
    for i in range(0, len(array), 512):
        torch.from_numpy(np.array(array[i:i + 512])).float()
size = sum(a.nbytes for a in found.arrays.values())
print(json.dumps(dict(checked=checked, calls=calls, load=opened - start, whole=opened - began,
                      megabytes=size/1e6, items=time.perf_counter() - start, rows=len(found))))
'''


@pytest.mark.slow
def test_the_check_of_a_cache(costs, tmp_path, monkeypatch):
    "CIFAR-10 where it is at hand, else the bundled pictures: decoded, then opened by three processes."
    monkeypatch.setenv('PUZZLE_CACHE', str(tmp_path))
    def opened():
        command = [sys.executable, '-c', OPENED]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    first, later = opened(), [opened() for _ in range(3)]
    assert {each['calls'] for each in (first, *later)} == {1}, 'every opening checks, and once'
    best = min(later, key=lambda each: each['checked'])
    what = f"check of {best['rows']:,} cached pictures ({best['megabytes']:.0f} MB)"
    costs.share(what, first['checked'], 'the load that decodes them', first['load'], .05)
    costs.share(what, best['checked'], 'a later load, from the start of its process', best['whole'], .05)
    checked = best['checked']
    for beside, whole in (('a later load and one pass over its items, without imports', best['items']),
                          ('a later load alone, which maps arrays and reads nothing', best['load'])):
        costs.share(what, checked, beside, whole, .05)      # narrower readings of load time


@pytest.mark.slow
def test_locks_and_digests_of_a_run(costs, tmp_path, monkeypatch):
    "A training of 3,000 steps that logs every tenth, under the profiler, which slows it further."
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path))
    x, model = torch.randn(64, 4), nn.Linear(4, 1)
    def loss(model, batch, t): return model(batch[0]).square().mean()
    with cProfile.Profile() as profile:
        run, _ = begin('00_run', Config())
        optimizer = torch.optim.AdamW(model.parameters())
        Trainer(model, loss, Batches(x, batch_size=16), optimizer, device='cpu', run=run, log_every=10,
                save_seconds=.2).fit(3000)
        run.finish(dict(title='A', claim='B', metrics=dict(loss=metric(1., '1', 'min', 64))))
        assert Run(run.dir).altered() == []
    files = {module.__file__ for module in (locks, evidence)}
    called = [(caller[0], call[3]) for function, (*_, callers) in pstats.Stats(profile).stats.items()
              if function[0] in files for caller, call in callers.items()]
    seconds = sum(took for caller, took in called if caller not in files)
    assert seconds > 0
    costs.seconds(f'locks and digests of a run of 3,000 steps, {len(run.metrics)} logged', seconds, .1)
