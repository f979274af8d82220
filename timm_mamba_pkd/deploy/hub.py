"""Folders in the layout of the Hugging Face hub: config.json, model.safetensors and README.md, the model card."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import ModelCardData
from timm.models import save_for_hf

from timm_mamba_pkd.models import Confidence, MambaPKDEnsemble, count_macs
from timm_mamba_pkd.models.arguments import check_count
from timm_mamba_pkd.models.mamba_pkd import TAGS
from timm_mamba_pkd.report import count_params

PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # in timm's pretrained_cfg


def first_students(ensemble: MambaPKDEnsemble, k: int, img_size: tuple[int, int]) -> MambaPKDEnsemble:
    """An ensemble of the first ``k`` students of ``ensemble`` alone, with copies of their weights.

    Raises:
        ValueError: there are not so many.
    """
    check_count("k", k, 1, len(ensemble.students))
    state = {}
    for name, tensor in ensemble.state_dict().items():
        student = re.match(r"(?:students|reuse)\.(\d+)\.", name)
        if (student is None or int(student[1]) < k) and not name.startswith("policy."):
            state[name] = tensor[:k, :k] if name == "weights" else tensor
    state["active"] = torch.ones(k, dtype=torch.bool)
    smaller: Any = timm.create_model(
        "mamba_pkd_ensemble",
        students=list(ensemble.names[:k]),
        num_classes=ensemble.num_classes,
        in_chans=ensemble.in_chans,
        img_size=img_size,
        global_pool=ensemble.global_pool,
        combination=ensemble.combination,
    )
    smaller.load_state_dict(state)
    smaller.policy = None if ensemble.policy is None else ensemble.policy.first(k)
    own: Any = ensemble.pretrained_cfg
    smaller.pretrained_cfg.update({key: own[key] for key in PREPROCESSING if key in own})
    return smaller.train(ensemble.training)


def sections_of_tag(model: Any) -> dict[str, str]:
    """Results, data and recipe of the weights that come with this package, for `write_hub_folder`.

    Args:
        model: made by `timm.create_model` from a name with a tag; others have none.
    """
    file = model.pretrained_cfg.get("file")
    if file not in [traits["file"] for traits in TAGS.values() if "file" in traits]:
        return {}
    text = Path(file).with_suffix(".md").read_text(encoding="utf-8")  # of benchmarks/accuracy/pack.py
    _, *parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return {heading: body.strip() for heading, body in zip(parts[::2], parts[1::2], strict=True)}


def write_hub_folder(
    model: Any,
    folder: Path,
    input_size: tuple[int, int, int],
    data_config: Mapping[str, Any] | None = None,
    sections: Mapping[str, str] | None = None,
) -> None:
    """Write ``model`` by `timm.models.save_for_hf`, with safetensors alone, and a model card next to it.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads the folder, and ``hf upload REPO FOLDER`` puts it
    on the hub.

    Args:
        model: made by `timm.create_model`.
        folder: made when missing; its name is that of the model on the card.
        input_size: (C, H, W) of an image.
        data_config: timm's (``mean``, ``std``, ...), what the images are brought to before they enter the model.
        sections: of the card, Markdown by heading; one of a heading that is there already goes on there.
    """
    data = {"input_size": input_size, **(data_config or {})}
    save_for_hf(model, str(folder), safe_serialization=True, data_config=data)
    card = _card(model, folder.name, input_size, sections or {})
    (folder / "README.md").write_text(card, encoding="utf-8")


def _card(model: Any, name: str, input_size: tuple[int, int, int], sections: Mapping[str, str]) -> str:
    data = ModelCardData(
        license=model.pretrained_cfg.get("license") or "other",
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm"],
    )
    shape = "x".join(map(str, input_size))
    architecture = model.pretrained_cfg["architecture"]
    students = f" of {', '.join(model.names)}" if isinstance(model, MambaPKDEnsemble) else ""
    policy = model.policy if isinstance(model, MambaPKDEnsemble) else None
    usage = (
        "```python\n"
        "import timm  # after: pip install timm_mamba_pkd\n\n"
        f'model = timm.create_model("hf-hub:OWNER/{name}", pretrained=True).eval()  # or "local-dir:FOLDER"\n'
        "transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))\n"
    )
    if policy is not None:
        usage += f"found = model.predict(x)  # images (B, {', '.join(map(str, input_size))}): early exit\n"
        usage += "found.logits, found.students, found.macs  # (B, classes); students used, (B,); of the batch\n"
    parts = {
        "Model": (
            f"- architecture: `{architecture}`{students}\n"
            f"- classes: {model.num_classes}\n"
            f"- parameters: {count_params(model):,}\n"
            f"- multiply-accumulates of one image: {count_macs(model, input_size):,}\n"
            f"- image: {shape} (channels, height, width)"
        ),
        "Usage": f"{usage}```",
        **({} if policy is None else {"Early exit": _in_words(policy)}),
    }
    for heading, body in sections.items():
        parts[heading] = f"{parts[heading]}\n\n{body}" if heading in parts else body
    text = "".join(f"\n## {heading}\n\n{body}\n" for heading, body in parts.items())
    return f"---\n{data.to_yaml()}\n---\n\n# {name}\n{text}"


_CONFIDENCE = {
    "max_prob": "the largest probability",
    "margin": "the difference of the two largest probabilities",
    "entropy": "1 less the entropy's share of log(classes)",
}


def _in_words(policy: Confidence) -> str:
    """A policy as the card describes it."""
    rows = [
        f"| {k} | {temperature:.6g} | {threshold} |"
        for k, (temperature, threshold) in enumerate(
            zip(policy.temperatures, [*(f"{value:.6g}" for value in policy.thresholds), ""], strict=True), start=1
        )
    ]
    table = "\n".join(["| students | temperature | threshold |", "|---:|---:|---:|", *rows])
    return (
        "`model.predict` runs student after student on the images that still need it. An image leaves after k "
        f"students if the ensemble's confidence, {_CONFIDENCE[policy.measure]} (`{policy.measure}`) of its logits "
        f"divided by the temperature of k, is above the threshold of k; after the last one all leave.\n\n{table}"
    )
