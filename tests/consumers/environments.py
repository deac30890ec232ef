"""Makes the environments in which the servers' own code runs on a CPU, from PyPI alone.

Run as `python -m tests.consumers.environments`; it takes some minutes and 7 GB the first time, and nothing
when everything is there. The folder is `.consumers` in the project's root, or what `MSQUANT_CONSUMERS`
names:

    servers             a Python environment: vllm_mindspore, its vLLM, MindFormers 1.7, MindSpore
    mindformers/1.8.0   that version's Python alone, to be put in front of the environment's
    vllm-ascend/0.23.0  likewise, of a wheel for x86_64; and vllm-ascend/newest, the newest on the index

What of each needs an NPU comes from `stand_ins`, in PYTHONPATH.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parents[2]
STAND_INS = Path(__file__).parent / "stand_ins"
MINDFORMERS = ("1.7.0", "1.8.0", "1.9.0")
VLLM_ASCEND = ("0.23.0", "newest")

# vLLM asks for torch 2.8 and CUDA; what it imports on the way to a CPU is named here, and what
# msquant does.
_SERVERS = """
    mindspore==2.7.1.post1 numpy==1.26.4 torch==2.13.0 transformers==4.57.1 ml_dtypes==0.5.4 setuptools<80
    msgspec regex cachetools psutil sentencepiece blake3 py-cpuinfo pydantic cloudpickle pyzmq gguf
    partial-json-parser prometheus_client prometheus-fastapi-instrumentator fastapi uvicorn uvloop
    python-multipart email-validator jinja2 aiohttp openai tiktoken lark pillow pyyaml einops filelock
    requests tqdm protobuf python-json-logger watchfiles pybase64 cbor2 setproctitle diskcache six depyf
    numba outlines_core==0.2.11 interegular compressed-tensors ray>=2.48 openai-harmony httpx ijson
    deprecated wrapt jieba rouge-chinese tensorboardX nltk ftfy datasets>=4,<6 pyarrow<22 pandas<3
    astunparse scipy openmind-hub==1.3.0 typer>=0.15,<1 rich>=13,<16 matplotlib>=3.9,<4 safetensors
    packaging urllib3
"""
# Without what these ask for: vLLM for a GPU's torch, vLLM-MindSpore for the NPU's packages.
_SERVERS_ALONE = """
    vllm==0.11.0 vllm-mindspore==0.5.1 mindformers==1.7.0 mindpet mistral_common llguidance xgrammar
    lm-format-enforcer
"""


@dataclass(frozen=True)
class Environments:
    """The environments of a folder.

    Attributes:
        root: the folder.
    """

    root: Path

    @property
    def python(self) -> Path:
        """Of the servers."""
        return self.root / "servers/bin/python"

    @property
    def mark(self) -> Path:
        """A file that says what is made."""
        return self.root / "made.json"

    def made(self) -> bool:
        """Whether all is there."""
        return self.mark.is_file() and json.loads(self.mark.read_text()) == _wanted()

    def paths(self, mindformers: str = "1.7.0") -> str:
        """PYTHONPATH of the servers' processes, with one of the versions of MindFormers."""
        other = [] if mindformers == "1.7.0" else [self.root / "mindformers" / mindformers]
        return os.pathsep.join(map(str, [STAND_INS, *other, PROJECT]))

    def ascend_paths(self, version: str) -> str:
        """PYTHONPATH for vllm-ascend's Python in msquant's own environment."""
        return os.pathsep.join(map(str, [STAND_INS, self.root / "vllm-ascend" / version, PROJECT]))

    def ascend_version(self, version: str) -> str:
        """The number of a version that is called newest."""
        (info,) = (self.root / "vllm-ascend" / version).glob("vllm_ascend-*.dist-info")
        return info.name.removeprefix("vllm_ascend-").removesuffix(".dist-info")


def environments() -> Environments:
    """Those of this project's folder, whether they are made or not."""
    named = os.environ.get("MSQUANT_CONSUMERS")
    return Environments(Path(named).resolve() if named else PROJECT / ".consumers")


def make(target: Environments) -> None:
    """Make what is not there.

    Raises:
        CalledProcessError: uv could not install something; it has said what.
    """
    if target.made():
        return
    target.root.mkdir(parents=True, exist_ok=True)
    target.mark.unlink(missing_ok=True)
    _uv("venv", "--quiet", "--clear", "--python", "3.11", target.root / "servers")
    python = ("--python", target.python)
    _uv("pip", "install", *python, *_SERVERS.split())
    _uv("pip", "install", *python, "--no-deps", *_SERVERS_ALONE.split())
    for version in MINDFORMERS[1:]:
        _only(target.root / "mindformers" / version, f"mindformers=={version}", python)
    for version in VLLM_ASCEND:
        wanted = "vllm-ascend" if version == "newest" else f"vllm-ascend=={version}"
        _only(target.root / "vllm-ascend" / version, wanted, python, "--prerelease", "allow")
    target.mark.write_text(json.dumps(_wanted()))


def _wanted() -> Mapping[str, Sequence[str]]:
    return {
        "servers": [*_SERVERS.split(), *_SERVERS_ALONE.split()],
        "mindformers": list(MINDFORMERS),
        "vllm-ascend": list(VLLM_ASCEND),
    }


def _only(folder: Path, package: str, python: Sequence[object], *options: str) -> None:
    """One package's files, without what it asks for."""
    _uv(
        "pip",
        "install",
        *python,
        "--no-deps",
        "--only-binary",
        ":all:",
        *options,
        "--target",
        folder,
        package,
    )


def _uv(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "uv", *map(str, arguments)], check=True)


if __name__ == "__main__":
    make(environments())
