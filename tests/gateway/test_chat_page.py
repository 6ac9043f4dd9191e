"""The chat page, seen and handled in a browser, in front of a scripted Triton: what it sends, shows, stops."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By

from ..client.fake_triton import Call, FakeTriton, parameters_of, response, running_fake, strings_of
from .browser import NARROW, WIDE, ChatPage, changed, ink, running_browser
from .running_gateway import Gateway, running_gateway

PICTURE = Path(__file__).parents[2] / "docs" / "chat.png"


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def triton(browser: webdriver.Chrome) -> Iterator[FakeTriton]:
    with running_fake() as fake:
        yield fake


@pytest.fixture(scope="module")
def gateway(triton: FakeTriton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("chat"), triton.url, "http://127.0.0.1:1") as running:
        yield running


@pytest.fixture
def page(browser: webdriver.Chrome, gateway: Gateway, triton: FakeTriton) -> ChatPage:
    triton.calls.clear()
    browser.set_window_size(*WIDE)
    return ChatPage(browser, gateway.url)


class Pieces:
    """A script that says one piece more each time it is told to; the last ends the answer."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces
        self.more = threading.Semaphore(0)

    def __call__(self, request: Any, call: Call) -> Iterator[Any]:
        for number, piece in enumerate(self.pieces):
            assert self.more.acquire(timeout=30)
            last = number == len(self.pieces) - 1
            counts: dict[str, Any] = {"num_input_tokens": [5], "num_output_tokens": [10]}
            yield response(final=last, text_output=piece, finish_reason="eos_token" if last else "None", **counts)


def messages_of(call: Call) -> Any:
    (text,) = strings_of(call.request, "messages") or []
    return json.loads(text)


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_everything_is_there_to_see(page: ChatPage, size: tuple[int, int]) -> None:
    page.browser.set_window_size(*size)
    boxes = {name: page[name].rect for name in ("message", "send", "stop", "max_tokens", "schema", "key")}
    for name, box in boxes.items():
        assert box["width"] > 30, name
        assert box["height"] > 20, name
        assert box["x"] >= 0, name
    is_beside = boxes["schema"]["x"] > boxes["message"]["x"] + boxes["message"]["width"]
    assert is_beside == (size == WIDE)
    assert page.browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert ink(page.picture()) > 0.02
    assert page["model"].text == "org/tiny"
    assert page.is_idle()
    assert page.complaints() == []


def test_an_answer_grows_while_it_comes(page: ChatPage, triton: FakeTriton) -> None:
    script = Pieces("One line,\n", "another line,\n", "and the last.")
    triton.script = script
    empty = page.picture()
    page.send("Tell me")
    page.wait(lambda: page.bubbles("user") == ["Tell me"])
    assert not page["send"].is_enabled()
    assert page["stop"].is_enabled()
    assert page["message"].get_attribute("value") == ""
    script.more.release()
    page.wait(lambda: page.bubbles("assistant") == ["One line,"])
    first = page.picture()
    bubble = page.browser.find_element(By.CSS_SELECTOR, "#talk p.assistant")
    height = bubble.rect["height"]
    assert ink(page.picture("talk")) > 0.02
    script.more.release()
    page.wait(lambda: page.bubbles("assistant") == ["One line,\nanother line,"])
    assert bubble.rect["height"] > height
    second = page.picture()
    for before, after in ((empty, first), (first, second)):
        box = changed(before, after)
        assert box is not None
        assert box[3] - box[1] > 10  # a line of text, not a blinking cursor
    assert not page.is_idle()
    script.more.release()
    page.wait(page.is_idle)
    assert page.bubbles("assistant") == ["One line,\nanother line,\nand the last."]
    # The server's count, 10 tokens in each of three responses, not the number of pieces.
    count, rate = page["rate"].text.split(", ")
    assert count == "30 tokens"
    assert float(rate.removesuffix(" tokens/s")) > 0
    assert page.complaints() == []


def test_the_conversation_goes_on_until_it_is_cleared(page: ChatPage, triton: FakeTriton) -> None:
    for number in range(2):
        triton.script = script = Pieces(f"answer {number}")
        script.more.release()
        page.send(f"question {number}")
        page.wait(lambda said=number + 1: len(page.bubbles("assistant")) == said and page.is_idle())  # type: ignore[misc]
    said = [(message["role"], message["content"]) for message in messages_of(triton.calls[1])]
    assert said == [("user", "question 0"), ("assistant", "answer 0"), ("user", "question 1")]
    page["clear"].click()
    assert page.bubbles("user") == page.bubbles("assistant") == []
    triton.script = script = Pieces("new")
    script.more.release()
    page.send("alone")
    page.wait(lambda: page.bubbles("assistant") == ["new"])
    assert [message["content"] for message in messages_of(triton.calls[2])] == ["alone"]


def test_what_is_stopped_stays_and_is_cancelled(page: ChatPage, triton: FakeTriton) -> None:
    triton.script = script = Pieces("begun", "never said")
    script.more.release()
    page.send("Go")
    page.wait(lambda: page.bubbles("assistant") == ["begun"])
    page["stop"].click()
    page.wait(page.is_idle)
    assert triton.calls[0].left.wait(5)
    script.more.release()
    assert page.bubbles("assistant") == ["begun"]
    assert page["rate"].text.endswith("(stopped)")


def test_stopped_before_the_first_token_the_question_comes_back(page: ChatPage, triton: FakeTriton) -> None:
    triton.script = script = Pieces("never said")
    page.send("Go")
    page.wait(lambda: len(triton.calls) == 1)
    page["stop"].click()
    page.wait(page.is_idle)
    assert triton.calls[0].left.wait(5)
    script.more.release()
    assert page.bubbles("user") == page.bubbles("assistant") == []
    assert page["message"].get_attribute("value") == "Go"


def test_parameters_and_schema_are_sent(page: ChatPage, triton: FakeTriton) -> None:
    triton.script = script = Pieces('{"a": 1}')
    script.more.release()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    page.fill(max_tokens=7, temperature=0.5, top_p=0.25, seed=3, system="Be brief.", schema=json.dumps(schema))
    page.send("Go")
    page.wait(lambda: page.bubbles("assistant") == ['{"a": 1}'])
    (call,) = triton.calls
    sent = parameters_of(call.request)
    assert {name: sent[name] for name in ("max_tokens", "temperature", "top_p", "seed")} == {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.25,
        "seed": 3,
    }
    assert sent["response_format"]["json_schema"]["schema"] == schema
    assert messages_of(call)[0] == {"role": "system", "content": "Be brief."}


def test_reasoning_looks_different_and_is_not_sent_back(page: ChatPage, triton: FakeTriton) -> None:
    triton.script = script = Pieces("<think>hm", "</think>", "yes")
    for _ in range(3):
        script.more.release()
    page.send("Go")
    page.wait(lambda: page.bubbles("assistant") == ["hmyes"] and page.is_idle())
    kinds = [span.get_attribute("class") for span in page.browser.find_elements(By.CSS_SELECTOR, "#talk span")]
    assert kinds == ["reasoning", "content"]
    triton.script = script = Pieces("so")
    script.more.release()
    page.send("Sure?")
    page.wait(lambda: len(page.bubbles("assistant")) == 2)
    assert messages_of(triton.calls[1])[1] == {"role": "assistant", "content": "yes"}


def test_refusals_are_shown(page: ChatPage, triton: FakeTriton) -> None:
    def refuse(request: Any, call: Call) -> Iterator[Any]:
        yield response(final=True, error="Input validation error: `max_new_tokens` is too large")

    triton.script = refuse
    page.send("Go")
    page.wait(lambda: page.bubbles("error") == ["Input validation error: `max_new_tokens` is too large"])
    page.wait(page.is_idle)
    page.fill(schema="{")
    page["send"].click()  # the question came back
    page.wait(lambda: len(page.bubbles("error")) == 2)
    assert page.bubbles("error")[1].startswith("The JSON Schema is no JSON")
    assert len(triton.calls) == 1
    assert page.complaints() == []


def test_text_is_shown_and_never_run(page: ChatPage, triton: FakeTriton) -> None:
    text = "<img src=x onerror=document.title='run'><b>bold</b>"
    triton.script = script = Pieces(text)
    script.more.release()
    page.send("Go")
    page.wait(lambda: page.bubbles("assistant") == [text])
    assert page.browser.title == "triton-textgen"


def test_the_picture_in_the_documentation_shows_the_page() -> None:
    with Image.open(PICTURE) as picture:
        assert picture.size[0] >= 800
        assert ink(picture.convert("RGB")) > 0.05
    assert PICTURE.stat().st_size < 100_000
    assert f"({PICTURE.name})" in (PICTURE.parent / "gateway.md").read_text()
