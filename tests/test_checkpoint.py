r"""Files that are whole or absent, and checkpoints that execute no code."""

from __future__ import annotations

import csv
import pickle

import pytest
import torch
from errors import one_line_value_error

from pyro_vaediff.checkpoint import load_checkpoint, save_checkpoint, write_atomically, write_csv


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def broken_checkpoints(good, victim):
    yield "empty", b""
    yield "text", b"epoch,train\n1,2.0\n"
    yield "stop", b"."
    yield "number", b"G1"
    yield "pickle", pickle.dumps({"vae": 1})
    yield "code", pickle.dumps(Malicious(victim))
    yield "image", b"\x89PNG\r\n\x1a\n" + bytes(100)
    for n in range(1, len(good), len(good) // 40):
        yield f"truncated to {n} of {len(good)}", good[:n]


def test_broken_checkpoints(tmp_path):
    path, victim = tmp_path / "checkpoint.pt", tmp_path / "victim"
    save_checkpoint(path, {"vae": {"weight": torch.randn(50)}, "history": [{"train": 1.0}]})
    assert load_checkpoint(path)["history"] == [{"train": 1.0}]
    for name, content in broken_checkpoints(path.read_bytes(), victim):
        path.write_bytes(content)
        with one_line_value_error(r"checkpoint\.pt is not a checkpoint, or is truncated \(.+\)"):
            load_checkpoint(path)
            pytest.fail(name)
    assert not victim.exists()
    pickle.loads(pickle.dumps(Malicious(victim))).close()
    assert victim.exists()  # that pickle does execute code


@pytest.mark.parametrize("content", [{"vae": {}}, {"format": "other"}, [1, 2], torch.zeros(3)])
def test_foreign_checkpoints(tmp_path, content):
    torch.save(content, tmp_path / "checkpoint.pt")
    with one_line_value_error("was not written by this library"):
        load_checkpoint(tmp_path / "checkpoint.pt")


def test_code_in_a_whole_checkpoint_is_not_executed(tmp_path):
    path, victim = tmp_path / "checkpoint.pt", tmp_path / "victim"
    torch.save({"format": "pyro_vaediff checkpoint, version 1", "x": Malicious(victim)}, path)
    with one_line_value_error("is not a checkpoint"):
        load_checkpoint(path)
    assert not victim.exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_file_before(tmp_path, error):
    path = tmp_path / "new" / "results.json"

    def fail(file):
        file.write(b"half of the")
        file.flush()
        assert not path.exists() or path.read_bytes() == b"whole"
        raise error

    with pytest.raises(error):
        write_atomically(path, fail)
    assert list(path.parent.iterdir()) == []
    write_atomically(path, lambda file: file.write(b"whole"))
    with pytest.raises(error):
        write_atomically(path, fail)
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_that_cannot_be_saved_leaves_the_one_before(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        save_checkpoint(path, {"epoch": 2, "f": lambda: 0})
    assert load_checkpoint(path)["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_csv_keeps_every_digit(tmp_path):
    records = [{"epoch": 1, "a": 1 / 3, "b": "x, y"}, {"epoch": 2, "a": 1e-300, "b": '"'}]
    write_csv(tmp_path / "table.csv", records)
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{"epoch": int(r["epoch"]), "a": float(r["a"]), "b": r["b"]} for r in rows] == records
