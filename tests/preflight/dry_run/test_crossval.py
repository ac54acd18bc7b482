from bcd.config.training import CrossvalConfig
from bcd.preflight.dry_run import crossval
from bcd.training import crossval as job
from tests.preflight.dry_run.test_train import SMALL


def test_every_fold_of_every_arm_is_counted(dry, tree, tmp_path):
    config = CrossvalConfig(data=tree, k=3, protocol="case,image", epochs=2, batch_size=4, **SMALL)
    lines = dry(crossval, config)
    assert f"0 of 6 runs are finished in {tmp_path}/runs/crossval" in lines
    for protocol in ("case", "image"):
        tested = [
            int(line.rpartition(" ")[2])
            for line in lines
            if line.startswith(f"{protocol}, repeat 1, fold ") and "test " in line
        ]
        assert len(tested) == 3
        assert sum(tested) == 48
    assert any(line.startswith("  all, with 2 epochs of 6 runs and the test part: about ") for line in lines)


def test_a_finished_study_needs_nothing(dry, tree, tmp_path, monkeypatch):
    config = CrossvalConfig(data=tree, k=3, **SMALL)
    monkeypatch.setattr(crossval, "_is_finished", lambda fold: True)
    assert dry(crossval, config) == [f"3 of 3 runs are finished in {tmp_path}/runs/crossval"]
    assert len(list(job.folds_of(config, "runs/crossval", "case"))) == 3
