import pyarrow as pa

from bcd import schema

DESIGN_PREDICTIONS = set(
    """image_id uri slide patient x_level0_px y_level0_px mpp width_px height_px logit probability
    probability_malignant predicted_class evidence evidence_height evidence_width evidence_bias novelty
    novelty_cutoff warnings sha256 error error_message model_id engine precision bcd_version""".split()  # noqa: SIM905
)


def test_predictions_table_is_the_promised_one():
    table = schema.predictions(7, 11)
    assert set(table.names) == DESIGN_PREDICTIONS | {
        *(schema.TISSUE_SHARE, schema.REGION, schema.LOG_ODDS_SD, *schema.STAIN)
    }
    assert table.field(schema.EVIDENCE).type == pa.list_(pa.float32(), 77)
    assert table.field(schema.LOGIT).type == pa.list_(pa.float32())
    assert not table.field(schema.IMAGE_ID).nullable


def test_every_column_constant_is_spelled_as_its_name():
    constants = {n: v for n, v in vars(schema).items() if n.isupper() and isinstance(v, str)}
    assert all(value == name.lower() for name, value in constants.items())
    tables = schema.INDEX, schema.SPLIT, schema.EXPOSURE, schema.READING, schema.SLIDES
    tables += schema.AUDIT, schema.NEAR_DUPLICATES, schema.INPUTS, schema.SEEN_INPUTS, schema.TIMES
    assert {schema.SITE} < {*schema.INDEX.names} & {*schema.SPLIT.names} & {*schema.INPUTS.names}
    tables += (schema.IDENTIFIERS, schema.PSEUDONYMS, schema.POOLED_SLIDES, schema.TILE_ATTENTION)
    used = {name for table in (*tables, schema.predictions(1, 1, True, 1)) for name in table.names}
    used |= {*schema.TRIAGE, *schema.MANIFEST.names}
    used |= {schema.IMAGE, schema.TARGET, schema.POSITION, schema.MASK_FILES, schema.REGION_FILES}
    assert used == {*constants.values(), *schema.QUANTILES}


def test_overlays_are_one_more_column():
    with_overlays = schema.predictions(7, 11, overlays=True)
    assert with_overlays.names == [*schema.predictions(7, 11).names, schema.OVERLAY]


def test_embeddings_are_one_more_column_of_half_precision():
    with_embeddings = schema.predictions(7, 11, embedding=2048)
    assert with_embeddings.names == [*schema.predictions(7, 11).names, schema.EMBEDDING]
    assert with_embeddings.field(schema.EMBEDDING).type == pa.list_(pa.float16(), 2048)


def test_filling_takes_columns_by_name_and_leaves_the_rest_null():
    table = pa.table({schema.URI: ["u"], schema.IMAGE_ID: ["i"], "other": [1]})
    filled = schema.fill(table, schema.READING)
    assert filled.schema == schema.READING
    row = filled.to_pylist()[0]
    assert {name: value for name, value in row.items() if value is not None} == {
        schema.URI: "u",
        schema.IMAGE_ID: "i",
    }
