"""The ``mamba-pkd`` command: ``check``, ``train``, ``evaluate``, ``report``, ``export`` and others."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from timm.utils import ParseKwargs

from timm_mamba_pkd import runner
from timm_mamba_pkd.deploy import FORMATS
from timm_mamba_pkd.distributed import ProcessEnded, SaidByMain, is_main
from timm_mamba_pkd.files import WriteError
from timm_mamba_pkd.models import MEASURES


def build_parser() -> argparse.ArgumentParser:
    """The command line; flags that torchdistill's example scripts have keep their names."""
    parser = argparse.ArgumentParser(
        prog="mamba-pkd", description="Progressive distillation of any timm or torchdistill model into Mamba students."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    safe = argparse.ArgumentParser(add_help=False)
    safe.add_argument(
        "--safe-config", action="store_true",
        help="refuse a config that could run code, or write outside --output and --cache-dir",
    )  # fmt: skip
    run = argparse.ArgumentParser(add_help=False, parents=[safe])
    run.add_argument("--device", help="device (default: cuda if there is one, else cpu)")
    run.add_argument("--seed", type=seed, default=42, help="seed in random number generator (default: 42)")
    run.add_argument("-disable_cudnn_benchmark", action="store_true", help="disable torch.backend.cudnn.benchmark")
    run.add_argument("--amp", action="store_true", help="autocast (also: amp: True under train in the config)")
    run.add_argument("--amp-dtype", choices=["bfloat16", "float16"], help="dtype of autocast (default: bfloat16)")
    run.add_argument("--channels-last", action="store_true", help="channels_last memory layout")
    run.add_argument("--output", help="folder of the run (default: runs/<name of the config>)")
    run.add_argument("--cache-dir", metavar="DIR", help="folder of cached logits, in place of the config's cache_dir")
    no_teacher = argparse.ArgumentParser(add_help=False)
    no_teacher.add_argument("-student_only", action="store_true", help="test the student model only")
    logs = argparse.ArgumentParser(add_help=False)
    logs.add_argument("--run_log", help="log file path (default of train: log.txt in the output folder)")
    logs.add_argument("-log_config", action="store_true", help="log config")
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument("--config", required=True, help="yaml file path")

    sizes = argparse.ArgumentParser(add_help=False)
    sizes.add_argument("--num-classes", type=positive, metavar="N", help="number of classes (default: the model's)")
    sizes.add_argument("--in-chans", type=positive, metavar="N", help="channels of the images (default: the model's)")
    sizes.add_argument("--img-size", type=positive, metavar="N", help="height and width (default: the model's)")
    kwargs = argparse.ArgumentParser(add_help=False)
    kwargs.add_argument(
        "--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE", help="more of the model's"
    )

    images = argparse.ArgumentParser(add_help=False)
    images.add_argument("--data-root", metavar="DIR", help="folder of a folder of images per class, or of val/")
    images.add_argument("--dataset", default="", metavar="NAME", help="torch/cifar10 and the like (default: images)")
    images.add_argument("--split", default="validation", metavar="NAME", help="(default: validation)")
    images.add_argument("-b", "--batch-size", type=positive, metavar="N", default=256, help="(default: 256)")
    images.add_argument("-j", "--workers", type=count, metavar="N", default=4, help="(default: 4)")
    images.add_argument("--mean", type=float, nargs="+", metavar="MEAN", help="of the pixels (default: the model's)")
    images.add_argument("--std", type=float, nargs="+", metavar="STD", help="of the pixels (default: the model's)")
    images.add_argument("--crop-pct", type=float, metavar="N", help="center crop (default: the model's)")
    interpolations = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")
    images.add_argument("--interpolation", choices=interpolations, help="of the resizing (default: the model's)")

    check = commands.add_parser(
        "check", parents=[config, run], help="try a config without training: seconds instead of hours"
    )
    check.set_defaults(action=runner.run_check)
    train = commands.add_parser(
        "train", parents=[config, run, no_teacher, logs], help="train a config's model, or distil its students"
    )
    train.add_argument("--fresh", action="store_true", help="start anew; the run in the output folder moves to old-N")
    train.add_argument(
        "--on-nonfinite", choices=["stop", "skip"], default="stop",
        help="what to do with a batch whose loss is not finite; skip gives up after 10 in a stage (default: stop)",
    )  # fmt: skip
    train.add_argument(
        "--torchcompile", nargs="?", const="inductor", metavar="BACKEND",
        help="compile teacher and students by torch.compile (default backend: inductor)",
    )  # fmt: skip
    train.add_argument("--model-ema", action="store_true", help="validate, save and hand on the average of the weights")
    train.add_argument(
        "--model-ema-decay", type=share, default=0.9998, help="what a step keeps of the average (default: 0.9998)"
    )
    train.add_argument(
        "--sync-bn", action="store_true", help="batch norms of the student see the batches of all torchrun processes"
    )
    train.add_argument("-test_only", action="store_true", help="only test the models (same as evaluate)")
    train.set_defaults(action=lambda args: runner.run_train(args) if not args.test_only else runner.run_evaluate(args))
    evaluate = commands.add_parser(
        "evaluate",
        parents=[run, no_teacher, logs, sizes, kwargs, images],
        help="test the trained models of a run, or any timm model with a checkpoint",
    )
    tested = evaluate.add_mutually_exclusive_group(required=True)
    tested.add_argument("--config", help="yaml file path")
    tested.add_argument("--model", metavar="NAME", help="timm model name; the flags below are timm's validate.py's")
    evaluate.add_argument("--checkpoint", help="weights to test (default: those in the output folder)")
    evaluate.set_defaults(action=runner.run_evaluate)
    calibrate = commands.add_parser(
        "calibrate",
        parents=[config, run, no_teacher],
        help="fit a run's early exit on its validation split, and test it",
    )
    calibrate.add_argument(
        "--measure", choices=MEASURES, default="max_prob", help="of the confidence (default: max_prob)"
    )
    wanted = calibrate.add_mutually_exclusive_group()
    wanted.add_argument(
        "--min-accuracy", type=float, metavar="PERCENT",
        help="the cheapest early exit with this accuracy on the validation split (default: no worse than all students)",
    )  # fmt: skip
    wanted.add_argument(
        "--max-macs", type=float, metavar="MILLIONS",
        help="the longest early exit with at most so many multiply-accumulates an image on average",
    )  # fmt: skip
    calibrate.set_defaults(action=runner.run_calibrate)
    expand = commands.add_parser(
        "expand", parents=[config, safe], help="print the torchdistill YAML that a progressive schedule stands for"
    )
    expand.set_defaults(action=runner.run_expand)
    report = commands.add_parser("report", help="print a run's table and draw its plots again")
    report.add_argument("output", type=Path, help="folder of the run")
    report.set_defaults(action=runner.run_report)
    export = commands.add_parser(
        "export",
        parents=[safe, sizes, kwargs],
        help="write a model as ONNX, PT2, ExecuTorch, cascade or Hugging Face folder, checked",
    )
    export.add_argument("model", help="timm model name, or folder of a run")
    export.add_argument(
        "--format", nargs="+", choices=[*FORMATS, "cascade", "hf"], default=["onnx", "pt2"], help="(default: onnx pt2)"
    )
    export.add_argument("--students", type=int, metavar="K", help="the ensemble after K students (default: all)")
    export.add_argument("--checkpoint", help="weights (default: those in the run's folder)")
    export.add_argument("--config", help="yaml file path: sizes, and data to check on (default: the run's own config)")
    export.add_argument("--int8", action="store_true", help="write the ONNX file with int8 weights as well")
    export.add_argument("--output", help="folder to write to (default: export in the run's, or in runs/<model>)")
    export.set_defaults(action=runner.run_export)
    benchmark = commands.add_parser("benchmark", parents=[sizes], help="what models cost, side by side")
    benchmark.add_argument("models", nargs="+", metavar="model", help="timm model names")
    benchmark.add_argument("-b", "--batch-size", type=positive, metavar="N", default=256, help="(default: 256)")
    benchmark.add_argument("--device", help="device (default: cuda if there is one, else cpu)")
    benchmark.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    benchmark.add_argument("--results-file", help="CSV file to write, in the columns of timm's benchmark.py")
    benchmark.set_defaults(action=runner.run_benchmark)
    select = commands.add_parser(
        "select",
        parents=[safe, images],
        help="measure models on labelled samples and say which to take under constraints",
    )
    select.add_argument(
        "runs", nargs="*", metavar="RUN", help="folders of runs: teacher, students, ensembles after each"
    )
    select.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="NAME",
        help="timm models: NAME=CHECKPOINT, local-dir:... or hf-hub:...",
    )
    select.add_argument(
        "--img-size", type=positive, metavar="N", help="of --models without a run (default: the model's)"
    )
    select.add_argument("--max-macs", type=float, metavar="M", help="millions of multiply-accumulates per image")
    select.add_argument("--max-params", type=float, metavar="M", help="millions of parameters")
    select.add_argument("--max-memory", type=float, metavar="MIB", help="MiB while one image passes, weights included")
    select.add_argument("--max-latency", type=float, metavar="MS", help="milliseconds per image at batch size 1")
    select.add_argument("--min-accuracy", type=float, metavar="PERCENT", help="top-1 on the samples")
    select.add_argument(
        "--min-disagreement", type=float, default=1.0, metavar="PERCENT",
        help="drop what predicts otherwise than a cheaper model on less of the samples than this (default: 1)",
    )  # fmt: skip
    select.add_argument("--propose", metavar="MODULE:FUNCTION", help="a function that proposes more candidates")
    select.add_argument("--seed", type=seed, default=42, help="of the bootstrap (default: 42)")
    select.add_argument("--device", help="device (default: cuda if there is one, else cpu)")
    select.add_argument("--output", help="folder to write to (default: select in the run's, or runs/select)")
    select.set_defaults(action=runner.run_select)
    doctor = commands.add_parser("doctor", help="say which versions and scan backends are at hand, and why others not")
    doctor.set_defaults(action=runner.run_doctor)
    return parser


def seed(text: str) -> int:
    """A seed that torch, Python and NumPy all take."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and {2**32 - 1}")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def positive(text: str) -> int:
    """A whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def count(text: str) -> int:
    """A whole number from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


@contextmanager
def modules_of_working_folder(found: bool) -> Iterator[None]:
    """Whether modules of the working folder are found: a config may name them, as under python -m, a safe one not."""
    before = list(sys.path)
    if not found:
        sys.path[:] = [path for path in sys.path if os.path.realpath(path) != os.path.realpath(".")]
    elif "" not in sys.path:
        sys.path.append("")
    try:
        yield
    finally:
        sys.path[:] = before


def main(argv: list[str] | None = None) -> int:
    """Run the command; a user's errors are one line each on stderr and exit code 2, signals 128 plus theirs.

    A command may return an exit code of its own.
    """
    args = build_parser().parse_args(argv)
    try:
        with (
            runner.ending_on_signals(),
            runner.tensors_only(),
            modules_of_working_folder(not getattr(args, "safe_config", False)),
        ):
            return args.action(args) or 0
    except (runner.ConfigError, FloatingPointError, WriteError) as error:
        for line in str(error).splitlines():
            print(f"mamba-pkd: error: {line}", file=sys.stderr)
        return 2
    except OSError as error:  # such as a name that is too long, or a folder that another process has made meanwhile
        if error.filename is None or error.strerror is None:
            raise
        print(f"mamba-pkd: error: {error.filename2 or error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except SaidByMain:
        return 2
    except ProcessEnded as error:
        print(f"mamba-pkd: error: {error}", file=sys.stderr)
        return 1
    except runner.Interrupted as interrupted:
        again = "; the same command goes on from there" if args.command == "train" else ""
        if is_main():
            print(f"mamba-pkd: ended by {interrupted}{again}", file=sys.stderr)
        return interrupted.exit_code
