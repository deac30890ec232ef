"""transformers, of which msquant wants the tokenizers and the configurations alone."""

import importlib
import os
from typing import Any

_SWITCH = "USE_TORCH"
_without_torch = False


def leave_torch_out() -> None:
    """Import transformers as if torch were not installed: in 2 seconds instead of 8.

    For a process in which nobody else uses transformers: its models are then not there.
    """
    global _without_torch
    _without_torch = True


def import_transformers() -> Any:
    """The package."""
    # Without torch, transformers warns at import that it has no models.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not _without_torch or _SWITCH in os.environ:
        return importlib.import_module("transformers")
    # Read when the package is imported; processes that this one starts must not inherit it.
    os.environ[_SWITCH] = "0"
    try:
        return importlib.import_module("transformers")
    finally:
        del os.environ[_SWITCH]
