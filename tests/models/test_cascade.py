"""`MambaPKDEnsemble.predict`: the same as running everything and looking up where each image would have left."""

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from timm_mamba_pkd.models import Agreement, Budget, Confidence, Depth, MambaPKDEnsemble, Prediction, count_macs
from timm_mamba_pkd.models.cascade import padded
from timm_mamba_pkd.models.policies import Policy

NAMES = ("mamba_pkd_s1", "mamba_pkd_s2", "mamba_pkd_s1", "mamba_pkd_s3")
COUNT = len(NAMES)
SIZE = (1, 9, 9)
BATCHES = (1, 2, 255, 256)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@torch.no_grad()
def make(reuse: bool = False, combination: str = "mean", **kwargs: Any) -> MambaPKDEnsemble:
    """Students that are sure of different images."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"num_classes": 5, "in_chans": 1, "img_size": SIZE[1:]}
    model = timm.create_model("mamba_pkd_ensemble", students=NAMES, combination=combination, **(defaults | kwargs))
    assert isinstance(model, MambaPKDEnsemble)
    for student in model.students:
        nn.init.normal_(student.head.fc.weight, std=0.5)
    if model.weights is not None:
        model.weights *= 1 + torch.rand_like(model.weights)
    if reuse:
        model.connect(1, 1)
        model.connect(3, 2)
        for parameter in model.reuse.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def images(count: int, size: tuple[int, int, int] = SIZE) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def everything(model: MambaPKDEnsemble, x: Tensor) -> Tensor:
    """Ensemble logits (N, B, C) after each student, each of whom sees the whole batch."""
    return model.combine(model.student_logits(x))


def assert_is(found: Prediction, students: Tensor, logits: Tensor, step_macs: list[int]) -> list[int]:
    """``found`` is what ``logits`` (N, B, C) hold after so many ``students``, (B,); returns what sizes that took."""
    assert found.students.dtype == torch.int64 and found.students.tolist() == students.tolist()
    torch.testing.assert_close(found.logits, logits[students - 1, torch.arange(len(students))], rtol=1e-4, atol=1e-5)
    sizes = [len(students)]
    for k in range(1, int(students.max())):
        sizes.append(min(padded(int((students > k).sum())), sizes[-1]))
    assert found.macs == sum(size * macs for size, macs in zip(sizes, step_macs, strict=False))
    return sizes


def by_hand(policy: Any, logits: Tensor) -> Tensor:
    """After how many students each image leaves, from logits (N, B, C), by the policy's definition."""
    count, found = len(logits), []
    for i in range(logits.shape[1]):
        k = 1
        while k < count:
            if isinstance(policy, Depth):
                leaves = k == policy.k
            elif isinstance(policy, Agreement):
                classes = [int(logits[j, i].argmax()) for j in range(k)]
                leaves = k > policy.patience and len(set(classes[k - policy.patience - 1 :])) == 1
            else:
                scaled = (logits[k - 1, i].double() / policy.temperatures[k - 1]).softmax(-1).sort().values
                entropy = -sum(p * p.log() for p in scaled) / torch.tensor(len(scaled)).log()
                sure = {"max_prob": scaled[-1], "margin": scaled[-1] - scaled[-2], "entropy": 1 - entropy}
                leaves = sure[policy.measure] > policy.thresholds[k - 1]
            if leaves:
                break
            k += 1
        found.append(k)
    return torch.tensor(found)


POLICIES = {
    "one student": Depth(1),
    "three students": Depth(3),
    "all students": Depth(COUNT),
    "patience 1": Agreement(),
    "patience 2": Agreement(2),
    "patience of more than all": Agreement(9),
    "largest probability": Confidence([0.6, 0.5, 0.55]),
    "margin, tempered": Confidence([0.4, 0.2, 0.25], [0.5, 1.0, 2.0, 1.0], "margin"),
    "entropy, tempered": Confidence([0.3, 0.35, 0.2], [1.5, 1.0, 0.7, 1.0], "entropy"),
    "all leave at the first": Confidence([0.0, 0.0, 0.0]),
    "none leaves before the last": Confidence([1.0, 1.0, 1.0]),
    "all leave at the third": Confidence([1.0, 1.0, 0.0]),
}


@pytest.mark.parametrize("reuse", [False, True], ids=["apart", "reuse"])
@pytest.mark.parametrize("batch", BATCHES)
def test_is_full_execution_and_a_look_up(batch, reuse):
    model, x = make(reuse), images(batch)
    logits, macs = everything(model, x), model.step_macs(SIZE)
    for name, policy in POLICIES.items():
        students = by_hand(policy, logits)
        assert_is(model.predict(x, policy), students, logits, macs)
        if batch > 2:
            expected = {"one": {1}, "three": {3}, "all s": {4}, "all leave at the first": {1}, "none": {4}}
            wanted = next((ks for start, ks in expected.items() if name.startswith(start)), None)
            assert wanted is None or set(students.tolist()) == wanted
    assert len(set(by_hand(POLICIES["largest probability"], everything(model, images(256))).tolist())) == COUNT


@pytest.mark.parametrize("combination", ["per_student", "per_class"])
def test_fitted_combinations(combination):
    model, x = make(combination=combination), images(64)
    logits = everything(model, x)
    for name in ("patience 1", "largest probability"):
        policy = POLICIES[name]
        assert_is(model.predict(x, policy), by_hand(policy, logits), logits, model.step_macs(SIZE))


def test_padded_sizes():
    for count in range(1, 257):
        assert padded(count) == next(size for size in SIZES if size >= count)


def test_images_that_have_left_are_not_computed():
    model, seen = make(), []
    for student in model.students:
        student.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    logits, policy = everything(model, images(100)), POLICIES["largest probability"]
    seen.clear()
    sizes = assert_is(model.predict(images(100), policy), by_hand(policy, logits), logits, model.step_macs(SIZE))
    assert seen == sizes
    assert sizes[0] == 100 > sizes[1] > sizes[2]
    seen.clear()
    model.predict(images(100), Depth(2))
    assert seen == [100, 100]


@pytest.mark.parametrize("reuse", [False, True], ids=["apart", "reuse"])
def test_step_macs_are_those_of_the_ensemble(reuse):
    model = make(reuse)
    macs = model.step_macs((1, 13, 9))
    assert [sum(macs[:k]) for k in range(1, COUNT + 1)] == [
        count_macs(model.first(k), (1, 13, 9)) for k in range(1, COUNT + 1)
    ]
    model.set_active([0, 2])
    assert sum(model.step_macs((1, 13, 9))) == count_macs(model, (1, 13, 9))
    model.set_active(COUNT)
    if not reuse:
        model.connect(2, 2)
        assert sum(model.step_macs((1, 13, 9))) == count_macs(model, (1, 13, 9)) > sum(macs)


def test_step_macs_follow_what_changes_the_students():
    """By whoever changes them; a budget is kept after all."""
    model, x = make(), images(8)
    macs = model.step_macs(SIZE)

    def whole() -> int:
        assert model.predict(x, Budget(macs=1e9)).macs == 8 * sum(model.step_macs(SIZE))
        return sum(model.step_macs(SIZE))

    model.reset_classifier(500, "catavgmax")
    assert whole() == count_macs(model, SIZE) > sum(macs)
    with pytest.raises(ValueError, match="does not suffice for the first student"):
        model.predict(x, Budget(macs=8 * macs[0]))
    for student in model.students:
        student.reset_classifier(5, "avg")
    model.set_combination("mean")
    assert whole() == sum(macs)
    model.students[2] = timm.create_model("mamba_pkd_s2", num_classes=5, in_chans=1).eval()
    assert whole() == count_macs(model, SIZE) > sum(macs)
    model.students[3].stages[2].blocks[0] = nn.Identity()
    assert whole() == count_macs(model, SIZE)
    model.reset_classifier(5)
    model.connect(1, 1)
    macs = model.step_macs(SIZE)
    model.set_combination("per_class")
    assert whole() == count_macs(model, SIZE) > sum(macs)


def test_active_students_alone_are_used():
    model, x = make(), images(20)
    model.set_active([1, 3])
    found = model.predict(x, Agreement())
    assert found.students.max() == 2
    assert_is(found, by_hand(Agreement(), everything(model, x)), everything(model, x), model.step_macs(SIZE))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("reuse", [False, True], ids=["apart", "reuse"])
def test_budget_of_macs(batch, reuse):
    """Never over; the least sure images go on; more is spent than a student less would take."""
    model, x = make(reuse), images(batch)
    macs, logits = model.step_macs(SIZE), everything(model, x)
    whole = batch * sum(macs)
    for share in (macs[0] / sum(macs), 0.2, 0.37, 0.5, 0.9, 1.0, 3.0):
        budget = max(share * whole, batch * macs[0])
        found = model.predict(x, Budget(macs=budget))
        students = torch.ones(batch, dtype=torch.int64)
        spent, computed = batch * macs[0], batch
        for k in range(1, COUNT):
            present = (students == k).nonzero()[:, 0]
            sure = logits[k - 1, present].softmax(-1).max(-1).values
            allowed = int((budget - spent) / macs[k])
            size = batch if allowed >= batch else max((n for n in SIZES if n <= allowed), default=0)
            goes = present[sure.argsort()[:size]]
            students[goes] = k + 1
            computed = min(padded(len(goes)), computed) if len(goes) else 0
            spent += computed * macs[k]
        assert found.macs <= budget
        assert_is(found, students, logits, macs)
    assert model.predict(x, Budget(macs=whole)).students.tolist() == [COUNT] * batch


def test_budget_of_milliseconds(monkeypatch):
    """By a clock on which the student at position i takes i + 1 ms for each image."""
    model, now = make(), [0.0]
    monkeypatch.setattr("timm_mamba_pkd.models.cascade.time.perf_counter", lambda: now[0])
    for i, student in enumerate(model.students):

        def takes(module: Any, args: Any, i: int = i) -> None:
            now[0] += 0.001 * (i + 1) * len(args[0])

        student.register_forward_pre_hook(takes)
    x = images(5)
    with pytest.raises(ValueError, match=r"timed on 5 images of 1x9x9: call Budget.measure\(ensemble, x\) before"):
        model.predict(x, Budget(milliseconds=1000))
    assert now[0] == 0
    Budget.measure(model, x)
    measured = now[0]
    Budget.measure(model, x[:3])
    model.predict(x, Depth(1))
    assert now[0] - measured == pytest.approx(0.001 + 0.005), "what is known is not measured again"
    # The five images are padded to six: the first student takes 6 ms, and is taken to need twice that; the second 2 ms,
    # so 4, for an image, in batches of 1, 2, 3, 4 or 6.
    for budget, left in [(12.01, 1), (13.9, 1), (14.01, 2), (29.9, 4), (30.01, 5), (120.01, 5)]:
        began = now[0]
        found = model.predict(x, Budget(milliseconds=budget))
        assert 1000 * (now[0] - began) <= budget
        assert (found.students > 1).sum() == left and len(found.logits) == 5
    found = model.predict(x, Budget(milliseconds=120.01))
    assert found.students.tolist() == [COUNT] * 5 and found.macs == 6 * sum(model.step_macs(SIZE))
    torch.testing.assert_close(found.logits, everything(model, x)[-1])
    with pytest.raises(
        ValueError, match=r"5 ms does not suffice for the first student, which takes 12 ms for 5 images"
    ):
        model.predict(x, Budget(milliseconds=5))
    for others in (images(7), images(5, (1, 9, 10))):
        with pytest.raises(ValueError, match="have not been timed on"):
            model.predict(others, Budget(milliseconds=1000))


def test_times_are_of_what_was_timed(monkeypatch):
    """Not of another classifier, of compiled students, of more threads, or of another precision."""
    monkeypatch.setattr("timm_mamba_pkd.models.policies._slowest_steps", lambda cascade, x: [0.001] * COUNT)
    model, x, budget = make(), images(1), Budget(milliseconds=1e6)

    def require_others() -> None:
        with pytest.raises(ValueError, match="have not been timed on 1 images"):
            model.predict(x, budget)
        Budget.measure(model, x)
        model.predict(x, budget)

    require_others()
    model.reset_classifier(5)
    require_others()
    model.students[1].compile(backend="eager")
    require_others()
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    require_others()
    with torch.autocast("cpu", torch.bfloat16):
        require_others()
    model.predict(x, budget)


def test_a_policy_for_more_students_than_the_first_ones_that_are_active():
    model, x = make(), images(64)
    policy = Confidence([0.4, 0.2, 0.25], [0.5, 1.0, 2.0, 1.0], "margin")
    for k in (1, 3):
        model.set_active(k)
        found, wanted = model.predict(x, policy), model.predict(x, policy.first(k))
        assert found.students.tolist() == wanted.students.tolist() and torch.equal(found.logits, wanted.logits)
        assert found.students.max() == k
    model.set_active([0, 2])
    with pytest.raises(ValueError, match="thresholds are for the first 4 students, and 1, 3 are active"):
        model.predict(x, policy)


def test_an_image_of_nan_goes_on():
    model, x = make(), images(4)
    x[1] = math.nan
    found = model.predict(x, Confidence([1.0] * (COUNT - 1)))
    assert found.students.tolist() == [COUNT] * 4


def test_other_sizes_channels_and_precisions():
    model = make(in_chans=3).bfloat16()
    x = images(5, (3, 17, 8)).bfloat16()
    found = model.predict(x, Confidence([0.6, 0.5, 0.55]))
    assert found.logits.dtype == torch.bfloat16
    assert found.macs > 0
    with torch.autocast("cpu", torch.bfloat16):
        make(in_chans=3).predict(x.float(), Agreement())


def test_no_gradients_and_nothing_changes():
    model, x = make(), images(3)
    before = copy.deepcopy(model.state_dict())
    found = model.predict(x.requires_grad_(), Agreement())
    assert not found.logits.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_compiled_students():
    torch._dynamo.reset()
    model = timm.create_model("mamba_pkd_ensemble", students=NAMES[:1] * 3, num_classes=5, in_chans=1).eval()
    assert isinstance(model, MambaPKDEnsemble)
    x = images(32, (1, 8, 8))
    logits = everything(model, x)
    for student in model.students:
        student.compile(backend="eager", dynamic=True)
    policy = Confidence([float(logits[0].softmax(-1).max(-1).values.median()), 0.99])
    students = by_hand(policy, logits)
    assert set(students.tolist()) == {1, 3}
    assert_is(model.predict(x, policy), students, logits, model.step_macs((1, 8, 8)))


def test_other_timm_models_as_students():
    model = timm.create_model("mamba_pkd_ensemble", students=["test_resnet", "mamba_pkd_s1"], num_classes=5).eval()
    assert isinstance(model, MambaPKDEnsemble)
    x = images(4, (3, 32, 32))
    assert_is(
        model.predict(x, Depth(1)), torch.ones(4, dtype=torch.int64), everything(model, x), model.step_macs((3, 32, 32))
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu():
    model, x = make(reuse=True).cuda(), images(64).cuda()
    logits = everything(model, x)
    for name in ("patience 1", "largest probability"):
        found = model.predict(x, POLICIES[name])
        assert found.students.is_cuda
        assert found.students.tolist() == by_hand(POLICIES[name], logits.cpu()).tolist()
    Budget.measure(model, x)
    assert model.predict(x, Budget(milliseconds=1000)).students.tolist() == [COUNT] * 64


@pytest.mark.parametrize(
    ("policy", "x", "message"),
    [
        (None, images(2), "no policy: fit one by mamba-pkd calibrate, or give one"),
        (Depth(5), images(2), "k must be a whole number from 1 to 4, got 5"),
        (Confidence([0.5]), images(2), "thresholds are for the first 2 students, and 1, 2, 3, 4 are active"),
        (Budget(macs=1000), images(2), "1000 MACs does not suffice for the first student, which takes .* for 2 images"),
        (Agreement(), images(0), r"\(B, 1, H, W\) of at least one image, got \(0, 1, 9, 9\)"),
        (Agreement(), images(2)[0], r"got \(1, 9, 9\)"),
        (Agreement(), images(2, (3, 9, 9)), r"got \(2, 3, 9, 9\)"),
        (Agreement(), "image.png", "got str"),
        (Agreement(), images(2, (1, 9, 7)), r"at least 8 pixels high and wide, got \(2, 1, 9, 7\)"),
        (Agreement(), images(2).byte(), "images must be torch.float32 on cpu, got torch.uint8 on cpu"),
        (Agreement(), images(2).double(), "got torch.float64 on cpu"),
        (Agreement(), images(2).bfloat16(), "got torch.bfloat16 on cpu"),
        (Agreement(), images(2).to("meta"), "got torch.float32 on meta"),
        (Depth, images(2), "policy must be a Confidence, Agreement, Budget or Depth, got <class"),
        ("confidence", images(2), "policy must be .*Confidence.*, got 'confidence'"),
    ],
)
def test_bad_input(policy: Policy | None, x, message):
    """Also of `anytime`, if it is the images."""
    model = make()
    for student in model.students:
        student.register_forward_pre_hook(lambda module, args: pytest.fail("computed"))
    with pytest.raises(ValueError, match=message):
        model.predict(x, policy)
    if isinstance(policy, Agreement):
        with pytest.raises(ValueError, match=message):
            model.anytime(x)


def test_images_that_autocast_does_not_cast():
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.predict(images(2).bfloat16(), Agreement()).logits.isfinite().all()
        for x in (images(2).byte(), images(2).double(), images(2).half()):
            with pytest.raises(ValueError, match=r"must be torch.float32 or torch.bfloat16 on cpu, got "):
                model.predict(x, Agreement())


def test_a_model_without_values():
    for x in (images(2), images(2).to("meta")):
        with pytest.raises(ValueError, match="the model is on the meta device: load weights before"):
            make().to("meta").predict(x, Agreement())


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="predict needs eval mode"):
        make().train().predict(images(2), Agreement())
