"""Similarities are those of their definitions, do not flatter small samples, and CMPQ scores with them."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.core.skeleton import Skeleton
from compression.sensitivity import cmpq
from compression.sensitivity.settings import Columns, Settings
from compression.sensitivity.similarity import similarities
from tests import tiny
from tests.compression.helpers import Killed, make_skeleton, whole_model
from tests.conftest import Make
from tests.reference import sensitivity as reference

KINDS = ["cca", "svcca", "pwcca", "cka"]
ALL = pytest.mark.parametrize("kind", KINDS)
CORRELATED = pytest.mark.parametrize("kind", KINDS[:3])


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Many short sequences int64 [40, 16]."""
    return tiny.encode(tiny.sentences(3, 40), 16)[:40]


def twin(kind: str, components: int):  # type: ignore[no-untyped-def]
    naive = getattr(reference, kind)
    return naive if kind == "cka" else partial(naive, components=components)


def related(samples: int, widths: list[int]) -> list[Tensor]:
    """States that share some directions and have noise of their own."""
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(samples, 4, generator=draw)
    return [
        shared @ torch.randn(4, width, generator=draw) + torch.randn(samples, width, generator=draw) + 3
        for width in widths
    ]


@ALL
@pytest.mark.parametrize("components", [3, 50])
def test_equals_the_definition(kind: str, components: int) -> None:
    states = related(60, [7, 12, 9])
    found = similarities(states, kind, components)
    assert found.diagonal().tolist() == [1, 1, 1]
    for row, own in enumerate(states):
        for column, other in enumerate(states):
            if row != column:
                expected = twin(kind, components)(own.double().numpy(), other.double().numpy())
                assert 0.1 < expected < 0.999
                assert float(found[row, column]) == pytest.approx(expected, rel=1e-6)


@ALL
def test_the_same_state_turned_scaled_and_shifted_is_alike(kind: str) -> None:
    (state,) = related(60, [8])
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q
    assert similarities([state, 5 * state @ turn - 2], kind, 4)[0, 1] == pytest.approx(1, abs=1e-5)


@CORRELATED
def test_correlation_does_not_mind_any_linear_map(kind: str) -> None:
    (state,) = related(60, [8])
    stretched = state @ torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    assert similarities([state, stretched], kind, 8)[0, 1] == pytest.approx(1, abs=1e-2)


@ALL
def test_noise_is_alike_to_nothing(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(4000, 6, generator=draw) for _ in range(2))
    assert similarities([one, other], kind, 6)[0, 1] < 0.1


@CORRELATED
def test_small_samples_are_refused(kind: str) -> None:
    """Noise of 10 samples has 5 components in common, whatever it is."""
    draw = torch.Generator().manual_seed(0)
    noise = [torch.randn(10, 30, generator=draw) for _ in range(2)]
    with pytest.raises(Problem, match=r"10 sequences correlate in 5 components(.|\n)*above 10"):
        similarities(noise, kind, 5)
    assert similarities(noise, kind, 1)[0, 1] < 0.9
    similarities([state[:, :4] for state in noise], kind, 500)  # a state has no more components than columns


@ALL
@pytest.mark.parametrize(
    ("state", "told"), [(torch.ones(9, 3), "the same for every sequence"), (torch.full((9, 3), torch.nan), "NaN")]
)
def test_a_state_without_sense_is_told(kind: str, state: Tensor, told: str) -> None:
    with pytest.raises(Problem, match=told):
        similarities([*related(9, [3]), state], kind, 2)


def measure(folder: Path, tmp_path: Path, ids: Tensor, settings: Settings) -> Columns:
    return cmpq.measure(make_skeleton(folder), ids, Journal(tmp_path), settings)


@ALL
@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_cmpq_of_blocks_equals_the_naive_twin(
    kind: str, family: str, imported: Make, tmp_path: Path, text: Tensor
) -> None:
    found = measure(imported(family), tmp_path, text, Settings(similarity=kind, components=4))
    model, path = whole_model(imported(family)).double(), make_skeleton(imported(family)).path
    expected = reference.cmpq(model, path, text, "block", twin(kind, 4))
    assert list(found) == ["cmpq"]
    assert list(found["cmpq"]) == list(Checkpoint(imported(family)).layers)
    assert found["cmpq"] == pytest.approx(expected, abs=1e-5)
    assert len(set(expected.values())) == 3
    assert max(expected.values()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_cmpq_of_layers_equals_the_naive_twin(family: str, imported: Make, tmp_path: Path, text: Tensor) -> None:
    found = measure(imported(family), tmp_path, text, Settings(per="layer", components=4))
    model, path = whole_model(imported(family)).double(), make_skeleton(imported(family)).path
    expected = reference.cmpq(model, path, text, "layer", twin("svcca", 4))
    assert found["cmpq"] == pytest.approx(expected, abs=1e-4)
    assert len(set(expected.values())) == len(expected)


def test_cmpq_killed_and_resumed_gives_the_same_scores(
    imported: Make, tmp_path: Path, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(components=4)
    straight = measure(imported("llama"), tmp_path / "straight", text, settings)
    skeletons = [make_skeleton(imported("llama")) for _ in range(2)]
    load, loaded = Skeleton.load, []

    def dying(self: Skeleton, index: int) -> torch.nn.Module:
        if index == 2 and self is skeletons[0]:
            raise Killed
        loaded.append(index)
        return load(self, index)

    monkeypatch.setattr(Skeleton, "load", dying)
    with pytest.raises(Killed):
        cmpq.measure(skeletons[0], text, Journal(tmp_path / "killed"), settings)
    assert cmpq.measure(skeletons[1], text, Journal(tmp_path / "killed"), settings) == straight
    assert loaded == [0, 1, 2]


def test_too_few_sequences_are_told(imported: Make, tmp_path: Path, text: Tensor) -> None:
    with pytest.raises(Problem, match=r"sensitivity.sequences: 8 sequences correlate in 4 components"):
        measure(imported("llama"), tmp_path, text[:8], Settings(components=4))
    assert all(
        np.isfinite(list(measure(imported("llama"), tmp_path, text[:8], Settings(similarity="cka"))["cmpq"].values()))
    )
