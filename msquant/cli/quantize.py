"""`msquant quantize`."""


def quantize() -> None:
    """To be filled in."""
