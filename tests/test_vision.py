"The vision codec as its users meet it: the packaged weights, files, the command line, whole runs."
import os
import re
import shutil
import signal

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

from puzzle_research.codec.step_codec import BUDGET
from puzzle_research.core.config import root
from puzzle_research.core.data import load
from puzzle_research.core.diagnose import fidelity, psnr
from puzzle_research.core.puzzle import check_codec, load_puzzles, save_puzzles
from puzzle_research.core.quantize import count_parameters
from puzzle_research.core.runs import Run
from puzzle_research.vision.files import open_picture
from puzzle_research.vision_puzzle import Config, VisionPuzzle, build, decode_file, encode_file
from puzzle_research.vision_puzzle import learned_numbers, train

from shared import CHOSEN, PAPERMILL, PUZZLE, SMALL, as_options, assert_one_clear_line, assert_same_run
from shared import finish, only_run, puzzle, start, wait_until

NOTEBOOK = root()/'nbs'/'01_vision_puzzle.ipynb'
VALUES = CHOSEN['01_vision_puzzle']
LIMIT = 127     # largest integer of its alphabet


@pytest.fixture(scope='module')
def codec():
    return VisionPuzzle.from_pretrained(recipe='stream')


@pytest.fixture(scope='module')
def photos(): # uint8 (B, 3, 32, 32)
    return torch.from_numpy(load('bundled_photos', 'test').arrays['image'][::80].copy())


@pytest.fixture(scope='module')
def puzzles(codec, photos):
    return codec.encode(photos)


# The model

def test_parameter_counts():
    assert count_parameters(build(Config(recipe='seed'))) == 83_777
    assert learned_numbers(build(Config(recipe='stream'))) <= 83_777
    assert build(Config(recipe='grid')).learned_numbers <= 83_777


def test_best_is_the_older_name_of_stream_and_grid_the_default():
    assert Config(recipe='best') == Config(recipe='stream') and Config().recipe == 'grid'
    with pytest.raises(ValueError, match="unknown recipe 'bets'.*Known: grid, stream, seed"):
        Config(recipe='bets')


@pytest.mark.parametrize('budget, precision', [('test', 'no'), ('quick', 'no'), ('full', 'auto')])
def test_precision_of_the_published_design(budget, precision):
    assert Config(budget=budget).published_precision == precision


def test_packaged_codec_keeps_the_protocol(codec, photos):
    def fresh(): return VisionPuzzle.from_pretrained(recipe='stream')
    assert check_codec(codec, photos[:2], fresh=fresh)['digits_used'] == 10
    assert check_codec(VisionPuzzle.from_pretrained(), photos[:2])['digits_used'] == 10      # grid


def test_photos_come_back(codec, photos, puzzles):
    f = fidelity(codec.decode(puzzles), photos)
    assert f['psnr'] > 34, f


def odd_images(): # uint8 (6, 3, 32, 32)
    "Noise, binary noise, black, white, a comb, a ramp."
    g = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, 32, 32), generator=g),
              torch.randint(0, 2, (3, 32, 32), generator=g)*255,
              torch.zeros(3, 32, 32),
              torch.full((3, 32, 32), 255.),
              (torch.arange(32)%2*255).expand(3, 32, 32),
              torch.arange(3072).view(3, 32, 32)%256]
    return torch.stack(images).to(torch.uint8)


def test_every_image_becomes_900_digits(codec):
    "And the decoder sees what the encoder saw."
    odd = odd_images()
    index, *_, known = codec.choose(odd)
    decoded = codec.decode(codec.encode(odd))
    assert torch.equal(decoded, codec.render(known, index))
    assert torch.equal(decoded[2:4], odd[2:4])


def discs(*radii): # -> uint8 (B, 3, 32, 32)
    "Black discs with soft edges on white."
    y, x = torch.meshgrid(torch.arange(32.), torch.arange(32.), indexing='ij')
    far = ((y - 16)**2 + (x - 16)**2).sqrt()
    pictures = [255 - 255*torch.sigmoid(2*(r - far)) for r in radii]
    return torch.stack(pictures).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)


def test_no_integer_passes_the_alphabet(codec):
    """So few details that a fine step fits in bits, but so large that it would clamp them:
    the step found is coarser, and the disc stays whole."""
    images = discs(3, 4, 6)
    fine = codec.quantise(images, torch.full((3,), 100))[0]
    assert (fine.bits < BUDGET).any() and (fine.peak > LIMIT + .5).all()
    assert (codec.needed(fine) > BUDGET).all()
    index, *_, known = codec.choose(images)
    assert (codec.quantise(images, index)[0].peak <= LIMIT + .5).all()
    error = (codec.render(known, index).double() - images).square().flatten(1).mean(1)
    assert (psnr(error.numpy()/255**2) > 40).all(), error


# Files

def picture(path, mode='RGB', h=45, w=70): # -> the pixels written
    y, x = np.mgrid[:h, :w]
    pixels = np.stack([(x*3)%256, (y*5)%256, ((x + y)*2)%256], -1).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def assert_alike(path, other):
    a, b = (np.asarray(Image.open(p).convert('RGB')).astype(float) for p in (path, other))
    assert a.shape == b.shape and 10*np.log10(255**2/((a - b)**2).mean()) > 28


@pytest.mark.parametrize('name, mode', [('photo.jpg', 'RGB'), ('grey.png', 'L')])
def test_pictures_are_read_as_rgb(tmp_path, name, mode):
    picture(tmp_path/name, mode)
    pixels = np.asarray(Image.open(tmp_path/name).convert('RGB'))
    assert (open_picture(tmp_path/name)[0].permute(1, 2, 0).numpy() == pixels).all()


def test_the_command_line_encodes_and_decodes(tmp_path):
    picture(tmp_path/'photo.png')
    encoded = puzzle('encode', tmp_path/'photo.png', '-o', tmp_path/'p.json')
    assert encoded.returncode == 0, encoded.stderr
    found, meta = load_puzzles(tmp_path/'p.json')
    assert len(found) == 6 and (meta['height'], meta['width']) == (45, 70)
    decoded = puzzle('decode', tmp_path/'p.json', '-o', tmp_path/'back.png')
    assert decoded.returncode == 0, decoded.stderr
    assert_alike(tmp_path/'back.png', tmp_path/'photo.png')


def bad_files(folder):
    picture(folder/'whole.png', h=32, w=32)
    whole = (folder/'whole.png').read_bytes()
    (folder/'torn.png').write_bytes(whole[:len(whole)//2])
    (folder/'text.png').write_text('not a picture')
    empty = torch.zeros(1, 30, 30, dtype=torch.uint8)
    encode_file(folder/'whole.png', folder/'whole.json')
    meta = load_puzzles(folder/'whole.json')[1]
    save_puzzles(folder/'sound.json', empty, dict(kind='sound'))
    save_puzzles(folder/'short.json', empty, meta | dict(height=64, width=64))
    save_puzzles(folder/'strange.json', empty, meta | dict(height=32, width=32, weights='0'*16))


def test_bad_files_are_refused_by_name(tmp_path):
    bad_files(tmp_path)
    for name, word in (('text.png', 'text.png cannot be read as a picture'),
                       ('torn.png', 'torn.png cannot be read')):
        with pytest.raises(ValueError, match=word):
            encode_file(tmp_path/name, tmp_path/'p.json')
    for name, word in (('sound.json', 'sound.json holds no picture'),
                       ('short.json', 'holds 1 puzzles; a picture of 64x64 has 4'),
                       ('strange.json', "was written with weights '0000")):
        with pytest.raises(ValueError, match=word):
            decode_file(tmp_path/name, tmp_path/'x.png')


def test_the_command_line_says_it_in_one_line(tmp_path):
    (tmp_path/'text.png').write_text('not a picture')
    assert_one_clear_line(puzzle('encode', tmp_path/'text.png'), 'text.png cannot be read as a picture')


# Runs

FILES = ('metrics.jsonl', 'codec.safetensors')


@pytest.fixture(scope='module')
def whole(finished_run):
    "The run that test_experiments.py looks at."
    return finished_run('01_vision_puzzle', **VALUES)


def test_a_run_holds_what_it_should(whole):
    assert any(e['kind'] == 'fallback' for e in whole.events)
    assert whole.summary['metrics']['digits']['value'] == 900
    assert {c['op'] for c in whole.summary['criteria']} >= {'>=', '<=', '=='}


@pytest.fixture
def one_thread(): # as in the processes that `start` begins
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_stages_that_are_done_stay_and_the_others_end_alike(whole, tmp_path, one_thread):
    "A run that lost all after its first stage trains the rest to the same bytes."
    run = Run(shutil.copytree(whole.dir, tmp_path/'run'))
    for pattern in ('codec.safetensors', 'checkpoints/context*', 'checkpoints/polish*'):
        for path in run.dir.glob(pattern):
            path.unlink()
    before = (run.dir/'published.safetensors').stat().st_mtime_ns
    train(Config(**run.config), run)
    assert (run.dir/'published.safetensors').stat().st_mtime_ns == before
    assert (run.dir/'codec.safetensors').read_bytes() == (whole.dir/'codec.safetensors').read_bytes()


def papermill_killed_and_resumed(values, runs, when): # (the run's folder) -> bool
    "Plain papermill from the project's root, killed `when`; `puzzle run --resume` takes it up."
    command = [PAPERMILL, 'nbs/01_vision_puzzle.ipynb', runs/'out.ipynb', *as_options(SMALL | values)]
    process = start(command, runs, root())
    wait_until(lambda: any(when(p.parent) for p in runs.glob('*/*/manifest.json')), process)
    run = only_run(runs)
    os.kill(run.manifest['process']['pid'], signal.SIGKILL)
    process.communicate(timeout=60)
    assert run.status == 'died'
    finish(start([PUZZLE, 'run', '01_vision_puzzle', '--resume', run.dir.name], runs))
    return run


@pytest.mark.slow
def test_papermill_killed_and_resumed_equals_puzzle_run(finished_run, tmp_path):
    "The published design alone, killed when it was trained."
    values = VALUES | dict(recipe='seed')
    run = papermill_killed_and_resumed(values, tmp_path, lambda at: (at/'published.safetensors').exists())
    assert_same_run(run, finished_run('01_vision_puzzle', **values))


@pytest.mark.slow
def test_killed_in_the_second_stage_equals_never_killed(whole, tmp_path):
    def in_second_stage(at):
        return (at/'metrics.jsonl').exists() and '"context"' in (at/'metrics.jsonl').read_text()

    assert_same_run(papermill_killed_and_resumed(VALUES, tmp_path, in_second_stage), whole, FILES)


def test_a_misspelt_parameter_stops_papermill_at_once(tmp_path):
    command = [PAPERMILL, NOTEBOOK, tmp_path/'out.ipynb', '-p', 'comitment', '0.15', '-p', 'budget', 'test']
    process = start(command, tmp_path/'runs')
    out, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "did you mean 'commitment'" in out
    assert not (tmp_path/'runs').exists()


@pytest.mark.slow
def test_jupyterlab_equals_puzzle_run(whole, tmp_path, monkeypatch):
    "Values typed into the parameters cell, the kernel started in the notebook's folder."
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path/'runs'))
    nb = nbformat.read(NOTEBOOK, 4)
    cell = next(c for c in nb.cells if 'parameters' in c.metadata.get('tags', []))
    for name, value in (SMALL | VALUES).items():
        cell.source, n = re.subn(rf'^({name}:\w+) = [^#]*', rf'\1 = {value!r} ', cell.source, flags=re.M)
        assert n == 1
    resources = dict(metadata=dict(path=str(NOTEBOOK.parent)))
    NotebookClient(nb, kernel_name='python3', resources=resources).execute()
    assert_same_run(only_run(tmp_path/'runs'), whole, FILES)
