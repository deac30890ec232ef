"""Whether servers serve a quantized folder, and why not, by the rules of `serving_rules`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.formats.registry import folder_format
from msquant.formats.servers import SERVERS, Parallelism, ServedModel, Server, ServerName
from msquant.formats.serving_rules import RULES

SIZES = (1, 2, 4, 8, 16)
"""The sizes of tensor parallelism that a table has."""


@dataclass(frozen=True)
class Refusal:
    """Why a server does not serve a model.

    Attributes:
        rule: the name of the rule.
        where: the key of `config.json`, the layer, or the format.
        problem: what is wrong with it there.
        remedy: what to do.
    """

    rule: str
    where: str
    problem: str
    remedy: str


@dataclass(frozen=True)
class Verdict:
    """Whether a server serves a model.

    Attributes:
        server: which.
        tensor_parallel: the sizes of tensor parallelism that it is said for.
        refusals: the reasons against it; none where it does.
    """

    server: Server
    tensor_parallel: tuple[int, ...]
    refusals: tuple[Refusal, ...]

    @property
    def served(self) -> bool:
        """Whether it does."""
        return not self.refusals


def serving_table(model: ServedModel, sizes: Iterable[int] = SIZES) -> list[Verdict]:
    """A verdict of every server; the sizes of tensor parallelism with the same reasons are one.

    Args:
        model: what is to be served.
        sizes: of tensor parallelism.
    """
    rows: dict[tuple[Server, tuple[Refusal, ...]], list[int]] = {}
    for server in servers_of(model):
        for size in sizes:
            rows.setdefault((server, refusals(server, model, Parallelism(size))), []).append(size)
    return [Verdict(server, tuple(found), reasons) for (server, reasons), found in rows.items()]


def servers_of(model: ServedModel, name: ServerName | None = None) -> list[Server]:
    """The servers that something is known of for a model of this type; those of one name, if it is given."""
    return [
        server
        for server in SERVERS
        if (name is None or server.name == name)
        and (not server.model_types or model.model_type in server.model_types)
    ]


def refusals(server: Server, model: ServedModel, parallelism: Parallelism) -> tuple[Refusal, ...]:
    """Why a server does not serve a model so; empty if it does."""
    found: list[Refusal] = []
    for rule in RULES:
        mine = [Refusal(rule.name, *reason) for reason in rule.check(server, model, parallelism)]
        found += mine
        if mine and rule.decides:
            break
    return tuple(found)


def best_refusal(
    servers: Sequence[Server], model: ServedModel, parallelism: Parallelism
) -> tuple[Server, Refusal] | None:
    """Why none of several servers serves a model so; None if one of them does.

    Args:
        servers: at least one.
        model: what is to be served.
        parallelism: how.

    Returns:
        The first server that the model is made for at all, with its first reason.
    """
    found = [(server, refusals(server, model, parallelism)) for server in servers]
    if not all(reasons for _, reasons in found):
        return None
    server, reasons = next((one for one in found if one[1][0].rule != "backend"), found[0])
    return server, reasons[0]


def served_model(folder: Path) -> ServedModel | None:
    """What servers decide by, of a folder; None if it is not quantized. Headers alone are read.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    form = folder_format(folder)
    if form is None:
        return None
    checkpoint = Checkpoint.open(folder)
    modules = {name.rpartition(".")[0] for name in checkpoint.names()}
    linears = form.stored_schemes(checkpoint, sorted(modules))
    return ServedModel(form.name, form.variant, read_json(folder / "config.json"), linears)
