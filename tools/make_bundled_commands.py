"""Make data/bundled_commands: ten spoken commands, synthesised with espeak-ng in the voices and speeds below.

    apt-get install espeak-ng && python tools/make_bundled_commands.py [FOLDER]

Nothing is downloaded. The split is by voice. The same espeak-ng gives the same files, byte for byte."""
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile as sf
from scipy.signal import lfilter, resample_poly

WORDS = ('yes', 'no', 'up', 'down', 'left', 'right', 'on', 'off', 'stop', 'go')
ACCENTS = ('en-us', 'en-gb', 'en-gb-scotland', 'en-gb-x-rp')
VARIANTS = {'train': ('m1', 'm3', 'm5', 'f1', 'f3'), 'validation': ('m2', 'f2'), 'test': ('m4', 'f4')}
SPEEDS, PITCHES = (110, 140, 170, 200), (30, 45, 60)  # words a minute; of espeak-ng's 0 to 99
RATE = 16_000


def speak(word, voice, speed, pitch): # -> float (n,) at RATE, silence at the ends cut
    command = ['espeak-ng', '-v', voice, '-s', str(speed), '-p', str(pitch), '--stdout', word]
    wav = subprocess.run(command, capture_output=True, check=True).stdout
    sized = wav[:4] + (len(wav) - 8).to_bytes(4, 'little') + wav[8:]   # of a pipe, espeak-ng leaves it open
    x, rate = sf.read(io.BytesIO(sized))
    x = resample_poly(x, RATE, rate)
    loud = np.flatnonzero(np.abs(x) > .01*np.abs(x).max())
    return x[loud[0]:loud[-1]]


def room(n, r): # a faint hum and hiss, as a microphone has; its level differs from take to take
    hiss = lfilter([1.], [1., -r.uniform(.5, .95)], r.standard_normal(n))
    return hiss/hiss.std()*10**r.uniform(-4.7, -3.9)


def take(word, voice, r): # -> int16 (at most RATE,)
    x = speak(word, voice, r.choice(SPEEDS), r.choice(PITCHES))[:RATE]
    x *= 10**r.uniform(-1.1, -.1)/np.abs(x).max()
    n = len(x) + 800 if r.random() < .1 else RATE            # one in ten ends early, as real ones do
    clip = np.zeros(max(n, len(x)))[:RATE]
    at = r.integers(0, len(clip) - len(x) + 1)
    clip[at:at+len(x)] = x
    return np.round((clip + room(len(clip), r)).clip(-1, 1)*32767).astype(np.int16)


def flac(x):
    out = io.BytesIO()
    sf.write(out, x, RATE, format='FLAC', subtype='PCM_16')
    return out.getvalue()


def rows(split):
    for accent in ACCENTS:
        for variant in VARIANTS[split]:
            voice = f'{accent}+{variant}'
            r = np.random.default_rng([ord(c) for c in voice])
            for label, word in enumerate(WORDS):
                audio = dict(bytes=flac(take(word, voice, r)), path=f'{word}/{voice}.flac')
                where = dict(file=f'{word}/{voice}.wav', audio=audio, label=label)
                yield where | dict(speaker_id=voice, utterance_id=0)


def make(folder):
    label = {'names': list(WORDS), '_type': 'ClassLabel'}
    features = {'audio': {'sampling_rate': RATE, '_type': 'Audio'}, 'label': label}
    sound = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
    text, number = pa.string(), pa.int64()
    columns = dict(file=text, audio=sound, label=number, speaker_id=text, utterance_id=number)
    hub = json.dumps({'info': {'features': features}})
    schema = pa.schema(list(columns.items()), metadata={'huggingface': hub})
    folder.mkdir(parents=True, exist_ok=True)
    for split in VARIANTS:
        made = list(rows(split))
        order = np.random.RandomState(0).permutation(len(made))
        table = pa.Table.from_pylist([made[i] for i in order], schema=schema)
        file = folder/f'{split}.parquet'
        pq.write_table(table, file, compression='none', use_dictionary=False, write_statistics=False)
        print(f'{split}: {len(made)} clips, {file.stat().st_size/1e6:.2f} MB')


if __name__ == '__main__':
    default = Path(__file__).resolve().parents[1]/'data'/'bundled_commands'
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
