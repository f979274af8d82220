"""The baseline: every student learns from the teacher alone."""

from typing import Any

from timm_mamba_pkd.distillation.rules.rule import Rule


class Independent(Rule):
    """Each student is distilled on its own, with the user's criterion only; the ensemble averages them."""

    def loss_terms(self, stage: int) -> dict[str, dict[str, Any]]:
        return {}
