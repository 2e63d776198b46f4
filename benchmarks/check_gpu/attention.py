"""Step `attention`: forward and backward of every kernel on packed documents, and how far results are apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from checks import Checks, main
from torch import Tensor


def attention(checks: Checks) -> None:
    length, heads, width = (4096, 32, 128) if checks.cuda else (256, 2, 32)
    dtype = torch.bfloat16 if checks.cuda else torch.float32
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, length, width, device=checks.device, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    document = torch.arange(length, device=checks.device) // (length // 4)  # four documents in a row
    places = torch.arange(length, device=checks.device)
    allowed = (document[:, None] == document[None]) & (places[:, None] >= places[None])

    def causal() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def masked() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    kernels: dict[str, Callable[[], Tensor]] = {"causal": causal, "masked": masked}
    if checks.cuda:
        kernels |= {"flex": _flex(q, k, v, document, length), "varlen": _varlen(q, k, v, length)}
    results = {}
    for name, kernel in kernels.items():
        try:
            seconds, results[name] = _timed(kernel, (q, k, v))
            checks.figure(**{f"{name}_ms": seconds * 1e3})
        except Exception as error:
            checks.figure(**{f"{name}_error": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
            checks.holds(f"{name} runs", False)
    reference = results["masked"]
    for name in ("flex", "varlen"):
        if not checks.cuda:
            checks.needs(f"{name} keeps documents apart as the mask does")
        elif name in results:
            gap = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(results[name], reference, strict=True))
            checks.figure(**{f"{name}_gap": gap})
            checks.holds(f"{name} keeps documents apart as the mask does", gap < 2e-2)
    with torch.no_grad():
        alone = F.scaled_dot_product_attention(*(t[:, :, -length // 4 :] for t in (q, k, v)), is_causal=True)
    gap = float((masked()[:, :, -length // 4 :] - alone).abs().max())
    checks.figure(isolation_gap=gap)
    checks.holds("a masked document is computed as if it were alone", gap < (2e-2 if checks.cuda else 1e-5))


def _timed(kernel: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> tuple[float, list[Tensor]]:
    """Median seconds of forward and backward; the output and the gradients, in float32."""
    seconds = []
    for _ in range(6):
        for each in inputs:
            each.grad = None
        _wait()
        began = time.perf_counter()
        out = kernel()
        out.float().square().mean().backward()
        _wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:]), [out.detach().float(), *(each.grad.float() for each in inputs)]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _flex(q: Tensor, k: Tensor, v: Tensor, document: Tensor, length: int) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def apart(batch: Tensor, head: Tensor, at: Tensor, to: Tensor) -> Tensor:
        return (document[at] == document[to]) & (at >= to)

    blocks = create_block_mask(apart, None, None, length, length, device=str(q.device))
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=blocks)


def _varlen(q: Tensor, k: Tensor, v: Tensor, length: int) -> Callable[[], Tensor]:
    """torch's own flash attention over documents of their own lengths."""
    ends = torch.arange(0, length + 1, length // 4, device=q.device, dtype=torch.int32)

    def call() -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        rows = (t[0].transpose(0, 1) for t in (q, k, v))  # [T, heads, width]
        try:
            out = varlen_attn(*rows, ends, ends, length // 4, length // 4, is_causal=True)
        except TypeError:  # later versions say it by the window: all before, none after
            rows = (t[0].transpose(0, 1) for t in (q, k, v))
            out = varlen_attn(*rows, ends, ends, length // 4, length // 4, window_size=(-1, 0))
        return out.transpose(0, 1)[None]

    return call


if __name__ == "__main__":
    main({"attention": attention})
