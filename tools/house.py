"""How the code is built, counted: what is too long, written twice, or imports against the arrow.

`make test` calls it, and it fails where it finds anything; with `--warn` it only lists."""
import argparse
import ast
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
from sources import Cell, code_cells, modules, notebooks, plain_files  # noqa: E402

MODULE, PART, CELL, FUNCTION, COLUMNS, SAME = 500, 250, 25, 40, 110, 6
RULES = {
    'module': f'module over {MODULE} lines',
    'part': f'part over {PART} exported lines',
    'cell': f'code cell over {CELL} lines',
    'function': f'exported function over {FUNCTION} lines',
    'line': f'line over {COLUMNS} columns',
    'statement': 'several statements on a line',
    'twice': f'{SAME} lines or more written twice',
    'arrow': 'import against the arrow',
    'parameters': 'experiment without a parameters cell',
    'idle': 'exported name that nothing uses',
}
# What may stay: (rule, how the finding starts) -> reason. An exception that excuses nothing is a finding too.
ONE_CELL = 'parameters stand one a line, in the one cell that papermill writes behind'
EXCEPTIONS = {
    ('cell', 'nbs/01_vision_puzzle.ipynb "recipe:str'): ONE_CELL,
    ('cell', 'nbs/04_jepa_vq.ipynb "recipe:str'): ONE_CELL,
    ('cell', 'nbs/05_ternary_vae.ipynb "recipe:str'): ONE_CELL,
    ('cell', 'nbs/06_cognate.ipynb "recipe:str'): ONE_CELL,
}


def length(lines:list) -> int:
    "How many lines there are to read: blank ones do not count."
    return sum(bool(line.strip()) for line in lines)


def long_modules():
    for path in [*modules(), *plain_files()]:
        n = len(path.read_text().splitlines())
        if n > MODULE:
            yield path, f'{n} lines'


def long_parts():
    for path in notebooks():
        n = sum(length(c.lines) for c in code_cells(path) if c.exported)
        if n > PART and path.parent.name != 'nbs':
            yield path, f'{n} exported lines'


def long_cells():
    for cell in (c for path in notebooks() for c in code_cells(path)):
        n = length(cell.lines)
        if n > CELL:
            yield cell.path, f'{cell.title!r}: {n} lines'


def long_functions():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                n = node.end_lineno - node.lineno + 1
                if n > FUNCTION:
                    yield path, f'{node.name!r}: {n} lines'


def ruff(*rules):
    "What ruff finds, whatever pyproject.toml excuses. Exported modules repeat their notebooks: left out."
    command = [sys.executable, '-m', 'ruff', 'check', '--isolated', '--line-length', str(COLUMNS)]
    command += ['--select', ','.join(rules), '--output-format', 'json']
    command += ['nbs', 'tests', 'tools', 'puzzle_research/cli']
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    for found in json.loads(out.stdout):
        cell = f"cell {found['cell']} " if found.get('cell') else ''
        yield Path(found['filename']), f"{cell}line {found['location']['row']}: {found['message']}"


def folded(lines:list) -> list: # (line number, text)
    "Lines as they are compared: no indentation, comments, blank lines, lone brackets, imports."
    out = []
    for i, line in enumerate(lines, 1):
        text = ' '.join(re.sub(r'\s+#.*$', '', line).split())
        if re.search(r'\w', text) and not text.startswith(('#', 'import ', 'from ')):
            out.append((i, text))
    return out


def written_twice():
    """Runs of the same lines in two places. Exported modules repeat their notebooks, and parameters cells
    declare names that all experiments share: neither is compared."""
    cells = [c for path in notebooks() for c in code_cells(path) if not c.parameters]
    cells += [Cell(path, 0, path.read_text().splitlines()) for path in plain_files()]
    texts = [folded(c.lines) for c in cells]
    seen = defaultdict(list)
    for k, lines in enumerate(texts):
        for i in range(len(lines) - SAME + 1):
            seen[tuple(text for _, text in lines[i:i+SAME])].append((k, i))
    for (a, i), (b, j), n in longest_runs(seen):
        where = f'{cells[a].at(texts[a][i][0])} is again {cells[b].name} {cells[b].at(texts[b][j][0])}'
        yield cells[a].path, f'{where}: {n} lines'


def longest_runs(seen:dict): # run of SAME lines -> places
    "Pairs of places where a common run starts, with its length."
    pairs = {(p, q) for places in seen.values() for p in places for q in places if p < q}
    for (a, i), (b, j) in sorted(pairs):
        if ((a, i-1), (b, j-1)) in pairs:
            continue
        n = SAME
        while ((a, i+n-SAME+1), (b, j+n-SAME+1)) in pairs:
            n += 1
        yield (a, i), (b, j), n


def imported(source:str, package:str) -> set: # puzzle_research.core, puzzle_research.cli, ...
    "What a text imports from this project, to the first dot; `package` is where a relative import starts."
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            above = package.split('.')
            above = above[:len(above) - node.level + 1] if node.level else []
            module = '.'.join([*above, node.module or '']).strip('.')
            names |= {f'{module}.{a.name}' for a in node.names}
    return {'.'.join(n.split('.')[:2]) for n in names if n.startswith('puzzle_research.')}


def layer(module:str) -> int:
    "0 core, 1 parts, 2 experiments, 3 the command line. Imports go to the same layer or to a lower one."
    first = module.split('.')[1]
    if first in ('cli', 'core'):
        return 3 if first == 'cli' else 0
    return 1 if (ROOT/'puzzle_research'/first).is_dir() else 2


def with_imports():
    "Every module, and every code cell of a notebook that exports one: (path, module, source)."
    for path in modules():
        names = path.relative_to(ROOT).with_suffix('').parts
        yield path, '.'.join(n for n in names if n != '__init__'), path.read_text()
    for cell in (c for path in notebooks() for c in code_cells(path) if c.module):
        plain = [line for line in cell.lines if not line.lstrip().startswith(('%', '!'))]
        yield cell.path, f'puzzle_research.{cell.module}', '\n'.join(plain)


def against_the_arrow():
    for path, name, source in with_imports():
        for other in sorted(imported(source, name.rpartition('.')[0])):
            another = layer(name) == layer(other) == 2 and name not in (other, 'puzzle_research.trimodal')
            if layer(other) > layer(name) or another:
                yield path, f'imports {other}'


def without_parameters():
    for path in (ROOT/'nbs').glob('[0-9]*.ipynb'):
        if not any(c.parameters for c in code_cells(path)):
            yield path, 'no cell is tagged `parameters`'


def never_used():
    "Functions and classes that no other line names. What a decorator registers is used by that."
    cells = [c.lines for path in notebooks() for c in code_cells(path)]
    lines = [line for some in [*cells, *(p.read_text().splitlines() for p in plain_files())] for line in some]
    named = Counter(re.findall(r'\w+', '\n'.join(lines)))
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_')
            if public and not node.decorator_list and named[node.name] < 2:
                yield path, f'{node.name!r}'


def findings() -> list: # (rule, text)
    "All that breaks a rule."
    found = {
        'module': long_modules(),
        'part': long_parts(),
        'cell': long_cells(),
        'function': long_functions(),
        'line': ruff('E501'),
        'statement': ruff('E701', 'E702', 'E703', 'E731'),
        'twice': written_twice(),
        'arrow': against_the_arrow(),
        'parameters': without_parameters(),
        'idle': never_used(),
    }
    named = {rule: [f'{path.relative_to(ROOT)} {text}' for path, text in some]
             for rule, some in found.items()}
    return list(dict.fromkeys((rule, text) for rule, texts in named.items() for text in texts))


def judge(found:list) -> tuple: # (what must be mended, what is excused, exceptions that excuse nothing)
    def excuses(exception, finding):
        return exception[0] == finding[0] and finding[1].startswith(exception[1])
    excused = [f for f in found if any(excuses(e, f) for e in EXCEPTIONS)]
    idle = [e for e in EXCEPTIONS if not any(excuses(e, f) for f in excused)]
    return [f for f in found if f not in excused], excused, idle


def counts(bad:list, excused:list) -> str:
    "The shape of the tree, and how often each rule is broken."
    cells = [length(c.lines) for path in notebooks() for c in code_cells(path)]
    longest = max(len(path.read_text().splitlines()) for path in modules())
    lines = [f'{len(cells)} code cells, median {median(cells):.0f} lines; longest module {longest} lines']
    for rule, what in RULES.items():
        n, allowed = (sum(r == rule for r, _ in some) for some in (bad, excused))
        lines.append(f'{n:5}  {what}' + (f' ({allowed} excused)' if allowed else ''))
    return '\n'.join(lines)


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--warn', action='store_true', help='list what is found, and succeed')
    ap.add_argument('--counts', action='store_true', help='print only the counts')
    ap.add_argument('paths', nargs='*', help='list only what is found in these files')
    a = ap.parse_args()
    bad, excused, idle = judge(findings())
    listed = [f for f in bad if not a.paths or f[1].split(' ')[0] in a.paths]
    for rule, text in [] if a.counts else listed:
        print(f'{rule:10} {text}')
    for rule, start in idle:
        print(f'an exception excuses nothing: {rule} {start}')
    print(counts(bad, excused))
    if (bad or idle) and not a.warn:
        sys.exit('mend what is listed above, or excuse it with a reason in tools/house.py')


if __name__ == '__main__':
    main()
