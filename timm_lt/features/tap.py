"""The features of a forward pass, beside its logits and with their gradients."""

from torch import Tensor, nn

from timm_lt.features.backbone import as_rows, chosen_classifier
from timm_lt.heads import find_classifiers
from timm_lt.utils.checks import UsageError


class FeatureTap:
    """Keeps what a model's only classifier takes, forward pass by forward pass.

    >>> import timm, torch
    >>> model = timm.create_model("test_resnet", num_classes=3)
    >>> tap = FeatureTap(model)
    >>> logits = model(torch.zeros(2, 3, 32, 32))
    >>> features = tap.take()
    >>> features.shape, torch.equal(model.fc(features), logits)
    (torch.Size([2, 96]), True)

    Args:
        model: A timm model, not wrapped for several processes.

    Raises:
        UsageError: If it has several classifiers, or none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._classifier = find_classifiers(model)[chosen_classifier(model, None)]
        self._taken: Tensor | None = None
        self._hook = self._classifier.register_forward_pre_hook(self._take)

    def _take(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._taken = inputs[0]

    def take(self) -> Tensor:
        """Returns the features (N, D) of the last forward pass, once.

        Raises:
            UsageError: If there was none, or it did without the classifier.
        """
        if self._taken is None:
            raise UsageError("the model computed its output without calling its classifier")
        taken, self._taken = self._taken, None
        return as_rows(taken, self._classifier)

    def remove(self) -> None:
        """Leaves the model as it was."""
        self._hook.remove()
