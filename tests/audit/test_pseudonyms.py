import hashlib
import hmac
import os

import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.audit import pseudonyms
from bcd.audit.pseudonyms import Pseudonyms
from bcd.errors import ConfigError, MissingError

KEY = bytes(range(32))


def rows(*named):
    return pa.Table.from_pylist(
        [dict(zip(schema.INPUTS.names, row, strict=False)) for row in named], schema.INPUTS
    )


ROWS = rows(
    ("Doe/1.png", "/in/Doe/1.png", "Doe", None, "s1"), ("Roe/2.png", "/in/Roe/2.png", "Roe", "c", None)
)


def test_an_id_is_the_start_of_an_hmac():
    names = Pseudonyms("/key", KEY)
    digest = hmac.new(KEY, "Müller".encode(), hashlib.sha256).hexdigest()
    assert names.of("Müller") == f"x{digest[:20]}"
    assert names.of("Muller") != names.of("Müller")
    assert Pseudonyms("/key", KEY[::-1]).of("Müller") != names.of("Müller")
    assert "key" not in repr(names).replace("/key", "")


def test_a_table_has_ids_for_names_and_keeps_the_rest():
    names = Pseudonyms("/key", KEY)
    table = names.table(ROWS)
    assert table.schema == ROWS.schema
    assert table[schema.PATIENT].to_pylist() == [names.of("Doe"), names.of("Roe")]
    assert table[schema.CASE].to_pylist() == [None, names.of("c")]
    assert table[schema.URI] == ROWS[schema.URI]


def test_the_map_names_all_grows_and_is_for_its_owner_alone(tmp_path):
    names = Pseudonyms(str(tmp_path / "key"), KEY)
    uri = names.write_map(ROWS, "abc")
    assert uri == str(tmp_path / "key.abc.parquet")
    assert os.stat(uri).st_mode & 0o777 == 0o600
    table = storage.read_table(uri)
    assert table.schema == schema.PSEUDONYMS
    originals = ["Doe", "Doe/1.png", "Roe", "Roe/2.png", "c", "s1"]
    assert table[schema.ORIGINAL].to_pylist() == originals
    assert table[schema.PSEUDONYM].to_pylist() == [names.of(name) for name in originals]
    assert table[schema.URI].to_pylist() == [None, "/in/Doe/1.png", None, "/in/Roe/2.png", None, None]
    names.write_map(rows(("3.png", "/in/3.png", "Doe", None, None)), "abc")
    assert storage.read_table(uri)[schema.ORIGINAL].to_pylist() == ["3.png", *originals]
    assert os.stat(uri).st_mode & 0o777 == 0o600


def test_a_key_is_long_random_and_private(tmp_path):
    path = tmp_path / "key"
    path.touch(0o600)
    for content, why in {
        b"short": "has 5 bytes; expected at least 32 random ones: a key is made by",
        b"passwordpasswordpasswordpassword": "has 7 different bytes, so it is not random",
    }.items():
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=why):
            pseudonyms.read_key(str(path))
    path.write_bytes(KEY)
    assert pseudonyms.read_key(str(path)) == Pseudonyms(str(path), KEY)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by other users: run chmod 600"):
        pseudonyms.read_key(str(path))
    with pytest.raises(MissingError):
        pseudonyms.read_key(str(tmp_path / "none"))


def test_the_documented_command_makes_a_key(tmp_path):
    command = pseudonyms.MAKE_KEY.replace("KEY", str(tmp_path / "key"))
    assert os.system(command) == 0
    assert len(pseudonyms.read_key(str(tmp_path / "key")).key) == pseudonyms.KEY_BYTES
