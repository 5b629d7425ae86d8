"""Which clips are measured on, and which may be learned from: the two never share one.

Evaluation takes its classes and seeds from `EVALUATION`; whatever is fitted to the reference model
(distillation, calibration of a rule, a trained estimator) takes its own from `CALIBRATION`.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_EVALUATION_SEED = 5000
"""Seeds from here on are for evaluation alone."""


@dataclass(frozen=True)
class Split:
    """Clips of the reference model's data.

    classes: class numbers of the data set. first_seed: seed of the first clip, the others follow.
    levels: noise levels at which attention is recorded, 1 being pure noise.
    """

    classes: tuple[int, ...]
    first_seed: int
    levels: tuple[float, ...]

    def probes(self, count: int) -> list[tuple[int, float, int]]:
        """The first `count` (class, noise level, seed); classes turn faster than rounds of levels.

        Every run of as many probes as there are classes has each class once, at levels that move
        on by one from run to run.
        """
        made = []
        for i in range(count):
            turn, place = divmod(i, len(self.classes))
            level = self.levels[(place + turn) % len(self.levels)]
            made.append((self.classes[place], level, self.first_seed + i))
        return made


EVALUATION = Split((1, 2, 4, 7), FIRST_EVALUATION_SEED, (0.95, 0.85, 0.7, 0.4))
CALIBRATION = Split((0, 3, 5, 6), 3000, (0.95, 0.85, 0.7, 0.4))
