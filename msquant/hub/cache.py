"""Where msquant keeps what it has downloaded or converted."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder, which need not exist yet.

    It is `$MSQUANT_CACHE`, else `$XDG_CACHE_HOME/msquant`, else `~/.cache/msquant`. An empty variable counts
    as unset, as the XDG Base Directory Specification asks.
    """
    own = os.environ.get("MSQUANT_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "msquant"
