"""The client against a real server that misbehaves: retries, cache, kills, limits, prices, batch files, the key."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chat_server import Reply, chat_server, completion

from radllama import client as cl

ROOT = Path(__file__).parents[1]
SECRET = "sk-marker-1234567890"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The openai client's own back-off, a hundred times as fast; a key in the environment; no proxies."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.005)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


def call(text: str = "hello", **more: Any) -> cl.Call:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 50, **more}
    return cl.Call(body, str.upper, expected_tokens=5)


def ask(url: str, cache: Path, texts: list[str], **options: Any) -> tuple[list[cl.Answer], dict[str, Any]]:
    client = cl.Client("tiny", url=url, cache=cache, **({"max_retries": 2} | options))
    answers = client.ask([call(text) for text in texts])
    client.close()
    return answers, client.usage()


def echo(body: dict[str, Any], hit: int) -> Reply:
    return Reply(completion("re " + body["messages"][0]["content"]))


def test_answers_are_kept_in_order_and_a_second_run_costs_nothing(tmp_path: Path) -> None:
    texts = [f"t{i}" for i in range(20)]
    with chat_server(echo) as server:
        answers, usage = ask(server.url, tmp_path, [*texts, "t3"])
        assert [answer.value for answer in answers] == [f"RE {text}".upper() for text in [*texts, "t3"]]
        assert server.hits == 20  # equal calls are one
        assert set(server.paths) == {"/v1/chat/completions"}
        assert server.requests[0]["max_tokens"] == 50
        assert (usage["answered_now"], usage["prompt_tokens"], usage["completion_tokens"]) == (20, 2000, 200)
        assert usage["answered_by"] == {"tiny-2026-01-01": 20}
        assert usage["fingerprints"] == {"fp_1": 20}
    again, usage = ask(server.url, tmp_path, texts)  # the server is gone
    assert [answer.value for answer in again] == [answer.value for answer in answers[:-1]]
    assert (usage["answered_now"], usage["from_cache"], usage["failed"], usage["prompt_tokens"]) == (0, 20, 0, 0)


def test_each_of_server_model_prompt_and_settings_makes_another_key(tmp_path: Path) -> None:
    one = cl.Client("tiny", url="http://127.0.0.1:1/v1", cache=tmp_path)
    other = cl.Client("tiny", url="http://127.0.0.1:2/v1/", cache=tmp_path)
    bodies = [call().body, call("x").body, call(seed=1).body, call(temperature=1).body, call().body | {"model": "big"}]
    assert len({client.key(body) for client in (one, other) for body in bodies}) == 10


def test_retry_after_is_honoured(tmp_path: Path) -> None:
    def busy(body: dict[str, Any], hit: int) -> Reply:
        return Reply({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.7"}) if hit == 1 else echo(body, hit)

    with chat_server(busy) as server:
        answers, _ = ask(server.url, tmp_path, ["a"])
        assert answers[0].value == "RE A"
        assert server.times[1] - server.times[0] >= 0.7


@pytest.mark.parametrize("trouble", ["500", "503", "429", "cut", "html"])
def test_a_case_in_trouble_is_a_counted_failure_and_asked_again_next_time(tmp_path: Path, trouble: str) -> None:
    well = False

    def script(body: dict[str, Any], hit: int) -> Reply:
        if body["messages"][0]["content"] == "bad" and not well:
            if trouble == "html":
                return Reply(b"<html>gateway</html>", headers={"Content-Type": "text/html"})
            return Reply(completion("x" * 100), cut=True) if trouble == "cut" else Reply({"error": {}}, int(trouble))
        return echo(body, hit)

    with chat_server(script) as server:
        answers, usage = ask(server.url, tmp_path, ["a", "bad", "b"])
        assert [answer.value for answer in answers] == ["RE A", None, "RE B"]
        reason = {"cut": "no connection, or it was cut", "html": "not a chat completion"}.get(
            trouble, f"HTTP {trouble}"
        )
        assert answers[1].failure == reason
        assert usage["failed"] == 1
        assert server.hits == (3 if trouble == "html" else 5)  # with two retries by the openai client
        well = True
        answers, usage = ask(server.url, tmp_path, ["a", "bad", "b"])
        assert [answer.value for answer in answers] == ["RE A", "RE BAD", "RE B"]
        assert server.hits == (4 if trouble == "html" else 6)


def test_errors_that_pass_are_retried(tmp_path: Path) -> None:
    def script(body: dict[str, Any], hit: int) -> Reply:
        trouble = {1: Reply({}, 500), 2: Reply(completion(), cut=True), 3: Reply(completion(), delay=1.0)}
        return trouble.get(hit) or echo(body, hit)

    with chat_server(script) as server:
        answers, _ = ask(server.url, tmp_path, ["a"], timeout=0.3, max_retries=3)
        assert (answers[0].value, server.hits) == ("RE A", 4)


def test_a_time_out_is_counted(tmp_path: Path) -> None:
    with chat_server(lambda body, hit: Reply(completion(), delay=0.8)) as server:
        answers, _ = ask(server.url, tmp_path, ["a"], timeout=0.2, max_retries=0)
        assert answers[0].failure == "time-out (0.2 s)"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (completion(None, refusal="I cannot help with that"), "refused"),
        (completion("half", finish_reason="content_filter"), "content filter"),
        (completion("half", finish_reason="length"), "cut at max_tokens"),
        (completion(None), "no text in the answer"),
    ],
)
def test_an_answer_without_use_is_stored_too_and_asked_again_on_order(
    tmp_path: Path, body: dict[str, Any], reason: str
) -> None:
    with chat_server(lambda _, hit: Reply(body if hit == 1 else completion("ok"))) as server:
        assert ask(server.url, tmp_path, ["a"])[0][0].failure == reason
        answers, usage = ask(server.url, tmp_path, ["a"])
        assert (answers[0].failure, server.hits, usage["failed"]) == (reason, 1, 1)
        assert ask(server.url, tmp_path, ["a"], retry_failed=True)[0][0].value == "OK"
        assert ask(server.url, tmp_path, ["a"])[0][0].value == "OK"  # the later answer holds
        assert server.hits == 2


@pytest.mark.parametrize(
    "body",
    [[], {}, {"choices": []}, completion(7), completion([]), {"choices": [{"message": None}]}, b"", b"{", b"[" * 9000],
    ids=lambda body: str(body)[:30],
)  # fmt: skip
def test_what_is_no_completion_is_not_stored(tmp_path: Path, body: Any) -> None:
    with chat_server(lambda _, hit: Reply(body)) as server:
        answers, _ = ask(server.url, tmp_path, ["a"])
        assert answers[0].failure == "not a chat completion"
        assert server.hits == 1
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_server_that_is_down_ends_the_asking_and_keeps_what_there_is(tmp_path: Path) -> None:
    with chat_server(echo) as server:
        ask(server.url, tmp_path, ["t0", "t1"])
    answers, usage = ask(server.url, tmp_path, [f"t{i}" for i in range(200)], max_retries=0, concurrency=2)
    assert [answer.value for answer in answers[:2]] == ["RE T0", "RE T1"]
    reasons = [answer.failure for answer in answers[2:]]
    assert set(reasons) == {
        "no connection, or it was cut",
        "not asked, since the calls before failed: no connection, or it was cut",
    }
    assert 8 <= reasons.count("no connection, or it was cut") <= 10
    assert usage["failed"] == 198


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (401, {"code": "invalid_api_key", "message": SECRET}, "HTTP 401 invalid_api_key"),
        (404, {"code": "model_not_found"}, "HTTP 404 model_not_found"),
        (429, {"code": "insufficient_quota"}, "HTTP 429 insufficient_quota"),
        (403, {"code": "told you: " + SECRET}, "HTTP 403"),
    ],
)
def test_what_no_repetition_mends_is_not_repeated(tmp_path: Path, status: int, error: Any, reason: str) -> None:
    with chat_server(lambda body, hit: Reply({"error": error}, status)) as server:
        answers, _ = ask(server.url, tmp_path, [f"t{i}" for i in range(50)], concurrency=2, max_retries=1)
        assert server.hits <= 4
        assert answers[0].failure == reason
        assert answers[-1].failure == f"not asked, since the calls before failed: {reason}"


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_calls_at_once_than_allowed(tmp_path: Path, limit: int) -> None:
    with chat_server(lambda body, hit: Reply(completion(), delay=0.03)) as server:
        ask(server.url, tmp_path, [f"t{i}" for i in range(15)], concurrency=limit)
        assert server.most_at_once == limit


CHILD = """
import sys
from radllama.client import Call, Client
texts = [f"t{i}" for i in range(30)]
bodies = [{"model": "tiny", "messages": [{"role": "user", "content": text}]} for text in texts]
client = Client("tiny", url=sys.argv[1], cache=sys.argv[2], concurrency=3)
answers = client.ask([Call(body, str, 5) for body in bodies])
print(sum(answer.value is not None for answer in answers), client.usage()["answered_now"])
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    def slowly(body: dict[str, Any], hit: int) -> Reply:
        return Reply(completion(), delay=0.1 if hit > 12 else 0)

    def start(url: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD, url, str(tmp_path)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)

    file = tmp_path / "answers.jsonl"
    with chat_server(slowly) as server:
        child = start(server.url)
        while not file.exists() or file.read_bytes().count(b"\n") < 14:
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        stored, hits = file.read_bytes().count(b"\n"), server.hits
        assert stored < 30
        out, _ = start(server.url).communicate(timeout=60)
        assert out.split() == ["30", str(30 - stored)]
        assert server.hits - hits == 30 - stored


def test_a_torn_line_is_skipped_and_the_next_starts_anew(tmp_path: Path) -> None:
    with chat_server(echo) as server:
        ask(server.url, tmp_path, ["a", "b"])
        file = tmp_path / "answers.jsonl"
        first, second = file.read_bytes().splitlines()
        file.write_bytes(b'{"key": 3}\n[]\n' + first + b"\n" + second[:40])
        answers, usage = ask(server.url, tmp_path, ["a", "b"])
        assert [answer.value for answer in answers] == ["RE A", "RE B"]
        assert (server.hits, usage["damaged_cache_lines"]) == (3, 3)
        assert ask(server.url, tmp_path, ["a", "b"])[1]["from_cache"] == 2
        assert file.stat().st_mode & 0o077 == 0


def test_the_key_is_sent_and_stands_nowhere_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    spelt = json.dumps(SECRET).replace("s", "\\u0073").encode()  # the key, so that it is not seen in the bytes
    replies = [
        Reply({"error": {"message": f"wrong key {SECRET}", "code": SECRET, "type": SECRET}}, 400),
        Reply(completion(f"your key is {SECRET}", model=SECRET, system_fingerprint=SECRET)),
        Reply(json.dumps(completion("KEY")).encode().replace(b'"KEY"', spelt)),
        Reply({"error": SECRET}, 500),
    ]
    with chat_server(lambda body, hit: replies[int(body["messages"][0]["content"])]) as server:
        client = cl.Client("tiny", url=server.url, cache=tmp_path / "cache", max_retries=1)
        calls = [call(str(i)) for i in range(4)]
        answers = client.ask(calls)
        client.write_batch([call("new")], tmp_path / "batch.jsonl")
        assert server.headers[0]["authorization"] == f"Bearer {SECRET}"
    assert answers[1].value == "YOUR KEY IS [KEY]"
    assert answers[2].value == "[KEY]"
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    shown = [repr(answers), repr(client.usage()), repr(client.plan(calls)), caplog.text, *capfd.readouterr()]
    shown += [str(record.__dict__) for record in caplog.records]
    assert b"[key]" in written
    assert SECRET.encode() not in written
    assert not [text for text in shown if SECRET in text]


def test_a_key_with_odd_characters_is_refused_unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-märker-123456")
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as caught:
        cl.Client("tiny", cache=tmp_path)
    assert "rker" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost/v1", True),
        ("http://[::1]:8000/v1", True),
        ("https://127.9.9.9", True),
        ("https://api.openai.com/v1", False),
        ("http://localhost.example.com/v1", False),
        ("http://127.0.0.1.example.com/v1", False),
        ("http://0.0.0.0:8000/v1", False),
        ("http://10.0.0.5:8000/v1", False),
        ("http://127.1/v1", False),
    ],
)
def test_which_servers_are_on_this_machine(url: str, expected: bool) -> None:
    assert cl.is_loopback(cl.check_url(url)) is expected


@pytest.mark.parametrize(
    "url", ["api.openai.com/v1", "ftp://127.0.0.1/v1", "http:///v1", "http://127.0.0.1:99999/v1", f"http://u:{SECRET}@h/v1",
            f"https://host/v1?key={SECRET}"],
)  # fmt: skip
def test_an_address_that_is_none_or_holds_a_secret(url: str) -> None:
    with pytest.raises(ValueError, match="address") as caught:
        cl.check_url(url)
    assert SECRET not in str(caught.value)


def test_nothing_leaves_without_confirmation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = cl.Client("tiny", url="http://192.0.2.1:9/v1", cache=tmp_path)
    with pytest.raises(ValueError, match="--i-confirm-deidentified"):
        client.ask([call()])
    with pytest.raises(ValueError, match="--i-confirm-deidentified"):
        client.write_batch([call()], tmp_path / "batch.jsonl")
    assert not (tmp_path / "batch.jsonl").exists()
    assert client.plan([call()])["calls"] == 1
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        cl.Client("tiny", url="http://192.0.2.1:9/v1", cache=tmp_path, confirmed=True).ask([call()])
    with chat_server(echo) as server:  # a server on this machine needs no key
        assert ask(server.url, tmp_path, ["a"])[0][0].value == "RE A"


def test_redirects_are_not_followed_and_no_proxy_stands_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with chat_server(echo) as outside:
        there = {"Location": outside.url + "/chat/completions"}
        with chat_server(lambda body, hit: Reply({}, 307, there)) as server:
            assert ask(server.url, tmp_path, ["a"])[0][0].failure == "HTTP 307"
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, outside.url.removesuffix("/v1"))
        with chat_server(echo) as server:
            assert ask(server.url, tmp_path, ["a"])[0][0].value == "RE A"
        assert outside.hits == 0


# ---- prices


def test_prices(tmp_path: Path) -> None:
    def plan(model: str, **options: Any) -> dict[str, Any]:
        client = cl.Client(model, cache=tmp_path, **options)
        return client.plan([cl.Call(call("x" * 4000).body | {"model": model}, str, expected_tokens=100)])

    known = plan("gpt-4o")
    assert (known["calls"], known["prompt_tokens"], known["completion_tokens"]) == (1, 1000, 100)
    assert known["cost"] == pytest.approx((1000 * 2.5 + 100 * 10) / 1e6)
    assert known["cost_at_most"] == pytest.approx((1000 * 2.5 + 50 * 10) / 1e6)  # max_tokens is 50
    assert known["cost_batch"] == pytest.approx(known["cost"] / 2)
    for odd in (plan("gpt-4o-2030-01-01"), plan("gpt-4"), plan("gpt-4o", url="http://127.0.0.1:1/v1")):
        assert odd["cost"] is odd["cost_at_most"] is odd["cost_batch"] is None
    table = tmp_path / "prices.json"
    table.write_text('{"gpt-4o": {"input": 1, "output": 2}, "own": {"input": 0, "output": 0}}')
    mine = plan("gpt-4o", prices=table)
    assert mine["cost"] == pytest.approx((1000 + 200) / 1e6)
    assert mine["cost_batch"] is None
    assert plan("own", prices=table, url="http://127.0.0.1:1/v1")["cost"] == 0
    with chat_server(echo) as server:
        table.write_text('{"tiny": {"input": 3, "output": 7}}')
        assert ask(server.url, tmp_path, ["a", "b"], prices=table)[1]["cost"] == pytest.approx((200 * 3 + 20 * 7) / 1e6)
        usage = ask(server.url, tmp_path, ["a", "b"], prices=table)[1]
        assert (usage["cost"], usage["cost_total"]) == (0, pytest.approx((200 * 3 + 20 * 7) / 1e6))
        server.script = lambda body, hit: Reply(completion(usage=None))
        assert ask(server.url, tmp_path, ["c"], prices=table)[1]["cost"] is None  # a count is not known


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"m": 1}',
        '{"m": {"input": 1}}',
        '{"m": {"input": -1, "output": 1}}',
        '{"m": {"input": "1", "output": 1}}',
        '{"m": {"input": 1, "output": 1, "inptu_batch": 1}}',
        '{"m": {"input": true, "output": NaN}}',
    ],
)
def test_a_bad_price_table_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=r"p\.json"):
        cl.Client("m", cache=tmp_path, prices=tmp_path / "p.json")


def test_settings_go_into_the_request_and_null_takes_out() -> None:
    body = {"model": "m", "temperature": 0, "max_tokens": 9}
    changed = cl.with_settings(body, {"temperature": None, "reasoning_effort": "low"})
    assert changed == {"model": "m", "max_tokens": 9, "reasoning_effort": "low"}


@pytest.mark.parametrize(
    "options", [{"concurrency": 0}, {"timeout": 0.0}, {"max_retries": -1}, {"settings": {"messages": []}}]
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|settings"):
        cl.Client("m", cache=tmp_path, **options)


# ---- the Batch API


def line(key: str, content: str = "yes", **changes: Any) -> dict[str, Any]:
    response = {"status_code": 200, "request_id": "r", "body": completion(content)}
    return {"id": "b", "custom_id": key, "response": response, "error": None} | changes


def batch_file(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_batch_there_and_back(tmp_path: Path) -> None:
    texts = [f"t{i}" for i in range(8)]
    calls = [call(text) for text in texts]
    with chat_server(echo) as server:
        ask(server.url, tmp_path / "cache", ["t0"])
        client = cl.Client("tiny", url=server.url, cache=tmp_path / "cache")
        assert client.write_batch(calls, tmp_path / "out.jsonl") == [tmp_path / "out.jsonl"]
        rows = [json.loads(row) for row in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [row["body"]["messages"][0]["content"] for row in rows] == texts[1:]  # t0 has its answer
        assert all((row["method"], row["url"]) == ("POST", "/v1/chat/completions") for row in rows)
        assert all(row.keys() == {"custom_id", "method", "url", "body"} and len(row["custom_id"]) <= 64 for row in rows)
        key = {text: row["custom_id"] for text, row in zip(texts[1:], rows, strict=True)}
        output = [
            line(key["t5"]),
            line(key["t1"]),
            line(key["t2"], "one"),
            line(key["t2"], "another"),
            line(key["t3"], "same"),
            line(key["t3"], "same"),
            line(key["t4"], response={"status_code": 500, "body": {}}),
            "{torn",
            line("unknown"),
            line(key["t7"], response={"status_code": 200, "body": {"choices": "none"}}),
        ]  # t6 is missing
        problems = client.read_batch(calls, [batch_file(tmp_path / "in.jsonl", output)])
        answers = client.ask(calls)
        assert [answer.value for answer in answers] == ["RE T0", "YES", None, "SAME", None, "YES", None, None]
        assert [answer.failure for answer in answers] == [
            None,
            None,
            "answered twice in the batch file, differently",
            None,
            "HTTP 500 in the batch",
            None,
            "not in the batch file",
            "not a chat completion",
        ]
        assert len(problems) == 2
        assert "in.jsonl line 8" in problems[0]
        assert "1 lines" in problems[1]
        assert client.usage()["failed"] == 4
        assert server.hits == 1  # nothing was asked
        client.close()
        answers, usage = ask(server.url, tmp_path / "cache", texts)  # later, without the batch: what lacks is asked for
        assert [answer.value for answer in answers][3:] == ["SAME", "RE T4", "YES", "RE T6", "RE T7"]
        assert (server.hits, usage["from_cache"], usage["answered_now"]) == (5, 4, 4)


def test_a_batch_costs_the_batch_price(tmp_path: Path) -> None:
    client = cl.Client("gpt-4o", cache=tmp_path, confirmed=True)
    one = cl.Call(call().body | {"model": "gpt-4o"}, str, 5)
    client.read_batch([one], [batch_file(tmp_path / "in.jsonl", [line(client.key(one.body))])])
    client.ask([one])
    assert client.usage()["cost"] == pytest.approx((100 * 1.25 + 10 * 5) / 1e6)


def test_a_long_batch_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = cl.Client("tiny", url="http://127.0.0.1:1/v1", cache=tmp_path)
    calls = [call(f"t{i}") for i in range(7)]
    monkeypatch.setattr(cl, "BATCH_CALLS", 3)
    files = client.write_batch(calls, tmp_path / "out.jsonl")
    assert [file.name for file in files] == ["out.jsonl", "out-2.jsonl", "out-3.jsonl"]
    assert [file.read_text().count("\n") for file in files] == [3, 3, 1]
    size = len(files[2].read_bytes())
    monkeypatch.setattr(cl, "BATCH_BYTES", 2 * size)
    assert [f.read_text().count("\n") for f in client.write_batch(calls, tmp_path / "b.jsonl")] == [2, 2, 2, 1]
    assert client.write_batch([], tmp_path / "none.jsonl") == []


def test_a_batch_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.jsonl"):
        cl.Client("tiny", url="http://127.0.0.1:1/v1", cache=tmp_path).read_batch([], [tmp_path / "gone.jsonl"])
