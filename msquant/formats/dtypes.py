"""The dtypes a model's floating-point tensors may be stored in, and rounding to them."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from msquant.checkpoint.tensor_spec import dtype_code
from msquant.errors import CheckpointError

FLOAT32_SUFFIX = "e_score_correction_bias"
"""How the one tensor ends that is always float32: bfloat16 would round differences between experts away."""

MODEL_DTYPES: dict[str, DTypeLike] = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
}
"""NumPy's type of the dtypes a `config.json` may name."""

DTYPE_CODES = {name: dtype_code(np.dtype(dtype)) for name, dtype in MODEL_DTYPES.items()}
"""The safetensors code of each."""


def model_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype a `config.json` names (`dtype`, in older files `torch_dtype`), or None."""
    value = config.get("dtype") or config.get("torch_dtype")
    return value if isinstance(value, str) else None


def stored_dtype(name: str, dtype: str) -> str:
    """The dtype that a floating-point tensor of a model in `dtype` is stored in."""
    return "float32" if name.endswith(FLOAT32_SUFFIX) else dtype


def cast(name: str, values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Round a tensor to the model's dtype, half to even.

    Args:
        name: the tensor's name, for the error.
        values: float array of any shape.
        dtype: `bfloat16`, `float16` or `float32`.

    Raises:
        CheckpointError: the dtype is unknown, or a value is too large for it.
    """
    if dtype not in MODEL_DTYPES:
        raise CheckpointError(
            f"unknown model dtype {dtype!r}", where=name, remedy=f"use one of {', '.join(MODEL_DTYPES)}"
        )
    with np.errstate(over="ignore"):
        rounded = np.asarray(values).astype(MODEL_DTYPES[dtype])
    if not np.isfinite(rounded.astype(np.float32)).all():
        raise CheckpointError(
            f"holds values that {dtype} cannot hold (largest magnitude {np.abs(values).max():.4g})",
            where=name,
            remedy="quantize the model in bfloat16",
        )
    return rounded
