"""The progressive schedule: one template, expanded to a torchdistill stage for every student."""

import copy
from collections.abc import Sequence
from typing import Any

from timm_mamba_pkd.distillation.bridges import unknown_name
from timm_mamba_pkd.distillation.rules import RULES, Rule
from timm_mamba_pkd.distillation.stage import STAGE_WRAPPER, TEACHER_IN_EVAL


def progressive(
    students: Sequence[str],
    num_epochs: int,
    train_data_loader: dict[str, Any],
    val_data_loader: dict[str, Any],
    optimizer: dict[str, Any],
    criterion: dict[str, Any],
    rule: str | dict[str, Any] = "residual",
    scheduler: dict[str, Any] | None = None,
    teacher: dict[str, Any] | None = None,
    student: dict[str, Any] | None = None,
    log_freq: int = 1000,
    amp: bool = False,
) -> dict[str, Any]:
    """Expand a progressive schedule to the ``train`` section of a torchdistill config, ``stage1`` to ``stageN``.

    Used in YAML as ``train: !import_call {key: timm_mamba_pkd.progressive, init: {kwargs: ...}}``, with a
    ``mamba_pkd_ensemble`` as student. Stage k trains student k; the teacher and the students before it are frozen and
    in eval mode; optimizer and scheduler start afresh.

    Args:
        students: the names of the ensemble's students, in its order: one stage each.
        num_epochs, train_data_loader, val_data_loader, optimizer, scheduler, criterion, teacher, student: a stage's
            sections in torchdistill's own terms, used for every stage. ``teacher`` and ``student`` may be left out
            unless losses need hooks.
        rule: name of the progressive rule (``independent``, ``residual``), or ``{key: name, kwargs: {...}}``. Its
            loss terms are added to ``criterion``'s ``sub_terms``.
        log_freq: steps between two log lines.
        amp: train under bfloat16 autocast (read by the mamba-pkd command only).

    Raises:
        ValueError: no students, an unknown rule or bad arguments to it, epochs below 1, a teacher to be trained, an
            auxiliary wrapper for the student, or a criterion without terms or with one that the rule adds.
    """
    if isinstance(students, str) or not students:
        raise ValueError(f"progressive: students must be a list of at least one name, got {students!r}")
    if not isinstance(num_epochs, int) or num_epochs < 1:
        raise ValueError(f"progressive: num_epochs must be an integer of at least 1, got {num_epochs!r}")
    if (teacher or {}).get("requires_grad"):
        raise ValueError("progressive: the teacher stays frozen; remove teacher.requires_grad")
    if "auxiliary_model_wrapper" in (student or {}):
        raise ValueError("progressive: student.auxiliary_model_wrapper is the schedule's own; remove it")
    if not isinstance((criterion.get("kwargs") or {}).get("sub_terms"), dict):
        raise ValueError("progressive: criterion needs kwargs.sub_terms, as torchdistill's WeightedSumLoss has")
    chosen = _build_rule(rule)
    template = {
        "num_epochs": num_epochs,
        "train_data_loader": train_data_loader,
        "val_data_loader": val_data_loader,
        "teacher": {"forward_proc": "forward_batch_only", **(teacher or {}), "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", **(student or {})},
        "pre_epoch_process": TEACHER_IN_EVAL,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "criterion": criterion,
    }
    stages = {f"stage{k}": _stage(template, chosen, k, name) for k, name in enumerate(students, start=1)}
    return {"log_freq": log_freq, "amp": amp, **stages}


def _build_rule(rule: str | dict[str, Any]) -> Rule:
    config: dict[str, Any] = {"key": rule} if isinstance(rule, str) else rule
    if not isinstance(config, dict) or not {"key"} <= set(config) <= {"key", "kwargs"}:
        raise ValueError(f"progressive: rule must be a name or {{key: name, kwargs: {{...}}}}, got {rule!r}")
    name, kwargs = config["key"], config.get("kwargs") or {}
    if name not in RULES:
        raise ValueError(unknown_name("rule", name, RULES))
    try:
        return RULES[name](**kwargs)
    except TypeError as error:
        raise ValueError(f"rule {name}: {error}") from error


def _stage(template: dict[str, Any], rule: Rule, k: int, name: str) -> dict[str, Any]:
    stage = copy.deepcopy(template)
    student = stage["student"]
    student["auxiliary_model_wrapper"] = {
        "key": STAGE_WRAPPER,
        "kwargs": {"stage": k, "name": name, "sees_earlier": rule.sees_earlier},
    }
    if rule.sees_earlier and k > 1:
        hooks = student.setdefault("forward_hook", {})
        hooks["output"] = [*(hooks.get("output") or []), Rule.EARLIER]
    terms, added = stage["criterion"]["kwargs"]["sub_terms"], rule.loss_terms(k)
    taken = sorted(set(terms) & set(added))
    if taken:
        raise ValueError(f"progressive: the rule adds a term '{taken[0]}': give yours in criterion another name")
    terms.update(added)
    if not terms:
        raise ValueError("progressive: criterion has no sub_terms and the rule adds none: there is nothing to learn")
    return stage
