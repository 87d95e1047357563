"""As much of a wandb server as a client needs to start a run, to go on with it and to send its history."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """histories: the records of each run by its id, as the client has sent them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.histories: dict[str, list[dict[str, Any]]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """What a GraphQL query gets."""
        project = {"id": "p", "name": "project", "entity": {"id": "e", "name": "someone"}}
        if "upsertBucket" in query:
            bucket = {"id": "b", "name": variables["name"], "displayName": "run", "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}
        if "RunResumeStatus" in query:
            history = self.histories.get(variables["name"])
            return {"model": {**project, "bucket": history and self._bucket(variables["name"], history)}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.address}/file/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "u", "entity": "someone", "username": "someone", "flags": "{}"}}
        return {"serverInfo": {"features": []}}

    def _bucket(self, name: str, history: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": "b", "name": name, "displayName": "run", "config": "{}", "tags": [], "wandbConfig": '{"t": 1}',
            "historyLineCount": len(history), "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]",
            "historyTail": json.dumps([json.dumps(history[-1])]), "summaryMetrics": json.dumps(history[-1]),
        }  # fmt: skip

    def receive(self, run_id: str, lines: list[str], offset: int) -> None:
        """Lines of a run's history, which stand from `offset` on."""
        history = self.histories.setdefault(run_id, [])
        history[offset : offset + len(lines)] = map(json.loads, lines)


class Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        reply: dict[str, Any] = {}
        if self.path == "/graphql":
            question = json.loads(body)
            reply = {"data": self.server.answer(question["query"], question.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if history:
                self.server.receive(self.path.split("/")[-2], history["content"], history["offset"])
        text = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_GET = do_POST

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
