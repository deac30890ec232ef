"""The package as a whole: how fast it starts, what imports what, what the wheel holds."""

import ast
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msquant

PACKAGE = Path(msquant.__file__).parent
REPOSITORY = PACKAGE.parent
# Of the processor, with the modules compiled, as they are after the first start.
START_SECONDS, IMPORT_SECONDS = 0.5, 0.1

HEAVY = {
    "mindspore",
    "mindspore_gs",
    "mindone",
    "transformers",
    "tokenizers",
    "datasets",
    "torch",
    "gguf",
    "numpy",
    "pandas",
    "pyarrow",
    "safetensors",
    "huggingface_hub",
    "matplotlib",
    "jinja2",
    "fastapi",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "lm_eval",
}

# What each part of the package may import, besides itself.
_BOTTOM = {"schemes", "errors", "interrupts", "progress", "__version__"}
_FOUNDATION = _BOTTOM | {"checkpoint", "families"}
_PARTS = {
    "hub",
    "calibration",
    "models",
    "kernels",
    "algorithms",
    "quantization",
    "formats",
    "inference",
    "evaluation",
}
ALLOWED = {
    "errors": set[str](),
    "schemes": {"errors"},
    "__version__": {"api", "kernels"},
    "interrupts": set[str](),
    "progress": set[str](),
    "checkpoint": _BOTTOM,
    "families": _BOTTOM | {"checkpoint"},
    "zoo": _FOUNDATION,
    "hub": _FOUNDATION | {"zoo"},
    "calibration": _FOUNDATION | {"hub"},
    "models": _FOUNDATION | {"kernels"},
    "formats": _FOUNDATION,
    "kernels": _FOUNDATION,
    "algorithms": _FOUNDATION | {"models", "kernels"},
    "quantization": _FOUNDATION | {"models", "kernels", "algorithms"},
    "inference": _FOUNDATION | {"models", "kernels", "formats"},
    "deploy": _FOUNDATION | {"inference", "formats"},
    "evaluation": _FOUNDATION | {"models"},
    "recipe": _FOUNDATION | _PARTS,
    "flows": _FOUNDATION | _PARTS | {"deploy", "recipe"},
    "planning": _FOUNDATION | _PARTS | {"recipe", "flows"},
    "reporting": _FOUNDATION | _PARTS | {"deploy", "recipe", "flows"},
    "server": _FOUNDATION | _PARTS | {"deploy", "flows"},
    "tasks": _FOUNDATION | _PARTS | {"flows"},
    "api": _FOUNDATION | _PARTS | {"deploy", "recipe", "flows", "planning"},
    "cli": _FOUNDATION
    | _PARTS
    | {"api", "deploy", "recipe", "flows", "planning", "reporting", "server", "tasks"},
    "__main__": {"cli"},
}

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = {path: path.read_text(encoding="utf-8") for path in MODULES}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def best_of_five(*command: str) -> float:
    """Processor seconds of the fastest of five runs: what the machine makes them wait is not ours."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(*command).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


def script() -> str:
    return str(Path(sys.executable).parent / "msquant")


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def part_of(path: Path) -> str:
    """The part that a module belongs to: a folder of the package, or a module directly in it."""
    first = path.relative_to(PACKAGE).parts[0]
    return "__version__" if first == "__init__.py" else first.removesuffix(".py")


def imported_parts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and part of every import of the package's own modules, wherever in the module it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = ["msquant.a relative import"]
        elif isinstance(node, ast.ImportFrom) and node.module == "msquant":
            names = [f"msquant.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            if name.startswith("msquant."):
                yield node.lineno, name.split(".")[1]


def breaches(part: str, source: str) -> list[tuple[int, str]]:
    return [
        (line, imported)
        for line, imported in imported_parts(ast.parse(source))
        if imported != part and imported not in ALLOWED[part]
    ]


def writes_to_the_terminal(source: str) -> list[int]:
    """Lines that call `print` or write to `sys.stdout` or `sys.stderr`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    writers = {"print", "sys.stdout.write", "sys.stderr.write"}
    return [call.lineno for call in calls if ast.unparse(call.func) in writers]


def says_nothing(source: str) -> bool:
    """Whether a module that holds anything lacks a docstring."""
    return bool(source.strip()) and not ast.get_docstring(ast.parse(source))


def test_importing_is_fast() -> None:
    assert best_of_five(sys.executable, "-c", "import msquant") < IMPORT_SECONDS


def test_help_is_fast() -> None:
    assert best_of_five(script(), "--help") < START_SECONDS


def test_the_command_line_imports_no_heavy_package() -> None:
    code = "import sys, msquant.cli.app; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    result = run(sys.executable, "-c", code)
    loaded = set(result.stdout.split())
    assert "typer" in loaded, result.stderr
    assert loaded & HEAVY == set()


def test_python_m_prints_the_version() -> None:
    assert run(sys.executable, "-m", "msquant", "--version").stdout == f"msquant {msquant.__version__}\n"


def test_without_arguments_the_help_is_shown() -> None:
    result = run(script())
    assert result.stdout + result.stderr == run(script(), "--help").stdout
    assert "Usage: msquant" in result.stdout + result.stderr
    for command in ("quantize", "plan", "analyze", "run", "inspect"):
        assert f"\n  {command} " in result.stdout + result.stderr


def test_every_part_has_its_place() -> None:
    assert {part_of(path) for path in MODULES} == set(ALLOWED)


def test_imports_point_one_way() -> None:
    found = {path: breaches(part_of(path), source) for path, source in SOURCES.items()}
    assert {name_of(path): lines for path, lines in found.items() if lines} == {}


def test_only_the_console_writes_to_the_terminal() -> None:
    found = {name_of(path): writes_to_the_terminal(source) for path, source in SOURCES.items()}
    assert {name: lines for name, lines in found.items() if lines and name != "cli/console.py"} == {}


def test_modules_say_what_they_are() -> None:
    silent = [name_of(path) for path, source in SOURCES.items() if says_nothing(source)]
    assert silent == []


def test_a_breach_would_be_found() -> None:
    source = "from msquant import cli\ndef f():\n    from msquant.models.rope import x\n    print(x)\n"
    assert breaches("checkpoint", source) == [(1, "cli"), (3, "models")]
    assert breaches("checkpoint", "from .weights import Linear") == [(1, "a relative import")]
    assert writes_to_the_terminal(source) == [4]
    assert writes_to_the_terminal("import sys\nsys.stderr.write('')") == [2]
    assert says_nothing(source)
    assert not says_nothing(f"'What it is.'\n{source}")
    assert not says_nothing("\n")
