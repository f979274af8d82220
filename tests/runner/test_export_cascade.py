"""``mamba-pkd export --format cascade``: images leave as in eager PyTorch, or nothing is written."""

import re
from typing import Any, cast

import pytest
import timm
import torch
from timm.models import save_for_hf

from timm_mamba_pkd.cli import main
from timm_mamba_pkd.deploy import FORMATS, OnnxCascade
from timm_mamba_pkd.models import Confidence, Prediction, confidence
from timm_mamba_pkd.runner import ConfigError
from timm_mamba_pkd.runner.export_cascade import _require_same_exits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NEEDS_ONNX = pytest.mark.skipif(bool(FORMATS["onnx"].missing()), reason="ONNX's packages are not installed")


@pytest.fixture(autouse=True)
def no_stopwatch(monkeypatch):
    for module in ("export", "export_cascade"):
        monkeypatch.setattr(f"timm_mamba_pkd.runner.{module}.median_time", lambda run, repeats: 1.0)


def quick_ensemble(count: int) -> Any:
    """Of a model of timm's that is exported soon; it is sure of different images."""
    torch.manual_seed(0)
    sizes: Any = {"num_classes": 3, "in_chans": 1, "img_size": 8}
    ensemble: Any = timm.create_model("mamba_pkd_ensemble", students=["test_efficientnet"] * count, **sizes).eval()
    with torch.no_grad():
        for student in ensemble.students:
            student.classifier.weight *= 2 / student(torch.randn(20, 1, 8, 8)).std()
    return ensemble


@NEEDS_ONNX
def test_cascade(tmp_path, capsys):
    """A folder with the first students, beside that for the hub; the policy is cut to them."""
    ensemble = quick_ensemble(3)
    ensemble.policy = Confidence([0.7, 0.8], [1.0, 1.0, 1.5])
    save_for_hf(ensemble, str(tmp_path / "all"), safe_serialization=True)
    words = ["export", f"local-dir:{tmp_path / 'all'}", "--students", "2", "--output", str(tmp_path / "out")]
    assert main([*words, "--format", "cascade", "hf"]) == 0
    number = r"\d\.\de-\d\d"
    path = tmp_path / "out" / "all_2_cascade"
    line = (
        rf"{re.escape(str(path))}  [\d.]+ kB  largest difference {number} \(random\), {number} \(digits\)  "
        rf"0.143 ms an image, 1.0 times as fast as eager predict \(the fitted policy: [\d.]+ of 2 students, digits\)"
    )
    out = capsys.readouterr().out
    assert re.search(f"^{line}$", out, re.MULTILINE), out
    cascade, smaller = OnnxCascade(path), timm.create_model(f"local-dir:{tmp_path}/out/all_2", pretrained=True).eval()
    x = torch.randn(20, 1, 8, 8)
    found, true = cascade.predict(x), cast(Any, smaller).predict(x)
    assert found.students.tolist() == true.students.tolist() and set(true.students.tolist()) == {1, 2}
    torch.testing.assert_close(found.logits, true.logits, rtol=1e-4, atol=1e-4)


@NEEDS_ONNX
def test_a_cascade_that_leaves_elsewhere_is_not_left(tmp_path, capsys, monkeypatch):
    save_for_hf(quick_ensemble(2), str(tmp_path / "all"), safe_serialization=True)
    predict = OnnxCascade.predict

    def one_more(self: OnnxCascade, x: torch.Tensor, policy: Any) -> Prediction:
        found = predict(self, x, policy)
        return Prediction(found.logits, found.students + 1, found.macs)

    monkeypatch.setattr(OnnxCascade, "predict", one_more)
    words = ["export", f"local-dir:{tmp_path / 'all'}", "--format", "cascade", "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "all_2 differs from eager predict on random: image 1 uses 3 students, not 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_rounding_excuses_another_exit():
    ensemble, x = quick_ensemble(2), torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        one, both = ensemble.combine(ensemble.student_logits(x))
    sure = float(confidence(one))

    class Other:
        def predict(self, x: torch.Tensor, policy: Any) -> Prediction:
            return Prediction(both if policy.thresholds[0] < sure else one, torch.tensor([1 + leaves]), 0)

    other: Any = Other()
    for distance, excused in ((5e-5, True), (-5e-5, True), (2e-4, False), (-2e-4, False)):
        policy = Confidence([sure + distance])
        leaves = policy.thresholds[0] < sure  # in eager PyTorch, and so not in the other
        if excused:
            _require_same_exits("it", ensemble, other, policy, x, "random")
        else:
            with pytest.raises(ConfigError, match="it differs from eager predict on random: image 1 uses"):
                _require_same_exits("it", ensemble, other, policy, x, "random")


@NEEDS_ONNX
def test_cascades_are_of_ensembles(tmp_path, capsys):
    words = ["export", "mamba_pkd_s1", "--format", "cascade", "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert capsys.readouterr().err == "mamba-pkd: error: --format cascade is for ensembles, and mamba_pkd_s1 is none\n"
