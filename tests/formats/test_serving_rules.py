"""Every rule of the servers, by name: what it refuses, and a neighbour that it does not."""

from dataclasses import replace
from typing import Any

import pytest

from msquant.formats.servers import SERVERS, Parallelism, ServedModel, Server
from msquant.formats.serving_rules import RULES
from msquant.formats.verdicts import best_refusal, refusals, servers_of, serving_table
from msquant.schemes import FLOAT, W4A8_DYNAMIC, W8A8, W8A8_DYNAMIC, W8A8_MIX, Scheme, parse_scheme
from tests.formats.expert_folders import DEEPSEEK, QWEN, schemes_of
from tests.formats.folders import CONFIG

SECTION = {"quant_method": "golden-stick"}
UNSCALED = {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096}
PUBLISHED = {
    **{key: value for key, value in DEEPSEEK.items() if key != "auto_map"},
    "quantization_config": SECTION,
    "rope_scaling": UNSCALED,
    "num_attention_heads": 32,
    "vocab_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
LINEARS = schemes_of(DEEPSEEK)
NATIVE, MF17, MF18, _, LATER, ASCEND, ASCEND26, ASCEND_MAIN, GPU, CPU = SERVERS
TP4 = Parallelism(4)
QUERY = "model.layers.1.self_attn.q_a_proj"


def deepseek(linears: dict[str, Scheme] | None = None, **changes: Any) -> ServedModel:
    return ServedModel("golden-stick", "mindformers", PUBLISHED | changes, LINEARS | (linears or {}))


def llama(**changes: Any) -> ServedModel:
    return ServedModel("golden-stick", "native", CONFIG | changes, {"model.layers.0.mlp.up_proj": W8A8})


def moe(scheme: Scheme, model_type: str = "qwen3_moe") -> ServedModel:
    linears: dict[str, Scheme] = {"model.layers.0.self_attn.o_proj": W8A8}
    linears |= {"model.layers.0.mlp.experts.0.up_proj": scheme}
    return ServedModel("compressed-tensors", "", QWEN | {"model_type": model_type}, linears)


PACKED, PACKED_EXPERT = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.experts.0.up_proj"


def packed(word: str, hidden: int = 16, **changes: Any) -> ServedModel:
    changes = {"hidden_size": hidden, "head_dim": 4} | changes
    return ServedModel("compressed-tensors", "", CONFIG | changes, {PACKED: parse_scheme(word)})


EXPERT_UP = "model.layers.0.mlp.experts.0.up_proj"


def deepseek_experts(scheme: Scheme) -> ServedModel:
    first = "model.layers.1.mlp.experts.0"
    linears: dict[str, Scheme] = {f"{first}.up_proj": scheme, f"{first}.down_proj": scheme}
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "n_routed_experts": 8}
    return deepseek(linears, **sizes)


def int4_experts(scheme: Scheme = W4A8_DYNAMIC) -> ServedModel:
    sizes = {"num_attention_heads": 96, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 192}
    sizes |= {"moe_intermediate_size": 96, "intermediate_size": 96, "num_experts": 96}
    linears: dict[str, Scheme] = {EXPERT_UP: scheme, EXPERT_UP.replace("up_proj", "down_proj"): scheme}
    return ServedModel("ascend", "ascendV1", QWEN | sizes, linears)


def int4_linear(scheme: Scheme) -> ServedModel:
    return ServedModel("ascend", "ascendV1", CONFIG, {PACKED: scheme})


CASES: dict[str, list[tuple[Server, ServedModel, Parallelism, str, str]]] = {
    "format": [(ASCEND, llama(), Parallelism(), "golden-stick", "cannot read")],
    "rope-rows": [(LATER, deepseek(), TP4, "self_attn.q_b_proj", "reorders them once more")],
    "backend": [(NATIVE, deepseek(), TP4, "VLLM_MS_MODEL_BACKEND", "which is mindformers")],
    "architecture": [
        (NATIVE, llama(model_type="mistral"), Parallelism(), "model_type", "not in its registry"),
        (
            NATIVE,
            replace(llama(model_type="qwen3_moe"), variant="native"),
            Parallelism(),
            "model_type",
            "fail an assertion",
        ),
        (MF17, deepseek(model_type="qwen3_moe"), TP4, "model_type", "Qwen3-MoE without quantization"),
        (MF17, deepseek(model_type="deepseek_v2"), TP4, "model_type", "no quantized deepseek_v2"),
        (MF17, deepseek(q_lora_rank=None), TP4, "q_lora_rank", "does not load the q_proj"),
    ],
    "config-keys": [
        (MF18, deepseek(rope_interleave=False), TP4, "config.json: rope_interleave", "refuses keys"),
        (MF17, deepseek(dtype="bfloat16", qk_head_dim=1), TP4, "config.json: dtype, qk_head_dim", "refuses"),
    ],
    "rope-scaling": [(MF17, deepseek(rope_scaling=None), TP4, "config.json: rope_scaling", "factor 40")],
    "parameter-dtype": [(MF17, deepseek(torch_dtype="float16"), TP4, "config.json: torch_dtype", "bfloat16")],
    "fused-section": [
        (MF17, deepseek(quantization_config=None), TP4, "config.json: quantization_config", "below TP16")
    ],
    "fused-attention": [
        (MF17, deepseek({QUERY: W8A8_DYNAMIC}), TP4, QUERY, "is W8A8_DYNAMIC: below TP16"),
        (MF17, deepseek({QUERY: FLOAT}), TP4, QUERY, "is FLOAT: below TP16"),
    ],
    "value-heads": [
        (MF17, deepseek(v_head_dim=12), Parallelism(16), "config.json: v_head_dim", "as wide as qk_nope")
    ],
    "expert-groups": [
        (MF17, deepseek(num_experts_per_tok=3), TP4, "config.json: num_experts_per_tok", "divided by topk"),
        (MF18, deepseek(num_experts_per_tok=2), TP4, "config.json: num_experts_per_tok", "their 1 best"),
    ],
    "divisible": [
        (NATIVE, llama(), Parallelism(8), "config.json: num_attention_heads", "is 4"),
        (NATIVE, llama(intermediate_size=30), TP4, "config.json: intermediate_size", "is 30"),
        (MF17, deepseek(vocab_size=66), TP4, "config.json: vocab_size", "is 66"),
        (MF17, deepseek(), Parallelism(4, 1, 2), "config.json: n_routed_experts", "is 3"),
        (MF17, deepseek(moe_intermediate_size=6), TP4, "config.json: moe_intermediate_size", "is 6"),
    ],
    "key-value-heads": [
        (NATIVE, llama(num_key_value_heads=6, num_attention_heads=12), TP4, "config.json: num_key", "is 6")
    ],
    "expert-kernels": [
        (CPU, moe(W8A8_DYNAMIC, "deepseek_v3"), Parallelism(), "mlp.experts", "No Int8 MoE backend"),
        (GPU, moe(FLOAT), Parallelism(), "mlp.experts", "does not know in a quantized model"),
    ],
    "packed-weights": [
        (CPU, packed("W8A16"), Parallelism(), PACKED, "is W8A16: its kernels for weights alone take 4 bits"),
        (GPU, packed("W2A16"), Parallelism(), PACKED, "take 4 and 8 bits"),
        (CPU, packed("W4A16_G8"), Parallelism(), PACKED, "multiples of 32, not 16 rows and 16 columns"),
        (GPU, packed("W4A16_G8"), TP4, PACKED, "groups of 8 do not divide the 4 inputs of each processor"),
        (GPU, packed("W4A16_G8_ASYM", 12), Parallelism(), PACKED, "of its 12 rows do not fill whole numbers"),
        (GPU, moe(parse_scheme("W4A16_G8_ASYM")), Parallelism(), PACKED_EXPERT, "no zero points"),
        (CPU, moe(parse_scheme("W4A16_CHANNEL")), Parallelism(), PACKED_EXPERT, "on a CPU have groups"),
    ],
    "int4-kernels": [
        (GPU, packed("W4A8_DYNAMIC"), Parallelism(), PACKED, "no kernel for GPUs takes int4 weights"),
        (CPU, packed("W4A8_DYNAMIC_G16"), Parallelism(), PACKED, "takes groups of multiples of 32"),
        (CPU, packed("W4A8_DYNAMIC_G32"), Parallelism(), PACKED, "groups of 32 do not divide the 16 inputs"),
        (CPU, packed("W4A8_DYNAMIC", head_dim=1), TP4, PACKED, "pairs do not divide the 1 inputs"),
    ],
    "int4-experts": [
        (ASCEND, int4_experts(), Parallelism(3), EXPERT_UP, "not shared evenly by 3 NPUs"),
        (ASCEND, int4_experts(), Parallelism(32), EXPERT_UP, "not shared evenly by 32 NPUs"),
        (ASCEND, int4_experts(), Parallelism(16), EXPERT_UP, "on each of 16 NPUs 4 do not divide its 6 rows"),
        (
            ASCEND26,
            int4_experts(W4A8_DYNAMIC.in_groups(8)),
            Parallelism(8),
            EXPERT_UP.replace("up_proj", "down_proj"),
            "on each of 8 NPUs groups of 8 do not divide its 12 inputs",
        ),
        (
            MF17,
            deepseek_experts(W4A8_DYNAMIC),
            Parallelism(8),
            "model.layers.1.mlp.experts.0.down_proj",
            "on each of 8 NPUs groups of 64 do not divide its 16 inputs",
        ),
    ],
    "int4-groups": [
        (
            ASCEND_MAIN,
            int4_experts(W4A8_DYNAMIC.in_groups(8)),
            Parallelism(),
            EXPERT_UP,
            "is W4A8_DYNAMIC_G8: since August 2026 it refuses int4 weights in groups",
        )
    ],
    "int4-linears": [
        (
            ASCEND_MAIN,
            int4_linear(W4A8_DYNAMIC),
            Parallelism(),
            PACKED,
            "is W4A8_DYNAMIC: it does not compute int4 weights of other layers than experts",
        ),
        (
            ASCEND,
            int4_linear(W4A8_DYNAMIC),
            Parallelism(),
            PACKED,
            "is W4A8_DYNAMIC: it does not compute int4 weights without groups of other layers than experts",
        ),
    ],
    "mixed-experts": [
        (
            ASCEND_MAIN,
            ServedModel("ascend", "ascendV1", QWEN, {EXPERT_UP: W8A8_MIX}),
            Parallelism(),
            EXPERT_UP,
            "is W8A8_MIX: it has it for no routed experts",
        )
    ],
}


def test_every_rule_has_a_case() -> None:
    assert list(CASES) == [rule.name for rule in RULES]


@pytest.mark.parametrize(
    ("rule", "server", "model", "split", "where", "problem"),
    [pytest.param(name, *case, id=name) for name, cases in CASES.items() for case in cases],
)
def test_what_a_server_refuses_is_named(
    rule: str, server: Server, model: ServedModel, split: Parallelism, where: str, problem: str
) -> None:
    (found,) = refusals(server, model, split)
    assert found.rule == rule
    assert found.where.startswith(where)
    assert problem in found.problem
    assert found.remedy


@pytest.mark.parametrize(
    ("server", "model", "split"),
    [
        (NATIVE, llama(), TP4),
        (NATIVE, llama(vocab_size=31), TP4),
        (NATIVE, llama(num_key_value_heads=1), TP4),
        (MF17, deepseek(), TP4),
        (MF17, deepseek(rope_interleave=False), TP4),
        (MF18, deepseek(), Parallelism(4, 3, 3)),
        # One cache, from which on the attention is not fused.
        (MF17, deepseek({QUERY: W8A8_DYNAMIC}, quantization_config=None), Parallelism(16)),
        (MF17, deepseek(v_head_dim=12), TP4),
        # All groups are chosen, however they are ranked.
        (MF18, deepseek(num_experts_per_tok=4, n_group=1, topk_group=1), TP4),
        # Multi-token-prediction layers are built without quantization.
        (MF17, deepseek({"model.layers.2.self_attn.q_a_proj": FLOAT}), TP4),
        (CPU, moe(W8A8_DYNAMIC), Parallelism()),
        (CPU, packed("W4A8_DYNAMIC"), TP4),
        (CPU, moe(W4A8_DYNAMIC), Parallelism()),
        (ASCEND, int4_experts(), Parallelism(8)),
        (ASCEND, int4_experts(), Parallelism(32, 1, 32)),
        (ASCEND, int4_experts(W4A8_DYNAMIC.in_groups(8)), Parallelism(4)),
        (ASCEND26, int4_experts(W4A8_DYNAMIC.in_groups(8)), Parallelism()),
        (ASCEND_MAIN, int4_experts(), Parallelism()),
        (MF17, deepseek_experts(W4A8_DYNAMIC.in_groups(32)), Parallelism(4)),
        (MF17, deepseek_experts(W4A8_DYNAMIC), Parallelism(2)),
        (MF18, deepseek_experts(W4A8_DYNAMIC.in_groups(64)), Parallelism(8, 1, 8)),
        (CPU, moe(FLOAT, "deepseek_v3"), Parallelism()),
        (GPU, moe(W8A8_DYNAMIC, "deepseek_v3"), Parallelism()),
    ],
)
def test_what_a_server_serves(server: Server, model: ServedModel, split: Parallelism) -> None:
    assert refusals(server, model, split) == ()


def test_sizes_of_one_verdict_are_one_row() -> None:
    rows = [row for row in serving_table(deepseek({QUERY: FLOAT})) if row.server == MF17]
    assert [(row.tensor_parallel, row.served) for row in rows] == [((1, 2, 4, 8), False), ((16,), True)]


def test_the_best_refusal_is_of_the_backend_that_the_folder_is_for() -> None:
    model = deepseek({QUERY: FLOAT})
    found = best_refusal(servers_of(model, "vllm-mindspore"), model, TP4)
    assert found is not None
    assert (found[0], found[1].rule) == (MF17, "fused-attention")
    assert best_refusal(servers_of(model, "vllm-mindspore"), model, Parallelism(16)) is None


def test_a_server_of_which_little_is_known_is_listed_for_that_alone() -> None:
    assert LATER in servers_of(deepseek())
    assert LATER not in servers_of(llama())
