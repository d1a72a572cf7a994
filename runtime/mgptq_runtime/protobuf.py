"""The wire format of protocol buffers, as much as it takes to look into an ONNX file before ONNX Runtime does."""

from collections.abc import Iterator

__all__ = ["Message", "parse_message"]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_FIELDS = 1 << 17
FIXED_SIZES = {FIXED64: 8, FIXED32: 4}


def _varint(data: memoryview, offset: int) -> tuple[int, int]:
    """An unsigned number of at most 64 bits, and where the next byte is."""
    value = 0
    for shift in range(0, 64, 7):
        if offset >= len(data):
            raise ValueError("it ends inside a number")
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, offset
    raise ValueError("a number has more than 64 bits")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers and values: numbers, or the bytes of everything else."""
    offset = 0
    while offset < len(data):
        key, offset = _varint(data, offset)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, offset = _varint(data, offset)
            yield number, value
            continue
        if kind == BYTES:
            size, offset = _varint(data, offset)
        elif kind in FIXED_SIZES:
            size = FIXED_SIZES[kind]
        else:
            raise ValueError(f"field {number} has wire type {kind}")
        if size > len(data) - offset:
            raise ValueError(f"field {number} needs {size} bytes, {len(data) - offset} are left")
        yield number, data[offset : offset + size]
        offset += size


class Message:
    """One parsed message; what it holds is parsed when it is asked for."""

    def __init__(self, values: dict[int, list[int | memoryview]]) -> None:
        self._values = values

    def has(self, number: int) -> bool:
        """Whether a field is there."""
        return number in self._values

    def _single(self, number: int, kind: type) -> int | memoryview | None:
        values = self._values.get(number, [])
        if len(values) > 1 or not all(isinstance(value, kind) for value in values):
            raise ValueError(f"field {number} is there {len(values)} times, or of another type")
        return values[0] if values else None

    def integer(self, number: int) -> int | None:
        """A field that is there at most once, an int64; None where it is missing."""
        value = self._single(number, int)
        return None if not isinstance(value, int) else value - (1 << 64) * (value >> 63)

    def content(self, number: int) -> memoryview:
        """The bytes of a field that is there at most once; empty where it is missing."""
        value = self._single(number, memoryview)
        return value if isinstance(value, memoryview) else memoryview(b"")

    def text(self, number: int) -> str:
        """UTF-8 text of a field that is there at most once."""
        return str(self.content(number), "utf-8")

    def texts(self, number: int) -> list[str]:
        """UTF-8 texts of a repeated field."""
        return [str(self._bytes(value, number), "utf-8") for value in self._values.get(number, [])]

    def message(self, number: int) -> "Message":
        """A message that is there at most once."""
        return parse_message(self.content(number))

    def messages(self, number: int) -> Iterator["Message"]:
        """The messages of a repeated field, each parsed when its turn comes."""
        return (parse_message(self._bytes(value, number)) for value in self._values.get(number, []))

    def size(self, number: int) -> int:
        """Bytes of a repeated field's values, a number counting as one."""
        return sum(1 if isinstance(value, int) else len(value) for value in self._values.get(number, []))

    def integers(self, number: int) -> list[int]:
        """Unsigned 64-bit numbers of a repeated field, packed or not."""
        numbers: list[int] = []
        for value in self._values.get(number, []):
            if isinstance(value, int):
                numbers.append(value)
                continue
            offset = 0
            while offset < len(value):
                item, offset = _varint(value, offset)
                numbers.append(item)
        return numbers

    @staticmethod
    def _bytes(value: int | memoryview, number: int) -> memoryview:
        if isinstance(value, int):
            raise ValueError(f"field {number} is a number where bytes must be")
        return value


def parse_message(data: memoryview) -> Message:
    """Parse a message's own fields.

    Raises:
        ValueError: it is cut or malformed; so do the methods of what is returned.
    """
    values: dict[int, list[int | memoryview]] = {}
    for count, (number, value) in enumerate(_fields(data)):
        if count == MAX_FIELDS:
            raise ValueError(f"a message has more than {MAX_FIELDS} fields, the most that is allowed")
        values.setdefault(number, []).append(value)
    return Message(values)
