"""One of each thing that can be added to msquant, written as a package of somebody else's would have it.

Everything here imports public names alone, and nothing of msquant knows of it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from safetensors.numpy import load_file, save_file

from msquant.algorithms.base import Algorithm
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import Linear, QuantizedLinear
from msquant.checkpoint.writer import write_json
from msquant.families import expected_shapes, find_family
from msquant.families.base import Family, Names
from msquant.formats.base import Format
from msquant.formats.stored import FolderSource
from msquant.schemes import FLOAT, Scheme, parse_scheme

SIX_BITS = parse_scheme("W6A16")
DESCRIPTION = "toy.json"


class Shrink(Algorithm):
    """Round to nearest of weights that are made smaller before."""

    summary: ClassVar[str] = "weights times a ratio, rounded to nearest"

    algorithm: Literal["shrink"] = Field("shrink", description=summary)
    ratio: float = Field(0.5, gt=0, le=1, description="What every weight is multiplied by.")

    @property
    def search_options(self) -> dict[str, Any]:
        """What the cells read."""
        return {"ratio": self.ratio}

    def quantizer(self) -> Any:
        """golden-stick's quantizer with cells that shrink the weight first."""
        from tests.extension.shrink_cells import ShrinkQuantizer

        return ShrinkQuantizer


@dataclass(frozen=True)
class ToyFormat(Format):
    """Integers of weights and one scale a row, and a JSON file that says in which scheme each layer is."""

    name = "toy"
    engine = "Toy"
    server = "vllm"
    marker = DESCRIPTION
    dtypes = ("bfloat16", "float16", "float32")
    words: ClassVar[Mapping[Scheme, str]] = {FLOAT: "plain", SIX_BITS: "six bits"}

    def part_specs(
        self, module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Weight and scale."""
        return {"weight": ("I8", shape), "weight_scale": ("F32", shape[:1])}

    def encode_parts(
        self, module: str, linear: QuantizedLinear, dtype: str, bias: NDArray[Any] | None
    ) -> dict[str, NDArray[Any]]:
        """The same."""
        return {"weight": linear.weight, "weight_scale": linear.weight_scale}

    def documents(
        self, linears: Mapping[str, Scheme], names: Iterable[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The scheme of each layer, by its word."""
        return {DESCRIPTION: {module: self.words[scheme] for module, scheme in linears.items()}}

    def stored_schemes(self, checkpoint: Checkpoint, modules: Iterable[str]) -> dict[str, Scheme]:
        """What the JSON file says."""
        schemes = {word: scheme for scheme, word in self.words.items()}
        stored = read_json(checkpoint.folder / DESCRIPTION)
        return {module: schemes[stored.get(module, "plain")] for module in modules}

    def open(self, folder: Path) -> "ToySource":
        """The folder's tensors as they are computed."""
        return ToySource(Checkpoint.open(folder))


class ToySource(FolderSource):
    """A folder in the toy format."""

    def linear(self, module: str) -> Linear:
        """A layer, in floating point or in six bits."""
        if f"{module}.weight_scale" not in self:
            return self.checkpoint.linear(module)
        weight, scale = (self.checkpoint.raw(f"{module}.{part}") for part in ("weight", "weight_scale"))
        bias = self.tensor(f"{module}.bias") if f"{module}.bias" in self else None
        return QuantizedLinear(weight, scale.astype(np.float32), SIX_BITS, bias)


def toy_family() -> Family:
    """Llama with the names of its first release."""
    llama = find_family("llama")
    assert llama is not None
    names = Names(
        embedding="tok_embeddings",
        final_norm="norm",
        head="output",
        layers="layers",
        input_norm="attention_norm",
        attention="attention",
        queries="wq",
        keys="wk",
        values="wv",
        output="wo",
        feed_forward_norm="ffn_norm",
        feed_forward="ffn",
        gate="w1",
        up="w3",
        down="w2",
    )
    return replace(llama, model_type="toy", read_as="llama", names=names)


def write_toy(llama: Path, folder: Path) -> Path:
    """Write a Llama's folder under the names of the toy family, which must be registered."""
    config = read_json(llama / "config.json")
    ours, theirs = (expected_shapes(config | {"model_type": kind}) or {} for kind in ("toy", "llama"))
    renamed = dict(zip(theirs, ours, strict=True))
    folder.mkdir()
    for path in llama.iterdir():
        if path.suffix == ".safetensors":
            save_file({renamed[name]: tensor for name, tensor in load_file(path).items()}, folder / path.name)
        elif path.name == "config.json":
            write_json(folder / path.name, config | {"model_type": "toy"})
        elif path.name != "model.safetensors.index.json":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder
