"""What config files may name: models, layers, data, optimizers, and the training job itself, as `train`."""

from seqmodels import config
from seqmodels.data import TextData, mask_inputs, next_token_targets, synthetic
from seqmodels.layers import GLU, SGLU, GeGLU, MoE, SwiGLU
from seqmodels.models import Autoencoder, LanguageModel, Regressor
from seqmodels.registry import MIXERS
from seqmodels.training import SGD, Adafactor, AdamW, DeviceMesh, Lion, TrainingJob


def register_constructors() -> None:
    """Make all of them known to `seqmodels.config`. A second call changes nothing."""
    config.register(TrainingJob, name="train")
    models = [LanguageModel, Autoencoder, Regressor]
    layers = [entry.layer for entry in MIXERS.values()] + [GLU, SwiGLU, GeGLU, SGLU, MoE]
    tasks = [getattr(synthetic, name) for name in synthetic.__all__]
    data = [TextData, *tasks, next_token_targets, mask_inputs]
    optimizers = [AdamW, Lion, Adafactor, SGD]
    for constructor in [*models, DeviceMesh, *layers, *data, *optimizers]:
        config.register(constructor)
