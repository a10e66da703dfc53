r"""The answer of a response, and the normal form of answers and golds: verify.py's rules 1 to 3.

The normal form is a value (LaTeX for the grammar) and a unit. The table of spellings rewrites what
can be spelled in several ways and drops dress: a box around all, a leading `=`, a final period.
 a. `1,000`, `1 000`, `1\,000` and `1{,}000` are one number, `3 1/2` is 3\frac{1}{2}.
 b. Words after a number are its unit: `15 balls`, `9 (apples)`, `5\text{ cm}^2`, `1.5 km/h`, and
    so are `\$` of `\$18`, `^\circ`, the base of `4210_5` and Z of `4k, k\in\mathbb Z`. Letters that
    touch the number are variables, but for STUCK (`5cm`); so are a single letter (`5 m`: the metre
    is `\text{m}`) and bare letters after a variable (`2x abc`). To math-verify `50\%` is 0.5 or 50.
    Two units agree if one is missing (a base only from the answer), if they are spellings of one
    name, or if one says the same in more words (`balls`, `red balls`); none is converted.
 c. `5\pm2` is two answers, or four if there are two of them; one \mp ties all.
 d. Other words after a number (`5 million`, `12 hours and 30 minutes`), two numbers side by side
    (`10 80`) and sentences are not read: such an answer is wrong, such a gold is unusable.
"""

import re
from functools import lru_cache
from unicodedata import normalize

# The table of spellings, in the order in which they are replaced: a pattern, what it becomes (a
# space follows a command), an example. CAPITALS stand for PARTS. [0-9] throughout, since \d takes
# other scripts' digits too; \wp is a name that nobody uses.
TABLE = r"""
(?:(?<!\\)\\(?:[,;:> ]|(?:quad|qquad|thinspace)(?![A-Za-z]))|~(?!=)|\s)+   SPACE   5\,\quad5
\\!|\\(?:text)?color ?\{[^{}]*\}|\\[bB]igg?[lrm]?(?![A-Za-z])|(?<=\()[ ]   NOTHING   \big( 5
\\(?:display|text)style(?![A-Za-z])|\\(?i:small|large|huge|bf|rm)(?![A-Za-z])   NOTHING   \large 5
\\(?:mathbf|boldsymbol|bm|underline) ?(?=\{)   NOTHING   \mathbf{5}
\\varnothing(?![A-Za-z])   \emptyset   \varnothing
(?<=[0-9)}])!=   ! =   3!=6
(?<![A-Za-z\\])(?=(?:pi|sqrt)(?![A-Za-z]))   \   pi/3
\\mathbb ([A-Z])   \mathbb{\1}   \mathbb Z
(?<![0-9])(?:\\[lc]?dots[cbm]?(?![A-Za-z])|…|\.\.\.)   \wp   1,2,\dots
\\\\ ?\[[0-9.]+ ?[a-z]+\]   \\   1\\[4pt]2
([0-9]*\.[0-9]+|\b1)E10(\{)?([+-]?[0-9]+)(?(2)\})(?![\w.])   \1\times10^{\3}   7.2e-6
\b([0-9]+)E10(\{)?([0-9]+|[+-][0-9][0-9]+)(?(2)\})(?![\w.])   \1\times10^{\3}   3e8, not 2e-1/3
((?:^|[=,(\[]) ?-?[0-9]+)E10([+-][0-9])(?= ?(?:$|[,)\]]|TEXT))   \1\times10^{\2}   5e-6
\\(?:text|mathrm) ?\{ ?([ei]) ?\}   \1   5\mathrm{i}
(\\sqrt(?: ?\[[^\]]*\])?) ?\(([^()]*)\)   \1{\2}   \sqrt(x+1)
(\\sqrt(?: ?\[[^\]]*\])?) ?([0-9]+(?:\.[0-9]+)?|ONE)   \1{\2}   \sqrt[3]5
(\\(?:[dtc]?frac|binom)(?: ?GROUP)?) ?ONE   \1{\3}   \frac 5 8
(\\(?:sin|cos|tan|cot|sec|csc)) ?(\(?) ?([0-9.]+)DEGREE   \1\2(\3\pi/180)   \sin 60^\circ
([0-9]+) ?: ?([0-9]+) ?: ?([0-9]+)   (\1,\2,\3)   1:2:3
(?<![\w./] )\b([0-9]+) ([1-9][0-9]?)/([0-9]+)   \1\frac{\2}{\3}   3 1/2
^TEXTANSWER\}|^(TEXT)?ANSWER   \1   The answer is 5
^(?: |=|\\approx(?![A-Za-z]))+|(?<!\.)\. ?$| $   NOTHING   = 5.
^(?:\\fbox|\\boxed)? ?GROUP$   \1   \boxed{5}
^TEXT([-+$0-9\\](?:[^{}]|\{[^{}]*\})*)\}$   \1   \text{18 apples}
^(?:\\\((.*)\\\)|\\\[(.*)\\\])$   \1\2   \(5\)
(?<![0-9:.])([0-9]{1,2}): ?([0-5][0-9])(?![0-9:])   (\1,\2)   8:30 is no fraction
(?: |TEXT)([aApP])(?:|\. ?)[mM]\.? ?\}?$   \text{ \1m}   8:30 p.m.
^([-+]?) ?(\\?\$|[€£₹]) ?(.+)   \1\3\text{ \2}   -\$5
(\\?\$|[€£¢₹])$   \text{ \1}   18\$
 ?(?:\\?%|(?:TEXT|(?<![A-Za-z]))(?:\\?%|percent|percentage|pct) ?\}?)$   \%   50 percent
DEGREE ?(?:TEXT)?([CF]?) ?\}?$   \text{ degree \1}   90^\circ
^(-?[0-9][0-9A-F]*) ?_ ?\{? ?(?:TEXT)?([0-9]+|[a-z]+) ?\}*$   \1\text{ base \2}   4210_{\text{five}}
^([^A-Za-z]+) \(([gmls]|[A-Za-z]{3,}[A-Za-z /-]*)\)$   \1\text{ \2}   9 (apples)
"""
TEXT = r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mbox) ?\{ ?"  # \text{ or \mathrm{: upright words
PARTS = {
    "GROUP": r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}",  # {5}, braces in braces in it at most
    "DEGREE": r" ?(?:\^ ?(?:\{ ?\\circ ?\}|\\circ(?![a-z]))|\\degree)",  # ^\circ or ^{\circ}
    "E10": r" ?(?:[eE]|\\(?:text|mathrm) ?\{[eE]\})",  # e of 2.5e3
    "ONE": r"([0-9A-Za-z]|\\pi(?![A-Za-z]))",  # what TeX takes without braces
    "ANSWER": r"(?:[Tt]he )?(?:(?:final|correct) )?[Aa]nswer(?: ?:| is:?) ?",
    "TEXT": TEXT,
    "NOTHING": "",
    "SPACE": " ",
}
CHARACTERS = dict(
    pair.split(" ")
    for pair in r"∞ \infty  ± \pm  ∓ \mp  ∈ \in  ≈ \approx  ° ^\circ  √ \sqrt  ∛ \sqrt[3]  π \pi  "
    r"· \cdot  ⋅ \cdot  ∙ \cdot  ∅ \emptyset".split("  ")
)


def ascii_of(match: re.Match) -> str:
    """12 for full-width or raised digits."""
    return normalize("NFKC", match[0]).replace("−", "-")


# , k\in\mathbb{Z} or \text{ for all } n\ge0 or , where k is an integer; not the n of 1,n
QUALIFIER = re.compile(
    rf"(?<![ ,(])[ ,(]++(?=.*(?:for|where|with|[<>≤≥=\\]))(?:(?:{TEXT})?(?:for|where|with)"
    r"(?: (?:all|any|every|some))?)?(?: real)?( integers?)?(?: numbers?)? ?\}? ?([A-Za-z])(?: ?"
    r"\\in ?\\mathbb\{([A-Z])\}| ?(?:[<>≤≥]|\\n?eq?|\\[lg]eq?) ?-?[0-9]+"
    rf"| (?:{TEXT})?is an (integer))? ?\}}?\)?$"
)


def domain(match: re.Match) -> str:
    r"""\text{ kZ} for `, k\in\mathbb Z`, nothing for `, k>0`, if k is in what stands before."""
    value, letter = match.string[: match.start()], match[2]
    named = re.search(rf"(?<![A-Za-z\\]){letter}(?![A-Za-z])", value)
    if not named or re.search(r"[<>≤≥]|\\in(?![a-z])|\\[lg]e", value):
        return match[0]
    of = match[3] or ("Z" if match[1] or match[4] else "")
    return rf"\text{{ {letter}{of}}}" if of else ""


def spelling(row: str) -> tuple[re.Pattern, str]:
    """A row of TABLE, ready for use."""
    pattern, new, _ = row.split("   ")
    for name, part in PARTS.items():
        pattern, new = pattern.replace(name, part), new.replace(name, part)
    new += " " if re.search(r"\\[a-z]+$", new) else ""
    return re.compile(pattern), re.sub(r"\\(?![0-9])", r"\\\\", new)


SPELLINGS = [
    (re.compile("[" + "".join(CHARACTERS) + "]"), lambda match: CHARACTERS[match[0]] + " "),
    (re.compile("[⁰¹²³⁴-⁹⁺⁻ⁿ]+"), lambda match: "^{" + ascii_of(match) + "}"),  # x²
    (re.compile("[₀-₉]+"), lambda match: "_{" + ascii_of(match) + "}"),  # x₁
    (re.compile("[¼-¾⅐-⅞]"), lambda match: rf"\frac{{{ascii_of(match)}}}".replace("⁄", "}{")),  # ½
    (re.compile("[ℂℕℚℝℤ]"), lambda match: r"\mathbb{" + ascii_of(match) + "}"),
    (re.compile("[０-９（），：＝＜＞＋．]+"), ascii_of),
    *map(spelling, TABLE.strip("\n").split("\n")),
    (re.compile(r"\b([0-9]+)_\{?([2-9])\}? ?(?==)"), lambda m: str(int(m[1], int(m[2])))),  # 11_2=3
    (QUALIFIER, domain),
]
# `\\` is a LaTeX line break, so the brace after it is a real one; it is left alone before "boxed"
# because models do write `\\boxed{5}`.
BRACE = re.compile(r"\\boxed\s*\{|\\\\(?!boxed)|\\[{}]|[{}]")
BARE_BOX = re.compile(r"\\boxed\s*(-?[0-9]+(?:\.[0-9]+)?|(?<=\s)[A-Za-z](?![A-Za-z]))")  # \boxed 12
# between the boxes of one answer: , or "$ and $x="
AND = r"(?:\\text\{)?\s*(?:and|or)(?![a-z])[\s}$]*"
JOIN = re.compile(rf"[\s$]*(?:,[\s$]*(?:{AND})?|{AND})(?:[A-Za-z]\s*=\s*)?")
# a.
THOUSANDS = re.compile(
    r"(?<![\w.^])[1-9][0-9]{0,2}(?:(?: |\{,\})[0-9]{3})+(?! ?[0-9]| ?/)"  # 10 080 or 10{,}080
    # -1,000.5 or x=1,000\pi, to the end
    r"|(?:^|[=<>≤≥] ?|\\[lg]eq? )[+-]?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?"
    r"(?= ?(?:\\(?:pi|sqrt\{[^{}]*\}) ?)*$)"
)
# i is not the imaginary unit where it counts: x_i or \sum_{i=1} or i=3 or i \in
COUNTS = re.compile(r"_ ?\{?[^{}]*i|(?<![A-Za-z])i ?(?:[=<>≤≥]|\\(?:in|[lg]eq?)(?![a-z]))")
IMAGINARY = re.compile(  # i of 5i, or of bi behind a sign
    r"(?:(?<![A-Za-z\\])|(?<=[-+][A-Za-z])|(?<=[-+] [A-Za-z]))i(?![A-Za-z])"
)
# b.
STUCK = "mm|cm|dm|km|mg|kg|ml|cl|kWh|mph|ft|lb|oz"  # cm of 5cm
POWER = r"(?: ?\^ ?(?:-?[0-9]|\{ ?-?[0-9] ?\}))?"  # ^2 or ^{-1} or nothing
UPRIGHT = rf"(?>{TEXT}(?:[^{{}}0-9]|base [0-9]+|\^-?[0-9]|\^\{{-?[0-9]\}})*\}}{POWER})"
BARE = (
    r"(?:(?<= )(?:[A-Za-z]{3,}|[A-Za-z]+-[A-Za-z]{3,}|in|mi|yd|hr|sq)"
    rf"|(?:{STUCK}))(?![A-Za-z0-9_]){POWER}"  # cm^2
    rf"(?:(?: ?/ ?[A-Za-z]+|[ -](?:a|[A-Za-z]{{2,}})){POWER})*"  # the rest of km/h or packs of gum
)
# 5 km/h\text{ $} or 5\text{ km}/\text{h}^2
UNIT = re.compile(rf"(.*?[^ ]) ?(?=[^ ])({BARE})?((?: ?(?:(?:/|\\cdot) ?)?{UPRIGHT})*)")
NOT_UNITS = set(
    "and or not to if than plus minus hundred thousand million billion trillion dozen"
    " squared cubed factorial pi sin cos tan cot csc log ln exp sqrt mod gcd lcm max choose"
    " infinity lakh crore bn mn tn score over divided multiplied below above half halves quarter"
    " third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth sixteenth twentieth"
    " hundredth thousandth millionth tens zero is are was were be but because since so no yes wait"
    " wrong incorrect false right correct true percent maybe".split()
)
SHORT = dict(
    pair.split("=")
    for pair in "millimeter=mm centimeter=cm kilometer=km meter=m gram=g kilogram=kg liter=l"
    " millimetre=mm centimetre=cm kilometre=km metre=m litre=l second=s sec=s minute=min hour=h"
    " hr=h year=yr feet=ft foot=ft inch=in yard=yd mile=mi pound=lb celsius=c fahrenheit=f"
    " dollar=$ €=euro ¢=cent people=person square=sq cubic=cu per=/ unit=".split()
)
PLURAL = re.compile(r"(?:(?<=ss|[cs]h)|(?<=x))es$|(?<!s)s$")  # es of boxes, s of balls
# c.
PM, MP = re.compile(r"\\pm(?![A-Za-z])"), re.compile(r"\\mp(?![A-Za-z])")
COMMA = re.compile(r",(?![^()\[\]{}]*[)\]}])")  # outside brackets
# d.
UNREAD = re.compile(
    r"(?<![\w.^])[0-9]+(?:\.[0-9]+)? [0-9]"  # 10 80
    r"|[0-9] (?!(?:and|or|sqrt|inf|infinity)(?![A-Za-z]))[A-Za-z]{3}"  # 5 million
    rf"|[0-9] ?{TEXT}(?!(?:and|or)(?![A-Za-z]))[A-Za-z]{{2}}"  # 5\text{ hundred}
)
PROSE = re.compile(  # There are 5 ways, of a text with a digit or, before all commands, a comma
    r"^(?=.*[0-9]|[^\\]*,).*(?<![A-Za-z\\])(?!(?:and|or) )[A-Za-z]{2,}[,:]? (?!(?:and|or) )"
    "[A-Za-z0-9]+ (?!(?:and|or) )[A-Za-z]{2}"
)


def extract(text: str) -> str | None:
    """The final answer of a response (rules 1 and 2), stripped, or None. One pass over the text."""
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    text = BARE_BOX.sub(r"\\boxed{\1}", text)
    opened, boxes = [], []  # (start of the box, of its content), None for any other brace
    for token in BRACE.finditer(text):
        if token[0] == "{":
            opened.append(None)
        elif token[0].startswith("\\boxed"):
            opened.append((token.start(), token.end()))
        elif token[0] == "}" and opened:
            box = opened.pop()
            if box:
                boxes.append((*box, token.start()))
    parts, first = [], None
    for start, content, end in sorted(boxes, reverse=True):
        if parts and (first - end > 41 or not JOIN.fullmatch(text, end + 1, first)):
            break
        parts.append(text[content:end].strip())
        first = start
    return ",".join(dict.fromkeys(reversed(parts))) or None


@lru_cache(4096)
def normal(text: str) -> tuple[str, str]:
    """(value, unit or "") of an answer or gold of some hundred characters. ValueError by rule d."""
    if "\\boxed" in text:
        text = extract(text) or text
    if text.count("$") % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)
    for _ in range(4):  # dress in dress
        before = text
        for pattern, new in SPELLINGS:
            text = pattern.sub(new, text)
        if text == before:
            break
    exact, approx, decimal = text.partition("\\approx")
    if approx:  # B=A, whose A is the answer; 6.0 as what other sides have to round to
        (value, unit), (decimal, other) = normal(exact), normal(decimal)
        return re.sub("^([+-]?[0-9]+)$", r"\1.0", decimal) + "=" + value, other or unit
    text, unit = split_unit(text)
    text = THOUSANDS.sub(lambda match: re.sub("[ ,{}]", "", match[0]), text)
    if UNREAD.search(text) or PROSE.search(text.rpartition("=")[2]):
        raise ValueError("it is prose, or has words or numbers that are no unit")
    if not COUNTS.search(text):
        text = IMAGINARY.sub("(I)", text)  # in brackets, or the grammar drops a power
    if (PM.search(text) or MP.search(text)) and "\\{" not in text and len(PM.findall(text)) < 4:
        text = ",".join(way for part in COMMA.split(text) for way in ways(part))
    return text, unit


def split_unit(text: str) -> tuple[str, str]:
    """Rule b: (what stands before the unit, the unit's name or "")."""
    match = UNIT.fullmatch(text)
    if not match:
        return text, ""
    value, bare, upright = match.groups("")
    words = re.findall("[a-z]+", re.sub(TEXT, "", bare + upright).lower())
    words += [word.removesuffix("s") for word in words]
    variables = re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+|^[A-Za-z] ?=", "", value))
    counted = re.search("[0-9]", value) or re.search(" [A-Za-z][A-Z]}$", upright)  # k\pi, k in Z
    if NOT_UNITS.intersection(words) or (bare and variables) or not counted:
        return text, ""
    return value, unit_name(f"{bare} {upright}")


def unit_name(text: str) -> str:
    """One name for all spellings: `square centimeters` and `\\mathrm{cm}^{2}` are "cm ^2"."""
    text = re.sub(TEXT, " ", text).lower().replace(".", "").replace("mph", "mi/h")
    names = []
    for word in re.findall(r"[a-z]+|[0-9]+|[$€£¢₹/]|\^[{ ]*-?[0-9]", text):
        word = PLURAL.sub("", word) if len(word) > 2 and word not in SHORT else word
        names.append(SHORT.get(word, word).replace("{", "").replace(" ", ""))
    name = " ".join(filter(None, names))
    return re.sub(r"\bcu (\S+)", r"\1 ^3", re.sub(r"\bsq (\S+)", r"\1 ^2", name))


def units_agree(answer: str, gold: str) -> bool:
    """Whether answer and gold may be equal by their units, named as `normal` does, "" for none."""
    if "base" in answer + gold:
        return answer in ("", gold) or (answer, gold) == ("base 10", "")
    if not answer or not gold or answer == gold:
        return True
    ours, theirs = set(answer.split()), set(gold.split())
    return not re.search(r"[/^]", answer + gold) and (ours <= theirs or theirs <= ours)


def ways(text: str) -> list[str]:
    """Rule c."""
    if MP.search(text):
        return [PM.sub(plus, MP.sub(minus, text)) for plus, minus in ("+-", "-+")]
    found = PM.search(text)
    return [way for sign in "+-" for way in ways(PM.sub(sign, text, 1))] if found else [text]
