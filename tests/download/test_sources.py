"""The identity of sources."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpt2.config.sources import HubFiles, HubShards, InstalledDocs, LocalFiles, LocalShards
from gpt2.download.sources import SHARD_FORMATS, TEXT_FORMATS, fetch, find_local, identify, known_sha256
from gpt2.errors import UserError
from gpt2.stage.file_hashes import Hashes
from gpt2.stage.manifest import canonical


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "c.jsonl", "deep/d.txt"):
        settled(folder / name, f"text of {name}\n")
    return folder


def settled(path: Path, text: str, age: int = 60) -> None:
    """Write a file that was last changed `age` seconds ago."""
    path.write_text(text)
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))


def local(*paths: Path | str, column: str = "text") -> LocalFiles:
    return LocalFiles(paths=tuple(map(str, paths)), text_column=column)


def test_identity_is_content_not_place(corpus: Path, tmp_path: Path) -> None:
    """Catches: a moved, copied or touched corpus tokenized and trained on all over again."""
    identity, hints = identify(local(corpus / "*.txt"), tmp_path / "store")
    assert [name for name, _, _ in identity["files"]] == ["a.txt", "b.txt"]
    assert str(tmp_path) not in canonical(identity)
    assert hints["paths"] == [str(corpus / "a.txt"), str(corpus / "b.txt")]
    os.utime(corpus / "a.txt")
    assert identify(local(corpus / "*.txt"), tmp_path / "store")[0] == identity
    corpus.rename(tmp_path / "moved")
    again, moved = identify(local(tmp_path / "moved" / "*.txt"), tmp_path / "other store")
    assert again == identity and moved != hints


def test_identity_follows_what_decides_the_tokens(corpus: Path, tmp_path: Path) -> None:
    """Catches: other text, another order, another column or another kind under the same address."""
    a, b = corpus / "a.txt", corpus / "b.txt"
    sources = [local(a, b), local(b, a), local(a), local(a, b, column="content")]
    identities = [canonical(identify(source, tmp_path)[0]) for source in sources]
    settled(a, "other text of a\n")
    identities.append(canonical(identify(sources[0], tmp_path)[0]))
    assert len(set(identities)) == 5


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember hashes of files that were just written."""
    monkeypatch.setattr(Hashes, "RACY_NS", -3_600_000_000_000)


@pytest.mark.usefixtures("at_once")
def test_hashes_are_remembered(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: reading 28 GB again at each start."""
    path = corpus / "a.txt"
    first = Hashes(tmp_path).of([path])
    monkeypatch.setattr("gpt2.stage.file_hashes.sha256_file", lambda path: pytest.fail(f"{path} was read again"))
    assert Hashes(tmp_path).of([path]) == first


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("how", ["rewritten", "replaced"])
def test_other_bytes_of_the_same_size_and_mtime_are_hashed_again(corpus: Path, tmp_path: Path, how: str) -> None:
    """Catches: a file changed by a program that sets mtime back, such as cp -p or rsync -t, kept under its old hash."""
    path = corpus / "a.txt"
    stat = path.stat()
    (first,) = Hashes(tmp_path).of([path])
    target = path if how == "rewritten" else corpus / "new"
    target.write_text("TEXT OF a.txt\n")
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    target.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert Hashes(tmp_path).of([path]) != [first]


def test_a_hash_of_a_file_just_written_is_not_remembered(corpus: Path, tmp_path: Path) -> None:
    """Catches: a file changed twice within one tick of the file system's clock kept under its first hash."""
    path = corpus / "a.txt"
    path.write_text("one\n")
    stat = path.stat()
    (first,) = Hashes(tmp_path).of([path])
    path.write_text("two\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Hashes(tmp_path).of([path]) != [first]


def test_a_damaged_memory_is_only_forgotten(corpus: Path, tmp_path: Path) -> None:
    """Catches: a traceback about hashes.json, instead of hashing again."""
    first = Hashes(tmp_path).of([corpus / "a.txt"])
    for damage in ("", "[1, 2]", '{"cut'):
        (tmp_path / "hashes.json").write_text(damage)
        assert Hashes(tmp_path).of([corpus / "a.txt"]) == first


def test_patterns_keep_their_order_and_name_a_file_once(corpus: Path) -> None:
    """Catches: a document trained on twice; validation text that moves when a pattern is added behind."""
    patterns = [str(corpus / "b.*"), str(corpus / "**" / "*.txt"), str(corpus / "c.jsonl")]
    names = [str(path.relative_to(corpus)) for path in find_local(patterns, TEXT_FORMATS)]
    assert names == ["b.txt", "a.txt", "deep/d.txt", "c.jsonl"]


def test_names_with_brackets_are_files_first(tmp_path: Path) -> None:
    """Catches: a file called part[1].txt that cannot be named."""
    path = tmp_path / "part[1].txt"
    path.write_text("text")
    assert find_local([str(path)], TEXT_FORMATS) == [path]


def test_relative_and_home_paths(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: paths that hold only as long as the working directory stays the same between planning and work."""
    monkeypatch.chdir(corpus.parent)
    monkeypatch.setenv("HOME", str(corpus))
    assert find_local(["corpus/a.txt"], TEXT_FORMATS) == find_local(["~/a.txt"], TEXT_FORMATS) == [corpus / "a.txt"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("missing.txt", "{corpus}/missing.txt"),
        ("*.parquet", "'{corpus}/*.parquet': the folder {corpus} has no match"),
        ("no/*/x?.txt", "'{corpus}/no/*/x?.txt': the folder {corpus}/no does not exist"),
        ("deep", "{corpus}/deep is a folder: write {corpus}/deep/*.parquet"),
        ("odd.csv", "odd.csv has no known suffix: this source accepts .parquet, .jsonl, .jsonl.gz, .jsonl.zst, .txt"),
    ],
)
def test_a_wrong_path_is_named_with_its_pattern_and_folder(
    corpus: Path, tmp_path: Path, pattern: str, message: str
) -> None:
    """Catches: an empty corpus, or "file not found" without the pattern and the folder that was looked in."""
    (corpus / "odd.csv").write_text("a,b\n")
    with pytest.raises(UserError) as caught:
        identify(local(f"{corpus}/{pattern}"), tmp_path)
    assert message.format(corpus=corpus) in str(caught.value)


def test_urls_are_not_taken_for_paths(tmp_path: Path) -> None:
    """Catches: "there is no file /home/me/https:/..."."""
    with pytest.raises(UserError, match=r"https://a\.org/b\.txt is a URL, not a path"):
        identify(local("https://a.org/b.txt"), tmp_path)


def test_a_path_may_have_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a name like local:x.txt taken for an address, and a traceback where there is no such file."""
    monkeypatch.chdir(tmp_path)
    settled(tmp_path / "local:x.txt", "text\n")
    identity, hints = identify(local("local:x.txt"), tmp_path / "store")
    assert fetch(identity, hints, tmp_path / "download" / "abc") == ["data/00000-local:x.txt"]
    with pytest.raises(UserError, match=r"there is no file .*/local:y\.txt: correct the path"):
        identify(local("local:y.txt"), tmp_path / "store")


def test_shards_are_bin_files(corpus: Path, tmp_path: Path) -> None:
    """Catches: text adopted as token shards."""
    (corpus / "x_val_000000.bin").write_bytes(b"x")
    identity, _ = identify(LocalShards(paths=(str(corpus / "*.bin"),)), tmp_path)
    assert identity["kind"] == "local-shards" and "text_column" not in identity
    with pytest.raises(UserError, match=r"a\.txt .*\.bin"):
        find_local([str(corpus / "a.txt")], SHARD_FORMATS)


def test_hub_sources_are_identified_without_a_network(tmp_path: Path) -> None:
    """Catches: planning that asks the Hub, so that a cached run fails where there is no network."""
    files = HubFiles(repo="o/r", revision="a" * 40, files=("x/*.parquet",))
    assert identify(files, tmp_path)[0] == files.model_dump(mode="json")
    shards = HubShards(repo="o/r", revision="a" * 40)
    assert identify(shards, tmp_path)[0]["files"] == ["*_val_*.bin", "*_train_*.bin"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_installed_docs_do_not_follow_other_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a finished demo that is to do again after any pip install; a corpus other than the one planned."""
    identity, hints = identify(InstalledDocs(max_bytes=30_000), tmp_path)
    site = tmp_path / "site-packages"

    def install(name: str, version: str) -> None:
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nText.\n")
        (folder / "RECORD").write_text(f"{name}/__init__.py,sha256=AAAA,4\n")
        (site / name).mkdir()  # importlib.metadata leaves out files that do not exist
        (site / name / "__init__.py").write_text("4321")

    monkeypatch.syspath_prepend(str(site))
    install("something_new", "1.0")
    directory = tmp_path / "download" / "abc"
    assert identify(InstalledDocs(max_bytes=30_000), tmp_path)[0] == identity
    assert fetch(identity, hints, directory) == ["data/00000-installed-docs.parquet"]
    install("prefect", "99.0")
    changed, hints = identify(InstalledDocs(max_bytes=30_000), tmp_path)
    assert changed != identity and hints["installation"].endswith("prefect 99.0")
    with pytest.raises(UserError, match=identity["installation"][:12]):
        fetch(identity, hints, directory)


def test_touched_local_files_are_still_the_same(corpus: Path, tmp_path: Path) -> None:
    """Catches: refusing a file because its time moved though its bytes did not; a link left at an old place."""
    source = local(corpus / "a.txt")
    identity, hints = identify(source, tmp_path)
    os.utime(corpus / "a.txt")
    directory = tmp_path / "download" / "abc"
    assert fetch(identity, hints, directory) == ["data/00000-a.txt"]
    link = directory / "data" / "00000-a.txt"
    corpus.rename(tmp_path / "moved")
    assert not link.exists()
    _, hints = identify(local(tmp_path / "moved" / "a.txt"), tmp_path)
    fetch(identity, hints, directory)
    assert link.read_text() == "text of a.txt\n" and link.readlink() == tmp_path / "moved" / "a.txt"


def test_a_local_file_that_changes_after_fetch_is_not_recorded_under_the_planned_hash(
    corpus: Path, tmp_path: Path
) -> None:
    """Catches: other bytes in the manifest with the hash of those that were planned, which no later check notices."""
    identity, hints = identify(local(corpus / "*.txt"), tmp_path)
    directory = tmp_path / "download" / "abc"
    linked = fetch(identity, hints, directory)
    assert list(known_sha256(identity, directory)) == linked
    settled(corpus / "b.txt", "TEXT OF b.txt\n")
    with pytest.raises(UserError, match=r"b\.txt changed since the run was planned"):
        known_sha256(identity, directory)
