"""A run: an index together with where its model and its pictures came from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data.dataset import ImageDataset, load_dataset
from .files import write_atomically
from .index.build import ENCODED_BY, MEASURES
from .index.index import Index
from .index.layout import Manifest, read_manifest
from .index.table import read_ids, settled
from .models.loading import Dtype

if TYPE_CHECKING:
    from .models.base import Denoiser

logger = logging.getLogger(__name__)

SOURCE = "source.json"

DEMO = "demo"
"""The model that ships."""

TWEMOJI = ("twemoji", "twemoji-skin-tones")
"""Data sets that a package ships."""


@dataclass(frozen=True)
class Source:
    """What was indexed, in the words of the command line.

    Attributes:
        model: a pipeline's folder or hub id, or `demo`.
        data: `twemoji`, `twemoji-skin-tones`, or a folder.
        parameters: a preset or pattern.
        lora: LoRA weights on the model, if any.
        dtype: of the weights.
        skip_bad: whether pictures that cannot be read were left out.
        further: data sets that were appended, in words as `data`.
        further_skip_bad: those of them whose pictures that cannot be read were left out.
        weights: a snapshot of the training, in the place of the network's weights, if any.
    """

    model: str
    data: str
    parameters: str = "cross-attn-kv"
    lora: str | None = None
    dtype: Dtype = "float32"
    skip_bad: bool = False
    further: tuple[str, ...] = ()
    further_skip_bad: tuple[str, ...] = ()
    weights: str | None = None

    @property
    def whole_model(self) -> str:
        """The model with what was loaded on it, for messages."""
        lora = f" with the LoRA weights {self.lora!r}" if self.lora else ""
        return f"{self.model!r}{lora}" + (f" at {self.weights!r}" if self.weights else "")

    def absolute(self) -> Source:
        """Returns the source with folders that are found again from any other one.

        What ships keeps its name, also beside a folder that is called so.
        """

        def found(value: str) -> str:
            ships = not value or value in (DEMO, *TWEMOJI)
            return value if ships or not Path(value).exists() else str(Path(value).resolve())

        return dataclasses.replace(
            self, model=found(self.model), data=found(self.data),
            lora=found(self.lora) if self.lora else self.lora,
            weights=found(self.weights) if self.weights else self.weights,
            further=tuple(found(name) for name in self.further),
            further_skip_bad=tuple(found(name) for name in self.further_skip_bad),
        )  # fmt: skip


def open_data(name: str, skip_bad: bool = False) -> ImageDataset:
    """Opens a data set by name: one that ships with a package, or a folder."""
    if name in TWEMOJI:
        return load_dataset("twemoji", skin_tones=name == "twemoji-skin-tones")
    return load_dataset("imagefolder", data_dir=name, on_error="skip" if skip_bad else "raise")


def open_all(source: Source) -> ImageDataset:
    """Opens the data set of a source, with those that were appended."""
    further = [
        open_data(name, source.skip_bad or name in source.further_skip_bad)
        for name in source.further
    ]
    return open_data(source.data, source.skip_bad).with_further(further)


def append(
    path: Path, source: Source, data: ImageDataset, device: str | None = None,
    batch_size: int = 64, encoders: Sequence[str] = (),
) -> Index:  # fmt: skip
    """Adds pictures to a run; killed, the same call goes on.

    Args:
        path: of the run.
        source: of the pictures, whether bad ones are left out, and of the model that was indexed.
        data: the pictures.
        device: of the model.
        batch_size: passes at once.
        encoders: folders of the vision encoders that the index was built with, if any.

    Raises:
        ValueError: no run there, another model, or see `Index.append`.
    """
    before, begun = read_source(path), read_manifest(path)
    index = Index.open(path, open_model(source, device))
    known, name = finished_only(before, index.manifest), source.absolute().data
    further = tuple(dict.fromkeys([*known.further, name]))
    skip_bad = {*known.further_skip_bad, *([name] if source.skip_bad else [])}
    known = dataclasses.replace(
        known, further=further, further_skip_bad=tuple(n for n in further if n in skip_bad)
    )
    # First, so that an addition that is killed behind its last example can be found again.
    with recorded(path, known, lambda: read_manifest(path).parts != begun.parts):
        return index.append(data, batch_size, encoders, "skip" if source.skip_bad else None)


def finished_only(source: Source, manifest: Manifest) -> Source:
    """Returns a source without what is left of an addition that was not finished.

    Args:
        source: of the run.
        manifest: what is complete of its index.
    """
    return dataclasses.replace(source, further=source.further[: len(manifest.parts) - 1])


def open_model(source: Source, device: str | None = None) -> Denoiser:
    """Opens the model of a source."""
    from .demo import write_demo_model
    from .models.base import Denoiser
    from .models.loading import load_lora, load_pipeline, load_snapshot

    if source.weights and not Path(source.weights).is_file():  # before all that takes long
        raise ValueError(f"weights {source.weights!r}: no such file")
    folder = write_demo_model() if source.model == DEMO else source.model
    pipeline = load_pipeline(folder, source.dtype, device)
    if source.lora:
        load_lora(pipeline, source.lora)
    model = Denoiser.from_pipeline(pipeline, source.parameters)
    if source.weights:
        load_snapshot(model.network, source.weights)
    return model


def is_run(path: str | Path) -> bool:
    """Whether there is an index."""
    return (Path(path) / "manifest.json").is_file()


def write_source(path: Path, source: Source) -> None:
    """Records where an index came from.

    Raises:
        ValueError: the folder cannot be written to.
    """
    text = json.dumps(dataclasses.asdict(source.absolute()), indent=1) + "\n"
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / SOURCE, lambda p: p.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"run {str(path)!r} cannot be written ({error.strerror}): choose another folder"
        ) from error


@contextlib.contextmanager
def recorded(path: Path, source: Source, kept: Callable[[], bool]) -> Iterator[None]:
    """Records where an index comes from before it is made or added to.

    Args:
        path: of the run.
        source: what is recorded.
        kept: whether anything came of it; where it was refused, what was there is put back.

    Raises:
        ValueError: see `write_source`.
    """
    file, new = path / SOURCE, not path.exists()
    before = file.read_bytes() if file.is_file() else None
    write_source(path, source)
    try:
        yield
    except BaseException:
        if not kept():
            if before is None:
                file.unlink()
            else:
                write_atomically(file, lambda p: p.write_bytes(before))
            if new:
                path.rmdir()
        raise


def read_source(path: Path) -> Source:
    """Reads what `write_source` wrote.

    Raises:
        ValueError: no index there, one that was not made by the command line, or the record is
            damaged.
    """
    file = path / SOURCE
    if not is_run(path):
        raise ValueError(f"{str(path)!r} is no run that `unsee index` made")
    if not file.is_file():
        raise ValueError(
            f"run {str(path)!r} has no {SOURCE}: it was not made by `unsee index`; open it in "
            "Python with Index.open(path, model)"
        )
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        names = {n: tuple(about.get(n, ())) for n in ("further", "further_skip_bad")}
        return Source(**{**about, **names})
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}): run `unsee index` again") from None


def check_together(paths: Sequence[Path], columns: Sequence[str] | None = None) -> None:
    """Refuses runs whose scores cannot be added up, before a model is opened.

    Args:
        paths: of the runs; the others are held against the first.
        columns: that are asked, if not all columns of gradients that each run has.

    Raises:
        ValueError: a run that is named twice, is none or is not finished, or one of other
            examples, columns of gradients, sketch, autoencoder or text encoder.
    """
    first: dict[str, Any] = {}
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(f"run {str(path)!r} is named twice: it would count double")
        seen.add(path.resolve())
        about = _for_sums(path, columns)
        for what, value in about.items():
            if value is not None and value != first.setdefault(what, value):
                difference = value ^ first[what] if isinstance(value, set) else ()
                example = f", for instance {min(difference)!r}" if difference else ""
                raise ValueError(
                    f"run {str(path)!r} has other {what} than {str(paths[0])!r}{example}: their "
                    "scores cannot be added up; ask them one by one, or index the same again"
                )


def _for_sums(path: Path, columns: Sequence[str] | None) -> dict[str, Any]:
    """Returns what runs that are added up must have in common; None where it is not known."""
    read_source(path)
    manifest = settled(path, read_manifest(path))
    settings = manifest.settings
    if (ids := read_ids(path, manifest)) is None:
        raise ValueError(
            f"run {str(path)!r} is not finished: give the command that builds it again"
        )
    return {
        "examples": set(ids),
        "columns of gradients": set(columns or settings["columns"]) & set(MEASURES),
        "sketches": settings.get("sketch"),
        "autoencoder, text encoder or dtype": settings.get(ENCODED_BY),
    }


def open_run(path: Path, device: str | None = None) -> tuple[Index, ImageDataset]:
    """Opens a run's index, with its model, and its pictures.

    Raises:
        ValueError: it is not finished, or its model or data set is not what it was.
    """
    source = read_source(path)
    manifest = settled(path, read_manifest(path))
    source = finished_only(source, manifest)
    data = open_all(source)
    model = open_model(source, device)
    was, now = manifest.settings["model"], model.fingerprint()
    if was != now:
        raise ValueError(
            f"run {str(path)!r}: {source.whole_model} is no longer the model that was indexed (its "
            f"fingerprint was {was}, now it is {now}); bring that model back, or index this one "
            "in another folder"
        )
    index = Index.open(path, model)
    lost = sorted(set(index.ids) - set(data.ids))
    if lost:
        raise ValueError(
            f"run {str(path)!r}: its example {lost[0]!r} is no longer in "
            f"{' or '.join(repr(name) for name in (source.data, *source.further))}; bring "
            "it back, or erase it with the command that built the run and `--delete "
            f"{lost[0]}`"
        )
    new = set(data.ids) - set(index.ids) - set(index.manifest.deleted)
    if new:
        logger.warning(
            "run %r: %d examples of %r are not in the index, for instance %r; they get no score",
            str(path), len(new), source.data, min(new),
        )  # fmt: skip
    return index, data
