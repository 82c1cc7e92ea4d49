"""What of a person's own an error comes from: the object that his config names, and the line of code."""

import re
import sys
import sysconfig
import traceback
from pathlib import Path

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

KEYS: dict[type, str] = {
    Callback: "trainer.callbacks",
    Logger: "trainer.logger",
    Optimizer: "model.optimizer",
    LightningDataModule: "data",
    Dataset: "data",
    LightningModule: "model",
    nn.Module: "model.net",
}
PACKAGE = Path(__file__).parents[1]
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")} | {sys.base_prefix, "<"})


def origin(error: BaseException) -> str:
    """Names the innermost object of the config in an error's traceback, and the innermost line outside of libraries."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]
    objects = [frame.f_locals.get("self") for frame in frames]
    named = (f"{type(o).__name__} ({KEYS[k]})" for o in objects for k in KEYS if isinstance(o, k) and _is_chosen(o))
    # A worker of a data loader sends its traceback as text.
    lines = re.findall(r'File "(.+?)", line (\d+)', str(error))[::-1]
    lines += [(f.filename, str(f.lineno)) for f in traceback.extract_tb(error.__traceback__)[::-1]]
    own = [line for line in lines if not line[0].startswith(LIBRARIES)]
    outside = [
        line for line in own if not Path(line[0]).is_relative_to(PACKAGE) and "scripts" not in Path(line[0]).parts
    ]
    places = (f"{Path(file).name}, line {line}" for file, line in outside or own)
    return ", ".join(part for part in (next(named, ""), next(places, "")) if part)


def _is_chosen(thing: object) -> bool:
    """Whether a config may name the class of an object; layers of torch stand inside of what it names."""
    return not type(thing).__module__.startswith("torch.nn.")
