"""An environment of its own for each peer: made once in msquant's cache, by uv."""

import os
import subprocess
import sys
from pathlib import Path

from msquant.checkpoint.cache import cache_folder

TORCH = "torch==2.13.0"
# By its version, because a wheel for the CPU may be at hand: left to the peers, it would be one for CUDA.
REQUIREMENTS: dict[str, list[str]] = {
    "llm-compressor": [TORCH, "llmcompressor==0.14.0.1"],
    # An older datasets, which resolvers fall back to, breaks on a new pyarrow.
    "AutoRound": [
        *(TORCH, "auto-round==0.16.1", "transformers==4.57.1", "datasets==4.4.1"),
        "compressed-tensors==0.19.0",
    ],
    # The last one that takes this torch; 7.7.0 wants 2.14.1.
    "GPTQModel": [TORCH, "gptqmodel==7.6.0"],
    "msModelSlim": [TORCH, "msmodelslim==26.1.0", "transformers==4.57.1", "pyyaml"],
}
"""What is installed, by environment. golden-stick is not among them: it is in msquant's own."""
PACKAGES = {
    "llm-compressor": "llmcompressor",
    "AutoRound": "auto-round",
    "GPTQModel": "gptqmodel",
    "msModelSlim": "msmodelslim",
    "golden-stick": "mindspore-gs",
}
"""Whose version stands in the table."""


def python_of(peer: str) -> Path:
    """The Python that has the peer installed; the first call installs it.

    Raises:
        SystemExit: that failed; its errors are on stderr.
    """
    if peer not in REQUIREMENTS:
        return Path(sys.executable)
    folder = cache_folder() / "benchmarks" / "peers" / peer
    python, complete = folder / "bin" / "python", folder / "complete.txt"
    wanted = "\n".join(REQUIREMENTS[peer])
    if not complete.is_file() or complete.read_text() != wanted:
        print(f"installing {peer} into {folder}", file=sys.stderr)
        commands = [[sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)]]
        install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
        commands += [[*install, *REQUIREMENTS[peer]]]
        # uv does not read pip's own setting for extra wheel folders.
        folders = os.environ.get("PIP_FIND_LINKS")
        links = {"UV_FIND_LINKS": folders} if folders else {}
        for command in commands:
            if subprocess.run(command, check=False, env={**links, **os.environ}).returncode:
                raise SystemExit(f"{' '.join(command)} failed")
        complete.write_text(wanted)
    return python


def versions(peer: str) -> str:
    """`name==version` of the peer as it is installed, for the table."""
    code = f"from importlib.metadata import version; print(version({PACKAGES[peer]!r}))"
    done = subprocess.run([python_of(peer), "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return f"{peer} {done.stdout.strip()}"
