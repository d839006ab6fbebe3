r"""Trains, evaluates and shows a variational autoencoder.

    python experiments/run.py --prior diffusion

trains on the 8x8 digits that come with scikit-learn, in a few minutes on two CPU cores; without a
checkout, ``python -m pyro_vaediff`` is the same. Other data are downloaded (``--dataset cifar10``),
or a folder of images of your own (``--dataset folder --root PATH``). Settings that are not given
depend on the data set, and are printed.

The run directory (``--out``) then holds

    config.json             the settings
    metrics.csv             the terms of the training loss and the validation loss, by epoch
    checkpoint.pt, best.pt  the state of the run, and the best model by validation
    epoch-N.pt              the model after N epochs, for each N in --snapshots
    results.json            the test results: everything that was printed at the end
    terms.csv               the negative ELBO of the test images, term by term
    samples.png             samples of the prior, decoded; by class with --condition labels
    guided.png              samples that are not the model's, with --guidance
    reconstructions.png     test images and their reconstructions
    groups.png              what the top groups of latents keep of an image (hierarchy)
    denoising.png           z_T -> z_0, decoded on the way                     (diffusion prior)
    kl_by_timestep.png      where in time the KL divergence is, also as a .csv (diffusion prior)
    history.png, terms.png  the losses by epoch, and the terms of the ELBO as a stack

A run that was stopped continues with ``--resume``, as if it had never stopped.

    torchrun --nproc-per-node 2 experiments/run.py --prior diffusion

trains in two processes, each of which computes its share of every batch, on a GPU of its own if
there are GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pyro
import torch

from ..data import ImageData, load
from ..denoise import REVERSE_VARIANCES
from ..evaluate import Extractor, load_extractor, value_elbo
from ..files import check_folder, write_json
from ..infer import MULTI_SAMPLE, make_elbo, particle_options
from ..nn import check_image_size
from . import distributed
from .config import DataConfig, EstimatorConfig, ModelConfig, ReportConfig, RunConfig, TrainConfig
from .device import choose_device, make_deterministic, without_tf32
from .loop import Trainer
from .options import add_options, check_use, pick
from .report import report
from .runs import CHECKPOINT

__all__ = ["DEFAULTS", "Config", "choose_device", "main", "parse_args", "without_tf32"]

# The settings that hold if none is given. They are the paper's, where it has a say.
DEFAULTS: dict[str, dict[str, object]] = {
    "digits": {
        "latent_dim": 16, "width": 32, "epochs": 60, "lr": 2e-3, "lr_schedule": "inverse-sqrt",
        "ema_share": 0.1, "k": 4, "clip_norm": 100.0,
    },
    "mnist": {
        "latent_dim": 40, "width": 32, "epochs": 50, "lr": 5e-4, "lr_schedule": "constant",
        "clip_norm": 1000.0,
    },
    "cifar10": {
        "latent_dim": 40, "width": 64, "epochs": 250, "lr": 5e-4, "lr_schedule": "constant",
        "clip_norm": 1000.0,
    },
}  # fmt: skip
DEFAULTS["fashion-mnist"] = DEFAULTS["mnist"]
DEFAULTS["celeba"] = DEFAULTS["folder"] = DEFAULTS["cifar10"]

# The sides of the images of a data set, as far as they are known.
SIZES = {"digits": 8, "mnist": 28, "fashion-mnist": 28, "cifar10": 32, "celeba": 64}

PARTS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "estimator": EstimatorConfig,
    "training": TrainConfig,
    "run": RunConfig,
    "metrics": ReportConfig,
}


@dataclass(frozen=True)
class Config:
    r"""The whole configuration of a run."""

    data: DataConfig
    model: ModelConfig
    elbo: EstimatorConfig
    train: TrainConfig
    run: RunConfig
    report: ReportConfig

    def __post_init__(self) -> None:
        variance = self.model.reverse_variance
        if self.elbo.weighting != "elbo" and not REVERSE_VARIANCES[variance].fixed:
            raise ValueError(
                f"weighting={self.elbo.weighting!r} is defined for a fixed reverse variance, got "
                f"reverse_variance={variance!r}"
            )
        if self.report.guidance and not self.model.context_dropout:
            raise ValueError(
                f"guidance={self.report.guidance} needs a prior that has learned to do without "
                "labels: give context_dropout, such as 0.1"
            )
        continuous = self.model.prior == "diffusion" and self.model.num_timesteps == "continuous"
        if continuous and (self.elbo.estimator, self.elbo.weighting) != ("timestep", "elbo"):
            raise ValueError(
                "num_timesteps='continuous' needs estimator='timestep' and weighting='elbo', got "
                f"{self.elbo.estimator!r} and {self.elbo.weighting!r}"
            )
        if self.train.prior_epochs and self.elbo.estimator in MULTI_SAMPLE:
            raise ValueError(
                f"prior_epochs={self.train.prior_epochs} have no data to weight the particles by, "
                f"which estimator={self.elbo.estimator!r} needs: leave them out"
            )
        if self.elbo.k == "auto" and self.model.prior != "diffusion":
            raise ValueError(f"k='auto' is for a diffusion prior, got prior={self.model.prior!r}")
        self.report.check_use(self.model)
        self.model.check_objective(self.elbo.conditioning, self.train.tc_weight)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Config:
        r"""Returns the configuration that the options of a command line are."""
        return cls(*(pick(part, vars(args)) for part in PARTS.values()))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    r"""Returns the options of a command line by name, with the defaults of the data set.

    Raises:
        ValueError: If an option is not valid, or what was chosen has no use for it.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for title, part in PARTS.items():
        add_options(parser.add_argument_group(title), part)
    given = vars(parser.parse_args(argv))
    values = {
        field.name: field.default
        for part in PARTS.values()
        for field in dataclasses.fields(part)
        if "help" in field.metadata
    }
    defaults = DEFAULTS.get(given.get("dataset", "digits"), {})
    defaults = defaults | ({"ema_share": 0.0} if "ema" in given else {})  # one, not both
    args = argparse.Namespace(**values | defaults | given)
    if args.out is None:
        args.out = Path("runs") / f"{args.dataset}-{args.prior}-s{args.seed}"
    config = Config.of(args)  # which checks them
    size = math.prod(config.model.event_shape)
    if "latent_dim" in given and size != args.latent_dim:
        raise ValueError(
            f"latent_dim={args.latent_dim} is not the size of latent_shape or of the first of "
            f"latent_groups, {size}: leave it out"
        )
    args.latent_dim = size
    for part in PARTS.values():
        check_use(part, given, vars(args))
    return args


def choose_extractor(config: Config, device: torch.device) -> Extractor | None:
    r"""Returns the features of the Fréchet distance, if they are wanted and can be had."""
    name = config.report.features
    if name == "none":
        return None
    if name == "auto":
        name = "pixels" if config.data.dataset == "digits" else "inception"
    try:
        return load_extractor(name, weights=config.report.fid_weights, device=device)
    except RuntimeError as error:  # the weights cannot be downloaded
        if config.report.features != "auto":
            raise ValueError(f"--features {name}: {error}") from error
        print(f"no FID will be computed: {error}")
        return None


def load_images(config: DataConfig, model: ModelConfig) -> ImageData:
    r"""Returns the images; what the first process downloads, the others find."""
    if config.image_size is not None:
        check_image_size(config.image_size)
    if size := config.image_size or SIZES.get(config.dataset):  # known before they are loaded
        dataclasses.replace(model, image_shape=(1, size, size)).check_sizes()
    with distributed.in_turns():
        return load(
            config.dataset,
            config.root,
            image_size=config.image_size,
            download=not config.no_download,
            limit=config.limit,
            groups=config.groups,
            num_validation=config.num_validation,
        )


def main(argv: list[str] | None = None) -> None:
    r"""Trains, evaluates and shows a VAE, as the options of a command line say."""
    config = Config.of(parse_args(argv))
    if config.run.deterministic:
        make_deterministic()
    with distributed.process_group(choose_device(config.run.device)) as device:
        run(config, device)


def run(config: Config, device: torch.device) -> None:
    r"""Trains, and evaluates and shows in the main process, which alone prints and writes."""
    main_process, out = distributed.is_main(), Path(config.run.out or "runs")
    pyro.enable_validation(config.run.validate)  # a fifth of the time or more
    torch.distributions.Distribution.set_default_validate_args(config.run.validate)

    check_folder("--out", out)
    if main_process and not config.run.resume and (out / CHECKPOINT).exists():
        raise ValueError(
            f"--out {out} holds a run already: continue it with --resume, or choose another"
        )
    data = load_images(config.data, config.model)
    extractor = choose_extractor(config, device) if main_process else None
    num_images = config.report.num_images
    if extractor is not None and min(num_images, len(data.test)) < 2:
        raise ValueError(
            f"a Fréchet distance needs at least 2 images, got --num-images {num_images} and "
            f"{len(data.test)} test images: use --features none"
        )
    labels = config.data.condition == "labels"
    classes = data.num_classes if labels else 0
    if classes is None:
        raise ValueError(f"condition='labels': {data.name} has no labels, leave it out")
    model = dataclasses.replace(
        config.model, image_shape=data.image_shape, levels=data.levels, num_classes=classes
    )
    options = asdict(config.elbo)
    name, antithetic = options.pop("estimator"), not options.pop("no_antithetic")
    options |= {"antithetic": antithetic}
    if auto_k := options["k"] == "auto":
        options.pop("k")  # from the default to the best
    elbo = make_elbo(name, **options | particle_options(config.elbo.num_particles))
    trainer = Trainer.from_config(
        model,
        config.train,
        elbo,
        data,
        device,
        out,
        config.run.snapshots,
        config.run.init,
        labels=labels,
        auto_k=auto_k,
    )
    if config.run.resume:
        trainer.resume()

    settings = asdict(trainer.model_config or model) | asdict(config.train) | options
    settings |= {"estimator": name, "k": config.elbo.k, "dataset": config.data.dataset}
    settings |= {"groups": data.groups, "device": str(device), "processes": distributed.size()}
    settings |= {"deterministic": config.run.deterministic, "torch": torch.__version__}
    counts = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in trainer.vae.named_children()
    }
    if main_process:
        sizes = {name: len(getattr(data, name)) for name in ("train", "validation", "test")}
        write_json(out / "config.json", settings)
        print(", ".join(f"{name} {value}" for name, value in settings.items()))
        print("images: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
        print("parameters: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))

    start = time.perf_counter()
    vae = trainer.fit(progress=not config.run.quiet)
    seconds = time.perf_counter() - start
    if not main_process:
        return
    lines = report(
        vae,
        data,
        trainer.history,
        out,
        extractor,
        elbo=value_elbo(config.report.test_k) if config.report.test_k else None,
        num_images=num_images,
        seed=config.train.seed,
        progress=not config.run.quiet,
        extra={"training_seconds": seconds, "parameters": counts},
        labels=labels,
        guidance=config.report.guidance,
        sampler=config.report.sampler,
        num_steps=config.report.sample_steps,
    )
    print("\n".join(lines))
