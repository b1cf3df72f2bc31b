"""Tar, as far as files need it, for both ends of the line. Law: what is not understood to the last byte is refused,
with its name; the writer and the reader are here because the module tarfile guesses, and takes longer to import than a
box to start. Standard library only, C modules only: this source is sent into the box.

Read are plain (ustar), GNU long names and pax headers with the records that only describe.
"""

BLOCK = 512
FILE, HARD_LINK, LINK, FOLDER, FIFO = b"0", b"1", b"2", b"5", b"6"
KINDS = {
    HARD_LINK: "a hard link",
    LINK: "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    FIFO: "a named pipe",
    b"S": "a sparse file",
}
EXTENSION_BYTES = 1 << 16  # of a long name or of pax records
PADDING_BYTES = 1 << 20  # zeros after the end; tar fills its last block
HARMLESS = ("atime", "ctime", "uid", "gid", "uname", "gname", "comment")
END = bytes(2 * BLOCK)


class BadTar(Exception):
    """A tar that is not taken; `name` is the entry's, as far as it was known."""

    def __init__(self, name, why):
        super().__init__(f"{name.decode('utf-8', 'backslashreplace')[:200]!r} {why}" if name else why)


class Entry:
    def __init__(self, name, kind, size=0, mode=0o644, link=b"", mtime_ns=0):
        self.name, self.kind, self.size, self.mode, self.link = name, kind, size, mode, link
        self.mtime_ns = mtime_ns

    def header(self):
        """The blocks before the data."""
        records = b""
        if len(self.name) > 100:
            records += pax_record(b"path", self.name)
        if len(self.link) > 100:
            records += pax_record(b"linkpath", self.link)
        if self.mtime_ns % 10**9 or self.mtime_ns < 0:
            sign = b"-" if self.mtime_ns < 0 else b""
            records += pax_record(b"mtime", b"%s%d.%09d" % (sign, *divmod(abs(self.mtime_ns), 10**9)))
        extension = block(Entry(b"pax", b"x", len(records))) + padded(records) if records else b""
        return extension + block(self)


def block(entry):
    """One header block."""
    head = bytearray(BLOCK)
    head[0:100] = entry.name[:100].ljust(100, b"\0")
    fields = (entry.mode & 0o7777, 0, 0)
    head[100:124] = b"".join(b"%07o\0" % field for field in fields)
    head[124:136] = b"%011o\0" % entry.size
    head[136:148] = b"%011o\0" % max(0, entry.mtime_ns // 10**9)
    head[148:156] = b" " * 8
    head[156:157] = entry.kind
    head[157:257] = entry.link[:100].ljust(100, b"\0")
    head[257:265] = b"ustar\x0000"
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def pax_record(key, value):
    """A record begins with its own length, whose digits count as well."""
    base = len(key) + len(value) + 3
    size = base + 1
    while size != base + len(b"%d" % size):
        size = base + len(b"%d" % size)
    return b"%d %s=%s\n" % (size, key, value)


def padded(data):
    return data + bytes(-len(data) % BLOCK)


class Reader:
    """Entries one after the other. `chunk()` gives the next bytes of the tar, b"" at its end."""

    def __init__(self, chunk):
        self.chunk = chunk
        self.ready = b""
        self.left = self.padding = 0

    def take(self, most):
        """Some bytes, at most so many; never none."""
        if not self.ready:
            self.ready = self.chunk()
            if not self.ready:
                raise BadTar(b"", "the archive ends in the middle of an entry")
        data, self.ready = self.ready[:most], self.ready[most:]
        return data

    def exactly(self, size):
        data = b""
        while len(data) < size:
            data += self.take(size - len(data))
        return data

    def data(self):
        """The bytes of the current file, piece by piece."""
        while self.left:
            piece = self.take(self.left)
            self.left -= len(piece)
            yield piece

    def next(self):
        """The next entry, None at the end. What is left of the current one is passed over."""
        for _ in self.data():
            pass
        self.exactly(self.padding)
        long_name, records = b"", {}
        while True:
            head = self.exactly(BLOCK)
            if not any(head):
                if long_name or records:
                    raise BadTar(long_name, "is a header without an entry")
                return self.end()
            if octal(head[148:156], "checksum") != sum(head[:148]) + 8 * 32 + sum(head[156:]):
                raise BadTar(b"", "a header's checksum is wrong")
            entry = plain(head)
            if entry.kind not in (b"x", b"g", b"L"):
                break
            if entry.size > EXTENSION_BYTES:
                raise BadTar(entry.name, f"has a header of {entry.size} bytes")
            data = self.exactly(entry.size)
            self.exactly(-entry.size % BLOCK)
            if entry.kind == b"L":
                long_name = long_name_of(data)
            elif entry.kind == b"g":
                if set(pax_records(data)) - {b"comment"}:
                    raise BadTar(entry.name, "changes the names or sizes of all that follow")
            elif records:
                raise BadTar(entry.name, "is a second header of the same entry")
            else:
                records = pax_records(data)
        entry.name = records.get(b"path", long_name or entry.name)
        entry.link = records.get(b"linkpath", entry.link)
        if b"mtime" in records:
            entry.mtime_ns = nanoseconds(records[b"mtime"])
        if entry.kind != FILE and entry.size:
            raise BadTar(entry.name, "has data, and is no file")
        self.left, self.padding = entry.size, -entry.size % BLOCK
        return entry

    def end(self):
        rest = self.exactly(BLOCK)
        size = 0
        while rest:
            size += len(rest)
            if any(rest) or size > PADDING_BYTES:
                raise BadTar(b"", "something follows the end of the archive")
            rest, self.ready = self.ready or self.chunk(), b""
        self.left = self.padding = 0


def plain(head):
    """The entry of one header block."""
    name = head[0:100].split(b"\0")[0]
    if head[257:263] == b"ustar\0" and head[345]:
        name = head[345:500].split(b"\0")[0] + b"/" + name
    kind = FILE if head[156:157] == b"\0" else head[156:157]
    size, mode, mtime = (octal(head[part], "number") for part in (slice(124, 136), slice(100, 108), slice(136, 148)))
    return Entry(name, kind, size, mode, head[157:257].split(b"\0")[0], mtime * 10**9)


def octal(field, what):
    text = field.strip(b" \0")
    if not all(digit in b"01234567" for digit in text):
        raise BadTar(b"", f"a header's {what} is {bytes(field)!r}")
    return int(text or b"0", 8)


def long_name_of(data):
    name, _, rest = data.partition(b"\0")
    if any(rest) or not name:
        raise BadTar(name, "is a long name that is none")
    return name


def pax_records(data):
    records = {}
    while data:
        digits, _, _ = data.partition(b" ")
        if not (digits.isdigit() and len(digits) < 8 and len(digits) + 3 <= int(digits) <= len(data)):
            raise BadTar(b"", "a pax header has a record of the wrong size")
        record, data = data[len(digits) + 1 : int(digits)], data[int(digits) :]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise BadTar(b"", "a pax header has a record without a value")
        if key in (b"path", b"linkpath", b"mtime"):
            records[key] = value[:-1]
        elif key.decode("utf-8", "replace") in HARMLESS or key.startswith(b"SCHILY.xattr."):
            records.setdefault(b"comment", b"")
        else:
            raise BadTar(records.get(b"path", b""), f"has the pax record {key[:100]!r}, which changes what it is")
    return records


def nanoseconds(text):
    """A decimal number of seconds."""
    sign, digits = (-1, text[1:]) if text[:1] == b"-" else (1, text)
    whole, dot, fraction = digits.partition(b".")
    if not (whole.isdigit() and len(whole) < 15 and (not dot or fraction.isdigit())):
        raise BadTar(b"", f"a pax header has the time {text[:50]!r}")
    return sign * (int(whole) * 10**9 + int(fraction[:9].ljust(9, b"0")))
