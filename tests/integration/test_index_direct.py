"""Match without gRPC: the same answers and refusals, and what a hostile or lazy peer can do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from cache_service.core.errors import RemoteProtocolError
from cache_service.direct import MAGIC, DirectClient, DirectLost, DirectServer, Frames
from cache_service.wire import cache_pb2
from cache_service.wire.codec import MAX_MESSAGE_BYTES
from tests.integration.cache_support import PAGE, CacheProcess, Worker, stored


@pytest.mark.parametrize("seed", range(20))
def test_frames_survive_any_cut(seed: int) -> None:
    """However the stream is cut, the same frames come out."""
    rng = random.Random(seed)
    bodies = [rng.randbytes(rng.randint(4, 40)) for _ in range(rng.randint(0, 8))]
    stream = MAGIC + b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
    frames, found = Frames(4), []
    while stream:
        cut = rng.randint(1, len(stream))
        found += frames.feed(stream[:cut])
        stream = stream[cut:]
    assert found == bodies


@pytest.mark.parametrize(
    "data", [b"PRI * HTTP/2.0", b"G", MAGIC + b"\x00\x00\x00\x00", MAGIC + b"\xff\xff\xff\xff"]
)
def test_frames_refuse(data: bytes) -> None:
    """Another protocol, and a length out of bounds, are refused before anything is kept for them."""
    with pytest.raises(RemoteProtocolError, match="direct"):
        Frames(4).feed(data)


@pytest.fixture
async def echo() -> AsyncIterator[DirectServer]:
    """A service that answers with the question."""
    server = DirectServer(lambda question: (0, question))
    await server.listen("127.0.0.1", 0)
    yield server
    await server.stop()


async def test_many_at_once(echo: DirectServer) -> None:
    """Answers find their questions, small and as large as a message may be."""
    client = await DirectClient.open("127.0.0.1", echo.port, 5)
    questions = [str(number).encode() for number in range(500)] + [b"x" * (MAX_MESSAGE_BYTES - 5)]
    answers = await asyncio.gather(*(client.ask(question, 10) for question in questions))
    assert answers == [(0, question) for question in questions]
    client.close()


async def test_garbage_ends_only_its_connection(echo: DirectServer) -> None:
    """A peer of another protocol is cut off; the others go on."""
    client = await DirectClient.open("127.0.0.1", echo.port, 5)
    reader, writer = await asyncio.open_connection("127.0.0.1", echo.port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await asyncio.wait_for(reader.readexactly(100), 5)
    writer.close()
    assert await client.ask(b"still here", 5) == (0, b"still here")
    client.close()


async def test_late_and_lost(echo: DirectServer) -> None:
    """A silent service is late; one that goes loses what was in flight at once."""
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    client = await DirectClient.open("127.0.0.1", silent.sockets[0].getsockname()[1], 5)
    with pytest.raises(DirectLost) as caught:
        await client.ask(b"x", 0.05)
    assert caught.value.late
    asking = asyncio.ensure_future(client.ask(b"x", 30))
    await asyncio.sleep(0)
    client.close()
    with pytest.raises(DirectLost) as caught:
        await asking
    assert not caught.value.late
    silent.close()


async def test_the_service_says_the_same(tmp_path) -> None:
    """A real service tells its port, and refuses with gRPC's numbers and words."""
    worker = Worker()
    worker.start()
    process = CacheProcess(tmp_path, [worker])
    await process.start()
    try:
        worker.publish(stored([1, 2]))
        await process.matches([1, 2], {"a-prefill-0": 8})
        port = (await process.client.stats()).direct_port
        client = await DirectClient.open("127.0.0.1", port, 5)
        namespace = cache_pb2.Namespace(model="tiny", page_size=PAGE)
        good = cache_pb2.MatchRequest(namespace=namespace, hashes=[1, 2], total_tokens=9)
        status, body = await client.ask(good.SerializeToString(), 5)
        (holder,) = cache_pb2.MatchResponse.FromString(body).holders
        assert (status, holder.matched_tokens, holder.usable_tokens) == (0, 8, 8)
        for wrong, number, named in (
            (b"\xff\xff\xff", 3, b"match request"),
            (cache_pb2.MatchRequest(total_tokens=1).SerializeToString(), 3, b"namespace"),
            (
                cache_pb2.MatchRequest(
                    namespace=cache_pb2.Namespace(model="other", page_size=PAGE), total_tokens=1
                ).SerializeToString(),
                5,
                b"this service indexes",
            ),
        ):
            status, body = await client.ask(wrong, 5)
            assert status == number
            assert named in body
        client.close()
    finally:
        await process.close()
        worker.stop()
