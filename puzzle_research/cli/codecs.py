"`puzzle bench`: a codec measured and put on the board, or one's own files beside everybody's formats."
import json, os, sys
from pathlib import Path
from typing import Annotated, Optional

from .app import Usage, app, argument, option, print_table


def _bench_own(where, modality, items, as_json, out):
    from puzzle_research.bench.own_items import own_items
    found = own_items(where, items, modality)
    from puzzle_research.bench.own_files import MEASURES, beside_formats, own_table, told, write_own
    rows, shown = beside_formats(found)
    print(*told(found), sep='\n', file=sys.stderr)
    if as_json:
        said = dict(data=where, modality=found.modality, fidelity=MEASURES[found.modality], items=found.names,
                    total=found.total, unreadable=found.unreadable, note=found.note, dropped=found.said,
                    rows=rows)
        print(json.dumps(said, indent=1))
    else:
        print_table(own_table(found, rows))
    if out:
        print(os.path.relpath(write_own(out, where, found, rows, shown)), file=sys.stderr)


def _is_data(text) -> bool: # a path, or of the hub; a codec is a name or MODULE:CLASS
    return text.startswith('hub:') or '/' in text or '.parquet' in text or Path(text).exists()


@app.command('bench')
def bench_codec(
    what:Annotated[str, argument('A codec such as vq, pca, stream, grid, or MODULE:CLASS, one of your own; '
                                 'or a folder of your own files.')] = '',
    modality:Annotated[str, option(help='image, sound or text; of a codec image, of files what there is most '
                                   'of.')] = '',
    quick:Annotated[bool, option('--quick', help='A few minutes: less data, shorter trainings.')] = False,
    seed:Annotated[int, option(help='Of weights and batches.', min=0)] = 0,
    data:Annotated[str, option(metavar='DATA', help='Your own files: a path, FILE.parquet:COLUMN, or '
                               'hub:owner/name:column.')] = '',
    items:Annotated[int, option(min=1, help='Of your own files, so many, spread evenly.')] = 24,
    as_json:Annotated[bool, option('--json', help='Of your own files, print JSON.')] = False,
    out:Annotated[Optional[Path], option('-o', '--out', metavar='FOLDER', help='Of your own files, write '
                                         'bench.md and bench.png there.')] = None,
):
    """Measure a codec and renew reports/codecs.md, or show your own files beside the formats that all use.

    A codec: fidelity, wrong digits, reading, structure, stability, speed; the same data, networks and time
    for every one. A class of your own needs `encode`, `decode`, and `fit(items)` or `from_pretrained()`.

    Files: pictures beside AVIF, WebP and JPEG, sounds beside Opus and FLAC, texts beside xz and zstd, at the
    bytes of their puzzles.

    Examples: puzzle bench pca --quick | puzzle bench my_package.my_codec:MyCodec --modality sound |
    puzzle bench ./photos --out /tmp/photos
    """
    if bool(what) == bool(data):
        raise Usage('give a codec or a folder, or --data; such as `puzzle bench ./photos`')
    os.environ.setdefault('OMP_NUM_THREADS', '1')    # times are those of one core
    if data or _is_data(what):
        modality = 'picture' if modality == 'image' else modality
        return _bench_own(data or what, modality, items, as_json, out)
    from puzzle_research.bench.board import add_to_board, write_codecs
    measured = add_to_board(what, modality or 'image', 'quick' if quick else 'full', seed=seed)
    for name, value in measured.items():
        print(f'{name:26} {value:,.3f}' if isinstance(value, float) else f'{name:26} {value}')
    print(os.path.relpath(write_codecs()))
