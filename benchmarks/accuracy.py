"""SmolLM2-135M, 16 x 128 builtin tokens: KL to the float model on three kinds of text, by every algorithm.

Every decoder layer goes through the same pass as in `msquant quantize`; what comes out is put into the model
of transformers on torch in integers, whatever a serving target accepts. Calibration has seen nothing of the
kind of `bible` and `drama`, see `texts.py`.
"""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import row
from benchmarks.smollm2 import SAMPLES, SEQUENCE_LENGTH, float_folder
from benchmarks.texts import SEQUENCES, domains
from msquant.checkpoint.weights import as_computed
from msquant.recipe.recipe import Recipe
from tests.fixtures.policies import rules

CALIBRATION = {"samples": SAMPLES, "sequence_length": SEQUENCE_LENGTH}
DOWN, ALL = ["down_proj"], ["proj"]
SHIFTED = [{"lm_head": "FLOAT"}, {"*": "W8A8_SHIFTED"}]
POLICIES: dict[str, dict[str, Any]] = {
    "rtn, static": {"algorithm": "rtn"},
    "smoothquant, static": {"algorithm": "smoothquant"},
    "osl-golden-stick, static": {"algorithm": "osl-golden-stick"},
    "osl, static": {"algorithm": "osl"},
    "osl, static, zero points of columns": {"algorithm": "osl", "schemes": SHIFTED},
    "gptq, static, zero points of columns": {"algorithm": "gptq", "schemes": SHIFTED},
    "osl, down_proj per token": {"algorithm": "osl", "schemes": rules(dynamic=DOWN)},
    "rtn, per token": {"algorithm": "rtn", "schemes": rules(dynamic=ALL)},
    "smoothquant, per token": {"algorithm": "smoothquant", "schemes": rules(dynamic=ALL)},
    "osl, per token": {"algorithm": "osl", "schemes": rules(dynamic=ALL)},
    "rtn, weights alone": {"algorithm": "rtn", "schemes": rules(weight_only=ALL)},
}
# KL at most: the calibrated kind of text, and the Bible.
LIMITS = {
    "osl, static": (0.040, 0.10),
    "osl, static, zero points of columns": (0.025, 0.040),
    "gptq, static, zero points of columns": (0.025, 0.040),
    "osl, static but six": (0.030, 0.080),
    "osl, down_proj per token": (0.012, 0.030),
    "osl, per token": (0.010, 0.020),
}


class Captured:
    """A `LayerSink` that keeps what it is given."""

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}
        self.linears: dict[str, Any] = {}

    def tensor(self, name: str, values: Any) -> None:
        """Keep a floating-point tensor."""
        self.tensors[name] = np.array(values)

    def linear(self, module: str, linear: Any) -> None:
        """Keep a linear layer."""
        self.linears[module] = linear


class Reference:
    """The float model's next-token distributions on every kind of text."""

    def __init__(self, folder: Path, sequences: int = SEQUENCES) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from msquant.checkpoint.tokenizer import load_tokenizer

        self.folder, self.tokens = folder, domains(load_tokenizer(folder), sequences)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.expected = {name: list(_log_probabilities(model, given)) for name, given in self.tokens.items()}

    @property
    def perplexities(self) -> dict[str, float]:
        """Of the float model."""
        return {name: _perplexity(self.expected[name], given) for name, given in self.tokens.items()}

    def score(self, simulation: Any) -> tuple[dict[str, float], str]:
        """As `compare`: KL, and both in a line."""
        kl, perplexities = self.compare(simulation)
        return kl, f"KL {_listed(kl, 4)}; perplexity {_listed(perplexities, 2)}"

    def compare(self, simulation: Any) -> tuple[dict[str, float], dict[str, float]]:
        """KL(float || simulation) in nats, a mean over the tokens of a kind, and the perplexity."""
        kl, perplexities = {}, {}
        for name, given in self.tokens.items():
            found = list(_log_probabilities(simulation, given))
            pairs = zip(self.expected[name], found, strict=True)
            kl[name] = float(np.mean([float((p.exp() * (p - q)).sum(dim=-1).mean()) for p, q in pairs]))
            perplexities[name] = _perplexity(found, given)
        return kl, perplexities

    def measure(self, policy: dict[str, Any], source: str = "builtin") -> tuple[dict[str, float], str, float]:
        """Quantize by calibration text of a source, score and count the CPU seconds of quantizing."""
        started = time.process_time()
        captured = quantized(self.folder, policy, source)
        seconds = time.process_time() - started
        return *self.score(simulated(self.folder, captured)), seconds


def measure() -> list[dict[str, Any]]:
    """Quantize by every policy and compare the logits with the float model's."""
    reference = Reference(float_folder())
    rows = [row("floating point", f"perplexity {_listed(reference.perplexities, 2)}")]
    for name, policy in (POLICIES | {"osl, static but six": spared(reference.folder)}).items():
        kl, text, seconds = reference.measure(policy)
        limits = LIMITS.get(name)
        target = f"KL <= {limits[0]}, {limits[1]}" if limits else ""
        met = kl["same"] <= limits[0] and kl["bible"] <= limits[1] if limits else None
        rows.append(row(name, f"{text}; {seconds:.0f} CPU s", target, met))
    return rows


def spared(folder: Path) -> dict[str, Any]:
    """The policy that `msquant analyze --keep-float 6` makes: six matrices stay in floating point."""
    from msquant.flows.analysis import analyze
    from msquant.quantization.selection import Budget

    recipe = Recipe(model=str(folder)).replace("calibration", **CALIBRATION)
    mixed = analyze(recipe, budget=Budget("keep_float", 6)).recipe
    return mixed.quantization.model_dump() if mixed else {}


def quantized(folder: Path, policy: dict[str, Any], calibration: str = "builtin") -> Captured:
    """All decoder layers of a model, quantized as the pipeline does it."""
    from msquant.checkpoint.hidden_states import HiddenStateStore
    from msquant.checkpoint.memory import MEMORY_BUDGET
    from msquant.flows.calibration import calibration_of
    from msquant.flows.source import batch_samples, open_source, rotated
    from msquant.kernels import golden_stick
    from msquant.models.device import use_device
    from msquant.models.network import Embedding
    from msquant.quantization.decoder_pass import DecoderPass

    raw = {"model": str(folder), "quantization": policy}
    recipe = Recipe.model_validate(raw).replace("calibration", source=calibration, **CALIBRATION)
    dtype = use_device()
    golden_stick.set_log_level(verbose=False)
    source = rotated(open_source(str(folder)), recipe.quantization)
    tokens = calibration_of(recipe.calibration, folder).samples.tokens
    step = batch_samples(source.config, SEQUENCE_LENGTH)
    embedding = Embedding(source.config, source.weights, dtype)
    hidden = [embedding(tokens[i : i + step]).asnumpy() for i in range(0, SAMPLES, step)]
    store = HiddenStateStore(folder, MEMORY_BUDGET)
    decoder = DecoderPass(source.config, source.weights, recipe.quantization, SEQUENCE_LENGTH, dtype, store)
    captured = Captured()
    if source.weights is not source.checkpoint:
        names = source.config.family.names
        for name in (names.embedding, names.final_norm, names.head):
            captured.tensor(f"{name}.weight", source.weights.tensor(f"{name}.weight"))
    for index in range(source.config.num_hidden_layers):
        outputs: list[Any] = []
        decoder.run(index, hidden, outputs.append, captured)
        hidden = outputs
    return captured


def simulated(folder: Path, captured: Captured) -> Any:
    """The float model on torch with what was captured in its place."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # A rotated model's output head is no longer its embedding.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.load_state_dict({k: torch.from_numpy(v) for k, v in captured.tensors.items()}, strict=False)
    for name, stored in captured.linears.items():
        module, linear = model.get_submodule(name), as_computed(stored)
        module.weight.data = torch.from_numpy(linear.weight).float()
        if not linear.scheme.is_float:
            module.register_forward_pre_hook(_quantize_inputs(linear))
            module.register_forward_hook(_dequantize_outputs(linear))
    return model


def _quantize_inputs(linear: Any) -> Any:
    """The integers that the linear multiplies, as float32; per token their scale is left on the module."""
    import torch

    from tests.fixtures.torch_linears import INT8_MAX, INT8_MIN, quantize_per_token

    def static(module: Any, inputs: Any) -> Any:
        scale, offset = float(linear.input_scale[0]), torch.from_numpy(linear.input_offset)
        module.input_scale = scale
        if linear.input_reciprocal is None:
            quantized = torch.round(inputs[0] / scale) + offset
        else:
            quantized = torch.round(inputs[0] * float(linear.input_reciprocal[0]) + offset)
        return torch.clamp(quantized, INT8_MIN, INT8_MAX) - offset

    def per_token(module: Any, inputs: Any) -> Any:
        quantized, module.input_scale = quantize_per_token(inputs[0])
        return quantized

    return per_token if linear.input_scale is None else static


def _dequantize_outputs(linear: Any) -> Any:
    import torch

    scale = torch.from_numpy(linear.weight_scale)
    return lambda module, inputs, output: output * module.input_scale * scale


def _log_probabilities(model: Any, tokens: Any) -> Any:
    import torch

    with torch.inference_mode():
        for sequence in torch.as_tensor(tokens, dtype=torch.int64):
            yield model(sequence[None]).logits[0].log_softmax(dim=-1)


def _perplexity(log_probabilities: list[Any], tokens: Any) -> float:
    """`exp` of the mean negative log-likelihood of all tokens but the first of each sequence."""
    losses = [
        -float(np.mean([float(rows[i, token]) for i, token in enumerate(sequence[1:])]))
        for rows, sequence in zip(log_probabilities, tokens, strict=True)
    ]
    return math.exp(np.mean(losses))


def _listed(values: dict[str, float], digits: int) -> str:
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in values.items())
