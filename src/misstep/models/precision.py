"""What this machine computes on and in: the types of weights, and of products of matrices.

This module knows torch and processors; it knows no model.
"""

import os
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MICRO_TOKENS = {"cpu": 1536, "cuda": 16384}
"""Padded tokens of one micro-batch: what a processor needs to be busy, and not more memory.

SmolLM2-135M, rows of analyses, one core: 1,024 take as long as 2,048, and 0.5 GB less. Between
the two, since more cores need more rows; that was not measured apart."""


def device() -> str:
    """Where models are computed here: `cuda`, or `cpu` where there is no GPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def weights_dtype() -> "torch.dtype":
    """The type that weights are held in: bf16 where the processor computes in it, else fp32."""
    import torch

    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        native = bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))
    return torch.bfloat16 if native else torch.float32


def products_dtype(held: "torch.dtype", device: str) -> "torch.dtype":
    """The type to multiply matrices in that are held in another: their own, or fp32.

    Products of bf16 are summed in fp32 either way; what differs is where they are rounded.
    """
    import torch

    slow = held == torch.bfloat16 and device == "cpu" and bf16_is_slow()
    return torch.float32 if slow else held


def fastest_dtype() -> "torch.dtype":
    """The type to hold weights in for code that multiplies them as they are, as TRL's does."""
    return products_dtype(weights_dtype(), device())


@cache
def bf16_is_slow() -> bool:
    """Whether this processor multiplies matrices of bf16 more slowly than matrices of fp32.

    Intel's since Sapphire Rapids leave bf16 to AMX. Where a virtual machine hides that,
    AVX512-BF16 remains, which was seen to take twice as long as fp32 (torch 2.13).
    """
    import torch

    able = torch.cpu.get_capabilities()
    since = bool(able.get("avx512_bf16") and able.get("avx512_fp16"))
    return since and "Intel" in str(able.get("cpu_name")) and not able.get("amx_bf16")


@cache
def products_are_cheap(device: str) -> bool:
    """Whether products take so little of a step that to compute one again beats keeping it.

    So it was seen with AMX; with AVX512-BF16 a step takes a seventh longer for it. Of a GPU it
    was not measured.
    """
    import torch

    return device == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def micro_tokens() -> int:
    """Padded tokens of one micro-batch on this machine."""
    return MICRO_TOKENS[device()]


def memory_bytes() -> int:
    """This machine's main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
