r"""The files of a run: checkpoints, the settings they carry, and models from them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data import ImageData, load
from ..data.groups import list_name
from ..files import describe_error, write_atomically
from ..infer import Estimator, Reweighted, Timestep_ELBO, TraceKL_ELBO
from ..vae import VAE
from .build import make_vae
from .config import ModelConfig

__all__ = [
    "BEST",
    "CHECKPOINT",
    "METRICS",
    "compare_settings",
    "describe_elbo",
    "load_checkpoint",
    "load_data",
    "load_run",
    "load_vae",
    "load_weights",
    "save_checkpoint",
]

CHECKPOINT, BEST, METRICS = "checkpoint.pt", "best.pt", "metrics.csv"
FORMAT, OLD = (f"pyro_vaediff checkpoint, version {n}" for n in (2, 1))
# What every checkpoint of a run has, and what its parts have at least.
PARTS: dict[str, set[str]] = {"train_config": {"precision"}, "data": {"dataset"}, "vae": set()}


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    r"""Saves a checkpoint: nested containers of tensors, numbers and strings.

    Arguments:
        path: The path of the file.
        state: The contents.
    """
    # torch's writer raises other errors for a full disk.
    content = io.BytesIO()
    torch.save({"format": FORMAT} | state, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    r"""Returns a checkpoint on the CPU, without executing any code that may be in it.

    Arguments:
        path: The path of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, or not a checkpoint of this version of the library.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged or foreign file makes torch raise almost any exception, some without a message.
    except Exception as error:
        reason = describe_error(error)[:80]
        raise ValueError(f"{path} is not a checkpoint, or is truncated ({reason})") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found == OLD:
        raise ValueError(
            f"{path} is of version 0.1, whose networks are arranged in another way: train the "
            "model again, or load it with pyro_vaediff 0.1"
        )
    if found != FORMAT:
        raise ValueError(f"{path} was not written by this library ('{FORMAT}' is missing)")
    return state


def load_run(path: str | Path) -> dict[str, Any]:
    r"""Returns the checkpoint of a run.

    Arguments:
        path: A run directory, whose best model is meant, or a checkpoint in one.
    """
    path = Path(path)
    state = load_checkpoint(path / BEST if path.is_dir() else path)
    for part, names in PARTS.items():
        found = state.get(part)
        if not isinstance(found, dict) or not names <= found.keys():
            raise ValueError(f"{path} is no checkpoint of a run: {part!r} is missing or incomplete")
    return state


def load_weights(path: str | Path, vae: VAE) -> VAE:
    r"""Returns a VAE with the weights of a trained one, in eval mode.

    Arguments:
        path: A run directory, whose best model is loaded, or a checkpoint in one.
        vae: A VAE with the same networks, whose weights are replaced.

    Raises:
        ValueError: If the networks differ.
    """
    state = load_run(path)
    try:
        vae.load_state_dict(state["vae"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} has weights of other networks ({reason})") from error
    return vae.eval()


def load_vae(path: str | Path, device: torch.device | str = "cpu") -> tuple[VAE, ModelConfig]:
    r"""Returns a trained VAE in eval mode, and the configuration that it was made from.

    Arguments:
        path: A run directory, whose best model is loaded, or a checkpoint in one.
        device: Where the VAE goes.

    Raises:
        ValueError: If the VAE was made without a configuration, or with one of another version.
    """
    state = load_run(path)
    if not state.get("model_config"):
        raise ValueError(
            f"{path} has no model_config: make the VAE and use load_weights(path, vae)"
        )
    try:
        saved: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in state["model_config"].items()
        }
        config = ModelConfig(**saved)
    except TypeError as error:
        raise ValueError(f"{path} has settings of another version: {error}") from error
    precision = state["train_config"]["precision"]
    vae = make_vae(config).to(device, torch.float64 if precision == "float64" else torch.float32)
    return load_weights(path, vae), config


def load_data(
    path: str | Path,
    root: str | Path = "data",
    download: bool = True,
    groups: str | Path | None = None,
) -> ImageData:
    r"""Returns the images that a VAE was trained on, in its size and channels.

    Arguments:
        path: A run directory, or a checkpoint in one.
        root: The folder that holds the data sets, or the images themselves.
        download: Whether to download what is missing from ``root``.
        groups: The list of groups that the run's splits keep apart, if it had one.

    Raises:
        ValueError: If ``groups`` is not the run's own, which would give other splits.
    """
    state = load_run(path)
    if not state.get("model_config"):
        raise ValueError(f"{path} has no model_config: load the data as it was trained on them")
    channels, size, _ = state["model_config"]["image_shape"]
    name, listed = state["data"]["dataset"], state["data"]["groups"]
    given = None if groups is None else list_name(groups)
    if given != listed:
        raise ValueError(
            f"{path} has other splits: it was trained with groups={listed}, not {given}; give the "
            "list it was trained with, if any (--groups)"
        )
    options = {"image_size": size, "channels": channels, "groups": groups}
    options |= {"num_validation": state["data"].get("num_validation")}
    return load(name, root, download=download, **options)


def compare_settings(path: Path, saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    r"""Raises a ``ValueError`` unless a run is resumed with the settings it was started with.

    Arguments:
        path: The checkpoint, for the message.
        saved: Its settings, by part and name.
        mine: The settings of the run that resumes it.
    """
    config = mine["train_config"]
    # More epochs or steps continue a run, unless its learning rate depends on their number.
    last = "prior_epochs" if config["prior_epochs"] else "epochs"
    free = {"max_seconds", "patience"}
    if config["lr_schedule"] != "cosine":
        free |= {last, "max_steps"}
    for part, settings in mine.items():
        for name, value in (saved.get(part) or {}).items():
            if name not in free and settings.get(name) != value:
                raise ValueError(
                    f"cannot resume {path} with {name}={settings.get(name)!r}: the run was started "
                    f"with {value!r}"
                )


def describe_elbo(elbo: Estimator) -> dict[str, Any]:
    r"""Returns the settings of an estimator."""
    if isinstance(elbo, Reweighted):
        return describe_elbo(elbo.elbo) | {"weighting": elbo.name}
    settings = {"estimator": type(elbo).__name__, "num_particles": elbo.num_particles}
    if isinstance(elbo, TraceKL_ELBO):
        settings |= {"antithetic": elbo.antithetic, "entropy": elbo.entropy, "weighting": "elbo"}
    if isinstance(elbo, Timestep_ELBO):
        settings |= {
            "timesteps": "all" if elbo.proposal is None else type(elbo.proposal).__name__,
            "k": elbo.collapse.k,
            "conditioning": elbo.collapse.conditioning,
            "low_discrepancy": elbo.collapse.low_discrepancy,
        }
    return settings
