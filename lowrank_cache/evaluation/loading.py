"""The model and tokenizer of a measurement, by name or folder, in a dtype and on a device."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_cache.evaluation.model_source import demo_model

__all__ = ["check_dtype", "in_dtype", "load_model"]

DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(name: str, *, auto: bool = False) -> None:
    """Raise ValueError unless ``name`` is one of ``DTYPES``, or ``"auto"`` where that is allowed."""
    allowed = (*DTYPES, *(["auto"] if auto else []))
    if name not in allowed:
        raise ValueError(f"dtype must be one of {', '.join(allowed)}, got {name!r}")


def load_model(
    name: str | None, report: Callable[[str], object], dtype: str = "float32", device: str = "cpu"
) -> tuple[Any, Any, str]:
    """A model in eval mode, its tokenizer and its name; the demo's for None.

    Args:
        dtype: By name, or ``"auto"`` for that of the checkpoint.
    """
    model: Any
    if name is None:
        model, tokenizer, name = demo_model(report)
        if dtype not in ("auto", "float32"):
            model = in_dtype(model, dtype)
    else:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    if model.device != torch.device(device):  # some quantized models refuse even to stay where they are
        model = model.to(device)
    return model.eval(), tokenizer, name


def in_dtype(model: Any, dtype: str) -> Any:
    """``model`` moved to a dtype by name; inverse frequencies stay float32, as in a model loaded in this dtype."""
    check_dtype(dtype)
    tables = {path: buffer.clone() for path, buffer in model.named_buffers() if path.endswith("inv_freq")}
    model = model.to(getattr(torch, dtype))
    for path, table in tables.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, table)
    return model
