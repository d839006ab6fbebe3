r"""What the scripts share: devices, and where and when something was measured."""

from __future__ import annotations

import argparse
import datetime
import platform
from pathlib import Path

import pyro
import torch

from pyro_vaediff.arguments import exit_on_error
from pyro_vaediff.train.main import choose_device, without_tf32

__all__ = ["choose_device", "exit_on_error", "parse_device", "provenance", "without_tf32"]


def parse_device(name: str) -> torch.device:
    r"""Returns a device that is there, for ``argparse``, and has it compute in full float32."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{name!r} is no device: use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{name!r} is not supported: use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("no CUDA device is available")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(f"{name!r} is not there: there are {count} CUDA devices")
    without_tf32()
    return device


def provenance(device: torch.device) -> str:
    r"""Returns on what, with what and when something was measured."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
        if cpuinfo.exists():
            models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
            machine = models[0].partition(":")[2].strip() if models else machine
        machine = f"{machine}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, pyro {pyro.__version__}"
    return f"{machine}; {versions}, {datetime.date.today()}"
