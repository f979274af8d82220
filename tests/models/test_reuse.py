"""Students that reuse the features of earlier ones."""

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from timm_mamba_pkd.models import STUDENTS, MambaPKDEnsemble, WeightsError, count_macs, load_weights, save_weights
from timm_mamba_pkd.models.reuse import Reuse
from timm_mamba_pkd.report import count_params

NAMES = ["mamba_pkd_s1", "mamba_pkd_s2", "mamba_pkd_s1", "mamba_pkd_s3"]
SIZE = 9


def make(students: Any = tuple(NAMES), **kwargs: Any) -> MambaPKDEnsemble:
    defaults: dict[str, Any] = {"num_classes": 5, "in_chans": 1, "img_size": SIZE}
    model = timm.create_model("mamba_pkd_ensemble", students=students, **(defaults | kwargs))
    assert isinstance(model, MambaPKDEnsemble)
    return model.eval()


@torch.no_grad()
def connected(**kwargs: Any) -> MambaPKDEnsemble:
    """Student 2 reuses one student, student 4 the two before it; the connections are trained (here: drawn)."""
    torch.manual_seed(0)
    model = make(**kwargs)
    model.connect(1, 1)
    model.connect(3, 2)
    for parameter in model.reuse.parameters():
        nn.init.normal_(parameter, std=0.2)
    for student in model.students:
        nn.init.normal_(student.head.fc.weight)
    return model


def logits_by_hand(model: MambaPKDEnsemble, x: Tensor) -> list[Tensor]:
    """Of every student, computed forwards one after the other."""
    features: list[list[Tensor]] = []
    logits = []
    for i, student in enumerate(model.students):
        own: Any = dict(model.reuse.items()).get(str(i))
        y, mine = student.stem(x), []
        for s, stage in enumerate(student.stages):
            y = stage(y)
            if own is not None:
                channels = torch.cat([features[j][s] for j in range(i - own.num_sources, i)], 1)
                y = y + torch.einsum("oc,bchw->bohw", own.projections[s].weight[:, :, 0, 0], channels)
            mine.append(y)
        features.append(mine)
        logits.append(student.head(student.norm(y)))
    return logits


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_connection_starts_as_none(x):
    model = make()
    before = model(x), list(model.run(x))
    model.connect(1, 1)
    model.connect(3, 3)
    torch.testing.assert_close(model(x), before[0], rtol=0, atol=0)
    torch.testing.assert_close(list(model.run(x)), before[1], rtol=0, atol=0)


def test_more_connections_keep_those_there_are(x):
    model = connected()
    before = model(x)
    model.connect(3, 3)
    torch.testing.assert_close(model(x), before)
    next(model.reuse["3"].parameters()).data[:, 0] += 1  # of the farthest student
    assert not torch.allclose(model(x), before)


def test_connections_to_as_many_are_those_there_are(x):
    model = connected()
    before = model(x)
    for position, own in enumerate(model.connections()):
        if own is not None:
            model.connect(position, own.num_sources)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_a_connection_learns(x):
    model = make()
    model.connect(1, 1)
    model(x).square().sum().backward()
    gradients = [parameter.grad for parameter in model.reuse.parameters()]
    assert len(gradients) == 3 and all(gradient is not None and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("combination", ["mean", "per_class"])
@torch.no_grad()
def test_all_ways_to_an_answer_agree(x, combination):
    model = connected(combination=combination)
    expected = logits_by_hand(model, x)
    assert not torch.allclose(expected[1], model.students[1](x), atol=1e-2)
    for i in range(4):
        torch.testing.assert_close(model.alone(i)(x), expected[i])
    for k in (1, 2, 3, 4):
        model.set_active(k)
        mean = torch.stack(expected[:k]).mean(0)
        torch.testing.assert_close(model(x), mean)
        torch.testing.assert_close(model.first(k)(x), mean)
        torch.testing.assert_close(dict(model.anytime(x))[k], mean)
        torch.testing.assert_close(model.student_logits(x), torch.stack(expected[:k]))


@pytest.mark.parametrize("positions", [[3], [1, 2], [0, 3], [1, 3]])
@torch.no_grad()
def test_subsets_run_what_they_need(x, positions):
    model = connected()
    expected = logits_by_hand(model, x)
    model.set_active(positions)
    torch.testing.assert_close(model.student_logits(x), torch.stack([expected[i] for i in positions]))
    torch.testing.assert_close(model(x), torch.stack([expected[i] for i in positions]).mean(0))


@pytest.mark.parametrize(
    ("positions", "stems", "heads"),
    [
        (range(4), [0, 1, 2, 3], [0, 1, 2, 3]),
        ([3], [0, 1, 2, 3], [3]),  # 4 reuses 2 and 3, and 2 reuses 1
        ([1], [0, 1], [1]),
        ([0, 2], [0, 2], [0, 2]),
        ([1, 3], [0, 1, 2, 3], [1, 3]),
    ],
)
@torch.no_grad()
def test_features_are_computed_once(x, positions, stems, heads):
    model, ran = connected(), {"stem": [], "head": []}
    for i, student in enumerate(model.students):
        for part, seen in ran.items():
            getattr(student, part).register_forward_hook(lambda *args, i=i, seen=seen: seen.append(i))
    model.set_active(positions)
    model(x)
    assert {part: sorted(seen) for part, seen in ran.items()} == {"stem": stems, "head": heads}


def test_anytime_does_not_run_ahead(x):
    model, ran = connected(), []
    for i, student in enumerate(model.students):
        student.stem.register_forward_hook(lambda *args, i=i: ran.append(i))
    answers = model.anytime(x)
    for k in (1, 2, 3):
        next(answers)
        assert ran == list(range(k))


def test_macs_grow_by_the_convolutions():
    model, shape = connected(), (1, SIZE, SIZE)
    dims = [STUDENTS[name].dims for name in NAMES]
    pixels = [math.ceil(SIZE / 2**s) ** 2 for s in (1, 2, 3)]
    students = [count_macs(student, shape) for student in make().students]
    convolutions = [0, 0, 0, 0]
    convolutions[1] = sum(n * dims[0][s] * dims[1][s] for s, n in enumerate(pixels))
    convolutions[3] = sum(n * (dims[1][s] + dims[2][s]) * dims[3][s] for s, n in enumerate(pixels))
    for k in (1, 2, 3, 4):
        assert count_macs(model.first(k), shape) == sum(students[:k]) + sum(convolutions[:k])
    heads = [dim[-1] * 5 for dim in dims]
    assert count_macs(model.alone(2), shape) == students[2]
    assert count_macs(model.alone(1), shape) == students[0] - heads[0] + students[1] + convolutions[1]
    assert count_macs(model.alone(3), shape) == sum(students) - sum(heads[:3]) + sum(convolutions)


def test_parameters_of_a_student_alone_are_those_it_needs():
    model = make()
    model.connect(2, 1)
    needed = (model.students[1], model.students[2], model.reuse["2"])
    assert count_params(model.alone(2)) == sum(count_params(part) for part in needed)
    assert count_params(model.first(3)) == count_params(model) - count_params(model.students[3])


@pytest.mark.parametrize("had", ["nothing", "the same", "others"])
@pytest.mark.parametrize("how", ["load_state_dict", "load_weights", "checkpoint_path", "deepcopy"])
@torch.no_grad()
def test_connections_travel_with_the_state_dict(tmp_path, x, how, had):
    source = connected()
    source.set_active(4)
    path = tmp_path / "w.safetensors"
    save_weights(source, path)
    loaded = make(students=NAMES)
    if had != "nothing":
        loaded.connect(1, 1)
        loaded.connect(3, 2 if had == "the same" else 1)
    held = dict(loaded.named_parameters())
    if how == "load_state_dict":
        loaded.load_state_dict(source.state_dict())
    elif how == "load_weights":
        load_weights(loaded, path)
    else:
        loaded = make(checkpoint_path=str(path)) if how == "checkpoint_path" else copy.deepcopy(source)
    assert [own and own.num_sources for own in loaded.connections()] == [None, 1, None, 2]
    torch.testing.assert_close(loaded(x), source(x), rtol=0, atol=0)
    if how.startswith("load") and had == "the same":
        assert all(held[name] is parameter for name, parameter in loaded.named_parameters()), "an optimizer has them"


def test_copies_share_nothing(x):
    model = connected()
    duplicate, before = copy.deepcopy(model), model(x).detach()
    for parameter in duplicate.reuse.parameters():
        nn.init.ones_(parameter)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert not torch.allclose(duplicate(x), before)


def test_a_single_student_with_its_sources_round_trips(tmp_path, x):
    model = connected()
    save_weights(model.alone(3), tmp_path / "w.safetensors")
    other = connected()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    load_weights(other.alone(3), tmp_path / "w.safetensors")
    torch.testing.assert_close(other.alone(3)(x), model.alone(3)(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "students", [NAMES[:3], [*NAMES[:3], "mamba_pkd_s2"], ["mamba_pkd_s1", "resnet18", "mamba_pkd_s1", "mamba_pkd_s3"]]
)
def test_connections_of_another_ensemble_are_refused(tmp_path, students):
    """All or none: what the model had stays, its connections included."""
    save_weights(connected(), tmp_path / "w.safetensors")
    model = make(students)
    if "resnet18" not in students:
        model.connect(2, 2)
        for parameter in model.reuse.parameters():
            nn.init.ones_(parameter)  # pyright: ignore[reportArgumentType]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match="of another model than MambaPKDEnsemble"):
        load_weights(model, tmp_path / "w.safetensors")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("position", "sources", "message"),
    [
        (0, 1, "student 1 has 0 before it, so it cannot reuse 1"),
        (1, 2, "student 2 has 1 before it, so it cannot reuse 2"),
        (1, 0, "student 2 has 1 before it, so it cannot reuse 0"),
        (1, -1, "student 2 has 1 before it, so it cannot reuse -1"),
        (4, 1, "student 5 has 4 before it, so it cannot reuse 1"),
    ],
)
def test_no_such_connection(position, sources, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        model.connect(position, sources)
    assert not model.reuse


@pytest.mark.parametrize(("position", "sources"), [(1, 1), (2, 1), (3, 2)])
def test_only_our_students_reuse(position, sources):
    model = make(["mamba_pkd_s1", "test_vit", "mamba_pkd_s1", "mamba_pkd_s1"], img_size=32, device="meta")
    with pytest.raises(ValueError, match=r"only mamba_pkd_s1, .* can reuse features, not .*test_vit"):
        model.connect(position, sources)
    model.connect(3, 1)


def test_connections_are_on_the_students_device_and_dtype():
    model = make(device="meta", dtype=torch.float64)
    model.connect(2, 1)
    reuse = model.connections()[2]
    assert isinstance(reuse, Reuse)
    assert {(p.device.type, p.dtype) for p in reuse.parameters()} == {("meta", torch.float64)}
