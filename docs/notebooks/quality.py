# %% [markdown]
# # Quality against bytes
#
# Perplexity of a short text under the full cache, quantized caches and low-rank caches, against the bytes that each
# one stores. Every token is streamed through the real cache, so that every read is lossy. A short text shows the
# shape of the curves; tables with intervals are in [Results](../results.md).

# %%
import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_cache import LowRankCache, Projections
from lowrank_cache.calibration import PRESETS
from lowrank_cache.calibration.api import projections_from_moments
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.evaluation.caches import BASELINES, tensor_bytes
from lowrank_cache.evaluation.streaming import stream, windows_of

name = "HuggingFaceTB/SmolLM2-135M-Instruct"
model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16").eval()
tokenizer = AutoTokenizer.from_pretrained(name)
text = open("my.txt", encoding="utf-8").read()[-60_000:]  # calibration read the beginning
windows = windows_of(torch.tensor(tokenizer(text)["input_ids"]), 768, count=2)

# %% [markdown]
# The window of exact tokens is 32.

# %%
default = Projections.from_pretrained("my-projections")
fastest = projections_from_moments(Moments.load("my-moments.safetensors"), **PRESETS["fastest"])


def low_rank(projections, ratio):
    return lambda: LowRankCache(model, projections, compression_ratio=ratio, residual_length=32, block_size=32)


makers = {"full": lambda: BASELINES["full"](model, 32)}
makers["quantized, fp8"] = lambda: BASELINES["quantized-fp8"](model, 32)
makers |= {f"default, {ratio}x": low_rank(default, ratio) for ratio in (5, 10, 20)}
makers |= {f"fastest, {ratio}x": low_rank(fastest, ratio) for ratio in (4, 8)}

losses, stored = {}, {}
for label, make in makers.items():
    made = []
    losses[label] = stream(model, windows, lambda make=make, made=made: made.append(make()) or made[-1])
    stored[label] = tensor_bytes(made[-1])
    ratio = (losses[label].mean() - losses["full"].mean()).exp()
    print(f"{label:<26} {stored['full'] / stored[label]:5.2f}x fewer bytes, perplexity x{ratio:.4f}")

# %%
figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
for family, marker in (("quantized", "s"), ("default", "o"), ("fastest", "^")):
    members = [label for label in makers if label.startswith(family)]
    sizes = [100 * stored[label] / stored["full"] for label in members]
    ratios = [float((losses[label].mean() - losses["full"].mean()).exp()) for label in members]
    axis.plot(sizes, ratios, marker=marker, label=family)
    for label, size, ratio in zip(members, sizes, ratios, strict=True):
        axis.annotate(
            label.partition(", ")[2],
            (size, ratio),
            textcoords="offset points",
            xytext=(5, 5),
        )
axis.axhline(1, color="grey", linestyle=":")
axis.set(xlabel="bytes at the end of a window, % of the full cache", ylabel="perplexity to that of the full cache")
axis.grid(alpha=0.3)
axis.legend()
plt.show()

# %% [markdown]
# Windows of 768 tokens keep 36 to 67 tokens exactly, which bounds every ratio here; it weighs less in longer
# contexts. transformers' fp8 `QuantizedCache` keeps none exactly.
#
# ## Where in the text
#
# If errors built up, later tokens would lose more than earlier ones.

# %%
figure, axis = plt.subplots(figsize=(8, 3.5), layout="constrained")
for label in ("default, 10x", "default, 20x", "fastest, 8x"):
    difference = (losses[label] - losses["full"]).mean(0)
    parts = [float(part.mean()) for part in difference.tensor_split(8)]
    axis.plot([(index + 0.5) * 96 for index in range(8)], parts, marker="o", label=label)
axis.axhline(0, color="grey", linestyle=":")
axis.set(xlabel="token of the window", ylabel="loss above the full cache, nats")
axis.grid(alpha=0.3)
axis.legend()
plt.show()
