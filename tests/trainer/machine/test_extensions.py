"""DeepSpeed on CPU compiles nothing and still computes the same; dead builds are not waited for."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from shoestring.trainer.machine.extensions import (
    ExtensionsError,
    extensions_dir,
    lock_holder,
    prebuild,
    prepare_environment,
    settle,
)

# One rank of a two-rank gloo run: five AdamW steps in plain torch on the whole batch, then the same under ZeRO on half
# the batch each. Prints what every variant's mean losses were.
RANK = """
import json, os, sys
from shoestring.trainer.machine.extensions import prepare_environment
rank, store = int(os.environ["RANK"]), sys.argv[1]
for offload in ("none", "optimizer", "parameters"):
    prepare_environment("zero3", offload, "cpu")
import deepspeed, torch
deepspeed.init_distributed("gloo", init_method=f"file://{store}", rank=rank, world_size=2, verbose=False)
draw = torch.Generator().manual_seed(1)
x, y = torch.randn(8, 32, generator=draw), torch.randn(8, 8, generator=draw)
half = slice(rank * 4, rank * 4 + 4)

def parts(fused):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)

def plain():
    model, optimizer = parts(False)
    for _ in range(5):
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()

def zero(stage, fused=False, **offload):
    model, optimizer = parts(fused)
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
              "zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": stage, **offload}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(5):
        loss = torch.nn.functional.mse_loss(engine(x[half]), y[half])
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        yield mean.item() / 2

host = {"device": "cpu"}
runs = {
    "plain": plain(),
    "zero1": zero(1),
    "zero2 optimizer": zero(2, True, offload_optimizer=host),
    "zero3 parameters": zero(3, True, offload_optimizer=host, offload_param=host),
}
print("LOSSES", json.dumps({name: list(losses) for name, losses in runs.items()}))
torch.distributed.barrier()  # nobody leaves while the other still talks: gloo may end such a process with an abort
torch.distributed.destroy_process_group()
"""


def start(rank, folder, extensions):
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",  # never used: the ranks meet in a file
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "CXX": "/bin/false",  # whoever compiles, fails
    }
    command = [sys.executable, "-c", RANK, str(folder / "store")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_zero_on_two_cpu_ranks_compiles_nothing_and_computes_the_same(tmp_path):
    extensions = tmp_path / "extensions"
    for name in ("deepspeed_shm_comm", "cpu_adam"):  # dead builds of both, on which DeepSpeed alone would hang
        (extensions / name).mkdir(parents=True)
        (extensions / name / "lock").touch()
    ranks = [start(rank, tmp_path, extensions) for rank in (0, 1)]
    try:
        output = "".join(rank.communicate(timeout=180)[0] for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], output[-3000:]
    results = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("LOSSES ")]
    assert results[0] == results[1] and len(results) == 2
    plain = results[0].pop("plain")
    assert plain[-1] < plain[0] / 2
    for name, losses in results[0].items():
        assert losses == pytest.approx(plain, rel=1e-5), name
    assert "removed the stale build lock" in output
    assert [path for path in extensions.rglob("*") if path.is_file()] == []


def test_a_stale_lock_is_removed_at_once_and_said(tmp_path, capfd):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert lock_holder(lock) is None
    started = time.monotonic()
    settle(lock)
    assert not lock.exists()
    assert time.monotonic() - started < 2
    assert str(lock) in capfd.readouterr().err


def test_a_live_build_is_waited_for_within_limits_and_a_killed_one_is_not(tmp_path, capfd):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    # as torch.utils.file_baton does it: the builder keeps the file that it created open
    code = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held'); time.sleep(60)"
    builder = subprocess.Popen([sys.executable, "-u", "-c", code, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert builder.stdout.readline() == "held\n"
        assert lock_holder(lock) == f"process {builder.pid}"
        with pytest.raises(ExtensionsError, match=f"cpu_adam is still being built by process {builder.pid}"):
            settle(lock, patience=0.3)
        assert lock.exists()
        assert f"waiting for process {builder.pid}" in capfd.readouterr().err
    finally:
        builder.send_signal(signal.SIGKILL)
        builder.communicate()
    settle(lock)
    assert not lock.exists()


def test_builders_take_turns_and_a_killed_one_gives_its_up(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    for name in ("cpu_adam.built", "cpu_adam/cpu_adam.so"):
        (tmp_path / name).touch()
    code = (
        "import fcntl, sys, time; turn = open(sys.argv[1], 'a'); fcntl.flock(turn, fcntl.LOCK_EX); print('held')\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-u", "-c", code, str(tmp_path / "cpu_adam.turn")]
    builder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert builder.stdout.readline() == "held\n"
        with pytest.raises(ExtensionsError, match="another process has been building cpu_adam for 0 s"):
            prebuild(["cpu_adam"], patience=0.3)
        assert "waiting for another process to build cpu_adam" in capfd.readouterr().err
    finally:
        builder.send_signal(signal.SIGKILL)
        builder.communicate()
    assert prebuild(["cpu_adam"]) == prebuild(["cpu_adam"]) == {"cpu_adam": "present"}


def test_a_failed_build_tells_the_compilers_words_and_leaves_no_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(ExtensionsError, match=r"building DeepSpeed's cpu_adam failed[\s\S]*Error"):
        prebuild(["cpu_adam"])
    assert not list(tmp_path.rglob("lock"))
    assert not list(tmp_path.rglob("*.built"))
    with pytest.raises(ExtensionsError, match="unknown DeepSpeed extension 'cpu_adm'"):
        prebuild(["cpu_adm"])


def test_a_build_that_takes_too_long_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(ExtensionsError, match="building pin_memory took more than 1 s and was ended"):
        prebuild(["pin_memory"], patience=1.0)
    assert time.monotonic() - started < 5


def test_the_build_folder_is_private_and_names_what_it_was_built_for(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOESTRING_HOME", str(tmp_path))
    folder = extensions_dir()
    assert folder.is_relative_to(tmp_path / "extensions")
    assert "deepspeed0." in folder.name
    assert f"py{sys.version_info.major}{sys.version_info.minor}" in folder.name


def test_other_strategies_touch_nothing(monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    prepare_environment("ddp", "none", "cpu")
    assert "TORCH_EXTENSIONS_DIR" not in os.environ
    assert "DS_ACCELERATOR" not in os.environ
