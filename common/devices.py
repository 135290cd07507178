"""Choose the device that a program runs on, and the precision that is fast there.

Apple's MPS lacks autocast and float64; this file and `mask_diffusion.exact_dtype` avoid them there.
Nobody has run this project on MPS yet.
"""

import os
import re
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from common.cli import UserError

DEVICES = ["auto", "cpu", "cuda", "mps"]
DTYPES = ["auto", "float32", "bfloat16"]
NATIVE_BFLOAT16 = r"\b(avx512_bf16|amx_bf16|bf16)\b"            # flags of x86 and Arm processors


def world_size() -> int:
    """Return the number of processes that torchrun starts; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def choose_device(name: str) -> str:
    """Return "cuda", "mps" or "cpu" for a --device; auto takes the first available, in this order.
    A number stays, as in "cuda:1".

    Raises UserError for a device that is not available."""
    several = world_size() > 1                                   # MPS can't connect them
    available = {"cuda": torch.cuda.is_available(), "cpu": True,
                 "mps": torch.backends.mps.is_available() and not several}
    if name == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    kind, _, number = name.partition(":")
    if kind not in available:
        raise UserError(f"--device {name}: expected one of {', '.join(DEVICES)}")
    if number and not (number.isdecimal() and int(number) < torch.cuda.device_count()):
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, "
                        f"numbered from 0")
    if not available[kind]:
        where = "several processes" if name == "mps" and several else "this machine"
        raise UserError(f"--device {name}: torch has none for {where}; use --device cpu")
    return name


def processor_flags() -> str:
    """Return the text of /proc/cpuinfo; "" on systems without it."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def has_bfloat16(device: torch.device) -> bool:
    """Return True if the device multiplies bfloat16 natively.

    If it does not, float32 can be 75 times faster than bfloat16.  On a CPU both the processor and
    oneDNN must support it: with ONEDNN_MAX_CPU_ISA=AVX2 the result is False."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    native = re.search(NATIVE_BFLOAT16, processor_flags())
    return bool(native) and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_dtype(name: str, device: torch.device) -> tuple[str, str]:
    """Return ("float32" or "bfloat16", the reason) for a --dtype of matrix products.

    Weights are always float32.  Raises UserError for bfloat16 on MPS."""
    if device.type == "mps" and name == "bfloat16":
        raise UserError("--dtype bfloat16: autocast is not used on MPS; use --dtype float32")
    if name != "auto":
        return name, f"--dtype {name}"
    if has_bfloat16(device):
        return "bfloat16", f"this {device.type.upper()} multiplies bfloat16 natively"
    return "float32", f"this {device.type.upper()} has no native bfloat16"


def check_compiler(device: torch.device) -> None:
    """Raise UserError if --compile has no C++ compiler, which it needs on a CPU."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and not shutil.which(compiler):
        raise UserError(f"--compile: on a CPU torch needs the C++ compiler {compiler}, which is "
                        f"not there (CXX names another one); leave it out")


def autocast(device: torch.device, dtype: str, **settings) -> AbstractContextManager:
    """Return a context that computes matrix products in `dtype`; settings go to torch.autocast."""
    if dtype == "float32":
        return nullcontext()                                     # the only dtype on MPS
    return torch.autocast(device.type, getattr(torch, dtype), **settings)


def allow_tf32(device: torch.device, dtype: str) -> None:
    """Allow TF32 on a GPU for the text head's float32 products, if all others are in bfloat16.

    On an H100 float32 reaches 67 TFLOP/s and TF32 about 490.  TF32's rounding changes a token's
    cross-entropy by at most 0.0017 nats, bfloat16's by 0.06 (`python -m experiments.tf32_head`, a
    simulation with the shipped weights)."""
    if device.type == "cuda" and dtype == "bfloat16":
        torch.set_float32_matmul_precision("high")
