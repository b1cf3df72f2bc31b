"""The stateful shell of a box: reads commands on descriptor 3, lets one shell run them all, answers on descriptor 4.
Law: standard library only, because this source is sent into the box; the commands may do anything to it and to the
shell, so nothing here is a defence.

A message is JSON {"id", "command"}; an answer is JSON {"id", "exit_code", "ended"}: the command's exit code, and
whether the shell is gone. What the commands print goes to standard output, which others collect.

The shell reads one line for each command, with its newlines escaped, and evaluates it in itself; that is all POSIX asks
of a shell, so bash and dash serve alike. It reports at the top of its loop, where `continue` and `break` lead as well;
its two pipes are closed to what it runs, and what the loop itself does is not shown by `set -x`.
"""

import json
import os
import select
import signal

LOOP = r"""
__agentgym_status() { return "$1"; }
while :; do
  while { __agentgym_code=$?; echo "$__agentgym_code" >&9; IFS= read -r __agentgym_line || exit; } <&8 2>/dev/null; do
    { __agentgym_line=$(printf '%b.' "$__agentgym_line"); __agentgym_status "$__agentgym_code"; } 2>/dev/null
    { command eval "${__agentgym_line%.}"; } 8<&- 9>&-
  done
done
"""


def read_exactly(fd, size):
    data = b""
    while len(data) < size:
        more = os.read(fd, size - len(data))
        if not more:
            os._exit(0)
        data += more
    return data


def find_shell():
    """bash where there is one."""
    folders = os.environ.get("PATH", "/bin:/usr/bin").split(":")
    for folder in folders:
        candidate = os.path.join(folder, "bash")
        if os.access(candidate, os.X_OK):
            return [candidate, "--norc", "--noprofile", "-c", LOOP, "bash"]
    return ["/bin/sh", "-c", LOOP, "sh"]


def start():
    """A new shell: (its process, where its commands go, where its exit codes come from)."""
    commands, feed = os.pipe()
    codes, report = os.pipe()
    argv = find_shell()
    # above 9 first: one of the pipes may be 8 or 9 itself
    high = [os.dup2(fd, fd + 100, inheritable=False) for fd in (commands, report)]
    actions = [(os.POSIX_SPAWN_DUP2, high[0], 8), (os.POSIX_SPAWN_DUP2, high[1], 9)]
    ignored = [signal.SIGPIPE, signal.SIGXFSZ]  # by every Python, and what a shell starts with ignored stays so
    pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=actions, setsigdef=ignored)
    for fd in (commands, report, *high):
        os.close(fd)
    return pid, feed, codes


def escaped(command):
    """One line, which `printf %b` turns into the command again."""
    return command.replace("\\", "\\\\").replace("\n", "\\n").encode("utf-8", "surrogateescape") + b"\n"


def run(shell, command):
    """(exit code, whether the shell is gone)"""
    pid, feed, codes = shell
    line = memoryview(escaped(command))
    try:
        while line:
            line = line[os.write(feed, line) :]
    except BrokenPipeError:
        return ending(pid), True
    code = report_of(pid, codes)
    return (ending(pid), True) if code is None else (code, False)


def report_of(pid, codes):
    """The next exit code that the shell reports; None if it ends, or was ended because it reported nonsense."""
    answer = b""
    while not answer.endswith(b"\n"):
        ready, _, _ = select.select([codes], [], [], 0.05)
        if ready:
            data = os.read(codes, 4096)
            if not data:
                return None
            answer += data
        elif has_ended(pid):
            return None  # a child of the shell may hold its pipe open
    text = answer.strip()
    if text.isdigit() and int(text) < 256:
        return int(text)
    os.kill(pid, signal.SIGKILL)
    return None


def has_ended(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def ending(pid):
    """The exit code of a shell that has closed its pipes: it ends, or has become another program (`exec`), which may
    take as long as any command."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main():
    os.set_inheritable(3, False)
    os.set_inheritable(4, False)
    shell = start()
    report_of(shell[0], shell[2])  # it is ready
    while True:
        message = json.loads(read_exactly(3, int.from_bytes(read_exactly(3, 4), "big")))
        exit_code, ended = run(shell, message["command"])
        answer = json.dumps({"id": message["id"], "exit_code": exit_code, "ended": ended}).encode()
        os.write(4, len(answer).to_bytes(4, "big") + answer)
        if ended:
            os._exit(0)


if __name__ == "__main__":
    main()
