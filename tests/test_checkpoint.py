r"""Files that are whole or absent, and checkpoints that execute no code."""

from __future__ import annotations

import csv
import errno
import os
import pickle
import resource
import signal
import tempfile

import pytest
import torch
from errors import one_line_value_error
from processes import context

from pyro_vaediff import files
from pyro_vaediff.files import remove_unfinished, write_atomically, write_csv
from pyro_vaediff.train import load_checkpoint, save_checkpoint


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


# --- Faults ---------------------------------------------------------------------------------------

MOMENTS = ["half written", "written", "synced", "renamed", "folder synced"]


def write_and_die(path, moment):
    r"""Writes a file and kills this process at a moment of that, as ``kill -9`` does."""
    moments = iter(["synced", "folder synced"])

    def die(reached):
        if reached == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(file):
        file.write(b"new" * 10_000)
        file.flush()
        die("half written")
        file.write(b"new" * 10_000)
        file.flush()
        die("written")

    def fsync(descriptor, original=os.fsync):
        original(descriptor)
        die(next(moments))

    def replace(*args, original=os.replace):
        original(*args)
        die("renamed")

    os.fsync, os.replace = fsync, replace
    write_atomically(path, write)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("before", [b"old", None])
def test_a_kill_while_a_file_is_written(tmp_path, moment, before):
    path = tmp_path / "checkpoint.pt"
    if before is not None:
        path.write_bytes(before)
    process = context.Process(target=write_and_die, args=(path, moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    content = path.read_bytes() if path.exists() else None
    done = MOMENTS.index(moment) >= MOMENTS.index("renamed")
    assert content == (b"new" * 20_000 if done else before)
    assert len(list(tmp_path.glob(".*"))) == (0 if done else 1)
    (tmp_path / ".other").write_text("not ours")
    remove_unfinished(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} - {"checkpoint.pt"} == {".other"}
    write_atomically(path, lambda file: file.write(b"newer"))
    assert path.read_bytes() == b"newer"


@pytest.mark.parametrize(
    "module, function, number, message",
    [
        (os, "fsync", errno.ENOSPC, "No space left on device"),
        (os, "fsync", errno.EDQUOT, "quota exceeded"),
        (os, "fsync", errno.EIO, "Input/output error"),
        (os, "replace", errno.ENOSPC, "No space left on device"),
        (tempfile, "mkstemp", errno.ENOSPC, "No space left on device"),
        (tempfile, "mkstemp", errno.EROFS, "Read-only file system"),
        (tempfile, "mkstemp", errno.EACCES, "Permission denied"),
    ],
)
def test_a_file_that_cannot_be_written(tmp_path, monkeypatch, module, function, number, message):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 1})

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(module, function, fail)
        with pytest.raises(OSError) as info:
            save_checkpoint(path, {"epoch": 2})
    assert info.value.errno == number
    check_write_error(info.value, path, message)


def check_write_error(error, path, message):
    text = str(error)
    assert message in text and str(path) in text and "\n" not in text
    assert "a file that was there before is unchanged" in text
    assert load_checkpoint(path)["epoch"] == 1
    assert list(path.parent.iterdir()) == [path]


def write_with_a_limit(path, sender):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        save_checkpoint(path, {"epoch": 2, "weights": torch.zeros(10_000)})
    except OSError as error:
        sender.send(error)


def test_a_disk_that_is_full_in_the_midst_of_a_file(tmp_path):
    # The kernel's limit on the size of a file refuses the rest of it, like a full disk.
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 1})
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=write_with_a_limit, args=(path, sender))
    process.start()
    check_write_error(receiver.recv(), path, "File too large")
    process.join()
    assert process.exitcode == 0


def test_a_folder_that_cannot_be_synced_does_no_harm(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError(errno.EINVAL, "not here")

    monkeypatch.setattr(files, "sync_folder", fail)
    save_checkpoint(tmp_path / "new" / "checkpoint.pt", {"epoch": 1})
    assert load_checkpoint(tmp_path / "new" / "checkpoint.pt")["epoch"] == 1


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"Not a directory .*file/run/checkpoint\.pt"):
        save_checkpoint(tmp_path / "file" / "run" / "checkpoint.pt", {"epoch": 1})


# --- Tables ---------------------------------------------------------------------------------------


def test_csv_keeps_every_digit(tmp_path):
    records = [{"epoch": 1, "a": 1 / 3, "b": "x, y"}, {"epoch": 2, "a": 1e-300, "b": '"'}]
    write_csv(tmp_path / "table.csv", records)
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{"epoch": int(r["epoch"]), "a": float(r["a"]), "b": r["b"]} for r in rows] == records
