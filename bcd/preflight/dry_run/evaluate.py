"""What an evaluation would do."""

import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema, storage
from bcd.config.evaluation import EvaluateConfig
from bcd.config.options import CLOSED_FORM
from bcd.config.training import TrainConfig
from bcd.evaluation import artifacts, evaluate
from bcd.model import bundle, predictor
from bcd.model.card import LAST_LAYER, Card
from bcd.preflight import signing
from bcd.preflight.dry_run import measure, page
from bcd.runtime import cluster, prepare, run_directory
from bcd.taxonomy import TEST
from bcd.text import counted, duration


def run(config: EvaluateConfig) -> list[str]:
    """Log the lines of a dry run, and return them; raises BcdError as the job would before its work."""
    config = config.model_copy(update={"model": storage.pinned(config.model)})
    card_sha256 = signing.verified(config.model, config.require_signature)
    card = bundle.read_card(config.model, card_sha256)
    if config.against:
        artifacts.require_images(config.against)
    folder, _ = evaluate.place_of(config)
    changed = {"data": config.data} | ({"classes": config.classes} if config.classes else {})
    table, warnings = prepare.listed_rows(TrainConfig(**card.training | changed))
    tested, why = _tested(config, card, table)
    lines = [f"{config.data}: {page.described_rows(table)}", page.UNREAD]
    lines += [*(f"warning: {text}" for text in warnings), why, f"to score: {page.described_rows(tested)}"]
    if storage.exists(storage.join(folder, run_directory.METRICS)):
        lines.append(f"{folder} has an earlier evaluation, which is replaced")
    model = predictor.load(config.model, precision=config.precision, card_sha256=card_sha256)
    sample = measure.read_sample(tested, *card.input_size_px)
    pace = measure.scoring_pace(model, sample.images, config.batch_size, CLOSED_FORM, LAST_LAYER)
    lines += [page.model_line(card, config.batch_size), page.free_space(folder)]
    read, cores = len(table) * sample.seconds, cluster.cores()
    total = (read + len(tested) * sample.seconds) / cores + len(tested) * pace.forward
    lines += [
        f"estimates, {page.of_sample(sample)} in this process, for one model on {pace.device}:",
        f"  every image read once: about {duration(read / cores)} on {counted(cores, 'CPU')} "
        f"({1_000 * sample.seconds:.0f} ms an image)",
        f"  all, with the prediction ({1_000 * pace.forward:.0f} ms an image): about {duration(total)}",
    ]
    return page.show(lines)


def _tested(config: EvaluateConfig, card: Card, table: pa.Table) -> tuple[pa.Table, str]:
    """The rows that would be scored, and why these."""
    known = None if card.study else run_directory.read_split(storage.parent(config.model))
    if known is not None:
        test = known.filter(pc.equal(known[schema.PART], TEST))
        chosen = table.filter(pc.is_in(table[schema.IMAGE_ID], test[schema.IMAGE_ID].combine_chunks()))
        if len(test) == len(chosen):
            return chosen, "the data of the training, by their names: its test part is scored"
    return table, (
        "not the data of the training, by their names: all are scored, if the job finds that the model has "
        "seen none of them" + (" (--force: it scores them even so)" if config.force else "")
    )
