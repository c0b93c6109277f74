"""The schedule of an adversarial training: from which image on the discriminator is trained,
and from which on the generator must fool it.
"""

from __future__ import annotations


class GanPhases:
    """What a method inherits, in front of `Method`, that trains a generator against a discriminator.

    Its `__init__` calls `schedule_gan`. The first of `phases` trains the generator, from the first image on; the second
    one trains the discriminator. Where the configuration asks for no discriminator, there is the first phase alone.
    """

    phases: tuple[str, ...] = ("generator", "discriminator")
    # training images before the discriminator's first step; None: there is no discriminator
    discriminator_start: int | None = None
    # training images before the generator's loss includes the adversarial term; None: it never does
    adversarial_start: int | None = None
    discriminator_active = False  # whether the discriminator is trained in the present step; `begin_step` sets both
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
        """Decides what the step includes (see `Method.begin_step`)."""
        self.discriminator_active = _started(self.discriminator_start, images_seen)
        self.adversarial_active = _started(self.adversarial_start, images_seen)

    def phase_active(self, phase: str, images_seen: int) -> bool:
        """Whether the phase is stepped after this many training images (see `Method.phase_active`)."""
        return phase == self.phases[0] or _started(self.discriminator_start, images_seen)

    def turning_points(self) -> list[int]:
        """The two starts, without repetition (see `Method.turning_points`)."""
        return sorted({start for start in (self.discriminator_start, self.adversarial_start) if start is not None})

    def schedule_images(self, phase: str, images_seen: int) -> int:
        """Training images since the phase's start (see `Method.schedule_images`): late ones warm up then."""
        return images_seen if phase == self.phases[0] else images_seen - (self.discriminator_start or 0)


def _started(start: int | None, images_seen: int) -> bool:
    return start is not None and images_seen >= start
