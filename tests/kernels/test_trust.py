"""Who computes on a GPU: trust by class of cards, a comparison at first use, and torch where a kernel fails."""

import json
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowrank_cache.kernels import reference, torch_ops, trust
from tests.oracle.latent_sides import make_side, make_tiers

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """What is remembered of devices is each test's own."""
    monkeypatch.setenv("LOWRANK_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trust, "_DISTRUSTED", set())
    monkeypatch.setattr(trust, "_COMPARED", set())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    trust.serves.cache_clear()
    yield
    trust.serves.cache_clear()


def reason_of(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    trust.serves.cache_clear()
    with pytest.warns(UserWarning, match="plain torch computes on cuda:0, since .*impl='triton'") as caught:
        assert not trust.serves(GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not trust.serves(GPU), "it warns once"
    return str(caught[0].message)


def test_cards_and_tritons_that_the_kernels_do_not_serve(monkeypatch):
    pytest.importorskip("triton")
    assert "need compute capability 8.0 or one of gfx90a" in reason_of((7, 5), monkeypatch)
    assert "not been checked on a GPU of class sm_80: run 'lowrank-cache gpu-check'" in reason_of((8, 0), monkeypatch)
    monkeypatch.setattr(trust, "version", lambda name: "9.9.1")
    assert "tested with Triton 3.6 to 3.9, not with 9.9.1" in reason_of((8, 0), monkeypatch)


def test_the_last_tested_triton_is_the_newest_that_tests_pass_with():
    tested = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["lowrank-cache"]["triton"]
    assert ".".join(map(str, trust.TESTED_TRITON[1])) == tested[1].rpartition(".")[0]
    assert trust.TESTED_TRITON[0] <= tuple(map(int, tested[0].split(".")[:2]))


def test_a_users_pass_counts_until_kernels_change(monkeypatch):
    pytest.importorskip("triton")
    path = trust.record_pass("sm_90")
    assert trust.serves(GPU)
    trust.record_pass("sm_80")
    assert set(json.loads(path.read_text())) == {"sm_80", "sm_90"}
    monkeypatch.setattr(trust, "kernels_digest", lambda: "of other kernels")
    assert "run 'lowrank-cache gpu-check'" in reason_of((9, 0), monkeypatch)
    path.write_text("not JSON")
    assert "run 'lowrank-cache gpu-check'" in reason_of((9, 0), monkeypatch)


def attention(result):
    """The arguments of a call, and guarded kernels whose attention does ``result`` with torch's."""
    tiers = make_tiers({8: 5, 4: 20}, 1, 30)
    key, value = make_side(tiers, 2, 16), make_side(tiers, 2, 16, seed=1)
    calls = []

    def planted(*arguments, **options):
        calls.append("kernel")
        return result(*torch_ops.latent_attention(*arguments, **options))

    kernels = trust.guarded(SimpleNamespace(latent_attention=planted), torch_ops)
    return (torch.randn(1, 4, 1, 16), key, value), kernels, calls


def raising(error):
    def fail(*_):
        raise error

    return fail


class CompilationError(Exception):
    pass


FAULTS = {
    "a compile error": (raising(CompilationError("at 43:18")), "CompilationError: at 43:18"),
    "a launch that fails": (
        raising(RuntimeError("Triton Error [CUDA]: invalid argument")),
        "RuntimeError: Triton Error",
    ),
    "out of resources": (raising(Exception("out of resource: shared memory")), "out of resource: shared memory"),
    "wrong numbers": (lambda output, lse: (output * 1.01, lse), "of their size from torch's, rounding explains"),
    "a wrong log-sum-exp": (lambda output, lse: (output, lse + 0.1), "of their size from torch's"),
    "NaN": (lambda output, lse: (output.index_fill(3, torch.tensor(2), torch.nan), lse), "not finite"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_is_answered_by_torch_then_and_from_then_on(fault):
    result, reason = FAULTS[fault]
    arguments, kernels, calls = attention(result)
    expected = torch_ops.latent_attention(*arguments, scaling=0.2)
    with pytest.warns(RuntimeWarning, match="please report what 'lowrank-cache gpu-check' prints") as caught:
        torch.testing.assert_close(kernels.latent_attention(*arguments, scaling=0.2), expected)
    assert reason in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(kernels.latent_attention(*arguments, scaling=0.2), expected)
    assert len(calls) == 1


def test_a_kernel_that_agrees_is_compared_once_and_watched_still(monkeypatch):
    compared = []
    disagreement = trust.disagreement
    monkeypatch.setattr(trust, "disagreement", lambda *given: (compared.append(given), disagreement(*given))[1])
    broken = []
    arguments, kernels, calls = attention(lambda *out: raising(RuntimeError("later"))() if broken else out)
    for _ in range(3):
        kernels.latent_attention(*arguments, scaling=0.2)
    assert len(calls) == 3 and len(compared) == 1
    broken.append(True)
    with pytest.warns(RuntimeWarning, match="RuntimeError: later"):
        kernels.latent_attention(*arguments, scaling=0.2)


@pytest.mark.parametrize("error", [ValueError("mask must fit"), torch.OutOfMemoryError("no room")])
def test_the_callers_errors_are_raised(error):
    arguments, kernels, _ = attention(raising(error))
    with pytest.raises(type(error), match=str(error)):
        kernels.latent_attention(*arguments, scaling=0.2)
    assert not trust._DISTRUSTED


def test_where_torch_has_no_room_the_kernels_answer_and_are_compared_later():
    arguments, _, _ = attention(lambda *result: result)
    fallback, room = torch_ops.latent_attention, []

    def cramped(*given, **options):
        if not room:
            raise torch.OutOfMemoryError("no room")
        return fallback(*given, **options)

    planted = SimpleNamespace(latent_attention=lambda *given, **options: fallback(*given, **options))
    kernels = trust.guarded(planted, SimpleNamespace(latent_attention=cramped))
    expected = fallback(*arguments, scaling=0.2)
    for result in kernels.latent_attention(*arguments, scaling=0.2), kernels.latent_attention(*arguments, scaling=0.2):
        assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))
    assert not trust._COMPARED and not trust._DISTRUSTED
    room.append(True)
    kernels.latent_attention(*arguments, scaling=0.2)
    assert trust._COMPARED and not trust._DISTRUSTED


def test_wrong_codes_and_wrong_states_are_seen():
    states = torch.randn(2, 2, 40, 16)
    arguments = [states], [torch.zeros(2, 16)], [None], torch.eye(32), ((8, 8), (4, 24)), torch.ones(32), torch.float16
    side = make_side(make_tiers({8: 5, 4: 20}, 1, 30), 2, 16)
    wrong = SimpleNamespace(
        encode=lambda *given: reference.encode([-given[0][0]], *given[1:]),
        reconstruct=lambda *given: reference.reconstruct(*given).flip(2),
    )
    for name, given in (("encode", arguments), ("reconstruct", (side, torch.float32))):
        for kernels, faulty in ((wrong, True), (reference, False)):
            guarded = trust.guarded(SimpleNamespace(**{name: getattr(kernels, name)}), torch_ops)
            trust._DISTRUSTED.clear()
            trust._COMPARED.clear()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                getattr(guarded, name)(*given)
            assert bool(caught) == faulty == bool(trust._DISTRUSTED)
