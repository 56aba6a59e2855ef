"""Models in 4 and 8 bits: they calibrate, or say how, and their caches work. On CPU."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, PreTrainedModel

from lowrank_cache import LowRankCache, Projections
from lowrank_cache.calibration import calibrate
from lowrank_cache.calibration.collect import NoGradientError, collect_moments
from lowrank_cache.probe import model_shape
from lowrank_cache.shapes import layer_groups
from tests.oracle.models import SMALL_SIZES, random_tokens, tiny_model

bitsandbytes = pytest.importorskip("bitsandbytes")

FORMATS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
LINEARS = {"nf4": bitsandbytes.nn.Linear4bit, "int8": bitsandbytes.nn.Linear8bitLt}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny llama on disk; 4-bit products on CPUs want widths of whole blocks of 64."""
    config = tiny_model("llama").config
    config.intermediate_size = 128
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=FORMATS)
def kind(request):
    return request.param


def load(folder, kind: str | None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    quantization = BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **FORMATS[kind]) if kind else None
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=dtype, device_map="cpu"
    ).eval()
    if kind:
        assert isinstance(model.model.layers[0].self_attn.k_proj, LINEARS[kind])
    return model


def batches():
    return [random_tokens(4, 24, seed=seed) for seed in (1, 2)]


def check_cache(model: PreTrainedModel, projections: Projections) -> None:
    """The cache generates, and at full rank what a full cache does."""
    prompt, options = random_tokens(2, 14), {"max_new_tokens": 10, "do_sample": False}
    expected = model.generate(prompt, **options)
    # Latents in float32 carry a bfloat16 state so well that rounding the reconstruction restores every bit.
    options_of_cache = {"latent_dtype": torch.float32, "attend": "reconstruct", **SMALL_SIZES}
    exact = LowRankCache(model, projections, compression_ratio=1, **options_of_cache)
    assert torch.equal(model.generate(prompt, past_key_values=exact, **options), expected)
    cache = LowRankCache(model, projections, compression_ratio=4, **SMALL_SIZES)
    assert model.generate(prompt, past_key_values=cache, **options).shape == (2, 24)
    assert cache.get_seq_length() == 23
    assert all(group.tokens > 0 for group in cache.groups())


@DTYPES
def test_calibrates_without_gradients(saved, kind, dtype):
    model = load(saved, kind, dtype)
    projections = calibrate(model, batches(), sensitivity="query", progress=False)
    assert projections.provenance["weights"].startswith("bitsandbytes")
    assert projections.provenance["sensitivity"] == "query"
    check_cache(model, projections)


@pytest.mark.filterwarnings("ignore:bitsandbytes.*an autograd kernel was not registered")
@DTYPES
def test_gradients_are_right_or_refused(saved, kind, dtype):
    model = load(saved, kind, dtype)
    shape = model_shape(model)
    groups = {"both": layer_groups(shape, "both", 1)}
    try:
        ours = collect_moments(model, batches(), groups)
    except NoGradientError as error:
        assert "calibrate with sensitivity='query'" in str(error)
        return
    # Of the weights that the model really has: 4 bits change gradients more than a wrong derivative might.
    reference = collect_moments(load(saved, kind, dtype).dequantize().float(), batches(), groups)
    for where, sensitivity in ours.sensitivity.items():
        expected = reference.sensitivity[where]
        assert torch.nn.functional.cosine_similarity(sensitivity.flatten(), expected.flatten(), dim=0) > 0.98, where
        assert 0.8 < float(sensitivity.trace() / expected.trace()) < 1.25, where
    check_cache(model, calibrate(model, batches(), progress=False))


def test_projections_of_the_whole_model_serve_its_quantized_form(saved, kind):
    projections = calibrate(load(saved, None), batches(), progress=False)
    assert projections.provenance["weights"] == "float32"
    check_cache(load(saved, kind), projections)
