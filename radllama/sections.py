"""Cut a radiology report into its sections, and say why where it yields no findings/impression pair.

Headings are looked for in a *shadow* of the report: a copy of equal length in lower case, whose line ends are all
"\\n" and whose markup (Markdown, HTML, brackets) is blank. One compiled pattern finds the candidates there; what
stands around a candidate, and its case in the report itself, decides (`_judge`); the order of the headings decides
the rest (`_arrange`). Spans always refer to the report as given. Nothing beyond the standard library is needed.

    parsed = parse_report(text)
    if parsed.reason is None:
        train_on(parsed.findings, renumber(parsed.impression))
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

VERSION = "1"  # of the rules: raise it whenever some report may be cut another way
LEAK_WORDS = 8  # an impression shorter than this may well be a sentence of the findings


@dataclass(frozen=True, slots=True)
class Section:
    """`report[start:end]` is the section with its heading; the spans, joined, are the report.

    heading: as written, without markup and colon; "" for the preamble. text: the body, cleaned (see `_clean`); the
    view or organ that opens findings without a heading of their own ("CHEST: Clear.") stays in it.
    """

    name: str
    start: int
    end: int
    text: str
    heading: str


@dataclass(frozen=True, slots=True)
class ParsedReport:
    """What was found, "" where nothing was; a pair to train on only if `reason` is None.

    reason, the first that holds: empty_report, non_english_headings, merged_findings_impression, addendum (policy
    "quarantine"), no_sections, no_findings, empty_findings, no_impression, preliminary_only, empty_impression,
    several_impressions (that differ; `impression` is the last) or impression_in_findings (as in `leaks`).
    indication: the sections indication and history.
    """

    sections: list[Section]
    findings: str
    impression: str
    indication: str
    comparison: str
    reason: str | None
    has_addendum: bool


# Canonical name -> headings, in lower case. (a|b) expands, "?" makes the letter before it optional. What is not in
# this table ("PATIENT CLASS:") opens a section "other" above the findings, and is a sub-heading inside them.
_HEADINGS = {
    "findings": "(|radiographic |radiological |radiologic |radiology |imaging |additional |incidental |significant |"
    "pertinent |technique and )(findings|finding|findngs|findigns|findigs|fidings|finidngs|fndings|findinsg)|find",
    "weak findings": "observations?|results?|report|radiology report|descriptions?|body of report",
    "impression": "(|final |overall |radiographic |radiological |radiologic |radiology |imaging |diagnostic )"
    "(impressions?|impresions?|imprssion|impressons?|imression|impresssion|impressoin|impressin|imperssion|"
    "ipression|impessions?|impressiom|impresison|inpression|conclusions?|concluson|conlusion|conclusoin)|"
    "impr?|concl|bottom line",
    "weak impression": "(|final |overall |radiological |radiologic |radiology |imaging )(opinions?|summary|"
    "interpretation|assessment|diagnosis|diagnoses|intepretation|assesment)|summary of findings|key findings|dx",
    "preliminary": "(preliminary |prelim |provisional |resident |unofficial )(impression|interpretation|conclusion|"
    "read|reading|report|findings|assessment)|wet read|wet reading",
    "indication": "(|clinical |study )indications?|reason for (|the |this )(exam|examination|study|visit|procedure|"
    "test)|reason|clinical (question|impression|findings|diagnosis|concern)|ind|rfe|symptoms?|chief complaint",
    "history": "(|clinical |patient |brief |medical |past medical |relevant |additional )history|clinical (information"
    "|info|data|details|statement|context|background|notes?|assessment)|hx|history of present illness|background",
    "comparison": "comparisons?|comparision|comparsion|(comparison|prior|previous) (study|studies|exams?|"
    "examinations?|imaging|films?)|compared (to|with)|correlation|comp|priors",
    "technique": "(|imaging )techniques?|technqiue|protocol|procedures?|contrast|(|radiation )dose|technical "
    "(factors|comments?|quality)|medications?|sequences|tech|(image|study) quality|limitations?",
    "exam": "exams?|examinations?|study|studies|(exam|examination|study) (type|title|description|name|performed|date|"
    "time)|type of (exam|examination|study)|date of (exam|examination|study|service)|procedure name|views?",
    "addendum": "addendum|addenda|adendum|addendum begins?|begin addendum|start of addendum",
    "original": "end of addendum|end addendum|addendum ends?|(original|initial|final) report|original (exam|"
    "examination|study|dictation|interpretation)",
    "recommendation": "recommendations?|reccomendations?|recomendations?|follow-?up|follow up|plan|management",
    "communication": "notifications?|communications?|critical (results?|findings?|values?)|comments?|discussion",
    "signature": "(electronically |digitally )(signed|verified|approved|authenticated)|signed (by|electronically)|"
    "(dictated|transcribed|reported|interpreted|reviewed|approved|verified|finalized|read|prepared)( by|)|i (have |)"
    "(personally |)reviewed (the images|the above|this|these|and)|i, the attending|this report was (electronically|"
    "dictated|generated|signed)|end of (report|impression|conclusion|dictation)|(reading |attending |interpreting |"
    "staff |)(radiologist|physician)|attending|resident|transcriptionist|signed|signature|electronic signature|cc",
    "other": "patient|(patient )(name|id|class)|name|mrn|medical record number|accession|accession (number|no|#)|dob|"
    "date of birth|age|sex|gender|(referring|ordering|requesting) (physician|provider)|ordered by|location|"
    "(account|visit|order) number|department|facility|hospital",
    "foreign": "befund|befunde|beurteilung|fragestellung|indikation|klinische angaben|technik|ergebnis|hallazgos|"
    "resultados|impresión|impresio\u0301n|conclusión|conclusiones|indicación|técnica|informe|opinión|résultats?|"
    "resultats|renseignements cliniques|achados|impressão|conclusão|indicação|laudo|relatório|referto|conclusioni|"
    "quesito clinico|bevindingen|conclusie|klinische gegevens|verslag|fynd|bedömning|utlåtande|beskrivelse|"
    "konklusjon|konklusion|wnioski|opis badania|lausunto|заключение|описание|bulgular|sonuç|所见|所見|印象|诊断|診断",
}


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_REGIONS = _set(
    """abdomen abdominal adrenal adrenals airway airways ankle aorta ap appendix axilla axillae biliary bladder bone
    bones bony bowel brain breast breasts calvarium cardiac cardiomediastinal cardiovascular catheters cervical chest
    colon cord ct cta devices diaphragm disc discs ducts elbow extremities extremity femur foot frontal gallbladder gi
    hand hands hardware head heart hepatobiliary hila hilar hip hips intraperitoneal joint joints kidney kidneys knee
    knees lateral left leg ligaments line lines liver lower lumbar lung lungs lymph marrow mediastinal mediastinum
    menisci mesentery mr mra mri muscles musculoskeletal neck nodes oblique orbits osseous other ovaries pa pancreas
    parenchyma pelvic pelvis pericardium peritoneum pleura pleural portable prostate pulmonary radiograph radiographs
    rectum renal reproductive retroperitoneum ribs right sacrum shoulder sinuses skeleton skull soft spaces spinal
    spine spleen stomach structures supine support thoracic thorax thyroid tissues trachea tubes ultrasound upper
    upright ureters urinary us uterus vascular vasculature ventricles vertebrae vertebral vessels view views
    visualized wall wrist x-ray xr xray"""
)
_GLUE = _set("1 2 3 4 5 a and contrast for iv of one or single the three two with without")
# Before one of these words "findings" or "impression" belongs to a sentence, and likewise after one of the others.
_BEFORE = _set(
    """a about above abnormal acute additional all an and any are as at be below by chronic clinical current earlier
    following for former from her his imaging in incidental is its last my new no of on or other our physical previous
    prior radiographic same significant similar such that the their these this those to was were with your"""
)
_AFTER = _set(
    """also and are as at be been by can compatible concerning consistent could described discussed do does for from
    had has have in include included includes including indicate indicates is likely made may might more most not
    noted of on or reflect remain remains represent represents seen should suggest suggesting suggestive suggests that
    to upon was were which will with within without would"""
)
_ABBREVIATIONS = _set("find imp impr concl dx ind rfe hx comp tech cc")
_BODY = frozenset(["findings", "impression", "merged"])
_FRONT = _set("preamble other exam indication history technique comparison preliminary findings merged")


def _expand(pattern: str) -> Iterable[str]:
    """The phrases that a pattern of the table stands for."""
    if match := re.search(r"\(([^()]*)\)", pattern):
        for option in match[1].split("|"):
            yield from _expand(pattern[: match.start()] + option + pattern[match.end() :])
    elif "|" in pattern:
        for option in pattern.split("|"):
            yield from _expand(option)
    elif "?" in pattern:
        at = pattern.index("?")
        yield from _expand(pattern[: at - 1] + pattern[at + 1 :])
        yield from _expand(pattern[:at] + pattern[at + 1 :])
    else:
        yield pattern


def _trie(phrases: Iterable[str]) -> str:
    """A pattern for any of the phrases, the longest first, that looks at each letter once."""
    tails: dict[str, list[str]] = {}
    for phrase in phrases:
        tails.setdefault(phrase[:1], []).append(phrase[1:])
    optional = tails.pop("", None) is not None
    branches = [(" ++" if head == " " else re.escape(head)) + _trie(rest) for head, rest in tails.items()]
    body = "|".join(branches)
    return f"(?:{body})" + "?" * optional if len(branches) > 1 or (optional and branches) else body


_TOP_BAR = re.compile(r"\|(?![^()]*\))")
_NAMES = {  # phrase -> its canonical name, and whether it is a weak heading of that name
    phrase: (name.removeprefix("weak "), name.startswith("weak "))
    for name, table in _HEADINGS.items()
    for pattern in _TOP_BAR.split(table)
    for phrase in _expand(pattern)
}
_FINDINGS, _IMPRESSION = (_trie(p for p, n in _NAMES.items() if n[0] == name) for name in ("findings", "impression"))
_HAS_FINDINGS = re.compile(rf"(?<!\w){_FINDINGS}(?!\w)")
_HAS_IMPRESSION = re.compile(rf"(?<!\w){_IMPRESSION}(?!\w)")
# A phrase of the table, or what stands on a line before its first colon ("CHEST, PA AND LATERAL:").
_GOES_ON = r"\w|['?!)]|-\w|\.(?!\.| *(?:\n|\Z))|, (?!impr|conc|find)"
_CANDIDATES = {  # by whether the text is ASCII, which most are: that spares a branch at each word
    ascii_only: re.compile(
        rf"[^a-z0-9](?:({_trie(p for p in _NAMES if p[0].isascii() or not ascii_only)})(?!{_GOES_ON})"
        r"|(?<=\n)(?=[ -]*+(?P<label>[a-z][a-z0-9 /&,()+'-]{0,59}?) *:))"
    )
    for ascii_only in (True, False)
}
_TAIL = re.compile(  # what may follow the phrase
    r"(?:\(s\))?"
    rf"(?P<more>(?:(?: *[/&+,] *(?:and +)?|-| +(?:and|or|with) +)(?:{_FINDINGS}|{_IMPRESSION}|plan|recommendations?|"
    r"comments?|technique|procedure|indications?|history|comparisons?|follow-?up|discussion|advice)(?!\w)){0,4})"
    r"(?: *\([^()\n]{0,80}\)| *(?:# *)?\d{1,2}(?= *(?::|\n|\Z))|"
    r"(?P<of> ++(?:of|for|by|on|from|per|dictated|at) (?:[^:.\n]|(?<=dr)\.){1,60}(?=:)))? *+"
    r"(?P<sep>:|\.{2,}|;(?= )|-+(?= )|[.;-]*+ *+(?=\n|\Z))?"
)
_SPACES_RUN = re.compile(" {2,}")
_PLAIN = re.compile(r" (?!(?:and|or|with|of|for|by|on|from|per|dictated|at) )[a-z]")  # a sentence goes on
_LIST_NUMBER = re.compile(r"\n[ -]*\(?(?:\d{1,2}|[ivx]{1,4})[.)]\Z")
_RUNNING = re.compile(r"(?<![a-z'])([a-z']+) *\n? *\Z")
_NEXT = re.compile(r"([a-z']+|\(?\d+[.)]?)")

_BREAKS = "\r\f\v\x1c\x1d\x1e\x85\u2028\u2029"
_BLANKS = '\t\xa0\u2002\u2003\u2009\u200b\u202f\ufeff*#_|>=~`"“”•·▪‣◦●[]'
_SHADOW = str.maketrans(
    dict.fromkeys(_BREAKS, "\n") | dict.fromkeys(_BLANKS, " ") | dict.fromkeys("–—‐‑", "-") | {"：": ":"}
)
_SHADOW_ASCII = bytes(ord(chr(c).translate(_SHADOW)) for c in range(128)).ljust(256)
_TAG = re.compile(
    r"</?(br|p|div|li|tr|h[1-6]|ul|ol|table|[bui]|em|strong|span|td|th|font|pre|html|body)\b[^<>]*>", re.I
)
_BREAKING = _set("br p div li tr h1 h2 h3 h4 h5 h6 ul ol table")
_SPACES = str.maketrans("\xa0\t", "  ", "\ufeff\u200b")
_LINE_END = re.compile(rf"[{_BREAKS}](?:(?<=\r)\n)?")
_UNTIDY = (*_BREAKS, *"\t\xa0\u200b\ufeff*#_=~<&")
_UNTIDY_BYTES = "".join(filter(str.isascii, _UNTIDY)).encode()
_UNTIDY_RUNS = ("--", " \n", "\n ", "\n\n\n")
_DECORATED = (*"*#=~_", "--")
_MARKUP = re.compile(r"\*\*|(?<!_)__(?=[^\W_])|(?<=[^\W_])__(?!_)|^[ \t]*(?:#+ |[-=*~]{4,}[ \t]*$|_{5,}[ \t]*$)", re.M)
_CONTENT = re.compile(r"[^\W_]")
_WORDS = re.compile(r"[a-z]+|\d+(?:\.\d+)?")
_MARK_BEGINS = re.compile(r"[(#\d](?<!\S[(#\d])")  # found fast: it starts with a set of characters
_MARK = re.compile(r"(?:\((\d{1,2})\)|#?(\d{1,2})[.)]+|(\d{1,2}) ?[-:](?= ))(?=\s|[A-Za-z(\"']|\Z)")
_FIRST_MARKS = ("1.", "1)", "1-", "1:", "1 -", "1 :")  # one of them is in every numbered list
_LAST_WORD = re.compile(r"([\w-]+)[:.]?\Z")
_REPEATED = re.compile(r"(?:(?:\(1\)|#?1[.)]+|[-*•·▪‣◦●–]) +)+")
_BULLET = re.compile(r"\n[ \t]*[-*•·▪‣◦●–][ \t]+")
_NUMBERED = _set(  # words that take a number: "segment 6."; and "bi-rads", "lung-rads" ...
    """acr and aspects at bosniak by c category class code day deauville digit fazekas figure finger from garden grade
    h image images in l level lobe modic no number of phase rib ribs s score segment segments series slice stage
    station t table than to toe type vertebra view week zone birads"""
)
_DOTTED = _set("cat fig im img no nos seg segs ser st vol")  # the same with a full stop: "seg. 6."


def _shadow(text: str) -> str:
    flat = text.lower()
    if len(flat) != len(text):  # "İ" has two characters in lower case
        flat = "".join(low if len(low := char.lower()) == 1 else char for char in text)
    if "<" in flat:
        flat = _TAG.sub(lambda tag: ("\n" if tag[1] in _BREAKING else " ") * len(tag[0]), flat)
    if "&nbsp;" in flat:
        flat = flat.replace("&nbsp;", " " * 6)
    if _escaped(text):
        flat = flat.replace("\\r", "  ").replace("\\n", "\n\n")
    flat = flat.replace("\r\n", " \n")
    return flat.encode().translate(_SHADOW_ASCII).decode() if flat.isascii() else flat.translate(_SHADOW)


def _escaped(text: str) -> bool:
    """Whether line ends are written as a backslash and an n, as some exports do."""
    return "\\n" in text and "\n" not in text


@dataclass(slots=True)
class _Heading:
    start: int
    body: int  # where the section's text begins
    name: str
    words: str = ""
    weak: bool = False  # gives way to an unmistakable heading of the same name


@lru_cache(maxsize=4096)
def _is_region(label: str) -> bool:
    """Whether a label consists of views and organs alone, as "chest, pa and lateral" does."""
    words = set(re.findall(r"[a-z0-9-]+", label.replace("w/o", "without")))
    return words <= _REGIONS | _GLUE and not _REGIONS.isdisjoint(words)


def _find(source: str, flat: str) -> list[_Heading]:
    """Every heading, and every label before a colon that may turn out to be one. Both texts begin with a line end."""
    found: list[_Heading] = []
    last, done, seen = "", 0, set[str]()  # name and end of the last heading, and all names, labels aside
    for match in _CANDIDATES[source.isascii()].finditer(flat):
        start, end = match.span(1)
        if start < 0:
            begin, end = match.span("label")
            name = "region" if _is_region(match["label"]) else "label"
            if name == "region" or (end - begin > 2 and source[begin:end].isupper()):
                found.append(_Heading(match.start() + 1, flat.index(":", end) + 1, name, source[begin:end]))
        elif start >= done and (heading := _judge(source, flat, start, end, last, seen)):
            if found and found[-1].body > heading.start:
                found.pop()  # a label of which this is the end, such as "CHEST FINDINGS"
            found.append(heading)
            last, done = heading.name, heading.body
            seen.add(last)
    return found


def _judge(source: str, flat: str, start: int, end: int, last: str, seen: set[str]) -> _Heading | None:
    """The heading at the phrase flat[start:end] of the table, or None where the phrase is part of a sentence."""
    phrase, word = flat[start:end], source[start:end]
    if "  " in phrase:
        phrase = _SPACES_RUN.sub(" ", phrase)
    name, weak = _NAMES[phrase]
    case = "upper" if word.isupper() else "title" if word[0].isupper() else "lower"
    if case == "title" and (final := word.rpartition(" ")[2]).isupper() and final.lower() in _NAMES:
        start, phrase, case = end - len(final), final.lower(), "upper"  # "None. Clinical FINDINGS: ..."
        name, weak = _NAMES[phrase]
    if case != "upper" and name != "signature" and _PLAIN.match(flat, end) and not source[end + 1].isupper():
        return None
    tail = _TAIL.match(flat, end)
    assert tail  # each of its parts is optional
    more, of, separator = tail.groups()
    if separator is None and case == "lower" and name != "signature":
        return None
    if more:
        both = flat[start : tail.end("more")]
        has_findings, has_impression = _HAS_FINDINGS.search(both), _HAS_IMPRESSION.search(both)
        if has_findings and (has_impression or re.search("recommend|discussion|plan", both)):
            name = "merged"
        elif has_findings or has_impression:
            name = "findings" if has_findings else "impression"
        weak = weak and not re.search("finding|impres|conclus", both)
    body = tail.end()
    if separator is None or (separator == ";" and case != "upper"):
        kind = "none"
    elif separator in (":", ";") or separator[:2] == "..":
        kind = "colon"
    else:
        kind = "line" if flat[body : body + 1] in ("", "\n") else "dash"  # "line": alone on its line

    at = start  # where the heading begins: after the word, stop or line end before it
    while flat[at - 1] in " -":
        at -= 1
    before = flat[at - 1]
    numbered = before in ".)" and _LIST_NUMBER.search(flat, max(0, at - 12), at)
    if numbered:
        at = numbered.start() + 1
    elif before != "\n" and kind != "none" and name in _BODY:  # "CT CHEST FINDINGS:"
        begin = max(flat.rfind(stop, max(0, at - 60), at) for stop in "\n.:;!?") + 1
        if begin and (case != "lower" or flat[begin - 1] == "\n") and _is_region(flat[begin:at]):
            at = begin
    own_line = flat[at - 1] == "\n" and (not numbered or case == "upper")
    fresh = own_line or (not numbered and (start - at > 1 or flat[at - 1] in ".!?:;"))
    blank_before = at < 2 or flat[at - 2] == "\n"
    # "COMPARISON: No prior" is the whole of it
    alone = own_line and last not in _BODY and (kind == "colon" or (kind == "line" and case != "lower"))
    running = None  # the word before, where a sentence may go on with the phrase
    if not (alone or blank_before or flat[at - 1] in ".:;,!?)"):
        running = _RUNNING.search(flat, max(0, at - 24), at)
    shouted = running is not None and source[running.start(1) : running.end(1)].isupper()
    prose = running is not None and (running[1] in _BEFORE or running[1].endswith("'s"))
    core = name in ("findings", "impression", "merged", "preliminary") and not weak

    if of and (case == "lower" or not own_line):
        good = False
    elif name == "signature":
        good = fresh and (" " in phrase or kind == "colon")
        good = good and (case != "lower" or "signed" in phrase or phrase == "cc")
    elif name == "other":
        good = kind == "colon" and own_line and case != "lower" and last != "findings"
    elif name in ("addendum", "original", "foreign"):
        good = own_line and (case == "upper" or (kind != "none" and not prose))
        good = good or (fresh and (case == "upper" or (case == "title" and kind == "colon")))
    elif phrase in _ABBREVIATIONS:
        good = kind == "colon" and (fresh or case == "upper") and not prose
    elif last in _BODY and not (core or own_line or name == "impression" or (case == "upper" and name not in seen)):
        good = False  # "... Recommendation: CT in 6 months." belongs to the sentences before it
    elif last in _BODY and case != "upper" and not core and name in ("exam", "technique", "findings"):
        good = blank_before and kind != "none"
    elif kind == "none":
        after = _NEXT.match(flat, body)  # "IMPRESSION No acute disease"
        capital = source[body : body + 1].isupper() and not source[body + 1 : body + 2].isupper()
        if after is None or case == "lower" or (after[1] in _AFTER and not (capital and own_line)):
            return None
        opens = capital or after[1][-1] in ".)" or (own_line and after[1].isdigit())
        front = own_line and last not in _BODY
        if case == "title":
            good = opens and ((core and fresh) or (front and name in _FRONT))
        else:
            opens = opens or flat[body - 2 : body] == "  "
            good = (core and fresh) or front or (opens and (fresh or (core and not shouted)))
    elif case == "upper":
        good = own_line or (kind == "colon" and (core or fresh or not shouted)) or (core and (fresh or not shouted))
        good = good and not (prose and shouted and not (own_line and blank_before))
    elif case == "title":
        good = own_line and not (prose and kind == "line")
        good = good or (kind == "colon" and (fresh or (core and not prose and not numbered)))
    else:
        stopped = fresh and flat[at - 1] not in ":;" and name not in ("exam", "technique")
        good = (own_line and (core or blank_before)) or (kind == "colon" and (own_line or stopped or source.islower()))
        good = good and not prose and "." not in str(separator)
    if not good:
        return None
    return _Heading(at, body, name, source[at : body - len(separator or "")].strip(" \t\r\n*#_:=-[]<>|."), weak)


def _arrange(found: list[_Heading], flat: str) -> list[_Heading]:
    """The headings that open a section, by what stands before and after them."""
    firm = any(h.name == "findings" and not h.weak for h in found)
    any_findings = any(h.name in ("findings", "merged") for h in found)
    last_original = max([k for k, h in enumerate(found) if h.name == "original"], default=-1)
    kept: list[_Heading] = []
    current, seen, addendum = "preamble", set[str](), False
    for k, heading in enumerate(found):
        name = heading.name
        if name in ("region", "label"):
            if addendum or current in _BODY or current not in _FRONT:
                continue
            following = flat[heading.body : found[k + 1].start if k + 1 < len(found) else None]
            if name == "label":
                name = "other"
            elif ("findings" in seen and "impression" not in seen) or (
                not any_findings and not set(re.findall(r"[a-z-]{2,}", following)) <= _REGIONS | _GLUE
            ):  # but "CHEST: PA and lateral" names an exam
                name, heading.body = "findings", heading.start  # the organ's name stays in the text
            else:
                continue
        elif addendum and name not in ("addendum", "signature", "original"):
            # Before the report an addendum ends with the first heading of its front; after the report, never.
            ended = name == "impression" if "findings" in seen else name in _FRONT
            if k < last_original or {"findings", "impression"} <= seen or not ended:
                continue
        elif name == "findings" and heading.weak and firm:
            if current == "findings":
                continue
            name = "other"
        elif name == "impression" and heading.weak and "findings" not in seen and heading.words[:1] in "dD":
            name = "history"  # a "DIAGNOSIS:" above the findings is the referrer's
        if name != "signature":
            addendum = name == "addendum"
        heading.name = current = "other" if name == "original" else name
        seen.add(name)
        kept.append(heading)
    return kept


def _is_untidy(text: str) -> bool:
    """Whether `_clean` may have anything to do but strip."""
    raw = text.encode() if text.isascii() else b""  # without the odd bytes: ten times as fast as looking for each
    odd = len(raw.translate(None, _UNTIDY_BYTES)) < len(raw) if raw else any(sign in text for sign in _UNTIDY)
    return odd or any(run in text for run in _UNTIDY_RUNS)


def _clean(body: str, untidy: bool) -> str:
    """A section's text with "\\n" as line end, without markup, rules of dashes and blanks at the ends of lines."""
    if untidy:
        body = _LINE_END.sub("\n", body)
        if "<" in body:
            body = _TAG.sub(lambda tag: "\n" if tag[1].lower() in _BREAKING else "", body)
        if "&" in body:
            body = html.unescape(body)
        if "\t" in body or not body.isascii():
            body = body.translate(_SPACES)
        if any(mark in body for mark in _DECORATED):
            body = _MARKUP.sub("", body)
        body = "\n".join([line.strip() for line in body.split("\n")])
        if "\n\n\n" in body:
            body = re.sub(r"\n{3,}", "\n\n", body)
    body = body.strip().rstrip("*=|[<-– \n")
    return body if body[:2] == "* " else body.lstrip(":;=|]* \n")


def parse_report(text: str, *, addendum: Literal["drop", "append", "quarantine"] = "drop") -> ParsedReport:
    """Cut a report into sections and find its pair. Any text will do: what yields no pair gets a reason.

    addendum: "drop" ignores the text of addenda, "append" adds it to the impression, "quarantine" refuses the report.
    """
    source, flat = "\n" + text, "\n" + _shadow(text)
    headings = _arrange(_find(source, flat), flat)
    if text and (not headings or headings[0].start > 1):
        headings.insert(0, _Heading(1, 1, "preamble"))
    escaped = _escaped(text)
    untidy = escaped or _is_untidy(text)
    sections = []
    for k, heading in enumerate(headings):
        end = headings[k + 1].start if k + 1 < len(headings) else len(source)
        body = source[heading.body : end]
        body = _clean(body.replace("\\r", "").replace("\\n", "\n") if escaped else body, untidy)
        sections.append(Section(heading.name, heading.start - 1, end - 1, body, heading.words))
    texts: dict[str, list[str]] = {}
    for section in sections:
        texts.setdefault(section.name, []).append(section.text)

    parts = [section for section in sections if section.name == "findings" and _CONTENT.search(section.text)]
    findings = "\n".join(  # of "CHEST FINDINGS: ..." and "ABDOMEN FINDINGS: ..." the headings tell which is which
        f"{s.heading}: {s.text}" if len(parts) > 1 and " " in s.heading and not s.text.startswith(s.heading) else s.text
        for s in parts
    )
    pairs = zip(sections, headings, strict=True)
    filled = [(s.text, h.weak) for s, h in pairs if s.name == "impression" and _CONTENT.search(s.text)]
    candidates = [words for words, weak in filled if not weak] or [words for words, _ in filled]
    impression = candidates[-1] if candidates else ""
    preliminary = _CONTENT.search("".join(texts.get("preliminary", ())))
    reason: str | None = None
    if not text.strip():
        reason = "empty_report"
    elif "foreign" in texts:
        reason, findings, impression = "non_english_headings", "", ""
    elif _CONTENT.search("".join(texts.get("merged", ()))):
        reason, findings = "merged_findings_impression", ""
    elif "addendum" in texts and addendum == "quarantine":
        reason = "addendum"
    elif "findings" not in texts and "impression" not in texts:
        reason = "preliminary_only" if preliminary else "no_sections"
    elif not findings:
        reason = "empty_findings" if "findings" in texts else "no_findings"
    elif not impression:
        reason = "empty_impression" if "impression" in texts else "preliminary_only" if preliminary else "no_impression"
    elif len(candidates) > 1 and len({" ".join(_WORDS.findall(words.lower())) for words in candidates}) > 1:
        reason = "several_impressions"
    elif _repeats(impression, findings):
        reason = "impression_in_findings"
    if addendum == "append" and impression:
        impression = "\n".join([impression, *filter(None, texts.get("addendum", ()))])
    indication, comparison = (
        "\n".join(section.text for section in sections if section.name in names and section.text)
        for names in (("indication", "history"), ("comparison",))
    )
    return ParsedReport(sections, findings, impression, indication, comparison, reason, "addendum" in texts)


def _repeats(impression: str, text: str) -> bool:
    """Whether the whole impression, if of LEAK_WORDS words or more, stands in the text as one block."""
    low, text = impression.lower(), text.lower()
    for word in low.split():  # most impressions have a word that is not in the text: no need to look closer
        if len(word) > 2 and word.isascii() and word.isalpha() and word not in text:
            return False
    words = _WORDS.findall(low)
    if len(words) < LEAK_WORDS or any(len(word) > 2 and word not in text for word in words):
        return False
    words = _WORDS.findall(re.sub(r"^\d+\. ", "", renumber(impression).lower(), flags=re.M))
    unnumbered = re.sub(r"^\d+\. ", "", renumber(text), flags=re.M)
    block = f" {' '.join(words)} "
    return len(words) >= LEAK_WORDS and any(block in f" {' '.join(_WORDS.findall(t))} " for t in (text, unnumbered))


# How one word of each impression heading begins: a text without any of these has no such heading.
_STEMS = {
    next(word for word in phrase.split() if not re.match("final|overall|radiol|radiog|imaging|diagnostic", word))[:6]
    for phrase, name in _NAMES.items()
    if name[0] == "impression"
}
_ANSWERS = [stem for stem in _STEMS if not any(other in stem for other in _STEMS - {stem})]


def leaks(impression: str, prompt_text: str) -> bool:
    """Whether the answer stands in its own prompt: assert that it does not, before a pair is trained or scored on.

    True if the prompt has an impression heading with words after it, or contains the whole impression, of at least
    LEAK_WORDS words, as one block (case, punctuation and list numbers aside). A shorter impression ("No acute
    disease.") and a part of a longer one are what findings may say too. Give the prompt without the chat template.
    """
    small = prompt_text.lower()
    sections = parse_report(prompt_text).sections if any(stem in small for stem in _ANSWERS) else []
    headed = any(s.name in ("impression", "merged") and s.heading and _CONTENT.search(s.text) for s in sections)
    return headed or _repeats(impression, prompt_text)


def renumber(impression: str) -> str:
    """A list in the one form "1. ...\\n2. ...", an item a line; the only item of a list, and other text, as it is.

    Read are "1." "1)" "(1)" "#1." and, at the beginning of a line, "1-" "1:" and bullets. Inside a line a number
    counts only if it is the one due, so the 6 of "segment 6." stays, and nowhere after a word that takes a number
    ("BI-RADS 2.", "category 4.", "series 3."). Idempotent; nothing but markers and blanks changes.
    """
    text, before = _LINE_END.sub("\n", impression).strip(), ""
    if not any(mark in text for mark in _FIRST_MARKS) and not _BULLET.search(f"\n{text}"):
        return text
    while text != before:  # the only item of a list may be a list again
        before, text = text, _renumber_once(text)
    return text


def _renumber_once(text: str) -> str:
    marks: list[re.Match[str]] = []
    for begin in _MARK_BEGINS.finditer(text):
        if not (match := _MARK.match(text, begin.start())):
            continue
        before = text[max(0, match.start() - 40) : match.start()].rstrip(" \t")
        own_line = not before or before[-1] == "\n"
        before = before.rstrip()
        due = int(match[1] or match[2] or match[3]) == len(marks) + 1
        if own_line:
            good = marks or due
        else:
            capital = marks and text[match.end() : match.end() + 4].lstrip()[:1].isupper()
            good = due and not match[3] and (before[-1] in ".!?;:)" or capital)
        if not good:
            continue
        if word := _LAST_WORD.search(before[before.rfind(" ") + 1 :].lower()):
            if before[-1] == ".":
                if word[1] in _DOTTED:
                    continue
            elif word[1] in _NUMBERED or word[1].endswith("rads"):
                continue
        marks.append(match)
    if len(marks) > 1 or (marks and marks[0].start() == 0):
        ends = [mark.start() for mark in marks[1:]] + [len(text)]
        preface, items = text[: marks[0].start()], [text[m.end() : end] for m, end in zip(marks, ends, strict=True)]
    else:
        preface, *items = _BULLET.split("\n" + text)
        if preface or not items:
            return text
    items = [words for item in items if (words := " ".join(item.split()))]
    numbered = [f"{k}. {item}" for k, item in enumerate(items, 1)] if len(items) > 1 else items
    if len(items) == 1 and (repeated := _REPEATED.match(items[0])):
        numbered = [items[0][repeated.end() :]]
    return "\n".join(filter(None, [preface.strip(), *numbered]))
