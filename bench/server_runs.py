"""Runs a trace through the server of `polarjax serve`: clients with one request at a time, in a process of their own.

As a program (`python3 -m bench.server_runs URL …`) it is those clients.
"""

import argparse
import http.client
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import polarjax as pj
from bench.trace import Wish, make_trace
from polarjax.serving import server
from polarjax.serving.service import Limits, Service
from polarjax.text.tokenizer import Tokenizer

CLIENTS = 64
PATIENCE = 600  # seconds that a client waits for the next bytes


class Answers(NamedTuple):
    """What the clients got.

    Attributes:
      seconds: from the first request to the end of the last answer.
      tokens: new tokens of each request, by its place in the trace, as the server counts them; 0 if it failed.
      first: seconds from each request to its first text.
      errors: what went wrong, one line each.
    """

    seconds: float
    tokens: list[int]
    first: list[float]
    errors: list[str]


def run(
    bundle: pj.Bundle, engine: pj.Engine, trace: Sequence[Wish], *, scale: float, clients: int = CLIENTS
) -> Answers:
    """The trace through a server of this engine, which it closes at the end.

    Args:
      bundle: the engine's, without a tokenizer; it gets one that makes texts of any ids.
      engine: warm, and iterated by nobody.
      trace: as `make_trace` made it.
      scale: of that trace.
      clients: that ask at the same time.
    """
    size = bundle.model.config.vocab_size
    with tempfile.TemporaryDirectory() as folder, server.listen_on("127.0.0.1", 0) as listening:
        given = pj.Bundle(bundle.model, tokenizer=word_tokenizer(Path(folder), size))
        service = Service(given, engine, name="bench", limits=Limits())
        command = [sys.executable, "-m", "bench.server_runs", server.address_of(listening)]
        command += [f"--vocab={size}", f"--requests={len(trace)}", f"--scale={scale}", f"--clients={clients}"]
        found: queue.Queue[str] = queue.Queue()

        def ask() -> None:
            try:
                found.put(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout)
            finally:
                service.stopping = True

        asking = threading.Thread(target=ask)
        server.run(service, listening, api_key=None, ready=asking.start)
        asking.join()
        return Answers(**json.loads(found.get_nowait()))


def word_tokenizer(folder: Path, size: int) -> Tokenizer:
    """A tokenizer of `size` words and no special tokens, so that nothing but its length ends a random text."""
    import tokenizers

    words = {f"w{i}": i for i in range(size)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.load(folder)


def ask_all(url: str, trace: Sequence[Wish], clients: int) -> Answers:
    """All requests of a trace, by so many clients, each of which takes the next one when it has its answer."""
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in range(len(trace)):
        left.put(i)
    tokens, first, errors = [0] * len(trace), [0.0] * len(trace), []

    def client() -> None:
        while True:
            try:
                i = left.get_nowait()
            except queue.Empty:
                return
            try:
                tokens[i], first[i] = ask_one(url, trace[i])
            except Exception as error:  # whatever it is, the other requests go on
                errors.append(f"request {i}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return Answers(time.perf_counter() - started, tokens, first, errors)


def ask_one(url: str, wish: Wish) -> tuple[int, float]:
    """Streams one completion: its number of tokens, and the seconds until its first text."""
    body = {
        "prompt": wish.prompt.tolist(),
        "max_tokens": wish.new,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    first, count, started = 0.0, 0, time.perf_counter()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {answer.read()[:300]!r}")
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise RuntimeError(str(event["error"])[:300])
            first = first or time.perf_counter() - started
            count = (event.get("usage") or {}).get("completion_tokens", count)
    finally:
        connection.close()
    return count, first


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    for name, kind in (("vocab", int), ("requests", int), ("scale", float), ("clients", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    args = parser.parse_args()
    trace = make_trace(args.vocab, requests=args.requests, scale=args.scale)
    print(json.dumps(ask_all(args.url, trace, args.clients)._asdict()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
