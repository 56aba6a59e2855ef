"""xKV: bases come from each row's own prompt, follow it, and count in the bytes."""

import contextlib
import copy
import warnings

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from lowrank_cache import LowRankCache, latent_attention
from lowrank_cache.budget import prompt_ranks
from lowrank_cache.probe import model_shape
from lowrank_cache.prompt_svd import leading_directions
from lowrank_cache.shapes import LayerShape, ModelShape, RopeShape, SideShape, layer_groups
from tests.cache.test_generation import MODES, compare
from tests.oracle.inside import has_prompt_bases, plant_shape, skip_products_of_prompts
from tests.oracle.memory import held_bytes, reachable_tensors
from tests.oracle.models import SMALL_SIZES, full_rank_projections, random_tokens, tiny_model
from tests.oracle.states import latent_states, past_states, saved_facts, saved_tensors, unrotated
from tests.oracle.tolerance import FLOAT32_ROUNDING, rounding_band

NOTHING_EXACT = {"residual_length": 0, "num_sink_tokens": 0, "block_size": 1}


def xkv(model, ratio: float = 4.0, **options) -> LowRankCache:
    options = {**SMALL_SIZES, "latent_dtype": None, "compression_ratio": ratio, **options}
    return LowRankCache(model, method="xkv", **options)


def read(model, cache: LowRankCache, batch: int = 1) -> list[Tensor]:
    """What every member of every group reads its latents as, ``[batch, heads, tokens, head_dim]``, before rotation."""
    start = saved_facts(cache)["settings"]["num_sink_tokens"]
    return [
        states if side == "value" else unrotated(model, states, start)
        for (_, side), states in latent_states(model, cache, batch).items()
    ]


def ranks(cache: LowRankCache) -> list[int]:
    return [sum(channels for _, channels in group.tiers) for group in cache.groups()]


def assert_same_states(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * float(other.abs().max()))


@pytest.fixture
def model():
    return tiny_model("llama")


class TestFullRank:
    """With every direction kept nothing is lost, so every mode must give what DynamicCache gives."""

    @pytest.mark.parametrize("new_tokens", ["encode", "exact"])
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("family, group", [("qwen2-narrow", 1), ("deepseek-v3", 1)])
    def test_modes_equal_dynamic_cache(self, family, group, mode, new_tokens):
        caches = []

        def make(model):
            sizes = {"num_sink_tokens": 1, "residual_length": 1, "block_size": 2}
            caches.append(xkv(model, 1, layer_group_size=group, new_tokens=new_tokens, **sizes))
            return caches[-1]

        # Bases are found in float32 too, with an error as large as that of the products: squares add up.
        compare(family, mode, make, rounding_band(family, method="palu", rounding=2**0.5 * FLOAT32_ROUNDING))
        longest = max(cache.get_seq_length() for cache in caches)
        if longest > 20 and mode not in ("prefix_reuse", "prefix_for_several"):  # whose caches are copied
            assert any(group.tokens for cache in caches for group in cache.groups())

    def test_layers_share_a_basis(self):
        model = tiny_model("qwen2-narrow")
        cache = xkv(model, 1, layer_group_size=3)
        tokens = random_tokens(2, 60)
        full = DynamicCache(config=model.config)
        for chunk in tokens.split([40, 20], dim=1):
            ours, theirs = (model(chunk, past_key_values=one).logits for one in (cache, full))
        assert ranks(cache) == [24, 24]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


class TestBasis:
    def test_prompt_loses_exactly_the_singular_values_cut_away(self, model):
        cache = xkv(model, layer_group_size=2, ranks=20, **NOTHING_EXACT)
        tokens = random_tokens(1, 70)
        model(tokens, past_key_values=cache)
        exact = xkv(model, 1, layer_group_size=2, **NOTHING_EXACT)
        model(tokens, past_key_values=exact)
        ours, truth = (latent_states(model, each, 1) for each in (cache, exact))
        assert len(cache.groups()) == 4
        for group in cache.groups():
            mine, full = (
                torch.cat([_row_of(model, of[member], member[1]) for member in group.members], dim=1)
                for of in (ours, truth)
            )
            centred = full.double() - full.double().mean(0)
            singular = torch.linalg.svdvals(centred)
            lost = float((mine - full).square().sum())
            assert lost == pytest.approx(float(singular[20:].square().sum()), rel=1e-3)

    @pytest.mark.parametrize("rank", [1, 8, 40, 100, 120])
    def test_leading_directions_capture_what_the_best_do(self, rank):
        basis = torch.linalg.qr(torch.randn(2, 120, 120)).Q
        spectrum = 1 / torch.arange(1, 121).float()
        covariance = basis * spectrum @ basis.mT
        directions, values = leading_directions(covariance, rank)
        torch.testing.assert_close(directions.mT @ directions, torch.eye(rank).expand(2, -1, -1), rtol=0, atol=1e-5)
        captured = (directions.mT @ covariance @ directions).diagonal(dim1=1, dim2=2).sum(1)
        best = float(spectrum[:rank].sum())
        assert bool((captured > 0.995 * best).all()) and bool((values.diff() <= 1e-6).all())

    def test_keys_are_decomposed_before_rotation(self):
        # Equal tokens at different positions have one pre-RoPE key: one direction holds the first layer's keys.
        model = tiny_model("llama")
        cache = xkv(model, layer_group_size=1, ranks=1, **NOTHING_EXACT)
        tokens = torch.full((1, 30), 7)
        model(tokens, past_key_values=cache)
        units = saved_tensors(cache)["store.0.units"]  # of the first layer's keys
        assert cache.groups()[0].members == ((0, "key"),)
        assert float(units.max()) < 1e-3  # nothing but the mean is left

    def test_constant_far_larger_than_the_variation(self):
        model = tiny_model("qwen2")
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias += 300.0
        errors = {}
        for bits in (4, 16):
            cache = xkv(model, layer_group_size=1, ranks=32, bits=bits, **NOTHING_EXACT)
            model(random_tokens(1, 80), past_key_values=cache)
            errors[bits] = [states for states in read(model, cache)[::2]]
        for four, sixteen in zip(errors[4], errors[16], strict=True):
            spread = (sixteen - sixteen.mean(2, keepdim=True)).square().mean()
            assert float((four - sixteen).square().mean() / spread) < 0.03


def _row_of(model, states: Tensor, side: str) -> Tensor:
    """``[1, heads, tokens, head_dim]`` → ``[tokens, width]``, before rotation."""
    states = unrotated(model, states, 0) if side == "key" else states
    return states[0].transpose(0, 1).flatten(1)


class TestRows:
    def test_rows_do_not_know_each_other(self, model):
        tokens = random_tokens(3, 50)
        together = xkv(model, layer_group_size=2)
        model(tokens, past_key_values=together)
        for row in range(3):
            alone = xkv(model, layer_group_size=2)
            model(tokens[row : row + 1], past_key_values=alone)
            assert_same_states([states[row : row + 1] for states in read(model, together, 3)], read(model, alone))

    def test_padding_and_the_sinks_behind_it_are_left_out(self, model):
        sizes = {"residual_length": 0, "num_sink_tokens": 2, "block_size": 1}
        tokens, pads = random_tokens(2, 60), 9
        mask = torch.ones_like(tokens)
        mask[1, :pads] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = xkv(model, layer_group_size=2, **sizes)
        model(tokens, attention_mask=mask, position_ids=positions, past_key_values=padded)
        alone = xkv(model, layer_group_size=2, **sizes)
        model(tokens[1:, pads:], past_key_values=alone)
        # As they come back: both tell the same positions of the row's real tokens.
        theirs = latent_states(model, alone, 1).values()
        ours = latent_states(model, padded, 2, mask).values()
        assert_same_states([states[1:, :, pads:] for states in ours], list(theirs))

    def test_bases_follow_their_rows(self, model):
        cache = xkv(model, layer_group_size=2)
        model(random_tokens(3, 50), past_key_values=cache)
        before = read(model, cache, 3)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        assert_same_states(read(model, cache, 3), [states[[2, 0, 0]] for states in before])
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.batch_repeat_interleave(2)
        assert_same_states(read(model, cache, 4), [states[[2, 2, 0, 0]] for states in before])
        assert cache.stored_bytes() == held_bytes(cache)
        assert {len(tensor) for name, tensor in saved_tensors(cache).items() if name.endswith("units")} == {4}

    def test_copies_share_nothing(self, model):
        cache = xkv(model, layer_group_size=2)
        model(random_tokens(2, 50), past_key_values=cache)
        before = read(model, cache, 2)
        other = copy.deepcopy(cache)
        for tensor in reachable_tensors(other):
            tensor.fill_(7)
        assert_same_states(read(model, cache, 2), before)

    def test_attention_over_latents_leaves_rows_with_bases_of_their_own_to_reconstruction(self, model):
        logits = []
        for switch in (contextlib.nullcontext(), latent_attention(model)):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                cache = xkv(model, layer_group_size=2)
            with switch:
                for chunk in random_tokens(2, 60).split([50, 1, 9], dim=1):
                    step = model(chunk, past_key_values=cache).logits
            logits.append(step)
        assert torch.equal(*logits)


class TestLife:
    def test_reset_forgets_the_bases(self, model):
        cache = xkv(model, layer_group_size=2)
        model(random_tokens(2, 50), past_key_values=cache)
        cache.reset()
        assert cache.stored_bytes() == held_bytes(cache) == 0
        fresh = xkv(model, layer_group_size=2)
        other = random_tokens(1, 45, seed=8)  # another batch, too
        for each in (cache, fresh):
            model(other, past_key_values=each)
        assert_same_states(read(model, cache), read(model, fresh))

    def test_crop_keeps_the_bases_and_crop_to_nothing_forgets_them(self, model):
        cache = xkv(model, layer_group_size=2)
        model(random_tokens(2, 50), past_key_values=cache)
        before = read(model, cache, 2)
        cache.crop(-30)
        (kept,) = {group.tokens for group in cache.groups()}
        first = [states[:, :, :kept] for states in before]
        assert_same_states(read(model, cache, 2), first)
        model(random_tokens(2, 20, seed=3), past_key_values=cache)
        assert_same_states([states[:, :, :kept] for states in read(model, cache, 2)], first)
        cache.crop(-1000)
        assert not any(group.tokens for group in cache.groups())
        assert cache.stored_bytes() == held_bytes(cache) == 0  # bases count in both

    def test_failed_forward_takes_its_bases_with_it(self, model):
        cache = xkv(model, layer_group_size=1)
        model(random_tokens(2, 5), past_key_values=cache)

        def interrupt(*args):
            raise KeyboardInterrupt

        handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(random_tokens(2, 45, seed=1), past_key_values=cache)
        handle.remove()
        assert has_prompt_bases(cache)
        cache.crop(0)  # settles
        assert not has_prompt_bases(cache)
        fresh = xkv(model, layer_group_size=1)
        model(random_tokens(2, 5), past_key_values=fresh)
        for each in (cache, fresh):
            model(random_tokens(2, 45, seed=2), past_key_values=each)
        assert_same_states(read(model, cache, 2), read(model, fresh, 2))
        assert cache.stored_bytes() == held_bytes(cache)

    def test_prompt_shorter_than_the_rank_stays_exact_until_enough_tokens_came(self, model):
        cache, full = xkv(model, layer_group_size=3, ranks=30), DynamicCache(config=model.config)
        prompt = random_tokens(1, 20)
        for each in (cache, full):
            model(prompt, past_key_values=each)
        assert not any(group.tokens for group in cache.groups()) and not has_prompt_bases(cache)
        assert torch.equal(past_states(model, cache, 1)[0, "value"], full.layers[0].values)
        for step in range(12):  # 2 sinks and 30 others
            model(random_tokens(1, 1, seed=step), past_key_values=cache)
            assert [group.tokens > 0 for group in cache.groups()] == [step == 11] * 2 == [has_prompt_bases(cache)] * 2

    def test_chunked_prompt_makes_its_bases_from_the_chunks_that_reach_the_rank(self, model):
        tokens = random_tokens(2, 60)
        first = xkv(model, layer_group_size=3, ranks=20)
        model(tokens[:, :32], past_key_values=first)
        chunked = xkv(model, layer_group_size=3, ranks=20)
        for chunk in tokens.split(16, dim=1):
            model(chunk, past_key_values=chunked)
        one, other = saved_tensors(chunked), saved_tensors(first)
        for name in ("store.0.units", "store.1.units"):
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=0)
        ours, theirs = read(model, chunked, 2), read(model, first, 2)
        count = theirs[0].shape[2]
        assert ours[0].shape[2] > count
        assert_same_states([states[:, :, :count] for states in ours], theirs)

    def test_exact_new_tokens_are_never_encoded(self, model):
        tokens = random_tokens(1, 90)
        cache, full = xkv(model, layer_group_size=3, new_tokens="exact"), DynamicCache(config=model.config)
        for chunk in tokens.split([50, 1, 9, 30], dim=1):
            model(chunk, past_key_values=cache)
        kept = (50 - 2 - 4) // 3 * 3
        assert [group.tokens for group in cache.groups()] == [kept] * 2
        saved = saved_tensors(cache)
        windows = [saved[f"store.{index}.window.{layer}"] for index in (0, 1) for layer in range(3)]
        assert {window.shape[2] for window in windows} == {90 - 2 - kept}
        # Latents without room to grow: their buffers are as long as they are.
        codes = [saved[f"store.{index}.codes.0"] for index in (0, 1)]
        held = [tuple(tensor.shape) for tensor in reachable_tensors(cache)]
        assert all(code.shape[1] == kept and tuple(code.shape) in held for code in codes)
        assert cache.stored_bytes() == held_bytes(cache)
        del full

    @pytest.mark.parametrize("new_tokens", ["encode", "exact"])
    def test_what_reading_made_is_not_kept(self, model, new_tokens):
        """Bases are the cache's own, and nobody else counts what they became in another dtype."""
        cache = xkv(model, layer_group_size=3, new_tokens=new_tokens, latent_dtype=torch.float16)
        for seed, tokens in enumerate((50, 1, 1, 3)):
            model(random_tokens(2, tokens, seed), past_key_values=cache)
            assert cache.stored_bytes() == held_bytes(cache)

    @pytest.mark.parametrize("bits", [16, 8, 4, 2])
    def test_uniform_bits_store_what_they_claim(self, model, bits):
        tokens = random_tokens(2, 120)
        cache = xkv(model, layer_group_size=3, ranks=64, bits=bits, **NOTHING_EXACT)
        exact = xkv(model, layer_group_size=3, ranks=64, **NOTHING_EXACT)
        for each in (cache, exact):
            model(tokens, past_key_values=each)
        assert cache.stored_bytes() == held_bytes(cache)
        saved = saved_tensors(cache)
        for index in range(len(cache.groups())):
            assert saved[f"store.{index}.codes.0"][0, 0].numel() == (64 if bits == 16 else 8 * bits)
            assert f"store.{index}.codes.1" not in saved
        allowed = {16: 1e-8, 8: 3e-4, 4: 0.03, 2: 0.25}[bits]
        for ours, theirs in zip(read(model, cache, 2), read(model, exact, 2), strict=True):
            spread = (theirs - theirs.mean(2, keepdim=True)).square().mean()
            assert float((ours - theirs).square().mean() / spread) < allowed

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        model = tiny_model("llama", dtype)
        cache = LowRankCache(model, method="xkv", compression_ratio=2, layer_group_size=3, **SMALL_SIZES)
        for chunk in random_tokens(2, 90).split([80, 10], dim=1):
            logits = model(chunk, past_key_values=cache).logits
        assert bool(torch.isfinite(logits).all())
        bases = [tensor for name, tensor in saved_tensors(cache).items() if ".up_proj." in name]
        assert len(bases) == 6 and all(tensor.dtype == torch.float16 for tensor in bases)


LLAMA_8B_ROPE = RopeShape("half", 128, "rotary_emb.inv_freq", False)


def llama_8b(layers: int) -> LlamaForCausalLM:
    """Keys and values shaped as Llama-3.1-8B's, in as many layers as the arithmetic needs; weights are never used."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        head_dim=128,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128,
    )
    model = LlamaForCausalLM(config)
    side = SideShape(8, 128, LLAMA_8B_ROPE)
    shapes = tuple(LayerShape(index, side, SideShape(8, 128, None)) for index in range(layers))
    plant_shape(model, ModelShape("llama", ("full_attention",) * layers, shapes))
    return model


class TestPaper:
    @pytest.mark.parametrize("tokens, ratio", [(1024, 1.71), (4096, 4.27), (16384, 6.83), (65536, 8.03)])
    def test_bytes_of_xkv_4_on_llama_3_1_8b(self, tokens, ratio, monkeypatch):
        """Stores, latents and bases are the real ones; only products that would take minutes are left out."""
        skip_products_of_prompts(monkeypatch)
        model = llama_8b(8)
        cache = LowRankCache(
            model,
            method="xkv",
            ranks={0: (384, 576), 4: (384, 576)},
            new_tokens="exact",
            residual_length=0,
            num_sink_tokens=0,
        )
        cache.begin_forward(model.model, {"input_ids": torch.ones(1, tokens, dtype=torch.long)})
        states = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16).expand(1, 8, tokens, 128)
        for layer in range(8):
            cache.update(states, states, layer)
        cache.end_forward(model.model, {})
        assert [group.tokens for group in cache.groups()] == [tokens] * 4
        assert cache.full_bytes() == tokens * 8 * 2048 * 2
        assert cache.compression_ratio() == pytest.approx(ratio, abs=0.02)

    def test_value_rank_is_one_and_a_half_times_the_key_rank(self):
        shape = model_shape(llama_8b(8))
        for ratio in (2.0, 4.0, 8.0, 12.0, 16.0):
            groups = layer_groups(shape, "both", 4)
            assert {len(layers) for layers in groups} == {4}
            for keys, values in prompt_ranks(shape, groups, ratio):
                assert values == min(round(1.5 * keys), 4096)
                assert 0.98 < 4 * 2048 * 2 / (2 * (keys + values)) / ratio < 1.02

    def test_mla_keeps_the_rotary_key_exactly(self):
        model = tiny_model("deepseek-v3")
        shape = model_shape(model)
        ranks = prompt_ranks(shape, [(0, 1, 2)], 2.0)
        # Per layer 16 numbers of latent and 8 of rotary key, which stay: (3 · 24 / 2 - 3 · 8) numbers are left.
        assert ranks == [(8, 0)]  # 12, rounded down to rows of 16 bytes
        cache = xkv(model, 2.0, layer_group_size=3)
        tokens = random_tokens(1, 40)
        full = DynamicCache(config=model.config)
        model(tokens, past_key_values=cache)
        model(tokens, past_key_values=full)
        rotary_keys = cache.groups()[1]
        assert rotary_keys == (((0, "value"), (1, "value"), (2, "value")), (), 0)
        kept = past_states(model, cache, 1)
        for layer in range(3):
            assert torch.equal(kept[layer, "value"], full.layers[layer].values)
        with pytest.raises(ValueError, match=r"compression_ratio 6 leaves nothing.*largest reachable ratio is"):
            xkv(model, 6.0, layer_group_size=3)


class TestBadInput:
    @pytest.mark.parametrize("size", [0, -1, 1.5, True, "4"])
    def test_layer_group_size(self, model, size):
        with pytest.raises(ValueError, match="layer_group_size must be an integer of at least 1"):
            xkv(model, layer_group_size=size)

    @pytest.mark.parametrize("what", ["both", 1, ""])
    def test_new_tokens(self, model, what):
        with pytest.raises(ValueError, match="new_tokens must be one of"):
            xkv(model, new_tokens=what)

    @pytest.mark.parametrize("options", [{"layer_group_size": 4}, {"new_tokens": "encode"}])
    def test_its_arguments_with_projections(self, model, options):
        with pytest.raises(ValueError, match="layer_group_size and new_tokens belong to method 'xkv'"):
            LowRankCache(model, full_rank_projections("llama"), **options)

    @pytest.mark.parametrize(
        "ranks, error, match",
        [
            (0, ValueError, "must be 1 to 64, got 0"),
            (1.5, TypeError, "ranks must be an integer or a mapping"),
            ({0: (1, 1)}, ValueError, r"ranks must name the first layer of each layer group, \[0, 2\]"),
            ({0: (65, 1), 2: (1, 1)}, ValueError, "key states of layers .0, 1. must be 1 to 64, got 65"),
            ({0: (1, 1), 2: (1, 33)}, ValueError, "value states of layers .2,. must be 1 to 32, got 33"),
        ],
    )
    def test_ranks(self, model, ranks, error, match):
        with pytest.raises(error, match=match):
            xkv(model, layer_group_size=2, ranks=ranks)

    def test_rank_of_what_is_kept_exactly(self):
        with pytest.raises(ValueError, match="MLA's rotary key, kept exactly. must be 0 to 0, got 3"):
            xkv(tiny_model("deepseek-v3"), layer_group_size=3, ranks={0: (4, 3)})

    @pytest.mark.parametrize("bits", [3, 0, "4"])
    def test_bits(self, model, bits):
        with pytest.raises(ValueError, match="bits must be one of"):
            xkv(model, bits=bits)

    @pytest.mark.parametrize("ratio, match", [(0.5, "pass 2"), (0, "at least 1"), (float("nan"), "at least 1")])
    def test_ratio(self, model, ratio, match):
        with pytest.raises(ValueError, match=match):
            xkv(model, ratio)

    def test_the_largest_reachable_ratio_is_reachable(self, model):
        with pytest.raises(ValueError, match="largest reachable ratio is") as refusal:
            xkv(model, 1000)
        xkv(model, float(str(refusal.value).rsplit(" ", 1)[1]))

    def test_empty_prompt(self, model):
        cache = xkv(model)
        with pytest.raises(ValueError, match="input_ids must hold at least one token"):
            model(torch.zeros(1, 0, dtype=torch.long), past_key_values=cache)
        assert cache.get_seq_length() == 0 and cache.stored_bytes() == 0

    def test_groups_end_at_layers_without_rotation(self):
        model = tiny_model("smollm3")  # its last layer has no rotary embedding
        cache = xkv(model)
        assert [group.members for group in cache.groups()] == [
            tuple((layer, side) for layer in group) for group in ((0, 1, 2), (3,)) for side in ("key", "value")
        ]

    def test_states_that_are_not_finite(self, model):
        cache = xkv(model, layer_group_size=3)
        with torch.no_grad():
            model.model.layers[2].self_attn.v_proj.weight[0, 0] = torch.inf
        with pytest.raises(ValueError, match="value states of layers .0, 1, 2. must be finite"):
            model(random_tokens(1, 60), past_key_values=cache)
