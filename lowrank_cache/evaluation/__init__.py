"""Measure caches on text: perplexity, recall, bytes; and the demo."""
