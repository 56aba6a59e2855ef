# %% [markdown]
# # What the coder stores
#
# The channels of a latent, the bits they get, and what a layer reads back of a real prompt. SmolLM2-135M, with
# projections calibrated on 4,096 tokens by `python -m tests.tools.docs_workplace`.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lowrank_cache import LowRankCache, Projections

name = "HuggingFaceTB/SmolLM2-135M-Instruct"
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(name)
projections = Projections.from_pretrained("my-projections")
print(projections)

# %% [markdown]
# ## Energies
#
# Each line is a group: the keys and values of five layers in one latent of 1,920 channels. `loss` is what dropping a
# channel would cost, in nats per token, as calibration predicts it. It falls by orders of magnitude within the first
# tenth of the channels: that is what there is to gain.

# %%
figure, (spectrum, kept) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
for (basis,) in projections.groups():
    loss = basis.loss.double().numpy()
    label = f"layers {basis.layers[0]}–{basis.layers[-1]}"
    spectrum.semilogy(np.arange(1, len(loss) + 1), loss, label=label)
    kept.semilogy(np.arange(len(loss)), 1 - np.cumsum(loss) / loss.sum(), label=label)
spectrum.set(xlabel="channel", ylabel="predicted loss of dropping it, nats")
kept.set(xlabel="channels kept", ylabel="share of the loss in the others", ylim=(1e-4, 1))
for axis in (spectrum, kept):
    axis.grid(alpha=0.3)
kept.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Bits per channel
#
# One budget for the whole model: the next bits go wherever they lower the predicted loss most per byte. At a larger
# ratio fewer channels are kept, in fewer bits. No ratio gives all channels the same width.

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.2), layout="constrained", sharey=True)
for axis, ratio in zip(axes, (4, 8, 16), strict=True):
    plans = projections.plan(ratio)
    picture = np.zeros((len(plans), plans[0].bases[0].rank))
    for line, plan in enumerate(plans):
        start = 0
        for bits, channels in plan.tiers:
            picture[line, start : start + len(channels)] = bits
            start += len(channels)
    image = axis.imshow(picture, aspect="auto", vmin=0, vmax=16, interpolation="nearest")
    axis.set(title=f"{ratio}x", xlabel="channel, by importance")
labels = [f"{plan.bases[0].layers[0]}–{plan.bases[0].layers[-1]}" for plan in plans]
axes[0].set_yticks(range(len(plans)), labels)
axes[0].set_ylabel("layers")
figure.colorbar(image, ax=axes, ticks=(0, 2, 4, 8, 16), label="bits")
plt.show()

# %% [markdown]
# ## What a layer reads back
#
# A prompt that calibration has not seen goes into the full cache and into compressed ones. With the next token,
# `update` gives each layer its past keys and values; the difference to the full cache is the coder's error. Only
# tokens that are stored as latents count.

# %%
text = open("my.txt", encoding="utf-8").read()[-12_000:]
ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :1024]


@torch.no_grad()
def read_back(cache):
    """Keys and values of every layer as the last token of the prompt finds them."""
    read = {}
    update = cache.update

    def note(keys, values, layer, *args, **kwargs):
        read[layer] = update(keys, values, layer, *args, **kwargs)
        return read[layer]

    model(input_ids=ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    cache.update = note
    logits = model(input_ids=ids[:, -1:], past_key_values=cache).logits
    return read, logits.log_softmax(-1)


full, expected = read_back(DynamicCache(config=model.config))
latents = slice(4, len(ids[0]) - 192)
figure, axes = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained", sharey=True)
for ratio in (4, 8, 16):
    read, logits = read_back(LowRankCache(model, projections, compression_ratio=ratio))
    for axis, side in zip(axes, (0, 1), strict=True):
        errors = [
            float(
                (read[layer][side] - full[layer][side])[:, :, latents].norm() / full[layer][side][:, :, latents].norm()
            )
            for layer in full
        ]
        axis.plot(errors, marker=".", label=f"{ratio}x")
    divergence = float((expected.exp() * (expected - logits)).sum())
    print(
        f"{ratio:>2}x: the next token's distribution is {divergence:.5f} nats (Kullback–Leibler) from the full cache's"
    )
for axis, title in zip(axes, ("keys", "values"), strict=True):
    axis.set(title=title, xlabel="layer", ylabel="relative error")
    axis.grid(alpha=0.3)
axes[0].legend()
plt.show()

# %% [markdown]
# At 16x, values are read back with errors of about a third and keys of an eighth, and the next token's distribution
# hardly moves. That is the point of weighing by sensitivity: errors are put where the loss does not see them. What
# it changes at the same size is measured in [the appendix](../appendix.md#fisher-against-a-whitened-svd).
