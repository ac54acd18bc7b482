from functools import partial

from bcd import demo
from bcd.config.training import DemoConfig


def test_the_demo_trains_on_what_it_made_and_scores_an_archive(tmp_path, monkeypatch, capsys):
    """The run itself is `make demo`; here: the settings of its jobs, on smaller images."""
    asked = []
    small = partial(demo.synthetic.PatientPlan, magnifications=(40,), height_px=138, width_px=210)
    monkeypatch.setattr(demo.synthetic, "PatientPlan", small)
    monkeypatch.setattr(demo.train, "run", lambda config: asked.append(config) or "the run")
    monkeypatch.setattr(demo.score, "run", asked.append)
    demo.run(DemoConfig(output=str(tmp_path), patients_per_subtype=3, seed=4))
    training, scoring = asked
    assert training.data == str(tmp_path / "BreaKHis_v1")
    assert (training.weights, training.seed) == ("none", 4)
    assert scoring.model.endswith("the run/model")
    assert f"jobs/serve.py --model {scoring.model}" in capsys.readouterr().out
    seen, new = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.png")}
        for name in ("BreaKHis_v1", "archive")
    )
    assert len(new) == 8 + 1
    assert not set(seen.values()) & set(new.values())
