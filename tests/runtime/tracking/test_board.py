from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from bcd.runtime.tracking import board
from tests.runtime.tracking import made


def test_tensorboard_has_hyperparameters_test_metrics_and_figures(tmp_path):
    made.finished(str(tmp_path))
    board.write_board(str(tmp_path))
    board.write_board(str(tmp_path))  # of the same run, in place of the first
    (file,) = (tmp_path / "tensorboard").rglob("*tfevents*")
    read = EventAccumulator(str(file.parent), purge_orphaned_data=False).Reload()
    (low,) = read.Scalars("test/auc.low")
    assert (low.step, round(low.value, 6)) == (2, 0.7)
    (roc,) = read.Images("figures/roc")
    assert (roc.encoded_image_string, roc.width, roc.height) == (made.PNG, 30, 20)
    session, experiment = (
        plugin_data_pb2.HParamsPluginData.FromString(
            read.SummaryMetadata(f"_hparams_/{name}").plugin_data.content
        )
        for name in ("session_start_info", "experiment")
    )
    given = session.session_start_info.hparams
    assert given["epochs"].number_value == made.begun(str(tmp_path)).epochs
    assert given["data"].string_value == "BreaKHis_v1"
    assert {info.name.tag for info in experiment.experiment.metric_infos} >= {"test/auc", "test/auc.high"}
