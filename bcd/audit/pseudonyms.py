"""Ids in place of names, by a secret key: the same name gives the same id, and without the key no id a name.

An id is HMAC-SHA256 (RFC 2104) of the name, cut to 80 bits: of ten million names, any two have the same id
with a probability of 4e-11 (n² / 2^81). The key is a file of at least 32 random bytes. Who has it can test
any name, and the map of ids beside it names all: both belong to those who may know the patients.
"""

import hashlib
import hmac
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema, storage
from bcd.errors import ConfigError

KEY_BYTES, MOST_KEY_BYTES, DIGITS = 32, 2**16, 20
# A key of fewer different bytes is not random: 64 random hexadecimal digits, as text, have fewer with a
# probability of 1e-12, and 32 random bytes of 3e-31.
LEAST_DIFFERENT = 10
MAKE_KEY = "(umask 077; head -c 32 /dev/urandom > KEY)"
# Columns that name a patient, or an image of one.
NAMED = (schema.IMAGE_ID, schema.PATIENT, schema.CASE, schema.SLIDE)


@dataclass(frozen=True)
class Pseudonyms:
    """The ids of one key."""

    uri: str
    key: bytes = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """An id of the key itself."""
        return self.of("key\0")

    def of(self, name: str) -> str:
        """The id of a name; its first letter keeps spreadsheets from reading a number."""
        return f"x{hmac.new(self.key, name.encode(), hashlib.sha256).hexdigest()[:DIGITS]}"

    def column(self, values: pa.ChunkedArray | pa.Array) -> pa.Array:
        """The ids of a column, null for null."""
        return pa.array([None if v is None else self.of(v) for v in values.to_pylist()], pa.string())

    def table(self, rows: pa.Table, names: Iterable[str] = NAMED) -> pa.Table:
        """A table with ids in these columns."""
        for name in names:
            place = rows.column_names.index(name)
            rows = rows.set_column(place, rows.schema.field(place), self.column(rows[name]))
        return rows

    def write_map(self, rows: pa.Table, owner: str) -> str:
        """Add the originals of these rows to the map of an output, of which `owner` is the id; returns the
        URI of the map. On a disk only its owner can read it."""
        uri = f"{self.uri}.{owner}.parquet"
        parts = [storage.read_table(uri)] if storage.exists(uri) else []
        for name in NAMED:
            values = rows[name].combine_chunks()
            places = rows[schema.URI].combine_chunks() if name == schema.IMAGE_ID else pa.nulls(len(rows))
            columns = [self.column(values), values, places.cast(pa.string())]
            table = pa.Table.from_arrays(columns, schema.PSEUDONYMS.names).filter(pc.is_valid(values))
            parts.append(schema.fill(table, schema.PSEUDONYMS))
        grouped = pa.concat_tables(parts).group_by(schema.PSEUDONYM)
        table = grouped.aggregate([(schema.ORIGINAL, "max"), (schema.URI, "max")])
        kept = schema.fill(table.rename_columns(schema.PSEUDONYMS.names), schema.PSEUDONYMS)
        storage.write_table(uri, kept.sort_by(schema.ORIGINAL), private=True)
        return uri


def read_key(uri: str) -> Pseudonyms:
    """The pseudonyms of the key at a URI.

    Raises:
        ConfigError: it is too short, not random, or others may read it.
        StorageError: it cannot be read.
    """
    content = storage.read_bytes(uri, MOST_KEY_BYTES)
    remedy = f"a key is made by {MAKE_KEY}"
    if len(content) < KEY_BYTES:
        raise ConfigError(
            f"{uri} has {len(content)} bytes; expected at least {KEY_BYTES} random ones: {remedy}"
        )
    if len(set(content)) < LEAST_DIFFERENT:
        raise ConfigError(f"{uri} has {len(set(content))} different bytes, so it is not random: {remedy}")
    if not storage.is_remote(uri) and Path(storage.absolute(uri)).stat().st_mode & (
        stat.S_IRWXG | stat.S_IRWXO
    ):
        raise ConfigError(f"{uri} can be read by other users: run chmod 600 on it, or make another key")
    return Pseudonyms(storage.absolute(uri), content)
