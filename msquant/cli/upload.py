"""`msquant upload`."""

from pathlib import Path
from typing import Annotated

import typer

from msquant.cli import console
from msquant.cli.download import Repository, TokenFile


def upload(
    folder: Annotated[
        Path, typer.Argument(help="A folder that msquant inspect accepts.", show_default=False)
    ],
    repository: Repository,
    hub: Annotated[str, typer.Option(help="modelers or huggingface.")] = "modelers",
    create: Annotated[bool, typer.Option("--create", help="Make the repository if it is not there.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make it private, with --create.")] = False,
    license_name: Annotated[
        str, typer.Option("--license", help="Of the base model, for the model card: mit, apache-2.0, ...")
    ] = "other",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be uploaded, and the model card.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    token_file: TokenFile = None,
) -> None:
    """Upload a quantized model, with a model card made from its msquant.json.

    Everything becomes visible at once, at the end. An interrupted upload continues with the same command.
    A README.md in the folder is taken as the card. Tokens: HF_TOKEN, MODELERS_TOKEN, what `hf auth login`
    stored, or --token-file.

    Example: msquant upload DeepSeek-R1-W8A8 my-org/DeepSeek-R1-W8A8 --create --private --license mit
    """
    from msquant.flows.publishing import CARD_NAME, prepare, publish
    from msquant.hub.transfer_events import HubProgress

    if dry_run:
        found = prepare(folder, repository, license_name)
        sizes = {
            name: len(source) if isinstance(source, bytes) else source.stat().st_size
            for name, source in found.files.items()
        }
        if as_json:
            document = {"files": sizes, "bytes": sum(sizes.values()), "left_out": list(found.left_out)}
            console.print_json(document)
            return
        rows = [[name, console.as_bytes(size)] for name, size in sizes.items()]
        total = f"{len(sizes)} files, {console.as_bytes(sum(sizes.values()))}"
        console.print_table(f"{repository} on {hub}", ["file", "size"], rows, caption=total)
        if found.left_out:
            console.print_line(f"Left out, as it is no part of the result: {', '.join(found.left_out)}")
        if isinstance(card := found.files.get(CARD_NAME), bytes):
            console.print_document(f"\n{CARD_NAME}:\n\n{card.decode()}")
        return
    from msquant.cli.transfer_progress import TransferProgress

    with TransferProgress() as display:
        result = publish(
            folder,
            repository,
            hub,
            create=create,
            private=private,
            license_name=license_name,
            token_file=token_file,
            progress=HubProgress(stage=display.stage, update=display.update),
        )
    if as_json:
        console.print_json(
            {
                "hub": result.hub,
                "endpoint": result.endpoint,
                "repository": result.repository,
                "commit": result.commit,
                "files": result.files,
                "bytes": result.nbytes,
                "sent": result.sent,
                "seconds": round(result.seconds, 3),
            }
        )
        return
    console.print_line(
        f"{result.files} files, {console.as_bytes(result.nbytes)}, are in {repository} at commit "
        f"{result.commit[:10]}; {len(result.sent)} of them were sent"
    )
    console.print_next(f"msquant download {repository} --hub {hub}")
