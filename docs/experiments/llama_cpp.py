"""Milliseconds a token for every 1,000 cached tokens: llama.cpp beside the caches that ``lowrank-cache bench`` timed.

llama.cpp's kernels for weights differ from torch's, so times are not compared but slopes: what a longer cache adds. It
is run through the package xllamacpp, on the CPU, with flash attention.
"""

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from lowrank_cache.evaluation.report import Table


def slope(milliseconds: dict[int, float]) -> float:
    """Of the line between the shortest and the longest context, by 1,000 tokens."""
    short, long = min(milliseconds), max(milliseconds)
    return (milliseconds[long] - milliseconds[short]) / (long - short) * 1000


def slopes_table(found: dict[str, dict[int, float]]) -> Table:
    head = ["cache", "ms a token, shorter context", "longer context", "ms a token for 1,000 more"]
    lines = [
        [name, *(f"{times[at]:.1f} at {at:,}" for at in (min(times), max(times))), f"{slope(times):.1f}"]
        for name, times in found.items()
    ]
    return Table(head, lines)


def timed_by_bench(folder: Path, contexts: list[int]) -> dict[str, dict[int, float]]:
    """Milliseconds a decoded token by cache and context, of one row, from the folder of ``lowrank-cache bench``."""
    found: dict[str, dict[int, float]] = {}
    for line in (folder / "bench.jsonl").read_text(encoding="utf-8").splitlines()[1:]:
        entry = json.loads(line)
        if entry["batch"] == 1 and entry["context"] in contexts:
            times = found.setdefault(entry["name"], {})
            times[entry["context"]] = 1000 * statistics.median(entry["step_seconds"])
    return {name: times for name, times in found.items() if len(times) > 1}


def llama_cpp(gguf: Path, text: str, contexts: list[int], kind: str, threads: int) -> dict[int, float]:
    """Milliseconds a decoded token by context, with keys and values of ``kind`` (``"f16"``, ``"q8_0"``, ``"q4_0"``)."""
    import xllamacpp as llama

    params: Any = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(gguf), max(contexts) + 256, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = getattr(llama.ggml_type, f"GGML_TYPE_{kind.upper()}")
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.warmup, params.verbosity = False, 0
    server, found = llama.Server(params), {}
    for context in contexts:
        asked = {"prompt": text[: 4 * context], "n_predict": 24, "temperature": 0.0, "ignore_eos": True}
        timings = server.handle_completions(asked)["timings"]
        found[timings["prompt_n"] + timings.get("cache_n", 0)] = timings["predicted_per_token_ms"]
    return found


def main(
    bench: Annotated[Path, typer.Argument(help="Folder that 'lowrank-cache bench' wrote, on this machine.")],
    gguf: Annotated[Path, typer.Argument(help="The same model as a GGUF file.")],
    text: Annotated[Path, typer.Argument(help="UTF-8 text of the prompts.")],
    contexts: Annotated[str, typer.Option(help="Cached tokens, about, separated by commas.")] = "1024,4096",
    kinds: Annotated[str, typer.Option(help="Types of llama.cpp's keys and values.")] = "f16,q8_0,q4_0",
    threads: Annotated[int, typer.Option(help="Threads of llama.cpp; those of the bench for a fair line.")] = 1,
) -> None:
    """Print what a longer cache adds to a token's time, for every cache."""
    lengths, prose = [int(part) for part in contexts.split(",")], text.read_text(encoding="utf-8")
    found = timed_by_bench(bench, lengths)
    for kind in kinds.split(","):
        found[f"llama.cpp, {kind}"] = llama_cpp(gguf, prose, lengths, kind, threads)
        typer.echo(f"{kind}: {found[f'llama.cpp, {kind}']}")
    typer.echo(slopes_table(found).markdown())


if __name__ == "__main__":
    typer.run(main)
