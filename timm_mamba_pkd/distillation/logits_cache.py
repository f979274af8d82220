"""Logits of a frozen model on replayable views, computed once and kept on disk in rows that check themselves."""

import hashlib
import io
import json
import logging
import os
import shutil
import zlib
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from timm_mamba_pkd.distillation.views import Views
from timm_mamba_pkd.files import leftover_files, whole_file, write_file
from timm_mamba_pkd.models.state_dict import fingerprint

logger = logging.getLogger(__name__)

PROBES = 8
OPEN_FILES = 4  # of a cache, one for each view; an epoch reads one


class CacheError(ValueError):
    """A cache folder that cannot be used; the message is one line for the user."""


class LogitsCache:
    """The logits of one frozen model on the views of one data set, in a folder.

    The folder's name is made of everything that makes the logits: the model's structure and weights, the seed and the
    mixing of the views, the images themselves (checksums of a few), the precision. It holds ``meta.json``, which says
    so in full, and one ``view_0000.npy`` per view: a structured array of N rows, ``logits`` float16 (num_classes,) and
    ``checksum`` uint32, a CRC-32 over image, folder and logits. A row counts only if its checksum fits the image at
    hand, so a changed image, a torn write, a damaged file or one of another folder costs a forward pass and gives no
    wrong logits (but for one row in 2^32). Files appear complete (written aside and renamed), their space reserved. Any
    number of processes may read and write the rows at a time; one of them makes the files.

    Logits come back rounded to float16 also where they have just been computed: a rerun sees the same numbers. Where a
    row is missing, its whole batch is computed: a row does not depend on which others were there.

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
        self._files: dict[int, FileIO] = {}
        meta = _meta(model, views, num_classes, precision, name)
        key = _digest(json.dumps(meta).encode())[:16]
        self._key = int(key[:8], 16)
        self.folder = Path(root).expanduser() / f"{name}-{key}"
        self._open(meta, views.num_views)

    def logits(self, images: Tensor, supp_dict: dict[str, Tensor]) -> Tensor:
        """Float32 logits (B, num_classes) of a batch of views, on the images' device; missing ones are computed.

        ``supp_dict`` holds the batch's ``index``, ``view`` and ``checksum`` (B,), as `Views` gives them.
        """
        places = list(zip(supp_dict["view"].tolist(), supp_dict["index"].tolist(), strict=True))
        checksums = supp_dict["checksum"].tolist()
        rows = np.zeros(len(places), self._dtype)
        content = memoryview(rows.view(np.uint8))  # pyright: ignore[reportArgumentType]
        contents = [content[start : start + rows.itemsize] for start in range(0, len(content), rows.itemsize)]
        for place, row in zip(places, contents, strict=True):
            self._read(*place, row)
        known = rows["checksum"] == self._checksums(contents, checksums)
        missing = np.flatnonzero(~known).tolist()
        self.hits += len(rows) - len(missing)
        self.misses += len(missing)
        if missing:
            with torch.no_grad():
                computed = self.model(images).float().cpu().numpy()[missing]
            with np.errstate(over="ignore"):
                rows["logits"][missing] = computed.astype(np.float16)
            odd = ~np.isfinite(rows["logits"][missing]).all(1)
            # The logits of an image that is not finite are not either, and the loss will tell.
            if odd.any() and images[missing][torch.from_numpy(odd)].flatten(1).isfinite().all(1).any():
                raise CacheError(
                    f"logits of up to {np.abs(computed).max():g} do not fit the cache's float16: remove cache_dir"
                )
            rows["checksum"][missing] = self._checksums([contents[i] for i in missing], [checksums[i] for i in missing])
            self._store([(places[i], contents[i]) for i in missing])
        return torch.from_numpy(rows["logits"].astype(np.float32)).to(images.device)

    def _checksums(self, rows: list[memoryview], image_checksums: list[int]) -> list[int]:
        """Of images and logits, in this folder alone: a row from another one does not fit."""
        end = self._dtype["logits"].itemsize
        return [zlib.crc32(row[:end], image ^ self._key) for row, image in zip(rows, image_checksums, strict=True)]

    def _read(self, view: int, index: int, row: memoryview) -> None:
        """Fill a row; where the file has become too short, as much as there is."""
        file = self._file(view)
        file.seek(self._offset(index))
        if file.readinto(row) < len(row):
            self._files.pop(view).close()

    def _store(self, rows: list[tuple[tuple[int, int], memoryview]]) -> None:
        try:
            for (view, index), row in rows:
                file = self._file(view)
                file.seek(self._offset(index))
                file.write(row)
        except OSError as error:  # a truncated file grows again
            raise CacheError(f"cache {self.folder} cannot be written: {error.strerror or error}") from error

    def _offset(self, index: int) -> int:
        return len(self._header) + index * self._dtype.itemsize

    def _open(self, meta: dict[str, Any], num_views: int) -> None:
        path = self.folder / "meta.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if _content(path) is None:
                with self._making_files():
                    if _content(path) is None:
                        if path.exists():
                            self._drop_logits()
                        write_file(path, f"{json.dumps(meta, indent=2)}\n".encode())
            found = _content(path)
            if found != meta:
                changed = [key for key in meta if not isinstance(found, dict) or found.get(key) != meta[key]]
                raise CacheError(
                    f"cache {self.folder} was made from another {', '.join(changed) or 'source'}: delete the "
                    "folder, or choose another cache_dir"
                )
            self._require_space(num_views)
        except OSError as error:
            raise CacheError(f"cache {self.folder} cannot be used: {error.strerror or error}") from error

    def _drop_logits(self) -> None:
        """A damaged meta.json takes the logits with it: nothing says of what they are."""
        logger.warning("Cached logits in %s are damaged (meta.json): they are computed again", self.folder)
        for file in self.folder.glob("view_*.npy"):
            file.unlink()

    def _making_files(self) -> FileLock:
        """The right to make files here, for one process at a time."""
        return FileLock(self.folder / ".lock")

    def _require_space(self, num_views: int) -> None:
        have = sum(path.stat().st_size for path in self.folder.glob("view_*.npy"))
        require_space(self.folder, cache_bytes(self.num_samples, self.num_classes, num_views) - have, num_views)

    def _file(self, view: int) -> FileIO:
        """The open file of a view; it is made where there is none, or a damaged one."""
        if view not in self._files:
            if len(self._files) == OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            path = self.folder / f"view_{view:04d}.npy"
            try:
                file = self._load(path)
                if file is None:
                    with self._making_files():
                        file = self._load(path)  # by now another process may have made it
                        if file is None:
                            self._create(path)
                            file = self._load(path)
                assert file is not None
            except OSError as error:
                raise CacheError(f"cache {path} cannot be written: {error.strerror or error}") from error
            self._files[view] = file
        return self._files[view]

    def _load(self, path: Path) -> FileIO | None:
        """The file if it is there and as it should be."""
        if not path.exists():
            return None
        file = path.open("r+b", buffering=0)
        found = file.read(len(self._header)), os.fstat(file.fileno()).st_size
        if found == (self._header, self._offset(self.num_samples)):
            return file
        file.close()
        return None

    @cached_property
    def _header(self) -> bytes:
        file = io.BytesIO()
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (self.num_samples,)})
        return file.getvalue()

    def _create(self, path: Path) -> None:
        if path.exists():
            logger.warning("Cached logits in %s are damaged: they are computed again", path)
        for leftover in leftover_files(self.folder):
            leftover.unlink()
        with whole_file(path) as file:
            file.write(self._header)
            left = self.num_samples * self._dtype.itemsize
            while left > 0:  # not a sparse file: a full disk must show here
                left -= file.write(bytes(min(left, 1 << 24)))


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
    """Type of a row: float16 logits and the checksum of image, folder and logits."""
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


def _content(path: Path) -> Any:
    """What is in a file of JSON; None without one, or where it is damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def _meta(model: nn.Module, views: Views, num_classes: int, precision: str, name: str) -> dict[str, Any]:
    probes = np.linspace(0, len(views) - 1, num=min(PROBES, len(views)), dtype=int)
    return {
        "model": name,
        "weights": fingerprint(model, str(model)),
        "images": [int(views.get(int(i), 0)[2]["checksum"]) for i in probes],
        "samples": len(views),
        "classes": num_classes,
        "seed": views.seed,
        "mixup_alpha, cutmix_alpha": list(views.alphas),
        "precision": precision,
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
