"What all commands stand on: the application, how options are declared, how an error is told."
import logging, os, sys
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help='Train, report and use the puzzle codecs and models. Notebooks in nbs/ are the source of truth.')


class Usage(Exception):
    "Something typed that cannot be: one line, exit 2."


class Interrupted(Exception):
    "Ctrl-C, with a word on how to go on: exit 130."


def argument(text, complete=None): return typer.Argument(help=text, autocompletion=complete)
def option(*names, **kwargs): return typer.Option(*names, **kwargs)


def name_columns(columns):
    "`--column img=image`: what your sets call our columns, for this process and those it starts."
    if columns:
        os.environ['PUZZLE_COLUMN'] = ','.join(columns)


def complete_notebooks(incomplete:str) -> list:
    "Systems whose name begins so, for the shell."
    from puzzle_research.core.params import notebooks_folder
    known = sorted(notebooks_folder().glob('[0-9]*_*.ipynb'))
    return [p.stem for p in known if p.stem.startswith(incomplete)]


def complete_runs(incomplete:str) -> list:
    "Runs whose id begins so, newest first, for the shell."
    from puzzle_research.core.runs import runs_folder
    ids = sorted((p.parent.name for p in runs_folder().glob('*/*/manifest.json')), reverse=True)
    return [name for name in ['last', *ids] if name.startswith(incomplete)]


def _version(asked:bool):
    if asked:
        from importlib.metadata import version
        print(f"puzzle_research {version('puzzle_research')}")
        raise typer.Exit


@app.callback()
def _all(version:Annotated[bool, option('--version', callback=_version, is_eager=True,
                                        help='Say the version.')] = False):
    pass


def print_table(table): # core.table.Table
    "Drawn by rich on a terminal; plain text where a program reads it."
    if not sys.stdout.isatty():
        return print(table)
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    drawn = Table(title=table.title or None, title_justify='left')
    for i, name in enumerate(table.head):
        drawn.add_column(name, justify='right' if i in table.right else 'left', overflow='fold')
    for row in table.rows:
        drawn.add_row(*map(escape, row))
    Console().print(drawn)


def join_params(argv:list) -> list:
    "`-p NAME VALUE`, as papermill has it, into the `-p NAME=VALUE` that Typer can read."
    joined, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        joined.append(word)
        if word in ('-p', '--param') and len(rest) > 1 and '=' not in rest[0] and rest[1] != '-p':
            joined.append(f'{rest.pop(0)}={rest.pop(0)}')
    return joined


class _Said(logging.Handler):
    "A warning is a line on standard error."
    def emit(self, record): print(record.getMessage(), file=sys.stderr)


def _say_warnings():
    log = logging.getLogger('puzzle_research')
    if not log.handlers:
        log.addHandler(_Said())


def _told(error) -> int: # exit code
    "Say an error in one line: bad usage is exit 2, a failure exit 1."
    if os.environ.get('PUZZLE_DEBUG'):
        raise error
    of_typer = hasattr(error, 'format_message')
    text = error.format_message() if of_typer else str(error)
    print(f"puzzle: {' '.join(text.split())}", file=sys.stderr)
    return 2 if of_typer or isinstance(error, Usage) or type(error) is ValueError else 1


def _asked_about(command, argv): # -> the command whose help is asked for, and what is left of the words
    "Straight to it: on the way Typer would load pydantic, which takes longer than all else."
    name, rest = 'puzzle', list(argv)
    while rest and rest[-1] == '--help' and rest[0] in getattr(command, 'commands', {}):
        name = f'{name} {rest[0]}'
        command = command.commands[rest.pop(0)]
    return (command, name, rest) if rest == ['--help'] else (None, '', argv)


def main():
    "Run the command line."
    _say_warnings()
    command, argv = typer.main.get_command(app), join_params(sys.argv[1:])
    about, name, rest = _asked_about(command, argv)
    if about:
        sys.exit(about.main(rest, prog_name=name, standalone_mode=False))
    if not argv or argv == ['data']:
        argv.append('--help')
    files = argv[:1] in (['encode'], ['decode'])
    how = 'nothing was written' if files else 'go on with `puzzle run NOTEBOOK --resume RUN`'
    how = f'interrupted; {how}'
    try:
        code = command.main(argv, prog_name='puzzle', standalone_mode=False)
    except (KeyboardInterrupt, Interrupted) as e:
        code = 130                   # Typer's own number for Ctrl-C
        how = str(e) or how
    except Exception as e:
        code = _told(e)
    if code in (130, 143):                # by Ctrl-C, by SIGTERM
        print(f'puzzle: {how}', file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)
