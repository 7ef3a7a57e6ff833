"""Scores of the pictures themselves: FID, KID, CLIP score, LPIPS between seeds. Each is left out, with the
reason, where its weights cannot be had or there are too few pictures.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from controlkit import files, images
from controlkit.training.evaluation.weights_at_hand import NotAtHand, cached_file, without_home

if TYPE_CHECKING:
    import torch

KID_LEAST = 50
"""Pictures from which KID is given: it is unbiased, but says little of fewer."""
EXTRA = 'the packages of pip install "controlkit[metrics]"'
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
CLIP_SCORE, LPIPS, FID, KID = "CLIP score", "LPIPS between seeds", "FID", "KID"


@dataclass(frozen=True, eq=False)
class Shot:
    """One picture of an arm: where it is, its pair's number, its caption."""

    path: Path
    number: int
    caption: str


@dataclass
class PictureScores:
    """What was found. of_pair: by measure and arm, a value for each pair's number. of_set: by measure and
    arm, value and spread (not a number where there is none). skipped: measures left out, and why. counts:
    each arm's pictures.
    """

    of_pair: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    of_set: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


Shots = Mapping[str, Sequence[Shot]]
"""The pictures of each arm, in the order of pairs and seeds."""
Progress = Callable[[str], None]


def picture_scores(
    shots: Shots,
    *,
    true: str,
    folder: Path,
    features: str,
    clip: str,
    device: torch.device | str = "cpu",
    report: Progress = lambda _: None,
) -> PictureScores:
    """Score every arm. true: the arm of the true pictures, which the others are compared with. folder: where
    features are kept. features: "inception", or "none". clip: `load_clip`'s name, or "none".
    """
    found = PictureScores(counts={arm: len(of_arm) for arm, of_arm in shots.items()})
    steps: Sequence[tuple[str, Callable[[], None]]] = (
        (CLIP_SCORE, lambda: _clip_scores(found, shots, clip, folder, device, report)),
        (LPIPS, lambda: _diversity(found, shots, device, report)),
        (f"{FID} and {KID}", lambda: _distances(found, shots, true, features, folder, device, report)),
    )
    for name, step in steps:
        try:
            step()
        except NotAtHand as reason:
            found.skipped[name] = str(reason)
    return found


def _clip_scores(
    found: PictureScores, shots: Shots, clip: str, folder: Path, device: Any, report: Progress
) -> None:
    """100 times the cosine, at least 0, of the picture's and the caption's vector: Hessel et al. 2021
    (CLIPScore) without their factor 2.5, as torchmetrics gives it.
    """
    if clip == "none":
        raise NotAtHand("it was not asked for")
    from controlkit.clip_guidance import load_clip

    try:
        judge = load_clip(clip, device=device)
    except ValueError as error:
        raise NotAtHand(without_home(str(error))) from error  # the report is for others, too
    shots = {arm: [shot for shot in kept if shot.caption.strip()] for arm, kept in shots.items()}
    if not any(shots.values()):
        raise NotAtHand("no pair has a caption")
    report("comparing pictures and captions")
    words: dict[str, NDArray[np.float32]] = {}
    name = f"clip-{judge.digest()[:10]}"
    for arm, pictures in shots.items():

        def look(pixels: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
            seen = [judge.encode_pixels(images.picture_to_tensor([one]).to(device)) for one in pixels]
            return np.concatenate([vector.float().cpu().numpy() for vector in seen])

        vectors = _kept(folder / f"{arm}-{name}.npy", pictures, look)
        values: dict[int, list[float]] = {}
        for shot, vector in zip(pictures, vectors, strict=True):
            if shot.caption not in words:
                words[shot.caption] = judge.encode_prompt(shot.caption).float().cpu().numpy()[0]
            values.setdefault(shot.number, []).append(max(100 * float(vector @ words[shot.caption]), 0.0))
        found.of_pair.setdefault(CLIP_SCORE, {})[arm] = _means(values)


def _diversity(found: PictureScores, shots: Shots, device: Any, report: Progress) -> None:
    """The mean LPIPS (Zhang et al. 2018, AlexNet) of all pairs of pictures that one pair's seeds gave."""
    if max((len(_seeds(pictures)[0]) for pictures in shots.values() if pictures), default=0) < 2:
        raise NotAtHand("it compares pictures of several seeds, and there is one: --seeds 2")
    _need_packages()
    cached_file(ALEXNET, what="LPIPS")
    import torch
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    report("comparing pictures of several seeds")
    judge = LearnedPerceptualImagePatchSimilarity(net_type="alex").to(device)
    for arm, pictures in shots.items():
        values: dict[int, list[float]] = {}
        for group in _seeds(pictures):
            seen = images.picture_to_tensor([images.load_picture(shot.path) for shot in group]).to(device)
            for k in range(1, len(group)):
                with torch.inference_mode():
                    near = [float(judge(seen[i : i + 1], seen[k : k + 1])) for i in range(k)]
                values.setdefault(group[0].number, []).extend(near)
        if values:
            found.of_pair.setdefault(LPIPS, {})[arm] = _means(values)


def _distances(
    found: PictureScores,
    shots: Shots,
    true: str,
    features: str,
    folder: Path,
    device: Any,
    report: Progress,
) -> None:
    if features == "none":
        raise NotAtHand("they were not asked for")
    least = min(map(len, shots.values()))
    if least < KID_LEAST:
        few = f"{least} {'is' if least == 1 else 'are'} too few"
        raise NotAtHand(
            f"they compare sets of pictures, and {few}: KID wants {KID_LEAST}, FID more than 2048"
        )
    _need_packages()
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    from controlkit.training.evaluation import inception

    file = cached_file(URL_INCEPTION_V3, what="Inception")
    try:
        network = inception.Inception(file, device=device)
    except ValueError as error:
        raise NotAtHand(str(error)) from error
    report("comparing sets of pictures")
    name = f"inception-{files.sha256_file(file)[:10]}"
    seen = {arm: _kept(folder / f"{arm}-{name}.npy", kept, network) for arm, kept in shots.items()}
    too_few = least <= inception.FEATURES
    if too_few:
        found.skipped[FID] = (
            f"{least} pictures are too few: of {inception.FEATURES} features, that many pictures or fewer"
            " have no covariance of full rank, and the distance is too large by an unknown amount"
        )
    for arm, vectors in seen.items():
        if arm != true:
            found.of_set.setdefault(KID, {})[arm] = inception.kernel_distance(seen[true], vectors)
            if not too_few:
                distance = inception.frechet_distance(seen[true], vectors)
                found.of_set.setdefault(FID, {})[arm] = distance, float("nan")


def _need_packages() -> None:
    missing = [name for name in ("torchmetrics", "torch_fidelity") if find_spec(name) is None]
    if missing:
        raise NotAtHand(f"it needs {EXTRA}")


def _kept(
    path: Path, shots: Sequence[Shot], look: Callable[[Sequence[NDArray[np.uint8]]], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """A vector of each picture, kept in a file that is used again while the pictures are the same.

    path: its name says which network looked, too.
    """
    if not shots:
        return np.zeros((0, 1), np.float32)
    mark = np.array([shot.path.stat().st_mtime_ns for shot in shots], dtype=np.int64)
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as held:
                if np.array_equal(held["mark"], mark):
                    return np.asarray(held["vectors"], dtype=np.float32)
        except (OSError, ValueError, KeyError):
            pass  # made anew
    vectors = np.concatenate(
        [look([images.load_picture(shot.path) for shot in part]) for part in _parts(shots)]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, vectors=vectors, mark=mark)
    files.write_bytes(path, buffer.getvalue())
    return vectors


def _parts(shots: Sequence[Shot], size: int = 64) -> Iterator[Sequence[Shot]]:
    yield from (shots[start : start + size] for start in range(0, len(shots), size))


def _seeds(shots: Sequence[Shot]) -> list[list[Shot]]:
    """The pictures, those of one pair together."""
    found: dict[int, list[Shot]] = {}
    for shot in shots:
        found.setdefault(shot.number, []).append(shot)
    return list(found.values())


def _means(values: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {number: float(np.mean(found)) for number, found in values.items()}
