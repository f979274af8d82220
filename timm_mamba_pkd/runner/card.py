"""What a model card says of the run that its model is of."""

from importlib import metadata
from typing import Any

from torch.utils.data import Subset

from timm_mamba_pkd.runner.device import threads
from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.run_folder import RunFolder
from timm_mamba_pkd.runner.streams import public_class
from timm_mamba_pkd.runner.trained import Trained


def sections_of_run(run: RunFolder, config: Trained) -> dict[str, str]:
    """Results, data and recipe, Markdown by heading.

    Args:
        run: a finished one.
        config: the run's.

    Raises:
        ConfigError: the run has not finished.
    """
    results = run.path / "results.md"
    if not results.is_file():
        raise ConfigError(f"the run in {run.path} has not finished: the same mamba-pkd train goes on with it")
    data = [
        f"- `{name}`: {len(images)} images of `{kind.__module__}.{kind.__qualname__}`"
        for name, images in config.datasets.items()
        if not isinstance(images, list)  # not the lists of splits that torchdistill builds on the way
        for kind in [_class_of(images)]
    ] or [f"- `{name}`" for name in config.dataset_ids]
    command = " ".join(["mamba-pkd train --config config.yaml", *_flags(run)])
    versions = " and ".join(f"{name} {metadata.version(name)}" for name in ("timm_mamba_pkd", "torchdistill"))
    text = run.config.read_text(encoding="utf-8")
    return {
        "Results": f"The run that this model is of{_begun(run)}:\n\n{results.read_text(encoding='utf-8').strip()}",
        "Data": "\n".join(data),
        "Recipe": f"`{command}`, {versions}:\n\n```yaml\n{text.strip()}\n```",
    }


def _class_of(images: Any) -> type:
    """The class of a data set, or of the one that it is a split of."""
    while public_class(images) is Subset:
        images = images.dataset
    return public_class(images)


def _begun(run: RunFolder) -> str:
    """When a run began, and on what, where that is recorded."""
    start = next(iter(run.starts()), None) if run.record.is_file() else None
    if start is None:
        return ""
    on = start["hardware"]
    return f", begun on {start['time'][:10]}, {on.get('gpu', on['cpu'])}, {threads(on['threads'])}"


def _flags(run: RunFolder) -> list[str]:
    """What a run was begun with, as on its command line, where that is recorded."""
    if not run.record.is_file():
        return []
    given = {flag: value for flag, value in run.flags.items() if value is not None and value is not False}
    return [flag if value is True else f"{flag} {value}" for flag, value in given.items()]
