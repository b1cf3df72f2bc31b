"""What a frame is, for both its ends. Law: standard library only, and only modules written in C that cost nothing to
import, because this source is sent into the box and a box must start in milliseconds.

A frame is two big-endian uint32 (length of the header, length of the body), a tag, the header, raw bytes. The tag
proves that the other end of the line wrote it: in a box on gVisor any process may open the worker's streams through
/proc/1/fd, and what it writes there must never be believed. The key travels in the first frame, before anything else
runs in the box; the number of the frame is part of what is tagged, so that none can be sent twice.
"""

from _blake2 import blake2b

SIZES, TAG = 8, 16
PART = 1 << 20  # what is larger travels as several frames
HOST, BOX = b"host", b"box"


def sizes_of(header, body):
    return len(header).to_bytes(4, "big") + len(body).to_bytes(4, "big")


def tag_of(key, sender, number, sizes, header, body):
    digest = blake2b(number.to_bytes(8, "big") + sizes + header, digest_size=TAG, key=key, person=sender)
    digest.update(body)
    return digest.digest()


def sealed(key, sender, number, header, body):
    """The frame without its body, which follows."""
    sizes = sizes_of(header, body)
    return sizes + tag_of(key, sender, number, sizes, header, body) + header
