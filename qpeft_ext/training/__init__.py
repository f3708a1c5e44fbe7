"""`QPeftTrainer`, its examples, losses and checkpoints."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import losses as losses
    from .trainer import QPeftTrainer as QPeftTrainer
else:
    from ..utils.faces import lazy_names

    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        QPeftTrainer="trainer",
        losses="losses",
    )
