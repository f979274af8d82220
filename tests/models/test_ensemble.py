import copy
import fnmatch
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from timm_mamba_pkd.deploy import first_students
from timm_mamba_pkd.models import STUDENTS, MambaPKDEnsemble, load_weights, save_weights

NAMES = ["mamba_pkd_s1", "mamba_pkd_s2", "mamba_pkd_s1"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(students=tuple(NAMES), **kwargs) -> MambaPKDEnsemble:
    model = timm.create_model("mamba_pkd_ensemble", students=students, **{"num_classes": 5, **kwargs})
    assert isinstance(model, MambaPKDEnsemble)
    return model.eval()


@pytest.fixture(scope="module")
def ensemble() -> MambaPKDEnsemble:
    torch.manual_seed(0)
    model = make(in_chans=1, img_size=9)
    for student in model.students:
        nn.init.normal_(student.head.fc.weight)
    return model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 1, 9, 9)


@torch.no_grad()
def test_prediction_is_the_mean_of_the_active_students(ensemble, x):
    alone = [student(x) for student in ensemble.students]
    assert not torch.allclose(alone[0], alone[2]), "the same architecture, initialised twice"
    ensemble.set_active(3)
    anytime = dict(ensemble.anytime(x))
    assert list(anytime) == [1, 2, 3]
    torch.testing.assert_close(ensemble.student_logits(x), torch.stack(alone))
    combined = ensemble.combine(torch.stack(alone))
    for k in (1, 2, 3):
        ensemble.set_active(k)
        mean = sum(alone[:k]) / k
        torch.testing.assert_close(ensemble(x), mean)
        torch.testing.assert_close(anytime[k], ensemble(x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(combined[k - 1], mean)
        assert len(ensemble.student_logits(x)) == len(list(ensemble.anytime(x))) == k


@pytest.mark.parametrize("wrong", [[1.0], torch.zeros(2, 5, 8, 8), torch.zeros(0, 3, 8, 8)])
def test_anytime_refuses_what_is_no_image(ensemble, wrong):
    with pytest.raises(ValueError, match="images must be a tensor"):
        ensemble.anytime(wrong)


def test_anytime_does_not_run_ahead(ensemble, x):
    ensemble.set_active(3)
    calls = []
    hooks = [
        student.register_forward_hook(lambda *args, i=i: calls.append(i)) for i, student in enumerate(ensemble.students)
    ]
    answers = ensemble.anytime(x)
    next(answers)
    assert calls == [0]
    next(answers)
    assert calls == [0, 1]
    calls.clear()
    ensemble.set_active(2)
    ensemble(x)
    assert calls == [0, 1]
    for hook in hooks:
        hook.remove()


def test_waiting_students_get_no_gradient(x):
    model = make(in_chans=1)
    model.set_active(2)
    model(x).square().sum().backward()
    has_gradient = [{p.grad is not None for p in student.parameters()} for student in model.students]
    assert has_gradient == [{True}, {True}, {False}]


def test_combine_of_given_numbers(ensemble):
    logits = torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]], [[-1.0, 1.0]]])
    torch.testing.assert_close(ensemble.combine(logits), torch.tensor([[[1.0, 2.0]], [[2.0, 4.0]], [[1.0, 3.0]]]))


@pytest.mark.parametrize("k", [0, 4, -1, 2.5, True])
def test_k_out_of_range(ensemble, k):
    ensemble.set_active(2)
    for function in (ensemble.set_active, ensemble.first, lambda k: first_students(ensemble, k, (9, 9))):
        with pytest.raises(ValueError, match=f"k must be a whole number from 1 to 3, got {k}"):
            function(k)
    assert ensemble.num_active == 2


@pytest.mark.parametrize("positions", [[], [3], [0, -1], [0, 1.5], [True], "0"])
def test_bad_positions(ensemble, positions):
    ensemble.set_active(2)
    with pytest.raises(ValueError, match="active students must be positions from 0 to 2, got "):
        ensemble.set_active(positions)
    assert ensemble.active_positions == [0, 1]


def test_checkpoints_keep_the_number_of_active_students(ensemble, x, tmp_path):
    ensemble.set_active(2)
    assert ensemble.state_dict()["active"].tolist() == [True, True, False]
    loaded = make(in_chans=1)
    assert loaded.num_active == 3
    loaded.load_state_dict(ensemble.state_dict())
    save_weights(ensemble, tmp_path / "ensemble.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["ensemble.safetensors"]
    read, created = make(in_chans=1), make(in_chans=1, checkpoint_path=str(tmp_path / "ensemble.safetensors"))
    load_weights(read, tmp_path / "ensemble.safetensors")
    for model in (loaded, read, created, copy.deepcopy(ensemble)):
        assert model.num_active == 2
        torch.testing.assert_close(model(x), ensemble(x), rtol=0, atol=0)


def test_copy_is_independent(ensemble, x):
    ensemble.set_active(3)
    before = ensemble(x)
    duplicate = copy.deepcopy(ensemble)
    assert duplicate.no_weight_decay() == ensemble.no_weight_decay()
    duplicate.set_active(1)
    duplicate.students[0].init_weights()
    torch.testing.assert_close(ensemble(x), before, rtol=0, atol=0)


def test_arguments_reach_the_students():
    model = make(["mamba_pkd_s1", "mamba_pkd_s2"], in_chans=4, img_size=(28, 20), drop_rate=0.2, drop_path_rate=0.1)
    assert model.names == ("mamba_pkd_s1", "mamba_pkd_s2")
    assert (model.num_classes, model.in_chans) == (5, 4)
    for student in model.students:
        assert (student.num_classes, student.in_chans, student.img_size) == (5, 4, (28, 20))
        assert student.head.drop.p == 0.2
        assert max(getattr(module, "drop_prob", 0) for module in student.modules()) == pytest.approx(0.1)
    assert model(torch.randn(1, 4, 28, 20)).shape == (1, 5)


def test_default_is_all_students_in_order():
    model = timm.create_model("mamba_pkd_ensemble", device="meta", dtype=torch.float64)
    assert isinstance(model, MambaPKDEnsemble)
    assert model.names == tuple(STUDENTS)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model.active.dtype == torch.bool
    sizes = [sum(p.numel() for p in student.parameters()) for student in model.students]
    assert sizes == sorted(sizes)


def test_weights_go_onto_a_model_made_on_the_meta_device(ensemble, x):
    model = make(in_chans=1, device="meta")
    ensemble.set_active(2)
    model.load_state_dict(ensemble.state_dict(), assign=True)
    torch.testing.assert_close(model(x), ensemble(x), rtol=0, atol=0)


def test_active_students_come_with_the_state_dict_and_need_no_values():
    model, other = make(), make(device="meta")
    model.set_active([0, 2])
    other.load_state_dict(model.state_dict(), assign=True)
    assert other.active_positions == copy.deepcopy(other).active_positions == [0, 2]
    blank = make(device="meta")
    blank.set_active(2)
    assert blank(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 5)
    assert not blank.first(1).training and blank.train().first(1).training


def test_registry():
    assert timm.list_models(module="ensemble") == ["mamba_pkd_ensemble"]
    cfg: Any = make(device="meta").default_cfg
    assert cfg["input_size"] == (3, 32, 32)
    assert not cfg["first_conv"]
    assert not cfg["classifier"]
    with pytest.raises(TypeError, match="not_a_model_arg"):
        make(not_a_model_arg=1)


def test_reset_classifier(x):
    model = make(in_chans=1)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(x).shape == (2, 7)
    assert [fc.out_features for fc in model.get_classifier()] == [7, 7, 7]
    assert {id(p) for p in model.get_classifier().parameters()} < {id(p) for p in model.parameters()}
    model.reset_classifier(3, "max")
    assert {student.head.global_pool.pool_type for student in model.students} == {"max"}


def test_names_kept_from_decay_exist():
    model = make()
    names = {name for name, _ in model.named_parameters()}
    assert len(model.no_weight_decay()) == 3 * (2 + 3 + 2)
    assert model.no_weight_decay() < names


def test_grad_checkpointing_reaches_the_students():
    model = make()
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        assert {stage.grad_checkpointing for student in model.students for stage in student.stages} == {enable}


def test_other_timm_models_may_be_members():
    names = ["mamba_pkd_s1", "resnet18", "test_vit"]
    model = make(names, drop_path_rate=0.1, drop_rate=0.1, img_size=32)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), sum(student(x) for student in model.students) / 3)
    model.set_grad_checkpointing()
    model.reset_classifier(4)
    assert model(x).shape == (2, 4)
    parameters = [name for name, _ in model.named_parameters()]
    kept = model.no_weight_decay()
    assert "students.2.pos_embed" in kept
    assert "students.0.stages.1.blocks.0.mixer.A_log" in kept
    assert any(fnmatch.fnmatch(name, pattern) for name in parameters for pattern in kept)


def test_member_without_drop_paths():
    names = ["mamba_pkd_s1", "vgg11"]
    assert len(make(names, device="meta", drop_rate=0.1).students) == 2
    with pytest.raises(TypeError, match="drop_path_rate"):
        make(names, device="meta", drop_path_rate=0.1)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"students": []}, r"students must be a list of at least one model name, got \[\]"),
        ({"students": "mamba_pkd_s1"}, "students must be a list of at least one model name, got 'mamba_pkd_s1'"),
        ({"students": 3}, "students must be a list of at least one model name, got 3"),
        ({"students": [1]}, r"students must be a list of at least one model name, got \[1\]"),
        ({"students": ["mamba_pkd_s1", "mamba_pkd_ensemble"]}, "mamba_pkd_ensemble cannot be a student itself"),
        ({"students": ["resnet18"], "global_pool": ""}, "global_pool must be a pooling of the students, .*, got ''"),
        ({"students": ["resnet18"], "drop_rate": "a"}, "drop_rate must be a number from 0 to below 1, got 'a'"),
        ({"students": ["resnet18"], "dtype": torch.int64}, "dtype must be torch.float32, .*, got torch.int64"),
        (
            {"students": ["mamba_pkd_s1", "mamba_s9"]},
            "unknown student 'mamba_s9'; ours are mamba_pkd_s1, .*mamba_pkd_s7",
        ),
        ({"img_size": 7}, "img_size must be at least 8"),
        ({"in_chans": 0}, "in_chans must be a whole number from 1 up, got 0"),
        ({"num_classes": -1}, "num_classes must be a whole number from 1 up, got -1"),
    ],
)
def test_bad_arguments(argument, message):
    with pytest.raises(ValueError, match=message):
        make(**argument)


def test_features_only():
    with pytest.raises(RuntimeError, match="features_only not implemented for mamba_pkd_ensemble"):
        make(features_only=True)


def test_init_weights_is_complete_and_reproducible():
    model = make(["mamba_pkd_s1"] * 3, combination="per_student")
    model.connect(2, 1)
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        model.init_weights()
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert all(tensor.isfinite().all() for tensor in states[0].values())
    assert model.num_active == 3
    assert model.weights is not None and model.weights[1].tolist() == [0.5, 0.5, 0]
    assert not any(parameter.any() for parameter in model.reuse.parameters())


def test_local_dir_round_trip_follows_later_changes(tmp_path):
    """Class count, pooling, image size, combination, connections, and a student of timm."""
    model = make(["mamba_pkd_s1", "mamba_pkd_s1", "test_resnet"], in_chans=1)
    model.reset_classifier(3, "max")
    model.set_input_size((20, 28))
    model.set_combination("per_class")
    model.connect(1, 1)
    model.set_active(2)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    restored: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert restored.students[1].img_size == restored.img_size == (20, 28)
    torch.testing.assert_close(restored.state_dict(), model.state_dict(), rtol=0, atol=0)
    x = torch.randn(2, 1, 20, 28)
    torch.testing.assert_close(restored(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("combination", ["mean", "per_student", "per_class"])
def test_fx(combination):
    model = make(combination=combination)
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
