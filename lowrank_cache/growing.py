"""A tensor that grows along one axis without copying itself at every append."""

import torch
from torch import Tensor

__all__ = ["GrowingTensor", "is_read_only"]


class GrowingTensor:
    """Rows appended along ``axis``, held in a buffer with some unused room.

    A full buffer is replaced by one with room for ``max(min_room, rows / 8)`` more rows, so copying
    costs O(1) a row, and at most one part in nine of the buffer is unused. Doubling would halve every
    compression ratio that this library reports.

    Args:
        axis: The axis that grows.
        min_room: Least number of rows to add when the buffer is replaced.
    """

    def __init__(self, axis: int, min_room: int):
        self.axis = axis
        self.min_room = max(1, min_room)
        self.rows = 0
        self.buffer: Tensor | None = None
        self._reserved = 0
        self._final = False
        self.copied_bytes = 0  # by replacing buffers, not by appending

    def append(self, block: Tensor) -> None:
        """Add ``block`` at the end; dtype, device and other axes follow the first block."""
        added = block.shape[self.axis]
        if self.buffer is None or self.rows + added > self.buffer.shape[self.axis] or is_read_only(self.buffer):
            self.buffer = self._grown(block, added)
        self.buffer.narrow(self.axis, self.rows, added).copy_(block)
        self.rows += added

    def reserve(self, rows: int, *, final: bool = False) -> None:
        """Expect ``rows`` rows in all, so that appending them piece by piece copies at most once.

        ``final``: none will follow, so that a new buffer needs no room for more.
        """
        self._reserved, self._final = rows, final

    def _grown(self, block: Tensor, added: int) -> Tensor:
        shape = list(block.shape)
        needed = max(self.rows + added, self._reserved)
        # A first block that fills its buffer exactly (a long prompt) leaves room for what follows.
        shape[self.axis] = needed + (0 if self._final else max(self.min_room, needed // 8))
        buffer = block.new_empty(shape)
        if self.rows:
            buffer.narrow(self.axis, 0, self.rows).copy_(self._count(self.view()))
        return buffer

    def _count(self, copied: Tensor) -> Tensor:
        self.copied_bytes += copied.numel() * copied.element_size()
        return copied

    def adopt(self, rows: Tensor) -> None:
        """Hold ``rows``, whose memory becomes the buffer, instead of what was appended."""
        self.buffer, self.rows = rows, rows.shape[self.axis]

    def view(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` as a view of the buffer; only after a first append."""
        if self.buffer is None:
            raise RuntimeError("nothing was appended yet, so shape and dtype of a view are unknown")
        stop = self.rows if stop is None else stop
        return self.buffer.narrow(self.axis, start, stop - start)

    def truncate(self, rows: int) -> None:
        """Keep the first ``rows`` rows; a buffer that is then mostly unused is given back."""
        self.rows = min(self.rows, rows)
        # Twice the room of a new buffer: speculative decoding appends and crops in turn, and must not copy each time.
        most = self.rows + 2 * max(self.min_room, self.rows // 8)
        if self.rows == 0:
            self.buffer = None
        elif self.buffer is not None and self.buffer.shape[self.axis] > most:
            self.buffer = self._count(self.view()).clone()

    def map_batch(self, function) -> None:
        """Replace the buffer by ``function(buffer)``, which may change the batch axis only."""
        if self.buffer is not None:
            self.buffer = function(self.buffer)

    @property
    def nbytes(self) -> int:
        """Bytes the buffer occupies, unused room included."""
        return 0 if self.buffer is None else self.buffer.numel() * self.buffer.element_size()


def is_read_only(tensor: Tensor) -> bool:
    """Whether ``tensor`` was made in ``torch.inference_mode`` and may not be written outside of it."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()
