"""`msquant inspect`."""


def inspect() -> None:
    """To be filled in."""
