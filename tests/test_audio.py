"The audio codec as its users meet it: packaged weights, files, broken recordings, commands, runs."
import io
from types import SimpleNamespace

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest, soundfile as sf, torch

from puzzle_research.audio.clips import clips, masked_mse, mean_map
from puzzle_research.audio.mel import RATE, mel
from puzzle_research.audio_puzzle import (
    WEIGHTS, AudioPuzzle, Config, build, decode_file, draw_seeds, encode_file, learned_numbers)
from puzzle_research.core import data as D
from puzzle_research.core.config import root
from puzzle_research.core.puzzle import check_codec, load_puzzles, save_puzzles
from puzzle_research.core.quantize import count_parameters
from shared import CHOSEN, SMALL, assert_same_run, killed_and_resumed

SECOND = np.arange(RATE)/RATE


@pytest.fixture(scope='module')
def codec():
    return AudioPuzzle.from_pretrained(recipe='stream')


@pytest.fixture(scope='module')
def spoken(codec):
    "Four clips, their puzzles, and what these decode to."
    part = clips('bundled_commands', 'test', 'bundled', 4)
    puzzles = codec.encode(part.mel)
    return SimpleNamespace(mel=part.mel, mask=part.mask, puzzles=puzzles, decoded=codec.decode(puzzles))


def voice(seconds=1., rate=RATE):
    "Something like a vowel that rises and fades."
    t = np.arange(int(seconds*rate))/rate
    harmonics = sum(np.sin(2*np.pi*k*(140*t + 20*t**2))/k for k in range(1, 12))
    return .2*harmonics*np.sin(np.pi*t/t[-1])**2


# the codec

def test_parameter_counts():
    assert count_parameters(build(Config(recipe='seed'))) == 83_777
    assert learned_numbers(build(Config(recipe='stream'))) <= 83_777


def test_packaged_weights_are_small():
    assert WEIGHTS.stat().st_size < 400_000


def test_conformance(codec, spoken):
    def fresh(): return AudioPuzzle.from_pretrained(recipe='stream')
    assert check_codec(codec, spoken.mel[:2], fresh=fresh)['digits_used'] == 10
    assert check_codec(AudioPuzzle.from_pretrained(), spoken.mel[:2])['digits_used'] == 10   # grid


def test_speech_comes_back(spoken):
    mse = masked_mse(spoken.decoded, spoken.mel, spoken.mask)[1]
    mean = mean_map(spoken.mel, spoken.mask).expand_as(spoken.mel)
    assert mse < masked_mse(mean, spoken.mel, spoken.mask)[1]/20
    assert 150*mse**.5 < 4


def odd_sounds():
    g, click, cut = np.random.default_rng(0), np.zeros(RATE), np.zeros(RATE)
    click[8000] = 1
    cut[:6000] = .1*g.standard_normal(6000)
    square = np.sign(np.sin(SECOND*2000))
    return mel(np.stack([np.zeros(RATE), click, square, g.uniform(-1, 1, RATE), np.sin(SECOND*9000), cut]))


def test_odd_sounds(codec):
    "Silence, a click, clipping, noise, a tone, a broken-off second: the decoder sees what the encoder saw."
    odd = odd_sounds()
    index, *_, known = codec.choose(odd)
    decoded = codec.decode(codec.encode(odd))
    torch.testing.assert_close(decoded, codec.render(known, index), rtol=1e-4, atol=1e-3)
    assert odd[0].max() == -100 and decoded[0].max() < -95        # silence stays far below all sound
    assert (decoded[5] - odd[5])[:, 16:].abs().mean() < 2         # and so does the end of what breaks off


def test_company_changes_no_digit(codec, spoken):
    assert torch.equal(spoken.puzzles[1:2], codec.encode(spoken.mel[1:2]))


def with_threads(n, f):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        return f()
    finally:
        torch.set_num_threads(before)


def test_integers_are_exact_in_any_batch(codec, spoken):
    "What the decoder knows before the last, inexact step is the same to the bit, whatever is beside it."
    index = torch.tensor([300, 350, 400, 450])
    whole = with_threads(2, lambda: codec.quantise(spoken.mel, index)[1][0])
    for i in range(4):
        one = slice(i, i + 1)
        alone = with_threads(1, lambda: codec.quantise(spoken.mel[one], index[one])[1][0])    # noqa: B023
        assert torch.equal(alone, whole[one])


@pytest.mark.parametrize('mels, why', [
    (torch.zeros(2, 128, 31), r'expected floats \(B, 128, 32\)'),
    (torch.zeros(2, 128, 32, dtype=torch.uint8), 'expected floats'),
    (torch.full((1, 128, 32), float('nan')), 'not finite'),
])
def test_bad_batches_are_refused(codec, mels, why):
    with pytest.raises(ValueError, match=why):
        codec.encode(mels)


# files

def level(x):
    return np.sqrt((x**2).mean())


def through_a_file(folder, x, rate, ending='.wav', channels=1):
    "Sound, puzzle file, sound: the puzzles, and what came back with its rate."
    source, puzzles, target = folder/f'a{ending}', folder/'p.json', folder/f'back{ending}'
    sf.write(source, np.stack([x]*channels, 1), rate)
    n = encode_file(source, puzzles)
    decode_file(puzzles, target)
    assert n == len(load_puzzles(puzzles)[0])
    return n, *sf.read(target)


@pytest.mark.parametrize('ending, rate, channels, seconds, puzzles', [
    ('.wav', 48_000, 2, 1.3, 2),
    ('.flac', 44_100, 1, .4, 1),
    ('.ogg', 22_050, 2, .7, 1),
])
def test_sound_file_round_trip(tmp_path, ending, rate, channels, seconds, puzzles):
    x = voice(seconds, rate)
    n, back, back_rate = through_a_file(tmp_path, x, rate, ending, channels)
    assert n == puzzles and back.shape == x.shape and back_rate == rate
    assert .4 < level(back)/level(x) < 2


def test_silence_comes_back_silent(tmp_path):
    _, back, _ = through_a_file(tmp_path, np.zeros(12_000), RATE)
    assert np.abs(back).max() < 1e-3


def test_clipped_sound_survives(tmp_path):
    _, back, _ = through_a_file(tmp_path, np.clip(voice()*20, -1, 1), RATE)
    loud, _ = sf.read(tmp_path/'a.wav')
    before, after = mel(np.stack([loud, back]))
    assert (before - after).square().mean().sqrt() < 12               # dB RMS


def as_bytes(x, ending):
    file = io.BytesIO()
    sf.write(file, x, RATE, format=ending)
    return file.getvalue()


def broken_files(folder):
    "Writes files that are no whole recording; name -> bytes."
    whole, flac = as_bytes(voice(), 'WAV'), as_bytes(voice(), 'FLAC')
    made = {
        'header.wav': whole[:30],
        'half.wav': whole[:len(whole)//2],
        'zero.wav': b'',
        'text.wav': b'this is not a recording',
        'codec.wav': whole[:20] + b'\x99\x99' + whole[22:],
        'one.wav': as_bytes(voice()[:1], 'WAV'),
        'half.flac': flac[:len(flac)//2],
    }
    for name, data in made.items():
        (folder/name).write_bytes(data)
    return made


def test_broken_files_are_named(tmp_path):
    for name in broken_files(tmp_path):
        with pytest.raises(ValueError, match=f'{name} cannot be read as a sound'):
            encode_file(tmp_path/name, tmp_path/'p.json')
    assert not (tmp_path/'p.json').exists()


def real_broken():
    return sorted(p for folder in D.data_folders() for p in (folder/'corrupt_audio').glob('*.flac'))


@pytest.mark.skipif(not real_broken(), reason='needs corrupt_audio in PUZZLE_DATA')
def test_real_broken_recordings_are_refused():
    for path in real_broken():
        with pytest.raises(D.BROKEN):
            D.read_sound(path.read_bytes())


# data

@pytest.fixture
def with_broken(lake, tmp_path):
    "`with_broken(n)`: Speech Commands made of 100 bundled clips, n of them replaced by broken files."
    rows = pq.read_table(root()/'data'/'bundled_commands'/'train.parquet').to_pylist()[:100]
    bad = list(broken_files(tmp_path).values())
    (lake/'speech_commands').mkdir()
    def load(n):
        made = [dict(row, is_unknown=False) for row in rows]
        for i in range(n):
            made[7*i] |= dict(audio=dict(bytes=bad[i % len(bad)], path=f'bad/{i}.wav'), file=f'bad/{i}.wav')
        pq.write_table(pa.Table.from_pylist(made), lake/'speech_commands'/'train.parquet')
        return D.load('speech_commands', 'train')
    return load


def test_one_broken_recording_is_dropped_and_named(with_broken, caplog):
    dataset = with_broken(1)
    assert len(dataset) == 99 and [d['item'] for d in dataset.dropped] == ['bad/0.wav']
    assert 'left out' in caplog.text
    assert dataset.rows[0] == 1                                       # nothing stands in its place


def test_above_one_in_a_hundred_the_load_fails(with_broken):
    why = r'10 of 100 items are broken \(10.00%, limit 1.00%\): row 0 \(bad/0.wav\)'
    with pytest.raises(ValueError, match=why):
        with_broken(10)


def test_the_bundled_clips_are_split_by_voice_and_small():
    folder, splits = root()/'data'/'bundled_commands', ('train', 'validation', 'test')
    tables = {s: pq.read_table(folder/f'{s}.parquet', columns=['speaker_id']).to_pylist() for s in splits}
    voices = [{row['speaker_id'] for row in table} for table in tables.values()]
    assert len(set.union(*voices)) == sum(map(len, voices))           # no voice is in two splits
    assert sum(path.stat().st_size for path in folder.glob('*.parquet')) < 4e6
    for split in splits:
        assert len(D.load('bundled_commands', split)) == D.SOURCES['bundled_commands'].splits[split]


# commands and runs

def test_command_line_by_ending_and_kind(tmp_path, command):
    sf.write(tmp_path/'a.wav', voice(), RATE)
    assert command('encode', tmp_path/'a.wav')[0] == 0
    assert command('decode', tmp_path/'a.wav.puzzle.json')[0] == 0
    assert sf.info(tmp_path/'a.decoded.wav').frames == RATE


def test_what_the_command_line_refuses(tmp_path, command):
    (tmp_path/'text.wav').write_text('no')
    grid = torch.zeros(1, 30, 30, dtype=torch.uint8)
    sf.write(tmp_path/'a.wav', voice(.1), RATE)
    encode_file(tmp_path/'a.wav', tmp_path/'a.json')
    meta = load_puzzles(tmp_path/'a.json')[1]
    save_puzzles(tmp_path/'odd.json', grid, meta | dict(samples=99_999))
    save_puzzles(tmp_path/'old.json', grid, meta | dict(weights='0123'))
    save_puzzles(tmp_path/'smell.json', grid, dict(kind='smell'))
    for args, word in (
        (('encode', 'text.wav'), 'text.wav cannot be read as a sound'),
        (('decode', 'odd.json', '-o', tmp_path/'x.wav'), 'holds 1 puzzles; a sound of 99999'),
        (('decode', 'old.json', '-o', tmp_path/'x.wav'), "was written with weights '0123'"),
        (('decode', 'smell.json'), "'smell'"),
    ):
        status, said = command(args[0], tmp_path/args[1], *args[2:])
        assert status in (1, 2) and word in said and said.count('\n') == 1, said


def test_training_of_several_seeds_is_one_figure():
    drawn = {}
    def run(seed):
        metrics = [dict(stage='context', split='valid', step=n, estimated_psnr=36 + seed) for n in (1, 2)]
        return SimpleNamespace(config=dict(recipe='stream', seed=seed), metrics=metrics,
                               figure=lambda name, fig, caption, dpi: drawn.update({(seed, name): fig}))
    draw_seeds([run(0), run(1)])
    (name, fig), = drawn.items()
    assert name == (0, 'training') and len(fig.axes[0].lines) == 2


VALUES = CHOSEN['02_audio_puzzle']


@pytest.fixture
def whole(finished_run):
    "The run that test_experiments.py looks at."
    return finished_run('02_audio_puzzle', **VALUES)


def test_a_run_holds_what_it_should(whole):
    assert whole.summary['metrics']['digits']['value'] == 900
    assert any(e['kind'] == 'fallback' for e in whole.events)


@pytest.mark.slow
def test_killed_and_resumed_equals_never_killed(tmp_path, whole):
    run = killed_and_resumed('02_audio_puzzle', SMALL | VALUES, tmp_path, '"context"')
    assert_same_run(run, whole, ('metrics.jsonl', 'codec.safetensors'))
