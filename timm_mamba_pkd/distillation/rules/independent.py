"""The baseline: every student learns from the teacher alone."""

from timm_mamba_pkd.distillation.rules.rule import Rule


class Independent(Rule):
    """Each student is distilled on its own, with the user's criterion only; the ensemble averages them."""

    adds_loss = False
