r"""The answer of a response, and the normal form of answers and golds: verify.py's rules 1 to 4.

The normal form is a value (LaTeX for the grammar) and a unit. The table SPELLINGS rewrites what can
be spelled in several ways; then:
 a. Dress is dropped: a box or braces around all, a leading `=` or `\approx`, a final period.
    `x \approx 3` is `x=3`.
 b. `1,000`, `1 000`, `1\,000` and `1{,}000` are one number, `3 1/2` is 3\frac{1}{2}.
 c. Words after a number are its unit: `15 balls`, `9 (apples)`, `5\text{ cm}^2`, `1.5 km/h`. So are
    the signs in `\$18` and `90^\circ`. Letters that touch the number are variables, but for those
    in STUCK (`5cm`). So is a single letter (`5t`, `5 m`: the metre is `\text{m}`), and so are bare
    letters after a variable (`2x abc`). Percent stays: to math-verify `50\%` is 0.5 or 50.
 d. The base of `4210_5` is a unit, and so is what a letter stands for (`4k, k\in\mathbb Z`).
 e. `5\pm2` is two answers, or four if there are two of them; one \mp ties all.
 f. Other words after a number (`5 million`, `12 hours and 30 minutes`), two numbers side by side
    (`10 80`) and sentences are not read: such an answer is wrong, such a gold is unusable.

Two units agree if one is missing, if they are spellings of one name (`centimeters`, `\mathrm{cm}`),
or if one says the same in more words (`balls`, `red balls`); none is converted. A base may be
missing from the answer only.
"""

import re
from functools import lru_cache
from math import gcd
from unicodedata import normalize

# The table of spellings, in the order in which they are replaced, before the rules: a pattern, what
# it becomes (a command is followed by a space), an example. CAPITALS stand for what is below.
# [0-9] throughout, since \d takes other scripts' digits too; \wp is a name that nobody uses.
TABLE = r"""
(?:(?<!\\)\\(?:[,;:> ]|(?:quad|qquad|thinspace)(?![A-Za-z]))|~(?!=)|\s)+   SPACE   5\,\quad5
\\!|\\color ?\{[^{}]*\}|\\[bB]igg?[lrm]?(?![A-Za-z])|(?<=\()[ ]   NOTHING   \color{red}\big( 5
\\(?:displaystyle|textstyle|small|[lL]arge|LARGE|[hH]uge|bf|rm)(?![A-Za-z])   NOTHING   \large 5
\\(?:mathbf|boldsymbol|bm|underline|textcolor ?\{[^{}]*\}) ?(?=\{)   NOTHING   \mathbf{5}
\\varnothing(?![A-Za-z])   \emptyset   \varnothing
(?<=[0-9)}])!=   ! =   3!=6
(?<![A-Za-z\\])(?=(?:pi|sqrt)(?![A-Za-z]))   \   pi/3
\\mathbb ([A-Z])   \mathbb{\1}   \mathbb Z
(?<![0-9])(?:\\[lc]?dots[cbm]?(?![A-Za-z])|…|\.\.\.)   \wp   1,2,\dots
\\\\ ?\[[0-9.]+ ?[a-z]+\]   \\   1\\[4pt]2
([0-9]*\.[0-9]+|\b1)E10(\{)?([+-]?[0-9]+)(?(2)\})(?![\w.])   \1\times10^{\3}   7.2e-6
\b([0-9]+)E10(\{)?([0-9]+|[+-][0-9][0-9]+)(?(2)\})(?![\w.])   \1\times10^{\3}   3e8, not 2e-1/3
((?:^|[=,(\[]) ?-?[0-9]+)E10([+-][0-9])(?= ?(?:$|[,)\]]|\\text|\\mathrm))   \1\times10^{\2}   5e-6
\\(?:text|mathrm) ?\{ ?([ei]) ?\}   \1   5\mathrm{i}
(\\sqrt(?: ?\[[^\]]*\])?) ?\(([^()]*)\)   \1{\2}   \sqrt(x+1)
(\\sqrt(?: ?\[[^\]]*\])?) ?([0-9]+(?:\.[0-9]+)?|ONE)   \1{\2}   \sqrt[3]5
(\\(?:[dtc]?frac|binom)) ?ONE   \1{\2}   \frac 5 8
(\\(?:[dtc]?frac|binom) ?GROUP) ?ONE   \1{\3}   \frac{5}8
(\\(?:sin|cos|tan|cot|sec|csc)) ?(\(?) ?([0-9.]+)DEGREE   \1\2(\3\pi/180)   \sin 60^\circ
([0-9]+) ?: ?([0-9]+) ?: ?([0-9]+)   (\1,\2,\3)   1:2:3
(?<![\w./] )\b([0-9]+) ([1-9][0-9]?)/([0-9]+)   \1\frac{\2}{\3}   3 1/2
^TEXTANSWER\}|^(TEXT)?ANSWER   \1   The answer is 5
"""
TEXT = r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mbox) ?\{ ?"  # \text{ or \mathrm{: upright words
GROUP = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"  # {5}, with braces in braces in it at most
DEGREE = r" ?(?:\^ ?(?:\{ ?\\circ ?\}|\\circ(?![a-z]))|\\degree)"  # ^\circ or ^{\circ}
PARTS = {
    "E10": r" ?(?:[eE]|\\(?:text|mathrm) ?\{[eE]\})",  # e of 2.5e3
    "ONE": r"([0-9A-Za-z]|\\pi(?![A-Za-z]))",  # what TeX takes without braces
    "ANSWER": r"(?:[Tt]he )?(?:(?:final|correct) )?[Aa]nswer(?: ?:| is:?) ?",
}
PARTS |= {"TEXT": TEXT, "GROUP": GROUP, "DEGREE": DEGREE, "NOTHING": "", "SPACE": " "}


def ascii_of(match: re.Match) -> str:
    """12 for full-width or raised digits."""
    return normalize("NFKC", match[0]).replace("−", "-")


def in_base_ten(match: re.Match) -> str:
    return str(int(match[1], int(match[2]))) if max(match[1]) < match[2] else match[0]


def clock(match: re.Match) -> str:
    """8:30 in minutes, as no fraction; 8:15 stays, since it may be a ratio in lowest terms."""
    hours, minutes, half = int(match[1]), int(match[2]), (match[3] or "").lower()
    if gcd(hours, minutes) == 1 and minutes > 9:
        return match[0]
    half = half or ("p" if hours > 12 else "")
    return rf"{hours % 12 * 60 + minutes}\text{{ clock {half + 'm' if half else ''}}}"


def spelling(row: str) -> tuple[re.Pattern, str]:
    """A row of TABLE, ready for use."""
    pattern, new, _ = row.split("   ")
    for name, part in PARTS.items():
        pattern, new = pattern.replace(name, part), new.replace(name, part)
    new += " " if re.search(r"\\[a-z]+$", new) else ""
    return re.compile(pattern), re.sub(r"\\(?![0-9])", r"\\\\", new)


CHARACTERS = dict(
    zip(
        "∞±∓∈≈°√π∛∅·⋅∙",
        r"\infty \pm \mp \in \approx ^\circ \sqrt \pi \sqrt[3] \emptyset \cdot \cdot \cdot".split(),
        strict=True,
    )
)
SPELLINGS = [
    (re.compile("[" + "".join(CHARACTERS) + "]"), lambda m: CHARACTERS[m[0]] + " "),
    (re.compile("[⁰¹²³⁴-⁹⁺⁻ⁿ]+"), lambda m: "^{" + ascii_of(m) + "}"),  # x²
    (re.compile("[₀-₉]+"), lambda m: "_{" + ascii_of(m) + "}"),  # x₁
    (re.compile("[¼-¾⅐-⅞]"), lambda m: r"\frac{" + ascii_of(m).replace("⁄", "}{") + "}"),  # ½
    (re.compile("[ℂℕℚℝℤ]"), lambda m: r"\mathbb{" + ascii_of(m) + "}"),
    (re.compile("[０-９（），：＝＜＞＋．]+"), ascii_of),
    *map(spelling, TABLE.strip("\n").split("\n")),
    (re.compile(r"\b([0-9]+)_\{?([2-9])\}? ?(?==)"), in_base_ten),  # 101_2=5
]
# , k\in\mathbb{Z} or \text{ for all } n\ge0 or , where k is an integer, at the end
FILL = (
    r"(?:[ ,(){}$]|\\(?:text|mathrm|mbox)\{|\\forall|(?:a|an|all|any|every|each|some|where|with|for"
    r"|real|is|numbers?|integers?)(?![A-Za-z]))*"
)
DOMAIN = re.compile(
    rf"(?=[ ,(\\]){FILL}([A-Za-z]) ?(?:\\in ?\\mathbb\{{([A-Z])\}}"
    r"|(?:[<>≤≥]|\\n?eq?|\\[lg]eq?) ?-?[0-9]+)?"
    rf"(?![A-Za-z=+*/^_-]){FILL}$"
)
SIGN = re.compile(r"[<>≤≥]|\\in(?![a-z])|\\[lg]e")
# i is not the imaginary unit where it counts: x_i or \sum_{i=1} or i=3 or i \in
COUNTS = re.compile(r"_ ?\{?[^{}]*i|(?<![A-Za-z])i ?(?:[=<>≤≥]|\\(?:in|[lg]eq?)(?![a-z]))")
IMAGINARY = re.compile(  # i of 5i, or of bi behind a sign
    r"(?:(?<![A-Za-z\\])|(?<=[-+][A-Za-z])|(?<=[-+] [A-Za-z]))i(?![A-Za-z])"
)
# `\\` is a LaTeX line break, so the brace after it is a real one; it is left alone before "boxed"
# because models do write `\\boxed{5}`. \boxed 12 has no brace.
BRACE = re.compile(
    r"\\boxed\s*(?:\{|(-?[0-9]+(?:\.[0-9]+)?|(?<=\s)[A-Za-z](?![A-Za-z])))"
    r"|\\\\(?!boxed)|\\[{}]|[{}]"
)
# between the boxes of one answer: , or "$ and $x="
AND = r"(?:\\text\{)?\s*(?:and|or)(?![a-z])[\s}$]*"
JOIN = re.compile(rf"[\s$]*(?:,[\s$]*(?:{AND})?|{AND})(?:[A-Za-z]\s*=\s*)?")

CLOCK = re.compile(  # 8:30 or t=8:30\text{ p.m.}
    rf"^(?:[A-Za-z] ?= ?)?([0-9]{{1,2}}):([0-5][0-9]) ?(?:{TEXT})?(?:([apAP])\.? ?[mM]\.?)?\}}?$"
)
# a.
EDGE = re.compile(r"^(?: |=|\\approx(?![A-Za-z]))+|(?<!\.)\. ?$| $")  # = and . of =5.
AROUND = re.compile(
    rf"(?:\\fbox|\\boxed)? ?{GROUP}"  # \boxed{5} or {5}
    rf"|{TEXT}([-+$0-9\\](?:[^{{}}]|\{{[^{{}}]*\}})*)\}}"  # \text{18 apples}
    r"|\\\((.*)\\\)|\\\[(.*)\\\]"  # \(5\) or \[5\]
)
# b.
THOUSANDS = re.compile(
    r"(?<![\w.^])[1-9][0-9]{0,2}(?:(?: |\{,\})[0-9]{3})+(?! ?[0-9]| ?/)"  # 10 080 or 10{,}080
    # -1,000.5 or x=1,000\pi, to the end
    r"|(?:^|[=<>≤≥] ?|\\[lg]eq? )[+-]?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?"
    r"(?= ?(?:\\(?:pi|sqrt\{[^{}]*\}) ?)*$)"
)
# c. and d.
# \% or % or percent or \text{ percent}
PERCENT = re.compile(rf" ?(?:\\?%|(?:{TEXT}|(?<![A-Za-z]))(?:\\?%|percent|percentage|pct) ?\}}?)$")
# 4210_5 or 2A_{16} or 4210_{\text{five}}
DEGREES = re.compile(rf"{DEGREE} ?(?:{TEXT})?([CF]?) ?\}}?$")  # ^\circ or ^\circ\text{C}
BASE = re.compile(rf"(-?[0-9][0-9A-F]*) ?_ ?\{{? ?(?:{TEXT})?([0-9]+|[a-z]+) ?\}}*")
NAMED_BASES = "- - two three four five six seven eight nine ten".split()
MONEY = re.compile(r"([+-]?) ?(\\?\$|[€£₹]) ?")  # -\$ of -\$5
STUCK = "mm|cm|dm|km|mg|kg|ml|cl|kWh|mph|ft|lb|oz"  # cm of 5cm
POWER = r"(?: ?\^ ?(?:-?[0-9]|\{ ?-?[0-9] ?\}))?"  # ^2 or ^{-1} or nothing
UPRIGHT = rf"{TEXT}(?:[^{{}}0-9]|\^-?[0-9]|\^\{{-?[0-9]\}})*\}}{POWER}"  # \text{ cm}^2
BARE = (
    r"(?:(?:(?<= )|(?<= \())(?:[A-Za-z]{3,}|[A-Za-z]+-[A-Za-z]{3,}|am|pm|in|mi|yd|hr|sq)"
    rf"|(?:{STUCK}))(?![A-Za-z0-9_]){POWER}"  # cm^2
    rf"(?:(?: ?/ ?[A-Za-z]+|[ -](?:a|[A-Za-z]{{2,}})){POWER})*"  # the rest of km/h or packs of gum
)
UNIT = re.compile(
    rf"(.*?[^ (]) ?(?:({UPRIGHT}(?: ?(?:/|\\cdot)? ?{UPRIGHT})*)"  # 5\text{ km}/\text{h}
    rf"|\(?({BARE})\)?"  # 5 km/h or 9 (apples)
    r"|(?<= )\(([gmls])\)"  # 350 (g)
    r"|(\\?\$|[€£¢₹]))"  # 18\$
)
NOT_UNITS = set(
    "and or not to if than plus minus hundred thousand million billion trillion dozen half halves"
    " squared cubed factorial pi sin cos tan cot csc log ln exp sqrt mod gcd lcm max choose"
    " infinity lakh crore score quarter third fourth fifth sixth seventh eighth ninth tenth"
    " hundredth thousandth millionth is are was were be but because since so no yes wait wrong"
    " incorrect false right correct true percent maybe".split()
)
SHORT = dict(
    pair.split("=")
    for pair in "millimeter=mm centimeter=cm decimeter=dm kilometer=km meter=m milligram=mg gram=g"
    " kilogram=kg milliliter=ml liter=l second=s sec=s minute=min hour=h hr=h year=yr feet=ft"
    " foot=ft inch=in yard=yd mile=mi pound=lb ounce=oz celsius=c fahrenheit=f usd=$ dollar=$"
    " €=euro £=lb ¢=cent people=person men=man women=woman children=child square=sq"
    " cubic=cu".split()
)
PLURAL = re.compile(r"(?:(?<=ss|[cs]h)|(?<=x))es$|(?<!s)s$")  # es of boxes, s of balls
# e.
PM, MP = re.compile(r"\\pm(?![A-Za-z])"), re.compile(r"\\mp(?![A-Za-z])")
COMMA = re.compile(r",(?![^()\[\]{}]*[)\]}])")  # outside brackets
# f.
UNREAD = re.compile(
    r"(?<![\w.^])[0-9]+(?:\.[0-9]+)? [0-9]"  # 10 80
    r"|[0-9] (?!(?:and|or|sqrt|inf|infinity)(?![A-Za-z]))[A-Za-z]{3}"  # 5 million
    rf"|[0-9] ?{TEXT}(?!(?:and|or)(?![A-Za-z]))[A-Za-z]{{2}}"  # 5\text{ hundred}
)
PROSE = re.compile(  # There are 5 ways, of a text with a digit
    r"^(?=.*[0-9]).*(?<![A-Za-z\\])(?!(?:and|or) )[A-Za-z]{2,}[,:]? [A-Za-z0-9]+ (?!(?:and|or) )"
    "[A-Za-z]{2}"
)


def extract(text: str) -> str | None:
    """The final answer of a response (rules 1 and 2), stripped, or None. One pass over the text."""
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    opened, boxes = [], []  # (start of the box, of its content), None for any other brace
    for token in BRACE.finditer(text):
        if token[0] == "{":
            opened.append(None)
        elif token[1]:
            boxes.append((token.start(), token.start(1), token.end(), token.end()))
        elif token[0].startswith("\\boxed"):
            opened.append((token.start(), token.end()))
        elif token[0] == "}" and opened:
            box = opened.pop()
            if box:
                boxes.append((*box, token.start(), token.end()))
    boxes.sort()
    parts, first = [], None
    while boxes:
        start, content, end, after = boxes.pop()
        if parts and (first - after > 40 or not JOIN.fullmatch(text, after, first)):
            break
        parts.insert(0, text[content:end].strip())
        first = start
    return ",".join(dict.fromkeys(parts)) or None


@lru_cache(4096)
def normal(text: str) -> tuple[str, str]:
    """(value, unit or "") of an answer or gold of some hundred characters. ValueError by rule f."""
    if "\\boxed" in text:
        text = extract(text) or text
    if text.count("$") % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    before = None
    while text != before:
        before, text = text, EDGE.sub("", text)
        around = AROUND.fullmatch(text)
        if around:
            text = next(filter(None, around.groups()), "")
    exact, approx, decimal = text.partition("\\approx")
    if approx:  # B=A, whose A is the answer; 6.0 as what other sides have to round to
        (value, unit), (decimal, other) = normal(exact), normal(decimal)
        return re.sub("^([+-]?[0-9]+)$", r"\1.0", decimal) + "=" + value, other or unit
    text, stands = split_domain(CLOCK.sub(clock, text))
    text, unit = split_unit(DEGREES.sub(r"\\text{ degree \1}", PERCENT.sub(r"\\%", text)))
    text = THOUSANDS.sub(lambda match: re.sub("[ ,{}]", "", match[0]), text)
    if PROSE.search(re.sub(rf"{TEXT}|[{{}}]", "", text.rpartition("=")[2])):
        raise ValueError("is prose")
    if UNREAD.search(text):
        raise ValueError("has words or numbers beside a number that are no unit (answers.py)")
    if not COUNTS.search(text):
        text = IMAGINARY.sub("(I)", text)  # in brackets, or the grammar drops a power
    if (PM.search(text) or MP.search(text)) and "\\{" not in text and len(PM.findall(text)) < 4:
        text = ",".join(way for part in COMMA.split(text) for way in ways(part))
    return text, f"{unit} {stands}".strip()


def split_domain(text: str) -> tuple[str, str]:
    r"""Rule d: (4k, kZ) of `4k, k\in\mathbb Z`."""
    found = DOMAIN.search(text)
    value = text[: found.start()] if found else ""
    if not found or SIGN.search(value) or value.count("(") != value.count(")"):
        return text, ""
    letter, of = found[1], found[2] or ("Z" if "integer" in found[0] else "")
    stated = of or re.search(r"for|where|[<>≤≥=]|\\[nlg]e", found[0])
    if not stated or not re.search(rf"(?<![A-Za-z\\]){letter}(?![A-Za-z])", value):
        return text, ""
    return value, letter + of if of else ""


def ways(text: str) -> list[str]:
    """Rule e."""
    if MP.search(text):
        return [PM.sub(plus, MP.sub(minus, text)) for plus, minus in ("+-", "-+")]
    found = PM.search(text)
    return [way for sign in "+-" for way in ways(PM.sub(sign, text, 1))] if found else [text]


def split_unit(text: str) -> tuple[str, str]:
    """Rules c and d: (what stands before the unit, the unit's name or "")."""
    if base := BASE.fullmatch(text):
        named = NAMED_BASES.index(base[2]) if base[2] in NAMED_BASES else base[2]
        return base[1], f"base {named}"
    money = MONEY.match(text)
    sign = money[2] if money else ""
    rest = money[1] + text[money.end() :] if money else text
    match = UNIT.fullmatch(rest)
    if not match:
        return rest, unit_name(sign)
    value, _, bare, *_ = match.groups()
    unit = next(filter(None, match.groups()[1:]))
    words = re.findall("[a-z]+", re.sub(TEXT, "", unit).lower())
    known = NOT_UNITS.isdisjoint([*words, *(word.removesuffix("s") for word in words)])
    variables = re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+|^[A-Za-z] ?=", "", value))
    if known and re.search("[0-9]", value) and not (bare and variables):
        return value, unit_name(f"{sign} {unit}")
    return rest, unit_name(sign)


def unit_name(text: str) -> str:
    """One name for all spellings: `square centimeters` and `\\mathrm{cm}^{2}` are "cm ^2"."""
    text = re.sub(TEXT, " ", text).lower().replace(".", "")
    text = re.sub("(met|lit)re", r"\1er", text).replace("mph", "mi/h")
    text = re.sub(r"\bper\b", "/", text)
    names = []
    for word in re.findall(r"[a-z]+|[$€£¢₹/]|\^[{ ]*-?[0-9]", text):
        singular = PLURAL.sub("", word) if len(word) > 2 else word
        names.append(SHORT.get(word) or SHORT.get(singular) or re.sub("ie$", "y", singular))
    name = " ".join(names).replace("{", "").replace("^ ", "^")
    name = re.sub(r"\bcu (\S+)", r"\1 ^3", re.sub(r"\bsq (\S+)", r"\1 ^2", name))
    return re.sub(r"\bunit\b", "", name).strip()


def units_agree(answer: str, gold: str) -> bool:
    """Whether answer and gold may be equal by their units, named as `normal` does, "" for none."""
    if "base" in answer + gold:
        return answer in ("", gold) or (answer, gold) == ("base 10", "")
    if not answer or not gold or answer == gold:
        return True
    ours, theirs = set(answer.split()), set(gold.split())
    return not re.search(r"[/^]", answer + gold) and (ours <= theirs or theirs <= ours)
