r"""The teacher's pack: graders tell right answers from wrong ones, and the commands run."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pyro
import pytest
import torch
from test_docs import DOCS, cells

TEACHING = DOCS / "teaching"

# Right answers. They are solutions: a lecturer who grades for a degree changes the tasks.
SOLUTIONS = {
    1: """
import math
import pyro
import pyro.distributions as dist
import torch

def gaussian_kl(m, s):
    return ((m**2 + s**2 - 1) / 2 - s.log()).sum(-1)

def programs(w, sigma):
    def model(x, m, s):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w * z, sigma), obs=x)

    def guide(x, m, s):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(m, s))

    return model, guide

def surgery(m, s, num_samples):
    z = m + s * torch.randn(num_samples, len(m), dtype=m.dtype)
    of_each = dist.Normal(m, s).log_prob(z.unsqueeze(-1))
    log_q = of_each.logsumexp(-1) - math.log(len(m))
    log_q_x = dist.Normal(m, s).log_prob(z)
    log_p = dist.Normal(0.0, 1.0).log_prob(z)
    return (log_q_x - log_q).mean(), (log_q - log_p).mean()
""",
    2: """
import pyro
import pyro.distributions as dist
import torch

def diffuse(z_0, t, betas, eps):
    alpha_bar = (1 - betas[:t]).prod()
    return alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * eps

def way_back(z_0, z_t, t, betas):
    beta, before = betas[t - 1], (1 - betas[: t - 1]).prod()
    variance = 1 / (1 / (1 - before) + (1 - beta) / beta)
    mean = variance * (before.sqrt() * z_0 / (1 - before) + (1 - beta).sqrt() * z_t / beta)
    return mean, variance

def chain(betas):
    T = len(betas)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{T}", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            for t in range(T, 0, -1):
                back = dist.Normal((1 - betas[t - 1]).sqrt() * z, betas[t - 1].sqrt())
                z = pyro.sample(f"z_{t - 1}", back.to_event(1))

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z_0", dist.Normal(x, 0.1).to_event(1))
            for t in range(1, T + 1):
                step = dist.Normal((1 - betas[t - 1]).sqrt() * z, betas[t - 1].sqrt())
                z = pyro.sample(f"z_{t}", step.to_event(1))

    return model, guide
""",
    3: """
import torch

def estimate(L, r, k):
    t = torch.multinomial(r, k, replacement=True)
    return (L[t] / r[t]).mean()

def variance(mean, square, r):
    return (square / r).sum() - mean.sum() ** 2

def best_proposal(square):
    return square.sqrt() / square.sqrt().sum()
""",
}

# Wrong answers, each as what to replace in the right one.
WRONG = {
    "gaussian_kl": [
        ("- s.log()", "+ s.log()"),
        ("m**2 + s**2 - 1", "m**2 + s - 1"),
        (".sum(-1)", ".sum()"),
        ("(m**2 + s**2 - 1) / 2 - s.log()", "(m**2 + 1) / s**2 / 2 - 0.5 + s.log()"),  # KL(p || q)
    ],
    "programs": [
        (", obs=x)", ")"),
        ('with pyro.plate("data", len(x)):', "if True:"),
        ("dist.Normal(w * z, sigma)", "dist.Normal(w * z, sigma**2)"),
        ("dist.Normal(m, s)", "dist.Normal(0.0 * m, 1.0)"),  # the prior
    ],
    "surgery": [
        ("(log_q - log_p).mean()", "(log_q_x - log_p).mean()"),  # the whole KL
        (" - math.log(len(m))", ""),
        ("of_each.logsumexp(-1) - math.log(len(m))", "of_each.mean(-1)"),  # a mean of logarithms
        ("torch.randn(num_samples, len(m)", "0 * torch.randn(num_samples, len(m)"),
    ],
    "diffuse": [
        ("betas[:t]", "betas[: t + 1]"),
        ("(1 - betas[:t]).prod()", "1 - betas[t - 1]"),  # the last step alone
        ("(1 - alpha_bar).sqrt()", "(1 - alpha_bar)"),
    ],
    "way_back": [
        ("(1 - betas[: t - 1])", "(1 - betas[:t])"),
        ("return mean, variance", "return mean, variance.sqrt()"),
        ("return mean, variance", "return mean, beta"),
        ("before.sqrt() * z_0", "z_0"),
    ],
    "chain": [
        ("* z, betas[t - 1].sqrt())", "* z, betas[t - 1])"),
        ('f"z_{t - 1}"', 'f"z_{T - t}"'),  # the names the other way round
        ("dist.Normal(x, 0.1)", "dist.Normal(x, 1.0)"),
        ("(1 - betas[t - 1]).sqrt() * z", "z / (1 - betas[t - 1]).sqrt()"),
        (".to_event(1))\n            for t in range(T", ")\n            for t in range(T"),
    ],
    "estimate": [
        ("L[t] / r[t]", "L[t]"),
        (").mean()", ").sum()"),
        ("L[t] / r[t]", "L[t] * len(L)"),  # as if the proposal were uniform
        ("torch.multinomial(r, k, replacement=True)", "torch.multinomial(r, 1).expand(k)"),
    ],
    "variance": [
        ("mean.sum() ** 2", "mean.square().sum()"),
        ("(square / r).sum()", "(mean**2 / r).sum()"),  # without the noise of the terms
        ("(square / r).sum()", "(square * r).sum()"),
        (" - mean.sum() ** 2", ""),
    ],
    "best_proposal": [
        ("square.sqrt() / square.sqrt().sum()", "square / square.sum()"),
        ("square.sqrt() / square.sqrt().sum()", "square.sqrt()"),
        ("square.sqrt() / square.sqrt().sum()", "torch.ones(len(square)) / len(square)"),
    ],
}


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checks = load("checks", TEACHING / "checks.py")


def answers(assignment: int, old: str = "", new: str = "") -> dict:
    code = SOLUTIONS[assignment]
    assert old in code
    namespace: dict = {}
    exec(code.replace(old, new) if old else code, namespace)
    return namespace


@pytest.fixture(autouse=True)
def parameters():
    yield
    pyro.clear_param_store()


@pytest.mark.parametrize("assignment", SOLUTIONS)
def test_right_answers_earn_all_points(assignment: int):
    right = answers(assignment)
    for task in checks.TASKS[assignment]:
        found = json.loads(checks.verdict(assignment, task.name, right[task.name]))
        assert found == {"points": task.points, "comment": "right"}, task.name


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("default")  # such as Pyro's on sites that do not fit
def test_wrong_answers_earn_none_and_a_comment(name: str):
    (number,) = (n for n, tasks in checks.TASKS.items() if name in [t.name for t in tasks])
    assert len(WRONG[name]) >= 3
    for old, new in WRONG[name]:
        found = json.loads(checks.verdict(number, name, answers(number, old, new)[name]))
        assert found["points"] == 0 and re.search(r"\w", found["comment"]), (old, new)


def test_every_task_is_tried_and_asked_for():
    tasks = {t.name: n for n, of_number in checks.TASKS.items() for t in of_number}
    assert set(WRONG) == set(tasks)
    marking = (TEACHING / "marking.md").read_text(encoding="utf-8")
    for name, number in tasks.items():
        page = TEACHING / f"assignment-{number}.md"
        (stub,) = (cell.code for cell in cells(page) if f"def {name}(" in cell.code)
        assert "# yours" in stub
        task = next(t for t in checks.TASKS[number] if t.name == name)
        assert f"| `{name}` | {task.points} |" in marking
    for number, of_number in checks.TASKS.items():
        assert sum(task.points for task in of_number) == 10, number


def test_what_does_not_run_earns_nothing():
    assert json.loads(checks.verdict(3, "estimate", None))["comment"] == (
        "there is no function estimate"
    )
    found = json.loads(checks.verdict(3, "estimate", lambda L, r, k: 1 / 0))
    assert found == {"points": 0, "comment": "ZeroDivisionError: division by zero"}
    assert json.loads(checks.verdict(3, "estimate", lambda L, r, k: ...))["points"] == 0


# --- The commands ---


def notebook(path: Path, *codes: str) -> Path:
    nbformat = pytest.importorskip("nbformat")
    document = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in codes])
    nbformat.write(document, path)
    return path


def grade(*args: object) -> subprocess.CompletedProcess:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    command = [sys.executable, str(TEACHING / "grade.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_grade_runs_a_notebook(tmp_path):
    # The stubs, then a cell that fails, then answers of which one is wrong.
    stubs = [cell.code for cell in cells(TEACHING / "assignment-3.md")]
    mine = SOLUTIONS[3].replace("mean.sum() ** 2", "mean.square().sum()")
    path = notebook(tmp_path / "mine.ipynb", *stubs, "1 / 0", mine, "print('noise')")
    result = grade(3, path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "4 / 4  estimate: right" and lines[2] == "3 / 3  best_proposal: right"
    assert lines[1].startswith("0 / 3  variance: it is ") and lines[3] == "7 / 10  in all"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((4, "x.ipynb"), "assignment must be one of [1, 2, 3], got 4"),
        ((1, "x.py"), "notebook must end in .ipynb, got 'x.py'"),
        ((1, "none.ipynb"), "notebook 'none.ipynb' does not exist: check the path"),
    ],
)
def test_grade_refuses_in_one_line(monkeypatch, capsys, args, message):
    pytest.importorskip("nbclient")
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = load("grade", TEACHING / "grade.py")
    with pytest.raises(SystemExit):
        module.main([*map(str, args)])
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


def test_figures_are_written_as_pdf_and_svg_with_slides(tmp_path, monkeypatch, capsys):
    module = load("figures", TEACHING / "figures.py")
    module.main(["--out", str(tmp_path / "figures")])
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    expected = [f"{name}{suffix}" for name in module.SLIDES for suffix in (".pdf", ".svg")]
    assert names == sorted([*expected, "slides.md"])
    assert len(capsys.readouterr().out.splitlines()) == len(names)
    for name in module.SLIDES:
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes()[:4] == b"%PDF"
        assert b"<svg" in (tmp_path / "figures" / f"{name}.svg").read_bytes()
    slides = (tmp_path / "figures" / "slides.md").read_text(encoding="utf-8")
    assert slides.startswith("---\nmarp: true\n") and slides.count("\n---\n\n# ") == 8
    assert re.findall(r"!\[h:480 .+\]\((.+)\.svg\)", slides) == list(module.SLIDES)
    plans = (TEACHING / "lectures.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in plans for name in module.SLIDES)
    with pytest.raises(SystemExit):
        module.main(["--out", str(tmp_path / "figures" / "slides.md")])
    assert "--out must be a folder" in capsys.readouterr().err


def test_best_steps_are_the_moments_of_the_way_back():
    module = load("figures", TEACHING / "figures.py")
    chain, t, z = module.CosineSchedule(6).double(), 3, module.GRID
    before, after = (module.guide_marginals(chain, module.DATA, z)[u] for u in (t - 1, t))
    step = module.dist.Normal((1 - chain.betas[t]).sqrt() * z, chain.betas[t].sqrt())
    for i in (250, 300, 340):
        joint = before * step.log_prob(z[i]).exp()  # over z_{t-1}, for one z_t
        torch.testing.assert_close(joint.sum() * (z[1] - z[0]), after[i], atol=1e-10, rtol=0)
        law = joint / joint.sum()
        best = module.best_kernel(chain, z[i].reshape(1, 1), t)
        mean = (law * z).sum()
        torch.testing.assert_close(best.mean.squeeze(), mean, atol=1e-10, rtol=0)
        variance = (law * (z - mean) ** 2).sum()
        torch.testing.assert_close(best.variance.squeeze(), variance, atol=1e-10, rtol=0)
