"""Greedy decoding with torch, a whole step in one CUDA graph: what examples/decode.py does in NumPy, as a server on a GPU would.

A small Llama-shaped model with random weights has a paged cache for each layer. The system prompt is prefilled in chunks and forked;
prompts of unequal length are prefilled in chunks; then one graph is captured, which schedules the keys of a step from the lengths on the
device, runs all layers (append, rotary embedding and attention are one call each), picks the tokens, and counts. Replays need nothing from
the host. The tokens are those of plain dense attention in float32, wherever its two best logits differ by more than the tolerance.

    python examples/decode_graph.py                 bfloat16 on the GPU, in a graph
    python examples/decode_graph.py --device cpu    float32 on the CPU backend, step by step
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

import atomr_accel_flashattn as fa

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k and v (B, n, heads, head dim) -> o

TOLERANCE = {torch.bfloat16: 0.3, torch.float32: 1e-3}  # of logits, whose standard deviation is about 4


class Model:
    """Random weights: 8 heads of 64 over 2 KV heads."""

    heads, heads_kv, head_dim, hidden, vocabulary, longest = 8, 2, 64, 1024, 500, 4096

    def __init__(self, layers: int, device: str, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(0)
        width, kv = self.heads * self.head_dim, self.heads_kv * self.head_dim

        def matrix(rows: int, columns: int, scale: float) -> Tensor:
            return (torch.randn(rows, columns, generator=random) * scale).to(device, dtype)

        shapes = {"q": (width, width), "k": (width, kv), "v": (width, kv), "o": (width, width)}
        shapes |= {"gate": (width, self.hidden), "up": (width, self.hidden), "down": (self.hidden, width)}
        self.layers = [{name: matrix(*shape, shape[0] ** -0.5) for name, shape in shapes.items()} for _ in range(layers)]
        self.embedding = matrix(self.vocabulary, width, 1.0)
        self.head = matrix(width, self.vocabulary, 4 * width**-0.5)
        half = torch.arange(self.head_dim // 2, device=device) / (self.head_dim // 2)
        angle = torch.arange(self.longest, device=device)[:, None] * 10_000.0**-half
        self.cos, self.sin = angle.cos(), angle.sin()

    def __call__(self, tokens: Tensor, attend: Attend) -> Tensor:
        """Logits (B, n, vocabulary) of tokens (B, n); ``attend(layer, q, k, v)`` is all that knows of sequences."""
        x = self.embedding[tokens]
        for layer, w in enumerate(self.layers):
            y = rms_norm(x, x.shape[-1:])
            q, k, v = ((y @ w[name]).unflatten(-1, (-1, self.head_dim)) for name in "qkv")
            x = x + attend(layer, q, k, v).flatten(-2) @ w["o"]
            y = rms_norm(x, x.shape[-1:])
            x = x + (silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"]
        return rms_norm(x, x.shape[-1:]) @ self.head

    def dense(self, tokens: list[int]) -> Tensor:
        """Logits (n, vocabulary) of one text, in float32 and by torch's attention over all of it."""
        twin = Model.__new__(Model)
        twin.layers = [{name: matrix.float() for name, matrix in w.items()} for w in self.layers]
        twin.embedding, twin.head = self.embedding.float(), self.head.float()
        cos, sin = (table[: len(tokens), None] for table in (self.cos, self.sin))

        def rotated(x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).transpose(1, 2)

        def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o = scaled_dot_product_attention(rotated(q), rotated(k), v.transpose(1, 2), is_causal=True, enable_gqa=True)
            return o.transpose(1, 2)

        return twin(torch.tensor([tokens], device=self.embedding.device), attend)[0]


class Server:
    """The model beside a paged cache for each layer. All of them hand out the same pages in the same order, so one table serves all."""

    def __init__(self, model: Model, blocks: int, block_size: int = 16) -> None:
        self.model = model
        like = model.embedding
        self.caches = [fa.PagedKvCache(blocks, block_size, model.heads_kv, model.head_dim, like=like) for _ in model.layers]

    def allocate(self) -> int:
        """A new sequence."""
        first, *_ = (cache.allocate() for cache in self.caches)
        return first

    def fork(self, sequence: int) -> int:
        """A new sequence with the tokens of another one, whose pages it shares."""
        first, *_ = (cache.fork(sequence) for cache in self.caches)
        return first

    def reserve(self, sequences: list[int], tokens: int) -> None:
        """Room for so many more tokens in each; a shared page that would be written to is copied."""
        for cache in self.caches:
            cache.reserve(sequences, tokens)

    def advance(self, sequences: list[int], tokens: int) -> None:
        """So many tokens were written to each."""
        for cache in self.caches:
            cache.advance(sequences, tokens)

    def logits(self, tokens: Tensor, lengths: Tensor, table: Tensor, plan: fa.StepPlan | None = None) -> Tensor:
        """Logits (B, n, vocabulary) of n new tokens each, behind ``lengths`` (B,) others; their keys and values go into the caches."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache = self.caches[layer]
            return fa.flash_attn_with_kvcache(
                q,
                cache.k,
                cache.v,
                k,
                v,
                rotary_cos=self.model.cos,
                rotary_sin=self.model.sin,
                cache_seqlens=lengths,
                block_table=table,
                causal=True,
                rotary_interleaved=False,
                step_plan=plan,
            )

        if plan is not None:
            plan.schedule(lengths)  # once for all layers
        return self.model(tokens, attend)

    def prefill(self, sequence: int, prompt: list[int], chunk: int) -> Tensor:
        """Logits (vocabulary,) behind a prompt, which is run in chunks."""
        cache = self.caches[0]
        for part in fa.ChunkLayout.cut(len(prompt), chunk):
            new = prompt[part.prefix_kv_tokens :][: part.chunk_q_tokens]
            self.reserve([sequence], len(new))
            tokens = torch.tensor([new], device=self.model.embedding.device)
            logits = self.logits(tokens, cache.seq_lens(sequence), cache.block_table(sequence))
            self.advance([sequence], len(new))
        return logits[0, -1]

    def generate(self, system: list[int], prompts: list[list[int]], count: int, chunk: int = 24) -> tuple[list[list[int]], float]:
        """``count`` tokens behind the system prompt and each prompt, and the seconds of a step."""
        shared = self.allocate()
        self.prefill(shared, system, chunk)
        sequences = [self.fork(shared) for _ in prompts]
        first = [self.prefill(each, prompt, chunk).argmax() for each, prompt in zip(sequences, prompts, strict=True)]
        self.reserve(sequences, count)
        cache, model = self.caches[0], self.model
        table, lengths, tokens = cache.block_table(sequences), cache.seq_lens(sequences), torch.stack(first)[:, None]
        made, at = tokens.repeat(1, count), torch.ones(1, dtype=torch.int64, device=tokens.device)
        plan = fa.StepPlan(
            model.embedding,
            batch=len(prompts),
            heads=model.heads,
            heads_kv=model.heads_kv,
            head_dim=model.head_dim,
            capacity=table.shape[1] * cache.block_size,
            mask=fa.MaskKind.causal(),
            new_tokens=1,
        )

        def step() -> None:
            tokens.copy_(self.logits(tokens, lengths, table, plan).argmax(dim=-1))
            made.index_copy_(1, at, tokens)
            lengths.add_(1)
            at.add_(1)

        step()  # compiles the kernels
        run = captured(step) if tokens.is_cuda else step
        began = time.perf_counter()
        for _ in range(count - 2):
            run()
        answer = made.tolist()  # waits
        seconds = (time.perf_counter() - began) / (count - 2)
        self.advance(sequences, count - 1)
        cache.check()
        for each in self.caches:
            each.free([shared, *sequences])
        return answer, seconds


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """One CUDA graph of a step; what it did while it was captured is no step."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def agreement(model: Model, text: list[int], generated: list[int]) -> tuple[int, int]:
    """Of the generated tokens behind ``text``: how many the dense model was sure of, and how many of these it gave too."""
    logits = model.dense([*text, *generated])[len(text) - 1 : -1]
    best = logits.topk(2, dim=-1)
    sure = best.values[:, 0] - best.values[:, 1] > TOLERANCE[model.embedding.dtype]
    equal = sure & (best.indices[:, 0] == torch.tensor(generated, device=logits.device))
    return int(sure.sum()), int(equal.sum())


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Four requests behind one system prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=40, help="to generate for each request")
    options = parser.parse_args(arguments)
    model = Model(options.layers, options.device, torch.float32 if options.device == "cpu" else torch.bfloat16)
    random = torch.Generator().manual_seed(1)
    system, *prompts = (torch.randint(model.vocabulary, (n,), generator=random).tolist() for n in (50, 7, 61, 30, 1))
    server = Server(model, blocks=64)
    generated, seconds = server.generate(system, prompts, options.tokens)
    for prompt, tokens in zip(prompts, generated, strict=True):
        sure, equal = agreement(model, system + prompt, tokens)
        print(f"{len(system) + len(prompt):4} tokens, then {tokens[:8]} ...: {equal} of {sure} sure tokens as by dense attention")
        assert equal == sure
    assert all(cache.free_blocks == cache.num_blocks for cache in server.caches)
    print(f"{seconds * 1e6:.0f} us a step of {len(prompts)} requests and {options.layers} layers; {server.caches[0]}")


if __name__ == "__main__":
    main()
