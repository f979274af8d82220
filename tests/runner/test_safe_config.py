# ruff: noqa: E501
"""``--safe-config`` against hostile configs: each would leave a marker file, import a module, or write elsewhere."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from timm_mamba_pkd.cli import main
from timm_mamba_pkd.distillation import RULES
from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.expand import expand
from timm_mamba_pkd.runner.safe_config import CALLED, Folders, require_safe
from timm_mamba_pkd.runner.schema import set_cache_dir
from timm_mamba_pkd.runner.source import Source

pytestmark = pytest.mark.fault

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "yaml_configs").rglob("*.yaml"))
REFUSED = re.compile(
    r"(refused by|under) --safe-config|is outside --output|, outside --output|not valid YAML|nested too deeply"
)


def call(key: str, *args: Any, tag: str = "!import_call", **kwargs: Any) -> str:
    """A call in YAML's flow style; arguments are YAML."""
    named = ", ".join(f"{name}: {value}" for name, value in kwargs.items())
    return f"{tag} {{key: {key}, init: {{args: [{', '.join(args)}], kwargs: {{{named}}}}}}}"


MARK = "touch marker"
SHELL = f"['{MARK}']"
PICKED = "{key: os.system, init: {args: ['touch marker']}}"

# Each stands as data set `x`, which nothing else names.
AS_DATASET = {
    "os.system": call("os.system", f"'{MARK}'"),
    "posix.system": call("posix.system", f"'{MARK}'"),
    "subprocess by package": "!import_call {key: run, package: subprocess, init: {args: [[touch, marker]]}}",
    "builtins.exec": call("builtins.exec", "\"open('marker', 'w')\""),
    "torch.os.system": call("torch.os.system", f"'{MARK}'"),
    "os under torchvision": call("system", f"'{MARK}'").replace("key:", "package: torchvision.datasets.utils.os, key:"),
    "os as a module of timm": "!import_get {key: torchvision.datasets.utils.os}",
    "collect_env.run": call("torch.utils.collect_env.run", f"'{MARK}'"),
    "cpp_extension": call("torch.utils.cpp_extension.load_inline", name="x", cpp_sources="''"),
    "torch.load": call("torch.load", "evil.pt", weights_only="False"),
    "torch.serialization.load": call("torch.serialization.load", "evil.pt", weights_only="False"),
    "torch.save": call("torch.save", "1", "marker"),
    "torch.hub.load": call("torch.hub.load", "'.'", "evil", source="local", trust_repo="True"),
    "torch.jit.load": call("torch.jit.load", "evil.pt"),
    "load_library": call("torch.ops.load_library", "evil.so"),
    "distributed.run": call("torch.distributed.run.main", "[evil.py]"),
    "download_url": call("torchvision.datasets.utils.download_url", "'file:///etc/hosts'", "'.'", "marker"),
    "extract_archive": call("torchvision.datasets.utils.extract_archive", "evil.zip", "'.'"),
    "LSUN": call("torchvision.datasets.LSUN", "'.'"),
    "ImageNet": call("torchvision.datasets.ImageNet", "'.'"),
    "timm load_checkpoint": call("timm.models.load_checkpoint", "null", "evil.pt", weights_only="False"),
    "timm create_model": call("timm.create_model", "'local-dir:.'", pretrained="True"),
    "load_ckpt": call("torchdistill.common.main_util.load_ckpt", "evil.pt"),
    "load_pickle": call("torchdistill.common.file_util.load_pickle", "evil.pt"),
    "save_pickle": call("torchdistill.common.file_util.save_pickle", "1", "marker"),
    "import_call by import_call": call("torchdistill.common.main_util.import_call", "os.system", init=f"{{args: {SHELL}}}"),
    "import_dependencies": call("torchdistill.common.main_util.import_dependencies", "evil"),
    "save_weights": call("timm_mamba_pkd.models.save_weights", "null", "marker"),
    "an own main": call("timm_mamba_pkd.cli.main", "[doctor]"),
    "a module of the working folder": call("evil.run"),
    "it, got": "!import_get {key: evil.run}",
    "it, below a package": call("torch.evil.run"),
    "loader": call("torchvision.datasets.FakeData", transform="!import_get {key: os.system}"),
    "loader of ImageFolder": call("torchvision.datasets.ImageFolder", "'.'", loader="!import_get {key: os.system}"),
    "Lambda": call("torchvision.transforms.Lambda", "!import_get {key: os.system}"),
    "Lambda of v2": call("torchvision.transforms.v2.Lambda", "!import_get {key: os.system}"),
    "nested": call("torchvision.transforms.Compose", f"[[{call('os.system', chr(39) + MARK + chr(39))}]]"),
    "unused": f"[1, {{a: {call('os.system', chr(39) + MARK + chr(39))}}}]",
    "chosen beside": f"!access_by_index_or_key {{data: [1, !import_call {PICKED}], index_or_key: 0}}",
    "merged": f"{{<<: {{a: !import_call {PICKED}}}, a: 1}}",
    "aliased": f"[&a !import_call {PICKED}, *a]",
    "alias as tag's mapping": f"[&a {PICKED}, !import_call {{<<: *a}}]",
    "joined key": "!import_call {key: !join [os, .system], init: {args: ['touch marker']}}",
    "joined name of a key": "!import_call {? !join [k, ey] : os.system, init: {args: ['touch marker']}}",
    "init by a tag": f"!import_call {{key: torchvision.datasets.FakeData, init: !import_call {PICKED}}}",
    "key is a list": "!import_call {key: [os, system]}",
    "key is a call": f"!import_call {{key: !import_call {PICKED}}}",
    "getattr": "!getattr [!import_get {key: torch}, os]",
    "getattr of a getattr": "!getattr [!getattr [!import_get {key: torch.nn}, torch], os]",
    "getattr of a class": "!getattr [!import_get {key: torch.utils.data.RandomSampler}, __subclasses__]",
    "getattr of an enumeration": "!getattr [!import_get {key: torchvision.transforms.InterpolationMode}, __init__]",
    "setattr": "!setattr [!import_get {key: torch.utils.data.RandomSampler}, __init__, 1]",
    "call_method": "!call_method {obj: x, method_name: format}",
    "import_call_method": "!import_call_method {package: pathlib.Path.touch, init: {args: [marker]}}",
    "the same on an allowed class": "!import_call_method {package: torchvision.datasets.MNIST.download, init: }",
    "access to a data set's": "!access_by_index_or_key {data: !import_get {key: torch.utils.data.Sampler}, index_or_key: 0}",
    "python/apply": "!!python/object/apply:os.system ['touch marker']",
    "python/new": "!!python/object/new:os.system ['touch marker']",
    "python/name": "!!python/name:os.system",
    "python/module": "!!python/module:evil",
    "python/tuple": "!!python/tuple [1]",
    "python in full": "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch marker']",
    "verbatim": f"!<!import_call> {PICKED}",
    "escaped": f"!import%5Fcall {PICKED}",
    "unknown tag": "!exec 'touch marker'",
    "set": "!!set {a, b}",
    "download": call("torchvision.datasets.MNIST", root="../elsewhere", download="True"),
    "download by position": call("torchvision.datasets.MNIST", "/tmp", "True", "null", "null", "1"),
    "download into the home": call("torchvision.datasets.CIFAR10", "'~/data'", download="True"),
    "download by a link": call("torchvision.datasets.CIFAR10", "run/link", download="True"),
    "download to a joined path": call("torchvision.datasets.CIFAR10", "!join [run, /../../x]", download="True"),
    "wds": call("timm.data.create_dataset", "'wds/x'", root="'pipe:touch marker'"),
    "hfds": call("timm.data.create_dataset", "'hfds/evil/x'", trust_remote_code="True"),
    "tar": call("timm.data.create_dataset", "''", root="x.tar"),
    "tar, joined": call("timm.data.create_dataset", "''", root="!join [x, .tar]"),
    "tar of a split": call("timm.data.create_dataset", "''", root="x", split="'x.tar[0]'"),
    "tar of a split below": call("timm.data.create_dataset", "''", root="x", split="'run/../x.tar['"),
    "tar by position": call("timm.data.create_dataset", "''", "x", "'x.tar[0]'"),
    "tar in capitals": call("timm.data.create_dataset", "''", root="x.TAR"),
    "a split that is no text": call("timm.data.create_dataset", "''", root="x", split="[x.tar]"),
    "timm's download": call("timm.data.create_dataset", "torch/mnist", "/tmp", download="True"),
    "reader": call("timm.data.create_dataset", "''", root=".", class_map="evil.pkl"),
    "rule by position": call("timm_mamba_pkd.progressive", "[s]", "1", "{}", "{}", "{}", "{kwargs: {sub_terms: {}}}", "evil.Rule"),
    "cache_dir by position": call("timm_mamba_pkd.progressive", "[s]", "1", "{}", "{}", "{}", "{kwargs: {sub_terms: {}}}", "independent", *["null"] * 4, "/tmp/x"),
    "tensorflow by position": call("timm.data.create_transform", *["1"] * 24),
    "a line of its own": call("torchvision.datasets.MNIST", root='"../x\\nmamba-pkd: config OK\\e[2J"', download="True"),
    "tensorflow": call("timm.data.create_transform", tf_preprocessing="True"),
}  # fmt: skip

# Changes to the text of a config that is fine; the first of each pair stands in it.
IN_PLACE = {
    "dependency": ("dependencies:\n- name: timm_mamba_pkd", "dependencies: [evil]"),
    "dependency by name": ("- name: timm_mamba_pkd", "- name: evil"),
    "dependency, a submodule": ("- name: timm_mamba_pkd", "- name: timm_mamba_pkd.__main__"),
    "dependency, relative": ("- name: timm_mamba_pkd", "- {name: .evil, package: torch}"),
    "dependency by a tag": ("- name: timm_mamba_pkd", "- !import_call {key: os.system}"),
    "rule": ("      num_epochs:", "      rule: evil.Rule\n      num_epochs:"),
    "rule with kwargs": ("      num_epochs:", "      rule: {key: evil.Rule, kwargs: {}}\n      num_epochs:"),
    "rule, joined": ("      num_epochs:", "      rule: !join [evil, .Rule]\n      num_epochs:"),
    "rule in a wrapper": ("      num_epochs:", "      student: {auxiliary_model_wrapper: {key: mamba_pkd_stage, kwargs: {rule: evil.Rule}}}\n      num_epochs:"),
    "repo_or_dir": ("    key: mamba_pkd_timm_model", "    key: evil\n    repo_or_dir: ."),
    "repo_or_dir by a merge": ("    key: mamba_pkd_timm_model", "    <<: {repo_or_dir: .}\n    key: evil"),
    "a model's key that is none": ("    key: mamba_pkd_timm_model", "    key: get_model"),
    "pretrained_cfg": ("      model_name: test_resnet", "      model_name: test_resnet\n      pretrained: True\n      pretrained_cfg: {file: evil.pt}"),
    "model of the hub": ("      model_name: test_resnet", "      model_name: hf-hub:evil/model"),
    "model of a folder": ("      model_name: test_resnet", "      model_name: local-dir:."),
    "student of the hub": ("      - mamba_pkd_s1", "      - hf-hub:evil/model"),
    "timm's cache_dir": ("      model_name: test_resnet", "      model_name: test_resnet\n      cache_dir: ../elsewhere"),
    "a function as an argument": ("      model_name: test_resnet", "      model_name: test_resnet\n      global_pool: !import_get {key: torch.float32}"),
    "src_ckpt of the net": ("    key: mamba_pkd_timm_model", "    src_ckpt: http://localhost:9/evil.pt\n    key: mamba_pkd_timm_model"),
    "dst_ckpt": ("    key: mamba_pkd_ensemble", "    dst_ckpt: ../elsewhere/x.pt\n    key: mamba_pkd_ensemble"),
    "dst_ckpt, absolute": ("    key: mamba_pkd_ensemble", "    dst_ckpt: /tmp/x.pt\n    key: mamba_pkd_ensemble"),
    "dst_ckpt, up and out": ("    key: mamba_pkd_ensemble", "    dst_ckpt: run/../x.pt\n    key: mamba_pkd_ensemble"),
    "dst_ckpt, at home": ("    key: mamba_pkd_ensemble", "    dst_ckpt: ~/x.pt\n    key: mamba_pkd_ensemble"),
    "dst_ckpt of a user": ("    key: mamba_pkd_ensemble", "    dst_ckpt: ~nobodyatall/x.pt\n    key: mamba_pkd_ensemble"),
    "dst_ckpt by a link": ("    key: mamba_pkd_ensemble", "    dst_ckpt: run/link/x.pt\n    key: mamba_pkd_ensemble"),
    "dst_ckpt, joined": ("    key: mamba_pkd_ensemble", "    dst_ckpt: !pathjoin [run, .., x.pt]\n    key: mamba_pkd_ensemble"),
    "a wrapper's checkpoint": ("      num_epochs:", "      teacher: {auxiliary_model_wrapper: {key: Teacher4FactorTransfer, kwargs: {paraphraser_ckpt: ../x.pt}}}\n      num_epochs:"),
    "cache_dir": ("      num_epochs:", "      cache_dir: ../elsewhere\n      num_epochs:"),
    "tracker": ("datasets:", "tracker: {engine: wandb, kwargs: {dir: /tmp}}\ndatasets:"),
    "dependencies as a mapping": ("dependencies:\n- name: timm_mamba_pkd", "dependencies: {evil: 1}"),
    "the same with name": ("dependencies:\n- name: timm_mamba_pkd", "dependencies: {name: timm}"),
    "student with a path": ("      - mamba_pkd_s1", "      - resnet18./../../x"),
    "models by a tag": ("  student_model:\n", "  student_model: !access_by_index_or_key {data: [1], index_or_key: 0}\n  _x:\n"),
    "train by a tag": ("key: timm_mamba_pkd.progressive", "key: torchdistill.datasets.util.split_dataset"),
    "tags renamed": ("dependencies:", "%TAG !e! tag:yaml.org,2002:python/\n---\n_x: !e!object/apply:os.system ['touch marker']\ndependencies:"),
    "main tag renamed": ("dependencies:", f"%TAG ! !import_\n---\n_x: !call {PICKED}\ndependencies:"),
    "a joined section": ("dependencies:", "? !join [dep, endencies]\n: [evil]\n_x:"),
    "two documents": ("dependencies:", f"a: 1\n---\n_x: !import_call {PICKED}\ndependencies:"),
    "the whole by a tag": ("dependencies:", "--- !import_call\nkey: os.system\ninit: {args: ['touch marker']}\ndependencies:"),
    "nested deeply": ("dependencies:", "_x: " + "[" * 3000 + "]" * 3000 + "\ndependencies:"),
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder whose modules would leave a marker when they are imported."""
    monkeypatch.chdir(tmp_path)
    for name in ("evil.py", "hubconf.py", "wandb.py", "tensorflow.py", "datasets.py"):
        (tmp_path / name).write_text("open('marker', 'w')\nRule = run = None\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path.parent)
    return tmp_path


def hostile(name: str, write: Any, config: Any) -> Path:
    path = write(config)
    text = path.read_text()
    if name in AS_DATASET:
        text = text.replace("datasets:\n", f"datasets:\n  x: {AS_DATASET[name]}\n", 1)
    else:
        old, new = IN_PLACE[name]
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", [*AS_DATASET, *IN_PLACE])
def test_hostile_config(name, place, progressive, write, run, capsys):
    path = hostile(name, write, progressive)
    before, loaded = sorted(place.rglob("*")), set(sys.modules)
    code, _ = run(path, "--safe-config", command="check")
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert all(line.startswith("mamba-pkd: error: config ") for line in lines), lines
    assert any(REFUSED.search(line) for line in lines), lines
    assert len(set(lines)) == len(lines) <= 6 and not any(len(line) > 700 for line in lines)
    assert sorted(place.rglob("*")) == before
    assert not {"evil", "hubconf", "wandb", "tensorflow", "datasets"} & (set(sys.modules) - loaded)


def test_the_attacks_work_without_the_flag(place, progressive, write, run, capsys):
    """The marker would be seen: these are attacks."""
    for name in ("os.system", "a module of the working folder", "merged", "verbatim", "rule", "rule by position"):
        run(hostile(name, write, progressive), command="check")
        assert (place / "marker").exists(), name
        (place / "marker").unlink()
        sys.modules.pop("evil", None)


@pytest.mark.parametrize("command", ["train", "evaluate", "check", "expand", "export"])
def test_every_command(command, place, progressive, write, capsys):
    path = str(hostile("os.system", write, progressive))
    model = ["mamba_pkd_s1"] if command == "export" else []
    assert main([command, *model, "--config", path, "--safe-config"]) == 2
    assert "os.system is refused by --safe-config" in capsys.readouterr().err
    assert not (place / "marker").exists() and not (place / "runs").exists()


def test_the_config_of_an_exported_run(place, progressive, write, capsys):
    hostile("os.system", write, progressive).rename(place / "run" / "config.yaml")
    assert main(["export", "./run", "--format", "pt2", "--safe-config"]) == 2
    assert "os.system is refused by --safe-config" in capsys.readouterr().err
    assert not (place / "marker").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_configs(path, monkeypatch, tmp_path):
    """They are allowed where the command line names the folders that they write to, and nowhere else."""
    monkeypatch.chdir(tmp_path)
    cache = Path("runs" if path.parent.name == "digits" else "resource")
    source = Source.read(path)
    set_cache_dir(source.root, str(cache))
    require_safe(source, Folders(Path("run"), cache))
    if "dst_ckpt" in path.read_text():
        with pytest.raises(ConfigError, match="outside --output run"):
            require_safe(Source.read(path), Folders(Path("run")))
    if "timm_mamba_pkd.progressive" in path.read_text():
        assert expand(path, safe=True) == expand(path)


def test_expanded_configs_are_judged_like_their_schedules(tmp_path):
    for path in CONFIGS:
        if "timm_mamba_pkd.progressive" in path.read_text():
            (tmp_path / "expanded.yaml").write_text(expand(path))
            require_safe(Source.read(tmp_path / "expanded.yaml"), Folders(Path("run"), Path()))
            text = (tmp_path / "expanded.yaml").read_text()
            (tmp_path / "expanded.yaml").write_text(re.sub(r"rule: \{key: \w+", "rule: {key: evil.Rule", text))
            with pytest.raises(ConfigError, match=r"rule evil\.Rule is refused"):
                require_safe(Source.read(tmp_path / "expanded.yaml"), Folders(Path("run"), Path()))


def test_torchdistills_ways_to_write(tmp_path):
    """What torchdistill's own configs use: joined paths, weights by getattr, keys under anchors, private entries."""
    (tmp_path / "config.yaml").write_text(
        """
datasets:
  &train a/train: !import_call
    _root: &root !join ['~/datasets/', a]
    key: torchvision.datasets.ImageFolder
    init:
      kwargs:
        root: !join [*root, /train]
        loader: !import_call {key: torchdistill.datasets.sample_loader.JpegCompressionLoader, init: {kwargs: {jpeg_quality: 90}}}
        transform: !import_call
          key: Compose
          package: torchvision.transforms.v2
          init: {args: [[!import_call {key: torchvision.transforms.v2.ToDtype, init: {args: [!import_get {key: torch.float32}]}}]]}
  b: !import_call {key: timm.data.create_dataset, init: {args: [''], kwargs: {root: x, transform: !import_call {key: timm.data.create_transform, init: {kwargs: {input_size: 32}}}}}}
models:
  model:
    key: resnet18
    _weights: &weights !import_get {key: torchvision.models.resnet.ResNet18_Weights}
    kwargs: {num_classes: 1000, weights: !getattr [*weights, IMAGENET1K_V1]}
    dst_ckpt: !join [./run/, a, .pt]
    src_ckpt: !expanduser ~/x.pt
    _path: !abspath x
train: {sampler: {class_or_func: !import_get {key: torch.utils.data.distributed.DistributedSampler}}}
test: {}
"""
    )
    require_safe(Source.read(tmp_path / "config.yaml"), Folders(Path("run")))


def test_a_folder_of_tar_files_is_an_empty_folder(place, progressive, write, run, errors):
    """timm reads neither them nor what it may once have noted beside them."""
    (place / "tars").mkdir()
    with tarfile.open(place / "tars" / "x.tar", "w") as archive:
        archive.add("evil.py", "a/0.png")
    for name in ("x", "tars"):
        (place / "tars" / f"_{name}_tarinfos.pickle").write_bytes(b"cposix\nsystem\n(S'touch marker'\ntR.")
    path = write(progressive)
    folder = call("timm.data.create_dataset", "''", root="tars", split="x")
    path.write_text(path.read_text().replace("datasets:\n", f"datasets:\n  x: {folder}\n", 1))
    before = {file: file.stat().st_mtime_ns for file in place.rglob("*")}
    assert run(path, "--safe-config", command="check")[0] == 2
    assert "Found 0 images in subfolders of tars" in errors()[0]
    assert {file: file.stat().st_mtime_ns for file in place.rglob("*")} == before


def test_the_list_is_of_objects():
    """Whatever the spelling; and each is defined in one of the packages."""
    assert all(
        thing.__module__.split(".")[0] in ("torchvision", "timm", "torchdistill", "timm_mamba_pkd") for thing in CALLED
    )
    assert "system" not in {thing.__name__ for thing in CALLED}
    assert {"independent", "residual", "bdistil", "assistant"} == set(RULES)


def test_a_safe_run_is_the_same_run(progressive, write, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []
    for name, flags in (("a", []), ("b", ["--safe-config"])):
        code, folder = run(progressive, *flags, output=name)
        assert code == 0
        folders.append(folder)
    weights = [(folder / "weights" / "ensemble.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]


def test_modules_of_the_working_folder_are_not_found(tmp_path, monkeypatch):
    """Not even those that a library imports only if they are there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "sklearn.py").write_text("open('marker', 'w')\n")
    text = (ROOT / "yaml_configs" / "digits" / "teacher.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text)
    program = (
        "import sys; before = list(sys.path); sys.path.remove(''); from timm_mamba_pkd.cli import main; "
        "sys.modules.pop('sklearn', None); sys.path[:] = ['', sys.argv.pop(1)]; "
        "sys.exit(main(['check', '--config', 'config.yaml', *sys.argv[1:]]))"
    )
    for flags, found in ((["--safe-config", "--cache-dir", "runs"], False), ([], True)):
        result = subprocess.run(
            [sys.executable, "-c", program, "hidden", *flags],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert result.returncode == 2 and (found or "needs scikit-learn" in result.stderr), result.stderr
        assert (tmp_path / "marker").exists() is found, result.stderr


def test_cache_dir_names_the_caches(progressive, write, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, cache_dir in enumerate([None, "../elsewhere"]):
        if cache_dir is not None:
            progressive["train"]["init"]["kwargs"]["cache_dir"] = cache_dir
        code, _ = run(progressive, "--safe-config", "--cache-dir", f"caches{number}", output=f"run{number}")
        assert code == 0, capsys.readouterr().err
        assert [path.name[:7] for path in sorted((tmp_path / f"caches{number}").iterdir())] == ["mamba_p", "teacher"]
    assert not (tmp_path.parent / "elsewhere").exists()
    (tmp_path / "expanded.yaml").write_text(expand(write(progressive)))
    code, _ = run(tmp_path / "expanded.yaml", "--safe-config", "--cache-dir", "caches2", output="run2")
    assert code == 0 and (tmp_path / "caches2").is_dir()


def test_cache_dir_without_a_schedule(plain, run, errors):
    code, _ = run(plain, "--cache-dir", "x", command="check")
    assert code == 2 and "--cache-dir is for a progressive schedule" in errors()[0]


@pytest.mark.parametrize("text", ["run/x", "run", "./run/a/../b", "cache/x"])
def test_inside(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not Folders(Path("run"), Path("cache")).outside(text)


@pytest.mark.parametrize("text", ["runx", "run/../x", "/run", "~/run", "run/\0", 5, None, ["run"], "", ".", "../run"])
def test_outside(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Folders(Path("run"), Path("cache")).outside(text)
