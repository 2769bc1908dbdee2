"""Export and import: transformers reads what is written, tiktoken agrees on the tokens, no bit is lost."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiktoken
import torch
import yaml
from paths import ROOT
from safetensors.torch import load_file, save_file
from trained_store import store_with_a_training
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

from gpt2.architecture import resolve
from gpt2.config.train import ModelConfig
from gpt2.errors import UserError
from gpt2.export import hf as export
from gpt2.export import model_card
from gpt2.export.hf import export_hf, export_llmc
from gpt2.generate.generation import generate
from gpt2.model.checkpoint import save_model
from gpt2.model.gpt import GPT
from gpt2.model.load import load_any, load_init
from gpt2.model.weights import to_hf
from gpt2.stage.facts import BenchmarkFacts, EvaluateFacts, PretrainedFacts, Score
from gpt2.stage.manifest import Manifest, Request, read_model, write_model
from gpt2.tokenizer import gpt2_encoding

SIZE = {"n_layer": 2, "n_head": 4, "n_embd": 32}
CONFIG = ModelConfig(**SIZE, block_size=64)


def random_model() -> GPT:
    """Every tensor random, biases and gains included."""
    generator = torch.Generator().manual_seed(5)
    model = GPT(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1, generator=generator)
            if name == "transformer.wte.weight":
                parameter[CONFIG.vocab_size :] = 0
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model()


@pytest.fixture(scope="module")
def exported(model: GPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    save_model(folder / "checkpoint", model)
    return export_hf(folder / "checkpoint", folder / "hf")


def test_transformers_gives_the_same_logits(model: GPT, exported: Path) -> None:
    """A matrix not transposed, a head that is not tied, dropout left on, another GELU."""
    theirs = AutoModelForCausalLM.from_pretrained(exported)
    assert theirs.lm_head.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()
    assert theirs.dtype == torch.float32
    assert theirs.config.n_ctx == theirs.config.n_positions == 64
    assert theirs.config.activation_function == "gelu_new"
    assert theirs.config.attn_pdrop == theirs.config.embd_pdrop == theirs.config.resid_pdrop == 0
    idx = torch.randint(0, 50257, (2, 64), generator=torch.Generator().manual_seed(1))
    theirs.train()  # no dropout anywhere
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx)[0], atol=1e-5, rtol=1e-5)


def test_greedy_text_is_the_pipelines(model: GPT, exported: Path) -> None:
    """A folder that transformers can load and cannot generate from; a cache of ours that drifts from theirs."""
    generator = pipeline("text-generation", model=str(exported))
    text = generator("Once upon a time", max_new_tokens=20, do_sample=False)[0]["generated_text"]
    ids = generate(model, gpt2_encoding().encode("Once upon a time"), 20, temperature=0)
    assert text == "Once upon a time" + gpt2_encoding().decode(ids)


def sample_texts() -> list[str]:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    pool = "abcdefgh  \n\t.,;!?'\"0123456789äößñéłçøđ東京漢字かなкирилл🤖🎉—“”\u00a0\u3000'll've're"
    made = ["".join(rng.choices(pool, k=rng.randint(1, 60))) for _ in range(300)]
    return [
        *made,
        (ROOT / "README.md").read_text(),
        "<|endoftext|>Hi<|endoftext|>",
        "  ",
        "\n\n",
    ]


@pytest.mark.parametrize("kind", ["as found", "only vocab.json and merges.txt", "only tokenizer.json"])
def test_tokenizer_agrees_with_tiktoken(exported: Path, tmp_path: Path, kind: str) -> None:
    """Merges off by one line, a space put before the text, <|endoftext|> split into letters."""
    folder = shutil.copytree(exported, tmp_path / "copy")
    for name in {
        "only vocab.json and merges.txt": ["tokenizer.json"],
        "only tokenizer.json": ["vocab.json", "merges.txt"],
    }.get(kind, []):
        (folder / name).unlink()
    theirs = AutoTokenizer.from_pretrained(folder)
    judge: tiktoken.Encoding = gpt2_encoding()
    assert len(theirs) == judge.n_vocab == 50257
    assert theirs.eos_token_id == theirs.bos_token_id == judge.eot_token
    assert theirs.model_max_length == 64
    for text in sample_texts():
        ids = theirs(text)["input_ids"]
        assert ids == judge.encode(text, allowed_special="all"), text
        assert theirs.decode(ids) == text


def test_fp32_round_trips_lose_no_bit(model: GPT, exported: Path, tmp_path: Path) -> None:
    """A cast, or an untied head, on the way: ours -> Hugging Face -> llm.c -> Hugging Face -> ours."""
    bits = (exported / "model.safetensors").read_bytes()
    llmc = export_llmc(exported, tmp_path / "m.bin")
    again = export_hf(llmc, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == bits
    for name, tensor in to_hf(load_any(again)).items():
        assert torch.equal(tensor, to_hf(model)[name]), name


def test_openais_layout_is_read(tmp_path: Path) -> None:
    """Weights as the Hub's gpt2 has them: no prefix, with causal masks, and in several files; then saved by
    transformers itself."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(**SIZE, n_positions=64, attn_pdrop=0.1)).eval()
    idx = torch.randint(0, 50257, (1, 64))
    with torch.no_grad():
        wanted = theirs(idx).logits
    theirs.save_pretrained(tmp_path / "saved")
    bare = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(tmp_path / "saved" / "model.safetensors").items()
        if not name.startswith("lm_head")
    }
    for layer in range(SIZE["n_layer"]):
        bare[f"h.{layer}.attn.bias"] = torch.ones(64, 64).tril().view(1, 1, 64, 64)
    halves = [dict(list(bare.items())[:9]), dict(list(bare.items())[9:])]
    shutil.copytree(tmp_path / "saved", tmp_path / "sharded").joinpath("model.safetensors").unlink()
    for i, half in enumerate(halves):
        save_file(half, tmp_path / "sharded" / f"model-{i}.safetensors")
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, half in enumerate(halves) for name in half}}
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copytree(tmp_path / "saved", tmp_path / "pickled").joinpath("model.safetensors").unlink()
    torch.save(bare, tmp_path / "pickled" / "pytorch_model.bin")
    for kind in ("saved", "sharded", "pickled"):
        ours = GPT(CONFIG)
        load_init(ours, str(tmp_path / kind))
        with torch.no_grad():
            torch.testing.assert_close(ours(idx)[0], wanted, atol=1e-5, rtol=1e-5)


def test_an_index_of_weights_names_only_files_of_its_folder(exported: Path, tmp_path: Path) -> None:
    """Bug: a model from elsewhere could have any file of the machine read as its weights."""
    folder = shutil.copytree(exported, tmp_path / "copy")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "../outside.safetensors"}}')
    with pytest.raises(UserError, match="is not a path inside"):
        load_any(folder)


class _Evil:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (Path.touch, (Path("evil"),))


def test_a_pickle_runs_no_code(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(exported, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": _Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"more than weights.*model\.safetensors") as caught:
        load_any(folder)
    assert "weights_only" not in str(caught.value) and "\x1b" not in str(caught.value)  # torch says how to run it
    assert caught.value.__cause__ is None
    assert not (tmp_path / "evil").exists()


def test_nothing_is_overwritten_and_nothing_half_written(model: GPT, exported: Path, tmp_path: Path) -> None:
    """An export over someone's folder; a folder without weights left by one that failed."""
    with pytest.raises(UserError, match="exists"):
        export_hf(exported, exported)
    (tmp_path / "kept" / "gpt2.bin").parent.mkdir()
    (tmp_path / "kept" / "gpt2.bin").write_bytes(b"precious")
    for out in ("kept", "kept/gpt2.bin"):
        with pytest.raises(UserError, match=r"gpt2\.bin exists"):
            export_llmc(exported, tmp_path / out)
    assert (tmp_path / "kept" / "gpt2.bin").read_bytes() == b"precious"
    shutil.rmtree(tmp_path / "kept")
    shutil.copytree(exported, tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="damaged"):
        export_hf(tmp_path / "bad", tmp_path / "out")
    with pytest.raises(UserError, match=r"no config\.json and no llm\.c checkpoint"):
        (tmp_path / "empty").mkdir()
        export_hf(tmp_path / "empty", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "empty"]


def test_another_vocabulary_gets_no_tokenizer(tmp_path: Path) -> None:
    """GPT-2's tokenizer beside a model that does not know its ids."""
    model = GPT(ModelConfig(**SIZE, block_size=8, vocab_size=100))
    model.init_weights(seed=1)
    save_model(tmp_path / "checkpoint", model)
    out = export_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert not (out / "tokenizer.json").exists()
    assert "no tokenizer" in (out / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(out).config.eos_token_id == 99


# ------------------------------------------------------------------------------------------------------- model card


def test_model_card_tells_what_was_asked_and_what_came_out(model: GPT, tmp_path: Path) -> None:
    """The final model's scores on the card of an earlier checkpoint, or none on the final one's."""
    trained = store_with_a_training(tmp_path / "store", model)
    export_hf(trained, tmp_path / "final", name="toy")  # the stage's directory stands for its final checkpoint
    card = (tmp_path / "final" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["datasets"] == ["HuggingFaceFW/fineweb"]
    assert head["pipeline_tag"] == "text-generation"
    (result,) = head["model-index"][0]["results"]
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {"acc": 0.25, "acc_norm": 0.2812}
    for expected in (
        "# gpt2-toy",
        "3.2511",
        "hellaswag acc_norm (by log probability a token, llm.c's acc_norm; 1,000 examples, chance 0.25) | 0.2812",
        "HuggingFaceFW/fineweb@0000",
        "0.0006 to 0",
        "for 20 optimizer steps.",
        "2,560",
        "123,456 tokens",
        "cpu, fp32",
    ):
        assert expected in body, expected
    export_hf(trained / "checkpoints" / "step_00000010", tmp_path / "earlier")
    earlier = (tmp_path / "earlier" / "README.md").read_text()
    assert "for 10 optimizer steps of 20." in earlier
    assert "after step 10 | 4.5000" in earlier
    assert "hellaswag" not in earlier
    assert "1,280" in earlier


def test_model_card_calls_each_figure_what_others_call_it(tmp_path: Path) -> None:
    """Our acc_norm, a token, published as the acc_norm that lm-evaluation-harness takes a character; a mean over some
    of CORE's tasks published as CORE; a figure that nobody defines."""
    by_length = {"acc": 0.1, "acc_norm": 0.2, "acc_norm_chars": 0.3, "acc_norm_bytes": 0.4, "examples": 9}
    part = Score(examples=9)
    scores = {
        "llmc": Score(**by_length, prompt="llm.c"),
        "harness": Score(**by_length, prompt="harness"),
        "lambada": Score(acc=0.5, perplexity=40.0, unit="last word", examples=9, prompt="harness"),
        "core": Score(centered=0.11, examples=18, parts={"a": part, "b": part}, prompt="core"),
    }
    facts = EvaluateFacts(val_loss=3.0, val_tokens=9, scores=scores)
    card = model_card.render(model_card.Record("toy", CONFIG, evaluation=facts, left_out={"core": {"squad": "gone"}}))
    head = yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"]
    published = {result["dataset"]["name"]: {m["type"]: m["value"] for m in result["metrics"]} for result in head}
    assert published["llmc"] == {"acc": 0.1, "acc_norm": 0.2, "acc_norm_chars": 0.3, "acc_norm_bytes": 0.4}
    assert published["harness"] == {"acc": 0.1, "acc_norm_tokens": 0.2, "acc_norm": 0.3, "acc_bytes": 0.4}
    names = {(result["dataset"]["name"], m["type"]): m["name"] for result in head for m in result["metrics"]}
    assert names["harness", "acc_norm"] == "acc_norm: by log probability a character, lm-evaluation-harness's acc_norm"
    assert names["llmc", "acc_norm"] == "acc_norm: by log probability a token, llm.c's acc_norm"
    assert names["lambada", "acc"].endswith("every token of the answer is the likeliest")
    assert names["lambada", "perplexity"] == "perplexity: a last word"
    assert "CORE over 2 of 3 tasks, without squad" in names["core", "centered"]
    for name in names.values():
        assert name.partition(": ")[2] in card.split("---\n", 2)[2], name


def test_model_card_finds_what_a_benchmark_lacked(model: GPT, tmp_path: Path) -> None:
    """The tasks left out looked for under another name or in another stage, and so never named."""
    trained = store_with_a_training(tmp_path, model)
    lacking = BenchmarkFacts(kind="core", examples=9, chance=None, origin="x", left_out={"squad": "gone"})
    request = Request(stage="benchmark", version=1, config={"kind": "core"})
    write_model(
        tmp_path / request.address / "manifest.json", Manifest(address=request.address, files=(), facts=lacking)
    )
    (evaluation,) = tmp_path.glob("evaluate/*/request.json")
    asked = read_model(evaluation, Request)
    inputs = asked.inputs | {"benchmark:core": request.address}
    write_model(evaluation, asked.model_copy(update={"inputs": inputs}))
    record = model_card.gather(trained / "checkpoints" / "step_00000020", model.config)
    assert record.left_out == {"core": {"squad": "gone"}}


def test_weights_without_records_get_a_card_that_says_so(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "no record of their training" in card
    assert "Recipe" not in card


# ------------------------------------------------------------------------------------------------------ command line


class FakeHub(ThreadingHTTPServer):
    """The requests of an upload, as the Hub answers them; keeps what was said."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _FakeHubRequest)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.created: dict[str, object] = {}
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()


class _FakeHubRequest(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_POST(self) -> None:
        data, hub = self.body(), self.server
        hub.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            hub.created = json.loads(data)
            self.answer({"url": f"{hub.address}/me/gpt2-toy"})
        elif self.path.endswith("/preupload/main"):
            large = lambda path: "lfs" if path.endswith(".safetensors") else "regular"  # noqa: E731
            self.answer(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": large(file["path"]), "shouldIgnore": False}
                        for file in json.loads(data)["files"]
                    ]
                }
            )
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**blob, "actions": {"upload": {"href": f"{hub.address}/blob/{blob['oid']}", "header": {}}}}
                for blob in json.loads(data)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in data.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    hub.files[entry["value"]["path"]] = hub.blobs[entry["value"]["oid"]]
            self.answer({"commitUrl": f"{hub.address}/me/gpt2-toy/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.answer({})

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_GET(self) -> None:
        self.answer({"id": "me/gpt2-toy", "sha": "0" * 40, "siblings": []})


def test_push_goes_on_with_an_export_that_is_there(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An export that was read, and its card edited, has to be deleted before it can be pushed; another model's folder
    pushed in its place."""
    pushed: list[Path] = []
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.setattr(export, "push", lambda folder, repo, public: pushed.append(folder) or "done")
    out = shutil.copytree(exported, tmp_path / "out")
    (out / "README.md").write_text("my own card")
    export.main([str(exported), str(out), "--push", "me/toy"])
    assert pushed == [out] and (out / "README.md").read_text() == "my own card"
    assert "is there already and is pushed as it is: README.md, config.json" in capsys.readouterr().out
    weights = load_file(out / "model.safetensors")
    weights["transformer.ln_f.bias"][0] += 1
    save_file(weights, out / "model.safetensors")
    with pytest.raises(UserError, match=r"exists and is not .*'s export"):
        export.main([str(exported), str(out), "--push", "me/toy"])
    with pytest.raises(UserError, match="exists: delete it"):
        export.main([str(exported), str(out)])
    assert pushed == [out]


def test_fetched_weights_are_found_by_their_stage(exported: Path, tmp_path: Path) -> None:
    """A baseline that can be evaluated, but not sampled from by the folder that its stage has in the store."""
    shutil.copytree(exported, tmp_path / "model")
    facts = PretrainedFacts(origin="somewhere", checkpoint="model")
    write_model(tmp_path / "manifest.json", Manifest(address="pretrained/x", files=(), facts=facts))
    assert resolve(tmp_path) == tmp_path / "model"


@pytest.mark.slow
def test_push_uploads_the_folder_with_the_token_from_the_environment(exported: Path, tmp_path: Path) -> None:
    """A token taken from somewhere else, a public repository nobody asked for, or a file left behind."""
    with FakeHub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        pushed = run_export(
            str(exported),
            str(tmp_path / "hf"),
            "--push",
            "me/gpt2-toy",
            HOME=str(tmp_path),
            HF_TOKEN="hf_of_the_test",
            HF_ENDPOINT=hub.address,
            HF_HUB_DISABLE_XET="1",
        )
        hub.shutdown()
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.splitlines()[-1].startswith(hub.address)
    assert hub.tokens == {"Bearer hf_of_the_test"} | ({None} & hub.tokens)
    assert hub.created.get("visibility") == "private" or hub.created.get("private") is True
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}


def run_export(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpt2.export", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], **environment},
    )


@pytest.mark.slow
def test_command_line(exported: Path, tmp_path: Path) -> None:
    made = run_export(str(exported), str(tmp_path / "m.bin"), "--format", "llmc-bf16")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "m.bin").read_bytes()[4] == 5
    refused = run_export(str(exported), str(tmp_path / "hf"), "--push", "someone/gpt2", HOME=str(tmp_path))
    assert refused.returncode == 2
    assert "HF_TOKEN" in refused.stderr
    assert not (tmp_path / "hf").exists(), "asked for before the work, not after"
    assert run_export(str(exported), str(exported)).returncode == 2
