"""SmolLM2 with bitsandbytes weights, nf4 and int8, on this CPU: its caches against ``DynamicCache``.

``python -P tests/tools/real_bitsandbytes.py [PROJECTIONS]``; without projections they are calibrated
first, from the whole model. Not part of the tests, which use tiny models (``test_bitsandbytes.py``): it takes minutes.
"""

import functools
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Cache, DynamicCache, PreTrainedModel

from lowrank_cache import LowRankCache, Projections
from lowrank_cache.calibration import calibrate
from lowrank_cache.calibration.text import bundled_text, mixed_batches
from lowrank_cache.evaluation.demo import demo_model
from lowrank_cache.evaluation.streaming import stream, windows_of

FORMATS = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True}}
WINDOW, ROWS, CHUNK = 320, 2, 64  # with a window of 32 to 64 exact tokens, most of what is read is latents
SIZES = {"residual_length": 32, "block_size": 32}


def main() -> None:
    model, tokenizer, name = demo_model(print)
    text = bundled_text()
    held_out = tokenizer(text[-40_000:], return_tensors="pt").input_ids[0]
    windows = windows_of(held_out, WINDOW, ROWS)
    if len(sys.argv) > 1:
        projections = Projections.from_pretrained(sys.argv[1])
    else:
        batches = mixed_batches(tokenizer, text[:-40_000], tokens=8192, window=512)
        projections = calibrate(model, batches, layer_group_size=1)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for kind, options in FORMATS.items():
            quantization = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **options)
            quantized = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
            ).eval()
            print(f"{name}, {kind}: {type(quantized.model.layers[0].self_attn.k_proj).__name__}")
            compare(quantized, projections, windows)


def compare(model: PreTrainedModel, projections: Projections, windows: torch.Tensor) -> None:
    """Print losses and seconds; raise if an exact cache is not the full cache, or 8x is far from it."""
    exact = {"compression_ratio": 1, "latent_dtype": torch.float32}
    made = functools.partial(LowRankCache, model, projections, **SIZES)
    makers: dict[str, Callable[[], Cache]] = {
        "DynamicCache": lambda: DynamicCache(config=model.config),
        "full rank, reconstructed": functools.partial(made, attend="reconstruct", **exact),
        "full rank": functools.partial(made, **exact),
        "8x, reconstructed": functools.partial(made, attend="reconstruct", compression_ratio=8),
        "8x": functools.partial(made, compression_ratio=8),
    }
    losses = {}
    for label, make in makers.items():
        began = time.perf_counter()
        losses[label] = float(stream(model, windows, make, chunk=CHUNK).mean())
        print(f"  {label:28s} {losses[label]:.4f} nats a token, {time.perf_counter() - began:.1f} s")
    full = losses["DynamicCache"]
    for label, loss in losses.items():
        # int8 products round activations to 8 bits, which enlarges a last digit; 8x is lossy.
        allowed = 0.03 if "full rank" in label else 0.06
        assert abs(loss - full) < allowed, f"{label} is {loss - full:+.4f} nats from the full cache"


if __name__ == "__main__":
    main()
