"`puzzle encode` and `puzzle decode`: one's own files as puzzles, and back. `KINDS` names the codecs."
import os
from pathlib import Path
from typing import Annotated, Optional

from .app import Usage, app, argument, option

# module -> kind of its puzzle files, as their meta says it; endings that it reads and writes, a default first
KINDS = {
    'vision.files': ('picture', ('.png', '.jpg', '.jpeg')),
    'audio.files': ('sound', ('.wav', '.flac', '.ogg')),
    'text.files': ('text', ('.txt',)),
}


def _codec(path):
    "The module that encodes files of this ending."
    import importlib
    known = {ending: name for name, (_, endings) in KINDS.items() for ending in endings}
    ending = path.suffix.lower()
    if ending not in known:
        raise Usage(f"{path.name}: no codec for {ending or 'a file without an ending'!r}; "
                    f"expected one of {', '.join(known)}")
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')      # threads that spin starve a busy machine
    return importlib.import_module(f'puzzle_research.{known[ending]}')


def _decoded_name(file) -> Path:
    "FILE.decoded with the ending of what the puzzle file holds."
    from puzzle_research.core.puzzle import load_puzzles
    kind = load_puzzles(file)[1].get('kind')
    endings = {k: e[0] for k, e in KINDS.values()}
    if kind not in endings:
        raise Usage(f"{file.name} holds puzzles of kind {kind!r}; expected one of {', '.join(endings)}, "
                    'as `puzzle encode` writes them. Name the file to write with -o')
    stem = file.name.removesuffix('.json').removesuffix('.puzzle')
    return file.with_name(f'{stem}.decoded{endings[kind]}')


def _must_exist(file):
    if not file.exists():
        raise FileNotFoundError(f'{file}: no such file')


@app.command()
def encode(
    file:Annotated[Path, argument('A picture (.png, .jpg), a sound (.wav, .flac, .ogg), a text (.txt).')],
    out:Annotated[Optional[Path], option('-o', '--out', metavar='FILE',
                                          help='Puzzle file to write; default FILE.puzzle.json.')] = None,
):
    """Turn a file into puzzles, 30x30 grids of digits in an ARC JSON file.

    One for each 32x32 tile of a picture, each second of a sound, about 1,000 characters of a text.
    """
    codec = _codec(file)
    _must_exist(file)
    out = out or file.with_suffix('.puzzle.json')
    n = codec.encode_file(file, out)
    print(f"{out}: {n} puzzle{'s' if n != 1 else ''}")


@app.command()
def decode(
    file:Annotated[Path, argument('A puzzle file made by `puzzle encode`.')],
    out:Annotated[Optional[Path], option('-o', '--out', metavar='FILE',
                                          help='File to write; default FILE.decoded with the first ending '
                                               'of its kind (.png, .wav).')] = None,
):
    "Turn a puzzle file back into what it was, from its digits alone."
    _must_exist(file)
    out = out or _decoded_name(file)
    _codec(out).decode_file(file, out)
    print(out)
