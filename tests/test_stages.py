"""dvc.yaml against the code: every dependency declared, so that no cache is ever stale."""

import ast
import importlib
from itertools import product
from typing import Any

import pytest
import yaml

from compression.export import FORMATS
from compression.unlearning import TRAINED
from tasks.params.export import Export
from tasks.params.unlearn import Unlearn
from tests.imports import ROOT, needed_files

# stage -> package that holds its methods, whose name params.yaml gives
METHODS = {
    "sensitivity": "compression.sensitivity",
    "allocate": "compression.pruning",
    "imp": "compression.retraining",
    "prune": "compression.pruning",
    "retrain": "compression.retraining",
    "quantize": "compression.quantization",
    "unlearn": "compression.unlearning",
}
# stage -> its section, where it is not called like the stage
SECTIONS = {"download": "model", "corpus": "corpora", "imp": "imp.retrain"}
# stage -> the section that names its method, where it is another stage's
NAMED_IN = {"allocate": "prune"}
STAGES = [
    "download", "answers", "corpus", "teach", "calibrate", *METHODS, "attack", "export", "classifier", "evaluate",
    "speed", "report",
]  # fmt: skip


def registry(stage: str) -> dict[str, str]:
    """Module of each of a stage's methods or formats; empty if there is but one way."""
    if stage == "export":
        return FORMATS
    return dict(importlib.import_module(METHODS[stage]).METHODS) if stage in METHODS else {}


def choices(stage: str) -> dict[str, dict[str, str]]:
    """By key of params.yaml that names one of a stage's modules: the module of each value."""
    found = {f"{method_section(stage)}.method": registry(stage)} if registry(stage) else {}
    return found | ({"unlearn.train": TRAINED} if stage == "unlearn" else {})


def method_section(name: str) -> str:
    """The section of params.yaml that names a stage's method."""
    return NAMED_IN.get(name) or SECTIONS.get(name, name)


CASES = [
    (stage, dict(zip(choices(stage), chosen, strict=True)))
    for stage in STAGES
    for chosen in product(*choices(stage).values())
]


@pytest.fixture(scope="module")
def stages() -> dict[str, Any]:
    document = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return {name: stage.get("do", stage) for name, stage in document.items()}


def declared(stage: dict[str, Any], chosen: dict[str, str]) -> list[str]:
    """Code dependencies of a stage, the chosen values filled in."""
    deps = stage["deps"]
    for key, value in chosen.items():
        deps = [dep.replace(f"${{{key}}}", value) for dep in deps]
    return [dep for dep in deps if dep.startswith(("compression", "tasks"))]


def test_stages_are_those_of_the_design(stages: dict[str, Any]) -> None:
    assert list(stages) == STAGES


@pytest.mark.parametrize(("name", "chosen"), CASES)
def test_declared_code_is_what_the_stage_imports(stages: dict[str, Any], name: str, chosen: dict[str, str]) -> None:
    loaded = needed_files(f"tasks.{name}", *(choices(name)[key][value] for key, value in chosen.items()))
    deps = declared(stages[name], chosen)
    missing = {file for file in loaded if not any(file == dep or file.startswith(dep + "/") for dep in deps)}
    assert not missing, f"dvc.yaml: {name} lacks {sorted(missing)}"
    assert all((ROOT / dep).exists() for dep in deps)


@pytest.mark.parametrize("name", STAGES)
def test_no_code_is_declared_that_no_method_loads(stages: dict[str, Any], name: str) -> None:
    """A dependency too many makes a stage run again for nothing."""
    modules = [module for registered in choices(name).values() for module in registered.values()]
    loaded = needed_files(f"tasks.{name}", *modules)
    deps = {dep for stage, chosen in CASES if stage == name for dep in declared(stages[name], chosen)}
    idle = [dep for dep in deps if dep.endswith(".py") and dep not in loaded and (ROOT / dep).stat().st_size]
    assert not idle, f"dvc.yaml: {name} names {idle}, which it never loads"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_one_file_one_line_one_value(name: str) -> None:
    """The registry, the folder and params.yaml's schema agree."""
    package = METHODS[name]
    registry = importlib.import_module(package).METHODS
    for method, module in registry.items():
        assert module == f"{package}.{method}"
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    section = method_section(name).rpartition(".")[2]
    params = importlib.import_module(f"tasks.params.{section}")
    schema = getattr(params, section.capitalize()).model_json_schema()
    assert set(schema["properties"]["method"]["enum"]) == set(registry)


def test_what_learns_is_one_value() -> None:
    """The registry and params.yaml's schema agree."""
    assert Unlearn.model_json_schema()["properties"]["train"]["enum"] == list(TRAINED)
    assert all(module == f"compression.training.{name}" for name, module in TRAINED.items())


def test_every_format_is_one_value() -> None:
    """The registry and params.yaml's schema agree; each module is there."""
    assert Export.model_json_schema()["properties"]["formats"]["items"]["enum"] == list(FORMATS)
    assert all(module == f"compression.export.{name}" for name, module in FORMATS.items())
    assert all(callable(importlib.import_module(module).write) for module in FORMATS.values())


def test_a_stage_declares_the_section_it_reads(stages: dict[str, Any]) -> None:
    for name, stage in stages.items():
        if name != "report":
            assert SECTIONS.get(name, name) in stage["params"]
            computes = "tasks/core" in stage["deps"]
            assert ("compute" in stage["params"]) == computes


def test_allocate_declares_just_the_keys_of_prune_that_it_reads(stages: dict[str, Any]) -> None:
    code = ast.parse((ROOT / "tasks" / "allocate.py").read_text(encoding="utf-8"))
    read = {
        f"prune.{node.attr}"
        for node in ast.walk(code)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "prune"
    }
    assert {"allocate", *read} == set(stages["allocate"]["params"])
