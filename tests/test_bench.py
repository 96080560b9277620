"The codec benchmark: what it measures, what it keeps, what it refuses; and the codes that can be read."
import random

import pytest
import torch

from puzzle_research.audio.grid import SoundGrid
from puzzle_research.bench.board import (BUDGETS, add_to_board, board_file, read_board, render_codecs,
                                         write_codecs)
from puzzle_research.bench.entries import codec_of
from puzzle_research.bench.measures import exactness, locality_of, stability
from puzzle_research.bench.modality import picture_modality
from puzzle_research.bench.texts import as_texts, text_modality
from puzzle_research.codec.lapped import from_blocks
from puzzle_research.core.config import root
from puzzle_research.core.runs import read_json
from puzzle_research.text.grid import ESCAPED, LOST, PAD, TextGrid


@pytest.fixture(scope='module')
def texts():
    return text_modality(100, 10, 'bundled')


@pytest.fixture(scope='module')
def grid(texts):
    return TextGrid.fit(as_texts(texts.train))


@pytest.fixture(scope='module')
def pictures():
    return picture_modality(60, 12, 'bundled')


class Known:
    "The same puzzle for everything; only the first cell of a row is read."
    learned_numbers = 0
    def fit(self, items): return self
    def encode(self, items): return torch.full((len(items), 30, 30), 4, dtype=torch.uint8)
    def decode(self, puzzles):
        rows = puzzles[:, None, :, :1]*20
        return torch.cat([rows, rows[:, :, :2]], 2).expand(-1, 3, 32, 32)


# texts at fixed places

def random_text(rng, longest):
    kinds = [lambda: rng.choice('etaoin shrdlu.'), lambda: chr(rng.randrange(0x20, 0x2000)),
             lambda: chr(rng.randrange(0x10000, 0x110000))]
    return ''.join(rng.choices(kinds, (20, 1, 1))[0]() for _ in range(rng.randrange(longest)))


def test_any_text_comes_back(grid):
    rng = random.Random(0)
    some = [random_text(rng, 200) for _ in range(200)] + ['', LOST, '\x00\n\r\t', '\U000f423f'*60]
    assert grid.decode(grid.encode(some)) == some


def test_one_wrong_digit_is_one_wrong_character(grid):
    rng = random.Random(1)
    for _ in range(150):
        text = random_text(rng, 120)
        wrong = grid.encode([text]).flatten(1)
        cell = rng.randrange(900)
        wrong[0, cell] = (wrong[0, cell] + rng.randrange(1, 10)) % 10
        back, = grid.decode(wrong.view(1, 30, 30))
        apart = sum(a != b for a, b in zip(text, back)) + abs(len(text) - len(back))
        assert apart <= 1, (text, back, cell)


def test_440_characters_of_english_fit_and_more_is_refused_with_what_would(grid):
    grid.encode(['e'*445])
    with pytest.raises(ValueError, match='its first 445 characters fit'):
        grid.encode(['e'*446])
    with pytest.raises(ValueError, match='its first 440 characters fit'):
        grid.encode(['\u732b' + 'e'*445])
    assert grid.decode(grid.encode(['\u732b' + 'e'*439])) == ['\u732b' + 'e'*439]


def test_the_first_digit_tells_the_kind(grid):
    from puzzle_research.text.grid import kind_of
    for first in range(10):
        assert len({kind_of(c) for c in grid.table[10*first:10*first + 10] if c}) <= 1
    assert grid.table[PAD] == grid.table[ESCAPED] == ''


# sounds

def test_an_untrained_network_changes_nothing():
    "Both start at zero: what is decoded is the sum of the codewords."
    torch.manual_seed(0)
    codec = SoundGrid()
    digits = torch.randint(0, 10, (72, 25))
    for book in (codec.code.first, codec.code.shape, codec.basis):
        book.data.normal_()
    blocks = codec.code.decode(digits) @ codec.basis.T
    expected = from_blocks(blocks, codec.rows, codec.columns, (6, 6), 1)
    with torch.no_grad():
        assert torch.allclose(codec(digits), expected, atol=1e-3)


# measures of a code that says nothing

def test_a_constant_code(pictures):
    puzzles = Known().encode(pictures.test)
    assert exactness(Known(), puzzles, pictures.test) == dict(exact_alone=100., decoded_alone=100.)
    assert set(stability(Known(), pictures, puzzles, pictures.test).values()) == {0.}
    assert locality_of(Known(), pictures, puzzles, cells=(1, 2, 3)) == 0     # these cells are not read


# the table

def test_a_codec_of_ones_own_is_measured_and_kept(tmp_path):
    found = add_to_board('test_bench:Known', 'image', 'test', 'bundled', folder=tmp_path)
    board = read_json(board_file('image', tmp_path))['test']
    assert board['codecs'] == {'test_bench:Known': found}
    report = write_codecs(tmp_path).read_text()
    assert '| test_bench:Known |' in report and (tmp_path/'figures'/'codecs'/'image_test.png').exists()
    assert board['settings']['train'] == BUDGETS['test'].train


def test_texts_are_measured_too(tmp_path):
    found = add_to_board('grid', 'text', 'test', 'bundled', folder=tmp_path)
    assert found['fidelity'] == 100 and found['locality'] == 100 and 98 > found['robust_5'] > 80


@pytest.mark.parametrize('name, word', [('gird', "did you mean 'grid'"), ('no.module:X', 'importable'),
                                        ('test_bench:Nothing', 'Nothing')])
def test_what_is_no_codec_is_refused(pictures, name, word):
    with pytest.raises(ValueError, match=word):
        codec_of(name, pictures, 1., 0)


def test_the_published_table_is_rendered_from_its_json():
    assert (root()/'reports'/'codecs.md').read_text() == render_codecs()
    for modality in ('image', 'sound', 'text'):
        for budget in read_board(modality):
            assert (root()/'figures'/'codecs'/f'{modality}_{budget}.png').exists()
