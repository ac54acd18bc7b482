"""What identifies a patient in names, ids and metadata of images and slides, and what hides it in a report.

By rules, without a list of people's names: a name alone, without a year of birth or a number beside it, is
not recognised in the name of a file, and nothing is that is written in the pixels. BreaKHis's names, UUIDs
and UIDs are no finding.
"""

import io
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from bcd import storage
from bcd.data import archive
from bcd.errors import StorageError
from bcd.imaging import metadata
from bcd.imaging.metadata import Note
from bcd.slides import dicom, slide
from bcd.text import counted

PERSON, NAME_NUMBER, BIRTH, DATE, NUMBER = "person", "name and number", "date of birth", "date", "number"
DEVICE, PLACE, FREE_TEXT, LABEL_IMAGE = "device", "place", "free text", "image of the label"
FILE_NAME, ATTRIBUTE, NOT_READ = "name of a file or slide", "attribute of the patient", "unread metadata"
# Of one file: most bytes read of a DICOM header, and most findings; of one text, most characters.
MOST_HEAD_BYTES, MOST_FINDINGS, MOST_CHARACTERS = 2**20, 50, 10_000
# MIRAX's table of a slide, beside its pixels.
MIRAX_TABLE, MIRAX_LABEL = "slidedat.ini", "barcode"
# What a field means, by its name in small letters without separators; the first that fits.
FIELDS = [
    (re.compile(pattern), what)
    for pattern, what in {
        r"^(creatortool|software.*|make|model|date(create|modify|timestamp)|datasetname|.*update.*)$": None,
        r"birth(date|day|time)|^dob$|dateofbirth": BIRTH,
        r"artist|author|creator|byline|owner|copyright|^rights$|^user(name)?$|operator|physician": PERSON,
        r"experimenter|(last|first|middle|patient|birth)name|patient.*names|pathologist|contact": PERSON,
        r"e?mail|writer|credit|performedby": PERSON,
        r"patientid|accession|^mrn$|barcode|studyid|caseid|specimenid|slideid|containerid|labeltext": NUMBER,
        r"^reference$|medicalrecord|admissionid|procedureid|^imageid$": NUMBER,
        r"serial|scanscopeid|unitnumber|stationname|hostcomputer|deviceid": DEVICE,
        r"gpsl|^city$|sublocation|institution|department|address|telephone|phone": PLACE,
        r"date": DATE,
        r"^filename$|documentname|pagename|objectname|slidename|originalfilename": FILE_NAME,
        r"patient(sex|age)|ethnic": ATTRIBUTE,
        r"description|comment|caption|title|subject|keyword|headline|instruction|history|protocolname": (
            FREE_TEXT
        ),
    }.items()
]
# Values that mean none, and texts that programs write.
NO_VALUE = re.compile(
    r"[\W0_]*|(unknown|none|null|n/?a|nan|anonymi[sz]ed|anonymous|removed|de-?identified|redacted|yes|no)",
    re.IGNORECASE,
)
BY_PROGRAMS = re.compile(
    r"ImageJ=|\{\"shape\"|OLYMPUS DIGITAL CAMERA|SONY DSC|created with |CREATOR: gd-jpeg|LEAD Technologies|"
    r"file written by adobe|screenshot$|optimi[sz]ed |software:|lavc|Aperio|"
    r"(label|probability)[ _]image$|thumbnail$|level=\d+ ",
    re.IGNORECASE,
)
# Words beside a number that name no person.
WORDS = {"picture", "patch"} | set(
    """image img pic photo scan slide wsi tile field fov region roi mask frame sample specimen
    biopsy case patient pat subject person donor study series set data dataset train training test testing
    valid validation val fold split part batch group class label category benign malignant normal tumor tumour
    cancer carcinoma ductal lobular mucinous papillary adenosis fibroadenoma phyllodes tubular adenoma
    adenocarcinoma invasive situ metastasis lymph node breast mamma colon lung prostate liver kidney skin
    tissue stain stained hematoxylin haematoxylin eosin ihc her ki level layer stack channel small large low
    high left right upper lower top bottom center centre site hospital lab clinic institute scanner aperio
    hamamatsu leica philips olympus zeiss ventana camera microscope camelyon tcga cptac bach bracs panda
    breakhis glas miccai icpr isbi kaggle spie histology pathology cytology section block core tma array sob
    run job exp experiment version raw crop copy new old original converted exported untitled anon anonymous
    anonymized anonymised deidentified pseudonym idx index number file folder output result score demo
    synthetic the and for from with year page dsc dscn uid uuid sha md hash rev unknown none null other
    brca crc luad lusc coad stad kirc prad gbm lgg idc ilc dcis lcis scc bcc hcc nct
    tif tiff png jpg jpeg svs ndpi mrxs scn bif svslide dcm csv tsv parquet txt json xml ini zip
    jan january feb february mar march apr april may jun june jul july aug august sep sept september oct
    october nov november dec december""".split()  # noqa: SIM905
)
MARKERS = frozenset({"mrn", "pid", "accession", "acc", "accno", "accnr", "patientid", "patid", "fallnr"})
# Numbers that identify nobody: UUIDs, UIDs of DICOM, hashes.
NEUTRAL = re.compile(
    r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d{1,39}(?:\.\d{1,39}){4,}|\b(?=\w*\d)[0-9a-f]{16,}\b",
    re.IGNORECASE,
)
LETTERS = r"A-Za-z\u00c0-\u024f"
TOKEN = re.compile(rf"[0-9{LETTERS}']+")
WORD = re.compile(rf"[{LETTERS}'’]{{3,}}")
GLUED = re.compile(rf"([{LETTERS}]{{4,}})((?:19|20)\d\d|\d{{5,}})")
YEAR, LONG_NUMBER = re.compile(r"(?:19\d\d|20[0-2]\d)"), re.compile(r"[A-Za-z]{0,2}\d{5,}")
# The start of `S19-12345`, a number of a case of pathology.
CASE_YEAR = re.compile(r"[A-Za-z]{1,2}\d{2}")
MARKED = re.compile(rf"({'|'.join(MARKERS)})(\d{{4,}})", re.IGNORECASE)
PATTERNS = {
    BIRTH: re.compile(
        r"(?i:\bdob|\bd\.o\.b\.?|birth ?da(?:te|y)|date of birth|\bborn|\bgeb)\W{0,3}\d[\d./-]{3,9}"
    ),
    PERSON: re.compile(
        rf"[{LETTERS}]{{2,40}}\^[{LETTERS}]+|[\w.+-]{{1,64}}@[\w-]{{1,64}}\.[\w.-]+|"
        r"\b[A-ZÀ-Þ][a-zà-ÿ]{2,}, [A-ZÀ-Þ][a-zà-ÿ]{2,}|(?i:patient|name) ?[:=] ?[A-ZÀ-Þ][\wà-ÿ]+"
    ),
    DATE: re.compile(
        r"(?<![0-9A-Za-z.])(?:(?:19|20)\d\d([-._/:]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])"
        r"|(?:0?[1-9]|[12]\d|3[01])([./-])(?:0?[1-9]|1[0-2])\2(?:19|20)\d\d)(?![0-9])"
    ),
}


@dataclass(frozen=True)
class Identifier:
    """A statement that may identify a patient: in which file or folder, of what kind, where, and its value
    with all but the first character hidden; `words` are the names in an id, which are in no table."""

    name: str
    what: str
    found_in: str
    masked: str
    words: tuple[str, ...] = ()


def masked(value: str) -> str:
    """A value with all but its first character hidden, and its length too."""
    value = value.strip()
    return f"{value[0]}***" if len(value) > 3 else "***"


def in_text(text: str) -> Iterator[tuple[str, str]]:
    """Kind and value of what identifies a patient in a name or a free text; values are parts of it."""
    rest = NEUTRAL.sub("\0", text)
    for what, pattern in PATTERNS.items():
        for match in pattern.finditer(rest):
            yield what, match[0]
        rest = pattern.sub("\0", rest)
    for part in rest.split("\0"):
        yield from _beside_names(part, [(match[0], *match.span()) for match in TOKEN.finditer(part)])


def _beside_names(text: str, tokens: list[tuple[str, int, int]]) -> Iterator[tuple[str, str]]:
    """Names with a year of birth or a number beside them, and marked numbers; `tokens` have their places."""
    first = 0
    for i, (token, begin, end) in enumerate(tokens):
        if MARKED.fullmatch(token):
            yield NUMBER, token
        elif (glued := GLUED.fullmatch(token)) and not _is_word(glued[1]):
            yield NAME_NUMBER, token
        elif token.casefold() in MARKERS and re.match(r"\d{4}", tokens[i + 1][0] if tokens[i + 1 :] else ""):
            yield NUMBER, text[begin : tokens[i + 1][2]]
        if not _is_name(token):
            first = i + 1  # of the names that follow each other
        elif n := _number_length(tokens[i + 1 : i + 3]):
            yield NAME_NUMBER, text[tokens[first][1] : tokens[i + n][2]]
        elif first and YEAR.fullmatch(tokens[first - 1][0]):
            yield NAME_NUMBER, text[tokens[first - 1][1] : end]


def _is_word(token: str) -> bool:
    """Whether a token is a word of the field, in the plural, too."""
    return token.casefold() in WORDS or token.casefold().removesuffix("s") in WORDS


def _is_name(token: str) -> bool:
    return WORD.fullmatch(token) is not None and not _is_word(token) and token.casefold() not in MARKERS


def _number_length(tokens: list[tuple[str, int, int]]) -> int:
    """How many of two tokens are the number beside a name: a year of birth, five digits or a case of
    pathology."""
    first, second = [token for token, _, _ in tokens] + [""] * (2 - len(tokens))
    if YEAR.fullmatch(first) or LONG_NUMBER.fullmatch(first):
        return 1
    return 2 if CASE_YEAR.fullmatch(first) and re.fullmatch(r"\d{3,6}", second) else 0


def sentences(found: Sequence[Identifier], most: int) -> list[str]:
    """The first statements for a report: names of files are masked as their values are."""
    words = {word.casefold() for one in found for word in one.words}
    return [
        f"{hidden(one.name, words)}: {one.what} in {one.found_in}"
        + (f" ({one.masked})" if one.masked else "")
        for one in found[:most]
    ]


def hidden(path: str, words: Collection[str] = ()) -> str:
    """A path with what identifies a patient in it masked, and any of these words in small letters, too."""
    for _, value in in_text(path):
        path = path.replace(value, masked(value))
    return TOKEN.sub(lambda match: masked(match[0]) if match[0].casefold() in words else match[0], path)


def in_names(paths: Iterable[str]) -> Iterator[Identifier]:
    """What identifies patients in the names of files and folders, once for each file or folder."""
    seen = set[str]()
    for path in paths:
        parts = path.split("/")
        for i, part in enumerate(parts, 1):
            if (above := "/".join(parts[:i])) in seen:
                continue
            seen.add(above)
            kind = "the name of the file" if i == len(parts) else "the name of the folder"
            for what, value in in_text(part):
                yield Identifier(above, what, kind, masked(value))


def in_ids(column: str, values: Iterable[str | None], names: Iterable[str]) -> Iterator[Identifier]:
    """What identifies patients in a column of ids, once for each id; `names` are the images of the rows.

    An id of letters alone, such as `Smith`, may be a name: pseudonyms have digits.
    """
    seen = set[str | None]([None])
    for value, name in zip(values, names, strict=True):
        if value is None or value in seen:
            continue
        seen.add(value)
        found = list(in_text(value))
        if not found and re.fullmatch(rf"[{LETTERS}' ,.-]+", value):
            found = [(PERSON, value)] if any(map(_is_name, TOKEN.findall(value))) else []
        for what, text in found:
            words = tuple(filter(_is_name, TOKEN.findall(text)))
            yield Identifier(name, what, f"the {column}", masked(text), words)


def has_metadata(path: str) -> bool:
    """Whether a file may state something, by its name."""
    name = path.lower()
    return name.endswith((*archive.SUFFIXES, MIRAX_TABLE)) or slide.is_unnamed(name)


def in_content(name: str, content: bytes) -> list[Identifier]:
    """What identifies patients in the metadata of a file."""
    return _in_file(name, io.BytesIO(content), len(content))


def in_stored(name: str, uri: str) -> list[Identifier]:
    """The same of a file on storage, of which only the header is read; that it cannot be read is a finding.
    Raises StorageError for a transient error."""
    try:
        filesystem, path = storage.resolve(uri)
        with filesystem.open_input_file(path) as file:
            return _in_file(name, io.BufferedReader(file, storage.PIECE_BYTES), file.size())
    except OSError as error:
        failure = storage.failure(uri, "read it", error)
    except StorageError as error:
        failure = error
    if not failure.lasting:
        raise failure
    return [Identifier(name, NOT_READ, "the file", "")]


def _in_file(name: str, file: BinaryIO, size_bytes: int) -> list[Identifier]:
    start = file.read(dicom.HEAD_BYTES)
    file.seek(0)
    if dicom.is_dicom(start):
        notes: Iterable[Note] = _of_dicom(list(dicom.identifying_notes(file.read(MOST_HEAD_BYTES))))
    elif name.lower().endswith(MIRAX_TABLE):
        text = start.decode("utf-8", "replace")
        notes = [*metadata.pair_notes("Slidedat.ini", text)]
        notes += [Note("Slidedat.ini", "image", "label")] if MIRAX_LABEL in text.lower() else []
    else:
        notes = metadata.notes(file, size_bytes)
    found: dict[tuple[str, ...], Identifier] = {}
    for note in notes:
        for one in _of_note(note):
            # A slide repeats a statement on each page.
            found.setdefault((one[0], note.field, note.text), Identifier(name, *one))
        if len(found) >= MOST_FINDINGS:
            break
    return list(found.values())


def _of_dicom(notes: list[Note]) -> Iterator[Note]:
    """The notes of an object. Where it states that identity was removed, only names and texts that look like
    a patient's, and the pixels of labels."""
    removed = any(note.field == "PatientIdentityRemoved" and note.text == "YES" for note in notes)
    for note in notes:
        if removed and note.field not in ("ImageType", "BurnedInAnnotation"):
            yield Note(note.place, "", note.text)
        elif note.field != "PatientIdentityRemoved":
            yield note


def _of_note(note: Note) -> Iterator[tuple[str, str, str]]:
    """Kind, place and masked value of what identifies a patient in a note."""
    place = f"{note.place} {note.field}".strip()
    key = re.sub(r"[\W_]", "", note.field).casefold()
    text = note.text.strip()
    if key == "image" or key.endswith("imagetype"):
        if image := re.search("label|macro|overview", text, re.IGNORECASE):
            yield LABEL_IMAGE, f"{note.place}, {image[0].lower()}", ""
        return
    if key == "burnedinannotation":
        if text.casefold() == "yes":
            yield FREE_TEXT, place, ""
        return
    if NO_VALUE.fullmatch(text):
        return
    what = next((what for pattern, what in FIELDS if pattern.search(key)), "")
    if what is None or (what == FREE_TEXT and BY_PROGRAMS.match(text)):
        return
    if what:
        yield what, place, masked(text)
        return
    for kind, value in in_text(text[:MOST_CHARACTERS]):
        yield kind, place, masked(value)


def summed(found: Sequence[Identifier]) -> str:
    """How many statements, of which kinds, in how many files or folders."""
    kinds = dict.fromkeys(one.what for one in found)
    n = {what: sum(one.what == what for one in found) for what in kinds}
    by_kind = ", ".join(f"{n[what]:,} {what}" for what in sorted(kinds, key=lambda what: -n[what]))
    files = counted(len({one.name for one in found}), "file or folder", "files or folders")
    return f"{counted(len(found), 'statement')} in {files} that may identify a patient: {by_kind}"
