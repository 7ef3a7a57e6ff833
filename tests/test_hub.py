"""The model hub: what is asked of it, what is downloaded, and what is said when it cannot help."""

import http.server
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import tiny_models
from huggingface_hub import constants

from controlkit.adapters import check_adapter
from controlkit.base import check_base, load_base
from controlkit.hub import wanted_files

COMMIT = "0" * 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: tiny_models.build(root / family, family) for family in ("sd2", "sdxl")}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def message_of(name: str) -> str:
    """The error of loading a base by its hub id: one line, within five seconds."""
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        load_base(name)
    assert time.monotonic() - start < 5
    return str(error.value)


class Hub(http.server.BaseHTTPRequestHandler):
    """A repository as the hub serves it: its list of files, and each file."""

    folder: Path
    sent: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        _, _, inside = self.path.partition(f"/resolve/{COMMIT}/")
        if inside:
            body = (self.folder / inside).read_bytes()
            if self.command == "GET":
                self.sent.append(inside)
        else:
            files = sorted(file for file in self.folder.rglob("*") if file.is_file())
            names = [str(file.relative_to(self.folder)) for file in files]
            siblings = [{"rfilename": name} for name in names]
            tree = [{"type": "file", "path": name, "size": 1, "oid": COMMIT} for name in names]
            model = {"id": "someone/something", "sha": COMMIT, "siblings": siblings}
            body = json.dumps(tree if "/tree/" in self.path else model).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep standard error clean."""


@contextmanager
def serving(
    handler: type[http.server.BaseHTTPRequestHandler], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield
        server.shutdown()


@contextmanager
def hub_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub with one repository, someone/something; gives the files that were sent."""
    sent: list[str] = []
    with serving(type("OfFolder", (Hub,), {"folder": folder, "sent": sent}), monkeypatch):
        yield sent


def test_a_repository_is_downloaded_and_then_used_without_the_network(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = Path(shutil.copytree(folders["sd2"], tmp_path / "repo"))
    (repo / "README.md").write_text("not needed")
    (repo / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_text("not needed")
    (repo / "vae" / "diffusion_pytorch_model.bin").write_text("not needed")
    with hub_of(repo, monkeypatch) as sent:
        check_base("someone/something")
        assert sent == []
        expected = load_base(str(folders["sd2"])).digest()
        assert load_base("someone/something").digest() == expected
    assert "unet/diffusion_pytorch_model.safetensors" in sent
    assert not [name for name in sent if name == "README.md" or "fp16" in name or name.endswith(".bin")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_base("someone/something").digest() == expected


@pytest.mark.slow
def test_a_repository_of_half_precision_alone_is_downloaded(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = Path(shutil.copytree(folders["sd2"], tmp_path / "repo"))
    for file in list(repo.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    with hub_of(repo, monkeypatch) as sent:
        load_base("someone/something")
    assert len([name for name in sent if name.endswith(".fp16.safetensors")]) == 3


def test_what_a_cached_copy_lacks_is_downloaded(
    folders: dict[str, Path], empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_of(folders["sdxl"], monkeypatch) as sent:
        load_base("someone/something")
        for part in ("text_encoder_2", "tokenizer"):
            shutil.rmtree(empty_cache / "models--someone--something" / "snapshots" / COMMIT / part)
        sent.clear()
        load_base("someone/something")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    shutil.rmtree(empty_cache / "models--someone--something" / "snapshots" / COMMIT / "text_encoder_2")
    assert "only a part of it is in the cache" in message_of("someone/something")


def test_of_each_part_one_kind_of_weights_is_wanted() -> None:
    names = ["model_index.json", "README.md", "v1-5-pruned.ckpt", "vae/config.json"]
    names += [f"unet/diffusion_pytorch_model{kind}" for kind in (".safetensors", ".fp16.safetensors", ".bin")]
    names += ["unet/diffusion_pytorch_model.non_ema.safetensors"]
    names += ["vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.bin"]
    names += ["text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin"]
    assert wanted_files(names, ["model_index.json", "*/*.json", "*/*.safetensors", "*/*.bin"]) == [
        "model_index.json",
        "vae/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/model.fp16.safetensors",
    ]


def test_names_are_checked_without_loading_anything() -> None:
    check_base("tiny")
    check_adapter("canny")
    with pytest.raises(ValueError, match=r"no base called 'tinny' \(did you mean 'tiny'\?\)"):
        check_base("tinny")
    with pytest.raises(ValueError, match=r"no adapter 'nobody/nothing'.*HF_HUB_OFFLINE"):
        check_adapter("nobody/nothing")


@pytest.mark.parametrize("seconds", [0, pytest.param(6, marks=pytest.mark.slow)])
def test_a_hub_that_cannot_be_reached(seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name resolution fails at once, or hangs for longer than anybody wants to wait."""

    def resolve(*_: object, **__: object) -> None:
        time.sleep(seconds)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    message = message_of("nobody/nothing")
    assert constants.HF_HUB_CACHE in message
    assert "no network?" in message


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", "the hub knows no such model"),
        (403, "GatedRepo", "asks you to accept its terms"),
        (500, "", "the hub answers with an error"),
    ],
)
def test_a_hub_that_says_no(status: int, code: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Keep standard error clean."""

    with serving(Refuse, monkeypatch):
        assert words in message_of("nobody/nothing")


def test_a_cached_copy_is_used_without_the_network(folders: dict[str, Path]) -> None:
    repo = Path(constants.HF_HUB_CACHE) / "models--someone--something"
    snapshot = repo / "snapshots" / ("0" * 40)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    try:
        (snapshot / "unet").mkdir(parents=True)
        (snapshot / "model_index.json").write_text("{}")
        assert "only a part of it is in the cache" in message_of("someone/something")
        shutil.rmtree(snapshot)
        shutil.copytree(folders["sd2"], snapshot)
        assert load_base("someone/something").family == "sd2"
    finally:
        shutil.rmtree(repo)
