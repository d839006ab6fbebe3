r"""Bad input, to the library and to each script: the error is one line that says what is wrong.

It names the argument, its value and what it should be. The library raises a ``ValueError`` or a
``FileNotFoundError``; a script ends with that line and writes nothing. The table is ``bad_inputs``.
"""

from __future__ import annotations

import importlib.util
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pyro
import pytest
from bad_inputs import LIBRARY, SCRIPTS
from image_files import write_folder
from scripts import EXPERIMENTS, script_errors

from pyro_vaediff.arguments import exit_on_error
from pyro_vaediff.data import load
from pyro_vaediff.evaluate import preprocess
from pyro_vaediff.infer import Timestep_ELBO
from pyro_vaediff.train import load_checkpoint, save_checkpoint
from pyro_vaediff.train.config import ModelConfig, TrainConfig
from pyro_vaediff.train.loop import Trainer

TINY = (
    "--epochs 1 --limit 20 --width 2 --latent-dim 2 --num-timesteps 4 --k 2 --batch-size 10 "
    "--features none --device cpu --quiet"
)
TRAIN = "--width 2 --latent-dim 1 --num-timesteps 4 --batch-size 2 --num-test 2 --quiet"
COMMON = {"run.py": TINY, "train_estimators.py": TRAIN}


# --- What the tables refer to ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def it(tmp_path_factory):
    r"""Models, images, and files with the names in the tables."""
    root = tmp_path_factory.mktemp("bad-input")
    names = ("missing", "out", "file", "empty", "images", "run", "gaussian", "damaged", "only_best")
    it = SimpleNamespace(**{name: root / name for name in names})
    it.file.write_text("no such thing\n")
    it.empty.mkdir()
    write_folder(it.images, 20)

    data = load("digits", limit=20)
    it.data, it.images_ = data, data.test[:4]
    assert it.images_.max() == 16
    it.elbo = Timestep_ELBO(k=2)

    def trainer(model=(), train=(), elbo=it.elbo, **options):
        config = {"latent_dim": 2, "width": 2, "levels": 17, "num_timesteps": 4} | dict(model)
        train_config = TrainConfig(**{"epochs": 1, "batch_size": 10} | dict(train))
        return Trainer.from_config(ModelConfig(**config), train_config, elbo, data, **options)

    it.trainer = trainer
    trainer({"prior": "gaussian"}, out=it.gaussian).fit(progress=False)
    it.run_of_gaussian = it.gaussian
    with pytest.MonkeyPatch.context() as patch:
        words = [str(EXPERIMENTS / "run.py"), *TINY.split(), "--out", str(it.run)]
        patch.setattr(sys, "argv", words)
        runpy.run_path(words[0], run_name="__main__")
    pyro.enable_validation(True)

    models = {"prior": "diffusion"}, {"prior": "gaussian"}, {"likelihood": "bernoulli"}
    it.vae, it.gaussian, it.bernoulli = (trainer(model).vae for model in models)
    it.x = preprocess(it.vae, it.images_)

    # Damaged and foreign files
    shutil.copytree(it.run, it.damaged)
    (it.damaged / "evaluation.json").write_text('{"likelihood": ')
    it.only_best.mkdir()
    shutil.copy(it.run / "best.pt", it.only_best / "checkpoint.pt")
    state = load_checkpoint(it.run / "best.pt")
    it.settings = state["train_config"]
    it.no_run, it.other_version, it.other_weights = (
        root / name for name in ("no_run.pt", "other.pt", "weights.pt")
    )
    save_checkpoint(it.no_run, {"vae": {}})
    settings = state["model_config"]
    save_checkpoint(it.other_version, state | {"model_config": settings | {"colour": 1}})
    save_checkpoint(it.other_weights, state | {"model_config": settings | {"latent_dim": 3}})
    it.bad_times, it.bad_settings, it.bad_cell = (
        root / name for name in ("times", "settings", "grid")
    )
    for folder, ms in ((it.bad_times, "fast"), (it.bad_settings, "1.0")):
        folder.mkdir()
        (folder / "times.csv").write_text(f"estimator,ms\nTrace_ELBO,{ms}\n")
    (it.bad_settings / "settings.json").write_text("[1, 2]")
    cell = it.bad_cell / "cells" / "digits" / "2-gaussian-s0"
    cell.mkdir(parents=True)
    (cell / "results.json").write_text("{}")
    (cell / "cell.json").write_text("not json")

    presets = {
        "empty": "",
        "typo": "[datasets.digits]\n[rows.flow]\n[settings]\nepoch = 3",
        "prior": "[datasets.digits]\n[rows.b]",
        "value": "[datasets.digits]\n[rows.flow]\nepochs = 'many'",
        "path": "[datasets.digits]\n[rows.'../b']\nprior = 'flow'",
        "syntax": "[datasets",
    }
    it.toml = {name: root / f"{name}.toml" for name in presets}
    for name, text in presets.items():
        it.toml[name].write_text(f"latent-dims = [2]\n{text}\n")
    return it


def check(message, match):
    assert "\n" not in message, message
    assert re.fullmatch(match, message), message


def test_there_are_enough():
    names = {p.name for p in EXPERIMENTS.glob("*.py") if "__main__" in p.read_text("utf-8")}
    assert names | {"by_hand.py"} == set(SCRIPTS)
    assert len(LIBRARY) > 100 and sum(map(len, SCRIPTS.values())) > 100


@pytest.mark.parametrize("call, match", LIBRARY, ids=[match[:60] for _, match in LIBRARY])
def test_the_library_says_in_one_line_what_is_wrong(it, call, match):
    with pytest.raises((ValueError, FileNotFoundError)) as info:
        call(it)
    # Pyro appends a table of the shapes of the trace to an error that is raised inside a program.
    check(re.split(r"\n *Trace Shapes:", str(info.value))[0], match)
    assert not it.out.exists()


ROWS = [(script, *row) for script, rows in SCRIPTS.items() for row in rows]


@pytest.mark.parametrize(
    "script, args, match", ROWS, ids=[f"{script}-{match[:60]}" for script, _, match in ROWS]
)
def test_scripts_say_in_one_line_what_is_wrong(it, script, args, match, monkeypatch, capsys):
    if callable(args):
        with pytest.raises(ValueError) as info:
            args(module(script), it)
        check(str(info.value), match)
        return
    names = vars(it) | {"gaussian": it.run_of_gaussian}
    words = [word.format(**names) for word in args.split()]
    if script not in ("evaluate.py", "table.py") and "--out" not in args:
        words = ["--out", it.out, *words]
    words = [*COMMON.get(script, "").split(), *words]
    before = sorted(path for path in it.file.parent.rglob("*"))
    message = script_errors(EXPERIMENTS / script, monkeypatch, capsys)(*words)
    check(message.removeprefix("error: "), match)
    assert sorted(path for path in it.file.parent.rglob("*")) == before


def module(name):
    spec = importlib.util.spec_from_file_location(Path(name).stem, EXPERIMENTS / name)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_an_interrupt_is_told_or_passed_on():
    with pytest.raises(SystemExit, match=r"^interrupted: try again$"), exit_on_error("try again"):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), exit_on_error():
        raise KeyboardInterrupt
