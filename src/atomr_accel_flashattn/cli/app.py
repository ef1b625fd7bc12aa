"""The commands put together, and errors made readable."""

from __future__ import annotations

import os
import sys
import warnings
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from ..errors import CacheWarning, CompileError, FlashAttnError, SettingsWarning
from . import bench, cache, compile_ahead, demo, info, matrix, tune
from .output import errors

__all__ = ["app", "main"]


class Commands(TyperGroup):
    """The root group: errors raised on purpose, and files that cannot be read or written, end a command with one line and status 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            warnings.simplefilter("always", CacheWarning)
            warnings.simplefilter("always", SettingsWarning)
            try:
                return super().invoke(ctx)
            except BrokenPipeError:  # whoever read our output has gone: click ends quietly
                raise
            except (FlashAttnError, OSError) as error:
                _show_error(error)
                raise typer.Exit(1) from error


def _show_error(error: Exception) -> None:
    """``error: NameOfError: first line``; a compile error keeps the rest, which is the compiler's log."""
    first, *rest = str(error).splitlines() or [""]
    errors().print(Text.assemble(("error: ", "bold red"), (type(error).__name__, "bold"), f": {first}"), soft_wrap=True)
    if isinstance(error, CompileError):
        errors().print("\n".join(rest), soft_wrap=True)


def _show_warning(message: Warning | str, category: type[Warning], *_where: object, **_more: object) -> None:
    errors().print(Text.assemble(("warning: ", "yellow"), f"{category.__name__}: {message}"), soft_wrap=True)


app = typer.Typer(
    name="atomr-flashattn",
    help="FlashAttention for NVIDIA GPUs: kernels compiled on first use, and a CPU backend with the same semantics.",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help and usage errors: panels break long words, and paths are no markup
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"atomr-flashattn {version('atomr-accel-flashattn')}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the whole."""


app.command("demo")(demo.demo)
app.command("info")(info.info)
app.command("matrix")(matrix.matrix)
app.command("compile")(compile_ahead.compile_ahead)
app.add_typer(cache.app, name="cache")
app.command("bench")(bench.bench)
app.command("tune")(tune.tune)


def main() -> None:
    """Entry point of ``atomr-flashattn``. What standard output does not take, a full disk, is one line and status 1."""
    status: int | str | None = 0
    try:
        app(prog_name="atomr-flashattn")
    except SystemExit as end:
        status = end.code
    except OSError as error:  # raised outside of the commands, as by --version
        _show_error(error)
        status = 1
    try:
        sys.stdout.flush()
    except OSError as error:
        if not status:
            _show_error(error)
            status = 1
        # The interpreter flushes once more at its end; what is still in the buffer then goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
