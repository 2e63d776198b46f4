"""What an export says of itself, and where it can be sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import chatting
import pytest
from command_line import command
from huggingface_hub import ModelCard

from shoestring.trainer.export.model_card import is_hub_id
from shoestring.trainer.export.trained import open_run
from shoestring.trainer.export.write import export
from shoestring.trainer.ledger.identity import read_summary

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def run(runs: Path) -> Path:
    return chatting.chatting(runs / "chatting")


@pytest.mark.parametrize("to", ["hf", "peft"])
def test_the_card_has_cost_data_recipe_base_and_licence(run: Path, to: str, tmp_path: Path) -> None:
    base = run.parent / "base"
    (base / "README.md").write_text("---\nlicense: mit\n---\n# A base\n")
    try:
        export(open_run(run), to, out=tmp_path / "out")
    finally:
        (base / "README.md").unlink()
    card, spent = ModelCard.load(tmp_path / "out" / "README.md"), read_summary(run)
    assert card.data.license == "mit", "as its base"
    assert card.data.library_name == {"hf": "transformers", "peft": "peft"}[to]
    assert card.data.pipeline_tag == "text-generation" and {"shoestring", "lora"} <= set(card.data.tags)
    assert card.data.base_model is None, "a folder here is none of the hub's"
    for expected in (
        f"| money | ${spent['usd']:.4g} |", f"| energy | {spent['kwh']:.3g} kWh, {spent['kwh_source']} |",
        f"| tokens | {spent['tokens']:,.0f} |", "| ended by | steps |",
        f"| val_loss | {spent['metrics']['val_loss']:.6g} |",
        f"| source | `{run.parent / 'chats.jsonl'}` |", "held out |", "| trained on |", f"It began as `{base}`",
        "kind: lora", "steps: 12", "chatting", "torch ",
    ):  # fmt: skip
        assert expected in card.text, expected
    block = card.text.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(block.replace("PATH", str(tmp_path / "out")), names)
    assert type(names["model"]).__name__ == {"hf": "LlamaForCausalLM", "peft": "PeftModelForCausalLM"}[to]


def test_a_licence_that_nobody_has_stated_is_asked_for_and_a_stated_one_stands(run: Path, tmp_path: Path) -> None:
    export(open_run(run), "peft", out=tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "unknown" and "whoever publishes this has to choose one" in card.text
    export(open_run(run), "peft", out=tmp_path / "out", license="apache-2.0")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "apache-2.0"


def test_only_names_of_the_hub_are_named_as_its_base() -> None:
    assert is_hub_id("meta-llama/Llama-3.1-8B")
    assert not any(map(is_hub_id, (None, "gpt2-of-mine", "/models/x", "runs/quickstart/model", "tests/trainer")))


# -- a hub -------------------------------------------------------------------------------------------------------------
class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as an upload of small files takes; keeps what comes."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.path, self.headers.get("Authorization")))  # type: ignore[attr-defined]
        address = f"http://{self.headers['Host']}/me/model"
        if self.path.endswith("/repos/create"):
            self.server.made = json.loads(body)  # type: ignore[attr-defined]
            return self._answer({"url": address, "name": "me/model", "id": "me/model"})
        if self.path.endswith("/validate-yaml"):
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])  # type: ignore[attr-defined]
        return self._answer({"commitUrl": f"{address}/commit/1", "commitOid": "1", "hookOutput": "", "success": True})

    def do_GET(self) -> None:
        self._answer({"id": "me/model", "sha": "0", "siblings": []})

    def _answer(self, value: object) -> None:
        text = json.dumps(value).encode()
        self.send_response(200 if self.server.open else 403)  # type: ignore[attr-defined]
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.files, server.open = [], {}, True  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_export_is_pushed_whole_when_told(
    run: Path,
    tmp_path: Path,
    hub: ThreadingHTTPServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["export", str(run), "--to", "peft", "--out", str(tmp_path / "out"), "--json"]
    assert command(monkeypatch, *words) == 0 and not hub.requests, "never unasked"  # type: ignore[attr-defined]
    capsys.readouterr()
    assert command(monkeypatch, *words, "--push", "me/model") == 0
    assert json.loads(capsys.readouterr().out)["pushed_to"].endswith("/me/model")
    assert hub.files == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}  # type: ignore[attr-defined]
    assert hub.made.get("visibility") == "private" or hub.made["private"] is True  # type: ignore[attr-defined]
    assert {token for _, token in hub.requests} == {"Bearer hf_secret"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("state", "said"), [("closed", "answers 403"), ("gone", "cannot be reached"), ("named", "owner/name")]
)
def test_a_push_that_fails_is_one_line_and_leaves_the_export(
    state: str, said: str, run: Path, tmp_path: Path, hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hub.open = state != "closed"  # type: ignore[attr-defined]
    if state == "gone":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    repo = "not a name" if state == "named" else "me/model"
    words = ["export", str(run), "--to", "peft", "--out", str(tmp_path / "out"), "--push", repo]
    assert command(monkeypatch, *words) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and said in error[0] and f"The export stays in {tmp_path / 'out'}" in error[0], error
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
