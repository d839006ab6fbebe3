r"""Shows what fewer steps of trained diffusion priors cost: in nats, and in how samples look.

    python experiments/steps.py runs/digits-diffusion-s0 runs/cifar10-diffusion-s0

computes for each run directory, and trains nothing unless told to:

- the bound of test images for chains of fewer steps, by reverse variance and by grid;
- the Fréchet distance of samples to test images against the evaluations of the network, by sampler
  and by grid. The features are those that ``--features`` names, or ``pixels`` for the digits and
  ``efficientnet-lite0`` for others.

The folder ``--out`` then holds

    NAME.csv   a row per number: what it is, the reverse variance or the sampler, the grid, the
               largest number of evaluations, the steps and the evaluations that were made of it,
               the value, and the seconds that it took
    NAME.png   both against their evaluations
    steps.md   the page to read, with all runs

where NAME is that of the run directory. A number that is in a table is not computed again: a study
goes on where it was stopped, and may be given more runs, samplers or numbers of steps.

The reverse variances are that of the run and the best ones for its mean, fitted to latents of
training images, for which there is also the best grid. ``--fine-tune N`` trains the prior with each
number of steps on it for N more epochs, with encoder and decoder as they are. Other grids are
entries of ``pyro_vaediff.sampling.GRIDS``, samplers those of ``pyro_vaediff.sampling.SAMPLERS``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import exit_on_error, parse_device
from few_steps.numbers import Study
from few_steps.page import page, plot
from study import check_settings

from pyro_vaediff.arguments import check_choice, check_seed, check_whole, folder
from pyro_vaediff.evaluate import EXTRACTORS
from pyro_vaediff.files import check_folder, write_atomically
from pyro_vaediff.sampling import GRIDS, SAMPLERS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    steps = [1000, 100, 50, 25, 10, 5]
    add("--steps", type=int, nargs="+", default=steps, help=f"of bounds ({steps})")
    evaluations = [100, 50, 25, 10, 5]
    add("--evaluations", type=int, nargs="+", default=evaluations, help=f"({evaluations})")
    add("--samplers", nargs="+", default=list(SAMPLERS), help=f"({' '.join(SAMPLERS)})")
    grids = ["time", "log-snr"]
    add("--grids", nargs="+", default=grids, help=f"of {', '.join(GRIDS)} ({' '.join(grids)})")
    add("--fine-tune", type=int, default=0, metavar="N", help="epochs with few steps (0)")
    add("--num-fit", type=int, default=1000, help="training images of variances (%(default)s)")
    add("--num-images", type=int, default=1000, help="test images of bounds (%(default)s)")
    add("--num-samples", type=int, default=10_000, help="images of distances (%(default)s)")
    add("--features", default="auto", help=f"of distances: {', '.join(EXTRACTORS)} (%(default)s)")
    add("--root", default="data", help="where the data are (%(default)s)")
    add("--no-download", action="store_true", help="never download data")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--device", type=parse_device, default="cpu", help="where to compute (%(default)s)")
    add("--out", type=folder, default=Path("runs/steps"), help="folder (%(default)s)")
    args = parser.parse_args(argv)
    check_seed(args.seed, "--seed")
    for name in ("num_fit", "num_images", "num_samples", "steps", "evaluations"):
        values, least = getattr(args, name), 2 if name == "num_samples" else 1
        for value in values if isinstance(values, list) else [values]:
            check_whole(f"--{name.replace('_', '-')}", value, least=least)
    check_whole("--fine-tune", args.fine_tune, least=0)
    for name, choices in (("samplers", SAMPLERS), ("grids", GRIDS)):
        for value in getattr(args, name):
            check_choice(name.rstrip("s"), value, choices)
    check_choice("features", args.features, ("auto", *EXTRACTORS))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_folder("--out", args.out)
    for path in args.runs:
        if not path.is_dir():
            raise FileNotFoundError(f"no run directory at {path}")
    studies = [Study(path, args) for path in args.runs]
    if len({study.name for study in studies}) < len(studies):
        raise ValueError("runs must have different names, as their tables do: use several --out")
    names = ("num_fit", "num_images", "num_samples", "features", "fine_tune", "seed")
    check_settings(args.out / "settings.json", {name: getattr(args, name) for name in names})
    for study in studies:
        study.run()
        plot(study, args.out / f"{study.name}.png")
    text = page(studies, args)
    write_atomically(args.out / "steps.md", lambda file: file.write(text.encode()))
    print(text)


if __name__ == "__main__":
    with exit_on_error("what is in the tables is kept"):
        main()
