"""A ``LowRankCache`` for measuring: it reads each encoded token once and remembers what it read.

A token's latent never changes, so its reconstruction in a later forward is the same again. The cache of the
product reads it again in every forward, which costs a streamed measurement more than the model does. Remembering
takes the memory that the cache is there to save, so nothing but ``evaluation`` uses it, and the bytes it reports are
those of the latents.
"""

from torch import Tensor

from lowrank_cache import LowRankCache
from lowrank_cache.cache import LowRankLayer
from lowrank_cache.growing import GrowingTensor
from lowrank_cache.latents import PackedLatents
from lowrank_cache.prompt_svd import PromptStore
from lowrank_cache.store import LatentStore

__all__ = ["RememberingCache"]


class RememberingCache(LowRankCache):
    """Returns what ``LowRankCache`` returns, up to rounding of the products; arguments are the same."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        remembering = {id(store): _remembering(store) for store in self._stores}
        for layer in self.layers:
            if isinstance(layer, LowRankLayer):
                layer.stores = {side: remembering[id(store)] for side, store in layer.stores.items()}
        self._stores = list(remembering.values())


def _remembering(store: LatentStore) -> LatentStore:
    if isinstance(store, PromptStore):
        return _RememberingPromptStore(store.coder, store.track, store.options, store.new_tokens)
    return _RememberingStore(store.coder, store.track, store.options)


class _RememberingStore(LatentStore):
    """Keeps, by member, the states ``[batch, heads, tokens, head_dim]`` of the latents read so far."""

    def clear(self) -> None:
        super().clear()
        self._known = [GrowingTensor(axis=2, min_room=256) for _ in self.coder.members]

    def rollback(self) -> None:
        super().rollback()
        for known in self._known:  # the failed forward may have read for some members only
            known.truncate(0)

    def truncate(self, tokens: int) -> None:
        super().truncate(tokens)
        for known in self._known:  # what takes the place of the latents cropped away will be others
            known.truncate(0 if self.latents is None else self.latents.tokens)

    def map_batch(self, function) -> None:
        super().map_batch(function)
        for known in self._known:
            known.map_batch(function)

    def _reconstruct(self, packed: PackedLatents, member: int, new: Tensor, start: int = 0) -> Tensor:
        known = self._known[member]
        if packed.tokens > known.rows:
            known.append(super()._reconstruct(packed, member, new, known.rows).to(new.dtype))
        return known.view(start)


class _RememberingPromptStore(_RememberingStore, PromptStore):
    """The same for stores whose bases come from the prompt."""
