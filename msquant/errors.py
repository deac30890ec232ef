"""The errors msquant raises on purpose: what went wrong, where, and what to do about it."""

from collections.abc import Sequence
from pathlib import Path


class MsquantError(Exception):
    """An error that a person can act on.

    Args:
        what: the fact, naming the value that is wrong.
        where: the file, tensor or option it was found in.
        remedy: the next thing to try, in the imperative.
    """

    def __init__(self, what: str, *, where: str | Path | None = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = str(where) if where is not None else None
        self.remedy = remedy

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.remedy:
            parts.append(self.remedy)
        return "\n".join(parts)


class RecipeError(MsquantError):
    """A recipe, or an option that overrides it, is not valid."""


class ModelError(MsquantError):
    """A model cannot be found, or its architecture is not supported."""


class HubError(MsquantError):
    """A model hub cannot be reached, refuses a request, or sends what cannot be trusted."""


class CheckpointError(MsquantError):
    """A checkpoint on disk is incomplete, damaged or breaks its format's contract."""


class StartOverError(CheckpointError):
    """What an unfinished run would continue from is lost or is not what it was: its remedy says all."""


class CalibrationError(MsquantError):
    """Calibration text is missing, unreadable or too short."""


class OutputError(MsquantError):
    """A result cannot be written."""


class EngineError(MsquantError):
    """An inference engine is missing or failed."""


def choices(value: object, known: Sequence[str]) -> str:
    """The remedy for a name that is none of the known ones: `did you mean osl? use one of: osl, rtn`."""
    # Imported here because only a wrong name needs it.
    from difflib import get_close_matches

    lower = {name.lower(): name for name in known}
    near = get_close_matches(str(value).lower(), lower, n=1)
    hint = f"did you mean {lower[near[0]]}? " if near else ""
    return f"{hint}use one of: {', '.join(known)}"
