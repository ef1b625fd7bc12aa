"""BlockAllocator: which pages are free, and how many sequences hold each of the others."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import OutOfBlocksError

__all__ = ["BlockAllocator"]


class BlockAllocator:
    """Numbers 0..blocks - 1, each held by as many holders as it has been given to. Those freed last are given out first."""

    __slots__ = ("_free", "_holders")

    def __init__(self, blocks: int) -> None:
        self._free = list(range(blocks - 1, -1, -1))
        self._holders = [0] * blocks

    @property
    def free(self) -> int:
        """How many are free."""
        return len(self._free)

    def holders(self, block: int) -> int:
        """How many hold a block."""
        return self._holders[block]

    def check(self, count: int) -> None:
        """Raise OutOfBlocksError unless ``count`` are free."""
        if count > len(self._free):
            raise OutOfBlocksError(
                f"blocks: got {len(self._free)} free of {len(self._holders)} and a need for {count}; "
                "allowed is what is free; free a sequence, or make a larger cache; nothing has been written"
            )

    def take(self, count: int) -> list[int]:
        """Hold ``count`` free blocks.

        Raises:
            OutOfBlocksError: there are fewer; none has been taken.
        """
        self.check(count)
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that somebody else holds, too."""
        for block in blocks:
            self._holders[block] += 1

    def give_back(self, blocks: Iterable[int]) -> None:
        """Hold them no more; those that nobody holds are free."""
        for block in blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)
