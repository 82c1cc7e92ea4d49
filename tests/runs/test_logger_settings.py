"""All loggers of a run write in its directory, and W&B knows the run by experiment and name."""

from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace
from lightning.pytorch import loggers

from thinned.runs.logger_settings import fill_in_loggers, wandb_id

RUN = Path("/runs/digits/a")
OURS = {"CSVLogger": "thinned.runs.CSVLogger", "WandbLogger": "thinned.runs.WandbLogger"}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def logger(class_path: str, **options: Any) -> Namespace:
    return Namespace(class_path=class_path, init_args=Namespace(**options))


def filled(given: Any) -> list[tuple[str, dict[str, Any]]]:
    got = fill_in_loggers(given, RUN, "digits")
    return [(each.class_path, vars(each.init_args)) for each in (got if isinstance(given, list) else [got])]


CSV = {"save_dir": str(RUN), "name": "", "version": ""}
WANDB = {"save_dir": str(RUN), "id": "digits.a", "name": "digits a"}


@pytest.mark.parametrize("given", [None, True])
def test_no_logger_is_a_metrics_file(given: Any) -> None:
    assert filled(given) == [(OURS["CSVLogger"], CSV)]


def test_false_is_no_logger() -> None:
    assert fill_in_loggers(False, RUN, "digits") is False


@pytest.mark.parametrize("package", ["thinned.runs", "lightning.pytorch.loggers"])
@pytest.mark.parametrize("as_list", [True, False])
def test_each_logger_is_put_in_the_run(package: str, as_list: bool) -> None:
    for name, expected in (("CSVLogger", CSV), ("WandbLogger", WANDB)):
        one = logger(f"{package}.{name}", save_dir=".")
        assert filled([one] if as_list else one) == [(OURS[name], expected)]
        assert one == logger(f"{package}.{name}", save_dir=".")  # which config.yaml keeps


@pytest.mark.parametrize("order", [1, -1])
def test_csv_beside_wandb_is_its_own_file(order: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        got = filled([logger(OURS["WandbLogger"], project="p"), logger(OURS["CSVLogger"], save_dir=".")][::order])
    assert got == [(OURS["WandbLogger"], WANDB | {"project": "p"})]
    assert "WandbLogger writes metrics.csv too, so CSVLogger is left out." in caplog.messages


def test_loggers_of_lightning_keep_their_class() -> None:
    got = filled([logger("lightning.pytorch.loggers.TensorBoardLogger", save_dir="."), logger(OURS["CSVLogger"])])
    assert got == [("lightning.pytorch.loggers.TensorBoardLogger", CSV), (OURS["CSVLogger"], CSV)]


def test_name_for_wandb_is_kept() -> None:
    ((_, options),) = filled(logger(OURS["WandbLogger"], name="lr sweep 3"))
    assert (options["name"], options["id"]) == ("lr sweep 3", "digits.a")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("WandbLogger", key) for key in ("save_dir", "dir", "id", "version")),
        *(("CSVLogger", key) for key in ("save_dir", "name", "version")),
    ],
)
def test_place_that_is_given_is_refused_by_name(name: str, key: str) -> None:
    message = rf"Expected trainer\.logger\.{key} to be left to runs_dir, experiment and run_id, but got 'mine'"
    with pytest.raises(ValueError, match=message):
        filled(logger(OURS[name], **{key: "mine"}))
    one = logger(OURS[name])
    one.dict_kwargs = {key: "mine"}
    with pytest.raises(ValueError, match=message):
        filled([one])


def test_two_loggers_of_a_class_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected trainer\.logger with one logger of a class"):
        filled([logger(OURS["WandbLogger"], project=name) for name in "ab"])


def test_defaults_are_not_taken_for_choices() -> None:
    for cls in (loggers.CSVLogger, loggers.WandbLogger):
        assert filled(
            logger(f"lightning.pytorch.loggers.{cls.__name__}", name="lightning_logs" * (cls is loggers.CSVLogger))
        )


def test_no_two_runs_have_one_id() -> None:
    names = ["a", "a.b", "b", "b.a", "a=b", "ä", "a b", "=2e="]
    ids = {wandb_id(experiment, run) for experiment in names for run in names}
    assert len(ids) == len(names) ** 2
    assert not set("".join(ids)) & set("/\\#?%: ")
