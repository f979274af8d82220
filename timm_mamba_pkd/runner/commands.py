"""What the subcommands of ``mamba-pkd`` do."""

import argparse
import logging
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from timm_mamba_pkd import distributed
from timm_mamba_pkd.distillation import CacheError
from timm_mamba_pkd.files import WriteError
from timm_mamba_pkd.models import MambaPKDEnsemble
from timm_mamba_pkd.ops import BACKENDS, VARIABLE, native
from timm_mamba_pkd.report import Row, plot_accuracy_against_macs, plot_curves, read_csv, read_metrics, to_text
from timm_mamba_pkd.runner.check import StageEstimate, check
from timm_mamba_pkd.runner.checkpoints import Checkpoints
from timm_mamba_pkd.runner.compiling import explaining, require_backend
from timm_mamba_pkd.runner.config import Job
from timm_mamba_pkd.runner.destination import is_own, require_free, require_own
from timm_mamba_pkd.runner.device import name_of
from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.evaluate_named import evaluate_named
from timm_mamba_pkd.runner.expand import expand
from timm_mamba_pkd.runner.log_file import logging_to
from timm_mamba_pkd.runner.record import describe_inputs, versions
from timm_mamba_pkd.runner.results import measure, report
from timm_mamba_pkd.runner.run_folder import RunFolder, make_folder
from timm_mamba_pkd.runner.schema import schedule_arguments
from timm_mamba_pkd.runner.set_up import device_of, run_folder, set_up
from timm_mamba_pkd.runner.space import require_space, size
from timm_mamba_pkd.runner.time_left import duration
from timm_mamba_pkd.runner.tracking import tracking
from timm_mamba_pkd.runner.train import Options, Trainer
from timm_mamba_pkd.runner.trained import load_trained
from timm_mamba_pkd.runner.unreadable import report_unreadable

logger = logging.getLogger(__name__)

FLAGS_OF_A_RUN = (  # with others it would come to other weights
    "seed",
    "amp",
    "amp-dtype",
    "channels-last",
    "torchcompile",
    "model-ema",
    "model-ema-decay",
    "sync-bn",
    "on-nonfinite",
)


def run_check(args: argparse.Namespace) -> None:
    """``mamba-pkd check``: all that ``train`` checks before it trains, and what the run will take."""
    run, device = run_folder(args), device_of(args)
    with distributed.process_group(device):
        job, amp = set_up(args, device)
        with distributed.failing_together(ConfigError):
            estimates = check(job, device, amp)
            written, cached = require_space(job, run.path, estimates)
        if distributed.is_main():
            _print_estimates(job, run, device, estimates, written, cached)


def _print_estimates(
    job: Job, run: RunFolder, device: torch.device, estimates: list[StageEstimate], written: int, cached: int
) -> None:
    print(job.source.path)
    for number, stage in enumerate(estimates, start=1):
        student = stage.student or job.student_config["key"]
        print(
            f"  stage {number}: {student}, {stage.epochs} epochs of {stage.steps} steps of "
            f"{1000 * stage.seconds_per_step:.3g} ms, about {duration(stage.seconds)}"
        )
    report_unreadable(job.datasets)
    total = sum(stage.seconds for stage in estimates)
    cache = ", less what the cache saves" if cached else ""
    print(f"  time: about {duration(total)} on {device} for the training steps alone{cache}")
    print(f"  disk: about {size(written)} in {run.path}" + (f", {size(cached)} of cached logits" if cached else ""))
    print("config OK")


def run_expand(args: argparse.Namespace) -> None:
    """``mamba-pkd expand``: print the torchdistill YAML that a progressive schedule stands for."""
    print(expand(args.config, args.safe_config), end="")


def run_train(args: argparse.Namespace) -> None:
    """``mamba-pkd train``: prepare, train, test, report."""
    if args.torchcompile is not None:
        require_backend(args.torchcompile)
    run, device = run_folder(args), device_of(args)
    try:
        with distributed.process_group(device), ExitStack() as stack:
            _train(args, run, device, stack)
    except distributed.ProcessEnded as error:
        last = Checkpoints(run.checkpoints).last()
        raise distributed.ProcessEnded(f"{error}; the same command goes on from {last or 'the start'}") from error


def _train(args: argparse.Namespace, run: RunFolder, device: torch.device, stack: ExitStack) -> None:
    flags = {f"--{name}": getattr(args, name.replace("-", "_")) for name in FLAGS_OF_A_RUN}
    begun, resuming, table = False, False, None
    with distributed.failing_together(ConfigError):
        if distributed.is_main():
            if run.path.exists() and not run.path.is_dir():
                raise ConfigError(f"--output {run.path} is a file: name a folder")
            begun = run.begun
            resuming = begun and _claim(args, run, flags, stack)
            table = _table(run) if resuming and run.finished else None
    resuming, table = distributed.broadcast((resuming, table))
    if table is not None:
        if distributed.is_main():
            print(f"The run in {run.path} is finished; --fresh starts anew.\n")
            print(table)
        return
    if resuming and distributed.is_main() and run.calibration.exists():
        logger.warning("The weights are written again, without early exit: fit it anew with mamba-pkd calibrate")
    job, amp = set_up(args, device)
    if isinstance(job.student, MambaPKDEnsemble):
        job.student.drop_policy("are to be trained")
    destination = job.destination
    with distributed.failing_together(ConfigError):
        if distributed.is_main() and resuming:
            run.require_same_inputs(describe_inputs(job))
            if destination is not None:
                require_own(destination, run)
        estimates = check(job, device, amp, sync_bn=args.sync_bn, skips_nonfinite=args.on_nonfinite == "skip")
        require_space(job, run.path, estimates, args.model_ema, resuming)
        if distributed.is_main():
            if destination is not None:
                if not resuming:
                    require_free(destination, run, args.fresh)
                make_folder(destination.parent)
            if not resuming:
                with _keeping(run):
                    if not begun:
                        _claim_new(run, stack)
                    _begin(args, job, run, flags)
    decay = args.model_ema_decay if args.model_ema else None
    options = Options(amp, args.torchcompile, decay, args.on_nonfinite, args.sync_bn, args.safe_config)
    log = logging_to(args.run_log or run.log) if distributed.is_main() else nullcontext()
    with log, _keeping(run):
        if args.log_config:
            logger.info(job.config)
        with explaining(args.torchcompile), tracking(job, run.path) as tracker:
            Trainer(job, run, device, options, estimates, tracker).train()
        with torch.compiler.set_stance("force_eager"):  # the table's times and costs are those of eager models
            rows = _test(args, job, device, amp)
        if distributed.is_main():
            _report(args, run, device, rows)


def _claim(args: argparse.Namespace, run: RunFolder, flags: dict[str, Any], stack: ExitStack) -> bool:
    """Lock the folder of a run; whether that run is to go on."""
    stack.enter_context(run.locked())
    resuming = not run.abandoned and not args.fresh
    if resuming:
        if not run.config.exists() or not run.record.exists():
            raise ConfigError(f"{run.path} holds a run that cannot be resumed: choose another --output, or --fresh")
        run.require_same(args.config, flags, "go on with the same, choose another --output, or start anew with --fresh")
        run.require_folders()
    return resuming


def _claim_new(run: RunFolder, stack: ExitStack) -> None:
    """Lock a folder that held no run when the command began."""
    stack.enter_context(run.locked())
    if run.begun:
        raise ConfigError(f"another run has just started in {run.path}: choose another --output")


def _table(run: RunFolder) -> str:
    """Of a finished run."""
    try:
        return to_text(read_csv(run.path / "results.csv"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{error}; without that file the same command measures the run again") from error


@contextmanager
def _keeping(run: RunFolder) -> Iterator[None]:
    """A file that cannot be written in this context, for the user: what it was, and what is left of the run."""
    try:
        yield
    except (WriteError, CacheError) as error:
        raise ConfigError(f"{error}; {Checkpoints(run.checkpoints).last_in_words()}") from error


def _begin(args: argparse.Namespace, job: Job, run: RunFolder, flags: dict[str, Any]) -> None:
    """Start a run in an empty folder, or beside an old one that ``--fresh`` moves away."""
    expanded, inputs = _expanded(args, job), describe_inputs(job)  # the config may be one of the files to move
    if args.fresh:
        old = run.move_away(*(path for path in [job.destination] if path is not None and is_own(path, run)))
        if old is not None:
            logger.info("Moved the run before to %s", old)
    run.create(job.source.text, expanded, flags, inputs)


def _expanded(args: argparse.Namespace, job: Job) -> str | None:
    """What a progressive schedule in the config stands for."""
    if schedule_arguments(job.source.root) is None:
        return None
    try:
        return expand(args.config)
    except ConfigError as error:  # its arguments are made by tags, which `expand` does not execute
        logger.warning("The schedule is not written out: %s", error)
        return None


def run_evaluate(args: argparse.Namespace) -> None:
    """``mamba-pkd evaluate`` and ``train -test_only``: test trained weights."""
    if getattr(args, "model", None) is not None:
        _refuse(args, ("output", "cache_dir", "run_log", "safe_config", "student_only", "log_config"), "--config")
        if distributed.launched():
            raise ConfigError("evaluate --model works in one process: start it without torchrun")
        evaluate_named(args)
        return
    sizes, transform = ("num_classes", "in_chans", "img_size"), ("mean", "std", "crop_pct", "interpolation")
    _refuse(args, ("data_root", "dataset", *sizes, "model_kwargs", *transform), "--model")
    run, device = run_folder(args), device_of(args)
    with distributed.process_group(device):
        job, amp = set_up(args, device)
        checkpoint = Path(getattr(args, "checkpoint", None) or _trained_weights(args, job, run))
        logger.info("Testing the weights in %s", checkpoint)
        if checkpoint.parent == run.weights("").parent and not run.finished:
            logger.warning("The run in %s has not finished: these are its weights so far", run.path)
        with distributed.failing_together(ConfigError):
            load_trained(job.student, checkpoint)
        with logging_to(args.run_log) if args.run_log and distributed.is_main() else nullcontext():
            if args.log_config:
                logger.info(job.config)
            _test(args, job, device, amp)


def _refuse(args: argparse.Namespace, flags: Sequence[str], other: str) -> None:
    for flag in flags:
        if getattr(args, flag, None):
            raise ConfigError(f"--{flag.replace('_', '-')} is for evaluate {other}: leave it out")


def run_report(args: argparse.Namespace) -> None:
    """``mamba-pkd report``: print the table of a finished run and draw its plots again."""
    run = RunFolder(args.output)
    results = run.path / "results.csv"
    if not results.is_file() and run.config.is_file():
        raise ConfigError(f"the run in {run.path} has not finished: the same mamba-pkd train goes on with it")
    if not results.is_file():
        raise ConfigError(f"{run.path} holds no finished run (no results.csv): train one with: mamba-pkd train")
    try:
        rows = read_csv(results)
        metrics = read_metrics(run.metrics) if run.metrics.exists() else []
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(to_text(rows))
    plot_accuracy_against_macs(rows, run.path / "accuracy_macs.png")
    if metrics:
        plot_curves(metrics, run.path / "curves.png")


def run_doctor(args: argparse.Namespace) -> None:
    """``mamba-pkd doctor``: versions, hardware, and for every backend of the scan whether it can serve, or why not."""
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package, version in versions().items():
        print(f"{package} {version or 'is not installed'}")
    devices = [torch.device("cpu")]
    kernels = None if native.unavailable(devices[0]) else native.INSTRUCTION_SETS[native.instruction_set()]
    print(f"cpu: {torch.get_num_threads()} threads" + (f", native kernels for {kernels}" if kernels else ""))
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
        print(f"cuda: {torch.cuda.get_device_name()}")
    else:
        print("cuda: not available")
    for device in devices:
        chosen = os.environ.get(VARIABLE) or "auto"
        taken = "the first that can is taken" if chosen == "auto" else f"{VARIABLE} asks for {chosen}"
        taken += "" if chosen in ("auto", *BACKENDS) else ", which does not exist: every scan will fail"
        print(f"selective scan on {device}, {taken}:")
        for name, backend in BACKENDS.items():
            reason = backend.unavailable(device)
            print(f"  {name}: {reason or 'can serve'}")


def _trained_weights(args: argparse.Namespace, job: Job, run: RunFolder) -> Path:
    """Where a run left its model: the folder given, or else the default one, or ``dst_ckpt`` of the config."""
    saved = run.weights("ensemble" if isinstance(job.student, MambaPKDEnsemble) else "model")
    if args.output is None and not saved.exists() and job.destination is not None:
        return job.destination
    return saved


def _test(args: argparse.Namespace, job: Job, device: torch.device, amp: torch.dtype | None) -> list[Row]:
    rows = measure(job, device, amp, args.student_only)
    if distributed.is_main():
        print(to_text(rows))
    return rows


def _report(args: argparse.Namespace, run: RunFolder, device: torch.device, rows: list[Row]) -> None:
    report(rows, run, name_of(device) + f" ({platform.machine()})" * (device.type == "cpu"), args.seed)
    print(f"\nReport (tables, and plots where matplotlib is installed): {run.path}")
