"""The main job on real input: attention of a layer of a real model, and of a long context, checked and drawn."""

from __future__ import annotations

from .cases import Case, load_cases
from .picture import draw
from .runner import Backend, CaseResult, choose_backend, kernels_of, run_case

__all__ = ["Backend", "Case", "CaseResult", "choose_backend", "draw", "kernels_of", "load_cases", "run_case"]
