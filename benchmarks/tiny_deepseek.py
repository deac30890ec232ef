"""A tiny DeepSeek-V3, trained on text that ships with Python, with outlier channels; made once and kept.

The architecture is DeepSeek-V3's with every option of the published config: low-rank queries, YaRN rope with
its `mscale`, one dense layer first, a sigmoid router with a correction bias and grouped top-k, a shared
expert. It is trained in float32 with transformers on torch, about five minutes on two cores, on what the
builtin calibration takes from the standard library: the source of modules and half of `pydoc_data.topics`.
The other half stays unseen, for evaluation. The router's correction bias is balanced by DeepSeek's own rule:
after every step it moves against the sign of each expert's excess load.

A model this small grows no outlier channels of its own, which are what quantization of large models is about,
so `benchmarks.outliers` adds them without changing the function. Their strength was chosen for peers, not
for msquant: so that rounding to nearest and llm-compressor's SmoothQuant come near the relative MSEs of the
logits that are known of them on such models, 4.7e-4 and 3.2e-4; `benchmarks.dynamic_int8` has what they are
here.

Measured: perplexity 62.0 on 8 x 512 held-out tokens, of a vocabulary of 1,024; six minutes on two cores.
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

ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    # What the published config names and transformers 4 does not read.
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
"""`config.json` of the model."""


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


def trained_model(folder: Path | None = None) -> Path:
    """The model as a Hugging Face folder in float32, with its tokenizer; trained by the first call.

    Args:
        folder: where to keep it; by default in msquant's cache, under a hash of all settings and the text.

    Returns:
        The folder, also if it was there already.
    """
    texts = training_texts()
    settings = [ARCHITECTURE, dataclasses.asdict(Training()), dataclasses.asdict(Outliers()), texts]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    folder = folder or cache_folder() / "benchmarks" / f"tiny-deepseek-{key}"
    if (folder / "config.json").exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = train_tokenizer(texts)
    model = train(tokenizer, texts, Training())
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


def train_tokenizer(texts: list[str], vocabulary: int = ARCHITECTURE["vocab_size"]) -> Any:
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


def train(tokenizer: Any, texts: list[str], training: Training) -> Any:
    """Train `DeepseekV3ForCausalLM` on random windows of the texts; returns it in eval mode."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(training.seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**ARCHITECTURE)).train()
    loads = _record_loads(model)
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
    return model.eval()


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
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(record)
    return loads
