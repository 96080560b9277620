"Many runs: `puzzle sweep`, `puzzle search`, `puzzle compare`."
import os, signal
from pathlib import Path
from typing import Annotated, Optional

import typer

from .app import (Interrupted, Usage, app, argument, complete_notebooks, complete_runs, option,
                  print_table)
from .running import named, notebook_path, tell, values_of


def _as_ctrl_c(signum, frame):
    "A scheduler's SIGTERM ends a sweep as Ctrl-C does: all runs can be taken up."
    raise KeyboardInterrupt


def _engine(kind, scheduler):
    "What makes the engine that is asked for."
    from puzzle_research.core.params import nearest
    if kind not in ('local', 'dask'):
        raise Usage(nearest(kind, ['local', 'dask'], 'engine'))
    if scheduler and kind == 'local':
        raise Usage('--scheduler is for --engine dask; give both')
    if kind == 'local':
        from puzzle_research.core.sweeping import local_engine
        return local_engine
    from puzzle_research.core.cluster import cluster_engine
    return cluster_engine(scheduler)


@app.command()
def sweep(
    notebook:Annotated[str, argument('Notebook path, or a system name such as 05_ternary_vae.',
                                     complete_notebooks)],
    param:Annotated[list[str], option('-p', '--param', metavar='NAME VALUES',
                                      help='A list (0.1,0.2) or a range (0:3) of values; repeatable.')] = [],
    jobs:Annotated[Optional[int], option(help='Runs at a time; default one, or one a GPU.')] = None,
    name:Annotated[str, option(help='Name of the sweep; default made from the system and the grid.')] = '',
    engine:Annotated[str, option(help='local, or dask: a pool here, or a cluster.')] = 'local',
    scheduler:Annotated[str, option(metavar='ADDRESS', help='Of Dask, such as tcp://host:8786.')] = '',
    track:Annotated[str, option(metavar='NAMES', help='As of `puzzle run`; local engine.')] = '',
):
    """Run every point of a grid. Finished points are kept, what died is taken up; Ctrl-C loses nothing.

    Example: puzzle sweep 05_ternary_vae -p budget test -p rate 0.02,0.05 -p seed 0:3 --jobs 2
    """
    from puzzle_research.core.points import given_once
    from puzzle_research.core.sweeping import run_sweep
    signal.signal(signal.SIGTERM, _as_ctrl_c)
    tell(track)
    try:
        points = run_sweep(notebook_path(notebook), given_once(named(param)), jobs, name,
                           _engine(engine, scheduler))
    except KeyboardInterrupt:
        raise Interrupted('interrupted; the same command goes on where it stopped') from None
    _told(points)


def _told(points):
    "Print how a sweep ended. What keeps it from going on is an error."
    from puzzle_research.core.sweep import halts, tally
    print(tally(points))
    for point in points:
        if point.status == 'refused':
            raise Usage(point.error)
        if halts(point):
            asked = '' if 'free some space' in point.error else '; free some space'
            raise OSError(f'{point.error}{asked}; then the same command goes on')
    if not all(p.status in ('ok', 'kept') for p in points):
        raise typer.Exit(1)


@app.command()
def search(
    notebook:Annotated[str, argument('Notebook path, or a system name such as 05_ternary_vae.',
                                     complete_notebooks)],
    space:Annotated[Path, option(metavar='FILE', help='TOML: rate = {low = 1e-3, high = 1, log = true}')],
    metric:Annotated[str, option(metavar='NAME', help='Of the summary, to be made best.')],
    param:Annotated[list[str], option('-p', '--param', metavar='NAME VALUE',
                                      help='A parameter of every run; repeatable.')] = [],
    trials:Annotated[int, option(help='Runs in all, with those of earlier searches of the name.')] = 20,
    jobs:Annotated[Optional[int], option(help='Runs at a time; default one, or one a GPU.')] = None,
    direction:Annotated[str, option(help='min or max; default as earlier runs measured it.')] = '',
    prune:Annotated[str, option(metavar='NAME', help='Logged metric that ends a trial early.')] = '',
    name:Annotated[str, option(help='Of the search, to go on with; default made from the system.')] = '',
):
    """Search parameters with Optuna: every trial is a run, the worse ones end early, the journal goes on.

    Example: puzzle search 05_ternary_vae --space space.toml --metric gap -p budget test --trials 30 --jobs 2
    """
    from puzzle_research.core.params import notebook_parameters
    from puzzle_research.core.search import run_search, trials_frame, write_search
    from puzzle_research.core.space import read_space
    signal.signal(signal.SIGTERM, _as_ctrl_c)
    path = notebook_path(notebook)
    fixed, found = values_of(path, param), read_space(space, notebook_parameters(path))
    try:
        study, name = run_search(path, found, metric, fixed, trials, jobs, name, direction, prune)
    except KeyboardInterrupt:
        raise Interrupted('interrupted; the same command goes on where it stopped') from None
    best_first = trials_frame(study).sort_values('value', ascending=study.direction.name == 'MINIMIZE')
    print(best_first.head(10).to_string(index=False))
    print(os.path.relpath(write_search(study, name, metric)))


@app.command()
def compare(
    run:Annotated[list[str], argument('Runs, or the name of a sweep.', complete_runs)],
    metric:Annotated[list[str], option(metavar='NAME', help='Of the summary; repeatable.')] = [],
    curve:Annotated[str, option(metavar='NAME', help='Logged metric to draw.')] = '',
    out:Annotated[Optional[Path], option('-o', '--out', metavar='FOLDER',
                                         help='Write compare.md and curves.png there.')] = None,
):
    """What differs between runs, n, mean and spread of their metrics, and a paired test where seeds match.

    Example: puzzle compare 05_ternary_vae-3fa2c1 --metric gap --out /tmp/compared
    """
    from puzzle_research.core import compare as c
    for table in c.tables(run, metric):
        print_table(table)
        print()
    print(*c.caveats(run), sep='\n')
    if out:
        out.mkdir(parents=True, exist_ok=True)
        c.curves(run, curve).savefig(out/'curves.png', dpi=110, bbox_inches='tight')
        (out/'compare.md').write_text(f'{c.compare_text(run, metric)}\n\n![curves](curves.png)\n')
        print(os.path.relpath(out/'compare.md'))
