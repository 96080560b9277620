"Codecs beside one another: `puzzle bench` measures one and renews reports/codecs.md."
import os
from typing import Annotated

from .app import app, argument, option


@app.command('bench')
def bench_codec(
    codec:Annotated[str, argument('Such as vq, pca, stream, grid; or MODULE:CLASS, one of your own.')],
    modality:Annotated[str, option(help='image, sound or text.')] = 'image',
    quick:Annotated[bool, option('--quick', help='A few minutes: less data, shorter trainings.')] = False,
    seed:Annotated[int, option(help='Of weights and batches.', min=0)] = 0,
):
    """Measure a codec: fidelity, wrong digits, reading, structure, stability, speed; renew reports/codecs.md.

    The same data, networks and time for every codec. A class of your own needs `encode`, `decode`, and
    `fit(items)` or `from_pretrained()`.

    Examples: puzzle bench pca --quick | puzzle bench my_package.my_codec:MyCodec --modality sound
    """
    os.environ.setdefault('OMP_NUM_THREADS', '1')    # times are those of one core
    from puzzle_research.bench.board import add_to_board, write_codecs
    measured = add_to_board(codec, modality, 'quick' if quick else 'full', seed=seed)
    for name, value in measured.items():
        print(f'{name:26} {value:,.3f}' if isinstance(value, float) else f'{name:26} {value}')
    print(os.path.relpath(write_codecs()))
