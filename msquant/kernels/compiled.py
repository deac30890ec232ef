"""Loops over every weight, compiled by LLVM when they are first needed.

NumPy makes a pass over memory for each step of rounding, and takes Python's lock between any two of them.
Here a number goes from what is stored to an integer while it is in a register, and the lock is free all the
while, so that other threads hash and write. Nothing is reordered or fused, so that each result has the bits
that NumPy's own steps give it. The loops are compiled in a tenth of a second, in memory; numba, which would
write them from Python, takes two seconds of a core at every start and keeps them in pickle files.

All work on runs: as many neighbouring numbers as share a scale, one run behind the other.
"""

import ctypes
import threading
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

# %i counts runs and %place their numbers, which lie %length to a run; %columns are as many as have a factor.
_LOOPS = """
define void @{name}(ptr noalias %codes, ptr noalias %runs, ptr noalias %factors, ptr noalias %out,
                    i64 %count, i64 %length, i64 %columns, float %high) {{
entry:
  %empty = icmp eq i64 %count, 0
  %short = icmp eq i64 %length, 0
  %nothing = or i1 %empty, %short
  br i1 %nothing, label %end, label %run
run:
  %i = phi i64 [ 0, %entry ], [ %next_i, %run_end ]
  %first = mul i64 %i, %length
  {before}
  br label %number
number:
  %j = phi i64 [ 0, %run ], [ %next_j, %number ]
  {carried}
  %place = add i64 %first, %j
  %at = getelementptr {code}, ptr %codes, i64 %place
  %stored = load {code}, ptr %at
  {body}
  %next_j = add i64 %j, 1
  %more = icmp ult i64 %next_j, %length
  br i1 %more, label %number, label %run_end
run_end:
  {after}
  %next_i = add i64 %i, 1
  %further = icmp ult i64 %next_i, %count
  br i1 %further, label %run, label %end
end:
  ret void
}}
"""

_PARAMETER = """
  %at_run = getelementptr float, ptr %runs, i64 %i
  %parameter = load float, ptr %at_run"""

# A bfloat16 is the upper half of a float32.
_BFLOAT16 = """
  %wide = zext i16 %stored to i32
  %bits = shl i32 %wide, 16
  %value = bitcast i32 %bits to float
  %scaled = fdiv float %value, %parameter"""

# As `msquant.checkpoint.fp8.spread` has it: the bits where float32 has them, the sign among them.
_FLOAT8 = """
  %wide = sext i8 %stored to i32
  %shifted = shl i32 %wide, 20
  %bits = and i32 %shifted, 2280652800
  %value = bitcast i32 %bits to float
  %scaled = fmul float %value, %parameter"""

# A weight whose columns are multiplied by a smooth scale; several runs may share a row.
_START = """
  %start = urem i64 %first, %columns"""

_SMOOTHED = """
  %column = add i64 %start, %j
  %at_factor = getelementptr float, ptr %factors, i64 %column
  %factor = load float, ptr %at_factor
  %smoothed = fmul float %stored, %factor"""

_ROUND = """
  %whole = call float @llvm.rint.f32(float %scaled)
  %above = fcmp ogt float %whole, %high
  %least = select i1 %above, float %high, float %whole
  %integer = fptosi float %least to i32
  %small = trunc i32 %integer to i8
  %to = getelementptr i8, ptr %out, i64 %place
  store i8 %small, ptr %to"""

# Without its sign, a code is the greater the greater its value is; infinity and then NaN are the last.
_MAXIMUM = """
  %unsigned = and {bits} {number}, {mask}
  %greater = icmp ugt {bits} %unsigned, %greatest
  %greatest_now = select i1 %greater, {bits} %unsigned, {bits} %greatest"""

_KEEP_MAXIMUM = """
  %to = getelementptr {bits}, ptr %out, i64 %i
  store {bits} %greatest_now, ptr %to"""

_ARGUMENTS = (ctypes.c_void_p,) * 4 + (ctypes.c_int64,) * 3 + (ctypes.c_float,)


def bfloat16_maxima(codes: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """The greatest magnitude in each run of bfloat16 codes, as a code: uint16 `[R, k]` to `[R]`."""
    return _maxima("bfloat16_maxima", codes, np.uint16)


def float8_maxima(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The greatest code without its sign in each run of E4M3 codes: uint8 `[R, k]` to `[R]`."""
    return _maxima("float8_maxima", codes, np.uint8)


def round_bfloat16(
    codes: NDArray[np.uint16], scale: NDArray[np.float32], high: int, out: NDArray[np.int8]
) -> None:
    """Write `min(round(w / scale), high)`, half to even, of bfloat16 codes into `out`.

    Args:
        codes: of w, uint16 `[R, k]`.
        scale: of each run, float32 `[R]`.
        high: the greatest integer.
        out: int8 `[R, k]`; of what is not finite, it gets any integers.
    """
    _round("round_bfloat16", codes, np.uint16, scale, high, out)


def round_float8(
    codes: NDArray[np.uint8], factors: NDArray[np.float32], high: int, out: NDArray[np.int8]
) -> None:
    """Write `min(round(value factor), high)`, half to even, of E4M3 codes into `out`.

    Args:
        codes: uint8 `[R, k]`; value is what a code stands for, divided by `msquant.checkpoint.fp8.SHIFT`.
        factors: of each run, float32 `[R]`.
        high: the greatest integer.
        out: int8 `[R, k]`.
    """
    _round("round_float8", codes, np.uint8, factors, high, out)


def smoothed_maxima(weight: NDArray[np.float32], smooth_scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The greatest magnitude in each run of a weight whose columns are multiplied by a smooth scale.

    Args:
        weight: `[R, k]`.
        smooth_scale: `[K]`, K a multiple of k: of each row, which is one run or several.

    Returns:
        float32 `[R]`.
    """
    _check_factors(weight, smooth_scale)
    return _maxima("smoothed_maxima", weight, np.float32, smooth_scale)


def round_smoothed(
    weight: NDArray[np.float32],
    smooth_scale: NDArray[np.float32],
    scale: NDArray[np.float32],
    high: int,
    out: NDArray[np.int8],
) -> None:
    """Write `min(round(w smooth_scale / scale), high)`, half to even, into `out`.

    Args:
        weight: float32 `[R, k]`.
        smooth_scale: as for `smoothed_maxima`.
        scale: of each run, float32 `[R]`.
        high: the greatest integer.
        out: int8 `[R, k]`; of what is not finite, it gets any integers.
    """
    _check_factors(weight, smooth_scale)
    _round("round_smoothed", weight, np.float32, scale, high, out, smooth_scale)


def _maxima(
    name: str, codes: NDArray[Any], dtype: Any, factors: NDArray[np.float32] | None = None
) -> NDArray[Any]:
    out = np.empty(len(codes), codes.dtype)
    if not codes.shape[1]:
        out[:] = 0
    _check(codes, dtype, codes.shape)
    _run(name, codes, None, factors, out, 0)
    return out


def _round(
    name: str,
    codes: NDArray[Any],
    dtype: Any,
    runs: NDArray[np.float32],
    high: int,
    out: NDArray[np.int8],
    factors: NDArray[np.float32] | None = None,
) -> None:
    _check(codes, dtype, codes.shape)
    _check(runs, np.float32, codes.shape[:1])
    _check(out, np.int8, codes.shape)
    _run(name, codes, runs, factors, out, high)


def _run(
    name: str,
    codes: NDArray[Any],
    runs: NDArray[np.float32] | None,
    factors: NDArray[np.float32] | None,
    out: NDArray[Any],
    high: int,
) -> None:
    addresses = [None if array is None else array.ctypes.data for array in (codes, runs, factors, out)]
    columns = 0 if factors is None else len(factors)
    _loops()[name](*addresses, *codes.shape, columns, float(high))


def _check_factors(weight: NDArray[Any], factors: NDArray[Any]) -> None:
    _check(factors, np.float32, (factors.size,))
    if not weight.shape[1] or factors.size % weight.shape[1]:
        raise ValueError(f"runs of {weight.shape[1]} do not make rows of {factors.size}")


def _check(array: NDArray[Any], dtype: Any, shape: tuple[int, ...]) -> None:
    """Machine code reads and writes wherever it is told to."""
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"{array.dtype} {array.shape} is given, contiguous {np.dtype(dtype)} {shape} is needed"
        )


def _maximum(
    name: str, code: str, bits: str, mask: int, number: str = "%stored", before: str = "", body: str = ""
) -> str:
    return _LOOPS.format(
        name=name,
        code=code,
        before=before,
        carried=f"%greatest = phi {bits} [ 0, %run ], [ %greatest_now, %number ]",
        body=body + _MAXIMUM.format(bits=bits, number=number, mask=mask),
        after=_KEEP_MAXIMUM.format(bits=bits),
    )


def _rounding(name: str, code: str, body: str, before: str = "") -> str:
    before = _PARAMETER + before
    return _LOOPS.format(name=name, code=code, before=before, carried="", body=body + _ROUND, after="")


_compiling = threading.Lock()


def _loops() -> dict[str, Any]:
    """Each loop by its name, compiled by the first thread that asks, while others wait."""
    with _compiling:
        return _compiled()


@cache
def _compiled() -> dict[str, Any]:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    sources = {
        "bfloat16_maxima": _maximum("bfloat16_maxima", "i16", "i16", 0x7FFF),
        "float8_maxima": _maximum("float8_maxima", "i8", "i8", 0x7F),
        "smoothed_maxima": _maximum(
            *("smoothed_maxima", "float", "i32", 0x7FFFFFFF, "%magnitude", _START),
            _SMOOTHED + "\n  %magnitude = bitcast float %smoothed to i32",
        ),
        "round_bfloat16": _rounding("round_bfloat16", "i16", _BFLOAT16),
        "round_float8": _rounding("round_float8", "i8", _FLOAT8),
        "round_smoothed": _rounding(
            *("round_smoothed", "float", _SMOOTHED + "\n  %scaled = fdiv float %smoothed, %parameter", _START)
        ),
    }
    module = binding.parse_assembly("declare float @llvm.rint.f32(float)\n" + "".join(sources.values()))
    module.verify()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
    )
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = True
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    # The machine code lives as long as its engine: the last entry keeps it to the end of the process.
    kind = ctypes.CFUNCTYPE(None, *_ARGUMENTS)
    return {**{name: kind(engine.get_function_address(name)) for name in sources}, "": engine}
