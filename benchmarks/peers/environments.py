"""An environment of its own for each peer: made once in msquant's cache, by pip."""

import subprocess
import sys
from pathlib import Path

from msquant.checkpoint.cache import cache_folder

TORCH = "torch==2.13.0"
# First torch, by itself: left to the peers, pip would take one for CUDA.
REQUIREMENTS: dict[str, list[str]] = {
    "llm-compressor": [TORCH, "llmcompressor==0.14.0.1"],
    # An older datasets, which resolvers fall back to, breaks on a new pyarrow.
    "AutoRound": [
        *(TORCH, "auto-round==0.16.1", "transformers==4.57.1", "datasets==4.4.1"),
        "compressed-tensors==0.19.0",
    ],
    "msModelSlim": [TORCH, "msmodelslim==26.1.0", "transformers==4.57.1", "pyyaml"],
}
"""What pip is told, by peer. golden-stick is not among them: it is in msquant's own environment."""


def python_of(peer: str) -> Path:
    """The Python that has the peer installed; the first call installs it.

    Raises:
        SystemExit: pip failed; its errors are on stderr.
    """
    if peer not in REQUIREMENTS:
        return Path(sys.executable)
    folder = cache_folder() / "benchmarks" / "peers" / peer
    python, complete = folder / "bin" / "python", folder / "complete.txt"
    wanted = "\n".join(REQUIREMENTS[peer])
    if not complete.is_file() or complete.read_text() != wanted:
        print(f"installing {peer} into {folder}", file=sys.stderr)
        commands = [[sys.executable, "-m", "venv", "--clear", str(folder)]]
        commands += [[str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS[peer]]]
        for command in commands:
            if subprocess.run(command, check=False).returncode:
                raise SystemExit(f"{' '.join(command)} failed")
        complete.write_text(wanted)
    return python


def versions(peer: str) -> str:
    """`name==version` of the peer as it is installed, for the table."""
    package = {"llm-compressor": "llmcompressor", "AutoRound": "auto-round", "msModelSlim": "msmodelslim"}
    name = package.get(peer, "mindspore-gs")
    code = f"from importlib.metadata import version; print(version({name!r}))"
    done = subprocess.run([python_of(peer), "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return f"{peer} {done.stdout.strip()}"
