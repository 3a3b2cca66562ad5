"""What the tests of compression/ share: one thread, a text, and checkpoints further down the chain."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compression.core.checkpoint import Checkpoint
from compression.pruning import wanda
from compression.pruning.pattern import Unstructured
from tests import tiny
from tests.compression import helpers
from tests.conftest import Make


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ids() -> Tensor:
    """Calibration text int64 [6, 64]."""
    return tiny.encode(tiny.sentences(2, 12))[:6]


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory, imported: Make, ids: Tensor) -> Checkpoint:
    """A llama that Wanda has halved. Not to be changed."""
    folder: Path = tmp_path_factory.mktemp("pruned") / "llama"
    return helpers.prune(imported("llama"), folder, wanda, Unstructured(0.5), ids)


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory, pruned: Checkpoint) -> Checkpoint:
    """The same llama on 4 bits, its first block on 8. Not to be changed."""
    return helpers.quantize(pruned, tmp_path_factory.mktemp("quantized") / "llama")
