"""Calls to a chat model that cost money: asked once, kept on disk, counted and priced, and never sent unasked.

Any OpenAI-compatible server. The openai client does the retries with back-off and Retry-After. Every answer is
appended to `answers.jsonl` in the cache folder as it arrives, under the hash of server, model, prompt and settings: a
stopped run goes on where it was, and a second run asks nothing. A call that fails has a reason and no value. The Batch
API's files are another way of filling the same cache.

The key comes from OPENAI_API_KEY and goes nowhere but into the request. What a server says in an error is not repeated,
since it may hold the key or a report.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from radllama.files import replace_text

OPENAI = "https://api.openai.com/v1"
MILLION = 1_000_000
BATCH_CALLS, BATCH_BYTES = 50_000, 190 * MILLION  # a file of the Batch API: at most 50,000 requests and 200 MB
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError)  # what odd JSON leads to
HOPELESS = (401, 403, 404)  # no second call will fare better
KNOWN_CODES = ("insufficient_quota", "context_length_exceeded", "model_not_found", "invalid_api_key", "content_filter")


class Invalid(ValueError):
    """An answer that cannot be used; the text is the reason and quotes nothing of the answer."""


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens; None where the price is not known."""

    input: float
    output: float
    batch_input: float | None = None
    batch_output: float | None = None


# OpenAI's list prices, as several price lists gave them in mid-2026, and half of that in a batch. They hold at
# OPENAI alone and for exactly these names; --prices overrides them.
PRICES = {
    name: Price(cost_in, cost_out, cost_in / 2, cost_out / 2)
    for name, cost_in, cost_out in (
        ("gpt-4o", 2.50, 10.00),
        ("gpt-4o-2024-05-13", 5.00, 15.00),
        ("gpt-4o-2024-08-06", 2.50, 10.00),
        ("gpt-4o-2024-11-20", 2.50, 10.00),
        ("gpt-4o-mini", 0.15, 0.60),
        ("gpt-4o-mini-2024-07-18", 0.15, 0.60),
        ("gpt-4.1", 2.00, 8.00),
        ("gpt-4.1-mini", 0.40, 1.60),
    )
}


@dataclass(frozen=True)
class Call:
    """One request. `check` turns the answer's text into a value, or raises Invalid."""

    body: dict[str, Any]
    check: Callable[[str], Any]
    expected_tokens: int  # of the answer, for the estimate alone
    may_be_cut: bool = False  # whether an answer cut at max_tokens is still of use


@dataclass(frozen=True)
class Answer:
    """What became of a call: a value, or the reason why there is none; `record` is what the cache holds."""

    value: Any = None
    failure: str | None = None
    record: dict[str, Any] | None = None


def check_url(url: str | None) -> str:
    """The server's base address without a slash at its end; ValueError where it is none, or carries a secret."""
    base = (url or OPENAI).rstrip("/")
    try:
        parts = urlsplit(base)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good:
        raise ValueError("the server's address must look like https://host/v1 or http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("the server's address must hold no user, key or query; the key comes from OPENAI_API_KEY")
    return base


def is_loopback(url: str) -> bool:
    """Whether an address stays on this machine: localhost, 127.0.0.0/8 or ::1, written as such."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_prices(path: str | Path) -> dict[str, Price]:
    """A price table: {"model": {"input": dollars per million tokens, "output": ..., "batch_input"?: ..., ...}}."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not valid JSON; expected an object of models with their prices") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path}: expected an object of models with their prices")
    prices = {}
    for model, entry in table.items():
        given = entry if isinstance(entry, dict) else {}
        if not {"input", "output"} <= set(given) <= set(Price.__dataclass_fields__) or not all(
            type(value) in (int, float) and 0 <= value < float("inf") for value in given.values()
        ):
            raise ValueError(
                f'{path}: {model}: expected {{"input": 2.5, "output": 10}} in dollars per million tokens, and perhaps '
                "batch_input and batch_output"
            )
        prices[model] = Price(**{key: float(value) for key, value in given.items()})
    return prices


def estimate_tokens(body: dict[str, Any]) -> int:
    """Prompt tokens of a request, roughly: UTF-8 bytes of messages and schema over four, OpenAI's rule of thumb."""
    texts = [message["content"] for message in body["messages"]]
    texts += [json.dumps(body["response_format"])] if "response_format" in body else []
    return sum(-(-len(text.encode()) // 4) for text in texts)


def with_settings(body: dict[str, Any], settings: dict[str, Any] | None) -> dict[str, Any]:
    """A request with the user's settings over ours; None takes a setting out (some models know no temperature)."""
    changed = body | dict(sorted((settings or {}).items()))
    return {key: value for key, value in changed.items() if value is not None}


class Store:
    """The answers on disk, one JSON object a line, by key; a later line wins. Lines that are torn are skipped."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "answers.jsonl"
        self.records: dict[str, dict[str, Any]] = {}
        self.damaged = 0
        self._lock, self._file = threading.Lock(), -1
        try:
            data = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read ({error.strerror}); check --cache") from None
        self._torn = bool(data) and not data.endswith(b"\n")  # the last run was killed while it wrote
        for line in data.splitlines():
            try:
                record = json.loads(line)
                if not record.keys() >= {"content", "finish_reason"}:
                    raise TypeError
                self.records[record["key"]] = record
            except MALFORMED:
                self.damaged += bool(line.strip())

    def add(self, record: dict[str, Any]) -> None:
        """Append one line by a single write, so that runs side by side do not mix theirs."""
        line = json.dumps(record).encode() + b"\n"
        with self._lock:
            if self._file < 0:
                self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            line, self._torn = b"\n" * self._torn + line, False
            if os.write(self._file, line) < len(line):
                raise OSError(f"{self.path}: the disk is full; the answers before are kept")
            self.records[record["key"]] = record

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class Client:
    """Asks one model at one server, `concurrency` calls at a time, and keeps, counts and prices the answers."""

    def __init__(
        self,
        model: str,
        *,
        cache: str | Path,
        url: str | None = None,
        confirmed: bool = False,
        concurrency: int = 8,
        timeout: float = 120.0,
        max_retries: int = 6,
        prices: str | Path | None = None,
        settings: dict[str, Any] | None = None,
        retry_failed: bool = False,
    ) -> None:
        """`confirmed`: the user said that the texts are de-identified. `settings` go into every request, None takes one
        out. `retry_failed`: ask again where the stored answer is a refusal or invalid. `timeout` in seconds."""
        if concurrency < 1 or max_retries < 0 or not timeout > 0 or not model.strip():
            raise ValueError(
                "expected a model's name, concurrency >= 1, max_retries >= 0 and a timeout above 0 seconds"
            )
        if reserved := {"model", "messages", "response_format", "stream", "n"} & set(settings or {}):
            raise ValueError(f"settings: {', '.join(sorted(reserved))} cannot be set; they are part of the method")
        self.model, self.url, self.confirmed = model, check_url(url), confirmed
        self.concurrency, self.timeout, self.max_retries = concurrency, timeout, max_retries
        self.settings, self.retry_failed = dict(settings or {}), retry_failed
        known = PRICES if self.url == OPENAI else {}  # a server elsewhere may call anything gpt-4o
        self.price = (known | (read_prices(prices) if prices else {})).get(model)
        self.store = Store(cache)
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if self._key and not (self._key.isascii() and self._key.isprintable() and not set(self._key) & set(' "\\')):
            raise ValueError("OPENAI_API_KEY: holds a character that no key has; set it again")
        self._batch: dict[str, str] | None = None  # after read_batch: why a call has no answer
        self._lock, self._stopped, self._failing = threading.Lock(), "", 0
        self._openai: Any = None
        self._new: dict[str, dict[str, Any]] = {}  # what this run received
        self._seen: set[str] = set()
        self._failed: set[str] = set()

    def key(self, body: dict[str, Any]) -> str:
        """The name of an answer: a hash of the server, the model, the prompt and the settings."""
        return hashlib.sha256(json.dumps([self.url, body]).encode()).hexdigest()

    def require_permission(self, *, to_send: bool = True) -> None:
        """ValueError unless the server is on this machine or the user has confirmed, and has given a key."""
        if is_loopback(self.url):
            return
        if not self.confirmed:
            raise ValueError(
                f"{self.url} is not on this machine, and report texts would go there: confirm with "
                "--i-confirm-deidentified that they are de-identified, or name a server on this machine "
                "(http://127.0.0.1:PORT/v1)"
            )
        if to_send and not self._key:
            raise ValueError("OPENAI_API_KEY is not set; put the server's key there")

    # ---- one call

    def _connect(self) -> Any:
        with self._lock:
            if self._openai is None:
                from openai import DefaultHttpxClient, OpenAI  # here: it takes a second, and most runs have no judge

                # No redirects, and no proxy to reach this very machine: the text goes to the server named, or nowhere.
                http = DefaultHttpxClient(
                    follow_redirects=False, trust_env=not is_loopback(self.url), timeout=self.timeout
                )
                self._openai = OpenAI(
                    api_key=self._key or "none", base_url=self.url, max_retries=self.max_retries,
                    timeout=self.timeout, http_client=http)  # fmt: skip
        return self._openai

    def _post(self, body: dict[str, Any]) -> tuple[dict[str, Any] | None, str, bool]:
        """(record, "", False), or (None, why it failed, whether all others will fail too)."""
        import openai

        rest = {key: value for key, value in body.items() if key not in ("model", "messages")}
        try:
            raw = self._connect().chat.completions.with_raw_response.create(
                model=body["model"], messages=body["messages"], extra_body=rest
            )
            return self._record(json.loads(raw.content)), "", False
        except openai.APITimeoutError:
            return None, f"time-out ({self.timeout:g} s)", False
        except openai.APIConnectionError:
            return None, "no connection, or it was cut", False
        except openai.APIStatusError as error:
            code = error.code if error.code in KNOWN_CODES else ""
            hopeless = error.status_code in HOPELESS or code == "insufficient_quota"
            return None, f"HTTP {error.status_code}" + f" {code}" * bool(code), hopeless
        except (openai.OpenAIError, *MALFORMED):
            return None, "not a chat completion", False

    def _record(self, completion: Any) -> dict[str, Any]:
        """The parts of a completion that are kept; raises where it is none."""

        def text(value: Any) -> str | None:  # a server might send the key back
            if value is not None and not isinstance(value, str):
                raise TypeError
            return value.replace(self._key, "[key]") if value and self._key else value

        def count(value: Any) -> int | None:
            return value if type(value) is int and value >= 0 else None

        choice = completion["choices"][0]
        message, usage = choice["message"], completion.get("usage") or {}
        return {
            "content": text(message.get("content")),
            "refusal": text(message.get("refusal")),
            "finish_reason": text(choice.get("finish_reason")),
            "model": text(completion.get("model")),
            "system_fingerprint": text(completion.get("system_fingerprint")),
            "prompt_tokens": count(usage.get("prompt_tokens")),
            "completion_tokens": count(usage.get("completion_tokens")),
        }

    def _fetch(self, key: str, call: Call) -> Answer:
        if self._stopped:
            return Answer(failure=self._stopped)
        record, why, hopeless = self._post(call.body)
        with self._lock:
            if record is None:
                self._failing += 1
                if hopeless or self._failing >= max(8, 2 * self.concurrency):
                    self._stopped = f"not asked, since the calls before failed: {why}"
                return Answer(failure=why)
            self._failing = 0
        return self._keep(key, call, record)

    def _keep(self, key: str, call: Call, record: dict[str, Any]) -> Answer:
        record = {"key": key, **record}
        self.store.add(record)
        self._new[key] = record
        return read_record(record, call)

    # ---- many calls

    def ask(self, calls: Sequence[Call], name: str = "calls") -> list[Answer]:
        """An answer for each call, in their order; equal calls are asked once. Stored answers cost nothing.

        After failures that no repetition mends (key, model, quota) or many in a row, the rest is not asked."""
        keys = [self.key(call.body) for call in calls]
        distinct = dict(zip(keys, calls, strict=True))
        answers = {key: self._stored(key, call) for key, call in distinct.items()}
        if self._batch is not None:
            answers = {
                key: answer or Answer(failure=self._batch.get(key, "not in the batch file"))
                for key, answer in answers.items()
            }
        todo = [key for key, answer in answers.items() if answer is None]
        if todo:
            self.require_permission()
            pool = ThreadPoolExecutor(self.concurrency)
            try:
                running = {pool.submit(self._fetch, key, distinct[key]): key for key in todo}
                for done in tqdm(as_completed(running), name, total=len(todo), disable=None, leave=False):
                    answers[running[done]] = done.result()
            finally:  # after Ctrl-C, too: what is under way is paid for, and still stored
                pool.shutdown(wait=True, cancel_futures=True)
        self._seen.update(distinct)
        found = {key: answer or Answer(failure="not asked") for key, answer in answers.items()}
        self._failed.update(key for key, answer in found.items() if answer.failure)
        return [found[key] for key in keys]

    def _stored(self, key: str, call: Call) -> Answer | None:
        record = self.store.records.get(key)
        answer = read_record(record, call) if record else None
        again = answer is not None and answer.failure and self.retry_failed and key not in self._new
        return None if again else answer

    def plan(self, calls: Iterable[Call]) -> dict[str, Any]:
        """What `ask` would cost, nothing sent: calls, tokens and dollars (None: the price is not known)."""
        distinct = {self.key(call.body): call for call in calls}
        todo = [call for key, call in distinct.items() if self._stored(key, call) is None]
        prompt = sum(estimate_tokens(call.body) for call in todo)
        expected = sum(call.expected_tokens for call in todo)
        limits = [call.body.get("max_tokens", call.body.get("max_completion_tokens")) for call in todo]
        most = None if None in limits else sum(int(limit or 0) for limit in limits)
        return {
            "model": self.model,
            "url": self.url,
            "calls": len(todo),
            "stored": len(distinct) - len(todo),
            "prompt_tokens": prompt,
            "completion_tokens": expected,
            "cost": self._dollars(prompt, expected),
            "cost_at_most": None if most is None else self._dollars(prompt, most),
            "cost_batch": self._dollars(prompt, expected, batch=True),
        }

    def _dollars(self, prompt: int | None, completion: int | None, *, batch: bool = False) -> float | None:
        if self.price is None or prompt is None or completion is None:
            return None
        each = (self.price.batch_input, self.price.batch_output) if batch else (self.price.input, self.price.output)
        return None if None in each else (prompt * (each[0] or 0) + completion * (each[1] or 0)) / MILLION

    def usage(self) -> dict[str, Any]:
        """What this client has asked so far: distinct calls, tokens, dollars, and who answered.

        `cost` is this run's, `cost_total` that of all the answers used. None: a price or a count is not known."""

        def total(records: Iterable[dict[str, Any]]) -> float | None:
            each = [
                self._dollars(r.get("prompt_tokens"), r.get("completion_tokens"), batch=bool(r.get("batch")))
                for r in records
            ]
            return None if None in each else sum(cost for cost in each if cost is not None)

        used = [self.store.records[key] for key in sorted(self._seen) if key in self.store.records]
        new = list(self._new.values())
        return {
            "model": self.model,
            "url": self.url,
            "calls": len(self._seen),
            "answered_now": len(new),
            "from_cache": len(used) - sum(key in self._new for key in self._seen),
            "failed": len(self._failed),
            "prompt_tokens": sum(record.get("prompt_tokens") or 0 for record in new),
            "completion_tokens": sum(record.get("completion_tokens") or 0 for record in new),
            "price": None if self.price is None else [self.price.input, self.price.output],
            "cost": total(new),
            "cost_total": total(used),
            "answered_by": _tally(used, "model"),
            "fingerprints": _tally(used, "system_fingerprint"),
            "damaged_cache_lines": self.store.damaged,
        }

    # ---- the Batch API

    def write_batch(self, calls: Iterable[Call], path: str | Path) -> list[Path]:
        """Write the calls without an answer as files for the Batch API; none where every call has one."""
        self.require_permission(to_send=False)
        distinct = {self.key(call.body): call for call in calls}
        files: list[list[str]] = [[]]
        size = 0
        for key, call in distinct.items():
            if self._stored(key, call) is not None:
                continue
            request = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": call.body}
            line = json.dumps(request) + "\n"
            if len(files[-1]) == BATCH_CALLS or (files[-1] and size + len(line) > BATCH_BYTES):
                files.append([])
                size = 0
            files[-1].append(line)
            size += len(line)
        path, written = Path(path), []
        for number, lines in enumerate(files if files[0] else [], 1):
            target = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
            replace_text(target, "".join(lines), private=True)
            written.append(target)
        return written

    def read_batch(self, calls: Iterable[Call], paths: Iterable[str | Path]) -> list[str]:
        """Take the answers out of the Batch API's output and error files into the cache; returns the problems found.

        From then on this client asks nothing: a call without an answer has failed, with its reason."""
        wanted = {self.key(call.body): call for call in calls}
        answers: dict[str, list[dict[str, Any] | str]] = {}
        problems, unknown = [], 0
        for path in map(Path, paths):
            try:
                lines = path.read_bytes().splitlines()
            except OSError as error:
                raise ValueError(
                    f"{path}: cannot be read ({error.strerror}); give the file of a finished batch"
                ) from None
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    key = row["custom_id"]
                    known = key in wanted
                except MALFORMED:
                    problems.append(
                        f"{path} line {number}: not a line of a batch's output (invalid JSON or no custom_id)"
                    )
                    continue
                unknown += not known
                if known:
                    answers.setdefault(key, []).append(self._batch_answer(row))
        self._batch = {}
        for key, found in answers.items():
            first = found[0]
            if any(other != first for other in found):
                self._batch[key] = "answered twice in the batch file, differently"
            elif isinstance(first, str):
                self._batch[key] = first
            elif self._stored(key, wanted[key]) is None:
                self._keep(key, wanted[key], first | {"batch": True})
        if unknown:
            problems.append(f"{unknown} lines of the batch files answer calls that this run does not make; left alone")
        return problems

    def _batch_answer(self, row: Any) -> dict[str, Any] | str:
        """The record in a line of a batch's output, or why there is none."""
        response = row.get("response") if isinstance(row.get("response"), dict) else {}
        status = response.get("status_code")
        if row.get("error") or status != 200:
            return f"HTTP {status} in the batch" if type(status) is int else "failed or expired in the batch"
        try:
            return self._record(response["body"])
        except MALFORMED:
            return "not a chat completion"

    def close(self) -> None:
        if self._openai is not None:
            self._openai.close()
            self._openai = None
        self.store.close()


def _tally(records: Iterable[dict[str, Any]], key: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in records:
        name = record.get(key) or "not given"
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def read_record(record: dict[str, Any], call: Call) -> Answer:
    """The value of a stored answer, or the reason why it has none."""
    finish = record.get("finish_reason")
    if record.get("refusal"):
        return Answer(failure="refused", record=record)
    if finish == "content_filter":
        return Answer(failure="content filter", record=record)
    if finish == "length" and not call.may_be_cut:
        return Answer(failure="cut at max_tokens", record=record)
    if not isinstance(record.get("content"), str):
        return Answer(failure="no text in the answer", record=record)
    try:
        return Answer(value=call.check(record["content"]), record=record)
    except Invalid as error:
        return Answer(failure=str(error), record=record)
