"""Runs vLLM on a folder with packed weights, in vLLM's own Python environment; it imports nothing of msquant.

    python packed_vllm.py FOLDER DTYPE TOKENS PROMPT...

It prints one JSON object, the greedy `tokens` of every prompt, and whose the `kernel` was.
`cpu_gemm_wna16` is in vLLM's library for AVX-512 alone. On other processors torch multiplies in its place, by
the layout that `CPUWNA16LinearKernel` has packed the weights into; all else is vLLM's own.
"""

import json
import sys
from typing import Any

import msquant_vllm_workarounds as workarounds


def emulated(
    input: Any,
    q_weight: Any,
    scales: Any,
    zeros: Any,
    bias: Any,
    pack_factor: int,
    isa_hint: str,
) -> Any:
    """What the kernel computes: `x @ (scale * (q - zero point)) + bias`.

    Args:
        input: `[..., K]`.
        q_weight: int32 `[N / 16, 2 K]`: of 16 outputs a row, two numbers an input.
        scales: `[groups, N]`.
        zeros: int32 `[groups, N / 8]`; None for symmetric integers.
        bias: `[N]` or None.
        pack_factor: integers in a number.
        isa_hint: which instructions to take.
    """
    import torch

    bits = 32 // pack_factor
    shifts = torch.arange(pack_factor, dtype=torch.int32) * bits

    def unpacked(words: Any) -> Any:
        return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).reshape(len(words), -1).float()

    blocks, held = len(q_weight), 16 // pack_factor
    words = q_weight.reshape(blocks, -1, held).permute(1, 0, 2).reshape(-1, blocks * held)
    size = len(words) // len(scales)
    zero = float(1 << (bits - 1)) if zeros is None else unpacked(zeros).repeat_interleave(size, dim=0)
    weight = (unpacked(words) - zero) * scales.float().repeat_interleave(size, dim=0)
    y = input.float() @ weight
    return (y if bias is None else y + bias.float()).to(input.dtype)


def main(folder: str, dtype: str, tokens: str, *prompts: str) -> None:
    """Generate and print."""
    answers, sys.stdout = sys.stdout, sys.stderr
    workarounds.apply()
    import torch
    import vllm
    from vllm import _custom_ops as ops

    kernel = "vLLM's"
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        kernel, ops.cpu_gemm_wna16 = "emulated", emulated
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        options = workarounds.llm_options(json.load(file)["architectures"])
    llm = vllm.LLM(model=folder, dtype=dtype, **options)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=int(tokens), ignore_eos=True)
    found = [list(one.outputs[0].token_ids) for one in llm.generate(list(prompts), sampling)]
    print(json.dumps({"tokens": found, "kernel": kernel}), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
