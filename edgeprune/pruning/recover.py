"""The recovery of a pruned and rounded model by distillation: all its layers are trained toward the dense model.

The closed-form update sees one matrix at a time and a few samples; a short training sees the whole model and text that
no solve has seen. The loss is the divergence KL(dense || pruned) of the next token's distribution, at all positions but
the first. Embedding and head stay as they are. A weight on a grid is trained through it, so that what is judged is what
is deployed. It does not know where rows of text come from, nor where the weights are written.

Shapes: b rows, t tokens, p positions that are compared, c hidden_size.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

from edgeprune.errors import NumericalError
from edgeprune.model.attention import Tables
from edgeprune.model.forward import (
    CHUNK_TOKENS,
    embedded,
    final_states,
    head_logits,
    module_output,
    module_raw,
    modules_of,
    normed,
    weight_stream,
)
from edgeprune.model.model import Model
from edgeprune.model.quantised import as_float, input_scale_of
from edgeprune.pruning.effort import LOGIT_ROWS, ROWS, Effort, holds_states, needed_bytes
from edgeprune.pruning.trained import Stored, Trained, differentiable, low_rank

FRESH = 32  # rows of the model's own that are drawn at a time
HELD_OUT = 16  # rows of the model's own that no step sees, which choose
RATE, BETAS, CLIP = 1.5e-4, (0.9, 0.99), 1.0  # of AdamW, without decay
LOW_RANK_RATE = 2e-3  # where matrices are changed by products of low rank
WARM_UP, LAST_RATE = 10, 0.1  # steps until the whole rate; its share at the end of the cosine
CHECK_EVERY = 60  # steps between two looks at the held-out rows
TIMED = 4  # steps, the first without, from whose time the number of steps within minutes follows
STATE, BEST = "state.safetensors", "best.safetensors"
SAVE_SECONDS = 120.0  # between two states on the disk

Draw = Callable[[int, int], torch.Tensor]  # (place of the first, count) -> rows (count, t) int64 of the dense model's


@dataclass(frozen=True)
class Recovered:
    """The record of a recovery.

    steps: that were made; taken: after how many of them the weights were taken, 0: none were better than those before;
    before, after: mean KL(dense || model) in nats a token on the held-out rows; bytes: as needed_bytes has it; rank: of
    the products that matrices were changed by, None where they were trained whole.
    """

    steps: int
    taken: int
    before: float
    after: float
    seconds: float
    rows: int
    held_out: int
    row_tokens: int
    bytes: int
    rank: int | None = None


@dataclass(frozen=True)
class Rows:
    """The rows of a recovery, of `length` tokens. users: (any, t) int64, none where the user gave no text; draw: gives
    rows of the dense model's own by their places, the same for the same two numbers; seed: of the order of the
    user's."""

    users: torch.Tensor | None
    draw: Draw
    length: int
    seed: int

    @property
    def own(self) -> int:
        """Returns the rows of the model's own in a step."""
        return ROWS if self.users is None else ROWS - 1

    def users_of(self, step: int) -> torch.Tensor:
        """Returns the places (ROWS - own,) int64 of the user's rows in a step: all of them once in each round."""
        if self.users is None:
            return torch.zeros(0, dtype=torch.int64)
        round_, place = divmod(step, len(self.users))
        order = torch.randperm(len(self.users), generator=torch.Generator().manual_seed(self.seed + round_))
        return order[place : place + 1]


def rows_of(samples: torch.Tensor, length: int) -> torch.Tensor:
    """Returns the rows (any, length) that samples (any, tokens) int64 are cut into; their ends are left out."""
    return samples[:, : samples.shape[1] // length * length].reshape(-1, length)


class Student:
    """The model that is trained, on the dense model's tokens.

    kept: (vocab_size,) int64, the tokens of the dense model that it has left, None for all; others enter it by the
    dense model's embedding, and its distribution is compared with theirs. rank: of what matrices are changed by, None
    to train them whole.
    """

    def __init__(
        self,
        model: Model,
        dense: Model,
        kept: torch.Tensor | None,
        dtype: torch.dtype,
        length: int,
        rank: int | None = None,
    ) -> None:
        self.decoder, self.rank, weights = model.decoder, rank, model.stored
        generator = torch.Generator().manual_seed(0)

        def trained(name: str, shape: tuple[int, ...]) -> Trained:
            start = weights[name]
            return Trained(start, dtype, None if rank is None else low_rank(shape, rank, generator))

        self.embedding = differentiable(as_float(weights["embedding"]))  # (dense tokens, c)
        tied = self.decoder.tie_word_embeddings
        self.head = self.embedding if tied else differentiable(as_float(weights["head"]))
        if kept is not None:
            whole = dense.weights["embedding"].float().clone()
            whole[kept] = self.embedding
            self.embedding = whole
        self.positions = weights["positions"] if self.decoder.learned_positions else None
        self.norm = {name: trained(name, shape) for name, shape in self.decoder.norm_shapes("norm").items()}
        self.layers = [
            {name: trained(name, shape) for name, shape in self.decoder.layer_shapes(index).items()}
            for index in range(len(self.decoder.layers))
        ]
        self.tables = Tables(self.decoder, length)

    @property
    def trained(self) -> dict[str, Trained]:
        """Returns all that is trained, by name."""
        return {name: one for part in (*self.layers, self.norm) for name, one in part.items()}

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the normed states (b, p, c) at the positions that are compared, of ids (b, t) int64.

        Where a layer's states are not held, it is computed again on the way back: its input alone is kept.
        """
        again = torch.is_grad_enabled() and not holds_states(self.decoder, self.rank)
        hidden = embedded(self.decoder, ids[:, :-1], self.embedding, self.positions)  # (b, t - 1, c)
        for index in range(len(self.layers)):
            if again:
                hidden = checkpoint(self._layer, index, hidden, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = self._layer(index, hidden)
        norm = {name: one.deployed() for name, one in self.norm.items()}
        return normed(self.decoder, hidden[:, compared(hidden.shape[1])], norm, "norm")

    def _layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the stream (b, t, c) behind a layer."""
        prefix, weights = f"layers.{index}.", {}
        for name, one in self.layers[index].items():
            weights[name.removeprefix(prefix)] = one.deployed()
            if one.grid is not None and one.grid.input_scale is not None:
                weights[input_scale_of(name.removeprefix(prefix))] = one.grid.input_scale
        entered = hidden
        for kind in modules_of(self.decoder, index):
            source = entered if self.decoder.parallel else hidden
            raw = module_raw(self.decoder, index, kind, weights, source, self.tables)
            hidden = hidden + module_output(self.decoder, kind, weights, raw)
        return hidden


def compared(count: int) -> slice:
    """Returns the positions, of so many, at which the distributions are compared."""
    return slice(min(1, count - 1), None)


class Teacher:
    """The dense model's side: its final states and its head. kept: as of Student."""

    def __init__(self, model: Model, kept: torch.Tensor | None) -> None:
        self.model, self.kept = model, kept
        self.head = torch.zeros(0)

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the normed states (b, p, c) at the positions that are compared, one layer's weights at a time."""
        with torch.inference_mode():
            decoder = self.model.decoder
            states, head = final_states(decoder, weight_stream(self.model), ids, CHUNK_TOKENS, lambda: None)
            states = states.view(len(ids), -1, states.shape[-1])
        if not len(self.head):
            self.head = (head[: decoder.vocab_size] if self.kept is None else head[self.kept]).clone()
        return states[:, compared(states.shape[1])].clone()


def divergence(
    student: Student, states: torch.Tensor, teacher: Teacher, expected: torch.Tensor, with_gradient: bool
) -> tuple[float, torch.Tensor]:
    """Returns the mean KL(dense || student) in nats a token, and its gradient by the states (b, p, c); zeros without.

    states, expected: (b, p, c), of the student and of the dense model. The logits of LOGIT_ROWS positions at a time are
    in memory.
    """
    total, count = 0.0, states.shape[0] * states.shape[1]
    gradient = torch.zeros_like(states)
    parts = (one.flatten(0, 1).split(LOGIT_ROWS) for one in (states.detach(), expected, gradient))
    for own, others, into in zip(*parts, strict=True):
        with torch.no_grad():
            target = F.log_softmax(head_logits(teacher.model.decoder, others, teacher.head), dim=-1)
        with torch.set_grad_enabled(with_gradient):
            own = own.requires_grad_(with_gradient)
            logits = F.log_softmax(head_logits(student.decoder, own, student.head), dim=-1)  # (n, vocab_size)
            loss = F.kl_div(logits, target, log_target=True, reduction="sum") / count
            if with_gradient:
                into.copy_(torch.autograd.grad(loss, own)[0])
        total += float(loss.detach())
    return total, gradient


def rate_at(step: int, steps: int) -> float:
    """Returns the share of the learning rate at a step, from 0: a linear rise, then a cosine to LAST_RATE."""
    rise = min(1.0, (step + 1) / WARM_UP)
    way = min(1.0, max(0, step - WARM_UP) / max(1, steps - WARM_UP))
    return rise * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * way)))


@dataclass
class Place:
    """The place of a training, but for its numbers. steps: in all, 0 while they are unknown."""

    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    before: float = math.nan
    best: float = math.nan
    taken: int = 0


class Training:
    """A training on its way, whose state a folder holds."""

    def __init__(self, student: Student, teacher: Teacher, rows: Rows, effort: Effort, folder: Path) -> None:
        self.begun = time.monotonic()
        self.student, self.teacher, self.rows, self.effort, self.folder = student, teacher, rows, effort, folder
        self.at = Place(steps=effort.steps or 0)
        self.rate = RATE if student.rank is None else LOW_RANK_RATE
        self.numbers = [number for one in student.trained.values() for number in one.numbers]
        self.optimizer = torch.optim.AdamW(self.numbers, lr=self.rate, betas=BETAS, weight_decay=0.0)
        self.held_out = rows.draw(0, HELD_OUT)
        self.expected = teacher.states(self.held_out)
        self.users = None if rows.users is None else teacher.states(rows.users)
        self.block: tuple[int, torch.Tensor, torch.Tensor] | None = None  # place of its first row, rows, their states
        self.block_seconds = self.check_seconds = 0.0

    def run(self, on_step: Callable[[int, int], None]) -> None:
        """Trains to the end, or until a loss is not finite.

        on_step: called with the steps that are done and those in all, 0 while they are unknown. Raises NumericalError
        where the model to begin with gives no finite distribution.
        """
        self._resume()
        begun, saved = self.begun - self.at.seconds, time.monotonic()
        if not self.at.step:
            self.at.before = self.at.best = self._checked()
            if not math.isfinite(self.at.before):
                raise NumericalError(
                    "the pruned model's distribution is not finite: it cannot be recovered", "Use --recover off."
                )
        times: list[float] = []
        while not self.at.steps or self.at.step < self.at.steps:
            start = time.monotonic()
            if not self._step():
                break
            times.append(time.monotonic() - start)
            self.at.step += 1
            self.at.seconds = time.monotonic() - begun
            if not self.at.steps and len(times) == TIMED:
                self.at.steps = self._steps_within(median(times[1:]))
            on_step(self.at.step, self.at.steps)
            if self.at.step % CHECK_EVERY == 0 or self.at.step == self.at.steps:
                self._keep_best()
            if time.monotonic() - saved >= SAVE_SECONDS:
                self._save()
                saved = time.monotonic()

    def _step(self) -> bool:
        """Makes one step; returns whether its loss was finite."""
        step, own = self.at.step, self.rows.own
        ids, expected = self._own_rows(HELD_OUT + step * own, own)
        if self.users is not None:
            places = self.rows.users_of(step)
            ids, expected = torch.cat([self.rows.users[places], ids]), torch.cat([self.users[places], expected])
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * rate_at(step, self.at.steps or WARM_UP)
        states = self.student.states(ids)
        loss, gradient = divergence(self.student, states, self.teacher, expected, with_gradient=True)
        if not math.isfinite(loss):
            return False
        states.backward(gradient)
        torch.nn.utils.clip_grad_norm_(self.numbers, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def _own_rows(self, place: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns rows (count, t) of the dense model's own and its states on them, drawn a block at a time."""
        first = place - (place - HELD_OUT) % FRESH
        if self.block is None or self.block[0] != first:
            start = time.monotonic()
            rows = self.rows.draw(first, FRESH)
            self.block = first, rows, self.teacher.states(rows)
            self.block_seconds = time.monotonic() - start
        within = slice(place - first, place - first + count)
        return self.block[1][within], self.block[2][within]

    def _steps_within(self, seconds: float) -> int:
        """Returns how many steps fit into the minutes, of which each takes so many seconds beside its rows."""
        each = seconds + self.block_seconds * self.rows.own / FRESH + self.check_seconds / CHECK_EVERY
        left = 60 * (self.effort.minutes or 0.0) - self.at.seconds - self.check_seconds
        return TIMED + max(0, int(left / each))

    def _checked(self) -> float:
        """Returns the divergence on the held-out rows."""
        start, total = time.monotonic(), 0.0
        with torch.no_grad():
            pairs = zip(self.held_out.split(ROWS), self.expected.split(ROWS), strict=True)
            for ids, expected in pairs:
                total += divergence(self.student, self.student.states(ids), self.teacher, expected, False)[0] * len(ids)
        self.check_seconds = time.monotonic() - start
        return total / len(self.held_out)

    def _keep_best(self) -> None:
        """Checks the weights as they are, and keeps them where none were better."""
        loss = self._checked()
        if loss < self.at.best:
            self.at.best, self.at.taken = loss, self.at.step
            _write(self.folder / BEST, self._values())

    def _values(self) -> dict[str, torch.Tensor]:
        return {str(place): number.detach() for place, number in enumerate(self.numbers)}

    def _save(self) -> None:
        moments = {
            f"{place}.{name}": part
            for place, number in enumerate(self.numbers)
            for name, part in self.optimizer.state[number].items()
        }
        _write(self.folder / STATE, self._values() | moments, {"at": json.dumps(vars(self.at))})

    def _resume(self) -> None:
        """Goes on where the folder's state ends, if there is one."""
        path = self.folder / STATE
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            self.at = Place(**json.loads(file.metadata()["at"]))
        tensors = load_file(path)
        self.take(tensors)
        for name, part in tensors.items():
            place, _, of = name.partition(".")
            if of:
                self.optimizer.state[self.numbers[int(place)]][of] = part

    @torch.no_grad()
    def take(self, values: Mapping[str, torch.Tensor]) -> None:
        """Sets all that is trained to the values of its places."""
        for place, number in enumerate(self.numbers):
            number.copy_(values[str(place)])

    def best(self) -> dict[str, Stored] | None:
        """Returns the trained weights that were best, as they are stored; None where those before were."""
        if not self.at.taken:
            return None
        self.take(load_file(self.folder / BEST))
        return {name: one.as_stored() for name, one in self.student.trained.items()}


def _write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a file that is there as a whole or not at all."""
    part = path.with_name(path.name + ".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)
    part.replace(path)


def recover(
    dense: Model,
    model: Model,
    rows: Rows,
    effort: Effort,
    folder: Path,
    dtype: torch.dtype,
    kept: torch.Tensor | None = None,
    rank: int | None = None,
    on_step: Callable[[int, int], None] = lambda done, steps: None,
) -> tuple[Iterator[tuple[str, Stored]], Recovered]:
    """Returns the weights of a pruned model after its recovery, in the order of its decoder's shapes, and its record.

    model: the pruned one, its weights as they are stored; rows: of the dense model's tokens; effort: how long; folder:
    an empty one, or that of the same recovery, which was ended before; dtype: that floats are stored in; kept: as of
    Student; rank: of what matrices are changed by, where memory is short, None to train them whole. The best weights on
    held-out rows are taken: those of `model` where no others were. Raises NumericalError.
    """
    student, teacher = Student(model, dense, kept, dtype, rows.length - 1, rank), Teacher(dense, kept)
    training = Training(student, teacher, rows, effort, folder)
    training.run(on_step)
    at, trained = training.at, training.best() or {}
    done = Recovered(
        at.step,
        at.taken,
        at.before,
        at.best,
        at.seconds,
        at.step * ROWS,
        HELD_OUT,
        rows.length,
        needed_bytes(model.decoder, rows.length, rank),
        rank,
    )
    weights = model.stored
    return ((name, trained[name] if name in trained else weights[name]) for name in model.decoder.shapes()), done
