"""Text to evaluate on that is on every machine msquant is installed on, and that calibration does not see.

Four domains, two of them of kinds that the builtin calibration text has nothing of:

- docs: the half of `pydoc_data.topics` that calibration leaves out, technical English.
- code: modules of the standard library that calibration does not take, Python source.
- math: the docstrings of MindSpore's mathematical functions, English with formulas and numbers.
- cpp: MindSpore's public headers, C++ with Doxygen comments.

MindSpore is a dependency with a pinned version, and its files are read without importing it.
"""

import ast

from msquant.calibration.builtin import Domain, evaluation_texts, installed_file, module_source

CODE_MODULES = ("calendar", "configparser", "shutil", "zipfile")
FUNCTIONS = "mindspore/ops/function/math_func.py"
HEADERS = ("context.h", "model.h", "types.h")


def evaluation_domains() -> list[Domain]:
    """Return the builtin evaluation text; see the module's docstring for what it is made of.

    Raises:
        CalibrationError: a part of the Python installation that holds some of it is missing.
    """
    return [
        Domain("docs", 1, evaluation_texts()),
        Domain("code", 1, [module_source(name) for name in CODE_MODULES]),
        Domain("math", 1, _docstrings(installed_file("mindspore", FUNCTIONS))),
        Domain("cpp", 1, [_without_license(_header(name)) for name in HEADERS]),
    ]


def _docstrings(source: str) -> list[str]:
    functions = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    found = ((node.name, ast.get_docstring(node)) for node in functions)
    return [f"{name}\n\n{text}" for name, text in found if text]


def _header(name: str) -> str:
    return installed_file("mindspore", f"mindspore/include/api/{name}")


def _without_license(source: str) -> str:
    """Calibration has seen the license, at the top of every header."""
    return source.partition("*/")[2].strip()
