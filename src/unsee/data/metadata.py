"""Columns of metadata that several data sets have, made to go together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import datasets
import pyarrow as pa


def common_type(types: Iterable[pa.DataType]) -> pa.DataType:
    """Returns a type for values of several: numbers for numbers, and text for anything else."""
    kinds: list[pa.DataType] = []
    for kind in types:
        # Lists are the same whatever their items are called, though their hashes are not.
        if not pa.types.is_null(kind) and not any(kind == known for known in kinds):
            kinds.append(kind)
    if len(kinds) < 2:
        return kinds[0] if kinds else pa.null()
    if all(pa.types.is_integer(kind) for kind in kinds):
        return pa.int64()
    if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds):
        return pa.float64()
    return pa.string()


def as_type(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Returns a column as the common type of its own and others; what is no text becomes JSON."""
    if column.type == kind or pa.types.is_null(column.type):
        return column
    if kind != pa.string():
        return column.cast(kind, safe=False)
    values = [
        v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False, default=str)
        for v in column.to_pylist()
    ]
    return pa.chunked_array([pa.array(values, kind)])


def of_one_type(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """Returns tables whose columns of one name have one type, or that of no value at all."""
    names = dict.fromkeys(name for table in tables for name in table.column_names)
    kinds = {
        name: common_type(t.schema.field(name).type for t in tables if name in t.column_names)
        for name in names
    }
    return [
        pa.table({name: as_type(table[name], kinds[name]) for name in table.column_names})
        for table in tables
    ]


def aligned(tables: Sequence[datasets.Dataset]) -> list[datasets.Dataset]:
    """Returns data sets that can be concatenated: see `of_one_type`."""
    found = list(tables)
    schemas = [table.features.arrow_schema for table in tables]
    for name in dict.fromkeys(name for table in tables for name in table.column_names):
        kind = common_type(s.field(name).type for s in schemas if name in s.names)
        for i, schema in enumerate(schemas):
            if name in schema.names and schema.field(name).type not in (kind, pa.null()):
                column = found[i].select_columns(name).with_format("arrow")[:][name]
                values = as_type(column, kind).to_pylist()
                found[i] = found[i].remove_columns(name).add_column(name, values)
    return found
