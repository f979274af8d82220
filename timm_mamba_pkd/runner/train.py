"""``mamba-pkd train``: torchdistill's stock boxes, driven over all epochs of all stages of a config."""

import logging
import time
from typing import Any

import torch
from torch import nn

from timm_mamba_pkd.distillation import StageWrapper, finish_stage
from timm_mamba_pkd.models import MambaPKDEnsemble, save_checkpoint, save_weights
from timm_mamba_pkd.runner.box import Box
from timm_mamba_pkd.runner.config import ConfigError, Job
from timm_mamba_pkd.runner.evaluate import evaluate, evaluate_ensemble
from timm_mamba_pkd.runner.progress import progress
from timm_mamba_pkd.runner.run_folder import RunFolder

logger = logging.getLogger(__name__)


def train(job: Job, box: Box, run: RunFolder, device: torch.device, amp: bool = False) -> None:
    """Train every stage of ``job`` in its ``box`` and leave metrics and weights in ``run``.

    Each epoch adds a line to metrics.jsonl and rewrites the weights; the end of a progressive stage leaves that
    stage's student under its own name. ``dst_ckpt`` of the config is written at the end, in
    torchdistill's format unless it is named .safetensors.

    Raises:
        ConfigError: a loss reads what no hook records, or a label is none of the model's classes.
        FloatingPointError: the loss is not finite.
    """
    if amp:
        _keep_logits_in_float32(job)
    started = time.perf_counter()
    box.can_extend = True  # pyright: ignore[reportAttributeAccessIssue]  (a stage may be trained again)
    epoch = 0
    while epoch < box.num_epochs:
        stage = getattr(box, "stage_number", 1)
        box.pre_epoch_process(epoch=epoch)
        record = _train_one_epoch(job, box, device, amp, epoch)
        if isinstance(job.student, MambaPKDEnsemble) and epoch + 1 == getattr(box, "stage_end_epoch", None):
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                finish_stage(box)
        record |= _validate(job, box, device, amp)
        lr = box.optimizer.param_groups[0]["lr"]  # pyright: ignore[reportOptionalMemberAccess]
        run.log_metrics(stage=stage, epoch=epoch, lr=lr, **record)
        alone = record["val_top1_student"]
        logger.info(
            "stage %d  epoch %d/%d  %sloss %.4f  val top-1 %.2f%s  %.0f images/s",
            stage, epoch + 1, box.num_epochs, f"{record['student']}  " if record["student"] else "",
            record["loss"], record["val_top1"], "" if alone is None else f" (alone {alone:.2f})", record["img_per_s"],
        )  # fmt: skip
        _save(job.student, box, run)
        box.post_epoch_process(metrics=record["val_top1"])
        epoch += 1
    box.clean_modules()
    if job.destination is not None:
        save = save_weights if job.destination.suffix == ".safetensors" else save_checkpoint
        save(job.student, job.destination)
    logger.info("Trained %d epochs in %.0f s", box.num_epochs, time.perf_counter() - started)


def _train_one_epoch(job: Job, box: Box, device: torch.device, amp: bool, epoch: int) -> dict[str, Any]:
    loader: Any = box.train_data_loader
    log_freq = job.config["train"].get("log_freq", 1000)
    total_loss, samples, started = 0.0, 0, time.perf_counter()
    bar = progress(loader, f"epoch {epoch + 1}/{box.num_epochs}")
    for step, (images, targets, supp_dict) in enumerate(bar, start=1):
        if not targets.is_floating_point() and targets.max() >= job.num_classes:
            raise ConfigError(
                f"the data has label {targets.max()}, the models have {job.num_classes} classes: set num_classes"
            )
        images, targets = images.to(device), targets.to(device)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss = box.forward_process(images, targets, supp_dict)
        except KeyError as error:
            raise ConfigError(f"a loss reads {error}, which no forward_hook of this stage records") from error
        if not isinstance(loss, torch.Tensor):
            raise ConfigError("criterion has no sub_terms: there is nothing to learn")
        value = loss.item()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {value} at epoch {epoch + 1}, step {step}: lower the lr")
        box.post_forward_process(loss=loss)
        total_loss += value * len(targets)
        samples += len(targets)
        if step % log_freq == 0:
            rate = samples / (time.perf_counter() - started)
            logger.info("epoch %d  step %d/%d  loss %.4f  %.0f images/s", epoch + 1, step, len(loader), value, rate)
    seconds = time.perf_counter() - started
    return {"loss": total_loss / samples, "img_per_s": samples / seconds, "seconds": seconds}


def _validate(job: Job, box: Box, device: torch.device, amp: bool) -> dict[str, Any]:
    loader: Any = box.val_data_loader
    if not isinstance(job.student, MambaPKDEnsemble):
        top1 = evaluate(job.student, loader, device, (1,), amp, "validation")[0]
        return {"student": None, "val_top1": top1, "val_top1_student": None}
    ensemble, wrapper = job.student, getattr(box, "student_model", None)
    alone, together = evaluate_ensemble(ensemble, loader, device, amp, "validation")
    position = wrapper.position if isinstance(wrapper, StageWrapper) else ensemble.active_positions[-1]
    verdict = wrapper.verdict if isinstance(wrapper, StageWrapper) else None
    return {
        "student": ensemble.names[position],
        "val_top1": together[-1],
        "val_top1_student": alone[ensemble.active_positions.index(position)],
        **({} if verdict is None else {"verdict": verdict.message, "passed": verdict.passed, **verdict.metrics}),
    }


def _save(model: nn.Module, box: Box, run: RunFolder) -> None:
    """The whole model, and for an ensemble also the student in training, under its position and name, and the rule."""
    if not isinstance(model, MambaPKDEnsemble):
        save_weights(model, run.weights("model"))
        return
    wrapper = getattr(box, "student_model", None)
    if isinstance(wrapper, StageWrapper):
        student = model.alone(wrapper.position)
        save_weights(student, run.weights(f"{wrapper.position + 1}_{model.names[wrapper.position]}"))
        if wrapper.rule.state_dict():
            save_weights(wrapper.rule, run.weights("rule"))
    save_weights(model, run.weights("ensemble"))


def _keep_logits_in_float32(job: Job) -> None:
    """Losses see float32 logits under autocast, as in timm and accelerate."""
    for model in (job.teacher, job.student):
        if model is not None:
            model.register_forward_hook(lambda module, args, output: output.float())
