"""Tests of lowrank_cache; shared parts in ``models`` and ``tolerance``."""
