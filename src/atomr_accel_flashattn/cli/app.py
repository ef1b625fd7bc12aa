"""The commands put together, and errors made readable."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import CacheWarning, CompileError, FlashAttnError
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
    errors().print(f"[bold red]error:[/] [bold]{type(error).__name__}[/]: ", end="")
    errors().print(first, markup=False, highlight=False, soft_wrap=True)
    if isinstance(error, CompileError):
        errors().print("\n".join(rest), markup=False, highlight=False, soft_wrap=True)


def _show_warning(message: Warning | str, category: type[Warning], *_where: object, **_more: object) -> None:
    errors().print(f"[yellow]warning:[/] {category.__name__}: ", end="")
    errors().print(str(message), markup=False, highlight=False, soft_wrap=True)


app = typer.Typer(
    name="atomr-flashattn",
    help="FlashAttention for NVIDIA GPUs: kernels compiled on first use, and a CPU backend with the same semantics.",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"atomr-flashattn {version('atomr-accel-flashattn')}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
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
    """Entry point of ``atomr-flashattn``."""
    app()
