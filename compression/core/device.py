"""Which device computes, and in which type."""

import torch

from compression.core.errors import Problem

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device(name: str) -> torch.device:
    """`auto` is the first accelerator there is, else the CPU.

    Raises:
        Problem: a device was named that this machine does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present[device.type]:
        raise Problem("params.yaml: compute.device", f"there is no `{name}` here", "valid: auto, cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies it in hardware, else float32."""
    if name != "auto":
        return DTYPES[name]
    fast = {
        "cpu": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        "cuda": device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
        "mps": False,
    }
    return torch.bfloat16 if fast[device.type] else torch.float32
