"""The index: columns keyed by example id, and the curvature that goes with them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from ..curvature.diagonal import DiagonalFisher
from ..curvature.kfac import EKFAC, KFAC
from ..data.dataset import ImageDataset, OnError
from ..draws import Draws
from ..models.base import Denoiser
from .build import (
    ENCODED_BY,
    MEASURES,
    comparable,
    draws_of,
    encoded_by,
    environment_of,
    fill,
    layers_of,
    open_encoders,
    part_of,
    plan_shards,
    reopen_encoders,
    settings_of,
)
from .columns import Columns
from .components import Components
from .examples import Indexed, pack_examples
from .factors import Layer, Measure, Storage
from .features import Encoders
from .fit import CurvatureName, fit_curvature
from .kernel import SketchKernel, fit_kernel
from .layout import (
    Manifest,
    Shard,
    check_unchanged,
    create_manifest,
    curvature_path,
    edition_of,
    list_others,
    missing_shards,
    read_manifest,
    remove_files,
    rows_key,
    shard_path,
    write_manifest,
    write_shard,
    writing,
)
from .sketch import Sketch
from .table import finished, read_rows, settled, write_table

DEFAULT_COLUMNS = ("loss", "factors", "outputs")


class Index(Columns):
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
        rows = read_rows(path, manifest)
        if rows is None:
            raise ValueError(
                f"index {str(path)!r}: its table of examples is not complete; run the same "
                "`unsee index`, or `append` with the same examples, again to finish it"
            )
        super().__init__(path, manifest, rows)
        self.model = model
        self.layers: list[Layer] = layers_of(manifest)
        self.draws: Draws = draws_of(manifest)
        self.ids: list[str] = [i for shard in manifest.shards for i in self.rows[shard.number]]

    # -- making -----------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        path: str | Path,
        model: Denoiser,
        data: Indexed,
        columns: Sequence[str] = DEFAULT_COLUMNS,
        *,
        encoders: Sequence[str] = (),
        draws: Draws | None = None,
        storage: Storage = "int8",
        tolerance: float = 3e-4,
        sketch: Sketch | None = None,
        flips: bool = False,
        shard_size: int = 64,
        batch_size: int = 64,
        on_error: OnError = "raise",
    ) -> Self:
        """Builds an index, or goes on with one that was begun, or with an addition to it.

        Args:
            path: its folder.
            model: the denoiser; its selected parameters must read the text, see
                `unsee.index.factors`.
            data: the training set.
            columns: what to keep, see `unsee.index.build.COLUMNS`.
            encoders: of the column `features`, see `load_encoders`; `latent` and `text` by default.
            draws: timesteps and noise of the training examples; 16 by default, always even.
            storage: of factors and sketches.
            tolerance: share of an example's squared gradient that may be left out to keep it
                small, see `unsee.index.components`; 0 for none.
            sketch: of the column `sketch`; `Sketch()` by default.
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
        seen_by = open_encoders(encoders, columns, model, data)
        settings = settings_of(
            model, draws, columns, storage, shard_size, flips, on_error, seen_by, tolerance, sketch
        )
        settings |= encoded_by(model, data)
        part = part_of(data)
        if not (path / "manifest.json").is_file():
            first = plan_shards(Manifest(settings, environment_of(model)), part)
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
                create_manifest(path, first)
        manifest = read_manifest(path)  # another builder's, where it was faster
        if manifest.was_appended(part):  # it has its own
            settings["on_error"] = manifest.settings["on_error"]
        manifest.check(comparable(settings, manifest.settings), path)
        number = manifest.number_of(part, path)
        return cls._fill(path, manifest, model, data, number, batch_size, seen_by, on_error)

    @classmethod
    def open(cls, path: str | Path, model: Denoiser) -> Self:
        """Opens a finished index; with a warning, what it was before an unfinished addition.

        Raises:
            ValueError: there is none, it is not finished, or it is of another model.
        """
        path = Path(path)
        manifest = finished(path, read_manifest(path))
        parameter = next(model.network.parameters())
        about: dict[str, Any] = {
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "model": model.fingerprint(),
        }
        if ENCODED_BY in manifest.settings and model.pipeline is not None:
            about[ENCODED_BY] = model.encoder_fingerprints()
        manifest.check({**manifest.settings, **about}, path)
        names = [layer["name"] for layer in manifest.settings["layers"]]
        for here, asked in itertools.zip_longest(names, model.parameters):
            if names and here != asked:
                raise ValueError(
                    f"index {str(path)!r}: it is of {len(names)} parameters, the model has "
                    f"{len(model.parameters)} selected; the first that differs is {here} there, "
                    f"{asked} here: select the same"
                )
        if missing := missing_shards(path, manifest):
            again = "run the same `unsee index` again to finish it"
            if len(manifest.parts) > 1:
                again = f"run `unsee index` of {' and of '.join(missing)} again, without --append"
            raise ValueError(
                f"index {str(path)!r}: {missing.total()} of its shards are missing; {again}"
            )
        return cls(path, model, manifest)

    @classmethod
    def _fill(
        cls, path: Path, manifest: Manifest, model: Denoiser, data: Indexed, part: int,
        batch_size: int, encoders: Encoders, on_error: OnError,
    ) -> Self:  # fmt: skip
        """Computes what is missing of a part, and leaves a later one that is not finished alone."""
        whole = manifest if part == len(manifest.parts) - 1 else finished(path, manifest)
        with writing(path):
            fill(path, whole, model, data, part, batch_size, encoders, on_error)
            check_unchanged(path, manifest)
            write_table(path, whole, data)
        index = cls(path, model, whole)
        if not index.ids and not whole.deleted:
            raise ValueError(
                f"index {str(path)!r}: none of the {len(data.ids)} pictures can be read, so there "
                "is nothing in it; repair them, and build in another folder"
            )
        return index

    # -- changing ---------------------------------------------------------------------------

    def append(
        self, data: Indexed, batch_size: int = 64, encoders: Sequence[str] = (),
        on_error: OnError | None = None,
    ) -> Index:  # fmt: skip
        """Adds examples and returns the index with them; killed, it goes on where it was.

        Another addition that was not finished is given up.

        Args:
            data, batch_size: as `build` takes them.
            encoders: folders of the vision encoders that the index was built with, if any.
            on_error: a picture that cannot be read is fatal or left out; as when the index was
                built if nothing is said.

        Raises:
            ValueError: an id is there already or was deleted, examples do not fit, or see `build`.
        """
        part = part_of(data)
        begun = read_manifest(self.path)
        seen_by = reopen_encoders(encoders, begun, self.model, data)
        before, last = settled(self.path, begun), begun.parts[-1]
        same = (last.fingerprint, last.count) == (part.fingerprint, part.count)
        if before is not begun and same:
            manifest = begun  # goes on
        else:
            Index(self.path, self.model, before)._check_new(data)
            manifest = plan_shards(before, part)
            with writing(self.path):
                given_up = [] if before is begun else list_others(self.path, manifest)
                write_manifest(self.path, manifest, begun)
                remove_files(given_up)
        number = len(manifest.parts) - 1
        return self._fill(self.path, manifest, self.model, data, number, batch_size, seen_by,
                          on_error or manifest.settings["on_error"])  # fmt: skip

    def _check_new(self, data: Indexed) -> None:
        """Refuses what cannot be appended, before anything is written."""
        taken = {*self.ids, *self.manifest.deleted}.intersection(data.ids)
        if taken:
            raise ValueError(
                f"index {str(self.path)!r}: example {min(taken)!r} is there already, or was "
                "deleted; append examples with ids of their own"
            )
        known = next((e for e in map(self.examples, self.shards()) if e.ids), None)
        if isinstance(data, ImageDataset) or known is None:
            return
        has_flips = self.manifest.settings["views"] == 2
        here, given = (
            f"latents {list(some.latents([0]).shape[1:])}, text of width "
            f"{some.text([0], 0).shape[-1]}{' and mirrored views' if flips else ''}"
            for some, flips in ((known, has_flips), (data, has_flips and data.has_flips))
        )
        if here != given:
            raise ValueError(
                f"index {str(self.path)!r}: its examples have {here}, those to append {given}; "
                "encode them with the model and the options of the index"
            )

    def delete(self, ids: Sequence[str]) -> Index:
        """Erases examples (opt-out) and returns the index without them; killed, call it again.

        Their rows leave every column, and the curvature that was fitted with them is removed, to
        be fitted again without them. Their ids stay in the manifest, so that a later build or
        `append` does not bring them back. An addition that was not finished is given up.

        Raises:
            ValueError: an id that is not there.
        """
        begun, gone = read_manifest(self.path), set(ids)
        manifest = settled(self.path, begun)
        before = Index(self.path, self.model, manifest)
        unknown = sorted(gone - set(before.ids) - set(manifest.deleted))
        if unknown:
            raise ValueError(f"index {str(self.path)!r}: there is no example {unknown[0]!r}")
        shards = list(manifest.shards)
        with writing(self.path), self._undone_unless_listed() as written:
            for place, shard in enumerate(manifest.shards):
                here = before.rows[shard.number]
                if gone.isdisjoint(here):
                    continue
                edition = edition_of([i for i in here if i not in gone])
                shards[place] = dataclasses.replace(shard, edition=edition)
                written.append(shards[place])
                before._rewrite(shard, shards[place], [i not in gone for i in here])
            deleted = [*manifest.deleted, *(i for i in before.ids if i in gone)]
            manifest = dataclasses.replace(manifest, shards=shards, deleted=deleted)
            # Named before: what another writer adds, once it has read the new manifest, is kept.
            others = list_others(self.path, manifest)
            # From here on the index is the one without them, whatever is left to tidy up.
            write_manifest(self.path, manifest, begun)
            remove_files(others)
            write_table(self.path, manifest)
        return Index(self.path, self.model, manifest)

    @contextlib.contextmanager
    def _undone_unless_listed(self) -> Iterator[list[Shard]]:
        """Removes what was written of shards, where something fails before the manifest has them.

        Another writer may meanwhile have erased what is in them.
        """
        written: list[Shard] = []
        try:
            yield written
        except BaseException:
            listed = read_manifest(self.path).shards
            lost = [s for s in written if s not in listed]
            remove_files(shard_path(self.path, c, s) for c in self.columns for s in lost)
            raise

    def _rewrite(self, shard: Shard, new: Shard, kept: list[bool]) -> None:
        """Writes the kept rows of a shard's columns as another edition of it."""
        examples = self.examples(shard)
        keep = torch.tensor(kept)
        left = examples.select([i for i, k in zip(examples.ids, kept, strict=True) if k])
        packed = pack_examples(left if left.ids else None, self.manifest)
        write_shard(self.path, self.manifest, "examples", new, *packed)
        of = {"rows": rows_key(left.ids)}
        for column in self.manifest.settings["columns"][1:]:
            tensors, _ = self._column(column, shard)
            part = (
                Components.of(tensors).select(keep).tensors if column in MEASURES
                else {n: t[keep] for n, t in tensors.items()}
            )  # fmt: skip
            write_shard(self.path, self.manifest, column, new, part, of)

    # -- curvature --------------------------------------------------------------------------

    def curvature(
        self, name: CurvatureName = "ekfac", column: str = "factors"
    ) -> DiagonalFisher | KFAC | EKFAC:
        """Returns a curvature of the training examples, fitted once and kept in the index.

        When rows come or go, it is fitted again.

        Args:
            name: `ekfac`, `kfac` or `diagonal` from the stored gradients, which are averages over
                draws; or `diagonal_per_draw`, the published one, from passes over a sample.
            column: of whose gradients.
        """
        path = curvature_path(self.path, self.manifest, f"{column}-{name}")
        kind = {"ekfac": EKFAC, "kfac": KFAC}.get(name, DiagonalFisher)
        if path.is_file():
            return kind.load(path)
        fitted = fit_curvature(self, name, column)
        with writing(self.path):
            fitted.save(path)
        return fitted

    def kernel(self, measure: Measure) -> SketchKernel:
        """Returns the kernel of the sketched gradients, fitted once and kept in the index."""
        path = curvature_path(self.path, self.manifest, f"sketch-{measure}-kernel")
        if path.is_file():
            return SketchKernel.load(path)
        fitted = fit_kernel(self, measure)
        with writing(self.path):
            fitted.save(path)
        return fitted
