"A new system and a new codec: what `puzzle new` writes runs, reports, and says what is wrong with it."
import json
import os
import shutil
import subprocess
import sys

import pytest

from puzzle_research.core.config import root


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    "A project with nothing but the guides, and a function that calls `puzzle` in it."
    folder = tmp_path_factory.mktemp('project')
    shutil.copytree(root()/'nbs'/'guides', folder/'nbs'/'guides')
    shutil.copytree(root()/'data', folder/'data', ignore=shutil.ignore_patterns('runs'))
    shutil.copy(root()/'settings.ini', folder)
    (folder/'puzzle_research').mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ('PUZZLE_DATA', 'PUZZLE_RUNS')}
    env |= dict(PUZZLE_ROOT=str(folder), PYTHONPATH=str(root()), IN_TEST='1')

    def puzzle(*args):
        command = [sys.executable, '-m', 'puzzle_research.cli', *args]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return folder, puzzle


def only_run(folder, system):
    path, = (folder/'reports'/'runs'/system).iterdir()
    return path, json.loads((path/'manifest.json').read_text())


@pytest.mark.parametrize('kind', ['system', 'codec'])
def test_a_new_notebook_runs_and_reports(project, kind):
    folder, puzzle = project
    made = puzzle('new', kind, f'my_{kind}')
    assert made.returncode == 0, made.stderr
    path, = (folder/'nbs').glob(f'*_my_{kind}.ipynb')
    done = puzzle('run', path.stem)
    assert done.returncode == 0, done.stderr
    run, manifest = only_run(folder, path.stem)
    assert manifest['status'] == 'ok'
    assert (run/'report.md').read_text().startswith(f'# My {kind}\n')
    module = (folder/'puzzle_research'/f'my_{kind}.py').read_text()
    contract = ('Config = ', 'def build(cfg', 'def train(cfg, run', 'def evaluate(cfg, run', 'def draw(run')
    assert [name for name in contract if name not in module] == []


def test_a_summary_without_a_title_fails_the_run_by_name(project):
    folder, puzzle = project
    puzzle('new', 'codec', 'nameless')
    path, = (folder/'nbs').glob('*_nameless.ipynb')
    path.write_text(path.read_text().replace("title='Nameless', ", ''))
    done = puzzle('run', path.stem)
    assert done.returncode == 1
    assert "the summary has no 'title'" in done.stderr


@pytest.mark.parametrize('args,says', [
    (('system', 'My-System'), 'expected lower-case letters'),
    (('sistem', 'x'), "did you mean 'system'?"),
    (('system', '9lives'), 'expected lower-case letters')])
def test_what_cannot_be_made_is_refused(project, args, says):
    _, puzzle = project
    done = puzzle('new', *args)
    assert done.returncode == 2
    assert says in done.stderr
