"""The benchmark runs and compares what it says it compares. Nothing is asserted about time."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyro_vaediff.train import ModelConfig, make_vae

SCRIPT = Path(__file__).parents[1] / "experiments" / "benchmark.py"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("benchmark")


@pytest.fixture
def by_hand(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("by_hand")


def small(device):
    config = ModelConfig(latent_dim=3, width=4)
    vae = make_vae(config).to(device)
    return vae, torch.rand(4, *config.image_shape, device=device) * 2 - 1


def test_float32_is_not_tf32(benchmark, tf32_modules, device):
    assert benchmark.parse_device(str(device)) == device
    assert [module.allow_tf32 for module in tf32_modules] == [False, False]


def test_quick_run_writes_its_tables(tmp_path, device):
    command = [sys.executable, str(SCRIPT), "--quick", "--device", str(device)]
    result = subprocess.run(
        [*command, "--out", str(tmp_path / "new" / "folder")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    with open(tmp_path / "new" / "folder" / "benchmark.csv") as file:
        records = list(csv.DictReader(file))
    assert [(r["measurement"], r["configuration"]) for r in records] == [
        ("overhead", "cifar10"),
        ("plain-svi", "cifar10"),
        ("timesteps", "cifar10"),
        ("bf16", "cifar10"),
        ("overhead", "digits"),
        ("plain-svi", "digits"),
        ("timesteps", "digits"),
        ("exhaustive", "matrix products"),
        ("exhaustive", "sgemm peak"),
        ("sampler", "matrix products"),
        ("command", "digits"),
    ]
    assert all(float(r["target"]) > 0 for r in records)
    for record in records:
        ratio = float(record["median_ms"]) / float(record["reference_ms"])
        assert float(record["ratio"]) == pytest.approx(ratio, rel=1e-2)  # of rounded times
    table = (tmp_path / "new" / "folder" / "benchmark.md").read_text()
    assert table in result.stdout
    assert sum(line.startswith("| ") for line in table.splitlines()) == 1 + len(records)


def test_the_loop_by_hand_has_the_loss_of_svi(by_hand, device):
    by_hand.check_equal(*small(device))


@pytest.mark.parametrize(
    ("name", "factor", "message"),
    [
        ("a", 1 + 1e-6, "differ in the loss"),
        ("constant", 1 + 1e-6, "differ in the loss"),
        ("cdf", 0.5, "draw other timesteps"),
    ],
)
def test_a_wrong_loop_is_found_out(by_hand, device, monkeypatch, name, factor, message):
    class Wrong(by_hand.ByHand):
        def __init__(self, *args):
            super().__init__(*args)
            setattr(self, name, getattr(self, name) * factor)

    monkeypatch.setattr(by_hand, "ByHand", Wrong)
    with pytest.raises(RuntimeError, match=message):
        by_hand.check_equal(*small(device))


def test_a_detached_gradient_is_found_out(by_hand, device, monkeypatch):
    class Wrong(by_hand.ByHand):
        def reverse_mean(self, z, t):
            return super().reverse_mean(z.detach(), t)

    monkeypatch.setattr(by_hand, "ByHand", Wrong)
    with pytest.raises(RuntimeError, match=r"differ in the gradient of encoder"):
        by_hand.check_equal(*small(device))


def test_all_steps_train(benchmark, device):
    for make_step in (benchmark.trainer_step, benchmark.svi_step, benchmark.step_by_hand):
        vae, x = small(device)
        before = [p.detach().clone() for p in vae.parameters()]
        step = make_step(vae)
        for _ in range(3):  # the denoiser starts at zero: its first layers move from step two on
            step(x)
        for (name, after), initial in zip(vae.named_parameters(), before, strict=True):
            assert not torch.equal(after, initial), name
            assert after.isfinite().all(), name


def test_steps_take_turns(benchmark, device):
    calls = []
    times = benchmark.interleave(
        (lambda x: calls.append("a"), lambda x: calls.append("b")), torch.zeros(1), 3, warmup=1
    )
    assert "".join(calls) == "abbaabba"
    assert [len(column) for column in times] == [3, 3]


def test_some_of_the_measurements(benchmark, tmp_path, device):
    out = tmp_path / "some"
    benchmark.main(["--quick", "--only", "sampler", "--device", str(device), "--out", str(out)])
    with open(out / "benchmark.csv") as file:
        assert [row["measurement"] for row in csv.DictReader(file)] == ["sampler"]


def test_bf16_must_have_the_loss_of_float32(benchmark, device, monkeypatch):
    vae, x = small(device)
    benchmark.check_bf16(vae, x)

    monkeypatch.setattr(benchmark, "use_channels_last", spoil)
    with pytest.raises(RuntimeError, match="bf16 and float32 differ in the loss"):
        benchmark.check_bf16(vae, x)


def spoil(vae):
    vae.encoder.head.bias.data += 9


def test_the_floor_has_the_products_of_the_network(benchmark):
    floors = importlib.import_module("floors")
    prior, net = floors.make_prior(torch.device("cpu"), 3, 10)
    z, calls, linear = torch.randn(5, 3), [], floors.linear_layers(net)
    for layer in linear:
        layer.register_forward_hook(lambda layer, args, out: calls.append(layer))
    prior.denoiser(z, 4)
    assert calls == linear
    expected = z
    for layer in linear:
        expected = expected @ layer.weight.T
    torch.testing.assert_close(floors.matrix_products(net, z), expected)
    assert floors.flops(net, 5) == 10 * sum(layer.weight.numel() for layer in linear)
