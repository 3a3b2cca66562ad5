"""Files are there whole or not at all, damage is noticed, and no pruned weight comes back."""

import errno
import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression.core import files, masks
from compression.core.checkpoint import INDEX, MASKS, OUTER, Checkpoint, CheckpointWriter, block_file
from compression.core.errors import Problem
from compression.core.files import read_tensors, sha256, write_tensors, write_text
from compression.core.journal import Journal
from tests.compression.helpers import Killed, all_masks, hashes, lineage
from tests.reference import masks as reference

FILES = [OUTER, *(block_file(index) for index in range(3)), MASKS]


@pytest.fixture
def copy(pruned: Checkpoint, tmp_path: Path) -> Checkpoint:
    """A pruned checkpoint that may be spoilt."""
    shutil.copytree(pruned.folder, tmp_path / "copy")
    return Checkpoint(tmp_path / "copy")


def read_everything(checkpoint: Checkpoint) -> None:
    checkpoint.outer()
    checkpoint.masks()
    for index in range(checkpoint.depth):
        checkpoint.block(index)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_one_changed_byte_is_noticed(name: str, place: float, copy: Checkpoint) -> None:
    content = bytearray((copy.folder / name).read_bytes())
    content[round(place * (len(content) - 1))] ^= 1
    (copy.folder / name).write_bytes(content)
    with pytest.raises(Problem, match=rf"{name}: the file is not the one its manifest names"):
        read_everything(copy)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(name: str, copy: Checkpoint) -> None:
    (copy.folder / name).unlink()
    with pytest.raises(Problem, match=rf"{name}: the file is missing\n.*run the stage"):
        read_everything(copy)


def test_truncated_file_without_a_hash_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path / "live.safetensors", {"x": torch.ones(100)})
    (tmp_path / "live.safetensors").write_bytes((tmp_path / "live.safetensors").read_bytes()[:-8])
    with pytest.raises(Problem, match=r"live\.safetensors: not a safetensors file"):
        read_tensors(tmp_path / "live.safetensors")


def test_folder_without_or_with_broken_manifest(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"manifest\.json: no checkpoint here"):
        Checkpoint(tmp_path)
    (tmp_path / "manifest.json").write_text('{"depth": 3')
    with pytest.raises(Problem, match=r"manifest\.json: not JSON"):
        Checkpoint(tmp_path)


def test_manifest_names_every_file(pruned: Checkpoint) -> None:
    there = {file.name: sha256(file) for file in pruned.folder.iterdir() if file.name != "manifest.json"}
    assert pruned.manifest["files"] == there
    assert {*FILES, INDEX, "config.json", "tokenizer.json"} <= set(there)


def test_index_names_every_tensor(pruned: Checkpoint) -> None:
    index = json.loads((pruned.folder / INDEX).read_text())
    stored = {name: file for file in FILES[:-1] for name in read_tensors(pruned.folder / file)}
    assert index["weight_map"] == stored
    size = sum(tensor.nbytes for file in FILES[:-1] for tensor in read_tensors(pruned.folder / file).values())
    assert index["metadata"]["total_size"] == size


def write(source: Checkpoint, target: Path) -> CheckpointWriter:
    """Everything but the finish."""
    writer = CheckpointWriter(target, source.folder)
    writer.write_outer(source.outer())
    for index in range(source.depth):
        writer.write_block(index, source.block(index), source.block_masks(index, source.masks()))
    return writer


def test_nothing_counts_before_the_finish(pruned: Checkpoint, tmp_path: Path) -> None:
    writer = write(pruned, tmp_path / "new")
    with pytest.raises(Problem, match="no checkpoint here"):
        Checkpoint(tmp_path / "new")
    writer.finish(pruned.depth, lineage(pruned))
    assert hashes(tmp_path / "new") == hashes(pruned.folder)


def test_half_written_file_is_not_seen(pruned: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise Killed

    target = tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", dying)
        with pytest.raises(Killed):
            write(pruned, target)
    assert (target / f"{OUTER}.part").read_bytes() == b"half"
    assert not (target / OUTER).exists()
    write(pruned, target).finish(pruned.depth, lineage(pruned))
    assert hashes(target) == hashes(pruned.folder)


def test_killed_while_writing_the_manifest(pruned: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(path: Path, text: str) -> None:
        if path.name == "manifest.json":
            path.with_name("manifest.json.part").write_text(text[:100])
            raise Killed
        write_text(path, text)

    target = tmp_path / "new"
    writer = write(pruned, target)
    with monkeypatch.context() as patch:
        patch.setattr("compression.core.checkpoint.write_text", dying)
        with pytest.raises(Killed):
            writer.finish(pruned.depth, lineage(pruned))
    write(pruned, target).finish(pruned.depth, lineage(pruned))
    assert hashes(target) == hashes(pruned.folder)


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size` bytes: the system itself refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_really(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(10)})
    before = (tmp_path / "x.safetensors").read_bytes()
    with (
        small_disk(10_000),
        pytest.raises(Problem, match=r"x\.safetensors: the disk is full\n.*finished blocks are kept"),
    ):
        write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(100_000)})
    with small_disk(10_000), pytest.raises(Problem, match=r"y\.json: the disk is full"):
        write_text(tmp_path / "y.json", "x" * 100_000)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_bytes() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_by_its_number(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(code, "in any language")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(Problem, match="the disk is full"):
        write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


def test_other_errors_keep_their_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        write_text(tmp_path / "missing" / "x.json", "{}")


def test_revived_weight_is_not_written(pruned: Checkpoint, tmp_path: Path) -> None:
    tensors, keep = pruned.block(1), pruned.block_masks(1, pruned.masks())
    layer = "model.layers.1.mlp.down_proj"
    row, column = (~keep[layer]).nonzero()[5]
    tensors[f"{layer}.weight"][row, column] = 1e-30
    writer = CheckpointWriter(tmp_path / "new", pruned.folder)
    with pytest.raises(Problem, match=r"model\.layers\.1\.mlp\.down_proj: 1 pruned weights are not zero any more"):
        writer.write_block(1, tensors, keep)
    assert not (tmp_path / "new" / block_file(1)).exists()


def test_revived_counts_only_what_was_pruned() -> None:
    keep = torch.tensor([[True, False, False, True]])
    assert masks.revived(torch.tensor([[0.0, 0.0, -0.0, 3.0]]), keep) == 0  # a kept weight may be zero
    assert masks.revived(torch.tensor([[0.0, 1.0, float("nan"), 3.0]]), keep) == 2
    assert masks.revived(torch.tensor([[0, 1, 0, 3]], dtype=torch.int8), keep) == 1


def test_mask_is_not_guessed_from_zeros(pruned: Checkpoint, tmp_path: Path) -> None:
    """A kept weight that happens to be zero stays kept."""
    keep = pruned.block_masks(0, pruned.masks())
    tensors = pruned.block(0)
    layer = next(iter(keep))
    tensors[f"{layer}.weight"][:] = 0
    writer = CheckpointWriter(tmp_path / "new", pruned.folder)
    writer.write_outer(pruned.outer())
    writer.write_block(0, tensors, keep)
    writer.finish(1, lineage(pruned))
    assert torch.equal(all_masks(Checkpoint(tmp_path / "new"))[layer], keep[layer])


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_masks_round_trip(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 19))
    bits = data.draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))
    keep = torch.tensor(bits).view(rows, width)
    packed = masks.pack(keep)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == reference.pack(keep)
    assert torch.equal(masks.unpack(packed, width), keep)


def test_link_shares_the_file(pruned: Checkpoint, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "new", pruned.folder)
    writer.link(pruned, OUTER)
    writer.link(pruned, OUTER)  # again, as after a kill
    assert (tmp_path / "new" / OUTER).samefile(pruned.folder / OUTER)


def test_link_copies_where_it_cannot_link(pruned: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr("compression.core.checkpoint.os.link", refuse)
    CheckpointWriter(tmp_path / "new", pruned.folder).link(pruned, OUTER)
    assert sha256(tmp_path / "new" / OUTER) == sha256(pruned.folder / OUTER)


def test_tensors_come_in_the_same_order_every_time(pruned: Checkpoint) -> None:
    """safetensors gives them in another order on every call; bytes and random draws must not depend on that."""
    orders = {tuple(read_tensors(pruned.folder / MASKS)) for _ in range(8)}
    assert len(orders) == 1


def test_journal_remembers_the_last_save(tmp_path: Path) -> None:
    assert Journal(tmp_path / "j").load() == (0, {})
    Journal(tmp_path / "j").save(1, {"hidden": torch.ones(2)})
    Journal(tmp_path / "j").save(2, {"hidden": torch.full((2,), 3.0)})
    finished, state = Journal(tmp_path / "j").load()
    assert finished == 2
    assert {name: tensor.tolist() for name, tensor in state.items()} == {"hidden": [3.0, 3.0]}


def test_joined_files_are_the_file_written_at_once(tmp_path: Path) -> None:
    tensors = {
        "b.1": torch.arange(12, dtype=torch.uint8).view(3, 4),
        "a.0": torch.arange(5, dtype=torch.uint8).view(1, 5),
        "c.2": torch.ones(2, 2, dtype=torch.uint8),
    }
    for number, name in enumerate(tensors):
        write_tensors(tmp_path / str(number), {name: tensors[name]})
    files.join_tensors(tmp_path / "joined", [tmp_path / str(number) for number in range(3)])
    write_tensors(tmp_path / "whole", tensors)
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "whole").read_bytes()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_tensors(tmp_path / "joined").items())
