"""Projections truncated to a ratio: the same cache, in less memory."""

SIZES = {"residual_length": 4, "num_sink_tokens": 2, "block_size": 4}
