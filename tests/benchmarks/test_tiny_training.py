"""What the benchmarks train a delta rule with is what transformers computes."""

import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from benchmarks.tiny_training import delta_rule

TOKENS = 150
"""Two chunks of 64, and a part of one."""


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(2, TOKENS, 4, *shape, generator=generator)

    made = {"query": normal(16), "key": normal(16), "value": normal(8)}
    made |= {"g": -0.02 * torch.nn.functional.softplus(normal()), "beta": normal().sigmoid()}
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def test_outputs_and_gradients_are_those_of_transformers() -> None:
    weights = torch.randn(2, TOKENS, 4, 8, generator=torch.Generator().manual_seed(1))
    ours, theirs = inputs(), inputs()
    found, state = delta_rule(**ours, use_qk_l2norm_in_kernel=True)
    expected, _ = torch_chunk_gated_delta_rule(**theirs, use_qk_l2norm_in_kernel=True)
    assert state is None
    assert expected.abs().max() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, tensor in theirs.items():
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0.3, name
        torch.testing.assert_close(ours[name].grad, tensor.grad, rtol=0, atol=1e-5)
