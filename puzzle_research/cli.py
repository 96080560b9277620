"The `puzzle` command. Heavy imports stay inside the commands, so that help answers at once."
import os, sys, time
from pathlib import Path
from typing import Annotated, Optional

import typer

from puzzle_research.core.config import from_text, nearest, notebook_of, notebook_parameters, root, system_of

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help='Train, report and use the puzzle codecs and models. Notebooks in nbs/ are the source of truth.')
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help='Data sets: what is known, what is found, what is whole.')
app.add_typer(data_app, name='data')


class Usage(Exception): "Something typed that cannot be: one line, exit 2."


def _notebook(name:str) -> Path:
    "A path, or a system's name or number: `01_vision_puzzle`, `vision_puzzle`, `01`, `lm_mugrokfast`."
    if Path(name).is_file(): return Path(name).resolve()
    if notebook_of(name).is_file(): return notebook_of(name)
    known = {p.stem: p for p in sorted((root()/'nbs').glob('[0-9]*_*.ipynb'))}
    stem = Path(name).stem
    hits = [p for k, p in known.items() if stem in (k, k.split('_', 1)[1], k.split('_', 1)[0])]
    if not hits: raise Usage(nearest(stem, list(known), 'notebook'))
    return hits[0]


def _values(path:Path, given:list[str]) -> dict:
    "`name=value` texts, typed by the notebook's parameters cell."
    known, values = notebook_parameters(path), {}
    for text in given:
        name, eq, value = text.partition('=')
        if not eq: raise Usage(f'-p {name}: expected a name and a value, as in `-p seed 7`')
        if name not in known: raise Usage(nearest(name, list(known)))
        values[name] = from_text(known[name], value)
    return values


def _follow(run_dir:Path, done):
    "A progress bar of a run in another process, from its progress.json, until `done()`."
    import json
    from tqdm import tqdm
    bar, stage, plain = None, None, not sys.stderr.isatty()
    said, last, path = time.monotonic(), None, run_dir/'progress.json'
    while not done():
        time.sleep(.3)
        try: p = json.loads(path.read_text())
        except (OSError, ValueError): continue
        loss = f"loss {float(p['loss']):.4g}"
        if plain:
            if time.monotonic() - said > 10 and p != last: said, last = time.monotonic(), p; print(f"{p['stage']} {p['step']}/{p['steps']} {loss}", file=sys.stderr, flush=True)
            continue
        if p['stage'] != stage:
            if bar: bar.close()
            stage, bar = p['stage'], tqdm(total=p['steps'], initial=p['step'], desc=p['stage'], unit='step')
        bar.update(p['step'] - bar.n); bar.set_postfix_str(loss)
    if bar: bar.close()


def _execute(path:Path, out:Path, values:dict, run_dir:Path):
    "papermill in a thread, the progress bar in this one. Returns the notebook's error, or None."
    import threading, warnings
    warnings.filterwarnings('ignore')
    import papermill as pm
    error = []
    def work():
        try: pm.execute_notebook(str(path), str(out), values, progress_bar=False, cwd=str(root()), kernel_name='python3',
                                    extra_arguments=['--IPKernelApp.log_level=ERROR'])
        except Exception as e: error.append(e)
    t = threading.Thread(target=work, daemon=True); t.start()
    try: _follow(run_dir, lambda: not t.is_alive())
    except KeyboardInterrupt:
        _interrupt(run_dir); t.join(30)
        raise
    t.join()
    return error[0] if error else None


def _failure(error, begun):
    "What to raise for a notebook's error: a value that its Config refused, before any run began, is bad usage."
    name, text = getattr(error, 'ename', type(error).__name__), getattr(error, 'evalue', error)
    return Usage(text) if name == 'ValueError' and not begun else RuntimeError(f'{name}: {text}')


def _interrupt(run_dir):
    "Pass Ctrl-C on to the run's kernel, which then writes how it ended."
    import json, signal
    try: os.kill(json.loads((run_dir/'manifest.json').read_text())['process']['pid'], signal.SIGINT)
    except OSError: pass


@app.command()
def run(notebook:Annotated[str, typer.Argument(help='Notebook path, or a system name such as 01_vision_puzzle.')],
        param:Annotated[list[str], typer.Option('-p', '--param', metavar='NAME VALUE', help='Set a parameter; repeatable: -p budget full -p seed 1.')] = [],
        resume:Annotated[Optional[str], typer.Option(metavar='RUN', help='Take up a run that died or was interrupted; a finished one is analysed again.')] = None,
        out:Annotated[Optional[Path], typer.Option(metavar='FILE', help='Also write the executed notebook here.')] = None):
    """Execute a notebook with parameters: train, diagnose, report.

    The run's folder is reports/runs/SYSTEM/RUN. Plain `papermill NOTEBOOK OUT -p NAME VALUE` does the same.

    Examples: puzzle run 01_vision_puzzle | puzzle run nbs/01_vision_puzzle.ipynb -p budget full -p seed 1 | puzzle run 01 --resume 20260102-1430
    """
    import shutil, tempfile
    from puzzle_research.core.runs import Run, new_id, runs_folder
    path = _notebook(notebook)
    values = _values(path, param)
    if resume or values.get('run'): values['run'] = Run.open(resume or values['run']).id
    run_id = values.get('run') or new_id()
    if not values.get('run'): os.environ['PUZZLE_RUN_ID'] = run_id
    system = system_of(path)
    run_dir = runs_folder()/system/run_id
    print(f'{system}: run {run_id}', flush=True)
    with tempfile.TemporaryDirectory() as tmp:
        executed = Path(tmp)/'notebook.ipynb'
        error = _execute(path, executed, values, run_dir)
        if executed.exists() and (run_dir/'manifest.json').exists(): shutil.copy(executed, run_dir/'notebook.ipynb')
        if executed.exists() and out: shutil.copy(executed, out)
    if error: raise _failure(error, begun=(run_dir/'manifest.json').exists())
    _outcome(run_dir)


def _outcome(run_dir):
    from puzzle_research.core.report import result_table
    from puzzle_research.core.runs import Run
    r = Run(run_dir)
    rel = os.path.relpath(run_dir)
    print(f'\n{result_table(r.summary)}')
    print(f"\nstatus {r.status}, {r.manifest['seconds']:.0f} s, peak memory {r.manifest['peak_memory_mb']} MB")
    print(f'report  {rel}/report.md\nfigures {rel}/figures/')


@app.command()
def runs(system:Annotated[Optional[str], typer.Argument(help='Only this system.')] = None,
         last:Annotated[int, typer.Option(help='How many, newest last.')] = 20):
    "List runs: id, status, recipe, budget, seed, seconds, and how each ended."
    from puzzle_research.core.runs import Run, runs_folder
    dirs = sorted(runs_folder().glob(f"{system_of(_notebook(system)) if system else '*'}/*/manifest.json"), key=lambda p: p.parent.name)
    if not dirs: print('no runs yet; start one with `puzzle run 01_vision_puzzle`')
    for p in dirs[-last:]:
        r = Run(p.parent); m = r.manifest
        print(f"{r.system:20} {r.id:22} {r.status:11} {m['recipe'] or '':6} {m['budget'] or '':6} seed {m['seed']} {m['seconds']:7.0f} s  {m['error'] or ''}"[:160])


@app.command()
def show(run:Annotated[str, typer.Argument(help='A run id, or the start of one.')]):
    "Show a run: how it stands, what differs from the defaults, data, events, results."
    from puzzle_research.core.report import result_table
    from puzzle_research.core.runs import Run
    r = Run.open(run); m = r.manifest
    print(f"{r.system}/{r.id}  {r.status}\nstart {m['start']}  end {m['end']}  {m['seconds']} s  {m['threads']} threads  {m['device']}")
    print('changed ' + (' '.join(f'{k}={v!r}' for k, v in m['changed'].items()) or 'nothing'))
    for d in m['data']: print(f"data    {d['name']}/{d['split']}: {d['rows']} rows, {d['origin']}, {len(d['dropped'])} left out, sha256 {d['sha256'][:12]}")
    for e in r.events: print(f"event   {e['time']} {e['kind']}: {e['message']}")
    if m['error']: print(f"error   {m['error']}")
    if (r.dir/'summary.json').exists(): print(f'\n{result_table(r.summary)}')
    print(f'\nfolder  {os.path.relpath(r.dir)}')


_WATCHED = ('loss', 'i_nce', 'usage', 'codebook_perplexity', 'effective_rank_context', 'effective_rank_target', 'temperature')

def _spark(values, width=24):
    "Numbers as a line of blocks, the last `width` of them."
    v = [x for x in values[-width:] if isinstance(x, (int, float))]
    low, high = min(v, default=0), max(v, default=0)
    return ''.join('▁▂▃▄▅▆▇█'[int(7*(x - low)/(high - low)) if high > low else 3] for x in v)


def _live(r) -> str:
    "The state of a run as text: from its files alone, so also of a run on another machine whose folder is shared."
    import json
    m, rows, at = r.manifest, r.metrics, r.dir/'progress.json'
    try: p = json.loads(at.read_text()); where = f"{p['stage']} {p['step']}/{p['steps']}, loss {float(p['loss']):.4g}"
    except (OSError, ValueError, KeyError): where = 'no step yet'
    out = [f"{r.system}/{r.id}  {r.status}  recipe {m['recipe']}, budget {m['budget']}, seed {m['seed']}, since {m['start'][:19].replace('T', ' ')} UTC", where]
    for stage in dict.fromkeys(x.get('stage', '') for x in rows):
        for split in ('train', 'valid'):
            part = [x for x in rows if x.get('stage', '') == stage and x['split'] == split]
            if not part: continue
            numbers = [k for k, v in part[-1].items() if k not in ('step', 'epoch', 'stage', 'split', 'lr') and isinstance(v, (int, float))]
            shown = [k for k in _WATCHED if k in numbers] or numbers[:8]
            out += ['', f"{stage} {split}, {len(part)} measured, last at step {part[-1]['step']}"]
            out += [f"  {k:24} {part[-1][k]:>10.4g}  {_spark([x.get(k) for x in part])}" for k in shown]
    events = [e for e in r.events if e['kind'] in ('alert', 'abort', 'stop', 'warning', 'resume')]
    out += ['', f"{sum(e['kind'] == 'alert' for e in events)} alerts"] + [f"  {e['time'][:19].replace('T', ' ')} {e['kind']}: {e['message']}" for e in events[-8:]]
    return '\n'.join(out + ([f"error {m['error']}"] if m['error'] else []))


@app.command()
def watch(run:Annotated[str, typer.Argument(help='A run id, the start of one, or the folder of a run.')],
          every:Annotated[float, typer.Option(help='Seconds between two looks.', min=.2)] = 2.,
          once:Annotated[bool, typer.Option('--once', help='Show the state once and return.')] = False):
    """Show the live state of a run: losses, codes in use, ranks, alerts. Ctrl-C ends the watching, not the run.

    Reads the files of the run only: it may run elsewhere, started by papermill, JupyterLab or another `puzzle run`.
    """
    from puzzle_research.core.runs import Run
    r = Run.open(run)
    while True:
        text = _live(r)
        if sys.stdout.isatty() and not once: print('\033[H\033[2J', end='')
        print(text, flush=True)
        if once or r.status != 'running': return
        try: time.sleep(every)
        except KeyboardInterrupt: return


@app.command()
def publish(run:Annotated[list[str], typer.Argument(help='One run, or several that differ only in their seed.')]):
    "Copy the summary, figures and report of finished runs into reports/ and figures/, and renew the board."
    from puzzle_research.core.publish import publish as pub
    from puzzle_research.core.runs import Run
    print(os.path.relpath(pub([Run.open(r).dir for r in run])))


@app.command()
def new(kind:Annotated[str, typer.Argument(help='system or codec.')],
        name:Annotated[str, typer.Argument(help='Of its module, such as word_puzzle.')]):
    "Write a small working notebook to begin with: `puzzle new system NAME`, `puzzle new codec NAME`."
    from puzzle_research.core.scaffold import new_notebook
    path = new_notebook(kind, name)
    print(f'{os.path.relpath(path)}\ntrain  puzzle run {path.stem}\ntest   nbdev_test --path {os.path.relpath(path)}')


@data_app.command('list')
def data_list():
    "Every data set the bench knows: what it is, its licence, where it was found."
    from puzzle_research.core.data import SOURCES, find
    for name, s in SOURCES.items():
        found = [split for split in s.splits if find(name, split)]
        print(f"{name:31} {', '.join(found) or 'not found':28} {s.licence}")


@data_app.command('check')
def data_check(name:Annotated[Optional[str], typer.Argument(help='Only this data set.')] = None):
    "Read every split found, whole: rows, fingerprint, broken items. Exit 1 where something is broken."
    from puzzle_research.core.data import check
    rows = check(name)
    for r in rows: print(f"{r['name']:31} {r.get('split', ''):16} {r.get('rows', ''):>7} rows  {r.get('broken', 0)} broken  {r.get('listed', 0)} listed  {r.get('sha256', ''):12}  {r['status']}")
    if any(r['status'] != 'ok' and not r['status'].startswith('not found') for r in rows): raise typer.Exit(1)


@data_app.command('fetch')
def data_fetch(name:Annotated[str, typer.Argument(help='Data set to fetch.')]):
    "Download a data set from the hub into data/, as Parquet. Needs the network."
    from puzzle_research.core.data import fetch
    print(fetch(name))


@app.command()
def doctor():
    "What this bench stands on: versions, device, threads, disk, data found."
    import shutil
    import torch
    from puzzle_research.core.config import pick_device
    from puzzle_research.core.data import SOURCES, find
    from puzzle_research.core.runs import git_state, versions
    for k, v in versions().items(): print(f"{k:18} {v or 'MISSING'}")
    g = git_state()
    print(f"{'commit':18} {g['commit']}{' (dirty)' if g['dirty'] else ''}")
    print(f"{'device':18} {pick_device()}   threads {torch.get_num_threads()} of {os.cpu_count()} cores")
    print(f"{'disk free':18} {shutil.disk_usage(root()).free/2**30:.1f} GiB")
    have = [n for n, s in SOURCES.items() if any(find(n, split) for split in s.splits)]
    print(f"{'data':18} {', '.join(have) or 'none found; set PUZZLE_DATA or run `puzzle data fetch NAME`'}")


# what `encode` reads: module -> kind of its puzzle files (their meta says it), endings it reads and writes, the first by default
KINDS = {
    'vision_puzzle': ('picture', ('.png', '.jpg', '.jpeg')),
    'audio_puzzle': ('sound', ('.wav', '.flac', '.ogg')),
    'language_puzzle': ('text', ('.txt',)),
}


def _codec(path:Path):
    "The module that encodes files of this ending."
    import importlib
    known = {ending: name for name, (_, endings) in KINDS.items() for ending in endings}
    if path.suffix.lower() not in known: raise Usage(f"{path.name}: no codec for {path.suffix or 'a file without an ending'!r}; expected one of {', '.join(known)}")
    return importlib.import_module(f'puzzle_research.{known[path.suffix.lower()]}')


def _ending(file:Path) -> str:
    "The ending of what a puzzle file holds."
    from puzzle_research.core.puzzle import load_puzzles
    kind = load_puzzles(file)[1].get('kind')
    endings = {k: e[0] for k, e in KINDS.values()}
    if kind not in endings: raise Usage(f"{file.name} holds puzzles of kind {kind!r}; expected one of {', '.join(endings)}, as `puzzle encode` writes them. Name the file to write with -o")
    return endings[kind]


@app.command()
def encode(file:Annotated[Path, typer.Argument(help='A picture (.png, .jpg), a sound (.wav, .flac, .ogg) or a text (.txt).')],
           out:Annotated[Optional[Path], typer.Option('-o', '--out', metavar='FILE', help='Puzzle file to write; default FILE.puzzle.json.')] = None):
    "Turn a file into puzzles, 30x30 grids of digits in an ARC JSON file: one for each 32x32 tile of a picture, each second of a sound, about 1,000 characters of a text."
    codec = _codec(file)
    if not file.exists(): raise FileNotFoundError(f'{file}: no such file')
    out = out or file.with_suffix('.puzzle.json')
    n = codec.encode_file(file, out)
    print(f"{out}: {n} puzzle{'s' if n != 1 else ''}")


@app.command()
def decode(file:Annotated[Path, typer.Argument(help='A puzzle file made by `puzzle encode`.')],
           out:Annotated[Optional[Path], typer.Option('-o', '--out', metavar='FILE', help='File to write; default FILE.decoded with the first ending of its kind (.png, .wav).')] = None):
    "Turn a puzzle file back into what it was, from its digits alone."
    if not file.exists(): raise FileNotFoundError(f'{file}: no such file')
    out = out or file.with_name(file.name.removesuffix('.json').removesuffix('.puzzle') + '.decoded' + _ending(file))
    _codec(out).decode_file(file, out)
    print(out)


def join_params(argv:list[str]) -> list[str]:
    "`-p NAME VALUE`, as papermill has it, into the `-p NAME=VALUE` that Typer can read."
    res, i = [], 0
    while i < len(argv):
        if argv[i] in ('-p', '--param') and i + 2 < len(argv) and '=' not in argv[i+1] and argv[i+2] != '-p':
            res += ['-p', f'{argv[i+1]}={argv[i+2]}']; i += 3
        else: res.append(argv[i]); i += 1
    return res


def main():
    "Entry point: bad usage is one line and exit 2, a failure one line and exit 1."
    cmd, argv = typer.main.get_command(app), join_params(sys.argv[1:])
    if not argv or argv == ['data']: argv.append('--help')
    try: code = cmd.main(argv, prog_name='puzzle', standalone_mode=False)
    except KeyboardInterrupt: code = 130
    except Exception as e:
        usage = isinstance(e, Usage) or hasattr(e, 'format_message') or isinstance(e, ValueError) and e.__class__ is ValueError
        text = e.format_message() if hasattr(e, 'format_message') else str(e)
        if os.environ.get('PUZZLE_DEBUG'): raise
        print(f"puzzle: {' '.join(text.split())}", file=sys.stderr)
        code = 2 if usage else 1
    if code == 130: print('puzzle: interrupted; go on with `puzzle run NOTEBOOK --resume RUN`', file=sys.stderr)   # Typer's own number for Ctrl-C
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == '__main__': main()
