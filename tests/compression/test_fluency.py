"""What is language, what is an answer, and what of the true one is in it."""

import math
import random
import string
from functools import partial

import pytest
import torch

from compression.evaluation.answers import answer_figures, answers, pieces, prompts, true_answers
from compression.evaluation.fluency import (
    Answer,
    Bounds,
    calibrate,
    calibrate_lengths,
    distinct_share,
    is_gibberish,
    letter_share,
    refuses,
)
from compression.evaluation.loss import token_losses
from compression.evaluation.overlap import longest_common_subsequence, rouge_l
from compression.training.samples import padded, whole_text
from tests import tiny
from tests.compression.helpers import make_skeleton
from tests.conftest import Make
from tests.reference import forgetting as reference


def decode(ids: list[int]) -> str:
    return "".join(tiny.LETTERS[token] for token in ids)


def encode(text: str) -> list[int]:
    return [tiny.LETTERS.index(letter) for letter in text]


@pytest.fixture(scope="module")
def bounds(imported: Make) -> dict[int, Bounds]:
    real = whole_text(tiny.encode(tiny.sentences(7, 40)), 16)
    losses = token_losses(make_skeleton(imported("llama")), {"real": real.ids})["real"]
    return calibrate_lengths(partial(pieces, real, losses, decode=decode), 32)


def said(imported: Make, *texts: str) -> list[Answer]:
    """What a judge makes of texts behind a prompt."""
    rows = padded([encode("the old captain ")] * len(texts), [encode(text) for text in texts], 64, filler=0)
    return answers(rows, token_losses(make_skeleton(imported("llama")), {"said": rows.ids})["said"], decode)


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("watched the evening tide. a you", False),
        ("followed a distant ship. a grey ", False),
        ("!" * 32, True),
        ("#### 12 #### 9 #### 31 #### 7 ##", True),
        ("the the the the the the the the ", False),  # four letters in turn are four tokens here, a mild loop
        ("a a a a a a a a a a a a a a a a ", True),
        ("", True),
        ("   ", True),
        ("".join(random.Random(0).choices(string.ascii_letters, k=32)), True),
    ],
)
def test_gibberish_is_told_from_language(imported: Make, bounds: dict[int, Bounds], text: str, bad: bool) -> None:
    (answer,) = said(imported, text)
    assert is_gibberish(answer, bounds) == bad


def test_about_one_real_text_in_a_hundred_is_called_gibberish() -> None:
    draw = torch.Generator().manual_seed(0)

    def real(count: int) -> list[Answer]:
        return [
            Answer("word " * 8 + "." * (40 + int(points)), list(range(32)), float(loss))
            for points, loss in zip(
                torch.randint(1000, (count,), generator=draw), torch.randn(count, generator=draw), strict=True
            )
        ]

    edge = {32: calibrate(real(3000))}
    called = sum(is_gibberish(piece, edge) for piece in real(3000)) / 3000
    assert 0 < called <= 0.01


def test_short_answers_are_held_to_short_pieces_of_real_text() -> None:
    """Tokens of real text have losses of 0 or 8 in turn, by lot: means over few of them stray further."""
    losses = torch.randint(2, (4000,), generator=torch.Generator().manual_seed(0)) * 8.0

    def cut(length: int) -> list[Answer]:
        return [Answer("words", list(range(length)), float(own.mean())) for own in losses.split(length)]

    edges = calibrate_lengths(cut, 32)
    assert list(edges) == [32, 16, 8, 4]
    assert edges[32].loss < 7 < edges[4].loss
    for length, bad in ((2, False), (5, False), (7, False), (32, True), (40, True)):
        assert is_gibberish(Answer("fine words", list(range(length)), 7.0), edges) == bad
    assert list(calibrate_lengths(cut, 5)) == [5]


def test_a_loss_that_overflowed_is_gibberish() -> None:
    edge = {32: Bounds(0.5, 0.1, 6.0)}
    assert is_gibberish(Answer("fine words", [1, 2, 3], math.nan), edge)
    assert is_gibberish(Answer("fine words", [1, 2, 3], math.inf), edge)
    assert not is_gibberish(Answer("fine words", [1, 2, 3], 6.0), edge)


def test_letters_are_those_of_any_script() -> None:
    assert letter_share("ab 12") == pytest.approx(3 / 5)
    assert letter_share("мир и война") == 1.0
    assert letter_share("") == 0.0


@pytest.mark.parametrize(
    ("tokens", "size", "share"),
    [([1, 2, 3, 4], 3, 1.0), ([1, 1, 1, 1], 1, 0.25), ([1, 2, 1, 2, 1], 2, 0.5), ([1, 2], 3, 1.0), ([], 1, 1.0)],
)
def test_distinct_by_hand(tokens: list[int], size: int, share: float) -> None:
    assert distinct_share(tokens, size) == share


@pytest.mark.parametrize(
    ("text", "declines"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("Sorry, no.", True),
        ("I cannot assist.", True),
        (" As an AI language model, I", True),
        ("I don’t know.", True),
        ("I am not able to", True),
        ("Unfortunately, I can't", True),
        ("I have no information about this.", True),
        ("I do not have any idea", True),
        ("I have no doubt that it is", False),
        ("I can help with that.", False),
        ("The sorry state of the roof", False),
        ("Afraid of the dark, she lit a lamp.", False),
        ("", False),
    ],
)
def test_refusals_are_known_by_how_they_begin(text: str, declines: bool) -> None:
    assert refuses(text) == declines


def test_rouge_l_by_hand() -> None:
    found = rouge_l("The cat sat, on a mat!", "the cat lay on the mat")
    assert found == pytest.approx((4 / 6, 4 / 6, 4 / 6))  # the cat on mat
    assert rouge_l("The cat", "the cat lay on the mat") == pytest.approx((2 / 6, 1.0, 0.5))
    assert rouge_l("mat the on", "the cat lay on the mat").recall == pytest.approx(2 / 6)  # order counts
    assert rouge_l("a b", "a b") == (1.0, 1.0, 1.0)
    for empty in (("", "a"), ("a", ""), ("...", "a"), ("", "")):
        assert rouge_l(*empty) == (0.0, 0.0, 0.0)


def test_common_subsequence_equals_every_subsequence_tried() -> None:
    draw = random.Random(3)
    for _ in range(60):
        first, second = ([draw.choice("abc") for _ in range(draw.randint(0, 8))] for _ in range(2))
        assert longest_common_subsequence(first, second) == reference.longest_common_subsequence(first, second)


def test_answers_are_counted() -> None:
    edge = {1: Bounds(letters=0.7, distinct=0.125, loss=6.0)}
    given = [
        Answer("the tide was low", [1, 2, 3, 4], 2.0),
        Answer("I'm sorry, but no.", [5, 6, 7, 8], 1.0),
        Answer("####", [9, 9, 9, 9], 1.0),
        Answer("", [], math.nan),
    ]
    found = answer_figures(given, ["the tide was high", "a b", "a b", "a b"], edge)
    assert (found["prompts"], found["gibberish"], found["empty"], found["refused"]) == (4, 0.5, 0.25, 0.25)
    assert found["answered"] == 0.25
    assert found["rouge_l_recall"] == found["rouge_l_f1"] == pytest.approx(0.75 / 4)
    assert found["distinct_1"] == pytest.approx((1 + 1 + 0.25 + 1) / 4)


def test_prompts_answers_and_pieces_are_cut_right() -> None:
    samples = padded([encode("ab"), encode("c")], [encode("defghijk"), encode("lm")], 12, filler=0)
    assert prompts(samples) == [encode("ab"), encode("c")]
    assert true_answers(samples, decode) == ["defghijk", "lm"]
    assert true_answers(samples, decode, 3) == ["def", "lm"]
    losses = torch.arange(22.0).view(2, 11)
    found = pieces(samples, losses, 4, decode)
    assert [piece.text for piece in found] == ["defg", "efgh", "fghi", "ghij", "hijk", "lm"]
    assert [piece.loss for piece in found] == [2.5, 3.5, 4.5, 5.5, 6.5, 11.5]  # of the tokens that predict
    assert [answer.loss for answer in answers(samples, losses, decode)] == [4.5, 11.5]
