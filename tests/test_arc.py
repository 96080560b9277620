"ARC tasks, generator and objects against plain re-tellings of what they should do, one grid at a time."
import hashlib, subprocess, sys, time

import numpy as np, pytest, torch
from scipy import ndimage

from puzzle_research.arc.generator import NAMES, OUTSIDE, generate, run_program, sequences
from puzzle_research.arc.objects import adjacency, extract, published_features, table, turned, walk, walk_features
from puzzle_research.arc.tasks import canonical, components, cut, demonstrations, rearc_tasks, recolour, sizes, stack_grids, symmetry, test_tasks as evaluation_tasks, training_tasks


@pytest.fixture(scope='module')
def made(): return generate(1500, seed=11)


def test_no_test_pair_is_in_training():
    "Under no name, no symmetry of the square and no renaming of colours; told from every pair, without the shortcut of signatures."
    tested = {canonical(p) for t in evaluation_tasks() for p in t.pairs}
    train, left_out = training_tasks()
    assert not tested & {canonical(p) for t in train for p in t.pairs}
    assert not {t.id for t in train} & {t.id for t in evaluation_tasks()}
    assert len(train) > 600 and sum('of the test tasks' in d['why'] for d in left_out) == len(left_out) >= 376


def test_no_test_pair_is_in_rearc_or_generated(made):
    tested = {canonical(p) for t in evaluation_tasks() for p in t.pairs}
    exact = {(a.tobytes(), a.shape, b.tobytes(), b.shape) for t in evaluation_tasks() for a, b in t.pairs}
    for t in rearc_tasks('auto')[0][::4]: assert not exact & {(a.tobytes(), a.shape, b.tobytes(), b.shape) for a, b in t.pairs}
    s = sequences(made)
    for c, t in zip(s.context[::7, -1], s.target[::7]): assert canonical((cut(s.grids[c]), cut(s.grids[t]))) not in tested


def plain_component(grid, y, x, same):
    part, todo = {(y, x)}, [(y, x)]
    while todo:
        r, c = todo.pop()
        for a, b in ((r+1, c), (r-1, c), (r, c+1), (r, c-1)):
            if 0 <= a < grid.shape[0] and 0 <= b < grid.shape[1] and (a, b) not in part and same(grid[a, b]): part.add((a, b)); todo.append((a, b))
    return part


def plain(name, g, v):
    "Each primitive as one would explain it."
    g = g.copy(); H, W = g.shape
    if name == 'mirror_x': return g[::-1]
    if name == 'mirror_y': return g[:, ::-1]
    if name == 'rotate90': return np.rot90(g, v['k'])
    if name == 'translate':
        out = np.full_like(g, v['fill'])
        for y in range(H):
            for x in range(W):
                if 0 <= y + v['dy'] < H and 0 <= x + v['dx'] < W: out[y + v['dy'], x + v['dx']] = g[y, x]
        return out
    if name == 'recolor': g[g == v['source']] = v['target']; return g
    if name == 'invert_palette':
        colours = sorted(set(g.ravel().tolist())); names = dict(zip(colours, colours[::-1]))
        return np.vectorize(names.get)(g).astype(np.uint8)
    if name == 'threshold_gt': return np.where(g > v['threshold'], v['high'], v['low']).astype(np.uint8)
    if name == 'flood_fill':
        start = g[v['y'], v['x']]
        for y, x in plain_component(g, v['y'], v['x'], lambda c: c == start): g[y, x] = v['fill']
        return g
    if name == 'extract_shape':
        cells = sorted(plain_component(g, v['y'], v['x'], lambda c: c != v['background'])); ys, xs = zip(*cells)
        out = np.full((max(ys) - min(ys) + 1, max(xs) - min(xs) + 1), v['background'], np.uint8)
        for y, x in cells: out[y - min(ys), x - min(xs)] = g[y, x]
        return out
    labels, n = ndimage.label((g == v['a']) | (g == v['b']), np.ones((3, 3)))
    for i in range(1, n + 1):
        if {v['a'], v['b']} <= set(g[labels == i].tolist()): g[labels == i] = 255
    g[g == 255] = v['target']
    return g


@pytest.mark.parametrize('name', NAMES)
def test_primitive_does_what_it_says(made, name):
    seen = 0
    for i in np.flatnonzero((made.program == NAMES.index(name)).any(1))[:40]:
        for d in range(3):
            states = [cut(g) for g in made.grids[i, d, :made.steps[i] + 1]]
            for (primitive, values), before, after in zip(made.describe(i), states, states[1:]):
                if primitive == name: assert np.array_equal(plain(name, before, values), after), (name, values); seen += 1
    assert seen >= 60


def test_a_task_never_leaves_a_grid_unchanged(made):
    last = made.grids[np.arange(len(made)), :, made.steps]
    assert (last != made.grids[:, :, 0]).any((2, 3)).all()
    h, w = sizes(made.grids[:, 0, 0])
    assert h.min() == w.min() == 6 and h.max() == w.max() == 14
    colours = [len(np.unique(g[g != OUTSIDE])) for g in made.grids[:, :, 0]]
    assert 4 <= np.quantile(colours, .02) and max(colours) == 6


def test_the_same_tasks_in_another_process(made):
    code = "import hashlib; from puzzle_research.arc.generator import generate; g = generate(1500, seed=11); print(hashlib.sha256(g.grids.tobytes() + g.params.tobytes()).hexdigest())"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert r.stdout.strip() == hashlib.sha256(made.grids.tobytes() + made.params.tobytes()).hexdigest()
    assert not np.array_equal(generate(50, seed=1).grids, generate(50, seed=2).grids)


def test_fifty_thousand_tasks_in_well_under_a_minute():
    start = time.process_time(); generate(5000, seed=1)
    assert (time.process_time() - start)*10 < 40


def test_components_equal_scipy():
    rng = np.random.default_rng(0)
    stack = stack_grids([rng.integers(0, 3, rng.integers(1, 31, 2)).astype(np.uint8) for _ in range(40)])
    labels = components(stack, (stack > 0) & (stack != OUTSIDE))
    for g, l in zip(stack, labels):
        n = sum(ndimage.label(g == c)[1] for c in (1, 2))
        assert len(np.unique(l[l >= 0])) == n and all(len(np.unique(g[l == k])) == 1 for k in np.unique(l[l >= 0]))


def test_objects_equal_the_walk_on_every_kind_of_grid(made):
    rng = np.random.default_rng(0)
    odd = [np.zeros((1, 1), np.uint8), np.full((30, 30), 7, np.uint8), np.tile([[1, 2], [2, 1]], (15, 15)).astype(np.uint8), np.ones((1, 30), np.uint8), rng.integers(0, 10, (30, 30)).astype(np.uint8)]
    grids = odd + [g for t in evaluation_tasks()[::9] for p in t.pairs for g in p] + [cut(g) for g in made.grids[:40, 0, 0]]
    o = extract(stack_grids(grids)).take(torch.arange(len(grids)))
    assert np.allclose(published_features(o).numpy(), np.stack([walk_features(g) for g in grids]), atol=1e-5)
    assert o.count.tolist() == [len(walk(g)) for g in grids]
    near = adjacency(o)
    assert torch.equal(near, near.transpose(1, 2)) and not near[~o.mask].any()


def test_symmetries_form_a_group():
    "Turning twice is turning once by the product; so augmentation never leaves the eight."
    g = np.arange(6).reshape(2, 3); images = [symmetry(g, k).tobytes() + bytes(symmetry(g, k).shape) for k in range(8)]
    for a in range(8):
        for b in range(8):
            h = symmetry(symmetry(g, a), b)
            assert h.tobytes() + bytes(h.shape) in images


def test_a_side_of_sixteen_turns_exactly():
    rng = np.random.default_rng(3)
    grids = [np.where(rng.random((h, w)) < .9, 4, 0).astype(np.uint8) for h, w in [(16, 16), (16, 5), (9, 16), (16, 30)]]
    plain = extract(stack_grids(grids), most=1).take(torch.arange(4))
    for k in range(8):
        direct = extract(stack_grids([symmetry(g, k) for g in grids]), most=1).take(torch.arange(4))
        view = turned(plain, torch.full((4,), k))
        assert torch.equal(view.shape, direct.shape) and torch.equal(view.box, direct.box) and torch.equal(view.sums, direct.sums)


def test_sequences_never_copy_a_grid(made):
    for s in (demonstrations(evaluation_tasks(), 3), demonstrations(evaluation_tasks(), 5, repeats=2), sequences(made), sequences(made, 5)):
        for c, t in zip(s.context.tolist(), s.target.tolist()):
            real = [i for i in c if i >= 0]
            assert len({*real, t}) == len(real) + 1 and c[-1] >= 0
        assert s.context.max() < len(s.grids) and (s.context[:, 0] >= -1).all()


def test_a_torn_cache_file_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv('PUZZLE_CACHE', str(tmp_path))
    stack = stack_grids([g for t in evaluation_tasks()[:3] for g in t.pairs[0]])
    first = table(stack); path = next((tmp_path/'arc-objects').iterdir())
    path.write_bytes(path.read_bytes()[:500])
    again = table(stack)
    assert torch.equal(first.box, again.box) and torch.equal(first.shape, again.shape)


def test_recolouring_keeps_what_lies_outside(): assert recolour(np.array([[OUTSIDE, 3]]), np.arange(10)[::-1]).tolist() == [[OUTSIDE, 6]]
def test_run_program_takes_any_size(): assert run_program(np.arange(30).reshape(1, 30).astype(np.uint8)%10, [('mirror_y', {})])[1][0, 0] == 9
