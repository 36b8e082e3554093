"""`prfaas up` with real SGLang: bad requests, clients that leave, workers that die, launchers that die."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from prfaas_sglang.fleet.ports import free_port
from tests.e2e.fleet import ROOT, Up, gone, run_cli, start_cli, up
from tests.e2e.slow_link import slow_link

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

FILE = """
model: {path: tiny:gdn}
engine: {context_length: 1024, max_total_tokens: 4096, chunked_prefill_size: 256}
routing: {threshold_tokens: 256}
transfer: {tls: auto}
sites:
  - {name: A, workers: [{name: a-p, role: prefill}]}
  - {name: B, workers: [{name: b-p, role: prefill}, {name: b-d, role: decode}]}
links: [{src: A, dst: B, gbps: 10}]
"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One fleet for the whole file; the last tests end it."""
    folder = tmp_path_factory.mktemp("up")
    (folder / "fleet.yaml").write_text(FILE)
    with up(folder / "fleet.yaml", folder / "run") as running:
        yield running


def ask(fleet: Up, prompt: str | list[int], **body: object) -> requests.Response:
    """Complete a prompt greedily."""
    defaults = {"model": "gdn", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return requests.post(f"{fleet.url}/v1/completions", json={**defaults, **body}, timeout=60)


def test_it_answers_and_says_what_it_decided(fleet: Up) -> None:
    """A long prompt goes to site A, a short one stays; headers and log lines say so."""
    long = ask(fleet, list(range(10, 510)))
    short = ask(fleet, list(range(10, 60)))
    assert long.status_code == short.status_code == 200, long.text + short.text
    assert (long.headers["x-prfaas-route"], long.headers["x-prfaas-prefill-worker"]) == ("remote", "a-p")
    assert (short.headers["x-prfaas-route"], short.headers["x-prfaas-prefill-worker"]) == ("local", "b-p")
    events = [json.loads(line) for line in (fleet.run_dir / "router.log").read_text().splitlines()]
    routes = [event["route"] for event in events if event["event"] == "request"]
    assert {"remote", "local"} <= set(routes)


def test_a_prompt_longer_than_the_context_is_refused(fleet: Up) -> None:
    """400 with both numbers, and the fleet serves on."""
    answer = ask(fleet, list(range(10, 10 + 1100)))
    assert answer.status_code == 400
    assert "1100" in answer.text
    assert "1024" in answer.text
    assert ask(fleet, [5, 6, 7]).status_code == 200


STREAMS: list[tuple[str, dict[str, object]]] = [
    ("/v1/completions", {}),
    ("/v1/completions", {"logprobs": 2, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"max_tokens": 1}),
    ("/v1/completions", {"echo": True}),
    ("/v1/completions", {"max_tokens": 1, "return_token_ids": True, "logprobs": 1}),
    ("/v1/completions", {"stop": ["qqqq", "zzzz"], "return_token_ids": True}),
    ("/generate", {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0}),
    ("/v1/chat/completions", {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
    ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 2}),
    ("/generate", {"return_logprob": True}),
]


@pytest.fixture(scope="module")
def far_router(fleet: Up, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Another router of the fleet, for which KV from every prefill worker takes a long link; its URL."""
    config = json.loads((fleet.run_dir / "router.json").read_text())
    with contextlib.ExitStack() as stack:
        for worker in config["workers"]:
            if worker["role"] == "prefill":
                link = slow_link(worker["bootstrap_host"], worker["bootstrap_port"], 0.25)
                worker["bootstrap_port"] = stack.enter_context(link)
                worker["bootstrap_host"] = "127.0.0.1"
        config["listen"] = f"127.0.0.1:{free_port()}"
        url = f"http://{config['listen']}"
        file = tmp_path_factory.mktemp("far") / "router.json"
        file.write_text(json.dumps(config))
        process = stack.enter_context(
            subprocess.Popen([sys.executable, "-m", "router", "--config", str(file)], cwd=ROOT)
        )
        stack.callback(process.terminate)
        deadline = time.monotonic() + 30
        while not _healthy(url):
            assert process.poll() is None
            assert time.monotonic() < deadline
        yield url


def _healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=2).status_code == 200
    except requests.ConnectionError:
        return False


def told(url: str, path: str, body: dict[str, object], prompt: str) -> dict[str, object]:
    """Stream an answer; return what a client makes of it."""
    sampling = {"temperature": 0, "ignore_eos": True}
    full: dict[str, object] = {"model": "gdn", "stream": True, "max_tokens": 8, **sampling, **body}
    if path == "/generate":
        full = {"text": prompt, "stream": True, "sampling_params": {"max_new_tokens": 8, **sampling}, **body}
    elif "chat" in path:
        full["messages"] = [{"role": "user", "content": prompt}]
    else:
        full["prompt"] = prompt
    text, probs, ids, finish, usage, heads = "", [], [], [], None, set()
    with requests.post(f"{url}{path}", json=full, stream=True, timeout=60) as answer:
        assert answer.status_code == 200, answer.text
        events = [line[6:] for line in answer.iter_lines() if line]
    assert events[-1] == b"[DONE]"
    for event in map(json.loads, events[:-1]):
        assert "error" not in event, event
        if path == "/generate":
            text, probs = event["text"], event["meta_info"]["output_token_logprobs"]
            assert event["meta_info"]["input_token_logprobs"] == []
            ids = event["output_ids"]
            finish = (
                [event["meta_info"]["finish_reason"]["type"]] if event["meta_info"]["finish_reason"] else []
            )
            heads.add(event["meta_info"]["id"])
            continue
        heads.add(event["id"])  # SGLang stamps every event with the time it has then
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            text += choice["delta"].get("content") or "" if "chat" in path else choice["text"]
            found = choice["logprobs"] or {}
            ids += choice.get("token_ids") or []
            probs += found.get("content") or found.get("token_logprobs") or []
            finish += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert len(heads) == 1
    return {"text": text, "logprobs": probs, "ids": ids, "finish": finish, "usage": usage}


@pytest.mark.parametrize(("path", "body"), STREAMS, ids=str)
def test_the_first_token_comes_from_prefill_and_the_stream_is_decodes(
    far_router: str, path: str, body: dict[str, object]
) -> None:
    """Before KV has crossed the link the client has it; it gets what decode alone would have streamed.

    `no_stop_trim` keeps the router from sending it early, for the comparison.
    """
    before = first_tokens(far_router)
    # continued by text, not by a special token
    prompt = "Hello" if "chat" in path else "The quick brown fox jumps over the lazy dog and"
    held: dict[str, object] = {
        "sampling_params": {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True, "no_stop_trim": True}
    }
    held = held if path == "/generate" else {"no_stop_trim": True}
    alone = told(far_router, path, {**body, **held}, prompt)
    for _ in range(3):
        assert told(far_router, path, body, prompt) == alone
    after = first_tokens(far_router)
    assert after["stop_condition"] == before["stop_condition"] + 1
    assert after["prefill"] > before["prefill"]


#: The tiny models' end of turn.
TURN_END = "2"


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/v1/completions", {"ignore_eos": False, "logit_bias": {TURN_END: 100}}, "no_text"),
        ("/v1/chat/completions", {"ignore_eos": False, "logit_bias": {TURN_END: 100}}, "no_text"),
        ("/v1/completions", {"regex": "[a-z]", "max_tokens": 4}, "field"),
        ("/v1/chat/completions", {"max_tokens": 0}, "no_room"),
        ("/v1/completions", {"stop": [" ", "e", "a", "i", "o", "n", "t", "1", "3"]}, "stop_string"),
    ],
    ids=str,
)
def test_what_decode_would_not_show_is_not_sent(
    far_router: str, path: str, body: dict[str, object], reason: str
) -> None:
    """The end, a grammar, no room, a stop string: the client gets what decode streams, nothing before it."""
    before = first_tokens(far_router)
    prompt = "Hello" if "chat" in path else "The quick brown fox jumps over the lazy dog and"
    assert len(told(far_router, path, body, prompt)["finish"]) == 1  # type: ignore[arg-type]
    after = first_tokens(far_router)
    assert after["prefill"] == before["prefill"]
    # on a loaded machine decode may be first, before prefill's token is looked at
    held = {reason, "finished", "decode_was_first"}
    assert sum(after.get(h, 0) for h in held) == sum(before.get(h, 0) for h in held) + 1


def first_tokens(url: str) -> dict[str, float]:
    """Return how many streams got their first token from where."""
    text = requests.get(f"{url}/metrics", timeout=10).text
    found = re.findall(r'prfaas_router_first_tokens_total\{outcome="(\w+)"\} (\S+)', text)
    return {"prefill": 0.0, "stop_condition": 0.0, **{name: float(value) for name, value in found}}


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b'{"model": "gdn", "prompt": ', 400, "JSON"),
        (b'{"model": "other", "prompt": "x"}', 404, "other"),
        (b'{"model": "gdn", "prompt": {"a": 1}}', 400, "prompt"),
        (b'{"model": "gdn", "prompt": "x", "max_tokens": "many"}', 400, "max_tokens"),
        (b"[]", 400, "object"),
        (b'{"model": "gdn", "prompt": [1, 999999]}', 400, "vocabulary"),
        (b'{"model": "gdn", "prompt": "x", "stop_token_ids": [999999]}', 400, "vocabulary"),
    ],
)
def test_a_wrong_body_gets_a_clear_error(fleet: Up, body: bytes, status: int, word: str) -> None:
    """The status is the client's fault and the message names what is wrong."""
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{fleet.url}/v1/completions", data=body, headers=headers, timeout=60)
    assert answer.status_code == status, answer.text
    assert word in answer.json()["error"]["message"]


def test_clients_that_leave_midway_leak_nothing(fleet: Up) -> None:
    """After a dozen disconnects every worker is idle again and a long prompt still fits."""
    for i in range(12):
        prompt = list(range(10 + i, 10 + i + 400))
        with requests.post(
            f"{fleet.url}/v1/completions",
            json={
                "model": "gdn",
                "prompt": prompt,
                "max_tokens": 500,
                "stream": True,
                "ignore_eos": True,
                "temperature": 0,
            },
            stream=True,
            timeout=60,
        ) as answer:
            assert next(answer.iter_content(64))
    router = json.loads((fleet.run_dir / "router.json").read_text())
    for worker in router["workers"]:
        wait_idle(worker["url"])
    assert ask(fleet, list(range(10, 900))).status_code == 200


def wait_idle(url: str) -> None:
    """Poll a worker's own load until no request is left (bounded)."""
    import time

    deadline = time.monotonic() + 30
    while True:
        loads = requests.get(f"{url}/v1/loads?include=core", timeout=10).json()
        running = sum(r["num_running_reqs"] + r["num_waiting_reqs"] for r in loads["loads"])
        if running == 0:
            return
        assert time.monotonic() < deadline, f"{url} still has {running} requests"
        time.sleep(0.1)


def test_a_worker_that_dies_ends_the_fleet_with_its_name(fleet: Up) -> None:
    """kill -9 of a worker: exit 1, its name and signal are printed, nothing is left running."""
    pids = fleet.pids()
    victim = json.loads((fleet.run_dir / "pids.json").read_text())["b-p"]
    assert psutil.pid_exists(victim)
    os.kill(victim, signal.SIGKILL)
    output, _ = fleet.process.communicate(timeout=60)
    assert fleet.process.returncode == 1
    assert "b-p" in output
    assert "SIGKILL" in output
    assert gone(pids) == []


def test_a_killed_launcher_leaves_no_orphan(tmp_path: Path) -> None:
    """kill -9 of the launcher itself takes every process along."""
    (tmp_path / "fleet.yaml").write_text(FILE)
    with up(tmp_path / "fleet.yaml", tmp_path / "run") as running:
        pids = running.pids()
        assert len(pids) >= 10
        running.process.kill()
        running.process.wait()
        assert gone(pids) == []


def test_ctrl_c_stops_everything(tmp_path: Path) -> None:
    """SIGINT: exit 0, said so, nothing left."""
    (tmp_path / "fleet.yaml").write_text(FILE)
    with up(tmp_path / "fleet.yaml", tmp_path / "run") as running:
        pids = running.pids()
        output = running.interrupt()
        assert running.process.returncode == 0
        assert "stopped everything" in output
        assert gone(pids) == []


def test_ctrl_c_while_sglang_is_imported_stops_at_once(tmp_path: Path) -> None:
    """Nobody waits for imports that are not wanted any more."""
    (tmp_path / "fleet.yaml").write_text(FILE)
    argv = ["up", "-f", str(tmp_path / "fleet.yaml"), "--run-dir", str(tmp_path / "run")]
    process = start_cli(*argv)
    with process:
        assert process.stdout is not None
        assert any("ok model" in line for line in process.stdout)
        pids = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert json.loads((tmp_path / "run" / "pids.json").read_text())["zygote"] in pids
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=4)  # the imports alone take longer
    assert process.returncode == 0
    assert "SIGINT: stopped everything" in output
    assert gone(pids) == []


def test_a_worker_that_dies_at_start_is_explained(tmp_path: Path) -> None:
    """A bad engine flag: exit 1 with the worker's last lines, which name the flag."""
    (tmp_path / "fleet.yaml").write_text(FILE.replace("engine: {", "engine: {args: [--no-such-flag], "))
    done = run_cli("up", "-f", str(tmp_path / "fleet.yaml"), "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 1
    assert "--no-such-flag" in done.stderr
    assert "exited with status 2" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("tiny:gdn", "/no/such/model"), "model.path: /no/such/model has no config.json"),
        (("src: A", "src: C"), "links[0].src: no site is named 'C'"),
        (("role: decode", "role: decode, port: PORT"), "cannot listen on"),
    ],
)
def test_a_wrong_file_starts_nothing(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    """Exit 2 and the path of the field; no process was started."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        old, new = change
        text = FILE.replace(old, new.replace("PORT", str(taken.getsockname()[1])))
        (tmp_path / "fleet.yaml").write_text(text)
        done = run_cli("up", "-f", str(tmp_path / "fleet.yaml"), "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "run" / "pids.json").exists()
