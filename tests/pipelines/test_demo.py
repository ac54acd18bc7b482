from bcd.config import DemoConfig
from bcd.pipelines import demo


def test_the_demo_trains_on_what_it_made(tmp_path, monkeypatch):
    """The run itself is `make demo`; here: that it asks for what the pictures are."""
    asked = []
    monkeypatch.setattr(demo.train, "run", asked.append)
    demo.run(DemoConfig(output=str(tmp_path), patients_per_subtype=3, seed=4))
    assert asked[0].data == str(tmp_path / "BreaKHis_v1")
    assert (asked[0].weights, asked[0].seed) == ("none", 4)
