"""`--set key=value` from the command line to DVC's grammar and back."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from flows import overrides
from flows.errors import Problem
from tasks.check import problems
from tests.imports import ROOT

PARAMS = """\
prune: {sparsity: 0.5, pattern: unstructured, deep: {tokens: [0, 8]}}
retrain: {rate: 5.0e-4, biases: true}
"""


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("prune.sparsity=0.6", 0.6),
        ("prune.sparsity=0", 0),
        ("retrain.rate=1e-7", 1e-7),
        ("retrain.biases=false", False),
        ("prune.pattern=2:4", "2:4"),
        ("prune.pattern='0.5'", "0.5"),
        ("prune.pattern=null", None),
        ("prune.pattern=a=b", "a=b"),
        (
            "prune.pattern=file://some folder/x,y{z}$(touch gone);`w`",
            "file://some folder/x,y{z}$(touch gone);`w`",
        ),
        ('prune.pattern=it\'s "so"', 'it\'s "so"'),
        ("prune.deep.tokens=[16, null]", [16, None]),
        ("prune.deep={tokens: [1, 2]}", {"tokens": [1, 2]}),
    ],
)
def test_a_value_reaches_the_params_file_of_the_experiment(tmp_path: Path, pair: str, value: Any) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS)
    found = overrides.parse([pair], overrides.load(path))
    apply_overrides(path, overrides.arguments(found)[1::2])  # what `dvc exp run -S` does with it
    document = overrides.load(path)  # as DVC reads it: YAML 1.2, where 2:4 is a word and 1e-07 a number
    place: Any = document
    for section in pair.partition("=")[0].split("."):
        place = place[section]
    assert place == value
    assert type(place) is type(value)
    assert overrides.replaced(yaml.safe_load(PARAMS), found) == document


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("prune.sparcity=1", "did you mean `prune.sparsity`?"),
        ("quux=1", "valid: "),
        ("prune.sparsity", "key=value"),
        ("~prune.sparsity=1", "key=value"),
        ("+prune.sparsity=1", "key=value"),
        ("prune.deep.tokens=[1", "not valid YAML"),
        ("prune.pattern=${oc.env:HOME}", "cannot take"),
    ],
)
def test_what_cannot_be_set_is_told(pair: str, message: str) -> None:
    params = yaml.safe_load(PARAMS)
    with pytest.raises(Problem, match=re.escape(message)):
        overrides.arguments(overrides.parse([pair], params))


def test_a_file_is_laid_over_key_by_key(tmp_path: Path) -> None:
    params, file = tmp_path / "params.yaml", tmp_path / "mine.yaml"
    params.write_text(PARAMS + "imp: {cycles: {}, deep: 1}\ncorpora: {forget: {format: pairs, rows: [0, 8]}}\n")
    file.write_text(
        "prune: {pattern: 2:4, deep: {tokens: [8, null]}}\n"
        "imp: {cycles: {first: {source: data/taught, sparsity: 0.2}}}\n"
        "corpora: {forget: {format: text, tokens: [0, 8]}}\n"
    )
    document, values = overrides.read(params, file, ["prune.sparsity=0.6", "prune.pattern=1:4"])
    changed = overrides.replaced(document, values)
    assert changed == {
        "prune": {"sparsity": 0.6, "pattern": "1:4", "deep": {"tokens": [8, None]}},
        "retrain": document["retrain"],
        "imp": {"cycles": {"first": {"source": "data/taught", "sparsity": 0.2}}, "deep": 1},
        "corpora": {"forget": {"format": "text", "tokens": [0, 8]}},  # its keys hang on its format
    }
    apply_overrides(params, overrides.arguments(values)[1::2])
    assert overrides.load(params) == changed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune: {sparcity: 1}", "mine.yaml: params.yaml has no key `prune.sparcity`; did you mean `prune.sparsity`?"),
        ("prone: {sparsity: 0.6}", "mine.yaml: params.yaml has no key `prone`; did you mean `prune`?"),
        ("prune: 0.6", "mine.yaml: `prune` is a section of params.yaml, not one value"),
        ("prune: {deep: null}", "mine.yaml: `prune.deep` is a section"),
        ("- prune", "mine.yaml: not a mapping of sections"),
        ("prune: [", "mine.yaml: "),
    ],
)
def test_what_a_file_cannot_change_is_told(tmp_path: Path, text: str, message: str) -> None:
    params, file = tmp_path / "params.yaml", tmp_path / "mine.yaml"
    params.write_text(PARAMS)
    file.write_text(text)
    with pytest.raises(Problem, match=re.escape(message)):
        overrides.read(params, file, [])
    with pytest.raises(Problem, match=r"other\.yaml"):
        overrides.read(params, tmp_path / "other.yaml", [])


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_experiments_that_come_along_are_sound(tmp_path: Path, file: Path) -> None:
    document, values = overrides.read(ROOT / "params.yaml", file, [])
    changed = overrides.replaced(document, values)
    assert [str(problem) for problem in problems(changed, {})] == []
    copy = tmp_path / "params.yaml"
    copy.write_bytes((ROOT / "params.yaml").read_bytes())
    apply_overrides(copy, overrides.arguments(values)[1::2])
    assert overrides.load(copy) == changed


def test_no_shell_is_between_a_value_and_dvc(tmp_path: Path) -> None:
    words = overrides.arguments({"prune.pattern": "$(touch gone)"})
    subprocess.run(["true", *words], cwd=tmp_path, check=True)
    assert words == ["-S", "prune.pattern='$(touch gone)'"]
    assert not (tmp_path / "gone").exists()
