"""Price tables: what an operation and a byte cost, read from YAML and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spikelm.energy.counts import Operations
from spikelm.errors import ConfigError, nearest
from spikelm.yaml_values import read_yaml

BUILT_IN = Path(__file__).with_name("prices.yaml")
DEFAULT = "horowitz-45nm"
OTHER = "float32"
"""Type of number of everything outside products: norms, recurrences, neurons."""
EXPONENTIAL = Operations(dense_macs=9, multiplications=2, additions=2, comparisons=2)
"""An exponential (log, sine, cosine alike) as ``exp_nonpositive`` in kernels/real.h computes it."""

Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Arithmetic(BaseModel):
    """Picojoules of one type of number."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    multiply: Price
    add: Price


class Table(BaseModel):
    """Prices of one technology, in picojoules; see prices.yaml for the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: Annotated[str, Field(min_length=1)]
    operations: dict[str, Arithmetic]
    accumulator: str
    division: Price | None
    sram: Annotated[list[tuple[Annotated[int, Field(gt=0)], Price]], Field(min_length=1)]
    dram: tuple[Price, Price]

    @model_validator(mode="after")
    def _complete(self) -> Table:
        for name in ("int8", OTHER, self.accumulator):
            if name not in self.operations:
                raise ValueError(f"operations lacks {name}")
        if self.dram[0] > self.dram[1]:
            raise ValueError("dram is [least, most]")
        return self

    def arithmetic(self, dtype: str) -> Arithmetic:
        """Prices of a type of number.

        Raises:
            ConfigError: the table has none.
        """
        if dtype not in self.operations:
            raise ConfigError(
                f"the price table has no {dtype} (it has {', '.join(sorted(self.operations))}); choose "
                "another table with --prices"
            )
        return self.operations[dtype]

    def add(self, dtype: str) -> float:
        """An addition to a running sum of products of weights of this type."""
        return self.arithmetic(self.accumulator if dtype == "int8" else dtype).add

    def mac(self, dtype: str) -> float:
        """A multiply-accumulate with weights of this type."""
        return self.arithmetic(dtype).multiply + self.add(dtype)

    def quantised_mac(self, dtype: str, bits: int) -> float:
        """A multiply-accumulate of weights of this type with an activation of ``bits`` bits.

        int8: the multiplier is an array of 8 x bits cells, bits / 8 of the 8 x 8 one (Horowitz's 8 and 32 bit
        multipliers differ by 15.5, the ratio of their cells is 16); with one bit nothing is multiplied. Other
        weights: the full price, since a float multiplier does not shrink with whole activations.
        """
        if dtype != "int8":
            return self.mac(dtype)
        return (0.0 if bits == 1 else self.arithmetic(dtype).multiply * min(bits, 8) / 8) + self.add(dtype)

    def elementary(self, found: Operations) -> float:
        """Operations outside products, in float32.

        A comparison and a rounding cost an addition (a comparison is a subtraction: PMC8934428, table 3, note
        a; for the rounding it is our assumption), a root a division (assumption), an exponential what its
        polynomial does.
        """
        own = self.arithmetic(OTHER)
        divided = 0.0 if self.division is None else self.division * own.multiply
        exponential = (
            EXPONENTIAL.dense_macs * (own.multiply + own.add)
            + EXPONENTIAL.multiplications * own.multiply
            + (EXPONENTIAL.additions + EXPONENTIAL.comparisons) * own.add
        )
        return (
            found.multiplications * own.multiply
            + (found.additions + found.comparisons + found.roundings) * own.add
            + (found.divisions + found.roots) * divided
            + found.exponentials * exponential
        )

    def on_chip(self, size: int) -> float:
        """Picojoules per byte of an on-chip memory of ``size`` bytes: that of the next larger one listed.

        Beyond the largest one its price is used, which is too little.
        """
        listed = sorted(self.sram)
        return next((price for limit, price in listed if limit >= size), listed[-1][1])


def load_prices(choice: str | None = None) -> tuple[str, dict[str, Table]]:
    """Tables by name, and the name of the one that is shown.

    Args:
        choice: name of a built-in table, or a YAML file, whose first table is shown; None: the default.

    Raises:
        ConfigError: no such table or file, or a file that is no price table.
    """
    tables = _read(BUILT_IN)
    if choice is None:
        return DEFAULT, tables
    if choice in tables:
        return choice, tables
    path = Path(choice)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        raise ConfigError(nearest("price table", choice, tables) + " (or give a YAML file)")
    own = _read(path)
    return next(iter(own)), {**tables, **own}


def _read(path: Path) -> dict[str, Table]:
    content: Mapping[str, Any] = read_yaml(path)
    found = content.get("tables")
    if set(content) != {"tables"} or not isinstance(found, Mapping) or not found:
        raise ConfigError(
            f"{path} is no file of prices; expected the key tables with one table or more (docs/energy.md)"
        )
    tables = {}
    for name, value in found.items():
        try:
            tables[str(name)] = Table.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ConfigError(
                f"{path}: price table {name!r}{', ' + place if place else ''}: {first['msg']}; see "
                "docs/energy.md for the form"
            ) from error
    return tables
