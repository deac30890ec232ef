"""Assembles the `msquant` command line and turns exceptions into messages and exit codes."""

import functools
import io
import sys
from collections.abc import Callable
from typing import Any

import typer

from msquant import __version__
from msquant.checkpoint.transformers_import import leave_torch_out
from msquant.cli import console
from msquant.cli.analyze import analyze
from msquant.cli.calibration import calibration
from msquant.cli.command_group import CommandGroup
from msquant.cli.compare import compare
from msquant.cli.doctor import doctor
from msquant.cli.download import download
from msquant.cli.engine import engine
from msquant.cli.evaluate import evaluate
from msquant.cli.export import export
from msquant.cli.inspect import inspect
from msquant.cli.plan import plan
from msquant.cli.quantize import quantize
from msquant.cli.recipes import recipes
from msquant.cli.report import report
from msquant.cli.run import run
from msquant.cli.serve import serve
from msquant.cli.stored import list_stored, remove
from msquant.cli.unexpected import explain
from msquant.cli.upload import upload
from msquant.errors import MsquantError

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_UNEXPECTED = 70
EXIT_INTERRUPTED = 130

DEBUG = "--debug"

app = typer.Typer(
    name="msquant",
    cls=CommandGroup,
    help="Quantize large language models to W8A8 for MindSpore and Ascend, and run them.",
    epilog="Example: msquant quantize smollm2-135m && msquant run --prompt 'I am'",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(value: bool) -> None:
    if value:
        console.print_line(f"msquant {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
    debug: bool = typer.Option(
        False, DEBUG, help="Show where an error came from, for developers; also after the command."
    ),
) -> None:
    """Options that belong to no command."""


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """Say what an interrupted command leaves behind; typer itself would end it without a word."""

    @functools.wraps(command)
    def run_command(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt as error:
            console.print_interrupted(error)
            raise typer.Exit(EXIT_INTERRUPTED) from error

    return run_command


_QUANTIZE, _RUN, _JUDGE, _KEEP = "Quantize", "Run and serve", "Judge", "Get, share and tidy up"

for _panel, _name, _command, _summary in (
    (_QUANTIZE, "quantize", quantize, "Quantize a model and write the checkpoint to serve."),
    (_QUANTIZE, "plan", plan, "Say what quantizing would make and take here."),
    (_QUANTIZE, "analyze", analyze, "Find the layers that cost most accuracy, and spare them."),
    (_QUANTIZE, "export", export, "Write a quantized folder in another format."),
    (_RUN, "run", run, "Continue prompts with a model, or chat with it."),
    (_RUN, "serve", serve, "Serve a model by OpenAI's HTTP interface."),
    (_RUN, "doctor", doctor, "Check this machine, or whether a model can be served."),
    (_JUDGE, "evaluate", evaluate, "Measure what quantization cost a model."),
    (_JUDGE, "compare", compare, "Compare quantized folders of one float model."),
    (_JUDGE, "report", report, "Write one page on a checkpoint: what it is, how good."),
    (_JUDGE, "inspect", inspect, "Check a checkpoint, and say which servers take it."),
    (_KEEP, "download", download, "Download a model or a dataset from a hub."),
    (_KEEP, "upload", upload, "Upload a quantized model, with a model card."),
    (_KEEP, "list", list_stored, "List models, datasets, results and engines here."),
    (_KEEP, "remove", remove, "Remove some of them."),
):
    app.command(_name, short_help=_summary, rich_help_panel=_panel)(_interruptible(_command))
for _panel, _group, _summary in (
    (_QUANTIZE, recipes, "List, show and copy recipes, and check your own."),
    (_QUANTIZE, calibration, "Look at the text that a model would be calibrated on."),
    (_RUN, engine, "Install, check and remove serving engines."),
):
    for _registered in _group.registered_commands:
        if _registered.callback is not None:
            _registered.callback = _interruptible(_registered.callback)
    app.add_typer(_group, short_help=_summary, rich_help_panel=_panel)


def own_process() -> None:
    """Entry point of the console script: `main` in a process where nobody else uses transformers."""
    leave_torch_out()
    # A terminal that cannot show a character shows its number.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    main()


def main() -> None:
    """Run the command line.

    Exits with 0, 1 for an error, 2 for wrong usage, 70 for an error that nobody expected, 130 for Ctrl-C.
    """
    arguments = sys.argv[1:]
    debug = DEBUG in arguments
    try:
        given = [argument for argument in arguments if argument != DEBUG]
        # By whatever name it was started: completion and the remedies of errors are for `msquant`.
        code = app(given, prog_name="msquant", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Abort:
        console.print_note("aborted")
        sys.exit(EXIT_ERROR)
    except Exception as error:
        if debug:
            console.print_traceback(error)
        shown, code = _explained(error, arguments)
        console.print_error(shown, as_json="--json" in arguments)
        sys.exit(code)


def _explained(error: Exception, arguments: list[str]) -> tuple[MsquantError, int]:
    """What a person gets to read of an error, and the exit code."""
    if isinstance(error, MsquantError):
        return error, EXIT_ERROR
    # typer raises what its own copy of click defines, or click itself, by its version.
    message = getattr(error, "format_message", None)
    if message is None:
        return explain(error, arguments), EXIT_UNEXPECTED
    if type(error).__name__ == "NoArgsIsHelpError":
        # Its message is the help of the command.
        error.show()  # type: ignore[attr-defined]
        sys.exit(EXIT_USAGE)
    context = getattr(error, "ctx", None)
    remedy = None if context is None else f"see: {context.command_path} --help"
    return MsquantError(message(), remedy=remedy), getattr(error, "exit_code", EXIT_USAGE)
