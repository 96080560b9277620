"Files that are read: one damaged byte, a name twice, a bomb of brackets or blanks. Never a wrong word."
import json
import subprocess
import sys

import pytest
import torch

from damage import damages
from puzzle_research.cli import main
from puzzle_research.core.collect import example_run
from puzzle_research.core.config import make_config, parse_parameters
from puzzle_research.core.files import read_json, write_json
from puzzle_research.core.puzzle_files import load_puzzles, save_puzzles
from puzzle_research.core.runs import Run

Config = make_config(parse_parameters("recipe:str = 'best'\nbudget:str = 'test'\nseed:int = 0"))
EACH = [3, pytest.param(60, marks=pytest.mark.slow)]


@pytest.mark.parametrize('each', EACH)
def test_a_damaged_puzzle_file_never_crashes_the_reader(faults, tmp_path, each):
    "Whether changed digits are noticed is another question: the file's own digest answers it."
    puzzles = torch.arange(3*900).reshape(3, 30, 30) % 10
    file = save_puzzles(tmp_path/'a.puzzle.json', puzzles, dict(kind='picture', size=[32, 32]))
    for kind, bad in damages(file.read_bytes(), each):
        file.write_bytes(bad)
        try:
            found, _ = load_puzzles(file)
            well_formed = found.dtype == torch.uint8 and found.shape[1:] == (30, 30) and int(found.max()) < 10
            faults.count('puzzle file', kind, 'right' if well_formed else 'lost', str(found.shape))
        except ValueError as e:
            faults.count('puzzle file', kind, 'refused' if str(file) in str(e) else 'lost', str(e))


BOMBS = {
    'brackets': b'['*10**6,
    'nested objects': b'{"test": ' + b'[{"input": '*10**5,
    'blanks behind': b'{"train": [], "test": [], "meta": {}}' + b' '*10**8,
    'blanks before': b' '*10**8 + b'{"train": [], "test": [], "meta": {}}',
    'a long text in meta': b'{"test": [], "meta": {"name": "' + b'x'*10**8 + b'"}}',
    'a huge grid': b'{"test": [{"input": [[' + b'0,'*5*10**7 + b'0]]}]}',
    'many empty lists': b'{"test": [' + b'[],'*3*10**7 + b'[]]}',
    'a digit of a million digits': b'{"test": [{"input": [[' + b'1'*10**6 + b']]}]}',
    'test twice': b'{"test": [], "test": []}',
    'what is called input': b'{"test": [' + b'{"input":0},'*3*10**6 + b'{"input":0}]}',
    'a kind that is a list': b'{"test": [], "meta": {"kind": ["picture"]}}',
    'a long kind': b'{"test": [], "meta": {"kind": "' + b'x'*10**5 + b'"}}',
}
REFUSE = r'''
import re, sys, time
from pathlib import Path
from puzzle_research.cli import main
sys.argv = ['puzzle', 'decode', sys.argv[1]]
try:
    main()
finally:                                # getrusage would count what this process was forked from
    peak = re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())
    print(time.process_time(), int(peak[1])//1024)
'''


@pytest.mark.parametrize('name', BOMBS)
def test_a_bomb_is_refused_before_it_takes_time_or_memory(faults, tmp_path, name):
    "By the whole command, from the start of its process: under a second of its processor, under 200 MB."
    file = tmp_path/'bomb.puzzle.json'
    file.write_bytes(BOMBS[name])
    done = subprocess.run([sys.executable, '-c', REFUSE, file], capture_output=True, text=True)
    seconds, megabytes = done.stdout.split()
    clear = done.returncode == 2 and file.name in done.stderr and done.stderr.count('\n') == 1
    small = clear and len(done.stderr) < 400 and float(seconds) < 1 and int(megabytes) < 200
    faults.count('puzzle file', f'bomb: {name}', 'refused' if small else 'lost', done.stdout + done.stderr)


@pytest.mark.parametrize('each', EACH)
@pytest.mark.parametrize('name', ['manifest', 'config', 'summary'])
def test_an_error_in_a_runs_json_names_run_and_file(faults, tmp_path, name, each):
    "What is still JSON is found by its digest: test_evidence.py."
    run = example_run(tmp_path)
    file, content = run/f'{name}.json', json.loads((run/f'{name}.json').read_text())
    write_json(file, content)
    for kind, bad in damages(file.read_bytes(), each):
        file.write_bytes(bad)
        try:
            read_json(file)
        except ValueError as e:
            named = str(e).startswith(f'{run.parent.name}/{run.name}/{name}.json')
            faults.count('JSON of a run', kind, 'refused' if named else 'lost', str(e))


UNREADABLE = ['', '{', '[]', '{}', '{"recipe": 1, "recipe": 2}', '{"status": 7}', '['*10**5]


@pytest.mark.parametrize('content', UNREADABLE, ids=range(len(UNREADABLE)))
def test_one_bad_run_is_not_an_outage(faults, command, capsys, tmp_path, monkeypatch, content):
    monkeypatch.setenv('PUZZLE_RUNS', str(tmp_path))
    good = Run.start('00_good', Config())
    bad = tmp_path/'00_good'/'20200101-000000-0000'
    bad.mkdir()
    (bad/'manifest.json').write_text(content)
    monkeypatch.setattr(sys, 'argv', ['puzzle', 'runs'])
    with pytest.raises(SystemExit) as end:
        main()
    *_, first, second = capsys.readouterr().out.splitlines()
    listed = end.value.code == 0 and 'unreadable' in first and good.id in second and 'running' in second
    code, said = command('show', bad.name)
    named = code in (1, 2) and f'00_good/{bad.name}/manifest.json' in said and said.count('\n') == 1
    faults.count('list of runs', 'a manifest that cannot be read', 'refused' if listed and named else 'lost',
                 f'{first} {said}')
