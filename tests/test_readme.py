"""What README.md shows is run as it stands, but for the port; the manifest is checked against what it deploys."""
import os
import re
import subprocess
import sys

import pytest
import serve
import yaml
from conftest import ROOT, LocalServer, http

SNIPPETS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PROGRAMS = [(language, code) for language, code in SNIPPETS if language != "yaml"]


def test_there_are_snippets() -> None:
    assert [language for language, _ in SNIPPETS] == ["bash", "python", "python", "python", "python", "bash", "yaml"]


def test_manifest(server: LocalServer) -> None:
    [manifest] = [list(yaml.safe_load_all(code)) for language, code in SNIPPETS if language == "yaml"]
    serving, routing = [kind["spec"]["template"] for kind in manifest if kind["kind"] == "Deployment"]
    [pod], [router] = serving["spec"]["containers"], routing["spec"]["containers"]
    config = serve.parse_command_line(pod["args"])
    assert pod["readinessProbe"]["httpGet"]["port"] == pod["ports"][0]["containerPort"] == config.port
    assert http.get(server.url + pod["readinessProbe"]["httpGet"]["path"]).status_code == 200
    wait = int(pod["lifecycle"]["preStop"]["exec"]["command"][1])
    assert serving["spec"]["terminationGracePeriodSeconds"] > wait + config.grace_period
    flags = router["command"][-1].split()
    [(label, value)] = serving["metadata"]["labels"].items()
    assert flags[flags.index("--selector") + 1] == f"{label}={value}"
    assert flags[flags.index("--service-discovery-port") + 1] == str(config.port)


@pytest.mark.parametrize("language, code", PROGRAMS)
def test_snippet(server: LocalServer, language: str, code: str) -> None:
    command = {"bash": ["bash", "-c"], "python": [sys.executable, "-c"]}[language]
    code = code.replace("http://localhost:8000", server.url).replace(" tests/", f" {ROOT}/tests/")
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # its client obeys it on loopback too
    env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env["PATH"]])
    done = subprocess.run([*command, code], capture_output=True, text=True, timeout=120, cwd=sys.prefix, env=env)
    assert done.returncode == 0, done.stderr
    assert any(sign in done.stdout for sign in ("capital", "data: [DONE]", "|acc_norm|"))
    server.assert_idle()
