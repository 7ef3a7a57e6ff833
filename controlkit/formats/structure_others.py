"""The configurations of T2I-Adapters and ControlNet-XS, from the shapes of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controlkit.formats.structure import Config, Shapes, hint_config, uses_linear

_PIXELS = 8  # side of the squares that an adapter for SD1 and SD2 takes as one place; SDXL's takes 16
_XL_INPUTS = (256, 768)  # channels behind unshuffling by 16, of grey and of coloured maps


def t2i_config(shapes: Shapes) -> Config:
    """A T2I-Adapter's configuration. Mou et al. 2023, arXiv:2302.08453; SDXL's is told by its input's width.

    Raises ValueError for missing tensors, and for the oldest adapters, whose blocks diffusers does not have.
    """
    levels = shapes.count(r"adapter\.body\.(\d+)\.")
    common = {"num_res_blocks": shapes.count(r"adapter\.body\.0\.resnets\.(\d+)\.")}
    if "adapter.conv_in.weight" not in shapes:
        widths = [shapes.size(f"adapter.body.{level}.out_conv.weight", 0) for level in range(levels)]
        if widths[-1:] != widths[-2:-1]:
            raise ValueError(f"{shapes.where}: a light T2I-Adapter's last two levels must be equally wide")
        channels = shapes.size("adapter.body.0.in_conv.weight", 1)
        return {
            "adapter_type": "light_adapter",
            "in_channels": channels // _PIXELS**2,
            "channels": widths[:-1],
            "downscale_factor": _PIXELS,
            **common,
        }
    channels = shapes.size("adapter.conv_in.weight", 1)
    large = channels in _XL_INPUTS
    pixels = 2 * _PIXELS if large else _PIXELS
    return {
        "adapter_type": "full_adapter_xl" if large else "full_adapter",
        "in_channels": channels // pixels**2,
        "channels": [
            shapes.size(f"adapter.body.{level}.resnets.0.block1.weight", 0) for level in range(levels)
        ],
        "downscale_factor": pixels,
        **common,
    }


def light_config(shapes: Shapes) -> Config:
    """The configuration of our light network, `controlkit.light.LightControl`, but for its U-Net's family.

    Raises ValueError for missing tensors.
    """
    indices = [key.split(".")[1] for key in shapes.entries if key.startswith("encoder.")]
    convolutions = sorted({int(index) for index in indices if f"encoder.{index}.weight" in shapes})
    if len(convolutions) < 2:
        raise ValueError(f"{shapes.where} lacks encoder.2: it is incomplete")
    blocks = sum(f"encoder.{index}.conv1.weight" in shapes for index in set(indices))
    *inner, last = convolutions
    return {
        "conditioning_channels": shapes.size("encoder.0.weight", 1),
        "block_out_channels": [shapes.size(f"encoder.{last}.weight", 0)],
        "widths": [shapes.size(f"encoder.{index}.weight", 0) for index in inner],
        "layers": blocks - len(inner) + 1,
    }


def check_t2i(config: Mapping[str, Any], shapes: Shapes) -> None:
    """Raise ValueError for what a file says of itself, where it could not be a T2I-Adapter's configuration.

    It goes before `t2i_config`, which cannot tell four grey maps at once from one of SDXL's.
    """
    channels = config.get("channels")
    widths = list(channels) if isinstance(channels, list | tuple) else [channels]
    numbers = [config.get("in_channels"), config.get("downscale_factor"), config.get("num_res_blocks", 2)]
    kinds = ("full_adapter", "full_adapter_xl", "light_adapter")
    if config.get("adapter_type") not in kinds or not all(
        type(number) is int for number in (*numbers, *widths)
    ):
        raise ValueError(f"{shapes.where}: the configuration that it has of itself is no T2I-Adapter's")


def xs_config(shapes: Shapes) -> Config:
    """A ControlNet-XS's configuration (Zavadski et al. 2023, arXiv:2312.06573), of diffusers' class.

    Raises ValueError for missing tensors.
    """
    levels = shapes.count(r"down_blocks\.(\d+)\.")
    attended = [shapes.count(rf"down_blocks\.{level}\.attentions\.(\d+)\.") > 0 for level in range(levels)]
    depths = [
        shapes.count(rf"down_blocks\.{level}\.attentions\.0\.transformer_blocks\.(\d+)\.") if text else 1
        for level, text in enumerate(attended)
    ]
    if not attended[-1]:
        depths[-1] = shapes.count(r"mid_block\.midblock\.attentions\.0\.transformer_blocks\.(\d+)\.")
    width = shapes.text_width()
    if width is None:
        raise ValueError(f"{shapes.where} is incomplete: it holds no attention that reads the text")
    return {
        **hint_config(shapes),
        "learn_time_embedding": "time_embedding.linear_1.weight" in shapes,
        "block_out_channels": [
            shapes.size(f"down_blocks.{level}.resnets.0.conv1.weight", 0) for level in range(levels)
        ],
        "base_block_out_channels": [
            shapes.size(f"down_blocks.{level}.ctrl_to_base.0.weight", 0) for level in range(levels)
        ],
        "cross_attention_dim": width,
        "down_block_types": ["CrossAttnDownBlock2D" if text else "DownBlock2D" for text in attended],
        "transformer_layers_per_block": depths if set(depths) != {1} else 1,
        "use_linear_projection": uses_linear(shapes, width),
    }


def xs_with_untold(config: Config, unet: Mapping[str, Any] | None) -> Config:
    """The configuration with what no shape tells, which ControlNet-XS takes from its base's U-Net."""
    if unet is None:
        return config
    untold = {
        "num_attention_heads": unet["attention_head_dim"],
        "max_norm_num_groups": unet["norm_num_groups"],
        "upcast_attention": unet.get("upcast_attention") or False,
        "sample_size": unet.get("sample_size"),
    }
    return {**untold, **config}
