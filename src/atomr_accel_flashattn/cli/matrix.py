"""``matrix``: what is supported on which architecture, asked of ``DISPATCH_TABLE`` and of the record of a GPU test run."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from ..dispatch import DISPATCH_TABLE, FEATURES, Cell, arch_of_capability
from ..errors import CacheError, FeatureNotBuiltError
from ..kernels.spec import Family, KernelSpec
from ..types import DType, SmArch
from .gpu_record import MATRIX_HEAD_DIM, wgmma_or_mma
from .output import Json, console, is_narrow, make_table, print_json

__all__ = ["END_MARK", "START_MARK", "Matrix", "collapsed", "markdown", "matrix", "render_matrix", "rendered_readme", "support_matrix"]

START_MARK = "<!-- matrix: start -->"
END_MARK = "<!-- matrix: end -->"

_LABELS = {
    "full": "full",
    "causal": "causal",
    "sliding_causal": "sliding causal",
    "sliding_full": "sliding full (`window_size`)",
    "sink_tokens": "sink tokens",
    "varlen": "varlen (`cu_seqlens`)",
    "gqa": "MQA / GQA at any ratio",
    "alibi": "ALiBi",
    "softcap": "softcap",
    "learned_sink": "learned sink",
    "dropout": "dropout",
    "dropout_mask": "dropout pattern out",
    "unaligned": "any alignment",
    "scale_first": "zero or negative scale",
    "short_q": "short sequences of q (own tile)",
    "backward": "backward",
    "deterministic": "deterministic backward",
    "head_split": "backward split over query heads",
    "paged": "paged KV cache",
    "kv_layout": "HND pages",
    "kv_cache": "contiguous KV cache",
    "paged_fa3": "paged KV cache for many queries (wgmma)",
    "left_pad": "left padding",
    "split": "split KV",
    "plain_split": "split KV of plain K and V (few queries)",
    "scheduled": "step plans",
    "batch_invariant": "batch invariance",
    "fp8_kv": "fp8 K and V with 16-bit q",
    "fp8_block_descales": "fp8 descales by block of 128 tokens",
    "fp8_cache": "fp8 pages with descales by slot",
    "merge_states": "`merge_states`",
    "fa3": "wgmma family (FA3)",
}
_DTYPE_LABELS = {
    DType.F16: "f16",
    DType.BF16: "bf16",
    DType.F32: "f32",
    DType.F64: "f64",
    DType.F8E4M3: "fp8 e4m3",
    DType.F8E5M2: "fp8 e5m2",
}
_SHORT_NAME = re.compile(r"^NVIDIA (GeForce |Tesla )?| (\d+ ?GB|PCIe|SXM\d?|HBM\d\w?|NVL).*$")


@dataclass(frozen=True, slots=True)
class Entry:
    """One cell. ``state``: ``runs`` (CPU), ``ran``, ``compiles`` or ``refused``; ``text``: the words for it; ``reason``: of a refusal."""

    state: str
    text: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of features, columns of architectures. ``commit``: of the code that ran on a card, empty where none did."""

    archs: tuple[str, ...]
    rows: dict[str, tuple[Entry, ...]]
    commit: str = ""

    @property
    def reasons(self) -> list[str]:
        """Every refusal once, in the order of the rows; the first sentence says which feature."""
        return list(dict.fromkeys(entry.reason for entries in self.rows.values() for entry in entries if entry.reason))


def matrix(
    record: Annotated[
        Path | None, typer.Option(exists=True, help="A record of a GPU test run (benchmarks/results/gpu_tests.json), or a folder of some.")
    ] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of the README, where rows of equal cells are one.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Replace the table between the markers of this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which feature runs on which architecture, or why not."""
    table = support_matrix(record)
    if write is not None:
        write.write_text(rendered_readme(write.read_text(encoding="utf-8"), table), encoding="utf-8")
    if as_json:
        print_json(table)
    elif as_markdown:
        typer.echo(markdown(table))
    else:
        screen = console()
        screen.print(render_matrix(table, narrow=is_narrow(screen)))


def support_matrix(record: Path | None = None) -> Matrix:
    """The matrix of this version; cells that a GPU test run has passed say on which card.

    Args:
        record: a record of kind ``gpu_tests``, or a folder whose ``gpu_tests*.json`` count together; None claims no run.

    Raises:
        CacheError: a record cannot be read or is none, they are of several cards, or the folder has none.
    """
    runs = Runs.read(record)
    rows = {_DTYPE_LABELS[dtype]: _row(runs, dtype.value, dtype) for dtype in DType}
    rows |= {_LABELS.get(name, name): _row(runs, name, DType.F16, [name]) for name in FEATURES}
    return Matrix(tuple(arch.value for arch in SmArch), rows, runs.commit)


@dataclass(frozen=True, slots=True)
class Runs:
    """What a card has been seen to do: its short name and architecture, the tests that passed by family and feature, the code's commit."""

    card: str = ""
    arch: SmArch | None = None
    passed: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    commit: str = ""

    @classmethod
    def read(cls, path: Path | None) -> Runs:
        """Read a record, or those of a folder. A run with a failed test counts for nothing.

        Raises:
            CacheError: one cannot be read or is no record of GPU tests, they are of several cards, or the folder has none.
        """
        files = [] if path is None else sorted(path.glob("gpu_tests*.json")) if path.is_dir() else [path]
        if path is not None and not files:
            raise CacheError(f"{path}: got a folder without a gpu_tests*.json; allowed is one with records; make one with make gpu-test")
        runs = [run for run in map(cls._of, files) if run.card]
        if len({(run.card, run.arch) for run in runs}) > 1:
            raise CacheError(f"{path}: got records of {', '.join(dict.fromkeys(run.card for run in runs))}; allowed is one card")
        if not runs:
            return cls()
        passed = {group: sum((Counter(run.passed.get(group, {})) for run in runs), Counter()) for run in runs for group in run.passed}
        return cls(runs[0].card, runs[0].arch, passed, " and ".join(dict.fromkeys(run.commit for run in runs if run.commit)))

    @classmethod
    def _of(cls, file: Path) -> Runs:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            failed = found["outcomes"].get("failed", 0)
            major, minor = map(int, found["device"]["compute_capability"].split("."))
            passed = {str(group): dict(counts) for group, counts in found["passed"].items()}
            card, commit = _SHORT_NAME.sub("", found["device"]["name"]), str(found["commit"] or "")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(f"{file}: no record of a GPU test run ({error!r}); make one with make gpu-test") from error
        return cls() if failed else cls(card, arch_of_capability(major, minor), passed, commit)

    def did(self, arch: SmArch, family: Family, feature: str) -> bool:
        """Whether a test of ``family`` that names ``feature`` passed on this architecture.

        Hopper, whose calls compile for sm_90a, runs the kernels of sm_90 too.
        """
        on_this_card = self.arch in ({arch, SmArch.SM_90A} if arch is SmArch.SM_90 else {arch})
        return on_this_card and self.passed.get(wgmma_or_mma(wgmma=family is Family.FA3), {}).get(feature, 0) > 0


def _row(runs: Runs, mark: str, dtype: DType, features: Sequence[str] = ()) -> tuple[Entry, ...]:
    return tuple(_entry(DISPATCH_TABLE.cell(arch, dtype, MATRIX_HEAD_DIM, features), runs, mark) for arch in SmArch)


def _entry(cell: Cell, runs: Runs, feature: str) -> Entry:
    if cell.refusal is not None:
        named = f"{cell.refusal.feature}: {cell.refusal.reason}" if isinstance(cell.refusal, FeatureNotBuiltError) else str(cell.refusal)
        return Entry("refused", "refused", named.replace(f"on {cell.key.arch.value}", "on this GPU"))  # the column names the arch
    if not isinstance(cell.spec, KernelSpec):
        return Entry("runs", "runs")
    ran = runs.did(cell.key.arch, cell.spec.family, feature)
    return Entry("ran", f"ran on {runs.card}") if ran else Entry("compiles", "compiles")


def collapsed(table: Matrix) -> Matrix:
    """The table with rows of equal cells as one, their names joined; cells that are refused are equal whatever the reason."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, entries in table.rows.items():
        rows.setdefault(tuple(entry.text for entry in entries), []).append(name)
    return Matrix(table.archs, {", ".join(names): table.rows[names[0]] for names in rows.values()}, table.commit)


def render_matrix(table: Matrix, *, narrow: bool = False, reasons: bool = True) -> RenderableType:
    """For a terminal: the table, and below it the reasons of refusals, numbered.

    Args:
        table: all rows, or those of :func:`collapsed`, which needs ``reasons=False``.
        narrow: marks of one or two letters, and architectures without ``sm_``; fits 80 columns.
        reasons: number the refusals and list why.
    """
    archs = [arch.removeprefix("sm_") for arch in table.archs] if narrow else table.archs
    screen = make_table("What is supported", ("", *archs), padding=0 if narrow else (0, 1))
    for column in screen.columns[1:]:
        column.no_wrap = True
    for name, entries in table.rows.items():
        screen.add_row(name.replace("`", ""), *(_mark(entry, table, narrow=narrow, numbered=reasons) for entry in entries))
    legend = [_legend(table)] if narrow else []
    notes = [f"{number}. {reason}" for number, reason in enumerate(table.reasons, 1)] if reasons else []
    head = ["- is a refusal; its reason:"] if reasons else []
    return Group(screen, *legend, *head, *notes, "")


def _mark(entry: Entry, table: Matrix, *, narrow: bool, numbered: bool) -> Text:
    colour = {"runs": "green", "ran": "green", "compiles": "cyan", "refused": "dim"}[entry.state]
    if entry.reason:
        number = str(table.reasons.index(entry.reason) + 1) if numbered else ""
        return Text(f"-{number}" if narrow else f"- {number}".rstrip(), colour)
    return Text({"runs": "+", "ran": "+", "compiles": "c"}[entry.state] if narrow else entry.text, colour)


def _legend(table: Matrix) -> str:
    entries = [entry for row in table.rows.values() for entry in row]
    ran = list(dict.fromkeys(entry.text for entry in entries if entry.state == "ran"))
    return f"+ runs{', or ' + ran[0] if ran else ''}; c compiles; - is refused. 80 to 120 are sm_80 to sm_120."


def markdown(table: Matrix) -> str:
    """For the README: a row for all features whose cells are equal, and the reasons of refusals as a list."""
    short = collapsed(table)
    lines = [f"| | {' | '.join(short.archs)} |", f"|---|{'---|' * len(short.archs)}"]
    lines += [f"| {name} | {' | '.join(entry.text for entry in entries)} |" for name, entries in short.rows.items()]
    ran = [f"What ran on a card is commit {table.commit}.", ""] if table.commit else []
    reasons = [f"- {reason}" for reason in table.reasons]
    return "\n".join([*lines, "", *ran, "What is refused, by name and with its reason:", "", *reasons])


def rendered_readme(text: str, table: Matrix) -> str:
    """``text`` with the table between its markers made anew.

    Raises:
        CacheError: the markers are not there.
    """
    before, start, rest = text.partition(START_MARK)
    _, end, after = rest.partition(END_MARK)
    if not (start and end):
        raise CacheError(f"no place for the table: allowed are files with a line {START_MARK} and a later line {END_MARK}")
    return f"{before}{start}\n{markdown(table)}\n{end}{after}"
