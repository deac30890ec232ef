"""What this machine does in a second, measured in a few seconds with the code that does the work."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.disk import writing
from msquant.checkpoint.fp8 import SCALE_SUFFIX
from msquant.checkpoint.reader import SINGLE_NAME, Checkpoint
from msquant.checkpoint.shard_stream import ShardStream
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.formats.dtypes import MODEL_DTYPES
from msquant.models.config import ModelConfig
from msquant.planning.work import Rates

# Of the matrix that is read, converted and rounded, `[N, K]`.
ROWS, COLUMNS = 8192, 2048

MANY, FEW = 512, 16
"""Rows of the two products: of a batch of tokens, and of what a routed expert gets."""

PIECE_BYTES, PIECES = 64 << 20, 3
_HEADS, _LENGTH = 16, 128

Floats = NDArray[np.float32]


def measure_rates(config: ModelConfig, output: Path, checkpoint: Checkpoint | None) -> Rates:
    """Measure this machine.

    Args:
        config: of the model that is to be quantized: how it is stored, and the width of its heads.
        output: the folder that is to be made; some 50 MB are written beside it and removed again.
        checkpoint: the model's tensors, whose shards are read in part; without it, what was written is.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    from msquant.kernels.fake_quant import activation_parameters, fake_quantize
    from msquant.kernels.weight_rounding import clipping_change, quantize_weight, smoothed_and_rounded
    from msquant.models.device import use_device

    use_device()
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((ROWS, COLUMNS), np.float32)
    inputs = generator.standard_normal((MANY, COLUMNS), np.float32)
    written, converted, read = _disk(config, output, weight)
    # MindSpore 2.7.1 crashes at exit if a reshaped transpose is what it computed last: products come after.
    scores = _scores(config)
    products, streamed = _products(config)
    smooth, limit = np.full(COLUMNS, 1.5, np.float32), np.full((ROWS, 1), 2.0, np.float32)
    change = np.empty_like(weight)
    rounded = _best(lambda: smoothed_and_rounded(weight, smooth))
    clipped = _best(lambda: clipping_change(weight, limit, change))
    scale, offset = activation_parameters(inputs[:1, :1] * 0 - 3, inputs[:1, :1] * 0 + 4)
    return Rates(
        read=_read_rate(checkpoint) if checkpoint else read,
        converted=converted,
        products=products,
        streamed=streamed,
        scores=scores,
        rounded=2 * weight.size / (rounded + clipped),
        inputs=inputs.size / _best(lambda: fake_quantize(inputs / smooth, scale, offset)),
        quantized=weight.size / _best(lambda: quantize_weight(weight)),
        written=written,
    )


def _best(work: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of the fastest of some runs, after one that does not count."""
    work()
    return min(_timed(work) for _ in range(repeats))


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _disk(config: ModelConfig, output: Path, weight: Floats) -> tuple[float, float, float]:
    """Bytes written, values converted and bytes read in a second, of a matrix stored as the model's are."""
    tensors = _stored(config, weight)
    place = next(folder for folder in output.absolute().parents if folder.is_dir())
    with writing(place), tempfile.TemporaryDirectory(prefix=".msquant-probe-", dir=place) as folder:
        path = Path(folder) / SINGLE_NAME
        started = time.perf_counter()
        with ShardStream(path, [TensorSpec.of(name, array) for name, array in tensors.items()]) as shard:
            for name, array in tensors.items():
                shard.write(name, array)
            shard.finish()
        written = shard.nbytes / (time.perf_counter() - started)
        read = _read(path, 0, shard.nbytes)
        checkpoint = Checkpoint.open(Path(folder))
        return written, weight.size / _best(lambda: checkpoint.tensor("weight"), 2), shard.nbytes / read


def _stored(config: ModelConfig, weight: Floats) -> dict[str, NDArray[Any]]:
    if config.fp8_block is None:
        return {"weight": weight.astype(MODEL_DTYPES[config.dtype])}
    # The block's size that a folder without config.json stands for.
    scales = np.full((ROWS // 128, COLUMNS // 128), 0.01, np.float32)
    return {"weight": weight.astype(ml_dtypes.float8_e4m3fn), f"weight{SCALE_SUFFIX}": scales}


def _read_rate(checkpoint: Checkpoint) -> float:
    """Bytes in a second, from pieces that are spread over the largest shard."""
    shard = max(checkpoint.shards.values(), key=lambda shard: shard.size)
    size = min(PIECE_BYTES, shard.size)
    starts = {(shard.size - size) * i // max(1, PIECES - 1) for i in range(PIECES)}
    return len(starts) * size / sum(_read(shard.path, start, size) for start in starts)


def _read(path: Path, start: int, size: int) -> float:
    """Seconds to read a piece of a file that the system does not hold in memory, as far as it can be told."""
    buffer = bytearray(size)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)
        return _timed(lambda: os.preadv(descriptor, [buffer], start))
    finally:
        os.close(descriptor)


def _products(config: ModelConfig) -> tuple[float, float]:
    """Floating-point operations, and weights read, in a second, with a matrix as the model has them.

    Two products, of many rows and of few, give both: seconds are taken as `operations / a + weights / b`.
    """
    from mindspore import Tensor, ops

    columns = min(config.hidden_size, ROWS)
    rows = min(config.intermediate_size, ROWS * COLUMNS // columns)
    product, matrix = ops.MatMul(transpose_b=True), Tensor(np.ones((rows, columns), np.float32))

    def seconds(tokens: int) -> float:
        inputs = Tensor(np.ones((tokens, columns), np.float32))
        return _best(lambda: product(inputs, matrix).asnumpy())

    slow, fast = seconds(MANY), seconds(FEW)
    operation = max(slow - fast, slow / 10) / (2 * (MANY - FEW) * matrix.size)
    reading = max(fast - operation * 2 * FEW * matrix.size, fast / 10)
    return 1 / operation, matrix.size / reading


def _scores(config: ModelConfig) -> float:
    """Scores of attention in a second, with their softmax and both products."""
    import mindspore as ms
    from mindspore import Tensor

    from msquant.models.attention import ScaledDotProduct
    from msquant.models.positions import positions

    sizes = config.latent
    width = sizes.qk_head_dim if sizes else config.head_dim
    shape = (1, _HEADS, _LENGTH)
    queries, values = (Tensor(np.ones((*shape, n), np.float32)) for n in (width, config.v_head_dim))
    places = positions(config, _LENGTH, ms.float32)
    attend = ScaledDotProduct(width**-0.5)
    seconds = _best(lambda: attend(queries, queries, values, places).asnumpy())
    return _HEADS * _LENGTH**2 / seconds
