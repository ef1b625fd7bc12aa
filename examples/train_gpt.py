"""Train a character-level GPT twice from one seed: with this attention, and with torch's scaled_dot_product_attention.

The model has grouped queries, a causal window and dropout in its attention. It runs in bfloat16 on a GPU and in float32 on the CPU. Both
runs see the same batches and begin with the same weights; only the pattern of the dropout differs, so smoothed losses have to agree within
1 %. With --packed a batch is documents of unequal length, one after the other: ``flash_attn_varlen_func`` takes their ends,
scaled_dot_product_attention takes a block-diagonal mask, which is made anew for each batch and is part of its speed and memory.

    python examples/train_gpt.py                                    # on a GPU
    python examples/train_gpt.py --width 64 --layers 2 --batch 4    # on the CPU: 20 minutes, or --steps 20
    python examples/train_gpt.py --checkpoint run.pt --out run.json # Ctrl-C stops, the same command goes on; run.png is the picture
    python examples/train_gpt.py --draw one.json two.json --out all.png # one picture of several runs, without training

Exit status: 0 where the losses agree, 1 where they do not, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.bench.record import make_record

SMOOTH = 50  # steps that a smoothed loss is the mean of
TURN = 10  # steps of one run before the other one's turn
TOLERANCE = 0.01  # of smoothed losses, relative


@dataclass(frozen=True)
class Config:
    """What a run depends on, except its number of steps. Its fields are options of the command line."""

    layers: int = 6
    width: int = 256
    heads: int = 4
    heads_kv: int = 2
    length: int = 512
    batch: int = 16
    window: int = 255
    dropout: float = 0.1
    rate: float = 1e-3
    seed: int = 0
    packed: bool = False
    compile: bool = False


HELP = {
    "length": "tokens of a row, and at most of a document",
    "batch": "rows; with --packed, two documents for each",
    "window": "keys to the left of a query, -1 is all of them",
    "dropout": "of attention weights",
    "packed": "documents of unequal length, one after the other",
    "compile": "torch.compile(fullgraph=True)",
}


# --- the model --------------------------------------------------------------------------------------------------------------------------


def flash(q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None, c: Config) -> Tensor:
    """This attention on q (B, S, H, D), or packed (T, H, D) with the ends of documents, int32 (documents + 1,)."""
    options: Any = {"dropout_p": c.dropout, "causal": True, "window_size": (c.window, 0)}
    if ends is None:
        return fa.flash_attn_func(q, k, v, **options)
    return fa.flash_attn_varlen_func(q, k, v, ends, ends, c.length, c.length, **options)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, c: Config) -> Tensor:
    """The same by torch, whose layout is (B, H, S, D); the mask (S, S) says which keys a query sees, None is causal."""
    q, k, v = (x.reshape(-1, *x.shape[-3:]).transpose(1, 2) for x in (q, k, v))
    if mask is not None:  # its kernels that take a mask have no grouped queries
        k, v = (x.repeat_interleave(c.heads // c.heads_kv, dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, c.dropout, is_causal=mask is None, enable_gqa=mask is None)
    return out.transpose(1, 2).squeeze(0) if c.packed else out.transpose(1, 2)


class Block(nn.Module):
    """Attention and MLP, each behind its norm."""

    def __init__(self, c: Config, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.c, self.attend, self.head_dim = c, attend, c.width // c.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.qkv = nn.Linear(c.width, (c.heads + 2 * c.heads_kv) * self.head_dim, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(c.width, 4 * c.width), nn.GELU(), nn.Linear(4 * c.width, c.width))

    def forward(self, x: Tensor, where: Tensor | None) -> Tensor:
        """The same shape from x (..., width); ``where`` is what ``attend`` takes."""
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split((self.c.heads, self.c.heads_kv, self.c.heads_kv), dim=-2)  # views: nothing is copied
        c = self.c if self.training else replace(self.c, dropout=0.0)
        x = x + self.out(self.attend(q, k, v, where, c).flatten(-2))
        return x + self.mlp(self.norm_2(x))


class Gpt(nn.Module):
    """A decoder on characters, with learned positions."""

    def __init__(self, c: Config, characters: int, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(characters, c.width), nn.Embedding(c.length, c.width)
        self.blocks = nn.ModuleList(Block(c, attend) for _ in range(c.layers))
        self.norm, self.head = nn.LayerNorm(c.width), nn.Linear(c.width, characters, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, targets: Tensor, where: Tensor | None) -> Tensor:
        """Mean loss in nats of a batch, (B, S) or packed (T,)."""
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x, where)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, -2).float(), targets.flatten())


# --- data -------------------------------------------------------------------------------------------------------------------------------


def text() -> str:
    """The project's pages; where the example lies alone, the docstrings of the package."""
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    return "\n".join([page.read_text(encoding="utf-8") for page in pages] or [str(getattr(fa, name).__doc__) for name in dir(fa)])


@dataclass(frozen=True)
class Batch:
    """Excerpts of the text: tokens, positions and targets are (B, S), or packed (T,)."""

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    document: Tensor  # (T,) which document a token belongs to
    ends: Tensor  # (documents + 1,) int32


def draw(data: Tensor, c: Config, step: int, device: str) -> Batch:
    """The batch of a step: a function of seed and step alone."""
    generator = torch.Generator().manual_seed(c.seed * 1_000_003 + step)
    lengths = torch.full((c.batch,), c.length)
    if c.packed:  # each row is cut in two documents
        cuts = torch.randint(1, c.length, (c.batch,), generator=generator)
        lengths = torch.stack((cuts, c.length - cuts), 1).flatten()
    starts = torch.randint(len(data) - c.length, lengths.shape, generator=generator)
    ends = F.pad(lengths.cumsum(0), (1, 0))
    document = torch.repeat_interleave(lengths)
    positions = torch.arange(len(document)) - ends[document]
    places = starts[document] + positions
    shape = (-1,) if c.packed else (c.batch, c.length)
    parts = (x.view(shape) for x in (data[places], positions, data[places + 1]))
    return Batch(*(x.to(device) for x in (*parts, document, ends.int())))


def ends_of(batch: Batch, c: Config) -> Tensor | None:
    """What ``flash`` needs beside q, k and v."""
    return batch.ends if c.packed else None


def mask_of(batch: Batch, c: Config) -> Tensor | None:
    """What ``sdpa`` needs: a band, and with packed documents a block-diagonal one."""
    if not c.packed and c.window < 0:
        return None
    document = batch.document if c.packed else torch.zeros_like(batch.positions[0])
    place = torch.arange(len(document), device=document.device)
    before = place[:, None] - place  # how far a key is to the left of a query
    mask = (before >= 0) & (document[:, None] == document)
    return mask & (before <= c.window) if c.window >= 0 else mask


# --- training ---------------------------------------------------------------------------------------------------------------------------


class Run:
    """One model, its optimizer, and what came out so far."""

    def __init__(self, c: Config, data: Tensor, device: str, attend: Callable[..., Tensor], where: Callable[..., Tensor | None]) -> None:
        torch.manual_seed(c.seed)
        self.c, self.data, self.device, self.where = c, data, device, where
        self.model = Gpt(c, int(data.max()) + 1, attend).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), c.rate, weight_decay=0.1)
        self.call = torch.compile(self.model, fullgraph=True) if c.compile else self.model
        self.losses: list[float] = []
        self.speeds: list[float] = []  # tokens per second of each turn
        self.peak = 0  # bytes on the GPU; the weights of both runs are among them

    def step(self, number: int) -> Tensor:
        """One step. It seeds itself, so a run that goes on later draws the batches and the dropout it would have drawn."""
        batch = draw(self.data, self.c, number, self.device)
        torch.manual_seed(self.c.seed * 1_000_003 + number)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.call(batch.tokens, batch.positions, batch.targets, self.where(batch, self.c))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def advance(self, end: int, stopped: Callable[[], bool]) -> int:
        """Steps up to ``end``, or until ``stopped`` says so after one. Gives their number."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        losses: list[Tensor] = []
        while len(self.losses) + len(losses) < end and not stopped():
            losses.append(self.step(len(self.losses) + len(losses)))
        self.losses += [loss.item() for loss in losses]  # waits for the GPU, once a turn
        if losses:
            self.speeds.append(len(losses) * self.c.batch * self.c.length / (time.perf_counter() - start))
        if self.device == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        return len(losses)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "losses": self.losses, "speeds": self.speeds}

    def load(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.speeds = state["losses"], state["speeds"]


def make_runs(c: Config, device: str) -> dict[str, Run]:
    """Both runs, with equal weights."""
    written = text()
    number = {character: n for n, character in enumerate(sorted(set(written)))}
    data = torch.tensor([number[character] for character in written])
    return {"flash": Run(c, data, device, flash, ends_of), "sdpa": Run(c, data, device, sdpa, mask_of)}


def save(path: Path, c: Config, runs: dict[str, Run]) -> None:
    """Write a checkpoint; one that is there stays whole until the new one is."""
    part = path.with_name(path.name + ".part")
    torch.save({"config": asdict(c), "runs": {name: run.state() for name, run in runs.items()}}, part)
    part.replace(path)


def load(path: Path, c: Config, runs: dict[str, Run]) -> None:
    """Read a checkpoint.

    Raises:
        SystemExit: it is that of another configuration.
    """
    kept = torch.load(path, weights_only=True)
    if kept["config"] != asdict(c):
        raise SystemExit(f"--checkpoint: got {path} of {kept['config']}; allowed are its options, or another file")
    for name, run in runs.items():
        run.load(kept["runs"][name])


def train(runs: dict[str, Run], steps: int, kept: Callable[[], None]) -> bool:
    """Both runs in turns up to ``steps``; ``kept`` is called after each pair of turns. False where Ctrl-C stopped it."""
    interrupts: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        interrupts.append(number)
        signal.signal(signal.SIGINT, before)  # a second Ctrl-C does what it did before

    before = signal.signal(signal.SIGINT, interrupt)
    screen = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=screen, disable=not screen.is_terminal, transient=True) as progress:
            bars = {name: progress.add_task(name, total=steps, completed=len(run.losses)) for name, run in runs.items()}
            first = min(len(run.losses) for run in runs.values()) // TURN
            for turn in range(first, -(-steps // TURN)):
                for name in sorted(runs, reverse=turn % 2 == 1):  # who goes first changes
                    done = runs[name].advance(min(steps, (turn + 1) * TURN), lambda: bool(interrupts))
                    losses = runs[name].losses
                    progress.update(bars[name], advance=done, description=f"{name}: loss {losses[-1]:.3f}" if losses else name)
                kept()
                if interrupts:
                    return False
    finally:
        signal.signal(signal.SIGINT, before)
    return True


# --- what came out ----------------------------------------------------------------------------------------------------------------------


def smoothed(losses: Sequence[float]) -> list[float]:
    """Each with the losses before it: means over at most SMOOTH steps."""
    return [statistics.fmean(losses[max(0, n + 1 - SMOOTH) : n + 1]) for n in range(len(losses))]


def differences(runs: dict[str, Run]) -> list[float]:
    """Of smoothed losses, relative, step by step."""
    ours, theirs = (smoothed(runs[name].losses) for name in ("flash", "sdpa"))
    return [(one - other) / other for one, other in zip(ours, theirs, strict=True)]


def form(c: Config) -> str:
    """What tells a run from the others, for people."""
    return ", ".join(
        ["packed" if c.packed else "dense", *(["compiled"] if c.compile else []), *([f"window {c.window}"] if c.window >= 0 else [])]
    )


def record(c: Config, runs: dict[str, Run], device: str) -> dict[str, Any]:
    """Both curves, what they were made with, and where."""
    made = {
        each: {
            "losses": run.losses,
            "smoothed": smoothed(run.losses),
            "tokens_per_second": statistics.median(run.speeds),
            "speeds": run.speeds,  # of each turn
            "peak_bytes": run.peak or None,
        }
        for each, run in runs.items()
    }
    return make_record("train_gpt", {"form": form(c), "config": asdict(c), "on": device, "runs": made})


def cost(run: dict[str, Any]) -> str:
    """Speed and memory of a run, for people."""
    memory = f", peak {run['peak_bytes'] / 1e9:.2f} GB" if run["peak_bytes"] else ""
    return f"{run['tokens_per_second']:,.0f} tokens/s{memory}"


def picture(records: Sequence[dict[str, Any]], path: Path) -> None:
    """A column for each record: losses of both runs, what the smoothed ones differ by, and how fast they were."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = {"sdpa": ("scaled_dot_product_attention", "#e69f00", "-"), "flash": ("this package", "#1a1a1a", "--")}
    figure, axes = plt.subplots(
        3,
        len(records),
        squeeze=False,
        sharey="row",
        figsize=(max(5.0, 3.6 * len(records)), 6.5),
        height_ratios=(4, 1.2, 1),
        layout="constrained",
    )
    for (losses, difference, speed), kept in zip(axes.T, records, strict=True):
        runs = kept["runs"]
        for name, (label, colour, line) in names.items():
            losses.plot(runs[name]["losses"], color=colour, alpha=0.25, linewidth=0.8)
            losses.plot(runs[name]["smoothed"], color=colour, label=label, linestyle=line)
        ours, theirs = (runs[name]["smoothed"] for name in ("flash", "sdpa"))
        difference.plot([100 * (one / other - 1) for one, other in zip(ours, theirs, strict=True)], color="#1a1a1a")
        difference.axhspan(-100 * TOLERANCE, 100 * TOLERANCE, color="#009e73", alpha=0.15)
        bars = speed.barh(range(2), [runs[name]["tokens_per_second"] for name in names], color=[colour for _, colour, _ in names.values()])
        speed.bar_label(bars, [cost(runs[name]) for name in names], padding=3, fontsize=8)
        speed.set(xlabel="tokens/s", yticks=[])
        speed.margins(x=1.1)
        losses.set_title(kept["form"], fontsize=10)
        difference.set_xlabel(f"step; smoothed over {SMOOTH}")
        difference.sharex(losses)
        for axis in (losses, difference, speed):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="x" if axis is speed else "y", linewidth=0.4, alpha=0.6)
            axis.set_axisbelow(True)
    axes[0][0].set_ylabel("loss, nats")
    axes[1][0].set_ylabel("difference, %")
    first = records[0]
    dtype, torch_version = "bfloat16" if first["on"] == "cuda" else "float32", first["versions"]["torch"]
    title = f"A character-level GPT, {dtype}, one seed \N{MIDDLE DOT} {first['device']['name']} \N{MIDDLE DOT} torch {torch_version}"
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, title=title, title_fontsize=11)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line: the fields of Config, and what is no part of a run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default in asdict(Config()).items():
        how: Any = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
        parser.add_argument(f"--{name.replace('_', '-')}", help=HELP.get(name, name.replace("_", " ")), **how)
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu", help="of torch")
    parser.add_argument("--checkpoint", type=Path, help="written as it goes, and read where it is there")
    parser.add_argument(
        "--out", type=Path, help="JSON file for both curves; with matplotlib, the picture lies beside it. With --draw, the picture"
    )
    parser.add_argument("--draw", type=Path, nargs="+", metavar="JSON", help="draw what these runs wrote, and do not train")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Train both, and say whether they agree."""
    told = arguments(given)
    if told.draw:
        if told.out is None:
            raise SystemExit("--out: got none with --draw; allowed is a PNG or SVG file")
        picture([json.loads(path.read_text(encoding="utf-8")) for path in told.draw], told.out)
        return 0
    c = Config(**{name: getattr(told, name) for name in asdict(Config())})
    runs = make_runs(c, told.device)
    if told.checkpoint and told.checkpoint.exists():
        load(told.checkpoint, c, runs)
    finished = train(runs, told.steps, lambda: save(told.checkpoint, c, runs) if told.checkpoint else None)
    if not finished:
        print(f"stopped; {f'the same command goes on from {told.checkpoint}' if told.checkpoint else 'nothing was kept: no --checkpoint'}")
        return 130
    kept = record(c, runs, told.device)
    if told.out:
        told.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        if find_spec("matplotlib"):
            picture([kept], told.out.with_suffix(".png"))
    size = sum(p.numel() for p in runs["flash"].model.parameters())
    print(f"{size / 1e6:.1f} million parameters, {told.steps} steps of {c.batch * c.length} tokens on {kept['device']['name']}")
    for name, run in kept["runs"].items():
        print(f"{name:>5}: smoothed loss {run['smoothed'][-1]:.4f}, {cost(run)}")
    most = max(map(abs, differences(runs)))
    print(f"smoothed losses differ by at most {most:.2%}: {'they agree' if most <= TOLERANCE else f'more than {TOLERANCE:.0%}'}")
    return int(most > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
