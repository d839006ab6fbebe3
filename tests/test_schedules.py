r"""The tables of the schedules against their definitions, in float64 and after casts."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from errors import one_line_value_error

from pyro_vaediff import DiffusionPrior
from pyro_vaediff.schedules import CosineSchedule, LinearSchedule, Schedule, at_time, make_schedule

TABLES = ("betas", "alphas", "alphas_cumprod", "one_minus_alphas_cumprod", "betas_tilde")


def exact(actual, expected, **kwargs):
    torch.testing.assert_close(actual, expected, **{"atol": 1e-10, "rtol": 0} | kwargs)


@pytest.mark.parametrize("T", [1, 2, 3, 10, 1000, 1001, 4000])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_tables_follow_from_the_variances(name, T):
    schedule = make_schedule(name, T).double()
    assert schedule.num_timesteps == T
    for table in TABLES:
        assert getattr(schedule, table).shape == (T + 1,)
        assert getattr(schedule, table).isfinite().all()
    betas = schedule.betas
    assert betas[0] == 0 and ((betas[1:] > 0) & (betas[1:] < 1)).all()
    alpha_bar = 1.0
    for t in range(T + 1):
        previous, alpha_bar = alpha_bar, alpha_bar * (1 - betas[t].item())
        expected = betas[t].item() * (1 - previous) / (1 - alpha_bar) if t > 0 else 0.0
        exact(schedule.alphas[t].item(), 1 - betas[t].item())
        exact(schedule.alphas_cumprod[t].item(), alpha_bar)
        exact(schedule.one_minus_alphas_cumprod[t].item(), 1 - alpha_bar)
        exact(schedule.betas_tilde[t].item(), expected)
    assert schedule.alphas_cumprod[0] == 1 and schedule.betas_tilde[1] == 0
    assert (schedule.alphas_cumprod.diff() < 0).all()


def test_linear_is_that_of_ho_et_al():
    expected = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    exact(LinearSchedule(1000).original("betas")[1:], expected, atol=0, rtol=1e-12)
    expected = torch.linspace(1e-3, 0.1, 1000, dtype=torch.float64)
    exact(LinearSchedule(1000, 1e-3, 0.1).original("betas")[1:], expected)


@pytest.mark.parametrize("T", [1, 2, 7, 100, 500, 1001, 4000])
def test_linear_observes_the_same_path_at_other_times(T):
    path = LinearSchedule(1000).original("alphas_cumprod").log()
    log_alpha_bar = LinearSchedule(T).original("alphas_cumprod").log()
    for t in range(0, T + 1, max(1, T // 50)):
        time = 1000 * t / T
        lower = min(int(time), 999)
        expected = path[lower] + (time - lower) * (path[lower + 1] - path[lower])
        exact(log_alpha_bar[t], expected)
    exact(log_alpha_bar[T], path[1000])


@pytest.mark.parametrize("T", [2, 10, 1000])
def test_cosine_is_that_of_nichol_and_dhariwal(T):
    def f(t):
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = CosineSchedule(T)
    for t in range(T):  # at t = T the variance is clipped
        exact(schedule.original("alphas_cumprod")[t].item(), f(t) / f(0))
        exact(schedule.original("betas")[t + 1].item(), min(1 - f(t + 1) / f(t), 0.999))
    assert CosineSchedule(T, beta_max=0.5).original("betas").max() == 0.5


def test_one_minus_alphas_cumprod_is_free_of_cancellation():
    schedule = Schedule(torch.full((3,), 1e-12, dtype=torch.float64))
    expected = 1e-12 * torch.arange(4, dtype=torch.float64)
    exact(schedule.original("one_minus_alphas_cumprod"), expected, atol=0, rtol=1e-10)


# --- Casts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_change_of_dtype_rounds_afresh_from_float64(device, make):
    for module in (CosineSchedule(50), DiffusionPrior(2, 50)):
        module = make(module).to(device)
        for dtype in (torch.float64, torch.float16, torch.float64, torch.float32):
            module.to(dtype)
            for tables in module.modules():
                for name, table in getattr(tables, "_originals", {}).items():
                    wide = torch.promote_types(dtype, torch.float32)  # never in half precision
                    assert getattr(tables, name).dtype == wide
                    assert (getattr(tables, name).cpu() == table.to(wide)).all()
    assert CosineSchedule(50).betas.dtype == torch.float32


def test_the_default_dtype_is_honoured():
    torch.set_default_dtype(torch.float64)
    try:
        schedule = LinearSchedule(10)
        assert (schedule.betas == schedule.original("betas")).all()
        assert schedule.betas.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_tables_follow_the_device():
    prior = DiffusionPrior(2, 5).to("meta")
    assert {b.device.type for b in prior.buffers()} == {"meta"}
    assert at_time(prior.schedule.betas, 3).device.type == "meta"
    restored = prior.to_empty(device="cpu").schedule
    exact(restored.betas, LinearSchedule(5).betas)


def test_tables_are_not_part_of_the_state():
    assert not LinearSchedule(10).state_dict()
    prior = DiffusionPrior(2, 5)
    assert list(prior.state_dict()) == [name for name, _ in prior.named_parameters()]


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: Schedule(torch.tensor([])), r"betas must have shape .* got \(0,\)"),
        (lambda: Schedule(torch.tensor([[0.1]])), r"betas must have shape .* got \(1, 1\)"),
        (lambda: Schedule(torch.tensor([0.0, 0.1])), r"betas must lie in \(0, 1\)"),
        (lambda: Schedule(torch.tensor([0.1, 1.0])), r"betas must lie in \(0, 1\)"),
        (lambda: Schedule(torch.tensor([0.1, math.nan])), r"betas must lie in \(0, 1\)"),
        (lambda: LinearSchedule(0), "num_timesteps .* got 0"),
        (lambda: LinearSchedule(2.5), "num_timesteps .* got 2.5"),
        (lambda: LinearSchedule(10, 0.02, 1e-4), "beta_min <= beta_max"),
        (lambda: CosineSchedule(-1), "num_timesteps .* got -1"),
        (lambda: make_schedule("quadratic", 10), "unknown schedule 'quadratic'.*linear, cosine"),
        (lambda: make_schedule(LinearSchedule(10), 20), "num_timesteps is 20, .* has 10"),
    ],
)
def test_bad_input(make, match):
    with one_line_value_error(match):
        make()
