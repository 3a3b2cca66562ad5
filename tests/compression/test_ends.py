"""Embedding and head: GPTQ weighs their errors as the head and, where it is one matrix, as the embedding at once."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.quantization import ends, gptq, rtn
from compression.quantization.method import Settings
from compression.quantization.packed import base_reader, plain_outer
from compression.quantization.run import quantize_model
from compression.quantization.scheme import Scheme, anatomy, config_entry, to_manifest
from tests.compression.helpers import CPU, Killed, hashes, journal, lineage, whole_logits, whole_model
from tests.conftest import Make
from tests.reference import obs
from tests.reference import quantization as reference

SIZE = 8  # inputs that share a scale
SOME = slice(30, 50)  # rows of 96 that are enough to compare


def rounded(
    source: Checkpoint,
    target: Path,
    ids: Tensor,
    schemes: dict[str, Scheme],
    settings: Settings,
    method: ModuleType = gptq,
) -> Checkpoint:
    writer, model = CheckpointWriter(target, source.folder), anatomy(source.folder)
    entry = config_entry(schemes, model)
    quantize_model(source, writer, journal(target), method, schemes, model, settings, ids, CPU, torch.float32)
    config = source.config() | {"quantization_config": entry}
    writer.finish(source.depth, lineage(source) | {"quantization": to_manifest(schemes)}, config)
    return Checkpoint(target)


@torch.no_grad()
def read_by_head(source: Checkpoint, ids: Tensor) -> Tensor:
    """What the head of a model reads, [tokens, d], as transformers computes it."""
    states: Tensor = whole_model(source.folder).model(input_ids=ids).last_hidden_state  # type: ignore[operator]
    return states.flatten(0, 1)


def tied_hessian(inputs: Tensor, mu: float) -> Tensor:
    """X^T X / tokens + mu of its mean diagonal, damped for the sweep, float64."""
    H = obs.hessian(inputs, 0)
    H += mu * H.diagonal().mean() * torch.eye(len(H))
    return H + 0.01 * H.diagonal().mean() * torch.eye(len(H))


def error(source: Checkpoint, done: Checkpoint, layer: str, H: Tensor) -> float:
    """sum_i (w_i - w'_i)^T H (w_i - w'_i)."""
    before, after = (plain_outer(one)[f"{layer}.weight"].double() for one in (source, done))
    return float(((after - before) @ H * (after - before)).sum())


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_a_tied_embedding_equals_the_twin(
    order: str, symmetric: bool, imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends, "ROWS", 40)  # so SOME lie in two parts
    source = Checkpoint(imported("qwen2"))
    layer = anatomy(source.folder).embedding
    settings = Settings(SIZE, symmetric, True, order)  # type: ignore[arg-type]
    done = rounded(source, tmp_path / "done", ids, {layer: Scheme(4, SIZE, symmetric)}, settings)
    values, weight = (plain_outer(one)[f"{layer}.weight"][SOME] for one in (done, source))
    H = tied_hessian(read_by_head(source, ids), ends.EMBEDDED)
    twin = reference.gptq(weight, H, 4, SIZE, symmetric, True, order == "activation", ties_as=values)
    torch.testing.assert_close(values.double(), twin, rtol=1e-4, atol=1e-4)


def test_a_head_of_its_own_equals_the_twin_and_its_embedding_is_rounded_to_nearest(
    imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    source = Checkpoint(imported("llama"))
    model = anatomy(source.folder)
    assert model.head is not None
    schemes = {model.embedding: Scheme(4, SIZE), model.head: Scheme(4, SIZE)}
    swept, nearest = (rounded(source, tmp_path / m.__name__, ids, schemes, Settings(SIZE), m) for m in (gptq, rtn))
    values, weight = (plain_outer(one)[f"{model.head}.weight"][SOME] for one in (swept, source))
    # The head reads what the rounded embedding has not touched: the embedding is rounded when all blocks are done.
    twin = reference.gptq(weight, obs.hessian(read_by_head(source, ids), 0.01), 4, SIZE, ties_as=values)
    torch.testing.assert_close(values.double(), twin, rtol=1e-4, atol=1e-4)
    embeddings = [plain_outer(one)[f"{model.embedding}.weight"] for one in (swept, nearest)]
    assert torch.equal(*embeddings)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "opt"])
def test_a_tied_embedding_errs_less_than_rounded_to_nearest(
    family: str, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    source = Checkpoint(imported(family))
    layer = anatomy(source.folder).embedding
    settings = Settings(SIZE, clip=True, order="activation")
    H = tied_hessian(read_by_head(source, ids), ends.EMBEDDED)
    errors = [
        error(source, rounded(source, tmp_path / m.__name__, ids, {layer: Scheme(3, SIZE)}, settings, m), layer, H)
        for m in (gptq, rtn)
    ]
    assert errors[0] < 0.95 * errors[1]


def test_a_head_of_its_own_gives_logits_closer_than_rounded_to_nearest(
    imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    source = Checkpoint(imported("llama"))
    settings, exact = Settings(SIZE, clip=True, order="activation"), whole_logits(source.folder, ids)
    errors = []
    for method in (gptq, rtn):
        done = rounded(source, tmp_path / method.__name__, ids, {"lm_head": Scheme(3, SIZE)}, settings, method)
        errors.append(float((whole_logits(done.folder, ids) - exact).norm()))
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_8_bits_and_a_scale_a_row_load_beside_layers_of_fewer(
    family: str, symmetric: bool, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    source = Checkpoint(imported(family))
    layer = anatomy(source.folder).embedding
    layers = {name: Scheme(3 if "mlp" in name else 4, 16, symmetric) for name in source.layers}
    done = rounded(source, tmp_path / "packed", ids, {layer: Scheme(8, "row")} | layers, Settings(16, symmetric))
    assert done.outer()[f"{layer}.weight_scale"].shape == (96, 1)
    fake, values = whole_model(source.folder), plain_outer(done)
    for index in range(done.depth):
        values |= base_reader(done)(index)
    assert not fake.load_state_dict(values, strict=False).unexpected_keys
    with torch.no_grad():
        assert torch.equal(whole_logits(done.folder, ids), fake(input_ids=ids).logits)


@pytest.mark.parametrize("where", ["write_block", "write_outer"])
def test_killed_and_resumed_gives_the_same_bytes(
    where: str, imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint(imported("qwen2"))
    schemes = {anatomy(source.folder).embedding: Scheme(4, SIZE)} | dict.fromkeys(source.layers, Scheme(4, SIZE))
    whole = rounded(source, tmp_path / "whole", ids, schemes, Settings(SIZE))
    write = getattr(CheckpointWriter, where)

    def dying(self: CheckpointWriter, *arguments: object) -> None:
        if where == "write_outer" or arguments[0] == 2:
            raise Killed
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, where, dying)
        with pytest.raises(Killed):
            rounded(source, tmp_path / "killed", ids, schemes, Settings(SIZE))
    again = rounded(source, tmp_path / "killed", ids, schemes, Settings(SIZE))
    assert hashes(again.folder) == hashes(whole.folder)


def test_an_embedding_that_cannot_be_rounded_is_refused_before_any_block(
    imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    source = Checkpoint(imported("qwen2"))
    layer = anatomy(source.folder).embedding
    with pytest.raises(Problem, match=r"does not divide the 32 inputs of model\.embed_tokens"):
        rounded(source, tmp_path / "none", ids, {layer: Scheme(4, 24)}, Settings(SIZE))
    assert not (tmp_path / "none" / "block-00000.safetensors").exists()
