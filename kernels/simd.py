"""SIMD: 16 fp32 numbers in one register, for loops that Numba compiles.

Numba has no such type, and what LLVM makes of a plain loop by itself is fast for long rows alone. Addresses are int64.
A word is 4 bytes: an fp32 number, or a pair of bf16.
"""

import math
import operator

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

COUNT = 16

_FLOAT, _INT, _HALF = ir.FloatType(), ir.IntType(32), ir.IntType(16)
_FLOATS, _INTS, _HALVES = (ir.VectorType(kind, COUNT) for kind in (_FLOAT, _INT, _HALF))
# Sums may be taken in any order, as registers need it; what is infinite or not a number stays so.
_FLAGS = ("reassoc", "contract", "arcp", "nsz")
_TAYLOR = tuple(math.log(2) ** n / math.factorial(n) for n in range(7))  # of 2^f

helper = njit(error_model="numpy", forceinline=True)


class _Lanes(types.Type):  # type: ignore[misc]
    def __init__(self):
        super().__init__(name="Lanes")


LANES = _Lanes()


@register_model(_Lanes)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _FLOATS)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bf16, which llvmlite does not know."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


def _same(kind, value):
    return ir.Constant(kind, [value] * COUNT)


def _splat(b, value, kind):
    one = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT, 0))
    return b.shuffle_vector(one, one, _same(_INTS, 0))


def _at(b, address, kind):
    return b.inttoptr(address, ir.PointerType(kind))


def _further(b, address, count):
    return b.add(address, ir.Constant(address.type, count))


def _call(b, name, given):
    kind = ir.FunctionType(_FLOATS, [x.type for x in given])
    return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), given)


def _widen(b, halves):
    return b.bitcast(b.shl(b.zext(halves, _INTS), _same(_INTS, 16)), _FLOATS)


def _round(b, x):
    """To the nearest bf16 or else to even; of a NaN the upper half is kept, made quiet."""
    bits = b.bitcast(x, _INTS)
    odd = b.and_(b.lshr(bits, _same(_INTS, 16)), _same(_INTS, 1))
    up = b.add(b.add(bits, _same(_INTS, 0x7FFF)), odd)
    bits = b.select(b.fcmp_unordered("uno", x, x), b.or_(bits, _same(_INTS, 0x400000)), up)
    return b.trunc(b.lshr(bits, _same(_INTS, 16)), _HALVES)


@intrinsic
def splat(_, x):
    """A number, 16 times."""
    return LANES(types.float32), lambda _, b, __, given: _splat(b, given[0], _FLOATS)


@intrinsic
def _load_wide(_, address):
    return LANES(types.int64), lambda _, b, __, given: b.load(_at(b, given[0], _FLOATS), align=4)


@intrinsic
def _load_narrow(_, address):
    return LANES(types.int64), lambda _, b, __, given: _widen(b, b.load(_at(b, given[0], _HALVES), align=2))


@intrinsic
def _store_wide(_, x, address):
    def generate(context, b, _, given):
        b.store(given[0], _at(b, given[1], _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(LANES, types.int64), generate


@intrinsic
def _store_narrow(_, x, address):
    def generate(context, b, _, given):
        b.store(_round(b, given[0]), _at(b, given[1], _HALVES), align=2)
        return context.get_dummy_value()

    return types.void(LANES, types.int64), generate


@helper
def load(address, size):
    """The numbers at an address, of `size` bytes each: 2 are bf16, 4 are fp32."""
    if size == 2:
        return _load_narrow(address)
    return _load_wide(address)


@helper
def store(x, address, size):
    """The numbers to an address, rounded where they have 2 bytes."""
    if size == 2:
        _store_narrow(x, address)
    else:
        _store_wide(x, address)


def _binary(generate):
    @intrinsic
    def operation(_, x, y):
        return LANES(LANES, LANES), lambda _, b, __, given: generate(b, *given)

    return operation


def _overload(symbol, operation):
    @overload(symbol)
    def _(x, y):
        return (lambda x, y: operation(x, y)) if x is LANES and y is LANES else None


_overload(operator.add, _binary(lambda b, x, y: b.fadd(x, y, flags=_FLAGS)))
_overload(operator.sub, _binary(lambda b, x, y: b.fsub(x, y, flags=_FLAGS)))
_overload(operator.mul, _binary(lambda b, x, y: b.fmul(x, y, flags=_FLAGS)))
_overload(operator.truediv, _binary(lambda b, x, y: b.fdiv(x, y, flags=_FLAGS)))


def _larger(b, x, y):
    return b.select(b.fcmp_ordered(">", y, x), y, x)


def _maximum(b, x, y):
    """As torch.maximum: not a number where one of them is not."""
    return b.select(b.fcmp_unordered("uno", x, x), x, b.select(b.fcmp_unordered(">", y, x), y, x))


maximum = _binary(_maximum)
larger = _binary(_larger)  # of each two numbers; the first where one is not a number
# As torch.maximum: not a number where one of them is not.
maximum = _binary(
    lambda b, x, y: b.select(b.fcmp_unordered("uno", x, x), x, b.select(b.fcmp_unordered(">", y, x), y, x))
)
smaller = _binary(lambda b, x, y: b.select(b.fcmp_ordered("<", y, x), y, x))


def _reduction(combine):
    @intrinsic
    def reduction(_, x):
        def generate(_, b, __, given):
            x, count = given[0], COUNT
            while count > 1:
                count //= 2
                halves = [ir.Constant(ir.VectorType(_INT, count), [i + at for i in range(count)]) for at in (0, count)]
                x = combine(b, *(b.shuffle_vector(x, x, half) for half in halves))
            return b.extract_element(x, ir.Constant(_INT, 0))

        return types.float32(LANES), generate

    return reduction


total = _reduction(lambda b, x, y: b.fadd(x, y, flags=_FLAGS))
largest = _reduction(_larger)


@intrinsic
def first(_, x, count, other):
    """The first `count` numbers of x, `other` behind them."""

    def generate(_, b, __, given):
        x, count, other = given
        places = ir.Constant(_INTS, list(range(COUNT)))
        kept = b.icmp_signed("<", places, _splat(b, b.trunc(count, _INT), _INTS))
        return b.select(kept, x, _splat(b, other, _FLOATS))

    return LANES(LANES, types.int64, types.float32), generate


@intrinsic
def _nearest_whole(_, x):
    return LANES(LANES), lambda _, b, __, given: _call(b, "llvm.nearbyint.v16f32", given)


@intrinsic
def _two_to_whole(_, x):
    """2^n of whole numbers n."""

    def generate(_, b, __, given):
        n = b.fptosi(given[0], _INTS)
        return b.bitcast(b.shl(b.add(n, _same(_INTS, 127)), _same(_INTS, 23)), _FLOATS)

    return LANES(LANES), generate


@helper
def exp2(x):
    """2^x within 3e-7 of itself for |x| up to 126, 2^-126 below and infinite from 128 on; NaN stays NaN.

    2^x = 2^n 2^f with n whole and |f| <= 1/2; 2^f is its Taylor series.
    """
    x = smaller(larger(x, splat(np.float32(-126))), splat(np.float32(128)))
    n = _nearest_whole(x)
    f = x - n
    y = splat(np.float32(_TAYLOR[6]))
    y = y * f + splat(np.float32(_TAYLOR[5]))
    y = y * f + splat(np.float32(_TAYLOR[4]))
    y = y * f + splat(np.float32(_TAYLOR[3]))
    y = y * f + splat(np.float32(_TAYLOR[2]))
    y = y * f + splat(np.float32(_TAYLOR[1]))
    y = y * f + splat(np.float32(_TAYLOR[0]))
    return y * _two_to_whole(n)


@intrinsic
def interleave(_, low, high):
    """16 bf16 numbers each of two addresses, side by side as 16 words."""

    def generate(_, b, __, given):
        low, high = (b.zext(b.load(_at(b, x, _HALVES), align=2), _INTS) for x in given)
        return b.bitcast(b.or_(low, b.shl(high, _same(_INTS, 16))), _FLOATS)

    return LANES(types.int64, types.int64), generate


@intrinsic
def transpose(_, x, x_stride, rows, y, y_stride):
    """16 words of each of the first `rows` of 16 rows, at least 1, at x -> the same words side by side at y.

    Instead of rows that are not there the last one is taken. Strides are bytes.
    """

    def generate(context, b, _, given):
        x, x_stride, rows, y, y_stride = given
        last = b.sub(rows, ir.Constant(rows.type, 1))
        found = []
        for number in range(COUNT):
            row = ir.Constant(rows.type, number)
            row = b.select(b.icmp_signed("<", row, last), row, last)
            found.append(b.load(_at(b, b.add(x, b.mul(row, x_stride)), _INTS), align=2))
        step = 1
        while step < COUNT:  # swap blocks of `step` x `step` words across the diagonal
            lower = [i if not i & step else COUNT + i - step for i in range(COUNT)]
            upper = [i + step if not i & step else COUNT + i for i in range(COUNT)]
            for row in range(COUNT):
                if not row & step:
                    one, other = found[row], found[row + step]
                    found[row] = b.shuffle_vector(one, other, ir.Constant(_INTS, lower))
                    found[row + step] = b.shuffle_vector(one, other, ir.Constant(_INTS, upper))
            step *= 2
        for words in found:
            b.store(words, _at(b, y, _INTS), align=4)
            y = b.add(y, y_stride)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def tile(rows, columns, pairs):
    """A function (x, x_stride, y, y_stride, inner, z, z_stride): z [rows, 16 columns] = x [rows,inner] y.

    All are addresses, and strides are bytes. What is multiplied are words: fp32 numbers, or with `pairs` pairs of bf16,
    of which both products are added; z is fp32.
    """
    multiply_add = _multiply_add_pairs if pairs else _multiply_add

    @intrinsic
    def product(_, x, x_stride, y, y_stride, inner, z, z_stride):
        def generate(context, b, _, given):
            x, x_stride, y, y_stride, inner, z, z_stride = given
            sums = [[cgutils.alloca_once_value(b, _same(_FLOATS, 0.0)) for _ in range(columns)] for _ in range(rows)]
            with cgutils.for_range(b, inner) as loop:
                row = b.add(y, b.mul(loop.index, y_stride))
                ys = [b.load(_at(b, _further(b, row, 4 * COUNT * n), _FLOATS), align=4) for n in range(columns)]
                at = b.add(x, b.shl(loop.index, ir.Constant(loop.index.type, 2)))
                for own in sums:
                    word = _splat(b, b.load(_at(b, at, _FLOAT), align=2), _FLOATS)
                    for place, other in zip(own, ys, strict=True):
                        b.store(multiply_add(b, b.load(place), word, other), place)
                    at = b.add(at, x_stride)
            for own in sums:
                for n, place in enumerate(own):
                    b.store(b.load(place), _at(b, _further(b, z, 4 * COUNT * n), _FLOATS), align=4)
                z = b.add(z, z_stride)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return product


def _multiply_add(b, sums, x, y):
    return b.fadd(sums, b.fmul(x, y, flags=_FLAGS), flags=_FLAGS)


def _multiply_add_pairs(b, sums, x, y):
    if torch.cpu._is_avx512_bf16_supported():
        narrow = ir.VectorType(_BFloat(), 2 * COUNT)
        return _call(b, "llvm.x86.avx512bf16.dpbf16ps.512", [sums, b.bitcast(x, narrow), b.bitcast(y, narrow)])
    x, y = (b.bitcast(z, _INTS) for z in (x, y))
    low = [b.bitcast(b.shl(z, _same(_INTS, 16)), _FLOATS) for z in (x, y)]
    high = [b.bitcast(b.and_(z, _same(_INTS, 0xFFFF0000)), _FLOATS) for z in (x, y)]
    return _multiply_add(b, _multiply_add(b, sums, *low), *high)
