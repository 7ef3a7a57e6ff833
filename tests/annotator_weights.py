"""Random weights of controlnet-aux's networks, in files of the real layout and names."""

import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from controlkit.preprocessors.annotators import import_annotator, quietly

Save = Callable[[Path], None]


def _saver(file: str, module: str, make: Callable[[Any], Any], *, key: str = "", prefix: str = "") -> Save:
    def save(folder: Path) -> None:
        part = import_annotator(module)
        torch.manual_seed(0)
        with quietly():
            network = make(part)
        tensors = {prefix + name: value for name, value in network.state_dict().items()}
        torch.save({key: tensors} if key else tensors, folder / file)

    return save


def _lively_mlsd(module: Any) -> Any:
    """Return an M-LSD network that finds lines: as it is initialised, all are shorter than a pixel."""
    network = module.MobileV2_MLSD_Large()
    *_, last = (part for part in network.modules() if isinstance(part, torch.nn.Conv2d))
    with torch.no_grad():
        last.weight *= 60
    return network


def _lively_pidinet(module: Any) -> Any:
    """Return a PiDiNet with answers between 0 and 1: as it is initialised, all are the same."""
    network = module.pidinet()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
        network.classifier.weight.fill_(1.0)
    return network


def _anime(module: Any) -> Any:
    norm = functools.partial(torch.nn.InstanceNorm2d, affine=False, track_running_stats=False)
    return module.UnetGenerator(3, 1, 8, 64, norm_layer=norm, use_dropout=False)


def _leres_merger(module: Any) -> Any:
    networks = import_annotator("leres.pix2pix.models.networks")
    return networks.define_G(2, 1, 64, "unet_1024", "none", False, "normal", 0.02, [])


def _bae(module: Any) -> Any:
    options = types.SimpleNamespace(
        mode="client", architecture="BN", pretrained="scannet", sampling_ratio=0.4, importance_ratio=0.7
    )
    return module.NNET(options)


SAVE: dict[str, list[Save]] = {
    "hed": [_saver("ControlNetHED.pth", "hed", lambda m: m.ControlNetHED_Apache2())],
    "pidinet": [
        _saver("table5_pidinet.pth", "pidi", _lively_pidinet, key="state_dict", prefix="module."),
    ],
    "mlsd": [_saver("mlsd_large_512_fp32.pth", "mlsd", _lively_mlsd)],
    "lineart": [
        _saver("sk_model.pth", "lineart", lambda m: m.Generator(3, 1, 3)),
        _saver("sk_model2.pth", "lineart", lambda m: m.Generator(3, 1, 3)),
    ],
    "lineart_anime": [_saver("netG.pth", "lineart_anime", _anime, prefix="module.")],
    "midas": [
        _saver(
            "dpt_hybrid-midas-501f0c75.pt",
            "midas.midas.dpt_depth",
            lambda m: m.DPTDepthModel(backbone="vitb_rn50_384"),
        )
    ],
    "zoe": [
        _saver(
            "ZoeD_M12_N.pt",
            "zoe",
            lambda m: m.ZoeDepth.build_from_config(m.get_config("zoedepth", "infer")),
            key="model",
        )
    ],
    "leres": [
        _saver(
            "res101.pth",
            "leres",
            lambda m: m.RelDepthModel(backbone="resnext101"),
            key="depth_model",
            prefix="module.",
        ),
        _saver("latest_net_G.pth", "leres", _leres_merger),
    ],
    "normalbae": [_saver("scannet.pt", "normalbae", _bae, key="model", prefix="module.")],
}
"""Kind: what writes each of its files into a folder."""


def save_weights(kind: str, folder: Path) -> Path:
    """Write the weights of a kind into a new folder and return it."""
    folder.mkdir(exist_ok=True)
    for save in SAVE[kind]:
        save(folder)
    return folder
