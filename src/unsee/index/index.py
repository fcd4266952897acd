"""The index: columns keyed by example id, and the curvature that goes with them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..curvature.diagonal import DiagonalFisher
from ..curvature.kfac import EKFAC, KFAC
from ..data.dataset import ImageDataset, OnError
from ..data.latents import EncodedDataset
from ..draws import Draws
from ..files import write_atomically
from ..models.base import Denoiser
from .build import (
    COLUMNS,
    Indexed,
    draws_of,
    environment_of,
    fill,
    layers_of,
    pack_examples,
    part_of,
    plan_shards,
    settings_of,
    unpack_examples,
)
from .factors import Layer, Quantised, Storage
from .fit import CurvatureName, fit_curvature
from .layout import (
    Manifest,
    Shard,
    read_manifest,
    read_shard,
    shard_path,
    write_manifest,
    write_shard,
)

DEFAULT_COLUMNS = ("loss", "factors", "outputs")


class Index:
    """What one pass over the training data has left behind for every later question.

    Made by `Index.build` or `Index.open`.

    Attributes:
        path: folder of the index.
        model: what it is of.
        manifest: what fixes its numbers.
        layers: selected layers, in the order of the factors' channels.
        draws: of the training examples.
        ids: of the training examples, in the order of the rows.
    """

    def __init__(self, path: Path, model: Denoiser, manifest: Manifest) -> None:
        self.path, self.model, self.manifest = path, model, manifest
        self.layers: list[Layer] = layers_of(manifest)
        self.draws: Draws = draws_of(manifest)
        table = pq.read_table(path / "examples.parquet", columns=["id"])
        self.ids: list[str] = table["id"].to_pylist()
        self._read: dict[tuple[str, str], tuple[dict[str, Tensor], dict[str, Any]]] = {}

    # -- making -----------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        path: str | Path,
        model: Denoiser,
        data: Indexed,
        columns: Sequence[str] = DEFAULT_COLUMNS,
        *,
        draws: Draws | None = None,
        storage: Storage = "int8",
        flips: bool = False,
        shard_size: int = 64,
        batch_size: int = 64,
        on_error: OnError = "raise",
    ) -> Self:
        """Builds an index, or goes on with one that was begun.

        Args:
            path: its folder.
            model: the denoiser; its selected parameters must read the text, see
                `unsee.index.factors`.
            data: the training set.
            columns: what to keep, see `unsee.index.build.COLUMNS`.
            draws: timesteps and noise of the training examples; 16 by default, always even.
            storage: of the factors.
            flips: also indexes mirrored pictures; the larger score of the two counts.
            shard_size: examples in a file; what a killed build loses at most.
            batch_size: passes at once.
            on_error: a picture that cannot be read is fatal (`"raise"`) or left out (`"skip"`).

        Raises:
            ValueError: the folder holds an index of another model, data set or setting (names the
                first that differs and both values), cannot be written, or see `fill`.
        """
        path = Path(path)
        draws = draws or Draws(0, 16, num_train_timesteps=model.num_train_timesteps)
        settings = settings_of(model, draws, columns, storage, shard_size, flips, on_error)
        part = part_of(data)
        if (path / "manifest.json").is_file():
            manifest = read_manifest(path)
            manifest.check(settings, path)
            if manifest.parts[0] != part:
                was = manifest.parts[0]
                raise ValueError(
                    f"index {str(path)!r}: it is of the data set {was.name!r} ({was.count} "
                    f"examples, fingerprint {was.fingerprint}), not of {part.name!r} "
                    f"({part.count}, {part.fingerprint}): ids, captions or their order differ; "
                    "use another folder, or Index.append for further examples"
                )
        else:
            manifest = plan_shards(Manifest(settings, environment_of(model)), part)
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            fill(path, manifest, model, data, 0, batch_size)
            return cls._finish(path, manifest, model, data)

    @classmethod
    def open(cls, path: str | Path, model: Denoiser) -> Self:
        """Opens a finished index.

        Raises:
            ValueError: there is none, it is not finished, or it is of another model.
        """
        path = Path(path)
        manifest = read_manifest(path)
        parameter = next(iter(model.parameters.values()))
        about = {
            "model": model.fingerprint(),
            "dtype": str(parameter.dtype).removeprefix("torch."),
        }
        manifest.check({**manifest.settings, **about}, path)
        names = [layer["name"] for layer in manifest.settings["layers"]]
        if names != list(model.parameters):
            raise ValueError(
                f"index {str(path)!r}: it is of {len(names)} parameters ({names[0]}, ...), the "
                f"model has {len(model.parameters)} selected ({next(iter(model.parameters))}, "
                "...); select the same"
            )
        missing = missing_shards(path, manifest)
        if missing or not (path / "examples.parquet").is_file():
            raise ValueError(
                f"index {str(path)!r}: {missing} of its shards are missing; run the same "
                "`unsee index` again to finish it"
            )
        return cls(path, model, manifest)

    @classmethod
    def _finish(cls, path: Path, manifest: Manifest, model: Denoiser, data: Indexed | None) -> Self:
        """Writes the table of examples from the shards, keeping the rows it has already."""
        table = _example_table(path, manifest, data)
        write_atomically(path / "examples.parquet", lambda p: pq.write_table(table, p))
        return cls(path, model, manifest)

    # -- changing ---------------------------------------------------------------------------

    def append(self, data: Indexed, batch_size: int = 64) -> Index:
        """Adds examples and returns the index with them; killed, it goes on where it was.

        Raises:
            ValueError: an id is there already or was deleted, or see `build`.
        """
        part = part_of(data)
        manifest = read_manifest(self.path)
        known = set(self.ids) | set(manifest.deleted)
        again = manifest.parts[-1] == part and len(manifest.parts) > 1
        taken = [i for i in data.ids if i in known]
        if taken and not again:
            raise ValueError(
                f"index {str(self.path)!r}: example {taken[0]!r} is there already, or was deleted; "
                "append examples with ids of their own"
            )
        if not again:
            manifest = plan_shards(manifest, part)
        with _writing(self.path):
            fill(self.path, manifest, self.model, data, len(manifest.parts) - 1, batch_size)
            return self._finish(self.path, manifest, self.model, data)

    def delete(self, ids: Sequence[str]) -> Index:
        """Erases examples (opt-out) and returns the index without them.

        Their rows leave every column, and the curvature that was fitted with them is removed, to
        be fitted again without them. Their ids stay in the manifest, so that a later build or
        `append` does not bring them back.

        Raises:
            ValueError: an id that is not there.
        """
        gone = set(ids)
        unknown = sorted(gone - set(self.ids))
        if unknown:
            raise ValueError(f"index {str(self.path)!r}: there is no example {unknown[0]!r}")
        shards, old = [], []
        with _writing(self.path):
            for shard in self.manifest.shards:
                about = self._column("examples", shard)[1]
                if gone.isdisjoint(about["ids"]):
                    shards.append(shard)
                    continue
                new = dataclasses.replace(shard, edition=shard.edition + 1)
                self._rewrite(shard, new, [i not in gone for i in about["ids"]])
                shards.append(new)
                old.append(shard)
            deleted = [*self.manifest.deleted, *(i for i in self.ids if i in gone)]
            manifest = dataclasses.replace(self.manifest, shards=shards, deleted=deleted)
            # From here on the index is the one without them, whatever is left to tidy up.
            write_manifest(self.path, manifest)
            for shard in old:
                for column in manifest.settings["columns"]:
                    shard_path(self.path, column, shard).unlink(missing_ok=True)
            shutil.rmtree(self.path / "curvature", ignore_errors=True)
            return self._finish(self.path, manifest, self.model, None)

    def _rewrite(self, shard: Shard, new: Shard, kept: list[bool]) -> None:
        """Writes the kept rows of a shard's columns as another edition of it."""
        key = self.manifest.key
        examples = self.examples(shard)
        counts = torch.tensor(examples.caption_counts)
        keep = torch.tensor(kept)
        captions = keep.repeat_interleave(counts)
        left = examples.select([i for i, k in zip(examples.ids, kept, strict=True) if k])
        packed = pack_examples(left if left.ids else None, self.manifest)
        write_shard(self.path, "examples", new, key, *packed)
        for column in self.manifest.settings["columns"][1:]:
            tensors, _ = self._column(column, shard)
            part = (
                {n: t[keep] for n, t in tensors.items()} if column == "loss"
                else {n: t[:, captions] for n, t in tensors.items()}
            )  # fmt: skip
            write_shard(self.path, column, new, key, part)

    # -- reading ----------------------------------------------------------------------------

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.manifest.settings["columns"])

    @property
    def nbytes(self) -> dict[str, int]:
        """Column -> bytes of its files."""
        return {
            c: sum(shard_path(self.path, c, s).stat().st_size for s in self.manifest.shards)
            for c in self.columns
        }

    def shards(self) -> Iterator[Shard]:
        """Iterates over the shards, in the order of `ids`."""
        return iter(self.manifest.shards)

    def examples(self, shard: Shard) -> EncodedDataset:
        """Returns the encoded examples of a shard."""
        return unpack_examples(*self._column("examples", shard))

    def text(self, shard: Shard) -> Tensor:
        """Returns the text states [captions, T, width] float32 of a shard's examples."""
        return self._column("examples", shard)[0]["text"]

    def losses(self, shard: Shard) -> Tensor:
        """Returns the losses [n, views, draws] float64 of a shard's examples."""
        return self._column("loss", shard)[0]["values"]

    def factors(self, column: str, shard: Shard) -> Quantised:
        """Returns the factors [views, captions, 2, T, channels] of a shard, as stored.

        Raises:
            ValueError: the index does not have the column.
        """
        if column not in self.columns:
            raise ValueError(
                f"index {str(self.path)!r}: it has no column {column!r}, only "
                f"{', '.join(self.columns)}; build another with it"
            )
        tensors = self._column(column, shard)[0]
        return Quantised(tensors["values"], tensors["scales"])

    def _column(self, column: str, shard: Shard) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return read_shard(self.path, column, shard, self.manifest.key)

    def curvature(
        self, name: CurvatureName = "ekfac", column: str = "factors"
    ) -> DiagonalFisher | KFAC | EKFAC:
        """Returns a curvature of the training examples, fitted once and kept in the index.

        Args:
            name: `ekfac`, `kfac` or `diagonal` from the stored gradients, which are averages over
                draws; or `diagonal_per_draw`, the published one, from passes over a sample.
            column: of whose gradients.
        """
        path = self.path / "curvature" / f"{column}-{name}.safetensors"
        kind = {"ekfac": EKFAC, "kfac": KFAC}.get(name, DiagonalFisher)
        if path.is_file():
            return kind.load(path)
        fitted = fit_curvature(self, name, column)
        with _writing(self.path):
            fitted.save(path)
        return fitted


def missing_shards(path: Path, manifest: Manifest) -> int:
    """Returns how many files of columns are not there."""
    return sum(
        not shard_path(path, column, shard).is_file()
        for column in manifest.settings["columns"]
        for shard in manifest.shards
    )


def describe_index(path: Path) -> list[str]:
    """Returns lines for a person: what is done, how large it is, and what it can answer.

    Raises:
        ValueError: no index there.
    """
    manifest = read_manifest(path)
    settings, total = manifest.settings, len(manifest.shards)
    examples = sum(p.count for p in manifest.parts) - len(manifest.deleted)
    lines = [
        f"index of {', '.join(p.name for p in manifest.parts)}: {examples} examples, "
        f"{len(manifest.deleted)} deleted",
        f"model {settings['model']}, {len(settings['layers'])} layers, "
        f"{settings['draws']['n']} draws, {settings['views']} views, stored as "
        f"{settings['storage']}",
    ]
    for column in settings["columns"]:
        files = [f for s in manifest.shards if (f := shard_path(path, column, s)).is_file()]
        size = sum(f.stat().st_size for f in files)
        lines.append(
            f"{column}: {len(files)} of {total} shards, {size / 1e6:.1f} MB, "
            f"{size / max(examples, 1) / 1e3:.1f} kB an example; {COLUMNS[column]}"
        )
    return lines


class _writing:
    """Turns what a file system refuses into one line that says what to do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError):
            raise ValueError(
                f"index {str(self.path)!r} cannot be written ({error.strerror or error}): make "
                "room or choose another folder, and run the same again; what is done is kept"
            ) from error


def _example_table(path: Path, manifest: Manifest, data: Indexed | None) -> pa.Table:
    """Returns ids, captions, shards and metadata; what `data` does not tell comes from before."""
    rows: list[dict[str, Any]] = []
    for shard in manifest.shards:
        about = read_shard(path, "examples", shard, manifest.key)[1]
        rows += [{"id": i, "shard": shard.number} for i in about["ids"]]
    known: dict[str, dict[str, Any]] = {}
    if (path / "examples.parquet").is_file():
        known = {r["id"]: r for r in pq.read_table(path / "examples.parquet").to_pylist()}
    if isinstance(data, ImageDataset):
        at = {identifier: position for position, identifier in enumerate(data.ids)}
        for row in rows:
            if row["id"] in at:
                position = at[row["id"]]
                known[row["id"]] = {
                    **data.metadata(position), "captions": list(data.captions[position])
                }  # fmt: skip
    merged = [{**known.get(row["id"], {}), **row} for row in rows]
    names = dict.fromkeys(["id", "captions", "shard", *(n for row in merged for n in row)])
    return pa.table({name: [row.get(name) for row in merged] for name in names})
