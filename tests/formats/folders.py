"""Small golden-stick folders, written with NumPy alone, to read back and to break."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from msquant.checkpoint.checkpoint_reader import INDEX_NAME, Checkpoint
from msquant.checkpoint.weights import FloatLinear, Linear, QuantizedLinear
from msquant.checkpoint.writer import file_sha256, shard_name, write_index, write_json, write_shard
from msquant.families import expected_shapes
from msquant.formats.base import Format
from msquant.formats.dtypes import cast
from msquant.formats.golden_stick.form import GoldenStickFormat
from msquant.formats.golden_stick.layout import DESCRIPTION_NAME
from msquant.schemes import W8A8

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 32,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}

# q, k and v read one input, and so do gate and up: each group has one input scale and zero point.
_GROUP = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}


def random_quantized(rows: int, columns: int, seed: int, *, bias: bool = False) -> QuantizedLinear:
    """A W8A8 layer with static activations."""
    rng = np.random.default_rng(seed)
    return QuantizedLinear(
        weight=rng.integers(-128, 128, (rows, columns), dtype=np.int8),
        weight_scale=rng.uniform(1e-4, 1e-2, rows).astype(np.float32),
        scheme=W8A8,
        bias=rng.normal(size=rows).astype(np.float32) if bias else None,
        input_scale=rng.uniform(0.01, 0.1, 1).astype(np.float32),
        input_offset=rng.integers(-128, 128, 1, dtype=np.int32),
    )


def _layer(module: str, shape: tuple[int, ...], *, bias: bool) -> Linear:
    own = random_quantized(*shape, seed=sum(map(ord, module)), bias=bias)
    projection = module.rpartition(".")[2].removesuffix("_proj")
    group = random_quantized(1, 1, seed=_GROUP[projection])
    return replace(own, input_scale=group.input_scale, input_offset=group.input_offset)


def write_folder(folder: Path, *, float_modules: tuple[str, ...] = (), **changes: Any) -> Path:
    """Write a complete folder: two decoder layers and the rest, with manifest.

    Args:
        folder: is made.
        float_modules: projections to leave in floating point.
        changes: of `CONFIG`.
    """
    config = {**CONFIG, **changes}
    dtype = config["torch_dtype"]
    folder.mkdir(parents=True)
    shapes = expected_shapes(config)
    assert shapes is not None
    rng = np.random.default_rng(7)
    shards: list[dict[str, Any]] = [{} for _ in range(config["num_hidden_layers"] + 1)]
    quantized = []
    for name, shape in shapes.items():
        parts = name.split(".")
        shard = shards[int(parts[2]) if parts[1] == "layers" else -1]
        module = name.rpartition(".")[0]
        if not module.endswith("_proj"):
            shard[name] = cast(name, rng.normal(size=shape), dtype)
        elif name.endswith(".weight"):
            bias = f"{module}.bias" in shapes
            linear = _layer(module, shape, bias=bias)
            if module in float_modules:
                linear = FloatLinear(rng.normal(size=shape).astype(np.float32), linear.bias)
            else:
                quantized.append(module)
            shard.update(GoldenStickFormat().encode_linear(module, linear, dtype))
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = shard_name(number, len(shards))
        write_shard(folder / name, tensors)
        weight_map.update(dict.fromkeys(tensors, name))
    write_index(folder, weight_map, sum(array.nbytes for tensors in shards for array in tensors.values()))
    _describe(folder, weight_map, quantized)
    write_json(folder / "config.json", config)
    write_manifest(folder)
    return folder


def _describe(folder: Path, names: Iterable[str], quantized: Iterable[str]) -> None:
    for name, document in GoldenStickFormat().documents(dict.fromkeys(quantized, W8A8), names, {}).items():
        write_json(folder / name, document)


def write_manifest(folder: Path) -> None:
    """Write `msquant.json` for the folder as it is."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != "msquant.json"
    }
    layers = [
        {"index": index, "groups": [{"name": "qkv", "alpha": 0.55 + index}], "error": 1e-3}
        for index in range(2)
    ]
    manifest = {"msquant": "0", "format": "golden-stick", "layers": layers, "files": files}
    write_json(folder / "msquant.json", manifest)


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_entries(path: Path, changes: dict[str, Any]) -> None:
    """Change entries of a JSON file; those that are None are taken out."""

    def apply(entries: dict[str, Any]) -> None:
        entries.update(changes)
        for name, value in changes.items():
            if value is None:
                del entries[name]

    change_json(path, apply)


def change_tensors(folder: Path, changes: dict[str, Any], *, described: bool = True) -> None:
    """Replace, add or (with None) remove tensors, in their shards, in the index and in the description.

    Of a folder that has a manifest, it is written anew.
    """
    checkpoint = Checkpoint.open(folder)
    first = sorted(checkpoint.shards)[0]
    for file_name, shard in checkpoint.shards.items():
        mine = {k: v for k, v in changes.items() if checkpoint.weight_map.get(k, first) == file_name}
        if mine:
            tensors = {**{name: shard.read(name) for name in shard.entries}, **mine}
            write_shard(folder / file_name, {k: v for k, v in tensors.items() if v is not None})
    weight_map = {
        **checkpoint.weight_map,
        **{name: checkpoint.weight_map.get(name, first) for name in changes},
    }
    weight_map = {name: shard for name, shard in weight_map.items() if changes.get(name, 0) is not None}
    write_index(folder, weight_map, 0)
    if described:
        old = json.loads((folder / DESCRIPTION_NAME).read_text())
        quantized = [name.removesuffix(".deq_scale") for name in old if name.endswith(".deq_scale")]
        _describe(folder, weight_map, quantized)
    assert (folder / INDEX_NAME).is_file()
    if (folder / "msquant.json").exists():
        write_manifest(folder)


def stored(
    name: str, change: Callable[[np.ndarray], np.ndarray | None], *, described: bool = False
) -> Callable[[Path], None]:
    """What changes a stored tensor of a folder, or takes it out; in the description, too, if that is said."""

    def apply(folder: Path) -> None:
        change_tensors(folder, {name: change(Checkpoint.open(folder).raw(name))}, described=described)

    return apply


def problems(form: Format, folder: Path) -> list[str]:
    """What a format finds wrong with a folder, in the words that a user reads."""
    return [str(finding) for finding in form.validate(folder)]


def assert_finds(form: Format, folder: Path, where: str, problem: str) -> None:
    """A format finds a problem there, whatever else it finds."""
    found = problems(form, folder)
    assert any(one.startswith(where) and problem in one for one in found), found
