"""Tiny networks with random weights, of the real detectors' classes, saved as transformers folders."""

import json
from pathlib import Path


def save_pose_model(
    folder: Path, *, width: int = 128, height: int = 128, crops_boxes: bool = False, keypoints: int = 17
) -> Path:
    """Save a VitPoseForPoseEstimation whose heatmaps have a quarter of the input's width and height."""
    import torch
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

    torch.manual_seed(0)
    backbone = VitPoseBackboneConfig(
        image_size=(height, width),
        patch_size=(16, 16),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        out_indices=[2],
    )
    config = VitPoseConfig(backbone_config=backbone, num_labels=keypoints, initializer_range=0.2)
    VitPoseForPoseEstimation(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "VitPoseImageProcessor",
        "size": {"height": height, "width": width},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_affine_transform": crops_boxes,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_spot_finder(folder: Path) -> Path:
    """Save a VitPoseForPoseEstimation whose 17 heatmaps peak at 1.1 in the middle of one bright patch.

    Its blocks add nothing: whether a patch of 16 x 16 is bright passes straight from the embedding to the
    head. On a black picture the heatmaps are zero.
    """
    import torch
    from transformers import VitPoseForPoseEstimation

    save_pose_model(folder)
    model = VitPoseForPoseEstimation.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        tensors = dict(model.named_parameters())
        tensors["backbone.embeddings.patch_embeddings.projection.weight"][0] = 1e-3
        tensors["backbone.embeddings.patch_embeddings.projection.bias"][0] = 0.5  # so that black is negative
        tensors["backbone.layernorm.weight"][0] = 0.2
        tensors["head.conv.weight"][:, 0, 1, 1] = 1.0
    model.save_pretrained(folder)
    return folder


def save_depth_model(folder: Path, *, kind: str = "relative") -> Path:
    """Save a DepthAnythingForDepthEstimation with patches of 8 and an input of about 128 x 128 pixels."""
    import torch
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    torch.manual_seed(0)
    backbone = Dinov2Config(
        image_size=128,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        initializer_range=0.2,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=8,
        reassemble_hidden_size=32,
        reassemble_factors=[4, 2, 1, 0.5],
        neck_hidden_sizes=[16, 16, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
        depth_estimation_type=kind,
        max_depth=20 if kind == "metric" else 1,
        initializer_range=0.2,
    )
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "DPTImageProcessor",
        "size": {"height": 128, "width": 128},
        "keep_aspect_ratio": True,
        "ensure_multiple_of": 8,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_person_detector(folder: Path, *, labels: tuple[str, str] = ("cat", "person")) -> Path:
    """Save an RTDetrForObjectDetection with two labels."""
    import torch
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 16, 16],
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=10,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        decoder_layers=2,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    RTDetrForObjectDetection(config).save_pretrained(folder)
    processor = {"image_processor_type": "RTDetrImageProcessor", "size": {"height": 128, "width": 128}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
