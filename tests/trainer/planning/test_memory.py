"""What fills the memory, term by term: against derivations written out here, and against what a run really held."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoestring.callbacks.contract import Effect
from shoestring.cluster.load import load_cluster
from shoestring.recipes import load_recipe
from shoestring.strategies import LARGEST_BUCKET, Sharding
from shoestring.trainer import Plan, plan
from shoestring.trainer.cli.app import main
from shoestring.trainer.jobs.submit import job_for
from shoestring.trainer.planning.activations import Checkpointing
from shoestring.trainer.planning.alternatives import SHOWN
from shoestring.trainer.planning.fitting import CannotFit
from shoestring.trainer.planning.memory import memory
from shoestring.trainer.planning.needs import Inputs, Memory
from shoestring.trainer.planning.sizes import Size
from shoestring.trainer.tasks.optimizers.cards import OPTIMIZERS, OptimizerCard

GIB = 2**30
LLAMA = "model_type: llama, num_key_value_heads: 8, vocab_size: 128256, hidden_size"
LLAMA_8B = f"{{{LLAMA}: 4096, num_hidden_layers: 32, num_attention_heads: 32, intermediate_size: 14336}}"
LLAMA_70B = f"{{{LLAMA}: 8192, num_hidden_layers: 80, num_attention_heads: 64, intermediate_size: 28672}}"
IN_BF16 = "strategy.gradient_dtype=bf16"
ROUGH = Sharding(gradient_dtype="bf16")
LORA = "model.adapter={kind: lora, rank: 16}"
P8, P70 = 8.03e9, 70.55e9  # parameters, as published
TOKENS = 4096


def planned(config: str, devices: int, *changes: str) -> Plan:
    fixed = ["techniques=[gradient_checkpointing]", "cluster.hardware=h100-sxm", "export=null"]
    fixed += [f"data.sequence_length={TOKENS}", "data.micro_batch_size=1", "data.batch_size=64", "strategy.name=auto"]
    shape = [f"model.config={config}", f"strategy.devices={devices}", "model.chunked_loss=false"]
    return plan(load_recipe("quickstart", [*fixed, *shape, *changes]))


def refused(config: str, devices: int, *changes: str) -> str:
    with pytest.raises(CannotFit) as error:
        planned(config, devices, *changes)
    assert error.value.exit_code == 2
    return str(error.value)


def alive(made: Plan) -> float:
    """At the fullest moment, without what an allocator loses."""
    return made.predictions["memory_bytes"] - made.predictions["memory_terms"]["fragmentation"]


def logits(vocabulary: int = 128256, tokens: int = TOKENS) -> float:
    """16 bits, float32, its softmax, the gradients of softmax and loss, and of the 16 bits: 2 + 4 + 4 + 4 + 2."""
    return (2 + 4 + 4 + 4 + 2) * vocabulary * tokens


def test_8b_in_full_on_eight_is_what_was_derived() -> None:
    """ZeRO-2: 16-bit weights whole; gradients, masters and two moments by eight; then logits, or the step."""
    made = planned(LLAMA_8B, 8, "strategy.name=zero2", IN_BF16)
    states = 2 * P8 + (2 + 4 + 8) * P8 / 8
    assert states / GIB == pytest.approx(28, rel=0.02)
    step = states + 4 * P8 / 8  # gradients in float32; AdamW is fused, and copies nothing
    entries = 2 * 4096 * 32 * TOKENS  # what enters each block, in 16 bits
    loss = states + logits() + entries
    assert alive(made) == pytest.approx(max(step, loss) + 1.25 * GIB, rel=0.02)
    terms = made.predictions["memory_terms"]
    assert made.predictions["state_bytes"] == pytest.approx(states, rel=0.01)
    assert terms["logits"] == pytest.approx(logits(), rel=0.01)
    assert terms["activations"] == pytest.approx(entries, rel=0.01)
    assert 9e9 < terms["activations"] + terms["logits"] < 10e9


def test_gradients_summed_in_float32_are_twice_as_large_and_need_no_copy_to_be_stepped() -> None:
    made = planned(LLAMA_8B, 8, "strategy.name=zero2")
    states = 2 * P8 + (4 + 4 + 8) * P8 / 8
    assert made.predictions["state_bytes"] == pytest.approx(states, rel=0.01)
    loss = states + logits() + 2 * 4096 * 32 * TOKENS
    assert alive(made) == pytest.approx(max(states + 4 * P8 / 8, loss) + 1.25 * GIB, rel=0.02)


def test_8b_in_full_on_eight_with_zero3_is_what_was_derived() -> None:
    made = planned(LLAMA_8B, 8, "strategy.name=zero3", IN_BF16)
    states, gathered, bucket = 16 * P8 / 8, 2 * 1e9, 2 * 1e8
    assert 16.5 < (states + gathered + bucket) / GIB < 20
    terms = made.predictions["memory_terms"]
    counted = made.predictions["state_bytes"] + terms["gathered layers"] + terms["communication buckets"]
    assert counted == pytest.approx(states + gathered + bucket, rel=0.15)
    entries = 2 * 4096 * 32 * TOKENS
    assert alive(made) == pytest.approx(states + gathered + logits() + entries + 1.25 * GIB, rel=0.15)


def test_8b_in_full_on_eight_with_fsdp2_is_what_was_derived() -> None:
    """Masters, gradients and moments in float32 by eight; whole: three blocks, the embeddings, and their gradients."""
    made = planned(LLAMA_8B, 8, "strategy.name=fsdp2")
    terms = made.predictions["memory_terms"]
    assert made.predictions["state_bytes"] == pytest.approx((4 + 4 + 8) * P8 / 8, rel=0.01)
    outside = 2 * 128256 * 4096
    whole = outside + 3 * (P8 - outside) / 32
    assert terms["gathered layers"] == pytest.approx(2 * whole, rel=0.01)
    assert terms["communication buckets"] == pytest.approx((2 + 4) * whole, rel=0.01)
    assert "gradients in float32" not in terms and "weights" not in terms
    adapters = planned(LLAMA_8B, 8, "strategy.name=fsdp2", LORA).predictions["memory_terms"]
    assert adapters["frozen weights"] == pytest.approx(2 * P8 / 8, rel=0.01)


def test_8b_lora_on_one_is_what_was_derived() -> None:
    made = planned(LLAMA_8B, 1, LORA, "model.dtype=fp32")
    base, adapters = 4 * P8, 16 * 42e6
    entries, head = 4 * 4096 * 32 * TOKENS, 2 * 128256 * 4096  # float32 between blocks; the output layer in 16 bits
    derived = base + adapters + entries + head + logits() + 0.75 * GIB
    assert derived / GIB == pytest.approx(42, rel=0.05)
    assert alive(made) == pytest.approx(derived, rel=0.15)
    assert made.strategy == "single"


def test_8b_lora_on_a_base_in_16_bits_is_what_was_derived() -> None:
    made = planned(LLAMA_8B, 1, LORA)
    derived = 2 * P8 + 16 * 42e6 + 2 * 4096 * 32 * TOKENS + logits() + 0.75 * GIB
    assert derived / GIB == pytest.approx(24, rel=0.15)
    assert alive(made) == pytest.approx(derived, rel=0.15)
    in_chunks = planned(LLAMA_8B, 1, LORA, "model.chunked_loss=auto")
    assert in_chunks.predictions["memory_terms"]["logits"] == pytest.approx(16 * 2**25)


def test_8b_in_full_on_one_is_refused_with_changes_that_fit() -> None:
    said = refused(LLAMA_8B, 1)
    kept = (4 + 4 + 8) * P8  # gradients stay from one micro-batch to the next; the fused step copies nothing
    copies, entries = 2 * (P8 - 128256 * 4096), 4 * 4096 * 32 * TOKENS  # in 16 bits of all but embeddings; float32
    loss = kept + copies + entries + logits()
    assert (
        f"needs {loss / GIB + 0.75:.1f} GiB a device, and h100-sxm has 79.2 GiB. At its fullest moment, the loss"
        in said
    )
    assert "optimizer states 59.8 GiB, weights 29.9 GiB, gradients 29.9 GiB" in said
    proposals_fit(said, LLAMA_8B, 1)
    block = 1.3  # computed again in backward, where gradients come to be
    once = refused(LLAMA_8B, 1, "data.batch_size=1")
    assert f"needs {(kept + entries) / GIB + block + 0.75:.1f} GiB a device" in once and "moment, the backward" in once


def test_70b_in_full_on_eight_is_refused_with_changes_that_fit() -> None:
    said = refused(LLAMA_70B, 8)
    states = (2 + 4 + 4 + 8 + 4) * P70 / 8  # with ZeRO-3, and gradients in float32 for the step
    assert f"needs {states / GIB + 1.25:.1f} GiB a device" in said
    proposals_fit(said, LLAMA_70B, 8)


def proposals_fit(said: str, config: str, devices: int) -> None:
    lines = said.split("cheapest first:\n")[1].splitlines()
    assert len(lines) == SHOWN
    for line in lines:
        words, need = line.strip().split("   (")
        made = planned(config, devices, *shlex.split(words))
        assert made.predictions["memory_bytes"] <= made.predictions["memory_available_bytes"]
        assert need.startswith(f"{made.predictions['memory_bytes'] / GIB:.1f} GiB a device")


def test_the_command_line_refuses_before_anything_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"model.config={LLAMA_8B}", "cluster.hardware=h100-sxm", "strategy={name: single}", "export=null"]
    for command in ("plan", "train"):
        monkeypatch.setattr("sys.argv", ["shoestring", command, "quickstart", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
    assert not (tmp_path / "runs").exists()


def test_host_memory_is_checked() -> None:
    changes = ["strategy.name=zero2", "strategy.offload=optimizer"]
    made = planned(LLAMA_8B, 1, *changes, "cluster.host_memory_gib=256")
    terms = made.predictions["host_terms"]
    offloaded = sum(terms[f"offloaded {name}"] for name in ("master weights", "gradients", "optimizer states"))
    assert offloaded == pytest.approx(16 * P8, rel=0.01)
    more = planned(LLAMA_8B, 1, "strategy.name=zero3", "strategy.offload=parameters", "cluster.host_memory_gib=256")
    assert more.predictions["host_terms"]["offloaded weights"] == pytest.approx(2 * P8, rel=0.01)
    said = refused(LLAMA_8B, 1, *changes, "cluster.host_memory_gib=128")
    assert "GiB of host memory a node, and there are 128.0 GiB: offloaded optimizer states 59.8 GiB" in said


def test_a_job_that_cannot_fit_is_not_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "cluster.yaml"
    path.write_text("{name: there, engine: local, devices_per_node: 1, hardware: h100, limits: {hours: 1}}")
    shape = [f"model.config={LLAMA_8B}", "techniques=[gradient_checkpointing]", "strategy.name=single"]
    with pytest.raises(CannotFit, match=r"a device, and h100-sxm has 79\.2 GiB"):
        job_for("quickstart", shape, load_cluster(path))
    assert job_for("quickstart", ["strategy.name=single"], load_cluster(path)).devices_per_node == 1


# -- the formulas' inputs ------------------------------------------------------------------------------------------
MILLION = Size(parameters=10**6, trainable=10**6, active=10**6, inside=8 * 10**5, largest=10**4, layers=2)
ADAPTED = Size(parameters=10**6, trainable=10**4, active=10**6, inside=8 * 10**5, largest=10**4, layers=2)


def needed(size: Size, strategy: str, devices: int = 2, **changes: Any) -> Memory:
    usual: dict[str, Any] = {"length": 1, "micro": 1, "accumulate": 2, "nodes": 1, "offload": "none"}
    usual |= {"accelerator": "cuda", "precision": "bf16", "strategy": strategy, "devices": devices, "size": size}
    return memory(Inputs(**(usual | changes)))


def megabytes(need: Memory, *names: str) -> float:
    return round(sum(term.bytes for term in need.device if term.name in names) / 1e6, 3)


STATES = ("weights", "master weights", "optimizer states", "gradients")


@pytest.mark.parametrize(
    ("strategy", "bf16", "fp32"),
    [("ddp", 16, 16), ("zero1", 4 + 12 / 2, 8 + 12 / 2), ("zero2", 2 + 14 / 2, 4 + 16 / 2), ("zero3", 16 / 2, 20 / 2)],
)
def test_states_of_every_strategy(strategy: str, bf16: float, fp32: float) -> None:
    assert megabytes(needed(MILLION, strategy, sharding=ROUGH), *STATES) == bf16
    more = {"ddp": 0, "zero1": 2}.get(strategy, 2 / 2)  # where gradients are summed in float32
    assert megabytes(needed(MILLION, strategy), *STATES) == bf16 + more
    assert megabytes(needed(MILLION, strategy, precision="fp32"), *STATES) == fp32
    lion = OPTIMIZERS["lion"]
    assert megabytes(needed(MILLION, strategy, optimizer=lion), "optimizer states") == (4 if strategy == "ddp" else 2)
    muon = megabytes(needed(MILLION, strategy, optimizer=OPTIMIZERS["muon"]), "optimizer states")
    assert muon * (1 if strategy == "ddp" else 2) == pytest.approx(0.8 * 4 + 0.2 * 8), "AdamW outside of blocks"
    kept = [needed(MILLION, strategy, optimizer=OPTIMIZERS[name]) for name in ("soap", "apollo")]
    soap, apollo = (megabytes(need, "optimizer states") for need in kept)
    split, whole = (1 if strategy == "ddp" else 2), (2 if strategy in ("zero1", "zero2") else 1)
    assert soap == pytest.approx(8 / split + 0.8 * 2 * 8 / whole, abs=1e-3), "a side's products and basis, on each rank"
    assert apollo == pytest.approx(0.2 * 8 / split + 0.8 * 2 / whole, abs=1e-3)
    adapted = megabytes(needed(ADAPTED, strategy, optimizer=OPTIMIZERS["muon"]), "optimizer states")
    assert adapted * (1 if strategy == "ddp" else 2) == pytest.approx(0.04), "all that trains are matrices in blocks"


def test_copies() -> None:
    assert megabytes(needed(MILLION, "ddp"), "gradient buckets") == 4
    assert megabytes(needed(MILLION, "single", 1), "gradient buckets") == 0
    assert megabytes(needed(MILLION, "ddp"), "autocast copies") == 2
    assert megabytes(needed(MILLION, "ddp", precision="fp32"), "autocast copies") == 0
    assert megabytes(needed(MILLION, "zero2"), "autocast copies") == 0
    assert megabytes(needed(MILLION, "zero3"), "gathered layers") == 2


COPY = "optimizer's temporary copy"


@pytest.mark.parametrize(
    ("name", "on_cuda", "on_cpu", "of_a_shard"),
    [("adamw", 0, 0, 0), ("sgd", 0, 0, 0), ("lion", 0.04, 0.04, 2), ("schedule_free_adamw", 0.04, 0.04, 2),
     ("adamw8bit", 16, 16, 8), ("adafactor", 0.08, 0.08, 0.08), ("muon", 0.2, 0.2, 0.2)],
)  # fmt: skip
def test_the_step_copies_what_the_optimizer_steps_at_a_time(
    name: str, on_cuda: float, on_cpu: float, of_a_shard: float
) -> None:
    """Nothing, one parameter, a rank's whole shard, or a chunk, which here is larger than the model."""
    card = OPTIMIZERS[name]
    assert megabytes(needed(MILLION, "ddp", optimizer=card), COPY) == on_cuda
    assert megabytes(needed(MILLION, "ddp", optimizer=card, accelerator="cpu"), COPY) == on_cpu
    assert megabytes(needed(MILLION, "zero2", optimizer=card), COPY) == of_a_shard
    moved = needed(MILLION, "zero2", optimizer=card, offload="optimizer")
    assert megabytes(moved, COPY) == 0
    host = {term.name: term.bytes for term in moved.host}
    assert host["offloaded " + COPY] == 2 * of_a_shard * 1e6, "of two ranks"


def test_a_step_in_backward_has_one_gradient_and_no_buckets() -> None:
    for strategy in ("single", "ddp"):
        need = needed(MILLION, strategy, accumulate=1, in_backward=True, optimizer=OptimizerCard(make="own"))
        assert megabytes(need, "gradients") == megabytes(need, COPY) == 0.04, "of the largest matrix"
        assert megabytes(need, "gradient buckets") == 0
        assert {"gradients", COPY} <= {term.name for term in need.at("backward")}
        assert not {"gradients", COPY} & {term.name for term in need.at("step")}


def test_an_optimizer_of_somebody_else_is_thought_to_step_as_torchs_do() -> None:
    """All parameters together on CUDA, where torch loops over lists of them; one at a time on a CPU."""
    own = OptimizerCard(make="own")
    assert megabytes(needed(MILLION, "ddp", optimizer=own), COPY) == 4
    assert megabytes(needed(MILLION, "ddp", optimizer=own, accelerator="cpu"), COPY) == 0.04
    assert megabytes(needed(MILLION, "zero2", optimizer=own), COPY) == 2


@pytest.mark.parametrize(
    ("strategy", "settings", "bytes_"),
    [
        ("zero2", {}, 2 + 4),  # in 16 bits side by side, and summed in float32
        ("zero2", {"gradient_dtype": "bf16"}, 2),
        ("zero2", {"overlap": True}, 2 + 2 + 4),
        ("zero1", {}, 4 + 4),
        ("zero3", {}, 4 + 4),
        ("zero3", {"overlap": True}, 4 + 4),
        ("zero3", {"gradient_dtype": "bf16"}, 2),
    ],
)
def test_buckets_are_as_large_as_they_are_asked_to_be(strategy: str, settings: dict[str, Any], bytes_: int) -> None:
    def counted(count: int | str, accelerator: str = "cuda", size: Size = MILLION) -> float:
        sharding = Sharding(reduce_bucket=count, **settings)  # type: ignore[arg-type]
        return megabytes(needed(size, strategy, sharding=sharding, accelerator=accelerator), "communication buckets")

    assert counted("auto") == counted("auto", "cpu") == bytes_, "as large as the model"
    assert counted(5 * 10**8) == 500 * bytes_, "allocated whole"
    assert counted(5 * 10**8, "cpu") == bytes_, "and not touched"
    large = replace(MILLION, parameters=10**9, trainable=10**9)
    assert counted("auto", size=large) == LARGEST_BUCKET / 1e6 * bytes_


def test_what_is_offloaded_is_summed_where_deepspeed_sums_it() -> None:
    """ZeRO-2 sums in float32 on the device, and in 16 bits on the host; ZeRO-3 always on the host."""
    fine, rough = (needed(MILLION, "zero2", offload="optimizer", sharding=s) for s in (Sharding(), ROUGH))
    assert (megabytes(fine, "gradients"), megabytes(rough, "gradients")) == (2, 0)
    third = needed(MILLION, "zero3", offload="optimizer")
    assert megabytes(third, "gradients") == 0
    host = {term.name: term.bytes / 1e6 for term in third.host}
    assert host["gradients of all micro-batches"] == host["offloaded gradients"] == 4


@pytest.mark.parametrize(("base", "each"), [("fp32", 4), ("bf16", 2), ("int8", 1.005), ("nf4", 0.516)])
def test_a_frozen_base_is_as_large_as_its_dtype_says(base: str, each: float) -> None:
    whole = 4 if base == "fp32" else 2  # of embeddings, norms and the output layer
    frozen = 8e5 * each + 1.9e5 * whole
    assert megabytes(needed(ADAPTED, "single", 1, base=base), "frozen weights") == pytest.approx(frozen / 1e6, abs=1e-3)
    split = 8e5 * min(each, 2) + 1.9e5 * 2
    for strategy, parts in (("zero2", 1), ("zero3", 2)):
        kept = megabytes(needed(ADAPTED, strategy, base=base), "frozen weights")
        assert kept == pytest.approx(split / parts / 1e6, abs=1e-3)


def test_logits_are_not_recomputed_and_blocks_are() -> None:
    size = Size(
        parameters=10**6, trainable=10**6, active=10**6, layers=8, hidden=64, intermediate=176, heads=4, vocabulary=512
    )  # fmt: skip
    plain = needed(size, "zero2", length=100)
    again = needed(size, "zero2", length=100, checkpointing=Checkpointing(1))
    assert megabytes(plain, "logits") == megabytes(again, "logits") == pytest.approx(16 * 512 * 100 / 1e6, abs=1e-3)
    assert megabytes(again, "activations") == pytest.approx(8 * 100 * 64 * 2 / 1e6, abs=1e-3)
    assert megabytes(plain, "activations") == pytest.approx(8 * 100 * (64 * (24 + 8 * 2.75) + 16) / 1e6, abs=1e-3)
    whole, half = (needed(size, "zero2", length=2**17, chunked_loss=chunked) for chunked in (False, True))
    assert megabytes(half, "logits") == pytest.approx(megabytes(whole, "logits") / 2, abs=1e-3)


def test_techniques_add_what_they_keep() -> None:
    average = Effect(states=1 + 4 / 16)
    assert megabytes(needed(MILLION, "ddp", effect=average), "techniques") == 4
    assert megabytes(needed(MILLION, "zero2", effect=average), "techniques") == 2
    assert megabytes(needed(ADAPTED, "zero2", effect=average, shared_extra=False), "techniques") == 4  # a teacher


# -- what a plan says ----------------------------------------------------------------------------------------------
def test_auto_never_picks_what_does_not_fit() -> None:
    made = planned(LLAMA_8B, 8, "data.micro_batch_size=auto")
    terms = made.predictions
    assert terms["memory_bytes"] <= terms["memory_available_bytes"]
    assert made.micro_batch > 1
    assert "the largest that should fit in memory" in {choice.why for choice in made.choices}
    assert planned(LLAMA_8B, 4).strategy == "zero2", "zero1 needs 75 GiB of 79: no room for activations"
    assert "the largest" not in refused(LLAMA_70B, 8, "data.micro_batch_size=auto")


def test_a_hub_name_without_a_config_is_said_to_be_of_unknown_size() -> None:
    changes = ["model.config=null", "model.tokenizer=null", "model.name=meta-llama/Llama-3.1-8B", "strategy.devices=8"]
    made = plan(load_recipe("quickstart", [*changes, "cluster.hardware=h100-sxm", "data.micro_batch_size=auto"]))
    assert any("its size is not on this machine. Give model.config, or download" in text for text in made.warnings)
    assert "fit" not in {choice.what: choice.why for choice in made.choices}["batch"].replace("how many fit", "")
    assert "memory_terms" not in made.predictions


def test_a_hub_name_is_sized_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--meta-llama--Llama-3.1-8B"
    (model / "snapshots/abc").mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs/main").write_text("abc")
    shape = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
    (model / "snapshots/abc/config.json").write_text(json.dumps(shape))
    changes = ["model.config=null", "model.tokenizer=null", "model.name=meta-llama/Llama-3.1-8B", "strategy.devices=1"]
    with pytest.raises(CannotFit, match="a device, and h100-sxm has"):
        plan(load_recipe("quickstart", [*changes, "cluster.hardware=h100-sxm", "strategy.name=auto"]))


def test_the_named_hardware_is_what_is_planned_for() -> None:
    made = planned(LLAMA_8B, 8)
    choices = {choice.what: choice.value for choice in made.choices}
    assert choices["precision"] == "bf16"
    assert made.accelerator == "cpu", "of this machine, were it to run here"
    flops = made.predictions["flops_per_step"]
    assert made.predictions["seconds_per_step"] == pytest.approx(flops / (989e12 * 0.35 * 8))
    assert any("this machine has no h100-sxm" in text for text in made.warnings)
    with_fp16 = planned(LLAMA_8B, 8, "precision=fp16")
    assert {choice.what: choice.value for choice in with_fp16.choices}["precision"] == "fp16"


@pytest.mark.parametrize(
    ("strategy", "base", "adapters", "frozen"),
    [
        ("ddp", "fp32", None, 0), ("zero3", "fp32", None, 0), ("ddp", "fp32", 1, 0),
        ("ddp", "nf4", 1, 0.8e6 * 0.516 + 0.19e6 * 2), ("zero3", "bf16", 1, 0.99e6 * 2),
    ],
)  # fmt: skip
def test_what_a_node_has_to_hold_while_it_loads(strategy: str, base: str, adapters: int | None, frozen: float) -> None:
    """Each rank the whole model, or one weight at a time that it cuts, or all ranks one map of the frozen base."""
    size = replace(ADAPTED if adapters else MILLION, hidden=64)
    host = {term.name: term.bytes for term in needed(size, strategy, devices=8, base=base).host}
    of_a_rank = 1e4 if frozen or strategy == "zero3" else 1e6
    assert host["the model while it loads"] == pytest.approx(frozen + 8 * 4 * of_a_rank)
