"""The adversarial part of stage one: its settings, its two losses, its weight over time, and what watches over it.

The networks are in `discriminators`, the losses as formulas in `gan_losses`. The trainer owns optimisers and the order
of the two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from ..common.config import Config
from .diffaugment import Policy, diff_augment
from .discriminators import DISCRIMINATORS, DiscriminatorConfig, UNetDiscriminatorConfig
from .gan_losses import GAN_LOSSES, LeCam, gradient_penalty

StepOrFraction = Annotated[int, Field(ge=0, strict=True)] | Annotated[float, Field(ge=0, lt=1)]
"""A number of steps, or (with a decimal point) a share of all of the run's steps."""


def as_step(value: int | float, steps: int) -> int:
    """Return ``value`` in steps, of a run of ``steps``."""
    return value if isinstance(value, int) else round(value * steps)


class Timing(NamedTuple):
    """When the discriminator begins to learn, how long it learns alone, and how long its term rises, in steps."""

    start: int
    warmup: int
    ramp: int

    def scale(self, step: int) -> float:
        """Return the share of its weight, in [0, 1], that the autoencoder's term has at ``step``."""
        first = self.start + self.warmup
        if step < first:
            return 0.0
        return min(1.0, (step - first + 1) / self.ramp) if self.ramp else 1.0


class AdaptiveWeightConfig(Config):
    """The weight that VQGAN (Esser et al. 2021, arXiv 2012.09841, eq. 7) computes anew at each step."""

    epsilon: float = Field(1e-4, gt=0)
    max: float = Field(1e4, gt=0)
    """The weight is clamped to it."""


class LeCamConfig(Config):
    """LeCam regularisation (Tseng et al. 2021, arXiv 2104.03310): logits stay near the other side's moving average."""

    weight: float = Field(0.001, gt=0)
    decay: float = Field(0.99, ge=0, lt=1)
    """Of the moving averages, per step; with gradient accumulation, per micro-step."""


class PauseConfig(Config):
    """When the adversarial term is taken back for a while."""

    factor: float = Field(1.5, gt=1)
    """The term pauses once the smoothed reconstruction loss is this many times the best so far of its phase."""
    steps: int = Field(500, ge=1)
    """How long. The discriminator goes on learning meanwhile."""


class AdversarialConfig(Config):
    """The GAN term: which discriminator, which loss, how much of it, and when.

    Weights, starts and learning rates are not stated in the papers on autoencoders; the defaults are ours.
    """

    discriminator: DiscriminatorConfig = UNetDiscriminatorConfig()
    loss: Literal["hinge", "logistic", "relativistic"] = "hinge"
    weight: float = Field(0.1, ge=0)
    """Of the generator's term; with ``adaptive`` it multiplies the computed weight."""
    adaptive: AdaptiveWeightConfig | None = None
    start: StepOrFraction = 0
    """The first step at which the discriminator learns; before it there is no adversarial part at all."""
    warmup: StepOrFraction = 0
    """Steps, from the start on, in which the discriminator learns and the autoencoder does not hear of it yet."""
    ramp: StepOrFraction = 0
    """Steps, after the warm-up, in which the weight rises linearly to its value."""
    r1_weight: float = Field(0.0, ge=0)
    """Of the discriminator's gradient penalty on real images: half the squared norm, as under the name gamma in papers.
    But D(x) is the mean over sites and maps here, so the right size differs by orders of magnitude between
    discriminators; hinge and logistic losses are halved here, and a published gamma is to be halved with them. The
    gradient is with respect to what the discriminator sees, after ``augment``."""
    r2_weight: float = Field(0.0, ge=0)
    """The same on reconstructions."""
    penalty_every: int = Field(1, ge=1)
    """The gradient penalties are computed every so many steps, and then count as many times (lazy regularisation)."""
    lecam: LeCamConfig | None = None
    augment: tuple[Policy, ...] = ()
    """Differentiable augmentation of what the discriminator sees."""
    pause: PauseConfig | None = None

    @property
    def has_gradient_penalty(self) -> bool:
        """Whether the discriminator's loss needs a second differentiation."""
        return self.r1_weight > 0 or self.r2_weight > 0

    def timing(self, steps: int) -> Timing:
        """Return when things begin, in steps, in a run of ``steps``."""
        return Timing(as_step(self.start, steps), as_step(self.warmup, steps), as_step(self.ramp, steps))


class DiscriminatorOutput(NamedTuple):
    """The discriminator's terms (unweighted scalars), their weights, and figures for the log."""

    terms: dict[str, Tensor]
    weights: dict[str, float]
    metrics: dict[str, Tensor]


class Adversary:
    """A discriminator with its losses. ``network`` and ``lecam`` hold all of its state.

    Reconstruction ``i`` is of image ``i``: relativistic losses pair the two, and an augmentation draws the same for
    both, so that a difference between them is one of content.
    """

    def __init__(self, config: AdversarialConfig) -> None:
        self.config = config
        self.network: nn.Module = DISCRIMINATORS[config.discriminator.kind](config.discriminator)
        self.loss = GAN_LOSSES[config.loss]
        self.lecam = None if config.lecam is None else LeCam(config.lecam.decay)

    def modules(self) -> dict[str, nn.Module]:
        """Return what a checkpoint must hold, by name."""
        return {"discriminator": self.network} | ({} if self.lecam is None else {"lecam": self.lecam})

    def to(self, device: torch.device) -> None:
        """Move everything to ``device``."""
        for module in self.modules().values():
            module.to(device)

    def generator_term(self, fake: Tensor, real: Tensor) -> Tensor:
        """Return the autoencoder's scalar term from ``[B, 3, H, W]`` each; it leaves no gradient in the network."""
        self.network.requires_grad_(False)
        try:
            if self.loss.generator_needs_real:
                real_maps, fake_maps = self._judge(self.network, real, fake)
            else:
                fake_maps = self.network(diff_augment(fake, self.config.augment))
                real_maps = fake_maps  # not looked at
            return self.loss.generator(fake_maps, real_maps).mean()
        finally:
            self.network.requires_grad_(True)

    def discriminator_terms(self, network: nn.Module, real: Tensor, fake: Tensor, step: int) -> DiscriminatorOutput:
        """Return the discriminator's terms from one pass of ``network`` (ours, as accelerate wrapped it).

        ``real`` and ``fake`` are ``[B, 3, H, W]`` without a graph. The terms are ``discriminator`` and, where they are
        asked for, ``r1``, ``r2`` and ``lecam``.
        """
        config = self.config
        penalised = config.has_gradient_penalty and step % config.penalty_every == 0
        images = torch.cat([real, fake])
        augmented = diff_augment(images, config.augment, parts=2).requires_grad_(penalised)
        maps = network(augmented, 2)
        real_maps, fake_maps = _halves(maps)
        terms = {"discriminator": self.loss.discriminator(real_maps, fake_maps).mean()}
        weights = {"discriminator": 1.0}
        if penalised:
            for name, weight, penalty in zip(
                ("r1", "r2"),
                (config.r1_weight, config.r2_weight),
                gradient_penalty(maps, augmented).chunk(2),
                strict=True,
            ):
                if weight > 0:
                    terms[name], weights[name] = penalty.mean(), weight * config.penalty_every
        if self.lecam is not None and config.lecam is not None:
            terms["lecam"], weights["lecam"] = self.lecam(real_maps, fake_maps), config.lecam.weight
        return DiscriminatorOutput(terms, weights, _panel(real_maps, fake_maps, self.loss.generator_needs_real))

    def _judge(self, network: nn.Module, real: Tensor, fake: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        images = diff_augment(torch.cat([real.to(fake.dtype), fake]), self.config.augment, parts=2)
        return _halves(network(images, 2))


def _halves(maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Split logit maps of ``cat([real, fake])`` into those of either."""
    real, fake = zip(*(logits.chunk(2) for logits in maps), strict=True)
    return list(real), list(fake)


@torch.no_grad()
def _panel(real: Sequence[Tensor], fake: Sequence[Tensor], paired: bool) -> dict[str, Tensor]:
    """Return what tells how the game stands: mean logits, their gap, and the share of sites judged rightly.

    Right is a positive logit for a real image and a negative one for a reconstruction, or, where the loss compares
    pairs, the higher logit for the real one.
    """
    real, fake = [m.float() for m in real], [m.float() for m in fake]
    real_mean, fake_mean = (torch.stack([m.mean() for m in maps]).mean() for maps in (real, fake))
    if paired:
        right = [(r > f).float().mean() for r, f in zip(real, fake, strict=True)]
    else:
        right = [m.float().mean() for r, f in zip(real, fake, strict=True) for m in (r > 0, f < 0)]
    return {
        "gan/logit_real": real_mean,
        "gan/logit_fake": fake_mean,
        "gan/logit_gap": real_mean - fake_mean,
        "gan/accuracy": torch.stack(right).mean(),
    }


def last_layer_gradients(terms: Sequence[Tensor], last_layer: Tensor) -> Tensor:
    """Return the gradient of each scalar term with respect to ``last_layer``, float32 ``[len(terms), numel]``."""
    gradients = [torch.autograd.grad(term, last_layer, retain_graph=True)[0] for term in terms]
    return torch.stack([gradient.float().flatten() for gradient in gradients])


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, config: AdaptiveWeightConfig) -> tuple[Tensor, Tensor]:
    """Return the weight ``|g_rec| / (|g_adv| + epsilon)``, at most ``max``, and whether it was clamped (0 or 1).

    Both arguments are gradients with respect to the decoder's last layer, over all processes, in float32; with gradient
    accumulation they, and so the weight, are those of one micro-step.
    """
    weight = reconstruction.norm() / (adversarial.norm() + config.epsilon)
    return weight.clamp(max=config.max), (weight > config.max).float()


class ReconstructionMonitor(nn.Module):
    """Follows the smoothed reconstruction loss of a run, and pauses the adversarial term where it worsens too much.

    It also remembers when the discriminator began to learn, and its timing from there on: what is a share of all steps
    must not move when a run that has passed it is given more of them.

    All of its state is in buffers, so that a resumed run goes on with it. The loss is smoothed over about
    ``1 / (1 - DECAY)`` steps and corrected for its start.
    """

    DECAY = 0.98
    SETTLING = 50
    """Steps of a phase before its best value counts: the first means are of few steps, and of a changing network."""

    average: Tensor
    weight: Tensor
    best: Tensor
    before: Tensor
    heard: Tensor
    begun: Tensor
    paused_until: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, value in {"average": 0.0, "weight": 0.0, "best": torch.inf, "before": torch.nan}.items():
            self.register_buffer(name, torch.tensor(value))
        for name, number in {"heard": 0, "begun": [-1, 0, 0], "paused_until": 0}.items():
            self.register_buffer(name, torch.tensor(number))

    @property
    def smoothed(self) -> Tensor:
        """The smoothed reconstruction loss; nan before the first step."""
        return self.average / self.weight

    def begin_phase(self) -> None:
        """Forget what a phase of another resolution or other losses had: its values do not compare."""
        self.average.zero_()
        self.weight.zero_()
        self.best.fill_(torch.inf)
        self.before.fill_(torch.nan)
        self.heard.zero_()

    def timing(self, config: AdversarialConfig, steps: int) -> Timing:
        """Return the timing of a run of ``steps``, or the one that it began with."""
        begun = Timing(*self.begun.tolist())
        return config.timing(steps) if begun.start < 0 else begun

    def note_start(self, step: int, config: AdversarialConfig, steps: int) -> None:
        """Remember that the discriminator learns from ``step`` on, of ``steps``; later calls change nothing."""
        if self.begun[0] < 0:
            self.begun.copy_(torch.tensor(config.timing(steps)._replace(start=step)))

    @torch.no_grad()
    def update(self, loss: Tensor, step_in_phase: int, *, adversarial: bool) -> None:
        """Take in the loss of one step; ``adversarial``: whether the autoencoder is hearing the discriminator."""
        self.average.mul_(self.DECAY).add_(loss, alpha=1 - self.DECAY)
        self.weight.mul_(self.DECAY).add_(1 - self.DECAY)
        self.heard.fill_(int(self.heard) or int(adversarial))
        if not int(self.heard):
            self.before.copy_(self.smoothed)
        if step_in_phase >= self.SETTLING:
            self.best.copy_(torch.minimum(self.best, self.smoothed))

    def paused(self, step: int) -> bool:
        """Return whether the term is paused at ``step``."""
        return step < int(self.paused_until)

    def maybe_pause(self, step: int, config: PauseConfig) -> str | None:
        """Pause from ``step`` on where the loss is too far above its best; return what happened, in words."""
        ratio = float(self.smoothed / self.best)  # 0 while there is no best yet
        if self.paused(step) or ratio <= config.factor:
            return None
        self.paused_until.fill_(step + config.steps)
        return (
            f"step {step}: the reconstruction loss is {ratio:.2f} times its best; "
            f"the adversarial term pauses for {config.steps} steps"
        )

    def metrics(self, step: int) -> dict[str, Tensor]:
        """Return the panel: the smoothed loss before and after the start, and whether the term is paused."""
        return {
            **({} if self.before.isnan() else {"gan/reconstruction_before": self.before.clone()}),
            "gan/reconstruction": self.smoothed,
            "gan/paused": torch.tensor(float(self.paused(step))),
        }
