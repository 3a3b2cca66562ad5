"""Stage quantize: which scheme each layer gets."""

from compression.quantization.scheme import Scheme
from tasks.params.base import load, read
from tasks.params.quantize import Quantize
from tasks.quantize import all_schemes


def params(**changes: object) -> Quantize:
    return read(Quantize, {"quantize": load()["quantize"] | changes})


def test_an_embedding_of_8_bits_among_other_layers_has_a_scale_a_row() -> None:
    wanted = params(embeddings=8, group_size=64, symmetric=False)
    assert all_schemes(wanted, {"a": 4, "b": 16}, "e") == {"e": Scheme(8, "row"), "a": Scheme(4, 64, False)}


def test_an_embedding_like_all_layers_has_their_grid() -> None:
    wanted = params(embeddings=8, group_size=64, symmetric=False)
    assert all_schemes(wanted, {"a": 8}, "e") == dict.fromkeys("ea", Scheme(8, 64, False))


def test_no_embedding_is_rounded_unless_asked() -> None:
    assert all_schemes(params(embeddings=None, group_size=64, symmetric=True), {"a": 4}, "e") == {"a": Scheme(4, 64)}
