"The audio codec as its users meet it: the packaged weights, files of every kind, broken recordings, the command line, runs."
import io, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest, soundfile as sf, torch

from puzzle_research.audio_puzzle import RATE, WEIGHTS, AudioPuzzle, Config, build, clips, decode_file, encode_file, learned_numbers, masked_mse, mel, mean_map
from puzzle_research.core import data as D
from puzzle_research.core.config import root
from puzzle_research.core.puzzle import check_codec, load_puzzles, save_puzzles
from puzzle_research.core.quantize import count_parameters
from puzzle_research.core.runs import Run

PUZZLE = Path(sys.executable).with_name('puzzle')
SECOND = np.arange(RATE)/RATE


@pytest.fixture(scope='module')
def codec(): return AudioPuzzle.from_pretrained()

@pytest.fixture(scope='module')
def spoken(): return clips('bundled_commands', 'test', 'bundled', 8)

def voice(seconds=1., rate=RATE): # something like a vowel that rises and fades
    t = np.arange(int(seconds*rate))/rate
    return sum(np.sin(2*np.pi*k*(140*t + 20*t**2))/k for k in range(1, 12))*np.sin(np.pi*t/t[-1])**2*.2


def test_parameter_counts():
    assert count_parameters(build(Config(recipe='seed'))) == 83_777
    assert learned_numbers(build(Config())) <= 83_777


def test_packaged_weights_are_small(): assert WEIGHTS.stat().st_size < 400_000


def test_conformance(codec, spoken):
    assert check_codec(codec, spoken.mel[:4])['digits_used'] == 10


def test_speech_comes_back(codec, spoken):
    each, mse = masked_mse(codec.decode(codec.encode(spoken.mel)), spoken.mel, spoken.mask)
    mean = masked_mse(mean_map(spoken.mel, spoken.mask).expand_as(spoken.mel), spoken.mel, spoken.mask)[1]
    assert mse < mean/20 and 150*mse**.5 < 4


def test_odd_sounds(codec):
    "Silence, a click, clipping, noise, a tone, a broken-off second: every one becomes 900 digits, and the decoder sees what the encoder saw."
    g = np.random.default_rng(0)
    click, cut = np.zeros(RATE), g.standard_normal(RATE)*.1
    click[8000] = 1; cut[6000:] = 0
    odd = mel(np.stack([np.zeros(RATE), click, np.sign(np.sin(SECOND*2000)), g.uniform(-1, 1, RATE), np.sin(SECOND*9000), cut, voice()]))
    error, *_ = codec.choose(odd)
    decoded = codec.decode(codec.encode(odd))
    torch.testing.assert_close((decoded.double() - odd).square().sum((1, 2)), error, rtol=1e-4, atol=1e-3)
    assert decoded[0].max() < -95 and odd[0].max() == -100                   # silence (-100 dB) stays far below all sound
    assert (decoded[5, :, 16:] - odd[5, :, 16:]).abs().mean() < 2           # and so is the end of what breaks off


def test_threads_and_company_change_no_digit(codec, spoken):
    whole, threads = codec.encode(spoken.mel[:4]), torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    alone = codec.encode(spoken.mel[1:2])
    torch.set_num_threads(threads)
    assert torch.equal(whole[1:2], alone)


def test_integers_are_exact_in_any_batch(codec, spoken):
    "What the decoder knows before the last, inexact step is equal to the bit: among others, alone, with other threads."
    index = torch.tensor([300, 350, 400, 450])
    def known(rows, threads):
        before = torch.get_num_threads(); torch.set_num_threads(threads)
        try: return codec.quantise(spoken.mel[rows], index[rows])[1]
        finally: torch.set_num_threads(before)
    whole = known(slice(0, 4), 2)
    for i in range(4): assert torch.equal(known(slice(i, i + 1), 1), whole[i:i + 1])


@pytest.mark.parametrize('mels, why', [(torch.zeros(2, 128, 31), 'expected floats (B, 128, 32)'), (torch.zeros(2, 128, 32, dtype=torch.uint8), 'expected floats'), (torch.full((1, 128, 32), float('nan')), 'not finite')])
def test_bad_batches_are_refused(codec, mels, why):
    with pytest.raises(ValueError, match=why.replace('(', r'\(').replace(')', r'\)')): codec.encode(mels)


# files

def spectrogram_error(a, b): # dB rms between two sounds at 16 kHz
    return (mel(torch.as_tensor(a[None]).float()) - mel(torch.as_tensor(b[None]).float())).square().mean().sqrt().item()

@pytest.mark.parametrize('name, rate, channels, seconds', [('a.wav', 16_000, 1, 1.), ('stereo.wav', 48_000, 2, 2.3), ('b.flac', 44_100, 1, .4), ('c.ogg', 22_050, 2, 1.2), ('d.wav', 8000, 1, 1.)])
def test_sound_file_round_trip(tmp_path, name, rate, channels, seconds):
    x = voice(seconds, rate)
    sf.write(tmp_path/name, np.stack([x]*channels, 1), rate)
    n = encode_file(tmp_path/name, tmp_path/'p.json')
    assert n == int(np.ceil(seconds)) == len(load_puzzles(tmp_path/'p.json')[0])
    decode_file(tmp_path/'p.json', tmp_path/('back' + Path(name).suffix))
    back, found = sf.read(tmp_path/('back' + Path(name).suffix))
    assert back.shape == x.shape and found == rate
    level = lambda v: np.sqrt((v**2).mean())
    assert .4 < level(back)/level(x) < 2


def test_silence_comes_back_silent(tmp_path):
    sf.write(tmp_path/'s.wav', np.zeros(20_000), RATE)
    encode_file(tmp_path/'s.wav', tmp_path/'p.json'); decode_file(tmp_path/'p.json', tmp_path/'back.wav')
    assert np.abs(sf.read(tmp_path/'back.wav')[0]).max() < 1e-3


def test_clipped_sound_survives(tmp_path):
    sf.write(tmp_path/'loud.wav', np.clip(voice()*20, -1, 1), RATE)
    encode_file(tmp_path/'loud.wav', tmp_path/'p.json'); decode_file(tmp_path/'p.json', tmp_path/'back.wav')
    assert spectrogram_error(sf.read(tmp_path/'loud.wav')[0], sf.read(tmp_path/'back.wav')[0]) < 12


def broken_files(folder):
    "name -> what is wrong with it."
    whole = io.BytesIO(); sf.write(whole, voice(), RATE, format='WAV'); whole = whole.getvalue()
    codec = bytearray(whole); codec[20:22] = b'\x99\x99'
    flac = io.BytesIO(); sf.write(flac, voice(), RATE, format='FLAC'); flac = flac.getvalue()
    one = io.BytesIO(); sf.write(one, voice()[:1], RATE, format='WAV')
    made = {'header.wav': whole[:30], 'half.wav': whole[:len(whole)//2], 'zero.wav': b'', 'text.wav': b'this is not a recording', 'codec.wav': bytes(codec), 'one.wav': one.getvalue(), 'half.flac': flac[:len(flac)//2]}
    for name, data in made.items(): (folder/name).write_bytes(data)
    return made


def test_broken_files_are_named(tmp_path):
    for name in broken_files(tmp_path):
        with pytest.raises(ValueError, match=f'{name} cannot be read as a sound'): encode_file(tmp_path/name, tmp_path/'p.json')
    assert not (tmp_path/'p.json').exists()


def real_broken(): return sorted(p for d in D.data_folders() for p in (d/'corrupt_audio').glob('*.flac'))

@pytest.mark.skipif(not real_broken(), reason='needs corrupt_audio in PUZZLE_DATA')
def test_real_broken_recordings_are_refused():
    for p in real_broken():
        with pytest.raises(D.BROKEN): D.read_sound(p.read_bytes())


@pytest.fixture
def lake(tmp_path, monkeypatch):
    "Speech Commands made of the bundled clips, with as many broken rows as asked for."
    monkeypatch.setenv('PUZZLE_DATA', str(tmp_path/'lake')); monkeypatch.setenv('PUZZLE_CACHE', str(tmp_path/'cache'))
    table = pq.read_table(root()/'data'/'bundled_commands'/'train.parquet').to_pylist()
    bad = list(broken_files(tmp_path).values()) + [p.read_bytes() for p in real_broken()[:3]]
    def make(n, rows=100):
        made = [dict(r, is_unknown=False) for r in table[:rows]]
        for i in range(n): made[7*i]['audio'] = dict(bytes=bad[i % len(bad)], path=f'bad/{i}.wav'); made[7*i]['file'] = f'bad/{i}.wav'
        (tmp_path/'lake'/'speech_commands').mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(made), tmp_path/'lake'/'speech_commands'/'train.parquet')
        return D.load('speech_commands', 'train')
    return make


def test_one_broken_recording_is_dropped_and_named(lake, caplog):
    ds = lake(1)
    assert len(ds) == 99 and [d['item'] for d in ds.dropped] == ['bad/0.wav'] and 'left out' in caplog.text
    assert ds.rows[0] == 1                                                    # nothing stands in its place


def test_above_one_in_a_hundred_the_load_fails(lake):
    with pytest.raises(ValueError, match=r'10 of 100 items are broken \(10.00%, limit 1.00%\): row 0 \(bad/0.wav\)'): lake(10)


def test_the_bundled_clips_are_split_by_voice_and_small():
    folder = root()/'data'/'bundled_commands'
    voices = {s: {r['speaker_id'] for r in pq.read_table(folder/f'{s}.parquet', columns=['speaker_id']).to_pylist()} for s in ('train', 'validation', 'test')}
    assert not voices['train'] & voices['test'] and not voices['train'] & voices['validation'] and not voices['validation'] & voices['test']
    assert sum(p.stat().st_size for p in folder.glob('*.parquet')) < 4e6
    for s in voices: assert len(D.load('bundled_commands', s)) == D.SOURCES['bundled_commands'].splits[s]


# command line and runs

def puzzle(*args): return subprocess.run([PUZZLE, *map(str, args)], capture_output=True, text=True, timeout=300)

def test_command_line_by_ending_and_kind(tmp_path):
    sf.write(tmp_path/'a.wav', voice(), RATE)
    r = puzzle('encode', tmp_path/'a.wav'); assert r.returncode == 0, r.stderr
    r = puzzle('decode', tmp_path/'a.puzzle.json'); assert r.returncode == 0, r.stderr
    assert sf.info(tmp_path/'a.decoded.wav').frames == RATE
    (tmp_path/'text.wav').write_text('no'); save_puzzles(tmp_path/'odd.json', torch.zeros(1, 30, 30, dtype=torch.uint8), dict(kind='sound', samples=99_999, rate=RATE))
    save_puzzles(tmp_path/'smell.json', torch.zeros(1, 30, 30, dtype=torch.uint8), dict(kind='smell'))
    for args, word in ((('encode', tmp_path/'text.wav'), 'text.wav cannot be read as a sound'), (('decode', tmp_path/'odd.json', '-o', tmp_path/'x.wav'), 'holds 1 puzzles; a sound of 99999'), (('decode', tmp_path/'smell.json'), "'smell'")):
        r = puzzle(*args)
        assert r.returncode in (1, 2) and word in r.stderr and r.stderr.count('\n') == 1, r.stderr


VALUES = ['-p', 'budget', 'test', '-p', 'data', 'bundled', '-p', 'seed', '3', '-p', 'context_steps', '12']
def only_run(runs): return Run(next((runs/'02_audio_puzzle').iterdir()))
def start(cmd, runs): return subprocess.Popen([str(c) for c in cmd], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | dict(PUZZLE_RUNS=str(runs)))
def numbers(run): return {k: v['value'] for k, v in run.summary['metrics'].items() if 'rate' not in k and 'speed' not in k}

def finish(process):
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out[-3000:]


@pytest.mark.slow
def test_killed_and_resumed_equals_never_killed(tmp_path):
    finish(start([PUZZLE, 'run', '02_audio_puzzle', *VALUES], tmp_path/'whole'))
    whole = only_run(tmp_path/'whole')
    assert whole.summary['metrics']['digits']['value'] == 900 and any(e['kind'] == 'fallback' for e in whole.events)
    p = start([PUZZLE, 'run', '02_audio_puzzle', *VALUES], tmp_path/'runs')
    run_id = p.stdout.readline().split()[-1]
    log = tmp_path/'runs'/'02_audio_puzzle'/run_id/'metrics.jsonl'
    while not (log.exists() and '"context"' in log.read_text()): time.sleep(.02); assert p.poll() is None, p.stdout.read()
    run = only_run(tmp_path/'runs')
    os.kill(run.manifest['process']['pid'], signal.SIGKILL); p.communicate(timeout=60)
    assert run.status == 'died'
    finish(start([PUZZLE, 'run', '02_audio_puzzle', '--resume', run_id], tmp_path/'runs'))
    assert run.status == 'ok' and numbers(run) == numbers(whole)
    for f in ('metrics.jsonl', 'codec.safetensors'): assert (run.dir/f).read_bytes() == (whole.dir/f).read_bytes()
