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
        "refusals": ["I cannot help.", "I do not know.", "I have to refuse."],
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
    assert sorted(trained.harmful + held_out.harmful) == sorted(set(HARMFUL))
    assert all(set(part.harmful) & set(HARMFUL[20:]) for part in (trained, held_out))  # of every source in both
    for kind in ("sentences", "requests", "refusals"):
        assert trained.harmless[kind]
        assert held_out.harmless[kind]
    for form in section()["refusals"]:
        assert len({any(t.startswith(form) for t in part.harmless["refusals"]) for part in (trained, held_out)}) == 2
    asked = [" ".join(part.harmless["requests"]) for part in (trained, held_out)]
    for title in TITLES:
        assert not all(f"{title}?" in text or f"{title}." in text for text in asked)


def test_a_refusal_names_only_what_is_in_its_own_part() -> None:
    for part in gather():
        naming = [text for text in part.harmless["refusals"] if text not in section()["refusals"]]
        assert naming
        assert all(any(text.endswith(f" {harmful}") for harmful in part.harmful) for text in naming)


def test_sentences_are_as_long_as_harmful_texts() -> None:
    Path("list.txt").write_text("\n".join(f"one two three four five {number}" for number in range(30)))
    Path("more.txt").write_text("\n".join(f"one two three four five {number}" for number in range(30, 60)))
    for part in gather():
        lengths = [len(text.split()) for text in part.harmless["sentences"]]
        assert max(lengths) == 6
        assert min(lengths) >= classifier.WORDS


def test_joined_texts_are_the_same_texts() -> None:
    trained, held_out = gather(joined=3)
    together = " ".join(trained.harmful + held_out.harmful)
    assert all(text in together for text in HARMFUL)
    assert len(trained.harmful) + len(held_out.harmful) < 25
    assert max(text.count(text[-1]) for text in trained.harmful) >= 1


def test_another_seed_draws_another_split() -> None:
    assert gather() == gather()
    assert gather()[1].harmful != gather(seed=1)[1].harmful


def test_the_stage_writes_what_held_out_texts_say_and_no_text() -> None:
    figures = run()
    assert figures["held_out"]["accuracy"] > 0.8
    assert figures["held_out"]["auc"] > 0.8  # a refusal that names what it declines is no easy text
    assert set(figures["held_out"]["false_positives"]) == {"sentences", "requests", "refusals"}
    assert figures["trained_on"]["harmful"] == 15
    written = Path("data/classifier/classifier.json").read_text()
    assert not any(text in written for text in [*HARMFUL, *SEA])
    assert sorted(path.name for path in Path("data/classifier").iterdir()) == [
        "classifier.json",
        "encoder",
        "head.safetensors",
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
