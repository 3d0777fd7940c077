"""What README.md shows is run as it stands, but for the port."""
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, LocalServer

SNIPPETS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_there_are_snippets() -> None:
    assert [language for language, _ in SNIPPETS] == ["bash", "python", "python", "python", "python", "bash"]


@pytest.mark.parametrize("language, code", SNIPPETS)
def test_snippet(server: LocalServer, language: str, code: str) -> None:
    command = {"bash": ["bash", "-c"], "python": [sys.executable, "-c"]}[language]
    code = code.replace("http://localhost:8000", server.url).replace(" tests/", f" {ROOT}/tests/")
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # its client obeys it on loopback too
    env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env["PATH"]])
    done = subprocess.run([*command, code], capture_output=True, text=True, timeout=120, cwd=sys.prefix, env=env)
    assert done.returncode == 0, done.stderr
    assert any(sign in done.stdout for sign in ("capital", "data: [DONE]", "|acc_norm|"))
    server.assert_idle()
