"""The tokens of one layer group's keys, values or both: sinks, latents and window.

Slots of every layer lie in three parts: slots before ``num_sink_tokens`` exist only as exact sink
tokens, slots up to ``encoded_end`` as latents shared by the group, the rest exactly in each layer's
window. In a padded sequence the sinks are its first real tokens, wherever they stand; they are kept
beside the latents and overlay them on reading. See docs/cache_contract.md, "Slots".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_cache.artefact import SavedTensors, integer
from lowrank_cache.coder import Coder
from lowrank_cache.kernels.api import encode, reconstruct
from lowrank_cache.kernels.packed import LatentSide, PackedTier, RotaryFrames, tier_bytes
from lowrank_cache.latent_view import StoredSide
from lowrank_cache.latents import GrowingTensor, PackedLatents, is_read_only
from lowrank_cache.positions import PositionTrack


@dataclass(frozen=True)
class StoreOptions:
    """Sizes that all stores of a cache share, in tokens, and the dtype of 16-bit latents."""

    residual_length: int
    num_sink_tokens: int
    block_size: int
    latent_dtype: torch.dtype | None

    def __post_init__(self):
        for name, least in (("residual_length", 0), ("num_sink_tokens", 0), ("block_size", 1)):
            integer(getattr(self, name), name, least)
        dtype = self.latent_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"latent_dtype must be a floating torch.dtype or None, got {dtype!r}")


class _Views:
    """How a store's latents are read, until it encodes or changes in another way: the same from forward to forward.

    A copy of a store makes its own.
    """

    def __init__(self) -> None:
        # By device: views of the latents (copies where they lie elsewhere), and what is shared by those that read them.
        self.tiers: dict[torch.device, tuple[tuple[PackedTier, ...], dict[str, Tensor]]] = {}
        self.sides: dict[tuple[int, torch.device], LatentSide] = {}

    def end_forward(self) -> None:
        """Let go of what is large: latents in full precision, copies on other devices, a rotation of every token."""
        for _, shared in self.tiers.values():
            shared.clear()
        large = any(side.rope is not None and side.rope.frame_length == 1 for side in self.sides.values())
        if large or len(self.tiers) > 1:
            self.tiers, self.sides = {}, {}

    def __deepcopy__(self, memo: dict) -> "_Views":
        return _Views()


class LatentStore:
    """The states of a layer group's keys, values or both, of a whole batch.

    A member is the keys or the values of one layer; ``coder.members`` numbers them in the order in which
    a forward updates them.

    Args:
        coder: Their bases.
        track: The cache's positions.
        options: Sizes.
    """

    def __init__(self, coder: Coder, track: PositionTrack, options: StoreOptions):
        self.coder = coder
        self.track = track
        self.options = options
        self.clear()

    def clear(self) -> None:
        """Forget all tokens, and bases that belong to them."""
        members = len(self.coder.members)
        self.coder.forget()
        self.encoded_end = self.options.num_sink_tokens
        self.lengths = [0] * members
        self.sinks: list[Tensor | None] = [None] * members
        self.windows = [self._new_window() for _ in range(members)]
        self.pending: list[Tensor | None] = [None] * members  # window and new states of a group that will encode
        self.latents: PackedLatents | None = None
        self.newest: list[tuple[torch.dtype, torch.device] | None] = [None] * members  # of what came last
        self._views = _Views()
        self._impl = "auto"
        self._before: tuple | None = None  # state before the current forward, for `rollback`

    def _new_window(self) -> GrowingTensor:
        return GrowingTensor(axis=2, min_room=self.options.block_size)

    @property
    def attendable(self) -> bool:
        """Whether ``extend`` can take the place of ``update``: latents have channels, and one basis for all."""
        return self.coder.one_basis and bool(self.coder.tiers)

    def update(self, member: int, states: Tensor) -> Tensor:
        """Take in new states of one member and return all of its states.

        Args:
            member: Its number in ``coder.members``.
            states: ``[batch, heads, new_tokens, head_dim]``, post-RoPE; stored without their gradients.

        Returns:
            ``[batch, heads, tokens, head_dim]``, dtype of ``states``: past tokens as they are stored,
            new ones as they came.
        """
        self.coder = self.coder.on(member, states.device)
        exact = self.windows[member].view() if self.windows[member].length else None
        everything = states if self.lengths[member] == 0 else self._assemble(member, states, exact)
        self._take_in(member, states.detach())
        self._encode_if_last(member)
        return everything

    def read(self, member: int) -> Tensor | None:
        """One member's states as they are stored, ``[batch, heads, tokens, head_dim]``, in the dtype that came last.

        None if there are none.
        """
        newest, held, exact = self.newest[member], self.coder.members[member].shape, self.pending[member]
        if newest is None or not self.lengths[member]:
            return None
        if exact is None and self.windows[member].length:
            exact = self.windows[member].view()
        size = self.track.batch or 0, held.heads, 0, held.head_dim
        return self._assemble(member, torch.empty(size, dtype=newest[0], device=newest[1]), exact)

    def extend(self, member: int, states: Tensor) -> StoredSide:
        """``update`` that reconstructs nothing: past tokens come back as they are stored."""
        # The view rides on `states`: a part of `states` in it would be a circle that no garbage collector sees.
        states = states.detach()
        self.coder = self.coder.on(member, states.device)
        latents = self._latent_side(member, states.device)
        self._take_in(member, states)
        pending, window, sinks = self.pending[member], self.windows[member], self.sinks[member]
        exact = window.view() if window.length else states[:, :, :0]
        kept = states[:, :, :0] if sinks is None else sinks[:, :, : self.lengths[member]]
        self._encode_if_last(member)
        tail = exact if pending is None else pending
        return StoredSide(kept.to(states.dtype), latents, tail.to(states.dtype))

    def sink_slots(self, device: torch.device) -> Tensor | None:
        """``[batch, num_sink_tokens]``, the slots of each sequence's sinks; None if they are all first ones."""
        first_real = self.track.first_real
        if first_real is None or self.options.num_sink_tokens == 0:
            return None
        return first_real.to(device)[:, None] + torch.arange(self.options.num_sink_tokens, device=device)

    def _take_in(self, member: int, states: Tensor) -> None:
        """Put new states into sinks and window, or, if there will be something to encode, with the window aside."""
        past = self.lengths[member]
        self.newest[member] = states.dtype, states.device
        self._keep_sinks(member, states, past)
        inside = states[:, :, max(0, self.options.num_sink_tokens - past) :]
        window = self.windows[member]
        if not self._encodes(window.length + inside.shape[2]):
            if inside.shape[2]:
                window.append(inside)
        else:
            self.pending[member] = torch.cat([window.view(), inside], dim=2) if window.length else inside
        self.lengths[member] = past + states.shape[2]

    def _encodes(self, waiting: int) -> bool:
        """Whether a window of ``waiting`` tokens, new ones included, gives away its oldest block."""
        return waiting >= self.options.residual_length + self.options.block_size and self.coder.encodes(waiting)

    def _encode_if_last(self, member: int) -> None:
        """When every member of the forward is there, encode what waits."""
        if member == len(self.lengths) - 1 and self.pending[member] is not None:
            self._encode_pending([dense for dense in self.pending if dense is not None])

    def _encode_pending(self, pending: list[Tensor]) -> None:
        """While the window holds ``residual_length + block_size`` tokens, its oldest ``block_size`` are encoded."""
        options, waiting, home = self.options, pending[0].shape[2], pending[-1].device
        encoded = (waiting - options.residual_length) // options.block_size * options.block_size
        start, stop = self.encoded_end, self.encoded_end + encoded
        if not self.coder.fitted:
            used = self.track.real_after_sinks(start, start + waiting, options.num_sink_tokens)
            frames = [self._frames(member, start, start + waiting, home) for member in range(len(pending))]
            self.coder.fit(pending, frames, used)
        dtype = options.latent_dtype or pending[0].dtype
        if self.latents is None:
            self.latents = PackedLatents(self.coder.tiers, dtype, options.block_size)
        elif options.latent_dtype is None:  # a model may be converted between two forwards
            self.latents.latent_dtype = torch.promote_types(self.latents.latent_dtype, dtype)
        matrices = self.coder.encoding(home)
        try:
            tiers = encode(
                [dense[:, :, :encoded] for dense in pending],
                matrices.constants,
                [self._frames(member, start, stop, home) for member in range(len(pending))],
                matrices.down_proj,
                self.coder.tiers,
                matrices.weight,
                self.latents.latent_dtype,
                impl=self._impl,
            )
        except ValueError as error:
            raise ValueError(f"{self.coder.name}: {error}") from error
        self.latents.reserve(self.latents.tokens + encoded, final=self.coder.last)
        self.latents.append(tiers, encoded)
        self.encoded_end = stop
        self._views = _Views()
        for member, dense in enumerate(pending):
            # A new window, not a shifted one: `rollback` still needs the old one.
            self.windows[member] = self._new_window()
            if waiting > encoded:
                self.windows[member].append(dense[:, :, encoded:])
        self.pending = [None] * len(self.pending)

    def _frames(self, member: int, start: int, stop: int, device: torch.device) -> RotaryFrames | None:
        """How slots ``start`` to ``stop`` of one member are rotated."""
        rope = self.coder.members[member].shape.rope
        return None if rope is None else self.track.frames(rope, start, stop, device)

    def _latent_side(self, member: int, device: torch.device) -> LatentSide | None:
        """The latents and what reads one member of them, on the device of that member's layer; None without latents."""
        if self.latents is None or not self.latents.tokens:
            return None
        views = self._views
        if (member, device) not in views.sides:
            if device not in views.tiers:
                views.tiers[device] = tuple(tier.to(device) for tier in self.latents.views()), {}
            tiers, shared = views.tiers[device]
            frames = self._frames(member, self.options.num_sink_tokens, self.encoded_end, device)
            up_proj, constant, scale = self.coder.reading(member, device)
            size = self.track.batch or 0, self.latents.tokens
            views.sides[member, device] = LatentSide(tiers, up_proj, constant, frames, scale, size, shared)
        return views.sides[member, device]

    def _assemble(self, member: int, states: Tensor, exact: Tensor | None) -> Tensor:
        """Past states as they are stored, the last of them ``exact``, then ``states``, in one new tensor."""
        past, sinks = self.lengths[member], self.options.num_sink_tokens
        batch, heads, tokens, head_dim = states.shape
        everything = states.new_empty(batch, heads, past + tokens, head_dim)
        everything[:, :, past:] = states
        if exact is not None:
            everything[:, :, past - exact.shape[2] : past] = exact
        latents = self._latent_side(member, states.device)
        if latents is not None:
            everything[:, :, sinks : self.encoded_end] = reconstruct(latents, states.dtype, impl=self._impl)
        kept, slots = self.sinks[member], self.sink_slots(states.device)
        if kept is None:  # there are no sink tokens
            return everything
        if slots is None:
            everything[:, :, : min(sinks, past)] = kept[:, :, :past]
        else:
            everything[:, :, : min(sinks, past)] = 0
            element, nth, slot = self._sinks_between(slots, 0, past)
            everything[element, :, slot] = kept[element, :, nth].to(states.dtype)
        return everything

    def _keep_sinks(self, member: int, states: Tensor, past: int) -> None:
        sinks = self.options.num_sink_tokens
        if sinks == 0:
            return
        kept, slots = self.sinks[member], self.sink_slots(states.device)
        if kept is None:
            batch, heads, _, head_dim = states.shape
            kept = states.new_zeros(batch, heads, sinks, head_dim)
        elif past >= self.track.latest_start + sinks:
            return  # all are there
        elif is_read_only(kept) or kept.dtype != torch.promote_types(kept.dtype, states.dtype):
            kept = kept.to(torch.promote_types(kept.dtype, states.dtype), copy=True)
        self.sinks[member] = kept
        if slots is None:
            if past < sinks:
                new = min(sinks - past, states.shape[2])
                kept[:, :, past : past + new] = states[:, :, :new]
        else:
            element, nth, slot = self._sinks_between(slots, past, past + states.shape[2])
            kept[element, :, nth] = states[element, :, slot - past].to(kept.dtype)

    @staticmethod
    def _sinks_between(slots: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Batch element, number and slot of every sink of ``sink_slots`` that stands in slots ``start`` to ``stop``."""
        element, nth = ((slots >= start) & (slots < stop)).nonzero(as_tuple=True)
        return element, nth, slots[element, nth]

    def begin(self, impl: str = "auto") -> None:
        """Note the state before a forward, so that `rollback` can return to it; ``impl``: see ``kernels.api``."""
        self._impl = impl
        windows = [(window, window.length) for window in self.windows]
        tokens = 0 if self.latents is None else self.latents.tokens
        self._before = (list(self.lengths), self.encoded_end, tokens, windows, self.coder.fitted)

    def commit(self) -> None:
        """The forward ended well: let go of what `rollback` would need."""
        self._before = None
        if self.coder.one_basis:
            self._views.end_forward()
        else:  # what reads bases of the cache's own in another dtype is counted by nobody
            self._views = _Views()

    def rollback(self) -> None:
        """Undo the current forward. Sinks need no undoing: those past the length are written again."""
        self._views = _Views()
        if self._before is None:
            return
        self.lengths, self.encoded_end, tokens, windows, fitted = self._before
        if self.lengths[0] == 0:
            self.clear()  # the next forward may bring another batch or dtype
            return
        for window, length in windows:
            window.truncate(length)
        self.windows = [window for window, _ in windows]
        self.pending = [None] * len(self.pending)
        if not fitted:
            self.coder.forget()
            self.latents = None
        if self.latents is not None:
            self.latents.truncate(tokens)
        self._before = None

    def truncate(self, tokens: int) -> None:
        """Keep the first ``tokens`` slots; a window cropped away refills before anything is encoded."""
        if tokens == 0:
            self.clear()
            return
        self._views = _Views()
        kept = max(tokens - self.encoded_end, 0)
        for window in self.windows:
            window.truncate(kept)
        self.encoded_end = max(min(self.encoded_end, tokens), self.options.num_sink_tokens)
        if self.latents is not None:
            self.latents.truncate(self.encoded_end - self.options.num_sink_tokens)
        self.lengths = [min(length, tokens) for length in self.lengths]

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch axis, e.g. ``lambda states: states[indices]``, to everything stored."""
        self._views = _Views()
        self.sinks = [None if sink is None else function(sink) for sink in self.sinks]
        for window in self.windows:
            window.map_batch(function)
        if self.latents is not None:
            self.latents.map_batch(function)
        self.coder.map_batch(function)

    def save(self, into: SavedTensors, name: str) -> dict[str, Any]:
        """Add what is stored, between forwards; returns how many tokens are latents, and facts of the coder."""
        for member, (sinks, window) in enumerate(zip(self.sinks, self.windows, strict=True)):
            if sinks is not None:
                into.add(f"{name}.sinks.{member}", sinks)
            if window.length:
                into.add(f"{name}.window.{member}", window.view())
        if self.latents is not None:
            self.latents.save(into, name)
        return {"encoded": self.encoded_end - self.options.num_sink_tokens, **self.coder.save(into, name)}

    def load(self, saved: SavedTensors, name: str, facts: Mapping[str, Any], templates: list[Tensor]) -> None:
        """Take what ``save`` added, after the track has its positions.

        Args:
            templates: By member, a tensor of the dtype and on the device of the states it is given.

        Raises:
            ValueError: If a tensor is missing, or numbers, shapes or dtypes do not fit this store.
        """
        batch, slots, sinks = self.track.batch or 0, self.track.slots, self.options.num_sink_tokens
        encoded = integer(facts["encoded"], f"{name}.encoded", most=max(0, slots - sinks))
        self.coder.load(saved, name, facts, batch, templates[-1].device)
        if encoded and not self.coder.fitted:
            raise ValueError(f"{name} holds latents without the bases that read them")
        self.encoded_end, self.lengths = sinks + encoded, [slots] * len(self.lengths)
        self.newest = [(template.dtype, template.device) for template in templates]
        waiting = max(0, slots - self.encoded_end)
        for member, (held, template) in enumerate(zip(self.coder.members, templates, strict=True)):
            for part, tokens in (("sinks", sinks), ("window", waiting)):
                if tokens:
                    size = (batch, held.shape.heads, tokens, held.shape.head_dim)
                    states = saved.take(f"{name}.{part}.{member}", size, template.dtype, template.device)
                    if part == "sinks":
                        self.sinks[member] = states
                    else:
                        self.windows[member].adopt(states)
        if encoded:
            dtype = self.options.latent_dtype or templates[0].dtype
            self.latents = PackedLatents(self.coder.tiers, dtype, self.options.block_size)
            self.latents.load(saved, name, batch, encoded, templates[-1].device)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's latent, padding and steps included."""
        held = self.latents.latent_dtype if self.latents is not None else self.options.latent_dtype or torch.float16
        return sum(tier_bytes(*tier, held) for tier in self.coder.tiers)

    @property
    def nbytes(self) -> int:
        """Bytes of latents, sinks, windows and bases of the cache's own, unused room included."""
        held: list[Any] = [*self.sinks, *self.windows, *self.pending, self.latents, self.coder]
        if self._before is not None:  # inside a forward, or after one that failed
            held += [window for window, _ in self._before[3]]
        return sum({id(part): part.nbytes for part in held if part is not None}.values())
