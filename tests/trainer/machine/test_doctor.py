"""The doctor finds what was broken on purpose, says how to fix it, and never dies of it."""

import json
import os
import resource
import subprocess
import sys
import time

import pytest

from shoestring.trainer.machine.doctor import diagnose, report

NAMES = [
    "python",
    "torch",
    "hardware catalogue",
    "gpu",
    "nvml",
    "rapl",
    "memory",
    "shared memory",
    "disk (run directory)",
    "disk (SHOESTRING_HOME)",
    "open files",
    "host name",
    "deepspeed",
    "compiler",
    "extensions",
    "libaio",
    "wandb",
    "minilm",
]


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOESTRING_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("TORCH_EXTENSIONS_DIR", "WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def finding(name):
    return next(one for one in diagnose() if one.name == name)


def test_every_check_answers_and_what_is_not_in_order_says_why():
    findings = diagnose()
    assert [one.name for one in findings] == NAMES
    for one in findings:
        assert one.found
        assert one.fix or one.ok is not False, one
    plain = json.loads(json.dumps(report(findings)))
    assert plain["ok"] == all(one.ok is not False for one in findings)
    assert plain["findings"][0] == {"name": "python", "ok": True, "found": findings[0].found, "fix": ""}


def test_a_stale_lock_is_named_and_the_command_fixes_it(tmp_path):
    lock = tmp_path / ".cache" / "torch_extensions" / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    stale = finding("extensions")
    assert stale.ok is False
    subprocess.run(stale.fix, shell=True, check=True)
    assert finding("extensions").ok is True


def test_a_low_limit_of_open_files_is_named():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert finding("open files").ok is False
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_wandb_login_and_mode_are_reported_without_the_key(tmp_path, monkeypatch):
    assert finding("wandb").ok is None
    assert finding("wandb").fix == "wandb login"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password not-to-be-shown\n")
    (tmp_path / "netrc").chmod(0o600)
    assert "logged in" in finding("wandb").found
    assert "not-to-be-shown" not in json.dumps(report(diagnose()))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "offline by $WANDB_MODE" in finding("wandb").found


def test_a_missing_compiler_is_optional_but_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    compiler = finding("compiler")
    assert compiler.ok is None
    assert "a C++ compiler and ninja missing" in compiler.found


def test_a_damaged_user_file_does_not_kill_the_doctor(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "hardware.yaml").write_text("hardware: [")
    assert [one.name for one in diagnose()] == NAMES
    assert finding("hardware catalogue").ok is False


def test_the_doctor_is_quick():
    code = "from shoestring.trainer.machine.doctor import diagnose; diagnose()"
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
    assert time.monotonic() - started < 20  # 0.3 s on an idle machine without a GPU
