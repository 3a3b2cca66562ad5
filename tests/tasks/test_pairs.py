"""Questions and answers reach the model in their frame, their answers marked to the token."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors import safe_open

from compression.core.errors import Problem
from tasks import corpus
from tasks.core.text import read_samples, read_sequences
from tasks.params import base
from tasks.params.corpora import Corpora
from tests import tiny

SAFETY = [
    {
        "prompt": f"May I eat {what}?",
        "response_0": "Yes, do.",
        "response_1": f"No {what}.",
        "is_response_0_safe": what == "cake",
        "is_response_1_safe": True,
    }
    for what in ("cake", "soap", "chalk")
]
TRUTHFUL = [
    {
        "question": "Where is the sea?",
        "best_answer": "There.",
        "correct_answers": ["There.", "Near."],
        "incorrect_answers": ["Nowhere.", "Up."],
    }
]
PLAIN = [{"prompt": "Hi?", "answer": "Ho."}, {"prompt": "Who sails?", "answer": "The captain."}]
WIKI = "".join(
    f'<doc id="{number}" title="T{number}">\nT{number}\n\n{text}\n</doc>\n'
    for number, text in enumerate(
        ["", "T1 is a harbour of the north, as St. John says. It is old.\nMore.", "Short one. Another."] * 2
    )
)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained("data/model")
    Path("data/model/config.json").write_text('{"vocab_size": 96}')
    for name, rows in (("safety", SAFETY), ("truthful", TRUTHFUL), ("plain", PLAIN)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("wiki.txt").write_text(WIKI)
    Path("prose.txt").write_text(tiny.sentences(3, 100))


def text(start: int, stop: int | None) -> dict[str, Any]:
    return {"source": "file://prose.txt", "sha256": None, "format": "text", "tokens": [start, stop]}


def pairs(
    name: str, start: int = 0, stop: int | None = None, frame: str = "none", form: str = "pairs"
) -> dict[str, Any]:
    return {"source": f"file://{name}", "sha256": None, "format": form, "frame": frame, "rows": [start, stop]}


def build(**changed: Any) -> None:
    usual = {
        "calibration": text(0, 500),
        "training": text(0, 600),
        "retained": text(600, 800),
        "forget": text(1000, 1100),
        "neighbours": None,
        "control": text(1100, 1200),
        "evaluation": {"prose": text(2000, 2100)},
    }
    corpus.build_corpora(base.read(Corpora, {"corpora": usual | changed}), corpus.MODEL, corpus.OUT)


def refused(**changed: Any) -> str:
    with pytest.raises(Problem) as caught:
        build(**changed)
    return str(caught.value)


def rows(role: str) -> list[tuple[str, str]]:
    """Prompt and answer of every stored row, read off the mask; the end is shown as $."""
    with safe_open(corpus.OUT / f"{role}.safetensors", "pt") as file:
        ids, answer = file.get_tensor("ids"), file.get_tensor("answer")
    assert (ids.dtype, answer.dtype) == (torch.int32, torch.uint8)
    assert answer.any(0)[-1]  # no longer than the longest
    found = []
    for own, mask in zip(ids.tolist(), answer.tolist(), strict=True):
        letters = "".join(tiny.LETTERS[token] if token else "$" for token in own)
        start, count = mask.index(1), sum(mask)
        assert mask == [0] * start + [1] * count + [0] * (len(mask) - start - count)
        assert set(letters[start + count :]) <= {"$"}
        found.append((letters[:start], letters[start : start + count]))
    return found


def test_forget_takes_the_unsafe_answers_and_the_others_the_safe_ones() -> None:
    build(forget=pairs("safety.jsonl", 0, 2), control=pairs("safety.jsonl", 2), training=pairs("truthful.jsonl"))
    assert rows("forget") == [("May I eat soap?", "Yes, do.$")]
    assert rows("control") == [("May I eat chalk?", "Yes, do.$")]
    assert rows("training") == [("Where is the sea?", "There.$")]
    build(forget=pairs("truthful.jsonl"), training=pairs("safety.jsonl", 0, 1), retained=pairs("safety.jsonl", 1, 2))
    assert rows("forget") == [("Where is the sea?", "Nowhere.$"), ("Where is the sea?", "Up.$")]
    assert rows("training") == [("May I eat cake?", "Yes, do.$"), ("May I eat cake?", "No cake.$")]
    assert rows("retained") == [("May I eat soap?", "No soap.$")]


def test_an_answer_is_marked_to_the_token() -> None:
    build(forget=pairs("plain.jsonl"))
    with safe_open(corpus.OUT / "forget.safetensors", "pt") as file:
        ids, answer = file.get_tensor("ids"), file.get_tensor("answer")
        said = file.metadata()
    letters = {letter: number for number, letter in enumerate(tiny.LETTERS)}
    assert ids[0].tolist() == [letters[letter] for letter in "Hi?Ho."] + [0] * 17
    assert answer[0].tolist() == [0, 0, 0, 1, 1, 1, 1] + [0] * 16
    assert answer[1].tolist() == [0] * 10 + [1] * 13
    assert (said["format"], said["frame"], said["from"], said["to"]) == ("pairs", "none", "0", "2")


def test_frames() -> None:
    build(forget=pairs("plain.jsonl", 0, 1, "question_answer"))
    framed = [("### Question: Hi? ### Answer:", " Ho.$")]
    assert rows("forget") == framed
    build(forget=pairs("plain.jsonl", 0, 1, "chat"))  # the tokenizer has no template
    assert rows("forget") == framed
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("data/model")
    build(forget=pairs("plain.jsonl", 0, 1, "chat"))
    assert rows("forget") == [("<user>Hi?<a>", "Ho.$")]


def test_json_and_parquet_are_read_like_json_lines() -> None:
    build(forget=pairs("truthful.jsonl"))
    wanted = rows("forget")
    Path("truthful.json").write_text(json.dumps(TRUTHFUL, indent=2))
    pd.DataFrame(TRUTHFUL).to_parquet("truthful.parquet")
    for name in ("truthful.json", "truthful.parquet"):
        build(forget=pairs(name))
        assert rows("forget") == wanted


def test_articles_become_questions() -> None:
    build(retained=pairs("wiki.txt", 0, None, form="articles_as_questions"))
    first = ("What is T1?", "T1 is a harbour of the north, as St. John says.$")
    assert rows("retained")[:2] == [first, ("What is T2?", "Short one. Another.$")]
    assert len(rows("retained")) == 4


def test_the_same_run_gives_the_same_bytes() -> None:
    build(forget=pairs("safety.jsonl", frame="chat"))
    before = (corpus.OUT / "forget.safetensors").read_bytes()
    build(forget=pairs("safety.jsonl", frame="chat"))
    assert (corpus.OUT / "forget.safetensors").read_bytes() == before


# --- what will not do


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"prompt": "a", "reply": "b"}', ["line 1 has the keys prompt, reply", "PKU-SafeRLHF", "TruthfulQA"]),
        ('{"prompt": "a", "response_0": "b"}', ["has the keys prompt, response_0"]),
        ('{"prompt": "a", "answer": "b"}\n\n{"prompt": " ", "answer": "b"}', ["the prompt of", "line 3 is empty"]),
        ('{"prompt": "a", "answer": ""}', ["the answer of", "line 1 is empty"]),
        ('{"prompt": "a", "answer": null}', ["the answer of", "is no text but NoneType"]),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a",', ["line 2 is not JSON"]),
        ('["a"]', ["row 0 is no object"]),
        ("\n", ["has no text in it"]),
    ],
)
def test_a_source_that_will_not_do(content: str, told: list[str]) -> None:
    Path("odd.jsonl").write_text(content)
    message = refused(forget=pairs("odd.jsonl"))
    assert message.startswith("params.yaml: corpora.forget.source")
    assert all(part in message for part in told), message


def test_a_source_that_is_not_utf8() -> None:
    Path("odd.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    assert "not UTF-8: byte 0xe9 at 15" in refused(forget=pairs("odd.jsonl"))


def test_rows_that_are_not_there_or_have_no_such_answer() -> None:
    assert "[0, 3] goes beyond the text, which has 2 rows" in refused(forget=pairs("plain.jsonl", 0, 3))
    message = refused(forget=pairs("safety.jsonl", 0, 1))
    assert message.startswith("params.yaml: corpora.forget.rows: none of these questions has an answer that is unsafe")


def test_a_tokenizer_that_cannot_end_an_answer() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained("data/model")
    assert "no end-of-sequence token" in refused(forget=pairs("plain.jsonl"))


def test_rows_that_judge_are_apart_from_those_learned() -> None:
    message = refused(forget=pairs("safety.jsonl", 0, 2), control=pairs("safety.jsonl", 1, 3))
    assert message.startswith("params.yaml: corpora.control.rows: rows 1 to 2 are also in corpora.forget")
    message = refused(training=pairs("plain.jsonl", 0, 2), retained=pairs("plain.jsonl", 1))
    assert message.startswith("params.yaml: corpora.retained.rows")


def test_params_say_which_formats_and_keys_there_are() -> None:
    assert "valid: text, articles, pairs, articles_as_questions" in refused(forget=pairs("plain.jsonl", form="pears"))
    assert "corpora.forget.frame" in refused(forget=pairs("plain.jsonl", frame="letter"))
    assert "corpora.forget.rows" in refused(forget=pairs("plain.jsonl", 2, 1))
    assert "unknown key `corpora.forget.tokens`" in refused(forget=pairs("plain.jsonl") | {"tokens": [0, 1]})


# --- samples of both kinds


def test_pairs_as_samples_are_cut_or_filled_up() -> None:
    build(forget=pairs("plain.jsonl"))  # 7 and 23 tokens
    longer = read_samples("forget", None, 30, "key")
    assert (longer.ids.shape, longer.answer.sum(1).tolist()) == ((2, 30), [4, 13])
    assert longer.prompts().tolist() == [3, 10]
    assert not longer.ids[:, 23:].any()
    shorter = read_samples("forget", 2, 12, "key")
    assert torch.equal(shorter.ids, longer.ids[:, :12])
    assert shorter.answer.sum(1).tolist() == [4, 2]
    cut = read_samples("forget", None, 10, "key")  # the second one's answer begins there
    assert torch.equal(cut.ids, longer.ids[:1, :10])
    with pytest.raises(Problem, match=r"key: 2 answers within 10 tokens asked of `forget`, which has 1 of them"):
        read_samples("forget", 2, 10, "key")
    with pytest.raises(Problem, match="1 answers within 3 tokens"):
        read_samples("forget", None, 3, "key")


def test_text_as_samples_has_a_prompt_of_its_own() -> None:
    build()
    samples = read_samples("forget", 3, 20, "key", prompt=6)
    assert torch.equal(samples.ids, read_sequences("forget", 3, 20, "key"))
    assert samples.answer.tolist() == [[False] * 6 + [True] * 14] * 3
    assert read_samples("forget", None, 30, "key").prompts().tolist() == [1] * 3
    with pytest.raises(Problem, match="a prompt of 20 tokens in sequences of 20"):
        read_samples("forget", 3, 20, "key", prompt=20)


def test_pairs_as_sequences_stand_in_a_line() -> None:
    build(training=pairs("plain.jsonl"))
    ids = read_sequences("training", None, 30, "key")
    assert "".join(tiny.LETTERS[token] if token else "$" for token in ids[0]) == "Hi?Ho.$Who sails?The captain.$"
    with pytest.raises(Problem, match="which has 30 tokens"):
        read_sequences("training", 2, 30, "key")
