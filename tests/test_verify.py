"""Tests of verify.py and answers.py.

In this order: what math-verify accepts and refuses (surprises included), whole responses, random
answers, extraction, hostile answers, processes, leaks, the command line, golds in data files.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import answers
import data
import verify
from verify import Verifier, extract, grade_responses

C, W = "correct", "wrong"

# (gold, answer, verdict)
ORDINARY = [
    # integers and decimals
    ("5", "5", C),
    ("5", "6", W),
    ("-5", "5", W),
    ("5", "05", C),
    ("5", "+5", C),
    ("-5", "- 5", C),
    ("-5", "\u22125", C),
    ("5", "5.0", C),
    ("5", "5.01", W),
    ("1", "213", W),
    ("213", "1", W),
    ("0", "-0", C),
    ("1267650600228229401496703205376", "2^{100}", C),
    ("1267650600228229401496703205376", "1267650600228229401496703205377", W),
    # fractions
    ("0.5", "1/2", C),
    ("\\frac{1}{2}", "0.5", C),
    ("\\frac12", "\\dfrac{1}{2}", C),
    ("\\frac{1}{2}", "\\frac{2}{4}", C),
    ("\\frac{1}{2}", "\\frac{2}{1}", W),
    ("-\\frac{1}{2}", "\\frac{-1}{2}", C),
    ("\\frac{1}{2}", ".5", C),
    # roots, powers, constants, functions
    ("\\sqrt{8}", "2\\sqrt{2}", C),
    ("\\sqrt{2}", "\\sqrt2", C),
    ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}", C),
    ("\\sqrt[3]{27}", "3", C),
    ("1024", "2^{10}", C),
    ("120000", "1.2\\times10^5", C),
    ("\\pi", "\u03c0", C),
    ("5!", "120", C),
    ("\\binom{5}{2}", "10", C),
    ("\\log_2 8", "3", C),
    ("\\infty", "-\\infty", W),
    # expressions
    ("x^2+2x+1", "(x+1)^2", C),
    ("x^2+2x+1", "(x+2)^2", W),
    ("\\frac{x^2-1}{x-1}", "x+1", C),
    ("2x+3", "2y+3", W),
    ("1", "\\sin^2 x+\\cos^2 x", C),
    # percent, money, units, angles, separators
    ("50\\%", "0.5", C),
    ("50\\%", "50 percent", C),
    ("18.9", "\\$18.90", C),
    ("5", "5\\text{ cm}", C),
    ("5", "5\\,\\text{cm}^2", C),
    ("90", "90^\\circ", C),
    ("10080", "10,080", C),
    ("10,080", "10{,}080", C),
    ("1,000,000", "10^6", C),
    # mixed numbers and ratios
    ("\\frac{7}{2}", "3\\frac{1}{2}", C),
    ("3.5", "3\\frac12", C),
    ("2:3", "4:6", C),
    # intervals, tuples, sets, matrices
    ("[1,2)", "[1,2)", C),
    ("[1,2)", "(1,2]", W),
    ("(1,2)", "[1,2]", W),
    ("(-\\infty,2)\\cup(3,4)", "(3,4)\\cup(-\\infty,2)", C),
    ("(1,3)", "(1,2)\\cup[2,3)", C),
    ("x<2", "(-\\infty,2)", C),
    ("(-\\infty,2)", "x<2", W),
    ("(1,2,3)", "(1,2,3)", C),
    ("(1,2,3)", "(3,2,1)", W),
    ("(\\frac{1}{2},3)", "(0.5, 3)", C),
    ("(2,1)", "(1,2)", W),
    ("\\{1,2,3\\}", "\\{3,2,1\\}", C),
    ("1,2", "2, 1", C),
    ("3", "2, 3", W),
    ("3", "3 and 5", W),
    ("\\pm 2", "2,-2", C),
    ("\\emptyset", "\\{\\}", C),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}", C),
    (  # parses to a list: several guesses
        "\\begin{pmatrix}1\\\\2\\end{pmatrix}",
        "\\operatorname{cols}(\\begin{pmatrix}0&1\\\\0&2\\end{pmatrix})",
        W,
    ),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&5\\end{pmatrix}", W),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "(1,2)", W),
    # equations and inequalities
    ("3", "x=3", C),
    ("x=3", "3", C),
    ("x=3", "3=x", C),
    ("x=3", "y=3", W),
    ("y=2x+1", "2x-y+1=0", C),
    ("x=2 \\text{ or } x=-2", "\\pm 2", C),
    ("x>2", "2<x", C),
    ("x\\ge2", "x>2", W),
    ("[1,2]", "x \\in [1,2]", C),
    # words
    ("\\text{Evelyn}", "Evelyn", C),
    ("\\text{Evelyn}", "\\text{Bob}", W),
    ("\\text{(A)}", "A", C),
    ("A", "B", W),
]
# Where math-verify (0.9.0) surprises. Pinned, so that another version is noticed. Each row with a C
# that should be W, or the other way, is a known limit.
SURPRISING = [
    ("\\frac{1}{3}", "0.333333", C),
    ("\\frac{1}{3}", "0.33333", W),  # floats are rounded to 6 decimals, absolutely:
    ("10^{-7}", "0.0000002", C),
    ("0", "0.0000001", W),  # so small ones agree with each other, though not with 0
    ("50\\%", "50", C),
    ("50", "50\\%", C),
    ("12.5\\%", "12.5", W),  # the sign % may be missing, from integers only
    ("5", "5 apples", C),
    ("1.5", "1,5", W),  # a comma makes a set
    ("120000", "1.2e5", W),  # e is Euler's number
    ("0.5", "\u00bd", W),
    ("5", "\uff15", W),
    ("5", "\u0665", W),  # not in the grammar
    ("\\frac{\\pi}{2}", "90^\\circ", W),
    ("0.5", "\\sin(30^\\circ)", W),  # degrees are not converted
    ("(1,2)", "1,2", C),
    ("(1,2,3)", "1,2,3", C),
    ("(1,2,3)", "3,2,1", W),  # brackets may be missing, and the gold tuple's order counts;
    ("1,2,3", "(1,2,3)", C),
    ("1,2,3", "(3,2,1)", C),  # a gold set has no order
    ("1", "1,1", C),
    ("\\{1,2\\}", "\\{1,2,2\\}", C),
    ("3", "[3]", C),
    ("3", "\\{3\\}", C),
    ("\\emptyset", "\\varnothing", W),
    ("\\mathbb{R}", "\\text{all real numbers}", W),  # words and unknown commands are names
    ("3", "2x=3", C),  # of an equation only the last side is read when the gold is no equation
    ("3", "4 \\approx 3", W),
    ("x>2", "2x>4", W),
    ("21823795077618.26", "21823795077618.260", W),
    # beyond 15 digits, as above, decimals differ from themselves; what is tiny, as here, is 0
    ("\\frac{1}{2004!}", "\\frac{1}{2006!}", C),
    ("0.111", "0,111", C),
    ("12345", "012,345", W),  # a comma after a leading 0 is a decimal point
    ("25\\%", "25.0", W),
    ("x^2=-1", "1=2", C),
    ("x^2=-1", "y=y+1", C),
    ("\\mathbb{R}", "\\pm\\infty", C),  # equations without solutions are all the same
    ("\\text{June 20}", "June 20", W),
    ("AB", "BA", C),
    ("x", "X", C),
    ("52_8", "52", C),
    ("101_2", "5", W),
    ("i", "\\sqrt{-1}", W),
]
# The normal form (answers.py), rule by rule; math-verify alone says otherwise of many of these.
NORMAL_FORM = [
    # a. dress
    ("5", "5.", C),
    ("0.5", "0.5.", C),
    ("5", "5..", W),
    ("5", "5.5", W),
    ("1000", "=1000", C),
    ("1000", "= 1000.", C),
    ("1000", "\\approx 1000", C),
    ("1000", "\u2248 1000", C),
    ("1000", "\\mathbf{1000}", C),
    ("1000", "\\mathbf{1,000}", C),
    ("x^2", "\\boldsymbol{x}^2", C),
    ("\\frac{1}{2}", "\\bm{\\frac{1}{2}}", C),
    ("7", "\\fbox{7}", C),
    ("7", "\\fbox{8}", W),
    ("7", "\\large 7", C),
    ("7", "{\\Large 7}", C),
    ("7", "\\displaystyle 7", C),
    ("7", "{\\bf 7}", C),
    ("18", "\\textcolor{red}{18}", C),
    ("18", "\\color{red}18", C),
    ("18", "\\textcolor{red}{19}", W),
    ("18", "\\underline{18}", C),
    ("18", "\\text{18}", C),
    ("18", "\\textbf{18}", C),
    ("18", "$18$", C),
    ("18", "\\(18\\)", C),
    ("18", "\\[18\\]", C),
    ("18", "{{18}}", C),
    ("-18", "-\\mathbf{18}", C),
    ("18", "1\\mathbf{8}", W),
    ("(1,2)", "\\big(1,2\\big)", C),
    ("\\frac{1}{2}", "\\mathbf{\\frac{1}{2}}.", C),
    ("5", "==5", C),
    ("5", "=", W),
    ("5", "\\approx", W),
    ("5", ".", W),
    ("5", "\\mathbf{}", W),
    # a. approximations: the left side is the answer, and the right side has to be the left, rounded
    ("5", "5 \\approx 6", W),
    ("5", "5\u22486", W),
    ("6", "5 \\approx 6", W),
    ("5", "5 \\approx 5", C),
    ("\\sqrt{2}", "\\sqrt{2} \\approx 1.41", C),
    ("\\sqrt{2}", "\\sqrt{2} \\approx 1.42", W),
    ("\\pi", "\\pi \\approx 3.14", C),
    ("\\pi", "x=\\pi\\approx 3.1416", C),
    ("1000\\pi", "1000\\pi \\approx 3,142", C),
    ("\\sqrt{2}", "\\sqrt{2}\\text{ cm} \\approx 1.41\\text{ cm}", C),
    ("5", "5 \\approx", W),
    ("5", "5 \\approx x", W),
    ("5", "5 \\approx 5 \\approx 6", W),
    ("3.14", "x \\approx 3.14", C),
    ("3.14", "x \\approx 3.15", W),
    ("x \\approx 3.14", "3.14", C),
    ("5.5", "5.5 \\approx 6", C),
    ("5", "5.4 \\approx 5", W),
    # a. equations: sides that are numbers have to be right
    ("3", "1=2=3", W),
    ("3", "1+2=3", C),
    ("3", "x=1+2=3", C),
    ("3", "4=3", W),
    ("3", "x=4=3", W),
    # b. numbers
    ("1000", "1\\,000", C),
    ("10080", "10 080", C),
    ("10080", "10\\,080", C),
    ("90", "10\\,080", W),
    ("90", "10 080", W),
    ("90", "10 80", W),
    ("90", "10\\;80", W),
    ("1000", "1~000", C),
    ("1000", "1\u00a0000", C),
    ("1000", "1{,}000", C),
    ("1000", "1\\!000", C),
    ("1,000", "1000", C),
    ("1 000 000", "10^6", C),
    ("1000.5", "1\\,000.5", C),
    ("1000", "1\\,00", W),
    ("1000", "1\\,0000", W),
    ("12", "1 2", W),
    ("1000", "1,00", W),
    ("(1,200)", "(1{,}200)", W),
    ("\\$1,000", "1000", C),
    ("3.5", "3 1/2", C),
    ("2", "3 1/2", W),
    ("-3.5", "-3 1/2", C),
    ("\\log_2 8", "3", C),
    # c. units: one may be missing, two must agree
    ("18", "18 dollars", C),
    ("18", "\\text{18 apples}", C),
    ("15 balls", "15", C),
    ("15 balls", "15 balls", C),
    ("15 balls", "15\\text{ balls}", C),
    ("15 balls", "14 balls", W),
    ("15 balls", "15 red balls", C),
    ("15 red balls", "15 balls", C),
    ("15 balls", "15 bats", W),
    ("9 (apples)", "9", C),
    ("9 (apples)", "9 apples", C),
    ("9 (packs of gum)", "9", C),
    ("350 (g)", "350", C),
    ("1 box", "1 boxes", C),
    ("3 cookies", "3 cookie", C),
    ("2 inches", "2\\text{ in}", C),
    ("6 feet", "6 ft", C),
    ("7 people", "7 person", C),
    ("5\\text{ cm}", "5\\text{ m}", W),
    ("5\\text{ cm}", "5 m", W),
    ("5\\text{ cm}", "5\\text{ cm}^2", W),
    ("5\\text{ cm}^2", "5 square centimeters", C),
    ("5\\text{ cm}^2", "5", C),
    ("5\\text{ cm}", "5\\text{ centimetres}", C),
    ("5\\text{ cm}", "5~\\mathrm{cm}", C),
    ("5\\,\\mathrm{cm}^{2}", "5\\text{ cm}^2", C),
    ("5 cm\u00b2", "5\\mathrm{cm^2}", C),
    ("20 $cm^{2}$", "20", C),
    ("$81 \\mathrm{~km} / \\mathrm{hr}$", "81\\text{ km/h}", C),
    ("60 mph", "60 miles per hour", C),
    ("60 mph", "60 miles", W),
    ("5", "5 km/h", C),
    ("5", "5 oranges", C),
    ("5", "5 square units", C),
    ("5\\text{ cm}", "5\\text{ units}", C),
    ("5", "5\\text{ units}^2", C),
    ("\\frac{3}{4} cup", "0.75", C),
    ("0.75", "3/4 cups", C),
    ("36\\sqrt{7}cm^{3}", "36\\sqrt7", C),
    ("9\\pi\\text{ cm}", "9\\pi", C),
    ("x=5\\text{ cm}", "5", C),
    ("5", "x=5 cm", C),
    ("18", "18 t-shirts", C),
    ("1:58 am", "1:58", C),
    ("7 am", "7 pm", W),
    ("1\\,000\\text{ m}", "1,000 meters", C),
    # c. letters that are no unit
    ("5", "5t", W),
    ("5", "5m", W),
    ("5", "5 t", W),
    ("2x+3", "2x+3d", W),
    ("5am", "5", W),
    ("2xy", "2", W),
    ("2 xy", "2", W),
    ("2 xy", "2yx", C),
    ("2x abc", "2x", W),
    ("2", "2(x)", W),
    ("2", "2(abc)", W),
    ("8 x ^ { 2 }", "8x^2", C),
    ("5", "5cm2", W),
    ("\\frac{ab}{3}", "ab/3", C),
    # c. signs
    ("\\$18", "18", C),
    ("18", "\\$18", C),
    ("18", "$18", C),
    ("\\$18", "18 dollars", C),
    ("\\$18", "\\$18.00", C),
    ("\\$18", "18 cents", W),
    ("\\$18", "\u20ac18", W),
    ("\u20ac18", "18 euros", C),
    ("-\\$5", "-5", C),
    ("5", "-\\$5", W),
    ("18", "18\\$", C),
    ("\\$5 per hour", "5", C),
    ("\\$5 per hour", "\\$5\\text{/hour}", C),
    ("\\$5 per hour", "\\$5 per day", W),
    ("50 cents", "50\u00a2", C),
    ("90", "90\u00b0", C),
    ("90", "90^{\\circ}", C),
    ("90^\\circ", "90\\degree", C),
    ("90^\\circ", "90 degrees", C),
    ("90^\\circ", "90\\text{ cm}", W),
    ("25^\\circ\\text{C}", "25", C),
    ("25\u00b0C", "25^\\circ C", C),
    ("25\u00b0C", "25\u00b0F", W),
    ("25\u00b0C", "25 degrees celsius", C),
    ("30^\\circ, 60^\\circ", "30, 60", C),
    ("\\frac{\\pi}{2}", "90\u00b0", W),
    ("25\\%", "25\\,\\%", C),
    ("25\\%", "0.25\\text{ percent}", W),
    ("25\\%", "25\\text{ percent}", C),
    ("25 percent", "25\\%", C),
    ("0.25", "25\\%", C),
    ("25", "25\\%", C),
    ("25", "2.5\\%", W),
    # d. bases
    ("4210_5", "4210_5", C),
    ("4210_5", "4210_{5}", C),
    ("4210_5", "4210", C),
    ("4210_5", "4210_6", W),
    ("4210_{\\text{five}}", "4210_5", C),
    ("4210", "4210_5", W),
    ("52", "52_{10}", C),
    ("2A_{16}", "2A_{16}", C),
    ("a_5", "a_6", W),
    # e. inequalities joined by or
    ("x<-1 \\text{ or } x>1", "x<-1 \\text{ or } x>1", C),
    ("x<-1 \\text{ or } x>1", "x > 1 or x < -1", C),
    ("(-\\infty,-1)\\cup(1,\\infty)", "x<-1 \\text{ or } x>1", C),
    ("x<-1 \\text{ or } x>1", "(-\\infty,-1)\\cup(1,\\infty)", C),
    ("(-\\infty,-1)\\cup(1,\\infty)", "x\\le-1 \\text{ or } x>1", W),
    ("(-\\infty,-1]\\cup(1,2]", "x\\leqslant-1 \\lor 1<x\\le2", C),
    ("x<-1 \\text{ or } x>1", "-1>x \\text{ or } 1<x", C),
    ("x<-1 \\text{ or } x>1", "x<-1", W),
    ("x<-1 \\text{ or } x>1", "x<-1 \\text{ or } x>2", W),
    ("x<-1 \\text{ or } x>1", "y<-1 \\text{ or } y>1", W),
    ("x<-1 \\text{ or } x>1", "\\mathbb{R}", W),
    ("2,3", "x=2\\text{ or }x=3", C),
    ("2,3", "2 or 3", C),
    ("2,3", "$2$ or $3$", C),
    # f. not read
    ("12", "12\\text{ hours and }30\\text{ minutes}", W),
    ("12", "12 hours 30 minutes", W),
    ("5", "5 million", W),
    ("5", "5 squared", W),
    ("5", "5\\text{ hundred}", W),
    ("2", "2 sin x", W),
    ("5", "5 or more", W),
    ("5", "5\\text{ or }6\\text{ cm}", W),
    ("5", "5\\text{ cm or 6 cm}", W),
    ("3", "3 \\text{, or not, } 4 \\text{ cm}", W),
    ("5", "not 5", W),
    ("5", "5 to 6", W),
    ("5", "5 if x", W),
    ("5", "5 plus", W),
    ("2", "2 dozen", W),
    ("0.5", "5 tenths", W),
    ("5", "five", W),
    ("5", "\\text{about }5", W),
    ("5", "5\\text{ is wrong, it is 6}", W),
]
UNREAD_GOLDS = [
    "5 million",
    "12 hours 30 minutes",
    "12\\text{ hours and }30\\text{ minutes}",
    "10 80",
    "236 adult, 342 child",
    "2 sin x",
    "10 \\mathrm{ft} x 18 \\mathrm{ft}",
]
# Where math_verify.parse, the text search that verify.py does not use, would say "correct".
SEARCHED = [
    ("3", "\\fbox{3} 5", W),
    ("3", "5 \\fbox{3}", W),
    ("3", "final answer is $3$. I hope", W),
    ("3", "\\foo = 3", W),
    ("3", "what = ? = 3", W),
    ("7", "**? 7", W),
    ("\\frac{1}{2}", "\\foo{4} \\frac{1}{2}", W),
    ("3", "3}+", W),
]
HOSTILE = [
    "9^{9^{9}}",
    "((9!)!)!",
    "\\binom{10^9}{10^8}",
    "2^{10^{10}}",
    "e^{e^{e^{e^{9}}}}",
    "(" * 40 + "1" + ")" * 40,
    "1" * 10_000,
    "{" * 10_000 + "1" + "}" * 10_000,
    "\\frac{1}{0}",
    "0/0",
    "5\0",
    "\0",
    "\ud800",
    "5\udfff",
    "\u202e5",
    "5\u200f",
    "5\n\n6",
    '5"]\n"correct"',
    "\\input{/etc/passwd}",
    "\\write18{ls}",
    "",
    " ",
    "\\",
    "%",
    "{",
    "}",
    "$",
    "\\left(",
    "^",
    "5" + "\\" * 400,
    "\\frac" * 80,
    "\\sqrt" * 80,
    "x" * 100,
    '__import__("os").system("touch pwned")',
    "exit()",
    "lambda: 5",
    "True",
    "None",
    "nan",
    "NaN",
    "5 if 1 else 2",
]


def split(text):
    """Texts that stand two spaces or a line apart."""
    return re.split(r"\s\s+", text.strip())


def box(answers):
    """A response for each answer."""
    return [
        "so \\boxed{" + answer + "}"
        for answer in (split(answers) if isinstance(answers, str) else answers)
    ]


# about 130, half of them decimal digits
FIVES = [char for char in map(chr, range(128, 0x110000)) if unicodedata.numeric(char, None) == 5]
INVISIBLE = [char for char in map(chr, range(0x3000)) if unicodedata.category(char) == "Cf"] + list(
    "\u034f\u115f\u3164\ufe0f\ufeff\U000e0035"
)
SPACES = [char for char in map(chr, range(0x3001)) if char.isspace()]
BRACKETS = [
    ("(", ")"),
    ("{", "}"),
    ("[", "]"),
    ("\\left(", "\\right)"),
    ("\\sqrt{", "}"),
    ("\\frac{1}{1+", "}"),
    ("|", "|"),
    ("-(", ")"),
    ("\\text{", "}"),
]
MATRIX, MINUS_MATRIX = (
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
    r"-\begin{pmatrix}-1&-2\\-3&-4\end{pmatrix}",
)
# (family, gold, verdict on every response, responses). "Right but refused": not in math-verify's
# grammar or not what it compares.
FAMILIES = [
    # what is meant to exhaust the grader, but ends in time (what does not is in HANGS)
    (
        "huge exponents",
        "5",
        W,
        box(r"""
            0.5^{-10^{9}}  1.1^{10^{12}}  i^{10^{20}}  e^{10^{30}}  \pi^{10^{9}}  10^{400}
            10^{-400}  2^{-999}  0^{10^{99}}  1^{-10^{99}}  x^{10^{99}}
        """),
    ),
    (
        "factorial towers",
        "5",
        W,
        box(r"""
            ((3!)!)!  (-5)!  (1/2)!  x!!!  100000!  0!!!!!!!!!!  (5!)^{-1}  \binom{5}{5!}
            \frac{1000!}{999!}  i!
        """),
    ),
    (
        "500 characters",
        "5",
        W,
        box(
            [
                "-" * 449 + "5",
                "5" + "!" * 400,
                "1" + "^1" * 200,
                "1/" * 249 + "1",
                "1," * 249 + "1",
                "5=" * 200 + "6",
                "1<" * 200 + "2",
                "5\\pm" * 90 + "5",
                "0" * 400 + "/" + "0" * 50,
                "=" * 400,
                "_" * 400,
                "&" * 400,
                "\\\\" * 200,
                "\\pm" * 150,
                "\\cup" * 90,
                "\\%" * 200,
                "\\infty" * 80,
                "\\sum" * 100,
            ]
        ),
    ),
    (
        "nested",
        "5",
        W,
        box([left * depth + "1" + right * depth for depth in (3, 5) for left, right in BRACKETS]),
    ),
    (
        "100,000 digits",
        "5",
        W,
        box(
            [
                "5" * 100_000,
                "0" * 100_000 + "5",
                "5." + "0" * 100_000,
                "5" + "\u0660" * 100_000,
                "10" * 50_000 + "/" + "2" * 50_000,
                "5" * 501,
                "5" + "\0" * 100_000,
            ]
        ),
    ),
    (
        "100,000 spaces",
        "5",
        C,
        ["\\boxed{5}" + " " * 100_000]
        + box([" " * 100_000 + "5", "5" + "\n" * 100_000, "\u3000" * 100_000 + "5\t"]),
    ),
    (
        "400 digits, wrong",
        "1" * 400,
        W,
        box(
            [
                "1" * 399,
                "1" * 399 + "2",
                "1" * 401,
                "-" + "1" * 400,
                "1" * 200 + "." + "1" * 200,
                "1" * 399 + "\u0661",
            ]
        ),
    ),
    (
        "400 digits",
        "1" * 400,
        C,
        box(["1" * 400, "0" * 90 + "1" * 400, "+" + "1" * 400, "1" * 400 + "/1"]),
    ),
    # boxes and think blocks
    (
        "no box",
        "5",
        "no_answer",
        [
            "",
            " ",
            "\x08oxed{5}",
            "\\b\u043exed{5}",
            "\\b\u200boxed{5}",
            "\\boxed\u200b{5}",
            "\uff3cboxed{5}",
            "\\boxed\uff5b5\uff5d",
        ]
        + split(r"""
            5  $5$  **5**  \fbox5  \boxed[5]  \boxed(5)  \boxed\{5\}  \Boxed{5}  \BOXED{5}
            \ boxed{5}  \bboxed{5}  oxed{5}  \framebox{5}  \mathbf{5}  correct
            {"verdict": "correct"}  The final answer is $5$. I hope it is correct.
        """),
    ),
    (
        "unbalanced boxes",
        "5",
        "no_answer",
        [
            "\\boxed{5\uff5d",
            "\\boxed{" * 9 + "5",
            "\\boxed{" + "{" * 10_000 + "5" + "}" * 9_999 + "\\}",
            "\\boxed{5" + "\\}" * 99,
            "}" * 99 + "\\boxed{5",
            "\\boxed" * 9,
            "{" * 99,
            "}" * 99,
        ]
        + split(r"\boxed{\boxed{5  \boxed{{}  \boxed{\\{5}  \boxed{\text{5}"),
    ),
    (
        "unbalanced around a box",
        "5",
        C,
        [
            "\\boxed{" * 10_001 + "5" + "}" * 10_000,
            "\\boxed{5}" + "}" * 10_000,
            "}{" * 10_000 + "\\boxed{5}",
            "\ud800 \\boxed{5} \udc00",
            "\u202e \\boxed{5}",
            "\0\\boxed{5}\0",
        ]
        + split(r"""
            \boxed{{5}}}}  \}\boxed{5}\{  \boxed{\boxed{{5}}  \boxed{5} \boxed{6
            \boxed{}\boxed{5}
        """),
    ),
    (
        "empty box",
        "5",
        "no_answer",
        box(["", *SPACES]) + ["\\boxed{5}\\boxed{}", "\\boxed{5\\boxed{}}"],
    ),
    (
        "gold in the think block, none after it",
        "5",
        "no_answer",
        ["<think>" * 999 + "\\boxed{5}"]
        + split(r"""
            <think>\boxed{5}</think>  <think>\boxed{5}  <think>\boxed{5}</think> so 5
            <think>\boxed{5}</think><think>\boxed{5}  \boxed{5}</think>
            <think><think>\boxed{5}</think></think>
        """),
    ),
    (
        "gold in the think block, another after it",
        "5",
        W,
        split(r"""
            <think>\boxed{5}</think>\boxed{6}  <think>\boxed{5}</think>5, \boxed{6}, 5
            \boxed{5}</think>\boxed{5}</think>\boxed{6}
            <think>The final answer is $5$. I hope it is correct.</think>\boxed{6}
        """),
    ),
    (
        "another in the think block, gold after it",
        "5",
        C,
        ["<think>" * 99 + "</think>\\boxed{5} so 6"]
        + split(r"""
            <think>\boxed{6}</think>\boxed{5}  <think>\boxed{6</think>\boxed{5}  <Think>\boxed{5}
            </think>\boxed{5}
        """),
    ),
    (
        "many boxes",
        "5",
        W,
        ["".join(f"\\boxed{{{i}}}" for i in range(1000)), "\\boxed{5}" * 1000 + "\\boxed{4}"]
        + split(r"""
            \boxed{5} \boxed{6}  \boxed{4}\boxed{5}\boxed{6}  \boxed{\boxed{5}\boxed{6}}
        """),
    ),
    (
        "many boxes, gold last",
        "5",
        C,
        [
            "".join(f"\\boxed{{{i}}}" for i in range(1000, 4, -1)),
            "\\boxed{6} \\boxed{5}",
            "\\boxed{6 \\boxed{5} 6}",
        ],
    ),
    # payloads
    (
        "TeX",
        "5",
        W,
        box(r"""
            \input{gold}  \include{gold.tex}  \openin5  \read5 to\x  \catcode`\5=11  \def\x{5}\x
            \newcommand{\x}{5}\x  \let\x5\x  \csname 5\endcsname  \the\year  \loop5\repeat
            \directlua{os.exit()}  \immediate\write18{touch pwned}  \special{ps:5}
            \href{http://x}{5}  \includegraphics{5}  \verb|5|  \begin{document}5\end{document}
            \char53  \symbol{53}  ^^35  \hbox{5}  \begin{align}5\end{align}  \rule{5}{5}
            \label{5}  \footnote{5}  \stackrel{5}{6}  \substack{5}  \operatorname{5}
            \operatorname{eval}(5)  \not5  \unicode{53}  \colorbox{red}{5}
        """),
    ),
    (
        "SQL and HTML",
        "5",
        W,
        box(r"""
            5 OR 1=1  5' OR '1'='1  5; DROP TABLE answers  5); DROP TABLE answers;--
            5 UNION SELECT 5  ' OR 5=5 --  5/**/  5 AND 5  SELECT 5  <b>5</b>
            <script>alert(5)</script>  5<br>  &#53;  &#x35;  5&nbsp;  <!--6-->5  5<!--6-->
            <input value=5>  <img src=x onerror=5>  %35  \x35  \u0035  &lt;5&gt;
            <answer>5</answer>  ```5```  `5`  # 5  > 5  [5](http://x)
        """),
    ),
    (
        "Python",
        "5",
        W,
        box(r"""
            eval('5')  int('5')  __import__('os').getpid()  __import__('os')._exit(0)
            [5 for x in y]  print(5)  exit(5)  5**1  0x5  0b101  5e0  5j  5L  {5: 6}  sum([2,3])
            f'{5}'  S(5)  x:=5  not 6  5 or 6  6 or 5  raise SystemExit(0)  os.kill(0,9)
            import os;os.abort()  sympy.S(5)  yield 5  '%c' % 53  b'5'  5 # 6  object()
            ().__class__.__mro__  globals()  \operatorname{exec}(5)
        """),
    ),
    (
        "the worker's protocol",
        "5",
        W,
        box(
            [
                '"correct"',
                'wrong"\n"correct"',
                '"]\n["5", "5',
                "ready",
                "\x04",
                "\x1a",
                "\x1b[2J5",
                "5\x7f",
                "]\n",
                '\\"',
                "\\n",
                "5\r\n\r\n6",
            ]
        ),
    ),
    (
        "asking for it",
        "5",
        W,
        box(r"""
            \text{correct}  \text{any number}  \text{the gold answer}  \text{see above}
            \text{NaN}  ?  *  \ast  .  \dots  \square  \text{}  ~  \,  \emptyset  \infty
            \pm\infty  \mathbb{R}  \mathbb{Z}  (-\infty,\infty)  x\in\mathbb{R}  \top  x  x=x  0=0
            5<6  x\le5  5\neq6  \neq6  \ge5  \frac00  \frac50  \frac{\infty}{\infty}
            \infty-\infty  0\cdot\infty  \ln0  \log_1 5  \arcsin5  \tan(\pi/2)  0^{-1}  \sqrt{-25}
        """),
    ),
    (
        "several guesses",
        "5",
        W,
        box(r"""
            4,5,6  4;5  5,6  4 or 5  4\text{ or }5  5\text{ or }6  \{4,5\}  [4,6]  (4,6)  4-6
            4/5/6  5:6  5\pm1  \binom{4}{5}  5\mid6  5\to6  5\sim6  5\ldots6
            \begin{cases}5\\6\end{cases}  \begin{cases}4&x<0\\5&x\ge0\end{cases}
            \operatorname{rows}\begin{pmatrix}4\\5\end{pmatrix}
            \operatorname{cols}(\begin{pmatrix}4&5\end{pmatrix})  \lim_{x\to\infty}5\sin x
            x=5,x=6  x=5,y=6  \gcd(4,5)
        """),
    ),
    (
        "several guesses of a vector",
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        W,
        box(r"""
            \operatorname{cols}(\begin{pmatrix}0&1&4\\0&2&4\end{pmatrix})
            \operatorname{cols}\begin{pmatrix}1\\2\end{pmatrix}
            \operatorname{nullspace}(\begin{pmatrix}2&-1\\4&-2\end{pmatrix})
            \operatorname{orth}(\begin{pmatrix}1&0\\2&0\end{pmatrix})
            \begin{pmatrix}1\\2\end{pmatrix},\begin{pmatrix}2\\1\end{pmatrix}
        """),
    ),
    # other scripts, and what cannot be seen
    ("other scripts' digits", "5", W, box(FIVES)),
    (
        "other scripts' digits among ours",
        "55",
        W,
        box(["5" + char for char in FIVES[::4]] + [char + "5" for char in FIVES[1::4]]),
    ),
    (
        "invisible characters",
        "5",
        W,
        box(
            [char + "5" for char in INVISIBLE]
            + ["5\u200b", "5\u202c", "\u202a5\u202c", "\u20675\u2069"]
        ),
    ),
    (
        "inside a number",
        "55",
        W,
        box(
            [
                "5" + char + "5"
                for char in [*INVISIBLE[::3], *SPACES[::2], *map(chr, range(0, 32, 2)), "\x7f"]
            ]
        ),
    ),
    ("around a number", "5", C, box([space + "5" + space for space in SPACES])),
    (
        "surrogates",
        "5",
        W,
        box(["\ud800\udc00", "\udc00\ud800", "5\ud835", "\udfd3", "\ud8355", "5\udcff", "\udc35"]),
    ),
    (
        "minus look-alikes",
        "-5",
        W,
        box(
            [
                char + "5"
                for char in "\u2010\u2011\u2012\u2013\u2014\u2015\u00ad\u02d7\u2043\u207b"
                "\u208b\u2796\ufe63\uff0d\u30fc\u4e00_~"
            ]
        ),
    ),
    (
        "x look-alikes",
        "x",
        W,
        box(
            list("\u0445\u03c7\u00d7\u2715\u2573\U0001d465\U0001d4cd\uff58\u24e7\u02e3\u2093\u2169")
        ),
    ),
    (
        "one half look-alikes",
        "\\frac{1}{2}",
        W,
        box("1\u20442  1\u29f82  1\uff0f2  1\u22362  50\uff05  0\u00b75  0\u066b5  0\u20245")
        + box(r"1\\2  1\2  1|2  0;5  0:5  0'5  ..5  0..5  0.5e0"),
    ),
    # notations
    (
        "percent",
        "25\\%",
        C,
        box(r"""
            25 \%  25%  25 pct  25 percentage  25\text{ percent}  +25\%  25.0\%  0.25  \frac14
            x=25\%  \frac{25}{100}
        """),
    ),
    (
        "percent, wrong",
        "25\\%",
        W,
        box(r"""
            2.5\%  0.25\%  25\%\%  -25\%  2500  \%25  25\% of 80  25\%-1  24.9\%  25\%+1\%  25.0
            25\permil  2525\%
        """),
    ),
    ("percent, right but refused", "25\\%", W, box(r"\frac{50}{2}\%  250\textperthousand")),
    (
        "units",
        "5\\text{ cm}",
        C,
        box(r"""
            5cm  5\mathrm{cm}  5\;\text{cm}  5\text{ centimeters}  5.0\text{ cm}  5 \mbox{ cm}
            \text{5 cm}  5\,cm  5~\text{cm}  \frac{10}{2} cm
        """),
    ),
    (
        "units, wrong",
        "5\\text{ cm}",
        W,
        box(r"""
            \text{cm}  cm 5  5 \text{ cm}^2  5^2\text{ cm}  5cm2  -5\text{ cm}  5 parsecs  5 m/s
            5 \frac{cm}{s}  \text{5 cm or 6 cm}
        """),
    ),
    ("units, right but refused", "5\\text{ cm}", W, box(r"50 mm  0.05\text{ m}  \text{five cm}")),
    (
        "intervals",
        "[0,5)",
        C,
        box(r"""
            \left[0,5\right)  [0, 5.0)  [0,\frac{10}{2})  x\in[0,5)  \lbrack 0,5)  [0,2)\cup[2,5)
            \{0\}\cup(0,5)
        """),
    ),
    (
        "intervals, wrong",
        "[0,5)",
        W,
        box(r"""
            (0,5)  [0,5]  (0,5]  [0,5  0,5)  [5,0)  [0;5)  ]0,5[  0<x<5  [0,5)\cup\{5\}  [0,5.1)
            0,5  \{0,5\}  [0,\infty)  [0,5))  [[0,5)  [0,4)\cup(4,5)  0 \text{ to } 5  [0..5)
            \{0,1,2,3,4\}  (0,5)\cup[0,5]  [0,5)\cup[6,7)
        """),
    ),
    ("intervals, right but refused", "[0,5)", W, box(r"[0,5]\setminus\{5\}  0\le x<5  [0,5[")),
    (
        "sets",
        "\\{1,2,3\\}",
        C,
        box(r"""
            \{3,1,2\}  1, 2, and 3  1,2\text{ and }3  \left\{1,2,3\right\}  \{1,2\}\cup\{3\}
            \{1.0,2,3\}  \{1;2;3\}  x=1,x=2,x=3  x\in\{1,2,3\}  \{\frac22,2,3\}
        """),
    ),
    (
        "sets, wrong",
        "\\{1,2,3\\}",
        W,
        box(r"""
            \{1,2\}  \{1,2,3,4\}  \{1,2,4\}  123  1+2+3  \{\{1,2,3\}\}  \{1,2,3,\dots\}
            \{1,\ldots,3\}  \{1,2,3  1,2,3\}  \{1,2,x\}  [1,3]  (1,3)  \{x|1\le x\le3\}
            \{1\}\cup\{2\}  \{1,2,3\}\setminus\{3\}  \{1,(2,3)\}  \mathbb{N}  \{1,2,3\}^c
        """),
    ),
    (
        "matrices",
        MATRIX,
        C,
        box(
            [
                MATRIX.replace("1", "\\frac22"),
                MATRIX.replace("2", "2.0"),
                MATRIX.replace("&", " & "),
                "A=" + MATRIX,
                "1" + MATRIX,
                MATRIX + "^T^T",
                MINUS_MATRIX,
                "\\left[\\begin{matrix}1&2\\\\3&4\\end{matrix}\\right]",
                "\\begin{array}{cc}1&2\\\\3&4\\end{array}",
            ]
        ),
    ),
    (
        "matrices, wrong",
        MATRIX,
        W,
        box(
            [
                MATRIX + "^T",
                "2" + MATRIX,
                "\\det" + MATRIX,
                MATRIX + "+1",
                "\\operatorname{rows}(" + MATRIX + ")",
                "\\operatorname{eigenvects}(" + MATRIX + ")",
                MATRIX.replace("2", "5"),
                MATRIX.replace("&", "\\\\"),
                MATRIX.replace("\\\\", "&"),
                MATRIX.replace("&", " "),
                MATRIX.replace("&4", ""),
                "1,2,3,4",
                "(1,2,3,4)",
                "-2",
                "[[1,2],[3,4]]",
            ]
        ),
    ),
    (
        "mixed numbers",
        "-\\frac72",
        C,
        box(r"""
            -3\frac12  -3\tfrac{1}{2}  -3 \frac{2}{4}  -3.5  \frac{7}{-2}  -(3\frac12)  -3-\frac12
            -7:2  -3\frac12\text{ cm}
        """),
    ),
    (
        "mixed numbers, wrong",
        "\\frac72",
        W,
        box(r"""
            3\cdot\frac12  3\frac13  -3\frac12  3\frac{-1}{2}  31/2  \frac{31}{2}  3-1/2  3&1/2
            3;\frac12  3,\frac12  2/7  3\frac12\frac12  \frac72\frac72  3^{\frac12}  3_{\frac12}
            3\text{ and }\frac12
        """),
    ),
    (
        "thousands",
        "1234567",
        C,
        box(r"""
            1,234,567  1{,}234{,}567  1234567.0  1.234567\times10^6  1,234,567.00  1'234'567
            \$1,234,567  1,234,567\text{ people}  1,\!234,\!567  01234567  123456.7\cdot10
            1.234567E6  1 234 567  1\,234\,567  1,234,567.
        """)
        + box(["1\u00a0234\u00a0567", "1\u202f234\u202f567"]),
    ),
    (
        "thousands, wrong",
        "1234567",
        W,
        box(r"""
            12,34,567  1,234,56  1,234,5678  0,001,234,567  1_234_567  1,234  1;234;567  1234,567
            1,234567  1,234,567,000  1,234,567.8  (1,234,567)  \{1,234,567\}  1, 234, 567
            -1,234,567  1,234,568
        """),
    ),
    (
        "thousands, right but refused",
        "1234567",
        W,
        box(["1.234.567", "1\uff0c234\uff0c567", "1\u066c234\u066c567"]),
    ),
]
# `VERIFY_LONG=1 pytest tests/test_verify.py`: all of HANGS, ten times the random answers, 10,000
# gradings for leaks. It takes some minutes.
LONG = "VERIFY_LONG" in os.environ
# Each would run until the limit ends it, or nearly.
HANGS = box(r"""
    2^{2^{2^{2^{2^{2}}}}}  10^{10^{100}}  (-9)^{9^9}  \sqrt[9]{9^{9^{9}}}  9^{-9^{9}}
    x^{9^{9^{9}}}  10^{10^{10}}-10^{10^{10}}+6  5^{1^{9^{9^{9}}}}+1  (1+x)^{10^{6}}
    (1+x+y+z)^{99}  7^{7777777}  9!!!  (10^{9})!  5!!!!!!!!!  (9^9)!
    \frac{(10^{8})!}{(10^{8}-1)!}  \binom{10^{12}}{5\cdot10^{11}}  \Gamma(10^{10})
    \prod_{i=1}^{10^{9}}i  \frac{1000000!}{999999!}  \sum_{i=1}^{10^{12}}\frac{1}{i}
    \int e^{x^x} dx  \sum_{i=1}^{\infty}\frac{1}{i^{1.0001}}
    \prod_{i=1}^{\infty}(1+\frac{1}{i^2+i+7})  \int_0^1\int_0^1\int_0^1 e^{xyz} dx dy dz
    \sum_{n=1}^{10^6}n^{n}  \operatorname{ones}(9999,9999)
""") + box(
    [left * 60 + "1" + right * 60 for left, right in BRACKETS if len(left) < 7]
    + ["x_" * 200, "|x" * 200, "||1||" * 70]
)


@pytest.fixture(scope="module")
def verifier():
    # 10 s: a loaded machine must not fail an ordinary answer.
    with Verifier(workers=2, seconds=10) as shared:
        yield shared


@pytest.fixture(scope="module")
def hasty():
    with Verifier(workers=1, seconds=0.5) as shared:
        yield shared


@pytest.fixture(scope="module")
def verdicts(verifier):
    pairs = [(answer, gold) for gold, answer, _ in ORDINARY + SURPRISING + NORMAL_FORM + SEARCHED]
    return dict(zip(pairs, verifier.grade(pairs), strict=True))


@pytest.mark.parametrize("gold, answer, verdict", ORDINARY + SURPRISING + NORMAL_FORM + SEARCHED)
def test_verdict(verdicts, gold, answer, verdict):
    assert verdicts[answer, gold] == verdict


def test_agrees_with_the_public_functions_where_nothing_is_searched():
    from math_verify import parse
    from math_verify import verify as compare

    for gold, answer, verdict in ORDINARY + SURPRISING + SEARCHED:
        gold_and_answer = [
            parse("\\boxed{" + text + "}", parsing_timeout=None) for text in (gold, answer)
        ]
        searched = (gold, answer, verdict) in SEARCHED
        assert compare(*gold_and_answer, timeout_seconds=None) == (searched or verdict == C), (
            gold,
            answer,
        )


RESPONSES = [
    "<think>\nFirst, 2 + 2 = 4.\n</think>\n\nThe final answer is $\\boxed{ANSWER}$.",
    "So we get \\boxed{ANSWER}",
    "**Answer:** \\(\\boxed{ANSWER}\\)",
    "Therefore\n\\[\n\\boxed{ANSWER}\n\\]",
    "<think>maybe \\boxed{17}?</think>\nHence $$\\boxed{ANSWER}$$",
    "$\\boxed{ANSWER}$ is what we wanted, not 42.",
]
# (gold, response, our reason, math-verify's verdict): all the ways in which whole responses were
# found to be judged differently.
DIFFERENT = [
    # only a box is an answer (rule 2); math_verify.parse takes any formula or number from the text
    ("5", "The answer is 5.", "no_answer", True),
    ("5", "So $x = 5$.", "no_answer", True),
    ("\\frac{1}{2}", "1/2", "no_answer", True),
    ("x^2+1", "$x^2+1$", "no_answer", True),
    ("5", "\\boxed 5", "no_answer", True),
    ("5", "5 \\boxed{}", "no_answer", True),
    ("\\frac{1}{2}", "\\boxed{\\frac{1}{2}", "no_answer", True),
    # the last box alone is the answer (rule 2); it joins boxes near each other to a set
    ("5", "\\boxed{4} \\boxed{5}", C, False),
    ("4", "\\boxed{3}\n\nWait, \\boxed{4} is better", C, False),
    ("5", "\\boxed{}\\boxed{5}", C, False),
    (
        "2",
        "First I thought \\boxed{1}. But no, the sum of the digits shows "
        "that it must be \\boxed{2}",
        C,
        False,
    ),
    ("1,2", "$x=\\boxed{1}$ or $x=\\boxed{2}$", W, True),
    # what stands in the think block does not count (rule 1); it knows no think block
    ("5", "<think>\\boxed{5}</think> I am not sure.", "no_answer", True),
    ("5", "<think>\\boxed{5}", "no_answer", True),
    ("5", "<think>so 5</think>", "no_answer", True),
    ("5", "<think>4? \\boxed{4}, or</think> \\boxed{5}", C, False),
    ("5", "<think>The final answer is $5$. I hope it is correct.</think>\\boxed{6}", W, True),
    # a sentence does not outrank the box; to math-verify this one does
    ("5", "The final answer is $5$. I hope it is correct. \\boxed{6}", W, True),
    ("5", "\\boxed{5}. The final answer is $6$. I hope it is correct.", C, False),
]


def test_differences_from_the_public_functions_on_whole_responses(verifier):
    from math_verify import parse
    from math_verify import verify as compare

    rows = [(gold, answer) for gold, answer, _ in ORDINARY]
    for value in map(
        Fraction,
        "5 -7 0 99 1234 -250 1000000 1/2 -3/4 7/3 22/7 5/8 -11/6 49/36 1/125 999/1000".split(),
    ):
        right, wrong = notations(value, 3), notations(value + 1, 3)
        dressed = [
            f"x={right[1]}",
            f"{right[1]}\\text{{ cm}}",
            f"\\left({right[1]}\\right)",
            f"\\text{{{value}}}",
        ]
        rows += [(right[0], answer) for answer in right + wrong + dressed]
    rows = [
        (gold, RESPONSES[i % len(RESPONSES)].replace("ANSWER", answer))
        for i, (gold, answer) in enumerate(rows)
    ]
    rows += [(gold, text) for gold, text, _, _ in DIFFERENT]
    ours = [
        reason
        for _, reason in grade_responses(
            verifier, [text for _, text in rows], [True] * len(rows), [gold for gold, _ in rows]
        )
    ]
    theirs = [
        compare(
            parse(f"${gold}$", parsing_timeout=None),
            parse(text, parsing_timeout=None),
            timeout_seconds=None,
        )
        for gold, text in rows
    ]
    different = [
        (*row, our, their)
        for row, our, their in zip(rows, ours, theirs, strict=True)
        if (our == C) != their
    ]
    assert len(rows) > 300 and different == DIFFERENT


def notations(value, factor):
    """Plain texts of a Fraction: as a fraction expanded by `factor`, as a decimal, as an integer.

    Decimals are rounded where they have to be.
    """
    top, bottom = value.numerator * factor, value.denominator * factor
    texts = [
        f"\\frac{{{top}}}{{{bottom}}}",
        f"{top}/{bottom}",
        f"\\dfrac{{{top}}}{{{bottom}}}",
        *(f"{float(value):.{places}f}" for places in (3, 6, 9)),
    ]
    return texts + [
        str(value),
        f"{int(value):,}",
        f"{value}.0",
        f"0{value}".replace("0-", "-0"),
    ] * (value.denominator == 1)


def rational(text):
    """The exact value of a plain integer, decimal or fraction, by Python's own Fraction.

    None for any other text, and for decimals beyond 15 digits.
    """
    text = re.sub(r"^([+-]?)\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3", text)
    if re.fullmatch(r"-?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]+)?", text):
        text = text.replace(",", "")
    if "." in text and len(re.sub("[^0-9]", "", text)) > 15:
        return None
    return Fraction(text) if re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+|/0*[1-9][0-9]*)?", text) else None


FUZZ = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
DECIMALS = st.fractions(-(10**6), 10**6).map(lambda value: round(value, 3))
VALUES = (
    st.fractions(-(10**6), 10**6, max_denominator=1000)
    | DECIMALS
    | st.integers(-(10**20), 10**20).map(Fraction)
)
NUDGES = st.sampled_from(
    [Fraction(0)] * 4
    + [
        Fraction(nudge)
        for nudge in ("1", "-1", "1/3", "1/10", "-1/1000", "1/100000", "-1/10000000")
    ]
)
# (place, to drop, to put)
EDITS = st.lists(
    st.tuples(
        st.integers(0, 30), st.integers(0, 1), st.sampled_from([*"0123456789.,/-+ x%{}", ""])
    ),
    max_size=2,
)


def edited(text, edits):
    for place, drop, new in edits:
        text = text[:place] + new + text[place + drop :]
    return text


@settings(FUZZ, max_examples=3000 if LONG else 300)
@given(VALUES, NUDGES, st.integers(1, 60), st.integers(0, 59), st.integers(0, 59), EDITS)
def test_random_numbers_against_fractions(verifier, value, nudge, factor, one, other, edits):
    golds, answers = notations(value, factor), notations(value + nudge, 1)
    gold, answer = golds[one % len(golds)], edited(answers[other % len(answers)], edits)
    verdict = verifier.grade([(answer, gold)])[0]
    assert verdict in (C, W, "timeout"), (gold, answer)
    exact_gold, exact = rational(gold), rational(answer)
    if exact_gold is not None and exact is not None:
        # Rule 5: 15 digits and 6 decimals, where there are decimals.
        slack = abs(exact) / 10**14 + Fraction(1, 10**6) if "." in gold + answer else 0
        assert (
            verdict == C
            if exact == exact_gold
            else abs(exact - exact_gold) <= slack or verdict == W
        ), (gold, answer)


PIECES = split(r"""
    1  2  7  0.5  x  y  +  -  *  /  ^  _  !  ,  ;  :  =  <  \le  (  )  [  ]  {  }  \{  \}  |
    \  \\  &  $  %  \%  \text{a}  \text{  \frac  \frac12  \sqrt  \sqrt{  \pi  \infty  \sin
    \log  \cup  \in  \pm  \left(  \right)  \cdot  \begin{pmatrix}  \end{pmatrix}  \boxed{
    \binom  \sum_{i=1}^{9}  \int  dx  \lim_{x\to0}  \mathbb{R}  \emptyset  \overline  ^\circ
    \operatorname{  and  or  e  i  '  "
""") + ["\0", "\ud800", "\u202e", "\u0665", "\n"]
BOX_PIECES = split(r"""
    \boxed{  \boxed{  \boxed  \boxed {  {  }  }  }  \{  \}  \  \\  boxed{  5  6  \text{  <think>
    </think>
""") + [" "]


@settings(FUZZ, max_examples=1500 if LONG else 150)
@given(st.lists(st.sampled_from(PIECES), max_size=10).map("".join))
def test_random_garbage_is_never_correct(hasty, answer):
    assert hasty.grade([(answer, "\\frac{271828}{314159}")])[0] in (W, "timeout")


@settings(FUZZ, max_examples=1500 if LONG else 150)
@given(st.sampled_from(ORDINARY), EDITS, st.integers(0, 99), st.sampled_from(PIECES))
def test_edited_answers(hasty, row, edits, place, piece):
    gold, answer, _ = row
    answer = edited(answer, edits)
    assert hasty.grade([(answer[:place] + piece + answer[place:], gold)])[0] in (C, W, "timeout")


@settings(FUZZ, max_examples=5000 if LONG else 500)
@given(st.lists(st.sampled_from(BOX_PIECES), max_size=14).map("".join))
def test_extract_against_a_second_reading(text):
    def read(text):  # rules 1 and 2 once more: box by box from the last one, character by character
        text = text.split("</think>")[-1]
        for opening in (
            [] if "<think>" in text else reversed(list(re.finditer(r"\\boxed\s*\{", text)))
        ):
            depth, at = 1, opening.end()
            while depth and at < len(text):
                pair = text[at : at + 2]
                escaped = (
                    pair in ("\\{", "\\}")
                    or pair == "\\\\"
                    and not text.startswith("boxed", at + 2)
                )
                depth += 0 if escaped else (text[at] == "{") - (text[at] == "}")
                at += 2 if escaped else 1
            if not depth:
                return text[opening.end() : at - 1].strip() or None
        return None

    assert extract(text) == read(text)


def test_order_of_gold_and_answer(verifier):
    assert verifier.grade([("(1,2)", "1<x<2"), ("1<x<2", "(1,2)")]) == [C, W]


def test_exact_comparison_equals_math_verify(verifier):
    numbers = [
        "0",
        "-0",
        "1",
        "-1",
        "+7",
        "07",
        "-07",
        "100",
        "213",
        "1234",
        "99999",
        "9" * 18,
        "-" + "9" * 18,
        "9" * 17 + "8",
        "0.5",
        "1/2",
        "\\dfrac{3}{6}",
        "-0.5",
        "0.25",
        "1.0",
        "4/4",
        "-\\frac{1}{2}",
        "1/3",
        "0.333333",
        "0.333334",
        "2/6",
        "0.000001",
        "0.000002",
        "1/1000000",
        "999999.999999",
        "123456789012/7",
        "100000.1",
        "1000001/10",
    ]
    for gold in numbers:
        for answer in numbers:
            verdict = verify._quick_verdict(answer, gold)
            assert verdict == (answer, gold) or verdict == verifier._ask((answer, gold)), (
                answer,
                gold,
            )
    for other in (
        "9" * 19,
        "\u0665",
        "--5",
        "5e3",
        "1/0",
        "1/-2",
        ".5",
        "1234567.5",
        "0.1234567",
        "\\frac12",
        "50\\%",
        "",
    ):
        assert answers.number(other) is None


NUMBERS = st.builds(
    lambda value, kind: notations(value, 3)[kind % len(notations(value, 3))],
    st.fractions(-1000, 1000, max_denominator=999) | DECIMALS,
    st.integers(0, 99),
)


@settings(FUZZ, max_examples=3000 if LONG else 300)
@given(NUMBERS, NUMBERS, st.integers(-3, 3), st.booleans())
def test_exact_comparison_of_random_numbers_equals_math_verify(verifier, gold, other, steps, near):
    exact = answers.number(gold)
    answer = f"{float(exact + Fraction(steps, 10**6)):.6f}" if near and exact is not None else other
    verdict = verify._quick_verdict(answer, gold)
    if isinstance(verdict, str):
        values = [answers.normal(text)[0] for text in (answer, gold)]
        assert verdict == verifier._ask(values), (gold, answer)


@settings(FUZZ, max_examples=5000 if LONG else 500)
@given(
    st.lists(
        st.sampled_from(
            PIECES
            + split(r"""
                1\,000  \text{ cm}  cm  \textbf{  5 balls  \approx  _5  ^\circ  \fbox{  $  ~  or
                .
            """)
            + [" "]
        ),
        max_size=12,
    ).map("".join)
)
def test_normal_form_of_anything(text):
    normal = answers.normal(text)
    assert normal is None or len(normal) == 2 and all(isinstance(part, str) for part in normal)
    assert normal is None or answers.units_agree(normal[1], normal[1])  # a gold agrees with itself


@pytest.mark.parametrize(
    "text",
    [
        "{" * 250 + "}" * 250,
        " a" * 250,
        "5 " + "a " * 249,
        "5" + "\\text{a}" * 60,
        "1 000" * 100,
        "5/" * 250,
        "$" * 500,
        "\\approx" * 70,
        "x<1 or " * 70,
        "." * 500,
    ],
)
def test_normal_form_takes_no_time(text):
    start = time.perf_counter()
    answers.normal(text)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so \\boxed{5}", "5"),
        ("\\boxed{ 5 }", "5"),
        ("\\boxed {5}", "5"),
        ("\\\\boxed{5}", "5"),
        ("\\\\\\boxed{5}", "5"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}} done", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\left\\{1\\right.}", "\\left\\{1\\right."),
        ("\\boxed{1 \\\\{2}}", "1 \\\\{2}"),
        ("\\boxed{5\n}", "5"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{1 + \\boxed{5} + 2}", "5"),
        ("\\boxed{5} and \\boxed{6", "5"),
        ("\\boxed{ oh \\boxed{5}", "5"),
        ("a { b \\boxed{5}", "5"),
        ("} } \\boxed{5} {", "5"),
        ("\\fbox{5}", None),
        ("boxed{5}", None),
        ("\\boxed5", None),
        ("\\boxedx{5}", None),
        ("", None),
        ("5", None),
        ("\\boxed{5", None),
        ("\\boxed{{5}", None),
        ("\\boxed{5\\}", None),
        ("\\boxed{}", None),
        ("\\boxed{5} \\boxed{ }", None),
        ("<think>\\boxed{1}</think>\\boxed{2}", "2"),
        ("<think>the gold is \\boxed{1}</think> unsure", None),
        ("<think>\\boxed{1}", None),
        ("\\boxed{1} <think> hm", None),
        ("\\boxed{1}</think> \\boxed{2}", "2"),
        ("\\boxed{1}</think>", None),
        ("<think>a</think>\\boxed{1}</think>\\boxed{2}", "2"),
        ("<think>a</think>\\boxed{1}</think>", None),
        ("<think>a</think>\\boxed{1}<think>", None),
        ("<think></think>\\boxed{\ud800}", "\ud800"),
    ],
)
def test_extract(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize(
    "text, size",
    [
        ("\\boxed{" + "{" * 10_000 + "1" + "}" * 10_000 + "}", 20_001),
        ("\\boxed{" * 100_000, None),
        ("\\boxed{1}" * 100_000, 1),
        ("\\boxed{" * 50_000 + "1" + "}" * 50_000, 1),
        ("\\boxed" + " " * 1_000_000, None),
        ("\\" * 1_000_001, None),
        ("<think>" * 100_000, None),
        ("</think>" * 100_000 + "\\boxed{1}", 1),
        ("}" * 1_000_000, None),
    ],
)
def test_extract_is_linear(text, size):
    start = time.process_time()
    answer = extract(text)
    assert (answer and len(answer)) == size
    assert time.process_time() - start < 2


def test_hostile_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with Verifier(workers=2, seconds=1) as verifier:
        # The first answer of a worker and later ones take different paths.
        assert verifier.grade([("\\sqrt{4}", "2")]) == [C]
        graded = verifier.grade([(answer, "5") for answer in HOSTILE])
        verdicts = dict(zip(HOSTILE, graded, strict=True))
        assert set(verdicts.values()) == {"wrong", "timeout"}, verdicts
        assert verdicts["9^{9^{9}}"] == verdicts["((9!)!)!"] == "timeout"
        assert verdicts["1" * 10_000] == verdicts["\ud800"] == "wrong"
        before = time.monotonic()
        # From the cache.
        assert (
            verifier.grade([("9^{9^{9}}", "5")]) == ["timeout"] and time.monotonic() - before < 0.5
        )
        workers = [worker.process.pid for worker in verifier._workers if worker.process]
    assert time.monotonic() - start < 3.0 * len(HOSTILE)
    assert not any(map(alive, workers)) and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "gold, verdict, texts", [pytest.param(*family, id=name) for name, *family in FAMILIES]
)
def test_hostile_family(verifier, gold, verdict, texts):
    def others(texts, finished, expected):
        graded = grade_responses(verifier, texts, [finished] * len(texts), [gold] * len(texts))
        rows = zip(texts, graded, strict=True)
        return {text[:99]: result for text, result in rows if result != expected}

    assert not others(texts, True, (C if verdict == C else "incorrect", verdict))
    assert not others(texts, False, ("truncated", "truncated"))
    # A think block is never read, whatever it holds.
    thoughts = ["<think>" + text + "</think>\\boxed{-99}" for text in texts]
    assert not others(thoughts, True, ("incorrect", W))


def test_hostile_gold_answers(verifier):
    golds = [extract(text) or text for _, _, _, texts in FAMILIES for text in texts[::9]]
    for gold, problem in zip(golds, verifier.check_golds(golds), strict=True):
        try:
            verdict = verifier.grade([(gold if problem is None else "1/2", gold)])
        except ValueError:
            assert problem
        else:  # what complains about itself has no right answer
            assert verdict == [C] if problem is None else verdict[0] in (W, "timeout"), gold[:99]


def test_hangs(hasty):
    for text in HANGS if LONG else HANGS[::10]:
        start = time.monotonic()
        assert grade_responses(hasty, [text], [True], ["5"])[0] in (
            ("incorrect", W),
            ("incorrect", "timeout"),
        ), text
        # 20 s: to start another worker on a loaded machine.
        assert time.monotonic() - start < hasty.seconds + 20, text


def test_a_verifier_works_on_after_time_outs_interrupts_and_deaths():
    with Verifier(workers=1, seconds=5) as verifier:
        assert verifier.grade(
            [("9^{9^{9}}", "5"), ("\\sqrt4", "2"), (None, "5"), ("\\sqrt5", "2")]
        ) == ["timeout", C, "no_answer", W]
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            verifier.grade([("9^{9^{8}}", "1/2"), ("8^{8^{9}}", "1/2")])
        # No verdict of the interrupted call is left in the pipe.
        assert verifier.grade([("\\sqrt6", "2"), ("\\sqrt9", "3")]) == [W, C]
        first = verifier._workers[0].process.pid
        os.kill(first, signal.SIGKILL)  # as the system does when memory runs out
        assert verifier.grade([("\\sqrt{16}", "4")]) == [C]
        second = verifier._workers[0].process
        assert second.pid != first and second.poll() is None
        # One that has not answered yet is not blamed for dying idle either.
        verifier._workers[0].used = False
        second.kill()
        second.wait()
        assert verifier.grade([("\\sqrt{25}", "5")]) == [C]


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads /proc")
def test_memory_limit():
    with Verifier(workers=1, seconds=10, memory_mb=256) as verifier:
        worker = verifier._workers[0]
        assert verifier.grade([("\\sqrt4", "2")]) == [C]
        with open(f"/proc/{worker.process.pid}/limits") as limits:
            assert str(256 << 20) in limits.read()


def children():
    """Process ids of our children, and of theirs, that have not been waited for."""
    parents = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                parents[int(pid)] = int(stat.read().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            pass
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def megabytes(pid):
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads /proc")
def test_nothing_leaks(verdicts):
    processes, files = children(), len(os.listdir("/proc/self/fd"))
    # 5 s: ordinary answers must not time out on a busy machine.
    with Verifier(workers=2, seconds=5) as verifier, ThreadPoolExecutor(2) as threads:
        assert verifier.grade([("9^{9^{9}}", "5"), ("8^{9^{10}}", "5")]) == ["timeout"] * 2
        workers = children() - processes
        assert len(workers) == 2  # those that were killed are gone, not zombies
        pairs = list(reversed(verdicts))  # in other company and from two threads: the same verdicts
        halves = [pairs[::4], pairs[1::4]]
        assert list(threads.map(verifier.grade, halves)) == [
            [verdicts[pair] for pair in half] for half in halves
        ]
        open_files, memory = len(os.listdir("/proc/self/fd")), []
        for block in range(10):
            numbers = range(block * 2000, block * 2000 + (1000 if LONG else 30))
            verdict = verifier.grade(
                [
                    (f"\\frac{{{2 * i}\\pi}}{{14}}", f"{i}\\pi/7")
                    if i % 10
                    else (f"x_{{{i}}}+{i}", f"{i}+x_{{{i}}}")
                    for i in numbers
                ]
            )
            assert verdict == [C] * len(numbers)
            memory.append(sum(map(megabytes, [os.getpid(), *workers])))
        assert children() - processes == workers and len(os.listdir("/proc/self/fd")) == open_files
        # 40 MB, of 200 or so: caches that fill up take a few.
        assert memory[-1] < memory[1] + 40, memory
    assert children() == processes and len(os.listdir("/proc/self/fd")) == files


def test_close_is_final_and_idempotent():
    verifier = Verifier()
    assert verifier.grade([]) == [] and verifier.grade([("5", "5")]) == [C]
    assert not any(worker.process for worker in verifier._workers)  # integers need no worker
    verifier.grade([("\\sqrt4", "2")])
    pids = [worker.process.pid for worker in verifier._workers if worker.process]
    verifier.close()
    verifier.close()
    assert pids and not any(map(alive, pids))
    with pytest.raises(RuntimeError, match="closed"):
        verifier.grade([("5", "5")])


@pytest.mark.parametrize("kill", [True, False])
def test_workers_do_not_outlive_their_parent(tmp_path, kill):
    # No `if __name__` guard and never closed: both must be harmless.
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, threading, time\n"
        "from verify import Verifier\n"
        "verifier = Verifier(workers=1, seconds=2)\n"
        "verifier.grade([('x', '1x')])\n"
        "print(verifier._workers[0].process.pid, flush=True)\n"
        + ("verifier.grade([('9^{9^{9}}', '5')])\n" if kill else "")
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(verify.__file__))}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        pid = int(parent.stdout.readline())
        if kill:
            parent.kill()
        assert (parent.wait(20) == 0) != kill
    deadline = time.monotonic() + 8
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_worker_that_cannot_start(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with Verifier(workers=1) as verifier, pytest.raises(RuntimeError, match="did not start"):
        verifier.grade([("\\sqrt4", "2")])


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"seconds": 0}, {"memory_mb": 0}])
def test_bad_limits(arguments):
    with pytest.raises(ValueError, match="Verifier needs"):
        Verifier(**arguments)


def test_gold_answers(verifier):
    golds = [
        "5",
        "\\frac{1}{2}",
        "$x=3$",
        "\\boxed{7}",
        "",
        "0.\\overline{3}",
        "\\frac{1}{0}",
        "3 apples and a }",
        "1+" * 300 + "1",
    ]
    problems = verifier.check_golds(golds)
    assert problems[:4] == [None] * 4 and all(problems[4:])
    assert (
        "cannot parse" in problems[5]
        and "equal to itself" in problems[6]
        and "longer" in problems[8]
    )
    with pytest.raises(ValueError, match="overline"):
        verifier.grade([("0.5", "0.\\overline{3}")])
    assert all("no unit" in problem for problem in verifier.check_golds(UNREAD_GOLDS))
    with pytest.raises(ValueError, match="5 million.*no unit"):
        verifier.grade([("5", "5 million")])


def test_grade_responses(verifier):
    texts = ["\\boxed{5}", "\\boxed{6}", "5", "\\boxed{5}", "<think>\\boxed{5}"]
    expected = [
        ("correct", "correct"),
        ("incorrect", "wrong"),
        ("incorrect", "no_answer"),
        ("truncated", "truncated"),
        ("incorrect", "no_answer"),
    ]
    assert grade_responses(verifier, texts, [True, True, True, False, True], ["5"] * 5) == expected
    verifier = SimpleNamespace(grade=lambda pairs: ["timeout"] * len(pairs))
    assert grade_responses(verifier, ["\\boxed{5}"] * 2, [True, False], ["5"] * 2) == [
        ("incorrect", "timeout"),
        ("truncated", "truncated"),
    ]
    with pytest.raises(ValueError):
        grade_responses(verifier, ["\\boxed{5}"], [True, True], ["5"])


def test_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(verify, "CACHE_PAIRS", 2)
    with Verifier(workers=1) as verifier:
        pairs = [
            ("\\sqrt4", "2"),
            ("\\sqrt5", "2"),
            ("\\sqrt9", "3"),
            ("\\sqrt4\\text{ cm}", "2 dollars"),
            ("\\sqrt4\\text{ cm}", "2"),
        ]
        assert verifier.grade(pairs) == [C, W, C, W, C]
        # Normal forms: the last pair was the first once more.
        assert list(verifier._cache) == [("\\sqrt5", "2"), ("\\sqrt9", "3")]


@pytest.mark.parametrize(
    "arguments, code, stdout, stderr",
    [
        (["so \\boxed{1/2}", "0.5"], 0, "answer:  1/2\nverdict: correct\n", ""),
        (["\\boxed{-7}", "-7"], 0, "answer:  -7\nverdict: correct\n", ""),
        (["\\boxed{6}", "5"], 1, "answer:  6\nverdict: wrong\n", ""),
        (["5", "5"], 1, "answer:  None\nverdict: no_answer\n", ""),
        (["\\boxed{5}", "\\foo"], 2, "", "gold answer '\\\\foo': math-verify cannot parse it\n"),
        (["5"], 2, "", "usage: "),
    ],
)
def test_command_line(arguments, code, stdout, stderr):
    result = subprocess.run(
        [sys.executable, verify.__file__, *arguments], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (code, stdout)
    assert result.stderr.startswith(stderr) and result.stderr.count("\n") == (code == 2)


def test_import_is_light():
    code = (
        "import sys, json, verify; "
        "heavy = ('torch', 'transformers', 'sympy', 'math_verify'); "
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.abspath(verify.__file__)),
    )
    assert json.loads(result.stdout) == []


# --------------------------------------------------------------------------------------------------
# Golds in data files: data.load_file

ROW = '{"question": "How many?", "answer": %s}'


def load(tmp_path, content, name="a.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return data.load_file(str(path))


@pytest.mark.parametrize(
    "number, text",
    [
        ("2", "2"),
        ("2.50", "2.5"),
        ("0.00001", "0.00001"),
        ("1e16", "10000000000000000"),
        ("1e-7", "0.0000001"),
        ("-1.5e3", "-1500.0"),
        ("1E2", "100.0"),
    ],
)
def test_numbers_in_data_become_decimal_text(tmp_path, number, text):
    assert load(tmp_path, ROW % number)[0].answer == text


@pytest.mark.parametrize(
    "missing", ["NaN", "Infinity", "-Infinity", "1e999", "null", '""', '" "', '"nan"']
)
def test_missing_golds_are_refused_by_row(tmp_path, missing, capsys):
    with pytest.raises(SystemExit):
        load(tmp_path, ROW % 5 + "\n" + ROW % missing)
    assert re.fullmatch(r"error: \S+, line 2: no answer .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + (ROW % 5).encode(),
        ROW % 5 + "\r\n",
        "[" + ROW % 5 + "]",
        "\n [\n" + ROW % 5 + "\n]\n",
        "\n" + (ROW % 5).replace("many", "m\u2028\u00e9ny"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_forms_of_json_files(tmp_path, content, name):
    assert [problem.answer for problem in load(tmp_path, content, name)] == ["5"]


@pytest.mark.parametrize(
    "content, message",
    [
        ((ROW % 5).encode("utf-16"), "a.jsonl: UTF-16 or another wide encoding; save it as UTF-8"),
        (
            (ROW % 5).encode("utf-16-le"),
            "a.jsonl: UTF-16 or another wide encoding; save it as UTF-8",
        ),
        (
            (ROW % 5 + "\n" + ROW % '"\u00e9"').encode("latin-1"),
            "a.jsonl, line 2: byte 0xe9 is not UTF-8 (latin-1?); save the file as UTF-8",
        ),
        ("[" + ROW % 5 + ", 5]", "a.jsonl, row 2: not a JSON object"),
        (
            "[" + ROW % 5,
            "a.jsonl: begins like a JSON array, but is not JSON (Expecting ',' delimiter",
        ),
        ("[1]\n[2]", "a.jsonl: begins like a JSON array, but is not JSON (Extra data"),
        (ROW % 5 + "\n5", "a.jsonl, line 2: not a JSON object"),
        (
            ROW % 5 + "\n" + ROW % '"5 million"' + "\n" + ROW % '"10 80"',
            "a.jsonl, line 2: gold answer '5 million': it has words or numbers beside a number "
            "that are no unit (see answers.py) (the first of 2 such rows)",
        ),
        ("", "no rows"),
        ("[]", "no rows"),
    ],
)
def test_unreadable_data_is_one_line(tmp_path, content, message, capsys):
    with pytest.raises(SystemExit):
        load(tmp_path, content)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_units_of_golds_are_reported(tmp_path, capsys):
    problems = load(
        tmp_path, "\n".join(ROW % gold for gold in ("5", '"15 balls"', '"5 m"', '"9 (apples)"'))
    )
    # What a context shows is the text of the data.
    assert [problem.answer for problem in problems] == ["5", "15 balls", "5 m", "9 (apples)"]
    assert (
        "2 of 4 gold answers have a unit" in (line := capsys.readouterr().out)
        and "line 2: '15 balls' is 15, unit ball)" in line
    )
    assert (
        "1 of 4 gold answers are a number and one letter" in line
        and "line 3: '5 m'; a unit is \\text{m})" in line
    )
    load(tmp_path, ROW % 5)
    assert capsys.readouterr().out == ""
