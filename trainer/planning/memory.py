"""What fills the memory of a device and of a node, term by term, from formulas. Loads no torch.

Model states: ZeRO (arXiv 1910.02054 §3), with what DeepSpeed and torch keep beside them; activations: the form of
Korthikanti (2205.05198 §4) for blocks with RMSNorm, a gated MLP, grouped queries and attention that keeps no scores.
Not all terms are alive at once: the peak is that of the fullest moment of a step.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...strategies import NVME_BUFFERS, NVME_GROUP, bucket
from ..tasks.chunks import chunks_of
from .activations import BYTES, block_bytes, logits_bytes
from .needs import Inputs, Memory, Term
from .sizes import Size

FROZEN_BYTES = {"fp32": 4.0, "bf16": 2.0, "nf4": 0.516, "int8": 1.005}  # of a matrix in a block, scales included
LIVE = 1e9  # its stage3_max_live_parameters: what ZeRO-3 leaves gathered
CONTEXT = {"cuda": 0.75 * 2**30, "cpu": 0.5 * 2**30}  # CUDA context and workspaces; interpreter and libraries
COMMUNICATOR = 0.5 * 2**30  # NCCL's buffers
HOST_PROCESS = 2.5 * 2**30  # a rank's interpreter, libraries and pinned buffers, beside a GPU


def summed(run: Inputs) -> float:
    """Bytes of a gradient where it is summed over micro-batches and ranks."""
    return 4.0 if run.precision == "bf16" and run.sharding.gradient_dtype == "fp32" else run.own


def memory(run: Inputs) -> Memory:
    """The terms of a run's memory.

    Args:
        run: What decides them; its `size` must be known.

    Example:
        >>> from .sizes import Size
        >>> million = Size(parameters=10**6, trainable=10**6, active=10**6)
        >>> kept = dict(length=1, micro=1, accumulate=1, nodes=1, offload="none", accelerator="cpu", precision="fp32")
        >>> whole = memory(Inputs(size=million, devices=1, strategy="single", **kept))
        >>> [(term.name, term.bytes) for term in whole.device if term.name == "optimizer states"]
        [('optimizer states', 8000000.0)]
    """
    device = [*_states(run), *_copies(run), *_activations(run)]
    device.append(_techniques(run, device))
    offloaded = _offloaded(run)
    if run.accelerator == "cpu":
        device += offloaded
        return Memory(tuple(device), (), CONTEXT["cpu"], _on_drive(run))
    context = CONTEXT["cuda"] + (COMMUNICATOR if run.world > 1 else 0)
    host = [Term(term.name, term.bytes * run.devices) for term in offloaded]
    return Memory(tuple(device), (*host, *_host(run)), context, _on_drive(run))


def _states(run: Inputs) -> Iterable[Term]:
    """Weights, masters, gradients, optimizer states: what ZeRO divides."""
    size, stage, own = run.size, run.stage, run.own
    trained = float(size.trainable or 0)
    share = 1 / run.world if stage else 1.0
    weights = share if stage == 3 else 1.0
    gradients = share if stage >= 2 else 1.0
    held = ("loss", "backward", "step") if run.accumulate > 1 else ("backward", "step")
    if run.offload != "parameters":
        yield Term("weights", 0.0 if run.by_rows else own * trained * weights)
        yield Term("frozen weights", frozen_bytes(run) * weights)
    if stage == 3 and run.sharding.hpz > 1:
        yield Term("second copy of the weights", (own * trained + frozen_bytes(run)) / run.sharding.hpz)
    if run.offload == "none":
        yield Term("master weights", 4 * trained * share if stage else 0.0)
        yield Term("optimizer states", _optimizer_states(run))
        alive = min(trained, float(size.largest)) if run.in_backward else trained * gradients
        yield Term("gradients", summed(run) * alive, ("backward",) if run.in_backward else held)
    elif stage == 2 and summed(run) != own:  # summed on the device, and sent to the host when it is to step
        yield Term("gradients", summed(run) * trained * gradients, held)


def _optimizer_states(run: Inputs) -> float:
    """Of one rank. What is trained beside a frozen model are matrices in its blocks."""
    size, card = run.size, run.optimizer
    trained = float(size.trainable or 0)
    matrices = trained if trained < (size.parameters or 0) else min(trained, float(size.inside))
    split = matrices * card.bytes_of_matrices + (trained - matrices) * card.state_bytes
    whole = matrices * (card.whole_bytes + card.side_bytes * size.sides)  # each rank of ZeRO-3 has a part of all
    return split / (run.world if run.stage else 1) + whole / (run.world if run.stage in (1, 2) else 1)


def _stepped(run: Inputs) -> float:
    """Elements that the optimizer copies at a time: ZeRO makes one parameter of all that a rank has."""
    size, stepped = run.size, run.optimizer.copies_of
    trained = float(size.trainable or 0)
    whole = trained / run.world if run.stage else trained
    if isinstance(stepped, int):
        return min(whole, float(stepped))
    for_each = stepped == "all" and run.accelerator == "cuda" and run.offload == "none" and not run.in_backward
    if run.by_rows and not for_each:  # DTensors stay parameters of their own
        return min(trained, float(size.largest)) / run.world
    return whole if for_each or (run.stage and stepped != "matrix") else min(trained, float(size.largest))


def frozen_bytes(run: Inputs) -> float:
    """All frozen weights of one copy of the model: the matrices of blocks in the base's dtype, the rest whole."""
    size = run.size
    frozen = float((size.parameters or 0) - (size.trainable or 0))
    matrices = min(frozen, float(size.inside))
    cast = run.stage and not run.by_rows  # ZeRO's engine keeps all weights in what it computes in
    whole = BYTES[run.precision] if cast or run.base != "fp32" else 4.0
    quantized = min(FROZEN_BYTES[run.base], whole) if cast else FROZEN_BYTES[run.base]
    return matrices * quantized + (frozen - matrices) * whole


def _copies(run: Inputs) -> Iterable[Term]:
    """What is kept twice: for communication, for a lower precision, for the step of the optimizer."""
    size, stage, own = run.size, run.stage, run.own
    trained, parameters = float(size.trainable or 0), float(size.parameters or 0)
    share = 1 / run.world if stage else 1.0
    if run.strategy == "ddp" and run.world > 1 and not run.in_backward:
        yield Term("gradient buckets", own * trained)
    if stage:
        yield Term("communication buckets", _buckets(run), ("backward",))
    if run.by_rows:
        yield Term("gathered layers", own * _gathered(size), ("loss", "backward"))
    elif stage == 3:
        yield Term("gathered layers", own * min(LIVE, parameters), ("loss", "backward"))
    yield from _cast(run)
    if run.offload == "none":
        stepped = run.by_rows or (stage == 2 and summed(run) != own)  # summed in parts, they are what is stepped
        yield Term("gradients in float32", 4 * trained * share if stage and not stepped else 0.0, ("step",))
        copied, at = run.optimizer.copied_bytes * _stepped(run), "backward" if run.in_backward else "step"
        yield Term("optimizer's temporary copy", copied, (at,))


def _buckets(run: Inputs) -> float:
    """Where gradients lie side by side to be reduced, and their copy in what they are summed in."""
    trained = float(run.size.trainable or 0)
    if run.by_rows:  # the gradient of what is gathered, and what it is summed in
        return min(trained, _gathered(run.size)) * (run.own + summed(run))
    setting = run.sharding.reduce_bucket
    count = bucket(trained) if setting == "auto" else min(setting, trained) if run.accelerator == "cpu" else setting
    kept = run.own if run.stage == 2 else summed(run)
    twice = 2 if run.stage < 3 and run.sharding.overlaps(run.strategy, run.accelerator) else 1
    return count * (kept * twice + (summed(run) if summed(run) != run.own else 0.0))


def _gathered(size: Size) -> float:
    """Weights that are whole at a time under FSDP2: a block, the next one, the buffer of its gather, and all outside of
    blocks, which stays from forward to backward."""
    parameters = float(size.parameters or 0)
    return min(parameters, parameters - size.inside + 3 * size.inside / max(1, size.layers))


def _cast(run: Inputs) -> Iterable[Term]:
    """Copies in 16 bits of float32 weights under autocast; the matrix that a quantized base is multiplied with."""
    size, share = run.size, run.checkpointing.share
    if run.base in ("nf4", "int8"):
        yield Term("a dequantized matrix", 2.0 * size.largest, ("loss", "backward"))
    if run.stage or run.precision == "fp32":
        return
    adapted = (size.trainable or 0) < (size.parameters or 0)
    if not adapted:  # the cache of autocast lives as long as the forward pass, what backward needs as long as that
        yield Term("autocast copies", 2.0 * size.active * share, ("loss",))
        yield Term("autocast copies", 2.0 * size.active * (1 - share), ("loss", "backward"))
    elif run.base == "fp32":
        kept = size.inside * (1 - share + share / max(1, size.layers)) + (size.active - size.inside)
        yield Term("autocast copies", 2.0 * kept, ("loss", "backward"))


def _activations(run: Inputs) -> Iterable[Term]:
    size, tokens = run.size, run.micro * run.length
    if not size.hidden:  # no transformer: what its layers give out
        yield Term("activations", run.micro * 8.0 * size.active * run.effect.activations, ("loss", "backward"))
        return
    block = tokens * block_bytes(size, run.precision, _float32_weights(run), run.adapter_dtype, run.dropout)
    entry = tokens * size.hidden * (4.0 if _float32_weights(run) else BYTES[run.precision])
    kept = run.checkpointing.kept(block, entry)
    yield Term("activations", size.layers * kept * run.effect.activations, ("loss", "backward"))
    yield Term("a block computed again", block if run.checkpointing.share else 0.0, ("backward",))
    yield Term(
        "logits",
        logits_bytes(size.vocabulary, tokens) / chunks_of(size.vocabulary * tokens, run.chunked_loss),
        ("loss",),
    )


def _float32_weights(run: Inputs) -> bool:
    """Whether what blocks hand on is float32, too."""
    adapted = (run.size.trainable or 0) < (run.size.parameters or 0)
    return not run.stage and (not adapted or run.base == "fp32")


def _techniques(run: Inputs, device: Iterable[Term]) -> Term:
    """What the others keep, which they tell as a share of 16 bytes a parameter."""
    trained = float(run.size.trainable or 0)
    whole = trained if run.shared_extra else float(run.size.parameters or 0)
    split = run.world if run.stage and run.shared_extra else 1
    return Term("techniques", (run.effect.states - 1) * 16 * whole / split)


def _offloaded(run: Inputs) -> list[Term]:
    """Of one rank, in host memory, where its step is: 16 bytes of a parameter for AdamW, 18 with its weights."""
    trained = float(run.size.trainable or 0) / run.world
    if run.offload == "none":
        return []
    if run.nvme:  # a group of weights at a time, and the gradients of all until they are written
        group = min(trained, NVME_GROUP + run.size.largest / run.world)
        return [
            Term("buffers of the drive", 4 * NVME_BUFFERS * group),
            Term("offloaded optimizer's temporary copy", run.optimizer.copied_bytes * min(group, _stepped(run))),
            Term("gradients of all micro-batches", summed(run) * trained),
        ]
    terms = [
        Term("offloaded master weights", 4 * trained),
        Term("offloaded gradients", 4 * trained),
        Term("offloaded optimizer states", _optimizer_states(run)),
        Term("offloaded optimizer's temporary copy", run.optimizer.copied_bytes * _stepped(run)),
    ]
    if run.stage == 3:
        terms.append(Term("gradients of all micro-batches", summed(run) * trained))
    if run.offload == "parameters":
        terms.append(Term("offloaded weights", run.own * trained + frozen_bytes(run) / run.world))
    return terms


def _on_drive(run: Inputs) -> float:
    """Of a node: masters, gradients and states; masters and states again, as they are copied for a checkpoint."""
    if not run.nvme:
        return 0.0
    kept = 4 * float(run.size.trainable or 0) / run.world + _optimizer_states(run)
    return run.devices * (2 * kept + 4 * float(run.size.trainable or 0) / run.world)


def _host(run: Inputs) -> Iterable[Term]:
    """Of a node beside what is offloaded: the processes, and the model while it is loaded."""
    yield Term("processes", HOST_PROCESS * run.devices)
    yield Term("the model while it loads", _loading(run))


def _loading(run: Inputs) -> float:
    """Weights of text models that ZeRO-3 is to cut lie in files, and each rank has one of them in memory at a time. A
    low-bit base or one in bf16 is mapped by all ranks of a node. Anything else each rank builds whole.
    """
    size = run.size
    whole, trained = float(size.parameters or 0), float(size.trainable or 0)
    if run.base in ("bf16", "nf4", "int8") and trained < whole:
        return frozen_bytes(run) + 4 * trained * run.devices
    return 4 * run.devices * (float(size.largest) if run.stage == 3 and size.hidden else whole)
