"""A cut path is told from a busy peer, and its end is found."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prfaas_sglang.core.lifeline import ANSWER_S, KNOCK_S, QUIET_S, Lifeline, Step

RTT_S = 0.04


def test_a_cut_path_is_replaced_when_a_knock_is_answered() -> None:
    """Ask, knock until someone answers, replace."""
    line = Lifeline()
    assert line.step(10.0, 100, RTT_S) == Step.WAIT
    assert line.step(10.0 + QUIET_S, 100, RTT_S) == Step.ASK
    asked_s = 10.0 + QUIET_S
    assert line.step(asked_s + 0.1, 100, RTT_S) == Step.WAIT
    for knock in range(4):
        assert line.step(asked_s + ANSWER_S + 4 * RTT_S + knock * KNOCK_S, 100, RTT_S) == Step.KNOCK
        line.knocked(reached=False)
    assert line.step(asked_s + 2.0, 100, RTT_S) == Step.KNOCK
    line.knocked(reached=True)
    assert line.step(asked_s + 2.0, 100, RTT_S) == Step.REPLACE


def test_a_peer_that_is_there_but_quiet_is_left_alone() -> None:
    """Its kernel answers the first knock: a stopped process, or a lost PING. Nothing more is done."""
    line = Lifeline()
    line.step(0.0, 100, RTT_S)
    assert line.step(1.0, 100, RTT_S) == Step.ASK
    assert line.step(2.0, 100, RTT_S) == Step.KNOCK
    line.knocked(reached=True)
    assert {line.step(2.0 + i / 10, 100, RTT_S) for i in range(100)} == {Step.WAIT}


@given(
    st.lists(
        st.tuples(st.floats(0.01, 1.5), st.sampled_from(["data", "silence", "rest"]), st.booleans()),
        max_size=80,
    )
)
def test_a_bundle_is_replaced_only_after_silence_and_a_knock_of_each_kind(
    steps: list[tuple[float, str, bool]],
) -> None:
    """Against what happened since something was heard last: asked, then unanswered and answered knocks."""
    line, now_s, heard = Lifeline(), 0.0, 0
    line.step(now_s, heard, RTT_S)
    since: list[Step | bool] = []
    silent_since_s = now_s
    for pause_s, what, reached in steps:
        now_s += pause_s
        if what == "rest":
            line.rest(now_s)
            since, silent_since_s = [], now_s
            continue
        if what == "data":
            heard += 1
            since, silent_since_s = [], now_s
        step = line.step(now_s, heard, RTT_S)
        if step == Step.REPLACE:
            assert now_s - silent_since_s >= QUIET_S + ANSWER_S
            assert (since[0], since[1], since[-1]) == (Step.ASK, False, True)
            return
        if step == Step.ASK:
            assert not since
            assert now_s - silent_since_s >= QUIET_S
            since.append(step)
        if step == Step.KNOCK:
            assert since[:1] == [Step.ASK]
            assert True not in since
            line.knocked(reached)
            since.append(reached)
