"""Where every cached token stands: positions per sequence, padding, and rotary tables for stored frames.

One ``PositionTrack`` serves all layers of a cache. The decoder's pre-hook tells it about a forward
before any layer updates; layers then ask it for the rotation of any range of slots. A slot is an
index into the cache, equal for the whole batch; a position is what the rotary embedding was given.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_cache.artefact import SavedTensors, integer
from lowrank_cache.kernels.packed import RotaryFrames
from lowrank_cache.kernels.rope import angle_tables
from lowrank_cache.latents import GrowingTensor
from lowrank_cache.shapes import RopeShape, rope_buffer

PADDING = -1  # position recorded for a padding slot; its keys are masked, only finiteness matters


class PositionTrack:
    """Positions of all cached slots, ``[batch, slots]`` int32, and what follows from them.

    Rotary frames of ``frame_length`` slots start at ``first_frame_slot``; slots before it are never encoded.
    """

    def __init__(self, frame_length: int, first_frame_slot: int):
        self.frame_length = frame_length
        self.first_frame_slot = first_frame_slot
        self.clear()

    def clear(self) -> None:
        self._positions = GrowingTensor(axis=1, min_room=64)
        self._next: Tensor | None = None  # [batch], the position that must come next in each sequence
        self.first_real: Tensor | None = None  # [batch], slot of each sequence's first real token; None: all 0
        self.all_alike = True  # all sequences have the same positions, so one table serves all
        self._segments: dict[str, list[tuple[int, Tensor]]] = {}  # inverse frequencies from a slot on
        self._frames: dict[tuple, RotaryFrames] = {}
        self._noted: set[str] = set()  # sources looked at in the current forward

    @property
    def slots(self) -> int:
        return self._positions.length

    @property
    def batch(self) -> int | None:
        return None if self._next is None else self._next.shape[0]

    def begin(
        self, batch: int, tokens: int, position_ids: Tensor | None, attention_mask: Tensor | None, device
    ) -> None:
        """Take in the tokens of a forward, before any layer sees them.

        Args:
            batch, tokens: Of this forward's input.
            position_ids: ``[1 or batch, tokens]``, or None for consecutive ones.
            attention_mask: ``[batch, slots + tokens]``, zero for padding, or None for none. A mask that
                is not two-dimensional says nothing about padding and is ignored here.
            device: Where the positions are kept.

        Raises:
            ValueError: If there are no tokens, the batch changed, or positions do not continue each
                sequence's last one. The track is unchanged then.
        """
        if tokens == 0:
            raise ValueError("input_ids must hold at least one token for a LowRankCache, got 0")
        if self.batch not in (None, batch):
            raise ValueError(
                f"batch size must be {self.batch}, that of the cached tokens, got {batch}; "
                "use cache.batch_repeat_interleave or batch_select_indices to change it"
            )
        if position_ids is None:
            position_ids = torch.arange(self.slots, self.slots + tokens, device=device)[None]
        if position_ids.dim() != 2 or position_ids.shape[1] != tokens or position_ids.shape[0] not in (1, batch):
            raise ValueError(f"position_ids must have shape [1 or {batch}, {tokens}], got {list(position_ids.shape)}")
        positions = position_ids.to(device).expand(batch, tokens)
        real = torch.ones_like(positions, dtype=torch.bool)
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            real = attention_mask[:, -tokens:].to(device).bool()
        past = torch.full((batch,), PADDING, device=device) if self._next is None else self._next
        following = self._following(positions, real, past)
        self._mark_first_real(real)
        recorded = torch.where(real, positions, PADDING).to(torch.int32)
        if self.all_alike and batch > 1:
            self.all_alike = bool((recorded == recorded[:1]).all())
        self._positions.append(recorded)
        self._next = following
        self.end()

    def _following(self, positions: Tensor, real: Tensor, past: Tensor) -> Tensor:
        """The position that must come after this forward in each sequence; raises if the forward is wrong."""
        nth_real = real.long().cumsum(1)  # 1 at a sequence's first real token
        first = positions.gather(1, real.long().argmax(1, keepdim=True))[:, 0]
        start = torch.where(past == PADDING, first, past)  # a sequence of padding so far may start anywhere
        expected = start[:, None] + nth_real - 1
        wrong = real & (positions != expected)
        if bool(wrong.any()):
            number, token = (int(index) for index in wrong.nonzero()[0])
            found, needed = int(positions[number, token]), int(expected[number, token])
            raise ValueError(
                f"position_ids must continue the cached tokens: sequence {number} must have position "
                f"{needed} at token {token} of this forward, got {found}. "
                "A cache can only go on with the sequence it holds; call cache.reset() to start another"
            )
        return torch.where(nth_real[:, -1] > 0, start + nth_real[:, -1], past)

    def _mark_first_real(self, real: Tensor) -> None:
        start = self.slots
        if self.first_real is None:
            # Rows that began with a real token at slot 0 stay so: later padding moves no sink.
            if start > 0 or bool(real[:, 0].all()):
                return
            self.first_real = torch.zeros(real.shape[0], dtype=torch.long, device=real.device)
        found = torch.where(real.any(1), start + real.long().argmax(1), start + real.shape[1])
        self.first_real = torch.where(self.first_real >= start, found, self.first_real)

    def note_frequencies(self, decoder: nn.Module, rope: RopeShape, start: int) -> None:
        """Remember the inverse frequencies with which the keys from slot ``start`` on were rotated.

        To be called when a layer updates: a dynamic rotary embedding changes them inside the forward.
        """
        segments = self._segments.setdefault(rope.source, [])
        if rope.source in self._noted or (segments and not rope.dynamic):
            return
        self._noted.add(rope.source)
        current = rope_buffer(decoder, rope.source).detach().float().clone()
        if not segments or not torch.equal(segments[-1][1].to(current.device), current):
            segments.append((start, current))

    def frames(self, rope: RopeShape, start: int, stop: int, device: torch.device) -> RotaryFrames:
        """How slots ``start`` to ``stop`` are rotated: by frame, or by token if they are not cut into whole frames.

        That is so where a dynamic rotary embedding has changed its frequencies, which ends a frame early. One
        table serves batch elements that all have equal positions.
        """
        key = (rope, start, stop, device)
        if key not in self._frames:
            whole = len(self._segments[rope.source]) == 1 and start == self.first_frame_slot
            length = self.frame_length if whole else 1
            cos, sin = self._tables(self._segments[rope.source], start, stop, length)
            self._frames[key] = RotaryFrames(cos.to(device), sin.to(device), length, rope.layout)
        return self._frames[key]

    def _tables(self, segments: list[tuple[int, Tensor]], start: int, stop: int, step: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[1 or batch, slots, rotary_dim / 2]`` float32 of the frames of every ``step``-th slot."""
        positions = self._positions.view()
        if self.all_alike:
            positions = positions[:1]
        edges = [begin for begin, _ in segments[1:]] + [stop]
        parts = []
        for (begin, inv_freq), end in zip(segments, edges, strict=True):
            low, high = max(start, begin), min(stop, end)
            if low < high:
                slots = torch.arange(low, high, step, device=positions.device)
                frames = slots - (slots - self.first_frame_slot) % self.frame_length
                frames = frames.clamp_(min=begin)  # a frame ends where the frequencies change
                parts.append(angle_tables(positions[:, frames], inv_freq))
        cos, sin = (torch.cat(tables, dim=1) for tables in zip(*parts, strict=True))
        return cos, sin

    def real_after_sinks(self, start: int, stop: int, sinks: int) -> Tensor:
        """``[batch, stop - start]`` bool: neither padding nor one of its sequence's first ``sinks`` tokens."""
        real = self._positions.view(start, stop) != PADDING
        first = 0 if self.first_real is None else self.first_real[:, None].to(real.device)
        return real & (torch.arange(start, stop, device=real.device) >= first + sinks)

    def end(self) -> None:
        """Drop what served one forward; its tables are as large as one head's dense keys."""
        self._frames.clear()
        self._noted.clear()

    def truncate(self, slots: int) -> None:
        """Forget all but the first ``slots`` slots."""
        self.end()
        if slots == 0:
            self.clear()
            return
        self._positions.truncate(slots)
        last = self._positions.view().max(1).values.long()
        self._next = torch.where(last == PADDING, last, last + 1)
        for segments in self._segments.values():
            while segments and segments[-1][0] >= slots:
                segments.pop()

    def save(self, into: SavedTensors) -> dict[str, Any]:
        """Add positions and frequencies; returns the slots from which each set of frequencies holds."""
        into.add("positions", self._positions.view())
        for source, segments in self._segments.items():
            for nth, (_, inv_freq) in enumerate(segments):
                into.add(f"frequencies.{source}.{nth}", inv_freq)
        return {source: [start for start, _ in segments] for source, segments in self._segments.items()}

    def load(
        self,
        saved: SavedTensors,
        segments: Mapping[str, list[int]],
        batch: int,
        slots: int,
        ropes: Iterable[RopeShape],
        device: torch.device,
    ) -> None:
        """Take what ``save`` added, and returned as ``segments``; ValueError if it does not fit itself or ``ropes``."""
        positions = saved.take("positions", (batch, slots), torch.int32, device)
        real = positions != PADDING
        order = torch.where(real, positions - real.int().cumsum(1), 0)
        first = order.gather(1, real.int().argmax(1, keepdim=True))
        if bool((positions < PADDING).any() or (real & (order != first)).any()):
            raise ValueError("positions must be consecutive in each sequence, but for padding")
        widths = {rope.source: rope.rotary_dim // 2 for rope in ropes}
        if set(segments) != set(widths):
            raise ValueError(f"frequencies must be of {sorted(widths)}, got {sorted(segments)}")
        for source, starts in segments.items():
            starts = [integer(start, f"frequencies.{source}", 0, slots - 1) for start in starts]
            if not starts or starts[0] or any(later <= earlier for earlier, later in pairwise(starts)):
                raise ValueError(f"frequencies.{source} must begin at slot 0 and change in rising slots, got {starts}")
            self._segments[source] = [
                (start, saved.take(f"frequencies.{source}.{nth}", (widths[source],), torch.float32, device))
                for nth, start in enumerate(starts)
            ]
        self._mark_first_real(real)
        self._positions.adopt(positions)
        last = positions.max(1).values.long()
        self._next = torch.where(last == PADDING, last, last + 1)
        self.all_alike = bool((positions == positions[:1]).all())

    def map_batch(self, function) -> None:
        """Apply a change of the batch axis, e.g. ``lambda states: states[indices]``."""
        self.end()
        self._positions.map_batch(function)
        if self._next is not None:
            self._next = function(self._next)
        if self.first_real is not None:
            self.first_real = function(self.first_real)

    @property
    def nbytes(self) -> int:
        """Bytes of positions, starts, frequencies and, inside a forward, rotary tables."""
        held = [tensor for tensor in (self._next, self.first_real) if tensor is not None]
        held += [inv_freq for segments in self._segments.values() for _, inv_freq in segments]
        held += [table for frames in self._frames.values() for table in frames.tables()]
        return self._positions.nbytes + sum(tensor.nbytes for tensor in held)
