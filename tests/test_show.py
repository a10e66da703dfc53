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
from model import load_model
from rollout import Rollout
from run import HERE
from tools import show

TINY = os.path.join(HERE, "tiny")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
in_browser = pytest.mark.skipif(not BROWSER, reason="no chromium on the PATH")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(path of a page, its records): four problems, before and after something else than OPSD."""
    folder = tmp_path_factory.mktemp("show")
    page, lines = str(folder / "page.html"), str(folder / "tokens.jsonl")
    flags = f"--problems 4 --draw 16 --shares 25 --threads 1 --run {TINY}/sft".split()
    show.main([*flags, "--model", f"{TINY}/rlvr", "--out", page, "--jsonl", lines])
    with open(lines) as file:
        return page, [json.loads(line) for line in file]


def data_of(page):
    with open(page, encoding="utf-8") as file:
        return json.loads(file.read().split('id="data">')[1].split("</script>")[0])


def column(response, values):
    return values if isinstance(values, list) else [values] * len(response["tokens"])


def test_arrays_are_aligned_with_tokens(made):
    page, records = made
    data = data_of(page)
    assert len(records) == len(data["responses"]) == 8
    for record, response in zip(records, data["responses"], strict=True):
        count = len(record["token_ids"])
        texts = [data["vocabulary"][i] for i in response["tokens"]]
        assert texts == record["tokens"] and len(texts) == count
        arrays = [record[k] for k in ("student_entropy", "student_logp", "student_best")]
        for name, row in record["contexts"].items():
            view = response["views"][name]
            arrays += [row[key] for key in row if key != "teacher_prompt"]
            shown = record["student_prompt"][: view["at"]] + view["read"]
            assert shown + record["student_prompt"][view["at"] :] == row["teacher_prompt"]
            for key in ("reverse_kl", "log_ratio", "teacher_entropy", "gate"):
                np.testing.assert_allclose(column(response, view[key]), row[key], 5e-3, 6e-4)
            assert len(view["best"]) == count and max(map(len, view["best"])) <= 2 * show.BEST
        assert {len(array) for array in arrays} == {count}
        assert "".join(texts).endswith("<|im_end|>") == (record["reason"] != "truncated")


def test_outcomes_are_balanced():
    def some(*outcomes):
        return [Rollout(None, [], outcome=outcome) for outcome in outcomes]

    assert show.choose(some(*["correct"] * 4, *["incorrect"] * 4), 4) == [0, 1, 4, 5]
    assert show.choose(some("correct", "incorrect", "correct", "correct"), 3) == [0, 1, 2]
    assert show.choose(some("truncated", "incorrect", "truncated", "correct"), 3) == [0, 1, 3]
    assert show.choose(some("incorrect", "incorrect"), 3) == [0, 1]


def test_measures_are_opsds_own(made):
    """The KL, the entropies and the sampled token's log-probability of the training step itself."""
    _, records = made
    model, tokenizer = load_model(f"{TINY}/rlvr", torch.device("cpu"))
    args = opsd.parse_args([])
    for record in records[0], records[4]:
        problem = embedded_problems(16, 0, True)[record["problem"]]
        row = Rollout(problem, render_prompt(tokenizer, problem), record["token_ids"])
        row.outcome = "correct"
        for name in ("none", "solution", "answer"):
            contexts = CONTEXTS[name]([row], None, args)
            opsd.add_teacher_rows([row], contexts, tokenizer, args, None)
            opsd.accumulate_gradients(model, model, [row], args)
            measures = row.measures
            model.zero_grad()
            found = record["contexts"][name]
            columns = dict(found, student_entropy=record["student_entropy"])
            for key in ("reverse_kl", "student_entropy", "teacher_entropy", "gate"):
                values = torch.tensor(columns[key])
                torch.testing.assert_close(values, measures[key], atol=1e-5, rtol=1e-4)
            if name == "none":
                assert max(map(abs, found["reverse_kl"])) < 1e-5
                assert max(map(abs, found["log_ratio"])) < 1e-4
        own = torch.tensor(record["student_logp"])
        torch.testing.assert_close(own, measures["logp"], atol=1e-5, rtol=1e-4)


def test_contexts(made):
    """`other` is another problem's reference; a part of the solution never gives the answer."""
    _, records = made
    problems = embedded_problems(16, 0, True)
    for record in records:
        problem, following = (problems[(record["problem"] + i) % 16] for i in (0, 1))
        prompts = {name: row["teacher_prompt"] for name, row in record["contexts"].items()}
        assert following.solution in prompts["other"] and problem.solution not in prompts["other"]
        for name, percent in (("part25", 25), ("part", 50)):
            beginning = problem.solution[: round(len(problem.solution) * percent / 100)]
            assert f"\n{beginning}\n\n" in prompts[name] and "answer is" not in prompts[name]
        assert f"{problem.solution}\nThe answer is {problem.answer}." in prompts["solution"]


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
    """A page of a made-up response, the measures drawn as a language model's: mostly near 0."""
    rng, tokens = np.random.default_rng(0), HOSTILE

    def values():
        return [float(v) for v in rng.exponential(size=len(tokens)) * rng.random(len(tokens)) ** 8]

    def best():
        return [[(tokens[int(rng.integers(len(tokens)))], v) for v in (0.9, 0.08, 0.02)]] * len(
            tokens
        )

    def view():
        keys = ("reverse_kl", "log_ratio", "teacher_entropy")
        row = {key: values() for key in keys}
        return dict(row, gate=[1.0] * len(tokens), teacher_best=best(), teacher_prompt=HOSTILE[1])

    record = dict(
        problem=0,
        model="m",
        after=False,
        question=HOSTILE[0],
        answer=HOSTILE[3],
        outcome="correct",
        reason="correct",
        student_prompt=HOSTILE[2],
        tokens=tokens,
        student_entropy=values(),
        student_logp=values(),
        student_best=best(),
        contexts={name: view() for name in ("none", "solution")},
    )
    summary = dict(responses=1, accuracy=50.0, length=10.0)
    facts = dict(model="m", run=None, counts=dict(m=summary), shown=["none", "solution"], note="")
    page = show.page_data([record], dict(facts, slider=[[0, "none"], [100, "solution"]]))
    path = tmp_path / "hostile.html"
    path.write_bytes(show.render(page))
    return str(path)


def test_no_text_of_the_data_is_markup(tmp_path):
    page = hostile_page(tmp_path)
    with open(page, encoding="utf-8") as file:
        inside = file.read().split('id="data">')[1].split("\n<script>")[0]
    assert inside.count("<") == 1 and inside.endswith("</script>")
    assert set(HOSTILE[:5]) <= set(data_of(page)["vocabulary"])
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


def test_wrong_flags_are_named(capsys, tmp_path):
    for flags, named in (
        ([], "--out"),
        (["--out", "x.html", "--shares", "100"], "--shares"),
        (["--out", "x.html", "--problems", "0"], "--problems"),
        (["--out", "x.html", "--contexts", "solutions"], "--contexts"),
        (["--out", str(tmp_path)], "--out"),
    ):
        with pytest.raises(SystemExit):
            show.main(flags)
        assert named in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# In a browser


def dom(page, tmp_path, fragment=""):
    """The document as chromium has it after loading."""
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --dump-dom"
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
def test_address_leads_to_a_token(made, tmp_path):
    page, records = made
    before = [record for record in records if not record["after"]]
    token = int(np.argmax(before[1]["contexts"]["solution"]["reverse_kl"]))
    shown = dom(page, tmp_path, f"#r2.t{token + 1}.solution.kl.dark")
    value = float(re.search(r'data-measure="kl" data-value="([^"]*)"', shown)[1])
    assert value == pytest.approx(before[1]["contexts"]["solution"]["reverse_kl"][token], rel=5e-3)
    assert f"response 2, token {token + 1} of {len(before[1]['tokens'])}" in shown
    assert 'data-theme="dark"' in shown
    assert len(re.findall(r'class="(?:\w+ )*at"', shown)) == 1


@in_browser
def test_hover_and_switch(made, tmp_path):
    """A token is hovered, a context chosen by button, one by key, and a measure; the page tells."""
    page, records = made
    before = [record for record in records if not record["after"]]
    token = int(np.argmax(before[0]["contexts"]["solution"]["reverse_kl"]))
    script = f"""
        const span = () => document.querySelector('[data-key="r1"] span[data-t="{token + 1}"]');
        const row = key => document.querySelector(`[data-measure=${{key}}]`);
        const value = key => Number(row(key).dataset.value);
        const strength = () => Number(span().style.getPropertyValue("--a"));
        const press = key => document.dispatchEvent(new KeyboardEvent("keydown", {{ key }}));
        const click = value => document.querySelector(`button[value="${{value}}"]`).click();
        build(RESPONSES[0]);
        span().dispatchEvent(new PointerEvent("pointerover", {{ bubbles: true }}));
        const found = {{ hovered: value("kl"), painted: strength(), text: span().textContent }};
        click("instruction");
        found.instruction = value("kl");
        span().click();
        click("answer");
        Object.assign(found, {{ answer: value("kl"), faded: strength() }});
        press("1");
        Object.assign(found, {{ none: value("kl"), blank: strength() }});
        press("6"); press("m"); press("ArrowRight"); press("ArrowLeft");
        Object.assign(found, {{ ratio: value("ratio"), hash: location.hash }});
        click("incorrect");
        found.open = [...document.querySelectorAll(".card")].filter(c => !c.hidden).length;
        return found;"""
    found = after_script(page, tmp_path, script)
    contexts = before[0]["contexts"]

    def close(number, name, key="reverse_kl"):
        return number == pytest.approx(contexts[name][key][token], rel=5e-3, abs=6e-4)

    assert close(found["hovered"], "solution") and found["painted"] > 0.5
    assert close(found["instruction"], "instruction")
    assert close(found["answer"], "answer") and close(found["none"], "none")
    assert close(found["ratio"], "solution", "log_ratio")
    assert found["blank"] == 0 and found["faded"] != found["painted"]
    assert found["text"] == before[0]["tokens"][token].replace("\n", "↵\n")
    assert found["hash"] == f"#r1.t{token + 1}.solution.ratio"
    assert found["open"] == sum(record["outcome"] == "incorrect" for record in before)


@in_browser
def test_summary_is_computed_from_the_data(made, tmp_path):
    page, records = made
    script = """return [...document.querySelectorAll("[data-nats]")].map(c =>
        [c.dataset.outcome, Number(c.dataset.nats)]);"""
    found = after_script(page, tmp_path, script)
    wanted = []
    for name in show.SHOWN:
        for outcome in ("correct", "incorrect"):
            rows = [r for r in records if r["outcome"] == outcome and not r["after"]]
            sums = [sum(r["contexts"][name]["reverse_kl"]) for r in rows]
            wanted.append([outcome, np.mean(sums)])
    assert [outcome for outcome, _ in found] == [outcome for outcome, _ in wanted]
    np.testing.assert_allclose([v for _, v in found], [v for _, v in wanted], 0.01, 0.02)


@in_browser
def test_hostile_text_stays_text(tmp_path):
    page = hostile_page(tmp_path)
    script = """build(RESPONSES[0]);
        return { title: document.title, images: document.images.length,
                 tokens: RESPONSES[0].spans.map(s => s.textContent) };"""
    found = after_script(page, tmp_path, script)
    assert found["title"] == "What the teacher wants, token by token" and found["images"] == 0
    assert found["tokens"][:5] == HOSTILE[:5]
