"""The commands that serve a folder, for a report."""

import shlex
from dataclasses import replace
from pathlib import Path

from msquant.errors import MsquantError
from msquant.formats.registry import find_format
from msquant.formats.summary import Summary
from msquant.inference import vllm_mindspore
from msquant.inference.vllm_mindspore_server import PROGRAM, cluster_commands
from msquant.reporting.data import Command
from msquant.reporting.manifest import printable
from msquant.serving import serving_settings

_HOST, _PORT = "0.0.0.0", 8000
_HEAD = "ADDRESS-OF-NODE-0"


def commands(folder: Path, summary: Summary) -> list[Command]:
    """What to run, on an NPU and without one.

    A folder's own serving section counts; one that is not valid is left out, as `msquant run` reports it.

    Args:
        folder: as it is to be called in the commands.
        summary: of it.
    """
    name = shlex.quote(str(folder))
    form = None if summary.quantization is None else find_format(summary.quantization)
    if form is None or form.server == vllm_mindspore.NAME:
        found = _vllm_mindspore(folder)
    else:
        found = [Command(f"Serve it with {form.engine}", (form.serve_command(name),))]
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
