"""Why a record cannot be used: fixed phrases, so that reports can count them, and the exception that carries one."""

from __future__ import annotations

IMAGE_MISSING = "image missing"
IMAGE_MISSING_KEPT = "image missing, document kept without it"
IMAGE_TOO_LARGE = "image file too large"
IMAGE_ADDRESS = "image missing: an address, which is not downloaded"
IMAGE_LEAVES = "image missing: its name leaves the input folder"
IMAGE_NOT_BASE64 = "image that is no Base64"
IMAGE_MARKS = "image marks do not match images"
NO_IMAGE = "no image"
TOO_MANY_IMAGES = "ten images or more"
NO_ANSWER = "no answer"
NO_QUESTION = "no question"
NO_TEXT = "no text"
NOT_AN_OPTION = "answer is none of the options"
ANSWERS_DIFFER = "both yes and no as the answer"
NO_TURNS = "no list of turns"
NO_ROLE = "turn of an unknown role"
BEGINS_WITH_REPLY = "conversation begins with a reply"
ENDS_WITH_USER = "conversation ends with the user"
SAME_ROLE = "two turns of one role in a row"
LATE_SYSTEM = "system turn after the first turn"
BAD_PART = "part of a turn that is neither text nor image"
THINKING = "think block that is not closed, or not at the start"
LANGUAGE = "language without a wording for questions"
VIDEO = "video"
DUPLICATE = "duplicate id"

NOT_JSON = "not valid JSON"
NOT_AN_OBJECT = "not a JSON object"
NOT_UNICODE = "text is not valid UTF-8"
RECORD_TOO_LARGE = "record too large"
OPEN_QUOTE = "quote that never closes, with the rows behind it"
COLUMNS = "wrong number of columns"
DAMAGED_FILE = "file is damaged"

UNSAFE_NAME = "archive member with an unsafe name"
NOT_A_FILE = "archive member that is a link or no file"
MEMBER_TOO_LARGE = "archive member too large"
ENCRYPTED = "archive member is encrypted"
BOMB = "archive unpacks to far more than it should"
PARQUET_BOMB = "group of rows unpacks to far more than it should"
DAMAGED_ARCHIVE = "archive is damaged"


class Unusable(Exception):
    """A record that cannot become a sample. Readers also yield one in the place of a record they could not read.

    `reason` is a fixed phrase, `detail` says where (a file's name, a row's number) and never holds sample text;
    `records` is the number of records that it stands for.
    """

    def __init__(self, reason: str, detail: str = "", records: int = 1) -> None:
        super().__init__(reason, detail, records)
        self.reason = reason
        self.detail = detail
        self.records = records
