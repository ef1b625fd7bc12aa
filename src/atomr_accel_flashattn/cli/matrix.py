"""``matrix``: what is supported on which architecture, asked of ``DISPATCH_TABLE`` and of the record of a GPU test run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.markup import escape

from ..dispatch import DISPATCH_TABLE, FEATURES, Cell, arch_of_capability
from ..errors import CacheError, FeatureNotBuiltError
from ..types import DType, SmArch
from .output import Json, console, make_table, print_json

__all__ = ["END_MARK", "START_MARK", "Matrix", "markdown", "matrix", "render_matrix", "rendered_readme", "support_matrix"]

START_MARK = "<!-- matrix: start -->"
END_MARK = "<!-- matrix: end -->"

_LABELS = {
    "full": "full",
    "causal": "causal",
    "sliding_causal": "sliding causal",
    "sliding_full": "sliding full, `window_size`",
    "sink_tokens": "sink tokens",
    "varlen": "varlen (`cu_seqlens`)",
    "gqa": "MQA / GQA, any ratio",
    "alibi": "ALiBi",
    "softcap": "softcap",
    "learned_sink": "learned sink",
    "dropout": "dropout",
    "dropout_mask": "dropout pattern out",
    "unaligned": "any alignment",
    "scale_first": "zero or negative scale",
    "short_q": "short sequences of q, with their own tile",
    "backward": "backward",
    "paged": "paged KV cache",
    "split": "split KV",
    "left_pad": "left padding",
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
_HEAD_DIM = 128
_SHORT_NAME = re.compile(r"^NVIDIA (GeForce |Tesla )?| (\d+ ?GB|PCIe|SXM\d?|HBM\d\w?|NVL).*$")
# How the ids of the GPU tests name what they exercise, where that is not the feature's own name.
_TEST_MARKS = {
    "f16": r"(?<!b)f16",
    "full": r"-full\b",
    "causal": r"-causal\b",
    "sliding_causal": r"band\(\d+,0\)",
    "sliding_full": r"band\(\d+,[1-9]",
    "sink_tokens": r"\dsink",
    "gqa": r"h\d+kv\d",
    "dropout_mask": "dropout",
    "unaligned": "odd",
    "scale_first": r"scale(-|0(?!\.))",
    "short_q": rf"\bq\d{{1,3}}-.*d{_HEAD_DIM}\b",
}


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
    record: Annotated[Path | None, typer.Option(help="A record of a GPU test run (benchmarks/results/gpu_tests.json).")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README.")] = False,
    write: Annotated[Path | None, typer.Option(help="Replace the table between the markers of this file.")] = None,
    as_json: Json = False,
) -> None:
    """Show which feature runs, compiles or is refused on which architecture."""
    table = support_matrix(record)
    if write is not None:
        write.write_text(rendered_readme(write.read_text(encoding="utf-8"), table), encoding="utf-8")
    if as_json:
        print_json(table)
    elif as_markdown:
        typer.echo(markdown(table))
    else:
        console().print(render_matrix(table))


def support_matrix(record: Path | None = None) -> Matrix:
    """The matrix of this version; cells that a GPU test run has passed say on which card.

    Args:
        record: a record of kind ``gpu_tests``, or a folder of which the newest counts; None claims no run.

    Raises:
        CacheError: the record cannot be read or is none.
    """
    runs = Runs.read(record)
    rows = {_DTYPE_LABELS[dtype]: _row(runs, dtype.value, dtype) for dtype in DType}
    rows |= {_LABELS.get(name, name): _row(runs, name, DType.F16, [name]) for name in FEATURES}
    return Matrix(tuple(arch.value for arch in SmArch), rows, runs.commit)


@dataclass(frozen=True, slots=True)
class Runs:
    """What a card has been seen to do: its short name, its architecture, the ids of the tests that passed on it, and the code's commit."""

    card: str = ""
    arch: SmArch | None = None
    passed: tuple[str, ...] = ()
    commit: str = ""

    @classmethod
    def read(cls, path: Path | None) -> Runs:
        """Read a record, or the newest of a folder. A run with a failed test counts for nothing.

        Raises:
            CacheError: it cannot be read or is no record of GPU tests.
        """
        is_folder = path is not None and path.is_dir()
        newest = max(path.glob("gpu_tests*.json"), key=lambda file: file.name, default=None) if path is not None and is_folder else path
        if newest is None:
            return cls()
        try:
            found = json.loads(newest.read_text(encoding="utf-8"))
            failed = found["outcomes"].get("failed", 0)
            major, minor = map(int, found["device"]["compute_capability"].split("."))
            passed = tuple(cell["test"] for cell in found["cells"] if cell["outcome"] == "passed")
            card, commit = _SHORT_NAME.sub("", found["device"]["name"]), str(found["commit"] or "")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(f"{newest}: no record of a GPU test run ({error!r}); make one with make gpu-test") from error
        return cls() if failed else cls(card, arch_of_capability(major, minor), passed, commit)

    def did(self, arch: SmArch, feature: str) -> bool:
        """Whether a test that names ``feature`` passed on this architecture; tests of the wgmma family count for sm_90a, and only there.

        Hopper, whose calls compile for sm_90a, runs the kernels of sm_90 too.
        """
        mark, wgmma = _TEST_MARKS.get(feature, feature), arch is SmArch.SM_90A
        on_this_card = self.arch in ({arch, SmArch.SM_90A} if arch is SmArch.SM_90 else {arch})
        return on_this_card and any(re.search(mark, test) for test in self.passed if ("fa3" in test) == wgmma)


def _row(runs: Runs, mark: str, dtype: DType, features: Sequence[str] = ()) -> tuple[Entry, ...]:
    return tuple(_entry(DISPATCH_TABLE.cell(arch, dtype, _HEAD_DIM, features), runs, mark) for arch in SmArch)


def _entry(cell: Cell, runs: Runs, feature: str) -> Entry:
    if cell.refusal is not None:
        named = f"{cell.refusal.feature}: {cell.refusal.reason}" if isinstance(cell.refusal, FeatureNotBuiltError) else str(cell.refusal)
        return Entry("refused", "refused", named.replace(f"on {cell.key.arch.value}", "on this GPU"))  # the column names the arch
    if cell.key.arch is SmArch.CPU:
        return Entry("runs", "runs")
    return Entry("ran", f"ran on {runs.card}") if runs.did(cell.key.arch, feature) else Entry("compiles", "compiles")


def render_matrix(table: Matrix) -> RenderableType:
    """For a terminal: the table, and below it the reasons of refusals, numbered."""
    screen = make_table("What is supported", ("", *table.archs))
    for name, entries in table.rows.items():
        screen.add_row(name.replace("`", ""), *(_coloured(entry, table) for entry in entries))
    notes = "\n".join(f"[dim]{number}[/] {escape(reason)}" for number, reason in enumerate(table.reasons, 1))
    return Group(screen, f"[dim]- is a refusal; its reason:[/]\n{notes}\n")


def _coloured(entry: Entry, table: Matrix) -> str:
    colour = {"runs": "green", "ran": "green", "compiles": "cyan", "refused": "dim"}[entry.state]
    return f"[{colour}]{f'- {table.reasons.index(entry.reason) + 1}' if entry.reason else entry.text}[/]"


def _cell(entry: Entry, table: Matrix) -> str:
    return f"{entry.text} {table.reasons.index(entry.reason) + 1}" if entry.reason else entry.text


def markdown(table: Matrix) -> str:
    """For the README: the same table, with refusals as numbers and the reasons as a list."""
    lines = [f"| | {' | '.join(table.archs)} |", f"|---|{'---|' * len(table.archs)}"]
    lines += [f"| {name} | {' | '.join(_cell(entry, table) for entry in entries)} |" for name, entries in table.rows.items()]
    reasons = [f"{number}. {reason}" for number, reason in enumerate(table.reasons, 1)]
    ran = [f"What ran on a card is commit {table.commit}.", ""] if table.commit else []
    return "\n".join([*lines, "", *ran, "A number is a refusal, by name and with this reason:", "", *reasons])


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
