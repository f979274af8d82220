"""``mamba-pkd train``: torchdistill's stock boxes, driven over all epochs of all stages of a config."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from timm_mamba_pkd import distributed
from timm_mamba_pkd.distillation import StageWrapper, finish_stage
from timm_mamba_pkd.layers.sync_batch_norm import synchronize_batch_norms
from timm_mamba_pkd.models import MambaPKDEnsemble, save_weights
from timm_mamba_pkd.models.state_dict import not_finite
from timm_mamba_pkd.runner import interrupts
from timm_mamba_pkd.runner.average import WeightAverage, in_training
from timm_mamba_pkd.runner.batches import Batches
from timm_mamba_pkd.runner.box import Box, build_box
from timm_mamba_pkd.runner.check import StageEstimate
from timm_mamba_pkd.runner.checkpoints import Checkpoints
from timm_mamba_pkd.runner.compiling import compile_models
from timm_mamba_pkd.runner.config import Job, require_known_labels
from timm_mamba_pkd.runner.destination import save_destination
from timm_mamba_pkd.runner.device import autocast, keep_logits_in_float32
from timm_mamba_pkd.runner.errors import ConfigError, first_line
from timm_mamba_pkd.runner.evaluate import evaluate, evaluate_ensemble
from timm_mamba_pkd.runner.progress import progress as with_progress
from timm_mamba_pkd.runner.record import describe_start
from timm_mamba_pkd.runner.run_folder import RunFolder
from timm_mamba_pkd.runner.step import Step
from timm_mamba_pkd.runner.streams import start_epoch
from timm_mamba_pkd.runner.time_left import time_left
from timm_mamba_pkd.runner.tracking import Tracker
from timm_mamba_pkd.runner.training_state import (
    Progress,
    capture,
    copy_buffers,
    put_back,
    restore,
    take_own,
    tensors,
    with_others,
)
from timm_mamba_pkd.runner.unreadable import reporting, share_unreadable

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_CHECKPOINTS = 600  # and one at the end of each epoch
SKIPPED_AT_MOST = 10  # batches of a stage, where losses that are not finite are skipped


@dataclass(frozen=True)
class Options:
    """How to train, beyond what the config says.

    Attributes:
        amp: dtype of the automatic mixed precision, None for none.
        torchcompile: backend of ``torch.compile`` for teacher and students, None for none.
        ema_decay: of the average of the weights, which is then what is validated, saved and handed on; None for none.
        on_nonfinite: 'stop' at a loss that is not finite, or 'skip' its batch, up to `SKIPPED_AT_MOST` times a stage.
        sync_bn: have the student's batch norms see the batches of all processes.
        safe: the config is a stranger's, and so may be the working folder.
    """

    amp: torch.dtype | None = None
    torchcompile: str | None = None
    ema_decay: float | None = None
    on_nonfinite: str = "stop"
    sync_bn: bool = False
    safe: bool = False


class Trainer:
    """A run in training: it trains every stage of ``job`` and leaves checkpoints, metrics and weights in ``run``.

    It goes on from where it had stopped.

    Each epoch adds a line to metrics.jsonl and to ``tracker``, and rewrites the weights; the end of a progressive
    stage leaves that stage's student under its own name. ``dst_ckpt`` of the config is written at the end.

    Several processes take their shares of every batch; rank 0 alone writes.

    Raises:
        ConfigError: a loss reads what no hook records, a label is none of the model's classes, no checkpoint can be
            written, or all are damaged; ``dst_ckpt`` is there by now, and not of this run.
        FloatingPointError: the loss, or what is to be saved, is not finite.
        Interrupted: a signal came; what was trained is saved.
        ProcessEnded: another process of the run has ended.
    """

    def __init__(
        self,
        job: Job,
        run: RunFolder,
        device: torch.device,
        options: Options,
        estimates: Sequence[StageEstimate],
        tracker: Tracker,
    ) -> None:
        self.job, self.run, self.device, self.options = job, run, device, options
        self.estimates, self.tracker = estimates, tracker
        self.checkpoints = Checkpoints(run.checkpoints)
        self._last_saved = time.monotonic()
        if options.amp is not None:
            keep_logits_in_float32(job.teacher, job.student)
        if options.sync_bn and distributed.world() > 1:
            synchronize_batch_norms(job.student)
        with distributed.failing_together(ConfigError):
            self._resumed = self.checkpoints.load() if distributed.is_main() else None
        self._resumed = distributed.broadcast(self._resumed)
        self._stops = self._is_due = False  # what all processes agreed on in the present step
        self.step = Step(device, options.amp)
        self.average: WeightAverage | None = None
        self.box: Any
        self._replays = True
        if self._resumed is None and run.metrics.exists():
            logger.warning("The run in %s has no checkpoint: it starts from the beginning", run.path)
        if self._resumed is None:
            self.box, self.progress = build_box(job, device), Progress()
        else:
            with distributed.failing_together(ConfigError), _explaining_checkpoint():
                self._replays = take_own(self._resumed)
                self.box, self.progress = restore(self._resumed, job, device)
                self.step.scaler.load_state_dict(self._resumed["scaler"])
        if distributed.is_main():
            last = None if self._resumed is None else self.checkpoints.last()
            run.note_start(describe_start(device, None if last is None else last.name, options.safe))
        if options.torchcompile is not None:
            compile_models(job, self.box, options.torchcompile)
        self.box.can_extend = True  # a stage may be trained again
        if distributed.is_main():
            self.run.remove_leftovers()
            self.run.rewrite_metrics(self.progress.metrics)

    def train(self) -> None:
        """Train what is left to train."""
        started = time.perf_counter()
        progress, box = self.progress, self.box
        while progress.epoch < box.num_epochs:
            stage = getattr(box, "stage_number", 1)
            self._train_epoch()
            self._finish_epoch(stage)
            progress.begin_epoch(progress.epoch + 1)
        box.clean_modules()
        with distributed.failing_together(ConfigError):
            if self.job.destination is not None and distributed.is_main():
                save_destination(self.job.student, self.job.destination, self.run)
        logger.info("Trained %d epochs in %.0f s", box.num_epochs, time.perf_counter() - started)

    def _train_epoch(self) -> None:
        """Train on what is left of the present epoch; afterwards, and if a signal comes, there is a checkpoint."""
        distributed.broadcast_tensors(tensors(self.job, self.box))
        self.box.pre_epoch_process(epoch=self.progress.epoch)
        start_epoch(self.box.train_data_loader, self.progress.epoch)
        batches = Batches(self.box.train_data_loader)
        progress, resumed = self.progress, self._resumed
        self._resumed = None
        if self.average is None and self.options.ema_decay is not None:
            self.average = WeightAverage(in_training(self.job.student, self.box), self.options.ema_decay)
            if resumed is not None and resumed["average"] is not None:
                self.average.load_state_dict(resumed["average"])
        after = None if resumed is None else resumed["random"]
        if progress.trained and resumed is not None:
            if after is not None:
                batches.set_random_state(after)
            return
        if resumed is None or progress.start is None:
            progress.start = batches.random_state()
        else:
            batches.set_random_state(progress.start)
        with interrupts.deferring():
            self._train_steps(batches, after)
            share_unreadable(self.job.datasets)
            # Batch norms, and their averages, have seen each process's own batches.
            averages = [] if self.average is None else self.average.state_dict()["weights"].values()
            distributed.broadcast_tensors([*tensors(self.job, self.box), *averages])
            progress.trained = not interrupts.received_anywhere()
            self._save(batches)

    def _train_steps(self, batches: Batches, after: Any) -> None:
        progress, box = self.progress, self.box
        log_freq = self.job.config["train"].get("log_freq", 1000)
        total, before = len(batches), progress.seconds
        started, done_before = time.perf_counter(), progress.samples
        left = reporting(self.job.datasets, batches.epoch(progress.samples, after, self._replays))
        title = f"epoch {progress.epoch + 1}/{box.num_epochs}"
        for (images, targets, supp_dict), indices in with_progress(left, title, total, progress.steps):
            with distributed.only_first(batches.present):
                loss = self._step(images, targets, supp_dict, indices)
            progress.samples = batches.done
            progress.steps += 1
            progress.seconds = before + time.perf_counter() - started
            if progress.steps % log_freq == 0:
                rate = (progress.samples - done_before) / (time.perf_counter() - started)
                message = "%s  step %d/%d  loss %.4f  %.0f images/s  %s"
                logger.info(message, title, progress.steps, total, loss, rate, self._time_left())
            if self._stops or (distributed.world() == 1 and interrupts.received()):
                return
            if self._is_due:
                self._save(batches)

    def _time_left(self) -> str:
        progress, box = self.progress, self.box
        epochs = getattr(box, "stage_end_epoch", box.num_epochs) - progress.epoch
        stage = getattr(box, "stage_number", 1)
        steps = epochs * self.estimates[stage - 1].steps - progress.steps
        return time_left(self.estimates, stage, steps, progress.seconds / progress.steps)

    def _step(self, images: Any, targets: Any, supp_dict: Any, indices: list[int] | None) -> float:
        """Forward, loss, backward, and the optimizer's step; returns the loss, the mean over all processes.

        Loss and gradient are those of all processes' samples together, however many each has.
        """
        job, box = self.job, self.box
        require_known_labels(targets, job.num_classes)
        images, targets = images.to(self.device), targets.to(self.device)
        buffers = copy_buffers(job, box) if self.options.on_nonfinite == "skip" else []
        try:
            with autocast(self.device, self.options.amp):
                loss = box.forward_process(images, targets, supp_dict)
        except KeyError as error:
            raise ConfigError(f"a loss reads {error}, which no forward_hook of this stage records") from error
        if not isinstance(loss, torch.Tensor):
            raise ConfigError("criterion has no sub_terms: there is nothing to learn")
        value = loss.item()
        own = len(targets) if distributed.is_present() else 0
        total, count = self._agree(value * own, own)
        if not math.isfinite(total):
            self._meet_nonfinite(value, indices)
            put_back(buffers)  # the forward pass has put the batch into batch norms' statistics
            return total
        self.progress.total_loss += total
        self.progress.counted += count
        self.step(box, loss if distributed.world() == 1 else loss * (distributed.world() * own / count))
        if self.average is not None and box.stage_grad_count % box.grad_accum_step == 0:
            self.average.update()
        return total / count

    def _agree(self, loss: float, count: int) -> tuple[float, int]:
        """The sums over all processes, which agree here whether to stop or to save after this step."""
        is_due = distributed.is_main() and time.monotonic() - self._last_saved > SECONDS_BETWEEN_CHECKPOINTS
        numbers = distributed.gather_numbers(
            [loss, count, is_due, interrupts.received() if distributed.world() > 1 else 0]
        )
        losses, counts, due, signals = zip(*numbers, strict=True)
        self._is_due = any(due)
        self._stops = interrupts.share(map(int, signals))
        return sum(losses), int(sum(counts))

    def _meet_nonfinite(self, value: float, indices: list[int] | None) -> None:
        """Stop all processes before the optimizer steps, or let the batch be skipped."""
        progress, values, which = self.progress, [], []
        for rank, (loss, samples) in enumerate(distributed.gather((value, indices))):
            if not math.isfinite(loss):
                values.append(loss)
                which += [] if samples is None else [f"on the samples {', '.join(map(str, samples))}"]
                which += [f"of rank {rank}"] if distributed.world() > 1 else []
        what = f"the loss became {values[0]} at epoch {progress.epoch + 1}, step {progress.steps + 1}"
        what = " ".join([what, *which])
        where = distributed.broadcast(self.checkpoints.last_in_words())
        if self.options.on_nonfinite == "stop":
            raise FloatingPointError(f"{what}; {where}: lower the lr, or pass over it with --on-nonfinite skip")
        progress.skipped += 1
        if progress.skipped > SKIPPED_AT_MOST:
            raise FloatingPointError(
                f"{what}; {SKIPPED_AT_MOST} batches of this stage have been skipped before; {where}: lower the lr"
            )
        if distributed.is_main():
            logger.warning("Skipped a batch: %s", what)

    def _require_finite(self) -> None:
        """Refuse to save what is not finite: a parameter, a buffer such as batch norm's statistics, or the rule."""
        wrapper = getattr(self.box, "student_model", None)
        rule = wrapper.rule.state_dict(prefix="rule.") if isinstance(wrapper, StageWrapper) else {}
        student = self.job.student
        with distributed.failing_together(FloatingPointError):
            if broken := not_finite({**student.state_dict(), **dict(student.named_parameters()), **rule}):
                where = self.checkpoints.last_in_words()
                raise FloatingPointError(f"no longer finite at epoch {self.progress.epoch + 1}: {broken}; {where}")

    def _save(self, batches: Batches) -> None:
        self._require_finite()
        state = with_others(capture(self.job, self.box, self.progress, batches.random_state()))
        state["scaler"] = self.step.scaler.state_dict()
        state["average"] = None if self.average is None else self.average.state_dict()
        stage, progress = state["stage"], self.progress
        with distributed.failing_together(ConfigError):
            if distributed.is_main():
                self.checkpoints.save(state, stage, progress.epoch + 1, progress.samples)
        self._last_saved = time.monotonic()

    def _finish_epoch(self, stage: int) -> None:
        """What follows the steps of an epoch; it changes nothing that would not come out the same if done again."""
        job, box, progress, options = self.job, self.box, self.progress, self.options
        ends = progress.epoch + 1 == getattr(box, "stage_end_epoch", box.num_epochs)
        if self.average is not None:
            self.average.swap()
        if isinstance(job.student, MambaPKDEnsemble) and ends:
            with autocast(self.device, options.amp):
                finish_stage(box)
            self._require_finite()
        lr = box.optimizer.param_groups[0]["lr"]
        record = {
            "stage": stage,
            "epoch": progress.epoch,
            "lr": lr,
            "loss": progress.total_loss / max(progress.counted, 1),
            "img_per_s": progress.samples / progress.seconds,
            "seconds": progress.seconds,
            **_validate(job, box, self.device, options.amp),
        }
        progress.metrics.append(record)
        if distributed.is_main():
            self.run.log_metrics(record)
            self.tracker.log(record)
        alone = record["val_top1_student"]
        logger.info(
            "stage %d  epoch %d/%d  %sloss %.4f  val top-1 %.2f%s  %.0f images/s%s",
            stage, progress.epoch + 1, box.num_epochs, f"{record['student']}  " if record["student"] else "",
            record["loss"], record["val_top1"], "" if alone is None else f" (alone {alone:.2f})", record["img_per_s"],
            f"  {self._time_left()}" if progress.epoch + 1 < box.num_epochs else "",
        )  # fmt: skip
        if distributed.is_main():
            _save_weights(job.student, box, self.run)
        if self.average is not None and not ends:
            self.average.swap()
        elif ends:
            self.average = None  # it has taken the place of the weights
        if record["val_top1"] > progress.best.get(stage, -1.0):
            progress.best[stage] = record["val_top1"]
            if distributed.is_main():
                last = self.checkpoints.last()
                assert last is not None
                self.checkpoints.keep_best(last, stage)
        box.post_epoch_process(metrics=record["val_top1"])
        if getattr(box, "stage_number", 1) != stage:
            progress.skipped = 0


def _validate(job: Job, box: Box, device: torch.device, amp: torch.dtype | None) -> dict[str, Any]:
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


def _save_weights(model: nn.Module, box: Box, run: RunFolder) -> None:
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


@contextmanager
def _explaining_checkpoint() -> Iterator[None]:
    """A checkpoint that does not fit the run in this context is a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(
            f"the checkpoint is of another run, or of another version ({reason}): start anew with --fresh"
        ) from error
