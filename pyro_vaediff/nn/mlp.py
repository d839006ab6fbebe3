r"""Multi-layer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..arguments import check_whole

__all__ = ["mlp"]


def mlp(
    in_features: int,
    out_features: int,
    hidden_features: Sequence[int] = (300, 300, 300),
    activation: type[nn.Module] = nn.SiLU,
) -> nn.Sequential:
    r"""Returns a multi-layer perceptron.

    Arguments:
        in_features: The number of inputs.
        out_features: The number of outputs.
        hidden_features: The width of each hidden layer.
        activation: The activation between the layers. The paper's code has ``nn.SELU``, which takes
            many times longer on a CPU and did not fit better.
    """
    for width in (in_features, *hidden_features, out_features):
        check_whole("the width of a layer", width)
    layers: list[nn.Module] = []
    for width in hidden_features:
        layers += [nn.Linear(in_features, width), activation()]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, out_features))
