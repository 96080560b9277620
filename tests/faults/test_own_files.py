"Files that people bring, and commands that are killed while they write: never other content without a word."
import io
import json

import numpy as np
import pytest
import soundfile as sf
from safetensors import safe_open

import puzzle_research.core.data as data
import puzzle_research.text.files as text
from damage import damages, kills
from puzzle_research.arc.files import read_tasks
from puzzle_research.arc.tasks import official
from puzzle_research.core.checkpoint import load_state, pack
from puzzle_research.core.model_hub import weights_path
from puzzle_research.core.outputs import whole_output
from puzzle_research.core.pictures import read_picture
from puzzle_research.core.puzzle_files import load_puzzles
from puzzle_research.core.sounds import read_channels
from shared import png, write_pictures

EACH = [1, pytest.param(30, marks=pytest.mark.slow)]
NAMED = ['language', *(pytest.param(name, marks=pytest.mark.slow) for name in ('audio', 'vision'))]
SOUNDS = ('WAV', 'AIFF', 'AU', 'MP3', 'CAF', 'W64') # whose formats have no checksum
REFUSALS = (ValueError, RuntimeError, OSError, SyntaxError) # of readers that name no file
SEEN = {'cut short', 'emptied', 'other bytes', 'parts swapped'} # by every reader, also without a checksum


def picture(kind):
    from PIL import Image
    rng, out = np.random.RandomState(0), io.BytesIO()
    walk = np.cumsum(rng.randint(-9, 10, (64, 64, 3)), 1) + 128
    Image.fromarray(walk.clip(0, 255).astype(np.uint8)).save(out, kind)
    return out.getvalue()


def sound(kind, subtype=None):
    out, n = io.BytesIO(), np.arange(16_000)
    noise = .02*np.random.RandomState(0).randn(len(n))
    sf.write(out, .4*np.sin(n*.05)*np.sin(n*.0007) + noise, 16_000, format=kind, subtype=subtype)
    return out.getvalue()


def outcome(read, whole, bad):
    "What reading `bad` gave: right, refused, other, or the error that no reader should raise."
    try:
        got = read(bad)[0]
    except REFUSALS:
        return 'refused'
    except Exception as e:
        return repr(e)
    same = got.shape == whole.shape and bool((got == whole).all())
    return 'right' if same else 'other'


@pytest.mark.parametrize('each', EACH)
@pytest.mark.parametrize('kind, subtype', [('PNG', None), ('FLAC', None), ('OGG', 'VORBIS'), ('OGG', 'OPUS')])
def test_a_file_with_a_checksum(faults, kind, subtype, each):
    read, data = (read_picture, picture(kind)) if kind == 'PNG' else (read_channels, sound(kind, subtype))
    whole = read(data)[0]
    for damage, bad in damages(data, each):
        came = outcome(read, whole, bad)
        name = f'{subtype or kind} file'
        faults.count(name, damage, came if came in ('right', 'refused') else 'lost', came)


@pytest.mark.parametrize('each', EACH)
@pytest.mark.parametrize('kind', ['JPEG', 'WEBP', 'AVIF', 'GIF', 'BMP', 'TIFF', *SOUNDS])
def test_a_file_without_a_checksum(faults, kind, each):
    "Nobody can tell changed samples from samples; what can be told is, and nothing crashes the reader."
    read, data = (read_channels, sound(kind)) if kind in SOUNDS else (read_picture, picture(kind))
    whole, packed = read(data)[0], kind in ('JPEG', 'WEBP', 'AVIF', 'GIF')
    for damage, bad in damages(data, each):
        came = outcome(read, whole, bad)
        told = damage in SEEN or packed and damage == 'tail zeroed' and not bad.endswith(data[-64:])
        if told and not near(data, bad):
            faults.count(f'{kind} file', damage, came if came in ('right', 'refused') else 'lost', came)
        assert came in ('right', 'refused', 'other'), came


def near(data, bad): # within a few bytes, which writers are careless with
    return abs(len(data) - len(bad)) < 64 and data[:len(data) - 64] == bad[:len(data) - 64]


@pytest.mark.parametrize('each', EACH)
def test_an_arc_file(faults, tmp_path, each):
    "Another digit is another task; anything else is refused, and the file or task is named."
    known = official('arc-agi-1', 'training')[0]
    pairs = [dict(input=a.tolist(), output=b.tolist()) for a, b in known.pairs]
    file = tmp_path/'task.json'
    for damage, bad in damages(json.dumps(dict(train=pairs[:-1], test=pairs[-1:])).encode(), each):
        file.write_bytes(bad)
        try:
            grids = [g for task in read_tasks(file) for pair in task.pairs for g in pair if g is not None]
            sound = all(g.dtype == np.uint8 and max(g.shape) <= 30 and g.max() < 10 for g in grids)
            faults.count('ARC file', damage, 'right' if sound else 'lost')
        except ValueError as e:
            faults.count('ARC file', damage, 'refused' if 'task' in str(e) else 'lost', str(e))


@pytest.mark.parametrize('each', EACH)
def test_a_set_in_parquet(faults, lake, each):
    "The pictures that are read are those that were written: what is broken is refused, or dropped and named."
    path = write_pictures(lake/'cifar10', [png(k) for k in range(40)])
    content, want = path.read_bytes(), np.array(data.load('cifar10', 'train').arrays['image'])
    for damage, bad in damages(content, each):
        path.write_bytes(bad)
        try:
            found = data.load('cifar10', 'train', limit_rate=1.)
        except ValueError as e:
            faults.count('set in Parquet', damage, 'refused' if 'train.parquet' in str(e) else 'lost', str(e))
            continue
        same = np.array_equal(found.arrays['image'], want[found.rows])
        whole = len(found) + len(found.dropped) == len(want)
        faults.count('set in Parquet', damage, 'right' if same and whole else 'lost', str(found.dropped))


@pytest.mark.parametrize('name', NAMED)
@pytest.mark.parametrize('each', EACH)
def test_a_codecs_weights(faults, tmp_path, name, each):
    "As they lie in the package."
    file, packed = tmp_path/'codec.safetensors', weights_path(f'{name}_puzzle').read_bytes()
    file.write_bytes(packed)
    head, _ = pack(load_state(file))
    for damage, bad in damages(packed, each):
        file.write_bytes(bad)
        try:
            same = pack(load_state(file))[0] == head          # as where \\u00e8 becomes \\u00E8
            faults.count('weights', damage, 'right' if same else 'lost', 'loaded')
        except ValueError as e:
            faults.count('weights', damage, 'refused' if file.name in str(e) else 'lost', str(e))


def test_a_changed_letter_in_packaged_weights(faults, tmp_path):
    "The alphabet and the words are no tensors; the digest covers them too, in every packaged file."
    from puzzle_research.text.codec import LanguagePuzzle
    file, packed = tmp_path/'codec.safetensors', LanguagePuzzle.packaged.read_bytes()
    at = packed.index(b'alphabet') + 40
    for k in (k for k in range(at, at + 80) if chr(packed[k]).isalpha()):
        file.write_bytes(packed[:k] + bytes([packed[k] ^ 1]) + packed[k + 1:])
        try:
            LanguagePuzzle.from_pretrained(file)
            outcome, said = 'lost', f'byte {k}'
        except ValueError as e:
            outcome, said = ('refused' if file.name in str(e) else 'lost'), str(e)
        faults.count('weights', 'another letter', outcome, said)
    for path in sorted(weights_path('any').parent.glob('*.safetensors')):
        with safe_open(path, 'pt') as f:
            assert 'digest' in json.loads(f.metadata()['state']), f'{path.name} is of the earlier format'


def test_killed_while_encoding_and_decoding(faults, tmp_path):
    "The file to write is the earlier one or the new one, whole."
    source, out, back = tmp_path/'a.txt', tmp_path/'a.json', tmp_path/'back.txt'
    source.write_text('A text of a few words.')
    text.encode_file(source, out)
    new, earlier = out.read_bytes(), b'earlier'

    def encode():
        with whole_output(out, source, True, '.json') as aside:
            text.encode_file(source, aside)

    def decode():
        with whole_output(back, out, True, '.txt') as aside:
            text.decode_file(out, aside)
    for n in kills(encode, lambda: out.write_bytes(earlier)):
        faults.count('`puzzle encode`', 'killed at a write', 'right' if out.read_bytes() in (earlier, new)
                     else 'lost', f'write {n}')
    out.write_bytes(new)
    for n in kills(decode, lambda: back.write_bytes(earlier)):
        whole = back.read_bytes() in (earlier, source.read_bytes())
        faults.count('`puzzle decode`', 'killed at a write', 'right' if whole else 'lost', f'write {n}')
    assert len(load_puzzles(out)[0]) == 1
