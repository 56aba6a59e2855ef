"""The layers of a ``LowRankCache``: compressed ones, whose tokens lie in stores, and transformers' own for the rest."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from lowrank_cache.latent_view import LatentView
from lowrank_cache.shapes import HYBRID, LayerShape, ModelShape
from lowrank_cache.store import LatentStore


class LowRankLayer(CacheLayerMixin):
    """One compressed layer: its place in the stores that hold its keys and its values."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False  # buffers start with the first tokens, whose dtype and device they take

    def __init__(self, shape: LayerShape, stores: dict[str, LatentStore]):
        # Not the parent's, which makes attributes of what are properties here.
        self.shape = shape
        self.stores = stores
        self.members = {side: _place(store, shape.layer_idx, side) for side, store in stores.items()}

    @property
    def is_initialized(self) -> bool:
        """Whether tokens are cached."""
        return self.get_seq_length() > 0

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]  # an attribute in transformers
        """All keys as they are stored, ``[batch, kv_heads, tokens, head_dim]``, reconstructed anew; None if empty."""
        return self.stores["key"].read(self.members["key"])

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """All values, see ``keys``."""
        return self.stores["value"].read(self.members["value"])

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the keys that came last; None before."""
        newest = self.stores["key"].newest[self.members["key"]]
        return None if newest is None else newest[0]

    @property
    def device(self) -> torch.device | None:
        """On which the layer computes; None before the first tokens."""
        newest = self.stores["key"].newest[self.members["key"]]
        return None if newest is None else newest[1]

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(getattr(type(self), name, None), property):
            raise AttributeError(
                f"{name} of a layer of a LowRankCache cannot be set: tokens are stored as latents, which update appends"
            )
        super().__setattr__(name, value)

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        """Raises NotImplementedError: what is done to one layer would be done to others."""
        raise NotImplementedError(
            "layers of a LowRankCache share latents, so they cannot be changed or moved one by one; call crop, reset, "
            "reorder_cache, batch_repeat_interleave or batch_select_indices of the cache, which cannot be offloaded"
        )

    reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = offload = prefetch = _refuse

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: stores allocate when tokens arrive."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store new states and return all states of the layer, past ones as they are stored.

        Args:
            key_states: ``[batch, kv_heads, new_tokens, head_dim]``, post-RoPE.
            value_states: ``[batch, kv_heads, new_tokens, value_head_dim]``.

        Returns:
            Keys and values ``[batch, kv_heads, tokens, ...]`` in the dtype that came.
        """
        states = self._checked(key_states, value_states)
        keys, values = (self.stores[side].update(self.members[side], tensor) for side, tensor in states.items())
        return keys, values

    def extend(
        self, key_states: Tensor, value_states: Tensor, impl: str, note_read: Callable[[], object]
    ) -> LatentView:
        """``update`` that reconstructs nothing: what the layer holds, by segment; the rest see ``LatentView``."""
        store = self.stores["key"]
        encoded_end = max(store.encoded_end, min(store.options.num_sink_tokens, self.get_seq_length()))
        states = self._checked(key_states, value_states)
        keys, values = (self.stores[side].extend(self.members[side], tensor) for side, tensor in states.items())
        slots = store.sink_slots(key_states.device)
        return LatentView(keys, values, self.get_seq_length(), encoded_end, slots, impl, note_read)

    @property
    def attendable(self) -> bool:
        """Whether ``extend`` can take the place of ``update`` where there are past tokens."""
        return all(store.attendable for store in self.stores.values())

    def _checked(self, key_states: Tensor, value_states: Tensor) -> dict[str, Tensor]:
        states = {"key": key_states, "value": value_states}
        for side, tensor in states.items():
            expected = self.shape.side(side)
            if (tensor.shape[1], tensor.shape[3]) != (expected.heads, expected.head_dim):
                raise ValueError(
                    f"{side}_states of layer {self.shape.layer_idx} must have shape "
                    f"[batch, {expected.heads}, tokens, {expected.head_dim}], got {list(tensor.shape)}"
                )
        return states

    def get_seq_length(self) -> int:
        """Cached tokens, padding included."""
        return self.stores["key"].lengths[self.members["key"]]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the next ``update`` will return."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1


def _of_states(name: str) -> Any:
    return property(lambda layer: getattr(layer.states, name))


class LowRankHybridLayer(LowRankLayer, LinearAttentionCacheLayerMixin):  # type: ignore[misc]  # dtype, a property here
    """A compressed layer that keeps the states of a convolution or recurrence beside its tokens (Falcon-H1, Zamba).

    Attributes:
        states: transformers' own layer of these states alone.
    """

    is_compileable = False
    number_of_states, record_past, is_croppable = map(_of_states, ("number_of_states", "record_past", "is_croppable"))
    conv_states, conv_kernel_size = _of_states("conv_states"), _of_states("conv_kernel_size")
    recurrent_states, has_previous_state = _of_states("recurrent_states"), _of_states("has_previous_state")
    is_conv_states_initialized = _of_states("is_conv_states_initialized")
    is_recurrent_states_initialized = _of_states("is_recurrent_states_initialized")

    def __init__(self, shape: LayerShape, stores: dict[str, LatentStore], states: LinearAttentionLayer):
        super().__init__(shape, stores)
        self.states = states

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Of the states, if they are named; see the parent for tokens."""
        if kwargs:
            self.states.lazy_initialization(**kwargs)

    def update_conv_state(self, *args, **kwargs) -> Tensor:
        """See ``LinearAttentionLayer.update_conv_state``."""
        return self.states.update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args, **kwargs) -> Tensor:
        """See ``LinearAttentionLayer.update_recurrent_state``."""
        return self.states.update_recurrent_state(*args, **kwargs)

    def activate_past_recording(self) -> None:
        """See ``LinearAttentionLayer.activate_past_recording``."""
        self.states.activate_past_recording()


def _place(store: LatentStore, layer_idx: int, side: str) -> int:
    """Which member of ``store`` a layer's side is."""
    return [(member.layer, member.side) for member in store.coder.members].index((layer_idx, side))


def make_layers(model: PreTrainedModel, shape: ModelShape, stores: Sequence[LatentStore]) -> list:
    """transformers' own layer classes, but for the compressed layers."""
    by_layer: dict[int, dict[str, LatentStore]] = {}
    for store in stores:
        for member in store.coder.members:
            by_layer.setdefault(member.layer, {})[member.side] = store
    layers: list = []
    config = model.config.get_text_config(decoder=True)
    for index, (layer_type, kwargs) in enumerate(zip(*get_layer_types_and_kwargs(config), strict=True)):
        if index in by_layer and layer_type == HYBRID:
            layers.append(LowRankHybridLayer(shape.layer(index), by_layer[index], LinearAttentionLayer(**kwargs)))
        elif index in by_layer:
            layers.append(LowRankLayer(shape.layer(index), by_layer[index]))
        else:
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**kwargs))
    return layers
