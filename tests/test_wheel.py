"The wheel, installed in a folder of its own: every command works, or says what it needs."
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from puzzle_research.core.config import root
from shared import SMALL, as_options, only_run

LEFT_OUT = shutil.ignore_patterns('.*', 'build', '*.egg-info', '__pycache__', 'runs', 'tests', 'figures')
NO_NETWORK = ('Failed to fetch', 'dns error', 'Connection', 'No matching distribution')


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "The folder that the wheel was unpacked into."
    folder = tmp_path_factory.mktemp('wheel')
    source = shutil.copytree(root(), folder/'source', ignore=LEFT_OUT)
    uv = shutil.which('uv')
    build = ([uv, 'build', '--wheel', '-o', folder] if uv else
             [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '-w', folder])
    done = subprocess.run([*build, source], capture_output=True, text=True)
    if done.returncode and any(word in done.stderr + done.stdout for word in NO_NETWORK):
        pytest.skip('what builds a wheel cannot be fetched here')
    assert done.returncode == 0, done.stderr
    zipfile.ZipFile(next(folder.glob('*.whl'))).extractall(folder/'site')
    return folder/'site'


@pytest.fixture
def bare(installed, tmp_path):
    "`bare('runs')`: what `puzzle runs` of the wheel does in an empty folder."
    elsewhere = {name: value for name, value in os.environ.items() if not name.startswith('PUZZLE_')}
    env = elsewhere | dict(PYTHONPATH=str(installed), OMP_NUM_THREADS='1')
    def run(*args):
        cmd = [sys.executable, '-m', 'puzzle_research.cli', *map(str, args)]
        return subprocess.run(cmd, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    return run


@pytest.mark.parametrize('args, word', [
    ('run nope', 'Known: 01_vision_puzzle, 02_audio_puzzle'),
    ('run 01 --resume zz', "unknown run 'zz': there is none yet"),
    ('show last', 'no runs yet; start one with `puzzle run'),
    ('publish nope', "unknown run 'nope'"),
    ('new system mine', 'needs a checkout of the project'),
])
def test_a_command_says_what_it_needs(bare, tmp_path, args, word):
    done = bare(*args.split())
    assert done.returncode in (1, 2) and word in done.stderr and done.stderr.count('\n') == 1, done.stderr
    assert not list(tmp_path.rglob('*.ipynb'))


def test_codecs_have_their_weights(bare, tmp_path):
    (tmp_path/'a.txt').write_text('A text of a few words.')
    assert bare('encode', 'a.txt').returncode == 0
    done = bare('decode', 'a.txt.puzzle.json')
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'a.decoded.txt').read_text() == 'A text of a few words.'


@pytest.mark.slow
@pytest.mark.parametrize('system', ['guides_system', '03_language_puzzle'])
def test_puzzle_run_has_its_notebooks(bare, tmp_path, system):
    done = bare('run', system, *as_options(SMALL))
    assert done.returncode == 0, done.stderr[-3000:]
    run = only_run(tmp_path/'reports'/'runs')
    assert run.status == 'ok' and not run.incomplete() and (run.dir/'notebook.ipynb').exists()
    assert 'status ok' in done.stdout
