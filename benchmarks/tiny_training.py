"""Trains a tiny language model on text that ships with Python, adds outlier channels, and keeps it.

In float32 with transformers on torch, minutes on two cores, on what the builtin calibration takes from the
standard library: the source of modules and half of `pydoc_data.topics`. The other half stays unseen, for
evaluation. A router's correction bias is balanced by DeepSeek's own rule: after every step it moves against
the sign of each expert's excess load.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

from benchmarks.outliers import Outliers, add_outliers
from msquant.checkpoint.cache import cache_folder


@dataclasses.dataclass(frozen=True)
class Training:
    """How the model is trained: AdamW with a linear warm-up and a cosine to a tenth of the rate."""

    steps: int = 350
    batch: int = 16
    sequence_length: int = 128
    learning_rate: float = 2e-3
    warm_up: int = 20
    weight_decay: float = 0.1
    bias_rate: float = 2e-3
    seed: int = 0


def trained_folder(
    name: str, architecture: dict[str, Any], folder: Path | None = None, training: Training | None = None
) -> Path:
    """A trained model as a Hugging Face folder in float32, with its tokenizer; trained by the first call.

    Args:
        name: of the folder in the cache.
        architecture: the model's `config.json`; its `model_type` decides the class.
        folder: where to keep it; by default in msquant's cache, under a hash of all settings and the text.
        training: how it is trained; None for the defaults.

    Returns:
        The folder, also if it was there already.
    """
    texts, training = training_texts(), training or Training()
    settings = [architecture, dataclasses.asdict(training), dataclasses.asdict(Outliers()), texts]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    folder = folder or cache_folder() / "benchmarks" / f"{name}-{key}"
    if (folder / "config.json").exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = train_tokenizer(texts, architecture["vocab_size"])
    model = train(architecture, tokenizer, texts, training)
    add_outliers(model, Outliers())
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


def training_texts() -> list[str]:
    """What msquant's builtin calibration takes from the standard library."""
    from msquant.calibration.builtin import calibration_domains

    domains = {domain.name: domain.texts for domain in calibration_domains()}
    return [*domains["documentation"], *domains["code"]]


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of the texts, without a token in front of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def train(architecture: dict[str, Any], tokenizer: Any, texts: list[str], training: Training) -> Any:
    """Train a causal language model on random windows of the texts; returns it in eval mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(training.seed)
    config = AutoConfig.for_model(**{"model_type": "deepseek_v3"} | architecture)
    model = AutoModelForCausalLM.from_config(config).train()
    loads, delta_rules = _record_loads(model), _solve_delta_rules(model)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=training.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, training))
    stream = torch.tensor(tokenizer("\n\n".join(texts)).input_ids)
    for _ in range(training.steps):
        starts = torch.randint(len(stream) - training.sequence_length, (training.batch, 1))
        windows = stream[starts + torch.arange(training.sequence_length)]
        model(windows, labels=windows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        for gate, load in loads.items():
            gate.e_score_correction_bias -= training.bias_rate * torch.sign(load - load.mean())
    for block, rule in delta_rules.items():
        block.chunk_gated_delta_rule = rule
    return model.eval()


def _solve_delta_rules(model: Any) -> dict[Any, Any]:
    """Let a model's delta rules be computed by `delta_rule`; returns what transformers has, by block."""
    blocks = [layer.linear_attn for layer in model.model.layers if hasattr(layer, "linear_attn")]
    rules = {block: block.chunk_gated_delta_rule for block in blocks}
    for block in blocks:
        block.chunk_gated_delta_rule = delta_rule
    return rules


def delta_rule(
    query: Any, key: Any, value: Any, g: Any, beta: Any, chunk_size: int = 64, **options: Any
) -> tuple[Any, None]:
    """What transformers 4.57.1 computes in `torch_chunk_gated_delta_rule` from no state.

    Within a chunk it solves one triangular system for all tokens, where transformers loops over them; on a
    CPU training is several times as fast with it.

    Args:
        query: `[B, T, heads, D]`.
        key: likewise.
        value: `[B, T, heads, V]`.
        g: logarithms of the decays, `[B, T, heads]`.
        beta: step sizes, likewise.
        chunk_size: tokens solved for together.
        options: of transformers' function, which are taken as its block gives them.
    """
    import torch

    query, key, value, g, beta = (x.transpose(1, 2) for x in (query, key, value, g, beta))
    query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    query = query * query.shape[-1] ** -0.5
    state = torch.zeros(*key.shape[:2], key.shape[-1], value.shape[-1])
    outputs = []
    for start in range(0, key.shape[2], chunk_size):
        part = slice(start, start + chunk_size)
        q, k, v, step = query[:, :, part], key[:, :, part], value[:, :, part], beta[:, :, part, None]
        total = g[:, :, part].cumsum(-1)
        left = total.exp()[..., None]
        between = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
        system = (k @ k.transpose(-1, -2) * between * step).tril(-1)
        written = torch.linalg.solve_triangular(
            system, step * (v - left * (k @ state)), upper=False, unitriangular=True
        )
        outputs.append(left * (q @ state) + (q @ k.transpose(-1, -2) * between) @ written)
        rest = (total[..., -1:] - total).exp()[..., None]
        state = left[..., -1:, :] * state + (k * rest).transpose(-1, -2) @ written
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _rate(step: int, training: Training) -> float:
    if step < training.warm_up:
        return (step + 1) / training.warm_up
    progress = (step - training.warm_up) / (training.steps - training.warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _record_loads(model: Any) -> dict[Any, Any]:
    """By router, how many tokens of the last forward pass each of its experts was given; kept up to date."""
    import torch

    loads: dict[Any, Any] = {}

    def record(gate: Any, _: Any, output: Any) -> None:
        loads[gate] = torch.bincount(output[0].flatten(), minlength=gate.n_routed_experts).float()

    for layer in model.model.layers:
        if hasattr(getattr(layer.mlp, "gate", None), "e_score_correction_bias"):
            layer.mlp.gate.register_forward_hook(record)
    return loads
