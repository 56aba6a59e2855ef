"""Moments: averages over rotary frames, groups inside groups, and the file."""

import itertools

import pytest
import torch
from safetensors.torch import save_file

from lowrank_cache.calibration import calibrate
from lowrank_cache.calibration.api import projections_from_moments
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.kernels.rope import angle_tables, rotate
from lowrank_cache.shapes import SIDES
from tests.calibration.test_collect import moments_of, padded_batches
from tests.oracle.models import tiny_model


@pytest.mark.parametrize("family, layout", [("llama", "half"), ("glm4", "interleaved")])
@pytest.mark.parametrize("frame_length", [2, 5, 16])
def test_frame_average_is_that_of_rotated_samples(family, layout, frame_length):
    model = tiny_model(family)
    moments = moments_of(model, padded_batches())
    rope = moments.side("key", (1,)).rope
    assert rope.layout == layout
    inv_freq = moments.inv_freq[rope.source]
    plain = moments.of_group("key", (1,))
    framed = moments.of_group("key", (1,), frame_length)
    width = plain[0].shape[0]
    head_dim = moments.side("key", (1,)).head_dim
    rotations = []
    for offset in range(frame_length):
        cos, sin = angle_tables(torch.tensor(offset), inv_freq)
        units = torch.eye(width, dtype=torch.float64).view(width, -1, head_dim)
        rotations.append(rotate(units, cos, sin, layout).reshape(width, width).T)  # x → R x
    for index in (0, 2):
        expected = torch.stack([turn @ plain[index] @ turn.T for turn in rotations]).mean(0)
        torch.testing.assert_close(framed[index], expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
    torch.testing.assert_close(framed[1], torch.stack([turn @ plain[1] for turn in rotations]).mean(0))
    values = [moments.of_group("value", (1,), length)[0] for length in (1, frame_length)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)  # values are never rotated


@pytest.mark.parametrize("family", ["llama", "glm4", "deepseek-v3"])
@pytest.mark.parametrize("frame_length", [2, 5])
def test_frame_average_of_keys_with_values_turns_only_what_the_model_turns(family, frame_length):
    moments = moments_of(tiny_model(family), padded_batches(), 2, joint=True)
    group = (0, 1)
    plain, framed = (moments.of_group("both", group, length) for length in (1, frame_length))
    members = moments.shape.members("both", group)
    assert [(layer, side) for layer, side, _ in members] == [(layer, side) for layer in group for side in SIDES]
    turned_side = "value" if family.startswith("deepseek") else "key"  # MLA hands its rotary key over as values
    rotations = []
    for offset in range(frame_length):
        blocks = []  # x → R x, one number at a time
        for _, side, shape in members:
            block = torch.eye(shape.width, dtype=torch.float64)
            assert (shape.rope is not None) == (side == turned_side)
            if shape.rope is not None:
                half = shape.rope.rotary_dim // 2
                for head in range(shape.heads):
                    for pair, frequency in enumerate(moments.inv_freq[shape.rope.source].tolist()):
                        start = head * shape.head_dim
                        first, second = start + pair, start + pair + half
                        if shape.rope.layout == "interleaved":
                            first, second = start + 2 * pair, start + 2 * pair + 1
                        angle = torch.tensor(offset * frequency, dtype=torch.float64)
                        block[first, first] = block[second, second] = angle.cos()
                        block[first, second], block[second, first] = -angle.sin(), angle.sin()
            blocks.append(block)
        rotations.append(torch.block_diag(*blocks))
    for index in (0, 2):
        expected = torch.stack([turn @ plain[index] @ turn.T for turn in rotations]).mean(0)
        torch.testing.assert_close(framed[index], expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
    torch.testing.assert_close(framed[1], torch.stack([turn @ plain[1] for turn in rotations]).mean(0))
    starts = [0, *itertools.accumulate(shape.width for _, _, shape in members)]
    for (_, side, _), start, stop in zip(members, starts[:-1], starts[1:], strict=True):
        kept = torch.allclose(framed[0][start:stop, start:stop], plain[0][start:stop, start:stop], rtol=1e-12)
        assert kept == (side != turned_side)


def test_smaller_joint_groups_are_parts_of_larger_ones():
    small, large = (moments_of(tiny_model("llama"), padded_batches(), size, joint=True) for size in (1, 3))
    for layer in (0, 1, 2):
        for side in ("key", "value", "both"):
            for ours, theirs in zip(small.of_group(side, (layer,)), large.of_group(side, (layer,)), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_moments_recorded_apart_refuse_joint_projections_by_name():
    apart = moments_of(tiny_model("llama"), padded_batches(), 3)
    with pytest.raises(ValueError, match=r"both layers \(0, 1\) were not recorded jointly; .* hold the groups .*'key'"):
        projections_from_moments(apart, layer_group_size=2)
    joint = moments_of(tiny_model("llama"), padded_batches(), 2, joint=True)
    with pytest.raises(ValueError, match=r"both layers \(0, 1, 2\) were not recorded jointly; .*'both': \[\(0, 1\)"):
        projections_from_moments(joint, layer_group_size=3)
    with pytest.raises(ValueError, match=r"value layers \(0, 1, 2\) were not recorded jointly"):
        projections_from_moments(joint, layer_group_size=(1, 3))


@pytest.mark.parametrize("sensitivity", ["gradient", "query"])
@pytest.mark.parametrize("joint, size", [(True, 2), (False, 2), (False, (1, 3))])
def test_saved_moments_give_the_same_projections(tmp_path, joint, size, sensitivity):
    path = tmp_path / "moments.safetensors"
    options = {"layer_group_size": size, "joint": joint}
    made = calibrate(
        tiny_model("llama"), padded_batches(), sensitivity=sensitivity, save_moments=path, progress=False, **options
    )
    loaded = Moments.load(path)
    assert list(loaded.groups) == (["both"] if joint else ["key", "value"])
    again = projections_from_moments(loaded, provenance=made.provenance, **options)
    assert again.provenance == made.provenance and again.shape == made.shape
    assert [basis.name for basis in again.bases] == [basis.name for basis in made.bases]
    for ours, theirs in zip(again.bases, made.bases, strict=True):
        for name in ("down_proj", "up_proj", "offset", "loss"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    loaded.save(tmp_path / "twice.safetensors")
    assert (tmp_path / "twice.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("damage", ["text", "truncated", "other tensors"])
def test_moments_that_cannot_be_read(tmp_path, damage):
    path = tmp_path / "moments.safetensors"
    if damage == "text":
        path.write_text("no moments")
    elif damage == "truncated":
        moments_of(tiny_model("llama"), padded_batches(), joint=True).save(path)
        path.write_bytes(path.read_bytes()[:-100])
    else:
        save_file({"second.both.0": torch.zeros(2, 2)}, str(path))
    with pytest.raises(ValueError, match="moments.safetensors holds no readable moments: "):
        Moments.load(path)
