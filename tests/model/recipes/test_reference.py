import pytest
from pydantic import TypeAdapter, ValidationError

from bcd.model.recipes.reference import Macenko, Reinhard, StainReference

MACENKO = Macenko(n_images=3, hematoxylin=(0.65, 0.7, 0.29), eosin=(0.07, 0.99, 0.11), density=(1.9, 1.0))
REINHARD = Reinhard(n_images=3, mean=(-1.0, 0.1, 0.0), spread=(0.3, 0.1, 0.05))


@pytest.mark.parametrize("reference", [MACENKO, REINHARD])
def test_a_reference_is_read_as_it_was_written(reference):
    adapter = TypeAdapter(StainReference)
    assert adapter.validate_json(reference.model_dump_json(), strict=True) == reference


@pytest.mark.parametrize(
    "change", [{"density": (0.0, 1.0)}, {"n_images": 0}, {"eosin": (1.0, 1.0)}, {"x": 1}]
)
def test_numbers_that_no_stain_has_are_rejected(change):
    with pytest.raises(ValidationError):
        Macenko(**MACENKO.model_dump() | change)
