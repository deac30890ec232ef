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


@dataclass(frozen=True)
class Peer:
    """What quantizes.

    Attributes:
        name: in the tables.
        algorithm: msquant's own; None for the one that the model's recipe would take.
        script: of another one, in this folder; empty for msquant itself.
        environment: whose Python runs the script, by the names of `environments`.
        arguments: of the script, behind the scheme.
    """

    name: str
    algorithm: str | None = None
    script: str = ""
    environment: str = ""
    arguments: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether it is msquant itself."""
        return not self.script


_LLM_COMPRESSOR = "run_llm_compressor_four_bits.py", "llm-compressor"
EIGHT_BITS = (
    Peer("msquant"),
    Peer("msquant smoothquant", "smoothquant"),
    Peer("llm-compressor", None, "run_llm_compressor.py", "llm-compressor"),
    Peer("AutoRound", None, "run_auto_round.py", "AutoRound"),
    Peer("msModelSlim", None, "run_msmodelslim.py", "msModelSlim"),
    Peer("golden-stick", None, "run_golden_stick.py", "golden-stick"),
)
FOUR_BITS = (
    Peer("msquant", "gptq"),
    Peer("msquant rtn", "rtn"),
    Peer("llm-compressor GPTQ", None, *_LLM_COMPRESSOR, ("gptq",)),
    Peer("llm-compressor AWQ", None, *_LLM_COMPRESSOR, ("awq",)),
    Peer("GPTQModel", None, "run_gptqmodel.py", "GPTQModel"),
    Peer("AutoRound", None, "run_auto_round_four_bits.py", "AutoRound"),
    Peer("msModelSlim", None, "run_msmodelslim_four_bits.py", "msModelSlim"),
)
INT4_EXPERTS = "W4A8 experts"
"""Routed experts in W4A8_DYNAMIC and all else in W8A8_DYNAMIC: llm-compressor's alone, see `families`."""
FOUR_BIT_SCHEMES = ("W4A16_G64_ASYM", "W4A16_G128", "W4A16_CHANNEL", "W4A8_DYNAMIC")
"""By their words, of all linears but the head."""
# Experts cannot be served with static activations: vLLM and MindFormers both take them per token alone.
SCHEMES = {
    "tiny-qwen3": ("static", "dynamic", *FOUR_BIT_SCHEMES),
    "tiny-qwen3-moe": ("mixed", "dynamic"),
    "tiny-qwen3-next": ("dynamic",),
    "tiny-deepseek-v3": ("mixed", "dynamic"),
    "smollm2-135m": ("static", "dynamic", *FOUR_BIT_SCHEMES),
}
DYNAMIC = {"static": [], "dynamic": ["proj"], "mixed": ["mlp."]}
"""What the scheme computes per token, by patterns of names; the rest is static."""


def peers_of(scheme: str) -> dict[str, Peer]:
    """Who is run in a scheme, by name, in the order of the table."""
    in_four = scheme in (*FOUR_BIT_SCHEMES, INT4_EXPERTS)
    return {peer.name: peer for peer in (FOUR_BITS if in_four else EIGHT_BITS)}


def numbers_of(scheme: str) -> dict[str, Any]:
    """What the scripts of other peers are told about a scheme in four bits, as JSON."""
    from msquant.schemes import parse_scheme

    parsed = parse_scheme("W4A8_DYNAMIC" if scheme == INT4_EXPERTS else scheme)
    assert parsed.weights is not None
    return {
        "weight_bits": parsed.weights.bits,
        "group_size": parsed.weights.group_size,
        "symmetric": parsed.weights.symmetric,
        "input_bits": parsed.inputs.bits if parsed.inputs else None,
        "experts_alone": scheme == INT4_EXPERTS,
    }


Setting = tuple[str, str]
"""A model and a scheme: what a peer is compared within."""


@dataclass(frozen=True)
class Job:
    """What is run.

    Attributes:
        model: one of the models' names.
        scheme: `static`, `dynamic`, or `mixed`: static attention, feed-forward blocks per token; or one of
            `FOUR_BIT_SCHEMES`, or `INT4_EXPERTS`.
        peer: the name of one of `peers_of(scheme)`.
    """

    model: str
    scheme: str
    peer: str

    @property
    def is_ours(self) -> bool:
        """Whether msquant itself runs."""
        return peers_of(self.scheme)[self.peer].is_ours

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

    output = parent / "out"
    measured = run_peer(job, folder, output, parent)
    today = datetime.date.today().isoformat()
    if measured.error:
        return Result(job, measured, {}, {}, {}, 0, measured.error, today)
    nbytes = sum(shard.stat().st_size for shard in output.glob("*.safetensors"))
    try:
        kl, perplexity = reference.compare(simulated(folder, read_folder(output)))
    except (SystemExit, AttributeError, KeyError, RuntimeError) as error:
        return Result(job, measured, {}, {}, {}, nbytes, f"its folder cannot be read: {error}", today)
    return Result(job, measured, kl, perplexity, _compared(folder, output, reference), nbytes, None, today)


def run_peer(job: Job, folder: Path, output: Path, parent: Path, samples: int = SAMPLES) -> Measured:
    """Quantize with one peer into a folder, with so many samples; other arguments as for `run_job`."""
    make = _ours if job.is_ours else _peers
    command = make(job, folder, output, parent, samples)
    return run_measured(command, parent / "log.txt", {"HF_HUB_OFFLINE": "1"})


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


def _ours(job: Job, folder: Path, output: Path, parent: Path, samples: int) -> list[str | Path]:
    """`msquant quantize` of a recipe file, without the accuracy that it measures at the end."""
    from msquant.recipe.recipe import find_recipe, write_recipe

    recipe = find_recipe(str(folder)).replace("calibration", samples=samples, sequence_length=SEQUENCE_LENGTH)
    algorithm = peers_of(job.scheme)[job.peer].algorithm
    if job.scheme in FOUR_BIT_SCHEMES:
        recipe = recipe.adjusted(algo=algorithm, scheme=job.scheme, formats="compressed-tensors")
    else:
        schemes = rules(dynamic=DYNAMIC[job.scheme])
        recipe = recipe.replace("quantization", algorithm=algorithm, schemes=schemes)
    write_recipe(recipe, parent / "recipe.yaml")
    options = ["--format", "compressed-tensors", "--no-evaluate", "--output", str(output), "--json"]
    return [sys.executable, "-m", "msquant", "quantize", str(parent / "recipe.yaml"), *options]


def _peers(job: Job, folder: Path, output: Path, parent: Path, samples: int) -> list[str | Path]:
    from msquant.flows.calibration import calibration_of
    from msquant.recipe.recipe import Recipe

    settings = {"samples": samples, "sequence_length": SEQUENCE_LENGTH}
    recipe = Recipe(model=str(folder)).replace("calibration", **settings)
    np.save(parent / "tokens.npy", calibration_of(recipe.calibration, folder).samples.tokens)
    peer = peers_of(job.scheme)[job.peer]
    in_numbers = job.scheme in (*FOUR_BIT_SCHEMES, INT4_EXPERTS)
    scheme = json.dumps(numbers_of(job.scheme)) if in_numbers else job.scheme
    model = _float_copy(folder, parent / "model")
    files = [str(model), str(parent / "tokens.npy"), str(output)]
    script = Path(__file__).parent / peer.script
    return [python_of(peer.environment), script, *files, scheme, *peer.arguments]


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
