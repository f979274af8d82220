"""Every shipped config: its header, and one training step of its first stage."""

from pathlib import Path

import pytest
import torch
import yaml

from timm_mamba_pkd.distillation import build_model
from timm_mamba_pkd.models import save_checkpoint
from timm_mamba_pkd.runner.box import build_box
from timm_mamba_pkd.runner.config import prepare

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "yaml_configs").rglob("*.yaml"))


def test_there_are_configs():
    assert {path.parent.name for path in CONFIGS} == {"digits", "mnist"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_header_names_paper_cost_and_command(path):
    header = [line for line in path.read_text().split("\n\n")[0].splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert "https://arxiv.org/abs/" in text and "# Cost: " in text
    assert f"mamba-pkd train --config {path.relative_to(ROOT)}" in text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_one_step(path, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if path.parent.name == "mnist":
        (tmp_path / "resource").mkdir()
        (tmp_path / "resource" / "dataset").symlink_to(request.getfixturevalue("data_root").resolve())
    teacher = yaml.load(path.read_text(), _PlainLoader)["models"].get("teacher_model")
    if teacher is not None:  # the result of another config
        save_checkpoint(build_model({**teacher, "src_ckpt": None}), teacher["src_ckpt"])

    job = prepare(path, torch.device("cpu"))
    box = build_box(job, torch.device("cpu"))
    box.pre_epoch_process(epoch=0)
    images, targets, supp_dict = next(iter(box.train_data_loader))  # pyright: ignore
    before = {name: p.clone() for name, p in job.student.named_parameters() if p.requires_grad}
    loss = box.forward_process(images[:4], targets[:4], supp_dict)
    box.post_forward_process(loss=loss)
    assert torch.isfinite(loss)
    trained = [name for name, p in job.student.named_parameters() if name in before and not p.equal(before[name])]
    assert len(trained) > 0.5 * len(before) > 0  # timm starts the last norm of a residual branch at zero


class _PlainLoader(yaml.SafeLoader):
    """Reads a config without calling what it names."""


_PlainLoader.add_multi_constructor("!", lambda loader, suffix, node: None)
