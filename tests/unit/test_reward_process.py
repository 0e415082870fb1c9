"""The reward process: what it says, and what a server that is broken or hostile can do."""

import ast
import base64
import contextlib
import hashlib
import json
import math
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import PIL
import psutil
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from waits import eventually, gone

from vipo.commands import rewards as commands
from vipo.config.reward import RewardSpec
from vipo.config.reward_options import GenEvalOptions
from vipo.config.reward_process import ProcessOptions, RemoteOptions
from vipo.config.validation import ConfigError
from vipo.rewards import RewardError, begin, check_identities, identities, load_reward, score, score_where
from vipo.rewards.served import serve
from vipo.rewards.serving import OnPillow
from vipo.rewards.wire import Endpoint

SERVED = Path(serve.__file__).parent
BARE = """
import os, sys, time

def red(pictures, prompts, metadata):
    "Mean of the red levels, times the number of letters of the prompt."
    print("to be seen by nobody but on standard error")
    assert not {"torch", "numpy", "vipo"} & sys.modules.keys()
    return [sum(p.getdata(0)) / (255 * p.width * p.height) * len(t) for p, t in zip(pictures, prompts)]

class Scaled:
    def __init__(self, device, factor, weights=None):
        self.device, self.factor, self.weight_files = device, factor, [weights] if weights else []

    def __call__(self, pictures, prompts, metadata):
        values = [self.factor * row["n"] for row in metadata]
        clips = [p if isinstance(p, list) else [p] for p in pictures]
        maps = [[[[f.getpixel((x, y))[1] for x in range(f.width)] for y in range(f.height)] for f in c] for c in clips]
        return values, maps if isinstance(pictures[0], list) else [m[0] for m in maps]

def dies(pictures, prompts, metadata):
    if "die" in prompts[0]:
        print("cannot go on", file=sys.stderr, flush=True)
        os._exit(7)
    return [0.5] * len(prompts)

def raises(pictures, prompts, metadata):
    raise ValueError("no such thing\\n\\x1b[31m")

def exits(pictures, prompts, metadata):
    sys.exit(0)

class ExitsAtLoad:
    def __init__(self, device):
        sys.exit(0)

def odd(pictures, prompts, metadata):
    return [float("nan"), 1.0][: len(prompts)]
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A virtual environment of Python and Pillow alone, and the modules that it can import."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "env", symlinks=True, with_pip=False)
    site = next((folder / "env" / "lib").glob("python*/site-packages"))
    installed = Path(PIL.__file__).parents[1]
    for path in (*installed.glob("PIL"), *installed.glob("pillow*")):
        (site / path.name).symlink_to(path)
    (folder / "bare_rewards.py").write_text(BARE)
    (folder / "weights.bin").write_bytes(b"weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield folder


def process(bare: Path | None, reward: str, **options: Any) -> Any:
    place = {} if bare is None else {"environment": str(bare / "env")}
    return load_reward("process", "cpu", {"reward": reward, "retries": 0, "timeout": 20.0, **place, **options})


def pictures(*shape: int) -> Tensor:
    levels = np.random.default_rng(0).integers(0, 256, shape)
    return torch.from_numpy(levels).float() / 255


# --- In an environment of its own


@pytest.mark.parametrize("form", ["png", "webp"])
def test_pictures_arrive_as_they_are_and_scores_are_exact(bare: Path, form: str) -> None:
    reward = process(bare, "bare_rewards:red", batch=2, format=form)
    images, prompts = pictures(5, 3, 6, 4), ["a", "bc", "def", "", "é" * 5]
    found = reward(images, prompts, [{}] * 5)
    levels = (images[:, 0] * 255).round().double().sum(dim=(1, 2))
    wanted = [level / (255 * 24) * len(text) for level, text in zip(levels.tolist(), prompts, strict=True)]
    assert found.tolist() == wanted
    told = reward.identity
    assert told["packages"]["pillow"] == PIL.__version__
    assert "torch" not in told["packages"]
    assert told["weights"] == {}
    assert set(told["code"]) == {"serve.py", "bare_rewards.py"}


def test_a_class_gets_its_arguments_and_its_maps_and_clips_travel(bare: Path) -> None:
    arguments = {"factor": 2.5, "weights": str(bare / "weights.bin")}
    reward = process(bare, "bare_rewards:Scaled", arguments=arguments, batch=2, device="cpu")
    rows = [{"n": number} for number in range(3)]
    images = pictures(3, 3, 6, 4)
    found = score_where("mine", reward, images, ["", "", ""], rows)
    assert found.scores.tolist() == [0.0, 2.5, 5.0]
    assert found.where is not None
    assert torch.equal(found.where, (images[:, 1] * 255).round())
    clips = pictures(3, 2, 3, 6, 4)
    found = score_where("mine", reward, clips, ["", "", ""], rows)
    assert found.where is not None
    assert torch.equal(found.where, (clips[:, :, 1] * 255).round())
    assert reward.identity["weights"] == {"weights.bin": hashlib.sha256(b"weights").hexdigest()}


def test_what_begins_ahead_is_what_is_given_afterwards(bare: Path) -> None:
    reward, images, rows = process(bare, "bare_rewards:red"), pictures(4, 3, 5, 5), [{}] * 2
    alone = [reward(part, ["a", "b"], rows) for part in images.split(2)]
    for part in images.split(2):
        begin(reward, part, ["a", "b"], rows)
    assert len(reward._ahead._begun) == 2
    ahead = [reward(part, ["a", "b"], rows) for part in images.split(2)]
    assert torch.equal(torch.cat(alone), torch.cat(ahead))
    assert reward._ahead._begun == {}
    # Of another text, another question.
    begin(reward, images[:2], ["a", "b"], rows)
    assert reward(images[:2], ["a", "bb"], rows)[1] == 2 * alone[0][1]


def test_what_the_reward_does_wrong_is_told_in_one_line(bare: Path) -> None:
    images = pictures(2, 3, 4, 4)
    with pytest.raises(RewardError, match=r"raises.*status 500: ValueError: no such thing") as told:
        score("mine", process(bare, "bare_rewards:raises"), images, ["", ""], [{}] * 2)
    assert "\x1b" not in str(told.value)
    with pytest.raises(RewardError, match=r"exits.*status 500: SystemExit: 0"):
        score("mine", process(bare, "bare_rewards:exits"), images, ["", ""], [{}] * 2)
    found = score("mine", process(bare, "bare_rewards:odd"), images, ["", ""], [{}] * 2)
    assert math.isnan(found[0])
    assert found[1] == 1
    with pytest.raises(RewardError, match="expected 3 scores, got 2"):
        process(bare, "bare_rewards:odd")(pictures(3, 3, 4, 4), ["", "", ""], [{}] * 3)


def test_its_death_is_told_with_its_last_words(bare: Path) -> None:
    reward, images = process(bare, "bare_rewards:dies", retries=20), pictures(1, 3, 4, 4)
    assert reward(images, ["live"], [{}]).tolist() == [0.5]
    with pytest.raises(RewardError, match=r"its process ended \(status 7; its last words: .*cannot go on\)"):
        reward(images, ["die"], [{}])


@pytest.mark.parametrize(
    ("reward", "options", "told"),
    [
        ("bare_rewards:absent", {}, r"could not be started \(status 1; .*has no attribute 'absent'"),
        ("absent_module:x", {}, "No module named 'absent_module'"),
        ("bare_rewards:red", {"arguments": {"a": 1}}, "is no class and takes no arguments: a"),
        ("bare_rewards:BARE", {}, "has no attribute 'BARE'"),
        ("bare_rewards:ExitsAtLoad", {}, r"could not be started \(status 1; .*ExitsAtLoad: SystemExit: 0"),
    ],
)
def test_what_cannot_be_started_is_told_at_once(bare: Path, reward: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(RewardError, match=told):
        process(bare, reward, **options)


def test_an_environment_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"environment '.*absent': there is no .*absent; make it"):
        process(None, "a:b", environment=str(tmp_path / "absent"))


def test_it_ends_with_the_one_who_started_it(bare: Path) -> None:
    """Killed, so that nobody cleans up."""
    code = (
        "import sys, time; from vipo.rewards import load_reward;"
        f"r = load_reward('process', 'cpu', {{'reward': 'bare_rewards:red', 'environment': {str(bare / 'env')!r}}});"
        "print(r._child._process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert not gone(child)
    parent.kill()
    parent.wait()
    eventually("the process has ended", lambda: gone(child))


def test_served_files_are_python_3_8_and_import_nothing_of_vipo() -> None:
    for path in SERVED.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
        names = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
        assert not [name for name in names if name.partition(".")[0] == "vipo"], path


# --- A reward of vipo's


@contextlib.contextmanager
def served(score: Any, identity: Mapping[str, Any], token: str | None = None) -> Iterator[str]:
    server = serve.Server(("127.0.0.1", 0), score, dict(identity), token)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("name", ["redness", "object_redness", "flicker"])
def test_a_reward_of_vipo_gives_the_same_from_elsewhere(name: str) -> None:
    own = OnPillow(name, {}, "cpu")
    images = pictures(3, 4, 3, 16, 16) if name == "flicker" else pictures(3, 3, 16, 16)
    here = score_where(name, load_reward(name), images, [""] * 3, [{}] * 3)
    with served(own, own.identity) as url:
        reward = process(None, name, url=url, batch=2)
        there = score_where(name, reward, images, [""] * 3, [{}] * 3)
    assert torch.equal(here.scores, there.scores)
    assert (here.where is None) == (there.where is None)
    if here.where is not None and there.where is not None:
        assert torch.equal(here.where, there.where)
    assert reward.identity["code"]["vipo"]
    assert "torch" in reward.identity["packages"]


def test_a_token_is_needed_where_one_is_set_and_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    own = OnPillow("redness", {}, "cpu")
    with served(own, own.identity, "secret") as url:
        with pytest.raises(RewardError, match="status 401"):
            process(None, "redness", url=url)
        with pytest.raises(RewardError, match="the environment has no MY_TOKEN"):
            process(None, "redness", url=url, token_env="MY_TOKEN")
        for wrong in ("other", "sécret", "a\nb"):
            monkeypatch.setenv("MY_TOKEN", wrong)
            with pytest.raises(RewardError) as told:
                process(None, "redness", url=url, token_env="MY_TOKEN")
            assert wrong not in str(told.value)
        monkeypatch.setenv("MY_TOKEN", "secret")
        reward = process(None, "redness", url=url, token_env="MY_TOKEN")
        assert score("r", reward, pictures(1, 3, 4, 4), [""], [{}]).shape == (1,)
    assert "secret" not in json.dumps(identities({"r": reward}))


def test_another_process_than_the_one_trained_on_is_refused() -> None:
    own = OnPillow("redness", {}, "cpu")
    with served(own, own.identity) as url:
        here = identities({"r": process(None, "redness", url=url), "plain": load_reward("redness")})
    assert list(here) == ["r"]
    check_identities(here, here, Path("record"))
    check_identities({}, here, Path("record"))
    other = json.loads(json.dumps(here))
    other["r"]["packages"]["pillow"] = "1.0"
    other["r"]["weights"]["w.bin"] = "0" * 64
    with pytest.raises(RewardError, match=r"record tells of: packages pillow \(1\.0, now .*\), weights w"):
        check_identities(other, here, Path("record"))


def test_a_server_that_scores_something_else_is_refused() -> None:
    own = OnPillow("redness", {}, "cpu")
    with (
        served(own, own.identity) as url,
        pytest.raises(RewardError, match="reward redness, not object_redness"),
    ):
        process(None, "object_redness", url=url)


def test_a_server_of_a_registered_reward_is_held_to_the_defaults_too() -> None:
    defaults = GenEvalOptions().model_dump(mode="json")

    def serving(**changed: Any) -> dict[str, Any]:
        return {**IDENTITY, "reward": "geneval", "arguments": {**defaults, **changed}}

    silent = {name: value for name, value in defaults.items() if name != "score"}
    for told, message in (
        (serving(score="claims", threshold=0.9), r"arguments \{'score': 'claims', 'threshold': 0\.9\}, not"),
        (serving(dtype="fp16"), r"\{'dtype': 'fp16'\}, not \{'dtype': 'fp32'\}"),
        ({**serving(), "arguments": silent}, r"\{'score': None\}, not \{'score': 'strict'\}"),
        (serving(other=1), r"\{'other': 1\}, not \{'other': None\}"),
    ):
        with served(None, told) as url, pytest.raises(RewardError, match=message):
            process(None, "geneval", url=url)
    # Where the weights are there and how many go through at once is the server's own; what is asked for is not.
    own = serving(path="/weights/clip", detector="/weights/detector", batch=4, resident="free")
    with served(None, own) as url:
        process(None, "geneval", url=url, arguments={"threshold": 0.3})
        with pytest.raises(RewardError, match=r"\{'batch': 4\}, not \{'batch': 8\}"):
            process(None, "geneval", url=url, arguments={"batch": 8})


def test_arguments_of_a_registered_reward_are_checked_here() -> None:
    for reward, arguments, told in (
        ("geneval", {"thresold": 1}, "arguments.thresold"),
        ("redness", {"a": 1}, "'redness' takes none"),
    ):
        with pytest.raises(ValidationError, match=told):
            ProcessOptions(reward=reward, arguments=arguments, url="http://127.0.0.1:1")


# --- A hostile server

IDENTITY = {"protocol": 1, "reward": "a:b", "arguments": {}, "packages": {}, "code": {}, "weights": {}}


def message(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    told = {"Content-Length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in told.items() if value)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


@contextlib.contextmanager
def raw(answer: Callable[[socket.socket], None] | bytes) -> Iterator[str]:
    """A server that tells who it is, and answers each question with these bytes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def one(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(20)
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += client.recv(65536)
            head, _, body = asked.partition(b"\r\n\r\n")
            if head.startswith(b"GET"):
                client.sendall(message(json.dumps(IDENTITY).encode()))
                return
            length = int(head.lower().partition(b"content-length:")[2].split()[0])
            while len(body) < length:
                body += client.recv(65536)
            if isinstance(answer, bytes):
                client.sendall(answer)
            else:
                answer(client)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def where(shape: list[Any], values: bytes) -> bytes:
    told = {"scores": [1, 2], "where": {"shape": shape, "float32": base64.b64encode(values).decode()}}
    return message(json.dumps(told).encode())


HOSTILE = {
    "no JSON": (message(b"<html>"), "is no JSON"),
    "no UTF-8": (message(b'{"scores": "\xff"}'), "is no JSON"),
    "nothing": (message(b""), "is no JSON"),
    "deep": (message(b"[" * 60000), "is no JSON"),
    "a list": (message(b"[1, 2]"), "is a list, not an object"),
    "no scores": (message(b"{}"), "expected 2 scores, got no list"),
    "too few": (message(b'{"scores": [1]}'), "expected 2 scores, got 1 scores"),
    "too many": (message(b'{"scores": [1, 2, 3]}'), "expected 2 scores, got 3 scores"),
    "NaN": (message(b'{"scores": [NaN, 1]}'), "is no JSON"),
    "infinite": (message(b'{"scores": [1, -1e999]}'), "'-inf' is no finite number"),
    "a large number": (message(b'{"scores": [1, 1' + b"0" * 400 + b"]}"), "is no finite number"),
    "an endless number": (message(b'{"scores": [1, ' + b"1" * 5000 + b"]}"), "is no JSON"),
    "a text": (message(b'{"scores": ["1", 1]}'), "is no finite number"),
    "true": (message(b'{"scores": [true, 1]}'), "is no finite number"),
    "a redirect": (message(b"{}", "302 Found", Location="http://127.0.0.1:1/"), r"it redirects \(status 302\)"),
    "an error": (message(b'{"error": "out of\\nmemory"}', "500 No"), r"status 500: out of\\nmemory"),
    "an odd error": (message(b'{"error": {"a": [1]}}', "400 No"), "status 400"),
    "compressed": (message(b"\x1f\x8b", Content_Encoding="gzip"), r"compressed \(gzip\)"),
    "announced too long": (message(b"{}", Content_Length="99999999999"), "has 99999999999 bytes, more than"),
    "too long": (message(b" " * 200000, Content_Length=""), "has more than the"),
    "chunked without end": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + (b"ffff\r\n" + b" " * 0xFFFF + b"\r\n") * 4,
        "has more than the",
    ),
    "chunks below nothing": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n" + b" " * 200000,
        "no answer in one try|has more than",
    ),
    "closed early": (message(b'{"scores": [1,', Content_Length="100"), "ended 86 bytes early"),
    "no HTTP": (b"220 ftp ready\r\n", "BadStatusLine"),
    "closed": (b"", "RemoteDisconnected"),
    "many headers": (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 300 + b"\r\n{}", "more than 100 headers"),
    "a long header": (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100000 + b"\r\n\r\n{}", "header line"),
    "busy": (message(b"{}", "503 Busy"), "status 503"),
    "a map of another size": (where([2, 2, 3], b"\0" * 8), r"8 bytes of shape \(2, 2, 3\)"),
    "a map of fewer": (where([1, 2, 1], b"\0" * 8), r"where: expected float32 of shape \(2, h, w\)"),
    "a map of nothing": (where([2, 0, 0], b""), "where: expected float32"),
    "a map of truth": (where([2, True, 1], b"\0" * 8), "where: expected float32"),
    "a map below nothing": (where([2, -1, -1], b"\0" * 8), "where: expected float32"),
    "no map": (message(b'{"scores": [1, 2], "where": 5}'), "where: expected float32"),
    "no base64": (
        message(b'{"scores": [1, 2], "where": {"shape": [2, 1, 1], "float32": "\\u00e9"}}'),
        "where: expected",
    ),
    "an infinite map": (
        where([2, 1, 1], np.array([np.inf, 0], "<f4").tobytes()),
        "where: holds a value that is not finite",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_broken_or_hostile_server_costs_an_error_that_names_it(kind: str) -> None:
    answer, told = HOSTILE[kind]
    with raw(answer) as url:
        reward = process(None, "a:b", url=url)
        with pytest.raises(RewardError, match=rf"(?s)(reward process 'a:b' at {url}|reward 'mine').*({told})") as error:
            score_where("mine", reward, pictures(2, 3, 4, 4), ["", ""], [{}] * 2)
    assert len(str(error.value)) < 1500
    assert str(error.value).isprintable()


def test_a_server_that_drips_is_hung_up_on() -> None:
    stop = threading.Event()

    def drip(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        while not stop.wait(0.05):
            client.sendall(b" ")

    def drip_headers(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nA: ")
        while not stop.wait(0.05):
            client.sendall(b"b")

    def continues(client: socket.socket) -> None:
        while not stop.wait(0.01):
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    for answer in (drip, drip_headers, continues, lambda client: stop.wait(20) and None):
        with raw(answer) as url:
            reward = process(None, "a:b", url=url)
            # Who it is was told in time, whatever else the machine does.
            reward._endpoint._options = reward._options.model_copy(update={"timeout": 0.5})
            with pytest.raises(RewardError, match=r"no answer in one try, the last one: it took more than 0\.5 s"):
                reward(pictures(1, 3, 4, 4), [""], [{}])
    stop.set()


@contextlib.contextmanager
def dripping(greeting: bytes, stop: threading.Event) -> Iterator[int]:
    """A server that greets whoever connects, and then says a byte at a time."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                client, _ = listener.accept()
                with client:
                    client.sendall(greeting)
                    while not stop.wait(0.05):
                        client.sendall(b" ")

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            stop.set()


def test_the_time_of_a_request_is_over_while_it_still_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def slow(self: socket.socket, address: Any) -> None:
        time.sleep(0.7)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", slow)
    with dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", threading.Event()) as port:
        _is_hung_up_on(f"http://127.0.0.1:{port}")


def test_a_handshake_that_drips_is_hung_up_on() -> None:
    # The beginning of a record of 16 KiB, of which a byte comes at a time.
    with dripping(b"\x16\x03\x03\x40\x00", threading.Event()) as port:
        _is_hung_up_on(f"https://127.0.0.1:{port}")


def test_an_address_that_never_answers_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with raw(b"") as url:
        own = ("127.0.0.1", urlsplit(url).port)
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in (("192.0.2.1", 80), own)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        connect = socket.socket.connect

        def dropped(self: socket.socket, address: Any) -> None:
            if address[0].startswith("192."):
                time.sleep(self.gettimeout() or 60)
                raise TimeoutError
            connect(self, address)

        monkeypatch.setattr(socket.socket, "connect", dropped)
        endpoint = Endpoint(url, RemoteOptions(timeout=4, retries=0), "a server")
        assert endpoint.ask("/identity", None, 2**20)["reward"] == IDENTITY["reward"]


def _is_hung_up_on(url: str) -> None:
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"no answer in one try, the last one: it took more than 0\.5 s"):
        Endpoint(url, RemoteOptions(timeout=0.5, retries=0), "a server").ask("/", None, 2**10)
    # What drips says 100 bytes in 5 s.
    assert time.monotonic() - began < 4


def test_what_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    # Of this module alone: processes of the tests before may be ended meanwhile, which sleeps too.
    monkeypatch.setattr("vipo.rewards.wire.time", SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic))
    answers = [b"", message(b"{}", "503 Busy"), message(b'{"scores": [4]}')]
    with raw(lambda client: client.sendall(answers.pop(0))) as url:
        reward = process(None, "a:b", url=url, retries=2)
        assert reward(pictures(1, 3, 4, 4), [""], [{}]).tolist() == [4]
        assert pauses == [0.5, 1.0]
        answers.extend([b""] * 3)
        with pytest.raises(RewardError, match="no answer in 3 tries"):
            reward(pictures(1, 3, 4, 4), [""], [{}])


def test_a_server_that_asks_for_time_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("vipo.rewards.wire.time", SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic))
    limit = b'{"error": {"message": "Rate limit\\nreached"}}'
    waits = ["20", "0.1", "9" * 9, "-1", "nan", "Fri, 01 Jan 2027 00:00:00 GMT", "1e3"]
    answers = [message(limit, "429 Slow", Retry_After=wait) for wait in waits]
    with raw(lambda client: client.sendall(answers.pop(0))) as url:
        reward = process(None, "a:b", url=url, retries=6, timeout=40.0)
        with pytest.raises(RewardError, match=r"no answer in 7 tries, the last one: status 429: .*Rate limit") as error:
            reward(pictures(1, 3, 4, 4), [""], [{}])
    assert pauses == [20.0, 1.0, 40.0, 4.0, 8.0, 16.0]
    assert str(error.value).isprintable()


def test_what_passes_of_a_service_is_an_error_of_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vipo.rewards.wire.time", SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic))
    for status in (408, 409, 500, 520, 524, 529):
        answers = [message(b'{"error": "mine"}', f"{status} Once"), message(b'{"scores": [4]}')]
        with raw(lambda client, answers=answers: client.sendall(answers.pop(0))) as url:  # type: ignore[misc]
            reward = process(None, "a:b", url=url, retries=1)
            if status == 500:
                with pytest.raises(RewardError, match="status 500: mine"):
                    reward(pictures(1, 3, 4, 4), [""], [{}])
            else:
                assert reward(pictures(1, 3, 4, 4), [""], [{}]).tolist() == [4]


def test_maps_of_two_sizes_are_refused() -> None:
    answers = [where([2, 1, 1], b"\0" * 8), where([2, 2, 1], b"\0" * 16)]
    with raw(lambda client: client.sendall(answers.pop(0))) as url:
        reward = process(None, "a:b", url=url, batch=2, concurrency=1)
        with pytest.raises(RewardError, match="its maps of where are not of one size"):
            reward(pictures(4, 3, 4, 4), [""] * 4, [{}] * 4)


def test_a_server_that_is_exchanged_is_noticed() -> None:
    own = OnPillow("redness", {}, "cpu")
    with served(own, own.identity) as url:
        reward = process(None, "redness", url=url)
        images = pictures(1, 3, 4, 4)
        assert reward(images, [""], [{}]).shape == (1,)
        reward._digest = "another"
        with pytest.raises(RewardError, match="another one answers than at the start of this run"):
            reward(images, [""], [{}])


def test_what_was_begun_and_failed_stops_what_would_follow() -> None:
    with raw(message(b"{}")) as url:
        reward = process(None, "a:b", url=url)
        begin(reward, pictures(1, 3, 4, 4), ["a"], [{}])
        (future,) = reward._ahead._begun.values()
        assert future.exception() is not None
        with pytest.raises(RewardError, match="expected 1 scores"):
            begin(reward, pictures(1, 3, 4, 4), ["b"], [{}])
        assert reward._ahead._begun == {}


@pytest.mark.parametrize(
    ("identity", "told"),
    [
        ({}, "is no server of protocol 1"),
        ({**IDENTITY, "code": 1}, r"does not say what it is \(code\)"),
        ({**IDENTITY, "packages": {"a": {"b": []}}}, "something else than texts"),
        ({**IDENTITY, "weights": {"a": "b" * 2**20}}, "or too much"),
    ],
)
def test_who_does_not_say_what_it_is_is_refused(identity: dict[str, Any], told: str) -> None:
    server = serve.Server(("127.0.0.1", 0), lambda *_: [], {}, None)
    server.identity = identity
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    with pytest.raises(RewardError, match=told):
        process(None, "a:b", url=f"http://127.0.0.1:{server.server_address[1]}")
    server.shutdown()
    thread.join()
    server.server_close()


# --- A hostile client


def asked(url: str, request: bytes) -> tuple[int, dict[str, Any]]:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(request)
        found = b""
        while part := client.recv(65536):
            found += part
    head, _, body = found.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def posted(body: bytes, path: str = "/score") -> bytes:
    return f"POST {path} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (posted(b"{"), 400),
        (posted(b"[" * 100000), 400),
        (posted(b"[]"), 400),
        (posted(b'{"samples": []}'), 400),
        (posted(b'{"samples": [1]}'), 400),
        (posted(b'{"samples": [{"prompt": "", "metadata": {}, "clip": false, "frames": ["!"]}]}'), 400),
        (posted(b'{"samples": [{"prompt": "", "metadata": {}, "clip": false, "frames": ["AAAA"]}]}'), 400),
        (posted(b'{"samples": [{"prompt": "", "metadata": {}, "clip": false, "frames": []}]}'), 400),
        (posted(b"{}", "/other"), 404),
        (b"POST /score HTTP/1.0\r\n\r\n", 411),
        (b"POST /score HTTP/1.0\r\nContent-Length: 99999999999\r\n\r\n", 413),
    ],
)
def test_a_server_answers_bad_questions_with_their_fault(request_bytes: bytes, status: int) -> None:
    with served(lambda *_: [], IDENTITY) as url:
        found, told = asked(url, request_bytes)
        assert found == status
        assert told["error"]
        # It goes on.
        assert asked(url, b"GET /identity HTTP/1.0\r\n\r\n")[1]["protocol"] == 1


def test_where_is_packed_by_its_shape() -> None:
    packed = serve.packed([[[1, 2, 3], [4, 5, 6]]])
    assert packed["shape"] == [1, 2, 3]
    assert np.frombuffer(base64.b64decode(packed["float32"]), "<f4").tolist() == [1, 2, 3, 4, 5, 6]
    assert serve.packed(torch.ones(2, 3, 1, 5))["shape"] == [2, 3, 1, 5]
    for bad in ([[[1, 2], [3]]], [1.0], []):
        with pytest.raises((ValueError, TypeError)):
            serve.packed(bad)


def test_others_need_a_token() -> None:
    with pytest.raises(ValueError, match="others can reach it; put a token"):
        serve.token_of(None, "0.0.0.0")
    with pytest.raises(ValueError, match="the environment has no ABSENT"):
        serve.token_of("ABSENT", "127.0.0.1")
    assert serve.token_of(None, "127.0.0.1") is None


# --- Beside the original


def test_a_reward_is_scored_beside_its_original(bare: Path, tmp_path: Path) -> None:
    from vipo.rewards.beside import score_beside

    levels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    levels[..., 1:] = 0
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for file, picture in zip(files, levels, strict=True):
        Image.fromarray(picture).save(file)
    original = {"reward": "bare_rewards:red", "environment": str(bare / "env")}
    found = score_beside("redness", {}, original, files, ["a"])
    # Of red alone, both are the mean of the red levels.
    assert found.largest < 1e-6
    assert found.ours == pytest.approx([float(p[..., 0].mean() / 255) for p in levels])
    assert "largest difference" in found.text()
    missing = score_beside("redness", {}, {**original, "environment": str(tmp_path / "no")}, files, ["a"])
    assert missing.ours == []
    told = f"reward 'process': environment '{tmp_path}/no': there is no "
    assert missing.text().startswith(f"skipped, nothing was scored: {told}")
    for wrong in ([], ["a", "b", "c"]):
        with pytest.raises(RewardError, match="give one prompt, or one a picture"):
            score_beside("redness", {}, original, files, wrong)
    with pytest.raises(RewardError, match="name its original"):
        score_beside("redness", {}, {}, files, ["a"])
    # What is wrong is no reason to skip, whatever else is missing.
    for own, theirs, told in (
        ({"pth": 1}, {}, "options.*it takes none"),
        ({}, {"batch": 0}, "batch"),
        ({}, {"reward": "bare_rewards:no_such"}, "no_such"),
    ):
        with pytest.raises(RewardError, match=told):
            score_beside("redness", own, {**original, **theirs}, files, ["a"])
    with pytest.raises(RewardError, match="unknown key"):
        score_beside("hpsv2", {"pth": 1}, {"environment": "envs/hpsv2"}, files, ["a"])
    nowhere = {"environment": str(tmp_path / "no")}
    assert "there is no" in score_beside("flicker", {}, nowhere, files, ["a"]).skipped
    for wrong_json in ("[1]", '"a"'):
        with pytest.raises(ConfigError, match="objects of JSON"):
            commands.score_beside("hpsv2", files, ["a"], None, None, wrong_json, "{}", "cpu")
    # A file of several frames is a clip.
    clip = [Image.fromarray(picture) for picture in levels]
    clip[0].save(tmp_path / "clip.webp", save_all=True, append_images=clip[1:], lossless=True)
    other = {**original, "reward": "bare_rewards:dies"}
    (one,) = score_beside("flicker", {}, other, [tmp_path / "clip.webp"], ["a"]).ours
    assert one == pytest.approx(1 - np.abs(levels[1].astype(float) - levels[0]).mean() / 255)
    (tmp_path / "x.png").write_text("no")
    with pytest.raises(RewardError, match="is no picture"):
        score_beside("redness", {}, original, [tmp_path / "x.png"], ["a"])


# --- Options


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "give one of environment"),
        ({"url": "http://a", "environment": "e"}, "give one of environment"),
        ({"url": "http://user:pw@a"}, "holds no user, password"),
        ({"url": "http://a?token=x"}, "holds no user, password"),
        ({"url": "ftp://a"}, "is no address"),
        ({"url": "http://a:99999"}, "is no address"),
        ({"url": "http://a", "device": "cuda"}, "one at an address has its own"),
        ({"environment": "e", "token_env": "A"}, "gets a token of its own"),
        ({"url": "http://a", "token_env": "s3cr3t-token"}, "name the variable, never the token"),
        ({"environment": "e", "reward": "redness", "takes": "pillow"}, "takes tensors"),
        ({"environment": "e", "reward": "process"}, "name the reward that is scored there"),
        ({"environment": "e", "reward": "rednes"}, "did you mean 'redness'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        ProcessOptions.model_validate({"reward": "a:b", **options})


def test_where_it_runs_is_no_part_of_the_identity() -> None:
    def deciding(**options: Any) -> Any:
        return RewardSpec(name="process", label="mine", options={"reward": "a:b", **options}).deciding

    assert deciding(url="http://a:1") == deciding(url="http://b:2", timeout=5.0, retries=1, token_env="T")
    assert deciding(url="http://a:1") == deciding(environment="envs/a", device="cuda:1")
    assert deciding(url="http://a:1") != deciding(url="http://a:1", batch=4)
    assert deciding(url="http://a:1") != deciding(url="http://a:1", arguments={"x": 1})
    assert RewardSpec(name="redness").deciding == "redness"
