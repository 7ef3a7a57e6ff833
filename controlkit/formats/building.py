"""Networks from adapter files: every tensor of the file used, every tensor of the network set.

`BUILDERS` says how a kind becomes a network; a kind that is not in it is recognised and refused by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from controlkit.formats import control_lora
from controlkit.formats.adapter_file import AdapterFile
from controlkit.formats.expected import COPIED
from controlkit.formats.recognise import KINDS
from controlkit.formats.structure import (
    IN_NO_SHAPE,
    MODULES,
    PUBLISHED_WIDTHS,
    TEXT_FAMILIES,
    UNTOLD,
    Shapes,
    by,
    controlnet_config,
    with_untold,
)
from controlkit.formats.structure_others import xs_with_untold
from controlkit.formats.weight_file import Stored
from controlkit.naming import first_of

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_REFUSALS = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
)
Made = TypeVar("Made")
Builder = Callable[[AdapterFile, "UNet2DConditionModel | None"], nn.Module]
LeftOut = Callable[[str, Tensor], Tensor | None]
"""What stands for a tensor that a file leaves out, by its name and the network's own; None: nothing does."""


def build_network(
    file: AdapterFile,
    *,
    unet: UNet2DConditionModel | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The network of a file, on the CPU, in evaluation mode. ``dtype`` None keeps the file's precision.

    ``unet``: of the base that it is for, which knows what no shape tells; a difference and a Control-LoRA
    need it. Raises ValueError, one line that names the file, for a kind that is not run here, a missing,
    unknown, misshapen or non-finite tensor (the first is named, the others are counted), and damaged bytes.
    """
    if file.kind not in BUILDERS:
        raise ValueError(f"{file.path} is {KINDS[file.kind]}, which controlkit does not run")
    network = BUILDERS[file.kind](file, unet)
    if dtype is not None:
        network = nn.Module.to(network, dtype)  # diffusers' own speaks of modules that these do not have
    check_finite(network.state_dict(), str(file.path))
    return network.eval()


def check_whole(file: AdapterFile, base: Mapping[str, Any] | None, *, name: str = "") -> None:
    """Raise `build_network`'s ValueError for a file's names and shapes, without reading its weights.

    ``base``: the configuration of its base's U-Net, and ``name`` the base's; None checks what is known
    without one.
    """
    hollow: Any = replace(file, weights=file.weights.hollow())
    with torch.device("meta"):
        if base is not None:
            unet = _hollow_unet(base, name)
            network: Any = BUILDERS[file.kind](hollow, unet)
            if file.kind == "lllite":
                from controlkit import lllite

                lllite.check_fits(network, unet, base=name)
        elif file.kind == "control-lora":
            _plainly(file, lambda: control_lora.check_pairs(hollow.tensors()))
        else:  # no shape depends on how many heads and groups there are, as long as they divide it
            any_base: Any = SimpleNamespace(config={"attention_head_dim": 1, "norm_num_groups": 1})
            builder = _plain_difference if file.kind == "controlnet-difference" else BUILDERS[file.kind]
            builder(hollow, any_base)


def _hollow_unet(config: Mapping[str, Any], name: str) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    try:
        return UNet2DConditionModel(**_taken(UNet2DConditionModel, config))
    except _REFUSALS as error:
        raise ValueError(
            f"cannot build the U-Net of the base {name} from its configuration: {error}"
        ) from error


def full_config(file: AdapterFile, unet: Mapping[str, Any] | None) -> dict[str, Any]:
    """The complete configuration of a file's network: what its shapes do not tell is as in ``unet``.

    Raises ValueError where there is none, and the file is of no published size, whose values are known.
    """
    config = {key: value for key, value in file.config.items() if not key.startswith("_")}
    if file.is_told or file.kind in ("t2i-adapter", "lite"):
        return config
    if unet is None and not heads_are_known(file):
        raise ValueError(
            f"{file.path} does not say how many attention heads it has: name the base that it is for (--base)"
        )
    return xs_with_untold(config, unet) if file.kind == "controlnet-xs" else with_untold(config, unet)


def heads_are_known(file: AdapterFile) -> bool:
    """Whether a file's attention heads are known without its base: it says so, or is of a published size."""
    if file.is_told or file.kind not in ("controlnet", "controlnet-union", "controlnet-xs"):
        return True
    family = TEXT_FAMILIES.get(file.config.get("cross_attention_dim", 0))
    if family is None or file.kind == "controlnet-xs":
        return False
    heads, widths = UNTOLD[family]["attention_head_dim"], file.config["block_out_channels"]
    return {*widths} <= PUBLISHED_WIDTHS and (isinstance(heads, int) or len(heads) == len(widths))


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError naming the first tensor with a number that is not finite."""
    for key, tensor in tensors.items():
        values = tensor.float() if tensor.element_size() == 1 else tensor  # 8-bit floats cannot be asked
        if not torch.isfinite(values).all():
            raise ValueError(f"{where}: the weights in {key} are not all finite numbers")


def assemble(
    class_name: str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    where: object,
    *,
    left_out: LeftOut | None = None,
) -> nn.Module:
    """A network of diffusers' class with these tensors. Raises ValueError unless they are exactly its own."""
    cls = getattr(importlib.import_module(MODULES.get(class_name, "diffusers")), class_name)
    try:
        with torch.device("meta"):
            network: nn.Module = cls(**_taken(cls, config))
    except _REFUSALS as error:
        raise ValueError(f"{where}: cannot build {class_name} of its sizes: {error}") from error
    wanted = network.state_dict()
    given = {key: left_out(key, own) for key, own in wanted.items() if key not in state} if left_out else {}
    state = {**state, **{key: tensor for key, tensor in given.items() if tensor is not None}}
    state = {key: _projection(tensor, wanted.get(key)) for key, tensor in state.items()}
    check_coverage({key: tuple(tensor.shape) for key, tensor in wanted.items()}, state, class_name, where)
    network.load_state_dict(state, assign=True)
    return network


def check_coverage(
    wanted: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], class_name: str, where: object
) -> None:
    """Raise ValueError unless a file's tensors are a network's, name by name and shape by shape."""
    for names, problem in (
        ([key for key in wanted if key not in state], "lacks {}"),
        ([key for key in state if key not in wanted], f"holds {{}}, which no {class_name} has"),
    ):
        if names:
            raise ValueError(f"{where} {problem.format(first_of(names))}")
    wrong = [key for key in wanted if tuple(state[key].shape) != wanted[key]]
    if wrong:
        shapes = f"{by(tuple(state[wrong[0]].shape))} instead of {by(wanted[wrong[0]])}"
        raise ValueError(f"{where}: the shape of {first_of(wrong)} is {shapes}")


def _taken(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a class takes of a configuration, as diffusers does: another version's may say more."""
    return {key: value for key, value in config.items() if key in signature(cls.__init__).parameters}


def _projection(tensor: Tensor, wanted: Tensor | None) -> Tensor:
    """A projection as its layer wants it: a 1x1 convolution and a matrix are the same numbers."""
    if wanted is None or tensor.shape == wanted.shape or tensor.ndim == wanted.ndim:
        return tensor
    same = [side for side in tensor.shape if side != 1] == [side for side in wanted.shape if side != 1]
    return tensor.reshape(wanted.shape) if same and {tensor.ndim, wanted.ndim} == {2, 4} else tensor


def _plain(
    file: AdapterFile, unet: UNet2DConditionModel | None, *, left_out: LeftOut | None = None
) -> nn.Module:
    assert file.class_name is not None
    config = full_config(file, None if unet is None else unet.config)
    return assemble(file.class_name, config, file.tensors(), file.path, left_out=left_out)


def _plain_difference(file: AdapterFile, unet: UNet2DConditionModel | None) -> nn.Module:
    """A difference by itself, whose base is not at hand."""
    return _plain(file, unet, left_out=lambda key, own: own if key.startswith(COPIED) else None)


def _difference(file: AdapterFile, unet: UNet2DConditionModel | None) -> nn.Module:
    """Values that are added to those of the base's encoder, as sd-webui-controlnet and ComfyUI do.

    What sd-webui-controlnet's extract_controlnet_diff.py finds unchanged it leaves out.
    """
    assert file.class_name is not None
    base = _state_of(unet, file)
    state = file.tensors()
    for key, tensor in base.items():
        if key in state:
            # A base that fills holes sees more besides the latents, which come first.
            own = tensor[:, : state[key].shape[1]] if key == "conv_in.weight" else tensor
            if own.shape.numel() != state[key].shape.numel():
                raise ValueError(
                    f"{file.path} is the difference to another base: {key} is {by(tuple(state[key].shape))}"
                    f" in it and {by(tuple(own.shape))} in the base"
                )
            state[key] = state[key].float() + own.to(state[key].device, torch.float32).reshape(
                state[key].shape
            )
    config = full_config(file, None if unet is None else unet.config)
    device = next(iter(state.values())).device

    def unchanged(key: str, _: Tensor) -> Tensor | None:
        is_copied = key.startswith(COPIED) and key in base
        return base[key].to(device, torch.float32, copy=True) if is_copied else None

    return assemble(file.class_name, config, state, file.path, left_out=unchanged)


def _control_lora(file: AdapterFile, unet: UNet2DConditionModel | None) -> nn.Module:
    """A Control-LoRA made full; its mathematics is `control_lora.expand`'s."""
    of_base = _state_of(unet, file)
    assert unet is not None
    tensors = file.tensors()
    state = _plainly(file, lambda: control_lora.expand(tensors, of_base))
    entries = {key: Stored("F32", tuple(tensor.shape)) for key, tensor in state.items()}
    config = with_untold(controlnet_config(Shapes(entries, file.path)), unet.config)
    config |= {key: file.config[key] for key in IN_NO_SHAPE if key in file.config}
    return assemble("ControlNetModel", config, state, file.path)


def _lllite(file: AdapterFile, unet: UNet2DConditionModel | None) -> nn.Module:
    from controlkit import lllite

    tensors = file.tensors()
    return _plainly(file, lambda: lllite.from_tensors(tensors))


def _plainly(file: AdapterFile, make: Callable[[], Made]) -> Made:
    """What a function makes of a file; its ValueError names the file."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _state_of(unet: UNet2DConditionModel | None, file: AdapterFile) -> dict[str, Tensor]:
    if unet is None:
        raise ValueError(f"{file.path} is {KINDS[file.kind]}: name the base that it is for (--base)")
    state: dict[str, Tensor] = unet.state_dict()
    return state


BUILDERS: Mapping[str, Builder] = {
    "controlnet": _plain,
    "controlnet-difference": _difference,
    "control-lora": _control_lora,
    "controlnet-union": _plain,
    "t2i-adapter": _plain,
    "controlnet-xs": _plain,
    "lite": _plain,
    "lllite": _lllite,
}
