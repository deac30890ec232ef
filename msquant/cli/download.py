"""`msquant download`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msquant.cli import console

if TYPE_CHECKING:
    from msquant.hub.folder_download import DownloadResult
    from msquant.hub.listing import RemoteFile, Snapshot

Repository = Annotated[
    str, typer.Argument(metavar="REPO", help="organisation/name on a hub.", show_default=False)
]
TokenFile = Annotated[
    Path | None, typer.Option(help="File that holds the token of the hub, which --hub names then.")
]


def download(
    repository: Repository,
    hub: Annotated[
        str,
        typer.Option(help="modelers, huggingface or auto: where the organisation lives, then the other."),
    ] = "auto",
    dataset: Annotated[bool, typer.Option("--dataset", help="REPO holds a dataset, not a model.")] = False,
    revision: Annotated[str, typer.Option(help="A branch, a tag or a commit.")] = "main",
    include: Annotated[
        list[str] | None, typer.Option(help="Only files like this, '*.json'; repeat it for more.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="No files like this, '*.bin'; repeat it for more.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to download into.  [default: the repository's name, here]")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Connections at once.")] = 8,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash also what is here already, and mend what has changed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and their total only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    token_file: TokenFile = None,
) -> None:
    """Download a model, or a dataset, from Modelers or the Hugging Face Hub, and verify every file.

    An interrupted download continues with the same command. A finished folder is recognised at once.
    Mirrors: HF_ENDPOINT, OPENMIND_HUB_ENDPOINT. Proxies: HTTPS_PROXY. Tokens: HF_TOKEN, MODELERS_TOKEN, what
    `hf auth login` stored, or --token-file.

    Example: msquant download MindSpore-Lab/DeepSeek-R1-W8A8

    Example: msquant download openai/gsm8k --dataset --output /data/gsm8k

    Example: msquant download Qwen/Qwen3-8B --include '*.safetensors' --include '*.json' --output /data/Qwen3
    """
    from msquant import api
    from msquant.cli.transfer_progress import TransferProgress
    from msquant.hub.choose import select_snapshot
    from msquant.hub.transfer_events import HubProgress

    with TransferProgress() as display:
        if dry_run:
            snapshot, files = select_snapshot(
                repository,
                revision,
                hub,
                include or (),
                exclude or (),
                token_file=token_file,
                kind="dataset" if dataset else "model",
                note=display.stage,
            )
        else:
            result = api.download(
                repository,
                output,
                hub=hub,
                dataset=dataset,
                revision=revision,
                include=include or (),
                exclude=exclude or (),
                workers=workers,
                verify=verify,
                token_file=token_file,
                progress=HubProgress(stage=display.stage, update=display.update),
            )
    if dry_run:
        _print_listing(snapshot, files, as_json)
    elif as_json:
        console.print_json(_as_json(result))
    else:
        _print_result(result, dataset)


def _print_listing(snapshot: "Snapshot", files: "list[RemoteFile]", as_json: bool) -> None:
    total = sum(file.size for file in files)
    if as_json:
        console.print_json(
            {
                "hub": snapshot.hub.name,
                "repository": snapshot.repository,
                "revision": snapshot.revision,
                "commit": snapshot.commit,
                "bytes": total,
                "files": [
                    {"path": file.path, "size": file.size, file.algorithm: file.digest} for file in files
                ],
            }
        )
        return
    console.print_table(
        f"{snapshot.repository} on {snapshot.hub.title}, commit {snapshot.commit}",
        ["file", "size", "hash"],
        [[file.path, console.as_bytes(file.size), f"{file.algorithm} {file.digest[:12]}"] for file in files],
        caption=f"{len(files)} files, {console.as_bytes(total)}",
    )


def _as_json(result: "DownloadResult") -> dict[str, Any]:
    return {
        "folder": str(result.folder),
        "hub": result.hub,
        "endpoint": result.endpoint,
        "repository": result.repository,
        "revision": result.revision,
        "commit": result.commit,
        "files": result.files,
        "bytes": result.nbytes,
        "fetched": result.fetched,
        "received_bytes": result.received_bytes,
        "seconds": round(result.seconds, 3),
    }


def _print_result(result: "DownloadResult", dataset: bool) -> None:
    size = console.as_bytes(result.nbytes)
    if result.fetched:
        speed = console.as_bytes(int(result.received_bytes / max(result.seconds, 1e-3)))
        received = console.as_bytes(result.received_bytes)
        console.print_line(
            f"{result.files} files, {size}, verified in {result.folder}; fetched {len(result.fetched)}, "
            f"{received} in {console.as_duration(result.seconds)} ({speed}/s)"
        )
    else:
        console.print_line(
            f"{result.files} files, {size}, are in {result.folder} as they should be; nothing was fetched"
        )
    folder = shlex.quote(str(result.folder))
    show = f"msquant calibration show MODEL --calibration {folder}"
    console.print_next(show if dataset else f"msquant inspect {folder}")
