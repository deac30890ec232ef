"""Write the table of docs/published.md: which of the quantized models that vllm-ascend names msquant makes.

    python tools/published.py

A dry run over `configs/`: for every name of `published_ascend.txt`, found in vllm-ascend's documentation,
tests and CI, the recipe for its source model is planned in its scheme for vllm-ascend, from the published
`config.json` alone. A model that msquant has a family for has the tensors that the family says; of any other,
headers of safetensors without data are written and read as those of a download would be. What is planned is
held to the description: each tensor has its word there. Names whose `config.json` is not in `configs/models`
are listed as that. `tests/test_published_table.py` keeps the pages equal to what this finds.
"""

import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from msquant.errors import MsquantError
from msquant.families import find_family
from msquant.flows import model_free_source
from msquant.flows.source import shapes_plans
from msquant.formats.ascend import kv_cache
from msquant.formats.folder_plan import FolderPlan
from msquant.hub.published import HUB_IDS, published_config
from msquant.models.config_json import fp8_block_size, parse_config
from msquant.recipe.recipe import Recipe, find_recipe, shipped_recipes
from msquant.schemes import parse_scheme

ROOT = Path(__file__).parents[1]
NAMES = Path(__file__).with_name("published_ascend.txt")
PAGES = {"en": ROOT / "docs" / "published.md", "zh": ROOT / "docs" / "zh-CN" / "published.md"}
BEGIN, END = "<!-- tools/published.py writes from here -->", "<!-- to here -->"

# As the names have it; the cache of `w8a8c8` and the like stays in the scheme.
_NAME = re.compile(r"^(?P<source>.+?)-(?:quantized\.)?(?P<scheme>w\d+a\d+[a-z0-9]*)(?P<rest>.*)$")
_SOURCES = {
    "glm5": "glm-5",
    "internvl3_5-38b": "internvl3.5-38b",
    "internvl3_5-241b-a28b": "internvl3.5-241b-a28b",
    "qwen2-vl-7b": "qwen2-vl-7b-instruct",
    "qwen3-0.6b-instruct": "qwen3-0.6b",
}
_PRUNED = ("pruning", "puring", "pruing")
_MX = re.compile(r"mxfp\d")
_FOR_310 = "310"

Shapes = dict[str, tuple[int, ...]]
_ITEM_BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}


@dataclass(frozen=True)
class Row:
    """What becomes of a name.

    Attributes:
        name: as vllm-ascend has it.
        kind: `model_type` of the source; empty where its config is not at hand.
        scheme: what the name says.
        recipe: that makes it; empty if none does.
        calibrated: whether with calibration.
        reason: why it is refused; empty if it is made, or if its config is not at hand.
        nbytes: of the tensors that are written.
    """

    name: str
    kind: str = ""
    scheme: str = ""
    recipe: str = ""
    calibrated: bool = False
    reason: str = ""
    nbytes: int = 0

    @property
    def made(self) -> bool:
        """Whether msquant makes it."""
        return bool(self.recipe)


def rows() -> list[Row]:
    """All names, in the order of the list."""
    return [_row(name) for name in NAMES.read_text(encoding="utf-8").split()]


def _row(name: str) -> Row:
    found = _NAME.match(name.rpartition("/")[2])
    assert found is not None, name
    words = [word for word in found["rest"].split("-") if word]
    scheme = "-".join([found["scheme"], *words]).upper()
    source = _SOURCES.get(found["source"], found["source"])
    config = published_config(source) if source in HUB_IDS else None
    if config is None or any(word in _PRUNED for word in words):
        return Row(name, scheme=scheme)
    row = Row(name, str(config.get("model_type")), scheme)
    try:
        recipe_name, recipe = _recipe(source, found["scheme"], words)
        nbytes = _planned(source, recipe)
    except MsquantError as error:
        what = f"{error.where}: {error.what}" if error.where and _is_layer(error.where) else error.what
        return Row(row.name, row.kind, row.scheme, reason=what)
    return Row(row.name, row.kind, row.scheme, recipe_name, not recipe.calibration.is_none, nbytes=nbytes)


def _is_layer(where: object) -> bool:
    return str(where).startswith(("model.", "lm_head", "quantization"))


def _recipe(source: str, scheme: str, words: list[str]) -> tuple[str, Recipe]:
    """The recipe for a source model, in the scheme and with the options that a name says.

    Raises:
        RecipeError: msquant has no such scheme, or the recipe cannot be changed so.
    """
    if _FOR_310 in words:
        raise MsquantError("is for the Ascend 310P, and msquant knows no rules of its operators")
    number = next((word for word in words if _MX.fullmatch(word)), None)
    cached = scheme.endswith("c8")
    plain = scheme.removesuffix("c8")
    wanted = parse_scheme("_".join(filter(None, (plain, number))).upper())
    weights, inputs = wanted.weights, wanted.inputs
    assert weights is not None
    in_eights = (weights.bits, inputs and inputs.bits) == (8, 8)
    own = f"{source}-{plain}"
    name = own if own in shipped_recipes() else source
    recipe = find_recipe(name, "ascend")
    if name == source and not in_eights:
        asked = "W4A8_DYNAMIC" if (weights.bits, inputs and inputs.bits) == (4, 8) else wanted
        recipe = recipe.adjusted(scheme=asked)
    recipe = recipe.adjusted(
        rotation="hadamard" if "quarot" in words else None,
        cache="int8" if cached else None,
    )
    if "floatmtp" in words:
        recipe = recipe.model_copy(update={"prediction_layers": "float"})
    return name, recipe


_sizes: dict[tuple[str, str], int] = {}


def _planned(source: str, recipe: Recipe) -> int:
    """Bytes of what a recipe makes of a published model. Raises MsquantError if it cannot."""
    key = source, recipe.model_dump_json()
    if key not in _sizes:
        config = published_config(source)
        assert config is not None
        if find_family(config.get("model_type")) is not None and not recipe.calibration.is_none:
            model = parse_config(config)
            extras = model.extra_layers if recipe.keeps_predictions else ()
            plan = shapes_plans(recipe, model, extras)[0]
        else:
            with headers(config) as folder:
                plan = model_free_source.folder_plans(
                    recipe, model_free_source.open_model_free(recipe, str(folder))
                )[0]
        _check(plan)
        _sizes[key] = plan.tensor_bytes
    return _sizes[key]


def _check(plan: FolderPlan) -> None:
    """Hold the tensors of a folder to its description, which must have a word of the format for each."""
    (description,) = plan.documents.values()
    words = {*plan.format.words.values(), "FLOAT", kv_cache.WORD}
    undescribed = [name for name in plan.weight_map if description.get(name) not in words]
    assert not undescribed, undescribed[:3]
    assert "quantization_config" not in plan.written_config
    json.dumps([description, plan.written_config])


@contextmanager
def headers(config: dict[str, Any]) -> Iterator[Path]:
    """A folder with a model's `config.json` and a shard that is a header with a hole behind it."""
    block = fp8_block_size(config, "config.json")
    entries: dict[str, Any] = {}
    end = 0
    for name, shape in published_shapes(config).items():
        stored = {name: ("BF16", shape)}
        if block and _is_fp8(name):
            blocks = tuple(math.ceil(size / step) for size, step in zip(shape, block, strict=True))
            stored = {name: ("F8_E4M3", shape), f"{name}_scale_inv": ("F32", blocks)}
        for tensor, (dtype, sizes) in stored.items():
            start, end = end, end + math.prod(sizes) * _ITEM_BYTES[dtype]
            entries[tensor] = {"dtype": dtype, "shape": sizes, "data_offsets": (start, end)}
    with tempfile.TemporaryDirectory(prefix="msquant-headers-") as scratch:
        folder = Path(scratch)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        header = json.dumps(entries).encode()
        path = folder / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + end)
        yield folder


def published_shapes(config: dict[str, Any]) -> Shapes:
    """Names and shapes of a model that msquant has no family for, as its makers publish them."""
    if config["model_type"] == "minimax_m2":
        return _minimax_shapes(config)
    return _transformers_shapes(json.dumps(config))


def _is_fp8(name: str) -> bool:
    return name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))


def _minimax_shapes(config: dict[str, Any]) -> Shapes:
    """MiniMax-M2's, which transformers 4.57.1 does not have; its prediction modules are not published."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: Shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (queries, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.v_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, queries),
            f"{layer}.self_attn.q_norm.weight": (queries,),
            f"{layer}.self_attn.k_norm.weight": (keys,),
            f"{layer}.block_sparse_moe.gate.weight": (config["num_local_experts"], hidden),
            f"{layer}.block_sparse_moe.e_score_correction_bias": (config["num_local_experts"],),
        }
        for expert in range(config["num_local_experts"]):
            parts = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
            for part, shape in parts.items():
                shapes[f"{layer}.block_sparse_moe.experts.{expert}.{part}.weight"] = shape
    return shapes


@cache
def _transformers_shapes(config: str) -> Shapes:
    """Those of transformers' own model, on torch's meta device, by the names that it saves them under."""
    import torch
    import transformers

    raw = json.loads(config)
    model_class = getattr(transformers, raw["architectures"][0])
    with torch.device("meta"):
        model = model_class(transformers.AutoConfig.for_model(**raw))
    renamed = model_class._checkpoint_conversion_mapping
    tied = set(model._tied_weights_keys or ()) if raw.get("tie_word_embeddings") else set()
    shapes: Shapes = {}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        for saved, loaded in renamed.items():
            # As `save_pretrained` has it: the pattern's end is a condition of loading alone.
            plain = re.sub(r"\(.*\)", "", saved.lstrip("^"))
            name, count = re.subn(f"^{loaded}", plain, name)
            if count:
                break
        shapes[name] = tuple(tensor.shape)
    return shapes


_TEXTS = {
    "en": {
        "count": "Of {all} names, msquant makes **{made}**: {calibrated} by a recipe with calibration, "
        "{free} with `--calibration none`. {refused} are refused with a reason, and of {unknown} the "
        "source's `config.json` is not at hand. A count by hand before there were int4 experts, quantized "
        "prediction layers and `--calibration none` gave 17 of 104.",
        "head": ("published name", "source", "scheme", "how msquant makes it", "GB"),
        "calibrated": "recipe `{recipe}`, calibrated",
        "free": "recipe `{recipe}`, `--calibration none`",
        "refused": "refused: {reason}",
        "unknown": "`config.json` not at hand",
    },
    "zh": {
        "count": "在 {all} 个名称中，msquant 能制作 **{made}** 个：{calibrated} 个按带校准的配方，"
        "{free} 个用 `--calibration none`。{refused} 个被拒绝并说明原因，"
        "{unknown} 个没有其来源的 `config.json`。"
        "在有 int4 专家、量化的预测层和 `--calibration none` 之前，人工统计为 104 个中的 17 个。",
        "head": ("发布的名称", "来源", "方案", "msquant 如何制作", "GB"),
        "calibrated": "配方 `{recipe}`，经校准",
        "free": "配方 `{recipe}`，`--calibration none`",
        "refused": "拒绝：{reason}",
        "unknown": "没有其 `config.json`",
    },
}


def table(found: list[Row], language: str) -> str:
    """The generated part of a page, in Markdown."""
    texts = _TEXTS[language]
    head: Any = texts["head"]
    counts = {
        "all": len(found),
        "made": sum(row.made for row in found),
        "calibrated": sum(row.made and row.calibrated for row in found),
        "free": sum(row.made and not row.calibrated for row in found),
        "refused": sum(bool(row.reason) for row in found),
        "unknown": sum(not row.made and not row.reason for row in found),
    }
    lines = [str(texts["count"]).format(**counts), "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in found:
        key = "calibrated" if row.calibrated else "free"
        if not row.made:
            key = "refused" if row.reason else "unknown"
        how = str(texts[key]).format(recipe=row.recipe, reason=row.reason.replace("|", r"\|"))
        size = f"{row.nbytes / 1e9:.1f}" if row.made else ""
        kind = f"`{row.kind}`" if row.kind else ""
        lines.append(f"| `{row.name}` | {kind} | {row.scheme} | {how} | {size} |")
    return "\n".join(lines)


def rewritten(page: str, found: list[Row], language: str) -> str:
    """A page with its generated part made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(found, language)}\n\n{END}{after}"


def main() -> int:
    """Write both pages."""
    found = rows()
    for language, path in PAGES.items():
        text = rewritten(path.read_text(encoding="utf-8"), found, language)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
