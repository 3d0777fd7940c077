"""What is served is listed, found again by its id, loaded on demand from the hub's cache, and dropped by /reset."""
import json
import re
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import jsonschema
import openai
import pytest
import serve
from conftest import LocalServer, ServerProcess, ask, http, start_server
from openai.types import Model
from prometheus_client.parser import text_string_to_metric_families

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def named(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of one model under an id with a slash; its hub cache holds another, and web pages may call it."""
    folder = tmp_path_factory.mktemp("hub")
    repo = folder / "hub" / "models--other--tiny"
    shutil.copytree(tiny, repo / "snapshots" / REVISION)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(REVISION)
    with start_server(folder, str(tiny), "--served_model_name=org/tiny", "--enable-cors",
                      env={"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}) as server:
        yield server


def listed(server: ServerProcess) -> list[str]:
    return [model["id"] for model in http.get(server.url + "/v1/models").json()["data"]]


def load(server: ServerProcess | LocalServer, name: str) -> list[dict]:
    """Return the events of /load_model; all but the last say that it is loading."""
    response = http.post(server.url + "/load_model", json={"model": name})
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line and line != "data: [DONE]"]
    *loading, last = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert all(event["status"] == "loading" and event["stage"] for event in loading)
    return [*loading, last]


def test_the_list_and_each_entry_are_what_the_sdk_expects(named: ServerProcess) -> None:
    body = http.get(named.url + "/v1/models").json()
    assert body["object"] == "list" and [entry["id"] for entry in body["data"]][0] == "org/tiny"
    for entry in body["data"]:
        assert Model.model_validate(entry, strict=True).id == entry["id"] and entry["max_model_len"] == 256
    for path in ("org/tiny", "org%2Ftiny"):
        assert http.get(f"{named.url}/v1/models/{path}").json() == body["data"][0]
    with openai.OpenAI(base_url=named.url + "/v1", api_key="none") as client:
        assert client.models.retrieve("org/tiny").id == "org/tiny"
        assert [model.id for model in client.models.list()] == [entry["id"] for entry in body["data"]]


@pytest.mark.parametrize("id", ["nobody/nothing", "nobody%2Fnothing", "tiny", "..%2f..", "org/tiny/more", "%ff"])
def test_unknown_ids(named: ServerProcess, id: str) -> None:
    response = http.get(f"{named.url}/v1/models/{id}")
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("fields", [{}, {"model": None}, {"model": ""}, {"model": "org/tiny"}], ids=str)
def test_answers_say_the_served_name(named: ServerProcess, fields: dict) -> None:
    assert ask(named, max_tokens=2, **fields).json()["model"] == "org/tiny"


def test_health(named: ServerProcess) -> None:
    assert http.get(named.url + "/health").json() == {"status": "ok"}
    assert http.head(named.url + "/health").status_code == 200


def test_web_pages_may_call_where_that_is_allowed(named: ServerProcess) -> None:
    headers = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST",
               "Access-Control-Request-Headers": "authorization,content-type"}
    for method, path in (("OPTIONS", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/nothing")):
        answer = http.request(method, named.url + path, headers=headers).headers
        assert answer["access-control-allow-origin"] in ("https://page.example", "*")
        assert "POST" in answer["access-control-allow-methods"]
        assert "content-type" in answer["access-control-allow-headers"]


def test_load_on_demand_and_reset(named: ServerProcess) -> None:
    http.post(named.url + "/reset")
    first, again = load(named, "other/tiny"), load(named, "other/tiny")
    assert first[0]["status"] == "loading" and (first[-1]["status"], first[-1]["cached"]) == ("ready", False)
    assert [(event["status"], event["cached"]) for event in again] == [("ready", True)]
    assert listed(named) == ["org/tiny", "other/tiny"]
    assert ask(named, model="other/tiny", max_tokens=2).json()["model"] == "other/tiny"
    assert ask(named, model="other/tiny@main", max_tokens=2).json()["model"] == "other/tiny"
    assert http.post(named.url + "/reset").json() == {"status": "ok"}
    assert listed(named) == ["org/tiny"]
    assert ask(named, max_tokens=2).status_code == 200


def test_who_asks_at_once_shares_one_load(named: ServerProcess) -> None:
    name = f"other/tiny@{REVISION}"
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda i: ask(named, model=name, max_tokens=2 + i), range(6)))
    assert [answer.status_code for answer in answers] == [200] * 6
    assert {answer.json()["model"] for answer in answers} == {name}
    assert named.log.read_text().count(f"loading {name}") == 1


@pytest.mark.parametrize("name", ["nobody/nothing", "/etc", ".", "other/tiny@nothing", "other/tiny:nothing.gguf", "a b",
                                  "other/tiny:../../refs/main"])
def test_what_does_not_exist_is_an_error_event_and_404(named: ServerProcess, tiny: Path, name: str) -> None:
    last = load(named, name)[-1]
    assert last["status"] == "error" and name in last["message"]
    response = ask(named, model=name)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert name not in listed(named) and "Traceback" not in named.log.read_text()


def test_a_local_path_is_not_loaded_for_a_client(named: ServerProcess, tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    assert ask(named, model=str(copy)).status_code == 404
    assert ask(named, model=str(tiny), max_tokens=1).status_code == 200  # the command line names this one


def test_a_hub_that_does_not_answer_is_404_in_time_and_holds_up_nobody(server: LocalServer,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=256) as silent, ThreadPoolExecutor(60) as pool:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        started = time.monotonic()
        lost = [pool.submit(ask, server, model=f"nobody/number-{i}") for i in range(50)]
        time.sleep(0.5)
        assert ask(server, max_tokens=1).status_code == 200
        assert time.monotonic() - started < 4
        assert {job.result().status_code for job in lost} == {404}
        assert time.monotonic() - started < 8
    server.assert_idle()


def metrics(server: LocalServer) -> dict[str, float]:
    """Return the samples of /metrics by what stands before their values, as Prometheus's own client reads them."""
    response = http.get(server.url + "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(response.text):
        assert family.name.startswith("vllm:") and family.samples and family.type in ("gauge", "counter", "histogram"), family
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            found[sample.name.removeprefix("vllm:") + "".join(f" {value}" for value in labels.values())] = sample.value
            assert sample.labels["model_name"] == "SmolLM2-135M-Instruct"
    return found


def test_metrics_count_what_was_done(server: LocalServer) -> None:
    ask(server, max_tokens=1)  # and it has been asked for before
    before = metrics(server)
    for stream in (False, True):
        ask(server, max_tokens=4, n=2, stream=stream)
    assert ask(server, temperature=9).status_code == 400
    after = metrics(server)
    done = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    tokens = done["prompt_tokens_total"]
    assert tokens == done["prefix_cache_queries_total"] == 4 * 37 and done["prefix_cache_hits_total"] == 4 * 32
    assert done["generation_tokens_total"] == 16 and done["request_success_total length"] == 4
    for name, count in (("time_to_first_token", 4), ("inter_token_latency", 12), ("time_per_output_token", 12),
                        ("e2e_request_latency", 4), ("request_queue_time", 4)):
        assert done[f"{name}_seconds_count"] == done[f"{name}_seconds_bucket +Inf"] == count
        assert 0 < done[f"{name}_seconds_sum"] < 60
    assert after["num_requests_running"] == after["num_requests_waiting"] == after["kv_cache_usage_perc"] == 0
    assert after["num_preemptions_total"] == before["num_preemptions_total"]
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(ask, server, max_tokens=60, n=3, ignore_eos=True)
        seen = [metrics(server)["num_requests_running"] for _ in iter(job.done, True)]
        assert max(seen) == 3 and job.result().status_code == 200


def test_the_description_is_of_every_endpoint(server: LocalServer) -> None:
    found = http.get(server.url + "/openapi.json").json()
    rules = {re.sub(r"<(?:path:)?(\w+)>", r"{\1}", rule.rule) for rule in serve.app.url_map.iter_rules()}
    assert found["paths"].keys() == rules and found["openapi"].startswith("3.1")
    schemas = found["components"]["schemas"]
    bodiless = ("/reset", "/v1/responses/{id}/cancel")
    for path, methods in found["paths"].items():
        for method, about in methods.items():
            assert about["summary"].endswith(".") and (method != "post" or "requestBody" in about or path in bodiless)
    chat = found["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    chat = schemas[chat.removeprefix("#/components/schemas/")]
    assert chat["required"] == ["messages"] and {"temperature", "tools", "n"} <= chat["properties"].keys()
    assert not {"guided_json", "audio"} & chat["properties"].keys()  # known, and refused
    jsonschema.Draft202012Validator.check_schema({**chat, "components": found["components"]})
    validator = jsonschema.Draft202012Validator({**chat, "components": found["components"]})
    assert validator.is_valid({"messages": [], "n": 5}) and not validator.is_valid({"messages": [], "n": 0})


def test_the_description_for_people_loads_nothing(server: LocalServer) -> None:
    response = http.get(server.url + "/docs")
    assert "/v1/chat/completions" in response.text and "temperature" in response.text and "default-src 'none'" in (
        response.headers["content-security-policy"])
    assert not re.search(r"<script|src=|href=|url\(", response.text)
