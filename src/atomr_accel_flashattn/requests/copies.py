"""Copies of what holds addresses: made anew from their arrays, which may lie elsewhere by then."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

__all__ = ["MadeAnew"]


class MadeAnew:
    """Base of frozen dataclasses that read arrays when they are made: copying, deepcopying and unpickling make them again.

    So a copy has the addresses, the problem and the plan of its own arrays, in another process too. A dropout seed that was drawn is copied
    with the rest: the copy of a request drops what the request drops.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        given = {each.name: getattr(self, each.name) for each in fields(self) if each.init}  # type: ignore[arg-type]
        dropout = getattr(getattr(self, "problem", None), "dropout", None)
        if dropout is not None and given["options"].rng is None:
            given["options"] = replace(given["options"], rng=dropout.rng.source)
        return _make, (type(self), given, getattr(self, "__dict__", {}))


def _make(kind: type[Any], given: dict[str, Any], more: dict[str, Any]) -> Any:
    """``more``: attributes that a subclass without slots was given."""
    made = kind(**given)
    if more:
        vars(made).update(more)
    return made
