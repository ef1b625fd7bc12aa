"""Which kernels a run used: a file with one JSON object a line, one line a kernel, which ``atomr-flashattn compile --like`` compiles.

``ATOMR_FLASHATTN_RECORD_KERNELS`` names the file. A process adds a line when it loads a kernel that the file does not hold yet; several
processes may write to one file, and a kernel that stands in it twice counts once. Without the variable nothing is written.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from ..env import PREFIX, settings
from ..errors import CacheError, CacheWarning
from .spec import KernelSpec

__all__ = ["forget_recorded", "read_kernels", "record_kernel"]

_guard = threading.Lock()
_recorded: dict[Path, set[str]] = {}  # file -> its lines, as this process knows them


def record_kernel(spec: KernelSpec) -> None:
    """Add ``spec`` to the file that the environment names, once a process. A file that cannot be written is a :class:`CacheWarning`."""
    path = settings().record_kernels
    if path is None:
        return
    line = json.dumps(_as_dict(spec), sort_keys=True)
    with _guard:
        try:
            known = _recorded.get(path)
            if known is None:
                known = _recorded[path] = set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
            if line in known:
                return
            known.add(line)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")  # one write of one line at the end of the file: other processes do the same
        except (OSError, UnicodeDecodeError) as error:
            warnings.warn(
                f"cannot record kernels in {path} ({error}); the call goes on. Name a file that can be written with {PREFIX}RECORD_KERNELS",
                CacheWarning,
                stacklevel=2,
            )


def forget_recorded() -> None:
    """Let this process read the file again before it adds to it."""
    with _guard:
        _recorded.clear()


def read_kernels(path: Path) -> list[KernelSpec]:
    """The kernels of a file that :func:`record_kernel` wrote, each once, in the order in which they came.

    Raises:
        CacheError: it cannot be read, or a line is no kernel of this version.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CacheError(f"cannot read {path}: {error}; name a file that a run wrote with {PREFIX}RECORD_KERNELS set") from error
    classes = {each.HEADER: each for each in _kernel_classes()}
    found: list[KernelSpec] = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            spec = _from_dict(classes[values.pop("header")], {name: value for name, value in values.items() if name != "kernel"})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CacheError(f"{path}, line {number}: no kernel of this version ({error!r}); make the record anew") from error
        found.append(spec)
    return list(dict.fromkeys(found))


def _kernel_classes(base: type[KernelSpec] = KernelSpec) -> Iterator[type[KernelSpec]]:
    """Every class of a kernel header; looking kernels up has imported them."""
    from . import (  # noqa: F401 - each defines its class
        dropout_mask,
        fa2_bwd,
        fa2_fwd,
        fa3_fp8,
        fa3_fp8_kvcache,
        fa3_fwd,
        fa3_kvcache,
        fp8_kvcache,
        kv_append,
        kvcache,
        merge_states,
        step,
    )

    for each in base.__subclasses__():
        if "HEADER" in vars(each):
            yield each
        yield from _kernel_classes(each)


def _as_dict(spec: KernelSpec) -> dict[str, Any]:
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    return {"kernel": spec.kernel_name, "header": spec.HEADER} | {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _from_dict(cls: type[KernelSpec], values: Mapping[str, Any]) -> KernelSpec:
    """The spec that :func:`_as_dict` wrote; a field of another type is refused."""
    hints = get_type_hints(cls)
    return cls(**{name: _typed(hints[name], value) for name, value in values.items()})


def _typed(hint: Any, value: Any) -> Any:
    if isinstance(hint, UnionType):  # of one type and None
        (one,) = (each for each in get_args(hint) if each is not NoneType)
        return None if value is None else _typed(one, value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if isinstance(hint, type) and is_dataclass(hint):
        inner = get_type_hints(hint)
        return hint(**{name: _typed(inner[name], each) for name, each in value.items()})
    if type(value) is not hint:
        raise TypeError(f"got {value!r} for a {getattr(hint, '__name__', hint)}")
    return value
