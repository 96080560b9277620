"What several test files need: commands as a user types them, runs in processes of their own, a killed run."
import importlib.util, io, json, multiprocessing, os, signal, socket, subprocess, sys, time
from pathlib import Path

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, torch
from PIL import Image

from puzzle_research.core.config import root
from puzzle_research.core.runs import Run

PUZZLE = Path(sys.executable).with_name('puzzle')
PAPERMILL = Path(sys.executable).with_name('papermill')
SMALL = dict(budget='test', data='bundled')
# Parameters of the run of each experiment that everyday tests look at; the others have none
CHOSEN = {
    '01_vision_puzzle': dict(recipe='stream', commitment=.15, seed=3),
    '02_audio_puzzle': dict(recipe='stream', seed=3, context_steps=12),
    '03_language_puzzle': dict(recipe='stream', seed=3, steps=30, test_windows=8),
    '04_jepa_vq': dict(commitment=.15),
    '05_ternary_vae': dict(seed=2),
}


def write_notebook(path, texts, parameters=0): # texts of cells; which of them is the parameters cell
    "A notebook of code cells that have not been executed."
    cells = [dict(cell_type='code', id=f'c{i}', metadata={}, outputs=[], execution_count=None,
                  source=text.strip()) for i, text in enumerate(texts)]
    cells[parameters]['metadata']['tags'] = ['parameters']
    kernel = dict(display_name='python3', language='python', name='python3')
    nb = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(nb))
    return path


def as_options(values): # dict of parameters
    "`-p NAME VALUE` for each parameter, as papermill and `puzzle run` read them."
    return [text for name, value in values.items() for text in ('-p', name, str(value))]


def puzzle(*args, cwd=None, **env):
    "Run `puzzle ARGS` to its end; the result has `returncode`, `stdout` and `stderr`."
    cmd = [PUZZLE, *map(str, args)]
    return subprocess.run(cmd, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=300)


def assert_one_clear_line(result, word, codes=(1, 2)):
    "The command failed with a single line on stderr, and it says `word`."
    assert result.returncode in codes and word in result.stderr, result.stderr
    assert result.stderr.count('\n') == 1, result.stderr


def start(cmd, runs, cwd=None):
    "Begin a process whose runs go into the folder `runs`; stderr joins stdout."
    env = os.environ | dict(PUZZLE_RUNS=str(runs), OMP_NUM_THREADS='1')
    def heed_ctrl_c():               # it is ignored in what a shell starts in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([str(c) for c in cmd], cwd=cwd, env=env, text=True, preexec_fn=heed_ctrl_c,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process, seconds=900):
    "Wait for a process that must end well; return what it printed."
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, out[-3000:]
    return out


def only_run(runs): # folder that holds a single run of a single system
    return Run(next(p.parent for p in Path(runs).glob('*/*/manifest.json')))


def wait_until(true, process): # a `Popen`, or a child of `start_child`
    "Wait until `true()`, as long as the process lives."
    while not true():
        time.sleep(.02)
        alive = process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()
        assert alive, 'it ended too early'


def killed_and_resumed(system, values, runs, word): # text of metrics.jsonl upon which the run is killed
    "The run of a system that was killed in the middle, then taken up with `puzzle run --resume`."
    process = start([PUZZLE, 'run', system, *as_options(values)], runs)
    run_id = process.stdout.readline().split()[-1]
    log = Path(runs)/system/run_id/'metrics.jsonl'
    wait_until(lambda: log.exists() and word in log.read_text(), process)
    run = only_run(runs)
    os.kill(run.manifest['process']['pid'], signal.SIGKILL)
    process.communicate(timeout=60)
    assert run.status == 'died'
    finish(start([PUZZLE, 'run', system, '--resume', run_id], runs))
    return run


def measured(run):
    "The run's metrics without those that a clock decides."
    clocks = ('rate', 'speed', 'seconds')
    metrics = run.summary['metrics']
    return {name: m['value'] for name, m in metrics.items() if not any(c in name for c in clocks)}


def assert_same_run(run, whole, files=('metrics.jsonl',)):
    "Two runs measured the same and wrote the same bytes."
    assert run.status == 'ok' and measured(run) == measured(whole)
    for name in files:
        assert (run.dir/name).read_bytes() == (whole.dir/name).read_bytes(), name


# Children of a server that has imported torch once: a start takes milliseconds instead of seconds.
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['PIL.Image', 'accelerate', 'psutil', 'pyarrow.parquet', 'safetensors.torch',
                                'torch._dynamo', 'puzzle_research.core.fit', 'puzzle_research.core.runs'])


def _in_child(function, args, env):
    os.environ.update(env)
    os.fsync = lambda fd: None       # nobody pulls the plug, and a busy disk is slow to flush
    torch.set_num_threads(1)
    function(*args)


def start_child(function, *args, **env): # a function of a test file, what it is given, environment variables
    "Begin `function(*args)` in a process of its own."
    child = CONTEXT.Process(target=_in_child, args=(function, args, env), daemon=True)
    child.start()
    return child


def finish_child(child, seconds=300):
    "Wait for a child that must end well."
    child.join(seconds)
    assert child.exitcode == 0, f'exit code {child.exitcode}'


def trained_together(function, *args, processes=2):
    "Call `function(*args)` in several processes that train together on the CPU, as torchrun starts them."
    with socket.create_server(('127.0.0.1', 0)) as s:
        port = str(s.getsockname()[1])
    env = dict(ACCELERATE_USE_CPU='true', MASTER_ADDR='127.0.0.1', MASTER_PORT=port,
               WORLD_SIZE=str(processes))
    alone = dict(ACCELERATE_USE_CPU='true')
    ranks = [env | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]
    envs = ranks if processes > 1 else [alone]
    for child in [start_child(function, *args, **each) for each in envs]:
        finish_child(child)


def heavy_imports(code, names=('torch', 'numpy', 'pandas', 'matplotlib', 'datasets', 'papermill')):
    "Which of the heavy packages a fresh Python has loaded after `code`, and what it printed."
    code += f'\nimport sys\nprint("HEAVY", [name for name in {names!r} if name in sys.modules])'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    printed, _, heavy = result.stdout.rpartition('HEAVY ')
    assert heavy, result.stderr
    return eval(heavy), printed


def png(k, kind='png', size=32): # number of the picture
    "A picture of noise as the bytes of a file."
    out = io.BytesIO()
    noise = np.random.RandomState(k).randint(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(noise).save(out, kind, **(dict(lossless=True) if kind == 'webp' else {}))
    return out.getvalue()


def pixels(file): # bytes of a picture
    return np.asarray(Image.open(io.BytesIO(file))).transpose(2, 0, 1)


def write_pictures(folder, files, split='train', columns=('img', 'label')):
    "Parquet in the layout of the hub's CIFAR-10."
    image, label = columns
    rows = [{image: dict(bytes=b, path=f'{k}.png'), label: k % 10} for k, b in enumerate(files)]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder/f'{split}.parquet', row_group_size=100)
    return folder/f'{split}.parquet'


def load_tool(name): # a script in tools/
    spec = importlib.util.spec_from_file_location(name, root()/'tools'/f'{name}.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def text(B=2, T=40, seed=1): # (B, T) tokens below 40
    "Token rows for the models of language."
    return torch.randint(40, (B, T), generator=torch.Generator().manual_seed(seed))


def with_another_token(t, at): # (B, T)
    "The rows with the token at `at` changed."
    changed = t.clone()
    changed[:, at] = (changed[:, at] + 1) % 40
    return changed


def wandb_rows(folder):
    "What the offline file of wandb holds: a LevelDB log of protocol buffers behind a head of 7 bytes."
    from wandb.proto import wandb_internal_pb2
    file, = folder.glob('wandb/offline-run-*/*.wandb')
    data, at, whole, rows = file.read_bytes(), 7, b'', []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4:at + 6], 'little'), data[at + 6]
        whole, at = whole + data[at + 7:at + 7 + size], at + 7 + size
        if kind not in (1, 4):                      # a record in several parts, and not the last of them
            continue
        record, whole = wandb_internal_pb2.Record.FromString(whole), b''
        if record.HasField('history'):
            items = record.history.item
            rows.append({i.key or '.'.join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows
