"ARC tasks, generator and objects against plain re-tellings of what they should do, one grid at a time."
import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import ndimage

from puzzle_research.arc import tasks
from puzzle_research.arc.features import adjacency, published_features, walk_features
from puzzle_research.arc.generator import generate, sequences
from puzzle_research.arc.grids import OUTSIDE, components, cut, recolour, sizes, stack_grids, symmetry, walk
from puzzle_research.arc.objects import extract, table
from puzzle_research.arc.primitives import NAMES, run_program
from puzzle_research.arc.tasks import canonical, demonstrations, rearc_tasks, training_tasks
from puzzle_research.arc.tasks import test_tasks as evaluation_tasks
from puzzle_research.arc.views import turned
from puzzle_research.cli.data import _tasks_too
from puzzle_research.core.data import check


@pytest.fixture(scope='module')
def made():
    return generate(1500, seed=11)


@pytest.fixture(scope='module')
def tested():
    "Canonical forms of every test pair: the same under any symmetry of the square and renaming of colours."
    return {canonical(p) for t in evaluation_tasks() for p in t.pairs}


@pytest.mark.parametrize('every', [6, pytest.param(1, marks=pytest.mark.slow)])
def test_no_test_pair_is_in_training(tested, every):
    "Told from the pairs, without the shortcut of signatures."
    train, left_out = training_tasks()
    assert not tested & {canonical(p) for t in train[::every] for p in t.pairs}
    assert not {t.id for t in train} & {t.id for t in evaluation_tasks()}
    assert len(train) > 600 and len(left_out) >= 376
    assert all('of the test tasks' in d['why'] for d in left_out)


def test_no_test_pair_is_in_rearc_or_generated(made, tested):
    def exact(pair):
        return tuple((g.tobytes(), g.shape) for g in pair)
    asked = {exact(p) for t in evaluation_tasks() for p in t.pairs}
    for t in rearc_tasks('auto')[0][::4]:
        assert not asked & {exact(p) for p in t.pairs}
    s = sequences(made)
    for before, after in zip(s.context[::7, -1], s.target[::7]):
        assert canonical((cut(s.grids[before]), cut(s.grids[after]))) not in tested


def around(grid, y, x, belongs):
    "The 4-connected cells around (y, x) whose colour belongs."
    part, todo = {(y, x)}, [(y, x)]
    while todo:
        r, c = todo.pop()
        for a, b in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
            inside = 0 <= a < grid.shape[0] and 0 <= b < grid.shape[1]
            if inside and (a, b) not in part and belongs(grid[a, b]):
                part.add((a, b))
                todo.append((a, b))
    return part


def plain_translate(g, v):
    out = np.full_like(g, v['fill'])
    for y, x in np.ndindex(*g.shape):
        if 0 <= y + v['dy'] < g.shape[0] and 0 <= x + v['dx'] < g.shape[1]:
            out[y + v['dy'], x + v['dx']] = g[y, x]
    return out


def plain_invert(g, v):
    colours = sorted(set(g.ravel().tolist()))
    return np.vectorize(dict(zip(colours, colours[::-1])).get)(g).astype(np.uint8)


def plain_fill(g, v):
    start, out = g[v['y'], v['x']], g.copy()
    for cell in around(g, v['y'], v['x'], lambda c: c == start):
        out[cell] = v['fill']
    return out


def plain_extract(g, v):
    cells = around(g, v['y'], v['x'], lambda c: c != v['background'])
    ys, xs = zip(*cells)
    out = np.full((max(ys) - min(ys) + 1, max(xs) - min(xs) + 1), v['background'], np.uint8)
    for y, x in cells:
        out[y - min(ys), x - min(xs)] = g[y, x]
    return out


def plain_merge(g, v):
    labels, n = ndimage.label((g == v['a']) | (g == v['b']), np.ones((3, 3)))
    groups = [labels == i for i in range(1, n + 1)]
    both = [at for at in groups if {v['a'], v['b']} <= set(g[at].tolist())]
    return np.where(np.any(both, 0), v['target'], g) if both else g


PLAIN = dict( # each primitive as one would explain it
    mirror_x=lambda g, v: g[::-1],
    mirror_y=lambda g, v: g[:, ::-1],
    rotate90=lambda g, v: np.rot90(g, v['k']),
    translate=plain_translate,
    recolor=lambda g, v: np.where(g == v['source'], v['target'], g),
    invert_palette=plain_invert,
    threshold_gt=lambda g, v: np.where(g > v['threshold'], v['high'], v['low']),
    flood_fill=plain_fill,
    extract_shape=plain_extract,
    merge_touching=plain_merge,
)


@pytest.mark.parametrize('name', NAMES)
def test_primitive_does_what_it_says(made, name):
    seen = 0
    for i in np.flatnonzero((made.program == NAMES.index(name)).any(1))[:40]:
        for d in range(3):
            states = [cut(g) for g in made.grids[i, d, :made.steps[i] + 1]]
            for (primitive, values), before, after in zip(made.describe(i), states, states[1:]):
                if primitive == name:
                    assert np.array_equal(PLAIN[name](before, values), after), values
                    seen += 1
    assert seen >= 60


def test_a_task_never_leaves_a_grid_unchanged(made):
    last = made.grids[np.arange(len(made)), :, made.steps]
    assert (last != made.grids[:, :, 0]).any((2, 3)).all()
    h, w = sizes(made.grids[:, 0, 0])
    assert h.min() == w.min() == 6 and h.max() == w.max() == 14
    colours = [len(np.unique(g[g != OUTSIDE])) for g in made.grids[:, :, 0]]
    assert 4 <= np.quantile(colours, .02) and max(colours) == 6


def test_the_same_seed_gives_the_same_tasks_for_ever(made):
    h = hashlib.sha256(made.grids.tobytes() + made.program.tobytes() + made.params.tobytes())
    assert h.hexdigest()[:16] == 'fd7c985c3317aaf9'
    assert not np.array_equal(generate(50, seed=1).grids, generate(50, seed=2).grids)


def test_components_equal_scipy():
    rng = np.random.default_rng(0)
    grids = [rng.integers(0, 3, rng.integers(1, 31, 2)).astype(np.uint8) for _ in range(40)]
    stack = stack_grids(grids)
    labels = components(stack, (stack > 0) & (stack != OUTSIDE))
    for g, found in zip(stack, labels):
        parts = np.unique(found[found >= 0])
        assert len(parts) == sum(ndimage.label(g == c)[1] for c in (1, 2))
        assert all(len(np.unique(g[found == k])) == 1 for k in parts)


def test_objects_equal_the_walk_on_every_kind_of_grid(made):
    rng = np.random.default_rng(0)
    odd = [
        np.zeros((1, 1), np.uint8),
        np.full((30, 30), 7, np.uint8),
        np.tile([[1, 2], [2, 1]], (15, 15)).astype(np.uint8),
        np.ones((1, 30), np.uint8),
        rng.integers(0, 10, (30, 30)).astype(np.uint8),
    ]
    real = [g for t in evaluation_tasks()[::9] for p in t.pairs for g in p]
    grids = odd + real + [cut(g) for g in made.grids[:40, 0, 0]]
    o = extract(stack_grids(grids)).take(torch.arange(len(grids)))
    assert np.allclose(published_features(o).numpy(), np.stack([walk_features(g) for g in grids]), atol=1e-5)
    assert o.count.tolist() == [len(walk(g)) for g in grids]
    near = adjacency(o)
    assert torch.equal(near, near.transpose(1, 2)) and not near[~o.mask].any()


def test_symmetries_form_a_group():
    "Turning twice is turning once by the product; so a view of a view is one of the eight."
    g = np.arange(6).reshape(2, 3)
    def seen(h):
        return h.tobytes() + bytes(h.shape)
    images = [seen(symmetry(g, k)) for k in range(8)]
    for a, b in np.ndindex(8, 8):
        assert seen(symmetry(symmetry(g, a), b)) in images


def test_a_side_of_sixteen_turns_exactly():
    rng = np.random.default_rng(3)
    shapes = [(16, 16), (16, 5), (9, 16), (16, 30)]
    grids = [np.where(rng.random(s) < .9, 4, 0).astype(np.uint8) for s in shapes]
    def largest(grids):
        return extract(stack_grids(grids), most=1).take(torch.arange(4))
    plain = largest(grids)
    for k in range(8):
        direct, view = largest([symmetry(g, k) for g in grids]), turned(plain, torch.full((4,), k))
        for name in ('shape', 'box', 'sums'):
            assert torch.equal(getattr(view, name), getattr(direct, name))


def test_sequences_never_copy_a_grid(made):
    tasks = evaluation_tasks()
    sets = demonstrations(tasks, 3), demonstrations(tasks, 5, repeats=2), sequences(made), sequences(made, 5)
    for s in sets:
        for context, target in zip(s.context.tolist(), s.target.tolist()):
            real = [i for i in context if i >= 0]
            assert len({*real, target}) == len(real) + 1 and context[-1] >= 0
        assert s.context.max() < len(s.grids) and (s.context[:, 0] >= -1).all()


def test_a_torn_cache_file_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv('PUZZLE_CACHE', str(tmp_path))
    stack = stack_grids([g for t in evaluation_tasks()[:3] for g in t.pairs[0]])
    first = table(stack)
    path = next((tmp_path/'arc-objects').iterdir())
    path.write_bytes(path.read_bytes()[:500])
    again = table(stack)
    assert torch.equal(first.box, again.box) and torch.equal(first.shape, again.shape)


def test_recolouring_keeps_what_lies_outside():
    assert recolour(np.array([[OUTSIDE, 3]]), np.arange(10)[::-1]).tolist() == [[OUTSIDE, 6]]


def test_run_program_takes_any_size():
    grid = np.arange(30).reshape(1, 30).astype(np.uint8)%10
    assert run_program(grid, [('mirror_y', {})])[1][0, 0] == 9


def test_a_parquet_file_of_ones_own(tmp_path, monkeypatch):
    "Its tasks are read, and the manifest says so; what is no task is named by `puzzle data check` too."
    file = tmp_path/'arc-agi-1'/'training.parquet'
    file.parent.mkdir()
    monkeypatch.setenv('PUZZLE_DATA', str(tmp_path))
    monkeypatch.setenv('PUZZLE_CACHE', str(tmp_path/'cache'))
    def write(train, test):
        pq.write_table(pa.Table.from_pylist([dict(task_id='my task', train=train, test=test)]), file)
        tasks._official.cache_clear()
    pair = dict(input=[[1, 2]], output=[[2], [1]])
    write([pair, pair], [pair])
    [task] = tasks.official('arc-agi-1', 'training')
    about = tasks.as_dataset([task], 'arc-agi-1', 'training').describe()
    assert (task.id, task.shown, len(task.pairs), about['origin']) == ('my task', 2, 3, 'local')
    assert _tasks_too(check('arc-agi-1')[0])['status'] == 'ok'
    cases = [('[]', 'column train of my task holds str, no pairs'),
             ([dict(input=[[12]], output=[[1]])], 'to 12'),
             ([dict(input=[[1], [1, 2]], output=[[1]])], 'rows of different lengths'),
             ([dict(input=[[1]], output=None)], 'output 0 is missing')]
    for train, why in cases:
        write(train, [pair])
        with pytest.raises(ValueError, match=why):
            tasks.official('arc-agi-1', 'training')
        assert why in _tasks_too(check('arc-agi-1')[0])['status']
    tasks._official.cache_clear()
