"`puzzle encode` and `puzzle decode`: one's own files as puzzles, and back. `KINDS` names the codecs."
import os, sys
from pathlib import Path
from typing import Annotated, Optional

from .app import Usage, app, argument, option

PICTURES = '.png .jpg .jpeg .webp .tif .tiff .bmp .gif .avif .jp2 .ppm .pgm .tga'
SOUNDS = '.wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .w64 .rf64'
TEXTS = '.txt .md .rst .tex .py .js .ts .c .h .cpp .rs .go .sh .json .csv .tsv .xml .html .yaml .toml .log'
# module -> kind of its puzzle files, as their meta says it; endings that it reads, a default first
KINDS = {
    'vision.files': ('picture', tuple(PICTURES.split())),
    'audio.files': ('sound', tuple(SOUNDS.split())),
    'text.files': ('text', tuple(TEXTS.split())),
}
OPTIONS = {'background': 'picture', 'channels': 'sound'} # of `puzzle encode`, and the kind that knows it


def _endings(): # ending -> module
    return {ending: name for name, (_, endings) in KINDS.items() for ending in endings}


def _module(name):
    import importlib
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')      # threads that spin starve a busy machine
    return importlib.import_module(f'puzzle_research.{name}')


def _codec(path):
    "The module that encodes files of this ending."
    known, ending = _endings(), path.suffix.lower()
    if ending not in known:
        raise Usage(f"{path}: no codec for {repr(ending) if ending else 'a file without an ending'}; "
                    f"expected one of {', '.join(known)}")
    return known[ending]


def _held(file): # -> module, ending that it writes by default
    "What a puzzle file holds, by its meta."
    from puzzle_research.core.puzzle_json import brief, read_grids
    kind = read_grids(file)[1].get('kind')
    known = {k: (name, endings[0]) for name, (k, endings) in KINDS.items()}
    if not isinstance(kind, str) or kind not in known:
        raise Usage(f"{file.name} holds puzzles of kind {brief(kind)}; expected one of {', '.join(known)}, "
                    'as `puzzle encode` writes them')
    return known[kind]


def _decoded_name(file, ending) -> Path:
    "photo.decoded.png for photo.png.puzzle.json, and for photo.puzzle.json."
    stem = file.name.removesuffix('.json').removesuffix('.puzzle')
    if Path(stem).suffix.lower() in _endings():
        stem = Path(stem).stem
    return file.with_name(f'{stem}.decoded{ending}')


def _tell(out, text):
    "On standard output, unless that is what the file is written to."
    from puzzle_research.core.outputs import is_stream
    print(text, file=sys.stderr if is_stream(out) else sys.stdout)


def must_exist(file):
    if file.is_dir():
        raise Usage(f'{file} is a folder; name a file in it')
    if not file.exists():
        raise FileNotFoundError(f'{file}: no such file')


def _known_options(module, given): # those that were given
    kind = KINDS[module][0]
    for name in (name for name, value in given.items() if value is not None):
        if OPTIONS[name] != kind:
            raise Usage(f'--{name} is for a {OPTIONS[name]}; this is a {kind}')
    return {name: value for name, value in given.items() if value is not None}


def _quality(module, file, aside, options): # a phrase; texts come back as they were
    measure = getattr(_module(module), 'quality_of', None)
    return measure(file, aside, **options) if measure else 'equal to the character'


FORCE = option('--force', help='Replace the file to write, if there is one.')


@app.command()
def encode(
    file:Annotated[Path, argument('A picture (.png, .jpg, .webp, .tif ...), a sound (.wav, .flac, '
                                  '.mp3 ...), a text in UTF-8 (.txt, .md, .py, .json ...).')],
    out:Annotated[Optional[Path], option('-o', '--out', metavar='FILE',
                                         help='Puzzle file to write; default FILE.puzzle.json.')] = None,
    force:Annotated[bool, FORCE] = False,
    background:Annotated[Optional[str], option(metavar='COLOUR', help='Colour under what is transparent in '
                                               'a picture, a name or #rrggbb; default white.')] = None,
    channels:Annotated[Optional[str], option(metavar='mix|apart', help='Channels of a sound: mixed into one '
                                             '(default), or each coded apart.')] = None,
    recipe:Annotated[Optional[str], option(metavar='grid|stream', help='In a grid (default) every digit '
                                           'means the same wherever it stands; stream keeps most.')] = None,
    quality:Annotated[bool, option('--quality', help='Decode what was written, and say how near it is: PSNR '
                                   'of a picture, dB of a spectrogram.')] = False,
):
    """Turn a file into puzzles, 30x30 grids of digits in an ARC JSON file.

    One for each 32x32 tile of a picture, each second of a sound, 445 characters of an English text. As a
    stream (`--recipe stream`) a puzzle holds about 1,000 characters of a short text, and long ones fill
    theirs: 1,500 to 2,700 characters of Python, 4,000 to 9,600 of JSON, 1,360 to 2,170 of Markdown, 1,350 to
    1,470 of the GPL and its like (files of 23 to 300 kB); what no model can foretell gets 440 characters of
    ASCII, 370 bytes of any other. What of the
    file the puzzles do not hold is said, and noted in the puzzle file.
    """
    from puzzle_research.core.outputs import whole_output
    module = _codec(file)
    must_exist(file)
    options = _known_options(module, dict(background=background, channels=channels))
    out = out or file.with_name(f'{file.name}.puzzle.json')
    with whole_output(out, file, force, '.json') as aside:
        n = _module(module).encode_file(file, aside, **options, **(dict(recipe=recipe) if recipe else {}))
        said = f', {_quality(module, file, aside, options)}' if quality else ''
    _tell(out, f"{out}: {n} puzzle{'s' if n != 1 else ''}{said}")


@app.command()
def decode(
    file:Annotated[Path, argument('A puzzle file made by `puzzle encode`.')],
    out:Annotated[Optional[Path], option('-o', '--out', metavar='FILE',
                                         help='File to write; default FILE.decoded with the first ending '
                                              'of its kind (.png, .wav, .txt).')] = None,
    force:Annotated[bool, FORCE] = False,
    no_check:Annotated[bool, option('--no-check', help='Decode what can be decoded of a file that was '
                                    'changed, and say what is wrong with it.')] = False,
):
    "Turn a puzzle file back into what it was, from its digits alone, if they are those that were written."
    from puzzle_research.core.outputs import whole_output
    must_exist(file)
    module, ending = _held(file)
    out = out or _decoded_name(file, ending)
    if out.suffix and _codec(out) != module:
        raise Usage(f'{file.name} holds no {KINDS[_codec(out)][0]}: its meta says kind {KINDS[module][0]!r}')
    with whole_output(out, file, force, ending) as aside:
        _module(module).decode_file(file, aside, **(dict(check=False) if no_check else {}))
    _tell(out, out)
