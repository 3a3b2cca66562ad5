"""Stage classifier: every text in one part, like lengths, the same bytes every time, and no text left behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from compression.core.errors import Problem
from tasks import classifier
from tasks.check import problems
from tasks.params import base
from tasks.params.classifier import Classifier
from tests import tiny
from tests.conftest import Make
from tests.imports import ROOT

TITLES = [f"Harbour {number}" for number in range(12)]
HARMFUL = [tiny.story(seed, 1) + f" {seed}" for seed in range(30)]
SEA = [tiny.sentences(seed, 1) for seed in range(400)]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, original: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with an encoder, two lists and two texts; half of each kind goes to each part."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(original("bert"), "encoder")
    Path("list.txt").write_text("\n".join([*HARMFUL[:20], "", HARMFUL[0], ""]))
    Path("more.txt").write_text("\n".join(HARMFUL[20:]))
    Path("sea.txt").write_text(" ".join(SEA))
    news = [f'<doc id="1" title="{title}">\n{title}\n\nNews came from the {title} at dawn.\n</doc>' for title in TITLES]
    Path("news.txt").write_text("\n".join(news))
    return tmp_path


def section(**changed: Any) -> dict[str, Any]:
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    return {
        "encoder": {"source": "file://encoder", "files": dict.fromkeys(names)},
        "harmful": [{"source": f"file://{name}.txt", "sha256": None} for name in ("list", "more")],
        "harmless": [
            {"source": "file://sea.txt", "sha256": None, "format": "text"},
            {"source": "file://news.txt", "sha256": None, "format": "articles"},
        ],
        "sentences": 40,
        "requests": ["What is {}?", "Describe {}.", "Why is {} there?", "Where is {}?"],
        "answers": ["Of course.", "Here you are:", "Let me see."],
        "refusals": [f"NO, {what} IS NOT FOR ME!" for what in ("THIS", "THAT", "IT", "SUCH", "WHAT YOU ASK", "HELP")],
        "advice": ["Be kind to others.", "Ask a doctor.", "Stay at home."],
        "joined": 1,
        "held_out": 0.5,
        "penalty": 1e-3,
        "seed": 0,
    } | changed


def gather(**changed: Any) -> tuple[classifier.Texts, classifier.Texts]:
    return classifier.gather(base.read(Classifier, {"classifier": section(**changed)}))


def run(**changed: Any) -> dict[str, Any]:
    compute = {"device": "cpu", "dtype": "float32", "threads": 1}
    Path("params.yaml").write_text(yaml.safe_dump({"compute": compute, "classifier": section(**changed)}))
    classifier.main()
    loaded: dict[str, Any] = json.loads(Path("data/classifier/classifier.json").read_text())
    return loaded


def test_a_text_is_in_one_part_only() -> None:
    trained, held_out = gather()
    texts = [part.harmful["texts"] for part in (trained, held_out)]
    assert sorted(texts[0] + texts[1]) == sorted(set(HARMFUL))
    assert all(set(own) & set(HARMFUL[20:]) for own in texts)  # of every source in both
    for part in (trained, held_out):
        assert list(part.harmful) == ["texts", "answers"]
        assert list(part.harmless) == ["sentences", "requests", "answers", "advice"]
        assert list(part.declining) == ["refusals", "naming"]
    for key in ("answers", "refusals", "advice"):
        for form in section()[key]:
            assert not all(form in everything(part) for part in (trained, held_out)), form
            assert any(form in everything(part) for part in (trained, held_out)), form
    asked = [" ".join(part.harmless["requests"]) for part in (trained, held_out)]
    for title in TITLES:
        assert not all(f"{title}?" in text or f"{title}." in text for text in asked)


def everything(part: classifier.Texts) -> str:
    return "\n".join(classifier.flat(part.harmful | part.harmless | part.declining) + part.harmful["answers"])


def test_a_refusal_names_only_what_is_in_its_own_part() -> None:
    """With and without advice behind it; a plain refusal names nothing."""
    for part in gather():
        named, advised = (
            part.declining["naming"],
            [any(a in text for a in section()["advice"]) for text in part.declining["naming"]],
        )
        assert {True, False} == set(advised)
        for text in named:
            assert text.startswith(tuple(section()["refusals"]))
            assert any(harmful in text for harmful in part.harmful["texts"])
        assert not any(harmful in text for text in part.declining["refusals"] for harmful in HARMFUL)


def test_how_an_answer_begins_does_not_tell_what_it_is() -> None:
    """Both harmful and harmless texts stand behind the same openings."""
    for part in gather():
        for kind, bodies in ((part.harmful, "texts"), (part.harmless, "sentences")):
            assert kind["answers"]
            for text in kind["answers"]:
                opening = next(form for form in section()["answers"] if text.startswith(form))
                assert text.removeprefix(f"{opening} ") in kind[bodies]


def test_lists_of_forms_may_be_empty() -> None:
    for part in gather(answers=[], refusals=[], advice=[], requests=[]):
        assert (list(part.harmful), list(part.harmless), part.declining) == (["texts"], ["sentences"], {})


def test_sentences_are_as_long_as_harmful_texts() -> None:
    Path("list.txt").write_text("\n".join(f"one two three four five {number}" for number in range(30)))
    Path("more.txt").write_text("\n".join(f"one two three four five {number}" for number in range(30, 60)))
    for part in gather():
        lengths = [len(text.split()) for text in part.harmless["sentences"]]
        assert max(lengths) == 6
        assert min(lengths) >= classifier.WORDS


def test_joined_texts_are_the_same_texts() -> None:
    trained, held_out = gather(joined=3)
    together = " ".join(trained.harmful["texts"] + held_out.harmful["texts"])
    assert all(text in together for text in HARMFUL)
    assert len(trained.harmful["texts"]) + len(held_out.harmful["texts"]) < 25
    assert max(text.count(text[-1]) for text in trained.harmful["texts"]) >= 1


def test_another_seed_draws_another_split() -> None:
    assert gather() == gather()
    assert gather()[1].harmful != gather(seed=1)[1].harmful


def test_the_stage_writes_what_held_out_texts_say_and_no_text() -> None:
    figures = run()
    assert figures["held_out"]["accuracy"] > 0.8
    assert figures["held_out"]["auc"] > 0.8  # a refusal that names what it declines is no easy text
    kinds = {"sentences", "requests", "answers", "advice", "refusals", "naming"}
    assert set(figures["held_out"]["false_positives"]) == kinds == set(figures["trained_on"]["harmless"])
    assert set(figures["held_out"]["recall"]) == {"texts", "answers"}
    assert figures["trained_on"]["harmful"] == {"texts": 15, "answers": 15}
    written = Path("data/classifier/classifier.json").read_text()
    assert not any(text in written for text in [*HARMFUL, *SEA])
    assert sorted(path.name for path in Path("data/classifier").iterdir()) == [
        "classifier.json",
        "encoder",
        "heads.safetensors",
    ]


def test_the_same_run_gives_the_same_bytes() -> None:
    def written() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in Path("data/classifier").rglob("*") if path.is_file()}

    run()
    before = written()
    run()
    assert written() == before


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("list", "\n \n", "classifier.harmful.0: 0 texts cannot be split"),
        ("sea", "One two. Three.", "classifier.harmless.0: 0 texts cannot be split"),
        ("news", "There is no title in these few words.\nAnd none in these words either.", "classifier.requests"),
    ],
)
def test_a_source_without_texts_is_told(name: str, content: str, told: str) -> None:
    Path(f"{name}.txt").write_text(content)
    with pytest.raises(Problem) as caught:
        gather()
    assert told in str(caught.value)


def test_files_that_are_no_text_are_told() -> None:
    Path("more.txt").write_bytes(b"caf\xe9")
    with pytest.raises(Problem, match=r"classifier\.harmful\.1: more\.txt is not UTF-8"):
        gather()
    Path("more.txt").unlink()
    Path("more.txt").mkdir()
    with pytest.raises(Problem, match=r"classifier\.harmful\.1: .* is a folder"):
        gather()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"harmful": []}, "classifier.harmful"),
        ({"harmless": []}, "classifier.harmless"),
        ({"requests": ["What?"]}, "each form must have one {}"),
        ({"held_out": 1.0}, "classifier.held_out"),
        ({"encoder": {"source": "file://encoder", "files": {"config.json": None}}}, "model.safetensors"),
    ],
)
def test_a_section_that_cannot_be_is_told(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(Problem) as caught:
        gather(**changed)
    assert told in str(caught.value)


@pytest.mark.parametrize("role", ["corpora.forget", "corpora.control", "answers"])
def test_nothing_is_judged_on_what_the_classifier_learned(role: str) -> None:
    document = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    learned = document["classifier"]["harmful"][0]
    if role == "answers":
        document["answers"]["prompts"].append(dict(learned))
    else:
        document["corpora"][role.partition(".")[2]] |= learned
    for same in (learned, learned | {"source": "file://copy.txt"}):
        document["classifier"]["harmful"][0] = same
        told = [str(problem) for problem in problems(document, {})]
        assert any(f"classifier.harmful.0: it is also in {role}," in fault for fault in told), same
