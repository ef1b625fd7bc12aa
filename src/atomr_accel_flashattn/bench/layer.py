"""A compiled training step of one Llama-shaped decoder layer, with attention of this package and of torch, in turns.

The layer is RMSNorm, a projection to q, k and v, rotary positions, causal grouped-query attention, a projection back, and a SwiGLU MLP
behind a norm of its own. Each contestant compiles the same layer, with the same weights, into one graph; a step is its forward and its
backward to the input and to every weight, and nothing else: no loss, no optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from ..functional import flash_attn_func
from .autograd import peak_bytes
from .peers import CudnnPeer, Ours, Peer, TorchFa2, first_line
from .timing import Contestant, measure_in_turns

if TYPE_CHECKING:
    import torch

__all__ = ["ERROR_LIMIT", "LayerOptions", "run_layer"]

Say = Callable[[str], None]
ERROR_LIMIT: Final = 0.03  # of o and of each gradient against torch's, norm of the difference over norm; bfloat16 gives less than 0.01
BASE: Final = 500_000.0  # of the rotary frequencies


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOptions:
    """The sizes are those of Llama 3 8B; ``backend`` is torch.compile's, and peers are named as in the other benchmarks."""

    hidden: int = 4096
    heads: int = 32
    heads_kv: int = 8
    mlp: int = 14336
    batch: int = 1
    tokens: int = 8192
    dtype: str = "bfloat16"
    device: str = "cuda"
    backend: str = "inductor"
    peers: tuple[str, ...] = ("ours", "fa2")
    rounds: int = 9
    seed: int = 0

    @property
    def head_dim(self) -> int:
        """Of q, k and v."""
        return self.hidden // self.heads


def run_layer(options: LayerOptions, say: Say = print) -> dict[str, Any]:
    """Compile the layer for every peer, compare what they compute, and time their steps in turns.

    Returns:
        ``layer`` (the options); ``step_ms`` (median, rounds and spread), ``peak_bytes`` (of a step beyond inputs and weights) and
        ``compile_s`` by peer; ``error`` of each peer's o and gradients against those of torch's FlashAttention-2 (or of the last peer);
        ``ratio`` of that one's time over each peer's; ``failures``, a text for each peer that was refused or wrong, which is not timed.

    Raises:
        ValueError: an unknown peer, or none.
    """
    known: dict[str, Peer] = {peer.name: peer for peer in (Ours(), TorchFa2(), CudnnPeer())}
    unknown = [name for name in options.peers if name not in known]
    if unknown or not options.peers:
        raise ValueError(f"got peers {', '.join(unknown) or 'none'}; allowed are {', '.join(known)}")
    base = "fa2" if "fa2" in options.peers else options.peers[-1]
    steps: dict[str, Callable[[], Sequence[torch.Tensor]]] = {}
    made: dict[str, Sequence[torch.Tensor]] = {}
    compile_s: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name in sorted(options.peers, key=lambda name: name != base):  # what the others are compared with comes first
        try:
            steps[name] = _step(known[name], options)
            compile_s[name], made[name] = _first(known[name], steps[name])
        except Exception as reason:  # noqa: BLE001 - torch's compiler raises what its backends raise
            failures[name] = first_line(reason)
            say(f"{name}: {failures[name]}")
    errors = {name: _errors(answer, made[base]) for name, answer in made.items()} if base in made else {}
    for name, found in errors.items():
        if not max(found.values()) <= ERROR_LIMIT:
            failures[name] = f"differs from {base} by {found}; allowed is {ERROR_LIMIT}"
            say(f"{name}: {failures[name]}")
    made.clear()
    right = {name: Contestant([step], known[name].context) for name, step in steps.items() if name not in failures}
    timings = measure_in_turns(right, rounds=options.rounds, seed=options.seed)
    peaks = {name: _peak(known[name], steps[name]) for name in right}
    body: dict[str, Any] = {
        "layer": asdict(options),
        "step_ms": {name: {"ms": each.ms, "rounds": each.rounds, "spread": each.spread} for name, each in timings.items()},
        "peak_bytes": peaks,
        "compile_s": compile_s,
        "base": base,
        "error": errors,
        "ratio": {name: timings[base].ms / each.ms for name, each in timings.items()} if base in timings else {},
        "failures": failures,
    }
    for name, each in timings.items():
        ratio = f", speed {body['ratio'][name]:.3f} x {base}" if name in body["ratio"] else ""
        say(f"layer step {name:6} {each.ms:8.3f} ms (spread {each.spread:.1%}), peak {peaks[name] / 1e9:.3f} GB{ratio}")
    return body


def _first(peer: Peer, step: Callable[[], Sequence[torch.Tensor]]) -> tuple[float, Sequence[torch.Tensor]]:
    """Seconds of the first step, which compiles, and what it made."""
    import time

    began = time.perf_counter()
    with peer.context():
        made = step()
    return time.perf_counter() - began, made


def _peak(peer: Peer, step: Callable[[], object]) -> int:
    with peer.context():
        return peak_bytes(step)


def _errors(answer: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> dict[str, float]:
    """Of o, the gradient of the input, and the largest of the weights."""
    out, dx, *weights = (float((one.double() - two.double()).norm() / two.double().norm()) for one, two in zip(answer, other, strict=True))
    return {"out": out, "dx": dx, "weights": max(weights)}


def _step(peer: Peer, options: LayerOptions) -> Callable[[], Sequence[torch.Tensor]]:
    """A compiled step: o, and the gradients of the input and the weights."""
    import torch

    generator = torch.Generator(options.device).manual_seed(options.seed)
    place: Any = {"device": options.device, "dtype": getattr(torch, options.dtype)}

    def normal(*sizes: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, **place).mul_(scale).requires_grad_()

    hidden, kv = options.hidden, options.heads_kv * options.head_dim
    x = normal(options.batch, options.tokens, hidden)
    dout = normal(options.batch, options.tokens, hidden).detach()
    weights = [
        normal(hidden + 2 * kv, hidden, scale=hidden**-0.5),
        normal(hidden, hidden, scale=hidden**-0.5),
        normal(2 * options.mlp, hidden, scale=hidden**-0.5),
        normal(hidden, options.mlp, scale=options.mlp**-0.5),
        *(torch.ones(hidden, requires_grad=True, **place) for _ in range(2)),
    ]
    rotation = _rotation(options)
    layer: Any = torch.compile(_layer(peer, options), fullgraph=True, backend=options.backend)

    def step() -> Sequence[torch.Tensor]:
        with torch.enable_grad():
            out = layer(x, rotation, *weights)
        return out.detach(), *torch.autograd.grad(out, (x, *weights), dout)

    return step


def _rotation(options: LayerOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, (tokens, 1, head dim) float32."""
    import torch

    half = torch.arange(0, options.head_dim, 2, device=options.device) / options.head_dim
    angles = torch.outer(torch.arange(options.tokens, device=options.device).float(), BASE**-half)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def _layer(peer: Peer, options: LayerOptions) -> Callable[..., torch.Tensor]:
    """The layer as a function of x (B, S, hidden), the rotation and the weights."""
    import torch
    from torch.nn import functional

    attend = _ours if isinstance(peer, Ours) else _sdpa
    split = (options.heads, options.heads_kv, options.heads_kv)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, 1e-5)

    def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        one, other = x.float().chunk(2, dim=-1)
        return (x.float() * cosines + torch.cat((-other, one), dim=-1) * sines).to(x.dtype)

    def layer(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], *weights: torch.Tensor) -> torch.Tensor:
        to_qkv, back, up, down, first, second = weights
        heads = functional.linear(norm(x, first), to_qkv).unflatten(-1, (-1, options.head_dim))
        q, k, v = heads.split(split, dim=2)
        out = attend(rotate(q, *rotation), rotate(k, *rotation), v)
        x = x + functional.linear(out.flatten(2), back)
        gate, value = functional.linear(norm(x, second), up).chunk(2, dim=-1)
        return x + functional.linear(functional.silu(gate) * value, down)

    return layer


def _ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return flash_attn_func(q, k, v, causal=True)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """By torch, whose layout is (B, H, S, D)."""
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
