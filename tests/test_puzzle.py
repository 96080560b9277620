"The puzzle, its file and the codec examination, over random input and across processes."
import functools, importlib, json, os, subprocess, sys

import numpy as np, pytest, torch

import puzzle_research.core.puzzle as P


def some(n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 10, (n, 30, 30), generator=generator).to(torch.uint8)


# the grid

@pytest.mark.parametrize('dtype', [np.uint8, np.int8, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_every_integer_type_gives_the_same_digits(dtype):
    assert torch.equal(P.check(some().numpy().astype(dtype)), some())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.complex64])
def test_other_types_are_refused(dtype):
    with pytest.raises(TypeError, match='expected integer digits'):
        P.check(some().to(dtype))


@pytest.mark.parametrize('value', [10, 255, 256, 2**31, 2**40, -1, -246, -2**40])
def test_any_other_value_anywhere_is_found(value):
    x = some(7).long()
    x[6, 29, 28] = value
    with pytest.raises(ValueError, match=f'puzzle 6 holds {value} at row 29, column 28'):
        P.check(x)


@pytest.mark.parametrize('shape', [(30, 30), (1, 900), (2, 30, 31), (2, 1, 30, 30), (900,), ()])
def test_any_other_shape_is_refused(shape):
    with pytest.raises(ValueError, match='expected'):
        P.check(torch.zeros(shape, dtype=torch.uint8))


def test_check_gives_its_own_copy_and_keeps_the_batch_empty():
    x = some()
    P.check(x)[0, 0, 0] = 9 - x[0, 0, 0]
    assert torch.equal(x, some()) and P.check(x[:0]).shape == (0, 30, 30)


def test_digits_in_reading_order():
    x = some()
    assert torch.equal(P.to_digits(x)[:, 30*7+3], x[:, 7, 3])
    assert torch.equal(P.from_digits(P.to_digits(x)), x)
    assert P.from_digits(torch.ones(2, 31, dtype=torch.long), fill=9)[1, 1].tolist() == [1] + [9]*29
    with pytest.raises(ValueError, match='holds 10'):
        P.from_digits(torch.ones(1, 3, dtype=torch.long), fill=10)


# its file

REWRITE = '''
import sys, puzzle_research.core.puzzle as P
P.save_puzzles(sys.argv[2], *P.load_puzzles(sys.argv[1]))
'''


def test_file_round_trip_in_another_process(tmp_path):
    x, meta = some(300), {'size': [640, 427], 'name': 'žluťoučký "kůň"\n', 'nested': {'a': None}}
    P.save_puzzles(tmp_path/'x.json', x, meta)
    command = [sys.executable, '-c', REWRITE, tmp_path/'x.json', tmp_path/'y.json']
    subprocess.run(command, check=True, timeout=120)
    assert (tmp_path/'x.json').read_bytes() == (tmp_path/'y.json').read_bytes()
    y, again = P.load_puzzles(tmp_path/'y.json')
    assert torch.equal(x, y) and again == meta


def test_the_file_has_the_form_of_an_arc_test_file(tmp_path):
    path = P.save_puzzles(tmp_path/'x.json', some(3))
    task = json.loads(path.read_text())
    assert task['train'] == [] and [list(t) for t in task['test']] == [['input']]*3 and task['meta'] == {}
    assert np.array_equal(np.array([t['input'] for t in task['test']]), some(3))
    assert path.read_bytes().startswith(b'{"train": [],\n"test": [\n{"input":[[')
    assert path.read_bytes().endswith(b'\n],\n"meta": {}}\n')


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = P.save_puzzles(tmp_path/'x.json', some(), {})
    before = path.read_bytes()
    def full(fd):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space'):
        P.save_puzzles(path, some(3, seed=1))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['x.json']


@pytest.mark.parametrize('cut', [0, 1, 100, 5000, -3])
def test_a_cut_file_is_one_clear_error(tmp_path, cut):
    path = P.save_puzzles(tmp_path/'x.json', some())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match='x.json is not JSON'):
        P.load_puzzles(path)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path/'x.json').write_bytes(b'\x89PNG\r\n\x1a\n\xff\xfe')
    with pytest.raises(ValueError, match='x.json is not JSON'):
        P.load_puzzles(tmp_path/'x.json')


# the examination must catch what a network codec can get wrong

@functools.cache
def rotation():
    return torch.linalg.qr(torch.randn(900, 900, generator=torch.Generator().manual_seed(0)))[0]


class Net:
    "A linear codec of (B, 900) float batches with fixed random weights; `how` spoils it."
    def __init__(self, how=''):
        self.how, self.calls = how, 0

    @classmethod
    def from_pretrained(cls, path=None): return cls()

    def encode(self, batch):
        self.calls += 1
        x = (batch - batch.mean(0) if self.how == 'train mode' else batch) @ rotation()
        if self.how == 'dropout':
            x = torch.nn.functional.dropout(x, .1)
        if self.how == 'counter':
            x = x + .1*self.calls
        if self.how == 'in place':
            batch[0, 0] += 1
        return (x*2 + 5).clamp(0, 9).to(torch.uint8).view(-1, 30, 30)

    def decode(self, puzzles):
        x = (puzzles.reshape(-1, 900).float() - 4.5)/2 @ rotation().T
        if self.how == 'batch statistics':
            x = x - x.mean(0)
        if self.how == 'other weights':
            x = x*1.01
        if self.how == 'first is special':
            x[0] = 0
        if self.how == 'in place decode':
            puzzles.zero_()
        return x.double() if self.how == 'double' else x


class Ties(Net):
    "One digit that depends on whether a picture is alone."
    def encode(self, batch):
        p = super().encode(batch)
        if len(batch) == 1:
            p[:, 0, 0] = (p[:, 0, 0] + 1) % 10
        return p


def batch(n=4):
    return torch.randn(n, 900, generator=torch.Generator().manual_seed(3))


def test_an_honest_network_passes():
    found = P.check_codec(Net(), batch())
    assert found['items'] == 4 and found['digits_used'] == 10 and found['batch'] == 'float32 (4, 900)'


@pytest.mark.parametrize('how, why', [
    ('train mode', 'depends on the rest of the batch'),
    ('dropout', 'not deterministic'),
    ('counter', 'not deterministic'),
    ('in place', 'encode changes its input'),
    ('batch statistics', 'fresh object|order'),
    ('other weights', 'fresh object decodes the same digits to something else'),
    ('first is special', 'fresh object|order'),
    ('in place decode', 'decode changes its input'),
    ('double', 'decode gives float64'),
])
def test_spoiled_networks_fail(how, why):
    with pytest.raises(AssertionError, match=why):
        P.check_codec(Net(how), batch())


def test_a_decoder_that_knows_the_position_fails_even_as_a_fresh_object():
    with pytest.raises(AssertionError, match='order of the puzzles'):
        P.check_codec(Net('first is special'), batch(), fresh=lambda: Net('first is special'))


def test_unpublished_weights_are_examined_with_fresh():
    found = P.check_codec(Net('other weights'), batch(), fresh=lambda: Net('other weights'))
    assert found['items'] == 4


def test_ties_are_allowed_only_as_far_as_said():
    with pytest.raises(AssertionError, match=r'0.11% of the digits differ one by one'):
        P.check_codec(Ties(), batch())
    assert P.check_codec(Ties(), batch(), ties=.002)['differ_alone'] == pytest.approx(1/900)


def test_the_examination_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    P.check_codec(Net(), batch())
    assert torch.equal(torch.rand(3), expected)


PICTURES = torch.arange(3*32*32).view(1, 3, 32, 32).remainder(251).to(torch.uint8)
SOUNDS = torch.linspace(-60, 0, 128*32).view(1, 128, 32)


@pytest.mark.parametrize('recipe', ['grid', 'stream'])
@pytest.mark.parametrize('module,name,items', [
    ('vision_puzzle', 'VisionPuzzle', PICTURES), ('audio_puzzle', 'AudioPuzzle', SOUNDS),
    ('language_puzzle', 'LanguagePuzzle', ['The same digits.'])])
def test_a_saved_codec_comes_back_and_writes_the_same_digits(tmp_path, module, name, items, recipe):
    kind = getattr(importlib.import_module(f'puzzle_research.{module}'), name)
    codec = kind.from_pretrained(recipe=recipe)
    again = kind.from_pretrained(codec.save_pretrained(tmp_path/name))     # which says itself what it is
    assert type(again) is type(codec) is kind.of_recipe(recipe)
    puzzles, decoded = codec.encode(items), codec.decode(codec.encode(items))
    assert torch.equal(again.encode(items), puzzles)
    back = again.decode(puzzles)
    assert back == decoded if isinstance(back, list) else torch.equal(back, decoded)
    card = (tmp_path/name/'README.md').read_text()
    assert type(codec).__name__ in card and 'must' in card          # its bars
