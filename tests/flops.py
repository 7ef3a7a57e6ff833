"""torch's counter of floating-point operations, with what older versions do not count."""

from torch.utils.flop_counter import FlopCounterMode

from controlkit.training.flops import SAME_AS


def counter() -> FlopCounterMode:
    """A counter that prints nothing."""
    made = FlopCounterMode(display=False)
    for packet, like in SAME_AS.items():
        made.flop_registry.setdefault(packet, made.flop_registry[like])
    return made
