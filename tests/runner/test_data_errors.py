"""Data and weights that are missing or of another kind: one line on stderr, before anything is written."""

import timm
import torch
from torchvision.datasets import FakeData


def test_data_that_is_not_there(plain, build, run, errors, tmp_path):
    to_tensor = build.call("torchvision.transforms.ToTensor")
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_images" / "cat").mkdir(parents=True)
    for dataset, message in (
        (build.call("torchvision.datasets.ImageFolder", root=str(tmp_path / "gone")), "gone"),
        (
            build.call("torchvision.datasets.ImageFolder", root=str(tmp_path / "empty")),
            "Couldn't find any class folder",
        ),
        (build.call("torchvision.datasets.ImageFolder", root=str(tmp_path / "no_images")), "Found no valid file"),
        (build.call("torchvision.datasets.MNIST", root=str(tmp_path), download=False), "Dataset not found"),
        (build.call("torchvision.datasets.MNIST", rot=str(tmp_path)), "MNIST has no parameter 'rot'; it has root"),
        (build.call("torchvision.datasets.MNIST"), "MNIST needs 'root'"),
        (build.call("torchvision.datasets.Nothing"), "has no attribute 'Nothing'"),
        (build.call("no.such.module.Data"), "ModuleNotFoundError: No module named 'no'"),
        (build.fake_images(0, 0), "data set 'fake/val' (train.stage1.val_data_loader) is empty"),
        (build.call("torchvision.datasets.FakeData", size=4), "'fake/val': samples must be tensors of shape (C, H, W)"),
        (build.fake_images(4, 0, side=4), "cannot take images of 1x4x4"),
        (build.fake_images(4, 0, classes=99), "classes, the models have 3: set num_classes"),
        (
            build.call("timm_mamba_pkd.datasets.Digits", split="val", transform=to_tensor),
            "the data has at least 10 classes",
        ),
        (build.call("timm_mamba_pkd.datasets.Digits", split="vla"), "split must be train, val or test, got 'vla'"),
        (5, "data set 'fake/val': the first sample cannot be read"),
    ):
        plain["datasets"]["fake/val"] = dataset
        code, folder = run(plain)
        assert code == 2 and not folder.exists()
        (error,) = errors()
        assert message in error and error.startswith("line ")
        assert "cannot be read: Couldn't" not in error  # that is said of the config file only


def test_the_line_of_a_failing_call_is_that_of_the_argument(plain, build, run, errors, tmp_path):
    plain["datasets"]["fake/val"] = build.call("timm_mamba_pkd.datasets.Digits", split="vla")
    assert run(plain)[0] == 2
    line = int(errors()[0].split(":")[0].removeprefix("line "))
    assert (tmp_path / "config.yaml").read_text().splitlines()[line - 1].strip() == "split: vla"


def test_labels_beyond_the_classes(plain, build, run, errors):
    """A data set that declares no classes, whose first label is fine."""

    def labels(offset: int) -> list[int]:
        return [label for _, label in FakeData(24, (1, 8, 8), num_classes=4, random_offset=offset)]

    offset = next(n for n in range(99) if labels(n)[0] < 3)
    assert max(labels(offset)) == 3
    plain["datasets"]["fake/train"] = build.fake_images(24, offset, classes=4)
    plain["train"]["train_data_loader"]["kwargs"]["batch_size"] = 24
    assert run(plain)[0] == 2
    assert errors() == ["line 54: the data has label 3, the models have 3 classes: set num_classes"]


def test_bad_src_ckpt(progressive, run, errors, tmp_path):
    teacher = progressive["models"]["teacher_model"]
    path = tmp_path / "teacher.pt"
    teacher["src_ckpt"] = str(path)
    assert run(progressive)[0] == 2
    assert errors() == [f"line 56: models.teacher_model: weights file {path} does not exist"]

    model = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    torch.save({"model": model.state_dict()}, path)
    path.write_bytes(path.read_bytes()[:5000])
    assert run(progressive)[0] == 2
    assert f"weights file {path}" in errors()[0]

    torch.save({"model": timm.create_model("test_vit", num_classes=3).state_dict()}, path)
    assert run(progressive)[0] == 2
    assert f"weights file {path} is of another model than ResNet" in errors()[0]

    torch.save({"model": timm.create_model("test_resnet", num_classes=4, in_chans=1).state_dict()}, path)
    code, folder = run(progressive)
    assert code == 2 and not folder.exists()
    assert "fc.weight (4, 96) instead of (3, 96)" in errors()[0]
