"Files people have: what they bring is read or named, what they own is kept, what comes back is checked."
import io, os, shutil, stat, subprocess, sys, threading

import numpy as np
import pytest
import soundfile as sf
from PIL import Image, PngImagePlugin

import puzzle_research.audio.files as audio
import puzzle_research.text.files as text
import puzzle_research.vision.files as vision
from puzzle_research.audio.files import open_sound
from puzzle_research.cli.files import _codec
from puzzle_research.core.puzzle import load_puzzles, save_puzzles
from puzzle_research.core.sounds import read_channels
from puzzle_research.vision.files import open_picture
from shared import PUZZLE

RATE = 16_000


def tone(n=RATE):
    return (.5*np.sin(np.arange(n)*.2)).astype(np.float32)


@pytest.fixture(scope='module')
def encoded(tmp_path_factory):
    "A folder with a picture, a sound and a text, each of one puzzle, and their puzzle files."
    folder = tmp_path_factory.mktemp('encoded')
    noise = np.random.RandomState(0).randint(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(noise).save(folder/'photo.png')
    sf.write(folder/'tone.wav', tone(8000), RATE)
    (folder/'photo.txt').write_text('A text with the name of a picture.')
    for name, codec in {'photo.png': vision, 'tone.wav': audio, 'photo.txt': text}.items():
        codec.encode_file(folder/name, folder/f'{name}.json', recipe='stream')
    return folder


@pytest.fixture
def files(encoded, tmp_path):
    "A copy of that folder."
    return shutil.copytree(encoded, tmp_path, dirs_exist_ok=True)


def refused(command, word, *args):
    status, said = command(*args)
    assert status in (1, 2) and word in said and said.count('\n') == 1, said


# What is there stays

def test_an_earlier_file_is_kept_unless_forced(files, command):
    out, back = files/'photo.txt.puzzle.json', files/'photo.decoded.txt'
    out.write_text('mine')
    refused(command, 'exists and is kept', 'encode', files/'photo.txt')
    assert out.read_text() == 'mine'
    assert command('encode', files/'photo.txt', '--force') == (0, '')
    assert len(load_puzzles(out)[0]) == 1
    back.write_text('mine')
    refused(command, 'exists and is kept', 'decode', out)
    assert back.read_text() == 'mine'


def test_a_picture_and_a_text_of_one_name_do_not_share_a_file(files, command):
    for name in ('photo.png', 'photo.txt'):
        assert command('encode', files/name)[0] == 0
        assert command('decode', files/f'{name}.puzzle.json')[0] == 0
    assert (files/'photo.decoded.txt').read_bytes() == (files/'photo.txt').read_bytes()
    assert Image.open(files/'photo.decoded.png').size == (30, 20)


@pytest.mark.parametrize('alias', ['same', 'link', 'hard'])
def test_source_and_output_may_not_be_one(files, command, alias):
    out, before = files/'out.json', (files/'photo.png').read_bytes()
    if alias == 'same':
        out = files/'photo.png'
    elif alias == 'link':
        out.symlink_to(files/'photo.png')
    else:
        os.link(files/'photo.png', out)
    refused(command, 'would be replaced', 'encode', files/'photo.png', '-o', out, '--force')
    assert (files/'photo.png').read_bytes() == before


def test_a_missing_folder_is_named_before_the_work(files, command, monkeypatch):
    monkeypatch.setattr(vision, 'encode_file', None)                  # it would fail if it were called
    refused(command, 'there is no folder', 'encode', files/'photo.png', '-o', files/'albums'/'x.json')


def test_links_and_permissions(files, command):
    (files/'real.json').write_text('old')
    (files/'link.json').symlink_to('real.json')
    mask = os.umask(0o077)
    try:
        assert command('encode', files/'photo.txt', '-o', files/'link.json', '--force')[0] == 0
        assert command('encode', files/'photo.txt')[0] == 0
    finally:
        os.umask(mask)
    assert (files/'link.json').is_symlink() and len(load_puzzles(files/'real.json')[0]) == 1
    assert stat.filemode((files/'photo.txt.puzzle.json').stat().st_mode) == '-rw-------'


def test_a_pipe_is_written_through(files, command):
    os.mkfifo(files/'pipe.txt')
    received = []
    reader = threading.Thread(target=lambda: received.append((files/'pipe.txt').read_bytes()))
    reader.start()
    assert command('decode', files/'photo.txt.json', '-o', files/'pipe.txt')[0] == 0
    reader.join()
    assert received == [(files/'photo.txt').read_bytes()] and (files/'pipe.txt').is_fifo()


def test_standard_output_holds_the_content_alone(files):
    done = subprocess.run([PUZZLE, 'decode', files/'photo.txt.json', '-o', '/dev/stdout'],
                          capture_output=True, check=True)
    assert done.stdout == (files/'photo.txt').read_bytes()


FULL_DISK = '''
import resource, signal, sys
from puzzle_research.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
sys.argv = ['puzzle', *sys.argv[1:]]
main()
'''


@pytest.mark.parametrize('args', [
    ('encode', 'photo.txt', '-o', 'photo.png.puzzle.json'),
    ('decode', 'photo.png.json'),
])
def test_where_writing_fails_the_earlier_file_stands(files, command, args):
    "No file may grow beyond 600 bytes, as on a disk that is full."
    for name in ('photo.decoded.png', 'photo.png.puzzle.json'):
        (files/name).write_text('earlier')
    done = subprocess.run([sys.executable, '-c', FULL_DISK, *args, '--force'], cwd=files, capture_output=True,
                          text=True)
    assert done.returncode == 1 and 'File too large' in done.stderr, done.stderr
    assert done.stderr.count('\n') == 1
    for name in ('photo.decoded.png', 'photo.png.puzzle.json'):
        assert (files/name).read_text() == 'earlier'
    assert not list(files.glob('.*'))


# What comes back is checked

def changed_at(puzzles, place):
    puzzles = puzzles.clone()
    cells = puzzles.view(-1)
    cells[place] = (cells[place] + 1) % 10
    return puzzles


@pytest.mark.parametrize('name', ['photo.png', 'tone.wav', 'photo.txt'])
def test_every_changed_digit_is_seen(files, command, name):
    puzzles, meta = load_puzzles(files/f'{name}.json')
    for place in range(0, 900, 45):
        save_puzzles(files/'bad.json', changed_at(puzzles, place), meta)
        refused(command, 'a digit was changed', 'decode', files/'bad.json')
    status, said = command('decode', files/'bad.json', '--no-check')
    assert status == 0 and 'a digit was changed' in said


def test_a_file_of_an_earlier_version_is_read_and_said_to_be_unchecked(files, command):
    puzzles, meta = load_puzzles(files/'photo.txt.json')
    old = {name: value for name, value in meta.items() if not name.endswith('sha256')}
    save_puzzles(files/'old.json', puzzles, old)
    status, said = command('decode', files/'old.json', '-o', files/'back.txt')
    assert status == 0 and 'holds no digests' in said
    assert (files/'back.txt').read_bytes() == (files/'photo.txt').read_bytes()


@pytest.mark.parametrize('name, claim, word', [
    ('tone.wav', dict(rate=10**15), '1,000,000,000,000,000 Hz'),
    ('tone.wav', dict(samples=10**15), 'holds 1 puzzles'),
    ('tone.wav', dict(rate=1), 'a rate of 1 Hz'),
    ('photo.png', dict(height=10**9), 'holds 1 puzzles'),
    ('photo.png', dict(height=2.5), 'holds no picture'),
    ('photo.png', dict(height=21), 'its meta was changed'),
])
def test_claims_are_bounded(files, command, name, claim, word):
    puzzles, meta = load_puzzles(files/f'{name}.json')
    save_puzzles(files/'bad.json', puzzles, meta | claim)
    refused(command, word, 'decode', files/'bad.json')
    if word != 'its meta was changed':
        refused(command, word, 'decode', files/'bad.json', '--no-check')


# Nothing is dropped without a word

def test_pictures_say_what_is_dropped(files):
    Image.new('RGBA', (8, 8), (0, 0, 0, 0)).save(files/'logo.png')
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue', 'green')]
    frames[0].save(files/'film.gif', save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(files/'deep.tif')
    assert open_picture(files/'photo.png')[1] == []
    assert open_picture(files/'logo.png')[1] == ['transparency laid on white']
    assert open_picture(files/'logo.png', 'navy')[0][:, 0, 0].tolist() == [0, 0, 128]
    assert open_picture(files/'film.gif')[1] == ['only the first of its 3 frames']
    assert open_picture(files/'deep.tif')[1] == ['16 bits a channel rounded to 8']
    Image.fromarray(np.full((8, 8), 4_000, np.uint16)).save(files/'dark.tif')
    assert 'its brightest is 4000 of 65535' in open_picture(files/'dark.tif')[1][1]
    half = np.zeros((8, 8, 4), np.uint8)
    half[4:, :, 3] = 255
    Image.fromarray(half).save(files/'logo.bmp')
    assert 'its fourth channel' in open_picture(files/'logo.bmp')[1][0]


def test_what_is_dropped_stands_on_stderr_and_in_the_meta(files, command):
    Image.new('RGBA', (8, 8), (0, 0, 0, 0)).save(files/'logo.png')
    status, said = command('encode', files/'logo.png', '--background', 'red')
    assert status == 0 and said == f"{files/'logo.png'}: transparency laid on red\n"
    assert load_puzzles(files/'logo.png.puzzle.json')[1]['notes'] == ['transparency laid on red']


def test_sounds_say_what_is_dropped(files, command):
    wide = 6*np.stack([tone(6000), -tone(6000)], 1)
    sf.write(files/'wide.wav', wide, RATE, subtype='FLOAT')
    status, said = command('encode', files/'wide.wav')
    assert status == 0 and 'cancel each other' in said and said.count('\n') == 1
    status, said = command('encode', files/'wide.wav', '--channels', 'apart', '--force')
    assert status == 0 and 'beyond full scale' in said and said.count('\n') == 1
    assert command('decode', files/'wide.wav.puzzle.json')[0] == 0
    back, _ = sf.read(files/'wide.decoded.wav')
    assert back.shape == wide.shape and 1.2 < np.abs(back).max() < 6


def test_a_whistle_above_half_the_rate_is_said(files, command):
    sf.write(files/'whistle.wav', .4*np.sin(2*np.pi*12_000/48_000*np.arange(48_000)), 48_000)
    status, said = command('encode', files/'whistle.wav')
    assert status == 0 and 'of its level lies below 8,000 Hz' in said and said.count('\n') == 1


def test_a_whisper_is_scaled_up_and_comes_back_as_quiet(files, command):
    sf.write(files/'whisper.wav', 1e-6*tone(6000), RATE, subtype='FLOAT')
    status, said = command('encode', files/'whisper.wav')
    assert status == 0 and 'far below full scale' in said and said.count('\n') == 1
    assert command('decode', files/'whisper.wav.puzzle.json')[0] == 0
    back, _ = sf.read(files/'whisper.decoded.wav')
    assert 1e-7 < np.abs(back).max() < 1e-5


def test_options_of_another_kind_are_refused(files, command):
    refused(command, '--channels is for a sound', 'encode', files/'photo.png', '--channels', 'apart')
    refused(command, "unknown colour 'whit'", 'encode', files/'photo.png', '--background', 'whit')
    refused(command, "unknown value of channels 'each'", 'encode', files/'tone.wav', '--channels', 'each')


# Recipes

@pytest.mark.parametrize('name', ['photo.png', 'tone.wav', 'photo.txt'])
def test_a_grid_says_what_it_is_and_comes_back(files, command, name):
    assert command('encode', files/name, '--quality') == (0, '')
    file = files/f'{name}.puzzle.json'
    puzzles, meta = load_puzzles(file)
    assert meta['recipe'] == 'grid' and load_puzzles(files/f'{name}.json')[1]['recipe'] == 'stream'
    assert not puzzles.equal(load_puzzles(files/f'{name}.json')[0])
    assert command('decode', file)[0] == 0
    refused(command, "unknown recipe 'gird': did you mean 'grid'?", 'encode', files/name, '--recipe', 'gird',
            '-o', files/'x.json')
    save_puzzles(files/'bad.json', puzzles, meta | dict(recipe='girth'))
    refused(command, "bad.json: its meta says unknown recipe 'girth'", 'decode', files/'bad.json')
    save_puzzles(files/'bad.json', puzzles, meta | dict(recipe='stream'))
    refused(command, 'was written with weights', 'decode', files/'bad.json')


def test_a_picture_of_many_tiles_as_a_grid(files):
    shades = np.linspace(0, 255, 150).astype(np.uint8)
    Image.fromarray(np.stack([np.tile(shades, (100, 1))]*3, 2)).save(files/'wide.png')
    assert vision.encode_file(files/'wide.png', files/'wide.json', recipe='grid') == 4*5
    assert float(vision.quality_of(files/'wide.png', files/'wide.json').split()[1]) > 30


# Good files are read

def test_a_png_with_much_text(files):
    comment = PngImagePlugin.PngInfo()
    comment.add_text('workflow', 'node '*10**6, zip=True)
    Image.new('RGB', (8, 8), 'red').save(files/'talk.png', pnginfo=comment)
    assert open_picture(files/'talk.png')[1] == []


@pytest.mark.parametrize('ending', ['webp', 'tiff', 'bmp', 'gif', 'avif', 'ppm', 'jp2', 'tga'])
def test_picture_endings(files, ending):
    Image.open(files/'photo.png').save(files/f'p.{ending}')
    picture, notes = open_picture(files/f'p.{ending}')
    assert picture.shape == (3, 20, 30) and notes == [] and _codec(files/f'p.{ending}') == 'vision.files'


def as_wav(**kwargs):
    out = io.BytesIO()
    sf.write(out, tone(8001), RATE, **(dict(format='WAV') | kwargs))
    return out.getvalue()


def with_size(data, at, size):
    return data[:at] + size.to_bytes(4, 'little') + data[at + 4:]


def sounds(): # name -> bytes of a whole recording
    wav, flac = as_wav(), bytearray(as_wav(format='FLAC'))
    flac[21] &= 0xf0
    flac[22:26] = bytes(4)
    for size in (0, 2**31 - 1, 2**32 - 1):
        yield f'pipe{size}.wav', with_size(with_size(wav, 4, size), 40, size)
    for off in (-9, -1, 1, 2, 8):
        yield f'off{off}.wav', with_size(wav, 4, len(wav) - 8 + off)
    yield 'endless.flac', bytes(flac)
    yield 'tagged.flac', b'ID3\4\0\0\0\0\0\n' + bytes(10) + as_wav(format='FLAC')
    yield 'phone.wav', as_wav(subtype='GSM610')
    for kind in ('MP3', 'AIFF', 'AU', 'CAF', 'W64'):
        yield f'a.{kind.lower()}', as_wav(format=kind)
    yield 'a.opus', as_wav(format='OGG', subtype='OPUS')


@pytest.mark.parametrize('name, data', [pytest.param(*pair, id=pair[0]) for pair in sounds()])
def test_whole_recordings_are_read(tmp_path, name, data):
    (tmp_path/name).write_bytes(data)
    x, rate = open_sound(tmp_path/name)
    assert 8001 <= len(x) < 8001 + 320 and rate == RATE                # GSM fills its last block
    assert _codec(tmp_path/name) == 'audio.files'


def uncounted(rate_mode): # an MP3 as a pipe leaves it: without the frame that says how many follow
    out = io.BytesIO()
    sf.write(out, np.stack([tone(40_000), tone(40_000)/2], 1), 44_100, format='MP3', bitrate_mode=rate_mode)
    data = out.getvalue()
    return data[data.index(data[:2], 4):]


@pytest.mark.parametrize('mode', ['CONSTANT', 'VARIABLE'])
def test_an_mp3_that_does_not_say_its_length(mode):
    "It is read to its end, also where another follows; libsndfile stops where it guesses the end."
    data, tag = uncounted(mode), b'ID3\4\0\0\0\0\1\0' + bytes(128)
    once = read_channels(data)[0]
    assert 40_000 <= len(once) < 40_000 + 4*1152 and once.shape[1] == 2
    for between in (b'', tag, b'TAG' + bytes(125)):
        twice = read_channels(tag + data + between + data)[0]
        assert 80_000 <= len(twice) < 80_000 + 8*1152
    with pytest.raises(ValueError, match='its last frame lacks'):
        read_channels(data[:-20])
    with pytest.raises(ValueError, match='no frame of MP3 at byte'):
        read_channels(data + bytes([7]*500) + data)


@pytest.mark.parametrize('name', ['a.wav', 'a.aiff', 'a.au', 'a.w64', 'a.flac'])
def test_cut_recordings_are_refused(tmp_path, name):
    sf.write(tmp_path/name, tone(), RATE)
    data = (tmp_path/name).read_bytes()
    (tmp_path/name).write_bytes(data[:len(data)*2//3])
    with pytest.raises(ValueError, match=f'{name} cannot be read as a sound'):
        open_sound(tmp_path/name)
