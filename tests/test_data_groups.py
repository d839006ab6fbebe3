r"""Folders of images whose groups, such as persons, are kept in one split each."""

from __future__ import annotations

import hashlib
import json
import random
import runpy
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pyro
import pytest
import torch
from errors import one_line_value_error
from image_files import numbers, sizes, splits, write_folder
from scripts import EXPERIMENTS, script_errors

from pyro_vaediff.data import DATASETS, load
from pyro_vaediff.data.groups import hold_out, read_groups
from pyro_vaediff.infer import Timestep_ELBO
from pyro_vaediff.train.config import ModelConfig, TrainConfig
from pyro_vaediff.train.loop import Trainer
from pyro_vaediff.train.runs import load_data

# The image with number i, as write_folder names it, is in group PERSON[i].
PERSON = [i // 2 if i < 40 else 20 + i for i in range(100)]


def write_list(path: Path, group_of=PERSON, names="{:03}.png"):
    path.write_text("".join(f"{names.format(i)} {g}\n" for i, g in enumerate(group_of)))
    return path


def groups_in(data, group_of=PERSON):
    return [{group_of[i] for i in numbers(images)} for images in splits(data)]


def apart(*sets):
    return sum(map(len, sets)) == len(set().union(*sets))


# --- Splits ---------------------------------------------------------------------------------------


def test_no_group_is_in_two_splits(tmp_path):
    write_folder(tmp_path / "images", 100)
    at_random = load("folder", tmp_path / "images")
    listed = write_list(tmp_path / "groups.txt")
    data = load("folder", tmp_path / "images", groups=listed)
    assert sizes(data) == sizes(at_random) == (80, 10, 10)
    assert sorted(numbers(torch.cat(splits(data)))) == list(range(100))
    assert apart(*groups_in(data)) and not apart(*groups_in(at_random))
    assert at_random.groups is None
    digest = hashlib.sha256(listed.read_bytes()).hexdigest()
    assert data.groups == f"groups.txt (sha256 {digest[:16]})"


def test_the_seed_decides(tmp_path):
    write_folder(tmp_path / "images", 100)
    listed = write_list(tmp_path / "groups.txt")
    lines = listed.read_text().splitlines()
    random.Random(0).shuffle(lines)
    (tmp_path / "shuffled.txt").write_text("\n\n".join(lines))
    data, again, other = (
        load("folder", tmp_path / "images", groups=tmp_path / name, seed=seed)
        for name, seed in (("groups.txt", 0), ("shuffled.txt", 0), ("groups.txt", 1))
    )
    assert all(map(torch.equal, splits(data), splits(again)))
    for one, two in zip(splits(data), splits(other), strict=True):
        assert set(numbers(one)) != set(numbers(two))


def test_limit_keeps_the_first_images_of_a_permutation(tmp_path):
    r"""Within a split, images come in the order of a folder without groups."""
    write_folder(tmp_path / "images", 100)
    listed = write_list(tmp_path / "groups.txt")
    data = load("folder", tmp_path / "images", groups=str(listed))
    limited = load("folder", tmp_path / "images", groups=listed, limit=5)
    assert all(torch.equal(a, b[:5]) for a, b in zip(splits(limited), splits(data), strict=True))
    at_random = load("folder", tmp_path / "images")
    validation, test, train = splits(at_random)[1], splits(at_random)[2], splits(at_random)[0]
    order = numbers(torch.cat([validation, test, train]))
    for images in splits(data):
        assert numbers(images) == [i for i in order if i in set(numbers(images))]


def check_hold_out(rng, group_sizes, held_out):
    names = rng.sample(range(1000), len(group_sizes))
    groups = [
        f"g{name}" for name, size in zip(names, group_sizes, strict=True) for _ in range(size)
    ]
    rng.shuffle(groups)
    order = rng.sample(range(len(names)), len(names))
    split_of = hold_out(groups, order, held_out)
    assert split_of == hold_out(groups, order, held_out)

    of = {split: Counter() for split in (*held_out, "train")}
    for group, split in zip(groups, split_of, strict=True):
        of[split][group] += 1
    assert all(of.values()), "a split is empty"
    assert apart(*of.values())
    share, left = max(1, len(groups) // 10), min(of["train"].values())
    for split in held_out:
        size = sum(of[split].values())
        # No group of train comes closer if it is added, and none is much too large.
        assert abs(size - share) <= left / 2 or len(of[split]) == 1
        if len(of[split]) == 1 and size > share:
            assert size <= left
    return [sum(of[split].values()) for split in held_out], share


@pytest.mark.parametrize("held_out", [("validation", "test"), ("validation",)])
def test_shares_for_any_sizes_of_groups(held_out):
    rng = random.Random(0)
    for _ in range(500):
        count = rng.randint(len(held_out) + 1, rng.choice([4, 10, 60]))
        largest = rng.choice([1, 2, 5, 50])
        check_hold_out(rng, [rng.randint(1, largest) for _ in range(count)], held_out)
        # Groups of one image fill every gap.
        singles = [1] * (20 + 3 * largest)
        found, share = check_hold_out(rng, [largest, largest, *singles], held_out)
        assert found == [share] * len(held_out)


@pytest.mark.parametrize(
    "group_sizes, expected",
    [
        ([10, 10, 10], [10, 10]),
        ([1, 1, 1], [1, 1]),
        ([1, 1, 30], [1, 1]),
        ([1, 12, 87], [1, 12]),  # the group of 12 goes to the empty split, not to the other
        ([9, 9, 82], [9, 9]),
        ([12, 12, 76], [12, 12]),
        ([500, *[1] * 500], [100, 100]),
        ([7] * 100, [70, 70]),
        ([8, 8, 84], [8, 8]),
    ],
)
def test_shares(group_sizes, expected):
    for seed in range(20):
        found, _ = check_hold_out(random.Random(seed), group_sizes, ("validation", "test"))
        assert sorted(found) == expected


def test_every_group_can_be_held_out():
    seen = Counter()
    rng = random.Random(0)
    groups = [str(i // 3) for i in range(90)]
    for _ in range(1000):
        split_of = hold_out(groups, rng.sample(range(30), 30), ("validation", "test"))
        seen.update({(g, s) for g, s in zip(groups, split_of, strict=True)})
    for split in ("validation", "test"):
        for group in set(groups):
            assert 0.05 < seen[group, split] / 1000 < 0.15


# --- Splits that are given ------------------------------------------------------------------------


def test_validation_is_taken_from_train_by_groups(tmp_path):
    write_folder(tmp_path / "images" / "train", 60)
    write_folder(tmp_path / "images" / "test", 40, start=60)
    listed = write_list(tmp_path / "groups.txt")
    data = load("folder", tmp_path / "images", groups=listed)
    assert sizes(data) == (54, 6, 40)
    assert apart(*groups_in(data))
    assert sorted(numbers(data.test)) == list(range(60, 100))
    assert not apart(*groups_in(load("folder", tmp_path / "images")))


@pytest.mark.parametrize("held_out", ["val", "validation"])
@pytest.mark.parametrize("one, two", [("train", "test"), ("train", "val"), ("val", "test")])
def test_given_splits_are_checked(tmp_path, held_out, one, two):
    first = {"train": 0, "val": 60, "test": 80}
    folders = {"train": "train", "val": held_out, "test": "test"}
    for split, start in first.items():
        write_folder(tmp_path / "images" / folders[split], 20, start=start)
    listed = write_list(tmp_path / "groups.txt")
    data = load("folder", tmp_path / "images", groups=listed)
    assert sizes(data) == (20, 20, 20)
    assert sorted(numbers(data.validation)) == list(range(60, 80))

    shared = list(PERSON)
    shared[first[one]] = shared[first[two]] = 1000
    write_list(listed, shared)
    images = [f"{folders[s]}/class{first[s] % 3}/{first[s]:03}.png" for s in (one, two)]
    for image in images:
        with one_line_value_error(rf"groups='.*': group '1000' is in .*{image}.*: move its images"):
            load("folder", tmp_path / "images", groups=listed)


def test_train_and_test_are_checked_before_validation_is_cut(tmp_path):
    write_folder(tmp_path / "images" / "train", 20)
    write_folder(tmp_path / "images" / "test", 20, start=20)
    listed = write_list(tmp_path / "groups.txt", [i % 37 for i in range(40)])
    with one_line_value_error(r"group '[012]' is in train and test \(.*, .*\): move"):
        load("folder", tmp_path / "images", groups=listed)


# --- Lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["{:03}.png", "class{k}/{:03}.png"])
def test_files_are_named_by_path_or_name(tmp_path, names):
    write_folder(tmp_path / "images", 100)
    listed = tmp_path / "groups.txt"
    lines = [f"{names.format(i, k=i % 3)} {g}" for i, g in enumerate(PERSON)]
    # As in CelebA, the list names more files than there are; and files may be edited on Windows.
    lines += ["", "elsewhere.jpg 7", "with a space.jpg\t8", "   "]
    listed.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    data = load("folder", tmp_path / "images", groups=listed)
    assert sizes(data) == (80, 10, 10) and apart(*groups_in(data))
    assert read_groups(listed)["with a space.jpg"] == "8"


@pytest.mark.parametrize("listed_form, file_form", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_that_looks_alike_is_the_same(tmp_path, listed_form, file_form):
    write_folder(tmp_path / "images", 6)
    group_of = [i // 2 for i in range(6)]
    listed = write_list(tmp_path / "groups.txt", group_of, "{:03}.png")
    old, new = "000.png", "Zoë 0.png"
    path = tmp_path / "images" / "class0" / old
    path.rename(path.with_name(unicodedata.normalize(file_form, new)))
    text = listed.read_text().replace(old, unicodedata.normalize(listed_form, new))
    listed.write_text(text, encoding="utf-8")
    data = load("folder", tmp_path / "images", groups=listed)
    assert apart(*groups_in(data, group_of)) and sizes(data) == (2, 2, 2)


def test_a_path_goes_before_a_name(tmp_path):
    for number in range(9):
        write_folder(tmp_path / f"{number}", 1, start=number)
        (tmp_path / f"{number}" / f"class{number % 3}" / f"{number:03}.png").rename(
            tmp_path / f"{number}" / "a.png"
        )
    write_folder(tmp_path, 0)
    (tmp_path / "0" / "a.png").rename(tmp_path / "a.png")
    listed = tmp_path / "groups.txt"
    paths = ["a.png", *(f"{number}/a.png" for number in range(1, 9))]
    listed.write_text("".join(f"{path} {i // 3}\n" for i, path in enumerate(paths)))
    data = load("folder", tmp_path, groups=listed)
    assert sizes(data) == (3, 3, 3)
    assert apart(*groups_in(data, [i // 3 for i in range(9)]))
    # By its name alone, the file could be any of them.
    listed.write_text("a.png 1\n")
    with one_line_value_error(r"lists 'a\.png', which may be .*a\.png or .*a\.png: list the paths"):
        load("folder", tmp_path, groups=listed)


def test_images_that_are_not_listed(tmp_path):
    write_folder(tmp_path / "images", 20)
    listed = write_list(tmp_path / "groups.txt", PERSON[:19])
    match = (
        r"groups='.*groups\.txt' does not name 1 of 20 images: add lines .* for class1/019\.png,"
    )
    with one_line_value_error(match):
        load("folder", tmp_path / "images", groups=listed)
    listed.write_text("")
    with one_line_value_error(r"20 of 20 images: .* class0/000\.png, .* and 15 more, or remove"):
        load("folder", tmp_path / "images", groups=listed)


@pytest.mark.parametrize(
    "line, match",
    [
        ("alone.jpg", r"groups\.txt, line 3: expected 'FILE GROUP', not 'alone\.jpg'"),
        ("  alone.jpg\t", r"line 3: expected 'FILE GROUP'"),
        ("000.png 99", r"line 3: '000\.png' is in group '99' here, but in '0' above"),
        (b"\xff\xfe.png 3", r"groups='.*groups\.txt' is not UTF-8 text"),
    ],
)
def test_malformed_lists(tmp_path, line, match):
    write_folder(tmp_path / "images", 20)
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "groups.txt").write_bytes(b"000.png 0\n001.png 0\n" + line + b"\n")
    with one_line_value_error(match):
        load("folder", tmp_path / "images", groups=tmp_path / "groups.txt")


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_groups(tmp_path, count):
    write_folder(tmp_path / "images", 20)
    listed = write_list(tmp_path / "groups.txt", [i % count for i in range(20)])
    with one_line_value_error(f"20 images in {count} groups, but 3 splits need a group each"):
        load("folder", tmp_path / "images", groups=listed)
    write_folder(tmp_path / "given" / "train", 10)
    write_folder(tmp_path / "given" / "test", 1, start=90)
    write_list(listed, [i % count for i in range(90)] + [5])
    if count == 1:
        with one_line_value_error("10 images in 1 groups, but 2 splits need a group each"):
            load("folder", tmp_path / "given", groups=listed)
    else:
        assert sizes(load("folder", tmp_path / "given", groups=listed)) == (5, 5, 1)


@pytest.mark.parametrize("name", ["nowhere.txt", "."])
def test_no_list(tmp_path, name):
    write_folder(tmp_path, 20)
    with pytest.raises(FileNotFoundError, match=r"groups='.*' is not a file: give a list"):
        load("folder", tmp_path, groups=tmp_path / name)


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "folder"])
def test_other_data_sets_have_no_groups(tmp_path, name):
    with one_line_value_error(f"groups='g.txt' is for the data set 'folder', not '{name}'"):
        load(name, tmp_path, download=False, groups="g.txt")


# --- Runs -----------------------------------------------------------------------------------------


@pytest.fixture
def make_trainer(tmp_path):
    write_folder(tmp_path / "images", 100)

    def make(groups, out="run"):
        data = load("folder", tmp_path / "images", groups=groups)
        model = ModelConfig(
            "gaussian", latent_dim=2, width=4, image_shape=data.image_shape, levels=data.levels
        )
        config = TrainConfig(epochs=1, batch_size=20)
        return Trainer.from_config(model, config, Timestep_ELBO(k=1), data, out=tmp_path / out)

    return make


def test_a_run_is_evaluated_on_its_own_splits(make_trainer, tmp_path):
    listed = write_list(tmp_path / "groups.txt")
    other = write_list(tmp_path / "other.txt", PERSON[::-1])
    trainer = make_trainer(listed)
    trainer.fit(progress=False)
    images = tmp_path / "images"
    again = load_data(trainer.out, images, groups=str(listed))
    assert all(map(torch.equal, splits(again), splits(load("folder", images, groups=listed))))
    digest = hashlib.sha256(listed.read_bytes()).hexdigest()[:16]
    was = rf"trained with groups=groups\.txt \(sha256 {digest}\), not"
    with one_line_value_error(f"{was} None; give the list"):
        load_data(trainer.out, images)
    with one_line_value_error(rf"{was} other\.txt \(sha256"):
        load_data(trainer.out, images, groups=other)

    make_trainer(listed).resume()
    for groups in (None, other):
        with one_line_value_error("cannot resume .* with groups="):
            make_trainer(groups).resume()


def test_a_run_without_groups_stays_without(make_trainer, tmp_path):
    listed = write_list(tmp_path / "groups.txt")
    trainer = make_trainer(None)
    trainer.fit(progress=False)
    again = load_data(trainer.out, tmp_path / "images")
    assert all(map(torch.equal, splits(again), splits(load("folder", tmp_path / "images"))))
    with one_line_value_error(r"trained with groups=None, not groups\.txt"):
        load_data(trainer.out, tmp_path / "images", groups=listed)
    make_trainer(None).resume()
    with one_line_value_error("cannot resume .* with groups='groups.txt .*started with None"):
        make_trainer(listed).resume()


def test_the_option_of_the_script(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path / "images", 100)
    listed = write_list(tmp_path / "groups.txt")
    script = EXPERIMENTS / "run.py"
    folder = ("--dataset", "folder", "--root", tmp_path / "images", "--out", tmp_path / "run")
    tiny = ("--prior", "gaussian", "--latent-dim", 2, "--width", 4, "--epochs", 1, "--quiet")
    tiny += ("--features", "none", "--device", "cpu")
    try:
        arguments = [str(script), *map(str, (*folder, *tiny, "--groups", listed))]
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(script), run_name="__main__")
        assert "groups groups.txt (sha256 " in capsys.readouterr().out
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        data = load_data(tmp_path / "run", tmp_path / "images", groups=listed)
        assert config["groups"] == data.groups and data.groups.startswith("groups.txt")

        error_of = script_errors(script, monkeypatch, capsys)
        assert "cannot resume" in error_of(*folder, *tiny, "--resume")
        assert "for the data set 'folder', not 'digits'" in error_of(
            "--groups", listed, "--out", tmp_path / "other"
        )
    finally:
        pyro.enable_validation(True)  # the script switches it off
