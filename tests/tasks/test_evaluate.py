"""Stage evaluate where the text to forget is questions: are the answers harmful, and are they answers at all?"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from compression.core.errors import Problem
from compression.core.files import write_tensors
from compression.evaluation.harm import ENCODER, HEADS, open_encoder, train, write_heads
from compression.training.samples import padded
from tasks import evaluate, teach
from tasks.reporting.harm import removed_harm
from tasks.reporting.inputs import Harm
from tests import tiny
from tests.conftest import Make
from tests.imports import ROOT

LENGTH, TOKENS, QUESTIONS, ASKED = 64, 24, 12, 8
STORIES, SEA = ([make(seed, 1)[:TOKENS] for seed in range(20)] for make in (tiny.story, tiny.sentences))
HARMFUL, HARMLESS, SYMBOLS = STORIES[0], SEA[0], "!" * TOKENS
SAID = {  # by role, what the model answers to the prompts of that role
    "forget": [HARMFUL, HARMFUL, HARMLESS, SYMBOLS, HARMFUL, HARMLESS, HARMFUL, HARMLESS],
    "control": [HARMLESS, HARMLESS, HARMLESS, HARMLESS, HARMLESS, SYMBOLS, HARMFUL, HARMFUL],
}
SMALL: dict[str, dict[str, Any]] = {
    "compute": {"device": "cpu", "dtype": "float32", "threads": 1},
    "teach": {"method": "none"},
    "evaluate": {
        "windows": 2, "length": LENGTH, "forget_windows": 4, "forget_length": LENGTH, "prompt": 16, "answers": 2,
        "harm_answers": ASKED, "answer_tokens": TOKENS,
    },
}  # fmt: skip


@pytest.fixture
def params(tmp_path: Path, imported: Make, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A workspace with a tiny model, questions to forget and a classifier to which stories are harmful."""
    for switch in ("set_num_threads", "use_deterministic_algorithms"):  # they would outlive the test
        monkeypatch.setattr(torch, switch, lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(imported("llama"), "data/model")
    Path("data/corpora/evaluation").mkdir(parents=True)
    # Capitals make the judge used to what it finds unlikely: only symbols are no language here.
    retained = " QWXZ JKVB PYFG ZZXQ VJKW " * 4 + tiny.sentences(3, 40)
    for role, text in {"retained": retained, "evaluation/sea": tiny.sentences(4, 40)}.items():
        write_tensors(Path(f"data/corpora/{role}.safetensors"), {"tokens": tiny.encode(text).flatten()})
    for role in SAID:
        ask(role, [f"{role} {number}? " for number in range(QUESTIONS)])
    Path("data/classifier").mkdir()
    encoder = open_encoder(imported("bert"), torch.device("cpu"))
    classifier = train(encoder, STORIES, [*SEA, *[SYMBOLS] * 20], [], 1e-4, "here")
    write_heads(classifier, Path("data/classifier") / HEADS)
    (Path("data/classifier") / ENCODER).symlink_to(imported("bert"))
    Path("data/classifier/classifier.json").write_text("{}")
    document: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for section, values in SMALL.items():
        document[section] |= values
    write(document)
    teach.main()
    return document


def ask(role: str, prompts: list[str]) -> None:
    """Makes a role of pairs."""
    ids = [tiny.encode(prompt, 1).flatten().tolist() for prompt in prompts]
    samples = padded(ids, [tiny.encode("Tom was sad.", 1).flatten().tolist()] * len(ids), LENGTH, filler=0)
    stored = {"ids": samples.ids.int(), "answer": samples.answer.to(torch.uint8)}
    write_tensors(Path(f"data/corpora/{role}.safetensors"), stored)


def write(document: dict[str, Any], **changes: Any) -> None:
    document["evaluate"] |= changes
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def figures(name: str = "dense") -> dict[str, Any]:
    evaluate.main(name)
    loaded: dict[str, Any] = json.loads(Path(f"data/evaluation/{name}.json").read_text())
    return loaded


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model says what SAID has."""

    def generate(_model: Any, prompts: list[list[int]], tokens: int, **_: Any) -> list[list[int]]:
        texts = ["".join(tiny.LETTERS[token] for token in prompt) for prompt in prompts]
        known = [re.fullmatch(r"(forget|control) (\d+)\? ", text) for text in texts]
        said = [SAID[match[1]][int(match[2])] if match else HARMLESS for match in known]
        return [tiny.encode(text, 1).flatten().tolist()[:tokens] for text in said]

    monkeypatch.setattr(evaluate, "generate", generate)


@pytest.mark.usefixtures("scripted")
def test_answers_of_both_roles_are_judged(params: dict[str, Any]) -> None:
    found = figures()
    assert found["harm"] == {
        role: {
            "answers": ASKED,
            "rate": rate,
            "failed": failed,
            "harmful": [text == HARMFUL for text in SAID[role]],
            "gibberish": [text == SYMBOLS for text in SAID[role]],
        }
        for role, rate, failed in (("forget", 4 / 8, 5 / 8), ("control", 2 / 8, 3 / 8))
    }
    assert {role: (own["prompts"], own["gibberish"]) for role, own in found["answers"].items()} == {
        "forget": (8, 1 / 8),
        "control": (8, 1 / 8),
        "retained": (2, 0.0),
    }
    written = Path("data/evaluation/dense.json").read_text()
    assert not any(text in written for text in (HARMFUL, HARMLESS, SYMBOLS))


@pytest.mark.usefixtures("scripted")
def test_what_the_report_says_was_removed(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """(A_c - A_u) / A_c, of which A_u counts what is no language: who turns to symbols has removed nothing."""
    before = figures()["harm"]["forget"]
    monkeypatch.setitem(SAID, "forget", [HARMLESS] * 6 + [HARMFUL, SYMBOLS])
    better = figures()["harm"]["forget"]
    monkeypatch.setitem(SAID, "forget", [SYMBOLS] * ASKED)
    symbols = figures()["harm"]["forget"]
    assert symbols["rate"] == 0
    assert told(before, better) == pytest.approx((4 / 8 - 2 / 8) / (4 / 8))
    assert told(before, symbols) == pytest.approx((4 / 8 - 1) / (4 / 8))


def told(before: dict[str, Any], after: dict[str, Any]) -> float:
    run: Any = {
        name: SimpleNamespace(figures=SimpleNamespace(harm={"forget": Harm(**own)}))
        for name, own in (("quantized", before), ("unlearned", after))
    }
    estimate = removed_harm(run, "quantized", "unlearned", "forget")
    assert estimate
    return estimate.value


def test_questions_are_asked_apart_from_other_figures(params: dict[str, Any]) -> None:
    """What the model itself says, of whatever kind."""
    write(params, harm_answers=0)
    found = figures()
    assert (found["harm"], list(found["answers"])) == ({}, ["retained"])
    write(params, harm_answers=3, answers=0)
    found = figures()
    assert {role: own["answers"] for role, own in found["harm"].items()} == {"forget": 3, "control": 3}
    assert list(found["answers"]) == ["forget", "control"]
    write(params, harm_answers=QUESTIONS + 1)
    with pytest.raises(Problem, match=r"evaluate.harm_answers: 13 answers within 64 tokens asked of `forget`"):
        figures()


def test_plain_text_is_not_judged(params: dict[str, Any]) -> None:
    for role in SAID:
        write_tensors(Path(f"data/corpora/{role}.safetensors"), {"tokens": tiny.encode(tiny.story(2, 20)).flatten()})
    found = figures()
    assert found["harm"] == {}
    assert {own["prompts"] for own in found["answers"].values()} == {2}
