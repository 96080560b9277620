"Diagnostics at full size: anchors on the true CIFAR-10 pixels, ceilings against simulation, exactness of the bound."
import io, json, math, os, time
from pathlib import Path

import numpy as np, pytest, torch

from puzzle_research.core.diagnose import (anchors, bits_used, codebook_perplexity, CodeUsage, effective_rank, fit_digits, fit_pca, grad_norms,
                                           isotropy, lloyd_max, mutual_information, psnr, rank_ceiling, rankme, reverse_water_filling)

CIFAR = Path(os.environ.get('PUZZLE_DATA', ''))/'cifar10'


def true_pixels(split):
    from PIL import Image
    import pyarrow.parquet as pq
    lossy = {r['row'] for r in json.loads((CIFAR/'lossy_rows.json').read_text()) if r['split'] == split}
    rows = pq.read_table(CIFAR/f'{split}.parquet', columns=['img'])['img'].to_pylist()
    return np.stack([np.asarray(Image.open(io.BytesIO(r['bytes']))).reshape(-1) for i, r in enumerate(rows) if i not in lossy])


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get('PUZZLE_DATA') or not (CIFAR/'lossy_rows.json').exists(), reason='needs PUZZLE_DATA with cifar10 and its lossy_rows.json')
def test_anchors_on_cifar10(tmp_path):
    train, test = true_pixels('train'), true_pixels('test')
    assert (len(train), len(test)) == (49_914, 9_975)
    start = time.process_time()
    a = anchors(train, test, cache=tmp_path)
    assert time.process_time() - start < 120      # seconds of CPU: a minute on two cores
    assert a['Gaussian bound']['psnr'] == pytest.approx(36.0, abs=.05) and a['Gaussian bound']['mse'] == pytest.approx(2.51e-4, rel=.01)
    assert a['PCA, 900 x 10 levels']['psnr'] == pytest.approx(27.25, abs=.05)
    assert a['PCA + greedy digits']['psnr'] == pytest.approx(32.19, abs=.05) and a['PCA + greedy digits']['mse'] == pytest.approx(6.04e-4, rel=.01)
    assert all(v['psnr_image_mean'] > v['psnr'] for k, v in a.items() if k != 'Gaussian bound')
    assert anchors(train, test, cache=tmp_path) == a
    codec = fit_digits(fit_pca(train, tmp_path/'pca.npz'), train, cache=tmp_path/'digits.npz')
    q = codec.encode(test[:8])
    assert q.shape == (8, 900) and q.dtype == np.uint8 and codec.digits.sum() == 900
    assert (codec.decode(q.reshape(8, 30, 30)) == codec.decode(q)).all()


@pytest.mark.parametrize('n,d', [(4096, 256), (4096, 384), (500, 800)])
def test_rank_ceilings_against_simulation(n, d):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(n + d))
    assert rankme(x) == pytest.approx(rank_ceiling(n, d), rel=2e-3)
    assert effective_rank(x) == pytest.approx(rank_ceiling(n, d, 'effective_rank'), rel=3e-3)
    assert isotropy(x) == pytest.approx(rank_ceiling(n, d, 'isotropy'), abs=.03)


def test_published_rankme_ceilings():
    assert rank_ceiling(4096, 256) == pytest.approx(253.9, abs=.1) and rank_ceiling(4096, 384) == pytest.approx(379.4, abs=.1)


@pytest.mark.parametrize('bits', [0, .5, 3, 40, 900])
def test_water_filling_spends_exactly_the_rate(bits):
    v = np.random.default_rng(0).gamma(.3, size=200)
    mse, level = reverse_water_filling(v, bits)
    assert np.maximum(0, .5*np.log2(v[v > 0]/level)).sum() == pytest.approx(bits, abs=1e-8)
    assert mse == pytest.approx(np.minimum(v, level).mean())


def test_water_filling_equals_the_definition_by_search():
    v = np.random.default_rng(1).gamma(.3, size=200); lo, hi = 0., v.max()
    for _ in range(200):
        mid = (lo + hi)/2
        lo, hi = (mid, hi) if np.maximum(0, .5*np.log2(v/mid)).sum() > 70 else (lo, mid)
    assert reverse_water_filling(v, 70)[1] == pytest.approx(lo)


def test_greedy_digits_stand_between_the_simple_code_and_the_bound_on_a_gaussian_source():
    rng = np.random.default_rng(0); basis, _ = np.linalg.qr(rng.normal(size=(60, 60))); std = .1*np.arange(1, 61)**-1.
    make = lambda n: ((rng.normal(size=(n, 60))*std) @ basis + .5).clip(0, 1).astype(np.float32)
    a = anchors(make(20_000), make(5_000), total=40)
    simple, greedy, bound = (a[k]['psnr'] for k in ('PCA, 40 x 10 levels', 'PCA + greedy digits', 'Gaussian bound'))
    assert simple + 2 < greedy < bound - 1
    assert greedy > bound - 5.5        # a scalar digit loses about 3.6 dB to Shannon, whole digits some more


def test_lloyd_max_does_no_worse_than_the_best_of_many_random_starts():
    s = np.random.default_rng(0).laplace(size=4000); best = np.inf
    for seed in range(20):
        levels = np.sort(np.random.default_rng(seed).choice(s, 10, replace=False))
        for _ in range(300):
            j = np.searchsorted((levels[1:] + levels[:-1])/2, s); levels = np.array([s[j == i].mean() if (j == i).any() else levels[i] for i in range(10)])
        best = min(best, ((s - levels[np.searchsorted((levels[1:] + levels[:-1])/2, s)])**2).mean())
    assert lloyd_max(s, 10)[1] < best*1.005


def test_usage_is_counted_over_the_epoch_however_it_is_cut():
    idx = torch.randint(0, 50, (1200, 9), generator=torch.Generator().manual_seed(0)); rows = []
    for size in (1, 7, 1200):
        u = CodeUsage(64)
        for b in idx.split(size): u.update(b)
        rows.append(u.record(0))
    assert rows[0] == rows[1] == rows[2] and rows[0]['dead_codes'] == 14 and rows[0]['codes_used'] == 50
    assert rows[0]['codebook_perplexity'] == pytest.approx(codebook_perplexity(torch.bincount(idx.flatten())))


@pytest.mark.parametrize('n,eps', [(200, .06), (1000, .005)])
def test_independent_cells_carry_no_information(n, eps):
    rng = np.random.default_rng(0); mi = mutual_information(rng.integers(0, 10, (n, 60, 60)), rng.integers(0, 10, n))
    assert abs(mi.mean()) < eps       # the plug-in estimate claims .34 bits at n = 200


def test_a_grid_of_repeated_rows_is_found_out():
    p = np.repeat(np.random.default_rng(0).integers(0, 10, (500, 1, 30)), 30, axis=1)
    b = bits_used(p)
    assert b['marginal'] > 2_950 and 30*math.log2(10) <= b['conditional'] < 210 and b['capacity'] == pytest.approx(2989.735, abs=1e-3)


def test_gradient_norms_add_up_to_the_total():
    m = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 2)); m(torch.randn(3, 5)).pow(2).sum().backward()
    total = torch.nn.utils.clip_grad_norm_(m.parameters(), math.inf).item()
    assert math.hypot(*grad_norms(m).values()) == pytest.approx(total, rel=1e-6) and list(grad_norms(m)) == ['0', '2']


def test_psnr_of_known_errors():
    assert psnr(1e-3) == pytest.approx(30) and psnr(2.51e-4) == pytest.approx(36.0, abs=.01)
