"""``LowRankCache``: a transformers ``Cache`` whose full-attention layers hold quantized latents.

The container holds one ``LatentStore`` per layer group's keys, values or both, since these span layers; its layers
hand states to them. What transformers calls, and when: docs/cache_contract.md.
"""

import hashlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lowrank_cache import saved_cache
from lowrank_cache.artefact import SavedTensors
from lowrank_cache.attention import join, make_attending
from lowrank_cache.coder import Coder, calibrated_coders, living_projections
from lowrank_cache.forward import Forward, watch
from lowrank_cache.kernels.ambient import without_autocast
from lowrank_cache.latent_view import attach_view
from lowrank_cache.layers import LowRankLayer, make_layers
from lowrank_cache.positions import PositionTrack
from lowrank_cache.probe import decoder_of, layer_devices, model_shape, position_axes, probe_states, probed_decoders
from lowrank_cache.projections import TUNED_WEIGHTS, Projections
from lowrank_cache.prompt_svd import prompt_coders
from lowrank_cache.shapes import SIDES
from lowrank_cache.store import LatentStore, StoreOptions


class CachedGroup(NamedTuple):
    """What a ``LowRankCache`` stores together.

    Attributes:
        members: ``(layer, "key" or "value")`` of all that one latent holds.
        tiers: ``(bits, channels)`` of a latent, most bits first; empty if these states are kept exactly or not at all.
        tokens: Tokens of each sequence that are latents now.
    """

    members: tuple[tuple[int, str], ...]
    tiers: tuple[tuple[int, int], ...]
    tokens: int


class LowRankCache(Cache):
    """KV cache of quantized low-rank latents, a drop-in for ``model.generate(past_key_values=...)``.

    Each sequence keeps its first ``num_sink_tokens`` tokens and its last ``residual_length`` (up to
    ``residual_length + block_size``) tokens exactly; all others are stored as latents only. A forward
    always attends exactly to its own tokens. One cache serves one model and, until ``reset``, one
    batch of sequences.

    Args:
        model: The decoder-only transformers model whose ``generate`` or ``forward`` will use the cache.
        projections: Bases calibrated on this model (or on the same model in other weights, e.g. 4-bit), or the folder
            or hub repository that holds them. Load them once where you make many caches.
        compression_ratio: Bytes per token of the full cache at 16 bits, over bytes per token of the
            latents; at least 1.
        ranks: Channels to keep instead of a ratio: one number for every basis (at most its width), or
            ``{layer: (key_rank, value_rank)}`` by the first layer of each layer group, whose sum counts where
            keys and values share a latent.
        bits: One width (16, 8, 4, 2) for all channels kept, below 16 after a Hadamard rotation for all methods but
            fisher; None lets the method choose.
        residual_length: Most recent tokens kept exactly.
        num_sink_tokens: First real tokens of each sequence kept exactly.
        block_size: Tokens encoded at a time.
        latent_dtype: Dtype of 16-bit latents and of the projection matrices; None takes that of the
            incoming keys for latents, and float32 for the matrices.
        method: ``"xkv"`` instead of projections: each sequence's bases come from its own prompt, see ``prompt_svd``.
            They count in ``stored_bytes``.
        layer_group_size: Adjacent layers that share xkv's bases, 4 unless given.
        new_tokens: What xkv does with tokens after those that made the bases: ``"encode"`` them with the
            same bases (unless given) or keep them ``"exact"``.
        attend: ``"auto"`` attends to latents wherever the model can, and warns, once per model, where it cannot;
            ``"reconstruct"`` makes keys and values of them in each forward, for any attention. xkv reconstructs.

    Raises:
        NotImplementedError: If the model's cache cannot be compressed (see ``probe.model_shape``).
        ValueError: If an argument is out of range or ``projections`` belong to another model.
        TypeError: If an argument has the wrong type.

    Source: ReCalKV (arXiv:2505.24357) and xKV (arXiv:2503.18893) for grouped and cross-layer bases, KVTC
    (arXiv:2511.01815) for sinks, window and bits by channel. Differs: see docs/method.md.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        projections: Projections | str | Path | None = None,
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
        attend: str = "auto",
    ):
        options = StoreOptions(residual_length, num_sink_tokens, block_size, latent_dtype)
        if (projections is None) == (method is None):
            given = "neither" if method is None else "both"
            raise ValueError(f"exactly one of projections and method must be given, got {given}")
        if method not in (None, "xkv"):
            raise ValueError(f"method must be 'xkv'; the bases of other methods are calibrated, got {method!r}")
        if attend not in ("auto", "reconstruct"):
            raise ValueError(f"attend must be 'auto' or 'reconstruct', got {attend!r}")
        self._settings = {  # what `from_pretrained` makes an equal cache of
            "method": method,
            "compression_ratio": compression_ratio,
            "ranks": ranks,
            "bits": bits,
            "residual_length": residual_length,
            "num_sink_tokens": num_sink_tokens,
            "block_size": block_size,
            "latent_dtype": latent_dtype,
            "layer_group_size": layer_group_size,
            "new_tokens": new_tokens,
        }
        shape, decoder = model_shape(model), decoder_of(model)
        budget = layer_devices(model), compression_ratio, ranks, bits, latent_dtype
        coders: Sequence[Coder]
        if projections is not None:
            projections = _loaded(projections)
            projections.check_model(shape)
            _warn_of_weights(model, projections.check_weights(probe_states(model)))
            if layer_group_size is not None or new_tokens is not None:
                raise ValueError("layer_group_size and new_tokens belong to method 'xkv'; projections hold their own")
            coders = calibrated_coders(projections, *budget)
            self._track = PositionTrack(projections.frame_length, num_sink_tokens, position_axes(model))
        else:
            size = 4 if layer_group_size is None else layer_group_size
            coders = prompt_coders(shape, *budget, size, "encode" if new_tokens is None else new_tokens)
            self._track = PositionTrack(1, num_sink_tokens, position_axes(model))
        self._stores = [LatentStore(coder, self._track, options) for coder in coders]
        self.target_compression_ratio = float(compression_ratio) if ranks is None else None
        self._owner = saved_cache.owner_facts(model.config, shape)
        self._decoder: weakref.ref[nn.Module] = weakref.ref(decoder)
        super().__init__(layers=make_layers(model, shape, self._stores))
        self._attends = attend == "auto" and any(layer.attendable for layer in self._low_rank_layers())
        self._attends = self._attends and make_attending(model, self)
        compressed, others = [layer.layer_idx for layer in shape.layers], list(self._others().values())
        self._forward = Forward(self._decoder, self._track, self._stores, compressed, others, self._attends)
        watch(decoder, self)

    def begin_forward(self, decoder: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Called by the decoder's hook before each forward with that forward's arguments, see ``Forward.begin``."""
        self._forward.begin(decoder, arguments)

    def end_forward(self, decoder: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Called by the decoder's hook when a forward has ended without an error, see ``Forward.end``."""
        self._forward.end(decoder)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached tokens, padding included; during a forward, and after one that failed, those before it."""
        before = self._forward.length_before
        return super().get_seq_length(layer_idx) if before is None else before

    @torch.compiler.disable(reason="buffers grow and latents are encoded by Python control flow")
    @without_autocast
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """See ``LowRankLayer.update``; layers that are not compressed go to transformers' own classes."""
        layer = self.layers[layer_idx]
        key_states, value_states = (self._track.without_padding(states) for states in (key_states, value_states))
        if not isinstance(layer, LowRankLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._forward.check_update(layer_idx, layer.get_seq_length(), key_states)
        for side in SIDES:
            rope = layer.shape.side(side).rope
            if rope is not None:
                self._track.note_frequencies(self._living_decoder(), rope, layer.get_seq_length())
        if layer_idx in self._forward.attended and layer.attendable and layer.get_seq_length():
            # The forward's own states, with everything else attached for the attention function.
            keys, values = key_states.detach(), value_states.detach()
            attach_view(keys, layer.extend(keys, values, self._forward.impl, self._forward.offer(layer_idx)))
        else:
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._forward.note_updated(layer_idx)
        return keys, values

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Keys, values and sliding window of each layer, as of a ``DynamicCache``; compressed ones reconstructed."""
        for layer in self.layers:
            states = getattr(layer, "keys", None), getattr(layer, "values", None)
            yield *states, getattr(layer, "_sliding_window_tensor", None)

    @property
    def is_initialized(self) -> bool:
        """Whether tokens are cached."""
        return self._track.slots > 0

    @property
    def is_linear(self) -> list[bool]:
        """Which layers hold states and no tokens, in the order of the layers."""
        layers = zip(super().is_linear, self.layers, strict=True)
        return [linear and not isinstance(layer, LowRankLayer) for linear, layer in layers]

    @property
    def batch_size(self) -> int:
        """Of the cached sequences; -1 while the cache is empty."""
        return -1 if self._track.batch is None else self._track.batch

    @property
    def max_cache_len(self) -> int:
        """Raises AttributeError: who asks, as PEFT's prefix tuning does, is about to use another cache instead."""
        raise AttributeError(
            "a LowRankCache has no max_cache_len: it grows without a maximum, and what asks for one (prefix tuning) "
            "would replace it by a cache of its own, which is not supported"
        )

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Raises NotImplementedError: a LowRankCache lies where its layers compute."""
        raise NotImplementedError("a LowRankCache cannot be offloaded; lower residual_length, or raise the ratio")

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """See ``offload``."""
        self.offload(layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; 0 removes none.

        Raises:
            ValueError: If ``tokens_to_remove`` is positive, as in transformers.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be at most 0 (-3 removes three tokens), got {tokens_to_remove}")
        with self._forward.changing():
            self._forward.change_others("crop", tokens_to_remove)
            if tokens_to_remove < 0:
                kept = max(0, self._track.slots + tokens_to_remove)
                for store in self._stores:
                    store.truncate(kept)
                self._track.truncate(kept)

    def reorder_cache(self, beam_idx: Tensor | Sequence[int]) -> None:
        """Give batch element ``i`` what ``beam_idx[i]`` held, as beam search asks."""
        beam_idx = _indices(beam_idx)
        self._change_batch("reorder_cache", beam_idx, lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch element ``repeats`` times, next to itself."""
        self._change_batch("batch_repeat_interleave", repeats, lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keep only the batch elements ``indices``."""
        indices = _indices(indices)
        self._change_batch("batch_select_indices", indices, lambda states: states[indices.to(states.device)])

    def reset(self) -> None:
        """Forget all tokens; calibrated bases stay, a prompt's own are forgotten with it."""
        self._forward.reset()

    def _change_batch(self, change: str, argument: Tensor | int, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch axis to everything that is held."""
        if self._track.batch is not None:
            device = argument.device if isinstance(argument, Tensor) else None
            function(torch.arange(self._track.batch, device=device))  # an element that does not exist raises here
        with self._forward.changing():
            self._forward.change_others(change, argument)
            self._track.map_batch(function)
            for store in self._stores:
                store.map_batch(function)

    def _low_rank_layers(self) -> list[LowRankLayer]:
        return [layer for layer in self.layers if isinstance(layer, LowRankLayer)]

    def _others(self) -> dict[int, Any]:
        """What is not compressed, by index of the layer: transformers' own layers, and states beside tokens."""
        held = {index: getattr(layer, "states", layer) for index, layer in enumerate(self.layers)}
        return {index: layer for index, layer in held.items() if not isinstance(layer, LowRankLayer)}

    def __deepcopy__(self, memo: dict) -> "LowRankCache":
        """A cache that shares the bases and the model and owns its tokens."""
        self._forward.settle()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        watch(self._living_decoder(), copied)
        if self._attends:
            join(copied)
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
        facts, tensors = self._gathered()
        saved_cache.ARTEFACT.write(folder, facts, tensors)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save to a repository on the hub and return the commit's address; ``options``: see ``Artefact.push``."""
        return saved_cache.push(repo_id, *self._gathered(), **options)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        model: PreTrainedModel,
        projections: Projections | str | Path | None = None,
        *,
        attend: str = "auto",
        **download: Any,
    ) -> "LowRankCache":
        """Load what ``save_pretrained`` wrote, for the same model with the same projections.

        Args:
            name_or_path: A folder, or a repository on the hub.
            model: The model that made the cache, in the same dtype, on any device.
            projections: Those it was made with, at full rank or truncated for its ratio; None for xkv.
            attend: See the class; it is not saved.
            download: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and ``force_download``.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged or has another format version, or belongs to another model or to
                other projections.
            TypeError: If ``projections`` are something else.
        """
        projections = None if projections is None else _loaded(projections)
        with saved_cache.reading(name_or_path, **download) as saved:
            saved.check_owner(saved_cache.owner_facts(model.config, model_shape(model)), projections)
            cache = cls(model, projections, attend=attend, **saved.settings)
            saved.check_bases(*cache._bases_fingerprints())
            saved.fill(cache._track, cache._stores, cache._others(), model)
        return cache

    def __reduce__(self) -> tuple:
        """Pickled is what ``save_pretrained`` writes; the model and the projections must exist where it is loaded."""
        if self.get_seq_length():
            facts, tensors = self._gathered()
        else:
            facts, tensors = saved_cache.empty({**self._owner, **self._bases_fact()}, self._settings), SavedTensors()
        return _unpickled, (facts, dict(tensors), "auto" if self._attends else "reconstruct")

    def _gathered(self) -> tuple[dict[str, Any], SavedTensors]:
        """Facts and tensors of everything that is held."""
        self._forward.settle()
        parts = self._track, self._stores, self._others()
        facts = {**self._owner, **self._bases_fact()}
        return saved_cache.gather(facts, self._settings, *parts, full_bytes=self.full_bytes())

    def _bases_fact(self) -> dict[str, str | None]:
        return {"projections_fingerprint": self._bases_fingerprints()[0]}

    def _bases_fingerprints(self) -> list[str | None]:
        """SHA-256 of the bases in use, and as older versions took it; None for xkv, whose bases are saved too."""
        found = ["".join(part) for part in zip(*(store.coder.fingerprints for store in self._stores), strict=True)]
        return [hashlib.sha256(each.encode()).hexdigest() if each else None for each in found]

    def stored_bytes(self, *, linear_states: bool = False) -> int:
        """Bytes of every tensor kept for the cached tokens, unused room included; bases are not.

        ``linear_states``: count the states of linear-attention and convolution layers too, which do not grow.
        """
        held = self._track.nbytes + sum(store.nbytes for store in self._stores)
        return held + self._other_bytes(linear_states)

    def full_bytes(self, *, linear_states: bool = False) -> int:
        """Bytes the full cache would take for the same tokens: compressed layers at 16 bits a number.

        The full cache of a float32 model takes twice that for them. Layers that are not compressed are transformers'
        own in both caches, and count as they are held.
        """
        compressed = sum(
            layer.get_seq_length() * (layer.shape.key.width + layer.shape.value.width)
            for layer in self._low_rank_layers()
        )
        return 2 * compressed * (self._track.batch or 0) + self._other_bytes(linear_states)

    def compression_ratio(self, *, linear_states: bool = False) -> float:
        """``full_bytes`` over ``stored_bytes`` now; 1.0 while the cache is empty."""
        options = {"linear_states": linear_states}
        return self.full_bytes(**options) / self.stored_bytes(**options) if self.get_seq_length() else 1.0

    def projection_bytes(self) -> int:
        """Bytes of the truncated bases that this cache uses; shared by caches of the same settings.

        0 for xkv, whose bases belong to prompts and count in ``stored_bytes``.
        """
        return sum(store.coder.projection_bytes for store in self._stores)

    def latent_bytes_per_token(self) -> int:
        """Bytes of one token of one sequence in the latents of all layers, padding and steps included.

        Sinks, window and unused room come on top: ``stored_bytes`` counts them.
        """
        return sum(store.bytes_per_token for store in self._stores)

    def groups(self) -> list[CachedGroup]:
        """What is stored together, in the order of the layers: members, tiers, and tokens that are latents now."""
        return [
            CachedGroup(
                tuple((member.layer, member.side) for member in store.coder.members),
                store.coder.tiers,
                0 if store.latents is None else store.latents.tokens,
            )
            for store in self._stores
        ]

    def _other_bytes(self, linear_states: bool) -> int:
        """Bytes of the layers that are not compressed, by storage: sliding ones keep views of what came."""
        tensors: list[Any] = []
        for layer in self._others().values():
            tensors += [getattr(layer, name, None) for name in ("keys", "values")]
            if linear_states:
                for name in ("conv_states", "recurrent_states"):
                    tensors += getattr(layer, name, {}).values()
        storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _warn_of_weights(model: PreTrainedModel, difference: float) -> None:
    """Say so, if a model seems to be tuned further than its projections know; quantized and adapted ones are meant."""
    expected = getattr(model.config, "quantization_config", None) or hasattr(model, "peft_config")
    if difference > TUNED_WEIGHTS and not expected:
        warnings.warn(
            f"the weights of this {type(model).__name__} differ from those that the projections were calibrated on "
            f"(keys and values of a token by {difference:.0%}); the cache works, at more loss: calibrate on this model",
            stacklevel=3,
        )


def _unpickled(facts: Mapping[str, Any], tensors: dict[str, Tensor], attend: str) -> LowRankCache:
    """The cache that was pickled, for the one model and with the projections of this process that made it."""
    saved, found = saved_cache.SavedCache("the pickled cache", facts, SavedTensors(tensors)), []
    for decoder in probed_decoders():
        if model_shape(decoder).fingerprint != facts["model_fingerprint"]:
            continue
        for projections in [None] if facts["projections_fingerprint"] is None else living_projections():
            try:
                cache = LowRankCache(decoder, projections, attend=attend, **saved.settings)
                saved.check_bases(*cache._bases_fingerprints())
            except ValueError:  # of another model, or of another calibration
                continue
            found.append((cache, decoder))
            break
    if len(found) != 1:
        raise ValueError(
            f"the pickled LowRankCache needs the one model and the projections that made it, and this process has "
            f"{len(found)} such models that caches were made for; use cache.save_pretrained and "
            "LowRankCache.from_pretrained, which are told"
        )
    cache, decoder = found[0]
    if "tokens" in facts:
        saved.fill(cache._track, cache._stores, cache._others(), decoder)
    return cache


def _indices(indices: Tensor | Sequence[int]) -> Tensor:
    """Of batch elements, as a tensor; a boolean one stays."""
    if isinstance(indices, Tensor):
        return indices
    if not all(isinstance(index, int) for index in indices):
        raise TypeError(f"indices must be whole numbers, got {indices!r}")
    return torch.tensor(list(indices), dtype=torch.long, device="cpu")


def _loaded(projections: Projections | str | Path) -> Projections:
    if isinstance(projections, str | Path):
        return Projections.from_pretrained(projections)
    if not isinstance(projections, Projections):
        raise TypeError(f"projections must be Projections, a folder or a repository, got {type(projections).__name__}")
    return projections
