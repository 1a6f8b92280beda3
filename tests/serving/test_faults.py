"""Bad requests, limits, clients that leave, an engine that fails: one line for whoever is concerned, and only them."""

import asyncio
import contextlib
import http.client
import json
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import openai
import pytest

import polarjax as pj
from polarjax.serving import app, body, service
from tests.model import zoo
from tests.serving.server import NAME, Server, bundle, serving

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(waiting=60, body=10_000, prompt=40) as made:
        yield made
        assert (made.engine.in_use, made.engine.waiting, made.service.active) == (0, 0, 0)


@pytest.fixture
def gate(server, monkeypatch) -> Iterator[threading.Event]:
    """The engine does nothing before it is set."""
    event, turn = threading.Event(), server.engine._turn
    monkeypatch.setattr(server.engine, "_turn", lambda: event.wait(60) and turn())
    yield event
    event.set()


def until(reached) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content} | more]}


COMPLETIONS = {
    "fault 20, an id beyond the vocabulary": ({"prompt": [1, 4096]}, "prompt", "outside the vocabulary; got 4096"),
    "fault 20, a negative id": ({"prompt": [[1], [1, -1]]}, "prompt", "outside the vocabulary; got -1"),
    "fault 20, an id beyond int32": ({"prompt": [2**40]}, "prompt", "outside the vocabulary"),
    "fault 21, a long prompt": ({"prompt": [5] * 41}, "prompt", "41 tokens and 4 new ones are too many; at most 40"),
    "fault 21, many new tokens": ({"max_tokens": 63}, "max_tokens", "and 65 together with the new ones"),
    "fault 22, no prompt": ({"prompt": []}, "prompt", "expected a text, token ids, or a list.*at least one"),
    "fault 22, no tokens": ({"prompt": [[]]}, "prompt", "not a prompt"),
    "fault 22, null": ({"prompt": None}, "prompt", "prompt is missing"),
    "fault 23, a negative temperature": ({"temperature": -0.1}, "temperature", "got -0.1, expected at least 0$"),
    "fault 23, an infinite temperature": ({"temperature": 1e999}, None, "the JSON of the body: not JSON; got Infinity"),
    "fault 23, top_p above 1": ({"top_p": 1.5}, "top_p", "out of range; got 1.5"),
    "fault 23, top_p 0": ({"top_p": 0}, "top_p", "out of range; got 0"),
    "fault 23, a negative top_k": ({"top_k": -1}, "top_k", "out of range; got -1"),
    "fault 23, no penalty": ({"repetition_penalty": 0}, "repetition_penalty", "not usable"),
    "fault 23, an empty stop string": ({"stop": ["a", ""]}, "stop", "unusable stop strings"),
    "fault 23, many stop strings": ({"stop": ["a"] * 17}, "stop", "at most 16 texts of at most 256"),
    "fault 23, a long stop string": ({"stop": "a" * 257}, "stop", "at most 16 texts of at most 256"),
    "fault 23, a negative stop id": ({"stop_token_ids": [-1]}, "stop_token_ids", "not a token id; got -1"),
    "fault 23, many stop ids": ({"stop_token_ids": [7] * 17}, None, "too many stop ids"),
    "no new tokens": ({"max_tokens": 0}, "max_tokens", "nothing to generate"),
    "no sequences": ({"n": 0}, "n", "no sequences"),
    "more sequences than fit": ({"n": 65}, "n", "too many sequences in one request; got 65, expected at most 64"),
    "a large seed": ({"seed": 2**63}, "seed", "no such seed"),
    "many log-probabilities": ({"logprobs": 21}, "logprobs", "0 to 20"),
    "echo with log-probabilities": ({"echo": True, "logprobs": 1}, "echo", "isn't supported"),
    "another model": ({"model": "gpt"}, "model", "there is no model 'gpt'; this server has tiny"),
    "an unknown field": ({"min_p": 0.1}, "min_p", "unsupported field: 'min_p'"),
    "a field without support": ({"frequency_penalty": 0.5}, "frequency_penalty", "isn't supported; got 0.5"),
    "options without a stream": ({"stream_options": {}}, "stream_options", "needs stream: true"),
    "unknown options": ({"stream": True, "stream_options": {"x": True}}, "stream_options", "options: x"),
    "a lone surrogate": ({"prompt": "\ud800"}, "prompt", "not a text"),
}  # fmt: skip
CHATS = {
    "no messages": ({"messages": []}, "expected a list of messages, at least one"),
    "a text": ({"messages": "Hi"}, "expected a list of messages"),
    "no message": ({"messages": ["Hi"]}, r"messages\[0\]: not a message; got 'Hi'"),
    "no content": ({"messages": [{"role": "assistant", "content": None}]}, "content: got None"),
    "a picture": (user([{"type": "image_url", "image_url": {"url": "x"}}]), "content: got .*image_url"),
    "a tool's answer": ({"messages": [*MESSAGES, {"role": "tool", "content": "x"}]}, r"\[1\]: role isn't supported"),
    "calls of tools": (user("x", tool_calls=[{"id": "1"}]), "unsupported field: 'tool_calls'"),
    "a name that is no text": (user("x", name=5), "name is not a text"),
    "a lone surrogate": (user("\ud800"), "not a text"),
    "tools": ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools isn't supported"),
    "JSON": ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format isn't supported"),
    "two limits": ({"messages": MESSAGES, "max_completion_tokens": 5}, "contradict each other"),
    "likeliest tokens alone": ({"messages": MESSAGES, "top_logprobs": 2}, "needs logprobs: true"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*COMPLETIONS, *(f"chat: {each}" for each in CHATS)])
def test_bad_requests_are_refused_in_one_line(server, case):
    if case in COMPLETIONS:
        given, param, pattern = COMPLETIONS[case]
        answer = server.complete(**given)
    else:
        given, pattern = CHATS[case.removeprefix("chat: ")]
        answer = server.send("/v1/chat/completions", {"max_tokens": 4} | given)
        param = answer.error["param"]
    assert answer.status == (404 if given.get("model") else 400)
    assert answer.error["param"] == param and answer.error["type"] == "invalid_request_error"
    assert re.search(pattern, answer.error["message"]), answer.error
    if case.startswith("fault 21"):
        assert answer.error["code"] == "context_length_exceeded"


VALUES = (
    "null true 0 -1 2 1.5 1e999 1"
    + "0" * 400
    + ' "x" "" "\\ud800" [] [1] [true] ["a"] [[1],["a"]] {} {"a":1}'
).split()


def test_no_value_of_any_field_breaks_the_server(server):
    """Each is used or refused by name; all over one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    usual = {"completions": {"prompt": '"a"'}, "chat/completions": {"messages": json.dumps(MESSAGES)}}
    fields = {"completions": [*body.COMPLETIONS, *body.WITHOUT_EFFECT, *body.IGNORED, "\ud800"]}
    fields["chat/completions"] = [each for each in body.CHAT if each not in body.COMMON]
    for path, rest in usual.items():
        for field in fields[path]:
            for value in VALUES:
                given = (
                    rest | ({} if field == "max_completion_tokens" else {"max_tokens": "1"}) | {field: value}
                )
                text = ",".join(f"{json.dumps(name)}:{each}" for name, each in given.items())
                connection.request("POST", f"/v1/{path}", f"{{{text}}}", {"Content-Type": "application/json"})
                response = connection.getresponse()
                data = json.loads(response.read()) if response.status != 200 else response.read()
                if response.status != 200:
                    assert response.status in ({400, 404} if field == "model" else {400}), (
                        field,
                        value,
                        data,
                    )
                    assert data["error"]["param"] in (field, "max_tokens", None), (field, value, data)
    connection.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b"[" * 5000,
        b'{"n": NaN}',
        b'{"n": 1, "n": 2}',
        b"1" * 5000,
    ],
)
def test_bodies_that_are_no_object_are_refused(server, raw):
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = server.send(path, raw)
        assert answer.status == 400 and "JSON" in answer.error["message"]


def test_bodies_have_a_type_and_a_limit(server):
    """The limit holds with and without a length, whatever the header says."""
    form = server.send("/v1/completions", b"{}", Content_Type="application/x-www-form-urlencoded")
    assert form.status == 415 and "must be application/json" in form.error["message"]
    large = json.dumps({"prompt": "a" * 20_000}).encode()
    assert server.send("/v1/completions", large).status == 413
    chunks = f"{len(large):x}\r\n".encode() + large + b"\r\n0\r\n\r\n"
    with raw_request(server, chunks, "Transfer-Encoding: chunked") as connection:
        assert b" 413 " in connection.recv(1000)
    with raw_request(server, b"", "Content-Length: 99999999999999999999") as connection:
        assert b" 413 " in connection.recv(1000)
    assert server.complete().status == 200


def test_texts_that_cannot_fit_are_not_tokenized(server, monkeypatch):
    """Tokenizing megabytes takes seconds; of many texts, none after the first that is too long."""
    monkeypatch.setattr(service, "prompt_ids", lambda text, _: np.arange(len(text)))
    monkeypatch.setattr(server.service, "_characters", 60)
    chat = server.send("/v1/chat/completions", {"messages": user("a" * 24, name="bob")["messages"] * 2})
    for answer, got in ((server.complete(prompt="a" * 61), 61), (chat, 62)):
        assert answer.status == 400 and answer.error["code"] == "context_length_exceeded"
        assert f"{got} characters are too many; at most 60" in answer.error["message"]
    assert "50 tokens" in server.complete(prompt=["a" * 50, "a" * 61]).error["message"]


def test_a_body_that_never_comes_times_out(server, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.1)
    with raw_request(server, b'{"prompt"', "Content-Length: 99") as connection:
        assert b" 408 " in connection.recv(1000)
    with raw_request(server, b'{"prompt"', "Content-Length: 99"):
        pass  # leaves instead
    until(lambda: 'path="/v1/completions",status="499"' in server.send("/metrics").body.decode())


def test_unknown_paths_and_methods_get_openais_errors(server):
    assert server.send("/v1/embeddings", {}).error["message"] == "Not Found"
    assert server.send("/v1/completions").status == 405
    assert server.send("/health", {}).status == 405


def test_requests_beyond_the_queue_are_sent_away(server, gate):
    """429 with a time to wait, while those that came before are served; places are free again after them."""
    with ThreadPoolExecutor(17) as pool:
        taken = [pool.submit(server.complete, n=4, temperature=1) for _ in range(16)]
        until(lambda: server.service.active == 16)
        refused = server.complete()
        assert refused.status == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.error["code"] == "rate_limit_exceeded"
        assert server.metric("polarjax_sequences_waiting") >= 60
        client = openai.OpenAI(base_url=server.url, api_key="any")  # it tries again by itself
        later = pool.submit(client.completions.create, model=NAME, prompt="a", max_tokens=1)
        until(lambda: server.metric('polarjax_responses_total{path="/v1/completions",status="429"}') >= 2)
        gate.set()
        assert {each.result().status for each in taken} == {200}
        assert later.result().choices[0].finish_reason == "length"
        client.close()


@contextlib.contextmanager
def raw_request(server: Server, data: bytes, *headers: str) -> Iterator[socket.socket]:
    """A connection on which a request was sent as it is."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        head = [
            "POST /v1/completions HTTP/1.1",
            "Host: x",
            "Content-Type: application/json",
            *headers,
            "",
            "",
        ]
        connection.sendall("\r\n".join(head).encode() + data)
        yield connection


def leave(server: Server, after: int, **given: Any) -> None:
    """Sends a request and closes the connection after so many bytes of the answer."""
    data = json.dumps({"prompt": "def f", "max_tokens": 50} | given).encode()
    with raw_request(server, data, f"Content-Length: {len(data)}") as connection:
        while after > 0:
            after -= len(connection.recv(after)) or after


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_free_their_slots(server, gate, stream):
    """While they wait for a slot or for the first token, and in the middle of a stream."""
    cancelled = lambda: server.metric('polarjax_sequences_total{finished="cancelled"}')
    left = lambda: server.metric('polarjax_responses_total{path="/v1/completions",status="499"}')
    before = cancelled(), left()
    threads = [
        threading.Thread(target=leave, args=(server, 0), kwargs={"stream": stream, "n": 3}) for _ in range(5)
    ]
    for each in threads:
        each.start()
    until(lambda: left() == before[1] + 5)
    gate.set()
    until(lambda: cancelled() == before[0] + 15)
    if stream:
        leave(server, 300, stream=True, n=4)
        until(
            lambda: (
                cancelled() + server.metric('polarjax_sequences_total{finished="length"}') > before[0] + 15
            )
        )
    until(lambda: server.engine.in_use == server.engine.waiting == server.service.active == 0)
    assert server.complete().status == 200


def test_64_clients_of_which_many_leave(server):
    """Those that stay get their tokens; no slot and no place in the queue is lost."""
    expected = server.complete(max_tokens=12).json["choices"][0]["text"]
    draw = random.Random(0)

    async def ask(stream: bool, most: int | None) -> str | None:
        """The text; None if the client leaves after `most` bytes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        data = json.dumps({"prompt": "def f", "max_tokens": 12, "stream": stream}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: {app.JSON}\r\nConnection: close\r\n"
        )
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        got = await (reader.read() if most is None else reader.readexactly(most))
        writer.close()
        if most is not None:
            return None
        bodies = re.findall(rb"^(?:data: )?({.*})$", got, re.MULTILINE)
        return "".join(json.loads(each)["choices"][0]["text"] for each in bodies)

    async def everybody() -> list[str | None]:
        plan = [(i % 2 == 0, draw.choice((None, 0, 50, 250))) for i in range(64)]
        return await asyncio.gather(*(ask(*each) for each in plan))

    texts = asyncio.run(everybody())
    assert set(texts) == {None, expected} and 10 < texts.count(expected) < 40
    until(lambda: server.engine.in_use == server.engine.waiting == server.service.active == 0)


def test_a_client_that_stops_reading_counts_as_gone(server, monkeypatch):
    """Its sequences are cancelled, and it doesn't keep a server from stopping."""
    monkeypatch.setattr(app, "STALLED_SECONDS", 0.05)
    sent = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    async def talk() -> None:
        data = json.dumps({"prompt": "a", "max_tokens": 60, "stream": True}).encode()
        messages = [{"type": "http.request", "body": data}]
        receive = lambda: asyncio.sleep(0 if messages else 60, messages and messages.pop())
        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": headers,
            "query_string": b"",
        }
        await app.make_app(server.service)(scope, receive, send)

    asyncio.run(talk())
    assert [each["type"] for each in sent] == ["http.response.start", "http.response.body"]
    until(lambda: server.engine.in_use == server.service.active == 0)


def test_keys_are_checked():
    """Below /v1; a wrong one is refused before the body is read."""
    with serving(api_key="s3cret") as server:
        for given in (
            {},
            {"Authorization": "Bearer "},
            {"Authorization": "Bearer s3cre"},
            {"Authorization": "s3cret"},
        ):
            for path in ("/v1/completions", "/v1/chat/completions"):
                answer = server.send(path, b"{", **given)
                assert answer.status == 401 and answer.error["code"] == "invalid_api_key"
            assert server.send("/v1/models", **given).status == 401
        with raw_request(server, b"{}", "Authorization: Bearer \xe9") as connection:
            assert b" 401 " in connection.recv(1000)
        assert server.send("/v1/models", Authorization="bearer s3cret").status == 200
        assert server.send("/health").status == server.send("/metrics").status == 200
        with openai.OpenAI(base_url=server.url, api_key="s3cret") as client:
            assert (
                client.completions.create(model=NAME, prompt="a", max_tokens=1).usage.completion_tokens == 1
            )
        with (
            openai.OpenAI(base_url=server.url, api_key="wrong") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_nan_fails_its_own_request(server):
    """A 500, or an error as the last event of a stream that has begun; others don't notice."""
    with serving(pj.Bundle(with_nan_from(30), bundle().tokenizer)) as broken:
        with ThreadPoolExecutor(3) as pool:
            bad = pool.submit(broken.complete, prompt=[[5], [5] * 40])
            streamed = pool.submit(broken.complete, prompt=[5] * 20, stream=True, max_tokens=30)
            good = pool.submit(broken.complete)
        assert bad.result().status == 500 and "NaN" in bad.result().error["message"]
        *begun, error, done, _ = streamed.result().body.decode().split("\n\n")
        assert begun and "NaN" in error and done == "data: [DONE]"
        assert good.result().json["choices"] == server.complete().json["choices"]
        assert broken.send("/health").status == 200
        assert broken.metric('polarjax_sequences_total{finished="failed"}') == 2


def with_nan_from(position: int) -> pj.Decoder:
    """The model, which computes NaN once a sequence is so long."""
    model = zoo.with_rows(bundle().model, "embed.positions", 2 + position, np.nan)
    return jax.device_put(model, jax.devices()[0])


@pytest.mark.parametrize("begun", [False, True])
def test_an_engine_that_fails_answers_everybody(begun, monkeypatch, capfd):
    """One line with 500, also at the end of streams; the server is unhealthy, and refuses what comes later."""
    with serving() as server:
        turn, gate = server.engine._turn, threading.Event()

        def fail() -> None:
            if not begun or server.service.metrics.generated_tokens > 20:
                assert gate.wait(60)
                raise RuntimeError("RESOURCE_EXHAUSTED: no memory\nat all")
            turn()

        monkeypatch.setattr(server.engine, "_turn", fail)
        with ThreadPoolExecutor(6) as pool:
            waiting = [
                pool.submit(server.complete, max_tokens=50, stream=begun or i % 2 == 1) for i in range(6)
            ]
            until(lambda: server.service.active == 6)
            gate.set()
        answers = [each.result() for each in waiting]
        line = "the engine has failed: 4 sequences of up to 64 positions: the device ran out of memory"
        for answer in answers:
            if answer.status == 200:  # its stream had begun
                *_, error, done, rest = answer.body.decode().split("\n\n")
                assert (done, rest) == ("data: [DONE]", "") and begun
                found = json.loads(error.removeprefix("data: "))["error"]
            else:
                assert answer.status == 500
                found = answer.error
            assert found["message"].startswith(line) and found["type"] == "server_error"
        assert begun == any(answer.status == 200 for answer in answers)
        health = server.send("/health")
        assert health.status == 503 and health.json["error"].startswith(line)
        late = server.complete()
        assert late.status == 503 and late.error["message"].startswith(line)
        assert server.metric("polarjax_up") == 0 and server.service.active == 0
    assert "RESOURCE_EXHAUSTED" in capfd.readouterr().err


def test_a_server_that_stops_finishes_what_it_took(monkeypatch, capfd):
    """New requests get 503 meanwhile, and one whose body never comes gets it in the end."""
    monkeypatch.setattr("polarjax.serving.server.CLOSING_SECONDS", 0.1)
    with serving() as server, raw_request(server, b"{", "Content-Length: 99") as late:
        gate, turn = threading.Event(), server.engine._turn
        monkeypatch.setattr(server.engine, "_turn", lambda: gate.wait(60) and turn())
        with ThreadPoolExecutor(8) as pool:
            taken = [pool.submit(server.complete, max_tokens=30, stream=i % 2 == 1) for i in range(6)]
            until(lambda: server.service.active == 6)
            server.service.stopping = True
            refused = server.complete()
            assert refused.status == 503 and "stopping" in refused.error["message"]
            assert server.send("/health").json == {"status": "stopping"}
            gate.set()
        assert {each.result().status for each in taken} == {200}
        assert all(each.result().body.endswith(b"data: [DONE]\n\n") for each in taken[1::2])
        until(lambda: server.engine.closed)
        with pytest.raises(ConnectionRefusedError):
            server.complete()
        assert b" 503 " in late.recv(1000)
    assert "Traceback" not in capfd.readouterr().err
