"""A server of a tiny model in this process, and requests to it without a client library."""

import contextlib
import dataclasses
import functools
import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import polarjax as pj
from polarjax.serving import server
from polarjax.serving.service import Limits, Service
from polarjax.text.tokenizer import Tokenizer
from tests.cli.homes import ASSET, TEMPLATE, random_model

NAME = "tiny"
SIZES = {"slots": 4, "capacity": 64, "read_tokens": 16}  # few programs to compile


@functools.cache
def bundle() -> pj.Bundle:
    """A random model of 64 positions with the tokenizer of a bundled one, a chat template and no stop ids."""
    tokenizer = Tokenizer.load(ASSET)
    tokenizer.hf.chat_template = TEMPLATE
    settings = dataclasses.replace(tokenizer.generation, stop_ids=())
    model = jax.device_put(random_model(np.random.default_rng(0)), jax.devices()[0])
    return pj.Bundle(model, dataclasses.replace(tokenizer, generation=settings))


class Answer(NamedTuple):
    """An HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """Its body."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error in it, in OpenAI's shape: one line."""
        error = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"} and "\n" not in error["message"]
        return error


class Server(NamedTuple):
    """A running server."""

    service: Service
    engine: pj.Engine
    port: int

    @property
    def url(self) -> str:
        """The base URL for clients."""
        return f"http://127.0.0.1:{self.port}/v1"

    def send(self, path: str, body: Any = None, *, method: str | None = None, **headers: str) -> Answer:
        """The response to a request; `body` is JSON or bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        data = body if isinstance(body, bytes | None) else json.dumps(body)
        connection.request(method or ("GET" if body is None else "POST"), path, data, given)
        response = connection.getresponse()
        made = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        connection.close()
        return made

    def complete(self, **body: Any) -> Answer:
        """The response to a completion of a few tokens."""
        return self.send("/v1/completions", {"prompt": "def f", "max_tokens": 4} | body)

    def metric(self, name: str) -> float:
        """A sample of /metrics, by its name with labels."""
        lines = self.send("/metrics").body.decode().splitlines()
        return float(next(line for line in lines if line.startswith(name + " ")).split()[-1])


@contextlib.contextmanager
def serving(model: pj.Bundle | None = None, *, api_key: str | None = None, **limits: Any) -> Iterator[Server]:
    """A server in a thread; it finishes what runs in the end."""
    model = model or bundle()
    engine = pj.Engine(model, **SIZES)
    service = Service(model, engine, name=NAME, limits=Limits(**limits))
    ready = threading.Event()
    with server.listen_on("127.0.0.1", 0) as listening:
        run = functools.partial(server.run, service, listening, api_key=api_key, ready=ready.set)
        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert ready.wait(60)
            yield Server(service, engine, listening.getsockname()[1])
        finally:
            service.stopping = True
            thread.join(60)
            assert not thread.is_alive() and engine.closed
