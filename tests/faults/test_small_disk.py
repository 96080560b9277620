"Commands on a disk of half a megabyte that is nearly full: its error, one line, and what was there is kept."
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from puzzle_research.core.collect import example_run
from puzzle_research.core.publish import publish
from shared import SMALL, as_options, puzzle

FREE = [0, 4096, 16_384]


@pytest.fixture
def nearly_full(small_disk):
    "Leave so many bytes on the disk; returns its folder."
    def fill(free):
        (small_disk/'filler').unlink(missing_ok=True)
        (small_disk/'filler').write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - free)))
        return small_disk
    return fill


def leftovers(folder):
    return [p.name for p in folder.rglob('*') if re.search(r'\.(tmp|aside)$', p.name)]


def refused(result, kept, folder):
    "Whether a command said that the disk is full, in its last line, and left all as it was."
    last = result.stderr.strip().splitlines()[-1] if result.stderr.strip() else ''
    return result.returncode == 1 and 'No space left' in last and kept() and leftovers(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize('what', ['picture', 'text'])
def test_encode_and_decode(faults, nearly_full, tmp_path, what):
    source, packed = tmp_path/('a.png' if what == 'picture' else 'a.txt'), tmp_path/'a.puzzle.json'
    if what == 'picture':
        noise = np.random.RandomState(0).randint(0, 255, (160, 160, 3), dtype=np.uint8)
        Image.fromarray(noise).save(source)
    else:
        source.write_text(' '.join(str(k*k) for k in range(9000)))
    done = puzzle('encode', str(source), '-o', str(packed))
    assert done.returncode == 0, done.stderr
    for free in FREE:
        for command, given, name in [('encode', source, 'b.json'), ('decode', packed, f'b{source.suffix}')]:
            disk = nearly_full(200_000)
            (disk/name).write_bytes(b'earlier')
            nearly_full(free)
            r = puzzle(command, str(given), '-o', str(disk/name), '--force')
            right = refused(r, lambda at=disk/name: at.read_bytes() == b'earlier', disk)
            faults.count(f'`puzzle {command}`', f'full disk, {what}', 'refused' if right else 'lost',
                         f'{free} free: {r.returncode} {r.stderr[-600:]} {leftovers(disk)}')
            (disk/name).unlink()


def test_publish(faults, nearly_full, tmp_path):
    "Old or new, whole, on a real disk that ends."
    old, new = (example_run(tmp_path/str(psnr)/'00_toy', psnr=psnr) for psnr in (32.6, 33.3))
    site = nearly_full(400_000)/'site'
    publish([old], site)
    def tree():
        return {p: p.read_bytes() for p in sorted(site.rglob('*')) if p.is_file() and p.name != '.lock'}
    before, tried = tree(), 0
    for free in range(0, 200_000, 4096):
        nearly_full(free)
        try:
            publish([new], site)
            break
        except OSError as e:
            whole = tree() == before and 'No space left' in str(e)
            faults.count('publish', 'small disk', 'refused' if whole else 'lost', f'{free} free: {e}')
            tried += 1
    assert tried and '33.3' in (site/'reports'/'00_toy.md').read_text()


@pytest.mark.slow
def test_sweep(faults, nearly_full):
    "The first point tells; those after it would fail as it did and are not begun."
    for free in (0, 20_480):
        disk = nearly_full(free)
        r = puzzle('sweep', 'guides_system', *as_options(SMALL), '-p', 'seed', '0,1,2', PUZZLE_RUNS=str(disk))
        told = r.returncode == 1 and 'No space left' in r.stdout + r.stderr and 'Traceback' not in r.stderr
        begun = len(list(disk.glob('guides_system/*')))
        faults.count('`puzzle sweep`', 'full disk', 'refused' if told and begun <= 1 else 'lost',
                     f'{free} free, {begun} begun: {r.stdout[-500:]} {r.stderr[-500:]}')
        shutil.rmtree(disk/'guides_system', ignore_errors=True)
