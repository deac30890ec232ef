"""One peer on one model in one scheme: run, read back, scored."""

import datetime
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.environments import python_of
from benchmarks.peers.folders import read_folder
from benchmarks.peers.process import Measured, run_measured
from benchmarks.smollm2 import SAMPLES, SEQUENCE_LENGTH
from tests.fixtures.policies import rules

# msquant's own, by the algorithm; the default one is whatever the model's recipe would take.
OURS = {"msquant": None, "msquant smoothquant": "smoothquant"}
RUNNERS = {
    "llm-compressor": "run_llm_compressor.py",
    "AutoRound": "run_auto_round.py",
    "msModelSlim": "run_msmodelslim.py",
    "golden-stick": "run_golden_stick.py",
}
PEERS = (*OURS, *RUNNERS)
# Experts cannot be served with static activations: vLLM and MindFormers both take them per token alone.
SCHEMES = {
    "tiny-qwen3": ("static", "dynamic"),
    "tiny-qwen3-moe": ("mixed", "dynamic"),
    "tiny-deepseek-v3": ("mixed", "dynamic"),
    "smollm2-135m": ("static", "dynamic"),
}
DYNAMIC = {"static": [], "dynamic": ["proj"], "mixed": ["mlp."]}
"""What the scheme computes per token, by patterns of names; the rest is static."""

Setting = tuple[str, str]
"""A model and a scheme: what a peer is compared within."""


@dataclass(frozen=True)
class Job:
    """What is run.

    Attributes:
        model: one of the models' names.
        scheme: `static`, `dynamic`, or `mixed`: static attention, feed-forward blocks per token.
        peer: one of `PEERS`.
    """

    model: str
    scheme: str
    peer: str

    @property
    def is_ours(self) -> bool:
        """Whether msquant itself runs."""
        return self.peer in OURS

    @property
    def title(self) -> str:
        """For a table."""
        return f"{self.model}, {self.scheme}: {self.peer}"


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        job: what was run.
        measured: of its process.
        kl: to the float model in nats, by text, simulated on torch; empty if the peer failed or its folder
            cannot be read.
        perplexity: by text, likewise.
        compared_kl: by text, in the arithmetic of `msquant compare`; empty if that refuses the folder.
        nbytes: of the folder's shards.
        error: why there is no figure.
        date: when it was run, ISO 8601.
    """

    job: Job
    measured: Measured
    kl: dict[str, float]
    perplexity: dict[str, float]
    compared_kl: dict[str, float]
    nbytes: int
    error: str | None
    date: str

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Result":
        """The reverse of `to_json`."""
        return cls(**{**raw, "job": Job(**raw["job"]), "measured": Measured(**raw["measured"])})

    def to_json(self) -> dict[str, Any]:
        """In what JSON knows."""
        return asdict(self)

    @property
    def line(self) -> str:
        """In one line."""
        if self.error:
            return self.error
        kl = ", ".join(f"{text} {value:.3g}" for text, value in self.kl.items())
        return f"KL {kl}; {self.measured.cpu_seconds:.0f} CPU s, {self.measured.peak_memory / 1e9:.1f} GB"


def run_job(job: Job, folder: Path, parent: Path, reference: Any) -> Result:
    """Quantize with one peer and score what it wrote.

    Args:
        job: what to run.
        folder: the float model.
        parent: takes the output and the log.
        reference: the float model's distributions.
    """
    from benchmarks.accuracy import simulated

    output, log = parent / "out", parent / "log.txt"
    command = _ours(job, folder, output, parent) if job.is_ours else _peers(job, folder, output, parent)
    measured = run_measured(command, log, {"HF_HUB_OFFLINE": "1"})
    today = datetime.date.today().isoformat()
    if measured.error:
        return Result(job, measured, {}, {}, {}, 0, measured.error, today)
    nbytes = sum(shard.stat().st_size for shard in output.glob("*.safetensors"))
    try:
        kl, perplexity = reference.compare(simulated(folder, read_folder(output)))
    except (SystemExit, AttributeError, KeyError, RuntimeError) as error:
        return Result(job, measured, {}, {}, {}, nbytes, f"its folder cannot be read: {error}", today)
    return Result(job, measured, kl, perplexity, _compared(folder, output, reference), nbytes, None, today)


def _compared(folder: Path, output: Path, reference: Any) -> dict[str, float]:
    """KL by text in msquant's own arithmetic; says on stderr why there is none."""
    from msquant.errors import MsquantError
    from msquant.evaluation.inputs import Text
    from msquant.flows.comparison import score_folders

    texts = [Text(name, tokens) for name, tokens in reference.tokens.items()]
    try:
        score = score_folders([folder, output], texts, "cpu")[1]
    except MsquantError as error:
        print(f"msquant compare refuses the folder: {error}", file=sys.stderr)
        return {}
    return {text.text: text.kl for text in score.texts if text.kl is not None}


def _ours(job: Job, folder: Path, output: Path, parent: Path) -> list[str]:
    """`msquant quantize` of a recipe file, without the accuracy that it measures at the end."""
    from msquant.recipe.recipe import find_recipe, write_recipe

    recipe = find_recipe(str(folder)).replace("calibration", samples=SAMPLES, sequence_length=SEQUENCE_LENGTH)
    policy = {"algorithm": OURS[job.peer], "schemes": rules(dynamic=DYNAMIC[job.scheme])}
    write_recipe(recipe.replace("quantization", **policy), parent / "recipe.yaml")
    options = ["--format", "compressed-tensors", "--no-evaluate", "--output", str(output), "--json"]
    return [sys.executable, "-m", "msquant", "quantize", str(parent / "recipe.yaml"), *options]


def _peers(job: Job, folder: Path, output: Path, parent: Path) -> list[str | Path]:
    from msquant.flows.calibration import calibration_of
    from msquant.recipe.recipe import Recipe

    settings = {"samples": SAMPLES, "sequence_length": SEQUENCE_LENGTH}
    recipe = Recipe(model=str(folder)).replace("calibration", **settings)
    np.save(parent / "tokens.npy", calibration_of(recipe.calibration, folder).samples.tokens)
    script = Path(__file__).parent / RUNNERS[job.peer]
    model = _float_copy(folder, parent / "model")
    return [python_of(job.peer), script, str(model), str(parent / "tokens.npy"), str(output), job.scheme]


def _float_copy(folder: Path, copy: Path) -> Path:
    """A copy in float32, which llm-compressor and AutoRound are told to load: msModelSlim asks the config.

    It has an index of its shards, also of one: msModelSlim reads some models by nothing else.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    weight_map = {}
    for shard in sorted(copy.glob("*.safetensors")):
        tensors = {name: tensor.float() for name, tensor in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    return copy
