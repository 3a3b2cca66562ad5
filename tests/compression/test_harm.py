"""The classifier tells what it was taught to, always the same, and gibberish counts as no success."""

import random
from pathlib import Path

import pytest
import torch

from compression.core.errors import Problem
from compression.evaluation.effectiveness import effectiveness, effectiveness_interval, rate_interval
from compression.evaluation.harm import (
    ENCODER,
    HEADS,
    Classifier,
    Encoder,
    classify,
    failure_rate,
    first_sentence,
    harmful_rate,
    held_out_figures,
    open_classifier,
    open_encoder,
    train,
    write_heads,
)
from tests import tiny
from tests.conftest import Make
from tests.reference import harm as reference

CPU = torch.device("cpu")
WHERE = "params.yaml: classifier"
REFUSAL = "I CANNOT HELP WITH THIS #1#!"


@pytest.fixture
def encoder(imported: Make) -> Encoder:
    return open_encoder(imported("bert"), CPU)


def texts(kind: str, seed: int, count: int) -> list[str]:
    """Sentences of the sea, or of the story, which stands for what is harmful here."""
    make = {"sea": tiny.sentences, "story": tiny.story}[kind]
    draw = random.Random(seed)
    return [make(draw.randrange(10**6), 1) for _ in range(count)]


def test_the_head_is_that_of_newtons_method(encoder: Encoder) -> None:
    harmful, harmless, asked = texts("story", 0, 12), texts("sea", 1, 20), texts("sea", 2, 5) + texts("story", 3, 4)
    found = classify(train(encoder, harmful, harmless, [], 1e-2, WHERE), asked)
    features, labels = encoder.features(harmful + harmless), torch.tensor([1] * 12 + [0] * 20)
    expected = reference.probabilities(features, labels, 1e-2, encoder.features(asked))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert 0.05 < float(expected.min()) < float(expected.max()) < 0.95


def test_kinds_that_can_be_told_apart_are(encoder: Encoder) -> None:
    classifier = train(encoder, texts("story", 0, 20), texts("sea", 1, 20), [], 1e-4, WHERE)
    figures = held_out_figures(classifier, {"story": texts("story", 8, 10)}, {"sea": texts("sea", 9, 12)})
    assert figures == {
        "harmful": {"story": 10},
        "harmless": {"sea": 12},
        "accuracy": 1.0,
        "auc": 1.0,
        "recall": {"story": 1.0},
        "false_positives": {"sea": 0.0},
    }


def test_mistakes_are_counted_by_kind(encoder: Encoder) -> None:
    classifier = train(encoder, texts("story", 0, 20), texts("sea", 1, 20), [], 1e-4, WHERE)
    said = texts("story", 8, 3) + texts("sea", 9, 1)  # one in four looks harmless to it
    figures = held_out_figures(classifier, {"said": said}, {"sea": texts("sea", 5, 4), "like": texts("story", 6, 2)})
    assert figures["recall"] == {"said": 0.75}
    assert figures["false_positives"] == {"sea": 0.0, "like": 1.0}
    assert figures["accuracy"] == pytest.approx((3 + 4) / 10)


def test_equal_texts_give_equal_bytes_and_come_back_from_disk(encoder: Encoder, imported: Make, tmp_path: Path) -> None:
    def again() -> Classifier:
        return train(encoder, texts("story", 0, 9), texts("sea", 1, 9), refusals(9), 1e-3, WHERE)

    first, second = again(), again()
    for head, same in ((first.harm, second.harm), (first.declines, second.declines)):
        assert head
        assert same
        assert torch.equal(head.weight, same.weight)
        assert torch.equal(head.bias, same.bias)
    (tmp_path / ENCODER).symlink_to(imported("bert"))
    write_heads(first, tmp_path / HEADS)
    asked = texts("sea", 2, 3) + texts("story", 3, 3) + refusals(2)
    assert torch.equal(classify(open_classifier(tmp_path, CPU), asked), classify(second, asked))


def refusals(count: int) -> list[str]:
    """Texts that decline, and name what."""
    return [f"{REFUSAL} {told}" for told in texts("story", 4, count)]


def test_what_declines_is_harmless_whatever_it_names(encoder: Encoder) -> None:
    harmful, harmless = texts("story", 0, 20), texts("sea", 1, 20)
    alone = train(encoder, harmful, harmless, [], 1e-4, WHERE)
    both = train(encoder, harmful, harmless, refusals(10), 1e-4, WHERE)
    told = texts("story", 11, 6)
    assert harmful_rate(classify(alone, [f"{REFUSAL} {one}" for one in told])) == 1
    assert harmful_rate(classify(both, [f"{REFUSAL} {one}" for one in told])) == 0
    assert harmful_rate(classify(both, told)) == 1
    behind = [f"the old captain watched the quiet water. {one}" for one in told]  # a harmless beginning excuses nothing
    torch.testing.assert_close(classify(both, behind), classify(alone, behind), rtol=0.1, atol=0.0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("No. Never.", "No."),
        ("Here it is:\nOne. Two.", "Here it is:"),
        ("  Why? Because!", "Why?"),
        ("v1.5 is out", "v1.5 is out"),
    ],
)
def test_the_first_sentence(text: str, sentence: str) -> None:
    assert first_sentence(text) == sentence


def test_long_and_empty_texts(encoder: Encoder) -> None:
    classifier = train(encoder, texts("story", 0, 9), texts("sea", 1, 9), [], 1e-3, WHERE)
    long = tiny.story(4, 40)
    found = classify(classifier, ["", long, " \n", long[: encoder.length]])
    assert found[[0, 2]].tolist() == [0, 0]
    assert found[1] == pytest.approx(float(found[3]), rel=1e-4)  # it sees the beginning
    assert found[1] > 0.5
    assert classify(classifier, []).shape == (0,)


@pytest.mark.parametrize(("harmful", "harmless", "missing"), [([], ["a"], "harmful"), (["a"], [], "harmless")])
def test_one_kind_alone_teaches_nothing(
    encoder: Encoder, harmful: list[str], harmless: list[str], missing: str
) -> None:
    with pytest.raises(Problem, match=f"{WHERE}: there is no {missing} text"):
        train(encoder, harmful, harmless, [], 1e-3, WHERE)


def test_the_papers_effectiveness() -> None:
    assert effectiveness(0.32, 0.08) == pytest.approx(0.75)
    assert effectiveness(0.25, 0.5) == -1
    assert effectiveness(0.0, 0.1) is None


def test_gibberish_is_no_success() -> None:
    before = torch.tensor([0.9, 0.8, 0.5, 0.6, 0.1, 0.2, 0.3, 0.0])
    after = torch.tensor([0.9, 0.1, 0.1, 0.2, 0.1, 0.1, 0.4, 0.4])
    noise = [True, True, False, False, True, False, False, False]  # one of them harmful all the same
    assert harmful_rate(before) == 0.5
    assert harmful_rate(after) == 1 / 8
    assert failure_rate(after, noise) == 3 / 8
    found = effectiveness(harmful_rate(before), failure_rate(after, noise))
    assert found == pytest.approx((4 - 3) / 4)
    assert found == reference.effectiveness((before >= 0.5).tolist(), (after >= 0.5).tolist(), noise)


def test_answers_of_symbols_only_are_worth_nothing() -> None:
    assert effectiveness(0.5, failure_rate(torch.zeros(8), [True] * 8)) == -1


def test_the_interval_of_a_rate_is_wilsons() -> None:
    assert rate_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert rate_interval(0.0, 32) == pytest.approx((0.0, 0.1072), abs=1e-4)
    assert rate_interval(1.0, 32) == pytest.approx((0.8928, 1.0), abs=1e-4)


def test_the_interval_of_the_effectiveness_holds_it_and_narrows() -> None:
    before, after = [True, True, True, False] * 8, [True, False, False, False] * 8
    low, high = effectiveness_interval(before, after) or (0.0, 0.0)
    assert low < effectiveness(0.75, 0.25) < high  # type: ignore[operator]
    assert (low, high) == effectiveness_interval(before, after)
    closer = effectiveness_interval(before * 16, after * 16) or (0.0, 0.0)
    assert closer[1] - closer[0] < (high - low) / 3
    assert effectiveness_interval([True, False], [True, False]) == (0.0, 0.0)  # each prompt keeps both its answers
    assert effectiveness_interval([False] * 4, [True] * 4) is None
