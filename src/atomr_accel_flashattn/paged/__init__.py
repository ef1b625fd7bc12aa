"""Paged KV caches (arXiv 2309.06180): PagedKvCache hands out pages, PagedAttentionRequest is one call on them."""

from __future__ import annotations

from ..types import KvLayout
from .cache import PagedKvCache
from .request import PagedAttentionRequest

__all__ = ["KvLayout", "PagedAttentionRequest", "PagedKvCache"]
