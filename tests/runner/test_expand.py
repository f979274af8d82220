"""``mamba-pkd expand``: the YAML that a progressive schedule stands for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torchdistill.common.yaml_util import load_yaml_file

from timm_mamba_pkd.cli import main
from timm_mamba_pkd.distillation import progressive as schedule
from timm_mamba_pkd.runner.expand import expand
from timm_mamba_pkd.runner.schema import check_schema
from timm_mamba_pkd.runner.source import Source

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [
    path for path in sorted((ROOT / "yaml_configs").rglob("*.yaml")) if "timm_mamba_pkd.progressive" in path.read_text()
]


class TrainLoader(yaml.FullLoader):
    """torchdistill's loader, but no data set is built."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        tags = ("!import_call", "!access_by_index_or_key")
        if node.tag in tags and not any(
            getattr(value, "value", "") == "timm_mamba_pkd.progressive" for _, value in node.value
        ):
            return None
        return super().construct_object(node, deep)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_schedules(path, tmp_path):
    load_yaml_file("/dev/null")  # registers the tags
    text = expand(path)
    (tmp_path / "expanded.yaml").write_text(text)
    expanded, config = (yaml.load(t, TrainLoader) for t in (text, path.read_text()))
    assert "timm_mamba_pkd.progressive" not in text.split("\n", 1)[1]
    assert expanded["train"] == config["train"]
    assert list(expanded["train"])[2:] == [f"stage{k}" for k in range(1, 1 + len(expanded["train"]) - 2)]
    assert expanded == {**config, "train": expanded["train"]}
    assert check_schema(Source.read(tmp_path / "expanded.yaml")) == []


def test_it_trains_to_the_same_losses(progressive, run, write, tmp_path, capsys):
    path = write(progressive)
    assert main(["expand", "--config", str(path)]) == 0
    (tmp_path / "expanded.yaml").write_text(capsys.readouterr().out)
    metrics = []
    for config, output in ((progressive, "short"), (tmp_path / "expanded.yaml", "long")):
        code, folder = run(config, output=output)
        assert code == 0
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        metrics.append([(line["stage"], line["student"], line["loss"], line["val_top1"]) for line in lines])
    assert metrics[0] == metrics[1]


def test_loaded_by_torchdistill_it_is_the_same_train_section(progressive, write, tmp_path):
    path = write(progressive)
    (tmp_path / "expanded.yaml").write_text(expand(path))
    original, expanded = load_yaml_file(str(path)), load_yaml_file(str(tmp_path / "expanded.yaml"))
    assert expanded["train"] == original["train"]
    assert (
        expanded["train"]["stage1"]["train_data_loader"]["sampler"]["class_or_func"] is torch.utils.data.RandomSampler
    )


TEXT = """
dependencies: {dependencies}
datasets:
  both: &both !import_call {{key: os.mkdir, init: {{args: [{victim}]}}}}
  a: &name !access_by_index_or_key {{data: *both, index_or_key: 0}}
  b: !access_by_index_or_key {{data: *both, index_or_key: 1}}
  size: !!python/tuple [1, 2]
  path: !join [x, y]
  home: !expanduser '~/data'
  _loader: &loader
    sampler: {{class_or_func: !import_get {{key: torch.utils.data.RandomSampler}}}}
    kwargs: {{batch_size: 4}}
models:
  teacher_model: {{key: resnet18, kwargs: {{num_classes: 10}}}}
  student_model: {{key: mamba_pkd_ensemble, kwargs: {{students: &students [mamba_pkd_s1, mamba_pkd_s2]}}}}
train: !import_call
  key: timm_mamba_pkd.progressive
  init:
    kwargs:
      students: *students
      num_epochs: 3
      train_data_loader: {{<<: *loader, dataset_id: a}}
      val_data_loader: {{<<: *loader, dataset_id: b}}
      optimizer: {{key: SGD, kwargs: {{lr: 1.0e-05}}}}
      criterion: {{key: WeightedSumLoss, kwargs: {{sub_terms: {{}}}}}}
test:
  test_data_loader: {{<<: *loader, dataset_id: b}}
"""


@pytest.mark.parametrize("dependencies", ["", "my_package", "[my_package]", "[{name: timm_mamba_pkd}]"])
def test_nothing_is_executed_and_all_is_kept(dependencies, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(TEXT.format(victim=tmp_path / "victim", dependencies=dependencies))
    text = expand(path)
    assert not (tmp_path / "victim").exists()
    assert "<<" not in text and "lr: 1.0e-05" in text
    (tmp_path / "expanded.yaml").write_text(text)
    root = Source.read(tmp_path / "expanded.yaml").root
    sections = {key.value: value for key, value in root.value}
    datasets = {key.value: value for key, value in sections["datasets"].value}
    assert [datasets[name].tag for name in ("both", "a", "size", "path", "home")] == [
        "!import_call", "!access_by_index_or_key", "tag:yaml.org,2002:python/tuple", "!join", "!expanduser",
    ]  # fmt: skip
    assert datasets["a"].value[0][1] is datasets["b"].value[0][1] is datasets["both"]  # built once, as before
    names = yaml.safe_load(text.split("datasets:")[0])["dependencies"]
    assert {"name": "timm_mamba_pkd"} in names and ("my_package" in names) == ("my_package" in dependencies)
    plain_data = {"sampler": {"class_or_func": torch.utils.data.RandomSampler}, "kwargs": {"batch_size": 4}}
    expected = schedule(
        students=["mamba_pkd_s1", "mamba_pkd_s2"], num_epochs=3,
        train_data_loader={**plain_data, "dataset_id": "a"}, val_data_loader={**plain_data, "dataset_id": "b"},
        optimizer={"key": "SGD", "kwargs": {"lr": 1e-5}},
        criterion={"key": "WeightedSumLoss", "kwargs": {"sub_terms": {}}},
    )  # fmt: skip
    load_yaml_file("/dev/null")
    assert yaml.load(text, TrainLoader)["train"] == expected


@pytest.mark.parametrize(("levels", "message"), [(4, "got [[[["), (12, "characters with its aliases written out")])
def test_aliases_that_multiply(progressive, write, capsys, levels, message):
    progressive["train"]["init"]["kwargs"]["views"] = None
    path = write(progressive)
    bomb = "_0: &a0 [x]\n"
    bomb += "".join(f"_{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, levels + 1))
    path.write_text(bomb + path.read_text().replace("views: null", f"views: *a{levels}"))
    assert main(["expand", "--safe-config", "--config", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and len(line) < 1300


def test_errors(progressive, plain, write, run, errors, capsys):
    assert main(["expand", "--config", str(write(plain))]) == 2
    (error,) = errors()
    assert error == "line 57: train is no timm_mamba_pkd.progressive schedule: nothing to expand"
    progressive["train"]["init"]["kwargs"]["rule"] = "residul"
    assert main(["expand", "--config", str(write(progressive))]) == 2
    (error,) = errors()
    assert error.startswith("line 112: unknown rule 'residul'; known: ")
    progressive["train"]["init"]["kwargs"]["rul"] = "residual"
    assert main(["expand", "--config", str(write(progressive))]) == 2
    assert errors() == ["line 113: unknown key 'rul' in progressive; did you mean 'rule'?"]
    assert main(["expand", "--config", "nothing.yaml"]) == 2
    assert errors() == ["config nothing.yaml cannot be read: No such file or directory"]
