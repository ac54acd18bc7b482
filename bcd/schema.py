"""The Arrow schema of every table, and the only place that spells a column name.

`INDEX` has one row per image, without pixels; `predictions()` one row per scored input.
"""

import pyarrow as pa

# Suffixes of manifests and of tables of splits.
MANIFEST_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")

# Identity of an image, and its labels.
IMAGE_ID, URI, VERSION, SHA256, SIZE_BYTES = "image_id", "uri", "version", "sha256", "size_bytes"
PATIENT, CASE, SLIDE, SITE, PART = "patient", "case", "slide", "site", "part"
TUMOR_CLASS, SUBTYPE, MAGNIFICATION, TARGET = "tumor_class", "subtype", "magnification", "target"
# Pixels, size and scale; place of a tile; region of a slide that QuPath shows.
IMAGE, WIDTH_PX, HEIGHT_PX = "image", "width_px", "height_px"
# Place of a prepared image (`bcd.imaging.prepared`), and of one in memory (`bcd.training.feed`).
SHARD, SHARD_ROW, CHECKSUM, POSITION = "shard", "shard_row", "checksum", "position"
MPP, MPP_Y, SLIDE_MPP_X, SLIDE_MPP_Y = "mpp", "mpp_y", "slide_mpp_x", "slide_mpp_y"
X_LEVEL0_PX, Y_LEVEL0_PX = "x_level0_px", "y_level0_px"
TISSUE_SHARE, REGION = "tissue_share", "region"
# URIs of the files that belong to a slide, beside `INPUTS`.
MASK_FILES, REGION_FILES = "mask_files", "region_files"
BOUNDS_X_LEVEL0_PX, BOUNDS_Y_LEVEL0_PX = "bounds_x_level0_px", "bounds_y_level0_px"
# Predictions.
LOGIT, PROBABILITY, PROBABILITY_MALIGNANT = "logit", "probability", "probability_malignant"
LOG_ODDS_SD = "log_odds_sd"
PREDICTED_CLASS, EVIDENCE, EVIDENCE_BIAS = "predicted_class", "evidence", "evidence_bias"
EVIDENCE_HEIGHT, EVIDENCE_WIDTH, OVERLAY = "evidence_height", "evidence_width", "overlay"
EMBEDDING = "embedding"
NOVELTY, NOVELTY_CUTOFF, WARNINGS = "novelty", "novelty_cutoff", "warnings"
# Errors and provenance.
ERROR, ERROR_MESSAGE, MODEL_ID, EPOCH = "error", "error_message", "model_id", "epoch"
ENGINE, PRECISION, BCD_VERSION = "engine", "precision", "bcd_version"
COMPUTE_S, ELAPSED_S = "compute_s", "elapsed_s"
# Of a sheet for a person: why a row is in it, and the label that the person writes.
REASON, REVIEWED_CLASS = "reason", "reviewed_class"
# Slides.
TILES, BACKGROUND_TILES, ERROR_TILES = "tiles", "background_tiles", "error_tiles"
OUTSIDE_TILES = "outside_tiles"
WARNED_TILES, TISSUE_AREA_MM2 = "warned_tiles", "tissue_area_mm2"
MALIGNANT_TILE_SHARE, READER = "malignant_tile_share", "reader"
TOP_TILES, TOP_PROBABILITY, NOISY_OR = "top_tiles", "top_probability", "noisy_or"
TOP_PROBABILITY_LOW, TOP_PROBABILITY_HIGH = "top_probability_low", "top_probability_high"
NOISY_OR_LOW, NOISY_OR_HIGH = "noisy_or_low", "noisy_or_high"
# Of the tiles of a slide that are pooled: the share that each has in its answer.
ATTENTION = "attention"
QUANTILES = {f"probability_q{round(100 * q):02}": q for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
# Appearance, and pairs of similar images.
PHASH, TISSUE_FRACTION = "phash", "tissue_fraction"
HEMATOXYLIN_OD_MEAN, HEMATOXYLIN_OD_STD = "hematoxylin_od_mean", "hematoxylin_od_std"
EOSIN_OD_MEAN, EOSIN_OD_STD = "eosin_od_mean", "eosin_od_std"
STAIN = (HEMATOXYLIN_OD_MEAN, HEMATOXYLIN_OD_STD, EOSIN_OD_MEAN, EOSIN_OD_STD)
IMAGE_ID_A, IMAGE_ID_B, HAMMING_DISTANCE = "image_id_a", "image_id_b", "hamming_distance"
# What may identify a patient: its kind, where it is found, and its value, mostly hidden.
IDENTIFIER, FOUND_IN, MASKED = "identifier", "found_in", "masked"
# Of the map of ids that replace names.
PSEUDONYM, ORIGINAL = "pseudonym", "original"


def _columns(kind: pa.DataType, *names: str, required: bool = False) -> list[pa.Field]:
    return [pa.field(name, kind, nullable=not required) for name in names]


_TEXT = pa.string()
# The frame of a tile's place, in the table itself: Parquet keeps the metadata of a column.
_FRAME = {
    "description": "pixels of level 0 as OpenSlide counts them, from the upper left of the whole slide; "
    "QuPath shows a slide from its bounds on: subtract those in slides.parquet, as tiles.geojson.gz does"
}
# Upper left of a tile; null for a field.
PLACE = tuple(pa.field(name, pa.int64(), metadata=_FRAME) for name in (X_LEVEL0_PX, Y_LEVEL0_PX))
# What a tile covers: share of tissue, and the name of the region of interest; null for a field.
CONTENT = (*_columns(pa.float32(), TISSUE_SHARE), *_columns(_TEXT, REGION))

# Rows, not pixels. `size_bytes` comes with a listing: only files of equal size can be equal, so exact
# duplicates are found by hashing a handful of files instead of the whole archive. `phash` and
# `tissue_fraction` are those of `appearance.hashed`, once the image has been read.
INDEX = pa.schema(
    [
        *_columns(_TEXT, IMAGE_ID, URI, required=True),
        *_columns(_TEXT, PATIENT, CASE, SLIDE, SITE, TUMOR_CLASS, SUBTYPE),
        *_columns(pa.int16(), MAGNIFICATION),
        *_columns(pa.float32(), MPP),
        *_columns(_TEXT, SHA256),
        *_columns(pa.int64(), SIZE_BYTES),
        *_columns(_TEXT, PHASH),
        *_columns(pa.float32(), TISSUE_FRACTION),
    ]
)

# Inputs of an archive; one that cannot be read has an error already.
INPUTS = pa.schema([*INDEX, *_columns(_TEXT, ERROR, ERROR_MESSAGE)])

# The sheet, whose cells are text, and the manifest that comes of it.
TRIAGE = (
    *(IMAGE_ID, REVIEWED_CLASS, REASON, PREDICTED_CLASS, PROBABILITY_MALIGNANT, TUMOR_CLASS, SUBTYPE),
    *(PATIENT, CASE, SLIDE, SITE, MAGNIFICATION, NOVELTY, X_LEVEL0_PX, Y_LEVEL0_PX, URI),
)
MANIFEST = pa.schema(
    [
        INDEX.field(name)
        for name in (IMAGE_ID, URI, TUMOR_CLASS, SUBTYPE, PATIENT, CASE, SLIDE, SITE, MAGNIFICATION, MPP)
    ]
)

# The part, one of `taxonomy.PARTS` or `taxonomy.LEFT_OUT`, of each row of a split.
SPLIT = pa.schema([*INDEX, *_columns(_TEXT, PART, required=True)])

# The appearance of each image (`appearance.measure_appearance`). A damaged one has an error, no numbers.
AUDIT = pa.schema(
    [
        *INDEX,
        *_columns(pa.int32(), WIDTH_PX, HEIGHT_PX),
        *_columns(pa.float32(), *STAIN),
        *_columns(_TEXT, ERROR, ERROR_MESSAGE),
    ]
)

# Pairs of similar images, and the number of bits in which their perceptual hashes differ.
NEAR_DUPLICATES = pa.schema(
    [*_columns(_TEXT, IMAGE_ID_A, IMAGE_ID_B), *_columns(pa.int16(), HAMMING_DISTANCE)]
)

# Statements in names, ids and metadata that may identify a patient. `image_id` is the path of any file or
# folder of the data; for an id, an image that has it.
IDENTIFIERS = pa.schema([*_columns(_TEXT, IMAGE_ID, IDENTIFIER, FOUND_IN, MASKED, required=True)])

# The map of ids that replace names; `uri` is that of an image or slide.
PSEUDONYMS = pa.schema([*_columns(_TEXT, PSEUDONYM, ORIGINAL, required=True), *_columns(_TEXT, URI)])

# The images that each epoch used, once per use.
EXPOSURE = pa.schema([*_columns(pa.int32(), EPOCH), *_columns(_TEXT, IMAGE_ID)])

# A prepared image: sha256 of the file, CRC-32 of the prepared pixels, and what the pixels of the file are.
PREPARED = pa.schema(
    [
        *_columns(_TEXT, SHA256, required=True),
        *_columns(pa.uint32(), CHECKSUM, required=True),
        *_columns(pa.int32(), HEIGHT_PX, WIDTH_PX),
        *_columns(_TEXT, PHASH),
        *_columns(pa.float32(), TISSUE_FRACTION),
    ]
)

# One row per input of the network: a whole field, or a tile of a slide (x and y are set). A row that already
# has an error is not read; it is passed on to the predictions. A file must have the `sha256`, where there is
# one; the columns after it place its prepared image. `slide_mpp_x` and `_y` are µm per pixel of a tile's
# slide at level 0 when the tiles were planned.
READING = pa.schema(
    [
        *_columns(_TEXT, IMAGE_ID, URI, required=True),
        *_columns(_TEXT, SHA256, SHARD),
        *_columns(pa.int32(), SHARD_ROW),
        *_columns(pa.uint32(), CHECKSUM),
        *_columns(_TEXT, SLIDE, PATIENT),
        *PLACE,
        *CONTENT,
        *_columns(pa.float64(), SLIDE_MPP_X, SLIDE_MPP_Y),
        *_columns(pa.float32(), MPP),
        *_columns(pa.int32(), WIDTH_PX, HEIGHT_PX),
        *_columns(_TEXT, ERROR, ERROR_MESSAGE),
    ]
)

# Beside the predictions, until they are committed: seconds in which a model worker computed a row, and all of
# its time, as shares of those of a batch.
TIMES = pa.schema([*_columns(pa.float64(), COMPUTE_S, ELAPSED_S)])

# The inputs of an archive when they were scored: a row depends on these, and on the pixels.
SEEN_INPUTS = pa.schema(
    [
        *_columns(_TEXT, IMAGE_ID, URI, required=True),
        *_columns(_TEXT, PATIENT, SLIDE),
        *_columns(pa.float32(), MPP),
        *_columns(_TEXT, VERSION),
    ]
)

# One row per whole slide of an archive. `tiles` are those with tissue, scored or in error. The bounds are the
# upper left of the region that QuPath shows; `mpp` is µm per pixel of level 0 across, `mpp_y` down. `reader`
# is name and version of what read the tiles; of two, the second read what the first does not.
SLIDES = pa.schema(
    [
        *_columns(_TEXT, SLIDE, URI, required=True),
        *_columns(_TEXT, PATIENT, READER),
        *_columns(pa.int64(), WIDTH_PX, HEIGHT_PX),
        *_columns(pa.float64(), MPP, MPP_Y),
        *_columns(pa.int64(), BOUNDS_X_LEVEL0_PX, BOUNDS_Y_LEVEL0_PX),
        *_columns(pa.int64(), TILES, BACKGROUND_TILES, OUTSIDE_TILES, ERROR_TILES, WARNED_TILES),
        *_columns(pa.float64(), TISSUE_AREA_MM2, MALIGNANT_TILE_SHARE),
        *_columns(pa.float32(), *QUANTILES),
        *_columns(pa.int64(), TOP_TILES),
        *_columns(pa.float64(), TOP_PROBABILITY, TOP_PROBABILITY_LOW, TOP_PROBABILITY_HIGH),
        *_columns(pa.float64(), NOISY_OR, NOISY_OR_LOW, NOISY_OR_HIGH),
        *_columns(_TEXT, ERROR, ERROR_MESSAGE),
    ]
)


# One row per slide whose tiles are pooled by attention, labelled or not; `tumor_class` is the label.
POOLED_SLIDES = pa.schema(
    [
        *_columns(_TEXT, SLIDE, URI, required=True),
        *_columns(_TEXT, PATIENT, CASE, TUMOR_CLASS, SUBTYPE, PART),
        *_columns(pa.int64(), TILES, ERROR_TILES),
        *_columns(pa.list_(pa.float32()), LOGIT),
        *_columns(pa.float32(), PROBABILITY_MALIGNANT),
        *_columns(_TEXT, PREDICTED_CLASS),
        *_columns(pa.float64(), MALIGNANT_TILE_SHARE, TOP_PROBABILITY),
        *_columns(_TEXT, ERROR, ERROR_MESSAGE, MODEL_ID),
    ]
)

# The share of its slide's answer that comes from each tile; those of a slide add up to 1.
TILE_ATTENTION = pa.schema([*_columns(_TEXT, SLIDE, IMAGE_ID), *_columns(pa.float32(), ATTENTION)])


def predictions(
    evidence_height: int, evidence_width: int, overlays: bool = False, embedding: int = 0
) -> pa.Schema:
    """Schema of the predictions table for evidence maps of the given size in cells.

    `log_odds_sd` is null unless the model is an ensemble. `novelty_cutoff` and `warnings` (codes, often none)
    are null in a row with an error, the columns of `STAIN` also where there is no tissue. `sha256` is of the
    file's bytes; null for a tile, because a slide is never read whole. `engine` and `precision` describe the
    computation of a row. With overlays, a column has a PNG of each image under its map; with an embedding of
    so many numbers, another its pooled features.
    """
    return pa.schema(
        [
            *_columns(_TEXT, IMAGE_ID, URI, required=True),
            *_columns(_TEXT, SLIDE, PATIENT),
            *PLACE,
            *CONTENT,
            *_columns(pa.float32(), MPP),
            *_columns(pa.int32(), WIDTH_PX, HEIGHT_PX),
            *_columns(pa.list_(pa.float32()), LOGIT, PROBABILITY),
            *_columns(pa.float32(), PROBABILITY_MALIGNANT, LOG_ODDS_SD),
            *_columns(_TEXT, PREDICTED_CLASS),
            *_columns(pa.list_(pa.float32(), evidence_height * evidence_width), EVIDENCE),
            *_columns(pa.int16(), EVIDENCE_HEIGHT, EVIDENCE_WIDTH),
            *_columns(pa.float32(), EVIDENCE_BIAS, NOVELTY, NOVELTY_CUTOFF),
            *_columns(pa.list_(_TEXT), WARNINGS),
            *_columns(pa.float32(), *STAIN),
            *_columns(_TEXT, SHA256, ERROR, ERROR_MESSAGE),
            *_columns(_TEXT, MODEL_ID, required=True),
            *_columns(_TEXT, ENGINE, PRECISION),
            *_columns(_TEXT, BCD_VERSION, required=True),
            *(_columns(pa.binary(), OVERLAY) if overlays else []),
            *(_columns(pa.list_(pa.float16(), embedding), EMBEDDING) if embedding else []),
        ]
    )


def fill(table: pa.Table, form: pa.Schema) -> pa.Table:
    """Convert a table to another schema: columns by name, null where it has none, others dropped."""
    known = {name: table[name] for name in form.names if name in table.column_names}
    columns = [known.get(field.name, pa.nulls(len(table), field.type)).cast(field.type) for field in form]
    return pa.Table.from_arrays(columns, schema=form)
