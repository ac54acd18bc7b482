"""The Arrow schema of every table, and the only place that spells a column name.

`INDEX` holds one row per image without pixels; `predictions()` one row per scored input.
"""

import pyarrow as pa

# Of the files in which a table is given: manifests and splits.
MANIFEST_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")

IMAGE_ID = "image_id"
URI = "uri"
PATIENT = "patient"
CASE = "case"
SLIDE = "slide"
TUMOR_CLASS = "tumor_class"
SUBTYPE = "subtype"
MAGNIFICATION = "magnification"
MPP = "mpp"
SHA256 = "sha256"
SIZE_BYTES = "size_bytes"
PART = "part"
IMAGE = "image"
TARGET = "target"
MPP_Y = "mpp_y"
SLIDE_MPP_X = "slide_mpp_x"
SLIDE_MPP_Y = "slide_mpp_y"
BOUNDS_X_LEVEL0_PX = "bounds_x_level0_px"
BOUNDS_Y_LEVEL0_PX = "bounds_y_level0_px"
X_LEVEL0_PX = "x_level0_px"
Y_LEVEL0_PX = "y_level0_px"
WIDTH_PX = "width_px"
HEIGHT_PX = "height_px"
LOGIT = "logit"
PROBABILITY = "probability"
PROBABILITY_MALIGNANT = "probability_malignant"
PREDICTED_CLASS = "predicted_class"
EVIDENCE = "evidence"
EVIDENCE_HEIGHT = "evidence_height"
EVIDENCE_WIDTH = "evidence_width"
EVIDENCE_BIAS = "evidence_bias"
NOVELTY = "novelty"
NOVELTY_CUTOFF = "novelty_cutoff"
WARNINGS = "warnings"
ERROR = "error"
ERROR_MESSAGE = "error_message"
MODEL_ID = "model_id"
ENGINE = "engine"
PRECISION = "precision"
BCD_VERSION = "bcd_version"
OVERLAY = "overlay"
EPOCH = "epoch"
TILES = "tiles"
BACKGROUND_TILES = "background_tiles"
ERROR_TILES = "error_tiles"
WARNED_TILES = "warned_tiles"
TISSUE_AREA_MM2 = "tissue_area_mm2"
MALIGNANT_TILE_SHARE = "malignant_tile_share"
VERSION = "version"
PHASH = "phash"
HEMATOXYLIN_OD_MEAN = "hematoxylin_od_mean"
HEMATOXYLIN_OD_STD = "hematoxylin_od_std"
EOSIN_OD_MEAN = "eosin_od_mean"
EOSIN_OD_STD = "eosin_od_std"
TISSUE_FRACTION = "tissue_fraction"
IMAGE_ID_A = "image_id_a"
IMAGE_ID_B = "image_id_b"
HAMMING_DISTANCE = "hamming_distance"
QUANTILES = {f"probability_q{round(100 * q):02}": q for q in (0.05, 0.25, 0.5, 0.75, 0.95)}

# The frame of a tile's place, in the table itself: Parquet keeps what is said of a column.
_FRAME = {
    "description": "pixels of level 0 as OpenSlide counts them, from the upper left of the whole slide; "
    "QuPath shows a slide from its bounds on: subtract those in slides.parquet, as tiles.geojson does"
}
# Upper left of a tile; null for a field.
PLACE = tuple(pa.field(name, pa.int64(), metadata=_FRAME) for name in (X_LEVEL0_PX, Y_LEVEL0_PX))

# Rows, not pixels. `size_bytes` comes free with a listing: only files of equal size can be equal,
# so exact duplicates are found by hashing a handful of files instead of the whole archive.
INDEX = pa.schema(
    [
        pa.field(IMAGE_ID, pa.string(), nullable=False),
        pa.field(URI, pa.string(), nullable=False),
        (PATIENT, pa.string()),
        (CASE, pa.string()),
        (SLIDE, pa.string()),
        (TUMOR_CLASS, pa.string()),
        (SUBTYPE, pa.string()),
        (MAGNIFICATION, pa.int16()),
        (MPP, pa.float32()),
        (SHA256, pa.string()),
        (SIZE_BYTES, pa.int64()),
        # By `appearance.hashed`, once the picture has been read.
        (PHASH, pa.string()),
        (TISSUE_FRACTION, pa.float32()),
    ]
)

# What an archive is to score; an entry that cannot be read has an error already.
INPUTS = pa.schema([*INDEX, (ERROR, pa.string()), (ERROR_MESSAGE, pa.string())])

# Which part of a split each row went to; `part` is one of split.PARTS.
SPLIT = pa.schema([*INDEX, pa.field(PART, pa.string(), nullable=False)])

# How each image of a data set looks (`appearance.measure_appearance`). A broken one has an error, no numbers.
AUDIT = pa.schema(
    [
        *INDEX,
        (WIDTH_PX, pa.int32()),
        (HEIGHT_PX, pa.int32()),
        (HEMATOXYLIN_OD_MEAN, pa.float32()),
        (HEMATOXYLIN_OD_STD, pa.float32()),
        (EOSIN_OD_MEAN, pa.float32()),
        (EOSIN_OD_STD, pa.float32()),
        (ERROR, pa.string()),
        (ERROR_MESSAGE, pa.string()),
    ]
)

# Two pictures that look alike, and in how many bits their perceptual hashes differ.
NEAR_DUPLICATES = pa.schema(
    [(IMAGE_ID_A, pa.string()), (IMAGE_ID_B, pa.string()), (HAMMING_DISTANCE, pa.int16())]
)

# Which images an epoch showed to the training workers, once per showing.
EXPOSURE = pa.schema([(EPOCH, pa.int32()), (IMAGE_ID, pa.string())])

# One row per picture that the network is to see: a whole field, or a tile of a slide (x and y are set).
# A row that already has an error is not read; it goes through to the predictions. `slide_mpp_x` and `_y` are
# µm per pixel of a tile's slide at level 0, as it was planned.
READING = pa.schema(
    [
        pa.field(IMAGE_ID, pa.string(), nullable=False),
        pa.field(URI, pa.string(), nullable=False),
        (SLIDE, pa.string()),
        (PATIENT, pa.string()),
        *PLACE,
        (SLIDE_MPP_X, pa.float64()),
        (SLIDE_MPP_Y, pa.float64()),
        (MPP, pa.float32()),
        (WIDTH_PX, pa.int32()),
        (HEIGHT_PX, pa.int32()),
        (ERROR, pa.string()),
        (ERROR_MESSAGE, pa.string()),
    ]
)

# What the inputs of an archive were when they were last looked at: a row depends on these, and on the pixels.
SEEN_INPUTS = pa.schema(
    [
        pa.field(IMAGE_ID, pa.string(), nullable=False),
        pa.field(URI, pa.string(), nullable=False),
        (PATIENT, pa.string()),
        (SLIDE, pa.string()),
        (MPP, pa.float32()),
        (VERSION, pa.string()),
    ]
)

# One row per whole slide of an archive. `tiles` are those with tissue, scored or in error. The bounds are
# where QuPath begins to show the slide; `mpp` is µm per pixel of level 0 across, `mpp_y` down.
SLIDES = pa.schema(
    [
        pa.field(SLIDE, pa.string(), nullable=False),
        pa.field(URI, pa.string(), nullable=False),
        (PATIENT, pa.string()),
        (WIDTH_PX, pa.int64()),
        (HEIGHT_PX, pa.int64()),
        (MPP, pa.float64()),
        (MPP_Y, pa.float64()),
        (BOUNDS_X_LEVEL0_PX, pa.int64()),
        (BOUNDS_Y_LEVEL0_PX, pa.int64()),
        (TILES, pa.int64()),
        (BACKGROUND_TILES, pa.int64()),
        (ERROR_TILES, pa.int64()),
        (WARNED_TILES, pa.int64()),
        (TISSUE_AREA_MM2, pa.float64()),
        (MALIGNANT_TILE_SHARE, pa.float64()),
        *[(name, pa.float32()) for name in QUANTILES],
        (ERROR, pa.string()),
        (ERROR_MESSAGE, pa.string()),
    ]
)


def predictions(evidence_height: int, evidence_width: int, overlays: bool = False) -> pa.Schema:
    """Schema of the predictions table for evidence maps of the given size (cells, not pixels).

    `novelty_cutoff` and `warnings` (codes, often none) are of results; null in a row with an error. `sha256`
    is of the file's bytes wherever they were read; null for a tile, whose slide is never read whole.
    `engine` and `precision` say what computed a row. With overlays, a last column holds a PNG of each picture
    with its map laid over it.
    """
    evidence = pa.list_(pa.float32(), evidence_height * evidence_width)
    return pa.schema(
        [
            pa.field(IMAGE_ID, pa.string(), nullable=False),
            pa.field(URI, pa.string(), nullable=False),
            (SLIDE, pa.string()),
            (PATIENT, pa.string()),
            *PLACE,
            (MPP, pa.float32()),
            (WIDTH_PX, pa.int32()),
            (HEIGHT_PX, pa.int32()),
            (LOGIT, pa.list_(pa.float32())),
            (PROBABILITY, pa.list_(pa.float32())),
            (PROBABILITY_MALIGNANT, pa.float32()),
            (PREDICTED_CLASS, pa.string()),
            (EVIDENCE, evidence),
            (EVIDENCE_HEIGHT, pa.int16()),
            (EVIDENCE_WIDTH, pa.int16()),
            (EVIDENCE_BIAS, pa.float32()),
            (NOVELTY, pa.float32()),
            (NOVELTY_CUTOFF, pa.float32()),
            (WARNINGS, pa.list_(pa.string())),
            (SHA256, pa.string()),
            (ERROR, pa.string()),
            (ERROR_MESSAGE, pa.string()),
            pa.field(MODEL_ID, pa.string(), nullable=False),
            (ENGINE, pa.string()),
            (PRECISION, pa.string()),
            pa.field(BCD_VERSION, pa.string(), nullable=False),
            *([(OVERLAY, pa.binary())] if overlays else []),
        ]
    )


def fill(table: pa.Table, form: pa.Schema) -> pa.Table:
    """The table in another schema: columns by name, null where it has none, others dropped."""
    known = {name: table[name] for name in form.names if name in table.column_names}
    columns = [known.get(field.name, pa.nulls(len(table), field.type)).cast(field.type) for field in form]
    return pa.Table.from_arrays(columns, schema=form)
