"""Promises of accuracy: in how many of models x servers x bounds they were kept, and how small the folder is.

One run of `msquant quantize --max-kl` each, as a process of its own. A promise is kept where the greatest KL
over the verdict texts is within the bound; one that msquant says it cannot keep (exit code 3) counts as
missed. CPU seconds stand beside those of a plain quantization for the same server.

Of a model of two layers every assignment is made and measured, by bytes, until one keeps the bound: what the
promise's folder is compared with. A folder of one scheme is compared with the most accurate one of its size.

`MSQUANT_PROMISE=tiny-qwen3/vllm/0.02,smollm2-135m/vllm/0.02` runs these promises alone;
`MSQUANT_PROMISE=exhaustive` and `MSQUANT_PROMISE=uniform` the other two.
"""

import itertools
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import msquant
from benchmarks.rows import row
from benchmarks.smollm2 import float_folder
from benchmarks.tiny_qwen import QWEN3, trained_qwen3, trained_qwen3_moe
from benchmarks.tiny_training import trained_folder

MODELS: dict[str, Callable[[], Path]] = {
    "smollm2-135m": float_folder,
    "tiny-qwen3": trained_qwen3,
    "tiny-qwen3-moe": trained_qwen3_moe,
}
SERVERS: dict[str, tuple[str, ...]] = {
    "smollm2-135m": ("vllm", "vllm-ascend", "vllm-mindspore"),
    "tiny-qwen3": ("vllm", "vllm-ascend", "vllm-mindspore"),
    # vLLM-MindSpore serves no qwen3_moe.
    "tiny-qwen3-moe": ("vllm", "vllm-ascend"),
}
BOUNDS = (0.01, 0.02, 0.05)
KEPT, TIMES = 0.95, 3.0

TWO_LAYERS = QWEN3 | {"num_hidden_layers": 2}
EXHAUSTIVE_BOUNDS = (0.004, 0.002, 0.001, 0.0005)
"""Nats, the loosest first: all of such a model in int4 already keeps those of `BOUNDS`."""

ABOVE = 1.05
"""The folder's bytes, in units of those of the smallest that keeps the bound, are to be at most this."""

UNIFORM = ("W8A8_DYNAMIC", "W4A16_G64", "W4A8_DYNAMIC")
MIXED = ("W8A16", "W8A8_DYNAMIC", "W4A16", "W4A16_G64", "W4A8_DYNAMIC")
"""Schemes of vLLM for all linears, and those that one folder is chosen from."""


def measure() -> list[dict[str, Any]]:
    """A line a run, and what came of all of them."""
    asked = os.environ.get("MSQUANT_PROMISE")
    made = {"exhaustive": _exhaustive, "uniform": _uniform}
    if asked in made:
        return made[asked]()
    rows = _promises()
    return rows if asked else [*rows, *_exhaustive(), *_uniform()]


def _promises() -> list[dict[str, Any]]:
    rows, kept, reachable = [], 0, 0
    plain: dict[tuple[str, str], float] = {}
    for model, server, bound in _wanted():
        with tempfile.TemporaryDirectory(prefix="msquant-") as scratch:
            folder = MODELS[model]()
            if (model, server) not in plain:
                plain[model, server] = _plain_seconds(folder, server, Path(scratch))
            print(f"{model} for {server} within {bound}", flush=True)
            started, cpu = time.monotonic(), _child_seconds()
            arguments = ("--max-kl", bound, "--for", server, "--output", Path(scratch) / "out")
            found = msquant("quantize", folder, *arguments, expected=(0, 3))
            cpu = _child_seconds() - cpu
            reachable += 1
            kept += bool(found["kept"])
            rows.append(row(f"{model}, {server}, KL <= {bound}", _described(found)))
            times = cpu / plain[model, server]
            seconds = f"{cpu:.0f} ({times:.1f} times plain), {time.monotonic() - started:.0f} s of wall time"
            met = times <= TIMES if model == "smollm2-135m" else None
            rows.append(row("  CPU seconds", seconds, f"<= {TIMES:g} times" if met is not None else "", met))
    part = kept / max(1, reachable)
    rows.append(row("promises kept", f"{kept} of {reachable}", f">= {KEPT:.0%}", part >= KEPT))
    return rows


def _wanted() -> list[tuple[str, str, float]]:
    if given := os.environ.get("MSQUANT_PROMISE"):
        parts = [word.split("/") for word in given.split(",")]
        return [(model, server, float(bound)) for model, server, bound in parts]
    return [(model, server, bound) for model in MODELS for server in SERVERS[model] for bound in BOUNDS]


def _described(found: dict[str, Any]) -> str:
    said = "kept" if found["kept"] else f"not kept: {found['reason']}"
    best = next((each for each in found["rounds"] if each["number"] == found["round"]), None)
    if best is None:
        return said
    linears = ", ".join(f"{count} {word}" for word, count in best["schemes"].items())
    worst = {name: max(best[name].values()) for name in ("predicted", "choice", "verdict")}
    return (
        f"{said} in {len(found['rounds'])} rounds; predicted {worst['predicted']:.4f}, choice "
        f"{worst['choice']:.4f}, verdict {worst['verdict']:.4f}; {best['nbytes'] / 1e6:.1f} MB; {linears}"
    )


def _plain_seconds(folder: Path, server: str, scratch: Path) -> float:
    """CPU seconds of a plain quantization for that server by the model's own recipe."""
    before = _child_seconds()
    msquant("quantize", folder, "--for", server, "--output", scratch / "plain")
    return _child_seconds() - before


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _exhaustive() -> list[dict[str, Any]]:
    """How much larger the promise's folder is than the smallest of all that keep the bound."""
    folder = trained_folder("tiny-qwen3-2-layers", TWO_LAYERS)
    smallest, tried = _smallest(folder, "vllm", EXHAUSTIVE_BOUNDS)
    rows = [row("assignments measured", tried)]
    for bound in EXHAUSTIVE_BOUNDS:
        with tempfile.TemporaryDirectory(prefix="msquant-") as scratch:
            arguments = ("--max-kl", bound, "--for", "vllm", "--output", Path(scratch) / "out")
            found = msquant("quantize", folder, *arguments, expected=(0, 3))
        what = f"two layers, vllm, KL <= {bound}"
        if not found["kept"]:
            rows.append(row(what, _described(found)))
            continue
        nbytes = found["rounds"][found["round"] - 1]["nbytes"]
        times = nbytes / smallest[bound]
        measured = f"{nbytes} bytes, {times:.3f} of the smallest; {_described(found)}"
        rows.append(row(what, measured, f"<= {ABOVE:g}", times <= ABOVE))
    return rows


def _smallest(folder: Path, server: str, bounds: Sequence[float]) -> tuple[dict[float, int], int]:
    """File bytes of the smallest folder that keeps each bound, the loosest first, and how many were tried.

    A layer depends on no other layer's schemes, so each is quantized once in every combination of its own;
    whole models are put together of them, and computed on a text at a time until one is beyond the bound.
    """
    from mindspore import Tensor

    from msquant.checkpoint.hidden_states import HiddenStateStore
    from msquant.evaluation.branches import branch_divergences
    from msquant.flows.frontier import assigned, format_for, open_subject
    from msquant.flows.layer_work import embed
    from msquant.flows.promise import verdict_tokens
    from msquant.flows.source import batch_tokens, folder_plan
    from msquant.models.device import use_device
    from msquant.models.layers import DecoderLayer, positions
    from msquant.quantization.assignment import Assignment
    from msquant.quantization.decoder_pass import DecoderPass
    from msquant.quantization.unit_losses import LayerInMemory, QuantizedLayer
    from msquant.recipe.recipe import find_recipe

    dtype = use_device("cpu")
    subject = open_subject(find_recipe(str(folder), format_for(server)))
    config, source, units = subject.source.config, subject.source.weights, subject.units
    texts = verdict_tokens(subject)
    places = positions(config, texts[0].tokens.shape[1], dtype)
    options = [unit.options for unit in units]
    first = [each[0] for each in options]
    layers: list[dict[Any, QuantizedLayer]] = []
    with tempfile.TemporaryDirectory(prefix="msquant-") as scratch:
        store, within = (HiddenStateStore(Path(scratch) / name, 1 << 30) for name in ("store", "within"))
        # The texts go first: the boundary is written anew for the calibration samples.
        embed(subject.source, [text.tokens for text in texts], store, dtype)
        hidden = list(store.open(0))
        embed(subject.source, subject.samples.batches(batch_tokens(config)), store, dtype)
        for index in range(config.num_hidden_layers):
            mine = [place for place, unit in enumerate(units) if unit.layer == index]
            layers.append({})
            for chosen in itertools.product(*(options[place] for place in mine)):
                of_all = list(first)
                for place, option in zip(mine, chosen, strict=True):
                    of_all[place] = option
                policy = assigned(subject.recipe, units, Assignment(tuple(of_all))).quantization
                quantizer = DecoderPass(
                    config, source, policy, subject.samples.tokens.shape[1], dtype, within
                )
                made = QuantizedLayer()
                with store.write(index + 1) as put:
                    quantizer.run(index, store.open(index), put.append, LayerInMemory(made))
                layers[-1][chosen] = made

    def outputs(layer: DecoderLayer, states: Any) -> Any:
        return layer(Tensor(states, dtype), places).asnumpy().astype(np.float32, copy=False)

    expected = hidden
    for index in range(config.num_hidden_layers):
        layer = DecoderLayer(config, source, index, dtype)
        expected = [outputs(layer, states) for states in expected]
    first_outputs: dict[Any, list[Any]] = {}
    for chosen, made in layers[0].items():
        layer = DecoderLayer(config, made, 0, dtype)
        first_outputs[chosen] = [outputs(layer, states) for states in hidden]
    models = sorted(
        itertools.product(*layers), key=lambda model: sum(o.nbytes for part in model for o in part)
    )
    found: dict[float, int] = {}
    order, tried = list(range(len(texts))), 0
    for model in models:
        left = [bound for bound in bounds if bound not in found]
        if not left:
            break
        tried += 1
        last = DecoderLayer(config, layers[1][model[1]], 1, dtype)
        worst = 0.0
        for text in list(order):
            states = [expected[text], outputs(last, first_outputs[model[0]][text])]
            # Windows of one text are rows here, so their mean is the text's.
            worst = max(worst, float(branch_divergences(config, source, states, dtype).mean()))
            if worst > left[0]:
                # Probably beyond the bound in the next model, too.
                order.remove(text)
                order.insert(0, text)
                break
        recipe = assigned(subject.recipe, units, Assignment(tuple(itertools.chain(*model))))
        found |= {bound: folder_plan(recipe, subject.source).file_bytes for bound in left if worst <= bound}
    return found, tried


def _uniform() -> list[dict[str, Any]]:
    """KL on the verdict texts of all linears in one scheme, and of the most accurate folder of that size."""
    from msquant.flows.comparison import score_folders
    from msquant.flows.frontier import format_for, open_subject
    from msquant.flows.promise import verdict_tokens
    from msquant.recipe.recipe import find_recipe

    folder, rows = trained_qwen3(), []
    texts = verdict_tokens(open_subject(find_recipe(str(folder), format_for("vllm"))))
    for scheme in UNIFORM:
        with tempfile.TemporaryDirectory(prefix="msquant-") as scratch:
            plain, chosen = Path(scratch) / "plain", Path(scratch) / "chosen"
            one = ("--scheme", scheme, "--algo", "gptq", "--for", "vllm", "--output", plain)
            msquant("quantize", folder, *one, "--no-evaluate")
            size = sum(path.stat().st_size for path in plain.glob("*.safetensors"))
            several = ("--schemes", ",".join(MIXED), "--max-size", f"{size}B", "--for", "vllm")
            found = msquant("quantize", folder, *several, "--output", chosen)
            _, score = score_folders([folder, plain], texts, "cpu")
        uniform = {text.text: float(text.kl or 0) for text in score.texts}
        mixed = found["rounds"][found["round"] - 1]["verdict"]
        plainly, better = ((max(kl.values()), float(np.mean(list(kl.values())))) for kl in (uniform, mixed))
        what = f"tiny-qwen3 for vllm, {size} bytes as {scheme} has: KL of the worst text, and the mean"
        measured = f"{better[0]:.5f}, {better[1]:.5f}; all in it {plainly[0]:.5f}, {plainly[1]:.5f}"
        rows.append(row(what, measured, "below", better[0] < plainly[0]))
    return rows
