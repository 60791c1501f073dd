"""The routes of the server.

In: requests. Out: verdicts, or refusals in OpenAI's shape. Bodies are read and checked by this package alone: FastAPI's own
checks would repeat the input in their errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from qlora_moderation.serving.answers import add_openai_names, build_answer
from qlora_moderation.serving.faults import RequestError, describe_place
from qlora_moderation.serving.page import SAFE_HEADERS, load_page
from qlora_moderation.serving.requests import read_pairs
from qlora_moderation.serving.schema import build_schema
from qlora_moderation.serving.service import Service

T = TypeVar("T")
_log = logging.getLogger("qlora_moderation.serving")
_ROUTES = ("/", "/v1/moderations", "/v1/models", "/healthz", "/readyz", "/metrics", "/openapi.json")
_GONE = 499  # nobody reads it; it stands in log and metrics for a client that went before its answer


def build_app(service: Service) -> FastAPI:
    """Return the application around a service."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    # the documentation pages of FastAPI load scripts from elsewhere, and a redirect would repeat the query; its schema would
    # say nothing of bodies, which it does not read here
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    page, page_headers = load_page()
    schema = build_schema(service.config)

    @app.api_route("/", methods=["GET", "HEAD"])
    async def show_page() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=page_headers)

    @app.api_route("/healthz", methods=["GET", "HEAD"])
    async def tell_health() -> Response:
        return _state(service.is_alive, "ok", "the model fails on every text; start the server again")

    @app.api_route("/readyz", methods=["GET", "HEAD"])
    async def tell_readiness() -> Response:
        return _state(service.state == "ready" and service.is_alive, "ready", service.state)

    @app.get("/openapi.json")
    async def show_schema() -> Response:
        return _json(schema)

    @app.get("/metrics")
    async def show_metrics(request: Request) -> Response:
        if service.config.metrics_need_key:
            service.check_key(request.headers.get("authorization"))
        return Response(
            service.instruments.render(),
            headers={**SAFE_HEADERS, "content-type": service.instruments.content_type},
        )

    @app.get("/v1/models")
    async def list_models(request: Request) -> Response:
        service.check_key(request.headers.get("authorization"))
        return _json({"object": "list", "data": [service.describe_model()]})

    @app.get("/v1/models/{name:path}")
    async def show_model(request: Request, name: str) -> Response:
        service.check_key(request.headers.get("authorization"))
        if name != service.config.model_name:
            raise RequestError(404, "model_not_found", f"there is one model here, {service.config.model_name}")
        return _json(service.describe_model())

    @app.post("/v1/moderations")
    async def moderate(request: Request) -> Response:
        with service.let_in(request.headers.get("authorization")) as engine:
            async with service.bodies.read(request) as body:
                pairs = read_pairs(body, service.config)
            asked = service.batcher.score([pair.question for pair in pairs], [pair.answer for pair in pairs])
            scores = await _unless_gone(request, asked, service.config.request_timeout)
            name, rule = service.config.model_name, service.rule
            answer = build_answer(name, engine.names, rule, pairs, scores, service.instruments)
            if request.headers.get("x-stainless-lang") == "python":
                add_openai_names(answer)
        request.scope["moderation.pairs"] = len(pairs)
        return _json(answer)

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        service.instruments.refused.labels(error.code).inc()
        return _json(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def refuse_route(_: Request, error: HTTPException) -> Response:
        known = {
            404: ("not_found", "there is no such route"),
            405: ("method_not_allowed", "this route has other methods"),
        }
        code, message = known.get(error.status_code, ("invalid_request", "the request cannot be read"))
        found = RequestError(error.status_code, code, message)
        service.instruments.refused.labels(code).inc()
        return _json(found.body, found.status, dict(error.headers or {}))

    app.add_middleware(Guard, service=service)
    return app


class Guard:
    """The outermost layer: times, counts and logs every request, and ends every error that nothing else has caught.

    An error's message may quote the text that it failed on, so neither the answer nor the log holds it.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note)
        except ClientDisconnect:
            self.service.instruments.disconnects.inc()
            status = status or _GONE
        except Exception as error:
            _log.error("%s in %s", type(error).__name__, describe_place(error))
            if not status:
                found = RequestError(500, "server_error", "the server failed on this request; its log says where")
                await _json(found.body, found.status)(scope, receive, note)
        except asyncio.CancelledError:  # the server ends and waits for nobody any more
            if not status:
                found = RequestError(503, "stopped", "the server was stopped", retry_after=1)
                with contextlib.suppress(OSError, RuntimeError):  # the connection may have gone, too
                    await _json(found.body, found.status)(scope, receive, note)
        finally:
            self._count(scope, status or _GONE, time.perf_counter() - started)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        route = path if path in _ROUTES else "/v1/models/{name}" if path.startswith("/v1/models/") else "other"
        instruments = self.service.instruments
        instruments.requests.labels(route, str(status)).inc()
        instruments.seconds.labels(route).observe(seconds)
        if self.service.config.log_requests and route not in ("/healthz", "/readyz", "/metrics"):
            # the route, never the path or the query: these are the client's
            _log.info("%s %d %.1f ms %d pairs", route, status, 1000 * seconds, scope.get("moderation.pairs", 0))


async def _unless_gone(request: Request, asked: Awaitable[T], seconds: float) -> T:
    """Wait for an answer as long as its client does.

    Raises:
        ClientDisconnect: the client has gone; the work is given up.
        RequestError: 503, it took too long.
    """
    work = asyncio.ensure_future(asked)
    leaving = asyncio.ensure_future(_wait_for_leaving(request))
    try:
        await asyncio.wait((work, leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if leaving.done():
            raise ClientDisconnect
        raise RequestError(503, "timeout", f"no answer within {seconds:g} s; send less, or come again", retry_after=1)
    finally:
        for task in (work, leaving):
            task.cancel()
        await asyncio.gather(work, leaving, return_exceptions=True)


async def _wait_for_leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _state(good: bool, word: str, trouble: str) -> Response:
    return _json({"status": word if good else trouble}, 200 if good else 503)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # a number that is not finite would be no JSON: better an error than a verdict nobody can read
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text, status, {**SAFE_HEADERS, **(headers or {})}, "application/json")
