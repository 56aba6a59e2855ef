"""The encoded tokens of one store: packed latents, in tensors that grow without copying themselves at every append."""

import torch
from torch import Tensor

from lowrank_cache.artefact import SavedTensors
from lowrank_cache.kernels.packed import PackedTier, row_length


class GrowingTensor:
    """A tensor appended to along ``axis``, held in a buffer with some unused room, in the widest dtype that came.

    A full buffer is replaced by one that is longer by ``max(min_room, length / 8)``, so copying
    costs O(1) an entry, and at most one part in nine of the buffer is unused. Doubling would halve every
    compression ratio that this library reports.
    """

    def __init__(self, axis: int, min_room: int):
        self.axis = axis
        self.min_room = max(1, min_room)
        self.length = 0
        self.buffer: Tensor | None = None
        self._reserved = 0
        self._final = False

    def append(self, block: Tensor) -> None:
        """Add ``block`` at the end; device and other axes follow the first block."""
        added = block.shape[self.axis]
        needed = self.length + added
        dtype = block.dtype if self.buffer is None else torch.promote_types(self.buffer.dtype, block.dtype)
        held = self.buffer is not None and self.buffer.dtype == dtype and not is_read_only(self.buffer)
        if self.buffer is None or not held or needed > self.buffer.shape[self.axis]:
            shape, needed = list(block.shape), max(needed, self._reserved)
            # A first block that fills its buffer exactly (a long prompt) leaves room for what follows.
            shape[self.axis] = needed + (0 if self._final else max(self.min_room, needed // 8))
            buffer = block.new_empty(shape, dtype=dtype)
            if self.length:
                buffer.narrow(self.axis, 0, self.length).copy_(self.view())
            self.buffer = buffer
        self.buffer.narrow(self.axis, self.length, added).copy_(block)
        self.length += added

    def reserve(self, length: int, *, final: bool = False) -> None:
        """Expect ``length`` entries in all, so that appending them piece by piece copies at most once.

        ``final``: none will follow, so that a new buffer needs no room for more.
        """
        self._reserved, self._final = length, final

    def adopt(self, tensor: Tensor) -> None:
        """Hold ``tensor``, whose memory becomes the buffer, instead of what was appended."""
        self.buffer, self.length = tensor, tensor.shape[self.axis]

    def view(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries ``start`` to ``stop`` as a view of the buffer; only after a first append."""
        if self.buffer is None:
            raise RuntimeError("nothing was appended yet, so shape and dtype of a view are unknown")
        stop = self.length if stop is None else stop
        return self.buffer.narrow(self.axis, start, stop - start)

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` entries; a buffer that is then mostly unused is given back."""
        self.length = min(self.length, length)
        # Twice the room of a new buffer: speculative decoding appends and crops in turn, and must not copy each time.
        most = self.length + 2 * max(self.min_room, self.length // 8)
        if self.length == 0:
            self.buffer = None
        elif self.buffer is not None and self.buffer.shape[self.axis] > most:
            self.buffer = self.view().clone()

    def map_batch(self, function) -> None:
        """Replace the buffer by ``function(buffer)``, which may change the batch axis only."""
        if self.buffer is not None:
            self.buffer = function(self.buffer)

    @property
    def nbytes(self) -> int:
        """Bytes the buffer occupies, unused room included."""
        return 0 if self.buffer is None else self.buffer.nbytes


def is_read_only(tensor: Tensor) -> bool:
    """Whether ``tensor`` was made in ``torch.inference_mode`` and may not be written outside of it."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


class PackedLatents:
    """Latents of consecutive tokens, one tensor per tier, appended in blocks and never re-encoded.

    ``tiers`` are ``(bits, channels)`` in channel order, that of 16 bits in the floating ``latent_dtype``. Buffers grow
    by at least ``block_size`` tokens.
    """

    def __init__(self, tiers: tuple[tuple[int, int], ...], latent_dtype: torch.dtype, block_size: int):
        self.tiers = tiers
        self.latent_dtype = latent_dtype
        self.codes = [GrowingTensor(axis=1, min_room=block_size) for _ in tiers]
        self.steps = [GrowingTensor(axis=1, min_room=block_size) if bits < 16 else None for bits, _ in tiers]
        self.tokens = 0

    def reserve(self, tokens: int, *, final: bool = False) -> None:
        """Expect ``tokens`` tokens in all, and if ``final`` none after them."""
        for buffer in self.buffers():
            buffer.reserve(tokens, final=final)

    def append(self, tiers: tuple[PackedTier, ...], tokens: int) -> None:
        """Store ``tokens`` tokens as ``kernels.api.encode`` packed them."""
        for tier, codes, steps in zip(tiers, self.codes, self.steps, strict=True):
            codes.append(tier.codes)
            if steps is not None and tier.steps is not None:
                steps.append(tier.steps)
        self.tokens += tokens

    def views(self) -> tuple[PackedTier, ...]:
        """The tokens as they lie in the buffers; appending leaves these views as they are."""
        return tuple(
            PackedTier(bits, channels, codes.view(), None if steps is None else steps.view())
            for (bits, channels), codes, steps in zip(self.tiers, self.codes, self.steps, strict=True)
        )

    def save(self, into: SavedTensors, name: str) -> None:
        """Add the tokens as they are packed."""
        for tier, view in enumerate(self.views() if self.tokens else ()):
            into.add(f"{name}.codes.{tier}", view.codes)
            if view.steps is not None:
                into.add(f"{name}.steps.{tier}", view.steps)

    def load(self, saved: SavedTensors, name: str, batch: int, tokens: int, device: torch.device) -> None:
        """Take ``tokens`` tokens of ``batch`` sequences, as ``save`` added them; ValueError if they do not fit."""
        for tier, ((bits, channels), codes, steps) in enumerate(zip(self.tiers, self.codes, self.steps, strict=True)):
            row = row_length(bits, channels)
            dtype = self.latent_dtype if steps is None else torch.uint8
            codes.adopt(saved.take(f"{name}.codes.{tier}", (batch, tokens, row), dtype, device))
            if steps is not None:
                steps.adopt(saved.take(f"{name}.steps.{tier}", (batch, tokens), torch.float16, device))
        self.tokens = tokens

    def truncate(self, tokens: int) -> None:
        """Keep the first ``tokens`` tokens."""
        self.tokens = min(self.tokens, tokens)
        for buffer in self.buffers():
            buffer.truncate(self.tokens)

    def map_batch(self, function) -> None:
        for buffer in self.buffers():
            buffer.map_batch(function)

    def buffers(self) -> list[GrowingTensor]:
        return [*self.codes, *(steps for steps in self.steps if steps is not None)]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())
