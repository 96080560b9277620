"""What is written on one machine is read bit for bit on any other: batch, threads, instruction sets and
autocast change no digit. That the compiled walks pick what the exact models in torch pick, the notebooks
09_walk (vision) and 10_walk (audio) assert."""
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from puzzle_research.audio.codec import AudioPuzzle
from puzzle_research.audio.mel import mel
from puzzle_research.core.data import load
from puzzle_research.vision.codec import VisionPuzzle


def pictures(n):
    images = torch.from_numpy(np.array(load('cifar10', 'test', 'bundled').arrays['image'][:n]))
    return VisionPuzzle.from_pretrained(recipe='stream'), images


def sounds(n):
    waves = torch.from_numpy(np.array(load('speech_commands', 'test', 'bundled').arrays['sound'][:n]))
    return AudioPuzzle.from_pretrained(recipe='stream'), mel(waves)


KINDS = dict(pictures=pictures, sounds=sounds)


@pytest.fixture(scope='module', params=KINDS)
def coded(request):
    "A codec, twelve items, and their puzzles."
    codec, items = KINDS[request.param](12)
    return request.param, codec, items, codec.encode(items)


def test_batches_change_no_digit(coded):
    "Nor where they are larger than what the codec takes at a time."
    _, codec, items, puzzles = coded
    for i in (0, 7):
        assert torch.equal(codec.encode(items[i:i + 1])[0], puzzles[i])
    codec.chunk = 5
    assert torch.equal(codec.encode(items), puzzles)
    del codec.chunk


def test_threads_change_no_digit(coded):
    _, codec, items, puzzles = coded
    before = torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        assert torch.equal(codec.encode(items), puzzles)
    torch.set_num_threads(before)


def test_autocast_changes_nothing(coded):
    _, codec, items, puzzles = coded
    decoded = codec.decode(puzzles[:3])
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(codec.encode(items[:3]), puzzles[:3])
        assert torch.equal(codec.decode(puzzles[:3]), decoded)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_same_digits import KINDS, digest
print(*[digest(*KINDS[kind](12)) for kind in KINDS])
"""


def digest(codec, items): # of the digits, and of all that the decoder knows before the last step
    index, *_, known = codec.choose(items)
    parts = [codec.encode(items), index, *known]
    return hashlib.sha256(b''.join(p.contiguous().numpy().tobytes() for p in parts)).hexdigest()


def test_instruction_sets_change_no_digit():
    "Torch with and without AVX2, products by the BLAS of an old processor and of this one."
    plain = dict(ATEN_CPU_CAPABILITY='default', OPENBLAS_CORETYPE='Nehalem')
    said = []
    for change in (plain, dict(ATEN_CPU_CAPABILITY='avx2')):
        command = [sys.executable, '-c', SCRIPT, os.path.dirname(__file__)]
        done = subprocess.run(command, env=os.environ | change, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout)
    assert said[0] == said[1] and len(said[0].split()) == 2
