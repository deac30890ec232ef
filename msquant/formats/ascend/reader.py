"""The checkpoint of vllm-ascend, of msquant or of msModelSlim, read as a `WeightSource`."""

from pathlib import Path

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import Linear, with_cache
from msquant.errors import CheckpointError
from msquant.families import expected_shapes, extra_shapes
from msquant.formats.ascend import fa_quant, kv_cache
from msquant.formats.ascend.four_bits import is_packed
from msquant.formats.ascend.layout import (
    WORDS,
    decode_linear,
    parts_of,
    read_description,
)
from msquant.formats.ascend.rules import check_layout
from msquant.formats.description import Description
from msquant.formats.dtypes import MODEL_DTYPES, model_dtype
from msquant.formats.stored import FolderSource
from msquant.schemes import FLOAT

# What msModelSlim's outlier suppression adds to a norm: a bias, or a second norm beside the first.
_NORM_ADDITIONS = ("norm.bias", "norm.module.weight", "norm.module.bias")


class AscendCheckpoint(FolderSource):
    """A written folder as a `WeightSource`: quantized layers as they will be computed, the rest as float32.

    Attributes:
        description: what is said of its tensors.
        dtype: the model's; None if `config.json` does not say, or names one that no model is in.
        prefill: whether layers are as prompts are read with them, where that differs.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        description: Description,
        dtype: str | None = None,
        prefill: bool = False,
    ) -> None:
        super().__init__(checkpoint)
        self.description, self.dtype, self.prefill = description, dtype, prefill

    @classmethod
    def open(cls, folder: Path | str, prefill: bool = False) -> "AscendCheckpoint":
        """Open a folder without validating it; `AscendFormat.validate` does that.

        Args:
            folder: the checkpoint.
            prefill: as the attribute.

        Raises:
            CheckpointError: as `Checkpoint.open` and `read_description`; `config.json` cannot be understood;
                or its norms were changed in a way that msquant does not compute.
        """
        folder = Path(folder)
        checkpoint, description = Checkpoint.open(folder), read_description(folder)
        config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        added = [name for name in checkpoint.names() if name.endswith(_NORM_ADDITIONS)]
        # The indexer of sparse attention has such a norm by itself.
        own = {**(expected_shapes(config) or {}), **extra_shapes(config)} if added else {}
        for name in added:
            if name not in own and checkpoint.raw(name).any():
                raise CheckpointError(
                    f"{name} is there: norms with a bias, which msModelSlim's outlier suppression makes, are "
                    "not computed",
                    where=checkpoint.shard_path(name),
                    remedy="quantize again with a method that leaves norms without a bias",
                )
        dtype = model_dtype(config)
        return cls(checkpoint, description, dtype if dtype in MODEL_DTYPES else None, prefill)

    def linear(self, module: str) -> Linear:
        """Return the layer `module`.

        Raises:
            CheckpointError: its scheme is unknown; a part is missing, or its dtype or shape does not fit; or
                as `kv_cache.decode` or `fa_quant.decode`.
        """
        decode = fa_quant.decode if fa_quant.is_cached(self.checkpoint, module) else kv_cache.decode
        return with_cache(self._linear(module), decode(self.checkpoint, module, self.dtype))

    def _linear(self, module: str) -> Linear:
        """The layer itself. Raises as `linear`."""
        scheme = self.description.scheme(module)
        if scheme == FLOAT:
            return self.checkpoint.linear(module)
        if scheme is None:
            raise CheckpointError(
                f"{self.description.tensors[f'{module}.weight']} is not computed by msquant",
                where=f"{self.checkpoint.folder}, {module}",
                remedy=f"msquant reads {', '.join(WORDS.values())}",
            )
        packed = is_packed(self.description.entries)
        findings = check_layout(self.checkpoint, module, scheme, packed=packed)
        if self.prefill and scheme.prefill is not None:
            scheme = scheme.per_token
        parts = self.parts(module, parts_of(scheme, packed), findings)
        return decode_linear(module, parts, self.dtype, scheme)
