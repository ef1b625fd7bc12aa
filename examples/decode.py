"""Greedy decoding over a paged KV cache: a small Llama-shaped model with random weights, and requests that share a system prompt.

The system prompt is prefilled once, in chunks, and forked for each request; prompts of unequal length are prefilled in chunks, several
requests in one call; then all decode together. A StepPlan cuts the keys of a step, once for all layers. The tokens are those of plain dense
attention over the whole text, wherever the two best logits differ by more than the tolerance.

Runs without a GPU:  python examples/decode.py
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

import atomr_accel_flashattn as fa

Array = NDArray[np.float32]
Attend = Callable[[int, Array, Array, Array], Array]  # layer, q, k and v (tokens, heads, head dim) -> o

TOLERANCE = 1e-4  # of logits: what two orders of the sums may differ by, many times over


class Model:
    """Random weights: ``weights`` by layer and name, ``embedding`` and ``head``; 8 heads of 16 over 2 KV heads."""

    heads, heads_kv, head_dim, hidden, vocabulary = 8, 2, 16, 192, 211

    def __init__(self, layers: int = 3, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        width, kv = self.heads * self.head_dim, self.heads_kv * self.head_dim

        def matrix(rows: int, columns: int, scale: float) -> Array:
            return (rng.standard_normal((rows, columns)) * scale).astype(np.float32)

        shapes = {"q": (width, width), "k": (width, kv), "v": (width, kv), "o": (width, width)}
        shapes |= {"gate": (width, self.hidden), "up": (width, self.hidden), "down": (self.hidden, width)}
        self.layers = layers
        self.weights = [{name: matrix(*shape, shape[0] ** -0.5) for name, shape in shapes.items()} for _ in range(layers)]
        self.embedding = matrix(self.vocabulary, width, 1.0)
        self.head = matrix(width, self.vocabulary, 4 * width**-0.5)

    def logits(self, tokens: NDArray[np.int64], positions: NDArray[np.int64], attend: Attend) -> Array:
        """(tokens, vocabulary) of packed tokens at their positions; ``attend`` is all that knows of sequences."""
        x = self.embedding[tokens]
        for layer, w in enumerate(self.weights):
            y = normalised(x)
            q, k, v = ((y @ w[name]).reshape(len(tokens), -1, self.head_dim) for name in "qkv")
            o = attend(layer, rotated(q, positions), rotated(k, positions), v)
            x = x + o.reshape(len(tokens), -1) @ w["o"]
            y = normalised(x)
            gate = y @ w["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"])) @ w["down"]
        return normalised(x) @ self.head


def normalised(x: Array) -> Array:
    """RMSNorm (arXiv 1910.07467)."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(1e-6))


def rotated(x: Array, positions: NDArray[np.int64]) -> Array:
    """Rotary position embedding (arXiv 2104.09864) of x (tokens, heads, head dim)."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * (10_000.0 ** (-np.arange(half) / half)).astype(np.float32)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Server:
    """The model beside a paged cache for each layer; a sequence has the same number in all of them, and the same length."""

    def __init__(self, model: Model, blocks: int = 64, block_size: int = 16) -> None:
        self.model = model
        self.caches = [fa.PagedKvCache(blocks, block_size, model.heads_kv, model.head_dim, dtype=fa.DType.F32) for _ in range(model.layers)]
        self.plans: dict[tuple[int, int], fa.StepPlan] = {}

    def allocate(self) -> int:
        """A new sequence."""
        first, *_ = (cache.allocate() for cache in self.caches)
        return first

    def fork(self, sequence: int) -> int:
        """A new sequence with the tokens of another one, whose pages it shares."""
        first, *_ = (cache.fork(sequence) for cache in self.caches)
        return first

    def free(self, sequences: list[int]) -> None:
        """Give their pages back."""
        for cache in self.caches:
            cache.free(sequences)

    def plan(self, batch: int, longest: int) -> fa.StepPlan:
        """The plan of all layers, for so many sequences with up to so many new tokens: made once, and used in every step like it."""
        if (batch, longest) not in self.plans:
            cache, model = self.caches[0], self.model
            self.plans[batch, longest] = fa.StepPlan(
                cache.k,
                batch=batch,
                heads=model.heads,
                heads_kv=model.heads_kv,
                head_dim=model.head_dim,
                capacity=cache.num_blocks * cache.block_size,
                seqlen_q=longest,
                packed_q=True,
                mask=fa.MaskKind.causal(),
            )
        return self.plans[batch, longest]

    def step(self, new: dict[int, list[int]]) -> dict[int, Array]:
        """Run new tokens of some sequences in one call. Gives the logits behind the last one of each."""
        sequences, counts = list(new), [len(tokens) for tokens in new.values()]
        before = [self.caches[0].length(each) for each in sequences]
        positions = np.concatenate([start + np.arange(count) for start, count in zip(before, counts, strict=True)])
        packing, plan = fa.CumulativeSeqlens.from_lengths(counts), self.plan(len(counts), max(counts))

        def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
            cache = self.caches[layer]
            cache.append(sequences, k, v, counts)
            request = cache.request(q, sequences, entries=cache.num_blocks, cu_seqlens_q=packing, mask=fa.MaskKind.causal(), plan=plan)
            if layer == 0:  # the lengths of all layers are equal
                plan.schedule_for(request)
            out: Array = fa.run(request, lse=False).out
            return out

        logits = self.model.logits(np.concatenate(list(new.values())), positions, attend)
        return dict(zip(sequences, logits[np.cumsum(counts) - 1], strict=True))

    def prefill(self, prompts: dict[int, list[int]], chunk: int) -> dict[int, Array]:
        """Run prompts, at most ``chunk`` tokens of each in one call. Gives the logits behind each prompt."""
        plans = {each: fa.ChunkLayout.cut(len(tokens), chunk) for each, tokens in prompts.items()}
        ends: dict[int, Array] = {}
        for index in range(max(len(plan) for plan in plans.values())):
            parts = {each: plan[index] for each, plan in plans.items() if index < len(plan)}
            made = self.step({each: prompts[each][at.prefix_kv_tokens :][: at.chunk_q_tokens] for each, at in parts.items()})
            ends |= {each: made[each] for each, at in parts.items() if at.is_last}
        return ends

    def generate(self, system: list[int], prompts: list[list[int]], count: int, chunk: int = 24) -> list[list[int]]:
        """``count`` tokens behind the system prompt and each prompt."""
        shared = self.allocate()
        self.prefill({shared: system}, chunk)
        sequences = [self.fork(shared) for _ in prompts]
        logits = self.prefill(dict(zip(sequences, prompts, strict=True)), chunk)
        made: dict[int, list[int]] = {each: [] for each in sequences}
        for _ in range(count):
            for each in sequences:
                made[each].append(int(logits[each].argmax()))
            logits = self.step({each: tokens[-1:] for each, tokens in made.items()})
        self.free([shared, *sequences])
        return list(made.values())


def dense_logits(model: Model, tokens: list[int]) -> Array:
    """(tokens, vocabulary) of one text by dense attention over all of it."""

    def attend(_layer: int, q: Array, k: Array, v: Array) -> Array:
        out: Array = fa.flash_attn_func(q[None], k[None], v[None], causal=True)
        return out[0]

    return model.logits(np.array(tokens), np.arange(len(tokens)), attend)


def agreement(model: Model, text: list[int], generated: list[int]) -> tuple[int, int]:
    """Of the generated tokens behind ``text``: how many the dense model was sure of, and how many of these it gave too.

    The dense model reads what was generated, so a near tie that went the other way does not end the comparison.
    """
    logits = dense_logits(model, [*text, *generated])[len(text) - 1 : -1]
    second, first = np.sort(logits, axis=-1)[:, -2:].T
    sure = first - second > TOLERANCE
    return int(sure.sum()), int((sure & (logits.argmax(axis=-1) == generated)).sum())


def main() -> None:
    """Four requests behind one system prompt."""
    model = Model()
    rng = np.random.default_rng(1)
    system = rng.integers(0, model.vocabulary, 50).tolist()
    prompts = [rng.integers(0, model.vocabulary, length).tolist() for length in (7, 61, 30, 1)]
    server = Server(model)
    generated = server.generate(system, prompts, count=20)
    for prompt, tokens in zip(prompts, generated, strict=True):
        sure, equal = agreement(model, system + prompt, tokens)
        print(f"{len(system) + len(prompt):4} tokens, then {tokens[:8]} ...: {equal} of {sure} sure tokens as by dense attention")
        assert equal == sure
    assert all(cache.free_blocks == cache.num_blocks for cache in server.caches)
    print(server.caches[0])


if __name__ == "__main__":
    main()
