"""What llm-compressor does to a model, W8A8 with per-token activations throughout, simulated on torch.

Every linear of the decoder layers is rounded to nearest, `kv_b_proj` too; the router and the head stay in
floating point. Weights are symmetric int8 by output channel, activations symmetric int8 by token, both with
`2 max / 255` for a scale, as compressed-tensors computes it. SmoothQuant comes before that, if at all:
`s_j = range(X_j)^0.5 / (2 max|W_j|)^0.5`, as in llm-compressor 0.14.0.1.

Measured on `benchmarks.tiny_deepseek`, 16 x 128 tokens of the builtin calibration text, relative MSE of the
logits of 8 x 512 held-out tokens:

    round to nearest            4.37e-4   what llm-compressor 0.14.0.1 wrote, in the same arithmetic: 4.34e-4
    SmoothQuant                 3.44e-4   3.29e-4

Between near-equal settings these figures move by up to 25 %: rounding to nearest routes 14 % of 1,024
tokens to another expert somewhere, and these make up 77 % of the error.
"""

import copy
from typing import Any

SMOOTHING = 0.5


def round_to_nearest(model: Any) -> Any:
    """A copy of the model with every linear of its decoder layers in int8."""
    import torch

    from tests.fixtures.torch_linears import DynamicLinear

    model = copy.deepcopy(model)
    layers = model.model.layers
    for name in [name for name, module in layers.named_modules() if isinstance(module, torch.nn.Linear)]:
        weight = layers.get_submodule(name).weight.detach().double()
        scale = 2 * weight.abs().amax(dim=1, keepdim=True) / 255
        scale = torch.where(scale == 0, 1, scale).float()
        rounded = torch.clamp(torch.round(weight / scale), -128, 127).to(torch.int8)
        layers.set_submodule(name, DynamicLinear(rounded, scale, torch.zeros_like(scale)))
    return model


def smooth_quant(model: Any, tokens: Any, *, feed_forward: bool = False) -> Any:
    """A copy of a DeepSeek-V3 smoothed by SmoothQuant, still in floating point.

    Args:
        model: `DeepseekV3ForCausalLM`.
        tokens: of calibration, integers `[S, T]`.
        feed_forward: smooth `post_attention_layernorm` as well, one scale for all experts and the router.
            llm-compressor's mapping of DeepSeek-V3 has only `input_layernorm`.
    """
    import torch

    model = copy.deepcopy(model)
    pairs = [pair for layer in model.model.layers for pair in _pairs(layer, feed_forward)]
    ranges = _output_ranges(model, [norm for norm, _ in pairs], tokens)
    with torch.no_grad():
        for norm, weights in pairs:
            largest = 2 * torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
            scale = (ranges[norm] / largest) ** SMOOTHING
            norm.weight /= scale
            for weight in weights:
                weight *= scale
    return model


def _pairs(layer: Any, feed_forward: bool) -> list[tuple[Any, list[Any]]]:
    attention, mlp = layer.self_attn, layer.mlp
    pairs = [(layer.input_layernorm, [attention.q_a_proj.weight, attention.kv_a_proj_with_mqa.weight])]
    if feed_forward:
        experts = [*mlp.experts, mlp.shared_experts] if hasattr(mlp, "experts") else [mlp]
        weights = [linear.weight for expert in experts for linear in (expert.gate_proj, expert.up_proj)]
        weights += [mlp.gate.weight] if hasattr(mlp, "gate") else []
        pairs.append((layer.post_attention_layernorm, weights))
    return pairs


def _output_ranges(model: Any, norms: list[Any], tokens: Any) -> dict[Any, Any]:
    """By norm, maximum minus minimum of each of its channels over all tokens."""
    import torch

    lows: dict[Any, Any] = {}
    highs: dict[Any, Any] = {}

    def record(norm: Any, _: Any, output: Any) -> None:
        low, high = output.flatten(0, 1).aminmax(dim=0)
        lows[norm] = torch.minimum(lows.get(norm, low), low)
        highs[norm] = torch.maximum(highs.get(norm, high), high)

    hooks = [norm.register_forward_hook(record) for norm in norms]
    with torch.inference_mode():
        for row in torch.as_tensor(tokens, dtype=torch.int64):
            model(row[None])
    for hook in hooks:
        hook.remove()
    return {norm: (highs[norm] - lows[norm]).clone() for norm in norms}
