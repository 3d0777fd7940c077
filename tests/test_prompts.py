"""What the model reads is what the client wrote, through the model's own template, or a 400 that says where."""
import copy
import dataclasses
import inspect

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
