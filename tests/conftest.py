"""Tiny checkpoints, made when first asked for and kept for the session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

# The same cases on every machine: a commit is judged by what it changes. `--hypothesis-profile=search` draws new ones.
settings.register_profile("fixed", derandomize=True, database=None)
settings.register_profile("search", max_examples=1000, deadline=None)
settings.load_profile("fixed")

Make = Callable[[str], Path]


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """family -> folder of a tiny trained model as transformers saves it, float32. Not to be changed."""

    @cache
    def make(family: str) -> Path:
        from tests import tiny

        folder = tmp_path_factory.mktemp("original") / family
        tiny.make(family, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory, original: Make) -> Make:
    """family -> the same model as a block-sharded checkpoint. Not to be changed."""

    @cache
    def make(family: str) -> Path:
        from compression.importing import import_model

        folder = tmp_path_factory.mktemp("imported") / family
        import_model(original(family), folder, "source", {"source": "tiny", "licence": "none"})
        return folder

    return make
