"""A server that fails in many ways: the bytes, and the tokens, are the same, or the reason is said."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mamba_train.data import remote_files
from mamba_train.data.hub_text import HubText, read_hub
from mamba_train.data.remote_files import REQUESTS, HttpFile, Patience
from mamba_train.data.stream_opening import expand
from mamba_train.data.text_files import Fields
from tests.data import file_server
from tests.data.conftest import make_texts
from tests.data.file_server import Handler, serving
from tests.data.streams import make_stream, steps_of, write_files, write_tokenizer

# A busy machine is late by itself now and then, which counts as a failure in a row with others.
PATIENCE = Patience(retries=8, timeout_seconds=0.5)
CONTENT = bytes(range(256)) * 4000  # some chunks


def status(code: int, **headers: str) -> Callable[[Handler], None]:
    def fail(handler: Handler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return fail


def send(length: Callable[[int], int], share: float, then: Callable[[Handler], None] = lambda handler: None) -> Any:
    """Say a length, send a share of the content, then do something."""

    def fail(handler: Handler) -> None:
        content = handler.content()
        begins = handler.headers["Range"]
        handler.send_response(206 if begins else 200)
        if begins:
            first, size = (
                len(handler.server.files[handler.path]) - len(content),
                len(handler.server.files[handler.path]),
            )
            handler.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        handler.send_header("Content-Length", str(length(len(content))))
        handler.end_headers()
        handler.wfile.write(content[: int(share * len(content))])
        handler.wfile.flush()
        then(handler)

    return fail


def reset(handler: Handler) -> None:
    import socket
    import struct

    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def hang(handler: Handler) -> None:
    handler.server.released.wait(1.5)


def garbage(handler: Handler) -> None:
    handler.wfile.write(b"this is no HTTP\r\n\r\n")


def wrong_range(handler: Handler) -> None:
    content = handler.server.files[handler.path]
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes 700000-{len(content) - 1}/{len(content)}")
    handler.send_header("Content-Length", str(len(content) - 700000))
    handler.end_headers()
    handler.wfile.write(content[700000:])


FAULTS: dict[str, Callable[[Handler], None]] = {
    "500": status(500),
    "503": status(503),
    "429 with a time": status(429, Retry_After="0"),
    "408": status(408),
    "reset at once": reset,
    "reset in the middle": send(lambda n: n, 0.4, reset),
    "truncated": send(lambda n: n, 0.6),
    "a hang before the answer": hang,
    "a hang in the middle": send(lambda n: n, 0.3, hang),
    "a shorter length": send(lambda n: n // 2, 0.5),
    "a longer length": send(lambda n: n + 9, 1.0),
    "no HTTP": garbage,
    "another range": wrong_range,
    "all, not a range": lambda handler: handler.answer(ranges=False),
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setattr(remote_files, "FIRST_PAUSE_SECONDS", 0.001)
    with serving({"/a.jsonl": CONTENT}) as server:
        yield server


def address(server: ThreadingHTTPServer, path: str = "/a.jsonl") -> str:
    return file_server.address(server, path)


@pytest.mark.parametrize("name", FAULTS)
def test_the_bytes_are_the_same_after_a_failure(server: ThreadingHTTPServer, name: str) -> None:
    # At the beginning, and twice in a row in the middle, where the answer before it was cut short.
    cut = send(lambda n: n, 0.5)
    server.faults = iter([FAULTS[name], cut, FAULTS[name], FAULTS[name], cut])
    before = REQUESTS.repeated
    assert b"".join(HttpFile(address(server), len(CONTENT), PATIENCE).chunks()) == CONTENT
    assert REQUESTS.repeated - before >= (0 if name == "all, not a range" else 2)


def test_the_rest_is_asked_for_also_of_a_server_that_sends_all(server: ThreadingHTTPServer) -> None:
    server.faults = iter([send(lambda n: n, 0.5), FAULTS["all, not a range"]])
    assert b"".join(HttpFile(address(server), len(CONTENT), PATIENCE).chunks()) == CONTENT
    assert server.seen["/a.jsonl"] == 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (status(500), "given up after 4 attempts in a row, the last one: HTTP 500"),
        (reset, "given up after 4 attempts in a row, the last one: .*"),
        (hang, "given up after 4 attempts in a row, the last one: TimeoutError"),
        (status(404), r"cannot be read \(HTTP 404"),
        (status(403), r"cannot be read \(HTTP 403"),
    ],
)
def test_it_gives_up_with_the_reason(server: ThreadingHTTPServer, fault: Any, reason: str) -> None:
    server.faults = itertools.repeat(fault)
    with pytest.raises(ValueError, match=f"http://127.*a.jsonl: {reason}"):
        list(HttpFile(address(server), len(CONTENT), Patience(3, 0.1 if fault is hang else 60.0)).chunks())


def test_a_file_that_was_changed_is_not_read(server: ThreadingHTTPServer) -> None:
    file = HttpFile(address(server), 0, PATIENCE).find_size()
    assert file.size == len(CONTENT)
    server.files["/a.jsonl"] = CONTENT + b"x"
    with pytest.raises(ValueError, match="has 1,024,001 bytes there, 1,024,000 when it was listed"):
        list(file.chunks())


def test_failures_far_apart_do_not_add_up(server: ThreadingHTTPServer) -> None:
    server.faults = iter([send(lambda n: n, 0.4)] * 10)
    assert b"".join(HttpFile(address(server), len(CONTENT), Patience(1, 60.0)).chunks()) == CONTENT


def test_a_stream_over_a_failing_server_has_the_tokens_of_the_files(
    server: ThreadingHTTPServer, tmp_path: Path
) -> None:
    texts = make_texts(400)
    write_tokenizer(tmp_path / "tokenizer.json", texts)
    folder = write_files(tmp_path / "text", [texts[i::12] for i in range(12)])
    for file in folder.iterdir():
        server.files[f"/{file.name}"] = file.read_bytes()
    settings = {"tokenizer": str(tmp_path / "tokenizer.json"), "cache_dir": str(tmp_path / "cache")}
    patience = {"network_retries": PATIENCE.retries, "network_timeout_seconds": PATIENCE.timeout_seconds}
    common = {"length": 32, "global_batch_size": 12, "seed": 3}
    local = {"data": {**settings, "path": str(folder)}, **common}
    remote = {"data": {**settings, **patience, "path": address(server, "/{000..011}.jsonl.zst")}, **common}
    expected = list(itertools.islice(steps_of(local), 60))  # some epochs
    listed = make_stream(remote)
    assert [file.size for file in listed.files[""]] == [file.stat().st_size for file in sorted(folder.iterdir())]
    faults = [fault for name, fault in FAULTS.items() if name != "another range"]  # such small files have none
    server.faults = itertools.cycle(answer for fault in faults for answer in (fault, None))
    found = list(itertools.islice(steps_of(remote, 2, micro=3), 60))
    for mine, theirs in zip(found, expected, strict=True):
        rows = [[row for batch in batches for row in batch.tokens.tolist()] for batches in (mine, theirs)]
        assert rows[0] == rows[1]
    assert sum(server.seen.values()) > 2 * len(faults) - 2


def test_files_of_the_hub_are_listed_once_at_one_commit(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.hf_api import RepoFile

    texts = make_texts(60)
    write_tokenizer(tmp_path / "tokenizer.json", texts)
    folder = write_files(tmp_path / "text", [texts[:30], texts[30:]])
    server.files = {f"/datasets/a/b/resolve/c0ffee/train/{file.name}": file.read_bytes() for file in folder.iterdir()}
    asked: list[Any] = []

    def tree(self: Any, name: str, **options: Any) -> list[RepoFile]:
        asked.append((name, options["revision"]))
        listed = [RepoFile(path=path.rpartition("c0ffee/")[2], size=len(content), oid="0")
                  for path, content in server.files.items()]  # fmt: skip
        return [*listed, RepoFile(path="README.md", size=1, oid="0"), RepoFile(path="val/000.jsonl", size=1, oid="0")]

    info = type("Info", (), {"sha": "c0ffee"})
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, revision: info)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", tree)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_url",
        lambda name, path, repo_type, revision: address(server, f"/datasets/{name}/resolve/{revision}/{path}"),
    )  # fmt: skip
    settings = {"tokenizer": str(tmp_path / "tokenizer.json"), "cache_dir": str(tmp_path / "cache")}
    common = {"length": 32, "global_batch_size": 12, "seed": 3}
    expected = next(steps_of({"data": {**settings, "path": str(folder)}, **common}))
    remote = {"data": {**settings, "path": "hf://datasets/a/b@v1/train/*.zst"}, **common}
    found = next(steps_of(remote))
    assert [batch.tokens.tolist() for batch in found] == [batch.tokens.tolist() for batch in expected]
    assert asked == [("a/b", "c0ffee")]
    with pytest.raises(ValueError, match=r"data.path=hf://datasets/a/b/other/\*: none of its 4 files"):
        make_stream({"data": {**settings, "path": "hf://datasets/a/b/other/*"}, **common})


def test_a_dataset_of_the_hub_is_read_at_the_commit_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    commits = iter(["c0ffee", "c0ffee", "decade"])
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, name, revision: type("Info", (), {"sha": next(commits)})
    )
    monkeypatch.setattr("mamba_train.data.hub_text._stream", lambda part, option: type("Stream", (), {"num_shards": 3}))
    write_tokenizer(tmp_path / "tokenizer.json", make_texts(60))
    settings = {"tokenizer": str(tmp_path / "tokenizer.json"), "cache_dir": str(tmp_path / "cache"), "path": "hf:a/b"}
    first, again, moved = (
        make_stream({"data": settings, "length": 32, "global_batch_size": 12, "seed": 3}) for _ in range(3)
    )
    assert [file.hub.revision for file in first.files[""] if file.hub] == ["c0ffee"] * 3
    assert first.fingerprint_of("") == again.fingerprint_of("") != moved.fingerprint_of("")
    with pytest.raises(ValueError, match=r"data\.path=hf:a/b: its commit cannot be looked up"):
        make_stream({"data": settings, "length": 32, "global_batch_size": 12, "seed": 3})


def test_patterns() -> None:
    assert expand("http://a/{00..02}.zst") == ["http://a/00.zst", "http://a/01.zst", "http://a/02.zst"]
    assert expand("http://a/{1..2}/{9..10}") == ["http://a/1/9", "http://a/1/10", "http://a/2/9", "http://a/2/10"]
    assert expand("http://a/b") == ["http://a/b"]


def test_a_dataset_is_opened_again_where_it_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that had come are left out, and the network alone is tried again."""
    monkeypatch.setattr(remote_files, "FIRST_PAUSE_SECONDS", 0.001)
    failures = iter([(3, ConnectionResetError("gone")), (3, TimeoutError("slow")), (7, ConnectionError("gone")), None])

    def stream(part: HubText, fields: Fields) -> Iterator[dict[str, str]]:
        failure = next(failures)
        for number in range(10):
            if failure is not None and number == failure[0]:
                raise failure[1]
            yield {"text": f"text {number}"}

    monkeypatch.setattr("mamba_train.data.hub_text._open", stream)
    part = HubText("somebody/something", None, None, "train", 0, 1)
    found = list(read_hub(part, Fields("text"), patience=PATIENCE))
    assert [(record.number, record.text) for record in found] == [(n + 1, f"text {n}") for n in range(10)]
    failures = iter([(2, KeyError("text"))])
    with pytest.raises(ValueError, match="cannot be read beyond row 2"):
        list(read_hub(part, Fields("text"), patience=PATIENCE))


def test_the_hub_is_asked_once_by_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However many lanes are opened at the same time, and again after a failure."""
    datasets = pytest.importorskip("datasets")
    folder = write_files(tmp_path / "text", [[f"{file} {n}" for n in range(5)] for file in range(3)], ".jsonl")
    load, asked = datasets.load_dataset, []

    def asks(name: str, *arguments: Any, **options: Any) -> Any:
        asked.append(name)
        return load(str(folder), split="train", streaming=True)

    monkeypatch.setattr("datasets.load_dataset", asks)
    parts = [HubText("owner/asked-once", None, "a" * 40, "train", shard, 3) for shard in (0, 1, 2, 0)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: [record.text for record in read_hub(part, Fields("text"))], parts))
    assert found == [[f"{file} {n}" for n in range(5)] for file in (0, 1, 2, 0)]
    assert asked == ["owner/asked-once"]
