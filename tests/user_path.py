"""What a user does with a student, from creation to ONNX Runtime: run by test_user_path.py where nothing else is."""

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import timm  # alone: the installed package adds its models
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.utils import accuracy
from torch import Tensor
from torch.nn.functional import cross_entropy


def train(model: Any, images: Tensor, labels: Tensor, steps: int) -> list[float]:
    """Train on one batch; returns the losses."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model.train()(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def validate(model: Any, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent."""
    with torch.inference_mode():
        (top1,) = accuracy(model.eval()(images), labels)
    return top1.item()


torch.manual_seed(0)
sizes: dict[str, Any] = {"in_chans": 1, "img_size": 28}
images = torch.randn(21, 1, 28, 28)

model = timm.create_model("mamba_pkd_s3", num_classes=7, **sizes)
assert Path(str(sys.modules["timm_mamba_pkd"].__file__)).is_relative_to(sysconfig.get_path("platlib"))
labels = torch.arange(21) % 7
losses = train(model, images, labels, steps=2)
assert losses[1] < losses[0]
assert 0 <= validate(model, images, labels) <= 100
save_file(model.state_dict(), "seven.safetensors")

tuned: Any = timm.create_model("mamba_pkd_s3", num_classes=3, checkpoint_path="seven.safetensors", **sizes)
assert torch.equal(tuned.stem.conv.weight, model.state_dict()["stem.conv.weight"])
losses = train(tuned, images, torch.arange(21) % 3, steps=2)
assert losses[1] < losses[0]
save_file(tuned.state_dict(), "three.safetensors")

command = str(Path(sysconfig.get_path("scripts")) / "mamba-pkd")
words = ["export", "mamba_pkd_s3", "--checkpoint", "three.safetensors", "--format", "onnx", "--output", "out"]
subprocess.run([command, *words, "--num-classes", "3", "--in-chans", "1", "--img-size", "28"], check=True)

import onnxruntime  # noqa: E402

session = onnxruntime.InferenceSession("out/mamba_pkd_s3.onnx")
with torch.inference_mode():
    for count in (1, 7):
        (logits,) = session.run(None, {"input0": images[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), tuned.eval()(images[:count]), rtol=1e-4, atol=1e-5)
print("the user's path works")
