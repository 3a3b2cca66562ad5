"""The real SmolLM2-135M through every stage, with small settings, as `dvc repro` runs them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.checkpoints import CHECKPOINTS
from tests.imports import ROOT

OWN = {"source": "file://data/answers/harmful.jsonl", "sha256": None, "format": "pairs", "frame": "chat"}

TUNE = {
    "steps": 2, "sequences": 1, "length": 64, "distillation": 1.0, "learning_rate": 1e-3, "warmup": 0.5, "clip": 1.0,
    "held_out": 2, "check_every": 1, "seed": 0,
}  # fmt: skip

SMALL: dict[str, dict[str, Any]] = {
    "answers": {"count": 5, "tokens": 8},
    "corpora": {"forget": OWN | {"rows": [0, 3]}, "control": OWN | {"rows": [3, 5]}},
    "calibrate": {"sequences": 2, "length": 128},
    "sensitivity": {"sequences": 1, "length": 64},
    "prune": {"sequences": 8, "length": 128},
    "retrain": {"steps": 3, "sequences": 1, "length": 64},
    "quantize": {"sequences": 8, "length": 128, "tune": TUNE},
    "unlearn": {"steps": 3, "sequences": 1, "length": 64, "learning_rate": 5e-3},
    "export": {"formats": ["gguf", "compact"]},
    "evaluate": {"windows": 2, "length": 128, "forget_windows": 2, "answers": 1, "harm_answers": 1, "answer_tokens": 8},
    "speed": {"prefill": 32, "decode": 4, "repeats": 1},
}

# Hidden units and heads are cut out of the model.
STRUCTURES = {"method": "surgeon", "pattern": "units+heads", "sparsity": 0.2}

MEASURED = {name: folder for name, folder in CHECKPOINTS.items() if name != "taught"}  # which is the dense one here

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(workspace: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone's working tree with small settings, brought up to date by `dvc repro`."""
    folder = tmp_path_factory.mktemp("pipeline") / "pareline"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    run(folder, "git", "init", "--quiet")
    edit(folder, SMALL)
    run(folder, "dvc", "repro")
    return folder


def edit(workspace: Path, changes: dict[str, dict[str, Any]]) -> None:
    file = workspace / "params.yaml"
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    for section, values in changes.items():
        document[section] |= values
    file.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


@pytest.fixture
def params(workspace: Path) -> Iterator[None]:
    """Puts params.yaml back after a test that edits it."""
    before = (workspace / "params.yaml").read_bytes()
    yield
    (workspace / "params.yaml").write_bytes(before)


def changed_stages(workspace: Path) -> set[str]:
    return set(json.loads(run(workspace, "dvc", "status", "--json").stdout))


def metrics(workspace: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((workspace / "data/report/metrics.json").read_text())
    return loaded


def test_the_report_tells_of_every_checkpoint_but_one_that_was_not_taught(workspace: Path) -> None:
    figures = metrics(workspace)
    assert list(figures) == list(MEASURED)
    for kind in ("evaluation", "speed"):
        taught = json.loads((workspace / f"data/{kind}/taught.json").read_text())
        assert taught == {"checkpoint": "taught", "same_as": "dense"}
    for name, row in figures.items():
        assert set(row["perplexity"]) == {"wiki", "technical"}
        assert row["revived_weights"] == 0
        assert row["sparsity"] == (0.0 if name == "dense" else 0.5)
        assert row["tokens_per_second"]["decode"] > 0
    assert figures["dense"]["perplexity"]["wiki"] < figures["pruned"]["perplexity"]["wiki"]
    assert figures["quantized"]["bytes"] < 0.55 * figures["dense"]["bytes"]
    assert figures["quantized"]["bytes"] == figures["unlearned"]["bytes"]
    tuned = json.loads((workspace / "data/quantized/manifest.json").read_text())["training"]
    assert len(tuned["held_out"]) == 1 + TUNE["steps"]
    assert "held-out loss" in (workspace / "data/report/index.html").read_text()


@pytest.mark.parametrize(("name", "folder"), MEASURED.items())
def test_transformers_loads_every_checkpoint_and_gives_the_evaluated_figure(
    workspace: Path, name: str, folder: str
) -> None:
    assert_loaded_gives_the_evaluated_figure(workspace, name, folder)


def assert_loaded_gives_the_evaluated_figure(workspace: Path, name: str, folder: str) -> None:
    """What was evaluated, by our own walk, is what a user gets from `from_pretrained`."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = workspace / "data" / folder
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    assert AutoTokenizer.from_pretrained(path)("Hello world").input_ids
    tokens = load_file(workspace / "data/corpora/evaluation/wiki.safetensors")["tokens"][:256].view(2, 128).long()
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.double() for row in tokens]
    evaluated = json.loads((workspace / f"data/evaluation/{name}.json").read_text())["perplexity"]["wiki"]
    assert torch.stack(losses).mean().exp().item() == pytest.approx(evaluated, rel=2e-2)


def test_the_mask_is_the_same_file_from_prune_to_unlearn(workspace: Path) -> None:
    masks = {
        folder: (workspace / "data" / folder / "masks.safetensors").read_bytes()
        for folder in list(MEASURED.values())[1:]
    }
    assert len(set(masks.values())) == 1


def test_unlearning_leaves_every_code_alone(workspace: Path) -> None:
    """And so the mask; what learns is the scales of the grid and the norms."""
    from safetensors.torch import load_file

    moved = set()
    for file in sorted((workspace / "data/quantized").glob("block-*.safetensors")):
        before, after = load_file(file), load_file(workspace / "data/unlearned" / file.name)
        moved |= {name for name in before if not before[name].equal(after[name])}
    assert all(name.endswith(("weight_scale", "norm.weight")) for name in moved)
    assert any(name.endswith("weight_scale") for name in moved)


def test_nothing_changed_runs_nothing(workspace: Path) -> None:
    assert changed_stages(workspace) == set()
    assert "Running stage" not in run(workspace, "dvc", "repro").stdout


@pytest.mark.parametrize(
    ("section", "key", "value", "stages"),
    [
        ("evaluate", "windows", 3, {f"evaluate@{name}" for name in CHECKPOINTS}),
        ("speed", "decode", 5, {f"speed@{name}" for name in CHECKPOINTS}),
        ("retrain", "steps", 4, {"retrain"}),
        ("quantize", "group_size", 32, {"quantize"}),
        ("calibrate", "sequences", 3, {"calibrate"}),
        ("teach", "steps", 5, {"teach"}),
        ("prune", "method", "magnitude", {"prune", "allocate"}),
    ],
)
def test_a_changed_key_touches_only_the_stages_that_read_it(
    workspace: Path, params: None, section: str, key: str, value: Any, stages: set[str]
) -> None:
    edit(workspace, {section: {key: value}})
    assert changed_stages(workspace) == stages


def test_dvc_shows_the_metrics_and_the_plots(workspace: Path) -> None:
    shown = json.loads(run(workspace, "dvc", "metrics", "show", "--json").stdout)
    (data,) = (entry["data"] for entry in shown[""]["data"].values())
    assert data == metrics(workspace)
    plots = json.loads(run(workspace, "dvc", "plots", "show", "--json").stdout)["data"]
    assert "Perplexity against size" in plots
    assert all(plot[0]["content"]["data"]["values"] for plot in plots.values()), "a plot without points"


def test_a_stage_killed_half_way_goes_on_and_ends_with_the_same_bytes(workspace: Path) -> None:
    finished = (workspace / "data/pruned/manifest.json").read_bytes()
    journal = workspace / ".work/prune"
    command = [sys.executable, "-m", "tasks.prune"]
    with subprocess.Popen(command, cwd=workspace, stderr=subprocess.PIPE, text=True) as stage:
        while not list(journal.glob("*/checkpoint/block-00003.safetensors")):
            assert stage.poll() is None, stage.stderr.read() if stage.stderr else ""
            time.sleep(0.02)
        stage.send_signal(signal.SIGKILL)
    assert (workspace / "data/pruned/manifest.json").read_bytes() == finished, "a half-written stage was published"
    (first,) = journal.glob("*/checkpoint/block-00000.safetensors")
    written = first.stat().st_mtime_ns
    with subprocess.Popen(command, cwd=workspace, stderr=subprocess.PIPE, text=True) as stage:
        while stage.poll() is None and first.exists():
            assert first.stat().st_mtime_ns == written, "a finished block was computed again"
            time.sleep(0.02)
    assert stage.returncode == 0
    assert (workspace / "data/pruned/manifest.json").read_bytes() == finished
    assert changed_stages(workspace) == set()


def test_a_corrupt_block_is_noticed(workspace: Path) -> None:
    """DVC does not notice it: the damaged object is still read-only in its cache."""
    victim = workspace / "data/pruned/block-00007.safetensors"
    content = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        failed = run(workspace, sys.executable, "-m", "tasks.evaluate", "pruned", check=False)
        assert failed.returncode == 1
        assert "block-00007.safetensors: the file is not the one its manifest names" in failed.stderr
        assert "Traceback" not in failed.stderr
    finally:
        victim.write_bytes(content)


def test_a_bad_override_stops_before_any_work(workspace: Path, params: None) -> None:
    edit(workspace, {"quantize": {"group_size": 128}})
    failed = run(workspace, sys.executable, "-m", "tasks.check", check=False)
    assert failed.returncode == 1
    assert "128 does not divide the 576 inputs" in failed.stderr


def test_two_clean_runs_give_the_same_bytes(workspace: Path) -> None:
    """Everything but the timings and the report that shows them: models, masks, statistics, quality figures."""
    before = output_hashes(workspace)
    shutil.rmtree(workspace / ".work", ignore_errors=True)
    run(workspace, "dvc", "repro", "--force")
    after = output_hashes(workspace)
    timed = {name for name in before if name.startswith("speed@") or name == "report"}
    assert {name: hashes for name, hashes in after.items() if name not in timed} == {
        name: hashes for name, hashes in before.items() if name not in timed
    }


def test_a_model_that_pruning_makes_smaller_goes_through_every_stage(workspace: Path, params: None) -> None:
    """The last test here, as it leaves other checkpoints behind."""
    edit(workspace, SMALL | {"prune": SMALL["prune"] | STRUCTURES, "surgeon": {"shots": 1}})
    run(workspace, "dvc", "repro")
    figures = metrics(workspace)
    dense = figures.pop("dense")
    for name, row in figures.items():
        assert (row["sparsity"], row["revived_weights"]) == (0.0, 0), "what was cut out needs no mask"
        assert 0.2 <= row["removed"] < 0.25
        assert row["parameters"] < 0.9 * dense["parameters"]
        assert row["bytes"] < 0.9 * dense["bytes"]
        assert_loaded_gives_the_evaluated_figure(workspace, name, MEASURED[name])
    page = (workspace / "data/report/index.html").read_text(encoding="utf-8")
    assert "Pruning has made the model smaller" in page


def output_hashes(workspace: Path) -> dict[str, list[str]]:
    """Hashes of every stage's outputs, as dvc.lock has them."""
    lock = yaml.safe_load((workspace / "dvc.lock").read_text(encoding="utf-8"))
    return {name: [out["md5"] for out in stage["outs"]] for name, stage in lock["stages"].items()}
