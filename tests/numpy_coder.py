"""The range coder in numpy, a symbol of all lanes at a time: slow, and the oracle of the compiled one."""
import numpy as np

from puzzle_research.codec.range_coder import TOP, UNIT, WIDTH


def narrow(size, start, freq, total):
    part = size // total
    offset = part * start
    return offset, np.where(start + freq == total, size - offset, part * freq)


class NumpyEncoder:
    def __init__(self, lanes, capacity=1024):
        self.low, self.range = np.zeros(lanes, np.int64), np.full(lanes, TOP, np.int64)
        self.digits, self.pos = np.zeros((lanes, capacity), np.int8), np.zeros(lanes, np.int64)

    def put(self, start, freq, total):
        offset, self.range = narrow(self.range, start, freq, total)
        self.low += offset
        while (self.range < UNIT).any():
            lanes = np.flatnonzero(self.range < UNIT)
            self.digits[lanes, self.pos[lanes]] = self.low[lanes] // UNIT
            self.low[lanes] = self.low[lanes] % UNIT * 10
            self.range[lanes] *= 10
            self.pos[lanes] += 1

    def finish(self): # -> digits (lanes, capacity), used (lanes,)
        digits, lanes = self.digits.copy(), np.arange(len(self.low))
        short, long = -(-self.low // TOP) * 10, -(-self.low // UNIT)
        digits[lanes, self.pos] = np.where(short * UNIT < self.low + self.range, short, long)
        flat = digits.reshape(-1)
        i = np.flatnonzero(flat > 9)
        while i.size:
            carry = flat[i] // 10
            flat[i] -= 10 * carry
            flat[i - 1] += carry
            i = (i - 1)[flat[i - 1] > 9]
        used = np.where(digits.any(1), digits.shape[1] - (digits[:, ::-1] != 0).argmax(1), 0)
        return digits.astype(np.uint8), used


class NumpyDecoder:
    def __init__(self, digits):
        self.digits = np.pad(digits.astype(np.uint8), ((0, 0), (0, 1)))
        self.code, self.pos = np.zeros(len(digits), np.int64), np.zeros(len(digits), np.int64)
        self.range = np.full(len(digits), TOP, np.int64)
        for _ in range(WIDTH):
            self.read(np.arange(len(digits)))

    def read(self, lanes):
        at = np.minimum(self.pos[lanes], self.digits.shape[1] - 1)
        self.code[lanes] = self.code[lanes] * 10 + self.digits[lanes, at]
        self.pos[lanes] += 1

    def peek(self, total):
        return np.minimum(self.code // (self.range // total), total - 1)

    def skip(self, start, freq, total):
        offset, self.range = narrow(self.range, start, freq, total)
        self.code -= offset
        while (self.range < UNIT).any():
            lanes = np.flatnonzero(self.range < UNIT)
            self.range[lanes] *= 10
            self.read(lanes)
