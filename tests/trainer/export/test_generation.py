"""Text from runs, exports, adapters and folders, in this process and through a real pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import chatting
import pytest
import torch
import transformers
from command_line import command
from finished import finished
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoestring.trainer.export.generation import Sampling, TextModel, open_text_model
from shoestring.trainer.export.trained import CannotExport, open_run
from shoestring.trainer.export.write import export

pytestmark = pytest.mark.filterwarnings("ignore")
GREEDY = Sampling(max_tokens=12, temperature=0)
ASKED = [{"role": "user", "content": "Say one two."}]


@pytest.fixture(scope="module")
def run(runs: Path) -> Path:
    return chatting.chatting(runs / "chatting")


def said(model: TextModel, sampling: Sampling = GREEDY) -> str:
    pieces: list[str] = []
    whole, dropped = model.answer(ASKED, sampling, pieces.append)
    assert dropped == 0 and "".join(pieces) == whole
    return whole


def test_a_run_its_adapter_and_its_merged_export_say_the_same_as_transformers(run: Path, tmp_path: Path) -> None:
    trained = open_run(run)
    export(trained, "peft", out=tmp_path / "peft")
    merged = export(trained, "hf", out=tmp_path / "hf").path
    tokenizer, model = AutoTokenizer.from_pretrained(merged), AutoModelForCausalLM.from_pretrained(merged)
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    theirs = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert theirs.strip()
    assert [said(open_text_model(str(name))) for name in (run, tmp_path / "peft", merged)] == [theirs] * 3
    assert said(open_text_model(str(run.parent / "base"))) != theirs, "the base has not learnt it"


def test_a_run_on_chats_ends_with_answers_to_its_prompts(run: Path) -> None:
    sample = json.loads((run / "report.json").read_text())["sample"]
    answers = sample.split("Say one two.\n")[1].split("\n\nSay six six.\n")
    assert len(answers) == 2 and all(answer.strip() for answer in answers)
    assert not any("<|im_" in answer for answer in answers)


def test_a_run_is_read_without_its_data(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chats = run.parent / "chats.jsonl"
    moved = chats.rename(tmp_path / "away.jsonl")
    try:
        assert said(open_text_model(str(run)))
    finally:
        moved.rename(chats)


def test_the_same_seed_gives_the_same_text_and_moves_no_random_numbers(run: Path) -> None:
    model = open_text_model(str(run))
    drawn = [Sampling(max_tokens=12, temperature=1.5, top_p=1.0, seed=seed) for seed in (3, 3, 4)]
    state = torch.get_rng_state()
    texts = [said(model, each) for each in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)
    few = Sampling(max_tokens=12, temperature=1.5, top_p=1e-6)
    assert said(model, few) == said(model), "of the likeliest share of nothing, the likeliest token"


def test_old_exchanges_are_left_out_when_the_window_is_full(run: Path) -> None:
    model = open_text_model(str(run))
    history = [
        each
        for _ in range(12)
        for each in ({"role": "user", "content": "Say one two."}, {"role": "assistant", "content": "one two!"})
    ]
    whole, dropped = model.answer([{"role": "system", "content": "user"}, *history, *ASKED], GREEDY, lambda text: None)
    assert whole and 0 < dropped < 12
    with pytest.raises(CannotExport, match=r"has \d+ tokens, and .*run reads at most 128"):
        model.complete("two and three " * 60, GREEDY, lambda text: None)


def test_what_cannot_speak_is_refused_by_name(
    run: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    plain = chatting.base(tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    digits = finished("digits", runs)
    export(open_run(digits), "torch", out=tmp_path / "torch")
    for words, expected in (
        (["generate", str(tmp_path / "bert"), "Hello"], "BertForSequenceClassification, which cannot generate text"),
        (["generate", str(digits), "Hello"], "MLP, which cannot generate text"),
        (["generate", str(tmp_path / "torch"), "Hello"], "is an export to torch"),
        (["chat", str(tmp_path / "empty")], "is no run, no adapter and no Hugging Face folder"),
        (["generate", "nothing", "Hello"], "no run 'nothing'"),
        (["chat", str(plain)], "has no chat template"),
        (["generate", str(run), "Hello", "--temperature", "-1"], "--temperature -1.0: a number from 0"),
        (["generate", str(run), "Hello", "--best"], "has kept no best weights"),
    ):
        assert command(monkeypatch, *words) == 2, words
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and expected in error, error


def test_prompts_are_asked_where_there_is_a_template_and_continued_where_there_is_none(
    run: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--max-tokens", "12", "--temperature", "0"]
    model = open_text_model(str(run))
    assert command(monkeypatch, "generate", str(run), "Say one two.", *few) == 0
    assert capsys.readouterr().out.strip() == said(model).strip()
    plain = open_text_model(str(finished("llama", runs)))  # whose weights are whole, and which has no template
    assert command(monkeypatch, "generate", str(finished("llama", runs)), "def f(", *few) == 0
    assert capsys.readouterr().out.rstrip("\n") == plain.complete("def f(", GREEDY, lambda text: None).rstrip("\n")
    assert command(monkeypatch, "generate", str(run), "two and", "--raw", *few) == 0
    assert capsys.readouterr().out.rstrip("\n") == model.complete("two and", GREEDY, lambda text: None).rstrip("\n")


def test_a_chat_through_a_pipe_remembers_and_ends(run: Path) -> None:
    words = ["chat", str(run), "--temperature", "0", "--max-tokens", "12"]
    done = subprocess.run(
        [sys.executable, "-m", "shoestring.trainer.cli", *words],
        input="Say one two.\n\nSay six one.\n/exit\nSay no.\n",
        env={**os.environ}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = open_text_model(str(run))
    first = said(model)
    again = [*ASKED, {"role": "assistant", "content": first}, {"role": "user", "content": "Say six one."}]
    second, _ = model.answer(again, GREEDY, lambda text: None)
    assert done.stdout.split("\n")[:2] == [first, second] and len(done.stdout.strip().split("\n")) == 2
