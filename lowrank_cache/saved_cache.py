"""What a saved cache consists of: facts for the JSON, and named tensors, from a cache's parts and back into them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_cache.models import ModelShape
from lowrank_cache.other_layers import check_savable, load_layer, save_layer
from lowrank_cache.positions import PositionTrack
from lowrank_cache.saved_tensors import SavedTensors, whole_number
from lowrank_cache.store import LatentStore

__all__ = ["check_owner", "fill", "gather", "owner_facts", "settings_from_json", "settings_to_json"]


def owner_facts(config: Any, shape: ModelShape) -> dict[str, Any]:
    """Which model a cache belongs to; its name is for people, its fingerprint is what counts."""
    name = getattr(config, "_name_or_path", "") or "a model without a name"
    return {
        "base_model": Path(name).name if Path(name).is_dir() else name,  # paths of this machine are not shipped
        "model_type": shape.model_type,
        "model_fingerprint": shape.fingerprint,
    }


def check_owner(folder: str, facts: Mapping[str, Any], owner: Mapping[str, Any]) -> None:
    """Raise ValueError unless a saved cache belongs to a model of this structure."""
    if facts["model_fingerprint"] != owner["model_fingerprint"]:
        raise ValueError(
            f"{folder} does not belong to this model: {facts['base_model']} ({facts['model_type']}) made it, whose "
            f"cached layers differ from those of {owner['base_model']} ({owner['model_type']})"
        )


def gather(
    track: PositionTrack, stores: Sequence[LatentStore], others: Mapping[int, Any]
) -> tuple[dict[str, Any], SavedTensors]:
    """Facts and tensors of all tokens of a cache, between forwards.

    Args:
        others: Layers that are not compressed, by index.

    Raises:
        ValueError: If there are no tokens.
        NotImplementedError: If one of ``others`` cannot be saved.
    """
    if not track.slots:
        raise ValueError("a cache must hold at least one token to be saved, got an empty cache")
    for index, layer in others.items():
        check_savable(layer, index, track.slots)
    tensors = SavedTensors()
    facts = {
        "batch": track.batch,
        "tokens": track.slots,
        "frequencies": track.save(tensors),
        "layer_groups": _layer_groups(stores),
        "stores": [store.save(tensors, f"store.{index}") for index, store in enumerate(stores)],
        "other_layers": {str(index): save_layer(layer, tensors, f"layer.{index}") for index, layer in others.items()},
    }
    return facts, tensors


def fill(
    track: PositionTrack,
    stores: Sequence[LatentStore],
    others: Mapping[int, Any],
    facts: Mapping[str, Any],
    saved: SavedTensors,
    likes: Sequence[Any],
    device: torch.device,
) -> None:
    """Take up, into the parts of an empty cache, what ``gather`` gave.

    Args:
        likes: The layers of the model's ``one_token_cache``.
        device: Where positions are kept.

    Raises:
        ValueError: If anything is missing, left over, or does not fit.
    """
    batch, slots = (whole_number(facts[name], name, 1) for name in ("batch", "tokens"))
    groups = _layer_groups(stores)
    if facts.get("layer_groups", groups) != groups:  # absent from caches of older versions
        raise ValueError(
            f"the layer groups of the saved cache, {facts['layer_groups']}, must be those of this model's, {groups}: "
            "xkv's end where the model goes on on another device, so load it under the device_map it was made with"
        )
    ropes = {shape.rope for store in stores for shape in store.coder.shapes if shape.rope is not None}
    track.load(saved, facts["frequencies"], batch, slots, ropes, device)
    if len(facts["stores"]) != len(stores) or set(facts["other_layers"]) != {str(index) for index in others}:
        raise ValueError("stores and other_layers must be those of the model's cache")
    for index, (store, part) in enumerate(zip(stores, facts["stores"], strict=True)):
        states: list[Tensor] = [
            getattr(likes[layer], "keys" if side == "key" else "values") for layer, side in store.coder.members
        ]
        store.load(saved, f"store.{index}", part, states)
    for index, layer in others.items():
        name = f"layer.{index}"
        load_layer(layer, saved, name, facts["other_layers"][str(index)], batch, slots, likes[index])
    saved.finish()


def _layer_groups(stores: Sequence[LatentStore]) -> list[list[int]]:
    """By store, the layers whose tokens it holds, as JSON holds them."""
    return [sorted({layer for layer, _ in store.coder.members}) for store in stores]


def settings_to_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``LowRankCache`` as JSON holds them: dtypes by name, rank pairs as lists."""
    dtype, ranks = settings["latent_dtype"], settings["ranks"]
    return {
        **settings,
        "latent_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "ranks": sorted([layer, *pair] for layer, pair in ranks.items()) if isinstance(ranks, Mapping) else ranks,
    }


def settings_from_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Undo ``settings_to_json``; what is no valid argument is left to ``LowRankCache`` to refuse."""
    dtype, ranks = settings["latent_dtype"], settings["ranks"]
    named = {str(known).removeprefix("torch."): known for known in (torch.float16, torch.bfloat16, torch.float32)}
    named["float64"] = torch.float64
    if isinstance(ranks, list):
        ranks = {layer: (key, value) for layer, key, value in ranks}
    return {**settings, "latent_dtype": None if dtype is None else named[dtype], "ranks": ranks}
