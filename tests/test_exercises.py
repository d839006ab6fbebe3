r"""Exercises: the hidden solution passes its grading cell, and plausible wrong answers do not.

A wrong answer is the solution with some of its text replaced. Of a page, only those cells run which
the exercises need, and with fewer steps of training: what is graded does not depend on these.
"""

from __future__ import annotations

import builtins
import re
import symtable
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pytest
import torch
from test_docs import EXERCISE, TUTORIALS, Cell, cells

# By exercise: the wrong answers, each as what to replace in the solution.
WRONG: dict[str, list[dict[str, str]]] = {
    "1.1": [
        {"2 * c**2)": "c**2)"},  # Var(eps^2) = 1
        {"/ sigma**2 - m)": "/ sigma**2)"},  # without log p(z)
        {"(1 - s**2 *": "(-(s**2) *"},  # without log q(z)
        {"math.sqrt(b**2 + 2 * c**2)": "b**2 + 2 * c**2"},  # a variance
    ],
    "1.2": [
        {"torch.logdet(precision)) / 2": "torch.logdet(precision))"},
        {"(precision.diagonal().log().sum() -": "-(precision.diagonal().log().sum() -"},
        {
            "precision = torch.eye(W.shape[1]) + W.T @ W / sigma**2": "precision = "
            "torch.linalg.inv(torch.eye(W.shape[1]) + W.T @ W / sigma**2)"  # marginal variances
        },
        {"W.T @ W / sigma**2\n": "W.T @ W / sigma\n"},
    ],
    "1.3": [
        {"eigenvalues[K:].mean()": "eigenvalues[K:].sum()"},
        {"eigenvalues[K:].mean()": "eigenvalues[K]"},
        {"eigenvalues[K:].mean()": "eigenvalues.mean()"},
        {"eigenvalues[K:].mean()": "eigenvalues[:K].mean()"},
    ],
    "2.1": [
        {"total = v + s**2": "total = v + s"},
        {"math.log(total / s**2) / 2": "math.log(total / s**2)"},
        {"(total - 1 - math.log(total))": "(total - 1 + math.log(total))"},
        {"total = v + s**2": "total = v**2 + s**2"},
    ],
    "2.2": [
        {"dist.Normal(loc, scale).to_event": "dist.Normal(loc, scale.mean()).to_event"},
        {"dist.Normal(loc, scale).to_event": "dist.Normal(loc, scale.square()).to_event"},
        {"torch.ones(len(loc))": "torch.arange(1.0, len(loc) + 1)"},
        {"dist.Normal(loc, scale).to_event": "dist.Normal(loc, torch.ones_like(scale)).to_event"},
    ],
    "2.3": [
        {".sum() * 0.1**2": ".sum()"},
        {".sum() * 0.1**2": ".sum() * 0.1"},
        {"log_q.exp() *": "log_prior(grid).exp() *"},  # weighted by the prior
        {"(log_q - log_prior(grid))": "(log_prior(grid) - log_q)"},
    ],
    "3.1": [
        {"(s**2 + (m - mean) ** 2)": "s**2"},  # within the parts only
        {"(s**2 + (m - mean) ** 2)": "(m - mean) ** 2"},  # between them only
        {"variance.sqrt()": "variance"},
        {"mean = (w * m).sum()": "mean = m.mean()"},
    ],
    "3.2": [
        {".log() / 2\n": ".log()\n"},
        {"information - torch.cat([information[1:], torch.zeros(1)])": "information"},
        {"[information[1:], torch.zeros(1)]": "[torch.zeros(1), information[:-1]]"},
        {"schedule.alphas_cumprod[1:]": "schedule.alphas[1:]"},
    ],
    "3.3": [
        {"times[group - 2], times[group - 1])": "times[group - 2])"},  # a step of one
        {"q_reverse(schedule, x, h, times[group - 2], ": "q_marginal(schedule, x, "},  # without h
        {"h, times[group - 2], ": "h, times[group - 1] + 1, "},
        {"x, times[0])": "x, times[-1])"},
    ],
    "4.1": [
        {"log1p(-alpha_bar) / 2": "log1p(-alpha_bar)"},
        {"-torch.log1p(-alpha_bar) / 2": "-torch.log(alpha_bar) / 2"},
        {"-torch.log1p(-alpha_bar) / 2": "torch.log1p(-alpha_bar) / 2"},
        {"-torch.log1p(-alpha_bar) / 2": "torch.log(alpha_bar / (1 - alpha_bar)) / 2"},
    ],
    "4.2": [
        {"alpha_bar * s**2 + 1": "alpha_bar * s + 1"},
        {"alphas_cumprod[t - 1]": "alphas_cumprod[t]"},
        {"variance.sqrt())": "variance)"},
        {"alpha.sqrt() * z / beta": "z / beta"},
    ],
    "4.3": [
        {"z_0, t).sample()": "z_0, t).mean"},
        {"q_marginal(prior.schedule, z_0, t).sample()": "z_0"},
        {"q_marginal(prior.schedule, z_0, t)": "q_step(prior.schedule, z_0, t)"},
        {'data={f"z_{t}": z_t}': 'data={f"z_{t - 1}": z_t}'},
    ],
    "5.1": [
        {"|= {name} | descendants[name]": "|= {name}"},  # children only
        {"& descendants[name]": "- descendants[name]"},
        {' if parents}': "}"},
        {'predicted = {"z_0", "z_1", "z_2"}': 'predicted = {"z_0", "z_1", "z_2", "z_3"}'},
    ],
    "5.2": [
        {".square(), betas": ", betas"},
        {"D * ((1": "((1"},
        {"(1 - betas[1:]) * variances": "variances"},
        {"betas[1:-1]": "betas[2:]"},
    ],
    "5.3": [
        {"-q.entropy() - p.log_prob(z)": "q.log_prob(z) - p.log_prob(z)"},
        {"-q.entropy() -": "q.entropy() -"},
        {"kl_divergence(q, p)": "kl_divergence(p, q)"},
        {"if legal else": "if not legal else"},
    ],
    "6.1": [
        {"(2 * prior": "(prior"},
        {"prior.denoiser.kernel.sigmas[t] ** 2": "beta"},  # of one of the two priors
        {"* alpha * one_minus": "* one_minus"},
        {"beta**2 /": "beta /"},
    ],
    "6.2": [
        {"torch.randperm(n) +": "torch.arange(n) +"},
        {"(torch.randperm(n) + torch.rand(n)) / n": "torch.rand(n)"},
        {"+ torch.rand(n)": "+ 0.5"},  # the middle of each slot
        {"+ torch.rand(n)": "+ torch.rand(1)"},  # the same position in all slots
    ],
    "6.3": [
        {"s**2 / (2 * k)": "s**2 / k"},
        {"s**2 / (2 * k)": "s / (2 * k)"},
        {"s**2 / (2 * k)": "s**2 / 2"},
        {"s**2 / (2 * k)": "0.0"},
    ],
    "7.1": [
        {"self.temperature * fn.stddev": "self.temperature**0.5 * fn.stddev"},
        {"fn.mean, self.temperature * fn.stddev": "self.temperature * fn.mean, fn.stddev"},
        {'msg["value"] is not None or ': ""},  # the likelihood as well
        {"self.temperature * fn.stddev": "self.temperature"},
    ],
    "7.2": [
        {', infer={"closed_form_kl": True}': ""},
        {'pyro.sample("z_0", q_z0': 'pyro.sample("z_0", prior.standard_normal()'},
        {'pyro.sample("z_0", prior': 'pyro.sample("z", prior'},
    ],
    "7.3": [
        {"torch.cat([u, 1 - u])": "torch.cat([u, u])"},
        {"torch.cat([u, 1 - u])": "torch.cat([u, (u + 0.5) % 1])"},
        {"torch.rand(k // 2, *data, dtype=cdf.dtype)": "torch.rand(k // 2, 1).expand(-1, *data)"},
        {  # the timestep itself is mirrored
            "u = torch.cat([u, 1 - u])": "t = torch.searchsorted(cdf, u).clamp(max=len(cdf) - 1)",
            'msg["value"] = fn.first + torch.searchsorted(cdf, u).clamp(max=len(cdf) - 1)': 'msg['
            '"value"] = fn.first + torch.cat([t, len(cdf) - 1 - t])',
        },
    ],
    "8.1": [
        {"2 / (p_eff": "1 / (p_eff"},
        {
            "eigenvalues.sum() ** 2 / eigenvalues.square().sum()": "torch.tensor("
            "float(len(eigenvalues)))"  # the number of parameters
        },
        {"* r**2)": "* r)"},
        {"eigenvalues.sum() ** 2 / eigenvalues.square().sum()": "eigenvalues.sum() / "
         "eigenvalues.max()"},
    ],
    "8.2": [
        {") ** 0.5": ")"},
        {"v_1 * c_0 / (v_0 * c_1)": "v_0 * c_1 / (v_1 * c_0)"},
        {"v_1 * c_0 / (v_0 * c_1)": "v_1 / v_0"},
        {"v_1 * c_0 / (v_0 * c_1)": "c_0 / c_1"},
    ],
    "8.3": [
        {"v_a * v_b / (v_a + v_b) *": "(v_a + v_b) / 4 *"},  # the weight one half
        {"v_a * v_b / (v_a + v_b) * (c_a + c_b)": "min(v_a * c_a, v_b * c_b)"},
        {"* (c_a + c_b)": "* max(c_a, c_b)"},
        {"v_a * v_b / (v_a + v_b) *": "(v_a + v_b) *"},
    ],
    "9.1": [
        {"precision.diag().rsqrt()": "torch.linalg.inv(precision).diag().sqrt()"},
        {".rsqrt()": ".reciprocal()"},
        {"torch.eye(A.shape[1]) + A.T": "A.T"},
        {"A.T @ A / sigma**2\n": "A.T @ A / sigma\n"},
    ],
    "9.2": [
        {"elbos.logsumexp(0)": "elbos.max()"},
        {"elbos.logsumexp(0)": "elbos.mean()"},
        {"elbos.softmax(0)": "torch.ones(len(elbos)) / len(elbos)"},
        {"elbos.softmax(0)": "elbos / elbos.sum()"},
    ],
    "9.3": [
        {"log_probs.sum(-1).logsumexp(0) - math.log(len(log_probs))": "(log_probs.logsumexp(0) - "
         "math.log(len(log_probs))).sum()"},
        {" - math.log(len(log_probs))": ""},
        {"log_probs.sum(-1).logsumexp(0) - math.log(len(log_probs))": "log_probs.sum(-1).mean()"},
        {"log_probs.sum(-1)": "log_probs.mean(-1)"},
    ],
}  # fmt: skip

# By page: less training than on the page.
SHORTER = {
    2: {"num_steps=1000": "num_steps=100", ", 300, lr": ", 20, lr"},
    4: {"num_steps = 600": "num_steps = 5", "make_moons(4000": "make_moons(400"},
    6: {"range(250)": "range(5)"},
    9: {"500, 1e-2": "40, 1e-2", "250, 0.03": "20, 0.03", "range(200)": "range(5)"},
}


def names(code: str) -> tuple[set[str], set[str]]:
    r"""Returns the global names that a cell binds, and those that it needs from others."""
    top = symtable.symtable(code, "cell", "exec")
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    bound |= {child.get_name() for child in top.get_children()}
    used = {s.get_name() for s in top.get_symbols() if s.is_referenced()}
    scopes = top.get_children()
    while scopes:
        scope = scopes.pop()
        used |= {s.get_name() for s in scope.get_symbols() if s.is_global()}
        scopes += scope.get_children()
    return bound, used - bound - set(dir(builtins))


def needed(page: list[Cell], first: int) -> list[Cell]:
    r"""Returns the cells before the first exercise without which no cell after it can run."""
    missing: set[str] = set()
    chosen = []
    for cell in reversed(page):
        bound, used = names(cell.code)
        if cell.start > first or cell is page[0] or bound & missing:
            chosen.append(cell)
            missing = (missing - bound) | used
    return [cell for cell in reversed(chosen) if cell.start < first]


def run(code: str, namespace: dict) -> None:
    exec(compile(code, "exercise", "exec"), namespace)


def changed(solution: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        assert old in solution, f"no {old!r} in the solution"
        solution = solution.replace(old, new)
    compile(solution, "wrong answer", "exec")
    return solution


@pytest.fixture(autouse=True)
def page_alone(monkeypatch: pytest.MonkeyPatch):
    r"""What a page sets for its whole process is set back."""
    monkeypatch.chdir(TUTORIALS[0].parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(plt, "show", lambda: None)
    validation, dtype = pyro.settings.get("validate_poutine"), torch.get_default_dtype()
    style = dict(plt.rcParams)
    yield
    pyro.enable_validation(validation)
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()
    plt.close("all")
    plt.rcParams.update(style)


def test_every_exercise_has_three_wrong_answers():
    found = [f"{m[1]}.{m[2]}" for page in TUTORIALS for m in EXERCISE.finditer(page.read_text())]
    assert list(WRONG) == found
    assert all(len(answers) >= 3 for answers in WRONG.values())


@pytest.mark.filterwarnings("default")  # as on a page
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_graders_tell_right_from_wrong(page: Path):
    text, all_cells = page.read_text(encoding="utf-8"), cells(page)
    exercises = list(EXERCISE.finditer(text))
    namespace: dict = {"__name__": "page"}
    for cell in needed(all_cells, exercises[0].start()):
        code = cell.code
        for old, new in SHORTER.get(int(page.name[0]), {}).items():
            code = code.replace(old, new)
        run(code, namespace)
    ends = [*(match.start() for match in exercises[1:]), len(text)]
    for match, end in zip(exercises, ends, strict=True):
        stub, *between, grade = (c for c in all_cells if match.start() < c.start < end)
        (solution,) = (c.code for c in between if c.is_solution)
        run(stub.code, namespace)
        let_through = []
        for replacements in WRONG[f"{match[1]}.{match[2]}"]:
            attempt = dict(namespace)
            run(changed(solution, replacements), attempt)
            try:
                run(grade.code, attempt)
            except AssertionError as error:
                assert re.search(r"\w", str(error)), "a grade says what may be wrong"
            else:
                let_through.append(replacements)
        assert not let_through, f"{match[0]}: graded as right"
        run(solution, namespace)
        run(grade.code, namespace)
