"""What vLLM is known not to take is said, a sentence each, and nothing else."""

import pytest

from compression.export.vllm import vllm_faults
from compression.quantization.scheme import Anatomy, Scheme, config_entry

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LAYERS = [f"model.layers.{index}.{part}" for index in range(2) for part in PARTS]
MODEL = Anatomy("model.embed_tokens", "lm_head", True, (*LAYERS, "lm_head"))


def faults(schemes: dict[str, Scheme]) -> list[str]:
    return vllm_faults(config_entry(schemes, MODEL))


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(8, 128), Scheme(4, "row"), Scheme(4, 32, False)], ids=str)
def test_what_is_known_to_be_taken(scheme: Scheme) -> None:
    assert faults(dict.fromkeys(LAYERS, scheme)) == []


def test_mixed_widths_are_taken_where_fused_layers_agree() -> None:
    assert faults({layer: Scheme(8 if ".0." in layer or "mlp" in layer else 4, 64) for layer in LAYERS}) == []


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (Scheme(3, 64), "3 bits, symmetric"),
        (Scheme(8, 64, False), "8 bits, asymmetric"),
        (Scheme(4, 16), "groups of 16"),
        (Scheme(4, "tensor"), "strategy tensor"),
    ],
    ids=str,
)
def test_grid_without_a_kernel_is_named(scheme: Scheme, said: str) -> None:
    (fault,) = faults(dict.fromkeys(LAYERS, scheme))
    assert fault.startswith(f"{LAYERS[0]} and {len(LAYERS) - 1} more: ")
    assert said in fault


@pytest.mark.parametrize("odd", [Scheme(8, 64), None], ids=["wider", "left"])
def test_torn_fusion_is_named(odd: Scheme | None) -> None:
    schemes = dict.fromkeys(LAYERS, Scheme(4, 64))
    del schemes["model.layers.1.self_attn.k_proj"]
    if odd:
        schemes["model.layers.1.self_attn.k_proj"] = odd
    assert faults(schemes) == [
        "model.layers.1.self_attn: q_proj, k_proj, v_proj are fused, so they have to share a scheme"
    ]


def test_asymmetric_grids_among_several_are_named() -> None:
    found = faults({layer: Scheme(4 if ".0." in layer else 8, 64, symmetric=False) for layer in LAYERS})
    assert len(found) == 2
    assert all("strategy tensor_group" in fault for fault in found)


def test_embedding_is_named() -> None:
    linears = dict.fromkeys(LAYERS, Scheme(4, 64))
    (alike,) = faults(linears | {"model.embed_tokens": Scheme(4, 64)})
    assert alike.startswith("model.embed_tokens: an embedding")
    (other,) = faults(linears | {"model.embed_tokens": Scheme(8, "row")})
    assert other.startswith("model.embed_tokens and 1 more: format int-quantized")


def test_entry_that_does_not_parse_is_a_fault() -> None:
    (fault,) = vllm_faults({"config_groups": {"group_0": {"targets": ["a"], "weights": {"num_bits": "many"}}}})
    assert fault.startswith("compressed-tensors does not parse the entry")
