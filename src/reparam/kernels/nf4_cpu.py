"""NF4 on a CPU, compiled by numba. The results equal those of `nf4_reference`, byte for byte.

Whole blocks are processed by vector code that this file emits as LLVM IR, because LLVM's vectorizer cannot keep a table
in a register: 16 levels of 32 bits fill one AVX-512 register, and one instruction looks up 16 codes. With AVX2, two
registers of 8 levels each are looked up, and the codes tell which of the two counts. Other processors look up the codes
one at a time; the rest is vector arithmetic, which LLVM maps to the processor's vector width. A short last block is
computed by the reference. The kernels are limited by memory bandwidth: unpacking takes about as long as
copying the result.

All is in one file because numba's cache checks only the age of the file of a kernel. Addresses are integers.
A group is 32 entries: 16 bytes of codes, two vectors of values. N blocks, as in `nf4`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from reparam.kernels.nf4_reference import dequantize_reference, magnitudes, quantize_reference
from reparam.kernels.nf4_tables import CODE, DYNAMIC, NESTED_BLOCK, THRESHOLDS, TINY, Statistics
from reparam.kernels.threads import compile_kernel, pointer, spread

_GRAIN = 1 << 18
"""Entries that justify a thread: they take 60 us, handing work to a thread 40 us."""
_MIDDLES = (DYNAMIC[1:] + DYNAMIC[:-1]) / 2
_KINDS = (torch.float32, torch.float16, torch.bfloat16)
LANES = 16
_i1, _i8, _i16, _i32 = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32)
_half, _float = ir.HalfType(), ir.FloatType()
_FEATURES = llvmlite.binding.get_host_cpu_features()
WIDE = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx2") else 1
"""How many codes this processor looks up with one instruction: in a table of 16, or in two of 8."""


def _vector(kind: Any, lanes: int = LANES) -> Any:
    return ir.VectorType(kind, lanes)


def _all(kind: Any, value: float, lanes: int = LANES) -> Any:
    return ir.Constant(_vector(kind, lanes), [value] * lanes)


def _splat(b: Any, value: Any) -> Any:
    """A vector whose lanes all hold the same scalar."""
    empty = ir.Constant(_vector(value.type), ir.Undefined)
    return b.shuffle_vector(b.insert_element(empty, value, _i32(0)), empty, _all(_i32, 0))


def _pick(b: Any, first: Any, second: Any, places: list[int]) -> Any:
    """The elements at these places of two concatenated vectors."""
    return b.shuffle_vector(first, second, ir.Constant(_vector(_i32, len(places)), places))


def _look_up(b: Any, table: Any, index: Any, *, wide: int) -> Any:
    """table [16] of 32-bit elements, index [16] from 0 to 15 -> table[index] [16]."""
    if wide == 8:
        halves = [_pick(b, table, table, list(range(start, start + 8))) for start in (0, 8)]
        name = f"llvm.x86.avx2.perm{'ps' if table.type.element == _float else 'd'}"
        kind = ir.FunctionType(halves[0].type, [halves[0].type, _vector(_i32, 8)])
        permute = cgutils.get_or_insert_function(b.module, kind, name)  # it reads the low 3 bits of an index
        parts = []
        for start in (0, 8):
            own = _pick(b, index, index, list(range(start, start + 8)))
            low, high = (b.call(permute, [half, own]) for half in halves)
            parts.append(b.select(b.icmp_unsigned(">", own, _all(_i32, 7, 8)), high, low))
        return _pick(b, parts[0], parts[1], list(range(LANES)))
    if wide == LANES:
        name = f"llvm.x86.avx512.permvar.{'sf' if table.type.element == _float else 'si'}.512"
        kind = ir.FunctionType(table.type, [table.type, index.type])
        return b.call(cgutils.get_or_insert_function(b.module, kind, name), [table, index])
    found = ir.Constant(table.type, ir.Undefined)
    for lane in range(LANES):
        at = b.extract_element(index, _i32(lane))
        found = b.insert_element(found, b.extract_element(table, at), _i32(lane))
    return found


def _load(b: Any, address: Any, kind: Any) -> Any:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


def _store(b: Any, value: Any, address: Any) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


def _unary(b: Any, name: str, value: Any) -> Any:
    kind = ir.FunctionType(value.type, [value.type])
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v{LANES}f32"), [value])


def _indices(b: Any, codes: Any) -> tuple[Any, Any]:
    """The address of 16 bytes -> the codes in their high halves and in their low halves, each [16] of 32 bits."""
    wide = b.zext(_load(b, codes, _vector(_i8)), _vector(_i32))
    return b.lshr(wide, _all(_i32, 4)), b.and_(wide, _all(_i32, 15))


def _rounded(b: Any, values: Any, dtype: str) -> Any:
    """float32 [16] rounded to float16 or bfloat16 (nearest, ties to even), in the low halves of 32-bit integers."""
    if dtype == "float16":
        return b.zext(b.bitcast(b.fptrunc(values, _vector(_half)), _vector(_i16)), _vector(_i32))
    word = b.bitcast(values, _vector(_i32))
    odd = b.and_(b.lshr(word, _all(_i32, 16)), _all(_i32, 1))
    return b.lshr(b.add(b.add(word, _all(_i32, 0x7FFF)), odd), _all(_i32, 16))


def unpacker(dtype: str, *, wide: int = WIDE) -> Any:
    """f(out, codes, scale, groups): write CODE[code] · scale for `groups` groups, as float32, float16 or bfloat16."""

    def emit(b: Any, out: Any, codes: Any, scale: Any, groups: Any) -> None:
        table = b.fmul(ir.Constant(_vector(_float), CODE.tolist()), _splat(b, scale))
        if dtype != "float32":
            table = _rounded(b, table, dtype)
        with cgutils.for_range(b, groups) as loop:
            high, low = _indices(b, b.add(codes, b.mul(loop.index, codes.type(16))))
            first, second = (_look_up(b, table, index, wide=wide) for index in (high, low))
            if dtype == "float32":
                found = _pick(b, first, second, [lane for k in range(LANES) for lane in (k, LANES + k)])
                width = 128
            else:  # the first of a pair is in the low half, for little-endian memory
                found, width = b.or_(first, b.shl(second, _all(_i32, 16))), 64
            _store(b, found, b.add(out, b.mul(loop.index, out.type(width))))

    return _intrinsic(emit, types.void, (types.uintp, types.uintp, types.float32, types.intp))


def largest(dtype: str) -> Any:
    """f(w, groups) -> float32: the largest magnitude in `groups` groups of entries."""

    def emit(b: Any, w: Any, groups: Any) -> Any:
        most = cgutils.alloca_once_value(b, _all(_float, 0.0))
        with cgutils.for_range(b, groups) as loop:
            for part in range(2):
                size = _unary(b, "fabs", _values(b, w, loop.index, part, dtype))
                old = b.load(most)
                b.store(b.select(b.fcmp_ordered(">", size, old), size, old), most)
        kind = ir.FunctionType(_float, [_vector(_float)])
        reduce = cgutils.get_or_insert_function(b.module, kind, f"llvm.vector.reduce.fmax.v{LANES}f32")
        return b.call(reduce, [b.load(most)])

    return _intrinsic(emit, types.float32, (types.uintp, types.intp))


def quantizer(dtype: str, *, wide: int = WIDE) -> Any:
    """f(codes, w, inverse, groups): write the codes of w · inverse for `groups` groups."""
    thresholds = [*THRESHOLDS.tolist(), float("inf")]

    def emit(b: Any, codes: Any, w: Any, inverse: Any, groups: Any) -> None:
        table, scale = ir.Constant(_vector(_float), thresholds), _splat(b, inverse)
        with cgutils.for_range(b, groups) as loop:
            indices = []
            for part in range(2):
                # No clamp is needed: if rounding the reciprocal gives a value beyond 1 or -1, its code is the same.
                value = b.fmul(_values(b, w, loop.index, part, dtype), scale)
                # Binary search for the number of thresholds below. The first two probes need no table lookup.
                upper = b.fcmp_ordered(">", value, _all(_float, thresholds[7]))
                probe = b.select(upper, _all(_float, thresholds[11]), _all(_float, thresholds[3]))
                index = b.select(upper, _all(_i32, 8), _all(_i32, 0))
                for step in (4, 2, 1):
                    above = b.fcmp_ordered(">", value, probe)
                    index = b.add(index, b.select(above, _all(_i32, step), _all(_i32, 0)))
                    if step > 1:
                        probe = _look_up(b, table, b.add(index, _all(_i32, step // 2 - 1)), wide=wide)
                indices.append(index)
            first, second = indices
            high = _pick(b, first, second, list(range(0, 2 * LANES, 2)))
            low = _pick(b, first, second, list(range(1, 2 * LANES, 2)))
            packed = b.trunc(b.or_(b.shl(high, _all(_i32, 4)), low), _vector(_i8))
            _store(b, packed, b.add(codes, b.mul(loop.index, codes.type(16))))

    return _intrinsic(emit, types.void, (types.uintp, types.uintp, types.float32, types.intp))


def _values(b: Any, w: Any, group: Any, part: int, dtype: str) -> Any:
    """Half of a group of entries (`part` 0 or 1) as float32 [16]."""
    size = 4 if dtype == "float32" else 2
    at = b.add(w, b.add(b.mul(group, w.type(32 * size)), w.type(part * LANES * size)))
    if dtype == "float32":
        return _load(b, at, _vector(_float))
    if dtype == "float16":
        return b.fpext(_load(b, at, _vector(_half)), _vector(_float))
    return b.bitcast(b.shl(b.zext(_load(b, at, _vector(_i16)), _vector(_i32)), _all(_i32, 16)), _vector(_float))


def _intrinsic(emit: Callable[..., Any], returns: Any, takes: tuple[Any, ...]) -> Any:
    """A numba intrinsic of two or four arguments whose body is the LLVM code that `emit` writes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = emit(builder, *args)
        return context.get_dummy_value() if found is None else found

    def two(context: Any, a: Any, b: Any) -> Any:
        return returns(*takes), generate

    def four(context: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return returns(*takes), generate

    return intrinsic({2: two, 4: four}[len(takes)])


def quantize(w: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Like `nf4.quantize`, for a contiguous float32, float16 or bfloat16 tensor on the CPU."""
    n, count = w.numel(), w.numel() // block
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-n // block), dtype=torch.float32)
    at = codes.data_ptr(), absmax.data_ptr(), w.data_ptr()
    spread(_pack, *at, _KINDS.index(w.dtype), block, count, worth=n // _GRAIN, alive=(codes, absmax, w))
    if count < len(absmax):
        short = w.view(-1)[count * block :]
        codes[count * block // 2 :], absmax[count:] = quantize_reference(short, block)
    return codes, absmax


def dequantize(out: Tensor, codes: Tensor, stats: Statistics, block: int, first: int = 0) -> None:
    """Fill `out` (contiguous; float32, float16 or bfloat16) with the entries from block number `first` on."""
    n, count = out.numel(), out.numel() // block
    double = stats.nested is not None
    table = DYNAMIC if stats.map is None else stats.map
    parts = [codes, stats.absmax, *((stats.nested, stats.offset, table) if double else ())]
    parts = [part.contiguous() for part in parts if part is not None]  # normally no copy
    at = [part.data_ptr() for part in parts] + [0] * (5 - len(parts))
    numbers = out.data_ptr(), *at, double, _KINDS.index(out.dtype), block, first, count
    spread(_unpack, *numbers, worth=n // _GRAIN, alive=(out, parts))
    if count * block < n:
        last = Statistics(magnitudes(stats, torch.tensor([first + count])))
        rest, size = codes[(first + count) * block // 2 :], n - count * block
        short = dequantize_reference(rest, last, block=block, count=size, dtype=out.dtype)
        out.view(-1)[count * block :] = short


def nearest_code(scaled: Tensor) -> Tensor:
    """Like `nf4_reference.nearest_code`, for float32 on the CPU."""
    scaled = scaled.contiguous()
    codes = torch.empty(scaled.shape, dtype=torch.uint8)
    at = codes.data_ptr(), scaled.data_ptr(), _MIDDLES.data_ptr()
    spread(_search, *at, scaled.numel(), worth=scaled.numel() // _GRAIN, alive=(codes, scaled))
    return codes


def _search_walk(codes_at: int, x_at: int, middles_at: int, n: int, share: int, shares: int) -> bool:
    """One of `shares` equal shares of the numbers: binary search for the count of midpoints below each."""
    codes = numba.carray(pointer(codes_at), (n,), np.uint8)
    x = numba.carray(pointer(x_at), (n,), np.float32)
    middles = numba.carray(pointer(middles_at), (255,), np.float32)
    for i in range(n * share // shares, n * (share + 1) // shares):
        index, value = 0, x[i]
        index += 128 if value > middles[index + 127] else 0
        index += 64 if value > middles[index + 63] else 0
        index += 32 if value > middles[index + 31] else 0
        index += 16 if value > middles[index + 15] else 0
        index += 8 if value > middles[index + 7] else 0
        index += 4 if value > middles[index + 3] else 0
        index += 2 if value > middles[index + 1] else 0
        index += 1 if value > middles[index] else 0
        codes[i] = index
    return True


def _pack_walk(codes: int, absmax_at: int, w: int, kind: int, block: int, blocks: int, share: int, shares: int) -> bool:
    """Quantize one of `shares` equal shares of the whole blocks."""
    absmax = numba.carray(pointer(absmax_at), (blocks,), np.float32)
    size = 4 if kind == 0 else 2
    for j in range(blocks * share // shares, blocks * (share + 1) // shares):
        entries, place, groups = w + j * block * size, codes + j * (block // 2), block // 32
        if kind == 0:
            c = _largest32(entries, groups)
        elif kind == 1:
            c = _largest16(entries, groups)
        else:
            c = _largest_b16(entries, groups)
        absmax[j] = c
        inverse = np.float32(1) / max(c, np.float32(TINY))
        if kind == 0:
            _quantizer32(place, entries, inverse, groups)
        elif kind == 1:
            _quantizer16(place, entries, inverse, groups)
        else:
            _quantizer_b16(place, entries, inverse, groups)
    return True


def _unpack_walk(
    out: int, codes: int, absmax_at: int, nested_at: int, offset_at: int, map_at: int,
    double: int, kind: int, block: int, first: int, blocks: int, share: int, shares: int,
) -> bool:  # fmt: skip
    """Dequantize one of `shares` equal shares of the whole blocks."""
    stop = first + blocks
    absmax = numba.carray(pointer(absmax_at), (stop,), np.float32)
    short = numba.carray(pointer(absmax_at), (stop,), np.uint8)
    nested = numba.carray(pointer(nested_at), (stop // NESTED_BLOCK + 1,), np.float32)
    offset = numba.carray(pointer(offset_at), (1,), np.float32)
    table = numba.carray(pointer(map_at), (256,), np.float32)
    size = 4 if kind == 0 else 2
    for j in range(blocks * share // shares, blocks * (share + 1) // shares):
        k = first + j
        c = table[short[k]] * nested[k // NESTED_BLOCK] + offset[0] if double else absmax[k]
        place, bytes_, groups = out + j * block * size, codes + k * (block // 2), block // 32
        if kind == 0:
            _unpacker32(place, bytes_, c, groups)
        elif kind == 1:
            _unpacker16(place, bytes_, c, groups)
        else:
            _unpacker_b16(place, bytes_, c, groups)
    return True


_unpacker32, _unpacker16, _unpacker_b16 = unpacker("float32"), unpacker("float16"), unpacker("bfloat16")
_largest32, _largest16, _largest_b16 = largest("float32"), largest("float16"), largest("bfloat16")
_quantizer32, _quantizer16, _quantizer_b16 = quantizer("float32"), quantizer("float16"), quantizer("bfloat16")
_pack = compile_kernel(_pack_walk, fastmath=set())
_unpack = compile_kernel(_unpack_walk, fastmath=set())
_search = compile_kernel(_search_walk, fastmath=set())
