"The language codec as its users meet it: the packaged weights, files, the command line, runs."
import hashlib, lzma, math, signal, time

import numpy as np, pytest, torch

from puzzle_research.codec.range_coder import RangeDecoder
from puzzle_research.core.checkpoint import load_state, pack
from puzzle_research.core.config import root
from puzzle_research.core.data import load
from puzzle_research.core.puzzle import CELLS, check_codec, load_puzzles, save_puzzles
from puzzle_research.core.quantize import count_parameters
from puzzle_research.language_puzzle import (
    LIMIT, WEIGHTS, Config, LanguagePuzzle, build, cells_used, decode_file, encode_file, load_codec)
from puzzle_research.text.any_text import (
    BYTES, HEAD, LEARNED, PLAIN, decode_any, encode_any, is_segment, segments)
from puzzle_research.text.exact_model import TOTAL, ExactModel, Lanes
from puzzle_research.text.lexicon import CLASSES
from puzzle_research.text.stream import WINDOWED, read_head
from puzzle_research.text.windows import joined, windows
from puzzle_research.text.word_list import unpack
from puzzle_research.text.word_model import learned_numbers
from shared import CHOSEN, PAPERMILL, PUZZLE, SMALL, as_options, assert_same_run
from shared import finish, killed_and_resumed, only_run, start, wait_until

SYSTEM = '03_language_puzzle'


@pytest.fixture(scope='module')
def codec():
    return LanguagePuzzle.from_pretrained(recipe='stream')


@pytest.fixture(scope='module')
def prose():
    return joined(load('bundled_prose', 'test'))


# the codec

@pytest.mark.parametrize('recipe, parameters', [('seed', 76_896), ('seed_large', 1_477_376)])
def test_parameter_counts(recipe, parameters):
    assert count_parameters(build(Config(recipe=recipe))) == parameters


def test_learned_numbers(codec):
    assert learned_numbers(codec.model) <= LIMIT == 76_896


def test_numbers_of_the_word_list_are_all_that_is_stored(codec):
    "The packed list alone gives words and classes back, and its bytes are what is counted."
    lexicon = codec.model.lexicon
    packed, groups = lexicon.packed()
    rows, classes = unpack(packed, groups, lexicon.symbols)
    assert [''.join(lexicon.alphabet[i - 1] for i in row) for row in rows] == lexicon.words
    assert classes == lexicon.classes.tolist() and max(classes) < CLASSES
    assert packed.dtype == np.uint8
    assert lexicon.numbers == packed.nbytes + 2*len(groups) + len(lexicon.alphabet)
    assert len(set(lexicon.words)) == len(lexicon.words)


def test_packaged_weights_are_small():
    assert WEIGHTS.stat().st_size < 400_000


def test_conformance(codec, prose):
    def fresh(): return LanguagePuzzle.from_pretrained(recipe='stream')
    texts = [*windows(prose)[:2], 'short', '']
    assert check_codec(codec, texts, lossless=True, fresh=fresh)['digits_used'] == 10


def random_characters(n):
    points = np.random.default_rng(0).integers(0, 0x110000 - 2048, n)
    return ''.join(chr(c + 2048*(c >= 0xD800)) for c in points)


ODD = {
    'empty': '',
    'one letter': 'a',
    'one emoji': '🙂',
    'family emoji': '\U0001F468\u200d\U0001F469\u200d\U0001F467',
    'zeros': '\0'*128,
    'line ends': 'a\r\nb\rc\n\n',
    'byte order mark': '\ufeffx',
    'highest character': '\U0010FFFF'*128,
    'around the surrogates': '\ud7ff\ue000'*64,
    'random characters': random_characters(128),
    '147 of any': '\U0010FFFF'*147,
    'one character': 'a'*147,
    'spaces': ' '*300,
    'words for long': 'the '*80,
    'combining': 'e\u0301'*64,
    'right to left': 'שלום עולם '*9,
    'tokens': ' <unk> @-@ = = \n'*8,
}


@pytest.fixture(scope='module')
def odd(codec):
    "Puzzles of the odd texts, and what they decode to, read in the opposite order."
    puzzles = codec.encode(list(ODD.values()))
    return dict(zip(ODD, puzzles)), dict(zip(ODD, codec.decode(puzzles.flip(0))[::-1]))


@pytest.mark.parametrize('name', ODD)
def test_odd_texts(odd, name):
    assert odd[1][name] == ODD[name]


@pytest.mark.parametrize('name', ['empty', 'one emoji', 'line ends', '147 of any'])
def test_company_changes_no_digit(codec, odd, name):
    assert torch.equal(codec.encode([ODD[name]])[0], odd[0][name])


def test_cells_after_the_stream_carry_nothing(odd):
    puzzles = torch.stack(list(odd[0].values()))
    used = cells_used(puzzles)
    for p, u in zip(puzzles.flatten(1), used):
        assert not p[u:].any() and (u == 0 or p[u-1])
    assert cells_used(torch.zeros(1, 30, 30, dtype=torch.uint8)).tolist() == [0]
    assert used[list(ODD).index('tokens')] < 256


def test_any_digits_decode(codec):
    g = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 10, (4, 30, 30), generator=g, dtype=torch.uint8)
    noise[0], noise[1] = 9, 0                                         # raw code points; all zeros
    for text in codec.decode(noise, most=500):
        text.encode('utf-8')


def test_threads_change_no_digit(codec, prose):
    texts, threads = windows(prose)[:3], torch.get_num_threads()
    whole = codec.encode(texts)
    torch.set_num_threads(2 if threads == 1 else 1)
    alone = codec.encode(texts[2:3])
    torch.set_num_threads(threads)
    assert torch.equal(whole[2:3], alone)


def test_frequencies_are_a_distribution_and_need_no_neighbour(codec, prose):
    exact, lexicon = ExactModel(codec.model), codec.model.lexicon
    ids = torch.from_numpy(np.stack([lexicon.ids(w) for w in windows(prose)[:3]])).long()
    many, one = Lanes(exact, 3), Lanes(exact, 1)
    for x in ids.T[:60]:
        freq = many.frequencies()
        assert (freq.sum(1) == TOTAL).all() and (freq >= 1).all()
        assert torch.equal(freq[1:2], one.frequencies())
        many.advance(x)
        one.advance(x[1:2])


def test_state_is_exact_in_any_order_of_summation(codec):
    "A state whose products are added backwards is the same state: all sums are exact."
    exact, g = ExactModel(codec.model), torch.Generator().manual_seed(0)
    h = (torch.rand(4, len(exact.start), generator=g, dtype=torch.float64)*8192 - 4096).round()/4096
    backwards = sum(h[:, i:i+1]*exact.recur[i] for i in reversed(range(h.shape[1])))
    assert torch.equal(h @ exact.recur, backwards)


def test_a_window_costs_the_cheap_head(codec, prose):
    digits = codec.encode(windows(prose)[:1]).reshape(1, CELLS).numpy()
    assert read_head(RangeDecoder(digits))[0].tolist() == [WINDOWED]


@pytest.mark.parametrize('texts, why', [
    (['a', 'b', 'a'*10_000], 'text 2 has 10,000 characters and needs more than the 900 cells'),
    (['\U000F0000'*149], 'text 0 has 149 characters'),
    (['a', 'ab\udc80'], 'text 1 holds .* at character 2'),
    ([b'abc'], 'text 0 is bytes'),
    ('abc', 'a batch of one'),
])
def test_what_does_not_fit_is_named(codec, texts, why):
    with pytest.raises((ValueError, TypeError), match=why):
        codec.encode(texts)


def test_too_much_prose_is_named(codec, prose):
    with pytest.raises(ValueError, match='text 1 has 5,000 characters'):
        codec.encode(['a', prose[:5000]])


def test_saved_and_read_back_it_is_the_same_codec(codec, tmp_path):
    codec.save(tmp_path/'codec.safetensors')
    saved, packaged = (pack(load_state(path)) for path in (tmp_path/'codec.safetensors', WEIGHTS))
    assert saved[0] == packaged[0]
    assert all(torch.equal(tensor, packaged[1][name]) for name, tensor in saved[1].items())


# files

def there_and_back(folder, raw): # -> puzzles of a text file whose bytes come back
    source, puzzles, target = folder/'t.txt', folder/'t.puzzle.json', folder/'back.txt'
    source.write_bytes(raw)
    n = encode_file(source, puzzles)
    decode_file(puzzles, target)
    assert target.read_bytes() == raw
    return n


@pytest.mark.parametrize('raw, least', [
    (b'', 1),
    (b'\xef\xbb\xbfbom\r\nline\r\n', 1),
    ('🙂'.encode(), 1),
    (b'\0'*1000, 1),
    (('日本語の文章。'*100).encode(), 1),
    ('\ud7ff\ue000\U0001F600\U00020000\U000E0001\U000F0000\U0010FFFF'.encode(), 1),
])
def test_odd_files(tmp_path, raw, least):
    assert there_and_back(tmp_path, raw) >= least


@pytest.mark.slow
def test_200_kilobytes(tmp_path, prose):
    "More than 600 characters a puzzle, on prose unlike that of the training."
    assert there_and_back(tmp_path, (prose*12).encode()[:200_000]) < 300


@pytest.mark.slow
def test_10_megabytes(tmp_path):
    raw = joined(load('wikitext-2-v1', 'train')).encode()[:10_000_000]
    there_and_back(tmp_path, raw.decode(errors='ignore').encode())


@pytest.mark.slow
@pytest.mark.parametrize('what', ['encode', 'decode'])
def test_an_interrupted_file_leaves_nothing(tmp_path, what):
    "Ctrl-C while a text of 2 MB is coded: one line, exit 130, no file."
    source = tmp_path/'t.txt'
    source.write_text(noise('ascii', 2_000_000))
    if what == 'decode':
        encode_file(source, tmp_path/'t.json')
        source = tmp_path/'t.json'
    before = set(tmp_path.iterdir())
    p = start([PUZZLE, what, source, '-o', tmp_path/('x.json' if what == 'encode' else 'x.txt')], tmp_path)
    wait_until(lambda: set(tmp_path.iterdir()) != before, p)
    time.sleep(3)
    p.send_signal(signal.SIGINT)
    out, _ = p.communicate(timeout=60)
    assert p.returncode == 130 and 'nothing was written' in out and 'Traceback' not in out
    assert set(tmp_path.iterdir()) == before


def test_changed_or_missing_puzzles_are_noticed(tmp_path, prose):
    (tmp_path/'t.txt').write_text(prose[:1500])
    encode_file(tmp_path/'t.txt', tmp_path/'t.json')
    puzzles, meta = load_puzzles(tmp_path/'t.json')
    save_puzzles(tmp_path/'short.json', puzzles[:-1], meta)
    with pytest.raises(ValueError, match='a digit was changed or a puzzle is missing'):
        decode_file(tmp_path/'short.json', tmp_path/'x.txt')


# texts that are no English

NOISE = {'ascii': (0x20, 0x7F), 'any': (0, 0x110000), 'emoji': (0x1F300, 0x1FAFF), 'CJK': (0x4E00, 0xA000),
         'Cyrillic': (0x400, 0x500), 'bytes': (0, 256)}     # characters from, to


def noise(kind, size, seed=0): # -> str that no model can foretell
    points = np.random.default_rng(seed).integers(*NOISE[kind], size)
    return ''.join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


def check_promise(puzzles, text):
    "Two digits a character where all of it is printable ASCII, 2.41 a byte elsewhere, and one puzzle begun."
    most = 2 if text.isascii() and text.isprintable() else 2.41
    assert len(puzzles)*CELLS < most*len(text.encode()) + HEAD + CELLS


@pytest.mark.parametrize('kind', NOISE)
@pytest.mark.parametrize('size', [1, 100, 3000])
def test_noise_costs_what_is_promised(codec, kind, size):
    text = noise(kind, size)
    puzzles = codec.encode_text(text)
    assert codec.decode_text(puzzles) == text
    check_promise(puzzles, text)


@pytest.mark.parametrize('seed', range(20))
def test_mixtures_cost_what_is_promised(seed):
    "Texts that change their nature: what was learned of one piece misleads in the next."
    rng = np.random.default_rng(seed)
    kinds = ['ascii'] if seed % 4 == 0 else list(NOISE)
    pieces = [noise(rng.choice(kinds), rng.integers(1, 400), seed + i) for i in range(rng.integers(1, 12))]
    text = ''.join(p*int(rng.integers(1, 4)) for p in pieces)
    digits = encode_any(text)
    assert decode_any(digits) == text
    check_promise(digits, text)


def test_code_and_other_scripts():
    rows = load('bundled_texts', 'test')
    texts = [bytes(rows.item(i)['text']).decode() for i in range(len(rows))]
    for text in texts:
        digits = encode_any(text)
        assert decode_any(digits) == text
        check_promise(digits, text)
    assert len(encode_any(texts[0]))*CELLS*math.log2(10)/len(texts[0]) < 2.1     # Python; xz -9 needs 2.35


@pytest.fixture(scope='module')
def source():
    "Python that comes with the package."
    return (root()/'puzzle_research/text/codec.py').read_text()*3


def test_code_is_coded_below_xz(codec, source):
    puzzles = codec.encode_text(source)
    assert codec.decode_text(puzzles) == source
    assert is_segment(puzzles[0].flatten().numpy())
    assert len(puzzles)*CELLS*math.log2(10)/8 < len(lzma.compress(source.encode(), preset=9))


def test_learned_digits_are_the_same_every_time():
    "The digest is of digits written when the format was made: another is another format."
    text = 'to be, or not to be: that is the question. '*40
    digits = encode_any(text)
    assert hashlib.sha256(digits.tobytes()).hexdigest()[:16] == '7a6bc924b0010571'
    assert np.array_equal(digits, encode_any(text)) and decode_any(digits) == text


def test_segments_are_coded_apart_and_cut_no_character():
    text = 'aé日🙂'*500
    parts = segments(text.encode(), 999)
    assert len(parts) == 6 and ''.join(p.decode() for p in parts) == text
    digits = encode_any(text, 999)
    assert decode_any(digits) == text
    assert np.array_equal(digits[:len(encode_any(parts[0].decode()))], encode_any(parts[0].decode()))


def test_a_stream_of_which_puzzles_are_missing_is_noticed(source):
    digits = encode_any(source)
    for wrong in (digits[1:], digits[:-1]):
        with pytest.raises(ValueError, match='puzzles are missing or changed'):
            decode_any(wrong)


def test_any_digits_after_a_head_decode():
    digits = encode_any('noise '*200)
    rng = np.random.default_rng(1)
    for model in (PLAIN, BYTES, LEARNED):
        wrong = digits.copy()
        wrong[0, HEAD:] = rng.integers(0, 10, CELLS - HEAD)
        wrong[0, 4] = model
        decode_any(wrong).encode('utf-8')


@pytest.mark.parametrize('ending', ['.py', '.json', '.md'])
def test_texts_of_other_endings(tmp_path, command, ending):
    raw = '{"key": "value", "naïve": [1, 2]}\r\n'.encode()*20
    (tmp_path/f'a{ending}').write_bytes(raw)
    assert command('encode', tmp_path/f'a{ending}')[0] == 0
    assert command('decode', tmp_path/f'a{ending}.puzzle.json')[0] == 0
    assert (tmp_path/'a.decoded.txt').read_bytes() == raw


# commands and runs

def test_command_line_round_trip(tmp_path, command):
    raw = 'A name 🙂 and\r\na line, naïve — as it is.\n'.encode()
    (tmp_path/'note.txt').write_bytes(raw)
    assert command('encode', tmp_path/'note.txt')[0] == 0
    puzzles, meta = load_puzzles(tmp_path/'note.txt.puzzle.json')
    assert len(puzzles) == 1 and meta['kind'] == 'text'
    assert command('decode', tmp_path/'note.txt.puzzle.json')[0] == 0
    assert (tmp_path/'note.decoded.txt').read_bytes() == raw


def test_what_the_command_line_refuses(tmp_path, command):
    blank = torch.zeros(1, 30, 30, dtype=torch.uint8)
    (tmp_path/'noise.txt').write_bytes(b'\xff\xfe\x00')
    save_puzzles(tmp_path/'picture.json', blank, dict(kind='picture'))
    save_puzzles(tmp_path/'other.json', blank, dict(kind='text', characters=3, weights='0'))
    for args, word in (
        (('encode', 'noise.txt'), 'noise.txt is not UTF-8 text (byte 0xff'),
        (('decode', 'picture.json', '-o', tmp_path/'x.png'), 'holds no picture'),
        (('decode', 'picture.json', '-o', tmp_path/'x.txt'), 'holds no text'),
        (('decode', 'other.json', '-o', tmp_path/'x.txt'), "was written with weights '0'"),
    ):
        status, said = command(args[0], tmp_path/args[1], *args[2:])
        assert status in (1, 2) and word in said and said.count('\n') == 1, said


VALUES = CHOSEN[SYSTEM]


@pytest.fixture
def whole(finished_run):
    "The run that test_experiments.py looks at."
    return finished_run(SYSTEM, **VALUES)


def test_a_run_holds_what_it_should(whole):
    measured, codec = whole.summary['metrics'], load_codec(whole.dir/'codec.safetensors')
    assert any(e['kind'] == 'fallback' for e in whole.events)
    assert measured['exact_windows_900']['value'] == 100
    assert {'lm_perplexity', 'codebook_perplexity'} <= measured.keys() and 'perplexity' not in measured
    assert codec.decode(codec.encode(['x'])) == ['x']


@pytest.mark.slow
def test_killed_and_resumed_equals_never_killed(tmp_path, whole):
    run = killed_and_resumed(SYSTEM, SMALL | VALUES, tmp_path, '"words"')
    assert_same_run(run, whole, ('metrics.jsonl', 'codec.safetensors'))


@pytest.mark.slow
def test_papermill_equals_puzzle_run(tmp_path, whole):
    notebook = root()/'nbs'/f'{SYSTEM}.ipynb'
    options = as_options(SMALL | VALUES)
    finish(start([PAPERMILL, notebook, tmp_path/'out.ipynb', *options], tmp_path/'runs', root()))
    assert_same_run(only_run(tmp_path/'runs'), whole, ('metrics.jsonl', 'codec.safetensors'))


@pytest.mark.slow
@pytest.mark.parametrize('recipe, parameters', [('seed', 76_896), ('seed_large', 1_477_376)])
def test_published_recipes_run(finished_run, recipe, parameters):
    run = finished_run(SYSTEM, recipe=recipe)
    assert run.summary['metrics']['parameters']['value'] == parameters
