"""A cache's tokens to a folder and back: the facts of its JSON, and named tensors of all its parts.

Layers that are not compressed are transformers' own. Each kind of them has state of its own, so only kinds that are
known here are saved; others are refused by name.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from lowrank_cache.artefact import Artefact, SavedTensors, integer
from lowrank_cache.positions import PositionTrack
from lowrank_cache.probe import decoder_of, input_device, one_token_cache
from lowrank_cache.shapes import ModelShape, RopeShape, rope_buffer
from lowrank_cache.store import LatentStore

ARTEFACT = Artefact(
    name="saved cache",
    damaged="a damaged cache",
    config_file="lowrank_cache.json",
    tensor_file="lowrank_cache-*.safetensors",
    version=1,
    remedy="make the cache again",
)
_README = """---
library_name: lowrank-cache
tags:
- kv-cache
---

# A compressed prompt

The KV cache of {tokens} tokens in {batch} sequence(s), {megabytes:.2f} MB, for {base_model} ({model_type}).

```python
from lowrank_cache import LowRankCache

cache = LowRankCache.from_pretrained("{repository}", model{projections})
```
"""
_FREQUENCY_TOLERANCE = 0.02  # of one frequency: buffers that were cast to bfloat16 differ by 0.4%
_KINDS: tuple[type, ...] = (DynamicSlidingWindowLayer, LinearAttentionLayer)
if hasattr(cache_utils, "DummyLayer"):  # since transformers 5.23: layers without attention
    _KINDS += (cache_utils.DummyLayer,)


def owner_facts(config: Any, shape: ModelShape) -> dict[str, Any]:
    """Which model a cache belongs to; its name is for people, its fingerprint is what counts."""
    name = getattr(config, "_name_or_path", "") or "a model without a name"
    return {
        "base_model": Path(name).name if Path(name).is_dir() else name,  # paths of this machine are not shipped
        "model_type": shape.model_type,
        "model_fingerprint": shape.fingerprint,
    }


def gather(
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
    track: PositionTrack,
    stores: Sequence[LatentStore],
    others: Mapping[int, Any],
    full_bytes: int,
) -> tuple[dict[str, Any], SavedTensors]:
    """Facts and tensors of all tokens of a cache, between forwards.

    Args:
        facts: What else the JSON shall say.
        settings: Arguments that make an equal cache.
        others: Layers that are not compressed, by index; NotImplementedError if one cannot be saved.
        full_bytes: Of the full cache of the same tokens; ValueError if there are none.
    """
    if not track.slots:
        raise ValueError("a cache must hold at least one token to be saved, got an empty cache")
    for index, layer in others.items():
        _check_savable(layer, index, track.slots)
    tensors = SavedTensors()
    parts = {
        "batch": track.batch,
        "tokens": track.slots,
        "frequencies": track.save(tensors),
        "layer_groups": _layer_groups(stores),
        "stores": [store.save(tensors, f"store.{index}") for index, store in enumerate(stores)],
        "other_layers": {str(index): _save_layer(layer, tensors, f"layer.{index}") for index, layer in others.items()},
    }
    described = {"settings": _settings_to_json(settings), "compression_ratio": full_bytes / tensors.nbytes}
    return {"library_version": version("lowrank-cache"), **parts, **facts, **described}, tensors


def empty(facts: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the facts of ``gather``, those that make an empty cache."""
    return {**facts, "settings": _settings_to_json(settings)}


def push(repo_id: str, facts: Mapping[str, Any], tensors: SavedTensors, **options: Any) -> str:
    """Write what ``gather`` gave, with a README, to a repository on the hub, see ``Artefact.push``."""
    readme = _README.format(
        repository=repo_id,
        megabytes=tensors.nbytes / 1e6,
        projections=", projections" if facts["projections_fingerprint"] else "",
        **{name: facts[name] for name in ("tokens", "batch", "base_model", "model_type")},
    )
    with TemporaryDirectory() as folder:
        ARTEFACT.write(folder, facts, tensors, readme)
        return ARTEFACT.push(folder, repo_id, **options)


@contextmanager
def reading(name_or_path: str | Path, **download: Any) -> Iterator["SavedCache"]:
    """What ``write`` wrote, see ``Artefact.read``; damage that shows while it is used is named as such."""
    folder, facts, tensors = ARTEFACT.read(name_or_path, **download)
    with ARTEFACT.damage_named(folder):
        yield SavedCache(folder, facts, SavedTensors(tensors))


class SavedCache:
    """A cache as a folder holds it: ``facts`` are its JSON; messages name ``folder``."""

    def __init__(self, folder: Path | str, facts: Mapping[str, Any], tensors: SavedTensors):
        self._folder, self._facts, self._tensors = folder, facts, tensors
        self.settings = _settings_from_json(facts["settings"])  # arguments of the cache to fill

    def check_owner(self, owner: Mapping[str, Any], projections: object) -> None:
        """Raise ValueError unless a model of this structure made the cache, with projections if there are any."""
        facts = self._facts
        if facts["model_fingerprint"] != owner["model_fingerprint"]:
            raise ValueError(
                f"{self._folder} does not belong to this model: {facts['base_model']} ({facts['model_type']}) made it, "
                f"whose cached layers differ from those of {owner['base_model']} ({owner['model_type']})"
            )
        made_with = facts["projections_fingerprint"]
        if (made_with is None) != (projections is None):
            expected = "None, for xkv made this cache" if made_with is None else "those that made this cache"
            raise ValueError(f"projections must be {expected}, got {projections!r}")

    def check_bases(self, *fingerprints: str | None) -> None:
        """Raise ValueError unless bases with one of these fingerprints made the cache."""
        if self._facts["projections_fingerprint"] not in fingerprints:
            raise ValueError(
                f"projections must be those that made the cache in {self._folder}; with these, which differ, its "
                "latents would be read wrongly"
            )

    def fill(
        self, track: PositionTrack, stores: Sequence[LatentStore], others: Mapping[int, Any], model: PreTrainedModel
    ) -> None:
        """Take what ``gather`` was given into an empty cache; ValueError if a part is missing, left over or unfit."""
        facts, saved = self._facts, self._tensors
        templates = one_token_cache(model).layers  # shapes, dtypes and devices of what the model hands to a cache
        batch, slots = (integer(facts[name], name, 1) for name in ("batch", "tokens"))
        groups, members = _layer_groups(stores), [member for store in stores for member in store.coder.members]
        if facts.get("layer_groups", groups) != groups:  # absent from caches of older versions
            raise ValueError(
                f"the layer groups of the saved cache, {facts['layer_groups']}, must be those of this model's, "
                f"{groups}: xkv's end where the model goes on on another device, so load it under the device_map it "
                "was made with"
            )
        ropes = {member.shape.rope for member in members if member.shape.rope is not None}
        self._check_frequencies(decoder_of(model), ropes)
        track.load(saved, facts["frequencies"], batch, slots, ropes, input_device(model))
        if len(facts["stores"]) != len(stores) or set(facts["other_layers"]) != {str(index) for index in others}:
            raise ValueError("stores and other_layers must be those of the model's cache")
        for index, (store, part) in enumerate(zip(stores, facts["stores"], strict=True)):
            states: list[Tensor] = [getattr(templates[layer], f"{side}s") for layer, side, _ in store.coder.members]
            store.load(saved, f"store.{index}", part, states)
        for index, layer in others.items():
            held = facts["other_layers"][str(index)]
            _load_layer(layer, saved, f"layer.{index}", held, batch, slots, templates[index])
        saved.check_empty()

    def _check_frequencies(self, decoder: nn.Module, ropes: set[RopeShape]) -> None:
        """Raise ValueError if the model rotates otherwise: its queries would not meet the cached keys."""
        for rope in ropes:
            ours = rope_buffer(decoder, rope.source).detach().float().cpu()
            for nth in range(len(self._facts["frequencies"].get(rope.source, ()))):
                saved = self._tensors.get(f"frequencies.{rope.source}.{nth}", ours)
                if rope.dynamic or saved.shape != ours.shape:  # of the context then; judged when they are taken
                    continue
                difference = float(((saved - ours).abs() / ours.abs().clamp(min=1e-30)).max())
                if not difference <= _FREQUENCY_TOLERANCE:
                    raise ValueError(
                        f"the rotary frequencies that made {self._folder} must be this model's, and differ by up to "
                        f"{difference:.0%}: its rope_theta or rope_scaling was changed; make the cache again"
                    )


def _layer_groups(stores: Sequence[LatentStore]) -> list[list[int]]:
    """By store, the layers whose tokens it holds, as JSON holds them."""
    return [sorted({member.layer for member in store.coder.members}) for store in stores]


def _settings_to_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``LowRankCache`` as JSON holds them: dtypes by name, rank pairs as lists."""
    dtype, ranks = settings["latent_dtype"], settings["ranks"]
    return {
        **settings,
        "latent_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "ranks": sorted([layer, *pair] for layer, pair in ranks.items()) if isinstance(ranks, Mapping) else ranks,
    }


def _settings_from_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Undo ``_settings_to_json``; what is no valid argument is left to ``LowRankCache`` to refuse."""
    dtype, ranks = settings["latent_dtype"], settings["ranks"]
    if isinstance(ranks, list):
        ranks = {layer: (key, value) for layer, key, value in ranks}
    return {**settings, "latent_dtype": None if dtype is None else getattr(torch, dtype), "ranks": ranks}


def _check_savable(layer: object, layer_idx: int, slots: int) -> None:
    """Raise NotImplementedError, before anything is written, unless ``_save_layer`` keeps all of a layer's state."""
    known = type(layer) in _KINDS
    if isinstance(layer, DynamicSlidingWindowLayer) and isinstance(layer.keys, Tensor):
        known = known and layer.get_seq_length() == slots and layer.keys.shape[2] >= _kept(layer, slots)
    if isinstance(layer, LinearAttentionLayer):
        known = known and all(
            states is None or states.shape[-1] >= (layer.conv_kernel_size[index] or 0)
            for index, states in layer.conv_states.items()
        )
    if not known:
        raise NotImplementedError(f"layer {layer_idx} is a {type(layer).__name__} in a state that cannot be saved")


def _save_layer(layer: Any, into: SavedTensors, name: str) -> dict[str, Any]:
    """Add a layer's tensors; what it kept for undoing speculative tokens is left out."""
    facts: dict[str, Any] = {"kind": type(layer).__name__}
    if isinstance(layer, DynamicSlidingWindowLayer):
        facts["filled"] = layer.is_initialized
        if layer.is_initialized:
            kept = _kept(layer, layer.get_seq_length())
            for part in ("keys", "values"):
                states = getattr(layer, part)
                into.add(f"{name}.{part}", states[:, :, states.shape[2] - kept :])
    elif isinstance(layer, LinearAttentionLayer):
        held = _linear_states(layer)
        for part, states in held.items():
            kind, index = part.split(".")
            size = layer.conv_kernel_size[int(index)] if kind == "conv" else None
            into.add(f"{name}.{part}", states if size is None else states[..., states.shape[-1] - size :])
        facts["states"] = sorted(held)
        facts["seen"] = [index for index, seen in layer.has_previous_state.items() if seen]
    return facts


def _load_layer(
    layer: Any, saved: SavedTensors, name: str, facts: dict[str, Any], batch: int, slots: int, template: Any
):
    """Take into an empty layer what ``_save_layer`` added; ValueError if its kind or a tensor does not fit.

    ``template`` is the same layer of a cache that holds one token: its shapes, dtypes and devices.
    """
    if facts["kind"] != type(layer).__name__ or type(layer) not in _KINDS:
        raise ValueError(f"{name} must be a {type(layer).__name__}, got {facts['kind']!r}")
    if isinstance(layer, DynamicSlidingWindowLayer) and facts["filled"] is True:
        taken = []
        for part in ("keys", "values"):
            model = getattr(template, part)
            if not isinstance(model, Tensor):
                raise ValueError(f"{name} holds tokens, but this model gives the layer none")
            size = (batch, model.shape[1], _kept(layer, slots), model.shape[3])
            taken.append(saved.take(f"{name}.{part}", size, model.dtype, model.device))
        layer.lazy_initialization(*taken)
        layer.keys, layer.values = taken
        layer.cumulative_length = slots
    elif isinstance(layer, LinearAttentionLayer):
        present = _linear_states(template)
        if sorted(present) != facts["states"]:
            raise ValueError(f"{name} must have the states {sorted(present)}, got {facts['states']}")
        for part, model in present.items():
            kind, index = part.split(".")
            states = saved.take(f"{name}.{part}", (batch, *model.shape[1:]), model.dtype, model.device)
            given: dict[str, Any] = {f"{kind}_states": states, "state_idx": int(index)}
            layer.lazy_initialization(**given)
            _linear_states(layer)[part].copy_(states)
        seen = facts["seen"]
        if not all(index in layer.has_previous_state for index in seen):
            raise ValueError(f"{name}.seen must name states of the layer, got {seen}")
        layer.has_previous_state.update(dict.fromkeys(seen, True))


def _kept(layer: DynamicSlidingWindowLayer, slots: int) -> int:
    """Tokens that later forwards can see."""
    return min(slots, layer.sliding_window - 1)


def _linear_states(layer: LinearAttentionLayer) -> dict[str, Tensor]:
    held = [("conv", *item) for item in layer.conv_states.items()]
    held += [("recurrent", *item) for item in layer.recurrent_states.items()]
    return {f"{kind}.{index}": state for kind, index, state in held if state is not None}
