"""The processes of a box: starting, following, killing and stopping them. Law as in worker.py."""

import _signal  # pyright: ignore[reportMissingImports]
import errno
import posix
import select
import time

from agentgym.sandbox.inside.worker_line import Refused
from agentgym.sandbox.inside.worker_streams import Capture, Pipes, drain, feed, read_some

LINGER_S = 0.1  # how long the output of a finished command is still read while a background child holds it open
STOP_S = 10.0  # how long a process may take to stop
DYING_S = 5.0  # how long what was killed may take to be gone: it needs a processor for that, too
BIRTHS = 30  # so many times in a row something new is found that was born meanwhile
ENDING_S = 5.0  # how long a process may take to end that has closed its answers
STOPPED, DEAD = b"Tt", b"ZX"


class Resident:
    """A process that stays: it reads framed messages on its descriptor 3 and answers on its descriptor 4."""

    def __init__(self, pid, to_fd, from_fd, output_fd, before):
        self.pid, self.to_fd, self.from_fd, self.output_fd, self.before = pid, to_fd, from_fd, output_fd, before

    def close_output(self):
        if self.output_fd is not None:
            posix.close(self.output_fd)
            self.output_fd = None

    def close(self):
        posix.close(self.to_fd)
        posix.close(self.from_fd)
        self.close_output()


class Processes:
    def __init__(self, line, settings, environment):
        self.line, self.environment = line, environment
        self.output_limit = settings["output_limit"]
        self.residents = {}
        self.next_resident = 1
        self.frozen = None  # while frozen: who was stopped already before

    def spawn(self, argv, cwd, streams):
        """Starts argv in a session of its own; `streams` maps the child's descriptors to ours."""
        home = posix.getcwd()
        try:
            posix.chdir(cwd or home)
        except OSError as error:
            raise Refused("missing", f"the directory {cwd!r} cannot be entered: {error.strerror}") from None
        try:
            path = find_program(argv[0], self.environment.get("PATH", "/bin:/usr/bin"))
            actions = [(posix.POSIX_SPAWN_DUP2, source, target) for target, source in streams.items()]
            restored = [_signal.SIGPIPE, _signal.SIGXFSZ, _signal.SIGCHLD, _signal.SIGINT]
            pid = posix.posix_spawn(path, argv, self.environment, file_actions=actions, setsid=True, setsigdef=restored)
        finally:
            posix.chdir(home)
        self.line.statuses[pid] = None
        prefer_for_killing(pid)
        return pid

    def kill(self, pid, before, sessions=()):
        """Kills the process group of `pid` and whatever was born since `before` was taken, daemons included; but not
        what belongs to an older session, or to one of `sessions`: nothing can enter a session that is there already."""
        spared = {*before.values(), *sessions}
        signalled(-pid, _signal.SIGKILL)
        killed, births, until = set(), 0, time.monotonic() + DYING_S
        while births < BIRTHS:
            born = {entry for entry, session in alive().items() if entry not in before and session not in spared}
            births += not born <= killed
            for other in [entry[0] for entry in born] if before or sessions else [-1]:  # -1: nobody is to be spared
                signalled(other, _signal.SIGKILL)
            self.line.reap()
            if not born or (born <= killed and time.monotonic() >= until):
                return  # what was killed does nothing more, however long it takes to be gone
            killed |= born
            time.sleep(0.001 * (1 + births))
        signalled(-1, _signal.SIGKILL)  # something forks faster than it can be found
        until = time.monotonic() + DYING_S
        while alive() and time.monotonic() < until:  # those that still die hold the places of those that come next
            self.line.reap()
            time.sleep(0.002)
        self.line.reap()

    # -------------------------------------------------------------------------------------------------- one command

    def do_exec(self, request, body):
        started = time.monotonic()
        stdin = body.whole()
        before = alive()
        with Pipes() as pipes:
            in_read, in_write = pipes.open(1)
            out_read, out_write = pipes.open(0)
            err_read, err_write = pipes.open(0)
            try:
                pid = self.spawn(request["argv"], request["cwd"], {0: in_read, 1: out_write, 2: err_write})
            except OSError as error:
                code = {errno.ENOENT: 127, errno.EACCES: 126, errno.ENOEXEC: 126}.get(error.errno or 0)
                if code is None:
                    raise
                text = f"{request['argv'][0]}: {error.strerror}\n".encode()
                return outcome(code, b"", text, 0, time.monotonic() - started)
            pipes.close(in_read, out_write, err_write)
            captures = {out_read: Capture(self.output_limit), err_read: Capture(self.output_limit)}
            timeout = self.follow(pid, pipes, captures, (in_write, stdin), started + request["timeout_s"])
            if timeout:
                self.kill(pid, before)
            for fd, capture in captures.items():
                if fd in pipes:
                    drain(fd, capture, 64)
        code = self.line.statuses.pop(pid)
        (out, dropped_out), (err, dropped_err) = (capture.result() for capture in captures.values())
        answer, data = outcome(code, out, err, dropped_out + dropped_err, time.monotonic() - started)
        return {**answer, "timeout": timeout}, data

    def follow(self, pid, pipes, captures, feeding, until):
        """Moves bytes until the process has ended and its output too; whether `until` came first."""
        in_write, rest = feeding[0], memoryview(feeding[1])
        while True:
            ended = self.line.statuses[pid] is not None
            if ended or not rest:
                pipes.close(in_write)
            fds = {fd: select.POLLIN for fd in captures if fd in pipes}
            if ended and not fds:
                return False
            if ended:
                until = min(until, time.monotonic() + LINGER_S)  # a background child still holds the output
            if in_write in pipes:
                fds[in_write] = select.POLLOUT
            ready = self.line.wait(until, fds)
            if in_write in ready:
                rest = feed(in_write, rest)
            for fd, capture in captures.items():
                if fd in ready and not drain(fd, capture, 16):
                    pipes.close(fd)
            if time.monotonic() >= until:
                return self.line.statuses[pid] is None

    # ------------------------------------------------------------------------------------------- resident processes

    def do_spawn(self, request, _):
        before = alive()
        with Pipes() as pipes:
            to_read, to_write = pipes.open(1)
            from_read, from_write = pipes.open(0)
            output_read, output_write = pipes.open(0)
            null = pipes.adopt(posix.open("/dev/null", posix.O_RDONLY))
            streams = {0: null, 1: output_write, 2: output_write, 3: to_read, 4: from_write}
            pid = self.spawn(request["argv"], request["cwd"], streams)
            pipes.keep(to_write, from_read, output_read)
        number, self.next_resident = self.next_resident, self.next_resident + 1
        self.residents[number] = Resident(pid, to_write, from_read, output_read, before)
        return {"process": number}, b""

    def do_ask(self, request, body):
        started = time.monotonic()
        message = body.whole()
        resident = self.residents.get(request["process"])
        if resident is None:
            raise Refused("missing", f"no process {request['process']} in this box")
        output = Capture(self.output_limit)
        framed = len(message).to_bytes(4, "big") + message
        state, answer = self.converse(resident, framed, output, started + request["timeout_s"])
        if resident.output_fd is not None:
            drain(resident.output_fd, output, 64)
        code = None
        if state != "answered":
            code = self.end_resident(request["process"], ENDING_S if state == "died" else 0.0)
            state = "died" if state == "nonsense" else state
        kept, dropped = output.result()
        result = {"state": state, "exit_code": code, "output": len(kept), "dropped": dropped}
        return {**result, "seconds": time.monotonic() - started}, kept + answer

    def converse(self, resident, framed, output, until):
        """Sends one message and reads one answer: ("answered" | "timeout" | "died" | "nonsense", the answer)."""
        rest, answer = memoryview(framed), bytearray()
        while True:
            fds = {resident.from_fd: select.POLLIN}
            if resident.output_fd is not None:
                fds[resident.output_fd] = select.POLLIN
            if rest:
                fds[resident.to_fd] = select.POLLOUT
            gone = self.line.statuses[resident.pid] is not None
            ready = self.line.wait(time.monotonic() if gone else until, fds)
            if resident.to_fd in ready:
                rest = feed(resident.to_fd, rest)
            if resident.output_fd in ready and not drain(resident.output_fd, output, 16):
                resident.close_output()
            if resident.from_fd in ready:
                data = read_some(resident.from_fd)
                if data == b"":
                    return "died", b""
                answer += data or b""
            elif gone:
                return "died", b""
            if len(answer) >= 4:
                size = int.from_bytes(answer[:4], "big")
                if size > self.output_limit + 4096 or len(answer) > 4 + size:
                    return "nonsense", b""
                if len(answer) == 4 + size:
                    return "answered", bytes(answer[4:])
            if time.monotonic() >= until:
                return "timeout", b""

    def do_stop(self, request, _):
        if request["process"] in self.residents:
            self.end_resident(request["process"])
        return {}, b""

    def end_resident(self, number, patience_s=0.0):
        """Its state is lost, so everything born after it goes with it. Its exit code; None if it had to be killed."""
        resident = self.residents.pop(number)
        code = self.status_within(resident.pid, patience_s)
        self.kill(resident.pid, resident.before, [other.pid for other in self.residents.values()])
        self.status_within(resident.pid, 1.0)
        del self.line.statuses[resident.pid]
        resident.close()
        return code

    def status_within(self, pid, patience_s):
        """The exit code of a child that is ending, None if it does not end."""
        until = time.monotonic() + patience_s
        while True:
            self.line.reap()
            if self.line.statuses[pid] is not None or time.monotonic() >= until:
                return self.line.statuses[pid]
            time.sleep(0.002)

    # ------------------------------------------------------------------------------------------------ standing still

    def do_freeze(self, request, _):
        self.stop_all()
        return {}, b""

    def do_thaw(self, request, _):
        self.go_on()
        return {}, b""

    def stop_all(self):
        """Stops everything at once: nothing is left that could let anything go on."""
        if self.frozen is not None:
            return
        self.frozen = alive(STOPPED)
        signalled(-1, _signal.SIGSTOP)
        until = time.monotonic() + STOP_S
        while moving():
            if time.monotonic() >= until:
                self.go_on()
                raise Refused("failed", f"a process did not stop within {STOP_S:g} s")
            time.sleep(0.001)

    def go_on(self):
        if self.frozen is None:
            return
        before, self.frozen = self.frozen, None
        if not before:
            signalled(-1, _signal.SIGCONT)
        else:
            for entry in alive(STOPPED):
                if entry not in before:
                    signalled(entry[0], _signal.SIGCONT)


def prefer_for_killing(pid):
    """When memory runs out, the kernel should take a command and not the worker."""
    try:
        fd = posix.open(f"/proc/{pid}/oom_score_adj", posix.O_WRONLY | posix.O_CLOEXEC)
    except OSError:
        return  # it has ended already
    try:
        posix.write(fd, b"900")
    except OSError:
        pass
    finally:
        posix.close(fd)


def signalled(pid, number):
    """Sends a signal; -1, from pid 1, means all the others at once. Whether anybody was there."""
    try:
        posix.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def alive(states=None):
    """{(pid, start time): session} of what lives in the box but the worker, or of what is in one of these states; the
    pair tells reused pids apart."""
    found = {}
    for name in posix.listdir("/proc"):
        if name.isdigit() and name != "1":
            fields = stat_of(f"/proc/{name}/stat")
            if fields and (fields[0] not in DEAD if states is None else fields[0] in states):
                found[int(name), int(fields[19])] = int(fields[3])
    return found


def moving():
    """Whether a thread of any process is neither stopped nor dead. One that waits for the exec of a child that stands
    still (vfork) cannot stop before, and stands still as well."""
    waiting, held = set(), set()
    for name in posix.listdir("/proc"):
        if not name.isdigit() or name == "1":
            continue
        try:
            threads = posix.listdir(f"/proc/{name}/task")
        except OSError:
            continue
        for thread in threads:
            fields = stat_of(f"/proc/{name}/task/{thread}/stat")
            if fields and fields[0] in STOPPED:
                held.add(fields[1])
            elif fields and fields[0] == b"D":
                waiting.add(name.encode())
            elif fields and fields[0] not in DEAD:
                return True
    return not waiting <= held


def stat_of(path):
    """The fields after the name: state, parent, ...; None if it is gone."""
    try:
        fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:
        return None
    try:
        return posix.read(fd, 1024).rpartition(b")")[2].split() or None
    except OSError:
        return None
    finally:
        posix.close(fd)


def outcome(code, out, err, dropped, seconds):
    header = {"exit_code": code, "out": len(out), "err": len(err), "dropped": dropped, "seconds": seconds}
    return {**header, "timeout": False}, out + err


def find_program(name, path):
    if "/" in name:
        return name
    refused = None
    for folder in path.split(":"):
        candidate = (folder or ".") + "/" + name
        try:
            is_file = posix.stat(candidate).st_mode & 0o170000 == 0o100000
        except OSError:
            continue
        if is_file and posix.access(candidate, posix.X_OK):
            return candidate
        if is_file:
            refused = PermissionError(errno.EACCES, posix.strerror(errno.EACCES), name)
    raise refused or FileNotFoundError(errno.ENOENT, "command not found", name)
