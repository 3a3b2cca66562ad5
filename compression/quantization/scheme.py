"""Which layer lies on what kind of grid: as the manifest says it, and as config.json tells transformers and vLLM.

What transformers 5.23 with compressed-tensors 0.20 was found to load by plain `from_pretrained`:

- Symmetric grids of linears, of any width from 2 to 8 bits, one scheme or many mixed: as they are.
- An asymmetric grid with packed zero points does not load as it is: the module that is to receive them is made with
  unpacked ones, and the shapes differ. Nor does a packed embedding: transformers' initialisation looks for its
  `weight`. Both load with `"dequantize": true` in the entry, which turns every weight into a plain one as it is read;
  a tied head then takes the embedding's, so that both are stored once.
- That way reads all layers by the first group's scheme, so it is right for one scheme only. Among several
    - an asymmetric layer is written with strategy `tensor_group`, whose zero points are not packed (layout `loose`);
      the global scale that goes with it is 1, and not used in unpacking;
    - an embedding needs 8 bits and format `int-quantized`, which keeps the codes in `weight` (layout `bytes`); a tied
      head shares these codes, and has a scale of its own.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import Tensor, nn

from compression.core.errors import Problem
from compression.core.skeleton import empty_model
from compression.quantization.grid import Grid, GroupSize
from compression.quantization.packed import Layout, pack


@dataclass(frozen=True)
class Scheme:
    """The kind of a layer's grid."""

    bits: int
    group_size: GroupSize
    symmetric: bool = True


@dataclass(frozen=True)
class Anatomy:
    """Names of a model's modules.

    Attributes:
        embedding: of the tokens.
        head: the linear whose output are the logits, if there is one.
        tied: whether the head computes with the embedding's weight.
        linears: all of them, in the order of the model, the head among them.
    """

    embedding: str
    head: str | None
    tied: bool
    linears: tuple[str, ...]


def anatomy(folder: Path) -> Anatomy:
    """Names of the modules of the model that config.json in `folder` describes."""
    model = empty_model(folder)
    names = {module: name for name, module in model.named_modules()}
    head = model.get_output_embeddings()  # type: ignore[operator]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    model.tie_weights()  # type: ignore[operator]
    return Anatomy(
        names[embedding],
        names.get(head),
        head is not None and head.weight is embedding.weight,
        tuple(name for module, name in names.items() if isinstance(module, nn.Linear)),
    )


def to_manifest(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """What a manifest says under `quantization`; `bits` by layer and, if all have the same, `group_size` beside."""
    sizes = {scheme.group_size for scheme in schemes.values()}
    return {
        "group_size": sizes.pop() if len(sizes) == 1 else None,
        "bits": {layer: scheme.bits for layer, scheme in schemes.items()},
        "schemes": {layer: asdict(scheme) for layer, scheme in schemes.items()},
    }


def from_manifest(manifest: Mapping[str, Any]) -> dict[str, Scheme]:
    """Schemes by layer out of a checkpoint's manifest; empty if it is not quantised."""
    entry = manifest.get("quantization", {})
    if "schemes" not in entry:  # written when all grids were symmetric, of one group size
        return {layer: Scheme(bits, entry["group_size"]) for layer, bits in entry.get("bits", {}).items()}
    return {layer: Scheme(**scheme) for layer, scheme in entry["schemes"].items()}


def layouts(schemes: Mapping[str, Scheme], model: Anatomy) -> dict[str, Layout]:
    """How each layer has to be stored for transformers to load the whole; see the module's docstring.

    Raises:
        Problem: a combination that does not load, or a head that has no weight of its own.
    """
    if model.tied and model.head is not None and model.head in schemes:
        raise Problem(model.head, "computes with the embedding's weight", f"quantise {model.embedding} instead")
    alike = len(set(schemes.values())) == 1
    return {layer: "packed" if alike else _layout(layer, scheme, model) for layer, scheme in schemes.items()}


def pack_outer(
    outer: Mapping[str, Tensor],
    rounded: Mapping[str, tuple[Tensor, Grid]],
    layouts: Mapping[str, Layout],
    model: Anatomy,
) -> dict[str, Tensor]:
    """The tensors outside the blocks with the weights of some modules as codes.

    Args:
        outer: plain, by full name.
        rounded: codes int8 [out, in] and their grid by module: the embedding, the head, or both if they are not tied.
        layouts: of all layers of the model.
    """
    packed = {name: tensor for name, tensor in outer.items() if name.removesuffix(".weight") not in rounded}
    for layer, (codes, grid) in rounded.items():
        packed |= pack(layer, codes, grid, layouts[layer])
        for head in _sharing(layer, layouts[layer], model):
            parts = pack(head, codes, grid, layouts[layer])
            packed |= {name: part.clone() for name, part in parts.items() if name != f"{head}.weight"}
    return packed


def config_entry(schemes: Mapping[str, Scheme], model: Anatomy) -> dict[str, Any]:
    """`quantization_config` of config.json: a group for each distinct scheme, `ignore` the linears that are left.

    Args:
        schemes: by layer; layers that are not named stay in full precision.

    Raises:
        Problem: a combination that does not load.
    """
    groups: dict[tuple[Scheme, Layout], list[str]] = {}
    for layer, layout in layouts(schemes, model).items():
        groups.setdefault((schemes[layer], layout), []).extend([layer, *_sharing(layer, layout, model)])
    tied = {model.head} if model.tied and model.embedding in schemes else set()
    config = QuantizationConfig(
        config_groups={
            f"group_{number}": QuantizationScheme(
                targets=targets,
                weights=_arguments(scheme, layout),
                format="int-quantized" if layout == "bytes" else None,
            )
            for number, ((scheme, layout), targets) in enumerate(sorted(groups.items(), key=lambda one: str(one[0])))
        },
        format="pack-quantized",
        quantization_status="compressed",
        ignore=[layer for layer in model.linears if layer not in schemes.keys() | tied],
    )
    entry: dict[str, Any] = config.model_dump(mode="json")
    packs_zeros = any(not scheme.symmetric and scheme.group_size != "tensor" for scheme in schemes.values())
    plain = {"dequantize": True} if len(groups) == 1 and (packs_zeros or model.embedding in schemes) else {}
    return entry | {"quant_method": "compressed-tensors"} | plain


def _layout(layer: str, scheme: Scheme, model: Anatomy) -> Layout:
    """Of a layer in a model of several schemes."""
    if layer == model.embedding:
        if scheme.bits != 8:
            raise Problem(
                layer,
                f"transformers does not load an embedding of {scheme.bits} bits among layers of other schemes",
                "valid: 8 bits; or bits, group size and symmetry alike for all",
            )
        return "bytes"
    if scheme.symmetric or scheme.group_size == "tensor":
        return "packed"
    if scheme.group_size == "row":
        raise Problem(
            layer,
            "transformers does not load asymmetric rows among layers of other schemes",
            "valid: groups; a symmetric grid; or bits, group size and symmetry alike for all",
        )
    return "loose"


def _sharing(layer: str, layout: Layout, model: Anatomy) -> list[str]:
    """The modules that compute with a layer's codes, but have to be given its scale anew."""
    return [model.head] if layout == "bytes" and model.tied and model.head and layer == model.embedding else []


def _arguments(scheme: Scheme, layout: Layout) -> QuantizationArgs:
    grouped = isinstance(scheme.group_size, int)
    named = {"row": "channel", "tensor": "tensor"}
    return QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        symmetric=scheme.symmetric,
        strategy=("tensor_group" if layout == "loose" else "group") if grouped else named[str(scheme.group_size)],
        group_size=scheme.group_size if grouped else None,
    )
