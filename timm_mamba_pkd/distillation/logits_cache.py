"""Logits of a frozen model on replayable views, computed once and kept on disk in rows that check themselves."""

import hashlib
import io
import json
import logging
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from timm_mamba_pkd.distillation.views import Views

logger = logging.getLogger(__name__)

PROBES = 8


class CacheError(ValueError):
    """A cache folder that cannot be used; the message is one line for the user."""


class LogitsCache:
    """The logits of one frozen model on the views of one data set, in a folder.

    The folder's name is made of everything that makes the logits: the model's structure and weights, the seed and the
    mixing of the views, the images themselves (checksums of a few), the precision. It holds ``meta.json``, which says
    so in full, and one memory-mapped ``view_0000.npy`` per view: a structured array of N rows, ``logits`` float16
    (num_classes,) and ``checksum`` uint32, the CRC-32 of the image followed by the logits. A row counts only if its
    checksum fits the image at hand, so a changed image, a torn write or a damaged file costs a forward pass and never
    gives wrong logits. Files appear complete (written aside and renamed), their space reserved.

    Logits come back rounded to float16 also where they have just been computed: a rerun sees the same numbers.

    Args:
        root: folder of all caches.
        model: in eval mode; called with images (B, C, H, W), gives logits (B, num_classes).
        views: the data set's views.
        num_classes: C.
        precision: name of what the model computes in, for instance 'float32' or 'bfloat16 autocast'.
        name: of the model, for people.

    Raises:
        CacheError: the folder cannot be written, belongs to something else, or its views would not fit the disk.
    """

    def __init__(
        self, root: str | Path, model: nn.Module, views: Views, num_classes: int, precision: str, name: str
    ) -> None:
        self.model = model
        self.num_classes = num_classes
        self.num_samples = len(views)
        self.hits = self.misses = 0  # rows read, rows computed
        self._dtype = row_dtype(num_classes)
        self._files: dict[int, np.memmap] = {}
        meta = _meta(model, views, num_classes, precision, name)
        self.folder = Path(root).expanduser() / f"{name}-{_digest(json.dumps(meta).encode())[:16]}"
        self._open(meta, views.num_views)

    def logits(self, images: Tensor, supp_dict: dict[str, Tensor]) -> Tensor:
        """Float32 logits (B, num_classes) of a batch of views, on the images' device; missing ones are computed.

        ``supp_dict`` holds the batch's ``index``, ``view`` and ``checksum`` (B,), as `Views` gives them.
        """
        index = supp_dict["index"].cpu().numpy()
        checksums = supp_dict["checksum"].cpu().numpy()
        view = supp_dict["view"].cpu().numpy()
        rows = np.empty(len(index), self._dtype)
        for v in np.unique(view):
            rows[view == v] = self._file(int(v))[index[view == v]]
        known = np.array(
            [
                _checksum(row["logits"], int(image)) == row["checksum"]
                for row, image in zip(rows, checksums, strict=True)
            ]
        )
        self.hits += int(known.sum())
        self.misses += int((~known).sum())
        if not known.all():
            missing = torch.from_numpy(np.flatnonzero(~known)).to(images.device)
            with torch.no_grad():
                computed = self.model(images[missing]).float().cpu().numpy()
            self._store(rows, np.flatnonzero(~known), computed, checksums, index, view)
        return torch.from_numpy(rows["logits"].astype(np.float32)).to(images.device)

    def _store(self, rows: Any, missing: Any, computed: Any, checksums: Any, index: Any, view: Any) -> None:
        if np.abs(computed).max() > np.finfo(np.float16).max or not np.isfinite(computed).all():
            raise CacheError(
                f"logits of up to {np.abs(computed).max():g} do not fit the cache's float16: remove cache_dir"
            )
        for position, logits in zip(missing, computed.astype(np.float16), strict=True):
            rows[position] = (logits, _checksum(logits, int(checksums[position])))
            self._file(int(view[position]))[index[position]] = rows[position]

    def _open(self, meta: dict[str, Any], num_views: int) -> None:
        path = self.folder / "meta.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = self._meta_there(path)
            if found is not None:
                if found != meta:
                    changed = [key for key in meta if not isinstance(found, dict) or found.get(key) != meta[key]]
                    raise CacheError(
                        f"cache {self.folder} was made from another {', '.join(changed) or 'source'}: delete the "
                        "folder, or choose another cache_dir"
                    )
            else:
                partial = path.with_name(f"meta.json.{os.getpid()}.part")
                partial.write_text(json.dumps(meta, indent=2) + "\n")
                os.replace(partial, path)
            self._require_space(num_views)
        except OSError as error:
            raise CacheError(f"cache {self.folder} cannot be used: {error.strerror or error}") from error

    def _meta_there(self, path: Path) -> Any:
        """The content of meta.json, None without one. A damaged one takes the logits with it: nothing says of what."""
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError):
            logger.warning("Cached logits in %s are damaged (meta.json): they are computed again", self.folder)
            for file in self.folder.glob("view_*.npy"):
                file.unlink()
            return None

    def _require_space(self, num_views: int) -> None:
        have = sum(path.stat().st_size for path in self.folder.glob("view_*.npy"))
        require_space(self.folder, cache_bytes(self.num_samples, self.num_classes, num_views) - have, num_views)

    def _file(self, view: int) -> np.memmap:
        if view not in self._files:
            path = self.folder / f"view_{view:04d}.npy"
            try:
                self._files[view] = self._load(path)
            except (OSError, ValueError):
                self._create(path)
                self._files[view] = self._load(path)
        return self._files[view]

    def _load(self, path: Path) -> np.memmap:
        header = self._header()
        with path.open("rb") as file:  # memmap would lengthen a short file, without reserving the space
            found, size = file.read(len(header)), os.fstat(file.fileno()).st_size
        if found != header or size != len(header) + self.num_samples * self._dtype.itemsize:
            raise ValueError("another array")
        return np.memmap(path, self._dtype, "r+", len(header), (self.num_samples,))

    def _header(self) -> bytes:
        file = io.BytesIO()
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (self.num_samples,)})
        return file.getvalue()

    def _create(self, path: Path) -> None:
        if path.exists():
            logger.warning("Cached logits in %s are damaged: they are computed again", path)
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with partial.open("wb") as file:
                file.write(self._header())
                left = self.num_samples * self._dtype.itemsize
                while left > 0:  # not a sparse file: a full disk must show here, not when the map is written
                    left -= file.write(bytes(min(left, 1 << 24)))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CacheError(f"cache {path} cannot be written: {error.strerror or error}") from error


class CachedModel:
    """A frozen model that looks its logits up, and computes those that are missing, in the precision it is called in.

    The cache of a precision is opened when it is first needed. Arguments as `LogitsCache`'s.
    """

    def __init__(self, root: str | Path, model: nn.Module, name: str, views: Views, num_classes: int) -> None:
        self._open = lambda precision: LogitsCache(root, model, views, num_classes, precision, name)
        self._caches: dict[str, LogitsCache] = {}

    def __call__(self, images: Tensor, supp_dict: dict[str, Tensor] | None) -> Tensor:
        """Logits (B, num_classes) of a batch of views."""
        kind = images.device.type
        autocast = torch.is_autocast_enabled(kind)
        precision = f"{torch.get_autocast_dtype(kind)} autocast" if autocast else f"{images.dtype}"
        if precision not in self._caches:
            self._caches[precision] = self._open(precision)
        return self._caches[precision].logits(images, supp_dict or {})

    @property
    def counts(self) -> tuple[int, int]:
        """How many rows were read and how many were computed."""
        return sum(cache.hits for cache in self._caches.values()), sum(cache.misses for cache in self._caches.values())


def row_dtype(num_classes: int) -> np.dtype:
    """Type of a row: float16 logits and the checksum of image and logits."""
    return np.dtype([("logits", "<f2", (num_classes,)), ("checksum", "<u4")])


def cache_bytes(num_samples: int, num_classes: int, num_views: int) -> int:
    """Size on disk of a model's cached logits."""
    return num_views * num_samples * row_dtype(num_classes).itemsize


def require_folder(root: str | Path) -> None:
    """Raise a CacheError if no folder can be made at ``root``; nothing is made."""
    path = Path(root).expanduser().absolute()
    existing = next(part for part in (path, *path.parents) if part.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = "no permission" if existing.is_dir() else f"{existing} is a file"
        raise CacheError(f"cache_dir {root} cannot be written: {why}")


def require_space(folder: Path, needed: int, num_views: int) -> None:
    """Raise a CacheError if ``needed`` more bytes do not fit the disk of ``folder``."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CacheError(
            f"{num_views} views need {needed / 1e9:.2f} GB more in {folder}, where {free / 1e9:.2f} GB are free: "
            "lower num_views, or choose another cache_dir"
        )


def _checksum(logits: np.ndarray, image_checksum: int) -> int:
    return zlib.crc32(logits.data, image_checksum)


def _meta(model: nn.Module, views: Views, num_classes: int, precision: str, name: str) -> dict[str, Any]:
    weights = hashlib.sha256(str(model).encode())
    for key, tensor in model.state_dict().items():
        weights.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    probes = np.linspace(0, len(views) - 1, num=min(PROBES, len(views)), dtype=int)
    return {
        "model": name,
        "weights": weights.hexdigest(),
        "images": [int(views.get(int(i), 0)[2]["checksum"]) for i in probes],
        "samples": len(views),
        "classes": num_classes,
        "seed": views.seed,
        "mixup_alpha, cutmix_alpha": list(views.alphas),
        "precision": precision,
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
