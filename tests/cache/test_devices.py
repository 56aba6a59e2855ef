"""A property of many rooms: models on several devices, or offloaded, give the same tokens.

Nothing is mixed, and a warning is given where it costs.
"""

import contextlib
import copy
import warnings

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_cache import LowRankCache, latent_attention
from lowrank_cache.kernels.packed import LatentSide, PackedTier
from lowrank_cache.probe import layer_devices, model_shape
from tests.oracle.fake_devices import FIRST, SECOND, FakeDevices
from tests.oracle.inside import devices_of_latents, devices_of_windows, prompt_bases
from tests.oracle.memory import base_tensors
from tests.oracle.models import SMALL_SIZES, full_rank_projections, random_tokens, tiny_model

OPTIONS = {"compression_ratio": 2, **SMALL_SIZES}


def spread(family: str, first_layers: int) -> PreTrainedModel:
    """A tiny model with its first layers on one fake device and all others on another; only inside ``FakeDevices``."""
    model = tiny_model(family)
    layers = {
        f"model.layers.{index}": FIRST if index < first_layers else SECOND for index in range(len(model.model.layers))
    }
    places = {"model.embed_tokens": FIRST, "model.rotary_emb": FIRST, **layers, "model.norm": SECOND, "lm_head": SECOND}
    return dispatch_model(model, places)


def generate(model: PreTrainedModel, cache: LowRankCache, device="cpu") -> Tensor:
    """Of two rows, one of them left-padded."""
    tokens, mask = random_tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    inputs = {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
    return model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False).cpu()


@pytest.fixture
def devices():
    with FakeDevices() as fake:
        yield fake


def test_the_fake_refuses_what_gpus_refuse(devices):
    one, other = torch.ones(3, device=FIRST), torch.ones(3, device=SECOND)
    for mixed in (lambda: one + other, lambda: one + torch.ones(3), lambda: torch.cat([one, other])):
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            mixed()
    assert (one + torch.tensor(2.0)).device == FIRST and one[torch.tensor([0, 2])].device == FIRST
    one[1:] = other[1:] * 5  # a copy
    assert one.cpu().tolist() == [1, 5, 5]
    assert devices.moved_bytes == {("privateuseone:1", "privateuseone:0"): 8, ("privateuseone:0", "cpu"): 12}


@pytest.mark.parametrize("family, group, first_layers, attend", [
    ("llama", 1, 1, "auto"), ("llama", 3, 1, "reconstruct"), ("llama", 3, 2, "auto"),
    ("deepseek-v3", 3, 1, "reconstruct"),
])  # fmt: skip
def test_tokens_are_those_of_one_device(devices, family, group, first_layers, attend):
    projections = full_rank_projections(family, 4, group)
    whole = tiny_model(family)
    expected = generate(whole, LowRankCache(whole, projections, attend=attend, **OPTIONS))
    model = spread(family, first_layers)
    crossing = any(
        len({layer < first_layers for layer in basis.layers}) > 1 for basis in projections.bases
    )  # fmt: skip
    with pytest.warns(UserWarning, match="cross devices") if crossing else warnings.catch_warnings():
        cache = LowRankCache(model, projections, attend=attend, **OPTIONS)
    assert torch.equal(generate(model, cache, FIRST), expected)
    places = zip(cache.groups(), devices_of_windows(cache), devices_of_latents(cache), strict=True)
    for group, windows, latents in places:
        assert len(set(windows)) == 1 + (len({layer < first_layers for layer, _ in group.members}) > 1)
        assert latents == {windows[-1]}


def test_latents_of_a_crossing_group_are_copied_packed(devices):
    """One copy of the latents in a forward, not of the keys and values that they stand for."""
    model = spread("llama", 2)
    with pytest.warns(UserWarning, match=r"1 layer group.s. cross devices, the first being layers \[0, 1, 2\] on"):
        cache = LowRankCache(model, full_rank_projections("llama", 4, 3), **OPTIONS)
    tokens = random_tokens(1, 122)
    with torch.no_grad():
        model(tokens[:, :120].to(FIRST), past_key_values=cache)
        model(tokens[:, 120:121].to(FIRST), past_key_values=cache)
        devices.moved_bytes.clear()
        model(tokens[:, 121:].to(FIRST), past_key_values=cache)
    (group,) = cache.groups()
    packed = group.tokens * cache.latent_bytes_per_token()
    assert packed > 0
    back = devices.moved_bytes["privateuseone:1", "privateuseone:0"]
    logits = 4 * tiny_model("llama").config.vocab_size
    assert packed <= back <= packed + logits


def test_groups_of_a_prompt_end_at_borders(devices):
    model = spread("llama", 2)
    with pytest.warns(UserWarning, match=r"split where layers lie on different devices: \[\(0, 1\), \(2,\)\]"):
        cache = LowRankCache(model, method="xkv", layer_group_size=3, **OPTIONS)
    assert generate(model, cache, FIRST).shape == (2, 24)
    assert [{layer for layer, _ in group.members} for group in cache.groups()] == [{0, 1}, {0, 1}, {2}, {2}]
    for bases in prompt_bases(cache):
        assert len({tensor.device for tensor in bases}) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LowRankCache(model, method="xkv", layer_group_size=1, ranks=4, **SMALL_SIZES)
        LowRankCache(tiny_model("llama"), method="xkv", layer_group_size=3, **OPTIONS)


@pytest.mark.filterwarnings("ignore:1 layer group")
@pytest.mark.parametrize("group", [1, 3])
def test_saved_on_one_device_and_loaded_on_two(devices, tmp_path, group):
    projections = full_rank_projections("llama", 4, group)
    whole = tiny_model("llama")
    cache = LowRankCache(whole, projections, **OPTIONS)
    tokens = generate(whole, cache)
    cache.save_pretrained(tmp_path)
    model = spread("llama", 1)
    loaded = LowRankCache.from_pretrained(tmp_path, model, copy.copy(projections))
    mask = torch.ones(2, tokens.shape[1] + 3, dtype=torch.long)
    mask[0, :5] = 0
    longer = torch.cat([tokens, random_tokens(2, 3, seed=4)], dim=1)
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = whole.generate(longer, attention_mask=mask, past_key_values=cache, **options)
    inputs = {"input_ids": longer.to(FIRST), "attention_mask": mask.to(FIRST)}
    assert torch.equal(model.generate(**inputs, past_key_values=loaded, **options).cpu(), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert loaded.stored_bytes() > 0 and len(list((tmp_path / "again").iterdir())) == 2


@pytest.mark.filterwarnings("ignore:layer groups were split")
def test_xkv_saved_under_one_device_map_is_refused_under_another(devices, tmp_path):
    model = spread("llama", 2)
    cache = LowRankCache(model, method="xkv", layer_group_size=3, **OPTIONS)
    tokens = generate(model, cache, FIRST)
    cache.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\[0, 1\], \[2\], \[2\]\], must be those .* \[0, 1, 2\]\].* device_map"):
        LowRankCache.from_pretrained(tmp_path, tiny_model("llama"))
    loaded = LowRankCache.from_pretrained(tmp_path, spread("llama", 2))
    assert loaded.get_seq_length() == cache.get_seq_length() == tokens.shape[1] - 1


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("attend", ["reconstruct", "auto"])
def test_offloaded_weights(tmp_path, place, attend):
    whole = tiny_model("llama")
    projections = full_rank_projections("llama", 4, 3)
    expected = generate(whole, LowRankCache(whole, projections, attend=attend, **OPTIONS))
    model = tiny_model("llama")
    if place == "disk":
        places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        places |= {f"model.layers.{index}": "cpu" if index == 0 else "disk" for index in range(3)}
        model = dispatch_model(model, places, offload_dir=tmp_path)
    else:
        model = cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[1].self_attn.k_proj.weight.device.type == "meta"
    assert set(layer_devices(model).values()) == {torch.device("cpu")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all layers compute on one device
        cache = LowRankCache(model, projections, attend=attend, **OPTIONS)
    assert torch.equal(generate(model, cache), expected)


def test_caches_inside_one_layer_lie_where_it_does():
    model = tiny_model("longcat-flash")  # two caches a layer, numbered otherwise than layers
    model.model.layers[1].to("meta")
    assert [device.type for _, device in sorted(layer_devices(model).items())] == ["cpu", "cpu", "meta", "meta"]


@pytest.mark.parametrize("operation", ["decode", "encode", "reconstruct"])
def test_kernels_are_launched_under_their_tensors_device(monkeypatch, operation):
    """On GPUs Triton launches on torch's current device, whatever its arguments lie on."""
    triton = pytest.importorskip("triton")
    from lowrank_cache.kernels import triton_decode, triton_encode, triton_reconstruct

    current: list[torch.device] = []
    launched: list[list[torch.device]] = []

    @contextlib.contextmanager
    def on(device):
        current.append(torch.device(device))
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    codes = torch.zeros(1, 8, 16, dtype=torch.uint8)
    tier = PackedTier(8, 16, codes, torch.ones(1, 8, dtype=torch.float16))
    side = LatentSide((tier,), torch.zeros(16, 1, 16), torch.zeros(1, 16))
    # Every kernel of the module, replaced by a note of the devices it was launched under.
    module = {"decode": triton_decode, "encode": triton_encode, "reconstruct": triton_reconstruct}[operation]
    for part in (triton_decode, triton_encode, triton_reconstruct, *_kernel_modules()):
        for name, kernel in list(vars(part).items()):
            if isinstance(kernel, triton.runtime.jit.JITFunction | triton.runtime.interpreter.InterpretedFunction):
                monkeypatch.setattr(part, name, _NotedKernel(kernel.arg_names, launched, current))
    if operation == "decode":
        module.latent_attention(torch.zeros(1, 1, 1, 16), side, side, scaling=1.0)
    elif operation == "reconstruct":
        module.reconstruct(side, torch.float32)
    else:
        fake = torch.device("cuda", 1)
        monkeypatch.setattr(Tensor, "device", property(lambda _: fake))
        monkeypatch.setattr(module, "_latents", lambda *_: launched.append(list(current)) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            module.encode(
                [torch.zeros(1, 1, 8, 16)], [torch.zeros(1, 16)], [None], torch.zeros(16, 16), ((8, 16),),
                torch.ones(16), torch.float16,
            )  # fmt: skip
        assert launched == [[fake]]
        return
    assert launched and all(under == [codes.device] for under in launched)


def _kernel_modules():
    from lowrank_cache.kernels import triton_attend, triton_tiers

    return triton_attend, triton_tiers


class _NotedKernel:
    def __init__(self, arg_names, launched, current):
        self.arg_names, self.launched, self.current = arg_names, launched, current

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launched.append(list(self.current))


def test_models_split_over_processes_are_refused_when_the_cache_is_made():
    model = tiny_model("llama")
    model._tp_size = 2
    for make in (
        lambda: LowRankCache(model, method="xkv"),
        lambda: LowRankCache(model, full_rank_projections("llama")),
        lambda: latent_attention(model),
        lambda: model_shape(model),
    ):
        with pytest.raises(NotImplementedError, match="split over processes .tensor parallel 2, pipeline parallel 1."):
            make()
    model._tp_size = None
    assert model_shape(model).layers


@pytest.mark.parametrize("attend", ["reconstruct", "auto"])
def test_two_replicas_with_one_projections_share_no_matrices(devices, attend):
    """Each device has matrices of its own: nothing moves between them, whichever replica runs."""
    projections = full_rank_projections("llama", 4, 3)
    whole = tiny_model("llama")
    expected = generate(whole, LowRankCache(whole, projections, attend=attend, **OPTIONS))
    models = [tiny_model("llama").to(device) for device in (FIRST, SECOND)]
    devices.moved_bytes.clear()
    caches = [LowRankCache(model, projections, attend=attend, **OPTIONS) for model in models]
    for _ in range(2):
        for model, cache, device in zip(models, caches, (FIRST, SECOND), strict=True):
            assert torch.equal(generate(model, cache, device), expected)
            cache.reset()
    between = {route for route in devices.moved_bytes if "cpu" not in route}
    assert not between, f"bytes moved between the devices: {devices.moved_bytes}"
    held = [base_tensors(cache) for cache in caches]
    assert [{tensor.device for tensor in of_one} for of_one in held] == [{FIRST}, {SECOND}]
    assert not {id(tensor) for tensor in held[0]} & {id(tensor) for tensor in held[1]}
    again = LowRankCache(models[0], projections, **OPTIONS)
    assert {id(tensor) for tensor in base_tensors(again)} == {id(tensor) for tensor in held[0]}, "shared on one device"


def test_a_model_that_moved_takes_its_caches_matrices_along(devices):
    projections = full_rank_projections("llama", 4, 3)
    model = tiny_model("llama")
    expected = generate(model, LowRankCache(model, projections, **OPTIONS))
    cache, other = (LowRankCache(model, projections, **OPTIONS) for _ in range(2))
    model.to(FIRST)
    assert torch.equal(generate(model, cache, FIRST), expected)
    assert {tensor.device for tensor in base_tensors(cache)} == {FIRST}
    assert {tensor.device for tensor in base_tensors(other)} == {torch.device("cpu")}, "made before, shared, not moved"
