"Runs and reports: `puzzle runs`, `show`, `watch`, `publish`."
import contextlib, os, sys, time
from typing import Annotated, Optional

from puzzle_research.core.params import system_of

from .app import app, argument, option
from .running import notebook_path


@contextlib.contextmanager
def _naming(run):
    "An entry that a manifest lacks, or one of another type, as an error that names the run and the file."
    try:
        yield
    except (KeyError, TypeError, AttributeError) as e:
        why = f'lacks {e}' if isinstance(e, KeyError) else f'is not as a run writes it: {e}'
        raise ValueError(f'{run.system}/{run.id}/manifest.json {why}') from e


def _how_it_stands(run) -> str:
    "Status, mode, seconds and error of a run; that it cannot be read, and why."
    try:
        with _naming(run):
            m = run.manifest
            mode = f"{m['recipe'] or '':6} {m['budget'] or '':6} seed {m['seed']}"
            return f"{run.status:11} {mode} {m['seconds']:7.0f} s  {m['error'] or ''}"
    except (ValueError, OSError) as e:
        return f'unreadable  {e}'


@app.command()
def runs(
    system:Annotated[Optional[str], argument('Only this system.')] = None,
    last:Annotated[int, option(help='How many, newest last.')] = 20,
):
    "List runs: id, status, recipe, budget, seed, seconds, and how each ended."
    from puzzle_research.core.runs import Run, runs_folder
    name = system_of(notebook_path(system)) if system else '*'
    manifests = runs_folder().glob(f'{name}/*/manifest.json')
    folders = sorted((p.parent for p in manifests), key=lambda p: p.name)
    if not folders:
        print('no runs yet; start one with `puzzle run 01_vision_puzzle`')
    for r in map(Run, folders[-last:]):
        print(f'{r.system:20} {r.id:22} {_how_it_stands(r)}'[:160])


def _print_data(d):
    print(f"data    {d['name']}/{d['split']}: {d['rows']} rows, {d['origin']}, {len(d['dropped'])} left out, "
          f"sha256 {d['sha256'][:12]}")


@app.command()
def show(run:Annotated[str, argument('A run id, or the start of one.')]):
    "Show a run: how it stands, what differs from the defaults, data, events, results."
    from puzzle_research.core.report import result_table
    from puzzle_research.core.runs import Run
    r = Run.open(run)
    with _naming(r):
        _print_run(r)
    if (r.dir/'summary.json').exists():
        print(f'\n{result_table(r.summary)}')
    print(f'\nfolder  {os.path.relpath(r.dir)}')


def _print_run(r):
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


@app.command()
def watch(
    run:Annotated[str, argument('A run id, the start of one, or the folder of a run.')],
    every:Annotated[float, option(help='Seconds between two looks.', min=.2)] = 2.,
    once:Annotated[bool, option('--once', help='Show the state once and return.')] = False,
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
def publish(run:Annotated[list[str], argument('One run, or several that differ only in their seed.')]):
    "Copy the summary, figures and report of finished runs into reports/ and figures/, and renew the board."
    from puzzle_research.core.publish import publish as publish_runs
    from puzzle_research.core.runs import Run
    print(os.path.relpath(publish_runs([Run.open(r).dir for r in run])))
