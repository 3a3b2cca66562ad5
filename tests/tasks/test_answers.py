"""The model's own answers: the same every time, an equal share of each file, and ready to be a role."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from compression.core.errors import Problem
from tasks import answers, corpus
from tasks.check import problems
from tasks.core.text import read_samples
from tasks.params import base
from tasks.params.corpora import Corpora
from tests.conftest import Make
from tests.imports import ROOT

OUT = Path("data/answers/harmful.jsonl")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, imported: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/model").symlink_to(imported("llama"))
    for name, count in (("first", 3), ("second", 9)):
        lines = [json.dumps({"prompt": f"the {name} {number}", "intents": []}) for number in range(count)]
        Path(f"{name}.jsonl").write_text("\n".join(lines))
    params()


def params(*names: str, **changed: Any) -> None:
    section = {
        "prompts": [{"source": f"file://{name}.jsonl", "sha256": None} for name in names],
        "count": 8, "frame": "none", "tokens": 10, "temperature": 0.7, "top_p": 0.95, "seed": 0,
    } | changed  # fmt: skip
    compute = {"device": "cpu", "dtype": "float32", "threads": 1}
    Path("params.yaml").write_text(yaml.safe_dump({"compute": compute, "answers": section}))


def run(*names: str, **changed: Any) -> list[dict[str, Any]]:
    params(*names, **changed)
    answers.main()
    return [json.loads(line) for line in OUT.read_text().splitlines()]


def test_each_file_gives_its_share_and_every_prompt_is_answered() -> None:
    rows = run("first", "second")
    assert len({row["prompt"] for row in rows}) == 8
    assert [row["prompt_source"] for row in rows[:6]] == ["file://first.jsonl", "file://second.jsonl"] * 3
    assert all(row["response_0"].strip() and row["is_response_0_safe"] is False for row in rows)
    assert {row["response_0_source"] for row in rows} == {"the model itself, unjudged"}
    assert json.loads(Path("data/answers/manifest.json").read_text())["answers"] == "the model's own, unjudged"


def test_the_same_run_gives_the_same_bytes_and_another_seed_others() -> None:
    run("first", "second")
    before = {file.name: file.read_bytes() for file in OUT.parent.iterdir()}
    assert sorted(before) == ["harmful.jsonl", "manifest.json"]
    run("first", "second")
    assert {file.name: file.read_bytes() for file in OUT.parent.iterdir()} == before
    run("first", "second", seed=1)
    assert OUT.read_bytes() != before["harmful.jsonl"]


def test_no_prompts_no_answers() -> None:
    assert run() == []


def test_the_answers_can_be_a_role() -> None:
    rows = run("first", "second")
    Path("prose.txt").write_text("a grey gull followed a distant ship. " * 50)
    plain = {"source": "file://prose.txt", "sha256": None, "format": "text"}
    own = {"source": f"file://{OUT}", "sha256": None, "format": "pairs", "frame": "none"}
    roles = {
        "calibration": plain | {"tokens": [0, 100]},
        "training": plain | {"tokens": [0, 100]},
        "retained": plain | {"tokens": [100, 200]},
        "forget": own | {"rows": [0, 5]},
        "control": own | {"rows": [5, 8]},
        "neighbours": None,
        "evaluation": {"prose": plain | {"tokens": [200, 300]}},
    }
    corpus.build_corpora(base.read(Corpora, {"corpora": roles}), corpus.MODEL, corpus.OUT)
    samples = read_samples("forget", None, 40, "key")
    assert samples.prompts().tolist() == [len(row["prompt"]) for row in rows[:5]]
    assert samples.answer.sum(1).tolist() == [len(row["response_0"]) + 1 for row in rows[:5]]


def test_too_few_prompts() -> None:
    with pytest.raises(Problem, match=r"params.yaml: answers.count: 8 prompts asked for, but of 3 .*\n.*at most 3"):
        run("first")


def test_a_row_without_a_prompt() -> None:
    Path("first.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}')
    with pytest.raises(Problem, match=r"answers.prompts.0.source: the prompt of first.jsonl line 2 is empty"):
        run("first")


def test_the_section_in_params_yaml_is_sound() -> None:
    base.read(answers.Answers, base.load(ROOT / "params.yaml"))


def test_a_role_asks_for_no_more_answers_than_there_are() -> None:
    document = base.load(ROOT / "params.yaml")
    own = {"source": "file://data/answers/harmful.jsonl", "sha256": None, "format": "pairs", "frame": "chat"}
    document["corpora"]["forget"] = own | {"rows": [0, 97]}
    document["answers"] |= {"prompts": [], "count": 96}
    assert any("answers.prompts is empty" in str(problem) for problem in problems(document, {}))
    document["answers"]["prompts"] = [{"source": "file://first.jsonl", "sha256": None}]
    assert [
        str(problem).partition(":")[2] for problem in problems(document, {}) if "corpora.forget" in str(problem)
    ] == [" corpora.forget.rows: [0, 97] goes beyond the 96 of answers.count\n  ask for fewer, or raise answers.count"]
