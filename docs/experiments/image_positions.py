"""What it costs that bases calibrated on text, whose positions rise by one, store the keys of an image.

    python docs/experiments/image_positions.py MODEL TEXT

A Llama-type text model gets a Qwen2-VL body: the same weights, and three positions a token. A run of text tokens is
then given the positions of an image, rows and columns of one moment, and what comes after is predicted from the full
cache and from compressed ones, each at the same positions. Calibrated in frames, and with every key turned back by its
own position (frames of 1), where no offsets are averaged.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import (
    AutoTokenizer,
    Cache,
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from lowrank_cache import LowRankCache
from lowrank_cache.calibration import calibrate

__all__ = ["divergence", "main", "positions_of", "with_three_positions"]

BEFORE, SIDE, AFTER = 64, 24, 256  # tokens before the image, along its edges, and predicted after it


@torch.no_grad()
def with_three_positions(model: LlamaForCausalLM) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL that computes what ``model`` computes wherever a token's three positions are equal."""
    text = {**model.config.to_dict(), "model_type": "qwen2_vl_text", "use_sliding_window": False}
    pairs = model.config.head_dim // 2
    sections = [pairs // 4, (pairs - pairs // 4) // 2]
    text["rope_parameters"] |= {"rope_type": "default", "mrope_section": [*sections, pairs - sum(sections)]}
    text["layer_types"] = ["full_attention"] * model.config.num_hidden_layers
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": model.config.hidden_size, "num_heads": 1}
    ids = {name: model.config.vocab_size - 1 for name in ("image_token_id", "video_token_id")}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    other = Qwen2VLForConditionalGeneration(config).eval().requires_grad_(False)
    missing, unexpected = other.model.language_model.load_state_dict(model.model.state_dict(), strict=False)
    assert not unexpected and all(name.endswith(".bias") for name in missing)
    for layer in other.model.language_model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.bias.zero_()
    other.lm_head.weight.copy_(model.lm_head.weight)
    return other


def positions_of(image: bool) -> Tensor:
    """``[3, 1, tokens]``, of text, an image or as much text, and text."""
    between = torch.arange(SIDE * SIDE)
    places = torch.stack([between * 0, between // SIDE, between % SIDE]) if image else between.expand(3, -1)
    start = BEFORE + int(places.max()) + 1
    parts = [torch.arange(BEFORE).expand(3, -1), BEFORE + places, start + torch.arange(AFTER).expand(3, -1)]
    return torch.cat(parts, dim=1)[:, None]


@torch.no_grad()
def divergence(model: PreTrainedModel, ids: Tensor, positions: Tensor, cache: Cache) -> float:
    """KL divergence in nats a token of what ``cache`` predicts after the image from what the full cache does."""
    logits = []
    for held in (DynamicCache(config=model.config.get_text_config(decoder=True)), cache):
        found = []
        context = ids.shape[1] - AFTER
        for start, stop in [(0, context), *((at, at + 32) for at in range(context, ids.shape[1], 32))]:
            given = {"input_ids": ids[:, start:stop], "position_ids": positions[:, :, start:stop]}
            found.append(model(**given, past_key_values=held).logits)
        logits.append(torch.cat(found[1:], dim=1).float().log_softmax(-1)[0])
    return float(kl_div(logits[1], logits[0], log_target=True, reduction="batchmean"))


def main(
    model: Annotated[str, typer.Argument(help="Folder or name of a Llama-type model.")],
    text: Annotated[Path, typer.Argument(help="Calibrated on its first half, measured on its second.")],
    windows: Annotated[int, typer.Option(help="Texts measured.")] = 8,
    tokens: Annotated[int, typer.Option(help="Calibrated on.")] = 16_384,
    ratio: Annotated[float, typer.Option(help="compression_ratio.")] = 8.0,
) -> None:
    """Print the divergence with text's positions and with an image's, by length of frames."""
    plain = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    other = with_three_positions(plain)
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    first, second = ids[:, : ids.shape[1] // 2], ids[:, ids.shape[1] // 2 :]
    length = positions_of(True).shape[2]
    batches = first[:, : tokens // 512 * 512].view(-1, 512).split(4)
    print(f"{'frames':7} {'text':>8} {'image':>8}  KL divergence from the full cache, nats a token, {windows} windows")
    for frame_length in (64, 1):
        projections = calibrate(other, batches, frame_length=frame_length, progress=False)
        found = []
        for image in (False, True):
            parts = [second[:, at * length : (at + 1) * length] for at in range(windows)]
            caches = (LowRankCache(other, projections, compression_ratio=ratio) for _ in parts)
            pairs = zip(parts, caches, strict=True)
            found.append(sum(divergence(other, part, positions_of(image), cache) for part, cache in pairs) / windows)
        print(f"{frame_length:<7} {found[0]:8.4f} {found[1]:8.4f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
