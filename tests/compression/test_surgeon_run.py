"""LLM Surgeon on a model on disk: exact counts, every way, and a kill anywhere costs no bytes."""

import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from compression.core import batches, masks
from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.files import read_tensors, sha256, write_tensors
from compression.pruning.pattern import make_pattern
from compression.surgeon import run
from compression.surgeon.correction import Correction
from compression.surgeon.curvature import Curvature
from compression.surgeon.run import Operated, prune_by_curvature
from compression.surgeon.settings import Settings
from compression.surgeon.shrink import STRUCTURES
from compression.surgeon.stream import find_stream
from compression.surgeon.way import Quota, Task
from compression.training import loop
from tests.compression.helpers import CPU, Killed, all_masks, all_tensors, hashes, lineage, whole_logits, whole_model
from tests.compression.test_hidden import KEPT, silenced
from tests.conftest import Make

PATTERNS = ["unstructured", "2:4", "rows", "columns", "rows+columns", "units", "heads", "units+heads", "hidden"]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
LINES = ["rows", "columns", "rows+columns"]
LEARNING = Correction(steps=14, rank=8, learning_rate=0.01, seed=0)


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
@pytest.mark.parametrize("correction", [None, LEARNING], ids=["as it is", "corrected"])
def test_a_removed_row_takes_its_bias_with_it(
    pattern: str, correction: Correction | None, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    task = make_task(Checkpoint(imported("opt")), pattern, 0.3, correction=correction)
    pruned, _ = operate(task, tmp_path / "pruned", ids)
    tensors = all_tensors(pruned)
    gone = {layer: ~mask.any(1) for layer, mask in all_masks(pruned).items()}
    assert any(rows.any() for rows in gone.values())
    assert all((tensors[f"{layer}.bias"][rows] == 0).all() for layer, rows in gone.items())


@pytest.mark.parametrize("pattern", ["unstructured", "rows+columns", "units", "hidden"])
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
    for pattern in ("unstructured", "2:4", "rows+columns", "units+heads", "hidden"):
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


def kill_at(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To write a file with this in its path kills, until all is undone."""

    def killing(path: Path, tensors: dict[str, Tensor]) -> None:
        if part in path.as_posix():
            raise Killed
        write_tensors(path, tensors)

    for module in ("surgeon.run", "core.checkpoint", "core.journal", "backward"):
        monkeypatch.setattr(f"compression.{module}.write_tensors", killing)


def assert_resumes(task: Task, at: str, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = operate(task, tmp_path / "whole", ids)
    kill_at(at, monkeypatch)
    with pytest.raises(Killed):
        operate(task, tmp_path / "killed", ids)
    monkeypatch.undo()
    resumed, _ = operate(task, tmp_path / "killed", ids)
    assert hashes(resumed.folder) == hashes(whole.folder)
    assert sha256(resumed.folder / "manifest.json") == sha256(whole.folder / "manifest.json")


@pytest.mark.parametrize("pattern", ["2:4", "rows+columns", "units+heads", "hidden"])
@pytest.mark.parametrize("at", ["block-00001", "shot-2", "shot-2/checkpoint/block-00001", "shot-2/checkpoint/outer"])
def test_a_kill_costs_no_bytes(
    pattern: str, at: str, llama: Checkpoint, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_resumes(make_task(llama, pattern, 0.3), at, tmp_path, ids, monkeypatch)


@pytest.mark.parametrize("pattern", ["2:4", "units"])
@pytest.mark.parametrize("at", ["shot-2/correction/", "shot-2/corrected/block-00001", "shot-2/block-00001"])
def test_a_kill_in_a_correction_or_behind_it_costs_no_bytes(
    pattern: str, at: str, llama: Checkpoint, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_resumes(make_task(llama, pattern, 0.3, correction=LEARNING), at, tmp_path, ids, monkeypatch)


@pytest.mark.parametrize(
    ("at", "shots", "steps"),
    [("shot-3/corrected/", 1, 4), ("shot-3/checkpoint/", 1, 0)],
)
def test_what_was_finished_is_not_done_again(
    at: str, shots: int, steps: int, llama: Checkpoint, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A correction is journaled every ten steps, of which it has fourteen here."""
    task = make_task(llama, "rows", 0.3, shots=3, correction=LEARNING)
    kill_at(at, monkeypatch)
    with pytest.raises(Killed):
        operate(task, tmp_path / "pruned", ids)
    monkeypatch.undo()
    taken, stepped = Mock(wraps=run._take), Mock(wraps=loop._backward)
    monkeypatch.setattr(run, "_take", taken)
    monkeypatch.setattr(loop, "_backward", stepped)
    operate(task, tmp_path / "pruned", ids)
    assert (taken.call_count, stepped.call_count) == (shots, steps)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "rows+columns", "units+heads", "hidden"])
def test_corrections_make_up_for_a_part_and_keep_every_mask(
    pattern: str, llama: Checkpoint, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(llama, pattern, 0.4, shots=3)
    plain, told = operate(task, tmp_path / "plain", ids)
    monkeypatch.setattr(run, "shutil", SimpleNamespace(rmtree=lambda *_, **__: None, disk_usage=shutil.disk_usage))
    learned, done = operate(make_task(llama, pattern, 0.4, shots=3, correction=LEARNING), tmp_path / "learned", ids)
    assert [len(losses) for losses in done.corrections] == [14, 14]  # between three shots, none behind the last
    assert told.corrections == []
    assert loss(learned.folder, ids) < loss(plain.folder, ids) - 0.05
    shots = tmp_path / "learned-work"
    for shot in (1, 2):
        before, after = (Checkpoint(shots / f"shot-{n}") for n in (f"{shot}/checkpoint", f"{shot + 1}/corrected"))
        left, moved, tensors = all_masks(before), all_tensors(before), all_tensors(after)
        assert all_masks(after).keys() == left.keys()
        assert all(mask.equal(left[layer]) for layer, mask in all_masks(after).items())
        assert all(masks.revived(tensors[f"{layer}.weight"], mask) == 0 for layer, mask in left.items())
        changed = {name for name, tensor in tensors.items() if not tensor.equal(moved[name])}
        assert changed == {f"{layer}.weight" for layer in left}  # no norm, no bias, no embedding
        assert loss(after.folder, ids) < loss(before.folder, ids)


def test_a_correction_that_runs_away_names_its_key(llama: Checkpoint, tmp_path: Path, ids: Tensor) -> None:
    task = make_task(llama, "rows", 0.3, correction=Correction(14, 8, 1e30, 0))
    with pytest.raises(Problem, match=r"correction before shot 2: .*\n.*surgeon\.correction_learning_rate"):
        operate(task, tmp_path / "pruned", ids)


def test_an_encoder_is_not_corrected(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    task = make_task(Checkpoint(imported("bert")), "rows", 0.2, curvature=Curvature("activations"), correction=LEARNING)
    with pytest.raises(Problem, match=r"surgeon\.correction_steps"):
        operate(task, tmp_path / "pruned", ids)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(("sparsity", "width"), [(0.25, 24), (0.3, 16), (0.0, 32)])
def test_hidden_width(family: str, sparsity: float, width: int, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    """The next multiple of 8 below is what is left, of every tensor, and the model is the masked one."""
    source = Checkpoint(imported(family))
    small, done = operate(make_task(source, "hidden", sparsity), tmp_path / "small", ids)
    masked = Checkpoint(tmp_path / "small-work" / "shot-2" / "checkpoint")
    assert done.shrunk is not None
    assert (done.shrunk.widths, done.shrunk.padding) == ({"hidden": width}, 0)
    assert small.config()["hidden_size"] == width
    before, after = (sum(rows * columns for rows, columns in own.layers.values()) for own in (source, small))
    assert 32 * after == width * before
    weights = [sum(tensor.nbytes for tensor in all_tensors(own).values()) for own in (source, small)]
    assert weights[1] * 32 <= weights[0] * width * 1.02  # biases of q, k and v stay
    torch.testing.assert_close(whole_logits(small.folder, ids), whole_logits(masked.folder, ids), rtol=1e-4, atol=1e-4)
    assert all(mask.all() for mask in all_masks(small).values())


def test_dimensions_that_nothing_uses_go_first(llama: Checkpoint, tmp_path: Path, ids: Tensor) -> None:
    source = silenced(llama, tmp_path / "silenced")
    small, _ = operate(make_task(source, "hidden", 0.25), tmp_path / "small", ids)
    assert read_tensors(small.folder / STRUCTURES)["hidden"].tolist() == KEPT.tolist()
    torch.testing.assert_close(whole_logits(small.folder, ids), whole_logits(source.folder, ids), rtol=1e-4, atol=1e-4)


def test_dimensions_are_ranked_by_what_they_cost_in_all_layers(llama: Checkpoint) -> None:
    way = find_stream(make_task(llama, "hidden", 0.25))
    draw = torch.Generator().manual_seed(0)
    scores = {layer: torch.rand(32, generator=draw) for layer in way.layers()}
    assert len(scores) == len(llama.layers)
    decisions = way.decide(lambda: ((layer, {"stream": own}) for layer, own in scores.items()), 1.0)
    totals = [sum(own[dimension].item() for own in scores.values()) for dimension in range(32)]
    wanted = sorted(sorted(range(32), key=totals.__getitem__)[:8])
    for layer, own in decisions.items():
        rows, columns = own.rows, own.columns
        writes = layer.endswith(("o_proj", "down_proj"))
        assert (rows if writes else columns).nonzero().flatten().tolist() == wanted
        assert not (columns if writes else rows).any()


@pytest.mark.parametrize("family", ["opt", "gemma2", "gpt_neox"])
def test_hidden_width_that_cannot_change_is_told(family: str, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    with pytest.raises(Problem, match=r"cannot change\n.*valid: models of RMS norms"):
        operate(make_task(Checkpoint(imported(family)), "hidden", 0.25), tmp_path / "small", ids)


def test_hidden_width_that_cannot_be_reached_is_told(llama: Checkpoint, tmp_path: Path, ids: Tensor) -> None:
    def told(sparsity: float, told: str, **changed: Any) -> None:
        with pytest.raises(Problem, match=told):
            operate(make_task(llama, "hidden", sparsity, **changed), tmp_path / "small", ids)

    told(0.8, r"prune\.sparsity: leaves 6 of 32 dimensions.*\n.*valid: up to 0\.7500, which leaves 8")
    told(0.1, r"surgeon\.multiple: .* no hidden width below 32 .* multiple of 31", multiple=31)
    told(0.1, r"allocate\.dense: model\.layers\.1\.mlp\.up_proj", dense=("model.layers.1.mlp.up_proj",))


def test_bfloat16(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    source = Checkpoint(imported("llama"))
    for pattern in ("unstructured", "rows+columns", "units+heads", "hidden"):
        task = make_task(source, pattern, 0.25, correction=LEARNING)
        pruned, _ = operate(task, tmp_path / pattern, ids, torch.bfloat16)
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
        for pattern in ("rows", "units"):  # of units, up_proj is a writer, whose curvature nobody asks for
            task = make_task(Checkpoint(folder), pattern, 0.3, curvature=curvature)
            with pytest.raises(Problem, match=r"layers\.[12]|up_proj|NaN|not finite"):
                operate(task, tmp_path / f"{curvature.kind}-{pattern}", ids)


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
