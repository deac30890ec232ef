"""Model folders made from another by changing its `config.json`, and sources with some tensors replaced."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.weights import Linear, WeightSource


def with_config(source: Path, target: Path, **changes: Any) -> Path:
    """Copy a model folder and change entries of its `config.json`; a value of None removes the entry."""
    shutil.copytree(source, target)
    path = target / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return target


class Replaced:
    """A `WeightSource` that gives some floating-point tensors in place of the stored ones."""

    def __init__(self, source: WeightSource, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        self._source, self._tensors = source, tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._source

    def tensor(self, name: str) -> NDArray[np.float32]:
        return self._tensors[name] if name in self._tensors else self._source.tensor(name)

    def rows(self, name: str, indices: NDArray[np.integer]) -> NDArray[np.float32]:
        return self._tensors[name][indices] if name in self._tensors else self._source.rows(name, indices)

    def linear(self, module: str) -> Linear:
        return self._source.linear(module)
