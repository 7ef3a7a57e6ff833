"""What a generation follows: its controls at a size, each with its adapter and its map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from controlkit import images, limits, map_sizes, notices, preprocessors
from controlkit.families import BUNDLED
from controlkit.generate_plan import INPAINT

if TYPE_CHECKING:
    import torch

    from controlkit.adapters import Adapter
    from controlkit.base import Base
    from controlkit.control import Control
    from controlkit.generate_plan import Beginning, Source
    from controlkit.infotext import ControlRecord, PictureRecord
    from controlkit.preprocessors import Preprocessor
    from controlkit.sampling import Start

REGION_CURE = "a region is best given in the shape of the map"
SETTINGS = ("scale", "start", "end", "gate", "mode", "layers", "only_mid")  # recorded as they are
_Row = list[tuple["ControlRecord", "Source"]]


class Controls:
    """The sources of a plan, each with its adapter; a map is made once for each size.

    extractors: what makes maps of photos, by kind; kept for further plans where one is given.
    """

    def __init__(
        self,
        base: Base,
        sources: Sequence[Source],
        adapters: Sequence[Adapter],
        *,
        beginning: Beginning | None,
        report: notices.Report,
        extractors: dict[str, Preprocessor] | None,
    ) -> None:
        self._base, self._sources, self._adapters = base, sources, adapters
        self._beginning, self._report, self._extractors = beginning, report, extractors
        self._maps: dict[tuple[object, ...], np.ndarray | torch.Tensor] = {}

    def of(self, record: PictureRecord, width: int, height: int) -> list[Control]:
        """The controls of a picture of some size, their maps extracted where they are photos."""
        from controlkit.control import Control
        from controlkit.map_stacks import check_given, is_whole, stack

        controls = []
        for adapter, rows in self._rows(record):
            (control, source), kinds = rows[0], [one.kind for one, _ in rows]
            whole = is_whole(adapter, kinds)
            if not whole:
                hows = [[getattr(one, name) for name in (*SETTINGS, "mask")] for one, _ in rows]
                check_given(adapter, kinds, hows)
            maps = {one.kind: self._map_at(given, width, height, one.fit) for one, given in rows}
            kind, cond = (control.kind, maps[control.kind]) if whole else ("", stack(adapter, maps))
            how = {name: getattr(control, name) for name in SETTINGS}
            mask = None if source.mask is None else _region(source, width, height, control.fit)
            controls.append(Control(adapter, cond, mask=mask, kind=kind, **how))
        return controls

    def _rows(self, record: PictureRecord) -> list[tuple[Adapter, _Row]]:
        """The controls and their sources: several maps that are one input of an adapter in one row."""
        from controlkit.map_stacks import kinds_in

        rows: dict[object, tuple[Adapter, _Row]] = {}
        for number, (control, source, adapter) in enumerate(
            zip(record.controls, self._sources, self._adapters, strict=True)
        ):
            key = id(adapter) if kinds_in(adapter) else (number,)
            rows.setdefault(key, (adapter, []))[1].append((control, source))
        return list(rows.values())

    def _map_at(self, source: Source, width: int, height: int, fit: str) -> Any:
        key = (source.record.kind, source.record.is_map, source.file, width, height, fit)
        if key not in self._maps:
            is_hole = source.record.kind == INPAINT
            made = self._hole(source, width, height) if is_hole else self._map(source, width, height, fit)
            self._maps[key] = made
        return self._maps[key]

    def _hole(self, source: Source, width: int, height: int) -> torch.Tensor:
        """What an inpainting adapter is told: the picture, with a hole."""
        from controlkit.starting import inpaint_cond

        assert self._beginning is not None
        start = start_of(self._beginning, self._beginning.record.strength)
        return inpaint_cond(images.cover(source.picture, width, height), start.fitted(width, height).hole())

    def _map(self, source: Source, width: int, height: int, fit: str) -> np.ndarray:
        """The map of a source that is one, or a photo; what is found in a photo is not found at its border's
        colour around it.
        """
        record = source.record
        if record.is_map:
            return map_sizes.fit_map(source.picture, width, height, kind=record.kind, fit=fit)
        self._report.status(f"extracting the {record.kind} map from {record.path}")
        picture = map_sizes.fit_picture(source.picture, width, height, fit=fit)
        image = self._extractor(record.kind).extract([picture])[0].image
        warn_if_black(image, f"the {record.kind} map of {record.path}")
        return map_sizes.surround(image, width, height)

    def _extractor(self, kind: str) -> Preprocessor:
        kept = {} if self._extractors is None else self._extractors
        if kind not in kept:
            is_bundled, device = self._base.name in BUNDLED, str(self._base.unet.device)
            kept[kind] = preprocessors.get(kind, **extractor_options(kind, bundled=is_bundled, device=device))
        return kept[kind]


def start_of(beginning: Beginning, strength: float) -> Start:
    """What the sampling loop is told of the picture that a generation starts from."""
    from controlkit.sampling import Start

    return Start(beginning.picture, strength, beginning.mask)


def extractor_options(kind: str, *, bundled: bool, device: str = "cpu") -> dict[str, str]:
    """How a preprocessor is set up beside a base: the bundled model for a bundled base, on its device."""
    if kind not in ("openpose", "depth"):
        return {}
    return {"device": device, **({"model": "tiny"} if bundled else {})}


def warn_if_black(image: np.ndarray, name: str) -> None:
    """Warn of a map that tells a network nothing: no edge, nobody, or one depth everywhere."""
    if not image.any():
        notices.warn(f"{name} is black: nothing was found that a picture could follow", stacklevel=2)


def _region(source: Source, width: int, height: int, fit: str) -> np.ndarray:
    """A control's mask for a picture of some size. Raises ValueError where nothing white of it is left."""
    assert source.mask is not None
    region = map_sizes.fit_region(source.mask, width, height, fit=fit)
    if region.max() < limits.LEAST_WHITE <= source.mask.max():
        raise ValueError(
            f"{source.record.mask}: at {width}x{height} it is cropped, and all that is white in it with it;"
            f" {REGION_CURE}"
        )
    return region
