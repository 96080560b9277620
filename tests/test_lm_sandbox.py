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


PERMISSION = 'PermissionError'
ESCAPES = { # name: (program, what it must say)
    'read a file': ("open('/etc/passwd').read()", PERMISSION),
    'read its own environment': ("open('/proc/self/environ').read()", PERMISSION),
    'write a file': ("open('{tmp}/x', 'w')", PERMISSION),
    'low level': ("import os; os.open('/etc/passwd', 0)", PERMISSION),
    'list': ("import os; os.listdir('/')", PERMISSION),
    'delete': ("import os; os.remove('{tmp}/victim')", PERMISSION),
    'rename': ("import os; os.rename('{tmp}/victim', '{tmp}/y')", PERMISSION),
    'mkdir': ("import os; os.mkdir('{tmp}/d')", PERMISSION),
    'chmod': ("import os; os.chmod('{tmp}/victim', 0)", PERMISSION),
    'link': ("import os; os.symlink('/etc/passwd', '{tmp}/l')", PERMISSION),
    'chdir': ("import os; os.chdir('/tmp')", PERMISSION),
    'network': ("import _socket; _socket.socket()", ''),
    'socket by ctypes': ("import ctypes; assert ctypes.CDLL(None).socket(2, 1, 0) >= 0", 'Error'),
    'fork': ("import os; os.fork()", PERMISSION),
    'spawn': ("import os; os.posix_spawn('/bin/true', ['true'], {{}})", PERMISSION),
    'exec': ("import os; os.execv('/bin/true', ['true'])", PERMISSION),
    'shell': ("import os; assert os.system('touch {tmp}/x') == 0", 'AssertionError'),
    'thread': ("import _thread; _thread.start_new_thread(print, ())", 'RuntimeError'),
    'kill': ("import os; os.kill({pid}, 9)", PERMISSION),
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


@pytest.mark.parametrize('name', ESCAPES)
def test_no_way_out_of_the_sandbox(name, tmp_path):
    (tmp_path/'victim').write_text('safe')
    program, why = ESCAPES[name]
    start = time.monotonic()
    passed, said = run_program([program.format(tmp=tmp_path, pid=os.getpid())], seconds=1, wall=4)
    assert not passed and why in said, said
    assert time.monotonic() - start < 30                        # killed, and not only warned
    assert [p.name for p in tmp_path.iterdir()] == ['victim'] and (tmp_path/'victim').read_text() == 'safe'


def test_nothing_stays_behind():
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    for program in ('while True: pass', 'import time; time.sleep(60)'):
        run_program([program], seconds=1, wall=2)
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before


def test_refused_on_another_processor(monkeypatch):
    monkeypatch.setattr(sandbox.platform, 'machine', lambda: 'arm64')
    with pytest.raises(SandboxUnavailable, match='x86-64 only.*arm64'):
        run_program(['1'])


def test_refused_where_the_kernel_takes_no_filter(monkeypatch):
    monkeypatch.setattr(sandbox, 'seccomp_filter', lambda: b'\xff'*8)
    with pytest.raises(SandboxUnavailable, match='kernel refused'):
        run_program(['1'])
