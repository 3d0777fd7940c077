"""Time one evaluation twice: lm-eval through serve.py, and with transformers in its own process; and compare the numbers.

    python tests/benchmarks/evaluation.py

The task is the tests' multiple choice; before each question comes a long text that all have in common, as an evaluation's
examples are. Both use the built-in model in the same dtype. The server is started, and the model loaded, before the clock.
"""
import argparse
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

import lm_eval
import serve
import torch
from conftest import start_server
from lm_eval.models.api_models import TemplateAPI
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

FOLDER = Path(__file__).resolve().parents[1] / "lm_eval_tasks"
TASKS = TaskManager(include_path=FOLDER, include_defaults=False)
PROSE = "\n\n".join(json.loads(line)["text"] for line in (FOLDER / "prose.jsonl").read_text().splitlines())


def evaluate(model: HFLM | TemplateAPI, prefix: str) -> tuple[float, torch.Tensor]:
    """Return the seconds that the task takes, and all of its log-likelihoods."""
    started = time.perf_counter()
    found = lm_eval.simple_evaluate(model, tasks=["facts_choice"], task_manager=TASKS, bootstrap_iters=0,
                                    system_instruction=prefix)
    seconds = time.perf_counter() - started
    samples = sorted(found["samples"]["facts_choice"], key=lambda sample: sample["doc_id"])
    return seconds, torch.tensor([value for sample in samples for ((value, _),) in sample["resps"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeat", type=int, default=4, help="times 205 tokens before each question (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="of lm-eval's own model (default: %(default)s)")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, start_server(Path(folder), "--dtype", options.dtype) as server:
        client = LocalCompletionsAPI(base_url=server.url + "/v1/completions", model=serve.DEFAULT_MODEL, num_concurrent=16)
        ours, served = evaluate(client, PROSE * options.repeat)
    model = HFLM(pretrained=str(serve.default_checkpoint()), dtype=options.dtype, softmax_dtype="float32", device="cpu",
                 batch_size=options.batch_size)
    theirs, local = evaluate(model, PROSE * options.repeat)
    tokens = len(model.tok_encode(PROSE * options.repeat))
    print(f"{len(served)} log-likelihoods after {tokens} tokens, {options.dtype}, {os.cpu_count()} CPUs: "
          f"local-completions {ours:.1f} s, hf {theirs:.1f} s, {theirs / ours:.1f} times as long; "
          f"they differ by {(served - local).abs().max():.1e} at most")


if __name__ == "__main__":
    main()
