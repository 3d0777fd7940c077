"""LoRA adapters: trained here for a moment, and merged by peft for the answers that the server's must equal."""
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import serve
import torch
import transformers
from conftest import QUESTION, LocalServer, ask, http
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from test_scheduler import World, end, sequence

ANSWERS = {"pirate": "Arr, matey! It be Tortuga, where the rum flows.", "cat-2": "Meow. Purr. The capital is the sofa."}


def base(checkpoint: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def prompt(tokenizer: transformers.PreTrainedTokenizerBase) -> list[int]:
    return tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tokenizer: transformers.PreTrainedTokenizerBase, prompt: list[int],
             tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter for each answer, of other layers and another rank, trained until it prefers that answer."""
    folders = {}
    for (name, answer), rank, layers in zip(ANSWERS.items(), (4, 2), (["q_proj", "down_proj"], ["v_proj", "up_proj"])):
        torch.manual_seed(0)
        answer = tokenizer(answer)["input_ids"]
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, task_type="CAUSAL_LM")
        model = peft.get_peft_model(base(checkpoint), config)
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ids, labels = torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
        for _ in range(4):
            gradients = torch.autograd.grad(model(input_ids=ids, labels=labels).loss, weights)
            for weight, gradient in zip(weights, gradients):
                weight.data -= 0.01 * gradient.sign()
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def expected(tokenizer: transformers.PreTrainedTokenizerBase, prompt: list[int], adapters: dict[str, Path],
             checkpoint: Path) -> dict[str | None, str]:
    """What peft's own merged models say, greedily, in float32; and the base model."""
    texts = {}
    for name in (None, *adapters):
        network = base(checkpoint)
        if name:
            network = peft.PeftModel.from_pretrained(network, adapters[name]).merge_and_unload()
        ids = network.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt):]
        texts[name] = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(set(texts.values())) == 3, texts
    return texts


@pytest.fixture(scope="module")
def adapted(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """The built-in model with both adapters."""
    flags = [f"--adapter={name}={folder}" for name, folder in adapters.items()]
    local = LocalServer("--dtype", "float32", "--served-model-name", "base", "--block-size", "8", *flags).start()
    yield local
    local.stop()


def test_answers_are_those_of_the_merged_models(adapted: LocalServer, expected: dict[str | None, str]) -> None:
    """Token for token, by either name; alone, and all at once."""
    models = {f"{prefix}{name}": name for name in ANSWERS for prefix in ("", "base:", f"{serve.DEFAULT_MODEL}:")}
    models |= {"base": None, serve.DEFAULT_MODEL: None}

    def text(model: str) -> str:
        answer = ask(adapted, model=model, max_tokens=12).json()
        assert answer["model"] == ("base" if models[model] is None else f"base:{models[model]}")
        return answer["choices"][0]["message"]["content"]

    for model in ("base", *ANSWERS, "base:pirate", "base"):
        assert text(model) == expected[models[model]], model
    with ThreadPoolExecutor(8) as clients:
        for model, got in zip(models, clients.map(text, models)):
            assert got == expected[models[model]], model
    adapted.assert_idle()


def test_prefixes_are_cached_for_each_adapter(adapted: LocalServer) -> None:
    messages = [{"role": "system", "content": "Blocks are cached. " * 8}, *QUESTION]

    def cached(model: str) -> int:
        answer = ask(adapted, model=model, messages=messages, max_tokens=1).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    names = ["base", "pirate", "cat-2"]
    assert all(count <= 8 for count in map(cached, names))  # how every prompt begins
    assert all(count > 30 for count in map(cached, names))
    assert cached("base:pirate") == cached("pirate")


def test_layers_are_left_as_they_are(adapted: LocalServer) -> None:
    kinds = {type(module).__name__ for module in adapted.engine.model.network.modules()}
    assert not kinds & {"PatchedLayers", "PackedLinear"}
    assert any(isinstance(module, LoraLayer) for module in adapted.engine.model.network.modules())


def test_they_are_listed(adapted: LocalServer) -> None:
    models = {model["id"]: model for model in http.get(adapted.url + "/v1/models").json()["data"]}
    assert list(models) == ["base", "base:pirate", "base:cat-2"]
    assert models["base:pirate"]["parent"] == "base" and "parent" not in models["base"]
    for name in ("pirate", "base:pirate"):
        assert http.get(f"{adapted.url}/v1/models/{name}").json() == models["base:pirate"]


@pytest.mark.parametrize("name", ["parrot", "base:parrot", ":pirate", "pirate:base", "other:pirate", "pirate:cat-2"])
def test_others_are_unknown(name: str, adapted: LocalServer) -> None:
    answer = ask(adapted, model=name)
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


# Turns.


@pytest.mark.parametrize("num_blocks", [20, 200])
def test_a_step_serves_one_adapter_and_all_get_their_turns(num_blocks: int) -> None:
    """With blocks for all, three adapters take turns; with too few, sequences preempt others', and still all of them end."""
    world = World(num_blocks=num_blocks, max_running=8)
    sequences = [sequence(range(3 + i), adapter) for i in range(4) for adapter in (b"", b"a", b"b")]
    for seq in sequences:
        seq.adapter = seq.salt.decode() or None
    world.add(*sequences)
    turns: list[str | None] = []
    while not world.scheduler.idle:
        batch = world.step()
        adapters = {seq.adapter for seq in batch}
        assert len(adapters) == 1
        turns += adapters
        end(world.scheduler, lambda seq: len(seq.generated) >= 20)
        assert len(turns) < 1000
    assert all(len(seq.generated) == 20 for seq in sequences)
    if num_blocks == 200:
        assert all(len(set(turns[i:i + 3])) == 3 for i in range(3, 20)), turns


# What cannot be had.


@pytest.mark.parametrize("argv, problem", [
    (["--adapter", "name"], "is not a name"), (["--adapter", "name="], "is not a name"), (["--adapter", "=FOLDER"], "is not"),
    (["--adapter", "a.b=FOLDER"], "is not a name"), (["--adapter", "a=/no/such"], "is not a name"),
    (["--adapter", "a=FOLDER", "--adapter", "a=FOLDER"], "the name 'a' is taken"),
    (["a", "--adapter", "a=FOLDER"], "is taken"), (["--served_model_name", "a", "--adapter", "a=FOLDER"], "is taken"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_flags(argv: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(SystemExit) as stop:
        serve.parse_command_line([word.replace("FOLDER", str(tmp_path)) for word in argv])
    assert stop.value.code == 2 and problem in capsys.readouterr().err


@pytest.mark.parametrize("problem, message", [("another model's", "the adapter a is not for it: model.layers.0"),
                                              ("weights are gone", "adapter_model.safetensors"), ("no LoRA", "'magic'")])
def test_an_adapter_that_does_not_fit_ends_the_start(problem: str, message: str, adapters: dict[str, Path], tiny: Path,
                                                     checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapters["pirate"], tmp_path / "adapter")
    if problem == "weights are gone":
        (folder / "adapter_model.safetensors").unlink()
    if problem == "no LoRA":
        (folder / "adapter_config.json").write_text('{"peft_type": "magic"}')
    base = tiny if problem == "another model's" else checkpoint
    with pytest.raises(serve.APIError, match="cannot be loaded: .*" + message) as refusal:
        serve.load_model("some-name", serve.Checkpoint(str(base)), serve.Config(device="cpu", adapter=(f"a={folder}",)), True,
                         lambda stage: None)
    assert refusal.value.status == 400


def test_on_quantised_weights(adapters: dict[str, Path], checkpoint: Path, prompt: list[int]) -> None:
    """An adapter's weights stay as they are beside 4-bit ones, and are told from another's whatever its name."""
    config = serve.Config(device="cpu", quantization="bnb-4bit", adapter=(f"a={adapters['pirate']}", f"b={adapters['cat-2']}"))
    model = serve.load_model("some-name", serve.Checkpoint(str(checkpoint)), config, True, lambda stage: None)
    saved = load_file(adapters["pirate"] / "adapter_model.safetensors")
    loaded = model.network.get_adapter_state_dict(serve.adapter_key("a"))
    assert len(saved) == 120 and all(
        loaded[name.removeprefix("base_model.model.")].equal(weight.bfloat16()) for name, weight in saved.items())
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        logits = [(model.activate(name), model.network(ids).logits[0, -1])[1] for name in (None, "a", "b", None)]
    assert logits[0].equal(logits[3]) and not logits[0].equal(logits[1]) and not logits[1].equal(logits[2])
    assert "bnb" in type(model.network.model.layers[0].self_attn.q_proj).__module__
