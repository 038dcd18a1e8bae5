"""A picture of spikes: tokens from left to right, channels from bottom to top, colour for the count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from spikelm.errors import ConfigError, ShapeError


def draw_raster(path: str | Path, counts: Tensor, *, title: str, tokens: Sequence[str] | None = None) -> Path:
    """Write a spike raster as PNG.

    Args:
        path: file to write.
        counts: [T, D] spike counts of one projection's input; 0 is silence.
        title: above the picture; the firing rate is added.
        tokens: T strings, shown below the picture where they fit (up to 64).

    Raises:
        ShapeError: counts are not [T, D].
        ConfigError: the file cannot be written.
    """
    if counts.dim() != 2 or counts.numel() == 0:
        raise ShapeError(f"a raster needs counts [T, D], got {list(counts.shape)}")
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = counts.detach().float().cpu().T.numpy()
    reach = max(float(np.quantile(np.abs(values), 0.995)), 1.0)
    rate = float((values != 0).mean())
    figure, axes = pyplot.subplots(figsize=(11, 5.5), layout="constrained")
    # Cividis-like and diverging maps stay readable for colour-blind eyes; white is silence.
    image = axes.imshow(
        values, aspect="auto", origin="lower", cmap="PuOr", vmin=-reach, vmax=reach, interpolation="nearest"
    )
    axes.set_title(f"{title}: {rate:.1%} of channels fire")
    axes.set_ylabel("channel")
    axes.set_xlabel("token")
    if tokens is not None and len(tokens) == values.shape[1] <= 64:
        labels = [text.replace("\n", "\\n").replace("$", r"\$") for text in tokens]
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7, family="monospace")
    figure.colorbar(image, ax=axes, label="spike count")
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=120)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        pyplot.close(figure)
    return target
