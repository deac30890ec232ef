"""The list of commands in `msquant --help`: in groups, each command with a summary that fits its line."""

from typing import Any

from typer.core import TyperGroup


class CommandGroup(TyperGroup):
    """Lists commands under the heading that each is registered with, as `rich_help_panel`, in their order."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the headings and the commands below each. Called by typer."""
        groups: dict[str, list[tuple[str, str]]] = {}
        widest = max(map(len, self.commands), default=0)
        for name, command in self.commands.items():
            heading = getattr(command, "rich_help_panel", None) or "Commands"
            # Click indents a list by two columns and puts two between name and summary, and leaves two.
            summary = command.get_short_help_str(formatter.width - widest - 6)
            groups.setdefault(heading, []).append((name.ljust(widest), summary))
        for heading, rows in groups.items():
            with formatter.section(heading):
                formatter.write_dl(rows)
