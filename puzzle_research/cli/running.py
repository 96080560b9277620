"`puzzle run`: a notebook executed with parameters in a process of its own, and its progress shown."
import contextlib, os, shutil, signal, sys, tempfile, time
from pathlib import Path
from typing import Annotated, Optional

import typer

from puzzle_research.core.params import (carried, from_text, nearest, notebook_of, notebook_parameters,
                                         notebooks_folder, root, system_of)
from puzzle_research.core.points import given_once

from .app import Usage, app, argument, complete_notebooks, name_columns, option


def notebook_path(name) -> Path:
    "A path, or a system's name or number: `01_vision_puzzle`, `vision_puzzle`, `01`, `lm_mugrokfast`."
    for path in (Path(name), notebook_of(name)):
        if path.is_file():
            return path.resolve()
    known, stem = sorted(notebooks_folder().glob('[0-9]*_*.ipynb')), Path(name).stem
    if not known:
        raise Usage(f'no notebooks in {root()}, and the package brought none; get the repository, or install '
                    'a wheel that was built from it')
    for path in known:
        if stem in (path.stem, *path.stem.split('_', 1)):
            return path
    raise Usage(nearest(stem, [p.stem for p in known], 'notebook'))


def _bring_published(path):
    "What the notebook of a wheel opens with, where there is no project: its published numbers."
    system = path.stem
    source = carried('reports')/'summaries'/f'{system}.json'
    place = root()/'reports'/'summaries'/source.name
    if path.is_relative_to(carried('nbs').resolve()) and source.exists() and not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(source.read_bytes())


def named(given) -> list: # `given`: name=value texts
    "Parameters as they were typed: (name, text) each."
    pairs = [text.partition('=') for text in given]
    for name, equals, _ in pairs:
        if not equals:
            raise Usage(f'-p {name}: expected a name and a value, as in `-p seed 7`')
    return [(name, value) for name, _, value in pairs]


def values_of(path, given) -> dict: # `given`: name=value texts
    "Values of parameters, typed by the notebook's parameters cell."
    known, texts = notebook_parameters(path), given_once(named(given))
    for name in texts:
        if name not in known:
            raise Usage(nearest(name, list(known)))
    return {name: from_text(known[name], text) for name, text in texts.items()}


def tell(names):
    "Have this process and those below it tell trackers what they log."
    from puzzle_research.core.trackers import asked_for
    if names:
        os.environ['PUZZLE_TRACK'] = ','.join(asked_for(names))


def _run_folder(system, values, resume) -> Path:
    "Of the run to begin, whose id the kernel takes from the environment, or of the one to take up."
    from puzzle_research.core.locks import held
    from puzzle_research.core.runs import Run, new_id, runs_folder
    name = resume or values.get('run')
    if name:
        taken_up = Run.open(name)
        values['run'] = taken_up.id
        with held(taken_up.dir/'.lock', f'run {taken_up.id}', wait=3.):
            for what in taken_up.altered():
                print(f'puzzle: run {taken_up.id}: {what}', file=sys.stderr)
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


def _end_with_parent():
    "A worker of a cluster that is killed must not leave a training behind: PUZZLE_END_WITH is its id."
    parent = os.environ.get('PUZZLE_END_WITH')
    if parent and os.getppid() != int(parent):
        raise KeyboardInterrupt


def _follow(run_dir, done):
    "Show the progress of a run in another process until `done()`."
    from puzzle_research.core.watch import read_progress
    progress = _Bar() if sys.stderr.isatty() else _Lines()
    while not done():
        time.sleep(.3)
        _end_with_parent()
        now = read_progress(run_dir)
        if now:
            progress.show(now)
    progress.close()


def _kernels() -> list: # of psutil.Process
    "The kernels that this process has started."
    import psutil
    found = []
    for p in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found += [p] if any('ipykernel' in word for word in p.cmdline()) else []
    return found


# Seconds after the first Ctrl-C -> what the kernel is sent. It ignores a SIGINT that comes between two cells,
# so it is asked again; a loop that trains finishes its step and writes a checkpoint before it obeys.
ESCALATION = {0: signal.SIGINT, 1: signal.SIGINT, 2: signal.SIGINT, 4: signal.SIGINT, 6: signal.SIGINT,
              7: signal.SIGTERM, 8.5: signal.SIGKILL}


def _end_kernel(alive, seconds=9.5):
    "Pass Ctrl-C on until the kernel has ended, harder and harder."
    import psutil
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)            # this process ends soon, and truthfully
    began, due = time.monotonic(), list(ESCALATION.items())
    while alive() and time.monotonic() - began < seconds:
        while due and time.monotonic() - began >= due[0][0]:
            for kernel in _kernels():
                with contextlib.suppress(psutil.Error):
                    kernel.send_signal(due[0][1])
            due.pop(0)
        time.sleep(.1)


def _say_interrupted(run_dir):
    "Where the kernel could not: the run's manifest says how it ended."
    from puzzle_research.core.runs import Run, now
    run = Run(run_dir)
    if (run_dir/'manifest.json').exists() and run.incomplete():
        run.update(status='interrupted', end=now(), error='interrupted before it was complete')


class _Stopped(KeyboardInterrupt):
    "SIGTERM, as schedulers send it."


def _stop(number, frame):
    raise _Stopped


@contextlib.contextmanager
def _heeding_schedulers():
    "Inside the block SIGTERM ends this command as Ctrl-C does, with exit code 143."
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except _Stopped:
        raise typer.Exit(143) from None


def _execute(path, out, values, run_dir):
    "papermill in a thread, the progress in this one. Returns the notebook's error, or None."
    import threading, warnings
    warnings.filterwarnings('ignore')
    sys.modules.setdefault('rfc3987_syntax', None)  # compiles a grammar for two seconds; no notebook needs it
    import papermill
    errors = []
    def work():
        try:
            papermill.execute_notebook(
                str(path), str(out), values, progress_bar=False, cwd=str(root()), kernel_name='python3',
                extra_arguments=['--IPKernelApp.log_level=CRITICAL'])
        except Exception as e:
            errors.append(e)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        _follow(run_dir, lambda: not thread.is_alive())
    except KeyboardInterrupt:
        _end_kernel(thread.is_alive)
        if not thread.is_alive() and not errors:
            return None                                  # it had come to its end
        _say_interrupted(run_dir)
        raise
    thread.join()
    return errors[0] if errors else None


def _on_cpu(values, resume) -> bool:
    "Is the device of the run fixed to the CPU?"
    from puzzle_research.core.runs import Run
    name = resume or values.get('run')
    return (Run.open(name).config if name else values).get('device') == 'cpu'


def _check_launch(path, processes, values, resume):
    from puzzle_research.core.launch import check_launch
    check_launch(path, processes, _on_cpu(values, resume))


def _launch_failed(run_dir, why):
    "The run's manifest says it too; an abort has said it better."
    from puzzle_research.core.runs import Run
    run = Run(run_dir)
    if not (run_dir/'manifest.json').exists():
        return RuntimeError(why)
    if run.status != 'aborted':
        run.update(status='failed', error=why)
    return RuntimeError(f'{why}; puzzle run {run.system} --resume {run.id} takes it up')


def _train_together(path, values, processes, run_dir):
    "Have several processes train a run. Raises RuntimeError where one of them ends badly."
    from puzzle_research.core.launch import failure, launch, stop
    os.environ.pop('PUZZLE_RUN_ID', None)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder)/'launch.log'
        launched = launch(system_of(path), values, processes, _on_cpu(values, None), run_dir.name, folder)
        try:
            _follow(run_dir, lambda: launched.poll() is not None)
        except KeyboardInterrupt:
            stop(launched)
            _say_interrupted(run_dir)
            raise
        finally:
            if run_dir.is_dir():
                _keep(log, [run_dir/'launch.log'])
        if launched.returncode:
            raise _launch_failed(run_dir, failure(log.read_text(), processes))


def _failure(error, begun) -> Exception:
    "What to raise for a notebook's error: a value that its Config refused before a run began is bad usage."
    name, text = getattr(error, 'ename', type(error).__name__), getattr(error, 'evalue', error)
    if name == 'InUse':
        return RuntimeError(text)
    return Usage(text) if name == 'ValueError' and not begun else RuntimeError(f'{name}: {text}')


def _keep(written, places):
    "Copy the executed notebook, or a log. Where that fails, say so: the run's own error matters more."
    for place in places:
        try:
            shutil.copy(written, place)
        except OSError as e:
            print(f'puzzle: {written.name} could not be copied: {e}', file=sys.stderr)


def _execute_and_keep(path, values, run_dir, out):
    "Execute the notebook; what was executed goes into the run's folder and to `out`."
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder)/'notebook.ipynb'
        error = _execute(path, executed, values, run_dir)
        begun = (run_dir/'manifest.json').exists()
        ours = begun and getattr(error, 'ename', '') != 'InUse'
        if executed.exists():
            _keep(executed, [run_dir/'notebook.ipynb']*ours + [out]*bool(out))
    if error:
        raise _failure(error, begun)


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
    notebook:Annotated[str, argument('Notebook path, or a system name such as 01_vision_puzzle.',
                                     complete_notebooks)],
    param:Annotated[list[str], option('-p', '--param', metavar='NAME VALUE',
                                       help='Set a parameter; repeatable: -p budget full -p seed 1.')] = [],
    resume:Annotated[Optional[str], option(metavar='RUN', help='Take up a run that died or was interrupted;'
                                                                ' a finished one is analysed again.')] = None,
    out:Annotated[Optional[Path], option(metavar='FILE', help='Executed notebook to write.')] = None,
    column:Annotated[list[str], option(metavar='OURS=THEIRS', help='How your data set calls a column.')] = [],
    track:Annotated[str, option(metavar='NAMES', help='Tell tensorboard, wandb or trackio, too.')] = '',
    launch:Annotated[Optional[int], option(metavar='N', help='Processes that train together.')] = None,
):
    """Execute a notebook with parameters: train, diagnose, report.

    The run's folder is reports/runs/SYSTEM/RUN. Plain `papermill NOTEBOOK OUT -p NAME VALUE` does the same.

    Examples: puzzle run 01_vision_puzzle | puzzle run nbs/01_vision_puzzle.ipynb -p budget full -p seed 1 |
    puzzle run 01 --resume 20260102-1430 | puzzle run 04_jepa_vq --launch 8
    """
    with _heeding_schedulers():
        path = notebook_path(notebook)
        _bring_published(path)
        name_columns(column)
        tell(track)
        values = values_of(path, param)
        os.environ['PWD'] = os.getcwd()      # from where a path in `data` begins; the kernel goes elsewhere
        if launch is not None:
            _check_launch(path, launch, values, resume)
        run_dir = _run_folder(system_of(path), values, resume)
        print(f'{system_of(path)}: run {run_dir.name}', flush=True)
        if launch:
            _train_together(path, values, launch, run_dir)
            values = dict(run=run_dir.name)
        _execute_and_keep(path, values, run_dir, out)
    _print_outcome(run_dir)
