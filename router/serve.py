"""Serve one request: tokenise, ask the index, choose a route, try it, try another, stream the answer.

Decides when to try again: as long as no byte went to the client, the deadline has not passed and a route
without the suspected workers is left. Every attempt leaves at least one worker out of the next, so the
number of attempts is bounded by the number of workers. A request on which workers broke is tried once more
only: it may be the request that breaks them, and it must not take the whole fleet along.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from cache_service import logs
from cache_service.core.errors import Rejected, Unavailable
from cache_service.core.ids import Namespace, WorkerId
from router.admit import Gate
from router.client import Client
from router.config import RouterConfig
from router.core.admission import Outcome as Admitted
from router.core.admission import Ticket
from router.core.decision import Decision, Policy, PolicyName, Reason, Request, RequestClass
from router.core.hold import hold_reason, ignores_end, stop_strings
from router.core.join import FirstToken
from router.core.match import Match
from router.core.policy import choose
from router.decisions import DecisionLog
from router.index import PrefixIndex, lookup
from router.links import LinkTable
from router.metrics import RouterMetrics
from router.openai import (
    Api,
    ParsedRequest,
    RequestError,
    check_length,
    check_model,
    error_body,
    error_type,
    parse,
)
from router.record import Outcome, Record
from router.tokenize import TokenizerPool
from router.tune import Tuner
from router.upstream import Call, Exchange, Failure, Side, StreamBroken, Upstream
from router.workers import Booking, WorkerTable

PATHS = {Api.CHAT: "/v1/chat/completions", Api.COMPLETION: "/v1/completions", Api.GENERATE: "/generate"}
_log = logging.getLogger(__name__)
#: Workers that may break on one request before it is given up.
MAX_BROKEN = 2
#: Client headers that the workers get to see.
_FORWARDED = ("Authorization", "traceparent", "tracestate")
#: Answer tokens counted on for a request that does not say how many, and at most.
EXPECTED_OUTPUT, MAX_EXPECTED_OUTPUT = 256, 1024
#: Sessions whose last prefill worker is remembered.
MAX_SESSIONS = 65536
#: Tenant and session names are cut here.
_NAME_CHARS = 128


@dataclass(frozen=True, slots=True)
class Terms:
    """What a client says of its request in headers: x-prfaas-class, -tenant, -session."""

    request_class: RequestClass
    tenant: str
    session: str
    output_tokens: int


def _terms(http: web.Request, body: Mapping[str, Any]) -> Terms:
    """Read a request's terms. Raises RequestError for a class that is none."""
    name = http.headers.get("x-prfaas-class", RequestClass.STANDARD)
    if name not in list(RequestClass):
        accepted = ", ".join(RequestClass)
        raise RequestError(400, f"x-prfaas-class: {name[:64]!r} is not one of {accepted}", code="bad_class")
    sampling = body.get("sampling_params")
    asked = body.get("max_completion_tokens") or body.get("max_tokens")
    if isinstance(sampling, dict):
        asked = asked or sampling.get("max_new_tokens")
    output = asked if isinstance(asked, int) and asked > 0 else EXPECTED_OUTPUT
    return Terms(
        RequestClass(name),
        http.headers.get("x-prfaas-tenant", "")[:_NAME_CHARS],
        http.headers.get("x-prfaas-session", "")[:_NAME_CHARS],
        min(output, MAX_EXPECTED_OUTPUT),
    )


class Server:
    """What the handlers share; one for each process."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        tokenizer: TokenizerPool,
        index: PrefixIndex | None,
        table: WorkerTable,
        upstream: Upstream,
        metrics: RouterMetrics,
        links: LinkTable,
        gate: Gate,
    ) -> None:
        self.config = config
        self.links = links
        self.table = table
        self.metrics = metrics
        self._tokenizer = tokenizer
        self._index = index
        self._upstream = upstream
        self.gate = gate
        self.decisions = DecisionLog(config.decisions)
        rule = config.policy
        self.policy = Policy(
            PolicyName(rule.name),
            rule.threshold_tokens,
            max_link_wait_s=rule.max_link_wait_s,
            margin_ratio=rule.margin_ratio,
            margin_s=rule.margin_s,
            recompute_weight=rule.recompute_weight,
            crowd_weight=rule.crowd_weight,
            cost_weight_s=rule.cost_weight_s,
            balance_abs=rule.balance_abs,
            balance_rel=rule.balance_rel,
        )
        self.tuner = Tuner(config, table, self._set_threshold)
        self._sessions: OrderedDict[tuple[str, str], WorkerId] = OrderedDict()

    def _set_threshold(self, tokens: int) -> None:
        self.policy = replace(self.policy, threshold_tokens=tokens)

    async def handle(self, http: web.Request, api: Api) -> web.StreamResponse:
        """Answer one request; always ends in one log line."""
        loop = asyncio.get_running_loop()
        record = Record(api, secrets.token_hex(16), loop.time())
        try:
            return await self._answer(http, record)
        except RequestError as error:
            record.outcome = Outcome.CLIENT_ERROR
            return self._refuse(record, error.status, str(error), code=error.code, param=error.param)
        except web.HTTPRequestEntityTooLarge:
            record.outcome = Outcome.CLIENT_ERROR
            limit = self.config.limits.body_bytes
            return self._refuse(record, 413, f"the body is larger than {limit} bytes", code="body_too_large")
        except Rejected as error:
            record.outcome = Outcome.REJECTED
            return self._refuse(
                record, 429, str(error), code="not_admitted", retry_after_s=error.retry_after_s
            )
        except Unavailable as error:
            record.outcome = Outcome.UNAVAILABLE
            return self._refuse(record, 503, str(error), code=error.reason)
        except (asyncio.CancelledError, ConnectionResetError):
            record.outcome, record.status = Outcome.CLIENT_LEFT, 499
            raise
        except Exception as error:
            logs.event(_log, "handler_failed", logging.ERROR, exc_info=True, request_id=record.request_id)
            if record.status:
                raise  # a stream has begun: all that is left is to cut it
            return self._refuse(record, 500, f"internal error: {type(error).__name__}", code="internal")
        finally:
            record.finish(self.metrics, loop.time())

    def _refuse(
        self,
        record: Record,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float = 1.0,
    ) -> web.Response:
        record.status, record.error = status, code or message
        later = {"Retry-After": str(math.ceil(retry_after_s))} if status in (429, 503) else {}
        headers = record.headers() | later
        return web.json_response(
            error_body(message, error_type(status), code=code, param=param), status=status, headers=headers
        )

    async def _answer(self, http: web.Request, record: Record) -> web.StreamResponse:
        raw = await http.read()
        request = parse(record.api, raw)
        record.stream = request.stream
        check_model(request, self.config.model.name)
        terms = _terms(http, request.body)
        record.match = await self._match(request, record)
        room = self.config.model.context_length - (record.prompt_tokens or 0)
        held = hold_reason(record.api, request.body, room) if self.config.early_first_token else "off"
        call = Call(
            path=PATHS[record.api],
            body=raw,
            empty=not request.body,
            listed=request.listed,
            stream=request.stream,
            api=record.api,
            held=held,
            stops=tuple(stop_strings(record.api, request.body)),
            ends=() if ignores_end(record.api, request.body) else self._tokenizer.ends,
            fields=request.body,
            prompt_tokens=record.prompt_tokens or 0,
            headers={name: http.headers[name] for name in _FORWARDED if name in http.headers},
        )
        return await self._try_routes(Client(http, record), call, record.match, terms)

    async def _match(self, request: ParsedRequest, record: Record) -> Match:
        """Tokenise, check the length, ask the index.

        A prompt with an adapter or an extra key is not asked for: the index would answer with the blocks of
        the same tokens without one, which the engine does not share.
        """
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        prompt = await self._tokenizer.prompt(request)
        tokenized_s = loop.time()
        self.metrics.tokenize.observe(tokenized_s - started_s)
        record.prompt_tokens = prompt.total_tokens
        check_length(prompt.total_tokens, self.config.model.context_length)
        model = self.config.model
        if request.partition:
            return Match(available=False, reason="partitioned")
        namespace = Namespace(model=model.name, page_size=model.page_size)
        match = await lookup(self._index, namespace, prompt.hashes, prompt.total_tokens)
        if self._index is not None:
            outcome = "ok" if match.available else "unavailable"
            self.metrics.index.labels(outcome).observe(loop.time() - tokenized_s)
        return match

    async def _try_routes(self, client: Client, call: Call, match: Match, terms: Terms) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        record = client.record
        excluded: set[WorkerId] = set()
        failure: Failure | None = None
        broke = 0
        while True:
            request = self._request(record, terms, excluded)
            try:
                decision = self._choose(request, match, self.policy)
            except Unavailable:
                if failure is None:
                    raise
                return await self._give_up(client, failure)
            # What the engine would take at most: a budget of one context always has room for a request.
            tokens = min(request.total_tokens + request.output_tokens, self.config.model.context_length)
            who = (terms.request_class, terms.tenant, record.started_s)
            ticket = self.gate.ticket(f"{record.request_id}/{record.retries}", decision, tokens, who)
            try:
                async with self.gate.enter(ticket) as admitted:
                    if failure is not None:
                        record.retries += 1
                        self.metrics.retries.inc()
                    if admitted is Admitted.LOCAL:
                        home = replace(self.policy, name=PolicyName.LOCAL)
                        decision = self._choose(request, match, home, decision)
                    self._note(request, decision)
                    record.decision = decision
                    booking = self.table.book(decision, tokens, loop.time())
                    try:
                        answer = await self._attempt(client, call, decision, booking, ticket)
                    finally:
                        booking.release()
            except Rejected:
                if failure is None:
                    raise
                return await self._give_up(client, failure)
            if not isinstance(answer, Failure):
                return answer
            failure = answer
            self._upstream.traits.forget(_worker(decision, failure.side))
            self.metrics.failures.labels(failure.side, failure.kind).inc()
            record.failures.append(f"{failure.side}:{failure.kind}:{failure.status}")
            broke += failure.hard
            if failure.client_fault or broke >= MAX_BROKEN or loop.time() >= self._deadline(record, call):
                return await self._give_up(client, failure)
            excluded.add(_worker(decision, failure.suspect))

    def _request(self, record: Record, terms: Terms, excluded: set[WorkerId]) -> Request:
        return Request(
            record.request_id,
            record.prompt_tokens or 1,
            self.table.site,
            terms.output_tokens,
            request_class=terms.request_class,
            tenant=terms.tenant,
            session=terms.session,
            previous=self._sessions.get((terms.tenant, terms.session)),
            excluded=frozenset(excluded),
        )

    def _choose(
        self, request: Request, match: Match, policy: Policy, reserved: Decision | None = None
    ) -> Decision:
        """Choose a route; `reserved` is an earlier decision whose decode worker is reserved."""
        now_s = asyncio.get_running_loop().time()
        decision = choose(request, match, self.table.view(now_s), self.table.links, policy, now_s)
        if reserved is None:
            return decision
        return replace(decision, decode=reserved.decode, reason=Reason.NOT_ADMITTED)

    def _note(self, request: Request, decision: Decision) -> None:
        """Count a decision that is about to be dispatched, and remember it."""
        self.metrics.decisions.labels(decision.kind, decision.reason).inc()
        if decision.wire_bytes:
            ends = (decision.prefill.site, decision.decode.site)
            self.metrics.wire_bytes.labels(*ends).inc(decision.wire_bytes)
            self.metrics.wire_cost.labels(*ends).inc(decision.cost)
        self.tuner.observe(decision, request.total_tokens, request.output_tokens)
        self.decisions.add(request.request_id, request.request_class, request.total_tokens, decision)
        if request.session:
            self._sessions[request.tenant, request.session] = decision.prefill.worker_id
            self._sessions.move_to_end((request.tenant, request.session))
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)

    def _deadline(self, record: Record, call: Call) -> float:
        """When the first byte must have come, on the loop's clock."""
        timeouts = self.config.timeouts
        wait_s = min(timeouts.first_byte_s, timeouts.total_s) if call.stream else timeouts.total_s
        return record.started_s + wait_s

    async def _give_up(self, client: Client, failure: Failure) -> web.StreamResponse:
        record = client.record
        if client.stream is not None:
            record.outcome, record.error = Outcome.STREAM_BROKEN, failure.message
            return await client.end(failure.status, failure.message, "stream_broken")
        if failure.client_fault:
            record.outcome = Outcome.CLIENT_ERROR
            code = "context_length_exceeded" if "context length" in failure.message else None
        else:
            record.outcome = Outcome.TIMEOUT if failure.status == 504 else Outcome.UPSTREAM_ERROR
            code = f"{failure.side}_{failure.kind}"
        return self._refuse(record, failure.status, failure.message, code=code)

    async def _attempt(
        self, client: Client, call: Call, decision: Decision, booking: Booking, ticket: Ticket
    ) -> web.StreamResponse | Failure:
        """Try one route; a Failure means that the client has got nothing yet, or the first token alone."""
        loop = asyncio.get_running_loop()
        record = client.record
        first = None if call.held or client.rest is not None else FirstToken(call.api, call.stops, call.ends)
        breakers = self.table.breakers
        prefill, decode = decision.prefill.worker_id, decision.decode.worker_id
        record.room = secrets.randbits(63)
        exchange = Exchange(
            self._upstream,
            call,
            prefill=self.table.config(prefill),
            decode=self.table.config(decode),
            room=record.room,
            rid=secrets.token_hex(16) if record.retries else record.request_id,
            prefilled=booking.release_prefill,
            first=first,
            rest=client.rest,
        )
        finished = False
        settled = False
        try:
            failure = await exchange.start(self._deadline(record, call), client.send_first)
            settled = True
            if failure is None:
                booking.delivered()
                self.gate.delivered(ticket)
                breakers.succeeded(prefill)
                breakers.succeeded(decode)
                if call.stream:
                    self._count_first(call, client, first)
                response = await self._pass_on(client, call, exchange)
                finished = record.outcome is Outcome.OK
                return response
            for side, worker_id in ((Side.PREFILL, prefill), (Side.DECODE, decode)):
                if failure.certain and side is failure.suspect:
                    breakers.failed(worker_id, loop.time())
                elif failure.client_fault and side is failure.side:
                    breakers.succeeded(worker_id)
                else:
                    breakers.abandoned(worker_id, loop.time())
            return failure
        finally:
            if not settled:
                breakers.abandoned(prefill, loop.time())
                breakers.abandoned(decode, loop.time())
            record.facts = exchange.facts()
            if finished:
                exchange.close()
            else:
                exchange.abandon()

    def _count_first(self, call: Call, client: Client, first: FirstToken | None) -> None:
        """Say where the first token of a stream came from, and why."""
        reason = call.held or (first.reason if first is not None else "") or "decode_was_first"
        outcome = "prefill" if client.rest is not None else reason
        self.metrics.first_tokens.labels(outcome).inc()

    async def _pass_on(self, client: Client, call: Call, exchange: Exchange) -> web.StreamResponse:
        """Send decode's answer to the client, behind what it has; sets the outcome."""
        loop = asyncio.get_running_loop()
        record = client.record
        if not call.stream:
            record.status = 200
            headers = record.headers() | {"Content-Type": exchange.content_type}
            body = b"".join([chunk async for chunk in exchange.chunks()])
            record.ttft_s, record.outcome = loop.time() - record.started_s, Outcome.OK
            return web.Response(body=body, headers=headers)
        await client.begin(exchange.content_type)
        try:
            async with asyncio.timeout_at(record.started_s + self.config.timeouts.total_s):
                async for chunk in exchange.chunks():
                    await client.write(chunk)
            record.outcome = Outcome.OK
            if (error := exchange.late_error()) is not None:
                record.outcome, record.error = Outcome.STREAM_BROKEN, error.message
        except StreamBroken as error:
            record.outcome, record.error = Outcome.STREAM_BROKEN, str(error)
            return await client.end(502, "the decode worker broke off the stream", "stream_broken")
        except TimeoutError:
            record.outcome, record.error = Outcome.TIMEOUT, "total_s"
            return await client.end(504, "the request took longer than allowed", "timeout")
        return await client.end()


def _worker(decision: Decision, side: Side) -> WorkerId:
    return decision.prefill.worker_id if side is Side.PREFILL else decision.decode.worker_id
