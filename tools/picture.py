"""Draws the README's picture of a terminal from what the demo's commands print when it is run.

.venv/bin/python tools/picture.py [PICTURE.svg]
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

REPOSITORY = Path(__file__).parent.parent
PICTURE = REPOSITORY / "docs" / "images" / "demo.svg"
COLUMNS = 88
COMMANDS = (
    "msquant quantize smollm2-135m --algo osl",
    "msquant run --prompt 'I am'",
    "msquant run --chat --prompt 'What is the capital of France?' --max-tokens 32",
)
SHOWN_LINES = 30
"""Of one command, at most; the layers in the middle of a longer table are left out."""


def shortened(lines: list[str]) -> list[str]:
    """The lines, or their beginning and their end with a mark between."""
    if len(lines) <= SHOWN_LINES:
        return lines
    first = SHOWN_LINES // 3
    return [*lines[:first], "  ...", *lines[first - SHOWN_LINES + 1 :]]


def main() -> None:
    """Run the commands and write the picture."""
    picture = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    environment = os.environ | {
        "COLUMNS": str(COLUMNS),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        for command in COMMANDS:
            done = subprocess.run(
                command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=True
            )
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            for line in shortened(done.stdout.rstrip().splitlines()):
                console.print(Text.from_ansi(line), no_wrap=True, crop=True)
            console.print()
    picture.parent.mkdir(parents=True, exist_ok=True)
    # A fixed id, so that equal output gives equal bytes; and no font from another site.
    drawn = re.sub(
        r"@font-face \{.*?\}", "", console.export_svg(title="msquant", unique_id="msquant"), flags=re.S
    )
    picture.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
