"""The ``lowrank-cache`` command: ``demo``, ``calibrate``, ``inspect``, ``quality``, ``roofline``.

Arguments and messages only; what the commands do lives in ``evaluation`` and ``calibration``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_cache import Projections, calibration
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.calibration.recall import mixed_batches
from lowrank_cache.evaluation.demo import DemoSettings, run_demo
from lowrank_cache.evaluation.inspection import inspect_projections
from lowrank_cache.evaluation.model_source import DownloadError
from lowrank_cache.evaluation.plots import plot_projections
from lowrank_cache.evaluation.quality import QualitySettings
from lowrank_cache.evaluation.quality_run import QualityRun, run_quality
from lowrank_cache.evaluation.roofline_run import run_roofline
from lowrank_cache.evaluation.text_source import load_text

__all__ = ["app"]

app = typer.Typer(
    help="A KV cache of quantized low-rank latents for Hugging Face transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

DataOption = Annotated[
    Path | None, typer.Option(help="UTF-8 text file to use instead of WikiText-2 or Python's own documentation.")
]


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    """Print what is wrong with an input or the machine as one message; let a bug keep its traceback."""
    try:
        yield
    except (ValueError, NotImplementedError, ImportError, OSError, DownloadError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def demo(
    data: DataOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the projections.")] = Path("artefacts/demo"),
    ratio: Annotated[float, typer.Option(help="Target compression ratio per token in latents.")] = 8.0,
) -> None:
    """Calibrate a small real model, then generate with its full cache and with the compressed one."""
    with _errors_as_messages():
        run_demo(out, data, DemoSettings(compression_ratio=ratio))


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Name on the hub, or folder, of a decoder-only model.")],
    out: Annotated[Path, typer.Option(help="Folder for the projections.")],
    data: DataOption = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens, rounded down to whole windows.")] = 20_000,
    window: Annotated[int, typer.Option(help="Tokens per calibration sequence.")] = 512,
    recall_share: Annotated[float, typer.Option(help="Fraction of sequences that are generated look-ups.")] = 0.5,
    method: Annotated[str | None, typer.Option(help="How bases are found; see docs/method.md.")] = None,
    frame_length: Annotated[int | None, typer.Option(help="Tokens per rotary frame; 1 stores pre-RoPE keys.")] = None,
    layer_group_size: Annotated[
        str | None, typer.Option(help="Adjacent layers that share a latent: a number, KEYS,VALUES, or auto.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the model: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Torch device; the GPU if there is one.")] = None,
) -> None:
    """Calibrate projections for MODEL on text and save them."""
    with _errors_as_messages():
        given: dict[str, Any] = {
            "method": method,
            "frame_length": frame_length,
            "layer_group_size": _group_size(layer_group_size),
        }
        options = {name: value for name, value in given.items() if value is not None}
        text, source = load_text(data)
        typer.echo(f"Text: {source}")
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        batches = mixed_batches(tokenizer, text, tokens=tokens, window=window, recall_share=recall_share)
        calibration.calibrate(loaded, batches, provenance={"text": source}, **options).save_pretrained(out)
        typer.echo(f"Saved to {out}. 'lowrank-cache inspect {out}' describes it.")


def _group_size(given: str | None) -> int | str | tuple[int, ...] | None:
    """``"5"`` → 5, ``"2,5"`` → (2, 5); other words are left to ``calibrate`` to judge."""
    if given is None:
        return None
    parts = given.split(",")
    if not all(part.strip().isdigit() for part in parts):
        return given
    sizes = tuple(int(part) for part in parts)
    return sizes[0] if len(sizes) == 1 else sizes


@app.command()
def inspect(
    projections: Annotated[str, typer.Argument(help="Folder or hub repository of projections.")],
    ratio: Annotated[float, typer.Option(help="Target compression ratio per token in latents.")] = 8.0,
    plot: Annotated[Path | None, typer.Option(help="PNG to draw bits per layer and predicted loss into.")] = None,
) -> None:
    """Show what PROJECTIONS store at a ratio: ranks and bits per layer, predicted loss, bytes."""
    with _errors_as_messages():
        if not Path(projections).is_dir() and projections.count("/") != 1:
            raise ValueError(f"PROJECTIONS must be a folder or a repository OWNER/NAME on the hub, got {projections!r}")
        loaded = Projections.from_pretrained(projections)
        inspection = inspect_projections(loaded, ratio)
        console = Console()
        console.print(f"{loaded.method}, frames of {loaded.frame_length}, for {loaded.shape.model_type}")
        console.print(inspection.table())
        console.print(inspection.summary())
        if plot is not None:
            plot_projections(loaded, ratio, plot)
            console.print(f"Drawn into {plot}")


@app.command()
def quality(
    out: Annotated[Path, typer.Option(help="Folder for moments, results, table and plot; rerunning resumes.")],
    cache: Annotated[
        list[str],
        typer.Option(
            help="A row, repeatable: a baseline or METHOD:RATIO[,groups=G][,frame=L][,joint=0|1][,bits=B][,ranks=R]."
        ),
    ],
    model: Annotated[str | None, typer.Option(help="Name or folder of a model; SmolLM2-135M by default.")] = None,
    calibrate_on: Annotated[Path | None, typer.Option(help="Text to calibrate on.")] = None,
    evaluate_on: Annotated[Path | None, typer.Option(help="Text to evaluate on; WikiText-2 test by default.")] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 40_960,
    recall_share: Annotated[float, typer.Option(help="Fraction of calibration sequences that are look-ups.")] = 0.5,
    sensitivity: Annotated[str, typer.Option(help="gradient or query.")] = "gradient",
    windows: Annotated[int, typer.Option(help="Evaluation windows, evenly spaced.")] = 16,
    window: Annotated[int, typer.Option(help="Tokens per evaluation window.")] = 1024,
    lookups: Annotated[int, typer.Option(help="Key–value look-ups among 22 entries.")] = 64,
    needles: Annotated[int, typer.Option(help="Needles in prose.")] = 0,
    needle_tokens: Annotated[int, typer.Option(help="Tokens of prose per needle.")] = 2048,
    dtype: Annotated[str, typer.Option(help="Dtype in which the caches are measured.")] = "bfloat16",
    key_bias: Annotated[float, typer.Option(help="Rebuild the model with this constant bias on its keys.")] = 0.0,
) -> None:
    """Measure perplexity and recall of many caches on one model, in one run, as a table and a plot."""
    with _errors_as_messages():
        settings = QualitySettings(
            windows=windows, window=window, lookups=lookups, needles=needles, needle_tokens=needle_tokens
        )
        run = QualityRun(model, calibrate_on, evaluate_on, tokens, recall_share, sensitivity, dtype, key_bias)
        run_quality(out, cache, run, settings, typer.echo)


@app.command()
def roofline(
    moments: Annotated[Path, typer.Argument(help="Statistics that calibrate or quality saved: moments.safetensors.")],
    ratio: Annotated[float, typer.Option(help="Target compression ratio per token in latents.")] = 8.0,
    query_heads: Annotated[int, typer.Option(help="Query heads of the model of MOMENTS; SmolLM2-135M has 9.")] = 9,
) -> None:
    """Estimate on paper how fast GPUs attend over latents, with the channels that calibration gives."""
    with _errors_as_messages():
        run_roofline(Moments.load(moments), query_heads, ratio, typer.echo)
