"The `puzzle` command. Heavy imports stay inside the commands, so that help answers at once."
import json, os, signal, sys, time
from pathlib import Path
from typing import Annotated, Optional

import typer

from puzzle_research.core.params import (from_text, nearest, notebook_of, notebook_parameters, root,
                                         system_of)

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help='Train, report and use the puzzle codecs and models. Notebooks in nbs/ are the source of truth.')
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None,
                       help='Data sets: what is known, what is found, what is whole.')
app.add_typer(data_app, name='data')


class Usage(Exception):
    "Something typed that cannot be: one line, exit 2."


def _argument(text): return typer.Argument(help=text)
def _option(*names, **kwargs): return typer.Option(*names, **kwargs)


# Running a notebook

def _notebook(name) -> Path:
    "A path, or a system's name or number: `01_vision_puzzle`, `vision_puzzle`, `01`, `lm_mugrokfast`."
    for path in (Path(name), notebook_of(name)):
        if path.is_file():
            return path.resolve()
    known, stem = sorted((root()/'nbs').glob('[0-9]*_*.ipynb')), Path(name).stem
    for path in known:
        if stem in (path.stem, *path.stem.split('_', 1)):
            return path
    raise Usage(nearest(stem, [p.stem for p in known], 'notebook'))


def _values(path, given) -> dict: # `given`: name=value texts
    "Values of parameters, typed by the notebook's parameters cell."
    known, values = notebook_parameters(path), {}
    for text in given:
        name, equals, value = text.partition('=')
        if not equals:
            raise Usage(f'-p {name}: expected a name and a value, as in `-p seed 7`')
        if name not in known:
            raise Usage(nearest(name, list(known)))
        values[name] = from_text(known[name], value)
    return values


def _run_folder(system, values, resume) -> Path:
    "Of the run to begin, whose id the kernel takes from the environment, or of the one to take up."
    from puzzle_research.core.runs import Run, new_id, runs_folder
    name = resume or values.get('run')
    if name:
        values['run'] = Run.open(name).id
    run_id = values.get('run') or new_id()
    if not name:
        os.environ['PUZZLE_RUN_ID'] = run_id
    return runs_folder()/system/run_id


class _Bar:
    "Progress on a terminal."
    def __init__(self): self.stage, self.bar = None, None

    def show(self, now):
        from tqdm import tqdm
        if now['stage'] != self.stage:
            self.close()
            self.stage = now['stage']
            self.bar = tqdm(total=now['steps'], initial=now['step'], desc=self.stage, unit='step')
        self.bar.update(now['step'] - self.bar.n)
        self.bar.set_postfix_str(f"loss {float(now['loss']):.4g}")

    def close(self):
        if self.bar:
            self.bar.close()


class _Lines:
    "Progress where lines pile up: one in ten seconds."
    def __init__(self): self.said, self.last = time.monotonic(), None

    def show(self, now):
        if time.monotonic() - self.said > 10 and now != self.last:
            self.said, self.last = time.monotonic(), now
            loss = float(now['loss'])
            print(f"{now['stage']} {now['step']}/{now['steps']} loss {loss:.4g}", file=sys.stderr, flush=True)

    def close(self): pass


def _follow(run_dir, done):
    "Show the progress of a run in another process until `done()`."
    from puzzle_research.core.watch import read_progress
    progress = _Bar() if sys.stderr.isatty() else _Lines()
    while not done():
        time.sleep(.3)
        now = read_progress(run_dir)
        if now:
            progress.show(now)
    progress.close()


def _interrupt(run_dir):
    "Pass Ctrl-C on to the run's kernel, which then writes how it ended."
    try:
        manifest = json.loads((run_dir/'manifest.json').read_text())
        os.kill(manifest['process']['pid'], signal.SIGINT)
    except OSError:
        pass


def _execute(path, out, values, run_dir):
    "papermill in a thread, the progress in this one. Returns the notebook's error, or None."
    import threading, warnings
    warnings.filterwarnings('ignore')
    import papermill
    errors = []
    def work():
        try:
            papermill.execute_notebook(
                str(path), str(out), values, progress_bar=False, cwd=str(root()), kernel_name='python3',
                extra_arguments=['--IPKernelApp.log_level=ERROR'])
        except Exception as e:
            errors.append(e)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        _follow(run_dir, lambda: not thread.is_alive())
    except KeyboardInterrupt:
        _interrupt(run_dir)
        thread.join(30)
        raise
    thread.join()
    return errors[0] if errors else None


def _failure(error, begun) -> Exception:
    "What to raise for a notebook's error: a value that its Config refused before a run began is bad usage."
    name, text = getattr(error, 'ename', type(error).__name__), getattr(error, 'evalue', error)
    return Usage(text) if name == 'ValueError' and not begun else RuntimeError(f'{name}: {text}')


def _print_outcome(run_dir):
    from puzzle_research.core.report import result_table
    from puzzle_research.core.runs import Run
    r, folder = Run(run_dir), os.path.relpath(run_dir)
    m = r.manifest
    print(f'\n{result_table(r.summary)}')
    print(f"\nstatus {r.status}, {m['seconds']:.0f} s, peak memory {m['peak_memory_mb']} MB")
    print(f'report  {folder}/report.md\nfigures {folder}/figures/')


@app.command()
def run(
    notebook:Annotated[str, _argument('Notebook path, or a system name such as 01_vision_puzzle.')],
    param:Annotated[list[str], _option('-p', '--param', metavar='NAME VALUE',
                                       help='Set a parameter; repeatable: -p budget full -p seed 1.')] = [],
    resume:Annotated[Optional[str], _option(metavar='RUN', help='Take up a run that died or was interrupted;'
                                                                ' a finished one is analysed again.')] = None,
    out:Annotated[Optional[Path], _option(metavar='FILE', help='Executed notebook to write.')] = None,
):
    """Execute a notebook with parameters: train, diagnose, report.

    The run's folder is reports/runs/SYSTEM/RUN. Plain `papermill NOTEBOOK OUT -p NAME VALUE` does the same.

    Examples: puzzle run 01_vision_puzzle | puzzle run nbs/01_vision_puzzle.ipynb -p budget full -p seed 1 |
    puzzle run 01 --resume 20260102-1430
    """
    import shutil, tempfile
    path = _notebook(notebook)
    values = _values(path, param)
    run_dir = _run_folder(system_of(path), values, resume)
    print(f'{system_of(path)}: run {run_dir.name}', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder)/'notebook.ipynb'
        error = _execute(path, executed, values, run_dir)
        begun = (run_dir/'manifest.json').exists()
        if executed.exists() and begun:
            shutil.copy(executed, run_dir/'notebook.ipynb')
        if executed.exists() and out:
            shutil.copy(executed, out)
    if error:
        raise _failure(error, begun)
    _print_outcome(run_dir)


# Looking at runs

@app.command()
def runs(
    system:Annotated[Optional[str], _argument('Only this system.')] = None,
    last:Annotated[int, _option(help='How many, newest last.')] = 20,
):
    "List runs: id, status, recipe, budget, seed, seconds, and how each ended."
    from puzzle_research.core.runs import Run, runs_folder
    name = system_of(_notebook(system)) if system else '*'
    manifests = runs_folder().glob(f'{name}/*/manifest.json')
    folders = sorted((p.parent for p in manifests), key=lambda p: p.name)
    if not folders:
        print('no runs yet; start one with `puzzle run 01_vision_puzzle`')
    for r in map(Run, folders[-last:]):
        m = r.manifest
        mode = f"{m['recipe'] or '':6} {m['budget'] or '':6} seed {m['seed']}"
        line = f"{r.system:20} {r.id:22} {r.status:11} {mode} {m['seconds']:7.0f} s  {m['error'] or ''}"
        print(line[:160])


def _print_data(d):
    print(f"data    {d['name']}/{d['split']}: {d['rows']} rows, {d['origin']}, {len(d['dropped'])} left out, "
          f"sha256 {d['sha256'][:12]}")


@app.command()
def show(run:Annotated[str, _argument('A run id, or the start of one.')]):
    "Show a run: how it stands, what differs from the defaults, data, events, results."
    from puzzle_research.core.report import result_table
    from puzzle_research.core.runs import Run
    r = Run.open(run)
    m = r.manifest
    print(f'{r.system}/{r.id}  {r.status}')
    print(f"start {m['start']}  end {m['end']}  {m['seconds']} s  {m['threads']} threads  {m['device']}")
    print('changed', ' '.join(f'{k}={v!r}' for k, v in m['changed'].items()) or 'nothing')
    for d in m['data']:
        _print_data(d)
    for e in r.events:
        print(f"event   {e['time']} {e['kind']}: {e['message']}")
    if m['error']:
        print(f"error   {m['error']}")
    if (r.dir/'summary.json').exists():
        print(f'\n{result_table(r.summary)}')
    print(f'\nfolder  {os.path.relpath(r.dir)}')


@app.command()
def watch(
    run:Annotated[str, _argument('A run id, the start of one, or the folder of a run.')],
    every:Annotated[float, _option(help='Seconds between two looks.', min=.2)] = 2.,
    once:Annotated[bool, _option('--once', help='Show the state once and return.')] = False,
):
    """Show the live state of a run: losses, codes in use, ranks, alerts. Ctrl-C ends the watching only.

    Reads the files of the run only: it may run elsewhere, started by papermill, JupyterLab or `puzzle run`.
    """
    from puzzle_research.core.runs import Run
    from puzzle_research.core.watch import live
    r = Run.open(run)
    try:
        while True:
            text = live(r)
            if sys.stdout.isatty() and not once:
                print('\033[H\033[2J', end='')
            print(text, flush=True)
            if once or r.status != 'running':
                return
            time.sleep(every)
    except KeyboardInterrupt:
        return


@app.command()
def publish(run:Annotated[list[str], _argument('One run, or several that differ only in their seed.')]):
    "Copy the summary, figures and report of finished runs into reports/ and figures/, and renew the board."
    from puzzle_research.core.publish import publish as publish_runs
    from puzzle_research.core.runs import Run
    print(os.path.relpath(publish_runs([Run.open(r).dir for r in run])))


# Adding to the bench

@app.command()
def new(
    kind:Annotated[str, _argument('system or codec.')],
    name:Annotated[str, _argument('Of its module, such as word_puzzle.')],
):
    "Write a small working notebook to begin with: `puzzle new system NAME`, `puzzle new codec NAME`."
    from puzzle_research.core.scaffold import new_notebook
    path = new_notebook(kind, name)
    shown = os.path.relpath(path)
    print(f'{shown}\ntrain  puzzle run {path.stem}\ntest   nbdev_test --path {shown}')


# Data

@data_app.command('list')
def data_list():
    "Every data set the bench knows: what it is, its licence, where it was found."
    from puzzle_research.core.data import SOURCES, find
    for name, source in SOURCES.items():
        found = [split for split in source.splits if find(name, split)]
        print(f"{name:31} {', '.join(found) or 'not found':28} {source.licence}")


@data_app.command('check')
def data_check(name:Annotated[Optional[str], _argument('Only this data set.')] = None):
    "Read every split found, whole: rows, fingerprint, broken items. Exit 1 where something is broken."
    from puzzle_research.core.data import check
    lines, empty = check(name), dict(split='', rows='', broken=0, listed=0, sha256='')
    for line in lines:
        print('{name:31} {split:16} {rows:>7} rows  {broken} broken  {listed} listed  {sha256:12}  {status}'
              .format(**empty | line))
    if not all(line['status'].startswith(('ok', 'not found')) for line in lines):
        raise typer.Exit(1)


@data_app.command('fetch')
def data_fetch(name:Annotated[str, _argument('Data set to fetch.')]):
    "Download a data set from the hub into data/, as Parquet. Needs the network."
    from puzzle_research.core.data import fetch
    print(fetch(name))


@app.command()
def doctor():
    "What this bench stands on: versions, device, threads, disk, data found."
    import shutil, torch
    from puzzle_research.core.data import SOURCES, find
    from puzzle_research.core.device import pick_device
    from puzzle_research.core.provenance import git_state, versions
    git = git_state()
    have = [name for name, s in SOURCES.items() if any(find(name, split) for split in s.splits)]
    lines = {name: version or 'MISSING' for name, version in versions().items()} | {
        'commit': f"{git['commit']}{' (dirty)' if git['dirty'] else ''}",
        'device': f'{pick_device()}   threads {torch.get_num_threads()} of {os.cpu_count()} cores',
        'disk free': f'{shutil.disk_usage(root()).free/2**30:.1f} GiB',
        'data': ', '.join(have) or 'none found; set PUZZLE_DATA or run `puzzle data fetch NAME`',
    }
    for name, text in lines.items():
        print(f'{name:18} {text}')


# Codecs

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
    file:Annotated[Path, _argument('A picture (.png, .jpg), a sound (.wav, .flac, .ogg), a text (.txt).')],
    out:Annotated[Optional[Path], _option('-o', '--out', metavar='FILE',
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
    file:Annotated[Path, _argument('A puzzle file made by `puzzle encode`.')],
    out:Annotated[Optional[Path], _option('-o', '--out', metavar='FILE',
                                          help='File to write; default FILE.decoded with the first ending '
                                               'of its kind (.png, .wav).')] = None,
):
    "Turn a puzzle file back into what it was, from its digits alone."
    _must_exist(file)
    out = out or _decoded_name(file)
    _codec(out).decode_file(file, out)
    print(out)


# The entry point

def join_params(argv:list) -> list:
    "`-p NAME VALUE`, as papermill has it, into the `-p NAME=VALUE` that Typer can read."
    joined, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        joined.append(word)
        if word in ('-p', '--param') and len(rest) > 1 and '=' not in rest[0] and rest[1] != '-p':
            joined.append(f'{rest.pop(0)}={rest.pop(0)}')
    return joined


def _told(error) -> int: # exit code
    "Say an error in one line: bad usage is exit 2, a failure exit 1."
    if os.environ.get('PUZZLE_DEBUG'):
        raise error
    of_typer = hasattr(error, 'format_message')
    text = error.format_message() if of_typer else str(error)
    print(f"puzzle: {' '.join(text.split())}", file=sys.stderr)
    return 2 if of_typer or isinstance(error, Usage) or type(error) is ValueError else 1


def main():
    "Run the command line."
    command, argv = typer.main.get_command(app), join_params(sys.argv[1:])
    if not argv or argv == ['data']:
        argv.append('--help')
    try:
        code = command.main(argv, prog_name='puzzle', standalone_mode=False)
    except KeyboardInterrupt:
        code = 130                   # Typer's own number for Ctrl-C
    except Exception as e:
        code = _told(e)
    if code == 130:
        print('puzzle: interrupted; go on with `puzzle run NOTEBOOK --resume RUN`', file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == '__main__':
    main()
