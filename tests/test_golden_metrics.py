"""Every system trains as it did when the files in golden/metrics were made.

That is metrics.jsonl at budget=test, seed 0, on bundled data, one thread, float32, the kernels of AVX2: bit
for bit on the processor that made the files, to a few per cent elsewhere. A system whose numbers change on
purpose gets a new file and a word in the change log."""
import json
import math
import os
from pathlib import Path

import pytest
import torch

from shared import PUZZLE, SMALL, as_options, finish, only_run, start

GOLDEN = Path(__file__).parent/'golden'/'metrics'
KERNELS = dict(
    ATEN_CPU_CAPABILITY='avx2',
    ONEDNN_MAX_CPU_ISA='AVX2',
    MKL_CBWR='COMPATIBLE',
    MKL_NUM_THREADS='1',
)
OPTIONS = {
    '01_vision_puzzle': SMALL | dict(recipe='best'),
    '02_audio_puzzle': SMALL | dict(recipe='best'),
    '03_language_puzzle': SMALL | dict(recipe='best'),
    '04_jepa_vq': SMALL | dict(precision='no'),
    '05_ternary_vae': SMALL,
    '06_cognate': SMALL | dict(precision='no'),
    'lm_mugrokfast': dict(budget='test'),
}


def machine(): # what bits may depend on
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    model = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), 'unknown')
    return dict(processor=model, torch=torch.__version__.split('+')[0])


def near(a, b): # values of one row
    return a == b if isinstance(a, str) else math.isclose(a, b, rel_tol=.05, abs_tol=.05)


@pytest.mark.slow
@pytest.mark.parametrize('system', OPTIONS)
def test_metrics_are_those_of_the_golden_run(system, tmp_path, monkeypatch):
    for name, value in KERNELS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv('PUZZLE_DATA', raising=False)
    options = as_options(OPTIONS[system] | dict(seed=0))
    finish(start([PUZZLE, 'run', system, *options], tmp_path, cwd=os.getcwd()))
    text, want = (only_run(tmp_path).dir/'metrics.jsonl').read_text(), (GOLDEN/f'{system}.jsonl').read_text()
    if machine() == json.loads((GOLDEN/'made_on.json').read_text())[system]:
        assert text == want
    first, golden = (json.loads(x.splitlines()[0]) for x in (text, want))
    assert len(text.splitlines()) == len(want.splitlines()) and first.keys() == golden.keys()
    assert all(near(first[key], golden[key]) for key in golden if golden[key] is not None)
