"`puzzle data`: what data sets are known, found and whole."
from typing import Annotated, Optional

import typer

from .app import app, argument, name_columns, option

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None,
                       help='Data sets: what is known, what is found, what is whole.')
app.add_typer(data_app, name='data')


@data_app.command('list')
def data_list():
    "Every data set the bench knows: what it is, its licence, where it was found."
    from puzzle_research.core.data import SOURCES, find
    for name, source in SOURCES.items():
        found = [split for split in source.splits if find(name, split)]
        print(f"{name:31} {', '.join(found) or 'not found':28} {source.licence}")


def _tasks_too(line): # of `check`
    "The same line, or the first grid that is wrong: a set of ARC tasks is read as a run reads it."
    from puzzle_research.arc.tasks import VERSIONS, official
    try:
        if line['name'] in VERSIONS and line['status'] == 'ok':
            official(line['name'], line['split'])
        return line
    except ValueError as e:
        return line | dict(status=str(e))


@data_app.command('check')
def data_check(
    name:Annotated[Optional[str], argument('Only this data set.')] = None,
    column:Annotated[list[str], option(metavar='OURS=THEIRS', help='How your data set calls a column.')] = [],
):
    "Read every split found, whole: rows, fingerprint, broken items. Exit 1 where something is broken."
    name_columns(column)
    from puzzle_research.core.data import check
    lines = [_tasks_too(line) for line in check(name)]
    empty = dict(split='', rows='', broken=0, listed=0, sha256='')
    for line in lines:
        print('{name:31} {split:16} {rows:>7} rows  {broken} broken  {listed} listed  {sha256:12}  {status}'
              .format(**empty | line))
    if not all(line['status'].startswith(('ok', 'not found')) for line in lines):
        raise typer.Exit(1)


@data_app.command('fetch')
def data_fetch(name:Annotated[str, argument('Data set to fetch.')]):
    "Download a data set from the hub into data/, as Parquet. Needs the network."
    from puzzle_research.core.data import fetch
    print(fetch(name))
