"""How tiers become arguments of kernels, and how kernels number their channels."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels under test need triton")
import triton
import triton.language as tl

from lowrank_cache.kernels.packed import BIT_WIDTHS
from lowrank_cache.kernels.triton_tiers import COLUMNS, channel_of, plain, tier_arguments, unspecialised
from tests.oracle.latent_sides import make_tiers, on_device


@triton.jit
def _channels(out, tiers, CHUNK: tl.constexpr):
    position = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    tl.store(out + position, channel_of(position, tiers, CHUNK))


@triton.jit
def _plain(out, numbers):
    for index in tl.static_range(len(numbers)):
        tl.store(out + index, plain(numbers[index]))


@pytest.mark.parametrize(
    "channels", [{4: 40}, {16: 3, 8: 21, 4: 40, 2: 150}, {2: 30, 16: 5, 8: 20}, {8: 300, 2: 1}], ids=str
)
def test_every_channel_has_one_position(channels):
    arguments = tier_arguments(on_device(make_tiers(channels, 1, 2)))
    positions = torch.empty(
        arguments.position_blocks * COLUMNS, dtype=torch.int32, device=arguments.tiers[0].codes.device
    )
    _channels[(arguments.position_blocks,)](positions, arguments.tiers, CHUNK=COLUMNS)
    found = positions[positions >= 0].sort().values.tolist()
    assert found == list(range(sum(channels.values())))


def test_kernels_are_given_no_integer_that_triton_specialises_on():
    numbers = [0, 1, 2, 15, 16, 2**20, 2**30 - 2]
    given = tuple(map(unspecialised, numbers))
    assert all(number != 1 and number % 16 and number < 2**31 for number in given)
    back = on_device(torch.empty(len(numbers), dtype=torch.int32))
    _plain[(1,)](back, given)
    assert back.tolist() == numbers
    for tier in tier_arguments(make_tiers({16: 8, 8: 16, 4: 32}, 1, 1)).tiers:
        integers = [number for number in tier if type(number) is int]
        assert len(integers) == 7 and all(number != 1 and number % 16 for number in integers)


def test_absent_tiers_have_rows_of_no_length():
    tiers = tier_arguments(make_tiers({8: 20}, 2, 3)).tiers
    assert [tier.bits.value for tier in tiers] == list(BIT_WIDTHS)
    assert [tier.row for tier in tiers] == [unspecialised(row) for row in (0, 2, 0, 0)]


def test_refuses_no_tiers():
    with pytest.raises(ValueError, match="tiers must hold at least one tier, got none"):
        tier_arguments(())
