"""Write docs/limits.md's table of supported models from the tests: ``python -m tests.tools.support_table``."""

from collections import Counter

from transformers import PreTrainedModel

from lowrank_cache import latent_attention
from lowrank_cache.attention import attended_layers
from lowrank_cache.probe import decoder_of, model_shape
from lowrank_cache.shapes import LayerShape, ModelShape, RopeShape
from tests.cache.test_generation import MODES, MORE_MODES, stock_refusals
from tests.oracle.models import FAMILIES, MORE_FAMILIES, REFUSED, tiny_model
from tests.tools.docs_sections import write_section

__all__ = ["support_section"]

_HEAD = """\
## Supported models

`python -m tests.tools.support_table` writes this section from the tests; one of them fails when it is not up to date.
The models are tiny random ones of each family, so the tables speak of structure and not of quality.

With full-rank projections, tokens equal those of `DynamicCache` and logits agree to rounding
(`tests/cache/test_generation.py`). For the first table, encoded keys are proven to be the keys before the model's
rotary function (`tests/cache/test_probe.py`). "Attend to latents" counts the compressed layers that
[do so](cache_contract.md#attending-to-latents) in the same modes (`tests/cache/test_attention.py`). The others are
reconstructed.
"""

_FOOT = """\
transformers refuses the refused modes with `DynamicCache` in the same words. Phi3's own `generate` drops whatever cache
it was given when a sequence with longrope grows past `original_max_position_embeddings`, and continues with a
`DynamicCache`: from there on nothing is compressed.
"""


_COLUMNS = [
    "family",
    "model class",
    "compressed",
    "kept as they are",
    "rotation of what is compressed",
    "attend to latents",
]


def support_section() -> str:
    """The section, as Markdown."""
    first = _table(
        [*_COLUMNS, "refused modes"],
        [[*_structure(family), _refused_modes(family, list(MODES))] for family in FAMILIES],
    )
    second = _table(
        _COLUMNS,
        [_structure(family) for family in MORE_FAMILIES],
    )
    refused = _table(
        ["model", "what `LowRankCache(model, ...)` and `calibrate(model, ...)` raise"],
        [[family, f"`NotImplementedError`: {refusal_of(tiny_model(family))}"] for family in REFUSED],
    )
    return "\n".join(
        [
            _HEAD,
            f"Tested in {len(MODES)} modes: {_names(list(MODES))}.\n",
            first,
            _FOOT,
            f"Tested in {len(MORE_MODES)} modes: {_names(MORE_MODES)}.\n",
            second,
            "### Refused\n",
            "A model that cannot be compressed is refused when the cache is made, never later.\n",
            refused.rstrip("\n"),
        ]
    )


def refusal_of(model: PreTrainedModel) -> str:
    """The message with which a model is refused; fails if it is not."""
    try:
        model_shape(model)
    except NotImplementedError as error:
        return str(error)
    raise AssertionError(f"{type(model).__name__} is not refused")


def _structure(family: str) -> list[str]:
    model = tiny_model(family)
    shape = model_shape(model)
    compressed = {layer.layer_idx for layer in shape.layers}
    kept = Counter(kind for index, kind in enumerate(shape.layer_types) if index not in compressed)
    return [
        family,
        f"`{type(model).__name__}`",
        f"{len(compressed)} of {len(shape.layer_types)} layers{_latent_note(shape)}",
        ", ".join(f"{count} {kind.removesuffix('_attention')}" for kind, count in sorted(kept.items())) or "–",
        _rotation(model, shape),
        _attending(model),
    ]


def _attending(model: PreTrainedModel) -> str:
    """How many of the compressed layers attend to latents."""
    try:
        with latent_attention(model):
            layers = attended_layers(decoder_of(model))
    except NotImplementedError:
        return "none"
    compressed = len(model_shape(model).layers)
    return "all" if len(layers) == compressed else f"{len(layers)} of {compressed}"


def _latent_note(shape: ModelShape) -> str:
    return " (MLA latents and rotary keys)" if any(layer.value.rope for layer in shape.layers) else ""


def _rotation(model: PreTrainedModel, shape: ModelShape) -> str:
    texts = Counter(_layer_rotation(layer) for layer in shape.layers)
    parameters = getattr(model.config, "rope_parameters", None) or {}
    kinds = {parameters.get("rope_type", "default")} - {"default"}
    suffix = f"; {kinds.pop()}" if kinds else ""
    if len(texts) == 1:
        return next(iter(texts)) + suffix
    return ", ".join(f"{text} in {count} of {len(shape.layers)}" for text, count in texts.items()) + suffix


def _layer_rotation(layer: LayerShape) -> str:
    for side in (layer.key, layer.value):
        if isinstance(side.rope, RopeShape):
            part = (
                "" if side.rope.rotary_dim == side.head_dim else f", {side.rope.rotary_dim} of {side.head_dim} numbers"
            )
            return side.rope.layout + part
    return "none (NoPE)"


def _refused_modes(family: str, modes: list[str]) -> str:
    return _names(stock_refusals(family, modes)) or "–"


def _names(modes: list[str]) -> str:
    return ", ".join(mode.replace("_", " ") for mode in modes)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    write_section("limits.md", "support", support_section())
