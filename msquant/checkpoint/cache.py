"""Where msquant keeps what it may fetch or make again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$MSQUANT_CACHE`, else `$XDG_CACHE_HOME/msquant`, else `~/.cache/msquant`; it may not exist yet."""
    if own := os.environ.get("MSQUANT_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "msquant"
    return Path.home() / ".cache" / "msquant"
