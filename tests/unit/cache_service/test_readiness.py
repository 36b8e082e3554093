"""When a service calls itself ready, and whom a client asks while one is not."""

from cache_service.core.endpoints import Endpoints
from cache_service.core.readiness import Behind, Kind, Readiness

LOG, WORKER = Behind(Kind.SITE, "A"), Behind(Kind.WORKER, "a-0/0")


def test_ready_when_caught_up() -> None:
    """Nothing behind is ready at once, and for good."""
    readiness = Readiness(100.0, 10.0)
    readiness.look(100.0, [LOG, WORKER])
    assert (readiness.ready, [str(one) for one in readiness.behind]) == (False, ["site A", "worker a-0/0"])
    readiness.look(103.0, [LOG])
    assert not readiness.ready
    assert readiness.behind_s(Kind.SITE, 103.0) == 3.0
    assert readiness.behind_s(Kind.WORKER, 103.0) == 0.0
    readiness.look(104.0, [])
    assert readiness.ready
    readiness.look(105.0, [LOG])
    assert readiness.ready


def test_ready_when_it_takes_too_long() -> None:
    """After the wait it is ready, and still behind."""
    readiness = Readiness(100.0, 10.0)
    readiness.look(109.9, [Behind(Kind.DISCOVERY)])
    assert not readiness.ready
    readiness.look(110.0, [Behind(Kind.DISCOVERY)])
    assert readiness.ready
    assert readiness.behind_s(Kind.DISCOVERY, 130.0) == 30.0


def test_who_is_starting_comes_last() -> None:
    """Ready ones first; a starting one rather than none; a probe or an answer makes it like the others."""
    endpoints = Endpoints(["a", "b"])
    endpoints.answered("a")
    endpoints.starts("a", 0.0)
    assert endpoints.pick(()) == "b"
    assert endpoints.pick({"b"}) == "a"
    assert endpoints.pick({"b"}, starting=False) is None
    assert endpoints.broken == 0
    at_s = endpoints.next_probe_s()
    assert at_s is not None
    assert endpoints.due(at_s) == ["a"]
    endpoints.failed("b", 0.0)
    assert endpoints.pick(()) == "a"
    endpoints.answered("a")
    assert endpoints.pick((), starting=False) == "a"
    endpoints.failed("a", 0.0)
    endpoints.starts("a", 0.0)
    assert endpoints.pick(()) == "a"
