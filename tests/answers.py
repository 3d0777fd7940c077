"""Answers as families of models write them, and what they say: the same however they are cut.

The first block of a family's chat template that matters here stands for the template. `opening` is what the template writes of
the answer. Written down from model cards and chat templates, but for those that say "recorded".
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PARIS = ("get_weather", {"city": "Paris"})
ROME = ("get_weather", {"city": "Rome", "days": 3})


@dataclass(frozen=True)
class Family:
    """What of a model decides how its answers are read."""

    template: str
    model_type: str = "llama"
    special: tuple[str, ...] = ()  # tokens that are no text
    added: tuple[str, ...] = ()  # tokens that are text, each in one piece
    opening: str = ""


@dataclass(frozen=True)
class Answer:
    family: str
    text: str
    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    opening: str | None = None  # other than its family's


FAMILIES = {
    "qwen2": Family("{{ tools }}<tool_call>", "qwen2", ("<|im_start|>", "<|im_end|>"), ("<tool_call>", "</tool_call>"),
                    "<|im_start|>assistant\n"),
    "qwen3": Family("{{ tools }}<tool_call><think></think>", "qwen3", ("<|im_start|>", "<|im_end|>"),
                    ("<tool_call>", "</tool_call>", "<think>", "</think>"), "<|im_start|>assistant\n"),
    "qwen3 coder": Family("{{ tools }}<tool_call><function=", "qwen3_moe", ("<|im_start|>", "<|im_end|>"),
                          ("<tool_call>", "</tool_call>"), "<|im_start|>assistant\n"),
    "qwen3.5": Family("{{ tools }}<tool_call><function=<think></think>", "qwen3_5", ("<|im_start|>", "<|im_end|>"),
                      ("<tool_call>", "</tool_call>", "<think>", "</think>"), "<|im_start|>assistant\n<think>\n"),
    "deepseek r1": Family("<think></think>", "qwen2", ("<\uff5cAssistant\uff5c>",), ("<think>", "</think>"),
                          "<\uff5cAssistant\uff5c><think>\n"),
    "hermes": Family("{{ tools }}<tool_call>", "llama", ("<|im_start|>", "<|im_end|>"), (), "<|im_start|>assistant\n"),
    "llama 3": Family("{{ tools }}<|python_tag|>", "llama",
                      ("<|python_tag|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>"), (),
                      "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "mistral": Family("{{ tools }}[TOOL_CALLS]", "mistral", ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]")),
    "gemma 3": Family("<start_of_turn>", "gemma3", ("<start_of_turn>", "<end_of_turn>"), (), "<start_of_turn>model\n"),
    "function gemma": Family("{{ tools }}<start_function_call>", "gemma3_text", (
        "<start_function_call>", "<end_function_call>", "<escape>", "<start_of_turn>"), (), "<start_of_turn>model\n"),
    "gemma 4": Family("{{ tools }}<|tool_call><channel|>", "gemma4", (
        "<|tool_call>", "<tool_call|>", "<|channel>", "<channel|>", '<|"|>', "<|turn>", "<turn|>"), (), "<|turn>model\n"),
    "gpt-oss": Family("{{ tools }}<|channel|>", "gpt_oss", (
        "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>"), (), "<|start|>assistant"),
    "no template for tools": Family("{{ messages }}"),
}
CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
ANSWERS = [
    Answer("qwen2", f"<tool_call>\n{CALL}\n</tool_call>", calls=[PARIS]),
    Answer("qwen2", f"I look it up.\n\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n"
           '{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>', "I look it up.",
           calls=[PARIS, ROME]),
    Answer("qwen2", "The weather is fine {really}.", "The weather is fine {really}."),
    Answer("qwen2", f"```json\n{CALL}\n```", calls=[PARIS]),
    Answer("qwen2", f"Sure:\n\n```json\n[{CALL}, {CALL}]\n```\n", "Sure:", calls=[PARIS, PARIS]),
    *[Answer("qwen2", text, calls=[call]) for text, call in [  # recorded: Qwen2.5-Coder-1.5B-Instruct, greedy
        ('```json\n{\n  "name": "get_weather",\n  "arguments": {\n    "city": "Paris",\n    "days": 1\n  }\n}\n```',
         ("get_weather", {"city": "Paris", "days": 1})),
        ('```json\n{\n  "name": "get_weather",\n  "arguments": {\n    "city": ["Paris", "Rome"],\n    "days": 3\n  }\n}\n```',
         ("get_weather", {"city": ["Paris", "Rome"], "days": 3}))]],
    Answer("qwen3", "<think>\nThe user asks for Paris.\n\nI call.\n</think>\n\n<tool_call>\n" + CALL + "\n</tool_call>",
           reasoning="The user asks for Paris.\n\nI call.", calls=[PARIS]),
    Answer("qwen3", "<think>\nEasy: 2 < 3.\n</think>\n\nTwo is\n less.", "Two is\n less.", "Easy: 2 < 3."),
    Answer("qwen3", "Hello.", "Hello.", opening="<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    Answer("qwen3", "<think>\nI never stop thinking about </thin", reasoning="I never stop thinking about </thin"),
    Answer("qwen3 coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n"
           "</parameter>\n</function>\n</tool_call>", calls=[ROME]),
    Answer("qwen3.5", "I should call.\n</think>\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
           "</function>\n</tool_call>", reasoning="I should call.", calls=[PARIS]),
    Answer("deepseek r1", "Okay, Paris.\n</think>\n\nIt is **Paris**.", "It is **Paris**.", "Okay, Paris."),
    Answer("hermes", '<tool_call>\n{"arguments": {"city": "Paris"}, "name": "get_weather"}\n</tool_call>', calls=[PARIS]),
    Answer("llama 3", '{"name": "get_weather", "parameters": {"city": "Paris"}}', calls=[PARIS]),
    Answer("llama 3", '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}',
           calls=[PARIS]),
    Answer("llama 3", '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"type": "function", "function": {"name": '
           '"get_weather", "parameters": {"city": "Rome", "days": 3}}}', calls=[PARIS, ROME]),
    Answer("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, '
           '{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}, "id": "a1b2c3d4e"}]', calls=[PARIS, ROME]),
    Answer("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": '
           '"Rome", "days": 3}', calls=[PARIS, ROME]),
    Answer("mistral", "[THINK]Hmm, Paris.[/THINK]It is Paris.", "It is Paris.", "Hmm, Paris."),
    Answer("gemma 3", f"```json\n{CALL}\n```", calls=[PARIS]),
    Answer("gemma 3", f"```tool_code\n{CALL}\n```", calls=[PARIS]),
    Answer("function gemma", "<start_function_call>call:get_weather{city:<escape>Rome<escape>,days:3}<end_function_call>",
           calls=[ROME]),
    Answer("gemma 4", '<|channel>thought\nI call, twice.<channel|><|tool_call>call:get_weather{city:<|"|>Paris<|"|>}'
           '<tool_call|><|tool_call>call:get_weather{city:<|"|>Rome<|"|>,days:3}<tool_call|>', reasoning="I call, twice.",
           calls=[PARIS, ROME]),
    Answer("gpt-oss", "<|channel|>analysis<|message|>Simple.<|end|><|start|>assistant<|channel|>final<|message|>It is Paris.",
           "It is Paris.", "Simple."),
    Answer("gpt-oss", "<|channel|>analysis<|message|>Need it.<|end|><|start|>assistant<|channel|>commentary "
           'to=functions.get_weather <|constrain|>json<|message|>{"city":"Paris"}', reasoning="Need it.", calls=[PARIS]),
    Answer("gpt-oss", "<|channel|>analysis<|message|>Need it.<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
           '<|end|><|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}',
           "I look.", "Need it.", [PARIS]),
    Answer("no template for tools", f"<tool_call>{CALL}</tool_call>", calls=[PARIS]),
    Answer("no template for tools", f"Yes: ```\n{CALL}\n``` and done", "Yes:and done", calls=[PARIS]),
    # What only looks like a call is text, to the letter.
    *[Answer("qwen2", text, text) for text in [
        f"<tool_call>\n{CALL}\n"[:-8], f"<tool_call>\n{CALL[:-9]}", "<tool_call>", "a <tool_ca",
        "<tool_call>\n{}\n</tool_call>", "<tool_call>\nget_weather(Paris)\n</tool_call>",
        '<tool_call>\n{"name": "get_weather", "arguments": {"a": NaN}}\n</tool_call>', f"<tool_call>\n{CALL}?\n</tool_call>",
        '<tool_call>\n{"name": "get_weather", "arguments": {"a": "\\ud800"}}\n</tool_call>',
        '<tool_call>\n{"name": "get_weather", "arguments": {"a": ' + "[" * 990 + "]" * 990 + "}}\n</tool_call>",
        '<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call>\nwell',
        '<tool_call>\n{"name": "get_weather", "arguments": [1]}\n</tool_call>', "<tool_call>" + "[" * 5000,
        '```json\n{"name": "Ada", "age": 36}\n```\nThat is all.', "```python\nprint({})\n```", '```json\n{"a": 1',
        '{"name": "Ada", "born": 1815} was first.', '[TOOL_CALLS]get_weather[ARGS]{"city": ']],
    Answer("qwen3", f"<tool_call>\nnonsense\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>",
           "<tool_call>\nnonsense\n</tool_call>\n", calls=[PARIS]),
    Answer("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Pa', '[TOOL_CALLS]get_weather[ARGS]{"city": "Pa'),
    Answer("gemma 4", '<|tool_call>call:get_weather{city:<|"|>Par', '<|tool_call>call:get_weather{city:<|"|>Par'),
    Answer("function gemma", "<start_function_call>call:get_weather{city:oops}<end_function_call>",
           "<start_function_call>call:get_weather{city:oops}<end_function_call>"),
    Answer("gpt-oss", '<|channel|>commentary to=functions.get_weather<|message|>{"city": ',
           '<|channel|>commentary to=functions.get_weather<|message|>{"city": '),
]
