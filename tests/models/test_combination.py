"""How the students' logits become one prediction, and the weights fitted for it."""

from typing import Any

import numpy as np
import pytest
import scipy.optimize
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from timm_mamba_pkd.models import MambaPKDEnsemble, WeightsError, load_weights, save_weights
from timm_mamba_pkd.models.combination import COMBINATIONS, combine, fit_weights, uniform_weights

NAMES = ["mamba_pkd_s1", "mamba_pkd_s2", "mamba_pkd_s1"]
WEIGHTED = COMBINATIONS[1:]


def make(combination: str = "mean", num_classes: int = 4, **kwargs: Any) -> MambaPKDEnsemble:
    model = timm.create_model(
        "mamba_pkd_ensemble", students=NAMES, num_classes=num_classes, in_chans=1, combination=combination, **kwargs
    )
    assert isinstance(model, MambaPKDEnsemble)
    return model.eval()


def fitted(combination: str, seed: int = 0) -> MambaPKDEnsemble:
    """An ensemble whose weights are no mean, and whose logits are far from 0."""
    torch.manual_seed(seed)
    model = make(combination)
    for student in model.students:
        torch.nn.init.normal_(student.head.fc.weight)
    if model.weights is not None:
        model.weights *= torch.rand_like(model.weights) + 0.5
    return model


def by_hand(alone: list[Tensor], weights: Tensor | None, k: int) -> Tensor:
    """Of the first k students, by loops."""
    total = torch.zeros_like(alone[0])
    for t in range(k):
        for c in range(total.shape[1]):
            weight = 1 / k if weights is None else weights[k - 1, t] if weights.ndim == 2 else weights[k - 1, t, c]
            total[:, c] += weight * alone[t][:, c]
    return total


def penalised(logits: Tensor, targets: Tensor, weights: Tensor, penalty: float) -> Tensor:
    """The objective as its docstring states it, over the number of samples; weights (k,) or (k, C)."""
    k = len(logits)
    combined: Any = sum(weights[t] * logits[t] for t in range(k))
    total = F.cross_entropy(combined, targets, reduction="sum") + penalty * ((k * weights - 1) ** 2).mean()
    return total / len(targets)


def problem(k: int = 3, n: int = 40, c: int = 4, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(c, (n,), generator=generator)
    logits = scale * torch.randn(k, n, c, generator=generator, dtype=torch.double)
    skill = torch.linspace(0.2, 1.5, k)[:, None, None]
    return logits + scale * skill * F.one_hot(targets, c), targets


@pytest.mark.parametrize("combination", WEIGHTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_weights_are_the_running_mean(combination, dtype):
    logits = torch.randn(5, 6, 4, dtype=dtype)
    weights = uniform_weights(5, 4, combination)
    assert weights is not None and weights.dtype == torch.float32
    for k in (1, 3, 5):
        found = combine(logits[:k], weights)
        assert found.dtype == dtype
        expected = torch.stack([logits[: t + 1].mean(0) for t in range(k)])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found, combine(logits[:k], None), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("combination", COMBINATIONS)
@torch.no_grad()
def test_all_ways_to_an_answer_agree(combination):
    model, x = fitted(combination), torch.randn(2, 1, 9, 9)
    alone = [student(x) for student in model.students]
    for k in (1, 2, 3):
        model.set_active(k)
        expected = by_hand(alone, model.weights, k)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model.first(k)(x), expected)
        torch.testing.assert_close(model.alone(k - 1)(x), alone[k - 1])
        torch.testing.assert_close(model.student_logits(x), torch.stack(alone[:k]))
        torch.testing.assert_close(model.combine(torch.stack(alone[:k]))[-1], expected)
        for j, answer in model.anytime(x):
            torch.testing.assert_close(answer, by_hand(alone, model.weights, j))


@pytest.mark.parametrize("combination", COMBINATIONS)
@torch.no_grad()
def test_the_first_students_weights_are_not_used_for_others(combination):
    model, x = fitted(combination), torch.randn(2, 1, 9, 9)
    alone = [student(x) for student in model.students]
    model.set_active([1, 2])
    torch.testing.assert_close(model(x), (alone[1] + alone[2]) / 2)
    answers = dict(model.anytime(x))
    torch.testing.assert_close(answers[1], alone[1])
    torch.testing.assert_close(answers[2], model(x))
    model.set_active([0, 1])
    torch.testing.assert_close(model(x), by_hand(alone, model.weights, 2))


@pytest.mark.parametrize("penalty", [0.4, 4.0, 40.0])
@pytest.mark.parametrize("per_class", [False, True])
def test_fit_is_the_optimum_that_scipy_finds(per_class, penalty):
    logits, targets = problem()
    shape = (3, 4) if per_class else (3,)

    def objective(flat: np.ndarray) -> float:
        return penalised(logits, targets, torch.from_numpy(flat).view(shape), penalty).item()

    start = np.full(int(np.prod(shape)), 1 / 3)
    best = scipy.optimize.minimize(objective, start, method="BFGS", options={"gtol": 1e-8})
    found = fit_weights(logits, targets, per_class, penalty)
    assert found.shape == shape and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.double(), torch.from_numpy(best.x).view(shape), atol=1e-4, rtol=0)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("penalty", [4e-5, 4.0])
def test_no_gradient_is_left_and_the_mean_is_not_better(k, per_class, scale, penalty):
    logits, targets = problem(k=k, scale=scale, seed=k)
    found = fit_weights(logits, targets, per_class, penalty).double().requires_grad_()
    loss = penalised(logits, targets, found, penalty)
    mean = penalised(logits, targets, torch.full(found.shape, 1 / k, dtype=torch.double), penalty)
    assert loss <= mean * (1 + 1e-6) + 1e-9  # the weights are rounded to float32
    (gradient,) = torch.autograd.grad(loss, found)
    if scale <= 10:  # beyond it a rounded weight alone makes a gradient
        assert gradient.abs().max() < 1e-4 * max(1, scale)


@pytest.mark.parametrize("per_class", [False, True])
def test_a_student_that_knows_gets_the_weight(per_class):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(3, (300,), generator=generator)
    noise = torch.randn(2, 300, 3, generator=generator)
    logits = torch.stack([noise[0], 3.0 * F.one_hot(targets, 3), noise[1]])
    weights = fit_weights(logits, targets, per_class, penalty=1e-4).view(3, -1)
    assert (weights[1] > 1).all()
    assert (weights[[0, 2]].abs() < 0.3 * weights[1]).all()


@pytest.mark.parametrize("per_class", [False, True])
def test_a_strong_penalty_leaves_the_mean(per_class):
    logits, targets = problem(k=4)
    weights = fit_weights(logits, targets, per_class, penalty=1e6)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 4), atol=1e-4, rtol=0)


def test_fit_per_class_can_do_what_one_weight_cannot():
    """Student 1 knows class 0 and says nothing of the others, student 2 the other way round, and each is loudly wrong
    elsewhere."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(300) % 2
    truth, noise = 2.0 * F.one_hot(targets, 2), 3 * torch.randn(2, 300, 2, generator=generator)
    logits = noise.clone()
    logits[0, :, 0], logits[1, :, 1] = truth[:, 0], truth[:, 1]
    one, each = (fit_weights(logits, targets, per_class, 1e-3).double() for per_class in (False, True))
    losses = [penalised(logits.double(), targets, weights, 0).item() for weights in (one, each)]
    assert losses[1] < 0.5 * losses[0]


def test_fit_works_where_gradients_are_off_and_leaves_none():
    logits, targets = problem()
    logits.requires_grad_()
    with torch.no_grad():
        quiet = fit_weights(logits, targets, per_class=False)
    torch.testing.assert_close(fit_weights(logits, targets, per_class=False), quiet, rtol=0, atol=0)
    assert logits.grad is None


@pytest.mark.parametrize("how", ["load_state_dict", "load_weights", "checkpoint_path"])
@pytest.mark.parametrize("own", COMBINATIONS)
@pytest.mark.parametrize("combination", COMBINATIONS)
@torch.no_grad()
def test_weights_travel_with_the_state_dict(tmp_path, combination, own, how):
    source, x = fitted(combination), torch.randn(2, 1, 9, 9)
    path = tmp_path / "w.safetensors"
    save_weights(source, path)
    if how == "checkpoint_path":
        loaded = make(own, checkpoint_path=str(path))
    else:
        loaded = fitted(own, seed=1)  # what it had fitted for other students goes
        load_weights(loaded, path) if how == "load_weights" else loaded.load_state_dict(source.state_dict())
    torch.testing.assert_close(loaded(x), source(x))
    for k in (1, 2, 3):
        torch.testing.assert_close(loaded.first(k)(x), source.first(k)(x))
    if source.weights is None:
        expected = uniform_weights(3, 4, own)
        assert (expected is None) == (loaded.weights is None)
        torch.testing.assert_close(loaded.weights, expected, rtol=0, atol=0)
    else:
        torch.testing.assert_close(loaded.weights, source.weights, rtol=0, atol=0)
    assert ("weights" in source.state_dict()) == (combination != "mean")


@pytest.mark.parametrize("combination", WEIGHTED)
def test_weights_of_another_size_are_refused(tmp_path, combination):
    """Nothing of them stays."""
    save_weights(make(combination, num_classes=5), tmp_path / "w.safetensors")
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"of another model than MambaPKDEnsemble: shape of .*head.fc"):
        load_weights(model, tmp_path / "w.safetensors")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert model.weights is None


@pytest.mark.parametrize("combination", WEIGHTED)
def test_reset_classifier_starts_from_the_mean(combination):
    model, x = fitted(combination), torch.randn(2, 1, 9, 9)
    model.reset_classifier(6)
    assert model(x).shape == (2, 6)
    torch.testing.assert_close(model(x), torch.stack([student(x) for student in model.students]).mean(0))


@pytest.mark.parametrize("name", ["mena", "", "per-class"])
def test_unknown_combination(name):
    with pytest.raises(ValueError, match="combination must be mean, per_student or per_class, got"):
        make(name)
