"""Makes and removes the Python environments of engines, with venv and pip."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from msquant.checkpoint.disk import free_bytes
from msquant.checkpoint.lock import LockHeld, acquire_lock
from msquant.errors import EngineError
from msquant.inference.environments import (
    BEGUN_NAME,
    MARKER_NAME,
    EngineSpec,
    Environment,
    engines_folder,
    environment,
    inspect,
    lock_file,
    locked_lines,
    write_marker,
)

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where PyTorch publishes its builds for CPUs; PyPI has those with CUDA only."""

OnStep = Callable[[str, int, int], None]
"""Called with what goes on, and how many of how many packages are done."""

_LAST_LINES = 6
# pip says `Processing` in place of `Collecting` for a file of its own machine.
_FETCHED = re.compile(
    r"(?:Collecting|Processing|Requirement already satisfied:) (?:\S*/)?(\w[\w.]*(?:-[a-zA-Z]\w*)*)"
)


def install(
    spec: EngineSpec,
    path: Path | None = None,
    *,
    reinstall: bool = False,
    on_step: OnStep = lambda text, done, total: None,
) -> Environment:
    """Install an engine; at once if it is there already.

    pip's own settings hold: mirrors, proxies, certificates, PIP_FIND_LINKS. Only wheels whose sha256 is in
    the engine's lock file are taken, wherever they come from, and no package runs code of its own while it
    is installed. An interrupted installation is removed, or, after a hard kill, recognised and made again.

    Args:
        spec: the engine.
        path: the folder to make; by default the one that is in use, or msquant's cache.
        reinstall: make it again even if it is ready.
        on_step: told how far it is.

    Returns:
        The ready environment.

    Raises:
        EngineError: no room, a folder that is not an environment of msquant's in its place, another
            installation running, a processor without a lock file, or pip failed or got a file with another
            hash; names pip's last lines and its log.
    """
    lock = lock_file(spec)
    link = engines_folder() / spec.name
    target = environment(spec).path if path is None else path.expanduser().absolute()
    with _locked(spec), _explained(target):
        if link != target and link.is_dir() and not link.is_symlink():
            raise EngineError(
                "the engine is installed here already",
                where=link,
                remedy=f"remove it first with msquant engine remove {spec.name}, or leave --path out",
            )
        found = inspect(spec, target)
        if found.state != "ready" or reinstall:
            _require_ours(target)
            _require_room(spec, target)
            shutil.rmtree(target, ignore_errors=True)
            _make(spec, lock, target, on_step)
        if link != target:
            _point(link, target)
    return inspect(spec, target)


def remove(spec: EngineSpec) -> Environment:
    """Remove an engine's environment, and nothing that msquant has not made.

    Returns:
        What was there.

    Raises:
        EngineError: it is not installed, or its folder was not made by msquant, or cannot be removed.
    """
    link = engines_folder() / spec.name
    with _locked(spec), _explained(link):
        found = environment(spec)
        if found.state == "not installed" and not found.path.exists():
            if link.is_symlink():
                link.unlink()
            raise EngineError(f"the engine {spec.name} is not installed", where=found.path)
        _require_ours(found.path)
        # Without its markers it is nothing, whatever of it remains when this is interrupted.
        (found.path / BEGUN_NAME).touch()
        (found.path / MARKER_NAME).unlink(missing_ok=True)
        shutil.rmtree(found.path)
        if link.is_symlink():
            link.unlink()
    return found


def _make(spec: EngineSpec, lock: Path, target: Path, on_step: OnStep) -> None:
    log = engines_folder() / f"{spec.name}-install.log"
    requirements = locked_lines(lock)
    try:
        target.mkdir(parents=True)
        (target / BEGUN_NAME).touch()
        temporary = target / "tmp"
        temporary.mkdir()
        with log.open("w", encoding="utf-8") as output:
            on_step("making the environment", 0, len(requirements))
            _run([sys.executable, "-m", "venv", str(target)], output, temporary)
            pip = [str(target / "bin" / "python"), "-m", "pip", "install", "--no-deps", "--only-binary=:all:"]
            pip += ["--no-input", "--progress-bar=off", "--disable-pip-version-check", "--require-hashes"]
            if spec.torch is not None:
                on_step(f"fetching {spec.torch}", 0, len(requirements))
                torch = temporary / "torch.lock"
                torch.write_text("\n".join(r for r in requirements if r.startswith(spec.torch)), "utf-8")
                _install_torch([*pip, "-r", str(torch)], output, temporary)
            done = 0
            for line in _lines([*pip, "-r", str(lock)], output, temporary):
                if fetched := _FETCHED.match(line):
                    done += 1
                    on_step(f"fetching {fetched[1]}", done, len(requirements))
                elif line.startswith("Installing collected packages"):
                    on_step("installing", len(requirements), len(requirements))
        shutil.rmtree(temporary)
        nbytes = sum(file.lstat().st_size for file in target.rglob("*") if not file.is_dir())
        write_marker(spec, target, nbytes)
        (target / BEGUN_NAME).unlink()
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _install_torch(pip: list[str], output: IO[str], temporary: Path) -> None:
    """From where pip is told to look, if it is there; else from PyTorch's index."""
    try:
        _run(pip, output, temporary)
    except EngineError:
        _run([*pip, f"--index-url={TORCH_INDEX}"], output, temporary)


def _run(argv: list[str], output: IO[str], temporary: Path) -> None:
    for _ in _lines(argv, output, temporary):
        pass


def _lines(argv: list[str], output: IO[str], temporary: Path) -> Iterator[str]:
    """Run a command, yield its lines and keep them in the log; its group ends with this iterator.

    Raises:
        EngineError: it did not succeed.
    """
    # pip unpacks into TMPDIR, which is often on a smaller disk than the one whose room was checked.
    env = os.environ | {"PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary)}
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        env.pop(name, None)
    last: list[str] = []
    wrong_hash = False
    process = subprocess.Popen(
        argv,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            output.write(line)
            if line.strip():
                last = [*last, line.rstrip()][-_LAST_LINES:]
            wrong_hash = wrong_hash or "DO NOT MATCH THE HASHES" in line
            yield line
        code = process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    if code:
        error = _failure("pip" if "pip" in argv else "venv", code, output.name, wrong_hash)
        for line in last:
            error.add_note(line)
        raise error


def _failure(tool: str, code: int, log: str, wrong_hash: bool) -> EngineError:
    what = f"{tool} ended with exit code {code}"
    remedy = "check the network, or name a mirror in PIP_INDEX_URL or wheels in PIP_FIND_LINKS"
    if tool == "venv":
        remedy = "install the part of Python that makes environments (python3.11-venv on Debian and Ubuntu)"
    elif wrong_hash:
        what = "pip got a package whose sha256 is not the one that msquant knows; nothing of it was installed"
        remedy = "find out who changed the file: the mirror in PIP_INDEX_URL, or the wheels in PIP_FIND_LINKS"
    return EngineError(what, where=log, remedy=remedy)


def _require_ours(target: Path) -> None:
    """Refuse to touch a folder that was not begun by msquant, unless it is empty or not there."""
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not any((target / name).is_file() for name in (MARKER_NAME, BEGUN_NAME)):
        raise EngineError(
            "is not an environment that msquant made",
            where=target,
            remedy="name an empty or a new folder with --path, or move this one away",
        )


def _require_room(spec: EngineSpec, target: Path) -> None:
    free = free_bytes(target)
    if free is not None and free < spec.disk_bytes:
        raise EngineError(
            f"{free / 1e9:.1f} GB are free on its disk, {spec.name} needs {spec.disk_bytes / 1e9:.1f} GB",
            where=target,
            remedy="free some space, or choose another disk with --path",
        )


def _point(link: Path, target: Path) -> None:
    """Make an engine's usual place lead to another folder."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.symlink_to(target, target_is_directory=True)
    os.replace(temporary, link)


@contextmanager
def _locked(spec: EngineSpec) -> Iterator[None]:
    """Keep a second installation or removal of the same engine out."""
    path = engines_folder() / f"{spec.name}.lock"
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = acquire_lock(path)
        except LockHeld as held:
            raise EngineError(
                f"is being installed or removed by {held.who}",
                where=spec.name,
                remedy="wait until it is done",
            ) from held
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an OSError into an EngineError."""
    try:
        yield
    except OSError as error:
        raise EngineError(
            f"cannot be written: {error.strerror or error}",
            where=error.filename or path,
            remedy="choose a writable folder with --path or MSQUANT_CACHE, with enough room",
        ) from error
