r"""Trains, evaluates and shows a variational autoencoder.

    python experiments/run.py --prior diffusion

trains on the 8x8 digits that come with scikit-learn, in a few minutes on two CPU cores. Other data
are downloaded (``--dataset cifar10``), or a folder of images of your own (``--dataset folder --root
PATH``). Settings that are not given depend on the data set, and are printed.

The run directory (``--out``) then holds

    config.json             the settings
    metrics.csv             the terms of the training loss and the validation loss, by epoch
    checkpoint.pt, best.pt  the state of the run, and the best model by validation
    epoch-N.pt              the model after N epochs, for each N in --snapshots
    results.json            the test results: everything that was printed at the end
    terms.csv               the negative ELBO of the test images, term by term
    samples.png             samples of the prior, decoded
    reconstructions.png     test images and their reconstructions
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
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pyro
import torch

from pyro_vaediff.arguments import check_whole, folder
from pyro_vaediff.data import DATASETS, load
from pyro_vaediff.evaluate import EXTRACTORS, load_extractor
from pyro_vaediff.evaluate.elbo import value_elbo
from pyro_vaediff.files import check_folder, write_json
from pyro_vaediff.infer import PROPOSALS, REWEIGHTINGS, make_elbo, particle_options
from pyro_vaediff.priors import PRIORS
from pyro_vaediff.train import distributed
from pyro_vaediff.train.build import DENOISERS
from pyro_vaediff.train.config import ModelConfig, TrainConfig
from pyro_vaediff.train.loop import NonFiniteError, Trainer
from pyro_vaediff.train.report import report
from pyro_vaediff.train.runs import CHECKPOINT

# What a setting is if it is not given. The paper's, where it has a say.
DEFAULTS: dict[str, dict[str, object]] = {
    "digits": {
        "latent_dim": 16, "width": 32, "epochs": 60, "lr": 2e-3, "lr_schedule": "cosine",
        "clip_norm": 100.0,
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=DATASETS, default="digits")
    data.add_argument("--root", default="data", help="where the data are, or go (%(default)s)")
    data.add_argument("--image-size", type=int, help="resize and crop images to this many pixels")
    data.add_argument("--limit", type=int, help="use at most this many images per split")
    data.add_argument(
        "--groups",
        type=Path,
        metavar="FILE",
        help="folder: a list 'FILE GROUP' whose groups, such as persons, are kept in one split "
        "each",
    )
    data.add_argument("--no-download", action="store_true", help="never download data")

    model = parser.add_argument_group("model")
    model.add_argument("--prior", default="diffusion", help=", ".join(PRIORS) + " (%(default)s)")
    model.add_argument("--latent-dim", type=int, help="latent dimensions D")
    model.add_argument("--width", type=int, help="channels of the first convolution")
    model.add_argument("--networks", choices=("default", "paper"), default="default")
    model.add_argument(
        "--likelihood",
        default="gaussian",
        help="gaussian, gaussian-pixel, gaussian-fixed, bernoulli, discretized-logistic, "
        "categorical (%(default)s)",
    )
    model.add_argument(
        "--num-components",
        type=int,
        default=500,
        help="components of a mixture, pseudo-inputs of a VampPrior (%(default)s)",
    )
    model.add_argument(
        "--prior-width", type=int, help="hidden width of a flow or a denoiser (its own default)"
    )
    model.add_argument(
        "--denoiser", default="residual", help=", ".join(DENOISERS) + " (%(default)s)"
    )
    model.add_argument("--num-timesteps", type=int, default=1000, help="T (%(default)s)")
    model.add_argument("--schedule", default="linear", help="linear, cosine (%(default)s)")
    model.add_argument(
        "--beta-min", type=float, default=1e-4, help="first of the linear schedule (%(default)s)"
    )
    model.add_argument(
        "--beta-max", type=float, default=0.02, help="last of the linear schedule (%(default)s)"
    )
    model.add_argument("--parameterization", default="eps", help="eps, z0, mu, v (%(default)s)")
    model.add_argument(
        "--reverse-variance", default="beta", help="beta, beta_tilde, learned (%(default)s)"
    )

    elbo = parser.add_argument_group("estimator")
    elbo.add_argument(
        "--estimator",
        default="timestep",
        help="timestep (from k timesteps per datum), trace (Pyro's Trace_ELBO, all T sites), "
        "trace-kl (all T sites, closed-form KLs) (%(default)s)",
    )
    elbo.add_argument(
        "--timesteps", default="importance", help=f"all, {', '.join(PROPOSALS)} (%(default)s)"
    )
    elbo.add_argument("--k", type=int, default=8, help="timesteps per datum (%(default)s)")
    elbo.add_argument(
        "--conditioning", default="z_0", help="what the KLs are given: z_0, x (%(default)s)"
    )
    elbo.add_argument(
        "--no-antithetic", action="store_true", help="independent noise in place of mirrored pairs"
    )
    elbo.add_argument(
        "--entropy",
        default="path",
        help="of q(z_0 | x): path for its path derivative, or exact (%(default)s)",
    )
    elbo.add_argument(
        "--num-particles", type=int, default=1, help="draws of z_0 per datum (%(default)s)"
    )
    elbo.add_argument(
        "--weighting", default="elbo", help=", ".join(("elbo", *REWEIGHTINGS)) + " (%(default)s)"
    )

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, help="passes that train everything")
    training.add_argument(
        "--gaussian-epochs",
        type=int,
        default=0,
        help="the first of these, in which N(0, I) stands in for the prior (%(default)s)",
    )
    training.add_argument(
        "--prior-epochs",
        type=int,
        default=0,
        help="passes after --epochs that train only the prior (%(default)s)",
    )
    training.add_argument(
        "--init",
        type=Path,
        metavar="RUN",
        help="start from the encoder and decoder of this run, and from its prior if of one kind",
    )
    training.add_argument(
        "--batch-size", type=int, default=100, help="of all processes together (%(default)s)"
    )
    training.add_argument("--lr", type=float, help="learning rate of Adam")
    training.add_argument("--prior-lr", type=float, help="that of the prior, if another one")
    training.add_argument(
        "--prior-weight-decay",
        type=float,
        default=0.0,
        help="decoupled weight decay of the prior's matrices (%(default)s)",
    )
    training.add_argument(
        "--warmup", type=int, default=0, help="steps in which the rates rise (%(default)s)"
    )
    training.add_argument("--lr-schedule", choices=("constant", "cosine"))
    training.add_argument(
        "--clip-norm",
        type=float,
        help="global gradient norm, per datum (100; 1000 for images of 28 pixels or more)",
    )
    training.add_argument(
        "--ema", type=float, default=0.0, help="decay of a weight average, 0: none"
    )
    training.add_argument("--max-steps", type=int, help="steps after which training ends")
    training.add_argument("--max-seconds", type=float, help="seconds after which training ends")
    training.add_argument(
        "--patience", type=int, help="epochs without a better validation loss before training ends"
    )
    training.add_argument(
        "--validate-every", type=int, default=1, help="epochs between validations (%(default)s)"
    )
    training.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    training.add_argument(
        "--precision",
        choices=("float32", "float64", "bf16"),
        default="float32",
        help="bf16: autocast of the convolutions (%(default)s)",
    )
    training.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    training.add_argument(
        "--deterministic",
        action="store_true",
        help="the same numbers whenever the run is repeated, also on a GPU (slower)",
    )
    training.add_argument("--out", type=folder, help="run directory (runs/DATASET-PRIOR-sSEED)")
    training.add_argument(
        "--snapshots",
        type=int,
        nargs="*",
        default=(),
        metavar="EPOCH",
        help="epochs whose model is kept as epoch-N.pt, 0: its initialization",
    )
    training.add_argument("--resume", action="store_true", help="continue the run in --out")
    training.add_argument("--validate", action="store_true", help="check every distribution (slow)")
    training.add_argument("--quiet", action="store_true", help="no progress bars")

    metrics = parser.add_argument_group("metrics")
    metrics.add_argument(
        "--features",
        choices=("auto", "none", *EXTRACTORS),
        default="auto",
        help="features of the Fréchet distance. inception is FID; auto is pixels for digits and "
        "inception otherwise, if its weights can be had",
    )
    metrics.add_argument("--fid-weights", type=Path, help="a local file of the Inception weights")
    metrics.add_argument(
        "--test-k",
        type=int,
        default=0,
        help="timesteps per test image of a diffusion prior; 0: all T of them (%(default)s)",
    )
    metrics.add_argument(
        "--num-images", type=int, default=10_000, help="images per side, at most (%(default)s)"
    )

    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.out is None:
        args.out = Path("runs") / f"{args.dataset}-{args.prior}-s{args.seed}"
    return args


def without_tf32() -> None:
    r"""Has GPUs compute in full float32."""
    # Densities are sums over thousands of pixels: 10 bits of a convolution's inputs are too few.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available, use --device cpu or auto")
    without_tf32()
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def make_deterministic() -> None:
    r"""Lets torch choose algorithms that always return the same numbers, on a GPU as well."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it as it starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def choose_extractor(args: argparse.Namespace, device: torch.device):
    if args.features == "none":
        return None
    name = args.features
    if name == "auto":
        name = "pixels" if args.dataset == "digits" else "inception"
    try:
        return load_extractor(name, weights=args.fid_weights, device=device)
    except RuntimeError as error:  # the weights cannot be downloaded
        if args.features != "auto":
            raise ValueError(f"--features {name}: {error}") from error
        print(f"no FID will be computed: {error}")
        return None


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.deterministic:
        make_deterministic()
    with distributed.process_group(choose_device(args.device)) as device:
        run(args, device)


def run(args: argparse.Namespace, device: torch.device) -> None:
    r"""Trains, and evaluates and shows in the main process, which alone prints and writes."""
    main_process = distributed.is_main()
    pyro.enable_validation(args.validate)  # a fifth of the time or more
    torch.distributions.Distribution.set_default_validate_args(args.validate)

    check_folder("--out", args.out)
    check_whole("--test-k", args.test_k, least=0)
    if main_process and not args.resume and (args.out / CHECKPOINT).exists():
        raise ValueError(
            f"--out {args.out} holds a run already: continue it with --resume, or choose another"
        )
    with distributed.in_turns():
        data = load(
            args.dataset,
            args.root,
            image_size=args.image_size,
            download=not args.no_download,
            limit=args.limit,
            groups=args.groups,
        )
    extractor = choose_extractor(args, device) if main_process else None
    if extractor is not None and min(args.num_images, len(data.test)) < 2:
        raise ValueError(
            f"a Fréchet distance needs at least 2 images, got --num-images {args.num_images} and "
            f"{len(data.test)} test images: use --features none"
        )
    names = ModelConfig.__dataclass_fields__.keys() & vars(args).keys()
    model_config = ModelConfig(
        **{name: getattr(args, name) for name in names},
        image_shape=data.image_shape,
        levels=data.levels,
    )
    train_config = TrainConfig(
        **{name: getattr(args, name) for name in TrainConfig.__dataclass_fields__}
    )
    options = {
        name: getattr(args, name)
        for name in ("timesteps", "k", "conditioning", "weighting", "entropy", "num_particles")
    } | {"antithetic": not args.no_antithetic}
    elbo = make_elbo(args.estimator, **options | particle_options(args.num_particles))
    trainer = Trainer.from_config(
        model_config, train_config, elbo, data, device, args.out, args.snapshots, args.init
    )
    if args.resume:
        trainer.resume()

    config = asdict(model_config) | asdict(train_config) | {"estimator": args.estimator} | options
    config |= {"dataset": args.dataset, "groups": data.groups}
    config |= {"device": str(device), "processes": distributed.size()}
    config |= {"deterministic": args.deterministic, "torch": torch.__version__}
    counts = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in trainer.vae.named_children()
    }
    if main_process:
        write_json(args.out / "config.json", config)
        print(", ".join(f"{name} {value}" for name, value in config.items()))
        sizes = (f"{name} {len(getattr(data, name))}" for name in ("train", "validation", "test"))
        print("images: " + ", ".join(sizes))
        print("parameters: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))

    test_elbo = value_elbo(args.test_k) if args.test_k else None
    start = time.perf_counter()
    vae = trainer.fit(progress=not args.quiet)
    seconds = time.perf_counter() - start
    if not main_process:
        return
    lines = report(
        vae,
        data,
        trainer.history,
        args.out,
        extractor,
        elbo=test_elbo,
        num_images=args.num_images,
        seed=args.seed,
        progress=not args.quiet,
        extra={"training_seconds": seconds, "parameters": counts},
    )
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, NonFiniteError) as error:
        process = f"process {os.environ['RANK']}: " if "RANK" in os.environ else ""
        # Pyro appends the shapes of the trace to an error that is raised inside a program.
        sys.exit(f"error: {process}{str(error).partition(chr(10))[0]}")
    except KeyboardInterrupt:
        sys.exit("interrupted: continue with --resume")
