"""A reward behind HTTP, wherever Python (3.8 or newer) and Pillow are: ``python serve.py module:object``.

The object is a callable ``(pictures, prompts, metadata) -> scores`` of equally long lists, or a class that gives one
when it is called with ``device=...`` and its arguments. A picture is a Pillow image in RGB, a clip a list of them.
Scores are B numbers; NaN where there is none. ``(scores, where)`` also tells where: ``(B, h, w)``, of clips
``(B, T, h, w)``, as nested lists or as an array. Its attribute `weight_files`, if there is one, lists the files that
its weights are read from.

``GET /identity`` tells what scores: packages, hashes of code and weights. ``POST /score`` takes
``{"samples": [{"prompt": str, "metadata": {...}, "clip": bool, "frames": [base64 of PNG or WebP]}]}`` and answers
``{"scores": [number or null], "where": null or {"shape": [...], "float32": base64, little endian}, "digest": text}``:
the digest is the identity's, so that a server that was exchanged is noticed. What is wrong is told as
``{"error": text}`` with a status of 400 and above.
"""

from __future__ import annotations

import argparse
import array
import base64
import binascii
import hashlib
import hmac
import importlib
import io
import json
import math
import os
import platform
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata as packages
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from PIL import Image

PROTOCOL = 1
MOST_BYTES = 2**29
MOST_PIXELS = 2**26

Score = Callable[[List[Any], List[str], List[Dict[str, Any]]], Any]


class Refused(Exception):
    """A request that is answered with a status of 400 and above."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def installed() -> dict[str, str]:
    """Versions of Python and of all installed distributions, by name."""
    found = {"python": platform.python_version()}
    for distribution in packages.distributions():
        name = distribution.metadata["Name"]
        # The first one on the path is the one that is imported.
        if name:
            found.setdefault(name.lower().replace("_", "-"), distribution.version)
    return dict(sorted(found.items()))


def file_hashes(paths: list[Any]) -> dict[str, str]:
    """Hex SHA-256 by name, of files and of what folders hold."""
    found: dict[str, str] = {}
    for path in map(Path, paths):
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            name = file.name if file == path else file.relative_to(path).as_posix()
            hasher = hashlib.sha256()
            with file.open("rb") as stream:
                for block in iter(lambda: stream.read(2**20), b""):
                    hasher.update(block)
            while name in found:
                name += "'"
            found[name] = hasher.hexdigest()
    return found


def loaded(path: str, arguments: dict[str, Any], device: str) -> tuple[Score, dict[str, Any]]:
    """The reward that an import path names, and what tells it from another one."""
    module_name, _, name = path.partition(":")
    module = importlib.import_module(module_name)
    found: Any = getattr(module, name)
    if isinstance(found, type):
        found = found(device=device, **arguments)
    elif arguments:
        raise TypeError(f"{path} is no class and takes no arguments: {', '.join(arguments)}")
    if not callable(found):
        raise TypeError(f"{path} is not callable")
    sources = [__file__] + ([module.__file__] if getattr(module, "__file__", None) else [])
    return found, {
        "reward": path,
        "arguments": arguments,
        "packages": installed(),
        "code": file_hashes(sources),
        "weights": file_hashes(list(getattr(found, "weight_files", []))),
    }


def answer(score: Score, request: Any) -> dict[str, Any]:
    """The answer to what was posted."""
    samples = request.get("samples") if isinstance(request, dict) else None
    if not isinstance(samples, list) or not samples:
        raise Refused(400, "expected {'samples': [...]}, one sample or more")
    pictures, prompts, rows = [], [], []
    for sample in samples:
        try:
            frames = [_picture(text) for text in sample["frames"]]
            prompt, row, clip = sample["prompt"], sample["metadata"], sample["clip"]
        except (KeyError, TypeError) as error:
            raise Refused(400, f"a sample is not as it should be ({error!r})") from error
        if not (isinstance(prompt, str) and isinstance(row, dict) and frames and (clip or len(frames) == 1)):
            raise Refused(400, "a sample has a text, a mapping and frames, one of a picture")
        pictures.append(frames if clip else frames[0])
        prompts.append(prompt)
        rows.append(row)
    found = score(pictures, prompts, rows)
    values, where = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    scores = [float(value) for value in _listed(values)]
    if len(scores) != len(samples):
        raise ValueError(f"expected {len(samples)} scores, got {len(scores)}")
    return {
        "scores": [value if math.isfinite(value) else None for value in scores],
        "where": None if where is None else packed(where),
    }


def packed(where: Any) -> dict[str, Any]:
    """Maps as they travel."""
    values, shape = _listed(where), []
    while values and isinstance(values[0], list):
        shape.append(len(values))
        if any(not isinstance(part, list) or len(part) != len(values[0]) for part in values):
            raise ValueError("where: its parts are not of one size")
        values = [value for part in values for value in part]
    if not shape or not values:
        raise ValueError("where: expected (B, h, w), or (B, T, h, w) of clips")
    sides = [outer // inner for inner, outer in zip(shape, [*shape[1:], len(values)])]
    flat = array.array("f", [float(value) for value in values])
    if sys.byteorder != "little":
        flat.byteswap()
    return {"shape": [shape[0], *sides], "float32": base64.b64encode(flat.tobytes()).decode()}


def _listed(values: Any) -> list[Any]:
    # Arrays and tensors, on any device.
    values = values.tolist() if hasattr(values, "tolist") else values
    return [_listed(value) if hasattr(value, "__len__") else value for value in values]


def _picture(text: Any) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG", "WEBP"))
        if image.width * image.height > MOST_PIXELS:
            raise Refused(400, f"a picture of {image.width} x {image.height} pixels is too large")
        image.load()
        return image.convert("RGB")
    except (binascii.Error, OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise Refused(400, f"a frame is no PNG or WebP ({type(error).__name__})") from error


class Server(ThreadingHTTPServer):
    """One reward; requests are read side by side and scored one after another."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], score: Score, identity: dict[str, Any], token: str | None) -> None:
        super().__init__(address, _Handler)
        self.score, self.token = score, token
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.identity = {"protocol": PROTOCOL, "digest": digest, **identity}
        self.turn = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up is told of by its own end."""


class _Handler(BaseHTTPRequestHandler):
    # Of each read: who sends nothing is let go of.
    timeout = 60
    server: Server

    def do_GET(self) -> None:
        self._answered("/identity", lambda: self.server.identity)

    def do_POST(self) -> None:
        self._answered("/score", self._scored)

    def _scored(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            raise Refused(411, "a request says how long it is")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"a request has at most {MOST_BYTES} bytes; lower batch")
        try:
            request = json.loads(self.rfile.read(int(length)).decode())
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"is no JSON ({type(error).__name__})") from error
        with self.server.turn:
            return {**answer(self.server.score, request), "digest": self.server.identity.get("digest")}

    def _answered(self, path: str, answered: Callable[[], dict[str, Any]]) -> None:
        try:
            given = self.headers.get("Authorization", "")
            token = self.server.token
            if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                raise Refused(401, "the token is not the one that this server was started with")
            if not self.path.endswith(path):
                raise Refused(404, f"there is {path} here")
            status, found = 200, answered()
        except Refused as refused:
            status, found = refused.status, {"error": str(refused)}
        # A thread that ends answers nothing.
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            status, found = 500, {"error": f"{type(error).__name__}: {error}"}
        body = json.dumps(found, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing a request."""


def serve(server: Server, ready: Callable[[int], None], *, with_parent: bool) -> None:
    """Answer until the process is ended.

    Args:
        server: bound to its address.
        ready: called with the port.
        with_parent: end when standard input does, which a parent holds open while it lives.
    """
    if with_parent:

        def watch() -> None:
            while os.read(0, 4096):
                pass
            os._exit(0)

        threading.Thread(target=watch, daemon=True).start()
    ready(server.server_address[1])
    server.serve_forever()


def own_output() -> Callable[[int], None]:
    """Send all that is printed from now on to standard error; what is given back tells the port on standard output."""
    sys.stdout.flush()
    told = os.dup(1)
    os.dup2(2, 1)

    def ready(port: int) -> None:
        os.write(told, (json.dumps({"port": port}) + "\n").encode())

    return ready


def token_of(variable: str | None, host: str) -> str | None:
    """The token that an environment variable holds.

    Raises:
        ValueError: it holds none, or others could ask without one.
    """
    token = os.environ.get(variable) if variable else None
    if variable and not token:
        raise ValueError(f"the environment has no {variable}; put the token there")
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(f"--host {host}: others can reach it; put a token into a variable and name that, --token-env")
    return token


def main(arguments: Optional[List[str]] = None) -> None:
    """Load what is named, and answer."""
    parser = argparse.ArgumentParser(description="Serve a reward over HTTP.")
    parser.add_argument("reward", help="import path module:object")
    parser.add_argument("--arguments", type=json.loads, default={}, help="of a class, as JSON")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: a free one, told on standard output")
    parser.add_argument("--token-env", help="environment variable that holds the token")
    parser.add_argument("--with-parent", action="store_true", help="end when standard input does")
    given = parser.parse_args(arguments)
    ready = own_output()
    try:
        token = token_of(given.token_env, given.host)
        score, identity = loaded(given.reward, given.arguments, given.device)
    # Status 0 is for a server that was told to end.
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        sys.exit(f"error: {given.reward}: {type(error).__name__}: {error}")
    serve(Server((given.host, given.port), score, identity, token), ready, with_parent=given.with_parent)


if __name__ == "__main__":
    main()
