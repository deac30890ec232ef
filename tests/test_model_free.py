"""Quantization without calibration and without modelling code, of architectures that msquant does not know.

The reference is torch: weights of the source, taken apart as transformers' modelling code multiplies by them,
and rounded to nearest.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import msquant
from msquant.errors import CheckpointError, EngineError, ModelError, OutputError, RecipeError
from msquant.flows import model_free
from msquant.flows.model_free import quantize_model_free
from msquant.planning.model_free_plan import ModelFreePlan
from msquant.recipe.recipe import find_recipe, validate_recipe
from tests.fixtures.fp8 import dequantize_blocks, quantize_blocks
from tests.fixtures.tiny_strangers import stored, write_fused, write_stranger

DESCRIPTION = "quant_model_description.json"
ARCHITECTURES = ("dots1", "qwen3_next", "gpt_oss", "llama4_text", "gemma3_text", "fused")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of each architecture, written when it is first asked for."""
    root, made = tmp_path_factory.mktemp("strangers"), {}

    def source(name: str) -> Path:
        if name not in made:
            folder = root / name
            made[name] = write_fused(folder) if name == "fused" else write_stranger(folder, name)
        return made[name]

    return source


def quantize(source: Path, output: Path, form: str = "ascend", **options: Any) -> Any:
    recipe = find_recipe(str(source)).adjusted(calibration="none", formats=form, **options)
    return quantize_model_free(recipe, output, remember=False)


def matrices(tensors: dict[str, Any], kind: str) -> Iterator[tuple[str, Any]]:
    """The linear layers of a source by name, `[N, K]`, as transformers multiplies by them."""
    for name, tensor in tensors.items():
        parent, _, part = name.rpartition(".")
        if parent.endswith("experts") and part in ("gate_up_proj", "down_proj"):
            for expert, matrix in enumerate(tensor):
                # gpt_oss and llama4 compute x @ W.
                rows = matrix if kind == "fused" else matrix.T
                if part == "down_proj":
                    yield f"{parent}.{expert}.down_proj", rows
                    continue
                half = len(rows) // 2
                gate, up = (rows[::2], rows[1::2]) if kind == "gpt_oss" else (rows[:half], rows[half:])
                yield f"{parent}.{expert}.gate_proj", gate
                yield f"{parent}.{expert}.up_proj", up
        elif part == "weight" and tensor.dim() == 2:
            yield parent, tensor


def rounded(weight: Any, bits: int = 8) -> tuple[Any, Any]:
    """Round to nearest on torch: integers `[N, K]` and scales `[N, 1]`, which bfloat16 can hold."""
    import torch

    weight = weight.float()
    scale = (2 * weight.abs().amax(1, keepdim=True).double() / (2**bits - 1)).float()
    near = scale.bfloat16()
    above = torch.nextafter(near, torch.tensor(float("inf"), dtype=torch.bfloat16))
    scale = torch.where(near.float() < scale, above, near).float()
    return (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), scale


@pytest.mark.parametrize("form", ["ascend", "compressed-tensors"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_linear_is_rounded_to_nearest_and_nothing_else_is(
    sources: Callable[[str], Path], tmp_path: Path, kind: str, form: str
) -> None:
    import torch

    source = sources(kind)
    result = quantize(source, tmp_path / "out", form)
    before, after = stored(source), stored(tmp_path / "out")
    kept_float = ("embed_tokens", "lm_head", "router", "in_proj_ba", "mlp.gate", "shared_expert_gate")
    seen = set()
    for module, matrix in matrices(before, kind):
        weight = after[f"{module}.weight"]
        if module.endswith(kept_float):
            assert torch.equal(weight, matrix), module
            continue
        wanted, scale = rounded(matrix)
        assert weight.dtype == torch.int8, module
        assert torch.equal(after[f"{module}.weight_scale"].float(), scale), module
        # A quotient that lies between two integers may go either way.
        assert (weight - wanted).abs().max() <= 1
        assert (weight != wanted).float().mean() < 1e-3
        assert ((weight * scale - matrix.float()).abs() <= 0.501 * scale + 1e-6).all() or (
            weight == 127
        ).any()
        seen.add(module)
    assert len(seen) >= 9, "what is compared must not be empty"
    experts = {name.rpartition(".")[0] for name in before if name.endswith("gate_up_proj")}
    for name, tensor in before.items():
        if name.rpartition(".")[0] in experts:
            assert name not in after
        elif name not in {f"{module}.weight" for module in seen}:
            assert after[name].dtype == (
                torch.float32 if form == "ascend" and is_bias(name, seen) else tensor.dtype
            )
            assert torch.equal(after[name].to(tensor.dtype), tensor), name
    assert not msquant.inspect(tmp_path / "out").findings
    assert f"does not know model_type {json.loads((source / 'config.json').read_text())['model_type']!r}" in (
        " ".join(result.notes)
    )
    assert "was not compared with the float model" in " ".join(result.notes)


def is_bias(name: str, linears: set[str]) -> bool:
    return name.endswith(".bias") and name.removesuffix(".bias") in linears


def test_biases_of_fused_experts_go_with_their_outputs(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    import torch

    quantize(sources("gpt_oss"), tmp_path / "out", "compressed-tensors")
    before, after = stored(sources("gpt_oss")), stored(tmp_path / "out")
    experts = "model.layers.1.mlp.experts"
    both, down = before[f"{experts}.gate_up_proj_bias"], before[f"{experts}.down_proj_bias"]
    assert torch.equal(after[f"{experts}.3.gate_proj.bias"], both[3, ::2])
    assert torch.equal(after[f"{experts}.3.up_proj.bias"], both[3, 1::2])
    assert torch.equal(after[f"{experts}.3.down_proj.bias"], down[3])
    assert f"{experts}.gate_up_proj_bias" not in after


def test_the_description_names_every_tensor(sources: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(sources("dots1"), tmp_path / "out")
    described = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    after = stored(tmp_path / "out")
    assert set(after) <= set(described)
    assert described["model.layers.1.mlp.experts.0.up_proj.weight_offset"] == "W8A8_DYNAMIC"
    assert described["model.layers.1.mlp.gate.weight"] == "FLOAT"
    assert described["model.layers.0.self_attn.q_proj.bias"] == "FLOAT"


def test_a_dense_model_loads_in_transformers(sources: Callable[[str], Path], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    quantize(sources("gemma3_text"), tmp_path / "out", "compressed-tensors")
    tokens = torch.arange(5, 69).reshape(1, -1)
    expected, found = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        for folder in (sources("gemma3_text"), tmp_path / "out")
    )
    assert ((found - expected).square().mean() / expected.square().mean()).sqrt() < 0.05


@pytest.mark.parametrize(
    ("scheme", "form", "bits"),
    [("W8A16", "compressed-tensors", 8), ("W4A16_G32", "compressed-tensors", 4), ("W8A16", "ascend", 8)],
)
def test_other_schemes(
    sources: Callable[[str], Path], tmp_path: Path, scheme: str, form: str, bits: int
) -> None:
    quantize(sources("gemma3_text"), tmp_path / "out", form, scheme=scheme)
    summary = msquant.inspect(tmp_path / "out")
    assert not summary.findings
    assert summary.weight_bits == [bits]
    assert {"FLOAT", scheme} == set(summary.schemes())


def test_int4_is_for_experts_where_the_server_has_it_for_them_alone(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    import torch

    quantize(sources("dots1"), tmp_path / "out", scheme="W4A8_DYNAMIC")
    described = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    expert = "model.layers.1.mlp.experts.2.down_proj"
    assert described[f"{expert}.weight"] == "W4A8_DYNAMIC"
    assert described["model.layers.1.self_attn.q_proj.weight"] == "W8A8_DYNAMIC"
    assert not msquant.inspect(tmp_path / "out").findings
    wanted, scale = rounded(stored(sources("dots1"))[f"{expert}.weight"], bits=4)
    after = stored(tmp_path / "out")
    assert torch.equal(after[f"{expert}.weight_scale"], scale)
    assert torch.equal(after[f"{expert}.weight"][:, :] & 0xF, wanted[0::2].to(torch.int8) & 0xF)


def test_several_formats_at_once(sources: Callable[[str], Path], tmp_path: Path) -> None:
    result = quantize(sources("dots1"), tmp_path / "out", "ascend,compressed-tensors")
    assert list(result.folders) == ["ascend", "compressed-tensors"]
    for folder in result.folders.values():
        assert not msquant.inspect(folder, verify=True).findings


def test_fp8_with_exponents_for_scales(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """As DeepSeek-V3.1 and later: the scales of blocks are powers of two, stored as their exponents."""
    import torch
    from safetensors.torch import save_file

    source = tmp_path / "fp8"
    source.mkdir()
    tensors, expected = {}, {}
    for name, tensor in stored(sources("dots1")).items():
        tensors[name] = tensor
        if name.endswith("_proj.weight"):
            codes, scale = quantize_blocks(tensor, (32, 48))
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
            tensors[name] = codes
            tensors[f"{name}_scale_inv"] = scale.to(torch.float8_e8m0fnu)
            expected[name] = dequantize_blocks(codes, scale, (32, 48))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((sources("dots1") / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [32, 48],
    }
    (source / "config.json").write_text(json.dumps(config))
    quantize(source, tmp_path / "out")
    after = stored(tmp_path / "out")
    assert expected
    for name, weight in expected.items():
        wanted, scale = rounded(weight)
        assert torch.equal(after[f"{name}_scale"], scale), name
        assert (after[name] != wanted).float().mean() < 1e-3, name
    assert not any(name.endswith("_scale_inv") for name in after)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not msquant.inspect(tmp_path / "out").findings


def test_the_plan_says_before_any_work_what_is_quantized(sources: Callable[[str], Path]) -> None:
    recipe = find_recipe(str(sources("qwen3_next"))).adjusted(calibration="none")
    plan = msquant.plan(recipe)
    assert isinstance(plan, ModelFreePlan)
    kinds = {kind.pattern: kind for kind in plan.kinds}
    experts = kinds["model.layers.*.mlp.experts.*.up_proj"]
    assert (experts.count, experts.shape, experts.scheme) == (16, (32, 64), "W8A8_DYNAMIC")
    assert kinds["model.layers.*.mlp.gate.weight"].reason == "keep_float: *.gate"
    assert kinds["model.layers.*.linear_attn.conv1d.weight"].reason == "no matrix"
    assert sum(kind.source_bytes for kind in plan.kinds) == plan.source_bytes
    assert 0 < plan.output_bytes - sum(kind.output_bytes for kind in plan.kinds) < 100_000, "the headers"
    shared = msquant.plan(recipe, workers=2)
    assert isinstance(shared, ModelFreePlan)
    assert shared.workers == 2
    assert 0 < shared.peak_memory <= plan.peak_memory
    crowded = msquant.plan(recipe, workers=10**9)
    assert isinstance(crowded, ModelFreePlan)
    assert "are needed by 1000000000 workers" in crowded.problems[-1]
    assert "use --workers" in crowded.problems[-1]


def test_a_recipe_changes_the_rules(sources: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = validate_recipe(
        {
            "model": str(sources("dots1")),
            "format": "compressed-tensors",
            "quantization": {"algorithm": "rtn", "schemes": [{"o_proj": "FLOAT"}, {"*": "W8A8_DYNAMIC"}]},
            "calibration": {"source": "none"},
            "model_free": {"keep_float": ["embed", "lm_head", "mlp."]},
        },
        "recipe",
    )
    quantize_model_free(recipe, tmp_path / "out", remember=False)
    schemes = {module.name: module.scheme for module in msquant.inspect(tmp_path / "out").modules}
    quantized = {name.rpartition(".")[2] for name, scheme in schemes.items() if scheme != "FLOAT"}
    assert quantized == {"q_proj", "k_proj", "v_proj"}


def test_prediction_layers_are_quantized_or_left_out(tmp_path: Path) -> None:
    from tests.fixtures.tiny_families import write_tiny

    source = write_tiny(tmp_path / "model", "deepseek_v3", dtype="bfloat16", prediction_layers=1)
    quantize(source, tmp_path / "with", evaluate=False)
    described = json.loads((tmp_path / "with" / DESCRIPTION).read_text())
    assert described["model.layers.2.self_attn.o_proj.weight"] == "W8A8_DYNAMIC"
    assert described["model.layers.2.eh_proj.weight"] == "FLOAT"
    recipe = find_recipe(str(source)).adjusted(calibration="none", evaluate=False)
    quantize_model_free(
        recipe.model_copy(update={"prediction_layers": "none"}), tmp_path / "without", remember=False
    )
    assert not [name for name in stored(tmp_path / "without") if name.startswith("model.layers.2.")]
    assert not msquant.inspect(tmp_path / "with").findings


def test_a_known_family_is_compared_with_its_config_and_with_the_float_model(tmp_path: Path) -> None:
    from tests.fixtures.tiny_families import write_tiny

    source = write_tiny(tmp_path / "model", "qwen3", dtype="bfloat16")
    result = quantize(source, tmp_path / "out")
    assert result.evaluation["overall"]["kl"] < 0.1
    assert not result.notes
    config = json.loads((source / "config.json").read_text())
    del config["layer_types"]
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2"):
        quantize(source, tmp_path / "out2")


def interrupted(
    monkeypatch: pytest.MonkeyPatch, where: str, after: int, *arguments: Any
) -> KeyboardInterrupt:
    """Quantize, and be interrupted at the call of a function of the flow that comes after so many."""
    function, calls = getattr(model_free, where), []

    def stop(*given: Any, **options: Any) -> Any:
        calls.append(given)
        if len(calls) > after:
            raise KeyboardInterrupt
        return function(*given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(model_free, where, stop)
        with pytest.raises(KeyboardInterrupt) as caught:
            quantize(*arguments)
    return caught.value


def test_an_interrupted_run_continues_with_equal_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_stranger(tmp_path / "model", "dots1", max_shard_size="60KB")
    quantize(source, tmp_path / "whole")
    stopped = interrupted(monkeypatch, "_write_piece", 20, source, tmp_path / "out")
    assert "parts are finished" in stopped.__notes__[0]
    journal = tmp_path / "out.partial" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) > 1
    with pytest.raises(OutputError, match="started otherwise"):
        quantize(source, tmp_path / "out", scheme="W4A8_DYNAMIC")
    quantize(source, tmp_path / "out")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == wanted


def test_what_is_finished_stays_where_the_comparison_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.fixtures.tiny_families import write_tiny

    source = write_tiny(tmp_path / "model", "qwen3", dtype="bfloat16")
    interrupted(monkeypatch, "evaluate_result", 0, source, tmp_path / "out")
    assert list((tmp_path / "out.partial").glob("*.safetensors"))
    written: list[Any] = []
    monkeypatch.setattr(model_free, "_write_piece", lambda *arguments: written.append(arguments))
    assert quantize(source, tmp_path / "out").evaluation is not None
    assert written == []


def test_restart_forgets_what_any_of_the_formats_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, both = (
        write_stranger(tmp_path / "model", "dots1", max_shard_size="60KB"),
        "ascend,compressed-tensors",
    )
    interrupted(monkeypatch, "_write_piece", 20, source, tmp_path / "out", both)
    shard, *_ = sorted((tmp_path / "out-compressed-tensors.partial").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(msquant.MsquantError, match="restart"):
        quantize(source, tmp_path / "out", both)
    recipe = find_recipe(str(source)).adjusted(calibration="none", formats=both, evaluate=False)
    result = quantize_model_free(recipe, tmp_path / "out", restart=True, remember=False)
    assert len(result.folders) == 2
    assert not any(msquant.inspect(folder).findings for folder in result.folders.values())


def test_a_device_that_is_not_here_is_refused_before_anything_is_written(
    sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: str) -> None:
        raise EngineError(f"there is no {device}")

    monkeypatch.setattr(model_free, "require_device", refuse)
    with pytest.raises(EngineError, match="no cpu"):
        quantize(sources("gemma3_text"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"layers.0.mlp.experts.gate_up_proj": (4, 95, 64)}, "its 95 rows are not gate and up of one size"),
        (
            {"layers.0.self_attn.q_proj.weight": (48, 64), "layers.0.self_attn.q_proj.bias": (32,)},
            r"q_proj.bias is \[32\], and .* has \[48\] outputs",
        ),
        (
            {"layers.0.mlp.experts.up_proj": (2, 32, 64), "layers.0.mlp.experts.0.up_proj.weight": (32, 64)},
            "experts.0.up_proj is in .* and in",
        ),
        ({"norm.weight": (64,)}, "holds no linear layer to quantize"),
    ],
)
def test_tensors_that_contradict_are_named_before_anything_is_written(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], problem: str
) -> None:
    import torch
    from safetensors.torch import save_file

    source = write_fused(tmp_path / "model")
    values = {f"model.{name}": torch.randn(shape).bfloat16() for name, shape in tensors.items()}
    save_file(values, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=problem):
        quantize(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_matrix_without_numbers_is_carried(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    source = write_fused(tmp_path / "model")
    values = {"model.a_proj.weight": torch.empty(0, 64), "model.b_proj.weight": torch.ones(4, 64)}
    save_file({name: value.bfloat16() for name, value in values.items()}, source / "model.safetensors")
    folder = quantize(source, tmp_path / "out").folders["ascend"]
    description = json.loads((folder / DESCRIPTION).read_text())
    assert [description[name] for name in values] == ["FLOAT", "W8A8_DYNAMIC"]


def test_nan_is_named(sources: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = stored(sources("gemma3_text"))
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        source = tmp_path / name
        source.mkdir()
        broken = {key: value.clone() for key, value in tensors.items()}
        broken[name].view(-1)[5] = float("nan")
        save_file(broken, source / "model.safetensors", metadata={"format": "pt"})
        (source / "config.json").write_text((sources("gemma3_text") / "config.json").read_text())
        with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity in 1 of"):
            quantize(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"quantization": {"algorithm": "osl"}}, "osl needs calibration text"),
        (
            {"quantization": {"algorithm": "rtn"}},
            r"\* is W8A8, whose activations are calibrated.*W8A8_DYNAMIC",
        ),
        ({"format": "golden-stick"}, "golden-stick is written with calibration alone"),
        ({"calibration": {"source": ["none", "builtin"]}}, "none stands alone"),
    ],
)
def test_what_needs_text_is_refused(section: dict[str, Any], problem: str) -> None:
    raw: dict[str, Any] = {
        "model": "x",
        "format": "ascend",
        "quantization": {"algorithm": "rtn", "schemes": [{"*": "W8A8_DYNAMIC"}]},
        "calibration": {"source": "none"},
    }
    with pytest.raises(RecipeError, match=problem):
        validate_recipe(raw | section, "recipe.yaml")


def test_other_quantized_sources_are_refused(sources: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(sources("gemma3_text"), tmp_path / "out")
    with pytest.raises(ModelError, match="quantized already"):
        quantize(tmp_path / "out", tmp_path / "again")
    source = tmp_path / "mxfp4"
    source.mkdir()
    for path in sources("gpt_oss").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}})
    )
    with pytest.raises(ModelError, match=r"says mxfp4, and no tensor \*_blocks with its \*_scales"):
        quantize(source, tmp_path / "again")


def write_mxfp4(source: Path, folder: Path, *, decoded: bool, **changes: Any) -> Path:
    """gpt-oss with random experts as it is published, or with what transformers dequantizes of them."""
    import torch
    from safetensors.torch import save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    generator, tensors = torch.Generator().manual_seed(3), stored(source)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(
            0, 256, (count, rows, columns // 32, 16), generator=generator, dtype=torch.uint8
        )
        scales = torch.randint(115, 130, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
        packed = {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors |= {name: convert_moe_packed_tensors(blocks, scales)} if decoded else packed
    tensors |= changes
    save_file(
        {n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors", {"format": "pt"}
    )
    if not decoded:
        config = json.loads((source / "config.json").read_text())
        section = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return folder


def test_experts_in_mxfp4_are_what_transformers_makes_of_them(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    import torch

    packed = write_mxfp4(sources("gpt_oss"), tmp_path / "packed", decoded=False)
    plain = write_mxfp4(sources("gpt_oss"), tmp_path / "plain", decoded=True)
    for name, source in {"a": packed, "b": plain}.items():
        result = quantize(source, tmp_path / name, "compressed-tensors")
        assert "experts that lie in one tensor" in " ".join(result.notes)
    ours, theirs = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert sorted(ours) == sorted(theirs)
    assert any("experts.3.up_proj" in name for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert "quantization_config" in json.loads((tmp_path / "a" / "config.json").read_text())
    assert not msquant.inspect(tmp_path / "a").findings
    plan = msquant.plan(find_recipe(str(packed)).adjusted(calibration="none"))
    assert any(kind.pattern.endswith("experts.*.up_proj") for kind in plan.kinds)


def test_damaged_mxfp4_is_named(sources: Callable[[str], Path], tmp_path: Path) -> None:
    import torch

    scales = "model.layers.1.mlp.experts.down_proj_scales"
    missing = write_mxfp4(sources("gpt_oss"), tmp_path / "missing", decoded=False, **{scales: None})
    with pytest.raises(ModelError, match=r"down_proj_blocks is U8 .* and .*down_proj_scales is missing"):
        quantize(missing, tmp_path / "out")
    wrong = {scales: torch.full((4, 64, 2), 255, dtype=torch.uint8)}
    nan = write_mxfp4(sources("gpt_oss"), tmp_path / "nan", decoded=False, **wrong)
    with pytest.raises(
        CheckpointError, match=r"down_proj_scales holds NaN, .* at expert 0, output 0, input 0"
    ):
        quantize(nan, tmp_path / "out")
    recipe = find_recipe(str(tmp_path / "nan")).adjusted(calibration="none")
    kept = recipe.replace("model_free", keep_float=["experts", "embed", "lm_head"])
    with pytest.raises(ModelError, match="down_proj_blocks is in MXFP4, and would stay so"):
        quantize_model_free(kept, tmp_path / "out", remember=False)


def test_square_experts_of_an_unknown_model_are_asked_about(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    source = write_fused(tmp_path / "model")
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(2, 64, 64).bfloat16(),
        "model.layers.0.mlp.experts.down_proj": torch.randn(2, 64, 64).bfloat16(),
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="do not tell outputs of an expert from inputs") as caught:
        quantize(source, tmp_path / "out")
    assert "expert_layout" in (caught.value.remedy or "")
    recipe = (
        find_recipe(str(source))
        .adjusted(calibration="none")
        .replace("model_free", expert_layout="inputs-first")
    )
    quantize_model_free(recipe, tmp_path / "out", remember=False)
    wanted, _ = rounded(tensors["model.layers.0.mlp.experts.gate_up_proj"][1].T[32:])
    found = stored(tmp_path / "out")["model.layers.0.mlp.experts.1.up_proj.weight"]
    assert (found != wanted).float().mean() < 1e-3


@pytest.mark.parametrize("spread", [1.0, 1e-30])
def test_fp8_codes_are_rounded_as_what_they_stand_for(spread: float) -> None:
    """Beside `quantize_weight` of the dequantized weight: equal scales, and ties that may go either way."""
    import numpy as np

    from msquant.checkpoint.fp8 import VALUES
    from msquant.kernels.fp8_rounding import quantize_codes
    from msquant.kernels.weight_rounding import quantize_weight

    generator = np.random.default_rng(0)
    codes = (
        generator.integers(0, 0x7F, (96, 256), dtype=np.uint8)
        | generator.integers(0, 2, (96, 256), np.uint8) << 7
    )
    codes[5] = 0
    scales = (generator.uniform(0.5, 2, (2, 4)) * spread).astype(np.float32)
    blocks = [(codes[rows], np.repeat(scales, 48, axis=0)[rows]) for rows in (slice(0, 60), slice(60, 96))]
    weight = VALUES[codes] * np.repeat(np.repeat(scales, 48, axis=0), 64, axis=1)
    for dtype in ("bfloat16", "float32"):
        found, expected = quantize_codes(blocks, codes.shape, dtype), quantize_weight(weight, dtype)
        assert found is not None
        assert np.array_equal(found.scale, expected.scale)
        away = np.abs(found.weight.astype(int) - expected.weight)
        assert away.max() <= 1
        # The greatest number of a row is at 127.5 steps, which either order of rounding may miss.
        assert np.count_nonzero(away) <= (0 if dtype == "bfloat16" else len(codes))
    codes[0, 0] = 0x7F
    nan = [(codes, np.repeat(scales, 48, axis=0))]
    assert quantize_codes(nan, codes.shape) is None, "NaN is left to who says where it is"
