"""The commands that serve a folder, for a report."""

import shlex
from dataclasses import replace
from pathlib import Path

from msquant.errors import MsquantError
from msquant.formats.summary import Summary
from msquant.inference.vllm_mindspore_server import PROGRAM, cluster_commands
from msquant.reporting.data import Command
from msquant.reporting.manifest import printable
from msquant.serving import serving_settings

_HOST, _PORT = "0.0.0.0", 8000
_HEAD = "ADDRESS-OF-NODE-0"
_VLLM = {
    "compressed-tensors": ("Serve it with vLLM", "vllm serve {}"),
    "ascend": ("Serve it with vllm-ascend", "vllm serve {} --quantization ascend"),
}
"""By format: what vLLM serves by itself or with a plugin."""


def commands(folder: Path, summary: Summary) -> list[Command]:
    """What to run, on an NPU and without one.

    A folder's own serving section counts; one that is not valid is left out, as `msquant run` reports it.

    Args:
        folder: as it is to be called in the commands.
        summary: of it.
    """
    name = shlex.quote(str(folder))
    if summary.quantization in _VLLM:
        what, line = _VLLM[summary.quantization]
        found = [Command(what, (line.format(name),))]
    else:
        found = _vllm_mindspore(folder)
    prompt = f"msquant run --model {name} --prompt 'I am'"
    found.append(Command("Continue a prompt without an NPU", (prompt,)))
    return [Command(command.what, tuple(map(printable, command.lines))) for command in found]


def _vllm_mindspore(folder: Path) -> list[Command]:
    try:
        settings = serving_settings(folder)
        if settings.nodes > 1 and settings.head_address is None:
            settings = settings.changed({"head_address": _HEAD})
        launches = cluster_commands(folder, settings, _HOST, _PORT, environment={})
    except MsquantError:
        return []
    lines: list[str] = []
    for launch in launches:
        # The program as it is called elsewhere, not where it lies on this machine.
        program, *arguments = launch.argv
        name = PROGRAM if Path(program).name == PROGRAM else program
        lines += replace(launch, argv=(name, *arguments)).shell().splitlines()
    return [Command("Serve it with vLLM-MindSpore", tuple(lines))]
