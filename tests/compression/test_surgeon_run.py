"""LLM Surgeon on a model on disk: exact counts, every way, and a kill anywhere costs no bytes."""

import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compression.core import batches, masks
from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.files import sha256, write_tensors
from compression.pruning.pattern import make_pattern
from compression.surgeon import run
from compression.surgeon.curvature import Curvature
from compression.surgeon.run import Operated, prune_by_curvature
from compression.surgeon.settings import Settings
from compression.surgeon.way import Quota, Task
from tests.compression.helpers import CPU, Killed, all_masks, all_tensors, hashes, lineage, whole_logits, whole_model
from tests.conftest import Make

PATTERNS = ["unstructured", "2:4", "rows", "columns", "rows+columns", "units", "heads", "units+heads"]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
LINES = ["rows", "columns", "rows+columns"]
COUPLED = ["units", "heads", "units+heads"]


def settings(**changed: Any) -> Settings:
    usual: dict[str, Any] = {
        "curvature": Curvature(),
        "damping_inputs": 0.01,
        "damping_outputs": 0.01,
        "shots": 2,
        "update": "correlated",
        "correlate": 64,
        "multiple": 8,
    }
    return Settings(**usual | changed)


def make_task(
    source: Checkpoint,
    pattern: str,
    sparsity: float,
    together: bool = False,
    dense: tuple[str, ...] = (),
    **changed: Any,
) -> Task:
    sparsity = {"2:4": 0.5, "heads": 0.1}.get(pattern, sparsity)  # two heads are a sixth of the tiny model's weights
    quotas = {}
    for layer, (rows, width) in source.layers.items():
        size, free = rows * width, layer not in dense
        dropped = round(sparsity * size) if free else 0
        bounds = (0, int(0.9 * size)) if together and free else (dropped, dropped)
        quotas[layer] = Quota(size, dropped, *bounds)
    return Task(source, make_pattern(pattern, sparsity, "layer"), quotas, together, settings(**changed))


def operate(task: Task, target: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Checkpoint, Operated]:
    writer = CheckpointWriter(target, task.source.folder)
    work = target.with_name(f"{target.name}-work")
    done = prune_by_curvature(task, writer, work, ids, CPU, dtype)
    record = lineage(task.source) | {"pruning": done.ledger}
    if done.shrunk is None:
        writer.finish(task.source.depth, record)
    else:
        writer.finish(task.source.depth, record | {"layers": done.shrunk.layers}, done.shrunk.config)
    return Checkpoint(target), done


def dropped(checkpoint: Checkpoint) -> dict[str, int]:
    return {layer: int((~mask).sum()) for layer, mask in all_masks(checkpoint).items()}


def loss(folder: Path, ids: Tensor) -> float:
    with torch.no_grad():
        return float(whole_model(folder)(input_ids=ids, labels=ids).loss)


@pytest.fixture
def llama(imported: Make) -> Checkpoint:
    return Checkpoint(imported("llama"))


@every_pattern
@pytest.mark.parametrize("together", [False, True], ids=["each", "together"])
def test_as_much_goes_as_is_asked_for(
    pattern: str, together: bool, llama: Checkpoint, tmp_path: Path, ids: Tensor
) -> None:
    task = make_task(llama, pattern, 0.3, together)
    pruned, done = operate(task, tmp_path / "pruned", ids)
    wanted, tensors = sum(quota.dropped for quota in task.quotas.values()), all_tensors(pruned)
    for layer, mask in all_masks(pruned).items():
        assert masks.revived(tensors[f"{layer}.weight"], mask) == 0
    counts = dropped(pruned)
    if pattern == "unstructured":
        assert sum(counts.values()) == wanted
        assert together or counts == {layer: quota.dropped for layer, quota in task.quotas.items()}
    elif pattern == "2:4":
        assert all(mask.view(-1, 4).sum(1).eq(2).all() for mask in all_masks(pruned).values())
    elif pattern in LINES:
        widest = 64  # weights of a row or a column
        each = [(counts[layer], quota.dropped) for layer, quota in task.quotas.items()]
        if together:
            each = [(sum(counts.values()), wanted)]
        assert all(0 <= count - asked < widest for count, asked in each)
        for mask in all_masks(pruned).values():
            rows, columns = mask.any(1), mask.any(0)
            assert mask.equal(rows[:, None] & columns)
            assert rows.all() or "rows" in pattern
            assert columns.all() or "columns" in pattern
    else:
        assert done.shrunk is not None
        left = sum(rows * width for rows, width in pruned.layers.values()) - done.shrunk.padding
        assert sum(quota.size for quota in task.quotas.values()) - left >= wanted
        assert together or done.shrunk.padding == 0
    assert whole_logits(pruned.folder, ids).isfinite().all()


@pytest.mark.parametrize("pattern", ["unstructured", "rows+columns", "units"])
@pytest.mark.parametrize("family", ["opt", "qwen2", "gemma2", "gpt_neox"])
def test_other_families(pattern: str, family: str, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    """With biases, tied heads, other norms: the pruned model loads, and its masks hold."""
    source = Checkpoint(imported(family))
    pruned, _ = operate(make_task(source, pattern, 0.2), tmp_path / "pruned", ids)
    assert loss(pruned.folder, ids) < loss(source.folder, ids) + 1.5


@pytest.mark.parametrize("pattern", ["rows+columns", "rows"])
def test_a_removed_row_takes_its_bias_with_it(pattern: str, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    pruned, _ = operate(make_task(Checkpoint(imported("opt")), pattern, 0.3), tmp_path / "pruned", ids)
    tensors = all_tensors(pruned)
    gone = {layer: ~mask.any(1) for layer, mask in all_masks(pruned).items()}
    assert any(rows.any() for rows in gone.values())
    assert all((tensors[f"{layer}.bias"][rows] == 0).all() for layer, rows in gone.items())


@pytest.mark.parametrize("pattern", ["unstructured", "rows+columns", "units"])
def test_curvature_beats_magnitude_and_updates_beat_none(
    pattern: str, llama: Checkpoint, tmp_path: Path, ids: Tensor
) -> None:
    def after(name: str, **changed: Any) -> float:
        pruned, _ = operate(make_task(llama, pattern, 0.4, True, **changed), tmp_path / name, ids)
        return loss(pruned.folder, ids)

    surgeon = after("surgeon")
    assert surgeon < after("none", update="none")
    assert surgeon < after("magnitude", curvature=Curvature("identity"), update="none")
    assert after("independent", update="independent") > surgeon


def test_bounds_and_dense_layers_hold(llama: Checkpoint, tmp_path: Path, ids: Tensor) -> None:
    dense = tuple(layer for layer in llama.layers if ".0." in layer)
    for pattern in ("unstructured", "rows+columns"):
        task = make_task(llama, pattern, 0.5, True, dense)
        counts = dropped(operate(task, tmp_path / pattern, ids)[0])
        assert all(counts[layer] == 0 for layer in dense)
        assert all(counts[layer] <= quota.most for layer, quota in task.quotas.items())
        assert len({count / task.quotas[layer].size for layer, count in counts.items()}) > 3  # it does choose


def test_masks_only_grow_from_shot_to_shot(
    llama: Checkpoint, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "shutil", SimpleNamespace(rmtree=lambda *_, **__: None, disk_usage=shutil.disk_usage))
    for pattern in ("unstructured", "2:4", "rows+columns", "units+heads"):
        operate(make_task(llama, pattern, 0.45, True, shots=3), tmp_path / pattern, ids)
        shots = [Checkpoint(tmp_path / f"{pattern}-work" / f"shot-{n}" / "checkpoint") for n in (1, 2, 3)]
        for one, other in pairwise(shots):
            before, after = all_masks(one), all_masks(other)
            assert all((after[layer] & ~before[layer]).sum() == 0 for layer in before)
            assert sum(dropped(one).values()) < sum(dropped(other).values())


@pytest.mark.parametrize("pattern", ["unstructured", "units"])
def test_the_split_into_batches_moves_next_to_nothing(
    pattern: str, llama: Checkpoint, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(llama, pattern, 0.3)
    whole, _ = operate(task, tmp_path / "whole", ids)
    monkeypatch.setattr(batches, "CPU_TOKENS", 64)
    split, _ = operate(task, tmp_path / "split", ids)
    one, other = all_masks(whole), all_masks(split)
    differing = sum(int((one[layer] != other[layer]).sum()) for layer in one)
    assert differing <= 1e-3 * sum(mask.numel() for mask in one.values())


@pytest.mark.parametrize("pattern", ["2:4", "rows+columns", "units+heads"])
@pytest.mark.parametrize("at", ["block-00001", "shot-2", "shot-2/checkpoint/block-00001", "rounded/block-00001"])
def test_a_kill_costs_no_bytes(
    pattern: str, at: str, llama: Checkpoint, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(llama, pattern, 0.3)
    whole, _ = operate(task, tmp_path / "whole", ids)

    def killing(path: Path, tensors: dict[str, Tensor]) -> None:
        if at in path.as_posix():
            raise Killed
        write_tensors(path, tensors)

    for module in ("compression.surgeon.run", "compression.core.checkpoint", "compression.backward"):
        monkeypatch.setattr(f"{module}.write_tensors", killing)
    with pytest.raises(Killed):
        operate(task, tmp_path / "killed", ids)
    monkeypatch.undo()
    resumed, _ = operate(task, tmp_path / "killed", ids)
    assert hashes(resumed.folder) == hashes(whole.folder)
    assert sha256(resumed.folder / "manifest.json") == sha256(whole.folder / "manifest.json")


def test_bfloat16(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    source = Checkpoint(imported("llama"))
    for pattern in ("unstructured", "rows+columns", "units+heads"):
        pruned, _ = operate(make_task(source, pattern, 0.3), tmp_path / pattern, ids, torch.bfloat16)
        assert loss(pruned.folder, ids) < loss(source.folder, ids) + 1.5
        types = {name: tensor.dtype for name, tensor in all_tensors(source).items()}
        assert all(tensor.dtype == types[name] for name, tensor in all_tensors(pruned).items())


def test_what_was_predicted_is_told(llama: Checkpoint, tmp_path: Path, ids: Tensor) -> None:
    _, done = operate(make_task(llama, "rows+columns", 0.2), tmp_path / "pruned", ids)
    assert list(done.ledger) == list(llama.layers)
    assert all(notes["cost"] > 0 and notes["dropped"] > 0 for notes in done.ledger.values())


def test_bad_weights_are_named(llama: Checkpoint, tmp_path: Path, ids: Tensor) -> None:
    folder = tmp_path / "bad"
    writer = CheckpointWriter(folder, llama.folder)
    for index in range(llama.depth):
        tensors = llama.block(index)
        if index == 1:
            tensors[next(name for name in tensors if "up_proj" in name)][0, 0] = float("nan")
        writer.write_block(index, tensors)
    writer.write_outer(llama.outer())
    writer.finish(llama.depth, lineage(llama))
    for curvature in (Curvature(), Curvature("activations"), Curvature("identity")):
        with pytest.raises(Problem, match=r"layers\.[12]|up_proj|NaN|not finite"):
            operate(make_task(Checkpoint(folder), "rows", 0.3, curvature=curvature), tmp_path / curvature.kind, ids)


def test_a_full_disk_is_told_before_hours_of_work(
    llama: Checkpoint, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(Problem, match="GB are free"):
        operate(make_task(llama, "rows", 0.3), tmp_path / "pruned", ids)


def test_what_cannot_be_reached_is_told(llama: Checkpoint, tmp_path: Path, ids: Tensor) -> None:
    with pytest.raises(Problem, match=r"prune\.sparsity"):
        operate(make_task(llama, "units", 0.9), tmp_path / "units", ids)


def test_an_encoder_is_pruned_without_gradients_only(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    source = Checkpoint(imported("bert"))
    with pytest.raises(Problem, match="activations"):
        operate(make_task(source, "units", 0.125), tmp_path / "kfac", ids)
    pruned, _ = operate(make_task(source, "units", 0.125, curvature=Curvature("activations")), tmp_path / "obd", ids)
    assert pruned.config()["intermediate_size"] == 48  # of 64: half of the weights are the MLP's
