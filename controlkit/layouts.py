"""How the weights of networks lie in memory."""

from __future__ import annotations

from torch import channels_last, nn

_KEPT = "keeps_layout"


def keep_layout(*networks: nn.Module) -> None:
    """Let nothing lay these networks' weights out anew from now on.

    For networks in a training. Fused optimizers pair a weight with its state by address, so one that is laid
    out anew between two steps is paired with another's moments; and sums in another order round differently,
    so that a run with pictures would not equal one without.
    """
    for network in networks:
        setattr(network, _KEPT, True)


def lay_out(*networks: nn.Module) -> None:
    """Lay the weights of networks out as convolutions compute fastest (channels_last), where that is allowed.

    Networks in training mode, and those of `keep_layout`, stay as they are.
    """
    for network in networks:
        if not (network.training or getattr(network, _KEPT, False)):
            nn.Module.to(network, memory_format=channels_last)  # diffusers' own warns of other things
