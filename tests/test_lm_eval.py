"""lm-eval through our server gives the numbers that it gives with transformers in its own process, and needs no tokenizer."""
import logging
from collections.abc import Iterator
from pathlib import Path

import lm_eval
import pytest
import torch
from conftest import LocalServer, ServerProcess, start_server
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

TASKS = TaskManager(include_path=Path(__file__).parent / "lm_eval_tasks", include_defaults=False)
WINDOW = 62  # of rolling perplexity: the longest text takes two
logging.getLogger("lm_eval").setLevel(logging.ERROR)

Answers = list[list]  # to each document: to each of its requests, (log-likelihood, is greedy), log-likelihood or text


def evaluate(model: HFLM | str, task: str, **options: object) -> tuple[Answers, dict[str, float]]:
    """Return what the model answered to each document of a task, and the task's metrics."""
    found = lm_eval.simple_evaluate(model, tasks=[task], task_manager=TASKS, bootstrap_iters=0, **options)
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    metrics = {name: value for name, value in found["results"][task].items() if isinstance(value, float)}
    return [[answer for (answer,) in sample["resps"]] for sample in samples], metrics


def through(server: LocalServer | ServerProcess, task: str, batch_size: int = 1, **arguments: object,
            ) -> tuple[Answers, dict[str, float]]:
    """Evaluate as the documented command does."""
    arguments = {"base_url": server.url + "/v1/completions", "model": "SmolLM2-135M-Instruct", **arguments}
    return evaluate("local-completions", task, model_args=arguments, batch_size=batch_size)


@pytest.fixture(scope="module")
def exact_server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with start_server(tmp_path_factory.mktemp("exact"), "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="module")
def exact_model(checkpoint: Path) -> HFLM:
    return HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=8, max_length=512)


@pytest.fixture(scope="module")
def choices(exact_model: HFLM) -> tuple[Answers, dict[str, float]]:
    return evaluate(exact_model, "facts_choice")


@pytest.fixture(scope="module")
def perplexity(exact_model: HFLM) -> tuple[Answers, dict[str, float]]:
    exact_model._max_length = WINDOW
    try:
        return evaluate(exact_model, "prose_perplexity")
    finally:
        exact_model._max_length = 512


@pytest.fixture(scope="module")
def generations(exact_model: HFLM) -> tuple[Answers, dict[str, float]]:
    return evaluate(exact_model, "facts_answer")


@pytest.mark.parametrize("arguments", [{"num_concurrent": 8}, {"batch_size": 7}, {}, {"batch_size": 3, "num_concurrent": 4},
                                       {"tokenized_requests": False}], ids=str)
def test_multiple_choice(exact_server: ServerProcess, choices: tuple, arguments: dict) -> None:
    """Concurrent or one by one, as tokens or as text; from the second time on most of it comes from the prefix cache."""
    (expected, metrics), (found, found_metrics) = choices, through(exact_server, "facts_choice", **arguments)
    assert {greedy for answers in expected for _, greedy in answers} == {True, False}
    for answers, wanted in zip(found, expected, strict=True):
        assert [greedy for _, greedy in answers] == [greedy for _, greedy in wanted]
        assert [value for value, _ in answers] == pytest.approx([value for value, _ in wanted], abs=1e-3)
    assert found_metrics == metrics


@pytest.mark.parametrize("concurrent", [1, 4])
def test_rolling_perplexity(exact_server: ServerProcess, perplexity: tuple, concurrent: int) -> None:
    (expected, metrics), (found, found_metrics) = perplexity, through(
        exact_server, "prose_perplexity", num_concurrent=concurrent, max_length=WINDOW + 2)  # it keeps two tokens back
    assert sum(found, []) == pytest.approx(sum(expected, []), abs=1e-3)
    assert found_metrics == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("arguments", [{"num_concurrent": 8}, {"batch_size": 4}, {"tokenizer_backend": "none"}], ids=str)
def test_generation(exact_server: ServerProcess, generations: tuple, arguments: dict) -> None:
    """Token ids or texts, with stop strings and the end of sequence among them."""
    (expected, metrics), (found, found_metrics) = generations, through(exact_server, "facts_answer", **arguments)
    assert len({text for texts in expected for text in texts}) == len(expected) == 10
    assert (found, found_metrics) == (expected, metrics)


def test_chat(exact_server: ServerProcess, exact_model: HFLM) -> None:
    expected = evaluate(exact_model, "facts_answer", apply_chat_template=True, limit=5)
    arguments = {"base_url": exact_server.url + "/v1/chat/completions", "model": "SmolLM2-135M-Instruct", "num_concurrent": 4}
    assert evaluate("local-chat-completions", "facts_answer", model_args=arguments, apply_chat_template=True,
                    limit=5) == expected


@pytest.fixture(scope="module")
def rounded_model(checkpoint: Path) -> HFLM:
    return HFLM(pretrained=str(checkpoint), dtype="bfloat16", softmax_dtype="float32", device="cpu", batch_size=8,
                max_length=WINDOW)


@pytest.mark.parametrize("task", ["facts_choice", "prose_perplexity"])
def test_bfloat16(task: str, server: LocalServer, rounded_model: HFLM, request: pytest.FixtureRequest) -> None:
    """Both round, and neither as the other does: both are as far from float32, and the metrics are as near."""
    exact, metrics = request.getfixturevalue({"facts_choice": "choices", "prose_perplexity": "perplexity"}[task])
    found, found_metrics = through(server, task, num_concurrent=8, max_length=WINDOW + 2)
    rounded, _ = evaluate(rounded_model, task)
    values = [torch.tensor([answer[0] if isinstance(answer, tuple) else answer for answers in each for answer in answers])
              for each in (exact, found, rounded)]
    ours, theirs = (values[1] - values[0]).abs(), (values[2] - values[0]).abs()
    assert ours.max() < max(0.5, 2 * theirs.max()) and ours.mean() < 2 * theirs.mean()
    assert found_metrics == pytest.approx(metrics, abs=0.1 if task == "facts_choice" else 0, rel=0.01)
    server.assert_idle()
