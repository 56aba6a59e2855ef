"""What a 3-bit tier would gain on paper."""

import numpy as np

from tests.experiments import load
from tests.oracle.models import full_rank_projections

three_bits = load("three_bits")


def test_a_further_tier_gains_a_little_and_never_loses():
    loss = np.exp(-np.arange(64) / 8.0)
    gains = [three_bits.three_bit_gain(loss, bits) for bits in (40.0, 80.0, 160.0)]
    assert all(0 <= gain < 0.3 for gain in gains) and max(gains) > 0


def test_command(tmp_path, capsys):
    full_rank_projections("llama").save_pretrained(tmp_path)
    three_bits.main(str(tmp_path), 4.0)
    assert "A 3-bit tier would lower the predicted loss by" in capsys.readouterr().out
