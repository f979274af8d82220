"""Models that leave: files for other runtimes, and folders for the Hugging Face hub."""

from timm_mamba_pkd.deploy.cascade import OnnxCascade, write_cascade
from timm_mamba_pkd.deploy.formats import FORMATS, Format, quantize_onnx
from timm_mamba_pkd.deploy.hub import first_students, sections_of_tag, write_hub_folder

__all__ = [
    "FORMATS",
    "Format",
    "OnnxCascade",
    "first_students",
    "quantize_onnx",
    "sections_of_tag",
    "write_cascade",
    "write_hub_folder",
]
