r"""The device of a run, and how it computes."""

from __future__ import annotations

import os

import torch

__all__ = ["choose_device", "make_deterministic", "without_tf32"]


def without_tf32() -> None:
    r"""Makes GPUs compute in full float32."""
    # Densities are sums over thousands of pixels: 10 bits of a convolution's inputs are too few.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def choose_device(name: str) -> torch.device:
    r"""Returns the device that ``--device`` means: ``"auto"``, ``"cpu"`` or ``"cuda"``."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available, use --device cpu or auto")
    without_tf32()
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def make_deterministic() -> None:
    r"""Lets torch choose algorithms that always return the same numbers, on a GPU as well."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it as it starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
