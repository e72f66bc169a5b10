"""SIMD for loops that Numba compiles: a type of 16 fp32 numbers in one register, and its operations.

Numba has no such type, and LLVM's automatic vectorization of a plain loop is fast for long rows only. Addresses are
int64. A word is 4 bytes: an fp32 number, or a pair of bf16. In the functions that generate code, `b` is llvmlite's
IRBuilder.
"""

import math
import operator

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16  # fp32 numbers in one register

_FLOAT, _INT, _HALF = ir.FloatType(), ir.IntType(32), ir.IntType(16)
_FLOATS, _INTS, _HALVES = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _INT, _HALF))
# Sums may be reordered to suit the registers. Infinities and NaN are preserved.
_FLAGS = ("reassoc", "contract", "arcp", "nsz")
_TAYLOR = tuple(math.log(2) ** n / math.factorial(n) for n in range(7))  # of 2^f

inline = njit(error_model="numpy", forceinline=True)


class _Float32x16(types.Type):  # type: ignore[misc]
    def __init__(self):
        super().__init__(name="Float32x16")


FLOAT32X16 = _Float32x16()


@register_model(_Float32x16)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _FLOATS)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bf16 type, which llvmlite lacks."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


def _constant(kind, value):
    return ir.Constant(kind, [value] * LANES)


def _splat(b, value, kind):
    vector = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT, 0))
    return b.shuffle_vector(vector, vector, _constant(_INTS, 0))


def _pointer(b, address, kind):
    return b.inttoptr(address, ir.PointerType(kind))


def _advance(b, address, size):
    return b.add(address, ir.Constant(address.type, size))


def _call_intrinsic(b, name, args):
    kind = ir.FunctionType(_FLOATS, [x.type for x in args])
    return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), args)


def _widen_bf16(b, halves):
    return b.bitcast(b.shl(b.zext(halves, _INTS), _constant(_INTS, 16)), _FLOATS)


def _round_to_bf16(b, x):
    """Round to the nearest bf16, ties to even. NaN keeps its upper half and becomes quiet."""
    bits = b.bitcast(x, _INTS)
    odd = b.and_(b.lshr(bits, _constant(_INTS, 16)), _constant(_INTS, 1))
    up = b.add(b.add(bits, _constant(_INTS, 0x7FFF)), odd)
    bits = b.select(b.fcmp_unordered("uno", x, x), b.or_(bits, _constant(_INTS, 0x400000)), up)
    return b.trunc(b.lshr(bits, _constant(_INTS, 16)), _HALVES)


@intrinsic
def splat(_, x):
    """Copy a number into all 16 lanes."""
    return FLOAT32X16(types.float32), lambda _, b, __, args: _splat(b, args[0], _FLOATS)


@intrinsic
def _load_fp32(_, address):
    return FLOAT32X16(types.int64), lambda _, b, __, args: b.load(_pointer(b, args[0], _FLOATS), align=4)


@intrinsic
def _load_bf16(_, address):
    return FLOAT32X16(types.int64), lambda _, b, __, args: _widen_bf16(
        b, b.load(_pointer(b, args[0], _HALVES), align=2)
    )


@intrinsic
def _store_fp32(_, x, address):
    def generate(context, b, _, args):
        b.store(args[0], _pointer(b, args[1], _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(FLOAT32X16, types.int64), generate


@intrinsic
def _store_bf16(_, x, address):
    def generate(context, b, _, args):
        b.store(_round_to_bf16(b, args[0]), _pointer(b, args[1], _HALVES), align=2)
        return context.get_dummy_value()

    return types.void(FLOAT32X16, types.int64), generate


@inline
def load(address, itemsize):
    """Load the numbers at an address, of `itemsize` bytes each: 2 for bf16, 4 for fp32."""
    if itemsize == 2:
        return _load_bf16(address)
    return _load_fp32(address)


@inline
def store(x, address, itemsize):
    """Store the numbers at an address, rounded to bf16 if `itemsize` is 2."""
    if itemsize == 2:
        _store_bf16(x, address)
    else:
        _store_fp32(x, address)


def _binary(generate):
    @intrinsic
    def operation(_, x, y):
        return FLOAT32X16(FLOAT32X16, FLOAT32X16), lambda _, b, __, args: generate(b, *args)

    return operation


def _overload(symbol, operation):
    @overload(symbol)
    def _(x, y):
        return (lambda x, y: operation(x, y)) if x is FLOAT32X16 and y is FLOAT32X16 else None


_overload(operator.add, _binary(lambda b, x, y: b.fadd(x, y, flags=_FLAGS)))
_overload(operator.sub, _binary(lambda b, x, y: b.fsub(x, y, flags=_FLAGS)))
_overload(operator.mul, _binary(lambda b, x, y: b.fmul(x, y, flags=_FLAGS)))
_overload(operator.truediv, _binary(lambda b, x, y: b.fdiv(x, y, flags=_FLAGS)))


def _larger(b, x, y):
    return b.select(b.fcmp_ordered(">", y, x), y, x)


# If a number is NaN, `larger` and `smaller` return the first one, and `maximum` returns NaN as torch.maximum does.
larger = _binary(_larger)
smaller = _binary(lambda b, x, y: b.select(b.fcmp_ordered("<", y, x), y, x))
maximum = _binary(
    lambda b, x, y: b.select(b.fcmp_unordered("uno", x, x), x, b.select(b.fcmp_unordered(">", y, x), y, x))
)


def _reduction(combine):
    @intrinsic
    def reduction(_, x):
        def generate(_, b, __, args):
            x, count = args[0], LANES
            while count > 1:
                count //= 2
                halves = [
                    ir.Constant(ir.VectorType(_INT, count), [i + start for i in range(count)]) for start in (0, count)
                ]
                x = combine(b, *(b.shuffle_vector(x, x, half) for half in halves))
            return b.extract_element(x, ir.Constant(_INT, 0))

        return types.float32(FLOAT32X16), generate

    return reduction


reduce_sum = _reduction(lambda b, x, y: b.fadd(x, y, flags=_FLAGS))
reduce_max = _reduction(_larger)


@intrinsic
def keep_first(_, x, count, fill):
    """Keep the first `count` numbers of x and replace the others with `fill`."""

    def generate(_, b, __, args):
        x, count, fill = args
        indices = ir.Constant(_INTS, list(range(LANES)))
        mask = b.icmp_signed("<", indices, _splat(b, b.trunc(count, _INT), _INTS))
        return b.select(mask, x, _splat(b, fill, _FLOATS))

    return FLOAT32X16(FLOAT32X16, types.int64, types.float32), generate


@intrinsic
def _round_to_integer(_, x):
    return FLOAT32X16(FLOAT32X16), lambda _, b, __, args: _call_intrinsic(b, "llvm.nearbyint.v16f32", args)


@intrinsic
def _exp2_of_integer(_, x):
    """Compute 2^n of integers n."""

    def generate(_, b, __, args):
        n = b.fptosi(args[0], _INTS)
        return b.bitcast(b.shl(b.add(n, _constant(_INTS, 127)), _constant(_INTS, 23)), _FLOATS)

    return FLOAT32X16(FLOAT32X16), generate


@inline
def exp2(x):
    """Compute 2^x with a relative error of at most 3e-7 for |x| up to 126.

    The result is 2^-126 below that range and infinite from 128 on. NaN stays NaN. 2^x = 2^n 2^f with an integer n and
    |f| <= 1/2, and 2^f is computed by its Taylor series.
    """
    x = smaller(larger(x, splat(np.float32(-126))), splat(np.float32(128)))
    n = _round_to_integer(x)
    f = x - n
    y = splat(np.float32(_TAYLOR[6]))
    y = y * f + splat(np.float32(_TAYLOR[5]))
    y = y * f + splat(np.float32(_TAYLOR[4]))
    y = y * f + splat(np.float32(_TAYLOR[3]))
    y = y * f + splat(np.float32(_TAYLOR[2]))
    y = y * f + splat(np.float32(_TAYLOR[1]))
    y = y * f + splat(np.float32(_TAYLOR[0]))
    return y * _exp2_of_integer(n)


@intrinsic
def interleave(_, low, high):
    """Load 16 bf16 numbers from each of two addresses and interleave them as 16 words."""

    def generate(_, b, __, args):
        low, high = (b.zext(b.load(_pointer(b, x, _HALVES), align=2), _INTS) for x in args)
        return b.bitcast(b.or_(low, b.shl(high, _constant(_INTS, 16))), _FLOATS)

    return FLOAT32X16(types.int64, types.int64), generate


@intrinsic
def transpose(_, x, x_stride, rows, y, y_stride):
    """Transpose 16 rows of 16 words at x to y. Only the first `rows` of them, at least 1, are read.

    The last row read takes the place of missing rows. Strides are bytes.
    """

    def generate(context, b, _, args):
        x, x_stride, rows, y, y_stride = args
        last = b.sub(rows, ir.Constant(rows.type, 1))
        registers = []
        for index in range(LANES):
            row = ir.Constant(rows.type, index)
            row = b.select(b.icmp_signed("<", row, last), row, last)
            registers.append(b.load(_pointer(b, b.add(x, b.mul(row, x_stride)), _INTS), align=2))
        step = 1
        while step < LANES:  # swap blocks of `step` x `step` words across the diagonal
            lower = [i if not i & step else LANES + i - step for i in range(LANES)]
            upper = [i + step if not i & step else LANES + i for i in range(LANES)]
            for row in range(LANES):
                if not row & step:
                    above, below = registers[row], registers[row + step]
                    registers[row] = b.shuffle_vector(above, below, ir.Constant(_INTS, lower))
                    registers[row + step] = b.shuffle_vector(above, below, ir.Constant(_INTS, upper))
            step *= 2
        for words in registers:
            b.store(words, _pointer(b, y, _INTS), align=4)
            y = b.add(y, y_stride)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def tile_product(rows, columns, pairs):
    """Create a function (x, x_stride, y, y_stride, inner, z, z_stride) for z [rows, 16 columns] = x [rows,inner] y.

    x, y and z are addresses, strides are bytes, and z is fp32. The product multiplies words: fp32 numbers or, with
    `pairs`, pairs of bf16 whose two products are added.
    """
    multiply_add = _multiply_add_pairs if pairs else _multiply_add

    @intrinsic
    def product(_, x, x_stride, y, y_stride, inner, z, z_stride):
        def generate(context, b, _, args):
            x, x_stride, y, y_stride, inner, z, z_stride = args
            sums = [
                [cgutils.alloca_once_value(b, _constant(_FLOATS, 0.0)) for _ in range(columns)] for _ in range(rows)
            ]
            with cgutils.for_range(b, inner) as loop:
                row = b.add(y, b.mul(loop.index, y_stride))
                ys = [b.load(_pointer(b, _advance(b, row, 4 * LANES * n), _FLOATS), align=4) for n in range(columns)]
                address = b.add(x, b.shl(loop.index, ir.Constant(loop.index.type, 2)))
                for row_sums in sums:
                    word = _splat(b, b.load(_pointer(b, address, _FLOAT), align=2), _FLOATS)
                    for accumulator, y_values in zip(row_sums, ys, strict=True):
                        b.store(multiply_add(b, b.load(accumulator), word, y_values), accumulator)
                    address = b.add(address, x_stride)
            for row_sums in sums:
                for n, accumulator in enumerate(row_sums):
                    b.store(b.load(accumulator), _pointer(b, _advance(b, z, 4 * LANES * n), _FLOATS), align=4)
                z = b.add(z, z_stride)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return product


def _multiply_add(b, sums, x, y):
    return b.fadd(sums, b.fmul(x, y, flags=_FLAGS), flags=_FLAGS)


def _multiply_add_pairs(b, sums, x, y):
    if torch.cpu._is_avx512_bf16_supported():
        narrow = ir.VectorType(_BFloat(), 2 * LANES)
        return _call_intrinsic(
            b, "llvm.x86.avx512bf16.dpbf16ps.512", [sums, b.bitcast(x, narrow), b.bitcast(y, narrow)]
        )
    x, y = (b.bitcast(z, _INTS) for z in (x, y))
    low = [b.bitcast(b.shl(z, _constant(_INTS, 16)), _FLOATS) for z in (x, y)]
    high = [b.bitcast(b.and_(z, _constant(_INTS, 0xFFFF0000)), _FLOATS) for z in (x, y)]
    return _multiply_add(b, _multiply_add(b, sums, *low), *high)
