"Programs that try to pass without being right: they look for the word, the tests, or a way around both."
import pytest

from puzzle_research.lm.sandbox import run_program

TESTS = ['assert f(2) == 4', 'assert f(31337) == 62674']
LOOK = '''
import gc, sys
def texts():
    seen = [o for o in gc.get_objects()] + [v for m in list(sys.modules.values()) for v in vars(m).values()]
    frame = sys._getframe()
    while frame:
        seen += list(frame.f_locals.values()) + list(frame.f_globals.values())
        frame = frame.f_back
    flat = [x for o in seen for x in (o if isinstance(o, (list, tuple)) else [o])]
    return [x for x in flat if isinstance(x, (str, bytes))]
'''
CHEATS = {
    'the word in __main__': 'import __main__\nimport os\nos.write(2, __main__.word.encode())\nos._exit(0)',
    'the word in the job': 'import __main__, os\nos.write(2, __main__.job["word"].encode())\nos._exit(0)',
    'any hex text in memory': LOOK + '''
import os, re
for s in texts():
    s = s if isinstance(s, str) else s.decode('latin1')
    for word in re.findall('[0-9a-f]{32}', s):
        os.write(1, word.encode())
        os.write(2, word.encode())
os._exit(0)''',
    'the tests in memory': LOOK + '''
def f(x):
    found = [s for s in map(str, texts()) if 'f(31337) ==' in s]
    return int(found[0].split('==')[1]) if found else x*x''',
    'an object equal to all': 'class A:\n    def __eq__(self, other): return True\ndef f(x): return A()',
    'an int equal to all': 'class A(int):\n    def __eq__(self, other): return True\ndef f(x): return A()',
    'another int': 'import builtins\nbuiltins.int = lambda x: 4\ndef f(x): return x',
    'a forged answer': 'import os\nos.write(1, b"[true, 4]\\n"*9)\nos._exit(0)',
    'a forged class': 'import os\nos.write(1, b\'[true, ["module", "__main__"]]\\n\'*9)\nos._exit(0)',
    'a handle of nothing': 'import os\nos.write(1, b\'[true, ["handle", 99]]\\n\'*9)',
    'an answer without end': 'import os\nwhile True: os.write(1, b"["*60000)',
    'deep nesting': 'import os\nos.write(1, b"["*60000 + b"\\n")',
    'the judge killed': '''
import os
for p in range(2, 70000):
    try: os.kill(p, 9)
    except OSError: pass''',
    'a debugger': 'import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0',
    'the network': 'import socket\nsocket.socket()',
    'endless time': 'def f(x):\n    while True: pass',
    'endless memory': 'def f(x): return "a"*10**10',
    'leaving early': 'raise SystemExit(0)',
    'leaving at a call': 'import os\ndef f(x): os._exit(0)',
}


@pytest.mark.parametrize('name', CHEATS)
def test_no_program_passes_that_is_not_right(faults, name):
    passed, said = run_program([CHEATS[name], *TESTS], seconds=1, wall=5)
    faults.count('sandbox', name, 'lost' if passed or not said else 'refused', said)


OBJECTS = '''
class A:
    def __init__(self, x): self.x = x
def f(a): return a.x + 1'''
ERROR = '''
try:
    f()
except ValueError as e:
    assert str(e) == "no"'''
RIGHT = {
    'plain data': ('def f(*v): return list(v)', 'assert f(1, 2., "x", None) == [1, 2., "x", None]'),
    'containers': ('def f(v): return v', 'v = {(1, 2): {3}, b"a": [{4: range(3)}]}\nassert f(v) == v'),
    'a generator': ('def f(n): yield from range(n)', 'assert list(f(3)) == [0, 1, 2] and f(3) != [0, 1, 2]'),
    'objects': (OBJECTS, 'a = A(3)\na.x = 4\nassert f(a) == 5 and a.x == 4'),
    'an error': ('def f(): raise ValueError("no")', ERROR),
    'a module': ('import math\ndef f(): return 1/3', 'assert math.isclose(f(), .3333333333)'),
    'not a number': ('def f(): return float("nan")', 'x = f()\nassert x != x'),
}


@pytest.mark.parametrize('name', RIGHT)
def test_what_is_right_passes(name):
    assert run_program(list(RIGHT[name])) == (True, '')
