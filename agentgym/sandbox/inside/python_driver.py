"""The stateful Python of a box: reads code on descriptor 3, runs it, answers on descriptor 4. Law: standard library
only, because this source is sent into the box; the code it runs may do anything to it, so nothing here is a defence.

A message is JSON {"id", "code", "limit"}; an answer is a line of JSON {"id", "ok"} and then text: the value of a
trailing expression or the traceback. What the code prints goes to standard output, which others collect.
"""

import ast
import json
import linecache
import os
import struct
import sys
import traceback

MAX_FRAMES = 20


def read_exactly(fd, size):
    data = b""
    while len(data) < size:
        more = os.read(fd, size - len(data))
        if not more:
            os._exit(0)
        data += more
    return data


def cut(text, limit):
    """At most about `limit` bytes, head and tail."""
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= limit:
        return data
    half = limit // 2
    return data[:half] + b"\n[... %d bytes dropped ...]\n" % (len(data) - 2 * half) + data[len(data) - half :]


def explain(error):
    """The traceback from the first frame of the code on."""
    entry = error.__traceback__
    while entry is not None and not entry.tb_frame.f_code.co_filename.startswith("<cell "):
        entry = entry.tb_next
    shown = traceback.TracebackException(type(error), error, entry, limit=-MAX_FRAMES, compact=True)
    return "".join(shown.format()).rstrip("\n")


def run(code, name, variables):
    """(whether it went well, the value of a trailing expression or the traceback)"""
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    try:
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), variables)
        if last is None:
            return True, ""
        value = eval(compile(ast.Expression(last.value), name, "eval"), variables)
        return True, "" if value is None else repr(value)
    except BaseException as error:  # noqa: BLE001 the code may raise anything, SystemExit too; the state outlives it
        try:
            return False, explain(error)
        except BaseException as second:  # noqa: BLE001 as above, in its own __str__
            return False, f"{type(error).__name__} (its traceback cannot be shown: {type(second).__name__})"


def main():
    os.set_inheritable(3, False)
    os.set_inheritable(4, False)
    sys.path.insert(0, os.getcwd())
    variables = {"__name__": "__main__", "__builtins__": __builtins__}
    myself = os.getpid()
    while True:
        message = json.loads(read_exactly(3, struct.unpack(">I", read_exactly(3, 4))[0]))
        ok, text = run(message["code"], f"<cell {message['id']}>", variables)
        if os.getpid() != myself:
            os._exit(0)  # a fork of the code came back here: only its parent answers
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BaseException as error:  # noqa: BLE001 the code may have closed or replaced it
                text += f"\n({type(error).__name__} while flushing its output)"
        answer = json.dumps({"id": message["id"], "ok": ok}).encode() + b"\n" + cut(text, message["limit"])
        view = memoryview(struct.pack(">I", len(answer)) + answer)
        while view:
            view = view[os.write(4, view) :]


if __name__ == "__main__":
    main()
