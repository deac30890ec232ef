"""Model folders made from another by changing its `config.json`."""

import json
import shutil
from pathlib import Path
from typing import Any


def with_config(source: Path, target: Path, **changes: Any) -> Path:
    """Copy a model folder and change entries of its `config.json`; a value of None removes the entry."""
    shutil.copytree(source, target)
    path = target / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return target
