"""A language model as a judge of impressions: absolute scores, clinical errors, and pairs of systems.

Any OpenAI-compatible server answers (`client.py` asks, keeps and prices). The judge sees findings, reference and one
candidate, never which system wrote it; the texts travel as one JSON object, so that no report can pass for an
instruction. Answers follow a strict JSON schema and are validated again here. A failed case has no score and is listed.

The texts of a whole run are screened for identifiers first, and one that is found stops it.

    python -m radllama.judge predict --input pairs.jsonl --model gpt-4o --instruction "..." --output gpt-4o.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

from pydantic import BaseModel

from radllama import deid, rubric
from radllama.client import Answer, Call, Client, with_settings
from radllama.files import read_rows, write_rows

Case = Mapping[str, Any]  # id, findings, reference


def _call(client: Client, system: str, texts: dict[str, str], model: type[BaseModel], more: dict[str, Any]) -> Call:
    """A request whose case code, like all of it, depends on the texts alone: no id of a patient leaves, and equal
    texts are judged once."""
    code = "case-" + rubric.digest(texts)[:8]
    user = json.dumps({"case": code, **texts}, ensure_ascii=False)
    expected = more.pop("expected_tokens")
    messages = [_message("system", system), _message("user", user)]
    body = {"model": client.model, "messages": messages, "temperature": 0, "seed": 0, **more}
    return Call(with_settings(body, client.settings), partial(rubric.parse_answer, model, code), expected)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def absolute_call(client: Client, case: Case, candidate: str, seed: int = 0) -> Call:
    """The request that scores one impression."""
    order = int(rubric.digest(seed, case["findings"], case["reference"]), 16) % rubric.ORDERS
    system, schema = rubric.absolute_prompt(order)
    texts = {"findings": case["findings"], "reference": case["reference"], "candidate": candidate}
    more = {"max_tokens": rubric.ABSOLUTE_TOKENS, "response_format": schema, "expected_tokens": rubric.TYPICAL_ABSOLUTE}
    return _call(client, system, texts, rubric.Verdict, more)


def pair_call(client: Client, case: Case, first: str, second: str) -> Call:
    """The request that compares two impressions in this order."""
    texts = {"findings": case["findings"], "reference": case["reference"], "first": first, "second": second}
    more = {
        "max_tokens": rubric.PAIR_TOKENS,
        "response_format": rubric.PAIR_FORMAT,
        "expected_tokens": rubric.TYPICAL_PAIR,
    }
    return _call(client, rubric.COMPARE_PROMPT, texts, rubric.Preference, more)


# ---- before anything is sent


class IdentifiersFound(ValueError):
    """The screen found what looks like an identifier; `found` has (where, kinds), never a text."""

    def __init__(self, found: list[tuple[str, list[str]]]) -> None:
        self.found = found
        kinds = Counter(chain.from_iterable(kinds for _, kinds in found))
        lines = [f"{where}: {', '.join(kinds)}" for where, kinds in found[:20]]
        lines += [f"... and {len(found) - 20} more"] * (len(found) > 20)
        super().__init__(
            f"{len(found)} texts hold what looks like an identifier, so nothing was sent "
            f"({', '.join(f'{kind} {count}' for kind, count in kinds.most_common())}); "
            "de-identify them (radllama.deid), or leave these cases out\n  " + "\n  ".join(lines)
        )


def screen_texts(texts: Iterable[tuple[str, str]]) -> None:
    """Run the screen over (where, text) pairs; raises IdentifiersFound, or ValueError for text that is not Unicode."""
    known: dict[str, list[str]] = {}
    found = []
    for where, text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: holds half a surrogate pair, which is no text; repair the file") from None
        if text not in known:
            known[text] = list(dict.fromkeys(hit.kind for hit in deid.screen(text)))
        if known[text]:
            found.append((where, known[text]))
    if found:
        raise IdentifiersFound(found)


def _check_cases(cases: Sequence[Case], systems: Mapping[str, Sequence[str]], *, reference: bool = True) -> None:
    ids = [case["id"] for case in cases]
    if twice := [i for i, count in Counter(ids).items() if count > 1]:
        raise ValueError(f"duplicate ids: {', '.join(map(str, twice[:5]))}; keep one row for each case")
    for name, answers in systems.items():
        if len(answers) != len(cases):
            raise ValueError(f"system {name}: {len(answers)} predictions for {len(cases)} cases")
    for field in ("id", "findings", *(("reference",) if reference else ())):
        if bad := [i for i, case in zip(ids, cases, strict=True) if not str(case.get(field) or "").strip()]:
            raise ValueError(f"{field} is missing or empty in {len(bad)} cases: {', '.join(map(str, bad[:5]))}")


# ---- judging


def judge_systems(
    cases: Sequence[Case],
    systems: Mapping[str, Sequence[str]],
    client: Client,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    seed: int = 0,
    dry_run: bool = False,
    batch_out: str | Path | None = None,
    batch_in: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Judge the systems' predictions (one a case, in the cases' order) and compare `pairs` of systems, by default the
    first with each of the others; an empty list compares none.

    Returns, with one entry a case and None where the case failed or was not judged: `scores` {system: {criterion:
    [1..5]}}, `errors` {system: [[{statement, type, severity}]]}, `pairs` [{a, b, outcomes: [1 a better, 0 tie, -1 b
    better], wins_a, wins_b, ties, order_dependent, failed}]; and `failures` [{id, system, kind, reason}], `empty`
    {system: [ids]}, `usage` (see `Client.usage`), `signature`, `problems`.
    An empty prediction is not sent: it scores 1 by every criterion, has None for errors, and loses to any other.
    With `dry_run` or `batch_out` nothing is sent and the answer is `Client.plan`'s (with `files`).
    IdentifiersFound, a ValueError, lists what the screen found; no text is sent then.
    """
    _check_cases(cases, systems)
    names = list(systems)
    pairs = [(names[0], other) for other in names[1:]] if pairs is None else list(pairs)
    if unknown := {name for pair in pairs for name in pair} - set(names):
        raise ValueError(f"pairs: no such system: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if not (dry_run or batch_in):
        client.require_permission(to_send=batch_out is None)
    screen_texts(
        (f"{case['id']}, {field}", text)
        for i, case in enumerate(cases)
        for field, text in [
            ("findings", case["findings"]),
            ("reference", case["reference"]),
            *((f"prediction of {name}", systems[name][i]) for name in names),
        ]
    )

    wanted: dict[tuple[Any, ...], Call] = {}
    for i, case in enumerate(cases):
        for name in names:
            if systems[name][i].strip():
                wanted["score", name, i] = absolute_call(client, case, systems[name][i], seed)
        for a, b in pairs:
            one, other = systems[a][i], systems[b][i]
            if one.split() != other.split() and one.strip() and other.strip():
                wanted["pair", a, b, i, 0] = pair_call(client, case, one, other)
                wanted["pair", a, b, i, 1] = pair_call(client, case, other, one)
    order = list(wanted)
    Random(seed).shuffle(order)  # no system is judged at another hour, or by another fingerprint, than the rest
    calls = [wanted[key] for key in order]
    if dry_run:
        return client.plan(calls)
    if batch_out is not None:
        return client.plan(calls) | {"files": [str(path) for path in client.write_batch(calls, batch_out)]}
    problems = client.read_batch(calls, batch_in) if batch_in else []
    answers = dict(zip(order, client.ask(calls, "judge"), strict=True))

    result: dict[str, Any] = {
        "signature": signature(client, seed),
        "ids": [case["id"] for case in cases],
        "scores": {}, "errors": {}, "empty": {}, "pairs": [], "failures": [], "problems": problems,
    }  # fmt: skip
    for name in names:
        _collect_scores(result, name, systems[name], answers)
    for a, b in pairs:
        result["pairs"].append(_collect_pair(result, a, b, systems, answers))
    result["failure_counts"] = dict(Counter(failure["reason"] for failure in result["failures"]).most_common())
    return result | {"usage": client.usage()}


def signature(client: Client, seed: int) -> str:
    """Everything that the judge's figures depend on, but for the judge's own drift (see fingerprints)."""
    settings = json.dumps({"temperature": 0, "seed": 0} | client.settings, sort_keys=True)
    return (
        f"judge={client.model}|server={client.url}|rubric={rubric.RUBRIC}|settings={settings}|order-seed={seed}"
        f"|screen={deid.VERSION}"
    )


def _collect_scores(
    result: dict[str, Any], name: str, predictions: Sequence[str], answers: dict[tuple[Any, ...], Answer]
) -> None:
    scores: dict[str, list[int | None]] = {criterion: [] for criterion in rubric.CRITERIA}
    errors: list[list[dict[str, str]] | None] = []
    empty = []
    for i, case_id in enumerate(result["ids"]):
        answer = answers.get(("score", name, i))
        verdict: rubric.Verdict | None = answer.value if answer else None
        if answer is None:
            empty.append(case_id)
        elif answer.failure:
            result["failures"].append({"id": case_id, "system": name, "kind": "score", "reason": answer.failure})
        for criterion in rubric.CRITERIA:
            scores[criterion].append(1 if answer is None else getattr(verdict.scores, criterion) if verdict else None)
        errors.append([error.model_dump() for error in verdict.errors] if verdict else None)
    result["scores"][name], result["errors"][name], result["empty"][name] = scores, errors, empty


def _collect_pair(
    result: dict[str, Any], a: str, b: str, systems: Mapping[str, Sequence[str]],
    answers: dict[tuple[Any, ...], Answer]) -> dict[str, Any]:  # fmt: skip
    """A win needs the same verdict in both orders; one that turns with the order is a tie, and counted."""
    outcomes: list[int | None] = []
    first_chosen = order_dependent = asked = 0
    for i, case_id in enumerate(result["ids"]):
        both = [answers.get(("pair", a, b, i, swapped)) for swapped in (0, 1)]
        if both[0] is None or both[1] is None:  # not asked: equal, or one of them empty
            outcomes.append(bool(systems[a][i].strip()) - bool(systems[b][i].strip()))
            continue
        if failed := [answer.failure for answer in both if answer and answer.failure]:
            result["failures"].append({"id": case_id, "system": f"{a} / {b}", "kind": "pair", "reason": failed[0]})
            outcomes.append(None)
            continue
        asked += 1
        said = [answer.value.better for answer in both if answer]
        first_chosen += said.count("first") - said.count("second")
        votes = [{"first": 1, "second": -1, "tie": 0}[said[0]], {"first": -1, "second": 1, "tie": 0}[said[1]]]
        order_dependent += votes[0] != votes[1]
        outcomes.append(votes[0] if votes[0] == votes[1] else 0)
    return {
        "a": a,
        "b": b,
        "outcomes": outcomes,
        "wins_a": outcomes.count(1),
        "wins_b": outcomes.count(-1),
        "ties": outcomes.count(0),
        "failed": outcomes.count(None),
        "order_dependent": order_dependent,
        "first_minus_second": first_chosen / (2 * asked) if asked else None,  # 0: the position plays no part
    }


def judge_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The result as rows, one a system and case, for a judge.jsonl that `agreement` reads."""
    reasons = {(f["id"], f["system"]): f["reason"] for f in result["failures"] if f["kind"] == "score"}
    return [
        {
            "id": case_id,
            "system": name,
            "scores": {criterion: values[i] for criterion, values in result["scores"][name].items()},
            "errors": result["errors"][name][i],
            "failure": reasons.get((case_id, name)),
        }
        for name in result["scores"]
        for i, case_id in enumerate(result["ids"])
    ]


def error_counts(errors: Sequence[list[dict[str, str]] | None]) -> dict[str, dict[str, int]]:
    """{type: {severity: how often}} over the judged cases."""
    seen = Counter((error["type"], error["severity"]) for case in errors if case for error in case)
    return {kind: {severity: seen[kind, severity] for severity in rubric.SEVERITIES} for kind in rubric.ERROR_TYPES}


# ---- other systems


def predict_with(
    cases: Sequence[Case],
    instruction: str,
    client: Client,
    *,
    name: str | None = None,
    max_tokens: int = 256,
    dry_run: bool = False,
    batch_out: str | Path | None = None,
    batch_in: Sequence[str | Path] = (),
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Ask a general-purpose model for impressions by the very messages that ours is given (greedy by default).

    Returns rows of predictions.jsonl and {`failures` [{id, reason}], `usage`, `problems`}; a failed case has no row.
    With `dry_run` or `batch_out`: no rows, and `Client.plan`'s answer. Screened and confirmed as the judge is.
    """
    _check_cases(cases, {}, reference=False)
    if not instruction.strip():
        raise ValueError("the instruction is empty; give the wording that the other system was given")
    if not (dry_run or batch_in):
        client.require_permission(to_send=batch_out is None)
    screen_texts([("the instruction", instruction), *((f"{c['id']}, findings", c["findings"]) for c in cases)])
    calls = []
    for case in cases:
        messages = [_message("system", instruction), _message("user", f"Findings: {case['findings']}")]
        body = {"model": client.model, "messages": messages, "temperature": 0, "seed": 0, "max_tokens": max_tokens}
        calls.append(Call(with_settings(body, client.settings), str.strip, 60, may_be_cut=True))
    if dry_run:
        return [], client.plan(calls)
    if batch_out is not None:
        return [], client.plan(calls) | {"files": [str(path) for path in client.write_batch(calls, batch_out)]}
    problems = client.read_batch(calls, batch_in) if batch_in else []
    rows, failures = [], []
    for case, answer in zip(cases, client.ask(calls, "predict"), strict=True):
        if answer.failure:
            failures.append({"id": case["id"], "reason": answer.failure})
            continue
        finish = (answer.record or {}).get("finish_reason")
        rows.append(
            {key: value for key, value in case.items() if key != "impression"}
            | {
                "reference": case.get("reference", ""),
                "prediction": answer.value,
                "model": name or client.model,
                "stop_reason": finish if finish in ("stop", "length") else None,
            }
        )
    return rows, {"failures": failures, "usage": client.usage(), "problems": problems}


# ---- the command line


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every command with a server has; `client_from` reads them."""
    add = parser.add_argument_group("the server").add_argument
    add(
        "--cache",
        type=Path,
        default=Path("judge-cache"),
        metavar="DIR",
        help="keeps every answer (default: %(default)s)",
    )
    add(
        "--i-confirm-deidentified",
        dest="confirmed",
        action="store_true",
        help="the texts hold no identifier and may leave this machine (needed for a server elsewhere)",
    )
    add("--concurrency", type=int, default=8, metavar="N", help="calls at a time (default: %(default)s)")
    add("--timeout", type=float, default=120.0, metavar="S", help="seconds for one call (default: %(default)g)")
    add("--max-retries", type=int, default=6, metavar="N", help="of one call, with back-off (default: %(default)s)")
    add("--prices", type=Path, metavar="FILE", help='{"model": {"input": 2.5, "output": 10}}, $ per million tokens')
    add(
        "--setting",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=JSON",
        help="put into every request; null takes out (temperature=null)",
    )
    add("--retry-failed", action="store_true", help="ask again where the stored answer was refused or invalid")
    add("--dry-run", action="store_true", help="print calls, tokens and cost; send nothing")
    add("--batch-out", type=Path, metavar="FILE", help="write the calls as a file for the Batch API; send nothing")
    add("--batch-in", type=Path, nargs="+", default=[], metavar="FILE", help="take the answers from a batch's output")


def client_from(model: str, url: str | None, args: argparse.Namespace) -> Client:
    """A client by the flags of `add_flags`; ValueError where one of them is wrong."""
    settings = {}
    for item in args.settings:
        key, equals, value = item.partition("=")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            equals = ""
        if not key or not equals:
            raise ValueError("--setting: expected KEY=JSON, such as temperature=null or seed=1")
    return Client(
        model, cache=args.cache, url=url, confirmed=args.confirmed, concurrency=args.concurrency,
        timeout=args.timeout, max_retries=args.max_retries, prices=args.prices, settings=settings,
        retry_failed=args.retry_failed)  # fmt: skip


def dollars(amount: float | None) -> str:
    return "not known" if amount is None else f"${amount:,.2f}" if amount >= 0.01 or not amount else "under $0.01"


def format_plan(plan: dict[str, Any]) -> str:
    """What `plan` returned, as text."""
    return "\n".join(
        [
            f"nothing was sent; to {plan['model']} at {plan['url']} would go",
            f"  calls       {plan['calls']:>12,}  ({plan['stored']:,} more are answered already)",
            f"  tokens in   {plan['prompt_tokens']:>12,}  estimated: UTF-8 bytes / 4",
            f"  tokens out  {plan['completion_tokens']:>12,}  estimated: typical answers",
            f"  cost        {dollars(plan['cost']):>12}  at most {dollars(plan['cost_at_most'])}; as a batch "
            f"{dollars(plan['cost_batch'])}",
        ]
    )


def format_usage(usage: dict[str, Any]) -> str:
    """What `usage` returned, in a line or two."""
    who = ", ".join(f"{name} {count:,}" for name, count in usage["answered_by"].items()) or "nobody"
    prints = ", ".join(f"{name} {count:,}" for name, count in usage["fingerprints"].items()) or "none"
    return (
        f"{usage['calls']:,} calls: {usage['answered_now']:,} answered now, {usage['from_cache']:,} from the cache, "
        f"{usage['failed']:,} failed; {usage['prompt_tokens']:,} tokens in, {usage['completion_tokens']:,} out, "
        f"cost {dollars(usage['cost'])}\nanswered by {who}; system fingerprints: {prints}"
    )


def _predict(args: argparse.Namespace) -> int:
    rows = read_rows(args.input, ("id", "findings"))[: args.limit]
    cases = [row | {"reference": row.get("reference") or row.get("impression") or ""} for row in rows]
    client = client_from(args.model, args.url, args)
    rows, result = predict_with(
        cases, args.instruction, client, name=args.name, max_tokens=args.max_tokens, dry_run=args.dry_run,
        batch_out=args.batch_out, batch_in=args.batch_in)  # fmt: skip
    if args.dry_run or args.batch_out:
        print(format_plan(result))
        print("\n".join(f"wrote {file}" for file in result.get("files", ())))
        return 0
    for problem in result["problems"]:
        print(f"warning: {problem}", file=sys.stderr)
    print(format_usage(result["usage"]))
    write_rows(args.output, rows, private=True)
    print(f"wrote {args.output}: {len(rows):,} predictions")
    if failures := result["failures"]:
        listed = "\n  ".join(f"{failure['id']}: {failure['reason']}" for failure in failures[:20])
        more = f"\n  ... and {len(failures) - 20:,} more" * (len(failures) > 20)
        print(
            f"{len(failures):,} cases have no prediction; run again to ask for them:\n  {listed}{more}", file=sys.stderr
        )
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 where cases failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m radllama.judge", description="Other models, raters and the judge.")
    commands = parser.add_subparsers(required=True)
    predict = commands.add_parser("predict", help="impressions by any OpenAI-compatible model")
    predict.set_defaults(run=_predict)
    predict.add_argument("--input", type=Path, required=True, metavar="PAIRS", help="id, findings, impression a line")
    predict.add_argument("--output", type=Path, required=True, metavar="PREDICTIONS")
    predict.add_argument("--model", required=True)
    predict.add_argument("--url", help="the server's base address (default: OpenAI's)")
    predict.add_argument("--instruction", required=True, help="the wording that the other systems were given")
    predict.add_argument("--name", help="what to call it in the table (default: the model)")
    predict.add_argument("--max-tokens", type=int, default=256, metavar="N")
    predict.add_argument("--limit", type=int, metavar="N", help="only the first N cases")
    add_flags(predict)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
