"""The folder a run writes: one place for its config, log, metrics, weights and report."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from timm_mamba_pkd.runner.config import ConfigError


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
        """Raise a ConfigError if another run is already here."""
        if self.config.exists():
            raise ConfigError(
                f"{self.path} already holds a run: choose another --output, "
                f"or see it with: mamba-pkd report {self.path}"
            )

    def create(self, config_path: str | Path) -> None:
        """Start a run here: make the folder, which `require_free` has found free, and keep a copy of the config."""
        make_folder(self.path)
        shutil.copyfile(Path(config_path).expanduser(), self.config)

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
