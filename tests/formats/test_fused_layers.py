"""Layers that engines run as one."""

from msquant.formats.fused_layers import check_fused_schemes, experts_parent, fused_layers


def test_fused_layers_are_found_by_the_names_of_their_parts() -> None:
    names = [f"a.{name}" for name in ("q_a_proj", "kv_a_proj_with_mqa", "q_proj", "gate_proj", "up_proj")]
    assert fused_layers(names) == {
        "a.gate_up_proj": ["a.gate_proj", "a.up_proj"],
        "a.fused_qkv_a_proj": ["a.q_a_proj", "a.kv_a_proj_with_mqa"],
    }
    assert fused_layers(["a.q_proj", "a.k_proj", "b.v_proj"]) == {}


def test_the_experts_of_a_layer_are_told_by_their_names() -> None:
    assert experts_parent("model.layers.3.mlp.experts.12.up_proj") == "model.layers.3.mlp.experts"
    assert experts_parent("model.layers.3.mlp.shared_experts.up_proj") is None


def test_what_runs_as_one_has_one_scheme() -> None:
    alike = {"a.q_proj": "static", "a.k_proj": "static", "a.v_proj": "static", "a.o_proj": "float"}
    assert list(check_fused_schemes(alike)) == []
    (finding,) = check_fused_schemes({**alike, "a.k_proj": "float"})
    assert str(finding) == "a.k_proj: is float, unlike a.q_proj (static): they run as one layer"
    experts = {"m.experts.0.up_proj": "W8A8", "m.experts.1.down_proj": "FLOAT"}
    (finding,) = check_fused_schemes(experts, "described as")
    assert str(finding).startswith("m.experts.1.down_proj: described as FLOAT, unlike m.experts.0")
