"""Outlier channels for a trained DeepSeek-V3 on torch, without changing its function.

Where a tensor's channel reaches others through nothing but their own columns for it, the channel is scaled up
and these columns are scaled down by the same factor:

- `attention`: `input_layernorm` and `q_a_proj`, `kv_a_proj_with_mqa`.
- `feed_forward`: `post_attention_layernorm` and the gate and up projections of the dense layer, or of all
  experts and the router.
- `inner`: `q_a_layernorm` and `q_b_proj`; `kv_a_layernorm` and `kv_b_proj`; the value rows of `kv_b_proj`
  and `o_proj`; the rows of every `up_proj` and its `down_proj`.

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
    """Scale channels of `DeepseekV3ForCausalLM` in place; its logits stay equal up to rounding."""
    import torch

    generator = torch.Generator().manual_seed(outliers.seed)
    with torch.no_grad():
        for layer in model.model.layers:
            for rows, readers, largest in _places(layer, model.config, outliers):
                count = max(1, round(outliers.share * len(rows)))
                chosen = torch.randperm(len(rows), generator=generator)[:count]
                spread = torch.rand(count, generator=generator)
                factors = torch.ones(len(rows))
                factors[chosen] = outliers.least * (largest / outliers.least) ** spread
                rows *= factors if rows.ndim == 1 else factors[:, None]
                for weight in readers:
                    weight /= factors


def _places(layer: Any, config: Any, outliers: Outliers) -> Iterator[tuple[Any, Sequence[Any], float]]:
    """What is scaled up (a view of a norm `[C]` or of rows `[C, K]`), who reads it `[N, C]`, by how much."""
    attention, mlp = layer.self_attn, layer.mlp
    experts = [*mlp.experts, mlp.shared_experts] if hasattr(mlp, "experts") else [mlp]
    inputs = [projection.weight for expert in experts for projection in (expert.gate_proj, expert.up_proj)]
    if hasattr(mlp, "gate"):
        inputs.append(mlp.gate.weight)
    compressed = [attention.q_a_proj.weight, attention.kv_a_proj_with_mqa.weight]
    yield layer.input_layernorm.weight, compressed, outliers.attention
    yield layer.post_attention_layernorm.weight, inputs, outliers.feed_forward
    yield attention.q_a_layernorm.weight, [attention.q_b_proj.weight], outliers.inner
    yield attention.kv_a_layernorm.weight, [attention.kv_b_proj.weight], outliers.inner
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    per_head = attention.kv_b_proj.weight.view(heads, nope + value, -1)
    for head in range(heads):
        columns = attention.o_proj.weight[:, head * value : (head + 1) * value]
        yield per_head[head, nope:], [columns], outliers.inner
    for expert in experts:
        yield expert.up_proj.weight, [expert.down_proj.weight], outliers.inner
