"""The pages of a server in a real browser, the metrics, and the log of requests."""

import json
import logging
import re
import subprocess
import time
from html import unescape
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from msquant.inference.cpu.cpu_model import CpuModel
from msquant.inference.embedded import EmbeddedEngine
from msquant.server.observed import ACCESS_LOG
from msquant.server.pages import Pages
from tests.fixtures.browser import Open
from tests.server.running import MODEL, RunningServer, running, wait_for

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is in the test extra")

QUESTION = [{"role": "user", "content": "a secret question"}]
HOSTILE = "<script>alert(1)</script>'\"`$(touch x)`"


def says(page: Any, text: str) -> None:
    playwright.expect(page.locator("#state")).to_contain_text(text, timeout=30_000)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_the_box_gives_an_answer(server: RunningServer, open_page: Open, scheme: str, width: int) -> None:
    opened = open_page(f"{server.url}/", scheme, width)
    page = opened.page
    page.fill("#question", "Who are you?")
    page.fill("#tokens", "12")
    page.fill("#temperature", "0")
    page.click("#send")
    says(page, "tokens in")
    expected = server.client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Who are you?"}], max_tokens=12, temperature=0
    )
    assert page.locator(".turn.user").text_content() == "Who are you?"
    assert page.locator(".turn.assistant").text_content() == expected.choices[0].message.content
    page.fill("#question", "And then?")
    page.click("#send")
    playwright.expect(page.locator(".turn")).to_have_count(4)
    says(page, "tokens in")
    assert opened.said == []
    assert {url.removeprefix(server.url) for url in opened.requested if not url.startswith("data:")} == {
        "/",
        "/v1/chat/completions",
    }
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.click("#clear")
    assert page.locator(".turn").count() == 0


def test_the_box_can_be_stopped(
    server: RunningServer, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = CpuModel.next_logits
    monkeypatch.setattr(CpuModel, "next_logits", lambda *given: (time.sleep(0.05), whole(*given))[1])
    page = open_page(f"{server.url}/").page
    page.evaluate("""() => {
        const whole = window.fetch;
        window.fetch = (url, options) => whole(url, {...options, body: JSON.stringify(
            {...JSON.parse(options.body), ignore_eos: true, max_tokens: 250})});
    }""")
    page.click("#send")
    playwright.expect(page.locator(".turn.assistant")).to_have_text(re.compile("....", re.S))
    page.click("#stop")
    says(page, "stopped")
    wait_for(lambda: server.server.worker.active == 0)


def test_a_key_is_asked_for(engine: EmbeddedEngine, open_page: Open) -> None:
    with running(engine, api_key="s3cret") as server:
        page = open_page(f"{server.url}/").page
        page.fill("#key", "wrong")
        page.click("#send")
        says(page, "API key is missing")
        page.fill("#key", "s3cret")
        page.fill("#tokens", "3")
        page.click("#send")
        says(page, "tokens in")
        for path, status in (("/docs", 200), ("/openapi.json", 200), ("/metrics", 200), ("/v1/models", 401)):
            assert httpx.get(server.url + path, trust_env=False).status_code == status
        assert httpx.get(f"{server.url}/nothing", trust_env=False).status_code == 401


def test_a_model_that_continues_texts(
    engine: EmbeddedEngine, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    with running(engine) as server:
        opened = open_page(f"{server.url}/")
        opened.page.click("#send")
        says(opened.page, "tokens in")
        assert opened.said == []
        assert opened.requested[-1] == f"{server.url}/v1/completions"


def test_the_commands_work(server: RunningServer, open_page: Open, capfd: Any) -> None:
    curl, python = open_page(f"{server.url}/").page.locator("pre code").all_text_contents()
    answer = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=60)
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"]
    exec(compile(python, "shown", "exec"), {})
    assert capfd.readouterr().out.strip()


def test_docs_in_a_browser(server: RunningServer, open_page: Open) -> None:
    opened = open_page(f"{server.url}/docs", "dark", 390)
    assert opened.said == []
    assert [url for url in opened.requested if not url.startswith("data:")] == [f"{server.url}/docs"]
    text = opened.page.inner_text("main")
    schema = httpx.get(f"{server.url}/openapi.json", trust_env=False).json()
    assert set(schema["paths"]) >= {"/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics"}
    for path in schema["paths"]:
        assert path in text
    assert "integer ≥ 0 ≤ 5" in text, "the limit of logprobs"
    assert opened.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_names_of_others_are_escaped() -> None:
    pages = Pages(HOSTILE, keyed=True, chats=False, longest=9)
    for page in (pages.home("localhost:1"), pages.docs({"paths": {}})):
        body = bytes(page.body).decode()
        assert "<script>alert" not in body
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert "unsafe" not in policy
    python = re.findall(r"<pre><code[^>]*>(.*?)</code></pre>", bytes(pages.home("x").body).decode(), re.S)[1]
    assert f"model={HOSTILE!r}," in unescape(python)
    compile(unescape(python), "shown", "exec")


def counts(server: RunningServer) -> dict[tuple[str, ...], float]:
    text = httpx.get(f"{server.url}/metrics", trust_env=False).text
    return {
        (sample.name, *(value for name, value in sample.labels.items() if name != "model_name")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics(engine: EmbeddedEngine) -> None:
    with running(engine, max_requests=1) as server:
        client = server.client()
        for stream in (True, False):
            made = client.completions.create(
                model=MODEL, prompt="I am", max_tokens=4, stream=stream, extra_body={"ignore_eos": True}
            )
            assert made if not stream else list(made)  # type: ignore[call-overload]
            wait_for(lambda: server.server.worker.active == 0)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=MODEL, prompt="")
        httpx.request("BREW", f"{server.url}/made/up", trust_env=False)
        long = client.completions.create(
            model=MODEL,
            prompt=["I am"] * 100,
            max_tokens=200,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(long)
        found = counts(server)
        assert found["msquant:num_requests_running",] == 1
        assert found["msquant:num_requests_waiting",] == 0
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model=MODEL, prompt="I am")
        long.close()
        wait_for(lambda: counts(server)["msquant:num_requests_running",] == 0)
        found = counts(server)
    prompt = len(engine.encode("I am"))
    assert found["msquant:prompt_tokens_total",] == prompt * 102
    assert found["msquant:generation_tokens_total",] >= 8
    assert found["msquant:time_to_first_token_seconds_count",] == 3
    assert found["msquant:inter_token_latency_seconds_count",] >= 6
    assert found["msquant:e2e_request_latency_seconds_count",] == 3
    assert found["msquant:request_success_total", "length"] >= 2
    completions = ("http_requests_total", "/v1/completions", "POST")
    assert found[*completions, "200"] == 3
    assert found[*completions, "400"] == 1
    assert found[*completions, "429"] == 1
    assert found["http_requests_total", "other", "other", "404"] == 1


def test_the_log_of_requests(engine: EmbeddedEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=ACCESS_LOG)
    with running(engine) as server:
        client = server.client(api_key="s3cret")
        client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=3, temperature=0)
        httpx.get(f"{server.url}/%1b%5b31m{'x' * 200}?secret=1", trust_env=False)
        client.close()
    lines = [record.getMessage() for record in caplog.records if record.name == ACCESS_LOG]
    assert re.fullmatch(
        r"POST /v1/chat/completions status=200 prompt_tokens=\d+ completion_tokens=3 seconds=\d+\.\d{3}",
        lines[0],
    )
    assert re.fullmatch(r"GET /%1b%5b31mx{90} status=404 seconds=\d+\.\d{3}", lines[1], re.I)
    assert len(lines) == 2
    assert "secret" not in "".join(lines)


def test_the_schema_is_whole(server: RunningServer) -> None:
    """Nothing in it promises the answer 422, which this server never gives."""
    schema = httpx.get(f"{server.url}/openapi.json", trust_env=False).json()
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert set(schema["paths"][path]["post"]["responses"]) == {"200", "4XX"}
    for one in ("CompletionRequest", "ChatRequest"):
        fields = schema["components"]["schemas"][one]["properties"]
        assert all(field.get("description") for field in fields.values())
