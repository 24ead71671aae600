"""Output head, soft loss and cross-entropy in one piece: no tensor of [positions x vocabulary], ever.

Positions are taken in chunks. The logits of a chunk are made in one buffer, turned into their own gradient in place,
and multiplied at once into the gradients of hidden states and weight: those two are all that is kept for the backward
pass. So there is no second pass over the head, and the memory beside the gradients is O(chunk x vocabulary).
Shapes: N scored positions, H hidden width, V columns of the head, C ≤ V real classes.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from distill_jobs.errors import VocabularyError
from distill_jobs.losses.fused_rows import SparseTarget, Weights, dense_rows_, signal_rows, sparse_rows_
from distill_jobs.losses.fused_task import FusedTask, OutputHead
from distill_jobs.losses.kinds import SoftLoss
from distill_jobs.losses.total import PLAIN, LossParts, distillation_loss, weighed
from distill_jobs.store.blocks import by_blocks
from distill_jobs.store.signal import TeacherSignal

# Numbers of a block of rows on a CPU: each block costs some sixty small steps beside its few wide ones.
_BLOCK = 1 << 20
# Columns whose part of a half-precision weight gradient is made at once, before it is added up in fp32.
_COLUMNS = 8192


def fused_loss(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    signal: TeacherSignal | None,
    alpha: float,
    temperature: float,
    soft: SoftLoss = PLAIN,
    classes: int | None = None,
    chunk: int | None = None,
    compiled: bool = False,
) -> LossParts:
    """``distillation_loss`` of the head's logits, which are never held whole.

    ``forward_kl`` and the cross-entropy are differentiated by hand; any other soft loss goes through autograd, in
    smaller chunks. Products run in the hidden states' precision (autocast's, where it is on), sums of the loss and the
    weight's gradient in float32 at least. The backward pass can be run once: it hands out what the forward pass made.

    Args:
        hidden: [N, H], of the scored positions only.
        head: the weight is used (and given a gradient) as it stands; columns beyond the real classes take no part.
        labels: [N] int64.
        signal: the teacher at the same positions; None with ``alpha`` 0.
        soft: what takes the place of the KL, behind its gate.
        classes: number of real classes, where no signal tells; default all columns.
        chunk: positions at once; default by the device and the classes.
        compiled: run the passes over rows through ``torch.compile``, where it helps: on a CPU those that go through
            autograd (the others are slower compiled, 1.15 of the time when measured).

    Raises:
        VocabularyError: the student has fewer classes than the teacher, or there is no signal where one is needed.
    """
    return anchored_loss(hidden, head, labels, signal, alpha, temperature, soft, classes, chunk, compiled)[0]


def anchored_loss(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    signal: TeacherSignal | None,
    alpha: float,
    temperature: float,
    soft: SoftLoss = PLAIN,
    classes: int | None = None,
    chunk: int | None = None,
    compiled: bool = False,
) -> tuple[LossParts, Tensor]:
    """``fused_loss`` and a zero that depends on it as far as autograd knows: whatever a backward pass has to do for the
    zero it does before it goes on to ``hidden`` and the head."""
    real = signal.classes if signal is not None else classes or len(head.weight)
    if len(head.weight) < real:
        raise VocabularyError(
            f"the student gives {len(head.weight)} logits but the teacher told {real} classes apart; use a student "
            "with the teacher's classes or vocabulary"
        )
    if signal is None and alpha > 0:
        raise VocabularyError(f"alpha is {alpha:g}, so the loss needs the teacher's signal, but none was given")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    taught = signal if alpha > 0 else None
    task = FusedTask(head, labels, taught, alpha, temperature, soft, real, chunk, dtype, compiled)
    with torch.autocast(device, enabled=False):
        total, anchor, hard, softened, touched = _FusedLoss.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, task, torch.is_grad_enabled()
        )
    return LossParts(total, hard, softened, len(labels), touched if task.gated else None), anchor


class _FusedLoss(torch.autograd.Function):
    """(hidden, weight, bias) -> total, 0, hard, soft, gated. ``forward`` makes gradients, ``backward`` scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: FusedTask, differentiate: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        wanted = [differentiate and wants for wants in ctx.needs_input_grad[:3]]
        work = _Chunks(hidden, weight, bias, task, wanted)
        work.run()
        ctx.made, ctx.rest = work.gradients(), 1.0 / (max(1, len(hidden)) * task.share)
        hard, soft = _mean(work.hard), _mean(work.soft)
        softened = soft * task.soft.scale(task.temperature)
        total = _mean(work.total) if task.gated else _weighed(hard, softened, task.alpha)
        touched = _mean(work.touched)
        ctx.mark_non_differentiable(hard, softened, touched)
        return total, torch.zeros_like(total), hard, softened, touched

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.made is None:
            raise RuntimeError("the fused loss can go backwards once only: it gives its gradients away")
        made, ctx.made = ctx.made, None
        factor = upstream[0] * ctx.rest
        # Looking at a number on a CPU costs nothing, a pass over the gradient of the weight does.
        if factor.device.type != "cpu" or float(factor) != 1.0:
            for gradient, _ in made:
                if gradient is not None:
                    gradient.mul_(factor)
        return *(None if gradient is None else gradient.to(dtype) for gradient, dtype in made), None, None


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _mean(values: Tensor) -> Tensor:
    return values.mean() if len(values) else values.sum()


def _weighed(hard: Tensor, softened: Tensor, alpha: float) -> Tensor:
    # A part without weight must not spoil the total where it is not finite.
    if alpha in (0, 1):
        return (softened if alpha else hard).clone()
    return (1 - alpha) * hard + alpha * softened


class _Chunks:
    """One pass over the positions. Buffers are made once; what grows with N is small.

    Attributes:
        hard, soft: [N], the losses of each position; behind a gate each soft one times the share that it keeps.
        total, touched: [N], behind a gate the weighed sum of both, and 1 where the gate changes anything.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: FusedTask, wanted: list[bool]
    ) -> None:
        self.task, self.wanted = task, wanted
        self.hidden, self.weight = hidden.to(task.dtype), weight[: task.classes].to(task.dtype)
        self.exact = torch.float64 if task.dtype == torch.float64 else torch.float32
        self.bias = None if bias is None else bias[: task.classes].to(self.exact)
        self.kinds = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        empty = hidden.new_empty
        self.hidden_grad = empty(hidden.shape, dtype=task.dtype) if wanted[0] else None
        self.weight_grad = empty(weight.shape, dtype=self.exact) if wanted[1] else None
        self.bias_grad = empty(bias.shape, dtype=self.exact).zero_() if bias is not None and wanted[2] else None
        if self.weight_grad is not None:
            self.weight_grad[task.classes if len(hidden) else 0 :].zero_()
        self.hard, self.soft, self.total, self.touched = (
            empty(len(hidden), dtype=self.exact).zero_() for _ in range(4)
        )
        self.weights = Weights(task.alpha, self._temperature, task.share, task.head.scale, task.head.softcap)

    @property
    def _temperature(self) -> float:
        # Cross-entropy alone knows no temperature.
        return self.task.temperature if self.task.signal is not None else 1.0

    def run(self) -> None:
        """Work out the losses of all positions and their gradients."""
        count, size = len(self.hidden), self.task.rows
        turn, gain = (self._by_hand, self.weights.gain) if self.task.by_hand else (self._by_autograd, 1.0)
        buffer = self.hidden.new_empty(min(size, count), self.task.classes)
        for start in range(0, count, size):
            rows = slice(start, min(count, start + size))
            logits = buffer[: rows.stop - start]
            logits.addmm_(self.hidden[rows], self.weight.T, beta=0, alpha=gain)
            turn(logits, rows)
            self._multiply(logits, rows)

    def gradients(self) -> list[tuple[Tensor | None, torch.dtype]]:
        """Of hidden states, weight and bias, each with the precision that autograd wants it in."""
        return list(zip((self.hidden_grad, self.weight_grad, self.bias_grad), self.kinds, strict=True))

    def _by_hand(self, logits: Tensor, rows: slice) -> None:
        """``logits`` [n, C] become their own gradient."""
        task, labels = self.task, self.task.labels[rows]
        signal = None if task.signal is None else signal_rows(task.signal, rows)
        gated = None
        if signal is not None and task.gated:
            gated = task.soft.gate(signal, labels, self._guess(logits))
            signal = gated.signal
        if signal is None:
            target = SparseTarget.nothing(len(labels), logits.device, self.exact)
        elif signal.head_ids is not None:
            target = SparseTarget.of(signal, self._temperature, self.exact)
        else:
            target = None
        compiled = task.compiled and logits.device.type != "cpu"
        sparse = _compile(sparse_rows_) if compiled else sparse_rows_
        dense = _compile(dense_rows_) if compiled else dense_rows_
        kept = None if gated is None or gated.weight is None else gated.weight.to(self.exact)
        hard, soft = self.hard[rows], self.soft[rows]

        def block(some: slice) -> None:
            exact = logits[some].to(self.exact)
            if self.bias is not None:
                exact.add_(self.bias, alpha=self.weights.gain)
            left = None if kept is None else kept[some]
            if target is not None:
                hard[some], soft[some] = sparse(exact, labels[some], target.rows(some), self.weights, left)
            else:
                assert signal is not None
                hard[some], soft[some] = dense(exact, labels[some], signal_rows(signal, some), self.weights, left)
            if exact.dtype != logits.dtype:
                logits[some] = exact

        by_blocks(block, logits, max(1, _BLOCK // logits.shape[1]) if logits.device.type == "cpu" else None)
        if gated is not None:
            scale = task.soft.scale(task.temperature)
            self.total[rows], softened = weighed(hard, scale * soft, task.alpha, kept)
            self.soft[rows] = softened / scale
            self.touched[rows] = gated.touched.to(self.exact)

    def _guess(self, logits: Tensor) -> Tensor | None:
        """The student's likeliest classes [n], where the gate asks for them; scale and cap don't change them."""
        if not self.task.soft.gate.kind.asks_student:
            return None
        whole = logits if self.bias is None else torch.add(logits, self.bias, alpha=self.weights.gain)
        return whole.argmax(dim=-1)

    def _by_autograd(self, logits: Tensor, rows: slice) -> None:
        """The same for any soft loss, through autograd."""
        task, head = self.task, self.task.head
        assert task.signal is not None
        signal = signal_rows(task.signal, rows)
        loss = _compile(distillation_loss) if task.compiled else distillation_loss
        with torch.enable_grad():
            leaf = logits.to(self.exact, copy=True).requires_grad_()
            finished = leaf if self.bias is None else leaf + self.bias
            finished = finished if head.scale == 1 else finished * head.scale
            finished = finished if head.softcap is None else torch.tanh(finished / head.softcap) * head.softcap
            parts = loss(finished, task.labels[rows], signal, task.alpha, task.temperature, task.soft)
            if any(self.wanted):
                (gradient,) = torch.autograd.grad(parts.total * (parts.positions * task.share), leaf)
                logits.copy_(gradient)
        self.hard[rows], self.soft[rows] = parts.hard, parts.soft / task.soft.scale(task.temperature)
        if parts.gated is not None:
            self.total[rows], self.touched[rows] = parts.total.detach(), parts.gated

    def _multiply(self, gradient: Tensor, rows: slice) -> None:
        """The gradient of a chunk's logits goes into those of hidden states, weight and bias."""
        if self.hidden_grad is not None:
            torch.mm(gradient, self.weight, out=self.hidden_grad[rows])
        if self.bias_grad is not None:
            self.bias_grad[: self.task.classes] += gradient.sum(dim=0, dtype=self.exact)
        if self.weight_grad is None:
            return
        sums, hidden, kept = self.weight_grad[: self.task.classes], self.hidden[rows], 1.0 if rows.start else 0.0
        if gradient.dtype == self.exact:
            sums.addmm_(gradient.T, hidden, beta=kept)
            return
        # In half precision the product itself is summed up in fp32, and rounded once for each chunk.
        for start in range(0, len(sums), _COLUMNS):
            some = slice(start, start + _COLUMNS)
            product = torch.mm(gradient[:, some].T, hidden)
            if rows.start:
                sums[some] += product
            else:
                sums[some] = product
