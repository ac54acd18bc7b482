from bcd.config.training import AblateConfig
from bcd.preflight.dry_run import ablate, crossval


def test_every_arm_is_a_study(dry, tree, monkeypatch):
    monkeypatch.setattr(crossval, "study_lines", lambda study: [f"ema_decay {study.ema_decay}"])
    config = AblateConfig(data=tree, arms=("plain", "ema_decay=0.9"))
    assert dry(ablate, config) == [
        "arm 1 of 2: plain",
        "ema_decay None",
        "arm 2 of 2: ema_decay=0.9",
        "ema_decay 0.9",
    ]
