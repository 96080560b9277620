"What can happen to a file and to a process that writes: damage, kills, a disk that is full."
import atexit
import errno
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

import numpy as np


# Damage to a file's bytes

def _flip(data, rng):
    at, bit = rng.integers(len(data)), rng.integers(8)
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at+1:]


def _overwrite(data, rng):
    at = rng.integers(len(data))
    return data[:at] + rng.bytes(min(16, len(data) - at)) + data[at+16:]


def _zero_tail(data, rng):
    keep = rng.integers(len(data))
    return data[:keep] + bytes(len(data) - keep)


def _zero_block(data, rng):
    at = rng.integers(len(data))
    size = min(len(data)//4 + 1, len(data) - at)
    return data[:at] + bytes(size) + data[at+size:]


def _swap(data, rng): # the two parts of the file
    at = rng.integers(1, len(data)) if len(data) > 1 else 0
    return data[at:] + data[:at]


def _double(data, rng): # a block stands twice
    at = rng.integers(len(data))
    return data[:at] + data[at//2:at] + data[at:]


DAMAGE = {
    'one bit flipped': _flip,
    '16 bytes overwritten': _overwrite,
    'tail zeroed': _zero_tail,
    'a quarter zeroed': _zero_block,
    'cut short': lambda data, rng: data[:rng.integers(len(data))],
    'emptied': lambda data, rng: b'',
    'bytes appended': lambda data, rng: data + rng.bytes(8),
    'parts swapped': _swap,
    'a block twice': _double,
    'other bytes': lambda data, rng: rng.bytes(len(data)),
}


def damages(data:bytes, each:int=1, seed:int=0): # each: tries of every kind
    "Pairs (kind of damage, the damaged bytes), none equal to `data`."
    rng = np.random.default_rng(seed)
    for kind, damage in DAMAGE.items():
        for _ in range(1 if kind == 'emptied' else each):
            bad = damage(data, rng)
            if bad != data:
                yield kind, bad


# Kills: the process dies when it is about to change the file system for the n-th time

CHANGES = {'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.truncate', 'os.link', 'os.symlink'}


def _writes(event, args): # of `sys.addaudithook`
    if event == 'open':
        flags = args[2] if isinstance(args[2], int) else 0
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and args[0] != os.devnull
    return event in CHANGES


def fork(work) -> int: # number of the process
    "Begin `work()` in a forked process, which ends at once after it: with 0, or with 1 where it raises."
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        atexit._clear()                      # what pytest does at its end is not for this process
        os.fsync = lambda fd: None           # nobody pulls the plug
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(child) -> int: # exit status; negative: the signal that ended it
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_write(work, n:int) -> bool: # did it die? False: it ended before the n-th change
    """Run `work()` in a process that is killed when it would change the file system for the n-th time.
    Processes that it forks live on."""
    def counted():
        left, me = [n], os.getpid()
        def count(event, args):
            if _writes(event, args) and os.getpid() == me:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        work()
    status = ended(fork(counted))
    assert status in (0, -signal.SIGKILL), f'it failed by itself: {status}'
    return status != 0


def kills(work, fresh, every:int=1, most:int=500):
    "Kill `work()` at each write in turn, after `fresh()` has put things in order; yields the write's number."
    for n in range(1, most, every):
        fresh()
        if not killed_at_write(work, n):
            return
        yield n
    raise AssertionError(f'more than {most} writes')


# Full disks

def torn_at(work, size:int) -> int: # exit status
    "Run `work()` in a process that dies in the middle of a write, when a file would exceed `size` bytes."
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()
    return ended(fork(limited))


class FullDisk:
    "Every write of a file under `folder` fails with ENOSPC, from the n-th opening on, as long as it is open."
    def __init__(self, monkeypatch, folder, after=0):
        self.left, self.folder, self.open = after, Path(folder).resolve(), open
        monkeypatch.setattr('builtins.open', self._open)

    def _open(self, file, mode='r', *args, **kwargs):
        f = self.open(file, mode, *args, **kwargs)
        inside = isinstance(file, (str, Path)) and Path(file).resolve().is_relative_to(self.folder)
        if inside and set(mode) & set('wax+'):
            self.left -= 1
            if self.left < 0:
                return _Full(f)
        return f


class _Full:
    "A file that nothing fits into."
    def __init__(self, f): self.f = f
    def __getattr__(self, name): return getattr(self.f, name)
    def __enter__(self): return self
    def __exit__(self, *args): self.f.close()
    def write(self, data): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.f.name)
