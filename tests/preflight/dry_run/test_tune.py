from bcd.config.training import TuneConfig
from bcd.preflight.dry_run import train, tune


def test_a_search_is_its_trials_and_one_training_more(dry, tree, tmp_path, monkeypatch):
    space = tmp_path / "space.yaml"
    space.write_text("dropout: [0, 0.5]\nlearning-rate: {uniform: [0.001, 0.01]}\n")
    runs = []

    def estimated(config, parts):
        runs.extend(parts)
        return ["about an hour"]

    monkeypatch.setattr(train, "estimated_lines", estimated)
    lines = dry(tune, TuneConfig(data=tree, space=str(space), trials=3, weights="none", epochs=2))
    assert "3 trials with other dropout, learning_rate, and a training with the best" in lines
    assert lines[-1] == "about an hour"
    assert len(runs) == 4
    assert any(line.startswith("validation: ") for line in lines)
