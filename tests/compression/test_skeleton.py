"""Walking a model block by block gives what transformers gives, for every family and with one block in memory."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compression.core.errors import Problem
from compression.core.skeleton import Skeleton
from compression.importing import import_model
from tests import tiny
from tests.compression.helpers import CPU, make_skeleton, walked_logits, whole_logits
from tests.conftest import Make


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_walk_equals_from_pretrained(family: str, original: Make, imported: Make, ids: Tensor) -> None:
    torch.testing.assert_close(
        walked_logits(imported(family), ids), whole_logits(original(family), ids), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_block_sharded_folder_loads_in_transformers(family: str, original: Make, imported: Make, ids: Tensor) -> None:
    assert torch.equal(whole_logits(imported(family), ids), whole_logits(original(family), ids))


@pytest.mark.parametrize("family", ["llama", "gemma3", "bert"])
def test_walk_in_bfloat16(family: str, imported: Make, ids: Tensor) -> None:
    """No further from float32 than transformers' own bfloat16."""
    walked = walked_logits(imported(family), ids, torch.bfloat16)
    assert walked.dtype == torch.bfloat16
    exact, usual = whole_logits(imported(family), ids), whole_logits(imported(family), ids, torch.bfloat16)
    assert (walked - exact).abs().mean() < 1.2 * (usual - exact).abs().mean()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_stored_in_bfloat16_computed_in_float32(family: str, original: Make, tmp_path: Path, ids: Tensor) -> None:
    import_model(original(family), tmp_path / "half", "bfloat16", {})
    torch.testing.assert_close(
        walked_logits(tmp_path / "half", ids), whole_logits(tmp_path / "half", ids), rtol=1e-5, atol=1e-5
    )


def test_batches_of_different_shapes_do_not_mix(imported: Make, ids: Tensor) -> None:
    skeleton = make_skeleton(imported("gemma2"))
    short = ids[:2, :20]
    states, short_states = skeleton.begin(ids), skeleton.begin(short)
    for index in range(skeleton.depth):
        skeleton.load(index)
        states = skeleton.run(index, states, ids)
        short_states = skeleton.run(index, short_states, short)
        skeleton.release(index)
    torch.testing.assert_close(skeleton.end(states, ids), whole_logits(imported("gemma2"), ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        skeleton.end(short_states, short), whole_logits(imported("gemma2"), short), rtol=1e-5, atol=1e-5
    )


def _blocks_in_memory(skeleton: Skeleton) -> set[int]:
    blocks = skeleton.model.get_submodule(skeleton.path).children()
    return {n for n, block in enumerate(blocks) if any(not p.is_meta for p in block.parameters())}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_one_block_in_memory(family: str, imported: Make, ids: Tensor) -> None:
    skeleton = make_skeleton(imported(family))
    assert _blocks_in_memory(skeleton) == set()
    hidden = skeleton.begin(ids)
    for index in range(skeleton.depth):
        skeleton.load(index)
        hidden = skeleton.run(index, hidden, ids)
        assert _blocks_in_memory(skeleton) == {index}
        skeleton.release(index)
    skeleton.end(hidden, ids)
    assert _blocks_in_memory(skeleton) == set()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_knows_what_predicts_the_next_token(family: str, imported: Make) -> None:
    assert make_skeleton(imported(family)).causal == (family in tiny.CAUSAL)


def test_missing_embedding_is_named(imported: Make) -> None:
    from compression.core.checkpoint import Checkpoint

    checkpoint = Checkpoint(imported("llama"))
    outer = checkpoint.outer()
    del outer["model.embed_tokens.weight"]
    with pytest.raises(Problem, match=r"lacks `model\.embed_tokens\.weight`"):
        Skeleton(checkpoint.folder, outer, checkpoint.block, CPU, torch.float32)


def test_unknown_architecture_is_named(imported: Make, tmp_path: Path) -> None:
    config = (imported("llama") / "config.json").read_text().replace("LlamaForCausalLM", "LamaForCausalLM")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(Problem, match="no architecture `LamaForCausalLM`"):
        Skeleton(tmp_path, {}, dict, CPU, torch.float32)  # type: ignore[arg-type]
