"""Published models in folders: their tensors, small random ones of transformers, and what these put out."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seqmodels.interop._files import WeightFiles

# Where these are installed, transformers takes their kernels, which want a GPU.
KERNELS = ("fla", "mamba_ssm", "causal_conv1d")


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Within, what transformers imports finds none of them. It looks for them once, as it imports a model's file."""
    before = {name: sys.modules[name] for name in KERNELS if name in sys.modules}
    sys.modules.update(dict.fromkeys(KERNELS))
    try:
        yield
    finally:
        for name in KERNELS:
            del sys.modules[name]
        sys.modules.update(before)


def model_class(architecture: str) -> Any:
    """A class of transformers, without the kernels of others; the test is skipped where it is not installed."""
    pytest.importorskip("torch", reason="needs torch: pip install -e '.[peers]'")
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[peers]'")
    transformers.logging.set_verbosity_error()
    with without_kernels():
        return getattr(transformers, architecture)


def write(folder: Path, architecture: str, *, seed: int = 0, dtype: str = "float32", **fields: Any) -> Any:
    """Save a model of that architecture with random weights, and return it."""
    cls = model_class(architecture)
    import torch

    torch.manual_seed(seed)
    model = cls(cls.config_class(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return model


def read(folder: Path, architecture: str) -> Any:
    """The model in a folder, as transformers reads it; a missing, surplus or misshapen weight fails the test."""
    model, report = model_class(architecture).from_pretrained(folder, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem], f"{problem}: {report[problem]}"
    return model.eval()


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Of a whole sequence at once, float32."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), use_cache=False).logits.float().numpy()


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All the tensors of a folder."""
    files = WeightFiles(folder)
    return {name: files.read(name) for name in files}


def write_tensors(folder: Path, weights: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
    """A folder with these weights in one file, and this config.json."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(x) for name, x in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
