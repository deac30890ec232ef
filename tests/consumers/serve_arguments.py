"""The real `vllm-mindspore serve` parses msquant's commands.

Run as `python serve_arguments.py COMMANDS.json FOUND.json` in the servers' environment. COMMANDS.json has
`serve`, a list of arguments for each command, and `load`, the options of `vllm.LLM`. FOUND.json gets what
each command was parsed to, or null where it was refused, and the options that vLLM does not know.
"""

import json
import sys
from pathlib import Path
from typing import Any

import vllm_mindspore  # noqa: F401  # isort: skip  # before vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli import serve
from vllm_mindspore.scripts import main

seen: list[Any] = []


def parsed(argv: list[str]) -> dict[str, Any] | None:
    """The values of a command's own options."""
    seen.clear()
    sys.argv = argv
    try:
        main()
    except SystemExit:
        return None
    named = {word[2:].replace("-", "_") for word in argv if word.startswith("--")}
    values = {name: getattr(seen[0], name) for name in named}
    return values | {"model": seen[0].model_tag or seen[0].model}


if __name__ == "__main__":
    serve.ServeSubcommand.cmd = staticmethod(seen.append)
    given, output = map(Path, sys.argv[1:])
    commands = json.loads(given.read_text())
    unknown = [set(options) - set(EngineArgs.__dataclass_fields__) for options in commands["load"]]
    found = {"serve": [parsed(argv) for argv in commands["serve"]], "unknown": sorted(set().union(*unknown))}
    output.write_text(json.dumps(found, default=str))
