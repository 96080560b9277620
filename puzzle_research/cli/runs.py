"Runs and reports: `puzzle runs`, `best`, `show`, `watch`, `publish`, `reports`."
import json, os, sys, time
from typing import Annotated, Optional

import typer

from puzzle_research.core.params import system_of

from .app import app, argument, complete_notebooks, complete_runs, option, print_table
from .running import notebook_path


def _shown(value, width=40) -> str:
    text = f'{value:.5g}' if isinstance(value, float) else '' if value is None else str(value)
    return text if len(text) <= width else text[:width - 1] + '…'


def _print_rows(rows, columns): # heading -> key of a row
    from puzzle_research.core.table import Table
    cells = [[_shown(row.get(key), 90 if key == 'error' else 40) for key in columns.values()] for row in rows]
    keys = columns.values()
    numbers = [i for i, key in enumerate(keys) if any(isinstance(row.get(key), float) for row in rows)]
    print_table(Table(list(columns), cells, right=tuple(numbers)))


SHOWN = {name: name for name in ('system', 'run', 'status', 'recipe', 'budget', 'seed', 'seconds', 'changed')}


@app.command()
def runs(
    system:Annotated[Optional[str], argument('Only this system.', complete_notebooks)] = None,
    last:Annotated[int, option(help='How many, newest or greatest last.', min=1)] = 20,
    metric:Annotated[list[str], option(metavar='NAME', help='Show a metric; repeatable.')] = [],
    sort:Annotated[str, option(metavar='NAME', help='By a column, a metric or a parameter.')] = '',
    recipe:Annotated[str, option(help='Only this one.')] = '',
    budget:Annotated[str, option(help='Only this one.')] = '',
    status:Annotated[str, option(help='Only this one: ok, failed, running, ...')] = '',
    since:Annotated[str, option(help='A date, or a time ago such as 3h or 2d.')] = '',
    as_json:Annotated[bool, option('--json', help='All parameters and metrics, for a program.')] = False,
):
    """List runs: how each stands, what was changed, what was measured.

    Example: puzzle runs 05_ternary_vae --metric exact_sampled --sort exact_sampled --status ok --since 2d
    """
    from puzzle_research.core.frame import ordered, run_rows, select, with_metric
    rows = run_rows(system_of(notebook_path(system)) if system else '*')
    rows = select(rows, since, recipe=recipe, budget=budget, status=status)
    for name in metric:
        with_metric(rows, name)      # one that no run has is an error
    rows = (ordered(rows, sort) if sort else rows)[-last:]
    if as_json:
        print(json.dumps(rows, indent=1))
    elif rows:
        columns = SHOWN | {name: f'metrics.{name}' for name in metric} | dict(error='error')
        _print_rows(rows, columns)
    else:
        print('no such runs; start one with `puzzle run 01_vision_puzzle`')


@app.command()
def best(
    system:Annotated[str, argument('Notebook or system.', complete_notebooks)],
    metric:Annotated[str, option(metavar='NAME', help='Its direction says which way is better.')],
    recipe:Annotated[str, option(help='Only this one.')] = '',
    budget:Annotated[str, option(help='Only this one.')] = '',
    most:Annotated[int, option(help='How many.', min=1)] = 5,
    as_json:Annotated[bool, option('--json', help='All parameters and metrics, for a program.')] = False,
):
    """The finished runs of a system in which a metric is best, with what was changed.

    Example: puzzle best 05_ternary_vae --metric gap --budget full
    """
    from puzzle_research.core.frame import best as best_runs
    rows = best_runs(system_of(notebook_path(system)), metric, most, recipe=recipe, budget=budget)
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        _print_rows(rows, {metric: f'metrics.{metric}'} | SHOWN)


def _open(name):
    "A run by its id, the start of one, its folder, or `last`."
    from puzzle_research.core.frame import newest
    from puzzle_research.core.runs import Run
    return newest() if name == 'last' else Run.open(name)


def _print_data(d):
    print(f"data    {d['name']}/{d['split']}: {d['rows']} rows, {d['origin']}, {len(d['dropped'])} left out, "
          f"sha256 {d['sha256'][:12]}")


@app.command()
def show(run:Annotated[str, argument('A run id, the start of one, or `last`.', complete_runs)]):
    "Show a run: how it stands, what differs from the defaults, data, events, results."
    from puzzle_research.core.files import naming
    from puzzle_research.core.report import result_table
    r = _open(run)
    with naming(r.dir/'manifest.json'):
        _print_run(r)
    if (r.dir/'summary.json').exists():
        with naming(r.dir/'summary.json'):
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
    for what in r.altered():
        print(f'ALTERED {what}')


@app.command()
def watch(
    run:Annotated[str, argument('A run id, the start of one, a folder, or `last`.', complete_runs)],
    every:Annotated[float, option(help='Seconds between two looks.', min=.2)] = 2.,
    once:Annotated[bool, option('--once', help='Show the state once and return.')] = False,
):
    """Show the live state of a run: losses, codes in use, ranks, alerts. Ctrl-C ends the watching only.

    Reads the files of the run only: it may run elsewhere, started by papermill, JupyterLab or `puzzle run`.
    """
    from puzzle_research.core.watch import live
    r = _open(run)
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
def publish(run:Annotated[list[str], argument('One run, or several that differ only in their seed.',
                                                   complete_runs)],
    force:Annotated[bool, option('--force', help='Also where the published report has a higher budget, more '
                                                 'seeds, or real data.')] = False,
):
    "Put the summary, figures and report of finished runs into reports/ and figures/, in one step."
    from puzzle_research.core.publish import publish as publish_runs
    print(os.path.relpath(publish_runs([_open(r).dir for r in run], force=force)))


def _run_points(jobs):
    "What runs points of a stale report on this machine, shown as a sweep."
    from puzzle_research.core.sweeping import run_points
    return lambda notebook, points: run_points(notebook, f'{system_of(notebook)}-report', points, jobs)


@app.command()
def reports(
    system:Annotated[list[str], argument('Only these; default all.', complete_notebooks)] = [],
    check:Annotated[bool, option('--check', help='Exit 1 where a report is stale.')] = False,
    again:Annotated[bool, option('--run', help='Run what is stale again, and publish it.')] = False,
    jobs:Annotated[Optional[int], option(help='Runs at a time; default one, or one a GPU.')] = None,
):
    """Which published reports are stale, and why: which code, parameter or data changed.

    Example: puzzle reports --check
    """
    from puzzle_research.core.stale import brief, regenerate, stale
    found = stale([system_of(notebook_path(name)) for name in system])
    for name, (_, why) in found.items():
        print(f"{name:20} {f'stale: {brief(why)}' if why else 'fresh'}")
    old = [doc for doc, why in found.values() if why]
    for doc in old if again else []:
        print(os.path.relpath(regenerate(doc, _run_points(jobs))))
    if old and check and not again:
        raise typer.Exit(1)
