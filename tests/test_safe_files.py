"""Files that cannot be trusted: pipes where files should be, deep JSON, and checksums of tensors."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dybit
from dybit import safe_files
from dybit.accelerator.config import Config
from dybit.errors import CheckpointError, DyBitError
from dybit.workloads import workload

DEEP = {
    "lists": "[" * 100_000,
    "objects": '{"a":' * 100_000,
    "closed": "[" * 101 + "]" * 101,  # which Python reads
    "mixed": '{"layers": [' * 400 + "]}" * 400,
}


@pytest.mark.skipif(sys.platform == "win32", reason="makes pipes")
def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        kinds = {"pipe": "pipe", "link": "pipe", "s": "socket", ".": "directory", "/dev/null": "device"}
        for name, kind in kinds.items():
            path = tmp_path / name
            with pytest.raises(DyBitError) as caught:
                safe_files.check_regular(path)
            assert str(caught.value) == f"{str(path)!r} is a {kind}, not a file"
    with pytest.raises(CheckpointError, match="is a directory"):
        safe_files.check_regular(str(tmp_path), CheckpointError)
    (tmp_path / "file").write_text("{}")
    for name in ("file", "nothing", "nul\0"):
        assert safe_files.check_regular(tmp_path / name) == tmp_path / name


READERS = {
    "recipe": dybit.Recipe.from_json,
    "workload": workload.Workload.from_json,
    "accelerator": lambda text: Config.from_toml(f"a = {text}"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", DEEP)
def test_deep_text(name, reader):
    with pytest.raises(DyBitError) as caught:
        READERS[reader](DEEP[name])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", DEEP)
def test_deep_files(tmp_path, name):
    (tmp_path / "a.json").write_text(DEEP[name])
    with pytest.raises(CheckpointError, match=r"a\.json is not valid JSON: it nests deeper than 100"):
        safe_files.read_json(tmp_path / "a.json")


def test_json(tmp_path):
    value = {"a": [1, {"b": None}], "c": "[" * 1000}
    for _ in range(96):
        value = [value]
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert safe_files.read_json(tmp_path / "a.json") == value
    for content in (b"", b"{", b"\xff{}", b"nul", b"9" * 5000):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(DyBitError, match=r"a\.json is not valid JSON: "):
            safe_files.read_json(tmp_path / "a.json", DyBitError)
    with pytest.raises(FileNotFoundError):
        safe_files.read_json(tmp_path / "b.json")


def tensors():
    torch.manual_seed(0)
    found = {"w": torch.randn(3, 4), "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3), "mask": torch.ones(3) > 0}
    return found | {"half": torch.ones(2).bfloat16(), "fp8": torch.ones(4).to(torch.float8_e4m3fn)}


def test_digest_is_of_contents():
    known = safe_files.digest(tensors())
    assert len(known) == 64 and known == safe_files.digest(dict(reversed(tensors().items())))
    turned = {**tensors(), "w": tensors()["w"].t().contiguous().t()}
    assert not turned["w"].is_contiguous() and safe_files.digest(turned) == known
    arrays = {key: value.numpy() for key, value in tensors().items() if key not in ("half", "fp8")}
    same = {key: value for key, value in tensors().items() if key in arrays}
    assert safe_files.digest(arrays) == safe_files.digest(same)
    assert safe_files.digest({"w": np.asfortranarray(arrays["w"])}) == safe_files.digest({"w": same["w"]})
    safe_files.check_digest(tensors(), None, "f")
    safe_files.check_digest(tensors(), known, "f")
    with pytest.raises(
        CheckpointError, match=r"f is damaged: the SHA-256 of its tensors is not its dybit.sha256, 'ab'"
    ):
        safe_files.check_digest(tensors(), "ab", "f")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(v=t.pop("w")),
        lambda t: t.update(w=t["w"].view(4, 3)),
        lambda t: t.update(w=t["w"].view(torch.int32)),
        lambda t: t["w"].view(torch.int32)[2, 3].bitwise_xor_(1),
        lambda t: t.pop("empty"),
        lambda t: t.update(empty=torch.zeros(3, 0)),
    ],
)
def test_digest_knows_every_change(change):
    changed = tensors()
    change(changed)
    assert safe_files.digest(changed) != safe_files.digest(tensors())


def test_crc32_is_that_of_all_bytes():
    import zlib

    whole = tensors()["w"].numpy().tobytes() + b"abc"
    assert safe_files.crc32([tensors()["w"], b"abc"]) == f"{zlib.crc32(whole):08x}" == safe_files.crc32([whole])
    assert safe_files.crc32([]) == "00000000"


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("DYBIT_CACHE", str(tmp_path))
    assert safe_files.cache_directory() == tmp_path
    monkeypatch.delenv("DYBIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert safe_files.cache_directory() == tmp_path / "dybit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert safe_files.cache_directory() == Path.home() / ".cache" / "dybit"


def test_json_is_written_whole_or_not_at_all(tmp_path):
    safe_files.write_json(tmp_path / "a" / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        safe_files.write_json(tmp_path / "a" / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a" / "x.json").read_text()) == {"a": 1}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.json"]


# Files that are written


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask():
    """Sets the umask, and puts the old one back."""
    old = os.umask(0)
    os.umask(old)
    yield os.umask
    os.umask(old)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_new_files_and_directories_follow_the_umask(tmp_path, umask, mask):
    umask(mask)
    safe_files.write_file(tmp_path / "text", "ü")
    safe_files.write_json(tmp_path / "a" / "value", 1)
    with safe_files.replacing(tmp_path / "folder", "mark") as folder:
        (folder / "mark").write_text("x")
        (folder / "private").touch(mode=0o600)
        (folder / "inner").mkdir()
    for name, mode in (
        ("text", 0o666), ("a", 0o777), ("a/value", 0o666), ("folder", 0o777), ("folder/mark", 0o666),
        ("folder/private", 0o666), ("folder/inner", 0o777),
    ):  # fmt: skip
        assert (tmp_path / name).stat().st_mode & 0o777 == mode & ~mask, name
    assert (tmp_path / "text").read_bytes() == "ü".encode()


def test_a_file_is_written_whole_or_stays(tmp_path, monkeypatch):
    safe_files.write_file(tmp_path / "a", b"old")
    for failure in (OSError(28, "No space"), KeyboardInterrupt()):

        def fail(*_, failure=failure):
            raise failure

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(type(failure)):
            safe_files.write_file(tmp_path / "a", b"new")
        monkeypatch.undo()
        assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


@pytest.mark.skipif(sys.platform == "win32", reason="makes links and pipes")
def test_links_stay_and_pipes_are_written_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/file")
    for text in ("one", "two"):  # the first makes the file
        safe_files.write_file(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").read_text() == text
    reader, writer = os.pipe()
    safe_files.write_file(f"/dev/fd/{writer}", "through")
    os.close(writer)
    with os.fdopen(reader) as stream:
        assert stream.read() == "through"


def put(path, **files):
    with safe_files.replacing(path, "mark") as folder:
        for name, text in files.items():
            (folder / name).write_text(text)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.skipif(sys.platform == "win32", reason="makes links")
@pytest.mark.parametrize("place", [".", "../here", "link", "link/", "../to/../here", "nested/new"])
def test_directories_are_written_where_they_are(tmp_path, monkeypatch, place):
    here = tmp_path / "here"
    for folder in (here, tmp_path / "to", here / "to"):
        folder.mkdir(exist_ok=True)
    if "link" in place:
        (here / "link").symlink_to("to")
    else:
        (here / "to").rmdir()
    monkeypatch.chdir(here)
    before = os.path.realpath(place)
    for text in ("one", "two"):
        put(place, mark=text, other=text)
        Path(place, "mine").write_text("mine")
        assert os.path.realpath(place) == before  # links are links, and the directory is the same
        assert contents(Path(place)) == {"mark": text, "other": text, "mine": "mine"}
    left = [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert not left


def test_directories_of_others_are_kept(tmp_path):
    (tmp_path / "thesis").write_text("x")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(DyBitError, match="exists and is not a dybit checkpoint; nothing was written"):
            put(path, mark="new")
    assert names(tmp_path) == ["file", "thesis"]


@pytest.mark.parametrize("failing", range(1, 6))
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_files_come_all_or_none(tmp_path, monkeypatch, error, failing):
    put(tmp_path / "d", mark="old", a="old", z="old")
    (tmp_path / "d" / "mine").write_text("mine")
    before = contents(tmp_path / "d")
    rename, calls = Path.rename, []

    def counted(self, to):
        calls.append(to)
        if len(calls) == failing:
            raise error
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", counted)
    with pytest.raises(DyBitError if isinstance(error, OSError) else KeyboardInterrupt):
        put(tmp_path / "d", mark="new", a="new", b="new")
    monkeypatch.undo()
    assert contents(tmp_path / "d") == before and names(tmp_path) == ["d"]


SAVERS = """
import sys, time
from pathlib import Path
from dybit import safe_files
folder, name = Path(sys.argv[1]), sys.argv[2]
while not (folder.parent / "go").exists():
    time.sleep(0.001)
for i in range(200):
    with safe_files.replacing(folder, "mark") as staged:
        (staged / "mark").write_text(f"{name}{i}")
        (staged / "other").write_text(f"{name}{i}")
"""


@pytest.mark.skipif(safe_files.fcntl is None, reason="needs locks of files")
def test_savers_and_readers_side_by_side(tmp_path):
    put(tmp_path / "d", mark="", other="")
    savers = [subprocess.Popen([sys.executable, "-c", SAVERS, str(tmp_path / "d"), name]) for name in "ab"]
    (tmp_path / "go").write_text("")
    seen = set()
    while any(saver.poll() is None for saver in savers):
        with safe_files.reading(tmp_path / "d"):
            pair = {(tmp_path / "d" / name).read_text() for name in ("mark", "other")}
            assert len(pair) == 1
            seen |= pair
    assert [saver.wait() for saver in savers] == [0, 0] and len(seen) > 1
    assert names(tmp_path) == ["d", "go"] and names(tmp_path / "d") == ["mark", "other"]


@pytest.mark.skipif(safe_files.fcntl is None, reason="needs locks of files")
def test_locks(tmp_path):
    taken = pytest.raises(OSError, match="another process is writing it")
    with safe_files.locked(tmp_path), taken, safe_files.locked(tmp_path, wait=False):
        pass
    with safe_files.reading(tmp_path), safe_files.reading(tmp_path):
        pass
    with safe_files.reading(tmp_path / "nothing"):
        pass


def test_hashes_tell_values_apart():
    def made(value):
        digest = hashlib.sha256()
        safe_files.feed(digest, value)
        return digest.hexdigest()

    long = np.zeros(10_000)
    other = long.copy()
    other[5_000] = 1  # which repr leaves out
    values = [
        long, other, long.astype(np.float32), torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.bfloat16),
        [1, 2], (1, 2), [[1], 2], {"a": 1}, {"a": 1, "b": 2}, {"b": 2}, "text", None, 5, 5.0, [], {}, [{}], [[]],
        {"x": torch.ones(2)}, {"x": torch.ones(2) * 2}, torch.tensor(1.0), torch.zeros(0),
    ]  # fmt: skip
    assert len({made(value) for value in values}) == len(values)
    assert made(torch.arange(6.0).view(2, 3).t()) == made(torch.arange(6.0).view(2, 3).t().contiguous())
    assert made({"a": [torch.ones(3)]}) == made({"a": [torch.ones(3)]})
