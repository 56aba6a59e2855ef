# %% [markdown]
# # Speed and memory of a long prompt
#
# What each decoded token takes, and what the cache holds, as the context grows; and where rotary frames help. One
# thread of a CPU, bfloat16. Times differ from machine to machine: compare them with each other. Tables are in
# [Results](../results.md#speed).

# %%
import statistics
import time

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lowrank_cache import LowRankCache, Projections
from lowrank_cache.calibration import PRESETS
from lowrank_cache.calibration.api import projections_from_moments
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.evaluation.caches import tensor_bytes
from lowrank_cache.evaluation.inspection import inspect_projections

torch.set_num_threads(1)
name = "HuggingFaceTB/SmolLM2-135M-Instruct"
model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16").eval()
tokenizer = AutoTokenizer.from_pretrained(name)
text = open("my.txt", encoding="utf-8").read()[-60_000:]
ids = tokenizer(text, return_tensors="pt")["input_ids"]
moments = Moments.load("my-moments.safetensors")
presets = {
    "default": Projections.from_pretrained("my-projections"),
    "fastest": projections_from_moments(moments, **PRESETS["fastest"]),
}


# %%
@torch.no_grad()
def decode(caches, context, steps=8):
    """Seconds of the median step of each cache; they take turns, so that what disturbs the machine disturbs all."""
    times = {label: [] for label in caches}
    for cache in caches.values():
        model(input_ids=ids[:, :context], past_key_values=cache, logits_to_keep=1)
    for step in range(context, context + steps):
        for label, cache in caches.items():
            start = time.perf_counter()
            model(input_ids=ids[:, step : step + 1], past_key_values=cache)
            times[label].append(time.perf_counter() - start)
    return {label: statistics.median(values[1:]) for label, values in times.items()}


def caches():
    compressed = {preset: LowRankCache(model, made, compression_ratio=8) for preset, made in presets.items()}
    return {"full": DynamicCache(config=model.config), **compressed}


contexts, seconds, sizes = (512, 1024, 3072), {}, {}
for context in contexts:
    made = caches()
    for label, value in decode(made, context).items():
        seconds.setdefault(label, []).append(value)
        sizes.setdefault(label, []).append(tensor_bytes(made[label]))
for label in seconds:
    print(
        f"{label:<9}",
        *(
            f"{context:,} tokens: {value * 1000:4.0f} ms, {size / 1e6:5.1f} MB;"
            for context, value, size in zip(contexts, seconds[label], sizes[label], strict=True)
        ),
    )

# %%
figure, (speed, size) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
for label in seconds:
    speed.plot(contexts, [1000 * value for value in seconds[label]], marker="o", label=label)
    size.plot(contexts, [value / 1e6 for value in sizes[label]], marker="o", label=label)
speed.set(xlabel="tokens in the cache", ylabel="ms per decoded token", ylim=(0, None))
size.set(xlabel="tokens in the cache", ylabel="bytes of the cache, MB", yscale="log")
for axis in (speed, size):
    axis.grid(alpha=0.3)
    axis.legend()
plt.show()

# %% [markdown]
# Both presets attend to latents as they are stored. In each layer `default` reads the latent that five layers share,
# `fastest` only its own. How that compares with the full cache depends on the processor.
#
# ## What the bytes are
#
# At 3,072 tokens. The bases are shared by all caches of the model.

# %%
figure, axis = plt.subplots(figsize=(8, 2.8), layout="constrained")
parts = {"full": [sizes["full"][-1], 0, 0]}
for preset, projections in presets.items():
    inspection = inspect_projections(projections, 8)
    exact = sizes[preset][-1] - inspection.latent_bytes * (contexts[-1] - 128)
    parts[preset] = [exact, inspection.latent_bytes * (contexts[-1] - 128), inspection.basis_bytes]
left = [0.0] * len(parts)
for part, label in enumerate(("exact tokens, positions, unused room", "latents", "bases")):
    values = [sizes_of[part] / 1e6 for sizes_of in parts.values()]
    axis.barh(list(parts), values, left=left, label=label)
    left = [start + value for start, value in zip(left, values, strict=True)]
axis.invert_yaxis()
axis.set(xlabel="MB")
axis.legend()
plt.show()

# %% [markdown]
# ## Where frames help
#
# One latent for each layer's keys and one for its values, keys in frames of 1, 16 and 64 tokens. Longer frames
# compress less well (the predicted loss at 8x rises) and are read faster (queries are absorbed once per frame; in
# frames of 1, keys are reconstructed).

# %%
frames = (1, 16, 64)
framed = {
    frame: projections_from_moments(moments, layer_group_size=1, joint=False, frame_length=frame) for frame in frames
}
times = decode({frame: LowRankCache(model, made, compression_ratio=8) for frame, made in framed.items()}, 2048)
losses = [inspect_projections(made, 8).predicted_loss for made in framed.values()]
figure, (speed, quality) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
speed.bar([str(frame) for frame in frames], [1000 * times[frame] for frame in frames])
speed.set(xlabel="tokens per frame", ylabel="ms per decoded token, 2,048 in the cache")
quality.bar([str(frame) for frame in frames], losses, color="tab:orange")
quality.set(xlabel="tokens per frame", ylabel="predicted loss at 8x, nats per token")
plt.show()
