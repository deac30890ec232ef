"""The tensors of one linear layer whose weight is in `qweight`, checked and read.

Of a layer with N outputs, K inputs and G groups, `held` integers being in 32 bits:

| tensor | GPTQ | AWQ |
|---|---|---|
| `qweight` int32 | `[K / held, N]`, neighbouring inputs in one | `[K, N / held]` in `AWQ.order` |
| `qzeros` int32 | `[G, N / held]`, in `gptq` less 1 | `[G, N / held]`, in `AWQ.order` |
| `scales` | `[G, N]` | `[G, N]` |
| `g_idx` int32, may be missing | `[K]`, the group of each input | - |

    y = (scales * (qweight - qzeros)) @ x + bias

Read in GPTQModel 7.6.0 (nn_modules/qlinear/__init__.py: `pack_block`; quantization/awq/utils/
packing_utils.py: `pack_awq`, `dequantize_gemm`) and AutoRound 0.16.1 (auto_round_extension/torch/
qlinear_torch.py and qlinear_torch_zp.py; export/export_to_awq/utils.py).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.weights import QuantizedLinear
from msquant.errors import CheckpointError
from msquant.formats.folder_rules import FLOAT_CODES, Finding, Parts, check_parts
from msquant.formats.packed_words import WORD_BITS, column_groups, unpack
from msquant.formats.qweight.section import Layer, Packing
from msquant.formats.scales import all_signed

WEIGHT, ZEROS, SCALES, ORDER = "qweight", "qzeros", "scales", "g_idx"
PARTS = (WEIGHT, ZEROS, SCALES)
"""The tensors of a layer; `g_idx` and the layer's own `bias` are the only other ones."""

_INT32 = frozenset({"I32"})


def stored_shape(checkpoint: Checkpoint, module: str, layer: Layer) -> tuple[int, int]:
    """The shape `(N, K)` of a layer by its `qweight`.

    Raises:
        CheckpointError: that is no matrix.
    """
    name = f"{module}.{WEIGHT}"
    shape, held = checkpoint.shape(name), WORD_BITS // layer.bits
    if len(shape) != 2:
        raise CheckpointError(
            f"{name} has shape {list(shape)}, a matrix is expected", where=checkpoint.shard_path(name)
        )
    return (shape[1], shape[0] * held) if layer.packing.along_inputs else (shape[1] * held, shape[0])


def check_layout(checkpoint: Checkpoint, module: str, layer: Layer) -> list[Finding]:
    """Check the names, dtypes and shapes of a layer's tensors, from the headers alone."""
    found = [
        Finding(f"{module}.{part}", "missing from a quantized layer")
        for part in PARTS
        if f"{module}.{part}" not in checkpoint
    ]
    known = {f"{module}.{part}" for part in (*PARTS, ORDER, "bias")}
    found += [
        Finding(name, "is no tensor of this layout: what it changes is not known")
        for name in checkpoint.by_module.get(module, ())
        if name not in known
    ]
    if found:
        return found
    try:
        rows, columns = stored_shape(checkpoint, module, layer)
    except CheckpointError as error:
        return [Finding(f"{module}.{WEIGHT}", error.what)]
    if not rows or not columns:
        return [Finding(f"{module}.{WEIGHT}", "holds no numbers")]
    if columns % (layer.group_size or 1):
        problem = f"has {columns} inputs, which groups of {layer.group_size} do not divide"
        return [Finding(f"{module}.{WEIGHT}", problem)]
    groups, held = columns // (layer.group_size or columns), WORD_BITS // layer.bits
    expected: Parts = {
        WEIGHT: (_INT32, (checkpoint.shape(f"{module}.{WEIGHT}"),)),
        ZEROS: (_INT32, ((groups, -(-rows // held)),)),
        SCALES: (FLOAT_CODES, ((groups, rows),)),
    }
    if f"{module}.{ORDER}" in checkpoint:
        expected[ORDER] = (frozenset({"I32", "I64"}), ((columns,),))
    if f"{module}.bias" in checkpoint:
        expected["bias"] = (FLOAT_CODES, ((rows,),))
    return check_parts(checkpoint, module, expected)


def decode_linear(module: str, tensors: dict[str, NDArray[Any]], layer: Layer) -> QuantizedLinear:
    """The layer that another tool stored.

    Args:
        module: its name.
        tensors: its parts by full name, as `check_layout` wants them.
        layer: as `config.json` has it.

    Raises:
        CheckpointError: a scale is 0 or not finite; a zero point is none, or not in the middle though
            `config.json` says so; `g_idx` names a group that is not there.
    """
    stored = tensors[f"{module}.{SCALES}"].astype(np.float32)
    if not all_signed(stored):
        raise CheckpointError("holds a scale that is 0 or not finite", where=f"{module}.{SCALES}")
    groups, rows = stored.shape
    weight = _integers(tensors[f"{module}.{WEIGHT}"], layer)
    packed = unpack(tensors[f"{module}.{ZEROS}"], layer.bits, rows)
    offset = _ordered(packed, layer.packing).astype(np.int32) + layer.packing.zero_less
    middle = 1 << (layer.bits - 1)
    if (offset >= middle).any():
        raise CheckpointError(
            f"holds zero points of {middle * 2 - 1}, from which 1 was taken away: a zero point of 0, which "
            "does not fit this layout and changes its neighbours too",
            where=f"{module}.{ZEROS}",
            remedy="write the model as gptq_v2, which stores zero points as they are",
        )
    if layer.symmetric and offset.any():
        raise CheckpointError(
            f"holds other zero points than {middle}, but config.json says that weights are symmetric",
            where=f"{module}.{ZEROS}",
            remedy="use the config.json that belongs to these weights",
        )
    shape = (rows,) if layer.group_size is None else (rows, groups)
    bias = tensors.get(f"{module}.bias")
    return QuantizedLinear(
        weight=weight,
        weight_scale=np.ascontiguousarray(stored.T).reshape(shape),
        scheme=layer.scheme,
        bias=None if bias is None else bias.astype(np.float32),
        weight_offset=None if layer.symmetric else np.ascontiguousarray(offset.T).reshape(shape),
        column_groups=column_groups(f"{module}.{ORDER}", tensors.get(f"{module}.{ORDER}"), groups),
    )


def _integers(words: NDArray[np.int32], layer: Layer) -> NDArray[np.int8]:
    """`[N, K]`, less 2^(bits - 1), of `qweight`."""
    held = WORD_BITS // layer.bits
    if layer.packing.along_inputs:
        return unpack(words.T, layer.bits, len(words) * held)
    values = _ordered(unpack(words, layer.bits, words.shape[1] * held), layer.packing)
    return np.ascontiguousarray(values.T)


def _ordered(values: NDArray[np.int8], packing: Packing) -> NDArray[np.int8]:
    """Integers in the order of the model's outputs, `[R, C]`."""
    if not packing.order:
        return values
    places = np.argsort(packing.order)
    return values.reshape(len(values), -1, len(places))[..., places].reshape(values.shape)
