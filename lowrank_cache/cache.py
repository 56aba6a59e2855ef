"""``LowRankCache``: a transformers ``Cache`` whose full-attention layers hold quantized latents.

The only file that subclasses transformers' cache. The container makes one ``LatentStore`` per
layer group's keys, values or both and one ``LowRankLayer`` per layer that hands states to them; all other
layers keep transformers' own classes. What transformers calls, and when: docs/cache_contract.md.
"""

import hashlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    get_layer_types_and_kwargs,
)

from lowrank_cache.allocation import plan_stores
from lowrank_cache.attended import Attended, attach_view, attended_by
from lowrank_cache.budget import tier_bytes
from lowrank_cache.hooks import watch
from lowrank_cache.kernels.reference import QUANTIZED_BITS
from lowrank_cache.latents import Coder
from lowrank_cache.models import (
    LayerShape,
    ModelShape,
    decoder_of,
    input_device,
    layer_devices,
    model_shape,
    one_token_cache,
)
from lowrank_cache.positions import PositionTrack
from lowrank_cache.projections import Projections
from lowrank_cache.prompt_svd import prompt_stores
from lowrank_cache.saved_cache import check_owner, fill, gather, owner_facts, settings_from_json, settings_to_json
from lowrank_cache.saved_folder import damage_named, push_folder, read_folder, write_folder
from lowrank_cache.saved_tensors import SavedTensors
from lowrank_cache.store import LatentStore, StoreOptions
from lowrank_cache.turn import Turn
from lowrank_cache.view import LatentView

__all__ = ["LowRankCache", "LowRankLayer"]


class LowRankLayer(CacheLayerMixin):
    """One compressed layer: its place in the stores that hold its keys and its values."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False  # buffers start with the first tokens, whose dtype and device they take

    def __init__(self, shape: LayerShape, stores: dict[str, LatentStore]):
        super().__init__()
        self.shape = shape
        self.stores = stores
        self.members = {side: store.coder.members.index((shape.layer_idx, side)) for side, store in stores.items()}

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

    def extend(self, key_states: Tensor, value_states: Tensor, impl: str = "auto") -> LatentView:
        """``update`` that rebuilds nothing: what the layer holds, by segment, to be read by ``impl``'s kernels."""
        store = self.stores["key"]
        encoded_end = max(store.encoded_end, min(store.options.num_sink_tokens, self.get_seq_length()))
        states = self._checked(key_states, value_states)
        keys, values = (self.stores[side].extend(self.members[side], tensor) for side, tensor in states.items())
        return LatentView(keys, values, self.get_seq_length(), encoded_end, store.sink_slots(key_states.device), impl)

    def can_extend(self) -> bool:
        """Whether there are past tokens, in stores that can be attended to."""
        return self.get_seq_length() > 0 and all(store.attendable for store in self.stores.values())

    def _checked(self, key_states: Tensor, value_states: Tensor) -> dict[str, Tensor]:
        states = {"key": key_states.detach(), "value": value_states.detach()}
        for side, tensor in states.items():
            expected = self.shape.side(side)
            if (tensor.shape[1], tensor.shape[3]) != (expected.heads, expected.head_dim):
                raise ValueError(
                    f"{side}_states of layer {self.shape.layer_idx} must have shape "
                    f"[batch, {expected.heads}, tokens, {expected.head_dim}], got {list(tensor.shape)}"
                )
        self.is_initialized = True
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


class CachedGroup(NamedTuple):
    """Tokens of one layer group in a cache.

    Attributes:
        members: Layer and side of what is stored together.
        tiers: Bits and channels.
        tokens: Slots held as latents now.
    """

    members: tuple[tuple[int, str], ...]
    tiers: tuple[tuple[int, int], ...]
    tokens: int


class LowRankCache(Cache):
    """KV cache of quantized low-rank latents, a drop-in for ``model.generate(past_key_values=...)``.

    Each row keeps its first ``num_sink_tokens`` tokens and its last ``residual_length`` (up to
    ``residual_length + block_size``) tokens exactly; all others are stored as latents only. A forward
    always attends exactly to its own tokens. One cache serves one model and, until ``reset``, one
    batch of sequences.

    Args:
        model: The decoder-only transformers model whose ``generate`` or ``forward`` will use the cache.
        projections: Bases calibrated on this model (or on the same model in other weights, e.g. 4-bit).
        compression_ratio: Bytes per token of the full cache at 16 bits, over bytes per token of the
            latents; at least 1.
        ranks: Channels to keep instead of a ratio: one number for every basis (at most its width), or
            ``{layer: (key_rank, value_rank)}`` by the first layer of each layer group, whose sum counts where
            keys and values share a latent.
        bits: One width (16, 8, 4, 2) for all channels kept, below 16 after a Hadamard rotation for all methods but
            fisher; None lets the method choose.
        residual_length: Most recent tokens kept exactly.
        num_sink_tokens: First real tokens of each row kept exactly.
        block_size: Tokens encoded at a time.
        latent_dtype: Dtype of 16-bit latents and of the projection matrices; None takes that of the
            incoming keys for latents, and float32 for the matrices.
        method: ``"xkv"`` instead of projections: each row's bases come from its own prompt, see ``prompt_svd``.
            They count in ``stored_bytes``.
        layer_group_size: Adjacent layers that share xkv's bases, 4 unless given.
        new_tokens: What xkv does with tokens after those that made the bases: ``"encode"`` them with the
            same bases (unless given) or keep them ``"exact"``.

    Raises:
        NotImplementedError: If the model's cache cannot be compressed (see ``models.model_shape``).
        ValueError: If an argument is out of range or ``projections`` belong to another model.
        TypeError: If an argument has the wrong type.

    Source: ReCalKV (arXiv:2505.24357) and xKV (arXiv:2503.18893) for grouped and cross-layer bases, KVTC
    (arXiv:2511.01815) for sinks, window and bits by channel. Differs: see docs/method.md.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        projections: Projections | None = None,
        *,
        method: str | None = None,
        compression_ratio: float = 8.0,
        ranks: int | Mapping[int, tuple[int, int]] | None = None,
        bits: int | None = None,
        residual_length: int = 128,
        num_sink_tokens: int = 4,
        block_size: int = 64,
        latent_dtype: torch.dtype | None = torch.float16,
        layer_group_size: int | None = None,
        new_tokens: str | None = None,
    ):
        options = _check_options(residual_length, num_sink_tokens, block_size, latent_dtype)
        if (projections is None) == (method is None):
            given = "neither" if method is None else "both"
            raise ValueError(f"exactly one of projections and method must be given, got {given}")
        shape, decoder = model_shape(model), decoder_of(model)
        budget: dict[str, Any] = {"compression_ratio": compression_ratio, "ranks": ranks, "bits": bits}
        if projections is not None:
            if not isinstance(projections, Projections):
                raise TypeError(f"projections must be Projections, got {type(projections).__name__}")
            projections.check_model(shape)
            if layer_group_size is not None or new_tokens is not None:
                raise ValueError("layer_group_size and new_tokens belong to method 'xkv'; projections hold their own")
            _warn_of_borders(projections, layer_devices(model))
            self._coders = _coders(projections, **budget, latent_dtype=latent_dtype)
            self._track = PositionTrack(projections.frame_length, num_sink_tokens)
            self._stores = [LatentStore(coder, self._track, options) for coder in self._coders]
        elif method == "xkv":
            size = 4 if layer_group_size is None else layer_group_size
            new_tokens = "encode" if new_tokens is None else new_tokens
            self._coders = []  # bases belong to prompts and lie in the stores
            self._track = PositionTrack(1, num_sink_tokens)
            self._stores = list(
                prompt_stores(
                    shape,
                    self._track,
                    options,
                    **budget,
                    layer_group_size=size,
                    new_tokens=new_tokens,
                    devices=layer_devices(model),
                )
            )
        else:
            raise ValueError(f"method must be 'xkv'; the bases of other methods are calibrated, got {method!r}")
        self.target_compression_ratio = float(compression_ratio) if ranks is None else None
        self._settings = {  # what `from_pretrained` makes an equal cache of
            "method": method,
            **budget,
            "residual_length": residual_length,
            "num_sink_tokens": num_sink_tokens,
            "block_size": block_size,
            "latent_dtype": latent_dtype,
            "layer_group_size": layer_group_size,
            "new_tokens": new_tokens,
        }
        self._owner = owner_facts(model.config, shape)
        self._decoder = weakref.ref(decoder)
        self._compressed = tuple(layer.layer_idx for layer in shape.layers)
        self._attended = Attended()  # layers that attend to latents in the current forward
        self._updated: set[int] | None = None  # compressed layers seen in the current forward; None between forwards
        self._length_before = 0  # cached tokens when the current forward began
        self._others_before: list[int] = []  # what `_others_progress` was then
        self._half_changed = False  # a change of all layers began and has not ended
        self._turn = Turn()
        super().__init__(layers=_make_layers(model, shape, self._stores))
        watch(decoder, self)

    def begin_forward(self, decoder: nn.Module, arguments: Mapping) -> None:
        """Called by the decoder's hook before each forward with the arguments of that forward.

        Raises:
            ValueError: If the forward is another model's, holds no tokens, or does not continue the
                cached sequence. The cache is unchanged then.
            RuntimeError: If another thread's forward with this cache has not ended.
        """
        if decoder is not self._decoder():
            raise ValueError(
                f"this cache was made for {type(self._decoder()).__name__} {id(self._decoder()):#x} and cannot be "
                f"used with {type(decoder).__name__} {id(decoder):#x}; make one cache per model"
            )
        tokens = arguments.get("input_ids")
        if tokens is None:
            tokens = arguments.get("inputs_embeds")
        if tokens is None:
            raise ValueError("one of input_ids and inputs_embeds must be given to a forward with a LowRankCache")
        self._turn.take()
        try:
            self._settle()
            self._begin(attended_by(decoder), tokens, arguments.get("position_ids"), arguments.get("attention_mask"))
        except BaseException:
            self._turn.give_back()
            raise

    def _begin(
        self, attended: Attended, tokens: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None
    ) -> None:
        length = self._track.slots
        self._length_before, self._others_before = length, self._others_progress()
        self._attended = attended
        try:
            self._track.begin(tokens.shape[0], tokens.shape[1], position_ids, attention_mask, tokens.device)
            for store in self._stores:
                store.begin(attended.impl)
            self._updated = set()
        except BaseException:
            self._updated = None
            for store in self._stores:
                store.rollback()
            self._track.truncate(length)
            raise

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached tokens, padding included; during a forward, and after one that failed, those before it."""
        return super().get_seq_length(layer_idx) if self._updated is None else self._length_before

    @torch.compiler.disable(reason="buffers grow and latents are encoded by Python control flow")
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """See ``LowRankLayer.update``; layers that are not compressed go to transformers' own classes."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, LowRankLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        expected = (self._track.batch, self._track.slots - layer.get_seq_length())
        updated = self._updated if self._turn.is_mine() else None
        if updated is None or layer_idx in updated or (key_states.shape[0], key_states.shape[2]) != expected:
            raise ValueError(
                f"layer {layer_idx} was updated outside a forward of the model this cache was made for, so the "
                "positions of its tokens are unknown; make one cache per model"
            )
        for side in ("key", "value"):
            rope = layer.shape.side(side).rope
            if rope is not None:
                self._track.note_frequencies(self._living_decoder(), rope, layer.get_seq_length())
        if layer_idx in self._attended.layers and layer.can_extend():
            # The forward's own states, with everything else attached for the attention function.
            keys, values = key_states.detach(), value_states.detach()
            attach_view(keys, layer.extend(keys, values, self._attended.impl))
        else:
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        updated.add(layer_idx)
        if len(updated) == len(self._compressed):
            self._updated = None
            self._track.end()
            for store in self._stores:
                store.commit()
            self._turn.give_back()
        return keys, values

    def _settle(self) -> None:
        """If the last forward did not reach every layer, return to the state before it."""
        if self._half_changed:
            raise ValueError(
                "a crop or a change of rows of this cache was interrupted, so its layers do not agree any more; "
                "call cache.reset() and start again"
            )
        if self._updated is None:
            return
        linear = [layer for layer in self._other_layers() if isinstance(layer, LinearAttentionCacheLayerMixin)]
        # Linear layers do not tell whether the failed forward reached them.
        perhaps = any(state for layer in linear for state in layer.has_previous_state.values())
        if perhaps or self._others_progress() != self._others_before:
            raise ValueError(
                "the last forward failed part-way and this model's sliding-window or linear layers cannot be rolled "
                "back; call cache.reset() and start again"
            )
        for store in self._stores:
            store.rollback()
        self._track.truncate(min(store.lengths[0] for store in self._stores))
        self._updated = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; 0 removes none.

        Raises:
            ValueError: If ``tokens_to_remove`` is positive, as in transformers.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be at most 0 (-3 removes three tokens), got {tokens_to_remove}")
        with self._changing():
            self._change_others("crop", tokens_to_remove)
            if tokens_to_remove < 0:
                kept = max(0, self._track.slots + tokens_to_remove)
                for store in self._stores:
                    store.truncate(kept)
                self._track.truncate(kept)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row ``i`` what row ``beam_idx[i]`` held, as beam search asks."""
        self._change_rows("reorder_cache", beam_idx, lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, next to itself."""
        self._change_rows("batch_repeat_interleave", repeats, lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows ``indices``."""
        self._change_rows("batch_select_indices", indices, lambda rows: rows[indices.to(rows.device)])

    def reset(self) -> None:
        """Forget all tokens; calibrated bases stay, a prompt's own are forgotten with it."""
        self._half_changed = True
        for layer in self._other_layers():
            layer.reset()
        for store in self._stores:
            store.clear()
        self._track.clear()
        self._updated = None
        self._turn.give_back()
        self._half_changed = False

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Mark the cache until a change of all its layers is through: whatever interrupts it, the mark stays."""
        self._settle()
        self._turn.give_back()
        self._half_changed = True
        yield
        self._half_changed = False

    def _change_others(self, change: str, argument) -> None:
        """Call ``change`` of all layers that are not compressed."""
        for changed, layer in enumerate(self._other_layers()):
            try:
                getattr(layer, change)(argument)
            except (RuntimeError, AttributeError) as error:
                # transformers' layers refuse before they change; if the first one does, the cache is as it was.
                self._half_changed = changed > 0 or isinstance(error, torch.OutOfMemoryError)
                raise

    def _change_rows(self, change: str, argument: Tensor | int, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch axis to everything that is held."""
        if self._track.batch is not None:
            device = argument.device if isinstance(argument, Tensor) else None
            function(torch.arange(self._track.batch, device=device))  # a row that does not exist raises here
        with self._changing():
            self._change_others(change, argument)
            self._track.map_batch(function)
            for store in self._stores:
                store.map_batch(function)

    def _others_progress(self) -> list[int]:
        """Tokens seen so far by each attention layer that is not compressed."""
        return [layer.get_seq_length() for layer in self._other_layers() if isinstance(layer, CacheLayerMixin)]

    def _low_rank_layers(self) -> list[LowRankLayer]:
        return [layer for layer in self.layers if isinstance(layer, LowRankLayer)]

    def _layers_kept(self) -> dict[int, Any]:
        """Layers that are not compressed, by index."""
        return {index: layer for index, layer in enumerate(self.layers) if not isinstance(layer, LowRankLayer)}

    def _other_layers(self) -> list:
        return list(self._layers_kept().values())

    def __deepcopy__(self, memo: dict) -> "LowRankCache":
        """A cache that shares the bases and the model and owns its tokens."""
        self._settle()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        watch(self._living_decoder(), copied)
        return copied

    def _living_decoder(self) -> nn.Module:
        decoder = self._decoder()
        if decoder is None:
            raise ReferenceError("the model this cache was made for does not exist any more")
        return decoder

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the cached tokens to ``folder``: JSON and safetensors, without room to grow and without the bases.

        Everything is written as it is stored, so a cache that is loaded goes on exactly as this one would. An older
        saved cache in the folder is replaced when the new one is complete, and is untouched if anything fails.

        Raises:
            ValueError: If the cache is empty.
            NotImplementedError: If a layer that is not compressed is of a kind that cannot be saved.
            OSError: If there is no room or no permission.
        """
        write_folder(folder, *self._gather())

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save to a repository on the hub; ``options`` as ``saved_folder.push_folder`` takes them."""
        facts, tensors = self._gather()
        with TemporaryDirectory() as folder:
            write_folder(folder, facts, tensors)
            return push_folder(folder, repo_id, facts, **options)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, model: PreTrainedModel, projections: Projections | None = None, **download: Any
    ) -> "LowRankCache":
        """Load what ``save_pretrained`` wrote, for the same model with the same projections.

        Args:
            name_or_path: A folder, or a repository on the hub.
            model: The model that made the cache, in the same dtype, on any device.
            projections: Those it was made with, at full rank or truncated for its ratio; None for xkv.
            download: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and ``force_download``.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged or has another format version, or belongs to another model or to
                other projections.
            TypeError: If ``projections`` are something else.
        """
        if projections is not None and not isinstance(projections, Projections):
            raise TypeError(f"projections must be Projections, got {type(projections).__name__}")
        folder, facts, saved = read_folder(name_or_path, **download)
        with damage_named(folder):
            check_owner(folder, facts, owner_facts(model.config, model_shape(model)))
            made_with = facts["projections_fingerprint"]
            if (made_with is None) != (projections is None):
                expected = "None, for xkv made this cache" if made_with is None else "those that made this cache"
                raise ValueError(f"projections must be {expected}, got {projections!r}")
            cache = cls(model, projections, **settings_from_json(facts["settings"]))
            if cache._bases_fingerprint() != made_with:
                raise ValueError(
                    f"projections must be those that made the cache in {folder}; with these, which differ, its latents "
                    "would be read wrongly"
                )
            parts = cache._track, cache._stores, cache._layers_kept()
            fill(*parts, facts, saved, one_token_cache(model).layers, input_device(model))
        for layer in cache._low_rank_layers():
            layer.is_initialized = True
        return cache

    def _gather(self) -> tuple[dict[str, Any], SavedTensors]:
        self._settle()
        facts, tensors = gather(self._track, self._stores, self._layers_kept())
        facts |= {
            **self._owner,
            "projections_fingerprint": self._bases_fingerprint(),
            "settings": settings_to_json(self._settings),
            "compression_ratio": self.full_bytes() / tensors.nbytes,
        }
        return facts, tensors

    def _bases_fingerprint(self) -> str | None:
        """SHA-256 of the truncated bases in use; None for xkv, whose bases are saved with the tokens."""
        if not self._coders:
            return None
        return hashlib.sha256("".join(coder.fingerprint for coder in self._coders).encode()).hexdigest()

    def stored_bytes(self) -> int:
        """Bytes of every tensor kept for the cached tokens, unused room included; bases are not.

        Linear-attention states are not counted here nor in ``full_bytes``.
        """
        return (
            self._track.nbytes + sum(store.nbytes for store in self._stores) + sum(_storage_bytes(self._other_states()))
        )

    def full_bytes(self) -> int:
        """Bytes the full cache would take for the same tokens, at 16 bits a number.

        The dtype of the model does not matter: the full cache of a float32 model is twice this.
        """
        compressed = sum(
            layer.get_seq_length() * (layer.shape.key.width + layer.shape.value.width)
            for layer in self._low_rank_layers()
        )
        return 2 * (compressed * (self._track.batch or 0) + sum(tensor.numel() for tensor in self._other_states()))

    def compression_ratio(self) -> float:
        """``full_bytes() / stored_bytes()`` now; 1.0 while the cache is empty."""
        stored = self.stored_bytes()
        return self.full_bytes() / stored if self.get_seq_length() else 1.0

    def projection_bytes(self) -> int:
        """Bytes of the truncated bases that this cache uses; shared by caches of the same settings.

        0 for xkv, whose bases belong to prompts and count in ``stored_bytes``.
        """
        return sum(coder.nbytes for coder in self._coders)

    def latent_bytes_per_token(self) -> int:
        """Bytes of one token of one sequence in all latents, padding and steps included."""
        return sum(tier_bytes(bits, channels) for group in self.groups() for bits, channels in group.tiers)

    def groups(self) -> list[CachedGroup]:
        """What is stored together, and how much of it is latents now."""
        return [
            CachedGroup(
                tuple(store.coder.members),
                tuple(store.coder.tiers),
                0 if store.latents is None else store.latents.tokens,
            )
            for store in self._stores
        ]

    def _other_states(self) -> list[Tensor]:
        """Keys and values of the attention layers that are not compressed."""
        tensors = [getattr(layer, name, None) for layer in self._other_layers() for name in ("keys", "values")]
        return [tensor for tensor in tensors if isinstance(tensor, Tensor)]


def _storage_bytes(tensors: list[Tensor]) -> list[int]:
    """Bytes of the storages behind ``tensors``: a sliding layer keeps a view of what it was last given."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return [storage.nbytes() for storage in storages.values()]


def _check_options(residual_length, num_sink_tokens, block_size, latent_dtype) -> StoreOptions:
    sizes = {
        "residual_length": (residual_length, 0),
        "num_sink_tokens": (num_sink_tokens, 0),
        "block_size": (block_size, 1),
    }
    for name, (size, least) in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {size!r}")
    if latent_dtype is not None and not (isinstance(latent_dtype, torch.dtype) and latent_dtype.is_floating_point):
        raise ValueError(f"latent_dtype must be a floating torch.dtype or None, got {latent_dtype!r}")
    return StoreOptions(residual_length, num_sink_tokens, block_size, latent_dtype)


def _warn_of_borders(projections: Projections, devices: Mapping[int, torch.device]) -> None:
    """Say which layer groups cross from one device to another: their latents must be copied in every forward."""
    crossing = {
        basis.layers: [str(devices[layer]) for layer in basis.layers]
        for basis in projections.bases
        if len({devices.get(layer) for layer in basis.layers}) > 1
    }
    if crossing:
        layers, where = next(iter(crossing.items()))
        warnings.warn(
            f"{len(crossing)} layer group(s) cross devices, the first being layers {list(layers)} on {where}; their "
            "latents lie on the last layer's device and are copied to the others in every forward. To avoid it, choose "
            "a device_map with borders between groups, or calibrate with layer_group_size=1",
            stacklevel=3,
        )


_CODERS: "weakref.WeakKeyDictionary[Projections, dict]" = weakref.WeakKeyDictionary()


def _coders(projections: Projections, compression_ratio, ranks, bits, latent_dtype) -> list[Coder]:
    """Truncated bases, made once for each setting of some projections."""
    dtype = latent_dtype or torch.float32
    key = repr((compression_ratio if ranks is None else None, ranks, bits, dtype))
    made = _CODERS.setdefault(projections, {})
    if key not in made:
        plans = plan_stores(projections, compression_ratio, ranks, bits)
        coders = []  # all or none are remembered: making them may be interrupted, or done by two threads at once
        for store, plan in zip(projections.stores(), plans, strict=True):
            members = projections.shape.members(store[0].side, store[0].layers)
            # Channels with a loss of their own keep it: rotation would spread what matters over what does not.
            rotated = bits in QUANTIZED_BITS and all(basis.rank_weight is not None for basis in store)
            coders.append(Coder(store, plan, members, dtype, rotated))
        made[key] = coders
    return made[key]


def _make_layers(model: PreTrainedModel, shape: ModelShape, stores: list[LatentStore]) -> list:
    """transformers' own layer classes, but for the compressed layers."""
    by_layer: dict[int, dict[str, LatentStore]] = {}
    for store in stores:
        for layer_idx, side in store.coder.members:
            by_layer.setdefault(layer_idx, {})[side] = store
    layers = []
    config = model.config.get_text_config(decoder=True)
    for index, (layer_type, kwargs) in enumerate(zip(*get_layer_types_and_kwargs(config), strict=True)):
        if index in by_layer:
            layers.append(LowRankLayer(shape.layer(index), by_layer[index]))
        else:
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**kwargs))
    return layers
