"""params.yaml is checked before anything runs: one readable line for each fault."""

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.check import problems
from tasks.params.base import load
from tests.imports import ROOT

WIDTHS = {"model.layers.0.mlp.up_proj": [1536, 576], "model.layers.0.mlp.down_proj": [576, 1536]}


@pytest.fixture
def document() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    return copy.deepcopy(loaded)


def faults(document: dict[str, Any], layers: dict[str, list[int]] | None = None) -> list[str]:
    return [str(problem) for problem in problems(document, layers or {})]


def test_the_default_is_sound(document: dict[str, Any]) -> None:
    assert faults(document, WIDTHS) == []


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("prune", "sparsity", 1.0, ["prune.sparsity", "1.0", "less than 1"]),
        ("prune", "sparsity", -0.1, ["prune.sparsity", "greater than or equal to 0"]),
        ("prune", "sparsity", "half", ["prune.sparsity", "'half'", "number"]),
        ("prune", "sparsity", float("nan"), ["prune.sparsity", "finite"]),
        ("prune", "sparcity", 0.5, ["unknown key `prune.sparcity`", "did you mean `sparsity`?"]),
        ("prune", "method", "wonda", ["prune.method", "'wonda'", "'wanda'"]),
        ("prune", "pattern", "4:2", ["prune.pattern", "2:4"]),
        ("prune", "pattern", "1:4", ["prune.sparsity", "1:4 means a sparsity of 0.75"]),
        ("quantize", "bits", 9, ["quantize.bits", "less than or equal to 8"]),
        ("quantize", "group_size", "column", ["quantize.group_size", "'row' or 'tensor'"]),
        ("quantize", "widths", [4, 12], ["quantize.widths", "16"]),
        ("quantize", "widths", [4, 4], ["quantize", "`widths` has a number twice"]),
        ("quantize", "shares", [0.5, 0.4], ["quantize", "`shares` must be one for each of `widths`, and 1 together"]),
        ("quantize", "sequences", 129, ["quantize.sequences", "66,048", "65,536"]),
        ("quantize", "by", "tdmpq", ["quantize.by", "not in the sensitivity table", "set sensitivity.method to tdmpq"]),
        ("retrain", "learning_rate", 0.0, ["retrain.learning_rate", "greater than 0"]),
        ("compute", "device", "tpu", ["compute.device", "'tpu'"]),
        ("prune", "sequences", 129, ["prune.sequences", "66,048", "65,536"]),
        ("allocate", "rule", "owls", ["allocate.rule", "'owls'", "'owl'"]),
        ("allocate", "spread", -0.1, ["allocate.spread", "greater than or equal to 0"]),
        ("allocate", "high", 1.0, ["allocate.high", "less than 1"]),
        ("allocate", "low", 0.96, ["`allocate.high` is 0.95: has to be at least allocate.low, 0.96"]),
        ("allocate", "high", 0.4, ["prune.sparsity", "0.5 cannot be reached", "allocate.high 0.4", "0 to 0.3999"]),
        ("allocate", "low", 0.6, ["prune.sparsity", "0.5 cannot be reached", "allocate.low 0.6", "0.6001 to 0.9499"]),
        ("allocate", "dense", "*", ["allocate.dense", "list"]),
        ("allocate", "dense", ["*.up_proj"], ["0.5 cannot be reached", "1 of 2 layers dense", "0 to 0.4749"]),
        ("allocate", "dense", ["*.up_prj"], ["allocate.dense: `*.up_prj` matches no layer", ".mlp.up_proj`"]),
        ("evaluate", "windows", 65, ["evaluate.windows", "corpora.evaluation.wiki"]),
    ],
)
def test_a_bad_value_is_told_with_its_key(
    document: dict[str, Any], section: str, key: str, value: Any, told: list[str]
) -> None:
    document[section][key] = value
    found = "\n".join(faults(document, WIDTHS))
    for part in told:
        assert part in found


def test_a_missing_key_and_an_unknown_section_are_told(document: dict[str, Any]) -> None:
    del document["prune"]["scope"]
    document["prunes"] = {}
    found = faults(document)
    assert any("`prune.scope` is missing" in fault for fault in found)
    assert any("unknown section `prunes`; did you mean `prune`?" in fault for fault in found)


def test_nested_unknown_key_names_its_neighbours(document: dict[str, Any]) -> None:
    document["corpora"]["evaluation"]["wiki"]["formt"] = "text"
    (fault,) = faults(document)
    assert "corpora.evaluation.wiki.formt" in fault


def test_group_size_that_divides_no_width_names_sizes_that_do(document: dict[str, Any]) -> None:
    document["quantize"]["group_size"] = 128
    (fault,) = faults(document, WIDTHS)
    assert "128 does not divide the 576 inputs" in fault
    assert "16, 32, 64" in fault


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"plan": "budget", "average_bits": 3.0}, ["quantize.average_bits: 3.0 is less than every width", "from 4"]),
        (
            {"embeddings": 4},
            ["quantize.embeddings: transformers does not load an embedding of 4 bits", "valid: null, 8"],
        ),
        ({"group_size": "row", "symmetric": False}, ["quantize.symmetric: transformers does not load asymmetric rows"]),
        ({"plan": "ceiling"}, ["quantize.by: `pmpq` does not say how far the loss rises", "tdmpq, measured"]),
        ({"plan": "budget", "by": "tdmpq", "widths": [5, 8, 16]}, ["quantize.widths: the cost of 5 bits", "and 16"]),
    ],
)
def test_plan_of_bits_that_cannot_be_made_is_told(
    document: dict[str, Any], settings: dict[str, Any], told: list[str]
) -> None:
    document["sensitivity"]["method"] = settings.get("by", "pmpq")
    document["quantize"] |= settings
    found = "\n".join(faults(document, WIDTHS))
    for part in told:
        assert part in found


@pytest.mark.parametrize(
    ("settings", "tune", "told"),
    [
        (
            {"method": "none"},
            {"steps": 5},
            ["quantize.tune.steps: 5 steps are to tune scales, but no layer is rounded"],
        ),
        ({"widths": [16], "shares": [1.0]}, {"steps": 5}, ["quantize.tune.steps", "a width below 16"]),
        ({}, {"steps": 5, "held_out": 200}, ["quantize.tune.length", "102,912 tokens", "corpora.training"]),
        ({}, {"stepz": 5}, ["unknown key `quantize.tune.stepz`; did you mean `steps`?"]),
        ({}, {"distillation": 1.5}, ["quantize.tune.distillation", "less than or equal to 1"]),
    ],
)
def test_tuning_that_cannot_be_done_is_told(
    document: dict[str, Any], settings: dict[str, Any], tune: dict[str, Any], told: list[str]
) -> None:
    document["unlearn"]["method"] = "none"
    document["quantize"] |= settings
    document["quantize"]["tune"] |= tune
    (fault,) = faults(document, WIDTHS)
    for part in told:
        assert part in fault


def test_pattern_that_does_not_divide_names_the_layer(document: dict[str, Any]) -> None:
    document["prune"] |= {"pattern": "5:10", "sparsity": 0.5}
    (fault,) = faults(document, WIDTHS)
    assert "576" in fault
    assert "mlp.up_proj" in fault


def test_stages_that_contradict_each_other_are_told(document: dict[str, Any]) -> None:
    document["prune"]["method"] = "none"
    document["sensitivity"]["method"] = "none"
    found = "\n".join(faults(document))
    assert "mask_lora trains under the pruning mask" in found
    assert "sensitivity.method is `none`" in found


CYCLES = {
    "first": {"source": "data/taught", "sparsity": 0.2},
    "second": {"source": "data/imp/first", "sparsity": 0.4},
}
FINISH = {"source": "data/imp/second", "method": "magnitude"}


@pytest.mark.parametrize(
    "finish", [{}, FINISH, FINISH | {"sparsity": 0.4, "scope": "layer"}, {"source": "data/imp/first", "method": "none"}]
)
def test_cycles_that_grow_are_sound(document: dict[str, Any], finish: dict[str, Any]) -> None:
    document["imp"]["cycles"] = CYCLES
    document["prune"] |= finish
    assert faults(document, WIDTHS) == []


@pytest.mark.parametrize(
    ("cycles", "finish", "told"),
    [
        (CYCLES | {"third": {"source": "data/imp/forth", "sparsity": 0.5}}, {}, [
            "imp.cycles.third.source", "`data/imp/forth`", "valid: data/taught, data/imp/first, data/imp/second",
        ]),
        (dict(reversed(CYCLES.items())), {}, ["imp.cycles.second.source", "`data/imp/first`", "valid: data/taught"]),
        (CYCLES | {"third": {"source": "data/imp/second", "sparsity": 0.4}}, {}, [
            "imp.cycles.third.sparsity", "0.4 is not above the 0.4 of data/imp/second", "valid: above 0.4",
        ]),
        ({"First!": CYCLES["first"]}, {}, ["imp.cycles.First!"]),
        ({"first": {"source": "data/taught", "sparsety": 0.2}}, {}, [
            "unknown key `imp.cycles.first.sparsety`; did you mean `sparsity`?",
        ]),
        (CYCLES, {"source": "data/imp/third"}, ["prune.source", "`data/imp/third`", "data/imp/first, data/imp/second"]),
        ({}, {"source": "data/retrained"}, ["prune.source", "`data/retrained`", "valid: data/taught"]),
        (CYCLES, FINISH | {"sparsity": 0.3}, ["prune.sparsity", "0.3 is below the 0.4 of data/imp/second", "from 0.4"]),
        (CYCLES, FINISH | {"method": "wanda"}, ["prune.method", "`wanda`", "valid: magnitude, none"]),
        (CYCLES, FINISH | {"pattern": "2:4"}, ["prune.pattern", "`2:4`", "valid: unstructured"]),
        (CYCLES, FINISH | {"scope": "row"}, ["prune.scope", "`row`", "valid: auto, layer"]),
    ],
)  # fmt: skip
def test_cycles_that_do_not_grow_are_told(
    document: dict[str, Any], cycles: dict[str, Any], finish: dict[str, Any], told: list[str]
) -> None:
    document["imp"]["cycles"] = cycles
    document["prune"] |= finish
    found = faults(document, WIDTHS)
    assert any(all(part in fault for part in told) for fault in found), found


def test_cycles_need_text_to_retrain_on(document: dict[str, Any]) -> None:
    document["imp"]["retrain"]["length"] = 80_000
    assert faults(document) == []
    document["imp"]["cycles"] = CYCLES
    (fault,) = faults(document)
    assert "imp.retrain.length" in fault


def test_values_are_read_as_dvc_writes_them(tmp_path: Path) -> None:
    """By YAML 1.1 an unquoted 2:4 is the number 124 and 1e-07 a text; `dvc exp run --set` writes both unquoted."""
    file = tmp_path / "params.yaml"
    file.write_text("prune: {pattern: 2:4}\nretrain: {learning_rate: 1e-07}\n")
    assert load(file) == {"prune": {"pattern": "2:4"}, "retrain": {"learning_rate": 1e-7}}


def test_every_fault_is_told_at_once(document: dict[str, Any]) -> None:
    document["prune"] |= {"sparsity": 2.0, "method": "wonda"}
    document["quantize"]["bits"] = 1
    assert len("\n".join(faults(document)).splitlines()) >= 3


def test_the_command_says_it_without_a_traceback(tmp_path: Path, document: dict[str, Any]) -> None:
    document["prune"]["sparsity"] = 1.5
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(document))
    command = [sys.executable, "-m", "tasks.check"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: params.yaml: `prune.sparsity` is 1.5")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("content", "told"), [("a: [", "not valid YAML"), ("- 1", "not a mapping")])
def test_a_file_that_is_no_mapping_is_told(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "params.yaml").write_text(content)
    command = [sys.executable, "-m", "tasks.check"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_one_ratio_for_all_layers_takes_one_rule(document: dict[str, Any]) -> None:
    document["prune"] |= {"pattern": "2:4", "sparsity": 0.5}
    document["allocate"] |= {"low": 0.6, "dense": ["*.up_proj"]}  # bounds are not for N:M
    assert faults(document, WIDTHS) == []
    document["allocate"]["rule"] = "global"
    (fault,) = faults(document, WIDTHS)
    assert "allocate.rule: `global` gives layers different sparsities, but 2:4 has only one" in fault
    assert "valid: uniform" in fault


def test_a_rule_without_its_column_is_told(document: dict[str, Any]) -> None:
    document["sensitivity"]["method"] = "none"
    document["allocate"]["rule"] = "pmpq"
    assert any("allocate.rule: `pmpq`" in fault for fault in faults(document))
    document["allocate"]["rule"] = "owl"
    assert not any("allocate" in fault for fault in faults(document))


def test_a_rule_goes_by_the_measure_that_runs(document: dict[str, Any]) -> None:
    document["allocate"]["rule"] = "pmpq"
    document["sensitivity"]["method"] = "tdmpq"
    assert any("sensitivity.method is `tdmpq`" in fault for fault in faults(document))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": "cmqp"}, ["sensitivity.method", "'cmqp'", "'cmpq'"]),
        ({"widths": [4, 9]}, ["sensitivity.widths.1", "less than or equal to 8"]),
        ({"widths": []}, ["sensitivity.widths", "at least 1 item"]),
        ({"widths": [4, 4]}, ["sensitivity.widths", "each width once"]),
        ({"method": "tdmpq", "group_size": 128}, ["sensitivity.group_size", "128 does not divide the 576 inputs"]),
        ({"method": "cmpq", "sequences": 40}, ["sensitivity.sequences", "40 sequences", "above 40"]),
    ],
)
def test_sensitivity_that_cannot_be_measured_is_told(
    document: dict[str, Any], changes: dict[str, Any], told: list[str]
) -> None:
    document["sensitivity"] |= changes
    found = "\n".join(faults(document, WIDTHS))
    for part in told:
        assert part in found


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "cmpq", "sequences": 41},
        {"method": "cmpq", "sequences": 3, "similarity": "cka"},
        {"method": "pmpq", "group_size": 128},
        {"method": "measured", "per": "layer", "widths": [8, 2]},
    ],
)
def test_every_measure_can_be_asked_for(document: dict[str, Any], changes: dict[str, Any]) -> None:
    document["sensitivity"] |= changes
    own = ("params.yaml: sensitivity", "params.yaml: `sensitivity")
    assert not any(fault.startswith(own) for fault in faults(document, WIDTHS))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"export": {"formats": ["onnx"]}}, ["export.formats.0", "'onnx'", "'gguf'"]),
        ({"export": {"formats": ["gguf", "gguf"]}}, ["export.formats", "each format once"]),
        ({"export": {"source": "model"}}, ["export.source", "'model'", "'pruned'"]),
        (
            {"export": {"formats": ["gguf"]}, "quantize": {"group_size": 48}},
            ["export.formats", "blocks of 32", "quantize.group_size, 48", "multiple of 32"],
        ),
        (
            {"export": {"formats": ["gguf"], "source": "retrained"}, "retrain": {"method": "lora"}},
            ["export.source", "`retrained` has the adapter", "valid: pruned"],
        ),
        (
            {"export": {"formats": ["compact"]}, "prune": {"method": "none"}},
            ["export.formats", "compact leaves pruned weights out", "prune.method is `none`"],
        ),
    ],
)
def test_an_export_that_cannot_be_is_told(
    document: dict[str, Any], changes: dict[str, dict[str, Any]], told: list[str]
) -> None:
    for section, values in changes.items():
        document[section] |= values
    found = "\n".join(faults(document))
    for part in told:
        assert part in found


@pytest.mark.parametrize("source", ["pruned", "retrained"])
def test_groups_do_not_matter_to_what_is_exported_before_them(document: dict[str, Any], source: str) -> None:
    document["export"] |= {"source": source, "formats": ["gguf"]}
    document["quantize"]["group_size"] = 48
    assert not any("export" in fault for fault in faults(document, WIDTHS))


def test_a_model_that_gguf_is_not_written_for_is_told(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "data" / "model" / "config.json"
    config.parent.mkdir(parents=True)
    document["export"]["formats"] = ["gguf"]
    for architecture, count in (("GemmaForCausalLM", 1), ("LlamaForCausalLM", 0)):
        config.write_text(f'{{"architectures": ["{architecture}"]}}')
        assert len([fault for fault in faults(document, WIDTHS) if "is not written as GGUF" in fault]) == count


def test_bounds_are_not_looked_at_where_nothing_is_pruned(document: dict[str, Any]) -> None:
    document["prune"]["method"] = "none"
    document["allocate"] |= {"high": 0.1, "rule": "pmpq"}
    document["sensitivity"]["method"] = "none"
    assert not any("allocate" in fault for fault in faults(document, WIDTHS))


def test_a_cycle_is_gone_on_with_evenly(document: dict[str, Any]) -> None:
    document["imp"]["cycles"] = {"first": {"source": "data/taught", "sparsity": 0.3}}
    document["prune"] |= {"source": "data/imp/first", "method": "magnitude"}
    assert faults(document, WIDTHS) == []
    document["allocate"] |= {"rule": "owl", "low": 0.1, "dense": ["*.up_proj"], "high": 0.99}
    document["prune"]["sparsity"] = 0.4
    found = "\n".join(faults(document, WIDTHS))
    assert "allocate.rule: `owl` does not keep the mask of data/imp/first\n  valid: uniform" in found
    assert "allocate.dense: " in found


def test_a_grid_is_passed_on_only_as_pruning_left_it(document: dict[str, Any]) -> None:
    document["prune"] |= {"method": "sparsegpt", "bits": 4, "group_size": 64}
    document["retrain"]["method"] = "subset"
    document["quantize"] |= {"method": "given", "plan": "uniform"}
    assert faults(document, WIDTHS) == []
    document["retrain"]["method"] = "mask_lora"
    document["quantize"]["bits"] = 8
    found = "\n".join(faults(document, WIDTHS))
    assert "retrain.method: mask_lora does not keep the grid of prune.bits" in found
    assert "quantize.bits: 8 does not keep the grid of prune.bits" in found
    document["prune"] |= {"method": "wanda", "group_size": 100}
    found = "\n".join(faults(document, WIDTHS))
    assert "prune.bits: wanda does not round" in found
    assert "prune.group_size: 100 does not divide the 576 inputs" in found
    assert "`given` is the grid of prune.bits, but there is none" in found


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": "block", "distillation": 0.5}, ["retrain.distillation", "not for block", "valid: 0.0"]),
        (
            {"objective": "half_block", "held_out": 4},
            ["retrain.held_out", "`4` is for objective next_token", "valid: 0"],
        ),
        ({"objective": "block", "head": True}, ["retrain.head", "valid: false"]),
        ({"search": [1e-4, 1e-3]}, ["retrain.search", "retrain.held_out is 0"]),
        ({"patience": 2}, ["retrain.patience", "judged on text that is not trained on"]),
        ({"held_out": 500}, ["retrain.length", "tokens are needed of corpora.training"]),
        ({"targets": ["*.up_proj", "*.query"]}, ["retrain.targets", "`*.query` matches no layer", "up_proj"]),
        ({"method": "lora"}, ["quantize.method", "`gptq` would change the weights under the adapter"]),
        ({"method": "lora"}, ["unlearn.method", "`refuse`", "valid: none"]),
        ({"processes": 2, "accumulation": 3}, ["retrain.processes", "2 processes cannot share 3 batches"]),
        ({"processes": 2, "accumulation": 2, "objective": "block"}, ["retrain.processes", "valid: 1"]),
        ({"method": "lora", "objective": "block"}, ["retrain.objective", "`block` merges each block"]),
        ({"dropout": 1.0}, ["retrain.dropout", "less than 1"]),
    ],
)
def test_retraining_that_cannot_be_is_told(document: dict[str, Any], changes: dict[str, Any], told: list[str]) -> None:
    document["retrain"] |= changes
    found = faults(document, WIDTHS)
    assert any(all(part in fault for part in told) for fault in found), found


UNLEARN = ("params.yaml: unlearn", "params.yaml: `unlearn")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": "npo"}, ["unlearn.beta: npo reads it, but it is null", "the paper has 0.1"]),
        ({"method": "simnpo", "beta": 4.5}, ["unlearn.delta: simnpo reads it", "the paper has 0.0"]),
        ({"method": "rmu", "steering": 20.0}, ["unlearn.block: rmu reads it, but it is null", "the paper has 7"]),
        ({"method": "rmu", "block": 1, "steering": 2.0}, ["unlearn.block: there is no block 1", "valid: 0 to 0"]),
        ({"method": "dpo", "beta": 0.1, "refusals": []}, ["unlearn.refusals: dpo reads it, but it is []", "know"]),
        ({"method": "refuse", "refusals": []}, ["unlearn.refusals: refuse reads it, but it is []", "know"]),
        ({"targets": ["*.up_proj", "*.query"]}, ["unlearn.targets", "`*.query` matches no layer", "up_proj"]),
        ({"prompt": 128}, ["unlearn.prompt: a prompt of 128 tokens", "of 128 leaves no answer", "valid: 1 to 127"]),
        ({"forget_ceiling": "reference"}, ["unlearn.forget_ceiling: `reference`", "teach.method is `none`"]),
        ({"forget_ceiling": "referense"}, ["unlearn.forget_ceiling", "'referense'", "'reference' or 'control'"]),
        ({"forget_ceiling": 0.0}, ["unlearn.forget_ceiling", "greater than 0"]),
        ({"retain_ceiling": -0.1}, ["unlearn.retain_ceiling", "greater than 0"]),
        ({"held_out": 0}, ["unlearn.held_out", "greater than 0"]),
        ({"length": 9000}, ["unlearn.length", "9,000 tokens are needed of corpora.neighbours", "holds 4,096"]),
        ({"held_out": 600}, ["unlearn.length", "76,928 tokens are needed of corpora.training"]),
        ({"method": "nop"}, ["unlearn.method", "'nop'", "'npo'"]),
    ],
)
def test_unlearning_that_cannot_be_is_told(document: dict[str, Any], changes: dict[str, Any], told: list[str]) -> None:
    document["corpora"]["neighbours"] = document["corpora"]["training"] | {"tokens": [0, 4096]}
    document["unlearn"] |= changes
    found = "\n".join(faults(document, WIDTHS))
    for part in told:
        assert part in found


def test_a_sequence_of_the_control_text_is_needed_to_stop_by_it(document: dict[str, Any]) -> None:
    document["corpora"]["control"] = document["corpora"]["training"] | {"tokens": [0, 100]}
    told = "unlearn.length: 128 tokens are needed of corpora.control, whose slice [0, 100]"
    for ceiling, count in ((3.0, 0), ("control", 1)):
        document["unlearn"]["forget_ceiling"] = ceiling
        assert sum(told in fault for fault in faults(document, WIDTHS)) == count


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "gradient_ascent", "forget_ceiling": None},
        {"method": "llmu", "retain_ceiling": 0.05, "kl_ceiling": 0.1, "seconds": 240.0},
        {"method": "npo", "beta": 0.1},
        {"method": "simnpo", "beta": 4.5, "delta": 0.0},
        {"method": "dpo", "beta": 0.1},
        {"method": "refuse", "forget_ceiling": None},
        {"method": "rmu", "block": 0, "steering": 6.5, "targets": ["*.down_proj"]},
        {"method": "undial", "beta": 10.0, "prompt": 32, "train": "scales"},
        {"method": "none", "prompt": 1000, "targets": ["nothing"]},
    ],
)
def test_every_objective_can_be_asked_for(document: dict[str, Any], changes: dict[str, Any]) -> None:
    document["unlearn"] |= changes
    assert not any(fault.startswith(UNLEARN) for fault in faults(document, WIDTHS))


def test_scales_learn_where_there_is_a_grid(document: dict[str, Any]) -> None:
    document["unlearn"]["train"] = "scales"
    document["quantize"]["method"] = "none"
    assert any("unlearn.train: `scales` of a grid, but quantize.method" in fault for fault in faults(document, WIDTHS))


def test_a_taught_model_is_unlearned_as_far_as_one_that_never_was(document: dict[str, Any]) -> None:
    document["teach"]["method"] = "lora"
    document["unlearn"]["forget_ceiling"] = "reference"
    assert not any(fault.startswith(UNLEARN) for fault in faults(document, WIDTHS))


def test_a_cycle_cannot_leave_an_adapter_apart(document: dict[str, Any]) -> None:
    document["imp"]["retrain"]["method"] = "lora"
    assert faults(document) == []
    document["imp"]["cycles"] = CYCLES
    assert any("imp.retrain.method: `lora` leaves an adapter" in fault for fault in faults(document))


def test_examples_in_the_docs_are_sound(document: dict[str, Any]) -> None:
    text = (ROOT / "docs/parameters.md").read_text(encoding="utf-8")
    examples = [yaml.safe_load(part) for part in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert len(examples) == 2
    for example in examples:
        changed = {name: values | example.get(name, {}) for name, values in document.items()}
        assert faults(changed) == []


SURGEON = {"method": "surgeon", "sparsity": 0.2}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"prune": {"pattern": "rows+columns"}},
            ["prune.pattern", "wanda prunes single weights", "prune.method surgeon"],
        ),
        ({"prune": SURGEON | {"pattern": "rows+units"}}, ["prune.pattern", "rows+columns, units, heads"]),
        ({"prune": SURGEON | {"pattern": "rows"}, "allocate": {"rule": "owl"}}, ["allocate.rule", "`owl`", "global"]),
        ({"prune": SURGEON | {"scope": "row"}}, ["prune.scope", "`row` is not for surgeon", "auto, layer"]),
        ({"prune": SURGEON | {"source": "data/imp/one"}}, ["prune.source", "data/imp/one", "valid: data/taught"]),
        ({"prune": SURGEON, "surgeon": {"samples": 3}}, ["surgeon.samples", "one next token", "labels sampled"]),
        (
            {"prune": SURGEON, "surgeon": {"shots": 1, "correction_steps": 9}},
            ["surgeon.correction_steps", "between shots"],
        ),
        (
            {"prune": SURGEON | {"pattern": "units"}, "surgeon": {"multiple": 16}},
            ["surgeon.multiple", "16 are not all multiples of quantize.group_size, 64", "a multiple of 64"],
        ),
        ({"prune": SURGEON, "surgeon": {"curvature": "hessian"}}, ["surgeon.curvature", "'hessian'", "'kfac'"]),
    ],
)
def test_surgery_that_cannot_be_is_told(
    document: dict[str, Any], changes: dict[str, dict[str, Any]], told: list[str]
) -> None:
    for section, values in changes.items():
        document[section] |= values
    found = "\n".join(faults(document, WIDTHS))
    for part in told:
        assert part in found


@pytest.mark.parametrize(
    "pattern", ["unstructured", "rows", "columns", "rows+columns", "units", "heads", "units+heads"]
)
def test_every_structure_can_be_asked_for(document: dict[str, Any], pattern: str) -> None:
    document["prune"] |= SURGEON | {"pattern": pattern}
    assert faults(document, WIDTHS) == []


OWN = {"source": "file://data/answers/harmful.jsonl", "sha256": None, "format": "pairs", "frame": "chat"}
ARTICLES = {"source": "file://wiki.txt", "sha256": None, "format": "articles_as_questions", "frame": "chat"}
ENOUGH = {"forget": OWN | {"rows": [0, 64]}, "control": OWN | {"rows": [64, None]}}


def asking(document: dict[str, Any], roles: dict[str, Any], **changes: Any) -> list[str]:
    """Faults where the model's own answers, 96 of them, are unlearned."""
    document["answers"] |= {"prompts": [{"source": "file://prompts.jsonl", "sha256": None}], "count": 96}
    document["evaluate"]["harm_answers"] = 32
    document["corpora"] |= roles
    for section, values in changes.items():
        document[section] |= values
    return faults(document)


def test_questions_that_suffice_are_sound(document: dict[str, Any]) -> None:
    assert asking(document, ENOUGH) == []
    several = OWN | {"source": "file://rows.json", "rows": [0, 1]}  # a row may have any number of answers
    assert asking(document, {"forget": several}) == []


@pytest.mark.parametrize(
    ("roles", "changes", "told"),
    [
        ({}, {"answers": {"count": 32}}, ["corpora.forget.rows: [0, 64] goes beyond the 32 of answers.count"]),
        ({}, {"answers": {"count": 64}}, ["corpora.control.rows: [64, null] goes beyond the 64 of answers.count"]),
        ({}, {"evaluate": {"harm_answers": 33}}, ["evaluate.harm_answers: 33 questions", "corpora.control", "hold 32"]),
        (
            {"forget": OWN | {"rows": [0, 8]}},
            {"evaluate": {"harm_answers": 8}},
            ["evaluate.forget_windows: 16 questions are needed of corpora.forget, whose rows hold 8"],
        ),
        (
            {},
            {"attack": {"requantize": [4], "samples": 50, "windows": 20}},
            ["attack.samples: 70 questions are needed of corpora.forget, whose rows hold 64"],
        ),
        (
            {"retained": ARTICLES | {"rows": [100, 110]}},
            {},
            ["evaluate.forget_windows: 16 questions are needed of corpora.retained, whose rows hold 10"],
        ),
    ],
)
def test_questions_that_are_too_few_are_told(
    document: dict[str, Any], roles: dict[str, Any], changes: dict[str, Any], told: list[str]
) -> None:
    found = "\n".join(asking(document, ENOUGH | roles, **changes))
    assert all(part in found for part in told)
