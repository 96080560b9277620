"The commands of CONTRIBUTING.md, in a copy of the tree; and what `puzzle new` says when it cannot."
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from puzzle_research.core.config import root

TEXT = (root()/'CONTRIBUTING.md').read_text()
SECTIONS = {m[1]: m[2] for m in re.finditer(r'^## (.+?)\n(.*?)(?=^## |\Z)', TEXT, re.M | re.S)}
COMMANDS = {name: re.findall(r'```sh\n(.*?)```', text, re.S) for name, text in SECTIONS.items()}
COPIED = ('nbs', 'puzzle_research', 'tools', 'tests', 'data', 'docs', 'reports', 'figures')
# Notebooks of parts, which no command needs: exporting them takes time
LEFT_OUT = ('arc', 'audio', 'jepa', 'lm', 'modalities', 'ternary', 'text', 'vision')


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    "A copy of the tree, and a function that runs a command in it."
    folder = tmp_path_factory.mktemp('project')
    aside = ('runs', '__pycache__', '.ipynb_checkpoints')
    for name in COPIED:
        left = (*aside, *LEFT_OUT) if name == 'nbs' else aside
        shutil.copytree(root()/name, folder/name, ignore=shutil.ignore_patterns(*left))
    for path in root().glob('*.*'):
        if path.is_file():
            shutil.copy(path, folder)
    env = {k: v for k, v in os.environ.items() if k not in ('PUZZLE_DATA', 'PUZZLE_RUNS')}
    env |= dict(PUZZLE_ROOT=str(folder), PYTHONPATH=str(folder), IN_TEST='1')
    programs = {'puzzle': [sys.executable, '-m', 'puzzle_research.cli'], 'python': [sys.executable]}

    def call(command):
        program, *args = shlex.split(command)
        command = [*programs[program], *args]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return folder, call


def last_run(folder, name):
    run = max((folder/'reports'/'runs').glob(f'*_{name}/*'))
    return run, json.loads((run/'manifest.json').read_text())


def test_the_guide_has_commands():
    named = {name for name, commands in COMMANDS.items() if commands}
    assert named >= {'Change a notebook', 'Add a system', 'Add a codec', 'Add a data set', 'Publish'}


@pytest.mark.parametrize('section', [k for k, v in COMMANDS.items() if v])
def test_its_commands_work(project, section):
    _, call = project
    for line in '\n'.join(COMMANDS[section]).splitlines():
        done = call(line)
        assert done.returncode == 0, f'{line}\n{done.stdout}\n{done.stderr}'


@pytest.mark.parametrize('kind', ['system', 'codec'])
def test_a_new_notebook_keeps_the_contract(project, kind):
    folder, _ = project
    run, manifest = last_run(folder, f'my_{kind}')
    assert manifest['status'] == 'ok'
    assert (run/'report.md').read_text().startswith(f'# My {kind}\n')
    module = (folder/'puzzle_research'/f'my_{kind}.py').read_text()
    contract = ('Config = ', 'def build(cfg', 'def train(cfg, run', 'def evaluate(cfg, run', 'def draw(run')
    assert [name for name in contract if name not in module] == []


@pytest.mark.slow
def test_a_summary_without_a_title_fails_by_name(project):
    folder, call = project
    call('puzzle new codec nameless')
    path, = (folder/'nbs').glob('*_nameless.ipynb')
    path.write_text(path.read_text().replace("title='Nameless', ", ''))
    done = call('puzzle run nameless')
    assert done.returncode == 1
    assert "the summary has no 'title'" in done.stderr
    assert last_run(folder, 'nameless')[1]['status'] == 'failed'


@pytest.mark.parametrize('args,says', [
    ('system My-System', 'expected lower-case letters'),
    ('sistem x', "did you mean 'system'?"),
    ('codec vision_puzzle', 'is taken by 01_vision_puzzle')])
def test_what_cannot_be_made_is_refused(project, args, says):
    _, call = project
    done = call(f'puzzle new {args}')
    assert done.returncode == 2
    assert says in done.stderr


LINK = re.compile(r'\]\(([^)\s#]+)(?:#[^)]*)?\)')


def texts():
    "(file, markdown) of all that people read."
    for path in [*root().glob('*.md'), *(root()/'docs').glob('*.md'), *(root()/'reports').glob('*.md')]:
        yield path, path.read_text()
    for path in (root()/'nbs').rglob('*.ipynb'):
        cells = json.loads(path.read_text())['cells']
        yield path, '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def test_no_link_is_dead():
    dead = []
    for path, text in texts():
        targets = [t for t in LINK.findall(text) if not re.match(r'[a-z]+:', t)]
        dead += [f'{path.name}: {t}' for t in targets if not (path.parent/Path(t)).exists()]
    assert dead == []
