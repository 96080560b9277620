"""Compile what numba compiles, once: the first picture, sound and text are then as fast as the next.

One small file of each kind goes there and back by each recipe. What was compiled lies beside the modules."""
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from puzzle_research.cli.files import KINDS  # noqa: E402
from puzzle_research.codec.recipes import STREAM  # noqa: E402


def samples(folder:Path) -> dict: # kind -> files
    noise = np.random.default_rng(0)
    Image.fromarray(noise.integers(0, 256, (40, 40, 3), np.uint8)).save(folder/'picture.png')
    soundfile.write(folder/'sound.wav', noise.normal(0, .1, 16_000), 16_000)
    (folder/'short.txt').write_text('A text of one window.')
    (folder/'long.txt').write_text('A text of more than the network reads. '*600)
    return dict(picture=['picture.png'], sound=['sound.wav'], text=['short.txt', 'long.txt'])


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = samples(folder)
        for module, (kind, endings) in KINDS.items():
            codec = import_module(f'puzzle_research.{module}')
            for name, recipe in [(n, r) for n in files[kind] for r in (STREAM, 'grid')]:
                codec.encode_file(folder/name, folder/'puzzle.json', recipe=recipe)
                codec.decode_file(folder/'puzzle.json', folder/f'decoded{endings[0]}')


if __name__ == '__main__':
    main()
