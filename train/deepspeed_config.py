"""DeepSpeed's settings: a file says how ZeRO splits and offloads, everything else is the run's configuration.

One value has one place. What a training configuration says (optimiser, learning rate, clipping, precision,
batch sizes) is written into DeepSpeed's configuration from there, and a file that says it too is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikelm.errors import ConfigError, nearest

if TYPE_CHECKING:
    from spikelm.train.config import TrainConfig

OURS = {
    "optimizer": "optim",
    "scheduler": "schedule",
    "gradient_clipping": "optim.clip",
    "bf16": "precision",
    "fp16": "precision (bf16 or fp32; fp16 is not offered)",
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "batch_size and accumulation",
    "gradient_accumulation_steps": "accumulation",
    "activation_checkpointing": "gradient_checkpointing",
    "checkpoint": "checkpoint_every and keep",
    "amp": "precision",
}
"""Sections of a DeepSpeed file that a training configuration decides -> the key that does."""


def presets() -> dict[str, Path]:
    """Name -> file of the settings in configs/deepspeed."""
    folder = Path(__file__).resolve().parents[1] / "configs" / "deepspeed"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def read_settings(source: str) -> dict[str, Any]:
    """The settings that ``deepspeed: source`` names.

    Args:
        source: a name in configs/deepspeed, or the path of a JSON file.

    Raises:
        ConfigError: there is no such file, it is not JSON, or it says what the training configuration says.
    """
    known = presets()
    path = Path(source)
    if source in known:
        path = known[source]
    elif path.suffix != ".json" and len(path.parts) == 1:
        raise ConfigError(
            nearest("deepspeed settings", source, known) + " (or give the path of a .json file)"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"deepspeed is {source!r}, which cannot be read ({error.strerror or error}); give one of "
            f"{', '.join(known)} or the path of a .json file"
        ) from error
    except ValueError as error:
        raise ConfigError(f"the DeepSpeed settings {path} are not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the DeepSpeed settings {path} hold a {type(values).__name__}; expected an object")
    for key, ours in OURS.items():
        if key in values:
            raise ConfigError(
                f"the DeepSpeed settings {path} set {key!r}; leave it out, the training configuration's "
                f"{ours} decides"
            )
    zero = values.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else None
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"the DeepSpeed settings {path} have ZeRO stage {stage!r}; expected 0, 1, 2 or 3")
    return values


def stage_of(settings: Mapping[str, Any]) -> int:
    """ZeRO stage of settings."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def offloads_optimizer(settings: Mapping[str, Any]) -> bool:
    """Whether the optimiser works on the CPU, which needs DeepSpeed's compiled CPUAdam."""
    device = settings.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    return str(device) != "none"


def complete(settings: Mapping[str, Any], config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The settings with what the training configuration decides.

    Raises:
        ConfigError: the optimiser cannot be split by ZeRO.
    """
    if config.optim.name == "muon":
        raise ConfigError(
            "optim.name is 'muon' with backend deepspeed; ZeRO splits matrices that Muon needs whole, "
            "use adamw, or backend=torch"
        )
    values = dict(settings)
    precision = {"enabled": config.precision == "bf16", "dtype": "bfloat16"}
    if config.precision == "bf16":
        # Parameters, gradients and what ranks exchange stay float32 unless the file names modules.
        values["torch_autocast"] = {
            "lower_precision_safe_modules": [],
            **dict(settings.get("torch_autocast", {})),
            **precision,
        }
    else:
        values.pop("torch_autocast", None)
    return {
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
        **values,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.accumulation,
        "train_batch_size": config.accumulation * world_size,
        "gradient_clipping": config.optim.clip,
        "zero_allow_untested_optimizer": True,
    }
