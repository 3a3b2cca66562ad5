"""The stage's core on whole models: embeddings, layers left alone, and runs that are killed while they look at text."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.quantization import gptq, rtn
from compression.quantization.method import Settings
from compression.quantization.run import quantize_model
from compression.quantization.scheme import Scheme, anatomy, config_entry, to_manifest
from tests.compression.helpers import (
    CPU,
    Killed,
    all_tensors,
    hashes,
    journal,
    lineage,
    quantize,
    walked_logits,
    whole_logits,
)
from tests.conftest import Make


def run(source: Checkpoint, target: Path, bits: dict[str, int], ids: Tensor, settings: Settings) -> Checkpoint:
    """GPTQ with these bits; an embedding among them is rounded as well."""
    schemes = {layer: Scheme(width, settings.group_size, settings.symmetric) for layer, width in bits.items()}
    writer, model = CheckpointWriter(target, source.folder), anatomy(source.folder)
    entry = config_entry(schemes, model)
    quantize_model(source, writer, journal(target), gptq, schemes, model, settings, ids, CPU, torch.float32)
    config = source.config() | {"quantization_config": entry}
    writer.finish(source.depth, lineage(source) | {"quantization": to_manifest(schemes)}, config)
    return Checkpoint(target)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_embeddings_are_rounded_where_asked_and_transformers_loads_them(
    family: str, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    source = Checkpoint(imported(family))
    embedding = anatomy(source.folder).embedding
    bits = {embedding: 4} | dict.fromkeys(source.layers, 4)
    done = run(source, tmp_path / "all", bits, ids, Settings(32))
    assert f"{embedding}.weight" not in done.outer()
    torch.testing.assert_close(walked_logits(done.folder, ids), whole_logits(done.folder, ids), rtol=1e-4, atol=1e-4)
    less = run(source, tmp_path / "layers", dict.fromkeys(source.layers, 4), ids, Settings(32))
    assert torch.equal(less.outer()[f"{embedding}.weight"], source.outer()[f"{embedding}.weight"])


@pytest.mark.parametrize("symmetric", [True, False])
def test_layers_without_bits_are_left_alone(symmetric: bool, pruned: Checkpoint, tmp_path: Path, ids: Tensor) -> None:
    bits = {layer: 3 if "mlp" in layer else 5 for layer in pruned.layers if "o_proj" not in layer}
    done = run(pruned, tmp_path / "some", bits, ids, Settings(16, symmetric))
    before, after = all_tensors(pruned), all_tensors(done)
    for layer in pruned.layers:
        assert (f"{layer}.weight" in after) == ("o_proj" in layer)
        if "o_proj" in layer:
            assert torch.equal(after[f"{layer}.weight"], before[f"{layer}.weight"])
    torch.testing.assert_close(walked_logits(done.folder, ids), whole_logits(done.folder, ids), rtol=1e-4, atol=1e-4)


def test_an_embedding_that_transformers_would_not_load_is_refused(pruned: Checkpoint) -> None:
    schemes = {"model.embed_tokens": Scheme(4, 32)} | dict.fromkeys(pruned.layers, Scheme(3, 32))
    with pytest.raises(Problem, match=r"embed_tokens: .*4 bits.*\n.*valid: 8 bits"):
        config_entry(schemes, anatomy(pruned.folder))


def test_killed_and_resumed_on_calibration_text_gives_the_same_bytes(
    pruned: Checkpoint, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(pruned, tmp_path / "whole", method=gptq, ids=ids)
    write = CheckpointWriter.write_block

    def dying(self: CheckpointWriter, index: int, *arguments: dict[str, Tensor]) -> None:
        if index == 2:
            raise Killed
        write(self, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write_block", dying)
        with pytest.raises(Killed):
            quantize(pruned, tmp_path / "packed", method=gptq, ids=ids)
    assert hashes(quantize(pruned, tmp_path / "packed", method=gptq, ids=ids).folder) == hashes(whole.folder)


def test_two_quantisers_give_different_models(pruned: Checkpoint, tmp_path: Path, ids: Tensor) -> None:
    one, other = (quantize(pruned, tmp_path / m.__name__, method=m, ids=ids) for m in (rtn, gptq))
    assert not torch.equal(walked_logits(one.folder, ids), walked_logits(other.folder, ids))
