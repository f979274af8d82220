"""An ensemble's early exit in ONNX Runtime: a folder with one graph per student, and the cascade around them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_mamba_pkd.deploy.formats import open_onnx_session, write_onnx
from timm_mamba_pkd.models import Confidence, MambaPKDEnsemble, Policy, Prediction
from timm_mamba_pkd.models.arguments import check_count, check_images
from timm_mamba_pkd.models.combination import combine
from timm_mamba_pkd.models.policies import predict
from timm_mamba_pkd.models.reuse import Reuse, stage_features

_FIELDS = ("num_students", "num_classes", "input_size", "step_macs", "weights", "policy", "sha256")


@torch.no_grad()
def write_cascade(ensemble: MambaPKDEnsemble, images: Tensor, folder: Path) -> None:
    """Write all students of ``ensemble`` as student_1.onnx, ..., and what `OnnxCascade` needs besides as cascade.json.

    A student that reuses features takes those of earlier students as further inputs, and one whose features are reused
    has them as further outputs.

    Args:
        ensemble: made in timm's exportable mode, in eval mode.
        images: at least two (B, in_chans, H, W), float32, to trace on.
        folder: made when missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    connections = ensemble.connections()
    shared = {j for i, own in enumerate(connections) if own is not None for j in range(i - own.num_sources, i)}
    features: dict[str, Tensor] = {}
    for i, own in enumerate(connections):
        student = _Student(ensemble.students[i], own, i in shared).eval()
        sources = [] if own is None else [name for j in range(i - own.num_sources, i) for name in _names(ensemble, j)]
        inputs = (images, [features[name] for name in sources]) if sources else (images,)
        names = _names(ensemble, i) if i in shared else []
        write_onnx(student, inputs, ["input0", *sources], ["output0", *names], _graph(folder, i))
        if names:
            features.update(zip(names, student(*inputs)[1:], strict=True))
    policy, input_size = ensemble.policy, images.shape[1:]
    document = {
        "num_students": len(ensemble.students),
        "num_classes": ensemble.num_classes,
        "input_size": list(input_size),
        "step_macs": ensemble.step_macs(input_size),
        "weights": None if ensemble.weights is None else ensemble.weights.tolist(),
        "policy": None if policy is None else {name: getattr(policy, name) for name in _POLICY},
        "sha256": [_sha256(_graph(folder, i)) for i in range(len(ensemble.students))],
    }
    (folder / "cascade.json").write_text(f"{json.dumps(document, indent=2)}\n", encoding="utf-8")


_POLICY = ("measure", "thresholds", "temperatures")


class _Student(nn.Module):
    """One student as a graph: images, and the stages of the students it reuses, in; logits, and its stages, out."""

    def __init__(self, student: Any, own: Reuse | None, shared: bool) -> None:
        super().__init__()
        self.student, self.own, self.shared = student, own, shared

    def forward(self, images: Tensor, features: Sequence[Tensor] = ()) -> Any:
        if self.own is None and not self.shared:
            return self.student(images)
        count = len(self.student.stages)
        sources = [list(features[i : i + count]) for i in range(0, len(features), count)]
        stages = stage_features(self.student, images, self.own, sources)
        logits = self.student.forward_head(stages[-1])
        return (logits, *stages) if self.shared else logits


def _names(ensemble: MambaPKDEnsemble, position: int) -> list[str]:
    """Of the features that a student shares."""
    return [f"student_{position + 1}_stage_{i + 1}" for i in range(len(ensemble.students[position].stages))]


def _graph(folder: Path, position: int) -> Path:
    return folder / f"student_{position + 1}.onnx"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class OnnxCascade:
    """The students that `write_cascade` wrote, in ONNX Runtime on the CPU, as a `Cascade`.

    Args:
        folder: with cascade.json and the graphs.

    Attributes:
        policy: the fitted one, or None.

    Raises:
        ValueError: a file is missing, damaged or of another cascade, or the policy is out of range.
        ImportError: onnxruntime is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder).expanduser()
        path = folder / "cascade.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds no cascade: there is no cascade.json in it")
        try:
            self._read(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        self._sessions = [self._open(_graph(folder, i), digest) for i, digest in enumerate(self._digests)]

    def _read(self, document: Any) -> None:
        """Take what cascade.json says, or raise a ValueError."""
        if not isinstance(document, dict) or not set(_FIELDS) <= document.keys():
            raise ValueError(f"it must hold {', '.join(_FIELDS)}")
        self.num_students, self.num_classes, size, macs, weights, policy, digests = (document[name] for name in _FIELDS)
        check_count("num_students", self.num_students, 1)
        check_count("num_classes", self.num_classes, 1)
        for name, numbers, count in (("input_size", size, 3), ("step_macs", macs, self.num_students)):
            if not isinstance(numbers, list) or len(numbers) != count:
                raise ValueError(f"{name} must be a list of {count} numbers, got {numbers!r}")
            for number in numbers:
                check_count(name, number, 1)
        if not isinstance(digests, list) or len(digests) != self.num_students:
            raise ValueError(f"sha256 must be a list of {self.num_students} digests, got {digests!r}")
        self.input_size, self._step_macs, self._digests = tuple(size), macs, digests
        self.weights = None if weights is None else self._weights(weights)
        self.policy = None
        if policy is not None:
            if not isinstance(policy, dict) or not set(_POLICY) <= policy.keys():
                raise ValueError(f"policy must be null or hold {', '.join(_POLICY)}, got {policy!r}")
            self.policy = Confidence(policy["thresholds"], policy["temperatures"], policy["measure"])
            if len(self.policy.temperatures) != self.num_students:
                raise ValueError(f"the policy is for {len(self.policy.temperatures)} students, not {self.num_students}")

    def _weights(self, weights: Any) -> Tensor:
        square = (self.num_students, self.num_students)
        try:
            found = torch.tensor(weights, dtype=torch.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"weights must be null or lists of numbers: {error}") from error
        if found.shape not in (square, (*square, self.num_classes)) or not found.isfinite().all():
            raise ValueError(
                f"weights must be finite and {square} or {(*square, self.num_classes)}, got {tuple(found.shape)}"
            )
        return found

    def _open(self, path: Path, digest: str) -> Any:
        if not path.is_file():
            raise ValueError(f"{path} is missing: the cascade is of {self.num_students} students")
        if _sha256(path) != digest:
            raise ValueError(f"{path} is damaged or of another cascade: its SHA-256 is not the one in cascade.json")
        try:
            session = open_onnx_session(path, alone=False)
        except ImportError as error:
            raise ImportError(f"OnnxCascade needs onnxruntime ({error}): pip install 'timm_mamba_pkd[onnx]'") from error
        except Exception as error:  # onnxruntime's own, of many classes
            raise ValueError(f"{path} cannot be opened: {str(error).splitlines()[0]}") from error
        ends = [
            {end.name: tuple(end.shape[1:]) for end in found} for found in (session.get_inputs(), session.get_outputs())
        ]
        if ends[0].get("input0") != self.input_size or ends[1].get("output0") != (self.num_classes,):
            raise ValueError(
                f"{path} is of another cascade: it does not take images {self.input_size} to {self.num_classes} classes"
            )
        return session

    @property
    def active_positions(self) -> list[int]:
        """Positions (from 0) of the students."""
        return list(range(self.num_students))

    def parts(self) -> list[Any]:
        """The sessions, see `known`."""
        return self._sessions

    def steps(self, x: Tensor) -> "_Steps":
        """Begin a pass of images (B, in_chans, H, W) that runs students one by one."""
        return _Steps(self._sessions, x)

    def step_macs(self, input_size: Sequence[int]) -> list[int]:
        """Multiply-accumulates that each student adds to those before it, on an image of the graphs' size."""
        return self._step_macs

    def combine(self, student_logits: Sequence[Tensor]) -> Tensor:
        """Ensemble logits after each student, (k, B, num_classes), from the students' own, (k, B, num_classes)."""
        return combine(student_logits, self.weights)

    def predict(self, x: Tensor, policy: Policy | None = None) -> Prediction:
        """As `MambaPKDEnsemble.predict`, for float32 images (B, in_chans, H, W) on the CPU, of the graphs' size.

        Raises:
            ValueError: there is no policy, it cannot serve this cascade or batch, or the images are others.
        """
        check_images(x, self.input_size[0])
        if x.shape[1:] != self.input_size or x.dtype != torch.float32 or x.device.type != "cpu":
            size = ", ".join(map(str, self.input_size))
            raise ValueError(
                f"the graphs take images (B, {size}), float32 on the CPU, got {tuple(x.shape)}, {x.dtype} on {x.device}"
            )
        return predict(self, x, self.policy if policy is None else policy)


class _Steps:
    """One pass of images through the students; what one of them shares stays for later ones."""

    def __init__(self, sessions: Sequence[Any], x: Tensor) -> None:
        self._sessions, self._tensors = sessions, {"input0": x}

    def logits(self, position: int) -> Tensor:
        session = self._sessions[position]
        inputs = {end.name: self._tensors[end.name].detach().numpy() for end in session.get_inputs()}
        logits, *shared = map(torch.from_numpy, session.run(None, inputs))
        self._tensors.update(zip((end.name for end in session.get_outputs()[1:]), shared, strict=True))
        return logits

    def keep(self, indices: Tensor) -> None:
        self._tensors = {name: tensor[indices] for name, tensor in self._tensors.items()}
