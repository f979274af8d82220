import io
import math
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from timm_mamba_pkd.deploy import first_students
from timm_mamba_pkd.models import (
    Agreement,
    Budget,
    Confidence,
    Depth,
    MambaPKDEnsemble,
    WeightsError,
    confidence,
    load_weights,
    save_weights,
)

POLICY = Confidence([0.9999999, 0.25], [1.0, 1.3000000000000003, 0.7], "margin")


def make(**kwargs) -> MambaPKDEnsemble:
    defaults = {"students": ["mamba_pkd_s1"] * 3, "num_classes": 5, "in_chans": 1, "img_size": 9}
    model = timm.create_model("mamba_pkd_ensemble", **(defaults | kwargs))
    assert isinstance(model, MambaPKDEnsemble)
    return model.eval()


def fitted() -> MambaPKDEnsemble:
    model = make()
    model.policy = POLICY
    return model


DROPPED = "The policy of early exit is dropped: the weights it was fitted for "


def same(policy: Confidence | None) -> bool:
    return policy is not None and repr(policy) == repr(POLICY)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_confidence_by_its_formulas(dtype):
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
    for temperature in (1.0, 0.3, 2.5):
        probs = torch.softmax(logits.double() / temperature, -1)
        ordered = probs.sort(descending=True).values
        wanted = {
            "max_prob": ordered[:, 0],
            "margin": ordered[:, 0] - ordered[:, 1],
            "entropy": 1 + torch.special.xlogy(probs, probs).sum(-1) / math.log(7),
        }
        for measure, value in wanted.items():
            found = confidence(logits, measure, temperature)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-6)


def test_confidence_at_its_ends():
    sure, unsure = torch.tensor([[1e4, 0.0, -1e4]]), torch.zeros(1, 3)
    for measure in ("max_prob", "margin", "entropy"):
        assert confidence(sure, measure).item() == 1
        assert confidence(unsure, measure).item() == pytest.approx(1 / 3 if measure == "max_prob" else 0, abs=1e-6)
        assert confidence(torch.randn(2, 1), measure).tolist() == [1, 1]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_saved_and_loaded_with_the_ensemble(suffix, tmp_path):
    """In full precision, by whichever way timm's users load weights."""
    model, path = fitted().bfloat16(), tmp_path / f"ensemble{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": model.state_dict()}, path)
    else:
        save_weights(model, path)
    assert same(make(checkpoint_path=str(path)).policy)
    loaded = make()
    load_weights(loaded, path)
    assert same(loaded.policy)
    loaded = make()
    loaded.load_state_dict(model.state_dict())
    assert same(loaded.policy)
    other = make()
    other.policy = Confidence([0.1, 0.2])
    load_weights(other, path)
    assert same(other.policy)
    parent = torch.nn.Sequential(make())
    parent.load_state_dict({f"0.{name}": tensor for name, tensor in model.state_dict().items()})
    assert same(parent[0].policy)  # pyright: ignore[reportArgumentType]


def test_hub_folder_and_first_students(tmp_path):
    model = fitted()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert same(loaded.policy)  # pyright: ignore[reportArgumentType]
    policy = first_students(model, 2, (9, 9)).policy
    assert policy is not None
    assert (policy.thresholds, policy.temperatures) == (POLICY.thresholds[:1], POLICY.temperatures[:2])


def test_weights_without_a_policy_take_it_away():
    model = fitted()
    model.load_state_dict(make().state_dict())
    assert model.policy is None


@pytest.mark.parametrize("way", ["checkpoint_path", "local-dir", "load_state_dict"])
def test_a_policy_goes_with_the_classifiers_that_it_was_fitted_for(way, tmp_path, caplog):
    """Where they start anew, for another class count, a line says so."""
    if way == "local-dir":
        save_for_hf(fitted(), str(tmp_path), safe_serialization=True)
        model: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
    else:
        save_weights(fitted(), tmp_path / "five.safetensors")
        path = str(tmp_path / "five.safetensors")
        model = make(num_classes=7, **({"checkpoint_path": path} if way == "checkpoint_path" else {}))
        if way == "load_state_dict":
            model.load_state_dict(load_file(path))
    assert model.policy is None
    assert caplog.text.count(DROPPED + "start anew") == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.reset_classifier(7),
        lambda model: model.set_combination("per_student"),
        lambda model: model.init_weights(),
        lambda model: model.train()(torch.rand(2, 1, 8, 8)),
        lambda model: model.train().student_logits(torch.rand(2, 1, 8, 8)),
        lambda model: torch.compile(model.train(), backend="eager")(torch.rand(2, 1, 8, 8)),
    ],
)
def test_a_policy_goes_with_the_weights_that_it_was_fitted_for(change, caplog):
    model = fitted()
    change(model)
    assert model.policy is None
    assert not any(name.startswith("policy") for name in model.state_dict())
    assert caplog.text.count(DROPPED) == 1
    change(model)
    assert caplog.text.count(DROPPED) == 1


def test_a_policy_stays_where_nothing_is_trained(caplog):
    """Also where the mode is set and set back."""
    model = fitted()
    model.train().eval()(torch.rand(2, 1, 8, 8))
    model.train()
    model.first(2).eval()(torch.rand(2, 1, 8, 8))
    assert same(model.policy) and DROPPED not in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy.thresholds": torch.tensor([0.5])}, "1 thresholds are for 2 students, but there are 3 temperatures"),
        ({"policy.thresholds": torch.tensor([0.5, 1.5])}, "thresholds must be numbers from 0 to 1, got 1.5"),
        ({"policy.thresholds": torch.tensor(0.5)}, "thresholds must be a list of numbers, got 0.5"),
        ({"policy.temperatures": torch.tensor([1.0, 0.0, 1.0])}, "temperatures must be numbers above 0, got 0.0"),
        ({"policy.measure": torch.tensor(3)}, "measure must be max_prob, margin or entropy, got 'number 3'"),
        ({"policy.measure": torch.tensor([1, 2])}, "it must consist of policy.thresholds"),
        ({"policy.measure": None}, "it must consist of policy.thresholds, policy.temperatures, policy.measure"),
        ({"policy.thresholds": torch.tensor([0.5]), "policy.temperatures": torch.ones(2)}, "for 2 students.* has 3"),
    ],
)
def test_damaged_policies_are_refused(change, message, tmp_path):
    state = {**fitted().state_dict(), **change}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(state, tmp_path / "damaged.safetensors")
    model = make()
    model.policy = POLICY
    with pytest.raises(WeightsError, match=f"damaged.safetensors.*{message}"):
        load_weights(model, tmp_path / "damaged.safetensors")
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(load_file(tmp_path / "damaged.safetensors"))
    assert same(model.policy)


def test_policies_survive_a_copy_and_torch_save():
    buffer = io.BytesIO()
    torch.save(fitted().policy, buffer)
    buffer.seek(0)
    assert same(torch.load(buffer, weights_only=False))


def test_numbers_in_a_tensor():
    policy = Confidence(torch.tensor([0.25, 1]), torch.tensor([1, 2, 3]))
    assert (policy.thresholds, policy.temperatures) == ((0.25, 1), (1, 2, 3))


@pytest.mark.parametrize(
    ("make_policy", "message"),
    [
        (lambda: Confidence([0.5, -0.1]), "thresholds must be numbers from 0 to 1, got -0.1"),
        (lambda: Confidence([0.5, math.nan]), "got nan"),
        (lambda: Confidence([0.5, "0.5"]), "got '0.5'"),  # pyright: ignore[reportArgumentType]
        (lambda: Confidence(0.5), "thresholds must be a list of numbers, got 0.5"),  # pyright: ignore
        (lambda: Confidence({0.5, 0.6}), "thresholds must be a list of numbers, got {0.5, 0.6}"),  # pyright: ignore
        (lambda: Confidence({0.5: 1}), "thresholds must be a list of numbers, got {0.5: 1}"),  # pyright: ignore
        (lambda: Confidence(x for x in [0.5]), "thresholds must be a list of numbers, got <gen"),  # pyright: ignore
        (lambda: Confidence(b"\0"), "thresholds must be a list of numbers, got b"),
        (lambda: Confidence(torch.tensor([[0.5]])), "thresholds must be a list of numbers, got tensor"),
        (lambda: Confidence(torch.tensor([True])), "thresholds must be numbers from 0 to 1, got True"),
        (lambda: Confidence(torch.tensor([1j])), "thresholds must be numbers from 0 to 1, got 1j"),
        (lambda: Confidence([0.5], [1.0, math.inf]), "temperatures must be numbers above 0, got inf"),
        (lambda: Confidence([0.5], [1.0]), "1 thresholds are for 2 students, but there are 1 temperatures"),
        (lambda: Confidence([0.5], measure="energy"), "measure must be max_prob, margin or entropy, got 'energy'"),
        (lambda: Agreement(0), "patience must be a whole number from 1 up, got 0"),
        (lambda: Agreement(1.5), "got 1.5"),  # pyright: ignore[reportArgumentType]
        (lambda: Depth(0), "k must be a whole number from 1 up, got 0"),
        (lambda: Budget(), "a budget is either macs or milliseconds"),
        (lambda: Budget(macs=1, milliseconds=1), "a budget is either macs or milliseconds"),
        (lambda: Budget(macs=0), "a budget must be a number above 0, got 0"),
        (lambda: Budget(milliseconds=math.nan), "got nan"),
        (lambda: Budget(macs=10**400), "a budget must be a number above 0, got 1000"),
        (lambda: Confidence([0.5]).first(3), "k must be a whole number from 1 to 2, got 3"),
        (lambda: Confidence([0.5]).first(0), "k must be a whole number from 1 to 2, got 0"),
    ],
)
def test_bad_arguments(make_policy, message):
    with pytest.raises(ValueError, match=message):
        make_policy()
