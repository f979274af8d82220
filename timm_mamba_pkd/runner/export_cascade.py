"""``mamba-pkd export --format cascade``: early exit in ONNX Runtime, compared with eager PyTorch image by image."""

from pathlib import Path

import torch
from timm.layers import set_exportable
from torch import Tensor

from timm_mamba_pkd.deploy import OnnxCascade, write_cascade
from timm_mamba_pkd.models import Agreement, Confidence, Depth, MambaPKDEnsemble, confidence
from timm_mamba_pkd.report import median_time
from timm_mamba_pkd.runner.errors import ConfigError, first_line
from timm_mamba_pkd.runner.export_subject import BATCHES, LEAST, TOLERANCE, Subject, differences


def export_cascade(subject: Subject, path: Path, images: dict[str, Tensor]) -> str:
    """Write an ensemble as a folder for `OnnxCascade`, and say how that compares with eager PyTorch.

    Raises:
        ConfigError: it cannot be exported, or images get other logits or leave elsewhere.
    """
    ensemble = subject.first_students()
    with set_exportable(True):
        exportable = subject.first_students()
    policy, words = (ensemble.policy, "the fitted policy") if ensemble.policy else (Agreement(), "agreement")
    kind, batch = list(images.items())[-1]  # the real ones, if there are any
    try:
        write_cascade(exportable, images["random"][:2], path)
        cascade = OnnxCascade(path)
    except Exception as error:  # whatever an exporter, or a runtime, raises on a model that it does not support
        raise ConfigError(f"{subject.name} cannot be exported as cascade: {first_line(error)}") from error
    found = differences(subject, lambda x: cascade.predict(x, Depth(len(ensemble.students))).logits, images, TOLERANCE)
    for name, compared in images.items():
        for count in BATCHES:
            _require_same_exits(subject.name, ensemble, cascade, policy, compared[:count], name)
    eager, own = (_time_of_predict(model, batch, policy) for model in (ensemble, cascade))
    used, count = float(cascade.predict(batch, policy).students.double().mean()), len(ensemble.students)
    speed = f"{own:.3g} ms an image, {eager / own:.1f} times as fast as eager predict"
    return f"{found}  {speed} ({words}: {used:.3g} of {count} students, {kind})"


def _time_of_predict(model: MambaPKDEnsemble | OnnxCascade, images: Tensor, policy: Confidence | Agreement) -> float:
    """Milliseconds for an image, one by one: early exit takes longer for some than for others."""
    singly = images.split(1)
    return median_time(lambda: [model.predict(image, policy) for image in singly], repeats=50) / len(images)


def _require_same_exits(
    name: str,
    ensemble: MambaPKDEnsemble,
    cascade: OnnxCascade,
    policy: Confidence | Agreement,
    x: Tensor,
    kind: str,
) -> None:
    """Raise a ConfigError unless the images leave where they do in eager PyTorch, with the same logits.

    An image may leave elsewhere if its confidence is within `TOLERANCE` of a threshold or, where agreement decides, its
    two largest logits are as near to each other as different logits may be.
    """
    true, ours = ensemble.predict(x, policy), cascade.predict(x, policy)
    with torch.no_grad():
        steps = ensemble.combine(ensemble.student_logits(x))  # (N, B, C)
    allowed = TOLERANCE * max(LEAST, float(steps.abs().max()))
    for i, (one, other) in enumerate(zip(true.students.tolist(), ours.students.tolist(), strict=True)):
        if one == other:
            same = bool((true.logits[i] - ours.logits[i]).abs().max() <= allowed)
        else:
            same = _undecided(steps[: min(one, other), i], policy, allowed)
        if not same:
            raise ConfigError(
                f"{name} differs from eager predict on {kind}: image {i + 1} uses {other} students, not {one}, or "
                "gets other logits: not written"
            )


def _undecided(steps: Tensor, policy: Confidence | Agreement, allowed: float) -> bool:
    """Whether rounding decides if an image leaves with the last of ``steps``, ensemble logits (k, C).

    ``allowed`` is how much logits may differ.
    """
    if isinstance(policy, Confidence):
        k = len(steps) - 1
        sure = float(confidence(steps[-1], policy.measure, policy.temperatures[k]))
        return abs(sure - policy.thresholds[k]) <= TOLERANCE
    first, second = steps.topk(2).values.unbind(-1)
    return bool((first - second <= allowed).any())
