"""``demo``: the main job on real input, with and without a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..demo import Backend, Case, CaseResult, choose_backend, draw, kernels_of, load_cases, run_case
from ..errors import CompileError
from ..jit.compile import CompiledKernel, compile_many
from .compile_ahead import GPU_ARCHS, outcome_row
from .matrix import collapsed, render_matrix, support_matrix
from .output import Json, console, is_narrow, make_table, print_json, print_rows, progress_bar, size_text, step, time_text

__all__ = ["PICTURE", "demo"]

PICTURE = "attention.png"


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("demo-output"),
    device: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    tokens: Annotated[int, typer.Option(min=64, help="Length of the long context.")] = 4096,
    compile_kernels: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the kernels for every supported arch.")] = True,
    as_json: Json = False,
) -> None:
    """Compute attention of a real layer, compare, and draw it.

    Then that of a long context, and the kernels of both for every arch. Status 1 when an answer is wrong.
    """
    if device not in {"auto", "cpu", "gpu"}:
        raise typer.BadParameter(f"got {device!r}; allowed are auto, cpu and gpu", param_hint="--device")
    draws = find_spec("matplotlib") is not None
    if draws:
        _make_folder(out)
    screen = Console(quiet=True) if as_json else console()
    with step("looking for a GPU", hidden=as_json):
        backend = choose_backend(device)
    _greet(screen, backend)

    with step("computing in float64 what is expected", hidden=as_json):
        cases = load_cases(tokens)
    results = []
    for case in cases:
        with step(f"running {case.title}", hidden=as_json):
            results.append(run_case(case, backend))
    _show_results(screen, cases, results)

    compiled = _compile(cases, hidden=as_json) if compile_kernels else []
    if compiled:
        _show_kernels(screen, compiled)
    table = support_matrix()
    screen.print(render_matrix(collapsed(table), narrow=is_narrow(screen), reasons=False))
    screen.print("atomr-flashattn matrix has a row for each feature, and the reasons of refusals\n")

    picture = None
    if draws:
        with step("drawing", hidden=as_json):
            picture = _draw(out, cases, results, backend)
    screen.print(f"picture: {picture or 'none, matplotlib is not installed (the extra [demo] brings it)'}", soft_wrap=True)
    if as_json:
        print_json(
            {
                "backend": asdict(backend),
                "cases": [_without_lse(result) for result in results],
                "kernels": [outcome_row(result) for result in compiled],
                "matrix": table,
                "picture": picture,
            }
        )
    failed = [result for result in compiled if isinstance(result, CompileError)]
    if failed:
        raise failed[0]
    if not all(result.passed for result in results):
        raise typer.Exit(1)


def _greet(screen: Console, backend: Backend) -> None:
    where = [(backend.name, "bold")]
    if backend.device.kind == "cpu":
        where = [("the CPU backend", "bold"), (f" ({backend.why}): the same semantics, kernels are compiled and not run", "")]
    screen.print(Text.assemble("Running on ", *where, "\n"))


def _show_results(screen: Console, cases: Sequence[Case], results: Sequence[CaseResult]) -> None:
    title = f"Attention on {results[0].backend}, compared with what is known"
    if is_narrow(screen):
        screen.print(title, style="bold")
        for case, result in zip(cases, results, strict=True):
            screen.print(
                Text.assemble(
                    f"{case.title}: {case.shape}\n",
                    f"  kernel  {result.kernel}\n",
                    f"  error   {result.error:.2e}, allowed {result.allowed:.2e} ({case.origin}): ",
                    _verdict(result),
                    f"\n  time    {time_text(result.seconds)}, first call {time_text(result.first_seconds)}\n",
                ),
                soft_wrap=True,
            )
        return
    numeric = ("error", "allowed", "first call", "time")
    table = make_table(title, ("case", "kernel", "compared with", *numeric, ""), numeric=numeric)
    for case, result in zip(cases, results, strict=True):
        table.add_row(
            Text.assemble(f"{case.title}\n", (case.shape, "dim")),
            result.kernel,
            case.origin,
            f"{result.error:.2e}",
            f"{result.allowed:.2e}",
            time_text(result.first_seconds),
            time_text(result.seconds),
            _verdict(result),
        )
    screen.print(table)


def _verdict(result: CaseResult) -> Text:
    return Text("ok", "green") if result.passed else Text("WRONG", "bold red")


def _compile(cases: Sequence[Case], *, hidden: bool) -> list[CompiledKernel | CompileError]:
    specs = kernels_of(cases, GPU_ARCHS)
    what = f"compiling {len(specs)} kernels, for every arch"
    with progress_bar(what, hidden=hidden) as bar:
        task = bar.add_task(what, total=len(specs))
        return compile_many(specs, progress=lambda _spec, _result: bar.advance(task))


def _show_kernels(screen: Console, results: Sequence[CompiledKernel | CompileError]) -> None:
    rows = [_kernel_row(row) for row in map(outcome_row, results)]
    numeric = ("registers", "shared", "spills", "time")
    print_rows(
        screen,
        "Their kernels, for every supported arch",
        ("kernel", "arch", *numeric, "cache"),
        rows,
        numeric=numeric,
        spare=("arch", "shared", "cache", "spills", "registers", "time"),
    )


def _kernel_row(row: Mapping[str, Any]) -> tuple[str | Text, ...]:
    if "error" in row:
        return (Text(f"{row['kernel']}: failed", "bold red"), "", "", "", "", "", "")
    return (
        row["kernel"],
        row["arch"],
        str(row["registers"]),
        size_text(row["shared_bytes"]),
        f"{row['spill_bytes']} B" if row["spill_bytes"] else "none",
        time_text(row["seconds"]),
        "hit" if row["cache_hit"] else "miss",
    )


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(
            f"{out} cannot be made ({error.strerror}); name a folder that you may write to", param_hint="--out"
        ) from error


def _draw(out: Path, cases: Sequence[Case], results: Sequence[CaseResult], backend: Backend) -> Path:
    (real, long), (real_result, long_result) = cases, results
    caption = (
        f"Probabilities exp(scale q.k - lse) with the LSE that was returned by {real_result.kernel} on {backend.name}; "
        f"largest error {real_result.error:.1e} against the model's own output"
    )
    return draw(out / PICTURE, real, real_result.lse, long, long_result.lse, caption=caption)


def _without_lse(result: CaseResult) -> dict[str, object]:
    """The result as plain values."""
    return {name: value for name, value in asdict(result).items() if name != "lse"} | {"passed": result.passed}
