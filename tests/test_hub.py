"""Where a model is looked for, and that an unplugged machine says so at once."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from petune.hub import locate_model


@pytest.fixture
def online(monkeypatch):
    """As on a machine that was not told to be offline; returns how to set where the hub is."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "*")
    return lambda url: monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def add(repo, *files):
        folder = tmp_path / "cache" / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
        for file in files:
            (snapshot / file).write_text("{}")
        return str(snapshot)

    return add


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert locate_model(tmp_path) == str(tmp_path)


def test_a_model_in_the_cache_is_read_from_there(cache):
    snapshot = cache("org/model", "config.json", "model.safetensors")
    assert locate_model("org/model") == snapshot


def test_a_config_alone_in_the_cache_is_not_enough(cache):
    cache("org/model", "config.json")
    with pytest.raises(
        OSError, match=r"neither a folder nor in the hub's cache, and HF_HUB_OFFLINE is set; pass base="
    ):
        locate_model("org/model")


def test_no_network_is_said_at_once_with_what_to_do(online):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        online(f"http://127.0.0.1:{free.getsockname()[1]}")  # bound, and nobody listens
        start = time.monotonic()
        with pytest.raises(OSError, match=r"'org/model' is neither .* cannot be reached .*pass model=<folder"):
            locate_model("org/model", option="model")
        assert time.monotonic() - start < 5


def test_a_hub_that_accepts_and_never_answers_is_given_up(online, monkeypatch):
    monkeypatch.setattr("petune.hub._WAIT_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        online(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(OSError, match="cannot be reached"):
            locate_model("org/model")


def test_a_hub_that_answers_is_left_to_transformers(online):
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    online(f"http://127.0.0.1:{server.server_port}")
    assert locate_model("org/model") == "org/model"
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", ["/not/here", "a/b/c", "spaces in it"])
def test_what_can_be_no_hub_id_is_told_apart(name):
    with pytest.raises(OSError, match="is no folder, and no name that the hub could know"):
        locate_model(name)
