"""A property of many rooms: where people run models, each with a compressed cache: docs/recipes.md in tests."""

import copy
from pathlib import Path
from threading import Thread

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
)

from lowrank_cache import LowRankCache
from lowrank_cache.calibration import calibrate
from lowrank_cache.probe import model_shape
from tests.oracle.inside import wrapped_attention
from tests.oracle.models import SMALL_SIZES, VOCAB, exact_cache, full_rank_projections, random_tokens, tiny_model

GREEDY = {"max_new_tokens": 8, "do_sample": False}
RECIPE = Path(__file__).resolve().parents[2] / "docs" / "custom_generate"
WORDS = " ".join(f"w{index}" for index in range(3, 25))


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word, ``w0`` to ``w127``, of which the first is padding and the second and third are roles."""
    vocabulary = {f"w{index}": index for index in range(VOCAB)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", padding_side="left")
    wrapped.chat_template = (
        "{% for message in messages %}{{ 'w1' if message.role == 'user' else 'w2' }} {{ message.content }} {% endfor %}"
        "{% if add_generation_prompt %}w2{% endif %}"
    )
    return wrapped


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def cache(model):
    return exact_cache(model, full_rank_projections("llama", 4, 3))


def test_pipeline(model, tokenizer, cache):
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    expected = pipe(WORDS, **GREEDY)
    assert pipe(WORDS, past_key_values=cache, **GREEDY) == expected
    assert cache.get_seq_length() == 22 + 8 - 1


def test_a_cache_that_holds_another_prompt(model, tokenizer, cache):
    """A pipeline hands the same cache on to each prompt of a list; transformers takes it for the prompt's beginning."""
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    with pytest.raises((ValueError, IndexError)):
        pipe([WORDS, "w9 w8 w7"], past_key_values=cache, **GREEDY)
    cache.reset()
    assert pipe("w9 w8 w7", past_key_values=cache, **GREEDY) == pipe("w9 w8 w7", **GREEDY)


def test_text_streamer(model, tokenizer, cache, capsys):
    inputs = tokenizer(WORDS, return_tensors="pt", return_token_type_ids=False)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    output = model.generate(**inputs, past_key_values=cache, streamer=streamer, **GREEDY)
    assert capsys.readouterr().out.split() == tokenizer.decode(output[0, 22:]).split()


def test_iterator_streamer_in_a_thread(model, tokenizer, cache):
    inputs = tokenizer(WORDS, return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**inputs, **GREEDY)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {**inputs, "past_key_values": cache, "streamer": streamer, **GREEDY}
    thread = Thread(target=model.generate, kwargs=options)
    thread.start()
    words = "".join(streamer).split()
    thread.join()
    assert words == tokenizer.decode(expected[0, 22:]).split()


@pytest.mark.parametrize("attend", ["reconstruct", "auto"])
def test_chat_over_many_turns_with_one_cache(model, tokenizer, attend):
    """Each turn sends the whole conversation; only what is new runs through the model."""
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    conversations = {}
    for name, cache in (
        ("full", DynamicCache(config=model.config)),
        ("latents", exact_cache(model, full_rank_projections("llama", 4, 3), attend=attend)),
    ):
        messages = []
        for turn in range(4):
            messages.append({"role": "user", "content": " ".join(f"w{20 + 5 * turn + word}" for word in range(7))})
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            seen.clear()
            output = model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], past_key_values=cache, **GREEDY
            )
            reply = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
            messages.append({"role": "assistant", "content": reply})
            # The user's words, two roles, and the last word of the reply before, which was never fed in.
            assert seen == [9 if turn == 0 else 10] + [1] * 7
        conversations[name] = messages
    handle.remove()
    assert conversations["latents"] == conversations["full"]


def test_a_prefix_computed_once_for_many_questions(model, tmp_path):
    projections = full_rank_projections("llama", 4, 3)
    prefix, questions = random_tokens(1, 30), [random_tokens(1, 5, seed=seed) for seed in (1, 2, 3)]
    cache = LowRankCache(model, projections, compression_ratio=4, **SMALL_SIZES)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    cache.save_pretrained(tmp_path)
    loaded = LowRankCache.from_pretrained(tmp_path, model, projections)
    for question in questions:
        whole = torch.cat([prefix, question], dim=1)
        answers = [model.generate(whole, past_key_values=copy.deepcopy(one), **GREEDY) for one in (cache, loaded)]
        assert torch.equal(*answers)
    assert cache.get_seq_length() == loaded.get_seq_length() == 30
    batch = copy.deepcopy(cache)
    batch.batch_repeat_interleave(3)
    together = model.generate(
        torch.cat([prefix.expand(3, -1), torch.cat(questions)], dim=1), past_key_values=batch, **GREEDY
    )
    assert torch.equal(together[2:], answers[0])


def test_batches_of_different_lengths(model, tokenizer):
    texts = [WORDS, " ".join(WORDS.split()[:13]), "w40 w41"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    cache = exact_cache(model, full_rank_projections("llama", 4, 3))
    together = model.generate(**inputs, past_key_values=cache, **GREEDY)[:, -8:]
    for text, row in zip(texts, together, strict=True):
        alone = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        assert torch.equal(model.generate(**alone, **GREEDY)[0, -8:], row)


def test_peft_adapters():
    peft = pytest.importorskip("peft")
    projections = full_rank_projections("llama", 4, 3)  # calibrated without adapters
    options = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}
    adapted = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**options), adapter_name="one").eval()
    adapted.add_adapter("two", peft.LoraConfig(**options))
    tokens = random_tokens(2, 18)
    outputs = {}
    for name in ("one", "two"):
        adapted.set_adapter(name)
        expected = adapted.generate(tokens, past_key_values=DynamicCache(config=adapted.config), **GREEDY)
        cache = exact_cache(adapted, projections)
        outputs[name] = adapted.generate(tokens, past_key_values=cache, **GREEDY)
        assert torch.equal(outputs[name], expected)
        reconstructed = exact_cache(adapted, projections, attend="reconstruct")
        again = adapted.generate(tokens, past_key_values=reconstructed, **GREEDY)
        assert torch.equal(again, expected)
    assert not torch.equal(outputs["one"], outputs["two"]), "adapters must matter for this test to mean something"
    # Switched in mid-conversation, the other adapter reads what the first one wrote, as with any cache.
    longer = torch.cat([outputs["two"], random_tokens(2, 4, seed=9)], dim=1)
    full = DynamicCache(config=adapted.config)
    adapted.generate(tokens, past_key_values=full, **GREEDY)
    adapted.set_adapter("one")
    expected = adapted.generate(longer, past_key_values=full, **GREEDY)
    assert torch.equal(adapted.generate(longer, past_key_values=cache, **GREEDY), expected)
    with adapted.disable_adapter():
        expected, cache = adapted.generate(tokens, **GREEDY), exact_cache(adapted, projections)
        assert torch.equal(adapted.generate(tokens, past_key_values=cache, **GREEDY), expected)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_peft_virtual_tokens(kind):
    """They change inputs, positions and mask; what the model inside is stays as it is, also for it alone."""
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    tuned = peft.get_peft_model(model, getattr(peft, kind)(**options)).eval()
    assert model_shape(tuned) == model_shape(tiny_model("llama"))
    tokens = random_tokens(2, 30)
    tokens[1, :7] = 0
    inputs = {"input_ids": tokens, "attention_mask": (tokens > 0).long()}
    expected = tuned.generate(**inputs, past_key_values=DynamicCache(config=model.config), **GREEDY)
    cache = exact_cache(tuned, full_rank_projections("llama", 4, 3))
    assert torch.equal(tuned.generate(**inputs, past_key_values=cache, **GREEDY), expected)
    assert cache.get_seq_length() == 30 + 4 + GREEDY["max_new_tokens"] - 1
    batches = [random_tokens(4, 20)]
    one, two = (calibrate(each, batches, progress=False) for each in (tuned, tiny_model("llama")))
    assert all(
        torch.equal(first.down_proj, second.down_proj) for first, second in zip(one.bases, two.bases, strict=True)
    )


def test_peft_prefixes_bring_a_cache_of_their_own():
    peft = pytest.importorskip("peft")
    model, projections = tiny_model("llama"), full_rank_projections("llama", 4, 3)
    cache = exact_cache(model, projections)
    tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with pytest.raises(NotImplementedError, match="PeftModelForCausalLM gives its model a cache of its own"):
        exact_cache(tuned, projections)
    with pytest.raises(AttributeError, match="a LowRankCache has no max_cache_len"):
        tuned.generate(random_tokens(1, 20), past_key_values=cache, **GREEDY)


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Where transformers copies code it was told to trust."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path


def test_custom_generate_from_a_folder(model, modules_cache):
    projections = full_rank_projections("llama", 4, 3)
    projections.save_pretrained(modules_cache / "projections")
    tokens = random_tokens(2, 18)
    cache = LowRankCache(model, projections, compression_ratio=4, **SMALL_SIZES)
    expected = model.generate(tokens, past_key_values=cache, **GREEDY)
    for given in (projections, modules_cache / "projections", str(modules_cache / "projections")):
        made = model.generate(
            tokens,
            custom_generate=str(RECIPE),
            trust_remote_code=True,
            projections=given,
            compression_ratio=4,
            cache_options=SMALL_SIZES,
            return_dict_in_generate=True,
            **GREEDY,
        )
        assert torch.equal(made.sequences, expected)
        assert isinstance(made.past_key_values, LowRankCache) and made.past_key_values.target_compression_ratio == 4
    options = {"custom_generate": str(RECIPE), "trust_remote_code": True, **GREEDY}
    xkv = model.generate(tokens, method="xkv", compression_ratio=2, **options)
    assert xkv.shape == (2, 26)
    assert model.config._attn_implementation == "sdpa", "attention must be as it was"
    for arguments, message in (
        ({}, "exactly one of projections and method"),
        ({"projections": projections, "compression_ratio": 0.5}, "compression_ratio must be at least 1"),
        ({"projections": projections, "past_key_values": cache}, "past_key_values must not be given"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(tokens, **arguments, **options)
    with pytest.raises(NotImplementedError, match="no known rotary layout"):
        tiny_model("gptj").generate(tokens, projections=projections, **options)


def test_continuous_batching_says_that_it_takes_no_cache(model, cache):
    twin = copy.deepcopy(cache)  # which attends to latents, and has its wrappers installed
    model.generate(random_tokens(1, 14), past_key_values=twin, **GREEDY)
    assert wrapped_attention()
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (12, 9)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64, use_cuda_graph=False)
    with pytest.warns(UserWarning, match="continuous batching keeps pages of its own"):
        outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        alone = model.generate(torch.tensor([prompt]), generation_config=config)
        assert output.generated_tokens == alone[0, len(prompt) :].tolist()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("implementation", ["static", "offloaded", "quantized"])
def test_cache_implementations_beside_a_cache_are_refused(model, cache, implementation):
    with pytest.raises(ValueError, match="cache_implementation.*(past_key_values|a Cache object)"):
        model.generate(random_tokens(1, 12), past_key_values=cache, cache_implementation=implementation, **GREEDY)
    assert cache.get_seq_length() == 0
