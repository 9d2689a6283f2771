"""What stops a run of stage one at a loss or a gradient that is not finite, with the state before that step saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..common.errors import Diverged
from ..common.training import Clock, first_non_finite, terms_of_non_finite_gradient
from ..common.training_state import TrainingState


class StepGuard:
    """Looks at the terms and gradients of a step before anything has stepped.

    Parameters have not changed by then. Buffers may have (running statistics, moving averages, the vectors of spectral
    norm), so :meth:`remember` keeps theirs from before the step.
    """

    def __init__(self, state: TrainingState, modules: Iterable[nn.Module]) -> None:
        self._state = state
        self._modules = tuple(modules)
        self._before: list[Tensor] = []

    def remember(self) -> None:
        """Keep the buffers as they are now, at the beginning of a step."""
        self._before = [buffer.clone() for buffer in self._buffers()]

    def check(self, terms: Mapping[str, Tensor], clock: Clock) -> None:
        """Stop where a term of any process is not finite, naming it. Every process must call it."""
        bad = self._state.agree_on_bad(first_non_finite(terms))
        if bad is not None:
            self._stop(bad, clock)

    def check_gradient(
        self,
        network: str,
        norm: Tensor,
        parameters: Iterable[Tensor],
        clock: Clock,
        terms_again: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """Stop where the norm of a network's gradient is not finite, naming the terms that it comes from.

        In fp16 the loss scaler skips such a step, and nothing has to be done. ``terms_again`` computes the terms of the
        present micro-step once more, for a gradient of each by itself.
        """
        if self._state.accelerator.mixed_precision == "fp16":
            return
        name = f"gradient_norm/{network}"
        bad = self._state.agree_on_bad(first_non_finite({name: norm}))
        if bad is None:
            return
        blamed = terms_of_non_finite_gradient(terms_again(), parameters)
        self._stop(f"the gradient of {' and '.join(blamed)} ({bad})" if blamed else bad, clock)

    def _stop(self, what: str, clock: Clock) -> None:
        with torch.no_grad():
            for buffer, value in zip(self._buffers(), self._before, strict=True):
                buffer.copy_(value)
        run, step = self._state.run, self._state.step
        message = f"{what} is not finite at step {step}"
        run.log_event(step, "not_finite", message)
        self._state.save(clock, "failed")
        raise Diverged(
            f"{message}: the state before that step is saved in {run.path}; "
            "start again (--overwrite, or another --out) with a lower learning rate or a lower weight of that term"
        )

    def _buffers(self) -> list[Tensor]:
        return [buffer for module in self._modules for buffer in module.buffers()]
