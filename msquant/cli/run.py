"""`msquant run`."""


def run() -> None:
    """To be filled in."""
