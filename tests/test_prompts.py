"""What the model reads is what the client wrote, through the model's own template, or a 400 that says where."""
import copy
import dataclasses
import inspect
import json

import pytest
import serve
from conftest import LocalServer

USER = {"role": "user", "content": "Hi there"}


@pytest.fixture
def model(server: LocalServer) -> serve.Model:
    return server.engine.model


def render(model: serve.Model, messages: list[dict], continue_final: bool = False, **kwargs: object) -> str:
    return model.tokenizer.decode(serve.render_chat(model, messages, continue_final, kwargs).token_ids)


def with_template(model: serve.Model, template: str | None) -> serve.Model:
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.chat_template = template
    return dataclasses.replace(model, tokenizer=tokenizer)


def test_is_what_transformers_renders(model: serve.Model) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Hello!"}, USER]
    expected = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert serve.render_chat(model, messages, False, {}).token_ids == expected


@pytest.mark.parametrize("messages, same", [
    ([{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]}], [USER]),
    ([{"role": "user", "content": [{"type": "input_text", "text": "Hi there"}]}], [USER]),
    ([{"role": "developer", "content": "Be brief."}, USER], [{"role": "system", "content": "Be brief."}, USER]),
    ([USER, {"role": "assistant", "content": None}, USER], [USER, {"role": "assistant", "content": ""}, USER]),
    ([USER, {"role": "assistant"}, USER], [USER, {"role": "assistant", "content": ""}, USER]),
    ([USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, USER],
     [USER, {"role": "assistant", "content": "No."}, USER]),
    ([{**USER, "name": "ada", "vendor": {"key": [1]}}], [USER]),
])
def test_reads_the_same(model: serve.Model, messages: list[dict], same: list[dict]) -> None:
    assert render(model, messages) == render(model, same)


@pytest.mark.parametrize("content", ["", "a\x00b", "Ünïcödé 🦜 日本", "{{ messages }} {% raw %}", "</s>\r\n\t"])
def test_content_is_kept_to_the_letter(model: serve.Model, content: str) -> None:
    assert f"<|im_start|>user\n{content}<|im_end|>" in render(model, [{"role": "user", "content": content}])


def test_continues_the_final_message(model: serve.Model) -> None:
    text = render(model, [USER, {"role": "assistant", "content": "The capital"}], continue_final=True)
    assert text.endswith("<|im_start|>assistant\nThe capital")


@pytest.mark.parametrize("messages, param", [
    ([], "messages"),
    ([{"content": "a"}], "messages[0].role"),
    ([USER, {"role": "robot", "content": "a"}], "messages[1].role"),
    ([{"role": ["user"], "content": "a"}], "messages[0].role"),
    ([USER, {"role": "user", "content": 5}], "messages[1].content"),
    ([{"role": "user", "content": {"type": "text", "text": "a"}}], "messages[0].content"),
    ([{"role": "user", "content": ["a"]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]}], "messages[0].content[1].text"),
    ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
     "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "messages[0].content[0].type"),
    ([USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function"}]}], "messages[1].tool_calls"),
    ([USER, {"role": "assistant", "tool_calls": "x"}], "messages[1].tool_calls"),
    ([USER, {"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}], "messages[1].tool_calls"),
    ([USER, {"role": "tool", "content": 5}], "messages[1].content"),
])
def test_says_which_message_is_bad(model: serve.Model, messages: list[dict], param: str) -> None:
    with pytest.raises(serve.APIError) as caught:
        render(model, messages)
    assert caught.value.status == 400 and caught.value.param == param


@pytest.mark.parametrize("messages", [[USER], [{"role": "assistant", "content": "a"}, USER]])
def test_continues_only_an_assistant(model: serve.Model, messages: list[dict]) -> None:
    with pytest.raises(serve.APIError, match="assistant"):
        render(model, messages, continue_final=True)


def test_every_argument_of_apply_chat_template_is_reserved(model: serve.Model) -> None:
    parameters = inspect.signature(model.tokenizer.apply_chat_template).parameters.values()
    named = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    assert named | {"messages"} <= serve.RESERVED_TEMPLATE_KWARGS
    for name in sorted(serve.RESERVED_TEMPLATE_KWARGS):
        with pytest.raises(serve.APIError) as caught:
            serve.render_chat(model, [USER], False, {name: True})
        assert (caught.value.status, caught.value.param) == (400, "chat_template_kwargs"), name


def test_other_template_arguments_reach_the_template(model: serve.Model) -> None:
    model = with_template(model, "{{ messages[0].content }}|{{ enable_thinking }}")
    assert render(model, [USER], enable_thinking=False) == "Hi there|False"


@pytest.mark.parametrize("template, code", [
    (None, "no_chat_template"),
    ("{{ raise_exception('only one turn') }}", "template_error"),
    ("{{ messages[7].content.upper() }}", "template_error"),
    ("{% endfor %}", "template_error"),
    ("{{ ''.__class__.__mro__ }}", "template_error"),
])
def test_templates_that_refuse(model: serve.Model, template: str | None, code: str) -> None:
    with pytest.raises(serve.APIError) as caught:
        render(with_template(model, template), [USER])
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, "messages")


WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Wie ist das Wetter in Zürich?",
                                            "parameters": {"type": "object", "properties": {"city": {}}}, "vendor": 1}}
CALL = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}}
TURNS = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
         {"role": "tool", "tool_call_id": "call12345", "content": "sunny"},
         {"role": "tool", "tool_call_id": "call12345", "content": [{"type": "text", "text": "22 °C"}]}]
# What Qwen's and Hermes's templates do with tools, calls and results, in small.
RENDERS = """{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}
{%- for call in m.tool_calls %}<{{ call.id }}|{{ call.function.name }}|{{ call.function.arguments | tojson }}|
{{- call.function.arguments.city }}>{% endfor %}{{ m.reasoning_content }}{% endfor %}"""


def render_tools(model: serve.Model, messages: list[dict], tools: list[dict]) -> str:
    return model.tokenizer.decode(serve.render_chat(model, messages, False, {}, tools).token_ids)


def test_a_template_that_renders_tools_gets_them(model: serve.Model) -> None:
    """Tools as the client sent them, vendor keys and all; arguments as the object that templates expect."""
    text = render_tools(with_template(model, RENDERS), TURNS, [WEATHER])
    call = '<call12345|get_weather|{"city": "Zürich"}|Zürich>'
    assert text == model.tokenizer.decode(model.tokenizer.encode(
        f"{json.dumps(WEATHER, ensure_ascii=False)}[user]Hi there[assistant]{call}{call}[tool]sunny[tool]22 °C"))
    assert serve.TOOLS_AS_TEXT[:20] not in text


@pytest.mark.parametrize("arguments, shown", [("", "{}"), ("{}", "{}"), ({"a": 1}, '{"a": 1}'), ('{"a": [1', '"{\\"a\\": [1"')])
def test_arguments_of_past_calls(model: serve.Model, arguments: object, shown: str) -> None:
    """Whatever came of an earlier answer goes back, one that was cut off as well."""
    turn = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    assert f"|f|{shown}|" in render_tools(with_template(model, RENDERS), [USER, turn], [])
    assert f'{{"name": "f", "arguments": {shown}}}' in render_tools(model, [USER, turn], [])


def test_a_template_that_would_drop_tools_gets_them_as_text(model: serve.Model) -> None:
    text = render_tools(model, TURNS, [WEATHER])
    assert text.startswith("<|im_start|>system\nYou may call functions.")
    assert json.dumps(WEATHER["function"], ensure_ascii=False) in text
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
    assert text.endswith(f"<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n{call}\n{call}<|im_end|>\n"
                         "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\n22 °C\n"
                         "</tool_response><|im_end|>\n<|im_start|>assistant\n")
    system = [{"role": "system", "content": "Be brief."}, *TURNS]
    assert "<|im_start|>system\nBe brief.\n\nYou may call functions." in render_tools(model, system, [WEATHER])
    assert "You may call" not in render_tools(model, system, []) and call in render_tools(model, system, [])
    assert TURNS[1]["content"] is None and len(system) == 5  # the client's own messages are left alone


def test_reasoning_goes_back_under_the_templates_name(model: serve.Model) -> None:
    for name in ("reasoning", "reasoning_content"):
        turn = {"role": "assistant", "content": "Yes.", name: "Hmm."}
        assert render_tools(with_template(model, RENDERS), [USER, turn], []).endswith("[assistant]Yes.Hmm.")


def test_what_the_template_writes_of_the_answer(model: serve.Model) -> None:
    start = "<|im_start|>assistant\n"
    thinks = with_template(model, model.tokenizer.chat_template.replace(start, start + "<think>\n"))
    assert serve.render_chat(model, [USER], False, {}).opening == "<|im_start|>assistant\n"
    assert serve.render_chat(thinks, [USER], False, {}).opening == "<|im_start|>assistant\n<think>\n"
    assert serve.render_chat(with_template(model, "{{ messages[0].content }}"), [USER], False, {}).opening == ""
    turns = [{"role": "user", "content": "What does <think> mean?"}, {"role": "assistant", "content": "<think>\nWell"}]
    assert serve.render_chat(model, turns, True, {}).opening == "<think>\nWell"
    assert serve.render_chat(model, turns[:1], False, {}).opening == "<|im_start|>assistant\n"
