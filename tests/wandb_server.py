"""A fake W&B server: the part of its GraphQL and file streams that is needed to record what runs send."""

import gzip
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USER = {"id": "VXNlcjox", "entity": "team", "username": "me", "email": "me@localhost", "flags": "{}", "name": "me",
        "teams": {"edges": [{"node": {"name": "team"}}]}}  # fmt: skip


class StandIn:
    """Records what runs send; inside `with StandIn() as server` it serves at `server.url`.

    Attributes:
        runs: by id: the newest value of each variable of its upsert: config, groupName, jobType, tags, …
        lines: by id: rows of its history by line number; a line that is sent twice replaces the first.
        exit_codes: by id: one per end of the run.
        files: by (run or kind, name): contents.
        operations: names of the GraphQL operations, in order.
        artifacts: names of the artifacts that were created.
        is_silent: whether the server stops answering.
    """

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.lines: dict[str, dict[int, dict[str, Any]]] = {}
        self.exit_codes: dict[str, list[int]] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.operations: list[str] = []
        self.artifacts: list[str] = []
        self.is_silent = False
        self._answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "Viewer": lambda _: {"viewer": USER},
            "RunResumeStatus": self._resume_status,
            "UpsertBucket": self._upsert,
            "CreateRunFiles": self._create_files,
            "": lambda _: {
                "project": {"artifact": None}
            },  # the kind of an existing artifact of this name: there is none
            "CreateArtifact": self._create_artifact,
            "CreateArtifactManifest": self._create_manifest,
            "CreateArtifactFiles": self._create_artifact_files,
            "ServerFeaturesQuery": lambda _: {"serverInfo": {"features": []}},
            "CommitArtifact": lambda v: {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": "0"}}},
        }

    def __enter__(self) -> "StandIn":
        self._server = _Server(("127.0.0.1", 0), type("Bound", (_Handler,), {"stand_in": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_silent = False
        self._server.shutdown()
        self._server.server_close()

    def history(self, run: str) -> list[dict[str, Any]]:
        """Return a run's rows."""
        return [line for _, line in sorted(self.lines[run].items())]

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the data of one GraphQL operation; unknown operations get none, as from another version."""
        self.operations.append(operation)
        return self._answers.get(operation, lambda _: {})(variables)

    def stream(self, run: str, sent: dict[str, Any]) -> None:
        """Record what a run streams."""
        history = sent.get("files", {}).get("wandb-history.jsonl")
        for number, line in enumerate(history["content"] if history else (), (history or {}).get("offset", 0)):
            self.lines.setdefault(run, {})[number] = json.loads(line)
        if sent.get("complete"):
            self.exit_codes.setdefault(run, []).append(sent["exitcode"])

    def _resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        known = self.runs.get(variables["name"])
        if known is None:
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "team"}, "bucket": None}}
        rows = self.history(variables["name"]) if variables["name"] in self.lines else []
        counts = {"historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "eventsTail": "[]"}
        told = {key: known.get(key) for key in ("displayName", "config", "tags", "notes")}
        bucket = {"id": "b", "name": variables["name"], **counts, **tails, **told, "wandbConfig": '{"t": 1}',
                  "summaryMetrics": known.get("summaryMetrics") or "{}"}  # fmt: skip
        return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "team"}, "bucket": bucket}}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        inserted = name not in self.runs
        self.runs.setdefault(name, {}).update({k: v for k, v in variables.items() if v is not None})
        project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "team"}}
        bucket = {"id": "b", "name": name, "displayName": self.runs[name].get("displayName"), "description": None,
                  "config": self.runs[name].get("config"), "sweepName": None, "project": project,
                  "historyLineCount": len(self.lines.get(name, {}))}  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _create_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": n, "uploadUrl": f"{self.url}/upload/{variables['run']}/{n}"} for n in variables["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}

    def _create_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append(variables["input"]["artifactCollectionName"])
        sequence = {"id": "s", "latestArtifact": None}
        artifact = {"id": str(len(self.artifacts)), "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def _create_manifest(self, _: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/upload/manifest/m"
        file = {"id": "f", "name": "m", "displayName": "m", "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def _create_artifact_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {"storagePath": f["name"], "uploadUrl": f"{self.url}/upload/artifact/{f['name']}", "uploadHeaders": [],
             "uploadMultipartUrls": None, "artifact": {"id": f["artifactID"]}}
            for f in variables["input"]["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Log nothing, because clients may disconnect at any time."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: StandIn

    def do_GET(self) -> None:
        self._send({})

    def do_PUT(self) -> None:
        _, _, run, name = self.path.split("/", 3)
        self.stand_in.files[run, name] = self._body()
        self._send({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            asked = json.loads(body)
            self._send({"data": self.stand_in.answer(asked["operationName"], asked.get("variables") or {})})
            return
        if self.path.endswith("/file_stream"):
            self.stand_in.stream(self.path.split("/")[-2], json.loads(body))
        self._send({})

    def _body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def _send(self, answer: dict[str, Any]) -> None:
        while self.stand_in.is_silent:
            time.sleep(0.1)
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Log nothing."""
