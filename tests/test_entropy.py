"The coder on batches, at its edges and at length. What is short stays in the notebooks."
import numpy as np
import pytest
import torch

from puzzle_research.codec.entropy import FrequencyTables, integer_frequencies
from puzzle_research.codec.exact import snap
from puzzle_research.codec.range_coder import MAX_TOTAL, TOP, UNIT, RangeDecoder, RangeEncoder
from numpy_coder import NumpyDecoder, NumpyEncoder


def draw(rng, tables, rows):
    "Symbols drawn from the tables."
    at = rows * tables.total + rng.integers(0, tables.total, rows.shape)
    return np.searchsorted(tables.axis, at, side='right') - 1 - rows * tables.symbols


def random_tables(rng, total):
    "Flat, skewed (one of `total`), single-symbol and holed rows of 40 symbols."
    p = rng.dirichlet(np.full(40, .1), 6)
    freq = integer_frequencies(p, total)
    skew, single, holes = np.zeros((3, 40), np.int64)
    skew[7], skew[23] = 1, total - 1
    single[11] = total
    holes[[0, 39]], holes[20] = total // 3, total - 2 * (total // 3)
    return FrequencyTables(np.concatenate([freq, [skew, single, holes]]))


@pytest.mark.parametrize('total', [997, 10 ** 6, MAX_TOTAL])
@pytest.mark.parametrize('lanes', [1, 33])
def test_round_trip_and_cost(total, lanes):
    rng = np.random.default_rng(total + lanes)
    tables = random_tables(rng, total)
    rows = rng.integers(0, tables.rows, (lanes, 400))
    symbols = draw(rng, tables, rows)
    digits, used = tables.encode_all(rows, symbols)
    assert digits.max() <= 9 and digits.shape[1] == used.max()
    np.testing.assert_array_equal(tables.decode_all(rows, digits), symbols)
    over = used - tables.cost(rows, symbols).sum(1)
    assert over.max() < 1 + 400 * total / UNIT * 10
    assert over.max() - over.min() < 3


@pytest.mark.parametrize('total', [997, 10 ** 6, MAX_TOTAL])
def test_compiled_coder_equals_the_numpy_one(total):
    "The same digits, and from any digits the same symbols; a symbol at a time and whole streams."
    rng = np.random.default_rng(total)
    tables = random_tables(rng, total)
    rows = rng.integers(0, tables.rows, (17, 300))
    symbols, any_digits = draw(rng, tables, rows), rng.integers(0, 10, (17, 200))
    ours, oracle = RangeEncoder(17), NumpyEncoder(17, 4000)
    read, read_oracle = RangeDecoder(any_digits), NumpyDecoder(any_digits)
    for r, s in zip(rows.T, symbols.T):
        ours.put(tables.start[r, s], tables.freq[r, s], total)
        oracle.put(tables.start[r, s], tables.freq[r, s], total)
        np.testing.assert_array_equal(read.peek(total), read_oracle.peek(total))
        x = tables.decode(read, r)
        read_oracle.skip(tables.start[r, x], tables.freq[r, x], total)
        np.testing.assert_array_equal(read.code, read_oracle.code)
    digits, used = oracle.finish()
    for got in (ours.finish(), tables.encode_all(rows, symbols)):
        np.testing.assert_array_equal(got[1], used)
        np.testing.assert_array_equal(got[0], digits[:, :used.max()])
    np.testing.assert_array_equal(tables.decode_all(rows, digits), symbols)


def test_rare_symbols_only():
    "Every symbol has 1 of 10^6: six digits each, exactly."
    tables = FrequencyTables([[1, 10 ** 6 - 1], [10 ** 6 - 1, 1]])
    rows = np.random.default_rng(0).integers(0, 2, (8, 150))
    digits, used = tables.encode_all(rows, rows, 900)
    assert used.max() <= 900
    np.testing.assert_array_equal(tables.decode_all(rows, digits), rows)


def test_single_symbol_rows_cost_nothing():
    tables = FrequencyTables([[0, 10 ** 6, 0]])
    rows = np.zeros((3, 5000), np.int64)
    digits, used = tables.encode_all(rows, rows + 1)
    assert used.max() == 0 and digits.shape == (3, 0)
    np.testing.assert_array_equal(tables.decode_all(rows, digits), rows + 1)


def test_lanes_of_different_lengths():
    "A lane that has ended takes a certain symbol: its digits are those of the lane alone."
    rng = np.random.default_rng(1)
    freq = integer_frequencies(rng.dirichlet(np.ones(10), 3))
    tables = FrequencyTables(np.concatenate([freq, [[10 ** 6] + [0] * 9]]))
    rows = rng.integers(0, 3, (20, 300))
    rows[np.arange(300) >= rng.integers(0, 300, 20)[:, None]] = 3
    symbols = draw(rng, tables, rows)
    digits, used = tables.encode_all(rows, symbols)
    np.testing.assert_array_equal(tables.decode_all(rows, digits), symbols)
    for i in range(20):
        n = (rows[i] < 3).sum()
        alone, length = tables.encode_all(rows[i:i + 1, :n], symbols[i:i + 1, :n])
        assert length[0] == used[i]
        np.testing.assert_array_equal(alone[0], digits[i, :used[i]])


CARRY = {
    'thirds': [3333, 3333, 3334],
    'tenths': [1000] * 10,
    'below': [999, 1, 8999, 1],
    'above': [1001, 8998, 1],
    'last': [9999, 1],
    'first': [1, 9999],
    'mid': [4999, 2, 4999],
}


@pytest.mark.parametrize('name', CARRY)
def test_carries(name):
    "Interval ends beside powers of ten: short sequences, then runs of nines that a late carry turns over."
    tables = FrequencyTables([CARRY[name]])
    k = tables.symbols
    every = np.stack([x.ravel() for x in np.meshgrid(*[np.arange(k)] * min(6, 14 // k + 2))], 1)
    rng = np.random.default_rng(2)
    edge = np.tile(np.array([0, k // 2, k - 1] * 22)[:64, None], 300)
    edge[np.arange(64), rng.integers(0, 300, 64)] = rng.integers(0, k, 64)
    edge[:, -1] = rng.integers(0, k, 64)
    for symbols in (every, edge):
        rows = np.zeros_like(symbols)
        digits, used = tables.encode_all(rows, symbols)
        np.testing.assert_array_equal(tables.decode_all(rows, digits), symbols)
        assert (used <= tables.cost(rows, symbols).sum(1) + 1.0001).all()


def test_a_long_carry_happens():
    "0.4999... plus a little: the chain of nines turns into 0.5000..., by a digit of 10 or more."
    encoder = RangeEncoder(1)
    encoder.put([4], [1], 10)
    for _ in range(500):
        encoder.put([9], [1], 10)
    encoder.low += encoder.range - 1
    encoder.low += 1
    assert (encoder.digits > 9).any() or encoder.low[0] >= TOP
    digits, used = encoder.finish()
    assert digits[0].tolist() == [5] and used[0] == 1


def exact(tables, symbols):
    "The interval by fractions, as long integers: low and size over total^n."
    low, size, whole = 0, 1, 1
    for s in symbols:
        low = low * tables.total + size * int(tables.start[0, s])
        size, whole = size * int(tables.freq[0, s]), whole * tables.total
    return low, size, whole


def test_digits_lie_in_the_exact_interval():
    "Where the total divides powers of ten nothing is rounded: the digits lie in the exact interval."
    rng = np.random.default_rng(3)
    tables = FrequencyTables([[1, 2, 3, 4]])
    symbols = rng.integers(0, 4, (50, 12))
    digits, used = tables.encode_all(np.zeros_like(symbols), symbols)
    for d, s in zip(digits, symbols):
        low, size, whole = exact(tables, s)
        value = int(''.join(map(str, d))) * whole
        assert low * 10 ** len(d) <= value < (low + size) * 10 ** len(d)


@pytest.mark.parametrize('fill', [0, 9, None])
@pytest.mark.parametrize('total', [997, 10 ** 6 - 1, 3 ** 18])
def test_any_digits_decode(fill, total):
    "Digits that nobody encoded give symbols of frequency 1 or more, and `code` stays inside `range`."
    rng = np.random.default_rng(4)
    tables = random_tables(rng, total)
    digits = rng.integers(0, 10, (16, 120)) if fill is None else np.full((16, 120), fill)
    decoder = RangeDecoder(digits)
    for _ in range(400):
        rows = rng.integers(0, tables.rows, 16)
        symbols = tables.decode(decoder, rows)
        assert (tables.freq[rows, symbols] > 0).all()
        assert (decoder.code >= 0).all() and (decoder.code < decoder.range).all()


def test_random_digits_survive_a_round_trip():
    "Symbols read from random digits encode to those digits again, but for the last few."
    rng = np.random.default_rng(5)
    tables = random_tables(rng, 10 ** 6)
    rows = rng.integers(0, 6, (8, 3000))
    digits = rng.integers(0, 10, (8, 900))
    symbols = tables.decode_all(rows, digits)
    n = int((tables.cost(rows, symbols).cumsum(1).max(0) < 890).sum())
    again, used = tables.encode_all(rows[:, :n], symbols[:, :n])
    for i in range(8):
        keep = int(tables.cost(rows[i, :n], symbols[i, :n]).sum()) - 6
        np.testing.assert_array_equal(again[i, :keep], digits[i, :keep])


def test_digits_do_not_depend_on_the_batch():
    rng = np.random.default_rng(6)
    tables = random_tables(rng, 10 ** 6)
    rows = rng.integers(0, tables.rows, (24, 200))
    symbols = draw(rng, tables, rows)
    whole, used = tables.encode_all(rows, symbols, 900)
    for step in (1, 7):
        parts = [tables.encode_all(rows[i:i + step], symbols[i:i + step], 900) for i in range(0, 24, step)]
        np.testing.assert_array_equal(np.concatenate([d for d, _ in parts]), whole)
        np.testing.assert_array_equal(np.concatenate([u for _, u in parts]), used)
    short = tables.decode_all(rows[3:5], whole[3:5, :used[3:5].max()])
    np.testing.assert_array_equal(short, symbols[3:5])


def test_growth():
    tables = FrequencyTables([[1, 9]])
    symbols = np.zeros((2, 5000), np.int64)
    symbols[1] = 1
    digits, used = tables.encode_all(np.zeros_like(symbols), symbols)
    np.testing.assert_array_equal(tables.decode_all(np.zeros_like(symbols), digits), symbols)
    encoder = RangeEncoder(2, 900)
    for _ in range(901):
        tables.encode(encoder, [0, 0], [1, 0])
    encoder.put([0, 5], [10, 1], 10)
    with pytest.raises(ValueError, match='lane 1 needs 902 digits, 900 fit'):
        encoder.finish()


TABLES = FrequencyTables([[0, 4, 6]])


@pytest.mark.parametrize('call, word', [
    (lambda: TABLES.encode(RangeEncoder(3), [0, 0, 0], [1, 2, 0]), 'lane 2: .*frequency 0'),
    (lambda: TABLES.encode(RangeEncoder(3), 0, [1, 3, 0]), 'lane 1: symbol 3 of row 0'),
    (lambda: TABLES.encode(RangeEncoder(3), [-1, 0, 0], [1, 2, 1]), 'lane 0: symbol 1 of row -1'),
    (lambda: RangeEncoder(3).put([0, 9, 0], 2, 10), 'lane 1: .*start 9 and frequency 2 of 10'),
    (lambda: RangeEncoder(3).put(0, 1, 10 ** 10), 'at most 1000000000'),
    (lambda: RangeDecoder([[0, 1], [10, 3]]), 'lane 1 holds 10'),
    (lambda: FrequencyTables([[4, 6], [4, 5]]), 'row 1 sums to 9, row 0 to 10'),
    (lambda: FrequencyTables([[4, 6], [-1, 11]]), 'row 1'),
    (lambda: integer_frequencies([[.5, .5], [np.nan, 1]]), 'row 1 holds'),
    (lambda: integer_frequencies([[0., 0.]]), 'row 0 sums to 0'),
    (lambda: integer_frequencies(np.ones(4), 3), 'total 3 for 4 symbols'),
])
def test_errors(call, word):
    with pytest.raises(ValueError, match=word):
        call()


@pytest.mark.parametrize('total', [257, 10 ** 6, MAX_TOTAL])
@pytest.mark.parametrize('alpha', [.01, 1.])
def test_integer_frequencies(total, alpha):
    rng = np.random.default_rng(7)
    p = rng.dirichlet(np.full(257, alpha), (3, 20))
    freq = integer_frequencies(p, total)
    assert freq.shape == p.shape and freq.min() >= 1 and (freq.sum(-1) == total).all()
    excess = (p * np.log10(np.maximum(p, 1e-300) / (freq / total))).sum(-1)
    assert total == 257 or excess.max() < 2e-3
    np.testing.assert_array_equal(integer_frequencies(torch.from_numpy(p), total), freq)
    counts = rng.integers(0, 10 ** 6, 257)
    counts[0] = 2 ** 24
    freq = integer_frequencies(counts, total)
    assert freq.min() >= 1 and freq.sum() == total
    np.testing.assert_array_equal(freq, integer_frequencies(torch.from_numpy(counts), total))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_snapped_sums_across_threads_and_batches(threads):
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((96, 700), (700, 33)))
    x, w, seen = snap(x), snap(w, 12), set()
    for n, batch in ((1, 96), (2, 96), (4, 32), (2, 1), (1, 7)):
        threads(n)
        seen.add(torch.cat([x[i:i + batch] @ w for i in range(0, 96, batch)]).numpy().tobytes())
    assert len(seen) == 1


@pytest.mark.parametrize('bits', [4, 10, 20])
def test_snap(bits):
    rng = np.random.default_rng(8)
    x = rng.normal(size=(40, 512)) * 100
    y = snap(x, bits)
    assert np.abs(x - y).max() <= 2. ** -bits / 2 and (y * 2 ** bits % 1 == 0).all()
    sums = {y[:, rng.permutation(512)].sum(1).tobytes() for _ in range(20)}
    assert len(sums) == 1
    np.testing.assert_array_equal(snap(torch.from_numpy(x), bits).numpy(), y)
    assert len({x[:, rng.permutation(512)].sum(1).tobytes() for _ in range(20)}) > 1


def test_convolution_of_snapped_numbers():
    g = torch.Generator().manual_seed(9)
    x, w = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((9, 16, 12, 12), (8, 16, 3, 3)))
    x, w = snap(x), snap(w, 12)
    whole = torch.conv2d(x, w, padding=1)
    assert torch.equal(whole, torch.cat([torch.conv2d(x[i:i + 1], w, padding=1) for i in range(9)]))
    patches = torch.nn.functional.unfold(x, 3, padding=1)
    assert torch.equal(whole.flatten(2), w.flatten(1) @ patches)
    if torch.cuda.is_available():
        assert torch.equal(whole, torch.conv2d(x.cuda(), w.cuda(), padding=1).cpu())


@pytest.mark.parametrize('steps', [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_many_lanes(steps):
    "2,048 lanes of bytes, 10 MB where slow: together they cost less than a digit each above the information."
    rng = np.random.default_rng(10)
    p = 1 / np.arange(1, 257) ** 1.2
    tables = FrequencyTables(integer_frequencies(np.stack([p / p.sum(), p[::-1] / p.sum()])))
    rows = rng.integers(0, 2, (2048, steps)).astype(np.int16)
    symbols = draw(rng, tables, rows.astype(np.int64)).astype(np.int16)
    digits, used = tables.encode_all(rows, symbols)
    np.testing.assert_array_equal(tables.decode_all(rows, digits), symbols)
    assert (used - tables.cost(rows, symbols).sum(1)).max() < 1.0001
