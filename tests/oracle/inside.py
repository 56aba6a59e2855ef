"""The one file of the tests that looks inside a cache. A redesign of the core changes it and no other test.

Each function says why no public way will do. ``tests/project/test_private_state.py`` keeps other files out.
"""

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lowrank_cache import LowRankCache, attention, coder, probe, prompt_svd, store
from lowrank_cache.budget import GroupPlan
from lowrank_cache.coder import CalibratedCoder
from lowrank_cache.hadamard import channel_mixing
from lowrank_cache.kernels.packed import pack_latents
from lowrank_cache.positions import PositionTrack
from lowrank_cache.shapes import ModelShape, RopeShape
from lowrank_cache.store import LatentStore

__all__ = [
    "CALIBRATED_BASES",
    "change_ropes",
    "damaged_latents",
    "devices_of_latents",
    "devices_of_windows",
    "encode_and_reconstruct",
    "first_real",
    "forbid_reconstruction",
    "has_prompt_bases",
    "keep_first_frequencies",
    "narrowed_matrices",
    "older_fingerprint",
    "plant_frequencies",
    "plant_shape",
    "prompt_bases",
    "reconstructing",
    "round_rotations_otherwise",
    "shift_positions",
    "skip_products_of_prompts",
    "watch_encoding",
    "without_reading",
    "wrapped_attention",
]

# Objects that hold calibrated bases: memory that a cache shares with others, and that `stored_bytes` leaves out.
CALIBRATED_BASES: tuple[type, ...] = (CalibratedCoder,)


def watch_encoding(
    monkeypatch: pytest.MonkeyPatch, note: Callable[[tuple[tuple[int, str], ...], list[Tensor]], None]
) -> None:
    """Call ``note(members, states)`` with what is encoded: full-rank results cannot show how keys were un-rotated.

    States are by member ``[batch, heads, tokens, head_dim]``, rotated into their frames.
    """
    encode, encode_pending, members = store.encode, LatentStore._encode_pending, []

    def pending(self, states):
        members[:] = [(member.layer, member.side) for member in self.coder.members]
        encode_pending(self, states)

    def noted(states, constants, frames, *rest, **options):
        framed = [
            part.float() if rope is None else rope.rotated_into(part.float())
            for part, rope in zip(states, frames, strict=True)
        ]
        note(tuple(members), framed)
        return encode(states, constants, frames, *rest, **options)

    monkeypatch.setattr(LatentStore, "_encode_pending", pending)
    monkeypatch.setattr(store, "encode", noted)


def change_ropes(cache: LowRankCache, change: Callable[[str, RopeShape | None], RopeShape | None]) -> None:
    """Make a cache rotate otherwise, ``change(side, rope)``: a planted fault that a check must find."""
    for held in cache._stores:
        held.coder = copy.copy(held.coder)  # other caches share it
        held.coder.members = tuple(
            member._replace(shape=dataclasses.replace(member.shape, rope=change(member.side, member.shape.rope)))
            for member in held.coder.members
        )


def shift_positions(cache: LowRankCache) -> None:
    """Make a cache take every token for the one after it: a planted fault that a check must find."""
    track = cache._track
    begin = track.begin

    def shifted(batch, tokens, position_ids, *others):
        assert position_ids is None
        begin(batch, tokens, torch.arange(track.slots, track.slots + tokens)[None] + 1, *others)

    track.begin = shifted


def plant_frequencies(cache: LowRankCache, source: str, table: Tensor) -> None:
    """Give a cache a rotary table that its model has not: a planted fault that a check must find."""
    cache._track._segments[source] = [(0, table)]


def keep_first_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make caches miss that frequencies change with length: a planted fault that a check must find."""
    note = PositionTrack.note_frequencies

    def note_first_only(track, decoder, rope, start):
        if rope.source not in track._segments:
            note(track, decoder, rope, start)

    monkeypatch.setattr(PositionTrack, "note_frequencies", note_first_only)


def older_fingerprint(cache: LowRankCache) -> str | None:
    """What an older version would have written of the bases: this one only reads it."""
    return cache._bases_fingerprints()[1]


def round_rotations_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another processor might."""

    def rounded(sizes: Tensor, unit: float) -> tuple[Tensor, ...]:
        return tuple(matrix * (1 + 2e-7) for matrix in channel_mixing(sizes, unit))

    monkeypatch.setattr(coder, "channel_mixing", rounded)


def first_real(cache: LowRankCache) -> Tensor | None:
    """Slot of each sequence's first real token: not saved, so that a loaded cache must find it again."""
    return cache._track.first_real


@contextlib.contextmanager
def damaged_latents(
    cache: LowRankCache, group: int, damage: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """While inside, a group's first quantized tier holds ``damage(codes, steps)``: files that do are never loaded."""
    latents = cache._stores[group].latents
    codes, steps = latents.codes[0], latents.steps[0]
    whole = codes.buffer, steps.buffer
    codes.buffer, steps.buffer = damage(*whole)
    yield
    codes.buffer, steps.buffer = whole


def has_prompt_bases(cache: LowRankCache) -> bool:
    """Whether xkv made bases of a prompt: after a forward that failed, public calls would undo it first."""
    return any(held.coder.fitted for held in cache._stores)


def prompt_bases(cache: LowRankCache) -> list[list[Tensor]]:
    """By group, tensors of xkv's bases where they lie: in a file they have no device."""
    return [[*held.coder.up_projs, *held.coder.constants, held.coder.units] for held in cache._stores]


def devices_of_windows(cache: LowRankCache) -> list[list[torch.device]]:
    """By group and member, where recent tokens lie: states come back on the device of whoever asks."""
    return [[window.view().device for window in held.windows] for held in cache._stores]


def devices_of_latents(cache: LowRankCache) -> list[set[torch.device]]:
    """By group, where latents lie: states come back on the device of whoever asks."""
    return [{buffer.view().device for buffer in held.latents.buffers()} for held in cache._stores]


def narrowed_matrices(plan: GroupPlan, members: list, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Down- and up-projections as a cache holds them: latents that overflow would be clamped before one could see."""
    coder, cpu = CalibratedCoder(plan, members, dtype), torch.device("cpu")
    return coder.encoding(cpu).down_proj, [coder.reading(n, cpu).up_proj.flatten(1) for n in range(len(members))]


def encode_and_reconstruct(plan: GroupPlan, members: list, dtype: torch.dtype, states: list[Tensor]) -> list[Tensor]:
    """States through one basis and back, without the rounding of stored latents, by member."""
    coder, cpu = CalibratedCoder(plan, members, dtype), torch.device("cpu")
    constants, down_proj, _ = coder.encoding(cpu)
    centred = [part - mean[:, None] for part, mean in zip(states, constants, strict=True)]
    latents = torch.cat([part.transpose(1, 2).flatten(2) for part in centred], dim=2) @ down_proj.float()
    read = [coder.reading(number, cpu) for number in range(len(states))]
    return [torch.einsum("btr,rhd->bhtd", latents, one.up_proj.float()) + one.constant[:, None] for one in read]


def forbid_reconstruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let anything fail that makes states of latents: shapes alone would miss what is made in pieces."""
    monkeypatch.setattr(store, "reconstruct", None)


def reconstructing(cache: LowRankCache) -> LowRankCache:
    """A copy that reconstructs keys and values: only a new cache can be told so, and would be an empty one."""
    copied = copy.deepcopy(cache)
    copied._forward._attends = False
    return copied


def wrapped_attention() -> set[str]:
    """Where functions of ours stand among transformers' own: its tables, and all modeling files that are loaded."""
    found = dict(AttentionInterface._global_mapping)
    for name, module in list(sys.modules.items()):
        if ".modeling_" in name and hasattr(module, "eager_attention_forward"):
            found[name] = module.eager_attention_forward
    code = {name: getattr(function, "__code__", None) for name, function in found.items()}
    return {name for name, each in code.items() if each is not None and each.co_filename == attention.__file__}


def without_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``update`` return new states alone: what appending costs would drown in what reading costs."""
    monkeypatch.setattr(LatentStore, "_assemble", lambda self, member, states, exact: states)


def plant_shape(model: nn.Module, shape: ModelShape) -> None:
    """Let a tiny model pass for one of ``shape``: Llama-3.1-8B's bytes without its weights."""
    probe._SHAPES[model.get_decoder()] = shape


def skip_products_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill xkv's bases and latents with zeros: at 65,536 tokens their products would take minutes."""

    def no_fit(coder, states, frames, used):
        width = sum(member.shape.width for member in coder.members)
        found = (torch.zeros(1, width, coder.rank), torch.zeros(1, coder.rank))
        monkeypatch.setattr(prompt_svd, "leading_directions", lambda covariance, rank: found)
        coder._make(torch.zeros(1, 1, 1), torch.zeros(1, width))

    def no_encode(states, constants, frames, down_proj, tiers, weight, latent_dtype, **options):
        return pack_latents(torch.zeros(1, states[0].shape[2], down_proj.shape[-1]), tiers, weight, latent_dtype)

    monkeypatch.setattr(prompt_svd.PromptCoder, "fit", no_fit)
    monkeypatch.setattr(store, "encode", no_encode)
