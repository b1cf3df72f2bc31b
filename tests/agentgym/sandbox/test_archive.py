"""Archives: what is taken, what is refused and by which name, and that nothing is ever written elsewhere."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import ArchiveError, InputError
from agentgym.sandbox.archive import Archive, ArchivedFile, ArchiveLimits
from agentgym.sandbox.inside.worker_tar import (
    END,
    FILE,
    FOLDER,
    LINK,
    BadTar,
    Entry,
    Reader,
    padded,
    pax_record,
    pax_records,
)

NAMES = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..") and len(name.encode()) < 100
)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)


@st.composite
def archives(draw: st.DrawFn) -> Archive:
    contents: dict[str, bytes] = {}
    for path, data in draw(st.dictionaries(PATHS, st.binary(max_size=1200), max_size=6)).items():
        if not any(path.startswith(f"{other}/") or other.startswith(f"{path}/") for other in contents):
            contents[path] = data
    runs = draw(st.sets(st.sampled_from(sorted(contents)))) if contents else set()
    return Archive.of(contents, executable=runs)


def tar_of(*entries: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar by the standard library's writer."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for entry in entries:
            info, data = entry if isinstance(entry, tuple) else (entry, b"")
            info.size = info.size or len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def info(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = kind
    for field, value in fields.items():
        setattr(entry, field, value)
    return entry


# ------------------------------------------------------------------------------------------------------ what is taken


@given(archives())
def test_a_tar_brings_back_what_was_put_into_it(archive: Archive) -> None:
    assert Archive.from_tar(archive.to_tar()) == archive


@given(archives(), st.integers(1, 700))
def test_a_tar_may_come_in_pieces(archive: Archive, size: int) -> None:
    tar = archive.to_tar()
    assert Archive.from_tar(tar[at : at + size] for at in range(0, len(tar), size)) == archive


@given(archives())
def test_the_standard_librarys_reader_sees_the_same(archive: Archive) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive.to_tar())) as tar:
        members = tar.getmembers()
        files = {m.name: ArchivedFile(tar.extractfile(m).read(), m.mode == 0o755) for m in members if m.isfile()}  # type: ignore[union-attr]
        assert files == dict(archive.files)
        assert {member.name for member in members if member.isdir()} == archive.folders


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_programs_are_read(form: int) -> None:
    long = "/".join(["folder" * 3] * 7) + "/file"
    assert 100 < len(long) < 155
    tar = tar_of(
        info("./", tarfile.DIRTYPE),
        info("./a", tarfile.DIRTYPE, mode=0o700),
        (info("./a/run", mode=0o700, mtime=1.5, uname="root"), b"x" * 513),
        (info(long), b"deep"),
        (info("old", tarfile.AREGTYPE), b"type 0"),
        form=form,
    )
    archive = Archive.from_tar(tar)
    assert archive.files["a/run"] == ArchivedFile(b"x" * 513, executable=True)
    assert archive.read(long) == b"deep"
    assert archive.read("old") == b"type 0"
    assert long.rpartition("/")[0] in archive
    assert archive.num_bytes == 513 + 4 + 6


def test_an_archive_is_made_of_contents() -> None:
    archive = Archive.of({"a/b/c.sh": "é", "d": b"\xff"}, executable=["a/b/c.sh"])
    assert archive.folders == {"a", "a/b"}
    assert archive.files == {"a/b/c.sh": ArchivedFile("é".encode(), True), "d": ArchivedFile(b"\xff", False)}
    with pytest.raises(ArchiveError, match="no file 'a'"):
        archive.read("a")
    with pytest.raises(InputError, match="zz"):
        Archive.of({"a": b""}, executable=["zz"])
    assert Archive.of({}) == Archive.from_tar(END) == Archive({}, frozenset())


def test_the_same_archive_is_the_same_tar() -> None:
    assert Archive.of({"a": b"1", "b/c": b"2"}).to_tar() == Archive.of({"b/c": b"2", "a": b"1"}).to_tar()


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (info("../up", size=0), r"'\.\./up' holds '\.\.'"),
        (info("a/../../up"), "holds '..'"),
        (info("/etc/passwd"), "'/etc/passwd' is an absolute path"),
        (info("a//b"), "'a//b' is no path"),
        (info("a/./b"), "'a/./b' is no path"),
        (info("a", tarfile.SYMTYPE, linkname="/etc"), "'a' is a symbolic link"),
        (info("a", tarfile.LNKTYPE, linkname="b"), "'a' is a hard link"),
        (info("a", tarfile.CHRTYPE), "'a' is a device"),
        (info("a", tarfile.BLKTYPE), "'a' is a device"),
        (info("a", tarfile.FIFOTYPE), "'a' is a named pipe"),
        (info("a", tarfile.CONTTYPE), "'a' is of the unknown kind b'7'"),
        (info("a", tarfile.GNUTYPE_SPARSE), "'a' is a sparse file"),
        (info("a", pax_headers={"GNU.sparse.size": "9"}), "GNU.sparse.size"),
        (info("a", pax_headers={"size": "9"}), "size"),
        (info("a", pax_headers={"path": "a\0b"}), "is no path"),
        (info("a", pax_headers={"path": "/abs"}), "'/abs' is an absolute path"),
        (info("x" * 256), "255 bytes for a name"),
        (info("\udcff"), "no UTF-8|hdrcharset"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name[:12].encode("utf-8", "replace").decode(),
)
def test_an_entry_that_is_not_taken_is_named(entry: tarfile.TarInfo, said: str) -> None:
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        if form == tarfile.GNU_FORMAT and entry.pax_headers:
            continue  # only pax has these
        with pytest.raises(ArchiveError, match=said):
            Archive.from_tar(tar_of((info("first"), b"fine"), entry, form=form))


def test_a_header_for_all_entries_may_only_comment() -> None:
    for headers, taken in ({"comment": "hi"}, True), ({"path": "evil"}, False):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
            tar.addfile(tarfile.TarInfo("a"))
        if taken:
            assert "a" in Archive.from_tar(buffer.getvalue())
        else:
            with pytest.raises(ArchiveError, match="all that follow"):
                Archive.from_tar(buffer.getvalue())


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "a"], "'a' twice"),
        (["a", "a/b"], "'a' as a file and as a folder"),
        (["a/b", "a"], "'a' as a folder and as a file"),
        (["a", "a/"], "'a' as a file and as a folder"),
    ],
)
def test_an_entry_in_the_place_of_another_is_refused(names: list[str], said: str) -> None:
    entries = [info(name.rstrip("/"), tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE) for name in names]
    with pytest.raises(ArchiveError, match=said):
        Archive.from_tar(tar_of(*entries))


def test_limits_hold_before_the_bytes_are_read() -> None:
    limits = ArchiveLimits(entries=3, bytes=1000, depth=2, path_bytes=20)
    assert Archive.from_tar(tar_of((info("a/b"), bytes(999)), (info("c"), b"1")), limits).num_bytes == 1000
    for tar, said in [
        (tar_of((info("a"), bytes(999)), (info("b"), b"12")), "more than 1000 bytes: 'b' has 2"),
        (tar_of(info("a/b"), info("c"), info("d")), "more than 3 entries, the last is 'd'"),
        (tar_of(info("a/b/c")), "3 names"),
        (tar_of(info("a" * 21)), "21 bytes"),
    ]:
        with pytest.raises(ArchiveError, match=said):
            Archive.from_tar(tar, limits)
    huge = Entry(b"huge", FILE, 8**11 - 1).header()

    def endless() -> object:
        yield huge
        raise AssertionError("the bytes of a file that is too large were asked for")

    with pytest.raises(ArchiveError, match="'huge' has 8589934591"):
        Archive.from_tar(endless())  # type: ignore[arg-type]
    with pytest.raises(ArchiveError, match="1000 bytes"):
        Archive.of({"a": bytes(1001)}, limits=limits)


@pytest.mark.parametrize(
    ("tar", "said"),
    [
        (b"", "ends in the middle"),
        (b"nonsense" * 100, "checksum|number"),
        (Entry(b"a", FILE, 10).header(), "ends in the middle"),
        (Entry(b"a", FILE, 1).header() + padded(b"1"), "ends in the middle"),
        (bytes(512), "ends in the middle"),
        (END + b"x", "something follows"),
        (END + bytes(2 << 20), "something follows"),
        (Entry(b"a", FOLDER, 5).header() + padded(b"12345") + END, "has data"),
        (Entry(b"p", b"x", 1 << 30).header(), "header of 1073741824 bytes"),
        (Entry(b"p", b"x", 5).header() + padded(b"99 a=") + END, "wrong size"),
        (Entry(b"p", b"x", 6).header() + padded(b"6 a=b\0") + END, "without a value"),
        (Entry(b"p", b"x", 6).header() + padded(b"6 uid\n") + END, "without a value"),
        (Entry(b"p", b"x", 8).header() + padded(b"8 uid=1\n") + END, "without an entry"),
        (
            2 * (Entry(b"p", b"x", 8).header() + padded(b"8 uid=1\n")) + Entry(b"a", FILE).header() + END,
            "second header",
        ),
        (Entry(b"p", b"L", 4).header() + padded(b"a\0b\0") + Entry(b"a", FILE).header() + END, "long name"),
        (Entry(b"p", b"x", 11).header() + padded(b"11 mtime=x\n") + Entry(b"a", FILE).header() + END, "time b'x'"),
    ],
    ids=range(16),
)
def test_what_is_no_tar_is_said(tar: bytes, said: str) -> None:
    with pytest.raises(ArchiveError, match=said):
        Archive.from_tar(tar)


@pytest.mark.parametrize("size", [b"+0000000001\0", b"0o000000001\0", b"0000_000001\0", b"\x80" + bytes(10) + b"\1"])
def test_a_size_is_octal_digits_and_nothing_that_python_would_read(size: bytes) -> None:
    head = bytearray(Entry(b"a", FILE, 1).header())
    head[124:136] = size
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    with pytest.raises(ArchiveError, match="number"):
        Archive.from_tar(bytes(head) + padded(b"1") + END)


@given(archives(), st.data())
def test_no_change_of_bytes_is_more_than_a_refusal(archive: Archive, data: st.DataObject) -> None:
    tar = bytearray(archive.to_tar())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(tar) - 1))
        tar[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # checksums that fit, so that what lies behind them is reached
        for start in range(0, len(tar) - 511, 512):
            if tar[start + 257 : start + 262] == b"ustar":
                tar[start + 148 : start + 156] = b" " * 8
                tar[start + 148 : start + 156] = b"%06o\0 " % sum(tar[start : start + 512])
    del tar[data.draw(st.integers(0, len(tar))) if data.draw(st.booleans()) else len(tar) :]
    try:
        read = Archive.from_tar(bytes(tar))
    except ArchiveError:
        return
    assert Archive.from_tar(read.to_tar()) == read
    assert not any(path.startswith("/") or ".." in path.split("/") for path in (*read.files, *read.folders))


@given(st.binary(min_size=1, max_size=200), st.binary(max_size=200))
def test_pax_records_of_any_size_are_read_back(key: bytes, value: bytes) -> None:
    record = pax_record(b"path", value)
    assert pax_records(record) == {b"path": value}
    assert int(record.split(b" ")[0]) == len(record)
    try:
        pax_records(key)
    except BadTar:
        return


@given(st.integers(-(10**12), 10**19))
def test_times_are_kept_to_the_nanosecond(mtime_ns: int) -> None:
    pieces = iter([Entry(b"a", LINK, link=b"b" * 150, mtime_ns=mtime_ns).header(), END])
    entry = Reader(lambda: next(pieces, b"")).next()
    assert entry is not None
    assert (entry.mtime_ns, entry.link) == (mtime_ns, b"b" * 150)


# ---------------------------------------------------------------------------------------------- folders of this machine


@given(archives())
def test_a_folder_brings_back_what_was_written_to_it(
    tmp_path_factory: pytest.TempPathFactory, archive: Archive
) -> None:
    folder = tmp_path_factory.mktemp("written") / "new"
    archive.write_to(folder)
    assert Archive.from_folder(folder) == archive
    archive.write_to(folder)
    assert Archive.from_folder(folder) == archive


def test_links_and_pipes_of_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for make, said in [
        (lambda path: path.symlink_to("/etc/passwd"), "odd is a symbolic link"),
        (lambda path: path.symlink_to(tmp_path), "odd is a symbolic link"),
        (lambda path: os.mkfifo(path), "odd is neither a file nor a folder"),
    ]:
        odd = tmp_path / "inner" / "odd"
        make(odd)
        with pytest.raises(ArchiveError, match=said):
            Archive.from_folder(tmp_path)
        odd.unlink()
    with pytest.raises(InputError, match="not a folder"):
        Archive.from_folder(tmp_path / "absent")


def test_a_link_in_the_target_is_never_followed(tmp_path: Path) -> None:
    outside, target = tmp_path / "outside", tmp_path / "target"
    for folder in (outside, target):
        folder.mkdir()
    (outside / "kept").write_text("kept")
    (target / "folder").symlink_to(outside)
    with pytest.raises(ArchiveError, match="'folder' is a link or a file"):
        Archive.of({"folder/kept": "overwritten"}).write_to(target)
    (target / "file").symlink_to(outside / "kept")
    os.link(outside / "kept", target / "hard")
    Archive.of({"file": "new", "hard": "new"}).write_to(target)
    assert (target / "file").read_text() == "new"
    assert not (target / "file").is_symlink()
    assert (outside / "kept").read_text() == "kept"
    (target / "dir").mkdir()
    with pytest.raises(ArchiveError, match="'dir' is a folder, and cannot be replaced"):
        Archive.of({"dir": "x"}).write_to(target)
    with pytest.raises(ArchiveError, match="'file' is a link or a file"):
        Archive.of({"file/x": "x"}).write_to(target)
    assert sorted(path.name for path in outside.iterdir()) == ["kept"]
