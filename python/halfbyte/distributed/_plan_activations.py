"""What a training step keeps of its activations, in bytes.

The formulas were read off the tensors that PyTorch keeps for the backward pass of the Llama layers
of Transformers (5.23), and are compared with measured steps in
``tests/distributed/test_plan_measured.py``. Symbols: ``T`` tokens of a micro-batch, ``c`` bytes of
the dtype that is computed in, ``h`` hidden size, ``q`` and ``k`` width of all query heads and of
all key heads, ``a`` query heads, ``m`` width of the feed-forward layer, ``r`` LoRA rank, ``V``
vocabulary, ``s`` sequence length.

A layer keeps, per token:

=======================  ========================================================================
each of its two norms    ``4 h`` (its input in float32), and ``c h``, its output, where a trained
                         matrix follows; ``c h`` more where its own weight is trained
attention                ``c (2 q + 2 k) + 4 a`` (queries, keys, values, result, log-sum-exp);
                         eager: ``c * 4 q + (4 + c) a s`` (``4 a s`` when ``c`` is 4)
feed-forward             ``c * 3 m`` (gate, activation, up), and ``c m``, their product, where a
                         trained matrix follows
each adapter             ``r`` elements; where the adapter computes in another dtype than the model
                         also its own copy of the input (instead of the shared one)
=======================  ========================================================================

The backward pass of a layer needs more for a moment: gradients of the feed-forward layer bring its
share up to ``c * 6 m``, eager attention its own to ``12 a s``, plus the gradient ``c h`` of the
layer's output. The last norm's takes ``20 h``.

With checkpointing a layer keeps ``c h``, its input, and the backward pass makes the rest again, one
layer at a time. The loss takes ``12 V``: log-probabilities, their gradient and that of the logits,
in float32.
"""

from __future__ import annotations

from typing import NamedTuple

from ._plan_memory import targeted
from ._plan_model import Model
from ._plan_setting import Setting

__all__ = ["Activations", "activations"]


class Activations(NamedTuple):
    """Bytes of activations of a micro-batch of one rank.

    Attributes:
        stored: what the forward pass of one layer keeps.
        layer: what the backward pass of one layer needs at its peak, with ``stored`` and, when
            checkpointing, with what is computed again.
        inputs: token ids, labels, and rotary tables.
        last: what the last norm keeps.
        last_peak: what its backward pass needs beside it.
        loss: the buffers over the vocabulary.
    """

    stored: int
    layer: int
    inputs: int
    last: int
    last_peak: int
    loss: int


def activations(model: Model, s: Setting) -> Activations:
    """The activations of a step; see the top of this file."""
    c, h, m, r = s.dtype.itemsize, model.hidden, model.inner, s.lora_rank
    trained, copied = _inputs_kept(model, s)
    size = s.adapter_dtype.itemsize

    norms = 2 * 4 * h
    for group in ("attention", "feed-forward"):
        norms += c * h if trained[group] else 0
        norms += c * h if s.full else 0
    attention = c * (2 * model.queries + 2 * model.keys) + 4 * model.heads
    scores = 0
    if s.attention == "eager":
        attention = c * 4 * model.queries
        scores = model.heads * s.seq * (4 if c == 4 else 4 + c)
    inner = c * m * (3 if model.gated else 2)
    inner += c * m if trained["down"] and model.gated else 0
    lora = size * r * trained["adapters"]
    kept = norms + attention + scores + inner + lora + copied

    # Three gradients of the feed-forward layer's width exist at once; what it has kept for the last
    # of its products is gone by then.
    peak = c * m * (6 if model.gated else 4)
    down_copy = size * m if copied and trained["down_adapter"] else 0
    at_inner = kept + max(peak - inner, down_copy)
    at_scores = 0
    if scores:
        spent = inner + 4 * h + (down_copy if copied else 0)
        at_scores = kept - spent - scores + 12 * model.heads * s.seq + 2 * c * model.queries
    layer = max(at_inner, at_scores) + c * h

    t = s.tokens
    return Activations(
        stored=t * (c * h if s.checkpointing else kept),
        layer=t * layer,
        inputs=t * 3 * 8 + 2 * s.seq * c * (model.queries // model.heads),
        last=t * (4 * h + (2 * c * h if s.full else 0)),
        last_peak=t * 20 * h,
        loss=t * 12 * model.vocab,
    )


def _inputs_kept(model: Model, s: Setting) -> tuple[dict[str, int], int]:
    """Which inputs of a layer's linear weights are kept for the gradients of trained matrices: how
    many use each, and bytes a token of the copies that adapters of another dtype make."""
    layer = next((w for number, w in model.units.items() if number is not None), ())
    linears = [weight for weight in layer if weight.linear and len(weight.shape) == 2]
    with_adapter = [] if s.full else [w for w in linears if targeted(w.name, s)]
    used = with_adapter or (linears if s.full else [])

    def last(name: str) -> str:
        return name.removesuffix(".weight").rpartition(".")[2]

    down = [w for w in used if _is_down(last(w.name))]
    attention = [w for w in used if not _is_down(last(w.name)) and _in_attention(w.name)]
    output = [w for w in attention if last(w.name) in ("o_proj", "out_proj", "dense")]
    feed = [w for w in used if w not in down and w not in attention]
    other = s.adapter_dtype.itemsize != s.dtype.itemsize and not s.full
    copied = 0
    if other:
        for weight in with_adapter:
            width = model.inner if weight in down else weight.shape[1]
            copied += s.adapter_dtype.itemsize * width
    counts = {
        "attention": 0 if other else len(attention) - len(output),
        "feed-forward": 0 if other else len(feed),
        "down": 0 if other else len(down),
        "down_adapter": len(down),
        "adapters": len(with_adapter),
    }
    return counts, copied


def _in_attention(name: str) -> bool:
    return "attn" in name or "attention" in name


def _is_down(last: str) -> bool:
    return last in ("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h")
