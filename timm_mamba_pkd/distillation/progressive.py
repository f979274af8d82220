"""The progressive schedule: one template, expanded to a torchdistill stage for every student."""

import copy
import logging
from collections.abc import Sequence
from typing import Any

from timm_mamba_pkd.distillation.procs import POST_EPOCH, PRE_EPOCH
from timm_mamba_pkd.distillation.rules import build_rule
from timm_mamba_pkd.distillation.stage import CACHED_TEACHER, STAGE_WRAPPER
from timm_mamba_pkd.distillation.views import VIEWS, check_views

logger = logging.getLogger(__name__)

OWN_TERM = "rule"


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
    views: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    log_freq: int = 1000,
    amp: bool | str = False,
) -> dict[str, Any]:
    """Expand a progressive schedule to the ``train`` section of a torchdistill config, ``stage1`` to ``stageN``.

    Used in YAML as ``train: !import_call {key: timm_mamba_pkd.progressive, init: {kwargs: ...}}``, with a
    ``mamba_pkd_ensemble`` as student. Each stage trains one student; the teacher and the students trained before are
    frozen and in eval mode; optimizer and scheduler start afresh.

    Args:
        students: the names of the ensemble's students, in its order: one stage each.
        num_epochs, train_data_loader, val_data_loader, optimizer, scheduler, criterion, teacher, student: a stage's
            sections in torchdistill's own terms, used for every stage. ``teacher`` and ``student`` may be left out
            unless losses need hooks.
        rule: name of the progressive rule (``independent``, ``residual``, ``bdistil``, ``assistant``) or import path
            of a `Rule` of anybody's, or ``{key: name, kwargs: {...}}``. Its loss is added to ``criterion``'s
            ``sub_terms``.
        views: the replayable augmented views of the training set: ``num_views`` (default: ``num_epochs``, so that a
            stage sees each view once), ``seed``, ``mixup_alpha``, ``cutmix_alpha``, ``num_classes``; see `Views`.
        cache_dir: folder where the logits of the teacher and of earlier students on these views are kept, so that each
            is computed once for all stages and all runs; None computes them at every step.
        log_freq: steps between two log lines.
        amp: train under autocast in bfloat16 (True) or in the dtype named, 'bfloat16' or 'float16'; read by the
            mamba-pkd command only.

    Raises:
        ValueError: no students, an unknown rule or bad arguments to it, epochs below 1, views out of range, a teacher
            to be trained, a cache_dir beside a collate_fn, an auxiliary wrapper or forward_proc for the student,
            ``sequential`` parts of it with a rule that needs its logits, or a criterion without terms or with one
            named 'rule'.
    """
    _check_arguments(students, num_epochs, teacher or {}, student or {}, criterion)
    if cache_dir is not None:
        _check_cache(cache_dir, train_data_loader)
    chosen = build_rule(rule)
    rule = {"key": rule} if isinstance(rule, str) else rule
    parts = bool((student or {}).get("sequential"))  # torchdistill then runs them without the stage's wrapper
    if parts and (chosen.adds_loss or chosen.judges):
        raise ValueError(f"progressive: rule {rule['key']} needs the student's logits: remove student.sequential")
    terms = dict(criterion["kwargs"]["sub_terms"])
    if chosen.adds_loss:
        if OWN_TERM in terms:
            raise ValueError(f"progressive: the rule adds a term '{OWN_TERM}': give yours in criterion another name")
        terms[OWN_TERM] = {"criterion": {"key": "mamba_pkd_rule", "kwargs": {}}, "weight": 1.0}
    if not terms:
        raise ValueError("progressive: criterion has no sub_terms and the rule adds none: there is nothing to learn")
    template = {
        "num_epochs": num_epochs,
        "train_data_loader": _with_views(train_data_loader, views, num_epochs),
        "val_data_loader": val_data_loader,
        "teacher": _teacher(teacher or {}, cache_dir),
        "student": {"forward_proc": f"forward_batch_{'only' if parts else 'supp_dict'}", **(student or {})},
        "pre_epoch_process": PRE_EPOCH,
        "post_epoch_process": POST_EPOCH,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "criterion": {**criterion, "kwargs": {**criterion["kwargs"], "sub_terms": terms}},
    }
    stages = {}
    for k, position in enumerate(chosen.order(len(students)), start=1):
        stage = stages[f"stage{k}"] = copy.deepcopy(template)
        kwargs = {"stage": k, "name": students[position], "rule": copy.deepcopy(rule), "cache_dir": cache_dir}
        stage["student"]["auxiliary_model_wrapper"] = {"key": STAGE_WRAPPER, "kwargs": kwargs}
    return {"log_freq": log_freq, "amp": amp, **stages}


def _check_arguments(
    students: Any, num_epochs: Any, teacher: dict[str, Any], student: dict[str, Any], criterion: dict[str, Any]
) -> None:
    if isinstance(students, str) or not isinstance(students, Sequence) or not students:
        raise ValueError(f"progressive: students must be a list of at least one name, got {students!r}")
    if not isinstance(num_epochs, int) or num_epochs < 1:
        raise ValueError(f"progressive: num_epochs must be an integer of at least 1, got {num_epochs!r}")
    if teacher.get("requires_grad"):
        raise ValueError("progressive: the teacher stays frozen; remove teacher.requires_grad")
    for key in ("auxiliary_model_wrapper", "forward_proc"):
        if key in student:
            raise ValueError(f"progressive: student.{key} is the schedule's own; remove it")
    if not isinstance((criterion.get("kwargs") or {}).get("sub_terms"), dict):
        raise ValueError("progressive: criterion needs kwargs.sub_terms, as torchdistill's WeightedSumLoss has")


def _check_cache(cache_dir: Any, loader: dict[str, Any]) -> None:
    if not isinstance(cache_dir, str) or not cache_dir:
        raise ValueError(f"progressive: cache_dir must be the path of a folder, got {cache_dir!r}")
    if loader.get("collate_fn"):
        raise ValueError(
            f"progressive: train_data_loader.collate_fn {loader['collate_fn']} may change the images whose logits are "
            "cached: remove it, or cache_dir; mixup and cutmix are in views"
        )


def _with_views(loader: dict[str, Any], views: dict[str, Any] | None, num_epochs: int) -> dict[str, Any]:
    if views is not None and not isinstance(views, dict):
        raise ValueError(f"progressive: views must be a section such as {{num_views: 16}}, got {views!r}")
    kwargs = {"num_views": num_epochs, **(views or {})}
    unknown = sorted(set(kwargs) - {"num_views", "seed", "mixup_alpha", "cutmix_alpha", "num_classes"})
    if unknown:
        raise ValueError(
            f"progressive: views has no '{unknown[0]}'; it has num_views, seed, mixup_alpha, cutmix_alpha, num_classes"
        )
    check_views(**kwargs)
    wrapper = loader.get("dataset_wrapper")
    if wrapper:
        kwargs["wrapper"] = wrapper
    return {**loader, "dataset_wrapper": {"key": VIEWS, "kwargs": kwargs}}


def _teacher(teacher: dict[str, Any], cache_dir: str | None) -> dict[str, Any]:
    """The teacher's section, with the cache where only its logits are used."""
    section = {"forward_proc": "forward_batch_only", **teacher, "requires_grad": False}
    if cache_dir is None:
        return section
    hooks = teacher.get("forward_hook") or {}
    paths = sorted({path for kind in hooks.values() for path in kind or ()})
    own = [key for key in ("sequential", "adaptations", "auxiliary_model_wrapper", "forward_proc") if teacher.get(key)]
    if own == ["forward_proc"] and section["forward_proc"] == "forward_batch_only":
        own = []
    if paths or own:
        why = f"losses hook its {', '.join(paths)}" if paths else f"its section sets {', '.join(own)}"
        logger.info("The teacher runs at every step and its logits are not cached, because %s", why)
        return section
    section["forward_proc"] = "forward_batch_supp_dict"
    section["auxiliary_model_wrapper"] = {"key": CACHED_TEACHER, "kwargs": {"cache_dir": cache_dir}}
    return section
