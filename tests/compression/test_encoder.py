"""An encoder through the quantisation chain: what is packed is what AutoModel computes with; rounding has its price."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.journal import Journal
from compression.evaluation.embedding import embed
from compression.evaluation.fidelity import fidelity
from compression.importing import import_model
from compression.quantization import gptq, rtn
from compression.quantization.fused import fused_groups
from compression.quantization.method import Settings as GridSettings
from compression.quantization.packed import base_reader, plain_outer
from compression.quantization.plan import average_bits, by_budget, by_layer, group_sizes
from compression.quantization.run import quantize_model
from compression.quantization.scheme import Scheme, anatomy, config_entry, to_manifest
from compression.sensitivity import measured, tdmpq
from compression.sensitivity.settings import Columns, Settings
from tests import tiny
from tests.compression.helpers import CPU, journal, lineage, make_skeleton, quantize, whole_model
from tests.conftest import Make
from tests.reference import embedding as reference

WIDTHS = (2, 4, 8)
PER_LAYER = Settings(per="layer", widths=WIDTHS, group_size=16)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, original: Make) -> Checkpoint:
    """A BERT without a head, as sentence encoders are published: with a pooler that nobody asks."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(original("bert"))
    model.save_pretrained(folder / "original")
    tiny.tokenizer().save_pretrained(folder / "original")
    import_model(folder / "original", folder / "imported", "source", {"source": "tiny", "licence": "none"})
    return Checkpoint(folder / "imported")


def walked(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    return embed(make_skeleton(checkpoint.folder), list(ids))


@torch.no_grad()
def loaded(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Embeddings of the model as anyone loads it."""
    model = AutoModel.from_pretrained(checkpoint.folder).eval()
    return F.normalize(model(input_ids=ids).last_hidden_state.mean(1), dim=1)


@torch.no_grad()
def rounded(source: Checkpoint, packed: Checkpoint, ids: Tensor) -> Tensor:
    """Embeddings of the dense model with plain weights, those that the codes stand for, put in by hand."""
    plain = plain_outer(packed)
    for index in range(packed.depth):
        plain |= base_reader(packed)(index)
    model = whole_model(source.folder)
    model.load_state_dict(plain, strict=True)
    return F.normalize(model(input_ids=ids).last_hidden_state.mean(1), dim=1)


def quantized(source: Checkpoint, target: Path, schemes: dict[str, Scheme], ids: Tensor) -> Checkpoint:
    """GPTQ with these schemes."""
    writer, model = CheckpointWriter(target, source.folder), anatomy(source.folder)
    kind = next(iter(schemes.values()))
    settings = GridSettings(kind.group_size, kind.symmetric)
    quantize_model(source, writer, journal(target), gptq, schemes, model, settings, ids, CPU, torch.float32)
    config = source.config() | {"quantization_config": config_entry(schemes, model)}
    writer.finish(source.depth, lineage(source) | {"quantization": to_manifest(schemes)}, config)
    return Checkpoint(target)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_packed_encoder_gives_the_embeddings_of_its_rounded_weights(
    method: str, encoder: Checkpoint, tmp_path: Path, ids: Tensor
) -> None:
    """Of two widths, loaded by transformers as it is, and walked by us."""
    packed = quantize(encoder, tmp_path / "packed", 16, {"rtn": rtn, "gptq": gptq}[method], ids=ids)
    assert not any(f"{layer}.weight" in packed.block(0) for layer in encoder.layers)
    expected = rounded(encoder, packed, ids)
    torch.testing.assert_close(loaded(packed, ids), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(walked(packed, ids), expected, rtol=1e-4, atol=1e-5)
    assert fidelity(expected, walked(encoder, ids)).cosine < 0.9999


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_embeddings_of_tokens_are_packed_as_well(
    symmetric: bool, encoder: Checkpoint, tmp_path: Path, ids: Tensor
) -> None:
    names = [anatomy(encoder.folder).embedding, *encoder.layers]
    packed = quantized(encoder, tmp_path / "packed", dict.fromkeys(names, Scheme(4, 16, symmetric)), ids)
    assert "embeddings.word_embeddings.weight" not in packed.outer()
    torch.testing.assert_close(loaded(packed, ids), rounded(encoder, packed, ids), rtol=0, atol=1e-6)
    torch.testing.assert_close(walked(packed, ids), loaded(packed, ids), rtol=1e-4, atol=1e-5)


def test_gptq_is_truer_than_rounding_to_nearest(encoder: Checkpoint, tmp_path: Path, ids: Tensor) -> None:
    """On text that it has not seen."""
    others = tiny.encode(tiny.sentences(7, 40))
    dense = walked(encoder, others)
    by = {
        method.__name__: quantize(encoder, tmp_path / method.__name__, 16, method, ids=ids, bits=2)
        for method in (rtn, gptq)
    }
    found = {name: fidelity(walked(packed, others), dense) for name, packed in by.items()}
    assert found[gptq.__name__].cosine > found[rtn.__name__].cosine
    assert found[gptq.__name__].ranks > found[rtn.__name__].ranks


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Enough sequences for a mean over random signs."""
    return tiny.encode(tiny.sentences(3, 120), 32)[:60]


@pytest.fixture(scope="module")
def foretold(encoder: Checkpoint, text: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Columns:
    folder = tmp_path_factory.mktemp("tdmpq")
    return tdmpq.measure(make_skeleton(encoder.folder), text, Journal(folder), PER_LAYER)


@pytest.mark.parametrize("head", [False, True], ids=["headless", "head"])
def test_tdmpq_of_an_encoder_is_that_of_the_twin(
    head: bool, encoder: Checkpoint, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    folder = imported("bert") if head else encoder.folder
    skeleton = make_skeleton(folder)
    columns = tdmpq.measure(skeleton, ids, Journal(tmp_path), PER_LAYER)
    draw = torch.Generator().manual_seed(tdmpq.SEED)
    probes = [tdmpq.signs(32, draw) for _ in ids]
    for bits in (2, 4):
        expected = reference.tdmpq(whole_model(folder), skeleton.path, ids, bits, 16, probes)
        assert columns[f"cost_{bits}"] == pytest.approx(expected, rel=1e-3)
    assert columns["tdmpq"] == columns["cost_2"]


def test_signs_are_fair() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.stack([tdmpq.signs(8, draw) for _ in range(4000)])
    torch.testing.assert_close(rows.T @ rows / 4000, torch.eye(8), rtol=0, atol=0.1)


def test_tdmpq_foretells_what_an_encoder_loses(encoder: Checkpoint, foretold: Columns, text: Tensor) -> None:
    """Also in size: costs are 1 - cosine, not scores."""
    own = foretold["cost_4"]
    true = reference.rounding_loss(whole_model(encoder.folder), encoder.blocks, text, 4, 16)
    assert all(cost > 0 for cost in own.values())
    ranks = [torch.tensor([table[layer] for layer in true]).argsort().argsort().double() for table in (own, true)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.8
    assert 0.5 < sum(own.values()) / sum(true.values()) < 2


def test_a_plan_from_costs_keeps_what_runtimes_fuse(
    encoder: Checkpoint, foretold: Columns, tmp_path: Path, ids: Tensor
) -> None:
    """From the table of costs to a file that loads: 5 bits on average, q, k and v alike."""
    groups = fused_groups(encoder.layers)
    assert len(groups) == 4 * encoder.depth  # q/k/v, the attention's output, and two of the MLP
    sizes = group_sizes(groups, encoder.layers, WIDTHS)
    costs = {
        group: {bits: sum(foretold[f"cost_{bits}"][layer] for layer in group) for bits in WIDTHS} for group in groups
    }
    weights = sum(rows * width for rows, width in encoder.layers.values())
    bits = by_layer(by_budget(costs, sizes, 5 * weights), encoder.layers)
    assert 4 < average_bits(bits, encoder.layers) <= 5
    packed = quantized(encoder, tmp_path / "packed", {layer: Scheme(width, 16) for layer, width in bits.items()}, ids)
    torch.testing.assert_close(loaded(packed, ids), rounded(encoder, packed, ids), rtol=0, atol=1e-6)


def test_measured_ranks_an_encoders_layers_alike(
    encoder: Checkpoint, foretold: Columns, text: Tensor, tmp_path: Path
) -> None:
    true = measured.measure(make_skeleton(encoder.folder), text[:20], Journal(tmp_path), PER_LAYER)["cost_2"]
    ranks = [
        torch.tensor([table[layer] for layer in true]).argsort().argsort().double()
        for table in (foretold["cost_2"], true)
    ]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.5
