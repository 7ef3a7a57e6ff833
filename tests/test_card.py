"""The model card and the upload: code in it runs, and nothing that the hub does can lose the adapter."""

import base64
import http.server
import json
import re
import shlex
import threading
from hashlib import sha256

import numpy as np
import pytest
import tiny_models
import yaml
from huggingface_hub import ModelCard, constants

from controlkit import files, images
from controlkit.adapters import MAPS, AdapterInfo, MapSpec, save_adapter
from controlkit.base import load_base
from controlkit.controlnet import from_base
from controlkit.training.reporting.card import write_card
from controlkit.training.reporting.publishing import check_repo_id, push_to_hub

CONFIG = (
    'task = "controlnet"\nmap = "canny"\nbase = "tiny"\nsteps = 400\nbatch_size = 16\nlearning_rate = 4e-4\n'
)
CONFIG += '[data]\nsource = "a | b <i>"\n'


@pytest.fixture(scope="module")
def controlnet():
    return tiny_models.randomize_zero_convs(
        from_base(load_base("tiny"), hint_channels=(8, 16, 16, 16), seed=1)
    )


def adapter(folder, controlnet, **changes):
    info = AdapterInfo(map=MAPS["canny"], family="sd1", prediction_type="v_prediction", resolution=128)
    info = AdapterInfo(**{**vars(info), **changes})
    save_adapter(controlnet, folder, info=info)
    return folder


@pytest.fixture
def run(tmp_path, controlnet):
    """A finished run in whose 100th step control took hold."""
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    images.write_png(folder / "samples" / "step-000400.png", np.full((32, 64, 3), 9, np.uint8))
    (folder / "config.toml").write_text(CONFIG)
    rows = [{"step": step, "gap": 0.3 * (step >= 100), "gap_error": 0.01} for step in range(0, 401, 50)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scores = {"floor": {"edge F1": 0.36}, "canny": {"edge F1": 0.52}, "ceiling": {"edge F1": 0.78}}
    (folder / "scores.json").write_text(json.dumps(scores))
    adapter(folder / "controlnet", controlnet, base="tiny", title="A canny adapter")
    return folder


def code(text, language):
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1]


def front_matter(text):
    return yaml.safe_load(text.split("---")[1])


def test_a_card_says_what_the_run_found(run):
    text = write_card(run / "controlnet", run_folder=run).read_text()
    about = front_matter(text)
    assert about["library_name"] == "diffusers"
    assert {"controlnet", "stable-diffusion", "text-to-image", "diffusers-training"} <= set(about["tags"])
    assert about["license"] == "apache-2.0"
    assert "base_model" not in about  # the bundled base is on no hub
    assert "Control took hold at step 100." in text
    assert "| edge F1 | 0.360 | 0.520 | 0.780 |" in text
    assert "| learning rate | 0.0004 |" in text
    assert r"| data | a \| b &lt;i> |" in text
    assert "white-on-black" in text
    assert (run / "controlnet" / "images_0.png").is_file()
    assert "![Maps, pictures and samples](images_0.png)" in text
    assert ModelCard(text).data.library_name == "diffusers"


def test_a_card_says_whether_its_scores_are_of_pairs_that_were_trained_on(run):
    def told():
        return write_card(run / "controlnet", run_folder=run).read_text()

    assert "Means over held-out pairs." in told()
    files.write_json(run / "facts.json", {"data_held_out": 0})
    assert "Means over held-out pairs." in told()  # its scores are of the bundled world's scenes
    scores = json.loads((run / "scores.json").read_text())
    files.write_json(run / "scores.json", {**scores, "control": scores["canny"]})
    assert "Means over trained pairs." in told()


@pytest.mark.filterwarnings("ignore")  # of the pipeline's own
def test_the_code_in_a_card_runs(run, tmp_path, monkeypatch):
    snippet = code(write_card(run / "controlnet", run_folder=run).read_text(), "python")
    monkeypatch.chdir(run)
    images.write_png("map.png", np.zeros((128, 128, 3), np.uint8))
    exec(compile(snippet.replace("num_inference_steps=20", "num_inference_steps=2"), "card", "exec"), {})
    assert images.load_picture("picture.png").shape == (128, 128, 3)


def test_the_command_in_a_card_is_understood(run, monkeypatch):
    from controlkit import generate_job

    command = shlex.split(code(write_card(run / "controlnet", run_folder=run).read_text(), "sh"))
    monkeypatch.chdir(run)
    images.write_png("map.png", np.zeros((128, 128, 3), np.uint8))
    options = dict(zip(command[3::2], command[4::2], strict=True))
    generate_job.plan(
        {"prompt": command[2], "base": options["--base"], "count": 1},
        controls=(),
        maps=[options["--map"]],
        adapters=[options["--adapter"]],
        output=options["-o"],
    )


@pytest.mark.parametrize(
    ("family", "base", "repo", "license_", "pipeline"),
    [
        ("sd1", "sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m", "Stable"),
        ("sd2", "some/base", "some/base", "openrail++", "StableDiffusionControlNetPipeline"),
        (
            "sdxl",
            "sdxl",
            "stabilityai/stable-diffusion-xl-base-1.0",
            "openrail++",
            "StableDiffusionXLControl",
        ),
        ("sd1", "../my base", None, None, "StableDiffusionControlNetPipeline"),
    ],
)
def test_a_card_of_a_real_base(tmp_path, controlnet, family, base, repo, license_, pipeline):
    folder = adapter(tmp_path / "net", controlnet, family=family, base=base)
    text = write_card(folder, repo_id="me/mine").read_text()
    about = front_matter(text)
    assert about.get("base_model") == repo
    assert about.get("license") == license_
    snippet = code(text, "python")
    compile(snippet, "card", "exec")
    assert pipeline in snippet
    assert 'from_pretrained("me/mine"' in snippet
    assert "images_0" not in text
    assert ".." not in text
    assert ModelCard(text).data.to_dict()["tags"]


def test_a_card_of_several_maps_in_one_input(tmp_path, controlnet):
    spec = MapSpec("canny + depth", channels=6)
    text = write_card(adapter(tmp_path / "net", controlnet, map=spec)).read_text()
    (command,) = [line for line in text.splitlines() if line.startswith("controlkit generate ")]
    assert " --map canny=canny.png --map depth=depth.png " in command
    assert command.count("--adapter ") == 2
    assert "ComfyUI" not in text
    plain = adapter(tmp_path / "plain", controlnet, map=MapSpec("canny + depth"))
    assert " --map canny=map.png --adapter canny=" in write_card(plain).read_text()


def test_a_card_of_another_kind_of_map(tmp_path, controlnet):
    spec = MapSpec("height\nmap", polarity="high | low", channels=1, thresholds={"low": 0.5})
    folder = adapter(tmp_path / "net", controlnet, map=spec, family="", title='quoted "title": x')
    text = write_card(folder).read_text()
    assert "float32 (1, 1, H, W) in [0, 1]" in text
    assert r"| polarity | high \| low |" in text
    assert "| thresholds | low 0.5 |" in text
    assert "controlkit generate" not in text  # which reads maps of three channels
    assert "ComfyUI" not in text
    compile(code(text, "python"), "card", "exec")
    assert "license" not in front_matter(text)


def test_a_card_needs_an_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        write_card(tmp_path)


# --- the hub ----


def digest(folder):
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["", "mine", "a/b/c", "me/../x", "me/a b", "/x", "me/-x"])
def test_a_bad_name_is_refused_before_the_training(name, tmp_path):
    with pytest.raises(ValueError, match=r"push_to_hub .* give owner/name"):
        check_repo_id(name)
    with pytest.raises(ValueError, match="push_to_hub"):
        push_to_hub(tmp_path, name)


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that takes one commit, in files of any size."""

    received: dict[str, bytes]
    status = 200

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.received[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        self.answer(self.reply(body))

    def do_GET(self):
        self.answer({"id": "me/mine", "sha": "0" * 40, "siblings": []})

    def reply(self, body):
        address = f"http://{self.headers['Host']}/me/mine"
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return {"files": [{**file, "shouldIgnore": False} for file in files]}
        if "/commit/" in self.path:
            return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{address}/commit/{'0' * 40}"}
        if "validate-yaml" in self.path:
            return {"errors": [], "warnings": []}
        return {"url": address, "name": "me/mine"}

    def answer(self, reply):
        body = json.dumps(reply if self.status == 200 else {"error": "no room left"}).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Keep standard error clean."""


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, to which somebody is logged in: its class, for `received` and `status`."""
    handler = type("OneHub", (Hub,), {"received": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield handler
        server.shutdown()


def test_an_adapter_arrives_with_its_card(hub, run):
    folder = run / "controlnet"
    write_card(folder, run_folder=run, repo_id="me/mine")
    before = digest(folder)
    assert push_to_hub(folder, "me/mine").endswith("/me/mine")
    assert {name: sha256(data).hexdigest() for name, data in hub.received.items()} == before
    assert digest(folder) == before


def failure(folder):
    before = digest(folder)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        push_to_hub(folder, "me/mine")
    assert digest(folder) == before
    message = str(error.value)
    assert message.startswith(f"the adapter is complete in {folder} but not on the hub: ")
    assert message.endswith(f"hf upload me/mine {folder}")
    return message


def test_a_hub_that_refuses_loses_nothing(hub, run):
    hub.status = 403
    assert "403" in failure(run / "controlnet")


def test_without_a_token_offline_and_without_a_network_nothing_is_lost(hub, run, monkeypatch):
    folder = run / "controlnet"
    monkeypatch.delenv("HF_TOKEN")
    assert "not logged in" in failure(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in failure(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    failure(folder)
