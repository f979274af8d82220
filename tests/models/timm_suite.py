"""A pytest plugin: timm's own test files, unmodified, on our models.

Those are test_models, test_model_input, test_prune, test_utils and test_optim; the others, and the other tests in
these, take no model's name. The plugin replaces the names that a test is parametrised with, and the arguments next to
them, by those of RUN. A test that takes a model's name and is neither in RUN nor in EXCLUDED is an error.
"""

import fnmatch

import pytest

import timm_mamba_pkd  # noqa: F401 - registers the models

STUDENTS = [f"mamba_pkd_s{i}" for i in range(1, 8)]
ENSEMBLE = "mamba_pkd_ensemble"

# What stands next to the name in each case of a test.
RUN: dict[str, list[tuple]] = {
    "test_model_forward": [()],
    "test_model_backward": [()],
    "test_model_default_cfgs": [()],
    "test_reset_classifier_keeps_pool": [()],
    "test_features_only_grad_checkpointing_backward": [()],
    "test_model_forward_torchscript": [()],
    "test_model_forward_features": [()],
    "test_model_forward_intermediates_features": [()],
    "test_model_forward_intermediates": [()],
    "test_pruned_features_torchscript": [()],
    "test_feature_getter_stage_ends_torchscript": [()],
    "test_prune_intermediate_layers_params_used": [()],
    "test_head_hidden_size": [({},)],
    "test_features_only_feature_cls_class": [()],
    "test_forward_after_prune_intermediate_layers": [()],
    "test_prune_intermediate_layers_last_feature": [(True,)],
    "test_prune_intermediate_layers_contract": [()],
    "test_prune_to_stem_feature": [()],
    "test_forward_intermediates_stop_early_final_norm": [({},)],
    "test_resnetv2_stem_feature_odd_size": [({},)],
    "test_model_forward_fx": [()],
    "test_model_backward_fx": [()],
    "test_model_forward_fx_torchscript": [()],
    "test_model_forward_torchscript_with_features_fx": [()],
    "test_model_init_weights_after_to_empty": [({},)],
    "test_headless_checkpoint_reload": [({},)],
    "test_relpos_non_square_checkpoint_reload": [({},)],
    "test_relpos_non_square_set_input_size": [({},)],
    "test_relpos_family_set_input_size": [({}, 32, 48)],
    "test_default_resize_hub_roundtrip": [({}, 32, 48)],
    "test_export_tracks_reset_pool_in_head": [(3, "max"), (0, "")],
    "test_export_tracks_reset_classifier_structure": [({}, "max", None)],
    "test_pruned_feature_info_matches_forward": [()],
    "test_freeze_unfreeze_root_parameters": [()],
    "test_param_groups_layer_decay_trunk_layer": [
        ("stages.1.downsample.pointwise.conv.weight", "stages.1.blocks.0.norm.weight")
    ],
}

# By pattern; why a test does not apply to our models.
EXCLUDED = {
    "test_model_inference": "compares with tensors in timm's repositories on the hub",
    "test_model_load_pretrained": "downloads; no weights of ours are on the hub",
    "test_model_features_pretrained": "downloads; no weights of ours are on the hub",
    "test_model_default_cfgs_non_std": "for tokens; models with feature maps, as ours, are in test_model_default_cfgs",
    "test_catavgmax_unsupported": "ours do support it, see test_head_hidden_size",
    "test_model_features_output_stride": "the argument output_stride, of models that can be dilated",
    "test_prune_extra_blocks_stem_width": "the argument extra_blocks, of EfficientNet and MobileNet",
    "test_prune_class_token_avg_pool": "class tokens",
    "test_param_groups_layer_decay_reg_token_stem": "register tokens",
    "test_pruned_efficientnet_in_chans": "the pruned EfficientNet's modules, by name",
    "test_model_features_space2depth_reduction": "EfficientNet-X's five levels, as numbers",
    "test_radio_checkpoint_filter": "RADIO's released weights",
    "test_vit_classifier_*": "encoders of vision language models, with arguments of their own",
    "test_efficientvim_branch_features": "EfficientViM's modules, by name",
    "test_mobile_model_fusion_features": "EfficientViM's and iFormer's fused modules",
    "test_swin_family_*": "shifted windows",
    "test_windowed_model_resize_roundtrip": "shifted windows",
    "test_eval_refreshes_attention_bias_cache": "caches of attention biases",
    "test_eval_attention_bias_cache_after_dtype_change": "caches of attention biases",
}

# The same for the ensemble alone.
FEATURES = "the students' features are of different widths; the ensemble has logits only"
EXCLUDED_FOR_THE_ENSEMBLE = {
    "test_model_default_cfgs": FEATURES,
    "test_reset_classifier_keeps_pool": FEATURES,
    "test_head_hidden_size": FEATURES,
    "test_headless_checkpoint_reload": FEATURES,
    "test_export_tracks_reset_pool_in_head": FEATURES,
    "test_*features*": FEATURES,
    "test_*feature_*": FEATURES,
    "test_*intermediate*": FEATURES,
    "test_prune_*": FEATURES,
    "test_param_groups_layer_decay_trunk_layer": "the layers of a student do not follow those of another",
    "test_model_forward_torchscript": "a loop over students in Python, which TorchScript takes as an FX graph: "
    "test_model_forward_fx_torchscript",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name, markers = metafunc.definition.originalname, metafunc.definition.own_markers
    for position, marker in enumerate(markers):
        if marker.name != "parametrize" or marker.args[0].split(",")[0] not in ("model_name", "name"):
            continue
        if name in RUN:
            models = STUDENTS if _matches(name, EXCLUDED_FOR_THE_ENSEMBLE) else [*STUDENTS, ENSEMBLE]
            cases = [(model, *rest) for model in models for rest in RUN[name]]
            values = cases if len(cases[0]) > 1 else [model for (model,) in cases]
            markers[position] = pytest.mark.parametrize(marker.args[0], values).mark
        elif not _matches(name, EXCLUDED):
            raise pytest.UsageError(f"{name} takes a model's name: put it into RUN or EXCLUDED of timm_suite.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [getattr(item, "originalname", None) for item in items]
    if absent := set(RUN).difference(names):
        raise pytest.UsageError(f"this timm has no {', '.join(sorted(absent))}: take it out of timm_suite.py")
    items[:] = [item for item, name in zip(items, names, strict=True) if name in RUN]


def _matches(name: str, patterns: dict[str, str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
