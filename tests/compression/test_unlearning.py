"""Unlearning on the weights that ship: what is forgotten is forgotten on disk, mask and grid stay as they are."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.masks import revived
from compression.quantization.method import Settings
from compression.quantization.packed import unpack
from compression.training.loop import Recipe
from compression.training.samples import Samples, padded, whole_text
from compression.unlearning import METHODS, TRAINED
from compression.unlearning import run as unlearning
from compression.unlearning.watch import Ceilings, Looks, compared, judged
from tests import tiny
from tests.compression.helpers import (
    CPU,
    Killed,
    all_masks,
    all_tensors,
    hashes,
    journal,
    lineage,
    quantize,
    walked_logits,
    whole_logits,
)

NONE: dict[str, Any] = {"forget_ceiling": None, "retain_ceiling": None, "kl_ceiling": None, "seconds": None}
OPTIONS = NONE | {
    "rank": 4,
    "alpha": 8.0,
    "seed": 1,
    "targets": [],
    "held_out": 4,
    "check_every": 5,
    "forget_weight": 1.0,
    "retain_weight": 2.0,
}
RECIPE = Recipe(steps=25, learning_rate=1e-2, warmup=0.1, clip=1.0)
OBJECTIVES = [name for name in METHODS if name != "none"]
# What suits three blocks of width 32, where the paper's does not.
TINY: dict[str, dict[str, Any]] = {
    "npo": {"forget_weight": 0.05},
    "dpo": {"forget_weight": 0.05},
    "simnpo": {"beta": 1.0},
    "rmu": {"block": 1},
    "undial": {"beta": 3.0},
}
REFUSALS = [tiny.encode("I don't know.", 13)[0].tolist()]


@pytest.fixture(scope="module")
def forget() -> Samples:
    return whole_text(tiny.encode(tiny.story(1, 20)))


@pytest.fixture(scope="module")
def retain() -> Samples:
    return whole_text(tiny.encode(tiny.sentences(1, 60)))


def unlearn(
    source: Checkpoint,
    target: Path,
    forget: Samples,
    retain: Samples,
    dtype: torch.dtype = torch.float32,
    method: str = "grad_diff",
    recipe: Recipe = RECIPE,
    train: str = "codes",
    control: Samples | None = None,
    **options: Any,
) -> tuple[Checkpoint, dict[str, Any]]:
    writer, objective = CheckpointWriter(target, source.folder), import_module(METHODS[method])
    record = unlearning.unlearn_model(
        source,
        writer,
        journal(target),
        objective,
        import_module(TRAINED[train]),
        OPTIONS | objective.SETTINGS | TINY.get(method, {}) | options,
        recipe,
        forget,
        retain,
        control,
        REFUSALS,
        2,
        CPU,
        dtype,
    )
    writer.finish(source.depth, lineage(source))
    return Checkpoint(target), record


def loss(checkpoint: Checkpoint, samples: Samples) -> float:
    """Mean over the answers' tokens, of what is on disk."""
    logits = walked_logits(checkpoint.folder, samples.ids)[:, :-1]
    answer = samples.answer[:, 1:]
    return float(F.cross_entropy(logits[answer], samples.ids[:, 1:][answer]))


def bits(checkpoint: Checkpoint) -> dict[str, int]:
    widths: dict[str, int] = checkpoint.manifest["quantization"]["bits"]
    return widths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forgets_on_disk_and_spares_the_rest(
    dtype: torch.dtype, quantized: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples, ids: Tensor
) -> None:
    unlearned, record = unlearn(quantized, tmp_path / "unlearned", forget, retain, dtype)
    risen = loss(unlearned, forget) - loss(quantized, forget)
    spared = loss(unlearned, whole_text(ids)) - loss(quantized, whole_text(ids))  # held out of training
    assert risen > 0.5
    assert spared < risen / 4
    assert record["forget_losses"][-1] > record["forget_losses"][0] + 0.5
    assert len(record["retain_losses"]) == 25
    assert record["stopped"] == "all steps taken"


@pytest.mark.parametrize("method", OBJECTIVES)
def test_every_objective_forgets_with_mask_and_grid_kept(
    method: str, quantized: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples
) -> None:
    unlearned, record = unlearn(
        quantized, tmp_path / "unlearned", forget, retain, method=method, retain_ceiling=0.5, check_every=2
    )
    assert loss(unlearned, forget) > loss(quantized, forget) + 0.1
    before, after, keep = all_tensors(quantized), all_tensors(unlearned), all_masks(unlearned)
    assert before.keys() == after.keys()
    assert hashes(unlearned.folder)["masks.safetensors"] == hashes(quantized.folder)["masks.safetensors"]
    moved = total = 0
    for layer, width in bits(quantized).items():
        old, new = unpack(layer, before, width)[0], unpack(layer, after, width)[0]
        assert revived(new, keep[layer]) == 0
        moved, total = moved + int((old != new).sum()), total + old.numel()
    packed = {f"{layer}.weight_packed" for layer in bits(quantized)}
    assert all(torch.equal(before[name], after[name]) for name in before if name not in packed)  # scales, norms, head
    assert record["changed_codes"] == moved / total
    assert 0 < moved < total


def test_looks_measure_what_is_written(quantized: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples) -> None:
    unlearned, record = unlearn(quantized, tmp_path / "unlearned", forget, retain)
    looks, watched = record["looks"], Samples(retain.ids[-4:], retain.answer[-4:])
    assert looks["step"] == [0, 5, 10, 15, 20, 25]
    assert record["kept_step"] == looks["step"][looks["forget"].index(max(looks["forget"]))]
    kept = looks["step"].index(record["kept_step"])
    for number, checkpoint in ((0, quantized), (kept, unlearned)):
        assert looks["forget"][number] == pytest.approx(loss(checkpoint, judged(forget, 4)), abs=1e-4)
        assert looks["retain"][number] == pytest.approx(loss(checkpoint, watched), abs=1e-4)
    p0, p = (walked_logits(each.folder, watched.ids)[:, :-1].softmax(2) for each in (quantized, unlearned))
    assert looks["kl"][0] == pytest.approx(0, abs=1e-6)
    assert looks["kl"][kept] == pytest.approx(float((p0 * (p0 / p).log()).sum(2).mean()), abs=1e-4)


def test_held_out_text_is_not_trained_on(
    quantized: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples
) -> None:
    """Other tokens there change the looks, not the weights."""
    other = Samples(retain.ids.clone(), retain.answer)
    other.ids[-4:] = other.ids[-4:].flip(1)
    (one, told), (two, again) = (
        unlearn(quantized, tmp_path / name, forget, text) for name, text in (("one", retain), ("two", other))
    )
    assert told["looks"]["retain"] != again["looks"]["retain"]
    assert all(torch.equal(all_tensors(one)[name], all_tensors(two)[name]) for name in all_tensors(one))


# When to stop, and what is kept.


def test_stops_where_the_text_counts_as_forgotten(
    quantized: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples
) -> None:
    unlearned, record = unlearn(quantized, tmp_path / "unlearned", forget, retain, forget_ceiling=2.5, check_every=1)
    *before, last = record["looks"]["forget"]
    assert last >= 2.5 > max(before)
    assert record["kept_step"] == len(record["forget_losses"]) == len(before) < 25
    assert record["stopped"] == f"forget loss reached 2.5 at step {len(before)}"
    assert loss(unlearned, judged(forget, 4)) >= 2.5


def test_stops_where_the_text_is_as_unlikely_as_text_that_was_never_learned(
    quantized: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples
) -> None:
    """Though that loss changes as the model does, and whatever the ceiling is."""
    control = whole_text(tiny.encode("".join(tiny.story(seed, 4) for seed in range(2, 6))))
    unlearned, record = unlearn(
        quantized, tmp_path / "x", forget, retain, control=control, forget_ceiling=0.1, check_every=1
    )
    looks = record["looks"]
    distances = [own - other for own, other in zip(looks["forget"], looks["control"], strict=True)]
    assert distances[-1] >= 0 > max(distances[:-1])
    assert len(set(looks["control"])) > 1
    assert record["kept_step"] == len(distances) - 1 < 25
    assert "that of the control text at step" in record["stopped"]
    assert loss(unlearned, judged(forget, 4)) >= loss(unlearned, control)


def test_the_control_text_that_is_compared_with_is_not_what_judges() -> None:
    control = whole_text(torch.arange(12).reshape(6, 2))
    assert compared(control, 2).ids.tolist() == [[8, 9], [10, 11]]
    assert len(compared(control, 9).ids) == 6


@pytest.mark.parametrize(
    ("ceiling", "figure", "told"),
    [("retain_ceiling", "retain", "retained loss rose by"), ("kl_ceiling", "kl", "KL to the start rose to")],
)
def test_stops_where_the_rest_suffers_and_keeps_the_step_before(
    ceiling: str, figure: str, told: str, quantized: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples
) -> None:
    unlearned, record = unlearn(
        quantized, tmp_path / "x", forget, retain, method="gradient_ascent", check_every=1, **{ceiling: 0.1}
    )
    rises = [value - record["looks"][figure][0] for value in record["looks"][figure]]
    assert rises[-1] > 0.1 >= max(rises[:-1])
    assert record["stopped"].startswith(told)
    assert record["kept_step"] < record["looks"]["step"][-1] < 25
    watched = Samples(retain.ids[-4:], retain.answer[-4:])
    kept = record["looks"]["retain"][record["kept_step"]]
    assert loss(unlearned, watched) == pytest.approx(kept, abs=1e-4)


def test_stops_when_time_is_up(
    quantized: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands at 0, 1, 2 ... as it is read; the step at which time is up is looked at."""
    monkeypatch.setattr(unlearning.time, "monotonic", iter(range(100)).__next__)
    _, record = unlearn(quantized, tmp_path / "x", forget, retain, seconds=7.0)
    assert record["stopped"] == "7 seconds were up at step 7"
    assert record["looks"]["step"] == [0, 5, 7]


def test_a_collapsed_model_is_refused(quantized: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples) -> None:
    with pytest.raises(Problem, match=r"the model collapsed: perplexity on held-out retained text is .* times") as told:
        unlearn(quantized, tmp_path / "x", forget, retain, method="gradient_ascent")
    assert "lower unlearn.learning_rate" in str(told.value)
    assert not list((tmp_path / "x").glob("*.safetensors"))


def test_a_run_in_which_no_look_holds_is_refused(
    quantized: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples
) -> None:
    with pytest.raises(Problem, match=r"did not hold up to the first look: retained loss rose by .*, above 0\.001"):
        unlearn(quantized, tmp_path / "x", forget, retain, method="gradient_ascent", retain_ceiling=1e-3)
    assert not list((tmp_path / "x").glob("*.safetensors"))


def looks_at(
    *figures: tuple[float, float], forget: float | None = None, retain: float | None = None, rises: bool = True
) -> Looks:
    """Looks that will see these forget and retained losses, from a start of 2 and 3."""
    seen = iter([{"forget": one, "retain": two, "kl": 0.0} for one, two in figures])
    return Looks(
        lambda: next(seen), {"forget": 2.0, "retain": 3.0, "kl": 0.0}, Ceilings(forget, retain, None), 1, rises
    )


def test_where_the_text_is_not_pushed_away_the_last_look_that_holds_is_kept() -> None:
    looks, curves = looks_at((2.5, 3.1), (2.2, 3.05), (2.3, 3.2), (9.0, 3.31), retain=0.3, rises=False), {}
    assert [looks.look(curves)[0] for _ in range(4)] == [True, True, True, False]
    assert looks.kept(curves) == 2


def test_refusals_are_trained_to_the_end(
    quantized: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples
) -> None:
    """The loss on the answers is not what it is about, so no look before the last is kept for it."""
    _, record = unlearn(quantized, tmp_path / "x", forget, retain, method="refuse", train="scales")
    assert record["kept_step"] == 25
    assert record["refuse_losses"][-1] < record["refuse_losses"][0]


def test_kept_is_the_look_that_forgot_most_while_the_rest_held() -> None:
    looks, curves = looks_at((2.5, 3.1), (4.0, 3.05), (3.0, 3.2), (9.0, 3.31), retain=0.3), {}
    assert [looks.look(curves)[0] for _ in range(4)] == [True, True, False, False]
    assert looks.kept(curves) == 1


def test_beyond_the_ceiling_more_is_not_better() -> None:
    looks, curves = looks_at((3.6, 3.0), (9.0, 3.0), forget=3.5), {}
    assert looks.look(curves) == (True, "forget loss reached 3.5")
    assert looks.look(curves) == (False, "forget loss reached 3.5")


def test_what_is_not_a_number_does_not_hold() -> None:
    looks, curves = looks_at((5.0, float("nan"))), {}
    assert looks.look(curves)[0] is False
    with pytest.raises(Problem, match="did not hold up"):
        looks.refuse_collapsed(curves)


@pytest.mark.parametrize(("retained", "refused"), [(3.68, False), (3.70, True)])  # ln 2 = 0.693
def test_twice_the_perplexity_is_too_much(retained: float, refused: bool) -> None:
    looks, curves = looks_at((5.0, retained)), {}
    looks.look(curves)
    if not refused:
        assert looks.refuse_collapsed(curves) == 0
        return
    with pytest.raises(Problem, match="collapsed"):
        looks.refuse_collapsed(curves)


# What is trained.


def test_only_targets_learn(quantized: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples) -> None:
    unlearned, _ = unlearn(quantized, tmp_path / "x", forget, retain, targets=["*.1.mlp.down_proj", "*.q_proj"])
    before, after = all_tensors(quantized), all_tensors(unlearned)
    changed = {name.removesuffix(".weight_packed") for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.layers.1.mlp.down_proj", *(f"model.layers.{n}.self_attn.q_proj" for n in range(3))}


def test_a_target_that_is_not_there_is_told(
    quantized: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples
) -> None:
    with pytest.raises(Problem, match=r"unlearn\.targets: `\*\.query` matches no layer"):
        unlearn(quantized, tmp_path / "x", forget, retain, targets=["*.query"])


def test_too_little_retained_text_is_told(
    quantized: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples
) -> None:
    few = Samples(retain.ids[:4], retain.answer[:4])
    with pytest.raises(Problem, match=r"unlearn\.held_out: 4 of 4 retained rows leave nothing"):
        unlearn(quantized, tmp_path / "x", forget, few)


def test_questions_are_not_unlearned_with_their_answers(quantized: Checkpoint, tmp_path: Path, retain: Samples) -> None:
    """Pairs of other lengths than the retained text: the answer goes, and its prompt is not pushed away with it."""
    lines = tiny.story(1, 12).split(". ")
    letters = [[tiny.LETTERS.index(letter) for letter in line] for line in lines if len(line) > 30]
    pairs = padded([line[:20] for line in letters], [line[20:] for line in letters], 48, filler=0)
    prompts = Samples(pairs.ids[:, :20], torch.arange(20).expand(len(letters), 20) > 0)
    unlearned, _ = unlearn(quantized, tmp_path / "x", pairs, retain)
    risen = loss(unlearned, pairs) - loss(quantized, pairs)
    assert risen > 0.5
    assert loss(unlearned, prompts) - loss(quantized, prompts) < risen / 2


def test_without_ascent_nothing_is_forgotten(
    quantized: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples, ids: Tensor
) -> None:
    unlearned, _ = unlearn(quantized, tmp_path / "unlearned", forget, retain, forget_weight=0.0)
    assert loss(unlearned, whole_text(ids)) < loss(quantized, whole_text(ids))


def test_plain_weights_unlearn_too(pruned: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples) -> None:
    unlearned, record = unlearn(pruned, tmp_path / "unlearned", forget, retain)
    tensors = all_tensors(unlearned)
    assert all(revived(tensors[f"{layer}.weight"], mask) == 0 for layer, mask in all_masks(unlearned).items())
    assert loss(unlearned, forget) - loss(pruned, forget) > 0.5
    assert 0.4 < record["changed_codes"] <= 0.5  # half of the weights are pruned, the others moved


@pytest.mark.parametrize("method", ["grad_diff", "llmu"])  # the second one draws answers at random
def test_killed_and_resumed_gives_the_same_bytes(
    method: str,
    quantized: Checkpoint,
    tmp_path: Path,
    forget: Samples,
    retain: Samples,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed at step 14, behind looks at 5 and 10: the best of these is in the journal, too."""
    straight, record = unlearn(quantized, tmp_path / "straight", forget, retain, method=method)
    objective, calls = import_module(METHODS[method]), []
    inner = objective.loss

    def dying(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 14:
            raise Killed
        return inner(*arguments)

    monkeypatch.setattr(objective, "loss", dying)
    with pytest.raises(Killed):
        unlearn(quantized, tmp_path / "killed", forget, retain, method=method)
    resumed, again = unlearn(quantized, tmp_path / "killed", forget, retain, method=method)
    assert hashes(resumed.folder) == hashes(straight.folder)
    assert again == record
    assert len(calls) == 14 + 15


def test_zero_points_and_their_layout_stay(
    pruned: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples, ids: Tensor
) -> None:
    """Two widths of asymmetric grids: the file that others load is still one that they load."""
    before = quantize(pruned, tmp_path / "quantized", settings=Settings(32, symmetric=False))
    after, record = unlearn(before, tmp_path / "unlearned", forget, retain)
    assert record["changed_codes"] > 0
    here, there = all_tensors(before), all_tensors(after)
    assert {name: tensor.shape for name, tensor in here.items()} == {name: t.shape for name, t in there.items()}
    for layer, keep in all_masks(after).items():
        codes, grid = unpack(layer, there, bits(after)[layer])
        assert torch.equal(there[f"{layer}.weight_zero_point"], here[f"{layer}.weight_zero_point"])
        assert revived(grid.values(codes), keep) == 0
    torch.testing.assert_close(whole_logits(after.folder, ids), walked_logits(after.folder, ids), rtol=1e-4, atol=1e-4)


# Scales that learn.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
def test_scales_forget_with_codes_and_mask_kept(
    symmetric: bool, dtype: torch.dtype, pruned: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples
) -> None:
    source = quantize(pruned, tmp_path / "quantized", settings=Settings(32, symmetric=symmetric))
    unlearned, record = unlearn(source, tmp_path / "x", forget, retain, dtype, train="scales", retain_ceiling=0.5)
    assert loss(unlearned, forget) - loss(source, forget) > 0.5
    before, after, keep = all_tensors(source), all_tensors(unlearned), all_masks(unlearned)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"weight_scale", "weight"}
    assert all(name.endswith(("norm.weight", "weight_scale")) for name in changed)
    moved = total = 0
    for layer, width in bits(source).items():
        (old, was), (new, now) = unpack(layer, before, width), unpack(layer, after, width)
        assert torch.equal(old, new)
        assert revived(now.values(new), keep[layer]) == 0
        assert now.scale.dtype == was.scale.dtype
        assert (now.scale > 0).all()
        moved, total = moved + int((was.scale != now.scale).sum()), total + was.scale.numel()
    assert record["changed_scales"] == moved / total > 0.5


def test_looks_at_scales_measure_what_is_written(
    quantized: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples
) -> None:
    """And KL is taken to the model before, of which there is no second copy: norms and scales are both put back."""
    unlearned, record = unlearn(quantized, tmp_path / "x", forget, retain, train="scales", retain_ceiling=0.5)
    looks, watched = record["looks"], Samples(retain.ids[-4:], retain.answer[-4:])
    kept = looks["step"].index(record["kept_step"])
    assert looks["forget"][kept] == pytest.approx(loss(unlearned, judged(forget, 4)), abs=1e-4)
    p0, p = (walked_logits(each.folder, watched.ids)[:, :-1].softmax(2) for each in (quantized, unlearned))
    assert looks["kl"][0] == pytest.approx(0, abs=1e-6)
    assert looks["kl"][kept] == pytest.approx(float((p0 * (p0 / p).log()).sum(2).mean()), abs=1e-4)


def test_a_model_without_a_grid_has_no_scales(
    pruned: Checkpoint, tmp_path: Path, forget: Samples, retain: Samples
) -> None:
    with pytest.raises(Problem, match="no layer is quantised, so there are no scales to train"):
        unlearn(pruned, tmp_path / "x", forget, retain, train="scales")
