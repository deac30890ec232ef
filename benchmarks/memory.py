"""Peak memory of quantizing a model of 4 and of 32 layers, and of 8 and of 256 experts a layer, by family.

DeepSeek-V3 in FP8, and GLM-4.5 in bfloat16. In float32 the 32 layers would take 2.2 GB (4: 0.25 GB) and a
layer's 256 experts 1.6 GB (8: 0.05 GB): beside the 0.9 GB that the process takes in any case, holding either
would show. Between equal runs the peak moves by a few percent, with what threads happen to allocate at the
same time.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.command import msquant
from benchmarks.r1_layers import Sizes, write_r1_layers
from benchmarks.rows import row
from benchmarks.tiny_glm import GLM4_MOE
from benchmarks.tiny_training import train_tokenizer, training_texts
from tests.fixtures.policies import rules

MAX_GROWTH = 0.1
FEW_LAYERS, MANY_LAYERS = 4, 32
FEW_EXPERTS, MANY_EXPERTS = 8, 256
HIDDEN, DENSE, EXPERT = 1024, 2048, 512
SIZES: dict[str, int] = {
    **{"hidden": HIDDEN, "heads": 8, "q_rank": 384, "kv_rank": 256, "dense": DENSE, "expert": EXPERT},
    **{"per_token": 2, "groups": 1},
}
GLM = GLM4_MOE | {
    **{"architectures": ["Glm4MoeForCausalLM"], "hidden_size": HIDDEN, "head_dim": 128},
    **{"intermediate_size": DENSE, "moe_intermediate_size": EXPERT, "num_experts_per_tok": 2},
    **{"hidden_act": "silu", "torch_dtype": "bfloat16"},
}
# One candidate each: memory is asked for, and a search takes what its first candidate takes.
QUANTIZATION: dict[str, Any] = {"smooth_alpha": [0.5]}
CALIBRATION = {"samples": 2, "sequence_length": 64}


def measure() -> list[dict[str, Any]]:
    """Quantize the smaller and the larger of either, of each family."""
    return [line for family in FAMILIES for line in measure_family(family)]


def measure_family(family: str) -> list[dict[str, Any]]:
    """As `measure`, of one of `FAMILIES`."""
    layers = [_peak(family, count, FEW_EXPERTS) for count in (FEW_LAYERS, MANY_LAYERS)]
    # Two layers: one is dense.
    experts = [_peak(family, 2, count) for count in (FEW_EXPERTS, MANY_EXPERTS)]
    return [
        *_rows(f"{family}, layers", (FEW_LAYERS, MANY_LAYERS), layers),
        *_rows(f"{family}, experts", (FEW_EXPERTS, MANY_EXPERTS), experts),
    ]


def _rows(what: str, counts: tuple[int, int], peaks: list[int]) -> list[dict[str, Any]]:
    ratio = peaks[1] / peaks[0]
    target, met = f"< {1 + MAX_GROWTH}", ratio < 1 + MAX_GROWTH
    return [
        *(row(f"{what}: {n}, peak GB", round(p / 1e9, 3)) for n, p in zip(counts, peaks, strict=True)),
        row(f"{what}: {counts[1]} to {counts[0]}", round(ratio, 3), target, met),
    ]


def _peak(family: str, layers: int, experts: int) -> int:
    """Bytes, of a model whose first layer is dense."""
    folder = Path(tempfile.mkdtemp(prefix="msquant-memory-"))
    try:
        write, schemes = FAMILIES[family]
        model = write(folder / "model", layers, experts)
        recipe = {
            "model": str(model),
            "format": "ascend",
            "quantization": {**QUANTIZATION, "schemes": schemes},
            "calibration": CALIBRATION,
        }
        # JSON is YAML.
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        result = msquant("quantize", folder / "recipe.yaml", "--output", folder / "out")
        return int(result["peak_memory_bytes"])
    finally:
        shutil.rmtree(folder)


def _write_deepseek(folder: Path, layers: int, experts: int) -> Path:
    return write_r1_layers(folder, dense=1, moe=layers - 1, sizes=Sizes(**SIZES, experts=experts))


def _write_glm(folder: Path, layers: int, experts: int) -> Path:
    """Random weights in bfloat16, a shard for each layer, as msquant's shapes of the family name them."""
    import torch
    from safetensors.torch import save_file

    from msquant.families import expected_shapes

    config = GLM | {"num_hidden_layers": layers, "n_routed_experts": experts}
    folder.mkdir()
    shards: dict[str, dict[str, Any]] = {}
    for name, shape in (expected_shapes(config) or {}).items():
        shard = name.split(".")[2] if ".layers." in name else "ends"
        shards.setdefault(shard, {})[name] = shape
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for shard, shapes in shards.items():
        tensors = {}
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator)
            values = 1 + 0.1 * values if name.endswith("norm.weight") else values * shape[-1] ** -0.5
            tensors[name] = values.to(torch.float32 if name.endswith("correction_bias") else torch.bfloat16)
            weight_map[name] = f"model-{shard}.safetensors"
        save_file(tensors, folder / f"model-{shard}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    train_tokenizer(training_texts(), config["vocab_size"]).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


Writer = Callable[[Path, int, int], Path]
FAMILIES: dict[str, tuple[Writer, list[dict[str, str]]]] = {
    "DeepSeek-V3": (_write_deepseek, rules(skip=["lm_head", "kv_b_proj"], dynamic=["mlp."])),
    "GLM-4.5": (_write_glm, [{"lm_head": "FLOAT"}, {"*": "W8A8_DYNAMIC"}]),
}
"""By name: what writes a model of so many layers and experts, and its schemes."""
