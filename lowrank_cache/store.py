"""Keys, values or both of one layer group in the cache: sinks, latents and window.

Slots of every layer lie in three parts: slots before ``num_sink_tokens`` exist only as exact sink
tokens, slots up to ``encoded_end`` as latents shared by the group, the rest exactly in each layer's
window. In a padded row the sinks are its first real tokens, wherever they stand; they are kept
beside the latents and overlay them on reading. See docs/cache_contract.md, "Slots".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_cache.growing import GrowingTensor, is_read_only
from lowrank_cache.kernels.api import encode, triton_serves
from lowrank_cache.kernels.packed import LatentSide, PackedTier
from lowrank_cache.kernels.rope import rotate
from lowrank_cache.latents import Coder, PackedLatents
from lowrank_cache.positions import PositionTrack
from lowrank_cache.saved_tensors import SavedTensors, whole_number
from lowrank_cache.view import StoredSide

__all__ = ["LatentStore", "StoreOptions"]

_ENCODE_TOKENS = 1024  # encode a long prompt in pieces: their float32 copies stay smaller than the prompt's states


@dataclass(frozen=True)
class StoreOptions:
    """Sizes that all stores of a cache share, in tokens, and the dtype of 16-bit latents."""

    residual_length: int
    num_sink_tokens: int
    block_size: int
    latent_dtype: torch.dtype | None


class LatentStore:
    """The states of a layer group's keys, values or both, all rows of a batch.

    A member is the keys or the values of one layer; ``coder.members`` numbers them in the order in which
    a forward updates them.

    Args:
        coder: Their truncated bases.
        track: The cache's positions.
        options: Sizes.
    """

    def __init__(self, coder: Coder, track: PositionTrack, options: StoreOptions):
        self.coder = coder
        self.track = track
        self.options = options
        self.clear()

    def clear(self) -> None:
        members = len(self.coder.members)
        self.encoded_end = self.options.num_sink_tokens
        self.lengths = [0] * members
        self.sinks: list[Tensor | None] = [None] * members
        self.windows = [self._new_window() for _ in range(members)]
        self.pending: list[Tensor | None] = [None] * members  # window and new states of a group that will encode
        self.latents: PackedLatents | None = None
        self._read: Tensor | None = None  # latents as read in the current forward, until its last member
        # Views of the latents, for the current forward; copies for layers that lie on other devices than the last.
        self._tiers: dict[torch.device, tuple[PackedTier, ...]] = {}
        self._impl = "torch"
        self._before: tuple | None = None  # state before the current forward, for `rollback`

    def _new_window(self) -> GrowingTensor:
        return GrowingTensor(axis=2, min_room=self.options.block_size)

    def update(self, member: int, states: Tensor) -> Tensor:
        """Take in new states of one member and return all of its states.

        Args:
            member: Its number in ``coder.members``.
            states: ``[batch, heads, new_tokens, head_dim]``, post-RoPE, detached.

        Returns:
            ``[batch, heads, tokens, head_dim]``, dtype of ``states``: past tokens as they are stored,
            new ones exact.
        """
        everything = states if self.lengths[member] == 0 else self._assemble(member, states)
        self._take_in(member, states)
        self._encode_if_last(member)
        return everything

    def extend(self, member: int, states: Tensor) -> StoredSide:
        """``update`` that rebuilds nothing: past tokens come back as they are stored."""
        latents = self._latent_side(member, states.device)
        self._take_in(member, states)
        pending, window, sinks = self.pending[member], self.windows[member], self.sinks[member]
        if pending is not None:
            tail = pending
        else:
            tail = window.view() if window.rows else states[:, :, :0]
        kept = states[:, :, :0] if sinks is None else sinks[:, :, : self.lengths[member]]
        self._encode_if_last(member)
        return StoredSide(kept, latents, tail)

    @property
    def attendable(self) -> bool:
        """Whether ``extend`` can take the place of ``update``: latents have channels, and one basis for all rows."""
        return self.coder.rank > 0

    def sink_slots(self, device: torch.device) -> Tensor | None:
        """``[batch, num_sink_tokens]``, the slot of every row's sinks; None if those are all rows' first slots."""
        first_real = self.track.first_real
        if first_real is None or self.options.num_sink_tokens == 0:
            return None
        return first_real.to(device)[:, None] + torch.arange(self.options.num_sink_tokens, device=device)

    def _take_in(self, member: int, states: Tensor) -> None:
        """Put new states into sinks and window, or, if there will be something to encode, with the window aside."""
        past = self.lengths[member]
        self._keep_sinks(member, states, past)
        inside = states[:, :, max(0, self.options.num_sink_tokens - past) :]
        window = self.windows[member]
        if not self._encodes(window.rows + inside.shape[2]):
            if inside.shape[2]:
                window.append(inside)
        else:
            self.pending[member] = torch.cat([window.view(), inside], dim=2) if window.rows else inside
        self.lengths[member] = past + states.shape[2]

    def _encode_if_last(self, member: int) -> None:
        """When every member of the forward is there, encode what waits."""
        if member == len(self.lengths) - 1:
            self._read = None
            if self.pending[member] is not None:
                self._encode_pending()

    def _latent_side(self, member: int, device: torch.device) -> LatentSide | None:
        """The latents and what reads one member of them, on the device of that member's layer."""
        if self.latents is None or not self.latents.tokens:
            return None
        self.coder.to(self.latents.codes[0].view().device)
        if device not in self._tiers:  # every member of the forward reads the same latents
            self._tiers[device] = tuple(tier.to(device) for tier in self.latents.views())
        rope = self.coder.shapes[member].rope
        frames = None
        if rope is not None:
            frames = self.track.frames(rope, self.options.num_sink_tokens, self.encoded_end, device)
        up_proj, constant = self.coder.reading(member, device)
        return LatentSide(self._tiers[device], up_proj, constant, frames)

    def _encodes(self, waiting: int) -> bool:
        """Whether a window of ``waiting`` tokens, new ones included, gives away its oldest block."""
        return waiting >= self.options.residual_length + self.options.block_size

    def _last_encoding(self) -> bool:
        """Whether no tokens will be encoded after those that are now."""
        return False

    def _encode_pending(self) -> None:
        options = self.options
        pending = [dense for dense in self.pending if dense is not None]  # of every member
        waiting = pending[0].shape[2]
        # While the window holds residual_length + block_size tokens, its oldest block_size are encoded.
        encoded = (waiting - options.residual_length) // options.block_size * options.block_size
        if self.latents is None:
            dtype = options.latent_dtype or pending[0].dtype
            self.latents = PackedLatents(self.coder.tiers, dtype, options.block_size)
        self.latents.reserve(self.latents.tokens + encoded, final=self._last_encoding())
        for start in range(0, encoded, _ENCODE_TOKENS):
            stop = min(start + _ENCODE_TOKENS, encoded)
            self._encode(self.latents, self._gathered(pending, start, stop))
        for member, dense in enumerate(pending):
            # A new window, not a shifted one: `rollback` still needs the old one.
            self.windows[member] = self._new_window()
            if waiting > encoded:
                self.windows[member].append(dense[:, :, encoded:])
        self.pending = [None] * len(self.pending)

    @staticmethod
    def _gathered(pending: list[Tensor], start: int, stop: int) -> list[Tensor]:
        """Tokens of every member as float32, on the device of the last one: latents of a group lie in one place."""
        return [dense[:, :, start:stop].to(pending[-1].device, torch.float32) for dense in pending]

    def _encode(self, latents: PackedLatents, states: list[Tensor]) -> None:
        """Append the latents of the next slots: by member ``[batch, heads, tokens, head_dim]`` float32, post-RoPE."""
        stop = self.encoded_end + states[0].shape[2]
        self.coder.to(states[0].device)
        if self.attendable and triton_serves(self._impl, states[0].device, {part.shape[3] for part in states}):
            down_proj = self.coder.only_down_proj
            if down_proj is not None:
                latents.extend(self._encoded_by_kernels(states, down_proj, latents.latent_dtype, stop))
                self.encoded_end = stop
                return
        encoded = self.coder.encode(self._framed(states, self.encoded_end))
        if not bool(torch.isfinite(encoded).all()):
            raise ValueError(f"{self.coder.name} must be finite, got NaN or infinity: the forward overflowed")
        latents.append(encoded, self.coder.weight)
        self.encoded_end = stop

    def _encoded_by_kernels(
        self, states: list[Tensor], down_proj: Tensor, dtype: torch.dtype, stop: int
    ) -> tuple[PackedTier, ...]:
        frames = [
            None if shape.rope is None else self.track.frames(shape.rope, self.encoded_end, stop, states[0].device)
            for shape in self.coder.shapes
        ]
        coder = self.coder
        try:
            return encode(states, coder.constants, frames, down_proj, coder.tiers, coder.weight, dtype, impl=self._impl)
        except ValueError as error:
            raise ValueError(f"{coder.name}: {error}") from error

    def _framed(self, states: list[Tensor], start: int) -> list[Tensor]:
        """States of the slots from ``start`` on, by member, rotated from their positions into their frames."""
        framed = []
        for part, shape in zip(states, self.coder.shapes, strict=True):
            if shape.rope is not None:
                cos, sin = self.track.rotation(shape.rope, start, start + part.shape[2], part.device)
                part = rotate(part, cos, sin, shape.rope.layout, inverse=True)
            framed.append(part)
        return framed

    def _assemble(self, member: int, states: Tensor) -> Tensor:
        """Past states as they are stored, then ``states``, in one new tensor."""
        past, sinks = self.lengths[member], self.options.num_sink_tokens
        batch, heads, tokens, head_dim = states.shape
        everything = states.new_empty(batch, heads, past + tokens, head_dim)
        everything[:, :, past:] = states
        if self.windows[member].rows:
            everything[:, :, self.encoded_end : past] = self.windows[member].view()
        if self.latents is not None and self.latents.tokens:
            everything[:, :, sinks : self.encoded_end] = self._reconstruct(self.latents, member, states)
        kept, slots = self.sinks[member], self.sink_slots(states.device)
        if kept is None:  # there are no sink tokens
            return everything
        if slots is None:
            everything[:, :, : min(sinks, past)] = kept[:, :, :past]
        else:
            everything[:, :, : min(sinks, past)] = 0
            row, nth, slot = self._sinks_between(slots, 0, past)
            everything[row, :, slot] = kept[row, :, nth]
        return everything

    def _reconstruct(self, packed: PackedLatents, member: int, new: Tensor, start: int = 0) -> Tensor:
        """Encoded tokens of one member from ``start`` on, ``[batch, heads, tokens, head_dim]`` float32, post-RoPE.

        They come on the device of the latents.

        ``new``: the states of the forward; bfloat16 ones, and float16 ones on a GPU, lend their dtype to the
        product.
        """
        if self._read is None:  # every member of the forward reads the same latents
            if packed.codes:
                self.coder.to(packed.codes[0].view().device)
            if self.coder.rank:
                self._read = packed.read(start)
            else:  # nothing is stored: every token is read as the calibration mean
                self._read = self.coder.weight.new_empty(new.shape[0], packed.tokens - start, 0)
        fast = new.dtype == torch.bfloat16 or (new.dtype == torch.float16 and new.is_cuda)
        states = self.coder.decode(self._read, member, new.dtype if fast else torch.float32)
        rope = self.coder.shapes[member].rope
        if rope is not None:
            begin = self.options.num_sink_tokens + start
            cos, sin = self.track.rotation(rope, begin, self.encoded_end, states.device)
            states = rotate(states, cos, sin, rope.layout)
        return states

    def _keep_sinks(self, member: int, states: Tensor, past: int) -> None:
        sinks = self.options.num_sink_tokens
        if sinks == 0:
            return
        kept, slots = self.sinks[member], self.sink_slots(states.device)
        if kept is None:
            batch, heads, _, head_dim = states.shape
            kept = states.new_zeros(batch, heads, sinks, head_dim)
        elif is_read_only(kept):
            kept = kept.clone()
        self.sinks[member] = kept
        if slots is None:
            if past < sinks:
                new = min(sinks - past, states.shape[2])
                kept[:, :, past : past + new] = states[:, :, :new]
        else:
            row, nth, slot = self._sinks_between(slots, past, past + states.shape[2])
            kept[row, :, nth] = states[row, :, slot - past]

    @staticmethod
    def _sinks_between(slots: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row, number and slot of every sink token of ``sink_slots`` that stands in slots ``start`` to ``stop``."""
        row, nth = ((slots >= start) & (slots < stop)).nonzero(as_tuple=True)
        return row, nth, slots[row, nth]

    def begin(self, impl: str = "torch") -> None:
        """Note the state before a forward, so that `rollback` can return to it; ``impl``: kernels that encode."""
        self._impl = impl
        self._read, self._tiers = None, {}
        windows = [(window, window.rows) for window in self.windows]
        tokens = 0 if self.latents is None else self.latents.tokens
        self._before = (list(self.lengths), self.encoded_end, tokens, windows)

    def commit(self) -> None:
        """The forward ended well: let go of what `rollback` would need."""
        self._before, self._tiers = None, {}

    def rollback(self) -> None:
        """Undo the current forward. Sinks need no undoing: those past the length are written again."""
        self._read, self._tiers = None, {}
        if self._before is None:
            return
        self.lengths, self.encoded_end, tokens, windows = self._before
        if self.lengths[0] == 0:
            self.clear()  # the next forward may bring another batch or dtype
            return
        for window, rows in windows:
            window.truncate(rows)
        self.windows = [window for window, _ in windows]
        self.pending = [None] * len(self.pending)
        if self.latents is not None:
            self.latents.truncate(tokens)
        self._before = None

    def truncate(self, tokens: int) -> None:
        """Keep the first ``tokens`` slots; a window cropped away refills before anything is encoded."""
        if tokens == 0:
            self.clear()
            return
        kept = max(tokens - self.encoded_end, 0)
        for window in self.windows:
            window.truncate(kept)
        self.encoded_end = max(min(self.encoded_end, tokens), self.options.num_sink_tokens)
        if self.latents is not None:
            self.latents.truncate(self.encoded_end - self.options.num_sink_tokens)
        self.lengths = [min(length, tokens) for length in self.lengths]

    def save(self, into: SavedTensors, name: str) -> dict[str, Any]:
        """Put down what is stored, between forwards; returns how many tokens are latents."""
        for member, (sinks, window) in enumerate(zip(self.sinks, self.windows, strict=True)):
            if sinks is not None:
                into.put(f"{name}.sinks.{member}", sinks)
            if window.rows:
                into.put(f"{name}.window.{member}", window.view())
        if self.latents is not None:
            self.latents.save(into, name)
        return {"encoded": self.encoded_end - self.options.num_sink_tokens}

    def load(self, saved: SavedTensors, name: str, facts: Mapping[str, Any], likes: list[Tensor]) -> None:
        """Take up what ``save`` put down, after the track has its positions.

        Args:
            likes: By member, a tensor of the dtype and on the device of the states it is given.

        Raises:
            ValueError: If a tensor is missing, or numbers, shapes or dtypes do not fit this store.
        """
        batch, slots, sinks = self.track.batch or 0, self.track.slots, self.options.num_sink_tokens
        encoded = whole_number(facts["encoded"], f"{name}.encoded", most=max(0, slots - sinks))
        self.encoded_end, self.lengths = sinks + encoded, [slots] * len(self.lengths)
        waiting = max(0, slots - self.encoded_end)
        for member, (shape, like) in enumerate(zip(self.coder.shapes, likes, strict=True)):
            for part, tokens in (("sinks", sinks), ("window", waiting)):
                if tokens:
                    size = (batch, shape.heads, tokens, shape.head_dim)
                    states = saved.take(f"{name}.{part}.{member}", size, like.dtype, like.device)
                    if part == "sinks":
                        self.sinks[member] = states
                    else:
                        self.windows[member].adopt(states)
        if encoded:
            dtype = self.options.latent_dtype or likes[0].dtype
            self.latents = PackedLatents(self.coder.tiers, dtype, self.options.block_size)
            self.latents.load(saved, name, batch, encoded, likes[-1].device)

    def map_batch(self, function) -> None:
        """Apply a change of the batch axis, e.g. ``lambda rows: rows[indices]``, to everything stored."""
        self.sinks = [None if sink is None else function(sink) for sink in self.sinks]
        for window in self.windows:
            window.map_batch(function)
        if self.latents is not None:
            self.latents.map_batch(function)

    @property
    def nbytes(self) -> int:
        """Bytes of latents, sinks and windows, unused room included."""
        sinks = sum(sink.numel() * sink.element_size() for sink in self.sinks if sink is not None)
        held = {id(window): window for window in self.windows}
        if self._before is not None:  # inside a forward, or after one that failed
            held.update((id(window), window) for window, _ in self._before[3])
        windows = sum(window.nbytes for window in held.values())
        pending = sum(dense.numel() * dense.element_size() for dense in self.pending if dense is not None)
        return sinks + windows + pending + (0 if self.latents is None else self.latents.nbytes)
