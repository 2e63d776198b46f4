"""Cluster files: each mistake is one line with its place, what was found, what is allowed, and the way out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from jobs import engines

from shoestring.cluster import ClusterError, registry
from shoestring.cluster.job import make_job
from shoestring.cluster.launch import rendered
from shoestring.cluster.load import load_cluster
from shoestring.yaml_reader import MAX_BYTES, MAX_DEPTH, MAX_NODES

GOLDEN = Path(__file__).parents[1] / "golden" / "malformed_clusters.txt"
EXAMPLES = Path(__file__).parents[2] / "cluster" / "examples"
WRITE = os.environ.get("SHOESTRING_GOLDEN") == "write"
GOOD = "name: lab\nengine: local\ndevices_per_node: 2\nhardware: cpu\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test in a folder of its own, so that messages name the file as `c.yaml`."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cases() -> dict[str, tuple[str, str]]:
    """Name -> (file, answer) of the golden file."""
    cases_by_name = {}
    for case in GOLDEN.read_text().split("\n== ")[1:]:
        name, *lines = case.strip("\n").split("\n")
        answer = [line[3:] for line in lines if line.startswith("-> ")]
        cases_by_name[name] = (
            "\n".join(line for line in lines if not line.startswith("-> ")) + "\n",
            "\n".join(answer),
        )
    return cases_by_name


def answer(name: str, text: str) -> str:
    Path("c.yaml").write_text(text if name.startswith("alone: ") else text + GOOD)
    with pytest.raises(ClusterError) as caught:
        load_cluster("c.yaml")
    return str(caught.value)


@pytest.mark.skipif(WRITE, reason="writing the answers")
@pytest.mark.parametrize("name", cases())
def test_malformed(name, folder) -> None:
    text, expected = cases()[name]
    assert expected.startswith("c.yaml:") and expected.count("\n") == (1 if "two mistakes" in name else 0)
    assert answer(name, text) == expected
    assert [path.name for path in folder.iterdir()] == ["c.yaml"]  # no payload ran


def test_the_words_are_ours() -> None:
    text = GOLDEN.read_text()
    if WRITE:
        blocks = [text.split("\n== ")[0].rstrip("\n")]
        for name, (given, _) in cases().items():
            said = "".join(f"-> {line}\n" for line in answer(name, given).split("\n"))
            blocks.append(f"\n== {name}\n{given}{said}".rstrip("\n"))
        text = "\n".join(blocks) + "\n"
        GOLDEN.write_text(text)
    assert len(cases()) >= 10
    assert not any(word in text.lower() for word in ("input should", "pydantic", "validation error", "literal["))


def loaded(text: str):
    Path("c.yaml").write_text(text + GOOD)
    return load_cluster("c.yaml")


def test_what_is_not_said_has_a_default() -> None:
    cluster = loaded("")
    assert (cluster.nodes, cluster.limits.requeues, cluster.preflight.enabled) == (1, 20, True)
    assert cluster.usd_per_device_hour == pytest.approx(0.0446)  # the catalogue's


def test_units() -> None:
    cluster = loaded("limits: {hours: 90 min, attempt_hours: 1/2}\n".replace("1/2", "2 days"))
    assert (cluster.limits.hours, cluster.limits.attempt_hours) == (1.5, 48)
    assert loaded("preflight: {disk: 20 GB, memory: 1 GiB, timeout: 30 s}\n").preflight.disk == 20 * 10**9


def test_variables_keep_their_spelling() -> None:
    text = 'environment: {variables: {A: 012, B: yes, C: 1e-4, D: "x", E: 2026-01-01, F: 1_000, G: "", H: ~}}\n'
    assert loaded(text).environment.variables == {
        "A": "012", "B": "yes", "C": "1e-4", "D": "x", "E": "2026-01-01", "F": "1_000", "G": "", "H": "~",
    }  # fmt: skip


def test_prices() -> None:
    assert loaded("price: {kind: own}\n").usd_per_device_hour == 0
    assert loaded("price: {usd_per_device_hour: 2}\n").usd_per_device_hour == 2
    Path("s.yaml").write_text(GOOD.replace("cpu", "h100") + "price: {kind: spot}\n")
    assert load_cluster("s.yaml").usd_per_device_hour == 1.25


def test_a_file_that_is_too_large_or_not_text(folder) -> None:
    (folder / "c.yaml").write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(ClusterError, match="more than 256 KiB"):
        load_cluster("c.yaml")
    (folder / "c.yaml").write_bytes(b"name: lab\nengine: \xff\n")
    with pytest.raises(ClusterError, match=r"^c\.yaml:2: found the byte 0xff, which is not UTF-8"):
        load_cluster("c.yaml")
    with pytest.raises(ClusterError, match=r"d\.yaml: No such file.*c\.yaml"):
        load_cluster("d.yaml")


def test_a_bomb_is_counted_and_depth_is_bounded() -> None:
    lines = ["a0: &a0 lol"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 61)]  # 10^60 values
    assert f"allowed: at most {MAX_NODES} nodes in a file" in answer("alone: bomb", "\n".join(lines))
    assert f"allowed: at most {MAX_DEPTH} levels" in answer("alone: depth", "[" * 1_200)


def test_messages_carry_no_terminal_codes() -> None:
    said = answer("", 'price: {kind: "\\e[31mred"}\n')
    assert "\\x1b[31mred" in said and said.isprintable()


@pytest.mark.parametrize("engine", engines())
def test_every_engine_has_an_example(engine) -> None:
    """One that loads, and from which a job can be made."""
    cluster = load_cluster(EXAMPLES / f"{engine}.yaml")
    assert cluster.engine == engine
    job = make_job(cluster, name="digits", recipe="name: digits\n", run_dir="/runs/digits", workdir="/work", hours=1.0)
    assert rendered(job)


def test_there_is_no_other_example() -> None:
    assert {path.stem for path in EXAMPLES.glob("*")} == set(registry.ENGINES)


def test_the_readmes_is_a_valid_one() -> None:
    text = (EXAMPLES.parents[1] / "README.md").read_text().split("## Launch\n")[1]
    values = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    values.update(engine="local", options={})  # the others have tests of their own
    Path("c.yaml").write_text(yaml.safe_dump(values))
    assert load_cluster("c.yaml").limits.attempt_hours == 12
    assert all(f"| `{name}` |" in text for name in registry.names())
