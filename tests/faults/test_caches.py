"Every damage of every file of every cache: found when it is opened, said in one line, made anew."
import json

import numpy as np
import pytest
import torch

import puzzle_research.core.data as data
from damage import damages, kills, torn_at
from puzzle_research.arc import objects
from puzzle_research.core import seals
from puzzle_research.core.anchors import anchors
from puzzle_research.core.checkpoint import TornCheckpoint, load_state, save_state
from puzzle_research.core.fingerprint import cache_folder, verified_sha256
from puzzle_research.core.seals import write_sealed
from puzzle_research.lm.corpus import build_corpus
from shared import png, write_pictures

EACH = [1, pytest.param(8, marks=pytest.mark.slow)]


@pytest.fixture
def said():
    "What was told about caches, one line each."
    lines = []
    seals.listen(lambda kind, message: lines.append(message))
    yield lines
    seals.listen(None)


def try_each(faults, what, said, folder, load, same, each, every=1): # every: take one damage of so many
    "Damage every file of the cache in turn, every way: `load` gives what it gave before, and says so once."
    load()
    files = {p: p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}
    tries = [(file, *bad) for file, whole in files.items() for bad in damages(whole, each, seed=len(whole))]
    for file, kind, bad in tries[::every]:
        file.write_bytes(bad)
        said.clear()
        try:
            right = same(load()) and len(said) == 1 and 'damaged' in said[0]
            faults.count(what, kind, 'right' if right else 'lost', f'{file.name}: {said}')
        except Exception as e:
            faults.count(what, kind, 'lost', f'{file.name}: {e!r}')


@pytest.mark.parametrize('each', EACH)
def test_a_decoded_set(faults, said, lake, each):
    write_pictures(lake/'cifar10', [png(k) for k in range(12)])
    whole = {k: np.array(v) for k, v in data.load('cifar10', 'train').arrays.items()}
    def same(d): return all(np.array_equal(d.arrays[k], v) for k, v in whole.items()) and len(d) == 12
    def load(): return data.load('cifar10', 'train')
    try_each(faults, 'decoded set', said, cache_folder()/'decoded', load, same, each)


@pytest.mark.parametrize('each, every', [(1, 15), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_corpus(faults, said, lake, each, every):
    "It takes half a second to make anew."
    def load(): return build_corpus('bundled', 300, 64, ['riddles'])
    whole = load().train['riddles']
    kept = {k: np.array(getattr(whole, k)) for k in ('tokens', 'doc', 'answer')} | dict(n=whole.documents)
    def same(c): return all(np.array_equal(getattr(c.train['riddles'], k), kept[k]) for k in kept if k != 'n')
    try_each(faults, 'corpus', said, cache_folder()/'corpus', load, same, each, every)


@pytest.mark.parametrize('each', EACH)
def test_fitted_anchors(faults, said, tmp_path, each):
    x = np.random.default_rng(0).integers(0, 256, (60, 3, 4, 4), np.uint8)
    def load(): return anchors(x, x[:9], total=20, cache=tmp_path)
    whole = load()
    try_each(faults, 'fitted anchors', said, tmp_path, load, lambda found: found == whole, each)


@pytest.mark.parametrize('each', EACH)
def test_a_table_of_objects(faults, said, lake, each):
    stack = np.random.default_rng(0).integers(0, 4, (5, 8, 8), np.uint8)
    def load(): return objects.table(stack)
    whole = load()
    def same(found): return all(torch.equal(getattr(found, k), getattr(whole, k)) for k in objects.KEYS)
    try_each(faults, 'table of objects', said, cache_folder()/'arc-objects', load, same, each)


@pytest.mark.parametrize('each', [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_checkpoint(faults, tmp_path, each):
    "What is not whole is refused; the run then takes the one before it (test_processes.py)."
    file = tmp_path/'main.safetensors'
    save_state(file, dict(step=7, model=dict(w=torch.arange(6.).reshape(2, 3)), lr=[.1, None], name='näive'))
    whole = repr(load_state(file))
    for kind, bad in damages(file.read_bytes(), each):
        file.write_bytes(bad)
        try:
            same = repr(load_state(file)) == whole       # such as \u00E4 in place of \u00e4
            faults.count('checkpoint', kind, 'right' if same else 'lost', 'read as if it were whole')
        except TornCheckpoint as e:
            faults.count('checkpoint', kind, 'refused' if file.name in str(e) else 'lost', str(e))


@pytest.mark.parametrize('each', [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_wrong_memory_blames_no_good_source(faults, lake, each):
    file = write_pictures(lake/'cifar10', [png(0)])
    (lake/'SHA256SUMS').write_text('')
    true = verified_sha256(file, 'cifar10')
    (lake/'SHA256SUMS').write_text(f'{true}  cifar10/train.parquet\n')
    [note] = (cache_folder()/'sha256').glob('*.json')
    whole = note.read_bytes()
    wrong = json.loads(seals.read_sealed(note)) | dict(sha256='0'*64)
    write_sealed(note, json.dumps(wrong).encode())
    for kind, bad in [('another digest, sealed', note.read_bytes()), *damages(whole, each)]:
        note.write_bytes(bad)
        right = verified_sha256(file, 'cifar10') == true
        faults.count('remembered digest', kind, 'right' if right else 'lost')


def test_killed_while_decoding(faults, said, lake):
    write_pictures(lake/'cifar10', [png(k) for k in range(4)])
    def load(): return data.load('cifar10', 'train')
    def fresh(): seals.shutil.rmtree(cache_folder(), ignore_errors=True)
    whole = np.array(load().arrays['image'])
    torn = [size for size in (100, 1000, 5000) if not fresh() and torn_at(load, size)]
    assert len(torn) == 3
    for n in [*kills(load, fresh), *torn]:
        left = list((cache_folder()/'decoded').glob('[!.]*'))
        right = np.array_equal(load().arrays['image'], whole) and not said and len(left) < 2
        swept = not list((cache_folder()/'decoded').glob('.*.tmp'))
        outcome = 'right' if right and swept else 'lost'
        faults.count('decoded set', 'killed at a write', outcome, f'write {n}: {said}')
