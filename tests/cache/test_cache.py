"""Arguments of ``LowRankCache``, and forwards it is not for: an error says what was expected, and nothing changed."""

import copy
import dataclasses
import warnings

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from lowrank_cache import LowRankCache, Projections
from lowrank_cache.budget import full_bytes_per_token
from lowrank_cache.calibration import calibrate
from tests.oracle.memory import reachable_tensors
from tests.oracle.models import REFUSED, exact_cache, full_rank_projections, random_tokens, tiny_model
from tests.oracle.states import Unchanged, filled_cache

PALU = "palu"


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def projections():
    return full_rank_projections("llama")


@pytest.fixture
def filled(model):
    return filled_cache(model)


class TestProjectionsOfAnotherModel:
    @pytest.mark.parametrize(
        "options, difference",
        [
            ({"num_hidden_layers": 4}, r"layer_types = .*, the model has"),
            ({"num_key_value_heads": 4}, r"layers\[0\].key.heads = 2, the model has 4"),
            ({"head_dim": 8}, r"layers\[0\].key.head_dim = 16, the model has 8"),
        ],
    )
    def test_shape(self, projections, options, difference):
        other = LlamaForCausalLM(type(tiny_model("llama").config)(**{**_config_fields(), **options}))
        with pytest.raises(ValueError, match=f"do not belong to this model: .*calibrated with {difference}"):
            LowRankCache(other, projections)

    @pytest.mark.parametrize("family", ["qwen2", "glm4", "gemma3", "deepseek-v3", "llama-dynamic"])
    def test_family_or_rope(self, projections, family):
        with pytest.raises(ValueError, match="projections do not belong to this model: they were calibrated with"):
            LowRankCache(tiny_model(family), projections)

    def test_rope_layout_alone(self, model, projections):
        def other_layout(layer):
            rope = dataclasses.replace(layer.key.rope, layout="interleaved")
            return dataclasses.replace(layer, key=dataclasses.replace(layer.key, rope=rope))

        shape = projections.shape
        shape = dataclasses.replace(shape, layers=tuple(other_layout(layer) for layer in shape.layers))
        edited = Projections(projections.bases, shape, method="fisher")
        with pytest.raises(ValueError, match=r"key.rope.layout = 'interleaved', the model has 'half'"):
            LowRankCache(model, edited)

    def test_not_projections(self, model):
        with pytest.raises(TypeError, match="projections must be Projections, a folder or a repository, got dict"):
            LowRankCache(model, {})

    def test_a_folder_in_their_place(self, model, projections, tmp_path):
        projections.save_pretrained(tmp_path / "bases")
        given, named = (LowRankCache(model, bases) for bases in (projections, tmp_path / "bases"))
        assert named.groups() == given.groups()
        assert LowRankCache(model, str(tmp_path / "bases")).groups() == given.groups()

    def test_not_a_model(self, projections):
        with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
            LowRankCache(torch.nn.Linear(2, 2), projections)


def _config_fields() -> dict:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = tiny_model("llama").config
    return {name: getattr(config, name) for name in (*names, "num_key_value_heads", "head_dim")}


class TestCacheArguments:
    @pytest.mark.parametrize(
        "options, error, message",
        [
            ({"method": "svd"}, ValueError, "exactly one of projections and method"),
            ({"compression_ratio": 0.75}, ValueError, "at least 1, got 0.75; .*kvpress.* pass 4"),
            ({"compression_ratio": 0}, ValueError, "at least 1, got 0$"),
            ({"compression_ratio": -2.0}, ValueError, "at least 1, got -2.0$"),
            ({"compression_ratio": float("nan")}, ValueError, "at least 1, got nan"),
            ({"compression_ratio": float("inf")}, ValueError, "stores nothing; the largest reachable ratio is"),
            ({"compression_ratio": "4"}, TypeError, "compression_ratio must be a number, got '4'"),
            ({"compression_ratio": None}, TypeError, "compression_ratio must be a number, got None"),
            ({"compression_ratio": True}, TypeError, "compression_ratio must be a number, got True"),
            ({"bits": 5}, ValueError, r"bits must be one of \(16, 8, 4, 2\) or None, got 5"),
            ({"bits": 0}, ValueError, "bits must be one of"),
            ({"bits": "4"}, ValueError, "bits must be one of"),
            ({"bits": 4.0}, ValueError, "bits must be one of"),
            ({"ranks": -1}, ValueError, "both.layers_0_0.heads_0-1 must be 0 to 64, got -1"),
            ({"ranks": 8.0}, TypeError, "ranks must be an integer or a mapping"),
            ({"ranks": "8"}, TypeError, "ranks must be an integer or a mapping"),
            ({"ranks": {0: (8, 8)}}, ValueError, r"ranks must name the first layer .* \[0, 1, 2\], got \[0\]"),
            ({"ranks": {0: (8, 8), 1: (8, 8), 2: (8, 8), 9: (8, 8)}}, ValueError, "ranks must name"),
            ({"ranks": {0: (33, 32), 1: (8, 8), 2: (8, 8)}}, ValueError, "layers_0_0.* must be 0 to 64, got 65"),
            (
                {"ranks": {0: (-1, 8), 1: (8, 8), 2: (8, 8)}},
                ValueError,
                r"ranks\[0\] must be .* at least 0, got \(-1, 8",
            ),
            (
                {"ranks": {0: (8, 8), 1: (8, 8.0), 2: (8, 8)}},
                ValueError,
                r"ranks\[1\] must be .*integers.*got \(8, 8.0",
            ),
            (
                {"ranks": {0: (8, 8), 1: ("8", 8), 2: (8, 8)}},
                ValueError,
                r"ranks\[1\] must be .*integers.*got \('8', 8",
            ),
            ({"ranks": {0: 8, 1: (8, 8), 2: (8, 8)}}, ValueError, r"ranks\[0\] must be a pair .*, got 8"),
            ({"residual_length": -1}, ValueError, "residual_length must be an integer of at least 0, got -1"),
            ({"residual_length": 1.5}, ValueError, "residual_length must be an integer of at least 0, got 1.5"),
            ({"residual_length": True}, ValueError, "residual_length must be an integer"),
            ({"num_sink_tokens": "4"}, ValueError, "num_sink_tokens must be an integer of at least 0, got '4'"),
            ({"num_sink_tokens": None}, ValueError, "num_sink_tokens must be an integer"),
            ({"block_size": 0}, ValueError, "block_size must be an integer of at least 1, got 0"),
            ({"latent_dtype": torch.int8}, ValueError, "latent_dtype must be a floating torch.dtype or None"),
            ({"latent_dtype": "float16"}, ValueError, "latent_dtype must be a floating torch.dtype or None"),
        ],
    )
    def test_refused(self, model, projections, options, error, message):
        with pytest.raises(error, match=message):
            LowRankCache(model, projections, **options)

    @pytest.mark.parametrize(
        "ranks, message",
        [
            (-1, "key.layers_0_0.heads_0-1 must be 0 to 32, got -1"),
            ({0: (33, 8), 1: (8, 8), 2: (8, 8)}, "key.layers_0_0.heads_0-1 must be 0 to 32, got 33"),
            ({0: (8, 8), 1: (8, 8), 2: (8, 33)}, "value.layers_2_2.heads_0-1 must be 0 to 32, got 33"),
        ],
    )
    def test_ranks_of_keys_apart_from_values(self, model, ranks, message):
        with pytest.raises(ValueError, match=message):
            LowRankCache(model, full_rank_projections("llama", joint=False), ranks=ranks)

    def test_unknown_method(self, model):
        with pytest.raises(ValueError, match="method must be .*got 'svd'"):
            LowRankCache(model, method="svd")
        with pytest.raises(ValueError, match="exactly one of projections and method"):
            LowRankCache(model)

    @pytest.mark.parametrize("bits", [None, 16, 8, 4, 2])
    @pytest.mark.parametrize(
        "method, layer_group_size", [("fisher", 1), ("fisher", 2), (PALU, 1), (PALU, 2), ("recalkv", 1)]
    )
    def test_the_largest_reachable_ratio_is_reachable(self, model, method, bits, layer_group_size):
        made = calibrate(
            model, [random_tokens(4, 20)], method=method, layer_group_size=layer_group_size, progress=False
        )
        with pytest.raises(ValueError, match="largest reachable ratio is") as refused:
            made.plan(1e6, bits=bits)
        largest = float(str(refused.value).rsplit(" ", 1)[1])
        plans = made.plan(largest, bits=bits)
        stored = sum(plan.bytes_per_token for plan in plans)
        assert 0 < stored <= full_bytes_per_token(made.shape) / largest
        with pytest.raises(ValueError, match=f"largest reachable ratio is {largest}$"):
            made.plan(largest + 0.02, bits=bits)
        # And a cache at that ratio works.
        cache = LowRankCache(model, made, compression_ratio=largest, bits=bits, residual_length=0, block_size=2)
        logits = [model(part, past_key_values=cache).logits for part in random_tokens(1, 16).split(8, dim=1)]
        assert all(bool(torch.isfinite(each).all()) for each in logits)


class TestModelsThatCannotBeCompressed:
    @pytest.mark.parametrize("family", ["t5", "bart"])
    def test_encoder_decoder(self, projections, family):
        with pytest.raises(NotImplementedError, match="is an encoder–decoder model; only decoders are supported"):
            LowRankCache(tiny_model(family), projections)

    @pytest.mark.parametrize("family", sorted(REFUSED))
    def test_calibration_refuses_too(self, family):
        with pytest.raises(NotImplementedError):
            calibrate(tiny_model(family), [random_tokens(2, 12)], progress=False)

    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    def test_broken_weights(self, projections, number):
        broken = tiny_model("llama")
        broken.model.layers[1].self_attn.k_proj.weight.data[3, 5] = number
        with pytest.raises(ValueError, match="keys and values of layer 1 must be finite.*check the model's weights"):
            LowRankCache(broken, projections)


class TestCalibration:
    """Arguments of ``calibrate``, which refuses what a cache could not use."""

    @pytest.mark.parametrize(
        "batches, message",
        [
            ("some text", "batches must be an iterable of token ids, got a string; tokenize it with the model's tok"),
            (["some text"], r"batches\[0\] holds text; tokenize it first"),
            ([["some", "text"]], r"batches\[0\] holds text; tokenize it first"),
            ([random_tokens(1, 9), "text"], r"batches\[1\] holds text; tokenize it first"),
            ([torch.randn(2, 8)], r"batches\[0\] must be a LongTensor \[batch, tokens\], got \[2, 8\]"),
            ([torch.arange(8)], r"batches\[0\] must be a LongTensor \[batch, tokens\], got \[8\]"),
            ([[1, 2, 3]], r"batches\[0\] must be a LongTensor \[batch, tokens\], got list"),
        ],
    )
    def test_wrong_batches(self, model, batches, message):
        with pytest.raises(TypeError, match=message):
            calibrate(model, batches, progress=False)

    @pytest.mark.parametrize("batches", [[], [random_tokens(3, 4)], [random_tokens(1, 1)]])
    def test_nothing_to_calibrate_on(self, model, batches):
        with pytest.raises(ValueError, match="no usable token: each sequence's first 4 real tokens are skipped"):
            calibrate(model, batches, progress=False)

    def test_unknown_method(self, model):
        with pytest.raises(ValueError, match=r"method must be one of \[.*'fisher'.*\], got 'svd'"):
            calibrate(model, [random_tokens(2, 12)], method="svd", progress=False)

    @pytest.mark.parametrize("name, value", [("frame_length", 0), ("frame_length", 2.5), ("layer_group_size", 0)])
    def test_sizes(self, model, name, value):
        with pytest.raises(ValueError, match=f"{name} must be .*an integer of at least 1.*got {value}"):
            calibrate(model, [random_tokens(2, 12)], progress=False, **{name: value})

    @pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("weight", ["model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj", "lm_head"])
    def test_broken_weights(self, weight, number):
        broken = tiny_model("llama")
        broken.get_submodule(weight).weight.data[3, 5] = number
        with pytest.raises(ValueError, match="must be finite, got"):
            calibrate(broken, [random_tokens(2, 12)], progress=False)

    def test_broken_token(self, model):
        model.model.embed_tokens.weight.data[77] = float("nan")  # only this token, which the probe does not use
        batch = random_tokens(2, 12)
        batch[1, 8] = 77
        with pytest.raises(ValueError, match="must be finite, got"):
            calibrate(model, [batch], progress=False)


class TestForwards:
    """Errors inside a forward: the cache goes on afterwards as if nothing had happened."""

    @pytest.mark.parametrize("other_family", ["llama", "qwen2"])
    @pytest.mark.parametrize("watched", [True, False])
    def test_another_model(self, model, filled, other_family, watched):
        other = tiny_model(other_family)
        own = exact_cache(other, full_rank_projections(other_family)) if watched else None
        message = "make one cache per model"
        with Unchanged(model, filled):
            with pytest.raises(ValueError, match=message):
                other(random_tokens(2, 3), past_key_values=filled)
        assert own is None or own.get_seq_length() == 0

    def test_another_model_after_a_failed_forward(self, model, filled):
        def fail(*args):
            raise RuntimeError("interrupted")

        handle = model.model.layers[0].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="interrupted"):
            model(random_tokens(2, 5), attention_mask=torch.ones(2, 25), past_key_values=filled, position_ids=_next(5))
        handle.remove()
        with pytest.raises(ValueError, match="make one cache per model"):
            tiny_model("llama")(random_tokens(2, 3), past_key_values=filled)

    def test_update_by_hand(self, filled, model):
        states = torch.zeros(2, 2, 1, 16)
        with Unchanged(model, filled):
            with pytest.raises(ValueError, match="layer 1 was updated outside a forward of the model"):
                filled.update(states, states, 1)

    def test_crop_by_a_positive_number(self, model, filled):
        with Unchanged(model, filled):
            with pytest.raises(ValueError, match=r"at most 0 \(-3 removes three tokens\), got 3"):
                filled.crop(3)


def _next(tokens):
    """Position ids that continue ``filled``."""
    return torch.tensor([[20], [19]]) + torch.arange(tokens)[None]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("prefix", [0, 20])
def test_gradients_pass_through_a_forwards_own_states(family, prefix):
    """As with DynamicCache, whose cached states are constants if they were cached without gradients."""
    found = []
    for make in (lambda model: DynamicCache(config=model.config), None):
        model = tiny_model(family).requires_grad_(True)
        cache = exact_cache(model, full_rank_projections(family)) if make is None else make(model)
        if prefix:
            with torch.no_grad():
                model(random_tokens(1, prefix), past_key_values=cache)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # attention over latents has no gradients
            model(random_tokens(1, 12, seed=1), past_key_values=cache).logits.square().mean().backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
        if make is None and family == "llama":  # sliding layers are transformers' own
            assert not any(tensor.requires_grad for tensor in reachable_tensors(cache))
    for name, expected in found[0].items():
        assert (expected is None) == (found[1][name] is None), name
        if expected is not None:
            assert torch.allclose(found[1][name], expected, rtol=0, atol=3e-3 * float(expected.abs().max())), name


class TestProjectionsOfOtherWeights:
    def _changed(self, share, kept=1.0):
        """The model with noise on its weights, of this share of their spread; ``kept`` of 0: with others."""
        model, draw = tiny_model("llama"), torch.Generator().manual_seed(0)
        for weight in model.parameters():
            if weight.dim() > 1:
                noise = share * weight.std() * torch.randn(weight.shape, generator=draw)
                weight.mul_(kept).add_(noise)
        return model

    def test_other_weights_are_refused(self):
        projections = full_rank_projections("llama")
        with pytest.raises(
            ValueError, match=r"and other weights \(keys and values of a token differ by \d+% or more\)"
        ):
            LowRankCache(self._changed(1.0, kept=0.0), projections)

    @pytest.mark.parametrize("reload", [False, True])
    def test_a_fine_tune_is_warned_of(self, reload, tmp_path):
        projections = full_rank_projections("llama")
        if reload:
            projections.save_pretrained(tmp_path)
            projections = Projections.from_pretrained(tmp_path, compression_ratio=3)
        with pytest.warns(
            UserWarning, match="weights of this LlamaForCausalLM differ .* the cache works, at more loss"
        ):
            LowRankCache(self._changed(0.2), projections, compression_ratio=4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_same_weights_in_any_dtype_pass(self, dtype, recwarn):
        LowRankCache(tiny_model("llama", dtype), full_rank_projections("llama"))
        assert not [warning for warning in recwarn if "weights" in str(warning.message)]

    def test_quantized_and_adapted_models_are_not_warned_of(self, recwarn):
        for name in ("quantization_config", "peft_config"):
            model = self._changed(0.2)
            setattr(model.config if name == "quantization_config" else model, name, {"quant_method": "some"})
            LowRankCache(model, full_rank_projections("llama"))
        assert not [warning for warning in recwarn if "weights" in str(warning.message)]

    def test_projections_of_older_versions_are_taken(self):
        projections = copy.copy(full_rank_projections("llama"))
        projections.probe = None
        LowRankCache(self._changed(1.0, kept=0.0), projections)
