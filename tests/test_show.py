"""The token view: the data against opsd.py's own, the page in a browser where there is one."""

import html
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import opsd
from data import CONTEXTS, embedded_problems, render_prompt
from model import load_model, sampled_logps
from rollout import Rollout
from run import HERE
from tests.helpers import CPU, read_lines
from tools import show

TINY = os.path.join(HERE, "tiny")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
in_browser = pytest.mark.skipif(not BROWSER, reason="no chromium on the PATH")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(path of a page, its records): four problems, before and after something else than OPSD."""
    folder = tmp_path_factory.mktemp("show")
    page, lines = str(folder / "page.html"), str(folder / "tokens.jsonl")
    flags = f"--problems 4 --draw 16 --threads 1 --run {TINY}/sft".split()
    others, own = [], show.samplers.make_sampler
    with pytest.MonkeyPatch.context() as patch:
        make = lambda *args: others.append(args[3]) or own(*args)  # noqa: E731
        patch.setattr(show.samplers, "make_sampler", make)
        show.main([*flags, "--model", f"{TINY}/rlvr", "--out", page, "--jsonl", lines])
    assert others[0] is None and others[1]  # vLLM: one engine for both
    return page, read_lines(lines)


def data_of(page):
    with open(page, encoding="utf-8") as file:
        return json.loads(file.read().split('id="data">')[1].split("</script>")[0])


def test_the_page_holds_the_records_and_arrays_are_aligned_with_tokens(made):
    page, records = made
    assert len(records) == 8 and data_of(page)["responses"] == records
    for record in records:
        arrays = [record[key] for key in record if key.startswith(("student_", "token"))]
        arrays.remove(record["student_prompt"])
        for row in record["contexts"].values():
            arrays += [row[key] for key in row if key != "teacher_prompt"]
            assert max(map(len, row["teacher_best"])) <= show.BEST
        assert {len(array) for array in arrays} == {len(record["token_ids"])}
        finished = "".join(record["tokens"]).endswith("<|im_end|>")
        assert finished == (record["reason"] != "truncated")


def test_outcomes_are_balanced():
    def some(*outcomes):
        return [Rollout(None, [], outcome=outcome) for outcome in outcomes]

    assert show.choose(some(*["correct"] * 4, *["incorrect"] * 4), 4) == [0, 1, 4, 5]
    assert show.choose(some("correct", "incorrect", "correct", "correct"), 3) == [0, 1, 2]
    assert show.choose(some("truncated", "incorrect", "truncated", "correct"), 3) == [0, 1, 3]
    assert show.choose(some("incorrect", "incorrect"), 3) == [0, 1]


def test_measures_are_opsds_own(made):
    """The KL, the entropies and the log-probabilities of the training step itself."""
    model, tokenizer = load_model(f"{TINY}/rlvr", CPU)
    args, problems = opsd.parse_args([]), embedded_problems(16, 0, True)
    for record in made[1][0], made[1][4]:
        problem, following = (problems[record["problem"] + i] for i in (0, 1))
        row = Rollout(problem, render_prompt(tokenizer, problem), record["token_ids"])
        row.outcome = "correct"
        for name, found in record["contexts"].items():
            texts = CONTEXTS[name]([row, Rollout(following, [])], None, args)  # `other`: the next
            opsd.add_teacher_rows([row], texts[:1], tokenizer, args, None)
            assert tokenizer.decode(row.teacher_row[0]) == found["teacher_prompt"]
            opsd.accumulate_gradients(model, model, [row], args)
            model.zero_grad()
            columns = dict(found, student_entropy=record["student_entropy"])
            columns["logp"] = record["student_logp"]
            row.measures["log_ratio"] = sampled_logps(model, [row.teacher_row])
            row.measures["log_ratio"] -= row.measures["logp"]
            for key in ("reverse_kl", "student_entropy", "teacher_entropy", "logp", "log_ratio"):
                wanted = row.measures[key]
                torch.testing.assert_close(torch.tensor(columns[key]), wanted, atol=2e-4, rtol=1e-4)
            assert (name == "none") == (max(found["reverse_kl"]) == 0)


HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "&lt;b&gt;/*DATA*/",
    "\ud800",
    "\u2028",
]


def hostile_page(tmp_path):
    """A page of a made-up response."""
    values, best = [0.01 * i for i, _ in enumerate(HOSTILE)], [[[text, 0.9]] for text in HOSTILE]
    view = dict.fromkeys(("reverse_kl", "log_ratio", "teacher_entropy"), values)
    view.update(teacher_best=best, teacher_prompt=HOSTILE[1])
    record = dict(problem=0, model="m", after=False, question=HOSTILE[0], answer=HOSTILE[3])
    record.update(outcome="correct", reason="correct", student_prompt=HOSTILE[2], tokens=HOSTILE)
    record.update(student_entropy=values, student_logp=values, student_best=best)
    record["contexts"] = dict(none=view, solution=view)
    counts = dict(m=dict(responses=1, accuracy=50.0, length=10.0))
    page = dict(model="m", run=None, counts=counts, shown=["none", "solution"], note="")
    path = tmp_path / "hostile.html"
    path.write_bytes(show.render(dict(page, responses=[record])))
    return str(path)


def test_no_text_of_the_data_is_markup(tmp_path):
    page = hostile_page(tmp_path)
    with open(page, encoding="utf-8") as file:
        inside = file.read().split('id="data">')[1].split("\n<script>")[0]
    assert inside.count("<") == 1 and inside.endswith("</script>")
    assert data_of(page)["responses"][0]["tokens"][:5] == HOSTILE[:5]
    with open(show.TEMPLATE, encoding="utf-8") as file:
        template = file.read()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|https?:", template
    )


def test_token_texts_keep_leading_spaces():
    class Stripping:
        """A tokenizer that drops the first token's leading space, as SentencePiece's do."""

        def __call__(self, text, add_special_tokens):
            return type("Encoding", (), dict(input_ids=[0]))

        def decode(self, ids, clean_up_tokenization_spaces):
            return "".join(["a", " word"][i] for i in ids).removeprefix(" ")

    assert show.TokenTexts(Stripping())[1] == " word"


# ------------------------------------------------------------------------------------------------
# In a browser


def dom(page, tmp_path, fragment=""):
    """The document as chromium has it after loading."""
    flags = "--headless --no-sandbox --disable-gpu --window-size=1400,1300 --dump-dom"
    command = [BROWSER, *flags.split(), f"--user-data-dir={tmp_path}/browser"]
    return subprocess.run(
        [*command, f"file://{page}{fragment}"], capture_output=True, text=True, timeout=120
    ).stdout


def after_script(page, tmp_path, script):
    """What a script returns that is run at the end of a copy of the page, as a dict."""
    copy = tmp_path / "copy.html"
    with open(page, encoding="utf-8") as file:
        text = file.read()
    call = f"document.body.dataset.result = JSON.stringify((() => {{ {script} }})());"
    copy.write_text(text.replace("</body>", f"<script>{call}</script></body>"), encoding="utf-8")
    found = re.search(r'<body[^>]* data-result="([^"]*)"', dom(str(copy), tmp_path))
    return json.loads(html.unescape(found[1]))


@in_browser
def test_it_opens_on_the_response_that_shows_the_point(made, tmp_path):
    """Correct before and after, and shortened most; without one that of the draw's first. The
    summary is computed from the data.
    """
    page, records = made
    script = """
        const cells = [...document.querySelectorAll("[data-nats]")];
        return { first: RESPONSES[0].problem, looked: looked[0].problem, token: looked[1],
                 summary: cells.map(c => [c.dataset.outcome, Number(c.dataset.nats)]) };"""
    found = after_script(page, tmp_path, script)
    summary = found.pop("summary")
    pairs = zip(records[::2], records[1::2], strict=True)
    both = [pair for pair in pairs if {r["outcome"] for r in pair} == {"correct"}]
    shares = {a["problem"]: len(b["tokens"]) / len(a["tokens"]) for a, b in both}
    first = min(shares, key=shares.get) if shares else records[0]["problem"]
    (record,) = [r for r in records if r["problem"] == first and not r["after"]]
    values = record["contexts"]["solution"]["reverse_kl"]
    token = 1 + next(i for i, value in enumerate(values) if value >= max(values) / 2)
    assert found == dict(first=first, looked=first, token=token)
    wanted = []
    for name in show.SHOWN:
        for outcome in ("correct", "incorrect"):
            rows = [r for r in records if r["outcome"] == outcome and not r["after"]]
            sums = [sum(r["contexts"][name]["reverse_kl"]) for r in rows]
            wanted.append([outcome, np.mean(sums)])
    assert [outcome for outcome, _ in summary] == [outcome for outcome, _ in wanted]
    np.testing.assert_allclose([v for _, v in summary], [v for _, v in wanted], 0.01, 0.02)


@in_browser
def test_hover_switch_and_address(made, tmp_path):
    """A token is hovered, a context chosen by button, one by key, and a measure; the page tells,
    and its address leads back there.
    """
    page, records = made
    problem, before = records[2]["problem"], [record for record in records if not record["after"]]
    contexts = records[2]["contexts"]
    token = int(np.argmax(contexts["solution"]["reverse_kl"]))
    script = f"""
        const r = RESPONSES.find(r => r.problem === {problem}), span = r.spans[{token}];
        const row = key => document.querySelector(`[data-measure=${{key}}]`);
        const value = key => Number(row(key).dataset.value);
        const strength = () => Number(span.style.getPropertyValue("--a"));
        const press = key => document.dispatchEvent(new KeyboardEvent("keydown", {{ key }}));
        const click = value => document.querySelector(`button[value="${{value}}"]`).click();
        span.dispatchEvent(new PointerEvent("pointerover", {{ bubbles: true }}));
        const found = {{ hovered: value("kl"), painted: strength(), text: span.textContent }};
        click("instruction");
        found.instruction = value("kl");
        span.click();
        click("answer");
        Object.assign(found, {{ answer: value("kl"), faded: strength() }});
        press("1");
        Object.assign(found, {{ none: value("kl"), blank: strength() }});
        press("5"); press("m"); press("ArrowRight"); press("ArrowLeft");
        Object.assign(found, {{ ratio: value("ratio"), hash: location.hash, key: r.key }});
        click("incorrect");
        found.open = [...document.querySelectorAll(".card")].filter(c => !c.hidden).length;
        return found;"""
    found = after_script(page, tmp_path, script)
    for name in ("instruction", "answer", "none"):
        assert found[name] == contexts[name]["reverse_kl"][token]
    assert found["hovered"] == contexts["solution"]["reverse_kl"][token]
    assert found["ratio"] == contexts["solution"]["log_ratio"][token]
    assert found["painted"] > 0.5 and found["blank"] == 0 and found["faded"] != found["painted"]
    assert found["text"] == records[2]["tokens"][token].replace("\n", "↵\n")
    assert found["hash"] == f"#{found['key']}.t{token + 1}.solution.ratio"
    assert found["open"] == sum(record["outcome"] == "incorrect" for record in before)
    shown = dom(page, tmp_path, found["hash"])
    assert f'data-measure="ratio" data-value="{found["ratio"]}"' in shown
    assert f"token {token + 1} of {len(records[2]['tokens'])}" in shown
    assert len(re.findall(r'class="(?:\w+ )*at"', shown)) == 1


@in_browser
def test_hostile_text_stays_text(tmp_path):
    page = hostile_page(tmp_path)
    script = """return { title: document.title, images: document.images.length,
                 tokens: RESPONSES[0].spans.map(s => s.textContent) };"""
    found = after_script(page, tmp_path, script)
    assert found["title"] == "What the teacher wants, token by token" and found["images"] == 0
    assert found["tokens"][:5] == HOSTILE[:5]
