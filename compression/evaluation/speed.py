"""How fast a checkpoint runs: as transformers loads it in anyone's script, and with kernels that take its codes."""

import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compression.core.checkpoint import Checkpoint
from compression.evaluation.generation import load_model
from compression.evaluation.kernels import NONE, use_kernels

# Tokens on which the two ways are compared: few enough for every kernel, and the prompt's last, as the first of most
# vocabularies are special ones, whose huge activations magnify any rounding.
TRIAL = 8


@torch.no_grad()
def measure_speed(
    folder: Path, prefill: int, decode: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Loads the checkpoint with `from_pretrained` and times it; the medians of `repeats` count.

    Args:
        prefill: tokens of the prompt.
        decode: tokens generated greedily after it, one at a time.

    Returns:
        device, dtype; load_seconds; prefill_tokens_per_second; decode_tokens_per_second; weight_bytes, those in
        memory, which are plain weights after the first pass; peak_memory_bytes, of this whole process, or of the GPU
        where there is one; and `kernels`: None if no layer got one, else the two rates and weight_bytes with them,
        layers, how many run on which kernel, left, the names of those that none fits, and logits_error, the
        difference of the logits as a share of their norm.
    """
    start = time.perf_counter()
    model = load_model(folder, device, dtype)
    loaded = time.perf_counter() - start
    prompt = torch.arange(prefill, device=device)[None] % model.config.vocab_size
    logits = _logits(model, prompt)
    figures = {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "load_seconds": loaded,
        **_rates(model, prompt, decode, repeats),
        "peak_memory_bytes": _peak_memory(device),
    }
    del model
    return figures | {"kernels": _with_kernels(folder, prompt, decode, repeats, dtype, logits)}


def _with_kernels(
    folder: Path, prompt: Tensor, decode: int, repeats: int, dtype: torch.dtype, logits: Tensor
) -> dict[str, Any] | None:
    checkpoint = Checkpoint(folder)
    if "quantization" not in checkpoint.manifest:
        return None
    model = load_model(folder, prompt.device, dtype)
    chosen = use_kernels(model, checkpoint)
    layers = Counter(kernel for kernel in chosen.values() if kernel != NONE)
    if not layers:
        return None
    error = (_logits(model, prompt) - logits).norm() / logits.norm()
    return {
        "layers": dict(sorted(layers.items())),
        "left": [layer for layer, kernel in chosen.items() if kernel == NONE],
        **_rates(model, prompt, decode, repeats),
        "logits_error": error.item(),
    }


def _logits(model: nn.Module, prompt: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=prompt[:, -TRIAL:]).logits
    return logits.float()


def _rates(model: Any, prompt: Tensor, decode: int, repeats: int) -> dict[str, float]:
    def fill() -> None:
        model(input_ids=prompt, use_cache=True)

    def generate() -> None:
        model.generate(prompt, max_new_tokens=decode, min_new_tokens=decode, do_sample=False)

    fill()  # fills caches, and unpacks what is packed
    filling = _median_seconds(fill, repeats, prompt.device)
    generating = _median_seconds(generate, repeats, prompt.device)
    # generate() fills the prompt, too, and its first token comes from there.
    decoding = max(generating - filling, 1e-9)
    return {
        "prefill_tokens_per_second": prompt.numel() / filling,
        "decode_tokens_per_second": max(decode - 1, 1) / decoding,
        "weight_bytes": _weight_bytes(model),
    }


def _weight_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, those that modules share counted once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}.values())


def _median_seconds(work: Callable[[], None], repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS
