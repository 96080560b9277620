"The files of this project that people read: notebooks, modules, tools and tests."
import json
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Cell:
    "A code cell, or a whole plain file."
    path: Path
    number: int # 1 is the first cell of a notebook, 0 a plain file
    lines: list # without nbdev's directives
    exported: bool = False
    parameters: bool = False # is it tagged so?
    module: str = '' # that its notebook exports

    @property
    def name(self):
        return self.path.relative_to(ROOT).as_posix()

    @property
    def title(self):
        "The first line that says something."
        return next((line.strip() for line in self.lines if line.strip()), '')[:60]

    def at(self, line:int):
        "Where a line of it stands."
        return f'cell {self.number} line {line}' if self.number else f'line {line}'


def notebooks() -> list:
    return sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def modules() -> list:
    "The modules of the package, exported and plain."
    return sorted(p for p in (ROOT/'puzzle_research').rglob('*.py') if p.name != '_modidx.py')


def plain_files() -> list:
    "Python that no notebook exports."
    folders = ('puzzle_research/cli', 'tests', 'tools')
    return sorted(p for folder in folders for p in (ROOT/folder).rglob('*.py'))


def code_cells(path:Path) -> list:
    "The code cells of a notebook, in order."
    cells = json.loads(path.read_text())['cells']
    texts = {i: ''.join(c['source']).splitlines() for i, c in enumerate(cells, 1) if c['cell_type'] == 'code'}
    directives = [line for lines in texts.values() for line in lines if line.startswith('#| default_exp')]
    module = directives[0].split()[-1] if directives else ''
    out = []
    for i, lines in texts.items():
        code = [line for line in lines if not line.startswith('#|')]
        tagged = 'parameters' in cells[i-1]['metadata'].get('tags', [])
        out.append(Cell(path, i, code, '#| export' in lines, tagged, module))
    return out
