import pyarrow as pa

from bcd import schema

DESIGN_PREDICTIONS = set(
    """image_id uri slide patient x_level0_px y_level0_px mpp width_px height_px logit probability
    probability_malignant predicted_class evidence evidence_height evidence_width evidence_bias novelty
    error error_message model_id bcd_version""".split()  # noqa: SIM905
)


def test_predictions_table_is_the_promised_one():
    table = schema.predictions(7, 11)
    assert set(table.names) == DESIGN_PREDICTIONS
    assert table.field(schema.EVIDENCE).type == pa.list_(pa.float32(), 77)
    assert table.field(schema.LOGIT).type == pa.list_(pa.float32())
    assert not table.field(schema.IMAGE_ID).nullable


def test_every_column_constant_is_spelled_as_its_name():
    constants = {n: v for n, v in vars(schema).items() if n.isupper() and isinstance(v, str)}
    assert all(value == name.lower() for name, value in constants.items())
    used = {*schema.INDEX.names, *schema.SPLIT.names, *schema.EXPOSURE.names, *schema.predictions(1, 1).names}
    assert used | {schema.IMAGE, schema.TARGET} == set(constants.values())
