"""The folder in which the docs' code blocks and notebooks run: ``python -m tests.tools.docs_workplace`` prepares it.

It holds what a reader of the tutorial has: ``my.txt``, ``my-projections`` and ``my-moments.safetensors``,
calibrated on few tokens to be quick. Where the hub does not answer, a hub cache made from the demo's model
stands in, so that the blocks load SmolLM2 by its name as a reader would.
"""

import os
from pathlib import Path

from lowrank_cache.artefact import user_cache
from lowrank_cache.calibration import calibrate
from lowrank_cache.calibration.text import bundled_text, mixed_batches
from lowrank_cache.evaluation.demo import FOLDER_NAME, HUB_MODEL, demo_model

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "docs"
WORKPLACE = BUILD / "workplace"
CALIBRATION_TOKENS = 4096


def prepare() -> None:
    """Write text, projections and moments, and the stand-in for the hub."""
    model, tokenizer, name = demo_model(print)
    _stand_in_for_hub(name)
    WORKPLACE.mkdir(parents=True, exist_ok=True)
    text = bundled_text()
    (WORKPLACE / "my.txt").write_text(text, encoding="utf-8")
    prose = text[: 12 * CALIBRATION_TOKENS]  # evaluation in the docs starts behind it
    batches = mixed_batches(tokenizer, prose, tokens=CALIBRATION_TOKENS)
    moments = WORKPLACE / "my-moments.safetensors"
    facts = {"text": "Python's own documentation"}
    calibrate(model, batches, save_moments=moments, provenance=facts).save_pretrained(WORKPLACE / "my-projections")
    (BUILD / "prepared").touch()


def environment() -> dict[str, str]:
    """Variables of a process that runs blocks or notebooks: one thread, no network, the stand-in for the hub."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    variables |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "COLUMNS": "120"}
    if (BUILD / "hub").exists():
        variables["HF_HOME"] = str(BUILD / "hub")
    return variables


def _stand_in_for_hub(name: str) -> None:
    """A hub cache whose one snapshot links to the demo's model, unless the model came from the hub."""
    if name.endswith("(hub)"):
        return
    repository = BUILD / "hub" / "hub" / f"models--{HUB_MODEL.replace('/', '--')}"
    snapshot = repository / "snapshots" / "local"
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text("local")
    for file in (user_cache() / FOLDER_NAME).iterdir():
        link = snapshot / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file)


if __name__ == "__main__":
    prepare()
