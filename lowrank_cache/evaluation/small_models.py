"""Small models trained on the spot, for shapes that no small published model has: many KV heads, MLA.

They read bytes, so they need no tokenizer. A few minutes on one core make them good enough for their
keys and values to have structure; nothing else is expected of them.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PretrainedConfig, PreTrainedModel

__all__ = ["byte_tokens", "mla_config", "multi_head_config", "trained"]

WINDOW = 256
_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4 * WINDOW,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def multi_head_config() -> LlamaConfig:
    """4 layers of 8 KV heads of 24."""
    return LlamaConfig(**_COMMON)


def mla_config() -> DeepseekV3Config:
    """4 layers of multi-head latent attention, 64 numbers of latent and 16 of rotary key, without experts."""
    return DeepseekV3Config(
        **_COMMON,
        first_k_dense_replace=4,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=24,
        v_head_dim=24,
    )


def byte_tokens(text: str) -> tuple[Tensor, Tensor]:
    """Training and held-out token ids of a text: every tenth block of 20,000 bytes is held out."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    blocks = data.split(20_000)
    kept = [block for index, block in enumerate(blocks) if index % 10 != 9]
    return torch.cat(kept), torch.cat(blocks[9::10])


def trained(
    config: PretrainedConfig, tokens: Tensor, folder: Path, steps: int, report: Callable[[str], object]
) -> PreTrainedModel:
    """The model in ``folder``, or one trained now for ``steps`` batches of 8 windows and saved there.

    Args:
        tokens: ``[n]`` ids of at least one window.
        report: Called with a line of text now and then.
    """
    if (folder / "config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    losses: list[float] = []
    for step in range(steps):
        warm, left = min(1.0, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 2e-3 * warm * max(left, 0.05)
        starts = torch.randint(0, len(tokens) - WINDOW, (8,), generator=generator)
        batch = torch.stack([tokens[start : start + WINDOW] for start in starts.tolist()])
        step_loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        step_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step_loss.item())
        if (step + 1) % 100 == 0:
            report(
                f"{type(model).__name__}: step {step + 1} of {steps}, loss {sum(losses[-100:]) / 100:.3f} nats a byte"
            )
    model.save_pretrained(folder)
    return model.eval()
