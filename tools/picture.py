"""Draws the README's picture of a terminal from what the demo's commands print when it is run.

.venv/bin/python tools/picture.py [PICTURE.svg]
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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
SHOWN_ROWS = 7
"""Of a table; that of the decoder layers has many, the noisiest first."""


def shortened(lines: list[str]) -> Iterator[str]:
    """The lines, without a long table's later rows."""
    rows = 0
    for line in lines:
        rows = rows + 1 if line.startswith("│") else 0
        if rows <= SHOWN_ROWS:
            yield line
        elif rows == SHOWN_ROWS + 1:
            yield "│   ..."


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
            # The folder that it ran in is gone when anybody reads this.
            shown = done.stdout.rstrip().replace(f"{folder}/", "")
            for line in shortened(shown.splitlines()):
                console.print(Text.from_ansi(line))
            console.print()
    picture.parent.mkdir(parents=True, exist_ok=True)
    # A fixed id, so that equal output gives equal bytes; and no font from another site.
    drawn = console.export_svg(title="msquant", unique_id="msquant")
    picture.write_text(re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    main()
