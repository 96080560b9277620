"A sandbox that holds. The lesson is in nbs/lm/17_sandbox."
import os
import time

import psutil
import pytest

from puzzle_research.lm import sandbox
from puzzle_research.lm.sandbox import SandboxUnavailable, run_program
from puzzle_research.lm.tasks import records

IMPORTS = """
import math, re, collections, heapq, itertools
assert math.sqrt(4) == 2 and re.sub("a", "b", "a") == "b"
assert sorted(collections.Counter("aab").values()) == [1, 2]
"""


def test_true_programs_pass_and_false_ones_do_not():
    for r in records('snippets', 'test'):
        assert run_program([r['answer'].strip('\n'), r['setup'], *r['tests']]) == (True, '')
    assert run_program([IMPORTS]) == (True, '')
    assert run_program(['assert 1 == 2'])[1].startswith('AssertionError')
    assert run_program(['def f(:'])[1].startswith('SyntaxError')


REFUSED = [ # each must raise PermissionError
    "open('/etc/passwd').read()",
    "open('/proc/self/environ').read()",
    "open('{tmp}/x', 'w')",
    "os.open('/etc/passwd', 0)",
    "os.listdir('/')",
    "os.remove('{tmp}/victim')",
    "os.rename('{tmp}/victim', '{tmp}/y')",
    "os.mkdir('{tmp}/d')",
    "os.chmod('{tmp}/victim', 0)",
    "os.symlink('/etc/passwd', '{tmp}/l')",
    "os.chdir('/tmp')",
    "os.fork()",
    "os.posix_spawn('/bin/true', ['true'], {{}})",
    "os.execv('/bin/true', ['true'])",
    "os.kill({pid}, 9)",
]
TRY_ALL = """
import os
for attempt in {attempts}:
    try:
        exec(attempt)
    except PermissionError:
        continue
    raise AssertionError(attempt + ' was possible')
"""
ESCAPES = { # name: (program, what it must say)
    'network': ("import _socket; _socket.socket()", ''),
    'socket by ctypes': ("import ctypes; assert ctypes.CDLL(None).socket(2, 1, 0) >= 0", 'Error'),
    'shell': ("import os; assert os.system('touch {tmp}/x') == 0", 'AssertionError'),
    'thread': ("import _thread; _thread.start_new_thread(print, ())", 'RuntimeError'),
    'another descriptor': ("import os; os.write(3, b'x')", 'Error'),
    'raise the limits': ("import ctypes\nassert ctypes.CDLL(None).prlimit(0, 9, None, None) == 0", 'Error'),
    'memory': ("x = bytearray(10**10)", 'MemoryError'),
    'grow': ("x = []\nwhile True: x.append(bytearray(10**7))", 'MemoryError'),
    'recursion': ("def f(): f()\nf()", 'RecursionError'),
    'leave': ("raise SystemExit(0)", 'SystemExit'),
    'leave at once': ("import os; os._exit(0)", 'ended with 0 before the last test'),
    'catch all': ("try: open('/etc/passwd')\nexcept BaseException: pass\nassert False", 'AssertionError'),
    'flood': ("import sys\nwhile True: sys.stderr.write('x'*10**6)", ''),
    'endless loop': ("while True: pass", 'out of time'),
    'sleep': ("import time; time.sleep(60)", ''),
}


def test_what_reaches_out_of_the_process_is_refused(tmp_path):
    (tmp_path/'victim').write_text('safe')
    attempts = [a.format(tmp=tmp_path, pid=os.getpid()) for a in REFUSED]
    assert run_program([TRY_ALL.format(attempts=attempts)]) == (True, '')
    assert [p.name for p in tmp_path.iterdir()] == ['victim'] and (tmp_path/'victim').read_text() == 'safe'
    assert run_program(["open('/etc/passwd')"])[1].startswith('PermissionError')


@pytest.mark.parametrize('name', ESCAPES)
def test_no_way_out_of_the_sandbox(name, tmp_path):
    (tmp_path/'victim').write_text('safe')
    program, why = ESCAPES[name]
    start = time.monotonic()
    passed, said = run_program([program.format(tmp=tmp_path)], seconds=1, wall=3)
    assert not passed and why in said, said
    assert time.monotonic() - start < 30                        # killed, and not only warned
    assert [p.name for p in tmp_path.iterdir()] == ['victim'] and (tmp_path/'victim').read_text() == 'safe'


def test_nothing_stays_behind():
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    run_program(['import time; time.sleep(60)'], wall=1)
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before


def test_refused_on_another_processor(monkeypatch):
    monkeypatch.setattr(sandbox.platform, 'machine', lambda: 'arm64')
    with pytest.raises(SandboxUnavailable, match='x86-64 only.*arm64'):
        run_program(['1'])


def test_refused_where_the_kernel_takes_no_filter(monkeypatch):
    monkeypatch.setattr(sandbox, 'seccomp_filter', lambda *allowed: b'\xff'*8)
    with pytest.raises(SandboxUnavailable, match='kernel refused'):
        run_program(['1'])
