"""What torchdistill 1.1.5 and this package read in each section of a config; all else in it is a mistake.

torchdistill itself passes over a key that it does not know. The check runs on the YAML nodes, so nothing is executed.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from torch.utils.data import DataLoader

from timm_mamba_pkd.distillation import progressive
from timm_mamba_pkd.runner.errors import unknown_key
from timm_mamba_pkd.runner.source import Source, article, child, pairs, walk

Problem = tuple[int, str]
"""A line of the config and what is wrong there."""


@dataclass(frozen=True)
class Section:
    """A mapping with known keys. Keys that begin with ``_`` are upstream's way to define anchors: always allowed.

    ``kwargs`` says what the key ``kwargs`` holds for certain values of the key ``key``.
    """

    keys: Mapping[str, Any]
    required: tuple[str, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Each:
    """A mapping from any names to values of one kind; some names may have a kind of their own."""

    spec: Any
    known: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Items:
    """A list of values of one kind."""

    spec: Any


@dataclass(frozen=True)
class Value:
    """A scalar or a list, of a YAML type and in a range."""

    words: str
    tags: tuple[str, ...]
    fits: Callable[[str], bool] = field(default=lambda text: True)


@dataclass(frozen=True)
class Maybe:
    """What may also be left empty."""

    spec: Any


def _at_least(bound: float) -> Callable[[str], bool]:
    return lambda text: yaml.safe_load(text) >= bound


ANY = None
FLAG = Value("True or False", ("bool",))
PATHS = Value("a list of module paths", ("seq",))
NUMBER = Value("a number", ("int", "float"))
PATH = Value("a path", ("str",))
POSITIVE = Value("an integer of at least 1", ("int",), _at_least(1))
COUNT = Value("an integer of at least 0", ("int",), _at_least(0))

KEYED = Section({"key": ANY, "kwargs": Each(ANY)}, ("key", "kwargs"))
WRAPPER = Section({"key": ANY, "args": Maybe(ANY), "kwargs": Maybe(ANY)}, ("key",))
LOADER = Section(
    {
        "dataset_id": ANY,
        "dataset_wrapper": Maybe(WRAPPER),
        "sampler": Section({"class_or_func": ANY, "kwargs": Maybe(ANY)}, ("class_or_func",)),
        "batch_sampler": Maybe(KEYED),
        "collate_fn": Maybe(ANY),
        "requires_supp": FLAG,
        "cache_output": Maybe(ANY),  # read by torchdistill before 1.0, still in its configs
        "kwargs": Section(
            dict.fromkeys(inspect.signature(DataLoader).parameters)
            | {"batch_size": Maybe(POSITIVE), "num_workers": COUNT, "drop_last": FLAG, "pin_memory": FLAG}
        ),
    },
    ("dataset_id", "kwargs"),
)
REDESIGN = {"adaptations": Maybe(Each(KEYED)), "sequential": Maybe(PATHS), "frozen_modules": PATHS}
ROLE = Section(
    {
        **REDESIGN,
        "forward_proc": ANY,
        "forward_hook": Section({"input": PATHS, "output": PATHS}),
        "auxiliary_model_wrapper": Section({"key": ANY, "kwargs": Maybe(ANY), **REDESIGN}, ("key",)),
        "wrapper": Maybe(ANY),
        "requires_grad": FLAG,
        "src_ckpt": Maybe(PATH),
    }
)
MODULE_WISE = Items(Section({"module": ANY, "kwargs": Maybe(ANY), "is_teacher": FLAG}, ("module",)))
OPTIMIZER = Section(
    {
        "key": ANY,
        "kwargs": Each(ANY, dict.fromkeys(("lr", "weight_decay", "momentum"), NUMBER)),
        "module_wise_configs": MODULE_WISE,
        "module_wise_kwargs": MODULE_WISE,
        "filters_params": FLAG,
        "max_grad_norm": Maybe(NUMBER),
        "grad_accum_step": POSITIVE,
    },
    ("key", "kwargs"),
)
SCHEDULER = Section(
    {
        "key": ANY,
        "kwargs": Each(ANY, dict.fromkeys(("gamma", "step_size", "T_max"), NUMBER)),
        "scheduling_step": COUNT,
    },
    ("key", "kwargs"),
)
RECORDED = {"is_from_teacher": FLAG, "module_path": ANY, "io": ANY}
COMPARED = {
    "input": Section(RECORDED, tuple(RECORDED)),
    "target": Section({"uses_label": FLAG, **RECORDED}),
}
LOSS_WRAPPER = Section(
    WRAPPER.keys,
    ("key",),
    {
        "SimpleLossWrapper": Section(COMPARED, ("input",)),
        "DictLossWrapper": Section({**COMPARED, "weights": Each(NUMBER)}, ("input", "weights")),
    },
)
TERM = Section(
    {"criterion": KEYED, "criterion_wrapper": Maybe(LOSS_WRAPPER), "weight": NUMBER}, ("criterion", "weight")
)
CRITERION = Section(
    {**WRAPPER.keys, "func2extract_model_loss": Maybe(ANY)},
    ("key",),
    {"WeightedSumLoss": Section({"model_term": Maybe(Section({"weight": NUMBER})), "sub_terms": Maybe(Each(TERM))})},
)
STAGE = {
    "num_epochs": POSITIVE,
    "train_data_loader": LOADER,
    "val_data_loader": LOADER,
    "teacher": ROLE,
    "student": ROLE,
    "model": ROLE,
    "optimizer": OPTIMIZER,
    "scheduler": Maybe(SCHEDULER),
    "criterion": CRITERION,
    "pre_epoch_process": ANY,
    "pre_forward_process": ANY,
    "post_forward_process": ANY,
    "post_epoch_process": ANY,
}
STAGE_NEEDS = ("num_epochs", "criterion")
AMP = Value("True, False, bfloat16 or float16", ("bool", "str"))
WHOLE = {"log_freq": POSITIVE, "amp": AMP}
FIRST_NEEDS = ("train_data_loader", "val_data_loader")
BESIDE_STAGES = dict.fromkeys(("teacher", "student", "model"), Section({"dst_ckpt": Maybe(PATH)}))
MODEL = Section(
    {
        "key": ANY,
        "kwargs": Maybe(Each(ANY)),
        "src_ckpt": Maybe(PATH),
        "dst_ckpt": Maybe(PATH),
        "repo_or_dir": Maybe(ANY),
        "quantized": FLAG,
        "sync_bn": FLAG,
    },
    ("key",),
)
ROOT = Section(
    {
        "dependencies": Maybe(ANY),
        "datasets": Each(ANY),
        "models": Section(dict.fromkeys(("teacher_model", "student_model", "model"), MODEL)),
        "test": Section({"test_data_loader": LOADER, "log_freq": POSITIVE, "topk": Maybe(ANY)}, ("test_data_loader",)),
        "tracker": Maybe(Section({"engine": ANY, "kwargs": Maybe(ANY)})),
        "train": ANY,
    },
    ("datasets", "models", "train", "test"),
)
_CALL = {"key": ANY, "package": Maybe(ANY), "init": Maybe(Section({"args": ANY, "kwargs": Each(ANY)}))}
TAGS = {
    "!import_get": Section({"key": ANY, "package": Maybe(ANY)}, ("key",)),
    "!import_call": Section(_CALL, ("key",)),
    "!import_call_method": Section({**_CALL, "class_name": ANY, "method_name": ANY}, ("package",)),
    "!call_method": Section({"obj": ANY, "method_name": ANY, "args": ANY, "kwargs": ANY, "returns_obj": FLAG}),
    "!access_by_index_or_key": Section({"data": ANY, "index_or_key": ANY}, ("data", "index_or_key")),
}


def check_schema(source: Source) -> list[str]:
    """Check every key of a config and the values whose type is certain; returns warnings.

    Raises:
        ConfigError: with a line for each unknown or missing key, wrong type, value out of range, and each stage that
            would train its teacher without saying so.
    """
    problems: list[Problem] = []
    for node in walk(source.root):
        if node.tag in TAGS:
            called = child(node, "key") or child(node, "package")
            name = f"{node.tag} {called.value}" if isinstance(called, yaml.ScalarNode) else node.tag
            problems += _keys(node, TAGS[node.tag], name)
    source.refuse(list(_lost_calls(source.root)))
    problems += _keys(source.root, ROOT, "")
    problems += _train(source.root)
    source.refuse(problems)
    return [source.say(message, line) for line, message in _shared_optimizers(source.root)]


def schedule_arguments(root: yaml.Node) -> yaml.Node | None:
    """The arguments of ``timm_mamba_pkd.progressive``, if that is what ``train`` is."""
    train = child(root, "train")
    if train is None or train.tag != "!import_call":
        return None
    parts = [str(part.value) for part in (child(train, "package"), child(train, "key")) if part is not None]
    if not re.fullmatch(r"timm_mamba_pkd\.(distillation\.(progressive\.)?)?progressive", ".".join(filter(None, parts))):
        return None
    return child(child(train, "init"), "kwargs")


def set_cache_dir(root: yaml.Node, cache_dir: str) -> bool:
    """Have a config's schedule, or the stages that one was expanded to, cache logits in a folder; False without one."""
    sections = [schedule_arguments(root)]
    for node in walk(root):
        kwargs = child(child(node, "auxiliary_model_wrapper"), "kwargs")
        cached = child(kwargs, "cache_dir")
        if cached is not None and not cached.tag.endswith(":null"):
            sections.append(kwargs)
    found = [section for section in sections if isinstance(section, yaml.MappingNode)]
    for section in found:
        mark = section.start_mark
        key, value = (yaml.ScalarNode("tag:yaml.org,2002:str", text, mark, mark) for text in ("cache_dir", cache_dir))
        section.value = [pair for pair in section.value if pair[0].value != "cache_dir"] + [(key, value)]
    return bool(found)


def _train(root: yaml.Node) -> Iterator[Problem]:
    train = child(root, "train")
    if train is None:
        return
    arguments = schedule_arguments(root)
    if arguments is not None:
        yield from _check(arguments, _schedule(), "progressive", arguments)
    if train.tag.startswith("!"):
        return
    stages = _stages(train)
    if not stages:
        yield from _check(train, Section({**WHOLE, **STAGE}, (*STAGE_NEEDS, *FIRST_NEEDS)), "train", train)
        stages = [(train, "train", train)]
    else:
        first, late = Section(STAGE, (*STAGE_NEEDS, *FIRST_NEEDS)), Section(STAGE, STAGE_NEEDS)
        specs = {key.value: first if key.value == "stage1" else late for key, _, _ in stages}
        yield from _keys(train, Section({**WHOLE, **BESIDE_STAGES, **specs}), "train")
        missing = next(n for n in range(1, 2 + len(stages)) if f"stage{n}" not in specs)
        if missing <= len(stages):
            yield _line(stages[-1][0]), f"train has no 'stage{missing}', but {len(stages)} stages"
    if child(child(root, "models"), "teacher_model") is not None:
        for key, where, stage in stages:
            yield from _trained_teacher(key, where, stage)


def _stages(train: yaml.Node) -> list[tuple[yaml.Node, str, yaml.Node]]:
    """Key, name and section of every stage; empty where the whole of ``train`` is one."""
    found = [(key, value) for key, value in pairs(train) if re.fullmatch(r"stage\d+", key.value)]
    return [(key, f"train.{key.value}", value) for key, value in found]


def _schedule() -> Section:
    parameters = inspect.signature(progressive).parameters
    keys, required = {}, []
    for name, parameter in parameters.items():
        spec = {**WHOLE, **STAGE}.get(name)
        keys[name] = Maybe(spec) if parameter.default is None else spec
        if parameter.default is parameter.empty:
            required.append(name)
    return Section(keys, tuple(required))


def _lost_calls(root: yaml.Node) -> Iterator[Problem]:
    """Sections that would have been called under a tag, and are none otherwise."""
    found = [(key, value, "datasets." + key.value) for key, value in pairs(child(root, "datasets"))]
    found += [(key, value, "train") for key, value in pairs(root) if key.value == "train"]
    for key, value, where in found:
        if not value.tag.startswith("!") and child(value, "key") is not None:
            yield _line(key), f"{where} has a 'key', but is not called: write !import_call before it"


def _trained_teacher(key: yaml.Node, where: str, stage: yaml.Node) -> Iterator[Problem]:
    """torchdistill trains the teacher unless told otherwise."""
    if stage.tag.startswith("!"):
        return
    teacher = child(stage, "teacher")
    if teacher is None:
        yield (
            _line(key),
            (
                f"{where} has no section 'teacher', so it would train the teacher: add "
                "teacher: {forward_proc: forward_batch_only, requires_grad: False}"
            ),
        )
    elif not teacher.tag.startswith("!") and child(teacher, "requires_grad") is None:
        frozen = child(teacher, "frozen_modules")
        if frozen is None or not frozen.value:
            name = next(name for name, _ in pairs(stage) if name.value == "teacher")
            yield (
                _line(name),
                (
                    f"{where}.teacher would be trained, which is torchdistill's default: set requires_grad: False "
                    "(or True, if that is meant)"
                ),
            )


def _shared_optimizers(root: yaml.Node) -> Iterator[Problem]:
    train = child(root, "train")
    owners: dict[int, str] = {}
    for _, where, stage in _stages(train) if train is not None and not train.tag.startswith("!") else []:
        name = next((name for name, _ in pairs(stage) if name.value == "optimizer"), None)
        kwargs = child(child(stage, "optimizer"), "kwargs")
        if name is not None and kwargs is not None and owners.setdefault(id(kwargs), where) != where:
            yield (
                _line(name),
                (
                    f"{where}.optimizer is that of {owners[id(kwargs)]} by alias: under torchdistill's -adjust_lr its "
                    "learning rate is multiplied in each of them; write it out twice"
                ),
            )


def _check(node: yaml.Node, spec: Any, where: str, key: yaml.Node) -> Iterator[Problem]:
    """What is wrong with a value under ``key``. What tags build is known only once the config is loaded."""
    while isinstance(spec, Maybe):
        spec = ANY if node.tag.endswith(":null") else spec.spec
    if spec is ANY or node.tag.startswith("!"):
        return
    if isinstance(spec, Value):
        fits = node.tag.rsplit(":", 1)[-1] in spec.tags
        if not fits or (isinstance(node, yaml.ScalarNode) and not spec.fits(node.value)):
            yield _line(key), f"{where} must be {spec.words}, got {article(node)}"
    elif isinstance(spec, Items):
        if not isinstance(node, yaml.SequenceNode):
            yield _line(key), f"{where} must be a list, got {article(node)}"
            return
        for number, item in enumerate(node.value, start=1):
            yield from _check(item, spec.spec, f"{where}.{number}", item)
    elif not isinstance(node, yaml.MappingNode):
        yield _line(key), f"{where} must be a section, got {article(node)}"
    elif isinstance(spec, Each):
        for name, value in pairs(node):
            yield from _check(value, spec.known.get(name.value, spec.spec), f"{where}.{name.value}", name)
    elif isinstance(spec, Section):
        yield from _keys(node, spec, where, key)


def _keys(node: yaml.Node, spec: Section, where: str, place: yaml.Node | None = None) -> Iterator[Problem]:
    """What is wrong with the keys of a section and below them."""
    found = pairs(node)
    if where.endswith("optimizer") and not found:
        return  # torchdistill takes an empty one for none
    kind = child(node, "key")
    inner = spec.kwargs.get(kind.value) if isinstance(kind, yaml.ScalarNode) else None
    meant: set[str] = set()
    for key, value in found:
        name = key.value
        if name in spec.keys:
            yield from _check(value, inner if name == "kwargs" and inner else spec.keys[name], _join(where, name), key)
        elif not name.startswith("_"):
            below = spec.keys.get("kwargs")
            if isinstance(below, Section) and name in below.keys:
                yield _line(key), f"unknown key '{name}' in {where}; it belongs in {where}.kwargs"
                continue
            yield _line(key), unknown_key(name, where or "the config", spec.keys)
            meant.update(difflib.get_close_matches(name, spec.keys, n=1))
    for name in spec.required:
        if name not in meant and name not in {key.value for key, _ in found}:
            yield _line(place or node), f"{where} has no '{name}'" if where else f"there is no section '{name}'"


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
