"""The policy of the search: an LSTM that draws sequences of actions, and the sequences that fit the limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from correctnet.methods.search_log import Filters, Problem


class Room:
    """The actions that fit the limit after a prefix of a sequence, and the number of ways to complete each.

    Drawing every action with a probability proportional to the number of its completions draws uniformly from all
    sequences that fit. The counts assume that the overhead is a sum over layers, and round each layer's to 1 / `STEPS`
    of the limit; whether an action is offered at all depends on the exact overhead of the sequence up to it, without
    compensation in later layers.
    """

    STEPS = 4096

    def __init__(self, problem: Problem):
        self.problem = problem
        self._none = problem.ratios.index(0.0)
        self._overheads: dict[Filters, float] = {}
        self._logs: dict[tuple[int, ...], np.ndarray] = {}
        empty = self.overhead([])
        self._room = max(problem.limit - empty, 0.0)
        # _ways[i][b]: log of the number of sequences of layers i, i + 1, ... that use at most b steps of the limit.
        self._ways = [np.zeros(self.STEPS + 1)]
        for i in reversed(range(len(problem.widths))):
            later, ways = self._ways[0], np.full(self.STEPS + 1, -np.inf)
            for a in range(len(problem.ratios)):
                used = self._steps(self.overhead([*[self._none] * i, a]) - empty)
                if used <= self.STEPS:
                    ways[used:] = np.logaddexp(ways[used:], later[: self.STEPS + 1 - used])
            self._ways.insert(0, ways)

    def _steps(self, overhead: float) -> int:
        if overhead <= 0:
            return 0
        return self.STEPS + 1 if overhead >= 2 * self._room else round(overhead / self._room * self.STEPS)

    def overhead(self, prefix: Sequence[int]) -> float:
        """Overhead of the sequence that begins with `prefix` and compensates no later layer."""
        filters = self.problem.filters([*prefix, *[self._none] * (len(self.problem.widths) - len(prefix))])
        if filters not in self._overheads:
            self._overheads[filters] = self.problem.overhead(filters)
        return self._overheads[filters]

    def log_probabilities(self, prefix: Sequence[int]) -> np.ndarray:
        """(ratios,) float64: of the action after `prefix`, for uniform sequences; -inf for actions that do not fit.

        If none fits, no compensation has probability 1.
        """
        key = tuple(prefix)
        if key not in self._logs:
            ways = np.full(len(self.problem.ratios), -np.inf)
            for a in range(len(ways)):
                left = self.problem.limit - self.overhead([*key, a])
                if left >= 0:
                    ways[a] = max(0.0, self._ways[len(key) + 1][min(self._steps(left), self.STEPS)])
            if ways.max() == -np.inf:
                ways[self._none] = 0.0
            self._logs[key] = ways - np.logaddexp.reduce(ways)
        return self._logs[key]

    def offer(self, prefixes: Tensor) -> Tensor:
        """(rows, ratios) float32: `log_probabilities` of each row of (rows, i) actions, with -1e9 in place of -inf."""
        found = np.array([self.log_probabilities(row) for row in prefixes.tolist()])
        return torch.from_numpy(np.maximum(found, -1e9)).float()


class Policy(nn.Module):
    """An LSTM that emits one action a candidate layer, given the previous action and the layer's number.

    Its input at step i is the one-hot of A_{i-1} (zero at i = 1) and the one-hot of i. Its output, through a linear
    layer, is added to the log-probabilities that `Room` offers; the sums are the logits.
    """

    def __init__(self, layers: int, actions: int, hidden: int = 32):
        super().__init__()
        self.layers, self.actions = layers, actions
        self.cell = nn.LSTMCell(actions + layers, hidden)
        self.head = nn.Linear(hidden, actions)
        nn.init.zeros_(self.head.weight)  # an untrained policy draws from the offered probabilities
        nn.init.zeros_(self.head.bias)

    def forward(
        self, offered: Callable[[Tensor], Tensor], generator: torch.Generator, rollouts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw sequences of actions.

        Args:
            offered: maps the actions so far (rollouts, i) to the log-probabilities (rollouts, ratios) of the next
                action under the uniform distribution over sequences that fit.
            generator: of the draws.
            rollouts: number of sequences.

        Returns:
            actions (rollouts, n) int64, their log-probabilities (rollouts,), and the policy's entropies (rollouts,).
        """
        state = None
        before = torch.zeros(rollouts, self.actions)
        drawn = torch.zeros(rollouts, 0, dtype=torch.int64)
        logs, entropy = torch.zeros(rollouts), torch.zeros(rollouts)
        for i in range(self.layers):
            where = torch.zeros(rollouts, self.layers)
            where[:, i] = 1
            state = self.cell(torch.cat([before, where], dim=1), state)
            log_p = (self.head(state[0]) + offered(drawn)).log_softmax(1)
            action = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            logs = logs + log_p.gather(1, action).squeeze(1)
            entropy = entropy - (log_p.exp() * log_p).sum(1)
            before = torch.zeros(rollouts, self.actions).scatter_(1, action, 1.0)
            drawn = torch.cat([drawn, action], dim=1)
        return drawn, logs, entropy
