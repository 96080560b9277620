"Diagnostics at full size: anchors on true CIFAR-10 pixels, ceilings against simulation, an exact bound."
import io, json, math, os
from pathlib import Path

import numpy as np, pyarrow.parquet as pq, pytest, torch
from PIL import Image

from puzzle_research.core.diagnose import (CodeUsage, anchors, bits_used, codebook_perplexity, effective_rank,
                                           fit_digits, fit_pca, grad_norms, isotropy, lloyd_max,
                                           mutual_information, psnr, rank_ceiling, rankme,
                                           reverse_water_filling)
from shared import heavy_imports

CIFAR = Path(os.environ.get('PUZZLE_DATA', ''))/'cifar10'


def true_pixels(split):
    entries = json.loads((CIFAR/'lossy_rows.json').read_text())
    lossy = {entry['row'] for entry in entries if entry['split'] == split}
    rows = pq.read_table(CIFAR/f'{split}.parquet', columns=['img'])['img'].to_pylist()
    kept = [row['bytes'] for i, row in enumerate(rows) if i not in lossy]
    return np.stack([np.asarray(Image.open(io.BytesIO(data))).reshape(-1) for data in kept])


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get('PUZZLE_DATA') or not (CIFAR/'lossy_rows.json').exists(),
                    reason='needs PUZZLE_DATA with cifar10 and its lossy_rows.json')
def test_anchors_on_cifar10(tmp_path):
    train, test = true_pixels('train'), true_pixels('test')
    assert (len(train), len(test)) == (49_914, 9_975)
    found = anchors(train, test, cache=tmp_path)
    labels = 'PCA, 900 x 10 levels', 'PCA + greedy digits', 'Gaussian bound'
    simple, greedy, bound = (found[label] for label in labels)
    assert bound['psnr'] == pytest.approx(36.0, abs=.05) and bound['mse'] == pytest.approx(2.51e-4, rel=.01)
    assert simple['psnr'] == pytest.approx(27.25, abs=.05)
    assert greedy['psnr'] == pytest.approx(32.19, abs=.05)
    assert greedy['mse'] == pytest.approx(6.04e-4, rel=.01)
    assert simple['psnr_image_mean'] > simple['psnr'] and greedy['psnr_image_mean'] > greedy['psnr']
    assert anchors(train, test, cache=tmp_path) == found
    codec = fit_digits(fit_pca(train, tmp_path/'pca.npz'), train, cache=tmp_path/'digits.npz')
    q = codec.encode(test[:8])
    assert q.shape == (8, 900) and q.dtype == np.uint8 and codec.digits.sum() == 900
    assert (codec.decode(q.reshape(8, 30, 30)) == codec.decode(q)).all()


@pytest.mark.parametrize('n, d', [(4096, 256), (500, 800)])
def test_rank_ceilings_against_simulation(n, d):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(n + d))
    assert rankme(x) == pytest.approx(rank_ceiling(n, d), rel=2e-3)
    assert effective_rank(x) == pytest.approx(rank_ceiling(n, d, 'effective_rank'), rel=3e-3)
    assert isotropy(x) == pytest.approx(rank_ceiling(n, d, 'isotropy'), abs=.03)


def test_published_rankme_ceilings():
    assert rank_ceiling(4096, 256) == pytest.approx(253.9, abs=.1)
    assert rank_ceiling(4096, 384) == pytest.approx(379.4, abs=.1)


def rate(variances, level):
    return np.maximum(0, .5*np.log2(variances[variances > 0]/level)).sum()


@pytest.mark.parametrize('bits', [0, .5, 3, 40, 900])
def test_water_filling_spends_exactly_the_rate(bits):
    v = np.random.default_rng(0).gamma(.3, size=200)
    mse, level = reverse_water_filling(v, bits)
    assert rate(v, level) == pytest.approx(bits, abs=1e-8)
    assert mse == pytest.approx(np.minimum(v, level).mean())


def test_water_filling_equals_the_definition_by_search():
    v = np.random.default_rng(1).gamma(.3, size=200)
    low, high = 0., v.max()
    for _ in range(200):
        middle = (low + high)/2
        low, high = (middle, high) if rate(v, middle) > 70 else (low, middle)
    assert reverse_water_filling(v, 70)[1] == pytest.approx(low)


def test_greedy_digits_stand_between_the_simple_code_and_the_bound_on_a_gaussian_source():
    random = np.random.default_rng(0)
    basis, _ = np.linalg.qr(random.normal(size=(60, 60)))
    deviation = .1*np.arange(1, 61)**-1.
    def gaussian(n):
        x = (random.normal(size=(n, 60))*deviation) @ basis + .5
        return x.clip(0, 1).astype(np.float32)
    found = anchors(gaussian(20_000), gaussian(5_000), total=40)
    labels = 'PCA, 40 x 10 levels', 'PCA + greedy digits', 'Gaussian bound'
    simple, greedy, bound = (found[label]['psnr'] for label in labels)
    assert simple + 2 < greedy < bound - 1
    assert greedy > bound - 5.5        # a scalar digit loses about 3.6 dB to Shannon, whole digits some more


def lloyd_by_hand(s, levels, iters=300):
    "(levels, mean squared error) of the plain algorithm."
    for _ in range(iters):
        cell = np.searchsorted((levels[1:] + levels[:-1])/2, s)
        sums, counts = np.bincount(cell, s, len(levels)), np.bincount(cell, minlength=len(levels))
        levels = np.where(counts > 0, sums/np.maximum(counts, 1), levels)
    cell = np.searchsorted((levels[1:] + levels[:-1])/2, s)
    return levels, ((s - levels[cell])**2).mean()


def test_lloyd_max_does_no_worse_than_the_best_of_many_random_starts():
    s = np.random.default_rng(0).laplace(size=4000)
    starts = [np.sort(np.random.default_rng(seed).choice(s, 10, replace=False)) for seed in range(20)]
    best = min(lloyd_by_hand(s, start)[1] for start in starts)
    assert lloyd_max(s, 10)[1] < best*1.005


def test_usage_is_counted_over_the_epoch_however_it_is_cut():
    indices, rows = torch.randint(0, 50, (1200, 9), generator=torch.Generator().manual_seed(0)), []
    for size in (1, 7, 1200):
        usage = CodeUsage(64)
        for batch in indices.split(size):
            usage.update(batch)
        rows.append(usage.record(0))
    assert rows[0] == rows[1] == rows[2]
    assert rows[0]['dead_codes'] == 14 and rows[0]['codes_used'] == 50
    whole = codebook_perplexity(torch.bincount(indices.flatten()))
    assert rows[0]['codebook_perplexity'] == pytest.approx(whole)


@pytest.mark.parametrize('n, eps', [(200, .06), (1000, .005)])
def test_independent_cells_carry_no_information(n, eps):
    random = np.random.default_rng(0)
    found = mutual_information(random.integers(0, 10, (n, 60, 60)), random.integers(0, 10, n))
    assert abs(found.mean()) < eps       # the plug-in estimate claims .34 bits at n = 200


def test_a_grid_of_repeated_rows_is_found_out():
    row = np.random.default_rng(0).integers(0, 10, (500, 1, 30))
    bits = bits_used(np.repeat(row, 30, axis=1))
    assert bits['capacity'] == pytest.approx(2989.735, abs=1e-3)
    assert bits['marginal'] > 2_950 and 30*math.log2(10) <= bits['conditional'] < 210


def test_gradient_norms_add_up_to_the_total():
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 2))
    model(torch.randn(3, 5)).pow(2).sum().backward()
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()
    assert math.hypot(*grad_norms(model).values()) == pytest.approx(total, rel=1e-6)
    assert list(grad_norms(model)) == ['0', '2']


def test_psnr_of_known_errors():
    assert psnr(1e-3) == pytest.approx(30) and psnr(2.51e-4) == pytest.approx(36.0, abs=.01)


def test_importing_them_loads_no_plotting():
    assert heavy_imports('import puzzle_research.core.diagnose', ('matplotlib', 'pandas', 'sklearn'))[0] == []
