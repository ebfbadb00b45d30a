"""How long heads are trained by SGD, on features as on images: what the reference code does."""

from dataclasses import dataclass

# Rows or images of an update.
BATCH_SIZE = 512


@dataclass(frozen=True)
class TrainingLength:
    """How long a head is trained unless somebody says so.

    Attributes:
        epochs: Of the reference code on ImageNet-LT.
        least_updates: At least so many: an epoch of a small data set is a handful of them.
    """

    epochs: int
    least_updates: int

    def updates(
        self,
        images: int,
        *,
        batch_size: int = BATCH_SIZE,
        epochs: int | None = None,
        steps: int | None = None,
    ) -> int:
        """Returns for how many updates to train.

        >>> CRT_LENGTH.updates(115_846)
        2260
        >>> CRT_LENGTH.updates(10_847)
        1000
        >>> CRT_LENGTH.updates(10_847, batch_size=128, epochs=2)
        168

        Args:
            images: Images of an epoch; fewer than a batch are one update.
            batch_size: Images of an update.
            epochs: Given as epochs, in place of the length of the reference code.
            steps: Given as such, and returned; it goes before ``epochs``.
        """
        if steps is not None:
            return steps
        per_epoch = max(images // batch_size, 1)
        if epochs is not None:
            return epochs * per_epoch
        return max(self.epochs * per_epoch, self.least_updates)


CRT_LENGTH, LWS_LENGTH = TrainingLength(10, 1000), TrainingLength(5, 500)
# Not the 60 epochs of its paper, in which the backbone learns too: on frozen features more of them
# help many-shot classes at the cost of the others (docs/choose-a-head.md has validation figures).
OLTR_LENGTH, OLTR_BATCH_SIZE = TrainingLength(2, 150), 128
