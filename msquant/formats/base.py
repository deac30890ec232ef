"""What a checkpoint format is, with what is true of most; everything else is written by the same code."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from msquant import families
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.weights import CacheScale, FloatLinear, Linear, QuantizedLinear, WeightSource
from msquant.errors import CheckpointError
from msquant.families.row_orders import RopeRows
from msquant.formats.dtypes import DTYPE_CODES, cast
from msquant.formats.folder_rules import Finding, StoredTensor, open_folder
from msquant.formats.fused_layers import check_fused_schemes, experts_parent
from msquant.formats.servers import ServerName
from msquant.formats.stored import stored_scheme
from msquant.schemes import Quant, Scheme


@dataclass(frozen=True)
class Format(ABC):
    """A checkpoint format as the consumer of one model's folder takes it.

    Tensor names are Hugging Face's; rows of what `encode_linear` takes are in the order of `row_orders`.
    Where a class says nothing else, its folders are shards alone, in Hugging Face's order of rows.

    Attributes:
        name: how recipes and manifests call it; vLLM and its like take it as `quantization=`, too.
        engine: who serves its folders, for people.
        server: the same, by name.
        program: what serves a folder on the command line.
        marker: the file beside the shards that says how they are quantized; None where `config.json` does.
        dtypes: those that a model can be in.
        bias_in_float32: whether a quantized layer's bias is stored so, and not in the model's dtype; it is
            rounded to that in any case.
        folded: what is said of a linear, `{}`, that the engine folds into the attention, and so takes in
            floating point only; empty where it does not.
        takes_any_model: whether a folder of a model that msquant has no family for can be written.
        expert_schemes: what is said of the schemes that `takes_experts` takes.
        in_groups: those of `words` that are taken in groups of columns as well, by the same word.
        written: whether msquant writes it; False for those of other tools that it reads alone.
        caches: how the keys and values of a layer can be kept, beside floating point.
        no_cache: why not in another way.
        per_token: whether the consumer computes every linear with a scale per token, however it splits a
            model; else some have to be static.
        predictions_in_float: whether the consumer builds multi-token-prediction layers without quantization.
        holds_rotation: whether the matrix of a rotation has a place in a folder, see `rotated_by`.
        variant: what the manifest says it is made for, for example a serving engine's backend.
    """

    name: ClassVar[str]
    engine: ClassVar[str]
    server: ClassVar[ServerName]
    program: ClassVar[str] = "vllm"
    marker: ClassVar[str | None] = None
    dtypes: ClassVar[tuple[str, ...]]
    bias_in_float32: ClassVar[bool] = False
    folded: ClassVar[str] = ""
    takes_any_model: ClassVar[bool] = True
    expert_schemes: ClassVar[str] = "per-token activations (W8A8_DYNAMIC)"
    in_groups: ClassVar[frozenset[Scheme]] = frozenset()
    written: ClassVar[bool] = True
    caches: ClassVar[frozenset[Quant]] = frozenset()
    no_cache: ClassVar[str] = "it keeps keys and values in floating point"
    per_token: ClassVar[bool] = True
    predictions_in_float: ClassVar[bool] = False
    holds_rotation: ClassVar[bool] = False

    variant: str = ""

    @classmethod
    def of(cls, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> "Format":
        """The format of a model's folder.

        Args:
            config: the content of `config.json`.
            manifest: the content of `msquant.json`; empty where there is none.
        """
        return cls()

    @classmethod
    def is_in(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """Whether a folder, damaged or not, is in this format, where no manifest says it.

        Args:
            folder: the checkpoint.
            config: the content of its `config.json`; empty where it cannot be read.
        """
        return cls.marker is not None and (folder / cls.marker).is_file()

    @classmethod
    def serve_command(cls, folder: str) -> str:
        """The command line that serves a folder; the engine looks for a `marker` only if it is told so."""
        return f"{cls.program} serve {folder}" + (f" --quantization {cls.name}" if cls.marker else "")

    @property
    def consumer(self) -> str:
        """Who serves this variant, for people."""
        return self.engine

    @property
    @abstractmethod
    def words(self) -> Mapping[Scheme, str]:
        """The schemes that a linear layer can have, with the consumer's words for them."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The consumer's words, each once: one may stand for several schemes."""
        return tuple(dict.fromkeys(self.words.values()))

    def takes(self, scheme: Scheme) -> bool:
        """Whether a linear layer can have a scheme: one of `words`, where a format says nothing else.

        Its cache is not looked at, see `check_caches`.
        """
        scheme = scheme.without_cache
        return scheme in self.words or (scheme.in_rows() in self.in_groups and scheme.in_rows() in self.words)

    def word(self, scheme: Scheme) -> str:
        """The consumer's word for a scheme that a linear layer can have."""
        scheme = scheme.without_cache
        return self.words[scheme if scheme in self.words else scheme.in_rows()]

    def takes_experts(self, scheme: Scheme) -> bool:
        """Whether the routed experts can have a scheme that other linear layers can have."""
        return scheme.is_float or scheme.is_dynamic

    def fitting(self, module: str, scheme: Scheme) -> Scheme:
        """The scheme that a linear layer gets where one is asked for of all, and the consumer has it of some.

        Args:
            module: its name.
            scheme: that is asked for.
        """
        return scheme

    def shape_problem(self, module: str, shape: tuple[int, ...], scheme: Scheme) -> str | None:
        """Why a layer `[N, K]` cannot be stored in a scheme; None if it can."""
        return None

    def made_for(self, linears: Mapping[str, Scheme]) -> "Format":
        """The format with the variant that a folder with linear layers in these schemes is of."""
        return self

    def keeping(self, scale_dtype: str | None) -> "Format":
        """The format with packed scales in another dtype than the model's, where it can store them so.

        Args:
            scale_dtype: what a source's scales need; None where the model's dtype holds them.
        """
        return self

    def rotated_by(self, rotation: Callable[[], NDArray[np.float32]] | None) -> "Format":
        """The format with the matrix that the residual stream is multiplied by, where it `holds_rotation`.

        Args:
            rotation: makes the matrix, `[H, H]`; None for none.
        """
        return self

    def extra_shards(self) -> dict[str, dict[str, NDArray[Any]]]:
        """Tensors beside the model's own, by name, of each further safetensors file by its path."""
        return {}

    def scale_dtype(self, checkpoint: Checkpoint) -> str | None:
        """What the scales of a folder's weights need, where that is not the model's dtype; else None."""
        return None

    def check(self, linears: Mapping[str, Scheme], config: Mapping[str, Any]) -> Iterator[Finding]:
        """Check that the consumer can run the layers of a model in the given schemes together.

        Args:
            linears: the scheme of each linear layer by module, also of those in floating point.
            config: the content of the model's `config.json`.
        """
        for module, scheme in linears.items():
            if not self.takes(scheme):
                known = ", ".join(map(str, self.words))
                yield Finding(
                    module, f"is {scheme}: in this format msquant writes {known} for {self.consumer}"
                )
            elif not scheme.is_float and (what := self.stays_float(module)):
                yield Finding(module, f"is {scheme}: {self.consumer} takes {what} in floating point only")
            if experts_parent(module) and not self.takes_experts(scheme):
                problem = f"{self.consumer} runs routed experts with {self.expert_schemes} only"
                yield Finding(module, f"is {scheme}: {problem}")
        yield from check_fused_schemes(
            {module: str(scheme.without_cache) for module, scheme in linears.items()}
        )
        yield from self.check_caches(linears)

    def check_caches(self, linears: Mapping[str, Scheme]) -> Iterator[Finding]:
        """Check that the consumer can keep keys and values as the layers that make them say."""
        for module, scheme in linears.items():
            if scheme.cache is not None and scheme.cache not in self.caches:
                yield Finding(
                    module,
                    f"is {scheme}, with an int{scheme.cache.bits} key-value cache: {self.consumer} cannot "
                    f"serve that, {self.no_cache}",
                )

    def stays_float(self, module: str) -> str | None:
        """What a module is that has to stay in floating point; None for another."""
        ends = families.float_only()
        if self.folded:
            ends = {**ends, **{name: self.folded.format(name) for name in families.folded_linears()}}
        found = (what for end, what in ends.items() if module == end or module.endswith(f".{end}"))
        return next(found, None)

    def row_orders(self, config: Mapping[str, Any]) -> RopeRows:
        """Whose rows are stored in another order than Hugging Face's."""
        return RopeRows({}, 0)

    def linear_specs(
        self, module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str, bias: bool
    ) -> list[TensorSpec]:
        """The tensors that `encode_linear` makes of a quantized layer.

        Args:
            module: its name, for example `model.layers.0.self_attn.q_proj`.
            shape: `(N, K)`.
            scheme: one of `words`, not in floating point.
            dtype: the model's, one of `dtypes`.
            bias: whether it has one.
        """
        parts = self.part_specs(module, shape, scheme.without_cache, dtype)
        if bias:
            parts["bias"] = "F32" if self.bias_in_float32 else DTYPE_CODES[dtype], shape[:1]
        return [TensorSpec(f"{module}.{part}", *spec) for part, spec in parts.items()]

    def cache_specs(self, module: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[TensorSpec]:
        """The tensors that `encode_cache` makes of a layer, quantized or not.

        Args:
            module: its name.
            shape: `(N, K)`.
            config: the content of the model's `config.json`.
        """
        return []

    def owner(self, name: str) -> str:
        """The layer that a tensor is stored for: the one that it is named after, if nothing else is said."""
        return name.rpartition(".")[0]

    @abstractmethod
    def part_specs(
        self, module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The safetensors dtype and the shape of each part beside the bias, as for `linear_specs`."""

    def encode_linear(self, module: str, linear: Linear, dtype: str) -> dict[str, NDArray[Any]]:
        """The tensors that a layer is stored as.

        Args:
            module: its name, for example `model.layers.0.self_attn.q_proj`.
            linear: in floating point, or in one of the schemes of `words`.
            dtype: the model's, one of `dtypes`.

        Returns:
            Arrays by full tensor name: in floating point `weight` and `bias` in `dtype`, else `bias` and what
            `encode_parts` says; and what `encode_cache` says.

        Raises:
            CheckpointError: a value does not fit `dtype`; a layer's groups are no runs of columns; or as
                `encode_parts`.
        """
        if isinstance(linear, QuantizedLinear) and linear.column_groups is not None:
            raise CheckpointError(
                "its columns are in groups in an order of their own (desc_act, actorder), which "
                f"{self.name} is not written with",
                where=module,
                remedy="serve the folder as it is, or quantize the model again without an order of columns",
            )
        bias = None if linear.bias is None else cast(f"{module}.bias", linear.bias, dtype)
        if isinstance(linear, FloatLinear):
            parts = {"weight": cast(f"{module}.weight", linear.weight, dtype)}
        else:
            parts = self.encode_parts(module, linear, dtype, bias)
            bias = bias.astype(np.float32) if bias is not None and self.bias_in_float32 else bias
        if bias is not None:
            parts["bias"] = bias
        stored = {f"{module}.{part}": values for part, values in parts.items()}
        if linear.cache is not None:
            stored |= self.encode_cache(module, linear.cache, dtype)
        return stored

    def encode_cache(self, module: str, cache: CacheScale, dtype: str) -> dict[str, NDArray[Any]]:
        """What the scales of the keys or values that a layer makes are stored as, in a format of `caches`.

        Arrays by full tensor name.

        Args:
            module: its name.
            cache: the scales.
            dtype: the model's.

        Raises:
            CheckpointError: a scale does not fit.
        """
        raise NotImplementedError

    @abstractmethod
    def encode_parts(
        self, module: str, linear: QuantizedLinear, dtype: str, bias: NDArray[Any] | None
    ) -> dict[str, NDArray[Any]]:
        """What a quantized layer is stored as beside its bias, by the last part of a tensor's name.

        Args:
            module: its name, for errors.
            linear: the layer.
            dtype: the model's.
            bias: its own, rounded to `dtype`, `[N]`; None if it has none.

        Raises:
            CheckpointError: a value does not fit.
        """

    def documents(
        self, linears: Mapping[str, Scheme], names: Iterable[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The JSON files beside the shards that only this format has, by file name.

        Args:
            linears: as for `check`.
            names: every tensor that is stored.
            config: as for `check`.
        """
        return {}

    def config_entries(
        self, linears: Mapping[str, Scheme], names: Iterable[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What is put into `config.json`. Arguments as for `documents`."""
        return {}

    def adapted(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config.json` of a model in the words that the consumer takes; `config_entries` come on top."""
        return dict(config)

    def stored(self, checkpoint: Checkpoint, name: str) -> StoredTensor | None:
        """What holds a tensor of the model in a folder, damaged or not; None where nothing does.

        Args:
            checkpoint: the opened folder.
            name: as the model in floating point has it, for example `model.layers.0.mlp.up_proj.weight`.

        Raises:
            CheckpointError: what shape it has cannot be read.
        """
        return StoredTensor(name, checkpoint.shape(name)) if name in checkpoint else None

    def stored_schemes(self, checkpoint: Checkpoint, modules: Iterable[str]) -> dict[str, Scheme]:
        """The schemes of some modules of a folder, damaged or not; `FLOAT` where nothing says another."""
        return {module: stored_scheme(checkpoint, module) for module in modules}

    def residual_rotation(self, folder: Path, hidden_size: int) -> NDArray[np.float32] | None:
        """The matrix Q, `[H, H]`, that hidden states are multiplied by in a folder's basis, where it says so.

        Args:
            folder: of this format.
            hidden_size: H.

        Raises:
            CheckpointError: it says it, and has no such matrix.
        """
        return None

    @abstractmethod
    def open(self, folder: Path) -> WeightSource:
        """Open a folder without validating it.

        Raises:
            CheckpointError: a file is missing or cannot be understood.
        """

    def open_prefill(self, folder: Path) -> WeightSource | None:
        """As `open`, as the server computes prompts, where it does not compute answers so; else None."""
        return None

    def validate(self, folder: Path | str, *, verify_hashes: bool = False) -> list[Finding]:
        """Check a folder against every rule, reading each tensor once and holding one layer at a time.

        Args:
            folder: the checkpoint.
            verify_hashes: also compare every file's sha256 with the manifest, which reads everything twice.

        Returns:
            The broken rules; none for a folder that is correct.
        """
        folder = Path(folder)
        findings: list[Finding] = []
        config, checkpoint = open_folder(folder, findings, self.stored, verify_hashes=verify_hashes)
        return [*dict.fromkeys(findings + self.own_findings(folder, config, checkpoint))]

    def own_findings(
        self, folder: Path, config: Mapping[str, Any] | None, checkpoint: Checkpoint | None
    ) -> list[Finding]:
        """The broken rules of this format alone.

        Args:
            folder: the checkpoint.
            config: the content of its `config.json`; None where it cannot be read.
            checkpoint: its tensors; None where they cannot be read.
        """
        return []

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        """What keeps today's consumer from serving a correct folder of a model; often nothing."""
        return []
