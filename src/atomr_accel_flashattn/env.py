"""Every environment variable that this package reads, in one place.

==================================== ==================== ======================================================================
variable                             default              meaning
==================================== ==================== ======================================================================
``ATOMR_FLASHATTN_BACKEND``          ``auto``             ``auto``: where the arrays live decides. ``cpu``: the CPU backend, and
                                                          GPU arrays are refused. ``gpu``: CPU arrays are refused.
``ATOMR_FLASHATTN_CACHE_DIR``        user cache folder    Where compiled kernels are kept. Default: ``$XDG_CACHE_HOME`` or
                                                          ``~/.cache``, then ``atomr-accel-flashattn``.
``ATOMR_FLASHATTN_CACHE_READONLY``   ``0``                ``1``: read the cache, never write to it (a cache shipped in an image,
                                                          or of an administrator whose code you run: SECURITY.md).
``ATOMR_FLASHATTN_DISABLE_CACHE``    ``0``                ``1``: neither read nor write; every process compiles for itself.
``ATOMR_FLASHATTN_DISABLE_TUNED``    ``0``                ``1``: take the tiles that come with the package, not those that
                                                          ``atomr-flashattn tune`` kept in the cache folder.
``ATOMR_FLASHATTN_SAVE_SOURCE``      unset                A folder that gets the ``.cu`` of every kernel that is compiled.
``ATOMR_FLASHATTN_RECORD_KERNELS``   unset                A file that gets a line for every kernel that a run uses;
                                                          ``atomr-flashattn compile --like`` compiles those.
``ATOMR_FLASHATTN_COMMIT``           unset                What records of benchmarks call the code: a machine with a card often
                                                          holds a copy without ``.git``.
``ATOMR_FLASHATTN_DEBUG``            ``0``                ``1``: check values that live on the GPU (``cu_seqlens``) and wait for
                                                          every launch, so that an error is raised by the call that made it.
==================================== ==================== ======================================================================

Switches take ``1 true yes on`` and ``0 false no off`` in any case; an empty value counts as unset. A variable with our prefix that is
none of these is a :class:`~.errors.SettingsWarning`, which names the nearest one.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Final

from .errors import ConstructionError, SettingsWarning

__all__ = ["PREFIX", "VARIABLES", "Settings", "default_cache_dir", "settings"]

PREFIX: Final = "ATOMR_FLASHATTN_"

# The variable behind each field of Settings.
VARIABLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "backend": "ATOMR_FLASHATTN_BACKEND",
        "cache_dir": "ATOMR_FLASHATTN_CACHE_DIR",
        "cache_readonly": "ATOMR_FLASHATTN_CACHE_READONLY",
        "cache_disabled": "ATOMR_FLASHATTN_DISABLE_CACHE",
        "tuned_tiles_disabled": "ATOMR_FLASHATTN_DISABLE_TUNED",
        "save_source": "ATOMR_FLASHATTN_SAVE_SOURCE",
        "record_kernels": "ATOMR_FLASHATTN_RECORD_KERNELS",
        "commit": "ATOMR_FLASHATTN_COMMIT",
        "debug": "ATOMR_FLASHATTN_DEBUG",
    }
)
_OF_TESTS: Final = ("TEST_RECORD", "TEST_DEVICE", "COMPILE_RECORD")  # read by the tests of this project

_BACKENDS = ("auto", "cpu", "gpu")
_ON = frozenset({"1", "true", "yes", "on"})
_OFF = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The environment, read once. ``cache_dir`` is None when no folder can be named (a user without a home)."""

    backend: str = "auto"
    cache_dir: Path | None = None
    cache_readonly: bool = False
    cache_disabled: bool = False
    tuned_tiles_disabled: bool = False
    save_source: Path | None = None
    record_kernels: Path | None = None
    commit: str = ""
    debug: bool = False

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read ``environ`` (default ``os.environ``).

        Raises:
            ConstructionError: a value that is not allowed; the message names the variable and what it may be.
        """
        environ = os.environ if environ is None else environ
        backend = _text(environ, "BACKEND", "auto").lower()
        if backend not in _BACKENDS:
            raise ConstructionError(f"{PREFIX}BACKEND={backend!r}: allowed are {', '.join(_BACKENDS)}")
        cache_dir = _text(environ, "CACHE_DIR", "")
        save_source = _text(environ, "SAVE_SOURCE", "")
        record_kernels = _text(environ, "RECORD_KERNELS", "")
        _warn_of_unknown(environ)
        return cls(
            backend=backend,
            cache_dir=Path(cache_dir).expanduser() if cache_dir else default_cache_dir(environ),
            cache_readonly=_switch(environ, "CACHE_READONLY"),
            cache_disabled=_switch(environ, "DISABLE_CACHE"),
            tuned_tiles_disabled=_switch(environ, "DISABLE_TUNED"),
            save_source=Path(save_source).expanduser() if save_source else None,
            record_kernels=Path(record_kernels).expanduser() if record_kernels else None,
            commit=_text(environ, "COMMIT", ""),
            debug=_switch(environ, "DEBUG"),
        )


@cache
def settings() -> Settings:
    """The settings of this process. ``settings.cache_clear()`` makes the next call read the environment again."""
    return Settings.from_environ()


def default_cache_dir(environ: Mapping[str, str]) -> Path | None:
    """The user's cache folder of this package; None where the user has no home."""
    base = environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    if not base:
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError:
            return None
    return Path(base) / "atomr-accel-flashattn"


def _warn_of_unknown(environ: Mapping[str, str]) -> None:
    known = {*VARIABLES.values(), *(PREFIX + name for name in _OF_TESTS)}
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known:
            from difflib import get_close_matches

            (nearest,) = get_close_matches(name, VARIABLES.values(), n=1, cutoff=0.0)
            warnings.warn(f"{name}: no such setting, so it changes nothing; the nearest one is {nearest}", SettingsWarning, stacklevel=2)


def _text(environ: Mapping[str, str], name: str, default: str) -> str:
    return environ.get(PREFIX + name, "").strip() or default


def _switch(environ: Mapping[str, str], name: str) -> bool:
    value = _text(environ, name, "0").lower()
    if value in _ON:
        return True
    if value in _OFF:
        return False
    raise ConstructionError(f"{PREFIX}{name}={value!r}: allowed are {', '.join(sorted(_ON))} and {', '.join(sorted(_OFF))}")
