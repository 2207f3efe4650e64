"""What each metric notices: impressions changed in known ways, scored against the originals.

    python bench/perturb.py [--pairs pairs.jsonl] [--limit N] [--half development|held-out] [--json FILE]

Reports come from perturb_cases.txt (by hand, with paraphrases by hand), assets/reports/test.jsonl (synthetic) and,
with --pairs, from any pairs.jsonl (read, never written). An error changes the meaning in one place; a paraphrase
changes the words and keeps the meaning. A metric *notices* a change when the score of the changed impression against
the original falls by THRESHOLD or more below the original's score against itself; for faithfulness, against the
findings. Every error should be noticed, no paraphrase should.

Nothing here knows the rules of radllama/clinical.py: the changes are made by plain text patterns, and were written
before the rules. Halves: every second report is held out, and was not looked at while the rules were made.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
THRESHOLD = 0.02
HALVES = ("development", "held-out")
ASPECTS = ("entity", "negation", "side", "number", "severity", "prior", "recommendation", "urgent")
ROUGE = ("rouge1", "rouge2", "rougeL")
METRICS = (*ROUGE, "clinical_f1", *ASPECTS, "faithfulness")

_SENTENCE = re.compile(r"(?<=[.;])(?<!\b\d\.)\s+|\n+")
_FINDING = re.compile(
    r"effusion|pneumo|opacit|consolidat|atelecta|cardiomegaly|edema|nodul|\bmass|fracture|disloc|stone|calcul|lithiasis"
    r"|cyst\b|aneurysm|dissection|embol|thromb|hemorrhage|hematoma|infarct|hydrocele|hydroneph|obstruction|ascites|abscess"
    r"|appendicitis|cholecystitis|pancreatitis|diverticul|metasta|adenopathy|emphysema|scar|granulom|steatosis|cirrhosis"
    r"|splenomegaly|hepatomegaly|fibroid|meningioma|glioma|stenosis|protrusion|herniation|\btear\b|osteoarthritis"
    r"|degenerative|osteop|hernia\b|infiltrate|congestion|fibrosis|copd|cardiopulmonary|intracranial|disease|abnormalit"
    r"|goiter|thyroiditis|calcification|distortion|asymmetry|malignan|deform|scoliosis|sinusitis|epididymitis|adenoma",
    re.I,
)
_ADVICE = re.compile(
    r"recommend|consider|follow.?up|advis|suggest|correlat|rads|consult|discussed|informed|evaluat|further|may be of"
    r"|annual|message|notified|probably benign|communicated",
    re.I,
)
_TEMPORAL = re.compile(
    r"\b(?:stable|(?:un)?chang|new\b|increas|decreas|interval|prior|previous|compar|again|persist|remain|continu|resol"
    r"|improv|worse|progress|since|former|develop|larger|smaller|grow|regress)",
    re.I,
)
_SIDE = re.compile(r"\b(left|right|LUL|LLL|RUL|RLL)(?=\b|ward)", re.I)
_OTHER = {"left": "right", "right": "left", "lul": "RUL", "rul": "LUL", "lll": "RLL", "rll": "LLL"}

# (pattern, what to put): the first that matches a sentence denies what it said, or says what it denied
_FLIPS: list[tuple[str, str]] = [
    (r"\bno (?:definite |convincing |radiographic |mammographic )?(?:evidence|signs?) (?:of|for)\b", "evidence of"),
    (r"\b(there (?:is|are)) no\b", r"\1"),
    (r"\bnegative for\b", "positive for"),
    (r"\bwithout(?: evidence of)?(?= (?!(?:significant |interval )*change))", "with"),
    (r"\bno\b (?!(?:significant |interval |definite )*change|longer|routine|further|follow)", ""),
    (r"\bnot (?=seen|identified|present|dilated|enlarged|shifted|fractured|torn)", ""),
    (r"\b(?:normal|unremarkable)\b(?! limits)|\bnegative\b(?= (?:chest|study|exam))", "abnormal"),
    (r"\bwithin normal limits\b", "abnormal"),
    (r"\b(clear|intact|patent)\b", r"not \1"),
    (r"\b((?:is|are) )(?=(?:also |again )?(?:seen|noted|present|identified|demonstrated)\b)", r"\1not "),
    (r"\b(there (?:is|are)) (?:an? )?", r"\1 no "),
]
_VERB = re.compile(r"\b(?:is|are|has|have|measures?|contains?|shows?|may|could|appears?|represents?|suggests?)\b", re.I)

INVENTED = [  # a sentence, and what the report must not speak of
    ("Large right pleural effusion.", r"effusion|pleura|costophrenic|fluid"),
    ("Large left pneumothorax.", r"pneumothora|pleura"),
    ("Acute displaced fracture of the left clavicle.", r"clavic|fracture|osseous|bon[ey]"),
    ("Acute aortic dissection.", r"aort|dissect"),
    ("4.1 cm left adrenal mass.", r"adrenal"),
    ("Moderate ascites.", r"ascites|fluid|periton"),
    ("Acute subdural hematoma.", r"hemorrhage|hematoma|collection|intracranial"),
    ("Splenic laceration.", r"spleen|splen"),
    ("Severe hydronephrosis.", r"kidney|renal|hydroneph"),
    ("Acute pulmonary embolism.", r"embol|pulmonary arter|filling defect"),
    ("Deep venous thrombosis.", r"thromb|vein|venous"),
    ("2.0 cm right breast mass.", r"breast"),
    ("Large hiatal hernia.", r"hernia|fundus|stomach"),
]
PRIORS: list[Callable[[str], str]] = [
    lambda s: f"New {s[0].lower()}{s[1:]}",
    lambda s: f"Stable {s[0].lower()}{s[1:]}",
    lambda s: f"{s.rstrip('. ;')}, increased since the prior study.",
    lambda s: f"{s.rstrip('. ;')}, unchanged from the previous examination.",
    lambda s: f"Interval decrease in {s[0].lower()}{s[1:]}",
]


def _metric(value: str, factor: float, unit: str) -> str:
    return f"{float(value) * factor:.1f}".removesuffix(".0") + f" {unit}"


# Rewritings that keep the meaning: (pattern, choices).
REWRITES: list[tuple[str, tuple[str | Callable[[re.Match[str]], str], ...]]] = [
    (
        r"\bNo (?:evidence of )?acute cardiopulmonary (?:abnormalit(?:y|ies)|disease|process|findings?)",
        (
            "No acute abnormality of the heart or lungs",
            "There is no acute cardiopulmonary process",
            "Negative for acute cardiopulmonary disease",
            "No acute cardiac or pulmonary abnormality",
        ),
    ),
    (r"\bNo acute (?:disease|findings?)\b", ("No acute abnormality", "There is no acute process")),
    (r"\bNo active disease\b", ("No evidence of active disease", "There is no active disease")),
    (r"\b(mild|moderate|severe) cardiomegaly", (r"\1 enlargement of the heart", r"\1ly enlarged cardiac silhouette")),
    (r"\bcardiomegaly", ("enlargement of the heart", "cardiac enlargement", "enlarged cardiac silhouette")),
    (r"\bheart size (?:is )?normal|\bnormal heart size", ("the heart is normal in size", "the heart is not enlarged")),
    (r"\bright upper lobe\b", ("RUL",)),
    (r"\bright lower lobe\b", ("RLL",)),
    (r"\bleft upper lobe\b", ("LUL",)),
    (r"\bleft lower lobe\b", ("LLL",)),
    (r"\bbilateral pleural effusions", ("pleural effusions on both sides", "left and right pleural effusions")),
    (r"\b(left|right) pleural effusion\b", (r"pleural effusion on the \1", r"\1-sided pleural effusion")),
    (r"\b(left|right) pneumothorax\b", (r"pneumothorax on the \1", r"\1-sided pneumothorax")),
    (r"\bpulmonary edema\b", ("edema of the lungs", "lung edema")),
    (r"\bpulmonary embolism\b", ("pulmonary embolus", "pulmonary emboli")),
    (r"\bchronic obstructive pulmonary disease\b", ("COPD",)),
    (r"\bCOPD\b", ("chronic obstructive pulmonary disease",)),
    (r"\bhyperexpanded\b", ("hyperinflated",)),
    (r"\batelectasis\b", ("atelectatic change",)),
    (r"\bemphysema\b", ("emphysematous change",)),
    (r"\b(?:lymph)?adenopathy\b", ("enlarged lymph nodes",)),
    (r"\bhepatic steatosis\b", ("fatty liver", "fatty infiltration of the liver")),
    (r"\bcholelithiasis\b", ("gallstones",)),
    (r"\bsplenomegaly\b", ("enlarged spleen", "enlargement of the spleen")),
    (r"\brenal (stone|cyst|mass)\b", (r"kidney \1", r"\1 of the kidney")),
    (r"\bsubdural hematoma\b", ("subdural hemorrhage",)),
    (r"\b(brain|hepatic) metastases\b", (r"\1 metastatic disease",)),
    (r"\bcerebral volume loss\b", ("cerebral atrophy",)),
    (r"\binfarct\b", ("infarction",)),
    (r"\bhiatal hernia\b", ("hiatus hernia",)),
    (r"\bsuspicious for\b", ("concerning for", "worrisome for")),
    (r"\bdegenerative changes\b", ("degenerative change", "degenerative disease")),
    (r"\bconsolidation\b", ("airspace consolidation",)),
    (r"\b(?<!airspace )opacity\b", ("opacification",)),
    (r"\bfracture of the ([a-z ]+)\b(?=[.;])", (r"fractured \1",)),
    (r"\bstable\b(?! cardio)", ("unchanged",)),
    (r"\bunchanged\b", ("stable",)),
    (r"\bosseous\b", ("bony",)),
    (r"\bpneumoperitoneum\b", ("free intraperitoneal air",)),
    (r"\b(\d+) mm\b", (lambda m: _metric(m[1], 0.1, "cm"),)),
    (r"\b(\d+\.\d) cm\b(?! x)", (lambda m: _metric(m[1], 10, "mm"),)),
    (r"\bRecommend ([A-Z]\w+ |)([a-z][\w ]+)(?=\.)", (r"\1\2 is recommended", r"Advise \1\2")),
    (r"\bNo (?!evidence|acute|change|significant|interval|new)(?=[a-z])", ("No evidence of ", "There is no ")),
    (
        r"\bNo ((?!acute|focal)[a-z]+(?: [a-z]{5,})?) or ((?:[a-z]{5,} )?[a-z]+)(?=\.)",
        (r"No \2 or \1", r"Neither \1 nor \2 is seen"),
    ),
    (r"\bwithout\b", ("with no",)),
    (r"\b(is|are) normal\b(?! in)", (r"\1 unremarkable", r"\1 within normal limits")),
    (r"\bNormal chest\b", ("Unremarkable chest",)),
    (r"\blungs are clear\b", ("lungs show no abnormality",)),
    (r"\bclear lungs\b", ("the lungs are clear",)),
]


@dataclass(frozen=True)
class Case:
    """A report and its half; `paraphrases` by hand, or () where they are made by REWRITES."""

    findings: str
    impression: str
    context: str
    half: str
    paraphrases: tuple[str, ...] = ()


def sentences(text: str) -> list[str]:
    return [part for part in _SENTENCE.split(text) if part and part.strip(" .;")]


def _swap_sentence(text: str, change: Callable[[str], str | None]) -> list[str]:
    """The texts that arise when one sentence after another is changed; a list number stays before the sentence."""
    parts, made = sentences(text), []
    for i, part in enumerate(parts):
        number, body = re.match(r"(\s*(?:\d+[.)]\s+)?)(.*)", part, re.S).groups()  # type: ignore[union-attr]
        new = change(body)
        if new and new != body:
            made.append(" ".join([*parts[:i], number + new[0].upper() + new[1:], *parts[i + 1 :]]))
    return made


def flip(case: Case, rng: Random) -> list[str]:
    def change(body: str) -> str | None:
        if not _FINDING.search(body + " disease" * body.lower().startswith(("normal", "negative"))):
            return None
        if _ADVICE.search(body):
            return None
        for pattern, new in _FLIPS:
            if re.search(pattern, body, re.I):
                return re.sub(r"\s+", " ", re.sub(pattern, new, body, count=1, flags=re.I)).strip()
        if _VERB.search(body):
            return None
        return "No evidence of " + body[0].lower() + body[1:]

    return _swap_sentence(case.impression, change)


def swap_side(case: Case, rng: Random) -> list[str]:
    def change(body: str) -> str | None:
        if len({match[1].lower()[0] for match in _SIDE.finditer(body)}) != 1:
            return None
        return _SIDE.sub(lambda m: _OTHER[m[1].lower()], body)

    return _swap_sentence(case.impression, change)


def change_number(case: Case, rng: Random) -> list[str]:
    """Another size: other digits, or the other unit."""

    def other(match: re.Match[str]) -> str:
        value, unit = match.groups()
        if rng.random() < 0.2 and unit in ("mm", "cm"):
            return f"{value} {'cm' if unit == 'mm' else 'mm'}"
        digits = len(value.partition(".")[2])
        return f"{float(value) * rng.choice((0.5, 1.5, 2, 3)) + 1:.{digits}f}" + match[0][len(value) :]

    found = list(re.finditer(r"\b(\d+(?:\.\d+)?)\s?(mm|cm|x)\b", case.impression))
    return [case.impression[: m.start()] + other(m) + case.impression[m.end() :] for m in found]


def change_category(case: Case, rng: Random) -> list[str]:
    """Another RADS category, or another interval of a recommendation."""
    made = []
    for match in re.finditer(r"(RADS (?:category )?)(\d)|\b(\d+)(?=[- ](?:week|month|year))", case.impression):
        group = 2 if match[2] else 3
        new = str((int(match[group]) % 5) + 1 if match[2] else int(match[group]) * 2)
        made.append(case.impression[: match.start(group)] + new + case.impression[match.end(group) :])
    return made


def omit(case: Case, rng: Random) -> list[str]:
    parts = sentences(case.impression)
    lost = [i for i, part in enumerate(parts) if _FINDING.search(part) and not _ADVICE.search(part)]
    return [" ".join(parts[:i] + parts[i + 1 :]) for i in lost if len(parts) > 1]


def invent_finding(case: Case, rng: Random) -> list[str]:
    text = f"{case.findings} {case.impression} {case.context}"
    fits = [sentence for sentence, absent in INVENTED if not re.search(absent, text, re.I)]
    return [f"{case.impression} {sentence}" for sentence in rng.sample(fits, min(2, len(fits)))]


def invent_prior(case: Case, rng: Random) -> list[str]:
    context = re.sub(
        r"comparison: *(?:none|no |n/a|$)[^.]*", "", case.context, flags=re.I
    )  # says that there is no prior
    if _TEMPORAL.search(f"{case.findings} {case.impression} {context}"):
        return []

    def change(body: str) -> str | None:
        fits = (
            _FINDING.search(body) and not _ADVICE.search(body) and not re.match(r"(?:no|normal|negative)\b", body, re.I)
        )
        return rng.choice(PRIORS)(body) if fits and not _VERB.search(body) else None

    return _swap_sentence(case.impression, change)


def paraphrase(case: Case, rng: Random) -> list[str]:
    """The paraphrases by hand, or one made by up to four of REWRITES, sentences in another order where unnumbered."""
    if case.paraphrases:
        return list(case.paraphrases)
    text, used = case.impression, 0
    for pattern, choices in rng.sample(REWRITES, len(REWRITES)):
        if used < 4 and re.search(pattern, text, re.I):
            text, used = re.sub(pattern, rng.choice(choices), text, flags=re.I), used + 1
    parts = sentences(text)
    if (
        used
        and len(parts) > 1
        and not re.search(r"\b\d[.)]\s", text)
        and not _ADVICE.search(text)
        and rng.random() < 0.5
    ):
        text = " ".join(rng.sample(parts, len(parts)))
    return [text] if used else []


ERRORS: dict[str, Callable[[Case, Random], list[str]]] = {
    "negation flip": flip,
    "side swap": swap_side,
    "number change": change_number,
    "category change": change_category,
    "omission": omit,
    "invented finding": invent_finding,
    "invented prior": invent_prior,
}
KINDS = {**ERRORS, "paraphrase": paraphrase}
MOST = 2  # changed impressions of a kind for each report that is not by hand


def hand_written() -> list[Case]:
    text = (ROOT / "bench/perturb_cases.txt").read_text(encoding="utf-8")
    cases = []
    for i, block in enumerate(re.split(r"\n\n(?==)", text)[1:]):
        lines = defaultdict(list)
        for line in block.strip().splitlines()[1:]:
            lines[line[0]].append(line[3:])
        cases.append(Case(lines["F"][0], lines["I"][0], "", HALVES[i % 2], tuple(lines["P"])))
    return cases


def from_pairs(path: Path) -> list[Case]:
    cases = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        context = " ".join(f"{key}: {row[key]}" for key in ("indication", "comparison") if row.get(key))
        cases.append(Case(row["findings"], row["impression"], context, HALVES[i % 2]))
    return cases


def changes(cases: Iterable[Case], seed: int = 0) -> list[tuple[Case, str, str]]:
    """(case, kind, changed impression), the same for the same cases and seed."""
    made = []
    for i, case in enumerate(cases):
        for kind, change in KINDS.items():
            rng = Random(f"{seed} {i} {kind}")
            texts = [text for text in dict.fromkeys(change(case, rng)) if text.strip() and text != case.impression]
            if not case.paraphrases and len(texts) > MOST:
                texts = rng.sample(texts, MOST)
            made += [(case, kind, text) for text in texts]
    return made


def scores(made: Sequence[tuple[Case, str, str]], *, with_rouge: bool = True) -> list[dict[str, float]]:
    """For each change the fall of each metric, in [-1, 1]; a metric without anything to score counts as 1."""
    from radllama.clinical import compare
    from radllama.faithful import faithfulness

    def score(case: Case, text: str) -> dict[str, float]:
        found = compare(case.impression, text)
        values = {name: 1.0 if found[name] is None else float(found[name] or 0) for name in ("clinical_f1", *ASPECTS)}
        return values | {"faithfulness": faithfulness(case.findings, text, case.context)}

    falls = []
    for case, _, text in made:
        before, after = score(case, case.impression), score(case, text)
        falls.append({name: before[name] - after[name] for name in before})
    if with_rouge:
        from radllama.eval import rouge

        columns = rouge([case.impression for case, _, _ in made], [text for _, _, text in made])
        for i, fall in enumerate(falls):
            fall.update({name: 1 - columns[name][i] for name in ROUGE})
    return falls


def summary(
    made: Sequence[tuple[Case, str, str]], falls: Sequence[dict[str, float]]
) -> dict[str, dict[str, dict[str, float]]]:
    """kind -> metric -> how many changes, the share noticed, the mean fall."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for kind in KINDS:
        rows = [fall for (_, k, _), fall in zip(made, falls, strict=True) if k == kind]
        if rows:
            table[kind] = {
                metric: {
                    "count": len(rows),
                    "noticed": sum(row[metric] >= THRESHOLD for row in rows) / len(rows),
                    "mean_fall": sum(row[metric] for row in rows) / len(rows),
                }
                for metric in METRICS
                if metric in rows[0]
            }
    return table


def show(title: str, table: dict[str, dict[str, dict[str, float]]]) -> str:
    kinds = list(table)
    lines = [
        f"### {title}",
        "",
        "| % noticed (mean fall) | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    counts = " | ".join(str(int(next(iter(table[kind].values()))["count"])) for kind in kinds)
    lines.append(f"| changed impressions | {counts} |")
    for metric in METRICS:
        cells = [f"{100 * table[k][metric]['noticed']:.1f} ({table[k][metric]['mean_fall']:.2f})" for k in kinds]
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python bench/perturb.py", description="What each metric notices.")
    parser.add_argument("--pairs", type=Path, help="a pairs.jsonl to change as well (id, findings, impression)")
    parser.add_argument("--limit", type=int, help="use the first N pairs")
    parser.add_argument("--half", choices=HALVES, help="one half alone")
    parser.add_argument("--json", type=Path, help="write the tables here too")
    args = parser.parse_args(argv)
    sources = {"by hand": hand_written(), "synthetic": from_pairs(ROOT / "assets/reports/test.jsonl")}
    if args.pairs:
        try:
            sources[args.pairs.stem] = from_pairs(args.pairs)[: args.limit]
        except (OSError, ValueError, KeyError) as error:
            print(f"error: {args.pairs}: {error!r}; expected JSON lines with findings and impression", file=sys.stderr)
            return 2
    report = {}
    for name, cases in sources.items():
        for half in [args.half] if args.half else HALVES:
            made = changes([case for case in cases if case.half == half])
            report[f"{name}, {half} half"] = summary(made, scores(made))
    print(f"noticed: the score falls by {THRESHOLD} or more\n")
    print("\n\n".join(show(title, table) for title, table in report.items()))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
