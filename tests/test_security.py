"""What SECURITY.md promises, as far as the source shows it, and that the tests it names exist."""

import ast
import inspect
import re
import socket
from pathlib import Path

import pytest

import msquant
from msquant.cli.serve import serve
from msquant.flows.diagnosis import mindspore_check
from msquant.flows.local_workers import LocalHand

PACKAGE = Path(msquant.__file__).parent
REPOSITORY = PACKAGE.parent
UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNNING = {"eval", "exec", "torch.load", "yaml.unsafe_load", "yaml.full_load", "mindspore.load_checkpoint"}


def breaches(source: str) -> list[int]:
    """Lines that import what unpickles, run text as code, or let another do so."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            wrong = any(alias.name.split(".")[0] in UNPICKLING for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            wrong = (node.module or "").split(".")[0] in UNPICKLING
        elif isinstance(node, ast.Call):
            trusting = {"trust_remote_code", "allow_pickle"}
            wrong = ast.unparse(node.func) in RUNNING or any(
                option.arg in trusting and ast.unparse(option.value) != "False" for option in node.keywords
            )
        else:
            continue
        if wrong:
            found.append(node.lineno)
    return found


def test_nothing_is_unpickled_and_no_code_is_trusted() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert breaches(path.read_text(encoding="utf-8")) == [], path
    assert breaches("import pickle\nf(trust_remote_code=True)\neval(x)\nf(trust_remote_code=False)") == [
        1,
        2,
        3,
    ]


@pytest.mark.e2e
def test_nothing_is_imported_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person stands in a downloaded model's folder, which has modules of its own."""
    ran = tmp_path / "ran"
    for name in ("numpy", "secrets", "mindspore", "pip"):
        (tmp_path / f"{name}.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    hand = LocalHand(1)
    try:
        hand.call("node")
        assert hand.answer() == socket.gethostname()
    finally:
        hand.kill()
    assert mindspore_check().status != "error"
    assert not ran.exists()


def test_the_server_listens_on_loopback_unless_told_otherwise() -> None:
    assert inspect.signature(serve).parameters["host"].default == "127.0.0.1"


def test_the_tests_that_the_page_names_exist() -> None:
    text = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| **")]
    assert len(rows) >= 17
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, f"no test stands beside {row[:60]}"
        for path, test in named:
            source = (REPOSITORY / path).read_text(encoding="utf-8")
            assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"there is no {path}::{test}"
