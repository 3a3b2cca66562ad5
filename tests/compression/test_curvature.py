"""The curvature of every layer is that of the whole model, in one block's memory, also when a run is killed."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compression.core import batches
from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.core.skeleton import Skeleton
from compression.surgeon.curvature import Curvature, factors_by_block
from compression.surgeon.factors import Factors
from tests.compression.helpers import Killed, make_skeleton, whole_model
from tests.conftest import Make
from tests.reference import curvature as reference

KFAC = Curvature("kfac")
ACTIVATIONS = Curvature("activations")
IDENTITY = Curvature("identity")
EVERY_KIND = pytest.mark.parametrize(
    "curvature",
    [
        KFAC,
        Curvature(weighted=True),
        Curvature("kfac", "sampled", samples=2, seed=3),
        Curvature("kfac", passes=2),
        ACTIVATIONS,
        IDENTITY,
    ],
    ids=["kfac", "weighted", "sampled", "passes", "activations", "identity"],
)


def measure(
    folder: Path,
    work: Path,
    ids: Tensor,
    curvature: Curvature,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Factors]:
    """By layer, of all blocks; float32 unless told."""
    layers = list(Checkpoint(folder).layers) if layers is None else layers
    skeleton, found = make_skeleton(folder, dtype), dict[str, Factors]()
    for _, factors in factors_by_block(skeleton, ids, layers, work, curvature):
        found |= factors
    assert set(found) == set(layers)
    return found


def product(factors: Factors) -> Tensor:
    """G (x) A, float64."""
    assert factors.inputs is not None
    assert factors.outputs is not None
    return torch.kron(factors.outputs.double(), factors.inputs.double())


def assert_near(own: Tensor | None, true: Tensor, share: float) -> None:
    """The difference is at most a share of the true matrix, by Frobenius norms."""
    assert own is not None
    assert own.shape == true.shape
    assert float((own.double() - true).norm()) <= share * float(true.norm())


def assert_equal(own: dict[str, Factors], other: dict[str, Factors]) -> None:
    for layer, factors in other.items():
        for mine, theirs in ((own[layer].inputs, factors.inputs), (own[layer].outputs, factors.outputs)):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", "gemma2", "gpt_neox"])
def test_factors_are_those_of_the_whole_model(family: str, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    folder = imported(family)
    found = measure(folder, tmp_path, ids, KFAC)
    tokens = reference.tokens(whole_model(folder), list(found), ids)
    for layer, own in tokens.items():
        inputs, outputs = reference.factors(own)
        assert_near(found[layer].inputs, inputs, 1e-4)
        assert_near(found[layer].outputs, outputs, 1e-4)
        assert outputs.norm() > 0


def test_a_bias_is_an_input_that_is_always_one(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    """In bfloat16, too, where sums of ones would soon be rounded."""
    found = measure(imported("opt"), tmp_path, ids[:5], KFAC, dtype=torch.bfloat16)
    shapes = Checkpoint(imported("opt")).layers
    for layer, own in found.items():
        assert own.inputs is not None
        assert own.inputs.shape == (shapes[layer][1] + 1,) * 2
        assert own.inputs[-1, -1] == 1
        assert torch.equal(own.inputs, own.inputs.T)


@pytest.mark.parametrize("curvature", [KFAC, Curvature(passes=2)], ids=["kfac", "passes"])
def test_bfloat16_is_near(curvature: Curvature, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    exact = measure(imported("llama"), tmp_path / "exact", ids, curvature)
    rough = measure(imported("llama"), tmp_path / "rough", ids, curvature, dtype=torch.bfloat16)
    for layer, own in exact.items():
        assert own.inputs is not None
        assert own.outputs is not None
        assert_near(rough[layer].inputs, own.inputs.double(), 0.05)
        assert_near(rough[layer].outputs, own.outputs.double(), 0.05)


@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_activations_are_those_of_all_sequences(family: str, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    folder = imported(family)
    found = measure(folder, tmp_path, ids, ACTIVATIONS)
    for layer, inputs in reference.inputs(whole_model(folder), list(found), ids).items():
        assert_near(found[layer].inputs, inputs.T @ inputs / len(inputs), 1e-4)
        assert found[layer].outputs is None


def test_identity_looks_at_no_text(
    imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Skeleton, "load")
    monkeypatch.delattr(Skeleton, "begin")
    skeleton, layers = object.__new__(Skeleton), list(Checkpoint(imported("llama")).layers)
    skeleton.path = "model.layers"
    blocks = dict(factors_by_block(skeleton, ids, layers, tmp_path, IDENTITY))
    assert {layer for factors in blocks.values() for layer in factors} == set(layers)
    assert all(own == Factors(None, None) for factors in blocks.values() for own in factors.values())


@pytest.mark.parametrize("curvature", [KFAC, ACTIVATIONS], ids=["kfac", "activations"])
def test_layers_with_the_same_input_share_a_tensor(
    curvature: Curvature, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    found = measure(imported("llama"), tmp_path, ids, curvature)
    kin = {layer.rpartition(".")[2]: own.inputs for layer, own in found.items() if ".1." in layer}
    assert kin["q_proj"] is kin["k_proj"]
    assert kin["q_proj"] is kin["v_proj"]
    assert kin["gate_proj"] is kin["up_proj"]
    assert len({id(matrix) for matrix in kin.values()}) == 4


# Labels that the model draws.


def test_sampled_labels_approach_the_true_fisher(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    """What the mean gradient of many draws would give is a hundredth of it."""
    layer, few = "model.layers.1.self_attn.v_proj", ids[:1, :4]
    true = reference.exact_outputs(whole_model(imported("llama")), layer, few)
    distances = []
    for samples in (10, 1000):
        curvature = Curvature("kfac", "sampled", samples)
        found = measure(imported("llama"), tmp_path / str(samples), few, curvature, [layer])[layer].outputs
        assert found is not None
        distances.append(float((found - true).norm() / true.norm()))
    assert distances[1] < 0.1, distances
    assert distances[1] < distances[0] / 3


def test_the_seed_decides_what_is_drawn(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    first, same, other = (
        measure(imported("opt"), tmp_path / name, ids, Curvature("kfac", "sampled", seed=seed))
        for name, seed in (("first", 7), ("same", 7), ("other", 8))
    )
    assert_equal(same, first)
    for layer, own in first.items():
        assert own.outputs is not None
        assert other[layer].outputs is not None
        assert not torch.equal(own.outputs, other[layer].outputs)
        assert own.inputs is not None
        assert other[layer].inputs is not None
        assert torch.equal(own.inputs, other[layer].inputs)


def test_draws_are_averaged(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    """Not summed: the size stays what it is."""
    sizes = []
    for samples in (1, 8):
        curvature = Curvature("kfac", "sampled", samples)
        found = measure(imported("llama"), tmp_path / str(samples), ids, curvature)
        sizes.append(sum(float(own.outputs.trace()) for own in found.values() if own.outputs is not None))
    assert 0.7 < sizes[0] / sizes[1] < 1.4


# The nearest Kronecker product.


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_weighted_inputs_make_the_trace_over_outputs_right(
    family: str, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    folder = imported(family)
    layers = [layer for layer in Checkpoint(folder).layers if ".1." in layer and layer.endswith(("v_proj", "q_proj"))]
    found = measure(folder, tmp_path, ids[:1], Curvature(weighted=True), layers)
    for layer, own in reference.tokens(whole_model(folder), layers, ids[:1]).items():
        inputs, outputs = reference.weighted(own)
        assert_near(found[layer].inputs, inputs, 1e-4)
        assert_near(found[layer].outputs, outputs, 1e-4)
        assert float((inputs - reference.factors(own)[0]).norm()) > 0.05 * float(inputs.norm())  # it does something


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_passes_are_half_steps_of_the_power_iteration(
    family: str, passes: int, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    folder = imported(family)
    layers = [layer for layer in Checkpoint(folder).layers if ".1." in layer]
    found = measure(folder, tmp_path, ids[:3], Curvature(passes=passes), layers)
    for layer, own in reference.tokens(whole_model(folder), layers, ids[:3]).items():
        inputs, outputs = reference.refined(own, passes)
        assert_near(found[layer].inputs, inputs, 1e-4)
        assert_near(found[layer].outputs, outputs, 1e-4)


@pytest.mark.parametrize(
    ("family", "layer"),
    [("llama", "model.layers.2.self_attn.k_proj"), ("opt", "model.decoder.layers.0.self_attn.v_proj")],
)
def test_passes_lead_to_the_nearest_kronecker_product(
    family: str, layer: str, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    few = ids[:2, :32]
    own = reference.tokens(whole_model(imported(family)), [layer], few)[layer]
    fisher = reference.fisher(own)
    best = float((fisher - reference.nearest(fisher, own.gradients.shape[1])).norm())
    errors = []
    for passes in (0, 2, 30):
        found = measure(imported(family), tmp_path / str(passes), few, Curvature(passes=passes), [layer])[layer]
        errors.append(float((fisher - product(found)).norm()))
    assert errors[2] == pytest.approx(best, rel=1e-3)
    assert errors[0] > errors[1] > errors[2]


def test_draws_and_passes_go_together(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    """The refined product of many draws keeps the size of that of one."""
    layer = "model.layers.0.mlp.down_proj"
    one, many = (
        measure(imported("llama"), tmp_path / str(n), ids, Curvature("kfac", "sampled", n, passes=2), [layer])[layer]
        for n in (1, 6)
    )
    assert 0.5 < float(product(one).norm() / product(many).norm()) < 2


def test_a_layer_that_no_gradient_reaches_has_no_curvature(
    imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and columns of it are dead, not NaN."""
    load = Skeleton.load

    def severed(self: Skeleton, index: int) -> torch.nn.Module:
        block = load(self, index)
        block.get_parameter("mlp.down_proj.weight").zero_()
        return block

    monkeypatch.setattr(Skeleton, "load", severed)
    found = measure(imported("llama"), tmp_path, ids, Curvature(passes=3), ["model.layers.1.mlp.up_proj"])
    assert all((product(own) == 0).all() for own in found.values())


# Batches, blocks, kills.


@EVERY_KIND
def test_in_any_batch_split(
    curvature: Curvature, imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(imported("opt"), tmp_path / "whole", ids[:5], curvature)
    monkeypatch.setattr(batches, "CPU_TOKENS", 2 * ids.shape[1])
    split = measure(imported("opt"), tmp_path / "split", ids[:5], curvature)
    for layer, own in whole.items():
        if own.inputs is not None:
            assert_near(split[layer].inputs, own.inputs.double(), 1e-4)
        if own.outputs is not None:
            assert_near(split[layer].outputs, own.outputs.double(), 1e-4)


@EVERY_KIND
@pytest.mark.parametrize("at", [0, 1, 2], ids=["first", "second", "third"])
def test_killed_by_the_consumer_and_resumed_gives_the_same_bytes(
    at: int, curvature: Curvature, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    """A block that the consumer had not done with is given again; those before it are not."""
    folder = imported("llama")
    layers = list(Checkpoint(folder).layers)
    straight = measure(folder, tmp_path / "straight", ids, curvature)
    found: dict[str, Factors] = {}
    done: list[int] = []

    def consume(killed: bool) -> None:
        blocks = factors_by_block(make_skeleton(folder), ids, layers, tmp_path / "killed", curvature)
        for turn, (index, factors) in enumerate(blocks):
            if killed and turn == at:
                raise Killed
            found.update(factors)
            done.append(index)

    with pytest.raises(Killed):
        consume(killed=True)
    consume(killed=False)
    assert done == sorted(set(done), reverse=done[0] > 0)
    assert len(done) == 3
    assert_equal(found, straight)


@pytest.mark.parametrize("after", range(1, 7))
def test_killed_anywhere_and_resumed_gives_the_same_bytes(
    after: int, imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks are read forward, and three backward."""
    curvature = Curvature("kfac", "sampled", samples=2)
    layers = list(Checkpoint(imported("opt")).layers)
    straight = measure(imported("opt"), tmp_path / "straight", ids, curvature)
    load, loads, found = Skeleton.load, [], dict[str, Factors]()

    def dying(self: Skeleton, index: int) -> torch.nn.Module:
        loads.append(index)
        if len(loads) == after:
            raise Killed
        return load(self, index)

    def consume(skeleton: Skeleton) -> None:
        for _, factors in factors_by_block(skeleton, ids, layers, tmp_path / "killed", curvature):
            found.update(factors)

    skeletons = [make_skeleton(imported("opt")) for _ in range(2)]
    monkeypatch.setattr(Skeleton, "load", dying)
    with pytest.raises(Killed):
        consume(skeletons[0])
    consume(skeletons[1])
    assert_equal(found, straight)
    assert len(loads) == 7  # no block is read again but the one that was killed


def test_only_blocks_that_are_asked_for_are_given(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    layers = [f"model.layers.{index}.self_attn.{name}" for index in (0, 2) for name in ("k_proj", "o_proj")]
    whole = measure(imported("llama"), tmp_path / "whole", ids, KFAC)
    for curvature, order in ((KFAC, [2, 0]), (ACTIVATIONS, [0, 2]), (IDENTITY, [2, 0])):
        work = tmp_path / curvature.kind
        blocks = dict(factors_by_block(make_skeleton(imported("llama")), ids, layers, work, curvature))
        assert list(blocks) == order
        assert {layer for factors in blocks.values() for layer in factors} == set(layers)
        if curvature is KFAC:
            assert_equal(blocks[0] | blocks[2], {layer: whole[layer] for layer in layers})


def test_nothing_is_run_backward_below_the_first_block_asked_for(
    imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, run = [], Skeleton.run

    def watching(self: Skeleton, index: int, hidden: Tensor, ids: Tensor) -> Tensor:
        if hidden.requires_grad:
            backward.append(index)
        return run(self, index, hidden, ids)

    monkeypatch.setattr(Skeleton, "run", watching)
    measure(imported("llama"), tmp_path, ids, KFAC, ["model.layers.1.mlp.up_proj"])
    assert backward == [2, 1]


def test_memory_is_that_of_a_block_and_the_disk_empties(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    skeleton, layers = make_skeleton(imported("llama")), list(Checkpoint(imported("llama")).layers)
    for index, _ in factors_by_block(skeleton, ids, layers, tmp_path, KFAC):
        blocks = skeleton.model.get_submodule(skeleton.path)
        loaded = [not next(block.parameters()).is_meta for block in blocks.children()]
        assert loaded == [place == index for place in range(skeleton.depth)]
        assert len(list(tmp_path.glob("states-*"))) == index + 1
    assert not list(tmp_path.glob("states-*"))


def test_a_caller_that_takes_no_gradients_goes_on_taking_none(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    expected = measure(imported("llama"), tmp_path / "expected", ids, KFAC)
    layers, found = list(expected), dict[str, Factors]()
    with torch.no_grad():
        for _, factors in factors_by_block(make_skeleton(imported("llama")), ids, layers, tmp_path / "found", KFAC):
            assert not torch.is_grad_enabled()
            found |= factors
    assert_equal(found, expected)
    assert not any(own.outputs.requires_grad for own in found.values() if own.outputs is not None)


# What is refused.


def test_an_encoder_has_no_loss_to_send_back(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    with pytest.raises(Problem, match=r"an encoder has no loss of its own.*\n.*`activations` or `identity`"):
        measure(imported("bert"), tmp_path, ids, KFAC)


@pytest.mark.parametrize("curvature", [KFAC, ACTIVATIONS], ids=["kfac", "activations"])
def test_a_model_that_is_not_sound_is_named(
    curvature: Curvature, imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Skeleton.run
    monkeypatch.setattr(Skeleton, "run", lambda self, *args: run(self, *args) * float("nan"))
    with pytest.raises(Problem, match=r"layers\.2.*NaN or infinite"):
        measure(imported("llama"), tmp_path, ids, curvature, ["model.layers.2.mlp.down_proj"])
