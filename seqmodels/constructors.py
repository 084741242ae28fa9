"""What config files may name: models, layers, data, optimizers, and the training job itself, as `train`."""

from seqmodels import config
from seqmodels.data import MQAR, TextData, mask_inputs, next_token_targets
from seqmodels.layers import GLU, SGLU, GeGLU, MoE, SwiGLU
from seqmodels.models import LanguageModel
from seqmodels.registry import MIXERS
from seqmodels.training import SGD, Adafactor, AdamW, DeviceMesh, Lion, TrainingJob


def register_constructors() -> None:
    """Make all of them known to `seqmodels.config`. A second call changes nothing."""
    config.register(TrainingJob, name="train")
    layers = [entry.layer for entry in MIXERS.values()] + [GLU, SwiGLU, GeGLU, SGLU, MoE]
    data = [TextData, MQAR, next_token_targets, mask_inputs]
    optimizers = [AdamW, Lion, Adafactor, SGD]
    for constructor in [LanguageModel, DeviceMesh, *layers, *data, *optimizers]:
        config.register(constructor)
