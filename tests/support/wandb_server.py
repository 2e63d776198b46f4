"""A W&B server small enough to read: what an online run without artifacts asks for, and no more.

`python wandb_server.py [ok|hang|error]` prints its address and serves until killed. GET /state tells what arrived.
`hang` takes requests and never answers, `error` answers 500 to everything; POST /mode changes it.
"""

import base64
import gzip
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STATE = {"mode": sys.argv[1] if len(sys.argv) > 1 else "ok", "runs": {}}
ENTITY = {"id": "RW50aXR5", "name": "local"}


def graphql(query, variables):
    """Answers by the kind of question, recognised by the field it asks for."""
    name = variables.get("name") or variables.get("id")
    known = STATE["runs"].get(name)
    if "upsertBucket" in query:
        run = STATE["runs"].setdefault(name, {"rows": [], "summary": {}, "exit": None, "lines": {}})
        run["config"] = json.loads(variables.get("config") or "{}")
        project = {"id": "UHJvamVjdA==", "name": variables.get("project") or "p", "entity": ENTITY}
        bucket = {
            "id": base64.b64encode(name.encode()).decode(), "name": name, "displayName": variables.get("displayName"),
            "description": "", "config": "{}", "sweepName": None, "project": project,
            "historyLineCount": len(run["rows"]),
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": known is None}}
    if "historyTail" in query:
        return {
            "model": {"id": "UHJvamVjdA==", "name": "p", "entity": ENTITY, "bucket": known and resumed(name, known)}
        }
    if "createRunFiles" in query:
        return {"createRunFiles": {"runID": name, "uploadHeaders": [], "files": []}}
    if "viewer" in query:
        return {"viewer": {"id": "VXNlcg==", "entity": "local", "username": "u", "email": "", "flags": "{}",
                           "teams": {"edges": []}, "admin": False}}  # fmt: skip
    return {"serverInfo": {"features": []}} if "serverInfo" in query else {}


def resumed(name, run):
    tail = json.dumps([json.dumps(row) for row in run["rows"][-1:]])
    return {
        "id": "eA==", "name": name, "displayName": name, "summaryMetrics": json.dumps(run["summary"]), "config": "{}",
        "historyLineCount": len(run["rows"]), "eventsLineCount": 0, "logLineCount": 0, "historyTail": tail,
        "eventsTail": "[]", "tags": [], "wandbConfig": '{"t": 1}',
    }  # fmt: skip


def file_stream(name, body):
    run = STATE["runs"][name]
    for file, chunk in (body.get("files") or {}).items():
        if file == "wandb-history.jsonl":
            rows = [json.loads(line) for line in chunk["content"]]
            run["rows"][chunk["offset"] : chunk["offset"] + len(rows)] = rows
        elif file == "wandb-summary.json":
            run["summary"] = json.loads(chunk["content"][-1])
    if body.get("complete"):
        run["exit"] = body.get("exitcode")
    return {"exitcode": None, "limits": {}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, value, code=200):
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def do_GET(self):
        self.answer(STATE if self.path == "/state" else {})

    def do_PUT(self):
        self.body()
        self.answer({})

    def do_POST(self):
        content = self.body()
        if self.path == "/mode":
            STATE["mode"] = content.decode()
            return self.answer({})
        if STATE["mode"] == "hang":
            time.sleep(3600)
        if STATE["mode"] == "error":
            return self.answer({"error": "out of order"}, 500)
        if self.path.endswith("/graphql"):
            question = json.loads(content)
            return self.answer({"data": graphql(question["query"], question.get("variables") or {})})
        if self.path.endswith("/file_stream"):
            return self.answer(file_stream(self.path.split("/")[-2], json.loads(content)))
        return self.answer({})


if __name__ == "__main__":
    ThreadingHTTPServer.daemon_threads = True
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()
