"""Outlier channels for a trained DeepSeek-V3, GLM-4.5 or Qwen3 of any kind on torch; its function stays.

Where a tensor's channel reaches others through nothing but their own columns for it, the channel is scaled up
and these columns are scaled down by the same factor:

- `attention`: `input_layernorm` and what reads it: `q_a_proj` and `kv_a_proj_with_mqa`, or q, k and v, or
  both projections of the gated delta rule.
- `feed_forward`: `post_attention_layernorm` and the gate and up projections of the dense layer, or of all
  experts, the router and the gate of a shared expert.
- `inner`: `q_a_layernorm` and `q_b_proj`; `kv_a_layernorm` and `kv_b_proj`; the value rows of `kv_b_proj`
  or the rows and bias of `v_proj`, and `o_proj`; the norm behind the delta rule and `out_proj`; the rows of
  every `up_proj` and its `down_proj`.

These are where large models have them.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Outliers:
    """How many channels are scaled, and by how much.

    Attributes:
        share: of the channels of each tensor, at least one.
        least: the smallest factor.
        attention: the largest factor of `input_layernorm`.
        feed_forward: the largest factor of `post_attention_layernorm`.
        inner: the largest factor everywhere else.
        seed: of the channels and their factors, which are spread evenly on a logarithmic scale.
    """

    share: float = 0.02
    least: float = 2.0
    attention: float = 24.0
    feed_forward: float = 7.0
    inner: float = 4.0
    seed: int = 0


def add_outliers(model: Any, outliers: Outliers) -> None:
    """Scale channels of a causal language model in place; its logits stay equal up to rounding."""
    import torch

    generator = torch.Generator().manual_seed(outliers.seed)
    with torch.no_grad():
        for layer in model.model.layers:
            for scaled, readers, largest in _places(layer, model.config, outliers):
                channels = len(scaled[0])
                count = max(1, round(outliers.share * channels))
                chosen = torch.randperm(channels, generator=generator)[:count]
                spread = torch.rand(count, generator=generator)
                factors = torch.ones(channels)
                factors[chosen] = outliers.least * (largest / outliers.least) ** spread
                # Qwen3-Next's norms multiply by 1 plus their weight, but for the one within a block.
                norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
                centred = any(scaled[0] is norm for norm in norms)
                offset = 1.0 if centred and model.config.model_type == "qwen3_next" else 0.0
                for rows in scaled:
                    rows += offset
                    rows *= factors if rows.ndim == 1 else factors[:, None]
                    rows -= offset
                for weight in readers:
                    weight /= factors


def _places(
    layer: Any, config: Any, outliers: Outliers
) -> Iterator[tuple[Sequence[Any], Sequence[Any], float]]:
    """What is scaled up (views of norms, biases `[C]`, of rows `[C, K]`), who reads it `[N, C]`, how much."""
    attention, mlp = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn, layer.mlp
    experts = [*mlp.experts] if hasattr(mlp, "experts") else [mlp]
    experts += [getattr(mlp, name) for name in ("shared_experts", "shared_expert") if hasattr(mlp, name)]
    inputs = [projection.weight for expert in experts for projection in (expert.gate_proj, expert.up_proj)]
    inputs += [getattr(mlp, name).weight for name in ("gate", "shared_expert_gate") if hasattr(mlp, name)]
    names = next(names for names in _READERS if hasattr(attention, names[0]))
    readers = [attention.get_submodule(name).weight for name in names]
    yield [layer.input_layernorm.weight], readers, outliers.attention
    yield [layer.post_attention_layernorm.weight], inputs, outliers.feed_forward
    yield from ((scaled, columns, outliers.inner) for scaled, columns in _attention_places(attention, config))
    for expert in experts:
        yield [expert.up_proj.weight], [expert.down_proj.weight], outliers.inner


# Of the layer's input, in latent attention, with the gated delta rule, and in other attention.
_READERS = (
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("q_proj", "k_proj", "v_proj"),
)


def _attention_places(attention: Any, config: Any) -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
    """Within attention: for latent attention its norms, and the values' rows with o_proj's columns."""
    if hasattr(attention, "out_proj"):
        yield [attention.norm.weight], attention.out_proj.weight.split(len(attention.norm.weight), dim=1)
        return
    heads, output = config.num_attention_heads, attention.o_proj.weight
    if not hasattr(attention, "q_a_proj"):
        size, shared = attention.head_dim, heads // config.num_key_value_heads
        for head in range(config.num_key_value_heads):
            readers = range(head * shared, (head + 1) * shared)
            columns = [output[:, reader * size : (reader + 1) * size] for reader in readers]
            rows = slice(head * size, (head + 1) * size)
            values = [attention.v_proj.weight, attention.v_proj.bias]
            yield [part[rows] for part in values if part is not None], columns
        return
    yield [attention.q_a_layernorm.weight], [attention.q_b_proj.weight]
    yield [attention.kv_a_layernorm.weight], [attention.kv_b_proj.weight]
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    per_head = attention.kv_b_proj.weight.view(heads, nope + value, -1)
    for head in range(heads):
        yield [per_head[head, nope:]], [output[:, head * value : (head + 1) * value]]
