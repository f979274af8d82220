"""What happens around an epoch of a progressive stage: torchdistill's pre-epoch and post-epoch processes of ours."""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchdistill.core.interfaces.post_epoch_proc import default_post_epoch_process_with_teacher
from torchdistill.core.interfaces.pre_epoch_proc import default_pre_epoch_process_with_teacher
from torchdistill.core.interfaces.registry import register_post_epoch_proc_func, register_pre_epoch_proc_func

from timm_mamba_pkd.distillation.logits_cache import cache_bytes, require_folder
from timm_mamba_pkd.distillation.stage import CachedTeacher, StageWrapper
from timm_mamba_pkd.distillation.views import Stream, Views
from timm_mamba_pkd.distributed import all_sum, gather, in_order, is_main, share_of, world
from timm_mamba_pkd.models.combination import fit_weights

logger = logging.getLogger(__name__)

PRE_EPOCH = "mamba_pkd_pre_epoch"
POST_EPOCH = "mamba_pkd_post_epoch"


@register_pre_epoch_proc_func(key=PRE_EPOCH)
def pre_epoch(self: Any, epoch: int | None = None, **kwargs: Any) -> None:
    """torchdistill's own; the teacher in eval mode, where torchdistill never puts it; the epoch's views; the caches."""
    default_pre_epoch_process_with_teacher(self, epoch=epoch, **kwargs)
    self.teacher_model.eval()
    wrapper, views = self.student_model, self.train_data_loader.dataset
    if not isinstance(views, (Views, Stream)):
        return
    length = self.train_config[f"stage{self.stage_number}"]["num_epochs"]
    in_stage = self.current_epoch - (self.stage_end_epoch - length)
    if isinstance(views, Views):
        views.set_epoch(in_stage)
    if isinstance(wrapper, StageWrapper) and not wrapper.started:
        wrapper.started = True
        wrapper.start_rule(len(views))
        if isinstance(views, Views):
            _start_caches(self, wrapper, views)
        else:
            _check_stream(wrapper, views, length)


def _check_stream(wrapper: StageWrapper, stream: Stream, num_epochs: int) -> None:
    """Raise a ValueError for what needs the samples' indices."""
    needs = {
        "cache_dir": wrapper.cache_dir is not None,
        f"rule {type(wrapper.rule).__name__}": wrapper.rule.judges,
        f"views.num_views: {stream.num_views}": (stream.num_views or num_epochs) < num_epochs,
    }
    for what in (name for name, needed in needs.items() if needed):
        raise ValueError(
            f"{what} needs samples that have an index, but the training set is read as a stream: remove it, or read "
            "the data by index (timm's hfds/, tar files, folders)"
        )


def _start_caches(box: Any, wrapper: StageWrapper, views: Views) -> None:
    cached_teacher = isinstance(box.teacher_model, CachedTeacher)
    new = (cached_teacher and wrapper.stage == 1) + (
        wrapper.cache_dir is not None and wrapper.rule.sees_earlier and wrapper.stage > 1
    )
    epochs = box.train_config[f"stage{box.stage_number}"]["num_epochs"]
    shown = min(views.num_views, epochs)
    wrapper.cache_bytes = new * cache_bytes(len(views), wrapper.ensemble.num_classes, shown)
    if wrapper.cache_dir is not None:
        require_folder(wrapper.cache_dir)
    if getattr(box, "rehearsing", False):
        return
    if cached_teacher:
        box.teacher_model.cache(views, wrapper.ensemble.num_classes)
    wrapper.cache_earlier(views)


@register_post_epoch_proc_func(key=POST_EPOCH)
def post_epoch(self: Any, metrics: Any = None, **kwargs: Any) -> None:
    """torchdistill's own; at the end of a stage the rule's verdict and what follows from it."""
    default_post_epoch_process_with_teacher(self, metrics=metrics, **kwargs)
    wrapper = self.student_model
    if isinstance(wrapper, StageWrapper) and self.current_epoch + 1 == self.stage_end_epoch:
        finish_stage(self)
        if not wrapper.finished:
            _train_again(self, wrapper)


@torch.no_grad()
def finish_stage(box: Any) -> None:
    """End the stage that ``box`` is in, once: the rule judges the student, and the combination's weights are fitted.

    A student that the rule rejects and that may be tried again stays unfinished; torchdistill's box goes on with it
    after its post-epoch process. ``box.can_extend`` says that whoever drives the box trains ``box.num_epochs`` epochs
    also when that number grows, as ``mamba-pkd train`` does and torchdistill's example script does not.
    """
    wrapper = getattr(box, "student_model", None)
    if not isinstance(wrapper, StageWrapper) or wrapper.finished or wrapper.verdict is not None:
        return
    rule = wrapper.rule
    if rule.judges:
        student, teacher = _training_logits(box, wrapper)
        verdict = wrapper.verdict = rule.finish_stage(student, teacher, wrapper.stage)
        logger.info("Stage %d  %s  %s", wrapper.stage, wrapper.ensemble.names[wrapper.position], verdict.message)
        if not verdict.passed and _can_train_again(box, wrapper):
            return
        rule.accept_stage(student, teacher, wrapper.stage)
    wrapper.finished = True
    _fit_combination(box, wrapper)
    _log_caches(box, wrapper)


def _can_train_again(box: Any, wrapper: StageWrapper) -> bool:
    attempt = _attempt(wrapper)
    reason = None
    if attempt >= wrapper.rule.max_retries:
        reason = f"it was trained {attempt + 1} times" if attempt else "the rule allows no retry"
    elif wrapper.rule.largest_first or attempt >= wrapper.position:
        reason = "there are no more students before it whose features it could reuse"
    elif not wrapper.ensemble.can_connect(wrapper.position, attempt + 1):
        reason = "only Mamba students can reuse the features of Mamba students"
    elif not getattr(box, "can_extend", False):
        reason = "training it again needs the mamba-pkd command"
    if reason is not None and is_main():
        logger.warning("Stage %d goes on as it is: %s", wrapper.stage, reason)
    return reason is None


def _train_again(box: Any, wrapper: StageWrapper) -> None:
    """Give the student connections to one more of the students before it, and the stage its epochs once more."""
    attempt = _attempt(wrapper) + 1
    wrapper.ensemble.training_state["attempts"] = {wrapper.position: attempt}
    wrapper.ensemble.connect(wrapper.position, attempt)
    logger.info("Stage %d is trained again, with the features of %d earlier students", wrapper.stage, attempt)
    config = box.train_config[f"stage{box.stage_number}"]
    box.clean_modules()
    box.stage_grad_count = 0
    box.setup(config)
    box.stage_end_epoch += config["num_epochs"]
    box.num_epochs += config["num_epochs"]


def _attempt(wrapper: StageWrapper) -> int:
    return wrapper.ensemble.training_state.get("attempts", {}).get(wrapper.position, 0)


def _training_logits(box: Any, wrapper: StageWrapper) -> tuple[Tensor, Tensor]:
    """Logits (N, C) of the current student and of the teacher on view 0 of every training sample."""
    loader, views = box.train_data_loader, box.train_data_loader.dataset
    views.set_epoch(0)
    batches = DataLoader(views, loader.batch_size or 128, num_workers=loader.num_workers, collate_fn=loader.collate_fn)
    student = wrapper.ensemble.alone(wrapper.position).eval()
    both: list[tuple[Tensor, Tensor]] = []
    for images, targets, supp_dict in share_of(batches):
        images = images.to(box.device)
        teacher = box.teacher_forward_proc(box.teacher_model, images, targets, supp_dict)
        both.append((student(images).float(), teacher.float()))
    wrapper.train()
    students, teachers = zip(*_everyones(both, box.device), strict=True)
    return torch.cat(students), torch.cat(teachers)


def _fit_combination(box: Any, wrapper: StageWrapper) -> None:
    """Fit the weights of the ensembles of the first 1, 2, ... students on the validation split."""
    ensemble = wrapper.ensemble
    count = ensemble.num_active
    if ensemble.weights is None or ensemble.active_positions != list(range(count)):
        return
    ensemble.eval()
    both: list[tuple[Tensor, Tensor]] = []
    for images, labels, *_ in share_of(box.val_data_loader):
        both.append((ensemble.student_logits(images.to(box.device)).float(), labels.to(box.device)))
    wrapper.train()
    logits, targets = zip(*_everyones(both, box.device), strict=True)
    for k in range(1, count + 1):
        row = fit_weights(torch.cat(logits, 1)[:k], torch.cat(targets), per_class=ensemble.combination == "per_class")
        ensemble.weights[k - 1, :k] = row
    logger.info("Fitted the weights of the ensemble on %d validation images", len(torch.cat(targets)))


def _everyones(batches: list[tuple[Tensor, Tensor]], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The tensors that all processes have made of their shares of the batches, in the loader's order."""
    if world() == 1:
        return batches
    parts = gather([(one.cpu(), other.cpu()) for one, other in batches])
    return [(one.to(device), other.to(device)) for one, other in in_order(parts)]


def _log_caches(box: Any, wrapper: StageWrapper) -> None:
    for who, caches in (
        ("teacher", [getattr(box.teacher_model, "cached", None)]),
        ("earlier students", wrapper.caches),
    ):
        counts = [cache.counts for cache in caches if cache is not None]
        if counts:
            read, computed = all_sum(torch.tensor(counts).sum(0)).tolist()
            logger.info("Stage %d  logits of %s: %d computed, %d cached", wrapper.stage, who, computed, read)
