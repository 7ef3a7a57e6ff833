"""The table of well-known adapters, the command that prints it, and what is refused before any download."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
from outcomes import Outcome

from controlkit import known_adapters, models_job, preprocessors
from controlkit.adapters import default_adapter, load_adapter, save_adapter
from controlkit.base import Base
from controlkit.controlnet import from_base
from controlkit.formats.description import MAPS, AdapterInfo
from controlkit.known_adapters import KNOWN, check_combination, default_for, matching

Run = Callable[..., Outcome]


def test_every_entry_is_whole_and_no_kind_has_two_defaults() -> None:
    assert len({known.name for known in KNOWN}) == len(KNOWN)
    for known in KNOWN:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", known.name)
        assert known.family in known_adapters.FAMILY_NAMES
        assert known.network in ("controlnet", "controlnet-union", "t2i-adapter")
        assert re.fullmatch(r"[0-9a-f]{40}|", known.revision)
    defaults = [(known.family, known.kind) for known in KNOWN if known.default]
    assert len(set(defaults)) == len(defaults)
    for family in known_adapters.FAMILY_NAMES:
        for kind in MAPS:
            assert default_for(kind, family)


def test_every_map_that_is_made_has_an_adapter_for_sd15() -> None:
    for kind in preprocessors.names():
        assert default_for(kind, "sd1").startswith("lllyasviel/control_v11")
    assert default_for("hed", "sd1") == default_for("softedge", "sd1")


def test_entries_are_found_by_family_and_kind() -> None:
    assert {known.family for known in matching(family="sd2")} == {"sd2"}
    openpose = matching(family="sdxl", kind="openpose")
    assert {known.network for known in openpose} == {"controlnet", "controlnet-union"}
    assert len(matching(kind="zoe")) == len(matching(kind="depth"))
    with pytest.raises(ValueError, match=r"unknown kind of map 'cany' \(did you mean 'canny'\?\)"):
        matching(kind="cany")


def test_a_wrong_combination_is_said_with_what_would_fit() -> None:
    with pytest.raises(
        ValueError, match=r"canny-sdxl-1.0 is for SDXL, and the base is SD 1.5; for it there is lllyasviel/"
    ):
        check_combination("canny", "diffusers/controlnet-canny-sdxl-1.0", "sd1")
    with pytest.raises(ValueError, match=r"unknown control for SDXL 'lineart'"):
        check_combination("lineart", "", "sdxl")
    check_combination("canny", "somebody/else", "sd1")
    check_combination("anything", "somebody/else", "sdxl")
    check_combination("canny", "", "sdxl")


def test_a_bases_family_is_told_without_loading_it(tmp_path: Path) -> None:
    for family in tiny_models.FAMILIES:
        folder = tiny_models.build(tmp_path / family, family)
        assert models_job.family_of_base(str(folder)) == family
    told = {name: models_job.family_of_base(name) for name in ("sd15", "sd21", "sdxl", "tiny", "no/such")}
    assert told == {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl", "tiny": "sd2", "no/such": None}
    assert models_job.family_of_base("stabilityai/stable-diffusion-xl-base-1.0") == "sdxl"
    assert models_job.family_of_base("not an id!") is None


def test_the_command_prints_the_table(run: Run) -> None:
    lines = run("models").done().splitlines()
    assert len(lines) == len(KNOWN) + 1
    assert all(known.name in line for known, line in zip(KNOWN, lines[1:], strict=True))
    some = run("models", "--base", "sdxl", "--kind", "canny").done().splitlines()[1:]
    assert len(some) == len(matching(family="sdxl", kind="canny"))
    assert "e04b873   default" in some[0]
    assert "the family of nobody/knows is not known" in run("models", "--base", "nobody/knows").refused()


def test_what_is_cached_is_marked_and_taken_at_its_pinned_revision(
    sd1: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    known = next(known for known in KNOWN if known.name == "lllyasviel/control_v11p_sd15_canny")
    repository = cache / "models--lllyasviel--control_v11p_sd15_canny"
    (repository / "snapshots").mkdir(parents=True)
    for commit, seed in ((known.revision, 1), ("0" * 40, 2)):
        info = AdapterInfo(family="sd1", title=f"seed {seed}")
        save_adapter(from_base(sd1, seed=seed), repository / "snapshots" / commit, info=info)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert "default cached" in run("models", "--kind", "canny").done().splitlines()[1]
    named = replace(sd1, name="sd15")
    adapter = load_adapter(default_adapter("canny", named), base=named)
    assert adapter.info.title == "seed 1"
    (repository / "snapshots" / known.revision / "config.json").unlink()
    assert load_adapter(known.name, base=named).info.title == "seed 2", "what is there is taken"


def test_generate_refuses_a_wrong_combination_before_any_download(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "photo.png"
    tiny = Path(__file__).parent.parent / ".github" / "demo.png"
    picture.write_bytes(tiny.read_bytes())
    told = ("generate", "x", "--base", "sdxl", "--control", f"lineart={picture}", "-o", tmp_path / "o.png")
    assert "unknown control for SDXL 'lineart'" in run(*told).refused()
    other = ("--adapter", "canny=lllyasviel/sd-controlnet-canny")
    told = ("generate", "x", "--base", "sdxl", "--control", f"canny={picture}", *other)
    assert "is for SD 1.5, and the base is SDXL" in run(*told, "-o", tmp_path / "o.png").refused()
