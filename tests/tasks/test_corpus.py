"""Each role gets exactly the tokens it asks for, and no role judges on what another one learned from."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from compression.core.errors import Problem
from tasks import corpus, sources
from tasks.core.text import is_empty
from tasks.params import base
from tasks.params.corpora import Corpora
from tasks.sources.cache import digest

PROSE = "".join(f"Sentence {i} tells of the sea, of {i * 7 % 13} ships and of a long night.\n" for i in range(200))
STORY = "".join(f"Once upon a time, {i} children – and a dog named Fränzi – went home.\n" for i in range(200))
NEWS = '<doc id="1" title="One">\nOne\n\nThe first article.\n\n</doc>\n' * 30 + (
    '<doc id="2" title="a > b">\nTwo\n\nThe second one, about </doc> in a line.\n</doc>\n'
)
VOCABULARY = 400


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a tokenizer that begins every text with <s>, unless told not to."""
    folder = tmp_path_factory.mktemp("model")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([PROSE, STORY], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="<s>", model_max_length=64
    ).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}))
    return folder


@pytest.fixture(autouse=True)
def project(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a model and three texts."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tokenizer_folder, "data/model")
    for name, content in (("prose", PROSE), ("story", STORY), ("news", NEWS)):
        Path(f"{name}.txt").write_text(content, encoding="utf-8", newline="")
    return tmp_path


def text(name: str, start: int, stop: int | None, form: str = "text") -> dict[str, Any]:
    return {"source": f"file://{name}.txt", "sha256": None, "format": form, "tokens": (start, stop)}


def roles(**changed: Any) -> Corpora:
    """The section `corpora` as a user would write it, with some roles changed."""
    usual = {
        "calibration": text("prose", 0, 1000),
        "training": text("prose", 0, 1500),
        "retained": text("prose", 1500, None),
        "forget": text("story", 0, 800),
        "neighbours": None,
        "control": text("story", 1000, 1800),
        "evaluation": {"news": text("news", 0, 100, "articles")},
    }
    return base.read(Corpora, {"corpora": usual | changed})


def build(params: Corpora) -> None:
    corpus.build_corpora(params, corpus.MODEL, corpus.OUT)


def refused(params: Corpora) -> str:
    with pytest.raises(Problem) as caught:
        build(params)
    return str(caught.value)


def tokens(role: str) -> np.ndarray:
    with safe_open(f"data/corpora/{role}.safetensors", "np") as file:
        return file.get_tensor("tokens")


def reference(content: str) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained("data/model")
    return tokenizer(content, add_special_tokens=False)["input_ids"]


def test_each_role_gets_its_slice_of_the_whole_text() -> None:
    build(roles())
    files = sorted(p.relative_to("data/corpora").as_posix() for p in Path("data/corpora").rglob("*.safetensors"))
    single = ["calibration", "control", "forget", "neighbours", "retained", "training"]
    assert files == sorted(f"{role}.safetensors" for role in [*single, "evaluation/news"])
    prose = reference(PROSE)
    assert tokens("calibration").dtype == np.int32
    assert tokens("calibration").tolist() == prose[:1000]
    assert tokens("retained").tolist() == prose[1500:]
    assert tokens("training").tolist() + tokens("retained").tolist() == prose
    assert tokens("control").tolist() == reference(STORY)[1000:1800]


def test_metadata_say_where_the_tokens_come_from() -> None:
    build(roles())
    with safe_open("data/corpora/retained.safetensors", "np") as file:
        found = file.metadata()
    assert found == {
        "source": "file://prose.txt",
        "sha256": digest(Path("prose.txt")),
        "format": "text",
        "from": "1500",
        "to": str(len(reference(PROSE))),  # null is written out
        "documents": digest(Path("prose.txt")),
    }


def test_articles_are_what_stands_between_the_doc_lines() -> None:
    build(roles(evaluation={"news": text("news", 0, None, "articles")}))
    second = "Two\n\nThe second one, about </doc> in a line."
    expected = "\n\n".join(["One\n\nThe first article."] * 30 + [second])
    assert AutoTokenizer.from_pretrained("data/model").decode(tokens("evaluation/news")) == expected


def test_the_same_run_gives_the_same_bytes_and_leaves_nothing_else() -> None:
    build(roles())
    before = {p: p.read_bytes() for p in Path("data").rglob("*") if p.is_file()}
    Path("data/corpora/old.safetensors").write_bytes(b"of an earlier run")
    build(roles())
    assert {p: p.read_bytes() for p in Path("data").rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in Path("data").iterdir()) == ["corpora", "model"]


def test_a_failure_leaves_the_earlier_corpora_alone() -> None:
    build(roles())
    before = digest(corpus.OUT)
    refused(roles(control=text("story", 1000, 10**6)))
    assert digest(corpus.OUT) == before


def test_a_text_of_several_roles_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    fetch = sources.fetch

    def counted(source: str, *args: Any, **named: Any) -> Path:
        asked.append(source)
        return fetch(source, *args, **named)

    monkeypatch.setattr(sources, "fetch", counted)
    build(roles())
    assert sorted(asked) == ["file://news.txt", "file://prose.txt", "file://story.txt"]


# --- texts that will not do


def test_a_text_that_is_too_short_says_how_many_tokens_it_has() -> None:
    there = len(reference(STORY))
    message = refused(roles(control=text("story", 1000, 100_000)))
    assert message.startswith("params.yaml: corpora.control.tokens: [1000, 100000]")
    assert f"{there} tokens" in message
    assert "corpora.control.tokens" in refused(roles(control=text("story", there, None)))


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_text(content: str) -> None:
    Path("story.txt").write_text(content)
    message = refused(roles())
    assert message.startswith("params.yaml: corpora.forget.source")
    assert "no text" in message


def test_a_text_that_is_not_utf8_says_where() -> None:
    Path("news.txt").write_bytes(b"caf\xe9")
    message = refused(roles())
    assert message.startswith("params.yaml: corpora.evaluation.news.source")
    assert "not UTF-8: byte 0xe9 at 3" in message


def test_articles_that_are_none_or_are_cut_off() -> None:
    assert "no <doc ...> lines" in refused(
        roles(
            evaluation={"a": text("story", 900, 950, "articles")},
            forget=text("prose", 0, 9),
            control=text("prose", 9, 99),
        )
    )
    Path("news.txt").write_text(NEWS + "<doc id=3>\nThree\n\nThe third")
    assert "32 articles begin with <doc ...>, but 31 end" in refused(roles())


def test_a_missing_file_names_the_role() -> None:
    Path("news.txt").unlink()
    assert refused(roles()).startswith("params.yaml: corpora.evaluation.news.source: there is no news.txt")


def test_a_folder_is_no_text() -> None:
    Path("news.txt").unlink()
    Path("news.txt").mkdir()
    assert "is a folder" in refused(roles())


# --- tokenizers that will not do


def test_no_model_yet() -> None:
    shutil.rmtree("data/model")
    message = refused(roles())
    assert message.startswith("data/model: there is no model here")
    assert "download" in message


def test_a_model_without_a_tokenizer() -> None:
    Path("data/model/tokenizer.json").unlink()
    Path("data/model/tokenizer_config.json").unlink()
    message = refused(roles())
    assert "no tokenizer" in message
    assert "download" in message


def test_a_tokenizer_of_another_model() -> None:
    Path("data/model/config.json").write_text('{"text_config": {"vocab_size": 300}}')
    message = refused(roles())
    assert "vocabulary ends at 299" in message
    assert "not of the same model" in message


# --- roles that judge


@pytest.mark.parametrize(
    ("changed", "judge", "learned"),
    [
        ({"evaluation": {"p": text("prose", 1499, 1600)}}, "evaluation.p.tokens", "training"),
        ({"evaluation": {"p": text("story", 700, None)}}, "evaluation.p.tokens", "forget"),
        (
            {"evaluation": {"n": text("news", 0, 9)}, "calibration": text("news", 5, None)},
            "evaluation.n.tokens",
            "calibration",
        ),
        ({"retained": text("prose", 0, None)}, "retained.tokens", "training"),
        ({"control": text("story", 799, 900)}, "control.tokens", "forget"),
        ({"neighbours": text("story", 900, 1100)}, "control.tokens", "neighbours"),
        ({"neighbours": text("prose", 1400, 1600)}, "retained.tokens", "neighbours"),
        ({"evaluation": {"p": text("prose", 9000, None, "articles")}}, "evaluation.p.format", "calibration"),
    ],
)
def test_a_role_that_judges_shares_nothing_with_one_that_learns(changed: dict, judge: str, learned: str) -> None:
    message = refused(roles(**changed))
    assert message.startswith(f"params.yaml: corpora.{judge}")
    assert f"corpora.{learned}" in message
    assert not Path("data/corpora").exists()


def test_a_role_that_is_left_out_has_no_tokens() -> None:
    build(roles())
    assert tokens("neighbours").tolist() == []
    assert is_empty("neighbours")
    assert not is_empty("forget")


def news_questions(start: int, stop: int) -> dict[str, Any]:
    pairs = {"source": "file://news.txt", "sha256": None, "format": "articles_as_questions"}
    return pairs | {"frame": "question_answer", "rows": (start, stop)}


def test_questions_of_articles_that_judge_are_told_by_what_they_say() -> None:
    """The last of 31 articles is another one than the first, which the evaluation text has."""
    build(roles(neighbours=news_questions(30, 31)))
    message = refused(roles(neighbours=news_questions(0, 31)))
    assert message.startswith("params.yaml: corpora.evaluation.news.tokens: 30 answers of corpora.neighbours stand in")
    assert "those of articles behind the tokens of evaluation.news" in message


def test_neighbouring_slices_share_nothing() -> None:
    build(roles(evaluation={"p": text("prose", 1500, None), "s": text("story", 800, 1000)}))
    assert tokens("evaluation/s").size == 200


def test_the_same_text_under_another_address_is_recognised() -> None:
    shutil.copy("story.txt", "copy.txt")
    message = refused(roles(evaluation={"s": text("copy", 0, 100)}))
    assert message.startswith("params.yaml: corpora.evaluation.s.tokens: tokens 0 to 100 are also in corpora.forget")


def test_the_stage_runs_on_params_yaml(project: Path) -> None:
    section = roles().model_dump(mode="json")
    (project / "params.yaml").write_text(json.dumps({"corpora": section}))
    corpus.main()
    assert tokens("forget").size == 800
