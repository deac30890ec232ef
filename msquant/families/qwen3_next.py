"""Qwen3-Next: three layers of gated delta rule attention (arXiv 2412.06464) to one of gated attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msquant.families.base import (
    Config,
    DeltaSizes,
    ExpertSizes,
    Names,
    Shapes,
    SmoothGroup,
    positive,
    unexpected,
)
from msquant.families.qwen import QwenMoe

LINEAR, FULL = "linear_attention", "full_attention"
"""What `layer_types` calls a layer of each kind."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Qwen3Next(QwenMoe):
    """A family whose layers mix tokens in two ways.

    Its norms multiply by 1 plus their weight, but for the one behind the delta rule, which multiplies by its
    weight, and then by a gate.
    """

    def mixer(self, config: Config, index: int) -> str:
        """See `Family`."""
        return self.names.delta if self._kinds(config)[index] == LINEAR else self.names.attention

    def mixers_as(self, config: Config, layers: Sequence[int]) -> dict[str, Any]:
        """See `Family`."""
        kinds = self._kinds(config)
        return {"layer_types": [kinds[index] for index in layers]}

    def mixer_groups(self, config: Config, index: int) -> tuple[SmoothGroup, ...]:
        """See `Family`; decay and step size of the delta rule are made in floating point."""
        names = self.names
        if self.mixer(config, index) == names.attention:
            return self.attention_groups(config)
        inputs, gates, norm, output = (
            f"{names.delta}.{part}"
            for part in (names.delta_inputs, names.delta_gates, names.delta_norm, names.delta_output)
        )
        heads = positive(self.completed(config), "linear_num_value_heads")
        return (
            SmoothGroup("qkvz", (inputs,), names.input_norm, followers=(gates,)),
            SmoothGroup("o", (output,), norm, heads=heads),
        )

    def writes_residual(self, linear: str) -> bool:
        """See `Family`."""
        return linear == f"{self.names.delta}.{self.names.delta_output}" or super().writes_residual(linear)

    def norm_offset(self, norm: str) -> float:
        """See `Family`."""
        return 0.0 if norm.endswith(f".{self.names.delta}.{self.names.delta_norm}") else 1.0

    def mixer_shapes(self, config: Config, index: int, hidden: int) -> Shapes:
        """See `Family`."""
        names = self.names
        if self.mixer(config, index) == names.attention:
            return super().mixer_shapes(config, index, hidden)
        sizes = _sizes(config)
        block = f"{self.layer_name(index)}.{names.delta}"
        channels = 2 * sizes.keys + sizes.values
        return {
            f"{block}.{names.delta_step}": (sizes.value_heads,),
            f"{block}.{names.delta_decay}": (sizes.value_heads,),
            f"{block}.{names.delta_convolution}.weight": (channels, 1, sizes.kernel),
            f"{block}.{names.delta_inputs}.weight": (channels + sizes.values, hidden),
            f"{block}.{names.delta_gates}.weight": (2 * sizes.value_heads, hidden),
            f"{block}.{names.delta_norm}.weight": (sizes.value_dim,),
            f"{block}.{names.delta_output}.weight": (hidden, sizes.values),
        }

    def shared_size(self, config: Config) -> int:
        """See `Family`."""
        return positive(config, "shared_expert_intermediate_size")

    def extra_shapes(self, config: Config) -> Shapes:
        """See `Family`; a layer of full attention, which shares embeddings and head with the model."""
        config = self.completed(config)
        layer: dict[str, Any] = {
            "num_hidden_layers": 1,
            "layer_types": [FULL],
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
        }
        hidden, block = positive(config, "hidden_size"), self.prediction_block
        shapes: Shapes = {
            f"{block}.fc.weight": (hidden, 2 * hidden),
            f"{block}.norm.weight": (hidden,),
            f"{block}.pre_fc_norm_embedding.weight": (hidden,),
            f"{block}.pre_fc_norm_hidden.weight": (hidden,),
        }
        for name, shape in self.layer_shapes(config | layer, 0).items():
            shapes[f"{block}.layers.0{name.removeprefix(self.layer_name(0))}"] = shape
        return shapes

    def delta_sizes(self, config: Any) -> DeltaSizes:
        """See `Family`. Raises CheckpointError if the heads of keys do not divide those of values."""
        return _sizes(vars(config))

    def expert_sizes(self, config: Any) -> ExpertSizes:
        """See `Family`."""
        return ExpertSizes(
            count=config.num_experts,
            per_token=config.num_experts_per_tok,
            intermediate_size=config.moe_intermediate_size,
            shared=1,
            normalize=config.norm_topk_prob,
        )

    @property
    def float_only(self) -> dict[str, str]:
        """See `Family`."""
        names = self.names
        return {
            **super().float_only,
            f"{names.feed_forward}.{names.shared_gate}": "the gate of the shared expert",
            f"{names.delta}.{names.delta_gates}": "what makes decay and step size of the delta rule",
        }

    def _kinds(self, config: Config) -> list[str]:
        """What each layer mixes tokens by. Raises CheckpointError if `config.json` makes no sense there."""
        count, kinds = positive(config, "num_hidden_layers"), config.get("layer_types")
        if kinds is None:
            every = positive(config, "full_attention_interval", 4)
            return [LINEAR if (index + 1) % every else FULL for index in range(count)]
        if not isinstance(kinds, list) or len(kinds) != count or not {LINEAR, FULL}.issuperset(kinds):
            raise unexpected("layer_types", kinds, f"a list of {count} times {LINEAR} or {FULL}")
        return kinds


def _sizes(config: Config) -> DeltaSizes:
    key_heads, value_heads, key_dim, value_dim, kernel = (
        positive(config, f"linear_{key}")
        for key in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    )
    if value_heads % key_heads:
        raise unexpected("linear_num_value_heads", value_heads, f"a multiple of {key_heads} key heads")
    return DeltaSizes(key_heads, value_heads, key_dim, value_dim, kernel)


QWEN3_NEXT = Qwen3Next(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    names=Names(shared_experts="shared_expert"),
    query_key_norms=True,
    router="softmax",
    expert_count="num_experts",
    shared_gate=True,
    output_gate=True,
    prediction_block="mtp",
    defaults={
        "intermediate_size": 5632,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 512,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    },
    options={"partial_rotary_factor": None},
    # vLLM-MindSpore 0.5.1 has no Qwen3-Next.
    formats=("ascend", "compressed-tensors"),
)
