"""Tiny random models of every family the tests use, and the exact cache they are tested with.

Weights are seeded and wide enough (``initializer_range`` about ``hidden ** -0.5``) that attention is
not uniform and greedy tokens do not tie: with transformers' own small weights a wrong cache would
still give the right tokens. No model has an end-of-sequence token, so generation always runs on.
"""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from lowrank_cache import LowRankCache, Projections
from lowrank_cache.calibration import calibrate

__all__ = [
    "FAMILIES",
    "IMAGE",
    "MORE_FAMILIES",
    "M_ROPE",
    "OTHER_SIZES",
    "REFUSED",
    "VOCAB",
    "WITH_IMAGES",
    "exact_cache",
    "full_rank_projections",
    "random_tokens",
    "tiny_model",
    "wide_llama",
]

VOCAB = 128
IMAGE, IMAGE_START = VOCAB, VOCAB + 1  # ids of one place in an image, and of what stands before it
SMALL_SIZES = {"residual_length": 4, "num_sink_tokens": 2, "block_size": 3}

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _build(
    prefix: str, config_class: str | None = None, model_class: str | None = None, common: dict = _COMMON, **options
) -> PreTrainedModel:
    """The seeded model of ``{prefix}Config`` and ``{prefix}ForCausalLM``, with ``options`` over the common sizes."""
    config = getattr(transformers, config_class or f"{prefix}Config")(**{**common, **options})
    model_type = getattr(transformers, model_class or f"{prefix}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_type(config).eval()
        # Biases, norm gains and sink logits start as constants, which would hide a cache that mishandles them.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or name.endswith("sinks"):
                    parameter.add_(0.3 * torch.randn_like(parameter))
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.requires_grad_(False)


def _rope(rope_type: str, **parameters) -> dict:
    return {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}


def _qwen3_next(**options) -> PreTrainedModel:
    return _build(
        "Qwen3Next",
        **options,
        num_hidden_layers=4,
        linear_conv_kernel_dim=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )


def _deepseek_v3(**options) -> PreTrainedModel:
    return _build(
        "DeepseekV3",
        **{
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            **options,
        },
    )


# Supported families: each works in every generation mode that transformers' own DynamicCache works in.
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: _build("Llama"),
    "llama-yarn": lambda: _build(
        "Llama", rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=64)
    ),
    "llama-dynamic": lambda: _build(
        "Llama",
        max_position_embeddings=24,
        rope_parameters=_rope("dynamic", factor=2.0, original_max_position_embeddings=24),
    ),
    "llama-llama3": lambda: _build(
        "Llama",
        rope_parameters=_rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
    ),
    "mistral": lambda: _build("Mistral", sliding_window=None),
    "qwen2": lambda: _build("Qwen2"),
    "qwen3": lambda: _build("Qwen3"),
    "gemma2": lambda: _build(
        "Gemma2", num_hidden_layers=4, sliding_window=8, query_pre_attn_scalar=16, attn_implementation="eager"
    ),
    "gemma3": lambda: _build(
        "Gemma3", "Gemma3TextConfig", num_hidden_layers=12, sliding_window=8, query_pre_attn_scalar=16
    ),
    "phi3": lambda: _build(
        "Phi3",
        original_max_position_embeddings=24,
        rope_parameters=_rope(
            "longrope",
            partial_rotary_factor=0.5,
            short_factor=[1.0, 1.1, 1.3, 1.6],
            long_factor=[1.0, 2.0, 4.0, 8.0],
            original_max_position_embeddings=24,
        ),
    ),
    "glm4": lambda: _build("Glm4", rope_parameters=_rope("default", partial_rotary_factor=0.5)),
    "cohere2": lambda: _build("Cohere2", num_hidden_layers=4, sliding_window=8, logit_scale=1.0),
    "olmo2": lambda: _build("Olmo2"),
    "gpt-oss": lambda: _build(
        "GptOss",
        num_hidden_layers=4,
        sliding_window=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=64, truncate=False),
    ),
    "qwen3-next": _qwen3_next,
    "deepseek-v3": _deepseek_v3,
    "deepseek-v3-yarn": lambda: _deepseek_v3(
        rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0)
    ),
}


# Other sizes of a family.
OTHER_SIZES: dict[str, Callable[[], PreTrainedModel]] = {
    # Groups of four do not divide the KV heads, and their order matters.
    "qwen2-six-heads": lambda: _build(
        "Qwen2", num_attention_heads=6, num_key_value_heads=6, hidden_size=96, intermediate_size=64
    ),
    # Keys and values so narrow that a short prompt spans them.
    "qwen2-narrow": lambda: _build("Qwen2", num_key_value_heads=1, head_dim=8),
    # So narrow that what is saved of them stays small.
    "qwen2-six-narrow-heads": lambda: _build(
        "Qwen2", num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=6, head_dim=4
    ),
    "llama-dynamic-narrow": lambda: _build(
        "Llama",
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=24,
        rope_parameters=_rope("dynamic", factor=2.0, original_max_position_embeddings=24),
    ),
    "gemma2-narrow": lambda: _build(
        "Gemma2",
        num_key_value_heads=1,
        head_dim=8,
        num_hidden_layers=4,
        sliding_window=8,
        query_pre_attn_scalar=8,
        attn_implementation="eager",
    ),
    "qwen3-next-narrow": lambda: _qwen3_next(num_key_value_heads=1, head_dim=8),
}


def _deepseek_v2() -> PreTrainedModel:
    return _build(
        "DeepseekV2",
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=32,
    )


def _gemma3n() -> PreTrainedModel:
    return _build(
        "Gemma3n",
        "Gemma3nTextConfig",
        num_hidden_layers=6,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        sliding_window=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        intermediate_size=[96] * 6,
        activation_sparsity_pattern=[0.0] * 6,
        laurel_rank=8,
    )


def _longcat_flash() -> PreTrainedModel:
    return _build(
        "LongcatFlash",
        num_hidden_layers=4,
        num_layers=2,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        head_dim=8,
        n_routed_experts=4,
        moe_topk=2,
        expert_ffn_hidden_size=32,
        ffn_hidden_size=64,
        zero_expert_num=1,
    )


def _falcon(**options) -> PreTrainedModel:
    sizes = {name: size for name, size in _COMMON.items() if name != "head_dim"}  # Falcon derives it
    return _build("Falcon", common=sizes, new_decoder_architecture=True, num_kv_heads=2, **options)


def _with_images(
    prefix: str,
    section: list[int],
    vision: Mapping = MappingProxyType({}),
    rope: Mapping = MappingProxyType({}),
    **text,
) -> PreTrainedModel:
    """A model with M-RoPE whose pairs are dealt to axes by ``section``."""
    return _build(
        prefix,
        model_class=f"{prefix}ForConditionalGeneration",
        text_config={
            **_COMMON,
            "vocab_size": VOCAB + 2,
            "rope_parameters": _rope("default", mrope_section=section, **rope),
            **text,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 32,
            **vision,
        },
        image_token_id=IMAGE,
        vision_start_token_id=IMAGE_START,
        image_start_token_id=IMAGE_START,
    )


_LINEAR = {
    "num_hidden_layers": 4,
    "linear_conv_kernel_dim": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


# Three positions a token, equal but within images.
M_ROPE: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2-vl": lambda: _with_images("Qwen2VL", [2, 3, 3], {"embed_dim": 32, "hidden_size": 64}),
    "qwen2.5-vl": lambda: _with_images("Qwen2_5_VL", [2, 3, 3]),
    "qwen3-vl": lambda: _with_images(
        "Qwen3VL", [4, 2, 2], {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    ),
    "qwen3.5": lambda: _with_images(
        "Qwen3_5", [2, 1, 1], {"num_position_embeddings": 16}, {"partial_rotary_factor": 0.5}, **_LINEAR
    ),
    "glm4v": lambda: _with_images("Glm4v", [2, 3, 3]),
}


def _with_pictures(prefix: str, text: Mapping, vision: Mapping = MappingProxyType({}), **options) -> PreTrainedModel:
    """A model whose decoder is that of a text model, before which pictures of 8 by 8 become four embeddings."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "model_type": "siglip_vision_model",
        **vision,
    }
    return _build(
        prefix,
        model_class=f"{prefix}ForConditionalGeneration",
        text_config={**_COMMON, "vocab_size": VOCAB + 2, **text},
        vision_config=vision,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        boi_token_index=IMAGE_START,
        **options,
    )


# Wrappers hand their decoder embeddings, and some of them masks that they prepared.
WITH_IMAGES: dict[str, Callable[[], PreTrainedModel]] = {
    **M_ROPE,
    "gemma3-vl": lambda: _with_pictures(
        "Gemma3",
        {"num_hidden_layers": 12, "sliding_window": 8, "query_pre_attn_scalar": 16},
        mm_tokens_per_image=4,
    ),
    "llava": lambda: _with_pictures(
        "Llava", {"model_type": "llama"}, vision_feature_layer=-1, vision_feature_select_strategy="full"
    ),
    "mistral3": lambda: _with_pictures(
        "Mistral3",
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "pixtral", "head_dim": 16},
        spatial_merge_size=1,
    ),
    "paligemma": lambda: _with_pictures(
        "PaliGemma", {"model_type": "gemma"}, {"projection_dim": 64, "vision_use_head": False}, projection_dim=64
    ),
}


_MAMBA = {"mamba_n_heads": 16, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1}
# More families, tested in fewer modes: each has something that the families above have not.
MORE_FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "smollm3": lambda: _build("SmolLM3", num_hidden_layers=4),  # every fourth layer without rotary embedding
    "deepseek-v2": _deepseek_v2,  # MLA, rotation by complex numbers
    "longcat-flash": _longcat_flash,  # two MLA caches per layer
    "gemma3n": _gemma3n,  # later layers read the keys of earlier ones
    "llama4": lambda: _build(  # chunked attention
        "Llama4",
        "Llama4TextConfig",
        num_hidden_layers=4,
        num_local_experts=2,
        intermediate_size_mlp=96,
        attention_chunk_size=8,
    ),
    "lfm2": lambda: _build(  # convolution layers
        "Lfm2", num_hidden_layers=4, layer_types=["conv", "full_attention", "conv", "full_attention"]
    ),
    "falcon": _falcon,
    "ernie4_5": lambda: _build("Ernie4_5"),
    "granite": lambda: _build("Granite"),
    "gemma4": lambda: _build(  # heads of 512 in the layers that are compressed
        "Gemma4", "Gemma4TextConfig", num_hidden_layers=6, sliding_window=8
    ),
    **WITH_IMAGES,
    # Learned positions, and biases of the scores (ALiBi): nothing is rotated.
    "gpt2": lambda: _build("GPT2", model_class="GPT2LMHeadModel", n_embd=64, n_head=4, n_layer=2, n_positions=256),
    "opt": lambda: _build("OPT", ffn_dim=96, word_embed_proj_dim=64),
    "bloom": lambda: _build("Bloom", n_layer=2, n_head=4),
    "falcon-alibi": lambda: _falcon(alibi=True),
    # States beside tokens in one layer, and beside layers of tokens without positions.
    "falcon-h1": lambda: _build("FalconH1", **_MAMBA, mamba_d_ssm=128),
    "nemotron-h": lambda: _build(
        "NemotronH",
        num_hidden_layers=4,
        layers_block_type=["mamba", "attention", "mamba", "attention"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=8,
    ),
}


def _encoder_decoder(prefix: str, **options) -> PreTrainedModel:
    return _build(prefix, model_class=f"{prefix}ForConditionalGeneration", decoder_start_token_id=0, **options)


# Models that a LowRankCache refuses when it is made.
REFUSED: dict[str, Callable[[], PreTrainedModel]] = {
    "mistral-all-sliding": lambda: _build("Mistral", sliding_window=8),
    "t5": lambda: _encoder_decoder("T5", d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4),
    "bart": lambda: _encoder_decoder(
        "Bart",
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
    ),
    # Pairs of height and of width in turn, which changes the order of the frequencies too.
    "ernie4.5-vl": lambda: _with_images("Ernie4_5_VLMoe", [3, 3, 2]),
    "gptj": lambda: _build("GPTJ", n_embd=64, n_head=4, n_layer=2, rotary_dim=8, n_positions=256),
    "nanochat": lambda: _build("NanoChat"),
    "recurrent-gemma": lambda: _build("RecurrentGemma", lru_width=64, attention_window_size=8),
    "mamba": lambda: _build("Mamba", state_size=8, num_hidden_layers=2),
}


@cache
def _template(family: str) -> PreTrainedModel:
    return {**FAMILIES, **MORE_FAMILIES, **OTHER_SIZES, **REFUSED}[family]()


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A fresh copy of a family's model, so that no test sees the state another left in it."""
    model = copy.deepcopy(_template(family))
    if dtype != torch.float32:
        # Rotary frequencies are float32 in every dtype that from_pretrained loads; Module.to would round them.
        tables = {name: buffer for name, buffer in model.named_buffers() if "inv_freq" in name}
        model = model.to(dtype)
        if dtype != torch.float64:
            for name, buffer in tables.items():
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, buffer)
    if dtype == torch.float64:
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.register_forward_pre_hook(_clamp_mask, with_kwargs=True)
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    return model


def _clamp_mask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Keep float64's lowest number, which masks padding, finite in the float32 softmax of eager attention."""
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.is_floating_point():
        kwargs["attention_mask"] = mask.clamp(min=torch.finfo(torch.float32).min)
    return args, kwargs


def random_tokens(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """``[batch, tokens]`` token ids, never the pad token 0."""
    return torch.randint(1, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@cache
def _calibrated(
    family: str, frame_length: int, layer_group_size: int | tuple[int, int], joint: bool | None, method: str
) -> Projections:
    batches = [random_tokens(4, 20, seed=seed) for seed in (101, 102, 103)]
    return calibrate(
        tiny_model(family),
        batches,
        method=method,
        frame_length=frame_length,
        layer_group_size=layer_group_size,
        joint=joint,
        progress=False,
    )


def image_inputs(model: PreTrainedModel, batch: int = 2) -> dict[str, torch.Tensor]:
    """A batch of prompts with text, an image of a few tokens, and text; the second is padded by two on the left."""
    vision, draw = model.config.vision_config, torch.Generator().manual_seed(0)
    grids = "mrope_section" in model.config.get_text_config().rope_parameters
    image = torch.tensor([[IMAGE_START, *[IMAGE] * (6 if grids else 4)]] * batch)
    tokens = torch.cat([random_tokens(batch, 4), image, random_tokens(batch, 9, seed=1)], dim=1)
    mask = torch.ones_like(tokens)
    tokens[1:, :2] = mask[1:, :2] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if grids:  # an image of 2 by 3 tokens
        merge, size = vision.spatial_merge_size, vision.patch_size
        grid = torch.tensor([[1, 2 * merge, 3 * merge]] * batch)
        numbers = getattr(vision, "in_channels", 3) * getattr(vision, "temporal_patch_size", 1) * size**2
        return {
            **inputs,
            "pixel_values": torch.randn(int(grid.prod(1).sum()), numbers, generator=draw),
            "image_grid_thw": grid,
            "mm_token_type_ids": (tokens == IMAGE).long(),
        }
    inputs["pixel_values"] = torch.randn(batch, 3, 8, 8, generator=draw)
    if model.config.model_type in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = (tokens == IMAGE).long()
    if model.config.model_type == "mistral3":
        inputs["image_sizes"] = torch.tensor([[8, 8]] * batch)
    return inputs


def full_rank_projections(
    family: str,
    frame_length: int = 1,
    layer_group_size: int | tuple[int, int] = 1,
    joint: bool | None = None,
    method: str = "fisher",
) -> Projections:
    """Full-rank projections calibrated on a family's model; made once per session and options."""
    return _calibrated(family, frame_length, layer_group_size, joint, method)


def exact_cache(model: nn.Module, projections: Projections, **sizes) -> LowRankCache:
    """A cache that keeps every channel in the model's dtype, so small that latents are in use after 9 tokens."""
    options = {"latent_dtype": None, **SMALL_SIZES, **sizes}
    return LowRankCache(model, projections, compression_ratio=1, **options)


def wide_llama() -> PreTrainedModel:
    """Heads of 32, which baselines that quantize 32 numbers at a time need."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 32,
    }
    config = transformers.LlamaConfig(vocab_size=128, num_key_value_heads=1, **sizes)
    return transformers.LlamaForCausalLM(config).eval()
