"""Every public name of transformers' ``Cache`` and of its layers works on a ``LowRankCache``, or says why not."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from lowrank_cache import LowRankCache
from tests.oracle.memory import reachable_tensors
from tests.oracle.models import exact_cache, full_rank_projections, random_tokens, tiny_model
from tests.oracle.states import past_states, saved_tensors

FAMILY_TOKENS = 30


def _filled(family="llama", batch=2, **options):
    model = tiny_model(family)
    cache = exact_cache(model, full_rank_projections(family), **options)
    with torch.no_grad():
        model(random_tokens(batch, FAMILY_TOKENS), past_key_values=cache)
    return model, cache


def _beside_stock(filled):
    """A cache and a stock one, that hold the same tokens or none."""
    model, cache = _filled()
    plain = DynamicCache(config=model.config)
    if filled:
        model(random_tokens(2, FAMILY_TOKENS), past_key_values=plain)
    else:
        cache.reset()
    return cache, plain


def _public(kind):
    """Names that ``kind`` or a parent of it defines, and those special ones that Python's own syntax calls."""
    special = {"__len__", "__iter__", "__repr__", "__reduce__"}
    return {name for name in dir(kind) if not name.startswith("_") or name in special and hasattr(kind, name)}


# How each name is called; of a property or attribute its value is compared with DynamicCache's.
_STATES = (torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16))
OF_CACHES = {
    "__iter__": (), "__len__": (), "__reduce__": (), "__repr__": (), "activate_past_recording": (),
    "batch_repeat_interleave": (2,), "batch_select_indices": (torch.tensor([1]),), "batch_size": None, "crop": (-3,),
    "early_initialization": (2, 2, 16, torch.float32, torch.device("cpu")), "get_conv_state": (0,),
    "get_mask_sizes": (1, 0), "get_max_length": (), "get_query_offset": (), "get_recurrent_state": (0,),
    "get_seq_length": (), "has_previous_state": (), "is_compileable": None, "is_croppable": None, "is_dummy": None,
    "is_initialized": None, "is_linear": None, "is_recording_past": (0,), "is_sliding": None, "offload": (0,),
    "prefetch": (0,), "reorder_cache": (torch.tensor([1, 0]),), "reset": (), "update": (*_STATES, 0),
    "update_conv_state": (_STATES[0], 0), "update_indexer": (_STATES[0], 0), "update_recurrent_state": (_STATES[0], 0),
}  # fmt: skip
OF_LAYERS = {
    "__reduce__": (), "__repr__": (), "batch_repeat_interleave": (2,), "batch_select_indices": (torch.tensor([1]),),
    "crop": (-3,), "get_mask_sizes": (1,), "get_max_length": (), "get_seq_length": (), "is_compileable": None,
    "is_croppable": None, "is_sliding": None, "lazy_initialization": _STATES, "offload": (), "prefetch": (),
    "reorder_cache": (torch.tensor([1, 0]),), "reset": (), "supports_early_init": None, "update": _STATES,
    "keys": None, "values": None, "dtype": None, "device": None, "is_initialized": None,
}  # fmt: skip
# Not those of DynamicCache: no forward may be captured in a graph, and buffers start with the first tokens. What the
# layers know of each other is the cache's.
OTHERWISE = {"batch_size", "supports_early_init", "keys", "values", "__repr__", "__reduce__", "__iter__"}


def _called(holder, name, arguments):
    """What a name gives, or the error it raises, which must be one that somebody wrote."""
    if arguments is None:
        return getattr(holder, name)
    try:
        return getattr(holder, name)(*arguments)
    except (ValueError, NotImplementedError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("kind, table", [(Cache, OF_CACHES), (DynamicCache, OF_CACHES)])
def test_the_tables_of_a_cache_are_whole(kind, table):
    assert _public(kind) - set(table) == set(), "say in the table how it is called; then see that it works"


@pytest.mark.parametrize("kind", [CacheLayerMixin, DynamicLayer])
def test_the_tables_of_a_layer_are_whole(kind):
    layer = DynamicCache(config=tiny_model("llama").config).layers[0]
    assert (_public(kind) | {name for name in vars(layer) if name[0] != "_"}) - set(OF_LAYERS) == set()


# Older releases have fewer names.
@pytest.mark.parametrize("name", [name for name in OF_CACHES if hasattr(DynamicCache, name)])
@pytest.mark.parametrize("filled", [False, True])
def test_names_of_the_cache(name, filled):
    cache, plain = _beside_stock(filled)
    found = _called(cache, name, OF_CACHES[name])
    if isinstance(found, tuple) and isinstance(found[0], type):
        assert "LowRank" in found[1] or found == _called(plain, name, OF_CACHES[name]) or "made for" in found[1]
    elif name not in OTHERWISE and (filled or name != "crop"):  # an empty one cannot be cropped in older releases
        assert found == _called(plain, name, OF_CACHES[name])


@pytest.mark.parametrize("name", OF_LAYERS)
@pytest.mark.parametrize("filled", [False, True])
def test_names_of_a_layer(name, filled):
    cache, plain = _beside_stock(filled)
    if name == "update":  # a layer's update stands inside the cache's
        return
    found = _called(cache.layers[0], name, OF_LAYERS[name])
    if isinstance(found, tuple) and isinstance(found[0], type):
        assert "LowRankCache" in found[1]
    elif name not in OTHERWISE and (filled or name not in ("dtype", "device")):
        # Some releases name a dtype that their own layers do not have.
        assert not hasattr(plain.layers[0], name) or found == _called(plain.layers[0], name, OF_LAYERS[name])
    assert cache.get_seq_length() == (FAMILY_TOKENS if filled else 0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek-v3"])
@pytest.mark.parametrize("options", [{}, {"num_sink_tokens": 0, "residual_length": 0, "block_size": 1}])
def test_keys_and_values_are_those_that_attention_is_given(family, options):
    model, cache = _filled(family, **options)
    expected = past_states(model, cache, 2)
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_tokens(2, FAMILY_TOKENS), past_key_values=plain)
    for layer, (keys, values, window) in enumerate(cache):
        stock = plain.layers[layer]
        assert keys.shape == stock.keys.shape and values.shape == stock.values.shape
        assert torch.allclose(keys, stock.keys, atol=1e-3) and torch.allclose(values, stock.values, atol=1e-3)
        if not cache.is_sliding[layer]:
            assert window is None and keys.dtype == torch.float32
            assert torch.equal(keys, expected[layer, "key"]) and torch.equal(values, expected[layer, "value"])


def test_keys_and_values_within_a_forward():
    """Some models read what earlier layers cached in the same forward."""
    model, cache = _filled()
    plain, seen = DynamicCache(config=model.config), []
    with torch.no_grad():
        model(random_tokens(2, FAMILY_TOKENS), past_key_values=plain)

        def read(module, args, output):
            seen.append([(layer.keys.clone(), layer.values.clone()) for layer in (cache if turn else plain).layers])

        hooks = [layer.register_forward_hook(read) for layer in model.model.layers]
        for turn, used in enumerate((plain, cache)):  # noqa: B007  # `read` looks at it
            for tokens in (1, 9):
                model(random_tokens(2, tokens), past_key_values=used)
        for hook in hooks:
            hook.remove()
    half = len(seen) // 2
    for number, (one, two) in enumerate(zip(seen[:half], seen[half:], strict=True)):
        for layer in range(number % 3 + 1):
            for expected, found in zip(one[layer], two[layer], strict=True):
                assert expected.shape == found.shape and torch.allclose(expected, found, atol=1e-3)


def test_max_cache_len_names_the_cache():
    """It is asked for by those who would replace the cache."""
    _, cache = _filled()
    with pytest.raises(AttributeError, match="a LowRankCache has no max_cache_len"):
        _ = cache.max_cache_len


def test_attributes_of_a_layer_cannot_be_set():
    _, cache = _filled()
    with pytest.raises(AttributeError, match="keys of a layer of a LowRankCache cannot be set"):
        cache.layers[0].keys = torch.zeros(1)


@pytest.mark.parametrize("indices", [(1, 0), [1, 0], torch.tensor([1, 0])])
@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices"])
def test_indices_of_any_kind(change, indices):
    _, cache = _filled()
    keys, values = cache.layers[0].keys, cache.layers[0].values
    getattr(cache, change)(indices)
    assert torch.equal(cache.layers[0].keys, keys[[1, 0]]) and torch.equal(cache.layers[0].values, values[[1, 0]])


def test_indices_that_are_none():
    _, cache = _filled()
    with pytest.raises(TypeError, match="indices must be whole numbers"):
        cache.batch_select_indices([0.5])
    with pytest.raises(IndexError):
        cache.batch_select_indices([2])
    assert cache.batch_size == 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3-next", "falcon-h1"])
@pytest.mark.parametrize("way", ["pickle", "torch.save", "copy"])
def test_pickle(family, way):
    model, cache = _filled(family)
    if way == "copy":
        loaded = copy.copy(cache)
    elif way == "pickle":
        loaded = pickle.loads(pickle.dumps(cache))
    else:
        torch.save({"prompt": cache}, file := io.BytesIO())
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)["prompt"]
    mine, theirs = saved_tensors(cache), saved_tensors(loaded)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    own = {tensor.data_ptr() for tensor in reachable_tensors(loaded) if tensor.nbytes}
    before = cache.get_seq_length()
    step = random_tokens(2, 1)
    assert torch.equal(model(step, past_key_values=cache).logits, model(step, past_key_values=loaded).logits)
    assert own and cache.get_seq_length() == loaded.get_seq_length() == before + 1


def test_pickle_of_an_empty_cache():
    model, cache = _filled()
    cache.reset()
    loaded = pickle.loads(pickle.dumps(cache))
    assert loaded.get_seq_length() == 0
    prompt = random_tokens(2, 30)
    assert torch.equal(model(prompt, past_key_values=cache).logits, model(prompt, past_key_values=loaded).logits)


def test_pickle_of_a_prompts_own_bases():
    model = tiny_model("llama")
    cache = LowRankCache(model, method="xkv", compression_ratio=2, residual_length=4, num_sink_tokens=2, block_size=3)
    model(random_tokens(2, 40), past_key_values=cache)
    mine, theirs = saved_tensors(cache), saved_tensors(pickle.loads(pickle.dumps(cache)))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_pickle_where_the_model_is_not(tmp_path):
    _, cache = _filled()
    path = tmp_path / "cache.pickle"
    path.write_bytes(pickle.dumps(cache))
    run = [sys.executable, "-c", f"import pickle; pickle.load(open({str(path)!r}, 'rb'))"]
    output = subprocess.run(run, capture_output=True, text=True).stderr
    assert "this process has 0 such models" in output and "LowRankCache.from_pretrained" in output


def test_pickle_where_two_models_could_have_made_it():
    model, cache = _filled()
    twin = copy.deepcopy(model)
    other = exact_cache(twin, full_rank_projections("llama"))
    with pytest.raises(ValueError, match="this process has 2 such models"):
        pickle.loads(pickle.dumps(cache))
    assert other.get_seq_length() == 0


def test_a_hybrid_layer_has_every_name_of_its_states():
    """Names are handed on one by one: a new one of transformers must not be missing."""
    _, cache = _filled("falcon-h1")
    layer = cache.layers[0]
    held = {name: value for name, value in vars(layer.states).items() if name not in ("dtype", "device")}  # of tokens
    assert "conv_states" in held and all(getattr(layer, name) is value for name, value in held.items())
    assert not {name for name in dir(layer.states) if name[0] != "_" and not hasattr(layer, name)}
