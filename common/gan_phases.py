"""The schedule of an adversarial training: when the discriminator starts, and when the generator's adversarial loss."""

from __future__ import annotations


class GanPhases:
    """A mix-in for methods that train a generator against a discriminator. They inherit it before `Method`.

    The method's `__init__` calls `schedule_gan`. The first of `phases` trains the generator from the first image on.
    The second trains the discriminator; it does not exist if the configuration has no discriminator.
    """

    phases: tuple[str, ...] = ("generator", "discriminator")
    # training images before the discriminator's first step; None: there is no discriminator
    discriminator_start: int | None = None
    # training images before the generator's loss includes the adversarial term; None: it never does
    adversarial_start: int | None = None
    # `begin_step` sets these two before each step
    discriminator_active = False  # whether this step trains the discriminator
    adversarial_active = False  # whether the generator's loss includes the adversarial term

    def schedule_gan(self, has_discriminator: bool, discriminator_start: int, adversarial_start: int) -> None:
        """Sets both starts, in training images, and the state before the first step.

        The discriminator must not start after the adversarial term.
        """
        if has_discriminator:
            self.discriminator_start, self.adversarial_start = discriminator_start, adversarial_start
        else:
            self.phases = self.phases[:1]
        self.begin_step(images_seen=0)

    def begin_step(self, images_seen: int) -> None:
        """Sets which parts of the training are active in this step (see `Method.begin_step`)."""
        self.discriminator_active = _started(self.discriminator_start, images_seen)
        self.adversarial_active = _started(self.adversarial_start, images_seen)

    def phase_active(self, phase: str, images_seen: int) -> bool:
        """Whether the phase trains after this many training images (see `Method.phase_active`)."""
        return phase == self.phases[0] or _started(self.discriminator_start, images_seen)

    def turning_points(self) -> list[int]:
        """The two starts, without repetition (see `Method.turning_points`)."""
        return sorted({start for start in (self.discriminator_start, self.adversarial_start) if start is not None})

    def schedule_images(self, phase: str, images_seen: int) -> int:
        """Training images since the phase's start (see `Method.schedule_images`), so a late phase has a warm-up."""
        return images_seen if phase == self.phases[0] else images_seen - (self.discriminator_start or 0)


def _started(start: int | None, images_seen: int) -> bool:
    return start is not None and images_seen >= start
