"""int8 products as x86 CPUs without VNNI compute them: one emulation in NumPy, and ONNX Runtime on a CPU of QEMU."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

QEMU = shutil.which("qemu-x86_64") if platform.machine() in ("x86_64", "AMD64") else None
WEAK = "Haswell"  # AVX2 and FMA, nothing newer

RUN = """
import sys, numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 3, 1
for entry in sys.argv[4:]:
    options.add_session_config_entry(*entry.split("="))
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
given = np.load(sys.argv[2])
np.save(sys.argv[3], session.run(None, {name: given[name] for name in given.files})[0])
"""


def saturated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[M, K] unsigned by [K, N] signed bytes, summed as vpmaddubsw does: pairs of K in 16 bits that saturate."""
    odd = a.shape[1] % 2
    a = np.pad(a.astype(np.int32), ((0, 0), (0, odd)))
    b = np.pad(b.astype(np.int32), ((0, odd), (0, 0)))
    pairs = a[:, 0::2, None] * b[None, 0::2] + a[:, 1::2, None] * b[None, 1::2]
    return pairs.clip(-(2**15), 2**15 - 1).sum(1, dtype=np.int32)


class MatMulInteger(OpRun):
    """Of the weakest CPU: zero points are taken from the sums afterwards, as ONNX Runtime does."""

    op_domain = ""

    def _run(self, a, b, a_zero_point=None, b_zero_point=None):
        assert b_zero_point is None or not np.any(b_zero_point), "weights are symmetric"
        zero = np.int32(0 if a_zero_point is None else a_zero_point)
        rows = a.reshape(-1, a.shape[-1])
        products = saturated(rows, b) - zero * b.astype(np.int32).sum(0)
        return (products.reshape(*a.shape[:-1], b.shape[1]).astype(np.int32),)


def without_vnni(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The first output of an ONNX file whose int8 products are `saturated`."""
    return ReferenceEvaluator(onnx.load(str(path)), new_ops=[MatMulInteger]).run(None, inputs)[0]


def on_haswell(path: Path, inputs: dict[str, np.ndarray], folder: Path, *config: str) -> np.ndarray:
    """The first output of an ONNX file in the real ONNX Runtime, on an emulated CPU with AVX2 and without VNNI.

    config: session entries as "key=value".
    """
    assert QEMU
    np.savez(folder / "inputs.npz", **inputs)
    command = [QEMU, "-cpu", WEAK, sys.executable, "-c", RUN, str(path), str(folder / "inputs.npz")]
    ran = subprocess.run([*command, str(folder / "found.npy"), *config], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return np.load(folder / "found.npy")
