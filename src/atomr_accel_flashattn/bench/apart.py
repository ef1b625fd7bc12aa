"""Work in a fresh process, so that a kernel of another library that takes the device or the process down does not end the run."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, Final

from .peers import first_line

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["Died", "said_apart"]

_SAID, _DONE, _FAILED = "said", "done", "failed"
_EXIT_SECONDS: Final = 10.0  # for a process that is done to end by itself


class Died(Exception):  # noqa: N818 - an outcome that callers plan for
    """A process did not finish its work; the text says why."""


def said_apart(work: Callable[..., None], *arguments: Any, patience: Callable[[int], float]) -> Iterator[Any]:
    """What ``work(say, *arguments)`` says in a fresh process, message by message. Leaving the iteration kills the process.

    Args:
        work: a function of a module; it and its arguments are pickled, as is what it says.
        arguments: behind ``say``.
        patience: seconds to wait for the next message, by the number of those that came.

    Raises:
        Died: the work raised, the process ended before it was done, or it was silent for too long.
    """
    context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, work, arguments), daemon=True)
    process.start()
    theirs.close()
    came = 0
    try:
        while True:
            if not ours.poll(patience(came)):
                raise Died(f"no answer in {patience(came):g} s")
            try:
                kind, what = ours.recv()
            except EOFError:
                process.join(_EXIT_SECONDS)
                raise Died(f"the process ended with status {process.exitcode}") from None
            if kind == _FAILED:
                raise Died(what)
            if kind == _DONE:
                process.join(_EXIT_SECONDS)
                return
            came += 1
            yield what
    finally:
        process.kill()
        process.join()
        ours.close()


def _run(pipe: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        with redirect_stdout(sys.stderr):  # the parent's output may be JSON
            work(lambda what: pipe.send((_SAID, what)), *arguments)
    except Exception as error:  # noqa: BLE001 - the parent is told, and decides
        traceback.print_exc()
        pipe.send((_FAILED, first_line(error)))
    else:
        pipe.send((_DONE, None))
