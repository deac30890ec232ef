"""`msquant list` and `msquant remove`: what msquant keeps on this machine."""

import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msquant.cli import console, options
from msquant.errors import RecipeError

if TYPE_CHECKING:
    from msquant.flows.storage import StoredItem


def list_stored(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List models, datasets, results and engines here, with sizes.

    Those in msquant's cache, what `msquant download` put elsewhere, and what `msquant quantize` and
    `msquant export` wrote, wherever that is.

    Example: msquant list
    """
    from msquant.flows.storage import stored_items

    items = stored_items()
    if as_json:
        console.print_json([_document(item) for item in items])
        return
    if not items:
        console.print_line("There is nothing yet.")
        console.print_next("msquant quantize smollm2-135m --algo osl")
        return
    rows = [
        [
            item.name,
            item.kind,
            item.scheme or "",
            console.as_bytes(item.nbytes),
            f"{datetime.fromtimestamp(item.changed):%Y-%m-%d %H:%M}",
            str(item.folder),
        ]
        for item in items
    ]
    console.print_table(
        "On this machine",
        ["name", "kind", "scheme", "size", "when", "folder"],
        rows,
        spare=("folder", "when", "scheme", "kind"),
        caption=f"{console.as_bytes(sum(item.nbytes for item in items))} in all",
    )


def remove(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Names or folders that msquant list shows.",
            show_default=False,
            autocompletion=options.complete_stored,
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document; needs --yes.")] = False,
) -> None:
    """Remove models, datasets, results or engines, after asking.

    Nothing is removed that msquant has not made: a folder with a file of anybody else stays, and no symlink
    is followed.

    Example: msquant remove smollm2-135m-osl

    Example: msquant remove deepseek-ai/DeepSeek-R1 --yes
    """
    from msquant.flows.storage import find_items, remove_item

    items = find_items(names)
    if not yes:
        _ask(items, as_json)
    removed: list[dict[str, Any]] = []
    for item in items:
        freed = remove_item(item)
        removed.append({"name": item.name, "folder": str(item.folder), "bytes": freed})
        if not as_json:
            console.print_line(f"Removed {item.folder}: {console.as_bytes(freed)} are free again.")
    if as_json:
        console.print_json({"removed": removed, "bytes": sum(entry["bytes"] for entry in removed)})


def _ask(items: "list[StoredItem]", as_json: bool) -> None:
    if as_json or not sys.stdin.isatty():
        raise RecipeError(
            "nobody is there to be asked", where="remove", remedy="add --yes to remove without asking"
        )
    for item in items:
        console.print_note(f"{item.kind} {item.folder}, {console.as_bytes(item.nbytes)}")
    if not console.confirm("Remove all of that?" if items[1:] else "Remove it?"):
        raise typer.Abort


def _document(item: "StoredItem") -> dict[str, Any]:
    return {
        "name": item.name,
        "kind": item.kind,
        "scheme": item.scheme,
        "bytes": item.nbytes,
        "changed": datetime.fromtimestamp(item.changed).astimezone().isoformat(timespec="seconds"),
        "folder": str(item.folder),
    }
