"""golden-stick 1.4.1 made ready for one decoder layer at a time, on any device and without noise."""

import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any


@cache
def load() -> None:
    """Import golden-stick and register the cells and modules that the pass needs, once a process.

    Does by hand what its `MindOneModelHubPlugin` does, without importing mindone's models. What is alive by
    then is left out of garbage collection.
    """
    # Its import switches every DeprecationWarning on, for the whole process.
    with warnings.catch_warnings():
        from mindspore_gs.common import logger
        from mindspore_gs.ptq.ptq import quant
        from mindspore_gs.ptq.quant_cells.mindone import (
            AllQuantLinearCell,
            AWQSmoothQuantLinearCell,
            ClipLinearCell,
            DynamicQuantLinearCell,
            OSLSmoothQuantLinearCell,
            SmoothQuantLinearCell,
            WeightQuantLinearCell,
        )

    # The original reads the source of the whole stack for every message, even a suppressed one: 0.1 s each.
    logger_module: Any = sys.modules[type(logger).__module__]
    logger_module._find_real_caller = _caller
    # Its bar would count to one for every decoder layer; msquant shows its own.
    quant.tqdm = SimpleNamespace(tqdm=lambda items, **_: items)
    for cell in (
        OSLSmoothQuantLinearCell,
        AWQSmoothQuantLinearCell,
        SmoothQuantLinearCell,
        ClipLinearCell,
        AllQuantLinearCell,
        DynamicQuantLinearCell,
        WeightQuantLinearCell,
    ):
        cell.reg_self()
    # It collects garbage many times a layer, 0.4 s each with all that is loaded by now.
    gc.freeze()


def set_log_level(verbose: bool) -> None:
    """Show golden-stick's own log (`-v`), or only its errors."""
    load()
    from mindspore_gs.common import logger

    logger.set_level(logging.INFO if verbose else logging.ERROR)
    for handler in logger.logger.handlers:
        # It writes to stdout, which is for results.
        handler.setStream(sys.stderr)


@contextmanager
def pipeline(modules: list[Callable[..., Any]]) -> Iterator[None]:
    """Let `PTQ.apply` run exactly these algorithm modules, in this order, within the block."""
    load()
    from mindspore_gs.ptq import PTQ

    before = list(PTQ.pipeline)
    PTQ.pipeline[:] = modules
    try:
        yield
    finally:
        PTQ.pipeline[:] = before


def _caller() -> tuple[str, int, str, None]:
    frame = sys._getframe(3)
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, None
