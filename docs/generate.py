"""The pages of the reference that are made from code: `python docs/generate.py` writes them.

The command line comes from the config classes and the jobs' docstrings, the tables from `bcd.schema`. A test
compares the files with what this module gives, so that a new flag or column cannot be forgotten here.
"""

import ast
import re
from itertools import starmap
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pyarrow as pa
import tyro
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from bcd import schema
from bcd.config.checks import AuditConfig, DoctorConfig, EnvConfig
from bcd.config.evaluation import EvaluateConfig, TriageConfig
from bcd.config.options import Config
from bcd.config.scoring import PoolConfig, ScoreConfig
from bcd.config.serving import ServeConfig, ViewConfig
from bcd.config.signing import ExportConfig, ImportConfig, PushConfig, SignConfig, VerifyConfig
from bcd.config.training import AblateConfig, CrossvalConfig, DemoConfig, TrainConfig, TuneConfig

DOCS = Path(__file__).parent
JOBS: dict[str, type[Config]] = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "crossval": CrossvalConfig,
    "ablate": AblateConfig,
    "tune": TuneConfig,
    "audit": AuditConfig,
    "score": ScoreConfig,
    "triage": TriageConfig,
    "view": ViewConfig,
    "pool": PoolConfig,
    "serve": ServeConfig,
    "import": ImportConfig,
    "export": ExportConfig,
    "sign": SignConfig,
    "verify": VerifyConfig,
    "push": PushConfig,
    "doctor": DoctorConfig,
    "env": EnvConfig,
    "demo": DemoConfig,
}
MADE = "<!-- Made by docs/generate.py: do not edit. -->\n\n"

COMMAND_LINE = """# Command line

Every job is a script in `jobs/`. Each flag is a field of one config class in `bcd/config/`, and the text here
is the text of `--help`. Unknown flags and contradictions are rejected before Ray starts. Run the commands
inside the environment (`source .venv/bin/activate`); on a cluster, put `ray job submit --working-dir . --` in
front. Settings can be in a file, and `--dry-run` says what a job would do: see
[Commands](../guides/commands.md).

Exit codes: 0 on success; 2 with one sentence on anything that the user can correct; 1 where inputs remain
without a result or an error, an audited split leaks, or a diagnosis found a fault. See [Errors](errors.md).
"""

TABLES = """# Tables

Every table is Parquet and is readable without `bcd`, for example by DuckDB, Polars and pandas.
`bcd/schema.py` holds the schemas and is the only module that spells a column name. *Required* columns are
never null.
"""

# Title, lead and schema of each table.
SECTIONS: list[tuple[str, str, pa.Schema]] = [
    (
        "Predictions: one row for each scored input",
        "`predictions/` of an archive and of a run. Every input gives exactly one row, a result or an error. "
        "The length of `evidence` is that of the model's map, here 7 x 11. `overlay` exists with "
        "`--overlays png` only, `embedding` with `--embeddings` only; its length is that of the "
        "network, here of a ResNet50.",
        schema.predictions(7, 11, overlays=True, embedding=2048),
    ),
    ("Slides: one row for each whole slide", "`slides.parquet` of an archive.", schema.SLIDES),
    (
        "Pooled slides: one row for each slide that attention answers for",
        "`slides.parquet` of `jobs/pool.py`.",
        schema.POOLED_SLIDES,
    ),
    (
        "Attention: one row for each of their tiles",
        "`attention.parquet` of `jobs/pool.py`.",
        schema.TILE_ATTENTION,
    ),
    ("Split: the part of each image", "`split.parquet` of a run.", schema.SPLIT),
    ("Audit: the appearance of each image", "`images.parquet` of an audit.", schema.AUDIT),
    (
        "Near duplicates: pairs of similar images",
        "`near_duplicates.parquet` of an audit.",
        schema.NEAR_DUPLICATES,
    ),
    (
        "Identifiers: what may identify a patient",
        "`identifiers.parquet` of an audit, whose `image_id` is the path of any file or folder of the data.",
        schema.IDENTIFIERS,
    ),
    (
        "Pseudonyms: the map of ids that replace names",
        "`KEY.ID.parquet` beside the key of a scoring job with `--pseudonymise KEY`.",
        schema.PSEUDONYMS,
    ),
    ("Exposure: the images that each epoch used", "`exposure/epoch-N.parquet` of a run.", schema.EXPOSURE),
    (
        "Inputs: the state of each input when it was scored",
        "`inputs.parquet` of an archive.",
        schema.SEEN_INPUTS,
    ),
]

MEANING: dict[str, str] = {
    schema.IMAGE_ID: "stable and unique: the path below the input's root; a tile adds `#level0 x,y,mpp`",
    schema.URI: "where the file is: a local path or the URI of a [store](../guides/storage.md)",
    schema.PATIENT: "identifier of the patient, where known",
    schema.CASE: "case number; in BreaKHis the slide id without its letter suffix",
    schema.SLIDE: "slide id",
    schema.READER: "name and version of what read the tiles; of two, the second read what the first does not",
    schema.TUMOR_CLASS: "`benign` or `malignant`",
    schema.SUBTYPE: "BreaKHis subtype: A, F, PT, TA, DC, LC, MC or PC",
    schema.MAGNIFICATION: "BreaKHis magnification: 40, 100, 200 or 400",
    schema.MPP: "µm per pixel; in the slides table that of level 0, horizontally",
    schema.MPP_Y: "µm per pixel of level 0, vertically",
    schema.SHA256: "SHA-256 of the file's bytes; null for tiles, because a slide is never read whole",
    schema.SIZE_BYTES: "size of the file",
    schema.PHASH: "perceptual hash, 256 bits in hexadecimal",
    schema.TISSUE_FRACTION: "fraction of the image that is tissue",
    schema.SITE: "hospital, of a manifest or of the folders above the classes",
    schema.PART: "`train`, `validation`, `test`, or `left_out`: in no part, see `--held-out`",
    schema.X_LEVEL0_PX: "left edge of a tile in pixels of level 0, as OpenSlide counts; null for a field",
    schema.Y_LEVEL0_PX: "upper edge of a tile in pixels of level 0, as OpenSlide counts; null for a field",
    schema.TISSUE_SHARE: "share of a tile that is tissue; null for a field",
    schema.REGION: "name, or else class, of the region that covers most of a tile, with `--regions` only",
    schema.WIDTH_PX: "width in pixels; of a slide, that of level 0",
    schema.HEIGHT_PX: "height in pixels; of a slide, that of level 0",
    schema.LOGIT: "logit of each class, in the order of the card",
    schema.PROBABILITY: "probability of each class, in the order of the card",
    schema.PROBABILITY_MALIGNANT: "probability of malignancy",
    schema.LOG_ODDS_SD: "standard deviation of the log-odds of malignancy over the networks of an ensemble; "
    "null for a single network",
    schema.PREDICTED_CLASS: "class after the card's threshold",
    schema.EVIDENCE: "evidence map, row by row, in log-odds; its mean plus `evidence_bias` is the log-odds. "
    "Where that is null, it is of a method that has no unit",
    schema.EVIDENCE_HEIGHT: "rows of the map",
    schema.EVIDENCE_WIDTH: "columns of the map",
    schema.EVIDENCE_BIAS: "bias of the map; null for methods of `--cam` other than the closed form, and "
    "models that have none",
    schema.NOVELTY: "distance of the pooled features from those of the training images",
    schema.NOVELTY_CUTOFF: "99 % of the validation images are below this; null in a row with an error",
    schema.WARNINGS: "codes, often none: `unlike_training_data`; null in a row with an error",
    schema.ERROR: "null, or a code from [Errors](errors.md)",
    schema.ERROR_MESSAGE: "one sentence about the error",
    schema.MODEL_ID: "hash over weights and card",
    schema.ENGINE: "what computed the row: `torch`, `torch_compiled` or `openvino`",
    schema.PRECISION: "`float32` or `bfloat16`",
    schema.BCD_VERSION: "version of `bcd` that wrote the row",
    schema.OVERLAY: "PNG of the image under its evidence map",
    schema.EMBEDDING: "pooled features; times the weights of the last layer, plus its bias, over the "
    "temperature, they are the logits. Clipped to ±65,504",
    schema.BOUNDS_X_LEVEL0_PX: "left edge of the region that QuPath shows, in pixels of level 0",
    schema.BOUNDS_Y_LEVEL0_PX: "upper edge of the region that QuPath shows, in pixels of level 0",
    schema.TILES: "tiles with tissue, scored or in error",
    schema.BACKGROUND_TILES: "tiles with less tissue than `--min-tissue`, which are not scored",
    schema.OUTSIDE_TILES: "tiles with less than `--min-region` in a region, which are not scored",
    schema.ERROR_TILES: "tiles in error",
    schema.WARNED_TILES: "tiles with a warning; null where the model has no statistics of its training",
    schema.TISSUE_AREA_MM2: "area of tissue in mm², with `--regions` that within them",
    schema.MALIGNANT_TILE_SHARE: "fraction of the scored tiles that are called malignant; each counts once, "
    "however far it overlaps others",
    schema.TOP_TILES: "number of the scored tiles with the highest probability, 10 where there are so many",
    schema.TOP_PROBABILITY: "their mean probability of malignancy; see [Answers for a slide]"
    "(../explanation/slide-answers.md)",
    schema.TOP_PROBABILITY_LOW: "lower end of its 95 % interval; null where all are in one square of 2 mm",
    schema.TOP_PROBABILITY_HIGH: "upper end of its 95 % interval",
    schema.NOISY_OR: "1 - (1 - p1)(1 - p2)... of these tiles: it ranks slides and is no probability",
    schema.NOISY_OR_LOW: "lower end of its 95 % interval",
    schema.NOISY_OR_HIGH: "upper end of its 95 % interval",
    schema.ATTENTION: "share of the slide's answer that comes from the tile; times the number of its "
    "tiles, relative to uniform",
    schema.HEMATOXYLIN_OD_MEAN: "mean optical density of haematoxylin",
    schema.HEMATOXYLIN_OD_STD: "standard deviation of the optical density of haematoxylin",
    schema.EOSIN_OD_MEAN: "mean optical density of eosin",
    schema.EOSIN_OD_STD: "standard deviation of the optical density of eosin",
    schema.IMAGE_ID_A: "first image of the pair",
    schema.IMAGE_ID_B: "second image of the pair",
    schema.HAMMING_DISTANCE: "bits of 256 in which the perceptual hashes differ",
    schema.IDENTIFIER: "kind of the statement: person, date of birth, number, date, image of the label, ...",
    schema.FOUND_IN: "a name, a column of ids, or a field of the metadata such as `EXIF Artist`",
    schema.MASKED: "the first character of the value; empty for an image",
    schema.PSEUDONYM: "the id in the tables",
    schema.ORIGINAL: "the id or name that it replaces",
    schema.EPOCH: "epoch, counted from 1",
    schema.VERSION: "size and time of change of the file when it was scored",
    **{
        name: f"{int(name[-2:])} % quantile of the tiles' probability of malignancy"
        for name in schema.QUANTILES
    },
}


def pages() -> dict[Path, str]:
    """The text of each page that is made from code."""
    return {
        DOCS / "reference/command-line.md": MADE + COMMAND_LINE + "".join(map(_job, JOBS)),
        DOCS / "reference/tables.md": MADE + TABLES + "".join(starmap(_table, SECTIONS)),
    }


def _job(name: str) -> str:
    docstring = ast.get_docstring(ast.parse((DOCS.parent / f"jobs/{name}.py").read_text(encoding="utf-8")))
    assert docstring is not None
    commands = "\n".join(line[4:] for line in docstring.splitlines() if line[:4] == "    ")
    fields = JOBS[name].model_fields.items()
    flags = "".join(_flag(field.alias or key, field) for key, field in fields)
    return f"\n## {name}\n\n{_plain(JOBS[name].__doc__)}\n\n```sh\n{commands}\n```\n{flags}"


def _flag(key: str, field: FieldInfo) -> str:
    flag = f"--{key.replace('_', '-')}"
    if get_args(tyro.conf.Positional[str])[1] in field.metadata:
        head = f"`{key.upper()}`"
    elif field.annotation is bool:
        head = f"`{flag}`, `--no-{flag[2:]}`"
    else:
        head = f"`{flag} {_values(field.annotation)}`"
    return f"\n{head} ({_default(field)})\n:   {_plain(field.description)}\n"


def _values(annotation: Any) -> str:
    """What a flag takes, as `--help` would say it."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if get_origin(annotation) in (Union, UnionType):
        return _values(next(one for one in arguments if one is not type(None)))
    if get_origin(annotation) is tuple:
        return f"[{_values(arguments[0])} ...]"
    if get_origin(annotation) is not None:  # Annotated
        return _values(arguments[0])
    return {str: "TEXT", int: "N", float: "NUMBER"}[annotation]


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None or value == ():
        return "optional"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f"default: `{'yes' if value is True else 'no' if value is False else value}`"


def _table(title: str, lead: str, form: pa.Schema) -> str:
    rows = "".join(f"| `{field.name}` | {_type(field)} | {MEANING[field.name]} |\n" for field in form)
    return f"\n## {title}\n\n{lead}\n\n| column | type | meaning |\n|---|---|---|\n{rows}"


def _type(field: pa.Field) -> str:
    name = re.sub(r"fixed_size_list<\w+: (\w+)>\[(\d+)\]", r"\1[\2]", str(field.type))
    name = re.sub(r"list<\w+: (\w+)>", r"list of \1", name).replace("halffloat", "float16")
    return name if field.nullable else f"{name}, required"


def _plain(text: str | None) -> str:
    """One paragraph, without what Markdown would take for markup."""
    return re.sub(r"\s+", " ", text or "").strip().replace("<", "&lt;")


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(DOCS.parent))
