r"""The answer of a response, and the normal form of answers and golds: verify.py's rules 1 to 4.

The normal form is a value (LaTeX for the grammar) and a unit, by these rules alone:
 a. Dress is dropped: spacing, sizes, colours, bold, underline, `$`...`$`, a box or braces around
    all, a leading `=` or `\approx`, a final period. `x \approx 3` is `x=3`.
 b. `1,000`, `1 000`, `1\,000` and `1{,}000` are one number, `3 1/2` is 3\frac{1}{2}.
 c. Words after a number are its unit: `15 balls`, `9 (apples)`, `5\text{ cm}^2`, `1.5 km/h`. So are
    the signs in `\$18` and `90^\circ`. Letters that touch the number are variables, but for those
    in STUCK (`5cm`). So is a single letter (`5t`, `5 m`: the metre is `\text{m}`), and so are bare
    letters after a variable (`2x abc`). Percent stays: to math-verify `50\%` is 0.5 or 50.
 d. The base of `4210_5` is a unit.
 e. Inequalities in one letter joined by "or" are the union of their intervals.
 f. Other words after a number (`5 million`, `12 hours and 30 minutes`) and two numbers side by side
    (`10 80`) are not read: such an answer is wrong, such a gold is unusable.

Two units agree if one is missing, if they are spellings of one name (`centimeters`, `\mathrm{cm}`),
or if one says the same in more words (`balls`, `red balls`); none is converted. A base may be
missing from the answer only.
"""

import re
from fractions import Fraction
from functools import lru_cache

# `\\` is a LaTeX line break, so the brace after it is a real one; it is left alone before "boxed"
# because models do write `\\boxed{5}`.
BRACE = re.compile(r"\\boxed\s*\{|\\\\(?!boxed)|\\[{}]|[{}]")
TEXT = r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mbox) ?\{ ?"  # \text{ or \mathrm{: upright words

# a. [0-9] throughout, since \d takes other scripts' digits too.
# \, or \quad or ~
SPACE = re.compile(r"(?:(?<!\\)\\(?:[,;:> ]|(?:quad|qquad|thinspace)(?![A-Za-z]))|~(?!=)|\s)+")
STYLE = re.compile(
    r"\\!"
    r"|\\(?:displaystyle|textstyle|small|[lL]arge|LARGE|[hH]uge|bf|rm|[bB]igg?[lrm]?)(?![A-Za-z])"
    r"|\\(?:mathbf|boldsymbol|bm|underline|textcolor ?\{[^{}]*\}) ?(?=\{)"  # \mathbf of \mathbf{5}
    r"|\\color ?\{[^{}]*\}"  # \color{red}
)
EDGE = re.compile(r"^(?: |=|\\approx(?![A-Za-z])|\u2248)+|(?<!\.)\. ?$| $")  # = and . of =5.
GROUP = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"  # {5}, with braces in braces in it at most
AROUND = re.compile(
    rf"(?:\\fbox|\\boxed)? ?{GROUP}"  # \boxed{5} or {5}
    rf"|{TEXT}([-+$0-9\\][^{{}}]*)\}}"  # \text{18 apples}
    r"|\\\((.*)\\\)|\\\[(.*)\\\]"  # \(5\) or \[5\]
)
APPROX = re.compile(r"(?<![A-Za-z0-9}\\])([A-Za-z]) ?(?:\\approx(?![A-Za-z])|\u2248)")  # x \approx
# b.
THOUSANDS = re.compile(
    r"(?<![\w.^])[1-9][0-9]{0,2}(?:(?: |\{,\})[0-9]{3})+(?! ?[0-9]| ?/)"  # 10 080 or 10{,}080
    r"|^[+-]?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?$"  # -1,000.5, as the whole text
)
MIXED = re.compile(r"^([+-]?[0-9]+) ([0-9]+)/([0-9]+)$")  # 3 1/2
# c. and d.
# \% or % or percent or \text{ percent}
PERCENT = re.compile(rf" ?(?:\\?%|(?:{TEXT}|(?<![A-Za-z]))(?:\\?%|percent|percentage|pct) ?\}}?)$")
# ^\circ or ^{\circ} or ^\circ\text{C}
DEGREE = re.compile(rf" ?(?:\^ ?\{{? ?\\circ ?\}}?|\u00b0|\\degree) ?(?:{TEXT})?([CF]?) ?\}}?$")
# 4210_5 or 2A_{16} or 4210_{\text{five}}
BASE = re.compile(rf"(-?[0-9][0-9A-F]*) ?_ ?\{{? ?(?:{TEXT})?([0-9]+|[a-z]+) ?\}}*")
NAMED_BASES = dict(
    two="2", three="3", four="4", five="5", six="6", seven="7", eight="8", nine="9", ten="10"
)
MONEY = re.compile(r"([+-]?) ?(\\?\$|[\u20ac\u00a3\u20b9]) ?")  # -\$ of -\$5
STUCK = "mm|cm|dm|km|mg|kg|ml|cl|kWh|mph|ft|lb|oz"  # cm of 5cm
POWER = r"(?: ?\^ ?(?:-?[0-9]|\{ ?-?[0-9] ?\})|[\u00b2\u00b3])?"  # ^2 or ^{-1} or nothing
UPRIGHT = rf"{TEXT}(?:[^{{}}0-9]|\^-?[0-9]|\^\{{-?[0-9]\}})*\}}{POWER}"  # \text{ cm}^2
BARE = (
    r"(?:(?:(?<= )|(?<= \())(?:[A-Za-z]{3,}|[A-Za-z]+-[A-Za-z]{3,}|am|pm|in|mi|yd|hr|sq)"  # balls
    rf"|(?:{STUCK}))(?![A-Za-z0-9_]){POWER}"  # cm^2
    rf"(?:(?: ?/ ?[A-Za-z]+|[ -](?:a|[A-Za-z]{{2,}})){POWER})*"  # the rest of km/h or packs of gum
)
UNIT = re.compile(
    rf"(.*?[^ (]) ?(?:({UPRIGHT}(?: ?(?:/|\\cdot)? ?{UPRIGHT})*)"  # 5\text{ km}/\text{h}
    rf"|\(?({BARE})\)?"  # 5 km/h or 9 (apples)
    r"|(?<= )\(([gmls])\)"  # 350 (g)
    r"|(\\?\$|[\u20ac\u00a3\u00a2\u20b9]))"  # 18\$
)
NOT_UNITS = set(
    "and or not to if than plus minus hundred thousand million billion trillion dozen half halves"
    " thirds squared cubed factorial pi sin cos tan cot csc log ln exp sqrt mod gcd lcm max choose"
    " infinity".split()
)
SHORT = dict(
    pair.split("=")
    for pair in "millimeter=mm centimeter=cm decimeter=dm kilometer=km meter=m milligram=mg gram=g"
    " kilogram=kg milliliter=ml liter=l second=s sec=s minute=min hour=h hr=h year=yr feet=ft"
    " foot=ft inch=in yard=yd mile=mi pound=lb ounce=oz celsius=c fahrenheit=f usd=$ dollar=$"
    " \u20ac=euro \u00a3=lb \u00a2=cent people=person men=man women=woman children=child"
    " square=sq cubic=cu".split()
)
PLURAL = re.compile(r"(?:(?<=ss|[cs]h)|(?<=x))es$|(?<!s)s$")  # es of boxes, s of balls
# e. or, \text{ or } or \lor; then < or \le or \geqslant
OR = re.compile(rf",? ?(?:{TEXT}or ?\}}|(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:lor|vee)(?![a-z])) ?")
SIGN = re.compile(r" ?([<>\u2264\u2265]|\\(?:l|g)(?:t|eq?(?:slant)?)(?![a-z])) ?")
# f.
UNREAD = re.compile(
    r"(?<![\w.^])[0-9]+(?:\.[0-9]+)? [0-9]"  # 10 80
    r"|[0-9] (?!(?:and|or|sqrt|inf|infinity)(?![A-Za-z]))[A-Za-z]{3}"  # 5 million
    rf"|[0-9] ?{TEXT}(?!(?:and|or)(?![A-Za-z]))[A-Za-z]{{2}}"  # 5\text{ hundred}
)
# Rule 4: short enough that math-verify's floats of 15 digits tell apart what differs by 1e-6.
# -1.5 or 22/7 or +5
NUMBER = re.compile(r"[+-]?[0-9]{1,6}\.[0-9]{1,6}|[+-]?[0-9]{1,12}/[0-9]{1,12}|[+-]?[0-9]{1,18}")
FRACTION = re.compile(r"([+-]?)\\[dt]?frac *\{([0-9]+)\}\{([0-9]+)\}")  # -\dfrac{1}{2}


def extract(text: str) -> str | None:
    """The final answer of a response (rules 1 and 2), stripped, or None. One pass over the text."""
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    opened = []  # start of the content for a box, -1 for any other brace
    start, end = -1, -1  # of the complete box that starts last
    for token in BRACE.finditer(text):
        if token[0] == "{":
            opened.append(-1)
        elif token[0].startswith("\\boxed"):
            opened.append(token.end())
        elif token[0] == "}" and opened:
            box = opened.pop()
            if box > start:
                start, end = box, token.start()
    return text[start:end].strip() or None if start >= 0 else None


@lru_cache(4096)
def normal(text: str) -> tuple[str, str] | None:
    """(value, unit or "") of an answer or gold of some hundred characters. None by rule f."""
    text = STYLE.sub("", SPACE.sub(" ", text)).replace("( ", "(")
    if text.count("$") % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)
    before = None
    while text != before:
        before, text = text, EDGE.sub("", text)
        around = AROUND.fullmatch(text)
        if around:
            text = next(filter(None, around.groups()), "")
    text = APPROX.sub(r"\1=", text).replace("\u2248", "\\approx")
    exact, approx, rounded = text.partition("\\approx")
    if approx:
        sides = normal(exact), normal(rounded)
        if None in sides:
            return None
        return " \\approx ".join(side[0] for side in sides), sides[1][1] or sides[0][1]
    text, unit = split_unit(DEGREE.sub(r"\\text{ degree \1}", PERCENT.sub(r"\\%", text)))
    text = THOUSANDS.sub(lambda match: re.sub("[ ,{}]", "", match[0]), text)
    text = MIXED.sub(r"\1\\frac{\2}{\3}", text)
    return None if UNREAD.search(text) else (union(text), unit)


def split_unit(text: str) -> tuple[str, str]:
    """Rules c and d: (what stands before the unit, the unit's name or "")."""
    base = BASE.fullmatch(text)
    if base:
        return base[1], "base " + NAMED_BASES.get(base[2], base[2])
    money = MONEY.match(text)
    sign = money[2] if money else ""
    rest = money[1] + text[money.end() :] if money else text
    match = UNIT.fullmatch(rest)
    if not match:
        return rest, unit_name(sign)
    value, upright, bare, *signs = match.groups()
    unit = next(filter(None, match.groups()[1:]))
    words = re.findall("[a-z]+", re.sub(TEXT, "", unit).lower())
    variables = re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+|^[A-Za-z] ?=", "", value))
    if NOT_UNITS.intersection(words) or not re.search("[0-9]", value) or (bare and variables):
        return rest, unit_name(sign)
    return value, unit_name(f"{sign} {unit}")


def unit_name(text: str) -> str:
    """One name for all spellings: `square centimeters` and `\\mathrm{cm}^{2}` are "cm ^2"."""
    text = re.sub(TEXT, " ", text).lower().replace("\u00b2", "^2").replace("\u00b3", "^3")
    text = re.sub("(met|lit)re", r"\1er", text).replace("mph", "mi/h").replace(".", "")
    text = re.sub(r"\bper\b", "/", text)
    names = []
    for word in re.findall(r"[a-z]+|[$\u20ac\u00a3\u00a2\u20b9/]|\^[{ ]*-?[0-9]", text):
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


def union(text: str) -> str:
    """Rule e. A text that is no inequalities in one letter joined by "or" is returned as it is."""
    intervals, letters = [], set()
    for part in OR.split(text):
        sides = SIGN.split(part)
        values, signs = sides[::2], sides[1::2]
        if signs and re.match(r">|\u2265|\\g", signs[0]):
            values, signs = values[::-1], signs[::-1]
        if len(values) == 2:
            ends = re.fullmatch("[A-Za-z]", values[0])  # x<2, else 2<x
            values = ["-\\infty", *values] if ends else [*values, "\\infty"]
            signs = ["<", *signs] if ends else [*signs, "<"]
        if len(values) != 3 or not re.fullmatch("[A-Za-z]", values[1]) or "," in part:
            return text
        letters.add(values[1])
        left, right = ("[]" if re.search("e|\u2264|\u2265", sign) else "()" for sign in signs)
        intervals.append(left[0] + values[0] + "," + values[2] + right[1])
    if len(intervals) < 2 or len(letters) > 1:
        return text
    return letters.pop() + " \\in " + "\\cup ".join(intervals)


def number(value: str) -> Fraction | None:
    """The exact value of a plain integer, decimal or fraction (rule 4); None for other LaTeX."""
    match = FRACTION.fullmatch(value)
    value = "{}{}/{}".format(*match.groups()) if match else value
    try:
        return Fraction(value) if NUMBER.fullmatch(value) else None
    except ZeroDivisionError:
        return None
