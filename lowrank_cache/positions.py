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
from lowrank_cache.shapes import ONE_POSITION, PositionAxes, RopeShape, rope_buffer

_LOWEST = torch.finfo(torch.float32).min  # to which masks of float64 may be clamped
PADDING = -1  # position recorded for a padding slot; its keys are masked, only finiteness matters


class PositionTrack:
    """Positions of all cached slots, ``[batch, slots]`` int32, and what follows from them.

    Rotary frames of ``frame_length`` slots start at ``first_frame_slot``; slots before it are never encoded.
    With M-RoPE a token has a position on each of several ``axes``; they are kept, ``[batch, slots, axes]``, from the
    first forward on in which they differ. The one position is then the first of them.
    """

    def __init__(self, frame_length: int, first_frame_slot: int, axes: PositionAxes = ONE_POSITION):
        self.frame_length = frame_length
        self.first_frame_slot = first_frame_slot
        self.axes = axes
        self.clear()

    def clear(self) -> None:
        self._positions = GrowingTensor(axis=1, min_room=64)
        self._axes: GrowingTensor | None = None
        self._last: Tensor | None = None  # [batch], position in the last slot of each sequence
        self._last_on_axes: Tensor | None = None  # [batch], that on all axes, if they agree
        self.first_real: Tensor | None = None  # [batch], slot of each sequence's first real token; None: all 0
        # The last of the slots `first_real`; behind all slots while a sequence has no real token.
        self.latest_start = 0
        self.all_alike = True  # all sequences have the same positions, so one table serves all
        self._segments: dict[str, list[tuple[int, Tensor]]] = {}  # inverse frequencies from a slot on
        self._frames: dict[tuple, RotaryFrames] = {}
        self._noted: set[str] = set()  # sources looked at in the current forward
        self._hidden: Tensor | None = None  # [batch, 1, tokens, 1], which of the current forward's tokens are padding

    @property
    def slots(self) -> int:
        return self._positions.length

    @property
    def batch(self) -> int | None:
        return None if self._last is None else self._last.shape[0]

    def begin(
        self,
        batch: int,
        tokens: int,
        position_ids: Tensor | None,
        attention_mask: object,
        device: torch.device,
        use_cache: bool | None = None,
    ) -> None:
        """Take in the tokens of a forward, before any layer sees them.

        Args:
            batch, tokens: Of this forward's input.
            position_ids: ``[1 or batch, tokens]``, or None for consecutive ones. Of M-RoPE ``[axes, 1 or batch,
                tokens]``; a row before them serves the mask, and is not looked at.
            attention_mask: See ``visible_slots``.
            device: Where the positions are kept.
            use_cache: What the forward was asked, for messages.

        Raises:
            ValueError: If there are no tokens, the batch changed, the mask is too short, or a token does not follow
                the visible one before it. The track is unchanged then.
            NotImplementedError: If tokens have several positions, and it is not known what they turn.
        """
        if tokens == 0:
            cure = f": all {self.slots} are cached; call cache.crop(-1) to compute the last again" if self.slots else ""
            raise ValueError(f"input_ids must hold at least one token for a LowRankCache, got 0{cure}")
        if self.batch not in (None, batch):
            raise ValueError(
                f"batch size must be {self.batch}, that of the cached tokens, got {batch}; "
                "use cache.batch_repeat_interleave or batch_select_indices to change it"
            )
        if position_ids is None:
            position_ids = torch.arange(self.slots, self.slots + tokens, device=device)[None]
        positions, on_axes = self._split(position_ids, batch, tokens, device)
        free = None if on_axes is None else (on_axes != on_axes[..., :1]).any(-1)  # in images there is no order
        try:
            visible = visible_slots(attention_mask, self.slots, tokens)
            last = self._last if self._last_on_axes is None else self._last_on_axes
            real, before = self._real(visible, positions, last, free)
            wrong = self._out_of_order(positions, real if free is None else real & ~free, before)
            recorded = torch.where(real, positions, PADDING).to(torch.int32)
            # All that the host must know, in one transfer.
            facts = [~wrong.any(), real.all(), (recorded == recorded[:1]).all()]
            if on_axes is not None:
                facts += [(on_axes == positions[..., None]).all(), (on_axes == on_axes[:1]).all()]
            ordered, all_real, alike, *of_axes = map(bool, torch.stack(facts).cpu())
            if not ordered:
                raise ValueError(self._described(positions, wrong, before))
        except ValueError as error:
            raise ValueError(self._cause(positions, use_cache) or str(error)) from None
        self._mark_first_real(real)
        self.all_alike = self.all_alike and alike
        if on_axes is not None and (self._axes is not None or not of_axes[0]):
            self.all_alike = self.all_alike and of_axes[1]
            self._note_axes(torch.where(real[..., None], on_axes, PADDING).to(torch.int32))
        self._positions.append(recorded)
        self._last = recorded[:, -1].clone()
        self.end()
        self._hidden = None if all_real else ~real[:, None, :, None]

    def _split(
        self, position_ids: Tensor, batch: int, tokens: int, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """The one position of each token, ``[batch, tokens]``, and those on axes, ``[batch, tokens, axes]``, if any."""
        rows, count = position_ids.shape[0] if position_ids.dim() == 3 else 0, self.axes.count
        several = count > 1 and rows in (1, count, count + 1)
        if rows in (3, 4) and not several:
            if not bool((position_ids == position_ids[-1:]).all()):
                raise NotImplementedError(
                    "position_ids hold several positions for one token (M-RoPE with images or video) for a model whose "
                    "rotation by them is not understood; with text alone they are equal, and it works"
                )
            position_ids = position_ids[-1]
        one = position_ids[-min(rows, count)] if several else position_ids
        if one.dim() != 2 or one.shape[1] != tokens or one.shape[0] not in (1, batch):
            raise ValueError(f"position_ids must have shape [1 or {batch}, {tokens}], got {list(position_ids.shape)}")
        one = one.to(device).expand(batch, tokens)
        if several and rows > 1:
            return one, position_ids[-count:].to(device).expand(-1, batch, -1).movedim(0, -1)
        return one, None if self._axes is None else one[..., None].expand(-1, -1, count)

    def _note_axes(self, on_axes: Tensor) -> None:
        """Take in ``[batch, tokens, axes]`` of a forward; those of earlier slots were equal."""
        if self._axes is None:
            self._axes = GrowingTensor(axis=1, min_room=64)
            if self.slots:
                self._axes.append(self._positions.view()[..., None].expand(-1, -1, self.axes.count))
        self._axes.append(on_axes)
        self._note_last_on_axes()

    def _note_last_on_axes(self) -> None:
        if self._axes is not None:
            last = self._axes.view()[:, -1]
            self._last_on_axes = torch.where((last == last[:, :1]).all(1), last[:, 0], PADDING)

    def _real(
        self, visible: Tensor | None, positions: Tensor, last: Tensor | None, free: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``[batch, tokens]``: which new tokens are no padding, and what each must follow, ``PADDING`` for nothing.

        ``last`` stands in the last cached slot, ``[batch]``; after ``free`` tokens anything may come.
        """
        real = torch.ones_like(positions, dtype=torch.bool)
        last = torch.full_like(positions[:, :1], PADDING) if last is None else last[:, None].to(positions)
        if visible is not None:
            visible = visible.to(positions.device)
            real, last = real & visible[:, 1:], torch.where(visible[:, :1], last, PADDING)
        followed = real if free is None else real & ~free
        return real, torch.cat([last, torch.where(followed, positions, PADDING)[:, :-1]], dim=1)

    @staticmethod
    def _out_of_order(positions: Tensor, real: Tensor, before: Tensor) -> Tensor:
        """Which tokens do not follow the one before them. After a hidden one any position may come.

        What padding counts differs: some callers leave it out, some count it, and some go on from what stood there.
        """
        return real & (before != PADDING) & (positions != before + 1)

    def _described(self, positions: Tensor, wrong: Tensor, before: Tensor) -> str:
        number, token = (int(index) for index in wrong.nonzero()[0])
        return (
            f"position_ids must continue the cached tokens: sequence {number} must have position "
            f"{int(before[number, token]) + 1} at token {token} of this forward, got {int(positions[number, token])}. "
            "A cache can only go on with the sequence it holds; call cache.reset() to start another"
        )

    def _cause(self, positions: Tensor, use_cache: bool | None) -> str | None:
        """Why a forward's tokens do not fit behind the cached ones, if it can be seen."""
        tokens = positions.shape[1]
        if not self.slots or not bool((positions.min(1).values == 0).all()):
            return None
        if use_cache is False:
            return (
                f"input_ids bring all {tokens} tokens again, though {self.slots} are cached, since use_cache=False was "
                "asked for; leave it out, or leave out the cache"
            )
        if 1 < tokens <= self.slots:
            return (
                f"input_ids bring {tokens} tokens from the start, and {self.slots} are cached, so nothing is new. If "
                f"these are cached, call cache.crop({tokens - 1 - self.slots}) before, which leaves the last of them "
                "to compute; to start another sequence, call cache.reset()"
            )
        return None

    def _mark_first_real(self, real: Tensor) -> None:
        start = self.slots
        if start > self.latest_start:
            return  # every sequence has begun
        if self.first_real is None:
            # Rows that began with a real token at slot 0 stay so: later padding moves no sink.
            if start > 0 or bool(real[:, 0].all()):
                return
            self.first_real = torch.zeros(real.shape[0], dtype=torch.long, device=real.device)
        found = torch.where(real.any(1), start + real.long().argmax(1), start + real.shape[1])
        self.first_real = torch.where(self.first_real >= start, found, self.first_real)
        self.latest_start = int(self.first_real.max())

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
            self._frames.clear()

    def frames(self, rope: RopeShape, start: int, stop: int, device: torch.device) -> RotaryFrames:
        """How slots ``start`` to ``stop`` are rotated: by frame, or by token if they are not cut into whole frames.

        That is so where a dynamic rotary embedding has changed its frequencies, which ends a frame early. One
        table serves batch elements that all have equal positions.
        """
        key = (rope, start, stop, device)
        if key not in self._frames:
            whole = len(self._segments[rope.source]) == 1 and start == self.first_frame_slot
            length = self.frame_length if whole else 1
            cos, sin = self._tables(rope.source, start, stop, length)
            self._frames[key] = RotaryFrames(cos.to(device), sin.to(device), length, rope.layout)
        return self._frames[key]

    def _tables(self, source: str, start: int, stop: int, step: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[1 or batch, slots, rotary_dim / 2]`` float32 of the frames of every ``step``-th slot."""
        segments, axes = self._segments[source], None
        positions = self._positions.view()
        if self._axes is not None:
            positions = self._axes.view()
            axes = torch.tensor(self.axes.of_pairs[source], dtype=torch.long, device=positions.device)
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
                parts.append(angle_tables(positions[:, frames], inv_freq, axes))
        cos, sin = (torch.cat(tables, dim=1) for tables in zip(*parts, strict=True))
        return cos, sin

    def real_after_sinks(self, start: int, stop: int, sinks: int) -> Tensor:
        """``[batch, stop - start]`` bool: neither padding nor one of its sequence's first ``sinks`` tokens."""
        real = self._positions.view(start, stop) != PADDING
        first = 0 if self.first_real is None else self.first_real[:, None].to(real.device)
        return real & (torch.arange(start, stop, device=real.device) >= first + sinks)

    def without_padding(self, states: Tensor) -> Tensor:
        """New states ``[batch, heads, tokens, head_dim]``, finite at padding: no query sees it, but 0 · NaN is NaN."""
        if self._hidden is None:
            return states
        return torch.where(self._hidden.to(states.device), states.nan_to_num(0, 0, 0), states)

    def end(self) -> None:
        """Drop what served one forward: tables by token, as large as one head's dense keys, and of past extents.

        Tables by frame stay until there are newer ones: every forward reads them.
        """
        newest = max((stop for _, start, stop, _ in self._frames if start == self.first_frame_slot), default=0)
        for (rope, start, stop, device), frames in list(self._frames.items()):
            frames.forget_tokens()
            if frames.frame_length == 1 or start != self.first_frame_slot or stop < newest:
                del self._frames[rope, start, stop, device]
        self._noted.clear()
        self._hidden = None

    def _forget(self) -> None:
        """Drop all tables: positions are about to change."""
        self._frames.clear()
        self._noted.clear()

    def truncate(self, slots: int) -> None:
        """Forget all but the first ``slots`` slots."""
        self._forget()
        if slots == 0:
            self.clear()
            return
        self._positions.truncate(slots)
        self._last = self._positions.view()[:, -1].clone()
        if self._axes is not None:
            self._axes.truncate(slots)
            self._note_last_on_axes()
        for segments in self._segments.values():
            while segments and segments[-1][0] >= slots:
                segments.pop()

    def save(self, into: SavedTensors) -> dict[str, Any]:
        """Add positions and frequencies; returns the slots from which each set of frequencies holds."""
        into.add("positions", self._positions.view())
        if self._axes is not None:
            into.add("positions.axes", self._axes.view())
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
        if bool((positions < PADDING).any()):
            raise ValueError("positions must be at least 0, or -1 for padding")
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
        self._last = positions[:, -1].clone()
        self.all_alike = bool((positions == positions[:1]).all())
        if "positions.axes" in saved:
            on_axes = saved.take("positions.axes", (batch, slots, self.axes.count), torch.int32, device)
            if bool((on_axes < PADDING).any()):
                raise ValueError("positions.axes must be at least 0, or -1 for padding")
            self._axes = GrowingTensor(axis=1, min_room=64)
            self._axes.adopt(on_axes)
            self._note_last_on_axes()
            self.all_alike = self.all_alike and bool((on_axes == on_axes[:1]).all())

    def map_batch(self, function) -> None:
        """Apply a change of the batch axis, e.g. ``lambda states: states[indices]``."""
        self._forget()
        self._positions.map_batch(function)
        if self._axes is not None:
            self._axes.map_batch(function)
        if self._last is not None:
            self._last = function(self._last)
        if self._last_on_axes is not None:
            self._last_on_axes = function(self._last_on_axes)
        if self.first_real is not None:
            self.first_real = function(self.first_real)

    @property
    def nbytes(self) -> int:
        """Bytes of positions, starts, frequencies and, inside a forward, rotary tables."""
        held = [tensor for tensor in (self._last, self._last_on_axes, self.first_real) if tensor is not None]
        held += [] if self._axes is None or self._axes.buffer is None else [self._axes.buffer]
        held += [inv_freq for segments in self._segments.values() for _, inv_freq in segments]
        held += [table for frames in self._frames.values() for table in frames.tables()]
        return self._positions.nbytes + sum(tensor.nbytes for tensor in held)


def visible_slots(mask: object, slots: int, tokens: int) -> Tensor | None:
    """Which of the last cached slot and a forward's own ``tokens`` are no padding, of a mask in any form.

    Args:
        mask: ``[batch, slots + tokens]``, zero for padding; or as attention functions take it, ``[batch, 1, queries,
            slots + tokens]``, bool or a very low number where a query does not see a slot; or such masks by layer
            type, as models with several kinds of layers prepare them. None, and other kinds, say nothing.
        slots: Cached tokens before the forward.

    Returns:
        ``[1 or batch, 1 + tokens]`` bool; None for no padding.

    Raises:
        ValueError: If a two-dimensional mask has no column for a slot.
    """
    if isinstance(mask, Mapping):
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        if mask.shape[1] < slots + tokens:
            raise ValueError(
                f"attention_mask must have {slots + tokens} columns, for {slots} cached tokens and {tokens} new ones, "
                f"got {mask.shape[1]}"
            )
        seen = mask.bool()
    elif mask.dim() == 4 and mask.shape[3] == slots + tokens:
        visible = mask if mask.dtype == torch.bool else mask > max(torch.finfo(mask.dtype).min, _LOWEST) / 2
        seen = visible.any(2).any(1)  # padding is what no query sees
    else:
        return None
    seen = seen[:, max(0, slots - 1) : slots + tokens]
    return seen if slots else torch.nn.functional.pad(seen, (1, 0))
