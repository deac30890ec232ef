"""Packages that exist as far as their metadata goes."""

from pathlib import Path


def write_package(folder: Path, name: str, version: str) -> None:
    """What pip leaves of an installed package, for `importlib.metadata`."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
