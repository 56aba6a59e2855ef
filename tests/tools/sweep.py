"""Every class of transformers that generates text, with a tiny random configuration: does it work, or say why not?

    python -m tests.tools.sweep [--sample 12 --seed 0] [--only Llama ...] [--write]

A left-padded batch of two generates greedily with a ``LowRankCache`` that keeps every channel, and must give the tokens
of ``DynamicCache``. Each class ends in one of five ways: it works; it is refused when the cache is made, with a reason;
a forward refuses it later, still before a wrong token; no tiny configuration can be made, or its own ``generate`` fails
without us; or it is a fault, and the exit status is 1. ``--write`` updates the table in docs/models.md.
"""

import argparse
import inspect
import random
import re
import signal
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import DynamicCache, PreTrainedConfig
from transformers.models.auto import modeling_auto

from lowrank_cache import LowRankCache
from lowrank_cache.calibration import calibrate
from lowrank_cache.calibration.collect import NoGradientError
from lowrank_cache.probe import cache_argument, model_shape
from tests.tools.docs_sections import read_section, write_section

__all__ = ["Verdict", "classes", "judge", "main", "tiny_config"]

WORKS, REFUSED, LATE, UNTESTED, FAULT = "works", "refused", "refused late", "not tested", "fault"
VOCAB = 96
# By name, wherever a configuration or one within it has an attribute of that name.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "rotary_dim": 8,
    "mamba_d_ssm": 128,
    "mamba_n_heads": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "dim": 64,
    "embed_dim": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "n_inner": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_heads": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "sliding_window": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "initializer_range": 0.15,
    "state_size": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 256,
    "depth": 1,
    "image_size": 8,
    "patch_size": 4,
}
LARGEST = 30_000_000  # weights
SECONDS = 30
DERIVED = "head_dim", "num_key_value_heads", "num_experts_per_tok"  # also where a configuration leaves them out
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


class Verdict(NamedTuple):
    """What became of a class: one of four kinds, and a reason if it does not work."""

    kind: str
    reason: str = ""


def classes() -> list[str]:
    """Names of all classes that auto-model tables call generators of text, from text or from text and images."""
    tables = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return sorted({name for table in tables for names in table.values() for name in _each(names)})


def _each(names: str | tuple) -> tuple:
    return names if isinstance(names, tuple) else (names,)


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The default configuration, with ``SIZES``; made anew, so that whatever is derived from sizes is derived again."""
    plain = config_class()

    def own(name: str) -> Any:
        try:
            return getattr(plain, name, None)
        except Exception:  # differs by layer
            return 0

    given = {name: size for name, size in SIZES.items() if own(name) is not None}
    given |= {name: SIZES[name] for name in DERIVED if hasattr(type(plain), name) or name in vars(plain)}
    for name, part in list(vars(plain).items()):
        if isinstance(part, PreTrainedConfig):
            given[name] = tiny_config(type(part))
    given |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    given |= {"tie_word_embeddings": False}
    if "qk_rope_head_dim" in given:
        given |= {"head_dim": given["qk_rope_head_dim"], "num_key_value_heads": given["num_attention_heads"]}
    kinds = getattr(plain, "layer_types", None)
    if not kinds and "sliding_window" in given:
        given["sliding_window"] = None  # else every layer would slide
    if isinstance(kinds, list) and kinds:
        order = list(dict.fromkeys(kinds))
        given["layer_types"] = [order[index % len(order)] for index in range(4)]
    if isinstance(own("hybrid_layer_ids"), list) and "layer_types" in given:  # Zamba2
        given["hybrid_layer_ids"] = [index for index, kind in enumerate(given["layer_types"]) if kind == "hybrid"]
    rope = own("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope and _has_axes(config_class):
        half = int(given.get("head_dim", 16) * rope.get("partial_rotary_factor", 1.0)) // 2
        given["rope_parameters"] = {**rope, "mrope_section": [*[half * 3 // 8] * 2, half - 2 * (half * 3 // 8)]}
    while True:
        try:
            return config_class(**given)
        except Exception as error:
            named = [name for name in given if re.search(rf"\b{name}\b", str(error))]
            if "layers_block_type" in str(error):  # what ``layer_types`` is made of
                named.append("layer_types")
            if not named:
                raise
            for name in named:  # it takes no such value
                del given[name]


def _has_axes(config_class: type[PreTrainedConfig]) -> bool:
    """Whether the modeling file beside a configuration deals positions to sections of a head (M-RoPE)."""
    folder = Path(inspect.getfile(config_class)).parent
    return any("mrope_section" in path.read_text(encoding="utf-8") for path in folder.glob("modeling_*.py"))


def judge(name: str) -> Verdict:
    """Try one class."""
    model_class = getattr(transformers, name, None)
    if model_class is None:
        return Verdict(UNTESTED, "it needs a package that is not installed")
    try:
        torch.manual_seed(0)
        config = tiny_config(model_class.config_class)
        with torch.device("meta"):
            numbers = sum(weight.numel() for weight in model_class(config).parameters())
        if numbers > LARGEST:
            return Verdict(UNTESTED, f"no tiny configuration: {numbers / 1e6:.0f} million weights")
        model = model_class(config).eval().requires_grad_(False)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        tokens = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(tokens)
        tokens[1, :5] = mask[1, :5] = 0
        inputs = {"input_ids": tokens, "attention_mask": mask, **GREEDY}
    except Exception as error:  # whatever a configuration of made-up sizes runs into
        return Verdict(UNTESTED, f"no tiny configuration: {_short(error)}")
    made = None
    try:
        model_shape(model)
    except NotImplementedError as error:
        return Verdict(REFUSED, _short(error))
    except Exception as error:
        made = error
    try:
        stock = DynamicCache(config=model.config.get_text_config(decoder=True))
        expected = model.generate(**inputs, **cache_argument(model, stock))
        other = {**inputs, "input_ids": torch.where(mask.bool(), tokens, 5)}
        stock = DynamicCache(config=model.config.get_text_config(decoder=True))
        if not torch.equal(model.generate(**other, **cache_argument(model, stock))[:, 24:], expected[:, 24:]):
            inputs |= {"attention_mask": torch.ones_like(mask)}  # it attends to pads by itself
            stock = DynamicCache(config=model.config.get_text_config(decoder=True))
            expected = model.generate(**inputs, **cache_argument(model, stock))
    except Exception as error:
        return Verdict(UNTESTED, f"its own generate fails: {_short(error)}")
    if made is not None:
        return Verdict(FAULT, f"when made: {_short(made)}")
    try:
        batches = [torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
        try:
            projections = calibrate(model, batches, progress=False)
        except NoGradientError:  # as its message says
            projections = calibrate(model, batches, sensitivity="query", progress=False)
    except NotImplementedError as error:
        return Verdict(REFUSED, _short(error))
    except Exception as error:
        return Verdict(FAULT, f"{type(error).__name__}: {_short(error)}")
    sizes = {"residual_length": 4, "num_sink_tokens": 2, "block_size": 3}
    try:
        cache = LowRankCache(model, projections, compression_ratio=1, latent_dtype=None, **sizes)
        found = model.generate(**inputs, **cache_argument(model, cache))
    except (NotImplementedError, ValueError) as error:  # before a wrong token
        return Verdict(LATE, _short(error))
    except Exception as error:
        return Verdict(FAULT, f"{type(error).__name__}: {_short(error)}")
    if not torch.equal(found, expected):
        return Verdict(FAULT, "other tokens")
    return Verdict(WORKS)


class _TooLong(BaseException):
    """A class takes more than its time."""


def _judge_in_time(name: str) -> Verdict:
    def end(signum: int, frame: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        return judge(name)
    except _TooLong:
        return Verdict(UNTESTED, f"no tiny configuration: it takes more than {SECONDS} s")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:160] + ("…" if len(text) > 160 else "")


def _general(reason: str) -> str:
    """A reason without what differs from class to class."""
    reason = re.sub(r"^\w+(:| )", "", reason).strip()
    return re.sub(r"\d+", "…", reason.split(";")[0])


def _table(verdicts: dict[str, Verdict]) -> str:
    """Markdown: the classes by what became of them."""
    by_reason: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, verdict in verdicts.items():
        by_reason[verdict.kind, _general(verdict.reason) if verdict.kind == REFUSED else ""].append(name)
    lines = [f"With transformers {transformers.__version__}.\n", "| | classes | which |", "| --- | --- | --- |"]
    order = [WORKS, REFUSED, LATE, UNTESTED, FAULT]
    for (kind, reason), names in sorted(by_reason.items(), key=lambda item: (order.index(item[0][0]), -len(item[1]))):
        what = f"{kind}: {reason}" if reason else kind
        lines.append(f"| {what.replace('|', '/')} | {len(names)} | {', '.join(names)} |")
    return "\n".join(lines)


def _chosen(given: argparse.Namespace) -> Iterator[str]:
    names = [name for name in classes() if not given.only or any(name.startswith(part) for part in given.only)]
    yield from names if given.sample is None else sorted(random.Random(given.seed).sample(names, given.sample))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int, help="How many classes, chosen by --seed; all unless given.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="Beginnings of names.")
    parser.add_argument("--write", action="store_true", help="Update the table in docs/models.md.")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    verdicts = {}
    for name in _chosen(given):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdicts[name] = _judge_in_time(name)
        print(f"{verdicts[name].kind:10} {name} {verdicts[name].reason}", flush=True)
    if given.write:
        write_section("models.md", "classes", _table(verdicts))
    unknown = [name for name in classes() if not re.search(rf"\b{name}\b", read_section("models.md", "classes"))]
    if unknown:
        print(f"transformers {transformers.__version__} has classes that docs/models.md does not name: {unknown}")
    return int(bool(unknown) or any(verdict.kind == FAULT for verdict in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
