"The vision codec as its users meet it: the packaged weights, files, the command line, papermill."
import os, re, signal, subprocess, sys, time
from pathlib import Path

import nbformat, numpy as np, pytest, torch
from nbclient import NotebookClient
from PIL import Image

from puzzle_research.core.config import root
from puzzle_research.core.data import load
from puzzle_research.core.diagnose import fidelity, psnr
from puzzle_research.core.puzzle import check_codec, load_puzzles, save_puzzles
from puzzle_research.core.quantize import count_parameters
from puzzle_research.core.runs import Run
from puzzle_research.core.fit import Batches, Trainer
from puzzle_research.vision_puzzle import BUDGET, MAXK, WEIGHTS, Config, PublishedVAE, VisionPuzzle, build, learned_numbers, published_loss

PUZZLE = Path(sys.executable).with_name('puzzle')
PAPERMILL = Path(sys.executable).with_name('papermill')


@pytest.fixture(scope='module')
def codec(): return VisionPuzzle.from_pretrained()

@pytest.fixture(scope='module')
def photos(): return torch.from_numpy(load('bundled_photos', 'test').arrays['image'][::40].copy())


def test_parameter_counts():
    assert count_parameters(build(Config(recipe='seed'))) == 83_777
    assert learned_numbers(build(Config())) <= 83_777


def test_packaged_weights_are_small(): assert WEIGHTS.stat().st_size < 400_000


def test_conformance(codec, photos):
    assert check_codec(codec, photos[:6])['digits_used'] == 10


def test_photos_come_back(codec, photos):
    f = fidelity(codec.decode(codec.encode(photos)), photos)
    assert f['psnr'] > 34, f


def test_odd_images(codec):
    "Noise, constants, checkerboards, ramps: every image becomes 900 digits, and the decoder sees what the encoder saw."
    g = torch.Generator().manual_seed(0)
    odd = torch.stack([torch.randint(0, 256, (3, 32, 32), generator=g), torch.randint(0, 2, (3, 32, 32), generator=g)*255, torch.zeros(3, 32, 32),
                       torch.full((3, 32, 32), 255.), (torch.arange(32)%2*255).expand(3, 32, 32), torch.arange(3072).view(3, 32, 32)%256]).to(torch.uint8)
    error, *_ = codec.choose(odd)
    decoded = codec.decode(codec.encode(odd))
    assert torch.equal((decoded.double() - odd).square().sum((1, 2, 3)), error)
    assert torch.equal(decoded[2:4], odd[2:4])


def discs(*radii):
    "Black discs with soft edges on white."
    y, x = torch.meshgrid(torch.arange(32.), torch.arange(32.), indexing='ij')
    far = ((y - 16)**2 + (x - 16)**2).sqrt()
    return torch.stack([(255 - 255*torch.sigmoid(2*(r - far))).to(torch.uint8).expand(3, 32, 32) for r in radii])


def test_no_integer_passes_the_tables_range(codec):
    "So few details that a fine step fits in bits, but they are so large that it would clamp them: the step found is coarser, and the disc stays whole."
    images = discs(3, 4, 6)
    fine = codec.quantise(images, torch.full((3,), 100))[0]
    assert (fine.bits < BUDGET).any() and (fine.peak > MAXK + .5).all() and (fine.length > BUDGET).all()
    error, index, *_ = codec.choose(images)
    assert (codec.quantise(images, index)[0].peak <= MAXK + .5).all()
    assert (psnr(error.numpy()/3072/255**2) > 40).all(), error


def test_threads_and_company_change_no_digit(codec, photos):
    whole = codec.encode(photos[:4])
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    alone = codec.encode(photos[1:2])
    torch.set_num_threads(threads)
    assert torch.equal(whole[1:2], alone)


def test_overhead_below_a_twentieth_of_a_step(photos, monkeypatch):
    "Processor time of a trainer's steps against the part of it spent in what a bare loop does too: loss, backward, update. One measurement, so a busy machine slows both alike."
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    spent = 0.
    def timed(f):
        def g(*args, **kw):
            nonlocal spent; start = time.process_time()
            try: return f(*args, **kw)
            finally: spent += time.process_time() - start
        return g
    batches = Batches(photos.repeat(64, 1, 1, 1)[:128], batch_size=64); model = PublishedVAE(); optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    monkeypatch.setattr(torch.Tensor, 'backward', timed(torch.Tensor.backward)); monkeypatch.setattr(optimizer, 'step', timed(optimizer.step))
    t = Trainer(model, timed(published_loss), batches, optimizer, device='cpu', log_every=10**6); t.saved = time.monotonic()
    t._loop(1); spent, start = 0., time.process_time(); t._loop(5)
    whole = time.process_time() - start; torch.set_num_threads(threads)
    assert spent > .5*whole and whole < 1.05*spent, f'{whole/spent - 1:.1%}'


def picture(path, h=45, w=70):
    y, x = np.mgrid[:h, :w]
    a = np.stack([(x*3)%256, (y*5)%256, ((x + y)*2)%256], -1).astype(np.uint8)
    Image.fromarray(a).save(path)
    return a


def puzzle(*args): return subprocess.run([PUZZLE, *map(str, args)], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize('name', ['photo.png', 'photo.jpg', 'grey.png'])
def test_picture_round_trip(tmp_path, name):
    a = picture(tmp_path/name)
    if name == 'grey.png': Image.fromarray(a).convert('L').save(tmp_path/name)
    r = puzzle('encode', tmp_path/name, '-o', tmp_path/'p.json'); assert r.returncode == 0, r.stderr
    puzzles, meta = load_puzzles(tmp_path/'p.json')
    assert len(puzzles) == 6 and (meta['height'], meta['width']) == (45, 70)
    r = puzzle('decode', tmp_path/'p.json', '-o', tmp_path/'back.png'); assert r.returncode == 0, r.stderr
    back, original = (np.asarray(Image.open(tmp_path/f).convert('RGB')).astype(float) for f in ('back.png', name))
    assert back.shape == (45, 70, 3) and 10*np.log10(255**2/((back - original)**2).mean()) > 28


def test_bad_files_are_one_clear_line(tmp_path):
    picture(tmp_path/'whole.png')
    (tmp_path/'text.png').write_text('not a picture')
    whole = (tmp_path/'whole.png').read_bytes(); (tmp_path/'torn.png').write_bytes(whole[:len(whole)//2])
    save_puzzles(tmp_path/'sound.json', torch.zeros(1, 30, 30, dtype=torch.uint8), dict(kind='sound'))
    save_puzzles(tmp_path/'short.json', torch.zeros(1, 30, 30, dtype=torch.uint8), dict(kind='picture', height=64, width=64))
    for args, word in ((('encode', tmp_path/'text.png'), 'text.png cannot be read as a picture'), (('encode', tmp_path/'torn.png'), 'torn.png cannot be read'),
                       (('decode', tmp_path/'sound.json', '-o', tmp_path/'x.png'), 'holds no picture'), (('decode', tmp_path/'short.json'), 'holds 1 puzzles; a picture of 64x64 has 4')):
        r = puzzle(*args)
        assert r.returncode in (1, 2) and word in r.stderr and r.stderr.count('\n') == 1, r.stderr


def only_run(runs): return Run(next((runs/'01_vision_puzzle').iterdir()))
def numbers(run): return {k: v['value'] for k, v in run.summary['metrics'].items() if 'rate' not in k and 'speed' not in k}
def start(cmd, runs, cwd=None): return subprocess.Popen([str(c) for c in cmd], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | dict(PUZZLE_RUNS=str(runs)))

def finish(process):
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out[-3000:]


NOTEBOOK = root()/'nbs'/'01_vision_puzzle.ipynb'
VALUES = ['-p', 'commitment', '0.15', '-p', 'budget', 'test', '-p', 'data', 'bundled', '-p', 'seed', '3', '-p', 'context_steps', '16']


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run from start to end with `puzzle run`, from a folder outside the project."
    runs = tmp_path_factory.mktemp('whole')
    finish(start([PUZZLE, 'run', NOTEBOOK, *VALUES], runs, runs))
    return only_run(runs)


def same(run, whole):
    assert run.status == 'ok' and numbers(run) == numbers(whole)
    for f in ('metrics.jsonl', 'codec.safetensors'): assert (run.dir/f).read_bytes() == (whole.dir/f).read_bytes()


def test_a_run_holds_what_it_should(whole):
    assert whole.config['commitment'] == .15 and whole.manifest['changed']['seed'] == 3
    assert {'report.md', 'summary.json', 'metrics.jsonl', 'events.jsonl', 'config.json', 'notebook.ipynb', 'log.txt'} <= {p.name for p in whole.dir.iterdir()}
    assert any(e['kind'] == 'fallback' for e in whole.events)
    assert {c['op'] for c in whole.summary['criteria']} >= {'>=', '<=', '=='} and whole.summary['metrics']['digits']['value'] == 900


def test_papermill_from_the_root_equals_puzzle_run(whole, tmp_path):
    finish(start([PAPERMILL, 'nbs/01_vision_puzzle.ipynb', tmp_path/'out.ipynb', *VALUES], tmp_path/'runs', root()))
    same(only_run(tmp_path/'runs'), whole)


@pytest.mark.slow
def test_jupyterlab_equals_puzzle_run(whole, tmp_path, monkeypatch):
    "Values typed into the parameters cell, the kernel started in the notebook's folder."
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path/'runs'))
    nb = nbformat.read(NOTEBOOK, 4)
    cell = next(c for c in nb.cells if 'parameters' in c.metadata.get('tags', []))
    for name, value in zip(VALUES[1::3], VALUES[2::3]):
        cell.source, n = re.subn(rf'^({name}:\w+) = [^#]*', rf'\1 = {value if value[0].isdigit() else repr(value)} ', cell.source, flags=re.M)
        assert n == 1
    NotebookClient(nb, kernel_name='python3', resources=dict(metadata=dict(path=str(NOTEBOOK.parent)))).execute()
    same(only_run(tmp_path/'runs'), whole)


def test_killed_and_resumed_equals_never_killed(whole, tmp_path):
    p = start([PUZZLE, 'run', '01_vision_puzzle', *VALUES], tmp_path/'runs')
    run_id = p.stdout.readline().split()[-1]
    log = tmp_path/'runs'/'01_vision_puzzle'/run_id/'metrics.jsonl'
    while not (log.exists() and '"context"' in log.read_text()): time.sleep(.02); assert p.poll() is None, p.stdout.read()
    run = only_run(tmp_path/'runs')
    os.kill(run.manifest['process']['pid'], signal.SIGKILL); p.communicate(timeout=60)
    assert run.status == 'died'
    finish(start([PUZZLE, 'run', '01_vision_puzzle', '--resume', run_id], tmp_path/'runs'))
    same(run, whole)


def test_a_misspelt_parameter_stops_papermill_at_once(tmp_path):
    p = start([PAPERMILL, NOTEBOOK, tmp_path/'out.ipynb', '-p', 'comitment', '0.15', '-p', 'budget', 'test'], tmp_path/'runs')
    out, _ = p.communicate(timeout=300)
    assert p.returncode != 0 and "did you mean 'commitment'" in out and not (tmp_path/'runs').exists()
