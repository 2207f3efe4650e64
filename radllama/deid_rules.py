"""The rules of the identifier screen: what each cue word may stand beside, and numbers that need no cue.

A rule is called where its cue stands, with the whole text, and reports the spans that it takes for identifiers. CUES
says which words call which rules; `numbers` and `signs` look through the text by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from radllama.deid_words import CITIES, FIRST, LABELS, LAST, PLAIN_PLACE, STATE, STOP, STREETS

Add = Callable[[str, int, int, str], None]  # kind, start, end, rule
Rule = Callable[[str, int, int, Add], None]  # text, start and end of the cue

# ---- numbers that need no cue

_MM, _DD, _YYYY = "(?:0?[1-9]|1[0-2])", "(?:0?[1-9]|[12][0-9]|3[01])", "(?:18|19|20)[0-9]{2}"
_MONTH = (
    "(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|"
    "nov(?:ember)?|dec(?:ember)?)"
)
_CLOCK = r"(?:T[0-9]{2}:?[0-9]{2}(?::?[0-9]{2}(?:\.[0-9]+)?)?(?:Z|[+-][0-9]{2}:?[0-9]{2})?)?"
_EXTENSION = r"(?:,?[ ]?(?i:x|ext\.?|extension)[ ]?[0-9]{1,6})?"
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])"
_TRIGGER = re.compile(
    r"[0-9](?:[0-9]{4}|[0-9]{0,3}/[0-9]|[0-9]{3}-[01][0-9]|[0-9]{0,3}\)?[-. ]{1,2}[0-9]{1,4}[-. /][0-9]|"
    r"[0-9]?[A-Za-z]{3,9}[0-9]{2}|(?<=[91])[0-9]{1,2}(?:[- ]?[Yy]|[MF]\b))"
)
_NUMBER = re.compile(
    rf"""
    (?P<uid>[0-2](?:\.(?:0|[1-9][0-9]*)){{5,}})
  | (?P<ip>(?:{_OCTET}\.){{3}}{_OCTET})(?![0-9]|\.[0-9])
  | (?P<date>
        {_YYYY}(?P<a>[-/.]){_MM}(?P=a){_DD}(?![0-9]){_CLOCK}
      | (?:{_MM}(?P<b>[-/.]){_DD}(?P=b)|{_DD}(?P<c>[-/.]){_MM}(?P=c))(?:{_YYYY}|[0-9]{{2}})(?![-/.][0-9])
      | (?:19|20)[0-9]{{2}}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])
        (?:[0-2][0-9][0-5][0-9](?:[0-5][0-9])?|T[0-9]{{4,6}})?
      | {_MM}/(?:19|20)[0-9]{{2}}
      | (?:19|20)[0-9]{{2}}-(?:0[1-9]|1[0-2])(?!-)
      | {_DD}(?i:{_MONTH})(?:[0-9]{{4}}|[0-9]{{2}})
    )(?![0-9])
  | (?P<ssn>[0-9]{{3}}(?P<d>[- ])[0-9]{{2}}(?P=d)[0-9]{{4}})(?![0-9-])
  | (?P<phone>
        (?:(?:00)?1[-. ]?)?\(?[2-9][0-9]{{2}}(?:\)[ ]?|[-. ])[0-9]{{3}}[-. ]?[0-9]{{4}}(?![0-9]){_EXTENSION}
      | (?<=\+)[0-9]{{1,3}}(?:[ .-]?\(?[0-9]{{2,5}}\)?){{2,4}}(?![0-9])
    )
  | (?P<account>[3-6][0-9]{{3}}(?P<e>[ -])[0-9]{{4}}(?P=e)[0-9]{{4}}(?P=e)[0-9]{{1,4}})(?![0-9])
  | (?P<age_over_89>9[0-9]|1[01][0-9]|12[0-5])
        (?=[- ]?(?i:years?|yrs?)[- ]?(?i:old|of[ ]age|young)\b|[- ]?(?i:y(?:/|\.[ ]?)?o\b)|[YMF]\b(?!/))
  | (?P<day>{_MM}/{_DD})(?![0-9/]|\.[0-9])
  | (?P<zip>[0-9]{{5}}(?:-[0-9]{{4}})?)(?![0-9A-Za-z-])
  | (?P<other_id>[0-9]{{6,}}[A-Za-z]?(?:-[0-9]+)*|[0-9]{{2,}}-[0-9]{{4,}}-[0-9-]+)(?![.,][0-9])
    """,
    re.VERBOSE,
)
# Before a day without a year: "since 3/14", "the CT of 3/14", but not "pain 3/10" or "image 3/12".
_DAY_CUE = re.compile(
    r"(?i)(?:\b(?:on|since|dated?|until|through|as of|comparison|done|(?:compared|comparison|relative) (?:to|with)|"
    r"(?:study|exam(?:ination)?|CTA?|MRI?|MRA|radiographs?|x-?rays?|films?|scan|images|priors?|ultrasound|mammogram|"
    r"CXR)(?: (?:of|from|on|dated))?))[: ]+$"
)
_UNITS = re.compile(r"(?i)\s?(?:mm|cm|ml|cc|months?|weeks?|mos?|wks?|hours?|hrs|%|x\b|of the|years|ribs?|levels?)\b")
_SERIES = re.compile(r"(?i)\b(?:images?|series|levels?|im|slices?|ribs) $")  # "images 10-12-14"
_STATE_BEFORE = re.compile(rf"\b{STATE}[,.]?\s+$")
_CITY_BEFORE = re.compile(r"((?:[A-Z][A-Za-z.'-]+ ){0,2}[A-Z][A-Za-z.'-]+),? $")
_CODE_HEAD = re.compile(r"(?<![A-Za-z0-9])(?:[A-Za-z]{1,4}[0-9A-Za-z]{0,8}[-/]?|[0-9]{2,4}-[A-Za-z]{1,4}-?)$")


def numbers(text: str, add: Add) -> None:
    at, search = 0, _TRIGGER.search
    while found := search(text, at):
        start = found.start()
        while start and "0" <= text[start - 1] <= "9":
            start -= 1
        at = found.start() + 1
        while "0" <= text[at : at + 1] <= "9":
            at += 1
        number = _NUMBER.match(text, start)
        if number is None:
            continue
        kind, end = str(number.lastgroup), number.end()
        before = text[start - 1] if start else " "
        if before.isalnum() or before in "-/_" or (before == "." and "0" <= text[start - 2 : start - 1] <= "9"):
            head = _CODE_HEAD.search(text, max(0, start - 14), start)
            if head and end - start > 4 and kind in ("other_id", "zip", "ssn", "phone", "account"):
                add("other_id", head.start(), end, "code")
                at = max(at, end)
            if before != "-" or kind not in ("date", "phone"):
                continue
        if kind == "day":
            if not _DAY_CUE.search(text, max(0, start - 34), start) or _UNITS.match(text, end):
                continue
            kind = "date"
        elif kind == "zip":
            state = _STATE_BEFORE.search(text, max(0, start - 18), start)
            if not state:
                continue
            city = _CITY_BEFORE.search(text, max(0, state.start() - 40), state.start())
            if city:
                add("geographic", *city.span(1), "city")
        elif kind == "date" and (_UNITS.match(text, end) or _SERIES.search(text, max(0, start - 12), start)):
            continue
        add(kind, start, end, "number")
        at = max(at, end)


# ---- persons

_UP, _LETTER = "[A-ZÀ-ÖØ-ÞĀ-ɏḀ-ỿЀ-Я]", r"[^\W\d_]"
PARTICLE = "van|von|der|den|de|del|della|di|da|dos|do|du|la|le|el|al|bin|ibn|ter|ten|y"
_WORD = rf"{_UP}{_LETTER}*(?:['-]{_LETTER}+)*"
_TOKEN = re.compile(rf"({_UP}\.(?: ?{_UP}\.)*)|((?:{PARTICLE})\b)|({_WORD})")
_EPONYM = re.compile(
    r"(?i)(?:'s)? (?:cysts?|disease|syndrome|sign|fractures?|lesion|catheter|tumou?r|sarcoma|lymphoma|drain|tubes?|"
    r"nodes?|criteria|classification|procedure|hernia|lines?|type|grade|rods?|splint|test|view|anatomy)\b"
)
_ENDINGS = ("oma", "tis", "sis", "gia", "ion", "ing", "phy", "gic", "ism", "ory", "ity", "ine", "ary")  # of no names
_ALSO_NAMES = frozenset(
    ("frank", "april", "june", "august", "may", "day", "church", "lane", "early", "young", "page", "ward", "french")
)


def _person(text: str, at: int, *, listed: bool = False, weak: bool = False, titled: bool = False) -> int:
    """The end of the name at `at`, or -1. `listed`: also "Last, First". `weak`: the cue alone does not do, so capitals
    need a word of the lists, and so does a single word that looks like a term. `titled`: "Dr. Frank" is a name."""
    words: list[str] = []
    first, end, initials, comma, more = at, -1, False, False, 0
    while len(words) < 5:
        token = _TOKEN.match(text, at)
        if token is None:
            break
        word, at = token.group(), token.end()
        if token.lastindex == 3:
            low = word.lower()
            owner = low.endswith("'s") and len(low) > 3
            low = low[:-2] if owner else low
            if low in STOP and not (comma and len(word) == 1):
                sure = words[-1] in FIRST if words else titled or (listed and text.startswith(", ", at))
                if low not in _ALSO_NAMES or not sure:
                    break
            if len(word) > 1 or words:
                words.append(low)
                end = at - 2 if owner else at
            more += comma
            if owner or more == 2:
                break
        elif token.lastindex == 1:
            initials = True
            end = at if words else end
        following = text[at : at + 2]
        if following[:1] in (",", "^") and listed and words and (following[0] == "^" or not comma):  # DICOM's DOE^JANE
            comma, at = True, at + 1 + (following == ", ")
        elif following[:1] == " " and following != "  ":
            at += 1
        elif token.lastindex != 1 or not following[:1].isalpha():
            break
    if not words or _EPONYM.match(text, end):
        return -1
    if weak and not initials and FIRST.isdisjoint(words) and LAST.isdisjoint(words):
        term = len(words) == 1 and (len(words[0]) < 4 or words[0].endswith(_ENDINGS))
        return -1 if term or text[first:end].isupper() else end
    return end


_TITLE = re.compile(r"(?i)(?:drs?|prof|professor|doctor|mrs?|ms|miss|mister)(\.? )")
_AND, _SMALL = re.compile(r",? (?:and|AND|&) |, |/"), re.compile("[a-z]+")


def _title(text: str, start: int, end: int, add: Add) -> None:
    title = _TITLE.match(text, start)
    if title is None:
        return
    word, at = text[start:end], title.end()
    # MR and MS are also resonance and sclerosis.
    weak = word in ("MR", "MS") or (word in ("Mr", "Ms") and text[at : at + 3].isupper())
    while (stop := _person(text, at, weak=weak, titled=True)) > 0:
        add("name", at, stop, "title")
        more = _AND.match(text, stop)
        if word.lower() != "drs" or not more:
            return
        at = more.end()
    low = _SMALL.match(text, at)
    if low and low.group() in LAST and word == "dr":
        add("name", at, low.end(), "title")


_CREDENTIAL = re.compile(
    r"(M\.? ?D\b|D\. ?O\b|R\. ?N\b|N\. ?P\b|RN|PA-C|P(?i:h)\.? ?D|DNP|CRNP|APRN|LPN|MBBS|MBBCh|FRCR|FRCPC|FACR|DDS|DPM|"
    r"RDMS|RVT|RT ?\(R\)|ARRT|CNM|CRNA|DO|NP|PA|RT)(?![A-Za-z])"
)  # fmt: skip
_RUN = re.compile(
    rf"((?:{_UP}{_LETTER}+(?:['-]{_LETTER}+)*, )?(?:{_UP}\. ?|(?:{PARTICLE}) |{_WORD} ){{0,4}}(?:{_UP}\.|{_WORD}))"
    r"(,? )$"
)
_PIECE = re.compile(r"[^\s,]+,?\s?")


def _credential(text: str, start: int, end: int, add: Add) -> None:
    mark = _CREDENTIAL.match(text, start)
    if not mark or (mark.group() in ("DO", "NP", "PA", "RT") and text[max(0, start - 2) : start] != ", "):
        return
    if not (run := _RUN.search(text, max(0, start - 64), start)):
        return
    at, stop = run.span(1)
    for piece in _PIECE.finditer(text, at, stop):
        word = piece.group().strip(" ,.")
        if word.lower() in STOP or (word.islower() and piece.start() == at):
            at = piece.end()
    if sum(c.isalpha() for c in text[at:stop]) > 1:
        add("name", at, at + len(text[at:stop].rstrip()), "credential")


# "Attending Radiologist: X", "Ordered by: X", "Patient Name X"
_ROLE = re.compile(
    r"(?i)[a-z]+(?:'?s)?(?: (?:and|by|name|last|first|full|physician|provider|radiologist|doctor|md|clinician|surgeon|"
    r"attending|resident|fellow|technologist|contact|nurse|approved))*"
    r"(?:[ \t]*(?:\([^()\n]{0,20}\))?[ \t]*[:=][ \t]*(?:\n[ \t]*)?|(?<=[ ]name)[ \t]+)(?:Drs?\.? )?"
)
_ROLE_WORDS = ("patient", "resident", "attending", "radiologist", "technologist")


def _role(text: str, start: int, end: int, add: Add) -> None:
    role = _ROLE.match(text, start)
    at = role.end() if role else end + 1 + (text[end : end + 2] == ", ")
    stop = _person(text, at, listed=role is not None, weak=role is None)
    name = text[at : max(at, stop)]
    # Without a colon two words in small letters: "Patient Jane Roe was examined."
    if name and (role or (" " in name and not name.isupper() and text[start:end].lower() in _ROLE_WORDS)):
        add("name", at, stop, "role")


_BY = re.compile(
    r"(?i)(?:signed|dictated|read|interpreted|transcribed|reviewed|approved|ordered|requested|performed|verified|"
    r"reported|referred|authenticated|finali[sz]ed|prepared|report|seen|supervised|assisted|edited|entered|"
    r"obtained|given|accompanied|sent)(?: (?:and|&|electronically|on|to|off|in|behalf|me|out)| \w+ed)*[ :]*$"
)
_HELPER = re.compile(
    r"(?i)[ :]*(?:the )?(?:(?:on-call|referring|ordering|covering|charge|attending|emergency|primary) )*(?:(?:nurse|"
    r"resident|fellow|physician|attending|radiologist|surgeon|provider|hospitalist|intern|technologist)s?,? )?"
    r"(?:dr\.? )?"
)  # fmt: skip
_OBJECT = re.compile(r"\b(?i:with|to|by)\b")
_KIN = re.compile(r"(?i)[a-z]+,? (?:is |named )?")

_SUBJECT = re.compile(rf"((?:(?:{_UP}\.|{_WORD}) ){{1,3}}{_WORD}),? (?i:is|was) (?i:an?) [^.\n]{{0,30}}$")


def _subject(text: str, start: int, end: int, add: Add) -> None:
    """X is a 54-year-old man"""
    subject = _SUBJECT.search(text, max(0, start - 90), start)
    if subject and _person(text, subject.start(1)) == subject.end(1):
        add("name", *subject.span(1), "subject")


def _by(text: str, start: int, end: int, add: Add) -> None:
    helper = _HELPER.match(text, end)
    at = helper.end() if helper else end
    if (stop := _person(text, at, listed=True)) > 0 and _BY.search(text, max(0, start - 70), start):
        add("name", at, stop, "by")


def _verb(text: str, start: int, end: int, add: Add) -> None:
    """notified X; discussed ... with X; communicated ... to X; the person after the verb or after its preposition."""
    stop = text.find("\n", end, end + 70)
    objects = _OBJECT.finditer(text, end, stop if stop > 0 else end + 70)
    for here in (end, *(found.end() for found in objects)):
        helper = _HELPER.match(text, here)
        at = helper.end() if helper else here
        if at > here and (stop := _person(text, at, weak=True)) > 0:
            return add("name", at, stop, "verb")
    return None


def _kin(text: str, start: int, end: int, add: Add) -> None:
    """the patient's wife X; I, X, have reviewed ..."""
    attests = text.startswith("I, ", start)
    kin = None if attests or end == start + 1 else _KIN.match(text, start)
    at = start + 3 if attests else kin.end() if kin else -1
    if at > 0 and (stop := _person(text, at, weak=True)) > 0:
        add("name", at, stop, "kin")


_LAST_BEFORE = re.compile(rf"(?<!\w)({_UP}{_LETTER}+(?:['-]{_LETTER}+)*), $")


def _first_name(text: str, start: int, end: int, add: Add) -> None:
    """A common given name with another capitalised word; in capitals, with a common surname."""
    if not text[start].isupper() or text[start - 1 : start] in ("-", "'") or text[end : end + 1] in ("-", "'"):
        return
    last = _LAST_BEFORE.search(text, max(0, start - 24), start)
    surname = last.group(1).lower() if last else ""
    head = last and text[max(0, last.start() - 1) : last.start()] in ("", "\n") and surname not in STOP
    at = last.start(1) if last and (head or surname in LAST) else start
    stop = _person(text, at, listed=at < start)
    name = text[at:stop].split()
    sure = head or not text[at:stop].isupper() or not LAST.isdisjoint(word.lower() for word in name)
    if stop > 0 and len(name) > 1 and sure and not name[-1].lower().endswith(_ENDINGS):
        add("name", at, stop, "names")


# ---- labelled numbers: "MRN: 1234567"

_NUM = r"(?:[ \t./-]{0,3}(?:(?:numbers?|num|no|nos|nr|ids?|identifiers?|ident|code)\b\.?|#))"
_VALUE = (
    r"\.?[ \t]*(?:[:#=/(-]{1,2}[ \t]*(?:\n[ \t]*)?)?(?:(?:on file )?(?:is|was)[ \t]+)?"
    r"(?P<v>[0-9]{3} [0-9]{2,3} [0-9]{3,4}\b|[0-9]{4} [0-9]{4} [0-9]{4} [0-9]{4}\b|\([0-9]{2}\)[0-9A-Za-z()]{8,}|"
    r"(?=[A-Za-z]{0,8}[-/.]?[A-Za-z]{0,4}[-/.]?[0-9])[A-Za-z0-9]+(?:[-/.][A-Za-z0-9]+)*)"
)
_PLATE = re.compile(
    r"(?i:(?:(?:licen[cs]e|vehicle|number) )?plates?(?:[ .]*(?:number|no|#))?[ .:#]*(?:is )?)"
    r"(?P<v>(?=[A-Z -]{0,5}[0-9])[A-Z0-9]{1,4}[^\w\n]?[A-Z0-9]{2,6})(?![A-Za-z0-9])"
)


def _label_forms() -> dict[str, re.Pattern[str]]:
    """First word of a label -> one expression for all labels that start with it, the longest first."""
    forms: dict[str, list[tuple[int, str]]] = {}
    for kind, labels in LABELS.items():
        for i, label in enumerate(labels.split(", ")):
            words = "[. ]{1,2}".join(re.escape(word) for word in label.removesuffix("#").split())
            form = rf"(?P<{kind}__{i}>{words}\b{_NUM}{'{1,3}' if label.endswith('#') else '{0,3}'})"
            forms.setdefault(re.split("[^a-z]", label)[0], []).append((-len(label), form))
    return {
        first: re.compile("(?:" + "|".join(form for _, form in sorted(group)) + ")" + _VALUE, re.IGNORECASE)
        for first, group in forms.items()
    }


_LABEL_FORMS = _label_forms()


def _labelled(text: str, start: int, end: int, add: Add) -> None:
    plate = _PLATE.match(text, start)
    if plate:
        return add("vehicle", *plate.span("v"), "plate")
    form = _LABEL_FORMS.get(text[start:end].lower())
    found = form.match(text, start) if form else None
    if found:
        value = found.group("v")
        digits = sum("0" <= c <= "9" for c in value)
        if digits > 4 or (digits == 4 and (len(value) > 4 or value[:2] not in ("19", "20"))):
            kind = next(name for name, hit in found.groupdict().items() if hit and name != "v")
            add(kind.split("__")[0], *found.span("v"), "label")
    return None


# ---- dates in words, ages

_NTH = "(?:st|nd|rd|th)?"
_DAY_BEFORE = re.compile(
    rf"(?i)(?<![\w/.])(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?\.?,? )?(?:the )?{_DD}{_NTH}"
    r"(?: of)?[ ./-]$"
)
_WEEKDAY_BEFORE = re.compile(r"(?i)\b(?:mon|tues|wednes|thurs|fri|satur|sun)day,? $")
_DAY_AFTER = re.compile(
    rf"(?i)\.?[ ,/-]{{0,2}}(?:{_DD}{_NTH}(?![0-9]|[./][0-9])(?P<year>,?[ /-]?(?:(?:of )?{_YYYY}|'[0-9]{{2}}|"
    rf"(?<=[/-])[0-9]{{2}})(?![0-9]))?|(?P<bare>(?:of )?{_YYYY}(?![0-9])|'[0-9]{{2}}(?![0-9])))"
)
_YEAR_AFTER = re.compile(rf"(?i)(?:\.?,? (?:of )?|[./-]){_YYYY}(?![0-9])|[/-][0-9]{{2}}(?![0-9])")
_AGE = re.compile(
    r"(?i)(?:ages?|aged)\b(?:/sex)?[ \t:=]*(?:is |of )?(?:[MF] ?/ ?)?(9[0-9]|1[01][0-9]|12[0-5])"
    r"(?![0-9%]|\.[0-9]|[ -]?(?:months?|mo|weeks?|wks?|days?|%|hours?)\b)|"
    r"sex ?/ ?age[ :]*[MF]? ?[/,]? ?((?:9[0-9]|1[01][0-9]))(?![0-9])|"
    r"(ninety(?:[- ](?:one|two|three|four|five|six|seven|eight|nine))?|hundred(?:[- ](?:and[- ])?[a-z]{3,5})?)"
    r"(?=[- ]*(?:years?|yrs?|y/?o|y\.o))|(nonagenarian|centenarian)"
)


def _month(text: str, start: int, end: int, add: Add) -> None:
    back = _DAY_BEFORE.search(text, max(0, start - 26), start)
    after = (_YEAR_AFTER if back else _DAY_AFTER).match(text, end)
    weekday = None if back else _WEEKDAY_BEFORE.search(text, max(0, start - 12), start)
    word, stop = text[start:end], after.end() if after else end
    if not (after and (back or after.group("year") or after.group("bare"))):
        # Without a year: "may 5 mm", "segment 5 MAY represent", "MAR 3" of a list
        verb = word.lower() in ("may", "march", "mar")
        if not (after or back) or _UNITS.match(text, stop) or word.islower() or (back and verb and word != "May"):
            return
    add("date", back.start() if back else weekday.start() if weekday else start, stop, "month")


def _age(text: str, start: int, end: int, add: Add) -> None:
    found = _AGE.match(text, start)
    if found:
        add("age_over_89", *found.span(found.lastindex or 0), "age")


# ---- telephone, network, files

_CALL = re.compile(
    rf"""(?i)(?P<cue>fax(?:ed)?|facsimile|telephone|phone|tel|ph|cell|mobile|pagers?|beeper|ext|extension|call(?:ed)?|
    contact|paged|reached|dial|hotline|callback)\b(?P<gap>[^\n0-9]{{0,30}}?)\(?(?<![0-9A-Z])(?P<v>
    (?:(?:(?:\+|00)?[0-9]{{1,3}}[-. ]?)?\(?[0-9]{{3}}[-.) ]{{0,2}}[0-9]{{3}}[-. ]?[0-9]{{4}}|[0-9]{{3}}[-. ][0-9]{{4}}|
    [0-9]-[0-9]{{4}}|x?[0-9]{{4,5}})(?![0-9]|[-/.][0-9]){_EXTENSION.replace("(?i:", "(?:")})""",
    re.VERBOSE,
)


def _phone(text: str, start: int, end: int, add: Add) -> None:
    found = _CALL.match(text, start)
    if found is None:
        return
    cue, gap, digits = found.group("cue").lower(), found.group("gap"), sum("0" <= c <= "9" for c in found.group("v"))
    if digits < 10 and (". " in gap or ";" in gap or _UNITS.match(text, found.end())):
        return
    if digits == 4 and (
        cue in ("call", "called", "contact", "paged", "reached") or len(gap.strip(" .:#")) > 7
    ):  # "called at 1430"
        return
    add("fax" if cue.startswith("fa") else "phone", *found.span("v"), "call")


_LOCAL_PART, _DOMAIN = re.compile(r"[\w.+'%-]{1,64}$"), re.compile(r"@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}")
_URL = re.compile(r"(?i)(?:(?:https?|ftp|dicom|file)://|www\.)[^\s<>\"'\0]+")
_HOST = re.compile(r"(?<![@\w.-])[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.$")
_PATH = re.compile(r"[A-Za-z]+(?::[0-9]+)?(?:/[^\s<>\"'\0]*)?(?![\w@])")
_HEX = re.compile(r":(?<=[0-9A-Fa-f]:)[0-9A-Fa-f]{1,4}:[0-9A-Fa-f:]|::(?=[0-9A-Fa-f])")
_HEX_BEFORE, _COLONS = (
    re.compile("[0-9A-Fa-f:]{1,40}$"),
    re.compile(r"[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])"),
)
_UUID = re.compile(r"-(?<=[0-9A-Fa-f]{8}-)(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}(?![0-9A-Fa-f])")
_UDI = re.compile(r"\(01\)[0-9]{14}(?:\([0-9]{2}\)[0-9A-Za-z]+)*")
_FILE = re.compile(r"[\w-]+\.$")


def _url(text: str, start: int, end: int, add: Add) -> None:
    at, whole = start, _URL.match(text, start)
    if whole is None:
        host, whole = _HOST.search(text, max(0, start - 80), start), _PATH.match(text, start)
        if host is None or len(host.group()) < 4 or text[start:end].istitle():  # "No effusion.Com..." lost a space
            return
        at = host.start()
    if whole:
        add("url", at, start + len(whole.group().rstrip(".,;:)]")), "url")


def _file(text: str, start: int, end: int, add: Add) -> None:
    stem = _FILE.search(text, max(0, start - 60), start)
    if stem:
        add("photo", stem.start(), end, "file")


def signs(text: str, add: Add) -> None:
    """What shows by a sign: @, colons of a network address, hyphens of a UUID, (01) of a device identifier."""
    at = text.find("@")
    while at >= 0:
        domain, local = _DOMAIN.match(text, at), _LOCAL_PART.search(text, max(0, at - 64), at)
        if domain and local:
            add("email", local.start(), domain.end(), "email")
        at = text.find("@", at + 1)
    for found in _HEX.finditer(text):
        before = _HEX_BEFORE.search(text, max(0, found.start() - 40), found.start())
        whole = _COLONS.match(text, before.start() if before else found.start())
        if whole and not text[max(0, whole.start() - 1) : whole.start()].isalnum():
            parts = whole.group().split(":")
            if len(parts) == 6 and all(len(part) == 2 for part in parts):
                add("device", *whole.span(), "MAC")
            elif len(parts) == 8 or ("::" in whole.group() and any("0" <= c <= "9" for c in whole.group())):
                add("ip", *whole.span(), "IPv6")
    if text.count("-") > 3:
        for found in _UUID.finditer(text):
            add("other_id", found.start() - 8, found.end(), "UUID")
    if "(01)" in text:
        for found in _UDI.finditer(text):
            add("device", *found.span(), "UDI")


# ---- places

_CAPS = r"(?:(?:S[tT]|M[tT]|F[tT])\.|[A-Z][A-Za-z]*(?:[.'-][A-Za-z]+)*(?![0-9]))"
_PLACE_RUN = re.compile(rf"(?<![\w'.-])((?:{_CAPS} ){{1,5}})$")
_STREET_RUN = re.compile(rf"(?<![\w.-])[0-9]{{1,6}}[A-Za-z]?(?: [NSEW]\.?)?(?: {_CAPS}){{1,3}} $")
_SUITE = (
    r"\.?(?:,? (?:(?i:apt|apartment|suite|ste|unit|room)\.?|#) ?#?\w{1,6})?"
    rf"(?:, {_CAPS}(?: {_CAPS}){{0,2}}(?=[.,\n]|$| {STATE}))?"
)
_SUITE_AFTER, _BOX = re.compile(_SUITE), re.compile(r"(?i:(?:p\.? ?o\.? )?box) [0-9]+" + _SUITE)
_REST = re.compile(
    r"(?i)(?:address|city|county|facility|institution|performed at|residence|town|employer)[ \t]*:[ \t]*(?:\n[ \t]*)?"
    r"([A-Z0-9][^\n\0]{0,100}?)[ .,]{0,9}(?=\n|\0|$|  |\t|\b(?:Phone|Tel|MRN|DOB|Fax|ZIP)\b)"
)
_TOWN = re.compile(rf"((?:{_CAPS} ){{0,3}}{_CAPS})(?=(, {STATE})?)")
_LIVES = re.compile(r"[A-Za-z]+[^.\n]{0,20}?(?<!\w)(?i:in|from|near|at|to|of) (?i:the )?")
_IN = re.compile(r"(?i)\b(?:in|from|near|of|at|to) $")
_CENTERS = {"medical", "cancer", "health", "trauma", "imaging", "nursing", "care", "rehabilitation", "surgical"}
_TOWNS = re.compile(
    r"(?i:New (?:York|Orleans|Haven|Bedford|Britain|Rochelle)|San (?:Antonio|Diego|Francisco|Jose)|"
    r"Santa (?:Ana|Fe|Barbara)|(?:St\.|Saint) (?:Louis|Paul|Petersburg)|Los Angeles|Las Vegas|"
    r"Fort (?:Worth|Wayne|Lauderdale)|Salt Lake City|El Paso|Ann Arbor|Kansas City|Long Beach|Palo Alto)\b"
)  # fmt: skip


def _place_name(text: str, start: int, end: int, add: Add) -> None:
    """X Hospital, X Medical Center, X Nursing Home, X County."""
    run = _PLACE_RUN.search(text, max(0, start - 60), start) if text[start].isupper() else None
    if run is None:
        return
    at, names = run.start(1), list(_PIECE.finditer(text, run.start(1), start))
    low = [name.group().strip(" .,").lower() for name in names]
    if text[start:end].lower() in ("center", "centre", "home", "system") and low[-1] not in _CENTERS:
        return
    for i in range(len(low) - 1, -1, -1):
        if low[i] in ("the", "at", "of", "and", "this", "to", "your") or (low[i] in STOP and low[i] not in PLAIN_PLACE):
            at, low = names[i].end(), low[i + 1 :]
            break
    if not PLAIN_PLACE.issuperset(low):
        add("geographic", at, end, "place")


def _street(text: str, start: int, end: int, add: Add) -> None:
    run = _STREET_RUN.search(text, max(0, start - 48), start) if text[start].isupper() else None
    if run and STOP.isdisjoint(run.group().lower().split()[1:]):
        suite = _SUITE_AFTER.match(text, end)
        add("geographic", run.start(), suite.end() if suite else end, "street")


def _address(text: str, start: int, end: int, add: Add) -> None:
    found = _REST.match(text, start)
    if found and not found.group(1)[0].islower():
        return add("geographic", *found.span(1), "address")
    found = _BOX.match(text, start)
    if found:
        add("geographic", *found.span(), "address")
    return None


def _lives(text: str, start: int, end: int, add: Add) -> None:
    """lives in X, transferred from X, a collision near X"""
    lives = _LIVES.match(text, start)
    town = _TOWN.match(text, lives.end()) if lives else None
    if town is None:
        return
    stop = town.end(1)
    for piece in _PIECE.finditer(text, *town.span(1)):
        if (low := piece.group().strip(" .").lower()) in STOP and low not in STREETS:
            stop = piece.start()
            break
    name = text[town.start() : stop].rstrip()
    if name and not PLAIN_PLACE.issuperset(name.lower().split()) and not STOP.issuperset(name.lower().split()):
        add("geographic", town.start(), town.start() + len(name), "town")


def _city(text: str, start: int, end: int, add: Add) -> None:
    if text[start].isupper():
        two = _TOWNS.match(text, start)
        town = None if two or text[start:end].lower() not in CITIES else _TOWN.match(text, start)
        sure = town and (town.group(2) or _IN.search(text, max(0, start - 6), start))
        if two or (sure and not text.startswith(" Sci", end)):  # "Boston Scientific"
            add("geographic", start, two.end() if two else end, "city")


# ---- which word calls which rules


def _cue_table() -> dict[bytes, tuple[Rule, ...]]:
    table: dict[bytes, list[Rule]] = {}
    for words, rule in (
        ("dr drs mr mrs ms miss mister prof professor doctor", _title),
        ("m d r n p np pa rn md do ph phd dnp crnp aprn lpn mbbs mbbch frcr frcpc facr dds dpm rdms rvt rt arrt cnm "
         "crna",
         _credential),
        ("patient pt name provider physician radiologist attending resident fellow technologist sonographer surgeon "
         "nurse transcriptionist dictated signed read interpreted transcribed ordered requested reviewed referred "
         "referring approved pcp cc contact ordering interpreting reader author clinician "
         "last first guarantor preliminary final "
         "attn verified performed reporting emergency", _role),
        ("by", _by),
        ("man woman male female gentleman lady boy girl", _subject),
        ("discussed discuss reviewed spoke spoken speaking communicated conveyed relayed reported called told shown "
         "sent telephoned phoned paged conferred consulted conversation together shared notified informed contacted "
         "alerted per attending nurse", _verb),
        ("daughter son wife husband mother father sister brother spouse partner guardian niece nephew friend "
         "caregiver i",
         _kin),
        (" ".join(FIRST), _first_name),
        (" ".join({*_LABEL_FORMS, "plate", "plates", "licence", "number"}), _labelled),
        ("jan january feb february mar march apr april may jun june jul july aug august sep sept september oct october "
         "nov november dec december", _month),
        ("age aged ages ninety hundred nonagenarian centenarian sex", _age),
        ("fax faxed facsimile telephone phone tel ph cell mobile pager pagers beeper ext extension call called contact "
         "paged reached dial hotline callback", _phone),
        ("http https ftp dicom file www com org net edu gov mil biz info io", _url),
        ("jpg jpeg png heic tif tiff gif bmp", _file),
        ("hospital hospitals clinic infirmary center centre home hospice county healthcare system", _place_name),
        (" ".join(STREETS), _street),
        ("address city county facility institution performed residence town employer po p box", _address),
        ("lives live living lived resides residing reside comes transferred arrived originally native moved born mail "
         "mailed collision accident resident", _lives),
        (" ".join(CITIES) + " new san santa st saint los las fort salt el ann kansas long palo", _city),
    ):  # fmt: skip
        for word in set(words.split()):
            table.setdefault(word.encode(), []).append(rule)
    return {word: tuple(rules) for word, rules in table.items()}


CUES = _cue_table()
