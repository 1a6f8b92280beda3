"""The HTTP interface of a service."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from polarjax.serving.errors import ApiError, ClientLeftError
from polarjax.serving.replies import dumps
from polarjax.serving.service import Job, Service

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

BODY_SECONDS = 60
"""In which a body must arrive."""

STALLED_SECONDS = 60
"""After which a client that doesn't read its stream counts as gone."""

LEFT = 499
"""The status that is counted where the client left."""

JSON = "application/json"

type Answer = Response | EventStream
type Handler = Callable[[Request], Awaitable[Answer]]


def make_app(service: Service, api_key: str | None = None) -> "Starlette":
    """The ASGI application of a service.

    Args:
      service: started by the caller.
      api_key: what clients must send as `Authorization: Bearer KEY` to all paths below /v1; None lets everybody in.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    handlers = Handlers(service)
    open_to_all = [("/health", handlers.health), ("/metrics", handlers.metrics)]
    routes = [Route(path, handler) for path, handler in open_to_all]
    for path, handler, method in (
        ("/v1/completions", handlers.completions, "POST"),
        ("/v1/chat/completions", handlers.chat, "POST"),
        ("/v1/models", handlers.models, "GET"),
        ("/v1/models/{model:path}", handlers.model, "GET"),
    ):
        routes.append(Route(path, _guarded(path, handler, service, api_key), methods=[method]))

    async def refused(_: "Request", error: Exception) -> "Response":
        assert isinstance(error, HTTPException)
        return _failed(ApiError(f"{error.detail}", status=error.status_code, headers=error.headers))

    async def broken(_: "Request", error: Exception) -> "Response":
        return _failed(ApiError(f"the server has a fault: {type(error).__name__}", status=500))

    return Starlette(routes=routes, exception_handlers={HTTPException: refused, Exception: broken})


class Handlers:
    """What answers on each path."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def completions(self, request: "Request") -> "Answer":
        """Continues prompts."""
        return await self._complete(request, chat=False)

    async def chat(self, request: "Request") -> "Answer":
        """Answers a conversation."""
        return await self._complete(request, chat=True)

    async def models(self, _: "Request") -> "Answer":
        """The one model in a list."""
        return _json({"object": "list", "data": [self._service.model.described]})

    async def model(self, request: "Request") -> "Answer":
        """The model, by its name."""
        name, model = request.path_params["model"], self._service.model
        if name != model.name:
            raise ApiError(f"there is no model {name!r}", status=404, param="model", code="model_not_found")
        return _json(model.described)

    async def health(self, _: "Request") -> "Answer":
        """Whether requests are taken."""
        failure = self._service.runner.failure
        if failure is not None:
            return _json({"status": "failed", "error": failure}, 503)
        return _json({"status": "stopping"}, 503) if self._service.stopping else _json({"status": "ok"})

    async def metrics(self, _: "Request") -> "Answer":
        """Counts and times for Prometheus."""
        from starlette.responses import PlainTextResponse

        return PlainTextResponse(self._service.metrics_text(), media_type="text/plain; version=0.0.4")

    async def _complete(self, request: "Request", *, chat: bool) -> "Answer":
        raw = await _body(request, self._service.limits.body)
        job = await self._service.admit(raw, chat=chat)
        if job.asked.stream:
            return EventStream(job)
        with contextlib.closing(job):
            await _unless_left(request.receive, _collect(job))
            return _json(job.reply.whole)


class EventStream:
    """The answer to a request as server-sent events, the last of which is [DONE]; an ASGI application.

    An error before the first token is an ordinary error response. If the client leaves or doesn't read for
    `STALLED_SECONDS`, its sequences are cancelled.

    Attributes:
      count: called with the status in the end.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.count: Callable[[int], None] = lambda _: None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends the events."""
        status = LEFT
        with contextlib.closing(self._job):
            try:
                status = await _unless_left(receive, self._send(send))
            except ApiError as error:
                status = error.status
                await _failed(error)(scope, receive, send)
            except (ClientLeftError, TimeoutError):
                pass
            finally:
                self.count(status)

    async def _send(self, send: Any) -> int:
        async with contextlib.aclosing(self._events()) as events:
            body = await anext(events)
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            status = 200
            while body is not None:
                part = {"type": "http.response.body", "body": _event(body), "more_body": True}
                async with asyncio.timeout(STALLED_SECONDS):
                    await send(part)
                try:
                    body = await anext(events, None)
                except ApiError as error:
                    status, body = error.status, error.body
            done = {"type": "http.response.body", "body": b"data: [DONE]\n\n"}
            async with asyncio.timeout(STALLED_SECONDS):
                await send(done)
            return status

    async def _events(self) -> AsyncGenerator[dict[str, Any]]:
        async for index, event in self._job.events():
            chunk = self._job.reply.add(index, event)
            if chunk is not None:
                yield chunk
        if self._job.asked.usage:
            yield self._job.reply.last


async def _collect(job: Job) -> None:
    async for index, event in job.events():
        job.reply.add(index, event)


async def _unless_left[T](receive: Any, work: Awaitable[T]) -> T:
    """What `work` returns; it is cancelled, and `ClientLeftError` raised, if the client closes its connection first."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeftError
        return working.result()
    finally:
        for each in (working, leaving):
            each.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _guarded(path: str, handler: Handler, service: Service, api_key: str | None) -> Handler:
    """The handler with a check of the key, errors in OpenAI's shape, and its responses counted."""

    async def answer(request: "Request") -> "Answer":
        try:
            _check_key(request, api_key)
            response = await handler(request)
        except ApiError as error:
            response = _failed(error)
        except ClientLeftError:
            response = _json({}, LEFT)
        except asyncio.CancelledError:  # uvicorn's, once what was taken is finished
            response = _failed(ApiError("the server is stopping", status=503))
        if isinstance(response, EventStream):
            response.count = lambda status: service.metrics.responses.update([(path, status)])
        else:
            service.metrics.responses[path, response.status_code] += 1
        return response

    return answer


def _check_key(request: "Request", api_key: str | None) -> None:
    if api_key is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    right = secrets.compare_digest(given.strip().encode("latin-1"), api_key.encode())
    if kind.lower() != "bearer" or not right:
        raise ApiError(
            "a valid API key is needed, as Authorization: Bearer KEY",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def _body(request: "Request", most: int) -> bytes:
    """The body; raises `ApiError` if it isn't JSON by its header, too large or too slow."""
    from starlette.requests import ClientDisconnect

    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:
        raise ApiError(f"the body must be {JSON}; got {kind or 'no content-type'}", status=415)
    too_large = ApiError(f"the body is too large; at most {most:,} bytes are taken", status=413)
    if int(request.headers.get("content-length", 0)) > most:
        raise too_large
    made = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                made += part
                if len(made) > most:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(f"the body didn't arrive within {BODY_SECONDS} s", status=408) from error
    except ClientDisconnect as error:
        raise ClientLeftError from error
    return bytes(made)


def _failed(error: ApiError) -> "Response":
    return _json(error.body, error.status, error.headers)


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> "Response":
    from starlette.responses import Response

    return Response(dumps(content), status, headers, media_type=JSON)


def _event(body: Any) -> bytes:
    return b"data: " + dumps(body) + b"\n\n"
