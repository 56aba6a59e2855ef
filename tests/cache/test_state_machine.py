"""A property of many rooms: random sequences of cache operations against ``DynamicCache``, fed the same states.

The model runs with the cache under test; whatever a layer hands to ``update`` also goes to the
oracle, and what both return is compared at once, layer by layer, on every real token. So an error
shows in the step that makes it, and the only difference allowed is the float32 rounding of two
products with full-rank bases.
"""

import copy

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DynamicCache

from lowrank_cache import LowRankCache
from tests.oracle.memory import held_bytes, reachable_tensors
from tests.oracle.models import exact_cache, full_rank_projections, random_tokens, tiny_model
from tests.oracle.tolerance import FLOAT32_ROUNDING, noise_gain

MAX_TOKENS = 48
# Rounding errors are Gaussian-like sums of hundreds of terms; ten standard deviations never happen by chance.
DEVIATIONS = 10.0


# Tokens, padding of each row (for an empty cache, whose batch it sets), a hole in the mask, explicit positions.
FORWARD = st.tuples(
    st.one_of(st.integers(1, 4), st.integers(5, 14)),
    st.one_of(st.just([0]), st.lists(st.sampled_from([0, 0, 1, 2, 3, 6, 9]), min_size=2, max_size=3)),
    st.one_of(st.none(), st.none(), st.integers(0, 13)),
    st.booleans(),
)


class CacheMachine(RuleBasedStateMachine):
    """One cache and its oracle. Subclasses choose the bases."""

    family = "llama"
    frame_length = 1
    layer_group_size: int | tuple[int, int] = 1
    joint = True
    width = 2 * 2 * 16  # numbers of one token in one layer

    @initialize(
        first=FORWARD,
        residual_length=st.integers(0, 6),
        num_sink_tokens=st.integers(0, 4),
        block_size=st.integers(1, 5),
    )
    def start(self, first, **sizes):
        self.model = tiny_model(self.family)
        self._make_cache(**sizes)
        self.seed = 0
        self._forget()
        self._forward(*first)

    def _make_cache(self, **sizes):
        projections = full_rank_projections(self.family, self.frame_length, self.layer_group_size, self.joint)
        # Two products with the bases, and two rotations of two products and a sum each.
        self.tolerance = DEVIATIONS * (noise_gain(projections) ** 2 + 2) ** 0.5 * FLOAT32_ROUNDING
        # What `update` returns is compared.
        self.cache = exact_cache(self.model, projections, attend="reconstruct", **sizes)

    def _forget(self):
        self.oracle = DynamicCache(config=self.model.config)
        self.mask = None  # [batch, tokens], 0 for padding
        self.unread_pads = None  # [batch], padding still to come at the start of each row
        self.failed = False  # the last forward raised part-way and nothing has settled it yet

    @property
    def tokens(self) -> int:
        return 0 if self.mask is None else self.mask.shape[1]

    def _step_mask(self, tokens: int, hole: int | None) -> torch.Tensor:
        mask = (torch.arange(tokens)[None] >= self.unread_pads[:, None]).long()
        if hole is not None and hole < tokens:
            mask[0, hole] = 0
        return mask

    def _arguments(self, tokens: int, step_mask: torch.Tensor, pass_positions: bool) -> dict:
        self.seed += 1
        past = step_mask[:, :0] if self.mask is None else self.mask
        mask = torch.cat([past, step_mask], dim=1)
        arguments = {"input_ids": random_tokens(len(mask), tokens, self.seed), "past_key_values": self.cache}
        if pass_positions or not bool(mask.all()):
            arguments["attention_mask"] = mask
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens:]
        return arguments

    def _begin_batch(self, pads: list[int]):
        if self.mask is None:
            self.unread_pads = torch.tensor(pads)
            self.oracle = DynamicCache(config=self.model.config)

    @rule(forward=FORWARD)
    def forward(self, forward):
        self._forward(*forward)

    def _forward(self, tokens, pads, hole, pass_positions):
        if self.tokens + tokens > MAX_TOKENS:  # make room instead
            self.cache.crop(-tokens)
            self.oracle.crop(-tokens)
            self.mask = self.mask[:, :-tokens]
        self._begin_batch(pads)
        step_mask = self._step_mask(tokens, hole)
        arguments = self._arguments(tokens, step_mask, pass_positions)
        mask = step_mask if self.mask is None else torch.cat([self.mask, step_mask], dim=1)
        real = mask.bool()[:, None, :, None]
        compared = []

        def update(key_states, value_states, layer_idx, *args, **kwargs):
            ours = LowRankCache.update(self.cache, key_states, value_states, layer_idx, *args, **kwargs)
            theirs = self.oracle.update(key_states, value_states, layer_idx)
            for side, mine, expected in zip(("keys", "values"), ours, theirs, strict=True):
                assert mine.shape == expected.shape and mine.dtype == expected.dtype
                assert bool(torch.isfinite(mine).all()), f"{side} of layer {layer_idx} hold NaN, padding included"
                error = float((mine - expected).masked_fill(~real, 0).abs().max())
                size = float(expected.masked_fill(~real, 0).abs().max())
                assert error <= self.tolerance * size, f"{side} of layer {layer_idx} are {error:.3g} off of {size:.3g}"
            new = key_states.shape[2]
            assert torch.equal(ours[0][:, :, -new:], key_states), "a forward must attend exactly to its own tokens"
            compared.append(layer_idx)
            return ours

        self.cache.update = update
        try:
            self.model(**arguments)
        finally:
            del self.cache.update
        assert compared == [0, 1, 2]
        self.mask = mask
        self.unread_pads = (self.unread_pads - tokens).clamp(min=0)
        self.failed = False

    @rule(
        tokens=st.integers(1, 14),
        pads=st.sampled_from([[0], [0, 2]]),
        layer=st.integers(0, 2),
        error=st.sampled_from([RuntimeError, KeyboardInterrupt]),
    )
    def interrupted_forward(self, tokens, pads, layer, error):
        self._begin_batch(pads)

        def interrupt(*args, **kwargs):
            raise error("interrupted")

        handle = self.model.model.layers[layer].mlp.register_forward_pre_hook(interrupt)
        try:
            with pytest.raises(error, match="interrupted"):
                self.model(**self._arguments(tokens, self._step_mask(tokens, None), True))
        finally:
            handle.remove()
        self.failed = True  # also after the last layer's update: a forward counts when it has ended
        if self.tokens == 0:
            self.mask = self.unread_pads = None

    @precondition(lambda self: self.tokens > 0)
    @rule(shift=st.sampled_from([-1, 1, 7]), tokens=st.integers(1, 5))
    def refused_forward(self, shift, tokens):
        arguments = self._arguments(tokens, torch.ones_like(self.mask[:, :1]).expand(-1, tokens), True)
        if not bool(self.mask[:, -1].all()):
            return  # behind padding any position may come
        arguments["position_ids"] = arguments["position_ids"] + shift
        with pytest.raises(ValueError, match="position_ids must continue|tokens from the start"):
            self.model(**arguments)
        self.failed = False

    @precondition(lambda self: self.tokens > 0)
    @rule(removed=st.one_of(st.integers(0, 3), st.integers(0, 20), st.just(MAX_TOKENS + 5)), forward=FORWARD)
    def crop(self, removed, forward):
        self.cache.crop(-removed)
        self.oracle.crop(-removed)
        self.failed = False
        kept = max(0, self.tokens - removed)
        self.mask = self.mask[:, :kept]
        if kept == 0:
            self._forget()
        self._forward(*forward)

    @precondition(lambda self: self.tokens > 0)
    @rule(data=st.data(), forward=FORWARD)
    def reorder(self, data, forward):
        rows = self._rows(data, exactly=len(self.mask))
        self.cache.reorder_cache(rows)
        self.oracle.reorder_cache(rows)
        self._map_rows(lambda tensor: tensor[rows])
        self._forward(*forward)

    @precondition(lambda self: self.tokens > 0)
    @rule(data=st.data(), forward=FORWARD)
    def select(self, data, forward):
        rows = self._rows(data)
        self.cache.batch_select_indices(rows)
        self.oracle.batch_select_indices(rows)
        self._map_rows(lambda tensor: tensor[rows])
        self._forward(*forward)

    @precondition(lambda self: self.tokens > 0 and len(self.mask) <= 2)
    @rule(repeats=st.integers(1, 3), forward=FORWARD)
    def repeat(self, repeats, forward):
        self.cache.batch_repeat_interleave(repeats)
        self.oracle.batch_repeat_interleave(repeats)
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, 0))
        self._forward(*forward)

    def _rows(self, data, exactly=None) -> torch.Tensor:
        size = {"min_size": exactly or 1, "max_size": exactly or 3}
        return torch.tensor(data.draw(st.lists(st.integers(0, len(self.mask) - 1), **size), label="rows"))

    def _map_rows(self, function):
        self.mask, self.unread_pads = function(self.mask), function(self.unread_pads)
        self.failed = False

    @precondition(lambda self: self.tokens > 0)
    @rule(keep_original=st.booleans(), forward=FORWARD)
    def deepcopy(self, keep_original, forward):
        original, self.failed = self.cache, False
        copied = copy.deepcopy(original)
        self.oracle = copy.deepcopy(self.oracle)
        # Whichever goes on, the other is wiped: tokens shared between them would be missed in the next comparison.
        self.cache, other = (original, copied) if keep_original else (copied, original)
        for tensor in reachable_tensors(other):
            tensor.fill_(1)
        other.reset()
        self._forward(*forward)

    @precondition(lambda self: self.tokens > 0)
    @rule(forward=FORWARD)
    def reset(self, forward):
        self.cache.reset()
        self._forget()
        self._forward(*forward)

    @invariant()
    def lengths_agree(self):
        if not hasattr(self, "cache"):
            return
        assert self.cache.get_seq_length() == self.tokens
        if self.failed:
            return
        for layer_idx in range(3):
            assert self.cache.get_seq_length(layer_idx) == self.oracle.get_seq_length(layer_idx) == self.tokens
            for new in (1, 4):
                assert self.cache.get_mask_sizes(new, layer_idx) == (self.tokens + new, 0)

    @invariant()
    def bytes_agree(self):
        if not hasattr(self, "cache"):
            return
        if self.failed:  # still holds views of states that the failed forward made
            assert 0 < self.cache.stored_bytes() <= held_bytes(self.cache)
            return
        assert self.cache.stored_bytes() == held_bytes(self.cache)
        rows = 0 if self.mask is None else len(self.mask)
        assert self.cache.full_bytes() == rows * self.tokens * 3 * self.width * 2
        if self.tokens == 0:
            assert self.cache.compression_ratio() == 1.0
        else:
            assert self.cache.compression_ratio() == self.cache.full_bytes() / held_bytes(self.cache)


class Frames(CacheMachine):
    frame_length = 4
    layer_group_size = 2


class KeysApartFromValues(CacheMachine):
    joint = False


class WholeModelGroups(CacheMachine):
    frame_length = 3
    layer_group_size = (1, 3)
    joint = False


class DynamicFrequencies(CacheMachine):
    family = "llama-dynamic"
    frame_length = 4
    layer_group_size = (3, 2)
    joint = False


class DynamicFrequenciesOfOneGroup(CacheMachine):
    family = "llama-dynamic"
    frame_length = 3
    layer_group_size = 3


class BasesOfPrompts(CacheMachine):
    """xKV with every direction kept, so narrow that the first tokens encoded span all states."""

    family = "qwen2-narrow"
    width = 2 * 8
    new_tokens = "encode"

    def _make_cache(self, **sizes):
        # Directions of float32 eigenvectors are orthogonal up to a few roundings for each of the numbers.
        self.tolerance = DEVIATIONS * 16 * FLOAT32_ROUNDING
        options = {"method": "xkv", "layer_group_size": 1, "compression_ratio": 1, "new_tokens": self.new_tokens}
        self.cache = LowRankCache(self.model, latent_dtype=None, **options, **sizes)


class BasesOfPromptsOnly(BasesOfPrompts):
    new_tokens = "exact"


_SETTINGS = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestPreRope = CacheMachine.TestCase
TestFrames = Frames.TestCase
TestKeysApartFromValues = KeysApartFromValues.TestCase
TestWholeModelGroups = WholeModelGroups.TestCase
TestDynamicFrequencies = DynamicFrequencies.TestCase
TestDynamicFrequenciesOfOneGroup = DynamicFrequenciesOfOneGroup.TestCase
TestBasesOfPrompts = BasesOfPrompts.TestCase
TestBasesOfPromptsOnly = BasesOfPromptsOnly.TestCase
for _machine in CacheMachine, *CacheMachine.__subclasses__(), *BasesOfPrompts.__subclasses__():
    _machine.TestCase.settings = _SETTINGS
