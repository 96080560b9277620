"`puzzle run`: a notebook executed with parameters in a process of its own, and its progress shown."
import json, os, signal, sys, time
from pathlib import Path
from typing import Annotated, Optional

from puzzle_research.core.params import (from_text, nearest, notebook_of, notebook_parameters, root,
                                         system_of)
from puzzle_research.core.points import given_once

from .app import Usage, app, argument, complete_notebooks, option


def notebook_path(name) -> Path:
    "A path, or a system's name or number: `01_vision_puzzle`, `vision_puzzle`, `01`, `lm_mugrokfast`."
    for path in (Path(name), notebook_of(name)):
        if path.is_file():
            return path.resolve()
    known, stem = sorted((root()/'nbs').glob('[0-9]*_*.ipynb')), Path(name).stem
    for path in known:
        if stem in (path.stem, *path.stem.split('_', 1)):
            return path
    raise Usage(nearest(stem, [p.stem for p in known], 'notebook'))


def named(given) -> list: # `given`: name=value texts
    "Parameters as they were typed: (name, text) each."
    pairs = [text.partition('=') for text in given]
    for name, equals, _ in pairs:
        if not equals:
            raise Usage(f'-p {name}: expected a name and a value, as in `-p seed 7`')
    return [(name, value) for name, _, value in pairs]


def _values(path, given) -> dict: # `given`: name=value texts
    "Values of parameters, typed by the notebook's parameters cell."
    known, texts = notebook_parameters(path), given_once(named(given))
    for name in texts:
        if name not in known:
            raise Usage(nearest(name, list(known)))
    return {name: from_text(known[name], text) for name, text in texts.items()}


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
    notebook:Annotated[str, argument('Notebook path, or a system name such as 01_vision_puzzle.',
                                     complete_notebooks)],
    param:Annotated[list[str], option('-p', '--param', metavar='NAME VALUE',
                                       help='Set a parameter; repeatable: -p budget full -p seed 1.')] = [],
    resume:Annotated[Optional[str], option(metavar='RUN', help='Take up a run that died or was interrupted;'
                                                                ' a finished one is analysed again.')] = None,
    out:Annotated[Optional[Path], option(metavar='FILE', help='Executed notebook to write.')] = None,
):
    """Execute a notebook with parameters: train, diagnose, report.

    The run's folder is reports/runs/SYSTEM/RUN. Plain `papermill NOTEBOOK OUT -p NAME VALUE` does the same.

    Examples: puzzle run 01_vision_puzzle | puzzle run nbs/01_vision_puzzle.ipynb -p budget full -p seed 1 |
    puzzle run 01 --resume 20260102-1430
    """
    import shutil, tempfile
    path = notebook_path(notebook)
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
