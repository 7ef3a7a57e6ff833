"""Every metric against values worked out by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from controlkit.metrics import depth_rmse, depth_rmse_255, edge_f1, iou, nearest_colour, oks, pck

PALETTE = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "white": (240, 240, 240)}


def vertical_line(column: int, rows: slice = slice(None)) -> np.ndarray:
    edge_map = np.zeros((20, 20), np.uint8)
    edge_map[rows, column] = 255
    return edge_map


def pose(joints: int = 18) -> np.ndarray:
    return np.stack([np.arange(joints) * 5.0, np.arange(joints) * 3.0, np.ones(joints)], axis=1)


def test_lists_and_pil_images_are_what_their_arrays_are() -> None:
    a, b = vertical_line(5), vertical_line(7)
    assert edge_f1(a.tolist(), Image.fromarray(b)) == edge_f1(a, b)
    assert iou(a.tolist(), Image.fromarray(b).convert("1")) == iou(a, b)
    assert depth_rmse_255(Image.fromarray(a), b.tolist()) == depth_rmse_255(a, b)
    assert depth_rmse(a.tolist(), b.tolist(), mask=(a > 0).tolist()) == depth_rmse(a, b, mask=a > 0)
    moved = pose() + np.array([3, 0, 0])
    assert pck(moved.tolist(), pose().tolist(), size=20) == pck(moved, pose(), size=20)
    assert oks(moved.tolist(), pose().tolist(), area=400) == oks(moved, pose(), area=400)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_what_their_arrays_are(dtype: torch.dtype) -> None:
    a, b = (torch.from_numpy(vertical_line(column) / 255).to(dtype).requires_grad_() for column in (5, 7))
    same_a, same_b = (one.detach().double().numpy() for one in (a, b))
    assert edge_f1(a, b) == edge_f1(same_a, same_b)
    assert depth_rmse(a, b) == depth_rmse(same_a, same_b)
    assert type(iou(a, b)) is float


@pytest.mark.parametrize("given", [None, "map.png", [[1, 2], [3]], [[None]], np.ones((4, 4), complex)])
def test_what_holds_no_numbers_is_refused_by_name(given: Any) -> None:
    for metric in (edge_f1, iou, depth_rmse, depth_rmse_255):
        with pytest.raises(ValueError, match=rf"^{metric.__name__}: (wanted are numbers|the rows)"):
            metric(given, given)


class TestEdges:
    @pytest.mark.parametrize(
        ("shift", "tolerance", "f1"), [(0, 0, 1), (1, 0, 0), (2, 2, 1), (3, 2, 0), (3, 3, 1)]
    )
    def test_a_line_counts_within_the_tolerance(self, shift: int, tolerance: int, f1: float) -> None:
        assert edge_f1(vertical_line(5 + shift), vertical_line(5), tolerance=tolerance).f1 == f1

    def test_the_tolerance_is_euclidean(self) -> None:
        a, b = np.zeros((9, 9), np.uint8), np.zeros((9, 9), np.uint8)
        a[2, 2], b[4, 4] = 255, 255  # sqrt(8) = 2.83 apart
        assert edge_f1(a, b, tolerance=2).f1 == 0
        assert edge_f1(a, b, tolerance=2.83).f1 == 1
        a[:], b[:] = 0, 0
        a[2, 2], b[4, 3] = 255, 255
        assert edge_f1(a, b, tolerance=float(np.hypot(2, 1))).f1 == 1
        assert edge_f1(a, b, tolerance=np.hypot(2, 1)).f1 == 1  # of numpy's type, as exact as the other

    def test_half_a_line_has_precision_1_and_recall_a_half(self) -> None:
        score = edge_f1(vertical_line(5, slice(0, 10)), vertical_line(5), tolerance=0)
        assert (score.precision, score.recall) == (1.0, 0.5)
        assert score.f1 == pytest.approx(2 / 3)

    def test_an_extra_line_costs_precision(self) -> None:
        score = edge_f1(vertical_line(5) | vertical_line(15), vertical_line(5))
        assert (score.precision, score.recall) == (0.5, 1.0)

    def test_empty_maps(self) -> None:
        empty = np.zeros((20, 20), np.uint8)
        assert edge_f1(empty, empty).f1 == 1
        assert edge_f1(empty, vertical_line(5)).f1 == 0
        assert edge_f1(vertical_line(5), empty).f1 == 0

    def test_three_channels_are_one_map(self) -> None:
        a, b = vertical_line(5, slice(0, 10)), vertical_line(6)
        assert edge_f1(np.dstack([a] * 3), np.dstack([b] * 3)) == edge_f1(a, b)
        none = np.zeros_like(a)
        assert edge_f1(np.dstack([none, a, none]), np.dstack([none, none, b])) == edge_f1(a, b)

    @pytest.mark.parametrize("tolerance", [-1, float("nan"), "2", None])
    def test_a_bad_tolerance_is_refused(self, tolerance: Any) -> None:
        with pytest.raises(ValueError, match="tolerance"):
            edge_f1(vertical_line(5), vertical_line(5), tolerance=tolerance)

    def test_a_channel_that_is_opaque_everywhere_is_no_edge(self) -> None:
        a, b = (Image.fromarray(vertical_line(column)).convert("RGBA") for column in (5, 15))
        with pytest.raises(ValueError, match=r"\(H, W\) or \(H, W, 3\), not \(20, 20, 4\)"):
            edge_f1(a, b)
        with pytest.raises(ValueError, match="an edge map is"):
            edge_f1([1, 0], [1, 0])

    def test_maps_of_two_sizes_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"\(20, 20\) and \(20, 10\)"):
            edge_f1(vertical_line(5), vertical_line(5)[:, :10])


class TestDepth:
    true = np.array([[0.0, 1.0], [2.0, 3.0]])

    def test_scale_and_shift_do_not_count(self) -> None:
        assert depth_rmse(7 * self.true - 4, self.true) == pytest.approx(0, abs=1e-12)

    def test_near_and_far_exchanged_is_as_bad_as_a_constant(self) -> None:
        assert depth_rmse(-self.true, self.true) == pytest.approx(np.sqrt(1.25))

    def test_a_constant_gets_the_standard_deviation(self) -> None:
        assert depth_rmse(np.full((2, 2), 9.0), self.true) == pytest.approx(np.sqrt(1.25))

    def test_a_value_worked_out_by_hand(self) -> None:
        # centred pred (-1,-1,1,1), true (-1.5,-.5,.5,1.5): scale 1, residuals (.5,.5,.5,.5)
        assert depth_rmse(np.array([[0.0, 0.0], [2.0, 2.0]]), self.true) == pytest.approx(0.5)

    def test_only_masked_pixels_count(self) -> None:
        pred = np.array([[0.0, 1.0], [2.0, np.inf]])
        mask = np.array([[True, True], [True, False]])
        assert depth_rmse(pred, self.true, mask=mask) == pytest.approx(0, abs=1e-12)
        with pytest.raises(ValueError, match="pred has values that are not finite"):
            depth_rmse(pred, self.true)
        with pytest.raises(ValueError, match="no pixel"):
            depth_rmse(pred, self.true, mask=np.zeros((2, 2), bool))

    def test_grey_levels_are_compared_as_they_are(self) -> None:
        a = np.full((4, 4, 3), 250, np.uint8)
        b = np.full((4, 4, 3), 254, np.uint8)
        assert depth_rmse_255(a, b) == 4  # uint8 arithmetic would wrap around
        b[0] = 250
        assert depth_rmse_255(a, b) == pytest.approx(np.sqrt(12))

    def test_no_pixels_and_no_numbers_have_no_error(self) -> None:
        for metric in (depth_rmse, depth_rmse_255):
            with pytest.raises(ValueError, match="there is no pixel to compare"):
                metric(np.zeros((0, 4)), np.zeros((0, 4)))
        with pytest.raises(ValueError, match=r"depth_rmse_255: true has values that are not finite$"):
            depth_rmse_255([[1.0]], [[float("nan")]])


class TestPose:
    def test_joints_within_the_threshold_are_correct(self) -> None:
        moved = pose()
        moved[:9, 0] += 10.0
        moved[9:12, 1] += 10.1
        assert pck(moved, pose(), size=100) == pytest.approx(15 / 18)

    def test_a_missing_joint_is_wrong_and_an_invisible_one_does_not_count(self) -> None:
        found, true = pose(), pose()
        found[0, 2] = 0  # in the right place, yet not predicted
        true[1:9, 2] = 0
        assert pck(found, true, size=100) == pytest.approx(9 / 10)

    @pytest.mark.parametrize("joints", [17, 18])
    def test_oks_of_itself_is_1(self, joints: int) -> None:
        assert oks(pose(joints), pose(joints), area=1000) == 1

    @pytest.mark.parametrize(
        ("joints", "index", "sigma"),
        [(17, 0, 0.026), (17, 11, 0.107), (17, 16, 0.089), (18, 1, 0.079), (18, 8, 0.107)],
    )
    def test_oks_falls_by_the_joints_own_sigma(self, joints: int, index: int, sigma: float) -> None:
        true = pose(joints)
        true[:, 2] = 0
        true[index, 2] = 1
        moved = true.copy()
        moved[index, 0] += 2 * sigma * np.sqrt(400)  # one standard deviation at this area
        assert oks(moved, true, area=400) == pytest.approx(np.exp(-0.5))

    def test_oks_counts_a_missing_joint_as_0(self) -> None:
        found = pose()
        found[:9, 2] = 0
        assert oks(found, pose(), area=1000) == pytest.approx(0.5)

    def test_what_cannot_be_scored_is_refused(self) -> None:
        hidden = pose() * (1, 1, 0)
        with pytest.raises(ValueError, match="no visible joint"):
            pck(pose(), hidden, size=100)
        with pytest.raises(ValueError, match="size is 0"):
            pck(pose(), pose(), size=0)
        with pytest.raises(ValueError, match="area is nan"):
            oks(pose(), pose(), area=float("nan"))
        with pytest.raises(ValueError, match="differ in shape"):
            pck(pose(17), pose(18), size=100)
        with pytest.raises(ValueError, match="COCO order, not"):
            oks(pose(5), pose(5), area=100)
        with pytest.raises(ValueError, match="threshold is nan"):
            pck(pose(), pose(), size=100, threshold=float("nan"))
        with pytest.raises(ValueError, match="size is 9"):
            pck(pose(), pose(), size="9")  # type: ignore[arg-type]
        nowhere = np.where(pose() == 15, np.nan, pose())
        for name, found, true in (("pred", nowhere, pose()), ("true", pose(), nowhere)):
            with pytest.raises(ValueError, match=f"oks: {name} has a visible joint that is not finite"):
                oks(found, true, area=100)


class TestMasks:
    def test_two_overlapping_squares(self) -> None:
        a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
        a[:2, :2], b[1:3, 1:3] = True, True
        assert iou(a, b) == pytest.approx(1 / 7)
        assert iou(a, a) == 1
        assert iou(a, ~a) == 0

    def test_empty_masks(self) -> None:
        empty = np.zeros((4, 4), bool)
        assert iou(empty, empty) == 1
        assert iou(empty, ~empty) == 0
        with pytest.raises(ValueError, match="differ in shape"):
            iou(empty, empty[:2])


class TestColours:
    shade = np.linspace(0.05, 1.0, 64).reshape(8, 8)
    everywhere = np.ones((8, 8), bool)

    @pytest.mark.parametrize("name", PALETTE)
    def test_a_shaded_region_keeps_its_name(self, name: str) -> None:
        picture = np.rint(self.shade[..., None] * PALETTE[name]).astype(np.uint8)
        assert nearest_colour(picture, self.everywhere, self.shade, PALETTE) == name

    def test_without_its_shade_white_in_shadow_would_be_another_colour(self) -> None:
        palette = {"white": (240, 240, 240), "grey": (72, 72, 72)}
        picture = np.full((8, 8, 3), 72, np.uint8)
        assert nearest_colour(picture, self.everywhere, np.full((8, 8), 0.3), palette) == "white"
        assert nearest_colour(picture, self.everywhere, np.ones((8, 8)), palette) == "grey"

    def test_only_the_region_counts_and_a_minority_does_not(self) -> None:
        picture = np.full((8, 8, 3), PALETTE["blue"], np.uint8)
        picture[:4] = PALETTE["red"]
        picture[0, :3] = PALETTE["green"]
        top = np.zeros((8, 8), bool)
        top[:4] = True
        assert nearest_colour(picture, top, np.ones((8, 8)), PALETTE) == "red"
        assert nearest_colour(picture, ~top, np.ones((8, 8)), PALETTE) == "blue"

    def test_the_colour_is_the_median_of_what_is_lit(self) -> None:
        palette = {**PALETTE, "brown": (175, 70, 45), "grey": (120, 120, 120)}
        picture = np.full((8, 8, 3), PALETTE["red"], np.uint8)
        picture[:2] = PALETTE["green"]  # a quarter: their mean is brown
        assert nearest_colour(picture, self.everywhere, np.ones((8, 8)), palette) == "red"
        shade = np.where(np.arange(8)[:, None] < 3, 1.0, 0.1) * np.ones((8, 8))
        picture = np.full((8, 8, 3), 12, np.uint8)  # five rows so dark that nothing tells their colour
        picture[:3] = PALETTE["red"]
        assert nearest_colour(picture, self.everywhere, shade, palette) == "red"

    def test_a_region_in_deep_shadow_is_still_named(self) -> None:
        picture = np.rint(0.1 * np.full((8, 8, 3), PALETTE["red"])).astype(np.uint8)
        assert nearest_colour(picture, self.everywhere, np.full((8, 8), 0.1), PALETTE) == "red"

    def test_what_cannot_be_named_is_refused(self) -> None:
        picture = np.zeros((8, 8, 3), np.uint8)
        with pytest.raises(ValueError, match="no pixel"):
            nearest_colour(picture, ~self.everywhere, self.shade, PALETTE)
        with pytest.raises(ValueError, match="palette is empty"):
            nearest_colour(picture, self.everywhere, self.shade, {})
        with pytest.raises(ValueError, match=r"a picture is \(H, W, 3\), not \(8, 8\)"):
            nearest_colour(picture[..., 0], self.everywhere, self.shade, PALETTE)
        with pytest.raises(ValueError, match="shade has values that are not finite"):
            nearest_colour(picture, self.everywhere, self.shade * np.nan, PALETTE)

    def test_a_pil_image_and_lists_are_named_alike(self) -> None:
        picture = Image.new("RGB", (8, 8), PALETTE["red"])
        region, light = self.everywhere.tolist(), np.ones((8, 8)).tolist()
        assert nearest_colour(picture, region, light, PALETTE) == "red"
