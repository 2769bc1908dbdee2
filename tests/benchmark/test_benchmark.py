"""gpt2/benchmark.py and gpt2/benchmarks/: from a benchmark's own files to what is scored."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from paths import FIXTURES, SHARED_DATA

from gpt2.benchmark import continuation, wikitext103
from gpt2.benchmark import stage as benchmark
from gpt2.benchmark.examples import ARRAYS, Description, Example, load, pack, save
from gpt2.benchmark.prompts import ReaderOutput, encode_jointly, encode_separately
from gpt2.benchmark.readers import READERS
from gpt2.benchmark.records import read_records
from gpt2.config.benchmarks import Arc, Continuation, Core, HellaSwag, Lambada, Piqa, WikiText103, WinoGrande
from gpt2.config.runtime import Runtime
from gpt2.config.sources import LocalFiles
from gpt2.download.sources import identify
from gpt2.errors import UserError
from gpt2.plan import prepare
from gpt2.shards import ShardWriter
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import BenchmarkFacts
from gpt2.stage.manifest import Request
from gpt2.tokenizer import EOT, gpt2_encoding

FIXTURE = FIXTURES / "hellaswag_small.jsonl"
REAL = SHARED_DATA / "hellaswag_val.jsonl.gz"
REAL_TEXT = REAL.with_name("fineweb_300.parquet")
HERE = LocalFiles(paths=("-",))


def encode(text: str) -> list[int]:
    return gpt2_encoding().encode_ordinary(text)


def decode(tokens: Any) -> str:
    return gpt2_encoding().decode(list(tokens))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(config: Any, *files: Path) -> ReaderOutput:
    return READERS[type(config)](config, list(files), encode)


def ends(example: Example) -> list[str]:
    return [decode(sequence.tokens[-sequence.scored :]) for sequence in example.sequences]


def contexts(example: Example) -> list[str]:
    return [decode(sequence.tokens[: -sequence.scored]) for sequence in example.sequences]


# ---------------------------------------------------------------------------------------------------------- prompts


def test_apart_is_llmcs_way() -> None:
    """Would catch: an ending without its space, or merged with the context's last letters."""
    sequence = encode_separately(encode, "A man is sitting on a roof. he", "is ripping level tiles off.")
    assert sequence.tokens == encode("A man is sitting on a roof. he") + encode(" is ripping level tiles off.")
    assert sequence.scored == len(encode(" is ripping level tiles off."))


def test_together_is_the_harness_way() -> None:
    """Would catch: spaces left at the context's end, where GPT-2's tokens would never have them."""
    sequence = encode_jointly(encode, "Answer: ", "42 is it")
    assert decode(sequence.tokens) == "Answer:  42 is it" and sequence.scored == len(sequence.tokens) - 2
    assert (sequence.chars, sequence.bytes) == (8, 8)
    accented = encode_jointly(encode, "Où", "à côté")
    assert (accented.chars, accented.bytes) == (6, 9)
    assert encode_jointly(encode, "", "word").tokens == [EOT, *encode(" word")]


# ---------------------------------------------------------------------------------------------------------- readers


def test_hellaswag_as_llmc_asks_it() -> None:
    """Would catch: llm.c's figures compared with a text that was cleaned, or an ending of another example."""
    prepared = read(HellaSwag(source=HERE), FIXTURE)
    rows = [json.loads(line) for line in FIXTURE.read_text().splitlines()]
    assert len(prepared.examples) == len(rows) == 12 and prepared.prompt == "llm.c"
    for row, example in zip(rows, prepared.examples, strict=True):
        assert contexts(example) == [row["ctx"]] * 4
        assert ends(example) == [" " + end for end in row["endings"]]
        assert example.label == row["label"]


def test_hellaswag_as_the_harness_asks_it() -> None:
    """Would catch: markers of WikiHow left in, the activity left out, or lengths that count the space."""
    prepared = read(HellaSwag(source=HERE, prompt="harness"), FIXTURE)
    assert contexts(prepared.examples[0])[0] == "Baking bread: A baker weighs flour on a scale. She"
    wikihow = contexts(prepared.examples[3])[0]
    assert wikihow.startswith("Food and Entertaining: How to boil an egg. Fill a pot") and "[" not in wikihow
    for example in prepared.examples:
        for sequence, end in zip(example.sequences, ends(example), strict=True):
            text = end.lstrip(" ")
            assert len(text) <= sequence.chars <= len(end) and sequence.bytes >= sequence.chars


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_every_format_gives_the_same(tmp_path: Path, suffix: str) -> None:
    """Would catch: the Hub's parquet, whose labels are strings, read otherwise than the original file."""
    text = FIXTURE.read_bytes()
    path = tmp_path / f"validation{suffix}"
    if suffix == ".parquet":
        rows = [json.loads(line) for line in text.splitlines()]
        pq.write_table(pa.Table.from_pylist([row | {"label": str(row["label"])} for row in rows]), path)
    else:
        pack_up = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
        path.write_bytes(pack_up(text))
    assert read(HellaSwag(source=HERE), path) == read(HellaSwag(source=HERE), FIXTURE)


def test_limit_takes_the_first() -> None:
    """Would catch: a limit that counts tokens or samples at random."""
    everything = read(HellaSwag(source=HERE), FIXTURE).examples
    assert read(HellaSwag(source=HERE, limit=5), FIXTURE).examples == everything[:5]


GOOD = json.loads(FIXTURE.read_text().splitlines()[0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({key: value for key, value in GOOD.items() if key != "endings"}, r"record 2 .* field 'endings'.*it has .*ctx"),
        (GOOD | {"endings": GOOD["endings"][:3]}, "field 'endings'"),
        (GOOD | {"label": 4}, "field 'label'"),
        (GOOD | {"label": ""}, "field 'label'"),  # the test split on the Hub
        (GOOD | {"ctx": 7}, "field 'ctx'"),
        (GOOD | {"endings": ["a", "", "c", "d"]}, "field 'endings.1'"),
        (["not", "an", "object"], "record 2 is not as HellaSwagRecord"),
    ],
)
def test_a_wrong_record_is_named(tmp_path: Path, row: Any, message: str) -> None:
    """Would catch: a KeyError, a label of another data set, or three endings scored as if they were four."""
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        read(HellaSwag(source=HERE), path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl.gz", gzip.compress(FIXTURE.read_bytes())[:-200], "cannot be read"),
        ("cut.jsonl", FIXTURE.read_bytes()[:700], "line 2: not JSON"),
        ("x.parquet", b"PAR1 and nothing else", "cannot be read"),
        ("empty.jsonl", b"", "no records of HellaSwagRecord"),
        ("latin.jsonl", b'{"ctx": "caf\xe9"}\n', "cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Would catch: a cut-off download taken for a shorter benchmark, or a traceback."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(HellaSwag(source=HERE), tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not there")
def test_the_real_hellaswag_is_whole() -> None:
    """Would catch: examples lost, or longer than GPT-2's context."""
    prepared = read(HellaSwag(source=HERE), REAL)
    examples = pack(Description(kind="hellaswag", prompt="llm.c", origin="", parts=prepared.parts), prepared.examples)
    assert len(examples.labels) == 10_042
    assert np.bincount(examples.labels).tolist() == [2515, 2485, 2584, 2458]
    assert len(examples.tokens) == 3_325_468 and examples.lengths().max() == 166  # counted once, to notice a change


def test_lambada_asks_for_the_last_word(tmp_path: Path) -> None:
    """Would catch: the word among the context, or its space lost."""
    path = jsonl(tmp_path / "l.jsonl", [{"text": "He turned the key and opened the door"}])
    (example,) = read(Lambada(source=HERE), path).examples
    assert contexts(example) == ["He turned the key and opened the"] and ends(example) == [" door"]
    with pytest.raises(UserError, match="field 'text'"):
        read(Lambada(source=HERE), jsonl(path, [{"text": "word"}]))


def test_arc_takes_letters_and_digits_and_its_own_number_of_answers(tmp_path: Path) -> None:
    """Would catch: a key "1" read as a letter, questions with three or five answers, chance of exactly a quarter."""
    rows = [
        {"question": "Why?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        {"question": "How?", "choices": {"text": ["p", "q"], "label": ["A", "B"]}, "answerKey": "B"},
    ]
    prepared = read(Arc(source=HERE), jsonl(tmp_path / "a.jsonl", rows))
    assert [example.label for example in prepared.examples] == [1, 1]
    assert contexts(prepared.examples[0]) == ["Question: Why?\nAnswer:"] * 3
    assert ends(prepared.examples[1]) == [" p", " q"]
    assert prepared.parts[0].chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    with pytest.raises(UserError, match="answerKey 'E' is not one of the labels"):
        read(Arc(source=HERE), jsonl(tmp_path / "b.jsonl", [rows[1] | {"answerKey": "E"}]))


def test_piqa(tmp_path: Path) -> None:
    """Would catch: solutions or labels the wrong way round."""
    row = {"goal": "Open a jar", "sol1": "twist the lid", "sol2": "ask the lid", "label": 0}
    (example,) = read(Piqa(source=HERE), jsonl(tmp_path / "p.jsonl", [row])).examples
    assert ends(example) == [" twist the lid", " ask the lid"] and example.label == 0
    assert contexts(example) == ["Question: Open a jar\nAnswer:"] * 2


def test_winogrande_scores_what_follows_the_blank(tmp_path: Path) -> None:
    """Would catch: the option scored instead of the rest of the sentence, which favours frequent names."""
    row = {"sentence": "Ann helped Bo because _ was tired.", "option1": "Ann", "option2": "Bo", "answer": "2"}
    (example,) = read(WinoGrande(source=HERE), jsonl(tmp_path / "w.jsonl", [row])).examples
    assert contexts(example) == ["Ann helped Bo because Ann", "Ann helped Bo because Bo"]
    assert ends(example) == [" was tired."] * 2 and example.label == 1
    assert example.sequences[0].chars == 0  # no accuracy by length: it is the same text twice
    with pytest.raises(UserError, match="field 'sentence'"):
        read(WinoGrande(source=HERE), jsonl(tmp_path / "x.jsonl", [row | {"sentence": "no blank here"}]))


WIKI = (
    " = Sample = \n \n A man 's car cost $ 1 @,@ 250 ( about £ 900 ) , well @-@ known ; it didn 't , could n't . \n"
    ' He said : " No , thanks " and left [ at 3 @.@ 5 km ] . \n = = Later = = \n The boys \' room <unk> was empty ! \n'
)
PROSE = (
    "= Sample =\n\nA man's car cost $1,250 (about £900), well-known; it didn't, couldn't.\n"
    'He said: "No, thanks" and left [at 3.5 km].\n== Later ==\nThe boys\' room <unk> was empty!\n'
)


def test_wikitext_is_put_back_into_prose() -> None:
    """Would catch: spaces before punctuation, which GPT-2 never saw, and text lost on the way."""
    assert wikitext103.detokenize(WIKI) == PROSE


def test_wikitext_counts_the_words_of_the_original(tmp_path: Path) -> None:
    """Would catch: a perplexity a token of ours, or a word of the prose, both far lower than the paper's."""
    whole = tmp_path / "wiki.test.tokens"
    whole.write_text(WIKI)
    rows = tmp_path / "test.parquet"
    pq.write_table(
        pa.Table.from_pylist([{"text": "" if line == " " else line + "\n"} for line in WIKI.split("\n")[:-1]]), rows
    )
    for path in (whole, rows):
        (example,) = read(WikiText103(source=HERE), path).examples
        (sequence,) = example.sequences
        assert sequence.units == len(WIKI.split()) + 6  # line ends
        assert sequence.tokens[0] == EOT and sequence.scored == len(sequence.tokens) - 1
    (raw,) = read(WikiText103(source=HERE, detokenize=False), whole).examples[0].sequences
    assert decode(raw.tokens[1:]) == WIKI


# ------------------------------------------------------------------------------------------------------------- CORE


def core_bundle(folder: Path, *, without: str = "") -> list[Path]:
    tasks = [
        {"label": "mc", "dataset_uri": "a/mc.jsonl", "icl_task_type": "multiple_choice", "num_fewshot": [2],
         "continuation_delimiter": "\nAnswer: "},
        {"label": "mc_zero", "dataset_uri": "a/mc.jsonl", "icl_task_type": "multiple_choice", "num_fewshot": [0]},
        {"label": "schema", "dataset_uri": "b/schema.jsonl", "icl_task_type": "schema", "num_fewshot": [1]},
        {"label": "lm", "dataset_uri": "b/lm.jsonl", "icl_task_type": "language_modeling", "num_fewshot": [1]},
    ]  # fmt: skip
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}))
    (folder / "eval_meta_data.csv").write_text(
        "Eval Task,Task Category,Random baseline\n"
        + "".join(f"{task['label']},x,{chance}\n" for task, chance in zip(tasks, (25, 25, 50, 0), strict=True))
    )
    jsonl(
        folder / "mc.jsonl",
        [{"query": f"Q{n}?", "choices": [f"yes {n}", f"no {n}", "maybe"], "gold": n % 2} for n in range(6)],
    )
    options = ["The cup fell because it", "The cup and the table stood because they"]
    jsonl(folder / "schema.jsonl", [{"context_options": options, "continuation": "was loose.", "gold": 0}] * 3)
    jsonl(folder / "lm.jsonl", [{"context": f"  One two {n} ", "continuation": f"three {n}"} for n in range(4)])
    return [path for path in sorted(folder.iterdir()) if path.name != without]


def test_core_builds_nanochats_prompts(tmp_path: Path) -> None:
    """Would catch: examples in the prompt that hold the question itself, another delimiter, no <|endoftext|> before,
    and ends that are not what the answers differ in."""
    prepared = read(Core(source=HERE), *core_bundle(tmp_path))
    assert [(part.name, part.form, part.examples, part.chance, part.by) for part in prepared.parts] == [
        ("mc", "choice", 6, 0.25, "mean"),
        ("mc_zero", "choice", 6, 0.25, "mean"),
        ("schema", "choice", 3, 0.5, "mean"),
        ("lm", "last_word", 4, 0.0, "sum"),
    ]
    mc = prepared.examples[0]
    assert all(sequence.tokens[0] == EOT for sequence in mc.sequences)
    text = decode(mc.sequences[0].tokens[1:])
    shown = text.split("\n\n")
    assert len(shown) == 3 and len({part.split("?")[0] for part in shown}) == 3
    assert shown[0].split("\nAnswer: ")[1].startswith(("yes", "no"))
    assert [decode(s.tokens).split("\nAnswer: ")[-1] for s in mc.sequences][2] == "maybe"
    zero = prepared.examples[6]
    assert decode(zero.sequences[0].tokens[1:]).count("?") == 1 and ends(zero)[2] == " maybe"
    schema = prepared.examples[12]
    assert ends(schema) == [" was loose."] * 2
    lm = prepared.examples[15]
    assert ends(lm)[0].startswith(" three ")
    assert decode(lm.sequences[0].tokens[1:]).count("\n\n") == 1


def test_core_names_the_tasks_that_its_data_lacks(tmp_path: Path) -> None:
    """Would catch: a mean over fewer tasks that looks like CORE."""
    prepared = read(Core(source=HERE), *core_bundle(tmp_path, without="lm.jsonl"))
    assert [part.name for part in prepared.parts] == ["mc", "mc_zero", "schema"]
    assert list(prepared.left_out) == ["lm"] and "b/lm.jsonl" in prepared.left_out["lm"]
    with pytest.raises(UserError, match=r"CORE needs the file core\.yaml"):
        read(Core(source=HERE), *core_bundle(tmp_path, without="core.yaml"))


def test_core_limit_keeps_enough_to_show(tmp_path: Path) -> None:
    """Would catch: a crash in the sampling of examples when a limit leaves fewer than are shown."""
    with pytest.raises(UserError, match="too few to show 2"):
        read(Core(source=HERE, limit=2), *core_bundle(tmp_path))


# ----------------------------------------------------------------------------------------------------- continuation


def shard_of(path: Path, texts: list[str]) -> Path:
    with ShardWriter(path) as shard:
        for text in texts:
            shard.write(np.array([EOT, *encode(text)], np.uint16))
    return path


def made_documents(count: int, seed: int) -> list[str]:
    """Documents each about one thing, in the same words otherwise."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    nouns = ["river", "engine", "garden", "market", "winter", "letter", "mountain", "theatre", "kitchen", "island"]
    made = []
    for number in range(count):
        thing = nouns[number % len(nouns)]
        words = [[thing, "the", "old", "was", "near", "of", "and", "still"][int(i)] for i in rng.integers(0, 8, 400)]
        made.append(" ".join(words))
    return made


CONTINUATION = Continuation(examples=60, context_tokens=32, ending_tokens=12, seed=3)


@pytest.fixture(scope="module")
def made_shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_of(tmp_path_factory.mktemp("held_out") / "x_val_000000.bin", made_documents(30, seed=23))


def test_continuations_are_what_they_say(made_shard: Path) -> None:
    """Would catch: a label beside the true ending, endings of different lengths, ones that run into another document
    or begin in the middle of a word, and two of the four alike."""
    stream = np.fromfile(made_shard, np.uint16)[512:]
    text = stream.tobytes()
    prepared = continuation.read(CONTINUATION, [made_shard])
    assert len(prepared.examples) == 60
    for example in prepared.examples:
        assert all(sequence.scored == 12 and len(sequence.tokens) == 44 for sequence in example.sequences)
        assert all(EOT not in sequence.tokens for sequence in example.sequences)
        whole = [np.array(sequence.tokens, np.uint16).tobytes() for sequence in example.sequences]
        assert whole[example.label] in text
        assert len(set(whole)) == 4
        assert all(end.startswith(" ") and end[1].isalpha() for end in ends(example))


def test_continuations_are_the_same_for_a_seed_and_others_for_another(made_shard: Path) -> None:
    """Would catch: a benchmark that changes between two runs of the same configuration."""
    first = continuation.read(CONTINUATION, [made_shard])
    assert continuation.read(CONTINUATION, [made_shard]) == first
    other = CONTINUATION.model_copy(update={"seed": 4})
    assert continuation.read(other, [made_shard]).examples != first.examples


@pytest.mark.parametrize("source", ["made", "fineweb"])
def test_an_ending_alone_does_not_give_the_answer_away(made_shard: Path, tmp_path: Path, source: str) -> None:
    """Would catch: true endings that differ from wrong ones by themselves: more common words, another place in the
    document, a favourite number. Knowing the context must help all the same."""
    if source == "fineweb":
        if not REAL_TEXT.exists():
            pytest.skip(f"{REAL_TEXT} is not there")
        texts = pq.read_table(REAL_TEXT)["text"].to_pylist()
        shard = shard_of(tmp_path / "x_val_000000.bin", texts)
        config = Continuation(examples=1500)
    else:
        shard, config = made_shard, CONTINUATION.model_copy(update={"examples": 2000})
    prepared = continuation.read(config, [shard])
    count = len(prepared.examples)
    stream = np.fromfile(shard, np.uint16)[512:]
    frequency = np.log(np.bincount(stream, minlength=1 << 16) + 1.0)
    common, overlap, labels = [], [], []
    for example in prepared.examples:
        endings = [list(sequence.tokens[-sequence.scored :]) for sequence in example.sequences]
        context = set(example.sequences[0].tokens[: -example.sequences[0].scored])
        common.append(int(np.argmax([frequency[end].mean() for end in endings])))
        rare = [sum(1 / frequency[token] for token in set(end) & context) for end in endings]
        overlap.append(int(np.argmax(rare)))
        labels.append(example.label)
    error = 4 * (0.25 * 0.75 / count) ** 0.5  # four standard deviations of a guess
    assert abs(np.mean(np.array(common) == labels) - 0.25) < error
    assert max(abs(share / count - 0.25) for share in Counter(labels).values()) < error
    assert np.mean(np.array(overlap) == labels) > 0.25 + error


def test_too_little_text_says_how_much_is_needed(tmp_path: Path) -> None:
    """Would catch: a benchmark of examples whose wrong endings come from their own document."""
    shard = shard_of(tmp_path / "x_val_000000.bin", made_documents(3, seed=24))
    with pytest.raises(UserError, match="from 3 documents, a benchmark needs 4"):
        continuation.read(CONTINUATION, [shard])
    repeated = shard_of(tmp_path / "y_val_000000.bin", ["same " * 200] * 8)
    with pytest.raises(UserError, match="repeats itself"):
        continuation.read(CONTINUATION, [repeated])


# ------------------------------------------------------------------------------------------------------------- stage


def stage_of(store: Path, source: LocalFiles) -> Path:
    config = HellaSwag(source=source)
    section = config.model_dump(mode="json", exclude={"optional"})
    section["source"], hints = identify(source, store)
    request = Request(stage="benchmark", version=1, config=section, hints={"source": hints})
    return prepare(request, Runtime(store=store))


def test_the_stage_writes_what_the_scorer_reads(tmp_path: Path) -> None:
    """Would catch: files that the manifest does not know, so that a cached benchmark may be missing half of itself."""
    directory = stage_of(tmp_path, LocalFiles(paths=(str(FIXTURE),)))
    benchmark.work(StageDir(directory))
    stage = StageDir(directory)
    facts = stage.facts(BenchmarkFacts)
    assert (facts.kind, facts.examples, facts.chance) == ("hellaswag", 12, 0.25)
    assert FIXTURE.name in facts.origin
    assert stage.manifest is not None and stage.manifest.problems(directory, deep=True) == []
    assert {entry.path for entry in stage.manifest.files} == {
        "benchmark.json", "examples.npz", f"data/00000-{FIXTURE.name}"}  # fmt: skip
    assert load(directory).labels.tolist() == [json.loads(line)["label"] for line in FIXTURE.read_text().splitlines()]


SPACES = {
    "activity_label": "Food",
    "ctx": "Cut  it. [step] Then",
    "ctx_a": " Cut  it. [title] More",
    "ctx_b": "tHEN Eat",
    "endings": ["go [substeps] on  now.", " é [title] wait.", "a  b", "c"],
    "label": 2,
}
QUOTES = (
    " = = = Deep = = = \n"
    " They 'd go , I 'm , you 're , we 've , she 'll , he 's 't ; \" a \" and ' b c ' ! [ x ] { y }\n"
    " a 1 @.@ 5 , 2 @,@ 000 well @-@ known ( £ 3 ) : what ? 5 % is $ 4 \n"
)


def golden_case(name: str, folder: Path) -> ReaderOutput:
    """A benchmark of every reader and prompt, made of texts that each of their rules changes."""
    if name == "core":
        files = core_bundle(folder)
        with (folder / "mc.jsonl").open("a") as file:  # one answer begins as the other does
            file.write(json.dumps({"query": "Yes?", "choices": ["yes", "yes sir"], "gold": 1}) + "\n")
        return read(Core(source=HERE), *files)
    if name == "continuation":
        return continuation.read(CONTINUATION, [shard_of(folder / "x_val_000000.bin", made_documents(30, seed=23))])
    if name.startswith("wikitext103"):
        (folder / "wiki.test.tokens").write_text(WIKI + QUOTES)
        return read(WikiText103(source=HERE, detokenize=name == "wikitext103"), folder / "wiki.test.tokens")
    rows: dict[str, list[dict[str, Any]]] = {
        "hellaswag": [*map(json.loads, FIXTURE.read_text().splitlines()), SPACES],
        "lambada": [{"text": "He turned the key  and opened the café\u2019s door"}, {"text": "One two  three"}],
        "arc": [{"question": "Why so?", "choices": {"text": ["naïve", "b c"], "label": ["A", "B"]}, "answerKey": "B"}],
        "piqa": [{"goal": "Open a jar ", "sol1": "twist the lid", "sol2": "ask the café", "label": 1}],
        "winogrande": [{"sentence": "Ann met Bo as _  was late .", "option1": "Ann", "option2": "Bo B", "answer": "2"}],
    }
    kind, _, prompt = name.partition(" ")
    configs = {"lambada": Lambada, "arc": Arc, "piqa": Piqa, "winogrande": WinoGrande}
    config = HellaSwag(source=HERE, prompt=prompt) if prompt else configs[kind](source=HERE)  # type: ignore[arg-type]
    return read(config, jsonl(folder / f"{kind}.jsonl", rows[kind]))


GOLDEN = {
    "hellaswag llm.c": "6d3a9904e2e0bf0d",
    "hellaswag harness": "b691f375cacaa26d",
    "lambada": "b23c5867dae88e7b",
    "arc": "99fdd321c7cd2be4",
    "piqa": "e2cc5e18d04da29e",
    "winogrande": "cf2e505290afe15d",
    "wikitext103": "6e4b22c8439e19e9",
    "wikitext103 as it is": "5649b3ff09fd943f",
    "core": "29ba04b9e96c8919",
    "continuation": "78d9e72e19741b75",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_prepared_bytes_are_the_versions(tmp_path: Path, name: str) -> None:
    """Would catch: a change of what a reader makes (a rule of de-tokenizing, a prompt, CORE's examples in the prompt)
    without a new version in gpt2/stage/table.py, which would leave old files in use as if nothing had changed."""
    prepared = golden_case(name, tmp_path)
    description = Description(kind="x", prompt=prepared.prompt, origin="", parts=prepared.parts)
    save(pack(description, prepared.examples), tmp_path)
    examples = load(tmp_path)
    digest = hashlib.sha256((tmp_path / "benchmark.json").read_bytes())
    for array in ARRAYS:  # not the archive's own bytes: those are zlib's, which may change with Python
        digest.update(getattr(examples, array).astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == GOLDEN[name], "if that is meant, raise the benchmark stage's version"


def test_records_stop_at_the_limit(tmp_path: Path) -> None:
    """Would catch: a damaged end of a file that a limit never reaches being an error."""
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(GOOD) + "\n{broken\n")
    from gpt2.benchmark.hellaswag import HellaSwagRecord

    assert len(read_records([path], HellaSwagRecord, 1)) == 1
