"""The demo: calibrate on a real model, then generate with the full cache and with compressed ones, side by side."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import BatchEncoding, Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lowrank_cache import LowRankCache, Projections, latent_attention
from lowrank_cache.cache_argument import cache_argument
from lowrank_cache.calibration import PRESETS, calibrate
from lowrank_cache.calibration.api import projections_from_moments
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.calibration.recall import mixed_batches
from lowrank_cache.evaluation.baselines import tensor_bytes
from lowrank_cache.evaluation.model_source import demo_model
from lowrank_cache.evaluation.text_source import load_text

__all__ = ["DemoRun", "DemoSettings", "generate_timed", "run_demo"]

QUESTION = "Summarize the text above in three sentences."
_HELD_OUT = 0.2  # the last part of the text, which calibration does not see


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo.

    Attributes:
        compression_ratio: Target per token in latents.
        calibration_tokens: Rounded down to whole windows.
        window: Tokens per calibration sequence.
        prompt_tokens: Tokens of text in the prompt, the question apart.
        new_tokens: Most tokens to generate.
    """

    compression_ratio: float = 8.0
    calibration_tokens: int = 4096
    window: int = 512
    prompt_tokens: int = 1800
    new_tokens: int = 64


@dataclass(frozen=True)
class DemoRun:
    """What one ``generate`` produced and cost.

    Attributes:
        token_ids: ``[new_tokens]``.
        prefill_seconds: Until the first new token.
        decode_seconds: From the first new token to the last.
    """

    token_ids: Tensor
    prefill_seconds: float
    decode_seconds: float

    @property
    def seconds_per_token(self) -> float:
        """Mean time of a decoded token; the first one is part of the prefill."""
        return self.decode_seconds / max(len(self.token_ids) - 1, 1)


class _Clock(BaseStreamer):
    """Notes when ``generate`` hands over the prompt and each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


def generate_timed(model: PreTrainedModel, inputs: BatchEncoding, cache: Cache, new_tokens: int) -> DemoRun:
    """Generate greedily, with the time to the first token apart from the rest."""
    clock = _Clock()
    prompt_length = inputs["input_ids"].shape[1]
    start = time.perf_counter()
    output = model.generate(  # type: ignore[operator]  # nn.Module.__getattr__ stands before it
        **inputs,
        **cache_argument(model, cache),
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
    )
    first, last = clock.times[1], clock.times[-1]  # the first call of `put` brings the prompt
    return DemoRun(output[0, prompt_length:], first - start, last - first)


def run_demo(
    out: str | Path,
    data: str | Path | None = None,
    settings: DemoSettings | None = None,
    console: Console | None = None,
) -> None:
    """Get the model, calibrate, save projections to ``out``, generate twice, and print a comparison.

    Args:
        out: Folder for the projections.
        data: Text file to calibrate on and to prompt with, instead of the source ``load_text`` finds.
        settings: Sizes; None for the defaults.
        console: Where to print; None for standard output.

    Raises:
        ValueError: If the text is too short.
        DownloadError: If the model cannot be had.
    """
    settings, console = settings or DemoSettings(), console or Console()
    model, tokenizer, model_name = demo_model(console.print)
    text, text_name = load_text(data)
    console.print(f"Model: {model_name}\nText:  {text_name}")
    cut = round(len(text) * (1 - _HELD_OUT))
    presets = _calibrated(model, tokenizer, text[:cut], text_name, settings, console)
    inputs = _prompt(tokenizer, text[cut:], settings.prompt_tokens)
    full_cache = DynamicCache(config=model.config)
    console.print(f"Generating with the full cache: a prompt of {inputs['input_ids'].shape[1]} tokens.")
    runs = [generate_timed(model, inputs, full_cache, settings.new_tokens)]
    caches = []
    for name, projections in presets.items():
        projections.save_pretrained(Path(out) / name)
        # Loaded for this ratio only, as a deployment would: what other ratios need takes no memory.
        loaded = Projections.from_pretrained(Path(out) / name, compression_ratio=settings.compression_ratio)
        caches.append(LowRankCache(model, loaded, compression_ratio=settings.compression_ratio))
        console.print(f"Generating with the {name} low-rank cache.")
        with latent_attention(model):
            runs.append(generate_timed(model, inputs, caches[-1], settings.new_tokens))
    console.print(_comparison(tokenizer, runs, full_cache, caches, list(presets)))
    _remarks(console, runs, list(presets), full_cache)
    console.print(f"The projections are in {Path(out).resolve()}; see 'lowrank-cache inspect {out}/smallest'.")


def _calibrated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    text_name: str,
    settings: DemoSettings,
    console: Console,
) -> dict[str, Projections]:
    """Projections of every preset, from one pass over the text."""
    console.print(f"Calibrating on up to {settings.calibration_tokens} tokens.")
    # Only what is used is tokenized; 12 characters a token is more than any prose has.
    prose = text[: 12 * settings.calibration_tokens]
    batches = mixed_batches(tokenizer, prose, tokens=settings.calibration_tokens, window=settings.window)
    facts = {"text": text_name}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "moments.safetensors"
        smallest = calibrate(model, batches, save_moments=path, provenance=facts, **PRESETS["smallest"])
        moments = Moments.load(path)
        fastest = projections_from_moments(moments, provenance=smallest.provenance, **PRESETS["fastest"])
    return {"smallest": smallest, "fastest": fastest}


def _prompt(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> BatchEncoding:
    token_ids = tokenizer(text[: 12 * tokens])["input_ids"][:tokens]
    message = f"{tokenizer.decode(token_ids)}\n\n{QUESTION}"
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return cast(BatchEncoding, inputs)


def _comparison(
    tokenizer: PreTrainedTokenizerBase,
    runs: list[DemoRun],
    full_cache: DynamicCache,
    caches: list[LowRankCache],
    names: list[str],
) -> Table:
    """One column for the full cache and one for each of ``caches``."""
    occupied = tensor_bytes(full_cache)
    texts = tokenizer.batch_decode([run.token_ids.tolist() for run in runs], skip_special_tokens=True)
    rows = [
        ("text", [text.strip() for text in texts]),
        ("tokens in the cache", [f"{cache.get_seq_length():,}" for cache in (full_cache, *caches)]),
        ("bytes at 16 bits a number", [f"{caches[0].full_bytes():,}"]),
        ("bytes of its tensors", [f"{size:,}" for size in (occupied, *(cache.stored_bytes() for cache in caches))]),
        ("ratio to 16 bits", ["", *(f"{cache.compression_ratio():.2f}x" for cache in caches)]),
        (
            "ratio to the full cache's tensors",
            ["", *(f"{occupied / cache.stored_bytes():.2f}x" for cache in caches)],
        ),
        ("target ratio in latents", ["", *(f"{cache.target_compression_ratio:.2f}x" for cache in caches)]),
        ("bytes of the bases", ["", *(f"{cache.projection_bytes():,}" for cache in caches)]),
        ("prefill, first token included", [f"{run.prefill_seconds:.2f} s" for run in runs]),
        ("decode, per token", [f"{1000 * run.seconds_per_token:.0f} ms" for run in runs]),
    ]
    table = Table(show_lines=True)
    table.add_column("")
    for name in ("full cache", *(f"low-rank, {name}" for name in names)):
        table.add_column(name, ratio=1)
    for label, cells in rows:
        table.add_row(label, *cells)
    return table


def _remarks(console: Console, runs: list[DemoRun], names: list[str], full_cache: DynamicCache) -> None:
    keys, *_ = next(iter(full_cache))
    console.print(
        "The ratio of a short context stays below the target: sink tokens and the window of recent tokens are kept "
        f"exactly, in the model's own {str(keys.dtype).removeprefix('torch.')}."
    )
    full = runs[0]
    for name, run in zip(names, runs[1:], strict=True):
        length = min(len(full.token_ids), len(run.token_ids))
        same = int((full.token_ids[:length] == run.token_ids[:length]).long().cumprod(0).sum())
        times = run.seconds_per_token / full.seconds_per_token
        speed = f"{times:.1f} times as long" if times > 1 else f"{1 / times:.1f} times less time"
        console.print(
            f"{name}: the first {same} of {length} generated tokens are those of the full cache; decoding took {speed}."
        )
