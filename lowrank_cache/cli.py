"""The ``lowrank-cache`` command and its sub-commands.

Arguments and messages only; what the commands do lives in ``evaluation`` and ``calibration``.
"""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lowrank_cache import LowRankCache, Projections, calibration
from lowrank_cache.calibration.moments import Moments, NoGradientError
from lowrank_cache.calibration.recall import mixed_batches
from lowrank_cache.evaluation.bench import BenchSettings
from lowrank_cache.evaluation.bench_run import bench as run_bench
from lowrank_cache.evaluation.demo import DemoSettings, run_demo
from lowrank_cache.evaluation.evaluate import EvaluationSettings
from lowrank_cache.evaluation.evaluate_run import run_evaluation
from lowrank_cache.evaluation.inspection import inspect_projections
from lowrank_cache.evaluation.loading import check_dtype, in_dtype, load_model
from lowrank_cache.evaluation.model_source import DownloadError
from lowrank_cache.evaluation.papers import check_papers
from lowrank_cache.evaluation.plots import plot_projections
from lowrank_cache.evaluation.prefill import prefill_peak
from lowrank_cache.evaluation.quality import QualitySettings
from lowrank_cache.evaluation.quality_run import run_quality
from lowrank_cache.evaluation.roofline_run import run_roofline
from lowrank_cache.evaluation.ruler import TASKS
from lowrank_cache.evaluation.run_inputs import QualityRun
from lowrank_cache.evaluation.text_source import load_text

__all__ = ["app"]

app = typer.Typer(
    help="A KV cache of quantized low-rank latents for Hugging Face transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

TEXTS = (
    "a UTF-8 file, dataset:NAME[,config=C][,split=S][,column=T], python-sources or messages:LANGUAGE; by default "
    "WikiText-2, or Python's own documentation where the hub does not answer or datasets is not installed."
)
CACHES = (
    "a baseline or METHOD:RATIO[,groups=G][,frame=L][,joint=0|1][,bits=B][,ranks=R], with xkv also [,new=encode|exact]."
)
CalibrateOn = Annotated[str | None, typer.Option(help=f"Text to calibrate on: {TEXTS}")]
EvaluateOn = Annotated[str | None, typer.Option(help=f"Text to evaluate on: {TEXTS}")]


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    """Print what is wrong with an input or the machine as one message; let a bug keep its traceback."""
    try:
        yield
    except (ValueError, NotImplementedError, ImportError, OSError, DownloadError, NoGradientError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def env() -> None:
    """Print the versions that a bug report should name."""
    typer.echo(f"Python {platform.python_version()}, {platform.platform()}, {platform.machine()}")
    for name in ENVIRONMENT:
        try:
            typer.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name} is not installed")
    accelerators = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    typer.echo(f"accelerators: {', '.join(accelerators) or 'none'}; {torch.get_num_threads()} threads")


ENVIRONMENT = [
    "lowrank-cache",
    "torch",
    "transformers",
    "triton",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "bitsandbytes",
    "numpy",
]


@app.command()
def demo(
    data: CalibrateOn = None,
    out: Annotated[Path, typer.Option(help="Folder for the projections.")] = Path("artefacts/demo"),
    ratio: Annotated[float, typer.Option(help="Target compression ratio per token in latents.")] = 8.0,
) -> None:
    """Calibrate a small real model, then generate with its full cache and with both presets."""
    with _errors_as_messages():
        run_demo(out, data, DemoSettings(compression_ratio=ratio))


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Name on the hub, or folder, of a decoder-only model.")],
    out: Annotated[Path, typer.Option(help="Folder for the projections.")],
    data: CalibrateOn = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens, rounded down to whole windows.")] = 20_000,
    window: Annotated[int, typer.Option(help="Tokens per calibration sequence.")] = 512,
    recall_share: Annotated[float, typer.Option(help="Fraction of sequences that are generated look-ups.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the generated look-ups.")] = 0,
    method: Annotated[str | None, typer.Option(help="How bases are found: fisher (default), palu or recalkv.")] = None,
    preset: Annotated[
        str, typer.Option(help="'smallest' or 'fastest': the defaults of the three options that follow.")
    ] = "smallest",
    frame_length: Annotated[int | None, typer.Option(help="Tokens per rotary frame; 1 stores pre-RoPE keys.")] = None,
    layer_group_size: Annotated[
        str | None, typer.Option(help="Adjacent layers that share a latent: a number, KEYS,VALUES, or auto.")
    ] = None,
    joint: Annotated[
        bool | None, typer.Option(help="Whether keys and values share a latent; fisher's do unless the preset says no.")
    ] = None,
    refit_ratio: Annotated[
        float | None, typer.Option(help="Ratio at 16 bits for which recalkv calibrates values; 3 by default.")
    ] = None,
    save_moments: Annotated[
        Path | None, typer.Option(help="File for the statistics, which quality, bench, eval and roofline can read.")
    ] = None,
    sensitivity: Annotated[
        str, typer.Option(help="gradient, or query where gradients do not pass through the model.")
    ] = "gradient",
    dtype: Annotated[str, typer.Option(help="Dtype of the model: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Torch device; the GPU if there is one.")] = None,
) -> None:
    """Calibrate projections for MODEL on text and save them."""
    with _errors_as_messages():
        given: dict[str, Any] = {
            "method": method,
            "frame_length": frame_length,
            "layer_group_size": _group_size(layer_group_size),
            "joint": joint,
            "refit_ratio": refit_ratio,
            "save_moments": save_moments,
        }
        check_dtype(dtype, auto=True)
        if preset not in calibration.PRESETS:
            raise ValueError(f"preset must be one of {sorted(calibration.PRESETS)}, got {preset!r}")
        chosen = {name: value for name, value in given.items() if value is not None}
        options = {**calibration.PRESETS[preset], **chosen}
        text, source = load_text(data)
        typer.echo(f"Text: {source}")
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        mixed = mixed_batches(tokenizer, text, tokens=tokens, window=window, recall_share=recall_share, seed=seed)
        batches = list(mixed)  # recalkv reads them twice
        facts = {"text": source, "recall_share": recall_share, "seed": seed}
        start = time.perf_counter()
        projections = calibration.calibrate(loaded, batches, sensitivity=sensitivity, provenance=facts, **options)
        seconds = time.perf_counter() - start
        projections.save_pretrained(out)
        typer.echo(f"Calibrated in {seconds:.0f} s on {torch.get_num_threads()} threads.")
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


def _needles(given: list[str]) -> tuple[tuple[int, int], ...]:
    """``["1024:16", "4096:8"]`` → ((1024, 16), (4096, 8))."""
    pairs = [text.partition(":") for text in given]
    if not all(tokens.isdigit() and count.isdigit() for tokens, _, count in pairs):
        raise ValueError(f"needles must be TOKENS:QUESTIONS, e.g. 1024:16, got {given}")
    return tuple((int(tokens), int(count)) for tokens, _, count in pairs)


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
def prefill(
    projections: Annotated[str, typer.Argument(help="Folder or hub repository of projections.")],
    model: Annotated[str | None, typer.Option(help="Name or folder of a model; SmolLM2-135M by default.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 4096,
    ratio: Annotated[float, typer.Option(help="Target compression ratio per token in latents.")] = 8.0,
    dtype: Annotated[str, typer.Option(help="Dtype of the model: float32, bfloat16, float16.")] = "bfloat16",
) -> None:
    """Show what a prefill keeps alive in memory with the full cache and with a compressed one, on a CPU."""
    with _errors_as_messages():
        check_dtype(dtype)
        loaded, _, name = load_model(model, typer.echo)
        loaded = in_dtype(loaded.eval(), dtype)
        bases = Projections.from_pretrained(projections, compression_ratio=ratio)
        prompt = torch.randint(loaded.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
        typer.echo(f"{name} in {dtype}, a prompt of {tokens} tokens, {ratio:g}x")
        makers = {
            "full": lambda: DynamicCache(config=loaded.config),
            "low-rank": lambda: LowRankCache(loaded, bases, compression_ratio=ratio),
        }
        for kind, make_cache in makers.items():
            peak = prefill_peak(loaded, make_cache(), prompt)
            typer.echo(
                f"{kind} cache: dense keys and values alive at most {peak.dense / 1e6:.1f} MB, allocated at most "
                f"{peak.allocated / 1e6:.1f} MB, left {peak.left / 1e6:.1f} MB"
            )


@app.command()
def quality(
    out: Annotated[Path, typer.Option(help="Folder for moments, results, table and plot; rerunning resumes.")],
    cache: Annotated[
        list[str],
        typer.Option(help=f"A row, repeatable: {CACHES}"),
    ],
    model: Annotated[str | None, typer.Option(help="Name or folder of a model; SmolLM2-135M by default.")] = None,
    calibrate_on: CalibrateOn = None,
    evaluate_on: EvaluateOn = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 40_960,
    recall_share: Annotated[float, typer.Option(help="Fraction of calibration sequences that are look-ups.")] = 0.5,
    sensitivity: Annotated[str, typer.Option(help="gradient or query.")] = "gradient",
    moments: Annotated[Path | None, typer.Option(help="Statistics of an earlier run, not to calibrate again.")] = None,
    windows: Annotated[int, typer.Option(help="Evaluation windows, evenly spaced.")] = 16,
    window: Annotated[int, typer.Option(help="Tokens per evaluation window.")] = 1024,
    prompt: Annotated[
        int, typer.Option(help="Tokens of windows and look-ups that come in one first forward and are not scored.")
    ] = 0,
    chunk: Annotated[int, typer.Option(help="Tokens per forward of windows and look-ups.")] = 32,
    lookups: Annotated[int, typer.Option(help="Questions about key–value lists of 22 entries, 4 a list.")] = 64,
    needles: Annotated[
        list[str] | None, typer.Option(help="TOKENS:QUESTIONS about facts hidden in prose, 4 a text; repeatable.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Dtype in which the caches are measured: float32, bfloat16, float16.")
    ] = "bfloat16",
    key_bias: Annotated[float, typer.Option(help="Rebuild the model with this constant bias on its keys.")] = 0.0,
) -> None:
    """Measure perplexity and recall of many caches on one model, in one run, as a table and a plot."""
    with _errors_as_messages():
        settings = QualitySettings(
            windows=windows,
            window=window,
            prompt=prompt,
            chunk=chunk,
            lookups=lookups,
            needles=_needles(needles or []),
        )
        check_dtype(dtype)
        run = QualityRun(model, calibrate_on, evaluate_on, moments, tokens, recall_share, sensitivity, dtype, key_bias)
        run_quality(out, cache, run, settings, typer.echo)


@app.command(name="eval")
def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Name on the hub, or folder, of a decoder-only model; SmolLM2-135M by default.")
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(help=f"A cache to measure, repeatable: {CACHES}"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report; rerunning resumes.")] = Path("artefacts/eval"),
    projections: Annotated[
        list[str] | None,
        typer.Option(help="Ready projections, a folder or hub repository; one of a method, repeatable."),
    ] = None,
    text: EvaluateOn = None,
    calibrate_on: CalibrateOn = None,
    moments: Annotated[Path | None, typer.Option(help="Statistics of an earlier run, not to calibrate again.")] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 20_480,
    sensitivity: Annotated[str, typer.Option(help="gradient or query, of calibration.")] = "gradient",
    lengths: Annotated[str, typer.Option(help="Tokens of contexts, separated by commas.")] = "1024,2048,4096",
    tasks: Annotated[str, typer.Option(help="Long-context tasks, separated by commas.")] = ",".join(TASKS),
    samples: Annotated[int, typer.Option(help="Contexts of each task and length; 0 for none.")] = 16,
    windows: Annotated[int, typer.Option(help="Windows of text for the perplexity; 0 for none.")] = 16,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    chunk: Annotated[int, typer.Option(help="Tokens per forward.")] = 128,
    prompt: Annotated[int, typer.Option(help="Tokens of the first forward, which windows do not score.")] = 0,
    batch: Annotated[int, typer.Option(help="Windows per forward.")] = 4,
    residual_length: Annotated[int, typer.Option(help="Recent tokens that a cache keeps exactly.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the tasks.")] = 0,
    chat: Annotated[bool, typer.Option(help="Ask in the model's chat template.")] = False,
    attend: Annotated[bool, typer.Option(help="Attend to latents instead of rebuilding keys and values.")] = False,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the measurement: float32, bfloat16, float16; auto: the model's.")
    ] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="Torch device; the GPU if there is one.")] = None,
) -> None:
    """Evaluate caches on MODEL: perplexity, long-context tasks, bytes and times, in a report with intervals."""
    with _errors_as_messages():
        settings = EvaluationSettings(
            lengths=_numbers("lengths", lengths),
            tasks=tuple(task.strip() for task in tasks.split(",")),
            samples=samples,
            windows=windows,
            window=window,
            chunk=chunk,
            prompt=prompt,
            batch=batch,
            chat=chat,
            attend=attend,
            seed=seed,
            residual_length=residual_length,
        )
        check_dtype(dtype, auto=True)
        run = QualityRun(model, calibrate_on, text, moments, tokens, 0.5, sensitivity, dtype)
        caches = cache or ["full", "quantized-fp8", "fisher:8"]
        run_evaluation(out, caches, run, settings, typer.echo, projections=tuple(projections or ()), device=device)


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Folder for times, table, JSON and plot; rerunning resumes.")],
    cache: Annotated[
        list[str] | None,
        typer.Option(help="A row as for 'quality', repeatable; ',attend=0' at its end rebuilds keys and values."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name or folder of a model; SmolLM2-135M by default.")] = None,
    calibrate_on: CalibrateOn = None,
    evaluate_on: EvaluateOn = None,
    moments: Annotated[Path | None, typer.Option(help="Statistics of an earlier run, not to calibrate again.")] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 20_480,
    contexts: Annotated[str, typer.Option(help="Tokens in the cache, separated by commas.")] = "1024,4096,8192",
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,4",
    new_tokens: Annotated[int, typer.Option(help="Timed decode steps of each cache.")] = 24,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 1,
    dtype: Annotated[str, typer.Option(help="Dtype of the model: float32, bfloat16, float16.")] = "bfloat16",
    quick: Annotated[bool, typer.Option(help="1,024 tokens, batch 1, 8 steps.")] = False,
) -> None:
    """Time prefill and decoding of compressed caches against the full cache, and count their bytes."""
    with _errors_as_messages():
        settings = BenchSettings(
            contexts=(1024,) if quick else _numbers("contexts", contexts),
            batches=(1,) if quick else _numbers("batches", batches),
            new_tokens=8 if quick else new_tokens,
            threads=threads,
        )
        check_dtype(dtype)
        run = QualityRun(model, calibrate_on, evaluate_on, moments, tokens, 0.5, "gradient", dtype)
        run_bench(out, cache or BENCH_CACHES, run, settings, typer.echo)


BENCH_CACHES = ["full", "quantized-fp8", "fisher:8,groups=1,frame=64,joint=0", "fisher:10"]


def _numbers(name: str, given: str) -> tuple[int, ...]:
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} must be positive integers separated by commas, got {given!r}")
    return tuple(int(part) for part in parts)


@app.command()
def papers(
    out: Annotated[Path, typer.Option(help="Folder for the trained models and papers.md; rerunning keeps the models.")],
    text: Annotated[Path | None, typer.Option(help="Text to use instead of Python's own sources.")] = None,
    steps: Annotated[
        int, typer.Option(help="Training batches of the multi-head model; the MLA model gets half.")
    ] = 1200,
    windows: Annotated[int, typer.Option(help="Evaluation windows of 256 bytes.")] = 48,
) -> None:
    """Train two small models and check on them what ReCalKV, Palu and xKV say of their methods."""
    with _errors_as_messages():
        check_papers(out, text, steps=steps, windows=windows, report=typer.echo)


@app.command()
def roofline(
    moments: Annotated[
        Path, typer.Argument(help="Statistics that quality, bench, eval or calibrate --save-moments saved.")
    ],
    ratio: Annotated[float, typer.Option(help="Target compression ratio per token in latents.")] = 8.0,
    query_heads: Annotated[int, typer.Option(help="Query heads of the model of MOMENTS; SmolLM2-135M has 9.")] = 9,
) -> None:
    """Estimate on paper how fast GPUs attend over latents, with the channels that calibration gives."""
    with _errors_as_messages():
        run_roofline(Moments.load(moments), query_heads, ratio, typer.echo)
