"""B-DISTIL against explicit loops over its definition, in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from timm_mamba_pkd.distillation.rules import Batch, BDistil, Verdict
from timm_mamba_pkd.distillation.rules.bdistil import log_barrier


def started(num_samples: int = 3, num_classes: int = 2, **kwargs: float) -> BDistil:
    rule = BDistil(**kwargs)  # pyright: ignore[reportArgumentType]
    rule.start(num_samples, num_classes)
    return rule


def full_batch(student: Tensor, teacher: Tensor, index: Tensor | None = None, stage: int = 1) -> Batch:
    earlier, labels = student.new_zeros(0, *student.shape), torch.zeros(len(student), dtype=torch.long)
    return Batch(student, teacher, earlier, labels, torch.arange(len(student)) if index is None else index, stage)


def edges(k_plus: np.ndarray, k_minus: np.ndarray, f: np.ndarray, g: np.ndarray) -> np.ndarray:
    """(2, C): sum_i K+ (f - g) / s and sum_i K- (g - f) / s, s = mean |f - g|, by loops."""
    n, c = f.shape
    found = np.zeros((2, c))
    for j in range(c):
        s = sum(abs(f[i, j] - g[i, j]) for i in range(n)) / n
        for i in range(n):
            found[0, j] += k_plus[i, j] * (f[i, j] - g[i, j]) / s
            found[1, j] += k_minus[i, j] * (g[i, j] - f[i, j]) / s
    return found


def updated(k_plus: np.ndarray, k_minus: np.ndarray, f: np.ndarray, g: np.ndarray, eta: float) -> list[np.ndarray]:
    """K+ and K- after a stage, by loops."""
    after = [k_plus.copy(), k_minus.copy()]
    for sign, k in ((-1, after[0]), (1, after[1])):
        for j in range(f.shape[1]):
            for i in range(len(f)):
                k[i, j] *= math.exp(sign * eta * (f[i, j] - g[i, j]))
            total = sum(k[i, j] for i in range(len(f)))
            for i in range(len(f)):
                k[i, j] /= total
    return after


def barrier_by_definition(z: float, gamma: float) -> float:
    """Arithmetic of arXiv 1904.04205, eq. 4."""
    if z <= -1 / gamma**2:
        return -math.log(-z) / gamma
    return gamma * z - math.log(1 / gamma**2) / gamma + 1 / gamma


G = np.array([[4.0, -1.0], [0.5, 2.0], [-3.0, 0.0]])
STUDENTS = [
    np.array([[3.0, -1.5], [1.5, 0.5], [-3.5, 1.0]]),
    np.array([[5.0, 0.0], [-1.0, 2.5], [-2.0, -3.0]]),
    np.array([[4.5, -1.0], [0.0, 1.0], [-3.0, 0.5]]),
]


@pytest.mark.parametrize(("eta", "slack"), [(0.05, 0.1), (1.0, 0.0), (0.3, 0.6)])
def test_three_stages_by_hand(eta, slack):
    rule = started(step_size=eta, slack=slack)
    k_plus = k_minus = np.full((3, 2), 1 / 3)
    for stage, f in enumerate(STUDENTS, start=1):
        expected = edges(k_plus, k_minus, f, G)
        student, teacher = torch.tensor(f).float(), torch.tensor(G).float()
        verdict = rule.finish_stage(student, teacher, stage)
        failing = sum(bool(min(expected[0, j], expected[1, j]) < -slack) for j in range(2))
        assert verdict.passed == (failing == 0)
        assert verdict.metrics["failing_classes"] == failing
        assert verdict.metrics["worst_edge"] == pytest.approx(expected.min(), abs=1e-6)
        said = "holds" if failing == 0 else f"fails for {failing} classes"
        assert verdict.message == (
            f"weak learning condition {said}: smallest edge {expected.min():.3f}, allowed {0 - slack:g}"
        )
        rule.accept_stage(student, teacher, stage)
        k_plus, k_minus = updated(k_plus, k_minus, f, G, eta)
        np.testing.assert_allclose(rule.k_plus.numpy(), k_plus, rtol=1e-5)
        np.testing.assert_allclose(rule.k_minus.numpy(), k_minus, rtol=1e-5)


@pytest.mark.parametrize("index", [[0, 1, 2], [2, 0], [1], [1, 1, 2]])
@pytest.mark.parametrize(("gamma", "slack", "weight"), [(10.0, 0.1, 0.1), (0.5, 0.0, 1.0), (100.0, 1.0, 3.0)])
def test_loss_by_hand(index, gamma, slack, weight):
    rule = started(step_size=0.5, barrier=gamma, slack=slack, weight=weight)
    for stage, f in enumerate(STUDENTS[:2], start=1):
        rule.accept_stage(torch.tensor(f).float(), torch.tensor(G).float(), stage)
    k_plus, k_minus = (k.double().numpy()[index] for k in (rule.k_plus, rule.k_minus))
    f, g = STUDENTS[2][index], G[index]
    found_edges = edges(k_plus / k_plus.sum(0), k_minus / k_minus.sum(0), f, g)
    barrier = np.mean([barrier_by_definition(-(e + slack), gamma) for e in found_edges.flat])
    expected = weight * (((f - g) ** 2).mean() + barrier)
    batch = full_batch(torch.tensor(f).float(), torch.tensor(g).float(), torch.tensor(index), stage=3)
    assert rule.loss(batch).item() == pytest.approx(expected, rel=1e-4)


def test_verdicts_keep_to_the_inequalities():
    """Many problems: passed means that every weighted sum obeys them, by the definition, and not passed that one does
    not."""
    outcomes = []
    for seed, slack in itertools.product(range(40), (0.0, 0.2, 0.5, 1.0)):
        rng = np.random.default_rng(seed)
        k_plus, k_minus = rng.dirichlet(np.ones(9), 2).T, rng.dirichlet(np.ones(9), 2).T
        f, g = rng.normal(size=(2, 9, 2)) * 3
        rule = started(9, 2, slack=slack)
        rule.k_plus.copy_(torch.tensor(k_plus))
        rule.k_minus.copy_(torch.tensor(k_minus))
        verdict = rule.finish_stage(torch.tensor(f).float(), torch.tensor(g).float(), 2)
        scale = np.abs(f - g).mean(0)
        sums = [(k_plus * (f - g)).sum(0), (k_minus * (g - f)).sum(0)]
        assert verdict.passed == all((total >= -slack * scale).all() for total in sums)
        outcomes.append(verdict.passed)
    assert 20 < sum(outcomes) < 140, "both outcomes occur"


def test_without_slack_only_the_mean_passes_the_first_stage():
    teacher = torch.tensor(G).float()
    error = torch.tensor([[1.0, -2.0], [2.0, 0.0], [-3.0, 2.0]])
    assert started(slack=0.0).finish_stage(teacher + error, teacher, 1).passed
    verdict = started(slack=0.0).finish_stage(teacher + error + 0.1, teacher, 1)
    assert verdict.metrics["failing_classes"] == 2


def test_a_student_that_is_the_teacher_passes():
    teacher, rule = torch.tensor(G).float(), started(slack=0.0)
    assert rule.finish_stage(teacher, teacher, 1) == Verdict(
        True,
        {"worst_edge": 0.0, "failing_classes": 0},
        "weak learning condition holds: smallest edge 0.000, allowed 0",
    )
    student = teacher.clone().requires_grad_()
    loss = rule.loss(full_batch(student, teacher))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 10.0, 1e4, 1e15])
@pytest.mark.parametrize("eta", [0.05, 1.0])
def test_weights_stay_distributions(eta, scale):
    rule, generator = started(20, 3, step_size=eta), torch.Generator().manual_seed(0)
    for stage in range(1, 61):
        teacher = scale * torch.randn(20, 3, generator=generator)
        student = teacher + scale * torch.randn(20, 3, generator=generator).abs() * (1 if stage % 3 else -1)
        for k in (rule.k_plus, rule.k_minus):
            torch.testing.assert_close(k.sum(0), torch.ones(3))
            assert (k >= 0).all() and k.isfinite().all()
        student.requires_grad_()
        loss = rule.loss(full_batch(student[:7], teacher[:7], stage=stage))
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite() and gradient.isfinite().all()
        verdict = rule.finish_stage(student.detach(), teacher, stage)
        assert all(map(math.isfinite, verdict.metrics.values()))
        rule.accept_stage(student.detach(), teacher, stage)


def test_samples_below_the_teacher_get_more_of_k_plus():
    rule = started(4, 1, step_size=0.5)
    error = torch.tensor([[-2.0], [-0.5], [0.5], [2.0]])
    rule.accept_stage(error, torch.zeros(4, 1), 1)
    assert (rule.k_plus.diff(dim=0) < 0).all() and (rule.k_minus.diff(dim=0) > 0).all()
    assert rule.k_plus[0] > 0.25 > rule.k_plus[3]


def test_a_sample_whose_weight_vanished_comes_back():
    rule = started(2, 1, step_size=1.0)
    for error in (200.0, -300.0):  # exp(-200) is 0 in float32
        rule.accept_stage(torch.tensor([[error], [0.0]]), torch.zeros(2, 1), 1)
    assert rule.k_plus[0] > 0.99 and rule.k_minus[0] < 0.01


@pytest.mark.parametrize("gamma", [0.3, 1.0, 10.0, 200.0])
def test_log_barrier(gamma):
    junction = -1 / gamma**2
    near = junction * torch.tensor([0.999, 1.0, 1.001]).double()
    z = torch.cat([torch.linspace(-3, 3, 61), torch.tensor([0.0, -1e-9, 1e9, -1e9]), near]).double().unique()
    z.requires_grad_()
    found = log_barrier(z, gamma)
    expected = [barrier_by_definition(value, gamma) for value in z.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.double))
    (slope,) = torch.autograd.grad(found.sum(), z)
    assert (slope > 0).all() and slope.isfinite().all(), "always towards the allowed region"
    assert (found.diff() > 0).all() and (slope.diff() >= -1e-9).all(), "increasing and convex"
    sides = log_barrier(torch.tensor([junction * (1 + 1e-9), junction * (1 - 1e-9)], dtype=torch.double), gamma)
    torch.testing.assert_close(sides[0], sides[1], atol=1e-6, rtol=0)
    around = slope[torch.isin(z, near)]
    torch.testing.assert_close(around, torch.full((3,), gamma).double(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("side", ["k_plus", "k_minus"])
def test_a_violated_edge_moves_its_samples_towards_the_inequality(side):
    """All of the weight is on sample 0, which is on the wrong side: the barrier's gradient moves it alone, and more
    than the squared error does."""
    below = side == "k_plus"  # K+ weighs samples that are below the teacher and shall rise
    rule = started(3, 1, barrier=10.0, slack=0.0, weight=1.0)
    getattr(rule, side).copy_(torch.tensor([[1.0], [0.0], [0.0]]))
    error = torch.tensor([[-1.0], [1.0], [1.0]]) * (1 if below else -1)
    student = error.requires_grad_()
    (gradient,) = torch.autograd.grad(rule.loss(full_batch(student, torch.zeros(3, 1))), student)
    squared = 2 * student.detach() / 3
    assert (gradient[0] < 0) == below and gradient[0].abs() > 5 * squared[0].abs()


def test_boosting_brings_the_worst_sample_closer():
    """Students that are constant on random groups, each the minimiser of the rule's loss: with the weights' update the
    mean's largest error falls further than without it, and below the first student's."""

    def largest_errors(step_size: float) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        teacher, total, errors = 5 * torch.randn(24, 4, generator=generator), torch.zeros(24, 4), []
        rule = started(24, 4, step_size=step_size, weight=4.0)
        for stage in range(1, 8):
            groups = F.one_hot(torch.randint(4, (24,), generator=generator), 4).float()
            values = torch.linalg.lstsq(groups, teacher).solution.requires_grad_()
            # No Adam: in the first stage it starts at the minimum and makes steps of rounding errors.
            optimizer = torch.optim.SGD([values], 0.3)
            for _ in range(200):
                optimizer.zero_grad()
                rule.loss(full_batch(groups @ values, teacher, stage=stage)).backward()
                optimizer.step()
            assert values.grad is not None and values.grad.abs().max() < 1e-3
            student = (groups @ values).detach()
            rule.accept_stage(student, teacher, stage)
            total += student
            errors.append((total / stage - teacher).abs().amax(0))
        return errors

    plain, boosted = largest_errors(1e-9), largest_errors(0.3)
    torch.testing.assert_close(boosted[0], plain[0])
    assert boosted[-1].mean() < 0.9 * boosted[0].mean()
    assert (boosted[-1] < plain[-1]).all() and boosted[-1].mean() < 0.9 * plain[-1].mean()


def test_buffers_are_saved_and_loaded():
    rule = started(4, 2)
    rule.accept_stage(torch.randn(4, 2), torch.zeros(4, 2), 1)
    assert sorted(rule.state_dict()) == ["k_minus", "k_plus"] and not list(rule.parameters())
    other = started(4, 2)
    other.load_state_dict(rule.state_dict())
    assert torch.equal(other.k_plus, rule.k_plus) and torch.equal(other.k_minus, rule.k_minus)
    rule.start(4, 2)
    assert torch.equal(rule.k_plus, torch.full((4, 2), 0.25)), "another schedule starts uniform"


@pytest.mark.parametrize(
    ("kwargs", "allowed"),
    [
        ({"weight": 0}, "positive"),
        ({"weight": math.nan}, "positive"),
        ({"step_size": 0}, "above 0 and at most 1"),
        ({"step_size": 1.01}, "above 0 and at most 1"),
        ({"barrier": 0}, "positive"),
        ({"slack": -0.01}, "from 0 to 1"),
        ({"slack": 1.01}, "from 0 to 1"),
        ({"max_retries": -1}, "an integer of at least 0"),
        ({"max_retries": 0.5}, "an integer of at least 0"),
    ],
)
def test_arguments_out_of_range(kwargs, allowed):
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"bdistil: {name} must be {allowed}, got {kwargs[name]}"):
        BDistil(**kwargs)
