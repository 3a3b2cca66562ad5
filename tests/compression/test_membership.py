"""Membership scores and their worth, against pairs and sorted lists."""

import math
import zlib

import pytest
import torch

from compression.evaluation.loss import TokenFigures
from compression.evaluation.membership import auc, lowest_mean, scores
from compression.training.samples import padded
from tests.reference import forgetting as reference


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("seen", "unseen", "worth"),
    [
        ([3.0, 4.0], [1.0, 2.0], 1.0),
        ([1.0, 2.0], [3.0, 4.0], 0.0),
        ([1.0, 1.0], [1.0, 1.0], 0.5),  # ties tell nothing
        ([2.0, 1.0], [1.0], 0.75),
        ([0.0, 2.0], [1.0, 1.0, 1.0], 0.5),
        ([-math.inf, 2.0], [1.0], 0.5),
    ],
)
def test_auc_by_hand(seen: list[float], unseen: list[float], worth: float) -> None:
    assert auc(tensor(*seen), tensor(*unseen)) == worth == reference.auc(tensor(*seen), tensor(*unseen))


def test_auc_equals_all_pairs_with_many_ties() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        seen, unseen = (torch.randint(6, (count,), generator=draw).double() for count in (17, 11))
        assert auc(seen, unseen) == pytest.approx(reference.auc(seen, unseen))
        assert auc(unseen, seen) == pytest.approx(1 - auc(seen, unseen))


def test_auc_of_what_is_not_a_number_is_not_one() -> None:
    assert math.isnan(auc(tensor(1.0, math.nan), tensor(1.0)))


@pytest.mark.parametrize(("percent", "mean"), [(20, 1.0), (40, 1.5), (60, 2.0), (100, 3.0), (1, 1.0)])
def test_the_lowest_are_taken_and_at_least_one(percent: int, mean: float) -> None:
    values = tensor(3, 1, 9, 5, 2, -7, 4)[None]
    counted = torch.tensor([[True, True, False, True, True, False, True]])
    assert float(lowest_mean(values, counted, percent)) == mean
    assert reference.lowest_mean([3, 1, 5, 2, 4], percent) == mean


def test_scores_equal_their_definitions() -> None:
    samples = padded([[1], [1, 2]], [[3, 4, 5, 6, 7], [8, 9]], length=7, filler=0)
    draw = torch.Generator().manual_seed(1)
    losses, standardised = (torch.randn(2, 6, generator=draw) for _ in range(2))
    texts = ["a b c", "something rather longer than that"]
    found = scores(TokenFigures(losses, losses > 0, standardised), samples, texts)
    for row, counted in enumerate(samples.answer[:, 1:]):
        log_p, z = (-losses[row][counted]).double().tolist(), standardised[row][counted].double().tolist()
        mean = sum(log_p) / len(log_p)
        assert float(found["loss"][row]) == pytest.approx(mean)
        assert float(found["zlib"][row]) == pytest.approx(mean / len(zlib.compress(texts[row].encode())))
        for percent in (20, 40):
            assert float(found[f"min_k_{percent}"][row]) == pytest.approx(reference.lowest_mean(log_p, percent))
            assert float(found[f"min_k_plus_{percent}"][row]) == pytest.approx(reference.lowest_mean(z, percent))
