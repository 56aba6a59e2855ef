"""Named choices of ``calibrate``'s options: what is smallest and what is fastest are not the same bases."""

from typing import Any

__all__ = ["PRESETS"]

# smallest: one latent for the keys and values of several layers, keys before rotation. Every layer reads the
# whole latent, and keys are rebuilt to be rotated, so decoding is slow.
# fastest: one latent a layer, keys in frames of 64 tokens, so that queries are absorbed once a frame. Measured in
# docs/quality.md and docs/speed.md.
PRESETS: dict[str, dict[str, Any]] = {
    "smallest": {"layer_group_size": "auto", "frame_length": 1},
    "fastest": {"layer_group_size": 1, "frame_length": 64},
}
