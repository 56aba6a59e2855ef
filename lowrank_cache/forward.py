"""One forward of a cache: announced by the decoder's hooks, of one thread at a time, undone if it fails part-way.

The hooks tell a ``LowRankCache`` what ``Cache.update`` never hears: positions, padding, and that a forward begins or
has ended. A decoder has one of each, shared by all its caches and gone with the last of them. They hold no cache and
no model; other caches pass through them untouched.
"""

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowrank_cache.attention import attended_layers, impl_of
from lowrank_cache.positions import PositionTrack
from lowrank_cache.probe import CACHE_ARGUMENTS
from lowrank_cache.store import LatentStore


@dataclass
class _SharedHooks:
    users: int = 0
    handles: tuple[RemovableHandle, ...] = ()


_HOOKS: "weakref.WeakKeyDictionary[nn.Module, _SharedHooks]" = weakref.WeakKeyDictionary()
# Reentrant: the garbage collector may end a cache, and so call `_release`, at any point of the thread that holds it.
_LOCK = threading.RLock()


def watch(decoder: nn.Module, cache: object) -> None:
    """Let ``decoder`` call ``begin_forward`` and ``end_forward`` of caches of its own, while ``cache`` lives."""
    with _LOCK:
        hooks = _HOOKS.setdefault(decoder, _SharedHooks())
        hooks.users += 1
        if not hooks.handles:
            signature = inspect.signature(decoder.forward)
            hooks.handles = (
                decoder.register_forward_pre_hook(_Hook("begin_forward", signature), with_kwargs=True),
                decoder.register_forward_hook(_Hook("end_forward", signature), with_kwargs=True),
            )
        _HOOKS[decoder] = hooks  # again, if its last other user was collected meanwhile
    weakref.finalize(cache, _release, weakref.ref(decoder))


def _release(decoder_ref: "weakref.ref[nn.Module]") -> None:
    with _LOCK:
        decoder = decoder_ref()
        if decoder is None or decoder not in _HOOKS:
            return
        hooks = _HOOKS[decoder]
        hooks.users -= 1
        if hooks.users == 0:
            for handle in hooks.handles:
                handle.remove()
            hooks.handles = ()
            del _HOOKS[decoder]


class _Hook:
    """Calls ``method`` of a forward's cache, with the decoder and the forward's arguments.

    Copies do nothing, so that a model that is copied or pickled is an ordinary one: it has no cache yet.
    """

    def __init__(self, method: str = "", signature: inspect.Signature | None = None):
        self._method, self._signature = method, signature

    def __reduce__(self) -> tuple:
        return _Hook, ()

    @torch.compiler.disable(reason="caches are checked with Python control flow, outside of any graph")
    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict, output: object = None) -> None:
        if self._signature is None:
            return
        arguments = {**self._signature.bind_partial(*args).arguments, **kwargs}
        for name in CACHE_ARGUMENTS:
            method = getattr(arguments.get(name), self._method, None)
            if method is not None:
                method(decoder, arguments)
                return
        if type(arguments.get("cache")).__name__ == "PagedAttentionCache":  # transformers drops what it was given
            warnings.warn(
                "continuous batching keeps pages of its own: the LowRankCache that was made for this model is not used",
                stacklevel=2,
            )


class Turn:
    """Whose forward it is: taken by a thread when its forward begins, given back when the cache is whole again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: threading.Thread | None = None

    def take(self) -> None:
        """Begin, also after a forward of this thread or a dead one that failed; RuntimeError in a living one's."""
        with self._lock:
            if self._holder is not None and not self.is_mine() and self._holder.is_alive():
                raise RuntimeError(
                    "another thread's forward with this cache has not ended; give each thread a cache of its own "
                    "(copy.deepcopy shares the bases), or, if that forward failed, call cache.crop(0) first"
                )
            self._holder = threading.current_thread()

    def is_mine(self) -> bool:
        """Whether this thread began last."""
        return self._holder is threading.current_thread()

    def give_back(self) -> None:
        self._holder = None

    def __deepcopy__(self, memo: dict) -> "Turn":
        return Turn()


class Forward:
    """The forward that a cache is in, or its last one, and the way back to the state before it.

    ``compressed`` are the numbers of the compressed layers; ``others`` all other layers, transformers' own, in order;
    ``attends`` is whether layers attend to latents where they can.
    """

    def __init__(
        self,
        decoder: "weakref.ref[nn.Module]",
        track: PositionTrack,
        stores: Sequence[LatentStore],
        compressed: Sequence[int],
        others: Sequence[Any],
        attends: bool,
    ):
        self._attends = attends
        self._decoder = decoder
        self._track = track
        self._stores = stores
        self._compressed = frozenset(compressed)
        self._others = list(others)
        self.impl = "auto"  # who computes in the current forward, see `kernels.api`
        self.attended: frozenset[int] = frozenset()  # layers that attend to latents in it
        self._unread: set[int] = set()  # those whose latents were offered to attention, which has not read them
        self._updated: set[int] | None = None  # compressed layers seen in the current forward; None between forwards
        self._length_before = 0  # cached tokens when the current forward began
        self._others_before: list[int] = []  # what `_others_progress` was then
        self._half_changed = False  # a change of all layers began and has not ended
        self._turn = Turn()

    @property
    def length_before(self) -> int | None:
        """Cached tokens when the current forward, or one that failed, began; None between forwards."""
        return None if self._updated is None else self._length_before

    def begin(self, decoder: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Begin a forward with these arguments of ``decoder``.

        Raises:
            ValueError: If the forward is another model's, holds no tokens, or does not continue the
                cached sequence. The cache is unchanged then.
            RuntimeError: If another thread's forward with this cache has not ended.
        """
        ours = self._decoder()
        if decoder is not ours:
            raise ValueError(
                f"this cache was made for {type(ours).__name__} {id(ours):#x} and cannot be used with "
                f"{type(decoder).__name__} {id(decoder):#x}; make one cache per model"
            )
        tokens = arguments.get("input_ids")
        if tokens is None:
            tokens = arguments.get("inputs_embeds")
        if tokens is None:
            raise ValueError("one of input_ids and inputs_embeds must be given to a forward with a LowRankCache")
        self._turn.take()
        try:
            self.settle()
            length = self._track.slots
            self._length_before, self._others_before = length, self._others_progress()
            self.impl = impl_of(decoder)
            self.attended = attended_layers(decoder, arguments) if self._attends else frozenset()
            self._unread.clear()
            try:
                place = arguments.get("position_ids"), arguments.get("attention_mask"), tokens.device
                self._track.begin(tokens.shape[0], tokens.shape[1], *place, arguments.get("use_cache"))
                for store in self._stores:
                    store.begin(self.impl)
                self._updated = set()
            except BaseException:
                self._updated = None
                for store in self._stores:
                    store.rollback()
                self._track.truncate(length)
                raise
        except BaseException:
            self._turn.give_back()
            raise

    def check_update(self, layer_idx: int, past: int, states: Tensor) -> None:
        """Raise ValueError unless this forward brings ``states`` to a layer that holds ``past`` tokens."""
        expected = (self._track.batch, self._track.slots - past)
        updated = self._updated if self._turn.is_mine() else None
        if updated is None or layer_idx in updated or (states.shape[0], states.shape[2]) != expected:
            raise ValueError(
                f"layer {layer_idx} was updated outside a forward of the model this cache was made for, so the "
                "positions of its tokens are unknown; make one cache per model"
            )

    def note_updated(self, layer_idx: int) -> None:
        """A compressed layer was updated."""
        assert self._updated is not None
        self._updated.add(layer_idx)

    def offer(self, layer_idx: int) -> Callable[[], object]:
        """Note that a layer's latents are offered to attention; to be called when it reads them."""
        self._unread.add(layer_idx)
        return partial(self._unread.discard, layer_idx)

    def end(self, decoder: nn.Module) -> None:
        """The decoder's forward is through: what it brought stays.

        Raises:
            RuntimeError: If it left out a compressed layer, or a layer's attention did not read the latents that it
                was offered, so that what the model computed is wrong. The next call undoes this forward.
        """
        if self._updated is None or not self._turn.is_mine():
            return
        missing = sorted(self._compressed - self._updated)
        if missing:
            raise RuntimeError(
                f"{type(decoder).__name__} ended a forward without layers {missing}, which this cache was made with; "
                "make a cache for the model as it is now"
            )
        if self._unread:
            raise RuntimeError(
                f"{type(decoder).__name__} ended a forward in which attention of layers {sorted(self._unread)} did not "
                "read the cached tokens, since something called another function than the one its config names; the "
                "result would be wrong, so make the cache with attend='reconstruct'"
            )
        self._updated = None
        self._track.end()
        for store in self._stores:
            store.commit()
        self._turn.give_back()

    def settle(self) -> None:
        """If the last forward did not reach every layer, return to the state before it, or raise ValueError."""
        if self._half_changed:
            raise ValueError(
                "a crop or a change of the batch of this cache was interrupted, so its layers do not agree any more; "
                "call cache.reset() and start again"
            )
        if self._updated is None:
            return
        # Linear layers do not tell whether the failed forward reached them.
        perhaps = any(state for layer in self._others for state in getattr(layer, "has_previous_state", {}).values())
        if perhaps or self._others_progress() != self._others_before:
            raise ValueError(
                "the last forward failed part-way and this model's sliding-window or linear layers cannot be rolled "
                "back; call cache.reset() and start again"
            )
        for store in self._stores:
            store.rollback()
        self._track.truncate(min(store.lengths[0] for store in self._stores))
        self._updated = None

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Mark the cache until a change of all its layers is through: whatever interrupts it, the mark stays."""
        self.settle()
        self._turn.give_back()
        self._half_changed = True
        yield
        self._half_changed = False

    def change_others(self, change: str, argument: Any) -> None:
        """Inside ``changing``: call ``change`` of all layers that are not compressed."""
        for changed, layer in enumerate(self._others):
            try:
                getattr(layer, change)(argument)
            except (RuntimeError, AttributeError) as error:
                # transformers' layers refuse before they change; if the first one does, the cache is as it was.
                self._half_changed = changed > 0 or isinstance(error, torch.OutOfMemoryError)
                raise

    def reset(self) -> None:
        """Empty all layers, whatever state they are in."""
        self._half_changed = True
        for layer in self._others:
            layer.reset()
        for store in self._stores:
            store.clear()
        self._track.clear()
        self._updated = None
        self._turn.give_back()
        self._half_changed = False

    def _others_progress(self) -> list[int]:
        """Tokens seen so far by each attention layer that is not compressed."""
        return [layer.get_seq_length() for layer in self._others if hasattr(layer, "get_seq_length")]
