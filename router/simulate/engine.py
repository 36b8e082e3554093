"""Simulated SGLang workers: continuous batching, chunked prefill, decode; no event for a single token.

    PrefillEngine   prompts only, in order; a pass computes up to one chunk of tokens of one or more prompts
    DecodeEngine    answers only, `max_batch` at once, `step_s` a token each
    MixedEngine     both in one worker, as NVIDIA Dynamo's simulated engine does it: a pass computes up to a
                    chunk of prompts and one token of every answer

A stretch of passes in which nobody can join or leave is one event.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from router.core.profile import ModelProfile, Quadratic
from router.simulate.cache import PrefixCache
from router.simulate.clock import Timer
from router.simulate.job import Job


@dataclass(frozen=True, slots=True)
class PassTime:
    """Seconds of a pass from what is in it, whatever is cached: the form of Dynamo's simulated engine.

    prefill = fixed_s + per_token_s n + per_token2_s n^2 of the n prompt tokens in the pass, 0 without;
    decode = base_s + linear_s x + square_s x^2, x the used share of the KV memory, at least `least_s`.
    """

    fixed_s: float
    per_token_s: float
    per_token2_s: float
    base_s: float
    linear_s: float
    square_s: float
    least_s: float = 0.001

    def prefill_s(self, tokens: int) -> float:
        """Return the prefill part of a pass."""
        return self.fixed_s + tokens * (self.per_token_s + tokens * self.per_token2_s) if tokens else 0.0

    def steps_s(self, steps: float, used: float, growth: float) -> float:
        """Return the time of `steps` decode passes: `used` share at first, `growth` more after each."""
        if steps <= 0:
            return 0.0
        last = steps - 1
        sum_x = steps * used + growth * last * steps / 2
        squares = steps * used * used + used * growth * last * steps
        squares += growth * growth * last * steps * (2 * last + 1) / 6
        found = self.base_s * steps + self.linear_s * sum_x + self.square_s * squares
        return max(self.least_s * steps, found)


class PrefillEngine:
    """One prefill instance.

    Args:
        on_chunk: called when the first chunk of a prompt is computed and more is to come.
        on_done: called when a prompt is computed; `release` its blocks when nobody reads them any more.
    """

    def __init__(
        self,
        clock: Timer,
        cache: PrefixCache,
        profile: ModelProfile,
        block_tokens: int,
        chunk_tokens: int,
        on_chunk: Callable[[Job], None],
        on_done: Callable[[Job], None],
    ) -> None:
        self.clock = clock
        self.cache = cache
        self.profile = profile
        self.block_tokens = block_tokens
        self.chunk_tokens = chunk_tokens
        self.busy_s = 0.0
        self.idle = True
        self.queue: deque[Job] = deque()
        self._on_chunk = on_chunk
        self._on_done = on_done
        self._fixed_s = profile.curve.fixed_s if isinstance(profile.curve, Quadratic) else 0.0

    def submit(self, job: Job) -> None:
        """Queue a prompt."""
        self.queue.append(job)
        if self.idle:
            self._start()

    def release(self, job: Job) -> None:
        """Unlock a computed prompt's blocks."""
        self.cache.release(job.blocks, len(job.blocks))
        if self.idle and self.queue:
            self._start()

    def _take_in(self, job: Job) -> bool:
        """Find what is cached of a prompt and reserve the rest; False when there is no room yet."""
        cache, blocks = self.cache, job.blocks
        hit = cache.usable(blocks, (job.total_tokens - 1) // self.block_tokens)  # one token is computed
        cache.lock(blocks, hit)
        if not cache.room(len(blocks) - hit, self.clock.now_s):
            cache.release(blocks, hit)
            return False
        cache.reserved += len(blocks) - hit
        job.hit = job.stored_from = hit
        job.computed = hit * self.block_tokens
        job.started_s = self.clock.now_s
        return True

    def _start(self) -> None:
        budget, seconds = self.chunk_tokens, 0.0
        batch: list[tuple[Job, int]] = []
        begun = False
        queue, profile = self.queue, self.profile
        for job in queue:
            if job.hit < 0 and not self._take_in(job):
                break
            left = job.total_tokens - job.computed
            take = left if left < budget else budget
            if not batch and left > budget and not job.first_chunk:
                take = (left - 1) // budget * budget  # full chunks, which nobody can join
            if job.first_chunk:
                seconds += profile.prefill_s(take, job.computed)
                if begun:
                    seconds -= self._fixed_s  # one pass, one fixed cost
                begun = True
            else:
                seconds += profile.curve.at(job.computed + take) - profile.curve.at(job.computed)
            batch.append((job, take))
            budget -= take
            if budget <= 0:
                break
        if not batch:
            self.idle = True
            return
        self.idle = False
        self.busy_s += seconds
        self.clock.at(self.clock.now_s + seconds, self._end, batch)

    def _end(self, batch: list[tuple[Job, int]]) -> None:
        now_s, chunk = self.clock.now_s, self.chunk_tokens
        done: list[Job] = []
        for job, take in batch:
            job.computed += take
            if job.computed >= job.total_tokens:
                self.queue.popleft()
                done.append(job)
                start, blocks = job.stored_from, job.blocks
                self.cache.reserved -= len(blocks) - start
                self.cache.store(blocks, start, _states(job, chunk, self.block_tokens), now_s)
                job.prefilled_s = now_s
            elif job.first_chunk:
                self._on_chunk(job)
            job.first_chunk = False
        self._start()
        for job in done:
            self._on_done(job)


def _states(job: Job, chunk_tokens: int, block_tokens: int) -> list[int]:
    """Return the depths where a hybrid model's state was kept: ends of chunks, and of the last block."""
    blocks = len(job.blocks)
    step = chunk_tokens // block_tokens
    depths = list(range(job.hit + step, blocks, step)) if step else []
    if blocks > job.hit:
        depths.append(blocks)
    return depths


class DecodeEngine:
    """One decode instance: `max_batch` answers at once, each a token every `step_s`."""

    def __init__(
        self, clock: Timer, max_batch: int, step_s: float, on_start: Callable[[Job], None],
        on_done: Callable[[Job], None],
    ) -> None:  # fmt: skip
        self.clock = clock
        self.max_batch = max_batch
        self.step_s = step_s
        self.running = 0
        self.busy_s = 0.0
        self._since_s = 0.0
        self._queue: deque[Job] = deque()
        self._on_start = on_start
        self._on_done = on_done

    def submit(self, job: Job) -> None:
        """Take in an answer whose KV is here."""
        if self.running >= self.max_batch:
            self._queue.append(job)
        else:
            self._begin(job)

    def _begin(self, job: Job) -> None:
        if not self.running:
            self._since_s = self.clock.now_s
        self.running += 1
        self._on_start(job)
        self.clock.at(self.clock.now_s + job.output_tokens * self.step_s, self._end, job)

    def _end(self, job: Job) -> None:
        self.running -= 1
        if not self.running:
            self.busy_s += self.clock.now_s - self._since_s
        if self._queue:
            self._begin(self._queue.popleft())
        self._on_done(job)


class MixedEngine:
    """One worker that computes prompts and answers in the same passes."""

    def __init__(
        self,
        clock: Timer,
        cache: PrefixCache,
        times: PassTime,
        block_tokens: int,
        chunk_tokens: int,
        max_batch: int,
        on_prefilled: Callable[[Job], None],
        on_done: Callable[[Job], None],
    ) -> None:
        self.clock = clock
        self.cache = cache
        self.times = times
        self.block_tokens = block_tokens
        self.chunk_tokens = chunk_tokens
        self.max_batch = max_batch
        self.busy_s = 0.0
        self.queue: deque[Job] = deque()
        self._capacity_tokens = cache.capacity * block_tokens
        self._on_prefilled = on_prefilled
        self._on_done = on_done
        self._running: list[tuple[int, int, Job]] = []
        self._used_tokens = 0
        self._step = 0
        self._pass: object = None  # the pass or stretch under way
        self._stretch_s = 0.0
        self._stretch_since_s = 0.0
        self._in_pass = False

    def submit(self, job: Job) -> None:
        """Queue a prompt; it joins when the pass under way is over."""
        self.queue.append(job)
        if self._pass is None:
            self._start()
        elif not self._in_pass:
            self._cut_stretch()

    def _take_in(self, job: Job) -> bool:
        cache, blocks = self.cache, job.blocks
        hit = cache.usable(blocks, (job.total_tokens - 1) // self.block_tokens)
        cache.lock(blocks, hit)
        need = -(-(job.total_tokens + job.output_tokens) // self.block_tokens) - hit
        if not cache.room(need, self.clock.now_s):
            cache.release(blocks, hit)
            return False
        cache.reserved += need
        job.hit = job.stored_from = hit
        job.computed = hit * self.block_tokens
        job.started_s = self.clock.now_s
        self._used_tokens += job.computed
        return True

    def _start(self) -> None:
        budget = self.chunk_tokens - len(self._running)
        batch: list[tuple[Job, int]] = []
        tokens, room = 0, self.max_batch - len(self._running)
        for job in self.queue:
            if budget <= 0 or len(batch) >= room or (job.hit < 0 and not self._take_in(job)):
                break
            take = min(budget, job.total_tokens - job.computed)
            batch.append((job, take))
            tokens += take
            budget -= take
        if batch:
            self._begin_pass(batch, tokens)
        elif self._running:
            self._begin_stretch(self._running[0][0] - self._step)
        else:
            self._pass = None

    # --- a pass with prompts in it ---------------------------------------------------------------------

    def _begin_pass(self, batch: list[tuple[Job, int]], tokens: int) -> None:
        seconds = self.times.prefill_s(tokens)
        fresh = sum(1 for job, take in batch if job.computed + take >= job.total_tokens)
        if self._running or fresh:
            seconds += self.times.steps_s(1, (self._used_tokens + tokens) / self._capacity_tokens, 0.0)
        self._pass, self._in_pass = batch, True
        self.busy_s += seconds
        self.clock.at(self.clock.now_s + seconds, self._end_pass, batch)

    def _end_pass(self, batch: list[tuple[Job, int]]) -> None:
        now_s = self.clock.now_s
        done: list[Job] = []
        for job, take in batch:
            job.computed += take
            self._used_tokens += take
            if job.computed >= job.total_tokens:
                self.queue.popleft()
                done.append(job)
        self._advance(1)
        for job in done:
            start, blocks = job.stored_from, job.blocks
            self.cache.reserved -= len(blocks) - start
            self.cache.store(blocks, start, _states(job, self.chunk_tokens, self.block_tokens), now_s)
            job.prefilled_s = now_s
            self._used_tokens += 1
            heapq.heappush(self._running, (self._step + job.output_tokens - 1, job.number, job))
        self._pass = None
        for job in done:
            self._on_prefilled(job)
        self._finish()
        if self._pass is None:
            self._start()

    # --- a stretch of decode passes --------------------------------------------------------------------

    def _begin_stretch(self, steps: int) -> None:
        used, growth = self._used_tokens / self._capacity_tokens, len(self._running) / self._capacity_tokens
        seconds = self.times.steps_s(steps, used, growth)
        stretch = (steps, used, growth)
        self._pass, self._in_pass = stretch, False
        self._stretch_since_s, self._stretch_s = self.clock.now_s, seconds
        self.clock.at(self.clock.now_s + seconds, self._end_stretch, stretch)

    def _cut_stretch(self) -> None:
        """End the stretch after the decode pass that is under way."""
        stretch = self._pass
        assert isinstance(stretch, tuple)
        steps, used, growth = stretch
        gone_s = self.clock.now_s - self._stretch_since_s
        low, high = 1, steps
        while low < high:
            middle = (low + high) // 2
            if self.times.steps_s(middle, used, growth) >= gone_s:
                high = middle
            else:
                low = middle + 1
        if low < steps:
            seconds = self.times.steps_s(low, used, growth)
            self._pass = shorter = (low, used, growth)
            self._stretch_s = seconds
            self.clock.at(max(self.clock.now_s, self._stretch_since_s + seconds), self._end_stretch, shorter)
        self._in_pass = True

    def _end_stretch(self, stretch: tuple[int, float, float]) -> None:
        if self._pass is not stretch:
            return
        self.busy_s += self._stretch_s
        self._advance(stretch[0])
        self._pass = None
        self._finish()
        if self._pass is None:
            self._start()

    def _advance(self, steps: int) -> None:
        self._step += steps
        self._used_tokens += steps * len(self._running)

    def _finish(self) -> None:
        running = self._running
        while running and running[0][0] <= self._step:
            _, _, job = heapq.heappop(running)
            self._used_tokens -= job.total_tokens + job.output_tokens
            blocks = len(job.blocks)
            self.cache.reserved -= -(-(job.total_tokens + job.output_tokens) // self.block_tokens) - blocks
            self.cache.release(job.blocks, blocks)
            self._on_done(job)
