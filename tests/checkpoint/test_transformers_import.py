"""transformers with and without torch, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import os, sys
from pathlib import Path
from msquant.checkpoint.tokenizer import load_tokenizer
from msquant.checkpoint.transformers_import import leave_torch_out

leave_torch_out()
print(load_tokenizer(Path(sys.argv[1])).encode("I am"))
print("torch" in sys.modules, "USE_TORCH" in os.environ)
"""


def test_torch_is_left_out_where_it_is_installed(tiny_llama: Path) -> None:
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    process = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tiny_llama)], capture_output=True, text=True, check=True
    )
    assert process.stdout.splitlines() == [
        str(AutoTokenizer.from_pretrained(tiny_llama).encode("I am")),
        "False False",
    ]
    assert "PyTorch" not in process.stderr
