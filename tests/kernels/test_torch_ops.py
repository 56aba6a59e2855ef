"""The torch path of attention over latents, against the reference in float64."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_cache.kernels import torch_ops
from lowrank_cache.kernels.api import latent_attention
from lowrank_cache.kernels.segments import attend, merge
from tests.oracle.latent_sides import assert_decodes_like_the_reference, make_rope, make_side, make_tiers


def random_case(frame_length, q_tokens, joint, layout="half", batch=2, tokens=75, tiers=None, rows=None):
    q_heads, heads, head_dim, value_dim = 6, 2, 16, 24
    key_tiers = make_tiers(tiers or {8: 5, 4: 19, 2: 50}, batch, tokens, room=5)
    value_tiers = key_tiers if joint else make_tiers({16: 3, 4: 11}, batch, tokens, seed=1)
    rope = None if frame_length is None else make_rope(batch, tokens, 12, frame_length, layout, rows)
    return (
        torch.randn(batch, q_heads, q_tokens, head_dim),
        make_side(key_tiers, heads, head_dim, rope),
        make_side(value_tiers, heads, value_dim),
    )


@pytest.mark.parametrize("numbers", [2**22, 2**10], ids=["one-tile", "many-tiles"])
@pytest.mark.parametrize("joint", [True, False], ids=["joint", "apart"])
@pytest.mark.parametrize("q_tokens", [1, 3, 40])
@pytest.mark.parametrize("frame_length", [1, 4, 64, None])
def test_matches_the_reference(frame_length, q_tokens, joint, numbers, monkeypatch):
    monkeypatch.setattr(torch_ops, "_TILE_NUMBERS", numbers)
    query, key, value = random_case(frame_length, q_tokens, joint)
    mask = torch.rand(2, 1, q_tokens, 75) > 0.3
    mask[0, :, 0] = False  # a query that sees nothing
    for options in ({}, {"mask": mask}, {"mask": mask[:1, :, :1], "softcap": 3.0}):
        assert_decodes_like_the_reference(torch_ops.latent_attention, query, key, value, scaling=0.25, **options)


@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 70),
    q_tokens=st.integers(1, 5),
    frame_length=st.sampled_from([None, 1, 2, 16]),
    layout=st.sampled_from(["half", "interleaved"]),
    tiers=st.dictionaries(st.sampled_from([16, 8, 4, 2]), st.integers(1, 70), min_size=1),
    shared=st.booleans(),
    joint=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_shape_matches_the_reference(batch, tokens, q_tokens, frame_length, layout, tiers, shared, joint, seed):
    torch.manual_seed(seed)
    tiers = dict(sorted(tiers.items(), reverse=True))
    query, key, value = random_case(
        frame_length, q_tokens, joint, layout, batch, tokens, tiers, rows=1 if shared else batch
    )
    assert_decodes_like_the_reference(torch_ops.latent_attention, query, key, value, scaling=0.25)


@pytest.mark.parametrize("fault", ["sine", "steps", "constant"])
def test_a_planted_fault_is_caught(fault):
    query, key, value = random_case(4, 1, joint=False)

    def faulty(query, key, value, **options):
        if fault == "sine":
            key = dataclasses.replace(key, rope=dataclasses.replace(key.rope, sin=-key.rope.sin))
        elif fault == "steps":
            tier = value.tiers[1]
            slightly = dataclasses.replace(tier, steps=tier.steps * 1.001)
            value = dataclasses.replace(value, tiers=(value.tiers[0], slightly))
        else:
            key = dataclasses.replace(key, constant=key.constant * 1.0001)
        return torch_ops.latent_attention(query, key, value, **options)

    with pytest.raises(AssertionError, match="from the float64 truth"):
        assert_decodes_like_the_reference(faulty, query, key, value, scaling=0.25)


@pytest.mark.parametrize("q_tokens", [1, 16, 17])
def test_impl_names_the_path(q_tokens):
    query, key, value = random_case(4, q_tokens, joint=True)
    expected = latent_attention(query, key, value, scaling=0.25, impl="reference")
    for impl in ("auto", "torch"):
        for one, other in zip(latent_attention(query, key, value, scaling=0.25, impl=impl), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"impl must be one of .*'reference'.*got 'cuda'"):
        latent_attention(query, key, value, scaling=0.25, impl="cuda")


@given(cuts=st.lists(st.integers(0, 30), max_size=3), sink=st.booleans(), seed=st.integers(0, 2**31 - 1))
def test_merged_segments_are_attention_over_all_tokens(cuts, sink, seed):
    torch.manual_seed(seed)
    query, keys = torch.randn(2, 4, 3, 8, dtype=torch.float64), torch.randn(2, 2, 30, 8, dtype=torch.float64)
    values = torch.randn(2, 2, 30, 5, dtype=torch.float64)
    mask = torch.rand(2, 1, 3, 30) > 0.5
    mask[0, :, 0] = False
    edges = [0, *sorted(cuts), 30]
    options = {"scaling": 0.5, "softcap": 4.0}
    logits = torch.randn(4, dtype=torch.float64) if sink else None
    parts = [
        attend(query, keys[:, :, a:b], values[:, :, a:b], mask=mask[..., a:b], **options)
        for a, b in zip(edges[:-1], edges[1:], strict=True)
        if b > a
    ]
    output, lse = merge(parts, logits)
    # By hand: scores, capped, masked, with one more column for the sink logit.
    scores = torch.einsum("bgqtd,bgsd->bgqts", query.unflatten(1, (2, 2)), keys).flatten(1, 2) * 0.5
    scores = (4.0 * torch.tanh(scores / 4.0)).masked_fill(~mask, -torch.inf)
    if logits is not None:
        scores = torch.cat([scores, logits[:, None, None].expand(2, 4, 3, 1)], dim=3)
    weights = torch.nan_to_num(torch.softmax(scores, dim=3))[..., :30]
    expected = torch.einsum("bgqts,bgse->bgqte", weights.unflatten(1, (2, 2)), values).flatten(1, 2)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, torch.logsumexp(scores, dim=3))
