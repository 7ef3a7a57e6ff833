"""What lies between a data set and a batch: order, loader, cache, packing, noise."""

import hashlib
import io
import json
import os
import tarfile
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from controlkit import diffusion, images
from controlkit.processes import Processes
from controlkit.training.config import load_recipe
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data import feeds
from controlkit.training.data.digests import Digests
from controlkit.training.data.encoded import Encoded
from controlkit.training.data.examples import ArrayPiece, Example, FilePiece
from controlkit.training.data.loader import Loader
from controlkit.training.data.order import Order, Turn
from controlkit.training.data.packing import pack, unpack
from controlkit.training.data.pairs import Pairs
from controlkit.training.data.source_tar import TarPiece, read_index
from controlkit.training.data.stores import Store
from controlkit.training.data.visits import Visits
from controlkit.training.noising import (
    Noisy,
    draw,
    draw_batch,
    drawn_of,
    noised,
    schedule,
    timesteps_of,
    used,
    weighted_loss,
)

# --- order ----


def turns(order, numbers):
    return [(turn.index, turn.lap) for number in numbers for turn in order.batch(number)]


def test_one_bucket_is_one_endless_order_whatever_the_batch():
    small, large = (Order([0] * 10, batch_size=size, seed=3) for size in (2, 4))
    assert turns(small, range(20)) == turns(large, range(10))
    seen = turns(large, range(5))
    assert sorted(seen) == [(index, lap) for index in range(10) for lap in (0, 1)]
    assert [i for i, lap in seen if lap == 0] != [i for i, lap in seen if lap == 1]


def test_buckets_never_mix_and_their_pairs_come_equally_often():
    buckets = [0] * 7 + [1] * 5 + [2] + [-1] * 3
    order = Order(buckets, batch_size=3, seed=1)
    assert (order.pairs, order.per_epoch) == (13, 3 + 2 + 1)
    for epoch in range(4):
        batches = [order.batch(epoch * 6 + k) for k in range(6)]
        for batch in batches:
            assert len({buckets[turn.index] for turn in batch}) == 1
        if epoch == 0:  # later ones begin in the middle of a lap
            assert {turn.index for batch in batches for turn in batch} == set(range(13))
    many = Counter(index for index, _ in turns(order, range(600)))
    for bucket in range(3):
        counts = [many[k] for k in range(13) if buckets[k] == bucket]
        assert max(counts) - min(counts) <= 1
    first = [tuple({buckets[t.index] for t in order.batch(k)}) for k in range(12)]
    assert first[:6] != first[6:]
    alike = Order([0] * 6 + [1] * 6, batch_size=3, seed=1)  # four batches in every epoch
    mixed = [tuple(alike.batch(4 * epoch + k)[0].index // 6 for k in range(4)) for epoch in range(8)]
    assert len(set(mixed)) > 1


def test_buckets_of_one_size_have_orders_of_their_own():
    order = Order([0] * 30 + [1] * 30, batch_size=30, seed=1)
    one, other = ([turn.index % 30 for turn in order.batch(k)] for k in range(2))
    assert sorted(one) == sorted(other) == list(range(30))
    assert one != other


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_pair_of_a_small_bucket_comes_as_often_as_one_of_a_large_bucket(batch_size):
    sizes = [90, 20, 5, 2, 1]
    buckets = np.repeat(np.arange(len(sizes)), sizes)
    order = Order(buckets, batch_size=batch_size, seed=1)
    laps = 40
    batches = -(-laps * np.array(sizes) // batch_size)  # of each bucket, until each pair was there so often
    many = turns(order, range(batches.sum()))
    assert len(set(many)) == len(many)  # no turn comes twice
    visits = Counter(index for index, _ in many)
    for index, bucket in enumerate(buckets):
        assert laps <= visits[index] <= laps + -(-batch_size // sizes[bucket])


def test_the_order_is_a_function_of_the_number():
    order, again = (Order([0, 1] * 20, batch_size=4, seed=9) for _ in range(2))
    assert turns(order, [7, 3, 30, 3]) == turns(again, [7, 3, 30, 3])
    assert turns(Order([0, 1] * 20, batch_size=4, seed=8), range(10)) != turns(order, range(10))


def test_nothing_to_train_on_is_said():
    with pytest.raises(ValueError, match="no pair to train on"):
        Order([-1, -1], batch_size=1, seed=1)


# --- loader ----


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_loader_gives_what_was_asked_for_whatever_the_threads(workers):
    def make(number):
        time.sleep(0.001 * (number % 3))
        return number, threading.get_ident()

    loader = Loader(make, lambda number: number + 2, workers=workers)
    asked = [0, 2, 4, 4, 8, 10, 3]  # in order, again, and jumping
    got = [loader.get(number) for number in asked]
    loader.close()
    assert [number for number, _ in got] == asked
    assert (threading.get_ident() in {thread for _, thread in got}) == (workers == 0)


def test_a_loader_raises_what_went_wrong_where_it_was_asked_for():
    def make(number):
        if number == 2:
            raise ValueError("broken.png")
        return number

    loader = Loader(make, lambda number: number + 1, workers=2)
    assert [loader.get(0), loader.get(1)] == [0, 1]
    with pytest.raises(ValueError, match=r"broken\.png"):
        loader.get(2)
    assert loader.get(3) == 3
    loader.close()


# --- packed maps ----


@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("width", [8, 13, 300])
@pytest.mark.parametrize("kind", ["binary", "black", "white", "grey", "colour", "deep"])
def test_packed_maps_lose_nothing(kind, width, channels):
    random = np.random.default_rng(0)
    one = random.integers(0, 256, (11, width, 1), dtype=np.uint8)
    levels = {
        "binary": np.repeat((one > 99) * np.uint8(255), channels, axis=2),
        "black": np.zeros((11, width, channels), np.uint8),
        "white": np.full((11, width, channels), 255, np.uint8),
        "grey": np.repeat(one, channels, axis=2),
        "colour": random.integers(0, 256, (11, width, channels), dtype=np.uint8),
        "deep": random.integers(0, 65536, (11, width, channels), dtype=np.uint16),
    }[kind]
    packed = pack(levels)
    back = unpack(packed)
    np.testing.assert_array_equal(back, levels)
    assert back.dtype == levels.dtype
    if kind == "binary":
        assert packed.numel() == 4 + 11 * -(-width // 8)
    if kind == "grey":
        assert packed.numel() == 4 + 11 * width


# --- stores ----


def test_a_store_holds_what_was_written_and_finds_what_others_wrote(tmp_path):
    mine, other = Store(tmp_path / "s"), Store(tmp_path / "s")
    assert mine.missing(["a", "b", "a"]) == ["a", "b"]
    assert [mine.missing("abcde", (k, 2)) for k in range(2)] == [["a", "c", "e"], ["b", "d"]]
    mine.write({"a": torch.arange(3.0)})
    assert "a" not in other
    other.refresh()
    assert other.read("a").tolist() == [0, 1, 2]
    other.write({"b": torch.ones(2, 2, dtype=torch.float16)})
    mine.refresh()
    assert mine.missing(["a", "b", "c"]) == ["c"]
    assert mine.missing("abcde", (1, 2)) == ["d"]  # b is there, and the other process's share stays its own
    assert [mine.missing("bcde", (k, 2)) for k in range(2)] == [["d"], ["c", "e"]]
    assert mine.read("b").dtype == torch.float16


def test_a_damaged_shard_is_computed_again(tmp_path):
    Store(tmp_path).write({"a": torch.ones(4)})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    store = Store(tmp_path)
    assert store.missing(["a"]) == ["a"]
    assert not path.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_kept_and_is_not_finite_is_never_trained_on(tmp_path, value):
    """The header of such a shard is whole, and only its values show that the disk has damaged it."""
    kept = torch.full((77, 768), -6e4, dtype=torch.float16)
    kept[3, 5] = value
    Store(tmp_path).write({"a": kept, "b": torch.full_like(kept, 6e4), "c": torch.full((9,), 255).byte()})
    (path,) = tmp_path.iterdir()
    store = Store(tmp_path)
    assert [float(store.read(name).float().mean()) for name in "bc"] == [60000, 255]
    with pytest.raises(ValueError, match=r"values that are not finite: delete it and start again") as caught:
        store.read("a")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_store_that_cannot_be_written_is_a_plain_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"/file/s: .*CONTROLKIT_CACHE") as caught:
        Store(tmp_path / "file" / "s").write({"a": torch.ones(1)})
    assert "\n" not in str(caught.value)


# --- digests ----


def test_files_are_read_once_until_they_change(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    piece = FilePiece(path)
    (first,) = Digests(tmp_path / "memory").of([piece])
    with monkeypatch.context() as patch:
        patch.setattr(FilePiece, "read", None)  # it may not be read
        assert Digests(tmp_path / "memory").of([piece]) == [first]
    path.write_bytes(b"other")
    assert Digests(tmp_path / "memory").of([piece]) != [first]
    (tmp_path / "memory").write_text("damaged\n[1]\n")
    path.write_bytes(b"one")
    array = ArrayPiece(np.zeros((2, 2), np.uint8))
    assert Digests(tmp_path / "memory").of([piece, array])[0] == first
    assert ArrayPiece(np.zeros((4, 1), np.uint8)).digest() != array.digest()


def test_a_file_that_was_replaced_at_its_size_and_time_is_read_again(tmp_path):
    """As an archive with fixed times unpacks, or `rsync --times` copies."""
    path, piece = tmp_path / "a.bin", FilePiece(tmp_path / "a.bin")
    digests = []
    for content in (b"one", b"two"):
        path.write_bytes(content)
        os.utime(path, (315532800, 315532800))
        digests += Digests(tmp_path / "memory").of([piece])
    assert digests == [hashlib.sha256(content).hexdigest() for content in (b"one", b"two")]


def test_what_is_in_a_tar_file_is_read_once_until_the_file_changes(tmp_path, monkeypatch):
    shard = tmp_path / "0.tar"

    def write(*contents):
        with tarfile.open(shard, "w") as archive:
            for number, content in enumerate(contents):
                member = tarfile.TarInfo(f"{number}.png")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        index = read_index(shard)
        return [index.piece(row, "png") for row in range(len(contents))]

    pieces = write(b"one", b"two")
    digests = Digests(tmp_path / "memory").of(pieces)
    assert digests == [hashlib.sha256(content).hexdigest() for content in (b"one", b"two")]
    with monkeypatch.context() as patch:
        patch.setattr(TarPiece, "read", None)  # it may not be read
        assert Digests(tmp_path / "memory").of(pieces) == digests
    changed = Digests(tmp_path / "memory").of(write(b"one", b"six"))
    assert changed == [digests[0], hashlib.sha256(b"six").hexdigest()]


def test_a_piece_is_looked_through_once_whatever_it_is_for(tmp_path, monkeypatch, sd1):
    """A picture of which the map is made is both; and several pairs may have the same map."""
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))
    images.write_png(tmp_path / "a.png", np.full((64, 64, 3), 99, np.uint8))
    looks, digest = [], FilePiece.digest
    monkeypatch.setattr(FilePiece, "digest", lambda piece: looks.append(piece.path.name) or digest(piece))
    data = DataRecipe(maps="made")
    examples = [Example("pair", FilePiece(tmp_path / "a.png"), "a picture")] * 2
    visits = Visits(examples, [(64, 64)] * 2, data=data, kind="canny", resolution=64, seed=1)
    encoded = Encoded(sd1, examples, visits, data=data, report=lambda _: None)
    encoded.fill([0], Processes())
    assert looks == ["a.png"]
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    Digests(tmp_path / "memory").of([FilePiece(tmp_path / "b.png")] * 3)
    assert looks == ["a.png", "b.png"]


def test_held_out_pairs_are_shown_and_never_trained_on(tmp_path, monkeypatch, sd1):
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(
        "sd15-canny", ["data.maps=made", "data.resolution=64", "data.buckets=true", "batch_size=2"]
    )

    def feed(sizes, *, changed=0, cache=True):
        pictures = [
            ArrayPiece(some_levels(k + 99 * (k == changed), *size)) for k, size in enumerate(sizes, 1)
        ]
        examples = [Example(f"pair {k}", piece, f"caption {k}") for k, piece in enumerate(pictures)]
        found = Pairs(examples, list(sizes), trained=[0, 2, 3, 5], shown=[1, 4])
        monkeypatch.setattr(feeds, "load_pairs", lambda *_, **__: found)
        data = recipe.data.model_copy(update={"cache": cache})
        told = recipe.model_copy(update={"data": data})
        return feeds.StoredFeed(told, sd1, Processes(), report=lambda _: None)

    sizes = [(64, 64), (64, 64), (128, 64)] * 2
    whole = feed(sizes)
    seen = Counter(turn.index for number in range(40) for turn in whole.order.batch(number))
    assert (set(seen), whole.pairs, whole.held_out, whole.shown) == ({0, 2, 3, 5}, 4, True, [1, 4])
    assert whole.encoded.text(["caption 4"])  # they are kept, too
    state = json.loads(json.dumps(whole.state(0)))
    feed(sizes).restore(state)
    for number in (1, 2):  # one that is trained on, and one that is shown
        with pytest.raises(
            ValueError, match=r"has changed since this run stopped \(there are 4 pairs as before"
        ):
            feed(sizes, changed=number).restore(state)
    feed(sizes, changed=1, cache=False).restore(state)  # nothing is known of their content
    with pytest.raises(ValueError, match="then 3 pairs to train on, now 4"):
        feed(sizes, cache=False).restore(state | {"pairs": 3})


def some_levels(seed, width, height):
    """A picture of large squares, so that edges are found in it, and other ones with each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return np.repeat(np.repeat(small, 8, axis=0), 8, axis=1)


def test_what_is_kept_is_what_is_made_otherwise_and_never_that_of_other_data(tmp_path, monkeypatch, sd1):
    """Data sets of the same pictures, or the same maps, share a cache, and nothing that they do not share."""
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))
    sizes = [(64, 64), (96, 64), (64, 64), (48, 32)]
    pictures = [ArrayPiece(some_levels(k, *size)) for k, size in enumerate(sizes)]
    greys = [some_levels(9 + k, *size)[..., :1] for k, size in enumerate(sizes)]
    maps = [ArrayPiece(np.repeat(grey, 3, axis=2)) for grey in greys]
    pose = FilePiece(tmp_path / "pose.json")
    pose.path.write_text(json.dumps({"people": [{"pose_keypoints_2d": [8.0 * k for k in range(54)]}]}))
    files, shape = {"maps": "files"}, {"buckets": True, "bucket_step": 16, "resolution": 64, "flip": 0.5}
    one = [(piece,) for piece in maps]
    two = [(maps[0], other) for other in (maps[0], maps[2])]
    asked = [
        ("canny", {"maps": "made"}, [()] * 4),
        ("canny", {"maps": "made", "options": {"low": 20, "high": 30}}, [()] * 4),
        ("depth", files, one),
        ("depth", files | {"options": {"metric": True}}, one),
        ("canny", files | {"map_mode": "grey", "map_column": ("a_depth", "b")}, [two[0]]),
        ("canny", files | {"map_mode": "grey", "map_column": ("a_depth", "b")}, [two[1]]),
        ("openpose", files, [(pose,)] * 4),
        ("canny", files | {"map_blur": 0.9}, one),
    ]
    for kind, settings, of_pairs in asked:
        examples = [
            Example(f"pair {k}", pictures[k], f"caption {k}", found) for k, found in enumerate(of_pairs)
        ]
        data = DataRecipe(**settings, **shape)
        visits = Visits(examples, sizes[: len(examples)], data=data, kind=kind, resolution=64, seed=1)
        live = Encoded(sd1, examples, visits, data=DataRecipe(cache=False), report=lambda _: None)
        kept = Encoded(sd1, examples, visits, data=data, report=lambda _: None)
        kept.fill(range(len(examples)), Processes())
        for turn in [Turn(index, lap) for index in range(len(examples)) for lap in range(3)]:
            mine, theirs = kept.sample(turn), live.sample(turn)
            assert np.array_equal(mine.levels, theirs.levels), (kind, settings, turn)
            for ours, made in zip(kept.moments([mine]), live.moments([theirs]), strict=True):
                assert torch.equal(ours, made), (kind, settings, turn)
            for caption in (mine.example.caption, ""):  # and what is told where a caption is dropped
                assert torch.equal(kept.text([caption])[0], live.text([caption])[0])


# --- noise and loss ----

ALPHAS = diffusion.alphas_cumprod()
SHAPE = (4, 6, 5)


def recipe(*overrides):
    return load_recipe("tiny-canny", list(overrides))


def batch(settings, seeds=(1, 2, 3), mean=None, std=None):
    drawn = draw_batch(seeds, SHAPE, settings)
    mean = torch.zeros(len(seeds), *SHAPE) if mean is None else mean
    std = torch.zeros_like(mean) if std is None else std
    return noised(mean, std, drawn, timesteps_of(drawn.place, settings, 999, 1000), settings, ALPHAS)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("noise_offset=0.1",),
        ("input_perturbation=0.1",),
        ("noise_offset=0.1", "min_snr_gamma=5"),
        ("multires_noise_iterations=6",),
    ],
)
def test_what_is_used_of_a_draw_is_all_that_counts(settings):
    wanted = recipe(*settings)
    drawn = draw_batch((1, 2, 3), SHAPE, wanted)
    mean, times = torch.zeros(3, *SHAPE), torch.tensor([3, 400, 900])
    whole, part = (
        noised(mean, mean + 1, d, times, wanted, ALPHAS) for d in (drawn, drawn_of(used(drawn, wanted)))
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True))


def test_pure_noise_at_the_last_step_is_for_bases_that_can_learn_there(load):
    asked = recipe("zero_terminal_snr=true")
    of_v, of_noise = load("sd2"), load("sd1")
    assert torch.equal(schedule(recipe(), of_v), of_v.alphas_cumprod)
    assert schedule(asked, of_v)[-1] == 0
    with pytest.raises(ValueError, match="'tiny' predicts the noise, which would be all it sees at the last"):
        schedule(asked, of_noise)


@pytest.mark.parametrize("levels", [0, 6])
def test_a_pair_draws_the_same_in_any_batch(levels):
    wanted = recipe(f"multires_noise_iterations={levels}")
    together, alone = draw_batch([5, 6, 7], SHAPE, wanted), draw(6, SHAPE, wanted)
    assert all(torch.equal(a[1], b) for a, b in zip(together, alone, strict=True))
    assert not torch.equal(together.noise[0], together.noise[1])


def test_each_visit_draws_from_the_autoencoders_distribution():
    mean, std = torch.full((2000, 1, 1, 1), 3.0), torch.full((2000, 1, 1, 1), 0.5)
    drawn = draw_batch(range(2000), (1, 1, 1), recipe())
    timesteps = timesteps_of(drawn.place, recipe(), 999, 1000)
    latents = noised(mean, std, drawn, timesteps, recipe(), ALPHAS).latents
    assert latents.mean() == pytest.approx(3.0, abs=0.05)
    assert latents.std() == pytest.approx(0.5, abs=0.03)


def test_noise_offset_shifts_channels_and_perturbation_spares_the_target():
    plain, shifted = batch(recipe()), batch(recipe("noise_offset=0.1"))
    difference = shifted.noise - plain.noise
    torch.testing.assert_close(difference, difference[..., :1, :1].expand_as(difference), atol=1e-6, rtol=0)
    assert difference.abs().max() > 0.01
    assert len(difference[:, :, 0, 0].unique()) == difference.shape[0] * difference.shape[1]
    perturbed = batch(recipe("input_perturbation=0.1"))
    assert torch.equal(perturbed.noise, plain.noise)
    assert not torch.equal(perturbed.noisy_latents, plain.noisy_latents)


def test_multires_noise_replaces_the_noise_and_what_else_is_drawn_stays():
    plain = draw_batch((1, 2), (4, 32, 32), recipe())
    coarse = draw_batch((1, 2), (4, 32, 32), recipe("multires_noise_iterations=8"))
    assert not torch.equal(coarse.noise, plain.noise)
    torch.testing.assert_close(coarse.noise.flatten(1).std(dim=1), torch.ones(2))
    for name in ("posterior", "offset", "perturbation", "place"):
        assert torch.equal(getattr(coarse, name), getattr(plain, name))


@pytest.mark.parametrize(
    ("setting", "weight"),
    [
        (("min_snr_gamma=5", "min_snr_soft=true"), lambda snr: 5 * snr / (5 + snr)),
        (("debiased=true",), torch.sqrt),
    ],
)
@pytest.mark.parametrize("prediction", diffusion.PREDICTION_TYPES)
def test_other_weights_are_of_the_same_error_too(setting, weight, prediction):
    noisy = batch(recipe(), mean=torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)))
    pred = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2))
    of_x0 = weighted_loss(pred, noisy, recipe("objective=sample"), prediction, ALPHAS)
    expected = of_x0 * weight(diffusion.snr(ALPHAS, noisy.timesteps))
    for objective in diffusion.PREDICTION_TYPES:
        found = weighted_loss(pred, noisy, recipe(f"objective={objective}", *setting), prediction, ALPHAS)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("min_snr_soft=true",), "min_snr_gamma, which is 0"),
        (("debiased=true", "min_snr_gamma=5"), "debiased and min_snr_gamma both weight the loss"),
        (("noise_offset=0.1", "multires_noise_iterations=6"), "both make coarse noise"),
    ],
)
def test_weights_and_noises_that_exclude_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        recipe(*settings)


def test_debiased_needs_some_signal_where_noise_is_compared(load):
    of_v = load("sd2")
    schedule(recipe("debiased=true", "zero_terminal_snr=true"), of_v)
    with pytest.raises(ValueError, match="the last step's SNR is 0: give objective=v_prediction"):
        schedule(recipe("debiased=true", "zero_terminal_snr=true", "objective=epsilon"), of_v)


@pytest.mark.parametrize("prediction", diffusion.PREDICTION_TYPES)
@pytest.mark.parametrize("objective", diffusion.PREDICTION_TYPES)
def test_objectives_differ_from_each_other_by_the_papers_factors(prediction, objective):
    """|ε error|² = SNR |x_0 error|², |v error|² = (SNR + 1) |x_0 error|² (Salimans & Ho 2022, section 4)."""
    noisy = batch(recipe(), mean=torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)))
    pred = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2))
    snr = diffusion.snr(ALPHAS, noisy.timesteps)
    factor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(3)}
    own = weighted_loss(pred, noisy, recipe(), prediction, ALPHAS)
    other = weighted_loss(pred, noisy, recipe(f"objective={objective}"), prediction, ALPHAS)
    torch.testing.assert_close(other, own * factor[objective] / factor[prediction], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("prediction", diffusion.PREDICTION_TYPES)
def test_min_snr_weighs_every_objective_alike(prediction):
    """min(SNR, 5) |x_0 error|², whatever the loss is measured in (Hang et al. 2023, section 3.4)."""
    noisy = batch(recipe(), mean=torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)))
    pred = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2))
    of_x0 = weighted_loss(pred, noisy, recipe("objective=sample"), prediction, ALPHAS)
    expected = of_x0 * diffusion.snr(ALPHAS, noisy.timesteps).clamp(max=5)
    for objective in diffusion.PREDICTION_TYPES:
        wanted = recipe(f"objective={objective}", "min_snr_gamma=5")
        found = weighted_loss(pred, noisy, wanted, prediction, ALPHAS)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6)


def test_a_perfect_prediction_has_no_loss_and_min_snr_weighs():
    noisy = batch(recipe())
    for kind in diffusion.PREDICTION_TYPES:
        target = diffusion.target(kind, noisy.latents, noisy.noise, noisy.timesteps, ALPHAS)
        assert weighted_loss(target, noisy, recipe(), kind, ALPHAS).abs().max() < 1e-10
    pred = torch.zeros(3, *SHAPE)
    plain = weighted_loss(pred, noisy, recipe(), "epsilon", ALPHAS)
    weighted = weighted_loss(pred, noisy, recipe("min_snr_gamma=5"), "epsilon", ALPHAS)
    snr = diffusion.snr(ALPHAS, noisy.timesteps)
    torch.testing.assert_close(weighted / plain, (5 / snr).clamp(max=1))


@pytest.mark.parametrize("kind", diffusion.TIMESTEP_KINDS)
def test_timesteps_lie_in_the_schedule_and_have_the_shape_of_their_kind(kind):
    u = (torch.arange(100000, dtype=torch.float64) + 0.5) / 100000
    t = diffusion.place_timesteps(u, kind)
    assert t.min() >= 0
    assert t.max() <= 999
    median = float(t.double().median()) / 1000
    expected = {"cubic": 1 - 0.5**3, "logit-normal": 0.5, "structure": 1 / (1 + np.exp(-0.8))}
    assert median == pytest.approx(expected.get(kind, 0.5), abs=0.01)


def test_noise_levels_begin_where_layout_is_decided_and_become_uniform():
    u, settings = (torch.arange(50000, dtype=torch.float64) + 0.5) / 50000, recipe("layout_steps=100")
    early, half, late = (timesteps_of(u, settings, step, 1000).double() for step in (0, 50, 100))
    structure = diffusion.place_timesteps(u, "structure").double()
    torch.testing.assert_close(early, structure)
    assert float(late.mean()) == pytest.approx(499.5, abs=1)
    assert float(half.mean()) == pytest.approx((499.5 + float(structure.mean())) / 2, abs=2)
    torch.testing.assert_close(timesteps_of(u, recipe("layout_steps=0"), 0, 1000).double(), late)


def test_a_hint_encoder_started_on_maps_has_unit_scale_and_leaves_the_base_alone():
    from controlkit import load_base
    from controlkit.controlnet import control_residuals, encode_hint, from_base
    from controlkit.figures import render
    from controlkit.images import map_to_cond
    from controlkit.preprocessors import get
    from controlkit.training.hint_start import start_hint_encoder

    base = load_base("tiny")
    cond = map_to_cond([get("canny")(render(k).picture).image for k in range(8)])
    controlnet = from_base(base, hint_channels=(8, 16, 48, 96), seed=1)
    assert not encode_hint(controlnet, cond).any()  # the standard start: the map is not there
    start_hint_encoder(controlnet, cond, seed=1)
    hint = encode_hint(controlnet, cond)
    torch.testing.assert_close(hint.mean((0, 2, 3)), torch.zeros(hint.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(hint.std((0, 2, 3)), torch.ones(hint.shape[1]), atol=1e-3, rtol=0)
    text = base.encode_prompts(["a", "b"]).encoder_hidden_states
    residuals = control_residuals(
        controlnet, torch.randn(2, 4, 16, 16), torch.tensor([5, 900]), text, hint[:2]
    )
    assert not any(bool(r.any()) for r in (*residuals.down, residuals.mid))
    again = from_base(base, hint_channels=(8, 16, 48, 96), seed=1)
    start_hint_encoder(again, cond, seed=1)
    assert torch.equal(encode_hint(again, cond), hint)


def test_the_networks_inputs_are_what_ddpm_says():
    mean = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(4))
    noisy: Noisy = batch(recipe(), mean=mean)
    a = ALPHAS[noisy.timesteps].float()[:, None, None, None]
    torch.testing.assert_close(noisy.noisy_latents, a.sqrt() * mean + (1 - a).sqrt() * noisy.noise)
