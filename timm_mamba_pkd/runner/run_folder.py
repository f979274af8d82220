"""The folder a run writes: one place for its config, log, metrics, weights and report."""

import json
import os
from pathlib import Path
from typing import Any

from timm_mamba_pkd.runner.errors import ConfigError


class RunFolder:
    """``<output>/``: config.yaml, log.txt, metrics.jsonl, weights/*.safetensors and, at the end, the report."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def weights(self, name: str) -> Path:
        return self.path / "weights" / f"{name}.safetensors"

    def require_free(self) -> None:
        """Raise a ConfigError if a run, or anything that a run would write, is already here."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--output {self.path} is a file: name a folder")
        reports = ("results.csv", "results.md", "accuracy_macs.png", "curves.png")
        written = [self.config, self.log, self.metrics, *(self.path / name for name in ("weights", *reports))]
        if any(path.exists() for path in written):
            raise ConfigError(
                f"{self.path} already holds a run, finished or not: choose another --output, or move it away"
            )

    def create(self, config_path: str | Path) -> None:
        """Start a run here: make the folder and keep a copy of the config.

        Raises:
            ConfigError: the folder cannot be written, or another run has started in it since `require_free`.
        """
        make_folder(self.path)
        try:
            with self.config.open("xb") as file:
                file.write(Path(config_path).expanduser().read_bytes())
        except FileExistsError as error:
            raise ConfigError(f"another run has just started in {self.path}: choose another --output") from error

    def log_metrics(self, **values: Any) -> None:
        """Append one line of JSON to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(values) + "\n")


def make_folder(path: Path) -> None:
    """Make a folder that results will be written to, or raise a ConfigError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("no permission")
    except OSError as error:
        raise ConfigError(f"folder {path} cannot be written: {error.strerror or error}") from error
