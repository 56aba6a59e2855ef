"""Packed latents and the tensors that grow: what appending costs over a long decode, beside ``DynamicCache``.

Bytes are counted by watching every torch operation, not by asking the cache: whatever an operation
writes counts, so buffers that grow, windows that are replaced and latents that are encoded are all
in. Reading the past back is another cost (the reconstruct path) and is switched off here.
"""

import copy
import statistics
import time
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from lowrank_cache import LowRankCache
from lowrank_cache.calibration import calibrate
from lowrank_cache.kernels.packed import QUANTIZED_BITS, dequantize, pack_latents, quantize, read_latents
from lowrank_cache.latents import GrowingTensor, PackedLatents
from tests.oracle.inside import damaged_latents, without_reading
from tests.oracle.models import full_rank_projections, random_tokens, tiny_model

DECODED = 4096
HEADS, HEAD_DIM = 2, 16
_VIEWS = (
    "view",
    "reshape",
    "narrow",
    "slice",
    "select",
    "expand",
    "transpose",
    "permute",
    "unsqueeze",
    "detach",
    "alias",
)


class BytesWritten(TorchDispatchMode):
    """Sums up the bytes that operations write; views write none."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if not operation._schema.name.removeprefix("aten::").startswith(_VIEWS):
            written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in written)
        return result


class BytesCopied(TorchDispatchMode):
    """Sums up the bytes that copies of tensors write."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation in (torch.ops.aten.copy_.default, torch.ops.aten.clone.default, torch.ops.aten.cat.default):
            self.total += result.nbytes
        return result


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
    )
    return LlamaForCausalLM(config).eval()


def append_token(model, cache, token):
    """What a forward of one token does to a cache, without the model's own work."""
    if isinstance(cache, LowRankCache):
        cache.begin_forward(model.model, {"input_ids": torch.zeros(1, 1, dtype=torch.long)})
        states = cache.update(token, token, 0)
        cache.end_forward(model.model, {})
        return states
    return cache.update(token, token, 0)


def make_cache(model):
    projections = calibrate(model, [random_tokens(4, 32)], progress=False)
    sizes = {"residual_length": 32, "block_size": 16}
    return LowRankCache(model, projections, compression_ratio=4.0, attend="reconstruct", **sizes)


def test_bytes_moved_by_appending_do_not_grow_with_the_context(monkeypatch):
    model = make_model()
    caches = {"ours": make_cache(model), "full": DynamicCache(config=model.config)}
    without_reading(monkeypatch)
    tokens = torch.randn(DECODED, 1, HEADS, 1, HEAD_DIM)
    moved = {name: [] for name in caches}
    with torch.no_grad():
        for name, cache in caches.items():
            for quarter in tokens.chunk(4):
                with BytesWritten() as written:
                    for token in quarter:
                        append_token(model, cache, token)
                moved[name].append(written.total / len(quarter))
    # Ours: the last 1,024 tokens cost no more each than the first, growing buffers included; the full cache copies all.
    assert moved["ours"][3] < 1.25 * moved["ours"][0], moved
    assert moved["full"][3] > 5 * moved["full"][0], moved
    assert moved["ours"][3] < 0.1 * moved["full"][3], moved


def test_bytes_copied_by_growing_are_a_constant_per_byte_kept(monkeypatch):
    model = make_model()
    cache = make_cache(model)
    without_reading(monkeypatch)
    copied = weakref.WeakKeyDictionary()  # bytes by buffer, what was appended apart
    append = GrowingTensor.append

    def counted(growing, block):
        with BytesCopied() as copies:
            append(growing, block)
        copied[growing] = copied.get(growing, 0) + copies.total - block.nbytes

    monkeypatch.setattr(GrowingTensor, "append", counted)
    with torch.no_grad():
        for count in range(1, DECODED + 1):
            append_token(model, cache, torch.randn(1, HEADS, 1, HEAD_DIM))
            if count in (DECODED // 4, DECODED):
                # Growing by an eighth copies 1 + 8/9 + (8/9)² + ... = 9 times what is kept, at most.
                assert all(0 <= total <= 9 * growing.nbytes for growing, total in copied.items())
                # Positions, and codes and steps of the latents: windows begin anew before they grow.
                kept = [growing for growing, total in copied.items() if total]
                assert len(kept) >= 2 and sum(growing.nbytes for growing in kept) > count


def test_append_time_is_flat(monkeypatch, record_property):
    model = make_model()
    timed = 512
    caches = {
        (name, age): make_cache(model) if name == "ours" else DynamicCache(config=model.config)
        for name in ("ours", "full")
        for age in ("early", "late")
    }
    without_reading(monkeypatch)
    tokens = torch.randn(DECODED, 1, HEADS, 1, HEAD_DIM)
    seconds = {each: [] for each in caches}
    with torch.no_grad():
        for (_, age), cache in caches.items():
            for token in tokens[: 256 if age == "early" else DECODED - timed]:
                append_token(model, cache, token)
        for token in tokens[-timed:]:
            for each, cache in caches.items():  # in turn, so that a busy machine slows all alike
                start = time.perf_counter()
                append_token(model, cache, token)
                seconds[each].append(time.perf_counter() - start)
    median = {each: statistics.median(times) for each, times in seconds.items()}
    ratio = {name: median[name, "late"] / median[name, "early"] for name in ("ours", "full")}
    record_property("late_over_early_append_time", ratio)
    # Medians, so encoding (every 16th append) and other processes drop out.
    assert ratio["ours"] < 1.5, f"late over early append time: {ratio}"
    assert ratio["full"] > ratio["ours"], f"late over early append time: {ratio}"


def test_the_time_of_reading_is_reported_apart(monkeypatch, record_property, capsys):
    """Appending is flat; reading everything back (the reconstruct path) grows with the context."""
    model = make_model()
    cache, full = make_cache(model), DynamicCache(config=model.config)
    report = {}
    tokens = torch.randn(DECODED + 1, 1, HEADS, 1, HEAD_DIM)

    def median_time(each, repeats=30):
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            append_token(model, each, tokens[DECODED])
            seconds.append(time.perf_counter() - start)
            each.crop(-1)
        return 1e6 * statistics.median(seconds)

    with torch.no_grad():
        for count, token in enumerate(tokens[:DECODED], start=1):
            with monkeypatch.context() as patch:
                without_reading(patch)
                for each in (cache, full):
                    append_token(model, each, token)
                appended = median_time(cache) if count in (256, 1024, DECODED) else None
            if appended is not None:
                report[count] = {"append": appended, "append and read": median_time(cache), "full": median_time(full)}
    record_property("microseconds_per_token", report)
    with capsys.disabled():
        for count, times in report.items():
            print(
                f"\n{count} tokens cached:", ", ".join(f"{name} {time:.0f} µs" for name, time in times.items()), end=""
            )
    assert report[DECODED]["append and read"] > 2 * report[DECODED]["append"], report
    assert report[DECODED]["append"] < 2 * report[256]["append"], report


def test_a_growing_tensor_holds_what_was_appended():
    growing, rows = GrowingTensor(axis=1, min_room=4), []
    for index, size in enumerate([1, 3, 40, 1, 7, 2]):
        block = torch.full((2, size, 3), float(index))
        growing.append(block)
        rows.append(block)
        assert torch.equal(growing.view(), torch.cat(rows, dim=1))
        assert growing.buffer.shape[1] - growing.length <= max(4, growing.length // 8)
    assert torch.equal(growing.view(1, 4), torch.cat(rows, dim=1)[:, 1:4])


def test_speculative_decoding_does_not_copy_at_every_step():
    growing = GrowingTensor(axis=0, min_room=8)
    growing.append(torch.zeros(512, 4))
    copies = 0
    for _ in range(200):  # five proposed, one accepted
        with BytesCopied() as copied:
            growing.append(torch.zeros(5, 4))
            growing.truncate(growing.length - 4)
        copies += copied.total > 5 * 4 * 4  # more than was appended
    assert copies <= 4


def test_a_buffer_that_is_mostly_unused_is_given_back():
    growing = GrowingTensor(axis=0, min_room=8)
    growing.append(torch.arange(1000.0)[:, None])
    growing.truncate(100)
    assert growing.nbytes <= (100 + 2 * 100 // 8) * 4
    assert torch.equal(growing.view(), torch.arange(100.0)[:, None])
    growing.truncate(0)
    assert growing.nbytes == 0


def test_reserving_copies_at_most_once():
    growing = GrowingTensor(axis=0, min_room=8)
    growing.append(torch.zeros(100, 4))
    growing.reserve(1000)
    with BytesCopied() as copied:
        for _ in range(45):
            growing.append(torch.zeros(20, 4))
    assert copied.total == (45 * 20 + 100) * 4 * 4


LARGEST = torch.finfo(torch.float32).max


numbers = st.builds(
    lambda sign, exponent: sign * 2.0**exponent, st.sampled_from([-1.0, 0.0, 1.0]), st.floats(-149, 127.99)
)


@pytest.mark.parametrize("bits", QUANTIZED_BITS)
@given(row=st.lists(numbers, min_size=4, max_size=4), weight=st.lists(st.floats(0, 1e3), min_size=4, max_size=4))
def test_quantized_latents_are_finite(bits, row, weight):
    latents = torch.tensor(row, dtype=torch.float32)[None, None]
    codes, steps = quantize(latents, bits, torch.tensor(weight, dtype=torch.float32))
    assert torch.isfinite(steps).all() and (steps > 0).all()
    assert torch.isfinite(dequantize(codes, steps, bits)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-45, 1e-8, 7e4, 1e30, LARGEST])
def test_stored_latents_are_finite(size, dtype):
    packed = PackedLatents(((16, 4), (8, 4), (4, 4), (2, 4)), dtype, block_size=2)
    latents = size * torch.sign(torch.randn(2, 3, 16))
    packed.append(pack_latents(latents, packed.tiers, torch.ones(16), dtype), 3)
    read = read_latents(packed.views())
    assert torch.isfinite(read).all()
    if size > 1e-8:
        assert torch.equal(read.sign(), latents.sign()), "saturated, and not wrapped around"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda codes, steps: (codes[..., :-1], steps), r"must have shape .* with room for \d+ channels, got"),
        (lambda codes, steps: (codes.float(), steps), "codes of a 4-bit tier must be torch.uint8, got torch.float"),
        (lambda codes, steps: (codes, steps[:1]), r"steps must be float16 of shape \[2, .*\], one a token, got"),
        (lambda codes, steps: (codes, steps.float()), "steps must be float16 of shape .* got torch.float32"),
    ],
)
def test_damaged_latents(damage, message):
    model, projections = tiny_model("llama"), full_rank_projections("llama")
    cache = LowRankCache(model, projections, compression_ratio=4, bits=4, residual_length=4, block_size=4)
    model(random_tokens(2, 30), past_key_values=cache)
    twin = copy.deepcopy(cache)
    with damaged_latents(cache, 1, damage):
        with pytest.raises(ValueError, match=message):
            model(random_tokens(2, 9), past_key_values=cache)
        assert cache.get_seq_length() == 30
    text = random_tokens(2, 9, seed=3)
    assert torch.equal(model(text, past_key_values=cache).logits, model(text, past_key_values=twin).logits)
