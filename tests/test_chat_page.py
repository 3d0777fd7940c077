"""The page at /, in a headless Chromium that is told what to do over its DevTools pipe."""
from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import LocalServer, http

PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


class Page:
    """One tab of a browser: commands go in, results and events come out, as JSON texts between NULs."""

    def __init__(self, commands: int, results: int) -> None:
        self.commands, self.results = os.fdopen(commands, "wb", 0), os.fdopen(results, "rb", 0)
        self.buffer, self.count, self.session, self.events = b"", 0, None, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: object) -> dict[str, Any]:
        """Send a command and return its result."""
        self.count += 1
        session = {"sessionId": self.session} if self.session else {}
        self.commands.write(json.dumps({"id": self.count, "method": method, "params": params, **session}).encode() + b"\0")
        while (message := self.receive()).get("id") != self.count:
            pass
        assert "error" not in message, message
        return message["result"]

    def receive(self) -> dict[str, Any]:
        """Return the next message; an event is kept too."""
        while b"\0" not in self.buffer:
            assert (part := self.results.read(1 << 16)), "the browser is gone"
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def value(self, expression: str) -> Any:
        """Return what an expression is in the page, awaited."""
        done = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, expression: str, seconds: float = 20) -> Any:
        """Return what an expression is as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < deadline, (expression, self.value("document.body.innerText"))
            time.sleep(0.02)
        return found

    def say(self, text: str) -> None:
        self.value("document.getElementById('text').focus()")
        self.send("Input.insertText", text=text)
        self.send("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")

    def requests(self) -> list[dict[str, Any]]:
        """Return the chat requests that were sent: their bodies, and their headers as `headers`."""
        sent = [event["params"]["request"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [{**json.loads(request["postData"]), "headers": request["headers"]} for request in sent if "postData" in request]

    def answer_with(self, *deltas: dict[str, str]) -> None:
        """Answer the chat request that comes next in the server's place."""
        self.send("Fetch.enable", patterns=[{"urlPattern": "*/v1/chat/completions"}])
        self.say("What would a model not write?")
        while not (paused := [event for event in self.events if event["method"] == "Fetch.requestPaused"]):
            self.receive()
        chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        self.send("Fetch.fulfillRequest", requestId=paused[-1]["params"]["requestId"], responseCode=200,
                  responseHeaders=[{"name": "Content-Type", "value": "text/event-stream"}],
                  body=base64.b64encode(body.encode()).decode())
        self.send("Fetch.disable")
        self.until(IDLE)


IDLE = "document.getElementById('send').textContent === 'Send'"
BUSY = "document.getElementById('send').textContent === 'Stop'"
LAST = "document.querySelector('article:last-child')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A tab of whatever Chromium is installed; it is killed at the end, by its PID."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    inward, commands = os.pipe()
    results, outward = os.pipe()
    launch = f'exec "$0" "$@" 3<&{inward} 4>&{outward}'  # the numbers that the browser expects
    process = subprocess.Popen(
        ["bash", "-c", launch, path, "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-dev-shm-usage", "--window-size=1000,800",
         f"--user-data-dir={tmp_path_factory.mktemp('browser')}"],
        pass_fds=(inward, outward), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(inward)
    os.close(outward)
    try:
        yield Page(commands, results)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def page(browser: Page, server: LocalServer) -> Iterator[Page]:
    """The page, loaded anew and ready; nothing in it went wrong when the test is over."""
    browser.events.clear()
    browser.send("Page.navigate", url=server.url)
    browser.until("document.getElementById('model')?.value === 'SmolLM2-135M-Instruct'")
    yield browser
    wrong = [event for event in browser.events if event["method"] == "Runtime.exceptionThrown"
             or event["params"].get("entry", {}).get("source") == "security"]
    browser.value("sessionStorage.clear()")
    assert not wrong, wrong
    server.assert_idle()


def test_an_answer_streams(page: Page) -> None:
    page.say("What is the capital of France?")
    page.until(BUSY)
    page.until(IDLE)
    assert "Paris" in page.value(f"{LAST}.innerText")
    tokens, rate = page.value(f"/(\\d+) tokens · ([\\d.]+) tokens\\/s/.exec({LAST}.innerText).slice(1)")
    assert int(tokens) > 4 and float(rate) > 1
    page.say("And of Italy?")
    page.until(IDLE + f" && {LAST}.innerText.includes('Rome')")
    roles = [message["role"] for message in page.requests()[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_stop_keeps_what_was_written(page: Page) -> None:
    page.say("Count to a thousand, one number a line.")
    page.until(f"/\\d tokens/.test({LAST}?.innerText)")
    page.value("document.getElementById('send').click()")
    page.until(IDLE)
    assert page.value(f"{LAST}.innerText").endswith("stopped")


def test_settings_reach_the_request(page: Page) -> None:
    given = {"system": "You are terse.", "temperature": "0", "top_p": "0.5", "max_tokens": "3", "key": "sesame"}
    for name, value in given.items():
        page.value(f"Object.assign(document.getElementById('{name}'), {{value: '{value}'}}).onchange()")
    page.say("Tell me a long story.")
    page.until(IDLE + f" && {LAST}.innerText.includes('cut off')")
    [request] = page.requests()
    assert request["headers"]["Authorization"] == "Bearer sesame"
    assert {name: request.get(name) for name in ("model", "temperature", "top_p", "max_tokens", "stream")} == {
        "model": "SmolLM2-135M-Instruct", "temperature": 0, "top_p": 0.5, "max_tokens": 3, "stream": True}
    assert request["messages"] == [{"role": "system", "content": "You are terse."},
                                   {"role": "user", "content": "Tell me a long story."}]
    page.send("Page.reload")
    page.until("document.getElementById('model')?.value && document.getElementById('key').value === 'sesame'")


def test_what_a_model_writes_stays_text(page: Page) -> None:
    hostile = ("<img src=x onerror=alert(1)><script>alert(2)</script> **<b onclick=alert(3)>bold</b>** `<i>` "
               "[a](javascript:alert(4))")
    page.answer_with({"reasoning_content": "<u>why</u>"}, {"content": f"# <s>\n{hostile}\n```html\n<iframe src=/>\n```\n*end*"})
    assert page.value(f"[...{LAST}.querySelectorAll('*')].map(node => node.localName).join(' ')") == (
        "details summary p div p b b code pre p i small")
    shown = page.value(f"{LAST}.textContent")
    assert all(part in shown for part in ("<img src=x onerror=alert(1)><script>alert(2)</script>", "<u>why</u>", "<s>",
                                          "<b onclick=alert(3)>bold</b>", "[a](javascript:alert(4))", "<iframe src=/>"))
    assert page.value(f"{LAST}.querySelector('details').open") is False  # the reasoning is folded


def test_its_policy_lets_nothing_else_in(page: Page) -> None:
    """Text as markup, a script, a style, a picture from elsewhere, a frame: what a hole would let in has no effect."""
    assert "TrustedHTML" in page.value("try { document.body.innerHTML = '<b>' } catch (error) { error.message }")
    blocked = page.value("""new Promise(done => {
        const seen = new Set();
        document.onsecuritypolicyviolation = event => {
            if (seen.add(event.effectiveDirective).size === 5) done([...seen].sort().join(' '));
        };
        Object.assign(document.body.appendChild(document.createElement('img')), {src: '/picture.png'});
        document.body.appendChild(document.createElement('p')).setAttribute('style', 'color: red');
        Object.assign(document.body.appendChild(document.createElement('iframe')), {src: '/health'});
        document.body.appendChild(document.createElement('style')).textContent = 'b { color: red }';
        fetch('http://127.0.0.2:1/').catch(() => 0);
    })""")
    assert blocked == "connect-src frame-src img-src style-src-attr style-src-elem"
    page.events.clear()  # they are in the browser's log


def test_a_dropped_image_is_sent_as_data(page: Page, tmp_path: Path) -> None:
    (tmp_path / "pixel.png").write_bytes(PIXEL)
    data = {"items": [], "files": [str(tmp_path / "pixel.png")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        page.send("Input.dispatchDragEvent", type=kind, x=400, y=300, data=data)
    page.until("document.images.length === 1")
    page.say("What is this?")
    page.until(IDLE)
    url = "data:image/png;base64," + base64.b64encode(PIXEL).decode()
    assert page.requests()[-1]["messages"][-1]["content"] == [
        {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]


def test_what_got_no_answer_goes_back_to_be_sent_again(page: Page) -> None:
    page.value("document.getElementById('max_tokens').value = '0'")
    page.say("Hello?")
    page.until(f"{LAST}.innerText.includes('max_tokens')")
    page.until(IDLE)
    assert page.value("document.getElementById('text').value") == "Hello?"
    page.value("document.getElementById('max_tokens').value = '5'")
    page.say("")
    page.until("/5 tokens/.test(document.getElementById('log').innerText)")
    assert [message["content"] for message in page.requests()[-1]["messages"]] == ["Hello?"]
    page.until(IDLE)


def test_headers(server: LocalServer) -> None:
    response = http.get(server.url)
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "'unsafe" not in response.headers["content-security-policy"]
    assert "//" not in response.text.replace("http://", "").split("<script>")[0]  # nothing is fetched from anywhere
