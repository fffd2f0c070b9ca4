"""Which floating-point precision a device computes in fastest."""

import time
from functools import cache

import torch

CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # as torch calls those of a CPU
WORTHWHILE = 1.2  # times float32's rate
NARROW = 128  # below this width casting to bfloat16 takes longer than its products save


def autocast_dtype(name: str) -> torch.dtype | None:
    """Returns the precision of autocast under a setting `dtype`, None where it is off."""
    return dict(bfloat16=torch.bfloat16, float16=torch.float16).get(name)


def fastest_dtype(device: torch.device, width: int) -> str:
    """Returns the precision in which a model of a width runs fastest: bfloat16 on GPUs and CPUs
    that compute it, float16 on older GPUs, float32 elsewhere and for narrow models on a CPU.

    What torch says of a CPU is confirmed by `bfloat16_speed`.
    """
    if device.type == "cuda":
        return "float16" if emulates_bfloat16(device) else "bfloat16"
    computes = device.type == "cpu" and width >= NARROW and computes_bfloat16() \
        and bfloat16_speed() >= WORTHWHILE
    return "bfloat16" if computes else "float32"


def emulates_bfloat16(device: torch.device) -> bool:
    """Returns whether a CUDA device is of a generation before Ampere (compute capability 8.0).

    torch.cuda.is_bf16_supported() says yes there too, and such a card takes many times as long.
    """
    return torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)


def computes_bfloat16() -> bool:
    """Returns whether this CPU has instructions for bfloat16; torch before 2.13 may not say so."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name) for name in CAPABILITIES)


@cache
def bfloat16_speed() -> float:
    """Returns how many times as fast as in float32 this CPU multiplies matrices in bfloat16.

    Measured once: a product of a 512 x 512 matrix takes a few milliseconds, the fastest of five
    counts.
    """
    fastest = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(5):
        for dtype, least in fastest.items():
            x = torch.ones(512, 512, dtype=dtype)
            start = time.perf_counter()
            x @ x
            fastest[dtype] = min(least, time.perf_counter() - start)
    return fastest[torch.float32] / fastest[torch.bfloat16]
