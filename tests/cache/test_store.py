"""What the cache really stores, what it shares, what it leaves behind, and how it survives a failed forward."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

from lowrank_cache import LowRankCache
from lowrank_cache.budget import full_bytes_per_token
from lowrank_cache.kernels.packed import ROW_BYTES, padded_channels
from lowrank_cache.kernels.rope import angle_tables, rotate
from lowrank_cache.layers import LowRankLayer
from tests.oracle.memory import held_bytes, live_tensors, reachable_tensors, storages
from tests.oracle.models import exact_cache, full_rank_projections, random_tokens, tiny_model
from tests.oracle.states import saved_tensors

SIZES = {"residual_length": 4, "num_sink_tokens": 2, "block_size": 3}
SMALLEST_SIZES = [
    SIZES,
    {"residual_length": 4, "num_sink_tokens": 0, "block_size": 4},
    {"residual_length": 0, "num_sink_tokens": 0, "block_size": 1},
    {"residual_length": 1, "num_sink_tokens": 1, "block_size": 64},
]


def lossy_cache(model, family="llama", layer_group_size=1, joint=None, **options):
    projections = full_rank_projections(family, 1, layer_group_size, joint)
    return LowRankCache(model, projections, **{"compression_ratio": 2.0, **SIZES, **options})


def generate(model, tokens, cache, new_tokens=12):
    return model.generate(tokens, max_new_tokens=new_tokens, do_sample=False, past_key_values=cache)


class Spy:
    """Notes what every layer hands to a cache: the dense rows that must not be found anywhere later."""

    def __init__(self, cache):
        self.cache, self.layers = cache, {}
        self.update_cache, cache.update = cache.update, self

    def __call__(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.layers.setdefault(layer_idx, []).append((key_states.clone(), value_states.clone()))
        return self.update_cache(key_states, value_states, layer_idx, *args, **kwargs)

    def remove(self, inv_freq):
        """Take the spy out and return name → ``[batch, heads, tokens, head_dim]``."""
        del self.cache.update
        rows = {}
        for index, parts in self.layers.items():
            keys, values = (torch.cat(side, dim=2) for side in zip(*parts, strict=True))
            cos, sin = angle_tables(torch.arange(keys.shape[2]), inv_freq)
            rows[f"post-RoPE key of layer {index}"] = keys
            rows[f"pre-RoPE key of layer {index}"] = rotate(keys, cos, sin, "half", inverse=True)
            rows[f"value of layer {index}"] = values
        self.layers.clear()
        return rows


def holders(row, tensors):
    """The tensors that contain ``row`` as consecutive numbers of the last axis, in any floating dtype."""
    found = []
    for tensor in tensors:
        if not tensor.is_floating_point() or tensor.dim() == 0 or tensor.shape[-1] < len(row) or tensor.numel() == 0:
            continue
        windows = tensor.detach().float().unfold(-1, len(row), 1)
        if bool(((windows - row).abs().amax(-1) < 1e-3 * float(row.abs().max())).any()):
            found.append(tensor)
    return found


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("layer_group_size", [1, 3])
def test_dense_states_exist_nowhere_in_the_process(layer_group_size, joint):
    model = tiny_model("llama")
    cache = lossy_cache(model, layer_group_size=layer_group_size, joint=joint)
    spy = Spy(cache)
    before = live_tensors()  # weights, bases, what other tests left; kept here, so that no id is used twice
    with torch.no_grad():
        generate(model, random_tokens(1, 30), cache)
    dense = spy.remove(model.model.rotary_emb.inv_freq)
    held = [*reachable_tensors(cache), *live_tensors([*before, *dense.values()])]
    cached = cache.get_seq_length()
    window = cached - SIZES["num_sink_tokens"] - cache.groups()[0].tokens
    assert cached == 41 and window < SIZES["residual_length"] + SIZES["block_size"]
    for name, states in dense.items():
        if "pre-RoPE" not in name:  # the search itself must be able to find rows: sinks and window hold them
            assert holders(states[0, 0, 0], held), f"{name} of the first token must be kept as a sink"
            assert holders(states[0, 0, -1], held), f"{name} of the last token must be in the window"
        for token in (SIZES["num_sink_tokens"], cached // 2, cached - window - 1):
            for head in range(states.shape[1]):
                assert not holders(states[0, head, token], held), f"{name}, token {token}, is still held densely"


def test_dense_states_would_be_found_in_a_full_cache():
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    spy = Spy(cache)
    before = live_tensors()
    with FakeTensorMode():
        left_by_a_compiler = torch.empty(1, 15, 49, 16)
    with torch.no_grad():
        model(random_tokens(1, 30), past_key_values=cache)
    dense = spy.remove(model.model.rotary_emb.inv_freq)
    held = live_tensors([*before, *dense.values()])
    assert not any(tensor is left_by_a_compiler for tensor in held)
    assert holders(dense["post-RoPE key of layer 1"][0, 1, 15], held)
    assert holders(dense["value of layer 2"][0, 0, 20], held)


@pytest.mark.parametrize("sizes", SMALLEST_SIZES)
@pytest.mark.parametrize("attend", ["auto", "reconstruct"])
def test_update_returns_nothing_that_outlives_the_forward(attend, sizes):
    model = tiny_model("llama")
    cache = lossy_cache(model, attend=attend, **sizes)
    before = live_tensors()
    with torch.no_grad():
        generate(model, random_tokens(2, 30), cache)
    reachable = storages(reachable_tensors(cache))
    strangers = [t for t in live_tensors(before) if t.untyped_storage().data_ptr() not in reachable and t.dim() == 4]
    assert strangers == []
    del strangers, cache
    assert [t for t in live_tensors(before) if t.dim() == 4] == []


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@pytest.mark.parametrize("bits", [None, 16, 4])
def test_stored_bytes_are_those_of_the_tensors(family, bits):
    model = tiny_model(family)
    cache = lossy_cache(model, family, bits=bits, compression_ratio=1.5)
    assert cache.stored_bytes() == 0 == cache.full_bytes()
    assert cache.compression_ratio() == 1.0
    for _ in range(2):
        generate(model, random_tokens(2, 30), cache)
        assert cache.stored_bytes() == held_bytes(cache)
        assert cache.compression_ratio() == cache.full_bytes() / held_bytes(cache)
        cache.reset()
        assert cache.stored_bytes() == 0 and cache.compression_ratio() == 1.0


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("bits", [None, 16, 8, 4, 2])
@pytest.mark.parametrize("ratio", [1, 1.5, 2.7, 5.0])
def test_a_token_takes_the_bytes_that_were_planned(ratio, bits, joint):
    model, projections = tiny_model("llama"), full_rank_projections("llama", joint=joint)
    plans = projections.plan(ratio, bits=bits)
    cache = lossy_cache(model, joint=joint, bits=bits, compression_ratio=ratio)
    model(random_tokens(2, 25), past_key_values=cache)
    saved = saved_tensors(cache)
    for index, (group, plan) in enumerate(zip(cache.groups(), plans, strict=True)):
        assert group.tokens == 18
        latents = [saved[name] for name in saved if name.startswith((f"store.{index}.codes.", f"store.{index}.steps."))]
        assert {tensor.shape[:2] for tensor in latents} <= {
            (2, 18)
        }  # codes [batch, tokens, row], steps without the row
        assert sum(tensor[:, 0].nbytes for tensor in latents) == 2 * plan.bytes_per_token
        for tier, (tier_bits, channels) in enumerate(group.tiers):
            row = saved[f"store.{index}.codes.{tier}"][0, 0]
            assert row.nbytes % ROW_BYTES == 0
            assert row.nbytes * 8 == padded_channels(tier_bits, channels) * tier_bits
    assert cache.latent_bytes_per_token() == sum(plan.bytes_per_token for plan in plans)
    assert sum(plan.bytes_per_token for plan in plans) <= full_bytes_per_token(projections.shape) / ratio


def test_long_context_reaches_the_ratio_asked_for():
    model = tiny_model("llama")
    cache = lossy_cache(model, layer_group_size=3, compression_ratio=4.0)
    with torch.no_grad():
        for chunk in random_tokens(1, 4096).split(512, dim=1):
            model(chunk, past_key_values=cache)
    # Off by the unused room, at most one part in nine, and by 4 bytes a token of positions beside 96 of latents.
    assert 4.0 * 0.8 < cache.compression_ratio() < 4.0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("cached", [0, 3, 17])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("layer_group_size, joint", [(1, True), (3, True), (1, False), (3, False)])
def test_a_failed_forward_is_as_if_it_had_not_been(error, cached, tokens, layer, layer_group_size, joint):
    model, text = tiny_model("llama"), random_tokens(2, cached + tokens + 3)
    expected_cache, cache = (lossy_cache(model, layer_group_size=layer_group_size, joint=joint) for _ in range(2))
    for each in (expected_cache, cache):
        if cached:
            model(text[:, :cached], past_key_values=each)
    states_before = [tensor.clone() for tensor in reachable_tensors(expected_cache)]

    def fail(*args):
        raise error("interrupted")

    handle = model.model.layers[layer].self_attn.register_forward_pre_hook(fail)
    for batch in (text, text[:1]) if not cached else (text,):  # an empty cache may go on with another batch
        with pytest.raises(error, match="interrupted"):
            model(batch[:, cached : cached + tokens], past_key_values=cache)
        assert cache.get_seq_length() == cached
    handle.remove()
    for start, stop in ((cached, cached + tokens), (cached + tokens, cached + tokens + 3)):
        ours = model(text[:, start:stop], past_key_values=cache).logits
        assert torch.equal(ours, model(text[:, start:stop], past_key_values=expected_cache).logits)
    assert cache.stored_bytes() == expected_cache.stored_bytes() == held_bytes(cache)
    assert cached == 0 or len(states_before) > 0


def test_generate_goes_on_after_an_interrupt():
    model, prompt = tiny_model("llama"), random_tokens(1, 20)
    expected = generate(model, prompt, exact_cache(model, full_rank_projections("llama")))
    cache = exact_cache(model, full_rank_projections("llama"))
    calls = []

    def interrupt_fifth(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupt_fifth)
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompt, cache)
    handle.remove()
    done = expected[:, : cache.get_seq_length() + 1]
    assert done.shape[1] == 24
    assert torch.equal(generate(model, done, cache, new_tokens=expected.shape[1] - done.shape[1]), expected)


@pytest.mark.parametrize("family", ["gemma3", "qwen3-next", "falcon-h1"])
def test_layers_that_cannot_roll_back_say_so_and_reset_recovers(family):
    model, text = tiny_model(family), random_tokens(1, 20)
    expected = model(text, past_key_values=exact_cache(model, full_rank_projections(family))).logits
    cache = exact_cache(model, full_rank_projections(family))
    model(text[:, :8], past_key_values=cache)

    def fail(*args):
        raise RuntimeError("interrupted")

    handle = model.model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        model(text[:, 8:], past_key_values=cache)
    handle.remove()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"failed part-way.*call cache.reset\(\)"):
            model(text[:, 8:], past_key_values=cache)
    cache.reset()
    torch.testing.assert_close(model(text, past_key_values=cache).logits, expected)


def test_a_forward_that_failed_before_any_layer_needs_no_reset():
    model, text = tiny_model("gemma3"), random_tokens(1, 20)
    caches = [exact_cache(model, full_rank_projections("gemma3")) for _ in range(2)]
    for cache in caches:
        model(text[:, :8], past_key_values=cache)

    def fail(*args):
        raise RuntimeError("interrupted")

    handle = model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        model(text[:, 8:], past_key_values=caches[0])
    handle.remove()
    first, second = (model(text[:, 8:], past_key_values=cache).logits for cache in caches)
    assert torch.equal(first, second)


def test_inference_mode_prefill_goes_on_outside_of_it():
    model, text = tiny_model("llama"), random_tokens(1, 24)
    expected_cache, cache = lossy_cache(model), lossy_cache(model)
    for start, stop in ((0, 1), (1, 12), (12, 13), (13, 24)):
        with torch.no_grad():
            expected = model(text[:, start:stop], past_key_values=expected_cache).logits
        with torch.inference_mode(start in (0, 12)), torch.no_grad():
            assert torch.equal(model(text[:, start:stop], past_key_values=cache).logits, expected)
    cache.crop(-9)
    with torch.no_grad():
        model(text[:, 15:], past_key_values=cache)


@pytest.mark.parametrize("joint", [True, False])
def test_nothing_stored_reads_as_the_calibration_mean(joint):
    model, text = tiny_model("llama"), random_tokens(2, 20)
    projections = full_rank_projections("llama", joint=joint)
    cache = lossy_cache(model, joint=joint, ranks={0: (0, 32), 1: (32, 0), 2: (0, 0)})
    model(text, past_key_values=cache)
    returned = {}
    original = cache.update

    def update(key_states, value_states, layer_idx, *args, **kwargs):
        returned[layer_idx] = original(key_states, value_states, layer_idx, *args, **kwargs)
        return returned[layer_idx]

    cache.update = update
    model(random_tokens(2, 1), past_key_values=cache)
    basis = projections.bases[-1]
    assert basis.layers == (2,) and basis.side == ("both" if joint else "value")
    mean = (basis.offset @ basis.up_proj)[-32:].view(2, 1, 16)  # values come last
    middle = returned[2][1][:, :, 2:10]
    torch.testing.assert_close(middle, mean.expand_as(middle), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "layer_group_size, joint, states",
    [
        (1, True, r"both states of layers \(1,\)"),
        (3, True, r"both states of layers \(0, 1, 2\)"),
        (1, False, r"value states of layers \(1,\)"),
        (3, False, r"(key|value) states of layers \(0, 1, 2\)"),
    ],
)
def test_states_that_overflow_are_refused_and_undone(number, layer_group_size, joint, states):
    model = tiny_model("llama")
    cache = exact_cache(model, full_rank_projections("llama", 1, layer_group_size, joint))
    model(random_tokens(2, 12), past_key_values=cache)
    twin = copy.deepcopy(cache)

    def overflow(module, inputs, output):
        output[:, 2] = number
        return output

    handle = model.model.layers[1].self_attn.v_proj.register_forward_hook(overflow)
    with pytest.raises(ValueError, match=f"^{states}: states must be finite, got NaN or infinity"):
        model(random_tokens(2, 16), past_key_values=cache)
    handle.remove()
    assert cache.get_seq_length() == 12
    text = random_tokens(2, 8)
    assert torch.equal(model(text, past_key_values=cache).logits, model(text, past_key_values=twin).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen3-next", "falcon-h1", "lfm2"])
def test_layers_that_are_not_compressed_count_alike_on_both_sides(family, dtype):
    """A sliding layer of a float32 model must not make the cache look larger than the full one."""
    model = tiny_model(family, dtype)
    cache = LowRankCache(model, full_rank_projections(family), compression_ratio=4, **SIZES)
    with torch.no_grad():
        model(random_tokens(2, 200), past_key_values=cache)
        for seed in range(5):
            model(random_tokens(2, 1, seed=seed), past_key_values=cache)
    others = sum(
        storage.nbytes()
        for storage in {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
            for layer in (getattr(layer, "states", layer) for layer in cache.layers)
            if not isinstance(layer, LowRankLayer)
            for tensor in _tensors_of(layer)
        }.values()
    )
    width = sum(layer.shape.key.width + layer.shape.value.width for layer in cache.layers if hasattr(layer, "shape"))
    assert cache.full_bytes(linear_states=True) == 2 * 2 * 205 * width + others
    linear = cache.full_bytes(linear_states=True) - cache.full_bytes()
    assert cache.stored_bytes(linear_states=True) - cache.stored_bytes() == linear
    assert (linear > 0) == (family in ("qwen3-next", "falcon-h1", "lfm2"))
    assert 1 < cache.compression_ratio(linear_states=True) <= cache.compression_ratio()


def _tensors_of(layer):
    held = list(vars(layer).values())
    held += [value for part in held if isinstance(part, dict) for value in part.values()]
    return [value for value in held if isinstance(value, torch.Tensor) and value.is_floating_point()]
