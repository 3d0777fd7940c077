"""The image, as far as that goes without a Docker engine: hadolint, and its files and commands run in a folder of their own."""
import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from conftest import ROOT, ServerProcess, ask, start_server

TEXT = (ROOT / "Dockerfile").read_text()
STEPS = [tuple(step.split(maxsplit=1)) for step in re.sub(r"#.*\n|\\\n", "", TEXT).splitlines() if step]


def arguments(instruction: str) -> list[str]:
    """Return what follows each use of an instruction."""
    return [rest for name, rest in STEPS if name == instruction]


def test_hadolint() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_it_promises() -> None:
    """Arguments of `docker run` are serve.py's; nobody is root; a compiler is there; it is about twenty instructions long."""
    assert json.loads(*arguments("ENTRYPOINT")) == ["python", "serve.py", "--host", "0.0.0.0"] and not arguments("CMD")
    names = [name for name, _ in STEPS]
    assert arguments("USER") == ["1000"] and names.index("USER") < names.index("ENTRYPOINT") and len(STEPS) < 20
    assert "-y g++" in TEXT and re.fullmatch(r"python:\d\.\d+-slim-\w+", arguments("FROM")[0])
    assert {"FLASH_ATTN=\"\""} == set(arguments("ARG"))


def ignored(path: str) -> bool:
    """Tell whether .dockerignore keeps a file out: the last line that matches it, or a folder of it, decides."""
    answer = False
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern = line.removeprefix("!").removeprefix("**/")
        if any(fnmatch(part, pattern) for part in (path, *path.split("/"))):
            answer = not line.startswith("!")
    return answer


def test_requirements_are_pinned() -> None:
    """But for Triton: torch's CUDA build pins its own."""
    *lines, triton = (ROOT / "requirements.txt").read_text().splitlines()
    assert triton.startswith("triton>=")
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines), lines


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A folder with what the image has, and nothing else."""
    for source, target in (copy.split() for copy in arguments("COPY")):
        for file in filter(Path.is_file, [ROOT / source, *(ROOT / source).rglob("*")]):
            name = str(file.relative_to(ROOT))
            if not ignored(name):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                shutil.copy(file, tmp_path / name)
        assert (tmp_path / (source if target == "./" else target)).exists(), source
    assert not list(tmp_path.rglob("*.so")) and not (tmp_path / "tests").exists()
    return tmp_path


def test_it_starts_offline_and_is_healthy(image: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the step that bakes the model in, with no network: the package index and the hub are out of reach."""
    python = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SERVE_CACHE": str(checkpoint.parents[1])}
    bake = arguments("RUN")[-1]
    assert "default_checkpoint" in bake
    subprocess.run(bake, shell=True, check=True, cwd=image, env=os.environ | python, timeout=60)
    monkeypatch.setattr("conftest.ROOT", image)
    nowhere = "http://127.0.0.1:9"
    offline = {"PIP_INDEX_URL": nowhere, "HF_ENDPOINT": nowhere, "HF_HUB_OFFLINE": "0", **python}
    with start_server(image, "--host", "0.0.0.0", env=offline) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        local = ServerProcess(server.process, url, server.log)
        assert "Paris" in ask(local, max_tokens=8).json()["choices"][0]["message"]["content"]
        command = json.loads(re.search(r"CMD (\[.*\])", *arguments("HEALTHCHECK"))[1])
        port = url.rpartition(":")[2]
        for where, healthy in ((port, True), ("1", False)):
            check = [sys.executable, *(word.replace("8000", where) for word in command[1:])]
            assert (subprocess.run(check, capture_output=True).returncode == 0) == healthy
