r"""``experiments/table.py``: presets, what a grid leaves behind, being killed, and errors.

Most tests run the grid with a script in place of ``run.py`` which does nothing and does it fast.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import importlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import EXPERIMENTS, call, script_errors

SCRIPT = EXPERIMENTS / "table.py"
PRESETS = EXPERIMENTS / "presets"

# Takes FAKE_SECONDS per epoch, fails if its folder is that of a row named "broken", and notes that
# it was started.
FAKE = """
import json, os, sys, time
from pathlib import Path
words = sys.argv[1:]
option = {name: words[words.index(f"--{name}") + 1] for name in ("out", "seed", "epochs")}
out = Path(option["out"])
with open(out / "starts", "a") as file:
    print("resumed" if "--resume" in words else "new", os.environ["OMP_NUM_THREADS"], file=file)
if "broken" in out.name:
    print("warming up")
    sys.exit("error: it is broken")
path = out / "metrics.csv"
done = path.read_text().count("\\n") - 1 if "--resume" in words else 0
for epoch in range(done + 1, int(option["epochs"]) + 1):
    time.sleep(float(os.environ.get("FAKE_SECONDS", 0)))
    path.write_text("epoch\\n" + "".join(f"{i}\\n" for i in range(1, epoch + 1)))
    (out / "checkpoint.pt").write_text("")
(out / "config.json").write_text(json.dumps({"torch": "9.9", "device": "cpu"}))
results = {"test_images": 7, "test_negative_elbo": 10.0 + int(option["seed"]) ** 2}
results |= {"test_bits_per_dim": 1.0, "training_seconds": 3600, "parameters": {"prior": 5}}
(out / "results.part").write_text(json.dumps(results))
(out / "results.part").replace(out / "results.json")
"""

GRID = """
latent-dims = [2, 3]
seeds = [0, 1]
[settings]
epochs = 2
limit = 40
lr = 1e-3
[datasets.digits]
lr = 2e-3
width = 4
[datasets.mine]
title = "My images"
dataset = "folder"
root = "somewhere"
latent-dims = [5]
[rows.gaussian]
title = "Gaussian"
[rows.ddpm]
prior = "diffusion"
width = 8
snapshots = [0, 1]
no-antithetic = true
validate = false
[[overrides]]
rows = ["ddpm"]
latent-dims = [3]
width = 16
"""

SMALL = """
title = "Small"
latent-dims = [2]
seeds = [0, 1]
[settings]
epochs = 3
[datasets.digits]
[rows.gaussian]
title = "Gaussian"
[rows.flow]
"""


def module(name):
    return importlib.import_module(name)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return module("table")


@pytest.fixture
def grid(script):
    return module("grid.cells")


@pytest.fixture
def fake(script, monkeypatch, tmp_path):
    r"""Puts a script in place of ``run.py``, and returns its path."""
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    monkeypatch.setattr(module("grid.runs"), "RUN", path)
    return path


@pytest.fixture
def small(tmp_path):
    return write(tmp_path, SMALL)


@pytest.fixture
def background(fake):
    r"""Starts the script with the one in place of ``run.py``, in a process of its own."""
    processes = []

    def start(*args, seconds=0.0):
        code = (
            f"import runpy, sys; sys.path.insert(0, {str(EXPERIMENTS)!r})\n"
            f"import grid.runs; grid.runs.RUN = {str(fake)!r}\n"
            f"sys.argv = {[str(SCRIPT), *map(str, args), '--quiet']!r}\n"
            f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
        )
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"FAKE_SECONDS": str(seconds)},
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def write(folder, text, name="my.toml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_free(lock):
    with open(lock) as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def starts(out):
    r"""What the script in place of ``run.py`` noted, by cell."""
    paths = sorted(out.glob("cells/*/*/starts"))
    return {path.parent.name: path.read_text().split()[::2] for path in paths}


def results_of(out):
    r"""The results of all runs, without times."""
    results = {}
    for path in out.glob("cells/*/*/results.json"):
        content = json.loads(path.read_text())
        results[path.parent.name] = {k: v for k, v in content.items() if "seconds" not in k}
    return results


# --- Presets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.toml")), ids=lambda path: path.stem)
def test_presets_are_valid_and_explained(grid, path):
    preset = grid.read_preset(path.stem)
    assert path.read_text().startswith("# ")
    assert f"experiments/table.py {path.stem}" in path.read_text()
    dims = sum(map(len, preset.latent_dims.values()))
    assert len(preset.cells) == len(preset.seeds) * dims * len(preset.rows)
    assert len({cell.name for cell in preset.cells}) == len(preset.cells)
    assert preset == grid.read_preset(str(path))


def test_the_preset_of_the_paper(grid):
    preset = grid.read_preset("paper")
    assert preset.latent_dims == {name: [40, 100, 200] for name in ("cifar10", "celeba")}
    assert [cell.options["prior"] for cell in preset.cells[:3]] == ["gaussian", "flow", "diffusion"]
    args = module("run").parse_args(preset.cells[-1].words)
    assert (args.dataset, args.image_size, args.latent_dim, args.seed) == ("celeba", 64, 200, 2)
    assert (args.epochs, args.lr, args.lr_schedule, args.batch_size) == (250, 5e-4, "constant", 100)
    assert (args.features, args.networks, args.num_timesteps) == ("inception", "default", 1000)
    code = module("run").parse_args(grid.read_preset("paper-code").cells[2].words)
    assert (code.networks, code.likelihood, code.clip_norm) == ("paper", "gaussian-fixed", 0.25)
    assert (code.weighting, code.reverse_variance, code.k) == ("paper", "beta_tilde", 1)
    assert code.no_antithetic and code.timesteps == "uniform"


def test_cells_and_their_options(grid, tmp_path):
    preset = grid.read_preset(str(write(tmp_path, GRID)), paths={"root": {"mine": "/here"}})
    assert preset.title == preset.name == "my"
    assert preset.datasets == {"digits": "digits", "mine": "My images"}
    assert preset.rows == {"gaussian": "Gaussian", "ddpm": "ddpm"}
    # Seed by seed, and in it data set by data set.
    assert [cell.name for cell in preset.cells] == [
        f"{dataset}-{row}-s{seed}"
        for seed in (0, 1)
        for dataset in ("digits/2", "digits/3", "mine/5")
        for row in ("gaussian", "ddpm")
    ]
    options = {cell.name: cell.options for cell in preset.cells}
    assert options["digits/2-gaussian-s0"] == {
        **{"dataset": "digits", "prior": "gaussian", "epochs": 2, "limit": 40, "lr": 2e-3},
        **{"width": 4, "latent-dim": 2, "seed": 0},
    }
    widths = [options[f"{name}-s1"]["width"] for name in ("digits/2-ddpm", "digits/3-ddpm")]
    assert widths == [8, 16]
    cell = preset.cells[-1]
    assert (cell.options["dataset"], cell.options["root"]) == ("folder", "/here")
    assert "root" not in cell.settings and cell.settings["lr"] == 1e-3
    assert " --snapshots 0 1 --no-antithetic --latent-dim 5 " in f" {' '.join(cell.words)} "
    assert "--validate" not in cell.words
    assert cell.epochs == 2
    # Seeds of the command line; a list of groups is known by its name.
    groups = {"groups": {"mine": "/here/identity.txt"}}
    cells = grid.read_preset(str(tmp_path / "my.toml"), [7], groups).cells
    assert {cell.seed for cell in cells} == {7}
    assert cells[-1].settings["groups"] == "identity.txt"
    assert "/here/identity.txt" in cells[-1].words


BAD_PRESETS = {
    "settings = 3\n": r"[settings] must be a table, got 3",
    "epochs = 3\n": "the preset has the unknown name 'epochs'",
    "[settings]\nepoch = 3\n": "[settings] has the unknown name 'epoch': did you mean 'epochs'?",
    "[rows.flow]\nwidht = 3\n": "[rows.flow] has the unknown name 'widht': did you mean 'width'?",
    "[settings]\nseed = 3\n": "[settings] has 'seed', which is an option or a list of the grid",
    "[settings]\nlr = 2024-01-01\n": "[settings]: lr must be a number, a text, true, false or a",
    "[settings]\nlr = {}\n": "[settings]: lr must be a number, a text, true, false or a list",
    "[settings]\nepochs = 'many'\n": "2-flow-s0: argument --epochs: invalid int value: 'many'",
    "[settings]\nepochs = true\n": "argument --epochs: expected one argument",
    "[settings]\nquiet = true\n": "[settings] has 'quiet'",
    "[settings]\nvalidate = 3\n": "unrecognized arguments: 3",
    "[rows.gaussian]\ninit-row = 'vamp'\n": "[rows.gaussian]: init-row has the unknown name 'vamp'",
    "[rows.gaussian]\ninit-row = 'gaussian'\n": "[rows.gaussian]: init-row has the unknown name",
    "[rows.b]\n": "[rows.b] has the unknown prior 'b': choose one of gaussian, ",
    "[rows.'a/b']\n": "[rows.a/b]: a name has letters, digits and . _ - only",
    "rows.b = 3\n": "rows.b must be a table, [rows.b], got 3",
    "[datasets.mine]\n": "[datasets.mine] needs dataset = one of digits, ",
    "[datasets.b]\ndataset = 'imagenet'\n": "unknown data set 'imagenet'",
    "[datasets.b]\nlatent-dims = 3\n": "latent-dims of b must be a list of different integers >= 1",
    "reference = 'vamp'\n": "reference has the unknown name 'vamp'",
    "overrides = 3\n": "overrides must be tables, [[overrides]], got 3",
    "[[overrides]]\nrows = ['nvp']\n": "[[overrides]] number 1: rows has the unknown name 'nvp'",
    "[[overrides]]\nrows = 'flow'\n": "[[overrides]] number 1: rows must be a list, got 'flow'",
    "[[overrides]]\nlrr = 3\n": "[[overrides]] number 1 has the unknown name 'lrr'",
    "[settings\n": "is not TOML: ",
}


@pytest.mark.parametrize("text", BAD_PRESETS, ids=repr)
def test_bad_presets(error_of, tmp_path, text):
    base = "[datasets.digits]\n[rows.flow]\n"
    if text.startswith("[rows.flow]"):
        base = "[datasets.digits]\n"
    # What is not in a table comes first.
    parts = (base, text) if text.startswith("[") else (text, base)
    path = write(tmp_path, "latent-dims = [2]\n" + "".join(parts))
    message = error_of(path, "--out", tmp_path / "out")
    assert BAD_PRESETS[text] in message and str(path) in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, match",
    [
        ("latent-dims = [2]\n[rows.flow]", "at least one table [datasets.NAME] is needed"),
        ("latent-dims = [2]\n[datasets.digits]", "at least one table [rows.NAME] is needed"),
        ("[datasets.digits]\n[rows.flow]", "latent-dims of digits must be a list of different"),
        *(
            (f"{key} = {value}\nlatent-dims = [2]\n[datasets.digits]\n[rows.flow]", f"{key} must")
            for key, value in (("seeds", 0), ("seeds", []), ("seeds", [0, 0]), ("seeds", [-1]))
        ),
        *(
            (f"latent-dims = [2]\n[datasets.digits]\npublished = {value}\n[rows.flow]", "published")
            for value in ('"85"', '{ a = "85" }', "{ a = true }")
        ),
    ],
)
def test_presets_that_lack_something(error_of, tmp_path, text, match):
    assert match in error_of(write(tmp_path, text), "--out", tmp_path / "out")


# --- Running --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, device_name):
    r"""The smoke preset, run from its start to its end."""
    out = tmp_path_factory.mktemp("smoke") / "new" / "folder"
    return out, call(SCRIPT.name, "smoke", "--out", out, "--device", device_name)


def test_the_files_are_those_of_the_docstring(smoke, script):
    out, printed = smoke
    block = script.__doc__.partition("then holds\n\n")[2].partition("\n\n")[0]
    promised = {re.split(r"\s{2,}", line.strip())[0] for line in block.splitlines()}
    assert {"table.md", "table.csv", "summary.csv", "cells/*/*", "samples-*.png"} <= promised
    assert {path.name for path in out.iterdir()} == {
        *("table.md", "table.csv", "summary.csv", "cells"),
        *("samples-digits.png", "reconstructions-digits.png", "cost-digits.png"),
    }
    cells = {f"2-{row}-s{seed}" for row in ("gaussian", "diffusion") for seed in (0, 1)}
    assert {path.name for path in (out / "cells/digits").iterdir()} == cells | {"statistics"}
    for cell in cells:
        assert {"cell.json", "log.txt", "lock", "results.json", "best.pt"} <= {
            path.name for path in (out / "cells/digits" / cell).iterdir()
        }
        log = (out / "cells/digits" / cell / "log.txt").read_text()
        assert log.startswith("$ ") and "nats per datum" in log
    assert (out / "table.md").read_text(encoding="utf-8") in printed
    assert printed.splitlines()[-1] == f"written to {out}"
    # A line for every run, in their order.
    lines = [line.split()[:2] for line in printed.splitlines()[:4]]
    names = [f"digits/2-{row}-s{seed}:" for seed in (0, 1) for row in ("gaussian", "diffusion")]
    assert lines == [[f"[{i}/4]", name] for i, name in enumerate(names, start=1)]


def test_the_tables_hold_the_results(smoke):
    out, _ = smoke
    results = results_of(out)
    records = read(out / "table.csv")
    assert [f"{r['latent_dim']}-{r['row']}-s{r['seed']}" for r in records] == [
        f"2-{row}-s{seed}" for seed in (0, 1) for row in ("gaussian", "diffusion")
    ]
    for record in records:
        found = results[f"2-{record['row']}-s{record['seed']}"]
        assert float(record["test_negative_elbo"]) == found["test_negative_elbo"]
        assert float(record["frechet.samples"]) == found["frechet"]["samples"]
        assert int(record["parameters.prior"]) == found["parameters"]["prior"]
    summary = {(r["row"], r["metric"]): r for r in read(out / "summary.csv")}
    page = (out / "table.md").read_text(encoding="utf-8")
    assert (
        f"torch {torch.__version__}" in page and "Preset `smoke`" in page and "seeds 0, 1" in page
    )
    assert "### Fréchet distance (features=pixels)" in page and "FID" not in page
    assert all((out / name).is_file() for name in re.findall(r"!\[.+?\]\((.+?)\)", page))
    for row in ("gaussian", "diffusion"):
        losses = [results[f"2-{row}-s{seed}"]["test_negative_elbo"] for seed in (0, 1)]
        mean, sd = statistics.fmean(losses), statistics.stdev(losses)
        found = summary[row, "test_negative_elbo"]
        assert float(found["mean"]) == pytest.approx(mean) and found["n"] == "2"
        assert float(found["sd"]) == pytest.approx(sd)
        assert f"{mean:.2f} ± {sd:.2f}" in page


def test_the_pictures(smoke):
    sizes = []
    for name in ("samples-digits.png", "reconstructions-digits.png"):
        with Image.open(smoke[0] / name) as image:
            low, high = image.convert("L").getextrema()
            sizes.append(image.size)
        assert low < high
    assert sizes[1][0] > sizes[0][0]  # the test images are one column more


def test_the_cost_of_nats(grid, tmp_path):
    cost = importlib.import_module("grid.cost")
    run = {"row": "flow", "latent_dim": 2, "test_negative_elbo": 9.0, "training_seconds": 7200}
    assert cost.nats(run) == (9.0, False)
    assert cost.nats(run | {"likelihood.gap": 0.0}) == (9.0, True)
    runs = [run | {"test_negative_elbo": x, "likelihood.gap": 1.5} for x in (9.0, 10.0)]
    assert cost.nats(runs[0]) == (7.5, True)
    seen = {}

    def keep(path, suffixes, save):
        seen["axes"] = save.__closure__[0].cell_contents.axes[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "write", keep)
        cost.plot_cost(runs, {"flow": "a flow"}, {"others": 7.0}, "title", tmp_path / "a.png")
    (bars,) = seen["axes"].containers
    (hours,), (mean,) = bars.lines[0].get_data()
    assert (hours, mean) == (2.0, 8.0)
    assert [text.get_text() for text in seen["axes"].texts] == ["others, published"]


def test_a_second_call_repeats_no_run(smoke, script, device_name, capsys):
    out, printed = smoke
    files = list(out.glob("cells/*/*/*"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    for flag in ((), ("--summary-only",)):
        script.main(["smoke", "--out", str(out), "--device", device_name, "--quiet", *flag])
        assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files} == before
        assert capsys.readouterr().out == printed[printed.index("\n# Smoke") :]


def test_a_grid_that_was_killed_continues(smoke, script, device_name, tmp_path, capsys):
    r"""To the same results: both the script and its run are killed, after a checkpoint."""
    args = ["smoke", "--out", str(tmp_path), "--device", device_name, "--quiet"]
    args += ["--only", "*/2-diffusion-s0"]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *args], stdout=subprocess.DEVNULL)
    run = tmp_path / "cells/digits/2-diffusion-s0"
    try:
        wait_for(lambda: (run / "checkpoint.pt").exists() or process.poll() is not None)
    finally:
        process.kill()
        process.wait()
    with contextlib.suppress(ProcessLookupError):  # it may have ended
        os.kill(int((run / "lock").read_text()), signal.SIGKILL)
    wait_for(lambda: is_free(run / "lock"))
    script.main(args)
    capsys.readouterr()
    if device_name == "cpu":
        assert results_of(tmp_path) == {run.name: results_of(smoke[0])[run.name]}


def test_a_grid_in_its_order(fake, script, small, tmp_path, capsys):
    out = tmp_path / "out"
    script.main([str(small), "--out", str(out), "--quiet"])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[1] for line in lines[:4]]
    assert names == [f"digits/2-{row}-s{seed}:" for seed in (0, 1) for row in ("gaussian", "flow")]
    assert lines[0].endswith(" s, test -ELBO 10.00 nats")
    assert starts(out) == {name[7:-1]: ["new"] for name in names}
    page = (out / "table.md").read_text()
    # The mean of 10 and 11, and their distance over sqrt(2).
    assert "| Gaussian | **10.50 ± 0.71** |" in page and "| flow | **10.50 ± 0.71** |" in page
    assert "4 of 4 runs are finished, 4.0 hours of training" in page
    assert "torch 9.9 on cpu" in page
    assert [path.name for path in out.glob("*.png")] == ["cost-digits.png"]  # no models


@pytest.mark.parametrize("jobs", [1, 2])
def test_threads_are_shared(fake, script, small, tmp_path, monkeypatch, capsys, jobs):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(module("grid.runs"), "num_cores", lambda: 6)
    script.main([str(small), "--out", str(tmp_path / "out"), "--quiet", "--jobs", str(jobs)])
    for path in tmp_path.glob("out/cells/*/*/starts"):
        assert path.read_text().split() == ["new", str(6 // jobs)]
    assert len(results_of(tmp_path / "out")) == 4
    capsys.readouterr()


def test_a_run_that_fails_does_not_stop_the_others(fake, script, tmp_path, capsys):
    rows = SMALL.replace("[rows.flow]", "[rows.broken]\nprior = 'flow'\n[rows.flow]")
    out = tmp_path / "out"
    args = [str(write(tmp_path, rows)), "--out", str(out), "--quiet"]
    with pytest.raises(ValueError, match=r"2 of 6 runs failed: digits/2-broken-s0: error: it is "):
        script.main(args)
    printed = capsys.readouterr().out
    assert "[1/6] digits/2-broken-s0: failed, error: it is broken (status 1, see " in printed
    assert len(results_of(out)) == 4 and "| broken | - |" in printed
    # Those are tried again, and only those.
    with pytest.raises(ValueError, match="2 of 6 runs failed"):
        script.main(args)
    assert {name: len(found) for name, found in starts(out).items()} == {
        f"2-{row}-s{seed}": 2 if row == "broken" else 1
        for row in ("gaussian", "broken", "flow")
        for seed in (0, 1)
    }
    capsys.readouterr()


def test_some_runs_only(fake, script, small, tmp_path, capsys):
    out = tmp_path / "out"
    args = [str(small), "--out", str(out), "--quiet"]
    script.main([*args, "--only", "*-flow-*"])
    assert set(results_of(out)) == {"2-flow-s0", "2-flow-s1"}
    page = (out / "table.md").read_text()
    assert "| Gaussian | - |" in page and "2 of 4 runs" in page
    script.main([*args, "--only", "*/2-gaussian-*", "nothing", "--seeds", "1"])
    assert set(results_of(out)) == {"2-flow-s0", "2-flow-s1", "2-gaussian-s1"}
    assert ", seed 1. Less is better" in (out / "table.md").read_text()
    capsys.readouterr()


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_row_starts_from_another_one(fake, script, tmp_path, monkeypatch, capsys, jobs):
    monkeypatch.setenv("FAKE_SECONDS", "0.2")
    path = write(tmp_path, SMALL + "init-row = 'gaussian'\n[rows.mixture]\ninit-row = 'flow'\n")
    out = tmp_path / "out"
    args = [str(path), "--out", str(out), "--quiet", "--jobs", str(jobs)]
    script.main(args)
    for seed in (0, 1):
        chain = [out / f"cells/digits/2-{row}-s{seed}" for row in ("gaussian", "flow", "mixture")]
        for before, after in itertools.pairwise(chain):
            first = (before / "results.json").stat().st_mtime_ns
            assert first <= (after / "starts").stat().st_mtime_ns
            assert f" --init {before}\n" in (after / "log.txt").read_text()
            assert json.loads((after / "cell.json").read_text())["init-row"] in before.name
    capsys.readouterr()


def test_a_row_needs_the_one_that_it_starts_from(fake, script, tmp_path, capsys):
    path = write(tmp_path, SMALL + "init-row = 'gaussian'\n")
    out = tmp_path / "out"
    args = [str(path), "--out", str(out), "--quiet", "--seeds", "0"]
    with pytest.raises(ValueError, match=r"2-flow-s0: it starts from digits/2-gaussian-s0, which"):
        script.main([*args, "--only", "*flow*"])
    assert starts(out) == {}
    script.main(args)
    assert starts(out) == {"2-gaussian-s0": ["new"], "2-flow-s0": ["new"]}
    capsys.readouterr()


def test_a_dry_run_prints_the_commands(fake, script, small, tmp_path, capsys):
    out = tmp_path / "out"
    args = [str(small), "--out", str(out), "--root", "digits=/data", "--dry-run"]
    script.main([*args, "--fid-weights", "/w.pth", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [
        f"digits/2-{r}-s{s} (to run)" for s in (0, 1) for r in ("gaussian", "flow")
    ]
    assert lines[1].split()[1:] == [
        *(str(fake), "--dataset", "digits", "--prior", "gaussian", "--epochs", "3"),
        *("--root", "/data", "--fid-weights", "/w.pth", "--latent-dim", "2", "--seed", "0"),
        *("--device", "cpu", "--out", str(out / "cells/digits/2-gaussian-s0"), "--quiet"),
    ]
    assert not out.exists()


def test_the_progress_bar(fake, script, small, tmp_path, capsys):
    script.main([str(small), "--out", str(tmp_path / "out")])
    bar = capsys.readouterr().err
    assert "runs 0/4" in bar and "runs 4/4" in bar and "12/12" in bar
    assert re.search(r"digits/2-gaussian-s0 \d/3", bar)


# --- Being killed ---------------------------------------------------------------------------------


def test_a_run_that_is_left_behind_is_waited_for(background, script, small, tmp_path, capsys):
    out = tmp_path / "out"
    args = [small, "--out", out]
    process = background(*args, seconds=1.5)
    first = out / "cells/digits/2-gaussian-s0"
    wait_for((first / "checkpoint.pt").exists)
    process.kill()
    process.wait()
    assert not (first / "results.json").exists()
    script.main([*map(str, args), "--quiet"])
    lines = capsys.readouterr().out.splitlines()
    owner = (first / "lock").read_text().strip()
    assert f"[0/4] digits/2-gaussian-s0: process {owner} runs it, which is waited for" in lines
    assert any("gaussian-s0: finished elsewhere, test -ELBO 10.00 nats" in line for line in lines)
    assert starts(out) == {f"2-{row}-s{s}": ["new"] for row in ("gaussian", "flow") for s in (0, 1)}
    assert len(results_of(out)) == 4


def test_two_grids_share_their_runs(background, script, small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    process = background(small, "--out", out, seconds=0.2)
    wait_for(lambda: starts(out))
    monkeypatch.setenv("FAKE_SECONDS", "0.2")
    script.main([str(small), "--out", str(out), "--quiet"])
    printed, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    for page in (printed, capsys.readouterr().out):
        assert "4 of 4 runs" in page
    assert all(found == ["new"] for found in starts(out).values()) and len(starts(out)) == 4


def test_an_interrupted_grid_ends_its_runs(background, script, small, tmp_path, capsys):
    out = tmp_path / "out"
    process = background(small, "--out", out, "--jobs", 2, seconds=0.5)
    wait_for(lambda: len(list(out.glob("cells/*/*/checkpoint.pt"))) == 2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, "interrupted: the same command continues\n")
    leftover = out / "cells/digits/2-flow-s0/.checkpoint.pt.half"
    leftover.write_text("")
    script.main([str(small), "--out", str(out), "--quiet"])
    # Nobody holds a lock, and what was trained is not trained again.
    assert not leftover.exists()
    assert "waited for" not in capsys.readouterr().out
    assert starts(out) == {
        f"2-{row}-s{seed}": ["new"] if seed else ["new", "resumed"]
        for row in ("gaussian", "flow")
        for seed in (0, 1)
    }


# --- Errors ---------------------------------------------------------------------------------------


@pytest.fixture
def error_of(monkeypatch, capsys):
    r"""Returns the error message of a call that ends in one."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield script_errors(SCRIPT, monkeypatch, capsys)
    for number, handler in before.items():
        signal.signal(number, handler)


BAD_OPTIONS = {
    "nonsense": "no preset at ",
    "no/such.toml": "no preset at no/such.toml: give the path of a .toml file, or ablation, ",
    "smoke --jobs 0": "--jobs must be at least 1, got 0",
    "smoke --seeds 0 0": "seeds must be a list of different integers >= 0, got [0, 0]",
    "smoke --root here": "--root must be NAME=PATH, got 'here'",
    "smoke --groups digits=": "--groups must be NAME=PATH, got 'digits='",
    "smoke --root mnist=/data": "--root has the unknown name 'mnist': there are digits",
    "smoke --only nothing": "--only nothing matches no run, such as digits/2-gaussian-s0",
    "smoke --device tpu": "argument --device: invalid choice: 'tpu'",
    f"smoke --out {__file__}": "is a file: choose a folder",
    "smoke --out no/such/folder --summary-only": "no run in no/such/folder is finished yet",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options(error_of, options):
    assert BAD_OPTIONS[options] in error_of(*options.split())
    assert not Path("runs/table-smoke").exists()


def test_other_settings_need_another_folder(fake, script, error_of, small, tmp_path, capsys):
    out = tmp_path / "out"
    args = [str(small), "--out", str(out), "--quiet"]
    script.main([*args, "--seeds", "0", "--root", "digits=here"])
    write(tmp_path, SMALL.replace("epochs = 3", "epochs = 4\nlr = 0.1"))
    message = error_of(*args)
    assert (
        "2-gaussian-s0 was run with other settings, the preset has epochs=4 in place of 3, lr=0.1 "
    )
    assert "choose another --out" in message and "lr=0.1 in place of None" in message
    # The title is no setting, and neither is where the data are.
    write(tmp_path, SMALL.replace("Gaussian", "N(0, I)"))
    script.main([*args, "--seeds", "0", "--root", "digits=there"])
    assert "| N(0, I) |" in (out / "table.md").read_text()
    # A run of run.py is none of a table.
    (out / "cells/digits/2-flow-s0/cell.json").unlink()
    assert "holds a run that is not of a table: choose another --out" in error_of(*args)
    capsys.readouterr()


def test_help_is_the_manual(script, capsys):
    with pytest.raises(SystemExit) as info:
        script.main(["--help"])
    assert info.value.code == 0
    text = capsys.readouterr().out
    for word in ("table.md", "cells/*/*", "[[overrides]]", "--summary-only", "--fid-weights"):
        assert word in text


def test_the_default_folder_names_the_preset(script):
    assert script.parse_args(["cpu"]).out == Path("runs/table-cpu")
    assert script.parse_args(["a/b/mine.toml"]).out == Path("runs/table-mine")
